"""The architecture of a model, in the field names of Hugging Face's DeepSeek-V3 `config.json`."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

# `quantization_config` of DeepSeek's released FP8 weights: E4M3, one float32 scale per 128x128 block
# (README_WEIGHTS.md of DeepSeek-V3).
FP8_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class V3Config:
    """A DeepSeek-V3 model. Raises `ValueError` with every violation at once when the fields do not fit together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    first_k_dense_replace: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        wrong = list(_violations(self))
        if wrong:
            raise ValueError("this is no DeepSeek-V3 model:\n  - " + "\n  - ".join(wrong))

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts in the main model; each MTP depth adds one of its own."""
        return max(self.num_hidden_layers - self.first_k_dense_replace, 0)

    @classmethod
    def load(cls, folder: str | Path) -> V3Config:
        """Reads `folder/config.json`. Errors: FileNotFoundError; ValueError for another architecture, a field that
        this model does not compute, or values that do not fit together."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a Hugging Face folder with a config.json")
        return cls.from_hf(json.loads(path.read_text()))

    @classmethod
    def from_hf(cls, found: dict[str, Any]) -> V3Config:
        """Accepts DeepSeek's own form and that of transformers 5 (`rope_parameters`, `num_mtp_layers`)."""
        if found.get("model_type") != "deepseek_v3":
            raise ValueError(
                f"found model_type {found.get('model_type')!r}, expected 'deepseek_v3': load other architectures "
                "through transformers"
            )
        fixed = {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
        }
        wrong = [
            f"{name} is {found[name]!r}, this model computes {value!r} only"
            for name, value in fixed.items()
            if found.get(name, value) != value
        ]
        if quantization := found.get("quantization_config"):
            wrong += [
                f"quantization_config.{name} is {quantization.get(name)!r}, this release reads {value!r} only"
                for name, value in FP8_BLOCKS.items()
                if name != "activation_scheme" and quantization.get(name, value if name == "fmt" else None) != value
            ]
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in found.items() if name in known}
        if "num_nextn_predict_layers" not in found and "num_mtp_layers" in found:
            values["num_nextn_predict_layers"] = found["num_mtp_layers"]
        if rope := found.get("rope_parameters"):
            values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
            if rope.get("rope_type", "default") != "default":
                values["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            values[name] = values.get(name) or 0
        for name in ("n_group", "topk_group"):
            values[name] = values.get(name) or 1
        required = [field.name for field in fields(cls) if field.name not in values and field.default is MISSING]
        wrong += [f"{name} is missing" for name in required]
        if wrong:
            raise ValueError("config.json does not describe a DeepSeek-V3 model:\n  - " + "\n  - ".join(wrong))
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load as DeepseekV3ForCausalLM."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "num_key_value_heads": self.num_attention_heads,
            # vLLM creates the router's bias only when these two are said.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
        }


def _violations(c: V3Config):
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
    ):  # fmt: skip
        if getattr(c, name) < 1:
            yield f"{name} is {getattr(c, name)}, expected at least 1"
    if c.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim is {c.qk_rope_head_dim}, expected an even number (RoPE turns pairs)"
    if c.q_lora_rank is not None and c.q_lora_rank < 1:
        yield f"q_lora_rank is {c.q_lora_rank}, expected at least 1, or null for a full-rank query"
    if c.moe_layers or c.num_nextn_predict_layers:
        yield from _router_violations(c)
    if c.rope_scaling is not None:
        kind = c.rope_scaling.get("rope_type", c.rope_scaling.get("type"))
        if kind != "yarn":
            yield f"rope_scaling has type {kind!r}, expected 'yarn' or no rope_scaling"
        for name in ("factor", "original_max_position_embeddings"):
            if name not in c.rope_scaling:
                yield f"rope_scaling lacks {name}, which YaRN needs"


def _router_violations(c: V3Config):
    if c.moe_intermediate_size < 1:
        yield f"moe_intermediate_size is {c.moe_intermediate_size}, expected at least 1"
    if c.n_group < 1 or c.n_routed_experts < 1 or c.n_routed_experts % c.n_group:
        yield f"n_routed_experts {c.n_routed_experts} do not divide into n_group {c.n_group} equal groups"
        return
    in_group = c.n_routed_experts // c.n_group
    if c.n_group > 1 and in_group < 2:
        yield f"{c.n_group} groups of {in_group} expert: a group's score is the sum of its two best, expected 2 or more"
    if not 1 <= c.topk_group <= c.n_group:
        yield f"topk_group is {c.topk_group}, expected 1 to n_group {c.n_group}"
    if not 1 <= c.num_experts_per_tok <= c.topk_group * in_group:
        yield (
            f"num_experts_per_tok is {c.num_experts_per_tok}, expected 1 to the {c.topk_group * in_group} experts of "
            f"the {c.topk_group} groups kept"
        )
