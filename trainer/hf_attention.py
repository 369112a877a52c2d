"""Attention over packed sequences, in the form that models of transformers call.

Everything but attention works on the packed tokens as they are. Attention takes the sequences out into a few padded
groups of similar length (trainer.model.documents): with a causal mask and padding on the right no token ever sees
padding, so the plain causal kernels serve, without a mask in memory and without work between sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface

from trainer.model.documents import group_documents

NAME = "rlzero_packed"  # under which transformers knows `attend`


class Layout:
    """Where every packed token stands in the padded groups, which follow one another in the padded order."""

    def __init__(self, bounds: Int[Tensor, " sequences+1"], device: torch.device):
        grouped = group_documents(bounds, device=device)
        self.shapes = [tuple(group.source.shape) for group in grouped.groups]  # (sequences, longest)
        self.source: Int[Tensor, " padded"] = grouped.source  # the packed token in every padded place
        self.place: Int[Tensor, " n"] = grouped.place  # the padded place of every packed token

    def pad(self, x: Float[Tensor, "n ..."]) -> list[Float[Tensor, "sequences longest ..."]]:
        """The groups of `x`; only for values whose padding reaches nothing that `unpad` keeps."""
        sizes = [sequences * longest for sequences, longest in self.shapes]
        return [
            part.unflatten(0, shape)
            for part, shape in zip(_Pad.apply(x, self.source, self.place).split(sizes), self.shapes, strict=True)
        ]

    def unpad(self, groups: list[Float[Tensor, "sequences longest ..."]]) -> Float[Tensor, "n ..."]:
        """The packed tokens of padded groups."""
        flat = [group.flatten(0, 1) for group in groups]
        return (torch.cat(flat) if len(flat) > 1 else flat[0]).index_select(0, self.place)


class _Pad(torch.autograd.Function):
    """Gathers both ways: nothing that is kept depends on the padding, so its gradient is zero."""

    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads n width"],
    key: Float[Tensor, "1 kv_heads n width"],
    value: Float[Tensor, "1 kv_heads n value_width"],
    attention_mask: Tensor | None = None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused,
) -> tuple[Float[Tensor, "1 n heads value_width"], None]:
    """Every token's attention to those of its sequence before it (the last `sliding_window`, where there is one).
    Dropout is ignored: log-probabilities with noise in them have no ratio. Raises NotImplementedError for what it
    does not compute (softcapping, sinks, position biases)."""
    unknown = [name for name in ("s_aux", "position_bias") if unused.get(name) is not None]
    if softcap is not None or unknown:
        raise NotImplementedError(f"packed attention does not compute {', '.join(unknown) or 'softcapping'}")
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    query, key, value = (layout.pad(x[0].transpose(0, 1)) for x in (query, key, value))
    # a group: [sequences, longest, heads, width]
    for q, k, v in zip(query, key, value, strict=True):
        longest = q.shape[1]
        window = None
        if sliding_window is not None and sliding_window < longest:
            back = torch.arange(longest, device=q.device)
            back = back[:, None] - back[None, :]
            window = (back >= 0) & (back < sliding_window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2))
    return layout.unpad(outputs)[None], None


AttentionInterface.register(NAME, attend)
