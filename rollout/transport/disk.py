"""Weights through a folder of safetensors: for engines on another file system's end, and for looking at by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout.transport.base import CorruptWeights, Manifest, Received, describe, verify


def read_folder(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a Hugging Face folder's safetensors files, file by file."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    absent = [f for f in files if not (folder / f).exists()]
    if absent:
        raise FileNotFoundError(f"{folder} has no {', '.join(absent)}: expected a Hugging Face model folder")
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DiskTransport:
    """`publish` writes `folder/version-N` (tensors, then the manifest, then one rename: it is there whole or not at
    all) and returns its path. The newest `keep` versions stay."""

    def __init__(self, folder: str | Path, keep: int = 2, file_bytes: int = 2 << 30):
        self.folder, self.keep, self.file_bytes = Path(folder), keep, file_bytes

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        target = self.folder / f"version-{version}"
        temporary = self.folder / f".version-{version}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        entries, files, part, size = [], {}, {}, 0

        def flush() -> None:
            nonlocal part, size
            file = f"weights-{len(set(files.values())):05}.safetensors"
            save_file(part, temporary / file)
            _sync(temporary / file)
            files.update(dict.fromkeys(part, file))
            part, size = {}, 0

        for name, tensor in tensors:
            if part and size + tensor.nbytes > self.file_bytes:
                flush()
            entries.append(describe(name, tensor))
            part[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            size += tensor.nbytes
        if part:
            flush()
        manifest = Manifest(version, tuple(entries)).to_json() | {"files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        _sync(temporary / "manifest.json")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(self.folder)
        kept = sorted(self.folder.glob("version-*"), key=lambda p: int(p.name.removeprefix("version-")))
        for old in kept[: -self.keep]:
            shutil.rmtree(old)
        return str(target)

    def _read(self, handle: str) -> dict:
        path = Path(handle) / "manifest.json"
        if not path.exists():
            raise FileNotFoundError(f"no published weights at {handle}: they were never written or are already gone")
        return json.loads(path.read_text())

    def manifest(self, handle: str) -> Manifest:
        return Manifest.from_json(self._read(handle))

    def receive(self, handle: str) -> Received:
        return Received(self.manifest(handle), self._tensors(handle))

    def _tensors(self, handle: str) -> Iterator[tuple[str, Tensor]]:
        files = self._read(handle)["files"]
        for entry in self.manifest(handle).entries:
            try:
                with safe_open(Path(handle) / files[entry.name], framework="pt") as tensors:
                    tensor = tensors.get_tensor(entry.name)
            except (SafetensorError, FileNotFoundError) as error:
                raise CorruptWeights(f"weights arrived damaged: {entry.name} cannot be read: {error}") from error
            verify(entry, tensor)
            yield entry.name, tensor
