"""The mixture of experts on a GPU: the same as moe.py computes, in the fewest passes over memory, and without the host
waiting for the device. The kernels are in triton_route.py and triton_moe.py, the products torch's grouped ones.

In BF16 one layer of experts is one autograd function (`experts`), which keeps the products' inputs and computes the
activations again; for other dtypes and recipes `experts_by_recipe` chains the same kernels as single functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.kernels.triton_moe import gather_sum, scatter_rows, swiglu_backward, swiglu_forward
from trainer.model.kernels.triton_route import Counts, Order, decide, decide_backward
from trainer.precision.recipe import Recipe, grouped_matmul


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
        # In place: the one who made dx, `_Experts`, has handed it over to this function alone.
        return d_logits @ twice if dx is None else dx.addmm_(d_logits, twice), dw, None, None, None


def experts(
    x: Float[Tensor, "n hidden"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    counts: Counts,
    w13: Float[Tensor, "experts two_wide hidden"],
    w2: Float[Tensor, "experts hidden wide"],
    shared: tuple[Float[Tensor, "two_shared hidden"], Float[Tensor, "hidden shared"]] | None,
    residual: Float[Tensor, "n hidden"] | None,
    keep_rows: bool = True,
) -> Float[Tensor, "n hidden"]:
    """Σ weight · expert(x), plus the shared expert of weights (w13, w2) and `residual` where there are any, in BF16.
    Kept for the backward pass: `x`, the first products' results, and with `keep_rows` the copies of the tokens by
    expert and the activations, which else are made again (n · k · (hidden + wide) numbers a layer against one pass over
    them)."""
    return _Experts.apply(x, weights, chosen, counts, w13, w2, *(shared or (None, None)), residual, keep_rows)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, chosen, counts, w13, w2, shared13, shared2, residual, keep_rows):
        order = Order.of(chosen, weights, counts)
        added = [] if residual is None else [residual]
        shared_gate_up = None
        if shared13 is not None:
            shared_gate_up = F.linear(x, shared13)
            added.append(F.linear(swiglu_forward(shared_gate_up), shared2))
        rows = scatter_rows(x, order.place)
        gate_up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=order.ends)
        if not keep_rows:
            rows = None
        act = swiglu_forward(gate_up, order.row_weights)
        ctx.save_for_backward(
            x, rows, act if keep_rows else None, gate_up, shared_gate_up, w13, w2, shared13, shared2, order.place,
            order.ends, order.row_weights,
        )  # fmt: skip
        ctx.residual = residual is not None
        return gather_sum(torch._grouped_mm(act, w2.transpose(1, 2), offs=order.ends), order.place, *added)

    @staticmethod
    def backward(ctx, dy):
        x, rows, kept, gate_up, shared_gate_up, w13, w2, shared13, shared2, place, ends, row_weights = ctx.saved_tensors
        dy = dy.contiguous()
        dx_shared, d_shared13, d_shared2 = [], None, None
        if shared13 is not None:
            d_gate_up, shared_act, _ = swiglu_backward(shared_gate_up, dy @ shared2)
            d_shared2 = dy.T @ shared_act
            d_shared13 = d_gate_up.T @ x
            dx_shared = [d_gate_up @ shared13]
        d_out = scatter_rows(dy, place)
        d_act = torch._grouped_mm(d_out, w2, offs=ends)
        d_gate_up, act, d_row_weights = swiglu_backward(gate_up, d_act, row_weights, keep=kept is None)
        dw2 = torch._grouped_mm(d_out.T, act if kept is None else kept, offs=ends)
        del d_out, d_act, act, kept
        d_rows = torch._grouped_mm(d_gate_up, w13, offs=ends)
        dx = gather_sum(d_rows, place, *dx_shared)
        del d_rows
        rows = scatter_rows(x, place) if rows is None else rows
        dw13 = torch._grouped_mm(d_gate_up.T, rows, offs=ends)
        d_weights = d_row_weights.index_select(0, place.flatten()).view_as(place)
        return dx, d_weights, None, None, dw13, dw2, d_shared13, d_shared2, dy if ctx.residual else None, None


def experts_by_recipe(
    x: Float[Tensor, "n hidden"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    counts: Counts,
    w13: Float[Tensor, "experts two_wide hidden"],
    w2: Float[Tensor, "experts hidden wide"],
    recipe: Recipe,
) -> Float[Tensor, "n hidden"]:
    """Σ weight · expert(x) with the products of any recipe."""
    order = Order.of(chosen, weights.detach(), counts)
    gate_up = grouped_matmul(_Scatter.apply(x, order.place), w13, order.ends, recipe)
    row_weights = _RowWeights.apply(weights, order.row_weights, order.place)
    out = grouped_matmul(weighted_swiglu(gate_up, row_weights), w2, order.ends, recipe)
    return _GatherSum.apply(out, order.place)


def weighted_swiglu(
    gate_up: Float[Tensor, "rows two_wide"], weights: Float[Tensor, " rows"] | None
) -> Float[Tensor, "rows wide"]:
    """weight · silu(gate) · up of [gate, up]; without weights 1. Keeps its inputs only."""
    return _WeightedSwiGLU.apply(gate_up, weights)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weights):
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, weights)
        return swiglu_forward(gate_up, weights)

    @staticmethod
    def backward(ctx, grad):
        gate_up, weights = ctx.saved_tensors
        d_gate_up, _, d_weights = swiglu_backward(gate_up, grad.contiguous(), weights, keep=False)
        return d_gate_up, d_weights


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        return scatter_rows(x, place)

    @staticmethod
    def backward(ctx, grad):
        return gather_sum(grad.contiguous(), *ctx.saved_tensors), None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, place):
        ctx.save_for_backward(place)
        return gather_sum(rows.contiguous(), place)

    @staticmethod
    def backward(ctx, grad):
        return scatter_rows(grad, *ctx.saved_tensors), None


class _RowWeights(torch.autograd.Function):
    """The weights in the order of the rows, which `Order` has made already."""

    @staticmethod
    def forward(ctx, weights, row_weights, place):
        ctx.save_for_backward(place)
        return row_weights.clone()

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place.flatten()).view_as(place), None, None
