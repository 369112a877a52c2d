"""Measured speeds that plans count with, all in one place. Each is a line of benchmarks/RESULTS.md, "Kernels on one
H100": one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, large shapes, nothing beside it."""

from __future__ import annotations

from dataclasses import dataclass

TERA = 1e12
H100_BF16_FLOPS = 989 * TERA  # dense BF16 peak of the data sheet: what shares of the peak refer to


@dataclass(frozen=True)
class Rate:
    """Floating-point operations per second of one kernel: forward, for the input's gradient, for the weight's. An
    attention kernel makes all its gradients in one, `dgrad`."""

    forward: float
    dgrad: float
    wgrad: float

    def seconds(self, forward_flop: float, recomputed: float = 0.0) -> float:
        """Of a product's forward and backward, each as large as `forward_flop`; `recomputed` is the share of the
        forward that runs a second time."""
        return forward_flop * ((1 + recomputed) / self.forward + 1 / self.dgrad + 1 / self.wgrad)


# benchmarks/RESULTS.md, "Kernels on one H100", by row:
LINEAR = {
    "bf16": Rate(728 * TERA, 728 * TERA, 728 * TERA),  # BF16 matmul, 4096x4096x7168; the same for both gradients
    "fp8": Rate(1173 * TERA, 1173 * TERA, 1173 * TERA),  # scaled_mm 1x128 by 128x128, same shape; gradients assumed so
}
GROUPED = {
    "bf16": Rate(722 * TERA, 665 * TERA, 671 * TERA),  # torch._grouped_mm, 8x4096 rows, N4096 K7168
    "fp8": Rate(1204 * TERA, 1106 * TERA, 850 * TERA),  # DeepGEMM, the slowest of its three shapes each
}
ATTENTION_FORWARD = 541 * TERA  # cuDNN SDPA, heads of 192/128, causal, 4x16x4096
ATTENTION_BACKWARD = 391 * TERA
ATTENTION_BACKWARD_FLOP = 2.5  # products of the backward pass over those of the forward, as that rate counts them

# Assumed, not measured: the share of a step's time that is spent in the kernels above. By the arithmetic of
# `rlzero plan configs/v3-671b.yaml` the published 180 K H800 hours per trillion tokens (arXiv 2412.19437) are 0.63.
EFFICIENCY = 0.6


def attention_seconds(forward_flop: float, recomputed: float = 0.0) -> float:
    backward = ATTENTION_BACKWARD_FLOP * forward_flop / ATTENTION_BACKWARD
    return (1 + recomputed) * forward_flop / ATTENTION_FORWARD + backward
