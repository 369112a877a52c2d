"""A dump holds every group that was given to it, whatever its row and scores are made of, and gives it back."""

import json
import math
from datetime import date

import numpy as np

from rewards.score import Score
from rlzero.data import dump
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Rollout


def group(row: dict) -> Group:
    rollout = Rollout("0/a", 0, (1, 2), [3, 0], [-0.1, -0.25], [(0, 2)], "stop", "text")
    return Group(Prompt("a", "question", (1, 2), row), [rollout], [[Score(1.0, "correct", {"n": np.float32(3)}), None]])


def test_rows_of_any_values_are_written(tmp_path):
    row = {"tests": np.array(["a", "b"]), "n": np.int64(3), "day": date(2024, 1, 2), "raw": b"\xff", "odd": "\ud800"}
    row |= {7: 8}
    dump.save(tmp_path / "d.jsonl", [group(row)])
    (read,) = dump.load(tmp_path / "d.jsonl")
    plain = {"tests": ["a", "b"], "n": 3, "day": "2024-01-02", "raw": "/w==", "odd": "\ud800", "7": 8}
    assert read.prompt == Prompt("a", "question", (1, 2), plain)
    assert read.scores == [[Score(1.0, "correct", {"n": 3.0}), None]]


def test_a_group_is_in_the_file_when_it_is_given(tmp_path):
    with dump.writing(tmp_path / "d.jsonl") as write:
        write(group({"answer": "1"}))
        (read,) = dump.load(tmp_path / "d.jsonl")
    assert read.prompt.row == {"answer": "1"}


def test_an_error_reads_back_as_an_error_without_a_value(tmp_path):
    failed = group({})
    failed.scores = [[Score.error("no memory"), None]]
    dump.save(tmp_path / "d.jsonl", [failed])
    assert "NaN" not in (tmp_path / "d.jsonl").read_text()
    json.loads((tmp_path / "d.jsonl").read_text().splitlines()[1], parse_constant=lambda name: 1 / 0)
    (score, _), = dump.load(tmp_path / "d.jsonl")[0].scores
    assert score.verdict == "error" and math.isnan(score.value) and score.detail == "no memory"
