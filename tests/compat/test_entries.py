"""`Cache` as diskcache's documentation describes it: keys, values, expiry, tags, order."""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import at_most

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import DiskCache, FormatError, SerializationError, ValueTooLarge
from yatagarasu_cache.compat.diskcache.core import ENOVAL, UNKNOWN, args_to_key, full_name

Make = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int


KEYS = [
    "", "a", "ä", b"", b"a", 0, -5, 2**62, 2**70, 1.5, None, True, (), ("a", 1), (1, (2, None)), [1, 2], {"a": [1]},
    frozenset({1}), Point(1, 2), Decimal("1.5"), "x" * 70_000, tuple(range(30_000)), b"y" * 100_000,
]  # fmt: skip
VALUES = [
    None, True, 0, 2**80, 1.5, "", "ä" * 40_000, b"", b"x" * 50_000, bytearray(b"abc"), [1, [2]], {"a": (1, 2)}, {1, 2},
    Point(1, 2), collections.Counter("aab"), Decimal("1.5"), len, Point, b"x" * 2_000_000,
]  # fmt: skip


def short(value: Any) -> str:
    return repr(value)[:20]


@pytest.mark.parametrize("key", KEYS, ids=short)
def test_any_key(cache: dc.Cache, make: Make, key: Any) -> None:
    assert key not in cache and cache.get(key) is None and cache.get(key, 5) == 5
    cache[key] = "value"
    assert key in cache and cache[key] == "value" and list(cache) == [key] and len(cache) == 1
    assert list(cache.iterkeys()) == [key] and cache.peekitem() == (key, "value")
    assert type(next(iter(cache))) is type(key)
    other = make()  # another handle, as a process that comes later
    assert other[key] == "value" and list(other) == [key]
    assert other.pop(key) == "value" and key not in cache and len(cache) == 0
    with pytest.raises(KeyError):
        cache[key]
    with pytest.raises(KeyError):
        del cache[key]
    assert cache.add(key, 1) and not cache.add(key, 2) and cache.incr(key) == 2
    assert cache.delete(key) and not cache.delete(key)


@pytest.mark.parametrize("value", VALUES, ids=short)
def test_any_value(cache: dc.Cache, make: Make, value: Any) -> None:
    for key in ("k", [1]):
        cache[key] = value
        for one in (cache, make()):
            back = one[key]
            assert back == value and type(back) is type(value)
            assert one.get(key, expire_time=True, tag=True) == (value, None, None)
    assert cache.peekitem()[1] == value and cache.pop("k") == value


def test_what_cannot_be_pickled_says_so(cache: dc.Cache) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        cache["k"] = lambda: None
    assert "k" not in cache


def test_numbers_that_are_equal_are_one_key(cache: dc.Cache) -> None:
    cache[1] = "one"
    assert cache[1.0] == "one" and True not in cache
    cache[1.0] = "uno"
    assert cache[1] == "uno" and len(cache) == 1


def test_a_disk_cache_on_the_same_directory(cache: dc.Cache, place: Path) -> None:
    cache.set("a", [1, {"b": 2}], expire=100, tag="t")
    with DiskCache(place) as plain:
        assert plain["a"] == [1, {"b": 2}]
        entry = plain.get_entry("a")
        assert entry is not None and entry.tag == "t" and entry.expires is not None
        plain.set("mine", "value")
    assert cache["mine"] == "value" and set(cache) == {"a", "mine"}


def test_order_is_that_of_insertion(cache: dc.Cache, make: Make) -> None:
    for key in "dbca":
        cache[key] = key
    cache["b"] = 5
    cache.touch("d", 100)
    cache.incr("b")
    assert list(cache) == list("dbca") == list(make()) and list(reversed(cache)) == list("acbd")
    del cache["d"]
    cache["d"] = 1
    assert list(cache) == list("bcad") and cache.peekitem() == ("d", 1) and cache.peekitem(last=False) == ("b", 6)
    assert list(cache.iterkeys()) == list("abcd") and list(cache.iterkeys(reverse=True)) == list("dcba")
    keys = [b"x", "y", 5, 1.5, ("t",)]
    cache.clear()
    for key in keys:
        cache[key] = 0
    assert list(cache.iterkeys()) == [1.5, 5, "y", b"x", ("t",)]


