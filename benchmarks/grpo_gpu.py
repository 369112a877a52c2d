"""Whole GRPO steps on one and on two GPUs, through the program itself: `Run` and `loop.train`, vLLM, the V3 trainer.

    python benchmarks/grpo_gpu.py [--gpus 1|2] [--only one,async] [--prompt-tokens N] [--budget-s 540]
    python benchmarks/grpo_gpu.py --learn     # configs/demo.yaml on the GPU
    python benchmarks/grpo_gpu.py --tiny      # the same program on a CPU with the torch engine, two steps each

Settings, each a run of its own; one that fails is told and the others still run:

    one            one GPU, trainer and engine on it, awake (what the plan chooses)
    sleep          the same, the engine asleep (level 2) while the trainer works
    checkpointing  the same as `one`, every layer made again in the backward pass
    disaggregated  two GPUs, one each, synchronous
    async          the same, the engine one step ahead (staleness 1, truncated importance sampling)
    partial        the same, and half as many groups again are open: a step ends with the first that are complete
    two            two GPUs, a trainer rank and an engine on each

The model has 728 M parameters (random, BF16), the tokens that end a completion are 1 in 128 of its vocabulary: lengths
spread from 1 to the limit as if drawn. What a step writes is fixed; how much it trains on is set by the length of the
prompts, which an engine reads once for a group and the trainer once for a sample. `one` measures both, and the length
is then chosen so that writing and training take equally long (--prompt-tokens skips that).

Prints, of the steps after the first: steps an hour, tokens a second, the seconds of a step's parts, how busy each GPU
was (NVML, sampled), memory planned and measured. JSON to $OUT/grpo_gpu.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0", "NCCL_NVLS_ENABLE": "0",
}  # fmt: skip
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})

PROMPTS, GROUP, MAX_TOKENS, MICRO_BATCH = 32, 16, 256, 16_384
ENDING = 128  # every so many-th token ends a completion
FIRST_PROMPT_TOKENS, MOST_PROMPT_TOKENS = 1024, 3584
TINY = {"prompts": 2, "group": 4, "max_tokens": 24, "micro_batch": 512, "prompt_tokens": 16}
SETTINGS = {1: ("one", "sleep", "checkpointing"), 2: ("one", "disaggregated", "async", "partial", "two")}
LEAST_S = 75  # a setting takes at least so long: with less left it is not begun
OVERHEAD, ASYNC, PLAN = 0.05, 1.6, 0.15  # targets
FIGURES: dict[str, Any] = {"settings": {}}

# --- what the runs' configs name: data and reward --------------------------------------------------------------------


def prompts(tokens: int, vocabulary: int, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose prompt has exactly `tokens` tokens, none of which ends a text."""
    import random

    draw = random.Random(seed)
    words = [f"t{i}" for i in range(1, vocabulary) if i % ENDING]
    return [{"prompt": " ".join(draw.choices(words, k=tokens))} for _ in range(count)]


def coin(completion: str) -> float:
    """0 or 1: differs within a group, and costs nothing."""
    return float(zlib.crc32(completion.encode()) % 2)


# --- the model -------------------------------------------------------------------------------------------------------


def make_model(folder: Path, tiny: bool) -> None:
    """Random weights drawn on the GPU, a tokenizer with one word for each token, and several tokens that end a text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.weight_sync import model_config
    from trainer.checkpoint.hf import save_folder
    from trainer.model.layers import RMSNorm
    from trainer.model.v3 import V3Model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model_config(tiny)
    with torch.device("meta"):
        model = V3Model(config).to(torch.float32 if tiny else torch.bfloat16)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)
        for router in model.routers():
            router.bias.zero_()
    save_folder(model, folder)
    words = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0").save_pretrained(folder)
    ends = list(range(0, config.vocab_size, ENDING))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


# --- settings --------------------------------------------------------------------------------------------------------


def engine_arguments(completions: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of vLLM: everything in one batch. CUDA graphs of decoding alone need no compilation, which would cost half a
    minute at every start."""
    arguments: dict[str, Any] = {"max_batch": completions, "max_num_batched_tokens": 8192}
    if options.eager:
        arguments["enforce_eager"] = True
    else:
        sizes = [s for s in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512) if s <= completions]
        graphs: dict[str, Any] = {"cudagraph_capture_sizes": sizes}
        if not options.compiled:
            graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        arguments["compilation_config"] = graphs
    return {**arguments, **json.loads(options.engine_args)}


