"""Head and optimizer kernels, interpreted: run by test_step_triton.py with TRITON_INTERPRET=1."""

import contextlib

import pytest
import torch

from trainer import masters
from trainer.model import head
from trainer.model.kernels import triton_adamw, triton_head

N, VOCABULARY, HIDDEN, TEMPERATURE = 13, 203, 16, 0.7


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(triton_head, "BLOCK", 64)  # several blocks a row, the last one not full


@pytest.mark.parametrize("keep", [2**31, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("parts", [("logprob",), ("entropy",), ("logprob", "entropy")], ids="+".join)
def test_head_is_that_of_float64(keep, parts, monkeypatch):
    monkeypatch.setattr(head, "KEEP_BYTES", keep)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, HIDDEN, generator=g).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (N,), generator=g)
    weights = torch.randn(2, N, generator=g)
    logprobs, entropies = head._FusedLogprobs.apply(hidden, weight, targets, TEMPERATURE, "entropy" in parts, 5, True)
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    everything = (doubles[0] @ doubles[1].T / TEMPERATURE).log_softmax(-1)
    expected = {
        "logprob": everything.gather(1, targets[:, None])[:, 0],
        "entropy": -(everything.exp() * everything).sum(-1),
    }
    found = {"logprob": logprobs, "entropy": entropies}
    for name in parts:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    ours, theirs = (sum((w * values[name]).sum() for w, name in zip(weights, parts, strict=False))
                    for values in (found, expected))  # fmt: skip
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, doubles), strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize(("moments", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adamw_is_that_of_float64(moments, bound):
    """Five steps, clipped; BF16 moments within 1 % of the way (the interpreter cuts BF16 off, a GPU rounds)."""
    g = torch.Generator().manual_seed(0)
    n, lr = 3000, 1e-2
    weight = torch.randn(n, generator=g).bfloat16()
    master, m, v = weight.float(), torch.zeros(n, dtype=moments), torch.zeros(n, dtype=moments)
    start = master.double()
    p, exact_m, exact_v = start.clone(), torch.zeros(n).double(), torch.zeros(n).double()
    options = {"lr": lr, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}
    for step in range(1, 6):
        grad = torch.randn(n, generator=g).bfloat16()
        triton_adamw.adamw(weight, master, m, v, grad, grad.float().norm(), step=step, **options)
        clipped = grad.double() / grad.double().norm()
        exact_m, exact_v = 0.9 * exact_m + 0.1 * clipped, 0.95 * exact_v + 0.05 * clipped**2
        direction = exact_m / (1 - 0.9**step) / ((exact_v / (1 - 0.95**step)).sqrt() + 1e-8)
        p -= lr * (direction + 0.1 * p)
    assert (master.double() - p).norm() < bound * (p if moments == torch.float32 else p - start).norm()
    assert (weight.float() - master).abs().max() < 2**-7 * master.abs().max()
    for bad in (float("nan"), float("inf")):
        before = [t.clone() for t in (weight, master, m, v)]
        triton_adamw.adamw(weight, master, m, v, grad, torch.tensor(bad), step=6, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, (weight, master, m, v), strict=True))


def test_adamw_of_masters_in_halves_is_that_of_whole_ones():
    """To the bit: of float32 moments (what the interpreter rounds differently in BF16 is no part of this), except that
    masters halfway between two weights move on by one step of float32."""
    g = torch.Generator().manual_seed(0)
    n = 3000
    weight = torch.randn(n, generator=g).bfloat16()
    whole, twin, rest = weight.float(), weight.clone(), torch.zeros(n, dtype=torch.int16)
    moments = [torch.zeros(n) for _ in range(4)]
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}
    for step in range(1, 6):
        grad = torch.randn(n, generator=g).bfloat16()
        triton_adamw.adamw(None, whole, *moments[:2], grad, grad.float().norm(), step=step, **options)
        triton_adamw.adamw(twin, rest, *moments[2:], grad, grad.float().norm(), step=step, **options)
        joined = masters.join(twin, rest)
        assert (joined.view(torch.int32) - whole.view(torch.int32)).abs().max() <= 1
        assert (joined == whole).float().mean() > 0.99
        assert torch.equal(twin, joined.bfloat16())
        whole = joined.clone()
