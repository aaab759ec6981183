"""The compiled core of `get` and `set`, where it was built; else the same in Python.

The Python code (`store.py`, `index.py`, `format.py`) is the specification: the compiled module
does what it does over the same files, for entries that are plain, and answers `NotImplemented`
for all others, which then take the ordinary path. So here is nothing but the choice and the calls.
"""

from __future__ import annotations

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
    """`get` and `put` by the compiled module."""

    name = "c"

    def __init__(self, store: Store, module: Any) -> None:
        super().__init__(store)
        self._core = core = module.Core()
        self._get, self._get_nowait, self._put = core.get, core.get_nowait, core.put
        touches = {"lru": module.TOUCH_RECENT, "lfu": module.TOUCH_FREQUENT}
        self._touch = touches.get(store.policy.name, module.TOUCH_NONE)
        self._index: Index | None = None
        if store.read_only or store.durable:  # a sync costs so much that the rest does not count
            self.put = super().put  # type: ignore[method-assign]

    def attach(self, index: Index) -> None:
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
                self._store.files.table(index.table_capacity), index.writable, self._touch, self._touch,
            )  # fmt: skip

    def _forget_index(self) -> None:
        if self._index is not None:
            self._index.on_map = self._index = None

    def detach(self) -> None:
        self._forget_index()
        self._core.detach()

    def get(self, key: bytes) -> Found | tuple[bytes, int] | None:
        found: Any = self._get(key, time.time_ns())
        if found is None:
            self._store.misses += 1
        elif found is NotImplemented:
            return super().get(key)
        else:
            self._store.hits += 1
        return found  # type: ignore[no-any-return]

    def get_nowait(self, key: bytes) -> Found | tuple[bytes, int] | None:
        found: Any = self._get_nowait(key, time.time_ns())
        if found is None:
            self._store.misses += 1
        elif found is NotImplemented:
            return super().get_nowait(key)
        else:
            self._store.hits += 1
        return found  # type: ignore[no-any-return]

    def put(
        self, key: bytes, payload: Buffer, flags: int, expires: int = 0, tag: bytes = b"", meta: bytes = b""
    ) -> None:
        store = self._store
        length = len(payload)
        if length >= store.large_bytes or type(payload) is not bytes:
            return super().put(key, payload, flags, expires, tag, meta)
        names = len(key) + len(tag) + len(meta)
        size = RECORD_BYTES + names + length + 30
        lock: Any = store.lock
        with store.appending:
            writer = store.writer
            if writer is None or size > writer.room:
                writer = store.room(size)
            start = writer.tail
            # Moved first: wherever this is interrupted, nobody will write here again.
            writer.tail = start + (RECORD_BYTES + names + 15 & ~15) + (length + 15 & ~15)
            try:
                with lock.threads:
                    done: Any = self._put(
                        writer.fd, writer.segment, start, lock.fd, key, tag, meta, payload, flags, expires,
                        time.time_ns(),
                    )  # fmt: skip
                if done is NotImplemented:
                    writer.tail = start
                else:
                    writer.enlist(start, done if type(done) is bytes else done[0])
            except OSError as error:
                writer.tail = start
                writer.cut()
                raise from_os_error(error, "cannot write an entry") from error
            except BaseException:
                writer.unlist()
                raise
        if type(done) is bytes:
            store.sets += 1
            store.reclaim.pace(size)
        elif done is NotImplemented or not self._show(done, size):
            store.let_go_if_lost(writer)
            super().put(key, payload, flags, expires, tag, meta)

    def _show(self, appended: tuple[bytes, tuple[int, ...], int], size: int) -> bool:
        _, slot, epoch = appended
        return self._store.show(Slot._make(slot), epoch, size)


def choose(store: Store) -> PythonCore:
    """The core of a store: the compiled one if it is there, may be used, and knows the policy."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted not in ("auto", "c", "python"):
        raise ConfigurationError(f"the environment variable {VARIABLE}={wanted!r} must be auto, c or python")
    if wanted == "python":
        return PythonCore(store)
    try:
        from . import _core

        if _core.ABI_VERSION != ABI_VERSION:
            raise ImportError("it was built from other sources: build it anew")
    except ImportError as error:
        if wanted == "c":
            raise BackendUnavailable(f"{VARIABLE}=c, but the compiled core is not there: {error}") from error
        return PythonCore(store)
    # What wraps a backend wants to see its reads and writes.
    plain = store.backend.plain and store.policy.name in ("lru", "lfu", "fifo", "none")
    return CompiledCore(store, _core) if plain else PythonCore(store)
