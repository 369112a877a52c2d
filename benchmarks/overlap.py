"""What a GPU does beside its matrix products: experiments for the training step of `v3-2b` on one GPU.

    python benchmarks/overlap.py [--only beside,norm,deepgemm]

`beside`: the experts' products and passes bound by memory, one after the other and at once on two streams, with
multiprocessors kept free of the products (torch's SM carveout). `norm`: the gradient's norm by torch's foreach and in
one kernel a tensor. `deepgemm`: DeepGEMM's grouped BF16 products, where it is installed, beside torch's. Medians
between events of the device; each part survives the failure of another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, HIDDEN, WIDE, EXPERTS, TOKENS, K = 98_304, 2048, 768, 32, 16_384, 6
FIGURES: dict[str, float] = {}


def microseconds(work: Callable[[], object], repeats: int = 15, warm: int = 4) -> float:
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def show(name: str, value: float, note: str = "") -> None:
    FIGURES[name] = value
    print(f"{name:72} {value:9.1f} us  {note}", flush=True)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def ends() -> Tensor:
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(2400, 3744, (EXPERTS,), generator=g)
    found = (sizes * ROWS / sizes.sum()).cumsum(0).round().int()
    found[-1] = ROWS
    return found.cuda()


# --- products and passes at once ---


def beside() -> None:
    from trainer.model.triton_moe import gather_sum, scatter_rows, swiglu_backward

    offs = ends()
    x, rows, d_rows = draw(TOKENS, HIDDEN), draw(ROWS, HIDDEN), draw(ROWS, HIDDEN)
    gate_up, d_gate_up, act, d_act = draw(ROWS, 2 * WIDE), draw(ROWS, 2 * WIDE), draw(ROWS, WIDE), draw(ROWS, WIDE)
    w13, wide, narrow = draw(EXPERTS, 2 * WIDE, HIDDEN), draw(8192, HIDDEN), draw(TOKENS, 8192)
    place = torch.randperm(ROWS, device="cuda").int().view(TOKENS, K)
    weights = torch.rand(ROWS, device="cuda")
    products = {
        "dw2": lambda: torch._grouped_mm(rows.T, act, offs=offs),
        "dw13": lambda: torch._grouped_mm(d_gate_up.T, rows, offs=offs),
        "d_rows": lambda: torch._grouped_mm(d_gate_up, w13, offs=offs),
        "dense wgrad": lambda: narrow.T @ x,
        "dense dgrad": lambda: narrow @ wide,
    }
    passes = {
        "swiglu backward": lambda: swiglu_backward(gate_up, d_act, weights, keep=False),
        "gather": lambda: gather_sum(d_rows, place),
        "scatter": lambda: scatter_rows(x, place),
    }
    alone = {name: microseconds(work) for name, work in [*products.items(), *passes.items()]}
    for name, value in alone.items():
        show(name, value)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    try:
        for carve in (None, 0, 8, 16, 24, 32, 48):
            torch._C._set_sm_carveout_experimental(carve)
            for name, product in products.items():
                show(f"{name}, {carve} multiprocessors kept free", microseconds(product, 7, 2))
            for product, other in (
                ("dw2", "swiglu backward"), ("dw13", "gather"), ("dw13", "swiglu backward"), ("d_rows", "scatter"),
                ("dense wgrad", "gather"), ("dense dgrad", "swiglu backward"),
            ):  # fmt: skip
                for first in ("pass", "product"):

                    def both(product=product, other=other, first=first) -> None:
                        side.wait_stream(main)
                        if first == "product":
                            products[product]()
                        with torch.cuda.stream(side):
                            passes[other]()
                        if first == "pass":
                            products[product]()
                        main.wait_stream(side)

                    time = microseconds(both, 9, 2)
                    saved = alone[product] + alone[other] - time
                    show(f"{product} + {other}, {carve} free, {first} first", time, f"saves {saved:7.1f}")
    finally:
        torch._C._set_sm_carveout_experimental(None)


# --- the norm ---


@triton.jit
def _squares(x, sums, n, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for at in range(start, n, PROGRAMS * BLOCK):
        i = at + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def norm() -> None:
    from benchmarks.train_step_gpu import V3_2B
    from trainer.model.v3 import V3Model
    from trainer.optimizer import _norms

    with torch.device("meta"):
        shapes = [p.shape for p in V3Model(V3_2B).parameters()]
    gradients = [draw(*shape) for shape in shapes]
    size = sum(g.nbytes for g in gradients)
    expected = torch.stack(_norms(gradients))
    time = microseconds(lambda: torch.stack(_norms(gradients)))
    show("norm, foreach", time, f"{size / time / 1e6:.2f} TB/s of {size / 1e9:.2f} GB")
    for programs, block, warps in ((528, 4096, 8), (1056, 2048, 4), (1056, 4096, 4), (2112, 2048, 4), (4224, 4096, 8)):
        sums = torch.zeros(len(gradients), programs, device="cuda")

        def kernel(programs=programs, block=block, warps=warps, sums=sums) -> Tensor:
            for row, g in zip(sums, gradients, strict=True):
                _squares[(programs,)](g, row, g.numel(), PROGRAMS=programs, BLOCK=block, num_warps=warps)
            return sums.sum(1).sqrt()

        apart = float((kernel() / expected - 1).abs().max())
        time = microseconds(kernel)
        show(f"norm, {programs} programs x {block}, {warps} warps", time, f"{size / time / 1e6:.2f} TB/s, {apart:.1e}")
    del gradients
    n = 2**28
    left, right = draw(n), draw(n)
    time = microseconds(lambda: left.copy_(right))
    show("copy of 0.5 GB", time, f"{4 * n / time / 1e6:.2f} TB/s")


# --- DeepGEMM ---


def deepgemm() -> None:
    import deep_gemm

    count = 128
    sizes = (ends().diff(prepend=torch.zeros(1, device="cuda", dtype=torch.int32)) + count - 1) // count * count
    offs = sizes.cumsum(0).int()
    rows = int(offs[-1])
    layout = torch.repeat_interleave(torch.arange(EXPERTS, device="cuda"), sizes.long()).int()
    print(f"{rows} rows instead of {ROWS}, every expert a multiple of {count}")
    for name, inner, outer in (("w13", HIDDEN, 2 * WIDE), ("w2", WIDE, HIDDEN)):
        a, b, dy = draw(rows, inner), draw(EXPERTS, outer, inner), draw(rows, outer)
        y, dx = torch.empty(rows, outer, device="cuda", dtype=a.dtype), torch.empty_like(a)
        flop = 2 * rows * inner * outer

        def row(what: str, ours: Callable[[], Tensor], theirs: Callable[[], object], out: Tensor, flop=flop) -> None:
            theirs()
            apart = float((out.float() - ours().float()).norm() / ours().float().norm())
            for who, work in (("torch", ours), ("DeepGEMM", theirs)):
                time = microseconds(work)
                show(f"{what}, {who}", time, f"{flop / time / 1e6:.0f} TFLOP/s, apart {apart:.1e}")

        row(
            f"{name} forward", lambda a=a, b=b: torch._grouped_mm(a, b.transpose(1, 2), offs=offs),
            lambda a=a, b=b, y=y: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, y, layout), y,
        )  # fmt: skip
        row(
            f"{name} dgrad", lambda dy=dy, b=b: torch._grouped_mm(dy, b, offs=offs),
            lambda dy=dy, b=b, dx=dx: deep_gemm.m_grouped_bf16_gemm_nn_contiguous(dy, b, dx, layout), dx,
        )  # fmt: skip
        dw = torch.empty(EXPERTS, outer, inner, device="cuda", dtype=torch.float32)
        host = sizes.tolist()
        row(
            f"{name} wgrad", lambda dy=dy, a=a: torch._grouped_mm(dy.T, a, offs=offs),
            lambda dy=dy, a=a, dw=dw, host=host: deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
                dy, a, dw, host, sizes.int()
            ),
            dw,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="norm,deepgemm,beside")
    for name in parser.parse_args().only.split(","):
        try:
            {"beside": beside, "norm": norm, "deepgemm": deepgemm}[name]()
        except Exception:
            print(f"{name} FAILED:\n{traceback.format_exc()}", flush=True)
        torch.cuda.empty_cache()
    if out := os.environ.get("OUT"):
        (Path(out) / "overlap.json").write_text(json.dumps(FIGURES, indent=1) + "\n")


if __name__ == "__main__":
    main()
