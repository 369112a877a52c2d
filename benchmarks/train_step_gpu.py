"""The CUDA part of benchmarks/train_step.py: whole training steps of a 2 B-parameter DeepSeek-V3 on one GPU.

Work, each with its optimizer step: next-token training on 8 x 2048 and 16 x 1024 tokens (`8x2048`, `16x1024`: nothing
is padded), on documents of 256 to 2048 tokens (`mixed`: we pack, transformers pads micro-batches sorted by length; real
tokens are counted), log-probabilities of 256 samples of 1024 tokens without gradient and one GRPO update on them
(`logprobs`, `grpo`: 256 prompt and 768 completion tokens, micro-batches of 16).

We keep FP32 masters and BF16 moments. transformers keeps everything in BF16 (weights, gradients, moments), experts by
grouped_mm, SDPA attention, fused AdamW; each of its settings (compiled whole, compiled by layer, as it is, with and
without activation checkpointing) is tried in turn, and the fastest counts. First both train a small model from one
folder: loss and gradient norm must agree. `states` are weights, gradients, masters and moments: 10 bytes a parameter
on our side (16 bits of a master beside its weight), 8 on theirs; peak less states is what the step itself takes. Model
FLOPs are 6 x active parameters + causal attention, forward and backward, recomputation not counted; shares are of 989
TFLOP/s (H100, BF16 dense).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from unittest import mock

import numpy as np
import torch

from benchmarks.grpo_step import Result
from trainer import trainer as worker
from trainer.batch import Batch
from trainer.checkpoint.hf import save_folder
from trainer.losses import LossOptions
from trainer.model.layers import RMSNorm
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, V3Policy
from trainer.trainer import Trainer

V3_2B = V3Config(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=768,
    num_hidden_layers=12,
    num_attention_heads=16,
    n_routed_experts=32,
    num_experts_per_tok=6,
    kv_lora_rank=512,
    q_lora_rank=768,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=1,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=4096,
)
SMALL = dataclasses.replace(
    V3_2B, vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, n_routed_experts=16, q_lora_rank=128,
)  # fmt: skip
PEAK_TFLOPS = 989.0
TOKENS = 16_384  # of a micro-batch
LR = 1e-5
OPTIMIZER = OptimizerOptions(lr=LR, moments="bfloat16")
LOSS = LossOptions(clip_low=0.2, clip_high=0.2, kl_coef=0.0)
PROMPT, COMPLETION, SAMPLES = 256, 768, 256
WORK = ("8x2048", "16x1024", "mixed", "logprobs", "grpo")


@dataclass(frozen=True)
class Setting:
    """How the peer computes."""

    compiled: str = "no"  # "no", "whole" or "layers"
    checkpointing: bool = False

    def __str__(self) -> str:
        text = {"no": "not compiled", "whole": "compiled", "layers": "layers compiled"}[self.compiled]
        return text + (", checkpointing" if self.checkpointing else "")


# What is tried, on which work, in the order in which it matters should time run out. Compiling the whole model takes a
# minute for every shape, by layer a sixth of that. Checkpointing is slower, and as much leaner on other work.
SETTINGS = (
    (Setting("whole"), ("8x2048",)),
    (Setting("layers"), WORK),
    (Setting("whole"), ("16x1024",)),
    (Setting("no"), WORK),
    (Setting("layers", checkpointing=True), ("8x2048",)),
    (Setting("no", checkpointing=True), ("8x2048",)),
)


@dataclass
class Figures:
    seconds: float
    tokens: int
    flops: float
    peak_gb: float
    norm: float = 0.0
    states_gb: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def show(self, work: str, who: str) -> None:
        tflops = self.flops / self.seconds / 1e12
        print(
            f"{work:9} {who:44} {self.tokens_per_s:9,.0f} tokens/s {1e3 * self.seconds:9.1f} ms {tflops:6.1f} TFLOP/s "
            f"{tflops / PEAK_TFLOPS:6.1%} peak {self.peak_gb:5.1f} GB (states {self.states_gb:4.1f})  "
            f"norm {self.norm:.4f}",
            flush=True,
        )


# --- the work --------------------------------------------------------------------------------------------------------


def documents(work: str, vocabulary: int = V3_2B.vocab_size) -> list[list[int]]:
    """Token ids of every document of a next-token step."""
    random = np.random.default_rng(0)
    if work == "mixed":  # 32 k real tokens, so that sorting by length has something to sort
        lengths: list[int] = []
        while sum(lengths) < 2 * TOKENS - 2048:
            lengths.append(int(random.integers(256, 2049)))
    else:
        rows, columns = map(int, work.split("x"))
        lengths = [columns] * rows
    return [random.integers(1, vocabulary, n).tolist() for n in lengths]


def rl_samples(count: int) -> list[Sample]:
    random = np.random.default_rng(1)
    draw = lambda n: random.integers(1, V3_2B.vocab_size, n).tolist()  # noqa: E731
    return [Sample(draw(PROMPT), draw(COMPLETION), advantage=float(random.normal())) for _ in range(count)]


def padded(rows: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Micro-batches (tokens, attention mask or None) of at most TOKENS tokens with the padding, longest rows first."""
    ordered = sorted(rows, key=len, reverse=True)
    batches = []
    while ordered:
        width = len(ordered[0])
        part, ordered = ordered[: TOKENS // width], ordered[TOKENS // width :]
        tokens = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for i, row in enumerate(part):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        # no mask where nothing is padded: transformers is faster without one
        batches.append((tokens.cuda(), None if mask.all() else mask.cuda()))
    return batches


def active_parameters(config: V3Config) -> int:
    """Parameters that multiply a token: embedding and the experts it is not sent to left out."""
    with torch.device("meta"):
        model = V3Model(config)
    idle = (config.n_routed_experts - config.num_experts_per_tok) * 3 * config.hidden_size
    idle *= config.moe_intermediate_size * config.moe_layers
    return sum(p.numel() for p in model.parameters()) - model.embed.numel() - idle


def model_flops(config: V3Config, lengths: list[int], backward: bool = True) -> float:
    """2 (6 with the backward pass) x active parameters a token, and causal attention."""
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    forward = 2 * active_parameters(config) * sum(lengths) + attention * sum(n * n for n in lengths)
    return (3 if backward else 1) * forward


# --- ours ------------------------------------------------------------------------------------------------------------


def our_trainer(checkpointing: bool | str = False) -> Trainer:
    """A trainer of V3_2B whose weights are drawn on the GPU: two billion draws on the CPU take longer than the rest."""
    with torch.device("meta"):
        module = V3Model(V3_2B, activation_checkpointing=checkpointing).to(torch.bfloat16)
    module = module.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                if isinstance(part, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, V3_2B.initializer_range, generator=generator)
        for router in module.routers():
            router.bias.zero_()
    options = PolicyOptions(init={}, activation_checkpointing=checkpointing)
    policy = V3Policy(module, options, torch.device("cuda"))
    with mock.patch.object(worker, "load_policy", lambda *_: policy):
        return Trainer(options, OPTIMIZER, LOSS, device="cuda")


def next_token_batches(rows: list[list[int]]) -> list[Batch]:
    return pack([Sample((), row, loss_on_prompt=True) for row in rows], TOKENS)


def gigabytes(parameters: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> float:
    """Of the parameters, their gradients, and the optimizer's tensors."""
    return (sum(2 * p.nbytes for p in parameters) + sum(t.nbytes for t in others)) / 1e9


def ours(work: str, steps: int, checkpointing: bool | str = False) -> Figures:
    trainer = our_trainer(checkpointing)
    figures = our_figures(trainer, work, steps)
    figures.states_gb = gigabytes(trainer.policy.module.parameters(), []) + trainer.optimizer.nbytes / 1e9
    return figures


def our_figures(trainer: Trainer, work: str, steps: int) -> Figures:
    if work in ("logprobs", "grpo"):
        samples = rl_samples(SAMPLES)
        batches, lengths = pack(samples, TOKENS), [s.length for s in samples]
        if work == "logprobs":
            return timed(lambda: trainer.logprobs(batches) and 0.0, lengths, 1, lambda: trainer.logprobs(batches[:2]),
                         backward=False)  # fmt: skip
        return timed(lambda: trainer.step([batches])["grad_norm"], lengths, 1, lambda: trainer.step([batches[:2]]))
    rows = documents(work)
    batches = next_token_batches(rows)
    return timed(lambda: trainer.next_token_step(batches)["grad_norm"], [len(r) for r in rows], steps)


def timed(
    step: Callable[[], float | torch.Tensor],
    lengths: list[int],
    steps: int,
    warm_up: Callable[[], object] | None = None,
    backward: bool = True,
) -> Figures:
    """Median of three times a step (a single one where steps is 1), the first ones not counted. The peak is that of all
    timed steps."""
    for _ in range(2):
        (warm_up or step)()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds, norm = [], 0.0
    for _ in range(1 if steps == 1 else 3):
        start = time.perf_counter()
        for _ in range(steps):
            norm = step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / steps)
    flops = model_flops(V3_2B, lengths, backward)
    return Figures(
        statistics.median(seconds), sum(lengths), flops, torch.cuda.max_memory_allocated() / 1e9, float(norm)
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def _statistics(
    logits: torch.Tensor, chosen: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the chosen tokens, and entropies without gradient: a metric."""
    log_p = logits.float().log_softmax(-1)
    logprobs = log_p.gather(-1, chosen[..., None])[..., 0]
    if not entropy:
        return logprobs, None
    log_p = log_p.detach()
    return logprobs, -(log_p.exp() * log_p).sum(-1)


class Peer:
    """transformers' model in BF16 with fused AdamW, its moments in BF16 too."""

    def __init__(self, setting: Setting, folder: str | None = None):
        from transformers import AutoConfig, AutoModelForCausalLM

        chosen = {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
        if folder is None:
            fields = V3_2B.to_hf()
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            with torch.device("cuda"):
                self.model = AutoModelForCausalLM.from_config(config, **chosen)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, **chosen).cuda()
        self.model.train()
        if setting.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if setting.compiled == "layers":
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        self.call = torch.compile(self.model, dynamic=False) if setting.compiled == "whole" else self.model
        compiled = setting.compiled != "no"
        self.statistics = torch.compile(_statistics, dynamic=False) if compiled else _statistics
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def update(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def next_token_step(self, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
        predicted = sum((tokens if mask is None else mask)[:, 1:].count_nonzero() for tokens, mask in batches)
        for tokens, mask in batches:
            labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
            out = self.call(
                input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False, num_items_in_batch=predicted
            )
            self.loss = out.loss.detach()
            out.loss.backward()
        return self.update()

    def completion_logprobs(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and, with gradient, entropies [rows, completion]: the logits of the completion alone, in
        float32."""
        logits = self.call(input_ids=tokens, use_cache=False, logits_to_keep=COMPLETION + 1).logits[:, :-1]
        return self.statistics(logits, tokens[:, PROMPT:], torch.is_grad_enabled())

    @torch.no_grad()
    def logprobs(self, batches: list[torch.Tensor]) -> float:
        for tokens in batches:
            self.completion_logprobs(tokens)[0].cpu()
        return 0.0

    def grpo(self, batches: list[torch.Tensor], advantages: list[torch.Tensor]) -> torch.Tensor:
        for tokens, advantage in zip(batches, advantages, strict=True):
            new, _ = self.completion_logprobs(tokens)
            ratio = (new - new.detach()).exp()
            per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (per_token.mean(1).sum() / SAMPLES).backward()
        return self.update()


def theirs(work: str, steps: int, setting: Setting) -> Figures:
    peer = Peer(setting)
    figures = their_figures(peer, work, steps)
    moments = (t for state in peer.optimizer.state.values() for t in state.values())
    figures.states_gb = gigabytes(peer.model.parameters(), moments)
    return figures


def their_figures(peer: Peer, work: str, steps: int) -> Figures:
    if work in ("logprobs", "grpo"):
        samples = rl_samples(SAMPLES)
        rows = torch.tensor([[*s.prompt_tokens, *s.tokens] for s in samples]).cuda()
        batches = list(rows.split(TOKENS // rows.shape[1]))
        advantages = [a[:, None] for a in torch.tensor([s.advantage for s in samples]).cuda().split(len(batches[0]))]
        lengths = [s.length for s in samples]
        if work == "logprobs":
            return timed(lambda: peer.logprobs(batches), lengths, 1, lambda: peer.logprobs(batches[:2]), backward=False)
        warm_up = lambda: peer.grpo(batches[:2], advantages[:2])  # noqa: E731
        return timed(lambda: peer.grpo(batches, advantages), lengths, 1, warm_up)
    rows = documents(work)
    batches = padded(rows)
    return timed(lambda: peer.next_token_step(batches), [len(r) for r in rows], steps)


# --- both ------------------------------------------------------------------------------------------------------------


def check_same_work() -> None:
    """One next-token step of a small model from one folder, in BF16: the loss within 0.2 %, the norm within 2 %."""
    model = V3Model(SMALL).init_weights(0)
    rows = [row[: 40 * (i + 1)] for i, row in enumerate(documents("8x2048", SMALL.vocab_size))]
    with tempfile.TemporaryDirectory() as folder:
        save_folder(model.to(torch.bfloat16), folder)
        trainer = Trainer(PolicyOptions(path=folder), OPTIMIZER, device="cuda")
        found = trainer.next_token_step(next_token_batches(rows))
        peer = Peer(Setting(), folder)
        norm = peer.next_token_step(padded(rows)).item()
    print(
        f"same work: loss ours {found['loss']:.5f}, theirs {peer.loss.item():.5f}; gradient norm ours "
        f"{found['grad_norm']:.5f}, theirs {norm:.5f}",
        flush=True,
    )
    if abs(found["loss"] / peer.loss.item() - 1) > 2e-3 or abs(found["grad_norm"] / norm - 1) > 2e-2:
        raise RuntimeError("loss or gradient norm differ: not the same work")


def attempt(work: str, who: str, measure: Callable[[], Figures]) -> Figures | None:
    """A side's figures, printed; None, with the traceback printed, if it fails."""
    start = time.perf_counter()
    try:
        figures = measure()
        figures.show(work, who)
        return figures
    except Exception:  # the next setting may still work; what failed is said in full
        print(f"{work} {who} FAILED:\n{traceback.format_exc()}", flush=True)
        return None
    finally:
        torch._dynamo.reset()  # compiled code holds on to its model
        gc.collect()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated() / 1e9
        if left > 0.1:  # it would count in the next peak
            print(f"    {left:.1f} GB are still allocated after {work}, {who}", flush=True)
        print(f"    ({time.perf_counter() - start:.1f} s with building and warming up)", file=sys.stderr, flush=True)


def compare(work: str, mine: Figures | None, peers: dict[Setting, Figures], version: str) -> list[Result]:
    """Speed beside the fastest peer's, and peak memory beside that same peer's; nothing unless both sides ran."""
    if not peers or mine is None:
        return []
    fastest = max(peers, key=lambda s: peers[s].tokens_per_s)
    best = peers[fastest]
    peer = f"transformers {version} ({fastest})"
    ratio = mine.tokens_per_s / best.tokens_per_s
    beside = mine.peak_gb - mine.states_gb, best.peak_gb - best.states_gb
    return [
        Result(f"train_step.{work}", mine.tokens_per_s, "tokens/s", peer, best.tokens_per_s, ratio),
        Result(f"train_step.{work}.memory", mine.peak_gb, "GB", peer, best.peak_gb, best.peak_gb / mine.peak_gb),
        Result(f"train_step.{work}.memory_beside_states", beside[0], "GB", peer, beside[1], beside[1] / beside[0]),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("ours", "peer"), help="CUDA: run one side")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="CUDA: which work")
    parser.add_argument("--quick", action="store_true", help="CUDA: 8x2048 alone, the peer compiled by layer alone")
    parser.add_argument("--budget-s", type=float, default=200.0, help="CUDA: no measurement begins after this")


def main(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    # the peer's step has no fixed shapes in memory either; both sides get the same allocator
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import transformers

    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{active_parameters(V3_2B) / 1e9:.3f} B active parameters, embedding not counted",
        flush=True,
    )
    left = lambda: options.budget_s - (time.perf_counter() - start)  # noqa: E731
    if options.only is None:
        try:
            check_same_work()
        except Exception:  # a broken check is no reason to lose the measurements; it is said in full
            print(f"the check that both do the same work FAILED:\n{traceback.format_exc()}", flush=True)
    chosen = ["8x2048"] if options.quick else options.work
    mine: dict[str, Figures | None] = {}
    if options.only != "peer":
        for work in chosen:
            mine[work] = attempt(work, "ours", lambda work=work: ours(work, options.steps))
        if "8x2048" in chosen:
            for kept in ("selective", True):
                name = "ours, selective checkpointing" if kept == "selective" else "ours, checkpointing"
                attempt("8x2048", name, lambda kept=kept: ours("8x2048", options.steps, kept))
    peers: dict[str, dict[Setting, Figures]] = {work: {} for work in chosen}
    if options.only != "ours":
        tried = [(setting, work) for setting, works in SETTINGS for work in works if work in chosen]
        if options.quick:
            tried = [(Setting("layers"), work) for work in chosen]
        for setting, work in tried:
            if left() < 0:
                print(f"{work:9} {setting}: not begun, the budget of {options.budget_s:.0f} s is spent", flush=True)
                continue
            found = attempt(work, str(setting), lambda work=work, setting=setting: theirs(work, options.steps, setting))
            if found is not None:
                peers[work][setting] = found
    results = [r for work in chosen for r in compare(work, mine.get(work), peers[work], transformers.__version__)]
    if options.json:
        print(json.dumps([asdict(r) for r in results], indent=2))
    else:
        for r in results:
            print(f"{r.name:40} {r.value:10,.1f} {r.unit:8} {r.peer:48} {r.peer_value:10,.1f}   {r.ratio:.2f} x")
