"""How updates get into a vLLM worker that holds parts of the checkpoint's tensors: one of several that share a model
(tensor, expert or pipeline parallel).

The ways are those of rollout.vllm.install: vLLM's reload first, direct copies once they are shown to be right. What a
worker holds cannot be compared with the published fingerprints, which are those of whole tensors. So the parts that
the plan takes get fingerprints of their own, taken from the tensors as they arrive (each was compared as a whole with
what was published); after vLLM's own reload the places of the parts must have the same. Every direct update is read
back in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rollout.transport.base import CorruptWeights, Entry
from rollout.transport.fingerprint import Reading
from rollout.vllm.copies import CannotPlan, Copy, copy_weights
from rollout.vllm.install import few, planned, read_where_loaded, refresh_derived, reload, served_models

log = logging.getLogger(__name__)

Bucket = list[tuple[str, Tensor]]
Plan = Mapping[str, list[Copy]]
UNREAD = -1  # of a tensor that has a part here that was not read back
_TURNED_BYTES = 64 << 20  # of what is not kept as it was published, read back at a time


@dataclass(frozen=True)
class InstalledParts:
    """How an update came into one worker: by `way`, with the number of elements of each tensor that were read back
    from its memory and found right (UNREAD: it has others, too); None where nothing was read back. `reason` is why
    updates go on by vLLM's reload."""

    way: str
    read: Int[np.ndarray, " tensors"] | None = None
    reason: str | None = None


class Parts:
    """The parts of published tensors that a worker holds, and whether their places hold what arrived."""

    def __init__(self, plan: Plan, entries: Sequence[Entry]):
        self.plan, self.lines = plan, [entry[:3] for entry in entries]
        self._copies = [(at, copy) for at, entry in enumerate(entries) for copy in plan.get(entry.name, ())]
        self._dtypes = [getattr(torch, entry.dtype) for entry in entries]
        self._arrived: list[Int[Tensor, " parts"]] = []
        as_published = [copy.target.dtype == self._dtypes[at] and _readable(copy.target) for at, copy in self._copies]
        self._in_place = [number for number, kept in enumerate(as_published) if kept]
        self._turned = [number for number, kept in enumerate(as_published) if not kept]
        self._reading = Reading([self._copies[number][1].target for number in self._in_place])

    def begin(self) -> None:
        """Forgets what arrived before."""
        self._arrived = []

    def at(self, plan: Plan, entries: Sequence[Entry]) -> Parts:
        """The same parts as they arrived, where another plan puts them."""
        moved = Parts(plan, entries)
        moved._arrived = self._arrived
        return moved

    @torch.no_grad()
    def arrived(self, bucket: Bucket) -> None:
        """Takes the fingerprints of the parts of these tensors. Buckets come in the order of the entries."""
        parts: list[Tensor] = []
        for name, tensor in bucket:
            tensor = tensor.detach().contiguous()
            # Parts of a tensor in host memory go to their GPU first: fingerprints are slow on a CPU.
            parts += [copy.part(tensor).to(copy.target.device).contiguous() for copy in self.plan.get(name, ())]
        if parts:
            self._arrived.append(Reading(parts)())

    @torch.no_grad()
    def compared(self) -> tuple[Int[np.ndarray, " tensors"], list[str]]:
        """How many elements of each tensor are held here as they arrived (UNREAD where a part of it is not), and the
        names of tensors of which a part is not."""
        found = np.zeros(len(self._copies), np.int64)
        found[self._in_place] = self._reading().cpu().numpy()
        for numbers in self._batches():
            turned = [self._copies[n][1].target.to(self._dtypes[self._copies[n][0]]).contiguous() for n in numbers]
            found[numbers] = Reading(turned)().cpu().numpy()
        arrived = torch.cat(self._arrived).cpu().numpy() if self._arrived else np.zeros(0, np.int64)
        if len(arrived) != len(found):
            raise RuntimeError(f"parts of {len(arrived)} tensors arrived, the plan has {len(found)} places")
        read, wrong, counted = np.zeros(len(self.lines), np.int64), [], set()
        for (at, copy), right in zip(self._copies, found == arrived, strict=True):
            span = at, copy.size, copy.stride, copy.offset
            if not right:
                wrong.append(at)
            elif span not in counted:  # an expert may be held more than once
                counted.add(span)
                read[at] += prod(copy.size)
        read[wrong] = UNREAD
        return read, list(dict.fromkeys(self.lines[at][0] for at in wrong))

    def _batches(self) -> Iterator[list[int]]:
        batch: list[int] = []
        size = 0
        for number in self._turned:
            at, copy = self._copies[number]
            size += copy.target.numel() * self._dtypes[at].itemsize
            batch.append(number)
            if size >= _TURNED_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _readable(tensor: Tensor) -> bool:
    """Whether a fingerprint can be taken where the tensor lies (the kernel reads words)."""
    return tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


