"""The checksum's sum on a CUDA device: one launch for any number of tensors, every byte read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from rollout.transport.checksum import MULTIPLIER

BLOCK = 1024  # words a program holds at a time
ROUNDS = 16  # blocks a program reads: 128 KiB


@triton.jit
def _sum_words(
    pointers, sizes, tensor_of, first_of, sums, MULTIPLIER: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    words = tl.load(pointers + tensor).to(tl.pointer_type(tl.int64))
    size = tl.load(sizes + tensor)  # bytes
    first = tl.load(first_of + program)
    factor = tl.full([BLOCK], MULTIPLIER, tl.uint64)
    total = tl.zeros([BLOCK], tl.uint64)
    for i in range(ROUNDS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        left = size - at * 8  # bytes of the tensor from this word on
        x = tl.load(words + at, mask=left > 0, other=0)
        # Of a word that the tensor fills in part, only that part counts (little endian).
        kept = (tl.full([BLOCK], 1, tl.int64) << (8 * tl.minimum(tl.maximum(left, 0), 7))) - 1
        x = tl.where(left < 8, x & kept, x).to(tl.uint64, bitcast=True)
        x = x ^ ((at + 1).to(tl.uint64) * factor)
        x = (x ^ (x >> 32)) * factor
        x = (x ^ (x >> 32)) * factor
        x = x ^ (x >> 32)
        total += tl.where(left > 0, x, tl.zeros([BLOCK], tl.uint64))
    tl.store(sums + program, tl.sum(total.to(tl.int64, bitcast=True), axis=0))


def readable(tensor: Tensor) -> bool:
    """Whether the kernel can read the tensor in place. Of a last word that the tensor does not fill it reads all:
    allocations are whole multiples of words."""
    return tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


class Launch:
    """The addresses and sizes of tensors, and which program reads what of them, on their device."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.device = tensors[0].device
        share = BLOCK * ROUNDS
        spans = [(tensor.data_ptr(), tensor.nbytes, tensor.numel()) for tensor in tensors]
        pointers, sizes, counts = torch.tensor(spans, dtype=torch.int64).T
        programs = (sizes + 8 * share - 1) // (8 * share)
        tensor_of = torch.arange(len(spans)).repeat_interleave(programs)
        first_of = (torch.arange(len(tensor_of)) - (programs.cumsum(0) - programs)[tensor_of]) * share
        # One copy for all. Each part begins on 16 bytes: Triton compiles anew for other alignments.
        parts = [pointers, sizes, counts, tensor_of, first_of]
        lengths = [len(part) for part in parts]
        padded = [F.pad(part, (0, len(part) % 2)) for part in parts]
        there = torch.cat(padded).to(self.device).split([len(part) for part in padded])
        parts = [part[:length] for part, length in zip(there, lengths, strict=True)]
        self._pointers, self._sizes, self._counts, self._tensor_of, self._first_of = parts

    def __call__(self, out: Tensor | None = None) -> Int[Tensor, " tensors"]:
        """Checksums as int64, modulo 2^64 (in `out`, where it is given), in the order of the current stream."""
        total = len(self._tensor_of)
        sums = torch.empty(total, dtype=torch.int64, device=self.device)
        if total:
            launch = (self._pointers, self._sizes, self._tensor_of, self._first_of, sums, MULTIPLIER, BLOCK, ROUNDS)
            with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
                _sum_words[(total,)](*launch)
        return torch.index_add(self._counts, 0, self._tensor_of, sums, out=out)
