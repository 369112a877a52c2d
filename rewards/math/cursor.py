"""A place in a list of tokens: what the readers of formulas stand on."""

from __future__ import annotations

MAX_TOKENS = 400  # of a formula that is read at all


class Cursor:
    """`tokens` are (kind, text); `at` is the next one to read. Past the end both are empty."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.at = tokens, 0

    def peek(self) -> str:
        """The text of the next token."""
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        """The kind of the next token."""
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    @property
    def ended(self) -> bool:
        return self.at == len(self.tokens)
