"""Keys and values to bytes and back: exactly, or not at all."""

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
import pickle
import struct
import uuid
from typing import Any

import ormsgpack
import pytest
from helpers import named
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yatagarasu_cache import codec
from yatagarasu_cache.codec import (
    KIND_BYTES,
    KIND_CUSTOM,
    KIND_FALSE,
    KIND_FLOAT,
    KIND_INT,
    KIND_MASK,
    KIND_MSGPACK,
    KIND_NONE,
    KIND_STR,
    KIND_TRUE,
    MAX_KEY_BYTES,
    MAX_KEY_DEPTH,
    MAX_VALUE_DEPTH,
    MsgpackSerializer,
    PickleSerializer,
    Serializer,
    ValueCodec,
    decode_key,
    encode_key,
    encode_prefix,
)
from yatagarasu_cache.errors import CacheError, ConfigurationError, SerializationError

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


# Keys

texts = st.text(st.characters(exclude_categories=()), max_size=12)
numbers = (
    st.integers() | st.integers(-(2**200), 2**200) | st.sampled_from([2**63, 2**64, -(2**63) - 1, 127, -128])
)
key_leaves = texts | st.binary(max_size=12) | numbers | st.floats(allow_nan=False) | st.booleans() | st.none()
keys = st.recursive(key_leaves, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=10)

# Few leaves that look alike once encoded, so that two drawn keys are often nearly the same.
alike = st.sampled_from(
    ["", "a", "b", "ab", "s", "sa", "\0", "u", "1", "True", b"", b"a", b"ab", b"\0", b"sa", b"u\x02\0sa"]
    + [0, 1, 97, -1, 256, True, False, None, 0.0, 1.0, 97.0, math.inf]
)
alike_keys = st.recursive(alike, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(keys)
@example("\ud800")
@example("\ud800\udc00")
@example("\U00010000")
@example(())
@example(((), ((),), ""))
@example(-128)
@example(2**10_000)
def test_keys_come_back_as_they_were(key: Any) -> None:
    back = decode_key(encode_key(key))
    if 0.0 not in (key,):
        assert back == key
    assert encode_key(back) == encode_key(key)


@given(alike_keys, alike_keys)
@example(("a:b", "c"), ("a", "b:c"))
@example(("a", ("b",)), (("a", "b"),))
@example(("a", "b"), (("a",), "b"))
def test_different_keys_have_different_bytes(one: Any, other: Any) -> None:
    assert (encode_key(one) == encode_key(other)) == (canonical(one) == canonical(other))


@given(keys, keys)
def test_any_two_different_keys_have_different_bytes(one: Any, other: Any) -> None:
    if encode_key(one) == encode_key(other):
        assert one == other
        assert canonical(decode_key(encode_key(one))) == canonical(decode_key(encode_key(other)))


def test_keys_that_are_equal_in_python_are_told_apart_by_type() -> None:
    assert len({encode_key(key) for key in ("1", b"1", 1, 1.0, True, (1,), ("1",))}) == 7
    assert len({encode_key(key) for key in (0, 0.0, False, None, "", b"", ())}) == 7


def test_both_zeros_are_one_key() -> None:
    assert encode_key(-0.0) == encode_key(0.0)
    assert encode_key((1, -0.0)) == encode_key((1, 0.0))
    assert math.copysign(1, decode_key(encode_key(-0.0))) == 1  # type: ignore[arg-type]


def test_nan_is_no_key() -> None:
    for key in (math.nan, -math.nan, ("a", (math.nan,))):
        with pytest.raises(SerializationError, match="NaN cannot be a key"):
            encode_key(key)


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
    1j,
    object(),
    len,
    int,
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
    slice,
]
STRANGERS = [
    *HASHABLE_STRANGERS,
    List([1]),
    Dict(a=1),
    Set({1}),
    ByteArray(b"a"),
    SlottedData(1),
    collections.OrderedDict(a=1),
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


@pytest.mark.parametrize(
    "key", [*STRANGERS, bytearray(b"a"), memoryview(b"a"), [1], {1}, {1: 2}, frozenset()], ids=label
)
def test_other_types_are_no_keys(key: Any) -> None:
    for each in (key, ("a", key), ("a", (1, key))):
        with pytest.raises(
            SerializationError, match=r"keys are str, bytes, int.*exactly.*str\(key\)"
        ) as caught:
            encode_key(each)
        assert type(key).__qualname__ in str(caught.value)


def test_a_refused_key_is_named_with_its_module() -> None:
    with pytest.raises(SerializationError, match=r"type decimal\.Decimal:"):
        encode_key(decimal.Decimal(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["a", b"a"])
def test_the_longest_key(unit: Any) -> None:
    longest = unit * (MAX_KEY_BYTES - 1)
    assert decode_key(encode_key(longest)) == longest
    for key in (longest + unit, (longest,), (unit * 40_000, unit * 40_000), ((unit * 65_530,),)):
        with pytest.raises(SerializationError, match="65535 are allowed; hash it yourself"):
            encode_key(key)
    with pytest.raises(SerializationError, match="hash it yourself"):
        encode_key(1 << (8 * MAX_KEY_BYTES))


def test_the_deepest_key() -> None:
    deepest = nested(MAX_KEY_DEPTH, lambda key: (key,))
    assert decode_key(encode_key(deepest)) == deepest
    for levels in (1, 1_000, 100_000):
        with pytest.raises(SerializationError, match=f"nested deeper than {MAX_KEY_DEPTH}"):
            encode_key(nested(levels, lambda key: (key,), deepest))


@given(st.binary(max_size=40) | st.binary(max_size=30).map(lambda data: b"u" + data))
def test_bytes_are_one_key_or_none(data: bytes) -> None:
    try:
        key = decode_key(data)
    except SerializationError as error:
        assert "stored key is damaged" in str(error)
    else:
        assert encode_key(key) == data


@given(keys, st.data())
def test_damaged_keys(key: Any, data: st.DataObject) -> None:
    damaged = damage(encode_key(key), data)
    try:
        back = decode_key(damaged)
    except SerializationError:
        return
    assert encode_key(back) == damaged


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"nn", b"t\0", b"i", b"i\0\0", b"i\xff\xff", b"d", b"d" + bytes(7), b"d" + bytes(9)]
    + [b"d" + struct.pack("<d", number) for number in (math.nan, -0.0)]
    + [b"s\xff", b"s\xc0\x80", b"u\x01", b"u\x01\0", b"u\x02\0s", b"u\0\0", b"b" * (MAX_KEY_BYTES + 1)],
)
def test_bytes_that_are_no_key(data: bytes) -> None:
    with pytest.raises(SerializationError, match="stored key is damaged"):
        decode_key(data)


