"""Tokens per second of one policy update, this project's trainer and transformers on the same model and samples.

    python benchmarks/train_step.py [--json] [--steps 3] [--threads 2]
    python benchmarks/train_step.py --device cuda [--json] [--only ours|peer] [--quick]     see train_step_gpu.py

The work, on a CPU in float32: 256 samples of a tiny DeepSeek-V3 model, the clipped GRPO loss averaged by sequence with
entropy as a metric, gradient clipping, one AdamW update. `equal`: every sample has 16 prompt and 64 completion tokens,
so that nothing is padded. `mixed`: completions of 8 to 64 tokens, as a run has them; we pack, transformers pads every
micro-batch (sorted by length, the best it can do) to its longest. Only real tokens are counted.

transformers computes the same loss in the fewest plain torch lines, in micro-batches of 32, at the fastest of its
attention and expert implementations (each tried once). Both sides must find the same gradient norm. The fastest of
the timed updates counts: a shared machine only ever makes one slower.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import train_step_gpu
from benchmarks.grpo_step import LR, MICRO_BATCH, MODEL, NEW_TOKENS, PROMPT_TOKENS, Result
from trainer.checkpoint.hf import save_folder
from trainer.losses import LossOptions
from trainer.model.v3 import V3Model
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions
from trainer.trainer import Trainer

SAMPLES = 256
# `batched_mm` experts copy the chosen weights for every token: ten times slower here, and not tried.
ATTENTION, EXPERTS = ("eager", "sdpa"), ("eager", "grouped_mm")
LOSS = LossOptions(clip_low=0.2, clip_high=0.2, kl_coef=0.0)


def samples(kind: str) -> list[Sample]:
    random = np.random.default_rng(0)
    lengths = np.full(SAMPLES, NEW_TOKENS) if kind == "equal" else random.integers(8, NEW_TOKENS + 1, SAMPLES)
    draw = lambda n: random.integers(1, MODEL.vocab_size, n).tolist()  # noqa: E731
    return [Sample(draw(PROMPT_TOKENS), draw(n), advantage=float(random.normal())) for n in lengths]


def our_updates(folder: str, work: list[Sample], steps: int, threads: int) -> tuple[list[float], float]:
    """Seconds of each timed update, and the gradient norm of the first."""
    trainer = Trainer(
        PolicyOptions(path=folder, dtype="float32"), OptimizerOptions(lr=LR), LOSS, threads=threads, device="cpu"
    )
    seconds, norms = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        batches = pack(work, MICRO_BATCH * (PROMPT_TOKENS + NEW_TOKENS))
        norms.append(trainer.step([batches])["grad_norm"])
        seconds.append(time.perf_counter() - start)
    return seconds[1:], norms[0]


class Peer:
    """transformers' model with AdamW and the same loss."""

    def __init__(self, folder: str, attention: str, experts: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def update(self, work: list[Sample]) -> float:
        """One update; returns the norm of its gradient."""
        ordered = sorted(work, key=lambda s: -s.length)
        for start in range(0, len(ordered), MICRO_BATCH):
            self._backward(ordered[start : start + MICRO_BATCH])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def _backward(self, part: list[Sample]) -> None:
        longest = max(s.length for s in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros(len(part), longest)
        attention = torch.zeros(len(part), longest, dtype=torch.long)
        for i, s in enumerate(part):
            tokens[i, : s.length] = torch.tensor([*s.prompt_tokens, *s.tokens])
            mask[i, len(s.prompt_tokens) : s.length] = 1
            attention[i, : s.length] = 1
        # no mask where nothing is padded: transformers is faster without one
        logits = self.model(tokens, attention_mask=None if attention.all() else attention, use_cache=False).logits
        log_p = logits[:, PROMPT_TOKENS - 1 : -1].log_softmax(-1)  # completions only, as a careful user would
        new = log_p.gather(-1, tokens[:, PROMPT_TOKENS:, None])[..., 0]
        with torch.no_grad():
            _entropy = -(log_p.exp() * log_p).sum(-1)
        advantages = torch.tensor([s.advantage for s in part])[:, None]
        ratio = (new - new.detach()).exp()
        per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        mask = mask[:, PROMPT_TOKENS:]
        loss = ((per_token * mask).sum(1) / mask.sum(1)).sum() / SAMPLES
        loss.backward()


def peer_updates(folder: str, work: list[Sample], steps: int) -> tuple[list[float], float, str]:
    """Seconds of each timed update at the fastest setting, the gradient norm of the first, and the setting."""
    found: dict[str, tuple[float, float, Peer]] = {}
    for attention in ATTENTION:
        for experts in EXPERTS:
            peer = Peer(folder, attention, experts)
            norm = peer.update(work)
            start = time.perf_counter()
            peer.update(work)
            seconds = time.perf_counter() - start
            name = f"{attention} attention, {experts} experts"
            print(f"  transformers, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
            found[name] = (seconds, norm, peer)
    name = min(found, key=lambda n: found[n][0])
    first, norm, peer = found[name]
    seconds = [first]
    for _ in range(steps - 1):
        start = time.perf_counter()
        peer.update(work)
        seconds.append(time.perf_counter() - start)
    return seconds, norm, name


def measure(folder: str, kind: str, steps: int, threads: int) -> Result:
    import transformers

    work = samples(kind)
    tokens = sum(s.length for s in work)
    ours, our_norm = our_updates(folder, work, steps, threads)
    theirs, their_norm, setting = peer_updates(folder, work, steps)
    if abs(our_norm / their_norm - 1) > 1e-3:
        raise RuntimeError(f"{kind}: our gradient norm is {our_norm}, theirs {their_norm}: not the same work")
    speed = [tokens / min(seconds) for seconds in (ours, theirs)]
    shown = [", ".join(f"{s:.2f}" for s in seconds) for seconds in (ours, theirs)]
    print(f"{kind}: {tokens} tokens; ours {shown[0]} s; {setting} {shown[1]} s", file=sys.stderr, flush=True)
    peer = f"transformers {transformers.__version__} ({setting})"
    return Result(f"train_step.{kind}", speed[0], "tokens/s", peer, speed[1], speed[0] / speed[1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true", help="print the comparison as JSON on standard output")
    arguments.add_argument("--steps", type=int, default=3, help="timed updates of each side")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    train_step_gpu.add_arguments(arguments)
    options = arguments.parse_args()
    if options.device == "cuda":
        return train_step_gpu.main(options)
    torch.set_num_threads(options.threads)
    model = V3Model(MODEL)
    model.init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(model, folder)
        results = [measure(folder, kind, options.steps, options.threads) for kind in ("equal", "mixed")]
    if options.json:
        print(json.dumps([asdict(r) for r in results], indent=2))
    else:
        for r in results:
            print(f"{r.name:18} {r.value:8.0f} {r.unit}   {r.peer} {r.peer_value:8.0f}   {r.ratio:.2f} x")


if __name__ == "__main__":
    main()
