"""Every entry's record and value are what was written, and its key and its tag lead to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ...concurrency.cancelling import ensure_wanted
from ...concurrency.interruption import ours
from ...guard import callers
from .. import format as f
from ..cache_files import CacheFiles
from ..current import CurrentIndex
from ..finding import Finding
from ..format import PARTITIONS, Slot
from ..index import Index
from ..lending import Lending
from ..limits import Limits
from ..locking import Locks
from ..reading import Reading
from ..removal import Removal
from .problem import Problem, fault_of, mends

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # more than any count can reach

Progress = Callable[[int, int], None]  # how many entries were looked at, of how many
_ByTag = set[tuple[int, int, int, int]]  # see Index.found_by_tag


class EntryCheck:
    """Every entry's record and value are what was written, and its key and its tag lead to it."""

    def __init__(
        self, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex, finding: Finding,
        reading: Reading, lending: Lending, removal: Removal,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._limits, self._current = locks, files, limits, current
        self._finding, self._reading, self._removal = finding, reading, removal
        self._lending = lending

    def entries(self, fix: bool, progress: Progress | None = None) -> Iterator[Problem]:
        """Every entry's record and value are what was written, and its key and its tag lead to it."""
        for part, at in self._suspects(progress):
            with self._locks.appending, self._locks.index:  # it may have been moved while we looked
                problem = self._lasting_problem(part, at, fix)
            if problem:
                yield problem

    def _suspects(self, progress: Progress | None) -> Iterator[tuple[int, int]]:
        """(partition, slot) of each entry that does not look right at first sight."""
        looked = 0
        for part in range(PARTITIONS):
            batch: list[tuple[int, Slot]] = []
            size = 0
            with self._locks.index:
                by_tag = self._current.index.found_by_tag(part)
            for at, slot in self._current.look(functools.partial(_slots_of, part)):
                if slot.low <= f.REMOVED:
                    continue
                batch.append((at, slot))
                size += slot.head_bytes + (
                    slot.value_length if self._reading.place_of(slot) is not None else 0
                )
                if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                    ensure_wanted()
                    yield from ((part, at) for at in self._not_sound(batch, by_tag))
                    looked += len(batch)
                    batch, size = [], 0
                    _tell(progress, looked, self._current.index.count())
            yield from ((part, at) for at in self._not_sound(batch, by_tag))
            looked += len(batch)
            _tell(progress, looked, self._current.index.count())

    def _not_sound(self, batch: list[tuple[int, Slot]], by_tag: _ByTag) -> Iterator[int]:
        """Those of some slots that are not right. Records in segments are read in one batch."""
        whole: list[tuple[int, Slot, int]] = []
        for at, slot in batch:
            fd = self._reading.place_of(slot)
            if self._finding.find(slot.low, slot.high) != at:
                yield at
            elif fd is not None:
                whole.append((at, slot, fd))
            elif self.problem(slot) or not self._is_in(by_tag, slot, self._tag_of(slot)):
                yield at
        wanted = [(fd, slot.head_bytes + slot.value_length, slot.offset) for _, slot, fd in whole]
        for (at, slot, _), data in zip(whole, self._files.backend.read_many(wanted), strict=True):
            if isinstance(data, OSError) or not self._is_record(slot, data, by_tag):
                yield at

    def _is_record(self, slot: Slot, data: bytes, by_tag: _ByTag) -> bool:
        """True if `data` is the record that the slot shows, key, tag and value included."""
        head = f.unpack_head(data, 0)
        if head is None or not f.verify_head(data, 0, head, self._current.seed, slot.place):
            return False
        key_end = f.RECORD_BYTES + head.key_length
        key, tag = data[f.RECORD_BYTES : key_end], data[key_end : key_end + head.tag_length]
        value = memoryview(data)[slot.head_bytes :]
        if (head.stamp, head.lengths) != (slot.stamp, slot.lengths) or not self._can_be_used(slot):
            return False
        if not self._is_in(by_tag, slot, tag):
            return False
        return f.key_digest(key, self._current.seed) == (slot.low, slot.high) and (
            f.value_sum(value, slot.low, slot.flags) == slot.value_sum and len(value) == slot.value_length
        )

    def _is_in(self, by_tag: _ByTag, slot: Slot, tag: bytes) -> bool:
        """Whether the tag of an entry, if it has one, leads to it."""
        return not tag or (*slot[:2], slot.stamp, f.tag_hash(tag, self._current.seed)) in by_tag

    def _tag_of(self, slot: Slot) -> bytes:
        names = self._reading.names_of(slot)
        return b"" if names is None else names.tag

    def _lasting_problem(self, part: int, at: int, fix: bool) -> Problem | None:
        """What is wrong with a slot. Both locks are held."""
        index = self._current.index
        if at not in index.partition_slots(part):
            return None
        slot = index.slot(at)
        if slot.low <= f.REMOVED:
            return None
        if index.find(slot.low, slot.high) != at:
            detail = "its key leads elsewhere"
            if fix:
                index.remove(at)
                index.recount(part)
        elif detail := self.problem(slot):
            fix = mends(fix, detail)
            if fix:
                self._removal.drop_corrupt(slot)
        elif detail := self._slot_problem(at, fix):
            pass
        if not detail:
            return None
        return Problem("entry", f"{f.segment_name(slot.segment)}+{slot.offset}", detail, fix)

    def _slot_problem(self, at: int, fix: bool) -> str:
        """What is wrong with a slot whose record and value are sound: its stamp, its access word, or what its
        tag leads to."""
        index, slot = self._current.index, self._current.index.slot(at)
        data = self._files.backend.read(self._files.segments.get(slot.segment), f.RECORD_BYTES, slot.offset)
        head, is_used = f.unpack_head(data, 0), self._can_be_used(slot)
        stamp = head.stamp if head is not None else slot.stamp
        if fix and stamp != slot.stamp:
            index.words[at + f.S_STAMP] = stamp
        if fix and not is_used:
            index.words[at + f.S_ACCESS] = self._limits.policy.first(stamp)
        tag_hash = f.tag_hash(self._tag_of(slot), index.identity.seed)
        is_found = not tag_hash or index.leads_by_tag(slot._replace(stamp=stamp), tag_hash)
        if fix and not is_found:
            index.tag(slot._replace(stamp=stamp), tag_hash)
        if stamp != slot.stamp:
            return "its slot is of another time than its record"
        if not is_used:
            return "when it was used makes no sense"
        return "" if is_found else "its tag does not lead to it"

    def _can_be_used(self, slot: Slot) -> bool:
        """Whether the access word is one that the policy can have written."""
        return self._limits.policy.is_possible(
            slot.access, slot.stamp, self._current.index.words[f.W_CLOCK] + _CLOCK_SLACK
        )

    def problem(self, slot: Slot) -> str:
        try:
            names = self._reading.read_names(slot)
            if names is None:
                return "its record is damaged"
            if f.key_digest(names.key, self._current.seed) != (slot.low, slot.high):
                return "its record is of another key"
            location = self._lending.location(slot)
            if location is None:
                return "its value fails its checksum"
            location.close()
            if slot.is_large and not self._lending.is_listed(slot):
                return "its list of checksums is damaged"
        except ours(OSError) as error:
            return fault_of(error)
        except OverflowError as error:  # an offset or length that no file has
            return str(error)
        return ""


@callers
def _tell(progress: Progress | None, looked: int, there: int) -> None:
    """No lock is held: what is called may take its time."""
    if progress is not None:
        progress(looked, max(looked, there))


def _slots_of(part: int, index: Index) -> list[tuple[int, Slot]]:
    return [(at, index.slot(at)) for at in index.partition_slots(part)]
