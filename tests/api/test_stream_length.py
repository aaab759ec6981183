"""Streams: their length, told or not, and what they evict before it is known that they don't fit."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, noise

from yatagarasu_cache import AsyncDiskCache, DiskCache, ValueTooLarge

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("core")]

LIMIT = 4 << 20
LARGE = 20_000  # what has a file of its own
PART = 10_000


@pytest.fixture
def full(make: Make) -> DiskCache:
    """A cache in which nothing more fits without an eviction."""
    cache = make(size_limit=LIMIT, large_value_size=LARGE)
    n = 0
    while not cache.stats().evictions:
        cache.set(n, noise(3000, n))
        n += 1
    return cache


class Counting:
    """An iterator of parts that knows how many bytes were asked of it."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self.bytes = parts, 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        part = next(self._parts)
        self.bytes += len(part)
        return part


def parts_of(data: bytes, size: int = PART) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def as_source(kind: str, data: bytes) -> Any:
    return io.BytesIO(data) if kind == "file" else parts_of(data)


def nothing_left(cache: DiskCache) -> bool:
    """Of values; a checkpoint may be under way."""
    left = [name for name in os.listdir(Path(cache.directory) / "tmp") if name.endswith(".value.tmp")]
    return not left and cache.check() == []


@pytest.mark.parametrize("kind", ["file", "iterator"])
@pytest.mark.parametrize("length", [0, 1, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE])
def test_a_stream_of_the_length_that_was_told(make: Make, kind: str, length: int) -> None:
    cache = make(size_limit=LIMIT, large_value_size=LARGE)
    data = noise(length)
    assert cache.set("k", as_source(kind, data), length=length)
    assert cache["k"] == data


@pytest.mark.in_turn
@pytest.mark.parametrize("kind", ["file", "iterator"])
@pytest.mark.parametrize("length", [0, 1, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE])
@pytest.mark.parametrize("found", [0, 1, LARGE - 1, LARGE, 3 * LARGE, 9 * LARGE])
def test_a_stream_of_another_length_is_not_stored(make: Make, kind: str, length: int, found: int) -> None:
    if found == length:
        return
    cache = make(size_limit=LIMIT, large_value_size=LARGE)
    cache.set("k", "old")
    with pytest.raises(ValueError, match=f"length is {length}, and the stream ") as caught:
        cache.set("k", as_source(kind, noise(found)), length=length)
    assert not isinstance(caught.value, ValueTooLarge)
    assert f"ended after {found} bytes" in str(caught.value) or "has more" in str(caught.value)
    assert cache["k"] == "old"
    assert nothing_left(cache)


def test_a_stream_that_is_too_long_is_read_no_further(cache: DiskCache) -> None:
    source = Counting(itertools.repeat(bytes(1000)))
    with pytest.raises(ValueError, match="length is 2500, and the stream has more: 3000 bytes so far"):
        cache.set("k", source, length=2500)
    assert source.bytes == 3000 and "k" not in cache


@pytest.mark.parametrize("bound", [{}, {"max_value_size": 100_000}])
def test_what_can_never_fit_is_refused_unread(full: DiskCache, make: Make, bound: dict[str, int]) -> None:
    cache = make(size_limit=LIMIT, **bound)
    before = cache.stats()
    source = Counting(itertools.repeat(bytes(PART)))
    with pytest.raises(ValueTooLarge, match="max_value_size" if bound else "size_limit"):
        cache.set("k", source, length=LIMIT)
    after = cache.stats()
    assert source.bytes == 0
    assert (after.evictions, after.entries) == (before.evictions, before.entries)


