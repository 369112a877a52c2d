"""Copies of evaluation questions planted in other text are found, and other problems are not."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from rlzero.eval.contamination import Questions, words_of

DATA = Path(__file__).parents[3] / "shared" / "data"
QUESTIONS = {
    "long": "A baker sells 12 loaves in the morning and 30 loaves in the afternoon at $3 each; how much does she earn?",
    "short": "Compute $\\dfrac{8!+9!}{7!}$ exactly now.",
    "shorter": "Simplify $\\sqrt{242}$.",
    "bare": "What is x?",
}


@pytest.fixture(scope="module")
def index() -> Questions:
    return Questions(QUESTIONS)


def found(index: Questions, text: str) -> list[tuple[str, str]]:
    return [(match.question, match.kind) for match in index.matches(text)]


@pytest.mark.parametrize("name", ["long", "short", "shorter"])
def test_a_copy_is_found_in_the_middle_of_other_text_and_in_other_formatting(index, name):
    other = "Once upon a time there were three bears. "
    assert found(index, other + QUESTIONS[name] + other) == [(name, "copy")]
    assert (name, "copy") in found(index, QUESTIONS[name].replace("dfrac", "frac").replace("$", "").upper())


def test_a_clone_with_other_numbers_is_named_as_one(index):
    assert found(index, re.sub(r"\d+", "77", QUESTIONS["long"])) == [("long", "clone")]
    assert found(index, "Solve. " + QUESTIONS["short"].replace("8", "5")) == [("short", "clone")]


def test_words_that_say_little_are_not_taken_for_a_question(index):
    assert found(index, "Let x be 3. What is x? Simplify this.") == []


def test_half_a_question_is_enough_and_a_third_is_not(index):
    words = QUESTIONS["long"].split()
    assert found(index, " ".join(words[:17])) and not found(index, " ".join(words[:10]))


def test_words_are_read_without_case_punctuation_and_latex_formatting():
    assert words_of("If $\\left(X^2\\right) = 1,000$, or:") == ["if", "x", "^", "2", "=", "1000", "or"]
    assert words_of("2.5 of 30", numbers=False) == ["#", "of", "#"]


@pytest.mark.skipif(not DATA.exists(), reason="the data sets of shared/data are not beside this checkout")
def test_planted_copies_of_real_problems_are_found_and_problems_of_another_set_are_not():
    def questions(name: str) -> list[str]:
        return [json.loads(line)["question"] for line in (DATA / name).read_text().split("\n") if line]

    random_ = random.Random(0)
    held_out, others = questions("math500.jsonl"), questions("gsm8k_train.jsonl")
    index = Questions({str(i): text for i, text in enumerate(held_out)})

    def planted(change) -> float:
        hits = sum(str(i) in [m.question for m in index.matches(change(text))] for i, text in enumerate(held_out))
        return hits / len(held_out)

    assert planted(lambda text: f"{others[1]} {text} {others[2]}") >= 0.99
    assert planted(lambda text: "Problem: " + text.replace("$", "").upper()) >= 0.99
    assert planted(lambda text: re.sub(r"\d+", lambda m: str(random_.randint(2, 10 ** len(m[0]))), text)) >= 0.99
    assert sum(bool(index.matches(text)) for text in others) / len(others) <= 0.001
