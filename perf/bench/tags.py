"""Entries by their tags among a million small ones, what a tag adds to a `set`, and what a walk costs an entry.

diskcache takes part with its tag index. An `evict` or `delete_prefix` finds 20 entries, which are stored anew
before the next one, untimed. A walk's time is divided by the entries that it looks at.

    python -m perf.bench.tags [--backend threads|uring|both] [--peers diskcache] [--json FILE]
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from perf.bed import KIB, value_of
from perf.peers import PEERS, Diskcache, Ours
from perf.suite import Bed, Case, Options, main, timed

MANY, QUICK_MANY = 1_000_000, 50_000
FEW = 20  # entries of each tag, and of the prefix
VALUE = b"x" * 100
KEYS = 1000  # that are set over and over


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    many = QUICK_MANY if options.quick else MANY
    caches = {
        side: Tagged(bed, side, many) for side in options.sides if issubclass(PEERS[side], (Ours, Diskcache))
    }
    for side, cache in caches.items():
        yield Case(f"evict {FEW} of {many:,} entries by tag", side, 1, cache.time_evict)
    for side, cache in caches.items():
        if issubclass(PEERS[side], Ours):
            yield Case(f"delete_prefix, each of {many:,} entries walked", side, 1, cache.time_walk)
    for name, tags in (("without a tag", None), ("with a tag", "group"), ("with a tag of its own", "group-{}")):
        for side, cache in caches.items():
            yield Case(f"set {name}, 4 KiB", side, KEYS, cache.setting(tags))


class Tagged:
    """A cache that is filled at first use."""

    def __init__(self, bed: Bed, side: str, many: int) -> None:
        self._bed, self._side, self._many = bed, side, many
        self._is_ours = issubclass(PEERS[side], Ours)
        self._cache: Any = None
        self._turn = 0

    def _filled(self) -> Any:
        if self._cache is None:
            self._cache = self._open()
            for start in range(0, self._many, FEW):
                self._fill(f"key-{start}", f"tag-{start}")
        return self._cache

    def _open(self) -> Any:
        path = os.path.join(self._bed.directory, f"tagged-{self._side}")
        if self._is_ours:
            from yatagarasu_cache import DiskCache

            return DiskCache(path, backend=PEERS[self._side].backend)
        return importlib.import_module(PEERS[self._side].module).Cache(path, tag_index=True)

    def _fill(self, stem: str, tag: str) -> None:
        if self._is_ours:
            self._cache.set_many([(f"{stem}-{i}", VALUE) for i in range(FEW)], tag=tag)
        else:
            for i in range(FEW):
                self._cache.set(f"{stem}-{i}", VALUE, tag=tag)

    def time_evict(self, loops: int) -> float:
        cache, taken = self._filled(), 0.0
        for _ in range(loops):
            self._turn = (self._turn + FEW * 977) % self._many // FEW * FEW
            taken += _removing(lambda: cache.evict(f"tag-{self._turn}"))
            self._fill(f"key-{self._turn}", f"tag-{self._turn}")
        return taken

    def time_walk(self, loops: int) -> float:
        cache, taken = self._filled(), 0.0
        for _ in range(loops):
            self._fill("another", "tag")
            taken += _removing(lambda: cache.delete_prefix("another"))
        return taken / self._many

    def setting(self, tags: str | None) -> Callable[[int], float]:
        def run(loops: int) -> float:
            cache, value = self._filled(), value_of(4 * KIB)

            def put(number: int) -> None:
                tag = None if tags is None else tags.format(number)
                cache.set(f"set-{number}", value, tag=tag)

            return timed(put, [i % KEYS for i in range(loops)])

        return run


def _removing(remove: Callable[[], int]) -> float:
    start = time.perf_counter()
    removed = remove()
    taken = time.perf_counter() - start
    assert removed == FEW, removed
    return taken


if __name__ == "__main__":
    main(cases, "perf.bench.tags")
