"""Nothing more happens once a cancellation has come up, also of what waits for a lock."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import noise
from watched import (
    LARGE,
    LIMIT,
    NEW,
    OLD,
    SMALL,
    Open,
    Watched,
    assert_free,
    parts_of,
    run,
    turns_of_the_loop,
    until,
)

from yatagarasu_cache import AsyncDiskCache, DiskCache, LockTimeout
from yatagarasu_cache.backends.threads import DEFAULT_WORKERS
from yatagarasu_cache.concurrency.file_locks import FileLock
from yatagarasu_cache.store.changes import ChangeLog
from yatagarasu_cache.store.large_writing import LargeWriting
from yatagarasu_cache.store.removal import Removal
from yatagarasu_cache.store.upkeep import Upkeep
from yatagarasu_cache.store.writing import Writing

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# Every change, of keys that `OLD` has.
ALTERATIONS: dict[str, Callable[[AsyncDiskCache], Any]] = {
    "set": lambda c: c.set("k", b"stale"),
    "set large": lambda c: c.set("k", NEW),
    "set file": lambda c: c.set("k", io.BytesIO(NEW)),
    "set iterator": lambda c: c.set("k", iter([NEW])),
    "set short iterator": lambda c: c.set("k", iter([b"stale"])),
    "set asynchronous": lambda c: c.set("k", parts_of(NEW)),
    "set_many": lambda c: c.set_many({"k": b"stale", "n": 7}),
    "set_many pairs": lambda c: c.set_many(iter([("k", NEW), ("n", 7)])),
    "add": lambda c: c.add("absent", 1),
    "add large": lambda c: c.add("absent", NEW),
    "incr": lambda c: c.incr("n"),
    "decr": lambda c: c.decr("n"),
    "touch": lambda c: c.touch("k", 0.001),
    "pop": lambda c: c.pop("k"),
    "pop large": lambda c: c.pop("large"),
    "delete": lambda c: c.delete("k"),
    "delete_many": lambda c: c.delete_many(["k", "n"]),
    "delete_many iterator": lambda c: c.delete_many(iter(["k", "n"])),
    "evict": lambda c: c.evict("tag"),
    "delete_prefix": lambda c: c.delete_prefix("k"),
    "clear": lambda c: c.clear(),
    "check": lambda c: c.check(fix=True),
}


@contextlib.contextmanager
def locked_by_others(directory: Path) -> Iterator[None]:
    """The cache's lock is taken, as by another process that is stopped."""
    fd = os.open(directory / "lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


async def ends_soon(task: asyncio.Future[Any]) -> None:
    """Cancel a task, which ends long before the lock is given up."""
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=LIMIT / 3)
    assert done and task.cancelled()


async def given_up_threads() -> None:
    """Until what was cancelled has ended in its threads too."""
    for thread in threading.enumerate():
        if thread.name == "yatagarasu-stream":
            await asyncio.to_thread(thread.join, LIMIT)


async def expect_old(cache: AsyncDiskCache) -> None:
    assert await cache.get_many(list(OLD)) == OLD and await cache.get("absent") is None


@pytest.mark.parametrize("name", ALTERATIONS)
def test_cancelled_while_others_have_the_lock(open_cache: Open, directory: Path, name: str) -> None:
    """Nobody waits for those, and what was cancelled is not done when they give it back."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.set("k", OLD["k"], tag="tag")
            with locked_by_others(directory):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(ALTERATIONS[name](cache), 0.1)
                await expect_old(cache)
            assert await cache.incr("others") == 1
            await given_up_threads()
            await expect_old(cache)
            assert await cache.set("k", b"fresh") and await cache.incr("n") == 6
            assert_free(cache)
            await asyncio.sleep(0.05)  # what must not happen would happen in this time
            assert await cache.get("k") == b"fresh" and await cache.get("n") == 6
            assert await cache.check() == []

    run(main())
    with DiskCache(directory, **SMALL) as after:
        assert after.get_many([*OLD, "absent"]) == {**OLD, "k": b"fresh", "n": 6} and after.check() == []
    assert os.listdir(directory / "tmp") == [] and len(os.listdir(directory / "large")) == 1


@pytest.mark.parametrize(
    ("waiting", "cancelled"),
    [
        ("incr", "add"), ("incr", "set"), ("incr", "set_many"), ("incr", "set file"), ("touch", "delete"),
        ("touch", "incr"), ("delete", "delete_many"), ("set_many", "incr"), ("set", "pop"), ("add", "set large"),
    ],
)  # fmt: skip
def test_cancelled_behind_another_that_waits_for_the_lock(
    open_cache: Open, directory: Path, waiting: str, cancelled: str
) -> None:
    """The one that waits keeps the locks of threads meanwhile, for which the other is waiting."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many({**OLD, "absent": 1})
            await cache.delete("absent")
            with locked_by_others(directory):
                first = asyncio.ensure_future(ALTERATIONS[waiting](cache))
                await asyncio.sleep(0.05)
                second = asyncio.ensure_future(ALTERATIONS[cancelled](cache))
                await asyncio.sleep(0.05)
                await ends_soon(second)
                await expect_old(cache)
                assert not first.done()
            await first
            await given_up_threads()
            found = await cache.get_many([*OLD, "absent"])
            assert await cache.check() == []

        expected = open_cache(**SMALL)
        await expected.clear()
        await expected.set_many(OLD)
        await ALTERATIONS[waiting](expected)
        await asyncio.sleep(0.01)  # the time to live that `touch` gives
        assert {**found, "k": None} == {**await expected.get_many([*OLD, "absent"]), "k": None}
        if waiting != "touch":
            assert found.get("k") == await expected.get("k")
        await expected.close()

    run(main())


