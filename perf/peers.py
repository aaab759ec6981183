"""Who is measured: one small interface over this cache and those it is compared with.

A peer is opened in a directory, with or without durability, and does `get`, `set`, `delete`,
`get_many`, `set_many`; `asynchronous` gives the same `get` and `set` for asyncio. Keys have the
same bytes everywhere: `str` where a peer takes that, else `bytes`. Values are bytes.
"""

from __future__ import annotations

import abc
import asyncio
import importlib
import os
import tempfile
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, ClassVar

ROOM = 16 << 30  # bytes that any of them may use: nothing is evicted while it is measured
THREADS = 16  # of the pool through which peers without asyncio are awaited
BATCH = 1000  # entries a batch when a peer is filled


class Peer(abc.ABC):
    """One open cache or store. Calls on the path that is timed are bound in `__init__`."""

    name: ClassVar[str]
    package: ClassVar[str] = ""  # what it has to be installed as
    lacks: ClassVar[str]  # of what this cache does
    processes: ClassVar[bool] = True  # several may have it open
    files: ClassVar[str] = ""  # those of the same name can use each other's directory

    get: Callable[[Any], bytes | None]
    set: Callable[[Any, bytes], Any]
    delete: Callable[[Any], Any]

    @abc.abstractmethod
    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        """`size` is that of the values to come, for those that have to be told."""

    @staticmethod
    def key(number: int) -> Any:
        return f"key-{number}"

    def get_many(self, keys: Sequence[Any]) -> Any:
        get = self.get
        return [get(key) for key in keys]

    def set_many(self, pairs: Sequence[tuple[Any, bytes]]) -> Any:
        put = self.set
        for key, value in pairs:
            put(key, value)

    def fill(self, count: int, value: bytes) -> None:
        batch = max(1, min(BATCH, (64 << 20) // len(value)))
        for start in range(0, count, batch):
            self.set_many([(self.key(i), value) for i in range(start, min(start + batch, count))])

    @abc.abstractmethod
    def close(self) -> None: ...

    @classmethod
    @asynccontextmanager
    async def asynchronous(cls, directory: str) -> AsyncIterator[Any]:
        """An object with awaitable `get(key)` and `set(key, value)`."""
        peer = cls(directory)
        with ThreadPoolExecutor(THREADS) as pool:
            yield _InThreads(peer, pool)
        peer.close()

    @classmethod
    def missing(cls) -> str:
        """Why it can't be measured here; empty if it can."""
        try:
            importlib.import_module(cls.package)
        except ImportError as error:
            return str(error)
        return ""


class _InThreads:
    def __init__(self, peer: Peer, pool: ThreadPoolExecutor) -> None:
        self._peer, self._pool, self._loop = peer, pool, asyncio.get_running_loop()

    def get(self, key: Any) -> asyncio.Future[Any]:
        return self._loop.run_in_executor(self._pool, self._peer.get, key)

    def set(self, key: Any, value: bytes) -> asyncio.Future[Any]:
        return self._loop.run_in_executor(self._pool, self._peer.set, key, value)


class Ours(Peer):
    package = "yatagarasu_cache"
    lacks = "nothing: checksum of every value, TTL, LRU, counters, several processes"
    files = "ours"
    backend: ClassVar[str]

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        from yatagarasu_cache import DiskCache

        durability = "sync" if durable else "none"
        self.cache = cache = DiskCache(
            directory, backend=self.backend, size_limit=ROOM, durability=durability
        )
        self.get, self.set, self.delete, self.close = cache.get, cache.set, cache.delete, cache.close  # type: ignore[method-assign]
        self.get_many, self.set_many = cache.get_many, cache.set_many  # type: ignore[assignment,method-assign]

    def close(self) -> None: ...

    @classmethod
    @asynccontextmanager
    async def asynchronous(cls, directory: str) -> AsyncIterator[Any]:
        from yatagarasu_cache import AsyncDiskCache

        async with AsyncDiskCache(directory, backend=cls.backend, size_limit=ROOM) as cache:
            yield cache

    @classmethod
    def missing(cls) -> str:
        from yatagarasu_cache import CacheError

        with tempfile.TemporaryDirectory() as directory:
            try:
                cls(directory).close()
            except CacheError as error:
                return str(error)
        return ""


class OursThreads(Ours):
    name, backend = "ours-threads", "threads"


class OursUring(Ours):
    name, backend = "ours-uring", "uring"


class Diskcache(Peer):
    name = package = "diskcache"
    lacks = "no checksum; a get does not count as a use (its default order is by age)"
    module = "diskcache"

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        options = {"sqlite_synchronous": 2} if durable else {}
        self.cache = cache = importlib.import_module(self.module).Cache(directory, size_limit=ROOM, **options)
        self.get, self.set, self.delete = cache.get, cache.set, cache.delete

    def get_many(self, keys: Sequence[Any]) -> Any:
        with self.cache.transact():
            return super().get_many(keys)

    def set_many(self, pairs: Sequence[tuple[Any, bytes]]) -> Any:
        with self.cache.transact():
            super().set_many(pairs)

    def close(self) -> None:
        self.cache.close()


class DiskcacheCommunity(Diskcache):
    name = "diskcache-community"
    package = module = "diskcache_community"


class Lmdb(Peer):
    name = package = "lmdb"
    lacks = "no checksum, TTL, eviction or size bound other than an error; one writer at a time"

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        import lmdb

        # Read-ahead makes cold random reads of a few pages slower, those of long values much faster.
        self.env = lmdb.open(
            directory, map_size=ROOM, sync=durable, metasync=durable, readahead=size > 65536, max_readers=512
        )
        begin = self.env.begin

        def get(key: bytes) -> bytes | None:
            with begin() as txn:
                found: bytes | None = txn.get(key)
                return found

        def put(key: bytes, value: bytes) -> None:
            with begin(write=True) as txn:
                txn.put(key, value)

        def delete(key: bytes) -> None:
            with begin(write=True) as txn:
                txn.delete(key)

        self.get, self.set, self.delete = get, put, delete

    @staticmethod
    def key(number: int) -> Any:
        return b"key-%d" % number

    def get_many(self, keys: Sequence[Any]) -> Any:
        with self.env.begin() as txn, txn.cursor() as cursor:
            return cursor.getmulti(keys)

    def set_many(self, pairs: Sequence[tuple[Any, bytes]]) -> Any:
        with self.env.begin(write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti(pairs)

    def close(self) -> None:
        self.env.sync(True)
        self.env.close()


class Rocksdict(Peer):
    name = package = "rocksdict"
    lacks = "no TTL, eviction or bound; checksums of blocks; one process only"
    processes = False

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        import rocksdict

        self.module = rocksdict
        self.db = db = rocksdict.Rdict(directory, rocksdict.Options(raw_mode=True))
        if durable:
            options = rocksdict.WriteOptions()
            options.sync = True
            db.set_write_options(options)
        self.get, self.set, self.delete = db.get, db.put, db.delete

    key = staticmethod(Lmdb.key)

    def get_many(self, keys: Sequence[Any]) -> Any:
        return self.db.get(list(keys))

    def set_many(self, pairs: Sequence[tuple[Any, bytes]]) -> Any:
        batch = self.module.WriteBatch(raw_mode=True)
        for key, value in pairs:
            batch.put(key, value)
        self.db.write(batch)

    def close(self) -> None:
        self.db.flush()
        self.db.close()


class Files(Peer):
    """A file for each entry: written aside, renamed into place."""

    name = "files"
    package = "os"
    lacks = "no checksum, TTL, eviction, bound or index: open, read, close"

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        self.directory, self.durable = directory, durable
        for part in range(256):
            os.makedirs(f"{directory}/{part:02x}", exist_ok=True)
        self.get, self.set, self.delete = self._get, self._set, self._delete
        self._prefix = f"{directory}/{os.getpid()}-"

    def _path(self, key: str) -> str:
        return f"{self.directory}/{zlib.crc32(key.encode()) & 255:02x}/{key}"

    def _get(self, key: str) -> bytes | None:
        try:
            fd = os.open(self._path(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def _set(self, key: str, value: bytes) -> None:
        path, temporary = self._path(key), f"{self._prefix}{threading.get_ident()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, value)
            if self.durable:
                os.fdatasync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        if self.durable:
            fd = os.open(os.path.dirname(path), os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def _delete(self, key: str) -> None:
        os.unlink(self._path(key))

    def close(self) -> None:
        pass


class _Raw(Peer):
    """Reads of 4 KiB from one file, through asyncio: no keys, no index, nothing but the reads."""

    lacks = "everything: reads at given places of one file"
    files = "raw"
    SIZE = 4096

    def __init__(self, directory: str, durable: bool = False, size: int = 4096) -> None:
        os.makedirs(directory, exist_ok=True)
        self.path = os.path.join(directory, "raw")
        if not os.path.exists(self.path):
            open(self.path, "wb").close()

    @staticmethod
    def key(number: int) -> Any:
        return number * _Raw.SIZE

    def fill(self, count: int, value: bytes) -> None:
        with open(self.path, "wb") as file:
            for _ in range(count):
                file.write(value)

    def close(self) -> None:
        pass


class Caio(_Raw):
    name = package = "caio"

    @classmethod
    @asynccontextmanager
    async def asynchronous(cls, directory: str) -> AsyncIterator[Any]:
        import caio

        class Reader:
            def get(self, offset: int) -> Any:
                return context.read(cls.SIZE, fd, offset)

        fd = os.open(f"{directory}/raw", os.O_RDONLY)
        try:
            async with caio.AsyncioContext(max_requests=1024) as context:
                yield Reader()
        finally:
            os.close(fd)


class Aiofile(_Raw):
    name = package = "aiofile"

    @classmethod
    @asynccontextmanager
    async def asynchronous(cls, directory: str) -> AsyncIterator[Any]:
        import aiofile

        class Reader:
            def get(self, offset: int) -> Any:
                return file.read_bytes(cls.SIZE, offset)

        async with aiofile.AIOFile(f"{directory}/raw", "rb") as file:
            yield Reader()


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (OursThreads, OursUring, Diskcache, DiskcacheCommunity, Lmdb, Rocksdict, Files, Caio, Aiofile)
}
OURS = ("ours-threads", "ours-uring")
RAW = ("caio", "aiofile")
CACHES = tuple(name for name in PEERS if name not in RAW)


def usable(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Those of `names` that run here, and why the others don't."""
    reasons = {name: PEERS[name].missing() for name in names}
    return [name for name, reason in reasons.items() if not reason], {k: v for k, v in reasons.items() if v}
