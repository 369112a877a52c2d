"""How updates get into vLLM's workers: what is copied and read back, with loaders that slice as vLLM's do, and what
becomes of an update that fails. With vLLM's own layers and loaders: test_vllm_parallel.py, test_vllm_fp8.py."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, Received, WeightUpdate, at_hand, describe
from rollout.transport.buckets import BucketViews
from rollout.transport.ipc import IpcSender
from rollout.vllm.copies import copy_weights, plan_copies
from rollout.vllm.install import Answer, Installed, Installer, install, keep_installer
from rollout.vllm.shards import UNREAD, Shards, same_shards
from tests.rollout.sending import sending

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
    """What an Installer needs of vLLM's model runner."""

    device = torch.device("cuda")  # as far as the installer is concerned
    model_config = SimpleNamespace(quantization=None, dtype=torch.float32, hf_config=None)
    vllm_config = SimpleNamespace(speculative_config=None)

    def __init__(self, model: Shard):
        self.model = model

    def get_model(self) -> Shard:
        return self.model

    def reload_weights(self, weights_iterator) -> None:
        self.model.load_weights(weights_iterator)


class Complete:
    """An update's check that wants all of SHAPES."""

    shapes = SHAPES

    def checked_buckets(self, buckets):
        names = []
        for bucket in buckets:
            names += [name for name, _ in bucket]
            yield bucket
        if names != list(SHAPES):
            raise ValueError(f"the update ended without {len(SHAPES) - len(names)} of {len(SHAPES)} tensors")


def installer(rank: int, **options) -> Installer:
    return Installer(SimpleNamespace(model_runner=Runner(Shard(rank, **options))), Complete())


def installed(one: Installer, sent: dict[str, Tensor]) -> Installed:
    return one.install(at_hand(sent.items()))


def held_as(one: Installer, sent: dict[str, Tensor]) -> bool:
    expected = Shard(one.worker.model_runner.model.rank)
    expected.load_weights(sent.items())
    return all(
        torch.equal(a, b)
        for a, b in zip(one.worker.model_runner.model.parameters(), expected.parameters(), strict=True)
    )


def test_workers_go_directly_after_one_reload_that_was_read_back():
    workers = [installer(rank) for rank in range(2)]
    for version, mode in ((1, "reload"), (2, "direct"), (3, "direct")):
        sent = weights(version)
        found = [installed(worker, sent) for worker in workers]
        assert [one.mode for one in found] == [mode] * 2 and all(held_as(worker, sent) for worker in workers)
        together = Installed.by_all(found)
        assert (together.mode, together.verified, together.tensors) == (mode, len(SHAPES), len(SHAPES))


def test_each_worker_reads_back_its_own_elements():
    sent = weights(1)
    found = [installed(installer(rank), sent).read.tolist() for rank in range(2)]
    assert found == [[24, 24, 6, 24, 0, 4], [24, 24, 6, 0, 24, 4]]


def test_a_loader_that_does_something_else_than_it_says_stays_with_the_reload():
    worker = installer(1, lies=True)
    for version in (1, 2):
        found = installed(worker, weights(version))
        assert (found.mode, found.verified) == ("reload", 0) and set(found.read) == {UNREAD}
        assert "keeps shards of 1 of 5 tensors in another form" in found.reason and "(rows)" in found.reason


def test_a_dtype_that_loses_bits_stays_with_the_reload():
    found = installed(installer(0, bias=torch.bfloat16), weights(1))
    assert found.mode == "reload" and "(bias)" in found.reason


def test_a_dtype_that_loses_none_goes_directly():
    worker = installer(0)
    for seed in (1, 2):
        sent = {name: t.bfloat16() if name == "bias" else t for name, t in weights(seed).items()}
        found = installed(worker, sent)
    assert found.mode == "direct" and found.read[list(SHAPES).index("bias")] == 4 and held_as(worker, sent)


def test_a_loader_that_computes_stays_with_the_reload():
    worker = installer(0)
    model = worker.worker.model_runner.model
    load = model.load_weights
    model.load_weights = lambda incoming: load((name, tensor * 2) for name, tensor in incoming)
    found = installed(worker, weights(1))
    assert found.mode == "reload" and "is no part of a checkpoint tensor" in found.reason
    assert torch.equal(model.norm, weights(1)["norm"] * 2)


def test_load_balancing_stays_with_the_reload():
    runner = Runner(Shard(0))
    runner.eplb_state = object()
    found = Installer(SimpleNamespace(model_runner=runner), Complete())
    assert found.direct is False and "load balancing" in found.reason


@pytest.mark.parametrize("name", ["norm", "rows"])
def test_a_direct_update_that_misses_a_place_names_the_tensor(name):
    """A whole tensor, which is compared with what was sent, and a part, which is compared with what arrived."""
    worker = installer(1)
    installed(worker, weights(1))
    (copy,) = worker.shards.plan[name]
    honest = at_hand(weights(2).items())

    def meanwhile():
        yield from honest.buckets()
        copy.target[3] += 1.0

    with pytest.raises(CorruptWeights, match=rf"other weights than were sent: {name}$"):
        worker.install(Received(honest.specs, meanwhile(), honest._checks))
    for seed, mode in ((3, "reload"), (4, "direct")):  # what is right is verified again
        assert installed(worker, weights(seed)).mode == mode and held_as(worker, weights(seed))


