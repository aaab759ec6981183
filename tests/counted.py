"""Functions that are counted, and what a cache has under way for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from yatagarasu_cache import DiskCache
from yatagarasu_cache.concurrency.in_flight import InFlight


class Counted:
    """A function that counts its calls."""

    def __init__(self, *results: Any, takes: float = 0.0) -> None:
        self.results, self.takes, self.calls = results, takes, 0

    def __call__(self) -> Any:
        self.calls += 1
        time.sleep(self.takes)
        result = self.results[min(self.calls, len(self.results)) - 1]
        if isinstance(result, BaseException):
            raise result
        return result


def eventually(condition: Callable[[], object], patience: float = 20.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def locks_of(cache: DiskCache) -> Any:
    return cache._desk.lease.place.key_locks


def flights_of(cache: DiskCache) -> InFlight:
    return cache._desk.lease.place.in_flight


def is_idle(cache: DiskCache) -> bool:
    flights = flights_of(cache)
    return not (flights._flights or flights._refreshing or locks_of(cache).held or locks_of(cache)._queues)


class Odd(Exception):
    pass
