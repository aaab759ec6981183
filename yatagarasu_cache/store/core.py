"""The compiled core of `get`, `set` and `delete`, where it was built; else the same in Python.

The Python code of this folder is the specification: the compiled module
does what it does over the same files, for entries that are plain, and answers `NotImplemented`
for all others, which then take the ordinary path. So here is nothing but the choice and the calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64_intdigest

from ..codec import Key, encode_key
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import await_lock
from ..errors import StorageFull, from_os_error, is_volume_full
from . import compiled
from .format import INDEX_NAME, LOCK_NAME, Slot, key_digest, room_for

if TYPE_CHECKING:
    from ..backends.base import Buffer
    from .index import Index
    from .reading import Found
    from .segment import SegmentWriter
    from .store import Store
    from .writing import Item

SHORT_KEY = 1024  # bytes of an encoded key that compiled code encodes itself at most
_SHORT_ROOM = room_for(SHORT_KEY, 0)  # what the record of such a key takes beside the value
# Uses go to the cache's totals when there are so many, or some have waited for so long; where that did not
# come off, because others had the lock, after so many more.
USES_MOST, USES_MORE, USES_NANOSECONDS = 192, 16, 10**9


class PythonCore:
    """The ordinary path. `CompiledCore` overrides what it does faster."""

    name = "python"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hits = self._misses = 0
        self._due, self._told = USES_MOST, time.time_ns()

    def follow_settings(self) -> None:
        """Take over what the store's settings have become."""

    def attach(self, index: Index) -> None:
        """From now on `index` is the store's."""

    def own(self, token: int) -> None:
        """Whom the segment belongs to that is appended to from now on."""

    def detach(self) -> None:
        """The store was closed."""

    def use(self, hits: int, misses: int, now: int) -> None:
        """Count what was found, or was not; and see to it that totals have it before long."""
        self._hits += hits
        self._misses += misses
        uses = self._hits + self._misses
        if uses >= self._due or not 0 <= now - self._told < USES_NANOSECONDS:
            self._due, self._told = uses + USES_MORE, now
            self._store.try_to_fold()

    def counted(self) -> tuple[int, int]:
        """Hits and misses since this was last asked."""
        counted = self._hits, self._misses
        self._hits = self._misses = 0
        self._due = USES_MOST
        return counted

    def get(self, key: Key, now: int) -> Any:
        """The verified value of `key`: (payload, flags), or the payload alone if it has no flags.

        None for a miss; NotImplemented, and nothing is counted, if `ordinary` has to be asked.
        `now` in nanoseconds since the epoch.
        """
        return NotImplemented

    def get_nowait(self, key: Key, now: int) -> Any:
        """The same without waiting for a disk: NotImplemented instead."""
        return NotImplemented

    def holds(self, key: Key, now: int) -> Any:
        """Whether there is a live entry of `key`: NotImplemented as for `get`. Nothing is counted."""
        return NotImplemented

    def holds_encoded(self, key: bytes, now: int) -> Any:
        """The same of an encoded key."""
        return NotImplemented

    def place(self, key: Key, now: int) -> Any:
        """Where the value of `key` is, to be read by others: (descriptor, length, offset, ...).

        None for a miss, which is counted; NotImplemented as for `get`.
        """
        return NotImplemented

    def accept(self, place: tuple[int, ...], data: bytes, now: int) -> Any:
        """What `get` returns, if `data` was read from `place` and is right; else NotImplemented."""
        return NotImplemented

    def get_many(self, keys: list[Key], now: int) -> list[Any]:
        """What `get` gives for each of `keys`. What is not in memory is read in one batch."""
        return [NotImplemented] * len(keys)

    def ordinary(self, key: Key) -> Found | tuple[bytes, int] | None:
        """`get` of whatever is not plain."""
        self._store.entering()
        data = encode_key(key)
        return self._store.get(*key_digest(data, self._store.seed), data)

    def set(self, key: Key, value: bytes) -> bool:
        """`put` of plain bytes that never expire; False, and nothing was done, if that is not plain."""
        return False

    def put(
        self, key: bytes, payload: Buffer, flags: int, expires: int = 0, tag: bytes = b"", meta: bytes = b""
    ) -> None:
        """`Store.put` of an encoded key."""
        self._store.put(*key_digest(key, self._store.seed), key, payload, flags, expires, tag, meta)

    def delete(self, key: bytes) -> bool:
        """`Store.delete` of an encoded key."""
        store = self._store
        seed = store.seed
        done = store.delete(*key_digest(key, seed), key)
        # Another cache may have come in the place of ours meanwhile.
        return done or seed != store.seed and PythonCore.delete(self, key)

    def append_many(self, items: list[Item], writer: SegmentWriter) -> Any:
        """Append the records of `items`: their slots, packed, and the epoch before; or NotImplemented."""
        return NotImplemented

    def install_many(self, slots: bytes, first: int, epoch: int) -> int:
        """Show records from number `first` on, under the lock: how many, until one that is not plain."""
        return 0

    def read_file(self, fd: int, length: int, seed: int) -> tuple[bytes, int] | None:
        """All bytes of a large value and their checksum; None if the file is shorter."""
        data = self._store.backend.read(fd, length, 0)
        return (data, xxh3_64_intdigest(data, seed)) if len(data) == length else None

    def write_file(self, fd: int, payload: Buffer, seed: int) -> int:
        """Write a large value to its new file; its checksum."""
        self._store.backend.write(fd, [payload], 0)
        return xxh3_64_intdigest(payload, seed)


