"""A persistent cache on local disk, shared by threads and processes, native to asyncio.

    from yatagarasu_cache import DiskCache

    with DiskCache("/var/tmp/my-cache", size_limit=2**30) as cache:
        cache.set("key", b"value", expire=3600)
        cache.get("key")
"""

from ._version import __version__
from .aio import AsyncDiskCache
from .cache import DiskCache
from .codec import MsgpackSerializer, PickleSerializer, Serializer
from .config import RingSettings, Settings
from .entry import Entry, Location
from .errors import (
    BackendUnavailable,
    CacheError,
    CacheIOError,
    ClosedError,
    ConfigurationError,
    EntryGone,
    FormatError,
    LockTimeout,
    ReadOnlyError,
    Reentered,
    SerializationError,
    StorageFull,
    ValueTooLarge,
)
from .mending import repair
from .stats import CacheStats
from .store.check import Problem

__all__ = [
    "AsyncDiskCache",
    "BackendUnavailable",
    "CacheError",
    "CacheIOError",
    "CacheStats",
    "ClosedError",
    "ConfigurationError",
    "DiskCache",
    "Entry",
    "EntryGone",
    "LockTimeout",
    "Reentered",
    "FormatError",
    "Location",
    "MsgpackSerializer",
    "PickleSerializer",
    "Problem",
    "ReadOnlyError",
    "RingSettings",
    "SerializationError",
    "Serializer",
    "Settings",
    "StorageFull",
    "ValueTooLarge",
    "__version__",
    "repair",
]
