"""The kernels of the model for a GPU, interpreted on the CPU, against the model's plain torch operations. They run in
a process of their own (test_model_triton.py): Triton reads at its import whether it is to interpret.

Attention's own kernels are libraries' and do not run here; test_model_gpu.py has them. Bounds: float32 5e-6, as the
orders of sums differ.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from tests.trainer.test_model_parity import CONFIGS, packed, random_model, relative
from trainer.model import attention, experts, layers, moe
from trainer.model.kernels import triton_route
from trainer.model.kernels.gpu_moe import KernelRows
from trainer.model.kernels.triton_moe import gather_sum, scatter_rows
from trainer.model.kernels.triton_rope import backward_, queries_keys_values_, resize
from trainer.model.kernels.triton_route import Order, decide
from trainer.model.rope import apply_rope
from trainer.model.rows import Rows

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_model_triton.py"
SHORT = {name: dataclasses.replace(config, num_hidden_layers=2) for name, config in CONFIGS.items()}


def gradients_of(config, replay, kernels: bool, monkeypatch, **options):
    model = random_model(config, **options)
    tokens, positions, bounds = packed([5, 9, 1], config.vocab_size)
    with monkeypatch.context() as patch:
        for module in (layers, moe, experts, attention):
            patch.setattr(module, "has_kernels", lambda x: kernels)
        out = model(tokens, positions, bounds, replay, balance=True)
        weight = torch.randn(out.hidden.shape, generator=torch.Generator().manual_seed(9))
        ((out.hidden * weight).sum() + out.balance.sum()).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["groups", "q_lora", "two_shared", "no_renormalization"])
def test_model_with_kernels_is_the_model_without(name, monkeypatch):
    config = SHORT[name]
    g = torch.Generator().manual_seed(3)
    replay = torch.rand(15, config.moe_layers, config.n_routed_experts, generator=g).topk(3).indices
    replay[::3] = -1  # these tokens route themselves
    expected, expected_gradients = gradients_of(config, replay, False, monkeypatch)
    found, gradients = gradients_of(config, replay, True, monkeypatch)
    assert torch.equal(found.experts, expected.experts) and torch.equal(found.load, expected.load)
    assert torch.equal(found.agreement, expected.agreement) and expected.agreement[:, 0].eq(10).all()
    assert relative(found.hidden, expected.hidden) <= 5e-6 and relative(found.balance, expected.balance) <= 5e-6
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        assert relative(gradient, expected_gradients[parameter]) <= 5e-6, parameter


@pytest.mark.parametrize("total,groups,kept,k", [(8, 1, 1, 2), (12, 1, 1, 5), (64, 8, 3, 6)])
def test_agreement_is_counted_as_without_kernels(total, groups, kept, k):
    """Of 300 tokens a part has the router's own choice in another order, a part one expert changed, a part any other
    choice, a part none. In several blocks."""
    g = torch.Generator().manual_seed(total)
    scores, bias = torch.rand(300, total, generator=g), 0.1 * torch.randn(total, generator=g)
    own = moe.select_experts(scores + bias, groups, kept, k)
    replay = own.flip(1).to(torch.int16)
    replay[100:200, 0] = (own[100:200].amin(1) - 1).clamp(min=0).to(torch.int16)
    replay[200:250] = torch.rand(50, total, generator=g).topk(k).indices.to(torch.int16)
    replay[250:280, k - 1] = -1
    found = triton_route.agreement(scores, bias, replay, groups, kept)
    assert torch.equal(found, moe.agreement(own, replay))
    strided = torch.stack([replay, replay], 1)[:, 1]  # one layer of a batch's record
    assert torch.equal(triton_route.agreement(scores, bias, strided, groups, kept), found)
    assert found[0] == 270 and 120 <= found[1] < 270 and found[2] > k * found[1]


@pytest.mark.parametrize("keep_rows", [True, False])
def test_rows_that_are_not_kept_are_made_again(keep_rows, monkeypatch):
    """Kernels beside plain operations. Experts 5 to 7 get no token: their gradient is zero."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (21, 16), "weights": (21, 3), "w13": (8, 24, 16), "w2": (8, 16, 12), "s13": (40, 16), "s2": (16, 20)}
    arrays = {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in shapes.items()}
    residual, dy = (torch.randn(21, 16, generator=g).requires_grad_() for _ in range(2))
    chosen = torch.rand(21, 5, generator=g).topk(3).indices
    x, weights, w13, w2, s13, s2 = arrays.values()
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(experts, "has_kernels", lambda _, kernels=kernels: kernels)
        of = KernelRows.of if kernels else Rows.of
        call = experts.Call(lambda chosen, weights, of=of: of(chosen, weights, 8), "bf16", keep_rows)
        y = experts.experts_sum(x, weights, chosen, w13, w2, (s13, s2), residual, call)
        results.append([y, *torch.autograd.grad(y, [*arrays.values(), residual], dy)])
    assert torch.count_nonzero(results[1][3][5:]) == 0
    for a, b in zip(*results, strict=True):
        assert relative(a, b) <= 5e-6


