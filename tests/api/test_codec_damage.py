"""Damaged and hostile bytes: values, or refused."""

from __future__ import annotations

from typing import Any

import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DEFAULT, SECRET, assert_exact, canonical, damage, ext, keys, values

from yatagarasu_cache.codec import (
    KIND_COMPRESSED,
    KIND_CUSTOM,
    KIND_FALSE,
    KIND_FLOAT,
    KIND_INT,
    KIND_MASK,
    KIND_MSGPACK,
    KIND_NONE,
    KIND_STR,
    KIND_TRUE,
    PickleSerializer,
    ValueCodec,
    bounds,
    encode_key,
)
from yatagarasu_cache.codec.basics import from_int
from yatagarasu_cache.errors import SerializationError

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


LIST, TUPLE, SET, FROZENSET, DICT = range(5)

same_hash = st.integers(-8, 40).map(lambda number: number * (2**61 - 1))
exts = st.builds(lambda tag, data: ormsgpack.Ext(tag, data), st.integers(0, 4), st.binary(max_size=4))
plain_parts = st.one_of(
    same_hash.filter(lambda number: -(2**63) <= number < 2**64), st.integers(-3, 3), st.floats(), st.booleans(), st.none(),
    st.text(max_size=2), st.binary(max_size=2), exts, st.lists(st.integers(0, 9), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
)  # fmt: skip
part_lists = st.lists(plain_parts, max_size=12) | st.lists(same_hash, max_size=40).map(
    lambda numbers: [ormsgpack.Ext(1, from_int(number)) for number in numbers]
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
        patch.setattr(bounds, "_COMPARISONS", most)
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
    if changed != bytes(payload):
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


@pytest.mark.parametrize("kind", range(KIND_COMPRESSED + 1, KIND_MASK + 1))
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(SerializationError, match="unknown kind: damaged, or from a newer release"):
        DEFAULT.decode(b"", kind)


def test_the_upper_half_of_the_flags_is_the_stores() -> None:
    for value in (b"abc", "abc", 1, 1.5, None, True, False, [1]):
        payload, flags = DEFAULT.encode(value)
        assert DEFAULT.decode(bytes(payload), flags | 0xF0) == value
