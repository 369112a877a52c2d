"""A checkpoint as a plain Hugging Face folder: without the trainer's state, in the wished precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlzero.config.read import UsageError


def find_checkpoint(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: itself, or of a run's folder the newest checkpoint."""
    from trainer.checkpoint import checkpoint

    path = Path(path)
    if (path / "config.json").is_file():
        return path
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise UsageError(
            f"{path}: neither a model (no config.json) nor a run with a checkpoint (no checkpoints/step-N)"
        )
    return newest


def export(source: str | Path, target: str | Path, dtype: str | None = None, format: str | None = None) -> Path:
    """Writes the model of `source` (a checkpoint, a run or any Hugging Face folder) to the new folder `target`.

    `dtype` float32 or bfloat16 converts the weights; tensors that are kept apart in FP32 beside BF16 weights (a
    router's bias) stay so. `format` bf16 is dtype bfloat16; fp8 is that of DeepSeek's release (E4M3, one scale per
    128x128 block) and needs the DeepSeek-V3 architecture. None of both keeps every byte. One tensor at a time is in
    memory. Raises `UsageError` where there is no model, `target` exists or the format cannot be had.
    """
    from trainer.checkpoint import checkpoint

    folder, target = find_checkpoint(source), Path(target)
    if target.exists():
        raise UsageError(f"{target}: exists; give a new folder")
    wanted = {"float32": "fp32", "bfloat16": "bf16"}.get(dtype or "", format)
    with checkpoint.writing(target) as partial:
        written = _convert(folder, partial, wanted) if wanted else set()
        for file in sorted(folder.iterdir()):
            if not file.is_dir() and file.name not in written:
                shutil.copyfile(file, partial / file.name)
    shutil.rmtree(target / checkpoint.STATE, ignore_errors=True)
    return target


def _convert(folder: Path, target: Path, wanted: str) -> set[str]:
    """Writes weights, index and config.json in the wanted format; returns the files of `folder` this stands for."""
    from trainer.checkpoint import folder as files
    from trainer.checkpoint import hf
    from trainer.checkpoint.model_folder import read_config

    replaced = {"config.json", files.INDEX, *(file.name for file in folder.glob("*.safetensors"))}
    config = read_config(folder)
    if config.get("model_type") == "deepseek_v3":
        hf.convert_folder(folder, target, wanted)
        return replaced
    if wanted == "fp8" or "quantization_config" in config:
        raise UsageError(
            f"{folder}: block-FP8 is written and read for model_type deepseek_v3 only, found {config.get('model_type')}"
        )
    dtype = hf.DTYPE[wanted]
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    reader = files.FolderReader(folder)
    entries = {
        name: files.Entry(name, dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
        for name, entry in reader.entries.items()
    }
    with files.FolderWriter(target, entries.values(), hf.SHARD_BYTES) as writer:
        for name, tensor in reader:
            writer.write(name, tensor.to(entries[name].dtype))
    return replaced
