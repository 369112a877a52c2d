"""Samples into micro-batches: packed to a token budget, nothing padded, the same list always packed the same way."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from trainer.batch import Batch
from trainer.transfer import send


@dataclass
class Sample:
    """One prompt and completion to learn from. Every per-token list runs over `tokens`, the completion.

    `advantage` is one number for the whole completion or one per token. `versions` lists, in order, (policy version,
    number of tokens it sampled). A `masked` sample (its checker failed, its completion was cut) teaches nothing.
    `routed_experts` is [prompt + completion tokens, moe_layers, k], -1 where the router chooses.
    `loss_on_prompt` also trains the prompt's tokens, the first excepted: plain language modelling. `learned` picks the
    tokens of the completion to learn from; none means all of them.
    """

    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    advantage: float | Sequence[float] | None = None
    behaviour_logprobs: Sequence[float] | None = None
    versions: Sequence[tuple[int, int]] | None = None
    masked: bool = False
    teacher_logprobs: Sequence[float] | None = None
    routed_experts: Int[np.ndarray, "n moe_layers k"] | None = None
    loss_on_prompt: bool = False
    learned: Sequence[bool] | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)

    @property
    def loss_tokens(self) -> int:
        """Tokens the loss looks at; a document's first token has nothing to be predicted from."""
        if self.masked:
            return 0
        if self.learned is not None:
            return int(self.loss_mask.sum())
        first = 0 if self.loss_on_prompt else len(self.prompt_tokens)
        return max(0, self.length - max(first, 1))

    @property
    def loss_mask(self) -> Bool[np.ndarray, " n"]:
        """The tokens to learn of prompt and completion, whether `masked` or not."""
        mask = np.full(self.length, self.loss_on_prompt)
        mask[len(self.prompt_tokens) :] = True if self.learned is None else self.learned
        mask[:1] = False
        return mask


PER_TOKEN = ("behaviour_logprobs", "teacher_logprobs")


def pack(samples: Sequence[Sample], tokens_per_micro_batch: int, temperature: float = 1.0) -> list[Batch]:
    """Micro-batches of at most `tokens_per_micro_batch` tokens that hold every sample with something to learn once.

    Best-fit decreasing: longest first, each into the fullest micro-batch it still fits (at most 11/9 of the fewest
    possible, plus one); ties by position in the list, so equal lists give equal batches. Samples without a loss token
    are left out and counted in neither denominator; `sequence_ids` names the others by their position in `samples`.
    The denominators are those of the whole list, which therefore is what one optimizer step trains on. [] if nothing
    is to be learned. Raises ValueError for a sample longer than the budget and for streams that do not match their
    tokens, all of them in one message.
    """
    check(samples, tokens_per_micro_batch)
    learning = [i for i, sample in enumerate(samples) if sample.loss_tokens]
    total_tokens = sum(samples[i].loss_tokens for i in learning)
    streams = _streams([samples[i] for i in learning])
    batches = []
    for group in partition([samples[i].length for i in learning], tokens_per_micro_batch):
        # neighbours of equal length let attention run over several documents at once
        ids = sorted((learning[g] for g in group), key=lambda i: (-samples[i].length, i))
        batch = _batch([samples[i] for i in ids], streams)
        batch.total_tokens, batch.total_sequences, batch.temperature = total_tokens, len(learning), temperature
        batch.sequence_ids = torch.tensor(ids, dtype=torch.int64)
        batches.append(batch)
    return batches


