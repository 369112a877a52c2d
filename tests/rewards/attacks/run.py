"""Runs the attacks and watches, from outside, whether one gets anywhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rewards.code import AssertTests, CallTests, ProgramTests, Tests, check
from rewards.sandbox import Limits, Sandbox, SandboxError

from . import escapes, tricks
from .program import Attack, Kind

ATTACKS: list[Attack] = [*tricks.ATTACKS, *escapes.ATTACKS]

TESTS: dict[Kind, Tests] = {
    "call": CallTests("add", [((1, 2), {}), ((40, 5), {}), ((-3, 3), {})], [3, 45, 0]),
    "assert": AssertTests([
        "assert add(1, 2) == 3\nassert set([add(40, 5)]) == set([45])\nassert abs(add(-3, 3)) < 1e-9\n"
        "for got, want in zip(map(add, [1, 2], [3, 4]), [4, 6]):\n    assert got == want\n"
        "assert sorted([add(2, 2), 1]) == [1, 4] and len([add(0, 1)]) == 1 and add(8, 8) != 17\n"
        "assert isinstance(add(1, 1), int) and not add(0, 0)"
    ]),
    "value": AssertTests([
        "import math, pytest\nassert add(1, 2) == pytest.approx(3) and math.isclose(add(40, 5), 45)",
        "assert 4 in add([1], [4]) and 9 not in add([1], [4])",
        "assert add('ab', 'c').startswith('ab') and add('a', 'b').isalpha() and not add('1', '2').isalpha()",
        "xs = [3, 1]\nassert add(xs, [2]) == xs + [2]\nr = add(xs, [])\nassert sorted(r) == sorted(xs)",
        "parts = add([2], [3, 5])\nassert sum(parts) == 10\nassert all(p in (2, 3, 5) for p in parts)",
        "import pytest\nwith pytest.raises(TypeError):\n    add(1, 'a')\nassert add(1, 1) == 2",
        "def close(got, want):\n    return abs(got - want) < 1e-6\nassert close(add(1, 2), 3)",
    ]),
    "object": AssertTests([
        "a = Account(5)\na.deposit(2)\nassert a.balance == 7 and abs(a.balance - 7) < 1e-9 and 7 == a.balance",
        "with Account(1) as a:\n    assert a.deposit(3).balance == 4",
        "a = Account(1)\ntry:\n    a.deposit(-1)\nexcept Refused as e:\n    assert 'negative' in str(e)\nelse:\n"
        "    assert False\nassert a.balance == 1",
        "total = Account(1) + Account(2)\nassert total.balance == 3 and isinstance(total, Account)",
    ]),
    "program": ProgramTests(["1 2\n", "40 5\n"], ["3\n", "45\n"]),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of one attack. `succeeded` is empty, or says how it did."""

    name: str
    kind: Kind
    verdict: str
    why: str
    seconds: float
    succeeded: str


class Witness:
    """What outside the sandbox would show that an attack reached it: a file, a connection, a signal."""

    def __enter__(self) -> Witness:
        self.folder = tempfile.TemporaryDirectory()
        self.canary = Path(self.folder.name) / "canary"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.signals = 0
        self._before = signal.signal(signal.SIGUSR1, self._count)
        os.environ["RLZERO_SECRET"] = "42"
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before)
        self.listener.close()
        self.folder.cleanup()
        del os.environ["RLZERO_SECRET"]

    def _count(self, *_: object) -> None:
        self.signals += 1

    def fill(self, code: str) -> str:
        """Puts this process's address, port and canary into an attack's code."""
        here = {
            "{canary!r}": repr(str(self.canary)), "{canary}": str(self.canary), "{pid}": str(os.getpid()),
            "{port}": str(self.listener.getsockname()[1]), "{signal}": str(int(signal.SIGUSR1)),
        }  # fmt: skip
        for key, value in here.items():
            code = code.replace(key, value)
        return code

    def saw(self) -> str:
        """What happened since the last look, or an empty string."""
        seen = []
        if self.canary.exists():
            seen.append("a file was written")
            self.canary.unlink()
        if self.signals:
            seen.append("a signal arrived")
            self.signals = 0
        try:
            self.listener.accept()[0].close()
            seen.append("a connection arrived")
        except BlockingIOError:
            return ", ".join(seen)
        return ", ".join(seen)


def run_attacks(sandbox: Sandbox, attacks: list[Attack] | None = None, timeout_s: float = 1.0) -> list[Row]:
    """One row per attack; runs in the main thread (it listens for a signal). A minute or so for all."""
    limits = Limits(timeout_s=timeout_s, total_s=2 * timeout_s, memory_bytes=256 << 20)
    rows = []
    with Witness() as witness:
        for attack in attacks or ATTACKS:
            started = time.monotonic()
            try:
                outcomes = check(sandbox, witness.fill(attack.code), TESTS[attack.kind], limits=limits)
                failed = [outcome for outcome in outcomes if outcome.verdict != "correct"]
                verdict, why = (failed[0].verdict, failed[0].why) if failed else ("correct", "")
            except (SandboxError, ValueError) as error:
                verdict, why = "error", str(error)
                if sandbox.closed:
                    sandbox = Sandbox(sandbox.limits)
            seen = witness.saw()
            won = seen or {"correct": "was paid", "error": "escaped its zero"}.get(verdict, "")
            rows.append(Row(attack.name, attack.kind, verdict, why, time.monotonic() - started, won))
    return rows


_NAIVE = """
import sys
scope = {}
exec(sys.stdin.read(), scope)
add = scope["add"]
inputs, expected = [(1, 2), (40, 5), (-3, 3)], [3, 45, 0]
assert add(1, 2) == 3 and add(40, 5) == 45 and add(-3, 3) == 0
assert all(add(*one) == want for one, want in zip(inputs, expected))
print("PASSED")
"""


def beats_naive(attack: Attack) -> bool:
    """Whether the attack is paid by the usual checker (exec in one process, asserts, a word printed at the end).

    Runs it without isolation: for attacks marked `naive` only, whose effects are harmless.
    """
    with Witness() as witness:
        done = subprocess.run(
            [sys.executable, "-c", _NAIVE], input=witness.fill(attack.code), capture_output=True, text=True, timeout=30,
            cwd=witness.folder.name,
        )  # fmt: skip
    return done.returncode == 0 and done.stdout.rstrip().endswith("PASSED")
