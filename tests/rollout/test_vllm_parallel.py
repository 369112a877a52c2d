"""vLLM engines whose workers are processes of their own (tensor parallel): on a CPU with vLLM's CPU build, else on
two GPUs. The engine and its workers' parent live in one child process, as in test_vllm_engine.py."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rollout.probe import logprob_diff
from rollout.transport.base import WeightUpdate, at_hand
from rollout.transport.buckets import BucketViews
from rollout.transport.ipc import IpcSender
from rollout.vllm.engine import VLLMEngine
from rollout.vllm.install import Installed, Installer
from tests.rollout.sending import sending
from tests.rollout.test_vllm_engine import (
    DTYPE,
    SEQUENCES,
    Reference,
    fresh_model,
    generate,
    near,
    perturbed,
    requests,
    save_v3,
    without,
)
from tests.rollout.vllm_process import ON_GPU, Engines, started

pytestmark = [
    pytest.mark.timeout(300),
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="takes two GPUs"),
]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


class ParallelEngine(VLLMEngine):
    """Runs functions of the tests where the workers' models are."""

    def inside(self, function, *args) -> list:
        return self._vllm.engine_core.collective_rpc(function, args=args)

    def take(self, update: WeightUpdate) -> Installed:
        self.update(update, update.version)
        return self.installed

    def kill(self, number: int) -> None:
        self._vllm.engine_core.engine_core.model_executor.workers[number].proc.kill()


class ParallelProcess(BaseManager):
    pass


ParallelProcess.register("VLLMEngine", ParallelEngine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    save_v3(folder, heads=4, expert=64)
    return folder


@pytest.fixture(scope="module")
def engines(folder) -> Iterator[Engines]:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no multicast between the GPUs: not every host lets one have it
    os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    process = started(ParallelProcess)
    engines = Engines({"v3": folder}, process)
    yield engines
    engines.close()
    process.shutdown()


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory) -> Reference:
    return Reference(folder, tmp_path_factory.mktemp("reference") / "v3")


@pytest.fixture
def engine(engines):
    return engines.get("v3", DTYPE, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def sender() -> Iterator[IpcSender]:
    """To the two workers of an engine."""
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    sender = IpcSender(device, 2, getattr(torch, DTYPE), bucket_bytes=64 << 10, timeout_s=15.0)
    yield sender
    sender.close()


def install(engine, sender: IpcSender, weights, version: int) -> Installed:
    """The way of a real sync, from the device that trains. What the engine says of one that fails counts."""
    there = [(name, tensor.to(sender.device)) for name, tensor in dict(weights).items()]
    with sending(sender, there, version) as (update, _):
        return engine.take(update)


def test_updates_reach_every_worker(engine, reference, sender):
    before = reference.score(SEQUENCES)
    for version in (1, 2, 3):
        weights = perturbed(reference.weights, ".", seed=version)
        reference.load(weights)
        expected = reference.score(SEQUENCES)
        assert logprob_diff(before, expected)["mean_abs"] > 5e-3, "the noise must be visible, or the test shows nothing"
        installed = install(engine, sender, weights, version)
        assert installed.tensors == len(weights)
        if ON_GPU and version > 1:
            assert (installed.mode, installed.verified) == ("direct", len(weights))
        assert near(logprob_diff(engine.score(SEQUENCES), expected))
        assert near(reference.logprob_diff(generate(engine, requests()), temperature=0.7))
        before = expected


def test_weights_that_arrive_damaged_are_named_and_the_next_update_heals(engine, reference, sender, monkeypatch):
    honest = BucketViews.checksums

    def damaging(views, bucket, out=None):
        found = honest(views, bucket, out)
        if EXPERT in [spec.name for spec in bucket.specs]:
            views.tensors(bucket)[[spec.name for spec in bucket.specs].index(EXPERT)][3, 3] += 1
        return found

    monkeypatch.setattr(BucketViews, "checksums", damaging)
    with pytest.raises(RuntimeError, match=rf"{EXPERT} has checksum"):
        install(engine, sender, reference.weights, 4)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="the update to version 4 failed"):
        engine.score(SEQUENCES[:1])
    install(engine, sender, reference.weights, 5)
    reference.load(reference.weights)
    assert near(logprob_diff(engine.score(SEQUENCES), reference.score(SEQUENCES)))


def test_incomplete_weights_are_refused_and_the_next_update_heals(engine, reference, sender):
    with pytest.raises(RuntimeError, match=f"ended without 1 of .*{EXPERT}"):
        install(engine, sender, without(reference.weights, EXPERT), 6)
    install(engine, sender, reference.weights, 7)
    reference.load(reference.weights)
    assert near(logprob_diff(engine.score(SEQUENCES), reference.score(SEQUENCES)))


def fail_next(worker, rank: int) -> None:
    if worker.rank == rank:

        def failing(*_):
            worker.rlzero_installer.__dict__.pop("install")
            raise MemoryError("no room on this one")

        worker.rlzero_installer.install = failing


def test_a_worker_that_raises_is_named_and_the_next_update_heals(engine, reference, sender):
    install(engine, sender, reference.weights, 8)
    engine.inside(fail_next, 0)
    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 0: MemoryError: no room on this one"):
        install(engine, sender, reference.weights, 9)
    assert time.monotonic() - begun_s < 60
    weights = perturbed(reference.weights, ".", seed=10)
    install(engine, sender, weights, 10)
    reference.load(weights)
    assert near(logprob_diff(engine.score(SEQUENCES), reference.score(SEQUENCES)))


