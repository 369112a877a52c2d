"""Mixture of experts (DeepSeek-V3 technical report, section 2.1.2): the router, the routed and the shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.model.experts import Alone, Call, experts_sum
from trainer.model.layers import SwiGLU, has_kernels
from trainer.model.rows import Rows
from trainer.model.v3_config import V3Config
from trainer.precision.recipe import Recipe

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
        self.keep_rows = True  # see `trainer.model.experts.Call`

    def forward(
        self,
        x: Float[Tensor, "n hidden"],
        weights: Float[Tensor, "n k"],
        chosen: Int[Tensor, "n k"],
        shared: SwiGLU | None = None,
        residual: Float[Tensor, "n hidden"] | None = None,
        counts: Counts | None = None,
        rows: int | None = None,
        peers: Alone | None = None,
    ) -> Float[Tensor, "n hidden"]:
        """Σ weight · expert(x) + shared(x) + residual. `chosen` are numbers of these experts, or their number for an
        expert of another rank. On a GPU, where they are known: `counts`, how the choices are spread, and `rows`, how
        many are of experts here. `peers`: see `trainer.parallel.peers`."""
        of, count = rows_of(x), len(self.w13)
        known = {"counts": counts, "rows": rows} if has_kernels(x) else {}
        call = Call(lambda chosen, weights: of(chosen, weights, count, **known), self.recipe, self.keep_rows)
        call = call if peers is None else replace(call, peers=peers)
        both = None if shared is None else (shared.w13.weight, shared.w2.weight)
        return experts_sum(x, weights, chosen, self.w13, self.w2, both, residual, call)


def rows_of(x: Tensor) -> Callable[..., Rows]:
    """What lays the rows of `x` out by expert."""
    if has_kernels(x):
        from trainer.model.kernels.gpu_moe import KernelRows

        return KernelRows.of
    return Rows.of


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
        y = self.experts(x, routing.weights, routing.experts, self.shared, residual, routing.counts)
        return y, routing


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
