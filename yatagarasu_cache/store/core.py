"""What is done over the mapped index by its words: compiled, where that was built, else not at all.

The Python code of this folder is the specification: the compiled module does what it does over the
same files, for entries that are plain, and answers `NotImplemented` for all others, which then take the
ordinary path. So here is nothing but the choice and the calls; `keyed` says who takes which path.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from xxhash import xxh3_64_intdigest

from ..backends.base import Backend, Buffer
from ..codec import Key
from ..concurrency.interruption import ours
from ..config import Settings
from ..errors import from_os_error
from . import compiled
from .format import INDEX_NAME, LOCK_NAME
from .index import Index
from .item import Item
from .segment import SegmentFiles, SegmentWriter

SHORT_KEY = 1024  # bytes of an encoded key that compiled code encodes itself at most
# Uses go to the cache's totals when there are so many, or some have waited for so long; where that did not
# come off, because others had the lock, after so many more.
USES_MOST, USES_MORE, USES_NANOSECONDS = 192, 16, 10**9


class PythonCore:
    """Nothing is compiled. `CompiledCore` overrides what it can do."""

    name = "python"
    reason = ""  # why it is this one

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._hits = self._misses = 0
        self._due, self._told = USES_MOST, time.time_ns()
        self._fold: Callable[[], None] = lambda: None

    def open(self, segments: SegmentFiles, fold: Callable[[], None]) -> None:
        """To be called once. `segments`: whose descriptors it reads by; `fold` is called when uses are due
        to be counted in the cache's totals."""
        self._fold = fold

    def attach(self, index: Index) -> None:
        """From now on `index` is the one in use."""

    def own(self, token: int) -> None:
        """Whom the segment belongs to that is appended to from now on."""

    def detach(self) -> None:
        """The store was closed."""

    # -- uses ---------------------------------------------------------------------------------

    def use(self, hits: int, misses: int, now: int) -> None:
        """Count what was found, or was not; and see to it that totals have it before long."""
        self._hits += hits
        self._misses += misses
        uses = self._hits + self._misses
        if uses >= self._due or not 0 <= now - self._told < USES_NANOSECONDS:
            self._due, self._told = uses + USES_MORE, now
            self._fold()

    def counted(self) -> tuple[int, int]:
        """Hits and misses since this was last asked."""
        counted = self._hits, self._misses
        self._hits = self._misses = 0
        self._due = USES_MOST
        return counted

    # -- reading ------------------------------------------------------------------------------

    def get(self, key: Key, now: int) -> Any:
        """The verified value of `key`: (payload, flags), or the payload alone if it has no flags.

        None for a miss; NotImplemented, and nothing is counted, if it is not plain.
        `now` in nanoseconds since the epoch.
        """
        return NotImplemented

    def get_encoded(self, key: bytes, now: int) -> Any:
        """The same of an encoded key."""
        return NotImplemented

    def get_nowait(self, key: Key, now: int) -> Any:
        """`get` without waiting for a disk: NotImplemented instead."""
        return NotImplemented

    def get_many(self, keys: list[Key], now: int) -> list[Any]:
        """What `get` gives for each of `keys`; the number of a segment that has to be opened first. What is
        not in memory is read in one batch."""
        return [NotImplemented] * len(keys)

    def holds(self, key: Key, now: int) -> Any:
        """Whether there is a live entry of `key`: NotImplemented as for `get`. Nothing is counted."""
        return NotImplemented

    def holds_encoded(self, key: bytes, now: int) -> Any:
        """The same of an encoded key."""
        return NotImplemented

    def place(self, key: Key, now: int) -> Any:
        """Where the value of `key` is, to be read by others: (descriptor, length, offset, ...).

        None for a miss, which is counted; NotImplemented as for `get`.
        """
        return NotImplemented

    def accept(self, place: tuple[int, ...], data: bytes, now: int) -> Any:
        """What `get` returns, if `data` was read from `place` and is right; else NotImplemented."""
        return NotImplemented

    # -- writing ------------------------------------------------------------------------------

    def append_many(self, items: list[Item], writer: SegmentWriter) -> Any:
        """Append the records of `items`: their slots, packed, and the epoch before; or NotImplemented."""
        return NotImplemented

    def install_many(self, slots: bytes, first: int, epoch: int) -> int:
        """Show records from number `first` on, under the lock: how many, until one that is not plain."""
        return 0

    # -- large files --------------------------------------------------------------------------

    def read_file(self, fd: int, length: int, seed: int) -> tuple[bytes, int] | None:
        """All bytes of a large value and their checksum; None if the file is shorter."""
        data = self._backend.read(fd, length, 0)
        return (data, xxh3_64_intdigest(data, seed)) if len(data) == length else None

    def write_file(self, fd: int, payload: Buffer, seed: int) -> int:
        """Write a large value to its new file; its checksum."""
        self._backend.write(fd, [payload], 0)
        return xxh3_64_intdigest(payload, seed)


