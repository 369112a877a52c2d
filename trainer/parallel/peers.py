"""The expert ranks of a small group: every rank sees the tokens of all, and no size ever reaches the host.

A token of DeepSeek-V3's router goes to several groups of experts, on two ranks nearly always to both. So all tokens
travel, in messages whose sizes are known before the layer runs; which rows an expert has is known on the device alone,
in buffers for as many rows as there can be. What travels back are a rank's sums, in one message for each other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from trainer.model.experts import Alone


@dataclass(frozen=True)
class _Arriving:
    """What is issued after `wait` waits for the message, on a GPU the stream, not the host."""

    message: list[dist.Work]
    tensor: Tensor

    def wait(self) -> Tensor:
        while self.message:  # once: gloo hangs where a message is waited for again
            self.message.pop(0).wait()
        return self.tensor


@dataclass(frozen=True)
class Peers(Alone):
    """The ranks of a group and how many tokens each has in this micro-batch. Tokens are counted with this rank's
    first, then those of the others in the order of the ranks. `local` gives every expert's number on this rank, the
    number of experts here for those of other ranks."""

    group: dist.ProcessGroup
    tokens: tuple[int, ...]
    local: Int[Tensor, " experts"]

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(len(self.tokens)) if rank != self.group.rank()]

    @property
    def mine(self) -> int:
        return self.tokens[self.group.rank()]

    def exchange(
        self, x: Float[Tensor, "n hidden"], weights: Float[Tensor, "n k"], chosen: Int[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "all k"], Int[Tensor, "all k"], _Arriving]:
        """See `Alone.exchange`."""
        k = chosen.shape[1]
        routed = torch.cat((weights.float().view(torch.int32), chosen.int()), dim=1)  # [n, 2k]
        theirs, arriving = self.spread(routed), self.spread(x)
        routed = torch.cat((routed, theirs.wait()))
        return routed[:, :k].contiguous().view(torch.float32), self.local[routed[:, k:]], arriving

    def spread(self, x: Tensor) -> _Arriving:
        """See `Alone.spread`; a row for each token."""
        arriving = x.new_empty(sum(self.tokens) - self.mine, *x.shape[1:])
        parts = arriving.split([self.tokens[rank] for rank in self.others])
        return _Arriving(self._trade([[x] * len(parts)], [parts]), arriving)

    def bring_back(
        self, sums: Callable[[slice], Tensor], weights: Float[Tensor, "all k"] | None, n: int
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """See `Alone.bring_back`."""
        arrays = [sums(slice(n, None)), *([] if weights is None else [weights[n:]])]
        sizes = [self.tokens[rank] for rank in self.others]
        arriving = [array.new_empty(len(sizes), n, *array.shape[1:]) for array in arrays]
        message = self._trade([array.split(sizes) for array in arrays], [a.unbind(0) for a in arriving])

        def arrived() -> tuple[Tensor, Tensor | None]:
            for work in message:
                work.wait()
            return arriving[0], None if weights is None else arriving[1]

        return arrived

    def _trade(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> list[dist.Work]:
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
