"""The work that keeps room free, paced by the bytes that are written."""

from __future__ import annotations

from collections.abc import Callable

from ..concurrency.cancelling import GivenUp
from ..concurrency.interruption import ours
from ..concurrency.locks import new_lock
from ..errors import StorageFull
from .limits import Limits
from .notices import Notices


class Pace:
    """A little after each change; one thread at a time. `work(bytes)` is what is to be done."""

    def __init__(self, limits: Limits, notices: Notices) -> None:
        self._limits, self._notices = limits, notices
        self._work: Callable[[int], None] = lambda _: None
        self.turn = new_lock()  # a signal handler may close what it has interrupted
        self._unpaced = 0
        limits.follow(self._follow_limits)

    def _follow_limits(self) -> None:
        self.is_behind = True  # as far as is known: a limit that was lowered takes effect with the next write
        # Bytes written between two looks at what is to be done.
        self.quantum = min(self._limits.segment_bytes // 8, 1 << 18)

    def on_turn(self, work: Callable[[int], None]) -> None:
        """Have `work(bytes)` called where so many are due."""
        self._work = work

    def spend(self, written: int) -> None:
        """Do as much work as `written` bytes ask for; called after every put."""
        self._unpaced += written
        if self._notices.waiting:
            self._notices.say()
        if self._unpaced < self.quantum and written and not self.is_behind:
            return
        if not self.turn.acquire(blocking=False):
            return
        try:
            budget, self._unpaced = 2 * max(self._unpaced, self.quantum), 0
            self._work(budget)
        except GivenUp:  # what was asked for is done, and whoever comes next cleans up
            pass
        except StorageFull:  # the next segment says so to a caller who can do something about it
            pass
        except ours(OSError) as error:  # what was asked for is done
            self._notices.log_once("maintenance", f"cannot clean up: {error}")
        finally:
            self.turn.release()

    def after_fork(self) -> None:
        self.turn = new_lock()
