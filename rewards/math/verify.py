"""Math-Verify in a process that can be killed, its own timeouts off, and a second look at what it accepts."""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from rewards.workers.handler import in_worker
from rewards.workers.process import START_TIMEOUT_S, TAKE_TIMEOUT_S, WarmProcess, WorkerGone

LIMIT_S = 2.0
MEMORY_BYTES = 2 << 30

Outcome = Literal["equal", "different", "timeout"]


class VerifierError(RuntimeError):
    """Math-Verify cannot run here; an infrastructure error, never a verdict about the answer."""


def verify(gold: str, prediction: str, prose: bool = False) -> tuple[Outcome, str]:
    """Whether Math-Verify and the second look find the texts equal, and which of them decided. At most LIMIT_S.

    `prose` also reads numbers out of running text. Inside a reward worker the comparison runs in place, under a limit
    of CPU seconds that ends the worker (which its runner answers with the verdict timeout); anywhere else in a worker
    process of its own. Raises VerifierError when that process cannot be started.
    """
    if in_worker():
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        try:
            equal, why = compare(gold, prediction, prose)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return ("equal" if equal else "different"), why
    return _Client.here().ask(gold, prediction, prose)


def warm() -> None:
    """Imports what `verify` needs; called once in a runner's fork server, so that every forked worker has it."""
    from math_verify import parse  # noqa: F401

    compare("\\frac{1}{2}x^{2}", "0.5x^2", False)
    compare("42", "Answer: 42", True)


class _Client:
    _instance: _Client | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.process: WarmProcess | None = None
        self.alive = False
        atexit.register(self.close)

    @classmethod
    def here(cls) -> _Client:
        with cls._guard:
            if cls._instance is None or cls._instance.pid != os.getpid():  # a fork must not share the pipes
                cls._instance = cls()
            return cls._instance

    def ask(self, gold: str, prediction: str, prose: bool) -> tuple[Outcome, str]:
        with self.lock:
            for attempt in (0, 1):
                try:
                    return self._ask(gold, prediction, prose)
                except WorkerGone as gone:
                    self.close()
                    if attempt:
                        raise VerifierError(f"the math checker's process cannot be started: {gone}") from gone
        raise AssertionError("unreachable")

    def _ask(self, gold: str, prediction: str, prose: bool) -> tuple[Outcome, str]:
        if self.process is None:
            self.process = WarmProcess("rewards.math.verify:make_handler", (), MEMORY_BYTES)
            self.alive = False
        process = self.process
        if not self.alive:
            self._await_ready(process)
        process.receive()  # a worker that died while idle has been replaced: nobody's fault
        process.send((gold, prediction, prose))
        started = cpu_start = None
        deadline = time.monotonic() + TAKE_TIMEOUT_S
        while True:
            for reply in process.wait(max(0.0, deadline - time.monotonic())):
                if "ready" in reply and started is None:
                    continue  # its predecessor died idle; this one takes the request from the pipe
                if "ready" in reply:  # it died by itself: out of memory, or a crash in a library
                    return "timeout", f"the checker's process ended with {reply['ended']}"
                if "started" in reply:
                    started, cpu_start = time.monotonic(), reply["cpu_s"]
                    deadline = started + LIMIT_S
                elif "outcome" in reply:
                    return reply["outcome"], reply["why"]
            if time.monotonic() < deadline:
                continue
            used, state = process.cpu_seconds()
            if started is None:
                if state == "R" and time.monotonic() - deadline < START_TIMEOUT_S:
                    continue
                raise WorkerGone("it did not take its work")
            if state == "R" and used - cpu_start < LIMIT_S / 2 and time.monotonic() - started < 4 * LIMIT_S:
                deadline = time.monotonic() + LIMIT_S / 4  # it waited for a core
                continue
            process.kill_worker()
            self.alive = False
            return "timeout", f"not decided within {LIMIT_S} s"

    def _await_ready(self, process: WarmProcess) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            if any("ready" in reply for reply in process.wait(left)):
                self.alive = True
                return
        raise WorkerGone(f"not ready within {START_TIMEOUT_S} s")

    def close(self) -> None:
        if self.process is not None and self.pid == os.getpid():
            self.process.close()
        self.process = None


def make_handler() -> Any:
    warm()

    def handle(request: tuple[str, str, bool]) -> Iterator[dict[str, Any]]:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, 2 * LIMIT_S)  # for when the caller is gone
        try:
            equal, why = compare(*request)
            yield {"outcome": "equal" if equal else "different", "why": why}
        except MemoryError:
            yield {"outcome": "timeout", "why": "out of memory", "replace": True}

    return handle


# What follows runs in a process that may be killed at any moment.


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any, Any]:
    import math_verify
    import math_verify.parser

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    math_verify.parser.parse_expr_cached = _plain_number  # the original hands model text to sympy's parse_expr
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return math_verify, (latex,), (latex, math_verify.ExprExtractionConfig())


