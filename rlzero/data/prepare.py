"""Work on every row of a set: shared out to processes, and kept on disk for the next start."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import rewards
from rewards.json_form import dumps
from rlzero.data.sources import Row

logger = logging.getLogger(__name__)

CHUNK = 512  # rows that a process takes at once
SMALL = 4 * CHUNK  # rows that are made in this process, every time: sooner done than shared out or looked up
KEPT_DAYS = 30  # that a result which nobody asks for stays on disk

Progress = Callable[[int, int], None]
Result = Mapping[str, "np.ndarray | str"]  # what one row becomes: the same names for every row
Work = Callable[[Sequence[Row]], list[Result]]


class Results(Sequence[Result]):
    """The results of all rows. All rows' values of one name stand in one array, beside where each row's end; text as
    its UTF-8 bytes. So a large set takes little memory, and is on disk as it is in memory."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays  # by name, and under "<name>.ends"

    @classmethod
    def of(cls, results: Sequence[Result]) -> Results:
        arrays: dict[str, np.ndarray] = {}
        for name in results[0] if results else ():
            values = [result[name] for result in results]
            values = [np.frombuffer(_bytes(v), np.uint8) if isinstance(v, str) else v for v in values]
            arrays[name] = np.concatenate(values)
            arrays[f"{name}.ends"] = np.cumsum([len(value) for value in values])
        return cls(arrays)

    @classmethod
    def joined(cls, parts: Sequence[Results]) -> Results:
        arrays: dict[str, np.ndarray] = {}
        for name in parts[0].names if parts else ():
            arrays[name] = np.concatenate([part.arrays[name] for part in parts])
            arrays[f"{name}.ends"] = np.cumsum(np.concatenate([part.lengths(name) for part in parts]))
        return cls(arrays)

    @property
    def names(self) -> list[str]:
        return [name for name in self.arrays if not name.endswith(".ends")]

    def __len__(self) -> int:
        return len(self.arrays[f"{self.names[0]}.ends"]) if self.arrays else 0

    def __getitem__(self, index: int) -> Result:  # type: ignore[override]
        return {name: self.value(name, index) for name in self.names}

    def value(self, name: str, index: int) -> Any:
        """One value of one row: an array, or a text."""
        ends, values = self.arrays[f"{name}.ends"], self.arrays[name]
        found = values[ends[index - 1] if index else 0 : ends[index]]
        return found.tobytes().decode(errors="surrogatepass") if found.dtype == np.uint8 else found

    def lengths(self, name: str) -> np.ndarray:
        """How many entries of a name every row has."""
        return np.diff(self.arrays[f"{name}.ends"], prepend=0)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def prepared(rows: Callable[[], Sequence[Row]], work: Work, key: str | None, progress: Progress) -> Results:
    """`work` on all rows, in order. `key` names the result on disk: whoever asks for it again, a resumed run or another
    rank, is given what is there, and `rows` is not called. It must stand for the rows and all that `work` depends on
    (see `key_of`); None keeps nothing."""
    path = folder() / f"{key}.safetensors"
    if key is not None and (found := _read(path)) is not None:
        return found
    taken = rows()
    if key is None or len(taken) <= SMALL:
        return _made(taken, work, progress)
    with _alone(path):
        found = _read(path)  # of a rank that was here first
        if found is None:
            found = _made(taken, work, progress)
            _write(path, found)
        return found


def key_of(*parts: Any) -> str:
    """A name for what follows from `parts` and this code alone."""
    return hashlib.sha256(dumps([*parts, _code()]).encode()).hexdigest()[:32]


def tokenizer_identity(tokenizer: Any) -> str | None:
    """A hash of all that decides which tokens a tokenizer makes; None where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    text = [backend.to_str(), tokenizer.chat_template, tokenizer.eos_token, repr(tokenizer.special_tokens_map)]
    return hashlib.sha256(dumps(text).encode()).hexdigest()


@cache
def _code() -> str:
    """The code that makes results: that of this package and of the rewards, and the libraries they stand on."""
    files = sorted(path for root in (__file__, rewards.__file__) for path in Path(root).parent.rglob("*.py"))
    found = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return found.hexdigest() + "".join(version(name) for name in ("transformers", "tokenizers", "jinja2", "sympy"))


# --- in processes ----------------------------------------------------------------------------------------------------

_shared: tuple[Work, Sequence[Row]] | None = None  # what the processes of a pool were forked with


def _made(rows: Sequence[Row], work: Work, progress: Progress) -> Results:
    global _shared
    starts = range(0, len(rows), CHUNK)
    _shared, parts = (work, rows), []
    try:
        with _map(len(rows)) as share_out:
            for part in share_out(_chunk, starts):
                parts.append(part)
                progress(min(len(parts) * CHUNK, len(rows)), len(rows))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that prepared rows was killed, most likely because the machine has no memory left; "
            "set data.train to fewer rows, or free some"
        ) from error
    finally:
        _shared = None
    return Results.joined(parts)


@contextmanager
def _map(count: int) -> Iterator[Callable]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count <= SMALL or cores == 1:
        yield map
        return
    # Forked: rows and tokenizer need not be sent, and the program of whoever called is not imported again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(cores, -(-count // CHUNK)), context, _begin, (os.getpid(),))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """What a process of the pool does first: it leaves Ctrl-C to its parent, and ends with it."""
    from rewards.sandbox import syscalls

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    syscalls.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there after a fork


def _chunk(start: int) -> Results:
    assert _shared is not None
    work, rows = _shared
    return Results.of(work(rows[start : start + CHUNK]))


# --- on disk ---------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where results are kept: `rlzero` in the user's folder of caches ($XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlzero"


def _read(path: Path) -> Results | None:
    try:
        arrays = load_file(path)
        os.utime(path)
        return Results(arrays)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s: cannot be used and is made anew: %s", path, error)
        return None


def _write(path: Path, results: Results) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(results.arrays, partial)
        os.replace(partial, path)
        for other in path.parent.glob("*.*"):
            if time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
                other.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        logger.warning("%s: the prepared rows are not kept, so the next start prepares them again: %s", path, error)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process of this machine makes `path` at a time; without a folder to write to, each does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
