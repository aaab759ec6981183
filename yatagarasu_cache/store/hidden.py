"""Segment files whose header cannot be read, and is given up while an index is made anew.

Their entries are dropped. But if one is a log, it said what was removed, and that must not be missing
unnoticed: so anything is used that tells segments from logs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .checkpoint import Checkpoint
from .format import SLOT_WORDS, SegmentHeader
from .index import Index
from .segment import Record, read_footer, scan
from .unreadable import Sparing, is_absence, is_given_up

_DATA = frozenset({f.ACTIVE, f.SEALED, f.TAKEN})
_CHANGES = frozenset({f.REMOVE, f.CLEAR, f.TOUCH})


class Hidden:
    """What is known of such files. `headers` are those of the cache that can be read."""

    def __init__(
        self, files: CacheFiles, identity: f.Identity, headers: dict[int, SegmentHeader],
        saved: Checkpoint | None, old: Index | None,
    ) -> None:  # fmt: skip
        self._files, self._identity, self._headers, self._old = files, identity, headers, old
        self._saved = set() if saved is None else _segments_in(saved)

    def header(self, segment: int, size: int) -> SegmentHeader:
        """A header that says what is known. Its stamps are 0: it is before all others."""
        log = self._may_be_log(segment, size)
        return SegmentHeader(f.FORMAT_VERSION, segment, self._identity, 0, 0, log)

    def _may_be_log(self, segment: int, size: int) -> bool:
        """Numbers are given out once: whatever knows this one as a segment is believed."""
        if segment in self._saved:
            return False
        if self._old is not None and self._old.state(segment):
            return self._old.state(segment) not in _DATA
        with contextlib.closing(readable(self._files, segment, self._identity)) as records:
            for record in records:
                return record.head.kind > f.LARGE
        if size % f.ALIGN:  # it ends with a footer
            return False
        return not self._is_within_log(segment)

    def _is_within_log(self, segment: int) -> bool:
        """Whether a log before it was written to after it was begun: then it is no log itself."""
        begun = min((h.created for s, h in self._headers.items() if s > segment), default=f.MAX_STAMP)
        logs = [log for log, header in self._headers.items() if header.log and log < segment]
        return any(self._last_change(log) > begun for log in logs)

    def _last_change(self, log: int) -> int:
        records = readable(self._files, log, self._identity)
        return max((r.head.stamp for r in records if r.head.kind in _CHANGES), default=0)


def _segments_in(saved: Checkpoint) -> set[int]:
    """The segments that a checkpoint knows."""
    places = (memoryview(part).cast("Q")[f.S_PLACE :: SLOT_WORDS] for part in saved.parts)
    return {*saved.sealed, *(place >> 32 for part in places for place in part)}


def readable(files: CacheFiles, segment: int, identity: f.Identity) -> Generator[Record, None, None]:
    """What can be read of a file: the records that its footer lists, and those that a scan finds."""
    reader = Sparing(files.backend)
    try:
        with files.segments.reading(segment) as fd:
            yield from read_footer(reader, fd) or ()
            yield from scan(reader, fd, segment, identity.seed)
    except ours(OSError) as error:
        if not is_absence(error) and not is_given_up(error):
            raise
