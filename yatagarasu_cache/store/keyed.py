"""Entries by their keys, the shortest way: by compiled code for what is plain, else by the store's parts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..backends.base import Buffer
from ..codec import Key, encode_key
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import await_lock
from ..errors import StorageFull, from_os_error, is_volume_full
from .active import ActiveSegment
from .cache_files import CacheFiles
from .changes import ChangeLog
from .core import SHORT_KEY, SHORT_META, CompiledCore
from .counters import Counters
from .current import CurrentIndex
from .format import ALIGN, Slot, key_digest, room_for
from .item import Item, Pieces
from .limits import Limits
from .locking import Locks
from .notices import Notices
from .pace import Pace
from .reading import Found, Reading
from .removal import Removal
from .room import Room
from .showing import Showing
from .writing import Writing

_SHORT_ROOM = room_for(SHORT_KEY + SHORT_META, 0)  # what the record of such a key takes beside the value
_TAGGED_ROOM = room_for(2 * SHORT_KEY + SHORT_META, 0)  # and if it has a tag as well


class KeyedAccess:
    """The ordinary way. `CompiledAccess` overrides what it does faster."""

    def __init__(
        self, current: CurrentIndex, reading: Reading, writing: Writing, removal: Removal,
        entering: Callable[[], None],
    ) -> None:  # fmt: skip
        self._current, self._reading, self._writing = current, reading, writing
        self._removal, self._entering = removal, entering

    def changing_by(self, writing: Writing, removal: Removal) -> KeyedAccess:
        """The same, but for changing entries by these parts alone: they make it durable, which costs so much
        that the rest does not count, or refuse it."""
        other = copy.copy(self)
        other._writing, other._removal = writing, removal
        for name in ("set", "put", "delete"):
            setattr(other, name, partial(getattr(KeyedAccess, name), other))
        return other

    def get(self, key: Key) -> Found | tuple[Buffer, int] | None:
        """The value of whatever is not plain. Counted."""
        self._entering()
        data = encode_key(key)
        return self._reading.get(*key_digest(data, self._current.seed), data)

    def get_with_meta(self, key: Key) -> tuple[Buffer, int, bytes] | None:
        """(payload, flags, metadata) of an entry. Counted."""
        self._entering()
        data = encode_key(key)
        return self._reading.get_with_meta(*key_digest(data, self._current.seed), data)

    def get_many(self, keys: list[Key], now: int) -> list[Any]:
        """What `PythonCore.get` gives for each of `keys`."""
        return [NotImplemented] * len(keys)

    def set(self, key: Key, value: bytes, tag: Key, meta: bytes = b"", rank: int | None = None) -> bool:
        """`put` of plain bytes that never expire, with a tag or None; False, and nothing was done, if that is
        not plain. `meta`, `rank`: see `set` of the compiled core."""
        return False

    def put(
        self, key: bytes, payload: Buffer | Pieces, flags: int, expires: int = 0, tag: bytes = b"",
        meta: bytes = b"",
    ) -> None:  # fmt: skip
        """`Writing.put` of what an `Item` has beside its digest, which compiled code finds by itself: with an
        `Item` made for it a `set` of a small value takes a sixth longer (5.9 instead of 5.0 us)."""
        digest = key_digest(key, self._current.seed)
        self._writing.put(Item(*digest, key, payload, flags, expires, tag, meta))

    def delete(self, key: bytes) -> bool:
        """`Removal.delete` of an encoded key."""
        current = self._current
        seed = current.seed
        done = self._removal.delete(*key_digest(key, seed), key)
        # Another cache may have come in the place of ours meanwhile.
        return done or seed != current.seed and KeyedAccess.delete(self, key)


class CompiledAccess(KeyedAccess):
    """By the compiled core, for a handle that writes."""

    def __init__(
        self, locks: Locks, notices: Notices, limits: Limits, files: CacheFiles, current: CurrentIndex,
        changes: ChangeLog, active: ActiveSegment, room: Room, reading: Reading, showing: Showing,
        writing: Writing, removal: Removal, counters: Counters, pace: Pace, core: CompiledCore,
        entering: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(current, reading, writing, removal, entering)
        self._locks, self._notices, self._limits, self._files = locks, notices, limits, files
        self._changes, self._active, self._room, self._showing = changes, active, room, showing
        self._counters, self._pace, self._core = counters, pace, core
        self._put, self._set = core.put, core.set
        limits.follow(self._follow_limits)

    def _follow_limits(self) -> None:
        self._longest = min(self._limits.unchecked_bytes, self._limits.large_bytes)

    def get(self, key: Key) -> Found | tuple[Buffer, int] | None:
        data = encode_key(key)
        found: Any = self._core.get_encoded(data, time.time_ns())
        if found is NotImplemented:
            self._entering()
            return self._reading.get(*key_digest(data, self._current.seed), data)
        return (found, 0) if type(found) is bytes else found

    def get_many(self, keys: list[Key], now: int) -> list[Any]:
        found: list[Any] = self._core.get_many(keys, now)
        unopened = {hit for hit in found if type(hit) is int}
        if unopened:
            for segment in unopened:
                with suppressing(OSError):  # whoever reads the value hears of it
                    self._files.segments.file_of(segment)
            again = [i for i, hit in enumerate(found) if type(hit) is int]
            hits = self._core.get_many([keys[i] for i in again], now)
            for i, hit in zip(again, hits, strict=True):
                found[i] = NotImplemented if type(hit) is int else hit
        return found

    def set(self, key: Key, value: bytes, tag: Key, meta: bytes = b"", rank: int | None = None) -> bool:
        length, locks = len(value), self._locks
        lock: Any = locks.index
        if (
            length >= self._longest or locks.appending._is_owned() or lock.threads._is_owned()
            or self._notices.telling
        ):  # fmt: skip
            return False
        room = length + (_SHORT_ROOM if tag is None else _TAGGED_ROOM)
        return self._append(self._set, (key, value, tag, meta, rank), room, False)

    def put(
        self, key: bytes, payload: Buffer | Pieces, flags: int, expires: int = 0, tag: bytes = b"",
        meta: bytes = b"",
    ) -> None:  # fmt: skip
        length = len(payload)
        if length < self._limits.large_bytes and type(payload) is bytes:
            room = room_for(len(key) + len(tag) + len(meta), length)
            if self._append(self._put, (key, payload, flags, expires, tag, meta), room, True):
                return
        super().put(key, payload, flags, expires, tag, meta)

    def _append(self, put: Callable[..., Any], entry: tuple[Any, ...], room: int, grows: bool) -> bool:
        """Append a record by compiled code, and show it; False if that is left to the ordinary path.

        `room`: bytes that it takes at most, with its entry in the footer. `grows`: where the segment has
        not so many, they are asked for. All in one function, for the sake of `set`.
        """
        appending, active = self._locks.appending, self._active
        lock: Any = self._locks.index
        if not grows:
            appending.acquire()  # the cheapest way; and no task waits for a `set`
        elif not appending.acquire(False):
            await_lock(appending)
        try:
            writer = active.writer
            if writer is None or room > writer.room:
                if not grows:
                    return False
                writer = self._room.in_room(room, partial(self._room.writer, room))
            start = writer.tail
            # First: wherever this is interrupted, nobody will write here again.
            writer.tail = start + (room & -ALIGN)
            try:
                with lock.threads:
                    done = put(writer.fd, writer.segment, start, lock.fd, time.time_ns(), entry)
                if done is NotImplemented:
                    writer.tail = start
                    return False
                listed, writer.tail, size, unshown = done
                writer.enlist(start, listed)
            except ours(OSError) as error:
                writer.tail = start
                writer.cut()
                if not is_volume_full(error):
                    raise from_os_error(error, "cannot write an entry") from error
                return False  # the ordinary path makes room
            except BaseException:
                writer.unlist()
                raise
        finally:
            appending.release()
        if unshown is None:
            self._counters.sets += 1
            self._pace.spend(size)
            return True
        slot, tag, epoch = unshown
        if self._show(slot, tag, epoch, size):
            return True
        active.let_go_if_lost(writer)
        return False

    def _show(self, slot: tuple[int, ...], tag: bytes, epoch: int, size: int) -> bool:
        try:
            return self._showing.show(Slot._make(slot), tag, epoch, size)
        except StorageFull as error:
            if not is_volume_full(error):
                raise
            return False  # the ordinary path makes room

    def delete(self, key: bytes) -> bool:
        lock: Any = self._locks.index
        if not lock.threads.acquire(False):
            await_lock(lock.threads)
        try:
            done: Any = self._core.remove(
                *self._changes.opened, lock.fd, key, *self._active.own_end, time.time_ns()
            )
        finally:
            lock.threads.release()
        if done is NotImplemented:
            return super().delete(key)
        if done is None:
            return False
        existed, size = done
        self._counters.deletes += existed
        self._pace.spend(size)
        return bool(existed)
