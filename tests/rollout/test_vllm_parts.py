"""Direct updates of workers that hold parts: what is read back, with loaders that slice as vLLM's do. With vLLM's own
layers and loaders: test_vllm_parallel.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, describe_all, layout_of
from rollout.vllm.copies import copy_weights, plan_copies
from rollout.vllm.parts import UNREAD, Parts, PartsInstaller, same_parts
from rollout.vllm.relay import verified_by_all

pytestmark = pytest.mark.timeout(120)

SHAPES = {"rows": (8, 6), "columns": (6, 8), "norm": (6,), "expert 0": (4, 6), "expert 1": (4, 6), "bias": (8,)}


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


class Shard(torch.nn.Module):
    """One of two workers' part of a model. `lies` takes other rows than those that are this worker's while it loads
    for good (never while copies are only written down)."""

    def __init__(self, rank: int, lies: bool = False, bias: torch.dtype = torch.float32):
        super().__init__()
        self.rank, self.lies = rank, lies
        self.rows = torch.nn.Parameter(torch.zeros(4, 6))
        self.columns = torch.nn.Parameter(torch.zeros(6, 4))
        self.norm = torch.nn.Parameter(torch.zeros(6))
        self.expert = torch.nn.Parameter(torch.zeros(1, 4, 6))
        self.bias = torch.nn.Parameter(torch.zeros(4, dtype=bias))

    def load_weights(self, incoming) -> None:
        for name, tensor in incoming:
            half = self.rank * 4
            if name == "rows":
                if self.lies and not tensor.is_meta:
                    half = 4 - half
                self.rows.data.copy_(tensor.narrow(0, half, 4))
            elif name == "columns":
                self.columns.data.copy_(tensor.narrow(1, half, 4))
            elif name == "norm":
                self.norm.data.copy_(tensor)
            elif name == "bias":
                self.bias.data.copy_(tensor[half : half + 4])
            elif name == f"expert {self.rank}":
                self.expert.data[0].copy_(tensor)


class Runner:
    """What a PartsInstaller needs of vLLM's model runner."""

    device = torch.device("cuda")  # as far as the installer is concerned
    model_config = SimpleNamespace(quantization=None, dtype=torch.float32, hf_config=None)
    vllm_config = SimpleNamespace(speculative_config=None)

    def __init__(self, model: Shard):
        self.model = model

    def get_model(self) -> Shard:
        return self.model

    def reload_weights(self, weights_iterator) -> None:
        self.model.load_weights(weights_iterator)


def buckets(sent: dict[str, Tensor], size: int = 2) -> list[list[tuple[str, Tensor]]]:
    items = list(sent.items())
    return [items[start : start + size] for start in range(0, len(items), size)]


def installer(rank: int, **options) -> PartsInstaller:
    return PartsInstaller(SimpleNamespace(model_runner=Runner(Shard(rank, **options))), SHAPES)


def install(one: PartsInstaller, sent: dict[str, Tensor]):
    return one.install(buckets(sent), describe_all(list(sent.items())))


def held_as(one: PartsInstaller, sent: dict[str, Tensor]) -> bool:
    expected = Shard(one.worker.model_runner.model.rank)
    expected.load_weights(sent.items())
    return all(
        torch.equal(a, b)
        for a, b in zip(one.worker.model_runner.model.parameters(), expected.parameters(), strict=True)
    )


def test_workers_go_directly_after_one_reload_that_was_read_back():
    workers = [installer(rank) for rank in range(2)]
    for version, way in ((1, "reload"), (2, "direct"), (3, "direct")):
        sent = weights(version)
        found = [install(worker, sent) for worker in workers]
        assert [one.way for one in found] == [way] * 2 and all(held_as(worker, sent) for worker in workers)
        assert verified_by_all([one.read for one in found], layout_of(sent.items())) == len(SHAPES)


def test_each_worker_reads_back_its_own_elements():
    sent = weights(1)
    found = [install(installer(rank), sent).read.tolist() for rank in range(2)]
    assert found == [[24, 24, 6, 24, 0, 4], [24, 24, 6, 0, 24, 4]]


def test_a_loader_that_does_something_else_than_it_says_stays_with_the_reload():
    worker = installer(1, lies=True)
    for version in (1, 2):
        found = install(worker, weights(version))
        assert (found.way, found.read) == ("reload", None)
        assert "keeps parts of 1 of 5 tensors in another form" in found.reason and "(rows)" in found.reason


def test_a_dtype_that_loses_bits_stays_with_the_reload():
    found = install(installer(0, bias=torch.bfloat16), weights(1))
    assert found.way == "reload" and "(bias)" in found.reason


def test_a_dtype_that_loses_none_goes_directly():
    worker = installer(0)
    for seed in (1, 2):
        sent = {name: t.bfloat16() if name == "bias" else t for name, t in weights(seed).items()}
        found = install(worker, sent)
    assert found.way == "direct" and found.read[list(SHAPES).index("bias")] == 4 and held_as(worker, sent)


def test_a_loader_that_computes_stays_with_the_reload():
    worker = installer(0)
    model = worker.worker.model_runner.model
    load = model.load_weights
    model.load_weights = lambda incoming: load((name, tensor * 2) for name, tensor in incoming)
    found = install(worker, weights(1))
    assert found.way == "reload" and "is no part of a checkpoint tensor" in found.reason
    assert torch.equal(model.norm, weights(1)["norm"] * 2)


def test_load_balancing_stays_with_the_reload():
    runner = Runner(Shard(0))
    runner.eplb_state = object()
    found = PartsInstaller(SimpleNamespace(model_runner=runner), SHAPES)
    assert found.direct is False and "load balancing" in found.reason


def test_a_direct_update_that_misses_a_place_names_the_tensor():
    worker = installer(1)
    install(worker, weights(1))
    (copy,) = worker.parts.plan["norm"]

    def meanwhile():
        yield from buckets(weights(2))
        copy.target[3] += 1.0

    with pytest.raises(CorruptWeights, match=r"other weights than arrived: norm$"):
        worker.install(meanwhile(), describe_all(list(weights(2).items())))
    for seed, way in ((3, "reload"), (4, "direct")):  # what is right is shown again
        assert install(worker, weights(seed)).way == way and held_as(worker, weights(seed))


def test_a_plan_is_compared_part_by_part():
    plans = [plan_copies(Shard(rank).load_weights, SHAPES) for rank in (0, 0, 1)]
    assert same_parts(plans[0], plans[1]) and not same_parts(plans[0], plans[2])


def test_parts_that_never_arrived_are_an_error():
    plan, sent = plan_copies(Shard(0).load_weights, SHAPES), weights(1)
    parts = Parts(plan, describe_all(list(sent.items())))
    parts.arrived(list(sent.items())[:2])
    copy_weights(plan, sent.items())
    with pytest.raises(RuntimeError, match="parts of 2 tensors arrived, the plan has 5 places"):
        parts.compared()


@pytest.mark.parametrize(
    "read, verified",
    [
        ([[6, 4], [6, 0]], 2),  # halves of the first; the second on one worker
        ([[6, 4], [6, 4]], 2),  # the second on both
        ([[6, 4], [0, 0]], 1),  # half of the first is nowhere
        ([[6, 4], [UNREAD, 0]], 1),
        ([[6, 4], None], 0),
    ],
)
def test_a_tensor_is_verified_where_all_of_it_was_read_back(read, verified):
    layout = [("halves", (3, 4), torch.float32), ("whole", (4,), torch.float32)]
    assert verified_by_all([None if one is None else np.array(one) for one in read], layout) == verified
