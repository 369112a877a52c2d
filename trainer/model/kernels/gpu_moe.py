"""The mixture of experts on a GPU: the router, and the passes over rows by expert, in the fewest passes over memory and
without the host waiting for the device. The kernels are in triton_route.py and triton_moe.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.kernels.triton_moe import gather_sum, scatter_rows, swiglu_backward, swiglu_forward
from trainer.model.kernels.triton_route import Counts, Order, decide, decide_backward
from trainer.model.rows import Arriving


def product_float32(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a b in float32. BF16 operands are multiplied as they are and summed in float32: what widening them first would
    give, to the order of the sum."""
    if a.dtype == b.dtype == torch.bfloat16 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def route(
    x: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, " experts"],
    replay: Int[Tensor, "n k"] | None,
    *decision,
) -> tuple[Float[Tensor, "n experts"], Float[Tensor, "n k"], Int[Tensor, "n k"], Counts, Float[Tensor, "n hidden"]]:
    """Scores and weights, which carry gradients, the chosen experts, how they are spread, and `x` again: what else
    uses `x` should use this one, and the gradients of both uses are summed inside a product. `decision`: groups, kept
    groups, k, whether weights add up to 1, their factor (see `triton_route.decide`)."""
    scores, weights, experts, load, ends, starts, x = _Route.apply(x, weight, bias, replay, decision)
    return scores, weights, experts, Counts(load, ends, starts), x


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, replay, decision):
        ctx.set_materialize_grads(False)
        scores, experts, weights, counts = decide(product_float32(x, weight.T), bias, replay, *decision)
        ctx.save_for_backward(x, weight, scores, experts)
        ctx.decision = decision
        integers = (experts, counts.load, counts.ends, counts.starts)
        ctx.mark_non_differentiable(*integers)
        return scores, weights, *integers, x

    @staticmethod
    def backward(ctx, d_scores, d_weights, _experts, _load, _ends, _starts, dx):
        x, weight, scores, experts = ctx.saved_tensors
        if d_scores is None and d_weights is None:
            return dx, None, None, None, None
        if d_weights is None:
            d_weights = scores.new_zeros(experts.shape)
        *_, renormalize, factor = ctx.decision
        dtype = weight.dtype if weight.dtype == x.dtype else torch.float32
        # In BF16 the gradient of the logits comes as two numbers side by side: their products with the weight below
        # itself add up, in float32, to the product of the float32 gradient.
        d_logits = decide_backward(scores, experts, d_weights, d_scores, renormalize, factor, dtype)
        total = len(weight)
        if dtype == torch.float32:
            own = (d_logits @ weight.float()).to(x.dtype)
            dw = (d_logits.T @ x.float()).to(weight.dtype)
            return own if dx is None else dx + own, dw, None, None, None
        dw = product_float32(d_logits.T, x)
        dw = (dw[:total] + dw[total:]).to(weight.dtype)
        twice = torch.cat((weight, weight))
        # In place: the one who made dx, `_ExpertsSum`, has handed it over to this function alone.
        return d_logits @ twice if dx is None else dx.addmm_(d_logits, twice), dw, None, None, None


@dataclass(frozen=True)
class KernelRows:
    """`trainer.model.rows.Rows` as kernels, in buffers for as many rows as there can be: how many there are is known on
    the device alone. The routing weight is folded into the activation, so that bringing rows back is a plain sum, and
    the second product's result need not be kept."""

    place: Int[Tensor, "n k"]  # int32; at or behind ends[-1]: of an expert of another rank
    ends: Int[Tensor, " experts"]  # int32
    row_weights: Float[Tensor, " rows"]  # float32, of every row
    weighs_result = False

    @classmethod
    def of(
        cls,
        experts: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
        count: int,
        counts: Counts | None = None,
        rows: int | None = None,
    ) -> KernelRows:
        """`experts` are numbers of the `count` experts here, and `count` for those of other ranks. `counts`: how they
        are spread over `count` experts, where all are here; `rows`: how many rows there are, where the host knows."""
        experts = experts.contiguous()
        n, k = experts.shape
        order = Order.of(experts, weights, Counts.of(experts, count + 1) if counts is None else counts)
        rows = max(n * min(k, count) if rows is None else rows, 1)
        return cls(order.place, order.ends[:count], order.row_weights[:rows])

    def spread(self, x: Float[Tensor, "own size"], arriving: Arriving | None = None) -> Float[Tensor, "rows size"]:
        """See `Rows.spread`. This rank's own tokens do not wait for those that arrive. Other rows are undefined."""
        rows, own = x.new_empty(len(self.row_weights), x.shape[1]), len(x)
        scatter_rows(x, self.place[:own], rows, self.ends[-1])
        if arriving is not None:
            scatter_rows(arriving.wait(), self.place[own:], rows, self.ends[-1])
        return rows

    def sum(
        self,
        rows: Float[Tensor, "rows size"],
        tokens: slice,
        *added: Float[Tensor, "n size"],
        more: Float[Tensor, "arrays n size"] | None = None,
    ) -> Float[Tensor, "n size"]:
        """See `Rows.sum`; in float32, rounded once."""
        return gather_sum(rows, self.place[tokens], self.ends[-1], *added, more=more)

    combine = sum  # the rows are weighted

    def spread_gradient(self, dy, arriving: Arriving | None, out: None) -> tuple[Float[Tensor, "rows size"], None]:
        """See `Rows.spread_gradient`."""
        return self.spread(dy, arriving), None

    def activation(self, gate_up: Float[Tensor, "rows two_wide"]) -> Float[Tensor, "rows wide"]:
        """weight · silu(gate) · up of [gate, up]."""
        return swiglu_forward(gate_up, self.row_weights, self.ends[-1])

    def activation_backward(
        self,
        gate_up: Float[Tensor, "rows two_wide"],
        grad: Float[Tensor, "rows wide"],
        act: Float[Tensor, "rows wide"] | None,
    ) -> tuple[Float[Tensor, "rows two_wide"], Float[Tensor, "rows wide"], Float[Tensor, "n k"]]:
        """See `Rows.activation_backward`; rows of other ranks give their weights no gradient."""
        d_gate_up, again, d_rows = swiglu_backward(gate_up, grad, self.row_weights, act is None, self.ends[-1])
        rows = self.place.flatten().clamp(max=len(d_rows) - 1)
        d_weights = d_rows.index_select(0, rows).view_as(self.place)
        return d_gate_up, again if act is None else act, d_weights.where(self.place < self.ends[-1], 0.0)


def swiglu(gate_up: Float[Tensor, "rows two_wide"]) -> Float[Tensor, "rows wide"]:
    """silu(gate) · up of [gate, up]. Keeps its input only."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_backward(*ctx.saved_tensors, grad.contiguous(), keep=False)[0]
