"""Reads YAML with `a.b=c` overrides into a pydantic record; every mistake is listed in one error."""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

PLACES = (
    "output_dir", "policy.path", "policy.tokenizer", "data.train", "data.evaluation", "data.chat_template",
    "rewards.fn",
)  # fmt: skip; fields that name files and folders
Conflict = tuple[tuple[str, ...], str]  # the fields involved, what is wrong and what to do


class UsageError(Exception):
    """Something the user wrote is wrong. Commands print it without a traceback and exit with 2."""


class ConfigError(UsageError):
    """All mistakes of one config; `problems` holds one line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))


Model = typing.TypeVar("Model", bound=BaseModel)
Conflicts = Callable[[Any], Iterable[Conflict]]


def read_config(
    model: type[Model],
    path: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    conflicts: Conflicts | None = None,
    hidden: Mapping[str, str] = MappingProxyType({}),
) -> Model:
    """A `model` from the YAML at `path`, or from fields as nested dicts, with `a.b=c` overrides laid over it.
    `conflicts(instance)` yields contradictions between fields; `hidden` maps names that somebody may
    expect, but cannot set, to the reason. In the names of files and folders `~` and `$VAR` are expanded; relative ones
    start from the working directory, wherever the YAML lies. Raises `ConfigError` naming all mistakes at once."""
    problems: list[str] = []
    if isinstance(path, Mapping):
        tree, path = copy.deepcopy(dict(path)), "config"
    else:
        try:
            tree = _parse(Path(path).read_text(), str(path))
        except OSError as error:
            raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    for override in overrides:
        _override(tree, override, problems)
    _expand_places(tree, problems)
    instance = _validate(model, tree, problems, conflicts, hidden)
    if problems:
        raise ConfigError(str(path), problems)
    assert instance is not None
    return instance


def _expand_places(tree: dict, problems: list[str]) -> None:
    """Expands `~` and `$VAR` in the names of files and folders; an address in place of a folder is a mistake."""
    for name in PLACES:
        section, _, key = name.rpartition(".")
        found = tree.get(section) if section else tree
        for node in found if isinstance(found, list) else [found]:
            value = node.get(key) if isinstance(node, dict) else None
            if not isinstance(value, str):
                continue
            node[key] = expanded = os.path.expandvars(os.path.expanduser(value))
            if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
                problems.append(f"{name}: {value}: {unset[0]} is not set in the environment")
            elif "://" in expanded and not name.startswith("data."):
                problems.append(
                    f"{name}: {value} is an address; expected a folder of this machine (a model of the Hugging Face "
                    "hub is had by `hf download OWNER/NAME --local-dir FOLDER`)"
                )


def _validate(
    model: type[Model], tree: dict, problems: list[str], conflicts: Conflicts | None, hidden: Mapping[str, str]
) -> Model | None:
    """Validates `tree`; on mistakes it goes on with what is left, so that contradictions elsewhere show as well."""
    broken: set[str] = set()
    try:
        instance = model.model_validate(tree)
    except ValidationError as error:
        mistakes = [m for m in error.errors() if not _follows(m, error.errors())]
        pruned = copy.deepcopy(tree)
        for mistake in mistakes:
            problems.append(_describe(model, mistake, hidden))
            broken.add(_dotted(mistake["loc"]))
            _remove(pruned, mistake["loc"])
        try:
            instance = model.model_validate(pruned)
        except ValidationError:  # a required field is among the broken ones: nothing left to compare
            return None
    if conflicts is not None:
        for fields, message in conflicts(instance):
            if not any(field == b or field.startswith(b + ".") for field in fields for b in broken):
                problems.append(message)
    return instance


def _follows(item: dict, items: list[dict]) -> bool:
    """Whether one of pydantic's errors only follows from another: a list counts as too short when an entry is bad."""
    loc = item["loc"]
    return item["type"] == "too_short" and any(i["loc"][: len(loc)] == loc and i["loc"] != loc for i in items)


def _describe(model: type[BaseModel], item: dict, hidden: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors, with the nearest known name for an unknown key."""
    name = _dotted(item["loc"])
    if item["type"] == "extra_forbidden":
        if name in hidden:
            return f"{name}: {hidden[name]}"
        known = [other for other in known_names(model) if other not in hidden]
        return f"{name}: unknown key{_nearest(name, known)}"
    if item["type"] == "missing":
        return f"{name}: missing, and it has no default"
    found = "" if isinstance(item["input"], dict | list) else f", found {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{name}: must be one of {', '.join(choices)}{found}{_nearest(str(item['input']), choices)}"
    return f"{name}: {message}{found}"


def _nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the known name nearest to `name`: first in its own section, then anywhere."""
    parent, dot, leaf = name.rpartition(".")
    section = ".".join(part for part in parent.split(".") if not part.isdigit())  # rewards.0.fn stands under rewards
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    if match := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
        return f"; did you mean {parent}{dot}{match[0]}?"
    elsewhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    if match := difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.8):
        return f"; did you mean {elsewhere[match[0]]}?"
    return f"; known in {parent}: {', '.join(siblings)}" if parent and siblings else ""


def known_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of `model`; the entries of a list of records stand under the list's own name."""
    names: list[str] = []
    for key, field in model.model_fields.items():
        names.append(prefix + key)
        inner = record_type(field.annotation)
        if inner is not None:
            names += known_names(inner, f"{prefix}{key}.")
    return names


def record_type(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation (`M`, `M | None`, `tuple[M, ...]`), if there is one."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for arg in typing.get_args(annotation) if (m := record_type(arg)) is not None), None)


def _dotted(loc: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in loc)


def _remove(tree: Any, loc: Sequence[str | int]) -> None:
    """Takes the value at `loc` out of nested dicts and lists, if it is there."""
    for part in loc[:-1]:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(tree, dict):
        tree.pop(loc[-1], None)


def _override(tree: dict, override: str, problems: list[str]) -> None:
    """Sets one `a.b=c` in the nested dict; `c` is read as YAML, a number in the path is a list's index."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name or not all(name.split(".")):
        problems.append(f"override {override!r}: expected the form section.key=value")
        return
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problems.append(f"override {override!r}: the value is not valid YAML ({_first_line(error)})")
        return
    node: Any = tree
    *parents, leaf = name.split(".")
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                problems.append(
                    f"override {override!r}: {'.'.join(parents[:depth])} has {len(node)} entries, no {part}"
                )
                return
            node = node[int(part)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            problems.append(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
            return
    if isinstance(node, list):
        if not leaf.isdigit() or int(leaf) >= len(node):
            problems.append(f"override {override!r}: {'.'.join(parents)} has {len(node)} entries, no {leaf}")
            return
        node[int(leaf)] = value
    else:
        node[leaf] = value


class _Loader(yaml.SafeLoader):
    """YAML with two gaps closed: `1e-6` is a number, and a key given twice is an error instead of the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> dict:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(where, [f"not valid YAML: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"not valid YAML: {_first_line(error)}"]) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(source, [f"expected `key: value` lines, found a {type(tree).__name__}"])
    return tree


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
