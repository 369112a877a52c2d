"""The trainer: one policy, its optimizer and its reference.

Blind to tasks and to how advantages came about; a plain class that Ray may make an actor, or several: the ranks of one
policy (trainer.parallel), each of which is called with the same arguments, does its part, and returns the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.batch import Batch
from trainer.checkpoint import checkpoint
from trainer.checkpoint.checkpoint import SHARDS, WHOLE, CheckpointError
from trainer.device_memory import device_memory
from trainer.losses import LossOptions, Metrics, combine_metrics, policy_loss
from trainer.model.balance import BalanceKind, agreement_metrics, router_metrics
from trainer.optimizer import Optimizer, OptimizerOptions
from trainer.packing import Sample, pack, to_device
from trainer.parallel.ranks import ParallelOptions, Ranks, Rendezvous, Share
from trainer.policy import Policy, PolicyOptions, load_policy
from trainer.transfer import Readback

SCORE_TOKENS = 16_384  # packed at a time when sequences are scored


class Trainer:
    """Holds a policy and changes it. `loss` None: a trainer for `next_token_step` alone. A reference model, a second
    frozen copy, exists where loss.kl_coef > 0. `device` auto takes a GPU if there is one; `threads` 0 leaves torch's
    number of CPU threads alone. With more than one rank in `parallel` this is one of them, and every method is a
    collective: all ranks call it, with equal arguments. `rendezvous` None: torchrun's."""

    def __init__(
        self,
        policy: PolicyOptions,
        optimizer: OptimizerOptions,
        loss: LossOptions | None = None,
        *,
        seed: int = 0,
        threads: int = 0,
        device: str = "auto",
        parallel: ParallelOptions | None = None,
        rendezvous: Rendezvous | None = None,
    ):
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        parallel = parallel or ParallelOptions()
        if parallel.pp > 1:
            raise ValueError(f"pp is {parallel.pp}: a Trainer has whole models; stages: trainer.parallel.pipeline")
        self.device = _device(device, parallel, rendezvous)
        self.loss = loss
        torch.manual_seed(seed)
        self.ranks = Ranks(parallel, self.device, rendezvous)
        if self.ranks.size == 1:
            self.policy: Policy = load_policy(policy, self.device, seed)
        else:
            # Sharding and its checkpoints are imported where there are several ranks: that takes 2 s.
            from trainer.parallel.sharded_policy import load_sharded_policy

            self.policy = load_sharded_policy(policy, self.ranks, seed)
        self.reference: Policy | None = None
        self._reference_refreshed = False  # else it is the policy that the options name
        if loss is not None and loss.kl_coef > 0:
            self.reference = self.policy.frozen_copy()
        self.optimizer = Optimizer(self.policy.module.named_parameters(), optimizer, self.ranks.norm_groups)
        self._load: Tensor | None = None  # of the router, this rank's real micro-batches; see _turns

    # --- training ----------------------------------------------------------------------------------------------------

    def step(self, minibatches: Sequence[Sequence[Batch]]) -> dict[str, float]:
        """One optimizer step per minibatch, which is a list of micro-batches with that minibatch's denominators.

        Streams that the loss needs and a batch lacks are computed: the reference's log-probabilities, and old ones,
        the policy's before the first of these updates. The first minibatch needs no forward pass of its own for
        them: there old is the detached new. Returns the step's metrics (`trainer.losses.policy_loss`, and the means of
        `grad_norm` and `lr` over the updates, `updates`, `trainer.model.balance.router_metrics` and, where routing is
        replayed, `agreement_metrics`). An empty minibatch makes no update. Raises GradientError with
        nothing updated by the minibatch at fault.
        """
        if self.loss is None:
            raise ValueError("this trainer was made without a loss: only next_token_step can train it")
        minibatches = [list(minibatch) for minibatch in minibatches if minibatch]
        shares = [self.ranks.share(minibatch) for minibatch in minibatches]
        later = {id(share.batch): share for part in shares[1:] for share in part if share.real}
        first = {id(share.batch) for share in (shares[0] if shares else [])}
        missing = [s for key, s in later.items() if s.batch.old_logprobs is None and key not in first]
        old = self._all_logprobs(self.policy, missing, minibatches)
        reference: dict[int, Tensor] = {}
        if self.reference is not None:
            every = {id(share.batch): share for part in shares for share in part if share.real}
            missing = [share for share in every.values() if share.batch.reference_logprobs is None]
            reference = self._all_logprobs(self.reference, missing, minibatches)
        # Asked of all batches, not of this rank's: the names of metrics are the same on every rank.
        replayed = next((b.routed_experts for part in minibatches for b in part if b.routed_experts is not None), None)
        parts: list[Metrics] = []
        updates = []
        for index, part in enumerate(shares):
            for share in self._turns(part):
                batch = share.batch
                new, entropy = self.policy.logprobs(batch, entropy=True)
                record = _with(to_device(batch, self.device), old.get(id(batch)), reference.get(id(batch)))
                if not share.real and self.reference is not None and record.reference_logprobs is None:
                    record = replace(record, reference_logprobs=new.detach())
                loss, metrics = policy_loss(new, entropy, record, self.loss)
                (loss if share.real else 0.0 * loss).backward()
                if replayed is not None:
                    agreed = self.policy.take_router_agreement()
                    metrics |= agreement_metrics(agreed, replayed.shape[-1], self.device)
                parts.append(metrics if share.real else {name: 0.0 * pair for name, pair in metrics.items()})
                if index == 0 and id(batch) in later:
                    old[id(batch)] = new.detach()
            updates.append(self._update())
        metrics = combine_metrics(self.ranks.sum_metrics(parts))
        if "policy_loss" in metrics:
            metrics["policy_loss"] /= len(minibatches)  # a sum of shares, of which every minibatch has a whole
        return {**metrics, **_mean(updates), "updates": float(len(updates))}

    def next_token_step(
        self,
        batches: Sequence[Batch],
        mtp_weight: float = 0.0,
        balance: BalanceKind = "none",
        balance_weight: float = 0.0,
    ) -> dict[str, float]:
        """One optimizer step of language modelling on the tokens of the loss masks (pre-training, SFT). Returns `loss`
        (nats per token), `mtp_loss` where `mtp_weight` > 0, `balance_loss` where `balance_weight` > 0 (see
        `trainer.policy.Policy.next_token_loss`), `tokens` and what the update reports. The batch-wise balance is over
        all tokens of the step; in more than one micro-batch that takes a forward pass ahead to count them."""
        if not batches:
            raise ValueError("next_token_step: no batches, or no sample in them has a token to learn")
        totals: dict[str, Tensor] = {}
        hits = None
        shares = self.ranks.share(batches)
        if balance == "batch" and balance_weight > 0 and len(batches) > 1:
            hits = self.policy.affinity_hits([s.batch for s in shares if s.real], mtp=mtp_weight > 0)
            self.policy.affinity_hits([s.batch for s in shares if not s.real], mtp=mtp_weight > 0)
            hits = self.ranks.sum(hits)
        for share in self._turns(shares):
            loss, metrics = self.policy.next_token_loss(share.batch, mtp_weight, balance, balance_weight, hits)
            (loss if share.real else 0.0 * loss).backward()
            for name, value in metrics.items():
                value = value if share.real else 0.0 * value
                totals[name] = totals[name] + value if name in totals else value
        values = Readback(self.ranks.sum(torch.stack(list(totals.values()))))  # begun ahead of the update
        update = self._update()
        found = dict(zip(totals, values.tolist(), strict=True))
        return {**found, **update, "tokens": float(batches[0].total_tokens)}

    def _turns(self, shares: Sequence[Share]) -> Iterator[Share]:
        """The micro-batches of one update in turn. What the router is counted for ends where the gaps begin."""
        counted, gaps = None, False
        for i, share in enumerate(shares):
            if not share.real and not gaps:
                counted, gaps = self.policy.take_router_load(), True
            self.ranks.micro_batch(self.policy.module, last=i == len(shares) - 1)
            yield share
        if gaps and (filled := self.policy.take_router_load()) is not None:
            self._load = torch.zeros_like(filled) if counted is None else counted

    def _update(self) -> dict[str, float]:
        load = self.policy.take_router_load()
        if self._load is not None:
            load, self._load = self._load, None
        if load is None:
            return self.optimizer.step()
        load = self.ranks.sum(load)
        seen = Readback(load)  # nobody waits for the update to see it
        metrics = self.optimizer.step() | router_metrics(seen.tensor(), self.policy.router_layers)
        if self.optimizer.options.router_bias_gamma > 0:
            self.policy.update_router_bias(load, self.optimizer.options.router_bias_gamma)
        return metrics

    # --- log-probabilities -------------------------------------------------------------------------------------------

    def logprobs(self, batches: Sequence[Batch], reference: bool = False) -> list[Float[Tensor, " n"]]:
        """The policy's (or the reference's) log-probability of every token of the loss masks, 0 elsewhere, on the
        CPU."""
        policy = self.policy
        if reference:
            if self.reference is None:
                raise ValueError("there is no reference model: it is made where loss.kl_coef > 0")
            policy = self.reference
        shares = self.ranks.share(batches)
        values = [Readback(self._logprobs(policy, share.batch)) for share in shares]  # the GPU never runs dry
        return self.ranks.collect(shares, [value.tensor() for value in values], len(batches))

    def _all_logprobs(
        self, policy: Policy, shares: Sequence[Share], minibatches: Sequence[Sequence[Batch]]
    ) -> dict[int, Float[Tensor, " n"]]:
        """Log-probabilities of this rank's batches, by their id."""
        like = minibatches[0][0] if minibatches else None
        evened = self.ranks.even(shares, like) if like is not None else []
        values = [(share, self._logprobs(policy, share.batch)) for share in evened]
        return {id(share.batch): value for share, value in values if share.real}

    @torch.no_grad()
    def _logprobs(self, policy: Policy, batch: Batch) -> Float[Tensor, " n"]:
        return policy.logprobs(batch)[0]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Float[np.ndarray, " n"]]:
        """Log-probability of every token given those before it, entry 0 of each sequence 0.0: what an engine's `score`
        is compared with."""
        scores = [np.zeros(len(sequence), np.float32) for sequence in sequences]
        samples = [Sample((), sequence, loss_on_prompt=True) for sequence in sequences]
        budget = max([SCORE_TOKENS, *map(len, sequences)])
        batches = pack(samples, budget, temperature)
        for batch, found in zip(batches, self.logprobs(batches), strict=True):
            values = found.numpy()
            assert batch.sequence_ids is not None
            for d, index in enumerate(batch.sequence_ids.tolist()):
                scores[index] = values[batch.bounds[d] : batch.bounds[d + 1]]
        return scores

    def refresh_reference(self) -> None:
        """The reference becomes what the policy is now."""
        if self.reference is None:
            raise ValueError("there is no reference model: it is made where loss.kl_coef > 0")
        self.reference.copy_weights_from(self.policy)
        self._reference_refreshed = True

    def memory(self) -> dict[str, int]:
        """See `trainer.device_memory`: of this rank's GPU, peaks since the last call."""
        return device_memory(self.device)

    # --- weights and state -------------------------------------------------------------------------------------------

    def weights(self, mtp: bool = False) -> Iterable[tuple[str, Tensor]]:
        """(checkpoint name, CPU tensor) of the policy. On a CPU these are the live weights, not copies: the next step
        changes them. Of several ranks, rank 0 alone is given them, a layer gathered at a time, while every rank
        goes through this to its end."""
        if self.ranks.size == 1:
            return [(name, tensor.detach().cpu()) for name, tensor in self.policy.weights(mtp)]
        gathered = self.policy.weights(mtp)
        if self.ranks.rank == 0:
            return ((name, tensor.cpu()) for name, tensor in gathered)
        return (pair for pair in gathered if False)

    def save(self, folder: str | Path, state: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint: a Hugging Face folder with, in `trainer_state`, all that `load` needs to go on as if
        nothing had happened, and the caller's `state` (JSON). Atomic; CheckpointError when the disk is full."""
        described = {"optimizer_steps": self.optimizer.steps, "reference_refreshed": self._reference_refreshed}
        text = json.dumps({"trainer": described, "caller": state or {}}, indent=1)
        with self._writing(folder) as partial:
            self.policy.save(partial)
            inside = partial / checkpoint.STATE
            if self.ranks.size > 1:
                from trainer.checkpoint.shards import save_shards

                save_shards(inside, self.policy, self.optimizer)
            else:
                save_file(_to_cpu(self.optimizer.state()), inside / WHOLE)
            if self.ranks.rank == 0:
                (inside / "state.json").write_text(text + "\n")
                save_file(_random_state(), inside / "random.safetensors")
            if self.reference is not None and self._reference_refreshed:
                self.reference.save(inside / "reference")

    @contextlib.contextmanager
    def _writing(self, folder: str | Path) -> Iterator[Path]:
        """The folder that all ranks fill; rank 0 makes it the checkpoint."""
        if self.ranks.rank == 0:
            with checkpoint.writing(folder) as partial:
                yield Path(self.ranks.agree(str(partial)))
                self.ranks.barrier()
        else:
            yield Path(self.ranks.agree(None))
            self.ranks.barrier()
        self.ranks.barrier()

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Takes up where `save` was called, and returns the caller's state. Raises CheckpointError for a folder that
        is damaged, of another architecture, or no checkpoint. Another number of ranks may have saved it."""
        folder = Path(folder)
        self._verify(folder)
        inside = folder / checkpoint.STATE
        try:
            state = json.loads((inside / "state.json").read_text())
            self.policy.load_weights(folder)
            steps = state["trainer"]["optimizer_steps"]
            if self.ranks.size > 1:
                from trainer.checkpoint.shards import load_shards

                load_shards(inside, self.policy, self.optimizer, steps)
            elif (inside / SHARDS).is_dir():
                from trainer.checkpoint.shards import read_shards

                self.optimizer.load_state(read_shards(inside), steps)
            else:
                self.optimizer.load_state(load_file(inside / WHOLE), steps)
            refreshed = state["trainer"]["reference_refreshed"]
            if refreshed and self.reference is not None:
                self.reference.load_weights(inside / "reference")
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from error
        self._reference_refreshed = refreshed
        _set_random_state(load_file(inside / "random.safetensors"))
        return state["caller"]

    def _verify(self, folder: Path) -> None:
        """Rank 0 reads every file once; all ranks raise what it finds."""
        found = None
        if self.ranks.rank == 0:
            try:
                checkpoint.verify(folder)
            except CheckpointError as error:
                found = error
        if (found := self.ranks.agree(found)) is not None:
            raise found


def _with(batch: Batch, old: Tensor | None, reference: Tensor | None) -> Batch:
    """`batch` with the streams that the trainer computed itself."""
    computed = {"old_logprobs": old, "reference_logprobs": reference}
    return replace(batch, **{name: stream for name, stream in computed.items() if stream is not None})


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def _device(name: str, parallel: ParallelOptions, rendezvous: Rendezvous | None) -> torch.device:
    """The device of this process: with several ranks one GPU for each on a host."""
    if parallel.ranks == 1 or name != "cuda":
        return torch.device(name)
    rank = (rendezvous or Rendezvous.from_environment()).rank
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
