"""Words of an index that is in use take values that make no sense: what goes by them ends, in order."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import bounded, noise

from yatagarasu_cache import CacheError, DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import checkpoint
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.index import Index, IndexDamaged

Make = Callable[..., DiskCache]
pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process
LIMIT = 1 << 20


@pytest.fixture
def backend() -> str:
    """What is looked at is the same on all of them."""
    return "threads"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with bounded():
        yield


def filled(make: Make, count: int = 200, **options: Any) -> DiskCache:
    cache = make(**{"size_limit": LIMIT, **options})
    for i in range(count):
        cache.set(f"k{i}", value(i))
    return cache


def value(i: int) -> bytes:
    return noise(60 + i % 7 * 20, i)


def live(index: Index) -> list[int]:
    return list(index.live_slots())


def put_in_order(cache: DiskCache) -> None:
    assert cache.check(fix=True) != []
    assert cache.check() == []


def log_bytes(cache: DiskCache) -> int:
    return cache._store.changes.total_size


# -- slots that their digests do not lead to ------------------------------------------------------


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("eviction", ["lru", "none"])
def test_expiring_ends(make: Make, eviction: str, word: int) -> None:
    cache = make(size_limit=LIMIT, eviction=eviction)
    for i in range(60):
        cache.set(f"k{i}", b"v" * 100, expire=0.01)
    index = cache._store.current.index
    for at in live(index):
        index.words[at + word] ^= 4 - 3 * word  # another place in its partition, or another partition
    time.sleep(0.02)
    cache.expire()
    assert index.count() == 0 and log_bytes(cache) < 8192
    assert bytes(index.map[:8]) == f.INDEX_MAGIC
    for i in range(1500):
        cache.set(f"n{i}", b"x" * 200) if eviction != "none" or i < 500 else None
    assert [problem for problem in cache.check() if problem.kind != "space"] == []


def test_a_slot_in_another_partition_goes(make: Make) -> None:
    cache = filled(make)
    index = cache._store.current.index
    for at in live(index)[:50]:
        index.words[at + 1] ^= 1
    for i in range(1500):
        cache.set(f"n{i}", noise(700, i))
    index = cache._store.current.index  # it may have been made anew
    assert not [at for at in live(index) if not index.leads_to(at)]
    put_in_order_if_needed(cache)


def put_in_order_if_needed(cache: DiskCache) -> None:
    cache.check(fix=True)
    assert cache.check() == []


def hidden_keys(cache: DiskCache) -> list[str]:
    """Keys `k0` ... that are one behind the slot that their digests lead to; their slots, after those before them
    are emptied."""
    index, found = cache._store.current.index, []
    taken: set[int] = set()
    for i in range(400):
        low, high = f.key_digest(encode_key(f"k{i}"), cache._store.current.seed)
        slots = index.partition_slots(high & f.PARTITION_MASK)
        at, start = index.find(low, high), slots[low % len(slots)]
        has_room = 2 * len(index.column(slots, 0)) > 3 * sum(map(bool, index.column(slots, 0)))
        if has_room and at == slots[(low + 1) % len(slots)] and not taken & {at, start}:
            index.words[start] = index.words[start + 1] = 0
            taken |= {at, start}
            found.append(f"k{i}")
    return found


WRITES: dict[str, Callable[[DiskCache, list[str]], Any]] = {
    "set": lambda cache, keys: [cache.set(key, b"new") for key in keys],
    "set_many": lambda cache, keys: cache.set_many(dict.fromkeys(keys, b"new")),
    "delete": lambda cache, keys: [cache.delete(key) for key in keys],
    "delete_many": lambda cache, keys: cache.delete_many(keys),
    "add": lambda cache, keys: [cache.add(key, b"new") for key in keys],
    "touch": lambda cache, keys: [cache.touch(key, 100) for key in keys],
    "pop": lambda cache, keys: [cache.pop(key) for key in keys],
    "grow": lambda cache, keys: [cache.set(f"n{i}", b"n") for i in range(1000)],
    "shrink": lambda cache, keys: locked(cache, cache._store.current.shrink),
}


def locked(cache: DiskCache, change: Callable[[], Any]) -> None:
    with cache._store.locks.index:
        change()


@pytest.mark.parametrize("write", WRITES)
def test_slots_behind_an_empty_one_are_found_again(make: Make, write: str, core: str) -> None:
    """By whoever writes where damage has emptied some: so nothing old is there beside what is new, to come out
    when that goes; and what was hidden is not lost."""
    cache = filled(make, 400, eviction="none", size_limit=4 * LIMIT)
    hidden = hidden_keys(cache)
    assert hidden and all(cache.get(key) is None for key in hidden)
    WRITES[write](cache, hidden)
    index = cache._store.current.index
    assert all(index.leads_to(at) for at in live(index))
    left = {"set": b"new", "set_many": b"new"}.get(write)
    stays = write in ("add", "touch", "grow", "shrink")
    assert [cache.get(key) for key in hidden] == [value(int(key[1:])) if stays else left for key in hidden]
    cache._store.checkpoints.write_if()
    put_in_order_if_needed(cache)
    cache.delete_many(hidden)
    assert not any(key in cache for key in hidden)
    for i in range(2000):
        cache.set(f"m{i}", b"m")
    assert not any(key in cache for key in hidden)


def test_a_checkpoint_has_no_hidden_slots(make: Make, directory: Path) -> None:
    """They may be of what was replaced, or deleted, since: it would come back."""
    cache = filled(make, 400, eviction="none")
    hidden = hidden_keys(cache)
    cache._store.checkpoints.write_if()
    written = checkpoint.read(cache._store.backend, str(directory))
    assert written is not None
    found = len(live(cache._store.current.index)) - len(hidden)
    assert sum(map(len, written.parts)) <= found * f.SLOT_BYTES


def test_slots_that_cannot_be_do_not_spoil_a_checkpoint(make: Make, directory: Path) -> None:
    """All others are in it."""
    cache = filled(make)
    index = cache._store.current.index
    places = live(index)
    for at, field, value in zip(
        places, (f.S_PLACE, f.S_LENGTHS, f.S_STAMP, f.S_PLACE), (1, 0, f.MASK64, 0), strict=False
    ):
        index.words[at + field] = value
    index.words[places[4]] ^= 2
    index.words[places[5] + 1] ^= 1
    cache._store.checkpoints.write_if()
    written = checkpoint.read(cache._store.backend, str(directory))
    assert written is not None and sum(map(len, written.parts)) == (200 - 6) * f.SLOT_BYTES


def test_removing_what_is_in_no_partition(make: Make) -> None:
    store = filled(make)._store
    index = store.current.index
    header = bytes(index.map[: f.HEADER_BYTES])
    with store.locks.index, pytest.raises(IndexDamaged, match="no partition"):
        index.remove(0)
    assert bytes(index.map[: f.HEADER_BYTES]) == header


# -- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [60 << 20, (64 << 20) + 5, 1 << 33, f.MAX_VALUE_BYTES])
def test_a_length_asks_for_no_memory(make: Make, length: int) -> None:
    cache = filled(make)
    index = cache._store.current.index
    for at in live(index):
        index.words[at + f.S_LENGTHS] = length << 24 | index.words[at + f.S_LENGTHS] & 0xFFFFFF
    with bounded(256 << 20):
        assert (
            cache.get("k0") is None and cache._store.core.get_nowait("k1", time.time_ns()) is NotImplemented
        )
        assert cache.get_many([f"k{i}" for i in range(2, 100)]) == {}
        assert "k100" not in cache or cache.get("k100") is None
        assert list(cache.entries()) is not None
        put_in_order(cache)


def test_a_head_of_another_length(make: Make) -> None:
    cache = filled(make)
    index = cache._store.current.index
    for at in live(index):
        index.words[at + f.S_LENGTHS] |= 0xFFFF
    assert cache.get("k0") is None
    put_in_order(cache)


# -- counters, clocks, tails ----------------------------------------------------------------------

WORDS = (
    f.W_CLOCK, f.W_NEXT_SEGMENT, f.W_FLOOR, f.W_EPOCH, f.W_PROMISED, f.W_SEGMENT_BYTES, f.W_LARGE_BYTES, f.W_LIVE_BYTES,
    f.W_INDEX_BYTES, f.W_CHECKPOINT_BYTES, f.W_WRITTEN, f.W_FLUSHED, f.W_LOG, f.W_ACTIVE, f.W_LEAVING, f.W_SLACK,
    f.W_COUNTERS, f.W_COUNTERS + 2, f.W_COUNTERS + 3,
)  # fmt: skip
STAMPS = (f.W_CLOCK, f.W_EPOCH, f.W_FLOOR, f.W_FLUSHED, f.W_DELETED + 5)


@pytest.mark.parametrize(
    ("word", "number"), [(word, f.MASK64) for word in WORDS] + [(word, f.MAX_STAMP - 1) for word in STAMPS]
)
def test_a_word_of_the_header(directory: Path, word: int, number: int) -> None:
    """Everything works on; no entry goes for it; and what check() mends stays so."""
    options: dict[str, Any] = {"size_limit": 8 << 20, "backend": "threads"}
    with DiskCache(directory, **options) as cache:
        for i in range(60):
            cache.set(f"k{i}", value(i))
        cache.delete("k1")
        cache._store.current.index.words[word] = number
        for i in range(60, 120):
            cache.set(f"k{i}", value(i), tag="t" if i % 2 else None)
        assert cache.delete("k2") and cache.incr("n") == 1 and cache.touch("k3", 1e6)
        cache.set("k3", value(3))
        cache.flush()
        assert [cache.get(f"k{i}") for i in range(3, 120)] == [value(i) for i in range(3, 120)]
        cache.check(fix=True)
        assert cache.check() == []
        assert cache._store.current.index.words[f.W_CLOCK] < f.LAST_CLOCK
    inode = (directory / "index").stat().st_ino
    with DiskCache(directory, **options) as cache:
        assert (directory / "index").stat().st_ino == inode
        assert [cache.get(f"k{i}") for i in range(3, 120)] == [value(i) for i in range(3, 120)]
        assert cache.get("k1") is None and cache.get("k2") is None
        assert cache.check() == []


@pytest.mark.parametrize(
    "field", [f.T_SIZE, f.T_LIVE, f.T_OWNER, f.T_CLOSED, f.T_SYNCED, f.T_CREATED, f.T_TAIL]
)
@pytest.mark.parametrize("number", [0, 1 << 40, f.MASK64])
def test_a_word_of_the_table(directory: Path, field: int, number: int) -> None:
    options: dict[str, Any] = {"size_limit": LIMIT, "segment_size": 16384, "backend": "threads"}
    with DiskCache(directory, **options) as cache:
        for i in range(200):
            cache.set(f"k{i}", value(i))
        cache.delete("k1")
        index = cache._store.current.index
        for entry in index.table_entries():
            index.words[entry + field] = number
        for i in range(200, 230):
            cache.set(f"k{i}", value(i))
        assert cache.get("k229") == value(229)
        cache.delete("k228")
        logs = [Path(cache._store.files.segments.path(segment)) for segment in cache._store.current.index.logs()]
        assert all(path.stat().st_size < LIMIT for path in logs)
        cache.check(fix=True)
        assert cache.check() == []
        assert cache.get("k229") == value(229) and cache.get("k228") is None
    with DiskCache(directory, **options) as cache:
        assert cache.check() == []
        assert cache.get("k229") == value(229) and cache.get("k1") is None


def test_a_clock_that_makes_no_sense_is_mended_once(make: Make, directory: Path) -> None:
    cache = filled(make, 20)
    index = cache._store.current.index
    for at in live(index)[:5]:
        index.words[at + f.S_STAMP] = f.MASK64 >> 1
    index.words[f.W_CLOCK] = f.MASK64
    for i in range(20):
        cache.set(f"k{i}", b"new")
    assert cache._store.current.index.words[f.W_CLOCK] < time.time_ns() + 10**12
    cache.close()
    (directory / "index").unlink()
    again = make(size_limit=LIMIT)
    assert [again.get(f"k{i}") for i in range(20)] == [b"new"] * 20


# -- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [512, 4096])
def test_a_block_is_lost_in_use(directory: Path, tmp_path: Path, block: int) -> None:
    """Whatever is stored then is there, now, after check(fix=True), and when it is opened again."""
    options: dict[str, Any] = {"size_limit": LIMIT, "segment_size": 16384, "backend": "threads"}
    with DiskCache(directory, **options) as cache:
        for i in range(250):
            cache.set(f"k{i}", value(i))
        cache.set("large", noise(9000))
    size = (directory / "index").stat().st_size
    places = range(0, size, block)
    for start in places[:: max(1, len(places) // 6)]:
        path = tmp_path / f"{start}"
        shutil.copytree(directory, path)
        with DiskCache(path, **options) as cache:
            cache.set("before", b"before")
            with (path / "index").open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 0)
                mapped[start : start + block] = bytes(len(mapped[start : start + block]))
            stored = []
            for i in range(0, 300, 7):
                try:
                    cache.set(f"k{i}", b"new" * 30)
                except CacheError:
                    continue
                assert cache.get(f"k{i}") == b"new" * 30, (start, i)
                stored.append(f"k{i}")
            cache.check(fix=True)
            assert cache.check() == [], start
            assert [cache.get(key) for key in stored] == [b"new" * 30] * len(stored), start
        with DiskCache(path, **options) as cache:
            assert cache.check() == [], start
            assert [cache.get(key) for key in stored] == [b"new" * 30] * len(stored), start


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grown", [5 << 20, 1 << 30])
@pytest.mark.parametrize("name", ["checkpoint", "index", "segments"])
def test_a_file_has_grown(make: Make, directory: Path, name: str, grown: int) -> None:
    cache = filled(make, 500)
    cache._store.checkpoints.write_if()
    cache.close()
    path = directory / name
    path = sorted(path.iterdir())[0] if path.is_dir() else path
    os.truncate(path, path.stat().st_size + grown)
    again = make(size_limit=LIMIT)
    for i in range(500, 520):
        again.set(f"k{i}", value(i))
    assert [again.get(f"k{i}") for i in range(520)] == [value(i) for i in range(520)]
    put_in_order_if_needed(again)
    assert [again.get(f"k{i}") for i in range(520)] == [value(i) for i in range(520)]


@pytest.mark.parametrize("name", ["ffffffff.seg", "fffffffe.seg", "00000002.seg", "7fffffff.seg"])
def test_a_stray_file_takes_no_number(make: Make, directory: Path, name: str) -> None:
    cache = filled(make, 20)
    cache.close()
    (directory / "segments" / name).touch()
    (directory / "index").unlink()
    for _ in range(2):
        again = make(size_limit=LIMIT)
        for i in range(20):
            again.set(f"n{i}", value(i))
        assert again.get("n5") == value(5) and again.get("k5") == value(5)
        again.close()
    inode = (directory / "index").stat().st_ino
    again = make(size_limit=LIMIT)
    assert (directory / "index").stat().st_ino == inode
    put_in_order_if_needed(again)


def test_a_segment_is_lost_and_slots_of_it_are_damaged(make: Make, directory: Path) -> None:
    cache = filled(make)
    cache.close()
    again = make(size_limit=LIMIT)
    index = again._store.current.index
    for at in live(index)[::3]:
        index.words[at] ^= 1 << 20
    for path in (directory / "segments").iterdir():
        path.unlink()
    put_in_order(again)
    again.set("new", b"new")
    assert again.get("new") == b"new"


def test_a_segment_that_the_table_lost_is_not_removed(make: Make, directory: Path) -> None:
    cache = filled(make)
    cache.close()
    again = make(size_limit=LIMIT)
    index = again._store.current.index
    for entry in index.table_entries():
        index.words[entry] = 0
    again._store.reaper.reap()
    assert [again.get(f"k{i}") for i in range(200)] == [value(i) for i in range(200)]
    put_in_order(again)
    assert [again.get(f"k{i}") for i in range(200)] == [value(i) for i in range(200)]


@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
def test_uses_that_cannot_have_been_keep_nothing_for_ever(make: Make, eviction: str) -> None:
    """Many hits, the last of them before the entry was stored; or one that is to come."""
    cache = filled(make, eviction=eviction)
    index = cache._store.current.index
    for at in live(index):
        index.words[at + f.S_ACCESS] = 1 << 63
    put_in_order(cache)
    assert all(index.words[at + f.S_ACCESS] != 1 << 63 for at in live(index))
    for i in range(5000):
        cache.set(f"n{i}", value(i) * 3)
    assert sum(f"k{i}" in cache for i in range(200)) < 100 and cache.check() == []
