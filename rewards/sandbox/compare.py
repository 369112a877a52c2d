"""Whether what a candidate returned or printed is what was expected: in the trusted process, on genuine built-ins."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

_FAMILIES = ((dict, OrderedDict, Counter, defaultdict), (set, frozenset), (bytes, bytearray))


def same_value(
    expected: object, actual: object, tolerance: float | None = None, lists: bool = False, exact: bool = True
) -> bool:
    """Exact type and value at every depth: `1`, `1.0` and `True` differ, so do a list and a tuple; NaN equals NaN.

    `tolerance` (absolute for numbers below 1, else relative) is for floats, and for an int where a float is expected or
    the other way round. `lists=True` reads a tuple as a list: JSON, in which many tests are written, has no tuples.
    `exact=False` takes what Python's `==` takes for a value of the same kind: an int, Fraction or Decimal for a float,
    a Counter for a dict, a frozenset for a set; with `lists` also what JSON writes alike: 2.0 for 2, a key 1 for "1".
    """
    if lists:
        expected = list(expected) if type(expected) is tuple else expected
        actual = list(actual) if type(actual) is tuple else actual
    if not exact:
        expected, actual = _same_kind(expected, actual, lists)
    kind = type(expected)
    numbers = {kind, type(actual)}
    if tolerance is not None and float in numbers and numbers <= {int, float}:
        return close(expected, actual, tolerance)
    if kind is not type(actual):
        return False
    if kind is float:
        return expected == actual or (math.isnan(expected) and math.isnan(actual))
    if kind is complex:
        return same_value((expected.real, expected.imag), (actual.real, actual.imag), tolerance)
    if kind in (list, tuple) or kind.__name__ == "deque":
        return len(expected) == len(actual) and all(
            same_value(e, a, tolerance, lists, exact) for e, a in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict):
        if len(expected) != len(actual) or not _same_members(expected, actual):
            return False
        return all(same_value(value, actual[key], tolerance, lists, exact) for key, value in expected.items())
    if kind in (set, frozenset):
        return len(expected) == len(actual) and _same_members(expected, actual)
    return expected == actual or (expected != expected and actual != actual)  # NaN of Decimal


def _same_kind(expected: object, actual: object, json: bool) -> tuple[object, object]:
    """Both with one type where Python, or JSON, takes them for the same kind of thing and value."""
    kind, found = type(expected), type(actual)
    numbers = (int, Fraction, Decimal, float) if json and kind is int else (int, Fraction, Decimal)
    if kind is float or (json and kind is int):
        if found in numbers and found is not kind and expected == actual:
            return expected, expected
    for family in _FAMILIES:
        if kind in family and found in family:
            expected, actual = family[0](expected), family[0](actual)
    if json and type(expected) is type(actual) is dict and all(type(key) is str for key in expected):
        actual = {str(key) if type(key) is int else key: value for key, value in actual.items()}
    return expected, actual


def _same_members(expected: Iterable, actual: Iterable) -> bool:
    """Equal members of equal types (`{1}` is not `{True}`)."""
    return {(type(x), x) for x in expected} == {(type(x), x) for x in actual}


def close(expected: float, actual: float, tolerance: float) -> bool:
    """|expected - actual| within `tolerance` of max(1, |expected|); infinities and NaN only equal themselves."""
    try:
        expected, actual = float(expected), float(actual)
    except OverflowError:
        return expected == actual
    if not (math.isfinite(expected) and math.isfinite(actual)):
        return expected == actual or (math.isnan(expected) and math.isnan(actual))
    return abs(expected - actual) <= tolerance * max(1.0, abs(expected))


def same_output(expected: str, actual: str, tolerance: float | None = None) -> bool:
    """The words of two texts, split at white space, agree one by one (the usual judge); `tolerance` is for words that
    are numbers with a point or exponent in either text."""
    left, right = expected.split(), actual.split()
    if len(left) != len(right):
        return False
    return all(
        a == b or (tolerance is not None and _close_words(a, b, tolerance)) for a, b in zip(left, right, strict=True)
    )


def _close_words(expected: str, actual: str, tolerance: float) -> bool:
    if len(expected) > 400 or len(actual) > 400:
        return False
    try:
        return close(float(expected), float(actual), tolerance) and math.isfinite(float(expected))
    except ValueError:
        return False
