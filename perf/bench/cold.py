"""Operations on data that is on disk only, and how much a batch helps.

Cold means the same for all: closed, synced, caches dropped, opened anew, then other keys than
before in random order. The data set is far larger than what read-ahead could bring along. What is
stored are entries that are there already, so that each `set` replaces something cold; what was
deleted is put back outside of the time that counts.

    python -m perf.bench.cold [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from perf.bed import KIB, MIB, drop_caches, show_size, value_of
from perf.peers import PEERS, RAW, Peer
from perf.suite import Bed, Case, Options, main, timed

BATCH = 500
WRITES = 100  # of one sample, batches aside: they are slow, and there are many samples


def set_size(size: int, quick: bool) -> int:
    """Bytes of values in the data set."""
    if quick:
        return 64 * MIB if size <= 64 * KIB else 160 * MIB
    return 512 * MIB if size <= 64 * KIB else 640 * MIB


Work = Callable[[Peer, list[Any], bytes, int], float]  # with these keys, value and length of a batch


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for size in options.sizes:
        total = set_size(size, options.quick)
        count = total // size
        loops = max(4, min(BATCH, count // 4, 16 * MIB // size))
        writes = min(WRITES, loops)
        works: dict[str, tuple[Work, int]] = {"get": (gets, loops)}
        if size <= 64 * KIB:
            works[f"get_many of {loops}"] = get_batches, loops
        if size == 4 * KIB:
            works |= {
                "set": (sets, writes),
                f"set_many of {loops}": (set_batches, loops),
                "delete": (deletes, writes),
            }
        for what, (work, operations) in works.items():
            for side in options.sides:
                if side not in RAW:
                    run = partial(time_cold, bed, side, size, count, work, loops)
                    yield Case(f"cold {what}, {show_size(size)}", side, operations, run)


def time_cold(bed: Bed, side: str, size: int, count: int, work: Work, batch: int, loops: int) -> float:
    value = value_of(size)
    directory = bed.filled(side, f"cold-{size}", count, value)
    taken, rest = 0.0, loops
    while rest > 0:  # pyperf may ask for more than there is: then it is made cold again
        part = min(rest, max(1, count // 4))
        drop_caches(directory)
        peer = PEERS[side](directory, size=size)
        try:
            taken += work(peer, [peer.key(i) for i in random.sample(range(count), part)], value, batch)
        finally:
            peer.close()
        rest -= part
    return taken


def _in_batches(things: list[Any], batch: int) -> list[list[Any]]:
    return [things[i : i + batch] for i in range(0, len(things), batch)]


def gets(peer: Peer, keys: list[Any], value: bytes, batch: int) -> float:
    return timed(peer.get, keys)


def get_batches(peer: Peer, keys: list[Any], value: bytes, batch: int) -> float:
    return timed(peer.get_many, _in_batches(keys, batch))


def sets(peer: Peer, keys: list[Any], value: bytes, batch: int) -> float:
    put = peer.set
    return timed(lambda key: put(key, value), keys)


def set_batches(peer: Peer, keys: list[Any], value: bytes, batch: int) -> float:
    return timed(peer.set_many, _in_batches([(key, value) for key in keys], batch))


def deletes(peer: Peer, keys: list[Any], value: bytes, batch: int) -> float:
    taken = timed(peer.delete, keys)
    peer.set_many([(key, value) for key in keys])
    return taken


if __name__ == "__main__":
    main(cases, "perf.bench.cold")
