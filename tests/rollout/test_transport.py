"""Every transport delivers the bits that were sent, or names the tensor that it did not."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import ray
import torch

from rollout.torch.engine import EngineUnusable, TorchEngine
from rollout.transport.base import CorruptWeights, at_hand
from rollout.transport.buckets import BucketViews
from rollout.transport.checksum import checksum
from rollout.transport.transports import Transport, receive
from tests.rollout.sending import delivered, sending
from trainer.checkpoint.hf import named_checkpoint_tensors, save_folder
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(params=["ipc", "ipc in small buckets", "nccl", "nccl in small buckets"])
def sender(request):
    sender = Transport(request.param.split()[0], (1,)).sender(0, torch.device("cpu"), "127.0.0.1")
    sender.timeout_s = 60.0
    if "small" in request.param:
        sender.bucket_bytes = 1024
    yield sender
    sender.close()


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


def test_a_round_trip_keeps_every_bit(sender):
    sent = tensors()
    found = delivered(sender, sent.items(), lambda update: {n: t.clone() for n, t in receive(update, {})}, version=3)
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_updates_reach_another_process(sender):
    @ray.remote
    def checksums(update):
        return {name: checksum(tensor) for name, tensor in receive(update, {})}

    found = delivered(sender, tensors().items(), lambda update: ray.get(checksums.remote(update)))
    assert found == {name: checksum(tensor) for name, tensor in tensors().items()}


def test_tensors_at_hand_are_described_as_those_that_arrive():
    weights = at_hand(tensors().items())
    weights.start()
    assert [(name, checksum(tensor)) for name, tensor in weights] == [(s.name, s.checksum) for s in weights.sent]
    assert [spec[:3] for spec in weights.sent] == [spec[:3] for spec in weights.specs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_single_changed_element_changes_the_checksum(dtype):
    tensor = torch.arange(300).to(dtype)
    original = checksum(tensor)
    seen = {original}
    for i in range(300):
        other = tensor.clone()
        other[i] = other[i] + 1 if dtype != torch.bfloat16 else other[i] * 2 + 1
        seen.add(checksum(other))
    assert len(seen) == 301
    assert checksum(tensor.flip(0)) != original and checksum(tensor[:-1]) != original


def test_checksums_do_not_depend_on_layout_in_memory():
    matrix = torch.randn(20, 30)
    padded = torch.cat([torch.zeros(1), matrix.flatten()])[1:].view(20, 30)
    assert checksum(padded) == checksum(matrix) == checksum(matrix.T.contiguous().T)


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


def test_sent_weights_make_the_engine_agree_with_the_trainer(sender, engine):
    model, tokens = V3Model(CONFIG).init_weights(7), [5, 9, 33, 2, 60, 17, 17, 8]
    assert np.abs(engine.score([tokens])[0][1:] - trainer_logprobs(model, tokens)).mean() > 1e-2
    sent = dict(named_checkpoint_tensors(model))
    delivered(sender, sent.items(), lambda update: engine.update(update, version=1))
    assert engine.version == 1
    assert np.abs(engine.score([tokens])[0][1:] - trainer_logprobs(model, tokens)).max() < 1e-5
    held = {name: checksum(tensor) for name, tensor in engine.weights()}
    assert held == {n: checksum(t) for n, t in sent.items() if ".layers.2." not in n}  # all but the MTP layer


def test_weights_damaged_on_their_way_poison_the_engine_until_whole_ones_arrive(sender, engine, monkeypatch):
    sent, honest = list(named_checkpoint_tensors(V3Model(CONFIG).init_weights(7))), BucketViews.checksums

    def damaging(views, bucket, out=None):
        found = honest(views, bucket, out)
        if threading.current_thread() is not threading.main_thread():  # at the sender's end
            views.buffer[100] ^= 1
        return found

    monkeypatch.setattr(BucketViews, "checksums", damaging)
    with sending(sender, sent) as (update, _), pytest.raises(CorruptWeights, match=r"model\..* has checksum"):
        engine.update(update, version=1)
    monkeypatch.undo()
    with pytest.raises(EngineUnusable, match="damaged: model"):
        engine.score([[1, 2]])
    delivered(sender, sent, lambda update: engine.update(update, version=2), version=2)
    assert engine.version == 2 and engine.score([[1, 2]])[0][1] < 0
