"""Scoring a file: order, sums, confusion against labels, groups, messages; and explaining one line."""

import json

import pytest
from typer.testing import CliRunner

from rewards.load import RewardError
from rewards.score import Score
from rewards.score_file import explain, score_file
from rlzero.cli import app
from rlzero.config.rl import Reward
from rlzero.data import dump
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout

MATH = "rewards.math:math_reward"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_verdicts_in_order_with_sum_and_confusion(tmp_path):
    rows = [{"completion": f"\\boxed{{{i % 7}}}", "answer": "3", "label": i % 7 == 3 or i == 5} for i in range(70)]
    path = write(tmp_path / "in.jsonl", rows)
    seen = []
    summary = score_file(
        path,
        [MATH, {"fn": "rewards.format:format_reward", "weight": 0.5}],
        tmp_path / "out.jsonl",
        workers=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["line"] for line in out] == list(range(1, 71))
    assert [line["reward"] for line in out] == [float(i % 7 == 3) for i in range(70)]
    assert summary.rewards[0].verdicts["correct"] == 10 and summary.rewards[0].verdicts["wrong"] == 60
    assert summary.rewards[0].confusion == {
        "right_correct": 10,
        "right_missed": 1,
        "wrong_rewarded": 0,
        "wrong_refused": 59,
    }
    assert seen[-1] == (70, 70)
    assert "false positives" in str(summary) and summary.to_json()["completions"] == 70


def test_a_list_of_completions_is_a_group(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"completion": ["aaaa", "aa", "a"]}, {"completion": ["b"]}])
    score_file(path, ["rewards.length:length_reward"], tmp_path / "out.jsonl", workers=1)
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [round(sample["reward"], 3) for sample in first["samples"]] == [-0.5, 0.167, 0.5]
    assert [sample["reward"] for sample in second["samples"]] == [0.0]


def test_lines_of_one_prompt_are_put_together_by_a_column(tmp_path):
    rows = [{"id": i, "completion": text} for i, text in ((1, "aaaa"), (2, "b"), (1, "aa"), (1, "a"))]
    path = write(tmp_path / "in.jsonl", rows)
    summary = score_file(path, ["rewards.length:length_reward"], tmp_path / "out.jsonl", workers=1, group="id")
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [round(sample["reward"], 3) for sample in first["samples"]] == [-0.5, 0.167, 0.5] and second["line"] == 2
    assert summary.notes == []
    assert "--group COLUMN" in str(score_file(path, ["rewards.length:length_reward"], workers=1))
    with pytest.raises(RewardError, match="line 1: no column 'prompt_id' to group by"):
        score_file(path, [MATH], workers=1, group="prompt_id")


def test_a_dump_is_read_as_the_groups_it_holds(tmp_path):
    prompt = Prompt("p", "1+2?", (1,), {"answer": "3"})
    rollouts = [Rollout("p", i, (1,), [2], [0.0], [(0, 1)], "stop", rf"\boxed{{{i}}}") for i in (3, 4)]
    scores = [[Score(0.0, "wrong")], [Score(0.0, "wrong")]]
    dump.save(tmp_path / "dump.jsonl", [Group(prompt, rollouts, scores)], (Reward(fn=MATH),))
    summary = score_file(tmp_path / "dump.jsonl", [MATH], tmp_path / "out.jsonl", workers=1)
    assert summary.rewards[0].verdicts["correct"] == summary.rewards[0].verdicts["wrong"] == 1
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["samples"]) == 2


def test_the_command_takes_entries_of_a_config_and_fails_when_all_checks_fail(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(completion, limit=1): return float(len(completion) <= limit)\ndef g(completion): return 1 / 0\n"
    )
    path = write(tmp_path / "in.jsonl", [{"completion": "aaa"}])

    def score(*rewards):
        options = [part for reward in rewards for part in ("--reward", reward)]
        return CliRunner().invoke(app, ["score", str(path), "--workers", "1", *options])

    done = score(f"{{fn: {tmp_path}/mine.py:f, timeout_s: 9, params: {{limit: 3}}}}")
    assert done.exit_code == 0 and "mean 1.0000" in done.output
    failed = score(f"{tmp_path}/mine.py:f", f"{tmp_path}/mine.py:g")
    assert failed.exit_code == 1 and "ZeroDivisionError" in failed.output and "handler.py" not in failed.output


def test_an_error_is_counted_and_is_no_reward(tmp_path):
    path = write(
        tmp_path / "in.jsonl", [{"completion": "\\boxed{1}", "answer": ""}, {"completion": "\\boxed{1}", "answer": "1"}]
    )
    summary = score_file(path, [MATH], tmp_path / "out.jsonl", workers=1)
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["reward"] is None and first["scores"][0]["value"] is None and second["reward"] == 1.0
    assert summary.rewards[0].verdicts["error"] == 1 and summary.rewards[0].mean_value == 1.0
    assert "the gold answer is empty" in str(summary)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1: not JSON"),
        ('{"text": "x"}', "no column 'completion'"),
        ('{"completion": 3}', "a text or a list"),
        ('{"completion": "x", "label": "maybe"}', "label 'maybe'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "in.jsonl").write_text(text + "\n")
    with pytest.raises(RewardError, match=message):
        score_file(tmp_path / "in.jsonl", [MATH], workers=1)


def test_explain_shows_extraction_normalisation_and_rule(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"completion": "</think>\\boxed{\\dfrac12}", "answer": "0.5"}])
    text = explain(path, MATH, 1)
    for part in ("the last \\boxed{}", "\\dfrac12", "\\frac{1}{2}", "exact rational", "1 (correct)"):
        assert part in text
    with pytest.raises(RewardError, match="no line 9"):
        explain(path, MATH, 9)
