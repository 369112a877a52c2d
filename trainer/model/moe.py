"""Mixture of experts (DeepSeek-V3 technical report, section 2.1.2): the router, the routed and the shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.model.layers import SwiGLU, has_kernels, swiglu
from trainer.model.v3_config import V3Config
from trainer.precision.recipe import Recipe, grouped_matmul

if TYPE_CHECKING:
    from trainer.model.kernels.triton_route import Counts


@dataclass
class Routing:
    """What a router decided for the tokens of one layer."""

    scores: Float[Tensor, "n experts"]  # sigmoid affinities, float32
    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]  # float32
    load: Int[Tensor, " experts"]  # tokens sent to each expert
    agreement: Int[Tensor, " 3"] | None = None  # of the router's own choice with a replayed one, see `agreement`
    # On a GPU, both for the layer's experts:
    counts: Counts | None = None
    x: Float[Tensor, "n hidden"] | None = None  # the router's input again, see `gpu_moe.route`; taken by `MoE`


class Router(nn.Module):
    """Sigmoid affinities in float32; `bias` only selects (auxiliary-loss-free balancing, eq. 16), so it is no
    parameter: `V3Model.update_router_bias` moves it. It stays float32 in a model of any dtype."""

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        before = self.bias
        super()._apply(fn, recurse)
        # A step of 1e-3 is below BF16's resolution of a bias near 1: `model.to(bfloat16)` must not round it.
        if self.bias.dtype != torch.float32:
            moved = before.is_meta == self.bias.is_meta
            self.bias = before.to(self.bias.device) if moved else self.bias.float()
        return self

    def forward(self, x: Float[Tensor, "n hidden"], replay: Int[Tensor, "n k"] | None = None) -> Routing:
        """`replay` fixes the experts of every token; a row with a -1 lets the router choose all of them."""
        c = self.config
        if has_kernels(x):
            return self._on_gpu(x, replay)
        scores, weights, experts, agreed = self._decide(x, replay)
        load = torch.bincount(experts.flatten(), minlength=c.n_routed_experts)
        return Routing(scores, experts, weights, load, agreed)

    def _decide(self, x, replay):
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        experts = select_experts(scores.detach() + self.bias, c.n_group, c.topk_group, c.num_experts_per_tok)
        agreed = None
        if replay is not None:
            agreed = agreement(experts, replay)
            experts = torch.where((replay < 0).any(-1, keepdim=True), experts, replay.to(experts.dtype))
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, weights * c.routed_scaling_factor, experts, agreed

    def _on_gpu(self, x, replay) -> Routing:
        from trainer.model.kernels import triton_route
        from trainer.model.kernels.gpu_moe import route
        from trainer.model.kernels.triton_route import Counts, can_decide

        c, agreed = self.config, None
        if can_decide(c.n_routed_experts, c.n_group):
            scores, weights, experts, counts, x = route(
                x, self.weight, self.bias, replay, c.n_group, c.topk_group, c.num_experts_per_tok, c.norm_topk_prob,
                c.routed_scaling_factor,
            )  # fmt: skip
            if replay is not None:
                agreed = triton_route.agreement(scores.detach(), self.bias, replay, c.n_group, c.topk_group)
        else:  # groups that are no power of two, which no published model has: fifteen operations instead of two
            scores, weights, experts, agreed = self._decide(x, replay)
            counts = Counts.of(experts, c.n_routed_experts)
        return Routing(scores, experts, weights, counts.load, agreed, counts, x)


def select_experts(biased: Float[Tensor, "n experts"], n_group: int, topk_group: int, k: int) -> Int[Tensor, "n k"]:
    """The k best experts within the `topk_group` best groups; a group's score is the sum of its two best experts.

    Experts outside those groups are out of the question (-inf), as in DeepSeek's inference code and transformers 5.19.
    Older transformers and DeepSeek's remote code set them to 0 instead, and so take an expert of a dropped group where
    the bias makes fewer than k kept ones positive.
    """
    if n_group > 1:
        grouped = biased.unflatten(1, (n_group, -1))  # [n, groups, experts of a group]
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        biased = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    return biased.topk(k, dim=-1).indices


def agreement(own: Int[Tensor, "n k"], replay: Int[Tensor, "n k"]) -> Int[Tensor, " 3"]:
    """How well a router's own choice agrees with the one to be replayed, over the tokens whose replayed row has no -1:
    their number, for how many both are the same set, and how many experts the two have in common, summed."""
    known = (replay >= 0).all(-1)
    common = (own[:, :, None] == replay[:, None, :]).any(-1).sum(-1).where(known, 0)
    return torch.stack([known.sum(), (known & (common == own.shape[1])).sum(), common.sum()])


class Experts(nn.Module):
    """All routed experts' SwiGLUs, stacked. Tokens are sorted by expert once, so each product is one grouped one."""

    def __init__(self, config: V3Config, recipe: Recipe) -> None:
        super().__init__()
        experts, hidden, wide = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(experts, 2 * wide, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, wide))
        self.recipe: Recipe = recipe
        self.keep_rows = True  # on a GPU: what `gpu_moe.experts` keeps for the backward pass

    def forward(
        self,
        x: Float[Tensor, "n hidden"],
        routing: Routing,
        shared: SwiGLU | None = None,
        residual: Float[Tensor, "n hidden"] | None = None,
    ) -> Float[Tensor, "n hidden"]:
        """Σ weight · expert(x) + shared(x) + residual."""
        if has_kernels(x):
            return self._on_gpu(x, routing, shared, residual)
        y = self._routed(x, routing)
        y = y if shared is None else y + shared(x)
        return y if residual is None else residual + y

    def _on_gpu(self, x, routing: Routing, shared, residual) -> Float[Tensor, "n hidden"]:
        from trainer.model.kernels import gpu_moe

        if self.recipe == "bf16" and x.dtype == self.w13.dtype == torch.bfloat16:
            weights = None if shared is None else (shared.w13.weight, shared.w2.weight)
            return gpu_moe.experts(
                x, routing.weights, routing.experts, routing.counts, self.w13, self.w2, weights, residual,
                self.keep_rows,
            )  # fmt: skip
        y = gpu_moe.experts_by_recipe(
            x, routing.weights, routing.experts, routing.counts, self.w13, self.w2, self.recipe
        )
        y = y if shared is None else y + shared(x)
        return y if residual is None else residual + y

    def _routed(self, x: Float[Tensor, "n hidden"], routing: Routing) -> Float[Tensor, "n hidden"]:
        k = routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)  # rows by expert; row r is choice r % k of token r // k
        offsets = routing.load.cumsum(0).to(torch.int32)
        rows = _Dispatch.apply(x, order, k)
        rows = swiglu(grouped_matmul(rows, self.w13, offsets, self.recipe))
        rows = grouped_matmul(rows, self.w2, offsets, self.recipe)
        return _Combine.apply(rows, routing.weights.to(x.dtype), order)


