"""An event loop's reads through a ring of its own.

Reads asked for in one turn of the loop go to the kernel in one call; completions wake the loop
through an eventfd and are all taken at once. Memory is given to the kernel with a read and taken
back with its completion, whatever becomes of the future meanwhile. What a ring cannot do, because
it fails or there is none to be had, the worker threads do.

Short reads, nearly all there are, are kept by `Reads`, which is compiled where it can be. Longer
ones, and short ones that do not come back whole, are kept here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..concurrency.interruption import ours, suppressing
from .buffers import Buffer
from .reads import make_reads
from .ring import PASSING, RING_ERRORS, Ring, Rings, address_of, ffi, keep_for_ever, lib, pool_for
from .threads import ThreadChannel, ThreadsBackend

if TYPE_CHECKING:
    import asyncio


SHORT_BYTES = 4 << 10
MEDIUM_BYTES = 64 << 10
LONG_BYTES = 1 << 20  # what is longer would keep the loop busy: a worker thread reads it
_MEDIUM_KEPT = 16  # medium reads beyond this many at once get memory of their own
# So many new reads are handed over before the turn of the loop ends: the disk need not wait for
# the rest of a long turn. Fewer would cost more system calls and gain nothing.
_EARLY = 32
_TRIES = 16  # of one read that the kernel asks to repeat
_FAILURES = 32  # single reads that the ring itself fails, until it is given up
_STALLS = 10  # 1 ms, 2 ms, ... 512 ms: about a second without being able to submit
_DRAIN_SECONDS = 30.0
_FILES = 256  # places for registered files
_MAX_OFFSET = 1 << 62
_MAX_FD = 1 << 31
# Keeps channels with reads under way: collecting one would free memory that the kernel is filling.
_busy: set[RingChannel] = set()
_MEDIUM = 1  # place of the medium pool in the table of registered buffers; the short one is at 0
# Of yr_queue_reads(): files, addresses, lengths, offsets, numbers, flags, tables.
_COLUMNS = "int32_t *", "uint64_t *", "uint32_t *", "uint64_t *", "uint64_t *", "uint8_t *", "uint16_t *"


class _Read:
    """One read, from being asked for until its completion was taken."""

    __slots__ = (
        "address", "buffer", "done", "fd", "file", "flags", "future", "length", "offset", "own", "table",
        "tries",
    )  # fmt: skip

    def __init__(self, future: asyncio.Future[bytes], fd: int, length: int, offset: int) -> None:
        self.future = future
        self.fd = fd
        self.length = length
        self.offset = offset
        self.done = 0  # bytes read by earlier, short attempts
        self.tries = 0
        self.address = 0  # 0 while it has no memory
        self.buffer: Buffer | None = None
        self.own: bytes | None = None  # instead of a buffer: memory that becomes the result itself
        self.file = fd  # or its place among the registered files
        self.flags = self.table = 0

    def result(self, length: int) -> bytes:
        if self.buffer is not None:
            return self.buffer.view[:length].tobytes()
        assert self.own is not None
        return self.own if length == self.length else self.own[:length]


class _FixedFiles:
    """Descriptors registered with a ring, which saves the kernel looking them up.

    A registered file stays open until its place is emptied, so `forget` must be told of every
    descriptor before it is closed.
    """

    def __init__(self, ring: Ring) -> None:
        self._handle = ring.handle
        error = lib.yr_files_register(self._handle, _FILES)
        if error:
            raise OSError(-error, os.strerror(-error))
        self._places: dict[int, int] = {}
        self._free = list(range(_FILES))
        self._gone: deque[int] = deque()

    def __contains__(self, fd: int) -> bool:
        return fd in self._places

    def place(self, fd: int) -> int | None:
        """Where `fd` is registered; None if the table is full or the kernel does not want it."""
        place = self._places.get(fd)
        if place is None and self._free and lib.yr_files_update(self._handle, self._free[-1], 1, [fd]) == 1:
            place = self._places[fd] = self._free.pop()
        return place

    def forget(self, fd: int) -> None:
        """From any thread: `fd` is about to be closed."""
        self._gone.append(fd)

    def sweep(self) -> None:
        """Empty the places of closed descriptors; to be done before any is looked up."""
        while self._gone:
            place = self._places.pop(self._gone.popleft(), None)
            if place is not None:
                lib.yr_files_update(self._handle, place, 1, [-1])
                self._free.append(place)


class RingChannel(ThreadChannel):
    """`on_close` is told when it is closed."""

    def __init__(
        self, backend: ThreadsBackend, loop: asyncio.AbstractEventLoop, rings: Rings,
        on_close: Callable[[RingChannel], None],
    ) -> None:  # fmt: skip
        super().__init__(backend, loop)
        self._on_close = on_close
        self._rings = rings
        self._ring: Ring | None = None
        self._owner = 0  # the thread whose ring it is
        self._event_fd = -1
        self._waiting: deque[_Read] = deque()
        self._running: dict[int, _Read] = {}
        self._next = 0
        self._limit = 0
        self._scheduled = False
        self._unsubmitted = 0
        self._stalls = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failed = 0
        self._closed = False
        self._files: _FixedFiles | None = None
        self._reads = make_reads()
        self._columns: tuple[Any, ...] = ()

    @property
    def running(self) -> int:
        """Reads that the kernel has."""
        number: int = len(self._running) + self._reads.running
        return number

    # -- asking -----------------------------------------------------------------------------

    def read(self, fd: int, length: int, offset: int) -> asyncio.Future[bytes]:
        if not (0 < length <= LONG_BYTES and 0 <= offset < _MAX_OFFSET and 0 <= fd < _MAX_FD):
            return self.run(self._backend.read, fd, length, offset)
        future: asyncio.Future[bytes] = self._loop.create_future()
        if length <= SHORT_BYTES:
            waiting = self._reads.add(future, fd, length, offset)
        else:
            self._waiting.append(_Read(future, fd, length, offset))
            waiting = len(self._waiting)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        elif waiting == _EARLY:
            self._pump()
        return future

    def _flush(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        """Hand over what there is room for and take what is complete, until there is neither."""
        reads = self._reads
        while self._ring is not None or ((self._waiting or reads.waiting) and self._open()):
            if self._waiting and self.running < self._limit:
                self._queue()
            if reads.waiting and self.running < self._limit:
                self._queue_short()
            if self._unsubmitted:
                self._submit()
            if not self._reap() or not (self._waiting or reads.waiting):
                break
        if self._ring is None:
            self._read_otherwise(self._take_waiting())

    def _take_waiting(self) -> list[_Read]:
        """Without a ring: the reads that have not begun."""
        waiting = [*self._waiting, *(_Read(*read) for read in self._reads.take_all())]
        self._waiting.clear()
        return waiting

    # -- to the kernel ----------------------------------------------------------------------

    def _queue(self) -> None:
        reads = self._admit(self._limit - self.running)
        if not reads or self._ring is None:
            return
        numbers = array("Q", range(self._next, self._next + len(reads)))
        self._next += len(reads)
        self._running.update(zip(numbers, reads, strict=True))
        _busy.add(self)
        memory = ffi.from_buffer
        queued = lib.yr_queue_reads(
            self._ring.handle,
            len(reads),
            memory("int32_t[]", array("i", [read.file for read in reads])),
            memory("uint64_t[]", array("Q", [read.address + read.done for read in reads])),
            memory("uint32_t[]", array("I", [read.length - read.done for read in reads])),
            memory("uint64_t[]", array("Q", [read.offset + read.done for read in reads])),
            memory("uint64_t[]", numbers),
            memory("uint8_t[]", bytes([read.flags for read in reads])),
            memory("uint16_t[]", array("H", [read.table for read in reads])),
        )
        for number in reversed(numbers[max(queued, 0) :]):
            self._waiting.appendleft(self._running.pop(number))
        self._queued(queued)

    def _queue_short(self) -> None:
        count = self._reads.stage(self._limit - self.running)
        if not count or self._ring is None:
            return
        _busy.add(self)
        if self._files is not None:
            self._use_fixed_columns(self._files, count)
        queued: int = lib.yr_queue_reads(self._ring.handle, count, *self._columns)
        if queued < count:
            self._reads.unstage(max(queued, 0))
        self._small.lent(max(queued, 0), self._reads.running)
        self._queued(queued)

    def _queued(self, queued: int) -> None:
        """Handle the ring's answer to reads: how many it has taken, or an errno, negative."""
        self._unsubmitted += max(queued, 0)
        if queued < 0:
            self._abandon(-queued)
        elif not self.running and self._timer is None:
            self._stall(errno.EBUSY)

    def _admit(self, room: int) -> list[_Read]:
        """The next reads, each with memory; those that nobody wants any more are dropped."""
        reads: list[_Read] = []
        waiting = self._waiting
        while waiting and len(reads) < room:
            read = waiting.popleft()
            if read.future.cancelled():
                self._take_back(read)
                continue
            if not read.address:
                self._provide(read)
            reads.append(read)
        if self._files is not None:
            self._use_fixed(self._files, reads)
        return reads

    def _use_fixed(self, files: _FixedFiles, reads: list[_Read]) -> None:
        files.sweep()
        for read in reads:
            place = files.place(read.fd)
            if place is None:
                read.file, read.flags = read.fd, read.flags & ~lib.YR_FIXED_FILE
            else:
                read.file, read.flags = place, read.flags | lib.YR_FIXED_FILE

    def _use_fixed_columns(self, files: _FixedFiles, count: int) -> None:
        """The same for short reads."""
        fds, flags = self._columns[0], self._columns[5]
        files.sweep()
        for row in range(count):
            place = files.place(fds[row])
            flags[row] = self._buffer_flag if place is None else self._buffer_flag | lib.YR_FIXED_FILE
            fds[row] = fds[row] if place is None else place

    def closing_file(self, fd: int) -> None:
        """From any thread: `fd` is about to be closed, so the ring must not hold on to its file."""
        files = self._files
        if files is not None and fd in files:
            files.forget(fd)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._sweep_files)

    def _sweep_files(self) -> None:
        if self._ring is not None and self._files is not None:
            self._files.sweep()

    def _provide(self, read: _Read) -> None:
        if not SHORT_BYTES < read.length <= MEDIUM_BYTES or self._medium.in_use >= _MEDIUM_KEPT:
            # New, and unseen by others until it is complete, so it may be written to; copying this much
            # out of a buffer would cost more than it saves.
            read.own = bytes(read.length)
            read.address = address_of(read.own)
            return
        read.buffer, read.table = self._medium.acquire(), _MEDIUM
        read.address = read.buffer.address
        read.flags = self._buffer_flag if read.buffer.pooled else 0

    def _take_back(self, read: _Read) -> None:
        """Free the read's memory."""
        if read.buffer is not None:
            self._medium.release(read.buffer, read.length)
            read.buffer, read.address = None, 0

    def _submit(self) -> None:
        ring = self._ring
        assert ring is not None
        taken = lib.yr_submit(ring.handle)
        if taken >= 0:
            # A polling thread takes what is queued in its own time; only errors tell something.
            # Queueing submits too when the queue is full, so what is left has to be asked for.
            whole = ring.polled or taken >= self._unsubmitted
            self._unsubmitted = 0 if whole else ring.info()["queued"]
        elif -taken not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
            return self._abandon(-taken)
        if self._unsubmitted <= 0:
            self._unsubmitted = self._stalls = 0
        elif self._timer is None:
            self._stall(-taken if taken < 0 else errno.EBUSY)

    def _stall(self, error: int) -> None:
        """The kernel has no room just now: try again soon, in the end without the ring."""
        if self._stalls >= _STALLS:
            return self._abandon(error)
        self._timer = self._loop.call_later(0.001 * 2**self._stalls, self._try_again)
        self._stalls += 1

    def _try_again(self) -> None:
        self._timer = None
        self._pump()

    # -- from the kernel --------------------------------------------------------------------

    def _reap(self) -> int:
        """Take every completion that is there. Returns how many."""
        if self._ring is None:
            return 0
        found: int = lib.yr_reap(self._ring.handle, self._space, self._numbers, self._results)
        if found < 0:
            self._abandon(-found)
        if found <= 0:
            return 0
        wanted = not self._loop.is_closed()
        for result, *what in self._reads.complete(*self._completions, found, wanted):
            if len(what) == 1:  # one of ours
                read = self._running.pop(what[0], None)
                if read is not None:  # else the ring was given up meanwhile
                    self._complete(read, result)
            elif result >= 0:  # a short one, in part: once more, as one of ours
                self._waiting.append(_Read(*what))
            else:
                self._complete(_Read(*what), result)
        self._small.lent(0, self._reads.running)
        if not self.running:
            _busy.discard(self)
        return found

    def _complete(self, read: _Read, result: int) -> None:
        if result > 0:
            read.done += result
            if read.done == read.length:
                self._end(read, read.result(read.length), None)
            else:
                read.tries = 0
                self._waiting.appendleft(read)
        elif result == 0:  # the file ends here
            self._end(read, read.result(read.done), None)
        elif -result in PASSING and read.tries < _TRIES:
            read.tries += 1
            self._waiting.append(read)
        elif -result in RING_ERRORS:
            self._one_failed(read, -result)
        else:
            self._end(read, None, OSError(-result, os.strerror(-result)))

    def _end(self, read: _Read, data: bytes | None, error: OSError | None) -> None:
        self._take_back(read)
        future = read.future
        if future.done() or self._loop.is_closed():
            return
        if error is not None:
            future.set_exception(error)
        else:
            assert data is not None
            future.set_result(data)

    # -- without the ring -------------------------------------------------------------------

    def _read_otherwise(self, reads: Iterable[_Read]) -> None:
        """Let worker threads do what the ring has not done."""
        for read in reads:
            self._take_back(read)
            future = read.future
            if future.done() or self._loop.is_closed():
                continue
            self._rings.fallbacks += 1
            try:
                other = self.run(self._backend.read, read.fd, read.length, read.offset)
            except RuntimeError as error:  # the worker pool is closed
                future.set_exception(error)
                continue
            other.add_done_callback(partial(_pass_on, future))

    def _one_failed(self, read: _Read, error: int) -> None:
        """The ring failed, not the file. After many such failures the ring is given up."""
        self._failed += 1
        self._take_back(read)
        self._read_otherwise((read,))
        if self._failed == _FAILURES:
            self._abandon(error)

    def _abandon(self, error: int) -> None:
        """The ring is of no use any more: everything under way is read again, without it."""
        if self._ring is not None:
            self._rings.failed(error)
            self._read_otherwise(self._let_go())

    # -- the ring ---------------------------------------------------------------------------

    def _open(self) -> bool:
        """Make a ring for this thread. False if there is none to be had now."""
        ring = None if self._closed else self._rings.make(one_thread=True)
        if ring is None:
            return False
        try:
            event_fd = lib.yr_eventfd(ring.handle)
            if event_fd < 0:
                raise OSError(-event_fd, os.strerror(-event_fd))
            self._loop.add_reader(event_fd, self._pump)
        except ours(OSError, NotImplementedError) as error:
            ring.destroy()
            self._rings.failed(getattr(error, "errno", None) or errno.EOPNOTSUPP)
            return False
        self._ring, self._event_fd, self._owner = ring, event_fd, threading.get_ident()
        # As many as the completion queue holds; fewer would leave the disk idle while a long turn
        # of the loop deals with what is complete.
        self._limit = self._space = ring.most
        self._numbers = ffi.new("uint64_t[]", self._space)
        self._results = ffi.new("int32_t[]", self._space)
        self._completions = [int(ffi.cast("uintptr_t", column)) for column in (self._numbers, self._results)]
        self._small = pool_for(SHORT_BYTES, ring.most)
        self._medium = pool_for(MEDIUM_BYTES, min(ring.most, _MEDIUM_KEPT))
        registered = self._rings.opened(ring, self._small, self._medium)
        self._buffer_flag = lib.YR_FIXED_BUFFER if registered else 0
        columns = self._reads.equip(self._small.address, self._small.stride, ring.most, self._buffer_flag)
        self._columns = tuple(map(ffi.cast, _COLUMNS, columns))
        self._failed = self._unsubmitted = self._stalls = 0
        self._files = None
        if self._rings.settings.use_fixed_files:
            with suppressing(OSError):  # the kernel's own limit on files: read without
                self._files = _FixedFiles(ring)
        return True

    def _let_go(self) -> list[_Read]:
        """Free the ring. Returns the reads that were under way or waiting."""
        ring, self._ring, self._files = self._ring, None, None
        running, self._running = list(self._running.values()), {}
        _busy.discard(self)
        assert ring is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._loop.is_closed():
            self._loop.remove_reader(self._event_fd)
        if not ring.destroy():  # the kernel may still write to it
            keep_for_ever((self._small, self._medium, [(read.buffer, read.own) for read in running]))
            for read in running:
                read.buffer = None
        self._rings.closed(ring, self._small, self._medium)
        return running + [_Read(*read) for read in self._reads.take_all()]

    def close(self) -> None:
        """See `Channel.close`. In another thread than the ring's, what is under way is read again."""
        self._closed = True
        if self._ring is not None and self.is_mine():
            self._drain()
        if self._ring is not None:
            self._read_otherwise(self._let_go())
        self._read_otherwise(self._take_waiting())
        self._on_close(self)

    def _drain(self) -> None:
        """Wait for everything that was asked for. A ring that hangs is given up."""
        limit = time.monotonic() + _DRAIN_SECONDS
        self._pump()
        while self._ring is not None and (self.running or self._waiting or self._reads.waiting):
            if time.monotonic() > limit:
                return self._abandon(errno.ETIME)
            if self._timer is not None:  # the loop may not run any more
                self._timer.cancel()
                self._timer = None
                time.sleep(0.001)
            lib.yr_wait(self._ring.handle, 1, 50_000_000)
            self._pump()

    def is_mine(self) -> bool:
        """Whether the calling thread is the one that may use the ring."""
        return self._owner == threading.get_ident()

    def close_from_outside(self, seconds: float) -> None:
        """`close` for the backend's own closing, in whichever thread that happens."""
        if not self.is_mine() and self._loop.is_running():
            done = threading.Event()

            def close() -> None:
                self.close()
                done.set()

            with contextlib.suppress(RuntimeError):  # closed just now
                self._loop.call_soon_threadsafe(close)
                done.wait(seconds)
                return  # if it has not run yet, it will: nobody else may touch that ring
        self.close()

    def close_at_exit(self) -> None:
        """The interpreter ends: nobody waits any more. A thread that still lives keeps its ring."""
        if self.is_mine():
            self.close()
        elif self._ring is not None and self._owner not in {thread.ident for thread in threading.enumerate()}:
            self._let_go()

    def after_fork(self) -> None:
        """In a child: the loop and its ring are the parent's."""
        ring, self._ring, self._files = self._ring, None, None
        self._running, self._waiting, self._timer = {}, deque(), None
        self._reads = make_reads()
        _busy.discard(self)
        self._scheduled = False
        if ring is not None:
            ring.after_fork()


def _pass_on(future: asyncio.Future[bytes], done: asyncio.Future[bytes]) -> None:
    """Give the outcome of `done` to `future`."""
    if future.done():
        if not done.cancelled():
            done.exception()  # seen, or asyncio complains that nobody looked
    elif done.cancelled():
        future.cancel()
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())
