"""What the names in a test are, and which are the candidate's: read from its syntax, in the parent, once for all
completions. So what a test means never depends on what a candidate does."""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

# Tests lean on imports of their reference solution: these modules' names are the standard library's, not a candidate's.
_LIBRARIES = "math cmath collections itertools functools decimal fractions datetime copy typing".split()
_OUTSIDE = {"pytest": ("approx", "raises")}
_RAISES = {"raises", "assertRaises", "assertRaisesRegex"}
_PLAIN = {
    name for kind in (str, bytes, int, float, complex, list, tuple, dict, set, range, type(None)) for name in dir(kind)
}  # fmt: skip


_MANY = 2000  # expressions in one test, from where on it is not looked through for calls that work in place


@lru_cache(maxsize=1)
def _library() -> dict[str, str]:
    names = {name: module for module, exports in _OUTSIDE.items() for name in exports}
    for module in _LIBRARIES:
        names |= {name: module for name in dir(importlib.import_module(module)) if not name.startswith("_")}
    return names


@dataclass(frozen=True)
class Names:
    """`candidate`: what only the candidate can define; `objects`: those of them that make objects of its classes, not
    values, as the tests use them; `caught`: those that tests catch as exceptions; `modules` and `library` (name:
    module): what the standard library defines; `in_place`: (test, line, column) of calls whose arguments are looked at
    afterwards, as a function that works in place leaves them."""

    candidate: list[str]
    objects: list[str]
    caught: list[str]
    modules: list[str]
    library: dict[str, str]
    in_place: list[tuple[int, int, int]]


@lru_cache(maxsize=1024)
def names_of(tests: tuple[str, ...], entries: tuple[str, ...] = (), setup: str = "") -> Names:
    """What the names in `tests` are. `entries` are the candidate's; without them these are the names that nothing else
    defines. `setup` is code of the task, whose names are its own.

    Raises `ValueError` for a test that is not Python, and for one that cannot be judged: it uses a name that nobody
    defines, or one that may be the candidate's or its own, or compares the candidate's classes themselves.
    """
    trees = [_parse(test, f"test {number}") for number, test in enumerate(tests)]
    scan = _Scan([node for tree in trees for node in ast.walk(tree)])
    given = _Scan(list(ast.walk(_parse(setup, "setup")))) if setup.strip() else _Scan([])
    unbound = [name for name in scan.loaded if name not in scan.bound | given.bound]
    modules = [n for n in unbound if n in scan.attributed and (n in sys.stdlib_module_names or n in _OUTSIDE)]
    free = [name for name in unbound if name not in modules and not hasattr(builtins, name) and name not in entries]
    if entries:
        candidate = list(entries)
    else:
        outermost = [name for name in scan.outermost(free) if name not in scan.bound | given.bound]
        candidate = [name for name in free if name not in _library() or name in outermost] or free or outermost
    library = {name: _library()[name] for name in free if name not in candidate and name in _library()}
    unknown = [name for name in free if name not in candidate and name not in library]
    if unknown and not given.imports_all:
        raise ValueError(
            f"the tests use {unknown}, which neither they, their setup nor Python define, and end there, maybe without "
            f"calling the candidate; if it defines them, name them in entry_point, beside {candidate}"
        )
    if patched := (scan.attributed | set(scan.loaded)) & {"patch", "mock", "monkeypatch"}:
        raise ValueError(f"the tests use {sorted(patched)}, which cannot reach into the candidate's process")
    use = _Use(scan, set(candidate))
    if not entries:
        use.check_clear()
    in_place = [(number, *position) for number, tree in enumerate(trees) for position in _in_place(tree)]
    return Names(candidate, sorted(use.objects), sorted(use.caught), modules, library, in_place)


def _parse(text: str, what: str) -> ast.AST:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not Python: {type(error).__name__}: {error}") from error


def _bindings(node: ast.AST) -> Iterator[tuple[list[ast.AST], ast.AST | None]]:
    """(targets, what they are made of) of an assignment, loop, comprehension or `with`."""
    if isinstance(node, ast.Assign):
        yield node.targets, node.value
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        yield [node.target], node.value
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        yield [node.target], node.iter
    elif isinstance(node, ast.With | ast.AsyncWith):
        yield from (([item.optional_vars] if item.optional_vars else [], item.context_expr) for item in node.items)


