"""The tester: runs a data set's assertions in a process of its own and reaches the candidate by calls only.

The candidate's names are stand-ins that send a request and rebuild the answer as a genuine built-in value, so `==`,
`len`, `isinstance` and every constant of the test are this process's own. An object that cannot travel stays in the
candidate and is represented by a handle, which is never equal to a value.
"""

from __future__ import annotations

import builtins
import mmap
import os
import random
import sys

from . import values
from .job import CANDIDATE_ENDED, PARENT, PEER, describe

# What a test may want to catch. Not here: StopIteration and GeneratorExit, which would silently end a loop of the test,
# AssertionError and SystemExit, which would look like the test's own.
_RAISABLE = {
    name: getattr(builtins, name)
    for name in (
        "ArithmeticError AttributeError EOFError Exception IndexError KeyError LookupError NameError "
        "NotImplementedError OSError OverflowError PermissionError RecursionError RuntimeError TypeError ValueError "
        "ZeroDivisionError"
    ).split()
}


class CandidateError(Exception):
    """The candidate raised something that is not one of the plain built-in errors."""


class _Link:
    """The line to the candidate: one request, one answer. Losing it ends this process: no test can swallow that."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.calls = 0
        self.test = 0

    def ask(self, operation: str, target: str | int, arguments: tuple = (), keywords: dict | None = None) -> object:
        self.calls += 1
        try:
            data = values.encode((arguments, keywords or {}), _handle_of)
        except values.Unsendable as error:
            self.give_up({"broken": f"an argument cannot be sent to the candidate: {error}"})
        except values.BadValue as error:  # too deep: only a value that the candidate gave can be
            self.give_up({"passed": False, "why": f"an argument made of the candidate's answer: {error}"})
        try:
            values.write_frame(PEER, [operation, target, data])
            answer = values.read_frame(PEER, self.max_bytes)
            if type(answer) is dict and type(answer.get("raised")) is dict:
                name, message = (values.text_of(answer["raised"], key) for key in ("type", "message"))
                raise _RAISABLE.get(name, CandidateError)(message)
            if type(answer) is not dict or "value" not in answer:
                raise values.BadValue("an answer that is neither a value nor an error")
            return values.decode(answer["value"], lambda number: Handle(self, number))
        except (EOFError, OSError):
            self.give_up({"passed": False, "why": CANDIDATE_ENDED})
        except values.BadValue as error:
            self.give_up({"passed": False, "why": f"the candidate's answer: {error}"})

    def give_up(self, verdict: dict) -> None:
        values.write_frame(PARENT, {"test": self.test, **verdict})
        os._exit(0)


def _handle_of(value: object) -> int:
    if type(value) is Handle:
        return object.__getattribute__(value, "_number")
    if type(value) is RemoteName:
        return object.__getattribute__(value.resolve(), "_number")
    raise values.Unsendable(f"a {type(value).__name__}")


class RemoteName:
    """A name that the candidate defines: calling it calls the candidate's."""

    def __init__(self, link: _Link, name: str) -> None:
        self._link, self._name, self._resolved = link, name, None

    def resolve(self) -> Handle:
        if self._resolved is None:
            self._resolved = self._link.ask("name", self._name)
        return self._resolved

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._link.ask("call", self._name, arguments, keywords)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.resolve(), name)


class Handle:
    """An object that stays in the candidate. It can be called, read, set, indexed and iterated; never compared."""

    __slots__ = ("_link", "_number", "_truth")

    def __init__(self, link: _Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_truth", None)

    def _ask(self, operation: str, *arguments: object, **keywords: object) -> object:
        link = object.__getattribute__(self, "_link")
        return link.ask(operation, object.__getattribute__(self, "_number"), arguments, keywords)

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._ask("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> object:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: object) -> object:
        return self._ask("item", key)

    def __setitem__(self, key: object, value: object) -> None:
        self._ask("set_item", key, value)

    def __contains__(self, value: object) -> bool:
        return _exactly(bool, self._ask("contains", value))

    def __len__(self) -> int:
        return _exactly(int, self._ask("len"))

    def __iter__(self):
        iterator = self._ask("iter")
        if type(iterator) is not Handle:
            raise CandidateError("iter() of an object gave a plain value")
        while True:
            step = iterator._ask("next")
            if type(step) is not tuple or len(step) > 1:
                raise CandidateError("next() of an object gave a malformed step")
            if not step:
                return
            yield step[0]

    def __bool__(self) -> bool:
        if self._truth is None:  # asked once: an object cannot be true here and false there
            object.__setattr__(self, "_truth", _exactly(bool, self._ask("truth")))
        return self._truth

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        if type(other) is Handle and other._number == self._number:
            return True
        raise TypeError("an object of the candidate cannot be compared: only plain values can")

    __hash__ = None

    def __ne__(self, other: object) -> bool:
        return not self == other


def _exactly(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise CandidateError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def run(task: dict) -> int:
    """Runs `task["tests"]` in order; one verdict frame each to the parent."""
    link = _Link(task["max_bytes"])
    namespace: dict = {"__name__": "tests"}
    random.seed(0)  # a test that draws its inputs draws the same ones for every completion
    try:
        if task.get("setup"):
            exec(compile(task["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        looks = task["lookups"]
        free = [name for name in looks["free"] if name not in namespace]
        # a task may call its function `sum`: then no name is free, and the assertions say what they call
        for name in task["entries"] or free or looks["outermost"]:
            namespace[name] = RemoteName(link, name)
        for name in looks["modules"]:  # a test may lean on an import that its reference solution makes
            if name in sys.modules:
                namespace.setdefault(name, sys.modules[name])
        programs = [compile(test, "<test>", "exec", dont_inherit=True) for test in task["tests"]]
    except (SyntaxError, ImportError, NameError, ValueError) as error:
        values.write_frame(PARENT, {"test": task["first"], "broken": f"{type(error).__name__}: {error}"})
        return 0
    prepared = False
    reserve = mmap.mmap(-1, 8 << 20)  # given up when memory runs out, so that a verdict can still be written
    for number, program in enumerate(programs, task["first"]):
        link.test = number
        try:
            if not prepared:
                exec(compile(task["prepare"], "<prepare>", "exec", dont_inherit=True), namespace)
                prepared = True
            exec(program, namespace)
            verdict = {"passed": True}
        except BaseException as error:  # noqa: BLE001 - any way for a test not to end normally is a failure
            reserve.close()
            verdict = {"passed": False, "why": _why(error.with_traceback(None))}
        if link.calls == 0:  # nothing that the candidate did can be the reason
            verdict = {"broken": f"the test ended without calling the candidate: {verdict.get('why', 'it passed')}"}
        values.write_frame(PARENT, {"test": number, **verdict})
    return 0


def _why(error: BaseException) -> str:
    described = describe(error)
    return f"{described['type']}: {described['message']}"[:400]
