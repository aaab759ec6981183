"""The checkpoint: the index as of some stamp, made durable in a file of its own.

After a power cut recovery starts from it and replays only what the segments say beyond; removals
that it covers are not needed in the log any more. It is an aid: without it, segments and log give
the same entries, save that nothing at or below the newest floor is trusted (see `recovery`).
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_64

from ..backends.base import Backend
from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles
from .format import PARTITIONS, SLOT_BYTES
from .index import Index, reachable
from .tag_table import cells_of
from .unreadable import is_absence

_PIECE_SLOTS = 1 << 14  # read at once, one MiB
_LEAST_OFFSET, _LEAST_HEAD = f.SEGMENT_HEADER_BYTES // f.ALIGN, f.RECORD_BYTES // f.ALIGN
OVERDUE = 1 << 24  # records since the newest one, more than it takes to make another due


class Checkpoint(NamedTuple):
    """A checkpoint as read back. `parts` holds the slots of each partition, as they stood; `tag_hashes` those
    of their tags, 0 where there is none, or nothing where none of them has one."""

    identity: f.Identity
    floor: int
    eviction: int  # the policy whose access words the slots have, by its code
    sealed: frozenset[int]  # segments complete by then
    parts: list[bytes]
    tag_hashes: list[array[int]]


def most_bytes(index: Index) -> int:
    """What a checkpoint of the index as it is would take, rounded up."""
    slot_bytes = SLOT_BYTES + (f.TAG_HASH_BYTES if index.has_tags else 0)
    return 4096 + index.count() * slot_bytes + index.table_capacity * f.CHECKPOINT_SEGMENT.size


def account(files: CacheFiles, index: Index) -> None:
    """Count the bytes of the checkpoint that there is. The lock is held.

    Not those of a damaged one beyond what one can have: no entry goes for them, and another one is due.
    """
    size, most = file_size(files), most_bytes(index)
    if size > most and read(files.backend, files.root) is None:
        size = most
        index.words[f.W_WRITTEN] = max(index.words[f.W_WRITTEN], OVERDUE)
    index.words[f.W_CHECKPOINT_BYTES] = size


def file_size(files: CacheFiles) -> int:
    try:
        status = files.backend.lstat(files.path(f.CHECKPOINT_NAME))
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def live(part: int, image: bytes) -> list[bytes]:
    """The slots of a partition in use. What damage has left there would be damage of the checkpoint."""
    words = memoryview(image).cast("Q")
    lows = reachable(part, words[:: f.SLOT_WORDS].tolist(), words[1 :: f.SLOT_WORDS].tolist())
    slots = [
        image[at : at + SLOT_BYTES]
        for at, low in zip(range(0, len(image), SLOT_BYTES), lows, strict=True)
        if low > f.REMOVED
    ]
    try:
        _digests(b"".join(slots), part)
    except _Damaged:
        slots = [slot for slot in slots if f.Slot._make(f.SLOT.unpack(slot)).is_possible]
    return slots


def tag_hashes(slots: bytes, cells: memoryview) -> bytes:
    """What a checkpoint says of the tags of some slots, whose cells are among `cells` (words): their hashes,
    filled up to whole words; nothing if none has a tag."""
    of_version = {cell[:3]: cell.tag_hash for cell in cells_of(cells)}
    words = memoryview(slots).cast("Q")
    versions = zip(*(words[field :: f.SLOT_WORDS].tolist() for field in (0, 1, f.S_STAMP)), strict=True)
    hashes = array("I", [of_version.get(version, 0) for version in versions]) if of_version else array("I")
    if not any(hashes):
        return b""
    return hashes.tobytes() + bytes(-len(hashes) % 2 * f.TAG_HASH_BYTES)


def read(backend: Backend, root: str) -> Checkpoint | None:
    """The checkpoint of a cache; None if there is none or it is damaged in any way. OSError if it cannot be
    read: what is in it may be read the next time."""
    path = os.path.join(root, f.CHECKPOINT_NAME)
    try:
        with backend.reading(path) as fd:
            return _Reader(backend, fd).read()
    except ours(OSError) as error:
        if is_absence(error):
            return None
        raise
    except _Damaged:
        return None


class _Damaged(Exception):
    """A checkpoint is not what was written, or nothing that anybody can have written."""


class _Reader:
    """Reads a checkpoint piece by piece, each looked at before the next: what it claims costs no more
    time and memory than what it has."""

    def __init__(self, backend: Backend, fd: int) -> None:
        self._backend, self._fd = backend, fd
        self._at, self._left = 0, os.fstat(fd).st_size - f.CHECKPOINT_SUM.size
        self._sum = xxh3_64()

    def read(self) -> Checkpoint:
        magic, version, partitions, cache_id, seed, floor, count, eviction = f.CHECKPOINT_HEADER.unpack(
            self._take(f.CHECKPOINT_HEADER.size)
        )
        if (magic, version, partitions) != (f.CHECKPOINT_MAGIC, f.FORMAT_VERSION, PARTITIONS):
            raise _Damaged
        if floor > f.LAST_STAMP or count > f.MAX_TABLE:
            raise _Damaged
        sealed = frozenset(self._segment() for _ in range(count))
        parts, tag_hashes = zip(*map(self._part, range(PARTITIONS)), strict=True)
        if self._left or self._backend.read(self._fd, f.CHECKPOINT_SUM.size, self._at) != (
            f.CHECKPOINT_SUM.pack(self._sum.intdigest())
        ):
            raise _Damaged
        return Checkpoint(f.Identity(cache_id, seed), floor, eviction, sealed, list(parts), list(tag_hashes))

    def _take(self, length: int) -> bytes:
        """The next bytes, which have to be there."""
        if length > self._left:
            raise _Damaged
        data = self._backend.read(self._fd, length, self._at)
        if len(data) < length:
            raise _Damaged
        self._sum.update(data)
        self._at, self._left = self._at + length, self._left - length
        return data

    def _segment(self) -> int:
        segment, _ = f.CHECKPOINT_SEGMENT.unpack(self._take(f.CHECKPOINT_SEGMENT.size))
        if not 0 < segment <= f.LAST_SEGMENT:
            raise _Damaged
        return int(segment)

    def _part(self, part: int) -> tuple[bytes, array[int]]:
        """The slots of a partition: live ones, each of which somebody can have written, and no key twice. And
        the hashes of their tags."""
        slots, tagged = f.CHECKPOINT_PART.unpack(self._take(f.CHECKPOINT_PART.size))
        if slots > f.CAPACITY_MASK or slots * SLOT_BYTES > self._left or tagged not in (0, slots):
            raise _Damaged
        pieces: list[bytes] = []
        digests: set[tuple[int, int]] = set()
        for first in range(0, slots, _PIECE_SLOTS):
            pieces.append(self._take(min(_PIECE_SLOTS, slots - first) * SLOT_BYTES))
            digests.update(_digests(pieces[-1], part))
        if len(digests) != slots:
            raise _Damaged
        hashes = array("I")
        hashes.frombytes(self._take((tagged + tagged % 2) * f.TAG_HASH_BYTES))
        return b"".join(pieces), hashes[:tagged]


def _digests(slots: bytes, part: int) -> Iterator[tuple[int, int]]:
    """The digests of live slots of a partition, each of which can be one: see format.Slot.is_possible, which
    would take several times as long for all of them."""
    words = memoryview(slots).cast("Q")
    lows, highs, places, lengths, stamps = (
        words[field :: f.SLOT_WORDS].tolist() for field in (0, 1, f.S_PLACE, f.S_LENGTHS, f.S_STAMP)
    )
    if (
        not all(low & 2 for low in lows)
        or any(high & f.PARTITION_MASK != part for high in highs)
        or not all(0 < place >> 32 <= f.LAST_SEGMENT for place in places)
        or any(place & f.MASK32 < _LEAST_OFFSET for place in places)
        or any(length & f.HEAD_MASK < _LEAST_HEAD for length in lengths)
        or any(stamp > f.LAST_STAMP for stamp in stamps)
    ):
        raise _Damaged
    return zip(lows, highs, strict=True)
