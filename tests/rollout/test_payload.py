"""Block-FP8 as weights travel: what the trainer's FP8 export holds, byte for byte, on every way to an engine."""

import numpy as np
import pytest
import torch

from rollout.torch.decode_v3 import V3Decoder
from rollout.transport.base import layout_of
from rollout.transport.buckets import buckets_of
from rollout.transport.expected_weights import ExpectedWeights
from rollout.transport.ipc import IpcReceiver, IpcSender
from rollout.transport.nccl import NcclReceiver, NcclSender
from rollout.transport.payload import engine_payload, put, travelling
from tests.rollout.sending import delivered, received
from trainer.checkpoint.folder import FolderReader
from trainer.checkpoint.hf import convert_folder, named_checkpoint_tensors, save_folder
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config
from trainer.precision.quantize import Quantized, quantize_blocks

pytestmark = pytest.mark.timeout(120)

CONFIG = V3Config(
    vocab_size=61, hidden_size=160, intermediate_size=144, moe_intermediate_size=136, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=40, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, eos_token_id=1, max_position_embeddings=64,
    initializer_range=0.05,
)  # fmt: skip
SMALL = 20_000  # bytes a bucket
TOKENS = np.array([5, 9, 33, 2, 60, 17, 17, 8])


@pytest.fixture
def model():
    return V3Model(CONFIG).init_weights(3).to(torch.bfloat16)


@pytest.fixture
def exported(model, tmp_path):
    """The same weights as folders in BF16 and in block-FP8."""
    save_folder(model, tmp_path / "bf16")
    save_folder(model, tmp_path / "fp8", format="fp8")
    return tmp_path


def sent(kind: str, model) -> list:
    """(name, tensor) as an engine receives them."""
    ends = {"ipc": (IpcSender, IpcReceiver), "nccl": (NcclSender, NcclReceiver)}[kind]
    sender = ends[0](torch.device("cpu"), payload="fp8", bucket_bytes=SMALL, timeout_s=20.0)
    receiver = ends[1](timeout_s=20.0)
    return list(delivered(sender, named_checkpoint_tensors(model), lambda update: received(receiver, update)).items())


def dequantized(weights: list):
    """What arrived, FP8 weights by their scales."""
    known = dict(weights)
    for name, tensor in weights:
        if not name.endswith("_scale_inv"):
            scales = known.get(f"{name}_scale_inv")
            yield name, tensor if scales is None else Quantized(tensor, scales).dequantize()


