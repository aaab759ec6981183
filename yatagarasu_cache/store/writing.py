"""Writing: a record is appended first, then the index is changed under the lock."""

from __future__ import annotations

import contextlib
import copy
import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from ..backends.base import Buffer
from ..concurrency.cancelling import ensure_wanted, putting_in_order
from ..concurrency.interruption import ours, suppressing
from ..config import Settings
from ..errors import CacheIOError, ClosedError, StorageFull, ValueTooLarge, from_os_error
from ..guard import is_callers
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .cache_files import CacheFiles, Temporaries
from .changes import Mark
from .core import PythonCore
from .counters import Counters
from .current import ATTEMPTS, CurrentIndex
from .durability import Durability
from .finding import Finding
from .format import FLAG_LARGE, PARTITION_MASK, Slot, value_sum
from .index import IndexDamaged
from .life import Life
from .limits import Limits
from .locking import Locks
from .pace import Pace
from .presence import Presence
from .removal import Gone, Removal
from .room import Room
from .segment import SegmentWriter
from .under_way import LargeFile, UnderWay

_BATCH_BYTES = 1 << 20  # of records written by one call in put_many
_W_SETS = f.W_COUNTERS + f.COUNTERS.index("sets")


class Item(NamedTuple):
    """One entry to put. `expires` is in nanoseconds since the epoch, 0 for never."""

    low: int
    high: int
    key: bytes
    payload: Buffer
    flags: int
    expires: int = 0
    tag: bytes = b""
    meta: bytes = b""


def _unpacked(slots: bytes) -> list[Slot]:
    return [Slot._make(fields) for fields in f.SLOT.iter_unpack(slots)]


class _Reservation:
    """Bytes of a large file under way: room is made and counted before they are written.

    `most`: bytes that the value may come to; up to `known` that was looked at. What comes piece by piece
    evicts no more than was written.
    """

    def __init__(self, writing: Writing, most: int, known: int) -> None:
        self._writing, self._most, self._known = writing, most, known
        self.thread, self.length, self.pointer = threading.get_ident(), 0, 0

    def grow(self, length: int) -> None:
        grown = self.length + length
        if grown > self._known:
            self._writing.check_size(grown, self._most)
        self._writing.reserve(self, grown)

    def release(self) -> None:
        """Give back what is not used. If the handle was closed meanwhile, the last to close does that."""
        with contextlib.suppress(ClosedError), putting_in_order():
            self._writing.release(self)

