"""`DiskCache` in several threads."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, in_threads, noise

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache, SerializationError

pytestmark = pytest.mark.usefixtures("core")


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_count_exactly(cache: DiskCache, switching: None) -> None:
    def work(n: int) -> None:
        for turn in range(200):
            cache.incr("n")
            cache.incr(("n", turn % 3), 2)
            cache.decr("down")

    in_threads(8, work)
    assert cache["n"] == 1600
    assert cache["down"] == -1600
    assert sum(cache[("n", m)] for m in range(3)) == 3200
    assert cache.check() == []


def test_threads_add_and_pop_once(cache: DiskCache, switching: None) -> None:
    won: list[int] = []
    popped: list[Any] = []

    def work(n: int) -> None:
        for turn in range(100):
            if cache.add(turn, n):
                won.append(turn)

    def take(n: int) -> None:
        for turn in range(100):
            value = cache.pop(turn)
            if value is not None:
                popped.append(turn)

    in_threads(8, work)
    assert sorted(won) == list(range(100))
    in_threads(8, take)
    assert sorted(popped) == list(range(100))
    assert len(cache) == 0


def test_threads_read_and_write(make: Make, switching: None) -> None:
    """Readers see a value that was written whole; every get is a hit or a miss."""
    cache = make(size_limit=1 << 20, segment_size=16 << 10)
    gets = [0] * 8

    def work(n: int) -> None:
        random_ = random.Random(n)
        for turn in range(500):
            key = random_.randrange(40)
            choice = random_.randrange(8)
            if choice < 3:
                length = random_.choice((10, 700, 4000, 20_000))
                cache.set(key, (key.to_bytes(2, "little") + bytes([n])) * (length // 3))
            elif choice == 3:
                cache.delete(key)
            elif choice == 4:
                found = cache.get_many(range(key, key + 4))
                gets[n] += 4
                assert all(value[:2] == k.to_bytes(2, "little") for k, value in found.items())
            else:
                value = cache.get(key)
                gets[n] += 1
                if value is not None:
                    assert value == value[:3] * (len(value) // 3) and value[:2] == key.to_bytes(2, "little")
            if turn % 200 == 199:
                cache.evict("missing")

    in_threads(8, work)
    stats = cache.stats()
    assert stats.hits + stats.misses == sum(gets)
    assert stats.corrupt == 0
    assert cache.check() == []
    assert stats.disk_bytes <= stats.size_limit + (16 << 10)


def test_threads_close_in_the_middle(make: Make, switching: None) -> None:
    """Whoever is in the middle gets its result or ClosedError."""
    for turn in range(10):
        cache = make()
        cache.set_many({n: noise(100, n) for n in range(50)})

        def work(n: int, cache: DiskCache = cache, gets: int = turn * 20) -> None:
            calls: list[Callable[[], Any]] = [
                lambda: cache.get(1), lambda: cache.set(2, b"x"), lambda: cache.get_many(range(9)),
                lambda: list(cache), lambda: cache.stats(), lambda: cache.incr("n"),
            ]  # fmt: skip
            try:
                if n == 6:
                    for _ in range(gets):
                        cache.get(1)
                    cache.close()
                while n < 6:
                    calls[n]()
            except ClosedError:
                pass

        in_threads(7, work)
        assert cache.closed
    assert make().check() == []


EQUAL = [(1, True), (0.0, False), ((1,), (True,)), (("a", (2, 1.0)), ("a", (2, 1))), (2**60, 2.0**60)]


@pytest.mark.parametrize("pair", EQUAL)
@pytest.mark.parametrize("name", ["get_many", "set_many", "delete_many"])
def test_keys_that_python_takes_for_one_are_refused_in_a_batch(
    tmp_path: Path, name: str, pair: tuple[Any, Any]
) -> None:
    """A dict can't hold both, and the answer for one would stand under the other. Nothing changes."""

    def batch(keys: Any) -> Any:
        return [(key, "new") for key in keys] if name == "set_many" else keys

    async def refused() -> None:
        async with AsyncDiskCache(tmp_path / "c") as other:
            with pytest.raises(ValueError, match="equal for Python"):
                await getattr(other, name)(batch([pair[0], "x", pair[1]]))
            await getattr(other, name)(batch([pair[0], pair[0], "x"]))

    with DiskCache(tmp_path / "c") as cache:
        for key in pair:
            cache.set(key, repr(key))
        counted = cache.stats().hits, cache.stats().misses
        with pytest.raises(ValueError, match="two batches") as caught:
            getattr(cache, name)(batch(["x", *pair]))
        assert all(repr(key) in str(caught.value) for key in pair)
        assert [cache.get(key) for key in pair] == [repr(key) for key in pair]
        assert (cache.stats().hits - 2, cache.stats().misses) == counted and "x" not in cache
        asyncio.run(refused())


def test_equal_keys_that_are_the_same_key_are_one(cache: DiskCache) -> None:
    cache.set_many([(0.0, "zero"), ("a", 1), ((1, "b"), 2)])
    found = cache.get_many([0.0, -0.0, "a", b"a", "a", (1, "b"), (1, "b"), 7, 7])
    assert found == {0.0: "zero", "a": 1, (1, "b"): 2}
    with pytest.raises(SerializationError):
        cache.get_many([(1, True, []), (1,)])  # type: ignore[list-item]
    assert cache.delete_many([0.0, -0.0, "a", "a"]) == 2
