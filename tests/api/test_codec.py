"""Values to bytes and back: exactly, or not at all."""

from __future__ import annotations

import array
import math
from typing import Any

import ormsgpack
import pytest
from helpers import named
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DEFAULT, STRANGERS, assert_exact, canonical, label, nested, numbers, round_trip, values

from yatagarasu_cache.codec import (
    KIND_BYTES,
    KIND_FALSE,
    KIND_FLOAT,
    KIND_INT,
    KIND_MSGPACK,
    KIND_NONE,
    KIND_STR,
    KIND_TRUE,
    MAX_VALUE_DEPTH,
    MsgpackSerializer,
    msgpack,
)
from yatagarasu_cache.errors import CacheError, SerializationError

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
    ids=lambda part: named(part)[:30],
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
        with pytest.raises(SerializationError, match=r"TypedSerializer\(types=\[...\]\).*PickleSerializer\(secret=...\)|use .*zoneinfo.ZoneInfo") as caught:
            DEFAULT.encode(value)
        assert type(stranger).__qualname__ in str(caught.value)
        assert isinstance(caught.value, CacheError)


def test_views_are_refused_inside_of_containers() -> None:
    for value in places_of(memoryview(b"abc"))[1:]:
        with pytest.raises(SerializationError, match="type memoryview would not come back as what it is"):
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
    monkeypatch.setattr(msgpack, "_pack", lambda *_: NotImplemented)  # as for more than 4 GiB
    with pytest.raises(
        SerializationError, match="cannot hold the value: .*more than .* bytes.*convert it"
    ):
        DEFAULT.encode([1])


def test_a_refusal_has_no_noise_around_it() -> None:
    with pytest.raises(SerializationError) as caught:
        DEFAULT.encode({"a": object()})
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
