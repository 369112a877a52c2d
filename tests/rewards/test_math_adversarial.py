"""The math reward cannot be fooled by the cases of math_cases.py, and is not so strict that honest answers lose."""

import importlib.util
import json
from pathlib import Path

import pytest

from rewards.math import math_reward

_spec = importlib.util.spec_from_file_location("math_cases", Path(__file__).with_name("math_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def test_the_suite_is_as_large_as_promised():
    assert sum(map(len, cases.DECEITS.values())) >= 150


@pytest.mark.parametrize("family", cases.DECEITS)
def test_no_deceit_is_rewarded(family):
    fooled = [(c, g) for c, g in cases.DECEITS[family] if math_reward(c, g).value != 0]
    assert fooled == []


@pytest.mark.parametrize("family", ["stuffing", "near misses", "containers", "bases", "no number", "context and shape"])
def test_no_deceit_is_rewarded_inside_the_answer_tag_of_the_template(family):
    fooled = []
    for completion, gold in cases.DECEITS[family]:
        for text in (f"a</think><answer>{completion}</answer>", f"a</think>\n<answer>\n$${completion}$$\n</answer>"):
            if math_reward(text, gold).value != 0:
                fooled.append((text, gold))
    assert fooled == []


def test_honest_answers_are_rewarded():
    lost = [(c, g, s.detail) for c, g in cases.HONEST if (s := math_reward(c, g)).value != 1]
    assert lost == []


def _rewarded(row):
    said = row["answer"] if row["kind"] == "response" else f"\\boxed{{{row['answer']}}}"
    return math_reward(said, row["gold"]).value == 1


def test_answers_that_users_and_attackers_brought_get_the_right_value():
    rows = [json.loads(line) for line in Path(__file__).with_name("answer_cases.jsonl").read_text().splitlines()]
    assert [row for row in rows if _rewarded(row) != row["expected"]] == []
