"""Seconds of a weight sync from a trainer into a running vLLM engine, all told and in parts, beside vLLM's own ways.

    python benchmarks/weight_sync.py [--json FILE] [--gpus 1|2] [--fp8] [--tiny] [--cycles 50]

Two processes: this one holds a DeepSeek-V3-architecture model of 728 M parameters (1.46 GB in BF16) as a trainer would,
the other one a vLLM engine with the same architecture. With one GPU both share it and weights go through CUDA IPC; with
two each has its own and they go through NCCL, printed beside the plain broadcast of as many bytes, with and without
fingerprints. Before every sync each weight is perturbed anew; after it the engine's log-probabilities on a probe are
compared with those of this project's float32 torch decoder, for all weights together and for each kind of weight
alone, beside the distance from the weights before. `--fp8` sends block-FP8 to an engine that was started without
weights; the decoder then computes with the dequantized ones. `--tiny` is a small model, for a try on a CPU.

A sync "all told" runs from the call of `publish` until the engine has answered that it holds the weights: packing,
fingerprints on both sides, transfer, installation, and every tensor read back from the engine's memory. "Streamed" is
the same through `offer` and `send`, which read the weights once.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.weight_sync_engine import REPEATS, Engine, synchronize

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
    from trainer.model.v3_config import V3Config

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


# ---- the trainer's side ----


class TrainerSide:
    """The policy's live weights on the trainer's device, and what float32 says about them."""

    def __init__(self, tiny: bool, device: str, folder: Path, fp8: bool = False):
        from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
        from trainer.model.v3 import V3Model

        self.config, self.device, self.fp8 = model_config(tiny), device, fp8
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
        from rollout.transport.base import layout_of
        from rollout.transport.buckets import nbytes
        from rollout.transport.payload import travelling

        self.layout = layout_of(self.named.items())
        self.nbytes = sum(map(nbytes, travelling(self.layout, "fp8" if fp8 else None)))
        save_folder(self.model, folder)
        from rollout.probe import probe_sequences
        from rollout.torch.decode_v3 import V3Decoder

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
        return decoder_logprobs(self.decoder, meant(self.named.items(), self.fp8), self.probe)


def meant(weights: Iterable[tuple[str, torch.Tensor]], fp8: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as the engine is to compute with them, by torch's plain operations."""
    from trainer.checkpoint.hf import stored_as
    from trainer.precision.quantize import quantize_blocks

    for name, tensor in weights:
        quantized = fp8 and len(list(stored_as(name, tensor.dtype, tuple(tensor.shape), "fp8"))) == 2
        yield name, quantize_blocks(tensor).dequantize() if quantized else tensor


def decoder_logprobs(decoder: Any, weights: Iterable[tuple[str, torch.Tensor]], probe: list) -> list:
    import numpy as np

    decoder.load(weights)
    sequences = [np.asarray(s) for s in probe]
    chosen = decoder.logits(sequences).float().log_softmax(-1)
    out, start = [], 0
    for sequence in sequences:
        rows = chosen[start : start + len(sequence) - 1]
        targets = torch.from_numpy(sequence[1:]).to(rows.device)
        picked = rows.gather(1, targets[:, None])[:, 0].cpu().numpy()
        out.append(np.concatenate([np.zeros(1, np.float32), picked]))
        start += len(sequence)
    decoder.release()
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


def streamed_sync(trainer: TrainerSide, engine: Engine, transport: Any, version: int) -> float:
    """Seconds all told of one sync that reads the weights once."""
    synchronize()
    began_s = time.perf_counter()
    handle = transport.offer(trainer.layout, version, device=torch.device(trainer.device))
    engine.ask("sync", handle, version)
    transport.send(trainer.named.items())
    engine.answer("sync", 60)
    return time.perf_counter() - began_s


def measure_streamed(trainer: TrainerSide, engine: Engine, transport: Any) -> None:
    times_s = []
    for version in range(50, 50 + REPEATS + 1):
        trainer.perturb("norm")
        times_s.append(streamed_sync(trainer, engine, transport, version))
    say(f"streamed sync, all told, least of {REPEATS}", min(times_s[1:]), "s")
    say(f"streamed sync, all told, median of {REPEATS}", statistics.median(times_s[1:]), "s")