def test_a_known_length_is_not_bounded_by_max_stream_size(make: Make, tmp_path: Path) -> None:
    cache = make(size_limit=LIMIT, max_stream_size=1000, large_value_size=LARGE)
    data = noise(LIMIT // 4)
    cache.set("told", parts_of(data), length=len(data))
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        cache.set("file", file)
    cache.set("bytes", data)
    assert cache["told"] == cache["file"] == cache["bytes"] == data


@pytest.mark.parametrize("most", [1, 1000, LARGE - 1, LARGE, 3 * LARGE, None])
def test_max_stream_size_to_the_byte(make: Make, most: int | None) -> None:
    cache = make(size_limit=LIMIT, max_stream_size=most, large_value_size=LARGE)
    bound = most or LIMIT // 8
    cache.set("k", parts_of(noise(bound)))
    assert cache["k"] == noise(bound)
    with pytest.raises(ValueTooLarge, match=f"more than {bound} bytes.*max_stream_size.*length=") as caught:
        cache.set("k", parts_of(noise(bound + 1)))
    assert ("an eighth of size_limit" in str(caught.value)) == (most is None)
    assert cache["k"] == noise(bound)
    assert nothing_left(cache)


def test_a_file_whose_descriptor_is_of_something_shorter(make: Make, tmp_path: Path) -> None:
    """A decompressing file has the descriptor of the compressed one: that says little about its length."""
    cache = make(size_limit=LIMIT, large_value_size=LARGE)
    for length, fits in ((LIMIT // 16, True), (LIMIT // 4, False)):
        with gzip.open(tmp_path / "file.gz", "wb") as file:
            file.write(bytes(length))
        with gzip.open(tmp_path / "file.gz", "rb") as source:
            if fits:
                cache.set("k", source)
            else:
                with pytest.raises(ValueTooLarge, match="max_stream_size"):
                    cache.set("k", source)
    assert cache["k"] == bytes(LIMIT // 16)


def test_an_endless_stream_evicts_no_more_than_it_has_written(full: DiskCache) -> None:
    """Nor what a step is: the victims of one locking, and a piece of the stream."""
    cache, written = full, 0
    step = (1 << 20) + 128 * 3200
    before = cache.stats()

    def endless() -> Iterator[bytes]:
        nonlocal written
        while True:
            yield bytes(PART)
            written += PART
            assert (cache.stats().evictions - before.evictions) * 3000 <= written + step

    with pytest.raises(ValueTooLarge, match="max_stream_size"):
        cache.set("k", endless())
    evicted = (cache.stats().evictions - before.evictions) * 3000
    assert evicted <= LIMIT // 8 + step and cache.stats().entries > before.entries // 2
    assert nothing_left(cache)


@pytest.mark.parametrize("value", [b"12345", bytearray(5), memoryview(b"12345"), memoryview(bytes(20))[::4]])
def test_length_of_bytes(cache: DiskCache, value: Any) -> None:
    assert cache.set("k", value, length=5)
    for wrong in (0, 4, 6):
        with pytest.raises(ValueError, match=f"length is {wrong}, and the value has 5 bytes"):
            cache.set("k", b"wrong", length=wrong)
    assert cache["k"] == bytes(value)


@pytest.mark.parametrize("value", ["12345", 5, None, [1], {}])
def test_length_of_what_has_none(cache: DiskCache, value: Any) -> None:
    with pytest.raises(TypeError, match="length is for streams and bytes"):
        cache.set("k", value, length=5)
    assert "k" not in cache


@pytest.mark.parametrize("value", [b"12345", "stream"])
@pytest.mark.parametrize(
    ("length", "error", "says"),
    [
        (-1, ValueError, "negative: it is -1"), (True, TypeError, "not bool"), (5.0, TypeError, "not float"),
        ("5", TypeError, "not str"),
    ],
)  # fmt: skip
def test_lengths_that_are_none(
    cache: DiskCache, value: Any, length: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"length must .*{says}"):
        cache.set("k", iter([b"12345"]) if value == "stream" else value, length=length)
    assert "k" not in cache


async def parts_async(data: bytes) -> AsyncIterator[bytes]:
    for part in parts_of(data):
        await asyncio.sleep(0)
        yield part


@pytest.mark.parametrize("kind", ["file", "iterator", "async"])
def test_the_same_for_asyncio(directory: Path, backend: str, kind: str) -> None:
    def source(data: bytes) -> Any:
        return parts_async(data) if kind == "async" else as_source(kind, data)

    async def main() -> None:
        options = {"size_limit": LIMIT, "large_value_size": LARGE, "max_stream_size": 5 * LARGE}
        async with AsyncDiskCache(directory, backend=backend, **options) as cache:
            for length in (0, 1, LARGE - 1, LARGE, 9 * LARGE):
                data = noise(length)
                await cache.set("k", source(data), length=length)
                assert await cache.get("k") == data
                for wrong in {length + 1, max(0, length - 1)} - {length}:
                    with pytest.raises(ValueError, match=f"length is {wrong}, and the stream"):
                        await cache.set("k", source(data), length=wrong)
                assert await cache.get("k") == data
            with pytest.raises(ValueTooLarge, match="max_stream_size"):
                await cache.set("k", source(noise(5 * LARGE + 1)))
            with pytest.raises(ValueTooLarge, match="size_limit"):
                await cache.set("k", source(b""), length=LIMIT)
            for bad in (-1, True, 1.0):
                with pytest.raises((ValueError, TypeError), match="length must"):
                    await cache.set("k", source(b"x"), length=bad)
            await cache.set("b", b"12345", length=5)
            with pytest.raises(ValueError, match="length is 4, and the value has 5 bytes"):
                await cache.set("b", b"12345", length=4)
            with pytest.raises(TypeError, match="length is for streams and bytes"):
                await cache.set("b", "12345", length=5)
            assert await cache.check() == []

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(main())
