"""`DiskCache`: every public method, on every backend."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import pickle
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Clock, disk_blocks, named, noise, open_apart, run_python, tree

from yatagarasu_cache import (
    AsyncDiskCache,
    ClosedError,
    ConfigurationError,
    DiskCache,
    EntryGone,
    FormatError,
    PickleSerializer,
    ReadOnlyError,
    SerializationError,
    StorageFull,
    ValueTooLarge,
)

Make = Callable[..., DiskCache]

SEGMENT = 64 << 10
LARGE = SEGMENT // 4  # from here a value gets a file of its own


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return repr(left) == repr(right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


# -- values and keys --------------------------------------------------------------------------

VALUES: list[Any] = [
    b"", b"x", b"\0" * 16, "", "text", "日本語 \U0001f426", 0, 1, -1, 2**63, -(2**63) - 1, 10**60, 0.0, -0.0,
    1.5, math.inf, -math.inf, math.nan, True, False, None, [], (), {}, set(), frozenset(), [1, [2, (3, {4})]],
    {"a": 1, 2: (b"x", "y"), (1, 2): None, None: [True]}, (1, "1", b"1", 1.0, True), {1, "a", b"a"},
    frozenset({(1, 2)}), [b"", "", None, 0, False],
]  # fmt: skip

KEYS: list[Any] = [
    "", "a", "日本語", "a" * 60_000, b"", b"a", b"\0\xff", 0, 1, -1, 2**70, 0.5, 1.0, True, False, None, (),
    ("a",), ("a", "b:c"), ("a:b", "c"), (("a",), "b"), (1, 2.0, None, b"x"), "../../etc/passwd", "/abs",
    "nul\0inside", "\U0001f600" * 15_000,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=named)
def test_value_comes_back_as_it_went_in(cache: DiskCache, value: Any) -> None:
    assert cache.set("k", value) is True
    assert same(cache.get("k", "default"), value)
    assert same(cache.get_many(["k"])["k"], value)
    entry = cache.get_entry("k")
    assert entry is not None
    assert same(entry.value, value)
    assert same(cache.pop("k", "default"), value)
    assert cache.get("k", "default") == "default"


@pytest.mark.parametrize(
    "value", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a_b_c")[::2]], ids=named
)
def test_bytes_like_comes_back_as_bytes(cache: DiskCache, value: Any) -> None:
    cache.set("k", value)
    assert same(cache["k"], b"abc")


def test_keys_never_meet(make: Make) -> None:
    cache = make()
    for number, key in enumerate(KEYS):
        cache[key] = number
    assert len(cache) == len(KEYS)
    for number, key in enumerate(KEYS):
        assert cache[key] == number
        assert key in cache
    assert {(type(key), key) for key in cache} == {(type(key), key) for key in KEYS}
    cache.close()
    again = make()
    assert [again[key] for key in KEYS] == list(range(len(KEYS)))
    assert again.check() == []


def test_nothing_is_written_outside_of_the_directory(make: Make, directory: Path) -> None:
    cache = make()
    for key in ("../escape", "/tmp/../escape", "a/b/c", ".."):
        cache.set(key, b"x" * (2 << 20))
        cache.set(key, b"x", tag=key)
    assert os.listdir(directory.parent) == [directory.name]


@pytest.mark.parametrize(
    "length",
    sorted(
        {0, 1, 2, 10 << 20}
        | {16 * n + d for n in (1, 2, 64, 256) for d in (-1, 0, 1)}
        | {
            at + d
            for at in (LARGE, SEGMENT // 2, SEGMENT, 1 << 20)
            for d in (-17, -16, -15, -1, 0, 1, 15, 16, 17)
        }
    ),
)
def test_length(make: Make, directory: Path, length: int) -> None:
    cache = make(size_limit=64 << 20, segment_size=SEGMENT)
    value = noise(length)
    cache.set("before", b"1")
    cache.set("k", value, tag="t")
    cache.set("after", b"2")
    assert len(os.listdir(directory / "large")) == (length >= LARGE)
    for _ in range(2):
        assert cache["k"] == value
        assert cache.get_many(["before", "k", "after"]) == {"before": b"1", "k": value, "after": b"2"}
        with cache.open("k") as file:
            assert file.read() == value
        assert cache.check() == []
        cache.close()
        cache = make(size_limit=64 << 20, segment_size=SEGMENT)
    assert cache.delete("k")
    assert os.listdir(directory / "large") == []
    assert cache.get_many(["before", "k", "after"]) == {"before": b"1", "after": b"2"}


# -- set, get, add, touch, delete, pop --------------------------------------------------------


def test_set_replaces_value_tag_meta_and_expiry(cache: DiskCache) -> None:
    cache.set("k", 1, expire=1000, tag="t", meta={"m": 1})
    cache.set("k", "two")
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta, entry.expires) == ("two", None, None, None)
    assert len(cache) == 1
    assert cache.evict("t") == 0


@pytest.mark.parametrize("before", [10, LARGE - 1, LARGE, 5 * LARGE])
@pytest.mark.parametrize("after", [10, LARGE - 1, LARGE, 5 * LARGE])
def test_replacing_leaves_nothing_behind(make: Make, directory: Path, before: int, after: int) -> None:
    cache = make(size_limit=8 << 20, segment_size=SEGMENT)
    for turn in range(3):
        cache.set("k", noise(before, turn))
        cache.set("k", noise(after, turn + 10))
        assert cache["k"] == noise(after, turn + 10)
        assert len(os.listdir(directory / "large")) == (after >= LARGE)
    assert os.listdir(directory / "tmp") == []
    assert cache.check() == []


def test_get_of_what_is_not_there(cache: DiskCache) -> None:
    default = object()
    assert cache.get("k") is None
    assert cache.get("k", default) is default
    with pytest.raises(KeyError) as caught:
        cache["k"]
    assert caught.value.args == ("k",)


def test_stored_none_is_a_hit(cache: DiskCache) -> None:
    cache["k"] = None
    assert cache.get("k", "default") is None
    assert cache["k"] is None
    assert cache.pop("k", "default") is None
    assert cache.get("k", "default") == "default"


@pytest.mark.parametrize("length", [3, 3 << 20])
def test_add(make: Make, length: int) -> None:
    cache, clock_free = make(), noise(length)
    assert cache.add("k", clock_free, tag="t", meta=1) is True
    assert cache.add("k", b"other") is False
    assert cache.add("k", noise(3 << 20, 1)) is False
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta) == (clock_free, "t", 1)
    assert cache.delete("k")
    assert cache.add("k", b"other") is True
    assert cache["k"] == b"other"
    assert cache.stats().sets == 2
    assert cache.check() == []


def test_add_after_expiry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    for old, new in ((b"old", noise(2 << 20)), (noise(2 << 20, 1), b"new")):
        cache.set("k", old, expire=10)
        assert cache.add("k", new) is False
        clock.advance(10)
        assert cache.add("k", new) is True
        assert cache["k"] == new
        cache.delete("k")
    assert cache.check() == []


def test_touch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    assert cache.touch("k", 5) is False
    cache.set("k", b"v", expire=10, tag="t", meta="m")
    clock.advance(9)
    assert cache.touch("k", 10) is True
    clock.advance(9)
    assert cache["k"] == b"v"
    assert cache.touch("k") is True  # no default_expire: for ever
    clock.advance(1e9)
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta, entry.expires) == (b"v", "t", "m", None)
    assert cache.touch("k", 1) is True
    clock.advance(1)
    assert cache.touch("k", 100) is False  # expired is gone
    assert cache.get("k") is None


def test_touch_lasts(make: Make, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A new time of expiry is in the log: also an index made anew knows it."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("longer", 1, expire=10)
    cache.set("shorter", 1, expire=1000)
    cache.set("forever", 1, expire=10)
    cache.set("again", 1)
    cache.touch("longer", 1000)
    cache.touch("shorter", 10)
    cache.touch("forever", math.inf)
    cache.touch("again", 10)
    cache.set("again", 2)
    cache.close()
    (directory / "index").unlink()
    again = make()
    clock.advance(100)
    assert again.get_many(["longer", "shorter", "forever", "again"]) == {
        "longer": 1,
        "forever": 1,
        "again": 2,
    }


def test_delete(cache: DiskCache) -> None:
    assert cache.delete("k") is False
    cache["k"] = 1
    assert cache.delete("k") is True
    assert cache.delete("k") is False
    assert "k" not in cache
    cache["k"] = 2
    del cache["k"]
    with pytest.raises(KeyError):
        del cache["k"]
    assert len(cache) == 0
    assert cache.stats().deletes == 2


def test_delete_of_expired_is_false(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({"a": 1, "b": 2}, expire=5)
    clock.advance(5)
    assert cache.delete("a") is False
    assert cache.delete_many(["a", "b"]) == 0
    assert cache.pop("b", "gone") == "gone"
    assert len(cache) == 0


def test_pop(cache: DiskCache) -> None:
    cache["k"] = {"a": 1}
    cache["large"] = noise(2 << 20)
    assert cache.pop("k") == {"a": 1}
    assert cache.pop("k") is None
    assert cache.pop("k", 7) == 7
    assert cache.pop("large") == noise(2 << 20)
    assert len(cache) == 0
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.deletes) == (2, 2, 2)


def test_counting(cache: DiskCache) -> None:
    assert cache.incr("n") == 1
    assert cache.incr("n", 41) == 42
    assert cache.decr("n", 2) == 40
    assert cache.decr("m", default=10) == 9
    assert cache.incr("z", 0) == 0
    assert cache.incr("n", 2**80) == 2**80 + 40
    assert cache.decr("n", 2**81) == 40 - 2**80
    assert (cache["n"], cache["m"], cache["z"]) == (40 - 2**80, 9, 0)


def test_counting_keeps_expiry_tag_and_meta(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(default_expire=1000)
    cache.set("n", 5, expire=10, tag="t", meta={"a": 1})
    assert cache.incr("n") == 6
    entry = cache.get_entry("n")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta) == (6, "t", {"a": 1})
    clock.advance(10)
    assert cache.get("n") is None
    assert cache.incr("n") == 1  # begins anew, with the default expiry
    clock.advance(999)
    assert cache["n"] == 1
    clock.advance(1)
    assert "n" not in cache


@pytest.mark.parametrize("value", [b"1", "1", 1.0, True, None, [1], noise(2 << 20)], ids=type)
def test_counting_refuses_what_is_no_integer(cache: DiskCache, value: Any) -> None:
    cache["k"] = value
    for count in (cache.incr, cache.decr):
        with pytest.raises(TypeError, match="not an integer"):
            count("k")
    assert same(cache["k"], value)


def test_counting_without_default(cache: DiskCache) -> None:
    for count in (cache.incr, cache.decr):
        with pytest.raises(KeyError):
            count("k", default=None)
    assert len(cache) == 0


# -- many -------------------------------------------------------------------------------------


def test_many(cache: DiskCache) -> None:
    pairs = {f"k{n}": noise(n * 97 % 5000, n) for n in range(500)}
    assert cache.set_many(pairs) == 500
    assert cache.get_many([*pairs, "missing"]) == pairs
    assert cache.get_many(reversed(list(pairs))) == pairs
    assert cache.get_many([]) == {}
    assert cache.set_many({}) == 0
    assert cache.delete_many([]) == 0
    assert cache.delete_many(["k0", "k0", "k1", "missing"]) == 2
    assert len(cache) == 498
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (1000, 1, 500, 2)


def test_many_with_large_values_and_later_ones_winning(make: Make) -> None:
    cache = make(size_limit=32 << 20, segment_size=SEGMENT)
    pairs = [(n % 7, noise((LARGE - 2) + n % 5 * 3000, n)) for n in range(40)]
    assert cache.set_many(iter(pairs), tag="t", meta="m") == 40
    assert cache.get_many(range(7)) == dict(pairs)
    assert all((entry.tag, entry.meta) == ("t", "m") for entry in cache.entries())
    assert cache.delete_many(range(9)) == 7
    assert cache.check() == []


def test_set_many_checks_before_it_stores(cache: DiskCache) -> None:
    with pytest.raises(SerializationError):
        cache.set_many([("a", 1), ("b", object())])
    with pytest.raises(ValueTooLarge):
        cache.set_many([("a", 1)], meta=b"x" * (2 << 20))
    assert len(cache) == 0


def test_set_many_takes_generators(cache: DiskCache) -> None:
    assert cache.set_many((n, n * n) for n in range(10)) == 10
    assert cache.get_many(n for n in range(10)) == {n: n * n for n in range(10)}
    assert cache.delete_many(n for n in range(5)) == 5


# What is no iterable of keys, or of pairs, and what is said of it.
NO_KEYS: list[Any] = ["abc", b"abc", bytearray(b"abc"), memoryview(b"abc"), 5, None]
NO_ITEMS: list[tuple[Any, type[Exception], str]] = [
    *[(value, TypeError, "items must be a mapping or an iterable") for value in NO_KEYS],
    ([1, 2], TypeError, r"items\[0\] must be a \(key, value\) pair, not int"),
    ([("a", 1), "bc"], TypeError, r"items\[1\] .* not str"),
    ([b"ab"], TypeError, r"items\[0\] .* not bytes"),
    ([{"a": 1, "b": 2}], TypeError, r"items\[0\] .* not dict"),
    ([{1, 2}], TypeError, r"items\[0\] .* not set"),
    ([("a", 1), (1, 2, 3)], ValueError, r"items\[1\] .* more than 2"),
    ([("a",)], ValueError, r"items\[0\] .* it has 1 "),
    ([iter(int, 1)], ValueError, r"items\[0\] .* more than 2"),  # without end
]


def _name(value: Any) -> str:
    """Of a parameter, the same in each process."""
    return type(value).__name__ if isinstance(value, memoryview) else str(value)[:20]


@pytest.mark.parametrize("keys", NO_KEYS, ids=_name)
def test_one_key_is_no_iterable_of_keys(cache: DiskCache, keys: Any) -> None:
    cache.set_many(dict.fromkeys("abc", 1))
    for method in (cache.get_many, cache.delete_many):
        with pytest.raises(TypeError, match=r"^keys must be an iterable of keys, not .*write \[key\]$"):
            method(keys)
    assert len(cache) == 3


@pytest.mark.parametrize(("items", "error", "message"), NO_ITEMS, ids=_name)
def test_what_is_no_pair_is_refused(
    cache: DiskCache, items: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cache.set_many(items)
    assert len(cache) == 0


class Rows:
    """A sequence of the old kind, as which rows of tables come."""

    def __init__(self, *rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, at: int) -> Any:
        return self._rows[at]


def test_pairs_and_keys_of_other_kinds(cache: DiskCache) -> None:
    items: Any = Rows(["a", 1], Rows("b", 2), iter(["c", 3]))
    keys: Any = Rows("a", "b", "c")
    assert cache.set_many(items) == 3
    assert cache.get_many(keys) == {"a": 1, "b": 2, "c": 3}
    assert cache.delete_many({"a": 0, "b": 0}) == 2


def test_errors_of_the_callers_pairs_arrive_as_they_are(cache: DiskCache) -> None:
    def broken() -> Iterator[Any]:
        yield "a"
        raise TypeError("mine")

    for call in (lambda: cache.set_many([broken()]), lambda: cache.get_many(broken())):  # type: ignore[list-item]
        with pytest.raises(TypeError, match="^mine$"):
            call()
    assert len(cache) == 0


def test_it_is_no_sequence(cache: DiskCache) -> None:
    cache[0] = "first"
    with pytest.raises(TypeError, match="not reversible"):
        reversed(cache)


# -- entries ----------------------------------------------------------------------------------


def test_get_entry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set(("a", 1), b"value", expire=60, tag=("t", 2), meta={"etag": "x"})
    written = clock.now / 1e9
    clock.advance(5)
    entry = cache.get_entry(("a", 1))
    assert entry is not None
    assert (entry.key, entry.tag, entry.meta, entry.size) == (("a", 1), ("t", 2), {"etag": "x"}, 5)
    assert entry.created == pytest.approx(written, abs=1e-3)
    assert entry.expires == pytest.approx(written + 60, abs=1e-3)
    assert entry.accessed == pytest.approx(written, abs=1e-3)
    assert "5 bytes" in repr(entry)
    again = cache.get_entry(("a", 1))
    assert again is not None
    assert again.accessed == pytest.approx(written + 5, abs=1e-3)
    assert cache.get_entry("missing") is None
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (2, 1)


@pytest.mark.parametrize("length", [5, 2 << 20])
def test_entry_loads_when_asked(cache: DiskCache, length: int) -> None:
    cache.set("k", noise(length))
    kept, gone, replaced = (cache.get_entry("k") for _ in range(3))
    assert kept is not None and gone is not None and replaced is not None
    assert kept.value == noise(length)
    cache.set("k", b"new")
    with pytest.raises(EntryGone, match="get it again"):
        replaced.value  # noqa: B018
    cache.delete("k")
    with pytest.raises(KeyError):
        gone.value  # noqa: B018
    assert kept.value == noise(length)  # was loaded before


def test_entries(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({("a", n): n for n in range(4)}, tag="x")
    cache.set_many({("b", n): n for n in range(4)}, tag="y")
    cache.set(("a", 0), 0, expire=5, tag="y")
    cache.set("text", 1)

    def keys(**chosen: Any) -> set[Any]:
        return {entry.key for entry in cache.entries(**chosen)}

    assert keys() == {"text", *((a, n) for a in "ab" for n in range(4))}
    assert keys(prefix=("a",)) == {("a", n) for n in range(4)}
    assert keys(tag="y") == {("a", 0), *(("b", n) for n in range(4))}
    assert keys(prefix=("a",), tag="y") == {("a", 0)}
    assert keys(prefix="t") == {"text"}
    clock.advance(5)
    assert keys(tag="y") == {("b", n) for n in range(4)}
    assert {entry.value for entry in cache.entries(prefix=("b",))} == set(range(4))


# -- streams, files, locations ----------------------------------------------------------------


class Trickle(io.RawIOBase):
    """A binary file that gives at most `most` bytes a read."""

    def __init__(self, data: bytes, most: int) -> None:
        self._file, self._most = io.BytesIO(data), most

    def read(self, size: int | None = -1) -> bytes:
        return self._file.read(min(self._most, size if size is not None and size >= 0 else self._most))


class Bare(io.RawIOBase):
    """A file that has its own `read`, and leaves the rest as `io` has it: it does not say that it is readable."""

    def __init__(self, error: Exception | None = None) -> None:
        self._parts, self._error = [b"bare"], error

    def read(self, size: int = -1) -> bytes:
        if self._error is not None:
            raise self._error
        return self._parts.pop() if self._parts else b""


def test_files_that_cannot_be_read_are_refused_with_a_remedy(cache: DiskCache, tmp_path: Path) -> None:
    cache["k"] = "old"
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ValueError, match=r"^value is a closed file: open it for reading \(mode 'rb'\)$"):
        cache.set("k", closed)
    for buffering in (-1, 0):
        with open(tmp_path / "file", "wb", buffering) as file:
            with pytest.raises(ValueError, match="^value is a file that is open for writing only: .*'rb'"):
                cache.set("k", file)
        with pytest.raises(ValueError, match="^value is a closed file"):
            cache.set("k", file, length=3)
    assert cache["k"] == "old"


def test_files_of_the_callers_own_are_just_read(cache: DiskCache, tmp_path: Path) -> None:
    cache.set("k", Bare())
    assert cache["k"] == b"bare"
    with pytest.raises(ValueError, match="^mine$"):
        cache.set("k", Bare(ValueError("mine")))
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"both")
        file.seek(0)
        cache.set("both", file)
    assert (cache["k"], cache["both"]) == (b"bare", b"both")


@pytest.mark.parametrize("length", [0, 1, 15, 16, LARGE - 1, LARGE, LARGE + 1, 3 * SEGMENT, (1 << 20) + 1])
@pytest.mark.parametrize("kind", ["file", "trickle", "iterator", "one", "views"])
def test_set_from_a_stream(make: Make, directory: Path, tmp_path: Path, length: int, kind: str) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    data = noise(length)
    path = tmp_path / "source"
    path.write_bytes(data)
    with path.open("rb") as file:
        source: Any = {
            "file": file,
            "trickle": Trickle(data, 1000),
            "iterator": (data[at : at + 777] for at in range(0, length, 777)),
            "one": iter([b"", data, b""]),
            "views": (memoryview(bytearray(data[at : at + 5000])) for at in range(0, length, 5000)),
        }[kind]
        assert cache.set("k", source, tag="t", meta="m", expire=1000) is True
    assert cache["k"] == data
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.tag, entry.meta, entry.size) == ("t", "m", length)
    assert len(os.listdir(directory / "large")) == (length >= LARGE)
    assert os.listdir(directory / "tmp") == []
    assert cache.check() == []


def test_stream_of_strided_views(cache: DiskCache) -> None:
    cache.set("k", iter([memoryview(b"a_b_c_")[::2], memoryview(bytes(8)).cast("d")]))
    assert cache["k"] == b"abc" + bytes(8)


@pytest.mark.parametrize("good", [10, 3 * SEGMENT])
@pytest.mark.parametrize("failure", ["raises", "text", "number"])
def test_failing_stream_leaves_the_old_value(make: Make, directory: Path, good: int, failure: str) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    cache.set("k", b"old")
    before = cache.volume()

    def parts() -> Iterator[Any]:
        yield noise(good)
        if failure == "raises":
            raise RuntimeError("mine")
        yield "text" if failure == "text" else 5

    with pytest.raises(RuntimeError if failure == "raises" else SerializationError):
        cache.set("k", parts())
    assert cache["k"] == b"old"
    assert os.listdir(directory / "large") == os.listdir(directory / "tmp") == []
    assert cache.volume() == before
    assert cache.check() == []


def test_text_file_is_refused(cache: DiskCache, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x")
    with (tmp_path / "t").open() as file, pytest.raises(SerializationError, match="binary mode"):
        cache.set("k", file)


@pytest.mark.parametrize("length", [0, 1, 1000, 2 << 20])
def test_open(cache: DiskCache, length: int) -> None:
    data = noise(length)
    cache.set("k", data)
    with cache.open("k") as file:
        assert file.readable() and file.seekable() and not file.writable()
        assert file.read() == data
        assert file.read() == b""
        assert file.seek(-min(7, length), os.SEEK_END) == length - min(7, length)
        assert file.read() == data[-7:]
        file.seek(length // 2)
        assert file.tell() == length // 2
        assert file.read(10) == data[length // 2 :][:10]
        assert file.seek(length + 100) == length + 100
        assert file.read() == b""
        with pytest.raises(ValueError):
            file.seek(-1)
        file.seek(0)
        buffer = bytearray(length + 10)
        assert file.readinto(buffer) == length
        assert buffer[:length] == data
    assert file.closed
    with pytest.raises(ValueError):
        file.read()


def test_open_text(cache: DiskCache) -> None:
    cache.set("k", "grün\n日本\n")
    with io.TextIOWrapper(cache.open("k"), encoding="utf-8") as file:
        assert list(file) == ["grün\n", "日本\n"]


@pytest.mark.parametrize("length", [100, 2 << 20])
def test_open_file_outlives_its_entry(cache: DiskCache, length: int) -> None:
    cache.set("k", noise(length))
    with cache.open("k") as file, cache.location("k") as location:
        first = file.read(10)
        cache.set("k", b"new")
        cache.clear()
        assert first + file.read() == noise(length)
        fd, offset, count = location
        assert os.pread(fd, count, offset) == noise(length)
    assert cache.get("k") is None


@pytest.mark.parametrize("value", [1, 1.5, None, True, [b"x"]], ids=named)
def test_open_refuses_what_is_not_bytes(cache: DiskCache, value: Any) -> None:
    cache["k"] = value
    for method in (cache.open, cache.location):
        with pytest.raises(TypeError, match="get()"):
            method("k")
        with pytest.raises(KeyError):
            method("missing")


@pytest.mark.parametrize("length", [0, 1, 5000, (2 << 20) + 13])
def test_location_by_sendfile_to_a_file(cache: DiskCache, tmp_path: Path, length: int) -> None:
    data = noise(length)
    cache.set("other", b"x" * 100)
    cache.set("k", data)
    with (tmp_path / "out").open("wb") as out, cache.location("k") as (fd, offset, count):
        done = 0
        while done < count:
            done += os.sendfile(out.fileno(), fd, offset + done, count - done)
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("length", [1, 5000, (2 << 20) + 13])
def test_location_by_sendfile_to_a_socket(cache: DiskCache, length: int) -> None:
    data = noise(length)
    cache.set("k", data)
    left, right = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while part := right.recv(1 << 16):
            received.extend(part)

    with left, right:
        reader = threading.Thread(target=receive)
        reader.start()
        with cache.location("k") as location:
            fd, offset, count = location
            done = 0
            while done < count:
                done += os.sendfile(left.fileno(), fd, offset + done, count - done)
        left.shutdown(socket.SHUT_WR)
        reader.join()
    assert received == data
    location.close()  # again: nothing happens
    assert location.fd == -1


def _stream_large(cache: DiskCache, megabytes: int) -> None:
    """In a process of its own: the memory that a value of so many MiB takes both ways is bounded."""
    options = pickle.dumps((cache.directory, cache.settings.backend))
    cache.close()
    code = """
