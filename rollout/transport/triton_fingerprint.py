"""The fingerprint's sum on a CUDA device: one launch for any number of tensors, every byte read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rollout.transport.fingerprint import MULTIPLIER

BLOCK = 1024  # words a program holds at a time
ROUNDS = 16  # blocks a program reads: 128 KiB


@triton.jit
def _sum_words(
    pointers, lengths, tensor_of, first_of, sums, MULTIPLIER: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    words = tl.load(pointers + tensor).to(tl.pointer_type(tl.int64))
    length = tl.load(lengths + tensor)
    first = tl.load(first_of + program)
    factor = tl.full([BLOCK], MULTIPLIER, tl.uint64)
    total = tl.zeros([BLOCK], tl.uint64)
    for i in range(ROUNDS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        x = tl.load(words + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
        x = x ^ ((at + 1).to(tl.uint64) * factor)
        x = (x ^ (x >> 32)) * factor
        x = (x ^ (x >> 32)) * factor
        x = x ^ (x >> 32)
        total += tl.where(inside, x, tl.zeros([BLOCK], tl.uint64))
    tl.store(sums + program, tl.sum(total.to(tl.int64, bitcast=True), axis=0))


def sum_words(words: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sums modulo 2^64 of the scrambled words of every tensor, int64 [tensors] on the CPU. The tensors are contiguous
    int64 on `device`."""
    lengths = torch.tensor([len(w) for w in words], dtype=torch.int64)
    share = BLOCK * ROUNDS
    programs = (lengths + share - 1) // share
    tensor_of = torch.arange(len(words)).repeat_interleave(programs)
    started = programs.cumsum(0) - programs
    first_of = (torch.arange(len(tensor_of)) - started[tensor_of]) * share
    table = torch.cat([torch.tensor([w.data_ptr() for w in words], dtype=torch.int64), lengths, tensor_of, first_of])
    table = table.to(device)  # one copy for all four
    pointers, lengths, tensor_of, first_of = table.split([len(words), len(words), len(tensor_of), len(first_of)])
    sums = torch.empty(len(tensor_of), dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        _sum_words[(len(tensor_of),)](pointers, lengths, tensor_of, first_of, sums, MULTIPLIER, BLOCK, ROUNDS)
    totals = torch.zeros(len(words), dtype=torch.int64, device=device)
    return totals.index_add_(0, tensor_of, sums).cpu()