def logprobs(weights) -> torch.Tensor:
    decoder = V3Decoder(CONFIG, dtype=torch.float32, device="cpu")
    decoder.load(weights)
    return decoder.logits([TOKENS]).double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_what_arrives_is_the_fp8_export_byte_for_byte(kind, model, exported):
    stored = {entry.name: tensor for entry, tensor in FolderReader(exported / "fp8").stored()}
    found = sent(kind, model)
    assert {name for name, _ in found} == set(stored)
    for name, tensor in found:
        assert tensor.dtype == stored[name].dtype and tensor.shape == stored[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name


def test_exactly_what_deepseek_quantizes_is_quantized(model):
    kinds = {name: tensor.dtype for name, tensor in sent("ipc", model)}
    moe = "model.layers.1.mlp"
    assert kinds[f"{moe}.experts.3.gate_proj.weight"] == kinds[f"{moe}.experts.0.up_proj.weight"] == torch.float8_e4m3fn
    assert kinds["model.layers.0.self_attn.kv_b_proj.weight"] == torch.float8_e4m3fn
    assert kinds[f"{moe}.gate.weight"] == kinds["lm_head.weight"] == kinds["model.norm.weight"] == torch.bfloat16
    assert kinds[f"{moe}.gate.e_score_correction_bias"] == torch.float32
    scaled = {name.removesuffix("_scale_inv") for name in kinds if name.endswith("_scale_inv")}
    assert scaled == {name for name, dtype in kinds.items() if dtype == torch.float8_e4m3fn}


def test_half_the_bytes_travel(model):
    layout = layout_of(named_checkpoint_tensors(model))
    whole, half = (sum(spec.nbytes for spec in travelling(layout, payload)) for payload in (None, "fp8"))
    quantized = sum(np.prod(shape) for name, shape, _ in layout if "_proj" in name)
    assert whole - half == pytest.approx(quantized, rel=0.01)  # a byte each, but for the scales


def test_a_weight_and_its_scales_share_a_bucket(model):
    for bucket in buckets_of(travelling(layout_of(named_checkpoint_tensors(model)), "fp8"), SMALL):
        for group in bucket.groups:
            assert len(group) == (2 if group[0].dtype == "float8_e4m3fn" else 1)


@pytest.mark.parametrize("family", ["self_attn", "mlp.experts", "shared_experts", "layers.0.mlp", "gate.weight", "."])
def test_a_model_on_the_weights_that_arrived_is_the_trainers_rounded_to_fp8(family, model, exported):
    """Weights of one kind perturbed: what the decoder computes moves with them, and is what the export computes."""
    before = logprobs(FolderReader(exported / "fp8"))
    torch.manual_seed(len(family))
    for name, tensor in named_checkpoint_tensors(model):
        if family in name and tensor.ndim == 2:
            tensor += (0.05 * torch.randn(tensor.shape)).to(tensor.dtype)
    arrived = logprobs(dequantized(sent("ipc", model)))
    save_folder(model, exported / "after", format="fp8")
    assert torch.equal(arrived, logprobs(FolderReader(exported / "after")))
    rounding = (arrived - logprobs(named_checkpoint_tensors(model))).abs().mean()
    moved = (arrived - before).abs().mean()
    assert 0 < rounding < 0.15 and moved > 0.1, (rounding, moved)


def test_an_fp8_engine_expects_the_scales_whether_its_folder_has_them_or_not(model, exported):
    asked, stored = (ExpectedWeights(exported / kind, "fp8") for kind in ("bf16", "fp8"))
    entries = FolderReader(exported / "fp8").entries
    assert asked.shapes == stored.shapes == {name: entry.shape for name, entry in entries.items()}
    assert asked.needed == set(asked.shapes)
    assert len(list(asked.checked(sent("ipc", model)))) == len(asked.shapes)
    with pytest.raises(ValueError, match="weight_scale_inv"):  # what verl #7519 left in BF16 without a word
        list(asked.checked(named_checkpoint_tensors(model)))


def test_the_payload_follows_from_what_the_engine_holds(exported, tmp_path):
    convert_folder(exported / "bf16", tmp_path / "again", "fp8")
    assert engine_payload(exported / "bf16", {}) is None
    assert engine_payload(exported / "bf16", {"quantization": "fp8"}) == "fp8"
    assert engine_payload(tmp_path / "again", {}) == "fp8"
    with pytest.raises(ValueError, match="quantization awq.*in BF16 or in FP8 with blocks of 128x128"):
        engine_payload(exported / "bf16", {"quantization": "awq"})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_quantizes_as_a_cpu_does(dtype):
    torch.manual_seed(0)
    shapes = [(1344, 1536), (300, 200), (128, 128), (5, 576), (4096, 512)]
    weights = [torch.randn(shape).to(dtype) * 10.0 ** (3 * i - 6) for i, shape in enumerate(shapes)]
    expected = [quantize_blocks(weight) for weight in weights]
    places = [(torch.zeros_like(q.values).cuda(), torch.zeros_like(q.scales).cuda()) for q in expected]
    put([weight.cuda() for weight in weights], places)
    for quantized, (values, scales) in zip(expected, places, strict=True):
        assert torch.equal(values.cpu().view(torch.uint8), quantized.values.view(torch.uint8))
        assert torch.equal(scales.cpu(), quantized.scales)
