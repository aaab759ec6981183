"""Space belongs to bytes, not to handles: who holds room, and who has to give it back.

Programs here are processes of their own that end as real ones do: without closing, killed, or never.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, disk_blocks, disk_bytes, noise, run_python

from yatagarasu_cache import DiskCache, StorageFull
from yatagarasu_cache.store import cleaning, room
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.checkpointing import Checkpoints

Make = Callable[..., DiskCache]
MIB = 1 << 20
SMALL = {"size_limit": MIB, "segment_size": 16 << 10}

# A process that opens the cache, stores what it is told, says so, and then idles until it is killed.
IDLE = """
import sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1], backend="threads")
for item in sys.argv[2].split(","):
    if item:
        key, size = item.split(":")
        cache.set(key, b"i" * int(size))
for key in cache if "all" in sys.argv[3:] else ():
    cache.get(key)
print("ready", flush=True)
for line in sys.stdin:
    key, size = line.split(":")
    print(cache.set(key, b"n" * int(size)), flush=True)
"""


class Idle:
    """A living process with the cache open."""

    def __init__(self, directory: Path, stores: str, reads: str = "") -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IDLE, str(directory), stores, reads],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def set(self, key: str, size: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{key}:{size}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "True\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def idle(directory: Path) -> Iterator[Callable[..., Idle]]:
    """Starts processes that idle; they are killed at the end."""
    started: list[Idle] = []

    def start(stores: str, reads: str = "") -> Idle:
        started.append(Idle(directory, stores, reads))
        return started[-1]

    yield start
    for one in started:
        one.kill()


# -- handles that come and go ----------------------------------------------------------------------

FORKS = """
import os, sys
from yatagarasu_cache import DiskCache
directory, limit, forks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = DiskCache(directory, size_limit=limit)
for i in range(200):
    cache.set(("old", i), bytes(limit // 10 // 200))
for i in range(forks):
    if not (pid := os.fork()):
        cache.set(i, b"y" * 2000)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stats = cache.stats()
print(sum(("old", i) in cache for i in range(200)), sum(cache.get(i) == b"y" * 2000 for i in range(forks)))
print(stats.evictions, stats.segments, len(cache.check()))
"""


@pytest.mark.parametrize("limit", [64 * MIB, 256 * MIB])
def test_workers_that_end_without_closing(directory: Path, limit: int) -> None:
    there, rest = run_python(FORKS, directory, limit, 300).splitlines()
    assert there == "200 300"
    evictions, segments, problems = map(int, rest.split())
    assert evictions == problems == 0
    assert segments <= limit // 10 // (limit // 32) + 6  # each goes on where the one before ended


TOGETHER = """
import os, sys
from yatagarasu_cache import DiskCache
directory, limit, writers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = DiskCache(directory, size_limit=limit)
for i in range(500):
    cache.set(("old", i), bytes(limit // 2 // 500 - 200))
ready, say_ready = os.pipe()
wait, go = os.pipe()
children = []
for n in range(writers):
    if not (pid := os.fork()):
        try:
            os.close(go)
            own = DiskCache(directory)
            for i in range(50):
                own.set((n, i), b"x" * 100)
            os.write(say_ready, b".")
            os.read(wait, 1)
            os._exit(0)
        finally:
            os._exit(1)
    children.append(pid)
os.close(say_ready)
done = 0
while done < writers and (some := os.read(ready, writers)):
    done += len(some)
alive = cache.stats()
os.close(go)
failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in children)
stats = cache.stats()
print(sum(("old", i) in cache for i in range(500)))
print(sum(cache.get((n, i)) is not None for n in range(writers) for i in range(50)) - 50 * writers)
print(stats.evictions, failed, alive.disk_bytes - alive.live_bytes, len(cache.check()))
"""


@pytest.mark.parametrize(("limit", "writers"), [(64 * MIB, 64), (256 * MIB, 256)])
def test_many_that_write_at_once(directory: Path, limit: int, writers: int) -> None:
    old, missing, rest = run_python(TOGETHER, directory, limit, writers).splitlines()
    evictions, failed, not_live, problems = map(int, rest.split())
    assert (old, missing, evictions, failed, problems) == ("500", "0", 0, 0, 0)
    assert not_live <= limit // 16 + limit // 32  # the last of it is the parent's own segment


def test_an_idle_handle_costs_next_to_nothing(make: Make, directory: Path, idle: Any) -> None:
    cache = make(size_limit=64 * MIB)
    cache.set("mine", b"x")
    before = cache.volume()
    one = idle("a:10")
    assert cache.volume() - before <= (64 * MIB >> 12) + (4 << 10)
    assert disk_bytes(directory) <= cache.volume() + (64 << 10)
    one.set("b", 100_000)
    assert cache.volume() - before <= 3 * 100_000
    idle("")
    assert cache.volume() - before <= 3 * 100_000


def test_one_room_grows_with_what_is_written(make: Make) -> None:
    cache = make(size_limit=64 * MIB)
    most = 0.0
    for n in range(3000):
        cache.set(n, noise(1000, n))
        writer = cache._store.active.writer
        assert writer is not None
        assert writer.used <= writer.granted <= writer.capacity
        if writer.tail > 1 << 14:
            most = max(most, writer.granted / writer.used)
    assert 1.2 < most <= 2.2
    assert cache.stats().evictions == 0


# -- room that others hold ---------------------------------------------------------------------------


def test_garbage_in_the_segments_of_idle_handles_is_had_back(make: Make, idle: Any) -> None:
    """Six processes have stored half of what fits, and idle. Somebody overwrites all of it, twice."""
    cache = make(size_limit=2 * MIB, segment_size=512 << 10)
    size, keys = 20_000, [f"{p}-{n}" for p in range(6) for n in range(8)]
    for p in range(6):
        idle(",".join(f"{p}-{n}:{size}" for n in range(8)))
    assert cache.stats().entries == len(keys)
    for turn in range(3):
        for key in keys:
            cache.set(key, bytes([turn]) * size)
    assert cache.stats().evictions == 0
    assert all(cache.get(key) == bytes([2]) * size for key in keys)
    assert cache.volume() <= 2 * MIB
    assert cache.check() == []


def test_whoever_was_taken_its_segment_goes_on(make: Make, idle: Any) -> None:
    cache = make(**SMALL)
    one = idle("a:3000,b:3000")
    index = cache._store.current.index
    (entry,) = [e for e in index.table_entries() if index.words[e] & ~f.MASK32 == f.ACTIVE]
    segment = index.words[entry] & f.MASK32
    cache.set("a", b"mine")  # garbage in the other's segment
    assert cache._store.cleaner.clean_active()
    assert cache._store.current.index.state(segment) == 0
    one.set("c", 5000)
    one.set("a", 5000)
    assert cache.get("b") == b"i" * 3000
    assert cache.get("c") == cache.get("a") == b"n" * 5000
    assert cache.check() == []
    one.kill()
    cache.set("d", b"1")
    assert cache._store.reaper.reap() == 1
    assert cache._store.current.index.words[f.W_ACTIVE] == 1
    assert cache.check() == []


def test_a_cleaner_that_idles_does_not_keep_others_from_cleaning(make: Make, idle: Any) -> None:
    cache = make(**SMALL)
    for n in range(300):
        cache.set(n, noise(1000, n))
    for n in range(300):
        if n % 3:
            cache.delete(n)
    with cache._store.locks.index:
        index = cache._store.current.index
        for entry in index.table_entries():
            if index.words[entry] & ~f.MASK32 == f.SEALED:
                index.words[entry + f.T_CLEANER] = 12345  # of handles that live, for all we can see
    alive = cache._store.owner.alive_tokens
    cache._store.owner.alive_tokens = lambda: alive() | {12345}  # type: ignore[method-assign]
    for n in range(1000, 1500):
        cache.set(n, noise(1000, n))
    assert cache.stats().evictions == 0
    assert all(cache.get(n) is not None for n in range(1000, 1500))


def test_a_checkpoint_under_way_is_waited_for_before_anything_is_evicted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log that it covers, beside the new one, takes the room that copies need."""
    cache = make(**SMALL)
    cleaner, changes = cache._store.cleaner, cache._store.changes
    monkeypatch.setattr(cache._store.checkpoints, "_is_due", lambda: False)
    for n in range(400):
        cache.set(n, noise(1000, n))
    cache.delete_many([n for n in range(400) if n % 2])
    begun, copies, refused = threading.Event(), threading.Event(), []
    write, copy_room = Checkpoints._write_file, cleaner._copy_room

    def write_slowly(*args: Any) -> None:
        begun.set()
        copies.wait(10)
        time.sleep(0.2)
        write(*args)

    def without_room(size: int, segment: int) -> Any:
        if changes.total_size > changes.size:  # one that the checkpoint covers
            copies.set()
            refused.append(size)
            raise cleaning._NoRoom
        return copy_room(size, segment)

    monkeypatch.setattr(Checkpoints, "_write_file", write_slowly)
    monkeypatch.setattr(cleaner, "_copy_room", without_room)
    thread = threading.Thread(target=cache._store.checkpoints.write)
    thread.start()
    assert begun.wait(10)
    for n in range(400, 800):
        cache.set(n, noise(1000, n))
    thread.join()
    assert refused
    assert cache.stats().evictions == 0
    assert all(cache.get(n) is not None for n in range(400, 800))


def test_the_dead_are_reaped_before_anything_is_evicted(make: Make, idle: Any) -> None:
    cache = make(size_limit=2 * MIB, segment_size=512 << 10)
    others = [idle(f"{p}:90000,{p}:90000") for p in range(8)]
    for one in others:
        one.kill()
    for n in range(70):
        cache.set(n, noise(10_000, n))
    assert cache.stats().evictions == 0
    assert all(cache.get(str(p)) is not None for p in range(8))
    assert all(cache.get(n) is not None for n in range(70))
    assert cache._store.current.index.words[f.W_ACTIVE] == 1


def test_the_dead_are_looked_for_now_and_then(
    make: Make, idle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make(size_limit=64 * MIB)
    cache.set("mine", b"1")
    idle("a:1000").kill()
    monkeypatch.setattr("yatagarasu_cache.store.reaping._REAP_SECONDS", 0.0)
    for n in range(600):
        cache.set(n, noise(1000))
    assert cache._store.current.index.words[f.W_ACTIVE] == 1


# -- lists of segments -------------------------------------------------------------------------------


def test_the_segment_table_grows(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yatagarasu_cache.store.recovery.Recovery._table_capacity", lambda recovery, segments: 16)
    cache = make(size_limit=8 * MIB, segment_size=4096)
    other = DiskCache(directory, backend="threads")
    for n in range(1000):
        cache.set(n, noise(900, n))
        cache.delete(n - 1) if n % 100 == 0 else None
    assert cache._store.current.index.table_capacity >= 256
    assert len(cache._store.current.index.segments()) > 250
    assert all(other.get(n) == noise(900, n) for n in range(1000) if n % 100 != 99)
    other.set("more", b"1")
    assert cache.get("more") == b"1"
    assert cache.check() == []
    other.close()


# -- what is full --------------------------------------------------------------------------------------


def fill(cache: DiskCache) -> StorageFull:
    with pytest.raises(StorageFull) as caught:
        for n in range(10_000):
            cache.set(n, noise(1000, n))
    return caught.value


def test_full_says_what_fills_it_and_what_helps(make: Make) -> None:
    cache = make(**SMALL, eviction="none")
    text = str(fill(cache))
    for part in ("size_limit=1048576", "live entries", "index and checkpoint", "writing handle", "raise it"):
        assert part in text
    assert "eviction" in text
    evicting = make(cache.directory + "-evicting", **SMALL)
    assert "eviction" not in str(evicting._store.room._full())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_taken_segments_of_handles_that_die(make: Make, idle: Any, how: int) -> None:
    """Whose segment was taken dies without noticing; so does, elsewhere, who took it."""
    cache = make(**SMALL)
    one = idle("a:6000,b:6000")
    cache.set("a", b"mine")
    store = cache._store
    with store.locks.index:
        index = store.current.index
        (segment,) = [
            index.words[e] & f.MASK32
            for e in index.table_entries()
            if index.words[e] == f.ACTIVE | index.words[e] & f.MASK32
            and index.words[e + f.T_OWNER] != store.owner.token
        ]
        index.set_state(segment, f.TAKEN)
    os.kill(one.process.pid, how)
    one.process.communicate()
    assert store.active.others_append()  # it may have died in the middle of an append
    store.reaper.reap()
    assert not store.active.others_append()
    assert index.state(segment) == f.SEALED
    assert cache.get("b") == b"i" * 6000
    assert cache.check() == []


KILLED = """
import itertools, os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1], backend="threads")
cache.set("there", b"1")
def parts():
    yield bytes(3 << 20)
    yield bytes(1 << 20)
    os.kill(os.getpid(), 9)
cache.set("big", parts())
"""


def test_what_the_dead_were_writing_goes_while_others_live(make: Make, directory: Path) -> None:
    """Temporary files of handles that were killed don't pile up until somebody is alone."""
    cache = make(size_limit=64 * MIB)
    cache.set("mine", b"1")
    before = cache.volume()
    for _ in range(4):
        with pytest.raises(AssertionError):
            run_python(KILLED, directory)
        assert os.listdir(directory / "tmp")
        cache._store.reaper.reap()
        assert os.listdir(directory / "tmp") == []
        assert cache.volume() - before < MIB
    segment = directory / "segments" / "000000ff.seg"
    header = f.pack_segment_header(255, cache._store.current.index.identity, 1, 0)
    segment.write_bytes(header)  # of one that was killed as it began it
    with pytest.raises(AssertionError):
        run_python(KILLED, directory)
    cache._store.reaper.reap()
    assert not segment.exists()
    assert cache.check() == [] and cache["there"] == b"1"


# -- files take whole blocks ---------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("segment", "size"),
    [
        (4096, 100), (4096, 1000), (4096, 8000), (8192, 3000), (16 << 10, 1000), (32 << 10, 8000), (128 << 10, 100),
        (None, 3000),
    ],
)  # fmt: skip
def test_segments_count_as_the_blocks_that_they_take(
    make: Make, directory: Path, segment: int | None, size: int
) -> None:
    """However small they are."""
    cache = make(size_limit=MIB, segment_size=segment)
    most, pick = MIB + cache._store.limits.segment_bytes, random.Random(size)
    for n in range(min(4 * MIB // size, 4000)):
        cache.set(n % 2500, noise(size // 2 + pick.randrange(size), n))
        if n % 100 == 0:
            assert disk_blocks(directory) <= most
    assert disk_blocks(directory) <= most
    assert cache.check() == []
    words = cache._store.current.index.words
    assert words[f.W_SLACK] < words[f.W_SEGMENT_BYTES]
    cache.close()
    (directory / f.INDEX_NAME).unlink()
    with make(segment_size=segment) as again:  # counted as before
        assert again.check() == []
        for n in range(200):
            again.set(n, noise(size, n))
        assert disk_blocks(directory) <= most


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("limit", "large"), [(256 << 10, None), (MIB, None), (4 * MIB, 1), (8 * MIB, 4096), (64 * MIB, None)]
)
def test_files_count_as_the_blocks_that_they_take(
    make: Make, directory: Path, limit: int, large: int | None
) -> None:
    """However small large values are: the disk that is used stays within the limit."""
    cache = make(size_limit=limit, large_value_size=large)
    smallest, segment = cache._store.limits.large_bytes, cache._store.limits.segment_bytes

    def put(cache: DiskCache, n: int) -> None:
        length = smallest + (n * 37) % 4097
        if n % 3:
            cache.set(n % 3000, noise(length, n))
        else:  # in parts that are no blocks
            cache.set(n % 3000, iter([noise(length // 2, n), noise(length - length // 2, n + 1)]))
        if n % 7 == 0:
            cache.delete((n - 5) % 3000)

    number = min(2 * limit // max(smallest, 4096), 2500)
    for n in range(number):
        put(cache, n)
        if n % 100 == 0:
            assert disk_blocks(directory) <= limit + segment
    assert disk_blocks(directory) <= limit + segment
    assert len(cache) * max(smallest, 4096) > limit // 3
    assert cache.check() == []
    cache.close()
    (directory / f.INDEX_NAME).unlink()
    with make() as again:  # counted as before
        assert again.check() == []
        for n in range(number, number + 200):
            put(again, n)
        assert disk_blocks(directory) <= limit + segment
        again.clear()
        assert again._store.current.index.words[f.W_LARGE_BYTES] == 0


# -- segments that were removed -----------------------------------------------------------------


def held_bytes(process: int | str, directory: Path) -> int:
    """What removed files that a process has open still take of the disk."""
    total = 0
    for fd in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/{process}/fd/{fd}")
            if name.startswith(str(directory)) and name.endswith(" (deleted)"):
                total += os.stat(f"/proc/{process}/fd/{fd}").st_blocks * 512
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere they stay until they are closed")
def test_removed_segments_take_no_room(make: Make, directory: Path, idle: Any) -> None:
    """Neither for whoever removes them, nor for a process that has them open and does nothing."""
    cache = make(**SMALL)
    for n in range(40):
        cache.set(n, noise(8000, n))
    reader = idle("", reads="all")
    for n in range(2000):
        cache.set(n % 40, noise(8000, n))
        if n % 500 == 0:
            assert cache.get(n % 40) == noise(8000, n)
    segment = SMALL["segment_size"]
    checkpoint = cache._store.checkpoints._thread
    if checkpoint is not None and checkpoint.ident is not None:  # it may be amidst removing one
        checkpoint.join()
    assert held_bytes("self", directory) <= segment
    assert held_bytes(reader.process.pid, directory) <= segment
    reader.set("n", 10)
    assert cache.get("n") == b"n" * 10
    assert cache.stats().evictions == 0 and cache.check() == []


def test_what_was_handed_out_of_a_removed_segment_stays(make: Make) -> None:
    cache = make(**SMALL)
    values = {n: noise(3000, n) for n in range(20)}
    cache.set_many(values)
    locations = [cache.location(n) for n in values]
    readers = [cache.open(n) for n in values]
    walk = cache.entries()
    first = next(walk)
    for n in range(600):
        cache.set(n % 20, noise(3000, 1000 + n))
    cache.clear()
    for n, location, reader in zip(values, locations, readers, strict=True):
        fd, offset, length = location
        assert os.pread(fd, length, offset) == values[n]
        assert reader.read() == values[n]
        location.close()
        reader.close()
    assert first.key in values
    assert not [entry for entry in walk if entry.key not in values]
    assert cache.check() == []


def test_a_backup_of_hard_links_stays_whole(make: Make, directory: Path, tmp_path: Path) -> None:
    cache = make(**SMALL)
    cache.set_many({n: noise(3000, n) for n in range(20)})
    cache.flush()
    backup = tmp_path / "backup"
    shutil.copytree(directory, backup, copy_function=os.link)
    before = {path.name: path.read_bytes() for path in (backup / "segments").iterdir()}
    cache.clear()
    for n in range(600):
        cache.set(n % 20, noise(3000, 1000 + n))
    after = {path.name: path.read_bytes() for path in (backup / "segments").iterdir()}
    assert all(after[name].startswith(content.rstrip(b"\0")) for name, content in before.items())


# -- large files that are being removed --------------------------------------------------------------

LARGE = 200_000
LARGES: dict[str, Any] = {"size_limit": 4 * MIB, "eviction": "none", "large_value_size": 64 << 10}


def filled(make: Make, **options: Any) -> tuple[DiskCache, int]:
    """A cache full of large values, but for one, and how many there are."""
    cache = make(**LARGES, **options)
    with pytest.raises(StorageFull):
        for n in range(100):
            cache.set(n, noise(LARGE, n))
    assert cache.delete(len(cache) - 1)  # how much room was left is a matter of chance
    return cache, len(cache)


def beyond(cache: DiskCache) -> bytes:
    """A value that is a little longer than what there is room for."""
    store = cache._store
    return noise(store.budget.limit - store.current.index.used_bytes + LARGE // 2)


class Removing:
    """Holds up a cache that removes large files, until it is told to go on."""

    def __init__(self, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun, self._may = threading.Event(), threading.Event()
        self._remove = cache._store.files.large.remove
        monkeypatch.setattr(cache._store.files.large, "remove", self)

    def __call__(self, low: int, high: int, pointer: int) -> bool:
        self._begun.set()
        assert self._may.wait(60)
        return self._remove(low, high, pointer)

    def while_held(
        self, change: Callable[[], object], directory: Path, meanwhile: Callable[[], object]
    ) -> tuple[int, bool]:
        """Half a second after `meanwhile` began, beside `change`: bytes on disk, and whether it waits. Both
        are done in the end.
        """
        remover = threading.Thread(target=change)
        remover.start()
        assert self._begun.wait(60)
        writer = threading.Thread(target=meanwhile)
        writer.start()
        writer.join(0.5)
        there, waits = disk_bytes(directory), writer.is_alive()
        self._may.set()
        remover.join()
        writer.join()
        return there, waits


@pytest.mark.parametrize("way", ["delete", "delete_many", "clear", "replaced", "small in its place", "many"])
def test_a_large_value_counts_until_its_file_is_gone(
    directory: Path, make: Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(room, "_REMOVAL_SECONDS", 60.0)
    cache, _ = filled(make)
    other = make(**LARGES, max_open_files=99)  # a store of its own
    if way == "replaced":
        assert cache.delete(0)
    changes: dict[str, Callable[[], object]] = {
        "delete": lambda: cache.delete(1),
        "delete_many": lambda: cache.delete_many(range(1, 6)),
        "clear": cache.clear,
        "replaced": lambda: cache.set(1, noise(LARGE // 3)),
        "small in its place": lambda: cache.set(1, b"small"),
        "many": lambda: cache.set_many({1: b"small", 2: b"small"}),
    }
    removing = Removing(cache, monkeypatch)
    there, waits = removing.while_held(changes[way], directory, lambda: other.set("new", beyond(other)))
    assert waits and there <= 4 * MIB
    assert "new" in other
    assert other._store.current.index.words[f.W_LEAVING] == 0 and cache.check() == []


def test_nothing_is_evicted_for_what_is_being_removed(
    directory: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_REMOVAL_SECONDS", 60.0)
    options = {**LARGES, "eviction": "lru", "headroom": 0.02}
    cache, other = make(**options), make(**options, max_open_files=99)
    for n in range(40):
        cache.set(n, noise(LARGE, n))
    last, evictions, live = range(34, 40), cache.stats().evictions, cache.stats().live_bytes
    assert evictions > 10

    def store() -> None:
        assert other.stats().live_bytes <= live - 6 * LARGE
        for n in range(5):
            other.set(("new", n), noise(LARGE, n))

    removing = Removing(cache, monkeypatch)
    there, waits = removing.while_held(lambda: cache.delete_many(last), directory, store)
    assert waits and there <= 4 * MIB
    assert all(other["new", n] == noise(LARGE, n) for n in range(5))
    assert cache.stats().evictions == evictions and cache.check() == []


DIES_REMOVING = """
import os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
cache._store.files.large.remove = lambda *name: os._exit(0)
cache.delete_many(range(1, 5))
"""


@pytest.mark.parametrize("waits", [True, False])
def test_who_dies_removing_large_values_is_not_waited_for_long(
    directory: Path, make: Make, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(room, "_REMOVAL_SECONDS", 0.1)
    cache, count = filled(make)
    run_python(DIES_REMOVING, directory)
    words = cache._store.current.index.words
    assert len(cache) == count - 4 and words[f.W_LEAVING] == 4 * f.file_bytes(LARGE)
    if waits:
        cache.set("new", beyond(cache))
        assert "new" in cache and words[f.W_LEAVING] == 0
        assert cache.check() == []
    cache.close()
    again = make(**LARGES)  # else who closes last tidies up
    assert len(os.listdir(directory / "large")) == len(again) == count - 4 + waits
    assert again._store.current.index.words[f.W_LEAVING] == 0 and again.check() == []
