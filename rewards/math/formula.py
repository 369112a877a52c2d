"""Formulas: one reader of LaTeX and plain-text arithmetic, and the two kinds of value that it can have.

A formula is read into a tree once. Its value is exact (fractions) where only rational operations occur, with a large
random integer for each variable and for pi; everything else is computed with DIGITS digits. Two formulas are the same
when their values agree at such points: for rational functions that is a proof up to a chance of 2^-40, for the rest a
difference below 10^-40. Everything is bounded before it is computed; nothing is handed to a computer algebra system.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, isqrt
from typing import Any

from rewards.math.normal import FUNCTIONS, MAX_DEPTH, Unreadable

MAX_TOKENS = 400
MAX_BITS = 20_000  # of a numerator or denominator, on the way too
MAX_FACTORIAL = 1_000
DIGITS = 60
_CLOSE_DIGITS = 40  # two values are the same when they agree to so many digits

Node = tuple  # (operation, argument, ...); leaves are ("number", Fraction) and ("symbol", name)


class TooLarge(Unreadable):
    """A value out of bounds: nobody's answer, and not computed."""


class NoFormula(ValueError):
    """The text is not a formula that this reader knows."""


class _NotExact(Exception):
    """The formula has no value in the numbers that were asked for."""


_NAMED = r"overline|overrightarrow|vec|hat|widehat|bar|tilde|mathbf|mathbb|mathcal|boldsymbol"
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<repeat>\d*\.\d*\\overline\{\d{1,60}\}|\d*\.\d*\(\d{1,60}\))"
    r"|(?P<science>\d+(?:\.\d+)?[eE][-+]?\d{1,3}(?![\dA-Za-z.]))"
    r"|(?P<number>\d+(?:\.\d*)?|\.\d+)"
    rf"|(?P<letter>(?:[a-zA-Z]|\\(?:{_NAMED})\{{[a-zA-Z]{{1,4}}\}})(?:_\{{[^{{}}]{{1,20}}\}})?'*)"
    r"|(?P<command>\\[a-zA-Z]+|\\\|)"
    r"|(?P<sign>[-+*/^(){}\[\]!|°_])"
)
_SYMBOLS = frozenset(
    "\\" + name
    for name in (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau"
        " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell infty emptyset triangle"
        " angle measuredangle"
    ).split()
)
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CLOSERS = {"(": ")", "{": "}", "[": "]"}
_TIMES, _OVER = ("*", "\\cdot", "\\times"), ("/", "\\div")


