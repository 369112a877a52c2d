"""A rollout worker in a process of its own behind a pipe, without Ray: benchmarks start several side by side."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

START_S = 300  # engines may take so long to start, all at once


def worker_main(pipe: Any, kind: str, folder: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    """A rollout worker behind a pipe: answers (method, arguments) with what it returns, and how long it took."""
    os.environ.update(environment)
    try:
        from rollout.worker import RolloutWorker

        if not torch.cuda.is_available() and "speculative_config" in options:
            from rollout.vllm.engine import VLLMEngine
            from tests.rollout import cpu_speculation

            cpu_speculation.install()
            VLLMEngine.speculates_on_cpu = True
        worker, events = RolloutWorker(kind, folder, options), asyncio.new_event_loop()
        pipe.send(("ok", None, 0.0))
    except BaseException:
        pipe.send(("error", traceback.format_exc(), 0.0))
        return

    def call(method: str, *arguments: Any) -> Any:
        return events.run_until_complete(getattr(worker, method)(*arguments))

    while (message := _next(pipe)) is not None:
        name, *arguments = message
        began_s = time.perf_counter()
        try:
            if name == "write":
                call("submit", *arguments)
                answer: Any = []
                while ended := call("completed"):
                    answer += ended
            elif name == "inside":  # a function that runs where vLLM's model is; the first worker's answer
                answer = call("_call", lambda e, work=arguments[0]: e._vllm.engine_core.collective_rpc(work)[0])
            elif name == "installed":
                installed = call("_call", lambda engine: getattr(engine, "installed", None))
                answer = installed and (installed.mode, installed.tensors, installed.verified)
            else:
                answer = call(name, *arguments)
            took_s = time.perf_counter() - began_s
            pipe.send(("ok", answer, took_s))
        except BaseException:
            pipe.send(("error", traceback.format_exc(), 0.0))
    call("close")


def placement(worker: Any) -> tuple[int, int]:
    """Places of experts, over all layers, and how many of them hold another expert than at the start."""
    moved = places = 0
    state = worker.model_runner.eplb_state
    for placed in state.model_states.values():
        model = placed.model
        first = state.build_initial_global_physical_to_logical_map(
            model.num_routed_experts, model.num_redundant_experts
        )
        now = placed.physical_to_logical_map.cpu()
        places, moved = places + now.numel(), moved + int((now != torch.tensor(first)).sum())
    return places, moved


def _next(pipe: Any) -> Any:
    """The next message; None when the other end is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return None


class Engine:
    """The other end of the pipe. Starts without waiting; every call has a deadline."""

    def __init__(self, kind: str, folder: str, options: dict[str, Any], cache: str):
        """`cache` is a folder for what vLLM compiles: engines that start at once must not share one."""
        environment = {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0", "NCCL_NVLS_ENABLE": "0"}
        environment["VLLM_USE_DEEP_GEMM"] = "0"  # compiles its kernels of FP8 for minutes, when they are first needed
        environment["VLLM_CACHE_ROOT"] = cache
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=worker_main, args=(there, kind, folder, options, environment))
        self.process.start()
        there.close()
        self.began_s = time.perf_counter()

    def ready(self) -> float:
        """Seconds since it was asked to start."""
        self._answer("start", START_S)
        return time.perf_counter() - self.began_s

    def __call__(self, name: str, *arguments: Any, deadline_s: float = 120) -> Any:
        self.pipe.send((name, *arguments))
        return self._answer(name, deadline_s)

    def _answer(self, name: str, deadline_s: float) -> Any:
        if not self.pipe.poll(deadline_s):
            raise TimeoutError(f"the engine did not answer '{name}' within {deadline_s} s")
        kind, content, self.took_s = self.pipe.recv()
        if kind == "error":
            raise RuntimeError(f"'{name}' failed in the engine's process:\n{content}")
        return content

    def close(self) -> None:
        if self.process.is_alive():
            try:
                self.pipe.send(None)
            except OSError:
                pass
        self.process.join(15)
        if self.process.is_alive():
            self.process.kill()
