"""How updates reach vLLM's workers where they are processes of their own (tensor, expert or pipeline parallel).

Weights arrive once, in the engine's process. It passes them on bucket by bucket through memory that the workers map
(rollout.transport.ipc): two buffers on the GPU where they arrive, which a worker on another GPU reads by peer access,
or in shared memory where they arrive on the host. The workers install meanwhile, each what it holds. A thread waits
for their answers, so that the sending ends when they do, whatever happened to them.

Before its first use a way is tried with one small tensor. Where buffers on the GPU cannot be mapped, shared memory
carries the weights; where that fails too, or where nobody says beforehand what will arrive, a folder of safetensors in
shared memory does, which is slow. The log says so.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, Layout, Manifest, layout_of
from rollout.transport.disk import DiskTransport
from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.ipc import IpcTransport
from rollout.transport.ipc_server import NotReached, Published
from rollout.vllm.install import Installed, reload
from rollout.vllm.parts import InstalledParts, PartsInstaller

log = logging.getLogger(__name__)

RELAY_BYTES = 128 << 20  # of each of the two buffers, beside a worker's own memory
TIMEOUT_S = 120.0  # how long the engine's process waits for a worker, as the trainer for the engine
ENDING_S = 600.0  # how long workers may take behind the last bucket

Answers = Callable[..., list]  # vLLM's collective_rpc: what a function returned in each worker


def announced(weights: Iterable, expected: ExpectedWeights) -> Layout | None:
    """Names, shapes and dtypes of what will be installed; None where nobody knows before it arrives."""
    manifest: Manifest | None = getattr(weights, "manifest", None)
    if manifest is not None:
        layout = [(entry.name, entry.shape, getattr(torch, entry.dtype)) for entry in manifest.entries]
    elif isinstance(weights, Collection):
        layout = layout_of(weights)
    else:
        return None
    return [line for line in layout if not (expected.tied and line[0] == "lm_head.weight")]


# ---- in the workers ----


@dataclass(frozen=True)
class Answer:
    """What became of an update in one worker. Workers answer errors, never raise them: vLLM reads no further than the
    first one, and would take what the others said for answers to its next question."""

    installed: InstalledParts | None = None
    error: str | None = None
    corrupt: bool = False


def install_relayed(worker: Any, handle: Published, shapes: Mapping[str, tuple[int, ...]]) -> Answer:
    try:
        with closing(_receiver(worker).receive_buckets(handle)) as buckets:
            # The first is fetched before anything else can fail: no worker waits for one that never comes.
            first = next(buckets, [])
            if getattr(worker, "rlzero_parts", None) is None:
                worker.rlzero_parts = PartsInstaller(worker, shapes)
            return Answer(worker.rlzero_parts.install(itertools.chain([first], buckets), handle.manifest.entries))
    except Exception as error:
        log.exception("the update to version %d failed in a worker", handle.manifest.version)
        return Answer(error=f"{type(error).__name__}: {error}", corrupt=isinstance(error, CorruptWeights))


def try_relay(worker: Any, handle: Published) -> str | None:
    """Receives what was published; says what is wrong, if anything."""
    try:
        for _ in _receiver(worker).receive(handle):
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _receiver(worker: Any) -> IpcTransport:
    """Kept from sync to sync, with the buffers that it has mapped."""
    if getattr(worker, "rlzero_receiver", None) is None:
        device = worker.model_runner.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        worker.rlzero_receiver = IpcTransport(timeout_s=1.5 * TIMEOUT_S, onto=device)  # longer than the engine waits
    return worker.rlzero_receiver


# ---- in the engine's process ----


class Relay:
    """Passes updates on to `workers` workers. `ask` is vLLM's `collective_rpc`; `expected` is the engine's."""

    def __init__(self, ask: Answers, workers: int, expected: ExpectedWeights, bucket_bytes: int = RELAY_BYTES):
        self._ask, self._expected = ask, expected
        self._transport = IpcTransport(bucket_bytes, timeout_s=TIMEOUT_S, engines=workers)
        self._carries: dict[torch.device, bool] = {}  # whether buffers there reach the workers
        self._told: set[str] = set()
        self._stuck = False

    def install(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Installed:
        """Installs a complete set in every worker. Takes all of `weights` unless they raise. Raises ValueError for a
        set that is incomplete or does not fit, CorruptWeights, and RuntimeError that says what happened in which
        worker."""
        if self._stuck:
            raise RuntimeError("vLLM's workers have not ended an earlier update: start the engine again")
        layout, checked = announced(weights, self._expected), self._expected.checked(weights)
        if layout is None:
            self._tell("weights of which nobody says beforehand what they are go through a folder, which is slower")
            return self._through_folder(checked, version)
        first = next(checked, None)  # says where the weights arrive
        if first is None:
            raise ValueError("the update holds no tensors")
        carrier = self._carrier(first[1].device)
        arriving = itertools.chain([first], checked)
        if carrier is None:
            return self._through_folder(arriving, version)
        incoming = _Incoming(arriving)
        try:
            installed = self._send(incoming, layout, version, carrier)
            self._compare_sent(getattr(weights, "manifest", None), layout)
        except Exception as error:
            if carrier.type == "cuda" and not incoming.broke:
                self._carries[carrier] = False
                self._tell(
                    f"the next updates go through shared memory: the one over buffers on {carrier} failed: {error}"
                )
            raise
        return installed

    def _send(self, arriving: _Incoming, layout: Layout, version: int, carrier: torch.device) -> Installed:
        handle = self._transport.offer(layout, version, carrier)
        asking = _Asking(self._ask, install_relayed, (handle, self._expected.shapes))
        lost: NotReached | None = None
        try:
            self._transport.send(arriving, awaited=asking.is_alive)
        except NotReached as error:
            lost = error
        finally:
            asking.join(ENDING_S)
            self._stuck = asking.is_alive()
        if self._stuck:
            raise RuntimeError(f"vLLM's workers did not end the update within {ENDING_S:g} s") from lost
        return self._together(asking.answers(), layout, lost)

    def _compare_sent(self, manifest: Manifest | None, layout: Layout) -> None:
        """What was passed on against what was published, whose fingerprints may have come with the last tensor."""
        published = {entry.name: entry.fingerprint for entry in manifest.entries} if manifest is not None else {}
        for (name, *_), number in zip(layout, self._transport.sent(), strict=True):
            if published.get(name) not in (None, number):
                raise CorruptWeights(f"{name} was damaged on its way through the engine's process. Publish it again.")

    def close(self) -> None:
        """Frees the buffers."""
        self._transport.close()

    def _together(self, answers: list[Answer], layout: Layout, lost: NotReached | None) -> Installed:
        failed = [f"worker {n}: {answer.error}" for n, answer in enumerate(answers) if answer.error is not None]
        if failed:
            kind = CorruptWeights if any(answer.corrupt for answer in answers) else RuntimeError
            raise kind("; ".join(failed)) from lost
        if lost is not None:
            raise lost
        parts = [answer.installed for answer in answers]
        for number, reason in enumerate(part.reason for part in parts):
            if reason is not None:
                self._tell(f"weights go through vLLM's reload_weights in worker {number}, which is slower: {reason}")
        way = "direct" if all(part.way == "direct" for part in parts) else "reload"
        return Installed(way, len(layout), verified_by_all([part.read for part in parts], layout))

    def _carrier(self, device: torch.device) -> torch.device | None:
        """Where the buffers lie: where the weights arrive, else in shared memory; None where neither works."""
        for candidate in dict.fromkeys((device, torch.device("cpu"))):
            if candidate not in self._carries:
                wrong = self._tried(candidate)
                self._carries[candidate] = wrong is None
                if wrong is not None:
                    self._tell(f"buffers on {candidate} do not carry weights to vLLM's workers: {wrong}")
            if self._carries[candidate]:
                return candidate
        return None

    def _tried(self, device: torch.device) -> str | None:
        """What is wrong with buffers on this device, if anything."""
        try:
            handle = self._transport.publish([("a try", torch.arange(1024, device=device))], 0)
            answers = self._ask(try_relay, args=(handle,))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "; ".join(f"worker {n}: {answer}" for n, answer in enumerate(answers) if answer is not None) or None

    def _through_folder(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Installed:
        """One copy of all weights, in shared memory where there is some, that every worker reads."""
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(prefix="rlzero-weights-", dir=memory) as folder:
            transport = DiskTransport(folder)
            published = transport.publish(weights, version)
            failed = [f"worker {n}: {e}" for n, e in enumerate(self._ask(reload_folder, args=(published,))) if e]
            if failed:
                raise RuntimeError("; ".join(failed))
            return Installed("reload", len(transport.manifest(published).entries), 0)

    def _tell(self, message: str) -> None:
        """Logs it once."""
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


def reload_folder(worker: Any, folder: str) -> str | None:
    """vLLM's reload from a published folder, in a worker; says what went wrong, if anything."""
    try:
        reload(worker, DiskTransport(folder).receive(folder))
    except Exception as error:
        log.exception("the update failed in a worker")
        return f"{type(error).__name__}: {error}"
    return None


