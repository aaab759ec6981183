"""`AsyncDiskCache`: the same cache for asyncio, with the same names.

A hit whose bytes are in memory completes without leaving the task. Everything else goes through
the backend's channel: cold reads, which a ring takes many at a time, and puts in batches that
share their write, their lock and their sync. Operations beyond `max_in_flight` wait for their turn.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from .aio_loop import Loop, in_thread
from .aio_sources import Source, pairs_of, pull
from .arguments import listed
from .cache import DiskCache
from .codec import KIND_BYTES, Key, Prefix, Serializer, refuse_equal
from .concurrency import forks
from .concurrency.interruption import ours
from .concurrency.locks import new_lock
from .config import RingSettings, Settings
from .desk import Desk
from .engine import late, opening
from .entry import Entry, Location
from .errors import ClosedError, ReadOnlyError, Unreadable, from_os_error
from .guard import callers, constructed, guarded, tell
from .modifying import result_of_either
from .stats import CacheStats
from .store.check import Problem
from .store.chunks import PIECE_BYTES
from .store.format import Slot
from .store.item import Item
from .store.reading import Found
from .store.store import Store
from .streams import as_stream, check_length, stream_length

if TYPE_CHECKING:
    from .computing.aio_key_lock import AsyncKeyLock
    from .computing.aio_once import AsyncOnce
    from .computing.memoize import AsyncMemoized, AsyncMemoizing
    from .computing.throttling import Rate, Turn

__all__ = ["AsyncDiskCache", "AsyncEntry", "AsyncValueReader"]

P = ParamSpec("P")
T = TypeVar("T")
_MISSING: Any = object()
_YIELD_EVERY = 64  # hits in place after which other tasks get a turn
_WALK_BATCH = 256  # keys fetched by one call while iterating
# Where reads that begin together cost less, a value is not always looked for in memory first: while
# fewer than about one in four is found there, only one in so many is, to notice a change.
COLD, COLD_MOST = 48, 64  # above COLD; looks that were in vain, less what those that were not make up for
_FOUND_COUNTS = 3
COLD_TRIES = 32


class AsyncEntry(Entry):
    """Like `Entry`, but its value is awaited: ``await entry.value``."""

    __slots__ = ("_run",)

    def __init__(self, entry: Entry, run: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__(
            key=entry.key, tag=entry.tag, meta=entry.meta, size=entry.size, created=entry.created,
            expires=entry.expires, accessed=entry.accessed, version=entry.version, load=entry._load,
        )  # fmt: skip
        self._run = run

    @property
    def value(self) -> Any:
        """An awaitable of the value. Raises `EntryGone` if the entry was replaced or removed."""
        return self._run(lambda: Entry.value.fget(self))  # type: ignore[attr-defined]


class AsyncValueReader:
    """A value as a binary file whose methods are awaited; also ``async for chunk in reader``."""

    def __init__(self, file: Any, run: Callable[..., Any]) -> None:
        self._file, self._run = file, run
        self._reading = threading.Lock()  # by a worker, which goes on when its caller was cancelled

    @guarded
    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all that is left if it is negative."""
        data: bytes = await self._run(self._read, size)
        return data

    @callers
    def _read(self, size: int) -> bytes:
        with self._reading:
            data: bytes = self._file.read(size)
            return data

    @guarded
    async def readinto(self, buffer: Any) -> int:
        """Bytes into a buffer of the caller's, at most so many as it holds: how many; 0 only at the end."""
        size: int = await self._run(self._readinto, buffer)
        return size

    @callers
    def _readinto(self, buffer: Any) -> int:
        with self._reading:
            size: int = self._file.readinto(buffer)
            return size

    @guarded
    async def readline(self, size: int = -1) -> bytes:
        """Up to the end of the line, which it includes, or `size` bytes."""
        line: bytes = await self._run(self._readline, size)
        return line

    @callers
    def _readline(self, size: int) -> bytes:
        with self._reading:
            line: bytes = self._file.readline(size)
            return line

    def fileno(self) -> int:
        """As of what `DiskCache.open` gives: `io.UnsupportedOperation` if the value has no own file."""
        descriptor: int = self._file.fileno()
        return descriptor

    @guarded
    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position: int = await self._run(self._seek, offset, whence)
        return position

    @callers
    def _seek(self, offset: int, whence: int) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    async def close(self) -> None:
        if self._reading.locked():  # the file would make the loop wait for the end of that
            await asyncio.shield(in_thread(self._file.close, "yatagarasu-closing"))
        else:
            self._file.close()

    async def __aenter__(self) -> AsyncValueReader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read(PIECE_BYTES):
            yield chunk