class CompiledCore(PythonCore):
    """The same by the compiled module."""

    name = "c"

    def __init__(self, store: Store, module: Any) -> None:
        super().__init__(store)
        self._core = core = module.Core()
        self.get, self.get_nowait = core.get, core.get_nowait  # type: ignore[method-assign]
        self.counted, self.use = core.counted, core.use  # type: ignore[method-assign]
        self._put, self._set = core.put, core.set
        self.own = core.own  # type: ignore[method-assign]
        self.place, self.accept = core.place, core.accept  # type: ignore[method-assign]
        self.holds, self.holds_encoded = core.holds, core.holds_encoded  # type: ignore[method-assign]
        self.install_many = core.install_many  # type: ignore[method-assign]
        self._module = module
        self._paths = [os.fsencode(os.path.join(store.root, name)) for name in (INDEX_NAME, LOCK_NAME)]
        self.follow_settings()
        self._index: Index | None = None
        if store.read_only:
            for name in ("set", "put", "delete"):
                setattr(self, name, getattr(super(), name))

    def follow_settings(self) -> None:
        self._longest = min(self._store.unchecked_bytes, self._store.large_bytes)

    def attach(self, index: Index) -> None:
        if self._index is None:
            self._core.tell(self._store.try_to_fold, time.time_ns())
        self._forget_index()
        self._index = index
        self._map()
        index.on_map = self._map

    def _map(self) -> None:
        """Map what the index has mapped."""
        index = self._index
        if index is not None:
            self._core.attach(
                index.fd, len(index.map), index.table_word, index.table_capacity, index.identity.seed,
                self._store.files.table(index.table_capacity), index.writable, *self._paths,
            )  # fmt: skip

    def _forget_index(self) -> None:
        if self._index is not None:
            self._index.on_map = None
            self._index = None

    def detach(self) -> None:
        self._forget_index()
        self._core.detach()

    def ordinary(self, key: Key) -> Found | tuple[bytes, int] | None:
        data = encode_key(key)
        found: Any = self._core.get_encoded(data, time.time_ns())
        if found is NotImplemented:
            self._store.entering()
            return self._store.get(*key_digest(data, self._store.seed), data)
        return (found, 0) if type(found) is bytes else found

    def get_many(self, keys: list[Key], now: int) -> list[Any]:
        found: list[Any] = self._core.get_many(keys, now)
        unopened = {hit for hit in found if type(hit) is int}
        if unopened:
            for segment in unopened:
                with suppressing(OSError):  # whoever reads the value hears of it
                    self._store.file_of(segment)
            again = [i for i, hit in enumerate(found) if type(hit) is int]
            hits = self._core.get_many([keys[i] for i in again], now)
            for i, hit in zip(again, hits, strict=True):
                found[i] = NotImplemented if type(hit) is int else hit
        return found

    def set(self, key: Key, value: bytes) -> bool:
        store, length = self._store, len(value)
        if (
            length >= self._longest or store.appending._is_owned() or store.lock.threads._is_owned()
            or store.telling
        ):  # fmt: skip
            return False
        return self._append(self._set, (key, value), _SHORT_ROOM + length, False)

    def put(
        self, key: bytes, payload: Buffer, flags: int, expires: int = 0, tag: bytes = b"", meta: bytes = b""
    ) -> None:
        length = len(payload)
        if length < self._store.large_bytes and type(payload) is bytes:
            room = room_for(len(key) + len(tag) + len(meta), length)
            if self._append(self._put, (key, tag, meta, payload, flags, expires), room, True):
                return
        super().put(key, payload, flags, expires, tag, meta)

    def _append(self, put: Callable[..., Any], entry: tuple[Any, ...], room: int, grows: bool) -> bool:
        """Append a record by compiled code, and show it; False if that is left to the ordinary path.

        `room`: bytes that it takes at most, with its entry in the footer. `grows`: where the segment has
        not so many, they are asked for. All in one function, for the sake of `set`.
        """
        store = self._store
        lock: Any = store.lock
        if not grows:
            store.appending.acquire()  # the cheapest way; and no task waits for a `set`
        elif not store.appending.acquire(False):
            await_lock(store.appending)
        try:
            writer = store.writer
            if writer is None or room > writer.room:
                if not grows:
                    return False
                writer = store.reclaim.in_room(room, partial(store.room, room))
            start = writer.tail
            # Moved first: wherever this is interrupted, nobody will write here again.
            writer.tail = start + (room & ~15)
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
            store.appending.release()
        if unshown is None:
            store.sets += 1
            store.reclaim.pace(size)
            return True
        slot, epoch = unshown
        if self._show(slot, epoch, size):
            return True
        store.let_go_if_lost(writer)
        return False

    def append_many(self, items: list[Item], writer: SegmentWriter) -> Any:
        start = writer.tail
        try:
            done: Any = self._core.append_many(writer.fd, writer.segment, start, items, time.time_ns())
        except ours(OSError) as error:
            writer.cut()
            raise from_os_error(error, "cannot write entries") from error
        if done is NotImplemented:
            return done
        listed, slots, epoch, writer.tail = done
        writer.enlist_many(start, listed)
        return slots, epoch

    def delete(self, key: bytes) -> bool:
        store = self._store
        lock: Any = store.lock
        if not lock.threads.acquire(False):
            await_lock(lock.threads)
        try:
            done: Any = self._core.remove(
                *store.changes.opened, lock.fd, key, *store.own_end, time.time_ns()
            )
        finally:
            lock.threads.release()
        if done is NotImplemented:
            return super().delete(key)
        if done is None:
            return False
        existed, size = done
        store.deletes += existed
        store.reclaim.pace(size)
        return bool(existed)

    def read_file(self, fd: int, length: int, seed: int) -> tuple[bytes, int] | None:
        data = self._store.backend.read_direct(fd, length, 0)
        if data is not None:
            return (data, xxh3_64_intdigest(data, seed)) if len(data) == length else None
        found: tuple[bytes, int] | None = self._module.read_file(fd, length, seed)
        return found

    def write_file(self, fd: int, payload: Buffer, seed: int) -> int:
        if type(payload) is not bytes:
            return super().write_file(fd, payload, seed)
        checksum: int = self._module.write_file(fd, payload, seed)
        return checksum

    def _show(self, slot: tuple[int, ...], epoch: int, size: int) -> bool:
        try:
            return self._store.show(Slot._make(slot), epoch, size)
        except StorageFull as error:
            if not is_volume_full(error):
                raise
            return False  # the ordinary path makes room


def choose(store: Store) -> PythonCore:
    """The core of a store: the compiled one if it is there and may be used."""
    module = compiled.load()
    # What wraps a backend wants to see its reads and writes.
    return CompiledCore(store, module) if module is not None and store.backend.plain else PythonCore(store)
