"""What an event loop needs to use a cache: turns, work in threads, and puts in batches."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .backends.base import Channel
from .concurrency.cancelling import Call, GivenUp, ensure_wanted
from .concurrency.interruption import started
from .errors import LockTimeout
from .store.item import Item

if TYPE_CHECKING:
    from .aio_sources import Pull, Source
    from .desk import Desk

__all__ = ["Loop", "Turns", "in_thread"]

T = TypeVar("T")
_Put = tuple[Item, asyncio.Future[None]]
_Outcome = tuple[BaseException | None, asyncio.Future[None]]
_BATCH_ITEMS = 512  # puts in one batch
_STREAMS = 256  # files and iterators of a loop that are read at once, each in a thread of its own


class Turns:
    """At most `bound` operations at once; the others enter in order of arrival.

    A semaphore that can be entered without a coroutine: ``async with``, or, where each call counts,
    ``if not turns.enter(): await turns.wait()`` and `leave`.
    """

    def __init__(self, bound: int) -> None:
        self._bound = self._free = bound
        self._forsaken = 0  # turns that `drain` does not wait for
        self._waiting: deque[asyncio.Future[None]] = deque()  # empty while there is room
        self._all_left: asyncio.Future[None] | None = None

    def enter(self) -> bool:
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """Wait for a turn that another operation leaves."""
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
        """An operation hangs in the caller's code: `drain` does not wait for its turn any more."""
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
        """Wait until no operation has a turn, or waits for one."""
        if not self._empty:
            if self._all_left is None or self._all_left.done():
                self._all_left = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._all_left)

    async def __aenter__(self) -> None:
        if not self.enter():
            await self.wait()

    async def __aexit__(self, *_: object) -> None:
        self.leave()


class Loop:
    """What belongs to one event loop: its channel, its bound on operations, its puts to come."""

    def __init__(self, desk: Desk, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._desk = desk  # not collected, and so not closed, while anything is under way
        self._shared = desk.lease.shared
        self.channel: Channel = self._shared.join(loop)
        bound = desk.settings.max_in_flight
        self.turns = Turns(bound)
        # Apart, and in threads of their own: a caller's file or iterator may wait for ever, which must not
        # delay others, and an asynchronous one may itself need turns and workers.
        self.streams = Turns(min(_STREAMS, bound))
        self.running: set[asyncio.Future[Any]] = set()
        self._working: set[Call] = set()
        self._store = desk.store
        self._puts: list[_Put] = []
        self._putting = False
        self._batch: tuple[Call, list[_Put]] | None = None  # the one that is under way

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """`function(*args)`, which changes nothing: if the future is cancelled, nobody waits for it."""
        return self.track(self.channel.run(self._work, Call(), function, *args))

    async def change(self, function: Callable[..., T], *args: Any) -> T:
        """The same for one that changes something: it has ended when this ends, also by cancellation."""
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

        Further cancellations don't end the wait.
        """
        settled = self._happening(call.ask)
        while not settled.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({settled})

    def _happening(self, have_called: Callable[[Callable[[], None]], None]) -> asyncio.Future[None]:
        """A future that is done when the callback given to `have_called` is called, in any thread."""
        future: asyncio.Future[None] = self.loop.create_future()

        def complete() -> None:
            if not future.done():
                future.set_result(None)

        def called() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(complete)

        have_called(called)
        return future

    async def run_aside(self, source: Source | Pull, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, which reads `source`, in a thread of its own.

        Once cancelled, it asks nothing more of the source. If the source is just being waited for, that
        wait is abandoned: nothing of it will be stored. Otherwise as `change`.
        """
        call = Call()
        if not self.streams.enter():
            await self.streams.wait()
        try:
            done = in_thread(lambda: call.work(function, *args), "yatagarasu-stream", self._left)
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
        """Store `item` together with all others that are put in this turn of the loop."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._puts.append((item, future))
        if not self._putting:
            self._putting = True
            self.loop.call_soon(self._put_next)
        return future

    async def store(self, item: Item) -> None:
        """`put` as an operation of its own. Once it was cancelled, nothing more of it takes effect."""
        if not self.turns.enter():
            await self.turns.wait()
        future = self.put(item)
        try:
            await future
        except asyncio.CancelledError:
            await self.put_settled(future)
            raise
        finally:
            self.turns.leave()

    async def put_settled(self, future: asyncio.Future[None]) -> None:
        """After the future of a `put` was cancelled: wait until nothing more of that put takes effect."""
        if self._batch is not None:
            call, puts = self._batch
            # A batch that has not begun leaves out what was cancelled.
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

        Leaves out those that are cancelled. If that happens while it waits for a lock, it begins anew with
        the others.
        """
        outcomes: list[_Outcome] = []
        alone = 0  # how many of the next ones could not be stored together
        while True:
            call.go_on()  # before checking which are left
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
        while self.running:  # callers don't wait for these any more
            await asyncio.wait(set(self.running))
        if ends := [self._happening(call.at_end) for call in list(self._working)]:
            await asyncio.wait(ends)
        self._shared.leave(self.loop)


def _nothing(done: asyncio.Future[Any]) -> None:
    pass


def in_thread(
    function: Callable[[], T], name: str, ended: Callable[[asyncio.Future[T]], None] = _nothing, *,
    daemon: bool = True,
) -> asyncio.Future[T]:  # fmt: skip
    """The result of `function` in a thread of its own, which goes on if the future is cancelled.

    `ended` is called with the future, in the loop, when the thread is through. It is not a thread of the
    loop's executor: others may keep all these waiting. Where no thread can be started, it is done in place.
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