@pytest.mark.parametrize("total,tokens", [(8, 530), (12, 40), (256, 30)])
def test_order_is_that_of_a_stable_sort(total, tokens, monkeypatch):
    """Blocks of 8 tokens, running sums over 2 blocks at a time: every loop turns more than once."""
    shape = triton_route._shape
    monkeypatch.setattr(triton_route, "_shape", lambda e: {**shape(e), "TOKENS": 64 if tokens > 100 else 8})
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, total, generator=g)
    scores, experts, weights, counts = decide(logits, torch.zeros(total), None, 1, 1, 4, True, 2.5)
    order = Order.of(experts, weights, counts)
    by_expert = experts.flatten().argsort(stable=True)
    load = torch.bincount(experts.flatten(), minlength=total)
    assert torch.equal(counts.load, load) and torch.equal(order.ends.long(), load.cumsum(0))
    assert torch.equal(order.place.flatten().long()[by_expert], torch.arange(4 * tokens))
    assert torch.equal(order.row_weights, weights.flatten()[by_expert])
    x = torch.randn(tokens, 20, generator=g)
    rows = torch.empty(4 * tokens, 20)
    scatter_rows(x, order.place, rows, order.ends[-1])
    assert torch.equal(rows, x[by_expert // 4])
    assert relative(gather_sum(rows, order.place, order.ends[-1], x), 5 * x) <= 1e-6


@pytest.mark.parametrize("v_width", [None, 24])
@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_and_its_way_back_are_those_of_rope(interleave, v_width):
    heads, nope, pairs, v, n = 20, 12, 6, 10, 3
    g = torch.Generator().manual_seed(0)
    q, kv = torch.randn(n, heads, nope + 12, generator=g), torch.randn(n, heads, nope + v, generator=g)
    wide = torch.randn(n, 30, generator=g)  # the key's rotated part lies beside others
    q, kv, wide = (t.requires_grad_() for t in (q, kv, wide))
    pe = wide[:, 18:]
    turn = torch.polar(torch.ones(n, pairs), torch.rand(n, pairs, generator=g) * 6)
    k_pe = apply_rope(pe[:, None], turn, interleave).expand(-1, heads, -1)
    expected = (
        torch.cat((q[..., :nope], apply_rope(q[..., nope:], turn, interleave)), -1),
        torch.cat((kv[..., :nope], k_pe), -1),
        kv[..., nope:],
    )
    grads = [torch.randn(t.shape, generator=g) for t in expected]
    wanted = torch.autograd.grad(expected, (q, kv, pe), grads)
    with torch.no_grad():
        found = queries_keys_values_(q.clone(), kv, pe, turn, interleave, v_width)
        dv = torch.nn.functional.pad(grads[2], (0, found[2].shape[2] - v), value=7.0)
        back = backward_(grads[0].clone(), grads[1], dv, turn, v, interleave)
    assert torch.count_nonzero(found[2][..., v:]) == 0
    for a, b in zip((*found[:2], found[2][..., :v], *back), (*expected, *wanted), strict=True):
        assert relative(a, b) <= 1e-6


def test_rows_are_cut_or_filled_up():
    x = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(x, 24), torch.nn.functional.pad(x, (0, 14)))
    assert torch.equal(resize(x, 7), x[..., :7])


class Here:
    def __init__(self, tensor):
        self.tensor = tensor

    def wait(self):
        return self.tensor


def test_rows_of_one_rank_are_those_of_plain_operations():
    """Experts 0 to 4 are here, 5 stands for those of other ranks; 100 tokens are this rank's. Rows behind the last are
    never read: they are NaN."""
    g = torch.Generator().manual_seed(0)
    n, k, hidden, wide = 150, 3, 20, 12
    chosen = torch.rand(n, 8, generator=g).topk(k).indices.clamp(max=5)
    chosen[0], chosen[1] = 5, torch.tensor([0, 1, 2])
    weights, x, dy, more = (torch.randn(s, generator=g) for s in ((n, k), (n, hidden), (n, hidden), (2, 50, hidden)))
    w13, w2 = torch.randn(20, 2 * wide, generator=g), torch.randn(wide, hidden, generator=g)
    found = []
    for of in (Rows.of, KernelRows.of):
        layout = of(chosen, weights, 5)
        end = int(layout.ends[-1])
        assert 0 < end < n * k
        rows = layout.spread(x[:100], Here(x[100:]))
        behind = len(rows) - end  # undefined rows stay out of every result
        nan = lambda rows, behind=behind: torch.cat((rows, torch.full((behind, rows.shape[1]), float("nan"))))  # noqa: E731
        gate_up = nan(rows[:end] @ w13)
        act = layout.activation(gate_up)
        out = nan(act[:end] @ w2)
        y = layout.combine(out, slice(100, None), x[100:], x[100:], more=more)
        d_out, d_weights = layout.spread_gradient(dy[:100], Here(dy[100:]), out)
        d_gate_up, again, others = layout.activation_backward(gate_up, nan(d_out[:end] @ w2.T), None)
        assert relative(again[:end], act[:end]) <= 5e-6
        dx = layout.sum(nan(d_gate_up[:end] @ w13.T), slice(0, 100))
        found.append([layout.ends, rows[:end], y, d_gate_up[:end], d_weights if others is None else others, dx])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if not a.is_floating_point() else relative(a, b) <= 5e-6


def test_no_row_at_all_gives_zeros():
    """A rank whose experts nobody chose still takes part: its weights' gradients are zeros."""
    x, w13, w2 = torch.randn(3, 16), torch.randn(2, 24, 16), torch.randn(2, 16, 12)
    arrays = [t.requires_grad_() for t in (x, torch.rand(3, 2), w13, w2)]
    for of in (Rows.of, KernelRows.of):
        call = experts.Call(lambda chosen, weights, of=of: of(chosen, weights, 2), "bf16")
        y = experts.experts_sum(arrays[0], arrays[1], torch.full((3, 2), 2), *arrays[2:], None, None, call)
        for value in (y, *torch.autograd.grad(y, arrays, torch.ones_like(y))):
            assert torch.count_nonzero(value) == 0