def test_bytes_nested_too_deep_are_no_key() -> None:
    data = b"n"
    while len(data) < MAX_KEY_BYTES - 3:
        data = b"u" + struct.pack("<H", len(data)) + data
    with pytest.raises(SerializationError, match="nested too deep"):
        decode_key(data)


# Prefixes


def has_prefix(key: Any, prefix: Any) -> bool:
    if type(key) is not type(prefix):
        return False
    if type(key) is tuple:
        return canonical(key[: len(prefix)]) == canonical(prefix)
    return bool(key.startswith(prefix))


alike_prefixes = alike_keys.filter(lambda key: type(key) in (str, bytes, tuple))


@settings(max_examples=300)
@given(alike_keys, alike_prefixes)
@example("img/1", "img/")
@example("é", "\ud800")
@example("\U00010000", "\ud800")
@example(("bucket", "a"), ("bucket",))
@example(("bucket",), ("bucket",))
@example(("bucket2",), ("bucket",))
@example((("bucket", 1), 2), (("bucket",),))
@example((), ())
def test_a_prefix_matches_what_starts_with_it(key: Any, prefix: Any) -> None:
    assert encode_key(key).startswith(encode_prefix(prefix)) == has_prefix(key, prefix)


@given(keys, st.integers(0, 12))
def test_each_beginning_of_a_key_is_its_prefix(key: Any, length: int) -> None:
    if type(key) in (str, bytes, tuple):
        assert encode_key(key).startswith(encode_prefix(key[:length]))


@pytest.mark.parametrize("empty", ["", b"", ()])
def test_an_empty_prefix_matches_all_keys_of_its_type(empty: Any) -> None:
    for key in ("", "a", b"", b"a", 0, 1.0, None, True, (), (1,), ("a", ())):
        assert encode_key(key).startswith(encode_prefix(empty)) == (type(key) is type(empty))


@pytest.mark.parametrize(
    "prefix", [1, 1.0, True, None, Str("a"), Point(1, 2), bytearray(b"a"), ["a"]], ids=label
)
def test_other_types_are_no_prefix(prefix: Any) -> None:
    with pytest.raises(SerializationError, match="use a str, bytes or a tuple of leading parts") as caught:
        encode_prefix(prefix)
    assert type(prefix).__qualname__ in str(caught.value)


# Values: exactly what went in

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
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=15,
)


@settings(max_examples=400)
@given(values)
def test_values_come_back_exactly(value: Any) -> None:
    if type(value) is bytearray:
        assert round_trip(value) == bytes(value)
    else:
        assert_exact(value)
    assert canonical(MsgpackSerializer().loads(MsgpackSerializer().dumps(value))) == canonical(value)


