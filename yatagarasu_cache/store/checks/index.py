"""What the index says: its words, its counts, and the files that its table lists."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from ...concurrency.interruption import ours
from .. import checkpoint
from .. import format as f
from ..cache_files import CacheFiles
from ..current import CurrentIndex
from ..directory import content
from ..format import PARTITIONS
from ..index import APPENDABLE, Index, IndexDamaged, is_overlong
from ..life import Life
from ..locking import Locks
from ..segment import read_segment_header, scan
from .problem import Problem

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # more than any count can reach


class IndexCheck:
    """What the index says: its words, its counts, and the files that its table lists."""

    def __init__(self, life: Life, locks: Locks, files: CacheFiles, current: CurrentIndex) -> None:
        self._life, self._locks, self._files, self._current = life, locks, files, current

    def ensure_listed(self) -> None:
        """Raise `IndexDamaged` if the table does not list a segment that is there and has entries.

        Otherwise the segment would be taken for a stray, and removed. The lock is held.
        """
        index = self._current.index
        for segment in index.named_segments():
            if not index.state(segment) and self._files.backend.exists(self._files.segments.path(segment)):
                raise IndexDamaged("its table does not list a segment that entries are in")

    def ensure_counted(self) -> None:
        """Raise `IndexDamaged` if a segment counts more bytes than live in it: slots were damaged.

        A new index shows their entries again. Otherwise their segment would be removed, and what these
        entries had replaced could come back.
        """
        index = self._current.index
        live = _live_bytes(index)
        for entry in index.table_entries():
            segment = index.words[entry] & f.MASK32
            if index.words[entry + f.T_LIVE] > live[segment]:
                raise IndexDamaged(f"{f.segment_name(segment)} has fewer entries than it counts")

    def ensure_all_listed(self) -> None:
        """Raise `IndexDamaged` if a file that the table does not list has records of this cache.

        If it is a log, what its records say was removed could come back.
        """
        for name in content(self._files.scandir(self._files.segments.directory)):
            segment = f.parse_segment_name(name)
            if segment is not None and not self._current.index.state(segment) and self._has_records(segment):
                raise IndexDamaged(f"its table does not list {name}, which has records")

    def _has_records(self, segment: int) -> bool:
        try:
            with self._files.backend.reading(self._files.segments.path(segment)) as fd:
                header = read_segment_header(self._files.backend, fd)
                return (
                    header is not None
                    and (header.segment, header.identity) == (segment, self._current.index.identity)
                    and next(scan(self._files.backend, fd, segment, self._current.seed), None) is not None
                )
        except ours(OSError):  # the check of strays tells of it
            return False

    def words(self, fix: bool) -> Iterator[Problem]:
        """The words of the header and of the segment table say what can be.

        (Others are checked where they are counted anew, or by `Index.validate`.)
        """
        with self._locks.index:
            index = self._current.index
            wrong = [*self._wrong_words(), *_wrong_table_words(index)]
            for word, value, what in wrong:
                yield Problem("count", f"{f.INDEX_NAME}, word {word}", f"{what} is {index.words[word]}", fix)
                if fix:
                    index.words[word] = value
            if fix:  # a process may have died after growing it and before counting that
                index.words[f.W_INDEX_BYTES] = os.fstat(index.fd).st_size

    def _wrong_words(self) -> Iterator[tuple[int, int, str]]:
        """(word, right value, meaning) of the header's words that make no sense. The lock is held."""
        index, words = self._current.index, self._current.index.words
        clock, latest = words[f.W_CLOCK], words[f.W_CLOCK] + _CLOCK_SLACK
        for i, name in enumerate(f.COUNTERS):
            if words[f.W_COUNTERS + i] > _MOST_COUNTED:
                yield f.W_COUNTERS + i, 0, f"the number of {name}"
        for part in range(PARTITIONS):
            if words[f.W_DELETED + part] > latest:
                yield f.W_DELETED + part, clock, "when something was removed last"
        if words[f.W_WRITTEN] > _MOST_COUNTED:
            yield f.W_WRITTEN, checkpoint.OVERDUE, "what was written since the checkpoint"
        if words[f.W_FLUSHED] > latest:
            yield f.W_FLUSHED, 0, "up to when large files are durable"
        if words[f.W_PROMISED] > 1:
            yield f.W_PROMISED, 1, "whether durability was promised"
        if words[f.W_LOG] and index.state(words[f.W_LOG]) != f.LOG:
            yield f.W_LOG, 0, "the log that is written to"
        if self._life.read_only:
            return
        if words[f.W_CLEAN]:
            yield f.W_CLEAN, 0, "whether nobody has it open"
        said, size = words[f.W_INDEX_BYTES], os.fstat(index.fd).st_size
        if said > size or is_overlong(size, said):
            yield f.W_INDEX_BYTES, size, "the index's length"
        for word, number in enumerate(index.file(), f.W_FILE):
            if words[word] != number:
                yield word, number, "which file the index is"

    def counts(self, fix: bool) -> Iterator[Problem]:
        """The index's counts are those of its slots."""
        for part in range(PARTITIONS):
            with self._locks.index:
                index = self._current.index
                lows = index.column(index.partition_slots(part), 0)
                live = sum(low > f.REMOVED for low in lows)
                used = live + lows.count(f.REMOVED)
                counted = index.words[f.W_COUNTS + part]
                if counted != live << 32 | used:
                    if fix:
                        index.recount(part)
                    where = f"{f.INDEX_NAME}, partition {part}"
                    yield Problem("count", where, f"counts {counted >> 32}, has {live}", fix)

    def space(self, fix: bool) -> Iterator[Problem]:
        """Live bytes of each segment, and the totals, are right."""
        with self._locks.index:
            index = self._current.index
            live = _live_bytes(index)
            for entry in index.table_entries():
                segment = index.words[entry] & f.MASK32
                if index.words[entry + f.T_LIVE] != live[segment]:
                    detail = f"{index.words[entry + f.T_LIVE]} live bytes counted, {live[segment]} found"
                    if fix:
                        index.words[entry + f.T_LIVE] = live[segment]
                    yield Problem("space", f.segment_name(segment), detail, fix)
            counted, active = index.words[f.W_ACTIVE], index.count_active()
            if counted != active:
                if fix:
                    index.words[f.W_ACTIVE] = active
                yield Problem("count", f.INDEX_NAME, f"counts {counted} active segments, has {active}", fix)
            taken, slack = index.segment_bytes()
            totals = ((f.W_LIVE_BYTES, sum(live.values())), (f.W_SEGMENT_BYTES, taken), (f.W_SLACK, slack))
            for word, total in totals:
                if index.words[word] != total:
                    yield Problem(
                        "space", f.INDEX_NAME, f"{index.words[word]} bytes counted, {total} found", fix
                    )
                    if fix:
                        index.words[word] = total


