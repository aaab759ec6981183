"""What a cache has of a mapping: `items`, `values`, `setdefault`, `update`."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Clock, Make, in_threads, noise, open_apart, run_python

from yatagarasu_cache import CacheIOError, DiskCache, PickleSerializer, SerializationError, contents
from yatagarasu_cache.store import format as f

SMALL: dict[str, Any] = {"size_limit": 16 << 20, "segment_size": SEGMENT}
CONTENT: dict[Any, Any] = {
    "bytes": b"b", "text": "t", 1: 1, None: None, ("t", 1.5): [1, {2}, {"a": (None,)}], b"large": noise(3 * LARGE),
    "empty": b"", **{("many", n): noise(n * 7 % 900, n) for n in range(300)},
}  # fmt: skip


def fill(cache: DiskCache) -> dict[Any, Any]:
    for key, value in CONTENT.items():
        cache[key] = value
    return CONTENT


# -- items and values -----------------------------------------------------------------------------


def test_what_is_there(core: str, make: Make) -> None:
    cache = make(**SMALL)
    assert list(cache.items()) == [] and list(cache.values()) == []
    content = fill(cache)
    for _ in range(2):
        items = list(cache.items())
        assert dict(items) == content and len(items) == len(content)
        assert [key for key, _ in items] == list(cache.keys()) == list(cache)
        assert list(cache.values()) == [value for _, value in items]
        assert {type(value) for value in cache.values()} == {type(value) for value in content.values()}
        cache.close()
        cache = make(**SMALL)  # descriptors are not open yet


def test_they_are_iterators(cache: DiskCache) -> None:
    cache["k"] = 1
    for iterator in (cache.items(), cache.values(), cache.keys()):
        assert isinstance(iterator, Iterator) and next(iterator) and next(iterator, None) is None
    assert not isinstance(cache, (Mapping, MutableMapping))


@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
def test_nothing_is_counted_or_touched(core: str, make: Make, eviction: str) -> None:
    cache = make(eviction=eviction, **SMALL)
    fill(cache)

    def order() -> list[int]:
        index = cache._store.current.index
        return [index.slot(at).access for at in index.live_slots()]

    before, stats = order(), cache.stats()
    assert len(list(cache.items())) == len(list(cache.values())) == len(CONTENT)
    after = cache.stats()
    assert order() == before and (after.hits, after.misses, after.process) == (stats.hits, stats.misses, stats.process)


def test_what_has_expired_is_left_out(core: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache.set("a", 1, expire=10)
    cache.set("b", 2, expire=20)
    cache.set("c", 3)
    clock.advance(11)
    assert dict(cache.items()) == {"b": 2, "c": 3}
    items = cache.items()
    assert next(items) == ("b", 2)
    clock.advance(10)
    assert list(items) == [("c", 3)]
    items = cache.items()
    cache.set("d", 4)
    assert "b" not in dict(items)


@pytest.mark.parametrize("size", [10, 3 * LARGE])
def test_changes_meanwhile(core: str, make: Make, size: int) -> None:
    """What was read ahead is not given if it is not that any more."""
    cache = make(**SMALL)
    cache.update({n: noise(size, n) for n in range(20)})
    items = cache.items()
    key, value = next(items)
    assert value == noise(size, key)
    left = [n for n in range(20) if n != key]
    cache.delete(left[0])
    cache.set(left[1], "new")
    cache.touch(left[2], 50)
    cache.pop(left[3])
    cache.set(left[3], "again")
    rest = dict(items)
    assert left[0] not in rest
    assert rest.get(left[1], "new") == "new" and rest.get(left[3], "again") == "again"
    assert {n: rest[n] for n in left[2:3] + left[4:]} == {n: noise(size, n) for n in left[2:3] + left[4:]}
    items = cache.items()
    next(items)
    cache.clear()
    assert list(items) == []


def test_moved_meanwhile(core: str, make: Make) -> None:
    cache = make(**SMALL)
    store = cache._store
    content = {n: noise(2000, n) for n in range(100)}
    cache.update(content)
    cache.delete_many(range(0, 100, 2))
    with store.locks.appending:
        store.active.seal()
    items = cache.items()
    found = dict(itertools.islice(items, 5))
    while store.cleaner.clean_emptiest():
        pass
    store.dead.drop_all()
    assert found | dict(items) == {n: content[n] for n in range(1, 100, 2)}


def test_others_write_all_the_while(core: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    open_apart(monkeypatch)
    cache, other = make(**SMALL), make(**SMALL)
    for n in range(200):
        cache.set(("kept", n), n)
    stop = threading.Event()

    def write() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            other.set(("new", n % 50), noise(n % 3 * LARGE, n))
            other.delete(("new", (n + 7) % 50))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(10):
            found = [(key, value) for key, value in cache.items() if key[0] == "kept"]
            assert dict(found) == {("kept", n): n for n in range(200)} and len(found) == 200
    finally:
        stop.set()
        thread.join()


def test_memory_is_bounded(core: str, make: Make) -> None:
    """Batches have few entries, and few bytes; what is larger is read when its turn comes."""
    cache = make(size_limit=64 << 20, segment_size=1 << 20)
    cache.update({n: noise(300_000, n) for n in range(12)})
    cache.update({("small", n): n for n in range(500)})
    cache.update({("large", n): noise(3 << 20, n) for n in range(2)})
    sizes = []
    for batch in cache._contents():
        sizes.append([len(content.now().payload) for content in batch])
    assert sum(map(len, sizes)) == 514
    for batch_sizes in sizes:
        assert len(batch_sizes) <= contents._MOST
        assert sum(batch_sizes) <= contents._MOST_BYTES or len(batch_sizes) == 1


def test_a_value_that_the_serializer_cannot_read(make: Make) -> None:
    class Json:
        name = "json"

        def dumps(self, value: object) -> bytes:
            return b"{}"

        def loads(self, data: bytes) -> object:
            return {}

    cache = make(serializer=PickleSerializer())
    cache["strange"] = {1: object}
    other = make(serializer=Json())
    other["mine"] = 1
    for iterator in (other.items(), other.values()):
        with pytest.raises(SerializationError, match="'strange'.*serializer 'pickle'"):
            list(iterator)


def test_damaged_values_are_left_out(core: str, make: Make, directory: Path) -> None:
    cache = make(**SMALL)
    cache.update({"good": 1, "large": noise(2 * LARGE), "small": noise(500)})
    (file,) = [path for path in (directory / "large").rglob("*") if path.is_file()]
    file.write_bytes(bytes(2 * LARGE))
    slot = cache._store.finding.lookup(*cache._desk.identify("small")[:2])
    with open(directory / "segments" / f.segment_name(slot.segment), "r+b") as segment:
        segment.seek(slot.offset + slot.head_bytes + 5)
        segment.write(b"damage")
    assert dict(cache.items()) == {"good": 1}
    assert cache.stats().corrupt == 2 and cache.check() == []


def test_whoever_only_reads_sees_all(core: str, make: Make) -> None:
    fill(make(**SMALL))
    assert dict(make(read_only=True, **SMALL).items()) == CONTENT


# -- setdefault -----------------------------------------------------------------------------------


def test_setdefault(core: str, make: Make) -> None:
    cache = make(default_expire=70, **SMALL)
    assert cache.setdefault("k", [1], expire=50, tag="t", meta={"m": 1}) == [1]
    assert cache.setdefault("k", [2], expire=5) == [1] == cache["k"]
    entry = cache.get_entry("k")
    assert entry is not None and (entry.tag, entry.meta) == ("t", {"m": 1})
    assert entry.expires is not None and 49 < entry.expires - entry.created < 51
    assert cache.setdefault("none") is None and "none" in cache
    assert cache.setdefault("none", 5) is None  # None is a value
    assert cache.setdefault("large", noise(3 * LARGE)) == noise(3 * LARGE) == cache.setdefault("large", b"")
    assert cache.setdefault("forever", 1, math.inf) == 1 and cache.get_entry("forever").expires is None  # type: ignore[union-attr]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (6, 4, 4)


def test_setdefault_of_what_has_expired(core: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert cache.setdefault("k", 1, expire=10) == 1
    clock.advance(11)
    assert cache.setdefault("k", 2) == 2


def test_wrong_defaults(cache: DiskCache) -> None:
    with pytest.raises(SerializationError):
        cache.setdefault("k", object())
    with pytest.raises(ValueError, match="expire"):
        cache.setdefault("k", 1, expire=0)
    assert "k" not in cache


def test_all_threads_get_the_same(core: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    open_apart(monkeypatch)
    caches = [make(**SMALL), make(**SMALL)]
    for turn, size in enumerate([0, 0, 0, 2 * LARGE, 2 * LARGE]):
        got: list[Any] = []
        in_threads(6, lambda w, t=turn, s=size, g=got: g.append(caches[w % 2].setdefault(t, (w, noise(s)))))
        assert got == [caches[0][turn]] * 6


@pytest.mark.once
def test_all_processes_get_the_same(core: str, directory: Path) -> None:
    code = """
