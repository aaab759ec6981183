"""`DiskCache`: arguments that are refused, and limits to the byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Make, noise

from yatagarasu_cache import ConfigurationError, DiskCache, SerializationError, StorageFull, ValueTooLarge

pytestmark = pytest.mark.usefixtures("core")


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda c: c.set([], 1), SerializationError, ("key", "list", "str(key)")),
        (lambda c: c.get({}), SerializationError, ("key", "dict", "str(key)")),
        (lambda c: c.set(math.nan, 1), SerializationError, ("key", "NaN", "None or a str")),
        (lambda c: c.set("x" * 70_000, 1), SerializationError, ("key", "65535", "hash")),
        (lambda c: c.set("k", object()), SerializationError, ("value", "object", "serializer")),
        (lambda c: c.add("k", object()), SerializationError, ("value", "object", "serializer")),
        (lambda c: c.set_many({"k": object()}), SerializationError, ("value", "object", "serializer")),
        (lambda c: c.set("k", iter([1])), SerializationError, ("stream", "bytes", "int")),
        (lambda c: c.set("k", 1, tag=[]), SerializationError, ("tag", "list")),
        (lambda c: c.set_many({"k": 1}, tag=[]), SerializationError, ("tag", "list")),
        (lambda c: c.evict([]), SerializationError, ("tag", "list")),
        (lambda c: list(c.entries(tag=[])), SerializationError, ("tag", "list")),
        (lambda c: c.set("k", 1, tag="x" * 70_000), SerializationError, ("tag", "65535")),
        (lambda c: c.set("k", 1, meta=object()), SerializationError, ("meta", "object", "convert")),
        (lambda c: c.set("k", 1, meta=b"x" * (2 << 20)), ValueTooLarge, ("meta", "small")),
        (lambda c: c.set("k", iter([b"x"]), meta=b"x" * (2 << 20)), ValueTooLarge, ("meta", "small")),
        (lambda c: c.set("k", 1, expire="5"), TypeError, ("expire", "seconds", "'5'")),
        (lambda c: c.set("k", 1, expire=True), TypeError, ("expire", "seconds", "True")),
        (lambda c: c.set("k", 1, expire=math.nan), TypeError, ("expire", "seconds", "nan")),
        (lambda c: c.set("k", 1, expire=0), ValueError, ("expire", "more than 0", "delete()")),
        (lambda c: c.set("k", 1, expire=-1), ValueError, ("expire", "more than 0", "delete()")),
        (lambda c: c.set("k", 1, expire=-math.inf), ValueError, ("expire", "more than 0", "delete()")),
        (lambda c: c.touch("k", "x"), TypeError, ("expire", "seconds")),
        (lambda c: c.set_many({"k": 1}, expire=-1), ValueError, ("expire", "delete()")),
        (lambda c: c.add("k", 1, expire=-1), ValueError, ("expire", "delete()")),
        (lambda c: c.incr("k", 1.0), TypeError, ("delta", "int", "float")),
        (lambda c: c.decr("k", "1"), TypeError, ("delta", "int", "str")),
        (lambda c: c.incr("k", True), TypeError, ("delta", "int", "bool")),
        (lambda c: c.incr("k", default="x"), TypeError, ("default", "int", "str")),
        (lambda c: c.decr("k", default=1.5), TypeError, ("default", "int", "float")),
        (lambda c: c.delete_prefix(5), SerializationError, ("prefix", "int", "str, bytes or a tuple")),
        (lambda c: list(c.entries(prefix=5)), SerializationError, ("prefix", "int")),
    ],
)
def test_argument_errors_name_argument_and_remedy(
    cache: DiskCache, call: Callable[[DiskCache], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        call(cache)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size_limt": 1}, ("size_limt", "size_limit")),
        ({"size_limit": 5}, ("size_limit", "262144")),
        ({"eviction": "mru"}, ("eviction", "lru")),
        ({"segment_size": 1 << 20, "size_limit": 1 << 20}, ("segment_size", "quarter")),
        ({"max_value_size": 2 << 20, "size_limit": 1 << 20}, ("max_value_size", "size_limit")),
        ({"default_expire": 0}, ("default_expire", "greater than 0")),
        ({"serializer": 5}, ("serializer", "msgpack")),
    ],
)
def test_option_errors_name_the_option(make: Make, directory: Path, options: Any, words: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(**options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not directory.exists()


# -- limits -----------------------------------------------------------------------------------


def test_meta_and_tag_limits(make: Make) -> None:
    cache = make(size_limit=1 << 20, segment_size=8 << 10)
    biggest = (cache._store.budget.live_limit // 4) - 2000
    cache.set("k", b"v", meta=b"m" * (biggest - 2000))
    cache.set("t", b"v", tag="t" * 60_000)
    for key, tag, size in (("k", None, biggest - 2000), ("t", "t" * 60_000, 0)):
        entry = cache.get_entry(key)
        assert entry is not None
        assert (entry.tag, len(entry.meta or b"")) == (tag, size)
    with pytest.raises(ValueTooLarge, match="meta"):
        cache.set("k", b"new", meta=b"m" * (biggest + 3000))
    assert cache["k"] == b"v"
    assert cache.evict("t" * 60_000) == 1
    assert cache.check() == []


@pytest.mark.parametrize("how", ["set", "add", "stream", "set_many", "file"])
@pytest.mark.parametrize("limit", ["max_value_size", "size_limit"])
def test_too_large_is_refused_before_anything_is_evicted(
    make: Make, tmp_path: Path, how: str, limit: str
) -> None:
    largest = {"max_value_size": 100_000} if limit == "max_value_size" else {}
    cache = make(size_limit=1 << 20, segment_size=16 << 10, **largest)
    for n in range(200):
        cache.set(n, noise(3000, n))
    before, entries, evictions = set(cache), len(cache), cache.stats().evictions
    value = bytes(100_001 if largest else 1 << 20)
    (tmp_path / "value").write_bytes(value)
    with pytest.raises(ValueTooLarge, match=limit) as caught, (tmp_path / "value").open("rb") as file:
        if how == "set":
            cache.set(1, value)
        elif how == "add":
            cache.add("new", value)
        elif how == "set_many":
            cache.set_many({1: value})
        else:
            cache.set(1, file if how == "file" else iter([value]))
    assert "raise it" in str(caught.value) or "raise size_limit" in str(caught.value)
    if how not in ("stream", "file") or largest:  # of a stream without a bound the length is not known before
        assert (set(cache), len(cache), cache.stats().evictions) == (before, entries, evictions)
    assert cache.get(199) == noise(3000, 199)
    assert cache.check() == []


def test_max_value_size_to_the_byte(make: Make, tmp_path: Path) -> None:
    for most in (1, 1000, LARGE, 3 * LARGE):
        cache = make(tmp_path / str(most), size_limit=16 << 20, segment_size=SEGMENT, max_value_size=most)
        cache.set("k", noise(most))
        cache.set("s", iter([noise(most)]))
        assert cache["k"] == cache["s"] == noise(most)
        for value in (noise(most + 1), iter([noise(most), b"x"])):
            with pytest.raises(ValueTooLarge, match="max_value_size"):
                cache.set("k", value)
        with pytest.raises(ValueTooLarge, match="max_value_size"):
            cache.set_many({"k": noise(most + 1)})
        assert cache["k"] == noise(most)


def test_largest_value_that_size_limit_allows(make: Make) -> None:
    cache = make(size_limit=1 << 20, segment_size=8 << 10)
    with pytest.raises(ValueTooLarge) as caught:
        cache.set("k", bytes(1 << 20))
    # Less what the index grows by for the first entry, and what is kept for its further growth; in blocks.
    room = int(str(caught.value).split("has room for ")[1].split(":")[0]) - 9000
    for turn in range(3):
        cache.set("k", noise(room, turn))
        assert cache["k"] == noise(room, turn)
    with pytest.raises(ValueTooLarge):
        cache.set("k", bytes(room + 9000))
    assert cache["k"] == noise(room, 2)
    cache.set("l", noise(room, 9))
    assert cache["l"] == noise(room, 9) and "k" not in cache
    assert cache.check() == []


def test_storage_full_without_eviction(make: Make) -> None:
    cache = make(size_limit=512 << 10, segment_size=8 << 10, eviction="none")
    stored = 0
    with pytest.raises(StorageFull, match="size_limit"):
        for stored in range(10_000):
            cache.set(stored, noise(1000, stored))
    assert stored > 200
    with pytest.raises(StorageFull):
        cache.set("large", iter([noise(20_000)] * 3))
    assert all(cache[n] == noise(1000, n) for n in range(stored))
    assert cache.delete_many(range(stored // 2)) == stored // 2  # deleting makes room
    cache.set("k", noise(1000))
    assert cache["k"] == noise(1000)
    assert cache.stats().evictions == 0
    assert cache.check() == []