import hashlib, pickle, resource, sys
from yatagarasu_cache import DiskCache
directory, backend = pickle.loads(bytes.fromhex(sys.argv[1]))
megabytes = int(sys.argv[2])
block = hashlib.shake_128(b"x").digest(1 << 20)
def parts(sent):
    for n in range(megabytes):
        part = n.to_bytes(8, "little") + block[8:]
        sent.update(part)
        yield part
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with DiskCache(directory, backend=backend, size_limit=4 << 30) as cache:
    cache.set("warm", block * 4)
    with cache.open("warm") as file:
        file.read(1 << 20)
    start = peak()
    sent, got = hashlib.sha256(), hashlib.sha256()
    cache.set("k", parts(sent), length=megabytes << 20)
    with cache.open("k") as file:
        while part := file.read(1 << 20):
            got.update(part)
    assert sent.digest() == got.digest()
    assert cache.get_entry("k").size == megabytes << 20
    print(peak() - start)
"""
    grown = int(run_python(code, options.hex(), megabytes))
    assert grown < 24, f"{grown} MiB"


@pytest.mark.slow
def test_100_mb_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 100)


@pytest.mark.slow
def test_1_gib_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 1024)


def test_64_mib_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 64)


@pytest.mark.slow
def test_100_mb_at_once(cache: DiskCache) -> None:
    value = noise(100 << 20)
    cache.set("k", value)
    assert cache["k"] == value
    assert cache.pop("k") == value
    assert cache.volume() < 80 << 20


# -- mapping ----------------------------------------------------------------------------------


def test_mapping(cache: DiskCache) -> None:
    assert bool(cache)
    assert len(cache) == 0
    assert list(cache) == list(cache.keys()) == []
    cache["a"], cache["b"], cache[1] = 1, 2, 3
    assert len(cache) == 3
    assert set(cache) == set(cache.keys()) == {"a", "b", 1}
    assert "a" in cache and "c" not in cache and True not in cache
    assert {key: cache[key] for key in cache} == {"a": 1, "b": 2, 1: 3}
    assert bool(cache)
    del cache["a"]
    assert set(cache) == {"b", 1}


def test_iterating_while_changing(make: Make) -> None:
    cache = make(size_limit=4 << 20, segment_size=8 << 10)
    cache.set_many({n: noise(200, n) for n in range(1000)})
    seen = []
    for key in cache:
        seen.append(key)
        cache.delete(key)
        cache[f"new{key}"] = noise(200)
    assert len(seen) == len(set(seen))
    assert set(range(1000)) <= set(seen)


def test_in_and_len_count_nothing(cache: DiskCache) -> None:
    cache["a"] = 1
    assert "a" in cache and "b" not in cache
    assert len(cache) == 1
    list(cache)
    list(cache.entries())
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (0, 0)


# -- groups -----------------------------------------------------------------------------------


def test_evict_by_tag(make: Make) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    cache.set_many({n: n for n in range(300)}, tag="even")
    cache.set_many({n: n for n in range(1, 300, 2)}, tag="odd")
    cache.set("none", 0)
    cache.set("nulltag", 0, tag=("even",))
    cache.set("large", noise(LARGE), tag="even")
    assert cache.evict("missing") == 0
    assert cache.evict("even") == 151
    assert set(cache) == {"none", "nulltag", *range(1, 300, 2)}
    assert cache.evict("even") == 0
    assert cache.stats().deletes == 151
    assert cache.stats().evictions == 0
    assert cache.check() == []


def test_evict_none_means_no_tag_of_its_own(cache: DiskCache) -> None:
    cache.set("untagged", 1)
    cache.set("b", 1, tag="None")
    assert cache.evict(None) == 0
    assert len(cache) == 2


def test_delete_prefix(cache: DiskCache) -> None:
    keys = [
        "a",
        "ab",
        "abc",
        "b",
        b"ab",
        ("ab",),
        ("a", "b"),
        ("a", "c", 1),
        ("a",),
        ("ab", "c"),
        "日本",
        "日本語",
    ]
    cache.set_many((key, 1) for key in keys)
    assert cache.delete_prefix("ab") == 2
    assert cache.delete_prefix(("a", "b")) == 1
    assert cache.delete_prefix("日本") == 2
    assert set(cache) == {"a", "b", b"ab", ("ab",), ("a", "c", 1), ("a",), ("ab", "c")}
    assert cache.delete_prefix(("a",)) == 2
    assert cache.delete_prefix(b"") == 1
    assert cache.delete_prefix("") == 2
    assert set(cache) == {("ab",), ("ab", "c")}
    assert cache.delete_prefix(()) == 2
    assert len(cache) == 0


def test_purging_a_bucket(make: Make) -> None:
    """The plan's purge: string keys by their beginning, or tuples by their first part."""
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    for bucket in ("images", "images-small", "docs"):
        for n in range(200):
            cache.set((bucket, f"{n}.png"), noise(100, n))
            cache.set(f"{bucket}/{n}.png", noise(100, n))
    assert cache.delete_prefix(("images",)) == 200
    assert cache.delete_prefix("images/") == 200
    assert len(cache) == 800
    assert cache.check() == []


