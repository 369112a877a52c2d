"""Floating-point values of formulas at fixed points: enough to prove that two are different, never that they are equal.

A computer algebra system needs milliseconds to say no; most wrong answers differ at any point one cares to look at.
"""

from __future__ import annotations

import cmath
import hashlib
import math
import re
from collections.abc import Callable
from functools import lru_cache

from rewards.math.cursor import MAX_TOKENS, Cursor
from rewards.math.normal import MAX_DEPTH

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<word>\\[a-zA-Z]+)|(?P<letter>[a-zA-Z](?:_(?:\{[^{}]{1,12}\}"
    r"|\w))?'*)|(?P<sign>[-+*/^(){}\[\]|!]))"
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\cot": lambda z: 1 / cmath.tan(z),
    "\\sec": lambda z: 1 / cmath.cos(z),
    "\\csc": lambda z: 1 / cmath.sin(z),
    "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos,
    "\\arctan": cmath.atan,
    "\\sinh": cmath.sinh,
    "\\cosh": cmath.cosh,
    "\\tanh": cmath.tanh,
    "\\ln": cmath.log,
    "\\log": cmath.log,
    "\\exp": cmath.exp,
}
_GREEK = frozenset(
    "\\" + name for name in "alpha beta gamma delta theta lambda mu rho sigma tau phi varphi omega".split()
)
_CLOSERS = {"(": ")", "{": "}", "[": "]"}


class _Unknown(Exception):
    """Something that this reader does not read."""


@lru_cache(maxsize=8192)
def value(text: str) -> complex | None:
    """The value of a canonical formula with every variable at its fixed point; None when not read or not finite."""
    tokens: list[tuple[str, str]] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) >= MAX_TOKENS:
            return None
        tokens.append((match.lastgroup or "", match.group().strip()))
        position = match.end()
    reader = _FloatingValue(tokens)
    try:
        found = reader.sum(0)
    except (_Unknown, ArithmeticError, ValueError, TypeError):
        return None
    if not reader.ended or not cmath.isfinite(found):
        return None
    return found


def differ(one: complex | None, other: complex | None) -> bool:
    """Whether two values are known and clearly apart: by more than rounding, and not by a forgotten percent sign."""
    if one is None or other is None:
        return False
    scale = max(abs(one), abs(other))
    return scale > 1e-300 and abs(one - other) > 1e-6 * scale


def _point(name: str) -> complex:
    # between 0.6 and 2.6, the same for a name in every process
    digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
    return 0.6 + 2.0 * int.from_bytes(digest, "big") / 2**48


class _FloatingValue(Cursor):
    """Recursive descent with complex numbers; every variable has a value."""

    def sum(self, depth: int) -> complex:
        if depth > MAX_DEPTH:
            raise _Unknown
        total = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = 1 if self.peek() == "+" else -1
            self.at += 1
            total += sign * self.product(depth)
        return total

    def product(self, depth: int) -> complex:
        total = self.signed(depth)
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times"):
                self.at += 1
                total *= self.signed(depth)
            elif token in ("/", "\\div"):
                self.at += 1
                total /= self.signed(depth)
            elif self.begins_factor():
                if self.kind() == "number" and self.tokens[self.at - 1][0] == "number":
                    raise _Unknown  # two numbers side by side
                if token == "\\frac" and self.tokens[self.at - 1][0] == "number":
                    raise _Unknown  # perhaps a mixed number
                total *= self.power(depth)
            else:
                return total

    def begins_factor(self) -> bool:
        token = self.peek()
        return (
            self.kind() in ("number", "letter", "word")
            and token not in ("\\cdot", "\\times", "\\div")
            or token in ("(", "{")
        )

    def signed(self, depth: int) -> complex:
        if self.peek() in ("+", "-"):
            sign = -1 if self.peek() == "-" else 1
            self.at += 1
            return sign * self.power(depth)
        return self.power(depth)

    def power(self, depth: int) -> complex:
        base = self.atom(depth)
        while self.peek() == "!":
            self.at += 1
            if base.imag or base.real < 0 or base.real > 150:
                raise _Unknown
            base = complex(math.gamma(base.real + 1))
        if self.peek() != "^":
            return base
        self.at += 1
        exponent = self.exponent(depth)
        if self.peek() in ("^", "!"):
            raise _Unknown
        if base == 0 or abs(exponent) > 1e6:
            raise _Unknown
        return base**exponent

    def exponent(self, depth: int) -> complex:
        if self.peek() == "-":
            self.at += 1
            return -self.atom(depth)
        return self.atom(depth)

    def atom(self, depth: int) -> complex:
        if depth > MAX_DEPTH:
            raise _Unknown
        kind, token = self.kind(), self.peek()
        self.at += 1
        if kind == "number":
            return complex(float(token))
        if kind == "letter":
            return {"e": complex(math.e), "i": 1j}.get(token) or _point(token)
        if token in ("(", "{"):
            return self.closed(_CLOSERS[token], depth)
        if token == "|":
            inner = self.sum(depth + 1)
            if self.peek() != "|":
                raise _Unknown
            self.at += 1
            return complex(abs(inner))
        if token == "\\pi":
            return complex(math.pi)
        if token == "\\infty":
            return complex(1e250)  # apart from everything else that is written
        if token in _GREEK:
            return _point(token)
        if token == "\\frac":
            top = self.group("{", depth)
            return top / self.group("{", depth)
        if token == "\\sqrt":
            degree = self.group("[", depth) if self.peek() == "[" else 2
            inside = self.group("{", depth)
            return inside ** (1 / degree) if not (inside.real < 0 and degree == 3) else -((-inside) ** (1 / 3))
        if token in _FUNCTIONS:
            return self.function(token, depth)
        raise _Unknown

    def function(self, name: str, depth: int) -> complex:
        exponent = None
        if self.peek() == "^":
            self.at += 1
            exponent = self.exponent(depth)
            if exponent == -1:
                raise _Unknown  # an inverse function, or a reciprocal
        if self.peek() in ("(", "{"):
            argument = self.atom(depth + 1)
            if self.peek() == "^":
                raise _Unknown
        else:
            argument = self.power(depth + 1)
            while self.kind() in ("number", "letter") or self.peek() in ("\\pi", *_GREEK):
                argument *= self.power(depth + 1)
        result = _FUNCTIONS[name](argument)
        return result if exponent is None else result**exponent

    def group(self, left: str, depth: int) -> complex:
        if self.peek() != left:
            raise _Unknown
        self.at += 1
        return self.closed(_CLOSERS[left], depth)

    def closed(self, right: str, depth: int) -> complex:
        inner = self.sum(depth + 1)
        if self.peek() != right:
            raise _Unknown
        self.at += 1
        return inner
