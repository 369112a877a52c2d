"""How far the trainer's log-probabilities are from vLLM's, what brings them nearer, and what it costs: one table.

    python benchmarks/fidelity.py [--json FILE] [--seconds 60] [--only plain,routing,eager,"mtp 1","mtp 2",fp8] [--tiny]

A DeepSeek-V3-architecture model (728 M parameters, and a layer of multi-token prediction) is trained for a minute on
synthetic text, so that its distributions are peaked and its drafts good, by the project's trainer. Engines start
meanwhile from the untrained weights, one process each, all on the one GPU: plain, returning the experts they routed to
(with graphs and eager), and decoding speculatively with one and two drafted tokens. The trained weights reach them as
in a run, through CUDA IPC. Then they write one after the other while the rest idles, and the trainer computes the
log-probabilities of what they wrote, with its own routing and with theirs replayed. A block-FP8 folder of the trained
model is written and served too; last, rows with random weights, whose routers are easily turned. `--tiny` is
for a try on a CPU, where the torch engine returns the routing.

Columns: tokens a second; mean |delta log p|, the k3 estimate of the KL and the share of ratios outside [0.5, 2]; the
share of (token, layer) for which the trainer's router chooses the engine's experts, and the mean share of those experts
(in the pass that is measured); the share of drafted tokens accepted, and the tokens a pass with drafts wrote; of the
weights of TIS and IcePop on the same tokens the share that a bound acted on, and the effective share of the sample,
(sum w)^2 / (n sum w^2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks.worker_process import Engine
from rollout.engine import Request, Rollout, Sampling
from rollout.transport.ipc import IpcSender
from trainer.checkpoint import hf
from trainer.losses import CORRECTION_BOUNDS, combine_metrics, correction_weight, gap_metrics
from trainer.model.moe import agreement
from trainer.model.v3_config import V3Config
from trainer.packing import Sample, pack, to_device
from trainer.policy import PolicyOptions, load_policy

ROWS: list[dict[str, Any]] = []
FIGURES: dict[str, Any] = {"rows": ROWS}
BUDGET = 32_768  # tokens of a micro-batch
FP8 = "fp8"  # the engine that starts from a block-FP8 folder of the trained model


def say(name: str, value: Any, unit: str = "") -> None:
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


# ---- the text and the model ----


class Text:
    """Documents whose first token names a topic; a word is followed by its topic's next word with a probability of its
    own, 0.55 to 0.99, else by any."""

    def __init__(self, words: int, topics: int = 4, first_id: int = 16):
        rng = np.random.default_rng(0)
        self.words, self.topics, self.first_id = words, topics, first_id
        self.after = np.stack([rng.permutation(words) for _ in range(topics)])
        self.sure = 0.55 + 0.44 * rng.random(words)

    def documents(self, count: int, length: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        topic = rng.integers(0, self.topics, count)
        words = np.empty((count, length - 1), np.int64)
        words[:, 0] = rng.integers(0, self.words, count)
        for t in range(1, length - 1):
            before = words[:, t - 1]
            follows = rng.random(count) < self.sure[before]
            words[:, t] = np.where(follows, self.after[topic, before], rng.integers(0, self.words, count))
        return np.concatenate([2 + topic[:, None], self.first_id + words], axis=1)


def model_config(tiny: bool) -> V3Config:
    from benchmarks.weight_sync import model_config as without_prediction

    return replace(without_prediction(tiny), num_nextn_predict_layers=1, initializer_range=0.02 if not tiny else 0.08)


def pretrain(trainer: Any, text: Text, seconds: float, documents: int, length: int) -> None:
    """For `seconds` after the first step, which compiles the kernels."""
    began_s, step, last_s = None, 0, 0.0
    while began_s is None or time.perf_counter() - began_s < seconds:
        samples = [Sample((), d.tolist(), loss_on_prompt=True) for d in text.documents(documents, length, seed=step)]
        metrics = trainer.next_token_step(pack(samples, BUDGET // 4), mtp_weight=0.3)
        began_s = began_s or time.perf_counter()
        step += 1
        if time.perf_counter() - last_s > 8:
            last_s = time.perf_counter()
            shown = {k: round(metrics[k], 3) for k in ("loss", "mtp_loss", "grad_norm", "router_max_violation")}
            print(f"    step {step}, {last_s - began_s:.0f} s: {shown}", flush=True)
    took_s = time.perf_counter() - began_s
    say("pre-training: steps", step)
    say("pre-training: tokens/s (beside starting engines)", (step - 1) * documents * length / took_s)
    say("pre-training: loss", metrics["loss"], "nats")
    say("pre-training: loss of the prediction layer", metrics["mtp_loss"], "nats")


# ---- engines ----


def engine_options(tiny: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and options of every engine, by name."""
    if tiny:
        common = {"dtype": "bfloat16", "max_context": 200, "max_batch": 32}
        cpu = {**common, "enforce_eager": True, "kv_cache_memory_bytes": 32 << 20}
        return {
            "plain": ("vllm", cpu),
            "routing": ("torch", {**common, "return_routed_experts": True}),
            "mtp 1": ("vllm", {**cpu, "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}),
        }
    common = {
        "dtype": "bfloat16", "max_context": 2048, "max_batch": 128, "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": 0.1, "enable_prefix_caching": True,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256, 384]},
    }  # fmt: skip
    routing = {**common, "return_routed_experts": True}
    eager = {k: v for k, v in routing.items() if k != "compilation_config"} | {"enforce_eager": True}
    drafts = [{"speculative_config": {"method": "mtp", "num_speculative_tokens": n}} for n in (1, 2)]
    return {
        "plain": ("vllm", common),
        "routing": ("vllm", routing),
        "eager": ("vllm", eager),
        "mtp 1": ("vllm", routing | drafts[0]),
        "mtp 2": ("vllm", routing | drafts[1]),
    }


