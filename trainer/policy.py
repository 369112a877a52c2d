"""A policy: loaded, asked for log-probabilities, saved. V3 natively, any other causal LM through transformers."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.checkpoint import hf
from trainer.checkpoint.model_folder import generation_fields, read_config, refusal, text_end
from trainer.model.balance import BalanceKind, BalanceLoss, HitCounter
from trainer.model.head import token_logprobs
from trainer.model.v3 import BalanceOf, V3Model
from trainer.model.v3_config import V3Config
from trainer.packing import to_device
from trainer.transfer import send

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip

NO_ROUTER = "a balance loss is asked for and this policy is no DeepSeek-V3 model with routed experts; set balance: none"


class PolicyOptions(BaseModel):
    """Where a policy comes from, a Hugging Face folder (`path`) or fresh weights (`init`), and how it computes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    path: str | None = None
    init: dict[str, Any] | None = Field(
        None, description="config.json fields of a new model: V3's, or with model_type another architecture's"
    )
    tokenizer: str | None = None  # folder whose tokenizer goes into the checkpoints; none takes that of `path`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recipe: Literal["bf16", "fp8", "fp8_emulated"] = "bf16"
    activation_checkpointing: bool | Literal["selective"] = False  # see trainer.model.v3.V3Model
    # Of the run, not of its config: the tokens of its longest sequence, which decide rotations that depend on them, and
    # the ids that end a text, for the checkpoints (none: those that the folder names).
    longest: int | None = Field(None, exclude=True)
    end_tokens: tuple[int, ...] | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _one_source(self) -> PolicyOptions:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path (a Hugging Face folder) or init (the fields of a new model)")
        return self

    @property
    def tokenizer_folder(self) -> str | None:
        return self.tokenizer or self.path


class Head(NamedTuple):
    """logits = softcap(hidden @ weight.T * scale + bias)"""

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None