def config_of(name: str, folder: Path, output: Path, options: argparse.Namespace):
    """The run's config."""
    import yaml

    from rlzero.config.rl import Config

    tiny = options.tiny
    shape = TINY if tiny else {"prompts": PROMPTS, "group": GROUP, "max_tokens": MAX_TOKENS, "micro_batch": MICRO_BATCH}
    length = TINY["prompt_tokens"] if tiny else options.prompt_tokens or FIRST_PROMPT_TOKENS
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    completions = shape["prompts"] * shape["group"]
    me = str(Path(__file__).resolve())
    tree: dict[str, Any] = {
        "name": name, "output_dir": str(output), "steps": options.steps or (2 if tiny else 4),
        "policy": {"path": str(folder), "dtype": "float32" if tiny else "bfloat16"},
        "data": {"train": f"{me}:prompts", "template": "none", "max_prompt_tokens": length,
                 "params": {"tokens": length, "vocabulary": vocabulary, "count": 16 * shape["prompts"]}},
        "rewards": [{"fn": f"{me}:coin"}],
        "batch": {"prompts": shape["prompts"], "group_size": shape["group"], "minibatches": 1,
                  "tokens_per_micro_batch": shape["micro_batch"]},
        "rollout": {"max_tokens": shape["max_tokens"], "max_gap": 1e-3 if tiny else 0.2},
        "algorithm": {"reference_refresh_steps": 0},
        "loss": {"kl_coef": 1e-3}, "optimizer": {"lr": 1e-6, "moments": "bfloat16"},
        "checkpoint": {"every": 0}, "cluster": {}, "tracking": [],
    }  # fmt: skip
    rollout = tree["rollout"]
    if tiny:
        tree |= {"device": "cpu", "reward_workers": 1}
        rollout |= {"engine": "torch"}
    else:
        tree |= {"device": "cuda"}
        rollout |= {"engine": "vllm", "engine_args": engine_arguments(completions, options)}
    if name in ("one", "sleep", "checkpointing", "two") and not tiny:
        tree["cluster"]["placement"] = "colocated"
    if name == "sleep":
        rollout.setdefault("engine_args", {})["sleep_level"] = 2
    if name == "checkpointing":
        tree["policy"]["activation_checkpointing"] = True
    if name in ("disaggregated", "async", "partial") and not tiny:
        tree["cluster"]["placement"] = "disaggregated"
    if name in ("async", "partial"):
        tree |= {"staleness": 1, "steps": options.steps or (2 if tiny else 6)}
        tree["loss"]["correction"] = "tis"
    if name == "partial":
        rollout["oversample"] = 1.5
    if name == "two":
        tree["parallel"] = {"dp": 2}
        rollout["workers"] = 2
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return Config.load(path)


# --- a run, watched --------------------------------------------------------------------------------------------------


