"""Which names of a test are the candidate's: read from its syntax, in the parent, once for all completions."""

from __future__ import annotations

import ast
import builtins
import sys
from functools import lru_cache


@lru_cache(maxsize=1024)
def lookups(tests: tuple[str, ...]) -> dict[str, list[str]]:
    """What `tests` look up: `free` names (neither bound there, nor built in, nor a module used as one), the standard
    `modules` they use by name, and in `outermost` what their assertions call on the left side.

    Raises `ValueError` for a test that is not Python.
    """
    loaded: dict[str, None] = {}
    bound, attributed, outermost = set(), set(), []
    for number, test in enumerate(tests):
        try:
            nodes = list(ast.walk(ast.parse(test)))
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"test {number} is not Python: {type(error).__name__}: {error}") from error
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                loaded[node.id] = None
            elif isinstance(node, ast.Name):
                bound.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributed.add(node.value.id)
            elif isinstance(node, ast.Assert):
                left = node.test.left if isinstance(node.test, ast.Compare) else node.test
                if isinstance(left, ast.Call) and isinstance(left.func, ast.Name):
                    outermost.append(left.func.id)
    unbound = [name for name in loaded if name not in bound]
    modules = [name for name in unbound if name in attributed and name in sys.stdlib_module_names]
    return {
        "free": [name for name in unbound if name not in modules and not hasattr(builtins, name)],
        "modules": modules,
        "outermost": list(dict.fromkeys(name for name in outermost if name not in bound)),
    }
