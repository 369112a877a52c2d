"""Plans of architectures: the published counts exactly, memory and time against arithmetic done another way."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
import yaml

from rlzero.cli import main
from rlzero.config.read import ConfigError
from rlzero.plan import model_plan, rates
from rlzero.plan.model_plan import ModelConfig, count_parameters, make_model_plan, stages
from trainer.model.v3 import V3Model

ROOT = Path(__file__).parents[2]
V3, MOONLIGHT = (ROOT / "configs" / name for name in ("v3-671b.yaml", "moonlight-16b.yaml"))
TINY = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def tiny(path: Path, init: dict | None = None, **sections) -> ModelConfig:
    tree = {"name": "tiny", "policy": {"init": {**TINY, **(init or {})}}, **sections}
    path.write_text(yaml.safe_dump(tree))
    return ModelConfig.load(path)


# ---- parameters ----


def test_v3_has_its_published_parameters():
    """Report, section 4.2: 671 B, 37 B active; README_WEIGHTS.md and the hub: 11.5 B unique of the MTP module's block,
    685 B with MTP and its copies, 688,574,839,360 bytes in FP8."""
    h, heads = 7168, 128
    attention = h * 1536 + 1536 * heads * 192 + h * 576 + 512 * heads * 256 + heads * 128 * h + 1536 + 512
    expert, norms = 3 * h * 2048, 2 * h
    moe = attention + norms + 257 * expert + 256 * h
    dense = attention + norms + 3 * h * 18432
    table = 129280 * h
    main = 58 * moe + 3 * dense + 2 * table + h
    found, _ = count_parameters(ModelConfig.load(V3).architecture)
    assert found.main == main == 671_026_404_352
    assert found.active == main - 58 * 248 * expert - table == 36_625_603_584
    assert found.mtp == moe + 2 * h * h + 3 * h == 11_610_067_968
    assert found.mtp_in_folder == found.mtp + 2 * table
    assert round(found.main / 1e9) == 671 and round(found.active / 1e9) == 37
    assert round((found.main + found.mtp_in_folder) / 1e9, 1) == 684.5
    assert found.folder_bytes["fp8"] == 688_574_839_360


def test_v3_is_built_on_the_meta_device_in_seconds():
    config = ModelConfig.load(V3).architecture
    began_s = time.process_time()
    with torch.device("meta"):
        model = V3Model(config)
    assert time.process_time() - began_s < 10
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352 + 11_610_067_968


def test_moonlight_has_its_published_parameters():
    """arXiv 2502.16982, table 3: 15.29 B and 2.24 B activated, both without embedding and head; 16 B with them."""
    found, _ = count_parameters(ModelConfig.load(MOONLIGHT).architecture)
    table = 163840 * 2048
    assert found.main == 15_960_108_544
    assert round((found.main - 2 * table) / 1e9, 2) == 15.29
    assert round((found.active - table) / 1e9, 2) == 2.24


def test_a_tied_model_counts_its_table_once_and_as_working(tmp_path):
    untied, _ = count_parameters(tiny(tmp_path / "a.yaml").architecture)
    tied, _ = count_parameters(tiny(tmp_path / "b.yaml", {"tie_word_embeddings": True}).architecture)
    assert untied.main - tied.main == 100 * 64 and untied.active == tied.active


# ---- memory ----


def sizes(memory: dict[str, int]) -> dict[str, int]:
    return {name.split(" (")[0]: value for name, value in memory.items() if "about" not in name}


def test_one_gpu_holds_everything(tmp_path):
    config = tiny(tmp_path / "c.yaml", work={"tokens_per_micro_batch": 4096})
    found, _ = count_parameters(config.architecture)
    n = found.main + found.mtp
    expected = {"weights": 2 * n, "master weights": 4 * n, "optimizer moments": 4 * n, "gradients": 4 * n}
    assert sizes(make_model_plan(config).memory) == expected


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_and_expert_groups_share_out_what_the_stages_say(tmp_path, zero):
    """Eight ranks, experts over 4: a rank has 2 of 8 experts of every layer, which 2 ranks have in common."""
    config = tiny(tmp_path / "c.yaml", placement={"gpus": 8, "experts": 4, "zero": zero, "recompute": "none"})
    with torch.device("meta"):
        model = V3Model(config.architecture)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) // 4
    dense = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)

    def held(since: int) -> int:
        return -(-dense // 8) - (-routed // 2) if zero >= since else dense + routed

    found = sizes(make_model_plan(config).memory)
    found.pop("weights gathered for two layers", None)
    assert found == {
        "weights": 2 * held(3), "master weights": 4 * held(1), "optimizer moments": 4 * held(1),
        "gradients": 4 * held(2),
    }  # fmt: skip


def test_float32_needs_no_master(tmp_path):
    config = tiny(tmp_path / "c.yaml")
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": "float32"})})
    memory = make_model_plan(config).memory
    n = memory["gradients (FP32)"]
    assert memory["master weights (FP32)"] == 0 and memory["weights (FP32)"] == n


def test_recomputing_keeps_less_and_full_keeps_the_layers_input(tmp_path):
    kept = {}
    for recompute in ("none", "selective", "full"):
        config = tiny(tmp_path / "c.yaml", placement={"recompute": recompute})
        kept[recompute] = model_plan.kept_bytes(config, dense=False)
    assert kept["none"] > kept["selective"] > kept["full"] == 2 * 64


def test_the_fullest_stage_is_the_one_that_counts(tmp_path):
    """With ZeRO-0 the stages' weights add up to the model's, MTP's copy of the embedding beside them."""
    config = tiny(tmp_path / "c.yaml", placement={"gpus": 3, "pipeline": 3, "zero": 0})
    _, parts = count_parameters(config.architecture)
    cut = stages(parts, 3, [1.0] * len(parts))
    memory = [model_plan._memory(config, stage, i) for i, stage in enumerate(cut)]
    found, _ = count_parameters(config.architecture)
    assert sum(m["weights (BF16)"] for m in memory) == 2 * (found.main + found.mtp + 100 * 64)