def test_expiry(cache: dc.Cache) -> None:
    now = time.time()
    assert cache.set("k", 1, expire=100, tag="t")
    value, expires, tag = cache.get("k", expire_time=True, tag=True)
    assert value == 1 and tag == "t" and now + 99 < expires < now + 102
    assert cache.get("k", expire_time=True)[0] == 1 and cache.get("k", tag=True) == (1, "t")
    assert cache.get("none", 7, expire_time=True, tag=True) == (7, None, None)
    with mock.patch("time.time", mock.Mock(return_value=now + 200)):
        assert cache.get("k") is None and "k" not in cache and not cache.touch("k") and not cache.delete("k")
        assert len(cache) == 1 and list(cache) == ["k"]
        with pytest.raises(KeyError):
            cache["k"]
        assert cache.add("k", 2, expire=100) and cache["k"] == 2
        assert cache.expire() == 0
    assert cache.expire(now + 301) == 1 and len(cache) == 0


def test_touch(cache: dc.Cache) -> None:
    cache.set("k", 1, expire=5)
    assert cache.touch("k", 100) and not cache.touch("none", 5)
    with mock.patch("time.time", mock.Mock(return_value=time.time() + 10)):
        assert cache["k"] == 1 and cache.touch("k")
    assert cache.get("k", expire_time=True) == (1, None)


def test_counters(cache: dc.Cache) -> None:
    assert cache.incr("n") == 1 and cache.incr("n", 5) == 6 and cache.decr("n", 2) == 4 and cache["n"] == 4
    assert cache.incr("new", 2, default=10) == 12 and cache.decr("down") == -1
    with pytest.raises(KeyError):
        cache.incr("none", default=None)
    cache.set("x", 1, expire=100, tag="t")
    cache.incr("x")
    assert cache.get("x", expire_time=True, tag=True)[1:] != (None, None) and cache.evict("t") == 1
    cache["text"] = "a"
    with pytest.raises(TypeError):
        cache.incr("text")


def test_tags(cache: dc.Cache) -> None:
    for n in range(10):
        cache.set(n, n, tag=("even", "odd")[n % 2] if n else None)
    assert cache.evict("even") == 4 and cache.evict("none") == 0 and set(cache) == {0, 1, 3, 5, 7, 9}
    cache.drop_tag_index()
    assert cache.tag_index == 0
    cache.create_tag_index()
    assert cache.tag_index == 1 and cache.evict("odd") == 5


def test_files(cache: dc.Cache, tmp_path: Path) -> None:
    for size in (0, 10, 100_000, 3_000_000):
        data = os.urandom(size)
        (tmp_path / "in").write_bytes(data)
        with open(tmp_path / "in", "rb") as file:
            cache.set("file", file, read=True, tag="t")
        assert cache["file"] == data and cache.get("file", tag=True) == (data, "t")
        with cache.read("file") as reader:
            assert reader.read(5) == data[:5] and reader.name
            with open(reader.name, "rb") as copy:
                assert copy.read() == data
            assert reader.read() == data[5:]
        reader, expires = cache.get("file", read=True, expire_time=True)
        with reader:
            assert reader.read() == data and expires is None
    cache.set([1], io.BytesIO(b"odd key"), read=True)
    assert cache[[1]] == b"odd key"
    with cache.read([1]) as reader:
        assert reader.read() == b"odd key"
    cache["plain"] = b"short"
    assert cache.get("plain", read=True) == b"short"
    cache["long"] = b"x" * 40_000
    with cache.get("long", read=True) as reader:
        assert reader.read() == b"x" * 40_000
    with pytest.raises(KeyError):
        cache.read("none")


