"""What `open` hands out: a value as a binary file."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any

from .backends.base import Buffer
from .errors import CacheIOError
from .guard import callers, guarded
from .store.format import CHUNK_BYTES
from .store.lending import LentFile

__all__ = ["HeldReader", "ValueReader", "value_file"]

Damaged = Callable[[tuple[int, int, int]], None]  # is told which file is


def value_file(value: Buffer | LentFile, damaged: Damaged) -> io.BufferedReader:
    """A file of a verified value, or of one that is verified as it is read.

    It buffers one chunk: whoever reads a little somewhere has one or two of them read.
    """
    raw = ValueReader(value, damaged) if isinstance(value, LentFile) else HeldReader(value)
    return io.BufferedReader(raw, CHUNK_BYTES)


class _Reader(io.RawIOBase):
    """A value of `length` bytes as a raw binary file."""

    def __init__(self, length: int) -> None:
        self._length, self._at = length, 0
        super().__init__()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @callers
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._ensure_open()
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}
        if whence not in starts:
            raise ValueError(f"whence is {whence!r}; it must be 0, 1 or 2")
        if starts[whence] + offset < 0:
            raise ValueError(f"seek to a negative position {starts[whence] + offset}")
        self._at = starts[whence] + offset
        return self._at

    @callers
    def tell(self) -> int:
        self._ensure_open()
        return self._at

    def _ensure_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    @guarded
    def readinto(self, buffer: Any, /) -> int:
        """Bytes from here on, at most so many as `buffer` holds. Returns how many; 0 only at the end."""
        view = self._writable(buffer)
        length = max(0, min(len(view), self._length - self._at))
        done = self._fill(view[:length]) if length else 0
        self._at += done
        return done

    @guarded
    def readall(self) -> bytes:
        """All bytes from here on, by one read."""
        self._ensure_readable()
        data = self._rest() if self._at < self._length else b""
        self._at = max(self._at, self._length)
        return data

    @callers
    def _ensure_readable(self) -> None:
        self._ensure_open()

    @callers
    def _writable(self, buffer: Any) -> memoryview:
        self._ensure_open()
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise TypeError("readinto() needs a buffer that can be written")
        return view

    def _fill(self, view: memoryview) -> int:
        """Put bytes that there are, some at least, into `view`, from the position on. Returns how many."""
        raise NotImplementedError

    def _rest(self) -> bytes:
        """All bytes from the position on; there are some."""
        raise NotImplementedError


class HeldReader(_Reader):
    """A value that was read, and verified, as a whole."""

    def __init__(self, value: Buffer) -> None:
        self._value = value
        super().__init__(len(value))

    @callers
    def fileno(self) -> int:
        self._ensure_open()
        raise io.UnsupportedOperation("fileno: the value has no file of its own")

    def _fill(self, view: memoryview) -> int:
        view[:] = memoryview(self._value)[self._at : self._at + len(view)]
        return len(view)

    def _rest(self) -> bytes:
        return bytes(self._value[self._at :])

    def close(self) -> None:
        self._value = b""
        super().close()


class ValueReader(_Reader):
    """A value that is a file of its own. Each chunk is verified when it is read."""

    def __init__(self, lent: LentFile, damaged: Damaged) -> None:
        self._lent, self._damaged = lent, damaged  # first: its destructor closes it
        self._chunks, self._kept, self._kept_at = lent.chunks, b"", 0
        super().__init__(lent.chunks.length)

    @callers
    def fileno(self) -> int:
        """The descriptor of the file, which has the value's bytes and no others. What is read through it is
        not verified."""
        self._ensure_open()
        return self._lent.location.fd

    def _fill(self, view: memoryview) -> int:
        at, unit = self._at, self._chunks.unit
        end = at + len(view)
        if end < self._length:
            end -= end % unit
        if at % unit or end <= at:
            return self._fill_from_chunk(view)
        view = view[: end - at]
        if not self._chunks.read_into(at, view):
            self._fail(at, end)
        return len(view)

    def _fill_from_chunk(self, view: memoryview) -> int:
        """From the part around the position, which is kept: what is read next is often in the same."""
        offset = self._at - self._kept_at
        if not 0 <= offset < len(self._kept):
            start, end = self._chunks.span(self._at, self._at + 1)
            self._kept, self._kept_at = self._verified(start, end), start
            offset = self._at - start
        part = memoryview(self._kept)[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def _rest(self) -> bytes:
        start = self._chunks.span(self._at, self._length)[0]
        data = self._verified(start, self._length)
        return data if start == self._at else data[self._at - start :]

    def _verified(self, start: int, end: int) -> bytes:
        data = self._chunks.read(start, end)
        if data is None:
            self._fail(start, end)
        return data  # type: ignore[return-value]

    def _fail(self, start: int, end: int) -> None:
        self._damaged(self._lent.file)
        raise CacheIOError(
            errno.EIO,
            f"the value is damaged: its bytes {start} to {end} fail their checksum (store it again)",
        )

    @guarded
    def close(self) -> None:
        if not self.closed:
            self._kept = b""
            self._lent.location.close()
        super().close()
