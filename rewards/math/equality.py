"""Whether a prediction is the same answer as a gold one: exact arithmetic first, Math-Verify for the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math import verify as checker
from rewards.math.normal import Unreadable, key, measured, normalise, strip_delimiters
from rewards.math.numeric import differ, value
from rewards.math.rational import rational
from rewards.math.shape import based, choice, container, guard, symbols, values_of_chain, words

MAX_TEXT_CHARACTERS = 200_000


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
    if max(len(gold), len(prediction)) > MAX_TEXT_CHARACTERS:
        return Decision(False, f"refused: more than {MAX_TEXT_CHARACTERS} characters", gold[:80], prediction[:80])
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
            guard(other, one)
            outcome, rule = checker.verify(one, other)
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
    gold_value, found = measured(one, any_unit=True), measured(other)
    if gold_value.unit and found.unit and gold_value.unit != found.unit:
        return False, f"units {gold_value.unit} and {found.unit}"
    if gold_value.unit and found.percent:
        return False, "a percentage where the gold has a unit"
    exact, predicted = rational(gold_value.text), rational(found.text)
    if predicted is None and (exact is None or exact.denominator != 1):
        predicted = _decimal_comma(found.text)
    if exact is None and predicted is not None:
        exact = _decimal_comma(gold_value.text)
    if exact is not None and predicted is not None:
        exact, predicted = exact * gold_value.scale, predicted * found.scale
        if _same_number(exact, gold_value.percent, predicted, found.percent, tolerance):
            return True, "exact rational"
        return _is_expansion(exact, found.text) or _is_expansion(predicted, gold_value.text), "exact rational"
    if gold_value.text != one or found.text != other:
        if key(gold_value.text) == key(found.text) and not gold_value.percent ^ found.percent:
            return True, "same text without units"
    if tolerance is not None and not symbols(gold_value.text) and not symbols(found.text):
        a, b = value(gold_value.text), value(found.text)
        if a is not None and b is not None:
            return abs(a - b) <= tolerance * (abs(a) or 1.0), "within tolerance"
    if exact is not None:
        chain = values_of_chain(found.text)
        if chain is not None:
            return _chain(one, chain, tolerance)
        if symbols(found.text) and not words(found.text) and "=" not in found.text:
            return False, "a number against an expression with variables"
    gold_chain = values_of_chain(gold_value.text)
    if gold_chain is not None and len(gold_chain) == 1 and not _RELATION.search(found.text):
        decision = decide(gold_chain[0], other, tolerance)
        if not decision.timeout and not decision.rule.startswith("refused"):
            return decision.equal, decision.rule
    for compound, simple in ((gold_value.text, found.text), (found.text, gold_value.text)):
        if _COMPOUND.search(compound) and value(simple) is not None:
            return False, "a value against a set, a matrix or a relation"
    if words(one) and not symbols(re.sub(r"\\text\{[^{}]*\}", "", one)) and not re.search(r"\d", one):
        return False, "words"
    return _parts(gold_value.text, found.text, tolerance)


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

    if near(gold, value) and (not percent or gold_percent or abs(gold) >= 1):
        return True  # 28% = 28: the sign is often left to the question
    return gold_percent != percent and near(gold / 100 if gold_percent else gold, value / 100 if percent else value)


def _chain(gold: str, values: list[str], tolerance: float | None) -> tuple[bool, str]:
    """`x = a = b`: every value in the chain has to be the gold one."""
    for stated in values:
        decision = decide(gold, stated, tolerance)
        if not decision.equal:
            return False, f"chain: {decision.rule}"
    return True, "every value of the chain"


_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|approx|in)(?![a-zA-Z])")
_COMPOUND = re.compile(r"\\(?:cup|cap|setminus|begin|le|ge|ne)(?![a-zA-Z])|[<>]")
_NO_CONTAINER = re.compile(
    r"\\pm|\\mp|\\cup|\\cap|\\setminus|\\begin|\\in(?![a-zA-Z])|\\le|\\ge|\\ne|[<>=:|]|\\text|\\ldots"
)


def _parts(one: str, other: str, tolerance: float | None) -> tuple[bool | None, str]:
    """Values and containers of values that can be told apart, or are exactly equal, part by part; None for the rest."""
    if _NO_CONTAINER.search(one) or _NO_CONTAINER.search(other):
        return None, ""
    gold, prediction = container(one), container(other)
    if len(gold.parts) != len(prediction.parts):
        return False, f"{len(prediction.parts)} values where the gold has {len(gold.parts)}"
    if (gold.left, gold.right) != (prediction.left, prediction.right):
        if gold.left and prediction.left or len(gold.parts) < 2:
            return False, f"brackets {gold.left}{gold.right} and {prediction.left}{prediction.right}"
    ordered = {gold.left, prediction.left} & {"(", "["}
    ours, theirs = ([_exact_part(p) for p in c.parts] for c in (gold, prediction))
    if all(p is not None for p in ours + theirs):
        if not ordered:
            ours, theirs = sorted(ours), sorted(theirs)
        same = all(_same_number(a, False, b, False, tolerance) for a, b in zip(ours, theirs, strict=True))
        return same, "exact rational, part by part"
    if tolerance is not None:
        return None, ""
    ours, theirs = ([_value(p) for p in c.parts] for c in (gold, prediction))
    if ordered or len(ours) == 1:
        apart = any(differ(a, b) for a, b in zip(ours, theirs, strict=True))
    else:
        apart = all(v is not None for v in theirs) and any(
            a is not None and all(differ(a, b) for b in theirs) for a in ours
        )
    return (False, "different at test points") if apart else (None, "")


def _exact_part(text: str) -> Fraction | None:
    return rational(measured(text).text) if not measured(text).percent else None


def _value(text: str) -> complex | None:
    return None if measured(text).percent else value(measured(text).text)


def _prose(gold: str, prediction: str) -> Decision:
    """Running text or several formulas: Math-Verify's extraction, for comparing free text."""
    outcome, rule = checker.verify(gold[-20_000:], prediction[-20_000:], prose=True)
    return Decision(outcome == "equal", f"free text: {rule}", gold, prediction, timeout=outcome == "timeout")
