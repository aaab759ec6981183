"""Closing beside threads that work, and where no thread is to be had."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers import noise

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache

Make = Callable[..., DiskCache]


def test_closing_beside_threads_that_work(make: Make) -> None:
    """They end with ClosedError, all of them, and closing does what it has to."""
    wrong: list[str] = []

    def work(cache: DiskCache, number: int) -> None:
        try:
            for turn in range(1_000_000):
                cache.touch(1, 9)
                cache.incr("n")
                cache.set((number, turn % 50), noise(200, turn))
                cache.set((number, "large"), bytes(200_000))
                cache.delete((number, turn % 50))
        except ClosedError:
            return
        except BaseException as error:
            wrong.append(repr(error))
        else:
            wrong.append("never closed")

    counted = 0
    for _ in range(15):
        cache = make(size_limit=1 << 24)
        cache.set(1, 1)
        threads = [threading.Thread(target=work, args=(cache, n), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        cache.close()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "hangs"
        again = make(size_limit=1 << 24)
        assert again.get("n", 0) >= counted
        counted = again.get("n", 0)
        assert again.check() == []
        again.close()
    assert wrong == []
    assert counted > 0


def test_where_no_thread_can_be_started(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cache = make(size_limit=1 << 20)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(threading.Thread, "start", refuse)
        for n in range(1500):
            assert cache.set(n, b"x" * 100)
        cache.close()
    assert sum("cannot write a checkpoint" in line for line in caplog.messages) == 1
    assert len(make()) == 1500


def test_a_pool_without_threads_does_its_work_in_place(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith("yatagarasu-worker"):
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    async def main() -> None:
        async with AsyncDiskCache(directory, backend="threads") as cache:
            await cache.set("k", b"v")
            assert await cache.incr("n") == 1
            assert await cache.get("k") == b"v"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_opening_where_no_thread_can_be_started(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        cache = AsyncDiskCache(directory)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert await cache.get("k") is None  # it is opened in place
        assert await cache.get("k") is None
        await cache.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_child_forked_while_it_opened_opens_for_itself(directory: Path) -> None:
    async def main() -> None:
        cache = AsyncDiskCache(directory)
        undone: Future[Any] = Future()  # of a thread that the child does not have
        cache._opening = undone
        cache._opening_lock.acquire()
        cache._after_fork()  # what os.fork() calls in the child
        assert await cache.get("k") is None
        await cache.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_file_that_raises_stopiteration_has_not_ended(make: Make) -> None:
    class File:
        def __init__(self) -> None:
            self.pieces = [b"x" * 1000, b"y" * (2 << 20)]

        def read(self, size: int) -> bytes:
            if not self.pieces:
                raise StopIteration
            return self.pieces.pop()

    cache = make()
    cache.set("k", b"old")
    with pytest.raises(RuntimeError):
        cache.set("k", File())
    assert cache["k"] == b"old"
