"""Seconds of a weight sync from a trainer into a running vLLM engine, all told and in parts, beside vLLM's own ways.

    python benchmarks/weight_sync.py [--json FILE] [--gpus 1|2] [--fp8] [--tiny] [--cycles 50]

Two processes: this one holds a DeepSeek-V3-architecture model of 728 M parameters (1.46 GB in BF16) as a trainer would,
the other one a vLLM engine with the same architecture. With one GPU both share it and weights go through CUDA IPC; with
two each has its own and they go through NCCL, printed beside the plain broadcast of as many bytes. Before every sync
each weight is perturbed anew; after it the engine's log-probabilities on a probe are compared with those of this
project's float32 torch decoder, for all weights together and for each kind of weight alone, beside the distance from
the weights before. `--fp8` sends block-FP8 to an engine that was started without weights; the decoder then computes
with the dequantized ones. `--tiny` is a small model, for a try on a CPU.

A sync "all told" runs from the call of `prepare` until the engine has answered that it holds the weights: packing,
checksums on both sides, transfer, installation, and every tensor read back from the engine's memory.
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
        from rollout.transport.payload import travelling

        self.layout = layout_of(self.named.items())
        self.nbytes = sum(spec.nbytes for spec in travelling(self.layout, "fp8" if fp8 else None))
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


def sync(
    trainer: TrainerSide, engine: Engine, sender: Any, version: int, call: str = "sync", deadline_s: float = 60
) -> dict[str, Any]:
    """One sync, its seconds all told and in parts; the engine does `call` with the update."""
    synchronize()
    began_s = time.perf_counter()
    update = sender.prepare(trainer.layout, version)
    engine.ask(call, update)
    prepared_s = time.perf_counter()
    sender.send(trainer.named.items())
    sent_s = time.perf_counter()
    answer = engine.answer(call, deadline_s)
    found = {"all_s": time.perf_counter() - began_s, "prepare_s": prepared_s - began_s, "send_s": sent_s - prepared_s}
    return found | {"engine_s": engine.took_s} | (answer if isinstance(answer, dict) else {})


def measure_syncs(trainer: TrainerSide, engine: Engine, sender: Any) -> None:
    """Three perturbed syncs with the probe after each, then several for the clock."""
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
        found = sync(trainer, engine, sender, version)
        scores = engine("score", trainer.probe)
        say(f"sync {version}, all told", found["all_s"], "s")
        say(f"sync {version}, mode", found["mode"])
        say(f"sync {version}, read back and equal", f"{found['verified']} of {found['tensors']} tensors")
        say(f"sync {version}, gap to the new weights", logprob_diff(scores, fresh)["mean_abs"], "nats")
        say(f"sync {version}, gap to the old weights", logprob_diff(scores, stale)["mean_abs"], "nats")
        stale = fresh
    runs = []
    for version in range(4, 4 + REPEATS):
        trainer.perturb("norm")
        runs.append(sync(trainer, engine, sender, version))
    for key in ("all_s", "prepare_s", "send_s", "engine_s"):
        say(f"sync, {key}, least of {REPEATS}", min(run[key] for run in runs), "s")
    say(f"sync, all told, median of {REPEATS}", statistics.median(run["all_s"] for run in runs), "s")
    say("sync, target met (all told at most 0.1 s)", min(run["all_s"] for run in runs) <= 0.1)


def measure_families(trainer: TrainerSide, engine: Engine, sender: Any) -> None:
    from rollout.probe import logprob_diff

    for version, (family, pattern) in enumerate(FAMILIES.items(), start=100):
        stale = trainer.logprobs()
        trainer.perturb(pattern)
        fresh = trainer.logprobs()
        sync(trainer, engine, sender, version)
        scores = engine("score", trainer.probe)
        new, old = logprob_diff(scores, fresh)["mean_abs"], logprob_diff(scores, stale)["mean_abs"]
        say(f"only {family} perturbed: gap to new / to old", f"{new:.4g} / {old:.4g}", "nats")


def measure_parts(trainer: TrainerSide, engine: Engine, sender: Any) -> None:
    with part("receive only"):
        times_s = [sync(trainer, engine, sender, 200 + i, "receive_only")["engine_s"] for i in range(REPEATS + 1)]
        say("engine: receive with checksums compared, not installed", min(times_s), "s")
    with part("installation"):
        sync(trainer, engine, sender, 300)
        sync(trainer, engine, sender, 301, "hold")
        say("engine: our copies", engine.timed("copies"), "s")
        say("engine: every tensor read back", engine.timed("read_back"), "s")
        say("engine: checksums of all tensors", engine.timed("checksums"), "s")
        say("tensors that differ", engine("read_back"))
        wrong = list(engine("sent"))[len(trainer.layout) // 2]
        engine("mistake", wrong)
        say("a mismatch names the tensor", engine("read_back") == [wrong])
    with part("trainer"):
        from rollout.transport.checksum import checksums

        tensors = list(trainer.named.values())
        times_s = []
        for _ in range(REPEATS):
            synchronize()
            began_s = time.perf_counter()
            checksums(tensors)
            times_s.append(time.perf_counter() - began_s)
        say("trainer: checksums of all tensors", min(times_s), "s")


def measure_vllm(trainer: TrainerSide, engine: Engine) -> None:
    """vLLM's own ways with the weights that the engine holds beside its own."""
    if trainer.fp8:  # its loaders go with the layers' own form of FP8 weights, which has been replaced by then
        say("vLLM: model.load_weights", "not for FP8")
    else:
        with part("vLLM's load_weights"):
            say("vLLM: model.load_weights, weights on its GPU", engine.timed("vllm_load"), "s")
    with part("vLLM's reload_weights"):
        say("vLLM: reload_weights, weights on its GPU", engine.timed("vllm_reload"), "s")


