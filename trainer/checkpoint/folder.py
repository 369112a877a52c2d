"""Folders of safetensors files, read and written one tensor at a time: no shard is ever held in memory.

`FolderReader` reads every header first, so that all that is wrong with a folder is known before a weight is read;
`FolderWriter` lays all files out first, so that tensors may come in any order and need not exist at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.precision.quantize import FLOAT8, Quantized, block_scales_shape

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"  # added to a weight's name: the factors of its blocks, as DeepSeek's released weights have them
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": FLOAT8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by safetensors' names
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class FolderReader:
    """The weights of a Hugging Face folder. `problems` lists what is wrong with its files: missing and damaged shards,
    tensors that the index promises and no file holds, FP8 weights without scales or with scales of another shape.

    With an index only the files that it names are read (as transformers and vLLM do), otherwise all `*.safetensors`.
    Errors: FileNotFoundError where there are none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        self.entries: dict[str, Entry] = {}
        self.lost: set[str] = set()  # tensors that the index places in files which cannot be read
        self._file: dict[str, str] = {}  # of every tensor
        self._scales: dict[str, Tensor] = {}
        promised = self._read_index()
        if promised is None:
            names = sorted(file.name for file in self.folder.glob("*.safetensors"))
        else:
            names = sorted(set(promised.values()))
        if not names:
            raise FileNotFoundError(
                f"{self.folder} holds no *.safetensors: expected the weights of a Hugging Face folder"
            )
        for name in names:
            self._read_header(name, [tensor for tensor, file in (promised or {}).items() if file == name])
        for tensor, file in (promised or {}).items():
            if tensor not in self.entries and tensor not in self.lost:
                self.problems.append(f"the index places {tensor} in {file}, which does not hold it")
        self._check_scales()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values, FP8 weights dequantized to float32; a shard is open only while its tensors are read.
        Raises ValueError that lists `problems`, if there are any, before the first."""
        for entry, stored in self.stored():
            if entry.name.endswith(SCALE):
                continue
            if entry.dtype == FLOAT8:
                stored = Quantized(stored, self.scale(entry.name)).dequantize()
            yield entry.name, stored

    def stored(self) -> Iterator[tuple[Entry, Tensor]]:
        """Every tensor as it is in the file, scales among them, file by file."""
        self.check()
        by_file: dict[str, list[str]] = {}
        for name, file in self._file.items():
            by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            with safe_open(self.folder / file, framework="pt") as handle:
                for name in names:
                    yield self.entries[name], handle.get_tensor(name)

    def check(self) -> None:
        if self.problems:
            refuse(f"{self.folder} is not complete", self.problems)

    def scale(self, weight: str) -> Tensor | None:
        """The scales of an FP8 weight; None of any other. They need not stand in the weight's file."""
        file = self._file.get(weight + SCALE)
        if file is not None and weight + SCALE not in self._scales:  # all of a file at once: they are 1/4000 of it
            names = [name for name, place in self._file.items() if place == file and name.endswith(SCALE)]
            with safe_open(self.folder / file, framework="pt") as handle:
                self._scales |= {name: handle.get_tensor(name).clone() for name in names}
        return self._scales.get(weight + SCALE)

    def _read_index(self) -> dict[str, str] | None:
        file = self.folder / INDEX
        if not file.is_file():
            return None
        try:
            places = json.loads(file.read_text())["weight_map"]
            return {str(name): str(place) for name, place in places.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): expected a JSON object with a weight_map") from error

    def _read_header(self, file: str, promised: list[str]) -> None:
        holds = f"; the index places {len(promised)} tensors in it" if promised else ""
        if not (self.folder / file).is_file():
            self.problems.append(f"missing file: {file}{holds}")
            self.lost |= set(promised)
            return
        try:
            with safe_open(self.folder / file, framework="pt") as handle:
                found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no dictionary)
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
        except (SafetensorError, OSError) as error:
            self.problems.append(f"damaged file: {file} ({error}){holds}")
            self.lost |= set(promised)
            return
        for name, (dtype, shape) in found.items():
            if name in self._file:
                self.problems.append(f"{name} stands in {self._file[name]} and in {file}")
            elif dtype not in DTYPES:
                self.problems.append(f"dtype: {name} is {dtype}, expected one of {', '.join(DTYPES)}")
                self.lost.add(name)
            else:
                self._file[name] = file
                self.entries[name] = Entry(name, DTYPES[dtype], shape)

    def _check_scales(self) -> None:
        for name, entry in self.entries.items():
            if name.endswith(SCALE):
                weight = self.entries.get(name.removesuffix(SCALE))
                if weight is None or weight.dtype != FLOAT8:
                    self.problems.append(f"{name} scales no FP8 weight")
            elif entry.dtype == FLOAT8:
                scale = self.entries.get(name + SCALE)
                expected = block_scales_shape(*entry.shape) if len(entry.shape) == 2 else None
                if expected is None:
                    self.problems.append(f"{name} is FP8 of shape {list(entry.shape)}, expected a matrix")
                elif scale is None and name + SCALE not in self.lost:
                    self.problems.append(f"{name} is FP8 without {name + SCALE}: expected one scale per 128x128 block")
                elif scale is not None and scale.shape != expected:
                    self.problems.append(
                        f"{name + SCALE} is {list(scale.shape)}, expected {list(expected)}: one scale per 128x128 "
                        f"block of {list(entry.shape)}"
                    )


