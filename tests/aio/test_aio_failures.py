"""Failures of the disk, and strangers that keep a call waiting."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import noise
from watched import (
    LARGE,
    LIMIT,
    NEW,
    OLD,
    SMALL,
    Open,
    Watched,
    assert_free,
    flip,
    parts_of,
    run,
    turns_of_the_loop,
)

from yatagarasu_cache import AsyncDiskCache, CacheIOError, DiskCache, EntryGone, StorageFull, aio_loop

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# -- failures -------------------------------------------------------------------------------------


def test_no_space(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].errors = dict.fromkeys(("write", "allocate"), errno.ENOSPC)
            for value in (b"new", NEW, parts_of(NEW), io.BytesIO(NEW)):
                with pytest.raises(StorageFull):
                    await cache.set("k", value)
            with pytest.raises(StorageFull):
                await cache.add("new", 1)
            assert await cache.get("k") == b"old"
            watched[-1].errors = {}
            assert await cache.set("k", b"new") and await cache.get("k") == b"new"
            assert_free(cache)
            assert await cache.check() == []

    run(main())


def test_full_without_eviction(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(size_limit=1 << 20, eviction="none") as cache:
            found = await asyncio.gather(
                *(cache.set(n, noise(4000, n)) for n in range(400)), return_exceptions=True
            )
            stored = [n for n, one in enumerate(found) if one is True]
            assert {type(one) for one in found} == {bool, StorageFull}
            assert await cache.get_many(range(400)) == {n: noise(4000, n) for n in stored}

    run(main())


def test_a_failing_put_does_not_fail_those_that_share_its_batch(
    open_cache: Open, watched: list[Watched]
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", 1)
            watched[-1].poison = b"poison"
            values = [b"poison" if n % 10 == 3 else noise(50, n) for n in range(100)]
            found = await asyncio.gather(
                *(cache.set(n, value) for n, value in enumerate(values)), return_exceptions=True
            )
            for number, (one, value) in enumerate(zip(found, values, strict=True)):
                if value == b"poison":
                    assert isinstance(one, CacheIOError) and await cache.get(number) is None
                else:
                    assert one is True and await cache.get(number) == value
            assert await cache.check() == []
            assert_free(cache)

    run(main())


@pytest.mark.parametrize("key", ["k", "large"])
def test_a_disk_that_cannot_be_read(open_cache: Open, watched: list[Watched], key: str) -> None:
    """An error and neither a hit nor a miss; the entry stays."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get(key)
            before = (await cache.stats()).process
            watched[-1].cold = True
            watched[-1].errors = {"read": errno.EIO}
            for call in (
                lambda: cache.get(key),
                lambda: cache.get_many([key, "missing"]),
                lambda: cache.pop(key),
            ):
                with pytest.raises(CacheIOError, match="cannot read"):
                    await call()
            watched[-1].errors = {}
            after = (await cache.stats()).process
            assert after == {**before, "misses": 1}
            assert await cache.get(key) == OLD[key]
            assert_free(cache)

    run(main())


@pytest.mark.parametrize("memory", ["warm", "cold"])
@pytest.mark.parametrize("call", ["get", "get_many", "get_entry", "open", "pop"])
@pytest.mark.parametrize("key", [7, "large"])
def test_damage_is_a_miss(
    open_cache: Open, directory: Path, watched: list[Watched], memory: str, call: str, key: Any
) -> None:
    """Counted, never a wrong value, and told from a key that was never there."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get_many(list(OLD))
            watched[-1].cold = memory == "cold"
            flip(directory, OLD[key])
            if call == "get":
                assert await cache.get(key, "miss") == "miss"
            elif call == "get_many":
                assert await cache.get_many(list(OLD)) == {k: v for k, v in OLD.items() if k != key}
            elif call == "pop":
                assert await cache.pop(key, "miss") == "miss"
            elif call == "open" and key == "large":  # verified where it is read
                async with await cache.open(key) as file:
                    with pytest.raises(CacheIOError, match="damaged"):
                        await file.read()
            elif call == "open":
                with pytest.raises(KeyError):
                    await cache.open(key)
            else:
                entry = await cache.get_entry(key)  # its record is sound
                assert entry is not None
                with pytest.raises(EntryGone):
                    await entry.value
            stats = (await cache.stats()).process
            assert stats["corrupt"] == 1
            assert stats["misses"] == (call != "get_entry" and (call, key) != ("open", "large"))
            assert await cache.get(key) is None and key not in cache
            assert await cache.get("k") == b"old"
            assert await cache.check() == []

    run(main())


# -- what strangers keep waiting ------------------------------------------------------------------


class Slow:
    """A file and iterators of a stranger's, who lets nobody have anything until he is told to."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.go = threading.Event()
        self.asked = 0

    def read(self, _size: int = -1) -> bytes:
        self.asked += 1
        self.waiting.release()
        assert self.go.wait(LIMIT)
        return b"" if self.asked > 1 else noise(3 * LARGE)

    def parts(self) -> Iterator[bytes]:
        while part := self.read():
            yield part

    def pairs(self) -> Iterator[tuple[str, bytes]]:
        yield "pair", self.read()

    def keys(self) -> Iterator[str]:
        self.read()
        yield "key"

    async def reached(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.waiting.acquire, True, LIMIT)


