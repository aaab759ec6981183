"""Keys and values to encode: drawn ones, and those of types that no cache takes."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import struct
import uuid
from typing import Any

import ormsgpack
from hypothesis import strategies as st

from yatagarasu_cache.codec import KIND_MASK, ValueCodec

SECRET = b"a secret of this test, not of any cache"
DEFAULT = ValueCodec()


def canonical(value: Any) -> Any:
    """Equal for two values exactly when types, structure, order of dicts and bits of floats agree."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind in (list, tuple):
        return kind, [canonical(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted((canonical(item) for item in value), key=repr)
    if kind is dict:
        return kind, [(canonical(key), canonical(item)) for key, item in value.items()]
    return kind, value


def round_trip(value: Any, values: ValueCodec = DEFAULT) -> Any:
    payload, flags = values.encode(value)
    assert 0 <= flags <= KIND_MASK
    return values.decode(bytes(payload), flags)


def assert_exact(value: Any, values: ValueCodec = DEFAULT) -> None:
    assert canonical(round_trip(value, values)) == canonical(value)


def nested(levels: int, wrap: Any, core: Any = 1) -> Any:
    for _ in range(levels):
        core = wrap(core)
    return core


texts = st.text(st.characters(exclude_categories=()), max_size=12)
numbers = (
    st.integers() | st.integers(-(2**200), 2**200) | st.sampled_from([2**63, 2**64, -(2**63) - 1, 127, -128])
)
key_leaves = texts | st.binary(max_size=12) | numbers | st.floats(allow_nan=False) | st.booleans() | st.none()
keys = st.recursive(key_leaves, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=10)


class Str(str): ...


class Bytes(bytes): ...


class Int(int): ...


class Float(float): ...


class List(list): ...  # type: ignore[type-arg]


class Tuple(tuple): ...  # type: ignore[type-arg]


class Dict(dict): ...  # type: ignore[type-arg]


class Set(set): ...  # type: ignore[type-arg]


class FrozenSet(frozenset): ...  # type: ignore[type-arg]


class ByteArray(bytearray): ...


class DateTime(datetime.datetime): ...


class Number(decimal.Decimal): ...


class Ordered(collections.OrderedDict): ...  # type: ignore[type-arg]


class Zone(datetime.tzinfo):
    """One that nobody but its author knows."""

    def utcoffset(self, _: Any) -> datetime.timedelta:
        return datetime.timedelta(0)


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(str, enum.Enum):
    READ = "r"


class Flags(enum.IntFlag):
    A = 1


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass(frozen=True)
class Data:
    x: int = 1


@dataclasses.dataclass
class SlottedData:
    __slots__ = ("x",)
    x: int


HASHABLE_STRANGERS = [
    Str("a"),
    Bytes(b"a"),
    Int(1),
    Float(1.0),
    Tuple((1,)),
    FrozenSet({1}),
    Color.RED,
    Level.LOW,
    Mode.READ,
    Flags.A,
    Point(1, 2),
    Data(),
    object(),
    len,
    int,
    slice,
    NotImplemented,
    DateTime(2020, 1, 1),
    Zone(),
    datetime.datetime(2020, 1, 1, tzinfo=Zone()),
    datetime.time(12, tzinfo=Zone()),
    Number(1),
]
# What values may be, and keys not.
SCALARS = [
    1j,
    range(3),
    ...,
    datetime.datetime(2020, 1, 1),
    datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    datetime.date(2020, 1, 1),
    datetime.time(12),
    datetime.timedelta(1),
    uuid.UUID(int=1),
    decimal.Decimal(1),
    fractions.Fraction(1, 2),
    pathlib.PurePosixPath("a"),
]
STRANGERS = [
    *HASHABLE_STRANGERS,
    List([1]),
    Dict(a=1),
    Set({1}),
    ByteArray(b"a"),
    SlottedData(1),
    Ordered(a=1),
    collections.defaultdict(int, a=1),
    collections.Counter("a"),
    collections.deque([1]),
    collections.ChainMap({}),
    array.array("b", b"abc"),
    {}.keys(),
    {}.items(),
    iter([]),
    (i for i in ()),
]


def label(value: object) -> str:
    return type(value).__name__


scalars = (
    st.none() | st.booleans() | numbers | st.floats() | texts | st.binary(max_size=12)
    | st.sampled_from([-0.0, math.inf, 2**64 - 1, -(2**63), "ąćŐ", "\ud800", b"\xc4", 0xC4C5C6])
)  # fmt: skip
hashable = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    scalars | st.binary(max_size=12).map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
        | st.frozensets(hashable, max_size=4)
    ),
    max_leaves=15,
)


def damage(data: bytes, draw: st.DataObject) -> bytes:
    """`data` cut, extended, or with some bytes changed."""
    how = draw.draw(st.sampled_from(["cut", "extend", "flip"]))
    if how == "cut":
        return data[: draw.draw(st.integers(0, len(data)))]
    if how == "extend":
        return data + draw.draw(st.binary(min_size=1, max_size=4))
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    return bytes(changed)


def ext(tag: int, data: bytes) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(tag, data))
