"""Entries that go: those that have expired, and those that the policy would miss least."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..concurrency.cancelling import ensure_wanted
from . import format as f
from .budget import Budget
from .counters import Counters
from .current import CurrentIndex
from .finding import Finding
from .format import PARTITIONS, Slot
from .index import Index, IndexDamaged
from .leaving_files import LeavingFiles
from .limits import Limits
from .locking import Locks
from .reaping import Reaper
from .removal import Removal
from .victims import Victims, ahead, expired

_REAP_PAUSE = 0.1  # and before entries are evicted beside large values
WHOLE = 1 << 60  # bytes: as many as there are
_EVICT_MOST = 128  # victims a locking


class Evictor:
    """Evicts in batches, each under the lock."""

    def __init__(
        self, locks: Locks, limits: Limits, current: CurrentIndex, budget: Budget,
        reaper: Reaper, finding: Finding, removal: Removal, leaving: LeavingFiles, counters: Counters,
    ) -> None:  # fmt: skip
        self._locks, self._current = locks, current
        self._budget, self._reaper, self._finding, self._removal = budget, reaper, finding, removal
        self._leaving = leaving
        self._counters = counters
        self._victims = Victims()
        self._expiry_part = 0
        limits.follow(self._follow_limits)

    def _follow_limits(self) -> None:
        self._victims = Victims()  # the order may be another one now

    def evict_surplus(self, need: int, most: int = WHOLE) -> int:
        """Evict what does not fit beside `need` more bytes, at most about `most` at once. Returns the bytes.

        The surplus is computed under the lock: of several handles that find too much, one evicts it.
        """
        self._budget.recount_if_due()
        budget = self._budget

        def surplus() -> int:
            return self._current.index.live_bytes + need - budget.live_within(budget.size_limit)

        return self.evict(lambda: min(most, surplus()))

    def evict(self, wanted: Callable[[], int]) -> int:
        """Evict the next victims, about `wanted()` bytes but a bounded number. Bytes that went."""
        if self._current.index.words[f.W_LARGE_BYTES]:  # what dead handles had under way is no reason
            self._reaper.reap_after(_REAP_PAUSE)
        try:
            return self._evict_next(wanted)
        except IndexDamaged as error:
            self._current.rebuild(str(error))
            return 0

    def _evict_next(self, wanted: Callable[[], int]) -> int:
        with self._locks.index:
            victims, freed = self._choose(bytes_) if (bytes_ := wanted()) > 0 else ([], 0)
            if not victims:
                return freed
            gone = self._removal.remove_slots(victims)
            now = time.time_ns()
            late = sum(slot.expires > 0 and f.hard_end(slot.expires, slot.lengths) <= now for slot in victims)
            self._counters.count("expirations", late)
            self._counters.count("evictions", len(victims) - late)
        self._leaving.discard(gone)
        return freed

    def _choose(self, wanted: int) -> tuple[list[Slot], int]:
        """The next victims and the bytes that go with them. Damaged slots are removed at once: there is
        nothing to log.
        """
        index, freed = self._current.index, 0
        chosen: list[Slot] = []
        seen: set[int] = set()
        for at, is_sound in self._victims(index):
            if at in seen:  # chosen anew before those chosen first were removed: that is all there are
                break
            seen.add(at)
            slot = index.slot(at)
            if is_sound:
                chosen.append(slot)
            else:
                index.remove(at)
            freed += f.record_bytes(slot.lengths) + (f.file_bytes(slot.value_length) if slot.is_large else 0)
            if freed >= wanted or len(seen) >= _EVICT_MOST:
                break
        return chosen, freed

    def evict_expired(self) -> int:
        """Remove expired entries of the next partition that has any. How many."""
        for _ in range(PARTITIONS):
            self._expiry_part = (self._expiry_part + 1) % PARTITIONS
            count = self.expire_part(self._expiry_part)
            if count:
                return count
        return 0

    def expire_part(self, part: int) -> int:
        """Remove the expired entries of a partition, in batches. How many."""
        total = 0
        for _ in range(self._current.index.count() + 1):
            ensure_wanted()
            if not self._current.look(lambda index: self._over(index, part)):
                break
            with self._locks.index:
                places = self._over(self._current.index, part)[:_EVICT_MOST]
                slots = self._removal.sound_slots(places)
                if not places:  # others did
                    break
                if not slots:
                    continue
                gone = self._removal.remove_slots(slots)
                self._counters.count("expirations", len(slots))
            total += len(slots)
            self._leaving.discard(gone)
        return total

    def _over(self, index: Index, part: int) -> list[int]:
        """Where those of a partition are that have expired, or were made in the future."""
        now = time.time_ns()
        places = expired(index, part, now)
        if index.words[f.W_CLOCK] > now + f.AHEAD:
            places += [at for at in ahead(index, part, now) if self._finding.is_over(index.slot(at))]
        return places

    def expire_all(self) -> int:
        expired = 0
        for part in range(f.PARTITIONS):
            ensure_wanted()
            expired += self.expire_part(part)
        return expired
