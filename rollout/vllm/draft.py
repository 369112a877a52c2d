"""The draft model of speculative decoding inside a vLLM worker.

DeepSeek's layers of multi-token prediction are a second model to vLLM, beside the one that it serves: they share its
embedding and head, and `reload_weights` leaves the rest of them as it was. A draft that lags behind its policy costs
accepted tokens and nothing else: what is accepted, and with which log-probability, the served model alone decides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

Weights = Iterable[tuple[str, Tensor]]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def draft_model(runner: Any) -> nn.Module | None:
    """The policy's prediction layers as vLLM runs them; None where drafts come from elsewhere or from nowhere."""
    speculative = runner.vllm_config.speculative_config
    if speculative is None or speculative.method != "mtp":
        return None
    return runner.drafter.model


def kept_for_draft(weights: Weights, layers: int, kept: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Passes the weights on and keeps in `kept` those of the layers past the last of `layers`."""
    for name, tensor in weights:
        if (match := _LAYER.match(name)) and int(match[1]) >= layers:
            kept.append((name, tensor))
        yield name, tensor


def reload_draft(runner: Any, draft: nn.Module, weights: Weights) -> None:
    """vLLM's way of `reload_weights`, which knows the served model only, for the draft."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(draft)
    try:
        draft.load_weights(iter(weights))
    finally:
        finalize_layerwise_reload(draft, runner.vllm_config.speculative_config.draft_model_config)


class Drafts:
    """Counts drafted and accepted tokens by request. vLLM does so for all requests together and only where it logs."""

    def __init__(self, scheduler: Any):
        self._counts: dict[str, tuple[int, int, int]] = {}
        observe = scheduler.make_spec_decoding_stats

        def counted(stats: Any, *, num_draft_tokens: int, num_accepted_tokens: int, request_id: str, **others: Any):
            passes, drafted, accepted = self._counts.get(request_id, (0, 0, 0))
            self._counts[request_id] = passes + 1, drafted + num_draft_tokens, accepted + num_accepted_tokens
            return observe(
                stats,
                num_draft_tokens=num_draft_tokens,
                num_accepted_tokens=num_accepted_tokens,
                request_id=request_id,
                **others,
            )

        scheduler.make_spec_decoding_stats = counted

    def take(self, request: str) -> tuple[int, int, int]:
        """Passes that verified drafts, tokens drafted and tokens accepted; forgets them."""
        return self._counts.pop(request, (0, 0, 0))


def keep_temperature_of_drafts(runner: Any, temperature: float) -> None:
    """Prompts are scored through the sampler's `compute_logprobs`, which is changed for that (`temperature` not 1);
    tokens accepted from drafts take the same path, with the temperature in their logits already. They get a sampler
    that keeps the unchanged one. To be called before the change."""
    verifier = getattr(runner, "rejection_sampler", None)
    if verifier is not None:
        verifier.sampler = runner.sampler if temperature == 1.0 else copy.copy(runner.sampler)
