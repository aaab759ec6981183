"""What a cache is: an index over segments and large files, shared by threads and processes.

The store deals in digests and bytes; `cache.py` turns keys and values into these. The rules that
keep it right are few:

* a record is appended first, then the index is changed under the lock: a failure in between
  leaves the old value;
* records carry stamps, and the index always shows the record with the highest one, so the log
  alone tells what the index should say;
* whatever is read is verified against the slot that led there; a mismatch is looked at again
  under the lock, and only then dropped and counted.

Lock order: `appending` (threads of this handle), then `lock` (everybody).
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count
from typing import NamedTuple, TypeVar

from xxhash import xxh3_64, xxh3_64_intdigest

from . import format as f
from .backends.base import Backend, Buffer
from .config import Settings
from .core import choose as choose_core
from .directory import prepare
from .entry import Location
from .errors import (
    CacheIOError,
    ClosedError,
    FormatError,
    ReadOnlyError,
    StorageFull,
    ValueTooLarge,
    from_os_error,
)
from .eviction import POLICIES
from .format import FLAG_LARGE, MASK32, PARTITION_MASK, SLOT, Slot, value_sum
from .index import Index, IndexDamaged, IndexLock, NoLock
from .large import CHUNK_BYTES, LargeFiles
from .owners import Owner, Users
from .segment import Record, SegmentFiles, SegmentWriter, read_records

_log = logging.getLogger("yatagarasu_cache")
T = TypeVar("T")

MIN_SEGMENT_BYTES = 8 << 10
MAX_SEGMENT_BYTES = 64 << 20
_SEGMENTS_IN_LIMIT = 32  # at least so many segments make up size_limit
# From here a value gets a file of its own; chosen by perf/bench_large.py, see docs/operations.md.
LARGE_VALUE_BYTES = 1 << 20
_BATCH_BYTES = 1 << 20  # of records written by one call in put_many
_ATTEMPTS = 100
_REMOVAL_BATCH = 128  # digests in one removal record
_W_SETS = f.W_COUNTERS + f.COUNTERS.index("sets")
# What reading a file that is gone, or is no file of ours any more, can give.
_VANISHED = frozenset({errno.ENOENT, errno.EBADF, errno.ESTALE, errno.ELOOP, errno.EISDIR, errno.ENOTDIR})
_handles: weakref.WeakSet[Store] = weakref.WeakSet()
_FLUSH_MARGIN = 60 * 10**9  # nanoseconds between naming a large file and its being in place


class Found(NamedTuple):
    """A verified value."""

    payload: bytes
    flags: int


class Item(NamedTuple):
    """One entry to put. `expires` is in nanoseconds since the epoch, 0 for never."""

    low: int
    high: int
    key: bytes
    payload: Buffer
    flags: int
    expires: int = 0
    tag: bytes = b""
    meta: bytes = b""


class Names(NamedTuple):
    """What a record says beside its value."""

    key: bytes
    tag: bytes
    meta: bytes
    created: int


class Gone(NamedTuple):
    """Large files whose entries a record in `segment` removed or replaced."""

    names: list[tuple[int, int, int]]
    segment: int


class Update(NamedTuple):
    """What `Store.update` stores; None for `payload` leaves everything as it is."""

    payload: bytes | None
    flags: int = 0


class _Reservation:
    """Bytes of a large file under way: room is made and counted before they are written."""

    def __init__(self, store: Store) -> None:
        self._store, self._bytes = store, 0

    def grow(self, length: int) -> None:
        store = self._store
        store.check_size(self._bytes + length)
        store.reclaim.make_space(length)
        with store.lock:
            store.account_large(length)
        self._bytes += length

    def release(self) -> None:
        with self._store.lock:
            self._store.account_large(-self._bytes)
        self._bytes = 0


class Store:
    """One open handle on a cache directory."""

    ORPHAN_AGE = 60 * 10**9  # nanoseconds for which a large file may wait for its entry

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self.root = settings.directory
        self.read_only = settings.read_only
        self.durable = settings.durability == "sync"
        self.policy = POLICIES[settings.eviction]
        self.segment_bytes = settings.segment_size or _segment_bytes(settings.size_limit)
        self.large_bytes = min(settings.large_value_size or LARGE_VALUE_BYTES, self.segment_bytes // 4)
        self.closed = False
        self.hits = self.misses = self.corrupt = 0
        self.sets = self.deletes = self.evictions = self.expirations = 0
        self._folded = [0, 0]
        self._temporary = count(1)
        self._logged: set[str] = set()
        # A value this long may be refused; shorter ones always fit and are not asked about.
        self.unchecked_bytes = min(self.large_bytes, settings.max_value_size or self.large_bytes)
        self.appending = threading.RLock()
        self.writer: SegmentWriter | None = None
        self._names = self._names_synced = 0  # segments we began; up to which one the names are durable
        # Looked up once: these are on the path of every hit.
        self._read_once = backend.read_once
        self._touched = self.policy.touched
        self._touches = self.policy.touches and not settings.read_only
        self.core = choose_core(self)
        prepare(backend, settings)
        self._open()
        _handles.add(self)

    # -- opening and closing ------------------------------------------------------------------

    def _open(self) -> None:
        from .reclaim import Reclaimer
        from .recovery import open_index

        root, mode = self.root, self.settings.file_mode
        self.segments_path = os.path.join(root, f.SEGMENTS_NAME)
        self.large = LargeFiles(self.backend, root, mode, self.core)
        self.owner = Owner(self.backend, root, mode)
        self.users = Users(self.backend, root, mode)
        self.files = SegmentFiles(
            self.backend, self.segments_path, self.settings.max_open_files, self._segment_exists
        )
        self.reclaim = Reclaimer(self)
        try:
            if self.read_only:
                self.lock: IndexLock | NoLock = NoLock()
                self._use(open_index(self, alone=False))
                return
            self.lock = lock = IndexLock(self.backend, os.path.join(root, f.LOCK_NAME), mode)
            with lock:
                self._use(open_index(self, alone=self.users.enter()))
                lock.on_enter = self._on_lock
                self.reclaim.after_open()
        except OSError as error:
            self._release()
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, f"cannot open the cache in {root!r}") from error
        except BaseException:
            self._release()
            raise

    def _use(self, index: Index) -> None:
        previous: Index | None = getattr(self, "index", None)
        self.index = index
        self.core.attach(index)
        self.seed = index.identity.seed
        if previous is not None:
            previous.retire()

    def close(self) -> None:
        """Seal what is open; the last handle also makes the index durable. Idempotent."""
        if self.closed:
            return
        self.closed = True
        _handles.discard(self)
        try:
            self.reclaim.close()
            if not self.read_only:
                self._close_writing()
        finally:
            self._release()

    def _close_writing(self) -> None:
        from .recovery import tidy

        self.fold_counters()
        with self.appending, self.lock:
            self.seal_writer()
            if self.users.is_alone():
                if self.owner.any_dead():
                    tidy(self, self.index)
                self.reclaim.sync_dirty()
                # Removals too: after a clean end nobody looks for files that belong to nothing.
                self.backend.sync_directory(self.large.directory)
                self.backend.sync_directory(self.large.temporary)
                self.index.sync()
                self.index.words[f.W_CLEAN] = 1
                self.index.sync()

    def _release(self) -> None:
        self.core.detach()
        for name, release in (("files", "close"), ("owner", "release"), ("users", "leave"), ("lock", "close"),
                              ("index", "close")):  # fmt: skip
            held = getattr(self, name, None)
            if held is not None:
                getattr(held, release)()

    def after_fork(self) -> None:
        """In a child: keep what may be shared (the mapping), renew what may not."""
        self.backend.after_fork()
        writer, self.writer = self.writer, None
        if writer is not None:
            os.close(writer.fd)
        self.appending = threading.RLock()
        self.files.after_fork()
        if not self.read_only:
            self.lock.after_fork()
        self.owner.after_fork()
        self.users.after_fork()
        self.reclaim.after_fork()
        self.core.counted()
        self.hits = self.misses = self.corrupt = 0
        self.sets = self.deletes = self.evictions = self.expirations = 0
        self._folded = [0, 0]

    def _on_lock(self) -> None:
        """Each time the lock is taken: mend what a dead process left, follow a replaced index."""
        words = self.index.words
        if words[f.W_BUSY]:
            try:
                self.index.repair()
            except IndexDamaged as error:
                self.rebuild(str(error))
            self.log_once("repair", "a process died while it changed the index: this was put in order")
        if words[f.W_SUPERSEDED]:
            self.follow_index()

    def follow_index(self) -> None:
        """Another process has put a rebuilt index in place: use that. The lock is held."""
        from .recovery import map_index, rebuild_index

        index: Index | None = None
        try:
            index = map_index(self)
            sound = not index.superseded
        except (IndexDamaged, FileNotFoundError) as error:
            if self.read_only:
                raise FormatError(
                    f"the index in {self.root!r} is damaged ({error}): open the cache once without read_only"
                ) from error
            sound = False
        if index is None or not sound and not self.read_only:
            index = rebuild_index(self, index)
        self._use(index)

    def rebuild(self, reason: str) -> None:
        """Replace a damaged index by one made from the checkpoint and the segments."""
        from .recovery import rebuild_index

        self.ensure_writable("rebuild its index")
        damaged = self.index
        with self.lock:
            if self.index is damaged:  # nobody else did, or has: then taking the lock followed it
                self.log_once("rebuild", f"the index is damaged ({reason}): rebuilding it")
                self._use(rebuild_index(self, damaged))

    def users_alone(self) -> bool:
        """True if no other handle is open. The lock is held."""
        return not self.read_only and self.users.is_alone()

    def _segment_exists(self, segment: int) -> bool:
        return bool(self.index.state(segment)) if hasattr(self, "index") else True

    def names_changed(self) -> None:
        """A segment was begun: its name is to be made durable before its records are promised to be."""
        self._names += 1

    def log_once(self, topic: str, line: str) -> None:
        if topic not in self._logged:
            self._logged.add(topic)
            _log.warning("%s: %s", self.root, line)

    def ensure_open(self) -> None:
        if self.closed:
            raise closed_error(self.root)

    def ensure_writable(self, doing: str) -> None:
        if self.read_only:
            raise ReadOnlyError(f"cannot {doing}: the cache in {self.root!r} was opened with read_only=True")
        if self.closed:
            raise closed_error(self.root)

    # -- looking up ---------------------------------------------------------------------------

    def find(self, low: int, high: int) -> int:
        """The slot of a live entry, expired ones included; 0 if there is none."""
        for _ in range(_ATTEMPTS):
            try:
                return self.index.find(low, high)
            except IndexDamaged as error:
                self._mend(error)
            except (ValueError, AttributeError):
                if self.closed:
                    raise closed_error(self.root) from None
                raise
        return 0

    def _mend(self, error: IndexDamaged) -> None:
        if self.read_only:
            if not self.index.superseded:
                raise FormatError(
                    f"the index in {self.root!r} is damaged ({error}): open the cache once without read_only"
                )
            self.follow_index()
        else:
            self.rebuild(str(error))

    def lookup(self, low: int, high: int) -> Slot | None:
        """A live, unexpired entry's slot. Counts nothing and touches nothing."""
        for _ in range(_ATTEMPTS):
            at = self.find(low, high)
            if not at:
                return None
            try:
                slot = self.index.slot(at)
            except struct.error:  # the index was replaced by a smaller one meanwhile
                continue
            if slot.low == low and slot.high == high:
                return None if slot.expires and slot.expires <= time.time_ns() else slot
        return None

    def get(self, low: int, high: int) -> Found | tuple[bytes, int] | None:
        """(payload, flags) of a live entry, verified; None is a miss. Counted."""
        try:
            index = self.index
            at = index.find(low, high)
            if not at:
                self.misses += 1
                return None
            _, _, place, lengths, checksum, _, expires, access = SLOT.unpack_from(index.map, at * 8)
            if expires and expires <= time.time_ns():
                self.misses += 1
                return None
            flags = lengths >> 16 & 0xFF
            fd = self.files.open_files.get(place >> 32)
            if fd is not None and not flags & FLAG_LARGE:
                head = (lengths & 0xFFFF) << 4
                data = self._read_once(fd, lengths >> 24, ((place & MASK32) << 4) + head)
                if xxh3_64_intdigest(data, low ^ flags) == checksum:  # value_sum, without its call
                    self.hits += 1
                    if self._touches:
                        index.words[at + 7] = self._touched(access, index.stamp())
                    return data, flags
        except (IndexDamaged, OSError, ValueError, AttributeError, OverflowError):
            if self.closed:
                raise closed_error(self.root) from None
        return self.get_carefully(low, high)

    def get_carefully(self, low: int, high: int) -> Found | None:
        """For what is not plain: large values, unopened segments, races and damage."""
        found = self.fetch(low, high)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def fetch(self, low: int, high: int) -> Found | None:
        """Like `get`, uncounted: retries, and on a lasting mismatch drops the entry."""
        return self.verified(low, high, self._load)

    def verified(self, low: int, high: int, load: Callable[[Slot], T | None]) -> T | None:
        """`load(slot)` of an entry, tried again if the entry was moved or replaced meanwhile.

        A mismatch that lasts under the lock drops the entry: it is counted and logged, and it is
        a miss. An I/O error is raised, and drops nothing.
        """
        for _ in range(3):
            slot = self.lookup(low, high)
            if slot is None:
                return None
            loaded = self._try(load, slot)
            if loaded is not None:
                self.touch_slot(low, high)
                return loaded
        if self.read_only:
            self.corrupt += 1
            return None
        with self.appending, self.lock:
            slot = self.lookup(low, high)
            if slot is None:
                return None
            self.files.forget(slot.segment)
            loaded = self._try(load, slot)
            if loaded is None:
                self.drop_corrupt(slot)
            return loaded

    def _try(self, load: Callable[[Slot], T | None], slot: Slot) -> T | None:
        try:
            return load(slot)
        except OSError as error:
            if error.errno in _VANISHED:
                self.files.forget(slot.segment)
                return None
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot read an entry", "the entry was kept") from error
        except OverflowError:  # an offset or length that no file has
            return None

    def _load(self, slot: Slot) -> Found | None:
        if slot.value_length > self.settings.size_limit and slot.value_length > self.index.used_bytes:
            return None  # damage: nothing that long is here
        if slot.is_large:
            pointer, seed = self.pointer(slot), slot.low ^ slot.flags
            found = self.large.read(slot.low, slot.high, pointer, slot.value_length, seed=seed)
            return Found(found[0], slot.flags) if found and found[1] == slot.value_sum else None
        fd = self.files.get(slot.segment)
        data = self.backend.read(fd, slot.value_length, slot.offset + slot.head_bytes)
        if len(data) != slot.value_length or value_sum(data, slot.low, slot.flags) != slot.value_sum:
            return None
        return Found(data, slot.flags)

    def pointer(self, slot: Slot) -> int:
        """The number in a large file's name, from the record in the segment."""
        fd = self.files.get(slot.segment)
        data = self.backend.read(fd, f.LARGE_POINTER.size, slot.offset + slot.head_bytes)
        if len(data) < f.LARGE_POINTER.size:
            raise FileNotFoundError(errno.ENOENT, "the record is gone", self.files.path(slot.segment))
        pointer: int = f.LARGE_POINTER.unpack(data)[0]
        return pointer

    def fetch_version(self, slot: Slot) -> Found | None:
        """The value of just this version of an entry; None if it was replaced or removed."""
        for _ in range(3):
            current = self.lookup(slot.low, slot.high)  # it may have been moved
            if current is None or current.stamp != slot.stamp:
                return None
            found = self._try(self._load, current)
            if found is not None:
                return found
        self.fetch(slot.low, slot.high)  # drops it if the damage lasts
        return None

    def locate(self, slot: Slot) -> Location | None:
        """A descriptor of its own for a value, and where the value lies; None if it fails its checksum."""
        if slot.is_large:
            fd, offset = self.large.open(slot.low, slot.high, self.pointer(slot)), 0
        else:
            fd, offset = os.dup(self.files.get(slot.segment)), slot.offset + slot.head_bytes
        location = Location(fd, offset, slot.value_length, slot.flags)
        try:
            checksum = xxh3_64(seed=slot.low ^ slot.flags)
            done = 0
            while done < slot.value_length:
                data = self.backend.read(fd, min(CHUNK_BYTES, slot.value_length - done), offset + done)
                if not data:
                    break
                checksum.update(data)
                done += len(data)
            sound = done == slot.value_length and checksum.intdigest() == slot.value_sum
        except BaseException:
            location.close()
            raise
        if sound:
            return location
        location.close()
        return None

    def accessed(self, slot: Slot) -> float | None:
        """Seconds since the epoch of the last hit, where the policy keeps that."""
        return slot.access / 1e9 if self.policy.name == "lru" else None

    def touch_slot(self, low: int, high: int) -> None:
        """Note a hit for the eviction order."""
        if self._touches:
            at = self.find(low, high)
            words = self.index.words
            if at and at < len(words):
                words[at + f.S_ACCESS] = self._touched(words[at + f.S_ACCESS], self.index.stamp())

    def drop_corrupt(self, slot: Slot) -> None:
        """Remove an entry whose bytes are not what was written. Both locks are held.

        It is logged like any removal: a rebuild would bring back what the entry had replaced.
        """
        at = self.index.find(slot.low, slot.high)
        if not at or self.index.words[at + f.S_STAMP] != slot.stamp:
            return
        try:
            self.reclaim.ensure_writer()
            gone = self.remove_slots([slot])
        except CacheIOError as error:  # it stays, and is a miss whenever it is asked for
            self.log_once("undropped", f"an entry failed its checksum and cannot be dropped: {error}")
            return
        self.discard(gone)
        self.count("corrupt", 1)
        self.log_once("corrupt", "an entry failed its checksum and was dropped (see stats().corrupt)")

    def read_names(self, slot: Slot) -> Names | None:
        """Key, tag, metadata and time of creation from the record itself; None if it is damaged."""
        fd = self.files.get(slot.segment)
        data = self.backend.read(fd, slot.head_bytes, slot.offset)
        head = f.unpack_head(data, 0)
        if head is None or not f.verify_head(data, 0, head, self.index.identity.seed, slot.place):
            return None
        at = f.RECORD_BYTES
        key = data[at : at + head.key_length]
        at += head.key_length
        tag = data[at : at + head.tag_length]
        at += head.tag_length
        return Names(key, tag, data[at : at + head.meta_length], head.created)

    def names_of(self, slot: Slot) -> Names | None:
        """`read_names`, whose failures are told as those of the cache."""
        return self._try(self.read_names, slot)

    # -- many at once -------------------------------------------------------------------------

    def get_many(self, digests: Sequence[tuple[int, int]]) -> list[Found | tuple[bytes, int] | None]:
        """`get` of each digest. What is not in the page cache is read in one batch."""
        results: list[Found | tuple[bytes, int] | None] = [None] * len(digests)
        cold: list[tuple[int, Slot]] = []
        for i, (low, high) in enumerate(digests):
            slot = self.lookup(low, high)
            if slot is None:
                self.misses += 1
                continue
            results[i] = self.get_nowait(slot)
            if results[i] is None:
                cold.append((i, slot))
        self._get_cold(cold, results)
        return results

    def get_nowait(self, slot: Slot) -> Found | None:
        """The value if it is in memory and verifies. Counted only then."""
        fd = self.files.open_files.get(slot.segment)
        if fd is None or slot.is_large:
            return None
        try:
            data = self.backend.read_nowait(fd, slot.value_length, slot.offset + slot.head_bytes)
        except (OSError, OverflowError):
            return None
        if data is None:
            return None
        return self.check(slot, data)

    def check(self, slot: Slot, data: bytes) -> Found | None:
        """`data` as a counted hit if it is what the slot promises."""
        if value_sum(data, slot.low, slot.flags) != slot.value_sum:
            return None
        self.hits += 1
        self.touch_slot(slot.low, slot.high)
        return Found(data, slot.flags)

    def _get_cold(
        self, cold: list[tuple[int, Slot]], results: list[Found | tuple[bytes, int] | None]
    ) -> None:
        plain, rest = [], []
        for i, slot in cold:
            place = None if slot.is_large else self.file_of(slot)
            if place is None:
                rest.append((i, slot))
            else:
                plain.append((i, slot, place))
        plain.sort(key=lambda item: item[1].place)
        read = self.backend.read_many(
            [(fd, slot.value_length, slot.offset + slot.head_bytes) for _, slot, fd in plain]
        )
        for (i, slot, _), data in zip(plain, read, strict=True):
            found = None if isinstance(data, OSError) else self.check(slot, data)
            if found is None:
                rest.append((i, slot))
            results[i] = found
        for i, slot in rest:
            results[i] = self.get_carefully(slot.low, slot.high)

    def file_of(self, slot: Slot) -> int | None:
        """A descriptor of the slot's segment; None if there is no such file (any more)."""
        try:
            return self.files.get(slot.segment)
        except OSError:
            return None

    # -- putting ------------------------------------------------------------------------------

    def put(
        self, low: int, high: int, key: bytes, payload: Buffer, flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"",
    ) -> None:  # fmt: skip
        """Store an entry, in place of any older one. When it returns, every process sees it;
        with durability="sync" it survives a power cut. If it raises, the old entry is still there.
        """
        length = len(payload)
        if length >= self.large_bytes:
            self.put_stream(low, high, key, iter((payload,)), flags, expires, tag, meta, length)
            return
        size = f.RECORD_BYTES + len(key) + len(tag) + len(meta) + length + 30
        checksum = value_sum(payload, low, flags)
        for _ in range(_ATTEMPTS):
            with self.appending:
                writer = self.room(size)
                index = self.index
                epoch = index.words[f.W_EPOCH]
                stamp = index.stamp()
                place = writer.next_place
                head = f.pack_record(
                    index.identity.seed, place, f.PUT, flags, key, tag, meta,
                    length, stamp, expires, stamp, checksum,
                )  # fmt: skip
                self._append(writer, head, payload)
                end = writer.tail
            if self.durable:
                self._make_durable(writer, end, [place])
            lengths = length << 24 | flags << 16 | len(head) >> 4
            slot = Slot(low, high, place, lengths, checksum, stamp, expires, self.policy.first(stamp))
            if self.show(slot, epoch, size):
                return
            self.let_go_if_lost(writer)
        raise CacheIOError(errno.EAGAIN, "could not store an entry: too many concurrent changes; try again")

    def show(self, slot: Slot, epoch: int, size: int) -> bool:
        """The second half of `put`: let the index show a record. False if it has to be appended again."""
        try:
            with self.lock:
                done, replaced = self._install(slot, epoch)
        except OSError:
            self._void([slot.place])
            raise
        if done:
            if replaced is not None:
                self.discard(Gone([replaced], slot.place >> 32), synced=self.durable)
            self.sets += 1
            self.reclaim.pace(size)
        return done

    def let_go_if_lost(self, writer: SegmentWriter) -> None:
        """Stop appending to a segment that others took from us, believing this handle dead."""
        with self.appending:
            if self.writer is writer and self.index.state(writer.segment) != f.ACTIVE:
                self.writer = None
                writer.close(sync=False)

    def _append(self, writer: SegmentWriter, head: bytes, payload: Buffer, listed: bytes = b"") -> None:
        try:
            writer.append(head, payload, listed)
        except OSError as error:
            raise from_os_error(error, "cannot write an entry") from error

    def _install(self, slot: Slot, epoch: int) -> tuple[bool, tuple[int, int, int] | None]:
        """Let the index show the record of `slot`. The lock is held.

        (False, None): append it again, because the segment is no longer ours, a checkpoint began
        that does not cover it, or something else got the same or a later stamp first.
        Else (True, large file that this entry replaced, if any).
        """
        index = self.index
        if index.words[f.W_EPOCH] != epoch or index.state(slot.place >> 32) != f.ACTIVE:
            return False, None
        at = self.find(slot.low, slot.high)
        if self.index is not index:  # it was damaged, and made anew
            return self._shown(slot), None
        words = index.words  # not before: it may have been mapped anew
        first = words[at + f.S_STAMP] if at else words[f.W_DELETED + (slot.high & PARTITION_MASK)]
        if slot.stamp <= (least := max(epoch, first if first < f.MAX_STAMP else 0)):
            index.stamp_above(least)  # the clock word can lose a race while the clock is set back
            return False, None
        replaced = None
        if at and words[at + f.S_LENGTHS] >> 16 & FLAG_LARGE:
            replaced = index.slot(at)
        try:
            index.put(slot, at)
        except OSError as error:
            raise from_os_error(error, "cannot make the index larger") from error
        except IndexDamaged as error:
            self.rebuild(str(error))
            return self._shown(slot), None
        words = index.words
        words[f.W_WRITTEN] += 1
        words[_W_SETS] += 1
        return True, self.large_file(replaced) if replaced is not None else None

    def _shown(self, slot: Slot) -> bool:
        """True if a rebuild found the record of `slot` in the log: then it must not be appended again."""
        at = self.find(slot.low, slot.high)
        return bool(at) and self.index.slot(at).place == slot.place

    def large_file(self, slot: Slot) -> tuple[int, int, int] | None:
        """Name of a slot's large file, its bytes taken off the account. The lock is held."""
        if not slot.is_large:
            return None
        self.account_large(-slot.value_length)
        try:
            return slot.low, slot.high, self.pointer(slot)
        except OSError:
            return None  # the record is unreadable: check() finds the orphan

    def _make_durable(self, writer: SegmentWriter, end: int, places: Sequence[int] = ()) -> None:
        """Sync what was appended up to `end`. If that fails, the records at `places` are taken back."""
        try:
            self.promise()
            writer.sync(end)
            self._sync_names()
        except OSError as error:
            self._void(places)
            raise from_os_error(error, "cannot make an entry durable") from error

    def _sync_names(self) -> None:
        names = self._names
        if self._names_synced < names:
            self.backend.sync_directory(self.segments_path)
            self._names_synced = max(self._names_synced, names)

    def _void(self, places: Sequence[int]) -> None:
        """Take back records that the index never showed: a rebuild must not find them."""
        with self.appending:
            for place in places:
                if self.writer is not None and self.writer.segment == place >> 32:
                    self.writer.void((place & MASK32) * f.ALIGN)

    def discard(self, gone: Gone, *, synced: bool = False, large: bool = False) -> None:
        """Remove large files whose entries were removed, or replaced (by `large` values).

        Where durability was promised, what did so is made durable first (`synced`: it is): with
        the file gone and the record lost, something older still would take their place.
        """
        if not gone.names:
            return
        try:
            if self.index.words[f.W_PROMISED] and not synced:
                if large:
                    self.sync_large()
                fd = self.file_of(Slot(0, 0, gone.segment << 32, 0, 0, 0, 0, 0))
                if fd is not None:
                    self.backend.sync(fd)
                self._sync_names()
            for name in gone.names:
                self.large.remove(*name)
        except OSError as error:  # what was asked for is done; check() finds what is left
            self.log_once("discard", f"cannot remove a large value that is not needed any more: {error}")

    def promise(self) -> None:
        """From now on nothing durable may be lost for something that is not."""
        self.index.words[f.W_PROMISED] = 1

    def put_many(self, items: Sequence[Item]) -> None:
        """`put` of each, in order, with few system calls: one write, one sync and one locking a batch.

        Not atomic as a whole: if it raises, the items before some point are stored.
        """
        batch: list[Item] = []
        size = 0
        budget = min(_BATCH_BYTES, self.segment_bytes // 2)
        for item in items:
            if len(item.payload) >= self.large_bytes:
                self._put_batch(batch)
                batch, size = [], 0
                self.put(*item)
                continue
            need = _item_bytes(item)
            if batch and size + need > budget:
                self._put_batch(batch)
                batch, size = [], 0
            batch.append(item)
            size += need
        self._put_batch(batch)

    def _put_batch(self, batch: list[Item]) -> None:
        if not batch:
            return
        size = sum(map(_item_bytes, batch))
        with self.appending:
            writer = self.room(size)
            epoch = self.index.words[f.W_EPOCH]
            records, slots = self._draft(batch, writer)
            try:
                writer.append_many(records)
            except OSError as error:
                raise from_os_error(error, "cannot write entries") from error
            end = writer.tail
        if self.durable:
            self._make_durable(writer, end, [slot.place for slot in slots])
        # Of several with the same key the last one counts: an earlier one is not tried again.
        last = {(item.low, item.high): item for item in batch}
        again: list[Item] = []
        replaced = Gone([], writer.segment)
        pending = slots[::-1]
        try:
            with self.lock:
                for item in batch:
                    done, old = self._install(pending[-1], epoch)
                    pending.pop()
                    if not done and last[item.low, item.high] is item:
                        again.append(item)
                    if old is not None:
                        replaced.names.append(old)
        except OSError:
            self._void([slot.place for slot in pending])
            raise
        finally:
            self.discard(replaced, synced=self.durable)
        self.sets += len(batch) - len(again)
        self.reclaim.pace(size)
        if again:
            self.let_go_if_lost(writer)
        for item in again:
            self.put(*item)

    def _draft(
        self, batch: list[Item], writer: SegmentWriter
    ) -> tuple[list[tuple[bytes, Buffer, bytes]], list[Slot]]:
        """Records for consecutive places from the writer's tail on, and the slots that name them."""
        records: list[tuple[bytes, Buffer, bytes]] = []
        slots: list[Slot] = []
        offset = writer.tail
        seed, first = self.index.identity.seed, self.policy.first
        for low, high, key, payload, flags, expires, tag, meta in batch:
            stamp = self.index.stamp()
            place = f.pack_place(writer.segment, offset)
            checksum = value_sum(payload, low, flags)
            head = f.pack_record(
                seed, place, f.PUT, flags, key, tag, meta, len(payload), stamp, expires, stamp, checksum
            )
            lengths = f.pack_lengths(len(payload), flags, len(head))
            records.append((head, payload, b""))
            slots.append(Slot(low, high, place, lengths, checksum, stamp, expires, first(stamp)))
            offset += len(head) + f.aligned(len(payload))
        return records, slots

    # -- large values -------------------------------------------------------------------------

    def put_stream(
        self, low: int, high: int, key: bytes, parts: Iterable[Buffer], flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"", length: int | None = None,
        only_absent: bool = False,
    ) -> bool:  # fmt: skip
        """`put` of a value that comes in parts, in constant memory. False if `only_absent` forbade it.

        A stream that turns out short is stored like any small value.
        """
        self.ensure_writable("store an entry")
        if length is not None:
            self.check_size(length)
        iterator = iter(parts)
        start, whole = _first_bytes(iterator, self.large_bytes)
        if whole:
            payload = b"".join(start)
            self.check_size(len(payload))
            if only_absent:
                return self.add(low, high, key, payload, flags, expires, tag, meta)
            self.put(low, high, key, payload, flags, expires, tag, meta)
            return True
        flags |= FLAG_LARGE
        reserved = _Reservation(self)
        temporary = self.temporary_path()
        published: tuple[int, int, int] | None = None
        installed = False
        try:
            size, checksum = self.large.write(
                temporary, chain(start, iterator), low ^ flags, sync=self.durable, account=reserved.grow
            )
            published = (low, high, self.index.stamp())
            self.large.publish(temporary, *published, sync=self.durable)
            pointer = f.LARGE_POINTER.pack(published[2])
            installed = self._put_pointer(
                low, high, key, flags, expires, tag, meta, size, checksum, pointer, only_absent
            )
        except OSError as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot write a large value") from error
        finally:
            if not installed:
                reserved.release()
                self.backend.unlink(temporary)
                if published is not None:
                    self.large.remove(*published)
        if installed:
            self.sets += 1
            self.reclaim.pace(0)
        return installed

    def _put_pointer(
        self, low: int, high: int, key: bytes, flags: int, expires: int, tag: bytes, meta: bytes,
        size: int, checksum: int, pointer: bytes, only_absent: bool,
    ) -> bool:  # fmt: skip
        """Append the record of a large file that is in place, and let the index show it.

        False if there is an entry already (`only_absent`), or a later one came first.
        """
        need = f.RECORD_BYTES + len(key) + len(tag) + len(meta) + 64
        while True:
            with self.appending:
                writer = self.room(need)
                index = self.index
                epoch, stamp, place = index.words[f.W_EPOCH], index.stamp(), writer.next_place
                head = f.pack_record(
                    index.identity.seed, place, f.LARGE, flags, key, tag, meta,
                    size, stamp, expires, stamp, checksum,
                )  # fmt: skip
                lengths = f.pack_lengths(size, flags, len(head))
                slot = Slot(low, high, place, lengths, checksum, stamp, expires, self.policy.first(stamp))
                if only_absent:
                    with self.lock:
                        if self.lookup(low, high) is not None:
                            return False
                        self._append(writer, head, pointer, pointer)
                        done, replaced = self._show_pointer(writer, writer.tail, slot, epoch)
                else:
                    self._append(writer, head, pointer, pointer)
                    end = writer.tail
            if not only_absent:
                done, replaced = self._show_pointer(writer, end, slot, epoch)
            if replaced is not None:
                self.discard(Gone([replaced], writer.segment), synced=self.durable, large=True)
            if done:
                return True
            self.let_go_if_lost(writer)

    def _show_pointer(
        self, writer: SegmentWriter, end: int, slot: Slot, epoch: int
    ) -> tuple[bool, tuple[int, int, int] | None]:
        if self.durable:
            self._make_durable(writer, end, [slot.place])
        try:
            with self.lock:
                return self._install(slot, epoch)
        except OSError:
            self._void([slot.place])
            raise

    def temporary_path(self) -> str:
        return self.large.temporary_path(self.owner.acquire(), next(self._temporary))

    def account_large(self, length: int) -> None:
        """Count bytes of large files. The lock is held."""
        words = self.index.words
        words[f.W_LARGE_BYTES] = max(0, words[f.W_LARGE_BYTES] + length)

    def check_size(self, length: int) -> None:
        """Refuse what can never fit, before anything changes."""
        most = self.settings.max_value_size
        if most is not None and length > most:
            raise ValueTooLarge(f"the value has {length} bytes and max_value_size is {most}: raise it")
        if length > f.MAX_VALUE_BYTES:
            raise ValueTooLarge(f"the value has {length} bytes, {f.MAX_VALUE_BYTES} are possible: split it")
        index_bytes = self.index.words[f.W_INDEX_BYTES] + self.index.words[f.W_CHECKPOINT_BYTES]
        room = self.reclaim.live_limit - 2 * self.segment_bytes - index_bytes
        if length > room:
            raise ValueTooLarge(
                f"the value has {length} bytes and a cache with size_limit={self.settings.size_limit} "
                f"has room for {max(0, room)}: raise size_limit"
            )

    # -- changes that depend on what is there ---------------------------------------------------

    def add(
        self, low: int, high: int, key: bytes, payload: Buffer, flags: int,
        expires: int = 0, tag: bytes = b"", meta: bytes = b"",
    ) -> bool:  # fmt: skip
        """`put` if there is no live entry. Atomic among all processes."""
        if self.lookup(low, high) is not None:
            return False
        length = len(payload)
        if length >= self.large_bytes:
            return self.put_stream(
                low, high, key, iter((payload,)), flags, expires, tag, meta, length, only_absent=True
            )
        added = False

        def decide(slot: Slot | None) -> Item | None:
            nonlocal added
            added = slot is None
            return Item(low, high, key, payload, flags, expires, tag, meta) if added else None

        self.change(low, high, f.RECORD_BYTES + len(key) + len(tag) + len(meta) + length + 30, decide)
        return added

    def change(self, low: int, high: int, size: int, decide: Callable[[Slot | None], Item | None]) -> None:
        """Under the lock: put what `decide(slot of the live entry or None)` returns, if anything.

        The append happens under the lock too, so that a change that loses leaves no record which
        a rebuild could take for the winner. `size` bounds the record's bytes; keep it small.
        """
        with self.appending:
            writer = self.room(size)
            with self.lock:
                item = decide(self.lookup(low, high))
                if item is None:
                    return
                if self.index.state(writer.segment) != f.ACTIVE:
                    self.let_go_if_lost(writer)
                    return self.change(low, high, size, decide)
                epoch = self.index.words[f.W_EPOCH]
                records, (slot,) = self._draft([item], writer)
                self._append(writer, *records[0])
                done, replaced = self._show_pointer(writer, writer.tail, slot, epoch)
                if not done:  # the clock was set back, or the index rebuilt
                    return self.change(low, high, size, decide)
        if replaced is not None:
            self.discard(Gone([replaced], writer.segment), synced=self.durable)
        self.sets += 1
        self.reclaim.pace(size)

    def touch(self, low: int, high: int, expires: int) -> bool:
        """Give a live entry a new time of expiry. Atomic; False if there is none."""
        with self.appending:
            writer = self.room(256)
            with self.lock:
                slot = self.lookup(low, high)
                if slot is None:
                    return False
                self.log_change(f.TOUCH, f.TOUCHED.pack(low, high, expires), self._stamp_beyond([slot]))
                at = self.index.find(low, high)
                self.index.words[at + f.S_EXPIRES] = expires
                self.touch_slot(low, high)
        if self.durable:
            self._make_durable(writer, writer.tail)
        return True

    # -- removing -----------------------------------------------------------------------------

    def delete(self, low: int, high: int, stamp: int | None = None) -> bool:
        """Remove an entry (only the version with `stamp`, if given). False if there was none live."""
        if not self.find(low, high):
            return False

        def chosen(slot: Slot) -> bool:
            return stamp is None or slot.stamp == stamp

        alive, removed = self.remove([(low, high)], chosen, "deletes")
        return bool(alive and removed)

    def remove(
        self, digests: Sequence[tuple[int, int]], chosen: Callable[[Slot], bool], counter: str
    ) -> tuple[int, int]:
        """Remove those of `digests` whose slots are `chosen`. (of these unexpired, removed).

        Each batch is atomic, and in the log before it is in the index: nothing comes back.
        """
        alive = removed = 0
        for start in range(0, len(digests), _REMOVAL_BATCH):
            a, r = self._remove_batch(digests[start : start + _REMOVAL_BATCH], chosen, counter)
            alive, removed = alive + a, removed + r
        return alive, removed

    def _remove_batch(
        self, digests: Sequence[tuple[int, int]], chosen: Callable[[Slot], bool], counter: str
    ) -> tuple[int, int]:
        with self.appending:
            writer = self.removal_room(f.RECORD_BYTES + 16 * len(digests))
            with self.lock:
                slots = [
                    slot
                    for digest in digests
                    if (at := self.find(*digest)) and chosen(slot := self.index.slot(at))
                ]
                if not slots:
                    return 0, 0
                gone = self.remove_slots(slots)
                now = time.time_ns()
                alive = sum(not slot.expires or slot.expires > now for slot in slots)
                self.count(counter, alive if counter == "deletes" else len(slots))
            if self.durable:
                self._make_durable(writer, writer.tail)
        self.discard(gone, synced=self.durable)
        return alive, len(slots)

    def remove_slots(self, slots: Sequence[Slot]) -> Gone:
        """Log the removal, then do it. Both locks are held. The large files that can go now."""
        digests = b"".join(f.pack_digest(slot.low, slot.high) for slot in slots)
        stamp = self.log_change(f.REMOVE, digests, self._stamp_beyond(slots))
        assert self.writer is not None
        gone = Gone([], self.writer.segment)
        for slot in slots:
            # First: should we be killed here, nothing older comes in where this was logged as gone.
            self.index.words[f.W_DELETED + (slot.high & PARTITION_MASK)] = stamp
            name = self.large_file(slot)
            if name is not None:
                gone.names.append(name)
            self.index.remove(self.index.find(slot.low, slot.high))
        return gone

    def _stamp_beyond(self, slots: Iterable[Slot]) -> int:
        """A stamp above those of `slots` and of the checkpoint, also if the clock was set back."""
        stamps = [slot.stamp for slot in slots if slot.stamp < f.MAX_STAMP]
        return self.index.stamp_above(max(stamps, default=0))

    def log_change(self, kind: int, payload: bytes, stamp: int | None = None) -> int:
        """Append a record that is about other records. `appending` is held. Its stamp."""
        writer = self.writer
        if writer is None or f.RECORD_BYTES + f.aligned(len(payload)) > writer.reserve_room:
            raise StorageFull(errno.ENOSPC, "no room to log a removal: raise size_limit")
        stamp = stamp or self.index.stamp()
        head = f.pack_record(
            self.index.identity.seed, writer.next_place, kind, 0, b"", b"", b"",
            len(payload), stamp, 0, stamp, value_sum(payload, 0, 0),
        )  # fmt: skip
        self._append(writer, head, payload, payload)
        self.index.words[f.W_WRITTEN] += 1
        return stamp

    def clear(self) -> int:
        """Remove everything. Atomic. Values being stored at this moment may survive."""
        self.ensure_writable("clear the cache")
        with self.appending:
            self.removal_room(256)
            with self.lock:
                entries = self.index.count()
                slots = [self.index.slot(at) for at in self.index.live_slots()]
                stamp = self.log_change(f.CLEAR, b"", self._stamp_beyond(slots))
                if self.durable:
                    self.promise()
                if self.index.words[f.W_PROMISED]:
                    self.reclaim.sync_dirty()
                doomed = [name for slot in slots if (name := self.large_file(slot))]
                for part in range(f.PARTITIONS):
                    self.index.words[f.W_DELETED + part] = stamp
                self.index.reset()
            assert self.writer is not None
            segment = self.writer.segment
        self.discard(Gone(doomed, segment), synced=True)
        self.reclaim.drop_dead()
        return entries

    # -- room ---------------------------------------------------------------------------------

    def room(self, size: int) -> SegmentWriter:
        """The writer, with room for `size` bytes more. `appending` is held."""
        writer = self.writer
        if writer is not None and size <= writer.room:
            return writer
        self.ensure_writable("store an entry")
        return self.reclaim.roll(size)

    def removal_room(self, size: int) -> SegmentWriter:
        """The writer, with room to log a removal of `size` bytes. `appending` is held."""
        writer = self.writer
        if writer is not None and size <= writer.reserve_room:
            return writer
        self.ensure_writable("remove an entry")
        return self.reclaim.removal_room(size)

    def seal_writer(self) -> None:
        """Close the active segment for good. `appending` is held."""
        writer, self.writer = self.writer, None
        if writer is None:
            return
        try:
            size = writer.seal()
        except OSError as error:  # without its footer it will be read through instead
            size = os.fstat(writer.fd).st_size
            self.log_once("footer", f"cannot write a footer: {error}")
        durable = self.durable
        try:
            writer.close(sync=durable)
        except OSError as error:  # whoever waits for this sync gets an error as well
            durable = False
            self.log_once("seal", f"cannot make a segment durable: {error}")
        with self.lock:
            if self.index.state(writer.segment) == f.ACTIVE:
                self.index.resize_segment(writer.segment, size)
                entry = self.index.entry(writer.segment)
                if durable:
                    self.index.words[entry + f.T_SYNCED] = size
                self.index.words[entry + f.T_NEWEST] = self.index.stamp()
                self.index.words[entry] = f.SEALED | writer.segment
                self.index.words[entry + f.T_OWNER] = 0  # last: an active one without owner stays so

    # -- durability ---------------------------------------------------------------------------

    def flush(self) -> None:
        """Make everything durable that was completed before, by whichever process."""
        self.ensure_writable("flush")
        try:
            self.promise()
            self.reclaim.sync_dirty()
        except OSError as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot flush the cache") from error

    def sync_large(self) -> None:
        """Make large values durable that came since this was last done: their names tell when they came."""
        started, since = self.index.stamp(), self.index.words[f.W_FLUSHED] - _FLUSH_MARGIN
        came = False
        for (_, _, pointer), _, path in self.large.listed():
            if pointer >= since:
                came = True
                try:
                    fd = self.backend.open(path, os.O_RDONLY)
                except OSError as error:
                    if error.errno in _VANISHED:  # removed meanwhile
                        continue
                    raise
                try:
                    self.backend.sync(fd)
                finally:
                    self.backend.close_file(fd)
        if came:
            self.backend.sync_directory(self.large.directory)
        self.index.words[f.W_FLUSHED] = started

    # -- walks --------------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[Record, Slot]]:
        """Every live entry with its record's names: segment by segment, from their footers.

        Entries written while it runs don't appear, so that it comes to an end; none appears twice.
        """
        self.ensure_open()
        started = max(time.time_ns(), self.index.words[f.W_CLOCK])
        seen: set[int] = set()
        done: set[int] = set()
        while True:
            self.ensure_open()
            todo = [s for s in self.index.segments() if s not in done]
            if not todo:
                return
            # What is moved goes to active segments: these last, and it is not missed.
            todo.sort(key=lambda segment: self.index.state(segment) == f.ACTIVE)
            for segment in todo:
                done.add(segment)
                for record in self.records(segment):
                    slot = self.alive(record, segment)
                    if slot is not None and slot.low not in seen and slot.stamp <= started:
                        seen.add(slot.low)
                        yield record, slot

    def records(self, segment: int) -> Iterator[Record]:
        """The records of a segment, read as they are asked for; none if there is no such file."""
        try:  # a descriptor of its own: shared ones may be closed while the caller takes its time
            fd = self.backend.open(self.files.path(segment), os.O_RDONLY)
        except OSError:
            return
        try:
            yield from read_records(self.backend, fd, segment, self.index.identity)
        except OSError as error:
            raise from_os_error(error, "cannot read a segment") from error
        finally:
            self.backend.close_file(fd)

    def alive(self, record: Record, segment: int) -> Slot | None:
        """The slot that shows this very record, expired or not."""
        if record.head.kind > f.LARGE:
            return None
        at = self.find(*record.digest(self.index.identity.seed))
        if not at:
            return None
        slot = self.index.slot(at)
        return slot if slot.place == f.pack_place(segment, record.offset) else None

    def count_entries(self) -> int:
        return self.index.count()

    def expire_all(self) -> int:
        return sum(self.reclaim.expire_part(part) for part in range(f.PARTITIONS))

    # -- counting -----------------------------------------------------------------------------

    def count(self, counter: str, number: int) -> None:
        """Count for this handle and for the whole cache. The lock is held."""
        setattr(self, counter, getattr(self, counter) + number)
        self.index.words[f.W_COUNTERS + f.COUNTERS.index(counter)] += number

    def fold_counters(self) -> None:
        """Add this handle's hits and misses, which are counted without a lock, to the shared ones."""
        hits, misses = self.core.counted()
        self.hits += hits
        self.misses += misses
        if self.read_only:
            return
        with self.lock:
            for i, now in enumerate((self.hits, self.misses)):
                self.index.words[f.W_COUNTERS + i] += now - self._folded[i]
                self._folded[i] = now


def closed_error(root: str) -> ClosedError:
    return ClosedError(f"the cache in {root!r} is closed: open it anew")


def _segment_bytes(size_limit: int) -> int:
    """The power of two that makes at least `_SEGMENTS_IN_LIMIT` segments of the limit, within bounds."""
    fitting = 1 << max(0, (size_limit // _SEGMENTS_IN_LIMIT).bit_length() - 1)
    return min(max(fitting, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


def _item_bytes(item: Item) -> int:
    """Bytes that the item's record takes at most."""
    names = len(item.key) + len(item.tag) + len(item.meta)
    return f.RECORD_BYTES + names + len(item.payload) + 30


def _first_bytes(parts: Iterator[Buffer], wanted: int) -> tuple[list[Buffer], bool]:
    """Parts up to `wanted` bytes, and whether that was all there are."""
    taken: list[Buffer] = []
    size = 0
    for part in parts:
        taken.append(part)
        size += len(part)
        if size >= wanted:
            return taken, False
    return taken, True


def _renew_after_fork() -> None:
    for store in list(_handles):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