def test_a_plan_is_compared_shard_by_shard():
    plans = [plan_copies(Shard(rank).load_weights, SHAPES) for rank in (0, 0, 1)]
    assert same_shards(plans[0], plans[1]) and not same_shards(plans[0], plans[2])


def test_parts_that_never_arrived_are_an_error():
    plan, sent = plan_copies(Shard(0).load_weights, SHAPES), weights(1)
    specs = [describe(name, tensor) for name, tensor in sent.items()]
    shards = Shards(plan, specs)
    shards.arrived(list(sent.items())[:2])
    copy_weights(plan, sent.items())
    with pytest.raises(RuntimeError, match="2 parts of tensors arrived, the plan has 3 places"):
        shards.compared(specs)


@pytest.mark.parametrize(
    "read, verified",
    [
        ([[6, 4], [6, 0]], 2),  # halves of the first; the second on one worker
        ([[6, 4], [6, 4]], 2),  # the second on both
        ([[6, 4], [0, 0]], 1),  # half of the first is nowhere
        ([[6, 4], [UNREAD, 0]], 1),
        ([[6, 4], [UNREAD, UNREAD]], 0),
    ],
)
def test_a_tensor_is_verified_where_all_of_it_was_read_back(read, verified):
    elements = np.array([12, 4])
    assert Installed.by_all([Installed("direct", elements, np.array(one)) for one in read]).verified == verified


# ---- an update that reaches two workers of a CPU, and one that fails ----


class Workers:
    """Two workers, as threads: on a CPU both ends of shared memory may stand in one process. They hold dictionaries."""

    class Runner:
        device = torch.device("cpu")
        model_config = SimpleNamespace(hf_config=None)
        vllm_config = SimpleNamespace(speculative_config=None)

        def __init__(self):
            self.held: dict[str, Tensor] = {}
            self.fails_at: str | None = None

        def get_model(self) -> torch.nn.Module:
            return torch.nn.Module()

        def reload_weights(self, weights_iterator) -> None:
            for name, tensor in weights_iterator:
                if name == self.fails_at:
                    raise RuntimeError("out of luck")
                self.held[name] = tensor

    def __init__(self):
        self.sender = IpcSender(torch.device("cpu"), 2, bucket_bytes=128, timeout_s=20.0)
        self.workers = [SimpleNamespace(model_runner=self.Runner()) for _ in range(2)]
        self.pool = ThreadPoolExecutor(2)
        for worker in self.workers:
            keep_installer(worker, Complete())

    def update(self, sent: dict[str, Tensor]) -> tuple[list[Answer], BaseException | None]:
        """What the workers answer, and what the sender raised."""

        def ask(update: WeightUpdate) -> list[Answer]:
            return list(self.pool.map(lambda worker: install(worker, update), self.workers))

        with sending(self.sender, sent.items()) as (update, done):
            answers = ask(update)
        return answers, done.exception()

    def hold(self, sent: dict[str, Tensor]) -> bool:
        return all(
            list(worker.model_runner.held) == list(sent)
            and all(torch.equal(worker.model_runner.held[name], tensor) for name, tensor in sent.items())
            for worker in self.workers
        )


def test_every_worker_has_every_bit_update_after_update():
    workers = Workers()
    for version in (1, 2, 3):
        answers, error = workers.update(weights(version))
        assert error is None and workers.hold(weights(version))
        assert [(a.error, a.installed.mode, a.installed.tensors, a.installed.verified) for a in answers] == [
            (None, "reload", len(SHAPES), 0)
        ] * 2


def test_an_incomplete_set_is_named_by_every_worker_and_the_next_one_heals():
    workers, sent = Workers(), weights(1)
    answers, _ = workers.update({name: sent[name] for name in list(sent)[:-2]})
    assert [answer.error for answer in answers] == ["ValueError: the update ended without 2 of 6 tensors"] * 2
    assert workers.update(sent)[1] is None and workers.hold(sent)


@pytest.mark.parametrize("fails_at", [list(SHAPES)[0], list(SHAPES)[-1]])
def test_a_worker_that_fails_is_the_only_one_and_keeps_nobody_waiting(fails_at):
    workers, sent = Workers(), weights(1)
    workers.workers[1].model_runner.fails_at = fails_at
    began_s = time.monotonic()
    answers, error = workers.update(sent)
    assert time.monotonic() - began_s < 10
    assert answers[0].error is None and answers[1].error == "RuntimeError: out of luck" and not answers[1].corrupt
    assert "reached 1 of 2 engines: one hung up" in str(error)
    workers.workers[1].model_runner.fails_at = None
    assert workers.update(sent)[1] is None and workers.hold(sent)


def test_a_tensor_that_is_damaged_on_its_way_is_named_by_every_worker(monkeypatch):
    workers, honest = Workers(), BucketViews.checksums

    def damaging(views, bucket, out=None):
        found = honest(views, bucket, out)
        if any(views is buffer.views for buffer in workers.sender._buffers) and bucket.specs[0].name == "expert 0":
            views.buffer[9] ^= 1
        return found

    monkeypatch.setattr(BucketViews, "checksums", damaging)
    answers, _ = workers.update(weights(1))
    assert all(answer.corrupt and "arrived damaged: expert 0 has checksum" in answer.error for answer in answers)
