"""What is made of a cache: averages, locks, decorators."""

from __future__ import annotations

import functools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from .constants import keys_of
from .core import ENOVAL, full_name

__all__ = ["Averager", "BoundedSemaphore", "Lock", "RLock", "barrier", "memoize_stampede", "throttle"]

F = TypeVar("F", bound=Callable[..., Any])
_PAUSE = 0.001  # seconds between tries


class Averager:
    """A running average, kept under a key as (total, count)."""

    def __init__(self, cache: Any, key: Any, expire: float | None = None, tag: Any = None) -> None:
        self._cache, self._key, self._expire, self._tag = cache, key, expire, tag

    def add(self, value: float) -> None:
        """Take in another number."""
        with self._cache.transact(retry=True):
            total, count = self._cache.get(self._key, default=(0.0, 0))
            self._cache.set(self._key, (total + value, count + 1), expire=self._expire, tag=self._tag)

    def get(self) -> float | None:
        """The average so far; None of nothing."""
        return _average(self._cache.get(self._key, default=(0.0, 0), retry=True))

    def pop(self) -> float | None:
        """The same, and begin anew."""
        return _average(self._cache.pop(self._key, default=(0.0, 0), retry=True))


def _average(kept: tuple[float, int]) -> float | None:
    total, count = kept
    return total / count if count else None


class Lock:
    """Held by one at a time, of all processes, as long as there is an entry of that key. If its holder dies,
    it stays until it expires: `DiskCache.lock` is given back by the kernel."""

    def __init__(self, cache: Any, key: Any, expire: float | None = None, tag: Any = None) -> None:
        self._cache, self._key, self._expire, self._tag = cache, key, expire, tag

    def acquire(self) -> None:
        """Wait for it, and hold it."""
        while not self._cache.add(self._key, None, expire=self._expire, tag=self._tag, retry=True):
            time.sleep(_PAUSE)

    def release(self) -> None:
        """Give it back."""
        self._cache.delete(self._key, retry=True)

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._key in self._cache

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class RLock:
    """The same, which whoever holds it, a thread of a process, may take again."""

    def __init__(self, cache: Any, key: Any, expire: float | None = None, tag: Any = None) -> None:
        self._cache, self._key, self._expire, self._tag = cache, key, expire, tag

    def _me(self) -> str:
        return f"{os.getpid()}-{threading.get_ident()}"

    def acquire(self) -> None:
        """Wait for it, and hold it once more."""
        me = self._me()
        while True:
            with self._cache.transact(retry=True):
                holder, count = self._cache.get(self._key, default=(None, 0))
                if count == 0 or holder == me:
                    self._cache.set(self._key, (me, count + 1), expire=self._expire, tag=self._tag)
                    return
            time.sleep(_PAUSE)

    def release(self) -> None:
        """Give it back once. AssertionError if this thread does not hold it."""
        me = self._me()
        with self._cache.transact(retry=True):
            holder, count = self._cache.get(self._key, default=(None, 0))
            if holder != me or count <= 0:
                raise AssertionError("cannot release un-acquired lock")
            self._cache.set(self._key, (me, count - 1), expire=self._expire, tag=self._tag)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class BoundedSemaphore:
    """Held by at most `value` at a time. What is kept is how many more may have it."""

    def __init__(
        self, cache: Any, key: Any, value: int = 1, expire: float | None = None, tag: Any = None
    ) -> None:
        self._cache, self._key, self._value, self._expire, self._tag = cache, key, value, expire, tag

    def acquire(self) -> None:
        """Wait for a place, and hold it."""
        while True:
            with self._cache.transact(retry=True):
                value = self._cache.get(self._key, default=self._value)
                if value > 0:
                    self._cache.set(self._key, value - 1, expire=self._expire, tag=self._tag)
                    return
            time.sleep(_PAUSE)

    def release(self) -> None:
        """Give one back. AssertionError if none is held."""
        with self._cache.transact(retry=True):
            value = self._cache.get(self._key, default=self._value)
            if value >= self._value:
                raise AssertionError("cannot release un-acquired semaphore")
            self._cache.set(self._key, value + 1, expire=self._expire, tag=self._tag)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def throttle(
    cache: Any, count: float, seconds: float, name: str | None = None, expire: float | None = None,
    tag: Any = None, time_func: Callable[[], float] = time.time,
    sleep_func: Callable[[float], object] = time.sleep,
) -> Callable[[F], F]:  # fmt: skip
    """Decorate a function: `count` calls of it in `seconds`, on average; as many may come at once."""

    def decorate(func: F) -> F:
        rate = count / seconds
        key = full_name(func) if name is None else name
        with cache.transact(retry=True):
            cache.set(key, (time_func(), count), expire=expire, tag=tag)

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            while True:
                with cache.transact(retry=True):
                    last, tally = cache.get(key, default=(time_func(), count))
                    moment = time_func()
                    tally = min(tally + (moment - last) * rate, count)
                    delay = 0.0 if tally >= 1 else (1 - tally) / rate
                    if not delay:
                        cache.set(key, (moment, tally - 1), expire=expire, tag=tag)
                if not delay:
                    return func(*args, **kwargs)
                sleep_func(delay)

        return cast("F", wrapper)

    return decorate


def barrier(
    cache: Any, lock_factory: Callable[..., Any], name: str | None = None, expire: float | None = None,
    tag: Any = None,
) -> Callable[[F], F]:  # fmt: skip
    """Decorate a function: at most as many calls of it run at once as locks of that kind allow."""

    def decorate(func: F) -> F:
        lock = lock_factory(cache, full_name(func) if name is None else name, expire=expire, tag=tag)

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return func(*args, **kwargs)

        return cast("F", wrapper)

    return decorate


def memoize_stampede(
    cache: Any, expire: float, name: str | None = None, typed: bool = False, tag: Any = None, beta: float = 1,
    ignore: Iterable[int | str] = (),
) -> Callable[[F], F]:  # fmt: skip
    """Decorate a function: its results are kept, and computed anew in a thread before they expire, by
    chance, the more likely the nearer that is and the longer it takes (Vattani et al., "Optimal
    Probabilistic Cache Stampede Prevention", VLDB 2015)."""
    ignored = frozenset(ignore)

    def decorate(func: F) -> F:
        cache_key = keys_of(func, name, typed, ignored)

        def timed(*args: Any, **kwargs: Any) -> tuple[Any, float]:
            began = time.time()
            result = func(*args, **kwargs)
            return result, time.time() - began

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            key = cache_key(*args, **kwargs)
            pair, expires = cache.get(key, default=ENOVAL, expire_time=True, retry=True)
            if pair is not ENOVAL:
                result, took = pair
                left = expires - time.time()
                if -took * beta * math.log(1.0 - random.random()) < left:
                    return result
                # One thread computes it anew; while it does, others go on with what is there.
                if cache.add((*key, ENOVAL), None, expire=took, retry=True):

                    def refresh() -> None:
                        cache.set(key, timed(*args, **kwargs), expire=expire, tag=tag, retry=True)

                    threading.Thread(target=refresh, daemon=True).start()
                return result
            pair = timed(*args, **kwargs)
            cache.set(key, pair, expire=expire, tag=tag, retry=True)
            return pair[0]

        wrapper.__cache_key__ = cache_key  # type: ignore[attr-defined]
        return cast("F", wrapper)

    return decorate
