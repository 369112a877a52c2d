"""Programs that try to be paid without solving the task, or to get out: none succeeds."""

import pytest

from rewards.code import check
from rewards.sandbox import Limits, Sandbox
from tests.rewards.attacks.run import ATTACKS, TESTS, beats_naive, run_attacks

_SLOW = {
    "sleep",
    "endless loop",
    "hanging __repr__",
    "colliding hashes",
    "infinite stderr",
    "memory bomb in pieces",
    "dies like a victim of the machine",
    "recursion until the stack ends",
    "deadlock",
    "ignores signals",
}


def test_no_attack_succeeds():
    with Sandbox() as sandbox:
        rows = run_attacks(sandbox, [attack for attack in ATTACKS if attack.name not in _SLOW])
        rows += run_attacks(sandbox, [attack for attack in ATTACKS if attack.name in _SLOW], timeout_s=0.4)
    assert len(rows) == len(ATTACKS) >= 60
    assert [row for row in rows if row.succeeded] == []
    assert {row.verdict for row in rows} == {"wrong", "timeout"}


@pytest.mark.parametrize("kind", TESTS)
def test_the_honest_answer_is_paid(kind):
    """The tests that the attacks face can be passed."""
    code = (
        "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))\n"
        "class Refused(Exception): pass\nclass Account:\n    def __init__(self, balance): self.balance = balance\n"
        "    def deposit(self, more):\n        if more < 0: raise Refused('negative')\n"
        "        self.balance += more\n        return self\n"
        "    def __add__(self, other): return Account(self.balance + other.balance)\n"
        "    def __enter__(self): return self\n    def __exit__(self, *args): pass"
    )
    with Sandbox() as sandbox:
        assert {outcome.verdict for outcome in check(sandbox, code, TESTS[kind], limits=Limits())} == {"correct"}


def test_the_attacks_have_teeth():
    """Those marked so are paid by the usual checker, which runs everything in one process and asserts there."""
    marked = list({attack.name: attack for attack in ATTACKS if attack.naive}.values())
    assert len(marked) >= 30
    assert [attack.name for attack in marked if not beats_naive(attack)] == []