def _plain_number(expression: str) -> Any:
    from sympy import Rational

    from rewards.math.rational import rational

    value = rational(" ".join(expression.replace("**", "^").replace("×", "*").replace("÷", "/").split()))
    if value is None:
        raise ValueError("not a plain number")
    return Rational(value.numerator, value.denominator)


@lru_cache(maxsize=4096)
def _parse(text: str, prose: bool) -> list[Any]:
    library, latex, everything = _math_verify()
    if prose:
        return library.parse(text, everything, parsing_timeout=None)
    return library.parse(f"${text}$", latex, parsing_timeout=None)


def compare(gold: str, prediction: str, prose: bool = False) -> tuple[bool, str]:
    """Math-Verify's answer, and for a positive one the second look; the rule that decided."""
    library = _math_verify()[0]
    if prose and _BROKEN.fullmatch(prediction):
        return False, "an inline formula over several lines"
    one, other = _parse(gold, prose), _parse(prediction, prose)
    if not one or not other:
        return False, "Math-Verify cannot read " + ("the gold" if not one else "the prediction")
    if _numerically_different(one[0], other[0]):
        return False, "the values differ at test points"
    if not library.verify(one, other, float_rounding=6, timeout_seconds=None, allow_set_relation_comp=True):
        return False, "Math-Verify"
    why = _second_look(one[0], other[0])
    return (False, why) if why else (True, "Math-Verify")


_POINTS = ("0.7310585786300049", "1.3788100424195", "2.2360679774997896")


def _number(expression: Any, digits: int = 30) -> Any | None:
    """A finite numerical value, or None."""
    import sympy

    try:
        value = expression.evalf(digits)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, NotImplementedError):
        return None
    return value if isinstance(value, sympy.Expr) and value.is_number and value.is_finite and _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    real, imaginary = value.as_real_imag()
    return bool(real.is_Number and imaginary.is_Number)


def _close(a: Any, b: Any, relative: float = 1e-9) -> bool:
    scale = max(abs(a), abs(b))
    return bool(abs(a - b) <= relative * scale) if scale != 0 else True


def _numerically_different(a: Any, b: Any) -> bool:
    """True only when both are expressions with values at fixed points, and a value differs clearly: a proof that they
    are not equal, at a hundredth of what `simplify` costs."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    if a.has(sympy.UnevaluatedExpr) or b.has(sympy.UnevaluatedExpr):  # percent signs: 28% and 28 count as the same
        return False
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    if len(names) > 4 or len({str(name) for name in names}) < len(names):
        return False
    if bool(a.free_symbols) != bool(b.free_symbols) and (a.is_Symbol or b.is_Symbol):
        return False
    at = {name: sympy.Float(_POINTS[i % 3], 30) + sympy.Float(i, 30) / 7 for i, name in enumerate(names)}
    try:
        first, second = (a.subs(at), b.subs(at)) if names else (a, b)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return False
    x, y = _number(first), _number(second)
    if x is None or y is None:
        return False
    return not _close(x, y, 1e-5) and not _close(x * 100, y, 1e-5) and not _close(x, y * 100, 1e-5)


def _second_look(a: Any, b: Any) -> str:
    """Why a positive of Math-Verify is refused; empty when it stands."""
    import sympy

    if isinstance(a, (sympy.FiniteSet, sympy.Tuple)) and isinstance(b, (sympy.FiniteSet, sympy.Tuple)):
        if len(a.args) != len(b.args):
            return "containers of different size"
        return ""
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a.free_symbols or b.free_symbols:
        return ""
    percent = a.has(sympy.UnevaluatedExpr) or b.has(sympy.UnevaluatedExpr)
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return "not a number"
    x, y = _number(a), _number(b)
    if x is None or y is None or percent:
        return ""
    # Rounding at the sixth decimal hides everything below it, such as 2^-99 beside 2^-98.
    return "" if _close(x, y, 1e-9) else "the values differ beyond Math-Verify's rounding"


_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z']{3,}")
_BROKEN = re.compile(r"[^$\\]*(?:\$\s*\n[^$]*\n\s*\$|\\\(\s*\n[^$\\]*\n\s*\\\))[^$\\]*")
_PROSE = re.compile(r"\\boxed|\\\(|\\\[|\n|\b(?:answer|is|the|therefore|so)\b", re.I)
_DOLLAR = re.compile(r"(?<!\\)\$")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\w*\{[^{}]*\}")


def is_prose(text: str) -> bool:
    """Whether a text is more than one bare expression: running words, delimiters inside it, several lines."""
    dollars = [match.start() for match in _DOLLAR.finditer(text)]
    if len(dollars) > 1 or any(1 < at < len(text) - 1 for at in dollars):  # one at either end is money
        return True
    return _PROSE.search(text) is not None or len(_WORD.findall(_TEXT.sub("", text))) > 2
