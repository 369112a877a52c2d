"""Hugging Face folders in BF16 and in DeepSeek's block-FP8: bytes, bounds, memory, and what errors say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.trainer.test_model_parity import TINY, packed, random_model, relative
from trainer.checkpoint import hf
from trainer.checkpoint.folder import Entry, FolderReader, FolderWriter
from trainer.model.v3 import V3Model
from trainer.model.v3_config import FP8_BLOCKS, V3Config

# Sides of one block, of several whole ones, and with a rest, as V3's 576 rows of kv_a_proj have.
ODD = dataclasses.replace(
    TINY, hidden_size=192, moe_intermediate_size=136, kv_lora_rank=150, q_lora_rank=20, num_nextn_predict_layers=2
)
# transformers 5.19 derives a block's size from the number of scales, which is 128 only where 128 divides the side (or
# one block holds it): it cannot dequantize V3's own kv_a_proj on a CPU.
WHOLE = dataclasses.replace(
    TINY, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=20, num_nextn_predict_layers=1
)
SHARD = 300_000


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "config.json"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """By safetensors alone."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """value · scale of its 128x128 block, block by block, float64."""
    result = values.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            result[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j].double()
    return result


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    hf.save_folder(random_model(ODD).to(torch.bfloat16), folder, shard_bytes=SHARD)
    return folder


@pytest.fixture(scope="module")
def fp8(bf16, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    hf.save_folder(hf.load_folder(bf16), folder, format="fp8", shard_bytes=SHARD)
    return folder


# ---- what is written ----


def test_a_bfloat16_round_trip_gives_the_same_bytes(bf16, tmp_path):
    hf.save_folder(hf.load_folder(bf16), tmp_path, shard_bytes=SHARD)
    assert len(files(bf16)) > 5
    assert files(tmp_path) == files(bf16)


def test_fp8_quantizes_what_deepseeks_release_quantizes(fp8):
    """Tensors of the release's layer 61 by name and type; the rest of the names repeat them."""
    types = {name: t.dtype for name, t in stored(fp8).items()}
    bf16, f32, f8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    layer = "model.layers.3"  # an MTP layer: all kinds of tensors but the dense MLP
    quantized = [f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    for mlp in ("mlp.experts.0", "mlp.experts.7", "mlp.shared_experts"):
        quantized += [f"{mlp}.{n}_proj" for n in ("gate", "up", "down")]
    plain = ["input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"]
    plain += ["mlp.gate", "embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"]
    expected = {f"{layer}.{n}.weight": f8 for n in quantized}
    expected |= {f"{layer}.{n}.weight_scale_inv": f32 for n in quantized}
    expected |= {f"{layer}.{n}.weight": bf16 for n in plain} | {f"{layer}.mlp.gate.e_score_correction_bias": f32}
    found = {n: t for n, t in types.items() if n.startswith(layer) and ".experts." not in n}
    assert found == {n: t for n, t in expected.items() if ".experts." not in n}
    assert all(types[n] == t for n, t in expected.items())
    assert types["model.layers.0.mlp.down_proj.weight"] == f8
    assert {types[f"{n}.weight"] for n in ("model.embed_tokens", "model.norm", "lm_head")} == {bf16}
    assert json.loads((fp8 / "config.json").read_text())["quantization_config"] == FP8_BLOCKS


def test_the_layout_of_the_published_model_is_that_of_its_release():
    """DeepSeek-V3 on the hub: 91,991 tensors, 688,574,839,360 bytes."""
    config = V3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, q_lora_rank=1536,
        first_k_dense_replace=3, n_group=8, topk_group=4, num_nextn_predict_layers=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = V3Model(config)
    entries = {entry.name: entry for entry in hf.layout(hf.named_checkpoint_tensors(model), "fp8")}
    assert entries["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert len(entries) == 91_991
    assert sum(entry.nbytes for entry in entries.values()) == 688_574_839_360


def test_every_tensor_starts_at_a_multiple_of_its_width_and_files_hold_nothing_else(fp8):
    for file in fp8.glob("*.safetensors"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + (size := int.from_bytes(raw[:8], "little"))])
        assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
        spans = sorted(entry["data_offsets"] for entry in header.values())
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and 8 + size + spans[-1][1] == len(raw)
        width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
        assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in header.values())


