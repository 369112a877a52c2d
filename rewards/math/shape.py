"""What kind of thing an answer is: its container, its parts, its symbols; and whether a prediction has the gold's
shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.math.normal import Unreadable, measured
from rewards.math.rational import rational

_CHOICE = re.compile(r"\(?([A-J])\)?[.):]?")
_BASE = re.compile(r"([0-9A-F]+)_(?:\{?(\d{1,2})\}?|\{?\\text\{(\w+)\}\}?)")
_BASE_NAMES = {n: i for i, n in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)} | {
    "sixteen": 16
}
_RELATION = re.compile(
    r"\\(?:le|ge|ne|approx|equiv|in|notin|to|rightarrow|Rightarrow|implies|iff|subset|subseteq|sim|cong|propto|mid"
    r"|parallel|perp)(?![a-zA-Z])|[=<>]"
)
_ORDER = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]")
_WORDS = re.compile(r"\\text\{[^{}]*\}|(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_KNOWN_WORDS = frozenset("sin cos tan cot sec csc log ln exp pi sqrt frac i e".split())
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_AND = re.compile(r",?\s*\\text\{\s*(?:and|or|,|;)\s*\}\s*|,?\s+(?:and|or)\s+|(?<=[\d)}])(?:and|or)(?=[\d(\\-])")
_GREEK = (
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi chi psi omega Delta Omega Gamma Phi"
).split()
_NAMING = (
    "angle triangle measuredangle overline overrightarrow vec hat widehat bar mathbf mathbb mathcal ell deg arg Re Im "
    "det gcd dim"
).split()
_NAME_COMMANDS = "|".join(_GREEK + _NAMING)
_NO_NAME = r"not|no|isn|wrong|than|least|most|less|more|bound|except|if|or|and"
_NAME = (
    rf"(?:\\text\{{(?!(?:[\w ]* )?(?:{_NO_NAME})\b)[\w ]+\}}|\\(?:{_NAME_COMMANDS})"
    rf"(?![a-zA-Z])(?:\{{[a-zA-Z]+\}})?|[a-zA-Z])"
    r"(?:_(?:\{[^{}]*\}|\w))?'*(?:\([^()=]{1,20}\))?"
)
# What `... = value` may have on its left: names and products or sums of names, |AB|, (x,y), a fraction of letters.
_LEFT_SIDE = re.compile(
    rf"(?:{_NAME})(?:\s*[-+*/: ]?\s*(?:{_NAME}))*|\((?:{_NAME})(?:,(?:{_NAME}))*\)|\\frac\{{[a-zA-Z]+\}}\{{[a-zA-Z]+\}}"
    r"|\|(?:[A-Z]+|[zw]|\\vec\{[a-z]\}|\\(?:overline|overrightarrow)\{[A-Z]+\})\|"
)
_NUMBERS_BY_NAME = re.compile(r"\\(?:pi|frac|sqrt|infty|log|ln|sin|cos|tan)(?![a-zA-Z])")
_PAIRS = {"(": ")", "[": "]", "\\{": "\\}"}
_SYMBOL_COMMANDS = frozenset(_GREEK)


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
    r"""The exact values of `x = a = b \approx c`, without the name and what is behind `\approx`; None when it is no
    chain.

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
    found = set(
        re.findall(
            r"[a-zA-Z]",
            _COMMAND.sub(" ", re.sub(r"(?<![\\a-zA-Z])(?:sin|cos|tan|log|ln|exp|sqrt|pi)(?![a-zA-Z])", " ", bare)),
        )
    )
    found |= {c[1:] for c in _COMMAND.findall(bare) if c[1:] in _SYMBOL_COMMANDS}
    return frozenset(found - {"e", "i"})


def words(text: str) -> list[str]:
    """Words in a canonical text: text wrappers and runs of letters that are no known function."""
    return [w for w in _WORDS.findall(text) if w.lower() not in _KNOWN_WORDS]


_LEFT_TO_DO = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|limsup|liminf|bigcup|bigcap)(?![a-zA-Z])")
_TOWER = re.compile(
    r"\d\s*[)}\]]*\^\s*\{?\(*-?\d+[)}]*\s*\^|\^\{[^{}]*\d\s*\^|\^[^a-zA-Z]{0,40}\^\{?\d|[)}\]]\s*\^\s*\{?\d{3,}"
)
_NESTED_FACTORIAL = re.compile(r"!\s*[)}\]]*\s*!|\^\{?\(*\d+!|![^a-zA-Z]{0,10}\^")


def guard(text: str, gold: str) -> None:
    """Raises Unreadable for what a computer algebra system should not even parse: what is much longer than the gold
    answer, towers, large exponents and factorials, chains of equations, integrals that the gold does not have."""
    if len(text) > 300 + 4 * len(gold):
        raise Unreadable(f"{len(text)} characters where the gold has {len(gold)}")
    if re.search(r"\d{400}", text):
        raise Unreadable("an integer of more than 400 digits")
    if text.count("=") > 10 + gold.count("=") or text.count("\\pm") > 6 + gold.count("\\pm"):
        raise Unreadable("a long chain of equations or ±")
    if _LEFT_TO_DO.search(text) and not _LEFT_TO_DO.search(gold):
        raise Unreadable("an operator that is left to be worked out")
    if any(len(digits) > 4 for digits in re.findall(r"\^\s*\{?\s*\(?\s*-?\s*(\d+)", text)):
        raise Unreadable("an exponent above 9999")
    if _TOWER.search(text):
        raise Unreadable("a tower of powers")
    if any(len(digits) > 4 or int(digits) > 1_000 for digits in re.findall(r"(\d+)\s*[})]*\s*!", text)):
        raise Unreadable("the factorial of a number above 1000")
    if _NESTED_FACTORIAL.search(text):
        raise Unreadable("a factorial of a factorial or in a power")
    if re.search(r"\\binom\s*\{(?:[^{}]*[\^!]|\d{5,})", text):
        raise Unreadable("a binomial of a number above 9999")