def test_of_a_batch_some_are_cancelled_while_it_waits_for_the_lock(
    open_cache: Open, directory: Path
) -> None:
    """These end at once, those that asked with them are stored when the lock is had: in their order."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys(range(12), b"old"))
            with locked_by_others(directory):
                values = [(n % 12, b"%d" % n if n % 5 else noise(2 * LARGE, n)) for n in range(48)]
                tasks = [asyncio.ensure_future(cache.set(key, value)) for key, value in values]
                await asyncio.sleep(0.05)
                for task in tasks[::3]:
                    await ends_soon(task)
                last = asyncio.ensure_future(cache.set(1, b"last"))
                assert not any(task.done() for task in [last, *tasks[1::3], *tasks[2::3]])
            assert await asyncio.gather(last, *tasks[1::3], *tasks[2::3]) == [True] * 33
            expected = dict.fromkeys(range(12), b"old")
            expected.update((key, value) for n, (key, value) in enumerate(values) if n % 3)
            assert await cache.get_many(range(12)) == {**expected, 1: b"last"}
            assert_free(cache)
            assert await cache.check() == []

    run(main())


def test_those_of_a_batch_wait_for_the_lock_together(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    timed_out = FileLock._timed_out

    def noted(lock: FileLock, holder: str) -> LockTimeout:
        waited.append(holder)
        return timed_out(lock, holder)

    monkeypatch.setattr(FileLock, "_timed_out", noted)

    async def main() -> None:
        async with open_cache(lock_timeout=0.1, **SMALL) as cache:
            await cache.set("k", b"old")
            with locked_by_others(directory):
                sets = (cache.set("k", b"%d" % n) for n in range(20))
                found = await asyncio.gather(*sets, return_exceptions=True)
            assert {type(error) for error in found} == {LockTimeout} and len(waited) == 1
            assert await cache.get("k") == b"old" and await cache.set("k", b"new")

    run(main())


@pytest.mark.parametrize(
    ("name", "owner", "where"),
    [
        ("set", Writing, "put_at_once"), ("set large", LargeWriting, "_put_pointer"), ("set file", LargeWriting, "_put_pointer"),
        ("set iterator", LargeWriting, "_put_pointer"), ("set short iterator", Writing, "put"), ("set asynchronous", LargeWriting, "_put_pointer"),
        ("set_many", Writing, "put_many"), ("set_many pairs", Writing, "put_many"), ("add", Writing, "change"), ("incr", Writing, "change"),
        ("touch", Removal, "touch"), ("pop", Removal, "delete"), ("delete_many", Removal, "remove_keys"), ("evict", Removal, "remove"),
        ("clear", Removal, "clear"),
    ],
)  # fmt: skip
def test_what_has_begun_is_waited_for(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: type,
    where: str,
) -> None:  # fmt: skip
    """And whatever is changed once its cancellation has come up is changed for good."""
    reached, go, inner = threading.Event(), threading.Event(), getattr(owner, where)

    def held(part: Any, *args: Any) -> Any:
        if not reached.is_set():
            reached.set()
            assert go.wait(LIMIT / 2)
        return inner(part, *args)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.set("k", OLD["k"], tag="tag")
            monkeypatch.setattr(owner, where, held)
            task = asyncio.ensure_future(ALTERATIONS[name](cache))
            await until(reached)
            for _ in range(3):
                task.cancel()
                await turns_of_the_loop()
            await asyncio.wait({task}, timeout=0.05)  # what must not happen would happen in this time
            assert not task.done()
            await expect_old(cache)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await cache.set_many({"k": b"fresh", "n": 100})
            assert await cache.delete("absent") in (True, False)
            await given_up_threads()
            await asyncio.sleep(0.02)
            assert await cache.get_many(["k", "n", "absent"]) == {"k": b"fresh", "n": 100}
            assert_free(cache)

    run(main())
    with DiskCache(directory, **SMALL) as after:
        assert after.get("k") == b"fresh" and after.check() == []


def have_cleaning_wait(
    cache: AsyncDiskCache, directory: Path, lock: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch,
    *, once: bool = False,
) -> threading.Event:  # fmt: skip
    """From now on a change has to wait for others, who then have `lock`, to clean up behind itself; `once`: the
    next part need not. What is set when it does."""
    reached = threading.Event()

    def cleaning(upkeep: Upkeep, _budget: int) -> None:
        if not reached.is_set():
            lock.enter_context(locked_by_others(directory))
            reached.set()
        try:
            with cache._sync()._store.locks.index:
                pass
        finally:
            if once:
                lock.close()

    monkeypatch.setattr(cache._sync()._store.pace, "_work", partial(cleaning, cache._sync()._store.upkeep))
    cache._sync()._store.pace._unpaced = 1 << 30
    return reached


@pytest.mark.parametrize("name", ["set", "set large", "set iterator", "set_many", "incr", "add", "pop", "delete"])
def test_cancelled_while_it_cleans_up_behind_itself(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The change is made, and has to wait for others only to clean up: nobody waits for that."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            reached = have_cleaning_wait(cache, directory, lock, monkeypatch)
            task = asyncio.ensure_future(ALTERATIONS[name](cache))
            await until(reached)
            await asyncio.sleep(0.05)
            await ends_soon(task)
            changed = await cache.get_many([*OLD, "absent"])
            assert changed != OLD
            lock.close()
            await cache.incr("others")
            assert await cache.get_many([*OLD, "absent"]) == changed and await cache.check() == []

    with contextlib.ExitStack() as lock:
        run(main())


@pytest.mark.parametrize("name", ["delete_many", "set_many"])
def test_no_part_follows_one_whose_cleaning_up_was_given_up(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys(range(1000), b"old"))
            reached = have_cleaning_wait(cache, directory, lock, monkeypatch, once=True)
            new = dict.fromkeys(range(1000), noise(500))
            call = cache.delete_many(list(new)) if name == "delete_many" else cache.set_many(new)
            task = asyncio.ensure_future(call)
            await until(reached)
            await ends_soon(task)
            found = await cache.get_many(range(1000))
            untouched = sum(value == b"old" for value in found.values())
            assert 0 < untouched < 1000
            await asyncio.sleep(0.05)
            assert await cache.get_many(range(1000)) == found

    with contextlib.ExitStack() as lock:
        run(main())


def test_cancelled_while_a_removal_is_made_durable(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the entry had on the disk goes all the same."""
    reached, sync = threading.Event(), ChangeLog.sync

    def held(changes: ChangeLog, *args: Any) -> None:
        with locked_by_others(directory):
            reached.set()
            sync(changes, *args)

    async def main() -> None:
        async with open_cache(durability="sync", **SMALL) as cache:
            await cache.set_many(OLD)
            monkeypatch.setattr(ChangeLog, "sync", held)
            task = asyncio.ensure_future(cache.delete("large"))
            await until(reached)
            await asyncio.sleep(0.05)
            await ends_soon(task)
            assert await cache.get("large") is None

    run(main())
    assert os.listdir(directory / "large") == []
    with DiskCache(directory, **SMALL) as after:
        assert after.get("large") is None and after.check() == []