def verified_by_all(read: Sequence[np.ndarray | None], layout: Layout) -> int:
    """How many tensors the workers were found to hold as published: every part that one of them holds was read back,
    and together these are at least the whole tensor."""
    if any(numbers is None for numbers in read):
        return 0
    elements = np.array([prod(shape) for _, shape, _ in layout], np.int64)
    each = np.stack(read)
    return int(((each >= 0).all(0) & (each.sum(0) >= elements)).sum())


class _Incoming:
    """Copies of arriving tensors: a bucket is packed when all its tensors are there, and a transport may have used
    their memory again by then. `broke`: they did not arrive to the end."""

    def __init__(self, arriving: Iterable[tuple[str, Tensor]]):
        self._arriving, self.broke = iter(arriving), False

    def __iter__(self) -> _Incoming:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        try:
            name, tensor = next(self._arriving)
        except StopIteration:
            raise
        except BaseException:
            self.broke = True
            raise
        return name, tensor.clone()


class _Asking(threading.Thread):
    """Waits for the workers' answers."""

    def __init__(self, ask: Answers, function: Callable, arguments: tuple):
        super().__init__(name="answers of vLLM's workers", daemon=True)
        self._work = lambda: ask(function, args=arguments)
        self._found: list | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._work()
        except Exception as error:  # raised again where the answers are read
            self._error = error

    def answers(self) -> list:
        if self._error is not None:
            raise RuntimeError(
                f"vLLM's workers gave no answer ({self._error}): where one has died, start the engine again"
            ) from self._error
        return self._found
