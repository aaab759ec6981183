"""The storages of hishel, an HTTP cache for httpx, requests and ASGI:

    client = CacheClient(storage=YatagarasuStorage("/var/cache/http", size_limit=1 << 30))
    client = AsyncCacheClient(storage=AsyncYatagarasuStorage("/var/cache/http", size_limit=1 << 30))

A response is one entry of the cache: its body, with the headers as metadata. Beside it there is, for each
key of hishel's, a list of the responses that it has; they differ by what the server varies them.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, BinaryIO, TypeVar, cast

from hishel import AsyncBaseStorage, BaseStorage, Entry, Headers, Request, Response

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..errors import CacheError, ClosedError, SerializationError
from ._handles import Use
from ._values import log

__all__ = ["AsyncYatagarasuStorage", "YatagarasuStorage"]

T = TypeVar("T")
_PIECE = 1 << 17  # bytes of a body that are read at a time
_IN_MEMORY = 1 << 20  # bytes of a body that is being received which are not yet written to a file
_MOST_VARIANTS = 256  # responses of one key


class StorageClosed(ClosedError, RuntimeError):
    """What hishel's own storages raise after `close` is a RuntimeError."""


class _Kept:
    """Of a response: everything but its body."""

    size = 0  # of the body

    def __init__(
        self, key: str, request: Request, response: Response, until: float | None, idle: float | None
    ) -> None:
        self.key, self.request, self.response = key, request, response
        self.until, self.idle = until, idle

    def packed(self) -> list[Any]:
        """As metadata."""
        request, response = self.request, self.response
        return [
            self.key, self.until, self.idle, self.size, request.method, request.url, _pairs(request.headers),
            response.status_code, _pairs(response.headers),
        ]  # fmt: skip

    @classmethod
    def unpacked(cls, meta: Any) -> _Kept | None:
        """None if it is of no response."""
        try:
            key, until, idle, size, method, url, headers, status, answered = meta
            request = Request(method=_a(str, method), url=_a(str, url), headers=_headers(headers))
            response = Response(status_code=_a(int, status), headers=_headers(answered))
            kept = cls(
                _a(str, key), request, response, None if until is None else _a(float, until),
                None if idle is None else _a(float, idle),
            )  # fmt: skip
            kept.size = _a(int, size)
            return kept
        except (TypeError, ValueError):
            return None

    def seconds(self, now: float) -> float | None:
        """To live from now on, when it was just used; None: for ever."""
        left = [] if self.until is None else [self.until - now]
        if self.idle is not None:
            left.append(self.idle)
        return min(left, default=None)

    def is_due(self, expires: float | None, now: float) -> bool:
        """Whether it is to be noted that it was used: not at each use, since that would be a write."""
        seconds = self.seconds(now)
        if self.idle is None or seconds is None or expires is None:
            return False
        return now + seconds - expires >= self.idle / 2


class _Saving:
    """A body that is being received, until all of it is there."""

    def __init__(self, kept: _Kept, most: int | None) -> None:
        self.kept, self._most, self.size = kept, most, 0
        self.file: Any = None  # until there is something to be written
        self.goes_on = True

    def add(self, chunk: bytes) -> None:
        """Whatever comes in its way ends the saving, and nothing else."""
        if not self.goes_on:
            return
        self.size += len(chunk)
        if self._most is not None and self.size > self._most:
            self.drop()
            return
        try:
            if self.file is None:
                self.file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - `drop` closes it
            self.file.write(chunk)
        except (OSError, ValueError) as error:
            _note("could not keep a body", error)
            self.drop()

    def whole(self) -> Any:
        """A file of all of it."""
        if self.file is None:
            return io.BytesIO()
        self.file.seek(0)
        return self.file

    def drop(self) -> None:
        self.goes_on = False
        if self.file is not None:
            self.file.close()


