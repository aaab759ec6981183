"""The loop's thread never waits: hits in place, the rest in workers, opening as well."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from available import needs_nowait
from calls import CALLS, CONTENT, described, outcome
from helpers import descriptors, in_threads, noise
from watched import (
    LARGE,
    LIMIT,
    NEVER_WAIT,
    SMALL,
    Open,
    Watched,
    parts_of,
    run,
    turns_of_the_loop,
    until,
)

from yatagarasu_cache import AsyncDiskCache, CacheIOError, ClosedError, DiskCache, aio
from yatagarasu_cache.store.index import Index

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
LOOKS = {"__contains__", "__len__"}  # need no await


# -- hits in place --------------------------------------------------------------------------------


def by_hand(coroutine: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
    """Begin a coroutine without a task: (True, its result), or (False, None) if it suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return True, stop.value
    coroutine.close()
    return False, None


@pytest.mark.parametrize(
    "value", [b"plain", "text", 5, {"a": [1]}, noise(LARGE - 1)], ids=lambda v: type(v).__name__
)
def test_a_warm_get_does_not_leave_the_task(open_cache: Open, tmp_path: Path, value: Any) -> None:
    needs_nowait(tmp_path)

    async def main() -> None:
        turns = 0

        def count() -> None:
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(count)

        async with open_cache() as cache:
            await cache.set("k", value)
            await cache.get("k")
            asyncio.get_running_loop().call_soon(count)
            cache._in_place = 0
            for _ in range(aio._YIELD_EVERY - 1):
                assert by_hand(cache.get("k")) == (True, value)
            assert turns == 0  # the loop did nothing meanwhile
            assert by_hand(cache.get("k")) == (False, None)  # others get their turn

    run(main())


def test_many_hits_in_place_let_others_run(open_cache: Open, tmp_path: Path) -> None:
    needs_nowait(tmp_path)

    async def main() -> None:
        turns, stopped = 0, False

        async def other() -> None:
            nonlocal turns
            while not stopped:
                turns += 1
                await asyncio.sleep(0)

        async with open_cache() as cache:
            await cache.set_many((n, b"x") for n in range(1000))
            await cache.get(0)
            cache._in_place = 0
            task = asyncio.create_task(other())
            seen = []
            for _ in range(5 * aio._YIELD_EVERY):
                assert await cache.get(0) == b"x"
                seen.append(turns)
            first = [seen.index(turn) + 1 for turn in sorted(set(seen)) if turn]
            assert first == [n * aio._YIELD_EVERY for n in range(1, 6)]
            before = turns
            assert len(await cache.get_many(range(1000))) == 1000
            assert turns - before >= 1000 // aio._YIELD_EVERY
            stopped = True
            await task

    run(main())


# -- the loop's thread ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(CALLS) - LOOKS))
def test_no_call_waits_in_the_thread_of_the_loop(open_cache: Open, watched: list[Watched], name: str) -> None:
    """With nothing in memory: neither opening, nor the call, nor closing."""
    loops = threading.get_ident()

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(CONTENT, tag="t")
        async with open_cache(durability="sync", **SMALL) as cache:
            await outcome(CALLS[name], cache)
            watched[-1].cold = True
            for _ in range(2):  # with segments that are not open, and with open ones
                await outcome(CALLS[name], cache)
            assert await cache.set("one", parts_of(noise(2 * LARGE))) is True

    run(main())
    for one in watched:
        assert one.made_by(loops) <= NEVER_WAIT
        assert {"open", "read", "write", "close_file"} <= {call for call, _ in one.calls}


