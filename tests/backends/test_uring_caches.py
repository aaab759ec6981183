"""What caches do through the rings of the io_uring backend."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import needs_nowait
from uring_bed import cool

from yatagarasu_cache import AsyncDiskCache, CacheIOError, DiskCache, aio
from yatagarasu_cache.backends import uring
from yatagarasu_cache.backends.ring import lib
from yatagarasu_cache.backends.uring import UringBackend
from yatagarasu_cache.store import compiled
from yatagarasu_cache.store.check import Problem

pytestmark = pytest.mark.compiled

# -- what a cache does through rings ----------------------------------------------------------


class Filled:
    """A cache on the ring with short values and one long one, made cold at will."""

    def __init__(self, directory: Path, direct: Any) -> None:
        self.values: dict[Any, bytes] = {n: os.urandom(3000) for n in range(200)}
        self.values |= {f"key-{n}": os.urandom(3000) for n in range(200)} | {"long": os.urandom(9 << 20)}
        self.numbers = [key for key in self.values if type(key) is int]
        self.directory = str(directory)
        self.cache = DiskCache(self.directory, backend="uring", io_uring={"direct": direct})
        self.cache.set_many(self.values)

    def cool(self) -> None:
        self.cache.flush()
        self.cool_files()

    def cool_files(self) -> None:
        for folder in ("segments", "large"):
            for name in os.listdir(f"{self.directory}/{folder}"):
                file = os.open(f"{self.directory}/{folder}/{name}", os.O_RDONLY)
                cool(file)
                os.close(file)

    def submitted_cold(self, function: Callable[[], Any]) -> int:
        """The same where nothing is in memory, and nothing is read ahead, which can be quicker than the batch."""
        store = self.cache._store
        self.cool()
        for segment in store.current.index.segments():
            os.posix_fadvise(store.files.segments.get(segment), 0, 0, os.POSIX_FADV_RANDOM)
        return self.submitted(function)

    def submitted(self, function: Callable[[], Any]) -> int:
        """How many operations rings were given for it."""
        before: int = self.cache.stats().backend_stats["submitted"]
        function()
        return int(self.cache.stats().backend_stats["submitted"]) - before


def look_in_vain(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a look finds nothing in memory. It makes the system read, and on a disk that is as fast as the
    processor what was asked for is there before the look is over."""
    monkeypatch.setattr(cache._store.backend, "read_nowait", lambda *request: None)
    monkeypatch.setattr(cache._store.core, "get_nowait", lambda key, now: NotImplemented)
    monkeypatch.setattr(uring, "_is_cold", lambda *place: True)


