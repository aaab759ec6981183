"""`DiskCache` from opening to closing: configuration, statistics, read-only, pickled."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calls import NOT_CALLS
from helpers import LARGE, SEGMENT, Clock, Make, noise, open_apart, run_python, tree

from yatagarasu_cache import (
    ClosedError,
    ConfigurationError,
    DiskCache,
    FormatError,
    PickleSerializer,
    ReadOnlyError,
    SerializationError,
)

pytestmark = pytest.mark.usefixtures("core")


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
    "set if": lambda c: c.set("k", 1, if_version=5),
    "set stream if": lambda c: c.set("k", iter([b"x"]), if_version=5),
    "add": lambda c: c.add("k", 1),
    "touch": lambda c: c.touch("k"),
    "incr": lambda c: c.incr("n"),
    "decr": lambda c: c.decr("n"),
    "modify": lambda c: c.modify("k", lambda n: n + 1),
    "setdefault": lambda c: c.setdefault("k", 1),
    "pop": lambda c: c.pop("k"),
    "delete": lambda c: c.delete("k"),
    "delete if": lambda c: c.delete("k", if_version=5),
    "__getitem__": lambda c: c["k"],
    "__setitem__": lambda c: c.__setitem__("k", 1),
    "__delitem__": lambda c: c.__delitem__("k"),
    "__contains__": lambda c: "k" in c,
    "get_many": lambda c: c.get_many(["k"]),
    "get_many none": lambda c: c.get_many([]),
    "set_many": lambda c: c.set_many({"k": 1}),
    "set_many none": lambda c: c.set_many({}),
    "update": lambda c: c.update({"k": 1}),
    "delete_many": lambda c: c.delete_many(["k"]),
    "delete_many none": lambda c: c.delete_many([]),
    "__len__": lambda c: len(c),
    "__iter__": lambda c: list(c),
    "keys": lambda c: list(c.keys()),
    "items": lambda c: list(c.items()),
    "values": lambda c: list(c.values()),
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
    "get_or_set": lambda c: c.get_or_set("k", lambda: 1),
    "get_or_set missing": lambda c: c.get_or_set("missing", lambda: 1, expire=5, stale=5),
    "lock": lambda c: c.lock("k"),
    "view": lambda c: c.view("k"),
    "set_meta": lambda c: c.set_meta("k", 1),
    "semaphore": lambda c: c.semaphore("k", 2),
    "throttle": lambda c: c.throttle(5, 1),
}
CHANGES = [
    "set", "set stream", "set large", "set if", "set stream if", "add", "touch", "incr", "decr", "modify",
    "setdefault", "pop", "delete", "delete if", "__setitem__", "__delitem__", "set_many", "set_many none",
    "update", "delete_many", "delete_many none", "evict", "delete_prefix", "expire", "cull", "clear", "flush",
    "check fix", "get_or_set missing", "lock", "semaphore", "throttle", "set_meta",
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