class _Reader:
    """Recursive descent from tokens (kind, text, whether a space stood in front) to a tree."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, bool]] = []
        self.at = 0
        position, spaced, run = 0, False, 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise NoFormula(f"{text[position : position + 12]!r} is not read")
            position = match.end()
            if match.lastgroup == "space":
                spaced = True
                continue
            run = run + 1 if match.lastgroup == "letter" and not spaced else match.lastgroup == "letter"
            if run > 3:
                raise NoFormula("a word")
            self.tokens.append((match.lastgroup or "", match.group(), spaced))
            spaced = False
            if len(self.tokens) > MAX_TOKENS:
                raise TooLarge(f"a formula of more than {MAX_TOKENS} symbols")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise NoFormula(f"expected {expected!r}, found {self.peek() or 'the end'!r}")
        self.at += 1

    def whole(self) -> Node:
        node = self.sum(0)
        if self.at < len(self.tokens):
            raise NoFormula(f"{self.peek()!r} is not read")
        return node

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise TooLarge(f"nested deeper than {MAX_DEPTH}")
        node = self.product(depth)
        while self.peek() in ("+", "-"):
            operation = self.peek()
            self.at += 1
            node = (operation, node, self.product(depth))
        return node

    def product(self, depth: int) -> Node:
        node = self.signed(depth)
        while True:
            token = self.peek()
            if token in _TIMES or token in _OVER:
                self.at += 1
                node = ("*" if token in _TIMES else "/", node, self.signed(depth))
            elif self.begins_factor():
                kind, before, _ = self.tokens[self.at - 1]
                if self.kind() in ("number", "repeat", "science") and (kind != "sign" or before == "°"):
                    raise NoFormula("a number behind a number, a letter or degrees")
                node = ("*", node, self.power(depth))
            else:
                return node

    def begins_factor(self) -> bool:
        token, kind = self.peek(), self.kind()
        if kind == "command":
            return token not in ("\\cdot", "\\times", "\\div", "\\|")
        return kind in ("number", "repeat", "science", "letter") or token in ("(", "{")

    def signed(self, depth: int) -> Node:
        sign = self.peek()
        if sign not in ("+", "-"):
            return self.power(depth)
        self.at += 1  # a second sign is not arithmetic: power() refuses it
        return ("minus", self.power(depth)) if sign == "-" else self.power(depth)

    def power(self, depth: int) -> Node:
        node = self.atom(depth)
        while self.peek() in ("!", "°"):
            node = ("factorial" if self.peek() == "!" else "degrees", node)
            self.at += 1
            if node[1][0] == "factorial":
                raise NoFormula("a factorial of a factorial")
        if self.peek() != "^":
            return node
        self.at += 1
        node = ("power", node, self.exponent(depth))
        if self.peek() in ("^", "!"):
            raise NoFormula("a power of a power without brackets")
        return node

    def exponent(self, depth: int) -> Node:
        if self.peek() == "-":
            self.at += 1
            return ("minus", self.atom(depth))
        return self.atom(depth)

    def atom(self, depth: int) -> Node:
        kind, token = self.kind(), self.peek()
        self.at += 1
        if kind == "number":
            return self.mixed(Fraction(token.rstrip(".")))
        if kind == "science":
            return ("number", Fraction(token))
        if kind == "repeat":
            return ("number", _repeating(token))
        if kind == "letter":
            return ("symbol", token)
        if token in ("(", "{"):
            return self.closed(_CLOSERS[token], depth)
        if token == "|" or token == "\\|":
            node = self.sum(depth + 1)
            self.take(token)
            return ("absolute", node)
        if token == "\\pi":
            return ("symbol", "pi")
        if token in _SYMBOLS:
            subscript = self.at + 2 < len(self.tokens) and self.peek() == "_"
            return ("symbol", token) if not subscript else self.refuse(token)
        if token in ("\\frac", "\\binom"):
            top = self.group("{", depth)
            return ("/" if token == "\\frac" else "binomial", top, self.group("{", depth))
        if token == "\\sqrt":
            degree = self.group("[", depth) if self.peek() == "[" else ("number", Fraction(2))
            return ("root", self.group("{", depth), degree)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:], depth)
        return self.refuse(token)

    def refuse(self, token: str) -> Node:
        raise NoFormula(f"{token or 'the end'!r} is not read")

    def mixed(self, whole: Fraction) -> Node:
        """A number, with the proper fraction behind it: `3\\frac{1}{2}`, `3 1/2`."""
        if whole.denominator == 1 and self.peek() == "\\frac":
            marks = [self.peek(n) for n in (1, 3, 4, 6)]
            top, bottom = self.peek(2), self.peek(5)
            after = 7
            if marks != ["{", "}", "{", "}"] or not (top.isdigit() and bottom.isdigit()):
                return ("number", whole)
        elif self.kind() == "number" and self.tokens[self.at][2] and self.peek(1) == "/":
            top, bottom, after = self.peek(), self.peek(2), 3
            if not (top.isdigit() and bottom.isdigit()):
                raise NoFormula("two numbers side by side")
        else:
            return ("number", whole)
        if not 0 < int(top) < int(bottom) or self.peek(after) == "^" or len(bottom) > 9:
            raise NoFormula("a whole number in front of a fraction that is not below 1")
        self.at += after
        return ("number", whole + Fraction(int(top), int(bottom)))

    def function(self, name: str, depth: int) -> Node:
        exponent = base = None
        for _ in range(2):
            if self.peek() == "^" and exponent is None:
                self.at += 1
                exponent = self.exponent(depth)
            elif self.tokens[self.at : self.at + 1] and self.peek() == "_" and name == "log":
                self.at += 1
                base = self.atom(depth)
        if exponent == ("minus", ("number", Fraction(1))):
            if name not in _INVERSES:
                raise NoFormula("an inverse function, or a reciprocal")
            name, exponent = _INVERSES[name], None
        if self.peek() in ("(", "{", "|"):
            argument = self.atom(depth + 1)
            if self.peek() == "^":
                raise NoFormula("a power behind the argument of a function")
            if self.peek() == "°":
                self.at += 1
                argument = ("degrees", argument)
        else:
            argument = self.power(depth + 1)
            while self.kind() in ("number", "letter") or self.peek() == "\\pi" or self.peek() in _SYMBOLS:
                if self.kind() == "number":
                    raise NoFormula("a number behind the argument of a function")
                argument = ("*", argument, self.power(depth + 1))
        node: Node = ("log", argument, base) if base is not None else (name, argument)
        return node if exponent is None else ("power", node, exponent)

    def group(self, left: str, depth: int) -> Node:
        self.take(left)
        return self.closed(_CLOSERS[left], depth)

    def closed(self, right: str, depth: int) -> Node:
        node = self.sum(depth + 1)
        self.take(right)
        return node


def _repeating(token: str) -> Fraction:
    head, _, rest = token.partition(".")
    fixed, _, block = rest.replace("\\overline{", "(").replace("}", ")").partition("(")
    block = block.rstrip(")")
    base = Fraction(int(head or "0")) + (Fraction(int(fixed), 10 ** len(fixed)) if fixed else 0)
    return base + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed))


class Formula:
    """A tree with its symbols and its values, computed once and when asked for."""

    def __init__(self, text: str) -> None:
        self.node = _Reader(text).whole()
        names: set[str] = set()
        _collect(self.node, names)
        self.symbols = frozenset(names - {"e", "i", "pi"})
        self.is_constant = not names
        self._values: dict[str, Any] = {}

    def exact(self, salt: str = "1") -> Fraction | None:
        """The value at the random integers of `salt`; None when the formula is not rational."""
        if salt not in self._values:
            try:
                self._values[salt] = _evaluate(self.node, _Exact(salt))
            except (_NotExact, ZeroDivisionError):
                self._values[salt] = None
        return self._values[salt]

    @property
    def constant(self) -> Fraction | None:
        """The exact value of a formula without symbols; None when it has some or is not rational."""
        return self.exact() if self.is_constant else None

    def precise(self, salt: str = "a") -> Any | None:
        """The value with DIGITS digits, every variable a positive real number of its own, or a negative one when
        `salt` begins with a minus sign; None where there is none. Raises TooLarge."""
        if salt not in self._values:
            try:
                found = _evaluate(self.node, _Precise(salt))
                self._values[salt] = found if _precision().isfinite(found) else None
            except TooLarge:
                raise
            except (_NotExact, ArithmeticError, ValueError, TypeError):
                self._values[salt] = None
        return self._values[salt]


def _collect(node: Node, names: set[str]) -> None:
    if node[0] == "symbol":
        names.add(node[1])
        return
    for part in node[1:]:
        if isinstance(part, tuple):
            _collect(part, names)


@lru_cache(maxsize=8192)
def formula(text: str) -> Formula:
    """The formula that a canonical text writes. Raises NoFormula, and TooLarge for what is out of bounds."""
    if len(text) * 3.33 > MAX_BITS:
        raise TooLarge(f"an expression of {len(text)} characters")
    return Formula(text)


def same(one: Formula, other: Formula) -> bool | None:
    """Whether two formulas have the same value wherever both have one; None when that cannot be said."""
    if one.exact() is not None and other.exact() is not None:
        return one.exact() == other.exact() and one.exact("2") == other.exact("2")
    for salt in ("a", "b"):
        a, b = one.precise(salt), other.precise(salt)
        if a is None or b is None:
            return None
        if not close(a, b):
            return False
    if one.symbols | other.symbols:  # sqrt(x^2) is x for positive x alone
        a, b = one.precise("-a"), other.precise("-a")
        if a is not None and b is not None and not close(a, b):
            return not (_real(a) and _real(b))
    return True


def close(a: Any, b: Any) -> bool:
    """Whether two values agree to 40 digits."""
    size = max(abs(a), abs(b))
    return bool(abs(a - b) * 10**_CLOSE_DIGITS <= size)


def _real(value: Any) -> bool:
    return bool(abs(getattr(value, "imag", 0)) * 10**_CLOSE_DIGITS <= abs(value))


def _evaluate(node: Node, numbers: Any) -> Any:
    if node[0] == "number":
        return numbers.number(node[1])
    if node[0] == "symbol":
        return numbers.symbol(node[1])
    operation = numbers.operations.get(node[0])
    if operation is None:
        raise _NotExact
    return operation(*[_evaluate(part, numbers) for part in node[1:]])


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge(f"a number of more than {MAX_BITS} bits")
    return value


class _Exact:
    """Fractions, none of them out of bounds; a symbol is a large integer that its name and `salt` decide."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.operations: dict[str, Callable[..., Fraction]] = {
            "+": lambda a, b: _bounded(a + b),
            "-": lambda a, b: _bounded(a - b),
            "*": lambda a, b: _bounded(a * b),
            "/": lambda a, b: _bounded(a / b),
            "minus": lambda a: -a,
            "power": self.power,
            "root": self.root,
            "factorial": _factorial,
            "binomial": _binomial,
        }

    def number(self, value: Fraction) -> Fraction:
        return _bounded(value)

    def symbol(self, name: str) -> Fraction:
        if name in ("i", "e"):
            raise _NotExact
        value = Fraction(_digest(name + self.salt) + 2)
        return -value if self.salt == "2" and name != "pi" else value  # sqrt(x^2) is x for positive x alone

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            base, exponent = _root(base, exponent.denominator), Fraction(exponent.numerator)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if (base == 0 and exponent <= 0) or (abs(exponent) * size > MAX_BITS and base not in (0, 1, -1)):
            raise _NotExact
        return base ** (int(exponent) if abs(base) != 1 else int(exponent) % 2)

    def root(self, value: Fraction, degree: Fraction) -> Fraction:
        if degree.denominator != 1 or not 1 < degree < 100:
            raise _NotExact
        return -_root(-value, int(degree)) if value < 0 and degree == 3 else _root(value, int(degree))


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise _NotExact
    return Fraction(factorial(int(value)))


