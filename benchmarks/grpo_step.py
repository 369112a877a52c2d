"""Seconds per GRPO step, this project and TRL's GRPOTrainer on the same work, taking turns in one process.

    python benchmarks/grpo_step.py [--json] [--steps 3] [--only ours|trl]

The work: one tiny DeepSeek-V3 model (float32), 32 prompts of 16 tokens, 8 completions of exactly 64 tokens each, the
same arbitrary rewards, GRPO averaged by sequence without a KL term, one AdamW update, new weights in the engine. TRL
runs at the best of the settings tried: generation by transformers in one batch of 256, micro-batches of 32, eager
attention and experts. The first step of each side is not counted; of the others the fastest is (a shared machine only
ever makes a step slower), and all are printed. TRL is needed by this program alone (extra `dev`).

`generation` is the time in which completions are written, `update` all the rest of the step: rewards and advantages,
loss, gradient, optimizer, metrics, and here the weight sync into the engine (TRL generates with the trained module).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from trainer.checkpoint.hf import save_folder
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS, MICRO_BATCH = 32, 8, 16, 64, 32
LR = 1e-5
MODEL = V3Config(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    first_k_dense_replace=1,
    n_shared_experts=1,
    max_position_embeddings=256,
    pad_token_id=0,
)


@dataclass
class Step:
    """Seconds of one step."""

    generation: float
    total: float

    @property
    def update(self) -> float:
        return self.total - self.generation


@dataclass
class Result:
    """One line of `--json`. `ratio` is how many times better than the peer."""

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float
    ratio: float


def prompts() -> list[list[int]]:
    return np.random.default_rng(0).integers(1, MODEL.vocab_size, (PROMPTS, PROMPT_TOKENS)).tolist()


def reward(tokens: list[int]) -> float:
    """Anything that differs within a group."""
    return (sum(tokens) % 7) / 7


# --- TRL -------------------------------------------------------------------------------------------------------------


def tokenizer():
    """One word for each id of the model. The end of sequence is an id beyond the vocabulary: it is never sampled, so
    every completion has its full length without a processor that would slow generation down."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(MODEL.vocab_size)} | {"<eos>": MODEL.vocab_size}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="<eos>", padding_side="left")


def trl_steps(folder: str, steps: int, between: Callable[[], None] = lambda: None) -> list[Step]:
    """`steps` timed steps of TRL's trainer, after one that is not; `between` is called after each of them, outside
    the timing."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    generation: list[float] = []
    totals: list[float] = []

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            generation.append(time.perf_counter() - start)
            return result

    class Clock(TrainerCallback):
        start = 0.0

        def on_train_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            totals.append(time.perf_counter() - self.start)
            between()
            self.start = time.perf_counter()

    def rewards(completion_ids, **_):
        assert all(len(ids) == NEW_TOKENS for ids in completion_ids), "a completion ended early: not the same work"
        return [reward(list(ids)) for ids in completion_ids]

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = Timed(
            model=model,
            reward_funcs=rewards,
            args=GRPOConfig(
                output_dir=output,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=PROMPTS * GROUP // MICRO_BATCH,
                num_generations=GROUP,
                max_completion_length=NEW_TOKENS,
                temperature=1.0,
                beta=0.0,
                loss_type="grpo",
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_steps=steps + 1,
                shuffle_dataset=False,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": [" ".join(f"t{t}" for t in p) for p in prompts()]}),
            processing_class=tokenizer(),
            callbacks=[Clock()],
        )
        trainer.train()
    if len(generation) != steps + 1:
        raise RuntimeError(f"TRL generated {len(generation)} times in {steps + 1} steps: not the work described above")
    return [Step(g, t) for g, t in zip(generation[1:], totals[1:], strict=True)]


# --- this project ----------------------------------------------------------------------------------------------------


def our_steps(folder: str, threads: int) -> Iterator[Step]:
    """Timed steps of this project's engine and trainer, without end; the first is a warm-up."""
    from rlzero.rl.advantages import grpo
    from rollout.engine import Request, Sampling, generate
    from rollout.torch.engine import TorchEngine
    from trainer.losses import LossOptions
    from trainer.optimizer import OptimizerOptions
    from trainer.packing import Sample, pack
    from trainer.policy import PolicyOptions
    from trainer.trainer import Trainer

    engine = TorchEngine(folder, dtype="float32", threads=threads, max_batch=PROMPTS * GROUP)
    trainer = Trainer(
        PolicyOptions(path=folder, dtype="float32"),
        OptimizerOptions(lr=LR),
        LossOptions(clip_low=0.2, clip_high=0.2, kl_coef=0.0),
        seed=0,
        threads=threads,
        device="cpu",
    )
    for step in itertools.count():
        start = time.perf_counter()
        sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, seed=step)
        rollouts = generate(
            engine,
            [Request(str(i), j, tuple(p), sampling) for i, p in enumerate(prompts()) for j in range(GROUP)],
        )
        generated = time.perf_counter()
        assert all(len(r.tokens) == NEW_TOKENS for r in rollouts), "a completion ended early: not the same work"
        advantages = grpo(np.array([reward(r.tokens) for r in rollouts]).reshape(PROMPTS, GROUP)).ravel()
        samples = [
            Sample(r.prompt_tokens, r.tokens, advantage=float(a), behaviour_logprobs=r.logprobs, versions=r.versions)
            for r, a in zip(rollouts, advantages, strict=True)
        ]
        metrics = trainer.step([pack(samples, MICRO_BATCH * (PROMPT_TOKENS + NEW_TOKENS))])
        engine.update(iter(trainer.weights()), step + 1)
        end = time.perf_counter()
        if not metrics["gap"] < 1e-4:
            raise RuntimeError(f"engine and trainer differ by {metrics['gap']} nats a token: not one policy")
        yield Step(generated - start, end - start)


