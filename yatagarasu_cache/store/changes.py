"""The log of changes: removals, clears and touches, in stamp order, shared by all handles.

The index alone tells what is there; this tells a recovery what the segments don't: that a record
found in one of them was removed since, or has another time of expiry. It is written under the
index lock, so that one file serves all. A checkpoint begins a new file, and once it is durable
the files before it are not needed any more.

Its file is made longer before that is needed, with blocks behind it: what is removed on a volume
that is full can be logged, and makes room there. When these are used up too, a removal needs no more
room: it overwrites a record that says that nothing up to its stamp is to be trusted (`FLOOR` without a
checkpoint). If the index is lost before the next checkpoint, all of that is lost with it, so nothing
that was removed comes back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..concurrency.file_locks import has_name
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import new_long_lock
from ..errors import from_os_error, is_volume_full
from . import format as f
from .cache_files import CacheFiles
from .current import CurrentIndex
from .index import Index
from .limits import Limits
from .locking import Locks
from .notices import Notices
from .segment import void_record
from .segment_table import SegmentTable

_STEP_SHARE = 64  # a log grows by 1/64 of the limit at a time,
_LEAST_STEP, _MOST_STEP = 1 << 12, 1 << 16
LOG_AHEAD = _LEAST_STEP // 2  # bytes kept free behind the last record, for when a volume is full
_RESERVE = 2 * f.RECORD_BYTES  # at a log's end, for two floors in turn: if one is torn, the other is left
_OVERDUE = 1 << 16  # changes that make a checkpoint due


class Mark(NamedTuple):
    """A place in the log, up to which it is to be made durable."""

    segment: int
    end: int


class ChangeLog:
    """One handle's access to the log. "The lock" is the index lock."""

    def __init__(
        self, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex, table: SegmentTable,
        notices: Notices,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._limits, self._current = locks, files, limits, current
        self._table, self._notices = table, notices
        self._segment, self._fd = 0, -1
        self._syncing = new_long_lock()
        self._synced = Mark(0, 0)
        limits.follow(self._follow_limits)

    def _follow_limits(self) -> None:
        step = self._limits.size_limit // _STEP_SHARE & -_LEAST_STEP
        self._step = min(max(step, _LEAST_STEP), _MOST_STEP)

    @property
    def _index(self) -> Index:
        return self._current.index

    @property
    def segment(self) -> int:
        """The log that is written to; 0 if there is none. The lock is held."""
        segment: int = self._index.words[f.W_LOG]
        return segment if self._index.state(segment) == f.LOG else 0

    @property
    def size(self) -> int:
        """How long the log has become since the newest checkpoint began."""
        segment = self.segment
        return self._index.words[self._index.entry(segment) + f.T_TAIL] if segment else 0

    @property
    def total_size(self) -> int:
        """Bytes of this log, and of those before it that no checkpoint covers yet."""
        index = self._index
        logs = [entry for entry in index.table_entries() if index.words[entry] & ~f.MASK32 == f.LOG]
        closed = sum(index.words[entry + f.T_SIZE] for entry in logs if index.words[entry + f.T_CLOSED])
        return self.size + closed

    @property
    def opened(self) -> tuple[int, int]:
        """(descriptor, id) of the log that this handle wrote to last, for compiled code."""
        return self._fd, self._segment

    # -- writing (the lock is held) -----------------------------------------------------------

    def append(self, kind: int, payload: bytes, stamp: int) -> Mark:
        """Log a change, before it is made. If that fails, nothing has happened."""
        try:
            segment = self._open()
            index = self._index  # not before: its table may have become larger
            entry = index.entry(segment)
            start = index.words[entry + f.T_TAIL]
            record = f.pack_change(
                index.identity.seed, f.pack_place(segment, start), kind, payload, stamp
            )
            end = start + len(record)
            if not self._allocate(segment, end):
                return self._distrust(segment, stamp)
            try:
                self._files.backend.write(self._fd, [record], start)
            except ours(OSError):  # a recovery would find the part that was written
                with suppressing(OSError):
                    self._files.backend.truncate(self._fd, start)
                    index.resize_segment(segment, start)
                raise
        except ours(OSError) as error:
            raise from_os_error(error, "cannot log a change") from error
        if end > index.words[entry + f.T_SIZE]:
            index.resize_segment(segment, end)
        index.words[entry + f.T_TAIL] = end
        index.add(f.W_WRITTEN, 1)
        return Mark(segment, end)

    def remove(self, digests: Sequence[tuple[int, int]], stamp: int) -> Mark:
        """Log the removal of digests. Nothing older is shown under them any more, should we be killed now."""
        mark = self.append(f.REMOVE, b"".join(f.pack_digest(*digest) for digest in digests), stamp)
        for _, high in digests:
            self._index.words[f.W_DELETED + (high & f.PARTITION_MASK)] = stamp
        return mark

    def take_back(self, mark: Mark, length: int) -> None:
        """Void the last record, of `length` bytes, that ends at `mark`: its change was not made.
        (If there was no room for it, nothing is trusted, and that cannot be taken back.)"""
        if mark.segment == self._segment and mark.end < f.MASK64:
            index, start = self._index, mark.end - length
            try:
                void_record(self._files.backend, self._fd, start)
            except ours(OSError) as error:
                line = f"cannot take back a change that failed, an index made anew will make it: {error}"
                return self._notices.log_once("untaken", line)
            index.words[index.entry(mark.segment) + f.T_TAIL] = start

    def _allocate(self, segment: int, end: int) -> bool:
        """Keep the file longer than `end`. On a full volume, use what it has, except for the reserve; False
        if that is not enough."""
        size = self._index.words[self._index.entry(segment) + f.T_SIZE]
        if end + LOG_AHEAD > size:
            step = max(self._step, end + LOG_AHEAD - size)
            try:
                self._files.backend.allocate(self._fd, size, step)
            except ours(OSError) as error:
                return not is_volume_full(error) or end + _RESERVE <= size
            self._index.resize_segment(segment, size + step)
        return True

    def _distrust(self, segment: int, stamp: int) -> Mark:
        """There is no room for a change: instead, note that nothing up to its stamp is to be trusted.

        That takes the reserve; once it is used up, it replaces the older of the two floors in there.
        """
        index = self._index
        # First: what is being stored just now gets a later stamp, so that it is trusted.
        index.words[f.W_EPOCH] = max(index.words[f.W_EPOCH], stamp)
        entry, seed = index.entry(segment), index.identity.seed
        end = index.words[entry + f.T_TAIL]
        floors = self._floors(segment, end)
        if floors is None:
            places, end = [end, end + f.RECORD_BYTES], end + _RESERVE
        else:
            places = [end - _RESERVE + f.RECORD_BYTES * (floors[1] < floors[0])]
        records = [f.pack_change(seed, f.pack_place(segment, at), f.FLOOR, b"", stamp) for at in places]
        self._files.backend.write(self._fd, records, places[0])
        index.words[entry + f.T_TAIL] = end
        index.words[f.W_WRITTEN] = max(index.words[f.W_WRITTEN], index.count() + _OVERDUE)
        return Mark(segment, f.MASK64)  # it may be overwritten: no earlier sync covers it

    def _floors(self, segment: int, end: int) -> tuple[int, int] | None:
        """The stamps of the two floors at the end of the log, 0 for one that is torn; None if there are
        other records."""
        if end < f.SEGMENT_HEADER_BYTES + _RESERVE:
            return None
        data, stamps = self._files.backend.read(self._fd, _RESERVE, end - _RESERVE), []
        for at in range(0, _RESERVE, f.RECORD_BYTES):
            head, place = f.unpack_head(data, at), f.pack_place(segment, end - _RESERVE + at)
            sound = head is not None and f.verify_head(data, at, head, self._index.identity.seed, place)
            if head is not None and sound and head.kind != f.FLOOR:
                return None
            stamps.append(head.stamp if head is not None and sound else 0)
        first, second = stamps
        return (first, second) if first or second else None

    def prepare(self) -> None:
        """Have a log, with room in it, before anything is stored that may have to be removed."""
        try:
            segment = self._open()
            self._allocate(segment, self.size)
        except ours(OSError) as error:
            if is_volume_full(error):  # any other failure is raised by the removal itself
                raise

    def _open(self) -> int:
        """The log to write to, open in `_fd`; a new one if there is none, or its file is gone."""
        segment = self.segment
        if segment and not self._ends_within(segment):
            self._notices.log_once("log", "the log of changes ends nowhere: a new one is begun")
            self.retire(segment)
            segment = 0
        if segment and segment == self._segment:
            return segment
        if segment:
            try:
                self._use(segment, self._files.backend.open(self._files.segments.path(segment), os.O_RDWR))
                return segment
            except FileNotFoundError:
                self._notices.log_once("log", "the log of changes is missing: a new one is begun")
                self.retire(segment)
        try:
            return self._begin()
        except ours(OSError) as error:
            if not is_volume_full(error) or not (closed := self._newest_closed()):
                raise
            self._use(closed, self._files.backend.open(self._files.segments.path(closed), os.O_RDWR))
            index = self._index
            index.words[index.entry(closed) + f.T_CLOSED] = 0
            index.words[f.W_LOG] = closed
            return closed

    def _ends_within(self, segment: int) -> bool:
        """Whether the index says that a log ends where it can."""
        words, entry = self._index.words, self._index.entry(segment)
        tail, size = words[entry + f.T_TAIL], words[entry + f.T_SIZE]
        return f.SEGMENT_HEADER_BYTES <= tail <= min(size, f.MASK32 * f.ALIGN) and not tail % f.ALIGN

    def _newest_closed(self) -> int:
        """The log that was closed last: on a full volume it is used again. 0 if there is none."""
        index = self._index
        closed = [
            (index.words[entry + f.T_CLOSED], index.words[entry] & f.MASK32)
            for entry in index.table_entries()
            if index.words[entry] & ~f.MASK32 == f.LOG and index.words[entry + f.T_CLOSED]
        ]
        return max(closed, default=(0, 0))[1]

    def _begin(self) -> int:
        segment, fd = self._table.new_file()
        index = self._index  # not before: its table may have become larger
        created = index.stamp()
        try:
            header = f.pack_segment_header(segment, index.identity, created, index.words[f.W_FLOOR], log=True)
            self._files.backend.allocate(fd, 0, self._step)
            self._files.backend.write(fd, [header], 0)
            index.words[index.add_segment(segment, f.LOG, self._step, 0, created) + f.T_TAIL] = len(header)
        except BaseException:
            self._table.give_up(segment, fd)
            raise
        index.words[f.W_LOG] = segment
        self._use(segment, fd)
        return segment

    def _use(self, segment: int, fd: int) -> None:
        self._segment, self._fd, old = segment, fd, self._fd
        if old >= 0:
            self._files.backend.let_go(old)

    # -- durability ---------------------------------------------------------------------------

    def sync(self, mark: Mark) -> None:
        """Make everything before `mark` durable. Callers that wait together share one sync."""
        with self._syncing:
            known = self._synced
            if known.segment == mark.segment and known.end >= mark.end:
                return
            with self._locks.index:
                index = self._current.index
                same = index.state(mark.segment) == f.LOG
                reached = index.words[index.entry(mark.segment) + f.T_TAIL] if same else mark.end
            try:
                with self._files.segments.reading(mark.segment) as fd:
                    self._files.backend.sync(fd)
            except FileNotFoundError:
                return  # a checkpoint covers it, and is durable
            if known.segment != mark.segment:  # another handle may have begun it, without syncing its name
                self._files.sync_directory(self._files.segments.directory)
            self._synced = Mark(mark.segment, reached)

    # -- checkpoints (the lock is held) ---------------------------------------------------------

    def rotate(self, floor: int) -> None:
        """A checkpoint begins that covers changes up to `floor`: the next one goes to a new file.

        If the log has no changes, it stays: the segments alone tell everything.
        """
        if self.size > f.SEGMENT_HEADER_BYTES:
            segment = self._begin()  # first: if there is no room for it, removals go on in the old one
            index = self._index
            for entry in index.table_entries():  # also one whose rotation a death cut short
                is_old = index.words[entry] & ~f.MASK32 == f.LOG and index.words[entry] & f.MASK32 != segment
                if is_old and not index.words[entry + f.T_CLOSED]:
                    index.words[entry + f.T_CLOSED] = floor

    def retire(self, segment: int) -> None:
        """A log is damaged: nothing more is written to it, and the next checkpoint covers it."""
        if segment == self.segment:
            self._index.words[self._index.entry(segment) + f.T_CLOSED] = self._index.stamp()
            self._index.words[f.W_LOG] = 0

    def cover(self, floor: int) -> None:
        """The checkpoint of `floor` is durable: the logs that it covers go.

        The current log notes the floor first: if the checkpoint is lost, nothing up to it can be trusted.
        """
        index = self._index
        covered = [
            entry
            for entry in index.table_entries()
            if index.words[entry] & ~f.MASK32 == f.LOG and 0 < index.words[entry + f.T_CLOSED] <= floor
        ]
        if covered:
            self.append(f.FLOOR, b"", floor)
        for entry in covered:
            index.words[entry] = f.DOOMED | index.words[entry] & f.MASK32

    # -- life -----------------------------------------------------------------------------------

    def ensure_in_place(self) -> None:
        """Write to the file that has the name, or to a new log if none has. The lock is held."""
        if self._fd >= 0 and not has_name(self._fd, self._files.segments.path(self._segment)):
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._fd, fd = -1, self._fd
            self._segment = 0
            self._files.backend.let_go(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:  # an exception came before it was closed
            self._files.backend.let_go(self._fd)

    def after_fork(self) -> None:
        """The descriptor may be shared: every write names its place. Locks and syncs may not."""
        self._syncing = new_long_lock()
