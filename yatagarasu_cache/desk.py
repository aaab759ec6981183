"""What stands between a face of the cache (`DiskCache`, `AsyncDiskCache`) and the engine in `store/`.

Keys and values here, digests and bytes there. Importing this loads the engine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO, NoReturn, TypeVar

from . import config
from .arguments import (
    META,
    check_fix,
    check_int,
    check_range,
    check_start,
    check_version,
    distinct,
    encode_meta,
    encode_tag,
    expiry,
    pairs,
    wrong_type,
)
from .backends.base import Buffer
from .codec import (
    KIND_ARRAY,
    KIND_BYTES,
    KIND_COMPRESSED,
    KIND_INT,
    KIND_STR,
    Key,
    ValueCodec,
    decode_key,
    encode_key,
    encode_prefix,
)
from .codec.compression import compression_of
from .config import Settings
from .contents import Content, contents
from .entry import Entry, OwnLocation
from .errors import (
    CacheIOError,
    ClosedError,
    EntryGone,
    ReadOnlyError,
    SerializationError,
    Unreadable,
    ValueTooLarge,
)
from .guard import callers
from .log import without_key
from .modifying import Modification, result_of
from .stats import CacheStats, collect
from .store import sharing
from .store.check import Problem
from .store.current import ATTEMPTS
from .store.expected import ABSENT, Expected
from .store.format import CODEC_FLAGS, FLAG_TERMS, MAX_HEAD_BYTES, RECORD_BYTES, Slot, key_digest
from .store.item import Item, Pieces
from .store.lending import LentFile
from .store.reading import Found, Names
from .store.store import Store
from .streams import as_stream, check_length, stream_length
from .value_files import value_file

__all__ = ["Desk"]

T = TypeVar("T")

_TEXTS = (KIND_BYTES, KIND_STR)  # kinds of values whose bytes are handed out as they are
# Bytes of a record, beside its value, that fit every cache: its index takes five times as many at least.
_SHORT_NAMES = 4096
# Types that are values as they stand; anything else may be a stream.
_PLAIN = frozenset({bytes, str, int, float, bool, type(None), list, dict, tuple, set, frozenset, bytearray})


class _ClosedStore:
    """Stands in for the store once a handle is closed."""

    def __init__(self, root: str) -> None:
        self._root = root

    def refuse(self, *_: Any) -> Any:
        raise ClosedError(f"the cache in {self._root!r} is closed: open it anew")

    def __getattr__(self, name: str) -> Any:
        self.refuse()


def _never_plain(key: Key, value: bytes, tag: Key, meta: bytes = b"", rank: int | None = None) -> bool:
    """`KeyedAccess.set` where entries expire by default, or bytes are compressed."""
    return False


def _note_unreadable(
    known: Callable[[], Store | None], meaning: str, _key: Key, error: SerializationError
) -> None:
    store = known()
    if store is None:
        return
    store.counters.note_unreadable()
    if meaning == "miss":
        line = f"taken for a miss, as on_unreadable='miss' says: {without_key(error)}"
        store.notices.log_once("unreadable", line)


class Desk:
    """One handle's share in an open store, with the settings and the codec of the handle.

    `get`, `set`, `put` and `delete` are the engine's own methods, to save calls; `encode` and `decode` are
    the codec's. The share ends with `close`, or when this is collected.

    It also is a path, its directory's, so that a `DiskCache` can be opened on it.
    """

    __slots__ = (
        "__weakref__", "codec", "compresses", "decode", "delete", "encode", "get", "lease", "put", "set",
        "settings", "store",
    )  # fmt: skip

    # Other checks of arguments, for the faces.
    check_int = staticmethod(check_int)
    decode_key = staticmethod(decode_key)
    distinct = staticmethod(distinct)
    encode_key = staticmethod(encode_key)
    encode_prefix = staticmethod(encode_prefix)
    encode_tag = staticmethod(encode_tag)
    pairs = staticmethod(pairs)
    arguments = staticmethod(config.to_arguments)
    attempts = ATTEMPTS
    reopening = staticmethod(config.reopening)
    result_of = staticmethod(result_of)
    absent = ABSENT

    def __init__(self, settings: Settings, unpickled: bool = False) -> None:
        """Open the cache, or share one that this process has open. `unpickled`: see `sharing`."""
        self.settings = settings
        compression = compression_of(settings)
        codec = ValueCodec(settings.serializer, compression)  # type: ignore[arg-type]
        self.codec, self.encode, self.decode = codec, codec.encode, codec.decode
        self.lease = lease = sharing.acquire(self, settings, unpickled)
        store: Store = lease.store
        self.store = store
        # Weakly: a codec refers to itself, and nothing of this is to wait for the garbage collector.
        codec.noted = partial(_note_unreadable, weakref.ref(store), settings.on_unreadable)
        keyed = store.keyed
        self.get, self.put, self.delete = store.core.get, keyed.put, keyed.delete
        self.compresses = compression is not None
        plain = settings.default_expire is None and not self.compresses
        self.set = keyed.set if plain else _never_plain

    @staticmethod
    @callers
    def checked(directory: str | os.PathLike[str], options: dict[str, Any]) -> tuple[Settings, bool]:
        """The settings of a new handle, and whether it is being unpickled."""
        return config.make_settings(directory, **options), config.take_reopening()

    @staticmethod
    @callers
    def configured(source: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
        """The arguments of a handle that is configured by a mapping or a file."""
        found = config.from_mapping(source) if isinstance(source, Mapping) else config.load(source)
        return config.to_arguments(found)

    def __fspath__(self) -> str:
        return self.settings.directory

    @property
    def closed(self) -> bool:
        return self.lease.closed or self.lease.store.closed

    def refuse_all(self) -> None:
        """Refuse all further use of the store: it is closed."""
        closed: Any = _ClosedStore(self.settings.directory)
        self.store = closed
        self.get = self.put = self.set = self.delete = closed.refuse

    def close(self) -> None:
        """Idempotent."""
        self.refuse_all()
        self.lease.close()

    def settings_in_force(self) -> Settings:
        """The handle's own settings, with those that the cache has in force."""
        store = self.lease.store
        with contextlib.suppress(ClosedError):
            store.shared_settings.follow()
        return replace(self.settings, **store.limits.in_force._asdict())

    def stats(self) -> CacheStats:
        self.store.life.ensure_open()
        process, computing = sharing.counters(self.lease), self.lease.place.in_flight.counts
        return collect(self.store, self.lease.shared.reason, process, computing)

    def check(
        self, fix: bool, drop_unreadable: bool, progress: Callable[[int, int], None] | None = None
    ) -> list[Problem]:
        check_fix(fix, drop_unreadable)
        if fix and self.settings.read_only:
            raise ReadOnlyError("fix=True needs a cache opened without read_only=True")
        self.store.life.ensure_open()
        return self.store.checker.check(fix, drop_unreadable, progress)

    # -- what is to be stored -----------------------------------------------------------------

    def identify(self, key: Key) -> tuple[int, int, bytes]:
        """(low, high, bytes) of a key: its digest, and what is stored of it."""
        data = encode_key(key)
        return *key_digest(data, self.store.current.seed), data

    def expires(self, expire: float | None) -> int:
        """Nanoseconds since the epoch; 0 for never."""
        return expiry(expire, self.settings.default_expire)

    @staticmethod
    def expected(if_version: int | None) -> Expected | None:
        """The argument `if_version`, checked; None: whatever is there."""
        if if_version is None:
            return None
        check_version(if_version)
        return Expected(if_version)

    def store_value(
        self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any, length: int | None,
        if_version: int | None,
    ) -> bool:  # fmt: skip
        """`DiskCache.set` of values that the engine's `set` does not take."""
        expected = self.expected(if_version)
        data = encode_key(key)
        expires = expiry(expire, self.settings.default_expire)
        tag_bytes = b"" if tag is None else encode_tag(tag)
        meta_bytes = b"" if meta is None else encode_meta(meta)
        if type(value) not in _PLAIN and (stream := as_stream(value, length)) is not None:
            self._check_names(data, tag_bytes, meta_bytes)
            digest = key_digest(data, self.store.current.seed)
            item = Item(*digest, data, b"", KIND_BYTES, expires, tag_bytes, meta_bytes)
            return self.store.writing.put_stream(item, stream, stream_length(value, length), expected)
        if length is not None:
            check_length(value, length)
        if expected is not None:
            return self.store.writing.put_if(self.item(key, value, expire, tag, meta), expected)
        payload: Buffer | Pieces
        if type(value) is bytes and not self.compresses:
            payload, flags = value, KIND_BYTES
        else:
            payload, flags = self._payload(key, value)
        self._check_sizes(data, tag_bytes, meta_bytes, len(payload))
        self.put(data, payload, flags, expires, tag_bytes, meta_bytes)
        return True

    def item(self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any) -> Item:
        """Everything of an entry as bytes, checked."""
        data = encode_key(key)
        payload, flags = self._payload(key, value)
        tag_bytes = b"" if tag is None else encode_tag(tag)
        meta_bytes = b"" if meta is None else encode_meta(meta)
        self._check_sizes(data, tag_bytes, meta_bytes, len(payload))
        low, high = key_digest(data, self.store.current.seed)
        return Item(low, high, data, payload, flags, self.expires(expire), tag_bytes, meta_bytes)

    def _payload(self, key: Key, value: Any) -> tuple[Buffer | Pieces, int]:
        """(payload, flags) of a value, as they cost least to be stored."""
        payload, flags = self.encode(value, self.store.limits.encodable_bytes, key)
        return payload.at_best() if type(payload) is Pieces else payload, flags

    def _check_sizes(self, key: bytes, tag: bytes, meta: bytes, length: int) -> None:
        if tag or meta:
            self._check_names(key, tag, meta)
        if length > self.store.limits.unchecked_bytes:
            self.store.budget.ensure_fits(length)

    def _check_names(self, key: bytes, tag: bytes, meta: bytes) -> None:
        size = RECORD_BYTES + len(key) + len(tag) + len(meta)
        if size > _SHORT_NAMES and size > min(MAX_HEAD_BYTES, self.store.budget.live_limit // 4):
            raise ValueTooLarge(f"key, tag and meta have {size} bytes together: keep meta small")

    def ensure_readable(self, key: Key) -> None:
        """Raises `Unreadable` if there is a value that can't be read, be that a miss or not: where something
        has to be in its place, trying again is in vain."""
        low, high, data = self.identify(key)
        found = self.store.reading.fetch(low, high, data)
        if found is not None:
            self.decode(*found, key)

    @staticmethod
    def undefaulted() -> CacheIOError:
        """Why `setdefault` could neither find a value nor store one."""
        what = "cannot store a default: what is there cannot be read, or changes all the time: try again"
        return CacheIOError(errno.EAGAIN, what)

    def modification(self, key: Key, default: Any) -> Modification:
        def item(key: Key, value: Any) -> Item:
            return self.item(key, value, None, None, None)

        return Modification(self.store, key, default, self.identify, item, self.decode)

    # -- counters -----------------------------------------------------------------------------

    def new_counter(self, key: bytes, expire: float | None, tag: Key) -> tuple[int, bytes]:
        """(expires, tag) of a counter that is made now."""
        expires = self.expires(expire)
        if tag is None:
            return expires, b""
        tag_bytes = encode_tag(tag)
        self._check_names(key, tag_bytes, b"")
        return expires, tag_bytes

    def counter_bytes(self, low: int, high: int, data: bytes, tag: bytes) -> int:
        """Bytes that a counter's new record takes at most; `tag`: that of a new one."""
        slot = self.store.finding.lookup(low, high)
        there = slot.head_bytes + min(slot.value_length, 1 << 16) if slot else 0
        return 1024 + len(data) + max(len(tag), there)

    def counted(
        self, key: Key, where: tuple[int, int, bytes], slot: Slot | None, delta: int, default: int | None,
        fresh: tuple[int, bytes],
    ) -> tuple[int, Item]:  # fmt: skip
        """(sum, entry that holds it) of a counter. The lock is held. `where`: see `identify`; `fresh`: see
        `new_counter`."""
        low, high, data = where
        value, expires, tag, meta = self._current_int(key, data, slot, default, fresh)
        payload, flags = self.encode(value + delta)
        terms = slot.flags & FLAG_TERMS if slot is not None and expires == slot.expires else 0
        return value + delta, Item(low, high, data, payload, flags | terms, expires, tag, meta)

    def _current_int(
        self, key: Key, data: bytes, slot: Slot | None, default: int | None, fresh: tuple[int, bytes]
    ) -> tuple[int, int, bytes, bytes]:
        """(value, expires, tag, meta) of a counter. The lock is held."""
        found = self.store.reading.fetch(slot.low, slot.high, data) if slot is not None else None
        names = self.store.reading.names_of(slot) if slot is not None and found is not None else None
        if slot is None or found is None or names is None:
            if default is None:
                raise KeyError(key)
            return default, *fresh, b""
        payload, flags = found
        if flags & CODEC_FLAGS != KIND_INT:
            wrong_type(f"the value of {key!r} is not an integer: incr and decr leave it as it is")
        return self.decode(payload, flags), slot.expires, names.tag, names.meta

    # -- what is read --------------------------------------------------------------------------

    def decoded(self, keys: list[Key], found: list[Any]) -> dict[Key, Any]:
        """The values of what was found of `keys`, which is None, bytes, or (payload, flags)."""
        decode = self.decode
        if self.settings.on_unreadable == "error":
            return {
                key: hit if type(hit) is bytes else decode(hit[0], hit[1], key)
                for key, hit in zip(keys, found, strict=True)
                if hit is not None
            }
        values: dict[Key, Any] = {}
        for key, hit in zip(keys, found, strict=True):
            if hit is not None:
                with contextlib.suppress(Unreadable):
                    values[key] = hit if type(hit) is bytes else decode(hit[0], hit[1], key)
        return values

    # -- what is handed out -------------------------------------------------------------------

    def entry(self, slot: Slot) -> Entry | None:
        """None if the record is damaged, or the entry was replaced or removed meanwhile."""
        names = self.store.reading.names_of_version(slot)
        return None if names is None else self.described(slot, names)

    def described(self, slot: Slot, names: Names) -> Entry | None:
        """The same of an entry whose record says that."""
        if key_digest(names.key, self.store.current.seed) != (slot.low, slot.high):
            return None
        key = decode_key(names.key)
        return Entry(
            key=key,
            tag=decode_key(names.tag) if names.tag else None,
            meta=META.loads(names.meta) if names.meta else None,
            size=slot.value_length,
            created=names.created / 1e9,
            expires=slot.expires / 1e9 if slot.expires else None,
            accessed=self.store.finding.accessed(slot),
            version=slot.stamp,
            load=lambda: self._load(slot, key),
        )

    def _load(self, slot: Slot, key: Key) -> Any:
        found = self.store.reading.fetch_version(slot)
        if found is None:
            raise EntryGone(
                "the entry expired, or was replaced or removed, before its value was read: get it again"
            )
        return self.decode(found.payload, found.flags, key)

    def get_with_meta(self, key: Key, default: Any, wait: bool = True) -> Any:
        """(value, metadata); (`default`, None) if there is none. Unless it may `wait` for a disk, None if it
        had to."""
        found = self.store.core.get_with_meta(key, time.time_ns(), wait)
        if found is NotImplemented:
            if not wait:
                return None
            found = self.store.keyed.get_with_meta(key)
        if found is None:
            return default, None
        payload, flags, meta = found
        value = self.decode(payload, flags, key) if flags else payload
        return value, META.loads(meta) if meta else None

    def set_meta(self, key: Key, meta: Any) -> bool:
        data, meta_bytes = encode_key(key), b"" if meta is None else encode_meta(meta)
        return self.store.annotating.set_meta(data, meta_bytes, self._check_names)

    def contents(self, live: Iterable[tuple[bytes, Slot]]) -> Iterator[list[Content]]:
        return contents(self.store.reading, live)

    def pair(self, content: Content, found: Found) -> tuple[Key, Any] | None:
        """(key, value) of one of `contents`; None for what can't be read, and is left out then."""
        key = decode_key(content.key)
        try:
            return key, self.decode(found.payload, found.flags, key)
        except Unreadable:
            if self.settings.on_unreadable == "error":
                raise
            return None

    # -- values other than as objects ---------------------------------------------------------

    def locate(self, key: Key, offset: int = 0, length: int | None = None) -> OwnLocation:
        """Where verified bytes of a value lie. Counted. KeyError or TypeError: see `DiskCache.location`."""
        check_range(offset, length)
        location = self._lent(key, partial(self.store.lending.location, start=offset, length=length))
        kind = location.flags & CODEC_FLAGS
        if kind not in _TEXTS:
            location.close()
            if kind == KIND_COMPRESSED:
                wrong_type(f"the value of {key!r} is compressed: read it with get(), or open() if it is text")
            _neither(key)
        if offset > location.value_length:
            location.close()
            check_start(offset, location.value_length)
        return location

    def open(self, key: Key) -> BinaryIO:
        lent: Any = self._lent(key, self.store.lending.opened)  # a LentFile, or Found
        if isinstance(lent, LentFile):
            return value_file(lent, self.store.lending.drop_damaged)
        payload, kind = self._decompressed(lent, key)
        if kind not in _TEXTS:
            _neither(key)
        return value_file(bytes(payload), self.store.lending.drop_damaged)

    def view(self, key: Key) -> Any:
        found = self._lent(key, self.store.lending.view)
        payload, kind = self._decompressed(found, key)
        if kind in _TEXTS:
            return memoryview(payload)
        if kind == KIND_ARRAY:
            memory = memoryview(payload).toreadonly()
            return self._or_miss(lambda: self.decode(memory, kind, key), key)
        wrong_type(f"the value of {key!r} is neither bytes nor str nor an array: read it with get()")

    def _decompressed(self, found: Found, key: Key) -> tuple[Buffer, int]:
        """(payload, kind) of a value; KeyError where it can't be read, and that is a miss."""
        return self._or_miss(lambda: self.codec.plain(found.payload, found.flags, key), key)

    def _or_miss(self, read: Callable[[], T], key: Key) -> T:
        try:
            return read()
        except Unreadable:
            if self.settings.on_unreadable == "error":
                raise
            raise KeyError(key) from None

    def _lent(self, key: Key, lend: Callable[[Slot], T | None]) -> T:
        """What `lend` gives of the entry of a key. Counted. KeyError if there is none."""
        store = self.store
        found = store.reading.verified(*self.identify(key), lend)
        store.counters.use(found is not None)
        if found is None:
            raise KeyError(key)
        return found


def _neither(key: Key) -> NoReturn:
    wrong_type(f"the value of {key!r} is neither bytes nor str: read it with get()")
