"""Batches of a calling thread: on rings that are lent to one thread at a time.

A lent ring belongs to no thread, so it outlives whichever made it, and no ring is lost when a
thread ends. (That gives up SINGLE_ISSUER, which measures the same here: a batch is one call.)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..concurrency.interruption import suppressing
from ..concurrency.locks import new_lock
from .base import ReadRequest
from .buffers import Buffer, BufferPool
from .ring import Ring, Rings, address_of, ffi, keep_for_ever, lib, pool_for

_MOST_RINGS = 8  # more threads than this at once make ordinary calls
_CHUNK_BYTES = 256 << 10
_CHUNKS = 8
ARENA_BYTES = _CHUNKS * _CHUNK_BYTES
_COPIED_BYTES = 64 << 10  # longer values are read straight into their place instead of being copied
_ALIGN = 4096  # for O_DIRECT; no file system in use asks for more
_DRAIN_SECONDS = 30.0


class LentRing:
    """A ring and its memory, which is used as a whole by a batch, or in chunks by one value."""

    def __init__(self, rings: Rings, ring: Ring, chunks: BufferPool, registered: bool) -> None:
        self._rings = rings
        self.ring = ring
        self.handle = ring.handle
        self.chunks = chunks
        # Not from_buffer(): that locks the view, which garbage collection of a cycle cannot undo.
        self.memory = ffi.cast("void *", chunks.address)
        self.registered = registered
        self.usable = True
        self._pinned = {threading.get_ident()}
        self._submitted = 0

    def begin(self) -> None:
        """Call it before a batch. Until `settle` the ring counts as lost, whatever happens."""
        self.usable = False
        self._submitted = self.ring.info()["submitted"]

    def settle(self, error: int, results: Sequence[int], count: int, memory: object) -> None:
        """Call it after a batch of `count` operations into `memory`. Sets whether the ring is still usable.

        OSError: nothing was done.
        """
        if error or min(results, default=0) < 0:
            info = self.ring.info()
            if info["broken"]:
                keep_for_ever(memory)
            if error or info["broken"] or info["submitted"] < self._submitted + count:
                self._rings.failed(-(error or min(results)))
                if error:
                    raise OSError(-error, os.strerror(-error))
                return
        self.usable = True

    def pin_workers(self) -> None:
        """The kernel keeps workers for each thread, so each thread that has the ring pins its own."""
        thread = threading.get_ident()
        if thread not in self._pinned:
            self._pinned.add(thread)
            with suppressing(OSError):
                self.ring.try_out()  # makes the thread known to the kernel as a user of the ring
                self.ring.pin_workers()


class Lender:
    """The rings for batches of one backend."""

    def __init__(self, rings: Rings, first: Ring, pins: bool) -> None:
        """`pins`: the settings say where the kernel's workers may run."""
        self._rings = rings
        self._pins = pins
        self._begin()
        self._made = 1
        self._idle.append(self._equip(first))

    def _begin(self) -> None:
        self._returned = threading.Condition(new_lock())
        self._idle: list[LentRing] = []
        self._made = 0
        self._closed = False

    def _equip(self, ring: Ring) -> LentRing:
        chunks = pool_for(_CHUNK_BYTES, _CHUNKS)
        return LentRing(self._rings, ring, chunks, self._rings.opened(ring, chunks))

    @contextlib.contextmanager
    def lend(self) -> Iterator[LentRing | None]:
        """A ring for the calling thread alone; None if there is none for it."""
        lent = self._take()
        try:
            if lent is not None and self._pins:
                lent.pin_workers()
            yield lent
        finally:
            if lent is not None:
                self._give_back(lent)

    def _take(self) -> LentRing | None:
        with self._returned:
            if self._idle:
                return self._idle.pop()
            if self._closed or self._made >= _MOST_RINGS:
                return None
            self._made += 1
        ring = self._rings.make(one_thread=False)
        if ring is None:
            with self._returned:
                self._made -= 1
            return None
        return self._equip(ring)

    def _give_back(self, lent: LentRing) -> None:
        with self._returned:
            if lent.usable and not self._closed:
                self._idle.append(lent)
                return
            self._made -= 1
            self._returned.notify_all()
        self._retire(lent)

    def _retire(self, lent: LentRing) -> None:
        if not lent.ring.destroy():
            keep_for_ever(lent)
        self._rings.closed(lent.ring, lent.chunks)

    def close(self, seconds: float = _DRAIN_SECONDS) -> None:
        """Free all rings; lent ones as soon as they come back."""
        with self._returned:
            self._closed = True
            idle, self._idle = self._idle, []
            self._made -= len(idle)
            self._returned.wait_for(lambda: self._made <= 0, seconds)
        for lent in idle:
            self._retire(lent)

    def after_fork(self) -> None:
        """In a child, which begins without rings. `Rings` has let go of the parent's."""
        self._begin()


