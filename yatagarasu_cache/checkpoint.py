"""The checkpoint: the index as of some stamp, made durable in a file of its own.

After a power cut recovery starts from it and replays only what the segments say beyond; removals
that it covers are not needed in the log any more. It is an aid: without it, segments and log give
the same entries, save that nothing at or below the newest floor is trusted (see `recovery`).
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64

from . import format as f
from .format import PARTITIONS, SLOT_BYTES
from .interruption import ours
from .unreadable import is_absence, naming

if TYPE_CHECKING:
    from .backends.base import Backend
    from .index import Index
    from .store import Handle


class Checkpoint(NamedTuple):
    """A checkpoint as read back. `parts` holds the slots of each partition, as they stood."""

    identity: f.Identity
    floor: int
    eviction: int  # the policy whose access words the slots have, by its code
    sealed: frozenset[int]  # segments complete by then
    parts: list[bytes]


def write(store: Handle) -> None:
    """Write a checkpoint, part by part, while others go on. Atomic: the old one stands until then.

    Every change that is stamped up to the floor is either in it, or is appended again with a later
    stamp: changes whose append and index change lie on both sides of the beginning notice that
    the epoch has changed. One is written at a time. The index lock is not held.
    """
    with store.checkpointing:
        with store.lock:
            floor = store.index.stamp()
            store.changes.rotate(floor)  # first: it may find no room
            index = store.index
            index.words[f.W_EPOCH] = floor
            index.words[f.W_WRITTEN] = 0
            sealed = [
                (index.words[entry] & f.MASK32, index.words[entry + f.T_SIZE])
                for entry in index.table_entries()
                if index.words[entry] & ~f.MASK32 == f.SEALED
            ]
        temporary = store.temporary_path()
        try:
            _write_file(store, index, temporary, floor, sealed)
            # Now, not before: the parts name records that came after the floor, and what these
            # replaced is not trusted any more once the checkpoint stands.
            store.reclaim.sync_dirty()
            with store.lock:
                if store.index is index:
                    store.backend.replace(temporary, os.path.join(store.root, f.CHECKPOINT_NAME))
                    store.sync_directory(store.root)
                    index.words[f.W_FLOOR] = floor
                    account(store, index)
                    store.changes.cover(floor)
        except _Replaced:  # it would be about an index that is no more
            pass
        finally:
            store.backend.clear_away(temporary)
        store.reclaim.drop_dead()


class _Replaced(Exception):
    """The index was made anew meanwhile."""


def _write_file(
    store: Handle, index: Index, path: str, floor: int, sealed: list[tuple[int, int]]
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with store.made(lambda: store.backend.opened(path, flags, store.settings.file_mode)) as fd:
        checksum, size = xxh3_64(), 0
        for part in _parts(store, index, floor, sealed):
            checksum.update(part)
            store.backend.write(fd, [part], size)
            size += len(part)
        store.backend.write(fd, [f.CHECKPOINT_SUM.pack(checksum.intdigest())], size)
        store.backend.sync(fd)


def most_bytes(index: Index) -> int:
    """What a checkpoint of the index as it is would take, rounded up."""
    return 4096 + index.count() * SLOT_BYTES + index.table_capacity * f.CHECKPOINT_SEGMENT.size


def account(store: Handle, index: Index) -> None:
    """Count the bytes of the checkpoint that there is. The lock is held."""
    try:
        status = os.lstat(os.path.join(store.root, f.CHECKPOINT_NAME))
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    except FileNotFoundError:
        size = 0
    index.words[f.W_CHECKPOINT_BYTES] = size


def _parts(store: Handle, index: Index, floor: int, sealed: list[tuple[int, int]]) -> Iterator[bytes]:
    yield f.CHECKPOINT_HEADER.pack(
        f.CHECKPOINT_MAGIC, f.FORMAT_VERSION, PARTITIONS, *index.identity, floor, len(sealed),
        index.words[f.W_EVICTION],
    )  # fmt: skip
    yield b"".join(f.CHECKPOINT_SEGMENT.pack(*entry) for entry in sealed)
    for part in range(PARTITIONS):
        with store.lock:
            if store.index is not index:
                raise _Replaced
            slots = index.partition_slots(part)
            image = index.map[slots.start * 8 : slots.stop * 8]
            lows = index.column(slots, 0)
        live = [at for at, low in zip(range(0, len(image), SLOT_BYTES), lows, strict=True) if low > f.REMOVED]
        yield f.CHECKPOINT_PART.pack(len(live), 0) + b"".join([image[at : at + SLOT_BYTES] for at in live])


def read(backend: Backend, root: str) -> Checkpoint | None:
    """The checkpoint of a cache; None if there is none or it is damaged in any way. OSError if it cannot be
    read: what is in it may be read the next time."""
    path = os.path.join(root, f.CHECKPOINT_NAME)
    try:
        with naming(path), backend.reading(path) as fd:
            data = backend.read(fd, os.fstat(fd).st_size, 0)
    except ours(OSError) as error:
        if is_absence(error):
            return None
        raise
    try:
        return _parse(data)
    except (struct.error, ValueError):
        return None


def _parse(data: bytes) -> Checkpoint | None:
    body, checksum = memoryview(data)[: -f.CHECKPOINT_SUM.size], data[-f.CHECKPOINT_SUM.size :]
    magic, version, partitions, cache_id, seed, floor, count, eviction = f.CHECKPOINT_HEADER.unpack_from(body)
    if (magic, version, partitions) != (f.CHECKPOINT_MAGIC, f.FORMAT_VERSION, PARTITIONS):
        return None
    if checksum != f.CHECKPOINT_SUM.pack(xxh3_64(body).intdigest()):
        return None
    at = f.CHECKPOINT_HEADER.size
    sealed = set()
    for _ in range(count):
        segment, _ = f.CHECKPOINT_SEGMENT.unpack_from(body, at)
        sealed.add(segment)
        at += f.CHECKPOINT_SEGMENT.size
    parts = []
    for _ in range(PARTITIONS):
        slots, _ = f.CHECKPOINT_PART.unpack_from(body, at)
        at += f.CHECKPOINT_PART.size
        parts.append(bytes(body[at : at + slots * SLOT_BYTES]))
        at += slots * SLOT_BYTES
    return Checkpoint(f.Identity(cache_id, seed), floor, eviction, frozenset(sealed), parts)
