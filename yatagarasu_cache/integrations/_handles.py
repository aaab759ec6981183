"""The caches that adapters use: one handle in a process for all that name the same directory and settings.

Frameworks make adapters freely: one for each thread, each task, each request. An adapter has a `Use` of the
cache; `close` ends the use, and the cache is closed with its last one, or when that is forgotten.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..concurrency import forks
from ..config import Settings, make_settings
from ..errors import CacheError, ClosedError
from ._values import log

__all__ = ["Use", "settings_among"]

_SETTINGS = frozenset(field.name for field in fields(Settings)) - {"directory"}


class _Handles:
    """The handles of one directory and settings, each opened when it is asked for first."""

    def __init__(self, directory: str, settings: Mapping[str, Any]) -> None:
        self._directory, self._settings = directory, settings
        self._opening = threading.Lock()
        self._plain: DiskCache | None = None
        self._aio: AsyncDiskCache | None = None
        self.uses = 0  # that were not closed; those that were forgotten count, too
        self._opened: list[DiskCache | AsyncDiskCache] = []
        # Where no use was closed. At the end of the process: see `_close_all`.
        weakref.finalize(self, _close, self._opened).atexit = False

    @property
    def plain(self) -> DiskCache:
        if self._plain is None or self._plain.closed:
            with self._opening:
                if self._plain is None or self._plain.closed:
                    self._plain = DiskCache(self._directory, **self._settings)
                    self._opened.append(self._plain)
        return self._plain

    @property
    def aio(self) -> AsyncDiskCache:
        if self._aio is None or self._aio.closed:
            with self._opening:
                if self._aio is None or self._aio.closed:
                    self._aio = AsyncDiskCache(self._directory, **self._settings)
                    self._opened.append(self._aio)
        return self._aio

    def close(self) -> None:
        _close(self._opened)

    async def aclose(self) -> None:
        if self._aio is not None:
            await self._aio.close()
        await asyncio.to_thread(self.close)

    def after_fork(self) -> None:
        self._opening = threading.Lock()  # another thread of the parent may have had it


def _close(opened: list[DiskCache | AsyncDiskCache]) -> None:
    """Close them, and go on where one cannot be: nobody uses them any more."""
    while opened:
        cache = opened.pop()
        try:
            if isinstance(cache, DiskCache):
                cache.close()
            else:
                cache._closed = True  # its own `close` needs a loop
                cache._close()
        except (CacheError, OSError) as error:
            log.warning("handles: could not close the cache in %r: %s", cache.directory, error)


_handles: weakref.WeakValueDictionary[Any, _Handles] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class Use:
    """One adapter's use of a cache, which is opened when it is needed. Raises what `make_settings` does."""

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        checked = make_settings(directory, **settings)
        self.directory = checked.directory
        self._key = self.directory, *sorted((name, _hashable(value)) for name, value in settings.items())
        with _lock:
            found = _handles.get(self._key)
            if found is None:
                found = _handles[self._key] = _Handles(self.directory, dict(settings))
            found.uses += 1
        self._handles: _Handles | None = found

    @property
    def cache(self) -> DiskCache:
        """Raises `ClosedError` after `close`."""
        return self._in_use.plain

    @property
    def aio(self) -> AsyncDiskCache:
        """The same cache for coroutines."""
        return self._in_use.aio

    @property
    def closed(self) -> bool:
        return self._handles is None

    @property
    def _in_use(self) -> _Handles:
        handles = self._handles
        if handles is None:
            raise ClosedError(f"this use of the cache in {self.directory!r} was closed: make another one")
        return handles

    def close(self) -> None:
        """End it. Idempotent. The last use closes the cache."""
        last = self._end()
        if last is not None:
            last.close()

    async def aclose(self) -> None:
        """The same, without making the loop wait."""
        last = self._end()
        if last is not None:
            await last.aclose()

    def _end(self) -> _Handles | None:
        """What is to be closed, as nobody else uses it."""
        with _lock:
            handles, self._handles = self._handles, None
            if handles is None:
                return None
            handles.uses -= 1
            if handles.uses:
                return None
            if _handles.get(self._key) is handles:
                del _handles[self._key]
            return handles


def settings_among(
    options: Mapping[str, Any], framework: str, known: Container[str] = ()
) -> dict[str, Any]:
    """The settings of `DiskCache` among what a framework hands its storages. The others are `known`, to the
    framework itself, or said to be ignored: storages of other kinds may have a use for them."""
    found = {name: value for name, value in options.items() if name in _SETTINGS}
    for name in options:
        if name not in found and name not in known:
            log.warning("%s: %r is no setting of a DiskCache, and ignored", framework, name)
    return found


def _hashable(value: Any) -> Any:
    """What stands for a setting: values that are equal stand for the same."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value).__name__, value


def _close_all() -> None:
    """Django has no end to close its caches at, and nobody is to be warned of it."""
    for handles in list(_handles.values()):
        handles.close()


def _renew_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for handles in list(_handles.values()):
        handles.after_fork()


forks.register(_renew_in_child)
atexit.register(_close_all)  # after what closes forgotten caches, and warns: so it is called before that
