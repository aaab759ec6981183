"""Versions, `modify` and the mapping surface of `AsyncDiskCache`, where it is more than the synchronous one."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, run_python
from watched import LARGE, SMALL, Open, Watched, assert_free, run

from yatagarasu_cache import CacheIOError, ClosedError, DiskCache, SerializationError, modifying

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


async def parts(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


def given(kind: str) -> tuple[Any, Any]:
    """A value, and what comes back of it."""
    large = noise(2 * LARGE)
    return {
        "bytes": (b"b", b"b"), "container": ({"a": [1]}, {"a": [1]}), "large": (large, large),
        "file": (io.BytesIO(large), large), "iterator": (iter([large, b"x"]), large + b"x"),
        "asynchronous": (parts(large, b"x"), large + b"x"), "short": (parts(b"a", b"b"), b"ab"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("kind", ["bytes", "container", "large", "file", "iterator", "asynchronous", "short"])
def test_set_and_delete_of_a_version(open_cache: Open, core: str, kind: str, durability: str) -> None:
    async def main() -> None:
        async with open_cache(durability=durability, **SMALL) as cache:
            value, stored = given(kind)
            assert await cache.set("k", given(kind)[0], if_version=5) is False
            assert await cache.set("k", value, if_version=0, tag="t") is True
            entry = await cache.get_entry("k")
            assert entry is not None and await entry.value == stored
            for wrong in (0, 1, entry.version + 1):
                assert await cache.set("k", given(kind)[0], if_version=wrong) is False
                assert await cache.delete("k", if_version=wrong) is False
            async for one in cache.entries():
                assert one.version == entry.version
            assert await cache.set("k", given(kind)[0], if_version=entry.version) is True
            assert await cache.delete("k", if_version=entry.version) is False
            again = await cache.get_entry("k")
            assert again is not None and again.version > entry.version and again.tag is None
            assert await cache.delete("k", if_version=again.version) is True and "k" not in cache
            assert await cache.check() == []
            for key in ("k", "l"):
                with pytest.raises(TypeError, match="if_version must be an int"):
                    await cache.set(key, 1, if_version="1")  # type: ignore[arg-type]
            assert_free(cache)

    run(main())


def test_a_stream_is_not_read_in_vain(open_cache: Open) -> None:
    async def fails() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", 1)
            assert await cache.set("k", fails(), if_version=0) is False
            assert await cache.set("none", fails(), if_version=7) is False

    run(main())


@pytest.mark.parametrize("size", [10, 2 * LARGE])
def test_one_of_many_tasks_wins(open_cache: Open, core: str, size: int) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            for turn in range(5):
                entry = await cache.get_entry("k")
                there = entry.version if entry else 0
                won = await asyncio.gather(*[cache.set("k", noise(size, n), if_version=there) for n in range(20)])
                assert won.count(True) == 1, turn
                assert await cache.get("k") == noise(size, won.index(True))
            assert await cache.check() == []

    run(main())


def test_many_tasks_modify(open_cache: Open, core: str) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("list", [], expire=1000, tag="t", meta="m")

            async def append(value: list[int], n: int) -> list[int]:
                await asyncio.sleep(0)
                return [*value, n]

            results = await asyncio.gather(
                *[cache.modify("list", lambda value, n=n: append(value, n)) for n in range(30)],
                *[cache.modify("sum", lambda value: value + 1, 0) for _ in range(30)],
            )
            entry = await cache.get_entry("list")
            assert entry is not None and sorted(await entry.value) == list(range(30))
            assert (entry.tag, entry.meta) == ("t", "m") and 900 < entry.expires - entry.created < 1001
            assert sorted(results[30:]) == list(range(1, 31)) and await cache.get("sum") == 30

    run(main())


def test_the_function_may_use_the_cache(open_cache: Open) -> None:
    """Even where only one operation may be under way."""

    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:

            async def function(value: int) -> int:
                await cache.set("x", value)
                return value + await cache.get("x") + await cache.modify("y", lambda value: value + 1, 0)

            assert await cache.modify("k", function, 5) == 11 and await cache.get("y") == 1

    run(main())


def test_what_raises_changes_nothing(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modifying, "_TRIES", 10)

    async def fails(value: Any) -> Any:
        raise OSError(value)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", 1)
            for function, kind in (
                (fails, OSError), (lambda value: 1 / 0, ZeroDivisionError), (lambda value: object(), SerializationError),
            ):  # fmt: skip
                with pytest.raises(kind):
                    await cache.modify("k", function)
            assert await cache.get("k") == 1
            with pytest.raises(CacheIOError, match="changes all the time"):
                await cache.modify("k", lambda value: cache.incr("k"))
            assert_free(cache)
        with pytest.raises(ClosedError):
            await cache.modify("k", lambda value: value)

    run(main())


def test_a_cancelled_modify_has_no_effect(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            begun = asyncio.Event()

            async def function(value: Any) -> Any:
                begun.set()
                await asyncio.sleep(60)

            task = asyncio.ensure_future(cache.modify("k", function, 1))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert "k" not in cache
            assert_free(cache)

    run(main())


def test_cancelled_anywhere_a_conditional_set_leaves_old_or_new(
    open_cache: Open, watched: list[Watched], core: str
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            value = noise(LARGE)
            for n in range(40):
                entry = await cache.get_entry("k")
                there = entry.version if entry else 0
                new = noise(2 * LARGE if n % 2 else 100, n)
                task = asyncio.ensure_future(cache.set("k", new, if_version=there))
                for _ in range(n % 10):
                    await asyncio.sleep(0)
                if n % 3 == 0:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait({task})
                found = await cache.get("k", noise(LARGE))
                assert found in (value, new)
                if not task.cancelled():
                    assert task.result() and found == new
                await asyncio.sleep(0.002)
                assert await cache.get("k", noise(LARGE)) == found  # nothing takes effect later
                value = found
            assert await cache.check() == []
            assert_free(cache)

    run(main())


def test_items_and_values(open_cache: Open, core: str) -> None:
    content = {**{n: noise(n * 37, n) for n in range(150)}, "large": noise(3 * LARGE), ("t",): [1, (2,)]}

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            assert [item async for item in cache.items()] == []
            await cache.update(content)
            assert {key: value async for key, value in cache.items()} == content
            assert len([value async for value in cache.values()]) == len(content)
            stats = await cache.stats()
            assert (stats.hits, stats.misses) == (0, 0)
            rest = {}
            async for key, value in cache.items():
                if not rest:
                    await cache.delete_many(range(100, 150))
                    await cache.set("large", "new")
                    await cache.set(("t",), "new")
                rest[key] = value
            assert {key for key in rest if key not in cache} <= {next(iter(rest))}, "what was removed"
            first = next(iter(rest))
            assert all(rest.get(key, "new") == "new" for key in ("large", ("t",)) if key != first)
            assert all(rest[n] == content[n] for n in range(100))
            async for _ in cache.items():  # and goes away in the middle
                break
            assert_free(cache)

    run(main())


def test_all_tasks_get_the_same_default(open_cache: Open, core: str) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            got = await asyncio.gather(*[cache.setdefault("k", n, tag="t") for n in range(20)])
            assert len({*got}) == 1 and await cache.get("k") == got[0]
            assert await cache.setdefault("none") is None and "none" in cache

    run(main())


def test_update_from_a_generator(open_cache: Open) -> None:
    def pairs() -> Iterator[tuple[int, int]]:
        yield from ((n, n) for n in range(50))

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.update(pairs(), expire=60, tag="t")
            await cache.update()
            assert len(cache) == 50 and len([one async for one in cache.entries(tag="t")]) == 50

    run(main())


@pytest.mark.once
def test_loops_of_several_processes_lose_nothing(core: str, directory: Path) -> None:
    code = """
import asyncio, os, sys
from yatagarasu_cache import AsyncDiskCache, DiskCache
async def work(name):
    async with AsyncDiskCache(sys.argv[1]) as cache:
        async def function(value):
            await asyncio.sleep(0)
            return value + [name]
        await asyncio.gather(*[cache.modify("k", function, []) for _ in range(25)],
                             *[cache.incr("n", expire=100, tag="t") for _ in range(25)])
keep = DiskCache(sys.argv[1])
children = []
for name in range(4):
    child = os.fork()
    if not child:
        status = 1
        try:
            asyncio.run(work(name))
            status = 0
        finally:
            os._exit(status)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)
print(sorted(keep["k"]) == [name for name in range(4) for _ in range(25)], keep["n"], keep.get_entry("n").tag)
"""
    assert run_python(code, directory).split() == ["True", "100", "t"]


def test_the_synchronous_cache_sees_the_same_versions(open_cache: Open, directory: Path) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", 1)
            entry = await cache.get_entry("k")
            with DiskCache(directory) as plain:
                there = plain.get_entry("k")
                assert entry is not None and there is not None and there.version == entry.version
                assert plain.set("k", 2, if_version=entry.version)
            assert await cache.set("k", 3, if_version=entry.version) is False

    run(main())