# ---- FP8 and back ----


def test_bfloat16_to_fp8_and_back_stays_within_half_a_step_of_e4m3(bf16, fp8, tmp_path):
    """|error| <= 2^-4 |w| (four significant bits), or half of 2^-9 scales for subnormals; BF16 adds 2^-8 |w|."""
    hf.convert_folder(fp8, tmp_path, "bf16")
    before, quantized, after = stored(bf16), stored(fp8), stored(tmp_path)
    assert before.keys() == after.keys()
    changed = 0
    for name, w in before.items():
        if (scales := quantized.get(f"{name}_scale_inv")) is None:
            assert torch.equal(w, after[name]), name
            continue
        step = dequantized(torch.ones(w.shape), scales) * 2.0**-10
        bound = torch.maximum(w.double().abs() * 2.0**-4, step) * (1 + 2.0**-8) + w.double().abs() * 2.0**-8
        assert ((after[name].double() - w.double()).abs() <= bound).all(), name
        changed += 1
    assert changed > 100


def test_fp8_weights_are_dequantized_by_their_block(fp8):
    quantized = stored(fp8)
    for name, values in dict(FolderReader(fp8)).items():
        if (scales := quantized.get(f"{name}_scale_inv")) is not None:
            expected = dequantized(quantized[name], scales)
            assert ((values.double() - expected).abs() <= expected.abs() * 2.0**-23).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_rule", ["largest is 448", "powers of two"])
def test_fp8_to_a_model_and_back_gives_the_same_bytes_where_scales_are_kept(fp8, tmp_path, dtype, scale_rule):
    """Also for scales that our rule does not make (DeepSeek-V3.1's are powers of two) and for blocks of zeros."""
    if scale_rule == "powers of two":
        source = tmp_path / "source"
        source.mkdir()
        tensors = stored(fp8)
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            tensors[name] = torch.exp2(tensors[name].log2().ceil())
            tensors[weight] = (tensors[weight].float() * 0.53).to(torch.float8_e4m3fn)  # largest: 240, as 448 * 0.53
        tensors["model.layers.0.mlp.down_proj.weight"][:128] = 0
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        (source / "config.json").write_text((fp8 / "config.json").read_text())
        fp8 = source
    hf.save_folder(
        hf.load_folder(fp8, dtype), tmp_path / "again", format="fp8", scales=FolderReader(fp8).scale, shard_bytes=SHARD
    )
    before, after = stored(fp8), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_without_kept_scales_codes_stay_and_scales_move_by_bfloat16s_rounding_once(fp8, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    hf.save_folder(hf.load_folder(fp8, torch.bfloat16), one, format="fp8", shard_bytes=SHARD)
    hf.save_folder(hf.load_folder(one, torch.bfloat16), two, format="fp8", shard_bytes=SHARD)
    moved = stored(one)
    for name, first in stored(fp8).items():
        again = moved[name]
        if name.endswith("_scale_inv"):
            assert ((again / first - 1).abs() <= 2.0**-8).all(), name
        else:
            assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)), name
    assert files(one) == files(two)


