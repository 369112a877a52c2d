"""Where a training step of the reference model goes on one GPU, and how fast its parts are.

    python benchmarks/profile_step.py [--only step,profile,attention,...] [--layouts 16x1024,8x2048,mixed]

`v3-2b`: hidden 2048, 12 layers, 32 experts of 768 of which 6, vocabulary 32,000; 2.03 B parameters, BF16 weights and
gradients, FP32 master weights, BF16 moments. One step is forward, log-probabilities of the tokens, backward and AdamW
on 16,384 random tokens. Times are medians over steps between events of the device; the share is of 989 TFLOP/s, counted
as 6 x active parameters + causal attention a token, recomputation not counted.

Parts: `step` (whole steps and peak memory, by layout and by what is kept), `profile` (time on the device by category),
`host` (how long the host takes to issue a step), `products`, `kernels` (each against memory bandwidth), `attention`
(kernels for documents of equal and mixed lengths). Each prints lines of its own and survives the failure of another.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from trainer.model.documents import group_documents
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

V3_2B = V3Config(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, moe_intermediate_size=768, num_hidden_layers=12,
    num_attention_heads=16, n_routed_experts=32, num_experts_per_tok=6, kv_lora_rank=512, q_lora_rank=768,
    first_k_dense_replace=1, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    max_position_embeddings=8192,
)  # fmt: skip
TOKENS, PEAK = 16384, 989e12
LAYOUTS = {"16x1024": [1024] * 16, "8x2048": [2048] * 8, "mixed": []}


def mixed_lengths() -> list[int]:
    """Documents of 60 to 3,000 tokens, most of them short, as a run's completions are."""
    g = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := TOKENS - sum(lengths)) > 0:
        drawn = int((5.0 + 3.0 * torch.rand(1, generator=g)).exp())
        lengths.append(min(drawn, left))
    return lengths


LAYOUTS["mixed"] = mixed_lengths()


def flops(lengths: list[int], c: V3Config = V3_2B) -> float:
    """Model FLOP of a step: forward and backward, the embedding not counted, causal attention by half."""
    qk, v, h = c.qk_head_dim, c.v_head_dim, c.num_attention_heads
    attention = c.hidden_size * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim + h * v)
    attention += h * (c.q_lora_rank * qk + c.kv_lora_rank * (c.qk_nope_head_dim + v))
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    moe = expert * (c.num_experts_per_tok + c.n_shared_experts) + c.hidden_size * c.n_routed_experts
    dense = 3 * c.hidden_size * c.intermediate_size
    layers = c.num_hidden_layers * attention + c.moe_layers * moe + c.first_k_dense_replace * dense
    active = layers + c.vocab_size * c.hidden_size
    pairs = sum(n * n / 2 for n in lengths)
    return 6 * active * sum(lengths) + 3 * 2 * pairs * h * (qk + v) * c.num_hidden_layers


class Step:
    """One training step on random tokens."""

    def __init__(self, optimizer: bool = True, **options) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = V3Model(V3_2B, **options).to(torch.bfloat16)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
            for router in self.model.routers():
                router.bias.zero_()
        self.optimizer = self._optimizer() if optimizer else None

    def _optimizer(self):
        from trainer.optimizer import Optimizer, OptimizerOptions

        return Optimizer(self.model.named_parameters(), OptimizerOptions(lr=1e-5, moments="bfloat16"))

    def lay_out(self, lengths: list[int]) -> None:
        n = sum(lengths)
        self.tokens = torch.randint(0, V3_2B.vocab_size, (n,), device="cuda")
        self.positions = torch.cat([torch.arange(length) for length in lengths]).cuda()
        self.bounds = torch.tensor([0, *lengths]).cumsum(0)
        self.targets = self.tokens.roll(-1)

    def forward(self) -> Tensor:
        return self.model(self.tokens, self.positions, self.bounds).hidden

    def loss(self, hidden: Tensor) -> Tensor:
        from trainer.model.head import token_logprobs

        values, _ = token_logprobs(hidden, self.model.head, self.targets)
        return -values.mean()

    def backward(self) -> None:
        self.loss(self.forward()).backward()

    def update(self) -> None:
        with torch.profiler.record_function("optimizer"):
            self.optimizer.step()

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.update()
        else:
            for parameter in self.model.parameters():
                parameter.grad = None


