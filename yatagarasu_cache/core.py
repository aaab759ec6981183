"""The compiled core of `get` and `set`, where it was built; else the same in Python.

The Python code (`store.py`, `index.py`, `format.py`) is the specification: the compiled module
does what it does over the same files, for entries that are plain, and returns a status for all
others, which then take the ordinary path. So there is nothing here but the choice and the calls.
"""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING, Any

from .errors import BackendUnavailable, ConfigurationError, from_os_error
from .format import RECORD_BYTES, Slot, aligned, key_digest

if TYPE_CHECKING:
    from .backends.base import Buffer
    from .index import Index
    from .store import Found, Store

VARIABLE = "YATAGARASU_CORE"  # auto (default), c: insist on the compiled one, python: do without
ABI_VERSION = 1  # of the module that this code calls
# Longer values are read straight into their bytes: that saves a copy, and the rest counts less.
_SCRATCH_BYTES = 1 << 16
COLD: Any = object()  # from `get_nowait`: not plain, or not in memory


class PythonCore:
    """The ordinary path. `CompiledCore` overrides what it does faster."""

    name = "python"

    def __init__(self, store: Store) -> None:
        self._store = store

    def attach(self, index: Index) -> None:
        """From now on `index` is the store's."""

    def detach(self) -> None:
        """The store was closed."""

    def get(self, key: bytes) -> Found | tuple[bytes, int] | None:
        """`Store.get` of an encoded key."""
        return self._store.get(*key_digest(key, self._store.seed))

    def get_nowait(self, key: bytes) -> Found | tuple[bytes, int] | None:
        """The same without waiting for a disk; `COLD`, not counted, if that can't be."""
        store = self._store
        slot = store.lookup(*key_digest(key, store.seed))
        if slot is None:
            store.misses += 1
            return None
        return store.get_nowait(slot) or COLD

    def put(
        self, key: bytes, payload: Buffer, flags: int, expires: int = 0, tag: bytes = b"", meta: bytes = b""
    ) -> None:
        """`Store.put` of an encoded key."""
        self._store.put(*key_digest(key, self._store.seed), key, payload, flags, expires, tag, meta)


