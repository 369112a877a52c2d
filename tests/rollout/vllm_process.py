"""The real vLLM for tests: engines in one child process, one at a time, because vLLM changes process-wide state and its
imports take many seconds. Imported by that process, so it stands in a file of its own."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path

import torch

from rollout.transport.base import WeightUpdate
from rollout.vllm.engine import VLLMEngine
from rollout.vllm.install import Installed

ON_GPU = torch.cuda.is_available()
CONTEXT = 200


class EngineUnderTest(VLLMEngine):
    """Runs functions of the tests where the engine's model is."""

    def inside(self, function, *args):
        (answer,) = self._vllm.engine_core.collective_rpc(function, args=args)
        return answer

    def take(self, update: WeightUpdate) -> Installed:
        """A real sync: the weights are received here."""
        self.update(update, update.version)
        return self.installed


class EngineProcess(BaseManager):
    pass


EngineProcess.register("VLLMEngine", EngineUnderTest)


def started(kind: type[BaseManager]) -> BaseManager:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: the engine's threads beside this process's
    process = kind(ctx=get_context("spawn"))
    process.start()
    return process


class Engines:
    """Keeps one engine of a module's models open at a time in the child process."""

    def __init__(self, folders: dict[str, Path], process: BaseManager):
        self.folders, self.open = folders, None
        self.process, self.pid = process, process._process.pid

    def get(self, model: str, dtype: str, **options):
        key = (model, dtype, json.dumps(options))
        if self.open is None or self.open[0] != key:
            self.close()
            names = ("sleep_level", "return_routed_experts", "max_batch")
            own = {"max_batch": 32} | {name: options.pop(name) for name in names if name in options}
            engine_args = {"enforce_eager": not ON_GPU, "kv_cache_memory_bytes": 32 << 20, **options}
            engine = self.process.VLLMEngine(
                self.folders[model], dtype=dtype, max_context=CONTEXT, engine_args=engine_args, **own
            )
            self.open = (key, engine)
        return self.open[1]

    def close(self) -> None:
        if self.open is not None:
            self.open[1].close()
            self.open = None
