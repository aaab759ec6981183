"""Room in the active segment, granted in small steps, and segments that are begun for it."""

from __future__ import annotations

import os

from ..concurrency.file_locks import claim
from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .cache_files import CacheFiles
from .changes import ChangeLog
from .core import PythonCore
from .current import CurrentIndex
from .durability import Durability
from .index import Index
from .limits import Limits, segment_bytes_of
from .locking import Locks
from .owners import Owner
from .presence import Presence
from .reaping import Reaper
from .segment import SegmentWriter, read_records, read_segment_header
from .segment_table import SegmentTable
from .unreadable import is_of_disk

_MOST_GRANT = 1 << 22  # a writer gets as much room again as it has used, at most so much,
_GRANT_SHARE = 16  # and no more than its part of 1/16 of the limit; at first so that 256 idle handles
_FIRST_GRANTS, _FIRST_LEAST, _FIRST_MOST = 256, 1 << 12, 1 << 16  # take no more than that together
_ADOPTED_MOST = 1 << 20  # a longer segment takes too long to read for whoever goes on with it


class Grants:
    """Grants room step by step, so that an idle, forgotten or dead handle holds next to nothing.

    `appending` is held. Room is granted under the index lock and only if it fits then, so that handles
    that fill the cache together do not exceed the limit together.
    """

    def __init__(
        self, locks: Locks, files: CacheFiles, owner: Owner, limits: Limits,
        current: CurrentIndex, budget: Budget, presence: Presence, table: SegmentTable, changes: ChangeLog,
        active: ActiveSegment, durability: Durability, reaper: Reaper, core: PythonCore,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._owner = locks, files, owner
        self._limits, self._current, self._budget = limits, current, budget
        self._presence, self._table, self._changes, self._active = presence, table, changes, active
        self._durability, self._reaper, self._core = durability, reaper, core

    @property
    def _index(self) -> Index:
        return self._current.index

    def grant(self, size: int, *, beyond: int = 0, exactly: bool = False) -> bool:
        """Give the writer room for `size` bytes, in a new segment if need be, and some more unless `exactly`.

        False if that would exceed the limit by more than `beyond`.
        """
        try:
            # Never once more: other threads may be about to show what they appended to a segment of ours, and
            # what was taken back when that was sealed.
            first = not self._active.has_written
            if self._active.writer is not None and not self._active.may_show(self._active.writer.segment):
                self._active.let_go_if_lost(self._active.writer)
            if (
                self._active.writer is not None
                and self._active.writer.used + size > self._active.writer.capacity
            ):
                self._active.seal()
            with self._locks.index:
                if self._active.writer is not None and not self._active.may_show(self._active.writer.segment):
                    return True  # taken just now: the caller asks again
                limit = self._budget.limit + beyond
                if self._index.used_bytes + self.least(size) > limit:
                    return False
                writer = self._active.writer or self._next_writer(size, first=first)
                if not self._changes.segment:  # there was no room for it, or it was removed
                    self._changes.prepare()
                least, left = writer.used + size, limit - self._index.used_bytes
                wanted = least if exactly else max(least, self._usual_size(writer))
                self._extend(writer, min(wanted, max(writer.granted + left, least)))
        except FileNotFoundError:  # somebody has removed files just now: the caller asks again
            self._files.prepare()
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot begin a segment") from error
        return True

    def least(self, size: int) -> int:
        """Bytes that a grant of room for `size` takes at least."""
        writer = self._active.writer
        if writer is not None and writer.used + size <= writer.capacity:
            return max(0, size - writer.room)
        return f.SEGMENT_HEADER_BYTES + f.FOOTER_TRAILER_BYTES + size

    def _usual_size(self, writer: SegmentWriter) -> int:
        """What the writer's segment may come to: twice what it uses, within its share of the limit.

        Large grants are whole pieces of _MOST_GRANT, which those divide in which the compiled core allocates
        blocks: it asks for none that are not granted.
        """
        share = self._budget.size_limit // _GRANT_SHARE
        first = min(max(share // _FIRST_GRANTS, _FIRST_LEAST), _FIRST_MOST)
        part: int = share // max(1, self._index.words[f.W_ACTIVE])
        grant = min(max(writer.used, first - writer.used), part, _MOST_GRANT)
        size = writer.used + grant
        return size if grant < _MOST_GRANT else -(-size // _MOST_GRANT) * _MOST_GRANT

    def _extend(self, writer: SegmentWriter, granted: int) -> None:
        """Let `granted` bytes of the writer's segment count. The lock is held."""
        granted = max(min(granted, writer.capacity), writer.granted)
        assert granted >= writer.tail, "what was written was granted before"
        # First: an exception may come in between, and nothing may be written that does not count.
        self._index.resize_segment(writer.segment, granted)
        writer.granted = granted

    def _next_writer(self, size: int, *, first: bool) -> SegmentWriter:
        """Begin a segment, or, if it is the handle's first, go on with a small one. The lock is held."""
        capacity = self._capacity(size)
        self._presence.ensure()
        writer = (self._adopt(size) if first else None) or self._create(capacity)
        self._active.writer, self._active.has_written = writer, True
        self._core.own(self._owner.token)
        self._owner.note(writer.segment)
        self._changes.prepare()
        return writer

    def _capacity(self, size: int) -> int:
        # On a small volume segments are small too, so that one can go without much being lost.
        usual = min(self._limits.segment_bytes, segment_bytes_of(self._budget.volume_bytes()))
        return max(usual, f.aligned(2 * size + 8192) if size > usual // 2 else 0)

    def _create(self, capacity: int) -> SegmentWriter:
        segment, fd = self._table.new_file()
        try:
            token = self._owner.acquire()
            claim(fd)
            index = self._index  # not before: its table may have become larger
            created, floor = index.stamp(), index.words[f.W_FLOOR]
            header = f.pack_segment_header(segment, index.identity, created, floor)
            self._files.backend.write(fd, [header], 0)
            entry = index.add_segment(segment, f.ACTIVE, len(header), token, created)
            index.words[entry + f.T_TAIL] = len(header)
        except BaseException:
            self._table.give_up(segment, fd)
            raise
        writer = SegmentWriter(self._files.backend, fd, segment, capacity)
        self._durability.names_changed()
        return writer

    def _adopt(self, size: int) -> SegmentWriter | None:
        """Continue a small segment of an earlier handle, so that short-lived handles don't leave one each.

        A segment that a checkpoint lists as complete is not continued: recovery would not read it.
        """
        if self._index.words[f.W_ACTIVE]:
            self._reaper.reap()
        index = self._index
        most = min(self._limits.segment_bytes // 2, _ADOPTED_MOST)
        for entry in index.table_entries():
            words = index.words[entry : entry + f.ENTRY_WORDS]
            free = words[f.T_STATE] & ~f.MASK32 == f.SEALED and not (words[f.T_OWNER] or words[f.T_CLEANER])
            if free and words[f.T_SIZE] < most - size and words[f.T_CREATED] > index.words[f.W_EPOCH]:
                return self._take_over(words[f.T_STATE] & f.MASK32)
        return None

    def _take_over(self, segment: int) -> SegmentWriter | None:
        index, capacity = self._index, self._capacity(0)
        try:
            fd = self._files.backend.open(self._files.segments.path(segment), os.O_RDWR)
        except ours(OSError):  # then another one is begun, and this one stays as it is
            return None
        writer = SegmentWriter(self._files.backend, fd, segment, capacity)  # which closes it
        try:
            if not claim(fd) or not self._adopts(writer):
                writer.abandon()
                return None
            # First: whoever finds us dead in between takes it from us as it is.
            entry, owner = index.entry(segment), self._owner.acquire()
            index.words[entry + f.T_SYNCED] = 0
            index.words[entry + f.T_OWNER] = owner
            index.words[entry + f.T_TAIL] = writer.tail
            index.set_state(segment, f.ACTIVE)
            self._files.backend.truncate(fd, writer.tail)  # the footer
            writer.granted = writer.tail
        except BaseException:
            writer.abandon()
            raise
        self._durability.names_changed()  # who created it may not have made its name durable
        return writer

    def _adopts(self, writer: SegmentWriter) -> bool:
        """Let the writer continue behind the records in its segment. False if they are damaged, or the disk
        can't read them: another segment will do.
        """
        identity = self._index.identity
        try:
            header = read_segment_header(self._files.backend, writer.fd)
            if header is None or (header.segment, header.identity) != (writer.segment, identity):
                return False
            writer.adopt(read_records(self._files.backend, writer.fd, writer.segment, identity))
            return True
        except ours(OSError) as error:
            if not is_of_disk(error):
                raise
            return False
