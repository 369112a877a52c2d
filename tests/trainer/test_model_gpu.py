"""The V3 model's kernels for a GPU against the model on the CPU: values, every gradient, and no wait for the device.

The routing is replayed, so that a rounding never sends a token to another expert than the reference's. Errors are
‖found - reference‖ / ‖reference‖ against float32 on the CPU. Bounds: float32 1e-4; BF16 3e-2 for a model of two layers,
or 1.25 times (plus 3e-3) what the same model in BF16 on the CPU errs by.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trainer.test_model_parity import random_model
from trainer.model.documents import group_documents
from trainer.model.moe import Router, select_experts
from trainer.model.packed_attention import packed_attention
from trainer.model.rope import turns
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.gpu

SMALL = V3Config(
    vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    max_position_embeddings=4096, initializer_range=0.1, num_nextn_predict_layers=1,
)  # fmt: skip
CONFIGS = {
    "groups": SMALL,
    "q_lora": dataclasses.replace(SMALL, q_lora_rank=24),
    "half_rope": dataclasses.replace(SMALL, rope_interleave=False, n_shared_experts=0, norm_topk_prob=False),
    "12_experts": dataclasses.replace(SMALL, n_routed_experts=12, n_group=1, topk_group=1, q_lora_rank=24),
    "3_groups": dataclasses.replace(SMALL, n_routed_experts=12, n_group=3, topk_group=2),
}
MIXED, EQUAL, ONE_TOKEN = [7, 130, 1, 64, 33], [48, 48, 48], [1]
NAMES = {"mixed": MIXED, "equal": EQUAL, "one_token": ONE_TOKEN}


def error(found: torch.Tensor, expected: torch.Tensor, least: float = 1e-20) -> float:
    """`least` stands for the expected norm where that is lower: a gradient that is zero but for rounding."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.isfinite().all()
    return float((found - expected).norm() / expected.norm().clamp_min(least))


def inputs(lengths: list[int], config: V3Config = SMALL, spread: int | None = None):
    """Tokens, positions, bounds and a routing over the first `spread` experts; one token in five routes itself."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, config.vocab_size, (sum(lengths),), generator=g)
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    drawn = torch.rand(len(tokens), config.moe_layers, spread or config.n_routed_experts, generator=g)
    return tokens, positions, bounds, drawn.topk(config.num_experts_per_tok).indices


def run(config, dtype, device, batch, **options):
    model = random_model(config, **options).to(device, dtype)
    tokens, positions, bounds, experts = batch
    out = model(tokens.to(device), positions.to(device), bounds, experts.to(device), balance=True)
    weight = torch.randn(len(tokens), config.hidden_size, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    ((out.hidden * weight).float().sum() + out.balance.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


@pytest.mark.parametrize("lengths", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_that_of_the_cpu(name, lengths):
    batch = inputs(lengths, CONFIGS[name])
    out, gradients = run(CONFIGS[name], torch.float32, "cuda", batch)
    expected, expected_gradients = run(CONFIGS[name], torch.float32, "cpu", batch)
    assert torch.equal(out.load.cpu(), expected.load) and torch.equal(out.experts.cpu(), expected.experts)
    assert error(out.hidden, expected.hidden) <= 1e-4 and error(out.balance, expected.balance) <= 1e-4
    assert gradients.keys() == expected_gradients.keys()
    # Queries and keys of a lone token have no gradient: what a kernel finds is the rounding of the others' gradients.
    total = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    least = float(total) / 10 if lengths is ONE_TOKEN else 1e-2
    for parameter, gradient in gradients.items():
        assert error(gradient, expected_gradients[parameter], least) <= 1e-4, parameter


@pytest.mark.parametrize("lengths", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("name", ["groups", "q_lora", "half_rope"])
def test_bfloat16_errs_no_more_than_on_the_cpu(name, lengths):
    batch = inputs(lengths, CONFIGS[name])
    exact, exact_gradients = run(CONFIGS[name], torch.float32, "cpu", batch)
    cpu, cpu_gradients = run(CONFIGS[name], torch.bfloat16, "cpu", batch)
    out, gradients = run(CONFIGS[name], torch.bfloat16, "cuda", batch)
    assert error(out.hidden, exact.hidden) <= min(1.25 * error(cpu.hidden, exact.hidden) + 3e-3, 3e-2)
    assert gradients.keys() == exact_gradients.keys()
    # Queries and keys of a lone token have no gradient: what a kernel finds is the rounding of the others' gradients.
    total = torch.stack([g.norm() for g in exact_gradients.values()]).norm()
    least = float(total) / 10 if lengths is ONE_TOKEN else 1e-2
    for name, gradient in gradients.items():
        bound = max(1.25 * error(cpu_gradients[name], exact_gradients[name], least) + 3e-3, 3e-2)
        assert error(gradient, exact_gradients[name], least) <= bound, name


@pytest.mark.parametrize("lengths", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("heads,nope,rope,v", [(2, 16, 16, 16), (20, 128, 64, 128)])
@pytest.mark.parametrize("interleave", [True, False])
def test_attention_is_softmax_over_the_document(heads, nope, rope, v, interleave, lengths):
    """BF16 against float32 on the CPU: 1e-2, values and gradients."""
    config = dataclasses.replace(SMALL, num_attention_heads=heads, qk_nope_head_dim=nope, qk_rope_head_dim=rope)
    _, positions, bounds, _ = inputs(lengths)
    g = torch.Generator().manual_seed(0)
    shapes = ((len(positions), heads, nope + rope), (len(positions), heads, nope + v), (len(positions), rope))
    arrays = [torch.randn(shape, generator=g).to(torch.bfloat16) for shape in shapes]
    weight = torch.randn(len(positions), heads, v, generator=g)
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        own = [t.to(device, dtype).requires_grad_() for t in arrays]
        turn = turns(config, positions.to(device))
        documents = group_documents(bounds, device=torch.device(device))
        out = packed_attention(own[0] * 1, *own[1:], turn, documents, 0.1, interleave)
        found.append([out, *torch.autograd.grad((out.float() * weight.to(device)).sum(), own)])
    # Queries and keys of a lone token have no gradient: what a kernel finds is the rounding of the others' gradients.
    least = float(torch.stack([t.norm() for t in found[0]]).norm()) if lengths is ONE_TOKEN else 1e-2
    for a, b in zip(found[1], found[0], strict=True):
        assert error(a, b, least) <= 1e-2


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_experts_without_tokens_get_a_gradient_of_zero(dtype, bound):
    batch = inputs(MIXED, spread=3)
    _, expected = run(SMALL, torch.float32, "cpu", batch)
    _, gradients = run(SMALL, dtype, "cuda", batch)
    for name in ("layers.1.ffn.experts.w13", "layers.1.ffn.experts.w2"):
        assert torch.count_nonzero(gradients[name][3:]) == 0
        assert error(gradients[name], expected[name]) <= bound


@pytest.mark.parametrize("checkpointing", ["selective", True])
def test_what_is_computed_again_changes_no_gradient(checkpointing):
    """1e-2 in BF16: flash attention's gradients are sums in no fixed order."""
    batch = inputs(MIXED)
    plain, gradients = run(SMALL, torch.bfloat16, "cuda", batch)
    again, others = run(SMALL, torch.bfloat16, "cuda", batch, activation_checkpointing=checkpointing)
    assert torch.equal(plain.hidden, again.hidden)
    for name, gradient in gradients.items():
        assert error(others[name], gradient) <= 1e-2, name