def _rounds(text: str) -> bool:
    """Whether what stands behind each `\\approx` is within 1 % of what stands before it, where both are rational."""
    values = [rational(side) for side in re.split(r"=|\\approx(?![a-zA-Z])", text)]
    known = [value for value in values if value is not None]
    return all(abs(value - known[0]) * 100 <= abs(known[0]) for value in known)


_PREFIX_IN = re.compile(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_PLAIN_COMMANDS = frozenset(
    "frac sqrt cdot times div pi infty text sin cos tan cot sec csc ln log exp arcsin arccos arctan cup pm".split()
)
_SIDE_BY_SIDE = re.compile(r"[\d}] +[\d.]")
_LOG_BASE = re.compile(r"\\log_(?:\w|\{\w+\}) ?")
_ODD_CHARACTER = re.compile(r"[^A-Za-z0-9+\-*/^(){}\[\]=<>.,!\\ %_]")


def mismatch(gold: str, prediction: str, inexact: bool = False) -> str | None:
    """Why a prediction cannot be *the one* answer that a gold of this shape asks for; None when it may be.

    Both are canonical. This is where stuffing ends: lists, sets, ranges and relations are answers only where the gold
    is one too, and words, symbols, commands or signs that the gold does not have are no part of a value. `inexact` lets
    a decimal stand for an exact value.
    """
    gold_value, value = measured(gold, any_unit=True).text, measured(prediction).text
    if re.search(r"[-+] ?[-+]", value) and not re.search(r"[-+] ?[-+]", gold_value):
        return "two signs in a row"
    if re.search(r"^[,;]|[,;]$|[,;] *[,;]", value):
        return "a list with an empty place"
    gold_parts = container(gold_value)
    gold_relates = bool(_RELATION.search(gold_value))
    if not gold_relates and _RELATION.search(value):
        pieces = split_top(value)
        chains = [values_of_chain(piece) for piece in pieces]
        if _PREFIX_IN.match(value) and (gold_parts.left or "\\cup" in gold_value):
            value = _PREFIX_IN.sub("", value)
        elif len(pieces) == 1 and chains[0] is not None:
            if not _rounds(value):
                return "an approximation of something else"
            return next((why for side in chains[0] if (why := mismatch(gold, side, inexact)) is not None), None)
        elif (
            len(pieces) > 1
            and len(pieces) == len(gold_parts.parts)
            and all(c is not None and len(c) == 1 for c in chains)
        ):
            value = ",".join(chain[0] for chain in chains if chain)
        else:
            return "a relation where a value is asked for"
    if rational(value) is not None and rational(gold_value) is not None:
        return None
    if rational(value) is not None and not gold_relates and not _foreign(gold_value, value, gold_relates, inexact):
        return None if len(gold_parts.parts) < 2 or "\\pm" in gold_value else "one value where more are asked for"
    return _foreign(gold_value, value, gold_relates, inexact) or (
        None if gold_relates else _other_container(gold_value, value)
    )


def _other_container(gold: str, value: str) -> str | None:
    ours, parts = container(gold), container(value)
    free = "\\pm" in gold or ("\\pm" in value and len(ours.parts) > 1)
    if "\\pm" in value and not free:
        return "a range (±) where one value is asked for"
    if len(parts.parts) != len(ours.parts) and not free:
        return f"{len(parts.parts)} values where {len(ours.parts)} are asked for"
    if (parts.left, parts.right) != (ours.left, ours.right):
        bare = not parts.left or not ours.left
        if not (bare and len(parts.parts) > 1 and "[" not in (parts.left, ours.left)):
            return f"brackets {parts.left}{parts.right} where the gold has {ours.left}{ours.right}"
    return None


def _foreign(gold: str, value: str, gold_relates: bool, inexact: bool) -> str | None:
    """What a value contains that is no part of a plain one and that the gold does not have either."""
    bare = _AND.sub(",", value)
    if words(bare) and not words(_AND.sub(",", gold)):
        return f"words in a value: {words(bare)[0]!r}"
    commands = {c[1:] for c in _COMMAND.findall(bare)} - {c[1:] for c in _COMMAND.findall(gold)}
    unknown = commands - _PLAIN_COMMANDS - _SYMBOL_COMMANDS - ({"in", "le", "ge", "ne"} if gold_relates else set())
    if "begin" in gold:
        unknown -= {"begin", "end"}
    if unknown:
        return f"\\{sorted(unknown)[0]}, which the gold does not have"
    if value.count("\\{") > gold.count("\\{") + ("\\{" not in gold):
        return "a set inside"
    if not inexact and re.fullmatch(r"-?\d*\.\d{3,}", value) and "." not in gold and rational(gold) is None:
        return "a decimal where the gold is exact"
    odd = set(_ODD_CHARACTER.findall(value)) - set(gold)
    if odd:
        return f"the character {sorted(odd)[0]!r}, which the gold does not have"
    if "\\\\" in value and "\\\\" not in gold:
        return "several lines"
    if _SIDE_BY_SIDE.search(_LOG_BASE.sub("", value)) and not _SIDE_BY_SIDE.search(_LOG_BASE.sub("", gold)):
        return "numbers side by side"
    if re.search(r"(?<![A-Za-z])_|\d_", value) and "_" not in gold:
        return "a subscript on a number"
    extra = symbols(value) - symbols(gold)
    if extra and not gold_relates and not words(gold):
        return f"symbols that the gold does not have: {sorted(extra)}"
    return None
