"""diskcache's module, on a `DiskCache`: ``import yatagarasu_cache.compat.diskcache as diskcache``.

Programs that were written for diskcache 5.6.3 run as they are. What differs is in ``docs/diskcache.md``.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any

from .core import (
    DEFAULT_SETTINGS,
    ENOVAL,
    EVICTION_POLICY,
    UNKNOWN,
    Cache,
    Disk,
    EmptyDirWarning,
    JSONDisk,
    Timeout,
    UnknownFileWarning,
)
from .fanout import FanoutCache
from .persistent import Deque, Index
from .recipes import Averager, BoundedSemaphore, Lock, RLock, barrier, memoize_stampede, throttle

__title__ = "diskcache"
__version__ = "5.6.3"  # of the module whose behaviour this is
__build__ = 0x050603
__author__ = "The yatagarasu_cache authors"
__license__ = "MIT"
__copyright__ = f"Copyright 2026 {__author__}"

__all__ = [
    "Averager", "BoundedSemaphore", "Cache", "DEFAULT_SETTINGS", "Deque", "Disk", "ENOVAL",
    "EVICTION_POLICY", "EmptyDirWarning", "FanoutCache", "Index", "JSONDisk", "Lock", "RLock", "Timeout",
    "UNKNOWN", "UnknownFileWarning", "barrier", "install", "memoize_stampede", "throttle",
]  # fmt: skip


def _has_django() -> bool:
    """Whether Django is installed, without the time that importing it takes."""
    try:
        spec = importlib.util.find_spec("django")
    except (ImportError, ValueError):
        return False
    places = spec.submodule_search_locations if spec is not None else None
    return any(os.path.isdir(os.path.join(place, "core", "cache")) for place in places or ())


if _has_django():
    __all__.append("DjangoCache")  # see `__getattr__`

_BELOW = ("core", "djangocache", "fanout", "persistent", "recipes")


def install() -> None:
    """From here on ``import diskcache`` gives this module, in all of this process: for packages that import
    it themselves. To be called before any of these is imported.

    Raises `ImportError` if diskcache itself has been imported, from which somebody may have its classes; then
    nothing is changed. Calling it again does nothing.
    """
    here = sys.modules[__name__]
    for name in ("diskcache", *(f"diskcache.{below}" for below in _BELOW)):
        other = sys.modules.get(name)
        if other is not None and not other.__name__.startswith(__name__):
            raise ImportError(
                f"{name} was imported already, from {getattr(other, '__file__', None)}: call install() before"
                " whatever imports it",
                name=name,
            )
    modules = {"diskcache": here}
    for below in _BELOW:
        try:
            modules[f"diskcache.{below}"] = importlib.import_module(f"{__name__}.{below}")
        except ImportError:  # djangocache without Django, which says so whenever it is imported
            if below != "djangocache":
                raise
    sys.modules.update(modules)


def __getattr__(name: str) -> Any:
    if name == "DjangoCache":  # which imports Django
        from .djangocache import DjangoCache

        return DjangoCache
    if name == "import_diskcache":
        from .importer import import_diskcache

        return import_diskcache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