# --- side by side ----------------------------------------------------------------------------------------------------


def show(side: str, steps: list[Step]) -> None:
    best, middle = min(steps, key=lambda s: s.total), statistics.median(s.total for s in steps)
    every = ", ".join(f"{s.total:.2f}" for s in steps)
    print(
        f"{side:16} step {best.total:6.2f} s   generation {best.generation:6.2f} s   update {best.update:6.2f} s   "
        f"{PROMPTS * GROUP * NEW_TOKENS / best.generation:6.0f} tokens/s   (steps: {every}; median {middle:.2f})",
        file=sys.stderr,
        flush=True,
    )


def compare(ours: list[Step], theirs: list[Step], peer: str) -> list[Result]:
    a, b = (min(steps, key=lambda s: s.total) for steps in (ours, theirs))
    results = [
        Result(f"grpo_step.{part}", x, "s", peer, y, y / x)
        for part, x, y in (
            ("step", a.total, b.total),
            ("generation", a.generation, b.generation),
            ("update", a.update, b.update),
        )
    ]
    speed = [PROMPTS * GROUP * NEW_TOKENS / s.generation for s in (a, b)]
    return [*results, Result("grpo_step.generated", speed[0], "tokens/s", peer, speed[1], speed[0] / speed[1])]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true", help="print the comparison as JSON on standard output")
    arguments.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--only", choices=("ours", "trl"), help="run one side and print its times")
    options = arguments.parse_args()
    if options.only != "ours" and importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed: `pip install trl`, or give --only ours")
    torch.set_num_threads(options.threads)

    model = V3Model(MODEL)
    model.init_weights(0)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {options.threads} threads, torch {torch.__version__}", file=sys.stderr)
    ours: list[Step] = []
    theirs: list[Step] = []
    # TRL prints its metrics; standard output is for the result alone
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        save_folder(model, folder)
        turns = our_steps(folder, options.threads)
        if options.only == "ours":
            ours = list(itertools.islice(turns, options.steps + 1))
        elif options.only == "trl":
            theirs = trl_steps(folder, options.steps)
        else:
            theirs = trl_steps(folder, options.steps, between=lambda: ours.append(next(turns)))
        turns.close()
    ours = ours[1:]
    if ours:
        show("this project", ours)
    if theirs:
        show("TRL", theirs)
    if not ours or not theirs:
        return
    results = compare(ours, theirs, f"TRL {importlib.metadata.version('trl')} GRPOTrainer")
    if options.json:
        print(json.dumps([asdict(r) for r in results], indent=2))
    else:
        for r in results:
            print(f"{r.name:24} {r.value:9.2f} {r.unit:8} {r.peer} {r.peer_value:9.2f}   {r.ratio:.2f} x")


if __name__ == "__main__":
    main()
