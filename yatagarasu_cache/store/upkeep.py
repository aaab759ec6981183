"""What is done beside the writing, so that segments die or empty out before their room is needed."""

from __future__ import annotations

import threading

from .budget import Budget
from .checkpointing import Checkpoints
from .cleaning import Cleaner
from .current import CurrentIndex
from .dead_segments import DeadSegments
from .evicting import Evictor
from .limits import Limits
from .pace import Pace
from .reaping import Reaper
from .room import Room
from .shared_settings import SharedSettings


class Upkeep:
    """Evicts ahead, drops and cleans segments, looks for the dead, and has checkpoints written in time."""

    def __init__(
        self, limits: Limits, current: CurrentIndex, shared_settings: SharedSettings, budget: Budget,
        pace: Pace, reaper: Reaper, dead: DeadSegments, checkpoints: Checkpoints, evictor: Evictor,
        cleaner: Cleaner, room: Room,
    ) -> None:  # fmt: skip
        self._limits, self._current, self._shared_settings = limits, current, shared_settings
        self._budget, self._pace, self._reaper, self._dead = budget, pace, reaper, dead
        self._checkpoints, self._evictor, self._cleaner = checkpoints, evictor, cleaner
        self._room = room
        pace.on_turn(self._work)

    def _work(self, budget: int) -> None:
        self._shared_settings.follow()
        self._budget.look_at_volume()
        if self._budget.is_far_above:
            try:
                self._room.make(0)
            finally:
                self._pace.is_behind = self._budget.is_far_above
        self._pace.is_behind = False
        while self._limits.policy.evicts and budget > 0 and (freed := self._evictor.evict_surplus(0, budget)):
            budget -= freed
        self._reaper.reap_if_due()
        reserve = min(self._limits.segment_bytes, 4 * self._pace.quantum)
        if self._current.index.used_bytes + reserve > self._budget.limit and not self._dead.drop_one():
            self._cleaner.clean_some(2 * self._pace.quantum, beyond=False)
        self._checkpoints.begin_if_due()

    def close(self) -> None:
        """Have it come to an end. The handle is marked as closed, so that nothing begins anew."""
        with self._pace.turn:  # who paces now may begin a checkpoint; nobody does so later
            thread = self._checkpoints.thread
        # One without an identity did not come to run: an interruption kept it from being started.
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()
        self._cleaner.close()

    def after_fork(self) -> None:
        self._pace.after_fork()
        self._cleaner.after_fork()
        self._checkpoints.after_fork()
