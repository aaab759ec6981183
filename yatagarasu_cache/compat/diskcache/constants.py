"""Constants and small helpers of diskcache, by their names."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "DBNAME", "DEFAULT_SETTINGS", "ENOVAL", "EVICTION_OF_STORE", "EVICTION_POLICY", "METADATA", "MODE_BINARY",
    "MODE_NONE", "MODE_PICKLE", "MODE_RAW", "MODE_TEXT", "UNKNOWN", "Constant", "EmptyDirWarning", "Timeout",
    "UnknownFileWarning", "args_to_key", "full_name",
]  # fmt: skip


def full_name(func: Callable[..., Any]) -> str:
    """Module and qualified name of a function, with a dot between them."""
    return f"{func.__module__}.{func.__qualname__}"


class Constant(tuple):  # type: ignore[type-arg]
    """A value that is told by its name, and equal to itself in every process."""

    def __new__(cls, name: str) -> Constant:
        return tuple.__new__(cls, (name,))

    def __getnewargs__(self) -> tuple[str]:
        return (self[0],)

    def __repr__(self) -> str:
        return str(self[0])


DBNAME = "cache.db"
ENOVAL, UNKNOWN = Constant("ENOVAL"), Constant("UNKNOWN")
MODE_NONE, MODE_RAW, MODE_BINARY, MODE_TEXT, MODE_PICKLE = range(5)

DEFAULT_SETTINGS: dict[str, Any] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-stored",
    "size_limit": 2**30,
    "cull_limit": 10,
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**13,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 2**26,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**15,
    "disk_pickle_protocol": pickle.HIGHEST_PROTOCOL,
}

METADATA = {"count": 0, "size": 0, "hits": 0, "misses": 0}

# What diskcache has SQL for. Of that programs ask which policies do something at a get, or evict at all.
EVICTION_POLICY: dict[str, dict[str, str | None]] = {
    "none": {"init": None, "get": None, "cull": None},
    "least-recently-stored": {"init": None, "get": None, "cull": "store_time"},
    "least-recently-used": {"init": None, "get": "access_time", "cull": "access_time"},
    "least-frequently-used": {"init": None, "get": "access_count", "cull": "access_count"},
}

EVICTION_OF_STORE = {
    "none": "none",
    "least-recently-stored": "fifo",
    "least-recently-used": "lru",
    "least-frequently-used": "lfu",
}
"""The policy of the store that does the same."""


class Timeout(Exception):
    """Somebody else was in a transaction for too long. Its argument: how many entries went before that."""

    def __str__(self) -> str:
        return "somebody else is in a transaction on this cache: try again, or have it done with retry=True"


class UnknownFileWarning(UserWarning):
    """`check` has found a file that is not the cache's."""


class EmptyDirWarning(UserWarning):
    """`check` has found an empty directory."""


def args_to_key(
    base: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], typed: bool,
    ignore: Collection[int | str],
) -> tuple[Any, ...]:  # fmt: skip
    """The key of a call: `base`, the positional arguments, None, and the keyword ones by their names; with
    `typed`, their types behind them. `ignore`: positions and names of arguments that are left out."""
    given = tuple(arg for at, arg in enumerate(args) if at not in ignore)
    named = sorted((name, value) for name, value in kwargs.items() if name not in ignore) if kwargs else []
    key = (*base, *given, None)
    for item in named:
        key += item
    if typed:
        key += tuple(type(arg) for arg in given) + tuple(type(value) for _, value in named)
    return key


def keys_of(
    func: Callable[..., Any], name: str | None, typed: bool, ignore: Iterable[int | str]
) -> Callable[..., tuple[Any, ...]]:
    """What a decorated function has as ``__cache_key__``: a function of its arguments."""
    base, ignored = (full_name(func) if name is None else name,), frozenset(ignore)

    def cache_key(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The key of such a call."""
        return args_to_key(base, args, kwargs, typed, ignored)

    return cache_key


def errors_of_sql() -> Any:
    """What is raised where diskcache has its SQL."""
    raise NotImplementedError(
        "there is no SQLite behind this cache: use its methods, iterate over it, or read "
        "yatagarasu_cache.DiskCache(directory).entries()"
    )

