"""Draws tokens. The noise of a token is a pure function of (seed, prompt, sample, position), so what is sampled never
depends on who shares the batch, on time, or on whether the rollout was interrupted on its way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, UInt64
from torch import Tensor

from rollout.engine import Request, Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key of one rollout's noise stream."""
    digest = hashlib.blake2b(f"{seed}\x00{prompt_id}\x00{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def request_key(request: Request) -> int:
    """`stream_key` of a request."""
    return stream_key(request.sampling.seed, request.prompt_id, request.sample)


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(keys: UInt64[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """One number in [0, 1) with 53 random bits per (stream, position in the completion)."""
    with np.errstate(over="ignore"):
        counter = _mix((positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _mix(_mix(keys + _GOLDEN) ^ counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def truncate(
    logprobs: Float[Tensor, "n vocab"], top_p: Float[Tensor, " n"], top_k: Int[Tensor, " n"]
) -> Float[Tensor, "n vocab"]:
    """`logprobs` with -inf outside the `top_k` most likely tokens (0 = all) and outside the smallest set of most
    likely tokens that holds at least `top_p` of the probability (Holtzman et al. 2020; the token that crosses the
    border is kept). Not renormalised."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().exp().cumsum(-1) - ordered.double().exp()  # probability of the tokens ranked above
    rank = torch.arange(logprobs.shape[-1], device=logprobs.device)
    limit = torch.where(top_k > 0, top_k, logprobs.shape[-1])
    drop = (before >= top_p.double()[:, None]) | (rank >= limit[:, None])
    drop[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), float("-inf"))


def draw(
    logits: Float[Tensor, "n vocab"], temperature: Float[np.ndarray, " n"], noise: Float64[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The token where the cumulative distribution of softmax(logits / temperature) passes `noise`, and its
    log-probability, in float32 (the cumulative sum in float64: one uniform per token, and a last-bit change of a
    logit moves a border by a last bit)."""
    logprobs = _logprobs(logits, temperature)
    return _invert(logprobs, logprobs, noise)


def _logprobs(logits: Float[Tensor, "n vocab"], temperature: Float[np.ndarray, " n"]) -> Float[Tensor, "n vocab"]:
    return (logits.float() / torch.from_numpy(temperature).to(logits.device)[:, None]).log_softmax(-1)


def _invert(
    logprobs: Float[Tensor, "n vocab"], allowed: Float[Tensor, "n vocab"], noise: Float64[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    mass = allowed.double().exp().cumsum(-1)  # [n, vocab]
    total = mass[:, -1:]
    target = torch.from_numpy(noise).to(logprobs.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # noise * total may round to total
    tokens = torch.searchsorted(mass, target, right=True)
    return tokens[:, 0].cpu().numpy(), logprobs.gather(1, tokens)[:, 0].cpu().numpy()


@dataclass
class Settings:
    """What `sample` needs of every row's Sampling, as arrays."""

    temperature: Float[np.ndarray, " n"]
    top_p: Float[np.ndarray, " n"]
    top_k: Int[np.ndarray, " n"]

    @staticmethod
    def of(samplings: list[Sampling]) -> Settings:
        return Settings(
            np.array([s.temperature for s in samplings], np.float32),
            np.array([s.top_p for s in samplings], np.float32),
            np.array([s.top_k for s in samplings], np.int64),
        )


def sample(
    logits: Float[Tensor, "n vocab"],
    settings: Settings,
    noise: Float64[np.ndarray, " n"],
    draw: Callable[..., tuple[np.ndarray, np.ndarray]] = draw,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The next token of every row and its log-probability log_softmax(logits / temperature) of the whole
    distribution, whatever top-p and top-k removed. Temperature 0 takes the most likely token and reports its
    log-probability at temperature 1. `draw` draws the rows that neither truncate nor are greedy."""
    greedy = settings.temperature == 0
    if not greedy.any() and (settings.top_p == 1).all() and (settings.top_k == 0).all():
        return draw(logits, settings.temperature, noise)
    logprobs = _logprobs(logits, np.where(greedy, np.float32(1), settings.temperature))
    top_p, top_k = (torch.from_numpy(x).to(logits.device) for x in (settings.top_p, settings.top_k))
    tokens, chosen = _invert(logprobs, truncate(logprobs, top_p, top_k), noise)
    if greedy.any():
        best = logprobs.max(-1)
        tokens = np.where(greedy, best.indices.cpu().numpy(), tokens)
        chosen = np.where(greedy, best.values.cpu().numpy(), chosen)
    return tokens, chosen