class CompiledCore(PythonCore):
    """Calls into `_core`. A call gets a view, which is of one mapping of one index."""

    name = "c"

    def __init__(self, store: Store, ffi: Any, lib: Any) -> None:
        super().__init__(store)
        self._ffi = ffi
        self._get, self._get_nowait, self._put = lib.yc_get, lib.yc_get_nowait, lib.yc_put
        self._miss, self._not_installed = lib.YC_MISS, lib.YC_NOT_INSTALLED
        self._max_names = lib.YC_MAX_NAMES
        self._unpack = ffi.unpack
        touch = {"lru": lib.YC_TOUCH_RECENT, "lfu": lib.YC_TOUCH_FREQUENT}
        self._first = touch.get(store.policy.name, lib.YC_TOUCH_NONE)
        self._touch = lib.YC_TOUCH_NONE if store.read_only else self._first
        self._index: Index | None = None
        self._closed = self._view = ffi.new("struct yc_view *")
        # One at a time is in use: by who holds `Store.appending`.
        self._record = ffi.new("struct yc_record *", {"stop_after": -1})
        self._head = self._record.head
        # Buffers that no call uses at the moment: taking one and giving it back are atomic.
        self._scratch: list[Any] = []
        if store.read_only or store.durable:
            self.put = super().put  # type: ignore[method-assign]

    def attach(self, index: Index) -> None:
        if self._index is not None:
            self._index.on_map = None
        self._index = index
        self._map()
        index.on_map = self._map

    def _map(self) -> None:
        """A view of the mapping that the index has now. Calls under way keep the view that they have."""
        index, ffi = self._index, self._ffi
        assert index is not None
        view = ffi.new("struct yc_view *")
        mapping = ffi.from_buffer(index.map)
        files = ffi.from_buffer(self._store.files.table(index.table_capacity))
        view.map, view.files = ffi.cast("void *", mapping), ffi.cast("void *", files)
        view.words = len(index.words)
        view.table_word, view.table_capacity = index.table_word, index.table_capacity
        view.seed = index.identity.seed
        view.touch, view.first = self._touch, self._first
        # The view keeps both buffers alive.
        self._view = ffi.gc(view, functools.partial(_forget, (mapping, files)))

    def detach(self) -> None:
        self._view = self._closed
        if self._index is not None:
            self._index.on_map = None

    def get(self, key: bytes) -> Found | tuple[bytes, int] | None:
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = self._ffi.new("char[]", _SCRATCH_BYTES)
        got = self._get(self._view, key, len(key), scratch, _SCRATCH_BYTES, time.time_ns())
        if got >= 0:
            data: bytes = self._unpack(scratch, got >> 8)
            self._scratch.append(scratch)
            self._store.hits += 1
            return data, got & 0xFF
        self._scratch.append(scratch)
        if got == self._miss:
            self._store.misses += 1
            return None
        return super().get(key)

    def get_nowait(self, key: bytes) -> Found | tuple[bytes, int] | None:
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = self._ffi.new("char[]", _SCRATCH_BYTES)
        got = self._get_nowait(self._view, key, len(key), scratch, _SCRATCH_BYTES, time.time_ns())
        if got >= 0:
            data: bytes = self._unpack(scratch, got >> 8)
            self._scratch.append(scratch)
            self._store.hits += 1
            return data, got & 0xFF
        self._scratch.append(scratch)
        if got == self._miss:
            self._store.misses += 1
            return None
        return super().get_nowait(key)

    def put(
        self, key: bytes, payload: Buffer, flags: int, expires: int = 0, tag: bytes = b"", meta: bytes = b""
    ) -> None:
        store, record = self._store, self._record
        length = len(payload)
        names = key + tag + meta if tag or meta else key
        if length >= store.large_bytes or len(names) > self._max_names:
            return super().put(key, payload, flags, expires, tag, meta)
        size = RECORD_BYTES + len(names) + length + 30
        data = payload if type(payload) is bytes else self._ffi.from_buffer(payload)
        slot = None
        with store.appending:
            writer = store.writer
            if writer is None or size > writer.room:
                writer = store.room(size)
            lock: Any = store.lock
            with lock.threads:
                start = writer.tail
                # Moved first: wherever this is interrupted, nobody will write here again.
                writer.tail = start + aligned(RECORD_BYTES + len(names)) + aligned(length)
                try:
                    done = self._put(
                        self._view, record, writer.fd, writer.segment, start, lock.fd, names,
                        len(key), len(tag), len(meta), data, length, flags, expires, time.time_ns(),
                    )  # fmt: skip
                    if done > 0:
                        writer.enlist(start, self._unpack(self._head, done & 0xFFFF))
                    else:
                        writer.tail = start
                except BaseException:
                    writer.unlist()
                    raise
            if done >= self._not_installed:
                slot = Slot(*record.slot)
                epoch = record.epoch
        if slot is not None:
            if not store.show(slot, epoch, size):
                store.let_go_if_lost(writer)
                super().put(key, payload, flags, expires, tag, meta)
        elif done > 0:
            store.sets += 1
            store.reclaim.pace(size)
        elif done == 0:
            super().put(key, payload, flags, expires, tag, meta)
        else:
            error = OSError(-done, os.strerror(-done))
            raise from_os_error(error, "cannot write an entry") from error


def _forget(kept: Any, view: Any) -> None:
    """The end of a view, and so of what it kept alive."""


def choose(store: Store) -> PythonCore:
    """The core of a store: the compiled one if it is there, may be used, and knows the policy."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted not in ("auto", "c", "python"):
        raise ConfigurationError(f"the environment variable {VARIABLE}={wanted!r} must be auto, c or python")
    if wanted == "python":
        return PythonCore(store)
    try:
        from ._core import ffi, lib
    except ImportError as error:
        if wanted == "c":
            raise BackendUnavailable(f"{VARIABLE}=c, but the compiled core is not there: {error}") from error
        return PythonCore(store)
    # What wraps a backend wants to see its reads and writes.
    plain = store.backend.plain and store.policy.name in ("lru", "lfu", "fifo", "none")
    if not plain or lib.yc_abi_version() != ABI_VERSION:
        return PythonCore(store)
    return CompiledCore(store, ffi, lib)
