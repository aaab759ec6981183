"""The compiled core encodes keys as `codec.encode_key` does, or leaves them to that."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from hypothesis import given
from hypothesis import strategies as st

from yatagarasu_cache import DiskCache, SerializationError
from yatagarasu_cache.codec import MAX_KEY_DEPTH, encode_key
from yatagarasu_cache.store.core import SHORT_KEY
from yatagarasu_cache.store.format import RECORD_BYTES

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif("c" not in CORES, reason="the compiled core is not there"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskCache]:
    path: Path = tmp_path_factory.mktemp("keys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YATAGARASU_CORE", "c")
        with DiskCache(path / "cache", backend="threads") as cache:
            yield cache


LONGEST_COMPILED = 4080  # bytes before a value (YC_HEAD_BYTES in core.h)

EDGES = [sign * (1 << bits) + off for bits in range(66) for sign in (1, -1) for off in (-1, 0, 1)]
scalars = (
    st.text(max_size=4) | st.binary(max_size=4) | st.sampled_from(EDGES) | st.integers() | st.floats(allow_nan=False)
    | st.booleans() | st.none() | st.sampled_from([0.0, -0.0, math.inf, -math.inf, "\ud800", "x" * 2000])
)  # fmt: skip
tuples = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5).map(tuple), max_leaves=12)


def is_same(cache: DiskCache, key: Any) -> bool:
    """Whether compiled code finds `key` where it is, and where Python says it is; False if it leaves it alone."""
    cache.set(key, b"value")
    assert cache.get(key) == b"value"  # opens the segment
    core: Any = cache._store.core
    encoded = encode_key(key)
    is_short = len(encoded) <= LONGEST_COMPILED - RECORD_BYTES
    assert core.get_encoded(encoded, time.time_ns()) == (b"value" if is_short else NotImplemented)
    found = core.get(key, time.time_ns())
    assert core.holds(key, time.time_ns()) is (NotImplemented if found is NotImplemented else True)
    assert core.meta(encoded, time.time_ns()) == (b"" if is_short else NotImplemented)
    assert found in (b"value", NotImplemented)
    assert cache.delete(key) and core.get(key, time.time_ns()) in (None, NotImplemented)
    return found is not NotImplemented


@given(tuples)
def test_keys_are_encoded_alike(store: DiskCache, key: Any) -> None:
    is_same(store, key)


def test_every_size_of_number(store: DiskCache) -> None:
    for number in [*EDGES, 0.5, True, False, None, "", b"", ()]:
        fits = type(number) is not int or -(1 << 63) <= number < 1 << 63
        assert is_same(store, ("k", number, number)) == fits


def test_the_longest_and_the_deepest_that_it_encodes(store: DiskCache) -> None:
    for length in range(SHORT_KEY - 40, SHORT_KEY + 10):
        for key in (("x" * length,), (b"x" * length, 1), ("x" * (length - 20), 1.5, None), ((("x" * (length // 2),),), "y" * (length // 2))):  # fmt: skip
            assert not is_same(store, key) or len(encode_key(key)) <= SHORT_KEY
    for length in range(LONGEST_COMPILED - RECORD_BYTES - 20, LONGEST_COMPILED):
        assert not is_same(store, "x" * length)
    assert is_same(store, ("x" * (SHORT_KEY - 4),)) and not is_same(store, ("x" * (SHORT_KEY - 3),))
    key: Any = 1
    for _ in range(MAX_KEY_DEPTH):
        key = (key,)
        assert is_same(store, key)
    for _ in range(1000):
        key = (key,)
        with pytest.raises(SerializationError, match="nested deeper"):
            store.get(key)


def test_what_is_no_key_is_refused_as_ever(store: DiskCache) -> None:
    class Text(str):
        pass

    for part in (math.nan, [], Text("x"), object()):
        for key in ((part,), ("a", (part,))):
            with pytest.raises(SerializationError):
                store.get(key)  # type: ignore[arg-type]
