"""Whether training text holds evaluation questions: copies, reformatted copies, and clones with other numbers.

A text is read as words, without case, punctuation and the commands that only format LaTeX. A question is found in a
text that holds at least half of its runs of eight words; one of fewer words, where the text holds it in one piece.
Questions of less than five words are looked for only if they have a number of two digits: "what is x" stands in
thousands of problems. A second pass reads every number as one sign and finds clones: three quarters of the runs, or,
of a question of less than twelve words, all of it in a text that is not much longer, because short problems of one kind
differ in little but numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

RUN = 8  # words
SHORTEST = 5  # words of a question without a telling number
SHORTEST_CLONE, LONG_CLONE = 5, 12
MUCH_LONGER = 3  # times the words of a short clone
LEAST_COPY, LEAST_CLONE = 0.5, 0.75  # share of a question's runs

_FORMAT = re.compile(r"\\(?:left|right|text|mathrm|mathbf|displaystyle|dfrac|tfrac|frac|quad|qquad|begin|end|[,;:! ])")
_WORDS = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[+\-*/=<>^%]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Match:
    """A question that a text holds, and the share of the question's runs of words that were found."""

    question: str
    kind: Literal["copy", "clone"]
    share: float


def words_of(text: str, numbers: bool = True) -> list[str]:
    """The words, numbers and operators of a text; with `numbers` False every number is `#`."""
    plain = _FORMAT.sub(" ", unicodedata.normalize("NFKC", text).lower())
    found = _WORDS.findall(plain)
    return [word.replace(",", "") for word in found] if numbers else [_NUMBER.sub("#", word) for word in found]


class Questions:
    """An index of evaluation questions (id -> text), to be looked for in many texts."""

    def __init__(self, questions: Mapping[str, str]):
        self._copies = _Runs({name: words for name, text in questions.items() if _tells(words := words_of(text))})
        masked = {name: words_of(text, numbers=False) for name, text in questions.items()}
        self._clones = _Runs({name: words for name, words in masked.items() if len(words) >= SHORTEST_CLONE})

    def matches(self, text: str) -> list[Match]:
        """The questions that `text` holds, copies first; a question that is copied is not named as a clone too."""
        found = {name: Match(name, "copy", share) for name, share in self._copies.shares(words_of(text), LEAST_COPY)}
        words = words_of(text, numbers=False)
        for name, share in self._clones.shares(words, LEAST_CLONE):
            length = self._clones.words[name]
            if length >= LONG_CLONE or (share == 1 and len(words) <= MUCH_LONGER * length):
                found.setdefault(name, Match(name, "clone", share))
        return list(found.values())


class _Runs:
    """Runs of words -> the questions that have them. `words` counts those of each question."""

    def __init__(self, questions: Mapping[str, list[str]]):
        self.words = {name: len(words) for name, words in questions.items()}
        self._holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._count: dict[str, int] = {}
        self._lengths = {min(RUN, count) for count in self.words.values()}
        for name, words in questions.items():
            runs = set(_runs(words, min(RUN, len(words))))
            self._count[name] = len(runs)
            for run in runs:
                self._holders[run].append(name)

    def shares(self, words: list[str], least: float) -> list[tuple[str, float]]:
        """Questions of whose runs at least the share `least` is in `words`, the most first."""
        runs = {run for length in self._lengths for run in _runs(words, length)}
        found = Counter(name for run in runs for name in self._holders.get(run, ()))
        shares = [(name, count / self._count[name]) for name, count in found.most_common()]
        return [(name, share) for name, share in shares if share >= least]


def _tells(words: list[str]) -> bool:
    return len(words) >= SHORTEST or (len(words) > 1 and any(len(w) > 1 and w[0].isdigit() for w in words))


def _runs(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(length)), strict=False)
