"""`FanoutCache`: a `Cache` that never raises `Timeout`, and holds others by name."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from .core import ENOVAL, METADATA, Cache, Disk, Timeout
from .persistent import Deque, Index

__all__ = ["FanoutCache"]


class FanoutCache:
    """A cache for many who store at once.

    diskcache spreads the entries over so many `shards`, each a database with a lock of its own. Here all are
    in one store, where writers hardly wait for each other: the argument is taken, and has no effect.

    What would raise `Timeout` fails instead: `set` returns False, `get` the default, and so on.
    """

    def __init__(
        self, directory: str | bytes | os.PathLike[str] | None = None, shards: int = 8,
        timeout: float = 0.010, disk: type[Disk] = Disk, **settings: Any,
    ) -> None:  # fmt: skip
        if shards < 1:
            raise ValueError(f"shards must be 1 or more, not {shards!r}")
        if directory is None:
            directory = tempfile.mkdtemp(prefix="diskcache-")
        self._count = shards
        self._directory = os.path.expandvars(os.path.expanduser(os.fsdecode(directory)))
        self._shards = (Cache(directory, timeout, disk, **settings),)
        self._caches: dict[str, Cache] = {}
        self._deques: dict[str, Deque] = {}
        self._indexes: dict[str, Index] = {}

    @property
    def directory(self) -> str:
        """Where the cache is."""
        return self._directory

    def __getattr__(self, name: str) -> Any:
        if name == "_shards":  # of an object that is being made
            raise AttributeError(name)
        if name == "size_limit":
            return self._shards[0].size_limit // self._count
        there = vars(self._shards[0]).keys() - METADATA.keys()
        if name in ("timeout", "disk") or name in there and not name.startswith("_"):
            return getattr(self._shards[0], name)
        raise AttributeError(f"cannot access {name} in cache shard")

    def transact(self, retry: bool = True) -> AbstractContextManager[None]:
        """Nobody else changes the cache in this block. `retry` must be True."""
        assert retry, "retry must be True in FanoutCache"
        return self._shards[0].transact(retry=True)

    def set(
        self, key: Any, value: Any, expire: float | None = None, read: bool = False, tag: Any = None,
        retry: bool = False,
    ) -> bool:  # fmt: skip
        """As `Cache.set`; False on a timeout."""
        return self._or(False, self._shards[0].set, key, value, expire, read, tag, retry)  # type: ignore[no-any-return]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._shards[0][key] = value

    def touch(self, key: Any, expire: float | None = None, retry: bool = False) -> bool:
        """As `Cache.touch`; False on a timeout."""
        return self._or(False, self._shards[0].touch, key, expire, retry)  # type: ignore[no-any-return]

    def add(
        self, key: Any, value: Any, expire: float | None = None, read: bool = False, tag: Any = None,
        retry: bool = False,
    ) -> bool:  # fmt: skip
        """As `Cache.add`; False on a timeout."""
        return self._or(False, self._shards[0].add, key, value, expire, read, tag, retry)  # type: ignore[no-any-return]

    def incr(self, key: Any, delta: int = 1, default: int | None = 0, retry: bool = False) -> int | None:
        """As `Cache.incr`; None on a timeout."""
        return self._or(None, self._shards[0].incr, key, delta, default, retry)  # type: ignore[no-any-return]

    def decr(self, key: Any, delta: int = 1, default: int | None = 0, retry: bool = False) -> int | None:
        """As `Cache.decr`; None on a timeout."""
        return self._or(None, self._shards[0].decr, key, delta, default, retry)  # type: ignore[no-any-return]

    def get(
        self, key: Any, default: Any = None, read: bool = False, expire_time: bool = False, tag: bool = False,
        retry: bool = False,
    ) -> Any:  # fmt: skip
        """As `Cache.get`; `default` on a timeout."""
        return self._or(default, self._shards[0].get, key, default, read, expire_time, tag, retry)

    def __getitem__(self, key: Any) -> Any:
        return self._shards[0][key]

    def read(self, key: Any) -> Any:
        """As `Cache.read`."""
        return self._shards[0].read(key, retry=True)

    def __contains__(self, key: Any) -> bool:
        return key in self._shards[0]

    def pop(
        self, key: Any, default: Any = None, expire_time: bool = False, tag: bool = False, retry: bool = False
    ) -> Any:
        """As `Cache.pop`; `default` on a timeout."""
        return self._or(default, self._shards[0].pop, key, default, expire_time, tag, retry)

    def delete(self, key: Any, retry: bool = False) -> bool:
        """As `Cache.delete`; False on a timeout."""
        return self._or(False, self._shards[0].delete, key, retry)  # type: ignore[no-any-return]

    def __delitem__(self, key: Any) -> None:
        del self._shards[0][key]

    def check(self, fix: bool = False, retry: bool = False) -> Any:
        """As `Cache.check`."""
        return self._shards[0].check(fix, retry=True)

    def expire(self, retry: bool = False) -> int:
        """As `Cache.expire`."""
        return self._remove("expire", time.time())

    def create_tag_index(self) -> None:
        """Tags are always indexed."""
        self._shards[0].create_tag_index()

    def drop_tag_index(self) -> None:
        """Tags are always indexed."""
        self._shards[0].drop_tag_index()

    def evict(self, tag: Any, retry: bool = False) -> int:
        """As `Cache.evict`."""
        return self._remove("evict", tag)

    def cull(self, retry: bool = False) -> int:
        """As `Cache.cull`."""
        return self._remove("cull")

    def clear(self, retry: bool = False) -> int:
        """As `Cache.clear`."""
        return self._remove("clear")

    def stats(self, enable: bool = True, reset: bool = False) -> tuple[int, int]:
        """As `Cache.stats`."""
        return self._shards[0].stats(enable, reset)

    def volume(self) -> int:
        """As `Cache.volume`."""
        return self._shards[0].volume()

    def close(self) -> None:
        """As `Cache.close`, also of those that it holds."""
        self._shards[0].close()
        held: list[Deque | Index] = [*self._deques.values(), *self._indexes.values()]
        for cache in [*self._caches.values(), *(one.cache for one in held)]:
            cache.close()
        self._caches.clear()
        self._deques.clear()
        self._indexes.clear()

    def __enter__(self) -> FanoutCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._directory, self._count, self._shards[0].timeout, type(self._shards[0].disk)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shards[0])

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._shards[0])

    def __len__(self) -> int:
        return len(self._shards[0])

    def reset(self, key: str, value: Any = ENOVAL) -> Any:
        """As `Cache.reset`. A `size_limit` is that of each shard."""
        if key == "size_limit":
            whole = value if value is ENOVAL else value * self._count
            return self._again(key, whole) // self._count
        return self._again(key, value)

    def _again(self, key: str, value: Any) -> Any:
        while True:
            try:
                return self._shards[0].reset(key, value)
            except Timeout:
                continue

    # -- what it holds ------------------------------------------------------------------------

    def cache(self, name: str, timeout: float = 60, disk: type[Disk] | None = None, **settings: Any) -> Cache:
        """The `Cache` of that name in a directory below this one's."""
        if name not in self._caches:
            place = os.path.join(self.directory, "caches", *name.split("/"))
            self._caches[name] = Cache(place, timeout, disk or type(self._shards[0].disk), **settings)
        return self._caches[name]

    def deque(self, name: str, maxlen: int | None = None) -> Deque:
        """The `Deque` of that name."""
        if name not in self._deques:
            place = os.path.join(self.directory, "deques", *name.split("/"))
            cache = Cache(place, disk=type(self._shards[0].disk), eviction_policy="none")
            self._deques[name] = Deque.fromcache(cache, maxlen=maxlen)
        return self._deques[name]

    def index(self, name: str) -> Index:
        """The `Index` of that name."""
        if name not in self._indexes:
            place = os.path.join(self.directory, "indexes", *name.split("/"))
            cache = Cache(place, disk=type(self._shards[0].disk), eviction_policy="none")
            self._indexes[name] = Index.fromcache(cache)
        return self._indexes[name]

    memoize = Cache.memoize

    def _remove(self, name: str, *args: Any) -> int:
        """The sum of what is removed, as often as it takes: a `Timeout` says how many went before it."""
        total = 0
        for shard in self._shards:
            while True:
                try:
                    total += getattr(shard, name)(*args)
                    break
                except Timeout as timeout:
                    total += timeout.args[0] if timeout.args else 0
        return total

    @staticmethod
    def _or(failed: Any, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except Timeout:
            return failed
