"""Writes that survive a power cut when they return: one by one, and many in one batch.

python -m perf.bench.durable [--backend threads|uring|both] [--peers lmdb,files] [--json FILE]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial

from perf.bed import KIB, value_of
from perf.peers import PEERS, RAW, Ours
from perf.suite import Bed, Case, Options, main, timed

SIZE = 4 * KIB
BATCH = 100
ENTRIES = 1000


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    sides = [side for side in options.sides if side not in RAW]
    for what, loops in (("set", 10), (f"set_many of {BATCH}", BATCH)):
        for side in sides:
            if side != "files" or what == "set":
                yield Case(
                    f"durable {what}, 4 KiB", side, loops, partial(time_set, bed, side, "many" in what)
                )
    for side in sides:
        if issubclass(PEERS[side], Ours):
            yield Case(
                "durable asyncio set, 4 KiB, 64 in flight", side, 256, partial(time_asyncio, bed, side)
            )


def time_set(bed: Bed, side: str, many: bool, loops: int) -> float:
    peer, value = bed.peer(side, "durable", durable=True), value_of(SIZE)
    pairs = [(peer.key(i % ENTRIES), value) for i in range(loops)]
    if many:
        return timed(peer.set_many, [pairs[i : i + BATCH] for i in range(0, loops, BATCH)])
    return timed(lambda pair: peer.set(*pair), pairs)


def time_asyncio(bed: Bed, side: str, loops: int) -> float:
    return asyncio.run(_sets(bed.path(side, "durable"), side, loops))


async def _sets(directory: str, side: str, loops: int) -> float:
    from yatagarasu_cache import AsyncDiskCache

    kind, value = PEERS[side], value_of(SIZE)
    backend = kind.backend  # type: ignore[attr-defined]
    async with AsyncDiskCache(directory, backend=backend, durability="sync") as cache:
        rest = iter([kind.key(i % ENTRIES) for i in range(loops)])

        async def worker() -> None:
            for key in rest:
                await cache.set(key, value)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(64)))
        return time.perf_counter() - start


if __name__ == "__main__":
    main(cases, "perf.bench.durable")
