"""Mending a cache that cannot be opened as it is."""

from __future__ import annotations

import os
from typing import Any

from .cache import DiskCache
from .store.check import Problem
from .store.unreadable import giving_up


def repair(directory: str | os.PathLike[str], **options: Any) -> list[Problem]:
    """Open the cache in `directory`, put everything in order, and give up what the disk cannot read any more.

    For a cache whose index has to be made anew, from files of which one cannot be read, so that `DiskCache`
    raises a `CacheIOError`; else `check(fix=True, drop_unreadable=True)` does the same. `options` are those
    of `DiskCache`. What was found comes back, as from `check`.
    """
    with giving_up():
        cache = DiskCache(directory, **options)
    with cache:
        return cache.check(fix=True, drop_unreadable=True)
