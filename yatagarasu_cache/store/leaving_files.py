"""Large files whose entries were removed or replaced: they count until they are gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from ..concurrency.interruption import is_interruption, ours, suppressing
from ..errors import ClosedError
from . import format as f
from .cache_files import CacheFiles
from .changes import Mark
from .current import CurrentIndex
from .durability import Durability
from .format import Slot
from .locking import Locks
from .notices import Notices
from .reaping import Reaper
from .under_way import LargeFile, UnderWay


class Gone(NamedTuple):
    """Large files whose entries were removed or replaced by what stands before `mark`."""

    files: list[LargeFile]
    mark: Mark


class LeavingFiles:
    """Notes them before their entries go, and removes them afterwards."""

    def __init__(
        self, locks: Locks, files: CacheFiles, current: CurrentIndex, under_way: UnderWay,
        durability: Durability, reaper: Reaper, notices: Notices,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._current = locks, files, current
        self._under_way, self._durability, self._reaper = under_way, durability, reaper
        self._notices = notices

    def leaving(self, slots: Iterable[Slot]) -> list[LargeFile]:
        """Note the large files of entries that are about to be removed. The lock is held.

        Their bytes count until `discard` has removed the files.
        """
        files = self.files_of(slots)
        self._under_way.leave(files)
        return files

    def files_of(self, slots: Iterable[Slot]) -> list[LargeFile]:
        """The large files of these entries. The lock is held."""
        return [self._large_file(slot) for slot in slots if slot.is_large]

    def _large_file(self, slot: Slot) -> LargeFile:
        pointer = None
        with suppressing(OSError):  # the record is unreadable
            pointer = self._files.segments.pointer(slot)
        return LargeFile(slot.low, slot.high, pointer, f.file_bytes(slot.value_length))

    def discard(self, gone: Gone, *, synced: bool = False, large: bool = False) -> None:
        """Remove large files whose entries were removed, or replaced (by `large` values).

        Where durability was promised, the removal or the new entry is made durable first, unless it is
        already (`synced`). Otherwise a power cut could lose that record after the file is gone, and an
        older entry would take its place.
        """
        if not gone.files:
            return
        try:
            self._remove_files(gone, synced=synced, large=large)
        except ours(OSError) as error:  # what was asked for is done; check() finds what is left
            self._notices.log_once(
                "discard", f"cannot remove a large value that is not needed any more: {error}"
            )

    def _remove_files(self, gone: Gone, *, synced: bool, large: bool) -> None:
        try:
            if self._current.index.words[f.W_PROMISED] and not synced:
                if large:
                    self._durability.sync_large()
                fd = self._files.segments.file_of(gone.mark.segment)
                if fd is not None:
                    self._files.backend.sync(fd)
                self._durability.sync_names()
            for file in gone.files:
                if file.pointer is not None:
                    self._files.large.remove(file.low, file.high, file.pointer)
            if any(file.pointer is None for file in gone.files):
                self._reaper.look_for_orphans()
        except BaseException as error:
            if not is_interruption(error):  # else `UnderWay` tells what is left to do
                self._count_gone(gone)
            raise
        self._count_gone(gone)  # not before: others write as much elsewhere

    def _count_gone(self, gone: Gone) -> None:
        with contextlib.suppress(ClosedError), self._locks.index:
            self._under_way.left(gone.files)
