"""The shards of an update's tensors that a vLLM worker holds, and whether their places hold what was sent.

A shard that is a whole tensor is compared with the checksum the tensor was sent with. Of a part (tensor, expert or
pipeline parallel) nobody sent one: it is taken from the tensor as it arrives, which was compared as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rollout.transport.base import Tensors, TensorSpec
from rollout.transport.checksum import Checksums
from rollout.vllm.copies import Copy

Plan = Mapping[str, list[Copy]]
UNREAD = -1  # of a tensor that has a shard here that was not read back
_CAST_BYTES = 64 << 20  # of what is not kept in the dtype it was sent in, read back at a time


class Shards:
    """The places of `plan`, in the order of the specs. What lies there as it was sent is read in place, what has
    another dtype (one that holds more loses nothing on the way back) in copies of bounded size."""

    def __init__(self, plan: Plan, specs: Sequence[TensorSpec]):
        self.plan, self.lines = plan, [spec[:3] for spec in specs]
        self._copies = [(at, copy) for at, spec in enumerate(specs) for copy in plan.get(spec.name, ())]
        self._dtypes = [getattr(torch, spec.dtype) for spec in specs]
        self._parts = [number for number, (_, copy) in enumerate(self._copies) if not copy.whole]
        self._arrived: list[Int[Tensor, " parts"]] = []
        as_sent = [copy.target.dtype == self._dtypes[at] and _readable(copy.target) for at, copy in self._copies]
        self._in_place = [number for number, kept in enumerate(as_sent) if kept]
        self._cast = [number for number, kept in enumerate(as_sent) if not kept]
        self._checksums = Checksums([self._copies[number][1].target for number in self._in_place])

    def begin(self) -> None:
        """Forgets what arrived before."""
        self._arrived = []

    def moved(self, plan: Plan, specs: Sequence[TensorSpec]) -> Shards:
        """The same shards as they arrived, where another plan puts them."""
        moved = Shards(plan, specs)
        moved._arrived = self._arrived
        return moved

    @torch.no_grad()
    def arrived(self, bucket: Tensors) -> None:
        """Takes the checksums of the parts of these tensors. Buckets come in the order of the specs."""
        parts: list[Tensor] = []
        for name, tensor in bucket:
            copies = [copy for copy in self.plan.get(name, ()) if not copy.whole]
            if copies:
                tensor = tensor.detach().contiguous()
                # Parts of a tensor in host memory go to their GPU first: checksums are slow on a CPU.
                parts += [copy.part(tensor).to(copy.target.device).contiguous() for copy in copies]
        if parts:
            self._arrived.append(Checksums(parts)())

    @torch.no_grad()
    def compared(self, sent: Sequence[TensorSpec]) -> tuple[Int[np.ndarray, " tensors"], list[str]]:
        """How many elements of each tensor are held here as they were sent (UNREAD where some are not), and the names
        of tensors of which a shard is not. `sent` has the checksums that the tensors came with."""
        found = np.zeros(len(self._copies), np.int64)
        found[self._in_place] = self._checksums().cpu().numpy()
        for numbers in self._batches():
            cast = [self._copies[n][1].target.to(self._dtypes[self._copies[n][0]]).contiguous() for n in numbers]
            found[numbers] = Checksums(cast)().cpu().numpy()
        known = {spec.name: spec.checksum for spec in sent}
        wholes = np.array([known.get(name, 0) for name, *_ in self.lines], np.uint64).astype(np.int64)
        expected = wholes[[at for at, _ in self._copies]]
        arrived = torch.cat(self._arrived).cpu().numpy() if self._arrived else np.zeros(0, np.int64)
        if len(arrived) != len(self._parts):
            raise RuntimeError(f"{len(arrived)} parts of tensors arrived, the plan has {len(self._parts)} places")
        expected[self._parts] = arrived
        read, wrong, counted = np.zeros(len(self.lines), np.int64), [], set()
        for (at, copy), right in zip(self._copies, found == expected, strict=True):
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
        for number in self._cast:
            at, copy = self._copies[number]
            size += copy.target.numel() * self._dtypes[at].itemsize
            batch.append(number)
            if size >= _CAST_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _readable(tensor: Tensor) -> bool:
    """Whether a checksum can be taken where the tensor lies (the kernel reads words)."""
    return tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


def same_shards(one: Plan, other: Plan) -> bool:
    """Whether both plans take the same shards of the same tensors, in the same order."""
    first, second = (
        {name: [(copy.size, copy.stride, copy.offset) for copy in copies] for name, copies in plan.items()}
        for plan in (one, other)
    )
    return first == second
