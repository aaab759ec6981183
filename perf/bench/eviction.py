"""`set` of 4 KiB in a cache that is full, so that each one makes an old entry go.

Peers that bound themselves take part: diskcache deletes up to 10 entries with each set.

    python -m perf.bench.eviction [--backend threads|uring|both] [--peers diskcache] [--json FILE]
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from itertools import count
from typing import Any

from perf.bed import KIB, MIB, value_of
from perf.peers import PEERS, Diskcache, Ours
from perf.suite import Bed, Case, Options, main, timed

LIMIT = 32 * MIB
SIZE = 4 * KIB


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for side in options.sides:
        if issubclass(PEERS[side], (Ours, Diskcache)):
            yield Case("set in a full cache, 4 KiB", side, 1000, Full(bed, side).time)


class Full:
    """A cache filled to its limit at first use."""

    def __init__(self, bed: Bed, side: str) -> None:
        self._bed, self._side = bed, side
        self._numbers = count()
        self._cache: Any = None

    def time(self, loops: int) -> float:
        value = value_of(SIZE)
        if self._cache is None:
            self._cache = self._open()
            for _ in range(int(1.2 * LIMIT) // SIZE):
                self._cache.set(next(self._numbers), value)
        put, numbers = self._cache.set, self._numbers
        return timed(lambda number: put(number, value), [next(numbers) for _ in range(loops)])

    def _open(self) -> Any:
        kind = PEERS[self._side]
        path = os.path.join(self._bed.directory, f"full-{self._side}")
        if issubclass(kind, Ours):
            from yatagarasu_cache import DiskCache

            return DiskCache(path, backend=kind.backend, size_limit=LIMIT)
        assert issubclass(kind, Diskcache)
        return importlib.import_module(kind.module).Cache(path, size_limit=LIMIT)


if __name__ == "__main__":
    main(cases, "perf.bench.eviction")
