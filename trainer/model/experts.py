"""Σ weight · expert(x) + shared(x) + residual: one function for every device, recipe and number of expert ranks.

The two products of the experts and their gradients go through `trainer.precision.recipe`; what moves rows and what lies
between the products is a class of passes (`trainer.model.rows`, `trainer.model.kernels.gpu_moe`); tokens of other
ranks come by `trainer.parallel.peers`. The order of work puts something independent beside every message: this rank's
own tokens and the shared expert beside those of the forward pass, the shared expert's gradients and those of the
weights beside those of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.layers import has_kernels
from trainer.model.rows import Arriving, Rows, swiglu_backward, swiglu_forward
from trainer.precision.recipe import Recipe, grouped_outer, grouped_product, outer, product


class Alone:
    """The expert ranks of a policy that has one: nothing travels."""

    def exchange(
        self, x: Float[Tensor, "n hidden"], weights: Float[Tensor, "n k"], chosen: Int[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Arriving | None]:
        """Routing weights and experts (numbers of this rank's) of the tokens of all ranks, this rank's first, and the
        others' tokens on their way."""
        return weights, chosen, None

    def spread(self, x: Float[Tensor, "n hidden"]) -> Arriving | None:
        """`x` to all others; theirs arrive."""
        return None

    def bring_back(
        self, sums: Callable[[slice], Tensor], weights: Tensor | None, n: int
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Every rank's part of the other ranks' tokens goes to them; what arrives here is asked for by the returned
        function: [others, n, hidden] and, where `weights` [tokens, k] are given, [others, n, k]."""
        return lambda: (None, None)


@dataclass(frozen=True)
class Call:
    """How a layer of experts is computed. `layout(experts, weights)` gives the rows of a choice of experts; `keep_rows`
    keeps the tokens' rows and the activations for the backward pass, which else are made again: n · k · (hidden + wide)
    numbers a layer against one pass over them."""

    layout: Callable[[Int[Tensor, "n k"], Float[Tensor, "n k"]], Rows]
    recipe: Recipe
    keep_rows: bool = True
    peers: Alone = Alone()


def experts_sum(
    x: Float[Tensor, "n hidden"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    w13: Float[Tensor, "experts two_wide hidden"],
    w2: Float[Tensor, "experts hidden wide"],
    shared: tuple[Float[Tensor, "two_shared hidden"], Float[Tensor, "hidden shared"]] | None,
    residual: Float[Tensor, "n hidden"] | None,
    call: Call,
) -> Float[Tensor, "n hidden"]:
    """Σ weight · expert(x) of each token's chosen experts, plus the shared expert of weights (w13, w2) and `residual`
    where there are any. With several expert ranks a collective, its backward pass too."""
    return _ExpertsSum.apply(x, weights, chosen, w13, w2, *(shared or (None, None)), residual, call)


class _ExpertsSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, chosen, w13, w2, shared13, shared2, residual, call):
        recipe, n = call.recipe, len(x)
        all_weights, all_chosen, arriving = call.peers.exchange(x, weights, chosen)
        layout = call.layout(all_chosen, all_weights)
        rows = layout.spread(x, arriving)
        gate_up = grouped_product(rows, w13, layout.ends, recipe)
        act = layout.activation(gate_up)
        out = grouped_product(act, w2, layout.ends, recipe)
        brought = call.peers.bring_back(lambda others: layout.combine(out, others), None, n)
        shared_gate_up, added = None, []
        if shared13 is not None:
            shared_gate_up = product(x, shared13, recipe)
            added.append(product(_swiglu(shared_gate_up), shared2, recipe))
        added += [] if residual is None else [residual]
        y = layout.combine(out, slice(0, n), *added, more=brought()[0])
        others = None if arriving is None else arriving.wait()
        kept = (rows, act) if call.keep_rows else (None, None)
        fields = tuple(vars(layout).values())
        ctx.save_for_backward(
            x, others, *kept, gate_up, out if layout.weighs_result else None, shared_gate_up, w13, w2, shared13,
            shared2, *fields,
        )  # fmt: skip
        ctx.call, ctx.layout, ctx.residual = call, type(layout), residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, others, rows, act, gate_up, out, shared_gate_up, w13, w2, shared13, shared2, *fields = ctx.saved_tensors
        layout, recipe, peers, n = ctx.layout(*fields), ctx.call.recipe, ctx.call.peers, len(x)
        dy = dy.contiguous()
        arriving = peers.spread(dy)
        dx_shared, d_shared13, d_shared2 = [], None, None
        if shared13 is not None:
            d_shared, shared_act = _swiglu_backward(shared_gate_up, product(dy, shared2, recipe, turned=True))
            d_shared2, d_shared13 = outer(dy, shared_act, recipe), outer(d_shared, x, recipe)
            dx_shared = [product(d_shared, shared13, recipe, turned=True)]
            del d_shared, shared_act
        d_out, d_weights = layout.spread_gradient(dy, arriving, out)
        d_act = grouped_product(d_out, w2, layout.ends, recipe, turned=True)
        d_gate_up, act, found = layout.activation_backward(gate_up, d_act, act)
        d_weights = found if d_weights is None else d_weights
        dw2 = grouped_outer(d_out, act, layout.ends, recipe)
        del d_out, d_act, act
        d_rows = grouped_product(d_gate_up, w13, layout.ends, recipe, turned=True)
        brought = peers.bring_back(lambda others: layout.sum(d_rows, others), d_weights, n)
        # The gradients of the weights travel nowhere: one is made while the tokens' do.
        rows = layout.spread(x, None if others is None else _Arrived(others)) if rows is None else rows
        dw13 = grouped_outer(d_gate_up, rows, layout.ends, recipe)
        del rows, d_gate_up
        sums, weight_sums = brought()
        dx = layout.sum(d_rows, slice(0, n), *dx_shared, more=sums)
        d_weights = d_weights[:n] if weight_sums is None else torch.cat((d_weights[None, :n], weight_sums)).sum(0)
        return dx, d_weights, None, dw13, dw2, d_shared13, d_shared2, dy if ctx.residual else None, None


@dataclass(frozen=True)
class _Arrived:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


def _swiglu(gate_up: Float[Tensor, "n two_wide"]) -> Float[Tensor, "n wide"]:
    if has_kernels(gate_up):
        from trainer.model.kernels import triton_moe

        return triton_moe.swiglu_forward(gate_up)
    return swiglu_forward(gate_up)


def _swiglu_backward(gate_up, grad) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up`, and the forward's result again."""
    if has_kernels(gate_up):
        from trainer.model.kernels import triton_moe

        return triton_moe.swiglu_backward(gate_up, grad)[:2]
    return swiglu_backward(gate_up, grad), swiglu_forward(gate_up)