# ---- what is measured ----


class Work:
    """What every engine writes: `count` completions of `tokens` tokens, of prompts that all differ (`apart`), or of
    groups of eight that share theirs (`together`)."""

    def __init__(self, text: Text, count: int, prompt: int, tokens: int):
        self.documents = text.documents(count, prompt, seed=10_000_000).tolist()
        self.sampling = Sampling(tokens, temperature=1.0, ignore_eos=True)

    def apart(self) -> list[Request]:
        return [Request(f"a{i}", 0, tuple(d), self.sampling) for i, d in enumerate(self.documents)]

    def together(self) -> list[Request]:
        return [
            Request(f"t{i}", s, tuple(d), self.sampling)
            for i, d in enumerate(self.documents[: len(self.documents) // 8])
            for s in range(8)
        ]

    def warm_up(self) -> list[Request]:
        short = replace(self.sampling, max_tokens=16)
        return [Request(f"w{i}", 0, tuple(d[::-1]), short) for i, d in enumerate(self.documents)]


@torch.no_grad()
def fidelity(policy: Any, rollouts: list[Rollout], replay: bool) -> dict[str, Any]:
    """The trainer's side of one row."""
    samples = [
        Sample(r.prompt_tokens, r.tokens, 0.0, r.logprobs, routed_experts=r.routed_experts if replay else None)
        for r in rollouts
    ]
    recorded = [replace(s, routed_experts=r.routed_experts) for s, r in zip(samples, rollouts, strict=True)]
    parts, deltas, agreed = [], [], torch.zeros(3, dtype=torch.int64)
    for batch, record in zip(pack(samples, BUDGET), pack(recorded, BUDGET), strict=True):
        trained = policy.logprobs(batch)[0].cpu()[batch.loss_mask]
        written = batch.behaviour_logprobs[batch.loss_mask]
        parts.append(gap_metrics(trained, written))
        deltas.append(trained - written)
        if record.routed_experts is not None:
            there = to_device(record, policy.device)
            out = policy.module(there.tokens, there.positions, there.bounds, there.routed_experts if replay else None)
            if replay:
                agreed += out.agreement.sum(0).cpu()
            else:
                for layer, own in enumerate(out.experts.unbind(1)):
                    agreed += agreement(own, there.routed_experts[:, layer]).cpu()
    found: dict[str, Any] = combine_metrics(parts)
    if agreed[0]:
        k = policy.module.config.num_experts_per_tok
        found |= {"agreement": (agreed[1] / agreed[0]).item(), "overlap": (agreed[2] / (k * agreed[0])).item()}
    ratio = torch.cat(deltas).double().exp()
    for kind in ("tis", "icepop"):
        weight, bounded = correction_weight(ratio, kind, *CORRECTION_BOUNDS[kind])
        found[f"{kind} bounded"] = bounded.double().mean().item()
        found[f"{kind} effective"] = (weight.sum().square() / (len(weight) * weight.square().sum())).item()
    return found


def row(name: str, policy: Any, rollouts: list[Rollout], speed: float | None, replay: bool) -> dict[str, Any]:
    found = {"row": name, "tokens/s": speed, **fidelity(policy, rollouts, replay)}
    if drafted := sum(r.drafts[1] for r in rollouts):
        passes, accepted = (sum(r.drafts[i] for r in rollouts) for i in (0, 2))
        found |= {"acceptance": accepted / drafted, "tokens a pass": 1 + accepted / passes}
    ROWS.append(found)
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
    print(f"  row {json.dumps(shown)}", flush=True)
    return found


def measure(name: str, engine: Engine, policy: Any, work: Work) -> None:
    """The rows of one engine that holds the policy's weights."""
    engine("write", work.warm_up())
    for how, requests in (("apart", work.apart()), ("together", work.together())):
        if how == "together" and name not in ("plain", "routing"):
            continue
        rollouts = engine("write", requests)
        speed = sum(len(r.tokens) for r in rollouts) / engine.took_s
        title = name if how == "apart" else f"{name}, groups share prompts (prefix cache)"
        row(title, policy, rollouts, speed, replay=False)
        if rollouts[0].routed_experts is not None:
            known = np.mean([(r.routed_experts[:-1] >= 0).all() for r in rollouts])
            say(f"{title}: rollouts whose every token read has its routing", float(known))
            row(f"{title} + replay", policy, rollouts, speed, replay=True)


def update(engine: Engine, policy: Any, version: int, mtp: bool = False) -> None:
    """Twice: the second goes the direct way, where there is one."""
    sender = IpcSender(torch.device(policy.device))
    for number in (version, version + 1):
        update = sender.prepare(policy.layout(mtp), number)
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(sender.send, policy.weights(mtp))
            engine("update", update)
        sent.result()
    sender.close()


@torch.no_grad()
def randomize(policy: Any, scale: float = 0.04, seed: int = 0) -> None:
    """Weights as the benchmark of the weight sync draws them: broad distributions, routers that are easily turned."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    for name, tensor in policy.weights():
        if tensor.ndim > 1:
            tensor.normal_(0.0, scale, generator=generator)
        else:
            tensor.fill_(0.0 if "bias" in name else 1.0)


def measure_step(trainer: Any, rollouts: list[Rollout]) -> None:
    """A step of reinforcement learning with and without replay, at a rate of 0: all steps meet the same policy."""
    trainer.optimizer.options = trainer.optimizer.options.model_copy(update={"lr": 0.0, "router_bias_gamma": 0.0})
    for replay in (False, True, False, True):
        samples = [
            Sample(r.prompt_tokens, r.tokens, 1.0, r.logprobs, routed_experts=r.routed_experts if replay else None)
            for r in rollouts
        ]
        batches = pack(samples, BUDGET // 2)
        began_s = time.perf_counter()
        metrics = trainer.step([batches])
        name = f"step of {sum(len(b.tokens) for b in batches)} tokens, replay {'on' if replay else 'off'}"
        say(f"{name}: time", time.perf_counter() - began_s, "s")
        names = ("gap", "gap_k3", "gap_outside", "router_agreement", "router_overlap")
        print("    ", {key: metrics[key] for key in names if key in metrics}, flush=True)


def table() -> None:
    columns = {
        "tokens/s": "tokens/s", "gap": "|dlogp|", "gap_k3": "k3", "gap_outside": "outside", "agreement": "same set",
        "overlap": "overlap", "acceptance": "accepted", "tokens a pass": "a pass", "tis bounded": "TIS cut",
        "tis effective": "TIS eff", "icepop bounded": "Ice cut", "icepop effective": "Ice eff",
    }  # fmt: skip
    width = max((len(r["row"]) for r in ROWS), default=3)
    print("\n" + " " * width + "".join(f"{title:>10}" for title in columns.values()))
    for found in ROWS:
        cells = (f"{found[c]:>10.4g}" if isinstance(found.get(c), float) else f"{'-':>10}" for c in columns)
        print(f"{found['row']:<{width}}" + "".join(cells))
    by_name = {found["row"]: found for found in ROWS}
    for name, found in by_name.items():
        if (replayed := by_name.get(f"{name} + replay")) is not None:
            say(f"{name}: k3 falls with replay by", found["gap_k3"] / max(replayed["gap_k3"], 1e-12), "x (target 3)")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, after every part")
    parser.add_argument("--seconds", type=float, default=60.0, help="of pre-training")
    parser.add_argument("--only", help="names of engines, with commas (none: all)")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else [*engine_options(arguments.tiny), FP8]

    from trainer.losses import LossOptions
    from trainer.optimizer import OptimizerOptions
    from trainer.trainer import Trainer

    tiny, device = arguments.tiny, "cuda" if torch.cuda.is_available() else "cpu"
    text = Text(words=48 if tiny else 512)
    work = Work(text, count=16, prompt=32, tokens=32) if tiny else Work(text, count=256, prompt=256, tokens=256)
    engines: dict[str, Engine] = {}

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(FIGURES, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory(prefix="rlzero-fidelity-") as scratch:
        folder = Path(scratch) / "bf16"
        made = PolicyOptions(init=model_config(tiny).to_hf(), dtype="bfloat16")
        optimizer = OptimizerOptions(
            lr=3e-3 if tiny else 5e-4, warmup_steps=10, moments="bfloat16", router_bias_gamma=1e-3
        )
        trainer = Trainer(made, optimizer, LossOptions(kl_coef=0.0), seed=0, device=device)
        policy = trainer.policy
        parameters = sum(p.numel() for p in policy.module.parameters())
        say("model", f"{parameters / 1e6:.1f} M parameters, the prediction layer included")
        hf.save_folder(policy.module, folder)
        try:
            for name, (kind, options) in engine_options(tiny).items():
                if name in only:
                    engines[name] = Engine(kind, str(folder), options, f"{scratch}/{name}")
            with part("pre-training"):
                pretrain(trainer, text, arguments.seconds, *((16, 64) if tiny else (64, 512)))
            if device == "cuda":
                say("trainer: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
                torch.cuda.empty_cache()
            if FP8 in only and not tiny:
                with part("block-FP8 folder"):
                    hf.save_folder(policy.module, Path(scratch) / "fp8", format="fp8")
                    size = sum(f.stat().st_size for f in (Path(scratch) / "fp8").glob("*.safetensors"))
                    say("block-FP8 folder", size / 1e9, "GB")
                    eager = engine_options(False)["eager"][1]
                    engines[FP8] = Engine("vllm", str(Path(scratch) / "fp8"), eager, f"{scratch}/FP8")
            for name, engine in list(engines.items()):
                with part(f"start of {name}"):
                    try:
                        say(f"{name}: ready after", engine.ready(), "s (all started together)")
                    except BaseException:
                        engines.pop(name).close()
                        raise
            keep()
            if FP8 in engines:
                with part("block-FP8 engine"):
                    measure("FP8 folder", engines[FP8], policy, work)
                    rollouts = engines[FP8]("write", work.apart())
                    stored = load_policy(PolicyOptions(path=str(Path(scratch) / "fp8")), device)
                    row("FP8 folder, trainer holds its weights", stored, rollouts, None, replay=False)
                    row("FP8 folder, trainer holds its weights + replay", stored, rollouts, None, replay=True)
                    del stored
                engines.pop(FP8).close()
                keep()
            for version, name in enumerate(sorted(engines, key="routing".__eq__), start=1):  # that one last
                with part(name):
                    update(engines[name], policy, 10 * version, mtp="mtp" in name)
                    say(f"{name}: update took", engines[name].took_s, "s")
                    say(f"{name}: way, tensors, read back", engines[name]("installed"))
                    measure(name, engines[name], policy, work)
                if name != "routing":
                    engines.pop(name).close()
                keep()
            if "routing" in engines:
                with part("a step with replay"):
                    measure_step(trainer, engines["routing"]("write", work.apart()[: len(work.documents) // 2]))
                with part("random weights"):
                    randomize(policy)
                    update(engines["routing"], policy, 1000)
                    rollouts = engines["routing"]("write", work.apart())
                    row("random weights, routing", policy, rollouts, None, replay=False)
                    row("random weights, routing + replay", policy, rollouts, None, replay=True)
        finally:
            for engine in engines.values():
                engine.close()
            table()
            keep()


if __name__ == "__main__":
    main()
