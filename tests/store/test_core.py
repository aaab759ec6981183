"""The compiled core against its reference in Python: same results, same bytes, same way out of trouble."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from helpers import ROOT, Clock, noise, run_python
from hypothesis import example, given
from hypothesis import strategies as st

from yatagarasu_cache import CacheIOError, DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f

pytestmark = [pytest.mark.usefixtures("apart"), pytest.mark.compiled]  # each handle stands for a process

try:
    module: Any = importlib.import_module("yatagarasu_cache._core")
except ImportError:
    if os.environ.get("YATAGARASU_COMPILED_CORE") == "require":
        raise
    pytest.skip("the compiled core was not built", allow_module_level=True)

CORES = ("c", "python")
START = 1_700_000_000 * 10**9


@pytest.fixture(autouse=True)
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever core the rest of the suite runs on, here each test says."""
    monkeypatch.delenv("YATAGARASU_CORE", raising=False)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DiskCache]]:
    """Opens caches with a core, on the threads backend."""
    caches = []

    def open_cache(core: str = "c", name: str = "cache", **options: Any) -> DiskCache:
        monkeypatch.setenv("YATAGARASU_CORE", core)
        cache = DiskCache(tmp_path / name, backend="threads", **options)
        assert cache.stats().core == core
        caches.append(cache)
        return cache

    yield open_cache
    for cache in caches:
        cache.close()


# -- digests and checksums -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [*range(1101), 4096, 65536, 1_000_003])
def test_digests_and_checksums_are_those_of_the_reference(length: int) -> None:
    data = noise(length, length)
    for seed in (0, 1, f.MASK64, length * 0x9E3779B97F4A7C15 & f.MASK64):
        assert module.digest(data, seed) == f.key_digest(data, seed)
        for flags in (0, 7, 0xFF):
            assert module.value_sum(data, seed, flags) == f.value_sum(data, seed, flags)


# -- the same operations, the same bytes -----------------------------------------------------------

KEYS = ["k", b"k", 5, ("a", 1), "é", "long" * 300, "longer" * 900, *range(40)]
key = st.sampled_from(KEYS)
sets = st.tuples(
    st.just("set"), key, st.sampled_from([0, 1, 15, 16, 17, 100, 1000, 4096, 9000, 40_000]),
    st.sampled_from([None, 1, 1000]), st.sampled_from([None, "tag"]),
    st.sampled_from([None, {"a": 1}, "m" * 5000]),
)  # fmt: skip
batches = st.tuples(
    st.just("set many"), st.lists(key, max_size=30), st.sampled_from([0, 15, 100, 5000, 40_000]),
    st.sampled_from([None, 1, 1000]), st.sampled_from([None, "tag"]), st.sampled_from([None, "m" * 5000]),
)  # fmt: skip
others = st.one_of(
    st.tuples(st.just("get"), key),
    st.tuples(st.just("text"), key),
    st.tuples(st.just("delete"), key),
    st.tuples(st.just("touch"), key, st.sampled_from([None, 2])),
    st.tuples(st.just("incr"), st.sampled_from(["n", "m"])),
    st.tuples(st.just("pass"), st.integers(-2, 3)),
    st.tuples(st.just("clear")),
    st.tuples(st.just("reopen")),
)


def perform(operation: tuple[Any, ...], cache: DiskCache, clock: Clock, number: int) -> Any:
    match operation:
        case "set", key, length, expire, tag, meta:
            return cache.set(key, noise(length, number), expire, tag, meta)
        case "set many", keys, length, expire, tag, meta:
            pairs = [(key, noise(length + n, number + n)) for n, key in enumerate(keys)]
            return cache.set_many(pairs, expire, tag, meta)
        case "get", key:
            return cache.get(key)
        case "text", key:
            return cache.set(key, f"{key} {number}")
        case "delete", key:
            return cache.delete(key)
        case "touch", key, expire:
            return cache.touch(key, expire)
        case "incr", key:
            return cache.incr(key)
        case "pass", seconds:
            clock.advance(seconds)
        case ("clear",):
            return cache.clear()
    return None


