"""A run's folder: one process has it at a time, and what is in it says where the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlzero.config.read import UsageError
from rlzero.lock import InUse, Lock
from rlzero.report.log import FILES
from trainer.checkpoint import checkpoint

logger = logging.getLogger(__name__)

LAST_GOOD = "last-good"  # --resume from the newest checkpoint that is as it was written


@contextmanager
def claimed(run_dir: Path, resume: bool | str) -> Iterator[Path | None]:
    """Holds the folder; gives the checkpoint to resume from, None where there is none. Raises `UsageError` where
    another process has the folder, where it cannot be written, and where it holds a run that is not to be resumed."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(run_dir / "run.lock")
    except InUse as holder:
        raise UsageError(
            f"{run_dir}: another run writes here ({holder}); wait for it, end it, or give this one another name "
            "(name=...)"
        ) from holder
    except OSError as error:
        raise UsageError(f"{run_dir}: cannot be written ({error.strerror}); choose another output_dir") from error
    try:
        folder = run_dir / "checkpoints"
        if resume == LAST_GOOD:
            for path in checkpoint.set_aside_damaged(folder):
                logger.warning("%s: damaged, and kept beside the others", path)
        newest = checkpoint.latest(folder)
        if not resume and (newest is not None or any((run_dir / name).exists() for name in FILES)):
            raise UsageError(
                f"{run_dir}: holds a run already; go on with --resume, give this one another name (name=...), or "
                "remove the folder"
            )
        yield newest
    finally:
        lock.release()
