"""The math checker's parts: exact values, normal spelling, equality, extraction, guards, the killable process."""

import json
import random
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.math import decide, equal, math_reward
from rewards.math.formula import NoFormula, formula
from rewards.math.normal import Unreadable, normalise

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def constant(text: str) -> Fraction | None:
    try:
        return formula(text).constant
    except NoFormula:
        return None


def golds(name: str) -> list[str]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no data set {name}; see the README for where the benchmark's files come from")
    return [str(answer) for line in path.open() if (answer := json.loads(line)["answer"])]


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train.jsonl", "math500.jsonl", "math_train_7474.jsonl"])
def test_every_gold_equals_itself(name):
    lost = [
        gold
        for gold in golds(name)
        if not equal(gold, gold) or math_reward(f"a</think>$\\boxed{{{gold}}}$.", gold).value != 1
    ]
    assert lost == []


@pytest.mark.parametrize(
    "name, pairs", [("gsm8k_test.jsonl", 1319), ("math500.jsonl", 500), ("math_train_7474.jsonl", 2000)]
)
def test_shuffled_golds_are_different(name, pairs):
    ours = golds(name)
    others = ours[:]
    random.Random(7).shuffle(others)
    # the same answer in another spelling, such as k=3 and 3, is not a false positive: 1 in 1,000 at most
    same = [
        (a, b)
        for a, b in list(zip(ours, others, strict=True))[:pairs]
        if a != b and math_reward(f"\\boxed{{{b}}}", a).value
    ]
    assert len(same) <= pairs / 1000, same


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", 42),
        ("-0.5", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("1/3", Fraction(1, 3)),
        ("\\frac{-3}{4}", Fraction(-3, 4)),
        ("3\\frac{1}{2}", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        ("0.\\overline{3}", Fraction(1, 3)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("2.(45)", Fraction(27, 11)),
        ("1.5\\times 10^{3}", 1500),
        ("1e-3", Fraction(1, 1000)),
        ("2^{-3}", Fraction(1, 8)),
        ("2^10", 1024),
        ("(1+2)*3-4/2", 7),
        ("5!", 120),
        ("\\binom{5}{2}", 10),
        ("\\sqrt{\\frac{9}{4}}", Fraction(3, 2)),
        ("\\sqrt[3]{27}", 3),
        ("8^{2/3}", 4),
        ("2(3)", 6),
        ("-(-2)", 2),
    ],
)
def test_exact_values(text, value):
    assert constant(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1/0", "1 2", "\\sqrt{2}", "(1,2)", "1=1", "--1", "1+", "()", "\\pi", "3 9/4", "0/0", "2^{0.5}", "[1]"],
)
def test_what_has_no_exact_value(text):
    assert constant(text) is None


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "10000000!", "2^{100000}", "9" * 20_000, "(" * 100 + "1" + ")" * 100, "1+" * 300 + "1"]
)
def test_large_values_are_refused_before_they_are_computed(text):
    start = time.perf_counter()
    assert decide("\\pi", text).unread
    assert time.perf_counter() - start < 0.05


_arithmetic = st.recursive(
    st.integers(0, 50).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"\\frac{{{t[0]}}}{{{t[1]}}}"),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_arithmetic)
