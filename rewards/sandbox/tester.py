"""The tester: runs a data set's assertions in a process of its own and reaches the candidate by calls only.

The candidate's names are stand-ins that send a request and rebuild the answer as a genuine built-in value, so `==`,
`len`, `isinstance` and every constant of the test are this process's own. An object that cannot travel stays in the
candidate and is represented by a handle. What a handle may do depends on the test's text (`names.py`): where it treats
what it got as an object of a class that the candidate writes, the object's own operators are what is tested; where it
expects a value, a handle is never equal to one, and nothing that the test compares with is shown to it.
"""

from __future__ import annotations

import dis
import importlib
import itertools
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator

from . import values
from .job import ARITHMETIC, CANDIDATE_ENDED, PARENT, PEER, REFLECTED, UNARY, describe

# Exceptions of the candidate that are not raised as what they are: they would silently end a loop, or a whole test.
_END_SILENTLY = ("StopIteration", "StopAsyncIteration", "GeneratorExit")
_END_TESTS = ("unittest", "asyncio", "concurrent", "doctest", "bdb")
_YES_NO = {name for kind in (str, bytes, set) for name in dir(kind) if name.startswith("is") or name.endswith("swith")}
_CONTAINERS = (list, dict, set, bytearray)


class CandidateError(Exception):
    """The candidate raised something that is not derived from an exception of the standard library."""


class _Link:
    """The line to the candidate: one request, one answer. Losing it ends this process: no test can swallow that."""

    def __init__(self, task: dict) -> None:
        self.max_bytes = task["max_bytes"]
        self.objects, self.caught = set(task["objects"]), {}
        self.in_place = {(_file(number), line, column) for number, line, column in task["in_place"]}
        self.calls = 0
        self.test = 0

    def ask(
        self, operation: str, target: str | int, arguments: tuple = (), keywords: dict | None = None,
        is_object: bool = False,
    ) -> object:  # fmt: skip
        """The candidate's answer, rebuilt; raises what the candidate raised."""
        self.calls += 1
        keywords = keywords or {}
        in_place = operation == "call" and self._looks_at_arguments()
        try:
            data = values.encode((arguments, keywords), _handle_of)
        except values.Unsendable as error:
            self.broken(f"an argument cannot be sent to the candidate: {error}")
        except values.BadValue as error:  # too deep: only a value that the candidate gave can be
            self.give_up({"passed": False, "why": f"an argument made of the candidate's answer: {error}"})
        try:
            values.write_frame(PEER, [operation, target, data, not is_object, in_place])
            answer = values.read_frame(PEER, self.max_bytes)
            if type(answer) is not dict:
                raise values.BadValue("an answer that is neither a value nor an error")
            if in_place and "arguments" in answer:
                _take_over((arguments, keywords), values.decode(answer["arguments"], self.stand_in))
            if type(answer.get("printed")) is str:
                sys.stdout.write(answer["printed"])  # for a test that captures what is printed
            if type(answer.get("raised")) is dict:
                raise self.raised(answer["raised"])
            if "value" not in answer:
                raise values.BadValue("an answer that is neither a value nor an error")
            stand_in = self.object if is_object else self.stand_in
            value = values.decode(answer["value"], stand_in)
            return _finished(value) if answer.get("awaitable") is True else value
        except (EOFError, OSError):
            self.give_up({"passed": False, "why": CANDIDATE_ENDED})
        except values.BadValue as error:
            self.give_up({"passed": False, "why": f"the candidate's answer: {error}"})

    def _looks_at_arguments(self) -> bool:
        """Whether the test that calls looks at the arguments afterwards, as the call left them."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename == __file__:
            frame = frame.f_back
        line, _, column, _ = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
        return (frame.f_code.co_filename, line, column) in self.in_place

    def stand_in(self, number: int, plain: object = None) -> object:
        return Handle(self, number) if plain is None else _with_attributes(plain, Handle(self, number))

    def object(self, number: int, plain: object = None) -> Handle:
        return Handle(self, number, is_object=True)

    def raised(self, claim: dict) -> BaseException:
        """An exception of this process for one of the candidate's: of the first of its classes that is the standard
        library's, and of the test's own class where the test catches it by a name of the candidate's."""
        classes = claim.get("classes")
        names = [n for n in classes if type(n) is str] if type(classes) is list else []
        base = next(filter(None, map(_genuine, names)), CandidateError)
        own = next((self.caught[n.rpartition(".")[2]] for n in names if n.rpartition(".")[2] in self.caught), None)
        message, number = values.text_of(claim, "message"), claim.get("number")
        arguments = values.decode(claim["arguments"], self.stand_in) if names and "arguments" in claim else (message,)
        handle = Handle(self, number) if type(number) is int else None

        class Raised(*([own] if own else []), base):
            of_the_candidate = True

            def __init__(self) -> None:
                self.args = arguments if type(arguments) is tuple else (message,)

            def __str__(self) -> str:
                return message

            def __getattr__(self, name: str) -> object:
                if name.startswith("__") or handle is None:
                    raise AttributeError(name)
                return getattr(handle, name)

        Raised.__name__ = Raised.__qualname__ = values.text_of(claim, "type") or "CandidateError"
        return Raised()

    def broken(self, why: str) -> None:
        """Ends this process: the test, not the candidate, is to blame."""
        self.give_up({"broken": why})

    def give_up(self, verdict: dict) -> None:
        values.write_frame(PARENT, {"test": self.test, **verdict})
        os._exit(0)


