"""A persistent cache on local disk, shared by threads and processes, native to asyncio.

    from yatagarasu_cache import DiskCache

    with DiskCache("/var/tmp/my-cache", size_limit=2**30) as cache:
        cache.set("key", b"value", expire=3600)
        cache.get("key")
"""

from typing import TYPE_CHECKING

from ._version import __version__
from .cache import DiskCache
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

if TYPE_CHECKING:
    from .aio import AsyncDiskCache
    from .codec import MsgpackSerializer, PickleSerializer, Serializer, TypedSerializer
    from .compat.diskcache.importer import import_diskcache
    from .config import RingSettings, Settings
    from .entry import Entry, Location
    from .mending import repair
    from .stats import CacheStats
    from .store.check import Problem
else:
    # What not everybody needs, asyncio with it, is loaded when it is asked for.
    _PLACES = {
        "AsyncDiskCache": "aio",
        "CacheStats": "stats",
        "Entry": "entry",
        "Location": "entry",
        "MsgpackSerializer": "codec",
        "PickleSerializer": "codec",
        "Problem": "store.check",
        "RingSettings": "config",
        "Serializer": "codec",
        "Settings": "config",
        "TypedSerializer": "codec",
        "import_diskcache": "compat.diskcache.importer",
        "repair": "mending",
    }

    # Modules that can be had without being imported, among them the layout of the files (docs/format.md).
    _MODULES = {
        "aio": "aio",
        "cli": "cli",
        "codec": "codec",
        "compat": "compat",
        "config": "config",
        "desk": "desk",
        "entry": "entry",
        "format": "store.format",
        "mending": "mending",
        "stats": "stats",
        "store": "store",
    }

    def __getattr__(name):
        from importlib import import_module

        from .concurrency.locks import importing

        if name not in _PLACES and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with importing:  # forks wait for it
            module = import_module(f".{_PLACES.get(name) or _MODULES[name]}", __name__)
        found = globals()[name] = getattr(module, name) if name in _PLACES else module
        return found

    def __dir__():
        return sorted({*globals(), *__all__})


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
    "TypedSerializer",
    "ValueTooLarge",
    "__version__",
    "import_diskcache",
    "repair",
]