def test_a_scale_that_no_longer_fits_is_made_anew(fp8, tmp_path):
    """Training moved the block: neither saturated codes nor wasted bits."""
    model = hf.load_folder(fp8, torch.bfloat16)
    with torch.no_grad():
        model.layers[0].ffn.w2.weight[:128] *= 4
        model.layers[0].ffn.w2.weight[128:] /= 4
    hf.save_folder(model, tmp_path, format="fp8", scales=FolderReader(fp8).scale)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    ratio = stored(tmp_path)[name] / stored(fp8)[name]
    assert torch.allclose(ratio, torch.tensor([[4.0], [0.25]]), rtol=2.0**-7)


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp32"])
def test_a_folder_is_converted_as_a_model_is_saved(bf16, format, tmp_path):
    hf.save_folder(hf.load_folder(bf16), tmp_path / "model", format=format, shard_bytes=SHARD)
    hf.convert_folder(bf16, tmp_path / "folder", format, shard_bytes=SHARD)
    ours, theirs = (stored(tmp_path / name) for name in ("model", "folder"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t.view(torch.uint8), theirs[n].view(torch.uint8)) for n, t in ours.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "folder")]
    assert configs[0] == configs[1]


def test_an_fp8_folder_is_converted_to_fp8_without_touching_its_bytes(fp8, tmp_path):
    hf.convert_folder(fp8, tmp_path, "fp8")
    before, after = stored(fp8), stored(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(t.view(torch.uint8), after[n].view(torch.uint8)) for n, t in before.items())


