"""What an answer is made of: a value with its unit, a list, an interval, a relation, a matrix, words.

A text is read completely or not at all: where something stays unread, nothing equals it but the same text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from rewards.math.formula import Formula, NoFormula, formula
from rewards.math.normal import FUNCTIONS
from rewards.math.units import Unit, measured, parse_unit


class Unread(ValueError):
    """A text that is not completely read as an answer; the message says where reading stopped."""


@dataclass(frozen=True)
class Value:
    """One value: its formula, the unit behind it, whether it is a percentage; `scale` is that of "million"."""

    text: str
    formula: Formula = field(repr=False, compare=False)
    unit: Unit = Unit()
    percent: bool = False
    scale: int = 1


@dataclass(frozen=True)
class Words:
    """A text answer, such as a name or a day."""

    text: str


@dataclass(frozen=True)
class Based:
    """A number in a base that is written behind it."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """Values with colons between them: a ratio, or a time of day with what is written behind it."""

    parts: tuple[str, ...]
    suffix: str = ""


@dataclass(frozen=True)
class Group:
    """Brackets (`""` for a bare list) and the answers in them. Sets and bare lists have no order."""

    left: str
    right: str
    parts: tuple[Answer, ...]

    @property
    def ordered(self) -> bool:
        return self.left in ("(", "[")


@dataclass(frozen=True)
class Union:
    """Sets joined by `operation`, which is `\\cup`, `\\cap` or `\\setminus`."""

    operation: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Relation:
    """Sides and the signs between them, one less."""

    sides: tuple[Answer, ...]
    signs: tuple[str, ...]
    texts: tuple[str, ...]


Answer = Value | Words | Based | Ratio | Group | Union | Matrix | Relation

MAX_PARTS = 200
_BASE = re.compile(
    r"(-?)(?:\\text\{)?([0-9A-F]*[0-9][0-9A-F]*)\}?_"
    r"\{\(?(?:(?:\\text\{base\} ?)?(\d{1,2})|\\text\{(?:base )?(\w+)\})\)?\}"
)
_BASE_WORDS = re.compile(r"(-?)([0-9A-F]*[0-9][0-9A-F]*)(?: |\\text\{)(?:in )?base (?:(\d{1,2})|([a-z]+))\}?")
_BASE_NAMES = {n: i for i, n in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)} | {
    "sixteen": 16
}
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
        " seventeen eighteen nineteen twenty".split()
    )
} | {word: str(10 * n) for n, word in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), 3)}
ANSWER_WORDS = frozenset("yes no true false none even odd both".split())
_AND = re.compile(r"(?:,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*)+")
_SIGN = re.compile(r"\\(?:le|ge|ne|approx|in)(?![a-zA-Z])|[=<>]")
_SETS = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])")
_PAIRS = {"(": ")]", "[": ")]", "\\{": ("\\}",)}
_MATRIX = re.compile(r"\\begin\{([pbB]?|small)(matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1\2\}", re.S)
_RATIO = re.compile(r"([^:]+(?::[^:]+?){1,3})(?:(?: |\\text\{)([ap]\.?m\.?)\}?)?", re.I)
_BUILDER = re.compile(r"([a-zA-Z])(?:\\in\\mathbb\{R\})?(?:\\mid|\\vert|:|\|)(.+)", re.S)
_COMPOUND = re.compile(
    r"((?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})(?:\\text\{[^{}]+\}|°| ?[a-zA-Z]{2,}\.?)(?:\^\{\d\})?)\s*(?=\d|\\frac)"
)
_BARE_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z0-9]+|['.-] ?[A-Za-z]{2,}|'s)*\.?")
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9'\-./& ]*")


@lru_cache(maxsize=8192)
def read(text: str) -> Answer:
    """The answer that a canonical text states. Raises Unread, and Unreadable for what is out of bounds."""
    parts = [part for item in split_top(text) for part in _items(item)]
    if len(parts) > MAX_PARTS:
        raise Unread(f"a list of {len(parts)} values")
    return parts[0] if len(parts) == 1 else Group("", "", tuple(parts))


def _items(text: str) -> list[Answer]:
    """One answer; several for `1\\pm\\sqrt{2}` and `2\\text{hours}30\\text{minutes}`."""
    if ("\\pm" in text or "\\mp" in text) and not _encloses(text):
        upper = re.sub(r"\\pm ?", "+", re.sub(r"\\mp ?", "-", text))
        lower = re.sub(r"\\pm ?", "-", re.sub(r"\\mp ?", "+", text))
        return [_item(upper), _item(lower)]
    compound = _COMPOUND.sub(r"\1,", text) if text[:1].isdigit() or text.startswith("\\frac") else text
    if compound != text and "," not in text:
        return [_item(part) for part in split_top(compound)]
    return [_item(text)]


def split_top(text: str, separators: str = ",;") -> list[str]:
    """`text` cut at separators (and at "and", "or") that stand outside all brackets. Raises Unread for an empty
    place."""
    text = _AND.sub(",", text)
    parts, start = [], 0
    for position, character in _outside(text):
        if character in separators:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    if not all(parts):
        raise Unread("a list with an empty place")
    return parts


def _outside(text: str) -> list[tuple[int, str]]:
    """The characters outside all brackets and environments, opening brackets among them, with their places."""
    found, depth, position = [], 0, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            character = text[position : position + 2]
            opens, closes = text.startswith(("\\{", "\\begin{"), position), text.startswith(("\\}", "\\end{"), position)
        else:
            opens, closes = character in "([{", character in ")]}"
        if depth <= 0 and not closes:
            found.append((position, character))
        depth += opens - closes
        position += len(character)
    return found


def _cut(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The pieces between the matches of `pattern` outside all brackets, and the matches."""
    if not pattern.search(text):
        return [text], []
    pieces, found, start = [], [], 0
    for position, _ in _outside(text):
        match = pattern.match(text, position)
        if match and position >= start:
            pieces.append(text[start:position].strip())
            found.append(match.group())
            start = match.end()
    return [*pieces, text[start:].strip()], found


