"""The fingerprint's sum on a CUDA device: one launch for any number of tensors, every byte read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def sum_words(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Sums modulo 2^64 of the scrambled words of every span (address on `device`, number of words of 8 bytes), int64
    [spans] on the CPU."""
    count, share = len(spans), BLOCK * ROUNDS
    pointers, lengths = torch.tensor(spans, dtype=torch.int64).T
    programs = (lengths + share - 1) // share
    tensor_of = torch.arange(count).repeat_interleave(programs)
    started = programs.cumsum(0) - programs
    first_of = (torch.arange(len(tensor_of)) - started[tensor_of]) * share
    # One copy for all four. Each begins on 16 bytes: Triton compiles anew for other alignments.
    parts = [F.pad(part, (0, len(part) % 2)) for part in (pointers, lengths, tensor_of, first_of)]
    pointers, lengths, tensor_of, first_of = torch.cat(parts).to(device).split([len(part) for part in parts])
    total = int(programs.sum())
    sums = torch.empty(total, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        _sum_words[(total,)](pointers, lengths, tensor_of, first_of, sums, MULTIPLIER, BLOCK, ROUNDS)
    return torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, tensor_of[:total], sums).cpu()
