"""The pages of docs/: every metric is explained, every YAML block is a config, every link leads somewhere."""

import re
from pathlib import Path

import pytest
import yaml

from rlzero.config.read import ConfigError
from rlzero.config.rl import Config
from rlzero.config.sft import SftConfig
from rlzero.report.log import read_lines

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# What a block leaves out: a run's or a fine-tuning's least.
RL = {"policy": {"path": "base"}, "data": {"train": "rows.jsonl"}, "rewards": [{"fn": "rewards.math:math_reward"}]}
SFT = {"policy": {"path": "base"}, "data": {"train": "rows.jsonl"}, "rows_per_step": 8}
BLOCKS = [
    pytest.param(yaml.safe_load(text), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S))
]


def explained(page: Path) -> re.Pattern:
    """A pattern for the names in the first column of a page's tables; `<n>` is a number, `<name>` anything."""
    cells = [line.split("|")[1] for line in page.read_text().split("\n") if line.startswith("| `")]
    names = [re.escape(name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    wild = {"<n>": r"\d+", "<name>": r"\w+", "<metric>": ".+"}
    return re.compile("|".join(re.sub("<.*?>", lambda found: wild[found[0]], name) for name in names))


def test_every_name_that_runs_write_stands_in_the_page_of_metrics(finished):
    known = explained(ROOT / "docs" / "metrics.md")
    lines = [line for file in ("metrics.jsonl", "evals.jsonl") for line in read_lines(finished / file)]
    written = {name for line in lines for name in line}
    assert len(written) > 50 and [name for name in sorted(written) if not known.fullmatch(name)] == []


@pytest.mark.parametrize("fields", BLOCKS)
def test_a_yaml_block_is_part_of_a_config(fields):
    fields = {"rewards": fields} if isinstance(fields, list) else fields

    def over(base: dict) -> dict:
        return {key: {**base.get(key, {}), **fields[key]} if isinstance(fields.get(key), dict) else
                fields.get(key, base.get(key)) for key in {**base, **fields}}  # fmt: skip

    try:
        Config.load(over(RL))
    except ConfigError:
        SftConfig.model_validate(over(SFT))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_and_named_pages_are_there(page):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [name for name in re.findall(r"`((?:docs|configs|rlzero|rewards|rollout|trainer)/[\w./-]+\.\w+)`", text)
                if not (ROOT / name).exists()]  # fmt: skip
    assert missing == []
