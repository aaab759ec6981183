"""Several processes, and several threads, on one cache: diskcache's own mix and its values.

90 % get, 9 % set, 1 % delete of 100 keys, values of 1 to 500 bytes, as its benchmark does.

    python -m perf.bench.shared [--backend threads|uring|both] [--peers lmdb,diskcache] [--json FILE]
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from functools import partial
from queue import Empty
from typing import Any

from perf.peers import PEERS, RAW
from perf.suite import Bed, Case, Options, main

KEYS = 100
Taken = dict[str, list[float]]  # action -> seconds of each call


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    loops = 1000 if options.quick else 4000
    for what in ("process", "thread"):
        for workers in options.workers:
            many = f"{workers} {what}{'' if workers == 1 else 'es' if what == 'process' else 's'}"
            for side in options.sides:
                if side not in RAW and (PEERS[side].processes or what == "thread"):
                    run = partial(time_mix, bed, side, what, workers)
                    yield Case(f"mix 90/9/1, {many}", side, loops * workers, run)


def time_mix(bed: Bed, side: str, what: str, workers: int, loops: int) -> float:
    """From the first worker's start to the last one's end."""
    parts = mix(bed.path(side, "shared"), side, what, workers, loops)
    return max(end for _, end, _ in parts) - min(start for start, _, _ in parts)


def together(parts: list[tuple[float, float, Taken]]) -> Taken:
    """All workers' calls, sorted."""
    return {
        action: sorted(second for _, _, taken in parts for second in taken[action])
        for action in ("get", "set", "delete")
    }


def mix(directory: str, side: str, what: str, workers: int, loops: int) -> list[tuple[float, float, Taken]]:
    """`loops` operations divided among processes or threads. Each one's start, end and calls."""
    each = max(1, loops // workers)
    if what == "thread":
        return _in_threads(directory, side, workers, each)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["perf.bench.shared"])
    barrier, queue = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_process, args=(directory, side, i, each, barrier, queue))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    parts: list[tuple[float, float, Taken]] = []
    while len(parts) < workers:
        try:
            parts.append(queue.get(timeout=1))
        except Empty:
            if any(process.exitcode for process in processes):
                barrier.abort()
                raise RuntimeError(f"a process of {side} failed, see above") from None
    for process in processes:
        process.join()
    return parts


def _process(directory: str, side: str, seed: int, loops: int, barrier: Any, queue: Any) -> None:
    peer = PEERS[side](directory)
    work(peer, seed + 1000, 20)  # warm
    barrier.wait(120)
    part = work(peer, seed, loops)
    barrier.wait(120)  # closing costs the others nothing
    queue.put(part)
    peer.close()


def _in_threads(directory: str, side: str, workers: int, loops: int) -> list[tuple[float, float, Taken]]:
    peer = PEERS[side](directory)
    barrier = threading.Barrier(workers)
    parts: list[tuple[float, float, Taken]] = []

    def run(seed: int) -> None:
        work(peer, seed + 1000, 20)
        barrier.wait(120)
        parts.append(work(peer, seed, loops))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peer.close()
    return parts


def work(peer: Any, seed: int, loops: int) -> tuple[float, float, Taken]:
    pick, clock = random.Random(seed), time.monotonic  # one clock for all processes
    taken: Taken = {"get": [], "set": [], "delete": []}
    begin = clock()
    for count in range(loops):
        key = peer.key(pick.randrange(KEYS))
        value = str(count).encode() * pick.randrange(1, 100)
        choice = pick.random()
        start = clock()
        if choice < 0.90:
            action = "get"
            peer.get(key)
        elif choice < 0.99:
            action = "set"
            peer.set(key, value)
        else:
            action = "delete"
            try:
                peer.delete(key)
            except (KeyError, FileNotFoundError):
                pass
        taken[action].append(clock() - start)
    return begin, clock(), taken


if __name__ == "__main__":
    main(cases, "perf.bench.shared")
