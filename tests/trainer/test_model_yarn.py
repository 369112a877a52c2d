"""YaRN as DeepSeek-V3 publishes it: against its formula in float64, and against transformers beyond the original
context, logits and gradients, with and without low-rank queries."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from tests.trainer.test_model_parity import TINY, assert_parity, packed, random_model, relative, transformers_twin
from trainer.model.rope import frequencies, rotation, softmax_scale

PUBLISHED = {  # config.json of DeepSeek-V3
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = dataclasses.replace(
    TINY, qk_rope_head_dim=64, qk_nope_head_dim=128, max_position_embeddings=163840, rope_scaling=PUBLISHED
)
# The same with a context of 16 tokens stretched to 640: 8 rotary numbers of which the ramp covers some.
SMALL = dataclasses.replace(
    TINY, qk_rope_head_dim=16, max_position_embeddings=640,
    rope_scaling={**PUBLISHED, "original_max_position_embeddings": 16, "beta_fast": 2, "beta_slow": 0.1},
)  # fmt: skip
SETTINGS = {
    "published": SMALL,
    "q_lora": dataclasses.replace(SMALL, q_lora_rank=20),
    "unequal mscale, q_lora": dataclasses.replace(
        SMALL, q_lora_rank=20, rope_scaling={**SMALL.rope_scaling, "mscale": 0.707, "mscale_all_dim": 1.3}
    ),
    "mscale alone": dataclasses.replace(
        SMALL, rope_scaling={k: v for k, v in SMALL.rope_scaling.items() if k != "mscale_all_dim"}
    ),
}


def by_hand(pair: int) -> float:
    """Radians per position of one of V3's 32 pairs, float64 (arXiv 2309.00071, section 3.2; DeepSeek's constants)."""
    plain = 10000 ** (-2 * pair / 64)
    low, high = (64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1))
    slowed = min(max((pair - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0.0), 1.0)
    return plain / 40 * slowed + plain * (1 - slowed)


def test_frequencies_of_v3_are_the_papers():
    found = frequencies(V3).double()
    expected = torch.tensor([by_hand(pair) for pair in range(32)], dtype=torch.float64)
    assert float(((found - expected) / expected).abs().max()) <= 3e-7
    assert found[0] == 1.0 and relative(found[-1], torch.tensor(10000 ** (-62 / 64) / 40)) <= 3e-7  # both ends


def test_angles_of_v3_are_those_of_transformers_to_the_end_of_its_context():
    """Both multiply in float32, whose last place at position 163,839 is 0.016 radians: frequencies must be the same
    but for two roundings."""
    rope = DeepseekV3RotaryEmbedding(DeepseekV3Config(**V3.to_hf()))
    positions = torch.tensor([0, 1, 4095, 4096, 65_536, 163_839])
    cos, sin = rotation(V3, positions)
    theirs = [t[0, :, :32] for t in rope(torch.zeros(1), positions[None])]
    assert float((frequencies(V3) / rope.inv_freq - 1).abs().max()) <= 1.2e-7
    assert float((cos - theirs[0]).abs().max()) <= 0.02 and float((sin - theirs[1]).abs().max()) <= 0.02
    assert float((cos[:4] - theirs[0][:4]).abs().max()) <= 5e-4


def test_the_softmax_of_v3_is_sharpened_by_the_square_of_its_mscale():
    """DeepSeek's inference code: 192^-0.5 (0.1 ln 40 + 1)^2; cosine and sine are not scaled, as both mscales are 1."""
    assert softmax_scale(V3) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    cos, sin = rotation(V3, torch.arange(64))
    assert relative(cos.square() + sin.square(), torch.ones(64, 32)) <= 1e-6


def test_unequal_mscales_scale_the_rotation_by_their_ratio():
    config = SETTINGS["unequal mscale, q_lora"]
    cos, sin = rotation(config, torch.arange(5))
    ratio = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * 1.3 * math.log(40) + 1)
    assert relative((cos.square() + sin.square()).sqrt(), torch.full((5, 8), ratio)) <= 1e-6
    assert softmax_scale(config) == pytest.approx(config.qk_head_dim**-0.5 * (0.13 * math.log(40) + 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_gradients_beyond_the_original_context_are_those_of_transformers(name):
    """Documents of up to 19 times the original context of 16."""
    model = random_model(SETTINGS[name])
    assert_parity(model, transformers_twin(model), [300, 40, 16])


def test_without_yarn_those_positions_would_differ():
    """The test above would not notice a setting that changes nothing."""
    tokens, positions, bounds = packed([300], TINY.vocab_size)
    models = [random_model(config) for config in (SMALL, dataclasses.replace(SMALL, rope_scaling=None))]
    with torch.no_grad():
        logits = [model.logits(model(tokens, positions, bounds).hidden) for model in models]
    assert relative(*logits) > 0.05
