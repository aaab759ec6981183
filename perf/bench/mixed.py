"""Mixed work on 4 KiB values, 70 % get and 30 % set: in a plain loop, and in asyncio.

python -m perf.bench.mixed [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from functools import partial

from perf.bed import KIB, value_of
from perf.peers import PEERS, RAW
from perf.suite import Bed, Case, Options, main

SIZE = 4 * KIB
ENTRIES = 3000
READS = 0.7
IN_FLIGHT = 256


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    loops = 500 if options.quick else 2000
    sides = [side for side in options.sides if side not in RAW]
    for side in sides:
        yield Case("mix 70/30, 4 KiB", side, loops, partial(time_loop, bed, side))
    for side in sides:
        name = f"asyncio mix 70/30, 4 KiB, {IN_FLIGHT} in flight"
        yield Case(name, side, loops, partial(time_asyncio, bed, side, IN_FLIGHT))


def plan(loops: int) -> list[tuple[bool, int]]:
    """(whether it is a get, number of the entry) of each operation."""
    pick = random.Random(7)
    return [(pick.random() < READS, pick.randrange(ENTRIES)) for _ in range(loops)]


def time_loop(bed: Bed, side: str, loops: int) -> float:
    value = value_of(SIZE)
    peer = bed.peer(side, "mix", fill=(ENTRIES, value))
    get, put = peer.get, peer.set
    work = [(is_get, peer.key(number)) for is_get, number in plan(loops)]
    start = time.perf_counter()
    for is_get, key in work:
        if is_get:
            get(key)
        else:
            put(key, value)
    return time.perf_counter() - start


def time_asyncio(bed: Bed, side: str, in_flight: int, loops: int) -> float:
    directory = bed.filled(side, "mix", ENTRIES, value_of(SIZE))
    return asyncio.run(_mix(directory, side, in_flight, loops))


async def _mix(directory: str, side: str, in_flight: int, loops: int) -> float:
    kind, value = PEERS[side], value_of(SIZE)
    async with kind.asynchronous(directory) as cache:
        work = iter([(is_get, kind.key(number)) for is_get, number in plan(loops)])

        async def worker() -> None:
            for is_get, key in work:
                await (cache.get(key) if is_get else cache.set(key, value))

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return time.perf_counter() - start


if __name__ == "__main__":
    main(cases, "perf.bench.mixed")