def test_the_router_chooses_as_the_rule_says():
    """DeepSeek-V3's own router, 256 experts in 8 groups; scores to 1e-6, the same experts wherever the rule's choice
    does not hang on a difference of that size."""
    config = dataclasses.replace(
        SMALL, n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8, hidden_size=256
    )
    router = Router(config)
    g = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=g)
    router.bias.normal_(generator=g).mul_(0.3)
    x = torch.randn(1000, config.hidden_size, generator=g)
    expected = router(x)
    found = router.cuda()(x.cuda())
    assert (found.scores.cpu() - expected.scores).abs().max() < 1e-4
    rule = select_experts(found.scores + router.bias, 8, 4, 8)
    assert torch.equal(found.experts.sort(-1).values, rule.sort(-1).values)
    assert torch.equal(found.load, torch.bincount(rule.flatten(), minlength=256))
    by_rule = found.scores.gather(1, found.experts)
    by_rule = by_rule / by_rule.sum(-1, keepdim=True) * config.routed_scaling_factor
    torch.testing.assert_close(found.weights, by_rule, rtol=1e-6, atol=1e-7)


def test_a_layer_of_the_reference_size_is_that_of_float32():
    """Shapes of DeepSeek-V3's heads and latents, 32 experts of 768: 1.5e-2 for the output, 3e-2 for gradients."""
    config = dataclasses.replace(
        SMALL, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=1, first_k_dense_replace=0,
        num_attention_heads=16, n_routed_experts=32, num_experts_per_tok=6, n_group=4, topk_group=2, kv_lora_rank=512,
        q_lora_rank=768, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, initializer_range=0.02,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    for lengths in ([700, 3, 900, 256], [512, 512]):
        batch = inputs(lengths, config)
        expected, expected_gradients = run(config, torch.float32, "cuda", batch)
        out, gradients = run(config, torch.bfloat16, "cuda", batch)
        assert error(out.hidden, expected.hidden) <= 1.5e-2
        for name, gradient in gradients.items():
            assert error(gradient, expected_gradients[name]) <= 3e-2, name


@pytest.mark.parametrize("lengths", [MIXED, EQUAL], ids=["mixed", "equal"])
def test_a_step_never_waits_for_the_device(lengths):
    model = random_model(SMALL).to("cuda", torch.bfloat16)
    tokens, positions, bounds, experts = inputs(lengths)
    tokens, positions, experts = tokens.cuda(), positions.cuda(), experts.cuda()

    def step(replay):
        out = model(tokens, positions, bounds, replay, balance=True)
        (mtp,) = model.mtp(out.hidden, tokens, positions, bounds)
        (out.hidden.float().square().mean() + mtp.hidden.float().square().mean() + out.balance.sum()).backward()

    step(experts)
    step(None)  # both compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(experts)
        step(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_experts_give_the_same_bits_in_every_run():
    from trainer.model.experts import Call, experts_sum
    from trainer.model.kernels.gpu_moe import KernelRows

    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, device="cuda").to(torch.bfloat16)  # noqa: E731
    x, w13, w2 = draw(3000, 256), draw(16, 256, 256) / 16, draw(16, 256, 128) / 11
    chosen = torch.rand(3000, 16, generator=g, device="cuda").topk(4).indices
    weights, dy = torch.rand(3000, 4, generator=g, device="cuda"), draw(3000, 256)
    results = []
    for _ in range(3):
        arrays = [t.clone().requires_grad_() for t in (x, weights, w13, w2)]
        call = Call(lambda chosen, weights: KernelRows.of(chosen, weights, 16), "bf16")
        y = experts_sum(arrays[0], arrays[1], chosen, arrays[2], arrays[3], None, None, call)
        results.append([y, *torch.autograd.grad(y, arrays, dy)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
