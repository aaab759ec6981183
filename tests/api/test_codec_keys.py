"""Keys to bytes and back: exactly, or not at all."""

from __future__ import annotations

import decimal
import math
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import SCALARS, STRANGERS, Point, Str, canonical, damage, keys, label, nested

from yatagarasu_cache.codec import MAX_KEY_BYTES, MAX_KEY_DEPTH, decode_key, encode_key, encode_prefix
from yatagarasu_cache.errors import SerializationError

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


@pytest.mark.parametrize(
    "key", [*STRANGERS, *SCALARS, bytearray(b"a"), memoryview(b"a"), [1], {1}, {1: 2}, frozenset()], ids=label
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
