"""From a key's digest to its slot, and whether that is the key's, and live."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ..backends.base import name_file
from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import format as f
from .cache_files import CacheFiles
from .current import ATTEMPTS, CurrentIndex
from .eviction import TOUCHED, policy_of
from .format import Slot
from .index import IndexDamaged
from .life import Life
from .locking import Locks
from .unreadable import is_absence, remedy

T = TypeVar("T")


class Finding:
    """Slots, without the lock: the index may be another one from one step to the next."""

    def __init__(self, life: Life, locks: Locks, files: CacheFiles, current: CurrentIndex) -> None:
        self._life, self._locks, self._files, self._current = life, locks, files, current
        self.touched = ({} if life.read_only else TOUCHED).get

    def find(self, low: int, high: int) -> int:
        """The slot of a live entry, expired ones included; 0 if there is none."""
        for _ in range(ATTEMPTS):
            try:
                return self._current.index.find(low, high)
            except IndexDamaged as error:
                self._current.mend(error)
            except (ValueError, AttributeError):
                if self._life.closed:
                    raise self._life.closed_error() from None
                raise
        return 0

    def reveals(self, low: int, high: int) -> bool:
        """Whether a digest that was not found can be found now.

        Damage may have hidden its slot. If so, the index is rebuilt, and this is True.
        """
        try:
            self._current.index.ensure_absent(low, high)
            return False
        except (IndexDamaged, IndexError, ValueError, AttributeError):  # or it was replaced meanwhile
            with self._locks.index:
                try:
                    self._current.index.ensure_absent(low, high)
                except IndexDamaged as error:
                    self._current.mend(error)
            return True

    def lookup(self, low: int, high: int) -> Slot | None:
        """A live, unexpired entry's slot. Counts nothing and touches nothing."""
        slot = self.shown(low, high)
        return None if slot is None or slot.expires and self.is_over(slot) else slot

    def shown(self, low: int, high: int) -> Slot | None:
        """The same, expired or not."""
        for _ in range(ATTEMPTS):
            at = self.find(low, high)
            if not at:
                return None
            try:
                slot = self._current.index.slot(at)
            except struct.error:  # the index was replaced by a smaller one meanwhile
                continue
            if slot.low == low and slot.high == high:
                return slot
        return None

    def stale(self, low: int, high: int) -> Slot | None:
        """The slot of an entry that has expired, and may still be served while it is computed anew."""
        try:
            at = self.find(low, high)
            slot = self._current.index.slot(at) if at else None
        except struct.error:  # the index was replaced by a smaller one meanwhile
            return None
        if slot is None or (slot.low, slot.high) != (low, high):
            return None
        now = time.time_ns()
        is_stale = 0 < slot.expires <= now < f.hard_end(slot.expires, slot.lengths)
        return slot if is_stale and slot.stamp <= now + f.AHEAD else None

    def entry(self, low: int, high: int, key: bytes, or_stale: bool = False) -> Slot | None:
        """`lookup` of an encoded key. The entry of another key with the same digest does not count.

        `or_stale`: one that has expired, and may still be served, counts too.

        Raises `CacheIOError` if the record can't be read.
        """
        slot, place = self.lookup(low, high), 0
        if slot is None and not self._life.read_only and self.reveals(low, high):
            slot = self.lookup(low, high)
        while slot is not None and slot.place != place:
            if self.is_of(slot, key):
                return slot
            place = slot.place
            slot = self.lookup(low, high)  # it may have been moved meanwhile
        return self.stale(low, high) if or_stale else None

    def is_of(self, slot: Slot, key: bytes) -> bool:
        """Whether the record that a slot shows is of this very key. False also if there is none any more."""
        return bool(self.attempt(partial(self.is_record_of, key), slot))

    def is_record_of(self, key: bytes, slot: Slot) -> bool:
        data = self._files.backend.read(
            self._files.segments.get(slot.segment), f.RECORD_BYTES + len(key), slot.offset
        )
        return f.is_of_key(data, key)

    def attempt(self, load: Callable[[Slot], T | None], slot: Slot) -> T | None:
        """`load(slot)`; None if what it reads is not there (any more)."""
        try:
            return load(slot)
        except ours(OSError) as error:
            if is_absence(error):
                self._files.segments.forget(slot.segment)
                return None
            if isinstance(error, CacheIOError):
                raise
            name_file(error, self._files.segments.path(slot.segment))
            note = "; ".join(filter(None, ["the entry was kept", remedy(error)]))
            raise from_os_error(error, "cannot read an entry", note) from error
        except OverflowError:  # an offset or length that no file has
            return None

    def is_over(self, slot: Slot) -> bool:
        """Whether an entry has expired.

        An entry that expires and was made in the future counts as expired: the clock was wrong then, and
        nobody knows how long it should live. The record says when it was made; its stamp does not, since
        stamps never go back.
        """
        if not slot.expires:
            return False
        now = time.time_ns()
        if slot.expires <= now or slot.stamp <= now + f.AHEAD:
            return slot.expires <= now
        try:
            data = self._files.backend.read(
                self._files.segments.get(slot.segment), f.RECORD_BYTES, slot.offset
            )
        except ours(OSError):  # until that can be told it stays, and whoever reads the value finds out
            return False
        head = f.unpack_head(data, 0)
        return head is not None and head.stamp == slot.stamp and head.created > now + f.AHEAD

    def touch(self, low: int, high: int) -> None:
        """Note a hit for the eviction order."""
        touched = self.touched(self._current.index.words[f.W_EVICTION])
        if touched is not None:
            at = self.find(low, high)
            words = self._current.index.words
            if at and at < len(words):
                words[at + f.S_ACCESS] = touched(words[at + f.S_ACCESS], self._current.index.stamp())

    def accessed(self, slot: Slot) -> float | None:
        """Seconds since the epoch of the last hit, where the policy keeps that."""
        return slot.access / 1e9 if policy_of(self._current.index.words).name == "lru" else None
