"""Parts of values and metadata in `AsyncDiskCache`: as in `DiskCache`, and no call blocks the loop."""

from __future__ import annotations

import asyncio
import gc
import io
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, descriptors, noise

from yatagarasu_cache import AsyncDiskCache, CacheIOError
from yatagarasu_cache.store import format as f

pytestmark = pytest.mark.usefixtures("core")

CHUNK = f.CHUNK_BYTES
VALUE = noise(5 * CHUNK + 12345)
Test = Callable[[AsyncDiskCache], Coroutine[Any, Any, None]]


@pytest.fixture
def run(directory: Path, backend: str, core: str) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def main() -> None:
            async with AsyncDiskCache(
                directory, backend=backend, size_limit=64 << 20, segment_size=SEGMENT
            ) as cache:
                await test(cache)
                assert await cache.check() == []

        asyncio.run(main())

    return run


def test_value_and_metadata(run: Callable[[Test], None]) -> None:
    async def test(cache: AsyncDiskCache) -> None:
        for value in (b"small", VALUE, "text", {"a": [1]}, None):
            await cache.set("k", value, meta={"m": 1}, tag="t")
            assert await cache.get("k", with_meta=True) == (value, {"m": 1})
            assert await cache.set_meta("k", [1, 2]) is True
            assert await cache.get("k", with_meta=True) == (value, [1, 2])
            assert await cache.get("k") == value == await cache.get("k", with_meta=False)
            entry = await cache.get_entry("k")
            assert entry is not None and entry.tag == "t"
        assert await cache.get("none", with_meta=True) == (None, None)
        assert await cache.get("none", 5, with_meta=True) == (5, None)
        assert await cache.set_meta("none", 1) is False
        found = await asyncio.gather(*[cache.get("k", with_meta=True) for _ in range(200)])
        assert found == [(None, [1, 2])] * 200

    run(test)


def test_what_is_not_in_memory(run: Callable[[Test], None], directory: Path) -> None:
    async def test(cache: AsyncDiskCache) -> None:
        for number in range(20):
            await cache.set(number, noise(5000, number), meta=number)
        for path in (directory / "segments").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = await asyncio.gather(*[cache.get(number, with_meta=True) for number in range(20)])
        assert found == [(noise(5000, number), number) for number in range(20)]

    run(test)


def test_files(run: Callable[[Test], None]) -> None:
    async def test(cache: AsyncDiskCache) -> None:
        await cache.set("small", b"one\ntwo")
        await cache.set("k", VALUE)
        async with await cache.open("k") as file:
            assert await file.read() == VALUE and await file.read() == b""
            await file.seek(CHUNK - 5)
            buffer = bytearray(2 * CHUNK)
            assert await file.readinto(buffer) == 2 * CHUNK and buffer == VALUE[CHUNK - 5 : 3 * CHUNK - 5]
            assert file.tell() == 3 * CHUNK - 5
            assert os.fstat(file.fileno()).st_size == len(VALUE)
            await file.seek(0)
            assert b"".join([chunk async for chunk in file]) == VALUE
        async with await cache.open("small") as file:
            assert [await file.readline(), await file.readline(), await file.readline()] == [b"one\n", b"two", b""]
            with pytest.raises(io.UnsupportedOperation):
                file.fileno()

    run(test)


def test_ranges_and_views(run: Callable[[Test], None]) -> None:
    async def test(cache: AsyncDiskCache) -> None:
        await cache.set("small", b"0123456789")
        await cache.set("k", VALUE)
        for key, data in (("small", b"0123456789"), ("k", VALUE)):
            with await cache.location(key, 3, length=5) as (fd, at, length):
                assert os.pread(fd, length, at) == data[3:8]
            view = await cache.view(key)
            assert view == data and view.readonly
            await cache.delete(key)
            assert view == data
            with pytest.raises(KeyError):
                await cache.view(key)
        await cache.set("n", 1)
        with pytest.raises(TypeError):
            await cache.view("n")
        with pytest.raises(ValueError):
            await cache.location("n", -1)

    run(test)


def test_damage(directory: Path, backend: str, core: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend, segment_size=SEGMENT) as cache:
            await cache.set("k", VALUE)
            (path,) = (directory / "large").iterdir()
            with path.open("r+b") as file:
                file.seek(2 * CHUNK)
                file.write(bytes([VALUE[2 * CHUNK] ^ 1]))
            async with await cache.open("k") as reader:
                assert await reader.read(2 * CHUNK) == VALUE[: 2 * CHUNK]
                with pytest.raises(CacheIOError, match="damaged"):
                    await reader.read(1)
            assert "k" not in cache and (await cache.stats()).corrupt == 1

    asyncio.run(main())


def test_arrays_come_in_memory_of_their_own(run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(cache: AsyncDiskCache) -> None:
        desk = cache._desk
        assert desk is not None
        desk.decode = lambda payload, flags, key: payload  # type: ignore[method-assign]
        for length in (0, 10, 5000, LARGE, len(VALUE)):
            data = noise(length)
            desk.put(desk.encode_key("k"), data, 9)
            place: Any = desk.store.core.place("k", 1)
            found = [await cache.get("k"), (await cache.get_many(["k"]))["k"], (await cache.get("k", with_meta=True))[0]]
            if type(place) is tuple:  # by the ring, or a worker
                found.append((await cache._get_placed(desk, place))[0])
            for value in found:
                assert type(value) is bytearray and value == data
                value += b"mine"

    run(test)


def test_given_up(run: Callable[[Test], None]) -> None:
    """Cancelled calls leave no descriptor and no mapping."""

    async def test(cache: AsyncDiskCache) -> None:
        await cache.set("k", VALUE)
        await cache.view("k")
        before = descriptors()
        for _ in range(20):
            calls = [asyncio.ensure_future(call("k")) for call in (cache.view, cache.open, cache.location)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.05)
        gc.collect()
        assert descriptors() <= before
        assert await cache.get("k") == VALUE

    run(test)
