"""Synchronous operations on data in memory: get, set, get_many, set_many, delete.

    python -m perf.bench_hot [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from perf.bed import MIB, show_size, value_of
from perf.peers import RAW, Peer
from perf.suite import Bed, Case, Options, main, timed

BYTES = 80 * MIB  # of data that each peer holds, at most
SAMPLE = 16 * MIB  # moved by one sample, at most


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    for size in options.sizes:
        count = max(4, min(3000, BYTES // size))
        loops = max(2, min(300 if options.quick else 1000, SAMPLE // size))
        batch = max(2, min(100, loops))
        for what, time in (
            ("set", time_set),
            ("get", time_get),
            (f"set_many of {batch}", time_set_many),
            (f"get_many of {batch}", time_get_many),
            ("delete", time_delete),
        ):
            for side in options.sides:
                if side not in RAW:
                    yield Case(
                        f"hot {what}, {show_size(size)}", side,
                        max(loops, batch) // batch * batch if "many" in what else loops,
                        lambda loops, time=time, side=side, size=size, count=count, batch=batch: time(
                            bed.peer(side, f"hot-{size}"), size, count, batch, loops
                        ),
                    )  # fmt: skip


def _ready(peer: Peer, size: int, count: int) -> bytes:
    """The value; the first time, the peer is filled with it."""
    value = value_of(size)
    if not hasattr(peer, "ready"):
        peer.fill(count, value)
        peer.ready = True  # type: ignore[attr-defined]
    return value


def time_set(peer: Peer, size: int, count: int, batch: int, loops: int) -> float:
    value, put = _ready(peer, size, count), peer.set
    return timed(lambda key: put(key, value), [peer.key(i % count) for i in range(loops)])


def time_get(peer: Peer, size: int, count: int, batch: int, loops: int) -> float:
    value = _ready(peer, size, count)
    assert peer.get(peer.key(0)) == value
    return timed(peer.get, [peer.key(i % count) for i in range(loops)])


def _batches(peer: Peer, count: int, batch: int, loops: int) -> list[list[object]]:
    return [
        [peer.key((start + i) % count) for i in range(min(batch, loops - start))]
        for start in range(0, loops, batch)
    ]


def time_set_many(peer: Peer, size: int, count: int, batch: int, loops: int) -> float:
    value = _ready(peer, size, count)
    return timed(peer.set_many, [[(key, value) for key in keys] for keys in _batches(peer, count, batch, loops)])


def time_get_many(peer: Peer, size: int, count: int, batch: int, loops: int) -> float:
    _ready(peer, size, count)
    return timed(peer.get_many, _batches(peer, count, batch, loops))


def time_delete(peer: Peer, size: int, count: int, batch: int, loops: int) -> float:
    value, taken = _ready(peer, size, count), 0.0
    for start in range(0, loops, count):
        keys = [peer.key(i) for i in range(count, count + min(count, loops - start))]
        peer.set_many([(key, value) for key in keys])
        taken += timed(peer.delete, keys)
    return taken


TimeFunction = Callable[[Peer, int, int, int, int], float]

if __name__ == "__main__":
    main(cases, "perf.bench_hot")
