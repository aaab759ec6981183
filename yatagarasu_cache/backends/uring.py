"""The io_uring backend: as the portable one, with rings where many reads are under way at once.

All else stays as it is: one read of bytes in memory and one buffered write cost less as plain calls.
Rings serve batches and long cold reads (`ring_batches`) and the reads of event loops (`ring_channel`).
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..concurrency.interruption import descriptor_of, ours, suppressing
from ..concurrency.locks import new_lock
from ..config import RingSettings, Settings
from ..errors import BackendUnavailable
from .base import Channel, ReadRequest, WriteRequest
from .ring import BATCH_ERRORS, Ring, Rings, check_kernel, explain
from .ring_batches import DirectRead, Lender, read_batch, sync_batch
from .ring_channel import LONG_BYTES, RingChannel
from .threads import ThreadsBackend, _result_or_error

if TYPE_CHECKING:
    import asyncio

__all__ = ["UringBackend"]

_LEAST_BATCH = 4  # fewer reads than this are not worth a ring
# From here a cold value is read past the page cache, in chunks. Below, and where the system reads
# far ahead also above, a plain read is as fast, and leaves the value in memory.
DIRECT_BYTES = 8 << 20
_FAR_AHEAD_KIB = 1024
_SEEN = 1024  # long values remembered as read once
_CLOSE_SECONDS = 10.0
_MAX_LENGTH = 1 << 62
_backends: weakref.WeakSet[UringBackend] = weakref.WeakSet()


class UringBackend(ThreadsBackend):
    name = "uring"
    prefers_together = True

    def __init__(self, settings: Settings) -> None:
        """Raises `BackendUnavailable` with the reason if the kernel gives no ring of use."""
        super().__init__(settings.workers)
        check_kernel()
        ring = _first_ring(settings.io_uring)
        self.rings = Rings(settings.io_uring)
        self._lender = Lender(self.rings, ring, settings.io_uring.cpu_affinity is not None)
        self._channels: set[RingChannel] = set()
        self._direct = settings.io_uring.direct
        self._seen: dict[tuple[int, int, int], None] = {}
        self._seen_lock = new_lock()
        _backends.add(self)

    # -- calls in place ---------------------------------------------------------------------

    def _ensure_ours(self, path: str, fd: int) -> None:
        super()._ensure_ours(path, fd)
        os.set_blocking(fd, True)  # else a ring heeds O_NONBLOCK, and does not wait for the disk

    def close_file(self, fd: int) -> None:
        try:
            if self._channels:
                for channel in tuple(self._channels):
                    channel.closing_file(fd)
        finally:
            os.close(fd)

    # -- one read ---------------------------------------------------------------------------

    def read(self, fd: int, length: int, offset: int) -> bytes:
        if length >= DIRECT_BYTES and (direct := self._read_long(fd, length, offset)) is not None:
            return direct
        return super().read(fd, length, offset)

    def read_direct(self, fd: int, length: int, offset: int) -> bytes | None:
        """Only where the settings insist: the caller reads ahead, which is as fast."""
        if self._direct is not True or length < DIRECT_BYTES:
            return None
        return self._read_long(fd, length, offset)

    def _read_long(self, fd: int, length: int, offset: int) -> bytes | None:
        status = os.fstat(fd)
        within = min(length, status.st_size - offset)
        place = status.st_dev, status.st_ino, offset
        if within < DIRECT_BYTES or not self._is_direct(place, fd, within):
            return None
        return self._read_direct(fd, within, offset)

    def _is_direct(self, place: tuple[int, int, int], fd: int, length: int) -> bool:
        """Whether to read past the page cache: only what is not in it, and with "auto" only the first time,
        because what is read again had better be in it."""
        if not self._direct or self._direct == "auto" and _reads_far_ahead(place[0]):
            return False
        return _is_cold(fd, length, place[2]) and (self._direct is True or self._is_first(place))

    def _is_first(self, place: tuple[int, int, int]) -> bool:
        """Whether a value was not asked for before, as far as is remembered."""
        with self._seen_lock:
            if place in self._seen:
                del self._seen[place]
                return False
            if len(self._seen) >= _SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[place] = None
            return True

    def _read_direct(self, fd: int, length: int, offset: int) -> bytes | None:
        try:
            direct = descriptor_of(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except ours(OSError):  # a file system without O_DIRECT, or no /proc
            return None
        try:
            with self._lender.lend() as lent:
                return DirectRead(lent, direct, length, offset).run() if lent else None
        finally:
            os.close(direct)

    # -- batches ----------------------------------------------------------------------------

    def read_many(self, requests: Sequence[ReadRequest]) -> list[bytes | OSError]:
        plain = [i for i, request in enumerate(requests) if self._fits(*request)]
        if len(plain) < _LEAST_BATCH:
            return super().read_many(requests)
        try:
            with self._lender.lend() as lent:
                if lent is None:
                    self.rings.fallbacks += len(plain)
                    return super().read_many(requests)
                found = read_batch(lent, [requests[i] for i in plain])
        except ours(OSError):
            self.rings.fallbacks += len(plain)
            return super().read_many(requests)
        if len(plain) == len(requests):
            return [self._result(request, one) for request, one in zip(requests, found, strict=True)]
        results: list[Any] = [None] * len(requests)
        for i, one in zip(plain, found, strict=True):
            results[i] = self._result(requests[i], one)
        for i in set(range(len(requests))).difference(plain):
            results[i] = _result_or_error(self.read, *requests[i])
        return results

    def _fits(self, fd: int, length: int, offset: int) -> bool:
        """Whether a batch on a ring can take the request: not if it is long, or out of range."""
        return 0 < length <= LONG_BYTES and 0 <= offset < _MAX_LENGTH and 0 <= fd < 1 << 31

    def _result(self, request: ReadRequest, found: bytes | int) -> bytes | OSError:
        """The ring's result, or, if that is about the ring itself, the result of an ordinary read."""
        if isinstance(found, bytes):
            return found
        if found in BATCH_ERRORS:
            self.rings.fallbacks += 1
            return _result_or_error(self.read, *request)
        return OSError(found, os.strerror(found))

    def write_many(
        self, requests: Sequence[WriteRequest], sync: Sequence[int] = ()
    ) -> list[OSError | None]:
        """Writes go into the page cache in place, which measures faster; several syncs run at once."""
        files = list(dict.fromkeys(sync))
        if len(files) < 2:
            return super().write_many(requests, sync)
        results = super().write_many(requests)
        failed = {fd: self._sync_outcome(fd, code) for fd, code in self._sync_files(files).items()}
        return [result or failed.get(request[0]) for request, result in zip(requests, results, strict=True)]

    def _sync_files(self, fds: list[int]) -> dict[int, int]:
        """The errno of each file that the ring has not made durable."""
        with suppressing(OSError), self._lender.lend() as lent:
            if lent is not None:
                return sync_batch(lent, fds)
        return dict.fromkeys(fds, errno.EAGAIN)

    def _sync_outcome(self, fd: int, code: int) -> OSError | None:
        """A file's failure is final: a sync repeated after it may wrongly succeed."""
        if code in BATCH_ERRORS:
            self.rings.fallbacks += 1
            return _result_or_error(self.sync, fd)
        return OSError(code, os.strerror(code))

    # -- asyncio ----------------------------------------------------------------------------

    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        channel = RingChannel(self, loop, self.rings, self._channels.discard)
        self._channels.add(channel)
        return channel

    # -- the backend itself -----------------------------------------------------------------

    def after_fork(self) -> None:
        super().after_fork()
        self._seen_lock = new_lock()
        for channel in self._channels:
            channel.after_fork()
        self.rings.after_fork()
        self._lender.after_fork()

    def close(self) -> None:
        for channel in list(self._channels):
            channel.close_from_outside(_CLOSE_SECONDS)
        super().close()
        self._lender.close()

    def stats(self) -> dict[str, Any]:
        return super().stats() | self.rings.stats()