class Policy(ABC):
    """What the trainer asks of a policy. Batches may lie anywhere; results are on the policy's device."""

    module: nn.Module
    device: torch.device
    options: PolicyOptions
    max_positions: int  # longest document, in tokens
    replays_routing = True  # uses the batch's `routed_experts`; a frozen copy does not
    vocabulary: int

    @abstractmethod
    def hidden(self, batch: Batch) -> Float[Tensor, "n hidden"]:
        """What the head sees. `batch` is on the policy's device, its bounds on the CPU."""

    @abstractmethod
    def head(self) -> Head: ...

    @abstractmethod
    def weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, the live tensor), tied copies left out. `mtp` includes multi-token-prediction layers."""

    def layout(self, mtp: bool = False) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Names, shapes and dtypes of `weights`."""
        return [(name, tensor.shape, tensor.dtype) for name, tensor in self.weights(mtp)]

    def owners(self, mtp: bool = False) -> list[int]:
        """The rank that has each tensor in `owned_weights`."""
        return [0] * len(self.layout(mtp))

    def owned_weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor | None]]:
        """As `weights`; one of several ranks has None where another one owns the tensor."""
        return self.weights(mtp)

    @abstractmethod
    def _save_weights(self, folder: Path) -> None: ...

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Replaces the weights by those of a folder of the same architecture; ValueError otherwise."""

    def logprobs(
        self, batch: Batch, entropy: bool = False, every_token: bool = False
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """Log-probability of every token of the loss mask, log_softmax(logits / batch.temperature), float32, in nats,
        and the entropy of the distribution it was drawn from; 0 on all other tokens. `every_token` takes all but the
        documents' first, whatever the mask."""
        targets = self._targets(batch, 1, every_token)
        self._check_routing(batch)
        batch = to_device(batch, self.device)
        values, entropies = self._predict(self.hidden(batch), batch.tokens, targets, 1, batch.temperature, entropy)
        zeros = torch.zeros(len(batch.tokens), dtype=torch.float32, device=self.device)
        if entropies is not None:
            entropies = zeros.index_copy(0, targets, entropies)
        return zeros.index_copy(0, targets, values), entropies

    def next_token_loss(
        self,
        batch: Batch,
        mtp_weight: float = 0.0,
        balance: BalanceKind = "none",
        balance_weight: float = 0.0,
        step_hits: Int[Tensor, "routers experts"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """This micro-batch's share of the step's mean cross-entropy in nats per token of the loss mask, plus
        `mtp_weight` / D times that of the D depths of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, eq. 24
        and 25), plus `balance_weight` (α) times the balance loss of every router (eq. 17-20), the mean over the step's
        sequences or over its tokens as one batch. Also the shares themselves: `loss`, `mtp_loss` and, where there are
        several depths, `mtp_loss/<depth>`; `balance_loss`, the mean over the routers. Temperature is 1.

        The batch-wise balance needs the whole step's `affinity_hits`; without, this micro-batch is taken for the whole
        step. No wait for a GPU in here."""
        targets = self._targets(batch, 1, False)
        self._check_routing(batch)
        on_device = to_device(batch, self.device)
        balanced = balance != "none" and balance_weight > 0
        measure = self._balance_loss(balance, on_device, step_hits) if balanced else None
        hidden = self._measured_hidden(on_device, measure)
        values, _ = self._predict(hidden, on_device.tokens, targets, 1, 1.0, False)
        loss = -values.sum() / batch.total_tokens
        metrics = {"loss": loss.detach()}
        if mtp_weight:
            depths = self._mtp_hidden(hidden, on_device, measure)
            losses = []
            for depth, deeper in enumerate(depths, start=1):
                targets = self._targets(batch, depth + 1, False)
                values, _ = self._predict(deeper, on_device.tokens, targets, depth + 1, 1.0, False)
                losses.append(-values.sum() / batch.total_tokens)
            mtp_loss = torch.stack(losses).mean()
            metrics["mtp_loss"] = mtp_loss.detach()
            if len(losses) > 1:
                metrics |= {f"mtp_loss/{depth}": part.detach() for depth, part in enumerate(losses, start=1)}
            loss = loss + mtp_weight * mtp_loss
        if measure is not None:
            metrics["balance_loss"] = measure.mean
            loss = loss + balance_weight * measure.sum
        return loss, metrics

    def affinity_hits(self, batches: Sequence[Batch], mtp: bool = False) -> Int[Tensor, "routers experts"]:
        """How often each expert is among a token's k highest affinities, over all of `batches` (with `mtp` also in the
        depths of multi-token prediction): what the batch-wise balance loss of a step in several micro-batches needs,
        at the price of one forward pass."""
        raise ValueError(NO_ROUTER)

    def _balance_loss(self, kind: BalanceKind, batch: Batch, step_hits: Tensor | None) -> BalanceLoss:
        raise ValueError(NO_ROUTER)

    def _measured_hidden(self, batch: Batch, measure: BalanceOf | None) -> Float[Tensor, "n hidden"]:
        assert measure is None, "only a policy with a router has a balance loss"
        return self.hidden(batch)

    def _mtp_hidden(
        self, hidden: Tensor, batch: Batch, measure: BalanceOf | None = None
    ) -> list[Float[Tensor, "n hidden"]]:
        raise ValueError("mtp_weight is set and this policy has no multi-token prediction; set it to 0")

    @property
    def router_layers(self) -> list[int]:
        """The layer that each row of `take_router_load` belongs to, depths of multi-token prediction counted on."""
        return []

    def take_router_load(self) -> Int[Tensor, "moe_layers experts"] | None:
        """Tokens sent to each expert in forward passes with gradient since the last call; None without a router."""
        return None

    def take_router_agreement(self) -> Int[Tensor, " 3"] | None:
        """How the router's own choices agreed with the replayed ones (`trainer.model.moe.agreement`), over the layers
        of the forward passes with gradient since the last call; None where nothing was replayed."""
        return None

    def update_router_bias(self, load: Int[Tensor, "moe_layers experts"], gamma: float) -> None:
        raise ValueError("router_bias_gamma is set and this policy has no router bias; set it to 0")

    def frozen_copy(self) -> Policy:
        """A second policy with the same weights, which are never trained. It routes by itself: what experts the policy
        used when it wrote says nothing of what another one gives the tokens."""
        other = copy.copy(self)
        other.replays_routing = False
        other.module = copy.deepcopy(self.module).requires_grad_(False)
        return other

    @torch.no_grad()
    def copy_weights_from(self, other: Policy) -> None:
        """Takes over the weights of a policy of the same architecture."""
        ours, theirs = self.module.state_dict(), other.module.state_dict()
        torch._foreach_copy_([ours[name] for name in theirs], list(theirs.values()))

    def save(self, folder: str | Path, dtype: str | None = None) -> None:
        """Writes a Hugging Face folder that transformers and vLLM load, with the tokenizer's files; the weights in
        `dtype` ("float32" or "bfloat16") where it is given. Not atomic: see trainer.checkpoint.checkpoint."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        policy = self
        if dtype is not None and dtype != self.options.dtype:
            policy = self.frozen_copy()
            policy.module.to(getattr(torch, dtype))
        policy._save_weights(folder)
        policy._save_beside_weights(folder)

    def _save_beside_weights(self, folder: Path) -> None:
        """generation_config.json with the tokens that end a text, and the tokenizer's files."""
        source, ends = self.options.tokenizer_folder, self.options.end_tokens
        if ends is None:
            ends = text_end(source).ids if source is not None else ()
        fields = generation_fields(self.options.path or source, ends)
        if fields:
            (folder / "generation_config.json").write_text(json.dumps(fields, indent=2) + "\n")
        for name in TOKENIZER_FILES if source is not None else ():
            if (Path(source) / name).is_file() and not (folder / name).exists():
                shutil.copyfile(Path(source) / name, folder / name)

    def try_saving(self) -> None:
        """Writes a checkpoint without its weights and throws it away: what would fail then fails now, before the first
        step. Raises what `save` would."""
        with tempfile.TemporaryDirectory(prefix="rlzero-try-") as folder:
            self._save_beside_weights(Path(folder))

    def _targets(self, batch: Batch, ahead: int, every_token: bool) -> Int[Tensor, " targets"]:
        """Indices of the tokens to predict from `ahead` tokens before them in their document, on the policy's
        device."""
        longest = int(batch.bounds.diff().max()) if len(batch.bounds) > 1 else 0
        if longest > self.max_positions:
            raise ValueError(
                f"a sample of {longest} tokens is longer than the policy's {self.max_positions} positions "
                "(max_position_embeddings): shorten prompts or completions"
            )
        inside = batch.positions >= ahead
        targets = (inside if every_token else batch.loss_mask & inside).nonzero()[:, 0]
        return send(targets, self.device)

    def _check_routing(self, batch: Batch) -> None:
        """Raises ValueError for routed experts that the policy has not: on a GPU they would be memory faults. Only
        while the batch lies on the CPU; to look on a GPU would wait for it."""
        if batch.routed_experts is not None:
            raise ValueError("routed_experts is set: routing is replayed in DeepSeek-V3 models only")

    def _predict(self, hidden, tokens, targets, ahead, temperature, entropy):
        head = self.head()
        temperature = temperature if head.softcap is not None else temperature / head.scale
        return token_logprobs(
            hidden.index_select(0, targets - ahead),
            head.weight,
            tokens[targets],
            temperature=temperature,
            bias=head.bias,
            softcap=head.softcap,
            entropy=entropy,
        )


class V3Policy(Policy):
    """The trainer's own DeepSeek-V3 model."""

    module: V3Model

    def __init__(self, module: V3Model, options: PolicyOptions, device: torch.device):
        self.module, self.options, self.device = module, options, device
        self.max_positions = module.config.max_position_embeddings
        self.vocabulary = module.config.vocab_size
        self._load: Tensor | None = None
        self._agreement: Tensor | None = None

    def hidden(self, batch: Batch) -> Float[Tensor, "n hidden"]:
        return self._measured_hidden(batch, None)

    def _measured_hidden(self, batch: Batch, measure: BalanceOf | None) -> Float[Tensor, "n hidden"]:
        bounds = batch.bounds  # on the CPU, where the model reads them
        replay = batch.routed_experts if self.replays_routing else None
        out = self.module(batch.tokens, batch.positions, bounds, replay, measure or False)
        self._count(slice(0, len(out.load)), out.load)
        if out.agreement is not None and torch.is_grad_enabled():
            seen = out.agreement.sum(0)
            self._agreement = seen if self._agreement is None else self._agreement + seen
        return out.hidden

    def _mtp_hidden(
        self, hidden: Tensor, batch: Batch, measure: BalanceOf | None = None
    ) -> list[Float[Tensor, "n hidden"]]:
        if not self.module.config.num_nextn_predict_layers:
            raise ValueError("mtp_weight is set and num_nextn_predict_layers is 0: set one of them otherwise")
        bounds = batch.bounds
        outputs = self.module.mtp(hidden, batch.tokens, batch.positions, bounds, measure or False)
        for depth, out in enumerate(outputs):
            row = self.module.config.moe_layers + depth
            self._count(slice(row, row + 1), out.load)
        return [out.hidden for out in outputs]

    def _check_routing(self, batch: Batch) -> None:
        routed, c = batch.routed_experts, self.module.config
        if routed is None or routed.device.type != "cpu" or not routed.numel():
            return
        expected = (len(batch.tokens), c.moe_layers, c.num_experts_per_tok)
        if routed.shape != expected:
            raise ValueError(
                f"routed_experts of shape {list(routed.shape)}, expected {list(expected)} (tokens, layers with "
                "experts, experts per token): were they recorded with this model?"
            )
        low, high = (int(value) for value in routed.aminmax())
        if low < -1 or high >= c.n_routed_experts:
            raise ValueError(
                f"routed_experts from {low} to {high}; this policy has experts 0 to {c.n_routed_experts - 1}, and -1 "
                "lets the router choose: were they recorded with this model?"
            )

    def _balance_loss(self, kind: BalanceKind, batch: Batch, step_hits: Tensor | None) -> BalanceLoss:
        if not self.router_layers:
            raise ValueError(NO_ROUTER)
        return BalanceLoss(kind, self.module.config.num_experts_per_tok, batch, step_hits)

    @torch.no_grad()
    def affinity_hits(self, batches: Sequence[Batch], mtp: bool = False) -> Int[Tensor, "routers experts"]:
        config = self.module.config
        if not self.router_layers:
            raise ValueError(NO_ROUTER)
        counter = HitCounter(len(self.router_layers), config.n_routed_experts, config.num_experts_per_tok, self.device)
        for batch in batches:
            there = to_device(batch, self.device)
            hidden = self._measured_hidden(there, counter)
            if mtp:
                self._mtp_hidden(hidden, there, counter)
        return counter.hits

    @property
    def router_layers(self) -> list[int]:
        config = self.module.config
        body = range(config.num_hidden_layers - config.moe_layers, config.num_hidden_layers)
        return [*body, *(config.num_hidden_layers + depth for depth in range(config.num_nextn_predict_layers))]

    def _count(self, rows: slice, load: Tensor) -> None:
        if not torch.is_grad_enabled() or not len(load):
            return
        if self._load is None:
            config = self.module.config
            layers = config.moe_layers + config.num_nextn_predict_layers
            self._load = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=self.device)
        self._load[rows] += load

    def take_router_load(self) -> Int[Tensor, "moe_layers experts"] | None:
        load, self._load = self._load, None
        return load

    def take_router_agreement(self) -> Int[Tensor, " 3"] | None:
        agreed, self._agreement = self._agreement, None
        return agreed

    def update_router_bias(self, load: Int[Tensor, "moe_layers experts"], gamma: float) -> None:
        self.module.update_router_bias(load, gamma)

    def head(self) -> Head:
        return Head(self.module.embed if self.module.head is None else self.module.head)

    def weights(self, mtp: bool = False) -> Iterator[tuple[str, Tensor]]:
        return hf.named_checkpoint_tensors(self.module, mtp)

    def _save_weights(self, folder: Path) -> None:
        hf.save_folder(self.module, folder)

    def load_weights(self, folder: Path) -> None:
        self._check_architecture(folder)
        hf.load_weights(self.module, folder)

    def _check_architecture(self, folder: Path) -> None:
        found = V3Config.load(folder)
        if found != self.module.config:
            ours, theirs = self.module.config.to_hf(), found.to_hf()
            differ = [f"{k} is {theirs[k]}, here {ours[k]}" for k in ours if ours[k] != theirs[k]]
            raise ValueError(f"{folder} holds another architecture: {'; '.join(differ)}")


def load_policy(options: PolicyOptions, device: str | torch.device = "cpu", seed: int = 0) -> Policy:
    """The policy of `options.path`, or a new one with weights drawn from `seed`. Errors: FileNotFoundError without a
    config.json; ValueError for a folder that is no causal language model or whose tensors do not fit."""
    policy = _load(options, torch.device(device), seed)
    policy.try_saving()
    return policy


def _load(options: PolicyOptions, device: torch.device, seed: int) -> Policy:
    dtype = getattr(torch, options.dtype)
    if options.path is not None and (why := refusal(options.path)):
        raise ValueError(f"{options.path}: {why}")
    if options.path is not None:
        fields = read_config(Path(options.path))
    else:
        fields = {"model_type": "deepseek_v3", **(options.init or {})}
    if fields.get("model_type") != "deepseek_v3":
        from trainer.hf_policy import TransformersPolicy  # transformers takes seconds to import

        return TransformersPolicy.load(options, fields, device, seed)
    if options.path is not None:
        module = hf.load_folder(options.path, dtype, device, options.recipe, options.activation_checkpointing)
    else:
        module = V3Model(V3Config.from_hf(fields), options.recipe, options.activation_checkpointing)
        module = module.init_weights(seed).to(device=device, dtype=dtype)
    return V3Policy(module, options, device)