@pytest.mark.parametrize(
    ("held", "call"),
    [
        ("read", lambda c: c.get("k")),
        ("read", lambda c: c.get("large")),
        ("open", lambda c: c.get("k")),
        ("read", lambda c: c.get_many(["k", "large"])),
        ("read", lambda c: c.open("large")),
        ("read", lambda c: c.location("k")),
        ("read", lambda c: c.pop("k")),
        ("write", lambda c: c.set("new", b"x")),
        ("sync", lambda c: c.set("new", b"x")),
        ("write", lambda c: c.set("new", noise(2 * LARGE))),
        ("write", lambda c: c.set("new", parts_of(noise(5 * LARGE)))),
        ("sync", lambda c: c.flush()),
        ("read", lambda c: c.check()),
        ("scandir", lambda c: c.check()),
    ],
)
def test_the_heart_beats_while_the_disk_is_slow(
    open_cache: Open, watched: list[Watched], held: str, call: Any
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(CONTENT, tag="t")
        async with open_cache(durability="sync", **SMALL) as cache:
            watched[-1].hold(held)
            task = asyncio.ensure_future(call(cache))
            await until(watched[-1].entered)
            await turns_of_the_loop()
            assert not task.done()
            watched[-1].go_on()
            await described(task)

    run(main())


def test_a_slow_close_and_a_slow_opening(open_cache: Open, watched: list[Watched], monkeypatch: Any) -> None:
    begun, go = threading.Event(), threading.Event()
    fetch = Index.fetch

    def slow(index: Index) -> None:
        begun.set()
        assert go.wait(LIMIT)
        fetch(index)

    monkeypatch.setattr(Index, "fetch", slow)

    async def main() -> None:
        cache = open_cache()
        task = asyncio.create_task(cache.set("k", 1))
        await until(begun)
        await turns_of_the_loop()
        assert not task.done()
        go.set()
        await task
        watched[-1].hold("sync")
        closing = asyncio.create_task(cache.close())
        await until(watched[-1].entered)
        await turns_of_the_loop()
        assert not closing.done() and cache.closed
        watched[-1].go_on()
        await closing

    run(main())


def test_closing_a_reader_that_is_still_reading(open_cache: Open, watched: list[Watched]) -> None:
    """The read was cancelled, but its worker goes on: the loop does not wait for it."""

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", noise(2 << 20))
            reader = await cache.open("k")
            watched[-1].hold("read")
            task = asyncio.create_task(reader.read())
            await until(watched[-1].entered)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            closing = asyncio.create_task(reader.close())
            await turns_of_the_loop()
            watched[-1].go_on()
            await closing
            with pytest.raises(ValueError, match="closed"):
                await reader.read()

    run(main())


# -- opening --------------------------------------------------------------------------------------


def test_opening_fetches_the_index_in_a_worker(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    fetch = Index.fetch

    def noted(index: Index) -> None:
        threads.append(threading.get_ident())
        fetch(index)

    monkeypatch.setattr(Index, "fetch", noted)

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)

    run(main())
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "mine"), CacheIOError(errno.EIO, "mine")], ids=["OSError", "CacheIOError"]
)
def test_an_index_that_cannot_be_fetched(open_cache: Open, monkeypatch: Any, error: OSError) -> None:
    def broken(index: Index) -> None:
        raise error

    async def main() -> None:
        async with open_cache() as cache:  # whatever is made once is made now
            await cache.set("k", 1)
        before = descriptors()
        cache = open_cache()
        with monkeypatch.context() as patch:
            patch.setattr(Index, "fetch", broken)
            for _ in range(2):
                with pytest.raises(CacheIOError, match="mine"):
                    await cache.get("k")
            with pytest.raises(CacheIOError):
                async with open_cache():
                    pass
        assert descriptors() == before
        assert await cache.get("k") == 1  # it may be tried again
        await cache.close()
        assert descriptors() == before

    run(main())


def test_many_tasks_open_once(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        cache = open_cache()
        assert await asyncio.gather(*(cache.incr("n") for _ in range(50))) != []
        assert await cache.get("n") == 50
        await cache.close()

    run(main())
    assert len(watched) == 1


def test_many_tasks_see_why_it_does_not_open(open_cache: Open, directory: Path) -> None:
    directory.mkdir()
    (directory / "foreign").write_text("x")

    async def main() -> None:
        cache = open_cache()
        found = await asyncio.gather(*(cache.get("k") for _ in range(20)), return_exceptions=True)
        assert {type(one).__name__ for one in found} == {"FormatError"}
        await cache.close()
        with pytest.raises(ClosedError):
            await cache.get("k")

    run(main())


@pytest.fixture
def slow_opening(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(set when an opening is under way, to be set to let it go on)."""
    begun, go = threading.Event(), threading.Event()
    begin = DiskCache.__init__

    def slow(cache: DiskCache, *arguments: Any) -> None:
        begun.set()
        assert go.wait(LIMIT)
        begin(cache, *arguments)

    monkeypatch.setattr(DiskCache, "__init__", slow)
    return begun, go


def test_several_loops_open_once(
    open_cache: Open, watched: list[Watched], slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening
    cache = open_cache()
    everybody = threading.Barrier(4, action=go.set)
    results: list[Any] = []

    async def main() -> None:
        tasks = [asyncio.create_task(cache.add(("k", n), n)) for n in range(3)]
        await turns_of_the_loop()
        await asyncio.to_thread(everybody.wait, LIMIT)
        results.append(sum(await asyncio.gather(*tasks)))

    in_threads(4, lambda number: run(main()))
    assert sum(results) == 3 and len(watched) == 1
    run(cache.close())


@pytest.mark.parametrize("how", ["operation", "async with"])
def test_opening_that_is_cancelled_leaves_nothing(
    open_cache: Open, how: str, slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening

    async def use(cache: AsyncDiskCache) -> None:
        if how == "operation":
            await cache.set("k", 1)
        else:
            async with cache:
                raise AssertionError("it was cancelled before")

    async def main() -> None:
        go.set()
        async with open_cache() as cache:
            await cache.set("k", 0)
        go.clear()
        begun.clear()
        before = descriptors()
        cache = open_cache()
        task = asyncio.create_task(use(cache))
        await until(begun)
        task.cancel()
        await turns_of_the_loop()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        if how == "operation":
            assert await cache.get("k") == 0
        await cache.close()
        assert cache.closed and descriptors() == before

    run(main())


def test_closing_while_it_opens(
    open_cache: Open, slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening

    async def main() -> None:
        go.set()
        async with open_cache():
            pass
        go.clear()
        begun.clear()
        before = descriptors()
        cache = open_cache()
        task = asyncio.create_task(cache.get("k"))
        await until(begun)
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        go.set()
        await closing
        with contextlib.suppress(ClosedError):
            assert await task is None
        assert descriptors() == before

    run(main())
