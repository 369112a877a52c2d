"""The tagged JSON between sandbox and parent: exact, bounded, and nothing that reads it can be made to fail."""

import collections
import datetime
import decimal
import fractions
import json
import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.sandbox import values
from rewards.sandbox.compare import same_output, same_value

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2000, 6000).map(lambda n: (-7) ** n)
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes()
    | st.timedeltas()
)
_keys = _scalars.filter(lambda x: x == x)  # a NaN is no member of any set but its own
_hashable = st.recursive(_keys, lambda x: st.tuples(x, x) | st.frozensets(x, max_size=4), max_leaves=8)
_any = st.recursive(
    _hashable | _scalars,
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(_hashable, x) | st.sets(_hashable) | st.just({}),
    max_leaves=20,
)
_quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def travel(value):
    return values.decode(values.loads(values.frame(values.encode(value))[4:]))


@_quick
@given(_any)
def test_a_value_arrives_as_it_left(value):
    assert same_value(value, travel(value))


@pytest.mark.parametrize(
    "value",
    [
        collections.Counter("abca"),
        collections.OrderedDict(b=1, a=2),
        collections.deque([1, [2]]),
        range(3, 9, 2),
        bytearray(b"\x00\xff"),
        [1, 2.5, "x", None, True],
        (),
        [[]],
        {(1, 2): {3}},
        -0.0,
        10**9000,
        int,
        "\ud800",
        [2**63, -(2**63)],
        (2**70, 1.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_are_kept(value):
    assert type(travel(value)) is type(value) and same_value(value, travel(value))


@pytest.mark.parametrize("value", [object(), lambda: 1, (x for x in ()), type("S", (str,), {})("x"), [print]])
def test_what_is_not_plain_data_does_not_travel(value):
    with pytest.raises(values.Unsendable, match="cannot be compared"):
        values.encode(value)


def test_a_subclass_travels_by_value_only_where_python_equality_is_meant():
    point = collections.namedtuple("Point", "x y")(1, 2)
    assert travel_by_value(point) == (1, 2) and type(travel_by_value(point)) is tuple
    evil = type("Evil", (int,), {"__eq__": lambda self, other: True, "__hash__": int.__hash__})(7)
    assert type(travel_by_value(evil)) is int and travel_by_value(evil) != 8


def travel_by_value(value):
    return values.decode(values.encode(value, by_value=True))


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(
        sorted(
            {
                *values._READ_SEQUENCE,
                *values._READ_FLAT,
                *values._READ_MAPPING,
                "i",
                "f",
                "b",
                "ba",
                "c",
                "r",
                "td",
                "ty",
                "fr",
                "dc",
                "dt",
                "da",
                "ti",
                "o",
            }
        )
    ),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=2), x, max_size=2),
    max_leaves=12,
)


@settings(_quick, max_examples=400)
@given(_json)
def test_reading_anything_gives_a_plain_value_or_bad_value(data):
    try:
        value = values.decode(data)
    except values.BadValue:
        return
    assert same_value(value, value)


@_quick
@given(st.binary(max_size=64))
def test_bytes_that_are_no_json_are_bad_values(data):
    try:
        values.loads(data)
    except values.BadValue:
        pass


def test_nesting_is_bounded_in_both_directions():
    deep = []
    for _ in range(values.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(values.BadValue, match="nested"):
        values.encode(deep)
    with pytest.raises(values.BadValue):
        values.decode(json.loads('["l",' * 300 + "1" + "]" * 300))
    with pytest.raises(values.BadValue):
        values.loads(b"[" * 10**6)


@pytest.mark.parametrize("tag", ["s", "d"])
def test_keys_of_one_hash_cannot_make_the_reader_slow(tag):
    keys = [["i", hex(k * (2**61 - 1))] for k in range(1, 50_000)]  # every one hashes to 0: a set of them takes minutes
    started = time.monotonic()
    with pytest.raises(values.BadValue, match="hash"):
        values.decode(["s", *keys] if tag == "s" else ["d", *[[key, 1] for key in keys]])
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    "expected, actual",
    [
        (1, 1.0),
        (1, True),
        (0, False),
        ([1], (1,)),
        ({1}, frozenset({1})),
        ({1: 2}, {True: 2}),
        ({1}, {1.0}),
        ("1", 1),
        ({"a": 1}, collections.OrderedDict(a=1)),
        (0.1 + 0.2, 0.3),
        (None, 0),
        ([], ()),
        (b"a", "a"),
        ([1, 2], [1, 2, 3]),
        ({"a": 1}, {"a": 1, "b": 2}),
        (math.inf, -math.inf),
        (fractions.Fraction(1, 2), 0.5),
        (decimal.Decimal(1), 1),
        (datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1)),
        ((1,), [1]),
    ],
)
def test_different_types_or_values_differ(expected, actual):
    assert not same_value(expected, actual) and not same_value(actual, expected)


def test_tolerance_is_for_floats_only():
    assert same_value([0.3], [0.1 + 0.2], tolerance=1e-9) and same_value(2.0, 2, tolerance=1e-9)
    assert not same_value(2, 3, tolerance=10.0) and not same_value(1.0, True, tolerance=1.0)
    assert not same_value(1.0, math.nan, tolerance=1e9) and not same_value(1.0, math.inf, tolerance=1e9)
    assert same_value(1e12, 1e12 + 1, tolerance=1e-9) and not same_value(1e12, 1.001e12, tolerance=1e-9)


def test_tuples_are_lists_only_when_asked():
    assert same_value([[1, 2]], [(1, 2)], lists=True) and not same_value([[1, 2]], [(1, 2)])


@pytest.mark.parametrize(
    "expected, actual, tolerance, same",
    [
        ("1 2\n3\n", "1 2 3", None, True),
        ("1 2", "1 2 3", None, False),
        ("", "\n", None, True),
        ("1.0", "1", None, False),
        ("1.0", "1", 1e-6, True),
        ("0.3333333", "0.33333330001", 1e-6, True),
        ("0.5", "nan", 1.0, False),
        ("abc", "ABC", 1.0, False),
        ("1e400", "inf", 1e9, False),
        ("YES", "YES", None, True),
    ],
)
def test_output_is_compared_word_by_word(expected, actual, tolerance, same):
    assert same_output(expected, actual, tolerance) is same