def seconds(work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """Median time on the device of one call."""
    for _ in range(warm):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def attempt(name: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # one try on a lent machine: the next part must run
        print(f"{name}: FAILED", flush=True)
        traceback.print_exc(file=sys.stdout)
    torch.cuda.empty_cache()


# ---- whole steps ----


def steps(step: Step, layouts: list[str]) -> None:
    for name in layouts:
        lengths = LAYOUTS[name]
        step.lay_out(lengths)
        for kept in ("all kept", "selective checkpointing"):
            for layer in step.model.layers[V3_2B.first_k_dense_replace :]:
                layer.ffn.experts.keep_rows = kept == "all kept"
            step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            time_s = seconds(step, repeats=8, warm=2)
            rate = flops(lengths) / time_s
            print(
                f"step {name}, {kept}: {1e3 * time_s:.1f} ms, {TOKENS / time_s:,.0f} tokens/s, {rate / 1e12:.0f} "
                f"TFLOP/s, {100 * rate / PEAK:.1f} %, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
                flush=True,
            )
    for layer in step.model.layers[V3_2B.first_k_dense_replace :]:
        layer.ffn.experts.keep_rows = True
    step.lay_out(LAYOUTS[layouts[0]])
    step()
    hidden = step.forward().detach()
    with torch.no_grad():
        print(f"part forward without gradient: {1e3 * seconds(step.forward, 6):.1f} ms", flush=True)
    print(f"part forward: {1e3 * seconds(step.forward, 6):.1f} ms")

    def head() -> None:
        step.loss(hidden.requires_grad_()).backward()

    def model_only() -> None:
        step.forward().backward(hidden)
        step.optimizer.zero_grad()

    print(f"part model forward + backward: {1e3 * seconds(model_only, 6):.1f} ms")
    print(f"part head forward + backward: {1e3 * seconds(head, 6):.1f} ms")
    step.backward()
    marks = []
    for _ in range(5):
        step.backward()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step.update()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    print(f"part optimizer: {statistics.median(a.elapsed_time(b) for a, b in marks):.1f} ms", flush=True)


def checkpointed(layouts: list[str]) -> None:
    step = Step(activation_checkpointing=True)
    for name in layouts:
        step.lay_out(LAYOUTS[name])
        step()
        torch.cuda.reset_peak_memory_stats()
        time_s = seconds(step, repeats=5, warm=1)
        rate = flops(LAYOUTS[name]) / time_s
        print(
            f"step {name}, activation checkpointing: {1e3 * time_s:.1f} ms, {TOKENS / time_s:,.0f} tokens/s, "
            f"{100 * rate / PEAK:.1f} %, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB",
            flush=True,
        )


def host(step: Step, layout: str) -> None:
    """The host's time to issue a step, the device's work taken away by a tenth of the tokens."""
    step.lay_out([length // 8 for length in LAYOUTS[layout]])
    for _ in range(3):
        step.backward()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        step.backward()
    issued = (time.perf_counter() - start) / 3
    torch.cuda.synchronize()
    done = (time.perf_counter() - start) / 3
    print(f"host: forward and backward issued in {1e3 * issued:.1f} ms, 2,048 tokens done in {1e3 * done:.1f} ms")


# ---- by category ----

RANGES = {  # the outermost of these names above a kernel decides
    "optimizer": "optimizer", "Optimizer": "optimizer", "_FusedLogprobs": "head", "_TokenLogprobs": "head",
    "_Experts": "experts", "_Route": "router", "_Attention": "attention", "_AddNorm": "norms",
    "_LatentNorms": "norms", "_WeightedSwiGLU": "dense SwiGLU", "embedding": "embedding", "Embedding": "embedding",
    "linear": "projections", "MmBackward": "projections", "LinearBackward": "projections",
    "AddmmBackward": "projections", "AccumulateGrad": "gradients handed over",
}  # fmt: skip


def category(names: list[str], kernel: str) -> str:
    found = "other"
    for name in reversed(names):
        hit = next((value for key, value in RANGES.items() if key in name), None)
        if hit is not None:
            found = hit
            break
    if found != "experts":
        if found == "attention":
            return (
                "attention: softmax(qk)v" if any(s in kernel for s in ("cudnn", "flash", "sdpa")) else "attention: rope"
            )
        return found
    if "_scatter" in kernel or "_gather_sum" in kernel:
        return "experts: rows there and back"
    if "swiglu" in kernel:
        return "experts: SwiGLU"
    if "_count" in kernel or "_place" in kernel:
        return "experts: order"
    if any(s in kernel.lower() for s in ("group", "ptrarray", "gemmuniversal")):
        return "experts: grouped products"
    if any(s in kernel for s in ("nvjet", "gemm", "cutlass", "xmma")):
        return "experts: shared products"
    return "experts: order"


def profile(step: Step, layout: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    step.lay_out(LAYOUTS[layout])
    for _ in range(3):
        step()
    time_s = seconds(step, repeats=5, warm=0)
    rounds = 2
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in prof.events():
        if not event.kernels:
            continue
        names, above = [], event
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        for kernel in event.kernels:
            kind = category(names, kernel.name)
            total[kind] += kernel.duration / rounds
            entry = kernels[(kind, kernel.name[:70])]
            entry[0] += kernel.duration / rounds
            entry[1] += 1 / rounds
    busy = sum(total.values())
    print(f"profile {layout}: step {1e3 * time_s:.1f} ms, kernels {busy / 1e3:.1f} ms", flush=True)
    for kind, us in sorted(total.items(), key=lambda item: -item[1]):
        print(f"  {kind:32} {us / 1e3:8.2f} ms  {100 * us / (1e6 * time_s):5.1f} %")
    gaps(prof, rounds, time_s)
    print("  the longest kernels:")
    for (kind, name), (us, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:45]:
        print(f"    {us / 1e3:7.2f} ms {count:6.0f} x  {kind:28} {name}")


def gaps(prof, rounds: int, time_s: float) -> None:
    """What no range claims, and the time between kernels."""
    device = torch.autograd.DeviceType.CUDA
    ran = [e for e in prof.events() if e.device_type == device and e.name not in ("optimizer", "ProfilerStep*")]
    ran = sorted((e.time_range.start, e.time_range.end, e.name) for e in ran)
    busy = sum(end - start for start, end, _ in ran) / rounds
    between, longest, last, before = defaultdict(float), [], ran[0][1], ran[0][2]
    for start, end, name in ran[1:]:
        gap = start - last
        if gap > 0:
            kind = (
                "up to 3 us" if gap <= 3 else "3 to 10 us" if gap <= 10 else "10 to 100 us" if gap <= 100 else "longer"
            )
            between[kind] += gap / rounds
            longest.append((gap, before[:50], name[:50]))
        if end > last:
            last, before = end, name
    print(f"  all kernels {busy / 1e3:.2f} ms, {len(ran) / rounds:.0f} a step; idle {1e3 * time_s - busy / 1e3:.2f} ms")
    print("  gaps: " + ", ".join(f"{kind} {us / 1e3:.2f} ms" for kind, us in between.items()))
    for gap, one, other in sorted(longest, reverse=True)[:10]:
        print(f"    {gap:7.1f} us between {one} and {other}")
    adamw = sum(end - start for start, end, name in ran if "adamw" in name.lower()) / rounds
    print(f"  AdamW's kernel: {adamw / 1e3:.2f} ms")


# ---- parts ----


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def products() -> None:
    def show(name: str, work, flop: float) -> None:
        time_s = seconds(work, repeats=12)
        print(f"product {name}: {1e6 * time_s:.0f} us, {flop / time_s / 1e12:.0f} TFLOP/s", flush=True)

    c = V3_2B
    sizes = {
        "wq_a + wkv_a": (2048, 768 + 576), "wq_b": (768, 16 * 192), "wkv_b": (512, 16 * 256), "wo": (2048, 2048),
        "shared w13": (2048, 1536), "shared w2": (768, 2048), "dense w13": (2048, 16384), "dense w2": (8192, 2048),
    }  # fmt: skip
    for name, (inner, outer) in sizes.items():
        x, w, dy = draw(TOKENS, inner), draw(outer, inner), draw(TOKENS, outer)
        flop = 2 * TOKENS * inner * outer
        show(f"{name} forward", lambda x=x, w=w: x @ w.T, flop)
        show(f"{name} dgrad", lambda dy=dy, w=w: dy @ w, flop)
        show(f"{name} wgrad", lambda x=x, dy=dy: dy.T @ x, flop)
    rows = TOKENS * c.num_experts_per_tok
    sizes_of = torch.randint(2400, 3744, (32,))
    ends = (sizes_of * rows / sizes_of.sum()).cumsum(0).round().int()
    ends[-1] = rows
    ends = ends.cuda()
    for name, inner, outer in (("experts w13", 2048, 1536), ("experts w2", 768, 2048)):
        x, w, dy = draw(rows, inner), draw(32, outer, inner), draw(rows, outer)
        flop = 2 * rows * inner * outer
        show(f"{name} forward", lambda x=x, w=w: torch._grouped_mm(x, w.transpose(1, 2), offs=ends), flop)
        show(f"{name} dgrad", lambda dy=dy, w=w: torch._grouped_mm(dy, w, offs=ends), flop)
        show(f"{name} wgrad", lambda x=x, dy=dy: torch._grouped_mm(dy.T, x, offs=ends), flop)
    for inner in (1344, 1408, 1536):
        dy, w = draw(TOKENS, inner), draw(inner, 2048)
        show(f"latents dgrad, {inner} wide", lambda dy=dy, w=w: dy @ w, 2 * TOKENS * 1344 * 2048)
    dy, w, out = draw(TOKENS, 1344), draw(1344, 2048), draw(TOKENS, 2048)

    def split() -> None:
        torch.mm(dy[:, :768], w[:768], out=out)
        out.addmm_(dy[:, 768:], w[768:])

    show("latents dgrad, 768 + 576", split, 2 * TOKENS * 1344 * 2048)
    x, w, w2, d = draw(TOKENS, 2048), draw(32, 2048), draw(64, 2048), draw(TOKENS, 64)
    show("router forward", lambda: torch.mm(x, w.T, out_dtype=torch.float32), 2 * TOKENS * 2048 * 32)
    show("router dgrad", lambda: d @ w2, 2 * TOKENS * 2048 * 64)
    show("router wgrad", lambda: torch.mm(d.T, x, out_dtype=torch.float32), 2 * TOKENS * 2048 * 64)


def kernels() -> None:
    """Time and bandwidth of the model's own kernels; bytes are what must be read and written once."""
    from trainer.model.kernels import triton_moe, triton_norm, triton_rope, triton_route

    def show(name: str, work, size: float) -> None:
        time_s = seconds(work, repeats=12)
        print(f"kernel {name}: {1e6 * time_s:.0f} us, {size / time_s / 1e12:.2f} TB/s", flush=True)

    n, h, k, e, wide = TOKENS, 2048, 6, 32, 768
    rows = n * k
    source, target = draw(rows, h), draw(rows, h)
    show("copy of [98304, 2048]", lambda: target.copy_(source), 4 * rows * h)
    x, dx, dy, w = draw(n, h), draw(n, h), draw(n, h), draw(h)
    _, _, inverse = triton_norm._norm(x, dx, w, 1e-6)
    for warps in (4, 8):
        for programs in (512, 1024):
            triton_norm._launch = lambda size, warps=warps: {"BLOCK": 2048, "num_warps": warps}
            triton_norm.PROGRAMS = programs
            if programs == 1024:
                show(f"add + norm, {warps} warps", lambda: triton_norm._norm(x, dx, w, 1e-6), 8 * n * h)
            show(
                f"norm backward, {warps} warps, {programs} programs",
                lambda: triton_norm._norm_backward(dy, dx, x, w, inverse, target[:n]), 8 * n * h,
            )  # fmt: skip
    logits = torch.randn(n, e, device="cuda")
    bias = torch.zeros(e, device="cuda")
    scores, chosen, weights, counts = triton_route.decide(logits, bias, None, 4, 2, k, True, 2.5)
    show("decide", lambda: triton_route.decide(logits, bias, None, 4, 2, k, True, 2.5), 8 * n * e)
    show(
        "decide backward",
        lambda: triton_route.decide_backward(scores, chosen, weights, None, True, 2.5, torch.bfloat16), 8 * n * e,
    )  # fmt: skip
    show("order", lambda: triton_route.Order.of(chosen, weights, counts), 8 * n * k)
    order = triton_route.Order.of(chosen, weights, counts)
    end = order.ends[-1]
    for block, warps in ((2048, 4), (2048, 8), (1024, 4), (512, 1)):
        triton_moe._columns = lambda size, block=block, warps=warps: {"BLOCK": block, "num_warps": warps}
        name = f"block {block}, {warps} warps"
        show(f"scatter, {name}", lambda: triton_moe.scatter_rows(x, order.place, target, end), 2 * (rows + n) * h)
        show(f"gather + sum, {name}", lambda: triton_moe.gather_sum(source, order.place, end), 2 * (rows + n) * h)
        show(
            f"gather + sum + 2, {name}",
            lambda: triton_moe.gather_sum(source, order.place, end, x, dx),
            2 * (rows + 3 * n) * h,
        )
    gate_up, grad = draw(rows, 2 * wide), draw(rows, wide)
    for block, tile, warps in ((256, 8, 4), (256, 4, 4), (256, 16, 8), (256, 4, 2)):
        triton_moe._tile = lambda size, block=block, tile=tile, warps=warps: {
            "BLOCK": block, "ROWS": tile, "num_warps": warps,
        }  # fmt: skip
        name = f"{tile} x {block}, {warps} warps"
        show(f"swiglu, {name}", lambda: triton_moe.swiglu_forward(gate_up, order.row_weights), 2 * rows * 3 * wide)
        show(
            f"swiglu backward, {name}",
            lambda: triton_moe.swiglu_backward(gate_up, grad, order.row_weights), 2 * rows * 6 * wide,
        )  # fmt: skip
    q, kv, pe = draw(n, 16, 192), draw(n, 16, 256), draw(n, 64)
    turn = torch.polar(torch.ones(n, 32, device="cuda"), torch.rand(n, 32, device="cuda"))
    dq, dk, dv = draw(n, 16, 192), draw(n, 16, 192), draw(n, 16, 128)
    for heads, warps in ((16, 4), (16, 8), (4, 2)):
        triton_rope.HEADS = heads
        shape = triton_rope._shape
        triton_rope._shape = lambda *a, shape=shape, warps=warps: {**shape(*a), "num_warps": warps}
        name = f"{heads} heads, {warps} warps"
        show(
            f"rope, {name}", lambda: triton_rope.queries_keys_values_(q, kv, pe, turn, True),
            2 * n * 16 * (2 * 64 + 128 + 192),
        )  # fmt: skip
        show(
            f"rope backward, {name}", lambda: triton_rope.backward_(dq, dk, dv, turn, 128, True),
            2 * n * 16 * (2 * 64 + 192 + 128 + 256),
        )  # fmt: skip
        triton_rope._shape = shape


def attention() -> None:
    from trainer.model.kernels import gpu_attention

    c, heads = V3_2B, 16
    for layout, lengths in LAYOUTS.items():
        n = sum(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        documents = group_documents(bounds, device=torch.device("cuda"))
        q, kv, pe = draw(n, heads, 192), draw(n, heads, 256), draw(n, 64)
        turn = torch.polar(torch.ones(n, 32, device="cuda"), torch.rand(n, 32, device="cuda"))
        grad = draw(n, heads, 128)
        pairs = sum(m * m / 2 for m in lengths)
        flop = 2 * pairs * heads * (c.qk_head_dim + c.v_head_dim)
        print(f"attention {layout}: {len(lengths)} documents", flush=True)
        for kernel in ("cudnn", "flash"):
            if kernel == "cudnn" and layout == "mixed":
                continue

            def both(kernel=kernel, documents=documents, q=q, kv=kv, pe=pe, turn=turn, grad=grad, only=False) -> None:
                inputs = [t.detach().requires_grad_() for t in (q, kv, pe)]
                out = gpu_attention._Attention.apply(*inputs, turn, documents, 192**-0.5, True, kernel == "cudnn")
                if not only:
                    torch.autograd.grad(out, inputs, grad)

            def measure(kernel=kernel, both=both, flop=flop, layout=layout) -> None:
                torch.cuda.synchronize()
                start = time.perf_counter()
                both()
                torch.cuda.synchronize()
                first = time.perf_counter() - start
                forward, total = seconds(lambda: both(only=True)), seconds(both)
                print(
                    f"attention {layout} {kernel}: first call {first:.2f} s; with rope forward {1e6 * forward:.0f} us "
                    f"({flop / forward / 1e12:.0f} TFLOP/s), backward {1e6 * (total - forward):.0f} us "
                    f"({2.5 * flop / (total - forward) / 1e12:.0f})",
                    flush=True,
                )

            attempt(f"attention {layout} {kernel}", measure)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="step,profile,host,checkpointed,attention,kernels,products")
    arguments.add_argument("--layouts", default="16x1024,8x2048,mixed")
    options = arguments.parse_args()
    only, layouts = options.only.split(","), options.layouts.split(",")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    parts = {name: globals()[name] for name in ("attention", "kernels", "products") if name in only}
    if {"step", "profile", "host"} & set(only):
        step = Step()
        print(f"{sum(p.numel() for p in step.model.parameters()) / 1e9:.2f} B parameters", flush=True)
        if "step" in only:
            attempt("step", lambda: steps(step, layouts))
        if "profile" in only:
            for layout in layouts:
                attempt("profile", lambda layout=layout: profile(step, layout))
        if "host" in only:
            attempt("host", lambda: host(step, layouts[0]))
        del step
        torch.cuda.empty_cache()
    if "checkpointed" in only:
        attempt("checkpointed", lambda: checkpointed(layouts[:2]))
    for name, part in parts.items():
        attempt(name, part)


if __name__ == "__main__":
    main()
