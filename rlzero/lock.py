"""What one process has at a time: a run's folder, a session of Ray."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlzero.config.read import UsageError

logger = logging.getLogger(__name__)


class InUse(Exception):
    """Another process has it; the message says which."""


class Lock:
    """Holds `path` until `release`, or until the process is gone, however it went: the kernel holds the lock, on NFS
    the server, so a lock is never stale. The file stays and says who had it last. Raises `InUse` where another process
    holds it, `OSError` where the file cannot be written."""

    def __init__(self, path: Path):
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by `release`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise InUse(holder or "a process that has just begun") from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: %s; a second process here would not be noticed", path, error.strerror)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Inside, no other process trains in the run's folder. Raises `UsageError` where one does, or where the folder
    cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(run_dir / "lock")
    except InUse as error:
        raise UsageError(
            f"{run_dir}: {error} trains in this folder; wait for it, end it, or give this run another name (name=...)"
        ) from None
    except OSError as error:
        why = f"{run_dir}: cannot be written ({error.strerror}); set output_dir to a folder that can"
        raise UsageError(why) from error
    try:
        yield
    finally:
        lock.release()
