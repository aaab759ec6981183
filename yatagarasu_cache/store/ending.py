"""How the use of a cache ends: what is open is sealed, and the last to close leaves all in order."""

from __future__ import annotations

from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles, Temporaries
from .counters import Counters
from .current import CurrentIndex
from .durability import Durability
from .life import Life
from .locking import Locks
from .owners import Owner, Users
from .recovery import Recovery
from .under_way import UnderWay
from .upkeep import Upkeep


class Ending:
    """What is done before a handle lets go of its parts."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, temporaries: Temporaries, owner: Owner,
        users: Users, under_way: UnderWay, current: CurrentIndex, recovery: Recovery,
        active: ActiveSegment, durability: Durability, counters: Counters, upkeep: Upkeep,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._temporaries = life, locks, files, temporaries
        self._owner, self._users, self._under_way = owner, users, under_way
        self._current, self._recovery, self._active = current, recovery, active
        self._durability, self._counters, self._upkeep = durability, counters, upkeep

    def rest(self) -> None:
        """Have everything in order for an end without `close`."""
        self._counters.fold()
        with self._locks.appending, self._locks.index:
            self._active.seal()

    def close(self) -> None:
        """Seal what is open; the last handle also makes the index durable. To be called once."""
        self._upkeep.close()
        self._counters.fold()
        if not self._life.read_only:
            self._close_writing()

    def _close_writing(self) -> None:
        with self._locks.appending, self._locks.index:
            self._active.seal()
            if self._users.is_alone():
                self._close_as_last()
            elif self._under_way:  # as if it had died: the last to close tidies up
                self._owner.stay_marked()
            # Before the lock is given up: whoever closes next may be the last, and no thread of ours, which
            # may be waiting for the lock, changes anything any more.
            self._users.leave()
            self._owner.release()
            self._locks.index.close()

    def _close_as_last(self) -> None:
        index = self._current.index
        if self._owner.any_dead() or self._under_way or index.words[f.W_LEAVING]:
            self._under_way.forget_all()
            self._recovery.tidy(index)
        self._durability.sync_dirty()
        # Removals too: after a clean end nobody looks for files that belong to nothing.
        self._files.sync_directory(self._files.large.directory)
        self._files.sync_directory(self._temporaries.directory)
        index = self._current.index
        index.sync()
        index.words[f.W_CLEAN] = 1
        index.sync()
