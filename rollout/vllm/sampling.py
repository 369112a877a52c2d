"""The noise of all seeded requests of a step at once, where vLLM draws it request by request.

(Beside that, `keep_noise_of_unread_prompts` mends chunked prefill of seeded requests on a CPU.)

Every request has a seed of its own here, so that what it becomes does not depend on its batch. vLLM's sampler gives
each such request's row a kernel launch and its Python: with 512 requests several milliseconds of a step, more than a
small model computes. In its place one launch fills all rows (triton_noise.py). Only engines on GPUs are changed,
and only after their GPU has made the noise that numpy expects."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)

_CALLED_WITH = ["probs", "generators", "use_fp64_gumbel"]
_DRAW = 4  # by how much a draw advances a generator's offset: torch wants multiples of it


def draw_together(ask: Callable[..., list]) -> None:
    """In every worker of an engine; `ask` is its `collective_rpc`. What is not changed is slower and logged."""
    for number, reason in enumerate(ask(draw_rows_together)):
        if reason is not None:
            log.warning("vLLM draws the noise of each request by itself in worker %d, slowly: %s", number, reason)


def draw_rows_together(worker: Any) -> str | None:
    """Changes vLLM's sampler in the process of `worker`. Returns why not, where it does not."""
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    if worker.model_runner.device.type != "cuda":
        return "its device is no GPU"
    own = sampler.random_sample
    if own.__module__ == __name__:  # of an engine before this one
        return None
    if list(inspect.signature(own).parameters) != _CALLED_WITH:
        return f"this vLLM's random_sample takes {', '.join(inspect.signature(own).parameters)}"
    try:
        if not as_expected(worker.model_runner.device):
            return "the GPU makes other noise than numpy"
    except Exception as error:  # a kernel that does not compile here, say: vLLM's own way still works
        return f"{type(error).__name__}: {error}"
    sampler.random_sample = _together(sampler)
    return None


def _together(sampler: Any) -> Callable[..., Tensor]:
    """For `random_sample` of vLLM's module `sampler`."""
    own = sampler.random_sample

    def random_sample(
        probs: Float[Tensor, "requests vocabulary"],
        generators: dict[int, torch.Generator],
        use_fp64_gumbel: bool = False,
    ) -> Int[Tensor, " requests"]:
        if not generators or use_fp64_gumbel:
            return own(probs, generators, use_fp64_gumbel)
        noise = torch.empty_like(probs)
        if len(generators) != len(probs):
            noise.exponential_()
        fill_seeded(noise, generators)
        return probs.div_(noise).argmax(-1)

    return random_sample


def keep_noise_of_unread_prompts(worker: Any) -> None:
    """Makes chunked prefill work with seeded requests on a CPU. vLLM samples a token for a prompt that it has read in
    part and throws it away; then it turns the request's generator back by an offset, which a CPU's has not. Here such a
    request has no generator while that token is drawn: its noise begins with its first token, as without chunks."""
    runner = worker.model_runner
    for name in ("_sample", "_bookkeeping_sync"):
        setattr(runner, name, _without_generators_of_unread(runner, getattr(runner, name)))


def _without_generators_of_unread(runner: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        unread = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
        taken = {row: generators.pop(row) for row in unread if row in generators}
        try:
            return own(*args, **kwargs)
        finally:
            generators.update(taken)

    return call


def fill_seeded(noise: Tensor, generators: dict[int, torch.Generator]) -> None:
    """Noise for the rows that have generators, from their seeds and offsets, which it advances."""
    from rollout.vllm.triton_noise import fill_rows

    seeds = [generator.initial_seed() for generator in generators.values()]
    draws = [generator.get_offset() for generator in generators.values()]
    fill_rows(noise, list(generators), seeds, draws)
    for generator, draw in zip(generators.values(), draws, strict=True):
        generator.set_offset(draw + _DRAW)


def as_expected(device: torch.device) -> bool:
    """Whether the kernel makes, on this device, the noise that it should."""
    from rollout.vllm.triton_noise import expected_row, fill_rows

    noise, seeds, draws = torch.zeros(4, 1003, device=device), [7, (1 << 62) + 5], [0, (1 << 33) + 8]
    fill_rows(noise, [3, 1], seeds, draws)
    made = noise.cpu().double().numpy()
    wanted = [expected_row(*given, made.shape[1]) for given in zip(seeds, draws, strict=True)]
    return not made[[0, 2]].any() and np.allclose(made[[3, 1]], wanted, rtol=1e-4)