@given(json_like)
def test_json_like_values_come_back_exactly_and_are_plain_msgpack(value: Any) -> None:
    assert_exact(value)
    packed = MsgpackSerializer().dumps(value)
    assert packed == ormsgpack.packb(value)


@given(json_like | values, st.integers(0, 5))
def test_values_come_back_exactly_from_within_others(value: Any, wrapping: int) -> None:
    wrap = [
        lambda inner: [inner, 1],
        lambda inner: (inner,),
        lambda inner: {"a": inner, "b": b"raw"},
        lambda inner: {1: inner, True + 1: ()},
        lambda inner: [[], {}, inner, (), set(), frozenset()],
        lambda inner: [bytearray(b"x"), 2**70, inner],
    ][wrapping]
    assert_exact(wrap(value))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"", KIND_BYTES),
        (b"abc", KIND_BYTES),
        ("", KIND_STR),
        ("aé\ud800\U0001f600", KIND_STR),
        (0, KIND_INT),
        (-1, KIND_INT),
        (2**63, KIND_INT),
        (-(2**10_000), KIND_INT),
        (1.5, KIND_FLOAT),
        (-0.0, KIND_FLOAT),
        (math.nan, KIND_FLOAT),
        (-math.inf, KIND_FLOAT),
        (None, KIND_NONE),
        (True, KIND_TRUE),
        (False, KIND_FALSE),
        ([], KIND_MSGPACK),
        ({}, KIND_MSGPACK),
        ((), KIND_MSGPACK),
        (set(), KIND_MSGPACK),
        (frozenset(), KIND_MSGPACK),
        ({1: True, "1": 1, None: 0.0, (1, ("a", b"b")): {2}}, KIND_MSGPACK),
        ({True: 1}, KIND_MSGPACK),
        ({1.0: 1}, KIND_MSGPACK),
        ({math.nan, math.inf, -0.0}, KIND_MSGPACK),
        ({frozenset({(1,)}): [bytearray(b"")]}, KIND_MSGPACK),
        ({"\ud800": "\udfff", "é": "ą"}, KIND_MSGPACK),
        (["x" * 100_000, b"x" * 100_000, bytearray(100_000)], KIND_MSGPACK),
        ([(i, float(i)) for i in range(2_000)], KIND_MSGPACK),
        ({i: {"a": i} for i in range(2_000)}, KIND_MSGPACK),
        ([0.1 * i for i in range(2_000)], KIND_MSGPACK),
    ],
    ids=lambda part: repr(part)[:30],
)
def test_kind_and_exactness(value: Any, kind: int) -> None:
    assert DEFAULT.encode(value)[1] == kind
    assert_exact(value)


@given(numbers)
def test_ints_take_the_fewest_bytes(number: int) -> None:
    payload, flags = DEFAULT.encode(number)
    assert flags == KIND_INT
    assert int.from_bytes(payload, "little", signed=True) == number
    if len(payload) > 1:
        with pytest.raises(OverflowError):
            number.to_bytes(len(payload) - 1, "little", signed=True)


def test_bytes_are_not_copied() -> None:
    data = b"x" * 100
    payload, flags = DEFAULT.encode(data)
    assert payload is data
    assert DEFAULT.decode(data, flags) is data
    view = memoryview(data)[10:20]
    assert DEFAULT.encode(view) == (view, KIND_BYTES)
    assert DEFAULT.encode(view)[0] is view


def test_bytes_like_values_come_back_as_bytes() -> None:
    grid = memoryview(bytes(range(24))).cast("B", (4, 6))
    numbers_ = memoryview(array.array("i", [1, -2, 3]))
    for value in (
        bytearray(b"abc"),
        memoryview(b"abc"),
        memoryview(bytearray(b"abc")),
        memoryview(b"abcdef")[::2],
        memoryview(b"abcdef")[::-1],
        grid,
        numbers_,
        numbers_[::-1],
        memoryview(b""),
    ):
        back = round_trip(value)
        assert type(back) is bytes
        assert back == (value.tobytes() if isinstance(value, memoryview) else bytes(value))


@pytest.mark.parametrize("view", [False, True])
def test_what_may_change_is_copied(view: bool) -> None:
    data = bytearray(b"before")
    payload, _ = DEFAULT.encode(memoryview(data) if view else data)
    data[:] = b"after"  # resizing would fail if the payload still looked into it
    assert bytes(payload) == b"before"


def test_a_released_view_is_refused() -> None:
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(SerializationError, match="pass bytes instead"):
        DEFAULT.encode(view)


def test_what_occurs_twice_comes_back_twice() -> None:
    part: list[Any] = [(1,)]
    back = round_trip([part, part])
    assert back == [part, part]
    assert back[0] is not back[1]


# Values: refusals


