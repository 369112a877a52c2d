"""Values that cross a process border: bounded, tagged JSON, never pickle.

A scalar is JSON's own; everything else is an array whose first element is a tag, so `(1, 2)` and `[1, 2]`, `{1}` and
`frozenset({1})` differ and only genuine built-in objects are ever rebuilt. Reading trusts nothing: size, depth, hash
collisions and every tag are checked, and any surprise raises `BadValue`.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import struct
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

MAX_DEPTH = 100
_MAX_EQUAL_HASHES = 64
_PLAIN_INT_BITS = 8192  # longer integers travel in hexadecimal: linear to read, and free of Python's digit limit
_NONE = type(None)
_TYPES = {t.__name__: t for t in (int, float, str, bool, list, tuple, dict, set, frozenset, bytes, complex, object)}
_SEQUENCES = {list: "l", tuple: "t", set: "s", frozenset: "fs", deque: "dq"}
_VIEWS = {type({}.keys()): "vk", type({}.values()): "vv", type({}.items()): "vi"}
_BASES = (bool, int, float, str, OrderedDict, Counter, dict, list, tuple, frozenset, set, deque, bytearray, bytes)
_MAPPINGS = {dict: "d", OrderedDict: "od", Counter: "ct", defaultdict: "dd"}
_BY_TEXT = {
    Fraction: "fr", Decimal: "dc", datetime.datetime: "dt", datetime.date: "da", datetime.time: "ti",
    uuid.UUID: "uu",
}  # fmt: skip
_ISO = {"dt": datetime.datetime.fromisoformat, "da": datetime.date.fromisoformat, "ti": datetime.time.fromisoformat}

Opaque = Callable[[object], int]
Resolve = Callable[..., object]  # (number) or (number, plain value) -> what stands for the object
_NOTHING = object()


class BadValue(ValueError):
    """A value that cannot be sent, or a message that is not one."""


class Unsendable(BadValue):
    """A value of a type that does not travel."""


def encode(value: object, opaque: Opaque | None = None, by_value: bool = False, depth: int = 0) -> object:
    """The JSON form of `value`. Exact types only; `by_value` also sends a subclass instance as its built-in base, as
    `==` in an assertion would read it (with its handle number where there is `opaque`). `opaque` turns any other object
    into a handle number; without it `BadValue`."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if value.bit_length() <= _PLAIN_INT_BITS else ["i", hex(value)]
    if kind is float:
        return value if math.isfinite(value) else ["f", repr(value)]
    if depth >= MAX_DEPTH:
        raise BadValue(f"nested deeper than {MAX_DEPTH}")
    if kind in _SEQUENCES or kind in _VIEWS:
        tag = _SEQUENCES.get(kind) or _VIEWS[kind]
        if _is_flat(value):
            return [tag.upper(), list(value)]
        return [tag, *[encode(item, opaque, by_value, depth + 1) for item in value]]
    if kind in _MAPPINGS:
        pairs = [
            [encode(key, opaque, by_value, depth + 1), encode(item, opaque, by_value, depth + 1)]
            for key, item in value.items()
        ]
        return [_MAPPINGS[kind], *pairs]
    if kind in _BY_TEXT:
        return [_BY_TEXT[kind], value.isoformat() if _BY_TEXT[kind] in _ISO else str(value)]
    if kind is bytes or kind is bytearray:
        return ["b" if kind is bytes else "ba", value.hex()]
    if kind is complex:
        return ["c", repr(value.real), repr(value.imag)]
    if kind is range:
        return ["r", *[encode(part) for part in (value.start, value.stop, value.step)]]
    if kind is datetime.timedelta:
        return ["td", value.days, value.seconds, value.microseconds]
    if kind is type and _TYPES.get(value.__name__) is value:
        return ["ty", value.__name__]
    plain = _plain(value) if by_value else _NOTHING
    if plain is not _NOTHING:
        data = encode(plain, opaque, by_value, depth + 1)
        return data if opaque is None else ["of", opaque(value), data]
    if opaque is None:
        raise Unsendable(f"a value of type {kind.__name__[:80]} cannot be compared")
    return ["o", opaque(value)]


def _plain(value: object) -> object:
    """The value of a subclass instance as its built-in base; `_NOTHING` where it has none."""
    for base in _BASES:
        if isinstance(value, base):
            return base(value) if base in _MAPPINGS or base in (list, set, deque) else base.__new__(base, value)
    return _NOTHING


def _is_flat(items: object) -> bool:
    """Whether the elements are scalars that JSON keeps as they are (the common case, decided at C speed)."""
    kinds = set(map(type, items))
    if not kinds <= {str, int, bool, _NONE, float}:
        return False
    if int in kinds and not all(x.bit_length() <= 63 for x in items if type(x) is int):
        return False
    return float not in kinds or all(math.isfinite(x) for x in items if type(x) is float)


