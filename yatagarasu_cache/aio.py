"""`AsyncDiskCache`: the same cache for asyncio, with the same names.

A hit whose bytes are in memory completes without leaving the task. Everything else goes through
the backend's channel: cold reads, which a ring takes many at a time, and puts in batches that
share their write, their lock and their sync. Operations beyond `max_in_flight` wait for their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from . import config
from .backends.base import Buffer, Channel
from .cache import (
    DiskCache,
    _settings,
    as_stream,
    check_items,
    check_length,
    configured,
    listed,
    stream_length,
)
from .codec import KIND_BYTES, Key, Prefix, encode_key, refuse_equal
from .concurrency import forks
from .concurrency.cancelling import Call, GivenUp, ensure_wanted, give_up
from .concurrency.interruption import ours, started
from .concurrency.locks import new_lock
from .config import Settings
from .entry import Entry, Location
from .errors import CacheIOError, ClosedError, LockTimeout, from_os_error
from .guard import callers, guarded, tell
from .stats import CacheStats
from .store.check import Problem
from .store.format import CODEC_FLAGS, Slot, key_digest
from .store.item import Item
from .store.large import CHUNK_BYTES
from .store.reading import Found
from .store.store import Store

__all__ = ["AsyncDiskCache", "AsyncEntry", "AsyncValueReader"]

T = TypeVar("T")
_Put = tuple[Item, asyncio.Future[None]]
_Outcome = tuple[BaseException | None, asyncio.Future[None]]
_YIELD_EVERY = 64  # hits in place after which other tasks get a turn
_WALK_BATCH = 256  # keys fetched by one call while iterating
_BATCH_ITEMS = 512  # puts in one batch
_STREAMS = 256  # files and iterators of a loop that are read at once, each in a thread of its own
_MISSING: Any = object()
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
            expires=entry.expires, accessed=entry.accessed, load=entry._load,
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
            await asyncio.shield(_in_thread(self._file.close, "yatagarasu-closing"))
        else:
            self._file.close()

    async def __aenter__(self) -> AsyncValueReader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read(CHUNK_BYTES):
            yield chunk


class _Turns:
    """At most `bound` operations at once; the others enter in order of arrival.

    A semaphore whose way in is no coroutine: ``async with``, or, where each call counts,
    ``if not turns.enter(): await turns.wait()`` and `leave`.
    """

    def __init__(self, bound: int) -> None:
        self._bound = self._free = bound
        self._forsaken = 0  # that nobody waits for any more
        self._waiting: deque[asyncio.Future[None]] = deque()  # empty while there is room
        self._all_left: asyncio.Future[None] | None = None

    def enter(self) -> bool:
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """For a turn that somebody leaves."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            self._look()
            raise

    def leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
        self._look()

    def forsake(self) -> None:
        """Somebody will leave whenever a stranger lets him: he is not waited for."""
        self._forsaken += 1
        self._look()

    def leave_forsaken(self) -> None:
        self._forsaken -= 1
        self.leave()

    @property
    def _empty(self) -> bool:
        return self._free + self._forsaken == self._bound and all(turn.done() for turn in self._waiting)

    def _look(self) -> None:
        if self._all_left is not None and self._empty and not self._all_left.done():
            self._all_left.set_result(None)

    async def drain(self) -> None:
        """Until nobody has a turn, or waits for one."""
        if not self._empty:
            if self._all_left is None or self._all_left.done():
                self._all_left = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._all_left)

    async def __aenter__(self) -> None:
        if not self.enter():
            await self.wait()

    async def __aexit__(self, *_: object) -> None:
        self.leave()


