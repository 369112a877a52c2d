"""Group-limited routing: this model, DeepSeek's inference code and transformers 5.19, and where they part.

All three score a group by the sum of its two best biased affinities and put experts of dropped groups out of the
question with -inf. Older releases of transformers and the remote code of DeepSeek's checkpoints set them to 0 instead,
which picks an expert of a dropped group wherever kept ones are biased below 0. transformers and the remote code add
1e-20 to the sum that the weights are divided by, DeepSeek's inference code does not; this model does.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.trainer.test_model_parity import TINY, relative
from trainer.model.moe import Router, select_experts

CONFIG = dataclasses.replace(TINY, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)


def deepseek(logits: list[float], bias: list[float], dropped_are: float = float("-inf")) -> dict[int, float]:
    """DeepSeek's rule for one token in plain Python floats: chosen expert -> weight."""
    c = CONFIG
    scores = [1 / (1 + 2.718281828459045 ** -x) for x in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = c.n_routed_experts // c.n_group
    groups = [biased[g * size : (g + 1) * size] for g in range(c.n_group)]
    by_score = sorted(range(c.n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))
    masked = [b if e // size in by_score[: c.topk_group] else dropped_are for e, b in enumerate(biased)]
    chosen = sorted(range(c.n_routed_experts), key=lambda e: -masked[e])[: c.num_experts_per_tok]
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / total * c.routed_scaling_factor for e in chosen}


def routers(shift: float) -> tuple[Router, DeepseekV3TopkRouter, torch.Tensor]:
    """The two routers with the same weights, biases around `shift`, and 200 tokens."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = Router(CONFIG), DeepseekV3TopkRouter(DeepseekV3Config(**CONFIG.to_hf()))
    ours.weight.data.normal_(0, 0.2, generator=generator)
    ours.bias.normal_(0, 0.2, generator=generator).add_(shift)
    theirs.weight.data, theirs.e_score_correction_bias = ours.weight.data, ours.bias
    return ours, theirs, torch.randn(200, CONFIG.hidden_size, generator=generator)


def dense(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(experts), CONFIG.n_routed_experts).scatter_(1, experts, weights.detach().float())


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, -3.0])
def test_three_routers_choose_and_weigh_alike(shift):
    """Biases that leave every kept expert above, around and below 0."""
    ours, theirs, x = routers(shift)
    routing = ours(x)
    _, weights, experts = theirs(x)
    found = dense(routing.experts, routing.weights)
    assert torch.equal(found > 0, dense(experts, weights) > 0)
    assert relative(found, dense(experts, weights)) <= 1e-6
    logits = (x.double() @ ours.weight.double().T).tolist()
    for row, token in zip(found, logits, strict=True):
        expected = deepseek(token, ours.bias.double().tolist())
        assert {e: pytest.approx(w, rel=1e-5) for e, w in expected.items()} == {
            e: w for e, w in enumerate(row.tolist()) if w > 0
        }


@pytest.mark.parametrize(("shift", "differs"), [(1.0, False), (-1.0, True), (-3.0, True)])
def test_a_mask_of_zero_is_another_rule_only_where_biases_sink_below_zero(shift, differs):
    ours, _, x = routers(shift)
    bias = ours.bias.double().tolist()
    logits = (x.double() @ ours.weight.double().T).tolist()
    unequal = sum(deepseek(t, bias).keys() != deepseek(t, bias, dropped_are=0.0).keys() for t in logits)
    assert (unequal > 0) is differs


def test_no_expert_of_a_dropped_group_is_ever_chosen():
    biased = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) - 5
    chosen = select_experts(biased, 4, 2, 4)
    assert int(torch.stack([(chosen // 4 == g).any(1) for g in range(4)]).sum(0).max()) <= 2


def test_the_guard_of_the_denominator_shows_only_below_affinities_of_a_hundred_trillionth():
    """1e-20 beside a sum of 1e-13: 1e-7 of a weight. Beside 1e-26 the weights fade, in transformers as here; DeepSeek's
    inference code would still make them add up."""
    ours, theirs, _ = routers(0.0)
    ours.bias.zero_()
    for logit, total in ((-30.0, 1.0), (-60.0, 0.0)):
        ours.weight.data.fill_(logit)
        x = torch.zeros(1, CONFIG.hidden_size)
        x[0, 0] = 1.0
        weights = ours(x).weights.detach() / CONFIG.routed_scaling_factor
        assert float(weights.sum()) == pytest.approx(total, abs=1e-5)
        theirs.e_score_correction_bias = ours.bias
        assert torch.equal(theirs(x)[1], ours(x).weights)
