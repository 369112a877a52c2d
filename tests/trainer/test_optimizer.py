"""AdamW against its paper in float64, masters, clipping, schedules, and state that goes on bit for bit."""

import gc
import math
import socket
import weakref
from datetime import timedelta

import pytest
import torch
from pydantic import ValidationError

from trainer import masters
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
    beta1, beta2 = options.betas
    m = {n: torch.zeros_like(t) for n, t in theta.items()}
    v = {n: torch.zeros_like(t) for n, t in theta.items()}
    for step, grad in enumerate(grads):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grad.values()))
        scale = min(1.0, options.max_grad_norm / norm)
        lr = learning_rate(options, step)
        for n in theta:
            g = grad[n].double() * scale
            m[n] = beta1 * m[n] + (1 - beta1) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g**2
            m_hat = m[n] / (1 - beta1 ** (step + 1))
            v_hat = v[n] / (1 - beta2 ** (step + 1))
            decay = options.weight_decay if theta[n].ndim >= 2 else 0.0
            theta[n] -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + decay * theta[n])
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
    optimizer = Optimizer(params.items(), OptimizerOptions(betas=(0.0, 0.95), max_grad_norm=0.5))
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


def test_bfloat16_moments_cost_less_than_a_hundredth_of_the_way():
    """DeepSeek-V3 keeps both moments in BF16 (arXiv 2412.19437, section 3.3.2). Each is rounded to 8 bits a step, so
    over 40 steps of a drifting gradient the parameters must stay within 1 % of the way that exact AdamW goes."""
    options = OptimizerOptions(lr=1e-2, moments="bfloat16", weight_decay=0.1)
    params = parameters()
    start = {n: p.detach().double() for n, p in params.items()}
    common = gradients(1)[0]
    grads = [{n: common[n] + 0.5 * g for n, g in grad.items()} for grad in gradients(40)]
    expected = adamw_float64(params, grads, options)
    optimizer = Optimizer(params.items(), options)
    run(optimizer, params, grads)
    state = optimizer.state()
    for name, p in params.items():
        assert state[f"exp_avg/{name}"].dtype == state[f"exp_avg_sq/{name}"].dtype == torch.bfloat16
        error, way = p.detach().double() - expected[name], expected[name] - start[name]
        assert error.norm() < 1e-2 * way.norm(), name


def test_bfloat16_moments_need_a_second_moment_that_forgets():
    with pytest.raises(ValidationError, match=r"betas\[1\] = 0.999.*stand still"):
        OptimizerOptions(moments="bfloat16", betas=(0.9, 0.999))


def test_one_micro_batch_makes_no_second_copy_of_a_gradient():
    """The gradient of a single micro-batch is kept as it came, in BF16; a second one is added in float32."""
    p = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)], OptimizerOptions())
    made = []
    p.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    (p * 3).sum().backward()
    kept = optimizer._gradients["p"]
    assert p.grad is None and kept.dtype == torch.bfloat16 and kept.data_ptr() == made[0]
    (p * 3).sum().backward()
    assert optimizer._gradients["p"].dtype == torch.float32


