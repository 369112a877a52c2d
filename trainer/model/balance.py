"""Losses and figures of how evenly a router spreads its tokens (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), and of
how well it agrees with a replayed routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.batch import Batch
from trainer.model.moe import Routing, sequence_balance

BalanceKind = Literal["none", "sequence", "batch"]


def affinity_hits(scores: Float[Tensor, "n experts"], k: int) -> Int[Tensor, " experts"]:
    """How many tokens have each expert among their k highest affinities; bias and groups left out (eq. 18)."""
    chosen = scores.detach().topk(k, dim=-1).indices.flatten()
    hits = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    return hits.index_add(0, chosen, torch.ones_like(chosen))


def batch_balance(scores: Float[Tensor, "n experts"], k: int, hits: Int[Tensor, " experts"]) -> Float[Tensor, ""]:
    """These tokens' share of the batch-wise balance loss, without its factor: eq. 17-20 with one batch in the place
    of the sequence (section 4.5.3). `hits` are `affinity_hits` of the whole batch; the shares of its parts sum to
    Σ_i f_i P_i, 1 when the load is even. f is a count and carries no gradient, P is a sum over tokens: known f, the
    parts' gradients sum to the whole's however the batch is cut."""
    f = hits.to(scores.dtype) * (scores.shape[1] / hits.sum())  # experts / (k · tokens) · hits
    normalised = scores / scores.sum(-1, keepdim=True)
    return (f * normalised.sum(0)).sum() * k / hits.sum()  # hits.sum() / k: the batch's tokens


class BalanceLoss:
    """The balance loss of one micro-batch, summed over the layers as the model hands out their routing. `hits` is
    `affinity_hits` of the whole optimizer step, one row per router; None: this micro-batch is the whole step."""

    def __init__(self, kind: BalanceKind, k: int, batch: Batch, hits: Int[Tensor, "routers experts"] | None = None):
        self._kind, self._k, self._batch, self._hits = kind, k, batch, hits
        self._terms: list[Float[Tensor, ""]] = []
        self._ids = batch.document_ids if kind == "sequence" else None

    def __call__(self, row: int, routing: Routing) -> Float[Tensor, ""]:
        if self._kind == "sequence":
            assert self._ids is not None
            documents = len(self._batch.bounds) - 1
            each = sequence_balance(routing, self._k, self._ids, documents)
            term = each.sum() / self._batch.total_sequences
        else:
            hits = affinity_hits(routing.scores, self._k) if self._hits is None else self._hits[row]
            term = batch_balance(routing.scores, self._k, hits)
        self._terms.append(term)
        return term

    @property
    def sum(self) -> Float[Tensor, ""]:
        """Over the layers: every layer with routed experts has the loss with its full factor (eq. 17)."""
        return torch.stack(self._terms).sum()

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Over the layers, without gradient: what a metric shows."""
        return self.sum.detach() / len(self._terms)


class HitCounter:
    """Counts `affinity_hits` per router over several forward passes."""

    def __init__(self, routers: int, experts: int, k: int, device: torch.device):
        self._k = k
        self.hits = torch.zeros(routers, experts, dtype=torch.int64, device=device)

    def __call__(self, row: int, routing: Routing) -> Int[Tensor, " experts"]:
        hits = affinity_hits(routing.scores, self._k)
        self.hits[row] += hits
        return hits


def router_metrics(load: Int[Tensor, "routers experts"], layers: Sequence[int]) -> dict[str, float]:
    """How uneven the load was, per layer (`layers` names the rows) and as the mean over the layers that ran.

    `router_max_violation` is how far the fullest expert is above an even share, in even shares (MaxVio, arXiv
    2408.15664, eq. 4), `router_min_load` the emptiest expert's load in even shares, `router_idle` the share of experts
    without a token: 0, 1 and 0 when all are equal. Rows without a token (a depth of prediction that did not run) are
    left out; {} if nothing ran. One wait for the GPU.
    """
    counts = load.double()
    even = counts.mean(1).clamp(min=1e-9)
    figures = torch.stack(
        [counts.sum(1), counts.amax(1) / even - 1, counts.amin(1) / even, (load == 0).double().mean(1)]
    )
    rows = [(layer, *values) for layer, (ran, *values) in zip(layers, figures.T.tolist(), strict=True) if ran]
    if not rows:
        return {}
    metrics = {}
    for column, name in enumerate(("router_max_violation", "router_min_load", "router_idle"), start=1):
        metrics[name] = sum(row[column] for row in rows) / len(rows)
        metrics |= {f"{name}/{row[0]}": row[column] for row in rows}
    return metrics


def agreement_metrics(
    agreed: Int[Tensor, " 3"] | None, k: int, device: torch.device
) -> dict[str, Float[Tensor, " 2"]]:
    """`router_agreement`, the share of (token, layer) for which the trainer's router chooses the very experts that the
    engine used, and `router_overlap`, the mean share of those experts that it chooses; each (sum, count). `agreed` is
    `Policy.take_router_agreement`; None counts nothing. No wait for the GPU."""
    tokens, equal, common = torch.zeros(3, device=device).double() if agreed is None else agreed.double()
    return {"router_agreement": torch.stack([equal, tokens]), "router_overlap": torch.stack([common, tokens * k])}
