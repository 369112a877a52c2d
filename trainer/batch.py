"""The one record the trainer sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.transfer import send


@dataclass
class Batch:
    """Packed documents of one micro-batch. Every per-token value lives on the token it describes: `logprobs[t]` is
    the log-probability of `tokens[t]` given the tokens of its document before it, and is meaningless on a document's
    first token, which `loss_mask` therefore never selects.

    `total_tokens` and `total_sequences` are the loss's *global* denominators over the whole optimizer step (all
    micro-batches, all ranks), so that packing and sharding never change the loss.
    """

    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    bounds: Int[Tensor, " documents+1"]  # document d is tokens[bounds[d]:bounds[d + 1]]
    loss_mask: Bool[Tensor, " n"]
    total_tokens: int
    total_sequences: int
    temperature: float = 1.0
    advantages: Float[Tensor, " n"] | None = None
    behaviour_logprobs: Float[Tensor, " n"] | None = None  # the engine's, when the token was sampled
    old_logprobs: Float[Tensor, " n"] | None = None  # the trainer's at the step's start
    reference_logprobs: Float[Tensor, " n"] | None = None
    teacher_logprobs: Float[Tensor, " n"] | None = None
    versions: Int[Tensor, " n"] | None = None  # policy version that sampled the token
    routed_experts: Int[Tensor, "n moe_layers k"] | None = None  # -1: the router chooses
    sequence_ids: Int[Tensor, " documents"] | None = None  # position of each document in the step's list of samples

    @property
    def document_ids(self) -> Int[Tensor, " n"]:
        """The document every token belongs to."""
        lengths = self.bounds.diff()  # the bounds may have stayed on the CPU, see trainer.packing.to_device
        ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return send(ids, self.tokens.device)