def places_of(value: Any) -> list[Any]:
    """`value` alone and in everything that could hold it."""
    inside = [value, [value], (1, value), {"a": value}, {1: value}, [b"raw", {"a": [value]}]]
    try:
        hash(value)
    except TypeError:
        return inside
    return [*inside, {value}, frozenset({value}), {value: 1}, {(value,): 1}, [{"other": 1, value: 1}]]


@pytest.mark.parametrize("stranger", STRANGERS, ids=label)
def test_strangers_are_refused_wherever_they_are(stranger: Any) -> None:
    for value in places_of(stranger):
        with pytest.raises(SerializationError, match="serializer='pickle'") as caught:
            DEFAULT.encode(value)
        assert type(stranger).__qualname__ in str(caught.value)
        assert isinstance(caught.value, CacheError)


def test_views_are_refused_inside_of_containers() -> None:
    for value in places_of(memoryview(b"abc"))[1:]:
        with pytest.raises(SerializationError, match="type memoryview would not come back as what it is"):
            DEFAULT.encode(value)


def test_numpy_values_are_refused() -> None:
    numpy = pytest.importorskip("numpy")
    for stranger in (numpy.zeros(3), numpy.int64(1), numpy.float64(1), numpy.bool_(True), numpy.str_("a")):
        for value in (stranger, [stranger], (stranger,), {"a": stranger}):
            with pytest.raises(SerializationError, match="numpy"):
                DEFAULT.encode(value)


WRAPS: list[Any] = [
    lambda inner: [inner],
    lambda inner: (inner,),
    lambda inner: {"a": inner},
    lambda inner: {1: inner},
    lambda inner: [b"raw", inner],
    lambda inner: frozenset({inner}) if not isinstance(inner, frozenset) else (inner,),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_depth_up_to_the_limit_and_beyond(wrap: Any) -> None:
    assert_exact(nested(MAX_VALUE_DEPTH, wrap))
    for levels in (MAX_VALUE_DEPTH + 60, 2_000):
        with pytest.raises(SerializationError, match="nested deeper than|contains itself"):
            DEFAULT.encode(nested(levels, wrap))


def test_values_that_contain_themselves() -> None:
    endless: list[Any] = []
    endless.append(endless)
    loop: dict[Any, Any] = {1: (endless,)}
    loop["self"] = loop
    for value in (endless, loop, (endless,), [loop]):
        with pytest.raises(SerializationError, match="contains itself"):
            DEFAULT.encode(value)


def test_orders_to_ormsgpack_are_no_values() -> None:
    orders: list[Any] = [ormsgpack.Ext(1, b"a")]
    if hasattr(ormsgpack, "Fragment"):  # not in the oldest release that we take
        orders.append(ormsgpack.Fragment(b"\1"))
    for order in orders:
        for value in (order, (order,), [b"raw", order], {1: order}):
            with pytest.raises(SerializationError, match=label(order)):
                DEFAULT.encode(value)


def test_what_msgpack_cannot_hold_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(codec, "_pack", lambda *_: NotImplemented)  # as for more than 4 GiB
    with pytest.raises(
        SerializationError, match="cannot hold the value: .*more than .* bytes.*serializer='pickle'"
    ):
        DEFAULT.encode([1])


def test_a_refusal_has_no_noise_around_it() -> None:
    with pytest.raises(SerializationError) as caught:
        DEFAULT.encode({"a": 1j})
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# Values: damaged and hostile bytes


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


CODECS = {
    "msgpack": DEFAULT,
    "pickle-signed": ValueCodec(PickleSerializer(SECRET)),
}


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 255), st.sampled_from(sorted(CODECS)))
def test_any_bytes_are_a_value_or_refused(payload: bytes, flags: int, name: str) -> None:
    try:
        CODECS[name].decode(payload, flags, "k")
    except SerializationError as error:
        assert "stored" in str(error)


@settings(max_examples=300)
@given(values, st.data())
def test_damaged_values_are_values_or_refused(value: Any, data: st.DataObject) -> None:
    payload, flags = DEFAULT.encode(value)
    if not payload:
        return
    try:
        DEFAULT.decode(damage(bytes(payload), data), flags)
    except SerializationError as error:
        assert "damaged" in str(error)


FLAT = 0


def flat(parts: Any, steps: Any) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(FLAT, ormsgpack.packb([parts, steps])))


def ext(tag: int, data: bytes) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(tag, data))


LIST, TUPLE, SET, FROZENSET, DICT = range(5)

