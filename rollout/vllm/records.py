"""Between vLLM's records and this project's: pure functions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from rollout.engine import Rollout


def request_seed(seed: int, prompt_id: str, sample: int, start: int) -> int:
    """The seed of one completion's noise, in [0, 2^63). `start` is the number of tokens kept from a partial rollout:
    a continuation draws fresh noise instead of repeating that of the first tokens."""
    key = json.dumps([seed, prompt_id, sample, start]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def sampled_logprobs(flat: Any, tokens: list[int], request_id: str) -> list[float]:
    """The sampled token's log-probability at each position of vLLM's flat record, where it comes first."""
    if len(flat.start_indices) != len(tokens) or [flat.token_ids[i] for i in flat.start_indices] != tokens:
        raise RuntimeError(f"vLLM's log-probabilities of request {request_id} do not belong to its tokens")
    return [flat.logprobs[i] for i in flat.start_indices]


def prompt_logprobs(flat: Any, tokens: list[int]) -> np.ndarray:
    """The log-probability of every token of a scored sequence, float32; 0 for the first."""
    starts = flat.start_indices[1:]  # the first token has nothing before it
    if [flat.token_ids[i] for i in starts] != list(tokens[1:]):
        raise RuntimeError("vLLM's log-probabilities of a scored sequence do not belong to its tokens")
    return np.array([0.0, *(flat.logprobs[i] for i in starts)], np.float32)


def all_positions(routed: np.ndarray, total: int, dense_layers: int = 0) -> np.ndarray:
    """vLLM's routing of `total` tokens [tokens, layers, k] as [total, layers with experts, k] int16, -1 where it is not
    known: of the last sampled token, which the model never read, and of rows that vLLM left blank (it fills them with
    one number, and k experts are different ones). The first `dense_layers` have no experts. Raises RuntimeError when
    nothing is known at all, as with kernels that choose experts themselves."""
    missing = total - len(routed)
    if missing < 0:
        raise RuntimeError(f"vLLM returned the routing of {len(routed)} tokens of a request of {total}")
    known = routed[:, dense_layers:].astype(np.int16)
    if known.shape[2] > 1:
        blank = (known == known[:, :, :1]).all(-1)
        if blank.size and blank.all():
            raise RuntimeError(
                "vLLM returned no routing: its kernels for this model choose the experts themselves. Leave "
                "return_routed_experts off, or choose another moe_backend in engine_args"
            )
        known[blank] = -1
    return np.pad(known, ((0, missing), (0, 0), (0, 0)), constant_values=-1)


def continued(
    base: Rollout,
    tokens: list[int],
    logprobs: list[float],
    segments: list[tuple[int, int]],
    finish_reason: Any,
    text: str,
    routed: np.ndarray | None,
    drafts: tuple[int, int, int] = (0, 0, 0),
) -> Rollout:
    """`base` with more tokens; neighbouring segments of one version become one."""
    versions: list[tuple[int, int]] = []
    for version, count in [*base.versions, *segments]:
        if count and versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        elif count:
            versions.append((version, count))
    return Rollout(
        prompt_id=base.prompt_id,
        sample=base.sample,
        prompt_tokens=base.prompt_tokens,
        tokens=[*base.tokens, *tokens],
        logprobs=[*base.logprobs, *logprobs],
        versions=versions,
        finish_reason=finish_reason,
        text=text,
        routed_experts=routed,
        drafts=tuple(a + b for a, b in zip(base.drafts, drafts, strict=True)),
    )
