"""Routed experts on several ranks: every token travels once to each rank that holds an expert of its choice.

A token with six experts on two ranks is sent twice, not six times; its weights travel with it, and what comes back is
each rank's sum (DeepSeek-V3, arXiv 2412.19437, section 3.2.2, dispatches this way between nodes). The host
waits once a layer, for the split sizes; the shared expert runs meanwhile, and while tokens travel. On two ranks, which
nearly every token needs both, all tokens travel instead, and the host waits for nothing (trainer.parallel.peers).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trainer.model.moe import Experts, MoE, Routing
from trainer.parallel.peers import Peers
from trainer.parallel.rows import spread_rows, sum_rows

# Up to so many expert ranks see the tokens of all. Their buffers are that many times as large as the tokens that an
# expert rank has on average need, and a token of six experts goes to fewer ranks the more there are.
GATHER_RANKS = 2


class LocalExperts(Experts):
    """The experts of one rank, `experts // ranks` neighbours of all, for rows that came from all ranks of the group."""

    def __init__(self, whole: Experts, rank: int, ranks: int) -> None:
        nn.Module.__init__(self)
        count = len(whole.w13) // ranks
        mine = slice(rank * count, (rank + 1) * count)
        # clone: a slice would keep the whole alive
        self.w13 = nn.Parameter(whole.w13.detach()[mine].clone(), requires_grad=whole.w13.requires_grad)
        self.w2 = nn.Parameter(whole.w2.detach()[mine].clone(), requires_grad=whole.w2.requires_grad)
        self.recipe, self.keep_rows = whole.recipe, False


@dataclass(frozen=True)
class Sizes:
    """Rows and slots (row, expert) that this rank sends to and receives from every rank of the group."""

    sent: list[int]
    received: list[int]
    slots: int  # received

    @property
    def rows_sent(self) -> int:
        return sum(self.sent)

    @property
    def rows_received(self) -> int:
        return sum(self.received)


class ExpertExchange:
    """Takes the place of `MoE.forward` behind the router, on every rank of `group` at once: collectives. The ranks
    may have different numbers of tokens, none included for an expert or a rank."""

    def __init__(self, group: dist.ProcessGroup, experts: int, device: torch.device) -> None:
        self.group, self.ranks = group, group.size()
        self.peers: Peers | None = None
        if experts % self.ranks:
            raise ValueError(f"{experts} experts do not divide among {self.ranks} ranks: choose ep that divides them")
        self.per_rank = experts // self.ranks
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        first = group.rank() * self.per_rank
        local = torch.full((experts,), self.per_rank, dtype=torch.int32)
        local[first : first + self.per_rank] = torch.arange(self.per_rank, dtype=torch.int32)
        self.local = local.to(device) if device.type != "meta" else local

    def begin(self, tokens: int) -> None:
        """Before every forward pass of the model: the ranks tell each other how many tokens they have, host to host."""
        if self.ranks > GATHER_RANKS:
            return
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(counts, torch.tensor([tokens]), group=self.group)
        self.peers = Peers(self.group, tuple(int(count) for count in counts), self.local)

    def __call__(
        self,
        moe: MoE,
        x: Float[Tensor, "n hidden"],
        routing: Routing,
        residual: Float[Tensor, "n hidden"] | None = None,
    ) -> Float[Tensor, "n hidden"]:
        """Σ weight · expert(x) + shared(x) + residual."""
        if self.ranks > GATHER_RANKS:
            return self._sent(moe, x, routing, residual)
        assert self.peers is not None, "begin() was not called before this forward pass"
        if len(x) != self.peers.mine:
            raise RuntimeError(f"{len(x)} tokens in a layer, the ranks were told {self.peers.mine}: see begin()")
        return moe.experts(x, routing.weights, routing.experts, moe.shared, residual, peers=self.peers)

    def _sent(self, moe: MoE, x, routing: Routing, residual) -> Float[Tensor, "n hidden"]:
        with self._beside():
            chosen = self._chosen(routing.experts)
            counts = self._exchange_counts(chosen)
        shared = moe.shared(x) if moe.shared is not None else None
        with self._beside(wait=False):
            sizes = counts.read()
            source, place = self._layout(chosen > 0, sizes.rows_sent)
            tokens, owners = source % len(x), source // len(x)
            experts = routing.experts.index_select(0, tokens) - owners[:, None] * self.per_rank
            experts = torch.where((experts < 0) | (experts >= self.per_rank), self.per_rank, experts)
            rows = spread_rows(x, tokens, place)
            weights = routing.weights.index_select(0, tokens)
            splits = (sizes.sent, sizes.received)
            rows, weights = _AllToAll.apply(*splits, self.group, rows, weights)
            experts = _all_to_all(experts, *splits, self.group)
        self._join(rows, weights, experts, tokens, place)
        rows = moe.experts(rows, weights, experts, rows=sizes.slots)
        (rows,) = _AllToAll.apply(sizes.received, sizes.sent, self.group, rows)
        return sum_rows(rows, tokens, place, *(term for term in (shared, residual) if term is not None))

    def _chosen(self, experts: Int[Tensor, "n k"]) -> Int[Tensor, "n ranks"]:
        """How many of a token's experts every rank holds."""
        counts = torch.zeros(len(experts), self.ranks, dtype=torch.int32, device=experts.device)
        owners = experts // self.per_rank
        return counts.scatter_add_(1, owners, torch.ones_like(owners, dtype=torch.int32))

    def _exchange_counts(self, chosen: Int[Tensor, "n ranks"]) -> _Counts:
        mine = torch.stack([(chosen > 0).sum(0), chosen.sum(0)], dim=1)  # [ranks, (rows, slots)]
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.group)
        return _Counts(torch.stack([mine, theirs]))

    def _layout(
        self, goes: Bool[Tensor, "n ranks"], rows: int
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, "n ranks"]]:
        """The source of every row sent, rank · n + token, in that order; and the row of every token and rank, `rows`
        where none goes there."""
        flat = goes.T.reshape(-1)
        place = flat.cumsum(0, dtype=torch.int32) - 1
        source = torch.empty(rows + 1, dtype=torch.int64, device=flat.device)  # the last entry takes what goes nowhere
        where = torch.where(flat, place, rows).long()
        source.scatter_(0, where, torch.arange(len(flat), device=flat.device))
        return source[:rows], where.int().view(self.ranks, -1).T.contiguous()

    @contextlib.contextmanager
    def _beside(self, wait: bool = True):
        """Work on the exchange's own stream; the model's goes on meanwhile."""
        if self.stream is None:
            yield
            return
        if wait:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def _join(self, *tensors: Tensor) -> None:
        """The model's stream waits for the exchange's, whose tensors it goes on with."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)


class _Counts:
    """Counts on their way to the host; `read` waits for them alone."""

    def __init__(self, counts: Int[Tensor, "2 ranks 2"]) -> None:
        self.event = None
        if counts.is_cuda:
            self.host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self.host.copy_(counts, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = counts

    def read(self) -> Sizes:
        if self.event is not None:
            self.event.synchronize()
        mine, theirs = self.host.tolist()
        return Sizes([r for r, _ in mine], [r for r, _ in theirs], sum(s for _, s in theirs))


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, `sent[r]` of them to rank r; the gradients take the way back, together and all of
    them on every rank, zeros where a rank's loss does not depend on one: nobody waits for a gradient that does not
    come."""

    @staticmethod
    def forward(ctx, sent, received, group, *tensors):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return tuple(_all_to_all(x, sent, received, group) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *(_all_to_all(grad, ctx.received, ctx.sent, ctx.group) for grad in grads)
