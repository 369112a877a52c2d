"""The other process of benchmarks/weight_sync.py and weight_sync_streamed.py: a vLLM engine that does what it is told
over a pipe, and says how long it took."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

REPEATS = 5
START_S = {"cuda": 150, "cpu": 600}  # the engine's start may take so long


def engine_main(pipe, folder: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Starts vLLM, then answers (function name, arguments) with what the function returns and how long it took."""
    os.environ.update(environment)  # before anything asks CUDA for its devices: it reads them once
    try:
        import rollout.vllm.engine as vllm_engine

        engine = vllm_engine.VLLMEngine(folder, **options)
        state: dict[str, Any] = {"engine": engine}
        pipe.send(("ok", None, 0.0))
    except BaseException:
        pipe.send(("error", traceback.format_exc(), 0.0))
        return
    while (message := pipe.recv()) is not None:
        name, *arguments = message
        began_s = time.perf_counter()
        try:
            answer = ("ok", ENGINE_CALLS[name](state, *arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send((*answer, time.perf_counter() - began_s))
    engine.close()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inside(state: dict, function: Callable) -> Any:
    """`function(worker)` where vLLM's model is."""
    (answer,) = state["engine"]._vllm.engine_core.collective_rpc(function)
    return answer


def call_sync(state: dict, update: Any) -> dict[str, Any]:
    state["engine"].update(update, update.version)
    synchronize()
    installed = state["engine"].installed
    return {"mode": installed.mode, "tensors": installed.tensors, "verified": installed.verified}


def receivers(state: dict) -> dict[type, Any]:
    return inside(state, lambda worker: worker.rlzero_installer.receivers)


def call_timeout(state: dict, seconds: float) -> None:
    """How long the engine waits for the trainer from now on."""
    for receiver in receivers(state).values():
        receiver.timeout_s = seconds
        for group in getattr(receiver, "_groups", {}).values():
            group.timeout_s = seconds


def call_receive_only(state: dict, update: Any) -> int:
    """Transfer and its verification without installing."""
    from rollout.transport.transports import receive

    count = sum(1 for _ in receive(update, receivers(state)))
    synchronize()
    return count


def call_plain_broadcast(state: dict, nbytes: int) -> None:
    """Takes part in the broadcast of so many bytes in one piece."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (receiver,) = receivers(state).values()
    receiver._groups[0].broadcast(torch.empty(nbytes, dtype=torch.uint8, device=device)).wait()
    synchronize()


def call_hold(state: dict, update: Any) -> int:
    """Keeps a copy of the weights that are sent for the calls below."""
    from rollout.transport.transports import receive

    arriving = receive(update, receivers(state))
    state["held"] = [(name, tensor.clone()) for name, tensor in arriving]
    state["sent"] = {spec.name: spec for spec in arriving.sent}
    synchronize()
    return len(state["held"])


def call_vllm_reload(state: dict) -> None:
    def reload(worker):
        worker.model_runner.reload_weights(weights_iterator=iter(state["held"]))

    inside(state, reload)
    synchronize()


def call_vllm_load(state: dict) -> None:
    inside(state, lambda worker: worker.model_runner.get_model().load_weights(iter(state["held"])) and None)
    synchronize()


def call_copies(state: dict) -> str:
    """Our installation alone."""
    from rollout.vllm.copies import copy_weights
    from rollout.vllm.install import refresh_derived

    def copies(worker):
        copy_weights(worker.rlzero_installer.shards.plan, state["held"])
        return refresh_derived(worker.model_runner.get_model(), worker.model_runner.model_config.dtype)

    refreshed = inside(state, copies)
    synchronize()
    return f"{refreshed} layers derived anew"


def call_read_back(state: dict) -> list[str]:
    """Names of tensors that the engine does not hold as they were sent."""

    def read(worker):
        shards = worker.rlzero_installer.shards
        shards.begin()
        shards.arrived(state["held"])
        return shards.compared(list(state["sent"].values()))[1]

    return inside(state, read)


def call_mistake(state: dict, name: str) -> None:
    """From now on another checksum of this tensor is believed to have been sent."""
    spec = state["sent"][name]
    state["sent"][name] = spec._replace(checksum=spec.checksum ^ 1)


def call_checksums(state: dict) -> int:
    from rollout.transport.checksum import checksums

    return len(checksums([tensor for _, tensor in state["held"]]))


def call_sent(state: dict) -> dict[str, int]:
    return {name: spec.checksum for name, spec in state["sent"].items()}


def call_score(state: dict, sequences: list[list[int]]) -> list:
    return state["engine"].score(sequences)


def call_write(state: dict, count: int, tokens: int, prompt: list[int]) -> int:
    from rollout.engine import Request, Sampling, generate

    sampling = Sampling(tokens, ignore_eos=True)
    rollouts = generate(state["engine"], [Request(f"p{i}", 0, tuple(prompt), sampling) for i in range(count)])
    return sum(len(r.tokens) for r in rollouts)


def call_sleep(state: dict, level: int) -> float:
    state["engine"].sleep_level = level
    state["engine"].sleep()
    return torch.cuda.mem_get_info()[0] / 1e9


def call_wake(state: dict) -> float:
    state["engine"].wake()
    return torch.cuda.mem_get_info()[0] / 1e9


def call_info(state: dict) -> dict[str, Any]:
    import vllm

    installer = inside(state, lambda worker: worker.rlzero_installer)
    return {"vllm": vllm.__version__, "torch": torch.__version__, "direct": installer.direct}


ENGINE_CALLS = {name.removeprefix("call_"): function for name, function in globals().items() if name[:5] == "call_"}


class Engine:
    """The other end of the pipe. Every call has a deadline; `ready` waits for the start."""

    def __init__(self, folder: str, options: dict[str, Any], environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=engine_main, args=(there, folder, options, environment), daemon=True)
        self.process.start()

    def ready(self) -> Engine:
        try:
            self.answer("start", START_S["cuda" if torch.cuda.is_available() else "cpu"])
        except BaseException:
            self.process.kill()
            raise
        return self

    def ask(self, name: str, *arguments: Any) -> None:
        """Begins a call that `answer` ends."""
        self.pipe.send((name, *arguments))

    def __call__(self, name: str, *arguments: Any, deadline_s: float = 60) -> Any:
        self.ask(name, *arguments)
        return self.answer(name, deadline_s)

    def timed(self, name: str, *arguments: Any) -> float:
        """Seconds inside the engine's process, the least of several."""
        times_s = []
        for _ in range(REPEATS):
            self(name, *arguments)
            times_s.append(self.took_s)
        return min(times_s)

    def answer(self, name: str, deadline_s: float) -> Any:
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
