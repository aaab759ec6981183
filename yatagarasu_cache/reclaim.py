"""Room: rolling segments, evicting, removing dead segments, cleaning the emptiest, checkpoints.

`size_limit` bounds the bytes on disk, an active segment counted at its full size. Eviction keeps
the live bytes below a share of it (`headroom`), so that segments die or empty out before their
room is needed; the work is paced by the bytes written, a little after each put.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING

from . import checkpoint
from . import format as f
from .backends.base import Buffer
from .errors import CacheIOError, ClosedError, StorageFull, from_os_error
from .eviction import Victims, expired
from .format import PARTITIONS, Slot
from .index import Index
from .segment import Record, SegmentWriter, footer_bytes, read_records, read_segment_header

if TYPE_CHECKING:
    from .store import Store

_EVICT_MOST = 128  # victims a locking
_COPY_BYTES = 1 << 18  # of records copied by one write while cleaning
_ROLLS = 16  # segments begun for one entry before other means are tried
_MIN_GARBAGE = 16  # a segment is cleaned for at least 1/16 of its size
_PATIENCE = 2 * _MIN_GARBAGE  # steps without gain, besides two for each segment there is
_CHECKPOINT_RECORDS = 1 << 16  # and at least as many as there are entries, between checkpoints;
_CHECKPOINT_SHARE = 1 << 12  # fewer in a cache of less than so many bytes for each of them
_REMOVALS_ROOM = f.RECORD_BYTES + 16 * _EVICT_MOST


class Cleaning:
    """A sealed segment being emptied: what of it is still to be looked at."""

    def __init__(self, segment: int, records: list[Record]) -> None:
        self.segment = segment
        self.todo = records[::-1]


class Reclaimer:
    """One handle's part in keeping the cache within its limit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._limit = store.settings.size_limit
        self.segment_bytes = store.segment_bytes
        headroom = max(int(self._limit * store.settings.headroom), 3 * self.segment_bytes)
        self.live_limit = self._limit - headroom
        self._quantum = min(self.segment_bytes // 8, 1 << 18)
        self._unpaced = 0
        self._pacing = threading.Lock()
        self._victims = Victims()
        self._expiry_part = 0
        self._cleaning: Cleaning | None = None
        self._overheads: dict[int, int] = {}
        self._checkpoint: threading.Thread | None = None

    @property
    def _index(self) -> Index:
        return self._store.index

    # -- opening, closing ---------------------------------------------------------------------

    def after_open(self) -> None:
        """Take over from dead handles, and come within a limit that was lowered."""
        self.reap()
        if self._store.policy.evicts and self._index.used_bytes > self._limit:
            with self._store.appending:
                self.ensure_writer()
                self.make_space(0)

    def reap(self) -> int:
        """Seal the active segments of handles that are dead, and free what these were cleaning. How many."""
        store, index, reaped = self._store, self._index, 0
        with store.lock:
            owned = [e for e in index.table_entries() if index.words[e + f.T_OWNER]]
            owners = {index.words[e + f.T_OWNER] for e in owned} - {store.owner.token}
            dead = owners - store.owner.alive_tokens() if owners else set()
            for entry in owned:
                if index.words[entry + f.T_OWNER] in dead:
                    segment = index.words[entry] & f.MASK32
                    active = index.words[entry] & ~f.MASK32 == f.ACTIVE
                    if active:
                        index.resize_segment(segment, self._file_size(segment))
                    if active:
                        index.words[entry] = f.SEALED | segment
                    index.words[entry + f.T_OWNER] = 0
                    reaped += 1
        return reaped

    def _file_size(self, segment: int) -> int:
        try:
            return os.stat(self._store.files.path(segment)).st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        thread = self._checkpoint
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        self._pacing, self._cleaning, self._checkpoint = threading.Lock(), None, None

    # -- segments to write to -----------------------------------------------------------------

    def roll(self, size: int) -> SegmentWriter:
        """A writer with room for `size` bytes. `appending` is held. `StorageFull` if there is none."""
        store, turns, covered = self._store, 0, False
        while (writer := store.writer) is None or writer.room < size:
            turns += 1
            if turns > _ROLLS:  # what is copied to make room takes that room
                if not covered:
                    covered, turns = True, 0
                    self._cover_removals()
                elif not (store.policy.evicts and self._evict(self.segment_bytes)):
                    raise self._full()
                continue
            capacity = self._capacity(size)
            if writer is not None and writer.borrowed:
                self.make_space(0)
                writer.repay()
            elif writer is not None and writer.reserve_room >= _REMOVALS_ROOM:
                self.make_space(capacity)
                self._next_writer(capacity)
            else:  # nothing to log removals in: one segment above the limit, for these alone
                self._next_writer(capacity)
        return writer

    def removal_room(self, size: int) -> SegmentWriter:
        """A writer in which a removal of `size` bytes can be logged, also in a full cache."""
        try:
            return self.roll(size)
        except StorageFull:
            writer = self._store.writer
            if writer is None or writer.reserve_room < size:
                writer = self._next_writer(self.segment_bytes)
            return writer

    def _capacity(self, size: int) -> int:
        return max(self.segment_bytes, f.aligned(2 * size + 8192) if size > self.segment_bytes // 2 else 0)

    def ensure_writer(self) -> SegmentWriter:
        """A writer in which a removal can be logged, whatever the limit says."""
        writer = self._store.writer
        if writer is None or writer.reserve_room < _REMOVALS_ROOM:
            writer = self._next_writer(self.segment_bytes)
        return writer

    def _next_writer(self, capacity: int) -> SegmentWriter:
        store = self._store
        first = store.writer is None
        store.seal_writer()
        try:
            with store.lock:
                writer = (self._adopt(capacity) if first else None) or self._create(capacity)
                if self._index.used_bytes > self._limit:
                    writer.borrow()
                store.writer = writer
                store.owner.note(writer.segment)
        except OSError as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot begin a segment") from error
        return writer

    def _create(self, capacity: int) -> SegmentWriter:
        store, index = self._store, self._index
        segment = index.next_segment_id()
        if segment is None:
            raise StorageFull(errno.ENOSPC, "the segment table is full: raise segment_size")
        token, created, floor = store.owner.acquire(), index.stamp(), index.words[f.W_FLOOR]
        fd = store.backend.open(
            store.files.path(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL, store.settings.file_mode
        )
        try:
            header = f.pack_segment_header(segment, index.identity, created, floor)
            store.backend.write(fd, [header], 0)
            index.add_segment(segment, f.ACTIVE, capacity, token, created)
        except BaseException:
            store.backend.close_file(fd)
            store.backend.unlink(store.files.path(segment))
            raise
        store.names_changed()
        return SegmentWriter(store.backend, fd, segment, capacity, floor)

    def _adopt(self, capacity: int) -> SegmentWriter | None:
        """Go on with a segment that an earlier handle left less than half full.

        Not with one that a checkpoint lists as complete, or one being written will: recovery would
        not look into it.
        """
        index = self._index
        for entry in index.table_entries():
            small = index.words[entry + f.T_SIZE] < self.segment_bytes // 2
            small = small and index.words[entry + f.T_CREATED] > index.words[f.W_EPOCH]
            sealed = index.words[entry] & ~f.MASK32 == f.SEALED and not index.words[entry + f.T_OWNER]
            if small and sealed and capacity == self.segment_bytes:
                return self._take_over(index.words[entry] & f.MASK32)
        return None

    def _take_over(self, segment: int) -> SegmentWriter | None:
        store, index = self._store, self._index
        try:
            fd = store.backend.open(store.files.path(segment), os.O_RDWR)
        except OSError:
            return None
        try:
            header = read_segment_header(store.backend, fd)
            if header is None or header.segment != segment or header.identity != index.identity:
                store.backend.close_file(fd)
                return None
            writer = SegmentWriter(store.backend, fd, segment, self.segment_bytes, header.floor)
            writer.adopt(read_records(store.backend, fd, segment, index.identity))
            # First: whoever finds us dead in between takes it from us as it is.
            entry, owner = index.entry(segment), store.owner.acquire()
            index.words[entry + f.T_SYNCED] = 0
            index.words[entry + f.T_NEWEST] = 0
            index.words[entry + f.T_OWNER] = owner
            index.words[entry] = f.ACTIVE | segment
            index.resize_segment(segment, self.segment_bytes)
            store.backend.truncate(fd, writer.tail)  # the footer
        except BaseException:
            store.backend.close_file(fd)
            raise
        store.names_changed()  # who created it may not have made its name durable
        return writer

    # -- making room --------------------------------------------------------------------------

    def pace(self, written: int) -> None:
        """Do as much work as `written` bytes ask for; called after every put."""
        self._unpaced += written
        if self._unpaced < self._quantum and written:
            return
        if not self._pacing.acquire(blocking=False):
            return
        try:
            budget, self._unpaced = 2 * max(self._unpaced, self._quantum), 0
            self._work(budget)
        except StorageFull:  # the next roll says so to a caller who can do something about it
            pass
        except OSError as error:  # what was asked for is done
            self._store.log_once("maintenance", f"cannot clean up: {error}")
        finally:
            self._pacing.release()

    def _work(self, budget: int) -> None:
        index, evicts = self._index, self._store.policy.evicts
        while evicts and budget > 0 and index.live_bytes > self.live_limit:
            freed = self._evict(budget)
            if not freed:
                break
            budget -= freed
        if index.used_bytes + self.segment_bytes > self._limit and not self.drop_one_dead():
            self._clean_some(2 * self._quantum)
        self._checkpoint_if_due()

    def make_space(self, need: int) -> None:
        """Reclaim until `need` more bytes fit. `StorageFull` if they can't."""
        reaped = covered = False
        least_used = least_live = f.MASK64
        stalled = 0  # steps since there was last less than ever before in this call
        while (used := self._index.used_bytes) + need > self._limit:
            live = self._index.live_bytes
            stalled = 0 if used < least_used or live < least_live else stalled + 1
            least_used, least_live = min(least_used, used), min(least_live, live)
            gets_on = stalled <= _PATIENCE + 2 * len(self._index.table_entries())
            if gets_on and self._make_some(need):
                continue
            if not reaped:
                reaped = True
                self.reap()
            elif not gets_on and not covered:
                covered, stalled = True, 0
                self._cover_removals()
            elif gets_on or not (self._store.policy.evicts and self._evict(self.segment_bytes)):
                raise self._full()

    def _full(self) -> StorageFull:
        return StorageFull(
            errno.ENOSPC,
            f"size_limit={self._limit} is used up: raise it, delete entries, or let eviction make room",
        )

    def _cover_removals(self) -> None:
        """Removals that have to be kept fill segment after segment: a checkpoint covers them.

        `appending` is held.
        """
        self._write_checkpoint()
        self._store.seal_writer()

    def _make_some(self, need: int) -> bool:
        """One step towards room; False if no step helps."""
        if self.drop_one_dead():
            return True
        evicts = self._store.policy.evicts
        over = self._index.live_bytes + need - self.live_limit
        if (evicts and over > 0 and self._evict(over)) or self._evict_expired():
            return True
        return self._clean_emptiest() or (evicts and bool(self._evict(self.segment_bytes)))

    # -- evicting -----------------------------------------------------------------------------

    def _evict(self, wanted: int) -> int:
        """Evict the next victims, about `wanted` bytes but a bounded number. Bytes that went."""
        store = self._store
        with store.appending:
            self.ensure_writer()
            with store.lock:
                victims, freed = self._choose(wanted)
                if not victims:
                    return 0
                gone = store.remove_slots(victims)
                now = time.time_ns()
                late = sum(0 < slot.expires <= now for slot in victims)
                store.count("expirations", late)
                store.count("evictions", len(victims) - late)
        store.discard(gone)
        return freed

    def _choose(self, wanted: int) -> tuple[list[Slot], int]:
        index, freed = self._index, 0
        chosen: list[Slot] = []
        seen: set[int] = set()
        for at in self._victims(index):
            if at in seen:  # chosen anew before those chosen first were removed: that is all there are
                break
            seen.add(at)
            slot = index.slot(at)
            chosen.append(slot)
            freed += f.record_bytes(slot.lengths) + (slot.value_length if slot.is_large else 0)
            if freed >= wanted or len(chosen) >= _EVICT_MOST:
                break
        return chosen, freed

    def _evict_expired(self) -> int:
        """Remove expired entries of the next partition that has any. How many."""
        for _ in range(PARTITIONS):
            self._expiry_part = (self._expiry_part + 1) % PARTITIONS
            count = self.expire_part(self._expiry_part)
            if count:
                return count
        return 0

    def expire_part(self, part: int) -> int:
        """Remove the expired entries of a partition, in batches. How many."""
        store, total = self._store, 0
        while True:
            with store.appending:
                with store.lock:
                    if not expired(self._index, part, time.time_ns()):
                        return total
                self.ensure_writer()
                with store.lock:
                    found = expired(self._index, part, time.time_ns())
                    slots = [self._index.slot(at) for at in found[:_EVICT_MOST]]
                    if not slots:
                        return total
                    gone = store.remove_slots(slots)
                    store.count("expirations", len(slots))
            total += len(slots)
            store.discard(gone)

    def cull(self) -> int:
        """Evict until the live bytes are within their share of the limit. How many went."""
        before = self._store.evictions + self._store.expirations
        while self._store.policy.evicts and self._index.live_bytes > self.live_limit:
            if not self._evict(self._index.live_bytes - self.live_limit):
                break
        self.drop_dead()
        return self._store.evictions + self._store.expirations - before

    # -- dead segments ------------------------------------------------------------------------

    def drop_dead(self) -> None:
        while self.drop_one_dead():
            pass

    def drop_one_dead(self) -> bool:
        """Remove one sealed segment without live records, if there is one."""
        index = self._index
        for entry in index.table_entries():
            word = index.words[entry]
            dead = word & ~f.MASK32 == f.SEALED and not index.words[entry + f.T_LIVE]
            if word & ~f.MASK32 == f.DOOMED or dead:
                segment = word & f.MASK32
                if not dead or self._doom(segment):
                    self._unlink(segment)
                    return True
        return False

    def _doom(self, segment: int) -> bool:
        """Decide that a segment goes. What it says about other segments is written anew first."""
        store, index = self._store, self._index
        oldest = self._oldest_elsewhere(segment)
        newest = index.words[index.entry(segment) + f.T_NEWEST] or f.MASK64
        # If nothing older than its newest record is left elsewhere, its removals are moot.
        records = list(store.records(segment)) if oldest < newest else ()
        if index.words[f.W_PROMISED]:
            self.sync_dirty()
        with store.appending:
            kept = [r for r in records if r.head.kind > f.LARGE and self._still_says(r, oldest)]
            for record in kept:
                self.ensure_writer()
                store.log_change(record.head.kind, record.payload, record.head.stamp)
            if kept and index.words[f.W_PROMISED]:
                self.sync_dirty()
            with store.lock:
                entry = index.entry(segment)
                if index.state(segment) != f.SEALED or index.words[entry + f.T_LIVE]:
                    return False
                index.words[entry] = f.DOOMED | segment
        return True

    def _oldest_elsewhere(self, segment: int) -> int:
        """The lowest stamp in all other segments; those that are doomed still have their files.

        To be asked before `sync_dirty`: a file that is gone by then does not come back.
        """
        index = self._index
        return min(
            (
                index.words[entry + f.T_OLDEST]
                for entry in index.table_entries()
                if index.words[entry] & f.MASK32 != segment
            ),
            default=f.MASK64,
        )

    def _still_says(self, record: Record, oldest: int) -> bool:
        """True if a rebuild would go wrong without this removal or touch.

        It would not if a checkpoint covers it, provided that the head of the segment we write to
        tells so, in case the checkpoint is lost; nor if no record is left that is old enough.
        """
        store, stamp = self._store, record.head.stamp
        writer = store.writer
        if writer is not None and stamp <= writer.floor:
            return False
        if record.head.kind == f.TOUCH:
            low, high, expires = f.TOUCHED.unpack(record.payload)
            slot = store.lookup(low, high)
            return slot is not None and slot.stamp < stamp and slot.expires == expires
        return oldest < stamp

    def _unlink(self, segment: int) -> None:
        store = self._store
        store.files.forget(segment)
        try:
            store.backend.unlink(store.files.path(segment))
        except OSError as error:
            raise from_os_error(error, "cannot remove a segment") from error
        with store.lock:
            if self._index.state(segment) == f.DOOMED:
                self._index.drop_segment(segment)

    def sync_dirty(self) -> None:
        """Make all segments and large values durable, and their names.

        A removal may then destroy what it supersedes.
        """
        store, index = self._store, self._index
        try:
            store.sync_large()
            for entry in index.table_entries():
                segment, state = index.words[entry] & f.MASK32, index.words[entry] & ~f.MASK32
                size = index.words[entry + f.T_SIZE]
                if state == f.DOOMED or state == f.SEALED and index.words[entry + f.T_SYNCED] >= size:
                    continue
                fd = store.file_of(Slot(0, 0, segment << 32, 0, 0, 0, 0, 0))
                if fd is None:
                    continue
                store.backend.sync(fd)
                if state == f.SEALED and index.words[entry] == f.SEALED | segment:
                    index.words[entry + f.T_SYNCED] = size
            store.backend.sync_directory(store.segments_path)
        except OSError as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot make the cache durable") from error

    # -- cleaning -----------------------------------------------------------------------------

    def _emptiest(self) -> int | None:
        """The sealed segment that is worth most to clean: fewest live bytes for its size."""
        index, best, best_share = self._index, None, 1.0
        for entry in index.table_entries():
            size, live = index.words[entry + f.T_SIZE], index.words[entry + f.T_LIVE]
            if index.words[entry] & ~f.MASK32 != f.SEALED or size - live < size // _MIN_GARBAGE:
                continue
            owner = index.words[entry + f.T_OWNER]
            if live / max(size, 1) < best_share and (not owner or owner == self._store.owner.token):
                segment = index.words[entry] & f.MASK32
                if size - live - self._overhead(segment) >= size // _MIN_GARBAGE:
                    best, best_share = segment, live / max(size, 1)
        return best

    def _overhead(self, segment: int) -> int:
        """Bytes of a sealed segment that are no records: copies would have as many."""
        known = self._overheads.get(segment)
        if known is None:
            if len(self._overheads) > 4 * self._index.table_capacity:
                self._overheads.clear()
            fd = self._store.file_of(Slot(0, 0, segment << 32, 0, 0, 0, 0, 0))
            try:
                footer = footer_bytes(self._store.backend, fd) if fd is not None else 0
            except OSError:
                return f.SEGMENT_HEADER_BYTES
            known = self._overheads[segment] = f.SEGMENT_HEADER_BYTES + footer
        return known

    def _clean_some(self, budget: int) -> None:
        """Copy about `budget` bytes of live records out of the segment being cleaned."""
        cleaning = self._cleaning = self._cleaning or self._begin_cleaning()
        if cleaning is not None and self._copy_live(cleaning, budget):
            self._cleaning = None
            self.drop_one_dead()

    def _clean_emptiest(self) -> bool:
        """Clean one segment to the end. False if none is worth it or there is no room to copy to."""
        cleaning = self._cleaning = self._cleaning or self._begin_cleaning()
        if cleaning is None:
            return False
        if 0 < self._index.used_bytes - self._limit <= self.segment_bytes:
            # There is one segment more than there may be: no further one for the copies.
            live = self._index.words[self._index.entry(cleaning.segment) + f.T_LIVE]
            writer = self._store.writer
            if writer is None or writer.copy_room < live + live // 4:
                return False
        while not self._copy_live(cleaning, _COPY_BYTES):
            pass
        self._cleaning = None
        return self.drop_one_dead()

    def _begin_cleaning(self) -> Cleaning | None:
        store, index = self._store, self._index
        with store.lock:
            segment = self._emptiest()
            if segment is None:
                return None
            index.words[index.entry(segment) + f.T_OWNER] = store.owner.acquire()
        return Cleaning(segment, list(store.records(segment)))

    def _copy_live(self, cleaning: Cleaning, budget: int) -> bool:
        """Move live records to the head of the log. True once the segment has none left."""
        store, segment = self._store, cleaning.segment
        while cleaning.todo and budget > 0:
            batch: list[tuple[Record, Slot]] = []
            size = 0
            while cleaning.todo and size < min(budget, _COPY_BYTES, self.segment_bytes // 4):
                record = cleaning.todo.pop()
                slot = store.alive(record, segment)
                if slot is not None:
                    batch.append((record, slot))
                    size += record.head.record_bytes
                budget -= 256  # looking at a record costs about what copying so much does
            budget -= size
            cleaning.todo += [record for record, _ in self._copy(batch, segment)]
        if cleaning.todo:
            return False
        self._forget_owner(segment)
        return True

    def _forget_owner(self, segment: int) -> None:
        """All live records moved: if the count says otherwise, the count is wrong."""
        store, index = self._store, self._index
        with store.lock:
            if index.state(segment) != f.SEALED:
                return
            entry = index.entry(segment)
            index.words[entry + f.T_OWNER] = 0
            if index.words[entry + f.T_LIVE] and not any(
                store.alive(record, segment) for record in store.records(segment)
            ):
                live = index.words[f.W_LIVE_BYTES] - index.words[entry + f.T_LIVE]
                index.words[f.W_LIVE_BYTES] = max(0, live)  # below zero only by damage
                index.words[entry + f.T_LIVE] = 0

    def _copy(self, batch: list[tuple[Record, Slot]], segment: int) -> list[tuple[Record, Slot]]:
        """Copy records and point their slots to the copies. Those that have to be tried again."""
        if not batch:
            return []
        store, index = self._store, self._index
        fd = store.file_of(batch[0][1])
        if fd is None:
            return []
        raw = store.backend.read_many([(fd, r.head.record_bytes, r.offset) for r, _ in batch])
        sound = [
            (record, slot, self._unless_failed(data))
            for (record, slot), data in zip(batch, raw, strict=True)
            if self._is_sound(record, slot, self._unless_failed(data))
        ]
        with store.appending:
            writer = self._maintenance_room(sum(record.head.record_bytes for record, _, _ in sound))
            epoch = index.words[f.W_EPOCH]
            if sound:
                self._lower_oldest(writer.segment, min(slot.stamp for _, slot, _ in sound))
            places, copies = self._moved(sound, writer)
            try:
                writer.append_many(copies)
            except OSError as error:
                raise from_os_error(error, "cannot copy entries while cleaning") from error
        again = []
        with store.lock:
            valid = index.words[f.W_EPOCH] == epoch and index.state(writer.segment) == f.ACTIVE
            for (record, slot, _), place in zip(sound, places, strict=True):
                at = index.find(slot.low, slot.high)
                if at and index.words[at + f.S_PLACE] == slot.place:
                    if valid:
                        index.move(at, place)
                    else:
                        again.append((record, slot))
        return again

    @staticmethod
    def _unless_failed(data: bytes | OSError) -> bytes:
        if isinstance(data, OSError):
            raise from_os_error(data, "cannot read an entry while cleaning", "the entry was kept")
        return data

    def _is_sound(self, record: Record, slot: Slot, data: bytes) -> bool:
        """Check a record before it is copied; one that is damaged is dropped here."""
        store, head = self._store, record.head
        sound = len(data) == head.record_bytes and f.verify_head(
            data, 0, head, self._index.identity.seed, slot.place
        )
        if sound and head.kind == f.PUT:
            value = memoryview(data)[head.head_bytes : head.head_bytes + head.value_length]
            sound = f.value_sum(value, slot.low, slot.flags) == slot.value_sum
        if not sound:
            with store.appending, store.lock:
                current = store.alive(record, slot.segment)
                if current is not None:
                    store.drop_corrupt(current)
        return sound

    def _moved(
        self, sound: list[tuple[Record, Slot, bytes]], writer: SegmentWriter
    ) -> tuple[list[int], list[tuple[bytes, Buffer, bytes]]]:
        """The records as they read at the writer's tail: same stamp, other place."""
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

    def _maintenance_room(self, size: int) -> SegmentWriter:
        """Room for copies: up to one segment above the limit, since they are about to free one."""
        writer = self._store.writer
        if writer is None or writer.copy_room < size:
            writer = self._next_writer(self._capacity(size))
        return writer

    def _lower_oldest(self, segment: int, stamp: int) -> None:
        """Before an old record comes into a segment: removals that concern it must be kept."""
        word = self._index.entry(segment) + f.T_OLDEST
        if stamp < self._index.words[word]:
            self._index.words[word] = stamp

    # -- checkpoints --------------------------------------------------------------------------

    def _checkpoint_if_due(self) -> None:
        index, store = self._index, self._store
        # Until a checkpoint covers them, removals stay in the log: that is to be a small share of it.
        least = min(_CHECKPOINT_RECORDS, self._limit // _CHECKPOINT_SHARE)
        if index.words[f.W_WRITTEN] < max(least, index.count()):
            return
        if self._checkpoint is not None and self._checkpoint.is_alive():
            return
        with store.lock:
            index.words[f.W_WRITTEN] = 0
        self._checkpoint = threading.Thread(
            target=self._checkpoint_with_room, name="yatagarasu-checkpoint", daemon=True
        )
        self._checkpoint.start()

    def _checkpoint_with_room(self) -> None:
        try:
            with self._store.appending:
                self.make_space(checkpoint.most_bytes(self._index))
        except (CacheIOError, ClosedError):
            return
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        try:
            checkpoint.write(self._store)
        except (CacheIOError, OSError) as error:
            line = f"cannot write a checkpoint, recovery will take longer: {error}"
            self._store.log_once("checkpoint", line)
