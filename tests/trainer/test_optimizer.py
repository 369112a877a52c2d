"""AdamW against its paper in float64, masters, clipping, schedules, and state that goes on bit for bit."""

import math

import pytest
import torch
from pydantic import ValidationError

from trainer.optimizer import GradientError, Optimizer, OptimizerOptions, learning_rate


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(4, 3, generator=g).to(dtype)),
        "norm": torch.nn.Parameter(torch.randn(3, generator=g).to(dtype)),
    }


def gradients(steps):
    g = torch.Generator().manual_seed(1)
    return [{"matrix": torch.randn(4, 3, generator=g), "norm": torch.randn(3, generator=g)} for _ in range(steps)]


def run(optimizer, params, grads):
    for grad in grads:
        sum((params[name] * g.to(params[name].dtype)).sum() for name, g in grad.items()).backward()
        metrics = optimizer.step()
    return metrics


def adamw_float64(params, grads, options):
    """Algorithm 2 of arXiv 1711.05101 after clipping by the global norm; decay of matrices only."""
    theta = {n: p.detach().double().clone() for n, p in params.items()}
    m = {n: torch.zeros_like(t) for n, t in theta.items()}
    v = {n: torch.zeros_like(t) for n, t in theta.items()}
    for step, grad in enumerate(grads):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grad.values()))
        scale = min(1.0, options.max_grad_norm / norm)
        lr = learning_rate(options, step)
        for n in theta:
            g = grad[n].double() * scale
            m[n] = options.beta1 * m[n] + (1 - options.beta1) * g
            v[n] = options.beta2 * v[n] + (1 - options.beta2) * g**2
            m_hat = m[n] / (1 - options.beta1 ** (step + 1))
            v_hat = v[n] / (1 - options.beta2 ** (step + 1))
            decay = options.weight_decay if theta[n].ndim >= 2 else 0.0
            theta[n] -= lr * (m_hat / (v_hat.sqrt() + options.eps) + decay * theta[n])
    return theta


OPTIONS = OptimizerOptions(lr=1e-2, schedule="cosine", warmup_steps=2, total_steps=8, weight_decay=0.5)


def test_updates_are_those_of_adamw_in_float64():
    params, grads = parameters(), gradients(8)
    expected = adamw_float64(params, grads, OPTIONS)
    run(Optimizer(params.items(), OPTIONS), params, grads)
    for name, p in params.items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_are_float32_masters_rounded():
    """Steps far below BF16's resolution add up: without masters the parameters would never move."""
    options = OptimizerOptions(lr=1e-4, weight_decay=0.0)
    params, grads = parameters(torch.bfloat16), [gradients(1)[0]] * 200
    start = {n: p.detach().clone() for n, p in params.items()}
    rounded = [{n: g.bfloat16() for n, g in grad.items()} for grad in grads]
    expected = adamw_float64(params, rounded, options)
    optimizer = Optimizer(params.items(), options)
    run(optimizer, params, grads)
    for name, p in params.items():
        master = optimizer.state()[f"master/{name}"]
        torch.testing.assert_close(master.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(p, master.bfloat16()) and not torch.equal(p, start[name])


def test_bfloat16_gradients_are_summed_in_float32():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)], OptimizerOptions(max_grad_norm=1e9))
    for value in [256.0, *[1.0] * 16]:  # in BF16 256 + 1 is 256
        (p * value).sum().backward()
    assert optimizer.step()["grad_norm"] == 272.0


def test_the_gradient_is_clipped_by_its_global_norm_and_dropped_after_the_step():
    params = parameters()
    optimizer = Optimizer(params.items(), OptimizerOptions(beta1=0.0, max_grad_norm=0.5))
    (params["matrix"].sum() * 3 + params["norm"].sum() * 4).backward()
    assert optimizer.step()["grad_norm"] == pytest.approx(math.sqrt(12 * 9 + 3 * 16))
    moments = optimizer.state()  # without momentum the first moment is the clipped gradient
    total = math.sqrt(sum(float(moments[f"exp_avg/{n}"].square().sum()) for n in params))
    assert total == pytest.approx(0.5, rel=1e-5)
    assert all(p.grad is None for p in params.values())


def test_a_gradient_that_is_not_finite_updates_nothing_and_names_the_tensor():
    params = parameters()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = Optimizer(params.items(), OptimizerOptions())
    (params["matrix"].sum() + params["norm"].sum() * float("nan")).backward()
    with pytest.raises(GradientError, match="norm is nan; not finite in 1 of 2 tensors, the first: norm"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in params.items())
    assert optimizer.steps == 0


def test_a_parameter_without_a_gradient_is_left_alone():
    params = parameters()
    before = params["matrix"].detach().clone()
    optimizer = Optimizer(params.items(), OptimizerOptions(lr=0.1, weight_decay=1.0))
    params["norm"].sum().backward()
    optimizer.step()
    assert torch.equal(params["matrix"], before)
    with pytest.raises(RuntimeError, match="no gradient to step on"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_taken_up_by_a_new_optimizer_goes_on_bit_for_bit(dtype):
    grads = gradients(6)
    whole = parameters(dtype)
    run(Optimizer(whole.items(), OPTIONS), whole, grads)
    params = parameters(dtype)
    first = Optimizer(params.items(), OPTIONS)
    run(first, params, grads[:3])
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    again = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    second = Optimizer(again.items(), OPTIONS)
    second.load_state(saved, first.steps)
    run(second, again, grads[3:])
    assert all(torch.equal(whole[n], again[n]) for n in whole) and second.steps == 6


def test_state_of_another_model_is_refused_with_all_differences():
    params = parameters()
    optimizer = Optimizer(params.items(), OPTIONS)
    run(optimizer, params, gradients(1))
    state = dict(optimizer.state())
    state["exp_avg/norm"] = torch.zeros(7)
    state["exp_avg_sq/other"] = torch.zeros(1)
    del state["step/matrix"]
    with pytest.raises(ValueError) as error:
        Optimizer(params.items(), OPTIONS).load_state(state, 1)
    for part in ("missing step/matrix", "unexpected exp_avg_sq/other", "exp_avg/norm has shape [7], expected [3]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1, 0.1]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.775, 0.325, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules_warm_up_fall_and_stay(schedule, expected):
    options = OptimizerOptions(lr=1.0, schedule=schedule, warmup_steps=4, total_steps=8)
    assert [learning_rate(options, step) for step in range(10)] == pytest.approx(expected)


def test_a_falling_schedule_needs_an_end():
    with pytest.raises(ValidationError, match="cosine needs total_steps above warmup_steps"):
        OptimizerOptions(schedule="cosine")
    with pytest.raises(ValidationError, match="found 5"):
        OptimizerOptions(schedule="linear", warmup_steps=5, total_steps=5)
