"""The process group of one sending rank and its receivers, outside torch's global ones (rollout.transport.nccl)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MEETING_POLL_S = 0.001
_FINISH_POLL_S = 0.00005


class BroadcastGroup:
    """The sender is rank 0. It hosts the store at which the others meet it, at an address of its node, so receivers may
    be on other hosts. Both ends raise RuntimeError where the other does not take part within `timeout_s`."""

    def __init__(
        self, store: Any, rank: int, size: int, backend: str, store_address: str, own_host: str, timeout_s: float
    ):
        self.backend, self.store_address, self.timeout_s = backend, store_address, timeout_s
        self._store, self._rank, self._size, self._own_host = store, rank, size, own_host
        self._members: Any = None

    @staticmethod
    def host(receivers: int, backend: str, host: str, timeout_s: float) -> BroadcastGroup:
        """The sender's end of a new group, whose store listens at `host` alone."""
        listening = socket.create_server((host, 0))
        port, size = listening.getsockname()[1], 1 + receivers
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            host, port, size, True, limit, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        return BroadcastGroup(store, 0, size, backend, f"{host}:{port}", host, timeout_s)

    @staticmethod
    def join(store_address: str, receivers: int, backend: str, timeout_s: float) -> BroadcastGroup | None:
        """A receiver's end of the group that meets there; None where all its places are taken."""
        host, _, port = store_address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout_s) as there:
            own_host = there.getsockname()[0]  # the interface that leads to the sender
        store = dist.TCPStore(host, int(port), 1 + receivers, False, timedelta(seconds=timeout_s))
        rank = store.add("receivers", 1)
        if rank > receivers:
            return None
        return BroadcastGroup(store, rank, 1 + receivers, backend, store_address, own_host, timeout_s)

    def meet(self) -> Any:
        """Torch's group, made when the first broadcast begins and everybody has come: NCCL would wait for ever."""
        if self._members is not None:
            return self._members
        self._store.set(f"here {self._rank}", "")
        absent = self._absent(time.monotonic() + self.timeout_s)
        if absent and self._rank:
            raise RuntimeError(f"the trainer did not begin within {self.timeout_s:g} s")
        if absent:
            raise RuntimeError(f"{len(absent)} of {self._size - 1} engines did not come within {self.timeout_s:g} s")
        if self.backend == "nccl":
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast on shared hosts can take their GPUs down
            with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="2"):
                # Read here: a timeout ends the group and not the process. `finish` comes before it.
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timedelta(seconds=2 * self.timeout_s)
                self._members = dist.ProcessGroupNCCL(self._store, self._rank, self._size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=self.timeout_s)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._own_host)]
            self._members = dist.ProcessGroupGloo(self._store, self._rank, self._size, options)
        return self._members

    def _absent(self, until_s: float) -> list[str]:
        """Who has not come at `until_s`; a receiver only needs the sender (and is waited for by it)."""
        awaited = [f"here {rank}" for rank in range(self._size) if rank != self._rank and 0 in (rank, self._rank)]
        while awaited := [key for key in awaited if not self._store.check([key])]:
            if time.monotonic() > until_s:
                break
            time.sleep(_MEETING_POLL_S)
        return awaited

    def broadcast(self, buffer: Tensor) -> Any:
        """Starts to fill every member's `buffer` with the sender's."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.meet().broadcast([buffer], options)

    def finish(self, device: torch.device) -> None:
        """Waits until the GPU has done what the current stream was given, the broadcasts that it waits for included.
        (On a CPU each broadcast was waited for.) A peer that is gone would leave it waiting for ever."""
        if device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        until_s = time.monotonic() + self.timeout_s
        while not done.query():
            if time.monotonic() > until_s:
                self.abort()
                raise RuntimeError(f"a broadcast did not end within {self.timeout_s:g} s")
            time.sleep(_FINISH_POLL_S)

    def abort(self) -> None:
        """Ends this side's broadcasts, whatever they wait for."""
        members, self._members = self._members, None
        if members is not None and self.backend == "nccl":
            members.abort()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
