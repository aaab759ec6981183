"""Walks over all that there is, segment by segment."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .current import CurrentIndex
from .finding import Finding
from .format import Slot
from .life import Life
from .segment import Record, read_records
from .unreadable import is_absence, told


class Walks:
    """Records with their names, and the slots that show them."""

    def __init__(self, life: Life, files: CacheFiles, current: CurrentIndex, finding: Finding) -> None:
        self._life, self._files, self._current, self._finding = life, files, current, finding

    def entries(self) -> Iterator[tuple[Record, Slot]]:
        """Every live entry with the names in its record, segment by segment, from the footers.

        Entries written during the walk are left out, so that it ends. None appears twice.
        """
        self._life.ensure_open()
        if self._life.read_only:
            self._current.follow_path()
        started = max(time.time_ns(), self._current.index.words[f.W_CLOCK])
        seen: set[int] = set()
        done: set[int] = set()
        while True:
            self._life.ensure_open()
            todo = [s for s in self._current.index.segments() if s not in done]
            if not todo:
                return
            # What is moved goes to active segments: these last, and it is not missed.
            todo.sort(key=lambda segment: self._current.index.state(segment) == f.ACTIVE)
            for segment in todo:
                ensure_wanted()
                done.add(segment)
                for record in self.records(segment):
                    slot = self.alive(record, segment)
                    if slot is not None and slot.low not in seen and slot.stamp <= started:
                        seen.add(slot.low)
                        yield record, slot

    def records(self, segment: int) -> Generator[Record, None, None]:
        """The records of a segment, read as they are asked for; none if there is no such file."""
        try:  # a descriptor of its own: shared ones may be closed while the caller takes its time
            with self._files.segments.reading(segment) as fd:
                yield from read_records(self._files.backend, fd, segment, self._current.index.identity)
        except ours(OSError) as error:
            if not is_absence(error):
                raise told(error, "a segment") from error

    def alive(self, record: Record, segment: int) -> Slot | None:
        """The slot that shows this very record, expired or not."""
        if record.head.kind > f.LARGE:
            return None
        at = self._finding.find(*record.digest(self._current.index.identity.seed))
        if not at:
            return None
        slot = self._current.index.slot(at)
        return slot if slot.place == f.pack_place(segment, record.offset) else None
