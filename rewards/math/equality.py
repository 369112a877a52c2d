"""Whether a prediction is the same answer as a gold one: both are read completely, then compared part by part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.math.answer import (
    ANSWER_WORDS,
    Answer,
    Based,
    Group,
    Matrix,
    Ratio,
    Relation,
    Union,
    Unread,
    Value,
    Words,
    named,
    read,
)
from rewards.math.formula import NoFormula, close, formula, same
from rewards.math.normal import Unreadable, key, normalise, strip_delimiters
from rewards.math.units import compatible


@dataclass(frozen=True)
class Decision:
    """Whether the two are equal, the rule that decided, and how both were read. `unread` says that the prediction is
    no answer that can be read, so that the rule is a reason and no comparison."""

    equal: bool
    rule: str
    gold: str
    prediction: str
    unread: bool = False


def decide(gold: str, prediction: str, tolerance: float | None = None) -> Decision:
    """Whether `prediction` states the same mathematical answer as `gold`, and the rule that decided.

    Both are one answer each, in LaTeX or plain text. Exact unless `tolerance` (relative; absolute where the gold is 0)
    is given. Takes milliseconds, whatever the input.
    """
    try:
        one = normalise(strip_delimiters(gold).rstrip(" .,;:"))
    except Unreadable as refused:
        return Decision(False, f"the gold is refused: {refused}", gold[:80], prediction[:80])
    try:
        other = normalise(prediction)
    except Unreadable as refused:
        return Decision(False, f"refused: {refused}", one, prediction[:80], unread=True)
    if one.startswith("\\approx"):
        one, other = (text.removeprefix("\\approx").strip() for text in (one, other))
    if key(one) == key(other) != "":
        return Decision(True, "same text", one, other)
    choice = _choice(one, other)
    if choice is not None:
        return Decision(choice, "choice", one, other)
    try:
        wanted = read(one)
    except (Unread, Unreadable) as refused:
        return Decision(False, f"the gold is compared as text: {refused}", one, other)
    try:
        found = read(other)
    except (Unread, Unreadable) as refused:
        return Decision(False, f"not one answer: {refused}", one, other, unread=True)
    try:
        right, rule = _Comparison(tolerance).answers(wanted, found)
    except (NoFormula, Unreadable) as refused:
        return Decision(False, f"refused: {refused}", one, other, unread=True)
    return Decision(right, rule, one, other)


_LETTER = re.compile(r"\(?([A-J])\)?[.):]?")
_LETTER_AND_TEXT = re.compile(r"(?:\\text\{)?(?:\(([A-J])\)|([A-J])[.):])[ }]*(.+)", re.S)


def _choice(gold: str, prediction: str) -> bool | None:
    """Whether both are the letter of a multiple choice, `C` for `(C)`, `C.` or `(C) 12`; None when that is no
    question."""
    letter = _LETTER.fullmatch(gold)
    if letter is None:
        return None
    other = _LETTER.fullmatch(prediction)
    if other:
        return letter[1] == other[1]
    longer = _LETTER_AND_TEXT.fullmatch(prediction)
    if longer and not re.search(r"(?<![a-zA-Z\\])[A-J](?![a-zA-Z])|\b(?:or|and|not|no)\b", longer[3]):
        return letter[1] in (longer[1], longer[2])
    return None


class _Comparison:
    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance

    def answers(self, gold: Answer, found: Answer) -> tuple[bool, str]:
        """Whether `found` is the gold answer, and the rule."""
        if isinstance(gold, Union) != isinstance(found, Union):
            gold, found = _union(gold), _union(found)
        if isinstance(found, Relation) and not isinstance(gold, Relation):
            return self._relation_for_value(gold, found)
        if isinstance(gold, Relation):
            return self._relation(gold, found)
        if isinstance(gold, Value) and isinstance(found, Value):
            return self.values(gold, found)
        if isinstance(gold, Group) or isinstance(found, Group):
            return self._groups(gold, found)
        if isinstance(gold, Words) or isinstance(found, Words):
            return _words(gold, found), "words"
        if isinstance(gold, Based) or isinstance(found, Based):
            return _plain(gold) == _plain(found) is not None, "number base"
        if isinstance(gold, Ratio) or isinstance(found, Ratio):
            return self._ratios(gold, found), "ratio"
        if isinstance(gold, Matrix) and isinstance(found, Matrix):
            shapes = [[len(row) for row in matrix.rows] for matrix in (gold, found)]
            cells = [[cell for row in matrix.rows for cell in row] for matrix in (gold, found)]
            return shapes[0] == shapes[1] and self._in_order(*cells), "matrix, entry by entry"
        if isinstance(gold, Union) and isinstance(found, Union) and gold.operation == found.operation:
            match = self._in_order if gold.operation == "\\setminus" else self._in_any_order
            return match(gold.parts, found.parts), "sets, part by part"
        return False, f"{_kind(found)} where {_kind(gold)} is asked for"

    def values(self, gold: Value, found: Value) -> tuple[bool, str]:
        """Two values, their units, percent signs and scales."""
        if not compatible(gold.unit, found.unit) or (gold.unit and found.percent):
            return False, "units"
        if found.formula.symbols - gold.formula.symbols:
            return False, "a variable that the gold does not have"
        a, b = _scaled(gold), _scaled(found)
        if a is not None and b is not None:
            return self._same_number(a, gold.percent, b, found.percent) or (
                _is_expansion(a, found.text) or _is_expansion(b, gold.text)
            ), "exact rational"
        if gold.scale != found.scale:
            return False, "scales"
        if self.tolerance is not None and not gold.formula.symbols and not found.formula.symbols:
            x, y = gold.formula.precise(), found.formula.precise()
            return x is not None and y is not None and abs(x - y) <= self.tolerance * (abs(x) or 1), "within tolerance"
        for factor in (1, 100) if gold.percent != found.percent else (1,):
            one, other = gold.formula, found.formula
            if factor == 100:
                one, other = (formula(f"({v.text})/{100 if v.percent else 1}") for v in (gold, found))
            agree = same(one, other)
            if agree:
                return True, "equal at random points"
        return False, "different at a random point" if agree is False else "no value at a random point"

    def _same_number(self, gold: Fraction, gold_percent: bool, value: Fraction, percent: bool) -> bool:
        def near(a: Fraction, b: Fraction) -> bool:
            return a == b or (self.tolerance is not None and abs(a - b) <= Fraction(self.tolerance) * (abs(a) or 1))

        if near(gold, value) and (not percent or gold_percent or abs(gold) >= 1):
            return True  # 28% = 28: the sign is often left to the question
        return gold_percent != percent and near(gold / 100 if gold_percent else gold, value / 100 if percent else value)

    def _in_order(self, gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
        return len(gold) == len(found) and all(self.answers(a, b)[0] for a, b in zip(gold, found, strict=True))

    def _in_any_order(self, gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
        if len(gold) != len(found):
            return False
        left = list(found)
        for part in gold:
            at = next((i for i, other in enumerate(left) if self.answers(part, other)[0]), None)
            if at is None:
                return False
            del left[at]
        return True

    def _groups(self, gold: Answer, found: Answer) -> tuple[bool, str]:
        if not isinstance(gold, Group) or not isinstance(found, Group):
            pair = gold if isinstance(gold, Group) else found
            assert isinstance(pair, Group)
            if pair is gold and pair.left == "\\{" and len(pair.parts) == 1:
                return self.answers(pair.parts[0], found)
            one, other = (_decimal(v, v is gold) if v is pair else v for v in (gold, found))
            if (
                isinstance(one, Value)
                and isinstance(other, Value)
                and _scaled(other if pair is found else one) is not None
            ):
                if pair is gold or (a := _scaled(one)) is None or a.denominator != 1:
                    return self.values(one, other)[0], "decimal comma"
            return False, f"{_kind(found)} where {_kind(gold)} is asked for"
        if (gold.left, gold.right) != (found.left, found.right):
            bare = not gold.left or not found.left
            if not (bare and len(gold.parts) > 1 and "[" not in (gold.left, found.left)):
                return False, f"brackets {found.left}{found.right} where the gold has {gold.left}{gold.right}"
        if len(gold.parts) != len(found.parts):
            return False, f"{len(found.parts)} values where the gold has {len(gold.parts)}"
        units = {part.unit for part in gold.parts if isinstance(part, Value)}
        names = {side.sides[0] for side in gold.parts + found.parts if isinstance(side, Relation)}
        if gold.ordered or found.ordered or (len(units) > 1 and any(_bare(part) for part in found.parts)):
            return self._in_order(gold.parts, found.parts), "part by part"
        if len(names) > 1 and len({isinstance(part, Relation) for part in gold.parts + found.parts}) > 1:
            return self._in_order(gold.parts, found.parts), "part by part"
        return self._in_any_order(gold.parts, found.parts), "part by part, in any order"

    def _relation_for_value(self, gold: Answer, found: Relation) -> tuple[bool, str]:
        """`x = a = b` for a value: every side but the name has to be the gold one; `1 < x \\le 2` for an interval."""
        if isinstance(gold, (Group, Union)):
            interval = _interval(found)
            if interval is not None:
                return self.answers(gold, interval)
            if found.signs == ("\\in",) and named(found.texts[0]):
                return self.answers(gold, found.sides[1])
        if not set(found.signs) <= {"=", "\\approx"}:
            return False, f"a relation where {_kind(gold)} is asked for"
        sides = list(zip(found.sides, ("=", *found.signs), strict=True))
        if named(found.texts[0]):
            sides = sides[1:]
        exact = [side for side, sign in sides if sign == "="] or [side for side, _ in sides]
        rounded = [side for side, sign in sides if sign != "=" and side not in exact]
        if not all(_rounds(exact[-1], side) for side in rounded):
            return False, "an approximation of something else"
        for side in exact:
            right, rule = self.answers(gold, side)
            if not right:
                return False, f"chain: {rule}"
        return True, "every value of the chain"

    def _relation(self, gold: Relation, found: Answer) -> tuple[bool, str]:
        values = _values(gold)
        if not isinstance(found, Relation):
            interval = _interval(gold)
            if interval is not None:
                return (self.answers(interval, found)[0] if isinstance(found, (Group, Union)) else False), "interval"
            return any(self.answers(side, found)[0] for side in values), "the right side of the relation"
        name, other = gold.texts[0], found.texts[0]
        if values and set(found.signs) <= {"=", "\\approx", "\\in"} and named(other):
            one_function = ("(" in name) != ("(" in other) and not re.search(r"[-+*/]", name + other)
            if key(name) == key(other) or not named(name) or one_function:
                if self._in_order(values[-1:], _values(found)[-1:]) and len(found.sides) == 2:
                    return True, "the right sides of the relations"
        ours, theirs = _turned(gold), _turned(found)
        if ours.signs == theirs.signs and self._in_order(ours.sides, theirs.sides):
            return True, "side by side"
        if gold.signs == ("=",) * len(gold.signs) and found.signs == ("=",):
            if len(gold.sides) == 2 and self._in_any_order(gold.sides, found.sides):
                return True, "side by side"
        if len(ours.signs) == 1 and ours.signs == theirs.signs and ours.signs[0] in ("=", "<", "\\le", "\\ne"):
            return _proportional(ours, theirs), "difference of the sides"
        one, two = _interval(gold), _interval(found)
        if one is not None and two is not None and gold.texts and _variable(gold) == _variable(found):
            return self.answers(one, two)[0], "interval"
        return False, "another relation"

    def _ratios(self, gold: Answer, found: Answer) -> bool:
        if isinstance(gold, Ratio) and isinstance(found, Ratio):
            if len(gold.parts) != len(found.parts) or (gold.suffix and found.suffix and gold.suffix != found.suffix):
                return False
            clock = any(re.fullmatch(r"\d\d", part) for ratio in (gold, found) for part in ratio.parts[1:])
            if clock or gold.suffix or found.suffix:
                digits = [(ratio.parts[0].lstrip("0"), *ratio.parts[1:]) for ratio in (gold, found)]
                return digits[0] == digits[1]
            return all(
                same(formula(f"({a})*({gold.parts[0]})"), formula(f"({b})*({found.parts[0]})"))
                for a, b in zip(found.parts, gold.parts, strict=True)
            )
        ratio, other = (gold, found) if isinstance(gold, Ratio) else (found, gold)
        if not isinstance(ratio, Ratio) or not isinstance(other, Value) or len(ratio.parts) != 2 or other.unit:
            return False
        return (
            ratio is gold
            and ("/" in other.text or "\\frac" in other.text)
            and bool(same(formula(f"({ratio.parts[0]})/({ratio.parts[1]})"), other.formula))
        )


def _bare(part: Answer) -> bool:
    return isinstance(part, Value) and not part.unit


def _kind(answer: Answer) -> str:
    if isinstance(answer, Group):
        return f"a group {answer.left}{answer.right} of {len(answer.parts)}" if answer.left else "a list"
    return f"a {type(answer).__name__.lower()}"


def _scaled(value: Answer) -> Fraction | None:
    if not isinstance(value, Value) or value.formula.constant is None:
        return None
    return value.formula.constant * value.scale


def _is_expansion(exact: Fraction, text: str) -> bool:
    """Whether `text` is the decimal expansion of a fraction that has no finite one, to at least twelve digits."""
    if not re.fullmatch(r"-?\d*\.\d{12,40}", text) or exact == 0:
        return False
    rest = exact.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1 and abs(Fraction(text) - exact) * 10 ** len(text.partition(".")[2]) <= 1


def _decimal(group: Group, is_gold: bool) -> Answer:
    """`1,22` as a number; a gold is read so only where a list is unlikely: two digits or more, none of them behind."""
    texts = [part.text for part in group.parts if isinstance(part, Value) and part.formula.constant is not None]
    if group.left or len(texts) != len(group.parts) or len(texts) != 2 or not all(_bare(p) for p in group.parts[:1]):
        return group
    whole, decimals = texts
    if not re.fullmatch(r"-?\d+", whole) or not re.fullmatch(r"\d+" if not is_gold else r"\d+[1-9]", decimals):
        return group
    last = group.parts[1]
    assert isinstance(last, Value)
    text = f"{whole}.{decimals}"
    return replace(last, text=text, formula=formula(text))


_SENSITIVE = re.compile(r"[A-Z0-9]{2,5}")


def _words(gold: Answer, found: Answer) -> bool:
    """The same words, whatever their case; short ones in capitals (`ABC`) are names, whose case counts."""
    if not isinstance(gold, Words) or not isinstance(found, Words):
        return False
    one, other = (" ".join(re.sub(r"[-&]", " ", words.text).rstrip(".").split()) for words in (gold, found))
    if one == other:
        return True
    if any(_SENSITIVE.fullmatch(text) and text.lower() not in ANSWER_WORDS for text in (one, other)):
        return False
    return _no_article(one.lower()) == _no_article(other.lower())


def _no_article(text: str) -> str:
    return re.sub(r"^(?:a|an|the) ", "", text)


def _plain(answer: Answer) -> tuple[str, int] | None:
    """Digits and base; a whole number without a base is one in base ten."""
    if isinstance(answer, Based):
        return answer.digits, answer.base
    if isinstance(answer, Value) and answer.text.isdigit():
        return answer.text, 10
    return None


def _values(relation: Relation) -> list[Answer]:
    """The sides that are the value of `x = a = b`, `a = b \\approx c` or `x \\in a`; none for an inequality."""
    if not set(relation.signs) <= {"=", "\\approx", "\\in"}:
        return []
    if named(relation.texts[0]) and not (re.search(r"[-+]", relation.texts[0]) and relation.texts[-1] == "0"):
        return list(relation.sides[1:])
    known = [not isinstance(side, Value) or not side.formula.symbols for side in relation.sides]
    return list(relation.sides) if all(known) else []


def _rounds(exact: Answer, rounded: Answer) -> bool:
    """Whether what stands behind an approximation sign is within 1 % of what stands before it."""
    if not isinstance(exact, Value) or not isinstance(rounded, Value):
        return False
    a, b = exact.formula.precise(), rounded.formula.precise()
    return a is not None and b is not None and bool(abs(a - b) * 100 <= abs(a))


def _turned(relation: Relation) -> Relation:
    """The same relation with its signs pointing to the left: `5 > x` is `x < 5`."""
    turn = {">": "<", "\\ge": "\\le"}
    if set(relation.signs) & set(turn) and not set(relation.signs) & {"<", "\\le"}:
        signs = tuple(turn.get(sign, sign) for sign in reversed(relation.signs))
        return Relation(relation.sides[::-1], signs, relation.texts[::-1])
    return relation


def _proportional(one: Relation, other: Relation) -> bool:
    """Whether the differences of the sides are multiples of each other, positive ones for an inequality."""
    ratios = []
    for salt in ("a", "b", "c"):
        values = []
        for relation in (one, other):
            left, right = relation.sides
            if not isinstance(left, Value) or not isinstance(right, Value) or left.unit or right.unit:
                return False
            x, y = left.formula.precise(salt), right.formula.precise(salt)
            if x is None or y is None:
                return False
            values.append(x - y)
        if not values[0] or not values[1]:
            return False
        ratios.append(values[0] / values[1])
    if one.signs[0] in ("<", "\\le") and not (getattr(ratios[0], "imag", 0) == 0 and ratios[0] > 0):
        return False
    symbols = [{n for side in r.sides if isinstance(side, Value) for n in side.formula.symbols} for r in (one, other)]
    return symbols[0] == symbols[1] != set() and close(ratios[0], ratios[1]) and close(ratios[0], ratios[2])


def _union(answer: Answer) -> Answer:
    """A list of inequalities as the union of the sets that they describe; anything else as it is."""
    if isinstance(answer, Group) and not answer.left:
        sets = [_interval(part) if isinstance(part, Relation) else None for part in answer.parts]
        if all(part is not None for part in sets):
            return Union("\\cup", tuple(part for part in sets if part is not None))
    return answer


def _variable(relation: Relation) -> str:
    texts = relation.texts[1:2] if len(relation.texts) == 3 else relation.texts
    return next((text for text in texts if named(text) and not re.search(r"[-+*/]", text)), "")


def _interval(relation: Relation) -> Answer | None:
    """The set that an inequality of one variable describes; None for other relations."""
    turned = _turned(relation)
    infinity = Value("\\infty", formula("\\infty"))
    minus = Value("-\\infty", formula("-\\infty"))
    name = _variable(turned)
    if not name or not set(turned.signs) <= {"<", "\\le", "\\ne"}:
        return None
    at = turned.texts.index(name)
    if turned.signs == ("\\ne",):
        other = turned.sides[1 - at]
        return Union("\\cup", (Group("(", ")", (minus, other)), Group("(", ")", (other, infinity))))
    if len(turned.signs) > 2 or "\\ne" in turned.signs or (len(turned.signs) == 2 and at != 1):
        return None
    below, above = turned.sides[:at], turned.sides[at + 1 :]
    left = "[" if below and turned.signs[at - 1] == "\\le" else "("
    right = "]" if above and turned.signs[at] == "\\le" else ")"
    return Group(left, right, (below[-1] if below else minus, above[0] if above else infinity))
