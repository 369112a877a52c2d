"""Updates passed on from the engine's process to vLLM's workers: everything but vLLM's models, which are dictionaries
here. Workers are threads: on a CPU both ends of shared memory may stand in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rollout.transport import ipc_server
from rollout.transport.base import CorruptWeights, Manifest, Received, describe_all
from rollout.transport.ipc import IpcTransport
from rollout.vllm.relay import Relay

pytestmark = pytest.mark.timeout(120)

SMALL = 4096  # bytes a bucket: the tensors below take many
SHAPES = {f"layer.{i}.weight": (16 + i, 24) for i in range(12)} | {"larger than a bucket": (60, 40)}


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


class Runner:
    """A model runner that loads into a dictionary."""

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


class Complete:
    """An update's check that wants all of SHAPES."""

    tied, shapes = False, SHAPES

    def checked(self, incoming) -> Iterator[tuple[str, Tensor]]:
        names = []
        for name, tensor in incoming:
            names.append(name)
            yield name, tensor
        if names != list(SHAPES):
            raise ValueError(f"the update ended without {len(SHAPES) - len(names)} of {len(SHAPES)} tensors")


class Engine:
    def __init__(self, workers: int = 2):
        self.workers = [SimpleNamespace(model_runner=Runner()) for _ in range(workers)]
        self.pool = ThreadPoolExecutor(workers)
        self.relay = Relay(self.ask, workers, Complete(), bucket_bytes=SMALL)

    def ask(self, function, args=()) -> list:
        return list(self.pool.map(lambda worker: function(worker, *args), self.workers))

    def hold(self, sent: dict[str, Tensor]) -> bool:
        return all(
            list(worker.model_runner.held) == list(sent)
            and all(torch.equal(worker.model_runner.held[name], tensor) for name, tensor in sent.items())
            for worker in self.workers
        )


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.relay.close()
    engine.pool.shutdown()


def arriving(sent: dict[str, Tensor], taken: list[str] | None = None, damaged: str | None = None) -> Received:
    """What a transport's `receive` gives: a tensor's memory is used again when the next one is asked for."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        memory = torch.empty(max(tensor.numel() for tensor in sent.values()))
        for name, tensor in sent.items():
            view = memory[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            if name == damaged:
                view[0, 0] += 1
            if taken is not None:
                taken.append(name)
            yield name, view
            memory.fill_(float("nan"))

    return Received(Manifest(1, tuple(describe_all(list(sent.items())))), tensors())


def test_every_worker_has_every_bit_update_after_update(engine):
    for version in (1, 2, 3):
        sent = weights(version)
        installed = engine.relay.install(arriving(sent), version)
        assert (installed.way, installed.tensors, installed.verified) == ("reload", len(sent), 0)
        assert engine.hold(sent)


def test_the_buffers_are_two_and_stay_from_update_to_update(engine):
    def buffers() -> list[tuple[int, int]]:
        held = engine.relay._transport._server._buffers
        return [(buffer.number, len(buffer.window.buffer)) for buffer in held]

    engine.relay.install(arriving(weights(1)), 1)
    first = buffers()
    mapped = [set(worker.rlzero_receiver._attached) for worker in engine.workers]
    engine.relay.install(arriving(weights(2)), 2)
    assert buffers() == first and len(first) == 2
    assert [set(worker.rlzero_receiver._attached) for worker in engine.workers] == mapped


def test_a_list_needs_no_manifest(engine):
    sent = weights(1)
    engine.relay.install(list(sent.items()), 1)
    assert engine.hold(sent)


def test_what_nobody_announced_goes_through_a_folder(engine, caplog):
    sent = weights(1)
    with caplog.at_level(logging.WARNING):
        installed = engine.relay.install(iter(sent.items()), 1)
    assert engine.hold(sent) and installed.tensors == len(sent)
    assert "through a folder, which is slower" in caplog.text


def test_where_no_buffer_reaches_the_workers_a_folder_does(engine, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(ipc_server, "_SHARED_MEMORY", str(tmp_path / "not there"))
    sent = weights(1)
    with caplog.at_level(logging.WARNING):
        engine.relay.install(arriving(sent), 1)
    assert engine.hold(sent)
    assert "buffers on cpu do not carry weights to vLLM's workers: FileNotFoundError" in caplog.text


def test_a_tensor_damaged_on_its_way_through_the_engine_is_named(engine):
    with pytest.raises(CorruptWeights, match=r"layer\.7\.weight was damaged on its way"):
        engine.relay.install(arriving(weights(1), damaged="layer.7.weight"), 1)


def test_an_incomplete_set_keeps_its_error_and_keeps_nobody_waiting(engine):
    sent = weights(1)
    short = {name: sent[name] for name in list(sent)[:-3]}
    begun_s = time.monotonic()
    with pytest.raises(ValueError, match="ended without 3 of 13"):
        engine.relay.install(arriving(short), 1)
    assert time.monotonic() - begun_s < 20
    engine.relay.install(arriving(sent), 2)
    assert engine.hold(sent)


@pytest.mark.parametrize("fails_at", ["layer.0.weight", "layer.9.weight"])
def test_a_worker_that_fails_is_named_and_all_weights_are_taken(engine, fails_at):
    engine.workers[1].model_runner.fails_at = fails_at
    sent, taken = weights(1), []
    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="^worker 1: RuntimeError: out of luck$"):
        engine.relay.install(arriving(sent, taken), 1)
    assert time.monotonic() - begun_s < 20 and taken == list(sent)
    engine.workers[1].model_runner.fails_at = None
    engine.relay.install(arriving(sent), 2)
    assert engine.hold(sent)


def test_workers_that_cannot_be_asked_are_not_waited_for(engine):
    engine.relay.install(arriving(weights(1)), 1)

    def dead(function, args=()):
        raise RuntimeError("Executor failed.")

    engine.relay._ask = dead
    taken: list[str] = []
    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer .Executor failed.*start the engine again"):
        engine.relay.install(arriving(weights(2), taken), 2)
    assert time.monotonic() - begun_s < 20 and len(taken) == len(SHAPES)


def test_a_worker_that_receives_something_else_says_so(engine, monkeypatch):
    real = IpcTransport._expect

    def damaged(receiver, server, index):
        answer = real(receiver, server, index)
        if receiver is engine.workers[1].rlzero_receiver and index == 3:
            engine.relay._transport._server._buffers[3 % 2].window.buffer[:4] += 1
        return answer

    engine.relay.install(arriving(weights(1)), 1)
    monkeypatch.setattr(IpcTransport, "_expect", damaged)
    with pytest.raises(CorruptWeights, match=r"worker 1: CorruptWeights: .*layer\.\d+\.weight has fingerprint"):
        engine.relay.install(arriving(weights(2)), 2)