def test_exact_values_agree_with_python(text):
    import re

    source = re.sub(r"\d+", lambda m: f"Fraction({m.group()})", text)
    while "\\frac" in source:
        source = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", source)
    try:
        expected = eval(source, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    assert constant(text) == expected


@pytest.mark.parametrize(
    "written, normal",
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\tfrac{1}2", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("$ 42 $.", "42"),
        ("1{,}234", "1234"),
        ("49,\\!479", "49479"),
        ("1\\,000\\,000", "1000000"),
        ("４２％", "42%"),
        ("x^2", "x^{2}"),
        ("\\text{ cm }", "\\text{cm}"),
        ("−5", "-5"),
        ("x²", "x^{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("a \\leq 2", "a\\le2"),
        ("90^{\\circ}", "90°"),
        ("\\mathrm{e}", "e"),
    ],
)
def test_one_spelling(written, normal):
    assert normalise(written).replace(" ", "") == normal


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789.,+-*/^(){}[]\\ $%!=<>xyzfracsqtpien½²×π٣\u200b\n|_&~'", max_size=40))
def test_normalising_twice_changes_nothing_and_only_unreadable_is_raised(text):
    try:
        once = normalise(text)
    except Unreadable:
        return
    assert normalise(once) == once


@pytest.mark.parametrize(
    "gold, value, tolerance, same",
    [
        ("3.14", "3.15", None, False),
        ("3.14", "3.15", 0.01, True),
        ("3.14", "3.18", 0.01, False),
        ("0", "0.001", 0.01, True),
        ("\\pi", "3.14", 0.01, True),
        ("\\pi", "3.14", None, False),
        ("\\sqrt{2}", "1.41421356", 1e-6, True),
        ("100", "-100", 0.01, False),
    ],
)
def test_tolerance_only_when_asked_for(gold, value, tolerance, same):
    assert equal(gold, value, tolerance) is same
    assert math_reward(f"\\boxed{{{value}}}", gold, tolerance=tolerance).value == float(same)


@pytest.mark.parametrize(
    "completion, verdict",
    [
        ("\\boxed{42}", "correct"),
        ("\\boxed{41}", "wrong"),
        ("42", "unparsed"),
        ("<think>\\boxed{42}", "unparsed"),
        ("\\boxed{9^{9^{9^9}}}", "unparsed"),
    ],
)
def test_verdicts(completion, verdict):
    score = math_reward(completion, "42")
    assert (score.verdict, score.value) == (verdict, float(verdict == "correct")) and score.detail


def test_an_empty_gold_is_our_error():
    with pytest.raises(ValueError, match="the gold answer is empty"):
        math_reward("\\boxed{42}", " ")


@pytest.mark.parametrize(
    "gold", [None, float("nan"), ["3"], {"a": 1}, "", " ", "NaN", "null", "4\u200b2", "\\frac{1}{2"]
)
def test_a_row_that_can_never_be_paid_is_found_without_a_completion(gold):
    assert math_reward.check_row({"answer": gold})


@pytest.mark.parametrize(
    "gold", ["42", 42, 4.5, np.int64(7), np.float32(0.5), "#### 1,234", "$\\frac12$", "\\text{(C)}"]
)
def test_a_gold_of_text_or_numbers_can_be_paid(gold):
    assert math_reward.check_row({"answer": gold}) is None
    stated = str(gold).removeprefix("####").strip()
    assert math_reward(f"\\boxed{{{stated}}}", gold).value == 1


@pytest.mark.parametrize("gold, word", [(None, "None"), (float("nan"), "nan"), (["3"], "['3']")])
def test_a_missing_gold_is_an_error_and_never_its_own_spelling(gold, word):
    with pytest.raises(ValueError, match="the gold answer is"):
        math_reward(f"\\boxed{{{word}}}", gold)


def test_extraction_is_configurable():
    assert math_reward("a</think><answer>42</answer>", "42", boxed="required").verdict == "unparsed"
    assert math_reward("\\boxed{42}", "42", require_think=True).verdict == "unparsed"
    assert math_reward("a</think>\\boxed{42}", "42", answer_tag="required").verdict == "unparsed"
    assert (
        math_reward("a</think><answer>\\boxed{42}</answer>", "42", answer_tag="required", boxed="required").value == 1
    )


BOMBS = {
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "unbraced tower": "\\boxed{9^9^9^9}",
    "factorial": "\\boxed{(10^7)!}",
    "factorials": "\\boxed{((((5!)!)!)!)!}",
    "digits": "\\boxed{" + "9" * 10**6 + "}",
    "brackets": "\\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    "unclosed": "\\boxed{" * 50_000,
    "think tags": "<think>" * 50_000 + "\\boxed{42",
    "answer tags": "<answer>" * 50_000,
    "fences": "```" * 50_001 + "\\boxed{1}",
    "spaces": " " * 10**6 + "\\boxed{1}",
    "denials": "not " * 40_000 + "\\boxed{1}",
    "polynomial": "\\boxed{(x+y+z)^{5000}}",
    "sum": "\\boxed{\\sum_{i=1}^{10^9} i}",
    "roots": "\\boxed{" + "\\sqrt{" * 50 + "2" + "}" * 50 + "}",
    "chain": "\\boxed{" + "x=" * 1400 + "1}",
    "plus": "\\boxed{" + "1+" * 1400 + "1}",
    "words": "\\boxed{" + "ab " * 990 + "!}",
    "units": "\\boxed{5" + " cm" * 900 + "!}",
    "names": "\\boxed{" + "add the " * 300 + "= 1}",
    "signs": "\\boxed{" + "\\pm " * 700 + "1}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little_and_earns_nothing(name):
    math_reward("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")  # the process is up
    start = time.process_time()
    for gold in ("42", "x^2+1", "(1,2)"):
        assert math_reward(BOMBS[name], gold).value == 0
    assert time.process_time() - start < 1.0  # CPU of this process; 1,000 times less is usual


def test_threads_compare_at_once():
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: equal(f"\\sqrt{{{n * n * 2}}}", f"{n}\\sqrt{{2}}")}))
        for n in range(2, 10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(range(2, 10), True)


def test_importing_and_the_fast_path_load_neither_torch_nor_sympy():
    code = (
        "import sys; from rewards import math_reward; assert math_reward(r'\\boxed{1/2}', '0.5').value == 1;"
        "print([m for m in ('torch', 'sympy', 'math_verify', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_deciding_rule_is_told():
    assert decide("0.5", "\\frac12").rule == "exact rational"
    assert decide("\\sqrt{8}", "2\\sqrt{2}").rule == "equal at random points"
    assert decide("\\sqrt{8}", "3\\sqrt{2}").rule == "different at a random point"
