"""Reads of data that is on disk only, and how much a batch helps.

Cold means the same for all: closed, synced, caches dropped, opened anew, then other keys than
before in random order. The data set is far larger than what read-ahead could bring along.

    python -m perf.bench_cold [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from perf.bed import KIB, MIB, drop_caches, show_size, value_of
from perf.peers import PEERS, RAW
from perf.suite import Bed, Case, Options, main, timed

BATCH = 500


def set_size(size: int, quick: bool) -> int:
    """Bytes of values in the data set."""
    if quick:
        return 64 * MIB if size <= 64 * KIB else 160 * MIB
    return 512 * MIB if size <= 64 * KIB else 640 * MIB


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for size in options.sizes:
        total = set_size(size, options.quick)
        count = total // size
        loops = max(4, min(500, count // 4, 16 * MIB // size))
        for what in ("get", "get_many of 500") if size == 4 * KIB else ("get",):
            for side in options.sides:
                if side not in RAW:
                    run = partial(time_cold, bed, side, size, count, "many" in what)
                    yield Case(f"cold {what}, {show_size(size)}", side, loops, run)


def time_cold(bed: Bed, side: str, size: int, count: int, many: bool, loops: int) -> float:
    directory = bed.filled(side, f"cold-{size}", count, value_of(size))
    taken, rest = 0.0, loops
    while rest > 0:  # pyperf may ask for more than there is: then it is made cold again
        part = min(rest, max(1, count // 4))
        taken += _cold_sample(directory, side, size, random.sample(range(count), part), many)
        rest -= part
    return taken


def _cold_sample(directory: str, side: str, size: int, numbers: list[int], many: bool) -> float:
    drop_caches(directory)
    peer = PEERS[side](directory, size=size)
    try:
        keys = [peer.key(number) for number in numbers]
        if many:
            return timed(peer.get_many, [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)])
        return timed(peer.get, keys)
    finally:
        peer.close()


if __name__ == "__main__":
    main(cases, "perf.bench_cold")
