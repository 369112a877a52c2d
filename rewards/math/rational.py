"""Exact values of arithmetic in LaTeX or plain text, without sympy and within bounds."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, isqrt

from rewards.math.cursor import MAX_TOKENS, Cursor
from rewards.math.normal import MAX_DEPTH, Unreadable

MAX_BITS = 20_000  # of a numerator or denominator, on the way too
MAX_FACTORIAL = 1_000


class TooLarge(Unreadable):
    """A value that would need more than MAX_BITS; nobody's answer, and not computed."""


class _NoNumber(Exception):
    """The text is not arithmetic on rational numbers: letters, roots that stay, relations."""


_TOKEN = re.compile(
    r"(?P<repeat>\d*\.\d*\\overline\{\d{1,60}\}|\d*\.\d*\(\d{1,60}\))"
    r"|(?P<number>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<word>\\(?:frac|sqrt|cdot|times|div|binom)(?![a-zA-Z]))"
    r"|(?P<sign>[-+*/^(){}\[\]!])"
    r"|(?P<space>\s+)"
)
_EXPONENT = re.compile(r"(?<![\dA-Za-z.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\dA-Za-z.])")
_MIXED = re.compile(r"^(-?)(\d{1,9})(?:\s+(\d{1,9})/(\d{1,9})|\s*\\frac\{(\d{1,9})\}\{(\d{1,9})\})$")
_WHOLE = re.compile(r"[-+]?\d+")


@lru_cache(maxsize=16384)
def rational(text: str) -> Fraction | None:
    """The exact value of a canonical text, or None when it is not arithmetic on rational numbers.

    Integers, decimals, repeating decimals (`0.1\\overline{6}`, `0.(3)`), scientific notation, mixed numbers, fractions,
    powers, roots that come out, factorials and binomials. Raises TooLarge before it computes anything out of bounds.
    """
    if len(text) > 1 and len(text) * 3.33 > MAX_BITS:
        raise TooLarge(f"an expression of {len(text)} characters")
    mixed = _MIXED.match(text)
    if mixed:
        sign, whole, *parts = mixed.groups()
        top, bottom = (int(part) for part in parts if part)
        if 0 < top < bottom:
            value = int(whole) + Fraction(top, bottom)
            return -value if sign else value
        if "\\" not in text:
            return None  # 3 9/4 is neither a mixed number nor a product that anybody writes
    text = _EXPONENT.sub(r"(\1*10^{\2})", text)
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match.lastgroup != "space":
            tokens.append((match.lastgroup or "", match.group()))
        elif tokens and tokens[-1][0] == "number" and position < len(text) and text[position] in "0123456789.":
            return None  # two numbers side by side
    if not tokens:
        return None
    if len(tokens) > MAX_TOKENS:
        raise TooLarge(f"arithmetic with {len(tokens)} symbols")
    reader = _ExactValue(tokens)
    try:
        value = reader.sum(0)
    except (_NoNumber, ZeroDivisionError):
        return None
    return value if reader.ended else None


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS} bits")
    return value


class _ExactValue(Cursor):
    """Recursive descent with fractions, none of them out of bounds."""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise _NoNumber
        self.at += 1

    def sum(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise TooLarge(f"nested deeper than {MAX_DEPTH}")
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = self.peek()
            self.at += 1
            term = self.product(depth)
            value = _bounded(value + term if sign == "+" else value - term)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while True:
            sign = self.peek()
            if sign in ("*", "\\cdot", "\\times"):
                self.at += 1
                value = _bounded(value * self.signed(depth))
            elif sign in ("/", "\\div"):
                self.at += 1
                value = _bounded(value / self.signed(depth))
            elif sign in ("(", "\\sqrt", "\\binom") or (sign == "\\frac" and self.tokens[self.at - 1][1] in ")}"):
                value = _bounded(value * self.power(depth))  # 2(3), 3\sqrt{4}; a digit before \frac is a mixed number
            else:
                return value

    def signed(self, depth: int) -> Fraction:
        if self.peek() not in ("+", "-"):
            return self.power(depth)
        sign = -1 if self.peek() == "-" else 1
        self.at += 1  # a second sign is not arithmetic: power() refuses it
        return sign * self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.postfix(depth)
        if self.peek() != "^":
            return base
        self.at += 1
        if self.peek() == "{":
            exponent = self.group("{", "}", depth)
        elif self.peek() == "-":  # 2^-3
            self.at += 1
            exponent = -self.atom(depth)
        else:
            exponent = self.atom(depth)
        if self.peek() == "^":
            raise _NoNumber
        if exponent.denominator != 1:
            root = _root(base, exponent.denominator)
            base, exponent = root, Fraction(exponent.numerator)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * size > MAX_BITS and base not in (0, 1, -1):
            raise TooLarge(f"a power of more than {MAX_BITS} bits")
        if abs(exponent) > 10**9:
            raise TooLarge("an exponent above 10^9")
        return base ** int(exponent)

    def postfix(self, depth: int) -> Fraction:
        value = self.atom(depth)
        if self.peek() == "!":
            self.at += 1
            if self.peek() == "!" or value.denominator != 1 or value < 0:
                raise _NoNumber
            if value > MAX_FACTORIAL:
                raise TooLarge(f"the factorial of a number above {MAX_FACTORIAL}")
            value = Fraction(factorial(int(value)))
        return value

    def atom(self, depth: int) -> Fraction:
        kind, token = self.kind(), self.peek()
        if kind == "number":
            self.at += 1
            return _bounded(Fraction(token.rstrip(".") if token.endswith(".") else token))
        if kind == "repeat":
            self.at += 1
            return _repeating(token)
        if token in ("(", "["):
            if token == "[":
                raise _NoNumber
            return self.group("(", ")", depth)
        if token == "{":
            return self.group("{", "}", depth)
        if token == "\\frac":
            self.at += 1
            top = self.group("{", "}", depth)
            return _bounded(top / self.group("{", "}", depth))
        if token == "\\sqrt":
            self.at += 1
            degree = self.group("[", "]", depth) if self.peek() == "[" else Fraction(2)
            if degree.denominator != 1 or not 1 < degree < 100:
                raise _NoNumber
            return _root(self.group("{", "}", depth), int(degree))
        if token == "\\binom":
            self.at += 1
            n, k = self.group("{", "}", depth), self.group("{", "}", depth)
            if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
                raise _NoNumber
            if n > 5_000:
                raise TooLarge("a binomial of a number above 5000")
            return Fraction(comb(int(n), int(k)))
        raise _NoNumber

    def group(self, left: str, right: str, depth: int) -> Fraction:
        self.take(left)
        value = self.sum(depth + 1)
        self.take(right)
        return value


def _root(value: Fraction, degree: int) -> Fraction:
    if degree == 1:
        return value
    if value < 0 or degree > 64:
        raise _NoNumber
    return Fraction(_integer_root(value.numerator, degree), _integer_root(value.denominator, degree))


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        root = isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise _NoNumber
    return root


def _repeating(token: str) -> Fraction:
    head, _, rest = token.partition(".")
    fixed, _, block = rest.replace("\\overline{", "(").replace("}", ")").partition("(")
    block = block.rstrip(")")
    base = Fraction(int(head or "0")) + (Fraction(int(fixed), 10 ** len(fixed)) if fixed else 0)
    return base + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed))
