"""The process group of one sending rank and the engines, outside torch's global ones (rollout.transport.nccl)."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_POLL_S = 0.00005


class Group:
    """The sender is rank 0. Both ends raise RuntimeError where the other does not take part within `timeout_s`."""

    def __init__(self, store: Any, rank: int, size: int, backend: str, meeting: str, timeout_s: float):
        self.backend, self.meeting, self.timeout_s = backend, meeting, timeout_s
        self._store, self._rank, self._size = store, rank, size
        self._members: Any = None

    @staticmethod
    def host(engines: int, backend: str, host: str | None, timeout_s: float) -> Group:
        """The sender's end of a new group. It meets the others at a file, or at host:port."""
        size = 1 + engines
        if host is None:
            handle, meeting = tempfile.mkstemp(prefix="rlzero-weights-")
            os.close(handle)
            Path(meeting).unlink()  # the store makes it, and removes it with its last member
            store = dist.FileStore(meeting, size)
        else:
            store = dist.TCPStore(host, 0, size, True, timedelta(seconds=timeout_s), wait_for_workers=False)
            meeting = f"{host}:{store.port}"
        return Group(store, 0, size, backend, meeting, timeout_s)

    @staticmethod
    def join(meeting: str, engines: int, backend: str, timeout_s: float) -> Group | None:
        """An engine's end of the group that meets there; None where all its places are taken."""
        size = 1 + engines
        host, _, port = meeting.rpartition(":")
        if host:
            store = dist.TCPStore(host, int(port), size, False, timedelta(seconds=timeout_s))
        else:
            store = dist.FileStore(meeting, size)
        rank = store.add("engines", 1)
        return None if rank > engines else Group(store, rank, size, backend, meeting, timeout_s)

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
            timeout = timedelta(seconds=self.timeout_s)
            self._members = dist.ProcessGroupGloo(self._store, self._rank, self._size, timeout)
        return self._members

    def _absent(self, until_s: float) -> list[str]:
        """Who has not come at `until_s`; an engine only needs the sender (and is waited for by it)."""
        awaited = [f"here {rank}" for rank in range(self._size) if rank != self._rank and 0 in (rank, self._rank)]
        while awaited := [key for key in awaited if not self._store.check([key])]:
            if time.monotonic() > until_s:
                break
            time.sleep(_POLL_S)
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
            time.sleep(_POLL_S)

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
