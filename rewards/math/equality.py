"""Whether a prediction is the same answer as a gold one: exact arithmetic first, Math-Verify for the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math import verify as checker
from rewards.math.normal import Unreadable, key, measured, normalise, strip_delimiters
from rewards.math.rational import TooLarge, rational
from rewards.math.shape import based, choice, container, guard, split_top, symbols, values_of_chain, words


@dataclass(frozen=True)
class Decision:
    """Whether the two are equal, the rule that decided, and how both were read. `timeout`: nothing could decide."""

    equal: bool
    rule: str
    gold: str
    prediction: str
    timeout: bool = False


def equal(gold: str, prediction: str, tolerance: float | None = None) -> bool:
    """Whether `prediction` states the same mathematical answer as `gold`; a timeout counts as no.

    Exact unless `tolerance` (relative; absolute where the gold is 0) is given. Reads LaTeX, plain text and delimited
    formulas in running text. Takes at most about two seconds, whatever the input; raises only
    rewards.math.verify.VerifierError, when the checker's own process cannot run.
    """
    return decide(gold, prediction, tolerance).equal


def decide(gold: str, prediction: str, tolerance: float | None = None) -> Decision:
    """As `equal`, with the rule that decided (`rlzero score --explain` prints it)."""
    gold_text, text = strip_delimiters(gold), strip_delimiters(prediction)
    if checker.is_prose(gold_text) or checker.is_prose(text):
        return _prose(gold, prediction)
    try:
        one, other = normalise(gold_text), normalise(text)
    except Unreadable as refused:
        return Decision(False, f"refused: {refused}", gold, prediction)
    try:
        equal_, rule = _quick(one, other, tolerance)
        if equal_ is None:
            guard(other)
            if not _same_text(one, other):
                guard(one)
            outcome, rule = checker.verify(_for_checker(one), _for_checker(other))
            if outcome == "timeout":
                return Decision(False, rule, one, other, timeout=True)
            equal_ = outcome == "equal"
    except Unreadable as refused:
        return Decision(False, f"refused: {refused}", one, other)
    return Decision(equal_, rule, one, other)


def _same_text(one: str, other: str) -> bool:
    return key(one) == key(other) != ""


def _quick(one: str, other: str, tolerance: float | None) -> tuple[bool | None, str]:
    """The answer where no computer algebra is needed; None where it is."""
    if not one or not other:
        return False, "empty"
    if _same_text(one, other):
        return True, "same text"
    letter = choice(one)
    if letter is not None and (letter == choice(other) or words(other) or rational(other) is not None):
        return letter == choice(other), "choice"
    gold_base, base = based(one), based(other)
    if gold_base or base:
        return gold_base == base, "number base"
    if re.fullmatch(r"\d{1,2}:\d{2}", one) and re.fullmatch(r"\d{1,2}:\d{2}", other):
        return False, "time of day"
    gold_value, value = measured(one, any_unit=True), measured(other)
    if gold_value.unit and value.unit and gold_value.unit != value.unit:
        return False, f"units {gold_value.unit} and {value.unit}"
    exact, predicted = rational(gold_value.text), rational(value.text)
    if predicted is None and (exact is None or exact.denominator != 1):
        predicted = _decimal_comma(value.text)
    if exact is None and predicted is not None:
        exact = _decimal_comma(gold_value.text)
    if exact is not None and predicted is not None:
        exact, predicted = exact * gold_value.scale, predicted * value.scale
        if _same_number(exact, gold_value.percent, predicted, value.percent, tolerance):
            return True, "exact rational"
        return _is_expansion(exact, value.text) or _is_expansion(predicted, gold_value.text), "exact rational"
    if gold_value.text != one or value.text != other:
        if key(gold_value.text) == key(value.text) and not gold_value.percent ^ value.percent:
            return True, "same text without units"
    if exact is not None:
        chain = values_of_chain(value.text)
        if chain is not None:
            return _chain(one, chain, tolerance)
        if symbols(value.text) and not words(value.text) and "=" not in value.text:
            return False, "a number against an expression with variables"
    if words(one) and not symbols(re.sub(r"\\text\{[^{}]*\}", "", one)) and not re.search(r"\d", one):
        return False, "words"
    return _parts(gold_value.text, value.text, tolerance)


def _decimal_comma(text: str) -> Fraction | None:
    """The value of `1,22` or `0,111`, which no thousands separator explains."""
    return rational(text.replace(",", ".")) if re.fullmatch(r"-?(?:\d+,(?:\d\d?|\d{4,})|0,\d+)", text) else None


def _is_expansion(exact: Fraction, text: str) -> bool:
    """Whether `text` is the decimal expansion of a fraction that has no finite one, to at least twelve digits."""
    if not re.fullmatch(r"-?\d*\.\d{12,40}", text) or exact == 0:
        return False
    rest = exact.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1 and abs(Fraction(text) - exact) * 10 ** len(text.partition(".")[2]) <= 1


def _same_number(gold: Fraction, gold_percent: bool, value: Fraction, percent: bool, tolerance: float | None) -> bool:
    def near(a: Fraction, b: Fraction) -> bool:
        if a == b:
            return True
        return tolerance is not None and abs(a - b) <= Fraction(tolerance) * (abs(a) or 1)

    if near(gold, value):  # 28% = 28: the sign is often left to the question
        return True
    return gold_percent != percent and near(gold / 100 if gold_percent else gold, value / 100 if percent else value)


def _chain(gold: str, values: list[str], tolerance: float | None) -> tuple[bool, str]:
    """`x = a = b`: every value in the chain has to be the gold one."""
    for value in values:
        decision = decide(gold, value, tolerance)
        if not decision.equal:
            return False, f"chain: {decision.rule}"
    return True, "every value of the chain"


def _parts(one: str, other: str, tolerance: float | None) -> tuple[bool | None, str]:
    """Containers whose parts are all rational, compared part by part; None for everything else."""
    gold, prediction = container(one), container(other)
    if len(gold.parts) < 2 and not gold.left:
        return None, ""
    if len(gold.parts) != len(prediction.parts):
        return None, ""
    ours, theirs = ([_exact_part(p) for p in c.parts] for c in (gold, prediction))
    if gold.left != prediction.left or gold.right != prediction.right:
        if gold.left and prediction.left:
            return False, f"brackets {gold.left}{gold.right} and {prediction.left}{prediction.right}"
        return None, ""
    if any(p is None for p in ours + theirs):
        return None, ""
    if not gold.left or gold.left == "\\{":
        ours, theirs = sorted(ours), sorted(theirs)
    pairs = zip(ours, theirs)
    return all(_same_number(a, False, b, False, tolerance) for a, b in pairs), "exact rational, part by part"


def _exact_part(text: str) -> Fraction | None:
    return rational(measured(text).text) if not measured(text).percent else None


def _for_checker(text: str) -> str:
    return text


def _prose(gold: str, prediction: str) -> Decision:
    """Running text or several formulas: Math-Verify's extraction, for comparing free text."""
    outcome, rule = checker.verify(gold[-20_000:], prediction[-20_000:], prose=True)
    return Decision(outcome == "equal", f"free text: {rule}", gold, prediction, timeout=outcome == "timeout")
