"""Packed documents, regrouped for attention: documents of similar length side by side, padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Documents of similar length as one array; a document's padding comes after its last token, so that a causal
    attention needs no mask for it."""

    source: Int[Tensor, "documents longest"]  # the packed token in every place; padding repeats the document's last
    real: Int[Tensor, " tokens"] | None  # the places (flat) that are no padding; None: all of them
    tokens: Int[Tensor, " tokens"]  # the packed tokens of those places


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, in the forms that attention asks for. Made from bounds on the CPU, so that no
    device is waited for; each form is made once, when it is first asked for."""

    bounds: Int[Tensor, " documents+1"]  # CPU, int64
    device: torch.device
    padding: float = 0.1
    small: int = 1024

    @cached_property
    def lengths(self) -> Int[Tensor, " documents"]:
        return self.bounds.diff()

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def equal(self) -> bool:
        """Whether all documents are of one length: then the packed tokens are an array of documents as they lie."""
        return bool((self.lengths == self.longest).all())

    @cached_property
    def cumulative(self) -> Int[Tensor, " documents+1"]:
        """The bounds as the kernels for documents of mixed lengths want them: int32, on the device."""
        return _move(self.bounds.int(), self.device)

    @cached_property
    def last(self) -> Int[Tensor, " n"]:
        """The last token of every token's document."""
        return _move(torch.repeat_interleave(self.bounds[1:] - 1, self.lengths), self.device)

    @cached_property
    def ids(self) -> Int[Tensor, " n"]:
        """The document of every token."""
        return _move(torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths), self.device)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Documents of similar length; a group's padding is at most the share `padding` of its tokens, or the group
        has at most `small` places."""
        order = torch.argsort(self.lengths, descending=True, stable=True)
        ordered = self.lengths[order].tolist()
        groups, start = [], 0
        while start < len(ordered):
            longest, end, held = ordered[start], start, 0
            while end < len(ordered):
                held += ordered[end]
                if (end + 1 - start) * longest > max((1 + self.padding) * held, self.small):
                    break
                end += 1
            groups.append(self._group(order[start:end].sort().values, longest))
            start = end
        return tuple(groups)

    def _group(self, members: Int[Tensor, " documents"], longest: int) -> Group:
        offsets, length = torch.arange(longest), self.lengths[members, None]
        source = self.bounds[members, None] + torch.minimum(offsets, length - 1)
        real = (offsets < length).flatten().nonzero()[:, 0]
        padded = len(real) < source.numel()
        tokens = source.flatten()[real] if padded else source.flatten()
        return Group(
            _move(source, self.device), _move(real, self.device) if padded else None, _move(tokens, self.device)
        )

    @cached_property
    def source(self) -> Int[Tensor, " places"]:
        """The packed token in every place of all groups, one group after the other."""
        return torch.cat([group.source.flatten() for group in self.groups])

    @cached_property
    def place(self) -> Int[Tensor, " n"]:
        """Where every packed token stands among the places of `source`."""
        place, start = torch.empty_like(self.last), 0
        for group in self.groups:
            count = group.source.numel()
            inside = torch.arange(count, device=place.device) if group.real is None else group.real
            place[group.tokens] = start + inside
            start += count
        return place


def group_documents(
    bounds: Int[Tensor, " documents+1"],
    padding: float = 0.1,
    small: int = 1024,
    device: torch.device | None = None,
) -> Documents:
    """The documents between `bounds`, for arrays on `device` (without: where the bounds are). Bounds on a GPU are read
    back, which waits for it. Raises ValueError for bounds that do not start at 0 or hold an empty document."""
    device = device or bounds.device
    bounds = bounds.cpu().long()
    if len(bounds) < 2 or bounds[0] != 0 or (bounds.diff() < 1).any():
        raise ValueError(f"bounds {bounds.tolist()[:8]} do not describe documents: expected 0 < b1 < b2 < ... < n")
    return Documents(bounds, device, padding, small)


def _move(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for what it has still to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
