"""Values read other than by `get`, and metadata, beside the `get` that reads the same.

    python -m perf.bench.parts [--backend threads|uring] [--json FILE]

Said of them: a file of a value is read at the speed of `get`; a part of a large value costs what the part
costs; metadata comes with the value at the price of a `get`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from perf.bed import KIB, MIB, show_size, value_of
from perf.peers import PEERS, Ours
from perf.suite import Bed, Case, Options, main, timed
from yatagarasu_cache import DiskCache

SIZES = {64 * KIB: 200, MIB: 50, 64 * MIB: 2}  # and operations of a sample
HUGE, PART = 600 * MIB, 64 * KIB
META = {"type": "image/png", "etag": '"1"'}
Read = Callable[[DiskCache, Any], object]


def read_file(cache: DiskCache, key: Any) -> None:
    with cache.open(key) as file:
        file.read()


def read_part(cache: DiskCache, key: Any) -> None:
    with cache.open(key) as file:
        file.seek(HUGE // 2)
        file.read(PART)


WAYS: dict[str, Read] = {
    "get": lambda cache, key: cache.get(key), "open, read": read_file, "view": lambda cache, key: cache.view(key),
    "set_meta": lambda cache, key: cache.set_meta(key, META),
}  # fmt: skip
SMALL: dict[str, Read] = {
    "get": lambda cache, key: cache.get(key),
    "get with metadata": lambda cache, key: cache.get(key, with_meta=True),
    "get_entry": lambda cache, key: (entry := cache.get_entry(key)) and (entry.value, entry.meta),
    "set_meta": lambda cache, key: cache.set_meta(key, META),
}
PARTS: dict[str, Read] = {
    "get of a value of that size": lambda cache, key: cache.get(PART), "open, seek, read": read_part,
    "location": lambda cache, key: cache.location(key, HUGE // 2, PART).close(),
}  # fmt: skip


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    backends = [kind.backend for side in options.sides if issubclass(kind := PEERS[side], Ours)]
    for backend in backends:
        for size, loops in SIZES.items():
            for way, read in WAYS.items():
                yield Case(f"{show_size(size)}, {backend}", way, loops, partial(time_one, bed, backend, size, read))
        for way, read in SMALL.items():
            yield Case(f"100 B, {backend}", way, 1000, partial(time_one, bed, backend, 100, read))
        if not options.quick:
            for way, read in PARTS.items():
                run = partial(time_one, bed, backend, HUGE, read)
                yield Case(f"{show_size(PART)} of {show_size(HUGE)}, {backend}", way, 50, run)


_open: dict[str, DiskCache] = {}


def time_one(bed: Bed, backend: str, size: int, read: Read, loops: int) -> float:
    path = os.path.join(bed.directory, f"parts-{backend}")
    if path not in _open:
        _open[path] = DiskCache(path, backend=backend, size_limit=4 << 30)
        _open[path].set(PART, value_of(PART))
    cache = _open[path]
    if size not in cache:
        part = value_of(MIB)
        value: Any = value_of(size) if size < HUGE else iter([part] * (size // MIB))
        cache.set(size, value, meta=META, length=size)
    return timed(partial(read, cache), [size] * loops)


if __name__ == "__main__":
    main(cases, "perf.bench.parts")
