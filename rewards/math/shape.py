"""What kind of thing an answer is: its container, its parts, its symbols; and whether a prediction has the gold's shape."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.math.normal import Unreadable, measured
from rewards.math.rational import rational

_CHOICE = re.compile(r"\(?([A-J])\)?[.):]?")
_BASE = re.compile(r"([0-9A-F]+)_(?:\{?(\d{1,2})\}?|\{?\\text\{(\w+)\}\}?)")
_BASE_NAMES = {n: i for i, n in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)} | {"sixteen": 16}
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv|in|notin|to|rightarrow|Rightarrow|implies|iff|subset|subseteq|sim|cong|propto|mid|parallel|perp)(?![a-zA-Z])|[=<>]")
_ORDER = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_WORDS = re.compile(r"\\text\{[^{}]*\}|(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_KNOWN_WORDS = frozenset("sin cos tan cot sec csc log ln exp pi sqrt frac i e".split())
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_AND = re.compile(r",?\s*\\text\{\s*(?:and|or|,|;)\s*\}\s*|,?\s+(?:and|or)\s+|(?<=[\d)}])(?:and|or)(?=[\d(\\-])")
_NAME = r"(?:\\text\{[\w ]+\}|\\[a-zA-Z]+(?:\{[a-zA-Z]+\})?|[a-zA-Z])(?:_(?:\{[^{}]*\}|\w))?'*(?:\([^()=]{1,20}\))?"
_LEFT_SIDE = re.compile(rf"\|?(?:{_NAME})(?:\s*[-+*/: ]?\s*(?:{_NAME}))*\|?|\((?:{_NAME})(?:,(?:{_NAME}))*\)|\\frac\{{[a-zA-Z]+\}}\{{[a-zA-Z]+\}}")
_NUMBERS_BY_NAME = re.compile(r"\\(?:pi|frac|sqrt|infty|log|ln|sin|cos|tan)(?![a-zA-Z])")
_COSTLY = re.compile(r"\\(?:int|iint|sum|prod|lim|binom|Gamma|zeta|nabla|partial|bigcup|bigcap)(?![a-zA-Z])")
_PAIRS = {"(": ")", "[": "]", "\\{": "\\}"}
_SYMBOL_COMMANDS = frozenset("alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi chi psi omega Delta Omega Gamma Phi".split())


@lru_cache(maxsize=8192)
def split_top(text: str, separators: str = ",;") -> tuple[str, ...]:
    """`text` cut at separators (and at "and", "or") that stand outside all brackets."""
    text = _AND.sub(",", text)
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
            if position < len(text) and text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in separators and depth <= 0:
            parts.append(text[start:position].strip())
            start = position + 1
        position += 1
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


@dataclass(frozen=True)
class Container:
    """Brackets (`""` for a bare list or a single value) and what is in them."""

    left: str
    right: str
    parts: tuple[str, ...]


@lru_cache(maxsize=8192)
def container(text: str) -> Container:
    """The outermost container of a canonical text. One value in round brackets is that value."""
    text = text.strip()
    for left in _PAIRS:
        if text.startswith(left) and len(text) > len(left) + 1:
            for right in (")", "]", "\\}"):
                if text.endswith(right) and _encloses(text, left, right):
                    inner = text[len(left) : -len(right)]
                    parts = split_top(inner)
                    if left == "(" and right == ")" and len(parts) == 1:
                        return container(inner)
                    return Container(left, right, parts)
    if text.startswith("{") and text.endswith("}") and _encloses(text, "{", "}"):
        return container(text[1:-1])
    parts = split_top(text)
    return Container("", "", parts)


def _encloses(text: str, left: str, right: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth, position = 0, 0
    while position < len(text):
        step = 1
        if text[position] == "\\":
            step = 2
            opened, closed = text[position : position + 2] == "\\{", text[position : position + 2] == "\\}"
        else:
            opened, closed = text[position] in "([{", text[position] in ")]}"
        if opened:
            depth += 1
        elif closed:
            depth -= 1
            if depth == 0:
                return position + step == len(text)
        position += step
    return False


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer, `C` for `(C)`, `C.` or `C`; None for anything else."""
    match = _CHOICE.fullmatch(text)
    return match.group(1) if match else None


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number such as `204_5` or `2A_{16}`; None for anything else."""
    match = _BASE.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    base = int(match.group(2)) if match.group(2) else _BASE_NAMES.get(match.group(3).lower(), 0)
    return (match.group(1).lstrip("0") or "0", base) if base > 1 else None


def values_of_chain(text: str) -> list[str] | None:
    r"""The exact values of `x = a = b \approx c`, without the name and what is behind `\approx`; None when it is no chain.

    A left side counts as a name when it is made of letters alone (`x`, `f(2)`, `AB`, `a+b`), so `17 = 42` has two
    values and `2x = 84` is not a chain at all.
    """
    if _ORDER.search(text) or not re.search(r"=|\\approx(?![a-zA-Z])", text):
        return None
    exact, _, rest = text.partition("\\approx")
    sides = [side.strip() for side in exact.split("=")]
    if rest and len(sides) == 1 and _LEFT_SIDE.fullmatch(sides[0]):
        sides += [side.strip() for side in rest.split("\\approx")]
    if any(not side for side in sides):
        return None
    left = sides[0]
    named = _LEFT_SIDE.fullmatch(left) is not None and not _NUMBERS_BY_NAME.search(left)
    if named:
        return sides[1:]
    return sides if not symbols(left) else None


@lru_cache(maxsize=8192)
def symbols(text: str) -> frozenset[str]:
    """Letters and Greek letters that stand for variables; `e`, `i` and `\\pi` are numbers."""
    bare = re.sub(r"\\text\{[^{}]*\}", " ", text)
    found = set(re.findall(r"[a-zA-Z]", _COMMAND.sub(" ", re.sub(r"(?<![\\a-zA-Z])(?:sin|cos|tan|log|ln|exp|sqrt|pi)(?![a-zA-Z])", " ", bare))))
    found |= {c[1:] for c in _COMMAND.findall(bare) if c[1:] in _SYMBOL_COMMANDS}
    return frozenset(found - {"e", "i"})


def words(text: str) -> list[str]:
    """Words in a canonical text: text wrappers and runs of letters that are no known function."""
    return [w for w in _WORDS.findall(text) if w.lower() not in _KNOWN_WORDS]


def guard(text: str) -> None:
    """Raises Unreadable for what a computer algebra system should not even parse: towers, huge exponents, factorials."""
    if re.search(r"\d{400}", text):
        raise Unreadable("an integer of more than 400 digits")
    if len(text) > 1_500:
        raise Unreadable(f"{len(text)} characters of mathematics")
    for match in re.finditer(r"\^\s*\{?\s*\(?\s*-?\s*(\d+)", text):
        if len(match.group(1)) > 4:
            raise Unreadable("an exponent above 9999")
    if re.search(r"\^\{?[^{}]*\d[^{}]*\^\{?[^{}]*\d", text) and re.search(r"\d\s*\}?\^|\^[^a-zA-Z]*\^", text) and text.count("^") > 1:
        if re.search(r"\d\^\{?\d+\^|\^\{[^{}]*\d\s*\^|\)\^\{?\d{3,}", text):
            raise Unreadable("a tower of powers")
    for match in re.finditer(r"(\d+)\s*[})]*\s*!", text):
        if int(match.group(1)[:9]) > 1_000 or len(match.group(1)) > 4:
            raise Unreadable("the factorial of a number above 1000")
    if re.search(r"!\s*[)}\]]*\s*!|\^[^!]{0,40}!\s*[)}]*\s*!", text) or re.search(r"\^\{?\(?\d+!", text):
        raise Unreadable("a factorial of a factorial or in an exponent")
    if re.search(r"\d\s*[)}\]]*\^\{?\(*\d+[)}]*\^", text):
        raise Unreadable("a tower of powers")
    if re.search(r"[)}\]]\s*\^\s*\{?\d{3,}", text):
        raise Unreadable("a bracket to a power above 99")
    if re.search(r"\\binom\{\d{5,}\}|\\binom\{[^{}]*[\^!]", text):
        raise Unreadable("a binomial of a number above 9999")


def _rounds(text: str) -> bool:
    """Whether what stands behind each `\\approx` is within 1 % of what stands before it, as far as both are rational."""
    values = [rational(side) for side in re.split(r"=|\\approx(?![a-zA-Z])", text)]
    known = [value for value in values if value is not None]
    return all(abs(value - known[0]) * 100 <= abs(known[0]) for value in known)


def mismatch(gold: str, prediction: str) -> str | None:
    """Why a prediction cannot be *the one* answer that a gold of this shape asks for; None when it may be.

    Both are canonical. This is where stuffing ends: lists, sets, ranges and relations are answers only where the gold
    is one too, and words or symbols that the gold does not have are no part of a value.
    """
    gold_value, value = measured(gold, any_unit=True).text, measured(prediction).text
    gold_parts, parts = container(gold_value), container(value)
    gold_relates, relates = bool(_RELATION.search(gold_value)), bool(_RELATION.search(value))
    if relates and not gold_relates:
        chain = values_of_chain(value)
        if "\\in" in value and gold_parts.left + gold_parts.right or "\\cup" in gold_value:
            value = re.sub(r"^[a-zA-Z]\\in\s*", "", value)
        elif chain is None and len(gold_parts.parts) > 1 and all(values_of_chain(p) is not None for p in split_top(value)):
            value = ",".join((values_of_chain(p) or [p])[-1] for p in split_top(value))
        elif chain is None:
            return "a relation where a value is asked for"
        else:
            if not _rounds(value):
                return "an approximation of something else"
            return next((why for side in chain if (why := mismatch(gold, side)) is not None), None)
        parts = container(value)
    free = "\\pm" in gold_value or "\\pm" in value
    if "\\pm" in value and "\\pm" not in gold_value and len(gold_parts.parts) < 2:
        return "a range (±) where one value is asked for"
    if len(parts.parts) != len(gold_parts.parts) and not free and not gold_relates:
        return f"{len(parts.parts)} values where {len(gold_parts.parts)} are asked for"
    if (parts.left, parts.right) != (gold_parts.left, gold_parts.right) and not gold_relates:
        bare = not parts.left or not gold_parts.left
        if not (bare and len(parts.parts) > 1 and "[" not in (parts.left, gold_parts.left)):
            return f"brackets {parts.left}{parts.right} where the gold has {gold_parts.left}{gold_parts.right}"
    if words(value) and not words(gold_value) and not gold_relates:
        return f"words in a value: {words(value)[0]!r}"
    extra = symbols(value) - symbols(gold_value)
    if extra and not gold_relates and not words(gold_value):
        return f"symbols that the gold does not have: {sorted(extra)}"
    if _COSTLY.search(value) and not _COSTLY.search(gold_value):
        return "an operator that is left to be worked out"
    return None