def test_parameters_and_optimizer_are_freed_without_the_collector():
    """A circle between a parameter and its hook would keep a dropped trainer's memory until a collection, or longer."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)], OptimizerOptions())
    (p * 3).sum().backward()
    optimizer.step()
    gone = [weakref.ref(optimizer), weakref.ref(optimizer.state()["master/p"])]
    gc.disable()
    try:
        del optimizer, p
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def muon_float64(gradient, momentum, lr, weight_decay, theta):
    """One step of Muon with Nesterov momentum 0.95 (Jordan et al., 2024), the step scaled to AdamW's: RMS 0.2
    (arXiv 2502.16982, eq. 4). The direction comes from an SVD's singular vectors and the quintic iteration on the
    singular values, which is what Newton-Schulz on the matrix computes."""
    momentum = 0.95 * momentum + 0.05 * gradient
    update = 0.05 * gradient + 0.95 * momentum
    u, s, vh = torch.linalg.svd(update / update.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    step = 0.2 * math.sqrt(max(theta.shape)) * (u * s) @ vh
    return theta * (1 - lr * weight_decay) - lr * step, momentum


def test_muon_moves_every_matrix_of_a_stack_and_adamw_the_rest():
    g = torch.Generator().manual_seed(0)
    shapes = {"experts.w2": (3, 8, 6), "attn.weight": (6, 8), "embed": (5, 4), "norm": (4,)}
    params = {n: torch.nn.Parameter(torch.randn(shape, generator=g)) for n, shape in shapes.items()}
    options = OptimizerOptions(algorithm="muon", lr=1e-2, max_grad_norm=1e9)
    grads = [{n: torch.randn(shape, generator=g) for n, shape in shapes.items()} for _ in range(3)]
    expected = adamw_float64(params, grads, options)
    for name in ("experts.w2", "attn.weight"):
        theta = params[name].detach().double()
        matrices = list(theta) if theta.ndim == 3 else [theta]
        moved = []
        for i, matrix in enumerate(matrices):
            momentum = torch.zeros_like(matrix)
            for grad in grads:
                gradient = (grad[name][i] if theta.ndim == 3 else grad[name]).double()
                matrix, momentum = muon_float64(gradient, momentum, 1e-2, options.weight_decay, matrix)
            moved.append(matrix)
        expected[name] = torch.stack(moved).view_as(theta)
    optimizer = Optimizer(params.items(), options)
    run(optimizer, params, grads)
    for name, p in params.items():
        # torch iterates in BF16: 8 bits of a step of RMS 0.2 lr
        bound = 3 * 1e-2 * 2**-6 if name in ("experts.w2", "attn.weight") else 1e-6
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=bound)
    assert {k.partition("/")[0] for k in optimizer.state() if k.endswith("w2")} == {"momentum", "step"}


@pytest.mark.parametrize("change", [{"moments": "bfloat16"}, {"algorithm": "muon"}])
def test_other_states_go_on_bit_for_bit_too(change):
    options = OptimizerOptions(lr=1e-2, **change)
    grads = gradients(6)
    whole = parameters(torch.bfloat16)
    run(Optimizer(whole.items(), options), whole, grads)
    params = parameters(torch.bfloat16)
    first = Optimizer(params.items(), options)
    run(first, params, grads[:3])
    again = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    second = Optimizer(again.items(), options)
    second.allocate()  # as a checkpoint that is loaded in place wants it
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, first.steps)
    run(second, again, grads[3:])
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def _sharded_steps(rank, port, queue):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        mesh = init_device_mesh("cpu", (2,))
        placements = {"matrix": Shard(1), "norm": Replicate()}  # 3 columns: 2 and 1
        params = {
            name: torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placements[name]]))
            for name, p in parameters(torch.bfloat16).items()
        }
        optimizer = Optimizer(params.items(), OPTIONS)
        for grad in gradients(4):
            for name, p in params.items():
                p.grad = distribute_tensor(grad[name].bfloat16(), mesh, [placements[name]])
                for hook in p._post_accumulate_grad_hooks.values():  # as FSDP2 does after its reduce-scatter
                    hook(p)
            norm = optimizer.step()["grad_norm"]
        full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in optimizer.state().items()}
        again = Optimizer(params.items(), OPTIONS)
        again.load_state(full, 4)  # whole tensors, each rank takes its part
        same = all(torch.equal(t.full_tensor(), full[n]) for n, t in again.state().items() if "master" in n)
        queue.put((rank, norm, {n: t.float().numpy() for n, t in full.items()}, same))
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_parameters_are_updated_as_whole_ones():
    """DTensors over two ranks, uneven shards and a replicated tensor: the norm and every update are those of one
    process (bound: the norm's sum in another order, 1e-6)."""
    params, grads = parameters(torch.bfloat16), gradients(4)
    alone = Optimizer(params.items(), OPTIONS)
    expected = run(alone, params, [{n: g.bfloat16().float() for n, g in grad.items()} for grad in grads])["grad_norm"]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_sharded_steps, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=90) for _ in ranks]
    for process in ranks:
        process.join(30)
    for _, norm, state, same in found:
        assert norm == pytest.approx(expected, rel=1e-6) and same
        for name, tensor in alone.state().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), tensor, rtol=1e-5, atol=1e-6)


def test_masters_split_into_weight_and_rest_are_whole_again():
    """Bit for bit, of every exponent; halfway between two weights one step of float32 further from zero. The weight is
    the master rounded to nearest."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    bits[:1000] = (bits[:1000] & ~0xFFFF) | 0x8000
    master = bits.view(torch.float32)
    kept = (bits & 0x7F800000) < 0x7F000000  # finite, and so after rounding
    master = master[kept]
    weight, rest = masters.split(master)
    halfway = (master.view(torch.int32) & 0xFFFF) == 0x8000
    joined = masters.join(weight, rest)
    assert halfway.sum() > 900
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32) + halfway.int())
    assert torch.equal(weight, joined.bfloat16())
    assert torch.equal(masters.split(joined)[0], weight) and torch.equal(masters.split(joined)[1], rest)
