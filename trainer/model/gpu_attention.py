"""Causal attention of MLA's heads over packed documents on a GPU, in BF16 (or FP16).

Documents of one length are an array as they lie: cuDNN's kernel takes them without a copy. Documents of mixed lengths
go to a kernel that reads their bounds on the device (`MIXED`). Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from trainer.model.documents import Documents
from trainer.model.triton_rope import backward_, queries_keys_values_

Kernel = Literal["cudnn", "cudnn_bounds", "flash_bounds", "cudnn_groups"]
MIXED: Kernel = "flash_bounds"  # for documents of mixed lengths


def gpu_attention(
    q: Float[Tensor, "n heads qk"],
    kv: Float[Tensor, "n heads nope+v"],
    k_pe: Float[Tensor, "n rope"],
    turn: Complex[Tensor, "n pairs"],
    documents: Documents,
    scale: float,
    interleave: bool,
) -> Float[Tensor, "n heads v"]:
    """As `packed_attention.packed_attention`. `q` is overwritten: it must be a product's result, which no gradient
    needs."""
    return _Attention.apply(q, kv, k_pe, turn, documents, scale, interleave, "cudnn" if documents.equal else MIXED)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_pe, turn, documents, scale, interleave, kernel):
        ctx.v = kv.shape[2] - q.shape[2] + k_pe.shape[1]
        v_width = {"flash_bounds": q.shape[2], "cudnn_bounds": ctx.v}.get(kernel)
        q, k, v = queries_keys_values_(q, kv, k_pe.contiguous(), turn, interleave, v_width)
        out, saved = FORWARD[kernel](q, k, v, documents, scale)
        ctx.save_for_backward(q, k, v, turn, *saved)
        ctx.documents, ctx.scale, ctx.interleave, ctx.kernel = documents, scale, interleave, kernel
        return out[..., : ctx.v].contiguous()

    @staticmethod
    def backward(ctx, grad):
        q, k, v, turn, *saved = ctx.saved_tensors
        dq, dk, dv = BACKWARD[ctx.kernel](grad, q, k, v, ctx.documents, ctx.scale, saved)
        dq, dkv, dk_pe = backward_(dq, dk, dv, turn, ctx.v, ctx.interleave)
        return dq, dkv, dk_pe, None, None, None, None, None


def _as_documents(x: Float[Tensor, "n heads width"], documents: int) -> Float[Tensor, "documents heads length width"]:
    return x.unflatten(0, (documents, -1)).transpose(1, 2)


def _as_tokens(x: Float[Tensor, "documents heads length width"]) -> Float[Tensor, "n heads width"]:
    return x.transpose(1, 2).flatten(0, 1)


def _cudnn(q, k, v, scale: float):
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out, lse, seed, offset


def _cudnn_backward(grad, q, k, v, out, lse, seed, offset, scale: float):
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, True, scale=scale
    )


def _equal_forward(q, k, v, documents: Documents, scale: float):
    q, k, v = (_as_documents(t, len(documents.lengths)) for t in (q, k, v))
    out, *rest = _cudnn(q, k, v, scale)
    return _as_tokens(out), (out, *rest)


def _equal_backward(grad, q, k, v, documents: Documents, scale: float, saved):
    grad, q, k, v = (_as_documents(t, len(documents.lengths)) for t in (grad.contiguous(), q, k, v))
    return tuple(_as_tokens(t).contiguous() for t in _cudnn_backward(grad, q, k, v, *saved, scale))


def _flash_forward(q, k, v, documents: Documents, scale: float):
    bounds, longest = documents.cumulative, documents.longest
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return out, (out, lse, rng, unused)


def _flash_backward(grad, q, k, v, documents: Documents, scale: float, saved):
    out, lse, rng, unused = saved
    bounds, longest = documents.cumulative, documents.longest
    grad = F.pad(grad, (0, v.shape[2] - grad.shape[2]))
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, True, rng, unused, scale=scale
    )


def _bounds_forward(q, k, v, documents: Documents, scale: float):
    bounds, longest = documents.cumulative, documents.longest
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, bounds, bounds, longest, longest, True, 0.0, True, False, scale=scale
    )
    return out, (out, lse, seed, offset)


def _bounds_backward(grad, q, k, v, documents: Documents, scale: float, saved):
    bounds, longest = documents.cumulative, documents.longest
    return torch.ops.aten._cudnn_attention_backward(
        grad.contiguous(), q, k, v, *saved, None, bounds, bounds, longest, longest, 0.0, True, scale=scale
    )


def _groups_forward(q, k, v, documents: Documents, scale: float):
    result, saved = q.new_empty(len(q), q.shape[1], v.shape[2]), []
    for group in documents.groups:
        rows, count = group.source.flatten(), len(group.source)
        out, *rest = _cudnn(*(_as_documents(t.index_select(0, rows), count) for t in (q, k, v)), scale)
        tokens = _as_tokens(out)
        result.index_copy_(0, group.tokens, tokens if group.real is None else tokens.index_select(0, group.real))
        saved += [out, *rest]
    return result, saved


def _groups_backward(grad, q, k, v, documents: Documents, scale: float, saved):
    results = torch.empty_like(q), torch.empty_like(k), q.new_empty(v.shape)
    for i, group in enumerate(documents.groups):
        rows, count = group.source.flatten(), len(group.source)
        arrays = [_as_documents(t.index_select(0, rows), count) for t in (q, k, v)]
        g = grad.new_zeros(len(rows), *grad.shape[1:])
        real = torch.arange(len(rows), device=rows.device) if group.real is None else group.real
        g.index_copy_(0, real, grad.index_select(0, group.tokens))
        for result, part in zip(
            results, _cudnn_backward(_as_documents(g, count), *arrays, *saved[4 * i : 4 * i + 4], scale), strict=True
        ):
            result.index_copy_(0, group.tokens, _as_tokens(part).index_select(0, real))
    return results


FORWARD = {
    "cudnn": _equal_forward, "cudnn_bounds": _bounds_forward, "flash_bounds": _flash_forward,
    "cudnn_groups": _groups_forward,
}  # fmt: skip
BACKWARD = {
    "cudnn": _equal_backward, "cudnn_bounds": _bounds_backward, "flash_bounds": _flash_backward,
    "cudnn_groups": _groups_backward,
}  # fmt: skip
