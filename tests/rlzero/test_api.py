"""The stable surface for scripts and notebooks: a run, an evaluation, a score."""

import asyncio
import subprocess
import sys

import pytest
import yaml

from rlzero import evaluate, score, train
from rlzero.config.read import ConfigError


def test_importing_the_package_alone_is_light():
    code = "import sys, rlzero; print([m for m in ('torch', 'ray', 'pydantic', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_score_by_address_by_entry_and_by_function():
    assert score(r"\boxed{\frac{1}{2}}", "rewards.math:math_reward", answer="0.5").value == 1.0
    entry = {"fn": "rewards.math:math_reward", "params": {"boxed": "required"}}
    assert [s.verdict for s in score([r"\boxed{7}", "7"], entry, answer="7")] == ["correct", "unparsed"]

    def shorter(completions: list[str], limit: int) -> list[float]:
        return [float(len(text) < limit) for text in completions]

    assert [s.value for s in score(["a", "abcd"], shorter, limit=3)] == [1.0, 0.0]


def test_a_run_and_an_evaluation_of_it_inside_a_running_loop_as_in_a_notebook(local_ray, write_config, tmp_path):
    fields = yaml.safe_load(write_config(tmp_path).read_text())

    async def notebook():
        return train(fields, "steps=1", "checkpoint.every=0"), evaluate(fields, policy=tmp_path / "runs" / "tiny")

    summary, figures = asyncio.run(notebook())
    assert summary["steps"] == 1 and (tmp_path / "runs" / "tiny" / "report.html").is_file()
    assert figures["pass_at_1"] == summary["pass_at_1_after"] and figures["n"] == 2


def test_mistakes_in_fields_are_listed_as_those_of_a_file(write_config, tmp_path):
    fields = yaml.safe_load(write_config(tmp_path).read_text())
    with pytest.raises(ConfigError, match=r"config: 1 mistake\n  - stepz: unknown key; did you mean steps"):
        train({**fields, "stepz": 3})
