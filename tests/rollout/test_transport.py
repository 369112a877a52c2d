"""Every transport delivers the bits that were published, or names the tensor that it did not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from rollout.torch.engine import EngineUnusable, TorchEngine
from rollout.transport.base import CorruptWeights, Manifest, changed, describe, fingerprint
from rollout.transport.disk import DiskTransport
from rollout.transport.ipc import IpcTransport
from rollout.transport.object_store import ObjectStoreTransport
from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.usefixtures("local_ray")

TRANSPORTS = ["disk", "object_store", "object_store_in_small_buckets", "ipc", "ipc_in_small_buckets"]


@pytest.fixture(params=TRANSPORTS)
def transport(request, tmp_path):
    if request.param == "disk":
        yield DiskTransport(tmp_path, file_bytes=3000)
    elif request.param.startswith("object_store"):
        yield ObjectStoreTransport(256 << 20 if request.param == "object_store" else 1024)
    else:
        transport = IpcTransport(256 << 20 if request.param == "ipc" else 1024, timeout_s=20.0)
        yield transport
        transport.close()


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "matrix": torch.randn(37, 11),
        "half": torch.randn(64, 33).bfloat16(),
        "turned": torch.randn(8, 5).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.arange(7, dtype=torch.uint8),
        "fp8": torch.randn(9, 3).to(torch.float8_e4m3fn),
        "large": torch.randn(40, 40, dtype=torch.float64),
    }


def test_a_round_trip_keeps_every_bit(transport):
    sent = tensors()
    handle = transport.publish(sent.items(), version=3)
    assert transport.manifest(handle).version == 3
    received = {name: t.clone() for name, t in transport.receive(handle)}
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
        assert received[name].contiguous().view(-1).view(torch.uint8).equal(
            tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_handles_reach_another_process(transport):
    handle = transport.publish(tensors().items(), version=1)

    @ray.remote
    def fingerprints(transport, handle):
        return {name: fingerprint(t) for name, t in transport.receive(handle)}

    assert ray.get(fingerprints.remote(transport, handle)) == {name: fingerprint(t) for name, t in tensors().items()}


def test_a_damaged_file_names_the_tensor(tmp_path):
    transport = DiskTransport(tmp_path)
    handle = transport.publish(tensors().items(), version=0)
    file = tmp_path / "version-0" / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])["half"]["data_offsets"][0]
    data[8 + header + start + 1001] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptWeights, match="half has fingerprint"):
        list(transport.receive(handle))


def test_a_truncated_file_names_a_tensor(tmp_path):
    transport = DiskTransport(tmp_path)
    handle = transport.publish(tensors().items(), version=0)
    file = tmp_path / "version-0" / "weights-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptWeights, match="matrix cannot be read"):
        list(transport.receive(handle))


def test_a_damaged_object_names_the_tensor():
    transport = ObjectStoreTransport()
    handle = transport.publish(tensors().items(), version=0)
    (bucket,) = (ray.get(ref).copy() for ref in handle.buckets)
    bucket[70] ^= 1
    with pytest.raises(CorruptWeights, match="matrix has fingerprint"):
        list(transport.receive(replace(handle, buckets=(ray.put(bucket),))))


def test_missing_buckets_name_the_tensor():
    transport = ObjectStoreTransport(1024)
    handle = transport.publish(tensors().items(), version=0)
    with pytest.raises(CorruptWeights, match="the buckets end before large"):
        list(transport.receive(replace(handle, buckets=handle.buckets[:-1])))


def test_objects_stay_within_the_bucket_size():
    handle = ObjectStoreTransport(1024).publish(tensors().items(), version=0)
    assert max(ray.get(ref).nbytes for ref in handle.buckets) <= 1024


def test_receiving_on_the_same_node_copies_nothing():
    transport = ObjectStoreTransport()
    handle = transport.publish([("a", torch.zeros(1 << 16))], version=0)
    (bucket,) = (ray.get(ref) for ref in handle.buckets)
    ((_, tensor),) = transport.receive(handle)
    assert tensor.data_ptr() == bucket.ctypes.data


def test_an_unfinished_publication_leaves_the_previous_one(tmp_path):
    transport = DiskTransport(tmp_path)
    handle = transport.publish(tensors().items(), version=0)

    def dies():
        yield from list(tensors(1).items())[:3]
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        transport.publish(dies(), version=1)
    assert not (tmp_path / "version-1").exists()
    assert len(list(transport.receive(handle))) == len(tensors())


def test_old_versions_are_removed(tmp_path):
    transport = DiskTransport(tmp_path, keep=2)
    for version in (8, 9, 10, 11):
        transport.publish(tensors().items(), version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["version-10", "version-11"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_single_changed_element_changes_the_fingerprint(dtype):
    tensor = torch.arange(300).to(dtype)
    original = fingerprint(tensor)
    seen = {original}
    for i in range(300):
        other = tensor.clone()
        other[i] = other[i] + 1 if dtype != torch.bfloat16 else other[i] * 2 + 1
        seen.add(fingerprint(other))
    assert len(seen) == 301
    assert fingerprint(tensor.flip(0)) != original and fingerprint(tensor[:-1]) != original


def test_fingerprints_do_not_depend_on_layout_in_memory():
    matrix = torch.randn(20, 30)
    padded = torch.cat([torch.zeros(1), matrix.flatten()])[1:].view(20, 30)
    assert fingerprint(padded) == fingerprint(matrix) == fingerprint(matrix.T.contiguous().T)


def test_changed_names_what_differs_and_what_is_missing():
    sent = tensors()
    manifest = Manifest(0, tuple(describe(n, t) for n, t in sent.items()))
    assert changed(manifest, sent.items()) == []
    held = dict(sent, matrix=sent["matrix"] + 1e-3)
    del held["half"]
    assert changed(manifest, held.items()) == ["matrix", "half"]
    assert np.isclose(float(held["scalar"]), 3.5)


# from the trainer's model into an engine

CONFIG = V3Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=40, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, num_nextn_predict_layers=1, eos_token_id=1,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


def trainer_logprobs(model, tokens):
    """By the trainer's forward pass, one document."""
    n = len(tokens)
    with torch.no_grad():
        out = model(torch.tensor(tokens), torch.arange(n), torch.tensor([0, n]))
        logprobs = model.logits(out.hidden).double().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()


