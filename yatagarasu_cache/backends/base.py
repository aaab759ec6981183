"""The contract that every backend keeps: bytes in files, and nothing of keys.

A backend works on file descriptors of the operating system, so that the files that one
backend wrote can be read through any other. Three parts:

* calls in place (`open` ... `sync_directory`): the calling thread waits;
* batches (`read_many`, `write_many`): many requests, one call, results in the order given;
* `channel()`: the same for an asyncio event loop, with futures.

Rules for every implementation: a short read or write is resumed (a read may come back short
only at the end of the file), EINTR is retried, any other failure is an `OSError` with its errno
and has changed nothing but what it says. What a read returns never aliases a buffer that
the backend uses again. All methods may be called from several threads at once.
"""

from __future__ import annotations

import abc
import errno
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Union

from ..concurrency.interruption import ours, suppressing
from .directories import Trust

if TYPE_CHECKING:
    import asyncio

Buffer = Union[bytes, bytearray, memoryview]
ReadRequest = tuple[int, int, int]  # (fd, length in bytes, offset in bytes)
WriteRequest = tuple[int, Sequence[Buffer], int]  # (fd, buffers written one after another, offset)
Entry = tuple[str, os.stat_result]  # of a directory: a name, and its lstat
T = TypeVar("T")

# Errors of opening a file that is missing, replaced by something else, or put there by another user.
NO_FILE = frozenset({errno.ENOENT, errno.ESTALE, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO})


