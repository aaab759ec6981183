"""Other metadata for an entry that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ..backends.base import Buffer
from ..concurrency.cancelling import ensure_wanted
from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles
from .current import ATTEMPTS, CurrentIndex
from .finding import Finding
from .format import LARGE, PUT, Slot
from .item import Item
from .large_writing import too_many_changes
from .life import Life
from .limits import Limits
from .locking import Locks
from .reading import Names, Reading
from .room import Room
from .showing import Showing


class _Record(NamedTuple):
    """What stands in a segment of one version of an entry."""

    slot: Slot
    names: Names
    payload: Buffer  # of a large value its pointer and sums


class Annotating:
    """Appends the record of an entry anew, with other metadata and the same value, and shows it."""

    def __init__(
        self, life: Life, locks: Locks, limits: Limits, files: CacheFiles, current: CurrentIndex,
        finding: Finding, active: ActiveSegment, room: Room, reading: Reading, showing: Showing,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._limits, self._files = life, locks, limits, files
        self._current, self._finding, self._active = current, finding, active
        self._room, self._reading, self._showing = room, reading, showing

    def set_meta(self, key: bytes, meta: bytes, ensure_small: Callable[[bytes, bytes, bytes], None]) -> bool:
        """Replace the metadata of the live entry of an encoded key. Atomic; False if there is none.

        `ensure_small` refuses key, tag and metadata that are too long together.
        """
        self._life.ensure_writable("store metadata")
        for _ in range(ATTEMPTS):
            ensure_wanted()
            # Each time: another cache may have come in the place of ours.
            low, high = f.key_digest(key, self._current.seed)
            slot = self._finding.entry(low, high, key)
            if slot is None:
                return False
            record = self._finding.attempt(self._record, slot)
            if record is None:  # it was moved or replaced, or is damaged, and dropped if that lasts
                self._reading.fetch(low, high, key)
                continue
            ensure_small(key, record.names.tag, meta)
            names = len(key) + len(record.names.tag) + len(meta)
            size = f.room_for(names, len(record.payload) + f.LARGE_POINTER.size)
            done = self._room.in_room(size, partial(self._rewrite, record, meta, size))
            if done is not None:
                return done
        raise too_many_changes()

    def _record(self, slot: Slot) -> _Record | None:
        names = self._reading.read_names(slot)
        if names is None:
            return None
        if slot.is_large:
            pointer, sums = self._files.segments.large(slot)
            return _Record(slot, names, f.LARGE_POINTER.pack(pointer) + sums)
        found = self._reading.load(slot)
        return None if found is None else _Record(slot, names, found.payload)

    def _rewrite(self, record: _Record, meta: bytes, size: int) -> bool | None:
        """False if there is no such entry any more; None if it is another version by now."""
        before, names = record.slot, record.names
        with self._locks.appending:
            writer = self._room.writer(size)
            with self._locks.index:
                slot = self._finding.entry(before.low, before.high, names.key)
                if slot is None:
                    return False
                if (slot.stamp, slot.value_sum) != (before.stamp, before.value_sum):
                    return None
                if not self._active.may_show(writer.segment):
                    self._active.let_go_if_lost(writer)
                    return None
                index, large = self._current.index, slot.is_large
                epoch = index.words[f.W_EPOCH]
                # Touched or moved meanwhile it is the same version: what the slot says holds.
                item = Item(slot.low, slot.high, names.key, b"", slot.flags, slot.expires, names.tag, meta)
                head, fresh = item.draft(
                    index, self._limits.policy, writer.next_place, slot.value_length, slot.value_sum,
                    LARGE if large else PUT, names.created,
                )  # fmt: skip
                listed = bytes(record.payload[: f.LARGE_POINTER.size]) if large else b""
                self._showing.append(writer, head, record.payload, listed)
                done, _ = self._showing.show_appended(
                    writer, writer.tail, fresh, names.tag, epoch, keeps_file=large
                )
        if not done:  # the clock was set back, or the index rebuilt
            return None
        self._showing.stored(fresh, None, size)
        return True

    def durably(self, showing: Showing) -> Annotating:
        """The same, but for making durable what it stores."""
        return Annotating(
            self._life, self._locks, self._limits, self._files, self._current, self._finding, self._active,
            self._room, self._reading, showing,
        )  # fmt: skip
