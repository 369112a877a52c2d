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
from rlzero.plan import rates
from rlzero.plan.memory import kept_of_layer
from rlzero.plan.of_architecture import ModelConfig, Part, make_model_plan, parts_of, stage_memory, stages
from rlzero.plan.size import size_of_architecture
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
    found, folder_bytes = size_of_architecture(ModelConfig.load(V3).architecture)
    assert found.parameters == main == 671_026_404_352
    assert found.active == main - 58 * 248 * expert - table == 36_625_603_584
    assert found.mtp == moe + 2 * h * h + 3 * h == 11_610_067_968
    assert found.mtp_in_folder == found.mtp + 2 * table
    assert round(found.parameters / 1e9) == 671 and round(found.active / 1e9) == 37
    assert round((found.parameters + found.mtp_in_folder) / 1e9, 1) == 684.5
    assert folder_bytes["fp8"] == 688_574_839_360


def test_v3_is_built_on_the_meta_device_in_seconds():
    config = ModelConfig.load(V3).architecture
    began_s = time.process_time()
    with torch.device("meta"):
        model = V3Model(config)
    assert time.process_time() - began_s < 10
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352 + 11_610_067_968


def test_moonlight_has_its_published_parameters():
    """arXiv 2502.16982, table 3: 15.29 B and 2.24 B activated, both without embedding and head; 16 B with them."""
    found, _ = size_of_architecture(ModelConfig.load(MOONLIGHT).architecture)
    table = 163840 * 2048
    assert found.parameters == 15_960_108_544
    assert round((found.parameters - 2 * table) / 1e9, 2) == 15.29
    assert round((found.active - table) / 1e9, 2) == 2.24


def test_a_tied_model_counts_its_table_once_and_as_working(tmp_path):
    untied, _ = size_of_architecture(tiny(tmp_path / "a.yaml").architecture)
    tied, _ = size_of_architecture(tiny(tmp_path / "b.yaml", {"tie_word_embeddings": True}).architecture)
    assert untied.parameters - tied.parameters == 100 * 64 and untied.active == tied.active


# ---- memory ----


def states(config: ModelConfig) -> dict[str, int]:
    """Weights, masters, moments and gradients of the plan, by name."""
    parts = make_model_plan(config).memory.parts
    names = ("weights", "master weights", "optimizer moments", "gradients", "weights of this rank's experts")
    return {name.split(" (")[0]: value for name, value in parts.items() if name.split(" (")[0] in names}


