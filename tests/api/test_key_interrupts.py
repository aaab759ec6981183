"""An exception at any step of what computes and locks by key: nothing stays taken, and nobody waits for ever.

As in test_interrupts.py, with turns, locks and queues in place of the cache's own locks.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers import at_most
from interrupting import TimeLimit, steps_of
from test_interrupts import LIMIT, SEED, free_of_locks, picked_of

from yatagarasu_cache import DiskCache
from yatagarasu_cache.computing import key_lock, once, throttling  # noqa: F401  (their import is not interrupted)


def with_lock(cache: DiskCache) -> None:
    with cache.lock("k"):
        pass


def acquired(cache: DiskCache) -> None:
    lock = cache.semaphore("k", 2)
    lock.acquire()
    lock.release()


def failing(cache: DiskCache) -> None:
    def function() -> None:
        raise ValueError("no")

    try:
        cache.get_or_set("missing", function)
    except ValueError:
        pass


METHODS: dict[str, Callable[[DiskCache], object]] = {
    "get_or_set hit": lambda c: c.get_or_set("there", lambda: 1),
    "get_or_set miss": lambda c: c.get_or_set("missing", lambda: 1, expire=60, stale=60, tag="t"),
    "get_or_set early": lambda c: c.get_or_set("there", lambda: 1, expire=60, refresh_early=1.0),
    "get_or_set failing": failing,
    "lock": with_lock,
    "semaphore": acquired,
    "throttle": lambda c: c.throttle(1000, 0.001, name="n")(int)(),
}


def free_of_keys(cache: DiskCache) -> None:
    place = cache._desk.lease.place
    assert not place.in_flight._flights and not place.key_locks.held and not place.key_locks._queues
    found: list[Any] = []

    def others() -> None:
        found.append(cache.get_or_set("missing", lambda: 2, wait=5))
        with cache.lock("k", wait=5), cache.semaphore("k", 2, wait=5), cache.semaphore("k", 2, wait=5):
            found.append("locks")

    thread = threading.Thread(target=others)
    thread.start()
    thread.join()
    assert found in ([2, "locks"], [1, "locks"])


@pytest.mark.in_turn
@pytest.mark.usefixtures("core")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # that was made, and not begun
@pytest.mark.parametrize("error", [None, TimeLimit("late")], ids=["interrupt", "time limit"])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_stays_taken(make: Any, name: str, error: BaseException | None) -> None:
    cache = make(**LIMIT)
    opcodes = cache._store.core.name == "c"
    method = METHODS[name]

    def fill() -> None:
        cache.get_or_set("there", lambda: 1, expire=60, refresh_early=1.0)
        cache.delete("missing")

    fill()
    method(cache)
    fill()
    picked = picked_of(steps_of(lambda: method(cache), 0, opcodes).steps)
    for at in picked:
        fill()
        where = steps_of(lambda: method(cache), at, opcodes, error).where
        if error is not None:
            error.__traceback__ = None  # which would keep the objects that hold something
        gc.collect()
        try:
            with at_most(30):
                free_of_locks(cache)
                free_of_keys(cache)
                cache.delete("missing")
        except BaseException as failure:
            raise AssertionError(f"after an interruption at step {at}, {where} (seed {SEED})") from failure
    assert cache.check() == []
