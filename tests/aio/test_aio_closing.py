"""Several loops, loops that end, and closing."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from calls import CALLS, CONTENT, outcome
from helpers import descriptors, in_threads, noise
from watched import LIMIT, NEW, OLD, SMALL, Open, Watched, parts_of, run, turns_of_the_loop, until

from yatagarasu_cache import ClosedError

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.mark.parametrize("memory", ["warm", "cold"])
def test_several_loops_at_once(open_cache: Open, watched: list[Watched], memory: str) -> None:
    cache = open_cache(max_in_flight=10, **SMALL)
    run(cache.set_many((n, noise(200, n)) for n in range(50)))
    watched[-1].cold = memory == "cold"

    async def one(rng: random.Random, which: int) -> None:
        for number in range(15):
            key = rng.randrange(50)
            assert await cache.get(key) == noise(200, key)
            await cache.incr("n")
            await cache.set((which, number), noise(100, number))
            assert await cache.get((which, number)) == noise(100, number)

    async def main(which: int) -> None:
        await asyncio.gather(*(one(random.Random(f"{which} {n}"), (which, n)) for n in range(4)))  # type: ignore[arg-type]

    in_threads(4, lambda which: run(main(which)))

    async def end() -> None:
        assert await cache.get("n") == 4 * 4 * 15
        stats = (await cache.stats()).process
        assert (stats["hits"], stats["misses"]) == (2 * 4 * 4 * 15 + 1, 0)
        assert await cache.check() == []
        await cache.close()

    run(end())


def test_one_object_in_one_loop_after_the_other(open_cache: Open) -> None:
    """Loops that were closed are forgotten; one that ended in the middle of its work too."""
    cache = open_cache(**SMALL)
    run(cache.set_many(OLD))
    run(cache.get_many(list(OLD)))  # the last loop's ring stays open, if it had to have one
    before = descriptors()
    for number in range(5):

        async def abandoned(number: int = number) -> None:
            asyncio.ensure_future(cache.set(("left", number), b"x"))
            asyncio.ensure_future(cache.get_many(list(OLD)))
            await asyncio.sleep(0)

        assert run(cache.incr("n")) == 6 + number
        run(abandoned())
        assert len(cache._loops) <= 1
    assert run(cache.get("k")) == b"old"
    assert descriptors() <= before + 2  # segments begun since
    assert run(cache.check()) == []
    run(cache.close())


class IntrudedLoop(asyncio.SelectorEventLoop):
    """A loop that lets others in when it is asked whether it is closed."""

    intrusion: Callable[[], Any] | None = None

    def is_closed(self) -> bool:
        intrusion, self.intrusion = self.intrusion, None
        if intrusion is not None:
            intrusion()
        return super().is_closed()


def test_loops_that_come_while_others_are_forgotten(open_cache: Open) -> None:
    """Two threads with new loops find the same closed one."""
    cache = open_cache()
    first = IntrudedLoop()
    first.run_until_complete(cache.set("k", 1))
    first.close()
    first.intrusion = lambda: in_threads(1, lambda _: run(cache.add("l", 2)))
    assert run(cache.add("m", 3)) is True
    assert first.intrusion is None
    assert run(cache.get_many(list("klm"))) == {"k": 1, "l": 2, "m": 3}
    assert first not in cache._loops
    run(cache.close())


@pytest.mark.parametrize("name", CALLS)
def test_closed(open_cache: Open, name: str) -> None:
    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(CONTENT, tag="t")
        await cache.get("k")
        await cache.close()
        assert (await outcome(CALLS[name], cache))[0] is ClosedError
        fresh = open_cache(**SMALL)
        await fresh.close()
        assert (await outcome(CALLS[name], fresh))[0] is ClosedError
        for closed in (cache, fresh):
            with pytest.raises(ClosedError):
                async with closed:
                    pass

    run(main())


def test_closed_in_another_loop(open_cache: Open) -> None:
    """Whoever still has the object is told, and no thread is started for that."""

    def workers() -> list[threading.Thread]:
        found = [thread for thread in threading.enumerate() if "yatagarasu" in thread.name]
        for thread in found:
            if thread.name != "yatagarasu-worker":  # has delivered what it did, and is about to end
                thread.join(LIMIT)
        return [thread for thread in found if thread.is_alive()]

    async def main() -> None:
        before = workers()
        cache = open_cache()
        await cache.add("k", 1)
        entry = await cache.get_entry("k")
        assert entry is not None
        await asyncio.to_thread(run, cache.close())
        for name in ("add", "set", "set stream", "get", "get_many", "incr", "keys", "stats", "get_many none"):
            assert (await outcome(CALLS[name], cache))[0] is ClosedError, name
        with pytest.raises(ClosedError):
            await entry.value
        assert workers() == before
        await cache.close()

    run(main())


def test_close_is_idempotent_and_waits(open_cache: Open, watched: list[Watched]) -> None:
    """What is under way completes first; whoever closes meanwhile waits too, others are refused."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before = descriptors()
        cache = open_cache(max_in_flight=2, **SMALL)
        await cache.add("x", 1)
        watched[-1].cold = True
        watched[-1].hold("write")
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(call)
            for call in (
                cache.add("new", 1), cache.set("set", b"x"), cache.incr("n"), cache.get("k"),
                cache.get_many(list(range(20))), cache.set("file", io.BytesIO(NEW)),
                cache.set("stream", parts_of(NEW)), cache.get_entry("k"),
            )
        ]  # fmt: skip
        cancelled = asyncio.ensure_future(cache.add("cancelled", 1))
        await until(watched[-1].entered)
        cancelled.cancel()
        closing = [asyncio.create_task(cache.close()) for _ in range(3)]
        await turns_of_the_loop()
        assert not any(task.done() for task in closing) and cache.closed
        with pytest.raises(ClosedError):
            await cache.add("too late", 1)
        with pytest.raises(ClosedError):
            await cache.set("too late", 1)
        watched[-1].go_on()
        await asyncio.gather(*closing)
        found = [task.result() for task in tasks if task.done()]
        assert found[:4] == [True, True, 6, b"old"]
        assert found[4] == {n: OLD[n] for n in range(20)}
        assert found[5:7] == [True, True] and found[7].key == "k"
        await cache.close()
        assert descriptors() == before
        async with open_cache(**SMALL) as cache:
            assert (await cache.get("new"), await cache.get("stream")) == (1, NEW)
            assert await cache.get("too late") is None

    run(main())


def test_get_many_that_has_just_begun_completes_before_closing(
    open_cache: Open, watched: list[Watched]
) -> None:
    """None of its reads has begun when the cache is told to close."""

    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(OLD)
        watched[-1].cold = True
        task = asyncio.create_task(cache.get_many(list(OLD)))
        await asyncio.sleep(0)
        await cache.close()
        assert await task == OLD

    run(main())


def test_closing_that_is_cancelled_closes(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)
        before = descriptors()
        cache = open_cache()
        await cache.get("k")
        watched[-1].hold("write")
        task = asyncio.create_task(cache.add("new", 1))
        await until(watched[-1].entered)
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        closing.cancel()
        await turns_of_the_loop()
        watched[-1].go_on()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await task is True
        await cache.close()
        assert descriptors() == before

    run(main())


def test_async_with_closes_whatever_happens(open_cache: Open) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="mine"):
            async with open_cache() as cache:
                await cache.set("k", 1)
                raise RuntimeError("mine")
        assert cache.closed
        before = descriptors()
        for _ in range(3):
            async with open_cache() as cache:
                assert await cache.get("k") == 1
                await asyncio.gather(*(cache.get(n) for n in range(100)))
        assert descriptors() == before

    run(main())
