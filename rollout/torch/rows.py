"""The running requests of the torch engine as arrays, one entry a row: a step touches each array once, not each
request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rollout.engine import Request
from rollout.torch.sampler import Settings, request_key, uniforms
from rollout.torch.stop import StopFinder


@dataclass
class Running:
    """What a row keeps besides numbers."""

    request: Request
    stop: StopFinder | None
    versions: list[tuple[int, int]]  # those of the first `counted` tokens
    counted: int
    read: bool = False  # its context has gone through the model


class Rows:
    """Rows 0..len-1 are taken, in the order the decoder knows them by."""

    _PER_ROW = dict(
        prompt=np.int64, count=np.int64, limit=np.int64, key=np.uint64, stops_at_eos=np.bool_, has_stop=np.bool_,
        temperature=np.float32, top_p=np.float32, top_k=np.int64,
    )  # fmt: skip

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.tokens: Int[np.ndarray, "rows completion"] = np.zeros((0, 0), np.int64)
        self.logprobs: Float[np.ndarray, "rows completion"] = np.zeros((0, 0), np.float32)
        for name, kind in self._PER_ROW.items():
            setattr(self, name, np.zeros(0, kind))

    def __len__(self) -> int:
        return len(self.running)

    def _grow(self, rows: int, completion: int) -> None:
        old_rows, old_completion = self.tokens.shape
        if rows <= old_rows and completion <= old_completion:
            return
        rows, completion = max(rows, 2 * old_rows), max(completion, old_completion)
        self.tokens = np.pad(self.tokens, ((0, rows - old_rows), (0, completion - old_completion)))
        self.logprobs = np.pad(self.logprobs, ((0, rows - old_rows), (0, completion - old_completion)))
        for name in self._PER_ROW:
            setattr(self, name, np.pad(getattr(self, name), (0, rows - old_rows)))

    def add(self, request: Request, stop: StopFinder | None, limit: int) -> int:
        """The row `request` now has; `limit` completion tokens end it."""
        row, sampling, partial = len(self.running), request.sampling, request.partial
        done = len(partial.tokens) if partial else 0
        self._grow(row + 1, max(limit, done))
        if partial:
            self.tokens[row, :done], self.logprobs[row, :done] = partial.tokens, partial.logprobs
        self.running.append(Running(request, stop, list(partial.versions) if partial else [], done))
        values = dict(
            prompt=len(request.prompt_tokens), count=done, limit=limit, key=request_key(request),
            stops_at_eos=not sampling.ignore_eos, has_stop=stop is not None, temperature=sampling.temperature,
            top_p=sampling.top_p, top_k=sampling.top_k,
        )  # fmt: skip
        for name, value in values.items():
            getattr(self, name)[row] = value
        return row

    def remove(self, row: int) -> int:
        """Frees a row; the last one takes its number. Returns the number the last one had."""
        last = len(self.running) - 1
        for values in (self.tokens, self.logprobs, *(getattr(self, name) for name in self._PER_ROW)):
            values[row] = values[last]
        self.running[row] = self.running[last]
        self.running.pop()
        return last

    def clear(self) -> None:
        self.running.clear()

    # what a step reads and writes

    def append(self, rows: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], logprobs: np.ndarray) -> None:
        self.tokens[rows, self.count[rows]] = tokens
        self.logprobs[rows, self.count[rows]] = logprobs
        self.count[rows] += 1

    def last_tokens(self) -> Int[np.ndarray, " n"]:
        n = len(self)
        return self.tokens[np.arange(n), self.count[:n] - 1]

    def positions(self) -> Int[np.ndarray, " n"]:
        """Where in its sequence every row's last token stands."""
        n = len(self)
        return self.prompt[:n] + self.count[:n] - 1

    def noise(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return uniforms(self.key[rows], self.count[rows])

    def settings(self, rows: Int[np.ndarray, " n"]) -> Settings:
        return Settings(self.temperature[rows], self.top_p[rows], self.top_k[rows])

    def ended(self, end_tokens: Int[np.ndarray, " ends"]) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Which rows' last token stopped them (end-of-sequence or a stop string), and which have no room for more.
        Rows without a token are neither."""
        n = len(self)
        begun = self.count[:n] > 0
        stopped = begun & self.stops_at_eos[:n] & np.isin(self.last_tokens(), end_tokens)
        for row in np.flatnonzero(begun & self.has_stop[:n] & ~stopped):
            stopped[row] = self.running[row].stop.found(self.completion(row))
        return stopped, self.count[:n] >= self.limit[:n]

    # one row

    def completion(self, row: int) -> Int[np.ndarray, " n"]:
        return self.tokens[row, : self.count[row]]

    def context(self, row: int) -> Int[np.ndarray, " n"]:
        return np.concatenate([np.array(self.running[row].request.prompt_tokens, np.int64), self.completion(row)])

    def count_tokens(self, version: int) -> None:
        """Books the tokens since the last call as sampled by `version`."""
        for row, running in enumerate(self.running):
            fresh = int(self.count[row]) - running.counted
            if fresh and running.versions and running.versions[-1][0] == version:
                running.versions[-1] = (version, running.versions[-1][1] + fresh)
            elif fresh:
                running.versions.append((version, fresh))
            running.counted += fresh
