"""Walks over all that there is, segment by segment."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .core import PythonCore
from .current import CurrentIndex
from .finding import Finding
from .format import Slot
from .life import Life
from .segment import Footer, Record, footer_of, read_records, scan_by
from .unreadable import is_absence, told


class _NotPlain(Exception):
    """Compiled code leaves a segment to the ordinary way."""


class Walks:
    """Records with their names, and the slots that show them."""

    def __init__(
        self, life: Life, files: CacheFiles, current: CurrentIndex, finding: Finding, core: PythonCore
    ) -> None:
        self._life, self._files, self._current, self._finding = life, files, current, finding
        self._core = core

    def entries(self, prefix: bytes = b"") -> Iterator[tuple[bytes, Slot]]:
        """Every live entry whose encoded key begins with `prefix`, expired or not: that key, and its slot.

        Segment by segment, from the footers. Entries written during the walk are left out, so that it ends.
        None appears twice.
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
                for key, slot in self._shown_in(segment, prefix, started):
                    if slot.low not in seen and slot.stamp <= started:
                        seen.add(slot.low)
                        yield key, slot

    def _shown_in(self, segment: int, prefix: bytes, before: int) -> Iterator[tuple[bytes, Slot]]:
        """The entries whose records are in a segment; some of them twice, if compiled code gives up on it."""
        try:
            yield from self._shown_by_core(segment, prefix, before)
        except _NotPlain:
            for record in self.records(segment):
                if record.key.startswith(prefix) and (slot := self.alive(record, segment)) is not None:
                    yield record.key, slot

    def _shown_by_core(self, segment: int, prefix: bytes, before: int) -> Iterator[tuple[bytes, Slot]]:
        def look(data: bytes, base: int, at: int) -> tuple[list[tuple[bytes, tuple[int, ...]]], int]:
            done = self._core.walk_records(data, base, at, segment, prefix, before)
            if done is NotImplemented:
                raise _NotPlain
            found, end, _ = done
            return found, end

        try:  # a descriptor of its own: shared ones may be closed while the caller takes its time
            with self._files.segments.reading(segment) as fd:
                footer = footer_of(self._files.backend, fd)
                if footer is not None:
                    shown = self._listed_by_core(footer, segment, prefix, before)
                else:
                    shown = scan_by(look, self._files.backend, fd)
                for key, slot in shown:
                    yield key, Slot._make(slot)
        except ours(OSError) as error:
            if not is_absence(error):
                raise told(error, "a segment") from error

    def _listed_by_core(
        self, footer: Footer, segment: int, prefix: bytes, before: int
    ) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        at = count = 0
        while at < len(footer.entries):
            done = self._core.walk_footer(footer.entries, footer.tail, at, segment, prefix, before)
            if done is NotImplemented:
                raise _NotPlain
            found, at, looked = done
            count += looked
            yield from found
        if count != footer.records:
            raise _NotPlain

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