def _binomial(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= n <= 5_000 or k < 0:
        raise _NotExact
    return Fraction(comb(int(n), int(k)))


def _root(value: Fraction, degree: int) -> Fraction:
    if value < 0 or degree > 64 or value.numerator.bit_length() > 4_000:
        raise _NotExact
    return Fraction(_integer_root(value.numerator, degree), _integer_root(value.denominator, degree))


def _integer_root(value: int, degree: int) -> int:
    root = isqrt(value)
    if degree != 2:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise _NotExact
    return root


@lru_cache(maxsize=1)
def _precision() -> Any:
    """A context of mpmath of our own, so that nobody else's precision changes."""
    from mpmath import mp

    context = mp.clone()
    context.dps = DIGITS
    return context


class _Precise:
    """Real and complex numbers with DIGITS digits."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.mp = _precision()
        self.operations = _precise_operations()

    def number(self, value: Fraction) -> Any:
        _bounded(value)
        return self.mp.mpf(value.numerator) / value.denominator

    def symbol(self, name: str) -> Any:
        if name == "pi":
            return +self.mp.pi
        if name == "e":
            return +self.mp.e
        if name == "i":
            return self.mp.mpc(0, 1)
        value = self.mp.mpf(_digest(name + self.salt.lstrip("-"))) / 2**47 + 0.6  # between 0.6 and 2.6
        return -value if self.salt.startswith("-") else value


@lru_cache(maxsize=1)
def _precise_operations() -> dict[str, Callable[..., Any]]:
    mp = _precision()

    def bounded(value: Any) -> Any:
        if value and not -60_000 < mp.mag(value) < 60_000:
            raise TooLarge("a value beyond 10^18000")
        return value

    def power(base: Any, exponent: Any) -> Any:
        if base == 0:
            raise _NotExact
        if abs(exponent) * (abs(mp.mag(base)) + 1) > 60_000:
            raise TooLarge("a power beyond 10^18000")
        return base ** (int(exponent) if mp.isint(exponent) else exponent)

    def root(value: Any, degree: Any) -> Any:
        if degree == 2:
            return mp.sqrt(value)
        if mp.isint(degree) and int(degree) % 2 and _real(value) and mp.re(value) < 0:
            return -mp.root(-mp.re(value), int(degree))
        return power(value, 1 / degree) if value else value

    def limited(function: Callable[[Any], Any], largest: float = 1e6) -> Callable[[Any], Any]:
        def checked(argument: Any) -> Any:
            if abs(argument) > largest:
                raise TooLarge(f"a function of a value above {largest:g}")
            return bounded(function(argument))

        return checked

    def settled(total: Any, a: Any, b: Any) -> Any:
        """The rounding error that is left where two terms cancel is zero."""
        return total if abs(total) * 10 ** (DIGITS - 10) > max(abs(a), abs(b)) else mp.zero

    operations: dict[str, Callable[..., Any]] = {
        "+": lambda a, b: settled(a + b, a, b),
        "-": lambda a, b: settled(a - b, a, b),
        "*": lambda a, b: bounded(a * b),
        "/": lambda a, b: bounded(a / b),
        "minus": lambda a: -a,
        "power": power,
        "root": root,
        "absolute": abs,
        "degrees": lambda a: a * mp.pi / 180,
        "factorial": limited(mp.factorial, MAX_FACTORIAL),
        "binomial": lambda n, k: limited(lambda n: mp.binomial(n, k), 5_000)(n),
        "log": lambda a, base=None: mp.log(a) if base is None else mp.log(a) / mp.log(base),
        "lg": lambda a: mp.log(a) / mp.log(10),
        "ln": mp.log,
    }
    for name, function in {
        "sin": mp.sin,
        "cos": mp.cos,
        "tan": mp.tan,
        "cot": mp.cot,
        "sec": mp.sec,
        "csc": mp.csc,
        "arcsin": mp.asin,
        "arccos": mp.acos,
        "arctan": mp.atan,
        "sinh": mp.sinh,
        "cosh": mp.cosh,
        "tanh": mp.tanh,
        "exp": mp.exp,
    }.items():
        operations[name] = limited(function, 1e4 if name in ("sinh", "cosh", "tanh", "exp") else 1e6)
    return operations