def _first_ring(settings: RingSettings) -> Ring:
    """A ring that can do what is needed. `BackendUnavailable` says why there is none."""
    try:
        ring = Ring(settings, one_thread=False)
    except ours(OSError) as error:
        raise BackendUnavailable(explain(error.errno or errno.EIO)) from error
    try:
        ring.try_out()
        lacking = ring.lacking()
    except ours(OSError) as error:
        ring.destroy()
        why = explain(error.errno or errno.EIO)
        raise BackendUnavailable(f"a ring can be made but not used: {why}") from error
    except BaseException:  # an interruption: what is on its way is waited for
        ring.destroy()
        raise
    if lacking:
        ring.destroy()
        raise BackendUnavailable(f"this kernel's io_uring cannot {', '.join(lacking)}: it is too old")
    return ring


def _is_cold(fd: int, length: int, offset: int) -> bool:
    """Whether a look at three places of the range finds one that is not in the page cache."""
    for at in (offset + length // 2, offset, offset + length - 1):
        try:
            os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT)
        except ours(OSError):
            return True
    return False


@functools.cache
def _reads_far_ahead(device: int) -> bool:
    """Whether the system keeps this device busy by itself when a file is read through."""
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb") as file:
            return int(file.read()) >= _FAR_AHEAD_KIB
    except ours(OSError, ValueError):
        return False


def _close_at_exit() -> None:
    """End all operations into memory that the interpreter is about to free."""
    for backend in list(_backends):
        for channel in list(backend._channels):
            channel.close_at_exit()
        backend._lender.close(seconds=0)


atexit.register(_close_at_exit)
