"""Where rows come from: files and folders of rows, data sets of the Hugging Face hub, and functions that make them.

Whatever is wrong with a source is said with its name and place before anything starts (`DataError`, exit code 2).
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import inspect
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.json_form import plain
from rewards.load import RewardError, load_function
from rlzero.config.read import UsageError

Split = Literal["train", "evaluation"]

FUNCTION = re.compile(r"(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
HUB = re.compile(r"(hf://(datasets/)?)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")
SPLITS = {"train": ("train",), "evaluation": ("test", "validation", "dev", "train")}  # the first there is
COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
SHOWN = 5  # bad lines listed in one error


class DataError(UsageError):
    """A data set, tokenizer or generator that cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class Row:
    """The columns of one record and where it stands: `file:line`, or the source and the index."""

    values: dict[str, Any]
    where: str


def load_rows(source: str, params: dict[str, Any], split: Split, seed: int) -> list[Row]:
    """The rows of a source: `countdown`; `module:function` or `file.py:function`; a file, a pattern of files (`*`) or
    a folder; the name of a data set of the hub.

    A function is called with `params`, and with `seed` and `split` ("train" or "evaluation") where it takes them; it
    returns dictionaries. A data set gets `params` as `datasets.load_dataset` knows them (name, split, ...). Values are
    Python's own: arrays become lists, what is missing None. Raises `DataError` where the source does not exist, fails
    or is empty.
    """
    if source == "countdown" or FUNCTION.fullmatch(source):
        rows = _generated(source, params, split, seed)
    elif paths := files_of(source):
        if params:
            raise DataError(f"data: params {sorted(params)} are given, but {source} is a file and takes none")
        rows = [row for path in paths for row in read_file(path)]
    elif Path(source).is_dir() or (HUB.fullmatch(source) and not Path(source).suffix):
        rows = _data_set(source, params, split)
    else:
        raise DataError(f"{source}: no such data file (looked in {Path.cwd()})")
    if not rows:
        raise DataError(f"{source}: the data set is empty")
    return rows


def files_of(source: str) -> list[Path]:
    """The files that a source names, in order: itself, or those that its pattern fits. None where it is no file."""
    paths = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    return [Path(path) for path in paths] if paths and all(Path(path).is_file() for path in paths) else []


def digest(source: str) -> str | None:
    """A hash of the bytes of a source's files; None where it is no file."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in files_of(source)]
    return hashlib.sha256(b"".join(digests)).hexdigest() if digests else None


def listed(title: str, lines: list[str]) -> str:
    """`title` with the first of `lines` below it, and how many more there are."""
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([title, *(f"  {line}" for line in lines[:SHOWN]), *more])


# --- files -----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> list[Row]:
    """The rows of a file: Parquet, Arrow, CSV or TSV, a JSON array or JSON lines, each also compressed (gzip, bzip2,
    xz, zstandard) and with a byte-order mark. Its first bytes tell which it is; CSV and TSV are told by name. Raises
    `DataError` that lists bad lines."""
    path = Path(path)
    try:
        data = path.read_bytes()
        for magic, decompress in COMPRESSED.items():
            if data.startswith(magic):
                data = decompress(data)
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            import pyarrow

            data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file (looked in {Path.cwd()})") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data[:4] == b"PAR1" or data[:6] == b"ARROW1" or data[:4] == b"\xff\xff\xff\xff":
        return _table(path, data)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16").encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    endings = [suffix.lower() for suffix in path.suffixes]
    if ".csv" in endings or ".tsv" in endings:
        return _separated(path, data, "\t" if ".tsv" in endings else ",")
    return _json_array(path, data) if data.lstrip()[:1] == b"[" else _json_lines(path, data)


def _table(path: Path, data: bytes) -> list[Row]:
    """Rows of Parquet, or of Arrow's file and stream formats (`datasets` writes the latter)."""
    import pyarrow
    import pyarrow.parquet

    source = pyarrow.BufferReader(data)
    try:
        if data[:4] == b"PAR1":
            table = pyarrow.parquet.read_table(source)
        else:
            read = pyarrow.ipc.open_file if data[:6] == b"ARROW1" else pyarrow.ipc.open_stream
            table = read(source).read_all()
        return _rows(table.to_pylist(), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet or Arrow file: {str(error).splitlines()[0]}") from error


def _separated(path: Path, data: bytes, delimiter: str) -> list[Row]:
    """Rows of CSV; every value is text, an empty one too: `007` and `1.50` stay what they are."""
    csv.field_size_limit(2**31 - 1)
    rows: list[Row] = []
    bad: list[str] = []
    try:
        reader = csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter=delimiter, strict=True)
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if None in values or None in values.values():
                few = "fewer" if None in values.values() else "more"
                bad.append(f"{where}: {few} values than the {len(reader.fieldnames or ())} columns of the first line")
            rows.append(Row(values, where))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8 at byte {error.start}") from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    if bad:
        raise DataError(listed(f"{path}: {len(bad)} bad line{'s' * (len(bad) > 1)}", bad))
    return rows