def test_pop(cache: dc.Cache) -> None:
    cache.set("k", "v", expire=100, tag="t")
    value, expires, tag = cache.pop("k", expire_time=True, tag=True)
    assert (value, tag) == ("v", "t") and expires > time.time()
    assert cache.pop("k") is None and cache.pop("k", 5, tag=True) == (5, None)
    cache["n"] = 1
    taken: list[Any] = []
    threads = [threading.Thread(target=lambda: taken.append(cache.pop("n"))) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(taken, key=str) == [1] + [None] * 7


def test_statistics(cache: dc.Cache, make: Make) -> None:
    cache["k"] = 1
    cache.get("k")
    assert cache.stats() == (0, 0)
    for _ in range(3):
        cache.get("k")
    cache.get("none")
    assert make().stats(reset=True) == (3, 1) and cache.stats(enable=False) == (0, 0)
    cache.get("k")
    assert cache.stats(enable=False) == (0, 0)
    counting = make(statistics=True)
    counting.get("k")
    assert counting.stats() == (1, 0) and counting.statistics == 1


def test_settings_are_kept_with_the_cache(make: Make) -> None:
    cache = make(size_limit=10**6, eviction_policy="least-recently-used", cull_limit=3, disk_min_file_size=5, mine="x")
    for one in (cache, make()):
        assert (one.size_limit, one.eviction_policy, one.cull_limit, one.mine) == (10**6, "least-recently-used", 3, "x")
        assert one.disk.min_file_size == 5 and one.sqlite_journal_mode == "wal"
    assert make(size_limit=2 * 10**6).size_limit == 2 * 10**6 and cache.size_limit == 10**6
    assert cache.reset("size_limit") == 2 * 10**6 == cache.size_limit
    assert cache.reset("cull_limit", 0) == 0 and make().cull_limit == 0
    cache.reset("cull_limit", 5, update=False)
    assert cache.cull_limit == 5 and make().cull_limit == 0
    with pytest.raises(ValueError, match="eviction_policy is 'mine'"):
        cache.reset("eviction_policy", "mine")
    assert cache.eviction_policy == "least-recently-used"
    for name, value in dc.DEFAULT_SETTINGS.items():
        assert getattr(make(directory=None), name) == value


@pytest.mark.parametrize(
    ("policy", "left"), [("least-recently-stored", "34567"), ("least-recently-used", "24567"), ("least-frequently-used", "24567")]
)
def test_what_is_too_much_goes_by_the_policy(make: Make, policy: str, left: str) -> None:
    cache = make(eviction_policy=policy, size_limit=5 * 300_000 + 200_000, cull_limit=1)
    for n in "1234":
        cache[n] = os.urandom(300_000)
    for _ in range(3):
        cache.get("2")
    for n in "567":
        cache[n] = os.urandom(300_000)
        if policy == "least-frequently-used":
            cache.get(n), cache.get("4")
    assert set(cache) == set(left) or policy == "least-frequently-used" and "2" in cache and len(cache) == 5
    assert cache.volume() <= cache.size_limit


def test_nothing_goes_without_a_policy_or_a_limit(make: Make) -> None:
    for settings in ({"eviction_policy": "none"}, {"cull_limit": 0}):
        cache = make(directory=None, size_limit=10**6, **settings)
        for n in range(8):
            cache[n] = os.urandom(300_000)
        assert len(cache) == 8 and cache.volume() > 2 * 10**6
        culled = cache.cull()
        assert culled == (0 if settings == {"eviction_policy": "none"} else 5) and len(cache) == 8 - culled


def test_life(make: Make, place: Path) -> None:
    cache = make()
    cache["k"] = 1
    cache.close()
    cache.close()
    assert cache["k"] == 1  # opened again
    with cache as same:
        assert same is cache
    back = pickle.loads(pickle.dumps(cache))
    assert back["k"] == 1 and back.directory == str(place) and back.timeout == 60
    back.close()
    with dc.Cache() as temporary:
        assert os.path.basename(temporary.directory).startswith("diskcache-")
    assert cache.clear() == 1 and len(cache) == 0 and list(cache) == [] and cache.check() == []


def test_what_there_is_not_says_what_to_use(cache: dc.Cache, tmp_path: Path) -> None:
    for name in ("_sql", "_con", "_sql_retry"):
        with pytest.raises(NotImplementedError, match="no SQLite"):
            getattr(cache, name)
    with pytest.raises(NotImplementedError, match="no files of their own"):
        cache.disk.filename()
    with pytest.raises(ValueError, match="disk"):
        dc.Cache(tmp_path / "x", disk=object)  # type: ignore[arg-type]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("x")
    with pytest.raises(FormatError):
        dc.Cache(tmp_path / "foreign")


def test_memoize(cache: dc.Cache) -> None:
    calls: list[Any] = []

    @cache.memoize(expire=100, tag="t", ignore={"verbose", 1})
    def work(a: int, b: int = 0, **options: Any) -> Any:
        """What it does."""
        calls.append(a)
        return a

    assert work(1) == work(1) == work(1, 5) == 1 and work(1, verbose=True) == 1 and calls == [1]
    assert work(2, more=1) == 2 and calls == [1, 2] and work.__doc__ == "What it does."
    key = work.__cache_key__(1)  # type: ignore[attr-defined]
    assert key == (f"{__name__}.{work.__qualname__}", 1, None) and cache[key] == 1
    assert cache.evict("t") == 2 and work(1) == 1 and calls == [1, 2, 1]
    typed = cache.memoize("name", typed=True)(lambda x: calls.append(x) or x)
    assert typed(1) == typed(1) == 1 and typed(1.0) == 1.0 and len(calls) == 5
    never = cache.memoize(expire=0)(lambda: calls.append(0))
    never(), never()
    assert len(calls) == 7
    with pytest.raises(TypeError, match="name cannot be callable"):
        cache.memoize(work)  # type: ignore[arg-type]


def test_helpers() -> None:
    assert args_to_key(("f",), (1, 2), {"b": 3, "a": 4}, False, {0}) == ("f", 2, None, "a", 4, "b", 3)
    assert args_to_key(("f",), (1,), {"a": 2.0}, True, ()) == ("f", 1, None, "a", 2.0, int, float)
    assert full_name(test_helpers) == f"{__name__}.test_helpers" and repr(ENOVAL) == "ENOVAL"
    assert pickle.loads(pickle.dumps(UNKNOWN)) == UNKNOWN != ENOVAL


class Upper(dc.Disk):
    """With a say in everything."""

    def put(self, key: Any) -> Any:
        return super().put(pickle.dumps(key))

    def get(self, key: Any, raw: bool) -> Any:
        return pickle.loads(super().get(key, raw))

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> Any:
        return super().store(value if read else pickle.dumps((key, value)), read, key=key)

    def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
        data = super().fetch(mode, filename, value, read)
        return data if read else pickle.loads(data)[1]


class Watching(dc.Disk):
    """Which sees pickles on their way out."""

    seen: list[Any] = []

    def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
        self.seen.append((mode, value))
        return super().fetch(mode, filename, value, read)


@pytest.mark.parametrize("disk", [Upper, dc.JSONDisk, Watching])
def test_disks_of_ones_own(make: Make, disk: Any) -> None:
    cache = make(disk=disk, disk_min_file_size=0)
    items = {"a": 1, "b": [1, {"c": None}], "d": "x" * 50_000, "e": 1.5}
    for key, value in items.items():
        cache.set(key, value, tag="t", expire=100)
    for one in (cache, make(disk=disk)):
        assert {key: one[key] for key in one} == items and list(one.iterkeys()) == sorted(items)
        assert one.get("b", tag=True) == ([1, {"c": None}], "t") and one.peekitem() == ("e", 1.5)
    assert cache.pop("a") == 1 and "a" not in cache and cache.add("a", 2) and not cache.add("a", 3)
    cache.set("file", io.BytesIO(b"data"), read=True)
    with cache.read("file") as reader:
        assert reader.read() == b"data"
    assert cache.push("in a queue") == 500000000000000 and cache.pull() == (500000000000000, "in a queue")
    assert len(cache) == 5 and cache.evict("t") == 3


def test_a_disk_sees_plain_pickles(make: Make) -> None:
    cache = make(disk=Watching)
    Watching.seen.clear()
    cache["k"] = Point(1, 2)
    assert cache["k"] == Point(1, 2)
    [(mode, value)] = Watching.seen
    assert mode == 4 and pickle.loads(value) == Point(1, 2)


def test_json_disk_options(make: Make) -> None:
    cache = make(disk=dc.JSONDisk, disk_compress_level=6)
    cache[["a", 1]] = {"x": [1, None]}
    assert cache.disk.compress_level == 6 and cache[["a", 1]] == {"x": [1, None]}  # type: ignore[attr-defined]
    assert list(cache) == [["a", 1]] and make(disk=dc.JSONDisk)[["a", 1]] == {"x": [1, None]}


@pytest.mark.parametrize("seconds", [float("inf"), sys.maxsize, 1e300, 8.6e13])
def test_what_expires_in_ages_is_there(cache: dc.Cache, seconds: float) -> None:
    assert cache.set("k", 1, expire=seconds) and cache.add("l", 2, expire=seconds) and cache.touch("k", seconds)
    assert cache.push(3, expire=seconds) == 500000000000000
    assert cache.expire(now=seconds) == 0 and cache.cull() == 0 and len(cache) == 3
    value, expires = cache.get("k", expire_time=True)
    assert value == 1 and expires > time.time() + 1e9
    assert cache.set("k", 1, expire=-seconds) and cache.get("k") is None


@pytest.mark.parametrize("limit", [float("inf"), 1e9, 2**70])
def test_limits_may_be_any_numbers(make: Make, limit: float) -> None:
    cache = make(size_limit=limit)
    cache["k"] = 1
    assert make()["k"] == 1 and make().size_limit == limit


def test_what_is_opened_is_counted_once(cache: dc.Cache) -> None:
    cache.stats(enable=True)
    cache.set("file", io.BytesIO(b"x" * 100_000), read=True)
    cache.set("small", io.BytesIO(b"x"), read=True)
    for key in ("file", "small"):
        with cache.read(key) as file, cache.get(key, read=True) as again:
            assert file.read() == again.read()
    assert cache.get("none", read=True) is None and cache.stats() == (4, 1)


def test_what_has_expired_by_the_clock_of_a_test_is_counted_anew(cache: dc.Cache) -> None:
    clock = time.time()
    with at_most(20), mock.patch("time.time", lambda: clock):
        cache.set("n", 5, expire=100, tag="t")
        clock += 200
        assert cache.incr("n") == 1 and cache.get("n", expire_time=True, tag=True) == (1, None, None)


def doubled(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value, value]
    return value


def test_what_is_shared_in_a_value_stays_so(cache: dc.Cache) -> None:
    row, text = [0] * 3, "x" * 12_000
    for key in ("k", frozenset({1})):  # stored without its key, and with it
        for shared in (row, {}, set(), bytearray(b"a")):
            cache[key] = [shared, {"deep": (shared,)}]
            one, other = cache[key]
            assert one == shared and one is other["deep"][0]
        cache[key] = doubled([], 22)
        found = cache[key]
        assert found[0] is found[1] and found[0][0] is found[1][1]
        cache[key] = [{"id": n, "doc": text} for n in range(10_000)]
        assert cache.volume() < 1_000_000 and cache[key][9_999] == {"id": 9_999, "doc": text}
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    cache["k"] = cyclic
    assert (found := cache["k"])[0] is found


def test_what_is_not_shared_is_for_the_codec(cache: dc.Cache, place: Path) -> None:
    word = "short"
    plain = [[], [], {}, (), (), 1, 1, None, None, word, word, {"a": word}, {"a": word}, "x" * 300]
    cache["plain"] = plain
    with DiskCache(place) as store:
        assert store.get("plain") == plain


def test_a_value_is_looked_through_however_deep_it_is(cache: dc.Cache) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):  # as pickle says
        cache["deep"] = deep