class Backend(abc.ABC):
    """Files for one cache handle. `close()` is idempotent; a closed backend is not used again."""

    name: ClassVar[str]
    # True if reads and writes in place are the plain system calls, so that compiled code may make
    # them itself. A backend that wants to see, count or change them leaves it False.
    plain: ClassVar[bool] = False
    # True if an event loop's reads that begin together cost so much less than single ones that it does
    # not pay to look first whether the bytes are in memory, where they hardly ever are.
    prefers_together: ClassVar[bool] = False

    # -- calls in place ---------------------------------------------------------------------

    @abc.abstractmethod
    def keep_to(self, root: str, inside: Collection[str], trust: Trust) -> None:
        """The cache is in the directory `root`, with the directories `inside` in it: from now on files are
        found from open directories, wherever paths may lead by then, and used only if they belong to somebody
        whom `trust` admits (see `directories`)."""

    @abc.abstractmethod
    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A new descriptor for `path`; O_CLOEXEC and O_NOFOLLOW are always added.

        Never waits for what is no regular file: EISDIR for a directory, ENXIO for anything else.
        A file that this creates has just the bits of `mode`, whatever the umask is, and belongs to the
        owner of its directory if root creates it.
        """

    @abc.abstractmethod
    def close_file(self, fd: int) -> None:
        """Close `fd`. An error is raised, and the descriptor is gone all the same."""

    def let_go(self, fd: int) -> None:
        """`close_file`, ignoring errors: for a file that was only read or locked, or has failed already."""
        try:  # no `with suppressing`: an interruption may come at the steps before its block
            self.close_file(fd)
        except ours(OSError):
            pass

    def clear_away(self, path: str) -> None:
        """`unlink`, ignoring errors: for leftovers of something that failed, whose own error is raised."""
        with suppressing(OSError):
            self.unlink(path)

    def opened(self, path: str, flags: int, mode: int = 0o600) -> OpenFile:
        """A descriptor for as long as a block runs. If both fail, the block's error is told."""
        return OpenFile(self, path, flags, mode)

    def reading(self, path: str) -> OpenFile:
        """The same for a file that is only read from: errors of closing it are ignored."""
        return OpenFile(self, path, os.O_RDONLY, quiet=True)

    @abc.abstractmethod
    def read(self, fd: int, length: int, offset: int) -> bytes:
        """`length` bytes from `offset`; fewer only where the file ends."""

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """`read` into memory of the caller's: how many bytes."""
        data = self.read(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    @abc.abstractmethod
    def read_once(self, fd: int, length: int, offset: int) -> bytes:
        """One try at `read`, as cheap as can be: may be short anywhere. For hits, which are verified."""

    @abc.abstractmethod
    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        """Like `read` if every byte is in the page cache, else None at once (never waits for a disk)."""

    def read_direct(self, fd: int, length: int, offset: int) -> bytes | None:
        """`read` past the page cache, if that is wanted and pays for this range; else None."""
        return None

    @abc.abstractmethod
    def prefetch(self, fd: int, length: int, offset: int) -> None:
        """Tell the system that these bytes will be read soon. Advice: does not wait, never fails."""

    @abc.abstractmethod
    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers`, one after another, from `offset` on."""

    @abc.abstractmethod
    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Make the file at least `offset + length` long, with real blocks behind that range.

        New bytes read as zero. Raises ENOSPC now rather than SIGBUS in a mapping later.
        """

    @abc.abstractmethod
    def truncate(self, fd: int, length: int) -> None:
        """Cut the file to `length` bytes."""

    @abc.abstractmethod
    def sync(self, fd: int) -> None:
        """Make the file's content and length durable (fdatasync)."""

    @abc.abstractmethod
    def replace(self, source: str, target: str) -> None:
        """Rename atomically; `target` is replaced if it is there."""

    @abc.abstractmethod
    def unlink(self, path: str) -> bool:
        """Remove a file; False if there was none."""

    @abc.abstractmethod
    def mkdir(self, path: str, mode: int = 0o700) -> bool:
        """Create a directory, with mode and owner as `open` does; False if it was there already."""

    @abc.abstractmethod
    def lstat(self, path: str) -> os.stat_result:
        """What is at `path`, which may be a link."""

    def exists(self, path: str) -> bool:
        """Whether there is anything at `path`."""
        try:
            self.lstat(path)
        except ours(OSError) as error:
            if error.errno in NO_FILE:
                return False
            raise
        return True

    @abc.abstractmethod
    def scandir(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Name and lstat of each entry, sorted by name; entries that vanish meanwhile are left out."""

    @abc.abstractmethod
    def sync_directory(self, path: str) -> None:
        """Make the names in `path` durable (fsync of the directory)."""

    # -- batches ----------------------------------------------------------------------------

    @abc.abstractmethod
    def read_many(self, requests: Sequence[ReadRequest]) -> list[bytes | OSError]:
        """One result a request, in their order; a request that fails gives its OSError."""

    @abc.abstractmethod
    def write_many(
        self, requests: Sequence[WriteRequest], sync: Sequence[int] = ()
    ) -> list[OSError | None]:
        """Write every request; then make each descriptor in `sync` durable.

        One result a request. If syncing a descriptor fails, every request on it gets that error.
        """

    # -- asyncio ----------------------------------------------------------------------------

    @abc.abstractmethod
    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        """The access of `loop` to this backend; one for each loop, closed by its owner."""

    # -- the backend itself -----------------------------------------------------------------

    @abc.abstractmethod
    def after_fork(self) -> None:
        """In the child of a fork: forget threads and rings of the parent without touching them."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for what is in flight, then free everything. Idempotent."""

    @abc.abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters for `CacheStats.backend_stats`: plain names to numbers."""


def name_file(error: object, path: str) -> None:
    """Add the file's name to an error of the system that came from using a descriptor."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = path


class OpenFile:
    """A descriptor that is closed behind a block, also where an exception keeps the block from beginning.

    An error of the system that comes up in the block without a file's name gets this one's.
    """

    __slots__ = ("_backend", "_fd", "_path", "_quiet")

    def __init__(
        self, backend: Backend, path: str, flags: int, mode: int = 0o600, *, quiet: bool = False
    ) -> None:
        self._backend, self._path, self._quiet, self._fd = backend, path, quiet, -1
        self._fd = backend.open(path, flags, mode)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, kind: object, error: object, _: object) -> None:
        self._fd, fd = -1, self._fd
        name_file(error, self._path)
        try:  # at once, and not by `let_go`: an interruption in between would leave it open
            self._backend.close_file(fd)
        except ours(OSError):
            if kind is None and not self._quiet:
                raise

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)  # an exception may have kept it from being set
        if fd >= 0:
            self._backend.let_go(fd)


class Channel(abc.ABC):
    """One event loop's access to a backend. Only that loop's thread may call it."""

    @abc.abstractmethod
    def read(self, fd: int, length: int, offset: int) -> asyncio.Future[bytes]:
        """`Backend.read` without blocking the loop.

        Cancelling the future never frees memory under a running operation. The caller keeps
        `fd` open until the operation (not merely the future) is over: see `run`.
        """

    @abc.abstractmethod
    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """`function(*args)` in a worker thread.

        If the future is cancelled before the function begins, it does not run at all.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Drain what is in flight (their futures complete) and free what the loop holds. Idempotent."""
