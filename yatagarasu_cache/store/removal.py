"""Removing entries and changing their expiry: logged first, then done, under the lock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles
from .changes import ChangeLog, Mark
from .core import PythonCore
from .counters import Counters
from .current import ATTEMPTS, CurrentIndex
from .dead_segments import DeadSegments
from .durability import Durability
from .finding import Finding
from .format import Slot
from .index import Index
from .leaving_files import Gone, LeavingFiles
from .life import Life
from .locking import Locks
from .notices import Notices
from .pace import Pace
from .reaping import Reaper

_REMOVAL_BATCH = 128  # digests in one removal record


class Removal:
    """Removes, and changes what was stored. `durable`: what it does survives a power cut."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, current: CurrentIndex, finding: Finding,
        active: ActiveSegment, changes: ChangeLog, leaving: LeavingFiles, durability: Durability,
        reaper: Reaper, dead: DeadSegments, counters: Counters, pace: Pace, core: PythonCore,
        notices: Notices,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._current = life, locks, files, current
        self._finding, self._active, self._changes = finding, active, changes
        self._leaving, self._durability, self._reaper = leaving, durability, reaper
        self._dead, self._counters, self._pace, self._core = dead, counters, pace, core
        self._notices = notices
        self.durable = False

    @property
    def _index(self) -> Index:
        return self._current.index

    # -- removing ----------------------------------------------------------------------------

    def remove_keys(self, keys: Sequence[bytes]) -> int:
        """Remove the entries of encoded keys; how many were live."""
        alive = 0
        for _ in range(ATTEMPTS):
            seed, now = self._current.seed, time.time_ns()
            wanted: dict[tuple[int, int], list[bytes]] = {}
            for key in keys:
                wanted.setdefault(f.key_digest(key, seed), []).append(key)

            def chosen(
                slot: Slot, wanted: dict[tuple[int, int], list[bytes]] = wanted, now: int = now
            ) -> bool:
                keys = wanted[slot.low, slot.high]
                return any(
                    self._core.holds_encoded(key, now) is True or self._finding.is_of(slot, key)
                    for key in keys
                )

            alive += self.remove(list(wanted), chosen, "deletes")[0]
            if seed == self._current.seed:  # else another cache has come in the place of ours meanwhile
                break
        return alive

    def delete(self, low: int, high: int, key: bytes, stamp: int | None = None) -> bool:
        """Remove the entry of an encoded key; with `stamp`, only that version of it. False if it had none
        that was live.
        """
        if (
            not self._finding.find(low, high)
            and not self._finding.reveals(low, high)
            and not self._active.others_append()
        ):
            return False

        def chosen(slot: Slot) -> bool:
            return stamp in (None, slot.stamp) and self._finding.is_of(slot, key)

        return bool(self.remove([(low, high)], chosen, "deletes")[0])

    def remove(
        self, digests: Sequence[tuple[int, int]], chosen: Callable[[Slot], bool], counter: str
    ) -> tuple[int, int]:
        """Remove those of `digests` whose slots are `chosen`. Returns (unexpired, all) of those removed.

        A batch is atomic: it is logged first, then removed from the index. A digest without a slot is
        logged too where a writer that died may have left a record of it: otherwise a rebuild would find
        that record.
        """
        alive = removed = 0
        for start in range(0, len(digests), _REMOVAL_BATCH):
            ensure_wanted()
            a, r = self._remove_batch(digests[start : start + _REMOVAL_BATCH], chosen, counter)
            alive, removed = alive + a, removed + r
        return alive, removed

    def _remove_batch(
        self, digests: Sequence[tuple[int, int]], chosen: Callable[[Slot], bool], counter: str
    ) -> tuple[int, int]:
        self._life.ensure_writable("remove an entry")
        with self._locks.index:
            found = self._found(digests)
            if any(self._finding.reveals(*digest) for digest in digests if digest not in found):
                found = self._found(digests)
            slots = [slot for at in found.values() if chosen(slot := self._index.slot(at))]
            absent: list[tuple[int, int]] = []
            if len(found) < len(digests) and self._active.others_append():
                absent = [digest for digest in digests if digest not in found]
            if not slots and not absent:
                return 0, 0
            alive = sum(not self._finding.is_over(slot) for slot in slots)
            gone = self.remove_slots(slots, absent)
            self._counters.count(counter, alive if counter == "deletes" else len(slots))
        synced = False
        try:
            self._log_made(gone.mark)
            synced = self.durable
        finally:
            self._leaving.discard(gone, synced=synced)
        return alive, len(slots)

    def _found(self, digests: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        return {digest: at for digest in digests if (at := self._finding.find(*digest))}

    def remove_slots(self, slots: Sequence[Slot], absent: Sequence[tuple[int, int]] = ()) -> Gone:
        """Log the removal of some slots, then remove them. The lock is held.

        `absent`: digests without a slot that are logged as well (see `ActiveSegment.others_append`).
        Returns the large files that can be removed now.
        """
        mark = self._changes.remove([*(slot[:2] for slot in slots), *absent], self._stamp_beyond(slots))
        gone = Gone(self._leaving.leaving(slots), mark)
        for slot in slots:
            if at := self._index.find(slot.low, slot.high):  # else it was damaged just now
                self._index.remove(at)
        return gone

    def sound_slots(self, places: Iterable[int]) -> list[Slot]:
        """The slots at some places that are about to be removed. The lock is held.

        A damaged slot, to which its digest does not lead, is removed at once: there is nothing to log.
        """
        index, sound = self._index, []
        for at in places:
            if index.leads_to(at):
                sound.append(index.slot(at))
            else:
                index.remove(at)
        return sound

    def _stamp_beyond(self, slots: Iterable[Slot]) -> int:
        """A stamp above those of `slots` and of the checkpoint, also if the clock was set back."""
        stamps = [slot.stamp for slot in slots if slot.stamp < f.LAST_STAMP]
        return self._index.stamp_above(max(stamps, default=0))

    def clear(self) -> int:
        """Remove everything. Atomic. Values being stored at this moment may survive."""
        self._life.ensure_writable("clear the cache")
        with self._locks.index:
            entries = self._index.count()
            slots = [self._index.slot(at) for at in self._index.live_slots()]
            stamp = self._stamp_beyond(slots)
            mark = self._changes.append(f.CLEAR, b"", stamp)
            try:
                if self.durable:
                    self._durability.promise()
                if self._index.words[f.W_PROMISED]:
                    self._durability.sync_dirty()
                gone = Gone(self._leaving.leaving(slots), mark)
            except BaseException:  # nothing was cleared, nor will be when an index is made anew
                self._changes.take_back(mark, f.RECORD_BYTES)
                raise
            for part in range(f.PARTITIONS):
                self._index.words[f.W_DELETED + part] = stamp
            self._index.reset()
        self._leaving.discard(gone, synced=True)
        self._reaper.reap()
        self._dead.drop_all()
        self._files.segments.let_go()  # whoever clears a cache wants the room
        return entries

    def drop_corrupt(self, slot: Slot) -> None:
        """Remove an entry whose bytes are not what was written. The lock is held.

        This is logged like any removal. Otherwise a rebuild would bring back what the entry had replaced.
        """
        at = self._index.find(slot.low, slot.high)
        if not at or self._index.words[at + f.S_STAMP] != slot.stamp:
            return
        try:
            gone = self.remove_slots([slot])
        except CacheIOError as error:  # it stays, and is a miss whenever it is asked for
            self._notices.log_once(
                "undropped", f"an entry failed its checksum and cannot be dropped: {error}"
            )
            return
        self._leaving.discard(gone)
        self._counters.count("corrupt", 1)
        self._notices.log_once(
            "corrupt", "an entry failed its checksum and was dropped (see stats().corrupt)"
        )

    # -- changing ----------------------------------------------------------------------------

    def touch(self, low: int, high: int, key: bytes, expires: int) -> bool:
        """Give the live entry of an encoded key a new time of expiry. Atomic; False if there is none."""
        self._life.ensure_writable("touch an entry")
        with self._locks.index:
            slot = self._finding.entry(low, high, key)
            if slot is None:
                return False
            if expires and slot.flags & f.FLAG_TERMS:
                expires = f.with_terms(expires, slot.expires)
            payload = f.TOUCHED.pack(low, high, expires)
            mark = self._changes.append(f.TOUCH, payload, self._stamp_beyond([slot]))
            at = self._index.find(low, high)
            self._index.words[at + f.S_EXPIRES] = expires
            self._finding.touch(low, high)
        self._log_made(mark)
        return True

    def _log_made(self, mark: Mark) -> None:
        """What follows a change that was logged and made: it is made durable, and paid for."""
        if self.durable:
            try:
                self._durability.promise()
                self._changes.sync(mark)
            except ours(OSError) as error:
                raise from_os_error(error, "cannot make a change durable") from error
        self._pace.spend(f.RECORD_BYTES + f.DIGEST_BYTES)

    def durably(self) -> Removal:
        """The same, but for making durable what it does."""
        other = copy.copy(self)
        other.durable = True
        return other