def _genuine(name: str) -> type[BaseException] | None:
    """The standard library's exception class of this full name, where raising it can only end a test."""
    module, _, name = name.rpartition(".")
    package = module.partition(".")[0]
    known = package in sys.stdlib_module_names and package not in _END_TESTS
    found = getattr(sys.modules.get(module), name, None) if known else None
    if not isinstance(found, type) or not issubclass(found, BaseException) or name in _END_SILENTLY:
        return None
    return None if found is BaseException else found


def _take_over(old: object, new: object) -> object:
    """Makes `old` equal to `new`, in place where it can be, and returns it: so a list of the test stays its own."""
    if type(old) is not type(new):
        return new
    if type(old) is tuple and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            _take_over(before, after)
        return old
    if type(old) is list:
        old[:] = [_take_over(old[i], x) if i < len(old) else x for i, x in enumerate(new)]
    elif type(old) is dict:
        items = [(key, _take_over(old[key], value) if key in old else value) for key, value in new.items()]
        old.clear()
        old.update(items)
    elif type(old) in (set, bytearray):
        old.clear()
        old.update(new) if type(old) is set else old.extend(new)
    else:
        return new
    return old


async def _finished(value: object) -> object:
    return value


def _with_attributes(plain: object, handle: Handle) -> object:
    """A value of a subclass (a namedtuple, an IntEnum): the built-in value, and its own attributes asked for."""
    kind = type(plain)
    if kind in (bool, type(None)) or kind not in (int, float, str, bytes, tuple, frozenset, *_CONTAINERS):
        return plain
    value = _SUBCLASSES[kind](plain)
    value._handle = handle
    return value


def _ask_handle(self: object, name: str) -> object:
    if name.startswith("__") or name == "_handle":
        raise AttributeError(name)
    return getattr(self._handle, name)


_SUBCLASSES = {
    kind: type(kind.__name__, (kind,), {"__getattr__": _ask_handle})
    for kind in (int, float, str, bytes, tuple, frozenset, *_CONTAINERS)
}  # fmt: skip


def _handle_of(value: object) -> int:
    if type(value) is RemoteName:
        value = value.resolve()
    value = getattr(value, "_handle", value) if type(value) in _SUBCLASSES.values() else value
    if type(value) is Handle:
        value._forget()
        return object.__getattribute__(value, "_number")
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
        return self._link.ask("call", self._name, arguments, keywords, self._name in self._link.objects)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.resolve(), name)

    def __instancecheck__(self, value: object) -> bool:
        value = getattr(value, "_handle", value) if type(value) in _SUBCLASSES.values() else value
        return type(value) is Handle and _exactly(bool, value._ask("isinstance", self))


