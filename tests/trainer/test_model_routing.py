"""Routing: selection, replay, load, the bias that balances, and the sequence-wise loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.trainer.test_model_parity import CONFIGS, TINY, packed, random_model, relative
from trainer.model.moe import Router, Routing, select_experts, sequence_balance
from trainer.model.v3 import V3Model

LENGTHS = [6, 13, 2, 9]
GROUPED = CONFIGS["groups"]


def choose_by_hand(scores: list[float], bias: list[float], n_group: int, topk_group: int, k: int) -> set[int]:
    """The report's rule, one token, plain Python."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // n_group
    groups = [biased[g * size : (g + 1) * size] for g in range(n_group)]
    value = [sum(sorted(group)[-2:]) for group in groups]
    kept = sorted(range(n_group), key=lambda g: -value[g])[:topk_group]
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return set(sorted(allowed, key=lambda e: -biased[e])[:k])


@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 5.0])
def test_selection_follows_the_report_whatever_the_bias(bias_scale):
    """A large negative bias makes kept experts score below 0: a mask of 0 would then pick from dropped groups."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64) * bias_scale - bias_scale
    chosen = select_experts(scores + bias, 4, 2, 6)
    for token, experts in zip(scores.tolist(), chosen.tolist(), strict=True):
        assert set(experts) == choose_by_hand(token, bias.tolist(), 4, 2, 6)


@pytest.mark.parametrize("bias_scale", [0.3, 5.0])
def test_selection_and_weights_are_those_of_transformers(bias_scale):
    """transformers 5.19 masks dropped groups with -inf too; older releases used 0."""
    router = Router(GROUPED)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=generator)
    router.bias.normal_(generator=generator).mul_(bias_scale).sub_(bias_scale)
    twin = DeepseekV3TopkRouter(DeepseekV3Config(**GROUPED.to_hf()))
    twin.weight.data, twin.e_score_correction_bias = router.weight.data, router.bias
    x = torch.randn(300, GROUPED.hidden_size, generator=generator)
    own = router(x)
    _, weights, experts = twin(x)
    assert torch.equal(own.experts.sort(-1).values, experts.sort(-1).values)
    by_expert = torch.zeros(300, 8).scatter_(1, own.experts, own.weights.detach())
    assert relative(by_expert, torch.zeros(300, 8).scatter_(1, experts, weights.detach())) <= 1e-6


def test_a_mask_of_zero_would_choose_otherwise():
    """Where the two rules differ: the test above would not notice without such tokens."""
    biased = torch.tensor([[-0.1, -0.2, -0.9, -0.8]])  # two groups, the first is kept
    assert set(select_experts(biased, 2, 1, 2)[0].tolist()) == {0, 1}
    assert set(biased.clone().index_fill_(1, torch.tensor([2, 3]), 0.0).topk(2).indices[0].tolist()) == {2, 3}


def test_the_bias_selects_and_never_weighs():
    router = Router(TINY)
    router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    router.bias[3] = 10.0
    routing = router(x)
    assert (routing.experts == 3).any(-1).all()
    scores = (x.double() @ router.weight.double().T).sigmoid().gather(1, routing.experts)
    expected = scores / scores.sum(-1, keepdim=True) * TINY.routed_scaling_factor
    assert relative(routing.weights.double(), expected) <= 1e-6


def test_load_counts_the_chosen_experts_of_every_layer():
    model = random_model(dataclasses.replace(GROUPED, num_nextn_predict_layers=1))
    tokens, positions, bounds = packed(LENGTHS, TINY.vocab_size)
    output = model(tokens, positions, bounds)
    (mtp,) = model.mtp(output.hidden, tokens, positions, bounds)
    for found in (output, mtp):
        for layer in range(len(found.load)):
            count = [int((found.experts[:, layer] == e).sum()) for e in range(8)]
            assert found.load[layer].tolist() == count
    assert output.load.shape == (2, 8)
    assert mtp.load.sum() == len(tokens) * 3


def test_replaying_its_own_routing_changes_nothing():
    model = random_model(GROUPED)
    batch = packed(LENGTHS, TINY.vocab_size)
    free = model(*batch)
    replayed = model(*batch, routed_experts=free.experts.to(torch.int16))
    assert torch.equal(free.experts, replayed.experts)
    assert torch.equal(free.hidden, replayed.hidden)


def test_replay_decides_the_experts_and_minus_one_leaves_them_to_the_router():
    model = random_model(GROUPED)
    batch = packed(LENGTHS, TINY.vocab_size)
    free = model(*batch)
    replay = torch.full_like(free.experts, -1)
    replay[::2, 0] = torch.tensor([7, 0, 3])  # every second token, first layer with experts; across groups on purpose
    output = model(*batch, routed_experts=replay)
    assert (output.experts[::2, 0] == torch.tensor([7, 0, 3])).all()
    assert torch.equal(output.experts[1::2, 0], free.experts[1::2, 0])
    assert output.load[0].sum() == 3 * len(batch[0])
    assert not torch.equal(output.hidden, free.hidden)


def test_replayed_experts_get_gradients_through_the_routers_own_scores():
    model = random_model(TINY)
    batch = packed(LENGTHS, TINY.vocab_size)
    replay = torch.full((len(batch[0]), 2, 3), -1)
    replay[:] = torch.tensor([1, 4, 6])
    model(*batch, routed_experts=replay).hidden.square().sum().backward()
    for layer in model.layers[1:]:
        used = layer.ffn.experts.w13.grad.flatten(1).abs().amax(1) > 0
        assert used.tolist() == [e in (1, 4, 6) for e in range(8)]
        assert (layer.ffn.router.weight.grad.abs().amax(1) > 0).tolist() == used.tolist()


def test_the_bias_moves_gamma_against_the_sign_of_the_load_error():
    model = V3Model(dataclasses.replace(TINY, num_nextn_predict_layers=1)).init_weights(0)
    load = torch.tensor([[10, 10, 10, 10, 10, 10, 10, 10], [0, 20, 10, 10, 10, 10, 9, 11]])
    model.update_router_bias(load, gamma=0.001)
    biases = [router.bias for router in model.routers()]
    assert biases[0].tolist() == [0.0] * 8
    assert torch.allclose(biases[1], torch.tensor([1.0, -1, 0, 0, 0, 0, 1, -1]) * 0.001)
    assert biases[2].tolist() == [0.0] * 8  # the load has no row for the MTP depth
    model.update_router_bias(torch.cat((load, load[1:])), gamma=0.001)
    assert torch.equal(biases[2], torch.tensor([1.0, -1, 0, 0, 0, 0, 1, -1]) * 0.001)


def test_the_bias_evens_out_a_skewed_load():
    """Start with a router that prefers two experts; 100 updates of 0.02 bring the largest share near the mean."""
    model = V3Model(dataclasses.replace(TINY, num_hidden_layers=2)).init_weights(0)
    (router,) = model.routers()
    router.weight.data[:2] += 0.3 * torch.randn(TINY.hidden_size, generator=torch.Generator().manual_seed(3))
    batch = packed([64] * 6, TINY.vocab_size)

    def largest() -> float:
        with torch.no_grad():
            load = model(*batch).load
        model.update_router_bias(load, 0.02)
        return float(load.max() / load.float().mean())

    before = largest()
    for _ in range(100):
        after = largest()
    assert before > 1.7
    assert after < 1.2


def test_a_load_of_another_shape_is_an_error():
    model = V3Model(TINY).init_weights(0)
    with pytest.raises(ValueError, match=r"found a load of shape \[3, 8\], expected \[2, 8\]"):
        model.update_router_bias(torch.zeros(3, 8), 0.001)


def test_router_biases_stay_float32_in_a_bfloat16_model():
    model = random_model(TINY)
    before = [router.bias.clone() for router in model.routers()]
    model.to(torch.bfloat16)
    model.update_router_bias(torch.arange(16).view(2, 8), gamma=1e-4)
    for router, bias in zip(model.routers(), before, strict=True):
        assert router.bias.dtype == torch.float32
        assert torch.allclose((router.bias - bias).abs(), torch.tensor(1e-4), rtol=1e-3)


def test_sequence_balance_is_the_reports_formula_per_document():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(sum(LENGTHS), 8, generator=generator).requires_grad_()
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    losses = sequence_balance(Routing(scores, None, None, None), 3, ids, 4)
    losses.sum().backward()

    exact = scores.detach().double().requires_grad_()
    expected = []
    for document in exact.split(LENGTHS):  # eq. 17-20, token by token
        t, total = len(document), 0.0
        for i in range(8):
            hits = sum(1 for token in document if i in sorted(range(8), key=lambda e: -float(token.detach()[e]))[:3])
            f = 8 / (3 * t) * hits
            p = sum(token[i] / token.sum() for token in document) / t
            total = total + f * p
        expected.append(total)
    expected = torch.stack(expected)
    expected.sum().backward()
    assert relative(losses.double(), expected) <= 1e-6
    assert relative(scores.grad.double(), exact.grad) <= 1e-5


def test_sequence_balance_is_one_when_even_and_experts_over_k_when_one_set_takes_all():
    """Even: the affinities take turns. Skewed: the same k experts have all the affinity."""
    ids = torch.zeros(8, dtype=torch.long)
    turns = torch.stack([torch.roll(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), i) for i in range(8)])
    assert sequence_balance(Routing(turns, None, None, None), 2, ids, 1).item() == pytest.approx(1.0)
    assert sequence_balance(Routing(turns[:1].expand(8, 8), None, None, None), 2, ids, 1).item() == pytest.approx(4.0)


def test_the_model_returns_the_balance_of_every_layer_and_document_only_when_asked():
    model = random_model(TINY)
    batch = packed(LENGTHS, TINY.vocab_size)
    assert model(*batch).balance is None
    balance = model(*batch, balance=True).balance
    assert balance.shape == (2, 4)
    balance.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers())
