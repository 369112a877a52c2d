"""Draws tokens. The noise of a token is a pure function of (seed, prompt, sample, position), so what is sampled never
depends on who shares the batch, on time, or on whether the rollout was interrupted on its way."""

from __future__ import annotations

import hashlib

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


def sample(
    logits: Float[Tensor, "n vocab"],
    samplings: list[Sampling],
    keys: UInt64[np.ndarray, " n"],
    positions: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The next token of every row and its log-probability log_softmax(logits / temperature), in float32 (of the whole
    distribution, whatever top-p and top-k removed). Temperature 0 takes the most likely token and reports its
    log-probability at temperature 1."""
    logits = logits.float()
    temperature = np.array([s.temperature for s in samplings], np.float32)
    if (temperature != 1.0).any():
        logits = logits / torch.from_numpy(np.where(temperature == 0, 1, temperature)).to(logits.device)[:, None]
    logprobs = logits.log_softmax(-1)  # [n, vocab]
    allowed = logprobs
    if any(s.top_p < 1.0 or s.top_k > 0 for s in samplings):
        top_p = torch.tensor([s.top_p for s in samplings], device=logits.device)
        allowed = truncate(logprobs, top_p, torch.tensor([s.top_k for s in samplings], device=logits.device))
    # Inverse of the cumulative distribution, in float64: one uniform per token, and a last-bit change of a logit
    # moves the borders by a last bit.
    mass = allowed.double().exp().cumsum(-1)  # [n, vocab]
    total = mass[:, -1:]
    target = torch.from_numpy(uniforms(keys, positions)).to(logits.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round up to total
    tokens = torch.searchsorted(mass, target, right=True)[:, 0]
    if (temperature == 0).any():
        tokens = torch.where(torch.from_numpy(temperature == 0).to(logits.device), allowed.argmax(-1), tokens)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    return tokens.cpu().numpy(), chosen.cpu().numpy()
