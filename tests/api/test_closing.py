"""Closing beside threads that work, and where no thread is to be had."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, noise

from yatagarasu_cache import AsyncDiskCache, CacheIOError, ClosedError, DiskCache
from yatagarasu_cache.store import recovery, sharing

pytestmark = pytest.mark.once


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


def test_a_handle_does_not_go_on_with_a_segment_that_it_sealed(make: Make) -> None:
    """Another thread may be about to show what it appended there, and what was taken back with the sealing."""
    cache = make()
    cache.set("a", noise(100))
    store = cache._store
    assert store.active.writer is not None
    sealed = store.active.writer.segment
    store.ending.rest()  # as at the end of a child of multiprocessing, with threads still there
    cache.set("b", noise(100))
    assert store.active.writer.segment != sealed
    cache.close()
    again = make()  # a new one goes on with what is there
    again.set("c", noise(100))
    assert again._store.active.writer is not None and again._store.active.writer.segment == sealed
    assert again.check() == []


def test_resting_beside_threads_that_set(make: Make) -> None:
    cache = make(size_limit=64 << 20)
    stop, wrong = threading.Event(), []

    def work(number: int) -> None:
        turn = 0
        while not stop.is_set():
            key, turn = (number, turn % 50), turn + 1
            cache.set(key, noise(300, turn), meta=1)
            if cache.get(key) != noise(300, turn):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        cache._store.ending.rest()
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and cache.stats().corrupt == 0
    assert cache.check() == []


def test_whoever_joined_a_store_keeps_it_when_the_opener_is_interrupted(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[DiskCache] = []
    publish = sharing._publish

    def interrupted(*args: Any, **options: Any) -> Any:
        publish(*args, **options)
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: joined.append(make()))
        thread.start()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    (cache,) = joined
    store = cache._store
    make().close()
    cache.set("k", 1)
    assert cache.get("k") == 1
    cache.close()
    gc.collect()
    make(directory.with_name("another")).close()  # whoever comes next lets go of what was interrupted
    assert store.released


def test_a_child_keeps_no_lock_of_what_another_thread_was_opening(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep all others out, for as long as it lives, should its parent be killed just then."""
    make().close()
    children: list[int] = []
    open_index = recovery.Recovery.open_index
    (ended, end), (began, begin) = os.pipe(), os.pipe()

    def fork() -> None:
        child = os.fork()
        if not child:
            os.write(begin, b"x")
            os.read(ended, 1)
            os._exit(0)
        children.append(child)
        os.read(began, 1)

    def opening(*args: Any, **options: Any) -> Any:
        index = open_index(*args, **options)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        return index

    with monkeypatch.context() as patch:
        patch.setattr(recovery.Recovery, "open_index", opening)
        cache = make()
    (child,) = children
    try:
        names = {os.path.basename(os.readlink(entry)) for entry in Path(f"/proc/{child}/fd").iterdir()}
        assert not [name for name in names if name.endswith("lock") or name == "users"]
        cache.set("k", 1)
        cache.close()
        with make() as again:
            assert again.get("k") == 1
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)
        for fd in (ended, end, began, begin):
            os.close(fd)


def test_each_lock_is_closed_though_another_cannot_be(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    cache.set("k", 1)
    lock = cache._store.locks.index
    unlock = type(lock)._unlock  # type: ignore[union-attr]

    def fails(self: Any) -> None:
        if self is lock:
            raise OSError(errno.ENOLCK, "no locks")
        unlock(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(lock), "_unlock", fails)
        with pytest.raises(CacheIOError):
            cache.close()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = {os.path.basename(os.readlink(link)) for link in links if os.path.lexists(link)}
    assert not opened & {"lock", "checkpoint.lock", "reclaim.lock"}