_caches: weakref.WeakSet[AsyncDiskCache] = weakref.WeakSet()
_companions: weakref.WeakKeyDictionary[DiskCache, weakref.ref[AsyncDiskCache]] = weakref.WeakKeyDictionary()


class AsyncDiskCache:
    """`DiskCache` for asyncio: the same options, names and meanings; no call blocks the loop.

    Opened by ``async with`` or by the first operation. Usable from several event loops, each in
    its own thread, at once. Cancelling an operation leaves the old value or the new one, and
    leaks nothing. Once its CancelledError has come up, nothing more of it takes effect: a change that
    is under way on the disk is waited for. What waits for a lock that others have gives up.
    """

    @guarded
    @opening
    def __init__(
        self, directory: str | os.PathLike[str], *,
        size_limit: int = 10 * 2**30,
        eviction: Literal["lru", "fifo", "lfu", "none"] = "lru",
        backend: Literal["auto", "uring", "threads"] | None = "auto",
        durability: Literal["none", "sync"] = "none",
        serializer: Literal["msgpack", "pickle"] | Serializer = "msgpack",
        on_unreadable: Literal["error", "miss"] = "error",
        compression: Literal["zstd", "lz4"] | None = None,
        compression_level: int | None = None,
        compression_min_size: int = 1024,
        max_value_size: int | None = None,
        max_stream_size: int | None = None,
        default_expire: float | None = None,
        read_only: bool = False,
        segment_size: int | None = None,
        large_value_size: int | None = None,
        headroom: float = 0.15,
        max_open_files: int = 256,
        max_in_flight: int = 1024,
        lock_timeout: float | None = 60.0,
        workers: int | None = None,
        allow_network_fs: bool = False,
        directory_mode: int | str = 0o700,
        file_mode: int | str = 0o600,
        io_uring: RingSettings | Mapping[str, Any] = {},  # noqa: B006 - shown, and never used
    ) -> None:  # fmt: skip
        """Options as in `DiskCache`, besides: max_in_flight, operations of a loop under way before
        further ones wait (1024). Raises `ConfigurationError`; the rest is raised when it opens.
        """

    def _begin(self, directory: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self._desk: Desk | None = None  # while it is open, and for the methods that wait for the disk:
        self._cache: DiskCache | None = None
        if isinstance(directory, DiskCache):  # see `_beside`
            self._settings, self._unpickled = directory._settings, False
            self._desk, self._cache = directory._desk, directory
        else:
            self._settings, self._unpickled = Desk.checked(directory, options)
        self._opening: Future[BaseException | None] | None = None  # what came in its way
        self._opening_lock, self._closing_lock = new_lock(), new_lock()
        self._closings: set[asyncio.Task[None]] = set()
        _caches.add(self)
        self._loops: dict[asyncio.AbstractEventLoop, Loop] = {}
        self._closed = False
        self._in_place = self._cold = self._skipped = 0

    @classmethod
    @guarded
    def from_config(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> AsyncDiskCache:
        """As `DiskCache.from_config`."""
        directory, options = Desk.configured(source)
        return constructed(cls, directory, options)

    @classmethod
    def _beside(cls, cache: DiskCache) -> AsyncDiskCache:
        """For coroutines that use a synchronous handle: the same handle, which ends when that is closed."""
        known = _companions.get(cache)
        companion = None if known is None else known()
        if companion is None:
            companion = cls(cache)  # type: ignore[arg-type]
            _companions[cache] = weakref.ref(companion)
        return companion

    # -- life ---------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        return self._settings.directory

    @property
    def settings(self) -> Settings:
        """As `DiskCache.settings`; before it is opened, what the caller named, and defaults for the rest."""
        return self._settings if self._desk is None else self._desk.settings_in_force()

    @property
    def closed(self) -> bool:
        return self._closed

    @guarded
    async def __aenter__(self) -> AsyncDiskCache:
        try:
            await self._opened()
        except asyncio.CancelledError:  # nobody else will
            self._begin_closing()
            raise
        return self

    @guarded
    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _opened(self) -> Desk:
        if self._desk is None or self._closed:
            error = await asyncio.shield(asyncio.wrap_future(self._open_once()))
            if error is not None:
                raise error
        if self._desk is None:
            raise self._not_open()
        return self._desk

    def _open_once(self) -> Future[BaseException | None]:
        """The opening that all tasks of all loops wait for."""
        with self._opening_lock:
            if self._closed:
                raise self._closed_error()
            opening, first = self._opening, self._opening is None
            if opening is None:
                self._opening = opening = Future()
        if first:
            in_thread(partial(self._open, opening), "yatagarasu-opening")
        return opening

    def _open(self, opening: Future[BaseException | None]) -> None:
        try:
            cache, desk = self._opened_now()
            self._cache, self._desk = cache, desk
        except BaseException as error:
            with self._opening_lock:
                self._opening = None  # it may be tried again
            opening.set_result(error)
        else:
            opening.set_result(None)

    def _opened_now(self) -> tuple[DiskCache, Desk]:
        desk = Desk(self._settings, self._unpickled)
        cache = DiskCache(desk)
        try:  # now, not in the loop, which would stand still for each part that is on disk only
            desk.store.current.index.fetch()
        except ours(OSError) as error:
            cache.close()
            raise from_os_error(error, "cannot read the index") from error
        return cache, desk

    def _after_fork(self) -> None:
        """In a child, which has none of the threads that were opening or closing it."""
        self._opening_lock, self._closing_lock, self._closings = new_lock(), new_lock(), set()
        if self._opening is not None and not self._opening.done():
            self._opening = None

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the cache in {self.directory!r} is closed: open it anew")

    def _loop(self, desk: Desk) -> Loop:
        if self._closed:
            raise self._closed_error()
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            for old in [known for known in list(self._loops) if known.is_closed()]:
                self._loops.pop(old, None)
            state = self._loops[loop] = Loop(desk, loop)
        return state

    @guarded
    async def close(self) -> None:
        """End the use: operations under way complete first. Idempotent.

        If this is cancelled, closing goes on, and a second `close` waits for its end. Files and iterators of
        cancelled calls are not waited for.
        """
        await asyncio.shield(self._begin_closing())

    def _begin_closing(self) -> asyncio.Task[None]:
        with self._opening_lock:
            self._closed = True
        closing = asyncio.ensure_future(self._end())
        self._closings.add(closing)  # the loop itself does not keep it
        closing.add_done_callback(self._closings.discard)
        return closing

    async def _end(self) -> None:
        try:
            await self._drain()
        finally:  # also where the loop ends: then it is not waited for, but by the interpreter
            closed = in_thread(self._close, "yatagarasu-closing", daemon=False)
        await closed
        self._loops.clear()

    async def _drain(self) -> None:
        if "yatagarasu_cache.computing.aio_ways" in sys.modules:
            await late("computing.aio_ways").end_refreshes(self._desk)
        if (opening := self._opening) is not None:
            await asyncio.shield(asyncio.wrap_future(opening))
        state = self._loops.get(asyncio.get_running_loop())
        if state is not None:
            await state.drain()

    def _close(self) -> None:
        if (opening := self._opening) is not None:
            opening.result()
        with self._closing_lock:  # several may ask for it, and each waits for its end
            if self._cache is not None:
                self._cache.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), *Desk.arguments(self._settings))

    def __repr__(self) -> str:
        return f"<AsyncDiskCache {self.directory!r}>"

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` in a worker thread, when it is this operation's turn."""
        state = self._loop(await self._opened())
        async with state.turns:
            return await state.run(function, *args)

    @guarded
    async def _run_for_others(self, function: Callable[..., T], *args: Any) -> T:
        """For what was handed out."""
        return await self._run(function, *args)

    async def _call(self, name: str, *args: Any, **options: Any) -> Any:
        """A method of the synchronous cache, in a worker thread."""
        await self._opened()
        return await self._run(partial(getattr(self._sync(), name), *args, **options))

    async def _change(self, name: str, *args: Any, **options: Any) -> Any:
        """The same of one that changes something: nothing of it takes effect after this."""
        state = self._loop(await self._opened())
        async with state.turns:
            return await state.change(partial(getattr(self._sync(), name), *args, **options))

    # -- one entry ----------------------------------------------------------------------------

    @overload
    async def get(self, key: Key, default: Any = None, *, with_meta: Literal[False] = False) -> Any: ...
    @overload
    async def get(self, key: Key, default: Any = None, *, with_meta: Literal[True]) -> tuple[Any, Any]: ...
    @overload
    async def get(self, key: Key, default: Any = None, *, with_meta: bool) -> Any: ...

    async def get(self, key: Key, default: Any = None, with_meta: bool = False) -> Any:
        """As `DiskCache.get`. Does not leave the task if the value is in memory."""
        try:
            desk = self._desk or await self._opened()
            if with_meta:
                return await self._get_with_meta(desk, key, default)
            core = desk.store.core
            found: Any = NotImplemented
            looks = self._cold <= COLD or self._tries()
            if looks:
                found = core.get_nowait(key, time.time_ns())
                if self._cold and found is not NotImplemented:
                    self._cold = max(self._cold - _FOUND_COUNTS, 0)
            if found is NotImplemented:
                place = core.place(key, time.time_ns())
                if type(place) is tuple:
                    if looks and self._cold < COLD_MOST and desk.store.backend.prefers_together:
                        self._cold += 1
                    found = await self._get_placed(desk, place)
                else:
                    found = None if place is None else await self._get_ordinary(desk, key)
            self._in_place += 1
            if self._in_place >= _YIELD_EVERY:
                await self._yield()
            if type(found) is bytes:
                return found
            if found is None:
                return default
            payload, flags = found
            return desk.decode(payload, flags, key) if flags else payload
        except Exception as error:  # as `guarded` does, without a coroutine
            if type(error) is Unreadable and self._settings.on_unreadable == "miss":
                return (default, None) if with_meta else default
            tell(error, self)
            raise

    async def _get_with_meta(self, desk: Desk, key: Key, default: Any) -> tuple[Any, Any]:
        """In place if the value is in memory; else in a worker."""
        found: tuple[Any, Any] | None = desk.get_with_meta(key, default, wait=False)
        if found is None:
            waited: tuple[Any, Any] = await self._run(desk.get_with_meta, key, default)
            return waited
        self._in_place += 1
        if self._in_place >= _YIELD_EVERY:
            await self._yield()
        return found

    async def _yield(self) -> None:
        self._in_place = 0
        await asyncio.sleep(0)

    def _tries(self) -> bool:
        """Whether it is time to look for one of many cold values in memory."""
        self._skipped += 1
        return not self._skipped % COLD_TRIES

    async def _get_ordinary(self, desk: Desk, key: Key) -> Any:
        """What the core leaves to others. Counted."""
        store = desk.store
        low, high, data = desk.identify(key)
        slot = store.finding.lookup(low, high)
        if slot is None:
            store.counters.use(False)
            return None
        return store.reading.get_nowait(slot, data) or await self._get_cold(
            self._loop(desk), store, slot, data
        )

    async def _get_placed(self, desk: Desk, place: tuple[Any, ...]) -> Any:
        """A plain value that is not in memory. Counted."""
        store, state = desk.store, self._loop(desk)
        fd, length, offset, low, high = place[:5]
        if not state.turns.enter():
            await state.turns.wait()
        try:
            try:
                data = await state.channel.read(fd, length, offset)
            except ours(OSError):
                pass  # told apart below
            else:
                found = store.core.accept(place, data, time.time_ns())
                if found is not NotImplemented:
                    return found
            return await state.run(store.reading.get_carefully, low, high, place[-1])
        finally:
            state.turns.leave()

    async def _get_cold(self, state: Loop, store: Store, slot: Slot, key: bytes) -> Found | None:
        """A value that is not in memory. Counted."""
        async with state.turns:
            fd = store.files.segments.open_files.get(slot.segment)
            if fd is not None:
                try:
                    if not store.reading.in_segment(slot):
                        return await state.run(store.reading.get_carefully, slot.low, slot.high, key)
                    length = slot.head_bytes + slot.value_length
                    record = await state.channel.read(fd, length, slot.offset)
                except ours(OSError):
                    pass  # told apart below
                else:
                    if (found := store.reading.check(slot, key, record)) is not None:
                        return found
            return await state.run(store.reading.get_carefully, slot.low, slot.high, key)

    async def set(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None, meta: Any = None,
        length: int | None = None, if_version: int | None = None,
    ) -> bool:  # fmt: skip
        """As `DiskCache.set`; `value` may also be an asynchronous iterator of bytes.

        Cancelling it leaves the old value or the new one, and what is there then stays: see the class.
        """
        try:
            desk = self._desk or await self._opened()
            state = self._loop(desk)
            store = desk.store
            store.life.ensure_writable("store an entry")
            expected = desk.expected(if_version)
            pulled = pull(value, state.loop)
            stream = as_stream(value if pulled is None else iter(pulled), length)
            if stream is None and length is not None:
                check_length(value, length)
            value = value if stream is None else b""
            if desk.compresses:  # which takes a while
                item = await self._run(desk.item, key, value, expire, tag, meta)
            else:
                item = desk.item(key, value, expire, tag, meta)
            if stream is None:
                if expected is not None:
                    async with state.turns:
                        return await state.change(store.writing.put_if, item, expected)
                await state.store(item)
                return True
            source = pulled or Source(stream)
            item = item._replace(flags=KIND_BYTES)
            return await state.run_aside(
                source, store.writing.put_stream, item, stream if pulled else iter(source),
                stream_length(value, length), expected,
            )  # fmt: skip
        except Exception as error:  # as `guarded` does, without a coroutine
            tell(error, self)
            raise

    @guarded
    async def add(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> bool:
        """As `DiskCache.add`."""
        added: bool = await self._change("add", key, value, expire, tag, meta)
        return added

    @guarded
    async def touch(self, key: Key, expire: float | None = None) -> bool:
        """As `DiskCache.touch`."""
        touched: bool = await self._change("touch", key, expire)
        return touched

    @guarded
    async def set_meta(self, key: Key, meta: Any) -> bool:
        """As `DiskCache.set_meta`."""
        done: bool = await self._change("set_meta", key, meta)
        return done

    @guarded
    async def incr(
        self, key: Key, delta: int = 1, default: int | None = 0, *, expire: float | None = None,
        tag: Key = None,
    ) -> int:  # fmt: skip
        """As `DiskCache.incr`."""
        value: int = await self._change("incr", key, delta, default, expire=expire, tag=tag)
        return value

    @guarded
    async def decr(
        self, key: Key, delta: int = 1, default: int | None = 0, *, expire: float | None = None,
        tag: Key = None,
    ) -> int:  # fmt: skip
        """As `DiskCache.decr`."""
        value: int = await self._change("decr", key, delta, default, expire=expire, tag=tag)
        return value

    @guarded
    async def modify(
        self, key: Key, function: Callable[[Any], Any] | Callable[[Any], Awaitable[Any]], default: Any = None
    ) -> Any:
        """As `DiskCache.modify`; `function` may also be a coroutine function. It runs in the task."""
        desk = await self._opened()
        modification = desk.modification(key, default)
        while True:
            value = await result_of_either(function, await self._run(modification.read))
            state = self._loop(desk)
            async with state.turns:
                if await state.change(modification.store, value):
                    return value
            await asyncio.sleep(modification.pause())

    @guarded
    async def pop(self, key: Key, default: Any = None) -> Any:
        """As `DiskCache.pop`."""
        return await self._change("pop", key, default)

    @guarded
    async def setdefault(
        self, key: Key, default: Any = None, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> Any:
        """As `DiskCache.setdefault`."""
        desk = self._desk or await self._opened()
        desk.store.life.ensure_writable("store an entry")
        for _ in range(desk.attempts):
            value = await self.get(key, _MISSING)
            if value is not _MISSING:
                return value
            if await self.add(key, default, expire, tag, meta):
                return default
            await self._run(desk.ensure_readable, key)
        raise desk.undefaulted()

    @guarded
    async def delete(self, key: Key, if_version: int | None = None) -> bool:
        """As `DiskCache.delete`."""
        deleted: bool = await self._change("delete", key, if_version)
        return deleted

    # -- computing, and locks by key ------------------------------------------------------------

    @property
    def _once(self) -> AsyncOnce:
        kind: type[AsyncOnce] = late("computing.aio_once").AsyncOnce
        return kind(self)

    async def _put(self, item: Item) -> None:
        """Store an item, as `set` does."""
        state = self._loop(await self._opened())
        await state.store(item)

    @overload
    async def get_or_set(
        self, key: Key, function: Callable[[], Awaitable[T]], *, expire: float | None = ..., tag: Key = ...,
        meta: Any = ..., stale: float | None = ..., refresh_early: float | None = ...,
        wait: float | None = ...,
    ) -> T: ...  # fmt: skip

    @overload
    async def get_or_set(
        self, key: Key, function: Callable[[], T], *, expire: float | None = ..., tag: Key = ...,
        meta: Any = ..., stale: float | None = ..., refresh_early: float | None = ...,
        wait: float | None = ...,
    ) -> T: ...  # fmt: skip

    async def get_or_set(
        self, key: Key, function: Callable[[], Any], *, expire: float | None = None, tag: Key = None,
        meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
    ) -> Any:  # fmt: skip
        """As `DiskCache.get_or_set`. `function` may be a coroutine function, which this task awaits, or a
        plain one, which a thread of its own calls; what that returns is awaited if it can be.

        If the task is cancelled, the turn passes to another one, unless a thread computes: that goes on, for
        those who wait, and the result is stored.
        """
        try:
            value = await self.get(key, _MISSING)
            if value is not _MISSING and refresh_early is None and (stale is None or expire is not None):
                return value
            once = self._once
            terms = once.terms(expire, tag, meta, stale, refresh_early, wait)
            if value is _MISSING:
                return await once.compute(key, function, terms)
            await once.keep_fresh(key, function, terms)
            return value
        except BaseException as error:  # as `guarded` does, without a coroutine
            tell(error, self)
            raise

    @guarded
    def lock(self, key: Key, *, wait: float | None = None) -> AsyncKeyLock:
        """As `DiskCache.lock`, for tasks: ``async with cache.lock(key):``. Its release() is not awaited."""
        return self._key_lock(key, 1, wait, True)

    @guarded
    def semaphore(self, key: Key, n: int, *, wait: float | None = None) -> AsyncKeyLock:
        """As `DiskCache.semaphore`, for tasks."""
        return self._key_lock(key, n, wait, False)

    def _key_lock(self, key: Key, n: int, wait: float | None, is_lock: bool) -> AsyncKeyLock:
        if self._closed:
            raise self._closed_error()
        self._ensure_writable("lock a key")
        kind: type[AsyncKeyLock] = late("computing.aio_key_lock").AsyncKeyLock
        return kind(self, key, n, wait, is_lock=is_lock)

    @guarded
    def throttle(
        self, count: int, seconds: float, *, name: str | None = None
    ) -> Callable[[Callable[P, Any]], Callable[P, Coroutine[Any, Any, Any]]]:
        """As `DiskCache.throttle`. A plain function becomes a coroutine function, and a thread calls it."""
        self._ensure_writable("count calls")
        throttling, tasks = late("computing.throttling"), late("computing.aio_throttling")

        def decorate(function: Callable[P, Any]) -> Callable[P, Coroutine[Any, Any, Any]]:
            rate = throttling.rate_of(function, count, seconds, name)
            is_plain = not late("computing.ways").is_async(function)

            async def reserve() -> Turn:
                return await self._reserve(rate)

            throttled: Callable[P, Coroutine[Any, Any, Any]] = tasks.throttled(
                function, reserve, self._put_off, self._give_turn_back, is_plain=is_plain
            )
            return throttled

        throttling.check(count, seconds, name)
        return decorate

    @guarded
    async def _reserve(self, rate: Rate) -> Turn:
        turn: Turn = await self._change("_reserve", rate)
        return turn

    @guarded
    async def _put_off(self, turn: Turn) -> None:
        await self._change("_put_off", turn)

    @guarded
    async def _give_turn_back(self, turn: Turn) -> None:
        await self._change("_give_turn_back", turn)

    def _ensure_writable(self, doing: str) -> None:
        if self._settings.read_only:
            line = f"cannot {doing}: the cache in {self.directory!r} was opened with read_only=True"
            raise ReadOnlyError(line)

    def _sync(self) -> DiskCache:
        if self._cache is None:
            raise self._not_open()
        return self._cache

    def _not_open(self) -> ClosedError:
        return ClosedError("the cache is not open yet: use `async with`, or await an operation first")

    @guarded
    def __contains__(self, key: Key) -> bool:
        """As in `DiskCache`: looks at the index, and at the stored key, which is in memory as a rule. Others
        are not waited for."""
        return key in self._sync()

    @guarded
    def __len__(self) -> int:
        """As in `DiskCache`: does not block."""
        return len(self._sync())

    def __bool__(self) -> bool:
        return True

    # -- many entries -------------------------------------------------------------------------

    @guarded
    async def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """As `DiskCache.get_many`; what is not in memory is read all at once."""
        desk = self._desk or await self._opened()
        state, store, wanted = self._loop(desk), desk.store, await self._listed(keys)
        refuse_equal(wanted)
        found: list[Any] = [None] * len(wanted)  # as from the core
        cold: list[tuple[int, Slot, bytes]] = []
        done = state.track(state.loop.create_future())  # what closes the cache waits for all of it
        try:
            for i, key in enumerate(wanted):
                found[i] = store.core.get_nowait(key, time.time_ns())
                if found[i] is NotImplemented:
                    low, high, data = desk.identify(key)
                    slot = store.finding.lookup(low, high)
                    found[i] = None if slot is None else store.reading.get_nowait(slot, data)
                    if slot is None:
                        store.counters.use(False)
                    elif found[i] is None:
                        cold.append((i, slot, data))
                self._in_place += 1
                if self._in_place >= _YIELD_EVERY:
                    await self._yield()
            read = await asyncio.gather(*[self._get_cold(state, store, slot, data) for _, slot, data in cold])
        finally:
            done.set_result(None)
        for (i, _, _), hit in zip(cold, read, strict=True):
            found[i] = hit
        return desk.decoded(wanted, found)

    @guarded
    async def set_many(
        self, items: Mapping[Key, Any] | Iterable[tuple[Key, Any]], expire: float | None = None,
        tag: Key = None, meta: Any = None,
    ) -> int:  # fmt: skip
        """As `DiskCache.set_many`."""
        if type(items) in (dict, list, tuple):
            stored: int = await self._change("set_many", items, expire, tag, meta)
            return stored
        state, source = self._loop(await self._opened()), Source(pairs_of(items))
        return await state.run_aside(source, self._sync().set_many, iter(source), expire, tag, meta)

    async def update(
        self, items: Mapping[Key, Any] | Iterable[tuple[Key, Any]] = (), *, expire: float | None = None,
        tag: Key = None, meta: Any = None,
    ) -> None:  # fmt: skip
        """As `DiskCache.update`."""
        await self.set_many(items, expire, tag, meta)

    @guarded
    async def delete_many(self, keys: Iterable[Key]) -> int:
        """As `DiskCache.delete_many`."""
        deleted: int = await self._change("delete_many", await self._listed(keys))
        return deleted

    async def _listed(self, keys: Iterable[Key]) -> list[Key]:
        """A generator may wait for anything: it is gone through in a thread of its own."""
        if not isinstance(keys, Iterator):
            return listed(keys)
        source = Source(keys)
        return await self._loop(await self._opened()).run_aside(source, listed, iter(source))

    def __aiter__(self) -> AsyncIterator[Key]:
        """As ``iter(DiskCache)``."""
        return self._walk(lambda cache: iter(cache))

    def keys(self) -> AsyncIterator[Key]:
        """``aiter(cache)``."""
        return self.__aiter__()

    @guarded
    async def items(self) -> AsyncIterator[tuple[Key, Any]]:
        """As `DiskCache.items`."""
        desk = await self._opened()
        async for batch in self._walk(lambda cache: cache._contents(), 1):
            for content in batch:
                found = content.now() or await self._run(content.renewed)
                if found is not None and (item := desk.pair(content, found)) is not None:
                    yield item

    async def values(self) -> AsyncIterator[Any]:
        """As `DiskCache.values`."""
        async for _, value in self.items():
            yield value

    @guarded
    async def entries(self, prefix: Prefix | None = None, tag: Key = None) -> AsyncIterator[AsyncEntry]:
        """As `DiskCache.entries`; values are awaited."""
        async for entry in self._walk(lambda cache: cache.entries(prefix, tag)):
            yield AsyncEntry(entry, self._run_for_others)

    @guarded
    async def _walk(
        self, begin: Callable[[DiskCache], Iterator[T]], most: int = _WALK_BATCH
    ) -> AsyncIterator[T]:
        """What an iterator of the synchronous cache gives, of which it is asked for `most` at once."""
        await self._opened()
        iterator = begin(self._sync())
        while batch := await self._run(lambda: list(islice(iterator, most))):
            for item in batch:
                yield item

    @guarded
    async def evict(self, tag: Key) -> int:
        """As `DiskCache.evict`."""
        removed: int = await self._change("evict", tag)
        return removed

    @guarded
    async def delete_prefix(self, prefix: Prefix) -> int:
        """As `DiskCache.delete_prefix`."""
        removed: int = await self._change("delete_prefix", prefix)
        return removed

    @guarded
    async def expire(self) -> int:
        """As `DiskCache.expire`."""
        removed: int = await self._change("expire")
        return removed

    @guarded
    async def cull(self) -> int:
        """As `DiskCache.cull`."""
        removed: int = await self._change("cull")
        return removed

    @guarded
    async def clear(self) -> int:
        """As `DiskCache.clear`."""
        removed: int = await self._change("clear")
        return removed

    # -- large values and metadata ------------------------------------------------------------

    @guarded
    async def get_entry(self, key: Key) -> AsyncEntry | None:
        """As `DiskCache.get_entry`; its value is awaited."""
        entry = await self._call("get_entry", key)
        return None if entry is None else AsyncEntry(entry, self._run_for_others)

    @guarded
    async def open(self, key: Key) -> AsyncValueReader:
        """As `DiskCache.open`, with awaited methods."""
        return AsyncValueReader(await self._resource("open", key), self._run_for_others)

    @guarded
    async def location(self, key: Key, offset: int = 0, length: int | None = None) -> Location:
        """As `DiskCache.location`."""
        location: Location = await self._resource("location", key, offset, length)
        return location

    @guarded
    async def view(self, key: Key) -> Any:
        """As `DiskCache.view`."""
        return await self._call("view", key)

    async def _resource(self, name: str, *args: Any) -> Any:
        """A call whose result must be closed, also when nobody waits for it any more."""
        state = self._loop(await self._opened())
        async with state.turns:
            future = state.run(getattr(self._sync(), name), *args)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                future.add_done_callback(_close_result)
                raise

    # -- functions ----------------------------------------------------------------------------

    @overload
    def memoize(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncMemoized[P, T]: ...

    @overload
    def memoize(self, function: Callable[P, T], /) -> AsyncMemoized[P, T]: ...

    @overload
    def memoize(
        self, function: None = None, /, *, name: str | None = None, expire: float | None = None,
        tag: Key = None, meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
        key: Callable[..., Key] | None = None, ignore: Iterable[str | int] = (), typed: bool = False,
        version: Key = None, condition: Callable[[Any], bool] | None = None,
    ) -> AsyncMemoizing: ...  # fmt: skip

    def memoize(
        self, function: Any = None, /, *, name: str | None = None, expire: float | None = None,
        tag: Key = None, meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
        key: Callable[..., Key] | None = None, ignore: Iterable[str | int] = (), typed: bool = False,
        version: Key = None, condition: Callable[[Any], bool] | None = None,
    ) -> Any:  # fmt: skip
        """As `DiskCache.memoize`, of a coroutine function. Another function becomes one, and runs in a
        thread.

        Its `invalidate` and `cache_clear` are awaited; `cache_key` is not.
        """
        decorate = late("computing.memoize").AsyncMemoizing(
            self, name=name, expire=expire, tag=tag, meta=meta, stale=stale, refresh_early=refresh_early,
            wait=wait, key=key, ignore=ignore, typed=typed, version=version, condition=condition,
        )  # fmt: skip
        return decorate if function is None else decorate(function)

    # -- the cache as a whole -----------------------------------------------------------------

    @guarded
    async def volume(self) -> int:
        """As `DiskCache.volume`."""
        size: int = await self._call("volume")
        return size

    @guarded
    async def flush(self) -> None:
        """As `DiskCache.flush`."""
        await self._call("flush")

    @guarded
    async def check(
        self, fix: bool = False, drop_unreadable: bool = False, *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Problem]:  # fmt: skip
        """As `DiskCache.check`. `progress` is called in a thread other than the loop's."""
        call = self._change if fix else self._call
        problems: list[Problem] = await call("check", fix, drop_unreadable, progress=progress)
        return problems

    @guarded
    async def stats(self) -> CacheStats:
        """As `DiskCache.stats`."""
        stats: CacheStats = await self._call("stats")
        return stats


def _reopen(kind: type[AsyncDiskCache], directory: str, options: dict[str, Any]) -> AsyncDiskCache:
    with Desk.reopening():
        return kind(directory, **options)


def _close_result(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _renew_after_fork() -> None:
    for cache in list(_caches):
        cache._after_fork()


forks.register(_renew_after_fork)
