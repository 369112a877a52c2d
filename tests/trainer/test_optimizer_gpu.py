"""The fused AdamW on a GPU against the formula in float64 and against the same optimizer on the CPU."""

import pytest
import torch

from trainer.optimizer import GradientError, Optimizer, OptimizerOptions

pytestmark = pytest.mark.gpu

SHAPES = {"stack": (3, 70, 33), "matrix": (129, 65), "norm": (1001,)}


def parameters(device, dtype):
    g = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=g).to(device, dtype)) for n, s in SHAPES.items()}


def gradients(steps, micro_batches=1):
    g = torch.Generator().manual_seed(1)
    return [
        [{n: torch.randn(s, generator=g) for n, s in SHAPES.items()} for _ in range(micro_batches)]
        for _ in range(steps)
    ]


def run(optimizer, params, steps):
    norms = []
    for micro_batches in steps:
        for grads in micro_batches:
            sum((p * grads[n].to(p)).sum() for n, p in params.items()).backward()
        norms.append(optimizer.step()["grad_norm"])
    return norms


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_updates_are_those_of_the_cpu(dtype, moments, micro_batches):
    """Float32 moments: to float32's digits. BF16 ones may round to the other side (2^-8 of a moment): within 1 % of
    the way that the parameters went."""
    options = OptimizerOptions(lr=1e-2, moments=moments, schedule="cosine", total_steps=8, max_grad_norm=0.7)
    found = []
    for device in ("cpu", "cuda"):
        params = parameters(device, dtype)
        optimizer = Optimizer(params.items(), options)
        norms = run(optimizer, params, gradients(6, micro_batches))
        found.append((norms, optimizer.state(), params))
    (cpu_norms, cpu, _), (gpu_norms, gpu, params) = found
    assert gpu_norms == pytest.approx(cpu_norms, rel=1e-5)
    assert cpu.keys() == gpu.keys()
    start = parameters("cpu", dtype)
    for name, p in params.items():
        ours = gpu[f"master/{name}"].cpu() if dtype != torch.float32 else p.detach().cpu()
        theirs = cpu[f"master/{name}"] if dtype != torch.float32 else found[0][2][name].detach()
        way = (theirs - start[name].detach().float()).norm()
        assert (ours - theirs).norm() < (1e-5 if moments == "float32" else 1e-2) * way
        assert torch.equal(p.detach().float().cpu(), ours.to(dtype).float())
        assert gpu[f"exp_avg/{name}"].dtype == getattr(torch, moments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    params = parameters("cuda", torch.bfloat16)
    optimizer = Optimizer(params.items(), OptimizerOptions(lr=1e-2))
    run(optimizer, params, gradients(1))
    before = {n: t.clone() for n, t in optimizer.state().items()} | {n: p.detach().clone() for n, p in params.items()}
    (params["stack"].sum() + params["norm"].sum() * bad).backward()
    with pytest.raises(GradientError, match="not finite in 1 of 3 tensors, the first: norm"):
        optimizer.step()
    after = optimizer.state() | {n: p.detach() for n, p in params.items()}
    assert all(torch.equal(before[n], after[n]) for n in before) and optimizer.steps == 1
    run(optimizer, params, gradients(1))  # and goes on
    assert optimizer.steps == 2


def test_state_moves_between_devices():
    options = OptimizerOptions(lr=1e-2, moments="bfloat16")
    params = parameters("cuda", torch.bfloat16)
    optimizer = Optimizer(params.items(), options)
    run(optimizer, params, gradients(3))
    on_cpu = parameters("cpu", torch.bfloat16)
    other = Optimizer(on_cpu.items(), options)
    other.load_state({n: t.cpu() for n, t in optimizer.state().items()}, 3)
    assert all(torch.equal(t.cpu(), other.state()[n]) for n, t in optimizer.state().items())
    assert all(torch.equal(p.cpu(), on_cpu[n]) for n, p in params.items())


def test_a_step_needs_no_more_memory_than_its_states():
    """One micro-batch: no float32 copy of a BF16 gradient, no temporary of a parameter's size."""
    p = torch.nn.Parameter(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)], OptimizerOptions(moments="bfloat16"))
    optimizer.allocate()
    p.square().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_muon_goes_the_way_of_the_cpu():
    """Both iterate in BF16, in another order of sums: within 3 % of the way (2^-8 a product, five iterations)."""
    options = OptimizerOptions(algorithm="muon", lr=1e-2)
    found = []
    for device in ("cpu", "cuda"):
        params = parameters(device, torch.bfloat16)
        optimizer = Optimizer(params.items(), options)
        run(optimizer, params, gradients(3))
        found.append(optimizer.state())
    start = parameters("cpu", torch.bfloat16)
    for name in SHAPES:
        theirs, ours = (state[f"master/{name}"].cpu() for state in found)
        way = (theirs - start[name].detach().float()).norm()
        assert (ours - theirs).norm() < 3e-2 * way, name