same_hash = st.integers(-8, 40).map(lambda number: number * (2**61 - 1))
exts = st.builds(lambda tag, data: ormsgpack.Ext(tag, data), st.integers(0, 4), st.binary(max_size=4))
plain_parts = st.one_of(
    same_hash.filter(lambda number: -(2**63) <= number < 2**64), st.integers(-3, 3), st.floats(), st.booleans(), st.none(),
    st.text(max_size=2), st.binary(max_size=2), exts, st.lists(st.integers(0, 9), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
)  # fmt: skip
part_lists = st.lists(plain_parts, max_size=12) | st.lists(same_hash, max_size=40).map(
    lambda numbers: [ormsgpack.Ext(1, codec._from_int(number)) for number in numbers]
)
sizes = st.integers(0, 6) | st.sampled_from([-1, 12, 40, 2**40, -(2**40), 1.0, None, "a", True])
one_step = st.tuples(st.integers(0, 5) | st.sampled_from([2.0, None, "a", -1]), sizes, sizes)
step_lists = st.lists(one_step, max_size=8).map(lambda steps: [part for step in steps for part in step])


@st.composite
def well_formed(draw: Any) -> tuple[list[Any], list[Any]]:
    """Steps that take what is there, down to one value or so, of parts of any kind."""
    parts = draw(part_lists)
    steps, pushed, built = [], 0, 0
    while pushed < len(parts) or built > 1:
        more = draw(st.integers(0, len(parts) - pushed))
        count = more + draw(st.integers(0, built))
        steps += [draw(st.integers(LIST, DICT)), more, count]
        pushed, built = pushed + more, built - (count - more) + 1
        if len(steps) > 60:
            break
    return parts, steps


@settings(max_examples=200)
@given(st.tuples(part_lists, step_lists) | well_formed(), st.sampled_from([5, 1 << 23]))
def test_any_parts_and_steps_are_a_value_or_refused(content: tuple[list[Any], list[Any]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_COMPARISONS", most)
        try:
            value = DEFAULT.decode(flat(*content), KIND_MSGPACK)
        except SerializationError as error:
            assert "damaged" in str(error)
        else:
            if type(value) is not bytearray:
                assert_exact(value)


@given(keys, values, st.data())
def test_damaged_signed_values_are_refused(key: Any, value: Any, data: st.DataObject) -> None:
    """As are sound ones under any other key, and no other exception comes of either."""
    values_ = CODECS["pickle-signed"]
    payload, flags = values_.encode((value,), key=key)
    assert canonical(values_.decode(bytes(payload), flags, key)) == canonical((value,))
    changed, other = damage(bytes(payload), data), data.draw(keys)
    if changed != payload:
        with pytest.raises(SerializationError):
            values_.decode(changed, KIND_CUSTOM, key)
    if encode_key(other) != encode_key(key):
        with pytest.raises(SerializationError, match="signature of a stored pickle is wrong"):
            values_.decode(bytes(payload), KIND_CUSTOM, other)


@given(values, st.integers(0, 15), st.data())
def test_damaged_values_of_any_kind_are_values_or_refused(value: Any, flags: int, data: st.DataObject) -> None:
    """The kind is not what it was, or the payload."""
    for name, values_ in CODECS.items():
        payload, kind = values_.encode(value, key="k")
        for changed, read_as in ((bytes(payload), flags), (damage(bytes(payload), data) if payload else b"", kind)):
            try:
                values_.decode(changed, read_as, "k")
            except SerializationError as error:
                assert "stored" in str(error), name


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\x01\x01",
        b"\xa3\xed\xa0\x80",
        b"\xd6\xff\0\0\0\0",
        ext(1, b"\1"),
        ext(9, b""),
        ext(FLAT, b""),
        ext(FLAT, b"\x90"),
        ext(FLAT, b"\x91\x90"),
        ext(FLAT, ext(FLAT, b"\x92\x91\1\x90")),
        ormsgpack.packb(ormsgpack.Ext(FLAT, ormsgpack.packb([[ormsgpack.Ext(FLAT, b"\x92\x91\1\x90")], []]))),
        ormsgpack.packb(ormsgpack.Ext(FLAT, ormsgpack.packb([[ormsgpack.Ext(1, b"\0\0")], []]))),
        ormsgpack.packb(ormsgpack.Ext(FLAT, ormsgpack.packb([[ormsgpack.Ext(2, b"\xff")], []]))),
        flat([], []),
        flat([1, 2], []),
        flat("a", []),
        flat([1], "abc"),
        flat({"a": 1}, [TUPLE, 1, 1]),
        flat([1], [TUPLE]),
        flat([1], [TUPLE, 1]),
        flat([1], [9, 1, 1]),
        flat([1], [TUPLE, 1, 2]),
        flat([1], [TUPLE, 1, -1]),
        flat([1, 2], [TUPLE, -1, 0]),
        flat([1, 2], [TUPLE, 1, 1]),
        flat([1, 2], [LIST, 2, 2, TUPLE, -1, 1, TUPLE, 1, 2]),
        ext(5, ormsgpack.packb([[1], [TUPLE, 1, 1]])),
        flat([1], ["a", "b", "c"]),
        flat([1], [TUPLE, 1.0, 1]),
        flat([1], [None, 1, 1]),
        flat([[]], [SET, 1, 1]),
        flat([{}], [FROZENSET, 1, 1]),
        flat([1, 1], [SET, 2, 2]),
        flat([1, True], [FROZENSET, 2, 2]),
        flat([1, 2, 1, 3], [DICT, 4, 4]),
        flat([1], [DICT, 1, 1]),
        flat([[], 1], [DICT, 2, 2]),
        flat([1], [TUPLE, 1, 1] + [TUPLE, 0, 1] * 300_000),
        flat([1], [TUPLE, 1, 1] + [TUPLE, 0, 1] * 300_000 + [SET, 0, 1]),
        flat([1], [TUPLE, 2**62, 1] * 1_000),
        flat([1], [TUPLE, -(2**62), 1] * 1_000),
        flat([1], [TUPLE, 1, -(2**62)] * 1_000),
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_hostile_msgpack_is_refused(payload: bytes) -> None:
    with pytest.raises(SerializationError, match="a stored msgpack value is damaged"):
        DEFAULT.decode(payload, KIND_MSGPACK)


def test_nested_extensions_do_not_exhaust_the_stack() -> None:
    payload = b"\1"
    for _ in range(2_000):
        payload = ormsgpack.packb(ormsgpack.Ext(FLAT, b"\x91" * 900 + payload))
    with pytest.raises(SerializationError):
        DEFAULT.decode(payload, KIND_MSGPACK)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (KIND_STR, b"\xff"),
        (KIND_STR, b"\xc0\x80"),
        (KIND_INT, b""),
        (KIND_INT, b"\1\0"),
        (KIND_INT, b"\xff\xff"),
        (KIND_FLOAT, b""),
        (KIND_FLOAT, bytes(7)),
        (KIND_FLOAT, bytes(9)),
        (KIND_NONE, b"\0"),
        (KIND_TRUE, b"\0"),
        (KIND_FALSE, b"\0"),
        (KIND_CUSTOM, b""),
        (KIND_CUSTOM, b"\0"),
        (KIND_CUSTOM, b"\0abc"),
        (KIND_CUSTOM, b"\x05abcd"),
        (KIND_CUSTOM, b"\x01\xff"),
    ],
)
def test_damaged_payloads_are_refused(kind: int, payload: bytes) -> None:
    with pytest.raises(SerializationError, match="a stored value is damaged"):
        DEFAULT.decode(payload, kind)


@pytest.mark.parametrize("kind", range(KIND_CUSTOM + 1, KIND_MASK + 1))
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(SerializationError, match="unknown kind: damaged, or from a newer release"):
        DEFAULT.decode(b"", kind)


def test_the_upper_half_of_the_flags_is_the_stores() -> None:
    for value in (b"abc", "abc", 1, 1.5, None, True, False, [1]):
        payload, flags = DEFAULT.encode(value)
        assert DEFAULT.decode(bytes(payload), flags | 0xF0) == value


# Serializers


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@dataclasses.dataclass
class Thing:
    name: str
    parts: list[Any] = dataclasses.field(default_factory=list)


class Reversing:
    """A serializer of str, for tests."""

    name = "reversing"

    def dumps(self, value: Any) -> bytes:
        return repr(value).encode()[::-1]

    def loads(self, data: bytes) -> Any:
        return "loaded " + data[::-1].decode()


class Returning:
    """A serializer that gives, or raises, what it is told."""

    name = "returning"

    def __init__(self, dumped: Any = b"", loaded: Any = None) -> None:
        self.dumped, self.loaded = dumped, loaded

    def dumps(self, value: Any) -> bytes:
        return self._give(self.dumped)  # type: ignore[no-any-return]

    def loads(self, data: bytes) -> Any:
        return self._give(self.loaded)

    def _give(self, what: Any) -> Any:
        if isinstance(what, BaseException):
            raise what
        return what


PICKLES = [PickleSerializer(), PickleSerializer(SECRET), PickleSerializer(SECRET * 10, protocol=0)]


@pytest.mark.parametrize("serializer", PICKLES, ids=named)
def test_pickled_values_come_back(serializer: PickleSerializer) -> None:
    values_ = ValueCodec(serializer)
    for value in (Thing("a", [1]), Color.RED, Point(1, 2), collections.OrderedDict(a=1), [1, (2,)]):
        payload, flags = values_.encode(value, key="k")
        assert flags == KIND_CUSTOM
        back = values_.decode(bytes(payload), flags, "k")
        assert back == value
        assert type(back) is type(value)


@settings(max_examples=50)
@given(scalars)
def test_scalars_stay_native_whatever_the_serializer(value: Any) -> None:
    values_ = ValueCodec(Reversing())
    assert values_.encode(value) == DEFAULT.encode(value)
    assert_exact(value, values_)


def test_everything_else_goes_to_the_serializer() -> None:
    values_ = ValueCodec(Reversing())
    for value in ([1], (1,), {"a": 1}, {1}, bytearray(b"a"), Str("a"), Level.LOW, 1j, Int(1), Bytes(b"a")):
        payload, flags = values_.encode(value)
        assert flags == KIND_CUSTOM
        assert bytes(payload).startswith(b"\x09reversing")
        assert values_.decode(bytes(payload), flags) == f"loaded {value!r}"
    assert type(round_trip(bytearray(b"a"), ValueCodec("pickle"))) is bytearray
    assert round_trip(memoryview(b"abc"), ValueCodec("pickle")) == b"abc"


def test_msgpack_values_open_under_every_serializer() -> None:
    payload, flags = DEFAULT.encode({"a": (1, 2)})
    assert ValueCodec("pickle").decode(bytes(payload), flags) == {"a": (1, 2)}


def test_the_names_of_serializers() -> None:
    assert ValueCodec().serializer.name == "msgpack"
    assert ValueCodec("pickle").serializer.name == "pickle"
    assert PickleSerializer(SECRET).name == "pickle-signed"
    for serializer in (MsgpackSerializer(), PickleSerializer(), Reversing()):
        assert isinstance(serializer, Serializer)
        assert ValueCodec(serializer).serializer is serializer
    assert ValueCodec(MsgpackSerializer()).encode([1]) == DEFAULT.encode([1])


@pytest.mark.parametrize(
    "serializer",
    [
        "",
        "json",
        "Pickle",
        b"pickle",
        None,
        1,
        object(),
        pickle,
        PickleSerializer,
        MsgpackSerializer,
        Str("x"),
    ],
    ids=named,
)
def test_what_is_no_serializer(serializer: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^serializer is .*must be 'msgpack', 'pickle' or an object"
    ):
        ValueCodec(serializer)


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, b"name", None, 1])
def test_names_that_cannot_be_stored(name: Any) -> None:
    serializer = Reversing()
    serializer.name = name
    with pytest.raises(ConfigurationError, match=r"serializer has the name .* 1 to 255 bytes"):
        ValueCodec(serializer)


