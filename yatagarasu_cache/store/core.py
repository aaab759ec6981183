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

from ..backends.base import Backend, Buffer
from ..codec import KIND_ARRAY, Key
from ..concurrency.interruption import ours
from ..config import Settings
from ..errors import from_os_error
from . import compiled
from .chunks import PIECE_BYTES, RunningSums
from .format import CODEC_FLAGS, INDEX_NAME, LOCK_NAME
from .index import Index
from .item import Item
from .segment import SegmentFiles, SegmentWriter

SHORT_KEY = 1024  # bytes of an encoded key that compiled code encodes itself at most
SHORT_META = 128  # bytes of the metadata beside it
RANK_BYTES = 8  # of metadata that say where an entry stands in an order of its users'
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

    def get_with_meta(self, key: Key, now: int, wait: bool) -> Any:
        """`get` of (payload, flags, metadata); unless `wait` without waiting for a disk."""
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

    def meta(self, key: bytes, now: int) -> Any:
        """The metadata of an encoded key's live entry; None if there is none; NotImplemented as for `get`.
        Nothing is counted."""
        return NotImplemented

    def place(self, key: Key, now: int) -> Any:
        """Where the value of `key` is, to be read by others: (descriptor, length, offset, ...).

        None for a miss, which is counted; NotImplemented as for `get`.
        """
        return NotImplemented

    def accept(self, place: tuple[int, ...], data: bytes, now: int) -> Any:
        """What `get` returns, if `data` was read from `place` and is right; else NotImplemented."""
        return NotImplemented

    # -- walking ------------------------------------------------------------------------------

    def walk_footer(
        self, entries: bytes, tail: int, at: int, segment: int, prefix: bytes, before: int
    ) -> Any:
        """Some of the records in a footer, from its entry at `at` on, that the index shows: ([(encoded key,
        fields of the slot)], where the next entry is, how many were looked at); NotImplemented.

        `prefix`: of the encoded keys that are wanted; `before`: their highest stamp.
        """
        return NotImplemented

    def walk_records(self, data: bytes, base: int, at: int, segment: int, prefix: bytes, before: int) -> Any:
        """The same of records, from `at` in data that was read at `base`, up to the first that is none or not
        whole."""
        return NotImplemented

    # -- writing ------------------------------------------------------------------------------

    def append_many(self, items: list[Item], writer: SegmentWriter) -> Any:
        """Append the records of `items`: their slots, packed, and the epoch before; or NotImplemented."""
        return NotImplemented

    def install_many(self, slots: bytes, tag_hashes: bytes, first: int, epoch: int) -> int:
        """Show records from number `first` on, under the lock: how many, until one that is not plain.

        `tag_hashes`: `format.tag_hash` of each, 4 bytes; nothing if all are 0.
        """
        return 0

    # -- large files --------------------------------------------------------------------------

    def read_chunks(
        self, fd: int, start: int, length: int, seed: int, flags: int
    ) -> tuple[bytes | bytearray, bytes] | None:
        """Bytes of a large value, from where a chunk begins, and the sums of their chunks; None if the file
        is shorter. What `flags` say to be an array is a bytearray, for whoever gets it to write to."""
        data: bytes | bytearray
        if flags & CODEC_FLAGS == KIND_ARRAY:
            data = bytearray(length)
            whole = self._backend.read_into(fd, memoryview(data), start) == length
        else:
            data = self._backend.read(fd, length, start)
            whole = len(data) == length
        return (data, _sums_of((data,), seed)) if whole else None

    def read_chunks_into(self, fd: int, start: int, view: memoryview, seed: int) -> bytes | None:
        """The same into memory of the caller's: the sums."""
        if self._backend.read_into(fd, view, start) < len(view):
            return None
        return _sums_of((view,), seed)

    def sum_chunks(self, fd: int, start: int, length: int, seed: int) -> bytes | None:
        """The same in constant memory, of what is not kept."""
        sums, end = RunningSums(seed), start + length
        for at in range(start, end, PIECE_BYTES):
            data = self._backend.read(fd, min(PIECE_BYTES, end - at), at)
            if len(data) < min(PIECE_BYTES, end - at):
                return None
            sums.update(data)
        return sums.packed()

    def write_file(self, fd: int, parts: tuple[Buffer, ...], seed: int) -> bytes:
        """Write a large value to its new file; the sums of its chunks."""
        self._backend.write(fd, parts, 0)
        return _sums_of(parts, seed)


def _sums_of(parts: tuple[Buffer, ...], seed: int) -> bytes:
    sums = RunningSums(seed)
    for part in parts:
        sums.update(part)
    return sums.packed()


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
        self.get_with_meta = core.get_with_meta  # type: ignore[method-assign]
        self.counted, self.use = core.counted, core.use  # type: ignore[method-assign]
        self.own = core.own  # type: ignore[method-assign]
        self.place, self.accept, self.meta = core.place, core.accept, core.meta  # type: ignore[method-assign]
        self.holds, self.holds_encoded = core.holds, core.holds_encoded  # type: ignore[method-assign]
        self.walk_footer, self.walk_records = core.walk_footer, core.walk_records  # type: ignore[method-assign]
        self.install_many = core.install_many  # type: ignore[method-assign]
        self.set, self.put, self.remove = core.set, core.put, core.remove
        self.read_chunks_into, self.sum_chunks = module.read_chunks_into, module.sum_chunks  # type: ignore[method-assign]
        self.write_file = module.write_file  # type: ignore[method-assign]
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
        index.on_map, index.renew_tags = self._map, self._core.renew_tags

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
            self._index.on_map = self._index.renew_tags = None
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

    def read_chunks(
        self, fd: int, start: int, length: int, seed: int, flags: int
    ) -> tuple[bytes | bytearray, bytes] | None:
        direct = self._backend.read_direct(fd, length, start)
        if direct is not None:
            if len(direct) < length:
                return None
            array = flags & CODEC_FLAGS == KIND_ARRAY  # a ring gives bytes: the one copy that it costs
            return bytearray(direct) if array else direct, _sums_of((direct,), seed)
        found: Any = self._module.read_chunks(fd, start, length, seed, flags)
        return found  # type: ignore[no-any-return]

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
