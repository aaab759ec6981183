"""Synchronous operations on data in memory: get, set, get_many, set_many, delete.

python -m perf.bench.hot [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from perf.bed import MIB, show_size, value_of
from perf.peers import RAW, Peer
from perf.suite import Bed, Case, Options, main, timed

BYTES = 80 * MIB  # of data that each peer holds, at most
SAMPLE = 16 * MIB  # moved by one sample, at most


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for size in options.sizes:
        entries, data, most, sample = (1000, BYTES // 2, 300, SAMPLE // 4) if options.quick else (3000, BYTES, 1000, SAMPLE)
        count = max(4, min(entries, data // size))
        loops = max(2, min(most, sample // size))
        batch = max(2, min(100, loops))
        table: dict[str, TimeFunction] = {
            "set": time_set,
            "get": time_get,
            f"set_many of {batch}": time_set_many,
            f"get_many of {batch}": time_get_many,
            "delete": time_delete,
        }
        for what, time in table.items():
            for side in options.sides:
                if side not in RAW:
                    operations = max(loops, batch) // batch * batch if "many" in what else loops
                    run = partial(on_peer, time, bed, side, size, count, batch)
                    yield Case(f"hot {what}, {show_size(size)}", side, operations, run)


TimeFunction = Callable[[Peer, bytes, int, int, int], float]


def on_peer(time: TimeFunction, bed: Bed, side: str, size: int, count: int, batch: int, loops: int) -> float:
    value = value_of(size)
    return time(bed.peer(side, f"hot-{size}", fill=(count, value)), value, count, batch, loops)


def time_set(peer: Peer, value: bytes, count: int, batch: int, loops: int) -> float:
    put = peer.set
    return timed(lambda key: put(key, value), [peer.key(i % count) for i in range(loops)])


def time_get(peer: Peer, value: bytes, count: int, batch: int, loops: int) -> float:
    assert peer.get(peer.key(0)) == value
    return timed(peer.get, [peer.key(i % count) for i in range(loops)])


def _batches(peer: Peer, count: int, batch: int, loops: int) -> list[list[object]]:
    return [
        [peer.key((start + i) % count) for i in range(min(batch, loops - start))]
        for start in range(0, loops, batch)
    ]


def time_set_many(peer: Peer, value: bytes, count: int, batch: int, loops: int) -> float:
    batches = [[(key, value) for key in keys] for keys in _batches(peer, count, batch, loops)]
    return timed(peer.set_many, batches)


def time_get_many(peer: Peer, value: bytes, count: int, batch: int, loops: int) -> float:
    return timed(peer.get_many, _batches(peer, count, batch, loops))


def time_delete(peer: Peer, value: bytes, count: int, batch: int, loops: int) -> float:
    taken = 0.0
    for start in range(0, loops, count):
        keys = [peer.key(i) for i in range(count, count + min(count, loops - start))]
        peer.set_many([(key, value) for key in keys])
        taken += timed(peer.delete, keys)
    return taken


if __name__ == "__main__":
    main(cases, "perf.bench.hot")