class _Dispatch(torch.autograd.Function):
    """Copies every token once per chosen expert, in the order of the experts. Gathers both ways: no atomic adds, the
    same sums in every run."""

    @staticmethod
    def forward(ctx, x, order, k):
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        place = _inverse(order).view(-1, ctx.k)
        total = grad.index_select(0, place[:, 0])
        for choice in place.unbind(1)[1:]:
            total += grad.index_select(0, choice)
        return total, None, None


class _Combine(torch.autograd.Function):
    """Every token's sum of weight · row over its chosen experts; rows are in the order of the experts."""

    @staticmethod
    def forward(ctx, rows, weights, order):
        ctx.save_for_backward(rows, weights, order)
        place = _inverse(order).view_as(weights)
        total = rows.index_select(0, place[:, 0]).mul_(weights[:, :1])
        for j in range(1, weights.shape[1]):
            total.addcmul_(rows.index_select(0, place[:, j]), weights[:, j : j + 1])
        return total

    @staticmethod
    def backward(ctx, grad):
        rows, weights, order = ctx.saved_tensors
        d_rows = grad.index_select(0, order // weights.shape[1])
        d_weights = torch.empty_like(weights).view(-1)
        d_weights[order] = (rows * d_rows).sum(-1)
        d_rows *= weights.reshape(-1)[order, None]
        return d_rows, d_weights.view_as(weights), None


def _inverse(order: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class MoE(nn.Module):
    """shared(x) + Σ weight · expert(x), eq. 12."""

    def __init__(self, config: V3Config, recipe: Recipe) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, recipe)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared = SwiGLU(config.hidden_size, shared, recipe) if shared else None
        self.exchange = None  # trainer.parallel.experts: where the experts live on several ranks

    def forward(
        self,
        x: Float[Tensor, "n hidden"],
        replay: Int[Tensor, "n k"] | None = None,
        residual: Float[Tensor, "n hidden"] | None = None,
    ) -> tuple[Float[Tensor, "n hidden"], Routing]:
        """The layer's output, plus `residual` where it is given."""
        routing = self.router(x, replay)
        x, routing.x = x if routing.x is None else routing.x, None  # a routing outlives the layer
        if self.exchange is not None:
            return self.exchange(self, x, routing, residual), routing
        return self.experts(x, routing, self.shared, residual), routing


def sequence_balance(
    routing: Routing, k: int, document_ids: Int[Tensor, " n"], documents: int
) -> Float[Tensor, " documents"]:
    """The sequence-wise balance loss of every document, without its factor α (eq. 17-20): Σ_i f_i P_i with f_i the
    share of tokens that have expert i among their k highest affinities (bias and groups left out, as in eq. 18)
    times experts / k, and P_i the mean normalised affinity. 1 when the load is even."""
    scores = routing.scores
    experts = scores.shape[1]
    probs = scores / scores.sum(-1, keepdim=True)
    hits = torch.zeros_like(scores).scatter_(1, scores.detach().topk(k, dim=-1).indices, 1.0)

    def mean_per_document(values: Float[Tensor, "n experts"]) -> Float[Tensor, "documents experts"]:
        total = values.new_zeros(documents, experts).index_add(0, document_ids, values)
        lengths = values.new_zeros(documents).index_add(0, document_ids, values.new_ones(len(values)))  # no wait here
        return total / lengths[:, None]

    return (mean_per_document(hits) * (experts / k) * mean_per_document(probs)).sum(-1)
