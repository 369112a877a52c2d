"""Tokens per second of training on several GPUs of one host against one GPU: weak scaling, the same work for each GPU.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py [--json] [--steps 8] [--only dp,ep,sent]

Work: `v3-2b` (train_step_gpu.py: 2.03 B parameters, BF16, FP32 masters, BF16 moments), next-token training on 16 x 1024
tokens a GPU, each update with its optimizer step; `x4` accumulates four such micro-batches a GPU before the update.
`dp` shards everything over all GPUs (FSDP2); `ep` also shares out the experts among them; `sent` does with every token
sent to the ranks of its experts alone, as among many (trainer.parallel.experts). One GPU is measured on every GPU at
once, each with a trainer of its own, and the slowest counts: what several are compared with is as warm as they.
First the gradient norms of one update on the same tokens must agree. Times are medians; the last step is profiled:
communication, and how much of it no computation covered (exposed).

Targets: an efficiency of 90 % (dp) and 80 % (ep) on two H100s.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks.train_step_gpu import LOSS, OPTIMIZER, V3_2B, documents
from trainer import trainer as worker
from trainer.batch import Batch
from trainer.model.v3 import V3Model
from trainer.packing import Sample, pack
from trainer.parallel import experts
from trainer.parallel.ranks import ParallelOptions
from trainer.parallel.sharded_policy import ShardedV3Policy
from trainer.policy import PolicyOptions, V3Policy
from trainer.trainer import Trainer

TOKENS = 16_384  # of a micro-batch, one a GPU
GATHER_RANKS = experts.GATHER_RANKS
AGREE = 0.02  # of gradient norms: BF16 products of differently shaped batches


def fill(shapes: dict[str, torch.Size], parts: dict[str, torch.Tensor], rows) -> None:
    """The same weights however they are split: every parameter from a seed of its own, `rows(name)` of it kept."""
    with torch.no_grad():
        for seed, (name, shape) in enumerate(shapes.items()):
            if name.endswith("router.bias"):
                parts[name].zero_()
            elif len(shape) == 1:
                parts[name].fill_(1.0)
            else:
                generator = torch.Generator("cuda").manual_seed(seed)
                whole = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
                whole.normal_(0.0, V3_2B.initializer_range, generator=generator)
                first, count = rows(name)
                parts[name].copy_(whole[first : first + count])


def trainer(parallel: ParallelOptions) -> Trainer:
    options = PolicyOptions(init={})
    with torch.device("meta"):
        module = V3Model(V3_2B).to(torch.bfloat16)
    shapes = {name: t.shape for name, t in [*module.named_parameters(), *module.named_buffers()]}

    def one(*_) -> V3Policy:
        whole = module.to_empty(device="cuda")
        fill(shapes, dict([*whole.named_parameters(), *whole.named_buffers()]), lambda name: (0, shapes[name][0]))
        return V3Policy(whole, options, torch.device("cuda"))

    def several(_, ranks, __) -> ShardedV3Policy:
        policy = ShardedV3Policy(module, options, ranks)
        fill(shapes, policy.parts(), policy.rows_of)
        return policy

    with mock.patch.object(worker, "load_policy", one), mock.patch.object(worker, "load_sharded_policy", several):
        return Trainer(options, OPTIMIZER, LOSS, device="cuda", parallel=parallel)


def batches(micro_batches: int) -> list[Batch]:
    rows = documents(f"{16 * micro_batches}x1024")
    return pack([Sample((), row, loss_on_prompt=True) for row in rows], TOKENS)


def slowest(seconds: float) -> float:
    """Of all ranks."""
    value = torch.tensor(seconds, device="cuda")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def timed(t: Trainer, work: list[Batch], steps: int, warm_up: int = 2) -> tuple[float, float]:
    """Median seconds of an update, and the peak memory in GB."""
    for _ in range(warm_up):
        t.next_token_step(work)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        slowest(0.0)  # start together
        torch.cuda.synchronize()
        start = time.perf_counter()
        t.next_token_step(work)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return slowest(statistics.median(seconds)), torch.cuda.max_memory_allocated() / 1e9


def profile(t: Trainer, work: list[Batch], name: str) -> dict[str, float]:
    """Milliseconds of one update: from its first to its last kernel, computing, communicating (NCCL), communicating
    with nothing computed meanwhile (exposed), idle; of the idle time, what passed before the host had issued the next
    kernel (`host_late`), and how long the host took to issue the update. Rank 0 prints the longest of both."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    t.next_token_step(work)
    slowest(0.0)
    with torch.profiler.profile(activities=activities) as recorded:
        start = time.perf_counter()
        t.next_token_step(work)
        issued = time.perf_counter() - start  # the step's last act is to read the norm: up to there
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=_start)
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    spans = [(e["ts"], e["ts"] + e["dur"], "nccl" in e["name"].lower()) for e in kernels]
    everything = _union([(a, b) for a, b, _ in spans])
    compute = _union([(a, b) for a, b, nccl in spans if not nccl])
    communication = _union([(a, b) for a, b, nccl in spans if nccl])
    busy = _length(everything)
    gaps, end, before = [], kernels[0]["ts"], ""
    for e in kernels:
        if e["ts"] > end:
            late = min(max(launches.get(e["args"].get("correlation"), 0.0) - end, 0.0), e["ts"] - end)
            gaps.append((e["ts"] - end, late, before, e["name"]))
        if e["ts"] + e["dur"] > end:
            end, before = e["ts"] + e["dur"], e["name"]
    if dist.get_rank() == 0:
        _show(name, kernels, gaps)
    return {
        "step_ms": (everything[-1][1] - everything[0][0]) / 1e3,
        "compute_ms": _length(compute) / 1e3,
        "communication_ms": _length(communication) / 1e3,
        "exposed_ms": (busy - _length(compute)) / 1e3,
        "idle_ms": sum(gap for gap, *_ in gaps) / 1e3,
        "host_late_ms": sum(late for _, late, *_ in gaps) / 1e3,
        "host_ms": 1e3 * issued,
        "kernels": len(kernels),
    }


