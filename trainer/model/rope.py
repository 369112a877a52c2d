"""Rotary positions with YaRN, as DeepSeek-V3 uses them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from trainer.model.v3_config import V3Config


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(config: V3Config) -> Float[Tensor, " pairs"]:
    """Radians per position of every rotated pair (float32, CPU).

    YaRN (arXiv 2309.00071, eq. 17-23): pairs that turn more than `beta_fast` times over the original context keep
    their frequency, those that turn less than `beta_slow` times are slowed by `factor`, a linear ramp between.
    """
    pairs = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32) / config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta**pairs
    yarn = config.rope_scaling
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        original = yarn["original_max_position_embeddings"]
        return config.qk_rope_head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow") or 1)), config.qk_rope_head_dim - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return plain / yarn["factor"] * slowed + plain * (1 - slowed)


def rotation(
    config: V3Config, positions: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n pairs"], Float[Tensor, "n pairs"]]:
    """Cosine and sine of every pair's angle, float32 whatever the model's dtype, times YaRN's attention factor (1 for
    DeepSeek's own settings, where `mscale` equals `mscale_all_dim`)."""
    angles = positions.float()[:, None] * _frequencies_on(config, positions.device)
    attention_factor = 1.0
    if yarn := config.rope_scaling:
        factor, mscale, all_dim = yarn["factor"], yarn.get("mscale"), yarn.get("mscale_all_dim")
        attention_factor = yarn.get("attention_factor")
        if attention_factor is None:
            attention_factor = (
                _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
            )
    return angles.cos() * attention_factor, angles.sin() * attention_factor


_on_device: dict[tuple, Tensor] = {}


def _frequencies_on(config: V3Config, device: torch.device) -> Float[Tensor, " pairs"]:
    """`frequencies`, moved once: a copy to a GPU in every step would wait for the steps before it."""
    if device.type == "cpu" or device.type == "meta":
        return frequencies(config).to(device)
    key = (config.qk_rope_head_dim, config.rope_theta, repr(config.rope_scaling), device)
    if key not in _on_device:
        _on_device[key] = frequencies(config).to(device)
    return _on_device[key]


def turns(config: V3Config, positions: Int[Tensor, " n"]) -> Complex[Tensor, "n pairs"]:
    """`rotation` as one complex number a pair: what `apply_rope` multiplies by."""
    return torch.complex(*rotation(config, positions))


def softmax_scale(config: V3Config) -> float:
    """1/sqrt(head), times YaRN's squared `mscale_all_dim` factor (DeepSeek-V3 inference code)."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling and (all_dim := config.rope_scaling.get("mscale_all_dim")):
        scale *= _mscale(config.rope_scaling["factor"], all_dim) ** 2
    return scale


def apply_rope(
    x: Float[Tensor, "n heads rope"], turn: Complex[Tensor, "n pairs"], interleave: bool
) -> Float[Tensor, "n heads rope"]:
    """Turns every pair by its angle, in float32. `interleave`: a pair is (2i, 2i+1), as in DeepSeek's weights;
    otherwise (i, i + rope/2). The result keeps the input's layout, as DeepSeek's inference code does."""
    pairs = x.float().unflatten(-1, (-1, 2) if interleave else (2, -1))
    pairs = torch.view_as_complex((pairs if interleave else pairs.transpose(-1, -2)).contiguous())
    turned = torch.view_as_real(pairs * turn[:, None])
    return (turned if interleave else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)