def test_an_fp8_folder_gives_transformers_logits(tmp_path):
    """transformers dequantizes on a CPU; float32 both."""
    hf.save_folder(random_model(WHOLE), tmp_path, format="fp8", shard_bytes=SHARD)
    own = hf.load_folder(tmp_path, torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, positions, bounds = packed([12], TINY.vocab_size)
    with torch.no_grad():
        logits = own.logits(own(tokens, positions, bounds).hidden)
        assert relative(logits, twin(tokens[None]).logits[0]) <= 1e-5


# ---- memory ----


class PeakMemory:
    """Growth of the process's largest resident set since it was made (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")

    def bytes(self) -> int:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(field: str) -> int:
        (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field)]
        return int(line.split()[1]) * 1024


def test_loading_and_saving_hold_a_few_tensors_beside_the_model(tmp_path):
    """85 MB of weights in 40 shards. The largest tensor is 4 MB; the bound leaves room for three float32 copies of it
    and what an allocator keeps."""
    config = dataclasses.replace(
        TINY, vocab_size=8192, hidden_size=256, intermediate_size=4096, moe_intermediate_size=1024,
        num_hidden_layers=6, num_nextn_predict_layers=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = V3Model(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        for row in tensor.view(-1, tensor.shape[-1]).split(1024):
            row.copy_(torch.randn(row.shape, generator=generator))
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size > 80e6
    few = 32 << 20
    small = random_model(WHOLE)
    for format in ("bf16", "fp8"):  # code that is paged in once is no memory of a model's
        hf.save_folder(small, tmp_path / "small" / format, format=format)
    for format, folder in (("bf16", tmp_path / "bf16"), ("fp8", tmp_path / "fp8")):
        peak = PeakMemory()
        hf.save_folder(model, folder, format=format, shard_bytes=2 << 20)
        assert peak.bytes() < few, f"saving {format}"
    del model
    peak = PeakMemory()
    hf.convert_folder(tmp_path / "fp8", tmp_path / "back", "bf16", shard_bytes=2 << 20)
    assert peak.bytes() < few, "converting"
    for folder in ("bf16", "fp8"):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) >= 20
        peak = PeakMemory()
        loaded = hf.load_folder(tmp_path / folder, torch.bfloat16)
        assert peak.bytes() < size + few, f"loading {folder}"
        del loaded


# ---- what errors say ----


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_all_that_is_wrong_with_the_files_stands_in_one_error_and_no_weight_changed(fp8, tmp_path):
    folder = copied(fp8, tmp_path / "broken")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    gone, cut, edited = sorted(set(places.values()))[1:4]
    (folder / gone).unlink()
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-7])
    tensors = load_file(folder / edited)
    scales = sorted(n for n in tensors if n.endswith("_scale_inv") and places[n[:-10]] == edited)
    lacking, odd = scales[0].removesuffix("_scale_inv"), scales[1]
    del tensors[scales[0]]
    tensors[odd] = torch.ones(7, 3)
    tensors["model.layers.9.odd"] = torch.ones(1)
    tensors["model.layers.9.counts"] = torch.ones(2, dtype=torch.int64)
    save_file(tensors, folder / edited)
    model = random_model(ODD)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        hf.load_weights(model, folder)
    message = str(error.value)
    counted = {file: sum(place == file for place in places.values()) for file in (gone, cut)}
    for part in (
        f"missing file: {gone}; the index places {counted[gone]} tensors in it",
        f"damaged file: {cut}",
        f"the index places {counted[cut]} tensors in it",
        f"the index places {scales[0]} in {edited}, which does not hold it",
        f"{lacking} is FP8 without {scales[0]}: expected one scale per 128x128 block",
        f"{odd} is [7, 3], expected [",
        "dtype: model.layers.9.counts is torch.int64, expected a float",
        "unexpected: model.layers.9.odd [1]",
    ):
        assert part in message
    assert "missing: " not in message  # tensors of a lost file are not listed one by one
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_tensor_in_two_files_and_a_scale_of_nothing_are_named(bf16, tmp_path):
    folder = copied(bf16, tmp_path / "twice")
    (folder / "model.safetensors.index.json").unlink()  # without an index every file is read
    save_file(
        {"model.norm.weight": torch.ones(192), "model.norm.weight_scale_inv": torch.ones(1, 1)},
        folder / "model-99999-of-99999.safetensors",
    )
    reader = FolderReader(folder)
    assert len(reader.problems) == 2
    assert reader.problems[0].startswith("model.norm.weight stands in model-")
    assert reader.problems[1] == "model.norm.weight_scale_inv scales no FP8 weight"
    with pytest.raises(ValueError, match=r"is not complete \(2 mistakes\)"):
        next(iter(reader))


def test_files_beside_the_index_are_not_read(bf16, tmp_path):
    folder = copied(bf16, tmp_path / "more")
    save_file({"consolidated": torch.ones(1)}, folder / "consolidated.safetensors")
    assert "consolidated" not in FolderReader(folder).entries


def test_scales_may_stand_in_another_file_than_their_weights(fp8, tmp_path):
    tensors = stored(fp8)
    first = {n: t for n, t in tensors.items() if n.endswith("_scale_inv")}
    save_file(first, tmp_path / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in first}, tmp_path / "b.safetensors")
    ours, theirs = dict(FolderReader(tmp_path)), dict(FolderReader(fp8))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(bf16, tmp_path, text):
    folder = copied(bf16, tmp_path / "index")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged"):
        FolderReader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method is 'awq', this release reads 'fp8' only"),
        ({"weight_block_size": [1, 32]}, r"weight_block_size is \[1, 32\], this release reads \[128, 128\] only"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
    ],
)
def test_another_quantization_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        V3Config.from_hf({**TINY.to_hf(), "quantization_config": {**FP8_BLOCKS, **change}})


def test_a_writer_wants_what_was_announced_and_all_of_it(tmp_path):
    entries = [Entry("a", torch.bfloat16, (2, 3)), Entry("b", torch.float32, ())]
    with pytest.raises(ValueError, match=r"was not written whole \(1 mistake\):\n  missing: b"):
        with FolderWriter(tmp_path, entries, 1 << 20) as writer:
            writer.write("a", torch.ones(2, 3, dtype=torch.bfloat16))
            for name, tensor in (("a", torch.ones(2, 3)), ("a", torch.ones(3, 2).bfloat16()), ("c", torch.ones(1))):
                with pytest.raises(ValueError, match=f"found {name} .*, announced was"):
                    writer.write(name, tensor)
    with FolderWriter(tmp_path, entries, 1 << 20) as writer:
        writer.write("b", torch.tensor(3.5))  # in any order
        writer.write("a", torch.arange(6.0).view(3, 2).T.bfloat16())  # of any layout
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.get_tensor("b") == 3.5
        assert torch.equal(handle.get_tensor("a"), torch.arange(6.0).view(3, 2).T.bfloat16())
