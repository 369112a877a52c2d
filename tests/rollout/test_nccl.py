"""Weights by broadcast from the trainer to several engines: gloo on a CPU; NCCL where there are two GPUs."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rollout.transport.base import CorruptWeights, fingerprint
from rollout.transport.nccl import NcclTransport

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


def test_weights_that_change_under_the_broadcast_are_named():
    transport, engines = NcclTransport(1, SMALL, timeout_s=20.0), Engines(1)

    class Changing:
        """Weights that a careless trainer changes after it has published them."""

        rounds = 0

        def __iter__(self):
            self.rounds += 1
            for name, tensor in weights().items():
                yield name, tensor + (self.rounds > 1 and name == "layer.7.weight")

    with pytest.raises(CorruptWeights, match=r"layer\.7\.weight has fingerprint"):
        engines.receive(transport.publish(Changing(), 1))
    transport.wait()


def test_one_engine_too_many_is_told_so():
    transport, engines = NcclTransport(1, SMALL, timeout_s=20.0), Engines(1)
    handle = transport.publish(weights().items(), 1)
    engines.receive(handle)
    with pytest.raises(CorruptWeights, match="1 engines receive from this trainer and this is one more"):
        list(NcclTransport(1, timeout_s=20.0).receive(handle))


def test_a_failure_while_sending_reaches_the_trainer():
    transport, engines = NcclTransport(1, 1 << 20, timeout_s=3.0), Engines(1)

    class Failing:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            if self.rounds > 1:
                raise ValueError("the gather broke")
            return iter(weights().items())

    handle = transport.publish(Failing(), 1)
    with pytest.raises(RuntimeError, match="the gather broke"):
        transport.wait()
    engines.transports[0].timeout_s = 1.0
    with pytest.raises(CorruptWeights, match="did not arrive"):
        engines.receive(handle)