def _live_bytes(index: Index) -> Counter[int]:
    """Live bytes in each segment, going by the slots. The lock is held."""
    live: Counter[int] = Counter()
    for at in index.live_slots():
        slot = index.slot(at)
        live[slot.segment] += f.record_bytes(slot.lengths)
    return live


def _wrong_table_words(index: Index) -> Iterator[tuple[int, int, str]]:
    """The same for the segment table. The lock is held."""
    words, latest = index.words, index.words[f.W_CLOCK] + _CLOCK_SLACK
    for entry in index.table_entries():
        state, segment = words[entry] & ~f.MASK32, words[entry] & f.MASK32
        name = f.segment_name(segment)
        if words[entry + f.T_CREATED] > latest:
            yield entry + f.T_CREATED, words[f.W_CLOCK], f"when {name} was begun"
        tail, size = words[entry + f.T_TAIL], words[entry + f.T_SIZE]
        if state in APPENDABLE and (tail > size or tail % f.ALIGN):
            yield entry + f.T_TAIL, f.SEGMENT_HEADER_BYTES, f"up to where {name} is shown"
        if state == f.LOG:
            closed, is_open = words[entry + f.T_CLOSED], segment == words[f.W_LOG]
            if closed > latest or closed and is_open:
                yield entry + f.T_CLOSED, 0 if is_open else words[f.W_CLOCK], f"when {name} was closed"
        elif words[entry + f.T_SYNCED] > size:
            yield entry + f.T_SYNCED, 0, f"how much of {name} is durable"