class Word(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Level(enum.IntEnum):
    LOW = 3


def test_tags_are_what_they_are_derived_from(cache: dc.Cache) -> None:
    tags = [
        (Word("w"), "w"), (Level.LOW, 3), (True, 1), (bytearray(b"b"), b"b"), (memoryview(b"m"), b"m"),
        (float("nan"), None), (2.5, 2.5), (1.0, 1.0),
    ]  # fmt: skip
    for given, stored in tags:
        assert cache.set("k", 1, tag=given) and cache.push("item", tag=given)
        found = cache.get("k", tag=True)[1]
        assert found == stored and type(found) is type(stored)
        assert cache.evict(given) == (0 if stored is None else 2)


def test_equal_numbers_are_one_tag(cache: dc.Cache) -> None:
    for tag in (1, 1.0, True, 0, 2.0**53):
        for number, other in enumerate((1, 1.0, True, 0.0, False, 2**53, "1", b"1", 10**400, float("inf"))):
            cache.set(number, 0, tag=other)
        equal = sum(other == tag for other in (1, 1.0, True, 0.0, False, 2**53))
        assert cache.evict(tag) == equal
    with pytest.raises(SerializationError, match="tag: it takes"):
        cache.set("k", 1, tag="x" * 70_000)


@pytest.mark.parametrize("kind", [dc.Cache, dc.FanoutCache])
def test_what_is_larger_than_the_cache_is_culled_at_once(make: Make, kind: Any, caplog: Any) -> None:
    cache, large = make(kind, size_limit=10**6), b"x" * (60 << 20)
    for value in (large, [large[:-1]], large.decode()):
        cache["a"] = 1
        assert cache.set("a", value) is True and "a" not in cache
        assert cache.add("b", value) is True and "b" not in cache
    cache["a"] = 1
    assert cache.set("a", io.BytesIO(large), read=True) is True and "a" not in cache
    assert len([record for record in caplog.records if "not kept" in record.getMessage()]) == 1


def test_what_is_too_large_for_a_queue_is_culled_at_once(make: Make) -> None:
    cache = make(size_limit=10**6)
    first = cache.push("first")
    assert cache.push(b"x" * (60 << 20)) == first + 1 and len(cache) == 1
    assert cache.pull() == (first, "first") and cache.pull() == (None, None)


def test_what_is_too_large_is_said_where_nothing_is_evicted(make: Make) -> None:
    cache = make()
    with mock.patch.object(cache._entries, "put_plain", side_effect=ValueTooLarge("of 2 GiB")):
        assert cache.set("a", 1) is True
        for name, value in (("cull_limit", 0), ("eviction_policy", "none")):
            before = getattr(cache, name)
            cache.reset(name, value)
            with pytest.raises(ValueTooLarge):
                cache["a"] = 1
            cache.reset(name, before)


@pytest.mark.parametrize("value", ["text", "x" * 50_000, 5, 1.5, b"abc", b"x" * 50_000], ids=short)
def test_read_is_for_files(make: Make, value: Any) -> None:
    class Own(dc.Disk):
        pass

    for cache in (make(), make(disk=Own)):
        for key in ("q", frozenset({1})):
            assert cache.set(key, value, read=True) is True and cache[key] == value
        key = cache.push(value, read=True)
        assert cache.pull() == (key, value)


def test_readers_have_descriptors_and_a_mode(cache: dc.Cache) -> None:
    for size in (5, 3_000_000):
        data = os.urandom(size)
        cache.set("file", io.BytesIO(data), read=True)
        with cache.read("file") as file:
            assert file.mode == "rb" and file.read(2) == data[:2]
            fd = file.fileno()
            assert os.pread(fd, size, 0) == data and file.fileno() == fd
            assert file.read(2) == data[2:4]
        with pytest.raises(ValueError, match="closed"):
            file.fileno()
        file = cache.read("file")
        done = subprocess.run([sys.executable, "-c", "import sys; print(len(sys.stdin.buffer.read()))"],
                              stdin=file, capture_output=True, check=True)  # fmt: skip
        assert int(done.stdout) == size
        with open(file.name, "rb") as again:
            assert again.read() == data


def test_an_item_can_be_deleted_by_its_method(cache: dc.Cache) -> None:
    cache["a"] = 1
    assert cache.__delitem__("a") is True


def test_directories_may_be_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "b")
    for kind in (dc.Cache, dc.FanoutCache, dc.Index, lambda path: dc.Deque(directory=path)):
        one = kind(path)
        assert one.directory == os.fsdecode(path)
        (one if hasattr(one, "close") else one.cache).close()


