"""Every segment in the table has its file, and other files are told apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ...concurrency.cancelling import ensure_wanted
from ...concurrency.interruption import ours
from .. import format as f
from .. import unreadable
from ..active import ActiveSegment
from ..cache_files import CacheFiles
from ..changes import ChangeLog
from ..checkpointing import Checkpoints
from ..chunks import PIECE_BYTES
from ..current import CurrentIndex
from ..directory import content
from ..format import Slot
from ..limits import Limits
from ..locking import Locks
from ..removal import Removal
from ..segment import footer_entry, pack_footer, read_footer, read_segment_header, scan
from .entries import EntryCheck
from .problem import Problem, Unreadable, fault_of, mends

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # more than any count can reach


class SegmentCheck:
    """Every segment in the table has its file, and other files are told apart."""

    def __init__(
        self, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex, active: ActiveSegment,
        changes: ChangeLog, removal: Removal, checkpoints: Checkpoints, entries: EntryCheck,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._limits, self._current = locks, files, limits, current
        self._active, self._changes, self._removal = active, changes, removal
        self._checkpoints = checkpoints
        self._entries = entries

    def segments(self, fix: bool) -> Iterator[Problem]:
        """Every segment in the table has its file, and the file is the one that the table means."""
        changes_lost = False
        for segment in self._current.index.segments() + self._current.index.logs():
            ensure_wanted()
            if not self._segment_problem(segment):
                continue
            with self._locks.appending, self._locks.index:  # it may have been sealed while we looked
                detail = self._segment_problem(segment)
                if not detail or self._current.index.state(segment) in (0, f.DOOMED):
                    continue
                is_mended = mends(fix, detail)
                if is_mended and self._current.index.state(segment) == f.LOG:
                    self._changes.retire(segment)
                    changes_lost = True
                elif is_mended:
                    self._mend_segment(segment, detail)
                yield Problem("segment", f.segment_name(segment), detail, is_mended)
        if changes_lost:  # the log is, but not its effects: a checkpoint keeps these, and drops the log
            self._checkpoints.write()

    def _mend_segment(self, segment: int, detail: str) -> None:
        """Drop what is lost of a segment, and put the rest in order. Both locks are held."""
        index = self._current.index
        entry = index.entry(segment)
        self._files.segments.forget(segment)
        if self._active.writer is not None and self._active.writer.segment == segment:
            writer, self._active.writer = self._active.writer, None
            writer.abandon()
        for at in list(index.live_slots()):
            slot = index.slot(at)
            if slot.segment == segment and not index.leads_to(at):
                index.remove(at)
            elif (
                slot.segment == segment and (problem := self._entries.problem(slot)) and mends(True, problem)
            ):
                self._removal.drop_corrupt(slot)
        path = self._files.segments.path(segment)
        if isinstance(detail, Unreadable) and index.slots_in(segment) and not self._made_readable(segment):
            for slot in index.slots_in(segment):
                self._removal.drop_corrupt(slot)
        # Not by the count of live bytes, which may be damaged too.
        if index.slots_in(segment):
            with self._files.backend.opened(path, os.O_RDWR) as fd:
                self._files.backend.write(fd, [self._header_of(segment)], 0)
                size = os.fstat(fd).st_size
            index.resize_segment(segment, size)
            index.words[entry + f.T_SYNCED] = 0
            index.set_state(segment, f.SEALED)
            index.words[entry + f.T_OWNER] = 0  # last: no death in between leaves an active one without owner
        else:
            with contextlib.suppress(IsADirectoryError, PermissionError):  # a directory is none of ours
                self._files.backend.unlink(path)
            index.drop_segment(segment)

    def _header_of(self, segment: int) -> bytes:
        index = self._current.index
        created = index.words[index.entry(segment) + f.T_CREATED]
        return f.pack_segment_header(segment, index.identity, created, index.words[f.W_FLOOR])

    def _made_readable(self, segment: int) -> bool:
        """Make all of a segment readable again, for walks and for its entries. False if that can't be done.

        Both locks are held.
        """
        kept = self._current.index.slots_in(segment)
        for cure in (self._overwrite, self._list_anew):
            try:
                with self._files.backend.opened(self._files.segments.path(segment), os.O_RDWR) as fd:
                    cure(fd, kept)
                    self._files.backend.write(fd, [self._header_of(segment)], 0)
            except ours(OSError) as error:
                if not unreadable.is_of_disk(error):
                    raise
                continue
            if not isinstance(self._segment_problem(segment), Unreadable):
                return True
        return False

    def _overwrite(self, fd: int, kept: list[Slot]) -> None:
        """Overwrite what cannot be read of a segment, except where an entry is."""
        reader = unreadable.Sparing(self._files.backend)
        reader.look_through(fd)
        reader.overwrite(fd, [(slot.offset, slot.offset + f.record_bytes(slot.lengths)) for slot in kept])

    def _list_anew(self, fd: int, kept: list[Slot]) -> None:
        """Have the footer list just these entries, so that nobody reads what is between them."""
        entries, tail = [], f.SEGMENT_HEADER_BYTES
        for slot in sorted(kept, key=lambda slot: slot.offset):
            length = slot.head_bytes + f.LARGE_POINTER.size * slot.is_large
            data = self._files.backend.read(fd, length, slot.offset)
            entries.append(footer_entry(slot.offset, data[: slot.head_bytes], data[slot.head_bytes :]))
            tail = slot.offset + f.record_bytes(slot.lengths)
        self._files.backend.truncate(fd, tail)
        self._files.backend.write(fd, [pack_footer(entries, tail)], tail)

    def _segment_problem(self, segment: int) -> str:
        try:
            with self._files.segments.reading(segment) as fd:
                return self._content_problem(segment, fd)
        except ours(OSError) as error:
            return fault_of(error)

    def _content_problem(self, segment: int, fd: int) -> str:
        header = read_segment_header(self._files.backend, fd)
        if header is None:
            return "its header is damaged"
        state = self._current.index.state(segment)
        if (header.identity, header.segment, header.log) != (
            self._current.index.identity,
            segment,
            state == f.LOG,
        ):
            return "it belongs to another place or another cache"
        entry = self._current.index.entry(segment)
        expected = self._current.index.words[entry + (f.T_TAIL if state == f.LOG else f.T_SIZE)]
        size = os.fstat(fd).st_size
        if state != f.LOG and read_footer(self._files.backend, fd) is None:  # walks read all of it
            for offset in range(0, min(size, max(expected, self._limits.segment_bytes)), PIECE_BYTES):
                self._files.backend.read(fd, PIECE_BYTES, offset)
        if state == f.SEALED and size != expected and not self._current.index.words[entry + f.T_OWNER]:
            return f"it has {size} bytes instead of {expected}"
        if state == f.LOG and (end := self._sound_bytes(fd, segment)) < expected:
            return f"its changes can be read up to {end} of {expected} bytes"
        return ""

    def _sound_bytes(self, fd: int, segment: int) -> int:
        """Where the first unsound record of a log begins."""
        end = f.SEGMENT_HEADER_BYTES
        for record in scan(self._files.backend, fd, segment, self._current.index.identity.seed):
            if record.offset != end:
                break
            end += record.head.record_bytes
        return end

    def strays(self, fix: bool) -> Iterator[Problem]:
        """Segment files are in the table; other names in our directories are not ours, and are left alone."""
        for name in content(self._files.scandir(self._files.segments.directory)):
            segment = f.parse_segment_name(name)
            if segment is None:
                yield Problem("stray", name, "not a file of this cache: left alone")
            else:
                with self._locks.index:
                    unknown = not self._current.index.state(segment) and self._files.backend.exists(
                        self._files.segments.path(segment)
                    )
                if unknown:
                    yield self._unlisted(segment, fix)

    def _unlisted(self, segment: int, fix: bool) -> Problem:
        """With `fix`, remove a segment file that is ours; leave one of another cache alone."""
        path, header = self._files.segments.path(segment), None
        detail, name = "a segment that the index does not list", f.segment_name(segment)
        try:
            with self._files.backend.reading(path) as fd:
                header = read_segment_header(self._files.backend, fd)
        except ours(OSError) as error:
            if unreadable.is_absence(error):
                return Problem("stray", name, detail)
            detail = fault_of(error)
        is_ours = header is None or header.identity == self._current.index.identity
        return Problem(
            "stray", name, detail, is_ours and mends(fix, detail) and self._files.backend.unlink(path)
        )
