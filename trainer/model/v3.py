"""DeepSeek-V3 for training, over packed documents: no padding in the interface, no cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from trainer.model.attention import MLA
from trainer.model.documents import Documents, group_documents
from trainer.model.layers import Linear, RMSNorm, SwiGLU
from trainer.model.moe import Experts, MoE, Router, Routing, sequence_balance
from trainer.model.rope import turns
from trainer.model.v3_config import V3Config
from trainer.precision.recipe import Recipe, check_recipe

BalanceOf = Callable[[int, Routing], Tensor]


@dataclass
class V3Output:
    """`hidden` is after the final norm, ready for `V3Model.logits`. `load`, `experts` and `balance` have one row per
    layer with routed experts, in the order of the layers. `balance` (see `moe.sequence_balance`) is None unless asked
    for."""

    hidden: Float[Tensor, "n hidden"]
    load: Int[Tensor, "moe_layers experts"]
    experts: Int[Tensor, "n moe_layers k"]
    balance: Float[Tensor, "moe_layers documents"] | None = None  # or what the asked-for measure gives
    agreement: Int[Tensor, "moe_layers 3"] | None = None  # with a replayed routing, see `moe.agreement`


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: V3Config, dense: bool, recipe: Recipe) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = MLA(config, recipe)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.intermediate_size, recipe) if dense else MoE(config, recipe)

    def forward(
        self,
        x: Float[Tensor, "n hidden"],
        turn: Complex[Tensor, "n pairs"],
        documents: Documents,
        replay: Int[Tensor, "n k"] | None = None,
    ) -> tuple[Float[Tensor, "n hidden"], Routing | None]:
        x, h = self.attn_norm.add(x, None)
        x, h = self.ffn_norm.add(x, self.attn(h, turn, documents))
        if isinstance(self.ffn, SwiGLU):
            return x + self.ffn(h), None
        return self.ffn(h, replay, residual=x)


class MTP(nn.Module):
    """One depth of multi-token prediction (section 2.2): a projection of the embedding of a later token beside the
    previous depth's output, and a block of its own; embedding and head are the main model's."""

    def __init__(self, config: V3Config, recipe: Recipe) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, recipe)
        self.block = Block(config, dense=False, recipe=recipe)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedded, hidden, turn, documents) -> tuple[Float[Tensor, "n hidden"], Routing]:
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        x, routing = self.block(x, turn, documents)
        return self.norm(x), routing


class V3Model(nn.Module):
    """Weights are uninitialized until `init_weights` or `hf.load_folder` (so that it can be built on the meta
    device). `activation_checkpointing` recomputes every block in the backward pass; "selective" only what is cheap to
    make again on a GPU, the tokens' copies by expert and the experts' activations."""

    def __init__(
        self,
        config: V3Config,
        recipe: Recipe = "bf16",
        activation_checkpointing: bool | Literal["selective"] = False,
    ) -> None:
        super().__init__()
        check_recipe(recipe)
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            Block(config, i < config.first_k_dense_replace, recipe) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embed))
        self.mtp_layers = nn.ModuleList(MTP(config, recipe) for _ in range(config.num_nextn_predict_layers))
        for module in self.modules():
            if isinstance(module, Experts):
                module.keep_rows = activation_checkpointing != "selective"

    def forward(
        self,
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        bounds: Int[Tensor, " documents+1"],
        routed_experts: Int[Tensor, "n moe_layers k"] | None = None,
        balance: bool | BalanceOf = False,
    ) -> V3Output:
        """Document d is tokens[bounds[d]:bounds[d + 1]] and sees itself only; leave `bounds` on the CPU, where they are
        read: from a GPU they are read back, which waits for it. `routed_experts` replays the routing of
        the tokens whose row is not -1. `balance` asks for the sequence-wise balance loss, or for another measure of
        every layer's routing: a function of the layer's row in `load` and its `Routing`."""
        documents = group_documents(bounds, device=tokens.device)
        self._check(tokens, positions, documents, routed_experts)
        turn = turns(self.config, positions)
        x = F.embedding(tokens, self.embed)
        routings: list[Routing] = []
        for layer in self.layers:
            replay = None if routed_experts is None else routed_experts[:, len(routings)]
            x, routing = self._block(layer, x, turn, documents, replay)
            if routing is not None:
                routings.append(routing)
        return self._output(self.norm(x), routings, documents, balance)

    def mtp(
        self,
        hidden: Float[Tensor, "n hidden"],
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        bounds: Int[Tensor, " documents+1"],
        balance: bool | BalanceOf = False,
    ) -> list[V3Output]:
        """One output per depth. `logits(outputs[d - 1].hidden)` at token i predict token i + d + 1 of its document,
        and mean nothing on a document's last d + 1 tokens. `hidden` is the main model's, after the final norm: what
        vLLM, SGLang and transformers feed the draft (section 2.2, eq. 21-23)."""
        documents = group_documents(bounds, device=tokens.device)
        turn = turns(self.config, positions)
        outputs = []
        for depth, layer in enumerate(self.mtp_layers, start=1):
            # Past the document's end there is no token: its last stands in, never another document's.
            later = torch.minimum(torch.arange(len(tokens), device=tokens.device) + depth, documents.last)
            hidden, routing = self._block(layer, F.embedding(tokens[later], self.embed), hidden, turn, documents)
            outputs.append(self._output(hidden, [routing], documents, balance, self.config.moe_layers + depth - 1))
        return outputs

    def logits(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
        return F.linear(hidden, self.embed if self.head is None else self.head)

    @torch.no_grad()
    def update_router_bias(self, load: Int[Tensor, "moe_layers experts"], gamma: float) -> None:
        """Moves every expert's bias by `gamma` against the sign of its load error (section 2.1.2). `load` is the sum
        over the optimizer step of `V3Output.load`; rows of the MTP depths, if given, follow the main model's."""
        routers = self.routers()
        allowed = {self.config.moe_layers, len(routers)}
        if load.ndim != 2 or load.shape[0] not in allowed or load.shape[1] != self.config.n_routed_experts:
            raise ValueError(
                f"found a load of shape {list(load.shape)}, expected [{' or '.join(map(str, sorted(allowed)))}, "
                f"{self.config.n_routed_experts}] (layers with experts, experts)"
            )
        for router, row in zip(routers, load.to(torch.float64), strict=False):
            router.bias += gamma * torch.sign(row.mean() - row).to(router.bias)

    def routers(self) -> list[Router]:
        """In the order of the layers, those of the MTP depths last."""
        blocks = [*self.layers, *(layer.block for layer in self.mtp_layers)]
        return [block.ffn.router for block in blocks if isinstance(block.ffn, MoE)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> V3Model:
        """Normal(0, initializer_range), norms 1, router biases 0 (section 4.2). The same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    drawn = torch.empty(parameter.shape, dtype=torch.float32)
                    parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))
            if isinstance(module, Router):
                module.bias.zero_()
        return self

    def _block(self, layer: Block | MTP, *args):
        if self.activation_checkpointing is True and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def _output(self, hidden, routings: list[Routing], documents: Documents, balance, first_row: int = 0) -> V3Output:
        c = self.config
        if not routings:
            empty = hidden.new_zeros((0, c.n_routed_experts), dtype=torch.long)
            return V3Output(hidden, empty, empty.new_zeros(len(hidden), 0, c.num_experts_per_tok))
        losses = None
        if callable(balance):
            losses = torch.stack([balance(first_row + i, r) for i, r in enumerate(routings)])
        elif balance:
            ids, count, k = documents.ids, len(documents.lengths), c.num_experts_per_tok
            losses = torch.stack([sequence_balance(r, k, ids, count) for r in routings])
        load = torch.stack([r.load for r in routings])
        agreed = None if routings[0].agreement is None else torch.stack([r.agreement for r in routings])
        return V3Output(hidden, load, torch.stack([r.experts for r in routings], dim=1), losses, agreed)

    def _check(self, tokens, positions, documents: Documents, routed_experts) -> None:
        n, c = len(tokens), self.config
        wrong = []
        if positions.shape != tokens.shape:
            wrong.append(f"positions of shape {list(positions.shape)} for tokens of shape {list(tokens.shape)}")
        if (end := int(documents.bounds[-1])) != n:
            wrong.append(f"bounds end at {end}, the batch has {n} tokens")
        expected = (n, c.moe_layers, c.num_experts_per_tok)
        if routed_experts is not None and routed_experts.shape != expected:
            wrong.append(f"routed_experts of shape {list(routed_experts.shape)}, expected {list(expected)}")
        if wrong:
            raise ValueError("; ".join(wrong))