class Handle:
    """An object that stays in the candidate. It can be called, read, set, indexed and iterated.

    `_object`: the test treats it as an object of a class of the candidate's, so its own operators are asked. Otherwise
    it stands where the test expects a value: no operator works, and what it was asked once it answers alike again.
    """

    __slots__ = ("_link", "_number", "_object", "_parent", "_said", "_items")

    def __init__(self, link: _Link, number: int, is_object: bool = False, parent: Handle | None = None) -> None:
        for name, value in zip(self.__slots__, (link, number, is_object, parent, {}, None), strict=True):
            object.__setattr__(self, name, value)

    @property
    def __class__(self) -> type:  # what isinstance asks for
        if self._object:
            try:
                return type(self._plain())
            except CandidateError:
                return Handle
        return Handle

    def _ask(self, operation: str, *arguments: object, is_object: bool = False) -> object:
        return self._link.ask(operation, self._number, arguments, {}, is_object)

    def _asked_once(self, operation: str, *arguments: object) -> object:
        if self._object:
            return self._ask(operation, *arguments)
        key = (operation, repr(arguments))
        if key not in self._said:
            self._said[key] = self._ask(operation, *arguments)
        return self._said[key]

    def _forget(self) -> None:
        """What was asked may be different now: the object, or one that it belongs to, was handed to the candidate."""
        handle = self
        while handle is not None:
            handle._said.clear()
            object.__setattr__(handle, "_items", None)
            handle = handle._parent

    def __call__(self, *arguments: object, **keywords: object) -> object:
        self._forget()
        return self._link.ask("call", self._number, arguments, keywords)

    def __getattr__(self, name: str) -> object:
        if name in _YES_NO and not self._object:  # a question to a value, answered by whoever is asked
            raise AttributeError(name)
        found = self._ask("get", name)
        if type(found) is Handle:
            object.__setattr__(found, "_parent", self)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        self._forget()
        self._ask("set", name, value)

    def __getitem__(self, key: object) -> object:
        return self._asked_once("item", key)

    def __setitem__(self, key: object, value: object) -> None:
        self._forget()
        self._ask("set_item", key, value)

    def __delitem__(self, key: object) -> None:
        self._forget()
        self._ask("del_item", key)

    def __contains__(self, value: object) -> bool:
        if self._object:
            return _exactly(bool, self._ask("contains", value))
        return any(item is value or item == value for item in self)

    def __len__(self) -> int:
        return _exactly(int, self._asked_once("len"))

    def __iter__(self) -> Iterator:
        if self._items is None or self._object:
            object.__setattr__(self, "_items", ([], self._steps(self._ask("iter"))))
        seen, steps = self._items
        for at in itertools.count():
            if at == len(seen):
                try:
                    seen.append(next(steps))
                except StopIteration:
                    return
            yield seen[at]

    def __next__(self) -> object:
        return next(self._steps(self))

    @staticmethod
    def _steps(iterator: object) -> Iterator:
        if type(iterator) is not Handle:
            raise CandidateError("iter() of an object gave a plain value")
        while True:
            step = iterator._ask("next")
            if type(step) is not tuple or len(step) > 1:
                raise CandidateError("next() of an object gave a malformed step")
            if not step:
                return
            yield step[0]

    def __bool__(self) -> bool:  # asked once: it cannot be true here and false there
        return _exactly(bool, self._asked_once("truth"))

    def __enter__(self) -> object:
        found = self._ask("enter")
        return self if type(found) is Handle and found._number == self._number else found

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        said = self._ask("leave") if kind is None else self._ask("leave", kind.__name__, str(error))
        if said is True and not issubclass(kind, AssertionError) and _raised_by_test(trace):
            self._link.broken("the candidate's __exit__ would decide that what the test raises is as it should be")
        return False

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        if type(other) is Handle and other._number == self._number:
            return True
        if not (self._object or (type(other) is Handle and other._object)):
            raise TypeError("an object of the candidate cannot be compared: only plain values can")
        try:
            return self._plain() == (other._plain() if type(other) is Handle else other)
        except CandidateError:
            pass
        if any(type(x) is Handle and x._ask("equals_anything") is True for x in (self, other)):
            raise TypeError("an object of the candidate that is equal to everything")
        self._link.broken("it compares an object of the candidate's class, whose own __eq__ would decide: compare its "
                          "attributes, or what its methods return")  # fmt: skip

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if self._object:
            self._link.broken("it puts an object of the candidate's class into a set or a dict, whose own __hash__ and "
                              "__eq__ would decide")  # fmt: skip
        raise TypeError("an object of the candidate cannot be hashed")

    def _plain(self) -> object:
        """The value of an object whose class is derived from a built-in one. CandidateError where it has none."""
        try:
            found = self._ask("plain")
        except Exception as error:
            raise CandidateError("no plain value") from error
        return found

    def __str__(self) -> str:
        return _exactly(str, self._asked_once("str"))

    def __repr__(self) -> str:
        return _exactly(str, self._asked_once("repr"))

    def __format__(self, form: str) -> str:
        return _exactly(str, self._asked_once("format", form))


