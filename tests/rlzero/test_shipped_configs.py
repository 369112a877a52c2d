"""Every config that is shipped loads, and the demo's model, data and rewards are there."""

from pathlib import Path

import pytest
import yaml

from rlzero.config.rl import Config
from rlzero.config.sft import SftConfig
from rlzero.data.prompts import load_prompts, load_tokenizer
from rlzero.examples.countdown.pretrain import BaseConfig
from rlzero.launch import check_rewards

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
BASES = [path for path in FILES if "init" in yaml.safe_load(path.read_text())]
RUNS = [path for path in FILES if "rewards" in yaml.safe_load(path.read_text())]
TUNINGS = [path for path in FILES if "epochs" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_loads_and_its_resolved_text_is_the_same_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = Config.load(path)
    check_rewards(config)
    again = tmp_path / "again.yaml"
    again.write_text(config.resolved_yaml())
    assert Config.load(again) == config


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_a_base_recipe_loads(path):
    assert BaseConfig.load(path).steps > 0


@pytest.mark.parametrize("path", TUNINGS, ids=lambda path: path.stem)
def test_a_fine_tuning_loads_and_its_resolved_text_is_the_same_run(path, tmp_path):
    config = SftConfig.load(path)
    again = tmp_path / "again.yaml"
    again.write_text(config.resolved_yaml())
    assert SftConfig.load(again) == config


def test_the_demo_finds_its_model_and_both_of_its_data_sets(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = Config.load(ROOT / "configs" / "demo.yaml")
    tokenizer = load_tokenizer(config.policy.path)
    train, held_out = (load_prompts(config, tokenizer, split) for split in ("train", "evaluation"))
    assert len(train) >= config.batch.prompts and len(held_out) >= 50
    assert not {p.row["prompt"] for p in train} & {p.row["prompt"] for p in held_out}
