"""Reading: whatever is read is verified against the slot that led there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from xxhash import xxh3_64_intdigest

from ..backends.base import Buffer
from ..codec import KIND_ARRAY
from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .counters import Counters
from .current import CurrentIndex
from .finding import Finding
from .format import (
    ALIGN,
    CODEC_FLAGS,
    FLAG_LARGE,
    FLAGS_SHIFT,
    HEAD_MASK,
    LENGTH_SHIFT,
    MASK32,
    RECORD_BYTES,
    RECORD_KEY_LENGTH,
    S_ACCESS,
    S_EXPIRES,
    SLOT,
    W_EVICTION,
    Slot,
    is_of_key,
    key_digest,
    value_sum,
)
from .index import IndexDamaged
from .life import Life
from .limits import Limits
from .locking import Locks
from .removal import Removal
from .unreadable import is_absence

T = TypeVar("T")
UNLOOKED = 1 << 20  # bytes of a value up to which no file is asked whether it can have so many,
_PLAIN_LENGTHS = UNLOOKED << LENGTH_SHIFT  # as a slot says it


class Found(NamedTuple):
    """A verified value. An array is a bytearray, which belongs to whoever gets it; what is mapped a view."""

    payload: Buffer
    flags: int


def value_of(record: bytes, head_bytes: int, flags: int) -> bytes | bytearray:
    """The value in a record, by one copy."""
    if flags & CODEC_FLAGS == KIND_ARRAY:
        return bytearray(memoryview(record)[head_bytes:])
    return record[head_bytes:]


class Names(NamedTuple):
    """What a record says beside its value."""

    key: bytes
    tag: bytes
    meta: bytes
    created: int
    stamp: int


class Reading:
    """Reads, and drops what lastingly fails its checksum."""

    def __init__(
        self, life: Life, locks: Locks, limits: Limits, files: CacheFiles, current: CurrentIndex,
        finding: Finding, removal: Removal, counters: Counters,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._limits, self._files = life, locks, limits, files
        self._current, self._finding, self._removal = current, finding, removal
        self._counters = counters
        self._read_once, self._touched = files.backend.read_once, finding.touched  # looked up once

    # -- one entry ---------------------------------------------------------------------------

    def get(self, low: int, high: int, key: bytes) -> Found | tuple[Buffer, int] | None:
        """(payload, flags) of the live entry of an encoded key, verified; None is a miss. Counted."""
        try:
            index = self._current.index
            at = index.find(low, high)
            if not at:
                self._counters.use(False)
                return None
            _, _, place, lengths, checksum, stamp, expires, access = SLOT.unpack_from(index.map, at * 8)
            if expires:
                now = time.time_ns()
                if expires <= now:
                    self._counters.use(False)
                    return None
                if stamp > now + f.AHEAD:
                    return self.get_carefully(low, high, key)
            flags = lengths >> FLAGS_SHIFT & 0xFF
            fd = self._files.segments.open_files.get(place >> 32)
            if fd is not None and lengths < _PLAIN_LENGTHS and not flags & FLAG_LARGE:
                head = (lengths & HEAD_MASK) * ALIGN
                record = self._read_once(fd, head + (lengths >> LENGTH_SHIFT), (place & MASK32) * ALIGN)
                data = value_of(record, head, flags)
                # value_sum and is_of_key, without calls of ours
                if (
                    xxh3_64_intdigest(data, low ^ flags) == checksum
                    and record.startswith(key, RECORD_BYTES)
                    and record.startswith(len(key).to_bytes(4, "little"), RECORD_KEY_LENGTH)
                ):
                    touched = self._touched(index.words[W_EVICTION])
                    if touched is not None:
                        index.words[at + S_ACCESS] = touched(access, index.stamp())
                    self._counters.use(True)
                    return data, flags
        except ours(IndexDamaged, OSError, ValueError, AttributeError, OverflowError):
            if self._life.closed:
                raise self._life.closed_error() from None
        return self.get_carefully(low, high, key)

    def get_carefully(self, low: int, high: int, key: bytes) -> Found | None:
        """For what is not plain: large values, unopened segments, races and damage."""
        found = self.fetch(low, high, key)
        self._counters.use(found is not None)
        return found

    def fetch(self, low: int, high: int, key: bytes) -> Found | None:
        """Like `get`, uncounted: retries, and on a lasting mismatch drops the entry."""
        return self.verified(low, high, key, self.load)

    def get_with_meta(self, low: int, high: int, key: bytes) -> tuple[Buffer, int, bytes] | None:
        """`get` of (payload, flags, metadata), of one and the same version. Counted."""
        found = self.verified(low, high, key, self._load_with_meta)
        self._counters.use(found is not None)
        return found

    def _load_with_meta(self, slot: Slot) -> tuple[Buffer, int, bytes] | None:
        found, names = self.load(slot), self.read_names(slot)
        return None if found is None or names is None else (*found, names.meta)

    def peek(self, low: int, high: int, key: bytes) -> Found | None:
        """`fetch` that is no use in the eviction order."""
        return self.verified(low, high, key, self.load, is_use=False)

    def fetch_stale(self, low: int, high: int, key: bytes) -> tuple[Found, Slot] | None:
        """The value of an encoded key that has expired, and whose stale time is not over. Uncounted, but a
        use in the eviction order."""
        load = partial(self._load_of_key, key, self.load)
        for _ in range(3):
            slot = self._finding.stale(low, high)
            if slot is None:
                return None
            found = self._finding.attempt(load, slot)
            if found is not None:
                self._finding.touch(low, high)
                return found, slot
        return None

    def verified(
        self, low: int, high: int, key: bytes, load: Callable[[Slot], T | None], *, is_use: bool = True
    ) -> T | None:
        """`load(slot)` of the entry of a key, tried again if the entry was moved or replaced meanwhile.

        A mismatch that lasts under the lock drops the entry: it is counted and logged, and it is
        a miss. An I/O error is raised, and drops nothing. Nor does the key of another entry with the same
        digest, which is a miss.
        """
        load = partial(self._load_of_key, key, load)
        for _ in range(3):
            slot = self._finding.lookup(low, high)
            if slot is None:
                return None
            loaded = self._finding.attempt(load, slot)
            if loaded is not None:
                if is_use:
                    self._finding.touch(low, high)
                return loaded
            if self._is_anothers(slot, key):
                return None
        if self._life.read_only:
            self._counters.corrupt += 1
            return None
        with self._locks.index:
            slot = self._finding.lookup(low, high)
            if slot is None:
                return None
            self._files.segments.forget(slot.segment)
            loaded = self._finding.attempt(load, slot)
            if loaded is None and not self._is_anothers(slot, key):
                self._removal.drop_corrupt(slot)
            return loaded

    def _load_of_key(self, key: bytes, load: Callable[[Slot], T | None], slot: Slot) -> T | None:
        return load(slot) if self._finding.is_record_of(key, slot) else None

    def _is_anothers(self, slot: Slot, key: bytes) -> bool:
        """True if the record is sound, and of another key."""
        names = self.names_of(slot)
        return names is not None and names.key != key

    def load(self, slot: Slot) -> Found | None:
        """The value of a slot; None if it is not what the slot promises. Errors are those of the system."""
        if slot.value_length > self._limits.size_limit and slot.value_length > self._current.index.used_bytes:
            return None  # damage: nothing that long is here
        if slot.is_large:
            pointer, flags = self._files.segments.pointer(slot), slot.flags
            found = self._files.large.read(slot.low, slot.high, pointer, slot.value_length, flags=flags)
            if found is None or value_sum(found[1], slot.low, flags) != slot.value_sum:
                return None
            return Found(found[0], flags)
        if not self.in_segment(slot):
            return None
        fd = self._files.segments.get(slot.segment)
        data = value_of(
            self._files.backend.read(fd, slot.value_length, slot.offset + slot.head_bytes), 0, slot.flags
        )
        if len(data) != slot.value_length or value_sum(data, slot.low, slot.flags) != slot.value_sum:
            return None
        return Found(data, slot.flags)

    def fetch_version(self, slot: Slot) -> Found | None:
        """The value of just this version of an entry; None if it was replaced or removed."""
        for _ in range(3):
            current = self._finding.lookup(slot.low, slot.high)  # it may have been moved
            # The checksum too: half of a slot may be read before it is overwritten, and half after.
            if current is None or not _is_version(current, slot):
                return None
            found = self._finding.attempt(self.load, current)
            if found is not None:
                return found
        names = self.names_of(slot)
        if names is not None:
            self.fetch(slot.low, slot.high, names.key)  # drops it if the damage lasts
        return None

    def read_names(self, slot: Slot) -> Names | None:
        """Key, tag, metadata and time of creation from the record itself.

        None if it is damaged, or not the record of the value that the slot promises.
        """
        fd = self._files.segments.get(slot.segment)
        data = self._files.backend.read(fd, slot.head_bytes, slot.offset)
        head = f.unpack_head(data, 0)
        if head is None or not f.verify_head(data, 0, head, self._current.index.identity.seed, slot.place):
            return None
        if head.value_sum != slot.value_sum:
            return None
        at = f.RECORD_BYTES
        key = data[at : at + head.key_length]
        at += head.key_length
        tag = data[at : at + head.tag_length]
        at += head.tag_length
        return Names(key, tag, data[at : at + head.meta_length], head.created, head.stamp)

    def names_of(self, slot: Slot) -> Names | None:
        """`read_names`, whose failures are told as those of the cache."""
        return self._finding.attempt(self.read_names, slot)

    def names_of_version(self, slot: Slot) -> Names | None:
        """`names_of` just the version that the slot's stamp says, wherever it was moved to meanwhile: half of
        a slot may be read before it is overwritten, and half after. (If it stays at odds with its record,
        that is damage, and harmless.)"""
        names, place = self.names_of(slot), slot.place
        while names is None:
            moved = self._finding.shown(slot.low, slot.high)
            if moved is None or moved.place == place or not _is_version(moved, slot):
                return None
            names, place = self.names_of(moved), moved.place
        if names.stamp != slot.stamp:
            current = self._finding.lookup(slot.low, slot.high)
            if current is None or current[:S_EXPIRES] != slot[:S_EXPIRES]:
                return None
        return names

    def is_current(self, slot: Slot) -> bool:
        """Whether that is still the version of the live entry, in whatever place."""
        current = self._finding.lookup(slot.low, slot.high)
        return current is not None and _is_version(current, slot)

    # -- many at once ------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes]) -> list[Found | tuple[Buffer, int] | None]:
        """`get` of each encoded key. What is not in the page cache is read in one batch."""
        results: list[Found | tuple[Buffer, int] | None] = [None] * len(keys)
        cold: list[tuple[int, Slot, bytes]] = []
        for i, key in enumerate(keys):
            slot = self._finding.lookup(*key_digest(key, self._current.seed))
            if slot is None:
                self._counters.use(False)
                continue
            results[i] = self.get_nowait(slot, key)
            if results[i] is None:
                cold.append((i, slot, key))
        self._read_many(cold, results, self.check, self.get_carefully)
        return results

    def peek_many(self, wanted: Sequence[tuple[Slot, bytes]]) -> list[Found | None]:
        """The values of slots and their encoded keys, read in one batch, counting and touching nothing. None
        for one that is not there any more."""
        results: list[Any] = [None] * len(wanted)
        every = [(i, slot, key) for i, (slot, key) in enumerate(wanted)]
        self._read_many(every, results, self._check_quietly, self.peek)
        return results

    def in_segment(self, slot: Slot) -> bool:
        """True for a value in a segment. One that is too long for that is damage: no memory is asked for."""
        if slot.is_large:
            return False
        index, end = self._current.index, slot.offset + slot.head_bytes + slot.value_length
        size = index.words[index.entry(slot.segment) + f.T_SIZE]
        if index.state(slot.segment) and end <= size and slot.value_length <= UNLOOKED:
            return True
        # The table may be damaged too. And others may write larger segments than the index was told of when
        # it was made anew.
        try:
            return end <= os.fstat(self._files.segments.get(slot.segment)).st_size
        except ours(OSError) as error:
            if is_absence(error):
                return False
            raise

    def get_nowait(self, slot: Slot, key: bytes) -> Found | None:
        """The value if it is in memory and verifies. Counted only then."""
        fd = self._files.segments.open_files.get(slot.segment)
        try:
            if fd is None or not self.in_segment(slot):
                return None
            data = self._files.backend.read_nowait(fd, slot.head_bytes + slot.value_length, slot.offset)
        except ours(OSError, OverflowError):
            return None
        if data is None:
            return None
        return self.check(slot, key, data)

    def check(self, slot: Slot, key: bytes, record: bytes) -> Found | None:
        """The value as a counted hit if `record` is of the key, and has what the slot promises."""
        found = self._check_quietly(slot, key, record)
        if found is not None:
            self._finding.touch(slot.low, slot.high)
            self._counters.use(True)
        return found

    def _check_quietly(self, slot: Slot, key: bytes, record: bytes) -> Found | None:
        data = value_of(record, slot.head_bytes, slot.flags)
        if value_sum(data, slot.low, slot.flags) != slot.value_sum or not is_of_key(record, key):
            return None
        return Found(data, slot.flags)

    def place_of(self, slot: Slot) -> int | None:
        """A descriptor for a value in a segment; None if that is not to be had, which whoever reads it hears
        of."""
        try:
            return self._files.segments.file_of(slot.segment) if self.in_segment(slot) else None
        except ours(OSError):
            return None

    def _read_many(
        self, cold: list[tuple[int, Slot, bytes]], results: list[Any],
        check: Callable[[Slot, bytes, bytes], Found | None],
        carefully: Callable[[int, int, bytes], Found | None],
    ) -> None:  # fmt: skip
        """Read into `results` in one batch. `carefully`: what is done where the record does not `check`."""
        plain, rest = [], []
        for i, slot, key in cold:
            place = self.place_of(slot)
            if place is None:
                rest.append((i, slot, key))
            else:
                plain.append((i, slot, key, place))
        plain.sort(key=lambda item: item[1].place)
        read = self._files.backend.read_many(
            [(fd, slot.head_bytes + slot.value_length, slot.offset) for _, slot, _, fd in plain]
        )
        for (i, slot, key, _), data in zip(plain, read, strict=True):
            found = None if isinstance(data, OSError) else check(slot, key, data)
            if found is None:
                rest.append((i, slot, key))
            results[i] = found
        for i, slot, key in rest:
            results[i] = carefully(slot.low, slot.high, key)


def _is_version(one: Slot, other: Slot) -> bool:
    """Whether two slots of a digest show the same version of its entry, in whatever places."""
    return (one.stamp, one.value_sum) == (other.stamp, other.value_sum)
