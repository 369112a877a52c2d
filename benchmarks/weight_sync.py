"""Seconds of a weight sync from a trainer into a running vLLM engine, all told and in parts, beside vLLM's own ways.

    python benchmarks/weight_sync.py [--json FILE] [--gpus 1|2] [--tiny] [--cycles 50]

Two processes: this one holds a DeepSeek-V3-architecture model of 728 M parameters (1.46 GB in BF16) as a trainer would,
the other one a vLLM engine with the same architecture. With one GPU both share it and weights go through CUDA IPC; with
two each has its own and they go through NCCL, printed beside the plain broadcast of as many bytes. Before every sync
each weight is perturbed anew; after it the engine's log-probabilities on a probe are compared with those of this
project's float32 torch decoder, for all weights together and for each kind of weight alone, beside the distance from
the weights before. `--tiny` is a small model, for a try on a CPU.

A sync "all told" runs from the call of `publish` until the engine has answered that it holds the weights: packing,
fingerprints on both sides, transfer, installation, and every tensor read back from the engine's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.multiprocessing as multiprocessing

REPEATS = 5
START_S = 150  # the engine's start may take so long
FAMILIES = {
    "attention": r"self_attn\..*proj",
    "dense": r"layers\.0\.mlp",
    "shared expert": r"shared_experts",
    "router": r"gate\.weight",
    "router bias": r"e_score_correction_bias",
    "norms": r"norm\.weight",
    "embedding and head": r"embed_tokens|lm_head",
    "experts": r"mlp\.experts",
}
FIGURES: dict[str, Any] = {}


def say(name: str, value: Any, unit: str = "") -> None:
    """One figure a line, and into the JSON."""
    FIGURES[name] = value
    shown = f"{value:.5g}" if isinstance(value, float) else value
    print(f"{name}: {shown} {unit}".rstrip(), flush=True)


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part that fails is told, and the others still run."""
    began_s = time.perf_counter()
    try:
        yield
    except Exception:
        FIGURES[f"{name} FAILED"] = traceback.format_exc()
        print(f"--- {name} FAILED\n{FIGURES[f'{name} FAILED']}", flush=True)
    print(f"    ({name}: {time.perf_counter() - began_s:.1f} s)", flush=True)


def model_config(tiny: bool):
    from trainer.model.config import V3Config

    common = dict(
        first_k_dense_replace=1, kv_lora_rank=512, qk_rope_head_dim=64, n_group=4, topk_group=2, eos_token_id=1,
        routed_scaling_factor=2.5, initializer_range=0.04,
    )  # fmt: skip
    if tiny:
        return V3Config(
            vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, qk_nope_head_dim=32, v_head_dim=32,
            q_lora_rank=32, max_position_embeddings=512, **common,
        )  # fmt: skip
    return V3Config(
        vocab_size=32000, hidden_size=1536, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=12, n_routed_experts=32, num_experts_per_tok=4, qk_nope_head_dim=128, v_head_dim=128,
        q_lora_rank=768, max_position_embeddings=4096, **common,
    )  # fmt: skip


# ---- the engine's process ----


