"""Countdown: reach a target from given numbers with + - * /, each number exactly once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from rewards.extract import AnswerTag, final_part
from rewards.score import Score

MAX_CHARACTERS = 1_000  # an honest answer over a dozen numbers has a tenth of that
MAX_DEPTH = 50
MAX_DIGITS = 18
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))", re.ASCII)
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})


class ExpressionError(ValueError):
    """An expression that is not one; says where reading stopped."""


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an arithmetic expression and the numbers in it, in order.

    Grammar: integers, `+ - * /` with the usual precedence, unary minus before a bracket or a number, brackets. Own
    recursive descent, no `eval`; length, depth and digits are bounded, so time and memory are too. Raises
    ExpressionError for anything else, including a division by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(expression)} characters; at most {MAX_CHARACTERS} are read")
    tokens: list[str] = []
    text, position = expression.translate(_SIGNS).rstrip(), 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected {text[position:].lstrip()[:1]!r} at character {position}")
        token = match.group(match.lastindex or 0)
        if len(token) > MAX_DIGITS:
            raise ExpressionError(f"a number of {len(token)} digits; at most {MAX_DIGITS} are read")
        tokens.append(token)
        position = match.end()
    reader = _Reader(tokens)
    value = reader.sum(0)
    if reader.at < len(tokens):
        raise ExpressionError(f"unexpected {tokens[reader.at]!r} after a complete expression")
    return value, reader.numbers


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.numbers = tokens, 0, list[int]()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self.peek()) in ("+", "-"):
            self.at += 1
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self.peek()) in ("*", "/"):
            self.at += 1
            factor = self.factor(depth)
            if sign == "/" and factor == 0:
                raise ExpressionError("division by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"brackets or signs nested deeper than {MAX_DEPTH}")
        token = self.peek()
        self.at += 1
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token == "-":
            return -self.factor(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            if self.peek() != ")":
                raise ExpressionError("a bracket is not closed")
            self.at += 1
            return value
        raise ExpressionError(f"a number or a bracket expected, found {token or 'the end'!r}")


def countdown_reward(
    completion: str,
    numbers: Sequence[int],
    target: int,
    answer_tag: AnswerTag = "required",
    require_think: bool = False,
) -> Score:
    """1 when the answer uses each of `numbers` exactly once and equals `target` exactly, 0 otherwise.

    The answer is what follows the last `</think>`, inside `<answer>`; it is one expression, nothing else (no `= 24`).
    Verdict `unparsed` when there is no such answer or it is not an expression.
    """
    final = final_part(completion, answer_tag, require_think)
    if final.text is None:
        return Score(0.0, "unparsed", detail=final.why)
    try:
        value, used = evaluate(final.text.strip())
    except ExpressionError as error:
        return Score(0.0, "unparsed", detail=str(error))
    if Counter(used) != Counter(int(number) for number in numbers):
        return Score(0.0, "wrong", detail=f"uses {sorted(used)}, given are {sorted(numbers)}")
    if value != target:
        return Score(0.0, "wrong", detail=f"equals {value}, the target is {target}")
    return Score(1.0, "correct", detail=f"equals {value}")


countdown_reward.expects = (  # type: ignore[attr-defined]
    "one expression over the given numbers inside <answer>...</answer>, behind </think> where it thinks"
)
