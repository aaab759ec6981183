"""Segments in which nothing lives: they go."""

from __future__ import annotations

from ..concurrency.interruption import ours
from ..errors import from_os_error
from . import format as f
from .budget import Budget
from .cache_files import CacheFiles
from .current import CurrentIndex
from .durability import Durability
from .locking import Locks

CLEANABLE = frozenset({f.SEALED, f.TAKEN})  # nothing more is shown in these


class DeadSegments:
    """Removes them, once what made them so is durable if it must be."""

    def __init__(
        self, locks: Locks, files: CacheFiles, current: CurrentIndex, budget: Budget,
        durability: Durability,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._current, self._budget = locks, files, current, budget
        self._durability = durability

    def drop_all(self) -> None:
        while self.drop_one():
            pass

    def drop_one(self) -> bool:
        """Remove one sealed segment without live records, if there is one."""
        index = self._current.index
        for entry in index.table_entries():
            word = index.words[entry]
            dead = word & ~f.MASK32 in CLEANABLE and not index.words[entry + f.T_LIVE]
            if word & ~f.MASK32 == f.DOOMED or dead:
                segment = word & f.MASK32
                if self._doom(segment):
                    self._unlink(segment)
                    return True
        return False

    def _doom(self, segment: int) -> bool:
        """Mark a segment for removal: nothing in it lives, and what made it so is durable if promised."""
        if self._current.index.words[f.W_PROMISED]:
            self._durability.sync_dirty()
        with self._locks.index:
            index = self._current.index
            state = index.state(segment)
            if state in CLEANABLE and not index.words[index.entry(segment) + f.T_LIVE]:
                index.set_state(segment, f.DOOMED)
                return True
        return state == f.DOOMED

    def _unlink(self, segment: int) -> None:
        try:
            self._files.segments.remove(segment)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot remove a segment") from error
        if self._budget.volume is not None:  # now, and not when nobody can be reading it any more
            self._files.segments.let_go()
        with self._locks.index:
            if self._current.index.state(segment) == f.DOOMED:
                self._current.index.drop_segment(segment)
