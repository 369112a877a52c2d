"""The rows of one rank's experts, in buffers for as many as there can be: on a GPU nobody asks how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.layers import has_kernels


@dataclass(frozen=True)
class Slots:
    """Rows by expert of the tokens' choices on one rank, in buffers that could hold all of them; how many there are is
    known on the device alone. Choice j of token t is row place[t, j] if that is before ends[-1], else the expert is on
    another rank."""

    place: Int[Tensor, "tokens k"]  # int32
    ends: Int[Tensor, " experts"]  # int32, where the rows of each of this rank's experts end
    weights: Float[Tensor, " slots"]  # float32, of every row

    @classmethod
    def of(cls, experts: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"], count: int) -> Slots:
        """`experts` are numbers of this rank's `count` experts, and `count` for all others."""
        experts, weights = experts.contiguous(), weights.contiguous()
        if has_kernels(weights):
            from trainer.model.kernels.triton_route import Counts, Order

            order = Order.of(experts, weights, Counts.of(experts, count + 1))
            return cls(order.place, order.ends[:count], order.row_weights)
        keys = experts.flatten().long()
        order = keys.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        ends = torch.bincount(keys, minlength=count + 1)[:count].cumsum(0).int()
        return cls(place.view_as(experts).int(), ends, weights.flatten()[order])

    @property
    def end(self) -> Int[Tensor, ""]:
        return self.ends[-1]

    def rows_of(
        self,
        x: Float[Tensor, "n hidden"],
        place: Int[Tensor, "n k"],
        rows: Float[Tensor, "capacity hidden"] | None = None,
    ) -> Float[Tensor, "capacity hidden"]:
        """The rows of tokens `x`, of which `place` is the part of self.place; into `rows` where they are given. What
        else is in them is undefined."""
        if rows is None:
            tokens, k = self.place.shape
            rows = x.new_empty(tokens * min(k, len(self.ends)), x.shape[1])
        if has_kernels(x):
            from trainer.model.kernels.triton_moe import scatter_rows

            return scatter_rows(x, place, rows, self.end)
        token, choice = (place < self.end).nonzero(as_tuple=True)
        rows[place[token, choice].long()] = x[token]
        return rows

    def sums_of(
        self,
        rows: Float[Tensor, "capacity hidden"],
        place: Int[Tensor, "n k"],
        *added: Float[Tensor, "n hidden"],
        more: Float[Tensor, "arrays n hidden"] | None = None,
    ) -> Float[Tensor, "n hidden"]:
        """Each token's sum of its rows, of up to two arrays besides and of each of `more`, in float32."""
        if has_kernels(rows):
            from trainer.model.kernels.triton_moe import gather_sum

            return gather_sum(rows, place, *added, more=more, end=self.end)
        total = torch.zeros(len(place), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
        for row in place.unbind(1):
            here = row < self.end
            total[here] += rows[row[here].long()].to(total.dtype)
        for term in (*added, *(() if more is None else more)):
            total += term
        return total.to(rows.dtype)

    def swiglu(self, gate_up: Float[Tensor, "capacity two_wide"]) -> Float[Tensor, "capacity wide"]:
        """weight · silu(gate) · up of every row."""
        if has_kernels(gate_up):
            from trainer.model.kernels.triton_moe import swiglu_forward

            return swiglu_forward(gate_up, self.weights[: len(gate_up)], self.end)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(self.weights[: len(gate_up), None])

    def swiglu_backward(
        self, gate_up: Float[Tensor, "capacity two_wide"], grad: Float[Tensor, "capacity wide"]
    ) -> tuple[Float[Tensor, "capacity two_wide"], Float[Tensor, "capacity wide"], Float[Tensor, " slots"]]:
        """The gradient of `gate_up`, the forward's result again, and the gradient of all weights, 0 for rows of other
        ranks."""
        d_weights = torch.zeros_like(self.weights)
        if has_kernels(gate_up):
            from trainer.model.kernels.triton_moe import swiglu_backward

            return swiglu_backward(gate_up, grad, self.weights, end=self.end)
        weights = self.weights[: len(gate_up), None]
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        d_weights[: self.end] = (grad * silu * up).sum(1)[: self.end].to(d_weights.dtype)
        d_gate = torch.ops.aten.silu_backward(grad * weights * up, gate)
        d_gate_up = torch.cat((d_gate, grad * weights * silu), dim=1)
        return d_gate_up.to(grad.dtype), (silu * up * weights).to(grad.dtype), d_weights
