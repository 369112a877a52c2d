"""Attention over packed documents, in the form that models of transformers call.

Everything but attention works on the packed tokens as they are. Attention takes the documents out into a few padded
groups of similar length (trainer.model.documents): with a causal mask and padding on the right no token ever sees
padding, so the plain causal kernels serve, without a mask in memory and without work between documents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface

from trainer.model.documents import Documents, pad, unpad

NAME = "rlzero_packed"  # under which transformers knows `attend`


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads n width"],
    key: Float[Tensor, "1 kv_heads n width"],
    value: Float[Tensor, "1 kv_heads n value_width"],
    attention_mask: Tensor | None = None,
    *,
    documents: Documents,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused,
) -> tuple[Float[Tensor, "1 n heads value_width"], None]:
    """Every token's attention to those of its document before it (the last `sliding_window`, where there is one).
    Dropout is ignored: log-probabilities with noise in them have no ratio. Raises NotImplementedError for what it
    does not compute (softcapping, sinks, position biases)."""
    unknown = [name for name in ("s_aux", "position_bias") if unused.get(name) is not None]
    if softcap is not None or unknown:
        raise NotImplementedError(f"packed attention does not compute {', '.join(unknown) or 'softcapping'}")
    query, key, value = (pad(x[0].transpose(0, 1), documents) for x in (query, key, value))  # [padded, heads, width]
    grouped = query.shape[1] != key.shape[1]
    outputs, start = [], 0
    for count, length in documents.groups:
        end = start + count * length
        q, k, v = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        window = None
        if sliding_window is not None and sliding_window < length:
            back = torch.arange(length, device=q.device)
            back = back[:, None] - back[None, :]
            window = (back >= 0) & (back < sliding_window)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return unpad(torch.cat(outputs) if len(outputs) > 1 else outputs[0], documents)[None], None


AttentionInterface.register(NAME, attend)
