"""Storing a value that gets a file of its own: written, put in its place, and only then shown."""

from __future__ import annotations

import contextlib
import copy
import errno
import threading
from collections.abc import Iterable
from functools import partial

from ..backends.base import Buffer
from ..concurrency.cancelling import ensure_wanted, putting_in_order
from ..concurrency.interruption import ours, suppressing
from ..errors import CacheIOError, ClosedError, from_os_error
from ..guard import is_callers
from . import format as f
from .active import ActiveSegment
from .budget import Budget
from .cache_files import CacheFiles, Temporaries
from .counters import Counters
from .current import ATTEMPTS, CurrentIndex
from .expected import Expected
from .finding import Finding
from .format import FLAG_LARGE, Slot
from .item import Item
from .life import Life
from .limits import Limits
from .locking import Locks
from .pace import Pace
from .presence import Presence
from .room import Room
from .segment import SegmentWriter
from .showing import Showing
from .under_way import UnderWay


def too_many_changes() -> CacheIOError:
    return CacheIOError(errno.EAGAIN, "could not store an entry: too many concurrent changes; try again")


class _Reservation:
    """Bytes of a large file under way: room is made and counted before they are written.

    `most`: bytes that the value may come to; up to `known` that was looked at. What comes piece by piece
    evicts no more than was written.
    """

    def __init__(
        self, room: Room, budget: Budget, locks: Locks, under_way: UnderWay, most: int, known: int
    ) -> None:
        self._room, self._budget, self._locks, self._under_way = room, budget, locks, under_way
        self._most, self._known = most, known
        self.thread, self.length, self.pointer = threading.get_ident(), 0, 0

    def grow(self, length: int) -> None:
        grown = self.length + length
        if grown > self._known:
            self._budget.ensure_fits(grown, self._most)
        self._room.reserve_large(self, grown)

    def release(self) -> None:
        """Give back what is not used. If the handle was closed meanwhile, the last to close does that."""
        with contextlib.suppress(ClosedError), putting_in_order(), self._locks.index:
            self._under_way.give_up(self)


class LargeWriting:
    """Files of large values, and the records that point to them."""

    def __init__(
        self, life: Life, locks: Locks, limits: Limits, files: CacheFiles, temporaries: Temporaries,
        current: CurrentIndex, presence: Presence, finding: Finding, active: ActiveSegment,
        under_way: UnderWay, room: Room, budget: Budget, showing: Showing, counters: Counters, pace: Pace,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._limits, self._files = life, locks, limits, files
        self._temporaries, self._current, self._presence = temporaries, current, presence
        self._finding, self._active, self._under_way = finding, active, under_way
        self._room, self._budget, self._showing = room, budget, showing
        self._counters, self._pace = counters, pace

    def durably(self, showing: Showing) -> LargeWriting:
        """The same, but for making durable what it stores."""
        other = copy.copy(self)
        other._showing = showing
        return other

    def put(self, item: Item, expected: Expected | None = None) -> bool:
        """Store a value that is all there, and fits: again where somebody removed files of it meanwhile.
        False if `expected` was not met."""
        length = len(item.payload)
        for _ in range(ATTEMPTS):
            ensure_wanted()
            self._life.ensure_writable("store an entry")
            try:
                now = item.under(self._current.seed)._replace(payload=b"")
                return self.put_parts(now, item.pieces, length, length, expected)
            except CacheIOError as error:
                if error.errno != errno.ENOENT:
                    raise
        raise too_many_changes()

    def put_parts(
        self, item: Item, parts: Iterable[Buffer], most: int, known: int, expected: Expected | None
    ) -> bool:
        """Store a value that comes in parts: at most `most` bytes, of which `known` are known to fit.

        False if `expected` was not met when the file was there: then it is removed.
        """
        assert not item.payload, "the value comes in parts"
        item, durable = item._replace(flags=item.flags | FLAG_LARGE), self._showing.durable
        if not self._current.is_in_place():
            with self._locks.index:
                self._presence.ensure()
        reserved = _Reservation(self._room, self._budget, self._locks, self._under_way, most, known)
        self._under_way.begin(reserved)
        temporary = self._temporaries.path(value=True)
        large, in_room = self._files.large, self._room.in_room
        published: tuple[int, int, int] | None = None
        installed = False
        try:
            written = large.write(
                temporary, parts, item.low ^ item.flags, sync=durable, account=reserved.grow, in_room=in_room
            )
            published = (item.low, item.high, reserved.pointer)
            large.publish(temporary, *published, sync=durable, in_room=in_room)
            put = partial(self._put_pointer, item, *written, reserved, expected)
            installed = in_room(len(item.key) + len(written[1]), put)
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
                    self._files.backend.clear_away(large.path(*published))
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
            return slot is not None and slot.is_large and self._pointer(slot) == pointer
        return False

    def _pointer(self, slot: Slot) -> int | None:
        return self._finding.attempt(self._files.segments.pointer, slot)

    def _put_pointer(
        self, item: Item, length: int, sums: bytes, stream: _Reservation, expected: Expected | None
    ) -> bool:
        """Append the record of a large file that is in place, and let the index show it.

        False if `expected` is not met. It is asked, and the record appended, under one lock: a change that
        loses leaves no record.
        """
        payload = f.LARGE_POINTER.pack(stream.pointer) + sums
        checksum = f.value_sum(sums, item.low, item.flags)
        need = f.room_for(item.names_length, len(payload) + f.LARGE_POINTER.size)
        show = self._showing.show_appended
        for _ in range(ATTEMPTS):
            ensure_wanted()
            with self._locks.appending:
                writer = self._room.writer(need)
                if f.key_digest(item.key, self._current.seed) != item[:2]:
                    line = "another cache has come in the place of this one"
                    raise FileNotFoundError(errno.ENOENT, line, self._files.root)
                epoch = self._current.index.words[f.W_EPOCH]
                if expected is None:
                    slot, end = self._append(writer, item, length, checksum, payload)
                else:
                    with self._locks.index:
                        there = self._finding.entry(item.low, item.high, item.key, expected.or_stale)
                        settled = expected.settled(item, there)
                        if settled is None:
                            return False
                        slot, end = self._append(writer, settled, length, checksum, payload)
                        done, replaced = show(writer, end, slot, item.tag, epoch, stream)
            if expected is None:
                done, replaced = show(writer, end, slot, item.tag, epoch, stream)
            self._showing.discard(slot, replaced, large=True)
            if done:
                return True
            self._active.let_go_if_lost(writer)
        raise too_many_changes()

    def _append(
        self, writer: SegmentWriter, item: Item, length: int, checksum: int, payload: bytes
    ) -> tuple[Slot, int]:
        """Append the record of a large file: the slot that shows it, and where the segment ends then."""
        index, policy = self._current.index, self._limits.policy
        head, slot = item.draft(index, policy, writer.next_place, length, checksum, f.LARGE)
        self._showing.append(writer, head, payload, payload[: f.LARGE_POINTER.size])
        return slot, writer.tail