def _operator(operation: str, takes_two: bool = True) -> Callable:
    def apply(self: Handle, *others: object) -> object:
        if not self._object and not (takes_two and type(others[0]) is Handle and others[0]._object):
            if takes_two:
                return NotImplemented
            raise TypeError(f"an object of the candidate where a value is expected has no {operation}()")
        found = self._ask(operation, *others, is_object=True)
        return _exactly(bool, found) if operation in ("lt", "le", "gt", "ge") else found

    return apply


for _name in ARITHMETIC:
    setattr(Handle, f"__{_name.rstrip('_')}__", _operator(_name, _name not in UNARY))
for _name in REFLECTED:
    setattr(Handle, f"__r{_name.rstrip('_')}__", _operator(f"r{_name}"))
for _name in ("int", "float", "complex", "round"):
    setattr(Handle, f"__{_name}__", _operator(_name, takes_two=False))


def _raised_by_test(trace: object) -> bool:
    """Whether an exception comes from a `raise` of the test itself."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_filename.startswith("<test") and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _exactly(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise CandidateError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def run(task: dict) -> int:
    """Runs `task["tests"]` in order; one verdict frame each to the parent."""
    link = _Link(task)
    namespace: dict = {"__name__": "tests"}
    random.seed(0)  # a test that draws its inputs draws the same ones for every completion
    try:
        if task.get("setup"):
            exec(compile(task["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        for name in task["candidate"]:
            namespace[name] = RemoteName(link, name)
        for name in task["caught"]:
            namespace[name] = link.caught[name] = type(name, (Exception,), {})
        for name, module in ({name: name for name in task["modules"]} | task["library"]).items():
            imported = importlib.import_module(module)
            namespace.setdefault(name, imported if name in task["modules"] else getattr(imported, name))
        programs = [compile(test, _file(number), "exec", dont_inherit=True)
                    for number, test in enumerate(task["tests"], task["first"])]  # fmt: skip
    except (SyntaxError, ImportError, NameError, ValueError) as error:
        values.write_frame(PARENT, {"test": task["first"], "broken": f"{type(error).__name__}: {error}"})
        return 0
    prepared = False
    reserve = mmap.mmap(-1, 8 << 20)  # given up when memory runs out, so that a verdict can still be written
    for number, program in enumerate(programs, task["first"]):
        link.test = number
        try:
            if not prepared:
                file = _file(task["prepare_number"])
                exec(compile(task["prepare"], file, "exec", dont_inherit=True), namespace)
                prepared = True
            exec(program, namespace)
            verdict = {"passed": True}
        except BaseException as error:  # noqa: BLE001 - any way for a test not to end normally is a failure
            reserve.close()
            verdict = {"passed": False, "why": _why(error.with_traceback(None))}
            if isinstance(error, ImportError) and not hasattr(type(error), "of_the_candidate"):
                verdict = {"broken": verdict["why"]}  # a module that the test needs is not there
        if link.calls == 0:  # nothing that the candidate did can be the reason
            why = verdict.get("why") or verdict.get("broken") or "it passed"
            verdict = {"broken": f"the test ended without calling the candidate: {why}"}
        values.write_frame(PARENT, {"test": number, **verdict})
    return 0


def _file(number: int) -> str:
    return f"<test {number}>"


def _why(error: BaseException) -> str:
    described = describe(error)
    return f"{described['type']}: {described['message']}"[:400]
