"""The shared index: one mapped file that says where each key's record is.

Readers take no lock: they probe, and whatever they find is verified against its checksum by the
caller. Writers hold `lock` (threads and processes). They note each change of a slot in a small journal
first: if a process is killed in the middle, the next writer completes it, as readers may have seen it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..backends.base import Backend
from ..errors import ClosedError, StorageFull
from . import cache_settings, eviction, tag_table
from . import format as f
from .cache_settings import CacheSettings
from .damage import IndexDamaged
from .format import (
    CAPACITY_MASK,
    DESCRIPTOR_BITS,
    PARTITION_MASK,
    PARTITIONS,
    SLOT,
    SLOT_BYTES,
    SLOT_TAIL,
    SLOT_WORDS,
    UNTAGGED,
    W_BUSY,
    W_CLOCK,
    W_COUNTS,
    W_PARTITIONS,
    W_TAGS,
    TagCell,
)
from .tag_table import TagTable

__all__ = ["Index", "IndexDamaged", "grown_capacity", "is_overlong", "reachable", "rebuilt"]

MAX_LOAD = 0.75  # of a partition, removed slots included; beyond it linear probing gets slow
MIN_SLOTS = 8
_FIRST_GROWTH = 1.6  # a grown partition has 1.6 to 2.6 times its live slots, by its number,
_GROWTH_SPREAD = 1.0  # so that they don't all grow, and don't all stand half empty, at once
_GRAIN = 4096
_MOST_GROWTH = 4  # if one partition takes all of the file, growing makes it at most 2.6 times longer
# A table for all segments, and partitions and tag tables of the maximum size.
_MOST_FILE = f.HEADER_BYTES + (f.ENTRY_BYTES << 16) + (2 * PARTITIONS * SLOT_BYTES << DESCRIPTOR_BITS)
_FETCHED_BYTES = 128 << 20  # the index of about a million entries
_FETCH_STEP = 128 << 10
APPENDABLE = frozenset({f.ACTIVE, f.TAKEN})  # segments in which some handle may be about to append
_CLOCK_SLACK = 1 << 40  # nanoseconds by which stamps given out at once may differ
_NO_TAGS = UNTAGGED.to_bytes(8, "little") * PARTITIONS
_TABLE_TRIES = 10  # to read of a tag table while others put new ones in its place
_TAGGED_SHARE = 2 * f.TAG_CELL_SLOTS / f.TAG_CELLS  # slots of a tag table for each tagged entry


class Index:
    """The mapped file. `words` is its content as 8-byte words; slots are named by their first word.

    Closes `fd` in the end, also where it can't be mapped.
    """

    on_map: Callable[[], None] | None = None  # called after the file was mapped anew
    # Compiled code that makes a tag table anew, if it finds room for it in the file.
    renew_tags: Callable[[int, int], bool] | None = None

    def __init__(self, backend: Backend, path: str, fd: int, writable: bool = True) -> None:
        self.fd, self._backend = fd, backend
        self.path = path
        self.writable = writable
        self._ensure_mappable()
        self._map()
        data = bytes(self.map[: f.HEADER_BYTES])
        found = f.unpack_identity(data)
        if found is None:
            raise IndexDamaged("its identity fails its checksum")
        self.version, self.identity, self.table_capacity = found
        self.table_word = f.HEADER_BYTES // 8
        self.first_slot = (f.HEADER_BYTES + self.table_capacity * f.ENTRY_BYTES) // SLOT_BYTES
        if self.first_slot * SLOT_BYTES > len(self.map):
            raise IndexDamaged("it is shorter than its segment table")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Tells why, if the mapping is used after it is gone."""
            if name in ("words", "map"):
                raise ClosedError("the cache is closed: open it anew")
            raise AttributeError(name)

    def validate(self) -> None:
        """Raise `IndexDamaged` if the partitions can't be as the header says."""
        header = self.words[: f.HEADER_BYTES // 8].tolist()  # at once: they change
        counts = header[W_COUNTS : W_COUNTS + PARTITIONS]
        extents = list(zip(header[W_PARTITIONS : W_PARTITIONS + PARTITIONS], counts, strict=True))
        extents += ((d, 0) for d in header[W_TAGS : W_TAGS + PARTITIONS] if d != UNTAGGED)
        if os.fstat(self.fd).st_size & ~(SLOT_BYTES - 1) > len(self.map):  # another process made it longer
            self._map()
        if self.map[: f.IDENTITY.size + 8] != f.pack_identity(self.identity, self.table_capacity):
            raise IndexDamaged("its identity has changed")
        end, reached = len(self.map) // SLOT_BYTES, self.first_slot
        if not all(header[W_TAGS : W_TAGS + PARTITIONS]):
            raise IndexDamaged("a tag table is missing")
        for descriptor, count in sorted(extents):
            first, capacity = descriptor >> DESCRIPTOR_BITS, descriptor & CAPACITY_MASK
            if not descriptor and not count:
                continue
            if first < reached or first + capacity > end or not capacity:
                raise IndexDamaged("a partition is out of place")
            if not count >> 32 <= count & f.MASK32 <= capacity:
                raise IndexDamaged("a partition's count is impossible")
            reached = first + capacity
        # Twice: a change of them may have ended in between.
        if self.settings is None and self.words[W_BUSY] != f.BUSY_SETTING and self.settings is None:
            raise IndexDamaged("the cache's settings fail their checksum")
        clock = self.words[W_CLOCK]
        if clock > f.LAST_STAMP or max(self.words[f.W_EPOCH], self.words[f.W_FLOOR]) > clock + _CLOCK_SLACK:
            raise IndexDamaged("its clock is beyond all times, or behind its checkpoint")
        unused = self.words[f.W_NEXT_SEGMENT]
        if not 0 < unused <= f.LAST_SEGMENT + 1:
            raise IndexDamaged("there is no segment number left")
        for entry in self.table_entries():
            segment, state = self.words[entry] & f.MASK32, self.words[entry] >> 32
            if not f.ACTIVE <= state << 32 <= f.TAKEN or self.entry(segment) != entry or segment >= unused:
                raise IndexDamaged("a segment is in no known state, or out of place")
        counts = [*self.words[f.W_SEGMENT_BYTES : f.W_CHECKPOINT_BYTES + 1].tolist(), self.words[f.W_SLACK]]
        for field in (f.T_SIZE, f.T_LIVE):
            column = slice(self.table_word + field, self.first_slot * SLOT_WORDS, f.ENTRY_WORDS)
            counts += self.words[column].tolist()
        if max(counts) > f.MOST_BYTES:
            raise IndexDamaged("it counts more bytes than any disk has")

    # -- the file ---------------------------------------------------------------------------

    @classmethod
    def create(
        cls, backend: Backend, path: str, identity: f.Identity, table_capacity: int, mode: int,
        settings: CacheSettings = cache_settings.DEFAULT,
    ) -> Index:  # fmt: skip
        """A new empty index at `path`, which must not exist. It is not synced."""
        fd = backend.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            size = f.HEADER_BYTES + table_capacity * f.ENTRY_BYTES
            backend.allocate(fd, 0, size)
            start = f.pack_identity(identity, table_capacity).ljust(f.W_INDEX_BYTES * 8, b"\0")
            backend.write(fd, [start, size.to_bytes(8, "little")], 0)
        except BaseException:
            backend.let_go(fd)
            raise
        index = cls(backend, path, fd)
        index.note_file()
        index.words[f.W_NEXT_SEGMENT] = 1
        index._forget_tags()
        index.change_settings(settings)
        return index

    def _ensure_mappable(self) -> None:
        """A file far longer than its own header says is damaged. If it has holes (a copy), allocate their
        blocks now: if the volume were full later, the mapping would kill the process (SIGBUS)."""
        status = os.fstat(self.fd)
        said = int.from_bytes(self._backend.read(self.fd, 8, f.W_INDEX_BYTES * 8), "little")
        if is_overlong(status.st_size, said):
            raise IndexDamaged(f"it has {status.st_size} bytes, and says {said}")
        if self.writable and _has_holes(self.fd, status):
            self._backend.allocate(self.fd, 0, status.st_size)

    def _map(self) -> None:
        size = os.fstat(self.fd).st_size & ~(SLOT_BYTES - 1)
        if not f.HEADER_BYTES <= size <= _MOST_FILE:
            raise IndexDamaged(f"it has {size} bytes")
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        self.map = mmap.mmap(self.fd, size, access=access)
        self.words = memoryview(self.map).cast("Q")
        if self.on_map is not None:
            self.on_map()

    def note_file(self) -> None:
        """Have the index say which file it is."""
        self.words[f.W_FILE], self.words[f.W_FILE + 1] = self.file()

    def is_copied(self) -> bool:
        """Whether it is in another file than it was made in; a copy made while in use may be torn."""
        return (self.words[f.W_FILE], self.words[f.W_FILE + 1]) != self.file()

    def file(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_dev & f.MASK64, status.st_ino & f.MASK64

    def fetch(self) -> None:
        """Wait until the file, or as much as is sensible, has been read into memory."""
        size = min(len(self.map), _FETCHED_BYTES)
        self._backend.prefetch(self.fd, size, 0)
        for end in range(_FETCH_STEP, size + _FETCH_STEP, _FETCH_STEP):
            self._backend.read(self.fd, 1, min(end, size) - 1)  # with its last byte the rest is there

    def sync(self) -> None:
        self.map.flush()
        self._backend.sync(self.fd)

    def retire(self) -> None:
        """Another index has taken this one's place: close the file. Threads may still read the mapping."""
        if self.fd >= 0:
            self.fd, fd = -1, self.fd
            self._backend.let_go(fd)

    def close(self) -> None:
        """Forget the mapping and close the file. Threads still reading keep the mapping alive."""
        if self.fd >= 0:
            try:
                del self.words, self.map
            except AttributeError:  # it could not be mapped, or was forgotten before
                pass
            finally:
                self.retire()

    def __del__(self) -> None:
        if self.__dict__.get("fd", -1) >= 0:  # an exception came before it was closed
            self.close()

    @property
    def superseded(self) -> bool:
        return bool(self.words[f.W_SUPERSEDED])

    def supersede(self) -> None:
        """Tell every process that maps this file that another one has taken its place."""
        self.words[f.W_SUPERSEDED] = 1
        for part in range(PARTITIONS):
            self.words[W_PARTITIONS + part] = self.words[W_TAGS + part] = f.SUPERSEDED_DESCRIPTOR

    # -- settings of the cache --------------------------------------------------------------

    @property
    def settings(self) -> CacheSettings | None:
        """The cache's settings; None while somebody changes them, and if they are damaged."""
        return cache_settings.from_words(self.words)

    def change_settings(self, settings: CacheSettings) -> None:
        """Change the settings for all who use the cache. The lock is held.

        The policy's word first: hits from now on follow it, then the existing access words are converted.
        """
        words = self.words
        before = words[f.W_EVICTION]
        words[W_BUSY] = f.BUSY_SETTING
        limit, words[f.W_EVICTION], headroom, checksum = cache_settings.in_words(settings)
        if words[f.W_EVICTION] != before:
            self._reorder()
        words = self.words
        words[f.W_SIZE_LIMIT], words[f.W_HEADROOM] = limit, headroom
        words[f.W_SETTINGS_SUM] = checksum  # last: the others believe the words then
        words[W_BUSY] = 0

    def _reorder(self) -> None:
        """Make all access words those of the policy in force."""
        policy, now = eviction.policy_of(self.words), self.words[W_CLOCK] + _CLOCK_SLACK
        for part in range(PARTITIONS):
            slots = self.partition_slots(part)
            eviction.take_over(self.words, slots, policy, now)

    def _complete_settings(self) -> None:
        """Complete a change that a death cut short: each word holds its old value or the new one."""
        self._reorder()
        self.words[f.W_SETTINGS_SUM] = cache_settings.checksum(self.words)
        if self.settings is None:
            raise IndexDamaged("the cache's settings are impossible")
        self.words[W_BUSY] = 0

    # -- stamps -----------------------------------------------------------------------------

    def stamp(self) -> int:
        """Nanoseconds since the epoch, but above every stamp seen, also if the clock was set back.

        Two processes get the same stamp only if they ask at the same time: commits check for that.
        """
        words = self.words
        now = time.time_ns()
        last = words[W_CLOCK]
        if now <= last or now > f.LAST_CLOCK:
            now = last + 1
            if last >= f.LAST_STAMP:  # a reader would take such a stamp for damage
                now = self._latest_stamp() + 1
        words[W_CLOCK] = now
        return now

    def _latest_stamp(self) -> int:
        """The highest stamp in the index, for when the clock's word makes no sense: it was at least that."""
        words, stamps = self.words, [min(time.time_ns(), f.LAST_CLOCK), self.words[f.W_EPOCH]]
        stamps += words[f.W_DELETED : f.W_DELETED + PARTITIONS].tolist()
        for entry in self.table_entries():
            stamps += (words[entry + f.T_CREATED], words[entry + f.T_CLOSED])
        for part in range(PARTITIONS):
            with contextlib.suppress(IndexDamaged):  # whoever looks something up in there gets the error
                stamps += self.column(self.partition_slots(part), f.S_STAMP)
        return max((stamp for stamp in stamps if stamp < f.LAST_STAMP), default=0)

    def stamp_above(self, least: int) -> int:
        """A stamp that is also above `least`: what is stored under the lock must not get an earlier one."""
        words, stamp = self.words, self.stamp()
        if words[f.W_EPOCH] >= f.LAST_STAMP:  # damage
            words[f.W_EPOCH] = stamp
        stamp = max(stamp, words[f.W_EPOCH] + 1, least + 1 if least < f.LAST_STAMP else 0)
        words[W_CLOCK] = max(words[W_CLOCK], stamp)
        return stamp

    def add(self, word: int, number: int) -> None:
        """Add to a count. It stays within its word, whatever damage has made of it."""
        words = self.words
        words[word] = min(max(0, words[word] + number), f.MASK64)

    # -- lookup (no lock) -------------------------------------------------------------------

    def find(self, low: int, high: int) -> int:
        """The slot of a digest, or 0. Never blocks; the caller verifies what it reads there."""
        while True:
            try:
                words = self.words
                descriptor = words[W_PARTITIONS + (high & PARTITION_MASK)]
                if not descriptor:
                    return 0
                capacity = descriptor & CAPACITY_MASK
                base = (descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS
                end = base + capacity * SLOT_WORDS
                at = start = base + low % capacity * SLOT_WORDS
                while True:
                    word = words[at]
                    if word == low and words[at + 1] == high:
                        return at
                    if not word:
                        break
                    at += SLOT_WORDS
                    if at == end:
                        at = base
                    if at == start:
                        break
                # The partition may have been replaced, and its old place reused, meanwhile.
                if words[W_PARTITIONS + (high & PARTITION_MASK)] == descriptor:
                    return 0
            except IndexError:
                self.reach(at + 1)
            except ZeroDivisionError:
                raise IndexDamaged("a partition has no slots") from None

    def reach(self, end: int) -> None:
        """Have at least `end` words mapped: another process or thread may have made the file longer.
        `IndexDamaged` if it was replaced by another one, or is not as long."""
        if end <= len(self.words):  # another thread was faster
            return
        if self.words[f.W_SUPERSEDED]:
            raise IndexDamaged("superseded: another one has taken its place")
        self._map()
        if end > len(self.words):
            raise IndexDamaged("it points beyond its end")

    def slot(self, at: int) -> f.Slot:
        return f.Slot._make(SLOT.unpack_from(self.map, at * 8))

    def partition_slots(self, part: int) -> range:
        """The slots of a partition, used or not."""
        descriptor = self.words[W_PARTITIONS + part]
        base = (descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS
        end = base + (descriptor & CAPACITY_MASK) * SLOT_WORDS
        self.reach(end)
        if descriptor and base < self.first_slot * SLOT_WORDS:
            raise IndexDamaged("a partition is out of place")
        return range(base, end, SLOT_WORDS)

    def column(self, slots: range, field: int) -> list[int]:
        """One field of each of `slots`: a strided copy, some nanoseconds a slot."""
        if not len(slots):
            return []
        return self.words[slots.start + field : slots.stop : slots.step].tolist()

    def live_slots(self) -> Iterator[int]:
        """Every live slot; under the lock exact, else as of some moment during the walk."""
        for part in range(PARTITIONS):
            slots = self.partition_slots(part)
            lows = self.column(slots, 0)
            yield from (at for at, low in zip(slots, lows, strict=True) if low > f.REMOVED)

    def slots_in(self, segment: int) -> list[f.Slot]:
        """The live slots that say they are in a segment. The lock is held."""
        slots = map(self.slot, list(self.live_slots()))
        return [slot for slot in slots if slot.segment == segment]

    def named_segments(self) -> set[int]:
        """The segments that live slots name, listed or not."""
        found: set[int] = set()
        for part in range(PARTITIONS):
            slots = self.partition_slots(part)
            lows, places = self.column(slots, 0), self.column(slots, f.S_PLACE)
            found.update(place >> 32 for low, place in zip(lows, places, strict=True) if low > f.REMOVED)
        return found

    def count(self) -> int:
        """Live entries, at most as many as slots. The lower halves (slots in use) never add up to 1 << 32."""
        live = sum(self.words[W_COUNTS : W_COUNTS + PARTITIONS].tolist()) >> 32
        slots = len(self.words) // SLOT_WORDS - self.first_slot
        if live > slots and self.fd >= 0:  # another process made the file longer, or it is damage
            slots = os.fstat(self.fd).st_size // SLOT_BYTES - self.first_slot
        return min(live, slots)

    # -- changes (the lock is held) ---------------------------------------------------------

    def put(self, slot: f.Slot, at: int, tag_hash: int = 0) -> None:
        """Write `slot` over `at`, the slot of the same digest, or anew if `at` is 0. `tag_hash`: that of its
        record's tag."""
        part = slot.high & PARTITION_MASK
        if at and at not in self.partition_slots(part):
            raise IndexDamaged("a partition is out of place")
        old_lengths = self.words[at + f.S_LENGTHS] if at else 0
        if not at:
            at = self._free_slot(part, slot.low)
        if tag_hash:
            self.tag(slot, tag_hash)
        words = self.words
        fresh = words[at] <= f.REMOVED
        new_live = self.live_word(slot.place >> 32)
        old_live = new_live if fresh else self.live_word(words[at + f.S_PLACE] >> 32)
        size, less = f.record_bytes(slot.lengths), 0 if fresh else f.record_bytes(old_lengths)
        self._begin(part, at, SLOT.pack(*slot), new_live, size, old_live, less)
        SLOT_TAIL.pack_into(self.map, at * 8 + 16, *slot[2:])
        if fresh:
            self.add(W_COUNTS + part, (1 << 32) + (words[at] == f.EMPTY))
            words[at + 1] = slot.high
            words[at] = slot.low
        self._count(new_live, size, old_live, less)
        words[W_BUSY] = 0

    def remove(self, at: int) -> None:
        """Make the slot a tombstone, or empty where no probe needs to pass it. Works also if its digest is
        damaged and does not lead to it."""
        if (place := self.partition_with(at)) is None:
            raise IndexDamaged("a slot is in no partition")
        part, slots = place
        words = self.words  # not before: `partition_with` may have mapped the file anew
        live, size = self.live_word(words[at + f.S_PLACE] >> 32), f.record_bytes(words[at + f.S_LENGTHS])
        following = at + SLOT_WORDS if at + SLOT_WORDS < slots.stop else slots.start
        empty = words[following] == f.EMPTY
        left = f.EMPTY if empty else f.REMOVED
        slot = self.slot(at)._replace(low=left, access=0)
        self._begin(part, at, SLOT.pack(*slot), live, 0, live, size)
        words[at] = left
        words[at + f.S_ACCESS] = 0
        counts = words[W_COUNTS + part] - (1 << 32) - empty
        if counts >= 0:
            words[W_COUNTS + part] = counts
        else:  # damage
            self.recount(part)
        self._count(live, 0, live, size)
        words[W_BUSY] = 0

    def move(self, at: int, place: int) -> None:
        """Point the slot to a copy of its record, of the same size, at `place`."""
        words = self.words
        new_live, old_live = self.live_word(place >> 32), self.live_word(words[at + f.S_PLACE] >> 32)
        size, slot = f.record_bytes(words[at + f.S_LENGTHS]), self.slot(at)._replace(place=place)
        self._begin(words[at + 1] & PARTITION_MASK, at, SLOT.pack(*slot), new_live, size, old_live, size)
        words[at + f.S_PLACE] = place
        self._count(new_live, size, old_live, size)
        words[W_BUSY] = 0

    def _count(self, new_live: int, more: int, old_live: int, less: int) -> None:
        """Count a record's bytes where it is now, and take off what it replaces."""
        words = self.words
        words[old_live], words[new_live] = self._counts(new_live, more, old_live, less)
        words[f.W_LIVE_BYTES] = min(max(0, words[f.W_LIVE_BYTES] - less) + more, f.MASK64)

    def _counts(self, new_live: int, more: int, old_live: int, less: int) -> tuple[int, int]:
        """What the two words, which may be one and the same, will hold. Clamped to a word's range: a damaged
        slot may name the wrong segment."""
        words = self.words
        left = max(0, words[old_live] - less)
        now = min((left if old_live == new_live else words[new_live]) + more, f.MASK64)
        return (now if old_live == new_live else left), now

    def partition_with(self, at: int) -> tuple[int, range] | None:
        """The partition that a slot lies in, and its slots. Its digest tells, unless that is damaged."""
        part = self.words[at + 1] & PARTITION_MASK
        if at in (slots := self.partition_slots(part)):
            return part, slots
        for part in range(PARTITIONS):
            if at in (slots := self.partition_slots(part)):
                return part, slots
        return None

    def leads_to(self, at: int) -> bool:
        """True if the digest in a slot leads to it; else it, or a slot before it, is damaged."""
        return self.find(self.words[at], self.words[at + 1]) == at

    def reset(self) -> None:
        """Forget every entry. The old extents are free for reuse at once."""
        words = self.words
        words[W_BUSY] = f.BUSY_CLEARING
        for part in range(PARTITIONS):
            words[W_PARTITIONS + part] = 0
            words[W_COUNTS + part] = 0
        self._forget_tags()
        for entry in self.table_entries():
            words[entry + f.T_LIVE] = 0
        words[f.W_LIVE_BYTES] = 0
        words[W_BUSY] = 0

    def _begin(
        self, part: int, at: int, slot: bytes, new_live: int, more: int, old_live: int, less: int
    ) -> None:  # fmt: skip
        """Put what slot and counts will be into the journal, then mark the change as begun: from then on it
        will be completed, also if we die in the middle."""
        left, now = self._counts(new_live, more, old_live, less)
        f.JOURNAL.pack_into(self.map, W_BUSY * 8, 0, part, at, new_live, now, old_live, left, slot)
        self.words[W_BUSY] = f.BUSY_CHANGING

    def repair(self) -> bool:
        """Complete a change whose process died holding the lock. True if there was one."""
        busy = self.words[W_BUSY]
        if not busy:
            return False
        if busy == f.BUSY_CLEARING:
            self.reset()
            return True
        if busy == f.BUSY_COUNTING:
            self.sum_up()
            self.words[W_BUSY] = 0
            return True
        if busy == f.BUSY_SETTING:
            self._complete_settings()
            return True
        _, part, at, new_live, now, old_live, left, slot = f.Journal._make(
            f.JOURNAL.unpack_from(self.map, W_BUSY * 8)
        )
        in_table = range(self.table_word, self.first_slot * SLOT_WORDS)
        slot_like = at % SLOT_WORDS == 0 and at >= self.first_slot * SLOT_WORDS
        known = busy == f.BUSY_CHANGING and part < PARTITIONS
        if not known or not slot_like or new_live not in in_table or old_live not in in_table:
            raise IndexDamaged("its journal makes no sense")
        self.reach(at + SLOT_WORDS)
        self.map[at * 8 : at * 8 + SLOT_BYTES] = slot
        self.words[old_live], self.words[new_live] = left, now
        self.recount(part)
        self.sum_up()
        self.words[W_BUSY] = 0
        return True

    def sum_up(self) -> None:
        """The totals of what the segment table says."""
        entries = self.table_entries()
        self.words[f.W_ACTIVE] = self.count_active()
        self.words[f.W_SEGMENT_BYTES], self.words[f.W_SLACK] = self.segment_bytes()
        live = sum(self.words[entry + f.T_LIVE] for entry in entries)
        self.words[f.W_LIVE_BYTES] = min(live, f.MASK64)
        self.words[f.W_INDEX_BYTES] = os.fstat(self.fd).st_size

    def recount(self, part: int) -> None:
        lows = self.column(self.partition_slots(part), 0)
        used = len(lows) - lows.count(f.EMPTY)
        self.words[W_COUNTS + part] = (used - lows.count(f.REMOVED)) << 32 | used

    # -- partitions -------------------------------------------------------------------------

    def _free_slot(self, part: int, low: int) -> int:
        """Where a new entry of the partition goes; grows or rebuilds the partition if it is full."""
        words = self.words
        descriptor = words[W_PARTITIONS + part]
        capacity = descriptor & CAPACITY_MASK
        if words[W_COUNTS + part] >> 32 > words[W_COUNTS + part] & f.MASK32:  # damage
            self.recount(part)
        if (words[W_COUNTS + part] & f.MASK32) + 1 > capacity * MAX_LOAD:
            self._grow(part)
            words = self.words
            descriptor = words[W_PARTITIONS + part]
            capacity = descriptor & CAPACITY_MASK
        slots = self.partition_slots(part)
        self._ensure_none_hidden(slots, low)
        words = self.words  # not before: it may have been mapped anew
        for at in _probed(slots, low):
            if words[at] <= f.REMOVED:
                return at
        raise IndexDamaged("a partition has no free slot though its count says so")

    def ensure_absent(self, low: int, high: int) -> None:
        """Raise `IndexDamaged` if a digest that is not found may have a slot that damage has hidden."""
        self._ensure_none_hidden(self.partition_slots(high & PARTITION_MASK), low)

    def _ensure_none_hidden(self, slots: range, low: int) -> None:
        """Raise `IndexDamaged` if a slot behind the empty one at which a search ends belongs before it: a
        removal leaves a tombstone where another slot follows."""
        words, capacity = self.words, len(slots)
        at = next((at for at in _probed(slots, low) if words[at] == f.EMPTY), None)
        if at is None:
            return
        end = slots.index(at)
        for i in range(1, capacity):
            low = words[slots[(end + i) % capacity]]
            if low == f.EMPTY:
                return
            if low > f.REMOVED and (end + i - low) % capacity >= i:
                raise IndexDamaged("slots are behind an empty one that nobody has emptied")

    def _grow(self, part: int) -> None:
        """Build the partition anew aside, without removed slots, and swap it in with one store."""
        slots = self.partition_slots(part)
        lows = self._sound_lows(part, slots)
        live = len(lows) - lows.count(f.EMPTY) - lows.count(f.REMOVED)
        capacity = grown_capacity(part, live)
        self.load(part, live, rebuilt(self.map, slots, lows, capacity))

    def _sound_lows(self, part: int, slots: range) -> list[int]:
        """The first words of a partition's slots, which are about to be taken elsewhere."""
        lows = self.column(slots, 0)
        if reachable(part, lows, self.column(slots, 1)) != lows:
            raise IndexDamaged("some of its slots are where nobody finds them")
        return lows

    def ensure_reachable(self) -> None:
        """Raise `IndexDamaged` if a live slot is not where its digest leads: another one may have replaced
        it there. A rebuild finds hidden entries."""
        for part in range(PARTITIONS):
            self._sound_lows(part, self.partition_slots(part))

    def install(self, part: int, first: int, capacity: int, live: int) -> None:
        """Make the extent the partition's. A reader uses either the old or the new one."""
        entry, at = self.table_word + f.T_LIVE, first * SLOT_WORDS
        slot = bytes(self.map[at * 8 : at * 8 + SLOT_BYTES])
        self._begin(part, at, slot, entry, 0, entry, 0)
        self.words[W_PARTITIONS + part] = first << DESCRIPTOR_BITS | capacity
        self.words[W_COUNTS + part] = live << 32 | live
        self.words[W_BUSY] = 0

    def _extent(self, capacity: int) -> int:
        """The first slot of `capacity` free ones: a gap between the extents of partitions and tag tables, or
        the end.

        What is free follows from the descriptors alone, so no crash can leak or double it.
        """
        descriptors = self.words[W_PARTITIONS : W_PARTITIONS + PARTITIONS].tolist()
        descriptors += (d for d in self.words[W_TAGS : W_TAGS + PARTITIONS].tolist() if d != UNTAGGED)
        first = self.first_slot
        reached = max((d >> DESCRIPTOR_BITS) + (d & CAPACITY_MASK) for d in descriptors) * SLOT_WORDS
        self.reach(reached)
        for base, slots in sorted((d >> DESCRIPTOR_BITS, d & CAPACITY_MASK) for d in descriptors if d):
            if base - first >= capacity:
                return first
            first = max(first, base + slots)
        self._extend((first + capacity) * SLOT_BYTES)
        return first

    def _extend(self, size: int) -> None:
        """Make the file at least `size` bytes, with blocks behind them: a full volume says so now."""
        have = os.fstat(self.fd).st_size
        if size > have:
            size = -(-size // _GRAIN) * _GRAIN
            self._backend.allocate(self.fd, have, size - have)
            self.words[f.W_INDEX_BYTES] = size
        if size > len(self.map):
            self._map()

    def fitting_bytes(self, table_capacity: int) -> int:
        """About what the file would take if it were made anew for the present entries, and a table of
        `table_capacity` segments."""
        slots = self.count() * (_FIRST_GROWTH + _GROWTH_SPREAD / 2) + PARTITIONS * MIN_SLOTS
        slots += self.most_tagged() * _TAGGED_SHARE
        return f.HEADER_BYTES + table_capacity * f.ENTRY_BYTES + int(slots) * SLOT_BYTES

    def copied_to(self, other: Index) -> None:
        """Fill an empty index of the same identity, whose table has room, with this one, without its gaps."""
        own = self.words
        for first, end in ((f.W_CLEAN, f.W_INDEX_BYTES), (f.W_INDEX_BYTES + 1, f.W_FILE),
                           (f.W_LEAVING, f.W_LEAVING + 1), (f.W_SLACK, f.W_SLACK + 1),
                           (f.W_DELETED, f.W_DELETED + PARTITIONS)):  # fmt: skip
            other.words[first:end] = own[first:end]
        for entry in self.table_entries():
            to = other.entry(own[entry] & f.MASK32)
            other.words[to : to + f.ENTRY_WORDS] = own[entry : entry + f.ENTRY_WORDS]
        for part in range(PARTITIONS):
            slots = self.partition_slots(part)
            lows = self._sound_lows(part, slots)
            live = len(lows) - lows.count(f.EMPTY) - lows.count(f.REMOVED)
            if live:
                other.load(part, live, rebuilt(self.map, slots, lows, grown_capacity(part, live)))
            other.load_tags(part, self.live_tags(part))

    def load(self, part: int, live: int, image: bytearray) -> None:
        """Make `image`, with `live` entries in it, the partition's extent."""
        capacity = len(image) // SLOT_BYTES
        first = self._extent(capacity)
        self.map[first * SLOT_BYTES : (first + capacity) * SLOT_BYTES] = image
        self.install(part, first, capacity, live)

    # -- tag tables -------------------------------------------------------------------------

    def tagged(self, part: int, tag_hash: int) -> list[TagCell] | None:
        """The cells of a partition's tag table that have a hash; None if others change it all the time. No
        lock is needed. Whoever uses them looks whether their entries are still there, and at their tags."""
        error = None
        for _ in range(_TABLE_TRIES):
            try:
                table, error = self._tag_table(part), None
                if table is None:
                    return []
                cells = table.of_hash(tag_hash)
                if table.is_in_place:
                    return cells
            except IndexDamaged as damage:  # or another table was put there
                error = damage
        if error is not None:
            raise error
        return None

    def tag(self, slot: f.Slot, tag_hash: int) -> None:
        """Have an entry found by the hash of its tag, once its slot is shown. The lock is held."""
        part = slot.high & PARTITION_MASK
        table = self._tag_table(part)
        if table is None or table.count >= table.room:
            self._renew_tags(part, table)
            table = self._tag_table(part)
        if table is None:
            raise IndexDamaged("a tag table is missing")
        table.add(slot.low, slot.high, slot.stamp, tag_hash)

    def live_tags(self, part: int) -> list[TagCell]:
        """The cells of a partition that count: those of the versions that slots show. The lock is held."""
        table = self._tag_table(part)
        if table is None:
            return []
        return [cell for cell in tag_table.cells_of(table.words) if self._counts_cell(part, cell)]

    def _counts_cell(self, part: int, cell: TagCell) -> bool:
        if cell.high & PARTITION_MASK != part or not cell.low & f.DIGEST_BIT:  # damage
            return False
        at = self.find(cell.low, cell.high)
        return bool(at) and self.words[at + f.S_STAMP] == cell.stamp

    def tag_words(self, part: int) -> memoryview:
        """A copy of the words of a partition's cells, whether they count or not. The lock is held."""
        table = self._tag_table(part)
        return memoryview(b"" if table is None else bytes(table.words)).cast("Q")

    def ensure_tags(self) -> None:
        """Raise `IndexDamaged` if a tag table contradicts itself. The lock is held."""
        for part in range(PARTITIONS):
            table = self._tag_table(part)
            if table is not None and sum(1 for _ in table.in_chains()) > table.count:
                raise IndexDamaged("the chains of a tag table have more cells than it has")

    def found_by_tag(self, part: int) -> set[tuple[int, int, int, int]]:
        """(low, high, stamp, tag hash) of all that a search by tag comes upon. The lock is held."""
        table = self._tag_table(part)
        return set() if table is None else {(*cell[:3], cell.tag_hash) for cell in table.in_chains()}

    def leads_by_tag(self, slot: f.Slot, tag_hash: int) -> bool:
        """Whether a search by tag comes upon an entry. The lock is held."""
        table = self._tag_table(slot.high & PARTITION_MASK)
        version = slot.low, slot.high, slot.stamp
        return table is not None and any(cell[:3] == version for cell in table.of_hash(tag_hash))

    @property
    def has_tags(self) -> bool:
        """Whether an entry had a tag since the cache was empty. Asked by many a set."""
        return self.map[W_TAGS * 8 : (W_TAGS + PARTITIONS) * 8] != _NO_TAGS

    def most_tagged(self) -> int:
        """At least as many as there are tagged entries."""
        descriptors = self.words[W_TAGS : W_TAGS + PARTITIONS].tolist()
        counts = self.words[W_COUNTS : W_COUNTS + PARTITIONS].tolist()
        return sum(
            min((descriptor & CAPACITY_MASK) * f.TAG_CELLS // f.TAG_CELL_SLOTS, count >> 32)
            for descriptor, count in zip(descriptors, counts, strict=True)
            if descriptor != UNTAGGED
        )

    def load_tags(self, part: int, cells: Sequence[TagCell]) -> None:
        """Make a tag table of `cells`, if there are any."""
        if cells:
            self._load_tags(part, tag_table.image(part, cells))

    def _tag_table(self, part: int) -> TagTable | None:
        descriptor = self.words[W_TAGS + part]
        if descriptor == UNTAGGED:
            return None
        first, slots = descriptor >> DESCRIPTOR_BITS, descriptor & CAPACITY_MASK
        self.reach((first + slots) * SLOT_WORDS)
        if first < self.first_slot:
            raise IndexDamaged("a tag table is out of place")
        return TagTable(self.words, part, descriptor)

    def _renew_tags(self, part: int, table: TagTable | None) -> None:
        """Make a tag table anew, of the cells that count, with room for as many again."""
        if self.renew_tags is not None:
            cells = 0 if table is None else table.count
            self._extent(tag_table.slots_for(cells, tag_table.growth(part)))  # the most that it can take
            if self.renew_tags(part, time.time_ns()):
                return
        self._load_tags(part, tag_table.image(part, self.live_tags(part)))

    def _load_tags(self, part: int, image: bytearray) -> None:
        """Put a tag table in the place of the one before, with one store."""
        capacity = len(image) // SLOT_BYTES
        first = self._extent(capacity)
        descriptor = first << DESCRIPTOR_BITS | capacity
        tag_table.place(image, descriptor, self.stamp())
        self.map[first * SLOT_BYTES : (first + capacity) * SLOT_BYTES] = image
        self.words[W_TAGS + part] = descriptor

    def _forget_tags(self) -> None:
        self.map[W_TAGS * 8 : (W_TAGS + PARTITIONS) * 8] = _NO_TAGS

    # -- the segment table ------------------------------------------------------------------

    def entry(self, segment: int) -> int:
        """The table entry (its first word) that a segment's id belongs to."""
        return self.table_word + segment % self.table_capacity * f.ENTRY_WORDS

    def live_word(self, segment: int) -> int:
        return self.table_word + segment % self.table_capacity * f.ENTRY_WORDS + f.T_LIVE

    def table_entries(self) -> list[int]:
        """Entries in use, in the order of the table."""
        end = self.table_word + self.table_capacity * f.ENTRY_WORDS
        states = self.words[self.table_word : end : f.ENTRY_WORDS].tolist()
        return [self.table_word + i * f.ENTRY_WORDS for i, state in enumerate(states) if state]

    def segments(self) -> list[int]:
        """Ids of all segments that hold entries, oldest first."""
        words = [self.words[entry] for entry in self.table_entries()]
        return sorted(word & f.MASK32 for word in words if word & ~f.MASK32 != f.LOG)

    def logs(self) -> list[int]:
        """Ids of all logs of changes, oldest first."""
        words = [self.words[entry] for entry in self.table_entries()]
        return sorted(word & f.MASK32 for word in words if word & ~f.MASK32 == f.LOG)

    def state(self, segment: int) -> int:
        """ACTIVE, SEALED, DOOMED, LOG, TAKEN, or 0 if there is no such segment (any more)."""
        word = self.words[self.entry(segment)]
        return word & ~f.MASK32 if word & f.MASK32 == segment else 0

    def add_segment(self, segment: int, state: int, size: int, owner: int, created: int) -> int:
        """Enter a segment; its bytes count from now on. The lock is held."""
        entry = self.entry(segment)
        words = self.words
        words[W_BUSY] = f.BUSY_COUNTING
        words[entry + f.T_SIZE] = size
        words[entry + f.T_LIVE] = 0
        words[entry + f.T_OWNER] = owner
        words[entry + f.T_CLOSED] = 0
        words[entry + f.T_SYNCED] = 0
        words[entry + f.T_CREATED] = created
        words[entry + f.T_TAIL] = 0
        words[entry] = state | segment
        self.add(f.W_ACTIVE, state in APPENDABLE)
        self._count_segment(size, 1)
        words[W_BUSY] = 0
        return entry

    def count_active(self) -> int:
        """Active and taken segments in the table: what `W_ACTIVE` should say."""
        return sum(self.words[entry] & ~f.MASK32 in APPENDABLE for entry in self.table_entries())

    def set_state(self, segment: int, state: int) -> None:
        """Let a segment be active, taken, sealed or doomed. The lock is held."""
        entry, words = self.entry(segment), self.words
        words[W_BUSY] = f.BUSY_COUNTING
        was = words[entry] & ~f.MASK32
        words[entry] = state | segment
        self.add(f.W_ACTIVE, (state in APPENDABLE) - (was in APPENDABLE))
        words[W_BUSY] = 0

    def settle(self, place: int, size: int) -> None:
        """The index shows the record at `place`, or never will: moves the tail if all before is settled."""
        entry, start = self.entry(place >> 32), (place & f.MASK32) * f.ALIGN
        words = self.words
        if words[entry + f.T_TAIL] == start and words[entry] == f.ACTIVE | place >> 32:
            words[entry + f.T_TAIL] = start + size

    def resize_segment(self, segment: int, size: int) -> None:
        entry = self.entry(segment)
        self.words[W_BUSY] = f.BUSY_COUNTING
        self._count_segment(self.words[entry + f.T_SIZE], -1)
        self._count_segment(size, 1)
        self.words[entry + f.T_SIZE] = size
        self.words[W_BUSY] = 0

    def drop_segment(self, segment: int) -> None:
        entry = self.entry(segment)
        self.words[W_BUSY] = f.BUSY_COUNTING
        self._count_segment(self.words[entry + f.T_SIZE], -1)
        self.add(f.W_ACTIVE, -(self.words[entry] & ~f.MASK32 in APPENDABLE))
        self.words[entry] = 0
        self.words[W_BUSY] = 0

    def _count_segment(self, size: int, sign: int) -> None:
        """One more segment of `size` bytes, or one less: it takes whole blocks."""
        taken = f.file_bytes(size)
        self.add(f.W_SEGMENT_BYTES, sign * taken)
        self.add(f.W_SLACK, sign * (taken - size))

    def segment_bytes(self) -> tuple[int, int]:
        """What the segments of the table take, and how much of that they leave of their last blocks."""
        sizes = [self.words[entry + f.T_SIZE] for entry in self.table_entries()]
        taken = sum(map(f.file_bytes, sizes))
        return min(taken, f.MASK64), min(taken - sum(sizes), f.MASK64)

    def next_segment_id(self) -> int | None:
        """An unused id whose table entry is free, or None if the table is full. The lock is held."""
        words = self.words
        first = words[f.W_NEXT_SEGMENT]
        if not 0 < first <= f.LAST_SEGMENT:  # damage
            known = max((words[entry] & f.MASK32 for entry in self.table_entries()), default=0)
            first = known + 1 if known < f.LAST_SEGMENT else 1
        for segment in range(first, first + self.table_capacity):
            if not words[self.entry(segment)] and segment <= f.LAST_SEGMENT:
                words[f.W_NEXT_SEGMENT] = segment + 1
                return segment
        return None

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, active segments and large files under way with the room that they were granted."""
        words = self.words
        return (
            words[f.W_SEGMENT_BYTES] + words[f.W_LARGE_BYTES]
            + words[f.W_INDEX_BYTES] + words[f.W_CHECKPOINT_BYTES]
        )  # fmt: skip

    def large_bytes(self) -> int:
        """What the large files of entries take."""
        total = 0
        for part in range(PARTITIONS):
            slots = self.partition_slots(part)
            pairs = zip(self.column(slots, 0), self.column(slots, f.S_LENGTHS), strict=True)
            total += sum(
                f.file_bytes(lengths >> f.LENGTH_SHIFT)
                for low, lengths in pairs
                if low > f.REMOVED and lengths >> f.FLAGS_SHIFT & f.FLAG_LARGE
            )
        return total

    @property
    def live_bytes(self) -> int:
        """What of `used_bytes` cleaning could not free, and is not being removed."""
        words = self.words
        return (
            words[f.W_LIVE_BYTES] + max(0, words[f.W_LARGE_BYTES] - words[f.W_LEAVING])
            + words[f.W_INDEX_BYTES] + words[f.W_CHECKPOINT_BYTES]
        )  # fmt: skip


def _has_holes(fd: int, status: os.stat_result) -> bool:
    if status.st_blocks * 512 >= status.st_size or not hasattr(os, "SEEK_HOLE"):
        return False
    # Few blocks prove nothing where the file system compresses.
    return os.lseek(fd, 0, os.SEEK_HOLE) < status.st_size


def is_overlong(size: int, said: int) -> bool:
    """Whether an index of `size` bytes is longer than one that says `said` can be. It may be longer by one
    partition: a process may have died after growing the file and before noting that."""
    return size > _MOST_GROWTH * said + _GRAIN * PARTITIONS


def _probed(slots: range, low: int) -> Iterator[int]:
    """A partition's slots in the order in which they are looked at for a digest."""
    start = low % len(slots) if slots else 0
    return chain(slots[start:], slots[:start])


def grown_capacity(part: int, live: int) -> int:
    factor = _FIRST_GROWTH + _GROWTH_SPREAD * (part * 37 % PARTITIONS) / PARTITIONS
    capacity = max(MIN_SLOTS, int((live + 1) * factor))
    if capacity > CAPACITY_MASK:
        raise StorageFull(errno.ENOSPC, "the index is full: spread the entries over several caches")
    return capacity


def reachable(part: int, lows: list[int], highs: list[int]) -> list[int]:
    """`lows`, the first words of a partition's slots, with those made `REMOVED` that no search finds.

    Such a slot is of another partition, or behind slots that damage has emptied: whoever replaced or deleted
    the entry since has not seen it, and copying it to another place would bring it back.
    """
    lows, capacity = list(lows), len(lows)
    before = next((i for i, low in enumerate(reversed(lows)) if not low), capacity)  # slots in use before it
    for at, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if not low:
            before = 0
            continue
        if low > f.REMOVED and ((at - low) % capacity > before or high & PARTITION_MASK != part):
            lows[at] = f.REMOVED
        before += 1
    live = [low for low in lows if low > f.REMOVED]
    if len(set(live)) < len(live):
        _drop_doubles(lows, highs)
    return lows


def _drop_doubles(lows: list[int], highs: list[int]) -> None:
    """Of several slots with one digest, a search finds the nearest: make the others `REMOVED`."""
    capacity, seen = len(lows), set()
    for at in sorted(range(capacity), key=lambda at: (at - lows[at]) % capacity):
        if lows[at] > f.REMOVED and (lows[at], highs[at]) in seen:
            lows[at] = f.REMOVED
        seen.add((lows[at], highs[at]))


def rebuilt(source: Any, slots: range, lows: list[int], capacity: int) -> bytearray:
    """An image of `capacity` slots with the live ones of `slots`, whose first words are `lows`."""
    image = bytearray(capacity * SLOT_BYTES)
    taken = bytearray(capacity)
    for at, low in zip(slots, lows, strict=True):
        if low > f.REMOVED:
            i = low % capacity
            while taken[i]:
                i = i + 1 if i + 1 < capacity else 0
            taken[i] = 1
            image[i * SLOT_BYTES : (i + 1) * SLOT_BYTES] = source[at * 8 : at * 8 + SLOT_BYTES]
    return image
