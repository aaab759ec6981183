"""What dead handles left: their active segments, their marks, and large files that no entry stands for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.file_locks import claim
from ..concurrency.interruption import ours
from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles
from .changes import ChangeLog
from .current import CurrentIndex
from .durability import Durability
from .index import Index
from .locking import Locks
from .notices import Notices
from .owners import Owner
from .recovery import Recovery
from .segment import void_record
from .under_way import UnderWay
from .unreadable import Losses, is_given_up

_REAP_SECONDS = 10.0  # between looks for dead handles that nobody asked for
_BATCH = 1000  # orphans whose digests are logged at once


class Orphan(NamedTuple):
    """A large file that no entry stands for: the digest in its name, and its path."""

    low: int
    high: int
    path: str


class Reaper:
    """Looks for the dead, and puts in order what they were at."""

    def __init__(
        self, locks: Locks, files: CacheFiles, owner: Owner, under_way: UnderWay, current: CurrentIndex,
        recovery: Recovery, changes: ChangeLog, active: ActiveSegment, durability: Durability, losses: Losses,
        notices: Notices,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._owner, self._under_way = locks, files, owner, under_way
        self._current, self._recovery, self._changes, self._active = current, recovery, changes, active
        self._durability, self._losses, self._notices = durability, losses, notices
        self._reaped = time.monotonic()
        self._orphans = False  # large files that no entry stands for are to be looked for again

    @property
    def _index(self) -> Index:
        return self._current.index

    def reap(self, *, opening: bool = False) -> int:
        """Seal the active segments of dead handles and release what they were cleaning. Returns how many.

        Records that a dead handle appended but did not show are taken back, and its mark is removed.
        When `opening`, marks without anything else behind them are left to later calls, to save time.
        """
        reaped = 0
        with self._locks.index:
            self._reaped = time.monotonic()
            alive, marked = self._owner.marks()
            dead = self._named_owners() - alive
            lost = [token for token in marked if self._left_files(token)]
            if marked:
                self._recovery.remove_unfinished(self._index, self._owner.is_alive)
            if lost:
                self._under_way.count_anew()
            for segment in self._index.segments() if dead else ():
                index = self._index  # a rebuild may replace it
                words, entry = index.words, index.entry(segment)
                if words[entry + f.T_CLEANER] in dead:
                    words[entry + f.T_CLEANER] = 0
                if words[entry + f.T_OWNER] in dead and self._seal_of_dead(segment):
                    reaped += 1
            self._owner.sweep((set(marked) & dead if opening else set(marked)) - set(lost))
        if lost or self._orphans:
            self.look_for_orphans()
            self._owner.sweep(lost)
        return reaped

    def _left_files(self, token: int) -> bool:
        """Whether a dead handle may have left large files that no entry stands for."""
        try:
            return self._owner.noted(token).is_under_way
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._losses.note("large", f"{f.WRITERS_NAME}/{token:016x}{f.WRITER_SUFFIX}", error)
            return True

    def look_for_orphans(self) -> None:
        """Remove large files that no entry stands for."""
        self._orphans = True  # should that fail
        for orphan in self.orphans():
            self._files.backend.unlink(orphan.path)
        self._orphans = False

    def find_orphans(self) -> list[Orphan]:
        """Large files that no entry stands for, nor will. The lock is not held: others go on."""
        files, found = list(self._files.large.listed()), []
        with self._locks.index:  # not before: whoever shows one later has named it by now
            named = self._owner.named()
        for (low, high, pointer), _, path in files:
            ensure_wanted()
            if pointer not in named:
                with self._locks.index:
                    if not self._recovery.refers(
                        self._index, low, high, pointer
                    ) and self._files.backend.exists(path):
                        found.append(Orphan(low, high, path))
        return found

    def orphans(self) -> list[Orphan]:
        """Large files that no entry stands for, and that may go now."""
        found = self.find_orphans()
        for start in range(0, len(found), _BATCH):
            self._log_removal(found[start : start + _BATCH])
        if found and self._index.words[f.W_PROMISED]:  # what removed their entries is durable first
            self._durability.sync_dirty()
        return found

    def _log_removal(self, orphans: list[Orphan]) -> None:
        """Log the digests that have no slot as removed. Damage may have taken one: an index that is made anew
        would find its record without the file, and bring back what that record had replaced."""
        with self._locks.index:
            index = self._index
            digests = [orphan[:2] for orphan in orphans if not index.find(*orphan[:2])]
            if digests:
                self._changes.remove(digests, index.stamp_above(0))

    def _named_owners(self) -> set[int]:
        """Other handles that the segment table names."""
        words = self._index.words
        return {
            words[entry + field]
            for entry in self._index.table_entries()
            if words[entry] & ~f.MASK32 not in (f.LOG, f.DOOMED)
            for field in (f.T_OWNER, f.T_CLEANER)
        } - {0, self._owner.token}

    def reap_if_due(self) -> None:
        """Now and then, so that what dead handles leave does not pile up until there is need."""
        words = self._index.words
        if words[f.W_ACTIVE] > 1 or words[f.W_LARGE_BYTES]:
            self.reap_after(_REAP_SECONDS)

    def reap_after(self, seconds: float) -> None:
        if time.monotonic() - self._reaped > seconds:
            self.try_to_reap()

    def try_to_reap(self) -> None:
        self.attempt(self.reap)

    def attempt(self, look: Callable[[], object]) -> None:
        """`look()`, where nothing depends on it."""
        try:
            look()
        except ours(OSError) as error:
            self._notices.log_once("reap", f"cannot look for what dead processes left: {error}")

    def _seal_of_dead(self, segment: int) -> bool:
        """Seal a segment that a dead handle was writing, or sealing. The lock is held."""
        if self._index.state(segment) != f.DOOMED:
            if not self._take_back_of_dead(segment):
                return False
            index = self._index
            index.resize_segment(segment, self._files.segments.size(segment))
            index.set_state(segment, f.SEALED)
        self._index.words[self._index.entry(segment) + f.T_OWNER] = 0
        return True

    def _take_back_of_dead(self, segment: int) -> bool:
        """Take back what a dead handle appended but did not show.

        False, and logged, if that fails: the segment stays active then, and removals reckon with it.
        """
        try:
            with self._files.backend.opened(self._files.segments.path(segment), os.O_RDWR) as fd:
                if not claim(fd):  # it lives, and somebody has removed its mark
                    return False
                void = partial(void_record, self._files.backend, fd)
                taken_back = self._active.take_back(segment, fd, void)
                self._files.backend.truncate(fd, os.fstat(fd).st_size)  # what was allocated ahead goes
                if taken_back and self._index.words[f.W_PROMISED]:
                    self._files.backend.sync(fd)
        except FileNotFoundError:
            pass
        except ours(OSError) as error:
            self._notices.log_once(
                "unshown", f"cannot take back what a dead process did not come to store: {error}"
            )
            return False
        return True
