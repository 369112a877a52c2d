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
    groups: tuple[Group, ...]
    last: Int[Tensor, " n"]  # the last token of every token's document

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


def group_documents(bounds: Int[Tensor, " documents+1"], padding: float = 0.1, small: int = 1024) -> Documents:
    """Groups documents so that a group's padding is at most the share `padding` of its tokens, or the group has at
    most `small` places. Raises ValueError for bounds that do not start at 0 or hold an empty document."""
    device = bounds.device
    bounds = bounds.cpu().long()
    lengths = bounds.diff()
    if len(bounds) < 2 or bounds[0] != 0 or (lengths < 1).any():
        raise ValueError(f"bounds {bounds.tolist()[:8]} do not describe documents: expected 0 < b1 < b2 < ... < n")
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    groups, start = [], 0
    while start < len(ordered):
        longest, end, held = ordered[start], start, 0
        while end < len(ordered):
            held += ordered[end]
            if (end + 1 - start) * longest > max((1 + padding) * held, small):
                break
            end += 1
        members = order[start:end].sort().values
        offsets, length = torch.arange(longest), lengths[members, None]
        source = bounds[members, None] + torch.minimum(offsets, length - 1)
        real = (offsets < length).flatten().nonzero()[:, 0]
        padded = len(real) < source.numel()
        groups.append(
            Group(
                source.to(device),
                real.to(device) if padded else None,
                (source.flatten()[real] if padded else source.flatten()).to(device),
            )
        )
        start = end
    last = torch.repeat_interleave(bounds[1:] - 1, lengths)
    return Documents(tuple(groups), last.to(device))