def partition(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sum is at most `budget`, by best-fit decreasing. O(n log n)."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect_left(room, (lengths[index], -1))
        if slot == len(room):
            groups.append([])
            left, group = budget, len(groups) - 1
        else:
            left, group = room.pop(slot)
        groups[group].append(index)
        insort(room, (left - lengths[index], group))
    return groups


def check(samples: Sequence[Sample], tokens_per_micro_batch: int) -> None:
    """Raises one ValueError that lists every sample which cannot be packed."""
    problems = []
    routed = next((s.routed_experts.shape[1:] for s in samples if s.routed_experts is not None), None)
    for i, sample in enumerate(samples):
        n = len(sample.tokens)
        if sample.length > tokens_per_micro_batch:
            problems.append(
                f"sample {i} has {sample.length} tokens ({len(sample.prompt_tokens)} prompt + {n} completion), more "
                f"than the {tokens_per_micro_batch} of a micro-batch: raise tokens_per_micro_batch or shorten samples"
            )
        for name in (*PER_TOKEN, "learned"):
            values = getattr(sample, name)
            if values is not None and len(values) != n:
                problems.append(f"sample {i}: {name} has {len(values)} values for {n} completion tokens")
        if np.ndim(sample.advantage) == 1 and len(sample.advantage) != n:
            problems.append(f"sample {i}: advantage has {len(sample.advantage)} values for {n} completion tokens")
        if sample.versions is not None and (counted := sum(count for _, count in sample.versions)) != n:
            problems.append(f"sample {i}: versions count {counted} tokens, the completion has {n}")
        if sample.routed_experts is not None and len(sample.routed_experts) != sample.length:
            rows = len(sample.routed_experts)
            problems.append(f"sample {i}: routed_experts has {rows} rows for {sample.length} tokens")
        elif sample.routed_experts is not None and sample.routed_experts.shape[1:] != routed:
            shapes = f"{list(sample.routed_experts.shape[1:])}, others {list(routed)}"
            problems.append(f"sample {i}: routed_experts has layers and experts {shapes}; expected the same of all")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError("cannot pack:\n" + "\n".join(f"  - {problem}" for problem in shown))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with every tensor on `device`; itself if it is there already. `bounds` stay on the CPU: they are read
    to lay out the attention, and reading them back from a GPU would wait for it."""
    if batch.tokens.device == device:
        return batch
    moved = {
        field.name: send(value, device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor) and field.name != "bounds"
    }
    return dataclasses.replace(batch, **moved)


def _streams(samples: Sequence[Sample]) -> set[str]:
    """Optional streams the samples carry. A stream that only some of them carry is an error: the loss would compare
    learned values with filler. (Not so `routed_experts`: a sample without lets the router choose.)"""
    present = set()
    for name in ("advantage", "behaviour_logprobs", "teacher_logprobs", "versions"):
        carriers = sum(getattr(sample, name) is not None for sample in samples)
        if carriers == len(samples) and samples:
            present.add(name)
        elif carriers:
            raise ValueError(f"cannot pack: {carriers} of {len(samples)} samples carry {name}; give it to all or none")
    return present


def _batch(samples: Sequence[Sample], streams: set[str]) -> Batch:
    """One micro-batch; its denominators are its own until `pack` sets the global ones."""
    lengths = np.array([sample.length for sample in samples])
    bounds = np.concatenate([[0], lengths.cumsum()])
    n = int(bounds[-1])
    tokens, mask = np.empty(n, np.int64), np.zeros(n, bool)
    values = {name: np.zeros(n, np.float32) for name in ("advantage", *PER_TOKEN) if name in streams}
    versions = np.full(n, -1, np.int64) if "versions" in streams else None
    routed = [sample.routed_experts.shape[1:] for sample in samples if sample.routed_experts is not None]
    experts = np.full((n, *routed[0]), -1, np.int16) if routed else None
    for sample, start, end in zip(samples, bounds[:-1], bounds[1:], strict=True):
        completion = start + len(sample.prompt_tokens)
        tokens[start:completion] = sample.prompt_tokens
        tokens[completion:end] = sample.tokens
        mask[start:end] = sample.loss_mask
        for name, stream in values.items():
            stream[completion:end] = getattr(sample, name)
            if name == "advantage" and sample.loss_on_prompt and np.ndim(sample.advantage) == 0:
                stream[start:completion] = sample.advantage
        if versions is not None:
            versions[completion:end] = np.repeat([v for v, _ in sample.versions], [c for _, c in sample.versions])
        if experts is not None and sample.routed_experts is not None:
            experts[start:end] = sample.routed_experts
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(n) - np.repeat(bounds[:-1], lengths)),
        bounds=torch.from_numpy(bounds),
        loss_mask=torch.from_numpy(mask),
        total_tokens=int(mask.sum()),
        total_sequences=len(samples),
        advantages=torch.from_numpy(values["advantage"]) if "advantage" in values else None,
        behaviour_logprobs=torch.from_numpy(values["behaviour_logprobs"]) if "behaviour_logprobs" in values else None,
        teacher_logprobs=torch.from_numpy(values["teacher_logprobs"]) if "teacher_logprobs" in values else None,
        versions=torch.from_numpy(versions) if versions is not None else None,
        routed_experts=torch.from_numpy(experts) if experts is not None else None,
    )
