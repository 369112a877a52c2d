"""Finds stop strings in a growing completion without decoding it at every token."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Int

_BROKEN = "\ufffd"  # what a tokenizer shows for bytes that are not yet a whole character


@lru_cache(maxsize=8)
def _token_texts(tokenizer) -> list[str]:
    return tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)


@lru_cache(maxsize=64)
def _may_complete(tokenizer, stop: tuple[str, ...]) -> np.ndarray:
    """Whether a token can be the one that completes a stop string: it holds a last character of one, or part of a
    character, or (a last character may be a blank that decodes differently alone) anything."""
    last = {s[-1] for s in stop}
    texts = _token_texts(tokenizer)
    if any(c.isspace() for c in last):
        return np.ones(len(texts), bool)
    return np.array([_BROKEN in text or any(c in text for c in last) for text in texts], bool)


class StopFinder:
    """`found(tokens)` says whether the text of `tokens` holds a stop string that its last token completed."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        if "" in stop:
            raise ValueError("an empty stop string would end every completion at once")
        self.tokenizer, self.stop = tokenizer, stop
        self.candidates = _may_complete(tokenizer, stop)
        self.window = 2 * max(len(s.encode()) for s in stop) + 8  # tokens: each adds a byte at least

    def found(self, tokens: Int[np.ndarray, " n"]) -> bool:
        if tokens[-1] < len(self.candidates) and not self.candidates[tokens[-1]]:
            return False
        text = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=False)
        return any(s in text for s in self.stop)