class Writing:
    """Stores entries. `durable`: what it does survives a power cut."""

    def __init__(
        self, life: Life, locks: Locks, limits: Limits, files: CacheFiles, temporaries: Temporaries,
        current: CurrentIndex, presence: Presence, finding: Finding, active: ActiveSegment,
        under_way: UnderWay, durability: Durability, removal: Removal, counters: Counters, room: Room,
        budget: Budget, pace: Pace, core: PythonCore, settings: Settings,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._limits, self._files = life, locks, limits, files
        self._temporaries, self._current, self._presence = temporaries, current, presence
        self._finding, self._active, self._under_way = finding, active, under_way
        self._durability, self._removal, self._counters = durability, removal, counters
        self._room, self._budget, self._pace, self._core = room, budget, pace, core
        self.durable = False
        self._settings = settings

    # -- one entry ---------------------------------------------------------------------------

    def put(
        self, low: int, high: int, key: bytes, payload: Buffer, flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"",
    ) -> None:  # fmt: skip
        """Store an entry, in place of any older one. When it returns, every process sees it;
        with durability="sync" it survives a power cut. If it raises, the old entry is still there.
        """
        length = len(payload)
        if length >= self._limits.large_bytes:  # makes room for each of its steps
            self._put_whole(key, payload, flags, expires, tag, meta)
        else:
            put = partial(self._put, low, high, key, payload, flags, expires, tag, meta)
            self._room.in_room(length, put)

    def _put(
        self, low: int, high: int, key: bytes, payload: Buffer, flags: int, expires: int, tag: bytes,
        meta: bytes,
    ) -> None:  # fmt: skip
        length = len(payload)
        size = f.room_for(len(key) + len(tag) + len(meta), length)
        checksum, seed = value_sum(payload, low, flags), self._current.seed
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(size)
                if seed != self._current.seed:  # another cache is in the place of ours, which was removed
                    return self._put(
                        *f.key_digest(key, self._current.seed), key, payload, flags, expires, tag, meta
                    )
                index = self._current.index
                epoch = index.words[f.W_EPOCH]
                created, stamp = time.time_ns(), index.stamp()
                place = writer.next_place
                head = f.pack_record(
                    index.identity.seed, place, f.PUT, flags, key, tag, meta,
                    length, stamp, expires, created, checksum,
                )  # fmt: skip
                self._append(writer, head, payload)
                end = writer.tail
            lengths = length << 24 | flags << 16 | len(head) >> 4
            slot = Slot(low, high, place, lengths, checksum, stamp, expires, self._limits.policy.first(stamp))
            if self.durable:
                self._make_durable(writer, end, [slot])
            if self.show(slot, epoch, size):
                return
            self._active.let_go_if_lost(writer)
        raise _too_many_changes()

    def show(self, slot: Slot, epoch: int, size: int) -> bool:
        """The second half of `put`: let the index show a record. False if it has to be appended again."""
        done, replaced = self._show(slot, epoch)
        if done:
            if replaced is not None:
                self._removal.discard(Gone([replaced], Mark(slot.place >> 32, 0)), synced=self.durable)
            self._counters.sets += 1
            self._pace.spend(size)
        return done

    def _show(
        self, slot: Slot, epoch: int, stream: _Reservation | None = None
    ) -> tuple[bool, LargeFile | None]:
        """`_install`, with the lock. A record that is not shown then is taken back."""
        done = False
        try:
            with self._locks.index:
                done, replaced = self._install(slot, epoch, stream)
        finally:
            if not done:
                self._void([slot])
        return done, replaced

    def _append(self, writer: SegmentWriter, head: bytes, payload: Buffer, listed: bytes = b"") -> None:
        try:
            writer.append(head, payload, listed)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot write an entry") from error

    def _install(
        self, slot: Slot, epoch: int, stream: _Reservation | None = None
    ) -> tuple[bool, LargeFile | None]:
        """Let the index show the record of `slot`. The lock is held.

        (False, None): append it again, because the segment is no longer ours, a checkpoint began
        that does not cover it, or something else got the same or a later stamp first.
        Else (True, large file that this entry replaced, if any).
        """
        index = self._current.index
        if index.words[f.W_EPOCH] != epoch or not self._active.may_show(slot.place >> 32):
            return False, None
        if slot.access != (
            access := self._limits.policy.first(slot.stamp)
        ):  # the policy changed since it was made
            slot = slot._replace(access=access)
        at = self._finding.find(slot.low, slot.high)
        if self._current.index is not index:  # it was damaged, and made anew: that may have found the record
            return self._shown(slot, stream), None
        words = index.words  # not before: it may have been mapped anew
        first = words[at + f.S_STAMP] if at else words[f.W_DELETED + (slot.high & PARTITION_MASK)]
        if slot.stamp <= (least := max(epoch, first if first < f.LAST_STAMP else 0)):
            index.stamp_above(least)  # the clock word can lose a race while the clock is set back
            return False, None
        if stream is not None:  # somebody may have removed the file
            self._files.large.ensure_there(slot.low, slot.high, stream.pointer)
            # Nor may the next flush pass it by, where somebody has removed the mark that names it.
            words[f.W_FLUSHED] = min(words[f.W_FLUSHED], stream.pointer)
        replaced = []
        if at and words[at + f.S_LENGTHS] >> 16 & FLAG_LARGE:
            replaced = self._removal.large_files([index.slot(at)])
            if stream is None:  # else it is noted already that there is something to be looked for
                self._under_way.leave(replaced)
        try:
            index.put(slot, at)
        except ours(OSError) as error:
            self._under_way.left(replaced, removed=False)
            raise from_os_error(error, "cannot make the index larger") from error
        except IndexDamaged as error:
            self._under_way.left(replaced, removed=False)
            self._current.rebuild(str(error))
            return self._shown(slot, stream), None
        if stream is not None:
            self._under_way.stored(stream, replaced)
        index.settle(slot.place, f.record_bytes(slot.lengths))
        index.add(f.W_WRITTEN, 1)
        index.add(_W_SETS, 1)
        return True, replaced[0] if replaced else None

    def _shown(self, slot: Slot, stream: _Reservation | None = None) -> bool:
        """True if the index, which was made anew, shows the very record of `slot`."""
        at = self._finding.find(slot.low, slot.high)
        if not at or self._current.index.slot(at).place != slot.place:
            return False
        if stream is not None:
            self._under_way.stored(stream, ())
            self._under_way.count_anew()
        return True

    def _make_durable(self, writer: SegmentWriter, end: int, slots: Sequence[Slot]) -> None:
        """Sync what was appended up to `end`. If that fails, the records of `slots` are taken back."""
        try:
            self._durability.promise()
            writer.sync(end)
            self._durability.sync_names()
        except BaseException as error:
            self._void(slots)
            if not isinstance(error, OSError):
                raise
            raise from_os_error(error, "cannot make an entry durable") from error

    def _void(self, slots: Sequence[Slot]) -> None:
        """Take back records that the index does not show: a rebuild must not find them."""
        if not self._locks.appending._is_owned():
            self._locks.index.give_up_own()  # an exception may have left it, and who is appending waits for it
        with putting_in_order(), self._locks.appending:
            self._current.ensure_completed()  # an interruption may have come while one was shown
            for slot in slots:
                writer = self._active.writer
                if writer is None or writer.segment != slot.segment:
                    continue  # taken back when it was sealed
                if not self._shown(slot):
                    writer.void(slot.offset)

    # -- many at once ------------------------------------------------------------------------

    def put_many(self, items: Sequence[Item]) -> None:
        """`put` of each, in order, with few system calls: one write, one sync and one locking a batch.

        Not atomic as a whole: if it raises, the items before some point are stored.
        """
        for batch in self.batches(items):
            ensure_wanted()
            self.put_batch(batch)

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """`items` in parts, as `put_many` stores them: a large value by itself."""
        batch: list[Item] = []
        size = 0
        budget = min(_BATCH_BYTES, self._limits.segment_bytes // 2)
        for item in items:
            large = len(item.payload) >= self._limits.large_bytes
            need = _item_bytes(item)
            if batch and (large or size + need > budget):
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += need
            if large:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def put_batch(self, batch: list[Item]) -> None:
        """Store one of `batches`."""
        for at in self.put_at_once(batch):
            ensure_wanted()
            self.put(*self._as_now(batch[at : at + 1])[0])

    def put_at_once(self, batch: list[Item]) -> list[int]:
        """The same, but for those that have to be put once more: which these are."""
        if len(batch[0].payload) >= self._limits.large_bytes:
            self.put(*batch[0])
            return []
        size = sum(map(_item_bytes, batch))
        return self._room.in_room(size, partial(self._put_batch, batch, size))

    def _put_batch(self, batch: list[Item], size: int) -> list[int]:
        with self._locks.appending:
            writer = self._room.writer(size)
            batch = self._as_now(batch)
            slots, epoch = self._append_many(batch, writer)
            end = writer.tail
        if self.durable:
            self._make_durable(writer, end, _unpacked(slots))
        again = self._install_many(batch, slots, epoch, Gone([], Mark(writer.segment, 0)))
        self._counters.sets += len(batch) - len(again)
        if again:
            with putting_in_order():  # whoever took our segment, for its room, waits for us to let it go
                self._active.let_go_if_lost(writer)
        self._pace.spend(size)
        return again

    def _as_now(self, items: list[Item]) -> list[Item]:
        """Items with the digests that their keys have in the cache that is in place now."""
        seed = self._current.seed
        if not items or f.key_digest(items[0].key, seed) == items[0][:2]:
            return items
        digests = [f.key_digest(item.key, seed) for item in items]
        return [item._replace(low=low, high=high) for item, (low, high) in zip(items, digests, strict=True)]

    def _append_many(self, batch: list[Item], writer: SegmentWriter) -> tuple[bytes, int]:
        """Append a batch with one write. The slots that name its records, packed, and the epoch before."""
        done = self._core.append_many(batch, writer)
        if done is not NotImplemented:
            appended: tuple[bytes, int] = done
            return appended
        epoch = self._current.index.words[f.W_EPOCH]
        records, slots = self._draft(batch, writer)
        try:
            writer.append_many(records)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot write entries") from error
        return b"".join([f.SLOT.pack(*slot) for slot in slots]), epoch

    def _install_many(self, batch: list[Item], slots: bytes, epoch: int, replaced: Gone) -> list[int]:
        """Let the index show a batch with one locking. Which of it have to be put once more."""
        # Of several with the same key the last one counts: an earlier one is not tried again.
        last: dict[tuple[int, int], int] = {}
        again: list[int] = []
        left: list[Slot] = []  # not shown
        at = 0
        try:
            with self._locks.index:
                while at < len(batch):
                    at += self._core.install_many(slots, at, epoch)
                    if at == len(batch):
                        break
                    slot = Slot(*f.SLOT.unpack_from(slots, at * f.SLOT_BYTES))
                    done, old = self._install(slot, epoch)
                    if not done:
                        left.append(slot)
                        last = last or {(item.low, item.high): number for number, item in enumerate(batch)}
                        if last[batch[at].low, batch[at].high] == at:
                            again.append(at)
                    at += 1
                    if old is not None:
                        replaced.files.append(old)
        finally:
            if left or at < len(batch):
                self._void([*left, *_unpacked(slots)[at:]])
            self._removal.discard(replaced, synced=self.durable)
        return again

    def _draft(
        self, batch: list[Item], writer: SegmentWriter
    ) -> tuple[list[tuple[bytes, Buffer, bytes]], list[Slot]]:
        """Records for consecutive places from the writer's tail on, and the slots that name them."""
        records: list[tuple[bytes, Buffer, bytes]] = []
        slots: list[Slot] = []
        offset = writer.tail
        seed, first = self._current.index.identity.seed, self._limits.policy.first
        for low, high, key, payload, flags, expires, tag, meta in batch:
            created, stamp = time.time_ns(), self._current.index.stamp()
            place = f.pack_place(writer.segment, offset)
            checksum = value_sum(payload, low, flags)
            head = f.pack_record(
                seed, place, f.PUT, flags, key, tag, meta,
                len(payload), stamp, expires, created, checksum,
            )  # fmt: skip
            lengths = f.pack_lengths(len(payload), flags, len(head))
            records.append((head, payload, b""))
            slots.append(Slot(low, high, place, lengths, checksum, stamp, expires, first(stamp)))
            offset += len(head) + f.aligned(len(payload))
        return records, slots

    # -- large values ------------------------------------------------------------------------

    def _put_whole(
        self, key: bytes, payload: Buffer, flags: int, expires: int, tag: bytes, meta: bytes,
        only_absent: bool = False,
    ) -> bool:  # fmt: skip
        """`put_stream` of a value that is all there: again where somebody removed files of it meanwhile."""
        length = len(payload)
        for _ in range(ATTEMPTS):
            ensure_wanted()
            try:
                return self.put_stream(
                    *f.key_digest(key, self._current.seed), key, iter((payload,)), flags, expires, tag, meta, length,
                    only_absent,
                )  # fmt: skip
            except CacheIOError as error:
                if error.errno != errno.ENOENT:
                    raise
        raise _too_many_changes()

    def put_stream(
        self, low: int, high: int, key: bytes, parts: Iterable[Buffer], flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"", length: int | None = None,
        only_absent: bool = False,
    ) -> bool:  # fmt: skip
        """`put` of a value that comes in parts, in constant memory. False if `only_absent` forbade it.

        A stream that turns out short is stored like any small value. `length`: bytes that it has, as far as
        is known.
        """
        self._life.ensure_writable("store an entry")
        if length is not None:
            self.check_size(length)
        most = max(self._limits.stream_bytes, length or 0)
        iterator = iter(parts)
        start, whole = _first_bytes(iterator, self._limits.large_bytes)
        if whole:
            payload = b"".join(start)
            self.check_size(len(payload), most)
            if only_absent:
                return self.add(low, high, key, payload, flags, expires, tag, meta)
            self.put(low, high, key, payload, flags, expires, tag, meta)
            return True
        flags |= FLAG_LARGE
        if not self._current.is_in_place():
            with self._locks.index:
                self._presence.ensure()
        reserved = _Reservation(self, most, length or 0)
        self._under_way.begin(reserved)
        temporary = self._temporaries.path(value=True)
        published: tuple[int, int, int] | None = None
        installed = False
        try:
            size, checksum = self._files.large.write(
                temporary, chain(start, iterator), low ^ flags, sync=self.durable, account=reserved.grow,
                in_room=self._room.in_room,
            )  # fmt: skip
            published = (low, high, reserved.pointer)
            self._files.large.publish(temporary, *published, sync=self.durable, in_room=self._room.in_room)
            pointer = f.LARGE_POINTER.pack(published[2])
            put = partial(self._put_pointer, low, high, key, flags, expires, tag, meta, size, checksum)
            installed = self._room.in_room(len(key), partial(put, pointer, reserved, only_absent))
        except ours(OSError) as error:
            if is_callers(error):  # the stream's own
                raise
            if self._life.closed:  # and tidied up, perhaps
                raise self._life.closed_error() from error
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot write a large value") from error
        finally:
            # An interruption may have come after it was shown.
            if not installed and not (published is not None and self._shows(*published)):
                self._files.backend.clear_away(temporary)
                if published is not None:
                    self._files.backend.clear_away(self._files.large.path(*published))
                reserved.release()
            self._under_way.end(reserved)
        if installed:
            self._counters.sets += 1
            self._pace.spend(0)
        return installed

    def _shows(self, low: int, high: int, pointer: int) -> bool:
        """Whether the entry is the one whose value is in this very file. False of a closed cache."""
        with suppressing(ClosedError):
            self._current.ensure_completed()
            slot = self._finding.lookup(low, high)
            return (
                slot is not None
                and slot.is_large
                and self._finding.attempt(self._files.segments.pointer, slot) == pointer
            )
        return False

    def _put_pointer(
        self, low: int, high: int, key: bytes, flags: int, expires: int, tag: bytes, meta: bytes,
        size: int, checksum: int, pointer: bytes, stream: _Reservation, only_absent: bool,
    ) -> bool:  # fmt: skip
        """Append the record of a large file that is in place, and let the index show it.

        False if there is an entry already (`only_absent`), or a later one came first.
        """
        need = f.room_for(len(key) + len(tag) + len(meta), 2 * f.LARGE_POINTER.size)
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(need)
                index = self._current.index
                if f.key_digest(key, self._current.seed) != (low, high):
                    line = "another cache has come in the place of this one"
                    raise FileNotFoundError(errno.ENOENT, line, self._files.root)
                epoch, place = index.words[f.W_EPOCH], writer.next_place
                created, stamp = time.time_ns(), index.stamp()
                head = f.pack_record(
                    index.identity.seed, place, f.LARGE, flags, key, tag, meta,
                    size, stamp, expires, created, checksum,
                )  # fmt: skip
                lengths = f.pack_lengths(size, flags, len(head))
                slot = Slot(
                    low, high, place, lengths, checksum, stamp, expires, self._limits.policy.first(stamp)
                )
                if only_absent:
                    with self._locks.index:
                        if self._finding.entry(low, high, key) is not None:
                            return False
                        self._append(writer, head, pointer, pointer)
                        done, replaced = self._show_pointer(writer, writer.tail, slot, epoch, stream)
                else:
                    self._append(writer, head, pointer, pointer)
                    end = writer.tail
            if not only_absent:
                done, replaced = self._show_pointer(writer, end, slot, epoch, stream)
            if replaced is not None:
                self._removal.discard(
                    Gone([replaced], Mark(writer.segment, 0)), synced=self.durable, large=True
                )
            if done:
                return True
            self._active.let_go_if_lost(writer)
        raise _too_many_changes()

    def _show_pointer(
        self, writer: SegmentWriter, end: int, slot: Slot, epoch: int, stream: _Reservation | None = None
    ) -> tuple[bool, LargeFile | None]:
        if self.durable:
            self._make_durable(writer, end, [slot])
        return self._show(slot, epoch, stream)

    def check_size(self, length: int, most: int | None = None) -> None:
        """Refuse what can never fit, before anything changes; and a stream that is longer than `most`."""
        largest = self._settings.max_value_size
        if largest is not None and length > largest:
            raise ValueTooLarge(f"the value has {length} bytes and max_value_size is {largest}: raise it")
        if length > f.MAX_VALUE_BYTES:
            raise ValueTooLarge(f"the value has {length} bytes, {f.MAX_VALUE_BYTES} are possible: split it")
        room = self._budget.largest_value
        if length > room:
            raise ValueTooLarge(
                f"the value has {length} bytes and a cache with size_limit={self._limits.size_limit} "
                f"has room for {max(0, room)}: raise size_limit"
            )
        if length >= self._limits.large_bytes and length > (room := self._budget.largest_on_volume(room)):
            raise StorageFull(
                errno.ENOSPC,
                f"the value has {length} bytes and the volume has room for {max(0, room)}, even without all "
                "other entries: free space on the volume",
            )
        if most is not None and length > most:
            share = "" if self._settings.max_stream_size else ", an eighth of size_limit"
            raise ValueTooLarge(
                f"a stream whose length was not told has more than {most} bytes, and max_stream_size is "
                f"{self._limits.stream_bytes}{share}: pass length= to set, or raise max_stream_size"
            )

    # -- changes that depend on what is there ------------------------------------------------

    def add(
        self, low: int, high: int, key: bytes, payload: Buffer, flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"",
    ) -> bool:  # fmt: skip
        """`put` if there is no live entry. Atomic among all processes."""
        if self._finding.entry(low, high, key) is not None:
            return False
        length = len(payload)
        if length >= self._limits.large_bytes:
            return self._put_whole(key, payload, flags, expires, tag, meta, only_absent=True)
        added = False

        def decide(slot: Slot | None) -> Item | None:
            nonlocal added
            added = slot is None
            return Item(low, high, key, payload, flags, expires, tag, meta) if added else None

        self.change(key, f.room_for(len(key) + len(tag) + len(meta), length), decide)
        return added

    def change(self, key: bytes, size: int, decide: Callable[[Slot | None], Item | None]) -> None:
        """Under the lock: put what `decide(slot of the live entry or None)` returns, if anything, for `key`.

        The append happens under the lock too, so that a change that loses leaves no record which
        a rebuild could take for the winner. `size` bounds the record's bytes; keep it small. Where the
        volume is full, `decide` may be asked once more.
        """
        self._room.in_room(size, partial(self._change, key, size, decide))

    def _change(self, key: bytes, size: int, decide: Callable[[Slot | None], Item | None]) -> None:
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(size)
                with self._locks.index:
                    low, high = f.key_digest(
                        key, self._current.seed
                    )  # not before: it may be another cache's by now
                    item = decide(self._finding.entry(low, high, key))
                    if item is None:
                        return
                    item = item._replace(low=low, high=high)
                    if not self._active.may_show(writer.segment):
                        self._active.let_go_if_lost(writer)
                        continue
                    epoch = self._current.index.words[f.W_EPOCH]
                    records, (slot,) = self._draft([item], writer)
                    self._append(writer, *records[0])
                    done, replaced = self._show_pointer(writer, writer.tail, slot, epoch)
            if done:
                if replaced is not None:
                    self._removal.discard(Gone([replaced], Mark(writer.segment, 0)), synced=self.durable)
                self._counters.sets += 1
                self._pace.spend(size)
                return
            # else the clock was set back, or the index rebuilt
        raise _too_many_changes()

    def reserve(self, stream: _Reservation, length: int) -> None:
        """Make room for so much of a large value, and count it."""
        self._room.reserve_large(stream, length)

    def release(self, stream: _Reservation) -> None:
        """What is not used of that counts no more."""
        with self._locks.index:
            self._under_way.give_up(stream)

    def durably(self) -> Writing:
        """The same, but for making durable what it does."""
        other = copy.copy(self)
        other.durable = True
        return other


def _too_many_changes() -> CacheIOError:
    return CacheIOError(errno.EAGAIN, "could not store an entry: too many concurrent changes; try again")


def _item_bytes(item: Item) -> int:
    """Bytes that the item takes in a segment at most."""
    return f.room_for(len(item.key) + len(item.tag) + len(item.meta), len(item.payload))


def _first_bytes(parts: Iterator[Buffer], wanted: int) -> tuple[list[Buffer], bool]:
    """Parts up to `wanted` bytes, and whether that was all there are."""
    taken: list[Buffer] = []
    size = 0
    for part in parts:
        taken.append(part)
        size += len(part)
        if size >= wanted:
            return taken, False
    return taken, True
