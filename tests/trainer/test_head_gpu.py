"""The head's kernels on a GPU against float64 on the CPU, and how little memory a large vocabulary takes."""

import pytest
import torch

from trainer.model import head
from trainer.model.head import token_logprobs

pytestmark = pytest.mark.gpu

N, HIDDEN, VOCABULARY = 200, 64, 5003


def inputs(dtype, n=N, hidden=HIDDEN, vocabulary=VOCABULARY):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, hidden, generator=g, device="cuda", dtype=dtype).requires_grad_()
    weight = (3 * hidden**-0.5 * torch.randn(vocabulary, hidden, generator=g, device="cuda", dtype=dtype)).detach()
    return x, weight.requires_grad_(), torch.randint(0, vocabulary, (n,), generator=g, device="cuda")


def reference(x, weight, targets, temperature):
    logprobs = (x.double() @ weight.double().T / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("keep", [2**31, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("temperature", "entropy"), [(1.0, False), (0.6, True)])
def test_values_and_gradients_are_those_of_float64(dtype, bound, keep, temperature, entropy, monkeypatch):
    """Values keep float32's digits in both dtypes: BF16 products come out in float32. Gradients enter their products
    in the weights' dtype (bound relative to the norm)."""
    monkeypatch.setattr(head, "KEEP_BYTES", keep)
    x, weight, targets = inputs(dtype)
    logprobs, entropies = token_logprobs(x, weight, targets, temperature=temperature, entropy=entropy, chunk=64)
    expected, expected_entropies = reference(x, weight, targets, temperature)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=2e-5)
    weights = torch.linspace(-1, 2, N, device="cuda")
    found, wanted = (weights * logprobs).sum(), (weights * expected).sum()
    if entropy:
        torch.testing.assert_close(entropies.double(), expected_entropies, rtol=1e-5, atol=2e-5)
        found, wanted = found + (weights * entropies).sum(), wanted + (weights * expected_entropies).sum()
    grads = torch.autograd.grad(found, (x, weight))
    for f, w in zip(grads, torch.autograd.grad(wanted, (x, weight)), strict=True):
        assert f.dtype == dtype
        assert (f.double() - w.double()).norm() < bound * w.double().norm()


@pytest.mark.parametrize("keep", [2**31, 0], ids=["kept", "recomputed"])
def test_the_gradient_of_the_entropy_alone_is_right(keep, monkeypatch):
    monkeypatch.setattr(head, "KEEP_BYTES", keep)
    x, weight, targets = inputs(torch.float32)
    _, entropies = token_logprobs(x, weight, targets, entropy=True, chunk=64)
    (found,) = torch.autograd.grad(entropies.sum(), x)
    (wanted,) = torch.autograd.grad(reference(x, weight, targets, 1.0)[1].sum(), x)
    assert (found - wanted).norm() < 2e-5 * wanted.norm()


def test_without_gradient_nothing_is_kept():
    x, weight, targets = inputs(torch.bfloat16, n=4096)
    token_logprobs(x.detach(), weight.detach(), targets, chunk=256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        token_logprobs(x, weight, targets, chunk=256)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2 * 256 * VOCABULARY * 4 + 2**20  # the logits of two chunks, where 4096 tokens would be sixteen


def test_a_second_backward_pass_over_kept_probabilities_is_refused():
    x, weight, targets = inputs(torch.bfloat16)
    loss = token_logprobs(x, weight, targets)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_64k_tokens_of_a_vocabulary_of_129280_take_less_than_4_gb():
    """Their float32 logits would take 34 GB, twice in a backward pass. What is left: one chunk of logits and of their
    gradient, and the weights' gradient in float32 and BF16."""
    x, weight, targets = inputs(torch.bfloat16, 65_536, 2048, 129_280)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, entropies = token_logprobs(x, weight, targets, entropy=True)
    (logprobs.mean() - 0.01 * entropies.mean()).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 4e9, f"{extra / 1e9:.2f} GB"
    some = torch.randint(0, 65_536, (64,), device="cuda")
    expected, expected_entropies = reference(x[some].detach(), weight.detach(), targets[some], 1.0)
    torch.testing.assert_close(logprobs[some].double(), expected, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(entropies[some].double(), expected_entropies, rtol=1e-5, atol=5e-5)