def test_one_gpu_holds_everything(tmp_path):
    """At the fullest moment, in the head of a later micro-batch: FP32 sums of all gradients."""
    work = {"tokens_per_step": 4096 * 4, "tokens_per_micro_batch": 4096}
    config = tiny(tmp_path / "c.yaml", {"vocab_size": 100_000, "hidden_size": 128}, work=work)
    found, _ = size_of_architecture(config.architecture)
    n = found.parameters + found.mtp
    norm = 128 * 4  # the final norm's gradient is not counted
    assert states(config) == {
        "weights": 2 * n, "master weights": 2 * n, "optimizer moments": 4 * n, "gradients": 4 * n - norm
    }  # fmt: skip


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("reduce_each", [False, True])
def test_ranks_share_out_states_and_when_asked_gradients_and_weights(tmp_path, reshard, reduce_each):
    """Eight ranks, experts over 4: a rank has 2 of 8 experts of every layer, which 2 ranks have in common."""
    parallel = {"dp": 8, "ep": 4, "reshard": reshard, "reduce_each": reduce_each}
    config = tiny(tmp_path / "c.yaml", parallel=parallel)
    with torch.device("meta"):
        model = V3Model(config.architecture)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) // 4
    dense = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    shard = -(-dense // 8) - (-routed // 2)
    found = make_model_plan(config).memory.parts
    assert states(config) | {"gradients": 0} == {
        "master weights": 4 * shard, "optimizer moments": 4 * shard, "gradients": 0
    }  # fmt: skip
    assert found["gradients"] < 4 * (dense + routed) if reduce_each else found["gradients"] >= 3 * (dense + routed)
    everything = 2 * (dense + routed)
    assert found["weights gathered"] < 0.9 * everything if reshard else found["weights gathered"] > 0.99 * everything


def test_float32_needs_no_master(tmp_path):
    config = tiny(tmp_path / "c.yaml")
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": "float32"})})
    found, _ = size_of_architecture(config.architecture)
    assert "master weights" not in states(config) and states(config)["weights"] == 4 * (found.parameters + found.mtp)


def test_recomputing_keeps_less_and_full_keeps_the_layers_input(tmp_path):
    model = tiny(tmp_path / "c.yaml").architecture
    for fp8 in (False, True):
        kept = {kind: kept_of_layer(model, False, kind, fp8=fp8) for kind in ("none", "selective", "full")}
        assert kept["none"] > kept["selective"] > kept["full"] == 2 * 64
    assert kept_of_layer(model, False, "none", fp8=True) < kept_of_layer(model, False, "none")


def test_the_fullest_stage_is_the_one_that_counts(tmp_path):
    """The stages' weights add up to the model's, MTP's copy of the embedding beside them; the first stage keeps the
    activations of most micro-batches."""
    config = tiny(tmp_path / "c.yaml", parallel={"pp": 3})
    found, _ = size_of_architecture(config.architecture)
    parts = parts_of(config.architecture, found, 4096)
    memory = [stage_memory(config, stage, i) for i, stage in enumerate(stages(parts, 3, [1.0] * len(parts)))]
    assert sum(held.parts["weights (BF16)"] for held in memory) == 2 * (found.parameters + found.mtp + 100 * 64)
    assert make_model_plan(config).memory.peak == max(
        stage_memory(config, stage, i).peak
        for i, stage in enumerate(stages(parts, 3, [sum(p.forward_flop.values()) for p in parts]))
    )
    assert any("activations of 3 micro-batches" in name for name in memory[0].parts)


# ---- time ----


def test_stages_are_the_best_contiguous_ones():
    parts = [Part(str(i), {}) for i in range(7)]
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
        parallel={"dp": 2},
        work={
            "tokens_per_step": 8192, "tokens_per_micro_batch": 1024, "sequence_tokens": 512, "efficiency": 0.5
        },  # fmt: skip
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
    """2,048 H800: 180 K GPU hours per trillion tokens (report, section 1), where little is computed twice. The
    efficiency is assumed, so 15 %."""
    plan = make_model_plan(ModelConfig.load(V3, ["policy.activation_checkpointing=false"]))
    hours = plan.step_s * 2048 / 3600 / 62_914_560 * 1e12
    assert hours == pytest.approx(180e3, rel=0.15)
    assert 20 * 2**30 < make_model_plan(ModelConfig.load(V3)).memory.peak < 79 * 2**30


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
    for text in ("671,026,404,352", "36,625,603,584", "gradients", "GPU hours per trillion tokens", "Assumed"):
        assert text in out


def test_what_does_not_fit_is_printed_and_refused(monkeypatch, capsys):
    code, out, err = plan(monkeypatch, capsys, MOONLIGHT, "parallel.dp=1", "parallel.ep=1")
    assert code == 2 and "DOES NOT FIT" in out and "raise parallel.dp" in err


def test_contradictions_stand_in_one_error(tmp_path):
    with pytest.raises(ConfigError) as error:
        overrides = ["parallel.dp=96", "parallel.ep=96", "work.tokens_per_step=1000000", "work.sequence_tokens=8192"]
        ModelConfig.load(V3, overrides)
    text = str(error.value)
    assert "3 mistakes" in text and "96 ranks cannot share out 256" in text and "no multiple of 96 ranks" in text
    with pytest.raises(ConfigError, match="62 stages for 61 layers"):
        ModelConfig.load(V3, ["parallel.pp=62"])
    with pytest.raises(ConfigError, match="8 do not divide into n_group 3"):
        tiny(tmp_path / "c.yaml", {"n_group": 3})