SLOW: dict[str, Callable[[AsyncDiskCache, Slow, int], Any]] = {
    "file": lambda c, slow, n: c.set(n, slow),
    "iterator": lambda c, slow, n: c.set(n, slow.parts()),
    "pairs": lambda c, slow, n: c.set_many(slow.pairs()),
    "keys to get": lambda c, slow, n: c.get_many(slow.keys()),
    "keys to delete": lambda c, slow, n: c.delete_many(slow.keys()),
}


@pytest.mark.parametrize("name", SLOW)
def test_nobody_waits_for_a_slow_stranger(open_cache: Open, watched: list[Watched], name: str) -> None:
    """More of them than there are workers, and everything else goes on."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", b"v")
            slow = [Slow() for _ in range(20)]
            tasks = [asyncio.ensure_future(SLOW[name](cache, one, n)) for n, one in enumerate(slow)]
            for one in slow:
                await one.reached()
            watched[-1].cold = True
            await cache.set("small", b"1")
            assert await cache.incr("n") == 1 and await cache.get("k") == b"v"
            assert await cache.set("another", parts_of(NEW)) and await cache.set("file", io.BytesIO(NEW))
            for one in slow:
                one.go.set()
            await asyncio.gather(*tasks)
            if name in ("file", "iterator"):
                assert [await cache.get(n) for n in range(20)] == [noise(3 * LARGE)] * 20

    run(main())


@pytest.mark.parametrize("name", SLOW)
def test_cancelling_what_waits_for_a_stranger(open_cache: Open, directory: Path, name: str) -> None:
    """The task ends, closing does not wait, nothing more is asked, and the old value stays."""

    async def main() -> None:
        slow = Slow()
        cache = open_cache(**SMALL)
        await cache.set(0, b"old")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(SLOW[name](cache, slow, 0), 0.01)
        await slow.reached()
        await asyncio.wait_for(cache.close(), LIMIT / 2)
        assert not slow.go.is_set()
        slow.go.set()
        for thread in threading.enumerate():
            if thread.name == "yatagarasu-stream":
                await asyncio.to_thread(thread.join, LIMIT)
        assert slow.asked == 1

    run(main())
    with DiskCache(directory, **SMALL) as cache:
        assert cache.get(0) == b"old" and len(cache) == 1 and cache.check() == []
    assert os.listdir(directory / "tmp") == []


def test_threads_of_strangers_are_bounded(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they were cancelled: a thread that nobody waits for is one all the same."""
    monkeypatch.setattr(aio_loop, "_STREAMS", 2)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            slow = [Slow() for _ in range(3)]
            tasks = [asyncio.ensure_future(cache.set(n, one)) for n, one in enumerate(slow)]
            await slow[0].reached()
            await slow[1].reached()
            tasks[0].cancel()
            await turns_of_the_loop()
            assert tasks[0].cancelled() and not slow[2].asked
            slow[0].go.set()
            await slow[2].reached()
            for one in slow:
                one.go.set()
            assert await asyncio.gather(*tasks[1:]) == [True, True] and 0 not in cache

    run(main())


def test_close_is_cancelled_and_goes_on(open_cache: Open, watched: list[Watched]) -> None:
    """Also where the executor of the loop is full; whoever closes again waits for its end."""
    full, go = threading.Event(), threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1)
        loop.set_default_executor(executor)
        loop.run_in_executor(None, lambda: full.set() or go.wait(LIMIT))
        cache = open_cache(**SMALL)
        await cache.set("k", b"v")
        watched[-1].hold("sync")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(cache.close(), 0.01)
        second = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        assert cache.closed and not second.done() and full.is_set()
        watched[-1].go_on()
        await second
        assert cache._sync().closed
        go.set()

    run(main())


def test_a_loop_that_ends_while_it_closes(open_cache: Open, watched: list[Watched]) -> None:
    """What is under way is not waited for then, but the cache is closed, in its thread."""
    caches: list[AsyncDiskCache] = []

    async def main() -> None:
        cache = open_cache(**SMALL)
        caches.append(cache)
        await cache.set("k", b"v")
        slow = Slow()
        task = asyncio.ensure_future(cache.set("slow", slow))
        await slow.reached()
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        assert not closing.done() and not task.done()
        asyncio.get_running_loop().call_later(0.05, slow.go.set)

    run(main())
    for thread in threading.enumerate():
        if thread.name == "yatagarasu-closing":
            thread.join(LIMIT)
    assert caches[0]._sync().closed


def test_no_thread_can_be_started(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be done in place is, the rest says why."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            assert await cache.set("k", io.BytesIO(NEW)) and await cache.get("k") == NEW
            with pytest.raises(CacheIOError, match="no thread"):
                await cache.set("k", parts_of(NEW))
            assert await cache.get("k") == NEW

    monkeypatch.setattr(threading.Thread, "start", refuse)
    asyncio.run(main())