def measure_syncs(trainer: TrainerSide, engine: Engine, transport: Any) -> Any:
    """Three perturbed syncs with the probe after each, then several for the clock. Returns the last handle."""
    from rollout.probe import logprob_diff

    stale = trainer.logprobs()
    if trainer.fp8:
        try:
            engine("score", trainer.probe)
            say("the engine answers nothing before its first weights", False)
        except RuntimeError as error:
            say("the engine answers nothing before its first weights", "without weights" in str(error))
    else:
        say("gap before any sync", logprob_diff(engine("score", trainer.probe), stale)["mean_abs"], "nats")
    for version in (1, 2, 3):
        trainer.perturb()
        fresh = trainer.logprobs()
        found = sync(trainer, engine, transport, version)
        scores = engine("score", trainer.probe)
        say(f"sync {version}, all told", found["all_s"], "s")
        say(f"sync {version}, way", found["way"])
        say(f"sync {version}, read back and equal", f"{found['verified']} of {found['tensors']} tensors")
        say(f"sync {version}, gap to the new weights", logprob_diff(scores, fresh)["mean_abs"], "nats")
        say(f"sync {version}, gap to the old weights", logprob_diff(scores, stale)["mean_abs"], "nats")
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
    from rollout.probe import logprob_diff

    for version, (family, pattern) in enumerate(FAMILIES.items(), start=100):
        stale = trainer.logprobs()
        trainer.perturb(pattern)
        fresh = trainer.logprobs()
        sync(trainer, engine, transport, version)
        scores = engine("score", trainer.probe)
        new, old = logprob_diff(scores, fresh)["mean_abs"], logprob_diff(scores, stale)["mean_abs"]
        say(f"only {family} perturbed: gap to new / to old", f"{new:.4g} / {old:.4g}", "nats")


def measure_parts(trainer: TrainerSide, engine: Engine, transport: Any, handle: Any) -> None:
    with part("receive only"):
        for checks in (False, True):
            engine("checks", checks)
            how = "with fingerprints compared" if checks else "without fingerprints"
            say(f"engine: receive {how}, not installed", engine.timed("receive_only", handle), "s")
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

        entries = [e._replace(fingerprint=e.fingerprint ^ 1) if e is wrong else e for e in handle.manifest.entries]
        _, named = engine("read_back", replace(handle.manifest, entries=tuple(entries)))
        say("a mismatch names the tensor", named == [wrong.name])
    if trainer.fp8:  # its loaders go with the layers' own form of FP8 weights, which has been replaced by then
        say("vLLM: model.load_weights", "not for FP8")
    else:
        with part("vLLM's load_weights"):
            say("vLLM: model.load_weights, weights on its GPU", engine.timed("vllm_load"), "s")
    with part("vLLM's reload_weights"):
        say("vLLM: reload_weights, weights on its GPU", engine.timed("vllm_reload"), "s")


def measure_sleep(trainer: TrainerSide, engine: Engine, transport: Any, cycles: int) -> None:
    from rollout.probe import logprob_diff

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
        say(f"sleep level {level}, gap after", logprob_diff(scores, trainer.logprobs())["mean_abs"], "nats")


def measure_quantizer(trainer: TrainerSide, engine: Engine, handle: Any) -> None:
    """What the engine was sent, beside torch's plain operations."""
    from rollout.transport.base import fingerprints
    from trainer.precision.quantize import quantize_blocks

    entries = {entry.name: entry.fingerprint for entry in handle.manifest.entries}
    wrong, count = [], 0
    for name, tensor in trainer.named.items():
        if name + "_scale_inv" in entries:
            q = quantize_blocks(tensor)
            count += 1
            if fingerprints([q.values, q.scales]) != [entries[name], entries[name + "_scale_inv"]]:
                wrong.append(name)
    say("quantized weights that are not what torch's operations make", f"{len(wrong)} of {count}, {wrong[:3]}")