def _called(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _names(node: ast.AST | None) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node is not None else set()


class _Scan:
    """The names of some code: looked up (in order), bound, and with an attribute taken."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self.nodes = nodes
        self.loaded: dict[str, None] = {}
        self.bound: set[str] = set()
        self.attributed: set[str] = set()
        self.imports_all = False
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.loaded[node.id] = None
            elif isinstance(node, ast.Name):
                self.bound.add(node.id)
            elif isinstance(node, ast.arg):
                self.bound.add(node.arg)
            elif isinstance(node, ast.alias):
                self.imports_all |= node.name == "*"
                self.bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self.attributed.add(node.value.id)
            if isinstance(name := getattr(node, "name", None), str) and not isinstance(node, ast.alias):
                self.bound.add(name)  # a function, a class, an exception, a pattern

    def outermost(self, free: list[str]) -> list[str]:
        """What assertions call on their left side, unless its arguments call another of the `free` names."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Assert):
                left = node.test.left if isinstance(node.test, ast.Compare) else node.test
                name = _called(left)
                if name and not any(_called(inner) in free for inner in ast.walk(left) if inner is not left):
                    found.append(name)
        return list(dict.fromkeys(found))


class _Use:
    """How tests use what the candidate defines: as functions that return values, or as classes."""

    def __init__(self, scan: _Scan, candidate: set[str]) -> None:
        self.scan, self.candidate = scan, candidate
        self.made_by: dict[str, str] = {}  # variable: the candidate's name whose call it holds
        self.caught: set[str] = set()
        self.alias: dict[str, str] = {}  # parameter: what `check(candidate)` is called with
        passed = {_called(n): n.args for n in scan.nodes if _called(n) and n.args}
        for node in scan.nodes:
            if isinstance(node, ast.FunctionDef) and node.name in passed:
                pairs = zip(node.args.args, passed[node.name], strict=False)
                self.alias |= {a.arg: v.id for a, v in pairs if isinstance(v, ast.Name) and v.id in candidate}
        for node in scan.nodes:
            for targets, value in _bindings(node):
                maker = self.alias.get(_called(value), _called(value))
                if maker in candidate and not isinstance(node, ast.For | ast.comprehension):
                    self.made_by |= {t.id: maker for t in targets if isinstance(t, ast.Name)}
        classes, functions = set(), set()
        for node in scan.nodes:
            classes |= self._classes(node)
            functions |= self._functions(node)
        camel = {n for n in candidate if n[:1].isupper() and "_" not in n and (len(n) == 1 or not n.isupper())}
        self.objects = classes | (camel - functions)

    def source(self, node: ast.AST) -> str | None:
        """The candidate's name whose call `node` is or holds."""
        name = _called(node) if isinstance(node, ast.Call) else self.made_by.get(getattr(node, "id", ""))
        name = self.alias.get(name, name)
        return name if name in self.candidate else None

    def _classes(self, node: ast.AST) -> set[str]:
        """Names that only a class can be, or whose results only objects: a plain value has no such attribute."""
        found = set()
        if isinstance(node, ast.Attribute) and node.attr not in _PLAIN:
            found |= {self.source(node.value), getattr(node.value, "id", None)} & self.candidate
            if node.attr.startswith("__") and found:
                raise ValueError(f"a test looks at {node.attr} of the candidate's {sorted(found)}, which stays with it")
        elif isinstance(node, ast.With | ast.AsyncWith):
            found |= {self.source(item.context_expr) for item in node.items}
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            self.caught |= _names(node.type) & self.candidate
        elif isinstance(node, ast.Raise) and _called(node.exc):
            self.caught |= {_called(node.exc)} & self.candidate
        elif isinstance(node, ast.Call):
            name = _called(node) or getattr(node.func, "attr", None)
            if name in _RAISES and node.args:
                self.caught |= _names(node.args[0]) & self.candidate
            elif name in ("isinstance", "issubclass") and len(node.args) == 2:
                found |= _names(node.args[1])
        elif isinstance(node, ast.Compare) and not any(isinstance(c, ast.Constant) for c in node.comparators):
            if bare := {getattr(side, "id", None) for side in (node.left, *node.comparators)} & self.candidate:
                raise ValueError(f"a test compares {sorted(bare)} of the candidate itself; use isinstance")
        return found & self.candidate

    def _functions(self, node: ast.AST) -> set[str]:
        """Names whose results are asserted, or compared with something that is not the candidate's."""
        if isinstance(node, ast.Assert) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            return {self.source(node.test if isinstance(node, ast.Assert) else node.operand)} - {None}
        if not isinstance(node, ast.Compare):
            return set()
        sides = [node.left, *node.comparators]
        own = [bool({self.source(inner) for inner in ast.walk(side)} - {None}) for side in sides]
        return {self.source(side) for side in sides} - {None} if not all(own) else set()

    def check_clear(self) -> None:
        """Raises `ValueError` where one of the names gets what another one returned: then it may be a helper that the
        tests forgot to define, and a candidate could define it to say yes."""
        for node in self.scan.nodes:
            outer = _called(node)
            if outer not in self.candidate or outer in self.objects:
                continue
            for inner in (self.source(part) for argument in node.args for part in ast.walk(argument)):
                if inner not in (None, outer) and inner not in self.objects:
                    raise ValueError(
                        f"the tests give {outer!r} what {inner!r} returned and define neither: which one does the "
                        "candidate write? Name it, or both, in entry_point"
                    )


def _in_place(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Calls after which the test may look at their arguments as the call left them: those whose result is dropped, and
    others unless an expression has both something made of an argument and something made of the result. (`f(x) ==
    sorted(x)` and `x[f(x)] == 3` are about x as it was: a candidate that changes x must not be right. `x[:f(x)] ==
    [1, 2]` is about what it left.)"""
    nodes = list(ast.walk(tree))
    dropped = {node.value for node in nodes if isinstance(node, ast.Expr)}
    seen = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    heads = {side for node in nodes if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)}
    joins = [(node, [_Part(part) for part in parts]) for node in nodes if (parts := _parts(node, heads))]
    flows = [(set().union(*map(_names, t)), _Part(v)) for node in nodes for t, v in _bindings(node) if v is not None]
    for call in nodes:
        if isinstance(call, ast.Call) and not hasattr(builtins, _called(call) or ""):
            inside = Counter(n.id for n in ast.walk(call) if isinstance(n, ast.Name))
            read = {n for part in (*call.args, *(k.value for k in call.keywords)) for n in _names(part)}
            arguments = {name for name in read if seen[name] > inside[name] and not hasattr(builtins, name)}
            if arguments and (call in dropped or len(joins) < _MANY and not _meet(joins, flows, call, arguments)):
                yield call.lineno, call.col_offset


def _parts(node: ast.AST, heads: set[ast.AST]) -> list[ast.AST]:
    """What an expression brings together; nothing for `x[:n]` where that is compared as a whole."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Subscript):
        start = isinstance(node.slice, ast.Slice) and node.slice.lower is node.slice.step is None
        return [] if start and node in heads else [node.value, node.slice]
    return []


class _Part:
    """A part of a test: the names and calls in it."""

    def __init__(self, node: ast.AST) -> None:
        self.node, self.names = node, _names(node)
        self.calls = {inner for inner in ast.walk(node) if isinstance(inner, ast.Call)}

    def reads(self, call: ast.Call) -> set[str]:
        """The names in it, without those inside `call`."""
        if call not in self.calls:
            return self.names
        inside = set(ast.walk(call))
        return {n.id for n in ast.walk(self.node) if isinstance(n, ast.Name) and n not in inside}


def _meet(joins: list[tuple], flows: list[tuple], call: ast.Call, arguments: set[str]) -> bool:
    inside = set(ast.walk(call))
    results = _derived(flows, [names for names, value in flows if call in value.calls])
    made = _derived(flows, [names for names, value in flows if value.reads(call) & arguments]) | arguments
    for node, parts in joins:
        of_result = [call in part.calls or bool(part.reads(call) & results) for part in parts]
        if any(of_result) and node not in inside:
            of_argument = [bool(part.reads(call) & made) for part in parts]
            if any(r and any(of_argument[:i] + of_argument[i + 1 :]) for i, r in enumerate(of_result)):
                return True
    return False


def _derived(flows: list[tuple], start: list[set[str]]) -> set[str]:
    """`start` and the names that are made of it, over any number of assignments."""
    found, more = set(), set().union(*start)
    while more:
        found |= more
        more = set().union(*[names for names, value in flows if value.names & more]) - found
    return found