# ---- direct updates in every worker: vLLM's own layers, loaders and reload, without what its CPU build repacks ----


class Fresh:
    """A fresh model of the engine's architecture, sliced for this worker, as a model runner would have it."""

    device = torch.device("cuda")  # as far as the installer is concerned
    vllm_config = SimpleNamespace(speculative_config=None)

    def __init__(self, worker):
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        self.model, self.model_config = fresh_model(worker), worker.model_runner.model_config
        process_weights_after_loading(self.model, self.model_config, torch.device("cpu"))

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self.model.load_weights(weights_iterator)
        finalize_layerwise_reload(self.model, self.model_config)


@contextmanager
def nothing_repacked() -> Iterator[None]:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    methods = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
    kept = [method.process_weights_after_loading for method in methods]
    try:
        for method in methods:
            method.process_weights_after_loading = lambda self, layer: None
        yield
    finally:
        for method, theirs in zip(methods, kept, strict=True):
            method.process_weights_after_loading = theirs


def shards_installed(worker, sets: list, lie: str | None) -> dict:
    """What updates by these sets of weights did to a fresh model that held others. With `lie` its loader takes the
    tensor of that name upside down when it loads for good."""
    with nothing_repacked():
        runner, expected = Fresh(worker), Fresh(worker)
        load = runner.model.load_weights

        def lying(incoming):
            return load((n, t.flip(0) if n == lie and not t.is_meta else t) for n, t in incoming)

        if lie is not None:
            runner.model.load_weights = lying
        installer = Installer(SimpleNamespace(model_runner=runner), worker.rlzero_installer.expected)
        found: dict = {"modes": [], "read": [], "installed": [], "wrong": [], "reason": None}
        for weights in sets:
            items = list(weights.items())
            arriving = at_hand(items)
            installed = installer.install(arriving)
            expected.reload_weights(iter(items))
            state = expected.model.state_dict()
            wrong = [n for n, t in runner.model.state_dict().items() if not torch.equal(t, state[n])]
            found["modes"].append(installed.mode)
            found["read"].append(installed.read)
            found["installed"].append(installed)
            found["wrong"] += wrong
            found["reason"] = installed.reason
        if installer.direct:
            experts = next(module for module in runner.model.modules() if hasattr(module, "w13_weight"))
            experts.w13_weight.data[2] = experts.w13_weight.data[2].roll(len(experts.w13_weight[2]) // 2, 0)
            found["halves of one expert swapped"] = installer.shards.compared(arriving.sent)[1]
        return found


if not ON_GPU:

    def test_workers_go_directly_once_their_parts_were_read_back(engine, reference):
        sets = [perturbed(reference.weights, ".", seed=seed) for seed in (31, 32, 33)]
        found = engine.inside(shards_installed, sets, None)
        whole = {name: tensor.numel() for name, tensor in sets[0].items()}
        swapped = [f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up")]
        for one in found:
            assert one["reason"] is None and one["modes"] == ["reload", "direct", "direct"] and one["wrong"] == []
            assert one["halves of one expert swapped"] == swapped
            read = dict(zip(whole, one["read"][-1].tolist(), strict=True))
            assert read[EXPERT] == whole[EXPERT] // 2 and read["model.norm.weight"] == whole["model.norm.weight"]
        for update in range(3):
            assert Installed.by_all([one["installed"][update] for one in found]).verified == len(whole)

    def test_a_loader_that_does_something_else_than_it_says_stays_with_the_reload(engine, reference):
        lie = "model.layers.2.self_attn.o_proj.weight"
        sets = [perturbed(reference.weights, ".", seed=seed) for seed in (34, 35)]
        for one in engine.inside(shards_installed, sets, lie):
            assert one["modes"] == ["reload", "reload"] and f"({lie})" in one["reason"]


def test_a_worker_that_died_ends_the_update_with_an_error(engines, engine, reference, sender):
    install(engine, sender, reference.weights, 20)
    engine.kill(1)
    begun_s = time.monotonic()
    for version in (21, 22):
        with pytest.raises(RuntimeError, match="start the engine again"):
            install(engine, sender, reference.weights, version)
    assert time.monotonic() - begun_s < 60
    engines.close()


if ON_GPU:

    def test_experts_spread_over_the_gpus_go_directly(engines, reference, sender):
        engine = engines.get("v3", DTYPE, tensor_parallel_size=2, enable_expert_parallel=True)
        for version in (1, 2, 3):
            weights = perturbed(reference.weights, ".", seed=40 + version)
            reference.load(weights)
            installed = install(engine, sender, weights, version)
            if version > 1:
                assert (installed.mode, installed.verified) == ("direct", len(weights))
            assert near(logprob_diff(engine.score(SEQUENCES), reference.score(SEQUENCES)))

    def test_weights_from_the_host_reach_gpus_too(engines, reference):
        engine = engines.get("v3", DTYPE, tensor_parallel_size=2, enable_expert_parallel=True)
        for version in (4, 5):
            weights = perturbed(reference.weights, ".", seed=40 + version)
            reference.load(weights)
            engine.update(list(weights.items()), version)
            assert near(logprob_diff(engine.score(SEQUENCES), reference.score(SEQUENCES)))
