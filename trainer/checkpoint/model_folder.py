"""What a Hugging Face folder says of its model: the one reader of config.json and generation_config.json.

Reads JSON alone and imports nothing heavy: commands ask before they start anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.model.v3_config import FP8_BLOCKS

# Architectures of docs/models.md: the tests train them and compare both engines with the trainer.
TESTED = frozenset(
    "cohere deepseek_v2 deepseek_v3 gemma2 gemma3_text glm4 gpt2 gpt_neox granite llama mistral olmo2 phi3 qwen2 qwen3 "
    "qwen3_moe smollm3".split()
)
_ALIBI = "its attention adds ALiBi biases that neither packing nor the torch engine computes"
REFUSED_BY_VLLM = {
    "gpt_neox": "vLLM runs it through its generic backend with wrong log-probabilities",
}
REFUSED = {
    "bloom": _ALIBI,
    "falcon": _ALIBI,
    "mpt": _ALIBI,
    "gptj": "its attention does not go through transformers' interface and its rotation is that of no engine here",
}
INSTEAD = "take a base of one of the architectures in docs/models.md"


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; {} where there is no file. ValueError for what is no JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): is the folder complete?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected a JSON object: is the folder complete?")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """The fields of the folder's config.json. FileNotFoundError; ValueError for what is no JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: policy.path must be a Hugging Face folder with a config.json")
    return read_json(path)


def model_fields(folder: str | Path | None) -> dict[str, Any]:
    """`read_config` where the folder can be read, {} where not (yet): loading the model reports that better."""
    try:
        return read_config(folder or "")
    except (OSError, ValueError):
        return {}


# ---- what ends a text ----


SHOWN = 6  # tokens


@dataclass(frozen=True)
class TextEnd:
    """The tokens that end a text, and which source names which. One rule for trainer, checkpoints and engines."""

    ids: tuple[int, ...]
    sources: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """Whether a source leaves out what another names."""
        return any(set(ids) != set(self.ids) for ids in self.sources.values())

    def describe(self, tokenizer: Any = None) -> str:
        """The tokens in words and who names them, for the printed plan and for warnings."""

        def words(ids: Iterable[int]) -> str:
            ids = list(ids)
            said = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" if tokenizer else str(i) for i in ids[:SHOWN]]
            return ", ".join(said + [f"and {len(ids) - SHOWN} more"] * (len(ids) > SHOWN))

        if not self.ids:
            return "nothing: neither generation_config.json nor config.json nor a tokenizer names an EOS token"
        if not self.differ:
            return f"{words(self.ids)}, as {' and '.join(self.sources)} say"
        return f"{words(self.ids)}; " + "; ".join(f"{name}: {words(ids)}" for name, ids in self.sources.items())


def text_end(folder: str | Path, tokenizer: Any = None, learned: Iterable[int] = ()) -> TextEnd:
    """What ends a text of the model in `folder`: the EOS ids of generation_config.json (else of config.json), the
    tokenizer's EOS, the token with which its chat template ends an assistant's turn, and `learned`, those that ended
    what fine-tuning learned."""
    folder = Path(folder)
    fields = model_fields(folder)
    sources = {}
    for name, found in (
        ("generation_config.json", read_json(folder / "generation_config.json").get("eos_token_id")),
        ("config.json", fields.get("eos_token_id", (fields.get("text_config") or {}).get("eos_token_id"))),
    ):
        if found is not None and found != []:
            sources[name] = tuple(found) if isinstance(found, list) else (found,)
            break
    if tokenizer is not None:
        turn = turn_end(tokenizer)
        sources |= {"the tokenizer": (tokenizer.eos_token_id,)} if tokenizer.eos_token_id is not None else {}
        sources |= {"the chat template": (turn,)} if turn is not None else {}
    if learned := tuple(sorted(set(learned))):
        sources["fine-tuning"] = learned
    return TextEnd(tuple(sorted({i for ids in sources.values() for i in ids})), sources)