# -- many short reads -------------------------------------------------------------------------


def read_batch(lent: LentRing, requests: Sequence[ReadRequest]) -> list[bytes | int]:
    """Bytes, or an errno, for each request. None is empty.

    OSError: the ring has done nothing.
    """
    results: list[bytes | int] = []
    start = used = 0
    for i, (_, length, _) in enumerate(requests):
        need = length if length <= _COPIED_BYTES else 0
        if used + need > ARENA_BYTES:
            results += _read_portion(lent, requests[start:i])
            start, used = i, 0
        used += need
    return results + _read_portion(lent, requests[start:])


def _read_portion(lent: LentRing, requests: Sequence[ReadRequest]) -> list[bytes | int]:
    fds, lengths, offsets = zip(*requests, strict=True)
    short = [length if length <= _COPIED_BYTES else 0 for length in lengths]
    places = list(accumulate(short, initial=0))
    own = {i: bytes(length) for i, length in enumerate(lengths) if length > _COPIED_BYTES}
    addresses = array("Q", [lent.chunks.address + place for place in places[:-1]])
    for i, memory in own.items():
        addresses[i] = address_of(memory)
    results = array("q", bytes(8 * len(requests)))
    lent.begin()
    error = lib.yr_read_batch(
        lent.handle,
        len(requests),
        ffi.from_buffer("int32_t[]", array("i", fds)),
        ffi.from_buffer("uint64_t[]", addresses),
        ffi.from_buffer("uint64_t[]", array("Q", lengths)),
        ffi.from_buffer("uint64_t[]", array("Q", offsets)),
        ffi.from_buffer("int64_t[]", results),
        0 if lent.registered and not own else -1,
    )
    lent.settle(error, results, len(requests), own)
    view = lent.chunks.view
    try:
        if own or min(results) < 0:
            return [
                -result if result < 0 else own[i][:result] if i in own else bytes(view[at : at + result])
                for i, (result, at) in enumerate(zip(results, places, strict=False))
            ]
        return [view[at : at + result].tobytes() for result, at in zip(results, places, strict=False)]
    finally:
        if lent.usable:
            lib.yr_wipe(lent.memory, places[-1])


# -- several syncs ------------------------------------------------------------------------------


def sync_batch(lent: LentRing, fds: Sequence[int]) -> dict[int, int]:
    """Make different files durable at the same time. The errno of each one that failed.

    OSError: the ring has done nothing.
    """
    files, results = array("i", fds), array("q", bytes(8 * len(fds)))
    lent.begin()
    error = lib.yr_sync_batch(
        lent.handle,
        len(files),
        ffi.from_buffer("int32_t[]", files),
        ffi.from_buffer("int64_t[]", results),
    )
    lent.settle(error, results, len(files), None)
    return {fd: -result for fd, result in zip(files, results, strict=True) if result < 0}


# -- one long read ------------------------------------------------------------------------------