class _Loop:
    """What belongs to one event loop: its channel, its bound on operations, its puts to come."""

    def __init__(self, cache: DiskCache, loop: asyncio.AbstractEventLoop, bound: int) -> None:
        self.loop = loop
        self._cache = cache  # not collected, and so not closed, while anything is under way
        self._shared = cache._lease.shared
        self.channel: Channel = self._shared.join(loop)
        self.turns = _Turns(bound)
        # Apart, and in threads of their own: what a stranger's file or iterator waits for, perhaps for ever,
        # is nobody else's business, and an asynchronous one may itself need turns and workers.
        self.streams = _Turns(min(_STREAMS, bound))
        self.running: set[asyncio.Future[Any]] = set()
        self._working: set[Call] = set()
        self._store = cache._store
        self._puts: list[_Put] = []
        self._putting = False
        self._batch: tuple[Call, list[_Put]] | None = None  # that is under way

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """`function(*args)`, which changes nothing: nobody waits for it once the future is cancelled."""
        return self.track(self.channel.run(self._work, Call(), function, *args))

    async def change(self, function: Callable[..., T], *args: Any) -> T:
        """The same of one that changes something: once this is over, so is that, also if it is cancelled."""
        call = Call()
        try:
            return await self.track(self.channel.run(self._work, call, function, *args))
        except asyncio.CancelledError:
            if not call.cancel():  # it has begun
                await self._settled(call)
            raise

    def _work(self, call: Call, function: Callable[..., T], *args: Any) -> T:
        """In a worker thread, which goes on when the future is cancelled: `drain` waits for it."""
        self._working.add(call)
        try:
            return call.work(function, *args)
        finally:
            self._working.discard(call)

    async def _settled(self, call: Call) -> None:
        """Ask a call to end, and wait until nothing more of it takes effect.

        It comes up to that by itself: who waits here, because he was cancelled, cannot be hurried.
        """
        settled = self._happening(call.ask)
        while not settled.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({settled})

    def _happening(self, have_called: Callable[[Callable[[], None]], None]) -> asyncio.Future[None]:
        """A future that is done when what is given to `have_called` is called, in whichever thread."""
        future: asyncio.Future[None] = self.loop.create_future()

        def complete() -> None:
            if not future.done():
                future.set_result(None)

        def called() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(complete)

        have_called(called)
        return future

    async def run_aside(self, source: _Source | _Pull, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, which reads `source`, in a thread of its own.

        Once it is cancelled nothing more is asked of the source, and what that does not come back with is
        not waited for: it will not be stored. Otherwise as `change`.
        """
        call = Call()
        if not self.streams.enter():
            await self.streams.wait()
        try:
            done = _in_thread(lambda: call.work(function, *args), "yatagarasu-stream", self._left)
        except BaseException:
            self.streams.leave()
            raise
        try:
            await asyncio.wait({done})
        except asyncio.CancelledError:
            if not source.stop():
                await self._settled(call)
            elif not done.done():
                done.cancel()  # nobody waits for it
                self.streams.forsake()
            raise
        result: T = done.result()
        return result

    def _left(self, done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            self.streams.leave_forsaken()
        else:
            self.streams.leave()
            done.exception()  # seen, or asyncio complains where nobody waits any more

    def track(self, future: asyncio.Future[T]) -> asyncio.Future[T]:
        self.running.add(future)
        future.add_done_callback(self._over)
        return future

    def _over(self, future: asyncio.Future[Any]) -> None:
        self.running.discard(future)
        if not future.cancelled():
            future.exception()  # seen, or asyncio complains where nobody waits any more

    def put(self, item: Item) -> asyncio.Future[None]:
        """Store `item` together with all others that are asked for in this turn of the loop."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._puts.append((item, future))
        if not self._putting:
            self._putting = True
            self.loop.call_soon(self._put_next)
        return future

    async def put_settled(self, future: asyncio.Future[None]) -> None:
        """After what `put` gave was cancelled: until nothing more of that takes effect."""
        if self._batch is not None:
            call, puts = self._batch
            # One that has not begun leaves out what was cancelled.
            if call.is_running and any(future is one for _, one in puts):
                await self._settled(call)

    def _put_next(self) -> None:
        puts = [put for put in self._puts[:_BATCH_ITEMS] if not put[1].cancelled()]
        del self._puts[:_BATCH_ITEMS]
        if not puts:
            self._putting = bool(self._puts)
            if self._puts:
                self.loop.call_soon(self._put_next)
            return
        call = Call()
        try:
            done = self.track(self.channel.run(call.work, self._put_batch, call, puts))
        except Exception as error:  # the pool is closed
            self._deliver([(error, future) for _, future in puts])
            return
        self._batch = call, puts
        done.add_done_callback(lambda done: self._batch_done(done, puts))

    def _put_batch(self, call: Call, puts: list[_Put]) -> list[_Outcome]:
        """In a worker thread: all at once, or, if that fails, each by itself to say which failed.

        Without those that are cancelled, also while it waits for a lock: it begins anew with the others.
        """
        outcomes: list[_Outcome] = []
        alone = 0  # of the next ones, so many could not be stored together
        while True:
            call.go_on()  # before it is seen who is left
            puts = [put for put in puts if not put[1].cancelled()]
            if not puts:
                return outcomes
            part = next(self._store.writing.batches([item for item, _ in (puts[:1] if alone else puts)]))
            again: Sequence[int] = ()
            error: BaseException | None = None
            try:
                ensure_wanted()
                if alone:
                    self._store.writing.put_batch(part)
                else:
                    again = self._store.writing.put_at_once(part)
            except GivenUp:
                continue
            except Exception as failure:
                error = failure
                if len(part) > 1 and not isinstance(error, LockTimeout):
                    again = range(len(part))
            outcomes += [(error, future) for n, (_, future) in enumerate(puts[: len(part)]) if n not in again]
            alone = max(alone - 1, 0) + len(again)
            # What was stored is not to be stored once more.
            puts = [puts[n] for n in again] + puts[len(part) :]

    def _batch_done(self, done: asyncio.Future[list[_Outcome]], puts: list[_Put]) -> None:
        self._batch = None
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        self._deliver([(error, future) for _, future in puts] if error else done.result())

    def _deliver(self, outcomes: list[_Outcome]) -> None:
        for error, future in outcomes:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
        self._put_next()

    async def drain(self) -> None:
        await self.streams.drain()
        await self.turns.drain()
        while self.running:  # nobody waits for these any more
            await asyncio.wait(set(self.running))
        if ends := [self._happening(call.at_end) for call in list(self._working)]:
            await asyncio.wait(ends)
        self._shared.leave(self.loop)


def _nothing(done: asyncio.Future[Any]) -> None:
    pass


def _in_thread(
    function: Callable[[], T], name: str, ended: Callable[[asyncio.Future[T]], None] = _nothing, *,
    daemon: bool = True,
) -> asyncio.Future[T]:  # fmt: skip
    """What `function` gives in a thread of its own, which goes on if the future is cancelled.

    `ended` is called with it in the loop when the thread is through. Not in the loop's executor: others may
    keep all its threads waiting. Where no thread can be started, it is done in place.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)
        ended(future)

    def work() -> None:
        try:
            outcome: Any = function()
            set_outcome: Callable[[Any], None] = future.set_result
        except StopIteration as error:  # which no future can hold
            outcome, set_outcome = RuntimeError(f"StopIteration: {error}"), future.set_exception
        except BaseException as error:
            outcome, set_outcome = error, future.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, set_outcome, outcome)

    if not started(threading.Thread(target=work, name=name, daemon=daemon)):
        work()
    return future


_caches: weakref.WeakSet[AsyncDiskCache] = weakref.WeakSet()


class AsyncDiskCache:
    """`DiskCache` for asyncio: the same options, names and meanings; no call blocks the loop.

    Opened by ``async with`` or by the first operation. Usable from several event loops, each in
    its own thread, at once. Cancelling an operation leaves the old value or the new one, and
    leaks nothing. Once its CancelledError has come up, nothing more of it takes effect: a change that
    is under way on the disk is waited for. What waits for a lock that others have gives up.
    """

    _unpickled = False

    @guarded
    def __init__(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Options as in `DiskCache`, besides: max_in_flight, operations of a loop under way before
        further ones wait (1024). Raises `ConfigurationError`; the rest is raised when it opens.
        """
        self._settings = _settings(directory, options)
        self._cache: DiskCache | None = None
        self._opening: Future[BaseException | None] | None = None  # what came in its way
        self._opening_lock, self._closing_lock = new_lock(), new_lock()
        self._closings: set[asyncio.Task[None]] = set()
        _caches.add(self)
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        self._closed = False
        self._in_place = self._cold = self._skipped = 0

    @classmethod
    @guarded
    def from_config(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> AsyncDiskCache:
        """As `DiskCache.from_config`."""
        settings = configured(source)
        options = config.to_options(settings)
        return cls(options.pop("directory"), **options)

    # -- life ---------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        return self._settings.directory

    @property
    def settings(self) -> Settings:
        """As `DiskCache.settings`; before it is opened, what the caller named, and defaults for the rest."""
        return self._settings if self._cache is None else self._cache.settings

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

    async def _opened(self) -> DiskCache:
        if self._cache is None or self._closed:
            error = await asyncio.shield(asyncio.wrap_future(self._open_once()))
            if error is not None:
                raise error
        return self._sync()

    def _open_once(self) -> Future[BaseException | None]:
        """The opening that all tasks of all loops wait for."""
        with self._opening_lock:
            if self._closed:
                raise self._closed_error()
            opening, first = self._opening, self._opening is None
            if opening is None:
                self._opening = opening = Future()
        if first:
            _in_thread(partial(self._open, opening), "yatagarasu-opening")
        return opening

    def _open(self, opening: Future[BaseException | None]) -> None:
        try:
            self._cache = self._opened_now()
        except BaseException as error:
            with self._opening_lock:
                self._opening = None  # it may be tried again
            opening.set_result(error)
        else:
            opening.set_result(None)

    def _opened_now(self) -> DiskCache:
        cache = DiskCache.__new__(DiskCache)
        cache._unpickled = self._unpickled
        cache._begin(self._settings)
        try:  # now, not in the loop, which would stand still for each part that is on disk only
            cache._store.current.index.fetch()
        except ours(OSError) as error:
            cache.close()
            raise from_os_error(error, "cannot read the index") from error
        return cache

    def _after_fork(self) -> None:
        """In a child, which has none of the threads that were opening or closing it."""
        self._opening_lock, self._closing_lock, self._closings = new_lock(), new_lock(), set()
        if self._opening is not None and not self._opening.done():
            self._opening = None

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the cache in {self.directory!r} is closed: open it anew")

    def _loop(self, cache: DiskCache) -> _Loop:
        if self._closed:
            raise self._closed_error()
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            for old in [known for known in list(self._loops) if known.is_closed()]:
                self._loops.pop(old, None)
            state = self._loops[loop] = _Loop(cache, loop, self._settings.max_in_flight)
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
            closed = _in_thread(self._close, "yatagarasu-closing", daemon=False)
        await closed
        self._loops.clear()

    async def _drain(self) -> None:
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
        options = config.to_options(self._settings)
        return _reopen, (type(self), options.pop("directory"), options)

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

    async def _call(self, name: str, *args: Any) -> Any:
        """A method of the synchronous cache, in a worker thread."""
        cache = await self._opened()
        return await self._run(getattr(cache, name), *args)

    async def _change(self, name: str, *args: Any) -> Any:
        """The same of one that changes something: nothing of it takes effect after this."""
        cache = await self._opened()
        state = self._loop(cache)
        async with state.turns:
            return await state.change(getattr(cache, name), *args)

    # -- one entry ----------------------------------------------------------------------------

    async def get(self, key: Key, default: Any = None) -> Any:
        """As `DiskCache.get`. Does not leave the task if the value is in memory."""
        try:
            cache = self._cache or await self._opened()
            core = cache._store.core
            found: Any = NotImplemented
            looks = self._cold <= COLD or self._tries()
            if looks:
                found = core.get_nowait(key, time.time_ns())
                if self._cold and found is not NotImplemented:
                    self._cold = max(self._cold - _FOUND_COUNTS, 0)
            if found is NotImplemented:
                place = core.place(key, time.time_ns())
                if type(place) is tuple:
                    if looks and self._cold < COLD_MOST and cache._store.backend.prefers_together:
                        self._cold += 1
                    found = await self._get_placed(cache, place)
                else:
                    found = None if place is None else await self._get_ordinary(cache, key)
            self._in_place += 1
            if self._in_place >= _YIELD_EVERY:
                await self._yield()
            if type(found) is bytes:
                return found
            if found is None:
                return default
            payload, flags = found
            return cache._decode(payload, flags & CODEC_FLAGS, key) if flags else payload
        except Exception as error:  # as `guarded` does, without a coroutine
            tell(error, self)
            raise

    async def _yield(self) -> None:
        self._in_place = 0
        await asyncio.sleep(0)

    def _tries(self) -> bool:
        """Whether it is time to look for one of many cold values in memory."""
        self._skipped += 1
        return not self._skipped % COLD_TRIES

    async def _get_ordinary(self, cache: DiskCache, key: Key) -> Any:
        """What the core leaves to others. Counted."""
        store = cache._store
        data = encode_key(key)
        slot = store.finding.lookup(*key_digest(data, store.current.seed))
        if slot is None:
            store.counters.use(False)
            return None
        return store.reading.get_nowait(slot, data) or await self._get_cold(
            self._loop(cache), store, slot, data
        )

    async def _get_placed(self, cache: DiskCache, place: tuple[Any, ...]) -> Any:
        """A plain value that is not in memory. Counted."""
        store, state = cache._store, self._loop(cache)
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

    async def _get_cold(self, state: _Loop, store: Store, slot: Slot, key: bytes) -> Found | None:
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
        length: int | None = None,
    ) -> bool:  # fmt: skip
        """As `DiskCache.set`; `value` may also be an asynchronous iterator of bytes.

        Cancelling it leaves the old value or the new one, and what is there then stays: see the class.
        """
        try:
            cache = self._cache or await self._opened()
            state = self._loop(cache)
            store = cache._store
            store.life.ensure_writable("store an entry")
            pull = _pull(value, state.loop)
            stream = as_stream(value if pull is None else iter(pull), length)
            if stream is None and length is not None:
                check_length(value, length)
            item = cache._item(key, value if stream is None else b"", expire, tag, meta)
            if stream is None:
                if not state.turns.enter():
                    await state.turns.wait()
                future = state.put(item)
                try:
                    await future
                except asyncio.CancelledError:
                    await state.put_settled(future)
                    raise
                finally:
                    state.turns.leave()
                return True
            source = pull or _Source(stream)
            return await state.run_aside(
                source, store.writing.put_stream, item._replace(flags=KIND_BYTES), stream if pull else iter(source),
                stream_length(value, length),
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
    async def incr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """As `DiskCache.incr`."""
        value: int = await self._change("incr", key, delta, default)
        return value

    @guarded
    async def decr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """As `DiskCache.decr`."""
        value: int = await self._change("decr", key, delta, default)
        return value

    @guarded
    async def pop(self, key: Key, default: Any = None) -> Any:
        """As `DiskCache.pop`."""
        return await self._change("pop", key, default)

    @guarded
    async def delete(self, key: Key) -> bool:
        """As `DiskCache.delete`."""
        deleted: bool = await self._change("delete", key)
        return deleted

    def _sync(self) -> DiskCache:
        if self._cache is None:
            raise ClosedError("the cache is not open yet: use `async with`, or await an operation first")
        return self._cache

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
        cache = self._cache or await self._opened()
        state, store, wanted = self._loop(cache), cache._store, await self._listed(keys)
        refuse_equal(wanted)
        found: list[Any] = [None] * len(wanted)  # as from the core
        cold: list[tuple[int, Slot, bytes]] = []
        done = state.track(state.loop.create_future())  # what closes the cache waits for all of it
        try:
            for i, key in enumerate(wanted):
                found[i] = store.core.get_nowait(key, time.time_ns())
                if found[i] is NotImplemented:
                    data = encode_key(key)
                    slot = store.finding.lookup(*key_digest(data, store.current.seed))
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
        return {
            key: hit if type(hit) is bytes else cache._decode(hit[0], hit[1] & CODEC_FLAGS, key)
            for key, hit in zip(wanted, found, strict=True)
            if hit is not None
        }

    @guarded
    async def set_many(
        self, items: Mapping[Key, Any] | Iterable[tuple[Key, Any]], expire: float | None = None,
        tag: Key = None, meta: Any = None,
    ) -> int:  # fmt: skip
        """As `DiskCache.set_many`."""
        if type(items) in (dict, list, tuple):
            stored: int = await self._change("set_many", items, expire, tag, meta)
            return stored
        cache = await self._opened()
        source = _Source(_pairs_of(items))
        return await self._loop(cache).run_aside(source, cache.set_many, iter(source), expire, tag, meta)

    @guarded
    async def delete_many(self, keys: Iterable[Key]) -> int:
        """As `DiskCache.delete_many`."""
        deleted: int = await self._change("delete_many", await self._listed(keys))
        return deleted

    async def _listed(self, keys: Iterable[Key]) -> list[Key]:
        """A generator may wait for anything: it is gone through in a thread of its own."""
        if not isinstance(keys, Iterator):
            return listed(keys)
        source = _Source(keys)
        return await self._loop(await self._opened()).run_aside(source, listed, iter(source))

    def __aiter__(self) -> AsyncIterator[Key]:
        """As ``iter(DiskCache)``."""
        return self._walk(lambda cache: iter(cache))

    def keys(self) -> AsyncIterator[Key]:
        """``aiter(cache)``."""
        return self.__aiter__()

    @guarded
    async def entries(self, prefix: Prefix | None = None, tag: Key = None) -> AsyncIterator[AsyncEntry]:
        """As `DiskCache.entries`; values are awaited."""
        async for entry in self._walk(lambda cache: cache.entries(prefix, tag)):
            yield AsyncEntry(entry, self._run_for_others)

    @guarded
    async def _walk(self, begin: Callable[[DiskCache], Iterator[T]]) -> AsyncIterator[T]:
        iterator = begin(await self._opened())
        while batch := await self._run(lambda: list(islice(iterator, _WALK_BATCH))):
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
    async def location(self, key: Key) -> Location:
        """As `DiskCache.location`."""
        location: Location = await self._resource("location", key)
        return location

    async def _resource(self, name: str, key: Key) -> Any:
        """A call whose result must be closed, also when nobody waits for it any more."""
        cache = await self._opened()
        state = self._loop(cache)
        async with state.turns:
            future = state.run(getattr(cache, name), key)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                future.add_done_callback(_close_result)
                raise

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
    async def check(self, fix: bool = False, drop_unreadable: bool = False) -> list[Problem]:
        """As `DiskCache.check`."""
        call = self._change if fix else self._call
        problems: list[Problem] = await call("check", fix, drop_unreadable)
        return problems

    @guarded
    async def stats(self) -> CacheStats:
        """As `DiskCache.stats`."""
        stats: CacheStats = await self._call("stats")
        return stats


def _reopen(kind: type[AsyncDiskCache], directory: str, options: dict[str, Any]) -> AsyncDiskCache:
    with config.reopening():
        cache = kind(directory, **options)
    cache._unpickled = True
    return cache


def _close_result(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


class _Source:
    """An iterator of a stranger's, who may take any time, seen from a thread that can be told to stop."""

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
        """Ask for nothing more. Whether it is waited for just now, which may have no end."""
        self._stopped = True
        return self._waits


@callers
def _pairs_of(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> Iterator[Any]:
    check_items(items)
    yield from items.items() if isinstance(items, Mapping) else items


class _Pull:
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
        """Ask for nothing more. False: what it waits for is cancelled too."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()
        return False


@callers
def _pull(value: Any, loop: asyncio.AbstractEventLoop) -> _Pull | None:
    return _Pull(value, loop) if isinstance(value, AsyncIterable) else None


def _renew_after_fork() -> None:
    for cache in list(_caches):
        cache._after_fork()


forks.register(_renew_after_fork)
