"""Weights that two ranks of a trainer gather while they travel, to two engines: through memory that a rank and its
engine share (ipc), and from each rank to all engines (nccl; on a CPU gloo carries it). Two ranks and two engines'
ends in processes of their own (streaming_processes.py)."""

import socket
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from streaming_processes import OPTIONS, EngineEnd, Process, TrainerRank

from rollout.transport.checksum import checksum
from rollout.transport.ipc import IpcReceiver, IpcSender
from rollout.transport.nccl import merged
from tests.rollout.sending import delivered, received
from trainer.policy import PolicyOptions, load_policy

pytestmark = pytest.mark.timeout(600)
TIMEOUT_S = 6.0
START_S = 240.0  # of a process, on a machine that is busy


class World:
    """Two ranks, and engines that can be started again."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.kind, self.version = "", 0
        self.ranks = [Process(TrainerRank, rank, address, 2) for rank in range(2)]
        self.engines = [Process(EngineEnd) for _ in range(2)]

    def use(self, kind: str, payload=None) -> None:
        """From now on weights travel this way, in this form."""
        if kind != self.kind:
            for engine in self.engines:
                engine.call("use", kind, TIMEOUT_S)
            assert [engine.answer(START_S) for engine in self.engines] == [None, None]
        self.kind = kind
        for rank in self.ranks:
            rank.call("use", kind, TIMEOUT_S, 1 if kind == "ipc" else 2, payload)
        assert [rank.answer(START_S) for rank in self.ranks] == [None, None]

    def restart(self, index: int) -> None:
        self.engines[index].close()
        self.engines[index] = Process(EngineEnd)
        self.engines[index].call("use", self.kind, TIMEOUT_S)
        assert self.engines[index].answer(START_S) is None

    def sync(self, damaged=(None, None), absent=(), dies=()):
        """What ranks and engines answer to a sync of new weights (engines: None, of one that did not come or died)."""
        self.version += 1
        for rank in self.ranks:
            rank.call("prepare", self.version)
        updates = [rank.answer() for rank in self.ranks]
        if self.kind == "nccl":
            updates = [merged(updates)] * 2
        for rank, bucket in zip(self.ranks, damaged, strict=True):
            rank.call("send", bucket)
        for i, (engine, update) in enumerate(zip(self.engines, updates, strict=True)):
            if i not in absent:
                engine.call("receive", update, 12 if i in dies else None)
        gone = {*absent, *dies}
        found = [None if i in gone else engine.answer() for i, engine in enumerate(self.engines)]
        return [rank.answer() for rank in self.ranks], found

    def expected(self) -> dict[str, int]:
        policy = load_policy(PolicyOptions(**OPTIONS), "cpu", seed=self.version)
        return {name: checksum(tensor) for name, tensor in policy.weights()}

    def close(self) -> None:
        for process in (*self.ranks, *self.engines):
            process.close()


@pytest.fixture(scope="module")
def processes():
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="module", params=["ipc", "nccl"])
def world(request, processes):
    processes.use(request.param)
    return processes


def test_every_engine_receives_every_bit_of_the_gathered_weights_sync_after_sync(world):
    for _ in range(2):
        sent, arrived = world.sync()
        assert all(isinstance(seconds, float) for seconds in sent), sent
        assert arrived == [world.expected()] * 2


def test_a_damaged_bucket_is_named_by_the_engine_and_the_next_sync_is_whole(world):
    sent, arrived = world.sync(damaged=(3, None))
    if world.kind == "ipc":  # the rank hears of it
        assert "one hung up" in sent[0] and isinstance(sent[1], float), sent
    hit = [found for found in arrived if isinstance(found, str)]
    assert len(hit) == (1 if world.kind == "ipc" else 2)
    assert all("CorruptWeights: weights arrived damaged: model." in text for text in hit), hit
    assert world.sync()[1] == [world.expected()] * 2


def test_an_engine_that_dies_midway_holds_nobody_and_its_successor_receives(world):
    began_s = time.monotonic()
    sent, arrived = world.sync(dies=(1,))
    assert time.monotonic() - began_s < 4 * TIMEOUT_S
    if world.kind == "ipc":  # rank 0 and its engine have nothing to do with it
        assert isinstance(sent[0], float) and arrived[0] == world.expected(), sent
        assert "reached 0 of 1 engines" in sent[1] and "hung up" in sent[1], sent
    else:
        assert "weights did not arrive" in arrived[0], arrived
        assert all("did not reach every engine" in text for text in sent), sent
    world.restart(1)
    sent, arrived = world.sync()
    assert arrived == [world.expected()] * 2, sent


def test_an_engine_that_never_comes_holds_nobody(world):
    began_s = time.monotonic()
    sent, arrived = world.sync(absent=(1,))
    assert time.monotonic() - began_s < 4 * TIMEOUT_S
    if world.kind == "ipc":
        assert isinstance(sent[0], float) and arrived[0] == world.expected(), sent
        assert f"one never came within {TIMEOUT_S:g} s" in sent[1], sent
    else:
        assert "1 of 2 engines did not come" in sent[0] or "failed at bucket" in sent[0], sent
        assert "weights did not arrive" in arrived[0], arrived
    sent, arrived = world.sync()
    assert arrived == [world.expected()] * 2, sent


def test_block_fp8_of_gathered_weights_is_what_one_rank_alone_would_send(world):
    world.use(world.kind, "fp8")
    sent, arrived = world.sync()
    policy = load_policy(PolicyOptions(**OPTIONS), "cpu", seed=world.version)
    alone = IpcSender(torch.device("cpu"), payload="fp8")
    found = delivered(alone, policy.weights(), lambda update: received(IpcReceiver(), update))
    expected = {name: checksum(tensor) for name, tensor in found.items()}
    assert any(name.endswith("_scale_inv") for name in expected)
    assert arrived == [expected] * 2, sent
