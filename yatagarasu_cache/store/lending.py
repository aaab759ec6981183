"""Values handed out other than as bytes: as a place in a file, as an open file, or mapped."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any, NamedTuple

from xxhash import xxh3_64

from ..backends.base import name_file
from ..codec import KIND_ARRAY, KIND_BYTES, KIND_STR
from ..concurrency.interruption import ours, suppressing
from ..entry import OwnLocation
from ..errors import CacheError
from . import format as f
from .cache_files import CacheFiles
from .chunks import PIECE_BYTES
from .counters import Counters
from .finding import Finding
from .format import CODEC_FLAGS, Slot
from .large import ChunkedFile
from .life import Life
from .locking import Locks
from .reading import Found, Reading
from .removal import Removal

# Kinds whose bytes are handed out as they are stored.
_IN_PLACE = frozenset({KIND_BYTES, KIND_STR, KIND_ARRAY})
# A mapping needs no descriptor. Before 3.13 the module keeps one all the same.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class LentFile(NamedTuple):
    """The open file of a large value; what is read of it is to be checked by its chunks."""

    location: OwnLocation  # which owns the descriptor
    chunks: ChunkedFile
    flags: int
    file: tuple[int, int, int]  # what its name is made of


class Lending:
    """What is lent stays as it is, whatever becomes of the entry, of its handle or of the cache."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, finding: Finding, reading: Reading,
        removal: Removal, counters: Counters,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files = life, locks, files
        self._finding, self._reading, self._removal = finding, reading, removal
        self._counters = counters

    def location(self, slot: Slot, start: int = 0, length: int | None = None) -> OwnLocation | None:
        """A descriptor of its own for a value, and where those of its bytes lie that begin at `start`; None
        if they fail their checksum. Of a large value nothing else is looked at."""
        start = min(start, slot.value_length)
        end = slot.value_length if length is None else min(start + length, slot.value_length)
        if slot.is_large:
            lent = self._lend(slot)
            if lent is None:
                return None
            location = lent.location
            sound = self._with_name(lent.chunks.is_sound, lent, start, end)
        else:
            # First: it owns what is opened.
            location = OwnLocation(-1, slot.offset + slot.head_bytes, slot.value_length, slot.flags)
            location.fd = self._files.segments.open_kept(slot.segment)
            sound = self._is_sound(slot, location)
        if not sound:
            location.close()
            return None
        location.value_length, location.offset, location.length = (
            slot.value_length, location.offset + start, end - start,
        )  # fmt: skip
        return location

    def _with_name(self, check: Any, lent: LentFile, *args: int) -> bool:
        try:
            sound: bool = check(*args)
            return sound
        except BaseException as error:
            name_file(error, self._files.large.path(*lent.file))
            lent.location.close()
            raise

    def _is_sound(self, slot: Slot, location: OwnLocation) -> bool:
        """Whether a value in a segment is what the slot promises. Read piece by
        piece: its length may be damage."""
        try:
            checksum, at, end = xxh3_64(seed=slot.low ^ slot.flags), location.offset, 0
            end = at + location.length
            while at < end:
                data = self._files.backend.read(location.fd, min(PIECE_BYTES, end - at), at)
                if not data:
                    return False
                checksum.update(data)
                at += len(data)
            return checksum.intdigest() == slot.value_sum
        except BaseException as error:
            name_file(error, self._files.segments.path(slot.segment))
            location.close()
            raise

    def _lend(self, slot: Slot) -> LentFile | None:
        """Open a large file. None if neither its list of sums nor, where that is damaged, all of its content
        is what the slot promises."""
        pointer, sums = self._files.segments.large(slot)
        file, seed, length = (slot.low, slot.high, pointer), slot.low ^ slot.flags, slot.value_length
        location = OwnLocation(-1, 0, length, slot.flags)  # first: it owns what is opened
        location.fd = fd = self._files.large.open(*file)
        try:
            whole = os.fstat(fd).st_size >= length
            found: bytes | None = sums
            if whole and f.value_sum(sums, slot.low, slot.flags) != slot.value_sum:
                found = self._files.large.sums(fd, length, seed=seed)
            if whole and found is not None and f.value_sum(found, slot.low, slot.flags) == slot.value_sum:
                chunks = self._files.large.chunked(fd, length, seed, found)
                return LentFile(location, chunks, slot.flags, file)
        except BaseException as error:
            name_file(error, self._files.large.path(*file))
            location.close()
            raise
        location.close()
        return None

    def is_listed(self, slot: Slot) -> bool:
        """Whether the record of a large value lists the right sums."""
        return f.value_sum(self._files.segments.large(slot)[1], slot.low, slot.flags) == slot.value_sum

    def opened(self, slot: Slot) -> LentFile | Found | None:
        """An open file if the value has one of its own, and is bytes or text; else the value."""
        if slot.is_large and slot.flags & CODEC_FLAGS in (KIND_BYTES, KIND_STR):
            return self._lend(slot)
        return self._reading.load(slot)

    def view(self, slot: Slot) -> Found | None:
        """The value, mapped if it has a file of its own and is used as it is stored; None if it fails its
        checksum. It is verified by reading it, as where the disk fails a mapping ends the process."""
        if not slot.is_large or slot.flags & CODEC_FLAGS not in _IN_PLACE:
            return self._reading.load(slot)
        lent = self._lend(slot)
        if lent is None:
            return None
        try:
            if not self._with_name(lent.chunks.is_sound, lent, 0, slot.value_length):
                return None
            with suppressing(OSError):  # not every file system can, and a process has so many mappings
                return Found(_mapped(lent.location.fd, slot.value_length), slot.flags)
        finally:
            lent.location.close()
        return self._reading.load(slot)

    def drop_damaged(self, file: tuple[int, int, int]) -> None:
        """A chunk of a large file is damaged: drop the entry if that file is still its own, and count it."""
        if self._life.read_only:
            self._counters.corrupt += 1
            return
        try:
            with self._locks.index:
                slot = self._finding.lookup(*file[:2])
                if slot is not None and slot.is_large and self._pointer(slot) == file[2]:
                    self._removal.drop_corrupt(slot)
        except ours(CacheError):  # whoever reads it the next time drops it
            pass

    def _pointer(self, slot: Slot) -> int | None:
        return self._finding.attempt(self._files.segments.pointer, slot)


def _mapped(fd: int, length: int) -> memoryview:
    """The first bytes of a file. They stay while anything refers to them."""
    if not length:
        return memoryview(b"")
    return memoryview(mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, **_UNTRACKED))
