"""`DiskCache`: the synchronous interface."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from .engine import loaded
from .errors import CacheIOError
from .guard import constructed, guarded, tell

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .codec import Key, Prefix
    from .config import Settings
    from .entry import Entry, Location
    from .stats import CacheStats
    from .store.check import Problem
    from .store.format import Slot
    from .store.item import Item

__all__ = ["DiskCache"]

_MISSING: Any = object()


class DiskCache:
    """A cache on local disk: persistent, bounded, shared by threads and processes.

    Every method may be called from any thread. Changes are atomic each by itself: a reader, in
    whatever process, sees the old entry or the new one. When a change returns, every process sees
    it, and it survives the death of this process; with ``durability="sync"`` (or after `flush`)
    it also survives a power cut.

    Raises, besides what each method says: `ClosedError` after `close()`, `ReadOnlyError` for
    changes with ``read_only=True``, `CacheIOError` if the disk fails (the old state stands),
    `StorageFull` if it is full, `SerializationError` for keys and values that can't be kept exactly.
    """

    @guarded
    def __init__(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Open the cache in `directory`, creating it if it is missing or empty.

        Options, with their defaults (docs/configuration.md has all of them):

        size_limit: bytes on disk that are never exceeded by more than a segment (what the cache has;
            10 GiB for a new one). Naming another changes it for all who use the cache.
        eviction: "lru", "fifo", "lfu" or "none" (what the cache has; "lru" for a new one). Likewise.
        backend: "auto", "uring" or "threads" ("auto").
        durability: "none" or "sync" ("none").
        serializer: "msgpack", "pickle" or an object with name, dumps and loads ("msgpack").
        max_value_size: bytes of the largest value accepted (None: what fits).
        default_expire: seconds after which entries expire by default (None: never).
        read_only: never change anything in the directory (False).

        Raises `ConfigurationError` naming the option, `FormatError` for a directory that is not a
        cache of this format, `BackendUnavailable` for a backend that can't run here.
        """
        desk_class = loaded()
        if isinstance(directory, desk_class):  # that of an `AsyncDiskCache`
            self._settings, desk = directory.settings, directory
        else:
            self._settings, unpickled = desk_class.checked(directory, options)
            desk = desk_class(self._settings, unpickled)
        self._desk, self._lease = desk, desk.lease
        # What a hit needs, without a step in between.
        self._store, self._get, self._set, self._decode = desk.store, desk.get, desk.set, desk.decode

    @classmethod
    @guarded
    def from_config(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> DiskCache:
        """A cache from a mapping, or a YAML, TOML or JSON file, of the shape ``cache.disk.{...}``.

        Raises `ConfigurationError` naming the setting, or the file and what is wrong with it.
        """
        directory, options = loaded().configured(source)
        return constructed(cls, directory, options)

    # -- life ---------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Absolute path of the cache directory."""
        return self._settings.directory

    @property
    def settings(self) -> Settings:
        """The settings in force, all of them: this handle's own, and those of the cache."""
        return self._desk.settings_in_force()

    @property
    def closed(self) -> bool:
        return self._desk.closed

    def close(self) -> None:
        """End the use of this handle. Idempotent. The last handle to close makes everything durable."""
        desk = self._desk
        desk.refuse_all()
        self._store, self._get, self._set = desk.store, desk.get, desk.set
        try:
            desk.close()
        except BaseException as error:
            tell(error, self._settings)  # not `self`: that it is closed explains nothing
            raise

    @guarded
    def __enter__(self) -> DiskCache:
        self._store.life.ensure_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), *loaded().arguments(self._settings))

    def __repr__(self) -> str:
        state = "closed" if self.closed else self._lease.store.backend.name
        return f"<DiskCache {self.directory!r} ({state})>"

    # -- one entry ----------------------------------------------------------------------------

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of `key`, or `default` if there is none, or none that is still good.

        Counts as a hit or a miss, and as a use in the eviction order. The bytes were verified.
        A value that is damaged on disk is a miss (counted in ``stats().corrupt``).
        """
        try:
            found = self._get(key, time.time_ns())
            if type(found) is bytes:
                return found
            if found is NotImplemented:
                found = self._store.keyed.get(key)
            if found is None:
                return default
            payload, flags = found
            return self._decode(payload, flags, key) if flags else payload
        except BaseException as error:  # as `guarded` does, without a call
            tell(error, self)
            raise

    def set(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None,
        meta: Any = None, length: int | None = None,
    ) -> bool:  # fmt: skip
        """Store `value` under `key`, in place of what was there. Returns True.

        value: any supported value; a binary file open for reading, or an iterator of bytes, is
            read to its end in constant memory and comes back as bytes.
        expire: seconds from now; None takes `default_expire`, `math.inf` means never.
        tag: a name under which `evict` removes all its entries at once.
        meta: anything small that msgpack keeps (content type, etag): comes back in `get_entry`.
        length: bytes that the stream has, where that is known (an HTTP response's Content-Length): what
            can never fit is refused before it is read, and before anything is evicted. Other streams, but
            for regular files, may have `max_stream_size` bytes. A value that is no stream must be
            bytes of this length.

        Raises `ValueTooLarge` if it can never fit; `StorageFull` if there is no room now; ValueError if it
        has fewer or more bytes than `length`. If it raises, the old entry is still there.
        """
        try:
            if (
                type(value) is bytes and expire is None and tag is None and meta is None
                and length is None and self._set(key, value)
            ):  # fmt: skip
                return True
            self._store.entering()
            return self._desk.store_value(key, value, expire, tag, meta, length)
        except BaseException as error:  # as `guarded` does, without a call
            tell(error, self)
            raise

    @guarded
    def add(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> bool:
        """`set` if `key` has no live entry; False if it has. Atomic among all processes."""
        self._store.life.ensure_writable("store an entry")
        item = self._desk.item(key, value, expire, tag, meta)
        if self._store.core.holds(key, time.time_ns()) is True:
            return False
        return self._store.writing.add(item)

    @guarded
    def touch(self, key: Key, expire: float | None = None) -> bool:
        """Give `key` a new time to live (seconds from now, as in `set`). False if it has no entry."""
        low, high, data = self._desk.identify(key)
        return self._store.removal.touch(low, high, data, self._desk.expires(expire))

    @guarded
    def incr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """Add `delta` to the integer of `key` and return the sum. Atomic among all processes.

        A missing entry counts as `default`; with ``default=None`` it raises KeyError. A value that
        is no integer raises TypeError and stays as it is. Expiry, tag and meta are kept.
        """
        desk = self._desk
        desk.check_int("delta", delta)
        if default is not None:
            desk.check_int("default", default, " or None")
        where = desk.identify(key)
        result = 0

        def decide(slot: Slot | None) -> Item:
            nonlocal result
            result, item = desk.counted(key, where, slot, delta, default)
            return item

        self._store.writing.change(where[2], desk.counter_bytes(*where), decide)
        return result

    def decr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """`incr` by ``-delta``."""
        self._desk.check_int("delta", delta)
        return self.incr(key, -delta, default)

    @guarded
    def pop(self, key: Key, default: Any = None) -> Any:
        """Remove `key` and return its value, or `default`. Atomic: only one caller gets it."""
        store = self._store
        store.life.ensure_writable("remove an entry")
        low, high, data = self._desk.identify(key)
        for _ in range(self._desk.attempts):
            slot = store.finding.entry(low, high, data)
            if slot is None:
                break
            found = store.reading.fetch_version(slot)
            if found is None:
                continue
            value = self._decode(found.payload, found.flags, key)  # first: it may refuse
            if store.removal.delete(low, high, data, slot.stamp):
                store.counters.use(True)
                return value
        else:
            raise CacheIOError(
                errno.EAGAIN, "cannot remove an entry: it cannot be read, or changes all the time: try again"
            )
        store.counters.use(False)
        if store.active.others_append():
            store.removal.remove([(low, high)], lambda slot: False, "deletes")
        return default

    @guarded
    def delete(self, key: Key) -> bool:
        """Remove `key`. True if it had a live entry."""
        self._store.life.ensure_writable("delete an entry")
        desk = self._desk
        deleted: bool = desk.delete(desk.encode_key(key))
        return deleted

    def __getitem__(self, key: Key) -> Any:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)

    @guarded
    def __contains__(self, key: Key) -> bool:
        """True if `key` has a live entry. Counts nothing, touches nothing, and reads the stored key only."""
        store = self._store
        found = store.core.holds(key, time.time_ns())
        if found is not NotImplemented:
            return bool(found)
        return store.finding.entry(*self._desk.identify(key)) is not None

    # -- many entries -------------------------------------------------------------------------

    @guarded
    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those of `keys` that have one. What is not in memory is read in one batch.

        Raises ValueError, as all that take many keys, if two of them are different keys of the cache that
        Python takes for equal (``1``, ``1.0`` and ``True``): a dict cannot hold both. And TypeError for a
        str or bytes, which would be one key for each of its characters.
        """
        store = self._store
        store.life.ensure_open()
        wanted = self._desk.distinct(keys)
        found = store.keyed.get_many(wanted, time.time_ns())
        rest = [i for i, hit in enumerate(found) if hit is NotImplemented]
        if rest:
            others = store.reading.get_many([self._desk.encode_key(wanted[i]) for i in rest])
            for i, hit in zip(rest, others, strict=True):
                found[i] = hit
        decode = self._decode
        return {
            key: hit if type(hit) is bytes else decode(hit[0], hit[1], key)
            for key, hit in zip(wanted, found, strict=True)
            if hit is not None
        }

    @guarded
    def set_many(
        self, items: Mapping[Key, Any] | Iterable[tuple[Key, Any]], expire: float | None = None,
        tag: Key = None, meta: Any = None,
    ) -> int:  # fmt: skip
        """`set` of each pair, with few system calls. How many were stored.

        Each entry is atomic, the whole is not: if it raises, the pairs before some point are
        stored. Keys and values are checked before anything is stored; TypeError or ValueError, with its
        position, for an item that is no pair; ValueError for keys that are different here and equal for
        Python, as in `get_many`.
        """
        self._store.life.ensure_writable("store entries")
        item = self._desk.item
        drafts = [item(key, value, expire, tag, meta) for key, value in self._desk.pairs(items)]
        self._store.writing.put_many(drafts)
        return len(drafts)

    @guarded
    def delete_many(self, keys: Iterable[Key]) -> int:
        """Remove each of `keys`; how many of them had a live entry. Atomic in batches of 128.

        ValueError for keys that are different here and equal for Python, as in `get_many`: whichever was
        meant, a deletion can't be undone. TypeError for a str or bytes.
        """
        store = self._store
        store.life.ensure_writable("delete entries")
        encode_key = self._desk.encode_key
        return store.removal.remove_keys([encode_key(key) for key in self._desk.distinct(keys)])

    @guarded
    def __len__(self) -> int:
        """Entries in the cache, those included that have expired but were not removed yet."""
        self._store.life.ensure_open()
        return self._store.current.count()

    @guarded
    def __iter__(self) -> Iterator[Key]:
        """Keys of live entries, roughly oldest first. Changes meanwhile may or may not be seen."""
        decode_key = self._desk.decode_key
        for record, _ in self._live():
            yield decode_key(record.key)

    def keys(self) -> Iterator[Key]:
        """`iter(cache)`."""
        return iter(self)

    # There is no order by key. Without this, `__len__` and `__getitem__` would do for a sequence.
    __reversed__: ClassVar[None] = None

    def __bool__(self) -> bool:
        return True  # a cache that happens to be empty is not false

    @guarded
    def entries(self, prefix: Prefix | None = None, tag: Key = None) -> Iterator[Entry]:
        """Live entries, without their values, of a key prefix (as in `delete_prefix`) and a tag."""
        desk = self._desk
        begin = b"" if prefix is None else desk.encode_prefix(prefix)
        tag_bytes = None if tag is None else desk.encode_tag(tag)
        for record, slot in self._live():
            if record.key.startswith(begin) and (tag_bytes is None or record.tag == tag_bytes):
                entry = desk.entry(slot)
                if entry is not None:
                    yield entry

    def _live(self) -> Iterator[Any]:
        store = self._store
        for record, slot in store.walks.entries():
            if self._store is not store:
                self._store.life.ensure_open()
            if not store.finding.is_over(slot):
                yield record, slot

    @guarded
    def evict(self, tag: Key) -> int:
        """Remove all entries with `tag`. How many live ones went."""
        wanted = self._desk.encode_tag(tag)
        return self._remove_where(lambda record: record.tag == wanted)

    @guarded
    def delete_prefix(self, prefix: Prefix) -> int:
        """Remove all entries whose key begins with `prefix`. How many live ones went.

        A str or bytes prefix means keys of that type that start with it; a tuple means tuple keys
        whose leading parts equal its parts: ``("bucket",)`` purges a bucket. An empty prefix means all
        keys of its type: ``""`` removes every str key.
        """
        begin = self._desk.encode_prefix(prefix)
        return self._remove_where(lambda record: record.key.startswith(begin))

    def _remove_where(self, wanted: Callable[[Any], bool]) -> int:
        store = self._store
        store.life.ensure_writable("remove entries")
        if store.active.others_append():  # the walk does not see what dead ones did not come to show
            store.reaper.reap()
        stamps = {(s.low, s.high): s.stamp for record, s in store.walks.entries() if wanted(record)}
        # An entry replaced since the walk may no longer be one of those meant: it stays.

        def is_meant(slot: Slot) -> bool:
            return stamps[slot.low, slot.high] == slot.stamp

        return store.removal.remove(list(stamps), is_meant, "deletes")[0]

    @guarded
    def expire(self) -> int:
        """Remove entries that have expired. How many. Each batch of 128 is atomic."""
        self._store.life.ensure_writable("remove entries")
        return self._store.evictor.expire_all()

    @guarded
    def cull(self) -> int:
        """Evict until the entries fit the limit, headroom included. How many went."""
        self._store.life.ensure_writable("evict entries")
        return self._store.room.cull()

    @guarded
    def clear(self) -> int:
        """Remove everything at once; how many entries. Hits, misses and evictions keep their counts."""
        return self._store.removal.clear()

    # -- large values and metadata ------------------------------------------------------------

    @guarded
    def get_entry(self, key: Key) -> Entry | None:
        """What is known of `key` beside its value, which is loaded when it is asked for; or None.

        Counts as a hit or a miss.
        """
        store, desk = self._store, self._desk
        low, high, data = desk.identify(key)
        slot = store.finding.lookup(low, high)
        entry = None if slot is None else desk.entry(slot)
        if slot is not None and (entry is None or desk.encode_key(entry.key) != data):
            entry = store.reading.verified(low, high, data, desk.entry)
        if entry is None:
            store.counters.use(False)
            return None
        store.counters.use(True)
        store.finding.touch(low, high)
        return entry

    @guarded
    def open(self, key: Key) -> BinaryIO:
        """The value of `key`, bytes or text, as a binary file: seekable, in constant memory.

        It stays readable until closed, whatever happens to the entry. The whole value is verified
        first. Raises KeyError on a miss, TypeError for a value that is neither bytes nor str.
        """
        return self._desk.open(key)

    @guarded
    def location(self, key: Key) -> Location:
        """Where the bytes of `key` lie: (fd, offset, length), for `os.sendfile` and the like.

        Valid until it is closed (use it in a ``with``), whatever happens to the entry. The whole
        value is verified first. Raises KeyError on a miss, TypeError for a value that is neither
        bytes nor str.
        """
        return self._desk.locate(key).handed_out()

    # -- the cache as a whole -----------------------------------------------------------------

    @guarded
    def volume(self) -> int:
        """Bytes on disk: segments (active ones at full size), large values, index, checkpoint."""
        self._store.life.ensure_open()
        return self._store.current.index.used_bytes

    @guarded
    def flush(self) -> None:
        """Make everything durable that was completed before, by whichever process."""
        self._store.durability.flush()

    @guarded
    def check(self, fix: bool = False, drop_unreadable: bool = False) -> list[Problem]:
        """Read everything and verify it; with `fix`, also put in order what is wrong.

        May run while others use the cache. Problems come back as found; `fixed` says what was mended.
        What the disk cannot read is left as it is, for it may be read the next time: with `fix` and
        `drop_unreadable` just that is given up. See `repair` for a cache that cannot even be opened.
        """
        return self._desk.check(fix, drop_unreadable)

    @guarded
    def stats(self) -> CacheStats:
        """Counters, sizes, and which backend is in use and why."""
        return self._desk.stats()


def _reopen(kind: type[DiskCache], directory: str, options: dict[str, Any]) -> DiskCache:
    """An unpickled handle. What it names is for a cache that is new."""
    with loaded().reopening():
        return kind(directory, **options)
