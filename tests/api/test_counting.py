"""Hits and misses reach the totals of the cache, however the processes end that count them."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from helpers import Clock, environment, open_apart

from yatagarasu_cache import AsyncDiskCache, DiskCache
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.index import IndexDamaged

pytestmark = pytest.mark.once

MOST = 256  # uses of a process that may be missing after it was killed
OPTIONS: dict[str, Any] = {"size_limit": 64 << 20, "backend": "threads"}


def totals(cache: DiskCache) -> tuple[int, int]:
    """What the index says, folding nothing."""
    words = cache._store.current.index.words
    return words[f.W_COUNTERS], words[f.W_COUNTERS + 1]


# How uses are made, in each of these ways; a use is a hit or a miss.
WAYS: dict[str, tuple[Callable[[DiskCache, int], object], int]] = {
    "hit": (lambda cache, n: cache.get("k"), 1),
    "miss": (lambda cache, n: cache.get(("none", n)), 1),
    "int key": (lambda cache, n: cache.get(7), 1),
    "large": (lambda cache, n: cache.get("large"), 1),
    "many": (lambda cache, n: cache.get_many(["k", "none", 7]), 3),
    "entry": (lambda cache, n: cache.get_entry("k"), 1),
    "location": (lambda cache, n: cache.location("k").close(), 1),
    "pop": (lambda cache, n: cache.pop(("none", n)), 1),
}


def fill(cache: DiskCache) -> None:
    cache.set("k", b"v" * 100)
    cache.set(7, "seven")
    cache.set("large", bytes(1 << 20))


@pytest.mark.parametrize("way", WAYS)
def test_few_uses_wait(directory: Path, core: str, way: str) -> None:
    use, each = WAYS[way]
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        for n in range(600):
            use(cache, n)
            done = (n + 1) * each
            assert done - MOST < sum(totals(cache)) <= done
        assert sum(totals(cache)) > 0
        stats = cache.stats()
        assert stats.hits + stats.misses == 600 * each
        assert (stats.process["hits"], stats.process["misses"]) == totals(cache) == (stats.hits, stats.misses)


@pytest.mark.parametrize("way", WAYS)
def test_uses_wait_for_a_second(
    directory: Path, core: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    use, each = WAYS[way]
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        for n in range(5):
            use(cache, n)
            assert sum(totals(cache)) == 0
        clock.advance(1.1)
        use(cache, 5)
        counted = sum(totals(cache))
        assert 5 * each < counted <= 6 * each
        use(cache, 6)
        assert sum(totals(cache)) == counted
        clock.advance(-5)  # the clock was set back
        use(cache, 7)
        assert 7 * each < sum(totals(cache)) <= 8 * each


def test_asyncio_counts_too(directory: Path, core: str) -> None:
    import asyncio

    async def main() -> None:
        async with AsyncDiskCache(directory, **OPTIONS) as cache:
            inner = cache._cache
            assert inner is not None
            fill(inner)
            for n in range(400):
                await cache.get("k"), await cache.get(7), await cache.get("none")
                assert 3 * (n + 1) - MOST < sum(totals(inner))

    asyncio.run(main())
    with DiskCache(directory, **OPTIONS) as cache:
        assert totals(cache) == (800, 400)


USER = """
import mmap, os, sys
from yatagarasu_cache import DiskCache
directory, path, way = sys.argv[1:4]
from test_counting import WAYS, OPTIONS
use, each = WAYS[way]
cache = DiskCache(directory, **OPTIONS)
with open(path, "r+b") as file:
    uses = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
n = 0
while True:
    n += 1
    use(cache, n)
    uses[0] = n * each