def _item(text: str) -> Answer:
    sides, signs = _cut(text, _SIGN)
    if not signs:
        return _set(sides[0])
    if not all(sides) or len(sides) > 12:
        raise Unread("a relation with an empty side, or a long chain")
    if signs[0] == "\\in" and len(signs) == 1:
        return Relation((_side(sides[0]), read(sides[1])), ("\\in",), tuple(sides))
    return Relation(tuple(_side(side) for side in sides), tuple(signs), tuple(sides))


def _side(text: str) -> Answer:
    """One side of a relation. A name such as `f(2)`, `|AB|` or `\\text{area}` may stand on the left."""
    try:
        return _set(text)
    except Unread:
        if named(text):
            return Words(text)
        raise


def _set(text: str) -> Answer:
    parts, operations = _cut(text, _SETS)
    if operations:
        if len(set(operations)) > 1 or (operations[0] == "\\setminus" and len(parts) > 2):
            raise Unread("several operations on sets")
        return Union(operations[0], tuple(_set(part) for part in parts))
    if text == "\\mathbb{R}":
        return read("(-\\infty,\\infty)")
    matrix = _MATRIX.search(text)
    if matrix:
        return _matrix(text, matrix)
    for left, rights in _PAIRS.items():
        if text.startswith(left) and len(text) > len(left) + 1:
            for right in rights:
                if text.endswith(right) and _encloses(text):
                    return _bracketed(left, text[len(left) : -len(right)], right)
    if text.startswith("{") and text.endswith("}") and _encloses(text):
        return read(text[1:-1])
    return _single(text)


def _encloses(text: str) -> bool:
    """Whether one pair of brackets is around the whole text."""
    return len(_outside(text)) == 1


def _bracketed(left: str, inner: str, right: str) -> Answer:
    if left == "\\{":
        builder = _BUILDER.fullmatch(inner)
        if builder:
            condition = read(builder[2])
            if not isinstance(condition, Relation) or "=" in condition.signs:
                raise Unread("a set with a condition that is no inequality")
            return condition
    items = split_top(inner)
    if left == "(" and right == ")" and len(items) == 1:
        return read(inner)
    return Group(left, right, tuple(part for item in items for part in _items(item)))


