"""A volume smaller than size_limit, or filled by others: the cache goes on as a smaller one."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import ALWAYS, Fault, FaultyBackend, open_faulty
from helpers import Make, noise, run_python

from yatagarasu_cache import AsyncDiskCache, DiskCache, StorageFull
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.room import Room

pytestmark = pytest.mark.usefixtures("core")

MIB = 1 << 20
VOLUME = 6 * MIB
LARGE = 100_000  # has a file of its own in these caches


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB. Where mounting is not allowed, the injected variants stand alone."""
    path = tmp_path / "volume"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={VOLUME}", "none", str(path)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill_up(volume: Path) -> None:
    """Take what the volume has left, to the last block."""
    with open(volume / "filler", "ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


@pytest.mark.in_turn
@pytest.mark.parametrize(("size", "eviction"), [(500, "lru"), (3000, "fifo"), (LARGE, "lru")])
def test_an_evicting_cache_goes_on(volume: Path, make: Make, size: int, eviction: str) -> None:
    cache = make(volume / "cache", eviction=eviction, large_value_size=LARGE)
    count = 4 * VOLUME // (size + 200)
    hot = [("hot", n) for n in range(5)]
    for key in hot:
        cache.set(key, noise(size, key[1]))
    most = before = fewest = 0
    for n in range(count):
        assert cache.set(n, noise(size, n))
        assert cache.get(n) == noise(size, n)
        if n % 10 == 0:
            assert eviction == "fifo" or all(cache.get(key) == noise(size, key[1]) for key in hot)
        if not before and cache.stats().evictions:  # the volume was full for the first time
            most, before, fewest = n, cache.stats().evictions, len(cache)
    assert most > 0.5 * VOLUME / (size + 300)
    assert before < 0.4 * most or size > 10_000 and before < 0.5 * most
    assert len(cache) > 0.7 * fewest  # and went on as it was
    assert cache.check() == []
    cache.close()
    again = make(volume / "cache", large_value_size=LARGE)
    assert again.get(count - 1) == noise(size, count - 1) and again.check() == []


def test_many_threads_and_processes(volume: Path, make: Make) -> None:
    cache = make(volume / "cache")
    errors: list[BaseException] = []

    def store(who: int) -> None:
        try:
            for n in range(600):
                cache.set((who, n), noise(3000, n))
                cache.set_many({(who, n, "many", i): noise(300, i) for i in range(3)})
                cache.incr(("n", who))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=store, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    code = (
        "import sys; from yatagarasu_cache import DiskCache\nc = DiskCache(sys.argv[1])\n"
        "for n in range(1500): c.set(n, bytes(3000))\nproblems = c.check()\nassert problems == [], problems"
    )
    run_python(code, cache.directory)
    for thread in threads:
        thread.join()
    assert errors == [] and cache.check() == []


def test_streams_on_a_volume_that_is_full(volume: Path, make: Make) -> None:
    cache = make(volume / "cache")
    for n in range(VOLUME // 3000):
        cache.set(n, noise(3000, n))
    data = noise(3 * MIB)
    cache.set("known", (data[at : at + 50_000] for at in range(0, len(data), 50_000)), length=len(data))
    assert cache["known"] == data
    cache.set("stream", (data[at : at + 50_000] for at in range(0, MIB, 50_000)))
    assert len(cache["stream"]) >= MIB
    assert cache.check() == []


def test_what_the_volume_can_never_hold_evicts_nothing(volume: Path, make: Make) -> None:
    cache = make(volume / "cache")
    for n in range(500):
        cache.set(n, noise(3000, n))
    with pytest.raises(StorageFull, match="the volume has room for") as caught:
        cache.set("k", bytes(VOLUME))
    assert caught.value.errno == errno.ENOSPC
    assert len(cache) == 500 and cache.stats().evictions == 0


def test_a_volume_that_others_fill_and_leave(volume: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(volume / "cache")
    for n in range(500):
        cache.set(n, noise(3000, n))
    fill_up(volume)
    for n in range(1000):
        cache.set(n, noise(3000, n))
    entries = len(cache)
    assert 200 < entries < 500 and cache["n" if "n" in cache else 999] == noise(3000, 999)
    (volume / "filler").unlink()
    monkeypatch.setattr("yatagarasu_cache.store.budget._VOLUME_SECONDS", 0.0)
    for n in range(1000):
        cache.set(n, noise(3000, n))
    assert len(cache) > 2 * entries and cache.check() == []


def test_without_eviction_it_is_full(volume: Path, make: Make) -> None:
    cache = make(volume / "cache", eviction="none")
    stored = 0
    with pytest.raises(StorageFull, match="No space left on device.*free space on the volume"):
        while True:
            cache.set(stored, noise(3000, stored))
            stored += 1
    assert len(cache) == stored and cache.stats().evictions == 0
    assert all(cache[n] == noise(3000, n) for n in range(stored))
    for n in range(stored // 2):
        assert cache.delete(n)
    cache.set("new", noise(3000))  # what is deleted gives room again
    assert cache["new"] == noise(3000) and cache.check() == []


def store_large(cache: DiskCache, way: str, value: bytes, options: dict[str, Any]) -> None:
    async def store() -> None:
        async with AsyncDiskCache(cache.directory, **options) as same:
            await same.set("large", value)

    if way == "asyncio":
        asyncio.run(store())
    elif way == "set_many":
        cache.set_many({"large": value})
    elif way == "add":
        cache.add("large", value)
    else:
        parts = [value[at : at + LARGE] for at in range(0, len(value), LARGE)]
        cache.set("large", value if way == "set" else iter([value] if way == "one part" else parts))


LARGE_WAYS = ["set", "set_many", "add", "asyncio", "one part", "parts"]


@pytest.mark.parametrize("way", LARGE_WAYS)
def test_a_large_value_without_room_is_not_tried_again_and_again(
    volume: Path, make: Make, backend: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    options: dict[str, Any] = {
        "size_limit": 64 * MIB, "backend": backend, "eviction": "none", "large_value_size": LARGE,
        "max_stream_size": 4 * MIB,
    }  # fmt: skip
    cache = make(volume / "cache", **options)
    with pytest.raises(StorageFull):
        for n in range(VOLUME):
            cache.set(n, noise(3000, n))
    make_room, tried = Room._make_room, []

    def counted(self: Room, need: int, made: int) -> bool:
        tried.append(need)
        return make_room(self, need, made)

    monkeypatch.setattr(Room, "_make_room", counted)
    for _ in range(3):
        with pytest.raises(StorageFull, match="No space left on device"):
            store_large(cache, way, noise(MIB), options)
    assert 3 <= len(tried) <= 3 + 1  # once more where files that are gone were still open
    assert "large" not in cache and os.listdir(volume / "cache" / "tmp") == []
    assert cache.delete_many(range(1000)) == 1000
    store_large(cache, way, noise(MIB), options)
    assert cache["large"] == noise(MIB) and cache.check() == []


REBUILT = """
import sys; from yatagarasu_cache import DiskCache
c = DiskCache(sys.argv[1])
print([key for key in c if type(key) is int or key == "touched" and c.get_entry(key).expires is None])
print(sum(type(key) is str and key.startswith("kept") for key in c))
assert c.check() == []
"""


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("way", "durability", "eviction"),
    [
        ("delete", "none", "lru"), ("delete", "sync", "none"), ("delete_many", "sync", "lru"),
        ("delete_many", "none", "none"), ("clear", "none", "lru"), ("clear", "sync", "none"), ("pop", "sync", "lru"),
    ],
)  # fmt: skip
def test_removals_need_no_room(volume: Path, make: Make, way: str, durability: str, eviction: str) -> None:
    """Not one block: and when the index is lost before there is room, nothing that was removed comes back."""
    cache = make(volume / "cache", eviction=eviction, durability=durability)
    count = 3000
    cache.set_many(dict.fromkeys(range(count), b"old" * 50))
    cache.set_many(dict.fromkeys(range(count), b"new" * 50))
    cache.set_many({f"kept{n}": b"x" for n in range(50)})
    cache.set("touched", 1)
    fill_up(volume)
    fill_up(volume)
    if way == "clear":
        assert cache.clear() == count + 51
    elif way == "delete_many":
        assert cache.delete_many(range(count)) == count
    else:
        assert all(cache.delete(n) if way == "delete" else cache.pop(n) for n in range(count))
    assert way == "clear" or cache.touch("touched", 1000) and cache.touch("touched", 2000)
    assert not any(n in cache for n in range(count))
    assert len(cache) == (0 if way == "clear" else 51)
    assert cache.check() == []
    (volume / "filler").unlink()
    (volume / "cache" / "index").rename(volume / "index")  # as if it were lost
    missing, _ = run_python(REBUILT, cache.directory).splitlines()
    assert missing == "[]"


def test_what_is_stored_after_a_removal_without_room_is_kept(volume: Path, make: Make) -> None:
    """And so is all, once there is a checkpoint again."""
    cache = make(volume / "cache", eviction="none")
    cache.set_many(dict.fromkeys(range(3000), b"old" * 50))
    cache.set_many({f"kept{n}": b"x" for n in range(50)})
    fill_up(volume)
    assert all(cache.delete(n) for n in range(2900))
    (volume / "filler").unlink()
    cache.set_many({f"kept later {n}": b"x" for n in range(20)})
    assert cache.delete(2900)
    copy = volume / "copy"
    subprocess.run(["cp", "-r", cache.directory, copy], check=True)
    (copy / "index").unlink()
    gone, kept = run_python(REBUILT, copy).splitlines()
    assert (gone, kept) == ("[]", "20")
    assert cache._store.checkpoints.write_if()
    (volume / "cache" / "index").rename(volume / "index")
    gone, kept = run_python(REBUILT, cache.directory).splitlines()
    assert gone == str(list(range(2901, 3000))) and kept == "70"


def test_a_torn_floor_leaves_the_one_before(volume: Path, make: Make) -> None:
    cache = make(volume / "cache", eviction="none", durability="sync")
    cache.set_many(dict.fromkeys(range(2000), b"old" * 50))
    fill_up(volume)
    changes, index = cache._store.changes, cache._store.current.index
    n = 0
    while not changes.segment or changes._floors(changes.segment, changes.size) is None:
        assert cache.delete(n)
        n += 1
    for more in range(3):
        before = changes._floors(changes.segment, changes.size)
        assert cache.delete(n + more)
        after = changes._floors(changes.segment, changes.size)
        assert before is not None and after is not None
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1  # the older one was written over
        assert max(after) > max(before) and max(before) in after
    assert index.words[f.W_EPOCH] == max(after)


def test_clear_gives_room_at_once(volume: Path, make: Make) -> None:
    cache = make(volume / "cache", eviction="none")
    with pytest.raises(StorageFull):
        for n in range(VOLUME):
            cache.set(n, noise(3000, n))
    fill_up(volume)
    cache.clear()
    status = os.statvfs(volume)
    assert status.f_bfree * status.f_frsize > VOLUME // 2
    (volume / "filler").unlink()
    for n in range(500):
        cache.set(n, noise(3000, n))
    assert len(cache) == 500 and cache.check() == []


# -- by injection -------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("write", "segments"), ("allocate", "index"), ("write", "large"), ("write", "tmp"),
        ("open", "tmp"), ("replace", "large"), ("allocate", "segments"), ("write", "writers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [1, 2])
def test_each_write_may_find_no_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str, size: int, error: int, first: int
) -> None:
    """Once: then it is made, and nothing fails."""
    backend = FaultyBackend(plan=[])
    options = {"size_limit": 64 * MIB, "segment_size": 64 << 10, "large_value_size": LARGE}
    with open_faulty(monkeypatch, directory, backend, **options) as cache:
        for n in range(400):
            cache.set(n, noise(3000, n))
        fault = Fault(kind, first, error, where=f"cache/{where}")
        backend.plan = [fault]
        for n in range(100):
            struck = fault.struck
            cache.set((n,), noise(size, n))
            assert cache[(n,)] == noise(size, n)
            if fault.struck > struck:
                assert cache.stats().evictions < 200
        cache.set_many({("many", n): noise(size, n) for n in range(5)})
        assert cache.add("new", noise(size)) and cache.incr("n") == 1
        assert cache["new"] == noise(size)
        backend.plan = []
        assert cache.check() == []


@pytest.mark.in_turn
@pytest.mark.parametrize("way", LARGE_WAYS)
@pytest.mark.parametrize("eviction", f.EVICTIONS)
@pytest.mark.parametrize("kind", ["open", "write", "sync", "replace"])
def test_each_step_of_a_large_value_is_tried_as_often_as_it_gives_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str, eviction: str, way: str
) -> None:
    """However often that is in vain: no more often than there is something to evict."""
    backend = FaultyBackend(plan=[])
    options: dict[str, Any] = {
        "size_limit": 64 * MIB, "segment_size": 64 << 10, "large_value_size": LARGE, "eviction": eviction,
        "durability": "sync", "max_stream_size": 4 * MIB,
    }  # fmt: skip
    with open_faulty(monkeypatch, directory, backend, **options) as cache:
        cache.set_many({n: noise(3000, n) for n in range(100)})
        fault = Fault(kind, 1, errno.ENOSPC, times=ALWAYS, where="cache/large" if kind == "replace" else "cache/tmp")
        backend.plan = [fault]
        with pytest.raises(StorageFull):
            store_large(cache, way, noise(MIB), options)
        backend.plan = []
        assert 1 <= fault.struck <= (2 if eviction == "none" else 20)
        assert "large" not in cache and os.listdir(directory / "tmp") == []
        store_large(cache, way, noise(MIB), options)
        assert cache["large"] == noise(MIB) and cache.check() == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_anything_evicts_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    backend = FaultyBackend(plan=[])
    with open_faulty(monkeypatch, directory, backend, large_value_size=LARGE) as cache:
        for n in range(50):
            cache.set(n, noise(3000, n))
        backend.plan = [
            Fault(kind, 1, error, times=ALWAYS) for kind in ("write", "allocate", "replace", "sync")
        ]
        for value in (b"new", noise(LARGE), iter([noise(LARGE)])):
            with pytest.raises(StorageFull) as caught:
                cache.set(1, value)
            assert caught.value.errno == error
        backend.plan = []
        assert all(cache[n] == noise(3000, n) for n in range(50))
        assert cache.check() == []
