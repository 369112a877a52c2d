"""The one JSON form of what the product writes: rows, scores and metrics, of whatever types their authors used."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, is_dataclass
from datetime import date, time
from enum import Enum
from typing import Any

MISSING = ("NAType", "NaTType")  # pandas' own marks of a value that is not there


def dumps(value: Any) -> str:
    """`value` as JSON in one line that can be written as UTF-8: floats with the digits that give the same float back,
    a lone surrogate as its escape, all else as `plain` has it."""
    try:
        text = json.dumps(value, default=plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that are no text; NaN
        text = json.dumps(plain(value), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    return text


def as_text(value: Any) -> Any:
    """The JSON form of what is neither text, number, list nor object: dates as ISO 8601, bytes as their UTF-8 text or
    else as base64, anything else as its `str`."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def plain(value: Any, other: Callable[[Any], Any] = as_text) -> Any:
    """`value` in JSON's own types. NumPy, pandas and torch values become numbers and lists; NaN, infinities and what is
    missing become None; `other` gives the form of everything that has none of its own."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(item, other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, other) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item, other) for item in value), key=repr)
    if type(value).__name__ in MISSING:
        return None
    if getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m"):  # NumPy's dates: lists lose their unit
        return plain(value.astype(str).tolist(), other)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), other)
    if isinstance(value, Enum):
        return plain(value.value, other)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), other)
    return other(value)