def test_expire(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({n: n for n in range(500)}, expire=10)
    cache.set_many({n: n for n in range(100)}, expire=20)
    cache.set_many({n: n for n in range(500, 510)})
    cache.set("large", noise(2 << 20), expire=10)
    assert cache.expire() == 0
    clock.advance(10)
    assert len(cache) == 511  # not yet removed, and not to be seen
    assert set(cache) == {*range(100), *range(500, 510)}
    assert 250 not in cache
    assert cache.expire() == 401
    assert len(cache) == 110
    clock.advance(10)
    assert cache.expire() == 100
    assert cache.expire() == 0
    stats = cache.stats()
    assert (stats.expirations, stats.evictions, stats.deletes) == (501, 0, 0)
    assert cache.check() == []


def test_clear(make: Make, directory: Path) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    empty = cache.volume()
    for turn in range(3):
        cache.set_many({n: noise(700, n) for n in range(500)}, tag="t")
        cache.set("large", noise(5 * SEGMENT))
        cache.get(1)
        assert cache.clear() == 501
        assert len(cache) == 0 and list(cache) == [] and cache.get(1) is None
        assert os.listdir(directory / "large") == []
        assert cache.clear() == 0
        assert cache.check() == []
        assert cache.volume() <= empty + 2 * SEGMENT + (128 << 10)  # the log of changes, and the index
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.evictions, stats.deletes) == (turn + 1, turn + 1, 0, 0)
    cache.set("k", 1)
    cache.close()
    (directory / "index").unlink()
    again = make(size_limit=16 << 20, segment_size=SEGMENT)
    assert list(again) == ["k"]


