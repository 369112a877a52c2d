"""From `package.module:function` or `./file.py:function` to something that can be called on a row."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from rewards.score import Score, Verdict

Row = Mapping[str, Any]
TIMEOUT_S = 5.0
ASYNC_TIMEOUT_S = 300.0  # an async function waits for a server, which may be busy


class RewardError(Exception):
    """A reward that cannot be loaded or called; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class RewardSpec:
    """One entry of a config's `rewards` list.

    `fn` is the address; `timeout_s` the seconds one completion may take (one group, for the plural form), by default
    the function's own (`Reward.timeout_s`); `params` are passed by name and win over columns of the same name.
    """

    fn: str
    weight: float = 1.0
    timeout_s: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: RewardSpec | str | Mapping[str, Any] | Any) -> RewardSpec:
        """A spec from an address, a mapping (`fn`, `weight`, `timeout_s`, `params`) or any object with such attributes.

        Raises RewardError for unknown keys of a mapping or a timeout that is not positive.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            return cls(spec)
        known = {"fn": "fn", "weight": "weight", "timeout": "timeout_s", "timeout_s": "timeout_s", "params": "params"}
        if isinstance(spec, Mapping):
            unknown = sorted(set(spec) - set(known))
            if unknown or "fn" not in spec:
                raise RewardError(
                    f"a reward needs 'fn' and may have weight, timeout_s and params; found {sorted(spec)}"
                    + (f": remove or rename {unknown}" if unknown else ": add 'fn: package.module:function'")
                )
            made = cls(**{known[name]: value for name, value in spec.items()})
        else:
            made = cls(**{to: getattr(spec, name) for name, to in known.items() if hasattr(spec, name)})
        if made.timeout_s is not None and not made.timeout_s > 0:
            raise RewardError(f"{made.fn}: timeout_s is {made.timeout_s}; give a positive number of seconds")
        return made


class Reward:
    """A loaded reward function. `one` scores one completion, `group` a whole group; both inject columns by name.

    `timeout_s` is what a run allows it by default: the function's attribute of that name, else 5 s (async: 300 s).
    Exceptions of the function are not caught here: who runs it (rewards.workers.runner) turns them into errors.
    """

    def __init__(self, address: str, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
        self.address = address
        self.function = function
        self.params = dict(params)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self.timeout_s = float(getattr(function, "timeout_s", ASYNC_TIMEOUT_S if self.is_async else TIMEOUT_S))
        signature = inspect.signature(function)
        names = signature.parameters
        self.is_group = "completions" in names
        if ("completion" in names) == self.is_group:
            raise RewardError(
                f"{address}: its parameters are {list(names)}; a reward takes 'completion' (one text) or 'completions' "
                "(the list of a whole group), and columns of the row by name"
            )
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
        self.wanted = [n for n, p in names.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        positional = [n for n, p in names.items() if p.kind is p.POSITIONAL_ONLY]
        if positional:
            raise RewardError(
                f"{address}: {positional} are positional-only, but arguments come by name: remove the '/'"
            )
        self.required = [
            n
            for n in self.wanted
            if names[n].default is inspect.Parameter.empty and n not in ("completion", "completions")
        ]
        unknown = [n for n in self.params if n not in self.wanted and not self.takes_all]
        if unknown:
            near = {n: difflib.get_close_matches(n, self.wanted, 1) for n in unknown}
            hints = ", ".join(f"{n!r}" + (f" (did you mean {m[0]!r}?)" if m else "") for n, m in near.items())
            raise RewardError(f"{address} has no parameter {hints}; it takes {self.wanted}")

    def __repr__(self) -> str:
        return f"Reward({self.address!r})"

    def arguments(self, row: Row) -> dict[str, Any]:
        """The columns and parameters that the function takes, by name; RewardError when a column is missing."""
        missing = [n for n in self.required if n not in row and n not in self.params]
        if missing:
            raise RewardError(
                f"{self.address} needs the column{'s' * (len(missing) > 1)} {missing}; the row has {sorted(row)}."
                f" Rename "
                "a column of the data set, or give the value under 'params' of this reward"
            )
        skip = ("completion", "completions")
        columns = {n: v for n, v in row.items() if (self.takes_all or n in self.wanted) and n not in skip}
        return {**columns, **self.params}

    def check_row(self, row: Row) -> str | None:
        """Why no completion can ever be paid on this row; None when one can, or the function has no such check.

        A function offers the check as its attribute `check_row(row) -> str | None`, which gets the row's columns (and
        the reward's params, which win). Cheap enough to be called on every row of a data set.
        """
        check = getattr(self.function, "check_row", None)
        return None if check is None else check({**row, **self.params})

    def one(self, completion: str, row: Row) -> Score | None:
        """The score of one completion; raises what the function raises, RewardError for a missing column."""
        if self.is_group:
            return self.group([completion], row)[0]
        return to_score(self._run(self.function(completion=completion, **self.arguments(row))), self.address)

    async def one_async(self, completion: str, row: Row) -> Score | None:
        """As `one`, for an async function of one completion: many can be awaited together."""
        return to_score(await self.function(completion=completion, **self.arguments(row)), self.address)

    def group(self, completions: Sequence[str], rows: Row | Sequence[Row]) -> list[Score | None]:
        """The scores of a group. `rows` is the one row that the group shares, or a row per completion."""
        each = [rows] * len(completions) if isinstance(rows, Mapping) else list(rows)
        if len(each) != len(completions):
            raise RewardError(f"{self.address}: {len(completions)} completions but {len(each)} rows")
        if not self.is_group:
            return [self.one(completion, row) for completion, row in zip(completions, each, strict=True)]
        if not completions:
            return []
        arguments = self.arguments(each[0])
        if any(row is not each[0] and self.arguments(row) != arguments for row in each[1:]):
            raise RewardError(
                f"{self.address} takes a whole group (its parameter is 'completions'), but the rows of this group "
                "differ; a group is the samples of one prompt"
            )
        values = self._run(self.function(completions=list(completions), **arguments))
        if hasattr(values, "tolist"):  # a NumPy array, a torch tensor
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(completions):
            raise RewardError(
                f"{self.address} returned {_short(values)} for a group of {len(completions)}; return a list with one "
                "float, Score or None per completion"
            )
        return [to_score(value, self.address) for value in values]

    def _run(self, value: Any) -> Any:
        return asyncio.run(value) if inspect.isawaitable(value) else value


def to_score(value: Any, address: str) -> Score | None:
    """A function's return value as a Score of plain numbers and texts: a number above 0 is `correct`, any other
    `wrong`; None stays None. Scalars of NumPy and torch are numbers.

    Raises RewardError, with `address` and what was found, for anything else, an unknown verdict included.
    """
    if value is None:
        return None
    if not isinstance(value, Score):
        number = _number(value)
        if number is None:
            hint = "; rewards.adapters:verl calls functions that return a dict" if isinstance(value, Mapping) else ""
            raise RewardError(f"{address} returned {_short(value)}; return a float, a Score or None{hint}")
        if not math.isfinite(number):
            raise RewardError(f"{address} returned {number}; a reward must be finite: None where it does not apply")
        return Score(number, "correct" if number > 0 else "wrong")
    number = _number(value.value)
    if value.verdict not in get_args(Verdict):
        raise RewardError(f"{address} returned the verdict {value.verdict!r}; expected one of {get_args(Verdict)}")
    if value.verdict != "error" and (number is None or not math.isfinite(number)):
        raise RewardError(f"{address} returned a Score of value {_short(value.value)}; it must be a finite number")
    metrics = {str(name): _number(metric) for name, metric in (value.metrics or {}).items()}
    for name, metric in metrics.items():
        if metric is None or not math.isfinite(metric):
            found = f"{_short(value.metrics[name])} as the metric {name!r}"
            raise RewardError(f"{address} returned {found}; give a finite number or leave it out")
    detail = "" if value.detail is None else str(value.detail)
    return Score(math.nan if number is None else number, value.verdict, metrics, detail)


def _number(value: Any) -> float | None:
    """`value` as a float where it is one number, NumPy's and torch's included; else None."""
    if hasattr(value, "item") and not isinstance(value, (int, float)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # an array of several
            return None
    return float(value) if isinstance(value, (int, float, Decimal, Fraction)) else None


def load_reward(address: str, params: Mapping[str, Any] | None = None) -> Reward:
    """The reward at `package.module:function` or `./file.py:function`, with `params` bound by name.

    A path is relative to the current folder. A function with a true attribute `makes_reward` is called with the params
    and returns the reward (rewards.adapters). Raises RewardError when the address, the module, the function or a
    parameter is not there; errors inside the module itself (say, its own import) come through unchanged.
    """
    function = load_function(address)
    if getattr(function, "makes_reward", False):
        return Reward(address, _called(function, address, params or {}), {})
    return Reward(address, function, params or {})


def load_function(address: str) -> Callable[..., Any]:
    """The function at an address; raises as `load_reward` does."""
    place, colon, name = address.rpartition(":")
    if not colon or not place or not name:
        raise RewardError(f"{address!r} is not a reward's address; write package.module:function or ./file.py:function")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if inspect.isroutine(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, functions, 1)
        raise RewardError(
            f"{place} has no function {name!r}; it has {functions}" + (f". Did you mean {near[0]!r}?" if near else "")
        )
    return function


def _called(factory: Callable[..., Callable], address: str, params: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        raise RewardError(f"{address}: {error} among its params; they are {sorted(params)}") from error
    return factory(**params)


def _load_module(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise RewardError(
            f"no module {error.name!r} (reward {place}); is it installed? A file is addressed as ./file.py:function"
        ) from error


def _load_file(path: Path) -> ModuleType:
    full = path.expanduser().resolve()
    if not full.is_file():
        raise RewardError(f"no file {path} (looked in {full.parent}); paths are relative to {Path.cwd()}")
    name = f"reward_{full.stem}_{hashlib.sha1(str(full).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(full.parent) not in sys.path:
        sys.path.append(str(full.parent))  # last, so that a neighbour can be imported but shadows nothing
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 80 else text[:77] + '...'}"
