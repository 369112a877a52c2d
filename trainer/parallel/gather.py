"""Routed experts on a few ranks: every rank sees the tokens of all, and no size ever reaches the host.

A token of DeepSeek-V3's router goes to several groups of experts, on two ranks nearly always to both. So all tokens
travel, in messages whose sizes are known before the layer runs; which rows an expert has is known on the device alone,
in buffers for as many rows as there can be. What travels back are a rank's sums, in one message for each other rank.

The order of work puts something independent beside every message: this rank's own tokens and the shared expert beside
those of the forward pass, the shared expert's and the weights' gradients beside those of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.layers import has_kernels
from trainer.parallel.slots import Slots

Message = list[dist.Work]


@dataclass(frozen=True)
class Peers:
    """The ranks of a group and how many tokens each has in this micro-batch. Tokens are counted with this rank's
    first, then those of the others in the order of the ranks."""

    group: dist.ProcessGroup
    tokens: tuple[int, ...]

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(len(self.tokens)) if rank != self.group.rank()]

    @property
    def mine(self) -> int:
        return self.tokens[self.group.rank()]

    @property
    def theirs(self) -> int:
        return sum(self.tokens) - self.mine

    def spread(self, x: Tensor) -> tuple[Message, Tensor]:
        """`x`, a row for each token, to all others; theirs are in the result when the message has arrived."""
        arriving = x.new_empty(self.theirs, *x.shape[1:])
        parts = arriving.split([self.tokens[rank] for rank in self.others])
        return self._trade([[x] * len(parts)], [parts]), arriving

    def bring_back(self, *arrays: Tensor) -> tuple[Message, list[Tensor]]:
        """A row of each array for each of the others' tokens: every rank's go to it, and of this rank's tokens a row
        from each other rank arrives, [others, tokens, ...]."""
        sizes = [self.tokens[rank] for rank in self.others]
        arriving = [array.new_empty(len(sizes), self.mine, *array.shape[1:]) for array in arrays]
        return self._trade([array.split(sizes) for array in arrays], [a.unbind(0) for a in arriving]), arriving

    def _trade(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> Message:
        """One message to and from every other rank of a part of each array; parts of no element are left out, on both
        sides."""
        operations = []
        for outgoing, incoming in zip(sent, received, strict=True):
            for rank, out, into in zip(self.others, outgoing, incoming, strict=True):
                peer = dist.get_global_rank(self.group, rank)
                if out.numel():
                    operations.append(dist.P2POp(dist.isend, out.contiguous(), peer, self.group))
                if into.numel():
                    operations.append(dist.P2POp(dist.irecv, into, peer, self.group))
        return dist.batch_isend_irecv(operations) if operations else []


def _arrived(message: Message) -> None:
    """What is issued next waits for it, on a GPU the stream, not the host."""
    for work in message:
        work.wait()


def gathered_experts(
    x: Float[Tensor, "n hidden"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    w13: Float[Tensor, "mine two_wide hidden"],
    w2: Float[Tensor, "mine hidden wide"],
    shared: tuple[Float[Tensor, "two_shared hidden"], Float[Tensor, "hidden shared"]] | None,
    residual: Float[Tensor, "n hidden"] | None,
    local: Int[Tensor, " experts"],
    peers: Peers,
) -> Float[Tensor, "n hidden"]:
    """Σ weight · expert(x), plus the shared expert of weights (w13, w2) and `residual` where there are any; of this
    rank's tokens, while the others' pass through its experts. `local` gives every expert's number on this rank, the
    number of experts here for those of other ranks. A collective, its backward pass too.

    Kept for the backward pass: the tokens of all ranks and the first products' results, in buffers for all choices of
    all ranks."""
    return _GatheredExperts.apply(x, weights, chosen, w13, w2, *(shared or (None, None)), residual, local, peers)


class _GatheredExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, chosen, w13, w2, shared13, shared2, residual, local, peers):
        n, k = chosen.shape
        routed = torch.cat((weights.float().view(torch.int32), chosen.int()), dim=1)  # [n, 2k]
        message, routed_others = peers.spread(routed)
        rows_message, x_others = peers.spread(x)
        _arrived(message)
        routed = torch.cat((routed, routed_others))
        slots = Slots.of(local[routed[:, k:]], routed[:, :k].view(torch.float32), len(w13))
        own, others = slots.place[:n], slots.place[n:]
        rows = slots.rows_of(x, own)
        _arrived(rows_message)
        slots.rows_of(x_others, others, rows)
        gate_up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=slots.ends)
        del rows
        out = torch._grouped_mm(slots.swiglu(gate_up), w2.transpose(1, 2), offs=slots.ends)
        message, (sums,) = peers.bring_back(slots.sums_of(out, others))
        added, shared_gate_up = [] if residual is None else [residual], None
        if shared13 is not None:
            shared_gate_up = F.linear(x, shared13)
            added.append(F.linear(_swiglu(shared_gate_up), shared2))
        _arrived(message)
        ctx.save_for_backward(
            x, x_others, gate_up, shared_gate_up, w13, w2, shared13, shared2, slots.place, slots.ends, slots.weights
        )
        ctx.residual, ctx.peers = residual is not None, peers
        return slots.sums_of(out, own, *added, more=sums)

    @staticmethod
    def backward(ctx, dy):
        x, x_others, gate_up, shared_gate_up, w13, w2, shared13, shared2, place, ends, row_weights = ctx.saved_tensors
        peers, n, slots = ctx.peers, len(x), Slots(place, ends, row_weights)
        own, others = place[:n], place[n:]
        dy = dy.contiguous()
        message, dy_others = peers.spread(dy)
        d_out = slots.rows_of(dy, own)
        dx_shared, d_shared13, d_shared2 = [], None, None
        if shared13 is not None:
            d_shared, shared_act, _ = _swiglu_backward(shared_gate_up, dy @ shared2)
            dx_shared = [d_shared @ shared13]
        _arrived(message)
        slots.rows_of(dy_others, others, d_out)
        del dy_others
        d_act = torch._grouped_mm(d_out, w2, offs=ends)
        d_gate_up, act, d_row_weights = slots.swiglu_backward(gate_up, d_act)
        del d_act
        d_rows = torch._grouped_mm(d_gate_up, w13, offs=ends)
        d_weights = d_row_weights.index_select(0, place.flatten()).view_as(place)
        message, (sums, weight_sums) = peers.bring_back(slots.sums_of(d_rows, others), d_weights[n:])
        # The gradients of the weights travel nowhere: they are made while the tokens' do.
        rows = slots.rows_of(x, own)
        slots.rows_of(x_others, others, rows)
        dw13 = torch._grouped_mm(d_gate_up.T, rows, offs=ends)
        del rows, d_gate_up
        dw2 = torch._grouped_mm(d_out.T, act, offs=ends)
        del d_out, act
        if shared13 is not None:
            d_shared2 = dy.T @ shared_act
            d_shared13 = d_shared.T @ x
        _arrived(message)
        dx = slots.sums_of(d_rows, own, *dx_shared, more=sums)
        d_weights = torch.cat((d_weights[None, :n], weight_sums)).sum(0)
        return dx, d_weights, None, dw13, dw2, d_shared13, d_shared2, dy if ctx.residual else None, None, None


def _swiglu(gate_up: Float[Tensor, "n two_wide"]) -> Float[Tensor, "n wide"]:
    if has_kernels(gate_up):
        from trainer.model.kernels.triton_moe import swiglu_forward

        return swiglu_forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(gate_up, grad) -> tuple[Tensor, Tensor, None]:
    """The gradient of `gate_up`, and the forward's result again."""
    if has_kernels(gate_up):
        from trainer.model.kernels.triton_moe import swiglu_backward

        return swiglu_backward(gate_up, grad)
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((d_gate, F.silu(gate) * grad), dim=-1), F.silu(gate) * up, None
