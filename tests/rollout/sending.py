"""The trainer's end of a weight sync in tests: it sends in a thread while the other end receives in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rollout.transport.base import Receiver, Sender, WeightUpdate, layout_of


@contextmanager
def sending(sender: Sender, tensors: Iterable[tuple[str, Tensor]], version: int = 1) -> Iterator[tuple[Any, Future]]:
    """The update to receive, and what `send` comes to."""
    named = list(tensors)
    update = sender.prepare(layout_of(named), version)
    with ThreadPoolExecutor(1) as pool:
        yield update, pool.submit(sender.send, named)


def received(receiver: Receiver, update: WeightUpdate) -> dict[str, Tensor]:
    """What arrives, copied."""
    return {name: tensor.clone() for name, tensor in receiver.receive(update)}


def delivered(
    sender: Sender, tensors: Iterable[tuple[str, Tensor]], take: Callable[[WeightUpdate], Any], version: int = 1
) -> Any:
    """What `take(update)` returns while the tensors are sent; raises what it raises, else what `send` raises."""
    with sending(sender, tensors, version) as (update, sent):
        taken = take(update)
    sent.result()
    return taken
