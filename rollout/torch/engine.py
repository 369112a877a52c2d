"""The in-process engine: continuous batching over a decoder that lives in this process.

What runs together depends on the order of calls and on nothing else: requests are admitted first come, first served,
as rows become free; no decision reads a clock."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollout.engine import EngineUnusable, FinishReason, Request, Rollout
from rollout.tokenizer import completion_text, folder_tokenizer
from rollout.torch.decoder import Decoder
from rollout.torch.rows import Rows
from rollout.torch.sampler import sample
from rollout.torch.stop import StopFinder
from rollout.transport.base import Receiver, WeightUpdate
from rollout.transport.transports import receive
from trainer.checkpoint.model_folder import read_config, refusal, text_end

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 4096  # tokens read in one product at most
_SCORE_LOGITS = 1 << 26  # logits held at a time while scoring, unless one sequence has more
_CONTEXT_STEP = 64  # cache rows grow in steps of this many tokens


def build_decoder(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str,
    cache: Literal["auto", "latent", "expanded"],
    kernels: Literal["auto", "native", "torch"],
    keep_routing: bool = False,
    longest: int | None = None,
) -> Decoder:
    """The decoder for a Hugging Face folder, with its weights loaded."""
    if why := refusal(path, "torch"):
        raise ValueError(f"{path}: {why}")
    if read_config(path).get("model_type") == "deepseek_v3":
        from rollout.torch.decode_native import NativeDecoder
        from rollout.torch.decode_v3 import V3Decoder, latent_is_smaller
        from trainer.checkpoint.folder import FolderReader
        from trainer.model.v3_config import V3Config

        config = V3Config.load(path)
        expanded = cache == "expanded" or (cache == "auto" and not latent_is_smaller(config))
        fits = expanded and device == "cpu" and dtype == torch.float32 and not keep_routing
        if kernels == "native" and not fits:
            raise ValueError(
                "native kernels compute float32 on a CPU with an expanded cache and return no routing, asked for were "
                f"{dtype} on {device} with cache {cache!r}, routing {keep_routing}: choose kernels='torch' or 'auto'"
            )
        native = kernels != "torch" and fits
        decoder: Decoder = (
            NativeDecoder(config)
            if native
            else V3Decoder(config, dtype=dtype, device=device, cache=cache, keep_routing=keep_routing)
        )
        log.info("%s: V3 decoding with %s kernels, %s cache", path, *_names(native, expanded))
        decoder.load(FolderReader(path))
        return decoder
    if kernels == "native":
        raise ValueError(f"native kernels decode DeepSeek-V3 models only, {path} is another one: leave kernels='auto'")
    if keep_routing:
        raise ValueError(f"routing is returned of DeepSeek-V3 models only, {path} is another one")
    from rollout.torch.decode_hf import TransformersDecoder

    return TransformersDecoder(path, dtype=dtype, device=device, longest=longest)


def _names(native: bool, expanded: bool) -> tuple[str, str]:
    return "native" if native else "torch", "expanded" if expanded else "latent"


class TorchEngine:
    """Keeps rollout.engine.Engine for the V3 architecture and for causal LMs that transformers loads.

    `path` is a Hugging Face folder. `max_batch` sequences run at once; `max_context` (default: the model's) bounds
    prompt plus completion; memory for caches is taken as the submitted requests need it. `cache` chooses what V3
    attention keeps (see decode_v3.py); `kernels="auto"` computes float32 V3 models with an expanded cache on a CPU
    with the C++ of rollout.torch.native, everything else with torch. `threads` sets torch's for the whole process.
    `return_routed_experts` gives every ended rollout the experts of its tokens, -1 for the last, which no pass reads;
    an interrupted one has none: its continuation returns those of all tokens. `sleep_level` says whether a run lets
    the engine sleep (0: never); this engine knows one way to.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 256,
        max_context: int | None = None,
        version: int = 0,
        cache: Literal["auto", "latent", "expanded"] = "auto",
        kernels: Literal["auto", "native", "torch"] = "auto",
        return_routed_experts: bool = False,
        sleep_level: int = 0,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.version = version
        self.decoder = build_decoder(
            path,
            dtype=getattr(torch, dtype),
            device=device,
            cache=cache,
            kernels=kernels,
            keep_routing=return_routed_experts,
            longest=max_context,
        )
        self.return_routed_experts, self.sleep_level = return_routed_experts, sleep_level
        self.max_batch = max_batch
        self.max_context = min(max_context or self.decoder.max_positions, self.decoder.max_positions)
        self.tokenizer = folder_tokenizer(path)
        self.end_tokens = text_end(path, self.tokenizer).ids
        self._end_tokens = np.array(self.end_tokens, np.int64)
        self._waiting: deque[Request] = deque()
        self._rows = Rows()
        self._ended: list[Rollout] = []
        self._receivers: dict[type, Receiver] = {}
        self._unusable: str | None = None
        self._asleep: tempfile.TemporaryDirectory | None = None
        self._reserved = (0, 0, 0)  # rows, context and completion tokens of the decoder's caches

    # requests

    def submit(self, requests: list[Request]) -> None:
        """Queues requests. Raises ValueError, before it queues any, for one that cannot be served."""
        self._check()
        busy = {r.request.id for r in self._rows.running} | {r.id for r in self._waiting}
        for request in requests:
            self._validate(request)
            if request.id in busy:
                raise ValueError(f"request {request.id} is already running: ids must be unique among unfinished ones")
            busy.add(request.id)
        self._waiting.extend(requests)

    def _validate(self, request: Request) -> None:
        sampling, prompt = request.sampling, request.prompt_tokens
        if not prompt:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(prompt) >= self.max_context:
            raise ValueError(
                f"the prompt of request {request.id} has {len(prompt)} tokens, the engine's context holds "
                f"{self.max_context} with at least one to write: shorten it or raise max_context"
            )
        partial = request.partial.tokens if request.partial else []
        if not all(0 <= token < self.decoder.vocab_size for token in (*prompt, *partial)):
            raise ValueError(f"the prompt of request {request.id} has ids outside [0, {self.decoder.vocab_size})")
        if request.partial and (request.partial.id, request.partial.prompt_tokens) != (request.id, prompt):
            raise ValueError(f"request {request.id} continues another rollout's tokens: {request.partial.id}'s")
        if sampling.max_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(
                f"request {request.id}: {sampling}: expected max_tokens >= 1, temperature >= 0, top_p in (0, 1] and "
                "top_k >= 0"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"request {request.id} has stop strings, but the model folder has no tokenizer")
        if not sampling.ignore_eos and not self.end_tokens:
            raise ValueError(
                "nothing names a token that ends a text: set eos_token_id in generation_config.json, or ask with "
                "ignore_eos"
            )

    def completed(self, timeout_s: float | None = None) -> list[Rollout]:
        self._check()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended and (self._rows or self._waiting):
            self._step()
            if deadline is not None and time.monotonic() >= deadline:
                break
        ended, self._ended = self._ended, []
        return ended

    def interrupt(self, only: Collection[str] | None = None) -> list[Rollout]:
        self._check()
        self._rows.count_tokens(self.version)
        asked = [only is None or running.request.id in only for running in self._rows.running]
        stopped = [self._rollout(row, "interrupted") for row in np.flatnonzero(asked)]
        self._remove(np.flatnonzero(asked))
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            if only is None or request.id in only:
                stopped.append(self._rollout(row := self._add(request), "interrupted"))
                self._rows.remove(row)
            else:
                self._waiting.append(request)
        return stopped

    # weights

    def update(self, weights: WeightUpdate | Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._asleep is not None:
            raise EngineUnusable("the engine is asleep: call wake() before update()")
        if self._unusable == "closed":
            self._check()
        self._rows.count_tokens(self.version)
        # From here until everything has arrived the weights may be a mixture.
        self._unusable = f"the update to version {version} did not finish"
        arriving = receive(weights, self._receivers) if isinstance(weights, WeightUpdate) else None
        try:
            self.decoder.load(weights if arriving is None else arriving)
        except Exception as error:
            self._unusable = f"the update to version {version} failed: {error}"
            raise
        finally:
            if arriving is not None:
                arriving.close()  # who gave up midway must not keep the trainer waiting
        self._unusable = None
        self.version = version

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as the engine holds them, under checkpoint names (to compare checksums)."""
        self._check()
        yield from self.decoder.weights()

    def score(self, sequences: list[list[int]], temperature: float = 1.0) -> list[np.ndarray]:
        self._check()
        if temperature <= 0:
            raise ValueError(f"score needs a temperature above 0, found {temperature}")
        for i, sequence in enumerate(sequences):
            if not len(sequence) or not all(0 <= token < self.decoder.vocab_size for token in sequence):
                raise ValueError(f"sequence {i} to score is empty or has ids outside [0, {self.decoder.vocab_size})")
        scores: list[np.ndarray] = []
        budget = min(_PREFILL_TOKENS, max(256, _SCORE_LOGITS // self.decoder.vocab_size))
        for chunk in _chunks([np.asarray(s, np.int64) for s in sequences], budget):
            logprobs = (self.decoder.logits(chunk) / temperature).log_softmax(-1)  # [tokens of the chunk, vocab]
            start = 0
            for tokens in chunk:
                rows = logprobs[start : start + len(tokens) - 1]
                chosen = rows.gather(1, torch.from_numpy(tokens[1:])[:, None].to(rows.device))[:, 0].cpu().numpy()
                scores.append(np.concatenate([np.zeros(1, np.float32), chosen]))
                start += len(tokens)
        return scores

    # life

    def sleep(self) -> None:
        """Frees weights and caches; the weights wait in a temporary file, unfinished requests keep their tokens."""
        self._check()
        folder = tempfile.TemporaryDirectory(prefix="rlzero-engine-")
        save_file({n: t.detach().cpu().contiguous() for n, t in self.decoder.weights()}, f"{folder.name}/weights")
        self.decoder.release()
        self._reserved = (0, 0, 0)
        self._asleep = folder

    def wake(self) -> None:
        """Loads the weights back and rebuilds the caches of unfinished requests."""
        if self._asleep is None:
            return
        self.decoder.load(load_file(f"{self._asleep.name}/weights").items())
        self._asleep.cleanup()
        self._asleep = None
        if self._rows:
            self._reserve(0)
            self._read([(self._rows.context(row)[:-1], [row]) for row in range(len(self._rows))])

    def close(self) -> None:
        if self._unusable == "closed":
            return
        if self._asleep is not None:
            self._asleep.cleanup()
            self._asleep = None
        self.decoder.release()
        self._rows.clear()
        self._waiting.clear()
        self._ended.clear()
        self._unusable = "closed"

    def _check(self) -> None:
        if self._unusable == "closed":
            raise EngineUnusable("the engine is closed")
        if self._unusable:
            raise EngineUnusable(f"{self._unusable}; the engine answers again after a full update")
        if self._asleep is not None:
            raise EngineUnusable("the engine is asleep: call wake() first")

    # one step

    def _step(self) -> None:
        admitted = self._admit()
        if admitted:
            for logits, groups in self._read(admitted):
                source = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
                self._accept(np.concatenate(groups), logits[torch.from_numpy(source)])
            self._retire()
        if self._rows:
            logits = self.decoder.decode(self._rows.last_tokens(), self._rows.positions())
            self._accept(np.arange(len(self._rows)), logits)
            self._retire()

    def _add(self, request: Request) -> int:
        stop = StopFinder(self.tokenizer, request.sampling.stop) if request.sampling.stop else None
        return self._rows.add(request, stop, self._limit(request))

    def _limit(self, request: Request) -> int:
        return min(request.sampling.max_tokens, self.max_context - len(request.prompt_tokens))

    def _admit(self) -> list[tuple[np.ndarray, list[int]]]:
        """Gives rows to waiting requests. Returns what has to be read: each distinct context and the rows that share
        it. Only requests admitted together share, so a prefix never outlives the weights that made it."""
        if not self._waiting or len(self._rows) >= self.max_batch:
            return []
        first = len(self._rows)
        while self._waiting and len(self._rows) < self.max_batch:
            self._add(self._waiting.popleft())
        self._reserve(first)
        self._retire()  # continued rollouts that have nothing left to write; they stand behind the running rows
        contexts: dict[bytes, tuple[np.ndarray, list[int]]] = {}
        for row in range(first, len(self._rows)):
            context = self._rows.context(row)
            contexts.setdefault(context.tobytes(), (context, []))[1].append(row)
        return list(contexts.values())

    def _reserve(self, first: int) -> None:
        """Makes the decoder's caches large enough for the rows from `first` on."""

        def up(tokens: int) -> int:
            return min(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, self.max_context)

        n = len(self._rows)
        limit, prompt = self._rows.limit[first:n], self._rows.prompt[first:n]
        needed = (n, up(int((prompt + limit).max())), up(int(limit.max())))
        if any(n > r for n, r in zip(needed, self._reserved, strict=True)):
            self._reserved = tuple(max(pair) for pair in zip(needed, self._reserved, strict=True))
            self.decoder.reserve(*self._reserved)

    def _read(self, contexts: list[tuple[np.ndarray, list[int]]]) -> list[tuple[Tensor, list[list[int]]]]:
        results = []
        start = 0
        for chunk in _chunks([c for c, _ in contexts], _PREFILL_TOKENS):
            rows = [rows for _, rows in contexts[start : start + len(chunk)]]
            results.append((self.decoder.prefill(chunk, rows), rows))
            for row in (row for group in rows for row in group):
                self._rows.running[row].read = True
            start += len(chunk)
        return results

    def _accept(self, rows: Int[np.ndarray, " n"], logits: Float[Tensor, "n vocab"]) -> None:
        noise, settings = self._rows.noise(rows), self._rows.settings(rows)
        tokens, logprobs = sample(logits, settings, noise, self.decoder.draw)
        if not np.isfinite(logprobs).all():
            broken = self._rows.running[rows[np.flatnonzero(~np.isfinite(logprobs))[0]]].request.id
            raise FloatingPointError(f"the model's logits for request {broken} are not finite: its weights are broken")
        self._rows.append(rows, tokens, logprobs)

    def _retire(self) -> None:
        """Hands out what ended, in row order, and closes the gaps with the last rows."""
        stopped, full = self._rows.ended(self._end_tokens)
        gone = np.flatnonzero(stopped | full)
        if not len(gone):
            return
        self._rows.count_tokens(self.version)
        self._ended += [self._rollout(row, "stop" if stopped[row] else "length") for row in gone]
        self._remove(gone)

    def _remove(self, rows: Int[np.ndarray, " n"]) -> None:
        for row in rows[::-1]:
            last = self._rows.remove(row)
            if last != row:
                self.decoder.move(last, row)

    def _rollout(self, row: int, reason: FinishReason) -> Rollout:
        running, tokens = self._rows.running[row], self._rows.completion(row).tolist()
        routed = None
        if self.return_routed_experts and running.read and reason != "interrupted":
            read = self.decoder.routing(row, len(running.request.prompt_tokens) + len(tokens) - 1)
            routed = np.pad(read, ((0, 1), (0, 0), (0, 0)), constant_values=-1)
        ends = self.end_tokens if reason == "stop" and not running.request.sampling.ignore_eos else ()
        return Rollout(
            prompt_id=running.request.prompt_id,
            sample=running.request.sample,
            prompt_tokens=running.request.prompt_tokens,
            tokens=tokens,
            logprobs=self._rows.logprobs[row, : len(tokens)].tolist(),
            versions=running.versions,
            finish_reason=reason,
            text=completion_text(self.tokenizer, tokens, ends),
            routed_experts=routed,
        )


def _chunks(sequences: list[np.ndarray], budget: int) -> Iterator[list[np.ndarray]]:
    """Runs of consecutive sequences of at most `budget` tokens (a longer one alone)."""
    chunk: list[np.ndarray] = []
    size = 0
    for sequence in sequences:
        if chunk and size + len(sequence) > budget:
            yield chunk
            chunk, size = [], 0
        chunk.append(sequence)
        size += len(sequence)
    if chunk:
        yield chunk
