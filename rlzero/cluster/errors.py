"""Failures of other processes, told as if they had happened here.

Ray wraps what an actor raises into a traceback of its own, and keeps nothing but text of what a constructor raised. A
run's errors are written to be read, so they are taken out of that wrapping again; the remote traceback stays attached
as the cause (RLZERO_TRACEBACK=1 shows it).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ray

SHOWN = 8  # lines of what a dead process wrote


def reporting(cls: type) -> type:
    """`cls` for Ray, with a method `opened` that returns None or raises what the constructor raised: an actor whose
    constructor raises is dead for Ray, like one that was killed, and would be started again."""

    class Reporting(cls):
        def __init__(self, *args: Any, **kwargs: Any):
            self._constructor_error: Exception | None = None
            try:
                super().__init__(*args, **kwargs)
            except Exception as error:  # whatever it is, `opened` raises it
                self._constructor_error = error

        def opened(self) -> None:
            if self._constructor_error is not None:
                raise self._constructor_error

    Reporting.__name__ = Reporting.__qualname__ = cls.__name__  # the title of the process
    return Reporting


def original(error: ray.exceptions.RayTaskError, name: str, method: str) -> Exception:
    """The exception that `method` of the actor called `name` raised, with a note of where that was. What could not be
    sent here stays Ray's error, which has its text."""
    cause = error.cause
    if not isinstance(cause, Exception) or isinstance(cause, ray.exceptions.RayError):
        return error
    cause.add_note(f"raised by '{method}' of {name}")
    return cause


def death(error: ray.exceptions.RayActorError) -> str:
    """Why an actor is dead: Ray's reason in a sentence, and the last lines that the process wrote to its standard
    error, where Ray of this machine keeps them."""
    text = str(error)
    found = re.search(r"The actor (?:is dead|died) because (.*?)(?:\.\s|\.$|\n|$)", text)
    reason = found[1] if found else "for a reason that Ray does not tell"
    if isinstance(error.__cause__ or getattr(error, "cause", None), Exception) or "creation task" in reason:
        return f"{reason.rstrip(':,')}: {text.strip().splitlines()[-1].strip()}"
    if "process has died" in reason:
        reason += "; killed from outside or out of memory?"
    if (pid := re.search(r"\bpid[:=]\s*(\d+)", text)) and (lines := last_words(int(pid[1]))):
        reason += "\n  its last words:\n" + "\n".join(f"    {line}" for line in lines)
    return reason


def last_words(pid: int) -> list[str]:
    """The last SHOWN lines that an actor of this machine's Ray wrote to its standard error."""
    node = ray._private.worker._global_node
    if node is None:
        return []
    for path in Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip() and not line.startswith(":")][-SHOWN:]
    return []