def _show(name: str, kernels: list[dict], gaps: list[tuple]) -> None:
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for e in kernels:
        entry = total[e["name"][:70]]
        entry[0] += e["dur"] / 1e3
        entry[1] += 1
    print(f"{name}: the longest kernels of an update")
    for kernel, (ms, count) in sorted(total.items(), key=lambda item: -item[1][0])[:28]:
        print(f"    {ms:8.2f} ms {count:5} x {kernel}")
    between: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for gap, late, before, after in gaps:
        entry = between[(before[:44], after[:44])]
        entry[0], entry[1], entry[2] = entry[0] + gap / 1e3, entry[1] + late / 1e3, entry[2] + 1
    print(f"{name}: the longest idle times (of them: the host had not issued the next kernel)")
    for (before, after), (ms, late, count) in sorted(between.items(), key=lambda item: -item[1][0])[:14]:
        print(f"    {ms:8.2f} ms ({late:6.2f}) {count:4} x between {before} and {after}")


def _start(event: dict) -> float:
    return event["ts"]


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


class Report:
    """Figures, printed by rank 0 as they come."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, name: str, value: float, unit: str) -> None:
        self.figures[name] = value
        if dist.get_rank() == 0:
            print(f"{name:34} {value:12,.3f} {unit}", flush=True)
            if out := os.environ.get("OUT"):  # each time: a rank that hangs ends the program
                (Path(out) / "scaling.json").write_text(json.dumps(self.figures, indent=1) + "\n")


def measure(name: str, parallel: ParallelOptions, arguments: argparse.Namespace, report: Report) -> None:
    gpus = dist.get_world_size()
    experts.GATHER_RANKS = 1 if name == "sent" else GATHER_RANKS
    t = trainer(parallel)
    alone = parallel.ranks == 1
    work = {1: batches(gpus), 4: batches(4 * gpus)}
    norm = t.next_token_step(work[1])["grad_norm"]
    report.add(f"{name}.first_norm", norm, "gradient norm of the same tokens")
    expected = report.figures.get("one.first_norm", norm)
    if abs(norm / expected - 1) > AGREE and dist.get_rank() == 0:
        print(f"WRONG {name}: gradient norm {norm}, one GPU found {expected} on the same tokens", flush=True)
    for each, label in ((1, ""), (4, ".x4")):
        steps = arguments.steps if each == 1 else max(2, arguments.steps // 3)
        mine = batches(each) if alone else work[each]
        seconds, peak = timed(t, mine, steps, warm_up=2 if each == 1 else 1)
        tokens = gpus * each * TOKENS / seconds  # of all GPUs together
        report.add(f"{name}{label}.tokens_per_s", tokens / (gpus if alone else 1), "tokens/s")
        report.add(f"{name}{label}.update_ms", 1e3 * seconds, "ms")
        report.add(f"{name}{label}.peak", peak, "GB on rank 0")
        if not alone and f"one{label}.tokens_per_s" in report.figures:
            single = report.figures[f"one{label}.tokens_per_s"]
            report.add(f"{name}{label}.efficiency", 100 * tokens / gpus / single, f"% of {gpus} x one GPU")
    for part, value in profile(t, batches(1) if alone else work[1], name).items():
        report.add(f"{name}.profile.{part}", value, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print all figures as JSON at the end")
    parser.add_argument("--steps", type=int, default=8, help="timed updates")
    parser.add_argument("--only", default="dp,ep", help="of dp, ep, sent, beside one GPU")
    arguments = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=60))
    gpus = dist.get_world_size()
    kinds = {"one": ParallelOptions()}
    if gpus > 1:
        every = {"dp": ParallelOptions(dp=gpus), "ep": ParallelOptions(dp=gpus, ep=gpus)}
        every["sent"] = every["ep"]
        kinds |= {name: every[name] for name in arguments.only.split(",")}
    report = Report()
    began = time.perf_counter()
    for name, parallel in kinds.items():
        try:
            measure(name, parallel, arguments, report)
        except Exception:
            print(f"rank {dist.get_rank()}: {name} failed\n{traceback.format_exc()}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        slowest(0.0)
    report.add("seconds", time.perf_counter() - began, "s in all")
    if dist.get_rank() == 0 and arguments.json:
        print(json.dumps(report.figures, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