def _matrix(text: str, match: re.Match[str]) -> Answer:
    before, after = text[: match.start()], text[match.end() :]
    for one, other in (("(", ")"), ("[", "]")):
        if not match[1] and before.endswith(one) and after == other:
            before, after = before[:-1], ""
    if after or (before and before != "-" and _PLAIN_WORDS.fullmatch(before)):
        raise Unread("something beside a matrix")
    rows = [row for row in re.split(r"\\\\ ?", match[3].strip()) if row.strip()]
    factor = before if before in ("", "-") else f"({before})"
    return Matrix(tuple(tuple(_set(f"{factor}({cell})") for cell in row.split("&")) for row in rows))


def _single(text: str) -> Answer:
    based = _BASE.fullmatch(text) or _BASE_WORDS.fullmatch(text)
    if based:
        base = int(based[3]) if based[3] else _BASE_NAMES.get(based[4].lower(), 0)
        if base > 1:
            return Based(based[1] + (based[2].lstrip("0") or "0"), base)
    ratio = _RATIO.fullmatch(text) if ":" in text else None
    if ratio:
        return Ratio(tuple(ratio[1].split(":")), (ratio[2] or "").lower().replace(".", ""))
    words = _words(text)
    if words is not None:
        return words
    quantity = measured(text)
    if not quantity.text:
        raise Unread("a unit without a value")
    try:
        found = formula(quantity.text)
    except NoFormula as error:
        number = NUMBER_WORDS.get(quantity.text.lower().removeprefix("\\text{").removesuffix("}"))
        if number is None:
            raise Unread(str(error)) from error
        found = formula(number)
    return Value(quantity.text, found, quantity.unit, quantity.percent, quantity.scale)


def _words(text: str) -> Answer | None:
    """A text answer, or None. Up to three small letters without a wrapper are a product of variables."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text) if "\\text" in text else text
    plain = " ".join(plain.split())
    pattern = _PLAIN_WORDS if "\\text" in text else _BARE_WORDS
    if not pattern.fullmatch(plain) or len(plain) == 1 or measured(text).unit.atoms:
        return None
    first, _, rest = plain.partition(" ")
    number, unit = NUMBER_WORDS.get(first.lower()), parse_unit(rest)
    if number is not None and unit is not None:
        return Value(number, formula(number), unit[1], scale=unit[0])
    if (
        "\\text" not in text
        and plain.lower() not in ANSWER_WORDS
        and (re.fullmatch(r"[a-z]{1,3}|[a-z]/[a-z]|[a-zA-Z][-/][a-zA-Z]", plain) or plain in FUNCTIONS)
    ):
        return None
    return Words(plain)


_GREEK_NAMES = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|chi|psi|omega|Delta|Omega|Gamma|Phi"
)
_NAMING = (
    "angle|triangle|measuredangle|overline|overrightarrow|vec|hat|widehat|bar|mathbf|mathbb|mathcal|ell|deg|arg|Re|Im"
    "|det|gcd|dim|cos|sin|tan"
)
_NO_NAME = r"not|no|isn|wrong|than|least|most|less|more|bound|except|if|or|and"
_NAME = (
    rf"(?:\\text\{{(?!(?:[\w ]* )?(?:{_NO_NAME})\b)[\w ]+\}}|\\(?:{_GREEK_NAMES}|{_NAMING})(?![a-zA-Z])"
    r"(?:\{[a-zA-Z]+\})?|[a-zA-Z])(?:_(?:\{[^{}]*\}|\w))?'*(?:\([^()=]{1,20}\))?"
)
_LEFT_SIDE = re.compile(
    rf"(?:{_NAME})(?:[-+*/: ]?(?:{_NAME}))*|\((?:{_NAME})(?:,(?:{_NAME}))*\)|\\frac\{{[a-zA-Z]+\}}\{{[a-zA-Z]+\}}"
    r"|\|(?:[A-Z]+|[zw]|\\vec\{[a-z]\}|\\(?:overline|overrightarrow)\{[A-Z]+\})\|"
)


@lru_cache(maxsize=2048)
def named(text: str) -> bool:
    """Whether the left side of an equation only names the value on the right: `x`, `f(2)`, `AB`, `a+b`, `(x,y)`."""
    return len(text) <= 80 and _LEFT_SIDE.fullmatch(text) is not None
