"""What every public method begins with, and what is done about one that was left by an exception not ours."""

from __future__ import annotations

from ..concurrency import forks
from ..concurrency.interruption import ours
from ..concurrency.locks import ensure_not_within
from ..errors import CacheError
from .current import CurrentIndex
from .index import IndexDamaged
from .life import Life
from .locking import Locks
from .notices import Notices
from .owners import Owner, Users
from .reaping import Reaper
from .recovery import Recovery
from .under_way import UnderWay


class Tidying:
    """Puts in order, with the next call, what an interrupted one left half done."""

    def __init__(
        self, root: str, life: Life, locks: Locks, notices: Notices, owner: Owner, users: Users,
        under_way: UnderWay, current: CurrentIndex, recovery: Recovery, reaper: Reaper,
    ) -> None:  # fmt: skip
        self._root, self._life, self._locks, self._notices = root, life, locks, notices
        self._owner, self._users, self._under_way = owner, users, under_way
        self._current, self._recovery, self._reaper = current, recovery, reaper

    def entering(self) -> None:
        """What a public method begins with: the handle is this process's, and in the middle of nothing."""
        forks.ensure_own()
        if self._locks.are_mine() or self._notices.is_telling:
            ensure_not_within(self._root)
            self._notices.forget_telling()
        if self._life.interrupted:
            self._tidy_up()

    def was_interrupted(self) -> None:
        """An exception that is not ours left a method, in this thread: whoever comes next tidies up."""
        self._life.interrupted = True
        self._under_way.forget_own()

    def _tidy_up(self) -> None:
        """No room stays taken for what was left half done. Other files that were left are removed when nobody
        else has the cache open, or who has closes: the mark tells."""
        life, under_way = self._life, self._under_way
        life.interrupted = False
        if life.read_only or life.closed:
            return
        try:
            with self._locks.index:
                lost = under_way.recall()
                if not under_way and self._users.is_alone():
                    index = self._current.index
                    return self._recovery.tidy(index, began=index.stamp())
                if lost:
                    under_way.count_anew()
            self._owner.stay_marked()
            if lost:
                self._reaper.look_for_orphans()
        except ours(CacheError, OSError, IndexDamaged) as error:
            self._notices.log_once("tidy", f"cannot tidy up after an interruption: {error}")
        except BaseException:  # whoever comes next does it
            life.interrupted = under_way.lost = True
            raise