@pytest.fixture
def engine(tmp_path):
    save_folder(V3Model(CONFIG).init_weights(0), tmp_path / "model")
    return TorchEngine(tmp_path / "model", cache="expanded")


def test_published_weights_make_the_engine_agree_with_the_trainer(transport, engine):
    model, tokens = V3Model(CONFIG).init_weights(7), [5, 9, 33, 2, 60, 17, 17, 8]
    assert np.abs(engine.score([tokens])[0][1:] - trainer_logprobs(model, tokens)).mean() > 1e-2
    handle = transport.publish(named_checkpoint_tensors(model), version=1)
    engine.update(transport.receive(handle), version=1)
    assert np.abs(engine.score([tokens])[0][1:] - trainer_logprobs(model, tokens)).max() < 1e-5
    manifest = transport.manifest(handle)
    held = {e.name for e in manifest.entries if ".layers.2." not in e.name}  # all but the MTP layer
    assert set(changed(manifest, engine.weights())) == {e.name for e in manifest.entries} - held


def test_weights_damaged_on_their_way_poison_the_engine(engine):
    transport = ObjectStoreTransport(4096)
    handle = transport.publish(named_checkpoint_tensors(V3Model(CONFIG).init_weights(7)), version=1)
    bucket = ray.get(handle.buckets[3]).copy()
    bucket[100] ^= 1
    damaged = replace(handle, buckets=(*handle.buckets[:3], ray.put(bucket), *handle.buckets[4:]))
    with pytest.raises(CorruptWeights, match=r"model\.layers\.\d.* has fingerprint"):
        engine.update(transport.receive(damaged), version=1)
    with pytest.raises(EngineUnusable, match="damaged: model.layers"):
        engine.score([[1, 2]])
    engine.update(transport.receive(handle), version=2)
    assert engine.score([[1, 2]])[0][1] < 0
