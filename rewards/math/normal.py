"""One spelling for what LaTeX and plain text can write in many ways; and refusal of what must not be read at all."""

from __future__ import annotations

import re
import unicodedata
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
    "∛": "\\sqrt[3]",
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
    "￥": "¥",
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
# One character for one, so that places in a text stay what they are.
SAME_CHARACTERS = str.maketrans({k: v for k, v in _PLAIN.items() if len(v) == 1})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_SPACING = re.compile(
    r"(?<!\\)\\(?:,|!|;|:|>|\s)|~|\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|hfill|displaystyle|textstyle"
    r"|limits|[hv]?phantom(?:\s*\{[^{}]*\}|\s*[^\s\\{}]))(?![a-zA-Z])"
)
_SIZING = re.compile(
    r"\\(?:left|right|middle|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr)(?![a-zA-Z])\s*\.?(?=[\s()\[\]{}|\\<>/]|$)"
)
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|textsc|emph|mbox|hbox|mathrm|mathbf|mathit|mathsf"
    r"|operatorname\*?|boldsymbol|rm|bf)\s*\{([^{}]*)\}"
)
_DOLLARS = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+?)(?<![\s\\])\$\$?(?!\d)", re.S)
_BRACKETS = re.compile(r"\\\((.*?)\\\)|(?<!\\)\\\[(.*?)\\\]", re.S)
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+)(?!\d|,\d|\{,\})")
_TUPLE = re.compile(
    r"(?<=[(\[])\d+(?:,\d{3})+(?=(?:°|\^\{?\s*\\circ\}?)?\s*(?:[)\]]|\\right))|(?<=\\\{)\d+(?:,\d{3})+(?=\\)"
)
_LONG_NUMBER = re.compile(r"\d{401}")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d ]*\d)")
_POINTED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d.,])")  # 1.234,5
FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp".split())
_BARE = re.compile(
    r"(?<![\\a-zA-Z{])(sin|cos|tan|cot|sec(?!\s*$)|csc|arcsin|arccos|arctan|ln|log|exp|sqrt|pi|infty)(?![a-zA-Z])"
)
_MATH_TEXT = re.compile(r"[-+]?[\d.,/^_]+%?|[a-zA-Z]|\([A-Za-z]\)")
_UNIT_LETTERS = frozenset("mgshlLNJWVK")  # \text{m} behind a number is a metre, not a variable
_TEXT_PIECE = re.compile(r"\s*(?:[,;]|(?<![\w])(?:and|or)(?![\w]))\s*")
_COUNTED = re.compile(r"([-+]?(?:\\?\$)?\d[\d.,/:]*%?)\s+([A-Za-z][A-Za-z .]*)")
_HEAD = re.compile(r"\\([dtc]?frac|[dt]?binom|sqrt)(?![a-zA-Z])|[\^_]")


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
    """A text wrapper: numbers, single letters and functions come out of it, its commas and conjunctions too."""
    inner = " ".join(match.group(1).split())
    if (inner in _UNIT_LETTERS or inner == "sec") and re.search(
        r"(?:[\d)}/]|\\pi)\s*$", match.string[max(0, match.start() - 9) : match.start()]
    ):
        return f"\\text{{{inner}}}"
    if inner in FUNCTIONS:
        return f"\\{inner} "
    pieces = _TEXT_PIECE.split(inner)
    return " and ".join(_worded(piece.strip()) for piece in pieces) if len(pieces) > 1 else _worded(inner)


def _worded(piece: str) -> str:
    if _MATH_TEXT.fullmatch(piece):
        return piece + " "
    power = re.fullmatch(r"([A-Za-z/ .]*[A-Za-z])\^(\d)", piece)
    if power:
        return f"\\text{{{power[1]}}}^{power[2]}"
    counted = _COUNTED.fullmatch(piece)
    if counted:
        return f"{counted[1]}\\text{{{counted[2]}}}"
    return f"\\text{{{piece}}}" if piece else ""


def _braced(text: str) -> str:
    """Every argument of a fraction, root, binomial, power and index in braces: `\\frac\\pi4`, `x^10`, `\\sqrt2`."""
    pieces, position = [], 0
    while match := _HEAD.search(text, position):
        pieces.append(text[position : match.start()])
        command, position = match[1], match.end()
        pieces.append("\\" + command.lstrip("dtc") if command else match[0])
        if command == "sqrt" and re.match(r"\s*\[", text[position:]):
            opening = text.index("[", position)
            close = _closed(text, opening)
            pieces.append(f"[{_braced(text[opening + 1 : close])}]")
            position = close + 1
        for _ in range(2 if command and command != "sqrt" else 1):
            argument, position = _argument(text, position, match[0] if not command else command)
            pieces.append(argument)
    return "".join(pieces) + text[position:]


