"""Files that cannot be read: what that means, and how they are given up where that is asked for.

Only `VANISHED` says that nothing is there to be read: no file, or something that is none of ours. Any other
failure may be over the next time: it is raised, with the file's name and what helps, and changes nothing.
But a disk may have lost some bytes for good, so that each try fails: within `giving_up` the work goes on
without just what cannot be read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from ..backends.base import Backend
from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from .notices import Notices
from .segment import VANISHED

# Wrong with this process, this moment or this system, and not with one file: other processes, or this one a
# little later, can read what is there.
OUR_OWN = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR, errno.EAGAIN,
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOSYS, errno.ENOLCK, errno.EBUSY, errno.ENOBUFS,
    }
)  # fmt: skip
_BLOCK = 4096
_COMMAND = "`yatagarasu-cache check --fix --drop-unreadable DIR`"
_giving_up: ContextVar[bool] = ContextVar("giving_up", default=False)


@contextlib.contextmanager
def giving_up(wanted: bool = True) -> Iterator[None]:
    """In this block, files that the disk cannot read any more are given up."""
    before = _giving_up.set(wanted)
    try:
        yield
    finally:
        _giving_up.reset(before)


def is_giving_up() -> bool:
    return _giving_up.get()


def is_given_up(error: OSError) -> bool:
    """Whether to go on without what could not be read."""
    return _giving_up.get() and is_of_disk(error)


def is_absence(error: OSError) -> bool:
    """Whether nothing is there to be read, as opposed to something unreadable."""
    return error.errno in VANISHED


def is_of_disk(error: OSError) -> bool:
    """Whether the file is unreadable, and not just for this process."""
    return error.errno is not None and error.errno not in VANISHED | OUR_OWN


def remedy(error: OSError) -> str:
    """What to do; `from_os_error` adds what helps with any such error."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user read it"
    if error.errno == errno.ENOMEM:
        return "free memory, or raise the limit of this process"
    if not is_of_disk(error):
        return ""
    return f"if the disk has lost it for good, {_COMMAND} gives up what cannot be read"


def fault(error: OSError) -> str:
    """What is wrong with a file, in a few words."""
    return f"cannot be read: {error.strerror or error}"


def told(error: OSError, what: str) -> CacheIOError:
    """The error of an operation that only read, and has changed nothing."""
    if isinstance(error, CacheIOError):
        return error
    return from_os_error(error, f"cannot read {what}", remedy(error))


class Losses:
    """What is missing in an index that was made anew, by kind and file: check() has it replaced."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self.noted: dict[tuple[str, str], str] = {}

    def note(self, kind: str, name: str, error: OSError) -> None:
        """The index is made anew without what cannot be read of a file."""
        self.noted[kind, name] = fault(error)
        self._notices.log_once(f"unreadable {name}", f"{name} {fault(error)}: it is given up")


class Sparing:
    """Reads zeros for each block that the disk does not give, and remembers where these are.

    Records, footers and values that have such a hole fail their checksums.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.holes: set[int] = set()  # offsets of blocks
        self.error: OSError | None = None  # at the last of them

    def read(self, fd: int, length: int, offset: int) -> bytes:
        try:
            return self._backend.read(fd, length, offset)
        except ours(OSError) as error:
            if not is_of_disk(error):
                raise
        end = min(offset + length, os.fstat(fd).st_size)
        if offset >= end:
            return b""
        starts = range(offset // _BLOCK * _BLOCK, end, _BLOCK)
        blocks = b"".join(self._block(fd, min(_BLOCK, end - at), at) for at in starts)
        return blocks[offset - starts[0] :]

    def _block(self, fd: int, length: int, at: int) -> bytes:
        try:
            return self._backend.read(fd, length, at)
        except ours(OSError) as error:
            if not is_of_disk(error):
                raise
            self.error = error
        self.holes.add(at)
        return bytes(length)

    def has_hole(self, start: int, end: int) -> bool:
        return any(at < end and start < at + _BLOCK for at in self.holes)

    def look_through(self, fd: int) -> None:
        """Find all holes of a file."""
        for offset in range(0, os.fstat(fd).st_size, 1 << 20):
            self.read(fd, 1 << 20, offset)

    def overwrite(self, fd: int, kept: Sequence[tuple[int, int]]) -> None:
        """Write zeros over the holes, for which a disk usually takes other blocks; but not within the extents
        `kept` (start, end)."""
        size = os.fstat(fd).st_size
        taken = {at for start, end in kept for at in range(start // _BLOCK * _BLOCK, end, _BLOCK)}
        for at in sorted(self.holes - taken):
            self._backend.write(fd, [bytes(min(_BLOCK, size - at))], at)
