"""Walks over keys: compiled code gives what the Python code gives, of sound segments and of damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from helpers import Make, in_threads, noise

from yatagarasu_cache import DiskCache
from yatagarasu_cache.codec import encode_prefix
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.core import CompiledCore, PythonCore
from yatagarasu_cache.store.format import Slot
from yatagarasu_cache.store.segment import footer_of

Entries = dict[bytes, Slot]


def walked(cache: DiskCache, prefix: bytes, core: PythonCore | None = None) -> Entries:
    walks = cache._store.walks
    before, walks._core = walks._core, core or walks._core
    try:
        found = list(walks.entries(prefix))
    finally:
        walks._core = before
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def compare(cache: DiskCache, *prefixes: bytes) -> None:
    for prefix in (b"", *prefixes):
        by_core, by_python = walked(cache, prefix), walked(cache, prefix, PythonCore(cache._store.backend))
        assert by_core == by_python
        assert set(by_core) == {key for key in walked(cache, b"") if key.startswith(prefix)}


def filled(make: Make, size: Callable[[int], int], **options: Any) -> DiskCache:
    cache = make(size_limit=64 << 20, segment_size=256 << 10, eviction="none", **options)
    for i in range(1500):
        kind = ("a/", "b/", "a/b/")[i % 3]
        cache.set(f"{kind}{i}", noise(size(i), i), tag=f"t{i % 5}" if i % 2 else None, meta=i if i % 7 == 0 else None)
    for i in range(0, 1500, 4):
        cache.delete(f"{('a/', 'b/', 'a/b/')[i % 3]}{i}")
    for i in range(0, 1500, 10):
        cache.set(f"a/{i}", b"again" * (i % 50), expire=0.000001 if i % 20 else None)
    return cache


SIZES = {
    "without footers": lambda i: i % 300,
    "with footers": lambda i: 3000 + i % 900,
    "with files of their own": lambda i: 70_000 if i % 100 == 0 else 2000,
}


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_the_same_by_both(make: Make, size: Callable[[int], int]) -> None:
    cache = filled(make, size)
    compare(cache, b"sa/", b"sb/1", b"s", b"b", b"sa/b/", b"s" * 50)
    assert len(walked(cache, b"")) == len(cache)
    cache.set("k" * 5000, b"long names take another way", tag="t" * 3000)
    cache.set(("a", 1), b"v")
    compare(cache, b"sk", encode_prefix(("a",)))
    cache.close()
    reading = make(read_only=True)
    compare(reading, b"sa/")


def test_keys_entries_and_delete_prefix(make: Make, core: str) -> None:
    cache = filled(make, lambda i: i % 100)
    keys = set(cache)
    assert keys == set(cache.keys()) == {entry.key for entry in cache.entries()}
    wanted = {key for key in keys if str(key).startswith("a/b")}
    assert {entry.key for entry in cache.entries("a/b")} == wanted
    assert {entry.key for entry in cache.entries("a/b", tag="t1")} == {e.key for e in cache.entries("a/b") if e.tag == "t1"}
    assert cache.delete_prefix("a/b") == len(wanted)
    assert set(cache) == keys - wanted and cache.delete_prefix("a/b") == 0
    assert cache.delete_prefix("") == len(keys - wanted)
    assert list(cache) == []


def damage_something(cache: DiskCache, chance: random.Random, directory: Path) -> None:
    path = chance.choice(sorted((directory / "segments").iterdir()))
    data = bytearray(path.read_bytes())
    at = chance.choice((chance.randrange(len(data)), len(data) - chance.randrange(1, min(2000, len(data)))))
    if chance.random() < 0.3:
        data[at : at + 600] = bytes(len(data[at : at + 600]))
    else:
        data[at] ^= 1 << chance.randrange(8)
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.skipif("c" not in CORES, reason="no compiled core")
@pytest.mark.in_turn
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_the_same_of_damaged_segments(
    make: Make, directory: Path, size: Callable[[int], int], seed: int
) -> None:
    cache = filled(make, size)
    chance = random.Random(seed)
    for _ in range(12):
        damage_something(cache, chance, directory)
        compare(cache, b"sa/")


@pytest.mark.skipif("c" not in CORES, reason="no compiled core")
def test_records_that_are_not_all_there(make: Make) -> None:
    """`walk_records` stops where a record is cut off, wherever that is, and goes on from there."""
    cache = make(backend="threads")
    for i in range(3):
        cache.set(f"k{i}", noise(100, i), tag="t", meta={"m": i})
    store = cache._store
    core = store.core
    assert isinstance(core, CompiledCore) and store.active.writer is not None
    segment = store.active.writer.segment
    data = Path(store.files.segments.path(segment)).read_bytes()
    slots = [store.finding.lookup(*cache._desk.identify(f"k{i}")[:2]) for i in range(3)]
    starts = [slot.offset for slot in slots if slot is not None]
    names = len(b"sk0") + len(b"st") + 4
    for end in range(starts[0], len(data) + 1):
        found, at, looked = core.walk_records(data[:end], 0, starts[0], segment, b"", f.MASK64)
        whole = [start for start in starts if start + f.RECORD_BYTES + names <= end]
        assert looked == len(whole)
        assert [key for key, _ in found] == [f"sk{i}".encode() for i in range(looked)]
        assert at == (starts[looked] if looked < 3 else store.active.writer.tail)
    assert core.walk_records(data, 0, starts[0], segment + 1, b"", f.MASK64)[2] == 0  # of another place
    assert core.walk_records(data, 0, starts[0], segment, b"", 5) == ([], store.active.writer.tail, 3)  # later ones


@pytest.mark.skipif("c" not in CORES, reason="no compiled core")
def test_a_footer_that_lists_what_cannot_be_is_left_to_the_ordinary_way(make: Make, directory: Path) -> None:
    cache = filled(make, SIZES["with footers"])
    store = cache._store
    core = store.core
    segment = next(s for s in store.current.index.segments() if store.current.index.state(s) == f.SEALED)
    footer = footer_of(store.backend, store.files.segments.get(segment))
    assert footer is not None

    def by_core(entries: bytes, tail: int = footer.tail) -> Any:
        return core.walk_footer(entries, tail, 0, segment, b"", f.MASK64)

    found, at, looked = by_core(footer.entries)
    assert 0 < len(found) <= looked == footer.records and at == len(footer.entries)
    chance = random.Random(1)
    refused = 0
    for _ in range(300):
        entries = bytearray(footer.entries)
        entries[chance.randrange(len(entries))] ^= 1 << chance.randrange(8)
        refused += by_core(bytes(entries)) is NotImplemented
    assert refused > 30
    for cut in range(1, 200):
        done = by_core(footer.entries[:-cut])
        assert done is NotImplemented or done[1] == len(footer.entries) - cut
    assert by_core(footer.entries, tail=500) is NotImplemented
    for end in (0, 8, 64):
        assert by_core(footer.entries[:end] or b"x") is NotImplemented


@pytest.mark.usefixtures("core")
def test_what_is_moved_once_it_was_found_is_described_all_the_same(make: Make) -> None:
    """A walk finds many entries at a time: by the turn of the last, their segment may be gone."""
    cache = make(size_limit=4 << 20, segment_size=64 << 10, eviction="none")
    keys = [f"{'steady' if i % 4 == 0 else 'other'}-{i}" for i in range(600)]
    cache.set_many(dict.fromkeys(keys, b"s" * 300), tag="tag")
    steady = {key for key in keys if key.startswith("steady")}
    walk = cache.entries("steady-")
    first = next(walk)
    before = cache._store.current.index.segments()
    cache.delete_prefix("other-")
    while cache._store.cleaner.clean_emptiest():
        pass
    assert not set(before[:2]) <= set(cache._store.current.index.segments())
    assert {first.key, *(entry.key for entry in walk)} == steady
    assert {entry.tag for entry in cache.entries()} == {"tag"}


@pytest.mark.usefixtures("core")
def test_a_walk_while_others_write_and_clean(make: Make) -> None:
    """What is there all the time is met once, wherever it is moved to meanwhile."""
    cache = make(size_limit=4 << 20, segment_size=64 << 10, eviction="none")
    steady = {f"steady-{i}" for i in range(300)}
    cache.set_many(dict.fromkeys(steady, b"s" * 300))
    done: list[int] = []

    def work(which: int) -> None:
        if which == 0:
            for i in range(4000):
                if len(done) == 2:
                    return
                cache.set(f"k{i % 200}", noise(600, i))
                if i % 100 == 0:
                    cache._store.cleaner.clean_emptiest()
            return
        try:
            for _ in range(10):
                found = [entry.key for entry in cache.entries("steady-")]
                assert set(found) == steady and len(found) == len(steady)
        finally:
            done.append(which)

    in_threads(3, work)