def test_cull_of_a_small_cache_removes_nothing(cache: DiskCache) -> None:
    cache.set_many({n: n for n in range(100)})
    assert cache.cull() == 0
    assert len(cache) == 100


def test_volume_is_what_the_files_take(make: Make, directory: Path) -> None:
    options = {"size_limit": 16 << 20, "segment_size": SEGMENT}
    cache = make(**options)
    for n in range(400):
        cache.set(n, noise(n * 37 % 20_000, n))
    # Beside what is counted there are the tag, settings, and marks of life: a block each.
    others = 4 * 4096
    assert 0 <= cache.volume() + others - disk_blocks(directory) <= SEGMENT + others
    assert cache.volume() == cache.stats().disk_bytes
    cache.close()
    again = make(read_only=True, **options)
    assert 0 <= disk_blocks(directory) - again.volume() <= others


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_flush_and_durability(make: Make, durability: str) -> None:
    cache = make(durability=durability)
    cache.set_many({n: n for n in range(50)})
    cache.set("large", noise(2 << 20))
    assert cache.flush() is None
    cache.set("k", 1)
    cache.delete(1)
    cache.touch(2, 100)
    cache.incr("n")
    assert cache.add("added", noise(2 << 20))
    cache.evict("t")
    cache.flush()
    cache.clear()
    cache.set("k", 2)
    cache.flush()
    cache.close()
    assert make(durability=durability)["k"] == 2