class DirectRead:
    """A value that is not in memory, read past the page cache, many chunks at once.

    Each chunk is copied to its place while others are under way.
    """

    def __init__(self, lent: LentRing, fd: int, length: int, offset: int) -> None:
        """`fd` is open with O_DIRECT. All of the range is within the file."""
        self._lent = lent
        self._fd = fd
        self._offset = offset
        self._length = length
        start = offset // _ALIGN * _ALIGN
        self._todo = deque(range(start, offset + length, _CHUNK_BYTES))
        self._running: dict[int, Buffer] = {}
        self._free: list[Buffer] = []  # wiped only once, at the end
        self._window = min(_CHUNKS, lent.ring.most)
        self._numbers = ffi.new("uint64_t[]", _CHUNKS)
        self._results = ffi.new("int32_t[]", _CHUNKS)

    def run(self) -> bytes | None:
        """The bytes; None if something went wrong, and an ordinary read has to tell what."""
        self._lent.usable = False
        try:
            going_on = self._queue()
            # Made while the disk is at work. It is written to before anybody else sees it, which
            # saves a copy of the whole value.
            target = bytes(self._length)
            self._into = ffi.from_buffer(target)
            while going_on and self._running:
                going_on = self._take(max(1, len(self._running) // 4)) and self._queue()
            return target if going_on else None
        finally:
            self._drain()

    def _queue(self) -> bool:
        """Start as many chunks as there are buffers for."""
        room = self._window - len(self._running)
        starts = [self._todo.popleft() for _ in range(min(len(self._todo), room))]
        if not starts:
            return True
        for start in starts:
            self._running[start] = self._free.pop() if self._free else self._lent.chunks.acquire()
        end = -(-(self._offset + self._length) // _ALIGN) * _ALIGN
        lengths = [min(_CHUNK_BYTES, end - start) for start in starts]
        addresses = [self._running[start].address for start in starts]
        flags = bytes([lib.YR_FIXED_BUFFER if self._lent.registered else 0]) * len(starts)
        queued = lib.yr_queue_reads(
            self._lent.handle, len(starts), [self._fd] * len(starts), addresses, lengths, starts, starts,
            ffi.from_buffer("uint8_t[]", flags), ffi.NULL,
        )  # fmt: skip
        for start in starts[max(queued, 0) :]:  # never seen by the kernel
            self._free.append(self._running.pop(start))
        return bool(queued == len(starts))

    def _take(self, count: int) -> bool:
        """Wait for completions and copy what they bring. False if one is not as it should be."""
        if lib.yr_wait(self._lent.handle, count, -1) < 0:
            return False
        found = lib.yr_reap(self._lent.handle, _CHUNKS, self._numbers, self._results)
        if found < 0:
            return False
        results = ffi.unpack(self._results, found)
        whole = True
        for start, result in zip(ffi.unpack(self._numbers, found), results, strict=True):
            whole = self._copy(self._running[start], start, result) and whole
            self._free.append(self._running.pop(start))
        return whole

    def _copy(self, buffer: Buffer, start: int, result: int) -> bool:
        first = max(start, self._offset)
        last = min(start + _CHUNK_BYTES, self._offset + self._length)
        if result < last - start:
            return False
        part = buffer.view[first - start : last - start]
        ffi.memmove(self._into + (first - self._offset), part, len(part))
        return True

    def _drain(self) -> None:
        """Also after an exception: nothing may be under way when the memory is used again."""
        limit = time.monotonic() + _DRAIN_SECONDS
        while self._lent.ring.info()["inflight"]:
            if time.monotonic() > limit:
                return  # give the ring up, with its memory
            lib.yr_wait(self._lent.handle, _CHUNKS, 50_000_000)
            lib.yr_reap(self._lent.handle, _CHUNKS, self._numbers, self._results)
        for buffer in (*self._running.values(), *self._free):
            self._lent.chunks.release(buffer)
        self._lent.usable = True
