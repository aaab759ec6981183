"""What `get_entry`, `open` and `location` hand out."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

from .backends.base import Backend
from .codec import Key
from .guard import callers, guarded

_UNLOADED: Any = object()


class Entry:
    """What a cache knows of one key. Times are seconds since the epoch, sizes bytes.

    key, tag (None if it has none), meta (None likewise), size (of the stored value), created,
    expires (None: never), accessed (None where the eviction policy does not keep it).
    """

    __slots__ = ("_load", "_value", "accessed", "created", "expires", "key", "meta", "size", "tag")

    def __init__(
        self, *, key: Key, tag: Key, meta: Any, size: int, created: float, expires: float | None,
        accessed: float | None, load: Callable[[], Any],
    ) -> None:  # fmt: skip
        self.key, self.tag, self.meta, self.size = key, tag, meta, size
        self.created, self.expires, self.accessed = created, expires, accessed
        self._load, self._value = load, _UNLOADED

    @property
    @guarded
    def value(self) -> Any:
        """The value, loaded and verified when first asked for.

        Raises `EntryGone` (a KeyError) if the entry expired, or was replaced or removed, before that.
        """
        if self._value is _UNLOADED:
            self._value = self._load()
        return self._value

    def __repr__(self) -> str:
        return f"<Entry {self.key!r}: {self.size} bytes>"


class Location:
    """Bytes in a file: ``fd, offset, length = location``. Close it, or use it in a ``with``."""

    def __init__(self, fd: int, offset: int, length: int, flags: int) -> None:
        self.fd, self.offset, self.length, self.flags = fd, offset, length, flags

    def __iter__(self) -> Iterator[int]:
        return iter((self.fd, self.offset, self.length))

    def __enter__(self) -> Location:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @guarded
    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        if self.fd >= 0:
            self.fd, fd = -1, self.fd
            os.close(fd)


class OwnLocation(Location):
    """One not handed out yet: if an exception prevents that, it closes itself."""

    def handed_out(self) -> Location:
        """The same for the user, who owns the descriptor from now on: it may outlive the object."""
        location = Location(self.fd, self.offset, self.length, self.flags)
        self.fd = -1
        return location

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)


class ValueReader(io.RawIOBase):
    """A verified value as a raw binary file."""

    def __init__(self, backend: Backend, location: Location) -> None:
        self._backend, self._location = backend, location  # first: its destructor closes it
        self._at = 0
        super().__init__()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @callers
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._location.length}
        if whence not in starts:
            raise ValueError(f"whence is {whence!r}; it must be 0, 1 or 2")
        if starts[whence] + offset < 0:
            raise ValueError(f"seek to a negative position {starts[whence] + offset}")
        self._at = starts[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    @guarded
    def readinto(self, buffer: Any, /) -> int:
        view = _writable(buffer, self.closed)
        length = max(0, min(len(view), self._location.length - self._at))
        fd, start, _ = self._location
        data = self._backend.read(fd, length, start + self._at) if length else b""
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    @guarded
    def close(self) -> None:
        if not self.closed:
            self._location.close()
        super().close()


@callers
def _writable(buffer: Any, closed: bool) -> memoryview:
    if closed:
        raise ValueError("I/O operation on closed file")
    view = memoryview(buffer).cast("B")
    if view.readonly:
        raise TypeError("readinto() needs a buffer that can be written")
    return view
