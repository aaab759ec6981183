"""The cache of cachelib, for Flask-Caching and Flask-Session too:

    YatagarasuCache("/var/cache/app")                                          # cachelib
    Cache(app, config={"CACHE_TYPE": "yatagarasu_cache.integrations.cachelib.YatagarasuCache",
                       "CACHE_OPTIONS": {"directory": "/var/cache/app"}})      # Flask-Caching
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=YatagarasuCache("/var/cache/sessions"))
"""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

from cachelib.base import BaseCache

from ..cache import DiskCache
from ..errors import CacheError, ClosedError, SerializationError
from ._handles import Use
from ._values import added, log, put, signed_pickles

__all__ = ["YatagarasuCache"]

_MISSING: Any = object()


class YatagarasuCache(BaseCache):
    """A `cachelib.BaseCache` on a `DiskCache`, shared by threads and processes.

    directory: of the cache. default_timeout: seconds, or a timedelta, that entries live if `set` names no
    time; 0: for ever. secret: with which values are signed that must be pickled; None: the user's own.
    settings: those of `DiskCache`.

    What the cache cannot store, since it is too large or the disk fails, is logged, and `set` returns False.
    """

    def __init__(
        self, directory: str | os.PathLike[str], default_timeout: int | dt.timedelta = 300,
        ignore_delete_many_errors: bool = True, *, secret: bytes | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(default_timeout, ignore_delete_many_errors)
        if "serializer" not in settings:
            settings["serializer"] = signed_pickles(secret)
        self._use = Use(directory, {"on_unreadable": "miss", **settings})

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        return self._use.cache

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._use.close()

    def _expire(self, timeout: int | dt.timedelta | None) -> float:
        seconds = self._normalize_timeout(timeout)
        return seconds if seconds else float("inf")

    def get(self, key: str) -> Any:
        try:
            return self.cache.get(key)
        except ClosedError:
            raise
        except CacheError as error:
            _note(error)
            return None

    def get_many(self, *keys: str) -> list[Any]:
        try:
            found = self.cache.get_many(keys)
        except ClosedError:
            raise
        except CacheError as error:
            _note(error)
            return [None] * len(keys)
        return [found.get(key) for key in keys]

    def set(self, key: str, value: Any, timeout: int | dt.timedelta | None = None) -> bool:
        expire = self._expire(timeout)
        try:
            if expire < 0:  # it has expired already
                self.cache.delete(key)
                return True
            put(self.cache, key, value, expire)
            return True
        except (ClosedError, SerializationError) as error:
            raise _cause(error) from None
        except CacheError as error:
            _note(error)
            return False

    def add(self, key: str, value: Any, timeout: int | dt.timedelta | None = None) -> bool:
        expire = self._expire(timeout)
        try:
            if expire < 0:
                return not self.has(key)
            return added(self.cache, key, value, expire)
        except (ClosedError, SerializationError) as error:
            raise _cause(error) from None
        except CacheError as error:
            _note(error)
            return False

    def delete(self, key: str) -> bool:
        try:
            return self.cache.delete(key)
        except ClosedError:
            raise
        except CacheError as error:
            _note(error)
            return False

    def has(self, key: str) -> bool:
        """Whether `get` finds it, which reads it: to those who ask whether a None was stored, what cannot be
        read must not seem to be one."""
        try:
            return self.cache.get(key, _MISSING) is not _MISSING
        except ClosedError:
            raise
        except CacheError as error:
            _note(error)
            return False

    def clear(self) -> bool:
        try:
            self.cache.clear()
            return True
        except ClosedError:
            raise
        except CacheError as error:
            _note(error)
            return False

    def inc(self, key: str, delta: int = 1) -> int | None:
        """Add to a number, and return the sum. Atomic. What is not there counts as 0, and lives for the
        default timeout; one that is there keeps its time. None if what is stored is no whole number, or the
        disk fails."""
        try:
            return self.cache.incr(key, delta, expire=self._expire(None))
        except ClosedError:
            raise
        except (CacheError, TypeError) as error:
            _note(error)
            return None

    def dec(self, key: str, delta: int = 1) -> int | None:
        """`inc` by ``-delta``."""
        return self.inc(key, -delta)


def _note(error: Exception) -> None:
    log.warning("cachelib: %s", error)


def _cause(error: Exception) -> BaseException:
    """What pickle says of a value, where it was pickle that refused it."""
    return error.__cause__ or error