def measure_sleep(trainer: TrainerSide, engine: Engine, sender: Any, cycles: int) -> None:
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
                sync(trainer, engine, sender, version)
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


def measure_quantizer(trainer: TrainerSide, engine: Engine) -> None:
    """What the engine was sent, beside torch's plain operations."""
    from rollout.transport.checksum import checksums
    from trainer.precision.quantize import quantize_blocks

    sent = engine("sent")
    wrong, count = [], 0
    for name, tensor in trainer.named.items():
        if name + "_scale_inv" in sent:
            q = quantize_blocks(tensor)
            count += 1
            if checksums([q.values, q.scales]) != [sent[name], sent[name + "_scale_inv"]]:
                wrong.append(name)
    say("quantized weights that are not what torch's operations make", f"{len(wrong)} of {count}, {wrong[:3]}")


def measure_broadcast(trainer: TrainerSide, engine: Engine, sender: Any) -> None:
    """Beside the reception that was measured: as many bytes in one piece."""
    times_s = []
    for _ in range(2 * REPEATS):
        synchronize()
        began_s = time.perf_counter()
        engine.ask("plain_broadcast", trainer.nbytes)
        sender._group.broadcast(torch.empty(trainer.nbytes, dtype=torch.uint8, device=trainer.device)).wait()
        synchronize()
        times_s.append(time.perf_counter() - began_s)
        engine.answer("plain_broadcast", 60)
    plain_s, received_s = min(times_s), FIGURES["engine: receive with checksums compared, not installed"]
    say("plain broadcast of as many bytes", plain_s, "s")
    say("receive with every checksum compared / plain broadcast", received_s / plain_s)


def sender_of(arguments: argparse.Namespace, trainer: TrainerSide, payload: Any) -> Any:
    from rollout.transport.ipc import IpcSender
    from rollout.transport.nccl import NcclSender

    device, nbytes = torch.device(trainer.device), arguments.bucket_mb << 20
    if arguments.gpus == 2:
        return NcclSender(device, payload=payload, bucket_bytes=nbytes)
    return IpcSender(device, payload=payload, bucket_bytes=nbytes, buffers=arguments.buffers)


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
            sender = sender_of(arguments, trainer, payload)
            with part("engine"):
                say("engine", engine("info"))
            with part("syncs"):
                measure_syncs(trainer, engine, sender)
            with part("kinds of weights"):
                measure_families(trainer, engine, sender)
            with part("generation after all that"):
                say("tokens written", engine("write", 8, 32, trainer.probe[0]))
            with part("parts"):
                measure_parts(trainer, engine, sender)
            if arguments.gpus == 2:
                with part("broadcast"):
                    measure_broadcast(trainer, engine, sender)
            if arguments.fp8:
                with part("quantizer"):
                    measure_quantizer(trainer, engine)
            with part("vLLM's own ways"):
                measure_vllm(trainer, engine)
            if on_gpu and arguments.gpus == 1 and level:
                with part("sleep and wake"):
                    sync(trainer, engine, sender, 600)
                    measure_sleep(trainer, engine, sender, arguments.cycles)
        finally:
            engine.close()
            if arguments.json:
                arguments.json.write_text(json.dumps(FIGURES, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
