"""One spelling for what LaTeX and plain text can write in many ways; and refusal of what must not be read at all."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

MAX_CHARACTERS = 3_000
MAX_DEPTH = 60


class Unreadable(ValueError):
    """A text that no honest answer looks like: too long, too deep, invisible characters, foreign digits, too large."""


_PLAIN = {
    "−": "-",
    "–": "-",
    "‐": "-",
    "‑": "-",
    "﹣": "-",
    "－": "-",
    "＋": "+",
    "×": "\\times ",
    "✕": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "÷": "\\div ",
    "∕": "/",
    "⁄": "/",
    "√": "\\sqrt ",
    "π": "\\pi ",
    "θ": "\\theta ",
    "α": "\\alpha ",
    "β": "\\beta ",
    "λ": "\\lambda ",
    "∞": "\\infty ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "⩽": "\\le ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "±": "\\pm ",
    "°": "^\\circ ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "½": "\\frac{1}{2}",
    "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "，": ",",
    "．": ".",
    "％": "%",
    "（": "(",
    "）": ")",
    "［": "[",
    "］": "]",
    "＝": "=",
    "／": "/",
    "＾": "^",
    "’": "'",
    "′": "'",
    "“": '"',
    "”": '"',
    "ℝ": "\\mathbb{R}",
    "€": "\\$",
    "£": "\\$",
    "￥": "\\$",
    "¥": "\\$",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "\u3000": " ",
    "\u2002": " ",
    "\u2003": " ",
}
_PLAIN |= {chr(0xFF10 + d): str(d) for d in range(10)}  # full-width digits
_PLAIN |= {chr(0xFF21 + i): chr(65 + i) for i in range(26)} | {chr(0xFF41 + i): chr(97 + i) for i in range(26)}
_TABLE = str.maketrans(_PLAIN)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_SPACING = re.compile(
    r"(?<!\\)\\(?:,|!|;|:|>|\s)|~|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|hfill|displaystyle|textstyle"
    r"|limits)(?![a-zA-Z])"
)
_SIZING = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr)(?![a-zA-Z])\s*\.?(?=[\s()\[\]{}|\\<>/]|$)"
)
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|textsc|emph|mbox|hbox|mathrm|mathbf|mathit|mathsf"
    r"|operatorname\*?|boldsymbol|rm|bf)\s*\{([^{}]*)\}"
)
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FRAC_DIGITS = re.compile(r"\\frac\s*([0-9])\s*([0-9])")
_FRAC_FIRST = re.compile(r"\\frac\s*([0-9a-zA-Z])\s*(?=\{)")
_FRAC_SECOND = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z])")
_SQRT_BARE = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+)(?!\d|,\d|\{,\})")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d ]*\d)")
_BRACED_CHARACTER = re.compile(r"([\^_])\{([0-9a-zA-Z])\}")
_FUNCTIONS = frozenset(
    (
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lg gcd lcm min max det mod deg dim ker"
    ).split()
)
_MATH_TEXT = re.compile(r"[-+]?[\d.,/^]+%?|[a-zA-Z]|\([A-Za-z]\)")


def visible(text: str) -> str:
    """`text` with one character per meaning; raises Unreadable for invisible characters and digits of other scripts."""
    if text.isascii():
        if any(ord(c) < 32 and c not in "\t\n\r\f\v" for c in text) or "\x7f" in text:
            raise Unreadable("a control character")
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text).translate(_TABLE)
    for character in text:
        if character.isascii():
            continue
        category = unicodedata.category(character)
        if category in ("Cf", "Cc", "Co", "Cn", "Cs", "Mn", "Me", "Zl", "Zp"):
            raise Unreadable(f"an invisible or combining character U+{ord(character):04X}")
        if category in ("Nd", "Nl", "No") or unicodedata.normalize("NFKC", character)[:1].isdigit():
            raise Unreadable(f"a digit of another script, {character!r} (U+{ord(character):04X})")
        if (
            unicodedata.normalize("NFKD", character)[:1].isascii()
            and unicodedata.normalize("NFKD", character).isalnum()
        ):
            raise Unreadable(f"a letter in disguise, {character!r} (U+{ord(character):04X})")
    return text


def _wrapped(match: re.Match[str]) -> str:
    inner = match.group(1).strip()
    if _MATH_TEXT.fullmatch(inner):
        return inner + " "
    if inner in _FUNCTIONS:
        return f"\\{inner} "
    return f"\\text{{{' '.join(inner.split())}}}"


def strip_delimiters(text: str) -> str:
    """`text` without one pair of math delimiters, a bold marker or a final full stop around the whole of it."""
    before = None
    while before != text:
        before, text = text, text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`")):
            inner = text[len(left) : -len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                escaped = right == "$" and text.endswith("\\$")
                if left not in inner.replace("\\$", "") and right not in inner.replace("\\$", "") and not escaped:
                    text = inner
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
    return text


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """The canonical spelling of one answer: no sizing or spacing, `\\frac{a}{b}`, `\\sqrt{a}`, `\\text{words}`
    and plain thousands, single spaces only where they separate. Idempotent. Raises Unreadable.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    for _ in range(5):  # what one rule leaves may be read by another; a second pass usually changes nothing
        before, text = text, _respell(text)
        if text == before:
            return text
    raise Unreadable("a spelling that every reading changes")