def decode(data: object, resolve: Resolve | None = None, depth: int = 0) -> object:
    """The value that `encode` sent, made of genuine built-in types. Raises `BadValue` on anything else."""
    kind = type(data)
    if kind in (str, int, bool, _NONE):
        return data
    if kind is float:
        if not math.isfinite(data):
            raise BadValue("a bare non-finite number")
        return data
    if kind is not list or not data or type(data[0]) is not str or depth > MAX_DEPTH:
        raise BadValue("not a tagged value")
    tag, body = data[0], data[1:]
    try:
        if tag in _READ_FLAT:
            if len(body) != 1 or type(body[0]) is not list or not _is_flat(body[0]):
                raise BadValue("not a flat sequence")
            return _collect(_READ_FLAT[tag], body[0])
        if tag in _READ_SEQUENCE:
            return _collect(_READ_SEQUENCE[tag], [decode(item, resolve, depth + 1) for item in body])
        if tag in _READ_MAPPING:
            if not all(type(pair) is list and len(pair) == 2 for pair in body):
                raise BadValue("a mapping of something other than pairs")
            keys = [decode(pair[0], resolve, depth + 1) for pair in body]
            _check_hashes(keys)
            return _READ_MAPPING[tag](
                dict(zip(keys, [decode(pair[1], resolve, depth + 1) for pair in body], strict=True))
            )
        return _decode_scalar(tag, body, resolve, depth)
    except BadValue:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise BadValue(f"tag {tag[:8]!r}: {type(error).__name__}") from error


_READ_SEQUENCE: dict[str, Callable] = {tag: kind for kind, tag in _SEQUENCES.items()} | {
    "vk": lambda items: dict.fromkeys(_collect(list, items, hashed=True)).keys(),
    "vv": lambda items: dict(enumerate(items)).values(),
    "vi": lambda items: dict(_collect(list, items, hashed=True)).items(),
}
_READ_FLAT = {tag.upper(): kind for tag, kind in _READ_SEQUENCE.items()}
_READ_MAPPING: dict[str, Callable] = {"d": dict, "od": OrderedDict, "ct": Counter, "dd": lambda d: defaultdict(None, d)}


def _collect(kind: Callable, items: list, hashed: bool = False) -> object:
    if hashed or kind in (set, frozenset):
        _check_hashes(items)
    return kind(items)


def _check_hashes(keys: list) -> None:
    """Many keys of one hash make a set quadratic to build: an attack on the process that reads it."""
    if len(keys) <= _MAX_EQUAL_HASHES:
        return
    hashes = sorted(map(hash, keys))
    if any(hashes[i] == hashes[i + _MAX_EQUAL_HASHES] for i in range(len(hashes) - _MAX_EQUAL_HASHES)):
        raise BadValue("too many keys with one hash")


def _decode_scalar(tag: str, body: list, resolve: Resolve | None, depth: int) -> object:
    if tag == "i":
        if type(body[0]) is not str:
            raise BadValue("an integer that is not text")
        return int(body[0], 16)
    if tag == "f":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[body[0]]
    if tag in ("b", "ba"):
        return (bytes if tag == "b" else bytearray).fromhex(body[0])
    if tag == "c":
        return complex(float(body[0]), float(body[1]))
    if tag == "r":
        return range(*[decode(part) for part in body])
    if tag == "td":
        return datetime.timedelta(*body[:3])
    if tag == "ty":
        return _TYPES[body[0]]
    if tag == "fr":
        if len(body[0]) > 4000 or any(letter in body[0] for letter in "eE._"):
            raise BadValue("not a fraction as Python prints it")
        return Fraction(body[0])
    if tag == "dc":
        number = Decimal(body[0])
        if number.is_snan():  # comparing one raises
            raise BadValue("a signalling NaN")
        return number
    if tag in _ISO:
        return _ISO[tag](body[0])
    if tag == "uu":
        return uuid.UUID(body[0])
    if tag in ("o", "of") and resolve is not None and type(body[0]) is int:
        return resolve(body[0], *[decode(part, resolve, depth + 1) for part in body[1:2]])
    raise BadValue(f"unknown tag {tag[:8]!r}")


def text_of(claim: object, key: str, max_characters: int = 300) -> str:
    """The text under `key` of what should be a mapping; empty for anything else (even printing it could go wrong)."""
    found = claim.get(key) if type(claim) is dict else None
    return found[:max_characters] if type(found) is str else ""


_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def dumps(message: object) -> bytes:
    """JSON bytes, ASCII (lone surrogates survive). `BadValue` where JSON cannot hold it."""
    try:
        return _JSON.encode(message).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise BadValue(f"not sendable: {type(error).__name__}") from error


def loads(data: bytes) -> object:
    """The JSON in `data`; `BadValue` for anything that is not JSON, or nested too deep to read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"not JSON: {type(error).__name__}") from error


def frame(message: object) -> bytes:
    """A message with its length before it (4 bytes, big endian)."""
    data = dumps(message)
    return struct.pack(">I", len(data)) + data


def read_frame(fd: int, max_bytes: int) -> object:
    """The next message on a blocking descriptor. `EOFError` at its end, `BadValue` for one that is too long."""
    (size,) = struct.unpack(">I", _read_exactly(fd, 4))
    if size > max_bytes:
        raise BadValue(f"a message of {size} bytes, at most {max_bytes} are read")
    return loads(_read_exactly(fd, size))


def write_frame(fd: int, message: object) -> None:
    """Writes all of a message to a blocking descriptor."""
    data = memoryview(frame(message))
    while data:
        data = data[os.write(fd, data) :]


def _read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
