"""`AsyncDiskCache.get_or_set`: tasks of one loop, of several, and threads beside them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from helpers import Clock, run_python
from watched import Open, Watched, run, turns_of_the_loop

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache, LockTimeout, ReadOnlyError, Reentered
from yatagarasu_cache.computing import aio_ways

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a coroutine that nobody awaited


class Counted:
    """A coroutine function that counts its calls."""

    def __init__(self, *results: Any, takes: float = 0.0) -> None:
        self.results, self.takes, self.calls = results, takes, 0

    async def __call__(self) -> Any:
        self.calls += 1
        result = self.results[min(self.calls, len(self.results)) - 1]
        await asyncio.sleep(self.takes)
        if isinstance(result, BaseException):
            raise result
        return result


async def eventually(condition: Callable[[], object], patience: float = 20.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.005)


def is_idle(cache: AsyncDiskCache) -> bool:
    desk = cache._desk
    assert desk is not None
    place = desk.lease.place
    return not (
        place.in_flight._flights or place.in_flight._refreshing or place.key_locks.held or place.key_locks._queues
    )


async def plain_coroutine() -> int:
    return 5


async def with_arguments(a: int, b: int) -> int:
    return a + b


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "coroutine function": plain_coroutine,
    "partial": functools.partial(with_arguments, 2, b=3),
    "lambda that returns a coroutine": lambda: plain_coroutine(),
    "callable object": Counted(5),
    "mock": AsyncMock(return_value=5),
    "plain": lambda: 5,
    "plain partial": functools.partial(int, "5"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_function(open_cache: Open, name: str) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            assert await cache.get_or_set("k", FUNCTIONS[name], expire=60, tag="t") == 5
            assert await cache.get("k") == 5
            assert await cache.get_or_set("k", lambda: 6) == 5
            entry = await cache.get_entry("k")
            assert entry is not None and entry.tag == "t" and is_idle(cache)

    run(main())


def test_it_opens_the_cache(open_cache: Open) -> None:
    async def main() -> None:
        cache = open_cache()
        assert await cache.get_or_set("k", plain_coroutine) == 5
        await cache.close()
        with pytest.raises(ClosedError):
            await cache.get_or_set("other", plain_coroutine)

    run(main())


@pytest.mark.parametrize("kind", ["coroutine", "plain"])
def test_tasks_compute_once_and_share_the_object(open_cache: Open, kind: str) -> None:
    calls: list[int] = []

    async def coroutine() -> list[int]:
        calls.append(1)
        await asyncio.sleep(0.1)
        return [1]

    def plain() -> list[int]:
        calls.append(1)
        time.sleep(0.1)
        return [1]

    async def main() -> None:
        async with open_cache() as cache:
            function: Any = coroutine if kind == "coroutine" else plain
            found = await asyncio.gather(*(cache.get_or_set("k", function) for _ in range(50)))
            assert len(calls) == 1 and len({id(one) for one in found}) == 1
            assert (await cache.stats()).computing["shared"] == 49 and is_idle(cache)

    run(main())


def test_the_loop_goes_on_while_a_plain_function_blocks(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            go = threading.Event()
            task = asyncio.ensure_future(cache.get_or_set("k", lambda: go.wait(20)))
            for i in range(50):
                assert await cache.get_or_set(i, plain_coroutine) == 5
            go.set()
            assert await task is True

    run(main())


def test_nothing_of_it_is_done_by_the_loop(open_cache: Open, watched: list[Watched]) -> None:
    """Reads and writes are a worker's; the file of locks is opened by one too."""

    async def main() -> None:
        async with open_cache() as cache:
            me = threading.get_ident()
            before = len(watched[0].calls)
            assert await cache.get_or_set("k", plain_coroutine, expire=1, stale=5, tag="t") == 5
            async with cache.lock("k"), cache.semaphore("k", 3):
                pass
            throttled = cache.throttle(5, 1)(plain_coroutine)
            assert await throttled() == 5
            blocking = [call for call, thread in watched[0].calls[before:] if thread == me and call not in ("read_nowait", "prefetch")]
            assert not blocking

    run(main())


def test_plain_functions_see_the_callers_context(open_cache: Open) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def main() -> None:
        variable.set(7)
        async with open_cache() as cache:
            assert await cache.get_or_set("k", variable.get) == 7

    run(main())


