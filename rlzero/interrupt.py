"""Signals that end a command: Ctrl-C, SIGTERM (Slurm, Kubernetes, spot instances), SIGHUP (a closed terminal).

Outside of `graceful` a signal raises `Interrupted` where the main thread is. Who has something to save asks for
`graceful`: there the first signal is a request. A second Ctrl-C always raises; SIGTERM and SIGHUP are often sent twice
and count once. A command that was interrupted is gone within GRACE_S, whatever hangs in it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 8.0  # from the exception to the end of the process


class Interrupted(KeyboardInterrupt):
    """A signal ended the command."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def handled(react: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, `react(number, frame)` takes the signals. One that was ignored (nohup) stays so. Signals reach the main
    thread only: in another one nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in SIGNALS if main and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, react) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_handlers() -> None:
    """Puts Python's handlers back in their place: Ray's start leaves one that prints a C++ stack and aborts."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.getsignal(number))


@contextmanager
def commands() -> Iterator[None]:
    """For the main program around a command: an interruption ends the process with 128 + the signal's number."""
    received: list[int] = []

    def react(number: int, frame: FrameType | None) -> None:
        if not received or number == signal.SIGINT:
            received.append(number)
            interrupt(number)

    with handled(react):
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            if (cause := _interruption(error)) is None:
                raise
            print("interrupted", file=sys.stderr)
            sys.exit(128 + getattr(cause, "number", signal.SIGINT))


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that `error` is or was made of (typer makes it an exit with 130)."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def graceful(ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, the first signal calls `ask(number)`, in the main thread and between any two instructions of it."""
    asked: list[int] = []

    def react(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
            ask(number)
        elif number == signal.SIGINT:
            interrupt(number)

    with handled(react):
        yield


def interrupt(number: int) -> None:
    """Raises `Interrupted`, and sees to it that the process does not outlive that by more than GRACE_S."""
    leave = threading.Timer(GRACE_S, _leave, (128 + number,))
    leave.daemon = True
    leave.start()
    raise Interrupted(number)


def _leave(code: int) -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(code)