"""


def python(code: str, *arguments: object, core: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(YATAGARASU_CORE=core))


@pytest.mark.in_turn
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside writers"])
@pytest.mark.parametrize("way", ["hit", "miss", "many", "int key"])
def test_a_killed_process_has_counted(directory: Path, tmp_path: Path, core: str, way: str, busy: bool) -> None:
    """At most so many of its uses are missing; none comes twice.

    Where whoever has the lock is not running for long, more may wait, for a second: that is rare.
    """
    cores = [core, CORES[0 if core == CORES[-1] else -1]]
    missing = [kill_users(directory / str(n), tmp_path / f"uses-{n}", cores, way, busy) for n in range(1)]
    while missing[-1] > len(cores) * MOST and len(missing) < 4:
        n = len(missing)
        missing.append(kill_users(directory / str(n), tmp_path / f"uses-{n}", cores, way, busy))
    assert -len(cores) * WAYS[way][1] <= missing[-1] <= len(cores) * MOST, missing


def kill_users(directory: Path, uses: Path, cores: list[str], way: str, busy: bool) -> int:
    """How many uses are missing when processes were killed that used the cache, while others wrote."""
    directory.parent.mkdir(exist_ok=True)
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
    users, maps = [], []
    for number, core in enumerate(cores):
        path = uses.with_name(f"{uses.name}-{number}")
        path.write_bytes(bytes(8))
        with open(path, "r+b") as file:
            maps.append(memoryview(mmap.mmap(file.fileno(), 8)).cast("Q"))
        users.append(python(USER, directory, path, way, core=core))
    with DiskCache(directory, **OPTIONS) as cache:
        deadline = time.monotonic() + 60
        while min(done[0] for done in maps) < 3000 and time.monotonic() < deadline:
            for n in range(200) if busy else ():
                cache.set(n, b"v" * 100)
            time.sleep(random.uniform(0, 0.01))
        for user in users:
            user.send_signal(signal.SIGKILL)
            user.wait()
        assert min(done[0] for done in maps) >= 3000
        return sum(int(done[0]) for done in maps) - sum(totals(cache))


def test_nobody_waits_for_the_lock(directory: Path, core: str) -> None:
    """While somebody else has it uses are counted later, and then all of them."""
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        cache.get("k")
        fd = os.open(directory / f.LOCK_NAME, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        began = time.monotonic()
        for _ in range(1000):
            cache.get("k")
        assert totals(cache) == (0, 0) and time.monotonic() - began < 1
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
        for _ in range(16):
            cache.get("k")
        assert totals(cache)[0] > 1000
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with cache._store.locks.index:
                held.set()
                done.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(20)
        before = totals(cache)
        for _ in range(1000):
            cache.get("k")
        assert totals(cache) == before
        done.set()
        thread.join()
        assert cache.stats().hits == 2017


def test_sums_are_exact(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads, forked children and both cores at once."""
    open_apart(monkeypatch)
    caches = []
    for name in CORES * 2:
        monkeypatch.setenv("YATAGARASU_CORE", name)
        caches.append(DiskCache(directory, **OPTIONS))
    fill(caches[0])

    def work(cache: DiskCache) -> None:
        for n in range(1000):
            cache.get("k"), cache.get(7), cache.get(("none", n))

    def crew() -> None:
        threads = [threading.Thread(target=work, args=(cache,)) for cache in caches for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for cache in caches:  # what is pending now is the parent's
        cache.get("k")
    children = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            try:
                crew()
                for cache in caches:
                    cache.close()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    crew()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    for cache in caches[1:]:
        cache.close()
    stats = caches[0].stats()
    each = 3 * 2 * len(caches) * 1000
    assert (stats.hits, stats.misses) == (2 * each + len(caches), each)
    caches[0].close()


def test_what_goes_wrong_is_not_told_to_who_gets(
    directory: Path, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        calls = count()

        def fail(*_: object) -> None:
            next(calls)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(cache._store.counters), "_fold", fail)
            for kind in (OSError, ValueError, IndexDamaged):
                error: BaseException = kind("on purpose")
                for _ in range(300):
                    assert cache.get("k") == b"v" * 100 and cache.get("none") is None
            assert next(calls) > 10
            error = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                for _ in range(300):
                    cache.get("k")
        for _ in range(300):
            cache.get("k")
        assert cache.stats().hits > 1200 and cache.stats().misses == 900


def test_a_read_only_handle_counts_for_itself(directory: Path, core: str) -> None:
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        with DiskCache(directory, read_only=True, **OPTIONS) as reader:
            for _ in range(1000):
                reader.get("k"), reader.get("none"), reader.get(7)
            assert totals(cache) == (0, 0)
            assert reader.stats().process["hits"] == 2000 == cache.stats().process["hits"]
        assert cache.stats().hits == 0


def test_counted_in_the_index_that_took_the_others_place(directory: Path, core: str) -> None:
    with DiskCache(directory, **OPTIONS) as cache:
        fill(cache)
        for _ in range(100):
            cache.get("k")
        cache.stats()
        cache._store.current.rebuild("on purpose")
        before = totals(cache)[0]
        for _ in range(300):
            cache.get("k")
        assert totals(cache)[0] >= before + 300 - MOST
        assert cache.stats().hits == before + 300


def test_a_call_that_counts_may_close_the_cache(directory: Path, core: str) -> None:
    """What is called back runs after all else: the mapping may have gone by then."""
    cache = DiskCache(directory, **OPTIONS)
    fill(cache)
    store: Any = cache._store
    if core == "c":
        store.core._core.tell(cache.close, 0)
    else:
        store.core._fold = cache.close
        store.core._told = 0
    assert cache.get("k") == b"v" * 100
    assert cache.closed