def test_what_has_not_begun_never_does(open_cache: Open, watched: list[Watched]) -> None:
    """All workers are busy: others end as soon as they are cancelled."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].hold("write")
            busy = [asyncio.ensure_future(cache.incr("busy")) for _ in range(DEFAULT_WORKERS)]
            await until(watched[-1].entered)
            await turns_of_the_loop()
            for name in ("incr", "set", "set_many", "delete", "pop"):
                task = asyncio.ensure_future(ALTERATIONS[name](cache))
                await turns_of_the_loop(5)
                await ends_soon(task)
            watched[-1].go_on()
            assert sorted(await asyncio.gather(*busy)) == list(range(1, DEFAULT_WORKERS + 1))
            await expect_old(cache)

    run(main())


def test_the_end_of_a_stream_that_was_cancelled(open_cache: Open, directory: Path) -> None:
    """It comes, and the stream is whole: it is not stored all the same."""
    waits, go = threading.Event(), threading.Event()

    def parts(size: int) -> Iterator[bytes]:
        yield noise(size)
        waits.set()
        go.wait(LIMIT)

    async def main() -> None:
        for size in (10, 3 * LARGE):
            waits.clear()
            go.clear()
            async with open_cache(**SMALL) as cache:
                await cache.set("k", b"old")
                task = asyncio.ensure_future(cache.set("k", parts(size)))
                await until(waits)
                await ends_soon(task)
                await cache.set("k", b"fresh")
                go.set()
                await given_up_threads()
                assert await cache.get("k") == b"fresh"
        assert os.listdir(directory / "tmp") == os.listdir(directory / "large") == []

    run(main())


@pytest.mark.parametrize(
    ("call", "owner", "part"),
    [
        (lambda c: c.delete_many(range(1000)), Removal, "_remove_batch"), (lambda c: c.evict("tag"), Removal, "_remove_batch"),
        (lambda c: c.delete_prefix(""), Removal, "_remove_batch"),
        (lambda c: c.set_many({f"k{n}": noise(1000) for n in range(1000)}), Writing, "put_batch"),
    ],
)  # fmt: skip
def test_a_long_change_ends_between_its_parts(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch, call: Callable[[AsyncDiskCache], Any], owner: type,
    part: str,
) -> None:  # fmt: skip
    reached, go, inner = threading.Event(), threading.Event(), getattr(owner, part)
    parts: list[Any] = []

    def held(own: Any, *args: Any) -> Any:
        parts.append(args)
        reached.set()
        assert go.wait(LIMIT / 2)
        return inner(own, *args)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys([*range(1000), *(f"k{n}" for n in range(1000))], b""), tag="tag")
            monkeypatch.setattr(owner, part, held)
            task = asyncio.ensure_future(call(cache))
            await until(reached)
            task.cancel()
            await turns_of_the_loop()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(parts) == 1
            assert await cache.check() == []

    run(main())


def test_a_loop_that_ends_while_changes_wait_for_the_lock(open_cache: Open, directory: Path) -> None:
    caches: list[AsyncDiskCache] = []

    async def main() -> list[asyncio.Future[Any]]:
        cache = open_cache(**SMALL)
        caches.append(cache)
        await cache.set_many(OLD)
        lock.enter_context(locked_by_others(directory))
        tasks = [asyncio.ensure_future(ALTERATIONS[name](cache)) for name in ("incr", "set", "set file", "delete")]
        await asyncio.sleep(0.05)
        return tasks

    with contextlib.ExitStack() as lock:
        assert all(task.cancelled() for task in run(main()))  # `asyncio.run` cancels what is left
    run(caches[0].close())
    with DiskCache(directory, **SMALL) as after:
        assert after.get_many([*OLD]) == OLD and after.check() == []


@pytest.mark.parametrize("name", ["set iterator", "set_many", "pop", "set file", "set", "incr"])
def test_changes_that_ran_out_of_time(open_cache: Open, name: str) -> None:
    """At whichever moment that was: what is stored afterwards stays."""
    stale = noise(1 << 20)
    calls: dict[str, Callable[[AsyncDiskCache], Any]] = {
        **ALTERATIONS,
        "set iterator": lambda c: c.set("k", iter([stale])),
        "set file": lambda c: c.set("k", io.BytesIO(stale)),
        "set_many": lambda c: c.set_many({"k": stale}),
    }

    async def main() -> None:
        async with open_cache(size_limit=256 << 20) as cache:
            for number in range(60):
                await cache.set_many({"k": b"first", "n": 0})
                try:
                    await asyncio.wait_for(calls[name](cache), number * 3e-5)
                except asyncio.TimeoutError:
                    await cache.set("k", b"fresh")
                    await cache.set_many({"n": 10})
                    await asyncio.sleep(0.01)
                    assert await cache.get("k") == b"fresh" and await cache.get("n") == 10

    run(main())
