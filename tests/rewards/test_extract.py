"""Extraction: total, bounded, and never something that the text does not hold. Fuzzed with pieces of real templates."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.extract import final_part, reasoning_part
from rewards.math import math_reward
from rewards.math.boxes import find_answer

PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "{",
    "42",
    "17",
    "x=",
    ", ",
    " or ",
    "$",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "```",
    "`",
    "\n",
    "<!--",
    "-->",
    "%",
    " % ",
    "~~",
    "\\cancel{",
    "not ",
    "Wait, ",
    "The answer is ",
    "\nUser:",
    "<|im_end|>",
    "</s>",
    "\\text{",
    "\\frac{",
    "^",
    "_",
    "!",
    "(",
    ")",
    "[",
    "]",
    "\\{",
    "\\}",
    "\\\\",
    "\\",
    "=",
    "<",
    ">",
    "\\pm ",
    "\u200b",
    "٤",
    "²",
    "．",
    "-",
    "/",
    ".",
    "?",
    "e",
    "\\begin{comment}",
    "\\end{comment}",
    "<del>",
    "&",
    "|",
]
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(texts)
def test_any_text_has_an_answer_or_a_reason_within_the_text(text):
    found = find_answer(text)
    assert found.why
    if found.text is not None:
        assert found.text in text


@settings(max_examples=400, deadline=None, derandomize=True)
@given(texts)
def test_nothing_wrong_is_rewarded(text):
    # 43 is not among the pieces and not a value of any arithmetic on them that fits a box of these lengths by chance
    assert math_reward(text, "43.7").value == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts)
def test_what_follows_the_end_never_matters(text):
    assert find_answer("a</think>\\boxed{17}<|im_end|>" + text).text == "17"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts)
def test_reasoning_never_answers(text):
    inside = text.replace("</think>", "").replace("<|im_end|>", "").replace("</s>", "")
    assert find_answer(f"<think>{inside} \\boxed{{42}}").text is None
    assert find_answer(f"<think>{inside}</think>no answer").text is None


@pytest.mark.parametrize("piece", PIECES)
def test_extraction_is_linear_in_every_piece(piece):
    start = time.process_time()
    for tail in ("\\boxed{42}", "", "\\boxed{4"):
        find_answer("a</think>" + piece * (150_000 // len(piece)) + tail)
    assert time.process_time() - start < 3.0


def test_final_part_and_reasoning_are_complements():
    text = "<think>one</think>two"
    assert (reasoning_part(text), final_part(text).text) == ("one", "two")
    assert reasoning_part("all of it") == "all of it" == final_part("all of it").text
