"""Causal attention of MLA's heads over packed documents on a GPU, in BF16 (or FP16).

Documents of one length are an array as they lie: cuDNN's kernel takes them without a copy. It makes a plan for every
new shape (0.1 s), so documents of mixed lengths go to flash attention, which reads their bounds on the device and takes
any lengths at once; it wants values as wide as keys, so they are filled up with zeros. (On one H100 the two differ by a
factor of 1.5 to 2. cuDNN's own way to take bounds writes out of bounds in torch 2.11 at these head sizes, and padded
groups of documents for its plain one cost in copies what the kernel gains.) Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from trainer.model.documents import Documents
from trainer.model.kernels.triton_rope import backward_, queries_keys_values_, resize


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
    equal = documents.equal and documents.longest > 1  # cuDNN takes no documents of one token
    return _Attention.apply(q, kv, k_pe, turn, documents, scale, interleave, equal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_pe, turn, documents, scale, interleave, equal):
        ctx.v = kv.shape[2] - q.shape[2] + k_pe.shape[1]
        q, k, v = queries_keys_values_(q, kv, k_pe, turn, interleave, None if equal else q.shape[2])
        out, saved = (_equal_forward if equal else _mixed_forward)(q, k, v, documents, scale)
        ctx.save_for_backward(q, k, v, turn, *saved)
        ctx.documents, ctx.scale, ctx.interleave, ctx.equal = documents, scale, interleave, equal
        return resize(out, ctx.v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, turn, *saved = ctx.saved_tensors
        dq, dk, dv = (_equal_backward if ctx.equal else _mixed_backward)(
            grad, q, k, v, ctx.documents, ctx.scale, *saved
        )
        dq, dkv, dk_pe = backward_(dq, dk, dv, turn, ctx.v, ctx.interleave)
        return dq, dkv, dk_pe, None, None, None, None, None


def _as_documents(x: Float[Tensor, "n heads width"], documents: int) -> Float[Tensor, "documents heads length width"]:
    return x.unflatten(0, (documents, -1)).transpose(1, 2)


def _as_tokens(x: Float[Tensor, "documents heads length width"]) -> Float[Tensor, "n heads width"]:
    return x.transpose(1, 2).flatten(0, 1)


def _equal_forward(q, k, v, documents: Documents, scale: float):
    q, k, v = (_as_documents(t, len(documents.lengths)) for t in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return _as_tokens(out), (out, lse, seed, offset)


def _equal_backward(grad, q, k, v, documents: Documents, scale: float, out, lse, seed, offset):
    grad, q, k, v = (_as_documents(t, len(documents.lengths)) for t in (grad.contiguous(), q, k, v))
    length = documents.longest
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=scale
    )
    return tuple(_as_tokens(t).contiguous() for t in grads)


def _mixed_forward(q, k, v, documents: Documents, scale: float):
    bounds, longest = documents.cumulative, documents.longest
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return out, (out, lse, rng, unused)


def _mixed_backward(grad, q, k, v, documents: Documents, scale: float, out, lse, rng, unused):
    bounds, longest = documents.cumulative, documents.longest
    grad = resize(grad, v.shape[2])
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, True, rng, unused, scale=scale
    )
