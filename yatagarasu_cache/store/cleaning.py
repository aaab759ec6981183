"""Cleaning: live records are copied out of the emptiest segments, so that these can go.

What is copied to make room may be one segment above the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import islice

from ..backends.base import Buffer
from ..concurrency.interruption import ours
from ..errors import StorageFull, from_os_error, is_volume_full
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .cache_files import CacheFiles
from .counters import Counters
from .current import CurrentIndex
from .dead_segments import CLEANABLE, DeadSegments
from .evicting import WHOLE
from .format import Slot
from .grants import Grants
from .index import Index
from .leaving_files import LeavingFiles
from .limits import Limits
from .locking import Locks
from .owners import Owner
from .removal import Removal
from .segment import Record, SegmentWriter, footer_bytes
from .walks import Walks

_EVICT_MOST = 128  # victims a locking
_COPY_BYTES = 1 << 18  # of records copied by one write while cleaning
_LOOK_BYTES = 256  # looking at a record costs about what copying so much does
_GRANTS = 1000  # tries to get room while others take what was made
MIN_GARBAGE = 16  # a segment is cleaned for at least 1/16 of its size


class _NoRoom(Exception):
    """There is one segment more than there may be: no further one for copies."""


class Cleaning:
    """A sealed segment being emptied: what of it is still to be looked at, read as it is asked for."""

    def __init__(self, segment: int, records: Generator[Record, None, None]) -> None:
        self.segment = segment
        self.again: list[Record] = []  # to be tried once more
        self._records = records

    def next(self) -> Record | None:
        return self.again.pop() if self.again else next(self._records, None)

    def close(self) -> None:
        """Close the file, read through or not."""
        self._records.close()


class Cleaner:
    """Cleans one segment at a time. `appending` is taken for it."""

    def __init__(
        self, locks: Locks, files: CacheFiles, owner: Owner, limits: Limits, current: CurrentIndex,
        budget: Budget, active: ActiveSegment, grants: Grants, walks: Walks, removal: Removal,
        leaving: LeavingFiles, counters: Counters, dead: DeadSegments,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._owner, self._limits = locks, files, owner, limits
        self._current, self._budget, self._active, self._grants = current, budget, active, grants
        self._walks, self._removal, self._leaving = walks, removal, leaving
        self._counters, self._dead = counters, dead
        self._cleaning: Cleaning | None = None
        self._overheads: dict[int, int] = {}

    @property
    def _index(self) -> Index:
        return self._current.index

    def _emptiest(self, allowed: Callable[[int], bool], least: int = MIN_GARBAGE) -> int | None:
        """The segment that is worth most to clean: the one with the fewest live bytes for its size.

        `allowed` chooses by table entry. At least 1/`least` of the segment must be garbage.
        """
        index, best, best_share = self._index, None, 1.0
        writer = self._active.writer
        for entry in index.table_entries():
            size, live = index.words[entry + f.T_SIZE], index.words[entry + f.T_LIVE]
            segment = index.words[entry] & f.MASK32
            if writer is not None and writer.segment == segment:
                size = writer.tail  # what was granted beyond is for us to use, and no garbage
            if not allowed(entry) or size - live < size // least or live >= best_share * size:
                continue
            if size - live - self._overhead(segment) >= size // least:
                best, best_share = segment, live / size
        return best

    def _is_unclaimed(self, entry: int) -> bool:
        """True of a segment that nobody appends to any more, and that no other handle is cleaning."""
        words = self._index.words
        cleaner, owner = words[entry + f.T_CLEANER], words[entry + f.T_OWNER]
        state = words[entry] & ~f.MASK32
        mine = not cleaner or cleaner == self._owner.token
        return mine and (state == f.TAKEN or state == f.SEALED and not owner)

    def _is_appendable(self, entry: int) -> bool:
        """True of what others, or this handle, append to or clean: it can be taken from them."""
        return self._index.words[entry] & ~f.MASK32 in (f.ACTIVE, *CLEANABLE)

    def _overhead(self, segment: int) -> int:
        """Bytes of a sealed segment that are no records: copies would have as many."""
        known = self._overheads.get(segment)
        if known is None:
            if len(self._overheads) > 4 * self._index.table_capacity:
                self._overheads.clear()
            if self._index.state(segment) != f.SEALED:  # it may get a footer
                return f.SEGMENT_HEADER_BYTES
            try:
                fd = self._files.segments.file_of(segment)
                footer = footer_bytes(self._files.backend, fd) if fd is not None else 0
            except ours(OSError):  # an estimate will do: whoever copies from it hears of it
                return f.SEGMENT_HEADER_BYTES
            known = self._overheads[segment] = f.SEGMENT_HEADER_BYTES + footer
        return known

    def clean_some(self, budget: int, *, beyond: bool = True) -> bool:
        """Copy about `budget` bytes of live records out of the segment being cleaned. True if it is gone.

        `beyond`: copies may exceed the limit. `reclaiming` is held then.
        """
        with self._locks.appending:
            cleaning = self._cleaning = self._cleaning or self._begin_cleaning()
            try:
                if cleaning is None or not self._copy_live(cleaning, budget, beyond):
                    return False
            except _NoRoom:  # whoever needs room will evict
                return False
            except StorageFull as error:
                if not is_volume_full(error):
                    raise
                return False
            self._cleaning = None
            return self._dead.drop_one()

    def clean_emptiest(self) -> bool:
        """Clean one segment to the end. False if none is worth it or there is no room to copy to."""
        return self.clean_some(WHOLE)

    def clean_active(self) -> bool:
        """Clean a segment that some handle (maybe this one) appends to, or has begun to clean.

        Its writer may be idle for ever, and no live entry is evicted for the room it holds. False if no
        segment is worth it.
        """
        return self._clean_any(MIN_GARBAGE)

    def clean_little(self) -> bool:
        """The same where there is little to be had, which costs much: still nothing that lives has to go."""
        return self._clean_any(MIN_GARBAGE * MIN_GARBAGE)

    def _clean_any(self, least: int) -> bool:
        with self._locks.appending:
            with self._locks.index:
                segment = self._emptiest(self._is_appendable, least)
                if segment is None:
                    return False
            self._take(segment)
            return self.clean_emptiest()

    def _take(self, segment: int) -> None:
        """Let nobody append to a segment any more, and clean it next. `appending` is held."""
        writer = self._active.writer
        if writer is not None and writer.segment == segment:
            self._active.seal()
        with self._locks.index:
            if self._index.state(segment) == f.ACTIVE:
                self._index.set_state(segment, f.TAKEN)
                self._index.resize_segment(segment, self._files.segments.size(segment))
            if self._cleaning is not None and self._cleaning.segment != segment:
                self._cleaning.close()
                self._cleaning = None
            self._cleaning = self._cleaning or self._claim(segment)

    def let_segment_go(self) -> bool:
        """On a volume without room for copies: give up the segment with the fewest live bytes for its size,
        and all entries in it. False if there is none.
        """
        if self._budget.volume is None or not self._limits.policy.evicts:
            return False
        with self._locks.appending:
            with self._locks.index:
                words = self._index.words
                entries = [
                    entry for entry in self._index.table_entries() if self._is_appendable(entry)
                ]
                if not entries:
                    return False
                entry = min(entries, key=lambda at: words[at + f.T_LIVE] / max(1, words[at + f.T_SIZE]))
                segment = words[entry] & f.MASK32
            self._take(segment)
            cleaning, self._cleaning = self._cleaning, None
            if cleaning is not None:
                cleaning.close()
            self._evict_from(segment)
            self._end_cleaning(segment)
            return self._dead.drop_one()

    def _evict_from(self, segment: int) -> None:
        """Evict what lives in a segment."""
        records = self._walks.records(segment)
        while batch := list(islice(records, _EVICT_MOST)):
            with self._locks.index:
                slots = {slot.low: slot for record in batch if (slot := self._walks.alive(record, segment))}
                if not slots:
                    continue
                gone = self._removal.remove_slots(list(slots.values()))
                self._counters.count("evictions", len(slots))
            self._leaving.discard(gone)

    def _begin_cleaning(self) -> Cleaning | None:
        with self._locks.index:
            segment = self._emptiest(self._is_unclaimed)
            return None if segment is None else self._claim(segment)

    def _claim(self, segment: int) -> Cleaning:
        """Let others see that this handle cleans a segment. The lock is held."""
        index = self._index
        index.words[index.entry(segment) + f.T_CLEANER] = self._owner.acquire()
        return Cleaning(segment, self._walks.records(segment))

    def _copy_live(self, cleaning: Cleaning, budget: int, beyond: bool) -> bool:
        """Move live records to the head of the log. True once the segment has none left."""
        segment = cleaning.segment
        while budget > 0:
            batch: list[tuple[Record, Slot]] = []
            size = 0
            while size < min(budget, _COPY_BYTES, self._limits.segment_bytes // 4):
                record = cleaning.next()
                if record is None:
                    break
                slot = self._walks.alive(record, segment)
                if slot is not None:
                    batch.append((record, slot))
                    size += record.head.record_bytes
                budget -= _LOOK_BYTES
            budget -= size
            again = batch
            try:
                again = self._copy(batch, segment, beyond)
            finally:
                cleaning.again += [record for record, _ in again]
            if record is None and not cleaning.again:
                self._end_cleaning(segment)
                return True
        return False

    def _end_cleaning(self, segment: int) -> None:
        """All live records were moved. If the segment still counts live bytes, records or slots are damaged.

        Damaged records are dropped. If slots are missing, the index is rebuilt first: otherwise the entries
        that these slots showed are lost, and the ones they replaced come back.
        """
        with self._locks.index:
            index = self._index
            if index.state(segment) not in CLEANABLE:
                return
            entry = index.entry(segment)
            index.words[entry + f.T_CLEANER] = 0
            if not index.words[entry + f.T_LIVE] or any(
                self._walks.alive(record, segment) for record in self._walks.records(segment)
            ):
                return
            left = index.slots_in(segment)
            if index.words[entry + f.T_LIVE] == sum(f.record_bytes(slot.lengths) for slot in left):
                for slot in left:
                    self._removal.drop_corrupt(slot)
            else:
                self._current.rebuild("a segment has fewer entries than it counts")

    def _copy(
        self, batch: list[tuple[Record, Slot]], segment: int, beyond: bool
    ) -> list[tuple[Record, Slot]]:
        """Copy records and point their slots to the copies. Those that have to be tried again."""
        if not batch:
            return []
        fd = self._files.segments.file_of(segment)
        if fd is None:
            return []
        raw = self._files.backend.read_many([(fd, r.head.record_bytes, r.offset) for r, _ in batch])
        sound = [
            (record, slot, self._unless_failed(data))
            for (record, slot), data in zip(batch, raw, strict=True)
            if self._is_sound(record, slot, self._unless_failed(data))
        ]
        with self._locks.appending:
            heads = [record.head for record, _, _ in sound]
            size = sum(f.room_for(h.names_length, h.payload_length) for h in heads)
            writer = self._copy_room(size, segment if beyond else 0)
            epoch = self._index.words[f.W_EPOCH]
            places, copies = self._moved(sound, writer)
            try:
                writer.append_many(copies)
            except ours(OSError) as error:
                raise from_os_error(error, "cannot copy entries while cleaning") from error
        again = []
        with self._locks.index:
            index = self._index
            valid = index.words[f.W_EPOCH] == epoch and self._active.may_show(writer.segment)
            for (record, slot, _), place in zip(sound, places, strict=True):
                at = index.find(slot.low, slot.high)
                if at and index.words[at + f.S_PLACE] == slot.place:
                    if valid:
                        index.move(at, place)
                    else:
                        again.append((record, slot))
                index.settle(place, record.head.record_bytes)
        return again

    @staticmethod
    def _unless_failed(data: bytes | OSError) -> bytes:
        if isinstance(data, OSError):
            raise from_os_error(data, "cannot read an entry while cleaning", "the entry was kept")
        return data

    def _is_sound(self, record: Record, slot: Slot, data: bytes) -> bool:
        """Check a record before it is copied; one that is damaged is dropped here."""
        head = record.head
        sound = len(data) == head.record_bytes and f.verify_head(
            data, 0, head, self._index.identity.seed, slot.place
        )
        if sound and head.kind == f.PUT:
            value = memoryview(data)[head.head_bytes : head.head_bytes + head.value_length]
            sound = f.value_sum(value, slot.low, slot.flags) == slot.value_sum
        if not sound:
            with self._locks.index:
                current = self._walks.alive(record, slot.segment)
                if current is not None:
                    self._removal.drop_corrupt(current)
        return sound

    def _moved(
        self, sound: list[tuple[Record, Slot, bytes]], writer: SegmentWriter
    ) -> tuple[list[int], list[tuple[bytes, Buffer, bytes]]]:
        """The records as they read at the writer's tail: another place, and not stamped anew."""
        offset = writer.tail
        places: list[int] = []
        copies: list[tuple[bytes, Buffer, bytes]] = []
        seed = self._index.identity.seed
        for record, slot, data in sound:
            head, place = record.head, f.pack_place(writer.segment, offset)
            at = f.RECORD_BYTES + head.key_length + head.tag_length
            meta = data[at : at + head.meta_length]
            packed = f.pack_record(
                seed, place, head.kind, head.flags, record.key, record.tag, meta,
                head.value_length, head.stamp, slot.expires, head.created, head.value_sum,
            )  # fmt: skip
            payload = data[head.head_bytes : head.head_bytes + head.payload_length]
            places.append(place)
            copies.append((packed, payload, record.payload))
            offset += head.record_bytes
        return places, copies

    def _copy_room(self, size: int, segment: int) -> SegmentWriter:
        """Room for copies out of `segment`: up to one segment above the limit, since that one is about to go.

        Without a `segment`, within the limit. Where the limit was lowered and the cache is still above it,
        one segment above what there is.
        """
        for _ in range(_GRANTS):
            writer = self._active.writer
            if writer is not None and writer.room >= size:
                return writer
            if not self._grants.grant(
                size, beyond=self._budget.beyond(segment) if segment else 0, exactly=True
            ):
                break
        raise _NoRoom

    def close(self) -> None:
        with self._locks.appending:
            if self._cleaning is not None:
                self._cleaning.close()
                self._cleaning = None

    def after_fork(self) -> None:
        """It is the parent's."""
        self._cleaning = None
