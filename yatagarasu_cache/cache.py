"""`DiskCache`: the synchronous interface. Keys and values here, digests and bytes in `store/`."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO, ClassVar, NoReturn, Union

from . import config
from .backends.base import Buffer
from .codec import (
    KIND_BYTES,
    KIND_INT,
    KIND_STR,
    Key,
    MsgpackSerializer,
    Prefix,
    ValueCodec,
    decode_key,
    encode_key,
    encode_prefix,
    refuse_equal,
)
from .concurrency.interruption import ours
from .config import Settings
from .entry import Entry, Location, OwnLocation, ValueReader
from .errors import CacheIOError, ClosedError, EntryGone, ReadOnlyError, SerializationError, ValueTooLarge
from .guard import callers, guarded, tell
from .stats import CacheStats, collect
from .store import check as _check
from .store import sharing
from .store.check import Problem
from .store.core import PythonCore
from .store.current import ATTEMPTS
from .store.format import CODEC_FLAGS, MAX_HEAD_BYTES, RECORD_BYTES, Slot, key_digest
from .store.item import Item
from .store.large import CHUNK_BYTES

__all__ = ["DiskCache"]

_MISSING: Any = object()
_FOREVER = (1 << 63) - 1  # nanoseconds since the epoch: beyond any clock
_META = MsgpackSerializer()
# Types that are values as they stand; anything else may be a stream.
_PLAIN = frozenset({bytes, str, int, float, bool, type(None), list, dict, tuple, set, frozenset, bytearray})
# Iterable, and never meant as several things, or as two in this order.
_TEXTS = (str, bytes, bytearray, memoryview)
_NO_PAIRS = (*_TEXTS, Mapping, Set)
Stream = Union[BinaryIO, Iterator[Buffer]]
callers(refuse_equal)


class _ClosedStore:
    """What a handle has instead of its store once it was closed."""

    def __init__(self, root: str) -> None:
        self._root = root

    def refuse(self, *_: Any) -> Any:
        raise ClosedError(f"the cache in {self._root!r} is closed: open it anew")

    def __getattr__(self, name: str) -> Any:
        self.refuse()


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

    _unpickled = False

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
        self._begin(_settings(directory, options))

    def _begin(self, settings: Settings) -> None:
        self._settings = settings
        self._codec = ValueCodec(settings.serializer)  # type: ignore[arg-type]
        self._decode = self._codec.decode
        self._lease = lease = sharing.acquire(self, settings, self._unpickled)
        self._store = store = lease.store
        # A sync costs so much that the rest does not count.
        core = PythonCore(store) if store.durable else store.core
        self._get, self._put, self._delete = store.core.get, core.put, core.delete
        self._set = core.set if settings.default_expire is None else PythonCore(store).set

    @classmethod
    @guarded
    def from_config(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> DiskCache:
        """A cache from a mapping, or a YAML, TOML or JSON file, of the shape ``cache.disk.{...}``.

        Raises `ConfigurationError` naming the setting, or the file and what is wrong with it.
        """
        cache = cls.__new__(cls)
        cache._begin(configured(source))
        return cache

    # -- life ---------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Absolute path of the cache directory."""
        return self._settings.directory

    @property
    def settings(self) -> Settings:
        """The settings in force, all of them: this handle's own, and those of the cache."""
        store = self._lease.store
        with contextlib.suppress(ClosedError):
            store.shared_settings.follow()
        return replace(self._settings, **store.limits.in_force._asdict())

    @property
    def closed(self) -> bool:
        return self._lease.closed or self._lease.store.closed

    def close(self) -> None:
        """End the use of this handle. Idempotent. The last handle to close makes everything durable."""
        closed: Any = _ClosedStore(self._settings.directory)
        self._store = closed
        self._get = self._put = self._set = self._delete = closed.refuse
        try:
            self._lease.close()
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
        options = config.to_options(self._settings)
        return _reopen, (type(self), options.pop("directory"), options)

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
                found = self._store.core.ordinary(key)
            if found is None:
                return default
            payload, flags = found
            return self._decode(payload, flags & CODEC_FLAGS, key) if flags else payload
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
            return self._set_ordinary(key, value, expire, tag, meta, length)
        except BaseException as error:  # as `guarded` does, without a call
            tell(error, self)
            raise

    def _set_ordinary(
        self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any, length: int | None
    ) -> bool:
        data = encode_key(key)
        expires = self._expires(expire)
        tag_bytes = b"" if tag is None else _encode_tag(tag)
        meta_bytes = b"" if meta is None else _encode_meta(meta)
        if type(value) not in _PLAIN and (stream := as_stream(value, length)) is not None:
            self._check_names(data, tag_bytes, meta_bytes)
            store = self._store
            digest = key_digest(data, store.current.seed)
            item = Item(*digest, data, b"", KIND_BYTES, expires, tag_bytes, meta_bytes)
            return store.writing.put_stream(item, stream, stream_length(value, length))
        if length is not None:
            check_length(value, length)
        payload: Buffer
        if type(value) is bytes:
            payload, flags = value, KIND_BYTES
        else:
            payload, flags = self._codec.encode(value, self._store.limits.encodable_bytes, key)
        self._check(data, tag_bytes, meta_bytes, len(payload))
        self._put(data, payload, flags, expires, tag_bytes, meta_bytes)
        return True

    @guarded
    def add(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> bool:
        """`set` if `key` has no live entry; False if it has. Atomic among all processes."""
        self._store.life.ensure_writable("store an entry")
        item = self._item(key, value, expire, tag, meta)
        if self._store.core.holds(key, time.time_ns()) is True:
            return False
        return self._store.writing.add(item)

    @guarded
    def touch(self, key: Key, expire: float | None = None) -> bool:
        """Give `key` a new time to live (seconds from now, as in `set`). False if it has no entry."""
        store = self._store
        data = encode_key(key)
        return store.removal.touch(*key_digest(data, store.current.seed), data, self._expires(expire))

    @guarded
    def incr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """Add `delta` to the integer of `key` and return the sum. Atomic among all processes.

        A missing entry counts as `default`; with ``default=None`` it raises KeyError. A value that
        is no integer raises TypeError and stays as it is. Expiry, tag and meta are kept.
        """
        _check_int("delta", delta)
        if default is not None:
            _check_int("default", default, " or None")
        data = encode_key(key)
        low, high = key_digest(data, self._store.current.seed)
        result = 0

        def decide(slot: Slot | None) -> Item:
            nonlocal result
            value, expires, tag, meta = self._current_int(key, data, slot, default)
            result = value + delta
            payload, flags = self._codec.encode(result)
            return Item(low, high, data, payload, flags, expires, tag, meta)

        self._store.writing.change(data, self._counter_bytes(low, high, data), decide)
        return result

    def decr(self, key: Key, delta: int = 1, default: int | None = 0) -> int:
        """`incr` by ``-delta``."""
        _check_int("delta", delta)
        return self.incr(key, -delta, default)

    def _counter_bytes(self, low: int, high: int, data: bytes) -> int:
        """Bytes that a counter's new record takes at most."""
        slot = self._store.finding.lookup(low, high)
        return 1024 + len(data) + (slot.head_bytes + min(slot.value_length, 1 << 16) if slot else 0)

    def _current_int(
        self, key: Key, data: bytes, slot: Slot | None, default: int | None
    ) -> tuple[int, int, bytes, bytes]:
        """(value, expires, tag, meta) of a counter. The lock is held."""
        found = self._store.reading.fetch(slot.low, slot.high, data) if slot is not None else None
        names = self._store.reading.names_of(slot) if slot is not None and found is not None else None
        if slot is None or found is None or names is None:
            if default is None:
                raise KeyError(key)
            return default, self._expires(None), b"", b""
        payload, flags = found
        if flags & CODEC_FLAGS != KIND_INT:
            _wrong_type(f"the value of {key!r} is not an integer: incr and decr leave it as it is")
        return self._decode(payload, flags & CODEC_FLAGS), slot.expires, names.tag, names.meta

    @guarded
    def pop(self, key: Key, default: Any = None) -> Any:
        """Remove `key` and return its value, or `default`. Atomic: only one caller gets it."""
        store = self._store
        store.life.ensure_writable("remove an entry")
        data = encode_key(key)
        low, high = key_digest(data, store.current.seed)
        for _ in range(ATTEMPTS):
            slot = store.finding.entry(low, high, data)
            if slot is None:
                break
            found = store.reading.fetch_version(slot)
            if found is None:
                continue
            value = self._decode(found.payload, found.flags & CODEC_FLAGS, key)  # first: it may refuse
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
        store = self._store
        store.life.ensure_writable("delete an entry")
        deleted: bool = self._delete(encode_key(key))
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
        data = encode_key(key)
        return store.finding.entry(*key_digest(data, store.current.seed), data) is not None

    # -- many entries -------------------------------------------------------------------------

    @guarded
    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those of `keys` that have one. What is not in memory is read in one batch.

        Raises ValueError, as all that take many keys, if two of them are different keys of the cache that
        Python takes for equal (``1``, ``1.0`` and ``True``): a dict cannot hold both. And TypeError for a
        str or bytes, which would be one key for each of its characters.
        """
        wanted = listed(keys)
        store = self._store
        store.life.ensure_open()
        refuse_equal(wanted)
        found = store.core.get_many(wanted, time.time_ns())
        rest = [i for i, hit in enumerate(found) if hit is NotImplemented]
        if rest:
            others = store.reading.get_many([encode_key(wanted[i]) for i in rest])
            for i, hit in zip(rest, others, strict=True):
                found[i] = hit
        decode = self._decode
        return {
            key: hit if type(hit) is bytes else decode(hit[0], hit[1] & CODEC_FLAGS, key)
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
        pairs = _pairs(items)
        refuse_equal([key for key, _ in pairs])
        drafts = [self._item(key, value, expire, tag, meta) for key, value in pairs]
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
        wanted = listed(keys)
        refuse_equal(wanted)
        return store.removal.remove_keys([encode_key(key) for key in wanted])

    @guarded
    def __len__(self) -> int:
        """Entries in the cache, those included that have expired but were not removed yet."""
        self._store.life.ensure_open()
        return self._store.current.count()

    @guarded
    def __iter__(self) -> Iterator[Key]:
        """Keys of live entries, roughly oldest first. Changes meanwhile may or may not be seen."""
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
        begin = b"" if prefix is None else encode_prefix(prefix)
        tag_bytes = None if tag is None else _encode_tag(tag)
        for record, slot in self._live():
            if record.key.startswith(begin) and (tag_bytes is None or record.tag == tag_bytes):
                entry = self._entry(slot)
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
        wanted = _encode_tag(tag)
        return self._remove_where(lambda record: record.tag == wanted)

    @guarded
    def delete_prefix(self, prefix: Prefix) -> int:
        """Remove all entries whose key begins with `prefix`. How many live ones went.

        A str or bytes prefix means keys of that type that start with it; a tuple means tuple keys
        whose leading parts equal its parts: ``("bucket",)`` purges a bucket. An empty prefix means all
        keys of its type: ``""`` removes every str key.
        """
        begin = encode_prefix(prefix)
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
        store = self._store
        data = encode_key(key)
        low, high = key_digest(data, store.current.seed)
        slot = store.finding.lookup(low, high)
        entry = None if slot is None else self._entry(slot)
        if slot is not None and (entry is None or encode_key(entry.key) != data):
            entry = store.reading.verified(low, high, data, self._entry)
        if entry is None:
            store.counters.use(False)
            return None
        store.counters.use(True)
        store.finding.touch(low, high)
        return entry

    def _entry(self, slot: Slot) -> Entry | None:
        """None if the record is damaged, or was moved meanwhile."""
        names = self._store.reading.names_of(slot)
        if names is None or key_digest(names.key, self._store.current.seed) != (slot.low, slot.high):
            return None
        key = decode_key(names.key)
        return Entry(
            key=key,
            tag=decode_key(names.tag) if names.tag else None,
            meta=_META.loads(names.meta) if names.meta else None,
            size=slot.value_length,
            created=names.created / 1e9,
            expires=slot.expires / 1e9 if slot.expires else None,
            accessed=self._store.finding.accessed(slot),
            load=lambda: self._load_entry(slot, key),
        )

    def _load_entry(self, slot: Slot, key: Key) -> Any:
        found = self._store.reading.fetch_version(slot)
        if found is None:
            raise EntryGone(
                "the entry expired, or was replaced or removed, before its value was read: get it again"
            )
        return self._decode(found.payload, found.flags & CODEC_FLAGS, key)

    @guarded
    def open(self, key: Key) -> BinaryIO:
        """The value of `key`, bytes or text, as a binary file: seekable, in constant memory.

        It stays readable until closed, whatever happens to the entry. The whole value is verified
        first. Raises KeyError on a miss, TypeError for a value that is neither bytes nor str.
        """
        location = self._locate(key)
        return io.BufferedReader(ValueReader(self._store.backend, location), CHUNK_BYTES // 4)

    @guarded
    def location(self, key: Key) -> Location:
        """Where the bytes of `key` lie: (fd, offset, length), for `os.sendfile` and the like.

        Valid until it is closed (use it in a ``with``), whatever happens to the entry. The whole
        value is verified first. Raises KeyError on a miss, TypeError for a value that is neither
        bytes nor str.
        """
        return self._locate(key).handed_out()

    def _locate(self, key: Key) -> OwnLocation:
        store = self._store
        data = encode_key(key)
        location = store.reading.verified(*key_digest(data, store.current.seed), data, store.reading.locate)
        if location is None:
            store.counters.use(False)
            raise KeyError(key)
        if location.flags & CODEC_FLAGS not in (KIND_BYTES, KIND_STR):
            location.close()
            _wrong_type(f"the value of {key!r} is neither bytes nor str: read it with get()")
        store.counters.use(True)
        return location

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
        _check_fix(fix, drop_unreadable)
        if fix and self._settings.read_only:
            raise ReadOnlyError("fix=True needs a cache opened without read_only=True")
        self._store.life.ensure_open()
        return _check.check(self._store, fix, drop_unreadable)

    @guarded
    def stats(self) -> CacheStats:
        """Counters, sizes, and which backend is in use and why."""
        store = self._store
        store.life.ensure_open()
        return collect(store, self._lease.shared.reason, sharing.counters(self._lease))

    # -- arguments ----------------------------------------------------------------------------

    @callers
    def _expires(self, expire: float | None) -> int:
        """Nanoseconds since the epoch; 0 for never."""
        if expire is None:
            expire = self._settings.default_expire
            if expire is None:
                return 0
        if isinstance(expire, bool) or not isinstance(expire, (int, float)) or expire != expire:
            raise TypeError(f"expire must be a number of seconds or None, not {expire!r}")
        if expire == math.inf:
            return 0
        if expire <= 0:
            raise ValueError(f"expire must be more than 0 seconds, not {expire!r}: use delete() instead")
        return min(time.time_ns() + int(min(expire, 1e10) * 1e9), _FOREVER)

    def _item(self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any) -> Item:
        """Everything of an entry as bytes, checked."""
        data = encode_key(key)
        payload, flags = self._codec.encode(value, self._store.limits.encodable_bytes, key)
        tag_bytes = b"" if tag is None else _encode_tag(tag)
        meta_bytes = b"" if meta is None else _encode_meta(meta)
        self._check(data, tag_bytes, meta_bytes, len(payload))
        low, high = key_digest(data, self._store.current.seed)
        return Item(low, high, data, payload, flags, self._expires(expire), tag_bytes, meta_bytes)

    def _check(self, key: bytes, tag: bytes, meta: bytes, length: int) -> None:
        if tag or meta:
            self._check_names(key, tag, meta)
        if length > self._store.limits.unchecked_bytes:
            self._store.budget.ensure_fits(length)

    def _check_names(self, key: bytes, tag: bytes, meta: bytes) -> None:
        size = RECORD_BYTES + len(key) + len(tag) + len(meta)
        if size > min(MAX_HEAD_BYTES, self._store.budget.live_limit // 4):
            raise ValueTooLarge(f"key, tag and meta have {size} bytes together: keep meta small")


def _reopen(kind: Any, directory: str, options: dict[str, Any]) -> DiskCache:
    """An unpickled handle. What it names is for a cache that is new."""
    cache: DiskCache = kind.__new__(kind, directory, **options)
    cache._unpickled = True
    with config.reopening():
        kind.__init__(cache, directory, **options)
    return cache


@callers
def _settings(directory: str | os.PathLike[str], options: dict[str, Any]) -> Settings:
    return config.make_settings(directory, **options)


@callers
def configured(source: Mapping[str, Any] | str | os.PathLike[str]) -> Settings:
    return config.from_mapping(source) if isinstance(source, Mapping) else config.load(source)


@callers
def listed(keys: Iterable[Key]) -> list[Key]:
    if isinstance(keys, _TEXTS) or not _is_iterable(keys):
        kind = type(keys).__name__
        raise TypeError(f"keys must be an iterable of keys, not {kind}: for one key, write [key]")
    return list(keys)


@callers
def check_items(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> None:
    """Whether these can be pairs, before they are gone through."""
    if isinstance(items, _TEXTS) or not _is_iterable(items):
        raise TypeError(
            f"items must be a mapping or an iterable of (key, value) pairs, not {type(items).__name__}"
        )


@callers
def _pairs(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> list[tuple[Key, Any]]:
    check_items(items)
    return [
        item if type(item) is tuple and len(item) == 2 else _pair(position, item)
        for position, item in enumerate(items.items() if isinstance(items, Mapping) else items)
    ]


def _pair(position: int, item: Any) -> tuple[Key, Any]:
    """What is no tuple may be a pair all the same: a list, a row of a table."""
    name = f"items[{position}] must be a (key, value) pair"
    if isinstance(item, _NO_PAIRS) or not _is_iterable(item):
        raise TypeError(f"{name}, not {type(item).__name__}")
    parts = tuple(islice(item, 3))
    if len(parts) != 2:
        raise ValueError(f"{name}: it has {len(parts) if len(parts) < 2 else 'more than 2'} parts")
    return parts


def _is_iterable(value: object) -> bool:
    return isinstance(value, Iterable) or hasattr(type(value), "__getitem__")


@callers
def _check_fix(fix: bool, drop_unreadable: bool) -> None:
    if drop_unreadable and not fix:
        raise ValueError("drop_unreadable=True gives something up: it needs fix=True")


def _check_int(name: str, value: object, otherwise: str = "") -> None:
    if type(value) is not int:
        _wrong_type(f"{name} must be an int{otherwise}, not {type(value).__name__}")


@callers
def _wrong_type(what: str) -> NoReturn:
    raise TypeError(what)


def _encode_tag(tag: Key) -> bytes:
    try:
        return encode_key(tag)  # at most MAX_KEY_BYTES, which is what a record has room for
    except SerializationError as error:
        text = str(error).replace("the key takes", "it takes")
        raise SerializationError(f"tag: {text}") from error


def _encode_meta(meta: Any) -> bytes:
    try:
        return _META.dumps(meta, MAX_HEAD_BYTES)
    except SerializationError as error:
        raise SerializationError(f"meta: {error}") from error
    except ValueTooLarge:
        raise ValueTooLarge(f"meta takes more than {MAX_HEAD_BYTES} bytes: keep meta small") from None


@callers
def as_stream(value: Any, length: int | None = None) -> Iterator[Buffer] | None:
    """The parts of a value that is a binary file or an iterator of bytes; None if it is neither.

    If it turns out not to have `length` bytes, that is a ValueError.
    """
    parts = _as_parts(value)
    if parts is None or length is None:
        return parts
    _check_bytes(length)
    return _of_length(parts, length)


def _as_parts(value: Any) -> Iterator[Buffer] | None:
    if isinstance(value, io.TextIOBase):
        raise SerializationError("value is a text file: open it in binary mode")
    if callable(getattr(value, "read", None)):
        _check_readable(value)
        return _parts(_pieces(value))
    if isinstance(value, Iterator):
        return _parts(value)
    return None


def _check_readable(value: Any) -> None:
    """Refuse a file that is closed, or open for writing only. What does not say so is just read: a class
    derived from those of `io` says that it is not readable where it does not say anything."""
    try:
        for_writing_only = _says(value, "readable") is False and _says(value, "writable") is True
    except ours(ValueError) as error:
        if getattr(value, "closed", None) is not True:
            raise
        raise ValueError("value is a closed file: open it for reading (mode 'rb')") from error
    if for_writing_only:
        raise ValueError("value is a file that is open for writing only: open it for reading (mode 'rb')")


def _says(value: Any, name: str) -> Any:
    method = getattr(value, name, None)
    return method() if callable(method) else None


@callers
def _pieces(value: Any) -> Iterator[Any]:
    """What a file has, to its end. A generator: a StopIteration of its own is no end."""
    while (piece := value.read(CHUNK_BYTES)) != b"":
        yield piece


@callers
def _parts(iterator: Iterator[Any]) -> Iterator[Buffer]:
    for part in iterator:
        yield _bytes_only(part)


@callers
def _of_length(parts: Iterator[Buffer], length: int) -> Iterator[Buffer]:
    done = 0
    for part in parts:
        done += len(part)
        if done > length:
            raise ValueError(f"length is {length}, and the stream has more: {done} bytes so far")
        yield part
    if done < length:
        raise ValueError(f"length is {length}, and the stream ended after {done} bytes")


@callers
def check_length(value: Any, length: int) -> None:
    """`length` of a value that is no stream."""
    _check_bytes(length)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"length is for streams and bytes, and the value is of type {type(value).__name__}")
    found = value.nbytes if isinstance(value, memoryview) else len(value)
    if found != length:
        raise ValueError(f"length is {length}, and the value has {found} bytes")


def _check_bytes(length: object) -> None:
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int (bytes) or None, not {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must not be negative: it is {length}")


@callers
def stream_length(value: Any, length: int | None = None) -> int | None:
    """`length`, or the bytes that a regular file still has; None for other streams. What can't fit is
    refused early."""
    if length is not None:
        return length
    try:
        status = os.fstat(value.fileno())
        return max(0, status.st_size - value.tell()) if stat.S_ISREG(status.st_mode) else None
    except ours(AttributeError, OSError, ValueError):
        return None


def _bytes_only(part: Any) -> Buffer:
    if isinstance(part, memoryview):
        return part.cast("B") if part.contiguous else part.tobytes()
    if not isinstance(part, (bytes, bytearray)):
        raise SerializationError(f"a stream must yield bytes, not {type(part).__name__}")
    return part
