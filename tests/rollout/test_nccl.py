"""Weights by broadcast from the trainer to several engines: gloo on a CPU; NCCL where there are two GPUs."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rollout.transport.base import CorruptWeights, layout_of
from rollout.transport.checksum import checksum
from rollout.transport.nccl import NcclReceiver, NcclSender, merged
from tests.rollout.sending import delivered, received, sending

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
SMALL = 4096  # bytes a bucket: the tensors below take many
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.device_count() > 1 else [])]


def weights(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {f"layer.{i}.weight": torch.randn(16 + i, 24).bfloat16() for i in range(12)}
    made |= {"larger than a bucket": torch.randn(60, 40), "gate.e_score_correction_bias": torch.randn(8)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def same(found: dict[str, Tensor], sent: dict[str, Tensor]) -> bool:
    return list(found) == list(sent) and all(torch.equal(found[n], sent[n]) for n in sent)


def small_sender(receivers: int = 1, timeout_s: float = 20.0) -> NcclSender:
    return NcclSender(CPU, receivers, bucket_bytes=SMALL, timeout_s=timeout_s)


class Engines:
    """The receiving ends, in threads of this process."""

    def __init__(self, count: int, timeout_s: float = 20.0):
        self.receivers = [NcclReceiver(timeout_s) for _ in range(count)]
        self.pool = ThreadPoolExecutor(count)

    def receive(self, update) -> list[dict[str, Tensor]]:
        return list(self.pool.map(lambda receiver: received(receiver, update), self.receivers))


def engine_process(pipe, device: str) -> None:
    """An engine's end in a process of its own: answers every update with the checksums of what arrived."""
    if device == "cuda":
        torch.cuda.set_device(1)
    receiver = NcclReceiver(timeout_s=60.0)
    while (update := pipe.recv()) is not None:
        pipe.send({name: checksum(tensor) for name, tensor in receiver.receive(update)})


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_receives_every_bit_sync_after_sync(device):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine_process, args=(there, device), daemon=True)
    process.start()
    place = "cuda:0" if device == "cuda" else "cpu"
    sender = NcclSender(torch.device(place), bucket_bytes=SMALL, timeout_s=60.0)

    def take(update) -> dict[str, int]:
        here.send(pickle.loads(pickle.dumps(update)))
        assert here.poll(60)
        return here.recv()

    for version in (1, 2, 3):
        sent = weights(version, place)
        assert delivered(sender, sent.items(), take, version) == {n: checksum(tensor) for n, tensor in sent.items()}
    here.send(None)
    process.join(20)
    assert process.exitcode == 0


def test_all_engines_receive_each_update():
    sender, engines = small_sender(3), Engines(3)
    for version in (1, 2):
        sent = weights(version)
        assert all(same(found, sent) for found in delivered(sender, sent.items(), engines.receive, version))


def test_an_engine_that_gives_up_early_holds_nobody():
    sender, engines = small_sender(2), Engines(2)
    with sending(sender, weights(1).items()) as (update, done):

        def give_up() -> None:
            incoming = engines.receivers[0].receive(update)
            next(iter(incoming))
            incoming.close()

        other = threading.Thread(target=give_up)
        other.start()
        assert same(received(engines.receivers[1], update), weights(1))
        other.join()
    done.result()
    sent = weights(2)
    assert all(same(found, sent) for found in delivered(sender, sent.items(), engines.receive, 2))


def test_a_byte_that_changes_on_its_way_is_named():
    sender, engines = small_sender(), Engines(1)
    update = sender.prepare(layout_of(weights().items()), 1)
    honest, count = sender._group.broadcast, 0

    def damaging(buffer: Tensor):
        nonlocal count
        count += 1
        buffer[8] ^= count == 3
        return honest(buffer)

    sender._group.broadcast = damaging
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(sender.send, weights().items())
        with pytest.raises(CorruptWeights, match=r"layer\.7\.weight has checksum"):
            engines.receive(update)
        done.result(20)


def test_one_engine_too_many_is_told_so():
    sender, engines = small_sender(), Engines(1)
    with sending(sender, weights().items()) as (update, _):
        engines.receive(update)
        with pytest.raises(CorruptWeights, match="1 processes receive from this trainer and this is one more"):
            received(NcclReceiver(timeout_s=20.0), update)


def test_a_gather_that_fails_reaches_the_trainer_and_the_engine():
    sender, engines = small_sender(timeout_s=3.0), Engines(1, timeout_s=3.0)

    def failing():
        yield from list(weights().items())[:9]
        raise ValueError("the gather broke")

    update = sender.prepare(layout_of(weights().items()), 1)
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(engines.receive, update)
        with pytest.raises(ValueError, match="the gather broke"):
            sender.send(failing())
        with pytest.raises(CorruptWeights, match="did not arrive"):
            arriving.result(20)
    sent = weights(2)
    (found,) = delivered(sender, sent.items(), engines.receive, 2)
    assert same(found, sent)


def test_a_trainer_that_is_gone_is_an_error_that_says_so():
    sender = small_sender()
    update = sender.prepare(layout_of(weights().items()), 1)
    sender.close()
    with pytest.raises(CorruptWeights, match="nobody is met at the store 127.0.0.1:"):
        received(NcclReceiver(timeout_s=3.0), update)


def test_engines_that_lack_a_ranks_store_are_told_so():
    line = [("a", (2,), torch.float32), ("b", (2,), torch.float32)]
    sender = small_sender(timeout_s=3.0)
    update = sender.prepare(line, 1, owners=[0, 1])
    with pytest.raises(CorruptWeights, match="rank 1 of the trainer sends some of them"):
        received(NcclReceiver(), update)


def test_ranks_that_prepare_different_weights_are_told_so():
    lines = [("a", (2,), torch.float32)], [("a", (3,), torch.float32)]
    updates = [NcclSender(CPU, rank=rank).prepare(line, 1, [0]) for rank, line in enumerate(lines)]
    with pytest.raises(ValueError, match="prepared different weights"):
        merged(updates)
