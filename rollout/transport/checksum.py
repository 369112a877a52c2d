"""One number per tensor that says whether its bits arrived: the same on every device, cheap where the tensor lies.

Words of 8 bytes are scrambled together with their place by a bijection and summed modulo 2^64, so one changed word
always changes the sum. It guards against accidents, not against an adversary. On a CUDA device all tensors of a call
go through one kernel that reads every byte once, and one small copy brings the numbers to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

MULTIPLIER = 0x9E3779B97F4A7C15  # odd: multiplying by it modulo 2^64 loses nothing
_SIGNED = MULTIPLIER - (1 << 64)
_CHUNK = 1 << 20  # words summed at a time on a CPU: bounds the memory of a checksum


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor (a view where it is contiguous)."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def checksum(tensor: Tensor) -> int:
    """The tensor's number, in [0, 2^64). It depends on dtype and order of the elements, not on their place in memory,
    and on the shape only through the number of elements."""
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """`checksum` of each. Tensors on CUDA devices cost one launch and one synchronisation together."""
    found = [0] * len(tensors)
    batches: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        batches.setdefault(tensor.device, []).append(i)
    for members in batches.values():
        for i, number in zip(members, Checksums([tensors[i] for i in members])().tolist(), strict=True):
            found[i] = number % (1 << 64)
    return found


class Checksums:
    """Checksums of tensors (of one device) that stay where they are while their contents change: what the kernel
    has to be told about them is laid out once. Tensors that the kernel cannot read in place are copied here."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = [tensor.detach() for tensor in tensors]
        self._launch: Any = None
        if self.tensors and self.tensors[0].is_cuda:
            from rollout.transport.triton_checksum import Launch, readable

            self.tensors = [t if readable(t) else t.contiguous().clone() for t in self.tensors]
            self._launch = Launch(self.tensors)

    def __call__(self, out: Tensor | None = None) -> Int[Tensor, " tensors"]:
        """The numbers modulo 2^64, as int64 on the tensors' device (in `out`, where it is given); on a GPU nothing
        waits for them."""
        if self._launch is not None:
            return self._launch(out)
        sums = [(_sum_words(tensor) + tensor.numel()) % (1 << 64) for tensor in self.tensors]
        numbers = torch.tensor([n - (n >> 63 << 64) for n in sums], dtype=torch.int64)
        return numbers if out is None else out.copy_(numbers)


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
