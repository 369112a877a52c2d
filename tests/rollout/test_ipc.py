"""Weights through shared buffers, between processes of one device: a CPU here, a GPU too where there is one. Both ends
stand in one process where the device does not matter: CUDA opens no handle in the process that made it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rollout.transport.base import CorruptWeights, layout_of
from rollout.transport.checksum import checksum, checksums
from rollout.transport.ipc import IpcReceiver, IpcSender
from tests.rollout.sending import delivered, received, sending

pytestmark = pytest.mark.timeout(120)

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
CPU = torch.device("cpu")
SMALL = 4096  # bytes a bucket: the tensors below take many


@pytest.fixture
def sender() -> Iterator[IpcSender]:
    sender = IpcSender(CPU, bucket_bytes=SMALL, timeout_s=20.0)
    yield sender
    sender.close()


def weights(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {f"layer.{i}.weight": torch.randn(16 + i, 24).bfloat16() for i in range(12)}
    made |= {
        "larger than a bucket": torch.randn(60, 40),
        "gate.e_score_correction_bias": torch.randn(8),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def same(found: dict[str, Tensor], sent: dict[str, Tensor]) -> bool:
    return list(found) == list(sent) and all(torch.equal(found[n].cpu(), sent[n].cpu()) for n in sent)


def engine_process(pipe) -> None:
    """An engine's end in a process of its own: answers every update with the checksums of what arrived."""
    receiver = IpcReceiver(timeout_s=20.0)
    while (update := pipe.recv()) is not None:
        pipe.send({name: checksum(tensor) for name, tensor in received(receiver, update).items()})
    receiver.close()


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_receives_every_bit_sync_after_sync(device):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine_process, args=(there,), daemon=True)
    process.start()
    sender = IpcSender(torch.device(device), bucket_bytes=SMALL, timeout_s=60.0)

    def take(update) -> dict[str, int]:
        here.send(pickle.loads(pickle.dumps(update)))
        assert here.poll(60)
        return here.recv()

    for version in (1, 2, 3):
        sent = weights(version, device)
        assert delivered(sender, sent.items(), take, version) == {n: checksum(tensor) for n, tensor in sent.items()}
    here.send(None)
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_finds_the_same_checksums(device):
    torch.manual_seed(0)
    shapes = [(1,), (3,), (7, 5), (128, 33), (1 << 18,), (3, 100_000)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]
    made = [(torch.randn(shape) * 50).abs().to(dtype) for shape in shapes for dtype in dtypes]
    made += [made[-1].flatten()[3:4099], made[-4].T]  # begins off a word; not contiguous
    assert checksums([tensor.to(device) for tensor in made]) == [checksum(tensor) for tensor in made]
    assert len({checksum(tensor) for tensor in made}) == len(made)


def test_several_engines_receive_one_update():
    sender, sent = IpcSender(CPU, receivers=3, bucket_bytes=SMALL), weights()
    with ThreadPoolExecutor(3) as pool, sending(sender, sent.items()) as (update, done):
        found = list(pool.map(lambda receiver: received(receiver, update), [IpcReceiver() for _ in range(3)]))
    done.result()
    assert all(same(one, sent) for one in found)


def test_buffers_stay_bounded_and_the_same_from_sync_to_sync(sender):
    receiver, held = IpcReceiver(), []
    for version in (1, 2, 3):
        delivered(sender, weights(version).items(), lambda update: received(receiver, update), version)
        held.append([(buffer.id, len(buffer.views.buffer)) for buffer in sender._buffers])
    assert len(held[0]) == 2 and all(size == 1 << 20 for _, size in held[0])
    assert held[0] == held[1] == held[2] and set(receiver._mapped) == {name for name, _ in held[0]}


def test_an_update_that_a_newer_one_replaced_is_refused(sender):
    old = sender.prepare(layout_of(weights().items()), 1)
    with sending(sender, weights(2).items(), 2) as (new, done):
        with pytest.raises(CorruptWeights, match="the trainer that prepared them is gone"):
            received(IpcReceiver(), old)
        assert same(received(IpcReceiver(), new), weights(2))
    done.result()


def test_an_engine_that_gives_up_midway_does_not_hold_the_trainer(sender):
    with sending(sender, weights(1).items()) as (update, done):
        incoming = IpcReceiver().receive(update)
        next(iter(incoming))
        incoming.close()
        with pytest.raises(RuntimeError, match="version 1 of the weights reached 0 of 1 engines: one hung up"):
            done.result(20)
    sent = weights(2)
    assert same(delivered(sender, sent.items(), lambda update: received(IpcReceiver(), update), 2), sent)


def test_a_trainer_that_is_gone_is_an_error_that_says_so(sender):
    update = sender.prepare(layout_of(weights().items()), 1)
    sender.close()
    with pytest.raises(CorruptWeights, match="the trainer that prepared them is gone"):
        received(IpcReceiver(), update)


def test_floats_travel_as_the_payload_but_the_routers_bias_as_it_is():
    sender = IpcSender(CPU, payload=torch.bfloat16, bucket_bytes=SMALL)
    sent = {name: t.float() if t.is_floating_point() else t for name, t in weights().items()}
    found = delivered(sender, sent.items(), lambda update: received(IpcReceiver(), update))
    for name, tensor in sent.items():
        keep = name in ("gate.e_score_correction_bias", "odd")
        assert torch.equal(found[name], tensor if keep else tensor.bfloat16()), name


def failing():
    yield from list(weights().items())[:9]
    raise RuntimeError("the gather broke")


def test_a_gather_that_fails_reaches_the_engine_and_the_trainer(sender):
    update = sender.prepare(layout_of(weights().items()), 1)
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(received, IpcReceiver(timeout_s=20.0), update)
        with pytest.raises(RuntimeError, match="the gather broke"):
            sender.send(failing())
        with pytest.raises(CorruptWeights, match="RuntimeError while sending: the gather broke"):
            arriving.result(20)


def test_other_weights_than_were_prepared_are_refused():
    sender, sent = IpcSender(CPU, receivers=0, bucket_bytes=SMALL), weights()
    sender.prepare(layout_of(sent.items()), 1)
    sent["layer.3.weight"] = sent["layer.3.weight"].float()
    with pytest.raises(ValueError, match=r"layer\.3\.weight \(19, 24\) torch.float32 came where layer\.3\.weight"):
        sender.send(sent.items())
