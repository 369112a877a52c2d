"""Weights through shared buffers, between processes of one device: a CPU here, a GPU too where there is one. Both ends
stand in one process where the device does not matter: CUDA opens no handle in the process that made it."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rollout.transport.base import CorruptWeights, fingerprint, fingerprints, layout_of
from rollout.transport.ipc import IpcTransport

pytestmark = pytest.mark.timeout(120)

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
SMALL = 4096  # bytes a bucket: the tensors below take many


@pytest.fixture
def transport():
    transport = IpcTransport(SMALL, timeout_s=20.0)
    yield transport
    transport.close()


def weights(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {f"layer.{i}.weight": torch.randn(16 + i, 24).bfloat16() for i in range(12)}
    made |= {
        "larger than a bucket": torch.randn(60, 40),
        "gate.e_score_correction_bias": torch.randn(8),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def received(transport: IpcTransport, handle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in transport.receive(handle)}


def same(found: dict[str, Tensor], sent: dict[str, Tensor]) -> bool:
    return list(found) == list(sent) and all(torch.equal(found[n].cpu(), sent[n].cpu()) for n in sent)


def engine_process(pipe, device: str) -> None:
    """An engine's end in a process of its own: answers every handle with the fingerprints of what arrived."""
    transport = IpcTransport(timeout_s=20.0)
    while (handle := pipe.recv()) is not None:
        found = received(transport, handle)
        pipe.send({name: fingerprint(tensor) for name, tensor in found.items()})
    transport.close()


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_receives_every_bit_sync_after_sync(transport, device):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine_process, args=(there, device), daemon=True)
    process.start()
    for version in (1, 2, 3):
        sent = weights(version, device)
        here.send(pickle.loads(pickle.dumps(transport.publish(sent.items(), version))))
        assert here.poll(60)
        assert here.recv() == {name: fingerprint(tensor) for name, tensor in sent.items()}
    here.send(None)
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_finds_the_same_fingerprints(device):
    torch.manual_seed(0)
    shapes = [(1,), (3,), (7, 5), (128, 33), (1 << 18,), (3, 100_000)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]
    made = [(torch.randn(shape) * 50).abs().to(dtype) for shape in shapes for dtype in dtypes]
    made += [made[-1].flatten()[3:4099], made[-4].T]  # begins off a word; not contiguous
    assert fingerprints([tensor.to(device) for tensor in made]) == [fingerprint(tensor) for tensor in made]
    assert len({fingerprint(tensor) for tensor in made}) == len(made)


def test_several_engines_receive_one_publication(transport):
    sent = weights()
    handle = transport.publish(sent.items(), 1)
    for _ in range(3):
        other = IpcTransport()
        assert same(received(other, handle), sent)
        other.close()


def test_buffers_stay_bounded_and_the_same_from_sync_to_sync(transport):
    handle = transport.publish(weights(1).items(), 1)
    received(transport, handle)
    before = [(buffer.number, len(buffer.window.buffer)) for buffer in transport._server._buffers]
    assert len(before) == 2 and all(size == 1 << 20 for _, size in before)
    for version in (2, 3):
        received(transport, transport.publish(weights(version).items(), version))
    assert [(buffer.number, len(buffer.window.buffer)) for buffer in transport._server._buffers] == before


def test_weights_that_change_under_the_sync_are_named(transport):
    sent = weights()
    handle = transport.publish(sent.items(), 1)
    sent["layer.7.weight"][3, 3] += 1
    with pytest.raises(CorruptWeights, match=r"layer\.7\.weight has fingerprint"):
        received(transport, handle)


def test_what_fits_into_the_buffers_is_a_copy_of_its_own():
    transport, sent = IpcTransport(), weights()
    expected = {name: tensor.clone() for name, tensor in sent.items()}
    handle = transport.publish(sent.items(), 1)
    sent["layer.7.weight"].zero_()  # the trainer goes on
    assert same(received(transport, handle), expected)
    transport.close()


def test_an_older_publication_is_refused_by_its_version(transport):
    old = transport.publish(weights(1).items(), 1)
    new = transport.publish(weights(2).items(), 2)
    with pytest.raises(CorruptWeights, match="version 1 is no longer offered; the newest is 2"):
        received(transport, old)
    assert same(received(transport, new), weights(2))


def test_an_engine_that_gives_up_midway_does_not_hold_the_trainer(transport):
    incoming = transport.receive(transport.publish(weights(1).items(), 1))
    next(incoming)
    incoming.close()
    sent = weights(2)
    assert same(received(transport, transport.publish(sent.items(), 2)), sent)


def test_a_trainer_that_is_gone_is_an_error_that_says_so(transport):
    handle = transport.publish(weights(1).items(), 1)
    transport.close()
    with pytest.raises((ConnectionError, CorruptWeights)):
        received(IpcTransport(), handle)


def test_floats_travel_as_the_payload_but_the_routers_bias_as_it_is():
    transport = IpcTransport(SMALL, payload=torch.bfloat16)
    sent = {name: t.float() if t.is_floating_point() else t for name, t in weights().items()}
    found = received(transport, transport.publish(sent.items(), 1))
    for name, tensor in sent.items():
        keep = name in ("gate.e_score_correction_bias", "odd")
        assert torch.equal(found[name], tensor if keep else tensor.bfloat16()), name
    transport.close()


def failing():
    yield from list(weights().items())[:9]
    raise RuntimeError("the gather broke")


def test_a_gather_that_fails_reaches_the_engine_and_the_trainer(transport):
    handle = transport.offer(layout_of(weights().items()), 1, torch.device("cpu"))
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(received, IpcTransport(timeout_s=20.0), handle)
        with pytest.raises(RuntimeError, match="the gather broke"):
            transport.send(failing())
        with pytest.raises(CorruptWeights, match="RuntimeError while sending: the gather broke"):
            arriving.result(20)


def test_other_weights_than_were_offered_are_refused(transport):
    sent = weights()
    transport.offer(layout_of(sent.items()), 1, torch.device("cpu"))
    transport.engines = 0
    sent["layer.3.weight"] = sent["layer.3.weight"].float()
    with pytest.raises(ValueError, match=r"layer\.3\.weight \(19, 24\) torch.float32 came where layer\.3\.weight"):
        transport.send(sent.items())


def test_weights_in_fp8_pass_with_their_scales_as_they_are(transport):
    """What a process passes on that received FP8 itself: nothing is quantized again."""
    weight = torch.randn(256, 128).to(torch.float8_e4m3fn)
    sent = {"a.weight": weight, "a.weight_scale_inv": torch.rand(2, 1), "b.weight": torch.randn(4, 4)}
    for version in (1, 2):
        handle = transport.offer(layout_of(sent.items()), version, torch.device("cpu"))
        with ThreadPoolExecutor(1) as pool:
            arriving = pool.submit(received, IpcTransport(timeout_s=20.0), handle)
            transport.send(sent.items())
            found = arriving.result(20)
        assert list(found) == list(sent) and fingerprints([*found.values()]) == fingerprints([*sent.values()])
        assert transport.sent() == fingerprints([*sent.values()])


def test_engines_that_nobody_awaits_any_more_are_not_waited_for(transport):
    sent = weights()
    transport.offer(layout_of(sent.items()), 1, torch.device("cpu"))
    begun_s = time.monotonic()
    with pytest.raises(RuntimeError, match="reached 0 of 1 engines: one ended and had not come"):
        transport.send(sent.items(), awaited=lambda: time.monotonic() < begun_s + 0.3)
    assert time.monotonic() - begun_s < 10
