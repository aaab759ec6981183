"""From a record that was appended to the slot that shows it: the second half of storing an entry."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence

from ..backends.base import Buffer
from ..concurrency.cancelling import putting_in_order
from ..concurrency.interruption import ours
from ..errors import from_os_error
from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles
from .changes import Mark
from .core import PythonCore
from .counters import Counters
from .current import CurrentIndex
from .durability import Durability
from .finding import Finding
from .format import FLAG_LARGE, PARTITION_MASK, Slot
from .index import IndexDamaged
from .item import Item
from .leaving_files import Gone, LeavingFiles
from .limits import Limits
from .locking import Locks
from .pace import Pace
from .segment import SegmentWriter
from .under_way import LargeFile, Stream, UnderWay

_W_SETS = f.W_COUNTERS + f.COUNTERS.index("sets")


def unpacked(slots: bytes) -> list[Slot]:
    return [Slot._make(fields) for fields in f.SLOT.iter_unpack(slots)]


def _tag_hashes(batch: Sequence[Item], seed: int) -> bytes:
    """The hashes of the tags of some items, packed; nothing if none of them has one."""
    of_tag = {tag: f.tag_hash(tag, seed) for tag in {item.tag for item in batch}}
    return array("I", [of_tag[item.tag] for item in batch]).tobytes() if any(of_tag) else b""


class Showing:
    """Lets the index show records under the lock; what is not shown is taken back.

    `durable`: a record is made durable before it is shown.
    """

    def __init__(
        self, locks: Locks, limits: Limits, files: CacheFiles, current: CurrentIndex, finding: Finding,
        active: ActiveSegment, under_way: UnderWay, durability: Durability, leaving: LeavingFiles,
        counters: Counters, pace: Pace, core: PythonCore,
    ) -> None:  # fmt: skip
        self._locks, self._limits, self._files, self._current = locks, limits, files, current
        self._finding, self._active, self._under_way = finding, active, under_way
        self._durability, self._leaving, self._counters = durability, leaving, counters
        self._pace, self._core = pace, core
        self.durable = False

    def durably(self) -> Showing:
        """The same, but for making durable what it shows."""
        other = copy.copy(self)
        other.durable = True
        return other

    def append(
        self, writer: SegmentWriter, head: bytes, payload: Buffer | tuple[Buffer, ...], listed: bytes = b""
    ) -> None:
        """`SegmentWriter.append`, whose failures are told as those of the cache."""
        try:
            writer.append(head, payload, listed)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot write an entry") from error

    def show(self, slot: Slot, tag: bytes, epoch: int, size: int) -> bool:
        """Show a record in the index, and account for its `size` bytes. False: it must be appended again."""
        done, replaced = self.show_locked(slot, tag, epoch)
        if done:
            self.stored(slot, replaced, size)
        return done

    def stored(self, slot: Slot, replaced: LargeFile | None, size: int) -> None:
        """What follows once an entry is shown. No lock is held."""
        self.discard(slot, replaced)
        self._counters.sets += 1
        self._pace.spend(size)

    def discard(self, slot: Slot, replaced: LargeFile | None, *, large: bool = False) -> None:
        """Remove the large file that an entry (`large`: whose value is one itself) has replaced."""
        if replaced is not None:
            gone = Gone([replaced], Mark(slot.segment, 0))
            self._leaving.discard(gone, synced=self.durable, large=large)

    def show_appended(
        self, writer: SegmentWriter, end: int, slot: Slot, tag: bytes, epoch: int,
        stream: Stream | None = None, keeps_file: bool = False,
    ) -> tuple[bool, LargeFile | None]:  # fmt: skip
        """`show_locked` of what was appended up to `end`, and is durable first where that is wanted."""
        if self.durable:
            self.make_durable(writer, end, [slot])
        return self.show_locked(slot, tag, epoch, stream, keeps_file)

    def show_locked(
        self, slot: Slot, tag: bytes, epoch: int, stream: Stream | None = None, keeps_file: bool = False
    ) -> tuple[bool, LargeFile | None]:
        """`_install`, with the lock. A record that is not shown then is taken back."""
        done = False
        try:
            with self._locks.index:
                done, replaced = self._install(slot, tag, epoch, stream, keeps_file)
        finally:
            if not done:
                self.void([slot])
        return done, replaced

    def _install(
        self, slot: Slot, tag: bytes, epoch: int, stream: Stream | None = None, keeps_file: bool = False
    ) -> tuple[bool, LargeFile | None]:
        """Let the index show the record of `slot`, which has this encoded tag. The lock is held.

        Returns (True, the large file that this entry replaced, if any). Or (False, None) if the record must
        be appended again: the segment is no longer ours, a checkpoint began that does not cover it, or
        another change got the same or a later stamp.

        `stream`: what its large file was stored as; with `keeps_file` it is that of the entry before.
        """
        index = self._current.index
        if index.words[f.W_EPOCH] != epoch or not self._active.may_show(slot.place >> 32):
            return False, None
        access = self._limits.policy.first(slot.stamp)
        if slot.access != access:  # the policy changed since it was made
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
        if at and words[at + f.S_LENGTHS] >> f.FLAGS_SHIFT & FLAG_LARGE and not keeps_file:
            replaced = self._leaving.files_of([index.slot(at)])
            if stream is None:  # else it is noted already that there is something to be looked for
                self._under_way.leave(replaced)
        try:
            index.put(slot, at, f.tag_hash(tag, index.identity.seed))
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

    def _shown(self, slot: Slot, stream: Stream | None = None) -> bool:
        """True if the index, which was made anew, shows the very record of `slot`."""
        at = self._finding.find(slot.low, slot.high)
        if not at or self._current.index.slot(at).place != slot.place:
            return False
        if stream is not None:
            self._under_way.stored(stream, ())
            self._under_way.count_anew()
        return True

    def make_durable(self, writer: SegmentWriter, end: int, slots: Sequence[Slot]) -> None:
        """Sync what was appended up to `end`. If that fails, the records of `slots` are taken back."""
        try:
            self._durability.promise()
            writer.sync(end)
            self._durability.sync_names()
        except BaseException as error:
            self.void(slots)
            if not isinstance(error, OSError):
                raise
            raise from_os_error(error, "cannot make an entry durable") from error

    def void(self, slots: Sequence[Slot]) -> None:
        """Take back records that the index does not show: a rebuild must not find them."""
        if not self._locks.appending._is_owned():
            # An exception may have left it, and who is appending waits for it.
            self._locks.index.give_up_own()
        with putting_in_order(), self._locks.appending:
            self._current.ensure_completed()  # an interruption may have come while one was shown
            for slot in slots:
                writer = self._active.writer
                if writer is None or writer.segment != slot.segment:
                    continue  # taken back when it was sealed
                if not self._shown(slot):
                    writer.void(slot.offset)

    def show_many(self, batch: list[Item], slots: bytes, epoch: int, replaced: Gone) -> list[int]:
        """Let the index show a batch with one locking. Which of it have to be put once more."""
        assert len(slots) == len(batch) * f.SLOT_BYTES
        hashes = _tag_hashes(batch, self._current.seed)
        # Of several with the same key the last one counts: an earlier one is not tried again.
        last: dict[tuple[int, int], int] = {}
        again: list[int] = []
        left: list[Slot] = []  # not shown
        at = 0
        try:
            with self._locks.index:
                while at < len(batch):
                    at += self._core.install_many(slots, hashes, at, epoch)
                    if at == len(batch):
                        break
                    slot = Slot(*f.SLOT.unpack_from(slots, at * f.SLOT_BYTES))
                    done, old = self._install(slot, batch[at].tag, epoch)
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
                self.void([*left, *unpacked(slots)[at:]])
            self._leaving.discard(replaced, synced=self.durable)
        return again