def same_parts(one: Plan, other: Plan) -> bool:
    """Whether both plans take the same parts of the same tensors, in the same order."""
    first, second = (
        {name: [(copy.size, copy.stride, copy.offset) for copy in copies] for name, copies in plan.items()}
        for plan in (one, other)
    )
    return first == second


class PartsInstaller:
    """Brings updates into the models of one worker. `direct` None: goes directly once an update by vLLM's way has shown
    that it is right; False: always vLLM's way, for the `reason`."""

    def __init__(self, worker: Any, shapes: Mapping[str, tuple[int, ...]]):
        self.worker, self.shapes = worker, shapes
        self.direct: bool | None = None
        self.reason: str | None = None
        self.parts: Parts | None = None
        runner = worker.model_runner
        if runner.device.type == "cpu":
            self.direct = False  # its kernels repack
        elif getattr(runner, "eplb_state", None) is not None:
            self._stay("load balancing moves experts between the GPUs, so that no place stays theirs")

    def install(self, buckets: Iterable[Bucket], entries: Sequence[Entry]) -> InstalledParts:
        """Installs a complete set. Raises CorruptWeights, naming the tensors, when the worker then holds something else
        than arrived."""
        if self.direct:
            self.direct = None  # an update that fails is followed by a reload, which shows again what is right
            installed = self._copied(buckets, entries)
            self.direct = True
            return installed
        plan = self._attempt(lambda: self._plan(entries)) if self.direct is None else None
        parts = Parts(plan, entries) if plan is not None else None
        reload(self.worker, _flat(buckets, parts))
        read = self._attempt(lambda: self._decide(parts, entries)) if parts is not None else None
        return InstalledParts("reload", read if self.direct else None, self.reason)

    def _copied(self, buckets: Iterable[Bucket], entries: Sequence[Entry]) -> InstalledParts:
        parts = self.parts
        if parts.lines != [entry[:3] for entry in entries]:  # the plan is made by name and shape
            self.parts = parts = Parts(parts.plan, entries)
        parts.begin()
        for bucket in buckets:
            parts.arrived(bucket)
            copy_weights(parts.plan, bucket)
        runner = self.worker.model_runner
        for model in served_models(runner):
            refresh_derived(model, runner.model_config.dtype)
        read, wrong = parts.compared()
        if wrong:
            raise CorruptWeights(f"after the update the engine holds other weights than arrived: {few(wrong)}")
        return InstalledParts("direct", read)

    def _plan(self, entries: Sequence[Entry]) -> dict[str, list[Copy]]:
        runner = self.worker.model_runner
        plan: dict[str, list[Copy]] = {}
        for model in served_models(runner):
            for name, copies in planned(model, runner.model_config, self.shapes, entries).items():
                plan.setdefault(name, []).extend(copies)
        return plan

    def _decide(self, before: Parts, entries: Sequence[Entry]) -> Int[np.ndarray, " tensors"] | None:
        """Called with the published weights in the models, brought there by vLLM, and with the fingerprints of the
        parts that the plan `before` took as they arrived."""
        runner = self.worker.model_runner
        plan = self._plan(entries)  # the reload may have put parameters elsewhere
        if not same_parts(before.plan, plan):
            raise CannotPlan("its loaders take other parts of the weights than before the reload")
        for model in served_models(runner):
            read_where_loaded(model, runner.model_config)
        parts = before.at(plan, entries)
        read, wrong = parts.compared()
        if wrong:
            raise CannotPlan(
                f"this worker keeps parts of {len(wrong)} of {len(plan)} tensors in another form or dtype than they "
                f"were published in ({few(wrong)})"
            )
        self.direct, self.parts = True, parts
        return read

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it fails, and then updates stay with vLLM's reload, which does without."""
        try:
            return work()
        except CannotPlan as error:
            self._stay(str(error))
        except Exception as error:
            log.exception("direct updates could not be prepared")
            self._stay(f"{type(error).__name__}: {error}")
        return None

    def _stay(self, reason: str) -> None:
        self.direct, self.reason = False, reason


def _flat(buckets: Iterable[Bucket], parts: Parts | None) -> Iterator[tuple[str, Tensor]]:
    for bucket in buckets:
        if parts is not None:
            parts.arrived(bucket)
        yield from bucket