# -- statistics -------------------------------------------------------------------------------


def test_stats(make: Make, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    stats = cache.stats()
    zero = dict.fromkeys(("hits", "misses", "sets", "deletes", "evictions", "expirations", "corrupt"), 0)
    assert stats.process == zero
    assert {name: getattr(stats, name) for name in zero} == zero
    assert stats.hit_ratio == 0.0
    assert stats.entries == 0
    cache.set_many({n: noise(100, n) for n in range(10)})
    cache.set("large", noise(LARGE))
    cache.set("short", 1, expire=1)
    gets = 0
    for key in [*range(12), "large", "short"]:
        cache.get(key)
        gets += 1
    cache.get_many([0, 1, "missing"])
    cache.get_entry(0), cache.get_entry("missing")
    cache.pop(9), cache.pop("missing")
    cache.location(0).close(), cache.open(1).close()
    gets += 9
    cache.delete(8), cache.delete(8)
    clock.advance(1)
    cache.expire()
    stats = cache.stats()
    assert stats.hits + stats.misses == gets
    expected = {
        "hits": 18,
        "misses": 5,
        "sets": 12,
        "deletes": 2,
        "evictions": 0,
        "expirations": 1,
        "corrupt": 0,
    }
    assert stats.process == expected
    assert {name: getattr(stats, name) for name in expected} == expected
    assert stats.hit_ratio == 18 / 23
    assert (stats.entries, stats.size_limit, stats.segments) == (9, 16 << 20, 1)
    assert LARGE < stats.live_bytes < stats.disk_bytes
    assert stats.backend == backend
    assert stats.backend_reason == "asked for by name"
    assert json.loads(json.dumps(stats.as_dict()))["hit_ratio"] == 18 / 23
    cache.close()
    again = make(size_limit=16 << 20, segment_size=SEGMENT)
    stats = again.stats()
    assert stats.process == zero
    assert {name: getattr(stats, name) for name in expected} == expected


@pytest.mark.parametrize("shared", [True, False])
def test_counters_of_two_handles_add_up(make: Make, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    if not shared:
        open_apart(monkeypatch)
    one, two = make(), make()
    one["k"] = 1
    for cache, number in ((one, 3), (two, 4)):
        for _ in range(number):
            cache.get("k"), cache.get("missing")
    two.delete("k")
    assert one.stats().process["hits"] == (7 if shared else 3)
    assert two.stats().process["hits"] == (7 if shared else 4)
    stats = one.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (7, 7, 1, 1)


# -- configuration ----------------------------------------------------------------------------

YAML = """
cache:
  enabled: true
  disk:
    enabled: true
    cache_dir: {directory}
    max_disk_cache_size_mb: 64
    backend: {backend}
    default_expire: 60
"""
TOML = """
[cache.disk]
cache_dir = "{directory}"
max_disk_cache_size_mb = 64
backend = "{backend}"
default_expire = 60
"""


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json", "mapping"])
def test_from_config(directory: Path, tmp_path: Path, backend: str, suffix: str) -> None:
    mapping = {
        "cache_dir": str(directory),
        "max_disk_cache_size_mb": 64,
        "backend": backend,
        "default_expire": 60,
    }
    source: Any = {"cache": {"disk": mapping}}
    if suffix != "mapping":
        text = {"yaml": YAML, "toml": TOML}.get(suffix)
        path = tmp_path / f"config.{suffix}"
        path.write_text(text.format(directory=directory, backend=backend) if text else json.dumps(source))
        source = path
    with DiskCache.from_config(source) as cache:
        assert type(cache) is DiskCache
        assert cache.directory == str(directory)
        assert cache.settings.size_limit == 64 << 20
        assert cache.settings.default_expire == 60
        assert cache.stats().backend == backend
        cache["k"] = 1
        entry = cache.get_entry("k")
        assert entry is not None and entry.expires is not None
    assert cache.closed


def test_from_config_of_a_subclass(directory: Path, backend: str) -> None:
    class Mine(DiskCache):
        pass

    with Mine.from_config({"disk": {"directory": str(directory), "backend": backend}}) as cache:
        assert type(cache) is Mine


def test_from_config_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cache\.disk\.max_disk_cache_size_mb"):
        DiskCache.from_config({"cache": {"disk": {"cache_dir": str(tmp_path), "max_disk_cache_size_mb": -1}}})
    with pytest.raises(ConfigurationError, match="nowhere.yaml"):
        DiskCache.from_config(tmp_path / "nowhere.yaml")
    assert os.listdir(tmp_path) == []


# -- life -------------------------------------------------------------------------------------


def test_context_manager_and_close(directory: Path, backend: str) -> None:
    with DiskCache(directory, backend=backend) as cache:
        assert not cache.closed
        assert backend in repr(cache)
        cache["k"] = 1
    assert cache.closed
    assert "closed" in repr(cache)
    cache.close()
    cache.close()
    with pytest.raises(RuntimeError, match="mine"), DiskCache(directory, backend=backend) as cache:
        raise RuntimeError("mine")
    assert cache.closed
    with DiskCache(directory, backend=backend) as cache:
        assert cache["k"] == 1


def test_closing_leaves_no_descriptor_and_no_thread(directory: Path, backend: str) -> None:
    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with DiskCache(directory, backend=backend) as cache:  # whatever is made once is made now
        cache.set("k", noise(2 << 20))
    before = state()
    for _ in range(3):
        with DiskCache(directory, backend=backend) as cache:
            cache.set_many({n: noise(100) for n in range(100)})
            cache.set("k", noise(2 << 20))
            assert cache.get_many([*range(100), "k"]) is not None
            cache.delete("k")
    assert state() == before


def test_opening_that_fails_leaves_no_descriptor(tmp_path: Path, backend: str) -> None:
    (tmp_path / "foreign").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FormatError):
            DiskCache(tmp_path, backend=backend)
    assert len(os.listdir("/proc/self/fd")) == before


CALLS: dict[str, Callable[[DiskCache], Any]] = {
    "get": lambda c: c.get("k"),
    "set": lambda c: c.set("k", 1),
    "set stream": lambda c: c.set("k", iter([b"x"])),
    "set large": lambda c: c.set("k", bytes(2 << 20)),
    "add": lambda c: c.add("k", 1),
    "touch": lambda c: c.touch("k"),
    "incr": lambda c: c.incr("n"),
    "decr": lambda c: c.decr("n"),
    "pop": lambda c: c.pop("k"),
    "delete": lambda c: c.delete("k"),
    "__getitem__": lambda c: c["k"],
    "__setitem__": lambda c: c.__setitem__("k", 1),
    "__delitem__": lambda c: c.__delitem__("k"),
    "__contains__": lambda c: "k" in c,
    "get_many": lambda c: c.get_many(["k"]),
    "get_many none": lambda c: c.get_many([]),
    "set_many": lambda c: c.set_many({"k": 1}),
    "set_many none": lambda c: c.set_many({}),
    "delete_many": lambda c: c.delete_many(["k"]),
    "delete_many none": lambda c: c.delete_many([]),
    "__len__": lambda c: len(c),
    "__iter__": lambda c: list(c),
    "keys": lambda c: list(c.keys()),
    "entries": lambda c: list(c.entries()),
    "evict": lambda c: c.evict("t"),
    "delete_prefix": lambda c: c.delete_prefix("k"),
    "expire": lambda c: c.expire(),
    "cull": lambda c: c.cull(),
    "clear": lambda c: c.clear(),
    "get_entry": lambda c: c.get_entry("k"),
    "open": lambda c: c.open("k"),
    "location": lambda c: c.location("k"),
    "volume": lambda c: c.volume(),
    "flush": lambda c: c.flush(),
    "check": lambda c: c.check(),
    "check fix": lambda c: c.check(fix=True),
    "stats": lambda c: c.stats(),
}
NOT_CALLS = {"close", "closed", "directory", "settings", "from_config"}
CHANGES = [
    "set", "set stream", "set large", "add", "touch", "incr", "decr", "pop", "delete", "__setitem__",
    "__delitem__", "set_many", "set_many none", "delete_many", "delete_many none", "evict", "delete_prefix",
    "expire", "cull", "clear", "flush", "check fix",
]  # fmt: skip


def test_the_table_of_calls_is_complete() -> None:
    public = {name for name in vars(DiskCache) if not name.startswith("_")}
    special = {"__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__", "__iter__"}
    assert {name.split()[0] for name in CALLS} | NOT_CALLS == public | special
    assert set(CHANGES) <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("read_only", [False, True])
def test_closed(make: Make, name: str, read_only: bool) -> None:
    make()["k"] = 1
    cache = make(read_only=read_only)
    cache.get("k")
    cache.close()
    with pytest.raises((ClosedError, ReadOnlyError) if read_only else ClosedError, match="closed|read_only"):
        CALLS[name](cache)


def test_a_closed_cache_is_not_entered(make: Make) -> None:
    with make() as cache, cache:  # an open one may be, again
        pass
    with pytest.raises(ClosedError, match="open it anew"):
        with cache:
            raise AssertionError("it was entered")


def test_values_that_were_lazy_when_the_cache_was_closed(make: Make) -> None:
    cache = make()
    cache.set_many({"k": 1, "l": 2})
    cache.set("b", b"bytes")
    entry = cache.get_entry("k")
    keys = iter(cache)
    next(keys)
    file, location = cache.open("b"), cache.location("b")
    assert entry is not None
    cache.close()
    with pytest.raises(ClosedError):
        list(keys)
    with pytest.raises(ClosedError):
        entry.value  # noqa: B018
    with file, location:  # these have descriptors of their own
        assert file.read() == b"bytes"
        assert os.pread(location.fd, location.length, location.offset) == b"bytes"


# -- read-only --------------------------------------------------------------------------------


@pytest.fixture
def filled(make: Make) -> Iterator[Make]:
    """Opens, read-only, a cache that holds some of everything."""
    with make(size_limit=16 << 20, segment_size=SEGMENT) as cache:
        cache.set_many({f"k{n}": noise(300, n) for n in range(400)}, tag="t")
        cache.set("k", b"value", tag="t", meta="m")
        cache.set("n", 5)
        cache.set("large", noise(3 * SEGMENT))
        cache.delete("k7")
    yield lambda **options: make(size_limit=16 << 20, segment_size=SEGMENT, read_only=True, **options)


@pytest.mark.parametrize("name", CHANGES)
def test_read_only_refuses(filled: Make, directory: Path, name: str) -> None:
    before = tree(directory)
    cache = filled()
    with pytest.raises(ReadOnlyError, match="read_only"):
        CALLS[name](cache)
    assert cache["k"] == b"value"
    cache.close()
    assert tree(directory) == before


@pytest.mark.parametrize("name", CHANGES)
def test_read_only_refuses_for_missing_keys_too(make: Make, directory: Path, name: str) -> None:
    make().close()
    cache = make(read_only=True)
    with pytest.raises(ReadOnlyError):
        CALLS[name](cache)


def test_read_only_reads_everything_and_changes_nothing(filled: Make, directory: Path) -> None:
    before = tree(directory)
    cache = filled()
    assert cache.get("k") == cache["k"] == b"value"
    assert cache["large"] == noise(3 * SEGMENT)
    assert cache.get("missing", 3) == 3
    assert "k" in cache and "k7" not in cache
    assert len(cache) == len(list(cache)) == 402
    assert cache.get_many(["k1", "k7", "large"]) == {"k1": noise(300, 1), "large": noise(3 * SEGMENT)}
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta) == (b"value", "t", "m")
    assert len(list(cache.entries(tag="t"))) == 400
    with cache.open("large") as file, cache.location("k") as location:
        assert file.read() == noise(3 * SEGMENT)
        assert os.pread(location.fd, location.length, location.offset) == b"value"
    assert cache.check() == []
    assert cache.volume() > 0
    stats = cache.stats()
    assert stats.process["hits"] == 8 and stats.process["misses"] == 2
    assert tree(directory) == before
    cache.close()
    assert tree(directory) == before