def test_the_longest_name() -> None:
    serializer = Reversing()
    serializer.name = "é" * 127 + "x"
    assert round_trip([1], ValueCodec(serializer)) == "loaded [1]"


@pytest.mark.parametrize(
    ("writer", "remedy"),
    [
        (PickleSerializer(), r"stored with serializer 'pickle'.*serializer='pickle'.*if you trust"),
        (
            PickleSerializer(SECRET),
            r"stored with serializer 'pickle-signed'.*PickleSerializer\(secret=\.\.\.\)",
        ),
        (Reversing(), r"stored with serializer 'reversing'.*<your serializer named 'reversing'>"),
    ],
    ids=named,
)
def test_values_of_another_serializer_are_refused_with_directions(writer: Any, remedy: str) -> None:
    payload, flags = ValueCodec(writer).encode([1], key="k")
    for reader in (MsgpackSerializer(), PickleSerializer(), PickleSerializer(SECRET), Reversing()):
        if reader.name != writer.name:
            with pytest.raises(SerializationError, match=remedy) as caught:
                ValueCodec(reader).decode(bytes(payload), flags, "k")
            assert f"this cache uses {reader.name!r}" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), RecursionError("no")])
def test_errors_of_serializers_are_wrapped(error: Exception) -> None:
    with pytest.raises(
        SerializationError, match="'returning' cannot store a value of type list: no"
    ) as caught:
        ValueCodec(Returning(dumped=error)).encode([1])
    assert caught.value.__cause__ is error
    payload, flags = ValueCodec(Returning()).encode([1])
    with pytest.raises(SerializationError, match="'returning' cannot load a stored value: no") as caught:
        ValueCodec(Returning(loaded=error)).decode(bytes(payload), flags)
    assert caught.value.__cause__ is error