class CompiledCore(PythonCore):
    """The same by the compiled module.

    `set`, `put` and `remove` are the module's own: see `keyed.CompiledAccess`.
    """

    name = "c"

    def __init__(self, backend: Backend, root: str, module: Any) -> None:
        super().__init__(backend)
        self._core = core = module.Core()
        self.get, self.get_nowait = core.get, core.get_nowait  # type: ignore[method-assign]
        self.get_encoded, self.get_many = core.get_encoded, core.get_many  # type: ignore[method-assign]
        self.counted, self.use = core.counted, core.use  # type: ignore[method-assign]
        self.own = core.own  # type: ignore[method-assign]
        self.place, self.accept = core.place, core.accept  # type: ignore[method-assign]
        self.holds, self.holds_encoded = core.holds, core.holds_encoded  # type: ignore[method-assign]
        self.install_many = core.install_many  # type: ignore[method-assign]
        self.set, self.put, self.remove = core.set, core.put, core.remove
        self._module = module
        self._paths = [os.fsencode(os.path.join(root, name)) for name in (INDEX_NAME, LOCK_NAME)]
        self._segments: SegmentFiles | None = None
        self._index: Index | None = None

    def open(self, segments: SegmentFiles, fold: Callable[[], None]) -> None:
        self._segments = segments
        self._core.tell(fold, time.time_ns())

    def attach(self, index: Index) -> None:
        self._forget_index()
        self._index = index
        self._map()
        index.on_map = self._map

    def _map(self) -> None:
        """Map what the index has mapped."""
        index, segments = self._index, self._segments
        if index is not None and segments is not None:
            self._core.attach(
                index.fd, len(index.map), index.table_word, index.table_capacity, index.identity.seed,
                segments.table(index.table_capacity), index.writable, *self._paths,
            )  # fmt: skip

    def _forget_index(self) -> None:
        if self._index is not None:
            self._index.on_map = None
            self._index = None

    def detach(self) -> None:
        self._forget_index()
        self._core.detach()

    def append_many(self, items: list[Item], writer: SegmentWriter) -> Any:
        start = writer.tail
        try:
            done: Any = self._core.append_many(writer.fd, writer.segment, start, items, time.time_ns())
        except ours(OSError) as error:
            writer.cut()
            raise from_os_error(error, "cannot write entries") from error
        if done is NotImplemented:
            return done
        listed, slots, epoch, writer.tail = done
        writer.enlist_many(start, listed)
        return slots, epoch

    def read_file(self, fd: int, length: int, seed: int) -> tuple[bytes, int] | None:
        data = self._backend.read_direct(fd, length, 0)
        if data is not None:
            return (data, xxh3_64_intdigest(data, seed)) if len(data) == length else None
        found: tuple[bytes, int] | None = self._module.read_file(fd, length, seed)
        return found

    def write_file(self, fd: int, payload: Buffer, seed: int) -> int:
        if type(payload) is not bytes:
            return super().write_file(fd, payload, seed)
        checksum: int = self._module.write_file(fd, payload, seed)
        return checksum


def choose(settings: Settings, backend: Backend) -> PythonCore:
    """The core of a store: the compiled one if it is there and may be used, else one log line."""
    choice = compiled.choose()
    compiled.tell(choice)
    if choice.module is not None and not backend.plain:
        choice = compiled.Choice(None, "what wraps the backend wants to see its reads and writes")
    if choice.module is None:
        core = PythonCore(backend)
    else:
        core = CompiledCore(backend, settings.directory, choice.module)
    core.reason = choice.reason
    return core
