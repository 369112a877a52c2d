"""Rows by expert: the tokens' choices, sorted by the expert that they go to, as plain torch operations.

`trainer.model.kernels.gpu_moe` has the same passes as kernels for a GPU. Both take a token's row to its experts and
back by index, never by atomic additions: the same sums in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Arriving(Protocol):
    """A tensor of other ranks on its way here."""

    def wait(self) -> Tensor: ...


@dataclass(frozen=True)
class Rows:
    """Choice j of token t is row place[t, j]; an expert's rows keep the order of the tokens. Choices of experts that
    other ranks hold have no row here; their `place` is the number of rows. Here the routing weight is multiplied in
    where rows are summed (`combine`), so a backward pass needs the second product's result."""

    place: Int[Tensor, "n k"]
    ends: Int[Tensor, " experts"]  # int32, where the rows of each expert end
    weights: Float[Tensor, "n k"]  # float32
    source: Int[Tensor, " rows"]  # the choice, k · token + j, that every row is of
    weighs_result = True  # the routing weight meets the second product's result, else the activation

    @classmethod
    def of(cls, experts: Int[Tensor, "n k"], weights: Float[Tensor, "n k"], count: int) -> Rows:
        """`experts` are numbers of the `count` experts here, and `count` for those of other ranks."""
        keys = experts.flatten().long()
        load = torch.bincount(keys, minlength=count + 1)[:count]
        source = keys.argsort(stable=True)
        place = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device))
        ends = load.cumsum(0)
        rows = int(ends[-1])
        return cls(place.clamp_(max=rows).view_as(experts), ends.int(), weights, source[:rows])

    def spread(self, x: Float[Tensor, "own size"], arriving: Arriving | None = None) -> Float[Tensor, "rows size"]:
        """The rows of all tokens, this rank's `x` and behind them those that arrive."""
        x = x if arriving is None else torch.cat((x, arriving.wait()))
        return x.index_select(0, self.source // self.place.shape[1])

    def sum(
        self,
        rows: Float[Tensor, "rows size"],
        tokens: slice,
        *added: Float[Tensor, "n size"],
        more: Float[Tensor, "arrays n size"] | None = None,
    ) -> Float[Tensor, "n size"]:
        """Each of the `tokens`' sum of its rows, of up to two arrays besides, and of each of `more`."""
        rows, place = self._reachable(rows), self.place[tokens]
        total = rows.index_select(0, place[:, 0])
        for row in place.unbind(1)[1:]:
            total += rows.index_select(0, row)
        return _plus(total, added, more)

    def combine(
        self,
        out: Float[Tensor, "rows size"],
        tokens: slice,
        *added: Float[Tensor, "n size"],
        more: Float[Tensor, "arrays n size"] | None = None,
    ) -> Float[Tensor, "n size"]:
        """As `sum`, each row times its routing weight."""
        rows, place, weights = self._reachable(out), self.place[tokens], self.weights[tokens].to(out.dtype)
        total = rows.index_select(0, place[:, 0]).mul_(weights[:, :1])
        for j in range(1, weights.shape[1]):
            total.addcmul_(rows.index_select(0, place[:, j]), weights[:, j : j + 1])
        return _plus(total, added, more)

    def spread_gradient(
        self, dy: Float[Tensor, "own size"], arriving: Arriving | None, out: Float[Tensor, "rows size"] | None
    ) -> tuple[Float[Tensor, "rows size"], Float[Tensor, "n k"] | None]:
        """The gradients of `combine`: of the rows `out`, and of the routing weights (None where the activation's
        gradient gives them)."""
        assert out is not None, "the gradient of the weights needs the second product's result"
        d_out = self.spread(dy, arriving)
        d_weights = torch.zeros_like(self.weights)
        d_weights.view(-1)[self.source] = (out * d_out).sum(-1).to(d_weights.dtype)
        d_out *= self.weights.reshape(-1)[self.source, None].to(d_out.dtype)
        return d_out, d_weights

    def activation(self, gate_up: Float[Tensor, "rows two_wide"]) -> Float[Tensor, "rows wide"]:
        """silu(gate) · up of [gate, up]."""
        return swiglu_forward(gate_up)

    def activation_backward(
        self,
        gate_up: Float[Tensor, "rows two_wide"],
        grad: Float[Tensor, "rows wide"],
        act: Float[Tensor, "rows wide"] | None,
    ) -> tuple[Float[Tensor, "rows two_wide"], Float[Tensor, "rows wide"], Float[Tensor, "n k"] | None]:
        """The gradient of `gate_up`; `act` as `activation` made it, again where it was not kept; and the gradient of
        the routing weights (None: see `spread_gradient`)."""
        return swiglu_backward(gate_up, grad), swiglu_forward(gate_up) if act is None else act, None

    def _reachable(self, rows: Tensor) -> Tensor:
        """With a row of zeros behind the last where choices have no row here."""
        return rows if len(rows) == self.place.numel() else F.pad(rows, (0, 0, 0, 1))


def _plus(total: Tensor, added: tuple[Tensor, ...], more: Tensor | None) -> Tensor:
    for term in (*added, *(() if more is None else more)):
        total += term
    return total


def swiglu_forward(gate_up: Float[Tensor, "n two_wide"]) -> Float[Tensor, "n wide"]:
    """silu(gate) · up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: Float[Tensor, "n two_wide"], grad: Float[Tensor, "n wide"]) -> Float[Tensor, "n two_wide"]:
    """The gradient of `gate_up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    d_gate, d_up = result.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=d_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
    return result