def test_errors_of_ours_and_interrupts_pass_unchanged() -> None:
    payload, flags = ValueCodec(Returning()).encode([1])
    for error in (SerializationError("mine"), KeyboardInterrupt("stop"), MemoryError("no")):
        with pytest.raises(type(error)) as caught:
            ValueCodec(Returning(dumped=error)).encode([1])
        assert caught.value is error
        with pytest.raises(type(error)) as caught:
            ValueCodec(Returning(loaded=error)).decode(bytes(payload), flags)
        assert caught.value is error


@pytest.mark.parametrize("dumped", ["text", bytearray(b"a"), memoryview(b"a"), None, 1], ids=label)
def test_dumps_has_to_return_bytes(dumped: Any) -> None:
    with pytest.raises(
        SerializationError, match=f"'returning' returned {label(dumped)}; it has to return bytes"
    ):
        ValueCodec(Returning(dumped=dumped)).encode([1])


def test_what_pickle_cannot_store() -> None:
    for value in (lambda: 1, [len, (i for i in ())], nested(100_000, lambda inner: [inner])):
        with pytest.raises(SerializationError, match="serializer 'pickle' cannot store") as caught:
            ValueCodec("pickle").encode(value)
        assert caught.value.__cause__ is not None


@settings(max_examples=50)
@given(st.binary(max_size=30))
def test_damaged_pickles_are_refused(data: bytes) -> None:
    payload = b"\x06pickle" + data[:3] + b"\xff"  # no opcode: never loads
    with pytest.raises(SerializationError, match="'pickle' cannot load"):
        ValueCodec("pickle").decode(payload, KIND_CUSTOM)


