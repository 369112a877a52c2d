"""Failures of other processes, told as if they had happened here.

Ray wraps what an actor raises into a traceback of its own, and keeps nothing but text of what a constructor raised. A
run's errors are written to be read, so they are taken out of that wrapping again; the remote traceback stays attached
as the cause (RLZERO_TRACEBACK=1 shows it).
"""

from __future__ import annotations

import logging
import re
from typing import Any

import ray

NOISE = ("Token authentication is enabled",)  # what Ray warns of although all is well


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
    """Why an actor is dead, in one sentence; Ray's own text names every id it has."""
    found = re.search(r"The actor (?:is dead|died) because ([^.\n]*)", str(error))
    reason = found[1] if found else "for a reason that Ray does not tell"
    return f"{reason}; killed from outside or out of memory?" if "process has died" in reason else reason


def hush() -> None:
    """Takes Ray's remarks on its own start out of what a user sees; its warnings and errors stay."""
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    if not any(f is _worth_saying for f in logger.filters):
        logger.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)