@pytest.mark.parametrize("direct", [True, False])
def test_what_a_cache_does_through_rings(
    tmp_path: Path, core: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(tmp_path / "cache", direct)
    cache, values, numbers = filled.cache, filled.values, filled.numbers

    def hot() -> None:
        cache.set("key-0", values["key-0"])
        assert cache.get("key-0") == values["key-0"]
        assert cache.get_many(["key-0", 1]) == {"key-0": values["key-0"], 1: values[1]}

    def batch() -> None:
        assert cache.get_many(numbers) == {key: values[key] for key in numbers}

    def long() -> None:
        assert cache.get("long") == values["long"]

    def check() -> None:
        assert cache.check() == []

    assert filled.submitted(hot) == 0
    look_in_vain(cache, monkeypatch)
    for cold in (batch, check):
        assert filled.submitted_cold(cold) > 20
    filled.cool()
    chunks = filled.submitted(long)
    assert chunks == 0 if not direct else chunks == 0 and not takes_direct(filled.directory) or chunks > 30
    cache.close()


def takes_direct(directory: str) -> bool:
    try:
        os.close(os.open(f"{directory}/index", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_cold_reads_of_a_loop_go_through_its_ring(
    tmp_path: Path, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(tmp_path / "cache", False)
    keys = [key for key in filled.values if key != "long"]
    random.Random(1).shuffle(keys)

    async def main() -> None:
        async with AsyncDiskCache(filled.directory, backend="uring") as cache:
            await asyncio.gather(*map(cache.get, keys))  # opens the segments
            before = (await cache.stats()).backend_stats["submitted"]
            with monkeypatch.context() as patch:
                look_in_vain(cache._sync(), patch)
                assert await asyncio.gather(*map(cache.get, keys)) == [filled.values[key] for key in keys]
            submitted = (await cache.stats()).backend_stats["submitted"] - before
            assert submitted > 20
            await asyncio.gather(*map(cache.get, keys[:50]))
            again = (await cache.stats()).backend_stats["submitted"] - before - submitted
            assert again <= 50

    filled.cache.flush()
    filled.cache.close()
    filled.cool_files()
    asyncio.run(main())


def unreadable(cache: DiskCache, monkeypatch: pytest.MonkeyPatch, persists: bool) -> None:
    """From now on its rings answer EIO to reads; so do plain ones, if it persists."""
    backend = cache._store.backend
    assert isinstance(backend, UringBackend)

    def broken(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rings = list(backend.rings._open)
    assert rings
    for ring in rings:
        ring.inject(lib.YR_OP_READ, 0, 10**6, -errno.EIO)
    if persists:
        monkeypatch.setattr(backend, "read", broken)


@pytest.mark.parametrize("persists", [False, True])
def test_an_entry_that_cannot_be_read_is_kept(
    tmp_path: Path, core: str, persists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring says EIO: then a plain read decides. If that fails too it is told, and nothing is dropped."""
    filled = Filled(tmp_path / "cache", False)
    cache, values, numbers = filled.cache, filled.values, filled.numbers
    filled.cool()
    errors: list[CacheIOError] = []
    problems: list[Problem] = []

    def batch() -> None:
        try:
            assert cache.get_many(numbers) == {key: values[key] for key in numbers}
        except CacheIOError as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        look_in_vain(cache, patch)
        unreadable(cache, patch, persists)
        assert filled.submitted_cold(batch) > 20
        assert {error.errno for error in errors} == ({errno.EIO} if persists else set())
        assert filled.submitted_cold(lambda: problems.extend(cache.check())) > 20
        assert bool(problems) == persists  # it says what it could not read
        assert all("Input/output" in one.detail and not one.fixed for one in problems)
    assert cache.stats().corrupt == 0 and len(cache) == len(values)
    cache.close()
    with DiskCache(filled.directory, backend="uring") as cache:  # with a sound ring
        assert cache.get_many(values) == values
        assert cache.check() == []


@pytest.mark.parametrize("persists", [False, True])
def test_a_loop_keeps_an_entry_that_cannot_be_read(
    tmp_path: Path, core: str, persists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(tmp_path / "cache", False)
    values = filled.values
    keys = [key for key in values if key != "long"]
    random.Random(2).shuffle(keys)
    filled.cache.flush()
    filled.cache.close()

    async def main() -> None:
        async with AsyncDiskCache(filled.directory, backend="uring") as cache:
            look_in_vain(cache._sync(), monkeypatch)
            for _ in range(2):  # the first opens the segments
                assert await asyncio.gather(*map(cache.get, keys[:50])) == [values[key] for key in keys[:50]]
            with monkeypatch.context() as patch:  # now the loop has its ring
                unreadable(cache._sync(), patch, persists)
                found = await asyncio.gather(*map(cache.get, keys), return_exceptions=True)
            failed = [one for one in found if isinstance(one, BaseException)]
            assert all(isinstance(one, CacheIOError) and one.errno == errno.EIO for one in failed)
            assert bool(failed) == persists
            for key, one in zip(keys, found, strict=True):
                assert one in failed or one == values[key]
            assert (await cache.stats()).corrupt == 0

    asyncio.run(main())
    with DiskCache(filled.directory, backend="uring") as cache:
        assert cache.get_many(values) == values
        assert cache.check() == []


# -- reads in place ---------------------------------------------------------------------------


@pytest.mark.skipif(not compiled.load(), reason="the compiled core alone looks first")
def test_loops_give_up_looking_in_memory_and_take_it_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_nowait(tmp_path)
    directory = str(tmp_path / "cache")
    values = {f"key-{i}": os.urandom(4096) for i in range(4000)}
    wanted = random.sample(list(values), 300)  # in an order for which nothing is read ahead

    async def main() -> None:
        async with AsyncDiskCache(directory, backend="uring") as cache:
            await cache.set_many(values)
            await cache.flush()
            assert await cache.get("key-0") == values["key-0"]
            assert cache._cold == 0
            with monkeypatch.context() as patch:
                look_in_vain(cache._sync(), patch)
                found = await asyncio.gather(*[cache.get(key) for key in wanted])
            assert found == [values[key] for key in wanted]
            assert aio.COLD < cache._cold <= aio.COLD_MOST
            before = cache._sync().stats().backend_stats["submitted"]
            for _ in range(20 * aio.COLD_TRIES):  # all of it is in memory now
                assert await cache.get(wanted[0]) == values[wanted[0]]
            assert cache._cold == 0
            after = cache._sync().stats().backend_stats["submitted"]
            assert after - before < 8 * aio.COLD_TRIES

    asyncio.run(main())