def _respell(text: str) -> str:
    text = strip_delimiters(visible(text))
    _bound_depth(text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text) if "\\boxed" in text else text
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})+(?=\d{3}(?!\d))", ",", text)  # 49,\!479 and 1\,000 -> 1,000
    text = re.sub(r",\s*\\!\s*", ",", text)
    text = _SPACING.sub(" ", text)
    text = _SIZING.sub("", text)
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\lbrack", "[").replace("\\rbrack", "]")
    text = re.sub(r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le", text)
    text = re.sub(r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge", text)
    text = re.sub(r"\\neq(?![a-zA-Z])|!=", r"\\ne ", text).replace("<=", "\\le ").replace(">=", "\\ge ")
    text = re.sub(r"\\lt(?![a-zA-Z])", "<", re.sub(r"\\gt(?![a-zA-Z])", ">", text))
    text = _WRAPPER.sub(_wrapped, text)
    text = re.sub(r"\\(?:text|mathrm)\{\}", "", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("\\#", "#").replace("\\&", "&")
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])", r"\\text{degrees}", text)
    text = re.sub(r"(?<=[\d}) ])\s*(?:percentage|percent|pct)\b|\\text\{(?:percent|percentage|pct)\}", "%", text)
    text = _FRAC.sub(r"\\frac", text)
    text = _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", text)
    text = _FRAC_FIRST.sub(r"\\frac{\1}", text)
    text = _FRAC_SECOND.sub(r"\1{\2}", text)
    text = _SQRT_BARE.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+\{", r"\\sqrt{", text)
    text = text.replace("\\infin ", "\\infty ").replace("\\dots", "\\ldots").replace("\\cdots", "\\ldots")
    text = _THOUSANDS.sub(lambda m: m.group(1).replace("{,}", "").replace(",", ""), text)
    text = _SPACED_THOUSANDS.sub(lambda m: m.group(1).replace(" ", ""), text)
    text = _BRACED_CHARACTER.sub(r"\1\2", text)
    text = re.sub(r"\s*\\\\(?:\[[^\]]{1,8}\])?\s+", r"\\\\ ", text)  # the end of a matrix row
    text = " ".join(text.split())
    text = re.sub(r"\s*([-+*/=<>^_,;:|()\[\]{}%!&])\s*", r"\1", text)
    text = re.sub(r"(?<=[^a-zA-Z\\ ]) (?=\\)|(?<=\\\}) ", "", text)
    return text.strip()


def _bound_depth(text: str) -> None:
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(f"brackets nested deeper than {MAX_DEPTH}")
        elif character in ")]}":
            depth -= 1


_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def key(text: str) -> str:
    """What two spellings of the same characters share: no spaces, no text wrappers, words in lower case."""
    bare = _TEXT.sub(lambda m: m.group(1).lower() if len(m.group(1)) > 2 else m.group(1), text)
    words = re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,}", bare)
    bare = re.sub(r"(?<=[\d.}]) +(?=[\d.{])", "_", bare)  # 4 2 is not 42
    return re.sub(r"\s+", "", bare.lower() if words else bare)


@dataclass(frozen=True)
class Measured:
    """A value's text and the unit written behind (or, for money, in front of) it; `percent` for a % sign."""

    text: str
    unit: str = ""
    percent: bool = False
    scale: int = 1


_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PHYSICAL = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "g": "g gram",
    "kg": "kg kilogram",
    "mg": "mg milligram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "ml": "ml milliliter",
    "l": "l liter litre",
    "gal": "gallon gal",
    "mph": "mph",
    "kph": "kph",
    "deg": "degree deg",
    "rad": "radian rad",
    "dollar": "dollar buck usd",
    "cent": "cent",
    "euro": "euro",
    "unit": "unit",
}
_UNIT_OF = {name: unit for unit, names in _PHYSICAL.items() for name in names.split()}
_NOUNS = frozenset(
    (
        "people men women children feet units unit way sq square cubic per more points each total person student apple"
    ).split()
)
# Plural words that change a number instead of counting something.
_NO_NOUNS = frozenset(
    "hundreds thousands millions billions dozens halves thirds fourths quarters fifths sixths sevenths eighths"
    " ninths tenths twelfths "
    "times minus plus less is was his this thus has does yes guess wrongs unless perhaps always sometimes"
    " plusminus percents scores "
    "pairs cos sins logs decimals digits places squares cubes powers mods bases roots tenth".split()
)
_TAIL = re.compile(
    r"^(?P<value>.*?[\d)}%!.])\s*(?:\\text\{(?P<text>[^{}]*)\}|(?P<words>[a-zA-Z][a-zA-Z. ]+))(?:\^(?P<power>[23]))?$",
    re.S,
)
_MATH_END = re.compile(r"\\[a-zA-Z]+\{[^{}]*$")


@lru_cache(maxsize=8192)
def measured(text: str, any_unit: bool = False) -> Measured:
    """Takes a trailing unit off a canonical text. Only known units and plural nouns count, words such as "not", "or",
    "minus" never do; `any_unit` (for a gold answer, which is trusted) takes any words.
    """
    unit, scale = "", 1
    if text.startswith("$") and len(text) > 1:
        text, unit = text[1:].strip(), "dollar"
    elif text.startswith("-$"):
        text, unit = "-" + text[2:].strip(), "dollar"
    match = _TAIL.match(text)
    if match:
        words = (match["text"] if match["text"] is not None else match["words"]).lower().replace(".", "").split()
        if words and words[0] in _SCALES:
            scale, words = _SCALES[words[0]], words[1:]
        in_text = match["text"] is not None
        if all(_is_unit(word, in_text) for word in words) or (
            any_unit and in_text and "and" not in words and "or" not in words
        ):
            unit = _unit(words, match["power"]) or unit
            text = match["value"].strip()
        else:
            scale = 1
    text = text.rstrip("$") if not unit and text[:1].isdigit() else text
    if text.endswith("%"):
        return Measured(text[:-1].strip(), unit, True, scale)
    return Measured(text, unit, False, scale)


def _is_unit(word: str, in_text: bool) -> bool:
    if len(word) < 2 and not in_text:
        return False
    parts = word.split("/")
    if all(part in _UNIT_OF or part.removesuffix("s") in _UNIT_OF for part in parts):
        return True
    return word in _NOUNS or (re.fullmatch(r"[a-z]{3,14}s", word) is not None and word not in _NO_NOUNS)


def _unit(words: list[str], power: str | None) -> str:
    """The canonical physical unit, such as `cm^2`; an empty string for a counted noun."""
    names = [_UNIT_OF.get(w) or _UNIT_OF.get(w.removesuffix("s")) for w in words if w not in ("square", "sq", "cubic")]
    if len(names) != 1 or names[0] is None or names[0] == "unit":
        return ""
    power = power or ("2" if "square" in words or "sq" in words else "3" if "cubic" in words else "")
    return f"{names[0]}^{power}" if power else names[0]