def test_what_is_known_of_a_cache_are_attributes(make: Make) -> None:
    cache = make(statistics=1)
    cache["a"] = b"x" * 1000
    assert cache["a"] and cache.get("none") is None
    assert (cache.count, cache.size, cache.hits, cache.misses) == (0, 0, 0, 0)  # as it was opened
    later = make()
    assert (later.count, later.hits, later.misses) == (1, 1, 1) and later.size >= 1000
    assert cache.reset("count") == 1 == cache.count
    policies = dc.EVICTION_POLICY
    assert [name for name in policies if policies[name]["get"]] == ["least-recently-used", "least-frequently-used"]
    assert [name for name in policies if not policies[name]["cull"]] == ["none"]


@pytest.mark.parametrize("kind", [dc.Cache, dc.FanoutCache])
def test_a_setting_that_was_never_set(make: Make, kind: Any) -> None:
    cache = make(kind, mine=3)
    assert cache.reset("mine") == 3 == cache.mine and cache.reset("mine", 4) == 4 == make(kind).reset("mine")
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown"):
            cache.reset("unknown")
        assert cache.reset("unknown", 4) == 4  # an attribute of the object: it is not kept
    if kind is dc.FanoutCache:
        with pytest.raises(ValueError, match="shards"):
            kind(cache.directory, shards=0)
        with pytest.raises(AttributeError, match="count"):
            cache.count  # noqa: B018


def test_settings_that_are_given_are_no_cause_for_a_warning(make: Make, place: Path, caplog: Any) -> None:
    make(size_limit=10**9)
    make(size_limit=2 * 10**9).reset("size_limit", 3 * 10**9)
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    DiskCache(place, eviction="none").close()
    assert [one.levelname for one in caplog.records if "change for all" in one.getMessage()] == ["WARNING"]
