"""The records that travel between the loop and an engine, and the protocol every engine keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `top_p` and `top_k` off (1.0 and 0) is the only setting RL accepts: a truncated
    distribution is not the policy's own."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One question: its tokens, the row's other columns (`answer`, `tests`, ...) and an id that survives restarts."""

    id: str
    text: str
    tokens: tuple[int, ...]
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One completion to write. Sampling noise is keyed by (sampling.seed, prompt_id, sample, position), never by the
    batch a request happens to share. `partial` is an interrupted rollout to continue: its tokens are kept."""

    prompt_id: str
    sample: int
    prompt_tokens: tuple[int, ...]
    sampling: Sampling
    partial: Rollout | None = None

    @property
    def id(self) -> str:
        return f"{self.prompt_id}/{self.sample}"


@dataclass
class Rollout:
    """One written completion.

    `tokens` are the sampled ones (the end-of-sequence token included when it was sampled); `logprobs[i]` is
    log_softmax(logits / temperature) of `tokens[i]` as the engine computed it. `versions` lists, in order, (policy
    version, number of tokens it sampled). `routed_experts` is [prompt + completion tokens, moe_layers, top_k] int16
    where the engine returns routing, else None. `drafts` counts, where the engine decodes speculatively, the passes
    that verified drafts, the tokens drafted and those accepted.
    """

    prompt_id: str
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int]]
    finish_reason: FinishReason
    text: str
    routed_experts: np.ndarray | None = None
    drafts: tuple[int, int, int] = (0, 0, 0)

    @property
    def id(self) -> str:
        return f"{self.prompt_id}/{self.sample}"


class EngineUnusable(RuntimeError):
    """The engine is poisoned by an update that failed, asleep or closed. The message says which, and what helps."""


class Engine(Protocol):
    """Writes completions for a policy it holds a copy of. Asynchronous at heart: `submit` returns at once,
    `completed` drives the engine and hands out each rollout as it ends. Every call of an engine that cannot serve it
    raises EngineUnusable."""

    version: int
    max_batch: int  # requests that it writes at once; further ones wait their turn inside

    def submit(self, requests: list[Request]) -> None: ...

    def completed(self, timeout_s: float | None = None) -> list[Rollout]:
        """Rollouts that ended since the last call. Blocks until at least one ends, nothing is left to do (then [])
        or `timeout_s` passes."""
        ...

    def interrupt(self, only: Collection[str] | None = None) -> list[Rollout]:
        """Stops every unfinished request, or those whose ids are in `only`, and returns each as a rollout with finish
        reason `interrupted`. Ids of requests that have ended, or that never were, are passed over."""
        ...

    def update(self, weights: Any, version: int) -> None:
        """Installs new weights: a `WeightUpdate` of rollout.transport, or (checkpoint name, tensor). Running requests
        keep their cache and go on; new ones must not reuse a prefix of an older version. A failed update poisons the
        engine: every later call raises until a full update succeeds."""
        ...

    def score(self, sequences: list[list[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probability of every token given those before it; entry 0 of each sequence is 0.0."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def generate(engine: Engine, requests: list[Request]) -> list[Rollout]:
    """Writes all requests and returns their rollouts in the order asked for."""
    engine.submit(requests)
    done: dict[str, Rollout] = {}
    while len(done) < len(requests):
        ended = engine.completed()
        if not ended:
            missing = [r.id for r in requests if r.id not in done]
            raise RuntimeError(f"the engine went idle with {len(missing)} requests unanswered, the first: {missing[0]}")
        done.update((r.id, r) for r in ended)
    return [done[r.id] for r in requests]
