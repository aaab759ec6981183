"""What is told of a running cache: names, kinds, units and meanings, for whoever exports it.

All of it is of the whole cache, read from the index that its processes share. So each process would report
the same totals: `Reporter` sees to it that one of them does, if it is asked to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..cache import DiskCache
from ..errors import CacheError, LockTimeout, Reentered
from ..stats import CacheStats
from ._values import log

__all__ = ["METRICS", "Metric", "Reporter"]


class Metric(NamedTuple):
    """One figure. A counter only grows, as long as the cache is not made anew."""

    name: str
    is_counter: bool
    unit: str  # "" for a plain number
    meaning: str
    of: Callable[[CacheStats], float]


METRICS = (
    Metric("hits", True, "", "Gets that found a value", lambda stats: stats.hits),
    Metric("misses", True, "", "Gets that found none", lambda stats: stats.misses),
    Metric("sets", True, "", "Values stored", lambda stats: stats.sets),
    Metric("deletes", True, "", "Entries removed on request", lambda stats: stats.deletes),
    Metric("evictions", True, "", "Entries removed to make room", lambda stats: stats.evictions),
    Metric("expirations", True, "", "Entries removed as they had expired", lambda stats: stats.expirations),
    Metric("corrupt", True, "", "Values found damaged, and dropped", lambda stats: stats.corrupt),
    Metric("entries", False, "", "Entries there are", lambda stats: stats.entries),
    Metric("live", False, "bytes", "Bytes of records and values in use", lambda stats: stats.live_bytes),
    Metric("disk", False, "bytes", "Bytes of all files", lambda stats: stats.disk_bytes),
    Metric("limit", False, "bytes", "Bytes that the cache may occupy", lambda stats: stats.size_limit),
    Metric("segments", False, "", "Segment files", lambda stats: stats.segments),
)


class Reporter:
    """The figures of a cache, when this process is the one to report them.

    once: of all processes with a reporter of that kind on the cache, one reports; when it ends, another one
    does. Else each one does, for whoever asks one process alone.
    """

    def __init__(self, cache: DiskCache, kind: str, *, once: bool) -> None:
        self._cache, self._kind, self._once = cache, kind, once
        self._process, self._held = 0, None

    def figures(self) -> Iterator[tuple[Metric, float]]:
        """None of them if it is another one's turn, or the cache cannot be asked."""
        try:
            if self._once and not self._is_elected():
                return
            stats = self._cache.stats()
        except CacheError as error:
            log.warning("metrics: %s", error)
            return
        for metric in METRICS:
            yield metric, metric.of(stats)

    def _is_elected(self) -> bool:
        """The lock is held until the process ends; the child of a fork does not have it."""
        if self._process == os.getpid():
            return True
        lock = self._cache.lock(("yatagarasu_cache", "reports", self._kind), wait=0)
        try:
            lock.acquire()
        except (LockTimeout, Reentered):
            return False
        self._process, self._held = os.getpid(), lock  # type: ignore[assignment]
        return True
