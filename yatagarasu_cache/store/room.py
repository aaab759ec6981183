"""Room for what is to be written: granted where there is some, made where there is none.

`size_limit` bounds the bytes on disk. A handle is granted room in its active segment in small steps,
as it writes, so that one which is idle, forgotten or dead costs next to nothing. Room is granted
under the index lock, and only if it fits then, so that handles that fill the cache together don't
exceed the limit together. What is copied to make room may be one segment above it. What is removed gives
its room back when it is gone: for large files of others that is waited for, and nothing goes for them.

Eviction keeps the live bytes below a share of the limit (`headroom`), so that segments die or empty
out before their room is needed; the work is paced by the bytes written, a little after each put.
Nothing is evicted for room that is not live: before that what dead handles left is sealed, and the
active segments of others, who may be idle for ever, are taken from them and cleaned.

The volume may have less room than `size_limit`: it is smaller, others fill it, or there is a quota.
Whoever is told so goes on as if the limit were what the cache has by then (`in_room`), for as long as
the volume has no more. Where not even copies can be made, a whole segment goes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours
from ..errors import StorageFull, is_volume_full
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .cache_files import CacheFiles
from .checkpointing import Checkpoints
from .cleaning import MIN_GARBAGE, Cleaner
from .counters import Counters
from .current import CurrentIndex
from .dead_segments import DeadSegments
from .evicting import Evictor
from .grants import Grants
from .index import APPENDABLE, Index
from .life import Life
from .limits import Limits
from .locking import Locks
from .notices import Notices
from .reaping import Reaper
from .segment import SegmentWriter
from .under_way import Stream, UnderWay, give_up

_GRANTS = 1000  # tries to get room while others take what was made
_PATIENCE = 2 * MIN_GARBAGE  # steps without gain, besides two for each segment there is
_LOOSE = 3  # an index of so many times the bytes that it needs is made anew; one of the other, where the
_LITTLE_LOOSE = 1.25  # limit was lowered: entries go for what it has too much
_REMOVAL_SECONDS = 1.0  # after which large files that are being removed are given up,
_REMOVAL_LOOK = 0.0005  # and between looks whether they are gone
_REAP_PAUSE = 0.1  # and before entries are evicted beside large values
T = TypeVar("T")


class Room:
    """Sees to it that what is written fits."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex,
        budget: Budget, under_way: UnderWay, active: ActiveSegment, reaper: Reaper, dead: DeadSegments,
        checkpoints: Checkpoints, evictor: Evictor, cleaner: Cleaner, grants: Grants, counters: Counters,
        notices: Notices,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._limits = life, locks, files, limits
        self._current, self._budget, self._under_way = current, budget, under_way
        self._active, self._reaper, self._dead = active, reaper, dead
        self._checkpoints, self._evictor, self._cleaner = checkpoints, evictor, cleaner
        self._grants, self._notices = grants, notices
        self._counters = counters
        self._made_room = 0  # times that room was made because the volume was full

    @property
    def _index(self) -> Index:
        return self._current.index

    def writer(self, size: int) -> SegmentWriter:
        """The writer, with room for `size` bytes more. `appending` is held."""
        writer = self._active.writer
        if writer is not None and size <= writer.room:
            return writer
        self._life.ensure_writable("store an entry")
        return self._roll(size)

    def _roll(self, size: int) -> SegmentWriter:
        """A writer with room for `size` bytes. `appending` is held. `StorageFull` if there is none."""
        for _ in range(_GRANTS):
            writer = self._active.writer
            if writer is not None and writer.room >= size:
                return writer
            if not self._grants.grant(size):
                self.make(self._grants.least(size))
        raise self._full()

    def make(self, need: int) -> None:
        """Reclaim until `need` more bytes fit. `StorageFull` if they can't."""
        if self._index.used_bytes + need > self._budget.limit:
            with self._locks.appending, self._locks.reclaiming:  # one at a time: who waited may find room
                try:
                    self._reclaim(need)
                except StorageFull:
                    if self._budget.volume is None:
                        raise
                    self._budget.forget_volume()
                    self._reclaim(need)

    def in_room(self, need: int, change: Callable[[], T]) -> T:
        """`change()`, which needs `need` bytes; tried again once room was made, if the volume is full.

        Never call this with the index lock held: making room waits for others who may need the lock. Nor
        for a `change()` that calls it for its own parts: what failed there would be tried again here.
        """
        for _ in range(_GRANTS):
            made = self._made_room
            try:
                return change()
            except ours(OSError) as error:
                if not is_volume_full(error) or not self._make_room(need, made):
                    raise
        return change()

    def _make_room(self, need: int, made: int) -> bool:
        """Make room on a full volume. False if that can't be done.

        `made`: the value of `_made_room` when the volume turned out to be full.
        """
        with self._locks.appending, self._locks.reclaiming:
            if self._made_room != made:  # another thread was faster
                return True
            # Letting go of open files may have been enough.
            made_some = self._files.segments.let_go() or self._go_on_smaller(need)
            self._made_room += made_some  # not where it failed: others would try again for nothing
            return made_some

    def _go_on_smaller(self, need: int) -> bool:
        """Let what the cache has now be its limit, and make room within that. `reclaiming` is held."""
        self._budget.volume_is_full()
        try:
            self._reclaim(need)
        except StorageFull:
            self._budget.forget_volume()
            return False
        if self._limits.policy.evicts:
            self._notices.log_once("volume", "the volume is full: going on with what the cache has there")
        return True

    def reserve_large(self, stream: Stream, length: int) -> None:
        """Make room for so much of a large value, and count it. `StorageFull` if there is none."""
        size = f.file_bytes(length) - f.file_bytes(stream.length)
        for _ in range(_GRANTS):
            self.make(size)
            with self._locks.index:
                if self._index.used_bytes + size <= self._budget.limit:
                    self._under_way.grow(stream, length)
                    return
        raise self._full()

    def _reclaim(self, need: int) -> None:
        if self._budget.counts_too_much:
            self._budget.recount()
        last_means: list[Callable[[], object]] = [
            partial(self._await_removals, need, suffice=False), self._reaper.reap, self._cleaner.clean_active,
            self._cleaner.clean_little, self._cleaner.let_segment_go, self._checkpoints.cover_changes,
            self._budget.recount,
        ]  # fmt: skip
        least_used = least_live = f.MASK64
        stalled = 0  # steps since there was last less than ever before in this call
        rounds = 0  # of one of the last means
        while (used := self._index.used_bytes) + need > self._budget.limit:
            ensure_wanted()
            if self._await_removals(need, suffice=True):
                continue
            live = self._index.live_bytes
            stalled = 0 if used < least_used or live < least_live else stalled + 1
            least_used, least_live = min(least_used, used), min(least_live, live)
            if stalled <= _PATIENCE + 2 * len(self._index.table_entries()) and self._make_some(need):
                continue
            if last_means:
                if not last_means[0]() or rounds > len(self._index.table_entries()):
                    del last_means[0]
                    stalled = rounds = 0
                rounds += 1
            elif not self._evict_all_the_same(need):
                raise self._full()

    def _await_removals(self, need: int, *, suffice: bool) -> bool:
        """Wait for large files that others are removing. False if there was nothing to wait for.

        With `suffice`, wait only as long as these files make up all that is lacking. Nobody waits for a
        process that was killed, nor for long for one that was stopped.
        """
        stuck, reaped, began = f.MASK64, False, time.monotonic()
        while (lacking := self._index.used_bytes + need - self._budget.limit) > 0:
            leaving = self._index.words[f.W_LEAVING]
            if leaving < (lacking if suffice else 1):
                break
            stuck = min(stuck, leaving)
            if time.monotonic() > began + _REMOVAL_SECONDS:
                self._reaper.attempt(self._reaper.look_for_orphans)  # what is given up must be gone
                with self._locks.index:
                    counted = self._index.words[f.W_LARGE_BYTES]
                    give_up(self._index.words, stuck if stuck <= counted else 0)
                break
            time.sleep(_REMOVAL_LOOK)
            if not reaped and time.monotonic() > began + _REAP_PAUSE:
                reaped = True
                self._reaper.try_to_reap()
        return stuck < f.MASK64

    def _evict_all_the_same(self, need: int) -> bool:
        """The very last means: what lives would fit, but what does not live cannot be had back."""
        if not self._limits.policy.evicts or not self._evictor.evict(lambda: need):
            return False
        self._notices.log_once("unfit", "segments cannot be cleaned, and entries that would fit are evicted")
        return True

    def _full(self) -> StorageFull:
        index, words = self._index, self._index.words
        writers = words[f.W_ACTIVE]
        active = sum(
            words[entry + f.T_SIZE] - words[entry + f.T_LIVE]
            for entry in index.table_entries()
            if words[entry] & ~f.MASK32 in APPENDABLE
        )
        live, fixed = words[f.W_LIVE_BYTES] + words[f.W_LARGE_BYTES], self._budget.fixed_bytes
        remedy = "raise it, or delete entries"
        if not self._limits.policy.evicts:
            remedy += ", or choose an eviction other than 'none'"
        return StorageFull(
            errno.ENOSPC,
            f"size_limit={self._budget.size_limit} is used up: {live} bytes of live entries, {fixed} of "
            f"index and checkpoint, {max(0, active)} granted to {writers} writing handles and not live, "
            f"{index.used_bytes} in all: {remedy}",
        )

    def _shrink_index(self) -> bool:
        """Replace an index that grew for many more entries, or was made for many more segments, than there
        are now. False if it did not.
        """
        index = self._index
        if not self._current.is_loose(_LITTLE_LOOSE if self._budget.is_far_above else _LOOSE):
            return False
        try:
            with self._locks.index:
                if self._index is index:
                    self._current.shrink()
            return True
        except ours(OSError) as error:
            self._notices.log_once("shrink", f"cannot make the index smaller: {error}")
            return False

    def _make_some(self, need: int) -> bool:
        """One step towards room; False if no step helps."""
        if self._dead.drop_one() or self._shrink_index():
            return True
        if self._checkpoints.is_log_overlong() and self._checkpoints.write_if(
            self._checkpoints.is_log_overlong
        ):
            return True
        if not self._limits.policy.evicts:
            return bool(self._evictor.evict_expired()) or self._cleaner.clean_emptiest()
        return bool(self._evictor.evict_surplus(need)) or self._cleaner.clean_emptiest()

    def cull(self) -> int:
        """Evict until the live bytes are within their share of the limit. How many went."""
        before = self._counters.evictions + self._counters.expirations
        while self._limits.policy.evicts and self._index.live_bytes > self._budget.live_within(
            self._budget.size_limit
        ):
            ensure_wanted()
            if not self._shrink_index() and not self._evictor.evict_surplus(0):
                break
        self._dead.drop_all()
        return self._counters.evictions + self._counters.expirations - before
