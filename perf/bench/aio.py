"""`await get` of 4 KiB with 1 to 1024 in flight, hot and cold.

Peers without asyncio are called in a pool of threads; `caio` and `aiofile` read from one file
and know no keys: they are what an asyncio file library alone can do.

A cold sample with 16 and more in flight is 4,000 operations, a hot one 1,500, for everyone alike. With
fewer, the beginning decides: the first operations open the files of the data, make rings or start threads, and
find none of the others' reads under way; the last ones run with ever fewer beside them.

    python -m perf.bench.aio [--backend threads|uring|both] [--peers lmdb,caio] [--json FILE]
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from functools import partial

from perf.bed import KIB, drop_caches, value_of
from perf.bench.cold import set_size
from perf.peers import PEERS
from perf.suite import Bed, Case, Options, main

SIZE = 4 * KIB
HOT = 2000  # entries that are read again and again


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    count = set_size(SIZE, options.quick) // SIZE
    for cold in (False, True):
        for in_flight in options.in_flight:
            if in_flight > 1:  # in a quick run's small set, peers' reads would meet each other's pages
                loops = 1500 if not cold else 1000 if options.quick else 4000
            else:
                loops = 100 if cold else 500 if options.quick else 1500
            for side in options.sides:
                name = f"asyncio {'cold' if cold else 'hot'} get, 4 KiB, {in_flight} in flight"
                yield Case(name, side, loops, partial(time_get, bed, side, count, in_flight, cold))


def time_get(bed: Bed, side: str, count: int, in_flight: int, cold: bool, loops: int) -> float:
    directory = bed.filled(side, f"cold-{SIZE}", count, value_of(SIZE))
    if cold:
        drop_caches(directory)
        numbers = random.sample(range(count), min(loops, count))
    else:
        numbers = list(range(min(HOT, count)))
    numbers = [numbers[i % len(numbers)] for i in range(loops)]
    return asyncio.run(_read(directory, side, numbers, in_flight, warm=not cold))


async def _read(directory: str, side: str, numbers: list[int], in_flight: int, warm: bool) -> float:
    kind = PEERS[side]
    async with kind.asynchronous(directory) as cache:
        keys = [kind.key(number) for number in numbers]
        if warm:
            await _run(cache, keys, 16)
        start = time.perf_counter()
        await _run(cache, keys, in_flight)
        return time.perf_counter() - start


async def _run(cache: object, keys: list[object], in_flight: int) -> None:
    """All keys, each once, by `in_flight` tasks that take the next one when they are done."""
    rest, get = iter(keys), cache.get  # type: ignore[attr-defined]

    async def worker() -> None:
        for key in rest:
            await get(key)

    await asyncio.gather(*(worker() for _ in range(in_flight)))


if __name__ == "__main__":
    main(cases, "perf.bench.aio")
