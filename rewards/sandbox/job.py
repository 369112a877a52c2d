"""What runs inside a job: the candidate's side (untrusted once its code is loaded) and nothing of the expected values.

Descriptors: 0 stdin, 1 stdout, 2 nothing, 3 the trusted parent, 4 the tester (assert-style jobs only). Whatever this
process says is only ever a claim about what the candidate returned; the parent and the tester decide what it is worth.
"""

from __future__ import annotations

import asyncio
import atexit
import builtins
import contextlib
import inspect
import io
import operator
import os
import sys
import threading
import types
from collections.abc import Callable

from . import values

PARENT, PEER = 3, 4
CANDIDATE_ENDED = "the candidate's process ended"  # the tester's words when its line to the candidate is cut
# Operators that a test may apply to an object of the candidate's, and those that also look at their right side.
REFLECTED = ("add sub mul matmul truediv floordiv mod pow lshift rshift and_ or_ xor").split()
UNARY = ["neg", "pos", "abs", "invert", "index"]
ARITHMETIC = [*UNARY, *REFLECTED, *(f"i{name.rstrip('_')}" for name in REFLECTED), "lt", "le", "gt", "ge"]
MAX_REQUEST_BYTES = 256 << 20  # from the trusted side: code and inputs


def run(task: dict) -> int:
    """Does what the parent asked (`task["mode"]`: call, program, serve) and returns the exit code."""
    return {"call": _call, "program": _program, "serve": _serve}[task["mode"]](task)


def _module(name: str) -> dict:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def describe(error: BaseException) -> dict:
    """An exception as a name and a bounded message; its own `__str__` may do anything, so any failure of it is fine."""
    try:
        message = str(error)[:300]
    except BaseException:  # noqa: BLE001 - model-written __str__; the name alone is then the description
        message = ""
    return {"type": type(error).__name__[:80], "message": message}


def _load(task: dict) -> dict:
    namespace = _module("candidate")
    if task.get("setup"):
        exec(compile(task["setup"], "<setup>", "exec", dont_inherit=True), namespace)
    exec(compile(task["code"], "<candidate>", "exec", dont_inherit=True), namespace)
    return namespace


def _find(namespace: dict, entry: str) -> Callable:
    """A function, `Class.method` (on a fresh instance) or a method of a class named Solution."""
    owner, _, method = entry.rpartition(".")
    if owner:
        return getattr(namespace[owner](), method)
    if entry not in namespace and isinstance(namespace.get("Solution"), type):
        return getattr(namespace["Solution"](), entry)
    if entry not in namespace:
        raise NameError(f"the code defines no {entry!r}")
    return namespace[entry]


def _call(task: dict) -> int:
    """Function-call tests: one answer per input, each sent as soon as it is there."""
    try:
        namespace = _load(task)
        function = _find(namespace, task["entry"])
    except BaseException as error:  # noqa: BLE001 - model-written code; SystemExit and friends included
        values.write_frame(PARENT, {"load": describe(error)})
        return 0
    for data in task["calls"]:
        arguments, keywords = values.decode(data)
        try:
            value = function(*arguments, **keywords)
            answer = {"value": values.encode(value, by_value=True)}
            changed = next((x for x in arguments if type(x) in (list, dict, set, bytearray)), None)
            if value is None and changed is not None:  # a function may do its work in place
                answer["argument"] = values.encode(changed, by_value=True)
            message = values.frame(answer)
        except BaseException as error:  # noqa: BLE001
            message = values.frame({"raised": describe(error)})
        _write_all(message)
    return 0


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(PARENT, view) :]


