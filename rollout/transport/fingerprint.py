"""One number per tensor that says whether its bits arrived: the same on every device, cheap where the tensor lies.

Words of 8 bytes are scrambled together with their place by a bijection and summed modulo 2^64, so one changed word
always changes the sum. It guards against accidents, not against an adversary. On a CUDA device all tensors of a call
go through one kernel that reads every byte once, and one small copy brings the numbers to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIER = 0x9E3779B97F4A7C15  # odd: multiplying by it modulo 2^64 loses nothing
_SIGNED = MULTIPLIER - (1 << 64)
_CHUNK = 1 << 20  # words summed at a time on a CPU: bounds the memory of a fingerprint


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor (a view where it is contiguous)."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fingerprint(tensor: Tensor) -> int:
    """The tensor's number, in [0, 2^64). It depends on dtype and order of the elements, not on their place in memory,
    and on the shape only through the number of elements."""
    return fingerprints([tensor])[0]


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """`fingerprint` of each. Tensors on CUDA devices cost one launch and one synchronisation together."""
    found = [0] * len(tensors)
    batches: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.is_cuda and tensor.numel():
            batches.setdefault(tensor.device, []).append(i)
        else:
            found[i] = _sum_words(tensor)
    for device, members in batches.items():
        from rollout.transport.triton_fingerprint import sum_words

        kept: list[Tensor] = []  # copies of what cannot be read in place, until the sums are there
        spans = []
        for i in members:
            tensor = tensors[i]
            if not (tensor.is_contiguous() and tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0):
                kept.append(tensor := _words(tensor))
            spans.append((tensor.data_ptr(), tensor.nbytes // 8))
        for i, total in zip(members, sum_words(spans, device).tolist(), strict=True):
            found[i] = total
    return [(total + tensor.numel()) % (1 << 64) for total, tensor in zip(found, tensors, strict=True)]


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64, filled up with zeros: a view where the memory allows one."""
    data = as_bytes(tensor)
    if rest := -len(data) % 8:
        data = torch.cat([data, data.new_zeros(rest)])
    # torch views bytes as words only from a whole number of words on; a copy begins anew.
    return (data if data.storage_offset() % 8 == 0 and data.data_ptr() % 8 == 0 else data.clone()).view(torch.int64)


def _sum_words(tensor: Tensor) -> int:
    words = _words(tensor)
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        place = torch.arange(start + 1, start + 1 + len(part), dtype=torch.int64, device=part.device)
        part = part ^ place.mul_(_SIGNED)
        for _ in range(2):  # high bits reach the low ones, low ones the high
            part = part.bitwise_xor_((part >> 32) & 0xFFFFFFFF).mul_(_SIGNED)
        total += int(part.bitwise_xor_((part >> 32) & 0xFFFFFFFF).sum())
    return total