def _json_array(path: Path, data: bytes) -> list[Row]:
    try:
        values = json.loads(data, parse_constant=_missing)
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON array: {error}") from error
    if wrong := [f"{path}[{i}]: found {type(v).__name__}" for i, v in enumerate(values) if not isinstance(v, dict)]:
        raise DataError(listed(f"{path}: {len(wrong)} of {len(values)} entries are no objects", wrong))
    return [Row(value, f"{path}[{i}]") for i, value in enumerate(values)]


def _json_lines(path: Path, data: bytes) -> list[Row]:
    """One row per line; blank lines are skipped."""
    rows: list[Row] = []
    bad: list[str] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line.decode(), parse_constant=_missing)
        except UnicodeDecodeError as error:
            bad.append(f"{where}: not UTF-8 at byte {error.start}")
            continue
        except json.JSONDecodeError as error:
            bad.append(f"{where}: malformed JSON at column {error.colno}: {error.msg}")
            continue
        if not isinstance(values, dict):
            bad.append(f"{where}: expected a JSON object, found {type(values).__name__}")
            continue
        rows.append(Row(values, where))
    if bad:
        raise DataError(listed(f"{path}: {len(bad)} bad line{'s' * (len(bad) > 1)}", bad))
    return rows


def _missing(constant: str) -> None:
    """NaN and infinities, which tables write where a value is missing."""


# --- data sets and functions -----------------------------------------------------------------------------------------


def _data_set(source: str, params: dict[str, Any], split: Split) -> list[Row]:
    """Rows of a folder or of a name on the hub, through the library `datasets`."""
    import datasets
    from datasets.utils import logging as datasets_logging

    datasets_logging.disable_progress_bar()
    folder = Path(source)
    wanted = params.get("split")
    try:
        if folder.is_dir() and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
        else:
            name = source if folder.is_dir() else HUB.fullmatch(source)["name"]
            found = datasets.load_dataset(name, **params)
    except Exception as error:  # whatever the library, the network or a damaged file raise: the cause is its message
        cause = str(error).strip().splitlines()[0] if str(error).strip() else ""
        kind = "the folder cannot be read as a data set" if folder.is_dir() else (
            f"no such file or folder (looked in {Path.cwd()}), and no data set of that name could be had from the hub"
        )
        raise DataError(f"{source}: {kind}: {type(error).__name__}: {cause}") from error
    if isinstance(found, dict):
        chosen = wanted or next((name for name in SPLITS[split] if name in found), None)
        if chosen not in found:
            raise DataError(f"{source}: no split {chosen!r}; it has {', '.join(found)}: name one as data.params.split")
        found = found[chosen]
    return _rows(found.to_list(), source)


def _generated(source: str, params: dict[str, Any], split: Split, seed: int) -> list[Row]:
    function: Callable[..., Iterable[dict]]
    if source == "countdown":
        from rlzero.examples.countdown import task as countdown

        given = {"split": "train" if split == "train" else "held_out", "seed": seed, "count": 4096}
        accepted = [*inspect.signature(countdown.rows).parameters, *inspect.signature(countdown.tasks).parameters]
        if unknown := sorted(set(params) - set(accepted)):
            raise DataError(f"data: countdown takes no parameter {', '.join(unknown)}; it takes {', '.join(accepted)}")
        function, params = countdown.rows, {**given, **params}
    else:
        try:
            function = load_function(source)
        except RewardError as error:
            raise DataError(f"data: {error}") from error
        except Exception as error:  # importing runs user code
            raise DataError(f"data: {source} does not import: {type(error).__name__}: {error}") from error
        accepted_by_name = inspect.signature(function).parameters
        given = {k: v for k, v in {"seed": seed, "split": split}.items() if k in accepted_by_name}
        params = {**given, **params}
        try:
            inspect.signature(function).bind(**params)
        except TypeError as error:
            raise DataError(f"data: {source} cannot be called with {sorted(params)}: {error}") from error
    try:
        made = function(**params)
        made = made.to_dict("records") if hasattr(made, "iterrows") else list(made)  # a table of pandas
    except Exception as error:  # the generator is user code: whatever it raises is reported as its failure
        raise DataError(f"data: {source} failed: {type(error).__name__}: {error}") from error
    if wrong := [index for index, values in enumerate(made) if not isinstance(values, dict)]:
        raise DataError(f"data: {source}[{wrong[0]}] is not a dictionary; a generator returns one for every question")
    return _rows(made, source)


def _rows(records: Iterable[dict], source: str) -> list[Row]:
    """Records with values of any type as rows; what has no form in JSON (dates, bytes) stays as it is."""
    return [Row(plain(values, lambda value: value), f"{source}[{index}]") for index, values in enumerate(records)]
