"""Packed documents, regrouped for attention: documents of similar length side by side, padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where every packed token stands in the padded groups.

    The padded order is the groups one after the other, each [documents, length]; a document's padding comes after its
    last token, so that a causal attention needs no mask for it.
    """

    groups: tuple[tuple[int, int], ...]  # (documents, length) of every group
    source: Int[Tensor, " padded"]  # the packed token in every padded place; padding repeats the document's last
    place: Int[Tensor, " n"]  # the padded place of every packed token
    last: Int[Tensor, " n"]  # the last token of every token's document

    @property
    def in_order(self) -> bool:
        """Documents of one length: padded and packed order are the same."""
        return len(self.groups) == 1 and len(self.source) == len(self.place)


def group_documents(bounds: Int[Tensor, " documents+1"], slack: float = 0.8) -> Documents:
    """Groups documents so that none is shorter than `slack` of its group's longest. Raises ValueError for bounds that
    do not start at 0 or hold an empty document."""
    device = bounds.device
    bounds = bounds.cpu().long()
    lengths = bounds.diff()
    if len(bounds) < 2 or bounds[0] != 0 or (lengths < 1).any():
        raise ValueError(f"bounds {bounds.tolist()[:8]} do not describe documents: expected 0 < b1 < b2 < ... < n")
    order = torch.argsort(lengths, descending=True, stable=True)
    place = torch.empty(int(bounds[-1]), dtype=torch.long)
    sources, groups, start, padded = [], [], 0, 0
    ordered = lengths[order].tolist()
    while start < len(ordered):
        longest, end = ordered[start], start
        while end < len(ordered) and ordered[end] >= slack * longest:
            end += 1
        members = order[start:end].sort().values
        offsets = torch.arange(longest)
        source = bounds[members, None] + torch.minimum(offsets, lengths[members, None] - 1)  # [documents, longest]
        real = offsets < lengths[members, None]
        place[source[real]] = padded + torch.arange(source.numel()).view_as(source)[real]
        sources.append(source.flatten())
        groups.append((end - start, longest))
        padded += source.numel()
        start = end
    last = torch.repeat_interleave(bounds[1:] - 1, lengths)
    return Documents(tuple(groups), torch.cat(sources).to(device), place.to(device), last.to(device))


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        return x[source]

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad[place], None, None  # nothing that is kept depends on the padding: its gradient is zero


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.padded = len(x)
        return x[place]

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.padded, *grad.shape[1:]).index_copy_(0, place, grad), None


def pad(x: Float[Tensor, "n ..."], documents: Documents) -> Float[Tensor, "padded ..."]:
    """Packed order to padded order. Only for values whose padding reaches nothing that `unpad` keeps."""
    return x if documents.in_order else _Pad.apply(x, documents.source, documents.place)


def unpad(x: Float[Tensor, "padded ..."], documents: Documents) -> Float[Tensor, "n ..."]:
    """Padded order back to packed order; the padding is dropped."""
    return x if documents.in_order else _Unpad.apply(x, documents.place)