def engine_main(pipe, folder: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Starts vLLM, then answers (function name, arguments) with what the function returns and how long it took."""
    os.environ.update(environment)
    try:
        import rollout.vllm_engine as vllm_engine

        engine = vllm_engine.VLLMEngine(folder, **options)
        state = {"engine": engine, "transport": None, "held": None}
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


def call_sync(state: dict, handle: Any, version: int) -> dict[str, Any]:
    incoming = receiver(state, handle).receive(handle)
    try:
        state["engine"].update(incoming, version)
    finally:
        incoming.close()
    synchronize()
    installed = state["engine"].installed
    return {"way": installed.way, "tensors": installed.tensors, "verified": installed.verified}


def receiver(state: dict, handle: Any) -> Any:
    if state["transport"] is None:
        from rollout.transport.ipc import IpcTransport, Published

        if isinstance(handle, Published):
            state["transport"] = IpcTransport()
        else:
            from rollout.transport.nccl import NcclTransport

            state["transport"] = NcclTransport(1)
    return state["transport"]


def call_receive_only(state: dict, handle: Any) -> int:
    """Transfer and its verification without installing."""
    count = sum(1 for _ in receiver(state, handle).receive(handle))
    synchronize()
    return count


def call_plain_broadcast(state: dict, nbytes: int) -> None:
    state["transport"].plain_broadcast(nbytes, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def call_hold(state: dict, handle: Any) -> int:
    """Keeps a copy of the published weights for the calls below."""
    state["held"] = [(name, tensor.clone()) for name, tensor in receiver(state, handle).receive(handle)]
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
    from rollout.vllm_weights import copy_weights, refresh_derived

    def copies(worker):
        copy_weights(worker.rlzero_installer.plan, state["held"])
        return refresh_derived(worker.model_runner.get_model(), worker.model_runner.model_config.dtype)

    refreshed = inside(state, copies)
    synchronize()
    return f"{refreshed} layers derived anew"


def call_read_back(state: dict, manifest: Any) -> tuple[int, list[str]]:
    from rollout.vllm_weights import differing

    return inside(state, lambda worker: differing(worker.rlzero_installer.plan, manifest.entries))


def call_fingerprints(state: dict) -> int:
    from rollout.transport.fingerprint import fingerprints

    return len(fingerprints([tensor for _, tensor in state["held"]]))


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

    installer = inside(state, lambda worker: getattr(worker, "rlzero_installer", None))
    return {"vllm": vllm.__version__, "torch": torch.__version__, "direct": installer and installer.direct}


ENGINE_CALLS = {name.removeprefix("call_"): function for name, function in globals().items() if name[:5] == "call_"}


class Engine:
    """The other end of the pipe. Every call has a deadline."""

    def __init__(self, folder: str, options: dict[str, Any], environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=engine_main, args=(there, folder, options, environment), daemon=True)
        self.process.start()
        try:
            self._answer("start", START_S)
        except BaseException:
            self.process.kill()
            raise

    def __call__(self, name: str, *arguments: Any, deadline_s: float = 60) -> Any:
        self.pipe.send((name, *arguments))
        return self._answer(name, deadline_s)

    def timed(self, name: str, *arguments: Any) -> float:
        """Seconds inside the engine's process, the least of several."""
        times_s = []
        for _ in range(REPEATS):
            self(name, *arguments)
            times_s.append(self.took_s)
        return min(times_s)

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


# ---- the trainer's side ----


class TrainerSide:
    """The policy's live weights on the trainer's device, and what float32 says about them."""

    def __init__(self, tiny: bool, device: str, folder: Path):
        from trainer.model.hf import named_checkpoint_tensors, save_folder
        from trainer.model.v3 import V3Model

        self.config, self.device = model_config(tiny), device
        with torch.device(device):
            self.model = V3Model(self.config).to(torch.bfloat16)
        self.generator = torch.Generator(device).manual_seed(0)
        self.named = dict(named_checkpoint_tensors(self.model))
        for name, tensor in self.named.items():
            if tensor.ndim == 1:
                tensor.fill_(0.0 if "bias" in name else 1.0)
            else:
                tensor.normal_(0.0, self.config.initializer_range, generator=self.generator)
        self.parameters = sum(tensor.numel() for tensor in self.named.values())
        self.nbytes = sum(tensor.nbytes for tensor in self.named.values())
        save_folder(self.model, folder)
        from rollout.decode_v3 import V3Decoder
        from rollout.probe import probe_sequences

        self.decoder = V3Decoder(self.config, dtype=torch.float32, device=device)
        self.probe = probe_sequences(self.config.vocab_size, without=(0, 1, 2))

    @torch.no_grad()
    def perturb(self, pattern: str = ".") -> None:
        for name, tensor in self.named.items():
            if re.search(pattern, name):
                scale = 0.2 if tensor.ndim == 1 else 0.3 * self.config.initializer_range
                noise = torch.empty(tensor.shape, device=self.device).normal_(0.0, scale, generator=self.generator)
                tensor.add_(noise.to(tensor.dtype))

    def logprobs(self) -> list:
        """Of the probe, float32 arithmetic on the weights as they are now."""
        import numpy as np

        self.decoder.load(self.named.items())
        sequences = [np.asarray(s) for s in self.probe]
        chosen = self.decoder.logits(sequences).float().log_softmax(-1)
        out, start = [], 0
        for sequence in sequences:
            rows = chosen[start : start + len(sequence) - 1]
            targets = torch.from_numpy(sequence[1:]).to(rows.device)
            picked = rows.gather(1, targets[:, None])[:, 0].cpu().numpy()
            out.append(np.concatenate([np.zeros(1, np.float32), picked]))
            start += len(sequence)
        self.decoder.release()
        return out


def sync(trainer: TrainerSide, engine: Engine, transport: Any, version: int) -> dict[str, Any]:
    """One sync, its seconds all told and in parts."""
    synchronize()
    began_s = time.perf_counter()
    handle = transport.publish(trainer.named.items(), version)
    published_s = time.perf_counter()
    answer = engine("sync", handle, version)
    ended_s = time.perf_counter()
    engine_s = engine.took_s
    return answer | {
        "all_s": ended_s - began_s,
        "publish_s": published_s - began_s,
        "engine_s": engine_s,
        "handle_s": ended_s - published_s - engine_s,
        "handle": handle,
    }


def measure_syncs(trainer: TrainerSide, engine: Engine, transport: Any) -> Any:
    """Three perturbed syncs with the probe after each, then several for the clock. Returns the last handle."""
    from rollout.probe import gap

    stale = trainer.logprobs()
    say("gap before any sync", gap(engine("score", trainer.probe), stale)["mean_abs"], "nats")
    for version in (1, 2, 3):
        trainer.perturb()
        fresh = trainer.logprobs()
        found = sync(trainer, engine, transport, version)
        scores = engine("score", trainer.probe)
        say(f"sync {version}, all told", found["all_s"], "s")
        say(f"sync {version}, way", found["way"])
        say(f"sync {version}, read back and equal", f"{found['verified']} of {found['tensors']} tensors")
        say(f"sync {version}, gap to the new weights", gap(scores, fresh)["mean_abs"], "nats")
        say(f"sync {version}, gap to the old weights", gap(scores, stale)["mean_abs"], "nats")
        stale = fresh
    runs = []
    for version in range(4, 4 + REPEATS):
        trainer.perturb("norm")
        runs.append(sync(trainer, engine, transport, version))
    for key in ("all_s", "publish_s", "handle_s", "engine_s"):
        say(f"sync, {key}, least of {REPEATS}", min(run[key] for run in runs), "s")
    say(f"sync, all told, median of {REPEATS}", statistics.median(run["all_s"] for run in runs), "s")
    say("sync, target met (all told at most 0.1 s)", min(run["all_s"] for run in runs) <= 0.1)
    return runs[-1]["handle"]


def measure_families(trainer: TrainerSide, engine: Engine, transport: Any) -> None:
    from rollout.probe import gap

    for version, (family, pattern) in enumerate(FAMILIES.items(), start=100):
        stale = trainer.logprobs()
        trainer.perturb(pattern)
        fresh = trainer.logprobs()
        sync(trainer, engine, transport, version)
        scores = engine("score", trainer.probe)
        new, old = gap(scores, fresh)["mean_abs"], gap(scores, stale)["mean_abs"]
        say(f"only {family} perturbed: gap to new / to old", f"{new:.4g} / {old:.4g}", "nats")


def measure_parts(trainer: TrainerSide, engine: Engine, transport: Any, handle: Any) -> None:
    with part("receive only"):
        say("engine: receive and verify, not installed", engine.timed("receive_only", handle), "s")
    with part("installation"):
        engine("hold", handle)
        say("engine: our copies", engine.timed("copies"), "s")
        say("engine: every tensor read back", engine.timed("read_back", handle.manifest), "s")
        say("engine: fingerprints of all tensors", engine.timed("fingerprints"), "s")
    with part("trainer"):
        from rollout.transport.fingerprint import fingerprints

        tensors = list(trainer.named.values())
        times_s = []
        for _ in range(REPEATS):
            synchronize()
            began_s = time.perf_counter()
            fingerprints(tensors)
            times_s.append(time.perf_counter() - began_s)
        say("trainer: fingerprints of all tensors", min(times_s), "s")
    with part("a damaged tensor"):
        wrong = handle.manifest.entries[len(handle.manifest.entries) // 2]
        from dataclasses import replace

        entries = [replace(e, fingerprint=e.fingerprint ^ 1) if e is wrong else e for e in handle.manifest.entries]
        _, named = engine("read_back", replace(handle.manifest, entries=tuple(entries)))
        say("a mismatch names the tensor", named == [wrong.name])
    with part("vLLM's load_weights"):
        say("vLLM: model.load_weights, weights on its GPU", engine.timed("vllm_load"), "s")
    with part("vLLM's reload_weights"):
        say("vLLM: reload_weights, weights on its GPU", engine.timed("vllm_reload"), "s")


def measure_sleep(trainer: TrainerSide, engine: Engine, transport: Any, cycles: int) -> None:
    from rollout.probe import gap

    version = 1000
    for level, count, limit_s in ((2, cycles, 40.0), (1, 5, 25.0)):
        began_s = time.perf_counter()
        free, sleep_s, wake_s = [], [], []
        for _ in range(count):
            version += 1
            asleep = engine("sleep", level)
            sleep_s.append(engine.took_s)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            engine("wake")
            wake_s.append(engine.took_s)
            if level == 2:
                sync(trainer, engine, transport, version)
            free.append(torch.cuda.mem_get_info()[0] / 1e9)
            if time.perf_counter() - began_s > limit_s:
                break
        say(f"sleep level {level}, cycles", len(free))
        say(f"sleep level {level}, sleep, median", statistics.median(sleep_s), "s")
        say(f"sleep level {level}, wake, median", statistics.median(wake_s), "s")
        say(f"sleep level {level}, free GPU memory asleep", asleep, "GB")
        say(f"sleep level {level}, free awake, third and last", f"{free[:3][-1]:.3f} {free[-1]:.3f}", "GB")
        scores = engine("score", trainer.probe)
        say(f"sleep level {level}, gap after", gap(scores, trainer.logprobs())["mean_abs"], "nats")


def measure_plain_broadcast(trainer: TrainerSide, engine: Engine, transport: Any) -> None:
    times_s = []
    transport.wait()
    for _ in range(REPEATS + 1):
        synchronize()
        began_s = time.perf_counter()
        engine.pipe.send(("plain_broadcast", trainer.nbytes))
        transport.plain_broadcast(trainer.nbytes, torch.device(trainer.device))
        times_s.append(time.perf_counter() - began_s)
        engine._answer("plain_broadcast", 60)
    say("NCCL: plain broadcast of as many bytes", min(times_s), "s")


def measure_transfer(trainer: TrainerSide, engine: Engine, transport: Any) -> None:
    """The broadcast of the buckets with its verification, nothing installed."""
    times_s = []
    for version in range(200, 200 + REPEATS):
        handle = transport.publish(trainer.named.items(), version)
        engine("receive_only", handle)
        transport.wait()
        times_s.append(engine.took_s)
    say("engine: receive and verify, not installed", min(times_s), "s")
    handle = transport.publish(trainer.named.items(), 300)
    engine("hold", handle)
    transport.wait()
    say("engine: our copies (installation alone)", engine.timed("copies"), "s")
    say("engine: every tensor read back", engine.timed("read_back", handle.manifest), "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cycles", type=int, default=50, help="turns of sleep, wake and sync (GPU)")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--buffers", type=int, default=2)
    parser.add_argument("--graphs", action="store_true", help="let vLLM compile and capture graphs (slow start)")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = "cuda:0" if on_gpu else "cpu"
    environment = {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0", "NCCL_NVLS_ENABLE": "0"}
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if arguments.gpus == 2:
        environment["CUDA_VISIBLE_DEVICES"] = "1"
    kv_bytes = 4 << 30 if on_gpu else 16 << 20
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_context": 500 if arguments.tiny else 2048,
        "engine_args": {"enforce_eager": not arguments.graphs, "kv_cache_memory_bytes": kv_bytes},
    }
    if on_gpu:
        options["engine_args"]["gpu_memory_utilization"] = 0.3
    engine = None
    with tempfile.TemporaryDirectory(prefix="rlzero-weight-sync-") as folder:
        trainer = None
        with part("trainer's model"):
            trainer = TrainerSide(arguments.tiny, device, Path(folder))
            say("model", f"{trainer.parameters / 1e6:.1f} M parameters in {len(trainer.named)} tensors")
            say("model bytes", trainer.nbytes / 1e9, "GB")
        for level in (1, 0) if on_gpu and arguments.gpus == 1 else (0,):
            with part(f"engine start, sleep mode {'on' if level else 'off'}"):
                began_s = time.perf_counter()
                engine = Engine(folder, options | {"sleep_level": level}, environment)
                say("engine start", time.perf_counter() - began_s, "s")
                break
        if trainer is None or engine is None:
            return
        try:
            if arguments.gpus == 2:
                from rollout.transport.nccl import NcclTransport

                transport: Any = NcclTransport(1, arguments.bucket_mb << 20)
            else:
                from rollout.transport.ipc import IpcTransport

                transport = IpcTransport(arguments.bucket_mb << 20, arguments.buffers)
            handle = None
            with part("engine"):
                say("engine", engine("info"))
            with part("syncs"):
                handle = measure_syncs(trainer, engine, transport)
            if handle is None:
                return
            if arguments.gpus == 2:
                with part("transfer"):
                    measure_transfer(trainer, engine, transport)
                with part("plain broadcast"):
                    measure_plain_broadcast(trainer, engine, transport)
            with part("kinds of weights"):
                measure_families(trainer, engine, transport)
            with part("generation after all that"):
                say("tokens written", engine("write", 8, 32, trainer.probe[0]))
            if arguments.gpus == 1:
                with part("parts"):
                    handle = transport.publish(trainer.named.items(), 500)
                    measure_parts(trainer, engine, transport, handle)
            if on_gpu and arguments.gpus == 1 and level:
                with part("sleep and wake"):
                    sync(trainer, engine, transport, 600)
                    measure_sleep(trainer, engine, transport, arguments.cycles)
        finally:
            engine.close()
            if arguments.json:
                arguments.json.write_text(json.dumps(FIGURES, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