@pytest.mark.parametrize("size", [10, LARGE])
def test_nothing_is_used_before_it_was_created(make: Make, size: int) -> None:
    cache = make()
    for n in range(100):
        cache.set(n, noise(size, n), meta=n)
        entry = cache.get_entry(n)
        assert entry is not None and entry.created <= entry.accessed
    cache.set_many(dict.fromkeys(range(100), "text"), tag="t")
    assert all(entry.created <= entry.accessed for entry in map(cache.get_entry, range(100)))


def test_read_only_sees_what_others_write(make: Make, filled: Make) -> None:
    reader = filled()
    with make(size_limit=16 << 20, segment_size=SEGMENT) as writer:
        for n in range(3000):
            writer.set(("new", n), noise(500, n))
            if n % 100 == 0:
                assert reader[("new", n)] == noise(500, n)
        writer.delete("k")
        assert "k" not in reader
    assert reader.get(("new", 2999)) == noise(500, 2999)


def test_read_only_needs_a_cache(make: Make, directory: Path) -> None:
    remedy = "open it once without read_only=True to create the cache"
    with pytest.raises(ReadOnlyError, match=f"does not exist: {remedy}"):
        make(read_only=True)
    assert not directory.exists()
    directory.mkdir()
    with pytest.raises(ReadOnlyError, match=f"is empty: {remedy}"):
        make(read_only=True)
    assert os.listdir(directory) == []


