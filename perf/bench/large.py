"""Where values begin to be worth a file of their own: the same value in a segment and in a file.

    python -m perf.bench.large [--backend threads|uring] [--json FILE]

Says what `LARGE_VALUE_BYTES` in store/limits.py should be. In a segment, a value that is replaced leaves dead
bytes that have to be cleaned up later, which is not in these times; a file goes at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from perf.bed import KIB, MIB, show_size, value_of
from perf.peers import PEERS, Ours
from perf.suite import Bed, Case, Options, main, timed
from yatagarasu_cache import DiskCache

SIZES = (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB)
ENTRIES = 16


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    backends = [kind.backend for side in options.sides if issubclass(kind := PEERS[side], Ours)]
    for size in SIZES:
        for what in ("set", "get"):
            for backend in backends:
                for place, limit in (("segment", 8 * MIB), ("file", KIB)):
                    run = partial(time_one, bed, backend, place, limit, size, what)
                    yield Case(f"{what} of {show_size(size)}, {backend}", f"in a {place}", ENTRIES, run)


_open: dict[str, DiskCache] = {}


def time_one(bed: Bed, backend: str, place: str, limit: int, size: int, what: str, loops: int) -> float:
    path = os.path.join(bed.directory, f"large-{backend}-{place}-{size}")
    if path not in _open:
        _open[path] = DiskCache(path, backend=backend, large_value_size=limit)
    cache, value = _open[path], value_of(size)
    numbers = [i % ENTRIES for i in range(loops)]
    if what == "set":
        return timed(lambda i: cache.set(f"key-{i}", value), numbers)
    return timed(lambda i: cache.get(f"key-{i}"), numbers)


if __name__ == "__main__":
    main(cases, "perf.bench.large")
