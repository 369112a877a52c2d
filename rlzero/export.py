"""A checkpoint as a plain Hugging Face folder: without the trainer's state, in the wished precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlzero.reading import UsageError


def find_checkpoint(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: itself, or of a run's folder the newest checkpoint."""
    from trainer import checkpoint

    path = Path(path)
    if (path / "config.json").is_file():
        return path
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise UsageError(
            f"{path}: neither a model (no config.json) nor a run with a checkpoint (no checkpoints/step-N)"
        )
    return newest


def export(source: str | Path, target: str | Path, dtype: str | None = None) -> Path:
    """Writes the model of `source` (a checkpoint, a run or any Hugging Face folder) to the new folder `target`.

    `dtype` float32 or bfloat16 converts the weights; tensors that are kept apart in FP32 beside BF16 weights (a
    router's bias) stay so. None keeps every byte. Raises `UsageError` where there is no model or `target` exists.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from trainer import checkpoint

    folder, target = find_checkpoint(source), Path(target)
    if target.exists():
        raise UsageError(f"{target}: exists; give a new folder")
    with checkpoint.writing(target) as partial:
        for file in sorted(folder.iterdir()):
            if file.is_dir():
                continue
            if file.suffix == ".safetensors" and dtype is not None:
                with safe_open(file, framework="pt") as tensors:
                    converted = {
                        name: tensors.get_tensor(name)
                        if name.endswith("e_score_correction_bias") or not tensors.get_tensor(name).is_floating_point()
                        else tensors.get_tensor(name).to(getattr(torch, dtype))
                        for name in tensors.keys()  # noqa: SIM118 (a safetensors handle is no dictionary)
                    }
                    save_file(converted, partial / file.name, metadata=tensors.metadata())
            elif file.name == "config.json" and dtype is not None:
                config = json.loads(file.read_text())
                config["dtype" if "dtype" in config else "torch_dtype"] = dtype
                (partial / file.name).write_text(json.dumps(config, indent=2) + "\n")
            else:
                shutil.copyfile(file, partial / file.name)
    shutil.rmtree(target / checkpoint.STATE, ignore_errors=True)
    return target