def test_read_only_does_not_rebuild(make: Make, directory: Path, filled: Make) -> None:
    (directory / "index").unlink()
    before = tree(directory)
    with pytest.raises(ReadOnlyError, match="read_only"):
        filled()
    assert tree(directory) == before


def test_damage_seen_read_only_is_a_miss_and_stays(make: Make, directory: Path) -> None:
    with make() as cache:
        cache.set("k", b"a" * 1000)
        cache.set("l", b"b" * 1000)
    segment = next((directory / "segments").iterdir())
    segment.write_bytes(segment.read_bytes().replace(b"a" * 1000, b"a" * 999 + b"x"))
    before = tree(directory)
    cache = make(read_only=True)
    assert cache.get("k", "missing") == "missing"
    assert cache.get_entry("k") is not None
    assert cache["l"] == b"b" * 1000
    assert cache.stats().process["corrupt"] == 1
    with pytest.raises(ReadOnlyError):
        cache.pop("k")
    assert [problem.kind for problem in cache.check()] == ["entry"]
    cache.close()
    assert tree(directory) == before
    with make() as cache:
        assert cache.get("k", "missing") == "missing"
        assert cache.stats().corrupt == 1
        assert cache.check() == []


# -- pickling ---------------------------------------------------------------------------------


def test_pickling(make: Make, backend: str) -> None:
    cache = make(
        size_limit=5 << 20, eviction="fifo", default_expire=60, serializer=PickleSerializer(b"s" * 32)
    )
    cache["k"] = complex(1, 2)
    with pickle.loads(pickle.dumps(cache)) as copy:
        assert type(copy) is DiskCache
        assert copy.directory == cache.directory
        assert (copy.settings.size_limit, copy.settings.eviction) == (5 << 20, "fifo")
        assert copy.settings.default_expire == 60
        assert copy.stats().backend == backend
        assert copy["k"] == complex(1, 2)
        copy["l"] = 2
        assert cache["l"] == 2
    assert cache["k"] == complex(1, 2)


def test_pickled_to_another_process(make: Make) -> None:
    cache = make()
    cache["k"] = 1
    code = """
import pickle, sys
cache = pickle.loads(bytes.fromhex(sys.argv[1]))
print(cache.incr("k", 5))
cache["new"] = "x"
"""
    assert run_python(code, pickle.dumps(cache).hex()) == "6\n"
    assert (cache["k"], cache["new"]) == (6, "x")


def test_pickle_serializer_by_name(make: Make) -> None:
    cache = make(serializer="pickle")
    cache["k"] = value = {"z": complex(1, 2), "r": range(5)}
    assert cache["k"] == value
    cache.close()
    with pytest.raises(SerializationError):
        make().get("k")


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


# -- expiry and the clock ---------------------------------------------------------------------


def test_expiry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("int", 1, expire=2)
    cache.set("float", 1, expire=0.5)
    cache.set("tiny", 1, expire=1e-9)
    cache.set("inf", 1, expire=math.inf)
    cache.set("huge", 1, expire=1e300)
    cache.set("huge int", 1, expire=10**400)
    cache.set("none", 1)
    everything = {"int", "float", "tiny", "inf", "huge", "huge int", "none"}
    assert set(cache) == everything
    clock.advance(1e-9)
    assert set(cache) == everything - {"tiny"}
    clock.advance(0.499999998)
    assert "float" in cache
    clock.advance(1e-9)
    assert "float" not in cache
    clock.advance(1.5)
    assert set(cache) == {"inf", "huge", "huge int", "none"}
    clock.advance(5e9)  # 158 years
    assert set(cache) == {"inf", "huge", "huge int", "none"}