def _program(task: dict) -> int:
    """A whole program as `__main__`: its standard output and exit code are its answer."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    namespace = _module("__main__")
    namespace["__builtins__"] = __builtins__
    code = 0
    try:
        exec(compile(task["code"], "<candidate>", "exec", dont_inherit=True), namespace)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001
        values.write_frame(PARENT, {"raised": describe(error)})
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code & 0xFF


class _Server:
    """Answers the tester's requests: call a name, and get, set, call, iterate what earlier calls left here."""

    def __init__(self, namespace: dict) -> None:
        self.namespace = namespace
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}  # id of an object (all are kept, so it stays its own): its handle number

    def keep(self, value: object) -> int:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return number

    def answer(self, request: list) -> dict:
        """The answer to (operation, target, arguments, by value, whether arguments that changed are wanted)."""
        operation, target, data, by_value, wants_arguments = request
        try:
            arguments, keywords = values.decode(data, lambda number, plain=None: self.objects[number])
            owner = _find(self.namespace, target) if isinstance(target, str) else self.objects[target]
            if operation == "name":
                return {"value": ["o", self.keep(owner)]}
            answer, printed = {}, io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    result = _OPERATIONS[operation](owner, *arguments, **keywords)
                    if inspect.iscoroutine(result):
                        result, answer = asyncio.run(result), {"awaitable": True}
                answer["value"] = values.encode(result, None if operation == "plain" else self.keep, by_value)
            except BaseException as error:  # noqa: BLE001
                answer = self.raised(error)
            if printed.tell():
                answer["printed"] = printed.getvalue()
            if wants_arguments:
                answer["arguments"] = values.encode((arguments, keywords), self.keep, by_value=True)
            return answer
        except BaseException as error:  # noqa: BLE001
            return {"raised": describe(error)}

    def raised(self, error: BaseException) -> dict:
        """An exception by its classes, arguments and handle, from which the tester makes one of its own."""
        classes = [f"{kind.__module__}.{kind.__qualname__}"[:200] for kind in type(error).__mro__[:20]]
        arguments = values.encode(error.args, self.keep, by_value=True)
        return {"raised": {**describe(error), "classes": classes, "arguments": arguments, "number": self.keep(error)}}


def _next(iterator: object) -> object:
    """(value,) or () at the end, so that a StopIteration never has to travel."""
    for value in iterator:
        return (value,)
    return ()


def _leave(manager: object, name: str | None = None, message: str = "") -> object:
    """Ends a `with` block of the test, in which the exception `name` was raised."""
    error = None if name is None else getattr(builtins, name, Exception)(message)
    return bool(manager.__exit__(error and type(error), error, None))


def _equals_anything(owner: object) -> bool:
    try:
        return bool(owner == object())
    except Exception:  # it expects another of its kind
        return False


def _reflected(apply: Callable) -> Callable:
    return lambda owner, other: apply(other, owner)


_OPERATIONS: dict[str, Callable] = {
    "call": lambda owner, *arguments, **keywords: owner(*arguments, **keywords),
    "get": getattr, "set": setattr, "iter": iter, "next": _next, "len": len, "truth": bool,
    "item": operator.getitem, "set_item": operator.setitem, "del_item": operator.delitem,
    "contains": lambda owner, value: value in owner,
    "enter": lambda owner: owner.__enter__(), "leave": _leave, "plain": lambda owner: owner,
    "isinstance": lambda owner, kind: isinstance(owner, kind),
    "equals_anything": _equals_anything,
    **{name: getattr(operator, name) for name in ARITHMETIC},
    **{f"r{name}": _reflected(getattr(operator, name)) for name in REFLECTED},
    **{kind.__name__: kind for kind in (str, repr, int, float, complex, round, format)},
}  # fmt: skip


def _serve(task: dict) -> int:
    """Assert-style tests: loads the code, then answers the tester until it hangs up."""
    try:
        server = _Server(_load(task))
    except BaseException as error:  # noqa: BLE001
        values.write_frame(PARENT, {"load": describe(error)})
        return 0
    while True:
        try:
            request = values.read_frame(PEER, MAX_REQUEST_BYTES)
        except EOFError:
            return 0
        values.write_frame(PEER, server.answer(request))
