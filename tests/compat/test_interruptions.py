"""Ctrl-C and time limits: wherever the exception comes, nothing stays taken, and counts are right."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import at_most, in_threads

import yatagarasu_cache.compat.diskcache as dc

Make = Callable[..., Any]


class Struck(Exception):
    """Raised by the handler of a signal."""


def transact(cache: Any) -> None:
    with cache.transact():
        pass


def nested(cache: Any) -> None:
    with cache.transact(), cache.transact():
        cache["n"] = 1


def queue(cache: Any) -> None:
    cache.push(("v",))
    cache.pull()


def store_and_pop(cache: Any) -> None:
    cache.set("k", ("v",))
    cache.pop("k")


def look(cache: Any) -> None:
    cache["k"] = object
    for key in cache:
        cache.get(key)
    cache.peekitem()


def go_on(way: Callable[[Any], None], cache: Any) -> None:
    """Until an exception comes, or soon: one that comes in a destructor is lost."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        way(cache)


WAYS = [transact, nested, queue, store_and_pop, look]


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_stays_taken(make: Make, way: Callable[[Any], None]) -> None:
    cache, other, chance = make(), make(timeout=2), random.Random(way.__name__)

    def strike(*_: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00005, 0.001))
                try:
                    go_on(way, cache)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Struck:
                pass
            in_threads(1, lambda n: other.set("other", 1), patience=10)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert other["other"] == 1 and cache.check() == []


def attempt(make: Make) -> bool:
    """Whether somebody else can store something now."""
    try:
        return bool(make(timeout=0.05).set("other", 1))
    except dc.Timeout:
        return False


def test_another_cache_of_the_thread_is_somebody_else(make: Make) -> None:
    cache = make()
    with at_most(60), cache.transact():
        cache["k"] = 1
        assert not attempt(make)
    assert attempt(make)


@pytest.mark.parametrize("alive", [True, False])
def test_a_transaction_ends_in_another_thread(make: Make, alive: bool) -> None:
    """As frameworks do that enter and leave in threads of a pool."""
    cache, end = make(), threading.Event()
    box: list[Any] = []

    def enter() -> None:
        box.append(cache.transact())
        box[0].__enter__()
        if alive:
            end.wait(30)

    thread = threading.Thread(target=enter)
    with at_most(60):
        thread.start()
        if not alive:
            thread.join()
        while not box:
            time.sleep(0.001)
        time.sleep(0.05)
        assert not attempt(make)
        box.pop().__exit__(None, None, None)
        assert attempt(make)
        end.set()
        thread.join()


def test_the_end_of_anothers_transaction_does_not_end_mine(make: Make) -> None:
    cache = make()
    box: list[Any] = []

    def enter(n: int) -> None:
        box.append(cache.transact())
        box[0].__enter__()

    with at_most(60):
        in_threads(1, enter)
        box.pop()  # nobody has it any more
        gc.collect()
        with cache.transact():
            in_threads(1, enter_and_fail(make(timeout=0.05), box))
            box.clear()
            gc.collect()
            assert not attempt(make)
        assert attempt(make)


def enter_and_fail(cache: Any, box: list[Any]) -> Callable[[int], None]:
    def work(n: int) -> None:
        box.append(cache.transact())
        with pytest.raises(dc.Timeout):
            box[0].__enter__()

    return work


def test_a_cache_that_is_closed_within_a_transaction(make: Make, place: Path) -> None:
    cache = make()
    with at_most(60), cache.transact():
        cache.close()
        cache["k"] = 1
        assert not attempt(make)
    assert attempt(make) and cache["k"] == 1
