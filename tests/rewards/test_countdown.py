"""Countdown: exact arithmetic, each number once, the final answer only, hostile input bounded."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzero.examples.countdown.reward import ExpressionError, countdown_reward, evaluate


def said(answer: str) -> str:
    return f"let me see </think> <answer>{answer}</answer>"


@pytest.mark.parametrize("answer", ["(1+2)*8", "8 * (2 + 1)", "8×(1+2)", "(1 + 2) \n* 8", "-(-8*(1+2))", "8÷(1/(1*3))"])
def test_right_answers(answer):
    numbers = [1, 1, 3, 8] if "÷" in answer else [1, 2, 8]
    assert countdown_reward(said(answer), numbers, 24).verdict == "correct"


@pytest.mark.parametrize("answer", ["8*3", "(1+2)*8+0", "1+2+8", "12*8/4", "(1+2)*8*1/1", "24"])
def test_wrong_answers(answer):
    assert countdown_reward(said(answer), [1, 2, 8], 24).verdict == "wrong"


@pytest.mark.parametrize(
    "answer",
    [
        "(1+2)*8 = 24",
        "",
        "8*(1+2",
        "8**2",
        "2^3",
        "__import__('os')",
        "(1+2)8",
        "8/(1-1)",
        "1e3",
        "8.0*3",
        "٨*3",
        "()",
        "1 2",
        "9" * 19,
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 500 + "1",
        "1+" * 5000 + "1",
        "8//3",
        "8%3",
        "+8",
        "\\frac{1}{2}",
    ],
)
def test_what_is_no_expression_is_unparsed(answer):
    assert countdown_reward(said(answer), [1, 2, 8], 24).verdict == "unparsed"


@pytest.mark.parametrize(
    "completion, verdict",
    [
        ("<answer>(1+2)*8</answer></think><answer>1+2+8</answer>", "wrong"),  # only what follows the reasoning
        ("a</think>b</think><answer>(1+2)*8</answer>", "unparsed"),  # where the reasoning ends is not clear
        ("a</think><answer>1+2+8</answer><answer>(1+2)*8</answer>", "unparsed"),
        ("a</think>(1+2)*8", "unparsed"),
        ("<think>a <answer>(1+2)*8</answer>", "unparsed"),  # never stopped reasoning
        ("a</think><answer>1+2+8</answer><|im_end|></think><answer>(1+2)*8</answer>", "wrong"),
        ("a</think><answer>1+2+8</answer>\nUser: again\nAssistant: b</think><answer>(1+2)*8</answer>", "wrong"),
    ],
)
def test_only_the_final_answer_counts(completion, verdict):
    assert countdown_reward(completion, [1, 2, 8], 24).verdict == verdict


def test_value_is_exact_where_floats_are_not():
    assert evaluate("1/3+1/3+1/3")[0] == 1
    assert evaluate("7-3*(2-5)/4")[0] == Fraction(37, 4)
    assert evaluate("2-3-4")[0] == -5 and evaluate("8/4/2")[0] == 1


def test_hostile_input_is_bounded():
    start = time.perf_counter()
    for text in ("(" * 10**6, "9" * 10**6, "1/" * 10**6, "<answer>" * 10**5, said("*".join(["9" * 18] * 52))):
        assert countdown_reward(text, [1], 1).value == 0
    assert time.perf_counter() - start < 2


_expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_expressions)
def test_agrees_with_python_arithmetic_on_fractions(text):
    import re

    source = re.sub(r"\d+", lambda m: f"Fraction({m.group()})", text)
    try:
        expected = eval(source, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            evaluate(text)
        return
    assert evaluate(text)[0] == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789+-*/() ×÷<>answerthink/²٣", max_size=60))
def test_any_text_gets_a_score(text):
    assert countdown_reward(said(text), [1, 2], 3).verdict in ("correct", "wrong", "unparsed")
