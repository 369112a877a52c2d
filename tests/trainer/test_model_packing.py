"""Packed documents: what stands beside a document never changes it, on either path of the attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.trainer.test_model_parity import CONFIGS, TINY, packed, random_model, relative
from trainer.model import packed_attention as attention
from trainer.model.documents import group_documents
from trainer.model.layers import RMSNorm, swiglu
from trainer.model.rope import turns
from trainer.model.v3 import V3Model

LENGTHS = [5, 1, 17, 16, 30, 5]


def gradients(model: V3Model) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


@pytest.mark.parametrize("name", ["groups", "q_lora"])
def test_packed_equals_one_document_at_a_time(name):
    """1e-5 in float32, hidden states and gradients, MTP included."""
    model = random_model(dataclasses.replace(CONFIGS[name], num_nextn_predict_layers=2))
    tokens, positions, bounds = packed(LENGTHS, TINY.vocab_size)
    weight = torch.randn(3, len(tokens), TINY.hidden_size, generator=torch.Generator().manual_seed(9))

    def everything(tokens, positions, bounds):
        output = model(tokens, positions, bounds)
        return torch.stack([output.hidden, *(o.hidden for o in model.mtp(output.hidden, tokens, positions, bounds))])

    together = everything(tokens, positions, bounds)
    (together * weight).sum().backward()
    from_together = gradients(model)
    alone = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        one = slice(start, end)
        alone.append(everything(tokens[one], positions[one], torch.tensor([0, end - start])))
        (alone[-1] * weight[:, one]).sum().backward()
    assert relative(together, torch.cat(alone, dim=1)) <= 1e-5
    for parameter, expected in gradients(model).items():
        assert relative(from_together[parameter], expected) <= 1e-5, parameter


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("path", ["short documents", "scaled_dot_product_attention"])
def test_attention_is_softmax_over_the_document_up_to_the_token(path, interleave, monkeypatch):
    """Against float64, one document and head at a time, values and gradients."""
    if path != "short documents":
        monkeypatch.setattr(attention, "SHORT", 0)
    heads, nope, rope, v = 2, 6, 8, 5
    config = dataclasses.replace(TINY, rope_interleave=interleave)
    _, positions, bounds = packed(LENGTHS, 10)
    n, generator = len(positions), torch.Generator().manual_seed(0)
    q = torch.randn(n, heads, nope + rope, generator=generator).requires_grad_()
    kv = torch.randn(n, heads, nope + v, generator=generator).requires_grad_()
    k_pe = torch.randn(n, rope, generator=generator).requires_grad_()
    weight = torch.randn(n, heads, v, generator=generator)
    out = attention.packed_attention(q, kv, k_pe, turns(config, positions), group_documents(bounds), 0.3, interleave)
    found = [out, *torch.autograd.grad((out * weight).sum(), (q, kv, k_pe))]

    def turned(x, position):
        result = []
        for i in range(rope // 2):
            a, b = (x[2 * i], x[2 * i + 1]) if interleave else (x[i], x[i + rope // 2])
            angle = position / config.rope_theta ** (2 * i / rope)
            result.append((a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)))
        return torch.stack([value for pair in result for value in pair])

    exact = [t.detach().double().requires_grad_() for t in (q, kv, k_pe)]
    q64, kv64, pe64 = exact
    rows = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        keys = torch.stack([turned(pe64[t], t - start) for t in range(start, end)])
        for t in range(start, end):
            seen, per_head = slice(start, t + 1), []
            pe = [turned(q64[t, h, nope:], t - start) for h in range(heads)]
            for h in range(heads):
                logits = kv64[seen, h, :nope] @ q64[t, h, :nope] + keys[: t + 1 - start] @ pe[h]
                per_head.append((0.3 * logits).softmax(0) @ kv64[seen, h, nope:])
            rows.append(torch.stack(per_head))
    out64 = torch.stack(rows)
    expected = [out64, *torch.autograd.grad((out64 * weight).sum(), exact)]
    for a, b in zip(found, expected, strict=True):
        assert relative(a.double(), b) <= 2e-6


def test_long_documents_take_the_other_path_and_agree(monkeypatch):
    model = random_model(dataclasses.replace(TINY, num_hidden_layers=2, max_position_embeddings=1024))
    tokens, positions, bounds = packed([600, 20, 530], TINY.vocab_size)
    with torch.no_grad():
        long = model(tokens, positions, bounds).hidden
        monkeypatch.setattr(attention, "SHORT", 1000)
        assert relative(long, model(tokens, positions, bounds).hidden) <= 1e-5


def test_groups_hold_every_token_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 120, (300,), generator=generator)
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    documents = group_documents(bounds)
    tokens = torch.cat([group.tokens for group in documents.groups])
    assert torch.equal(tokens.sort().values, torch.arange(int(bounds[-1])))
    assert sum(group.source.numel() for group in documents.groups) <= 1.1 * len(tokens) + 1024
    assert len(documents.groups) <= 20
    for group in documents.groups:
        if group.real is not None:
            assert torch.equal(group.source.flatten()[group.real], group.tokens)


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 3, 3, 5]])
def test_bounds_that_describe_no_documents_are_an_error(bounds):
    with pytest.raises(ValueError, match="do not describe documents"):
        group_documents(torch.tensor(bounds))


def test_a_batch_that_does_not_fit_together_is_an_error():
    model = random_model(TINY)
    tokens, positions, bounds = packed([4, 3], TINY.vocab_size)
    with pytest.raises(ValueError, match="bounds end at 7, the batch has 6 tokens"):
        model(tokens[:6], positions[:6], bounds)
    with pytest.raises(ValueError, match=r"routed_experts of shape \[7, 1, 3\], expected \[7, 2, 3\]"):
        model(tokens, positions, bounds, routed_experts=torch.zeros(7, 1, 3))


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_norm_and_swiglu_have_the_gradients_of_their_formulas(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(40, 24, generator=generator).to(dtype)
    norm = RMSNorm(24, 1e-3)
    norm.weight.data.uniform_(0.5, 2, generator=generator)
    norm.to(dtype)

    x64, w64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w64
    expected = [expected, *torch.autograd.grad(expected, (x64, w64), grad.double())]
    y = norm(x)
    found = [y, *torch.autograd.grad(y, (x, norm.weight), grad)]
    for a, b in zip(found, expected, strict=True):
        assert relative(a.double(), b) <= bound

    gate, up = x64.chunk(2, -1)
    y64 = gate / (1 + (-gate).exp()) * up
    y = swiglu(x)
    assert relative(y.double(), y64) <= bound
    found = torch.autograd.grad(y, x, grad[:, :12])[0]
    assert relative(found.double(), torch.autograd.grad(y64, x64, grad[:, :12].double())[0]) <= bound


def test_activation_checkpointing_changes_no_gradient():
    """Bit for bit: the same operations again."""
    config = dataclasses.replace(CONFIGS["groups"], num_nextn_predict_layers=1)
    batch = packed(LENGTHS, TINY.vocab_size)
    results = []
    for checkpointing in (False, True):
        model = random_model(config, activation_checkpointing=checkpointing)
        output = model(*batch, balance=True)
        (mtp,) = model.mtp(output.hidden, *batch, balance=True)
        (output.hidden.square().sum() + mtp.hidden.sum() + output.balance.sum() + mtp.balance.sum()).backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_activation_checkpointing_keeps_fewer_bytes():
    kept = {}
    batch = packed([40] * 8, TINY.vocab_size)
    for checkpointing in (False, True):
        model = random_model(TINY, activation_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            model(*batch)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 4