def content(directory: Path) -> dict[str, bytes]:
    """All files but the locks, whose names and content tell who held them; the index, but which file it is."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    found = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if path.suffix != ".lock" and path.name not in ("lock", "users")
    }
    index = bytearray(found["index"])
    index[f.W_FILE * 8 : (f.W_FILE + 2) * 8] = bytes(16)
    return {**found, "index": bytes(index)}


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo", "none"])
def test_same_results_and_same_bytes(tmp_path: Path, eviction: str) -> None:
    options: dict[str, Any] = {
        "backend": "threads", "eviction": eviction, "segment_size": 32 << 10, "size_limit": 8 << 20,
    }  # fmt: skip
    DiskCache(tmp_path / "empty", **options).close()
    runs = iter(range(1 << 30))

    @given(st.lists(st.one_of(sets, sets, batches, others), min_size=1, max_size=60))
    @example([("set many", list(range(40)), 100, None, None, None)] * 3 + [("reopen",), ("get", 7)])
    @example([("set", n, 100, None, None, None) for n in range(40)])
    @example([("set", "k", 9000, None, None, None)] * 20 + [("get", "k")])
    @example([("set", "k", 10, 1, None, None), ("pass", 2), ("get", "k"), ("set", "k", 9, None, "tag", None)])
    def check(operations: list[tuple[Any, ...]]) -> None:
        place = tmp_path / f"run-{next(runs)}"
        results: dict[str, list[Any]] = {}
        for core in CORES:
            shutil.copytree(tmp_path / "empty", place / core)
            results[core] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("YATAGARASU_CORE", core)
                clock = Clock(patch, START)
                cache = DiskCache(place / core, **options)
                for number, operation in enumerate(operations):
                    if operation == ("reopen",):
                        cache.close()
                        cache = DiskCache(place / core, **options)
                    results[core].append(perform(operation, cache, clock, number))
                results[core].append(cache.stats().process)
                assert cache.check() == []
                cache.close()
        assert results["c"] == results["python"]
        assert content(place / "c") == content(place / "python")
        shutil.rmtree(place)

    check()


@pytest.mark.parametrize("reader", CORES)
@pytest.mark.parametrize("writer", CORES)
def test_written_with_one_and_read_with_the_other(
    opened: Callable[..., DiskCache], writer: str, reader: str
) -> None:
    one, two = opened(writer, segment_size=1 << 20), opened(reader, segment_size=1 << 20)
    for n in range(3000):
        one.set(n % 1000, noise(n % 5000, n), tag=n % 3)
        assert two.get(n % 1000) == noise(n % 5000, n)
    assert one.check() == [] == two.check()


def test_references_are_balanced(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"v" * 100)
    cache.get("k")
    core: Any = cache._store.core
    arguments: list[Any] = ["k", "none", "\ud800", START]
    watched = [None, NotImplemented, *arguments]
    before = [sys.getrefcount(one) for one in watched]
    for _ in range(1000):
        for wanted in arguments[:3]:
            core.get(wanted, START)
            core.get_nowait(wanted, START)
            cache.get(wanted)
        place = core.place("k", START)
        core.accept(place, b"v" * 100, START)
        core.accept(place, b"w" * 100, START)
        core.counted()
        cache.set("k", b"v" * 100)
    after = [sys.getrefcount(one) for one in watched]
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("core", CORES)
def test_hits_and_misses_are_counted_once(opened: Callable[..., DiskCache], core: str) -> None:
    cache = opened(core)
    cache.set("k", b"v")
    cache.set(1, "v")
    for wanted in ("k", "none", 1, 2, b"k", ("k",), "k" * 5000):
        cache.get(wanted)
    cache.get_many(["k", "none"])
    assert (cache.stats().hits, cache.stats().misses) == (3, 6)
    assert (cache.stats().process["hits"], cache.stats().process["misses"]) == (3, 6)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_a_hit_is_a_use(
    opened: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch, core: str, eviction: str
) -> None:
    clock = Clock(monkeypatch, START)
    cache = opened(core, eviction=eviction)
    cache.set("k", b"v")
    store = cache._store
    low, high = f.key_digest(encode_key("k"), store.current.seed)
    first = store.finding.lookup(low, high)
    clock.advance(1)
    assert cache.get("k") == b"v"
    second = store.finding.lookup(low, high)
    assert first is not None and second is not None
    assert second.access == (store.limits.policy.touched(first.access, clock.now))
    assert (second.access == first.access) == (eviction == "fifo")


def test_nowait_gives_the_same(opened: Callable[..., DiskCache]) -> None:
    cache = opened(large_value_size=1 << 20)
    for length in (0, 1, 4096, 32768, 32769, 100_000):
        cache.set(length, noise(length))
        cache.set(str(length), "t" * length)
        cache.get(length)  # opens the segment
        core = cache._store.core
        for wait in (core.get, core.get_nowait):
            assert wait(str(length), START) == (b"t" * length, 1)
            assert wait(length, START) is NotImplemented  # an int is encoded in Python
    assert cache._store.core.get_nowait("none", START) is None


def test_reading_in_two_steps_gives_the_same(opened: Callable[..., DiskCache]) -> None:
    cache = opened(large_value_size=1 << 20)
    core = cache._store.core
    for value in (b"", noise(4096), "t" * 100_000):
        cache.set("k", value)
        whole = cache.get("k")
        assert core.place("k", START)[:2] > (0, -1)
        found = core.get("k", START)
        fd, length, offset = (place := core.place("k", START))[:3]
        data = os.pread(fd, length, offset)
        cache.stats()
        assert core.accept(place, data, START) == found and core.counted() == (1, 0)
        assert whole == value
        for wrong in (data + b"x", data[:-1] + b"\0\0", b"\0" * length if length else b"x"):
            assert core.accept(place, wrong, START) is NotImplemented
        cache.set("k", "something else")  # what was read is the value that was there when it was asked for
        assert core.accept(place, data, START) == found
    cache.set("big", noise(2 << 20))
    for key in ("big", 1, "\ud800", "k" * 5000):
        assert core.place(key, START) is NotImplemented
    cache.stats()
    assert core.place("none", START) is None and core.counted() == (0, 1)
    for arguments in (
        (),
        (place,),
        (place, data),
        (place, "text", START),
        ((1, 2), data, START),
        (place, data, -1),
    ):
        with pytest.raises((TypeError, OverflowError)):
            core.accept(*arguments)
    cache.close()
    assert core.accept(place, data, START) is NotImplemented is core.place("k", START)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("cold", [False, True])
def test_many_at_once_are_each_as_alone(opened: Callable[..., DiskCache], core: str, cold: bool) -> None:
    cache = opened(core, large_value_size=1 << 20)
    stored: dict[Any, Any] = {str(i): noise(i * 37, i) for i in range(200)}
    stored |= {1: "one", ("a", 2): b"tuple", "t": "text", b"b": {"x": [1]}, "big": noise(2 << 20), "": b""}
    cache.set_many(stored)
    cache.set("old", b"gone", expire=1e-9)
    wanted = [*stored, "none", 17, "old", "1"]
    cache.get("1")  # opens the segment
    if cold:
        cache.flush()
        for path in Path(cache.directory).rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
    before = cache.stats()
    assert cache.get_many(wanted) == stored
    after = cache.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (len(stored) + 1, 3)
    assert cache.get_many([]) == {}


def test_reading_in_two_steps_is_a_use(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"v" * 100)
    cache.get("k")
    store = cache._store
    place = store.core.place("k", START)
    cache.set("other", b"v")
    slots = [store.finding.lookup(*f.key_digest(encode_key(key), store.current.seed)) for key in ("k", "other")]
    assert slots[0] is not None and slots[1] is not None and slots[0].access < slots[1].access
    assert store.core.accept(place, b"v" * 100, START) == b"v" * 100
    used = store.finding.lookup(*f.key_digest(encode_key("k"), store.current.seed))
    assert used is not None and used.access > slots[1].access
    cache.delete("k")
    assert store.core.accept(place, b"v" * 100, START) == b"v" * 100
    assert store.finding.lookup(*f.key_digest(encode_key("k"), store.current.seed)) is None


# -- whatever is not plain takes the ordinary path -------------------------------------------------


class Put:
    """Puts below `DiskCache`: everything that the compiled `put` may be told."""

    def __init__(self, cache: DiskCache) -> None:
        self.store = cache._store
        self.core: Any = cache._store.core

    def __call__(self, key: Any, payload: bytes, stop_after: int = -1, **changed: Any) -> Any:
        store = self.store
        with store.locks.appending, store.locks.index:
            pass  # what the last one left is repaired
        with store.locks.appending:
            writer = store.room.writer(len(payload) + 5000)
            given = {"fd": writer.fd, "lock_fd": store.locks.index.fd, "segment": writer.segment, **changed}
            data = encode_key(key)
            result = self.core.put(
                given["fd"], given["segment"], writer.tail, given["lock_fd"],
                changed.get("now", time.time_ns()), (data, payload, 0, 0, b"", b""), stop_after,
            )  # fmt: skip
            if result is NotImplemented or "fd" in changed:
                return result
            entry, end, room, unshown = result
            head = f.Head(*f.RECORD.unpack_from(entry, f.FOOTER_ENTRY.size)[1:])
            assert end == writer.tail + head.record_bytes
            assert room == f.room_for(len(data), len(payload)) >= head.record_bytes + len(entry)
            writer.enlist(writer.tail, entry)
            writer.tail = end
            return entry if unshown is None else unshown


def test_what_stands_in_the_way_of_the_index(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"old")
    cache.set("big", bytes(2 << 20))
    put, store = Put(cache), cache._store
    words = store.current.index.words
    with store.locks.appending:
        store.room.writer(100_000)  # so that no put below has to ask for it

    def refused(key: str = "k", **changed: Any) -> tuple[Any, ...]:
        before = bytes(store.current.index.map)
        result = put(key, b"new", **changed)
        assert type(result) is tuple
        after = bytearray(store.current.index.map)
        clock = slice(f.W_CLOCK * 8, f.W_CLOCK * 8 + 8)
        after[clock] = before[clock]
        assert bytes(after) == before
        return result

    assert type(put("k", b"new")) is bytes
    assert cache.get("k") == b"new"
    refused("big")  # the large file has to go
    refused(lock_fd=-1)  # not locked
    low, high = f.key_digest(encode_key("fresh"), store.current.seed)
    words[f.W_DELETED + high % f.PARTITIONS] = f.MASK64 >> 1  # removed at a later time
    refused("fresh")
    words[f.W_DELETED + high % f.PARTITIONS] = 0
    at = store.finding.find(*f.key_digest(encode_key("k"), store.current.seed))
    stamp = words[at + f.S_STAMP]
    words[at + f.S_STAMP] = f.MASK64 >> 1  # something later is there
    refused()
    words[at + f.S_STAMP] = stamp
    live = words[f.W_LIVE_BYTES]
    words[f.W_LIVE_BYTES] = 0  # a count that can't be
    refused()
    words[f.W_LIVE_BYTES] = live
    epoch = words[f.W_EPOCH]
    words[f.W_EPOCH] = f.MASK64 >> 1  # a checkpoint that covers later ones
    refused()
    words[f.W_EPOCH] = epoch
    entry = store.current.index.entry(store.active.writer.segment)  # type: ignore[union-attr]
    state = words[entry]
    words[entry] = f.SEALED | store.active.writer.segment  # type: ignore[union-attr]
    refused()  # others took the segment
    words[entry] = state
    assert type(put("k", b"newest")) is bytes
    assert cache.get("k") == b"newest"


def test_a_record_left_to_the_ordinary_path_is_shown_by_it(opened: Callable[..., DiskCache]) -> None:
    """Growth, a large value replaced, a segment lost: `set` succeeds all the same."""
    cache = opened()
    core: Any = cache._store.keyed
    results = []

    def noted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            results.append(method(*arguments))
            return results[-1]

        return call

    core._put, core._set = noted(core._put), noted(core._set)
    cache.set("big", bytes(2 << 20))
    cache.set("big", b"small")
    for n in range(500):
        cache.set(n, b"%d" % n)
    assert [cache.get(n) for n in range(500)] == [b"%d" % n for n in range(500)]
    assert cache.get("big") == b"small"
    assert NotImplemented in results
    assert {type(result[3]) for result in results if result is not NotImplemented} == {type(None), tuple}
    store = cache._store
    assert store.active.writer is not None
    segment, tail = store.active.writer.segment, store.active.writer.tail
    with store.locks.index:  # as if this handle were believed dead
        store.current.index.set_state(segment, f.SEALED)
        store.current.index.resize_segment(segment, tail)
    cache.set("k", b"v")
    assert cache.get("k") == b"v"
    with store.locks.index:
        store.current.index.resize_segment(segment, os.stat(store.files.segments.path(segment)).st_size)
    assert cache.check() == []


def test_not_plain_at_all(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    put, core = Put(cache), cache._store.core
    assert put("k" * 4001, b"") is NotImplemented
    assert put("k", b"", segment=1 << 32) is NotImplemented
    cache.set("k" * 4001, b"long key", tag="t" * 3000, meta="m" * 3000)
    assert cache.get("k" * 4001) == b"long key"
    cache.set("view", memoryview(b"abc"))
    cache.set("array", bytearray(b"abc"))
    assert cache.get("view") == cache.get("array") == b"abc"
    assert core.get("lone \ud800", START) is NotImplemented
    cache.set("lone \ud800", b"v")
    assert cache.get("lone \ud800") == b"v"
    cache.set("big", bytes(2 << 20))
    assert core.get("big", START) is NotImplemented
    assert cache.get("big") == bytes(2 << 20)
    cache.close()
    assert core.get("view", START) is NotImplemented


def test_a_wrong_byte_is_no_hit(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"v" * 5000)
    assert cache.get("k") == b"v" * 5000
    store = cache._store
    slot = store.finding.lookup(*f.key_digest(encode_key("k"), store.current.seed))
    assert slot is not None and store.active.writer is not None
    os.pwrite(store.active.writer.fd, b"w", slot.offset + slot.head_bytes + 77)
    assert store.core.get("k", START) is NotImplemented
    assert cache.get("k") is None
    assert cache.stats().corrupt == 1


def test_damaged_slots_and_descriptors(opened: Callable[..., DiskCache]) -> None:
    """No word of the index sends the core outside of it."""
    cache = opened()
    cache.set("k", b"value")
    cache.get("k")
    store = cache._store
    words, core = store.current.index.words, store.core
    low, high = f.key_digest(encode_key("k"), store.current.seed)
    at = store.finding.find(low, high)
    for word in (at + f.S_PLACE, at + f.S_LENGTHS, at + f.S_SUM, f.W_PARTITIONS + high % f.PARTITIONS):
        was = words[word]
        flipped = (was ^ 1 << bit for bit in (3, 16, 20, 24, 40, 63))
        for value in (0, 1, f.MASK64, f.MASK64 >> 1, 5 << 24, 1 << 60, *flipped):
            words[word] = value
            assert core.get("k", START) in (None, NotImplemented)
            assert core.get("other", START) in (None, NotImplemented)
        words[word] = was
    assert core.get("k", START) == b"value"


@pytest.mark.parametrize("way", ["set", "set_many"])
@pytest.mark.parametrize("size", [100, 5000])
def test_failed_writes_raise_and_change_nothing(
    opened: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch, size: int, way: str
) -> None:
    """Where no room can be made."""
    cache = opened()
    cache.set("k", b"old")
    store = cache._store
    assert store.active.writer is not None
    tail, fd = store.active.writer.tail, store.active.writer.fd
    file = store.files.segments.path(store.active.writer.segment)
    full = os.open("/dev/full", os.O_RDWR)
    try:
        store.active.writer.fd = full
        monkeypatch.setattr(store.room, "_make_room", lambda need, made: False)
        with pytest.raises(CacheIOError) as caught:
            if way == "set":
                cache.set("k", bytes(size))
            else:
                cache.set_many({"k": bytes(size), "other": bytes(size)})
        assert caught.value.errno == errno.ENOSPC
        assert store.active.writer.tail == tail == os.stat(file).st_size
    finally:
        store.active.writer.fd = fd
        os.close(full)
    assert cache.get("k") == b"old"
    cache.set("k", b"new")
    assert cache.get("k") == b"new"
    assert cache.check() == []


@pytest.mark.parametrize("meta", [None, 1])
def test_an_interruption_leaves_a_segment_that_can_be_read(
    opened: Callable[..., DiskCache], meta: Any
) -> None:
    """An exception out of nowhere, as a signal handler's: nobody writes over what may be installed."""
    cache = opened()
    cache.set("a", b"1")
    cache.set("b", b"old")
    core: Any = cache._store.keyed
    name = "_set" if meta is None else "_put"
    put = getattr(core, name)

    def interrupted(*arguments: Any) -> Any:
        put(*arguments)
        raise KeyboardInterrupt

    setattr(core, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.set("b", b"2" * 100, meta=meta)
    setattr(core, name, put)
    cache.set("c", b"3")
    expected = {"a": b"1", "b": b"2" * 100, "c": b"3"}
    assert cache.get_many(list("abc")) == expected
    cache.close()
    os.unlink(os.path.join(cache.directory, "index"))
    assert opened().get_many(list("abc")) == expected


def test_short_writes_are_resumed(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source = ROOT / "csrc" / "core.c"
    (tmp_path / "short.c").write_text(SHORT_WRITES.replace("CORE", str(source)))
    binary = str(tmp_path / "short")
    command = [compiler, "-std=c11", f"-I{source.parent}", str(tmp_path / "short.c"), "-o", binary]
    built = subprocess.run(command, capture_output=True, text=True)
    if "xxhash.h" in built.stderr:
        pytest.skip("no xxhash.h")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([binary, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"abc" * 3 + b"defgh" * 2


SHORT_WRITES = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static ssize_t some_at_once(int fd, const struct iovec *vector, int count, off_t offset);
static ssize_t some(int fd, const void *bytes, size_t length, off_t offset);
#define pwritev some_at_once
#define pwrite some
#include "CORE"
#undef pwritev
#undef pwrite
void yc_xxh3_avx2_update(void *state, const void *data, uint64_t length)
{
    (void)state, (void)data, (void)length;
}
uint64_t yc_xxh3_avx2(const void *data, uint64_t length, uint64_t seed)
{
    (void)data, (void)length;
    return seed;
}
/* Two bytes at most, an interruption now and then; nothing at all for descriptor 99. */
static ssize_t some_at_once(int fd, const struct iovec *vector, int count, off_t offset)
{
    static int calls;
    if (fd == 99)
        return 0;
    if (++calls % 3 == 0) {
        errno = EINTR;
        return -1;
    }
    while (count && !vector->iov_len)
        vector++, count--;
    return pwrite(fd, vector->iov_base, vector->iov_len < 2 ? vector->iov_len : 2, offset);
}
static ssize_t some(int fd, const void *bytes, size_t length, off_t offset)
{
    struct iovec vector = {(void *)(uintptr_t)bytes, length};
    return some_at_once(fd, &vector, 1, offset);
}
int main(int count, char **names)
{
    (void)count;
    char a[] = "abcabcabc", b[] = "defghdefgh", none[1];
    struct iovec vector[4] = {{a, 9}, {none, 0}, {b, 10}, {none, 0}}, one = {a, 9};
    int fd = open(names[1], O_RDWR | O_CREAT, 0600);
    return write_all(fd, vector, 4, 5) || write_all(99, &one, 1, 0) != -EIO ||
           write_all(-1, &one, 1, 0) != -EBADF;
}
"""


# -- many at once, and large values ----------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
def test_get_many_is_get_of_each(opened: Callable[..., DiskCache], cold: bool) -> None:
    """Hits, misses, other keys and values, also when the segments were not open, or not in memory."""
    cache = opened(segment_size=64 << 10)
    values: dict[Any, Any] = {f"k{n}": noise(n * 37 % 5000, n) for n in range(300)}
    values |= {b"bytes": b"b", "text": "t", 7: b"int", "long": bytes(15 << 10), "dict": {"a": (1, 2)}}
    cache.set_many(values)
    cache.set("expired", b"v", expire=0.001)
    cache.close()
    cache = opened(segment_size=64 << 10)
    if cold:
        for path in (Path(cache.directory) / "segments").iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    time.sleep(0.002)
    keys = [*values, "missing", "expired", "k5", "k" * 2000]
    before = cache.stats()
    assert cache.get_many(keys) == values
    after = cache.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (len(values) + 1, 3)
    found = cache._store.core.get_many(keys, time.time_ns())
    assert found[keys.index(7)] is NotImplemented  # an int is encoded in Python
    assert found[keys.index("text")] == (b"t", 1)
    with pytest.raises(TypeError):
        cache._store.core._core.get_many(("k1",), START)  # type: ignore[attr-defined]


def test_get_many_of_damage(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set_many((f"k{n}", b"v" * 5000) for n in range(10))
    store = cache._store
    slot = store.finding.lookup(*f.key_digest(encode_key("k3"), store.current.seed))
    assert slot is not None and store.active.writer is not None
    os.pwrite(store.active.writer.fd, b"w", slot.offset + slot.head_bytes + 77)
    assert sorted(cache.get_many([f"k{n}" for n in range(10)])) == [f"k{n}" for n in range(10) if n != 3]
    assert cache.stats().corrupt == 1


@pytest.mark.parametrize("length", [0, 1, 240, 4096, 1 << 20, (2 << 20) - 1, 2 << 20, 5_000_001])
def test_whole_files(tmp_path: Path, length: int) -> None:
    """The sums themselves: see test_chunks."""
    value, seed = noise(length, length), 0x1234_5678_9ABC_DEF0
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        sums = module.write_file(fd, (value,), seed)
        assert os.pread(fd, length + 1, 0) == value
        for _ in range(5):
            assert module.read_chunks(fd, 0, length, seed, 0) == (value, sums)
        assert module.read_chunks(fd, 0, length + 1, seed, 0) is None
        os.truncate(fd, length // 2)
        assert length == 0 or module.read_chunks(fd, 0, length, seed, 0) is None
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        module.read_chunks(-1, 0, length + 1, seed, 0)
    with pytest.raises(OSError, match="No space left"):
        full = os.open("/dev/full", os.O_RDWR)
        try:
            module.write_file(full, (value, b"x"), seed)
        finally:
            os.close(full)


# -- removing --------------------------------------------------------------------------------------


def test_what_stands_in_the_way_of_a_removal(opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"old")
    cache.set("big", bytes(2 << 20))
    core: Any = cache._store.core
    store = cache._store
    words = store.current.index.words

    fd, log = store.changes.opened
    entry = store.current.index.entry(log)

    def remove(key: str = "k", **changed: Any) -> Any:
        given = {"fd": fd, "segment": log, "lock_fd": store.locks.index.fd, **changed}
        done = core._core.remove(*given.values(), encode_key(key), *store.active.own_end, START * 2)
        if type(done) is not tuple:
            return done
        existed, size = done
        assert size == f.RECORD_BYTES + f.DIGEST_BYTES
        return existed

    assert remove("none") is None
    words[f.W_ACTIVE] += 1  # somebody may have died while putting it: that it is not there is logged
    assert remove("none") is False
    for word, value in (
        (f.W_BUSY, 1), (f.W_SUPERSEDED, 1), (f.W_EPOCH, f.MASK64 >> 1), (entry, f.SEALED | log),
    ):  # fmt: skip
        was, words[word] = words[word], value
        assert remove("none") is NotImplemented, word
        words[word] = was
    assert remove("none", fd=-1) is NotImplemented
    words[f.W_ACTIVE] -= 1
    assert remove("big") is NotImplemented  # its file has to go
    assert remove(lock_fd=-1) is NotImplemented
    assert remove(segment=1 << 32) is NotImplemented
    at = store.finding.find(*f.key_digest(encode_key("k"), store.current.seed))
    for word, value in (
        (f.W_BUSY, 1), (f.W_SUPERSEDED, 1), (f.W_EPOCH, f.MASK64 >> 1), (f.W_LIVE_BYTES, 0),
        (entry, f.SEALED | log), (f.W_LOG, log + 1), (entry + f.T_TAIL, words[entry + f.T_SIZE] - 80),
        (at + f.S_STAMP, f.MASK64 >> 1),
    ):  # fmt: skip
        was, words[word] = words[word], value
        assert remove() is NotImplemented, word
        words[word] = was
    assert remove(fd=-1) is NotImplemented  # the ordinary path says why
    assert cache.get("k") == b"old"
    assert cache.delete("k") and not cache.delete("k")
    assert cache.get("k") is None
    assert cache.delete("big")
    assert cache.check() == []
    cache.close()
    os.unlink(os.path.join(cache.directory, "index"))
    assert opened().get_many(["k", "big"]) == {}


def test_a_removal_killed_after_every_store(tmp_path: Path, opened: Callable[..., DiskCache]) -> None:
    """The entry is there or it is not, and the next process puts the index in order."""
    first = opened(name="original")
    for n in range(20):
        first.set(n, b"old %d" % n)
    first.close()
    stores = 0
    while True:
        shutil.copytree(tmp_path / "original", tmp_path / f"killed-{stores}")
        cache = opened(name=f"killed-{stores}")
        cache.set(100, b"so that there is a log to write to")
        assert cache.get(5)  # its segment is open then, and the key can be looked at
        store, core = cache._store, cast(Any, cache._store.core)
        words = store.current.index.words
        done = core._core.remove(
            *store.changes.opened, store.locks.index.fd, encode_key(5), *store.active.own_end, time.time_ns(), stores
        )
        assert done == (True, f.RECORD_BYTES + f.DIGEST_BYTES)
        dead = words[f.W_BUSY]
        with store.locks.appending, store.locks.index:
            pass  # as the next process would
        found = cache.get(5)
        assert found in (None, b"old 5")
        assert cache.check() == []
        assert {n for n in range(20) if cache.get(n) == b"old %d" % n} >= set(range(20)) - {5}
        done = found is None and not dead and words[f.W_COUNTERS + f.COUNTERS.index("deletes")] == 1
        cache.close()
        if done:
            break
        stores += 1
    assert stores > 20


# -- killed at every store -------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
def test_killed_after_every_store(tmp_path: Path, opened: Callable[..., DiskCache], fresh: bool) -> None:
    """What a process leaves that dies in the middle of `put` is undone by the next one."""
    first = opened(name="original")
    for n in range(20):
        first.set(n, b"old %d" % n)
    first.set(99, b"removed again, so that there is room")
    first.delete(99)
    first.close()
    wanted, old = (99, None) if fresh else (5, b"old 5")
    stores = 0
    while True:
        shutil.copytree(tmp_path / "original", tmp_path / f"killed-{stores}")
        cache = opened(name=f"killed-{stores}")
        put, words = Put(cache), cache._store.current.index.words
        assert type(put(wanted, b"new", stop_after=stores)) is bytes  # it believes that it is alive
        dead = words[f.W_BUSY]
        shown = cache.get(wanted)
        with cache._store.locks.index:
            assert not words[f.W_BUSY]
        assert cache.get(wanted) in (old, b"new")
        assert shown in (old, b"new", None)
        assert cache.check() == []
        assert [cache.get(n) for n in range(20) if n != 5] == [b"old %d" % n for n in range(20) if n != 5]
        cache.set(wanted, b"newest")
        assert cache.get(wanted) == b"newest"
        finished = words[f.W_WRITTEN]
        cache.close()
        stores += 1
        if stores > 14 and not dead and shown == b"new" and finished:
            break
    assert 25 < stores < 40


# -- threads, forks, life --------------------------------------------------------------------------


def test_threads_while_the_index_grows_and_the_cache_closes(opened: Callable[..., DiskCache]) -> None:
    cache = opened(segment_size=1 << 20, max_open_files=8)
    stop = threading.Event()
    wrong: list[Any] = []

    def read() -> None:
        n = 0
        while not stop.is_set():
            n = (n * 31 + 7) % 20_000
            try:
                value = cache.get(n)
            except Exception as error:
                wrong.append(error)
                return
            if value is not None and value != b"%d " % n * (n % 600):
                wrong.append(n)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(20_000):
        cache.set(n, b"%d " % n * (n % 600))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) == 20_000


def test_threads_write_at_once(opened: Callable[..., DiskCache]) -> None:
    cache, other = opened(segment_size=1 << 20), opened(segment_size=1 << 20)

    def write(cache: DiskCache, worker: int) -> None:
        for n in range(1500):
            cache.set((worker, n), b"%d-%d" % (worker, n))
            cache.set("shared", b"%d-%d" % (worker, n))

    threads = [threading.Thread(target=write, args=((cache, other)[w % 2], w)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in range(4):
        assert all(cache.get((worker, n)) == b"%d-%d" % (worker, n) for n in range(1500))
    assert cache.get("shared") in [b"%d-1499" % worker for worker in range(4)]
    assert cache.stats().sets == 4 * 3000
    assert cache.check() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_counts_for_itself(tmp_path: Path) -> None:
    run_python(
        """
import os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1], backend="threads")
cache.set("k", b"v")
assert cache.stats().core == "c"
cache.get("k")
pid = os.fork()
if not pid:
    cache.get("k")
    cache.set("child", b"c")
    assert cache.stats().process["hits"] == 1, cache.stats()
    cache.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert cache.get("child") == b"c"
assert cache.stats().hits == 3
""",
        tmp_path / "cache",
    )


def test_a_read_only_cache_is_not_touched(tmp_path: Path, opened: Callable[..., DiskCache]) -> None:
    cache = opened()
    cache.set("k", b"v")
    cache.close()
    before = content(tmp_path / "cache")
    reader = opened(read_only=True)
    assert reader.get("k") == reader.get("k") == b"v"
    assert reader.get("none") is None
    reader.close()
    assert content(tmp_path / "cache") == before


def test_batches_of_slots_and_items(opened: Callable[..., DiskCache]) -> None:
    """What is not as it should be is refused, or left to the ordinary path, and keeps no reference."""
    cache = opened()
    cache.set_many({n: b"v" * n for n in range(10)})
    store = cache._store
    core: Any = store.core._core  # type: ignore[attr-defined]
    writer = store.active.writer
    assert writer is not None
    item = (1, 2, b"sk", b"payload", 0, 0, b"", b"")
    for odd in (
        [],
        [1],
        [item, (1, 2)],
        [(*item[:3], memoryview(b"x"), *item[4:])],
        [(*item[:2], b"s" * 9000, *item[3:])],
    ):
        watched = sys.getrefcount(item)
        found = core.append_many(-1, writer.segment, writer.tail, odd, START) if odd else NotImplemented
        assert found is NotImplemented
        assert sys.getrefcount(item) == watched
    for arguments in ((), (-1, 1, 64, (item,), START), (-1, 1, 64, [(*item[:4], -1, *item[5:])], START)):
        with pytest.raises((TypeError, OverflowError)):
            core.append_many(*arguments)
    with pytest.raises(OSError):
        core.append_many(-1, writer.segment, writer.tail, [item], START)
    slots = bytes(3 * f.SLOT_BYTES)
    assert core.install_many(slots, b"", 3, 0) == 0
    assert core.install_many(slots, b"", 0, 12345) == 0  # of another epoch
    for first in (-1, 4):
        with pytest.raises(ValueError, match="slots"):
            core.install_many(slots, b"", first, 0)
    assert cache.get_many(range(10)) == {n: b"v" * n for n in range(10)}
    assert cache.check() == []


def test_mappings_are_given_back(opened: Callable[..., DiskCache]) -> None:
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")

    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum(line.rstrip().endswith(f"{cache.directory}/index") for line in maps)

    for _ in range(3):
        cache = opened()
        for n in range(2000):
            cache.set(n, b"")
        assert 0 < mapped() <= 2
        cache.close()
        assert mapped() == 0