def measure_receiving(trainer: TrainerSide, engine: Engine, transport: Any, wait: bool) -> float:
    """Seconds in the engine of the least of several receptions with nothing installed."""
    times_s = []
    for version in range(200, 200 + REPEATS + 1):
        handle = transport.publish(trainer.named.items(), version)
        engine("receive_only", handle)
        if wait:
            transport.wait()
        times_s.append(engine.took_s)
    return min(times_s)


def measure_transfer(trainer: TrainerSide, engine: Engine, transport: Any) -> None:
    """The broadcast of the buckets, nothing installed, beside a plain one."""
    found = {}
    for checks in (False, True):
        transport.checks = checks
        engine("checks", checks)
        found[checks] = measure_receiving(trainer, engine, transport, wait=True)
    times_s = []
    for _ in range(2 * REPEATS):
        synchronize()
        began_s = time.perf_counter()
        engine.ask("plain_broadcast", trainer.nbytes)
        transport.plain_broadcast(trainer.nbytes, torch.device(trainer.device))
        times_s.append(time.perf_counter() - began_s)
        engine.answer("plain_broadcast", 60)
    plain_s = min(times_s)
    say("NCCL: plain broadcast of as many bytes", plain_s, "s")
    say("engine: receive without fingerprints, not installed", found[False], "s")
    say("engine: receive with fingerprints compared, not installed", found[True], "s")
    ratios = f"{found[False] / plain_s:.3g} and {found[True] / plain_s:.3g}"
    say("receive / plain broadcast, without and with fingerprints", ratios)
    for checks, how in ((False, "transfer"), (True, "transfer, every fingerprint compared")):
        say(f"{how}: target met (at most 1.5 x the plain broadcast)", found[checks] <= 1.5 * plain_s)
    handle = transport.publish(trainer.named.items(), 300)
    engine("hold", handle)
    transport.wait()
    say("engine: our copies (installation alone)", engine.timed("copies"), "s")
    say("engine: every tensor read back", engine.timed("read_back"), "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2))
    parser.add_argument("--fp8", action="store_true", help="block-FP8 into an engine that holds it")
    parser.add_argument("--deep-gemm", action="store_true", help="vLLM's DeepGEMM for FP8 (else CUTLASS, Triton)")
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
    environment["VLLM_USE_DEEP_GEMM"] = str(int(arguments.deep_gemm))
    payload: Any = "fp8" if arguments.fp8 else None
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
    if arguments.fp8:
        options["engine_args"]["quantization"] = "fp8"
    engine = None
    with tempfile.TemporaryDirectory(prefix="rlzero-weight-sync-") as folder:
        trainer = None
        with part("trainer's model"):
            trainer = TrainerSide(arguments.tiny, device, Path(folder), arguments.fp8)
            say("model", f"{trainer.parameters / 1e6:.1f} M parameters in {len(trainer.named)} tensors")
            say("bytes that travel", trainer.nbytes / 1e9, "GB")
        for level in (1, 0) if on_gpu and arguments.gpus == 1 else (0,):
            with part(f"engine start, sleep mode {'on' if level else 'off'}"):
                began_s = time.perf_counter()
                engine = Engine(folder, options | {"sleep_level": level}, environment).ready()
                say("engine start", time.perf_counter() - began_s, "s")
                break
        if trainer is None or engine is None:
            return
        try:
            if arguments.gpus == 2:
                from rollout.transport.nccl import NcclTransport

                transport: Any = NcclTransport(1, arguments.bucket_mb << 20, payload)
            else:
                from rollout.transport.ipc import IpcTransport

                transport = IpcTransport(arguments.bucket_mb << 20, arguments.buffers, payload)
            handle = None
            with part("engine"):
                say("engine", engine("info"))
            with part("syncs"):
                handle = measure_syncs(trainer, engine, transport)
            if handle is None:
                return
            if arguments.fp8 and arguments.gpus == 1:
                with part("quantizer"):
                    measure_quantizer(trainer, engine, handle)
            with part("streamed syncs"):
                measure_streamed(trainer, engine, transport)
            if arguments.gpus == 2:
                with part("transfer"):
                    measure_transfer(trainer, engine, transport)
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
