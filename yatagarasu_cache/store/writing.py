"""Writing: a record is appended first, then the index is changed under the lock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from ..backends.base import Buffer
from ..concurrency.cancelling import ensure_wanted, putting_in_order
from ..concurrency.interruption import ours
from ..errors import from_os_error
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .changes import Mark
from .core import PythonCore
from .counters import Counters
from .current import ATTEMPTS, CurrentIndex
from .expected import Expected
from .finding import Finding
from .format import Slot, value_sum
from .item import Item
from .large_writing import LargeWriting, too_many_changes
from .leaving_files import Gone
from .life import Life
from .limits import Limits
from .locking import Locks
from .pace import Pace
from .room import Room
from .segment import SegmentWriter
from .showing import Showing, unpacked
from .under_way import LargeFile

_BATCH_BYTES = 1 << 20  # of records written by one call in put_many


class Writing:
    """Stores entries, one, many, in parts, or depending on what is there."""

    def __init__(
        self, life: Life, locks: Locks, limits: Limits, current: CurrentIndex, finding: Finding,
        active: ActiveSegment, room: Room, budget: Budget, showing: Showing, large: LargeWriting,
        counters: Counters, pace: Pace, core: PythonCore,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._limits, self._current = life, locks, limits, current
        self._finding, self._active, self._room, self._budget = finding, active, room, budget
        self._showing, self._large, self._counters = showing, large, counters
        self._pace, self._core = pace, core

    def durably(self, showing: Showing) -> Writing:
        """The same, but for making durable what it stores, by `showing`."""
        other = copy.copy(self)
        other._showing, other._large = showing, self._large.durably(showing)
        return other

    # -- one entry ---------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Store an entry, in place of any older one. When it returns, every process sees it;
        with durability="sync" it survives a power cut. If it raises, the old entry is still there.
        """
        if self._is_large(item):  # which makes room for each of its steps
            self._large.put(item)
        else:
            self._room.in_room(len(item.payload), partial(self._put, item))

    def _is_large(self, item: Item) -> bool:
        """Whether the value gets a file of its own, by the settings in force. Refused if it can never fit."""
        length = len(item.payload)
        if length < self._limits.large_bytes:
            return False
        self._life.ensure_writable("store an entry")
        self._budget.ensure_fits(length)  # which takes over settings that somebody has changed
        return length >= self._limits.large_bytes

    def _put(self, item: Item) -> None:
        seed = self._current.seed
        item = item.under(seed)  # another cache may have come in the place of ours since it was drafted
        pieces, size = item.pieces, item.room
        length, checksum = len(item.payload), item.value_sum(pieces)
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(size)
                if seed != self._current.seed:  # or comes now
                    return self._put(item)
                index = self._current.index
                epoch = index.words[f.W_EPOCH]
                head, slot = item.draft(index, self._limits.policy, writer.next_place, length, checksum)
                self._showing.append(writer, head, pieces)
                end = writer.tail
            done, replaced = self._showing.show_appended(writer, end, slot, item.tag, epoch)
            if done:
                return self._showing.stored(slot, replaced, size)
            self._active.let_go_if_lost(writer)
        raise too_many_changes()

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
            need = item.room
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
            self.put(batch[at])

    def put_at_once(self, batch: list[Item]) -> list[int]:
        """The same, but for those that have to be put once more: which these are."""
        if len(batch[0].payload) >= self._limits.large_bytes:
            self.put(batch[0])
            return []
        size = sum(item.room for item in batch)
        return self._room.in_room(size, partial(self._put_batch, batch, size))

    def _put_batch(self, batch: list[Item], size: int) -> list[int]:
        showing = self._showing
        with self._locks.appending:
            writer = self._room.writer(size)
            batch = self._as_now(batch)
            slots, epoch = self._append_many(batch, writer)
            end = writer.tail
        if showing.durable:
            showing.make_durable(writer, end, unpacked(slots))
        again = showing.show_many(batch, slots, epoch, Gone([], Mark(writer.segment, 0)))
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
        return [item.under(seed) for item in items]

    def _append_many(self, batch: list[Item], writer: SegmentWriter) -> tuple[bytes, int]:
        """Append a batch with one write. The slots that name its records, packed, and the epoch before."""
        done = self._core.append_many(batch, writer)
        if done is not NotImplemented:
            appended: tuple[bytes, int] = done
            return appended
        index, policy = self._current.index, self._limits.policy
        epoch, offset = index.words[f.W_EPOCH], writer.tail
        records: list[tuple[bytes, Buffer, bytes]] = []
        slots: list[bytes] = []
        for item in batch:
            place = f.pack_place(writer.segment, offset)
            payload = item.data
            length, checksum = len(payload), value_sum(payload, item.low, item.flags)
            head, slot = item.draft(index, policy, place, length, checksum)
            records.append((head, payload, b""))
            slots.append(f.SLOT.pack(*slot))
            offset += len(head) + f.aligned(length)
        try:
            writer.append_many(records)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot write entries") from error
        return b"".join(slots), epoch

    # -- in parts ----------------------------------------------------------------------------

    def put_stream(
        self, item: Item, parts: Iterable[Buffer], length: int | None = None, expected: Expected | None = None
    ) -> bool:
        """`put` of a value that comes in parts, in constant memory. False if `expected` was not met: where
        that can be seen at once, nothing of the stream was read.

        A stream that turns out short is stored like any small value. `length`: bytes that it has, as far as
        is known.
        """
        self._life.ensure_writable("store an entry")
        self._budget.ensure_fits(length or 0)  # which looks what limits are in force
        if expected is not None and not self._is_met(expected, item):
            return False
        most = max(self._limits.stream_bytes, length or 0)
        iterator = iter(parts)
        start, whole = _first_bytes(iterator, self._limits.large_bytes)
        if not whole:
            return self._large.put_parts(item, chain(start, iterator), most, length or 0, expected)
        item = item._replace(payload=b"".join(start))
        self._budget.ensure_fits(len(item.payload), most)
        if expected is not None:
            return self.put_if(item, expected)
        self.put(item)
        return True

    # -- changes that depend on what is there ------------------------------------------------

    def put_if(self, item: Item, expected: Expected) -> bool:
        """`put` if what is there is as expected, else False. Atomic among all processes."""
        self._life.ensure_writable("store an entry")
        if not self._is_met(expected, item):
            return False
        if self._is_large(item):
            return self._large.put(item, expected)
        settled: Item | None = None

        def decide(slot: Slot | None) -> Item | None:
            nonlocal settled
            settled = expected.settled(item, slot)
            return settled

        self.change(item.key, item.room, decide, expected.or_stale)
        return settled is not None

    def _is_met(self, expected: Expected, item: Item) -> bool:
        """Whether it is worth trying; it is decided under the lock."""
        there = self._finding.entry(item.low, item.high, item.key, expected.or_stale)
        return expected.is_met(there)

    def change(
        self, key: bytes, size: int, decide: Callable[[Slot | None], Item | None], or_stale: bool = False
    ) -> None:
        """Under the lock: put what `decide(slot of the live entry or None)` returns, if anything, for `key`.

        The append happens under the lock too, so that a change that loses leaves no record which
        a rebuild could take for the winner. `size` bounds the record's bytes; keep it small. Where the
        volume is full, `decide` may be asked once more. `or_stale`: see `Finding.entry`.
        """
        self._room.in_room(size, partial(self._change, key, size, decide, or_stale))

    def _change(
        self, key: bytes, size: int, decide: Callable[[Slot | None], Item | None], or_stale: bool
    ) -> None:
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(size)
                with self._locks.index:
                    # The digest not before: it may be another cache's by now.
                    digest = f.key_digest(key, self._current.seed)
                    item = decide(self._finding.entry(*digest, key, or_stale))
                    if item is None:
                        return
                    if not self._active.may_show(writer.segment):
                        self._active.let_go_if_lost(writer)
                        continue
                    slot, done, replaced = self._append_and_show(item.under(self._current.seed), writer)
            if done:
                return self._showing.stored(slot, replaced, size)
            # else the clock was set back, or the index rebuilt
        raise too_many_changes()

    def _append_and_show(self, item: Item, writer: SegmentWriter) -> tuple[Slot, bool, LargeFile | None]:
        """The slot of a record, whether it is shown, and what it has replaced. Both locks are held."""
        index = self._current.index
        pieces, epoch = item.pieces, index.words[f.W_EPOCH]
        head, slot = item.draft(
            index, self._limits.policy, writer.next_place, len(item.payload), item.value_sum(pieces)
        )
        self._showing.append(writer, head, pieces)
        return slot, *self._showing.show_appended(writer, writer.tail, slot, item.tag, epoch)


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
