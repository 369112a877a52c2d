"""Checkpoint folders: complete or not there.

A checkpoint is written beside its final name, synced to the disk and renamed; a kill or a full disk in between costs
nothing that was there before. `trainer_state/manifest.json`, written last, lists every file with its size and CRC-32.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

STATE = "trainer_state"  # subfolder with all that is not the Hugging Face folder
MANIFEST = f"{STATE}/manifest.json"
WHOLE = "optimizer.safetensors"  # in STATE: the optimizer's state as one rank writes it
SHARDS = "optimizer"  # in STATE: as several do (trainer.checkpoint.shards)
FORMAT = 1
_STEP = re.compile(r"step-(\d+)$")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written."""


def latest(folder: str | Path) -> Path | None:
    """The checkpoint `step-N` in `folder` with the highest N, or None. What a killed run left unfinished is never
    returned."""
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def keep_last(folder: str | Path, count: int) -> list[Path]:
    """Deletes all but the `count` newest checkpoints of `folder`, and the remains of killed writes; returns what was
    deleted. Only the one process that writes to `folder` may call it."""
    if count < 1:
        raise ValueError(f"keep_last({count}): the newest checkpoint is what a run resumes from; keep at least 1")
    folder = Path(folder)
    old = _checkpoints(folder)[:-count]
    for path in old:
        # first out of sight: a kill in the middle of the deletion must not leave half a checkpoint with its name
        hidden = path.with_name(f".{path.name}.deleted")
        path.rename(hidden)
    for path in folder.glob(".*"):
        if path.is_dir() and path.name.endswith((".deleted", ".partial", ".replaced")):
            shutil.rmtree(path)
    return old


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `target` (replacing it) when the block ends well. If the block
    raises, `target` is as before and nothing is left behind. A full disk raises CheckpointError."""
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_replaced(target)
        if partial.exists():  # of a killed write
            shutil.rmtree(partial)
        (partial / STATE).mkdir(parents=True)
        yield partial
        manifest = {"format": FORMAT, "files": {name: _describe(partial / name) for name in _files(partial)}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _sync(target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        code = _error_number(error)
        if code in _FULL:
            free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
            raise CheckpointError(
                f"{target} was not written: {_FULL[code]} ({free / 2**20:,.1f} MiB free in {target.parent}). Earlier "
                "checkpoints are intact. Free some space, or lower checkpoint.keep, and resume"
            ) from error
        raise


def verify(folder: str | Path) -> None:
    """Raises CheckpointError for what is no checkpoint of this project and for missing or damaged files, all named."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: expected a checkpoint folder")
    path = folder / MANIFEST
    if not path.is_file():
        plain = (folder / "config.json").is_file()
        kind = "a Hugging Face folder without a trainer's state" if plain else "no checkpoint"
        raise CheckpointError(
            f"{folder} is {kind} ({MANIFEST} is missing): a run resumes from its own checkpoints only; to start a new "
            "run from its weights set policy.path to it"
        )
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}): {_instead(folder)}") from error
    if version != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {version}, this release reads {FORMAT}")
    damaged = []
    for name, expected in files.items():
        if not (folder / name).is_file():
            damaged.append(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) != expected["bytes"]:
            damaged.append(f"{name} has {size} bytes, {expected['bytes']} were written")
        elif _describe(folder / name) != expected:
            damaged.append(f"{name} is not what was written (CRC-32)")
    if damaged:
        raise DamagedError(f"{folder} is damaged: {'; '.join(damaged)}. {_instead(folder)}")


def set_aside_damaged(folder: str | Path) -> list[Path]:
    """Renames the newest checkpoints of `folder` that are damaged to `step-N.damaged`, down to the first that is as it
    was written, which `latest` then returns; returns their new paths."""
    aside = []
    for path in reversed(_checkpoints(Path(folder))):
        try:
            verify(path)
            break
        except DamagedError:
            aside.append(path.rename(path.with_name(f"{path.name}.damaged")))
    return aside


def _instead(folder: Path) -> str:
    return f"Resume from the checkpoint before it with `--resume last-good`, or delete {folder.name}"


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    for hidden in folder.glob(".step-*.replaced"):
        _restore_replaced(folder / hidden.name[1 : -len(".replaced")])
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.match(path.name)) and path.is_dir()]
    return [path for _, path in sorted(steps)]


def _restore_replaced(target: Path) -> None:
    """A kill between the two renames of a replacement leaves the old checkpoint under its hidden name."""
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, int]:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        return int(match[1])
    return None
