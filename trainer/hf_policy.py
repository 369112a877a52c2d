"""Any causal language model that transformers loads, as a policy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import hf_attention as packed_attention
from trainer.batch import Batch
from trainer.checkpoint.folder import FolderReader, FolderWriter, mismatches
from trainer.checkpoint.hf import SHARD_BYTES, layout
from trainer.checkpoint.model_folder import switches
from trainer.hf_attention import Layout
from trainer.hf_model import TOLERANCE, hold_rotation, load_config, load_model, named_tensors
from trainer.packing import Sample, pack, to_device
from trainer.policy import Head, Policy, PolicyOptions

log = logging.getLogger(__name__)

FARTHEST = 512  # tokens of a sliding window or the like that the check at loading still goes past


class TransformersPolicy(Policy):
    """Runs packed wherever the model's attention goes through transformers' interface and nothing else mixes tokens;
    otherwise sequences of similar length go padded through the model. Which one is found by a probe when it is
    loaded, and logged."""

    module: PreTrainedModel

    def __init__(self, module: PreTrainedModel, options: PolicyOptions, device: torch.device):
        self.module, self.options, self.device = module.eval(), options, device
        config = module.config.get_text_config()
        self.max_positions = getattr(config, "max_position_embeddings", None) or 2**31
        self.vocabulary = config.vocab_size
        if options.recipe != "bf16":
            kind = config.model_type
            raise ValueError(f"recipe {options.recipe} is for DeepSeek-V3 models; this is a {kind}: use bf16")
        if options.activation_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in module.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # what its checkpoint asks for; the layers inside stay without dropout
        self._choose_form()

    @classmethod
    def load(
        cls, options: PolicyOptions, fields: dict[str, Any], device: torch.device, seed: int
    ) -> TransformersPolicy:
        dtype = getattr(torch, options.dtype)
        if options.path is not None:
            module = load_model(options.path, load_config(options.path), options.longest, dtype=dtype)
        else:
            config = AutoConfig.for_model(**fields)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            hold_rotation(module, options.longest)
        return cls(module.to(device), options, device)

    def hidden(self, batch: Batch) -> Float[Tensor, "n hidden"]:
        if batch.routed_experts is not None:
            raise ValueError("routed_experts is set: routing is replayed in DeepSeek-V3 models only")
        layout = Layout(batch.bounds, self.device)
        if not self.packed:
            return self._padded(batch, layout)
        out = self.module.base_model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, layout=layout
        )
        return out.last_hidden_state[0]

    def _padded(self, batch: Batch, layout: Layout) -> Float[Tensor, "n hidden"]:
        real = torch.zeros_like(layout.source)
        real[layout.place] = 1
        sizes = [sequences * longest for sequences, longest in layout.shapes]
        groups = zip(
            batch.tokens[layout.source].split(sizes), batch.positions[layout.source].split(sizes), real.split(sizes),
            layout.shapes, strict=True,
        )  # fmt: skip
        hidden = []
        for tokens, positions, mask, shape in groups:
            out = self.module.base_model(
                input_ids=tokens.view(shape),
                position_ids=positions.view(shape),
                attention_mask=mask.view(shape),
                use_cache=False,
            )
            hidden.append(out.last_hidden_state)
        return layout.unpad(hidden)

    def head(self) -> Head:
        """With the scales and caps that some architectures put behind it; the probe at loading checks the result."""
        config = self.module.config.get_text_config()
        layer = self.module.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)

    def weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor]]:
        return named_tensors(self.module)

    def _save_beside_weights(self, folder: Path) -> None:
        config = copy.deepcopy(self.module.config)
        config.architectures, config.dtype = [type(self.module).__name__], self.module.dtype
        config.save_pretrained(folder)
        super()._save_beside_weights(folder)

    def _save_weights(self, folder: Path) -> None:
        weights = dict(self.weights())
        with FolderWriter(folder, layout(weights.items()), SHARD_BYTES) as writer:
            for name, tensor in weights.items():
                writer.write(name, tensor)

    def load_weights(self, folder: Path) -> None:
        saved = load_config(folder)
        if saved.model_type != self.module.config.model_type:
            raise ValueError(
                f"{folder} holds another architecture: {saved.model_type}, here {self.module.config.model_type}"
            )
        live = {name: tuple(tensor.shape) for name, tensor in self.weights()}
        stored = {name: entry.shape for name, entry in FolderReader(folder).entries.items()}
        wrong = mismatches(live, stored)
        if wrong:
            raise ValueError(f"{folder} does not fit this policy: {'; '.join(wrong[:8])}")
        # through a second model: it alone knows how the checkpoint's tensors are fused
        other = load_model(folder, saved, self.options.longest, dtype=self.module.dtype)
        self.module.load_state_dict(other.state_dict())

    def _choose_form(self) -> None:
        """The first form that gives the log-probabilities of the model's own eager code, one sequence at a time. (Not
        every kernel does: SDPA leaves out Gemma 2's softcapping without a word.) Raises ValueError if none does."""
        vocabulary = min(self.vocabulary, 1000)
        reach = min(FARTHEST, self.max_positions - 8)
        borders = [n + 8 for n in switches(self.module.config.to_dict()) if n <= reach]
        sequences = [[(7 * i + 3) % vocabulary for i in range(n)] for n in (6, 9, *borders)]
        (batch,) = pack([Sample(s[:1], s[1:]) for s in sequences], sum(map(len, sequences)))
        default = self.module.config._attn_implementation
        self.module.set_attn_implementation("eager")
        assert batch.sequence_ids is not None
        # a model with small weights hides a missing softcap from the probe
        capped = getattr(self.module.config.get_text_config(), "attn_logit_softcapping", None) is not None
        padded = "eager" if capped else default
        expected = torch.cat([self._stock_logprobs(sequences[i]) for i in batch.sequence_ids.tolist()])
        failures = []
        for form, implementation in (("packed", packed_attention.NAME), ("padded", padded), ("padded", "eager")):
            self.packed = form == "packed"
            if self.packed and not getattr(self.module, "_supports_attention_backend", False):
                failures.append("packed: its attention does not go through transformers' interface")
                continue
            try:
                self.module.set_attn_implementation(implementation)
                if self.packed and self._sequences_mix(batch):
                    failures.append("packed: its layers let tokens see those of other sequences")
                    continue
                with torch.no_grad():
                    found, _ = self.logprobs(batch)
            except (NotImplementedError, TypeError, ValueError) as error:
                failures.append(f"{form}: {error}")
                continue
            gap = (found[batch.loss_mask.to(self.device)] - expected).abs().mean().item()
            if gap <= TOLERANCE[self.module.dtype]:
                if failures:
                    name = type(self.module).__name__
                    why = failures[0]
                    log.warning("%s runs padded with %s attention, which is slower (%s)", name, implementation, why)
                return
            failures.append(f"{form} with {implementation}: log-probabilities differ from the model's own by {gap:.2g}")
        raise ValueError(f"{type(self.module).__name__} cannot be trained here: {'; '.join(failures)}")

    def _sequences_mix(self, batch: Batch) -> bool:
        """Whether, packed, the second sequence depends on the first: whether a derivative is not exactly zero."""
        embedded: list[Tensor] = []
        hook = self.module.get_input_embeddings().register_forward_hook(
            lambda layer, inputs, output: embedded.append(output.detach().requires_grad_()) or embedded[0]
        )
        try:
            hidden = self.hidden(to_device(batch, self.device))[batch.bounds[1] :]
        finally:
            hook.remove()
        direction = torch.linspace(-1, 1, hidden.shape[-1], device=self.device, dtype=hidden.dtype)
        (gradient,) = torch.autograd.grad((hidden @ direction).sum(), embedded[0])
        return bool(gradient.flatten(0, -2)[: batch.bounds[1]].count_nonzero())

    @torch.no_grad()
    def _stock_logprobs(self, sequence: list[int]) -> Float[Tensor, " n-1"]:
        """From the model's own forward pass."""
        tokens = torch.tensor([sequence], device=self.device)
        logits = self.module(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]

