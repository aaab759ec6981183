"""What stands between a face of the cache (`DiskCache`, `AsyncDiskCache`) and the engine in `store/`.

Keys and values here, digests and bytes there. Importing this loads the engine.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

from . import config
from .arguments import (
    META,
    check_fix,
    check_int,
    distinct,
    encode_meta,
    encode_tag,
    expiry,
    pairs,
    wrong_type,
)
from .backends.base import Buffer
from .codec import KIND_BYTES, KIND_INT, KIND_STR, Key, ValueCodec, decode_key, encode_key, encode_prefix
from .config import Settings
from .entry import Entry, OwnLocation, ValueReader
from .errors import ClosedError, EntryGone, ReadOnlyError, ValueTooLarge
from .guard import callers
from .stats import CacheStats, collect
from .store import sharing
from .store.check import Problem
from .store.current import ATTEMPTS
from .store.format import CODEC_FLAGS, MAX_HEAD_BYTES, RECORD_BYTES, Slot, key_digest
from .store.item import Item
from .store.large import CHUNK_BYTES
from .store.store import Store
from .streams import as_stream, check_length, stream_length

__all__ = ["Desk"]

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


def _never_plain(key: Key, value: bytes) -> bool:
    """`KeyedAccess.set` where entries expire by default."""
    return False


class Desk:
    """One handle's share in an open store, with the settings and the codec of the handle.

    `get`, `set`, `put` and `delete` are the engine's own methods, to save calls; `encode` and `decode` are
    the codec's. The share ends with `close`, or when this is collected.

    It also is a path, its directory's, so that a `DiskCache` can be opened on it.
    """

    __slots__ = (
        "__weakref__", "decode", "delete", "encode", "get", "lease", "put", "set", "settings", "store",
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

    def __init__(self, settings: Settings, unpickled: bool = False) -> None:
        """Open the cache, or share one that this process has open. `unpickled`: see `sharing`."""
        self.settings = settings
        codec = ValueCodec(settings.serializer)  # type: ignore[arg-type]
        self.encode, self.decode = codec.encode, codec.decode
        self.lease = lease = sharing.acquire(self, settings, unpickled)
        store: Store = lease.store
        self.store = store
        keyed = store.keyed
        self.get, self.put, self.delete = store.core.get, keyed.put, keyed.delete
        self.set = keyed.set if settings.default_expire is None else _never_plain

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
        return collect(self.store, self.lease.shared.reason, sharing.counters(self.lease))

    def check(self, fix: bool, drop_unreadable: bool) -> list[Problem]:
        check_fix(fix, drop_unreadable)
        if fix and self.settings.read_only:
            raise ReadOnlyError("fix=True needs a cache opened without read_only=True")
        self.store.life.ensure_open()
        return self.store.checker.check(fix, drop_unreadable)

    # -- what is to be stored -----------------------------------------------------------------

    def identify(self, key: Key) -> tuple[int, int, bytes]:
        """(low, high, bytes) of a key: its digest, and what is stored of it."""
        data = encode_key(key)
        return *key_digest(data, self.store.current.seed), data

    def expires(self, expire: float | None) -> int:
        """Nanoseconds since the epoch; 0 for never."""
        return expiry(expire, self.settings.default_expire)

    def store_value(
        self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any, length: int | None
    ) -> bool:
        """`DiskCache.set` of values that the engine's `set` does not take."""
        data = encode_key(key)
        expires = expiry(expire, self.settings.default_expire)
        tag_bytes = b"" if tag is None else encode_tag(tag)
        meta_bytes = b"" if meta is None else encode_meta(meta)
        if type(value) not in _PLAIN and (stream := as_stream(value, length)) is not None:
            self._check_names(data, tag_bytes, meta_bytes)
            digest = key_digest(data, self.store.current.seed)
            item = Item(*digest, data, b"", KIND_BYTES, expires, tag_bytes, meta_bytes)
            return self.store.writing.put_stream(item, stream, stream_length(value, length))
        if length is not None:
            check_length(value, length)
        payload: Buffer
        if type(value) is bytes:
            payload, flags = value, KIND_BYTES
        else:
            payload, flags = self.encode(value, self.store.limits.encodable_bytes, key)
        self._check_sizes(data, tag_bytes, meta_bytes, len(payload))
        self.put(data, payload, flags, expires, tag_bytes, meta_bytes)
        return True

    def item(self, key: Key, value: Any, expire: float | None, tag: Key, meta: Any) -> Item:
        """Everything of an entry as bytes, checked."""
        data = encode_key(key)
        payload, flags = self.encode(value, self.store.limits.encodable_bytes, key)
        tag_bytes = b"" if tag is None else encode_tag(tag)
        meta_bytes = b"" if meta is None else encode_meta(meta)
        self._check_sizes(data, tag_bytes, meta_bytes, len(payload))
        low, high = key_digest(data, self.store.current.seed)
        return Item(low, high, data, payload, flags, self.expires(expire), tag_bytes, meta_bytes)

    def _check_sizes(self, key: bytes, tag: bytes, meta: bytes, length: int) -> None:
        if tag or meta:
            self._check_names(key, tag, meta)
        if length > self.store.limits.unchecked_bytes:
            self.store.budget.ensure_fits(length)

    def _check_names(self, key: bytes, tag: bytes, meta: bytes) -> None:
        size = RECORD_BYTES + len(key) + len(tag) + len(meta)
        if size > min(MAX_HEAD_BYTES, self.store.budget.live_limit // 4):
            raise ValueTooLarge(f"key, tag and meta have {size} bytes together: keep meta small")

    # -- counters -----------------------------------------------------------------------------

    def counter_bytes(self, low: int, high: int, data: bytes) -> int:
        """Bytes that a counter's new record takes at most."""
        slot = self.store.finding.lookup(low, high)
        return 1024 + len(data) + (slot.head_bytes + min(slot.value_length, 1 << 16) if slot else 0)

    def counted(
        self, key: Key, where: tuple[int, int, bytes], slot: Slot | None, delta: int, default: int | None
    ) -> tuple[int, Item]:
        """(sum, entry that holds it) of a counter. The lock is held. `where`: see `identify`."""
        low, high, data = where
        value, expires, tag, meta = self._current_int(key, data, slot, default)
        payload, flags = self.encode(value + delta)
        return value + delta, Item(low, high, data, payload, flags, expires, tag, meta)

    def _current_int(
        self, key: Key, data: bytes, slot: Slot | None, default: int | None
    ) -> tuple[int, int, bytes, bytes]:
        """(value, expires, tag, meta) of a counter. The lock is held."""
        found = self.store.reading.fetch(slot.low, slot.high, data) if slot is not None else None
        names = self.store.reading.names_of(slot) if slot is not None and found is not None else None
        if slot is None or found is None or names is None:
            if default is None:
                raise KeyError(key)
            return default, self.expires(None), b"", b""
        payload, flags = found
        if flags & CODEC_FLAGS != KIND_INT:
            wrong_type(f"the value of {key!r} is not an integer: incr and decr leave it as it is")
        return self.decode(payload, flags), slot.expires, names.tag, names.meta

    # -- what is handed out -------------------------------------------------------------------

    def entry(self, slot: Slot) -> Entry | None:
        """None if the record is damaged, or was moved meanwhile."""
        names = self.store.reading.names_of(slot)
        if names is None or key_digest(names.key, self.store.current.seed) != (slot.low, slot.high):
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
            load=lambda: self._load(slot, key),
        )

    def _load(self, slot: Slot, key: Key) -> Any:
        found = self.store.reading.fetch_version(slot)
        if found is None:
            raise EntryGone(
                "the entry expired, or was replaced or removed, before its value was read: get it again"
            )
        return self.decode(found.payload, found.flags, key)

    def locate(self, key: Key) -> OwnLocation:
        """Where the verified bytes of a value lie. Counted. KeyError or TypeError: see `DiskCache.open`."""
        store = self.store
        low, high, data = self.identify(key)
        location = store.reading.verified(low, high, data, store.reading.locate)
        if location is None:
            store.counters.use(False)
            raise KeyError(key)
        if location.flags & CODEC_FLAGS not in (KIND_BYTES, KIND_STR):
            location.close()
            wrong_type(f"the value of {key!r} is neither bytes nor str: read it with get()")
        store.counters.use(True)
        return location

    def open(self, key: Key) -> BinaryIO:
        location = self.locate(key)
        return io.BufferedReader(ValueReader(self.store.backend, location), CHUNK_BYTES // 4)