class Gpus:
    """Samples how busy every GPU is and what it holds, in a thread. Nothing where there is no NVML."""

    def __init__(self, period_s: float = 0.05):
        self.samples: list[tuple[float, list[int], list[int]]] = []  # time, percent busy, bytes
        self.period_s, self._stop = period_s, threading.Event()
        self.idle = self._read()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.idle is not None:
            self._thread.start()

    def _read(self) -> tuple[list[int], list[int]] | None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            busy = [pynvml.nvmlDeviceGetUtilizationRates(h).gpu for h in handles]
            return busy, [int(pynvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles]
        except Exception:  # no library, no driver
            return None

    def _watch(self) -> None:
        while not self._stop.wait(self.period_s):
            found = self._read()
            if found is not None:
                self.samples.append((time.monotonic(), *found))

    def close(self) -> None:
        self._stop.set()

    def between(self, start_s: float, end_s: float) -> dict[str, list[float]]:
        """Of each GPU: share of the time in which some kernel ran, and the most bytes beyond those of an idle one."""
        inside = [s for s in self.samples if start_s <= s[0] <= end_s]
        if not inside or self.idle is None:
            return {}
        count = len(inside[0][1])
        return {
            "busy": [round(statistics.mean(s[1][i] for s in inside) / 100, 3) for i in range(count)],
            "peak_gib": [round((max(s[2][i] for s in inside) - self.idle[1][i]) / 2**30, 2) for i in range(count)],
        }

    def wait_until_free(self, deadline_s: float = 30.0, still_s: float = 3.0) -> None:
        """Until the processes of the run before have given their memory back, or nothing was given back for a while."""
        now_s = time.monotonic()
        until_s, falling_s, least = now_s + deadline_s, now_s, float("inf")
        while self.idle is not None and (now_s := time.monotonic()) < until_s and now_s - falling_s < still_s:
            found = self._read()
            if found is None or all(a - b < 1 << 28 for a, b in zip(found[1], self.idle[1], strict=True)):
                return
            if sum(found[1]) < least - (1 << 24):
                least, falling_s = sum(found[1]), now_s
            time.sleep(0.2)


def run_once(config, gpus: Gpus, save: bool = False) -> dict[str, Any]:
    """Runs `config` to its end and returns its lines of metrics, when each step ended, and its plan."""
    from rlzero.report.log import read_lines
    from rlzero.rl import loop
    from rlzero.rl.run import Run

    class Watched(Run):
        """Notes how long engines take to sleep, which the loop counts as training, and saves no checkpoint."""

        async def make_room(self) -> None:
            with self.clock("sleep"):
                await super().make_room()

        async def save(self, step: int) -> None:
            if save:
                await super().save(step)
            self.step = step

    ends: list[float] = []
    began_s = time.monotonic()

    def watch(event: str, data: dict) -> None:
        if event == "step":
            ends.append(time.monotonic())
            parts = {k[5:-2]: round(v, 2) for k, v in data.items() if k.startswith("time_")}
            print(f"    step {data['step']}: {parts} gap {data.get('gap', float('nan')):.4f}", flush=True)
        elif event == "evaluation":
            print(f"    evaluation {data['step']}: pass@1 {data['pass_at_1']:.1%}", flush=True)

    async def go():
        run = Watched(config, resume=False, watch=watch)
        if run.gpu is not None:
            print(
                f"    plan: sleep level {run.gpu.sleep_level}, cache {run.gpu.cache_bytes / 2**30:.2f} GiB, trainer "
                f"{run.gpu.trainer.peak / 2**30:.1f} GiB, engine {run.gpu.engine.peak / 2**30:.1f} GiB, of "
                f"{run.gpu.device.nbytes / 2**30:.1f} GiB",
                flush=True,
            )
        async with run:
            started_s = time.monotonic()
            await loop.train(run)
            return run.gpu, started_s

    plan, started_s = asyncio.run(go())
    gpus.wait_until_free()
    return {
        "lines": read_lines(config.run_dir / "metrics.jsonl"), "ends": ends, "plan": plan,
        "start_s": started_s - began_s, "first_s": started_s,
    }  # fmt: skip


def figures_of(config, found: dict[str, Any], gpus: Gpus) -> dict[str, Any]:
    """What a setting's steps say, the first left out (kernels are compiled in it) and, where the engine is ahead, the
    last, in which it has nothing left to write."""
    lines, ends = found["lines"], [found["first_s"], *found["ends"]]
    first = min(1 + config.staleness, len(lines) - 1)
    last = max(first + 1, len(lines) - config.staleness)
    counted = lines[first:last]

    def mean(name: str) -> float:
        return statistics.mean(line.get(name, 0.0) for line in counted)

    step_s = (ends[last] - ends[first]) / len(counted)
    sleep_s = mean("time_sleep_s")
    rollout_s, train_s, sync_s = mean("time_rollout_s"), mean("time_train_s") - sleep_s, mean("time_sync_s")
    prompt = config.data.params["tokens"]
    completions, written = mean("completions"), mean("rollout_tokens")
    result = {
        "steps_per_hour": 3600 / step_s,
        "tokens_per_s": (written + completions * prompt) / step_s,
        "written_tokens_per_s": written / step_s,
        "step_s": step_s, "rollout_s": rollout_s, "train_s": train_s, "sync_s": sync_s, "sleep_s": sleep_s,
        "else_s": step_s - rollout_s - train_s - sync_s - sleep_s,
        "overhead": (step_s - rollout_s - train_s) / step_s,
        "length_mean": mean("length_mean"), "prompt_tokens": prompt, "gap": mean("gap"), "sync_gap": mean("sync_gap"),
        "engine_start_s": found["start_s"], "counted_steps": len(counted),
        **gpus.between(ends[first], ends[last]),
    }  # fmt: skip
    return result | {"memory": memory_of(found["plan"], lines)}


def memory_of(plan, lines: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Planned and measured bytes in GiB, and by how much the plan is off. Of a process: what torch's allocator held;
    CUDA's context is in the device's figure alone."""
    if plan is None:
        return {}
    from rlzero.plan.memory import CONTEXT

    def largest(name: str) -> float:
        return max(line.get(name, 0.0) for line in lines)

    def without_context(held) -> int:
        return held.peak - held.parts.get(CONTEXT, 0)

    pairs = {
        "trainer, allocated": (plan.trainer.allocated, largest("memory_trainer_allocated_bytes")),
        "trainer, reserved": (without_context(plan.trainer), largest("memory_trainer_reserved_bytes")),
        "engine, reserved": (without_context(plan.engine), largest("memory_engine_reserved_bytes")),
        "trainer's GPU, all": (plan.on_trainer, largest("memory_device_bytes")),
    }
    return {
        name: {"planned_gib": a / 2**30, "measured_gib": b / 2**30, "off": a / b - 1}
        for name, (a, b) in pairs.items()
        if b
    }


def show(name: str, f: dict[str, Any]) -> None:
    print(
        f"{name:14} {f['steps_per_hour']:7.0f} steps/h {f['tokens_per_s']:9,.0f} tokens/s "
        f"({f['written_tokens_per_s']:,.0f} written)  step {f['step_s']:.2f} s = rollout {f['rollout_s']:.2f} + train "
        f"{f['train_s']:.2f} + sync {f['sync_s']:.2f} + sleep {f['sleep_s']:.2f} + else {f['else_s']:.2f}  "
        f"gap {f['gap']:.4f}  GPUs busy {f.get('busy', 'unknown')}",
        flush=True,
    )
    for part, m in f["memory"].items():
        met = "met" if abs(m["off"]) <= PLAN else "MISSED"
        print(
            f"    memory {part:20} planned {m['planned_gib']:6.2f} GiB  measured {m['measured_gib']:6.2f} GiB  "
            f"{m['off']:+.1%} ({met})",
            flush=True,
        )


def balanced(f: dict[str, Any]) -> int:
    """Tokens of a prompt at which training takes as long as writing, from a run in which each had the GPU alone."""
    completions = PROMPTS * GROUP
    rate = completions * (f["prompt_tokens"] + f["length_mean"]) / f["train_s"]
    tokens = f["rollout_s"] * rate / completions - f["length_mean"]
    return max(64, min(MOST_PROMPT_TOKENS, round(tokens / 32) * 32))


def targets(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("one", "sleep", "two"):
        if name in done:
            found[f"overhead colocated ({name}) at most {OVERHEAD:.0%}"] = (
                done[name]["overhead"], done[name]["overhead"] <= OVERHEAD,
            )  # fmt: skip
    if "disaggregated" in done:
        base = done["disaggregated"]
        found["writing / training, disaggregated (the comparison asks for about 1)"] = (
            base["rollout_s"] / base["train_s"], 0.75 <= base["rollout_s"] / base["train_s"] <= 1.33,
        )  # fmt: skip
        for name in ("async", "partial"):
            if name in done:
                ratio = done[name]["steps_per_hour"] / base["steps_per_hour"]
                found[f"{name} over disaggregated synchronous, at least {ASYNC}"] = (ratio, ratio >= ASYNC)
        if "two" in done:
            ratio = done["two"]["steps_per_hour"] / base["steps_per_hour"]
            found["colocated on both over disaggregated synchronous (no target)"] = (ratio, None)
    off = {f"{n}, {p}": m["off"] for n, f in done.items() for p, m in f["memory"].items() if p != "trainer, allocated"}
    if off:
        worst = max(off, key=lambda k: abs(off[k]))
        found[f"memory planned within {PLAN:.0%} of measured, worst: {worst}"] = (off[worst], abs(off[worst]) <= PLAN)
    return found


# --- configs/demo.yaml on the GPU ------------------------------------------------------------------------------------


def learn(output: Path, options: argparse.Namespace) -> None:
    """The demo's 30 steps. Beside engine and device: BF16, vLLM's only type for MLA on a GPU, and the gap that comes
    with it."""
    from rlzero.config.rl import Config
    from rlzero.report.html import summary

    changed = [
        "device=cuda", "rollout.engine=vllm", "policy.dtype=bfloat16", "rollout.max_gap=0.1",
        f"rollout.engine_args={json.dumps(engine_arguments(512, options))}",
        f"output_dir={output}", "tracking=[]",
    ]  # fmt: skip
    if options.steps:
        changed.append(f"steps={options.steps}")
    os.chdir(ROOT)
    print(f"configs/demo.yaml {' '.join(changed)}", flush=True)
    config = Config.load("configs/demo.yaml", changed)
    gpus = Gpus()
    began_s = time.monotonic()
    found = run_once(config, gpus, save=True)
    gpus.close()
    figures = summary(config.run_dir)
    wall_s = time.monotonic() - began_s
    steps = found["lines"][1:]
    FIGURES["learn"] = {
        "before": figures["pass_at_1_before"], "after": figures["pass_at_1_after"], "wall_s": wall_s,
        "engine_start_s": found["start_s"], "step_s": statistics.mean(line["time_step_s"] for line in steps),
        "gap": statistics.mean(line["gap"] for line in steps), "memory": memory_of(found["plan"], found["lines"]),
    }  # fmt: skip
    f = FIGURES["learn"]
    print(
        f"learn: pass@1 {f['before']:.1%} -> {f['after']:.1%} (two CPU cores: 30.4 % -> 84.9 %), {wall_s:.0f} s with "
        f"{f['engine_start_s']:.0f} s of start (CPU: 354 s), {f['step_s']:.2f} s a step, gap {f['gap']:.4f}",
        flush=True,
    )


# --- everything ------------------------------------------------------------------------------------------------------


def tail_of_logs(lines: int = 30) -> None:
    """The end of what actors wrote: where vLLM says why it did not start."""
    logs = Path("/tmp/ray/session_latest/logs")
    files = sorted((f for f in logs.glob("worker-*.err") if f.stat().st_size), key=lambda f: f.stat().st_mtime)
    for file in files[-2:]:
        text = file.read_text(errors="replace").splitlines()[-lines:]
        print(f"--- {file.name}\n" + "\n".join(text), flush=True)


def write_figures() -> None:
    if out := os.environ.get("OUT"):
        (Path(out) / "grpo_gpu.json").write_text(json.dumps(FIGURES, indent=1) + "\n")


def settings(names: list[str], folder: Path, output: Path, options: argparse.Namespace) -> None:
    gpus = Gpus()
    done = FIGURES["settings"]
    began_s = time.monotonic()
    for name in names:
        left_s = options.budget_s - (time.monotonic() - began_s)
        if done and left_s < LEAST_S and not options.tiny:
            print(f"{name}: not run, {left_s:.0f} s are left of --budget-s {options.budget_s:.0f}", flush=True)
            continue
        start_s = time.monotonic()
        try:
            config = config_of(name, folder, output, options)
            print(f"--- {name}: prompts of {config.data.max_prompt_tokens} tokens", flush=True)
            found = run_once(config, gpus)
            done[name] = figures_of(config, found, gpus)
            show(name, done[name])
            if name == "one" and not options.prompt_tokens and not options.tiny:
                options.prompt_tokens = balanced(done[name])
                print(f"    prompts of {options.prompt_tokens} tokens from here on: writing = training", flush=True)
        except Exception:
            FIGURES[f"{name} FAILED"] = traceback.format_exc()
            print(f"--- {name} FAILED\n{FIGURES[f'{name} FAILED']}", flush=True)
            tail_of_logs()
            gpus.wait_until_free()
        print(f"    ({name}: {time.monotonic() - start_s:.0f} s)", flush=True)
        write_figures()
    gpus.close()
    if options.tiny:
        return  # nothing here says anything of speed
    for text, (value, met) in targets(done).items():
        said = {True: "met", False: "MISSED", None: ""}[met]
        FIGURES.setdefault("targets", {})[text] = [value, said]
        print(f"{text}: {value:.3f} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(1, 2), help="none: as many as there are")
    parser.add_argument("--only", help="names of settings, with commas")
    parser.add_argument("--steps", type=int, help="of each run; none: 4, or 6 where the engine is ahead")
    parser.add_argument("--prompt-tokens", type=int, help="none: chosen after the first setting")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no setting begins when less than 75 s are left")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles the model too (slow start)")
    parser.add_argument("--engine-args", default="{}", help="JSON, laid over those of the engine")
    parser.add_argument("--learn", action="store_true", help="configs/demo.yaml on the GPU, nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: does the program run?")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make, options.tiny)
        return
    from rlzero.cluster import ray_cluster as cluster

    with tempfile.TemporaryDirectory(prefix="rlzero-grpo-gpu-") as temporary:
        folder, output = Path(temporary, "model"), Path(temporary, "runs")
        folder.mkdir()
        output.mkdir()
        store_bytes = 1 << 29 if options.tiny else None  # several ranks hand their weights over through it
        cluster.connect(None, max(8, os.cpu_count() or 1), store_bytes)  # one Ray for all runs
        if options.learn:
            try:
                learn(output, options)
            except Exception:
                FIGURES["learn FAILED"] = traceback.format_exc()
                print(f"--- learn FAILED\n{FIGURES['learn FAILED']}", flush=True)
                tail_of_logs()
        else:
            # in a process of its own: this one holds nothing of a GPU
            me = [sys.executable, str(Path(__file__).resolve()), "--make", str(folder)]
            subprocess.run(me + ["--tiny"] * options.tiny, check=True)
            if options.tiny:
                names = ["one", "async", "two"]
            else:
                import torch

                names = list(SETTINGS[options.gpus or min(2, torch.cuda.device_count())])
            settings(options.only.split(",") if options.only else names, folder, output, options)
        write_figures()


if __name__ == "__main__":
    main()
