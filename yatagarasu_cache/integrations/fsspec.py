"""A file system of fsspec that keeps blocks of another one's files, and is chained in front of it:

    fsspec.open("yatagarasu::s3://bucket/file", yatagarasu={"cache_storage": "/var/cache/blocks"})
    pandas.read_parquet("yatagarasu::https://host/file", storage_options={"yatagarasu": {...}})

What is known of a file (its version and size) is one entry of the cache, each of its blocks is another one.
So what is kept is bounded by `size_limit`, all processes share it, and a block that was evicted while a file
is open is fetched again.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from hashlib import sha256
from itertools import groupby
from shutil import rmtree
from typing import Any, ClassVar, NamedTuple

from fsspec import filesystem
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ..cache import DiskCache
from ..errors import CacheError, ClosedError
from ._handles import Use, settings_among
from ._values import log

__all__ = ["YatagarasuFileSystem"]

_TELLING = (
    "size", "mtime", "ETag", "etag", "LastModified", "last_modified", "created", "sha", "generation",
)  # fmt: skip
_WEEK = 7 * 24 * 3600
_BLOCK = 1 << 18
_AHEAD = 1 << 20  # bytes that are fetched together at least, where so many are missing
_OF_FSSPEC = frozenset({  # what file systems of fsspec take, and its own cached ones besides
    "asynchronous", "loop", "batch_size", "skip_instance_cache", "use_listings_cache", "listings_expiry_time",
    "max_paths", "fo", "cache_check", "same_names", "cache_mapper", "cache_storage_mode", "protocol",
})  # fmt: skip


class _Known(NamedTuple):
    """What is known of a file of the target."""

    version: bytes
    size: int
    until: float  # seconds since the epoch; inf: for ever


class YatagarasuFileSystem(ChainedFileSystem):
    """Blocks of the files of another file system, in a `DiskCache`.

    target_protocol, target_options, or fs: the other one. cache_storage: directory of the cache; "TMP": a
    temporary one, which ends with this object; of several the last one. expiry_time: seconds for which a file
    is believed not to have changed; 0 or None: for ever. check_files: ask for its version at each open, and
    for other blocks if it has changed. block_size: bytes of a block; who is to share blocks names the same.
    settings: those of `DiskCache`.

    Writing, and whatever else is no reading, is done by the other one.
    """

    protocol: ClassVar[str] = "yatagarasu"
    cachable = True

    def __init__(
        self, target_protocol: str | None = None, cache_storage: str | Sequence[str] = "TMP",
        expiry_time: float | None = _WEEK, check_files: bool = False,
        target_options: dict[str, Any] | None = None, fs: AbstractFileSystem | None = None,
        block_size: int = _BLOCK, **settings: Any,
    ) -> None:  # fmt: skip
        if (fs is None) == (target_protocol is None):
            raise ValueError("name either the target_protocol or the file system itself, fs")
        if type(block_size) is not int or block_size < 1:
            raise ValueError(f"block_size must be a number of bytes, at least 1, not {block_size!r}")
        super().__init__(**{name: settings[name] for name in settings if name in _OF_FSSPEC})
        self.fs = fs if fs is not None else filesystem(target_protocol, **(target_options or {}))
        own = self.fs.protocol
        self.target_protocol = target_protocol or (own if isinstance(own, str) else own[0])
        self.expiry, self.check_files, self.block_size = expiry_time, check_files, block_size
        directory = cache_storage if isinstance(cache_storage, str) else list(cache_storage)[-1]
        self._use = Use(_temporary(self) if directory == "TMP" else directory,
                        settings_among(settings, "fsspec", _OF_FSSPEC))  # fmt: skip
        self.cache_storage = self._use.directory
        self._target = _identity(self.target_protocol, self.fs)
        object.__setattr__(self, "_strip_protocol", self._stripped)  # which depends on the target

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        return self._use.cache

    def _stripped(self, path: Any) -> Any:
        return self.fs._strip_protocol(type(self)._strip_protocol(path))

    # -- what is known, and kept --------------------------------------------------------------

    def _file_key(self, path: str) -> tuple[Any, ...]:
        return "fsspec", self._target, path

    def _known(self, path: str) -> _Known:
        """Of a file; FileNotFoundError if there is none."""
        found = self._stored(path)
        if found is not None and not self.check_files:
            return found
        info = self.fs.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(path)
        version = _version(self.fs.ukey(path), info)
        if found is not None and found[:2] == (version, info.get("size")):
            return found
        size = info.get("size")
        if size is None:
            return _Known(version, -1, 0)
        until = time.time() + self.expiry if self.expiry else float("inf")
        known = _Known(version, size, until)
        self._keep({self._file_key(path): list(known)}, until)
        return known

    def _stored(self, path: str) -> _Known | None:
        found = self._look_up([self._file_key(path)])
        try:
            known = _Known(*found[self._file_key(path)])
        except (KeyError, TypeError):
            return None
        return known if known.until > time.time() else None

    def _look_up(self, keys: list[Any]) -> dict[Any, Any]:
        """A cache that fails is no reason for a read to fail."""
        try:
            return self.cache.get_many(keys)
        except ClosedError:
            raise
        except CacheError as error:
            log.warning("fsspec: not read from the cache: %s", error)
            return {}

    def _keep(self, entries: dict[Any, Any], until: float) -> None:
        seconds = until - time.time()
        if seconds <= 0:
            return
        try:
            self.cache.set_many(entries, expire=seconds)
        except ClosedError:
            raise
        except CacheError as error:
            log.warning("fsspec: not kept in the cache: %s", error)

    def _read(
        self, path: str, known: _Known, start: int, end: int, held: dict[int, bytes] | None = None
    ) -> bytes:
        """Bytes of a file, of the blocks that are there and those that are fetched. `held`: those that the
        caller has in memory; the last two take their place."""
        end = min(end, known.size)
        if start >= end:
            return b""
        block, held = self.block_size, {} if held is None else held
        numbers = range(start // block, (end - 1) // block + 1)
        blocks = {n: held[n] for n in numbers if n in held}
        if len(blocks) < len(numbers):
            blocks.update(self._blocks(path, known, [n for n in numbers if n not in blocks]))
        held.clear()
        held.update((n, blocks[n]) for n in numbers[-2:])
        first = numbers[0] * block
        whole = blocks[numbers[0]] if len(numbers) == 1 else b"".join(blocks[n] for n in numbers)
        return whole[start - first : end - first]

    def _blocks(self, path: str, known: _Known, numbers: list[int]) -> dict[int, bytes]:
        keys = {n: self._block_key(path, known, n) for n in numbers}
        found = self._look_up(list(keys.values()))
        blocks = {n: found[key] for n, key in keys.items() if self._is_block(found.get(key), known, n)}
        missing = [n for n in numbers if n not in blocks]
        if missing:
            fetched = self._fetch(path, known, self._and_more(missing, known))
            self._keep({self._block_key(path, known, n): data for n, data in fetched.items()}, known.until)
            blocks.update(fetched)
        return blocks

    def _and_more(self, missing: list[int], known: _Known) -> list[int]:
        """Those and some that follow: for a file that is read from its beginning, a request for each block
        would take long."""
        most = min(missing[0] + _AHEAD // self.block_size, -(-known.size // self.block_size))
        return missing + list(range(missing[-1] + 1, most))

    def _block_key(self, path: str, known: _Known, number: int) -> tuple[Any, ...]:
        return "fsspec block", self._target, path, known.version, self.block_size, number

    def _length(self, known: _Known, number: int) -> int:
        return min(self.block_size, known.size - number * self.block_size)

    def _is_block(self, data: Any, known: _Known, number: int) -> bool:
        return type(data) is bytes and len(data) == self._length(known, number)

    def _fetch(self, path: str, known: _Known, numbers: list[int]) -> dict[int, bytes]:
        """Blocks of the other file system's; those that follow each other in one request."""
        block, starts, ends, runs = self.block_size, [], [], []
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            together = [number for _, number in run]
            runs.append(together)
            starts.append(together[0] * block)
            ends.append(min((together[-1] + 1) * block, known.size))
        parts = self.fs.cat_ranges([path] * len(runs), starts, ends, on_error="raise")
        fetched: dict[int, bytes] = {}
        for together, data, start, end in zip(runs, parts, starts, ends, strict=True):
            if len(data) != end - start:
                self.pop_from_cache(path)
                raise OSError(f"{path} has changed while it was read: open it anew")
            for number in together:
                at = number * block - start
                fetched[number] = bytes(data[at : at + block])
        return fetched

    # -- reading ------------------------------------------------------------------------------

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, autocommit: bool = True,
        cache_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        path = self._strip_protocol(path)
        options = {"autocommit": autocommit, "cache_options": cache_options, **kwargs}
        if mode != "rb":
            self.pop_from_cache(path)
            return self.fs._open(path, mode=mode, block_size=block_size, **options)
        known = self._known(path)
        if known.size < 0:  # the other one cannot tell, and so it has no ranges
            return self.fs._open(path, mode=mode, block_size=block_size, **options)
        return _File(self, path, known, block_size or self.block_size, cache_options, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes of a file, or of a part of it; negative numbers count from its end."""
        path = self._strip_protocol(path)
        known = self._known(path)
        if known.size < 0:
            data: bytes = self.fs.cat_file(path, start, end, **kwargs)
            return data
        first, last, _ = slice(start, end).indices(known.size)
        return self._read(path, known, first, last)

    # -- the cache ----------------------------------------------------------------------------

    def cache_size(self) -> int:
        """Bytes that are kept."""
        return self.cache.volume()

    def clear_cache(self) -> None:
        """Remove everything that is kept."""
        self.cache.clear()

    def clear_expired_cache(self, expiry_time: float | None = None) -> None:
        """Remove what has expired."""
        self.cache.expire()

    def pop_from_cache(self, path: str, recursive: bool = False) -> None:
        """Forget what is known of a file: the next who opens it asks for its version. recursive: and of all
        that are below it."""
        path = self._strip_protocol(path)
        self.cache.delete(self._file_key(path))
        if recursive:
            below = path.rstrip("/") + "/"
            for entry in list(self.cache.entries(prefix=("fsspec", self._target))):
                if str(entry.key[2]).startswith(below):  # type: ignore[index]
                    self.cache.delete(entry.key)


class _File(AbstractBufferedFile):
    """A file that is read by blocks."""

    def __init__(
        self, fs: YatagarasuFileSystem, path: str, known: _Known, block_size: int,
        cache_options: dict[str, Any] | None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self._known = known
        self._held: dict[int, bytes] = {}  # the blocks that were read last: lines are shorter
        kwargs.pop("size", None)  # which whoever unpickles a file names
        kwargs.setdefault("cache_type", "none")
        super().__init__(
            fs, path, "rb", block_size, cache_options=cache_options, size=known.size, **kwargs
        )

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs._read(self.path, self._known, start, end, self._held)  # type: ignore[no-any-return]


def _of_target(name: str) -> Callable[..., Any]:
    """The other file system's method."""

    @wraps(getattr(AbstractFileSystem, name))
    def method(self: YatagarasuFileSystem, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.fs, name)(*map(partial(_plain, self), args), **kwargs)

    return method


def _changing(name: str, paths: slice) -> Callable[..., Any]:
    """A method of the other file system's, after which it is forgotten what is known of the files at those
    places of its arguments."""

    @wraps(getattr(AbstractFileSystem, name))
    def method(self: YatagarasuFileSystem, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.fs, name)(*map(partial(_plain, self), args), **kwargs)
        finally:
            for given in (*args[paths], kwargs.get("path"), kwargs.get("rpath")):
                for path in [given] if isinstance(given, str) else given or ():
                    self.pop_from_cache(path, recursive=True)

    return method


def _plain(self: YatagarasuFileSystem, argument: Any) -> Any:
    """A path without this file system's own protocol."""
    if isinstance(argument, str) and argument.startswith(f"{self.protocol}://"):
        return self._strip_protocol(argument)
    return argument


_OF_TARGET = (
    "ls", "info", "exists", "isdir", "isfile", "find", "glob", "walk", "du", "size", "sizes", "ukey",
    "checksum", "created", "modified", "sign", "mkdir", "makedirs", "rmdir", "invalidate_cache",
    "expand_path",
)  # fmt: skip
_CHANGING = {  # and where among their arguments the paths stand that they change
    **dict.fromkeys(("rm", "rm_file", "pipe", "pipe_file", "touch"), slice(0, 1)),
    **dict.fromkeys(("put", "put_file", "copy", "cp_file"), slice(1, 2)),
    "mv": slice(0, 2),
}
for _name in _OF_TARGET:
    setattr(YatagarasuFileSystem, _name, _of_target(_name))
for _name, _paths in _CHANGING.items():
    setattr(YatagarasuFileSystem, _name, _changing(_name, _paths))


def _temporary(owner: object) -> str:
    path = tempfile.mkdtemp(prefix="yatagarasu-fsspec-")
    weakref.finalize(owner, rmtree, path, ignore_errors=True)
    return path


def _identity(protocol: str, fs: AbstractFileSystem) -> bytes:
    """What tells targets apart: another endpoint, or another user, may have other files of the same names."""
    options = {name: value for name, value in fs.storage_options.items() if name not in _OF_FSSPEC}
    return sha256(repr((protocol, fs.storage_args, sorted(options.items()))).encode()).digest()


def _version(ukey: Any, info: dict[str, Any]) -> bytes:
    """Of a file. Some file systems have a `ukey` that only names it: so it is what they say of it besides."""
    return sha256(repr((ukey, [info.get(name) for name in _TELLING])).encode()).digest()
