"""The segment that this handle appends to, and what of it counts."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .current import CurrentIndex
from .index import APPENDABLE, Index, IndexDamaged
from .locking import Locks
from .notices import Notices
from .owners import Owner
from .segment import Record, SegmentWriter, scan


class ActiveSegment:
    """At most one. `writer` is changed where `appending` is held."""

    def __init__(
        self, locks: Locks, files: CacheFiles, owner: Owner, current: CurrentIndex, notices: Notices,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._owner, self._current = locks, files, owner, current
        self._notices = notices
        self.writer: SegmentWriter | None = None
        self.has_written = False  # it has had a writer
        self.syncs = False  # when they are sealed: somebody may wait for that
        current.on_use(self._on_index)

    @property
    def _index(self) -> Index:
        return self._current.index

    def _on_index(self, _: Index) -> None:
        if self.writer is not None:  # an index made anew counts what is written: more is granted anew
            self.writer.granted = self.writer.tail

    def seal(self) -> None:
        """Close the active segment for good. `appending` is held."""
        writer = self.writer
        if writer is None:
            return
        self._take_back_own(writer)  # first: if waiting for the lock is given up there, it goes on
        self.writer = None
        try:
            size = writer.seal()
        except ours(OSError) as error:  # without its footer it will be read through instead
            size = os.fstat(writer.fd).st_size
            self._notices.log_once("footer", f"cannot write a footer: {error}")
        durable = self.syncs
        try:
            writer.close(sync=durable)
        except ours(OSError) as error:  # whoever waits for this sync gets an error as well
            durable = False
            self._notices.log_once("seal", f"cannot make a segment durable: {error}")
        with self._locks.index:
            if self.is_ours(writer):
                self._index.resize_segment(writer.segment, size)
                entry = self._index.entry(writer.segment)
                if durable:
                    self._index.words[entry + f.T_SYNCED] = size
                self._index.set_state(writer.segment, f.SEALED)
                self._index.words[entry + f.T_OWNER] = 0  # last: an active one without owner stays so

    def _take_back_own(self, writer: SegmentWriter) -> None:
        """Before our segment is sealed: what was appended, and was not shown, never will be."""
        try:
            with self._locks.index:
                index = self._index
                tail = index.words[index.entry(writer.segment) + f.T_TAIL]
                if tail != writer.tail and index.state(writer.segment) in APPENDABLE:
                    index.set_state(writer.segment, f.SEALED)  # nobody shows it while it is taken back
                    self.take_back(writer.segment, writer.fd, writer.void)
        except ours(OSError) as error:
            self._notices.log_once("unshown", f"cannot take back what was not stored: {error}")

    def take_back(self, segment: int, fd: int, void: Callable[[int], None]) -> bool:
        """Void the records of a segment that the index does not show (`void`, by offset). The lock is held.

        Puts that did not come to an end left them. A rebuild would find them, even after a caller was told
        that there is nothing to remove. Returns whether there were any.
        """
        unshown = self._unshown(segment, fd)
        for offset in unshown:
            void(offset)
        return bool(unshown)

    def _unshown(self, segment: int, fd: int) -> list[int]:
        index = self._index
        settled = max(index.words[index.entry(segment) + f.T_TAIL], f.SEGMENT_HEADER_BYTES)
        try:
            index.validate()
            records = scan(self._files.backend, fd, segment, self._current.seed, settled)
            return [record.offset for record in records if self._is_unshown(record)]
        except IndexDamaged as error:  # what cannot be found is not lost: the rebuild shows it
            self._current.rebuild(str(error))
            return []

    def _is_unshown(self, record: Record) -> bool:
        if record.head.kind > f.LARGE:
            return False
        at = self._index.find(*record.digest(self._current.seed))
        return not at or self._index.words[at + f.S_STAMP] < record.head.stamp

    def may_show(self, segment: int) -> bool:
        """True of an active segment of ours: what was appended to it counts. The lock is held."""
        index = self._index
        if index.state(segment) != f.ACTIVE:
            return False
        token = self._owner.token
        return bool(token and index.words[index.entry(segment) + f.T_OWNER] == token)

    def is_ours(self, writer: SegmentWriter) -> bool:
        """True unless our segment is gone, or was sealed by who believed us dead. The lock is held."""
        state, owner = (
            self._index.state(writer.segment),
            self._index.entry(writer.segment) + f.T_OWNER,
        )
        known = state in APPENDABLE or state == f.SEALED
        return known and self._index.words[owner] == self._owner.token != 0

    @property
    def own_end(self) -> tuple[int, int]:
        """(id of our active segment, where it ends), for `others_append`; zeros if there is none."""
        writer = self.writer
        return (writer.segment, writer.tail) if writer is not None else (0, 0)

    def others_append(self) -> bool:
        """True if there may be records that the index does not show, of others or of our own puts.

        Whoever removes a key that has no slot must log that then: if those writers die, a rebuild finds
        their records, and must not bring back what came before.
        """
        index, (segment, tail) = self._index, self.own_end
        settled = index.state(segment) == f.ACTIVE and index.words[index.entry(segment) + f.T_TAIL] == tail
        return bool(index.words[f.W_ACTIVE] > settled)

    def let_go_if_lost(self, writer: SegmentWriter) -> None:
        """Stop appending to a segment that others took, for its room or because they believed us dead."""
        with self._locks.appending:
            if self.writer is not writer:
                return
            with self._locks.index:
                active, ours = self._index.state(writer.segment) == f.ACTIVE, self.is_ours(writer)
            if ours and not active:
                self.seal()
            elif not ours:
                self.writer = None
                writer.abandon()

    def abandon(self) -> None:
        """There was no closing it in order."""
        if self.writer is not None:
            self.writer.abandon()

    def after_fork(self) -> None:
        """It is the parent's."""
        writer, self.writer, self.has_written = self.writer, None, False
        if writer is not None:
            writer.after_fork()
