"""What one process has at a time: a run's folder, a session of Ray."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

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
