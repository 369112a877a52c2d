"""What the docs show is what the program takes: every YAML block loads, and the reference is the models'."""

import re
from pathlib import Path

import pytest
import yaml

from rlzero.config.reference import reference
from rlzero.config.rl import Config
from rlzero.config.sft import SftConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]
RUN = {"policy": {"path": "base"}, "data": {"train": "countdown"}, "rewards": [{"fn": "rewards.math:math_reward"}]}
TUNING = {"policy": {"path": "base"}, "data": {"train": "rows.jsonl"}, "rows_per_step": 4}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_yaml_block_is_a_config_or_a_part_of_one(block):
    part = yaml.safe_load(block)
    part = {"rewards": part} if isinstance(part, list) else part
    model, whole = (Config, RUN) if set(part) <= set(Config.model_fields) else (SftConfig, TUNING)
    if model is SftConfig and "tokens_per_step" in part:
        whole = {**TUNING, "rows_per_step": None}
    tree = {**whole, **{k: {**whole[k], **v} if isinstance(whole.get(k), dict) else v for k, v in part.items()}}
    model.load(tree)


def test_the_reference_of_all_fields_is_what_the_models_say():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m rlzero.config.reference > docs/config.md`"


def test_the_shipped_run_of_r1_zero_takes_the_columns_that_its_comment_names(tmp_path):
    config = Config.load(ROOT / "configs" / "r1-zero.yaml")
    assert "columns `question` and `answer`" in (ROOT / "configs" / "r1-zero.yaml").read_text()
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "answer")
