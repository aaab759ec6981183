"""Many at once: never more than is allowed, and each sees what it should."""

from __future__ import annotations

import asyncio
import collections
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, wrap_backends
from watched import (
    LARGE,
    NEW,
    OLD,
    SMALL,
    CancelledAt,
    Open,
    Watched,
    assert_free,
    flip,
    parts_of,
    run,
    turns_of_the_loop,
    until,
)

from yatagarasu_cache import AsyncDiskCache, CacheIOError, ConfigurationError
from yatagarasu_cache.aio_loop import Loop

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# -- as many at once as is allowed ----------------------------------------------------------------


def test_never_more_under_way_than_allowed(
    open_cache: Open, watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    put_batch = Loop._put_batch

    def noted(state: Any, call: Any, puts: list[Any]) -> Any:
        batches.append(len(puts))
        return put_batch(state, call, puts)

    monkeypatch.setattr(Loop, "_put_batch", noted)

    async def main() -> None:
        async with open_cache(max_in_flight=4, **SMALL) as cache:
            assert await asyncio.gather(*(cache.set(n, noise(50, n)) for n in range(1000))) == [True] * 1000
            assert max(batches) <= 4
            watched[-1].cold = True
            watched[-1].most = 0
            found = await asyncio.gather(*(cache.get(n) for n in range(1000)))
            assert found == [noise(50, n) for n in range(1000)]
            assert len(await cache.get_many(range(1000))) == 1000
            assert await asyncio.gather(*(cache.delete(n) for n in range(300))) == [True] * 300
            assert watched[-1].most == 4
            assert_free(cache)

    run(main())


def test_in_order_of_arrival(open_cache: Open, watched: list[Watched]) -> None:
    """Whoever comes later does not overtake those who wait, whatever is asked for."""
    order: list[int] = []

    async def one(cache: AsyncDiskCache, number: int) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: cache.get(7),
            lambda: cache.add(("new", number), 1),
            lambda: cache.set(("set", number), b"x"),
        ]
        await calls[number % 3]()
        order.append(number)
        if number < 100:
            later.append(asyncio.create_task(one(cache, number + 100)))

    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].cold = True
            for other in [asyncio.create_task(one(cache, number)) for number in range(100)]:
                await other
            await asyncio.gather(*later)

    later: list[asyncio.Task[None]] = []
    run(main())
    assert order == list(range(200))


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", True, 1 << 31])
def test_max_in_flight_is_checked(open_cache: Open, directory: Path, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_in_flight"):
        open_cache(max_in_flight=value)
    assert not directory.exists()


# -- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [64, 1500])
def test_durable_puts_share_syncs(open_cache: Open, watched: list[Watched], number: int) -> None:
    async def main() -> None:
        async with open_cache(durability="sync") as cache:
            await cache.set("first", b"x")
            before = collections.Counter(call for call, _ in watched[-1].calls)
            assert all(await asyncio.gather(*(cache.set(n, noise(50, n)) for n in range(number))))
            syncs = collections.Counter(call for call, _ in watched[-1].calls)["sync"] - before["sync"]
            assert 1 <= syncs <= 2 + number // 100
            assert len(await cache.get_many(range(number))) == number

    run(main())


def test_durable_puts_are_synced_before_they_return(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(durability="sync") as cache:
            await cache.set("first", b"x")
            watched[-1].hold("sync")
            tasks = [asyncio.create_task(cache.set(n, b"x")) for n in range(10)]
            await until(watched[-1].entered)
            await turns_of_the_loop()
            assert not any(task.done() for task in tasks)
            watched[-1].go_on()
            assert await asyncio.gather(*tasks) == [True] * 10
            watched[-1].errors = {"sync": errno.EIO}
            found = await asyncio.gather(*(cache.set(n, b"y") for n in range(5)), return_exceptions=True)
            assert {type(one) for one in found} == {CacheIOError}
            watched[-1].errors = {}

    run(main())


@pytest.mark.parametrize("memory", ["warm", "cold"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_get_is_a_hit_or_a_miss(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch, memory: str, wrapped: bool
) -> None:
    """With the compiled core, where it is there, and with the code that it stands for."""
    rng = random.Random(5)
    made: list[Any] = wrap_backends(monkeypatch, Watched) if wrapped or memory == "cold" else []
    wanted = [rng.randrange(40) for _ in range(600)]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many((n, noise(LARGE if n == 1 else 100, n)) for n in range(20))
            for one in made:
                one.cold = memory == "cold"
            calls: list[Awaitable[Any]] = [cache.get(key) for key in wanted]
            calls += [cache.get_many(wanted[at : at + 10]) for at in range(0, 600, 10)]
            calls += [cache.get_entry(key) for key in wanted[:50]]
            calls += [cache.set(("other", n), n) for n in range(50)]
            rng.shuffle(calls)
            await asyncio.gather(*calls)
            hits = sum(key < 20 for key in [*wanted, *wanted, *wanted[:50]])
            stats = await cache.stats()
            assert (stats.process["hits"], stats.process["misses"]) == (hits, 1250 - hits)
            assert stats.hits + stats.misses == 1250

    run(main())


@pytest.mark.parametrize("kind", ["read in the loop", "read by a worker"])
def test_a_cancelled_get_counts_at_most_once(open_cache: Open, watched: list[Watched], kind: str) -> None:
    key = "k" if kind == "read in the loop" else "large"

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get(key)
            watched[-1].cold = True
            before = (await cache.stats()).process
            tasks = [asyncio.create_task(cache.get(key)) for _ in range(50)]
            await turns_of_the_loop(2)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            values = [one for one in found if not isinstance(one, BaseException)]
            assert len(values) >= 25 and set(values) == {OLD[key]}
            after = (await cache.stats()).process
            assert len(values) <= after["hits"] - before["hits"] <= 50
            assert after["misses"] == before["misses"]

    run(main())


def test_tasks_read_what_they_wrote(open_cache: Open) -> None:
    async def one(cache: AsyncDiskCache, number: int) -> None:
        for turn in range(20):
            value = noise(LARGE if turn == 9 else 100, number * 100 + turn)
            assert await cache.set(number, value) is True
            assert number in cache
            assert await cache.get(number) == value
            assert (await cache.get_many([number])) == {number: value}
            await cache.delete(number)
            assert await cache.get(number) is None

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await asyncio.gather(*(one(cache, number) for number in range(20)))
            assert len(cache) == 0

    run(main())


def test_a_set_is_seen_only_when_it_is_complete(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", b"old")
            watched[-1].hold("write")
            task = asyncio.create_task(cache.set("k", b"new"))
            await until(watched[-1].entered)
            assert await cache.get("k") == b"old"
            watched[-1].go_on()
            await task
            assert await cache.get("k") == b"new"

    run(main())


def test_writers_of_one_key(open_cache: Open) -> None:
    """Of those asked for together the last one stays; in the end it is one of them in any case."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            for _ in range(20):
                await asyncio.gather(*(cache.set("k", bytes([n]) * 50) for n in range(10)))
                assert await cache.get("k") == bytes([9]) * 50
            for _ in range(5):
                values = [b"small", NEW, b"other"]
                await asyncio.gather(
                    *(cache.set("k", value) for value in values), cache.set("k", parts_of(NEW))
                )
                assert await cache.get("k") in values
            assert len(cache) == 1 and await cache.check() == []

    run(main())


def test_totals_are_exact(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=50) as cache:
            results = await asyncio.gather(
                *(cache.incr("n", 2) for _ in range(300)), *(cache.decr("n") for _ in range(200))
            )
            assert await cache.get("n") == 400 and len(results) == 500
            assert sum(await asyncio.gather(*(cache.add("once", n) for n in range(50)))) == 1
            popped = await asyncio.gather(*(cache.pop("once") for _ in range(50)))
            assert sum(one is not None for one in popped) == 1

    run(main())


# -- cold reads with the compiled core ------------------------------------------------------------


def cool(cache: AsyncDiskCache) -> Watched:
    """From here on the compiled core, which takes plain keys, finds nothing in memory; the loop's reads are under observation."""
    core: Any = cache._sync()._store.core
    if core.name != "c":
        pytest.skip("the compiled core is not there")
    core.get_nowait = lambda key, now: NotImplemented
    loop = asyncio.get_running_loop()
    watched = Watched(cache._sync()._store.backend)
    cache._loop(cache._sync()._desk).channel = watched.channel(loop)
    return watched


def test_compiled_never_more_under_way_than_allowed(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=4, **SMALL) as cache:
            await cache.set_many((f"k{n}", noise(50, n)) for n in range(1000))
            await cache.get_many([f"k{n}" for n in range(1000)])  # opens the segments
            watched = cool(cache)
            before = (await cache.stats()).process
            found = await asyncio.gather(*(cache.get(f"k{n}", "miss") for n in range(1010)))
            assert found == [noise(50, n) if n < 1000 else "miss" for n in range(1010)]
            assert watched.most == 4
            after = (await cache.stats()).process
            assert (after["hits"], after["misses"]) == (before["hits"] + 1000, before["misses"] + 10)
            assert_free(cache)

    run(main())


def test_compiled_cancelled_at_every_suspension(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many({"k": b"old", "l": b"other"})
            await cache.get_many(list("kl"))
            cool(cache)
            before = (await cache.stats()).process["hits"]
            for at in range(1, 10):
                # The first is behind another one, so that it also waits for its turn.
                other = asyncio.create_task(cache.get("l"))
                await asyncio.sleep(0)
                counted = CancelledAt(cache.get("k"), at)

                async def operation(counted: Any = counted) -> Any:
                    return await counted

                found = (await asyncio.gather(operation(), return_exceptions=True))[0]
                assert await other == b"other"
                await turns_of_the_loop(3)
                assert_free(cache)
                if counted.suspensions < at:
                    assert found == b"old" and at > 2
                    break
                assert isinstance(found, asyncio.CancelledError)
            assert before + at < (await cache.stats()).process["hits"] <= before + 2 * at

    run(main())


@pytest.mark.parametrize("trouble", ["damage", "an error that passes", "an error that stays"])
def test_compiled_reads_that_fail(open_cache: Open, directory: Path, trouble: str) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many({"k": b"old", "l": b"other"})
            await cache.get_many(list("kl"))
            watched = cool(cache)
            before = (await cache.stats()).process
            if trouble == "damage":
                flip(directory, b"other")
                assert await cache.get("l", "miss") == "miss"
                expected = {"misses": 1, "corrupt": 1}
            elif trouble == "an error that passes":
                watched.errors = {"read": errno.EIO}
                watched.inner.read = watched._read_inner  # type: ignore[method-assign]
                assert await cache.get("l") == b"other"  # read once more, by a worker
                expected = {"hits": 1}
            else:
                watched.errors = {"read": errno.EIO}
                with pytest.raises(CacheIOError, match="cannot read"):
                    await cache.get("l")
                watched.errors = {}
                expected = {}
            after = (await cache.stats()).process
            assert {name: after[name] - n for name, n in before.items() if after[name] != n} == expected
            assert_free(cache)
            watched.errors = {}
            assert await cache.get("k") == b"old"

    run(main())