def turn_end(tokenizer: Any) -> int | None:
    """The special or added token that the chat template writes behind an assistant's message; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "rlzeroturn"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], tokenize=False
        )
    except Exception:  # a template is a program of the model's: one that refuses this conversation ends no turn here
        return None
    tail = text.rpartition(mark)[2].lstrip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def generation_fields(folder: str | Path | None, end_tokens: Iterable[int]) -> dict[str, Any]:
    """The generation_config.json of a checkpoint: that of `folder` with `end_tokens`. Where it decodes greedily, flags
    that only sampling reads are left out: transformers refuses to write them."""
    found = read_json(Path(folder) / "generation_config.json") if folder is not None else {}
    found.pop("_from_model_config", None)  # or transformers takes the ids of config.json again
    if not found.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            found.pop(name, None)
    ends = list(end_tokens)
    return {**found, "eos_token_id": ends if len(ends) != 1 else ends[0]} if ends else found


# ---- what cannot be used ----


def refusal(folder: str | Path, engine: str | None = None) -> str | None:
    """Why the model in `folder` cannot be trained, or served by `engine` (torch or vllm), with what to do; None where
    nothing is known against it, or where there is no folder (yet). ValueError for files that are no JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            return f"holds an adapter of {base}, not a model: merge it into its base and save that (merge_and_unload)"
        return None
    config = read_config(folder)
    kind, classes = config.get("model_type"), config.get("architectures") or []
    quantized = config.get("quantization_config")
    if quantized and not (kind == "deepseek_v3" and {**quantized, **FP8_BLOCKS} == quantized):
        method = quantized.get("quant_method", "an unnamed method")
        return f"its weights are quantized ({method}), and training needs them in full: take the BF16 or FP32 model"
    if kind in REFUSED:
        return f"a {kind} model cannot be trained or served here: {REFUSED[kind]}; {INSTEAD}"
    if config.get("is_encoder_decoder"):
        return f"a {kind} model is an encoder-decoder, and prompts go through a decoder alone here; {INSTEAD}"
    if any(name in config for name in ("vision_config", "audio_config", "thinker_config")):
        return (
            f"a {kind} model reads images or sound ({', '.join(classes) or kind}), and text alone is trained here: "
            "save its language model as a folder of its own (model.language_model of the *ForCausalLM class)"
        )
    if kind is None:
        return f"its config.json names no model_type, so nobody knows what its weights are; {INSTEAD}"
    if kind not in TESTED and kind not in causal_types():
        own = " The folder brings code of its own (auto_map), which is never run." if "auto_map" in config else ""
        return f"transformers knows no causal language model of type {kind}.{own} {INSTEAD[0].upper()}{INSTEAD[1:]}"
    if engine == "vllm" and kind in REFUSED_BY_VLLM:
        return f"a {kind} model is not served by vLLM here: {REFUSED_BY_VLLM[kind]}; use rollout.engine=torch"
    if engine == "torch":
        try:
            attention_windows(text_fields(config))
        except ValueError as error:
            return f"{error}; use rollout.engine=vllm"
    return None


def causal_types() -> Iterable[str]:
    """The model types that transformers has a causal language model for. Importing them takes seconds."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# ---- positions ----


def position_limit(config: dict[str, Any]) -> int | None:
    """The most tokens that the model has positions for; None where its config.json does not say."""
    fields = text_fields(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's fields: `config` itself, or those that it keeps in `text_config`."""
    return config.get("text_config") or config


FULL, SLIDING = "full_attention", "sliding_attention"


def attention_windows(fields: dict[str, Any]) -> dict[str, int | None]:
    """How far back each kind of a model's attention layers looks, in tokens (None: to the start). ValueError for layers
    that keep something else than keys and values (state spaces, chunks, convolutions)."""
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    kinds = fields.get("layer_types")
    if kinds is None:
        return {SLIDING if window else FULL: window}
    if others := sorted(set(kinds) - {FULL, SLIDING}):
        raise ValueError(
            f"the torch engine decodes models with full or sliding-window attention in every layer; this "
            f"{fields.get('model_type')} model has {', '.join(others)}"
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}


def switches(config: dict[str, Any]) -> list[int]:
    """Lengths, in tokens, behind which the model computes otherwise: sliding windows, chunks, and the borders of
    rotations that depend on the longest position (LongRoPE, dynamic NTK)."""
    fields = text_fields(config)
    found = [fields.get("attention_chunk_size")]
    if fields.get("use_sliding_window", True):
        found.append(fields.get("sliding_window"))
    found += [border for _, border in moving_rotations(fields)]
    return sorted({length for length in found if isinstance(length, int) and length > 0})


def moving_rotations(fields: dict[str, Any]) -> list[tuple[str, int]]:
    """(type, border) of each rotation that transformers computes anew with the longest position of a batch."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    moving = []
    for one in every:
        kind = one.get("rope_type") or one.get("type")
        if kind in ("longrope", "su", "dynamic"):
            border = fields.get("original_max_position_embeddings") or one.get("original_max_position_embeddings")
            moving.append((kind, border or fields.get("max_position_embeddings") or 0))
    return moving


def rotation_note(config: dict[str, Any], longest: int) -> str | None:
    """What is held fixed, in words, for a model whose rotation depends on the longest position; None for others."""
    moving = moving_rotations(text_fields(config))
    if not moving:
        return None
    kind, border = moving[0]
    which, than = ("long", "longer than") if longest > border else ("short", "no longer than")
    return f"{kind}: the {which} factors for every sequence, since the longest of {longest} is {than} {border}"
