"""The portable backend: `os` calls in place, and worker threads where a caller must not wait."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..concurrency.interruption import ours, started, suppressing
from ..concurrency.locks import new_lock
from . import creating
from .base import Backend, Buffer, Channel, ReadRequest, T, WriteRequest
from .directories import Directories, Directory, Trust, ensure_file, open_at

if TYPE_CHECKING:
    import asyncio

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

# os.O_* and os.pread* that some systems lack.
_OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_CHANGING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
_WITHOUT_WAITING: int = getattr(os, "O_NONBLOCK", 0)  # for a FIFO in the place of a file
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0) if hasattr(os, "preadv") else 0
# Errors of a system call that a sandbox refuses (EPERM), or that the kernel does not know.
_REFUSED = frozenset({errno.EPERM, errno.ENOSYS})
_WOULD_WAIT = _REFUSED | {errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL}
_CANNOT_ALLOCATE = _REFUSED | {errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV}
_CANNOT_FLUSH = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})
_IOV_MAX = 512  # buffers in one pwritev; Linux allows 1024, POSIX only promises 16
_ZEROS = bytes(1 << 16)
# Linux takes no more of one call than the read-ahead of the device, which is 128 KiB unless changed.
_ADVISED_BYTES = 128 << 10
# Linux moves at most 0x7ffff000 bytes in one call: read(2), NOTES.
_MAX_TRANSFER = 1 << 30

DEFAULT_WORKERS = 16


class ThreadsBackend(Backend):
    name = "threads"
    plain = True

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or DEFAULT_WORKERS
        self._pool: WorkerPool | None = None
        self._pool_lock = new_lock()
        self._directories = Directories()

    # -- calls in place ---------------------------------------------------------------------

    def keep_to(self, root: str, inside: Collection[str], trust: Trust) -> None:
        self._directories.keep_to(root, inside, trust)

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        check = partial(self._ensure_ours, path)
        flags |= _OPEN_FLAGS | (0 if flags & os.O_EXCL else _WITHOUT_WAITING)
        try:
            if not flags & _CHANGING and (place := self._directories.recent(path)) is not None:
                try:
                    return open_at(place, flags, mode, check)
                except FileNotFoundError:
                    pass
            place = self._directories.place(path)
            if flags & os.O_CREAT:
                return creating.open_file(place, flags, mode, check)
            return open_at(place, flags, mode, check)
        except ours(OSError) as error:
            _name(error, path)
            raise

    def _ensure_ours(self, path: str, fd: int) -> None:
        self._directories.ensure_ours(path, ensure_file(path, fd))

    close_file = staticmethod(os.close)  # in C: no signal handler runs before it

    def read(self, fd: int, length: int, offset: int) -> bytes:
        data = os.pread(fd, min(length, _MAX_TRANSFER), offset)
        return data if len(data) == length else _read_on(fd, data, length, offset)

    if hasattr(os, "preadv"):

        def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
            done = 0
            try:
                while more := os.preadv(fd, [buffer[done : done + _MAX_TRANSFER]], offset + done):
                    done += more
            except ours(OSError) as error:
                if error.errno not in _REFUSED:
                    raise
                return super().read_into(fd, buffer, offset)
            return done

    read_once = staticmethod(os.pread)  # type: ignore[assignment]  # a call less on every hit

    if _NOWAIT:

        def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
            buffer = bytearray(length)
            try:
                done = os.preadv(fd, [buffer], offset, _NOWAIT)
            except ours(OSError) as error:
                if error.errno in _WOULD_WAIT:
                    return None
                raise
            return bytes(buffer) if done == length else None
    else:

        def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
            return None

    if hasattr(os, "posix_fadvise"):

        def prefetch(self, fd: int, length: int, offset: int) -> None:
            for at in range(offset, offset + length, _ADVISED_BYTES):
                with suppressing(OSError):
                    os.posix_fadvise(
                        fd, at, min(offset + length - at, _ADVISED_BYTES), os.POSIX_FADV_WILLNEED
                    )
    else:

        def prefetch(self, fd: int, length: int, offset: int) -> None:
            pass

    if hasattr(os, "pwritev"):

        def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
            total = sum(map(len, buffers))
            try:
                if len(buffers) <= _IOV_MAX and os.pwritev(fd, buffers, offset) == total:
                    return
            except ours(OSError) as error:  # if it is the file that is refused, the next call says so
                if error.errno not in _REFUSED:
                    raise
            _write_on(fd, buffers, offset)
    else:

        def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
            _write_on(fd, buffers, offset)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                return os.posix_fallocate(fd, offset, length)
            except ours(OSError) as error:
                if error.errno not in _CANNOT_ALLOCATE:
                    raise
        self._allocate_by_writing(fd, offset, length)

    def _allocate_by_writing(self, fd: int, offset: int, length: int) -> None:
        start = max(offset, os.fstat(fd).st_size)
        for at in range(start, offset + length, len(_ZEROS)):
            self.write(fd, [_ZEROS[: offset + length - at]], at)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    if hasattr(os, "fdatasync"):

        def sync(self, fd: int) -> None:
            _either(os.fdatasync, os.fsync, fd)
    else:

        def sync(self, fd: int) -> None:
            _sync_fully(fd)

    def replace(self, source: str, target: str) -> None:
        try:
            old, new = self._directories.place(source), self._directories.place(target)
            os.replace(old.name, new.name, src_dir_fd=old.dir_fd, dst_dir_fd=new.dir_fd)
        except ours(OSError) as error:
            error.filename2 = target
            _name(error, source)
            raise

    def unlink(self, path: str) -> bool:
        try:
            place = self._directories.place(path)
            os.unlink(place.name, dir_fd=place.dir_fd)
        except FileNotFoundError:
            return False
        except ours(OSError) as error:
            _name(error, path)
            raise
        return True

    def mkdir(self, path: str, mode: int = 0o700) -> bool:
        try:
            creating.make_directory(self._directories.place(path), mode)
        except FileExistsError:
            return False
        except ours(OSError) as error:
            _name(error, path)
            raise
        return True

    def lstat(self, path: str) -> os.stat_result:
        try:
            place = self._directories.place(path)
            return os.lstat(place.name, dir_fd=place.dir_fd)
        except ours(OSError) as error:
            _name(error, path)
            raise

    def scandir(self, path: str) -> list[tuple[str, os.stat_result]]:
        try:
            directory = self._directories.to_list(path)
            return _listed(path if directory is None else directory.fd)
        except ours(OSError) as error:
            _name(error, path)
            raise

    def sync_directory(self, path: str) -> None:
        if os.name == "nt":  # a directory cannot be opened there, and NTFS journals its names
            return
        try:
            directory = self._directories.opened(path) or Directory(path)
            _sync_fully(directory.fd)
        except ours(OSError) as error:
            _name(error, path)
            raise

    # -- batches ----------------------------------------------------------------------------

    def read_many(self, requests: Sequence[ReadRequest]) -> list[bytes | OSError]:
        if len(requests) > 1:  # advise all of them first, so that the disk works on many at once
            for request in requests:
                self.prefetch(*request)
        return [_result_or_error(self.read, *request) for request in requests]

    def write_many(
        self, requests: Sequence[WriteRequest], sync: Sequence[int] = ()
    ) -> list[OSError | None]:
        results = [_result_or_error(self.write, *request) for request in requests]
        failed = {fd: error for fd in sync if (error := _result_or_error(self.sync, fd)) is not None}
        return [
            result if isinstance(result, OSError) else failed.get(request[0])
            for result, request in zip(results, requests, strict=True)
        ]

    # -- asyncio ----------------------------------------------------------------------------

    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        return ThreadChannel(self, loop)

    def pool(self) -> WorkerPool:
        """The worker threads, started at first use."""
        with self._pool_lock:
            if self._pool is None:
                self._pool = WorkerPool(self._workers)
            return self._pool

    def after_fork(self) -> None:
        self._pool, self._pool_lock = None, new_lock()

    def close(self) -> None:
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        self._directories.close()

    def stats(self) -> dict[str, Any]:
        pool = self._pool
        return {"workers": pool.started if pool else 0, "queued": pool.waiting if pool else 0}


def _name(error: OSError, path: str) -> None:
    """Put the path into an error about a name in an open directory. An absolute name is one already."""
    if error.filename is None or not os.path.isabs(error.filename):
        error.filename = path


def _listed(directory: str | int) -> list[tuple[str, os.stat_result]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return sorted(found, key=lambda item: item[0])


def _sync_fully(fd: int) -> None:
    """fsync; on macOS, also have the disk flush its own cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except ours(OSError) as error:
            if error.errno not in _CANNOT_FLUSH:  # file systems of others do not know it
                raise
    _either(os.fsync, getattr(os, "fdatasync", os.fsync), fd)