# ---- time ----


def test_stages_are_the_best_contiguous_ones():
    parts = [model_plan.Part(str(i)) for i in range(7)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cost = torch.rand(7, generator=generator).tolist()
        cut = stages(parts, 3, cost)
        assert [part.name for stage in cut for part in stage] == [part.name for part in parts] and all(cut)
        best = min(
            max(sum(cost[:a]), sum(cost[a:b]), sum(cost[b:])) for a, b in itertools.combinations(range(1, 7), 2)
        )
        assert max(sum(cost[int(part.name)] for part in stage) for stage in cut) == pytest.approx(best)


def test_the_time_of_a_step_is_flop_over_rates(tmp_path):
    config = tiny(
        tmp_path / "c.yaml",
        placement={"gpus": 2, "recompute": "none", "efficiency": 0.5},
        work={"tokens_per_step": 8192, "tokens_per_micro_batch": 1024, "document_tokens": 512},
    )
    h, wide, heads = 64, 32, 2
    attention = h * heads * 12 + h * 20 + 16 * heads * 16 + heads * 8 * h
    linear = 5 * attention + 3 * h * 96 + 4 * 3 * h * wide + 2 * h * h  # 5 layers with MTP's, 4 shared experts, eh_proj
    grouped, head = 4 * 2 * 3 * h * wide, 2 * 100 * h
    scores = 5 * 512 / 2 * heads * (12 + 8)
    forward_s = 2 * linear / 728e12 + 2 * grouped / 722e12 + 2 * head / 728e12 + 2 * scores / 541e12
    backward_s = 4 * linear / 728e12 + 2 * grouped * (1 / 665e12 + 1 / 671e12) + 4 * head / 728e12 + 5 * scores / 391e12
    plan = make_model_plan(config)
    assert plan.step_s == pytest.approx(4 * 1024 * (forward_s + backward_s) / 0.5, rel=1e-6)
    assert plan.model_flop == pytest.approx(8192 * 6 * (linear + grouped + head + scores), rel=1e-6)
    assert plan.bubble == 0


def test_v3_on_its_own_placement_fits_and_takes_about_what_deepseek_published():
    """2,048 H800: 180 K GPU hours per trillion tokens (report, section 1). The efficiency is assumed, so 15 %."""
    plan = make_model_plan(ModelConfig.load(V3))
    hours = plan.step_s * 2048 / 3600 / 62_914_560 * 1e12
    assert hours == pytest.approx(180e3, rel=0.15)
    assert 40 * 2**30 < sum(plan.memory.values()) < 79 * 2**30


def test_every_rate_is_below_its_hardware_peak():
    for table, peak in ((rates.LINEAR, 1), (rates.GROUPED, 1)):
        for recipe, rate in table.items():
            limit = rates.H100_BF16_FLOPS * peak * (2 if recipe == "fp8" else 1)
            assert all(0.3 * limit < r < limit for r in (rate.forward, rate.dgrad, rate.wgrad))


# ---- the command ----


def plan(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["rlzero", "plan", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_prints_counts_memory_and_time(monkeypatch, capsys):
    code, out, err = plan(monkeypatch, capsys, V3)
    assert code == 0, err
    for text in ("671,026,404,352", "36,625,603,584", "gradients (FP32)", "GPU hours per trillion tokens", "Assumed"):
        assert text in out


def test_what_does_not_fit_is_printed_and_refused(monkeypatch, capsys):
    code, out, err = plan(monkeypatch, capsys, MOONLIGHT, "placement.gpus=1", "placement.experts=1")
    assert code == 2 and "DOES NOT FIT" in out and "raise placement.gpus" in err


def test_contradictions_stand_in_one_error(tmp_path):
    with pytest.raises(ConfigError) as error:
        ModelConfig.load(V3, ["placement.experts=96", "work.tokens_per_step=1000000", "work.document_tokens=8192"])
    text = str(error.value)
    assert "3 mistakes" in text and "groups of 96" in text and "no multiple of 128 ranks" in text
    with pytest.raises(ConfigError, match="do not divide into 16 pipeline stages"):
        ModelConfig.load(V3, ["placement.gpus=1000"])
    with pytest.raises(ConfigError, match="8 do not divide into n_group 3"):
        tiny(tmp_path / "c.yaml", {"n_group": 3})
