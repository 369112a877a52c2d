"""Which transport carries the weights of a run, and both of its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rollout.transport.base import Received, Receiver, Sender, WeightUpdate
from rollout.transport.ipc import IpcReceiver, IpcSender, IpcUpdate
from rollout.transport.nccl import NcclReceiver, NcclSender, NcclUpdate, merged
from rollout.transport.payload import Payload

Kind = Literal["ipc", "nccl"]


@dataclass(frozen=True)
class Transport:
    """`ipc` between processes that share a device: each rank serves `receivers[rank]` processes, those of the engines
    on its GPU. `nccl` (gloo on CPUs) to devices of their own, here or on other hosts: every rank sends what it alone
    holds to all of them. `payload` is the form in which tensors travel."""

    kind: Kind
    receivers: tuple[int, ...]
    payload: Payload = None

    def sender(self, rank: int, device: torch.device, host: str) -> Sender:
        """The end of one of the trainer's ranks; `host` is its node's address."""
        if self.kind == "ipc":
            return IpcSender(device, self.receivers[rank], self.payload)
        return NcclSender(device, sum(self.receivers), self.payload, rank, host)

    def for_engines(self, updates: Sequence[WeightUpdate], ranks: Sequence[int]) -> list[WeightUpdate]:
        """What each engine is given of what all ranks prepared; `ranks` are those that serve them."""
        if self.kind == "ipc":
            return [updates[rank] for rank in ranks]
        return [merged(updates)] * len(ranks)


def receive(update: WeightUpdate, receivers: dict[type, Receiver]) -> Received:
    """The tensors of an update. `receivers` keeps this process's ends from sync to sync."""
    kinds: dict[type, type] = {IpcUpdate: IpcReceiver, NcclUpdate: NcclReceiver}
    receiver = receivers.setdefault(type(update), kinds[type(update)]())
    return receiver.receive(update)