def _either(first: Callable[[int], None], second: Callable[[int], None], fd: int) -> None:
    """`first(fd)`, or `second(fd)` where the first call is refused."""
    try:
        first(fd)
    except ours(OSError) as error:
        if error.errno not in _REFUSED:
            raise
        second(fd)


def _result_or_error(function: Callable[..., T], *args: Any) -> T | OSError:
    try:
        return function(*args)
    except ours(OSError) as error:
        return error


def _read_on(fd: int, data: bytes, length: int, offset: int) -> bytes:
    """Resume a read that came back short; stops where the file ends."""
    parts = [data]
    done = len(data)
    while done < length and parts[-1]:
        parts.append(os.pread(fd, min(length - done, _MAX_TRANSFER), offset + done))
        done += len(parts[-1])
    return b"".join(parts)


def _write_on(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write buffer by buffer, resuming short writes; overwrites what a first try wrote."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view:
            done = os.pwrite(fd, view[:_MAX_TRANSFER], offset)
            if done == 0:
                raise OSError(errno.EIO, "the file took no more bytes")
            view, offset = view[done:], offset + done


class WorkerPool:
    """Daemon threads, started as the queue grows, that run callables in order of arrival.

    A ThreadPoolExecutor costs a future and several locks a call; this costs one append.
    """

    def __init__(self, workers: int) -> None:
        self._limit = workers
        self._queue: deque[Callable[[], None]] = deque()
        self._ready = threading.Condition(new_lock())
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def started(self) -> int:
        return len(self._threads)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, job: Callable[[], None]) -> None:
        with self._ready:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            self._queue.append(job)
            # A woken thread counts as idle until it runs, but its job is still in the queue then.
            if self._idle >= len(self._queue):
                self._ready.notify()
            elif len(self._threads) < self._limit:
                self._start()
            if self._threads:
                return
            self._queue.pop()
        job()  # no thread can be had: the caller does it

    def _start(self) -> None:
        thread = threading.Thread(target=self.work, name="yatagarasu-worker", daemon=True)
        if started(thread):  # else the existing ones do the work later
            self._threads.append(thread)

    def work(self) -> None:
        """What a thread does. Between two jobs it holds nothing: no locks, and no objects of the last job."""
        while (job := self._next()) is not None:
            job()
            job = None

    def _next(self) -> Callable[[], None] | None:
        with self._ready:
            while not self._queue:
                if self._closed:
                    return None
                self._idle += 1
                self._ready.wait()
                self._idle -= 1
            return self._queue.popleft()

    def close(self) -> None:
        """Run what is queued, then end the threads."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


class ThreadChannel(Channel):
    """Runs calls in the backend's worker pool; results come home in batches.

    One wake-up of the loop delivers every result that is ready: with many calls in flight that
    is far cheaper than one `call_soon_threadsafe` a result.
    """

    def __init__(self, backend: ThreadsBackend, loop: asyncio.AbstractEventLoop) -> None:
        self._backend = backend
        self._loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._woken = False

    def read(self, fd: int, length: int, offset: int) -> asyncio.Future[bytes]:
        return self.run(self._backend.read, fd, length, offset)

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                self._finish(future, function(*args), None)
            except BaseException as error:
                self._finish(future, None, error)

        self._backend.pool().submit(job)
        return future

    def _finish(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._done.append((future, result, error))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before draining: a result appended from here on wakes the loop anew
        while self._done:
            future, result, error = self._done.popleft()
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    def close(self) -> None:
        """It has nothing to free: calls under way end in the pool, and their results are delivered."""