def test_waiters_get_the_very_exception(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            function = Counted(ValueError("no"), 7, takes=0.05)
            found = await asyncio.gather(
                *(cache.get_or_set("k", function) for _ in range(10)), return_exceptions=True
            )
            assert {id(one) for one in found} == {id(function.results[0])} and function.calls == 1
            assert await cache.get_or_set("k", function) == 7

    run(main())


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration()])
def test_what_no_coroutine_can_raise(open_cache: Open, error: Exception) -> None:
    def function() -> None:
        raise error

    async def main() -> None:
        async with open_cache() as cache:
            with pytest.raises((RuntimeError, StopAsyncIteration)):
                await cache.get_or_set("k", function)
            assert is_idle(cache)

    run(main())


def test_a_cancelled_owner_passes_the_turn(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            began = asyncio.Event()
            calls: list[int] = []

            async def function() -> int:
                calls.append(1)
                began.set()
                await asyncio.sleep(0.1 if len(calls) > 1 else 1000)
                return len(calls)

            owner = asyncio.ensure_future(cache.get_or_set("k", function))
            await began.wait()
            waiters = [asyncio.ensure_future(cache.get_or_set("k", function)) for _ in range(5)]
            await turns_of_the_loop()
            waiters[0].cancel()  # who waits just leaves
            owner.cancel()
            found = await asyncio.gather(owner, *waiters, return_exceptions=True)
            assert [type(one) for one in found[:2]] == [asyncio.CancelledError] * 2 and found[2:] == [2] * 4
            assert is_idle(cache)

    run(main())


def test_a_thread_that_computes_goes_on_for_those_who_wait(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            began, go = threading.Event(), threading.Event()
            calls: list[int] = []

            def function() -> int:
                calls.append(1)
                began.set()
                assert go.wait(20)
                return 5

            owner = asyncio.ensure_future(cache.get_or_set("k", function))
            assert await asyncio.to_thread(began.wait, 20)
            waiter = asyncio.ensure_future(cache.get_or_set("k", function))
            await turns_of_the_loop()
            owner.cancel()
            with pytest.raises(asyncio.CancelledError):
                await owner
            go.set()
            assert await waiter == 5 and len(calls) == 1 and await cache.get("k") == 5
            await eventually(lambda: is_idle(cache))

    run(main())


def test_and_stores_it_for_nobody_else(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            began, go = threading.Event(), threading.Event()

            def function() -> int:
                began.set()
                assert go.wait(20)
                raise ValueError("seen by nobody")

            owner = asyncio.ensure_future(cache.get_or_set("k", function))
            assert await asyncio.to_thread(began.wait, 20)
            owner.cancel()
            with pytest.raises(asyncio.CancelledError):
                await owner
            go.set()
            await eventually(lambda: is_idle(cache))

    run(main())


def test_wait_for(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(cache.get_or_set("k", Counted(1, takes=1000)), 0.05)
            assert is_idle(cache) and await cache.get_or_set("k", plain_coroutine) == 5

    run(main())


def test_wait_is_a_bound(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            owner = asyncio.ensure_future(cache.get_or_set("k", Counted(1, takes=0.3)))
            await eventually(lambda: not is_idle(cache))
            for wait in (0, 0.05):
                with pytest.raises(LockTimeout, match="of this process"):
                    await cache.get_or_set("k", plain_coroutine, wait=wait)
            assert await owner == 1

    run(main())


@pytest.mark.usefixtures("apart")
def test_processes_compute_once(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as one, open_cache() as other:
            function = Counted([1], takes=0.1)
            caches = [one, other] * 10
            assert await asyncio.gather(*(cache.get_or_set("k", function) for cache in caches)) == [[1]] * 20
            assert function.calls == 1
            owner = asyncio.ensure_future(one.get_or_set("l", Counted(1, takes=0.3)))
            await eventually(lambda: not is_idle(one))
            with pytest.raises(LockTimeout, match="another process"):
                await other.get_or_set("l", function, wait=0.05)
            waiter = asyncio.ensure_future(other.get_or_set("l", function))
            await turns_of_the_loop()
            waiter.cancel()
            await asyncio.wait([waiter])
            assert await owner == 1 and is_idle(one) and is_idle(other)

    run(main())


def test_threads_and_tasks_of_several_loops_compute_once(directory: Path, backend: str) -> None:
    calls: list[int] = []
    found: list[Any] = []
    start = threading.Barrier(6)

    def function() -> object:
        calls.append(1)
        time.sleep(0.3)
        return thing

    thing = object()  # which can't be stored, only shared

    async def tasks() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            await asyncio.to_thread(start.wait)
            found.extend(await asyncio.gather(*(cache.get_or_set("k", function) for _ in range(10))))

    def thread() -> None:
        with DiskCache(directory, backend=backend) as cache:
            start.wait()
            found.append(cache.get_or_set("k", function))

    threads = [threading.Thread(target=lambda: asyncio.run(tasks())) for _ in range(3)]
    threads += [threading.Thread(target=thread) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert len(calls) == 1 and found == [thing] * 33


def test_a_function_that_asks_for_itself(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            sync = cache._sync()

            async def function() -> Any:
                return await cache.get_or_set("k", function)

            def plain() -> Any:
                return sync.get_or_set("p", plain)

            async def by_tasks() -> Any:
                return await asyncio.gather(cache.get_or_set("t", by_tasks), cache.get_or_set("other", plain_coroutine))

            async def a() -> Any:
                return await cache.get_or_set("b", lambda: sync.get_or_set("a", plain))

            for key, one in {"k": function, "p": plain, "t": by_tasks, "a": a}.items():
                with pytest.raises(Reentered, match=repr(key)):
                    await cache.get_or_set(key, one)
            await eventually(lambda: is_idle(cache))

    run(main())


def test_a_task_that_outlives_the_computation_is_not_refused(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            go = asyncio.Event()
            tasks: list[asyncio.Task[Any]] = []

            async def later() -> Any:
                await go.wait()
                return await cache.get_or_set("k", Counted("again"))

            async def function() -> int:
                tasks.append(asyncio.ensure_future(later()))
                return 5

            assert await cache.get_or_set("k", function) == 5
            await cache.delete("k")
            go.set()
            assert await tasks[0] == "again"

    run(main())


def test_a_thread_does_not_wait_for_a_task_of_its_own(open_cache: Open) -> None:
    """Nobody else could run the task meanwhile."""

    async def main() -> None:
        async with open_cache() as cache:
            sync, go = cache._sync(), asyncio.Event()

            async def function() -> str:
                await go.wait()
                return "computed"

            async def asks_in_a_thread() -> str:
                return await asyncio.to_thread(sync.get_or_set, "k", Counted("another"))

            task = asyncio.ensure_future(cache.get_or_set("k", function))
            while is_idle(cache):
                await asyncio.sleep(0)
            with pytest.raises(Reentered, match="'k' is computed by a task of this thread"):
                sync.get_or_set("k", Counted("another"))
            asking = asyncio.ensure_future(asks_in_a_thread())
            await asyncio.sleep(0.05)
            go.set()
            assert await task == await asking == "computed"

    run(main())


def test_nor_over_another_thread(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            sync, go, asked = cache._sync(), asyncio.Event(), threading.Event()

            async def function() -> str:
                await go.wait()
                return "computed"

            def plain() -> Any:
                asked.set()
                return sync.get_or_set("k", Counted("another"))

            task = asyncio.ensure_future(cache.get_or_set("k", function))
            while is_idle(cache):
                await asyncio.sleep(0)
            thread = asyncio.ensure_future(asyncio.to_thread(sync.get_or_set, "over", plain))
            while not asked.is_set():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            with pytest.raises(Reentered):
                sync.get_or_set("over", Counted("another"))
            go.set()
            assert await task == await thread == "computed"

    run(main())


def test_two_that_wait_for_each_other(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            both = asyncio.Event()
            began: list[str] = []

            def function(mine: str, other: str) -> Callable[[], Any]:
                async def asks() -> Any:
                    began.append(mine)
                    if len(began) == 2:
                        both.set()
                    await both.wait()
                    return await cache.get_or_set(other, plain_coroutine)

                return asks

            found = await asyncio.gather(
                cache.get_or_set("a", function("a", "b")), cache.get_or_set("b", function("b", "a")),
                return_exceptions=True,
            )  # fmt: skip
            assert Reentered in map(type, found) and is_idle(cache)

    run(main())


def test_stale_is_served_and_computed_anew_by_a_task(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> None:
        async with open_cache() as cache:
            function = Counted("old", ValueError("down"), "new", takes=0.01)

            async def ask() -> Any:
                return await cache.get_or_set("k", function, expire=10, stale=100)

            assert await ask() == "old"
            clock.advance(11)
            assert await cache.get("k") is None and await ask() == "old"
            await eventually(lambda: is_idle(cache) and function.calls == 2)
            assert (await cache.stats()).computing["failed_refreshes"] == 1
            end = time.monotonic() + 20
            while await ask() == "old":
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            assert function.calls == 3 and await cache.get("k") == "new"
            clock.advance(11)
            assert await cache.get_or_set("k", lambda: "plain", expire=10, stale=100) == "new"
            await eventually(lambda: is_idle(cache) and not aio_ways._refreshes)
            assert await cache.get("k") == "plain"

    run(main())


def test_close_ends_refreshes(open_cache: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)

    async def main() -> None:
        async with open_cache() as cache, open_cache() as other:
            function = Counted("old", "new", takes=0.0)
            await cache.get_or_set("k", function, expire=10, stale=100)
            clock.advance(11)
            function.takes = 1000
            assert await cache.get_or_set("k", function, expire=10, stale=100) == "old"
            await eventually(lambda: function.calls == 2)
            await cache.close()
            assert not aio_ways._refreshes and is_idle(other)
            assert await other.get_or_set("k", lambda: "other", expire=10, stale=100) == "old"
            await eventually(lambda: is_idle(other))

    run(main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", ["run", "stopped"])
def test_a_loop_that_ends_with_a_refresh(directory: Path, how: str) -> None:
    code = """
import asyncio, gc, sys, time
from yatagarasu_cache import AsyncDiskCache, DiskCache
calls = []
async def function():
    calls.append(1)
    await asyncio.sleep(1000 if len(calls) == 2 else 0)
    return len(calls)
async def main(close):
    cache = AsyncDiskCache(sys.argv[1])
    await cache.get_or_set("k", function, expire=0.01, stale=100)
    await asyncio.sleep(0.05)
    assert await cache.get_or_set("k", function, expire=0.01, stale=100) == 1
    while len(calls) < 2:
        await asyncio.sleep(0.01)
    if close:
        await cache.close()
    return cache
if sys.argv[2] == "run":
    cache = asyncio.run(main(False))
else:
    loop = asyncio.new_event_loop()
    cache = loop.run_until_complete(main(True))
    loop.close()
del cache
gc.collect()
with DiskCache(sys.argv[1]) as cache:
    assert cache.get_or_set("k", lambda: 3, wait=10) == 3
print("end")
"""
    assert run_python(code, directory, how).strip() == "end"


def test_early_refresh(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def main() -> None:
        async with open_cache() as cache:
            function = Counted("v1", "v2", takes=0.01)
            assert await cache.get_or_set("k", function, expire=100, refresh_early=True) == "v1"
            clock.advance(99)
            assert await cache.get_or_set("k", function, expire=100, refresh_early=1e9) == "v1"
            await eventually(lambda: is_idle(cache))
            assert await cache.get("k") == "v2"

    run(main())


def test_bad_arguments(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            for options, kind in (({"stale": 5}, ValueError), ({"wait": -1}, ValueError), ({"expire": "1"}, TypeError)):
                with pytest.raises(kind):
                    await cache.get_or_set("k", plain_coroutine, **options)  # type: ignore[call-overload]
            with pytest.raises(TypeError, match="function"):
                await cache.get_or_set("k", 5)  # type: ignore[call-overload]

    run(main())


def test_a_reader(open_cache: Open, directory: Path) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)
        async with open_cache(read_only=True) as cache:
            assert await cache.get_or_set("k", plain_coroutine) == 1
            with pytest.raises(ReadOnlyError):
                await cache.get_or_set("other", plain_coroutine)
            for method in (lambda: cache.lock("k"), lambda: cache.semaphore("k", 2), lambda: cache.throttle(1, 1)):
                with pytest.raises(ReadOnlyError):
                    method()

    run(main())


def test_what_cannot_be_stored(open_cache: Open, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            thing = object()
            for _ in range(2):
                assert await cache.get_or_set("k", lambda: thing) is thing
            assert (await cache.stats()).computing["unstored"] == 2

    run(main())
    assert len([record for record in caplog.records if "cannot be stored" in record.message]) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_handles_that_nobody_closes_are_collected(open_cache: Open) -> None:
    """Nothing of it keeps a cache alive."""

    async def used() -> weakref.ref[Any]:
        cache = open_cache()
        await cache.get_or_set("k", plain_coroutine)
        await cache.get_or_set("l", lambda: 5, expire=5, stale=5, refresh_early=1.0)
        async with cache.lock("k"):
            return weakref.ref(cache._desk)  # type: ignore[arg-type]

    async def main() -> None:
        desk = await used()
        await eventually(lambda: gc.collect() >= 0 and desk() is None)  # a worker may just be letting go of it

    run(main())
