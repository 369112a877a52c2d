"""Causal attention of MLA's heads over packed documents, three ways that compute the same.

On a GPU in BF16: gpu_attention.py. Short documents on a CPU: batched products over groups of documents, with a backward
pass of its own that keeps the probabilities and gathers the rest again. Everything else (long documents on a CPU,
float32 on a GPU): `scaled_dot_product_attention` over the same groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from trainer.model.documents import Documents, Group
from trainer.model.layers import has_kernels
from trainer.model.rope import apply_rope

SHORT = 512  # tokens; the probabilities of longer documents would not fit


def packed_attention(
    q: Float[Tensor, "n heads qk"],
    kv: Float[Tensor, "n heads nope+v"],
    k_pe: Float[Tensor, "n rope"],
    turn: Complex[Tensor, "n pairs"],
    documents: Documents,
    scale: float,
    interleave: bool,
) -> Float[Tensor, "n heads v"]:
    """softmax(scale · q kᵀ) v of every token over its document up to itself. `q` ends in its part to be rotated, `kv`
    is the key's part without position followed by the value, `k_pe` the rotated part that all heads share; `turn`
    rotates them (see `rope.turns`)."""
    if has_kernels(q) and q.dtype in (torch.bfloat16, torch.float16):
        from trainer.model.kernels.gpu_attention import gpu_attention

        return gpu_attention(q, kv, k_pe, turn, documents, scale, interleave)
    if q.device.type == "cpu" and documents.longest <= SHORT:
        return _ShortDocumentsOnCPU.apply(q, kv, k_pe, turn, documents, scale, interleave)
    nope, rope = q.shape[-1] - k_pe.shape[-1], k_pe.shape[-1]
    q = torch.cat((q[..., :nope], apply_rope(q[..., nope:], turn, interleave)), dim=-1)
    k_pe = apply_rope(k_pe[:, None], turn, interleave).expand(-1, q.shape[1], rope)
    k, v = torch.cat((kv[..., :nope], k_pe), dim=-1), kv[..., nope:]
    q, k, v = (_Spread.apply(t, documents.source, documents.place) for t in (q, k, v))
    attended, start = [], 0
    for group in documents.groups:
        places = slice(start, start + group.source.numel())
        grouped = (t[places].unflatten(0, group.source.shape).transpose(1, 2) for t in (q, k, v))
        attended.append(_sdpa(*grouped, scale).transpose(1, 2).flatten(0, 1))
        start = places.stop
    return _Collect.apply(torch.cat(attended), documents.place)


class _Spread(torch.autograd.Function):
    """Packed tokens to the places of all groups. Padding stands after its document, so that nothing which `_Collect`
    keeps depends on it: its gradient is zero, and the way back is a gather too."""

    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Collect(torch.autograd.Function):
    """The places of all groups back to packed tokens; padding is dropped."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.places = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, place, grad), None


def _sdpa(q, k, v, scale: float) -> Float[Tensor, "documents heads longest v"]:
    width = v.shape[-1]
    if q.device.type == "cpu" and width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))  # torch's flash attention for CPU wants equal widths
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]


def _only_real(x: Float[Tensor, "places ..."], group: Group) -> Float[Tensor, "tokens ..."]:
    return x if group.real is None else x.index_select(0, group.real)


class _ShortDocumentsOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_pe, turn, documents, scale, interleave):
        nope = q.shape[-1] - k_pe.shape[-1]
        out = q.new_empty(len(q), q.shape[1], kv.shape[-1] - nope)
        kept = []
        for group in documents.groups:
            q_, k, v = _gather(q, kv, k_pe, turn, group, interleave)
            future = torch.full((k.shape[1], k.shape[1]), float("-inf"), dtype=q.dtype).triu_(1)
            p = torch.baddbmm(future, q_, k.transpose(1, 2), alpha=scale).softmax(-1)
            out.index_copy_(0, group.tokens, _only_real(_to_tokens(torch.bmm(p, v), group), group))
            kept.append(p)
        ctx.save_for_backward(q, kv, k_pe, turn, *kept)
        ctx.documents, ctx.scale, ctx.interleave = documents, scale, interleave
        return out

    @staticmethod
    def backward(ctx, grad):
        q, kv, k_pe, turn, *kept = ctx.saved_tensors
        nope = q.shape[-1] - k_pe.shape[-1]
        back = turn.conj().resolve_conj()
        dq, dkv, dk_pe = torch.empty_like(q), torch.empty_like(kv), torch.empty(k_pe.shape, dtype=k_pe.dtype)
        for group, p in zip(ctx.documents.groups, kept, strict=True):
            q_, k, v = _gather(q, kv, k_pe, turn, group, ctx.interleave)
            g = grad.index_select(0, group.source.flatten())
            if group.real is not None:  # padding is no token: it must add nothing to the keys and values it sees
                g.mul_(torch.zeros(len(g), 1, 1, dtype=g.dtype).index_fill_(0, group.real, 1.0))
            g = _to_heads(g, group)
            dv = torch.bmm(p.transpose(1, 2), g)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            ds *= ctx.scale
            turn_back = back.index_select(0, group.tokens)[:, None]
            dq_ = _only_real(_to_tokens(torch.bmm(ds, k), group), group)
            dk = _only_real(_to_tokens(torch.bmm(ds.transpose(1, 2), q_), group), group)
            _rotate_(dq_[..., nope:], turn_back, ctx.interleave)
            dq.index_copy_(0, group.tokens, dq_)
            d_pe = dk[..., nope:].sum(1, keepdim=True)
            dk_pe.index_copy_(0, group.tokens, _rotate_(d_pe, turn_back, ctx.interleave)[:, 0])
            dv = _only_real(_to_tokens(dv, group), group)
            dkv.index_copy_(0, group.tokens, torch.cat((dk[..., :nope], dv), dim=-1))
        return dq, dkv, dk_pe, None, None, None, None


def _gather(q, kv, k_pe, turn, group: Group, interleave: bool):
    """The group's queries and keys, rotated, and values: each [documents · heads, longest, width]."""
    rows, nope = group.source.flatten(), q.shape[-1] - k_pe.shape[-1]
    turn = turn.index_select(0, rows)[:, None]
    q, kv, k_pe = q.index_select(0, rows), kv.index_select(0, rows), k_pe.index_select(0, rows)[:, None]
    _rotate_(q[..., nope:], turn, interleave)
    _rotate_(k_pe, turn, interleave)
    k = torch.cat((kv[..., :nope], k_pe.expand(-1, q.shape[1], -1)), dim=-1)
    return _to_heads(q, group), _to_heads(k, group), _to_heads(kv[..., nope:], group)


def _rotate_(x: Float[Tensor, "n heads rope"], turn: Complex[Tensor, "n 1 pairs"], interleave: bool) -> Tensor:
    """`rope.apply_rope` in place."""
    if interleave and x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
        return x
    return x.copy_(apply_rope(x, turn[:, 0], interleave))


def _to_heads(x: Float[Tensor, "places heads width"], group: Group) -> Float[Tensor, "documents*heads longest width"]:
    return x.unflatten(0, group.source.shape).transpose(1, 2).flatten(0, 1)


def _to_tokens(x: Float[Tensor, "documents*heads longest width"], group: Group) -> Float[Tensor, "places heads width"]:
    return x.unflatten(0, (len(group.source), -1)).transpose(1, 2).flatten(0, 1)