class FolderWriter:
    """Writes the safetensors of a folder, and the index where it takes more than one file. Nothing is kept of a tensor
    once it is written. `close` (or the end of a `with` block) raises ValueError where one was not."""

    def __init__(self, folder: str | Path, entries: Iterable[Entry], shard_bytes: int) -> None:
        self.folder = Path(folder)
        self._place: dict[str, tuple[Path, int, Entry]] = {}  # file, first byte
        shards = _shards(entries, shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        where: dict[str, str] = {}
        for name, shard in zip(names, shards, strict=True):
            self._lay_out(self.folder / name, shard)
            where |= {entry.name: name for entry in shard}
        if len(shards) > 1:
            total = sum(entry.nbytes for shard in shards for entry in shard)
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._unwritten = set(self._place)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that was not announced, or as another one."""
        file, start, entry = self._place.get(name, (None, 0, None))
        if entry is None or (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"found {name} {tensor.dtype} {list(tensor.shape)}, announced was {entry}")
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        with file.open("r+b") as handle:
            handle.seek(start)
            handle.write(memoryview(raw.numpy()))
        self._unwritten.discard(name)

    def close(self) -> None:
        if self._unwritten:
            refuse(f"{self.folder} was not written whole", [f"missing: {name}" for name in sorted(self._unwritten)])

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()

    def _lay_out(self, file: Path, shard: list[Entry]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The widest first: every tensor then starts at a multiple of its own width.
        for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
            start, end = end, end + entry.nbytes
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]
            }  # fmt: skip
            self._place[entry.name] = (file, start, entry)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
        for entry in shard:
            place, start, _ = self._place[entry.name]
            self._place[entry.name] = (place, 8 + len(text) + start, entry)


def _shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def mismatches(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """One line for every missing, unexpected or misshapen tensor."""
    lines = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    lines += [f"unexpected: {name} {list(found[name])}" for name in found if name not in expected]
    lines += [
        f"shape of {name}: found {list(found[name])}, expected {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    return lines


def refuse(what: str, wrong: list[str], shown: int = 50) -> NoReturn:
    """Raises ValueError that lists the mistakes."""
    more = [f"and {len(wrong) - shown} more"] if len(wrong) > shown else []
    mistakes = "1 mistake" if len(wrong) == 1 else f"{len(wrong)} mistakes"
    raise ValueError(f"{what} ({mistakes}):\n  " + "\n  ".join([*wrong[:shown], *more]))
