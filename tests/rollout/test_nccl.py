"""Weights by broadcast from the trainer to several engines: gloo on a CPU; NCCL where there are two GPUs."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rollout.transport.base import CorruptWeights, fingerprint, layout_of
from rollout.transport.nccl import NcclTransport, merged

pytestmark = pytest.mark.timeout(120)

SMALL = 4096  # bytes a bucket: the tensors below take many
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.device_count() > 1 else [])]


def weights(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {f"layer.{i}.weight": torch.randn(16 + i, 24).bfloat16() for i in range(12)}
    made |= {"larger than a bucket": torch.randn(60, 40), "gate.e_score_correction_bias": torch.randn(8)}
    return {name: tensor.to(device) for name, tensor in made.items()}


class Engines:
    """The receiving ends, in threads of this process."""

    def __init__(self, count: int):
        self.transports = [NcclTransport(count, timeout_s=20.0) for _ in range(count)]
        self.pool = ThreadPoolExecutor(count)

    def receive(self, handle) -> list[dict[str, Tensor]]:
        def one(transport: NcclTransport) -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in transport.receive(handle)}

        return list(self.pool.map(one, self.transports))


def engine_process(pipe, device: str) -> None:
    """An engine's end in a process of its own: answers every handle with the fingerprints of what arrived."""
    if device == "cuda":
        torch.cuda.set_device(1)
    transport = NcclTransport(1, timeout_s=60.0)
    while (handle := pipe.recv()) is not None:
        pipe.send({name: fingerprint(tensor) for name, tensor in transport.receive(handle)})


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_receives_every_bit_sync_after_sync(device):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine_process, args=(there, device), daemon=True)
    process.start()
    transport = NcclTransport(1, SMALL, timeout_s=60.0)
    for version in (1, 2, 3):
        sent = weights(version, "cuda:0" if device == "cuda" else "cpu")
        here.send(pickle.loads(pickle.dumps(transport.publish(sent.items(), version))))
        assert here.poll(60)
        assert here.recv() == {name: fingerprint(tensor) for name, tensor in sent.items()}
        transport.wait()
    here.send(None)
    process.join(20)
    assert process.exitcode == 0


def test_all_engines_receive_each_publication():
    transport, engines = NcclTransport(3, SMALL, timeout_s=20.0), Engines(3)
    for version in (1, 2):
        sent = weights(version)
        for found in engines.receive(transport.publish(sent.items(), version)):
            assert list(found) == list(sent) and all(torch.equal(found[n], sent[n]) for n in sent)
        transport.wait()


def test_an_engine_that_gives_up_early_holds_nobody():
    transport, engines = NcclTransport(2, SMALL, timeout_s=20.0), Engines(2)
    handle = transport.publish(weights(1).items(), 1)

    def give_up() -> None:
        incoming = engines.transports[0].receive(handle)
        next(incoming)
        incoming.close()

    other = threading.Thread(target=give_up)
    other.start()
    found = {name: tensor.clone() for name, tensor in engines.transports[1].receive(handle)}
    other.join()
    assert all(torch.equal(found[n], t) for n, t in weights(1).items())
    transport.wait()
    sent = weights(2)
    for found in engines.receive(transport.publish(sent.items(), 2)):
        assert all(torch.equal(found[n], sent[n]) for n in sent)


def test_a_byte_that_changes_on_its_way_is_named():
    transport, engines = NcclTransport(1, SMALL, timeout_s=20.0), Engines(1)
    handle = transport.offer(layout_of(weights().items()), 1, device=torch.device("cpu"))
    group = transport._groups[0]
    honest, count = group.broadcast, 0

    def damaging(buffer: Tensor):
        nonlocal count
        count += 1
        buffer[8] ^= count == 3
        return honest(buffer)

    group.broadcast = damaging
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(transport.send, weights().items())
        with pytest.raises(CorruptWeights, match=r"layer\.7\.weight has fingerprint"):
            engines.receive(handle)
        sending.result(20)


def test_one_engine_too_many_is_told_so():
    transport, engines = NcclTransport(1, SMALL, timeout_s=20.0), Engines(1)
    handle = transport.publish(weights().items(), 1)
    engines.receive(handle)
    with pytest.raises(CorruptWeights, match="1 engines receive from this trainer and this is one more"):
        list(NcclTransport(1, timeout_s=20.0).receive(handle))


def test_a_gather_that_fails_reaches_the_trainer_and_the_engine():
    transport, engines = NcclTransport(1, SMALL, timeout_s=3.0), Engines(1)
    engines.transports[0].timeout_s = 3.0

    def failing():
        yield from list(weights().items())[:9]
        raise ValueError("the gather broke")

    handle = transport.offer(layout_of(weights().items()), 1, device=torch.device("cpu"))
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(engines.receive, handle)
        with pytest.raises(ValueError, match="the gather broke"):
            transport.send(failing())
        with pytest.raises(CorruptWeights, match="did not arrive"):
            arriving.result(20)
    sent = weights(2)
    (found,) = engines.receive(transport.publish(sent.items(), 2))
    assert all(torch.equal(found[n], sent[n]) for n in sent)


def test_engines_that_lack_a_ranks_handle_are_told_so():
    transport, line = NcclTransport(1, timeout_s=3.0), [("a", (2,), torch.float32), ("b", (2,), torch.float32)]
    handle = transport.offer(line, 1, owners=[0, 1], rank=0, device=torch.device("cpu"))
    with pytest.raises(CorruptWeights, match="rank 1 of the trainer sends some of them"):
        list(NcclTransport(1).receive(handle))


def test_ranks_that_offer_different_weights_are_told_so():
    lines = [("a", (2,), torch.float32)], [("a", (3,), torch.float32)]
    handles = [NcclTransport(1).offer(line, 1, [0], rank, torch.device("cpu")) for rank, line in enumerate(lines)]
    with pytest.raises(ValueError, match="offered different weights"):
        merged(handles)