# Pickles: nothing runs that was not asked for


def test_a_bomb_does_go_off_when_pickle_was_chosen(tmp_path: pathlib.Path) -> None:
    """Or the tests below would prove nothing."""
    round_trip(Bomb(tmp_path / "trace"), ValueCodec("pickle"))
    assert (tmp_path / "trace").exists()


def test_no_payload_is_unpickled_by_the_default(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace)
    payloads = [pickle.dumps(bomb), b"\x06pickle" + pickle.dumps(bomb)]
    payloads += [bytes(ValueCodec(serializer).encode(bomb, key="k")[0]) for serializer in PICKLES]
    payloads += [ext(tag, payload) for tag in range(6) for payload in payloads]
    for payload in payloads:
        for flags in range(256):
            try:
                DEFAULT.decode(payload, flags)
            except SerializationError:
                pass
            assert not trace.exists()


def test_no_foreign_pickle_is_loaded_with_a_secret(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    values_ = ValueCodec(PickleSerializer(SECRET))
    other = PickleSerializer(b"another secret").dumps(Bomb(trace))
    unsigned = [b"\x06pickle" + bomb, b"\x0dpickle-signed" + bomb, b"\x0dpickle-signed" + bytes(32) + bomb]
    for payload in [*unsigned, b"\x0dpickle-signed" + other]:
        with pytest.raises(SerializationError):
            values_.decode(payload, KIND_CUSTOM, "k")
        assert not trace.exists()


def test_each_changed_byte_of_a_signed_pickle_is_noticed_before_loading(monkeypatch: Any) -> None:
    signed = PickleSerializer(SECRET)
    data = signed.dumps([1, Thing("a")])
    assert signed.loads(data) == [1, Thing("a")]
    loaded: list[bytes] = []
    monkeypatch.setattr(codec.pickle, "loads", loaded.append)
    changed = [data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :] for at in range(len(data))]
    cut = [data[:length] for length in range(len(data))]
    for tampered in [*changed, *cut, data + b"\0"]:
        with pytest.raises(
            SerializationError, match="signature of a stored pickle is wrong, it was not loaded"
        ):
            signed.loads(tampered)
    assert loaded == []


@pytest.mark.parametrize("secret", [b"", "text", bytearray(b"abc"), 1, True])
def test_what_is_no_secret(secret: Any) -> None:
    with pytest.raises(ConfigurationError, match="^secret must be bytes"):
        PickleSerializer(secret)


@pytest.mark.parametrize("protocol", [-1, pickle.HIGHEST_PROTOCOL + 1, "5", None, True])
def test_what_is_no_protocol(protocol: Any) -> None:
    with pytest.raises(ConfigurationError, match="^protocol must be an int"):
        PickleSerializer(protocol=protocol)


def test_secrets_of_any_length_differ() -> None:
    data = {
        PickleSerializer(secret).dumps(1) for secret in (b"a", b"b", b"a" * 64, b"a" * 65, b"a" * 66, b"a\0")
    }
    assert len(data) == 6


@pytest.mark.parametrize("serializer", PICKLES, ids=named)
def test_pickle_serializers_travel_to_other_processes(serializer: PickleSerializer) -> None:
    there = pickle.loads(pickle.dumps(serializer))
    assert there.name == serializer.name
    assert there.loads(serializer.dumps([1])) == [1]
    assert there.dumps([1]) == serializer.dumps([1])


def test_the_secret_is_not_shown() -> None:
    assert SECRET.decode() not in repr(PickleSerializer(SECRET))
    assert repr(PickleSerializer(SECRET)) == "<PickleSerializer 'pickle-signed' protocol=5>"
