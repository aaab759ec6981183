"""`lock` and `semaphore` of both faces, and the file that they are bytes of."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, at_most, in_threads

from yatagarasu_cache import (
    AsyncDiskCache,
    ClosedError,
    DiskCache,
    LockTimeout,
    Reentered,
    SerializationError,
)
from yatagarasu_cache.concurrency import key_locks
from yatagarasu_cache.concurrency.key_locks import Claim, KeyLocks
from yatagarasu_cache.store import format as f


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with at_most(60):
        yield


@pytest.fixture(params=["description", "process"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of locks: those of Linux, and those of other systems."""
    monkeypatch.setattr(key_locks, "_calls", key_locks._Calls(request.param == "description"))
    kind: str = request.param
    return kind


# -- lock --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("calls")
def test_one_thread_at_a_time(make: Make) -> None:
    cache = make()
    inside: list[int] = []
    most = [0]

    def work(_: int) -> None:
        for _ in range(20):
            with cache.lock("k"):
                inside.append(1)
                most[0] = max(most[0], len(inside))
                time.sleep(0.0001)
                inside.pop()

    in_threads(8, work)
    assert most[0] == 1


@pytest.mark.usefixtures("apart")
def test_one_process_at_a_time(make: Make) -> None:
    caches = [make() for _ in range(3)]
    inside: list[int] = []
    most, taken = [0], [0, 0, 0]

    def work(n: int) -> None:
        for _ in range(10):
            with caches[n % 3].lock("k"):
                inside.append(1)
                taken[n % 3] += 1
                most[0] = max(most[0], len(inside))
                time.sleep(0.0005)
                inside.pop()

    in_threads(6, work)
    assert most[0] == 1 and taken == [20] * 3


@pytest.mark.usefixtures("apart")
def test_nobody_is_kept_waiting_by_one_who_takes_it_again_and_again(make: Make) -> None:
    greedy, other = make(), make()
    stop = threading.Event()
    began = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with greedy.lock("k"):
                began.set()
                time.sleep(0.002)

    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(10)
    for _ in range(5):
        with other.lock("k", wait=20):
            pass
    stop.set()
    thread.join()


def test_waiters_of_a_process_are_served_in_their_order(make: Make) -> None:
    cache = make()
    order: list[int] = []
    queue = cache._desk.lease.place.key_locks._queues

    def work(n: int) -> None:
        with cache.lock("k"):
            order.append(n)

    with cache.lock("k"):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for n, thread in enumerate(threads):
            thread.start()
            while sum(map(len, queue.values())) <= n:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(6)) and not queue


def test_keys_and_uses_are_apart(make: Make) -> None:
    cache = make()
    with cache.lock("a"), cache.lock("b"), cache.lock(1), cache.lock(1.0), cache.lock(("a", 1)):
        with cache.semaphore("a", 1), cache.semaphore("b", 2):
            assert cache.get_or_set("a", lambda: 1, wait=0) == 1
            assert cache.set("b", 1) and cache.delete("b") and len(cache) == 1


def test_it_is_not_reentrant(make: Make) -> None:
    cache = make()
    lock = cache.lock("k")
    with lock:
        for again in (lock, cache.lock("k"), cache.lock("k", wait=0)):
            with pytest.raises(Reentered, match="'k'"):
                again.acquire()
        assert lock.locked()
    assert not lock.locked() and not cache.lock("k").locked()
    with lock, cache.lock("other"):
        pass


def test_acquire_and_release(make: Make) -> None:
    cache = make()
    lock = cache.lock("k", wait=0)
    with pytest.raises(RuntimeError, match="acquire"):
        lock.release()
    assert lock.acquire() is True and lock.locked()
    failures: list[type[BaseException]] = []

    def work() -> None:
        try:
            lock.acquire()
        except LockTimeout as error:
            failures.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == [LockTimeout]
    thread = threading.Thread(target=lock.release)  # another thread may, as with threading's
    thread.start()
    thread.join()
    assert not lock.locked() and repr(lock) == "<KeyLock 'k'>"


@pytest.mark.usefixtures("calls")
def test_one_that_nobody_released_ends_with_its_object(make: Make) -> None:
    cache = make()
    lock = cache.lock("k")
    lock.acquire()
    assert cache.lock("k").locked()
    del lock
    gc.collect()
    assert not cache.lock("k").locked()