class _Common:
    """What both storages know."""

    def __init__(self, storage: Any, directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        # In the place of `default_ttl`: lists, which get new responses all the time, must not expire.
        default_expire = settings.pop("default_expire", None)
        if storage.default_ttl is None and default_expire != math.inf:
            storage.default_ttl = default_expire
        self._use = Use(directory, {"on_unreadable": "miss", **settings})
        # A stream that nobody begins to read is never told that it ends: it alone keeps its saving.
        self._savings: weakref.WeakValueDictionary[uuid.UUID, _Saving] = weakref.WeakValueDictionary()

    def _begin(
        self, storage: Any, key: str, request: Request, response: Response, ttl: float | None,
        tti: float | None,
    ) -> tuple[uuid.UUID, _Saving]:  # fmt: skip
        until, tti = storage._limits(ttl, tti, time.time())
        until, idle = (None if seconds is None else float(seconds) for seconds in (until, tti))
        saving = _Saving(_Kept(key, request, response, until, idle), storage.max_stream_size)
        number = uuid.uuid4()
        self._savings[number] = saving
        return number, saving

    def _ensure_open(self) -> None:
        if self._use.closed:
            raise StorageClosed(f"this storage, of the cache in {self._use.directory!r}, was closed")

    def _forget(self, number: uuid.UUID) -> None:
        saving = self._savings.pop(number, None)
        if saving is not None:
            saving.drop()

    def _renamed(self, number: uuid.UUID, headers: Headers) -> bool:
        """Other headers for a response that is being received. False if there is none of that number."""
        saving = self._savings.get(number)
        if saving is not None:
            saving.kept.response = replace(saving.kept.response, headers=headers)
        return saving is not None


class YatagarasuStorage(BaseStorage):
    """Responses in a `DiskCache`, shared by threads and processes.

    directory: of the cache. default_ttl: seconds that a response is kept; default_tti: seconds for which it
    is kept after its last use; max_stream_size: bytes of a body that is kept. settings: those of `DiskCache`,
    but for `max_stream_size`. What is not used any more goes when `size_limit` is reached.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, default_ttl: float | None = None,
        default_tti: float | None = None, max_stream_size: int | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(default_ttl=default_ttl, default_tti=default_tti, max_stream_size=max_stream_size)
        self._common = _Common(self, directory, settings)

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        self._common._ensure_open()
        return self._common._use.cache

    def create_entry(
        self, request: Request, response: Response, key: str, *, ttl: float | None = None,
        tti: float | None = None,
    ) -> Entry:  # fmt: skip
        """An entry whose stream saves the body as it is read; it is found when that was read to its end."""
        self._common._ensure_open()
        number, saving = self._common._begin(self, key, request, response, ttl, tti)
        body = cast("Iterator[bytes]", response.stream if response.stream is not None else iter(()))
        stream = self._saved(body, number, saving)
        return Entry(id=number, request=request, response=replace(response, stream=stream))

    def _saved(self, body: Iterator[bytes], number: uuid.UUID, saving: _Saving) -> Iterator[bytes]:
        try:
            for chunk in body:
                saving.add(chunk)
                yield chunk
            if saving.goes_on:
                self._finish(number, saving)
        finally:
            self._common._forget(number)

    def _finish(self, number: uuid.UUID, saving: _Saving) -> None:
        kept, now = saving.kept, time.time()
        try:
            seconds = kept.seconds(now)
            if seconds is not None and seconds <= 0:
                return
            kept.size = saving.size
            self.cache.set(_body(number), saving.whole(), seconds, None, kept.packed(), saving.size)
        except (CacheError, OSError, ValueError) as error:
            _note("could not store a response", error)
            return
        dropped: list[bytes] = [number.bytes]  # unless it comes to be in the list

        def listed(numbers: Any) -> list[bytes]:
            kept_ones, dropped[:] = _with(numbers, number)
            return kept_ones

        try:
            try:
                self.cache.modify(_list(kept.key), listed, [])
            except SerializationError:  # no list of ours is there
                self.cache.delete(_list(kept.key))
                self.cache.modify(_list(kept.key), listed, [])
        except (CacheError, OSError) as error:
            dropped[:] = [number.bytes]
            _note("could not store a response", error)
        try:
            if dropped:
                self.cache.delete_many(map(_body, dropped))
        except (CacheError, OSError) as error:
            _note("could not tidy up", error)

    def get_entries(self, key: str) -> list[Entry]:
        """The responses of a key that are whole and have not expired."""
        try:
            numbers = self.cache.get(_list(key))
            found = [(number, self._found(number, key)) for number in _numbers(numbers)]
        except (CacheError, OSError) as error:
            self._common._ensure_open()
            _note("could not read entries", error)
            return []
        if any(entry is None for _, entry in found):
            self._prune(key, {number for number, entry in found if entry is None})
        return [entry for _, entry in found if entry is not None]

    def _found(self, number: bytes, key: str) -> Entry | None:
        name, now = _body(number), time.time()
        entry = self.cache.get_entry(name)
        kept = None if entry is None else _Kept.unpacked(entry.meta)
        if entry is None or kept is None or kept.key != key:
            return None
        try:
            file = self.cache.open(name)
        except (KeyError, TypeError):  # it has gone, or is no body
            return None
        if kept.is_due(entry.expires, now):
            try:
                self.cache.touch(name, kept.seconds(now))
            except (CacheError, OSError) as error:
                _note("could not note that an entry was used", error)
        response = replace(kept.response, stream=_pieces(file, kept.size))
        return Entry(id=uuid.UUID(bytes=number), request=kept.request, response=response)

    def _prune(self, key: str, gone: set[bytes]) -> None:
        try:
            if not self.cache.modify(_list(key), lambda numbers: _without(numbers, gone), []):
                entry = self.cache.get_entry(_list(key))
                if entry is not None and not entry.value:
                    self.cache.delete(_list(key), entry.version)
        except (CacheError, OSError) as error:
            _note("could not tidy up", error)

    def update_headers(self, id: uuid.UUID, headers: Headers) -> None:
        """Other headers for the response of an entry; nothing, if that is gone."""
        self._common._ensure_open()
        if self._common._renamed(id, headers):
            return
        try:
            entry = self.cache.get_entry(_body(id))
            kept = None if entry is None else _Kept.unpacked(entry.meta)
            if kept is not None:
                kept.response = replace(kept.response, headers=headers)
                self.cache.set_meta(_body(id), kept.packed())
        except (CacheError, OSError, ValueError) as error:
            _note("could not update an entry", error)

    def remove_entry(self, id: uuid.UUID) -> None:
        """Nobody finds it any more; who reads it reads on."""
        self._common._ensure_open()
        self._common._forget(id)
        try:
            self.cache.delete(_body(id))
        except (CacheError, OSError) as error:
            _note("could not remove an entry", error)

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._common._use.close()


class AsyncYatagarasuStorage(AsyncBaseStorage):
    """`YatagarasuStorage` for asyncio, on an `AsyncDiskCache`. Both may use the same directory."""

    def __init__(
        self, directory: str | os.PathLike[str], *, default_ttl: float | None = None,
        default_tti: float | None = None, max_stream_size: int | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(default_ttl=default_ttl, default_tti=default_tti, max_stream_size=max_stream_size)
        self._common = _Common(self, directory, settings)

    @property
    def cache(self) -> AsyncDiskCache:
        """The cache itself."""
        self._common._ensure_open()
        return self._common._use.aio

    async def create_entry(
        self, request: Request, response: Response, key: str, *, ttl: float | None = None,
        tti: float | None = None,
    ) -> Entry:  # fmt: skip
        """As `YatagarasuStorage.create_entry`."""
        self._common._ensure_open()
        number, saving = self._common._begin(self, key, request, response, ttl, tti)
        body = cast("AsyncIterator[bytes]", response.stream if response.stream is not None else _nothing())
        stream = self._saved(body, number, saving)
        return Entry(id=number, request=request, response=replace(response, stream=stream))

    async def _saved(
        self, body: AsyncIterator[bytes], number: uuid.UUID, saving: _Saving
    ) -> AsyncIterator[bytes]:
        try:
            async for chunk in body:
                if saving.goes_on and saving.size + len(chunk) > _IN_MEMORY:  # the loop must not wait for it
                    await asyncio.to_thread(saving.add, chunk)
                else:
                    saving.add(chunk)
                yield chunk
            if saving.goes_on:
                await self._finish(number, saving)
        finally:
            self._common._forget(number)

    async def _finish(self, number: uuid.UUID, saving: _Saving) -> None:
        kept, now = saving.kept, time.time()
        try:
            seconds = kept.seconds(now)
            if seconds is not None and seconds <= 0:
                return
            kept.size = saving.size
            await self.cache.set(_body(number), saving.whole(), seconds, None, kept.packed(), saving.size)
        except (CacheError, OSError, ValueError) as error:
            _note("could not store a response", error)
            return
        dropped: list[bytes] = [number.bytes]  # unless it comes to be in the list

        def listed(numbers: Any) -> list[bytes]:
            kept_ones, dropped[:] = _with(numbers, number)
            return kept_ones

        try:
            try:
                await self.cache.modify(_list(kept.key), listed, [])
            except SerializationError:  # no list of ours is there
                await self.cache.delete(_list(kept.key))
                await self.cache.modify(_list(kept.key), listed, [])
        except (CacheError, OSError) as error:
            dropped[:] = [number.bytes]
            _note("could not store a response", error)
        try:
            if dropped:
                await self.cache.delete_many(map(_body, dropped))
        except (CacheError, OSError) as error:
            _note("could not tidy up", error)

    async def get_entries(self, key: str) -> list[Entry]:
        """As `YatagarasuStorage.get_entries`."""
        try:
            numbers = await self.cache.get(_list(key))
            found = [(number, await self._found(number, key)) for number in _numbers(numbers)]
        except (CacheError, OSError) as error:
            self._common._ensure_open()
            _note("could not read entries", error)
            return []
        if any(entry is None for _, entry in found):
            await self._prune(key, {number for number, entry in found if entry is None})
        return [entry for _, entry in found if entry is not None]

    async def _found(self, number: bytes, key: str) -> Entry | None:
        name, now = _body(number), time.time()
        entry = await self.cache.get_entry(name)
        kept = None if entry is None else _Kept.unpacked(entry.meta)
        if entry is None or kept is None or kept.key != key:
            return None
        try:
            reader = await self.cache.open(name)
        except (KeyError, TypeError):  # it has gone, or is no body
            return None
        if kept.is_due(entry.expires, now):
            try:
                await self.cache.touch(name, kept.seconds(now))
            except (CacheError, OSError) as error:
                _note("could not note that an entry was used", error)
        response = replace(kept.response, stream=_async_pieces(reader, kept.size))
        return Entry(id=uuid.UUID(bytes=number), request=kept.request, response=response)

    async def _prune(self, key: str, gone: set[bytes]) -> None:
        try:
            if not await self.cache.modify(_list(key), lambda numbers: _without(numbers, gone), []):
                entry = await self.cache.get_entry(_list(key))
                if entry is not None and not await entry.value:
                    await self.cache.delete(_list(key), entry.version)
        except (CacheError, OSError) as error:
            _note("could not tidy up", error)

    async def update_headers(self, id: uuid.UUID, headers: Headers) -> None:
        """As `YatagarasuStorage.update_headers`."""
        self._common._ensure_open()
        if self._common._renamed(id, headers):
            return
        try:
            entry = await self.cache.get_entry(_body(id))
            kept = None if entry is None else _Kept.unpacked(entry.meta)
            if kept is not None:
                kept.response = replace(kept.response, headers=headers)
                await self.cache.set_meta(_body(id), kept.packed())
        except (CacheError, OSError, ValueError) as error:
            _note("could not update an entry", error)

    async def remove_entry(self, id: uuid.UUID) -> None:
        """As `YatagarasuStorage.remove_entry`."""
        self._common._ensure_open()
        self._common._forget(id)
        try:
            await self.cache.delete(_body(id))
        except (CacheError, OSError) as error:
            _note("could not remove an entry", error)

    async def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        await self._common._use.aclose()


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """All of a body, or an exception."""
    with file:
        while piece := file.read(_PIECE):
            size -= len(piece)
            yield piece
    _ensure_whole(size)


async def _async_pieces(reader: Any, size: int) -> AsyncIterator[bytes]:
    async with reader:
        while piece := await reader.read(_PIECE):
            size -= len(piece)
            yield piece
    _ensure_whole(size)


def _ensure_whole(missing: int) -> None:
    if missing:
        raise OSError("a stored response ended early")


async def _nothing() -> AsyncIterator[bytes]:
    for chunk in tuple[bytes, ...]():
        yield chunk


def _body(number: uuid.UUID | bytes) -> tuple[str, bytes]:
    return "hishel", number if type(number) is bytes else number.bytes  # type: ignore[union-attr]


def _list(key: str) -> tuple[str, str]:
    return "hishel of", key


def _numbers(stored: Any) -> list[bytes]:
    """Of the responses of a key."""
    if type(stored) is not list:
        return []
    return [number for number in stored if type(number) is bytes and len(number) == 16]


def _with(stored: Any, number: uuid.UUID) -> tuple[list[bytes], list[bytes]]:
    """The list with a response more, and those for which there is no place in it any more."""
    numbers = [*_numbers(stored), number.bytes]
    return numbers[-_MOST_VARIANTS:], numbers[:-_MOST_VARIANTS]


def _without(stored: Any, gone: set[bytes]) -> list[bytes]:
    return [number for number in _numbers(stored) if number not in gone]


def _pairs(headers: Headers) -> list[Any]:
    return [[name, list(value)] for name, value in headers._headers.items()]


def _headers(pairs: Any) -> Headers:
    return Headers({_a(str, name): [_a(str, value) for value in _a(list, values)] for name, values in pairs})


def _a(kind: type[T], value: Any) -> T:
    """The value, if it is of that type; else TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def _note(what: str, error: Exception) -> None:
    log.warning("hishel: %s: %s", what, error)