import os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
for turn in range(20):
    children = []
    for name in range(6):
        child = os.fork()
        if not child:
            status = 1
            try:
                cache.set(("got", turn, name), cache.setdefault(turn, name))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert not any(os.waitpid(child, 0)[1] for child in children)
    assert [cache["got", turn, name] for name in range(6)] == [cache[turn]] * 6
print("good")
"""
    assert run_python(code, directory) == "good\n"


def test_setdefault_of_what_cannot_be_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and says so."""
    cache = make(**SMALL)
    monkeypatch.setattr(cache, "get", lambda key, default=None: default)
    cache["k"] = 1
    with pytest.raises(CacheIOError, match="cannot store a default"):
        cache.setdefault("k", 2)


# -- update ---------------------------------------------------------------------------------------


def test_update(core: str, make: Make) -> None:
    cache = make(**SMALL)
    assert cache.update({"a": 1, "b": b"2"}) is None  # type: ignore[func-returns-value]
    cache.update([("b", 3), ["c", 4]], expire=50, tag="t", meta="m")
    cache.update((n, n) for n in range(3))
    cache.update(items={"d": 5})
    cache.update()
    cache.update({})
    assert dict(cache.items()) == {"a": 1, "b": 3, "c": 4, "d": 5, 0: 0, 1: 1, 2: 2}
    assert {entry.key: entry.meta for entry in cache.entries(tag="t")} == {"b": "m", "c": "m"}
    assert all(entry.expires is not None for entry in cache.entries(tag="t"))
    other = make(**SMALL)
    cache.clear()
    cache.update(zip("xy", (1, 2), strict=True))
    other.update(list(cache.items()), tag="copied")
    assert dict(other.items()) == {"x": 1, "y": 2}


def test_wrong_updates(cache: DiskCache) -> None:
    for wrong, kind in (("abc", TypeError), (5, TypeError), (["ab"], TypeError), ([(1,)], ValueError)):
        with pytest.raises(kind):
            cache.update(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cache.update(a=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        cache.update({"a": 1}, 60)  # type: ignore[misc]
    with pytest.raises(ValueError, match="1 and True"):
        cache.update([(1, 1), (True, 2)])
    assert len(cache) == 0
