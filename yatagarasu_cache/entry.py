"""What `get_entry` and `location` hand out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from .codec import Key
from .guard import guarded

_UNLOADED: Any = object()


class Entry:
    """What a cache knows of one key. Times are seconds since the epoch, sizes bytes.

    key, tag (None if it has none), meta (None likewise), size (of the stored value), created,
    expires (None: never), accessed (None where the eviction policy does not keep it), version (above 0; each
    `set` of the key makes a higher one, `touch` and moves on disk keep it: see ``set(if_version=)``).
    """

    __slots__ = (
        "_load", "_value", "accessed", "created", "expires", "key", "meta", "size", "tag", "version",
    )  # fmt: skip

    def __init__(
        self, *, key: Key, tag: Key, meta: Any, size: int, created: float, expires: float | None,
        accessed: float | None, version: int, load: Callable[[], Any],
    ) -> None:  # fmt: skip
        self.key, self.tag, self.meta, self.size = key, tag, meta, size
        self.created, self.expires, self.accessed = created, expires, accessed
        self.version = version
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
    """One not handed out yet: if an exception prevents that, it closes itself.

    `value_length`: bytes of the whole value, of which the place may be a part.
    """

    def __init__(self, fd: int, offset: int, length: int, flags: int) -> None:
        super().__init__(fd, offset, length, flags)
        self.value_length = length

    def handed_out(self) -> Location:
        """The same for the user, who owns the descriptor from now on: it may outlive the object."""
        location = Location(self.fd, self.offset, self.length, self.flags)
        self.fd = -1
        return location

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)
