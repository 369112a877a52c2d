"""An attack as a record, and the three shapes one comes in."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

Kind = Literal["call", "assert", "value", "object", "program"]


@dataclass(frozen=True)
class Attack:
    """`naive`: whether it beats the checker that most people write first (exec the code, run the asserts, print)."""

    name: str
    kind: Kind
    code: str
    naive: bool = False


class Collection(list[Attack]):
    """A list that attacks are written into."""

    def trick(self, name: str, kinds: str, code: str, naive: bool = False) -> None:
        """A program that wants to be paid; `kinds` are the test styles it is tried with, separated by blanks."""
        for kind in kinds.split():
            self.append(Attack(name, kind, textwrap.dedent(code).strip() + "\n", naive and kind != "program"))

    def escape(self, name: str, attempt: str, naive: bool = False, kind: str = "call") -> None:
        """A program that answers rightly only when `attempt` sets `won`; raising, or leaving it false, is harmless."""
        body = textwrap.indent(textwrap.dedent(attempt).strip(), "        ")
        code = f"import os, sys, ctypes\ndef add(a, b):\n    won = False\n    try:\n{body}\n"
        self.trick(name, kind, code + "    except Exception:\n        pass\n    return a + b if won else None", naive)

    def syscall(self, name: str, number: int, arguments: str) -> None:
        """An x86-64 system call by its number, past Python and libc."""
        attempt = f"r = ctypes.CDLL(None, use_errno=True).syscall({number}, {arguments})\nwon = r >= 0"
        self.escape(f"raw syscall {name}", attempt)
