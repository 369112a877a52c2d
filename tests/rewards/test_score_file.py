"""Scoring a file: order, sums, confusion against labels, groups, messages; and explaining one line."""

import json

import pytest

from rewards.load import RewardError
from rewards.score_file import explain, score_file

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
