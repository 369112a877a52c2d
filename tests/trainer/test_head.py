"""The chunked head against a float64 log_softmax, and that it never holds the logits of more than a chunk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.model.head import token_logprobs

N, HIDDEN, VOCABULARY = 37, 24, 101


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, HIDDEN, generator=g)
    weight, bias = 0.3 * torch.randn(VOCABULARY, HIDDEN, generator=g), torch.randn(VOCABULARY, generator=g)
    targets = torch.randint(0, VOCABULARY, (N,), generator=g)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], targets


def reference(hidden, weight, bias, targets, temperature, softcap):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [None, 8, 37])
@pytest.mark.parametrize(("temperature", "bias", "softcap"), [(1.0, False, None), (0.6, True, None), (1.3, True, 5.0)])
def test_values_and_gradients_are_those_of_float64(chunk, temperature, bias, softcap):
    (hidden, weight, b), targets = inputs()
    used = [hidden, weight, b] if bias else [hidden, weight]
    logits = {"temperature": temperature, "bias": b if bias else None, "softcap": softcap}
    logprobs, entropy = token_logprobs(hidden, weight, targets, **logits, entropy=True, chunk=chunk)
    doubles = [t.detach().double().requires_grad_() for t in used]
    expected, expected_entropy = reference(
        doubles[0], doubles[1], doubles[2] if bias else None, targets, temperature, softcap
    )
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, N)
    found = torch.autograd.grad((weights * logprobs).sum() + (weights.flip(0) * entropy).sum(), used)
    wanted = torch.autograd.grad((weights * expected).sum() + (weights.flip(0) * expected_entropy).sum(), doubles)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.double(), w, rtol=1e-4, atol=1e-5 * w.abs().max().item())


def test_entropy_can_be_left_out_and_the_gradient_of_one_output_alone_is_right():
    (hidden, weight, _), targets = inputs()
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=8)
    assert entropy is None
    _, entropy = token_logprobs(hidden, weight, targets, entropy=True, chunk=8)
    (found,) = torch.autograd.grad(entropy.sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(double, weight.double(), None, targets, 1.0, None)[1].sum(), double)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_give_float32_logits():
    """The logits are those of the rounded weights in float32, not rounded again to 8 bits."""
    (hidden, weight, _), targets = inputs(torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, weight, targets, chunk=8)
    expected, _ = reference(hidden.double(), weight.double(), None, targets, 1.0, None)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert {g.dtype for g in grads} == {torch.bfloat16}
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    for f, w in zip(grads, wanted, strict=True):
        assert (f.double() - w.double()).norm() < 1e-2 * w.double().norm()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_logits_of_more_than_a_chunk_never_exist():
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(0, 1000, (512,))
    with Largest() as largest:
        logprobs, entropy = token_logprobs(hidden, weight, targets, entropy=True, chunk=16)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.elements == 16 * 1000
    assert weight.grad is not None and hidden.grad is not None


def test_a_temperature_of_zero_is_refused():
    (hidden, weight, _), targets = inputs()
    with pytest.raises(ValueError, match="temperature 0"):
        token_logprobs(hidden, weight, targets, temperature=0)
