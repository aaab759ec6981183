"""Cancelling: at every suspension, in a worker, in a queue; nothing is left behind."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import descriptors, noise
from watched import (
    LARGE,
    NEW,
    OLD,
    SMALL,
    CancelledAt,
    Open,
    Watched,
    assert_free,
    parts_of,
    run,
    turns_of_the_loop,
    until,
)

from yatagarasu_cache import AsyncDiskCache, DiskCache
from yatagarasu_cache.aio import AsyncValueReader
from yatagarasu_cache.entry import Location

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
# What is called, and by what its key may be replaced.
CANCELLED: dict[str, tuple[Callable[[AsyncDiskCache], Any], dict[Any, Any]]] = {
    "get": (lambda c: c.get("k"), {}),
    "get large": (lambda c: c.get("large"), {}),
    "get_many": (lambda c: c.get_many([*range(20), "large", 3]), {}),
    "get_entry": (lambda c: c.get_entry("k"), {}),
    "location": (lambda c: c.location("large"), {}),
    "open": (lambda c: c.open("large"), {}),
    "set": (lambda c: c.set("k", b"new"), {"k": b"new"}),
    "set large": (lambda c: c.set("k", NEW), {"k": NEW}),
    "set file": (lambda c: c.set("k", io.BytesIO(NEW)), {"k": NEW}),
    "set asynchronous": (lambda c: c.set("k", parts_of(NEW)), {"k": NEW}),
    "add": (lambda c: c.add("new", b"new"), {"new": b"new"}),
    "pop": (lambda c: c.pop("large"), {"large": None}),
    "incr": (lambda c: c.incr("n"), {"n": 6}),
    "delete": (lambda c: c.delete("k"), {"k": None}),
    "set_many": (lambda c: c.set_many({"k": b"new", "n": 6}), {"k": b"new", "n": 6}),
    "delete_many": (lambda c: c.delete_many(["k", "n"]), {"k": None, "n": None}),
    "check": (lambda c: c.check(), {}),
}


async def close_result(value: Any) -> None:
    if isinstance(value, AsyncValueReader):
        await value.close()
    elif isinstance(value, Location):
        value.close()


def assert_old_or_new(directory: Path, backend: str, new: dict[Any, Any]) -> None:
    """The cache was closed: each entry is as it was or as it was to be, and nothing else is there."""
    with DiskCache(directory, backend=backend, **SMALL) as cache:
        for key in {*OLD, *new}:
            assert cache.get(key) in (OLD.get(key), new.get(key, OLD.get(key))), key
        assert cache.check() == []
        large = sum(isinstance(value := cache.get(key), bytes) and len(value) >= LARGE for key in cache)
    assert len(os.listdir(directory / "large")) == large
    assert os.listdir(directory / "tmp") == []


@pytest.mark.parametrize("name", CANCELLED)
def test_cancelled_at_every_suspension(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str
) -> None:
    call, new = CANCELLED[name]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before, at, done = descriptors(), 0, False
        while not done:
            at += 1
            async with open_cache(max_in_flight=3, **SMALL) as cache:
                watched[-1].cold = True
                await cache.get("n")
                counted = CancelledAt(call(cache), at)

                async def operation(counted: Any = counted) -> None:
                    await close_result(await counted)

                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.create_task(operation())
                done = counted.suspensions < at
                await turns_of_the_loop(3)  # `get_many` cancels its reads, which leave one turn later
                assert_free(cache)
                assert await cache.set("works", b"still") is True
                assert await cache.get("works") == b"still"
                stats = (await cache.stats()).process
                assert stats["hits"] + stats["misses"] <= 2 + 22
                await cache.delete("works")
            assert descriptors() == before
            with DiskCache(directory, backend=backend, **SMALL) as cache:
                assert all(cache.get(key) in (OLD.get(key), value) for key, value in new.items())
                cache.delete("new")
                cache.set_many(OLD)
        assert at > 1 and at < 60
        assert_old_or_new(directory, backend, new)

    run(main())


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("get", "read"), ("get large", "read"), ("get large", "close_file"), ("get_many", "read"),
        ("get_entry", "read"), ("location", "read"), ("open", "read"), ("set", "write"),
        ("set large", "write"), ("set large", "replace"), ("set file", "write"), ("set file", "replace"),
        ("set asynchronous", "write"), ("set asynchronous", "replace"), ("add", "write"), ("pop", "read"),
        ("pop", "unlink"), ("incr", "write"), ("set_many", "write"), ("check", "scandir"),
    ],
)  # fmt: skip
def test_cancelled_while_a_worker_is_at_it(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str, held: str
) -> None:
    """One that only reads ends at once, and its worker before the cache is closed; a change with its worker."""
    call, new = CANCELLED[name]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before = descriptors()
        async with open_cache(**SMALL) as cache:
            watched[-1].cold = True
            watched[-1].hold(held)
            task = asyncio.ensure_future(call(cache))
            await until(watched[-1].entered)
            task.cancel()
            if new:
                await asyncio.wait({task}, timeout=0.05)  # what must not happen would happen in this time
                task.cancel()  # nobody gets out by asking twice
                await turns_of_the_loop()
                assert not task.done()
                watched[-1].go_on()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_free(cache)
            watched[-1].go_on()
            assert await cache.get(7) == OLD[7]
            await cache.set("works", b"still")
            assert await cache.get("works") == b"still"
            await cache.delete("works")
        assert descriptors() == before

    run(main())
    assert_old_or_new(directory, backend, new)


@pytest.mark.parametrize(
    ("name", "held"), [("add", "write"), ("set file", "replace"), ("set large", "write"), ("pop", "unlink")]
)
def test_closing_waits_for_workers_of_cancelled_calls(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str, held: str
) -> None:
    call, new = CANCELLED[name]

    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(OLD)
        watched[-1].hold(held)
        task = asyncio.ensure_future(call(cache))
        await until(watched[-1].entered)
        task.cancel()
        closing = asyncio.create_task(cache.close())
        await asyncio.wait({closing}, timeout=0.05)  # what must not happen would happen in this time
        assert not cache._sync().closed
        watched[-1].go_on()
        await closing
        assert task.cancelled()

    run(main())
    assert_old_or_new(directory, backend, new)


def test_cancelling_a_set_whose_stream_has_stalled(open_cache: Open, directory: Path) -> None:
    """Nothing more may ever come: neither the worker nor closing waits for it."""

    async def main() -> None:
        reached, never = asyncio.Event(), asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield noise(2 * LARGE)
            reached.set()
            await never.wait()

        before = threading.active_count()
        cache = open_cache(**SMALL)
        await cache.set("k", b"old")
        volume = await cache.volume()
        task = asyncio.create_task(cache.set("k", parts()))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cache.get("k") == b"old"
        await asyncio.wait_for(cache.close(), 10)
        assert os.listdir(directory / "tmp") == os.listdir(directory / "large") == []
        assert threading.active_count() <= before + 2  # the loop's own
        async with open_cache(**SMALL) as cache:
            assert await cache.volume() <= volume
            assert await cache.get("k") == b"old" and await cache.check() == []

    run(main())


def test_cancelled_while_it_waits_for_its_turn(open_cache: Open, watched: list[Watched]) -> None:
    """Those behind it move up, also when it is cancelled in the moment in which its turn comes."""

    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].hold("write")
            first = asyncio.create_task(cache.add("first", 1))
            await until(watched[-1].entered)
            second, third = (
                asyncio.create_task(cache.add("second", 2)),
                asyncio.create_task(cache.add("third", 3)),
            )
            await turns_of_the_loop()
            second.cancel()
            fourth = asyncio.create_task(cache.add("fourth", 4))
            watched[-1].go_on()
            assert await asyncio.gather(first, third, fourth) == [True] * 3
            assert second.cancelled() and "second" not in cache

            turns = cache._loops[asyncio.get_running_loop()].turns
            assert turns.enter()
            fifth, sixth = (
                asyncio.create_task(cache.add("fifth", 5)),
                asyncio.create_task(cache.add("sixth", 6)),
            )
            await turns_of_the_loop()
            turns.leave()
            fifth.cancel()  # it has its turn, and does not know it yet
            assert await sixth and fifth.cancelled() and "fifth" not in cache
            assert_free(cache)

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_cancellations(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], seed: int
) -> None:
    rng = random.Random(seed)
    keys = [f"k{n}" for n in range(12)]
    tried: dict[Any, set[Any]] = {key: {None} for key in keys}
    certain: collections.Counter[str] = collections.Counter()
    perhaps: collections.Counter[str] = collections.Counter()
    gets = 0

    def draw(cache: AsyncDiskCache, number: int) -> Any:
        nonlocal gets
        key = rng.choice(keys)
        value = noise(rng.choice((10, 1000, LARGE + number)), number)
        kind = rng.randrange(9)
        if kind < 3:
            gets += 1
            return cache.get(key)
        if kind == 3:
            gets += 3
            return cache.get_many(rng.sample(keys, 3))
        if kind == 4:
            return cache.incr("n")
        if kind == 5:
            return cache.delete(key)
        tried[key].add(value)
        if kind == 6:
            return cache.add(key, value)
        return cache.set(key, value if kind == 7 else parts_of(value))

    async def one(cache: AsyncDiskCache, number: int) -> None:
        call = draw(cache, number)
        name = call.__name__
        task = asyncio.ensure_future(call)
        if rng.random() < 0.6:
            await turns_of_the_loop(rng.randrange(12))
            task.cancel()
        found = (await asyncio.gather(task, return_exceptions=True))[0]
        perhaps[name] += 1
        if isinstance(found, asyncio.CancelledError):
            return
        certain[name] += 1
        assert not isinstance(found, BaseException), found
        if name == "get":
            assert any(found in values for values in tried.values())
        elif name == "get_many":
            assert all(value in tried[key] for key, value in found.items())

    async def main() -> None:
        async with open_cache(**SMALL):
            pass
        before = descriptors()
        async with open_cache(max_in_flight=5, **SMALL) as cache:
            watched[-1].cold = seed % 2 == 0
            await asyncio.gather(*(one(cache, number) for number in range(400)))
            await turns_of_the_loop(3)
            assert_free(cache)
            stats = (await cache.stats()).process
            assert stats["hits"] + stats["misses"] <= gets
        assert descriptors() == before
        with DiskCache(directory, backend=backend, **SMALL) as cache:
            assert all(cache.get(key) in tried[key] for key in keys)
            assert certain["incr"] <= cache.get("n", 0) <= perhaps["incr"]
            assert 0 < certain["set"] < perhaps["set"]
            assert cache.check() == []
        assert os.listdir(directory / "tmp") == []

    run(main())