def _argument(text: str, position: int, head: str) -> tuple[str, int]:
    """The braced argument at `position` and where it ends; nothing where there is none."""
    while text[position : position + 1] == " ":
        position += 1
    first = text[position : position + 1]
    if first == "{" or (first == "(" and head in ("sqrt", "^")):
        close = _closed(text, position)
        return "{" + _braced(text[position + 1 : close]) + "}", close + 1
    if first == "\\":
        command = re.match(r"\\(?:[a-zA-Z]+|.)", text[position:], re.S)
        if command is None or command[0] in ("\\{", "\\}", "\\\\"):
            return "", position
        end = position + command.end()
        if command[0] in ("\\frac", "\\sqrt", "\\text", "\\overline", "\\mathrm"):
            inner, end = _argument(text, end, command[0][1:])
            if command[0] == "\\frac":
                second, end = _argument(text, end, "frac")
                inner += second
            return "{" + command[0] + inner + "}", end
        return "{" + command[0] + "}", end
    digits = {"sqrt": r"\d+(?:\.\d+)?|[a-zA-Z]", "^": r"[-+]?\d+|-?[a-zA-Z]", "_": r"\d+|[a-zA-Z]"}
    found = re.match(digits.get(head, r"[0-9a-zA-Z]"), text[position:])
    return ("{" + found[0] + "}", position + found.end()) if found else ("", position)


def closing(text: str, opening: int, limit: int = MAX_CHARACTERS) -> int | None:
    """Where the bracket at `opening` closes, None when it does not within `limit` characters."""
    left = text[opening]
    right, depth, position = _CLOSERS[left], 0, opening
    while position < min(len(text), opening + limit):
        if text[position] == "\\":
            position += 2
            continue
        depth += (text[position] == left) - (text[position] == right)
        if depth == 0:
            return position
        position += 1
    return None


def _closed(text: str, opening: int) -> int:
    close = closing(text, opening)
    if close is None:
        raise Unreadable("a bracket that is not closed")
    return close


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
    if _LONG_NUMBER.search(text):
        raise Unreadable("a number of more than 400 digits")
    for _ in range(5):  # what one rule leaves may be read by another; a second pass usually changes nothing
        before, text = text, _respell(text)
        if text == before:
            return text
    raise Unreadable("a spelling that every reading changes")


def _respell(text: str) -> str:
    text = strip_delimiters(visible(text))
    _bound_depth(text)
    if "\\\\" in text and "\\begin" not in text:  # escaped once too often, as in some data sets
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    if "$" in text:
        text = re.sub(r"(?<!\\)\$", r"\\$", _DOLLARS.sub(r" \1 ", text))  # what is left is money
    text = _BRACKETS.sub(lambda m: f" {m[1] or m[2]} ", text) if "\\(" in text or "\\[" in text else text
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text) if "\\boxed" in text else text
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})+(?=\d{3}(?!\d))", ",", text)  # 49,\!479 and 1\,000 -> 1,000
    text = re.sub(r",\s*\\!\s*", ",", text)
    text = _TUPLE.sub(lambda m: m[0].replace(",", ";"), text)
    text = re.sub(r"(?<=\d),\s+(?=\d{3}(?!\d))", ";", text)  # 81, 256 is a list, 81,256 a number
    text = _SIZING.sub("", _SPACING.sub(" ", text))
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\lbrack", "[").replace("\\rbrack", "]")
    text = text.replace("\\lvert", "|").replace("\\rvert", "|").replace("\\vert", "|")
    text = re.sub(r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le", text)
    text = re.sub(r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge", text)
    text = re.sub(r"\\neq(?![a-zA-Z])|!=", r"\\ne ", text).replace("<=", "\\le ").replace(">=", "\\ge ")
    text = re.sub(r"\\lt(?![a-zA-Z])", "<", re.sub(r"\\gt(?![a-zA-Z])", ">", text))
    text = re.sub(r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus ", text)
    text = _WRAPPER.sub(_wrapped, text)
    text = text.replace("\\%", "%").replace("\\#", "#").replace("\\&", "&")
    text = re.sub(r"\\(?:euro?|texteuro)(?![a-zA-Z])", "€", re.sub(r"\\(?:pounds|textsterling)(?![a-zA-Z])", "£", text))
    text = re.sub(
        r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])|\\text\{degrees?\}|(?<=[\d}) ])degrees?$", "°", text
    )
    text = re.sub(r"(?<=[\d}) ])\s*(?:percentage|percent|pct)\b|\\text\{(?:percent|percentage|pct)\}", "%", text)
    text = _BARE.sub(r"\\\1 ", text)
    text = text.replace("\\infin ", "\\infty ").replace("\\dots", "\\ldots").replace("\\cdots", "\\ldots")
    text = _POINTED_THOUSANDS.sub(lambda m: m[1].replace(".", "") + "." + m[2], text)
    text = _THOUSANDS.sub(lambda m: m.group(1).replace("{,}", "").replace(",", ""), text)
    text = _SPACED_THOUSANDS.sub(lambda m: m.group(1).replace(" ", ""), text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text)
    text = _braced(text) if _HEAD.search(text) else text
    text = re.sub(r"\\frac\{\\text\{(\w+)\}\}\{(?:\\text\{)?([a-z]+)\}?(\^\{\d\})? ?\}", r"\\text{\1/\2}\3", text)
    text = re.sub(r"\s*\\\\(?:\[[^\]]{1,8}\])?\s*", r"\\\\ ", text)  # the end of a matrix row
    text = " ".join(text.split())
    text = re.sub(r"\s*([-+*/=<>^_,;:|()\[\]{}%!&°])\s*", r"\1", text)
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
    """What two spellings of the same characters share: no spaces, no text wrappers."""
    bare = re.sub(r"(?<=[\d.}]) +(?=[\d.{])", "_", _TEXT.sub(r"\1", text))  # 4 2 is not 42
    return re.sub(r"\s+", "", bare)