def test_bad_arguments(make: Make) -> None:
    cache = make()
    for n in (0, -1, 5000):
        with pytest.raises(ValueError, match="n must be"):
            cache.semaphore("k", n)
    for n in (1.5, True, "1", None):
        with pytest.raises(TypeError, match="n must be"):
            cache.semaphore("k", n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wait"):
        cache.lock("k", wait=-1)
    with pytest.raises(TypeError, match="wait"):
        cache.lock("k", wait="1")  # type: ignore[arg-type]
    with pytest.raises(SerializationError):
        cache.lock(object())  # type: ignore[arg-type]


def test_after_close(make: Make) -> None:
    """What is held stays so until it is given back; nothing more is taken."""
    cache, other = make(), make(lock_timeout=7.0)
    lock = cache.lock("k")
    with lock:
        cache.close()
        with pytest.raises(ClosedError):
            cache.lock("x")
        failures: list[BaseException] = []

        def work() -> None:
            with contextlib.suppress(LockTimeout):
                other.lock("k", wait=0).acquire()
                failures.append(AssertionError())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures
    with pytest.raises(ClosedError):
        lock.acquire()
    with other.lock("k", wait=0):
        pass


def test_the_last_handle_is_closed_while_a_lock_is_held(make: Make, directory: Path) -> None:
    cache = make()
    lock = cache.lock("k")
    lock.acquire()
    locks = cache._desk.lease.place.key_locks
    cache.close()
    again = make()
    assert again.lock("k").locked() and again._desk.lease.place.key_locks is not locks
    with pytest.raises(LockTimeout):
        again.lock("k", wait=0.01).acquire()
    lock.release()
    assert not again.lock("k").locked() and locks._fd < 0


@pytest.mark.usefixtures("apart")
def test_closed_while_it_waits(make: Make) -> None:
    busy, cache = make(), make()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            cache.lock("k").acquire()
        except BaseException as error:
            errors.append(error)

    with busy.lock("k"):
        thread = threading.Thread(target=work)
        thread.start()
        while not cache._desk.lease.place.key_locks._queues:
            time.sleep(0.001)
        time.sleep(0.02)
        cache.close()
        thread.join(10)
    assert [type(error) for error in errors] == [ClosedError]


# -- semaphore ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("apart")
def test_at_most_so_many(make: Make) -> None:
    caches = [make() for _ in range(3)]
    inside: list[int] = []
    seen: list[int] = []

    def work(n: int) -> None:
        for _ in range(6):
            with caches[n % 3].semaphore("k", 4):
                inside.append(1)
                seen.append(len(inside))
                time.sleep(0.005)
                inside.pop()

    in_threads(12, work)
    assert 2 <= max(seen) <= 4


def test_a_thread_may_hold_several_but_not_wait_for_itself(make: Make) -> None:
    cache = make()
    pool = cache.semaphore("k", 2, wait=0)
    with pool:
        assert not pool.locked()
        with pool:
            assert pool.locked()
            with pytest.raises(Reentered):
                pool.acquire()
            with pytest.raises(Reentered):
                cache.semaphore("k", 2).acquire()
            timeouts: list[int] = []

            def work() -> None:
                with contextlib.suppress(LockTimeout):
                    pool.acquire()
                    return
                timeouts.append(1)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert timeouts == [1]
        assert not pool.locked()


def test_an_object_shared_by_threads_gives_each_its_own(make: Make) -> None:
    cache = make()
    pool, lock = cache.semaphore("k", 3), cache.lock("k")
    held = cache._desk.lease.place.key_locks.held

    def work(_: int) -> None:
        for _ in range(20):
            with pool:
                assert any(claim.thread == threading.get_ident() for claim in list(held.values()))
                with lock:
                    pass

    in_threads(8, work)
    assert not held


# -- tasks -------------------------------------------------------------------------------------


def test_tasks(directory: Path, backend: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            inside = most = 0

            async def work(lock: Any) -> None:
                nonlocal inside, most
                async with lock:
                    inside += 1
                    most = max(most, inside)
                    await asyncio.sleep(0.002)
                    inside -= 1

            await asyncio.gather(*(work(cache.lock("k")) for _ in range(20)))
            assert most == 1
            most, shared = 0, cache.semaphore("k", 3)
            await asyncio.gather(*(work(shared) for _ in range(20)))
            assert most == 3
            lock = cache.lock("k", wait=0.02)
            async with lock:
                assert await lock.locked()
                with pytest.raises(Reentered):
                    await lock.acquire()
                with pytest.raises(LockTimeout):
                    await asyncio.ensure_future(cache.lock("k", wait=0.02).acquire())
                with pytest.raises(Reentered):  # the loop would stand still for ever
                    cache._sync().lock("k").acquire()
                waiter = asyncio.ensure_future(cache.lock("k").acquire())
                await asyncio.sleep(0.01)
                waiter.cancel()
                await asyncio.wait([waiter])
            assert not await lock.locked()
            with pytest.raises(RuntimeError, match="acquire"):
                lock.release()
            with cache._sync().lock("k"):
                assert await lock.locked()
                with pytest.raises(LockTimeout):
                    await asyncio.ensure_future(lock.acquire())
            assert not cache._desk.lease.place.key_locks._queues  # type: ignore[union-attr]

    asyncio.run(main())


def test_a_task_and_a_thread(directory: Path, backend: str) -> None:
    with DiskCache(directory, backend=backend) as sync:
        order: list[str] = []

        async def main() -> None:
            async with AsyncDiskCache(directory, backend=backend) as cache:
                async with cache.lock("k"):
                    thread = asyncio.ensure_future(asyncio.to_thread(work))
                    await asyncio.sleep(0.02)
                    order.append("task")
                await thread

        def work() -> None:
            with sync.lock("k"):
                order.append("thread")

        asyncio.run(main())
        assert order == ["task", "thread"]


# -- the file ----------------------------------------------------------------------------------


def held(locks: KeyLocks, position: int) -> Claim | None:
    claim = Claim()
    return claim if locks.take(claim, (position,)) else None


@pytest.fixture
def open_locks(tmp_path: Path) -> Callable[[], KeyLocks]:
    def opened() -> KeyLocks:
        locks = KeyLocks()
        path = str(tmp_path / "keys.lock")
        locks.prepare(path, lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return locks

    return opened


def test_positions_far_and_near(open_locks: Callable[[], KeyLocks]) -> None:
    one, other = open_locks(), open_locks()
    places = [0, 1, 2, 12345, key_locks.POSITIONS - 2, key_locks.POSITIONS - 1]
    claims = [held(one, place) for place in places]
    assert None not in claims and [held(other, place) for place in places] == [None] * 6
    assert held(one, 1) is None and all(other.is_held(place) for place in places)
    one.give_back(claims[1])  # type: ignore[arg-type]
    assert held(other, 1) and held(other, 0) is None and held(other, 2) is None
    assert [held(other, place) is None for place in (3, 12344, 12346)] == [False] * 3
    one.give_back(claims[1])  # type: ignore[arg-type]
    assert one.is_held(1)


def test_who_waits_is_seen_by_others(open_locks: Callable[[], KeyLocks]) -> None:
    one, other = open_locks(), open_locks()
    claim = held(one, 7)
    assert claim
    one.note_courtesy(7)
    assert not one.courtesy(7)
    other.show_waiting(7, True)
    one.give_back(claim)
    one.note_courtesy(7)
    assert 0 < one.courtesy(7) <= key_locks.COURTESY and not one.courtesy(7)
    other.show_waiting(7, False)
    one.note_courtesy(7)
    assert not one.courtesy(7)


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_file_that_is_removed_excludes_all_the_same(open_locks: Callable[[], KeyLocks], tmp_path: Path, what: str) -> None:
    one, other = open_locks(), open_locks()
    claim = held(one, 7)
    path = tmp_path / "keys.lock"
    path.unlink()
    if what == "replaced":
        path.write_bytes(b"")
    time.sleep(key_locks.LOOK_EVERY)
    assert held(one, 8) and path.exists()  # which notices it, and takes what it holds along
    time.sleep(key_locks.GRACE)
    assert held(other, 7) is None and held(other, 8) is None and held(other, 9)
    assert claim is not None
    one.give_back(claim)
    assert held(other, 7)


def test_its_mode_and_what_it_is(make: Make, directory: Path) -> None:
    cache = make(file_mode=0o644)
    assert not (directory / f.KEYS_LOCK_NAME).exists(), "nobody has needed it"
    with cache.lock("k"):
        status = (directory / f.KEYS_LOCK_NAME).lstat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_size == 0 and not cache.check()


def test_a_link_in_its_place_is_not_followed(make: Make, directory: Path, tmp_path: Path) -> None:
    cache = make()
    target = tmp_path / "target"
    (directory / f.KEYS_LOCK_NAME).symlink_to(target)
    with pytest.raises(OSError):
        cache.lock("k").acquire()
    assert not target.exists()


def test_the_directory_may_vanish(make: Make, directory: Path, quiet: None) -> None:
    import shutil

    cache = make()
    with cache.lock("k"):
        shutil.rmtree(directory)
    time.sleep(key_locks.LOOK_EVERY)
    with cache.lock("k"):
        assert (directory / f.KEYS_LOCK_NAME).exists()
    assert cache.get_or_set("k", lambda: 1) == 1
