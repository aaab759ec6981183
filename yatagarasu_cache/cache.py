"""`DiskCache`: the synchronous interface."""

from __future__ import annotations

import errno
import time
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, TypeVar, cast, overload

from .engine import late, loaded, once, opening
from .errors import CacheIOError, Unreadable
from .guard import constructed, guarded, tell

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import ParamSpec

    from .codec import Key, Prefix, Serializer
    from .computing.key_lock import KeyLock
    from .computing.memoize import Memoized, Memoizing
    from .computing.once import Once
    from .computing.throttling import Rate, Turn
    from .config import RingSettings, Settings
    from .contents import Content
    from .entry import Entry, Location
    from .stats import CacheStats
    from .store.check import Problem
    from .store.format import Slot
    from .store.item import Item
    from .store.store import Store

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["DiskCache"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")
_MISSING: Any = object()


class DiskCache:
    """A cache on local disk: persistent, bounded, shared by threads and processes.

    Every method may be called from any thread. Changes are atomic each by itself: a reader, in
    whatever process, sees the old entry or the new one. When a change returns, every process sees
    it, and it survives the death of this process; with ``durability="sync"`` (or after `flush`)
    it also survives a power cut.

    It has most of what a dict has, and is no `MutableMapping`: `pop` returns its default, None, where a dict
    raises KeyError, and `keys`, `items` and `values` are iterators, no views.

    Raises, besides what each method says: `ClosedError` after `close()`, `ReadOnlyError` for
    changes with ``read_only=True``, `CacheIOError` if the disk fails (the old state stands),
    `StorageFull` if it is full, `SerializationError` for keys and values that can't be kept exactly.
    """

    @guarded
    @opening
    def __init__(
        self, directory: str | os.PathLike[str], *,
        size_limit: int = 10 * 2**30,
        eviction: Literal["lru", "fifo", "lfu", "none"] = "lru",
        backend: Literal["auto", "uring", "threads"] | None = "auto",
        durability: Literal["none", "sync"] = "none",
        serializer: Literal["msgpack", "pickle"] | Serializer = "msgpack",
        on_unreadable: Literal["error", "miss"] = "error",
        compression: Literal["zstd", "lz4"] | None = None,
        compression_level: int | None = None,
        compression_min_size: int = 1024,
        max_value_size: int | None = None,
        max_stream_size: int | None = None,
        default_expire: float | None = None,
        read_only: bool = False,
        segment_size: int | None = None,
        large_value_size: int | None = None,
        headroom: float = 0.15,
        max_open_files: int = 256,
        max_in_flight: int = 1024,
        lock_timeout: float | None = 60.0,
        workers: int | None = None,
        allow_network_fs: bool = False,
        directory_mode: int | str = 0o700,
        file_mode: int | str = 0o600,
        io_uring: RingSettings | Mapping[str, Any] = {},  # noqa: B006 - shown, and never used
    ) -> None:  # fmt: skip
        """Open the cache in `directory`, creating it if it is missing or empty.

        Options, with their defaults (docs/configuration.md has all of them):

        size_limit: bytes on disk that are never exceeded by more than a segment (what the cache has;
            10 GiB for a new one). Naming another changes it for all who use the cache.
        eviction: "lru", "fifo", "lfu" or "none" (what the cache has; "lru" for a new one). Likewise.
        backend: "auto", "uring" or "threads" ("auto").
        durability: "none" or "sync" ("none").
        serializer: "msgpack", "pickle" or an object with name, dumps and loads ("msgpack").
        on_unreadable: what a stored value is that the serializer cannot read, "error" or "miss" ("error").
        compression: "zstd", "lz4" or None (None): values of compression_min_size bytes (1024) or more are
            compressed, at compression_level (None: the library's own), where that saves room.
        max_value_size: bytes of the largest value accepted (None: what fits).
        default_expire: seconds after which entries expire by default (None: never).
        read_only: never change anything in the directory (False).

        Raises `ConfigurationError` naming the option, `FormatError` for a directory that is not a
        cache of this format, `BackendUnavailable` for a backend that can't run here.
        """

    def _begin(self, directory: str | os.PathLike[str], options: dict[str, Any]) -> None:
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

    @overload
    def get(self, key: Key, default: Any = None, *, with_meta: Literal[False] = False) -> Any: ...
    @overload
    def get(self, key: Key, default: Any = None, *, with_meta: Literal[True]) -> tuple[Any, Any]: ...
    @overload
    def get(self, key: Key, default: Any = None, *, with_meta: bool) -> Any: ...

    def get(self, key: Key, default: Any = None, with_meta: bool = False) -> Any:
        """The value of `key`, or `default` if there is none, or none that is still good.

        Counts as a hit or a miss, and as a use in the eviction order. The bytes were verified.
        A value that is damaged on disk is a miss (counted in ``stats().corrupt``). One that the serializer
        can't read is a `SerializationError`, or `default` with ``on_unreadable="miss"`` (counted in
        ``stats().unreadable``), and stays where it is.

        with_meta: return ``(value, meta)``, of one and the same version, for the price of the value; meta
            is None where there is none, and ``(default, None)`` is returned on a miss.
        """
        try:
            if with_meta:
                return self._desk.get_with_meta(key, default)
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
            if type(error) is Unreadable and self._settings.on_unreadable == "miss":
                return (default, None) if with_meta else default
            tell(error, self)
            raise

    def set(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None,
        meta: Any = None, length: int | None = None, if_version: int | None = None,
    ) -> bool:  # fmt: skip
        """Store `value` under `key`, in place of what was there. Returns True, but with `if_version`.

        value: any supported value; a binary file open for reading, or an iterator of bytes, is
            read to its end in constant memory and comes back as bytes.
        expire: seconds from now; None takes `default_expire`, `math.inf` means never.
        tag: a name under which `evict` removes all its entries at once.
        meta: anything small that msgpack keeps (content type, etag): comes back in `get_entry`.
        length: bytes that the stream has, where that is known (an HTTP response's Content-Length): what
            can never fit is refused before it is read, and before anything is evicted. Other streams, but
            for regular files, may have `max_stream_size` bytes. A value that is no stream must be
            bytes of this length.
        if_version: store it only if the live entry is of this version (`Entry.version`); 0: if there is
            none. Otherwise False, and nothing was changed, nor a stream read where that can be told before.
            Atomic among all processes.

        Raises `ValueTooLarge` if it can never fit; `StorageFull` if there is no room now; ValueError if it
        has fewer or more bytes than `length`. If it raises, the old entry is still there.
        """
        try:
            if (
                type(value) is bytes and expire is None and meta is None
                and length is None and if_version is None and self._set(key, value, tag)
            ):  # fmt: skip
                return True
            self._store.entering()
            return self._desk.store_value(key, value, expire, tag, meta, length, if_version)
        except BaseException as error:  # as `guarded` does, without a call
            tell(error, self)
            raise

    @guarded
    def add(
        self, key: Key, value: Any, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> bool:
        """`set` if `key` has no live entry, as ``if_version=0``; else False. Atomic among all processes."""
        self._store.life.ensure_writable("store an entry")
        item = self._desk.item(key, value, expire, tag, meta)
        if self._store.core.holds(key, time.time_ns()) is True:
            return False
        return self._store.writing.put_if(item, self._desk.absent)

    @guarded
    def touch(self, key: Key, expire: float | None = None) -> bool:
        """Give `key` a new time to live (seconds from now, as in `set`). False if it has no entry."""
        low, high, data = self._desk.identify(key)
        return self._store.removal.touch(low, high, data, self._desk.expires(expire))

    @guarded
    def set_meta(self, key: Key, meta: Any) -> bool:
        """Give `key` other metadata (None: none any more). False if it has no entry. Atomic.

        The value is neither decoded nor, if it has a file of its own, written anew; expiry and tag stay, and
        so does the time of creation. For eviction, and in `stats`, it counts as a `set`.
        """
        return self._desk.set_meta(key, meta)

    @guarded
    def incr(
        self, key: Key, delta: int = 1, default: int | None = 0, *, expire: float | None = None,
        tag: Key = None,
    ) -> int:  # fmt: skip
        """Add `delta` to the integer of `key` and return the sum. Atomic among all processes.

        A missing entry counts as `default`; with ``default=None`` it raises KeyError. A value that
        is no integer raises TypeError and stays as it is. Expiry, tag and meta are kept: `expire`
        (seconds, as in `set`) and `tag` are those of an entry that this makes. So ``incr("hits", expire=60)``
        begins a window of a minute, and later calls leave its end.
        """
        desk = self._desk
        desk.check_int("delta", delta)
        if default is not None:
            desk.check_int("default", default, " or None")
        where = desk.identify(key)
        fresh = desk.new_counter(where[2], expire, tag)
        result = 0

        def decide(slot: Slot | None) -> Item:
            nonlocal result
            result, item = desk.counted(key, where, slot, delta, default, fresh)
            return item

        self._store.writing.change(where[2], desk.counter_bytes(*where, fresh[1]), decide)
        return result

    def decr(
        self, key: Key, delta: int = 1, default: int | None = 0, *, expire: float | None = None,
        tag: Key = None,
    ) -> int:  # fmt: skip
        """`incr` by ``-delta``."""
        self._desk.check_int("delta", delta)
        return self.incr(key, -delta, default, expire=expire, tag=tag)

    @guarded
    def modify(self, key: Key, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Store ``function(value)`` in place of the value of `key`, and return it. No other change is lost.

        function: called with the value, or with a copy of `default` where there is no live entry. Nothing is
            locked meanwhile: if anybody changes the entry, it is called again with what is there then, so it
            should do nothing else. If it raises, everything stays as it is.

        Expiry (the moment, also of a `touch` meanwhile), tag and meta are kept; a new entry has
        `default_expire`. Raises `CacheIOError` (EAGAIN) if thousands of tries were in vain, as where the
        function itself changes the entry. Counts as neither hit nor miss.
        """
        desk = self._desk
        modification = desk.modification(key, default)
        while True:
            value = desk.result_of(function, modification.read())
            if modification.store(value):
                return value
            time.sleep(modification.pause())

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
            try:
                value = self._decode(found.payload, found.flags, key)  # first: it may refuse
            except Unreadable:
                if self._settings.on_unreadable == "error":
                    raise
                store.counters.use(False)
                return default
            if store.removal.delete(low, high, data, slot.stamp):
                store.counters.use(True)
                return value
        else:
            raise CacheIOError(
                errno.EAGAIN, "cannot remove an entry: it cannot be read, or changes all the time: try again"
            )
        store.counters.use(False)
        if store.finding.stale(low, high):  # nobody is to be served it any more
            store.removal.delete(low, high, data)
        elif store.active.others_append():
            store.removal.remove([(low, high)], lambda slot: False, "deletes")
        return default

    @guarded
    def setdefault(
        self, key: Key, default: Any = None, expire: float | None = None, tag: Key = None, meta: Any = None
    ) -> Any:
        """The value of `key`, or `default`, which is stored if there is none.

        Atomic among all processes: whoever calls this gets what was stored first. Counts as `get`. A value
        that cannot be read raises `SerializationError`, whatever `on_unreadable` says: it is in the way.
        """
        self._store.life.ensure_writable("store an entry")
        for _ in range(self._desk.attempts):
            value = self.get(key, _MISSING)
            if value is not _MISSING:
                return value
            if self.add(key, default, expire, tag, meta):
                return default
            self._desk.ensure_readable(key)
        raise self._desk.undefaulted()

    @guarded
    def delete(self, key: Key, if_version: int | None = None) -> bool:
        """Remove `key`. True if it had a live entry.

        if_version: remove it only if it is of this version (`Entry.version`), else return False. Atomic among
            all processes.
        """
        self._store.life.ensure_writable("delete an entry")
        desk = self._desk
        if if_version is not None:
            desk.expected(if_version)
            return self._store.removal.delete(*desk.identify(key), if_version)
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

    # -- computing, and locks by key ------------------------------------------------------------

    @property
    def _once(self) -> Once:
        return once()(self._desk)

    def get_or_set(
        self, key: Key, function: Callable[[], T], *, expire: float | None = None, tag: Key = None,
        meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
    ) -> T:  # fmt: skip
        """The value of `key`; if there is none, `function()` computes it, and it is stored.

        Of all threads, tasks and processes that ask for a key at the same time, one computes, and the others
        wait for that. Those of the same process share the very object that the function returns, and the
        exception that it raises; in another process the turn passes on. It also passes when the one who
        computes is interrupted, or dies. Exceptions are never stored. A result that can't be stored goes to
        its caller. The terms are those of the caller who computes.

        expire, tag, meta: as in `set`.
        stale: seconds after expiry in which the old value is still served, while one caller has it computed
            anew in the background; also if that fails. Others, `get` among them, miss it. What was stored
            without `stale` is not served, nor longer than it was stored for.
        refresh_early: have it computed anew in the background before it expires, by chance, the more likely
            the longer computing takes and the nearer expiry is: 1.0 (or True) is usual, more is earlier.
            For what was stored with `stale` or `refresh_early`.
        wait: seconds to wait for those who compute at most; 0 does not wait; None: any time.

        Raises what `function` raises; `LockTimeout` after `wait` seconds; `Reentered` if the function asks
        for the key that it is to compute; `ReadOnlyError` on a miss with ``read_only=True``; ValueError for
        `stale` and `refresh_early` of what never expires. `SerializationError` for a value that can't be read
        with this serializer: it is not overwritten. If the cache is closed meanwhile, the result is not
        stored, and `ClosedError` is raised only where the turn is waited for.
        """
        try:
            value: T = self.get(key, _MISSING)
            if value is not _MISSING and refresh_early is None and (stale is None or expire is not None):
                return value
            once = self._once
            terms = once.terms(expire, tag, meta, stale, refresh_early, wait)
            if value is _MISSING:
                value = once.compute(key, function, terms)
            else:
                once.keep_fresh(key, function, terms)
            return value
        except BaseException as error:  # as `guarded` does, without a call
            tell(error, self)
            raise

    @guarded
    def lock(self, key: Key, *, wait: float | None = None) -> KeyLock:
        """A lock, held by one thread of all processes at most: ``with cache.lock(key):``.

        It ends with the process that holds it, however that ends, and has nothing to do with the entry of
        that key. Not reentrant: `Reentered` for the thread that holds it. wait: seconds after which
        `LockTimeout` is raised; None: never. Also has acquire(), release() and locked().
        """
        return self._key_lock(key, 1, wait, True)

    @guarded
    def semaphore(self, key: Key, n: int, *, wait: float | None = None) -> KeyLock:
        """The same for at most `n` at once (up to 4096). All are to name the same `n`."""
        return self._key_lock(key, n, wait, False)

    def _key_lock(self, key: Key, n: int, wait: float | None, is_lock: bool) -> KeyLock:
        self._store.life.ensure_writable("lock a key")
        kind: type[KeyLock] = late("computing.key_lock").KeyLock
        return kind(self._desk, key, n, wait, is_lock=is_lock)

    @guarded
    def throttle(self, count: int, seconds: float, *, name: str | None = None) -> Callable[[F], F]:
        """Decorate a function, or a coroutine function: of all processes, at most `count` calls of it begin
        in any `seconds`. Further ones wait for their time, in the order in which they came. Who is
        interrupted or cancelled meanwhile gives his time back; that of a killed process passes unused.

        name: under which calls are counted together; by default the function's module and qualified name.
        """
        self._store.life.ensure_writable("count calls")
        throttling = late("computing.throttling")

        def decorate(function: F) -> F:
            reserve = partial(self._reserve, throttling.rate_of(function, count, seconds, name))
            if not late("computing.ways").is_async(function):
                return cast("F", throttling.plain(function, reserve, self._put_off, self._give_turn_back))
            tasks = late("computing.aio_throttling")
            calls = map(tasks.aside, (reserve, self._put_off, self._give_turn_back))
            return cast("F", tasks.throttled(function, *calls))

        throttling.check(count, seconds, name)
        return decorate

    @guarded
    def _reserve(self, rate: Rate) -> Turn:
        turn: Turn = late("computing.throttling").reserve(self._desk, rate)
        return turn

    @guarded
    def _put_off(self, turn: Turn) -> None:
        late("computing.throttling").put_off(self._desk, turn)

    @guarded
    def _give_turn_back(self, turn: Turn) -> None:
        late("computing.throttling").give_back(self._desk, turn)

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
        return self._desk.decoded(wanted, found)

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

    def update(
        self, items: Mapping[Key, Any] | Iterable[tuple[Key, Any]] = (), *, expire: float | None = None,
        tag: Key = None, meta: Any = None,
    ) -> None:  # fmt: skip
        """`set_many`, by the name that dicts have for it. Keys are no keyword arguments: options are."""
        self.set_many(items, expire, tag, meta)

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
        for key, _ in self._live(self._store.walks.entries()):
            yield decode_key(key)

    def keys(self) -> Iterator[Key]:
        """`iter(cache)`."""
        return iter(self)

    @guarded
    def items(self) -> Iterator[tuple[Key, Any]]:
        """(key, value) of live entries, as in ``iter(cache)``: an iterator, and no view.

        Counts nothing, and touches nothing in the eviction order. Values are read in batches of up to 64
        entries, or a MiB, and each is decoded when its turn comes: what was replaced by then gives its new
        value, what was removed is left out. So is a value that the serializer cannot read with
        ``on_unreadable="miss"``; else that raises `SerializationError`, naming the key.
        """
        pair = self._desk.pair
        for batch in self._contents():
            for content in batch:
                found = content.now() or content.renewed()
                if found is not None and (item := pair(content, found)) is not None:
                    yield item

    def values(self) -> Iterator[Any]:
        """The values of `items`."""
        return (value for _, value in self.items())

    def _contents(self) -> Iterator[list[Content]]:
        return self._desk.contents(self._live(self._store.walks.entries()))

    # There is no order by key. Without this, `__len__` and `__getitem__` would do for a sequence.
    __reversed__: ClassVar[None] = None

    def __bool__(self) -> bool:
        return True  # a cache that happens to be empty is not false

    @guarded
    def entries(self, prefix: Prefix | None = None, tag: Key = None) -> Iterator[Entry]:
        """Live entries, without their values, of a key prefix (as in `delete_prefix`) and a tag.

        Those of a tag are found without looking at others; those of a prefix, by a walk over all keys.
        """
        desk, store = self._desk, self._store
        begin = b"" if prefix is None else desk.encode_prefix(prefix)
        found: Iterator[Entry | None]
        if tag is None:
            found = (desk.entry(slot) for _, slot in self._live(store.walks.entries(begin)))
        else:
            tagged = ((names, slot) for slot, names in store.tags.entries(desk.encode_tag(tag)))
            found = (
                desk.described(slot, names)
                for names, slot in self._live(tagged)
                if names.key.startswith(begin)
            )
        yield from (entry for entry in found if entry is not None)

    def _live(self, found: Iterable[tuple[T, Slot]]) -> Iterator[tuple[T, Slot]]:
        """Those that have not expired, as long as this handle is open."""
        store = self._store
        for what, slot in found:
            if self._store is not store:
                self._store.life.ensure_open()
            if not store.finding.is_over(slot):
                yield what, slot

    @guarded
    def evict(self, tag: Key) -> int:
        """Remove all entries with `tag`. How many live ones went. Costs what these cost, however many others
        there are.

        Raises `CacheIOError`, once all others are removed, if the disk can't read whether an entry has it.
        """
        wanted, unread = self._desk.encode_tag(tag), list[CacheIOError]()
        removed = self._remove_found(lambda store: (slot for slot, _ in store.tags.entries(wanted, unread)))
        if unread:
            raise unread[0]
        return removed

    @guarded
    def delete_prefix(self, prefix: Prefix) -> int:
        """Remove all entries whose key begins with `prefix`. How many live ones went.

        A str or bytes prefix means keys of that type that start with it; a tuple means tuple keys
        whose leading parts equal its parts: ``("bucket",)`` purges a bucket. An empty prefix means all
        keys of its type: ``""`` removes every str key.
        """
        begin = self._desk.encode_prefix(prefix)
        return self._remove_found(lambda store: (slot for _, slot in store.walks.entries(begin)))

    def _remove_found(self, search: Callable[[Store], Iterable[Slot]]) -> int:
        store = self._store
        store.life.ensure_writable("remove entries")
        if store.active.others_append():  # a search does not see what dead ones did not come to show
            store.reaper.reap()
        stamps = {(slot.low, slot.high): slot.stamp for slot in search(store)}
        # An entry replaced since then may no longer be one of those meant: it stays.

        def is_meant(slot: Slot) -> bool:
            return stamps[slot.low, slot.high] == slot.stamp

        return store.removal.remove(list(stamps), is_meant, "deletes")[0]

    @guarded
    def expire(self) -> int:
        """Remove entries that have expired, and may not be served stale any more. How many. Each batch of 128
        is atomic."""
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
        """The value of `key`, bytes or text (in UTF-8), as a binary file: an `io.BufferedReader`.

        It stays readable until closed, whatever happens to the entry. Of a value that has a file of its own
        (see `large_value_size`) nothing is kept in memory, and it has a `fileno`; each chunk of 64 KiB (more
        of values beyond 4 GiB) is verified when it is read, so that a part costs what the part costs. If one
        is damaged, whatever reads it raises `CacheIOError` (EIO), and the entry is dropped. Other values are
        verified, and in memory, once they are open, decompressed if they are stored so. Raises KeyError on a
        miss, TypeError for a value that is neither bytes nor str.
        """
        return self._desk.open(key)

    @guarded
    def location(self, key: Key, offset: int = 0, length: int | None = None) -> Location:
        """Where the bytes of `key` lie: (fd, offset, length), for `os.sendfile` and the like.

        offset, length: a part of the value, in bytes; `length` None means up to its end, and ends there too
            if it is more. Of a value that has a file of its own only the chunks in which the part lies are
            verified, of others all.

        Valid until it is closed (use it in a ``with``), whatever happens to the entry. Raises KeyError on a
        miss (what is damaged is one), TypeError for a value that is neither bytes nor str, or that is stored
        compressed, ValueError for a part that begins beyond the end of the value.
        """
        return self._desk.locate(key, offset, length).handed_out()

    @guarded
    def view(self, key: Key) -> Any:
        """The verified value of `key`, bytes or text (in UTF-8), as a read-only memoryview; of an array a
        read-only array.

        A value that has a file of its own is mapped: nothing is copied, and all processes that view it share
        the memory. It stays as it is until nothing refers to it any more, whatever happens to the entry or
        the cache; its room on the disk is not free before. Raises KeyError on a miss, TypeError for a value
        of another type. Where the disk fails later on, the system ends the process (SIGBUS), as with any
        mapping.
        """
        return self._desk.view(key)

    # -- functions ----------------------------------------------------------------------------

    @overload
    def memoize(self, function: Callable[P, R], /) -> Memoized[P, R]: ...

    @overload
    def memoize(
        self, function: None = None, /, *, name: str | None = None, expire: float | None = None,
        tag: Key = None, meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
        key: Callable[..., Key] | None = None, ignore: Iterable[str | int] = (), typed: bool = False,
        version: Key = None, condition: Callable[[Any], bool] | None = None,
    ) -> Memoizing: ...  # fmt: skip

    def memoize(
        self, function: Any = None, /, *, name: str | None = None, expire: float | None = None,
        tag: Key = None, meta: Any = None, stale: float | None = None, refresh_early: float | None = None,
        wait: float | None = None,
        key: Callable[..., Key] | None = None, ignore: Iterable[str | int] = (), typed: bool = False,
        version: Key = None, condition: Callable[[Any], bool] | None = None,
    ) -> Any:  # fmt: skip
        """Decorate a function so that its results are kept; also ``@cache.memoize`` without options.

        A call is a key: ``(name, version, form, argument, ...)``, of arguments as the function gets them,
        so that ``f(1, b=2)`` and ``f(1, 2)`` are one call, and so are calls that name a default and calls
        that don't. Exceptions are not kept. A coroutine function stays one, and its results are kept.

        name: of the function; None: its module and qualified name. In what a process was started with, the
            module is the one that ``python -m`` was given, or the file; where there is no file, as in a
            notebook, the code tells functions apart. Lambdas, and functions that close over variables, need a
            name or `key`.
        expire, tag, meta: as in `set`.
        stale, refresh_early, wait: as in `get_or_set`.
        key: ``key(*args, **kwargs)`` returns what tells calls apart, any key, in the place of the arguments.
        ignore: names, or positions (from 0), of parameters that don't tell calls apart.
        typed: tell 1, 1.0 and True apart, which else are one argument.
        version: any key; results of other versions are not found any more.
        condition: ``condition(result)`` says whether a result is kept. It is returned in any case.

        Scalars are kept in keys as they are. Of containers, dataclasses and the like, arrays, and whatever
        is long, keys hold digests of the content, the same in every process. An object with a
        `__cache_key__`, an attribute or a method without arguments, is what that says. Other objects, a
        method's ``self`` too, are refused by the call with a `SerializationError` (a TypeError) that names
        the argument.

        The function has further attributes: ``cache_key(*args, **kwargs)`` (also as ``__cache_key__``), the
        key of a call; ``invalidate(*args, **kwargs)`` forgets a call's result, ``cache_clear()`` all of the
        function's, and ``__wrapped__`` is the function as it was.

        Raises TypeError for what can't be memoized, such as generators, and TypeError or ValueError for
        options.
        """
        decorate = late("computing.memoize").Memoizing(
            self, name=name, expire=expire, tag=tag, meta=meta, stale=stale, refresh_early=refresh_early,
            wait=wait, key=key, ignore=ignore, typed=typed, version=version, condition=condition,
        )  # fmt: skip
        return decorate if function is None else decorate(function)

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
    def check(
        self, fix: bool = False, drop_unreadable: bool = False, *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Problem]:  # fmt: skip
        """Read everything and verify it; with `fix`, also put in order what is wrong.

        May run while others use the cache. Problems come back as found; `fixed` says what was mended.
        What the disk cannot read is left as it is, for it may be read the next time: with `fix` and
        `drop_unreadable` just that is given up. See `repair` for a cache that cannot even be opened.

        progress: called now and then with how many entries were read, and of how many: about, where others
        change them meanwhile. What it raises ends the check.
        """
        return self._desk.check(fix, drop_unreadable, progress)

    @guarded
    def stats(self) -> CacheStats:
        """Counters, sizes, and which backend is in use and why."""
        return self._desk.stats()


def _reopen(kind: type[DiskCache], directory: str, options: dict[str, Any]) -> DiskCache:
    """An unpickled handle. What it names is for a cache that is new."""
    with loaded().reopening():
        return kind(directory, **options)
