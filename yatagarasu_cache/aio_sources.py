"""Iterators and asynchronous iterators of callers, which may take any time, seen from a thread."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

from .arguments import check_items
from .backends.base import Buffer
from .codec import Key
from .concurrency.cancelling import give_up
from .errors import CacheIOError
from .guard import callers

__all__ = ["Pull", "Source", "pairs_of", "pull"]

_MISSING: Any = object()


class Source:
    """An iterator of the caller's, which may take any time, seen from a thread that can be told to stop."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._waits = self._stopped = False

    def __iter__(self) -> Iterator[Any]:
        while (part := self._following()) is not _MISSING:
            yield part

    def _following(self) -> Any:
        self._waits = True
        self._go_on()
        part = next(self._iterator, _MISSING)
        self._waits = False
        self._go_on()
        return part

    def _go_on(self) -> None:
        if self._stopped:
            give_up()

    def stop(self) -> bool:
        """Ask for nothing more. True if a thread is waiting for it just now, which may have no end."""
        self._stopped = True
        return self._waits


class Pull:
    """An asynchronous iterator seen from a thread, which `stop` ends wherever it is."""

    def __init__(self, source: AsyncIterable[Buffer], loop: asyncio.AbstractEventLoop) -> None:
        self._iterator, self._loop, self._thread = source.__aiter__(), loop, threading.get_ident()
        self._next: Future[Any] | None = None
        self._stopped = False

    def __iter__(self) -> Iterator[Buffer]:
        while (part := self._following()) is not _MISSING:
            yield part

    @callers
    def _following(self) -> Any:
        if threading.get_ident() == self._thread:
            raise CacheIOError(errno.EAGAIN, "no thread can be started to read the iterator")
        self._next = asyncio.run_coroutine_threadsafe(self._await_next(), self._loop)
        if self._stopped:
            self._next.cancel()
        try:
            return self._next.result()
        except CancelledError:
            if self._stopped:
                give_up()
            raise

    async def _await_next(self) -> Any:
        return await anext(self._iterator, _MISSING)

    def stop(self) -> bool:
        """Ask for nothing more, and cancel what is being waited for. False: no thread keeps waiting."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()
        return False


@callers
def pull(value: Any, loop: asyncio.AbstractEventLoop) -> Pull | None:
    return Pull(value, loop) if isinstance(value, AsyncIterable) else None


@callers
def pairs_of(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> Iterator[Any]:
    check_items(items)
    yield from items.items() if isinstance(items, Mapping) else items
