"""What the head and the optimizer take of a training step on one GPU, beside what the hardware needs for them.

    python benchmarks/head_and_optimizer.py [--variants]

Optimizer: the 2.03 B parameters of train_step_gpu.V3_2B, masters in halves; bytes moved a second, every tensor counted
as read once and written once, beside torch's fused AdamW on plain BF16. Head: 16,384 tokens, hidden 2048, vocabulary
32,000, log-probability and entropy forward and backward, beside its three products alone; and a vocabulary of 129,280
at 65,536 tokens with its peak memory. `--variants` times the kernels at other block sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from triton.testing import do_bench

from benchmarks.train_step_gpu import V3_2B
from trainer.model import head
from trainer.model.kernels import triton_adamw, triton_head
from trainer.model.v3 import V3Model
from trainer.optimizer import Optimizer, OptimizerOptions, _norms

TOKENS, HIDDEN, VOCABULARY = 16_384, 2048, 32_000


def milliseconds(work: Callable[[], object]) -> float:
    return do_bench(work, warmup=20, rep=100, return_mode="median")


def show(name: str, ms: float, amount: float, unit: str) -> None:
    """`amount` of bytes or FLOP; the rate is in 10^12 of them a second."""
    print(f"{name:58} {ms:8.3f} ms {amount / ms / 1e9:8.2f} {unit}", flush=True)


def ceilings() -> None:
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    show("copy of 1 GiB", milliseconds(lambda: b.copy_(a)), 2 * a.numel(), "TB/s")
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    show("BF16 product 8192^3", milliseconds(lambda: x @ y), 2 * 8192**3, "TFLOP/s")


def optimizer(variants: bool) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in V3Model(V3_2B).named_parameters()}
    count = sum(shape.numel() for shape in shapes.values())
    for moments, width in (("float32", 4), ("bfloat16", 2)):
        params = {
            n: torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02) for n, s in shapes.items()
        }
        mine = Optimizer(params.items(), OptimizerOptions(moments=moments))
        mine.allocate()
        grads = {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) * 1e-4 for n, s in shapes.items()}

        def step(mine=mine, grads=grads) -> None:
            mine._gradients = dict(grads)
            mine.step()

        step()
        torch.cuda.synchronize()
        moved = count * (2 + 2 * (2 + 2 + 2 * width))  # gradient; weight, rest of the master and moments twice
        if moments == "bfloat16":
            sums = {n: g.float() for n, g in grads.items()}

            def add(sums=sums, grads=grads) -> None:  # what a parameter's hook does from the third micro-batch on
                for name, total in sums.items():
                    total.add_(grads[name])

            show("gradients of one more micro-batch, summed in FP32", milliseconds(add), 10 * count, "TB/s")
            del sums, add
            ms = milliseconds(lambda grads=grads: _norms(list(grads.values())))
            show(f"norm of {count / 1e9:.2f} B gradients, {len(shapes)} tensors", ms, 2 * count, "TB/s")
        show(f"optimizer step, {moments} moments (norm included)", milliseconds(step), moved + 2 * count, "TB/s")
        start = time.perf_counter()
        step()
        print(
            f"    returns after {1e3 * (time.perf_counter() - start):.2f} ms, while the GPU still updates", flush=True
        )
        torch.cuda.synchronize()
        if variants and moments == "bfloat16":
            for triton_adamw.BLOCK in (512, 2048, 4096, 1024):
                show(f"  the same, BLOCK {triton_adamw.BLOCK}", milliseconds(step), moved + 2 * count, "TB/s")
        del mine, params, grads, step
        torch.cuda.empty_cache()
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02) for s in shapes.values()]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-4
    theirs = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def peer() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        theirs.step()

    show("torch, all BF16, no master: clip and fused AdamW", milliseconds(peer), count * (2 + 4 + 2 + 12), "TB/s")


def head_inputs(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, HIDDEN, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    return x, weight, torch.randint(0, vocabulary, (tokens,), device="cuda")


def products(variants: bool) -> None:
    x, weight, targets = (t.detach() for t in head_inputs(TOKENS, VOCABULARY))
    flops, chunk = 2 * TOKENS * HIDDEN * VOCABULARY, head.chunk_tokens(VOCABULARY, x.device)
    show("product x W^T, BF16 out", milliseconds(lambda: x @ weight.T), flops, "TFLOP/s")
    for rows in (1024, 2048, chunk, TOKENS):
        part = x[:rows]
        ms = milliseconds(lambda part=part: torch.mm(part, weight.T, out_dtype=torch.float32))
        show(f"product x W^T, FP32 out, {rows} tokens at a time", ms * TOKENS / rows, flops, "TFLOP/s")
    grad = torch.randn(TOKENS, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    show("product for the gradient of x", milliseconds(lambda: grad @ weight), flops, "TFLOP/s")
    show("product for the gradient of W", milliseconds(lambda: grad.T @ x), flops, "TFLOP/s")
    total = torch.zeros(VOCABULARY, HIDDEN, device="cuda")
    ms = milliseconds(lambda: head._add_product(total, grad[:chunk].T, x[:chunk])) * TOKENS / chunk
    show("product for the gradient of W, added up in FP32", ms, flops, "TFLOP/s")
    logits = torch.mm(x[:chunk], weight.T, out_dtype=torch.float32)
    out = [torch.empty(chunk, device="cuda") for _ in range(5)]
    sizes = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (8192, 8), (8192, 16), (4096, 8)) if variants else ((4096, 8),)
    for triton_head.BLOCK, triton_head.WARPS in sizes:
        name = f"  BLOCK {triton_head.BLOCK}, {triton_head.WARPS} warps: "
        size, scale = logits.numel(), TOKENS / chunk
        ms = milliseconds(lambda: triton_head.row_statistics(logits, targets[:chunk], 1.0, out[0], out[1]))
        show(name + "statistics", ms * scale, 4 * size * scale, "TB/s")
        ms = milliseconds(lambda: triton_head.row_statistics(logits, targets[:chunk], 1.0, out[0], out[1], out[2]))
        show(name + "statistics, entropy", ms * scale, 4 * size * scale, "TB/s")
        kept = grad[:chunk]
        ms = milliseconds(
            lambda kept=kept: triton_head.row_statistics(logits, targets[:chunk], 1.0, out[0], out[1], out[2], kept)
        )
        show(name + "statistics, entropy, probabilities", ms * scale, 10 * size * scale, "TB/s")
        ms = milliseconds(
            lambda: triton_head.logits_gradient(
                grad, grad, targets, 1.0, None, out[0].repeat(4), out[1].repeat(4), None
            )
        )
        show(name + "gradient in place", ms, 4 * grad.numel(), "TB/s")
        ms = milliseconds(
            lambda kept=kept: triton_head.logits_gradient(
                logits, kept, targets[:chunk], 1.0, out[1], out[2], out[3], out[4]
            )
        )
        show(name + "gradient from logits, with entropy's", ms * scale, 6 * size * scale, "TB/s")


def whole_head() -> None:
    x, weight, targets = head_inputs(TOKENS, VOCABULARY)
    product = 2 * TOKENS * HIDDEN * VOCABULARY

    def run(entropy: bool) -> None:
        logprobs, _ = head.token_logprobs(x, weight, targets, entropy=entropy)
        torch.autograd.grad(logprobs.sum(), (x, weight))

    def plain() -> None:
        logprobs, _ = head._TokenLogprobs.apply(x, weight, None, targets, 1.0, None, True, 4096)
        torch.autograd.grad(logprobs.sum(), (x, weight))

    show("head, forward and backward (of 3 products)", milliseconds(lambda: run(False)), 3 * product, "TFLOP/s")
    show("head, the same with entropy", milliseconds(lambda: run(True)), 3 * product, "TFLOP/s")
    head.KEEP_BYTES, kept = 0, head.KEEP_BYTES
    show("head, recomputed (of 3 products)", milliseconds(lambda: run(True)), 3 * product, "TFLOP/s")
    head.KEEP_BYTES = kept
    with torch.no_grad():
        ms = milliseconds(lambda: head.token_logprobs(x, weight, targets))
    show("head, log-probabilities alone (of 1 product)", ms, product, "TFLOP/s")
    show("head in plain torch operations, with entropy", milliseconds(plain), 3 * product, "TFLOP/s")


def large_vocabulary() -> None:
    x, weight, targets = head_inputs(65_536, 129_280)
    for name in ("first call", "second call"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        logprobs, entropies = head.token_logprobs(x, weight, targets, entropy=True)
        torch.autograd.grad((logprobs - 0.01 * entropies).sum(), (x, weight))
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - start)
        gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
        show(f"head, 65,536 x 129,280, {name} (of 3), {gigabytes:.2f} GB more", ms, 6 * x.numel() * 129_280, "TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true", help="other block sizes too")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    parts = (ceilings, lambda: products(options.variants), whole_head, large_vocabulary,
             lambda: optimizer(options.variants))  # fmt: skip
    for part in parts:
        try:
            part()
        except Exception:  # the other parts are still worth their time; what failed is said in full
            traceback.print_exc(file=sys.stdout)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
