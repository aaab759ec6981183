"""Opening a cache of 10 thousand or a million small entries and the first get; rebuilding its index.

python -m perf.bench.opening [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

from perf.peers import OURS, PEERS, RAW
from perf.suite import Bed, Case, Options, main

VALUE = b"x" * 100
QUICK_MILLION = 50_000


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for count in (10_000, QUICK_MILLION if options.quick else 1_000_000):
        for what in ("open and get", "rebuild and get"):
            for side in options.sides:
                # A million files or transactions would take minutes to make: these open in no time.
                slow = side in (*RAW, "files") or (count > 10_000 and side.startswith("diskcache"))
                if not slow and (what == "open and get" or side in OURS):
                    run = partial(time_all, bed, side, count, what.startswith("rebuild"))
                    yield Case(f"{what}, {count:,} entries", side, 1, run)


def time_all(bed: Bed, side: str, count: int, rebuild: bool, loops: int) -> float:
    directory = bed.filled(side, f"opening-{count}", count, VALUE)
    time_one = time_rebuild if rebuild else time_open
    return sum(time_one(directory, side, i * 7 % count) for i in range(loops))


def time_open(directory: str, side: str, number: int) -> float:
    start = time.perf_counter()
    peer = PEERS[side](directory)
    found = peer.get(peer.key(number))
    taken = time.perf_counter() - start
    peer.close()
    assert found == VALUE
    return taken


def time_rebuild(directory: str, side: str, number: int) -> float:
    """As after a crash that took the index: from the checkpoint and the segments."""
    os.unlink(os.path.join(directory, "index"))
    return time_open(directory, side, number)


if __name__ == "__main__":
    main(cases, "perf.bench.opening")
