"""`DjangoCache`: the cache backend for Django that diskcache has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

from .constants import keys_of
from .core import ENOVAL, Cache
from .fanout import FanoutCache
from .persistent import Deque, Index

__all__ = ["DjangoCache"]

F = TypeVar("F", bound=Callable[..., Any])


class DjangoCache(BaseCache):  # type: ignore[misc]
    """A `FanoutCache` as Django's cache: ``"BACKEND": "yatagarasu_cache.compat.diskcache.DjangoCache"``.

    LOCATION is the directory; SHARDS, DATABASE_TIMEOUT (seconds) and OPTIONS go to the `FanoutCache`.
    """

    def __init__(self, directory: str, params: dict[str, Any]) -> None:
        super().__init__(params)
        shards, timeout = params.get("SHARDS", 8), params.get("DATABASE_TIMEOUT", 0.010)
        self._cache = FanoutCache(directory, shards, timeout, **params.get("OPTIONS", {}))

    @property
    def directory(self) -> str:
        """Where the cache is."""
        return self._cache.directory

    def cache(self, name: str) -> Cache:
        """As `FanoutCache.cache`."""
        return self._cache.cache(name)

    def deque(self, name: str, maxlen: int | None = None) -> Deque:
        """As `FanoutCache.deque`."""
        return self._cache.deque(name, maxlen=maxlen)

    def index(self, name: str) -> Index:
        """As `FanoutCache.index`."""
        return self._cache.index(name)

    def _key(self, key: Any, version: int | None) -> Any:
        return self.make_key(key, version=version)

    def add(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None,
        read: bool = False, tag: Any = None, retry: bool = True,
    ) -> bool:  # fmt: skip
        """Store a value if there is none. Whether it was stored."""
        key, seconds = self._key(key, version), self.get_backend_timeout(timeout=timeout)
        return self._cache.add(key, value, seconds, read, tag, retry)

    def get(
        self, key: Any, default: Any = None, version: int | None = None, read: bool = False,
        expire_time: bool = False, tag: bool = False, retry: bool = False,
    ) -> Any:  # fmt: skip
        """The value of a key, or `default`."""
        return self._cache.get(self._key(key, version), default, read, expire_time, tag, retry)

    def read(self, key: Any, version: int | None = None) -> Any:
        """The value of a key as a binary file. KeyError if there is none."""
        return self._cache.read(self._key(key, version))

    def set(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None,
        read: bool = False, tag: Any = None, retry: bool = True,
    ) -> bool:  # fmt: skip
        """Store a value. Whether it was stored."""
        key, seconds = self._key(key, version), self.get_backend_timeout(timeout=timeout)
        return self._cache.set(key, value, seconds, read, tag, retry)

    def touch(
        self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None, retry: bool = True
    ) -> bool:
        """Set when an entry expires. False if there is none."""
        return self._cache.touch(self._key(key, version), self.get_backend_timeout(timeout=timeout), retry)

    def pop(
        self, key: Any, default: Any = None, version: int | None = None, expire_time: bool = False,
        tag: bool = False, retry: bool = True,
    ) -> Any:  # fmt: skip
        """Remove a key and return its value, or `default`."""
        return self._cache.pop(self._key(key, version), default, expire_time, tag, retry)

    def delete(self, key: Any, version: int | None = None, retry: bool = True) -> bool:
        """Remove a key. False if there was none."""
        return self._cache.delete(self._key(key, version), retry)

    def incr(
        self, key: Any, delta: int = 1, version: int | None = None, default: int | None = None,
        retry: bool = True,
    ) -> Any:  # fmt: skip
        """Add to a number, and return the sum. ValueError if there is none, and no default."""
        try:
            return self._cache.incr(self._key(key, version), delta, default, retry)
        except KeyError:
            raise ValueError(f"Key {key!r} not found") from None

    def decr(
        self, key: Any, delta: int = 1, version: int | None = None, default: int | None = None,
        retry: bool = True,
    ) -> Any:  # fmt: skip
        """`incr` by ``-delta``."""
        return self.incr(key, -delta, version, default, retry)

    def has_key(self, key: Any, version: int | None = None) -> bool:
        """Whether there is one."""
        return self._key(key, version) in self._cache

    def expire(self) -> int:
        """As `FanoutCache.expire`."""
        return self._cache.expire()

    def stats(self, enable: bool = True, reset: bool = False) -> tuple[int, int]:
        """As `FanoutCache.stats`."""
        return self._cache.stats(enable=enable, reset=reset)

    def create_tag_index(self) -> None:
        """As `FanoutCache.create_tag_index`."""
        self._cache.create_tag_index()

    def drop_tag_index(self) -> None:
        """As `FanoutCache.drop_tag_index`."""
        self._cache.drop_tag_index()

    def evict(self, tag: Any) -> int:
        """As `FanoutCache.evict`."""
        return self._cache.evict(tag)

    def cull(self) -> int:
        """As `FanoutCache.cull`."""
        return self._cache.cull()

    def clear(self) -> int:
        """As `FanoutCache.clear`."""
        return self._cache.clear()

    def close(self, **kwargs: Any) -> None:
        """As `FanoutCache.close`."""
        self._cache.close()

    def get_backend_timeout(self, timeout: Any = DEFAULT_TIMEOUT) -> float | None:
        """Seconds, None for never; what is 0 or less expires at once."""
        if timeout == DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        elif timeout == 0:
            timeout = -1
        return None if timeout is None else float(timeout)

    def memoize(
        self, name: str | None = None, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None,
        typed: bool = False, tag: Any = None, ignore: Iterable[int | str] = (),
    ) -> Callable[[F], F]:  # fmt: skip
        """Decorate a function: its results are kept, by its arguments. See `Cache.memoize`."""
        if callable(name):
            raise TypeError("name cannot be callable")
        ignored = frozenset(ignore)

        def decorate(func: F) -> F:
            cache_key = keys_of(func, name, typed, ignored)

            @functools.wraps(func)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                key = cache_key(*args, **kwargs)
                result = self.get(key, ENOVAL, version, retry=True)
                if result is ENOVAL:
                    result = func(*args, **kwargs)
                    is_kept = timeout is None or timeout == DEFAULT_TIMEOUT or timeout > 0
                    if is_kept:
                        self.set(key, result, timeout, version, tag=tag, retry=True)
                return result

            wrapper.__cache_key__ = cache_key  # type: ignore[attr-defined]
            return cast("F", wrapper)

        return decorate
