"""A Ray of this process's own: it starts on a busy machine, survives the signals that end a run until the run has
saved, ends without leaving a process, and its old folders are removed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import utils
from ray._private.authentication import authentication_token_setup as token

from rlzero import interrupt
from rlzero.cluster.actors import ClusterError
from rlzero.lock import InUse, Lock

TRIES = 3  # starts: Ray gives each 30 s
OWNER = "rlzero.lock"  # in a session's folder: held while the session runs
_owned: list[Lock] = []


def start(**options: Any) -> None:
    """`ray.init(address="local", **options)`. Raises `ClusterError`."""
    logging.getLogger(token.__name__).addFilter(_worth_saying)
    _keep_token_private()
    children = set(psutil.Process().children(recursive=True))
    for attempt in range(TRIES):
        try:
            with _out_of_reach():
                ray.init(address="local", **options)
            break
        except BaseException as error:
            _kill(process for process in psutil.Process().children(recursive=True) if process not in children)
            if "AF_UNIX path length" in str(error):
                raise ClusterError(
                    f"the path of the folder where Ray keeps its sockets is too long for them ({error}); set "
                    "RAY_TMPDIR to a shorter one, for example /tmp"
                ) from error
            if isinstance(error, OSError) and error.filename:
                raise ClusterError(
                    f"Ray cannot write {error.filename} ({error.strerror}); RAY_TMPDIR says where it keeps its files, "
                    "RAY_AUTH_TOKEN_PATH where its token is"
                ) from error
            if "timed out" not in str(error).lower():
                raise
            if attempt == TRIES - 1:
                raise ClusterError(
                    f"Ray did not start in {TRIES} tries of 30 s each: {os.cpu_count()} core(s) have a load "
                    f"of {os.getloadavg()[0]:.1f}, {psutil.virtual_memory().available / 2**30:.1f} GiB of memory are "
                    "free. Start the run when the machine has less to do"
                ) from error
    interrupt.keep_handlers()
    node = ray._private.worker._global_node
    node.kill_all_processes = lambda **_: _end(node)
    folder = Path(node.get_session_dir_path())
    _owned[:] = [Lock(folder / OWNER)]
    _remove_old(folder.parent)


@contextmanager
def _out_of_reach() -> Iterator[None]:
    """What is started inside never gets SIGTERM and SIGHUP: Slurm sends them to every process of a job, a terminal to
    its group, and without Ray a run cannot save. Ray's own handler of SIGTERM, which saves nothing, is left out."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(node: Any) -> None:
    """Ray's way of ending a node begins with SIGTERM, which its processes do not get."""
    processes = [info.process.pid for infos in node.all_processes.values() for info in infos]
    family = [p for pid in processes if psutil.pid_exists(pid) for p in _family(pid)]
    type(node).kill_all_processes(node, check_alive=False, allow_graceful=False)
    _kill(family)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def _kill(processes: Any) -> None:
    processes = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _keep_token_private() -> None:
    """Ray's token gives whoever has it this account: it is made, and kept, for its owner alone to read."""
    path, given = Path.home() / ".ray" / "auth_token", os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    with suppress(OSError):  # Ray says what it misses
        if not path.exists() and not given and os.environ.get("RAY_AUTH_MODE", "token") == "token":
            before = os.umask(0o077)
            try:
                token.generate_and_save_token()
            finally:
                os.umask(before)
        if path.exists() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _remove_old(root: Path) -> None:
    """Removes the folders of sessions that runs have left in `root`; those of others, and of runs that go on, stay."""
    for owner in root.glob(f"session_*/{OWNER}"):
        with suppress(InUse, OSError):
            lock = Lock(owner)
            shutil.rmtree(owner.parent, ignore_errors=True)
            lock.release()


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")  # a warning although all is well
