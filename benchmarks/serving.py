"""vLLM's serving features that take two GPUs, one engine each: tokens a second, and whether every update holds.

    python benchmarks/serving.py [--json FILE]

Engines start side by side on the same two GPUs and are measured one after the other: plain on one GPU, tensor parallel,
with the experts spread over the GPUs (expert parallel), with redundant experts that load balancing moves every 100
passes, and expert parallel with speculative decoding. Each writes with the weights it started from, after an update to
other weights, and after one to a third set: by then load balancing has moved experts twice. The gap is that of the
trainer, on one of the GPUs, with the engine's routing replayed; weights are random (`fidelity.randomize`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"  # its all-reduce would use NVLink's multicast

import torch

from benchmarks.fidelity import FIGURES, Text, Work, model_config, part, randomize, row, say, table, update
from benchmarks.worker_process import Engine, placement
from trainer.checkpoint import hf
from trainer.policy import PolicyOptions, load_policy

BALANCING = {"use_async": False, "num_redundant_experts": 2, "window_size": 50, "step_interval": 100}


def engine_options() -> dict[str, dict[str, Any]]:
    common = {
        "dtype": "bfloat16", "max_context": 2048, "max_batch": 128, "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": 0.1, "return_routed_experts": True,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]},
    }  # fmt: skip
    two = {**common, "tensor_parallel_size": 2}
    experts = {**two, "enable_expert_parallel": True}
    return {
        "one GPU": common,
        "TP 2": two,
        "TP 2, EP": experts,
        "TP 2, EP, EPLB": {**experts, "enable_eplb": True, "eplb_config": BALANCING},
        "TP 2, EP, MTP 1": {**experts, "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
    }


def measure(name: str, engine: Engine, policy: Any, work: Work, start: dict[str, torch.Tensor]) -> None:
    balanced = "EPLB" in name
    with torch.no_grad():
        for key, tensor in policy.weights(mtp=True):
            tensor.copy_(start[key])
    engine("write", work.warm_up())
    for turn, title in enumerate(("as started", "first update", "second update")):
        if turn:
            randomize(policy, seed=turn)
            update(engine, policy, 10 * turn, mtp="MTP" in name)
            say(f"{name}, {title}: took", engine.took_s, "s")
            say(f"{name}, {title}: way, tensors, read back", engine("installed"))
            if balanced:
                say(f"{name}, {title}: places of experts, moved", engine("inside", placement))
        rollouts = engine("write", work.apart())
        speed = sum(len(r.tokens) for r in rollouts) / engine.took_s
        row(f"{name}, {title}", policy, rollouts, speed, replay=True)
        if balanced:
            say(f"{name}, {title}, after writing: places, moved", engine("inside", placement))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, after every part")
    arguments = parser.parse_args()
    work = Work(Text(words=512), count=256, prompt=256, tokens=256)
    engines: dict[str, Engine] = {}

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(FIGURES, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory(prefix="rlzero-serving-") as scratch:
        policy = load_policy(PolicyOptions(init=model_config(False).to_hf()), "cuda")
        randomize(policy)
        start = {name: tensor.cpu() for name, tensor in policy.weights(mtp=True)}
        hf.save_folder(policy.module, Path(scratch) / "model")
        try:
            for name, options in engine_options().items():
                engines[name] = Engine("vllm", f"{scratch}/model", options, f"{scratch}/{name}")
            for name, engine in list(engines.items()):
                with part(f"start of {name}"):
                    try:
                        say(f"{name}: ready after", engine.ready(), "s (all started together)")
                    except BaseException:
                        engines.pop(name).close()
                        raise
            for name in list(engines):
                with part(name):
                    measure(name, engines[name], policy, work, start)
                engines.pop(name).close()
                keep()
        finally:
            for engine in engines.values():
                engine.close()
            table()
            keep()


if __name__ == "__main__":
    main()