def test_expired_is_gone_for_every_method(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    for key in ("a", "b"):
        cache.set(key, b"x", expire=5, tag="t")
    cache.set("large", noise(2 << 20), expire=5, tag="t")
    entry = cache.get_entry("a")
    clock.advance(5)
    assert cache.get("a") is None and cache.get("large") is None
    assert cache.get_many(["a", "b", "large"]) == {}
    assert "a" not in cache
    assert list(cache) == list(cache.entries()) == []
    assert cache.get_entry("a") is None
    assert not cache.touch("a", 5)
    for method in (cache.open, cache.location, cache.__getitem__, cache.__delitem__):
        with pytest.raises(KeyError):
            method("a")
    assert cache.pop("b", 1) == 1
    assert cache.evict("t") == 0
    assert cache.delete_prefix("a") == 0
    assert entry is not None
    with pytest.raises(EntryGone, match="expired"):
        entry.value  # noqa: B018
    stats = cache.stats()
    assert stats.hits == 1 and stats.misses == 10


def test_default_expire(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(default_expire=10)
    cache["item"] = 1
    cache.set("set", 1)
    cache.set("stream", iter([b"x"]))
    cache.set("longer", 1, expire=20)
    cache.set("forever", 1, expire=math.inf)
    cache.set_many({"many": 1})
    cache.add("add", 1)
    cache.incr("incr")
    cache.set("touched", 1, expire=1)
    cache.touch("touched")
    clock.advance(9.9)
    assert len(list(cache)) == 9
    clock.advance(0.1)
    assert set(cache) == {"longer", "forever"}
    clock.advance(10)
    assert set(cache) == {"forever"}


def test_clock_set_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer still wins, nothing is lost, and an entry lives no longer than it should."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("k", "old")
    cache.set("brief", "old", expire=3600)
    cache.set("l", 1)
    clock.advance(-86400)
    assert cache["k"] == "old" and "brief" not in cache
    cache.set("k", "new")
    cache.delete("l")
    cache.set("l", 2)
    cache.set("short", 1, expire=10)
    assert cache.get_many(["k", "l", "short"]) == {"k": "new", "l": 2, "short": 1}
    clock.advance(10)
    assert "short" not in cache
    cache.close()
    again = make()
    assert again.get_many(["k", "l"]) == {"k": "new", "l": 2}
    again.set("k", "newest")
    again.pop("l")
    assert again.check() == []
    again.close()
    os.unlink(os.path.join(again.directory, "index"))
    rebuilt = make()
    assert rebuilt["k"] == "newest" and "l" not in rebuilt


def test_clock_set_forward_and_back_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("k", 1, expire=60)
    clock.advance(10 * 365 * 86400)
    assert "k" not in cache
    cache.set("future", 1)
    clock.advance(-10 * 365 * 86400)
    assert cache["k"] == 1  # was not removed meanwhile
    for n in range(50):
        cache.set("future", n)
        cache.incr("n")
    assert (cache["future"], cache["n"]) == (49, 50)
    order = [cache.get_entry(key).accessed for key in ("k", "future", "n")]  # type: ignore[union-attr]
    assert order == sorted(order)


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


# -- threads ----------------------------------------------------------------------------------


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """`work(n)` in so many threads at once; the first exception is raised here."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(number)

    def run(n: int) -> None:
        try:
            barrier.wait()
            work(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_count_exactly(cache: DiskCache, switching: None) -> None:
    def work(n: int) -> None:
        for turn in range(200):
            cache.incr("n")
            cache.incr(("n", turn % 3), 2)
            cache.decr("down")

    in_threads(8, work)
    assert cache["n"] == 1600
    assert cache["down"] == -1600
    assert sum(cache[("n", m)] for m in range(3)) == 3200
    assert cache.check() == []


def test_threads_add_and_pop_once(cache: DiskCache, switching: None) -> None:
    won: list[int] = []
    popped: list[Any] = []

    def work(n: int) -> None:
        for turn in range(100):
            if cache.add(turn, n):
                won.append(turn)

    def take(n: int) -> None:
        for turn in range(100):
            value = cache.pop(turn)
            if value is not None:
                popped.append(turn)

    in_threads(8, work)
    assert sorted(won) == list(range(100))
    in_threads(8, take)
    assert sorted(popped) == list(range(100))
    assert len(cache) == 0


def test_threads_read_and_write(make: Make, switching: None) -> None:
    """Readers see a value that was written whole; every get is a hit or a miss."""
    cache = make(size_limit=1 << 20, segment_size=16 << 10)
    gets = [0] * 8

    def work(n: int) -> None:
        random_ = random.Random(n)
        for turn in range(500):
            key = random_.randrange(40)
            choice = random_.randrange(8)
            if choice < 3:
                length = random_.choice((10, 700, 4000, 20_000))
                cache.set(key, (key.to_bytes(2, "little") + bytes([n])) * (length // 3))
            elif choice == 3:
                cache.delete(key)
            elif choice == 4:
                found = cache.get_many(range(key, key + 4))
                gets[n] += 4
                assert all(value[:2] == k.to_bytes(2, "little") for k, value in found.items())
            else:
                value = cache.get(key)
                gets[n] += 1
                if value is not None:
                    assert value == value[:3] * (len(value) // 3) and value[:2] == key.to_bytes(2, "little")
            if turn % 200 == 199:
                cache.evict("missing")

    in_threads(8, work)
    stats = cache.stats()
    assert stats.hits + stats.misses == sum(gets)
    assert stats.corrupt == 0
    assert cache.check() == []
    assert stats.disk_bytes <= stats.size_limit + (16 << 10)


def test_threads_close_in_the_middle(make: Make, switching: None) -> None:
    """Whoever is in the middle gets its result or ClosedError."""
    for turn in range(10):
        cache = make()
        cache.set_many({n: noise(100, n) for n in range(50)})

        def work(n: int, cache: DiskCache = cache, gets: int = turn * 20) -> None:
            calls: list[Callable[[], Any]] = [
                lambda: cache.get(1), lambda: cache.set(2, b"x"), lambda: cache.get_many(range(9)),
                lambda: list(cache), lambda: cache.stats(), lambda: cache.incr("n"),
            ]  # fmt: skip
            try:
                if n == 6:
                    for _ in range(gets):
                        cache.get(1)
                    cache.close()
                while n < 6:
                    calls[n]()
            except ClosedError:
                pass

        in_threads(7, work)
        assert cache.closed
    assert make().check() == []


EQUAL = [(1, True), (0.0, False), ((1,), (True,)), (("a", (2, 1.0)), ("a", (2, 1))), (2**60, 2.0**60)]


@pytest.mark.parametrize("pair", EQUAL)
@pytest.mark.parametrize("name", ["get_many", "set_many", "delete_many"])
def test_keys_that_python_takes_for_one_are_refused_in_a_batch(
    tmp_path: Path, name: str, pair: tuple[Any, Any]
) -> None:
    """A dict can't hold both, and the answer for one would stand under the other. Nothing changes."""

    def batch(keys: Any) -> Any:
        return [(key, "new") for key in keys] if name == "set_many" else keys

    async def refused() -> None:
        async with AsyncDiskCache(tmp_path / "c") as other:
            with pytest.raises(ValueError, match="equal for Python"):
                await getattr(other, name)(batch([pair[0], "x", pair[1]]))
            await getattr(other, name)(batch([pair[0], pair[0], "x"]))

    with DiskCache(tmp_path / "c") as cache:
        for key in pair:
            cache.set(key, repr(key))
        counted = cache.stats().hits, cache.stats().misses
        with pytest.raises(ValueError, match="two batches") as caught:
            getattr(cache, name)(batch(["x", *pair]))
        assert all(repr(key) in str(caught.value) for key in pair)
        assert [cache.get(key) for key in pair] == [repr(key) for key in pair]
        assert (cache.stats().hits - 2, cache.stats().misses) == counted and "x" not in cache
        asyncio.run(refused())


def test_equal_keys_that_are_the_same_key_are_one(cache: DiskCache) -> None:
    cache.set_many([(0.0, "zero"), ("a", 1), ((1, "b"), 2)])
    found = cache.get_many([0.0, -0.0, "a", b"a", "a", (1, "b"), (1, "b"), 7, 7])
    assert found == {0.0: "zero", "a": 1, (1, "b"): 2}
    with pytest.raises(SerializationError):
        cache.get_many([(1, True, []), (1,)])  # type: ignore[list-item]
    assert cache.delete_many([0.0, -0.0, "a", "a"]) == 2
