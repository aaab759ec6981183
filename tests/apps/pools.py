"""Pools that run the guide's `thumbnails.py`, which has to be importable: DIRECTORY METHOD POOL TASKS.

METHOD is a start method, POOL `executor`, `recycled` (a new process for every task), `attribute`
(processes that hold the cache as an attribute, one of them killed in the middle) or `uses` (whose hits
have to be in the totals). Prints, as JSON, how many thumbnails were made.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from thumbnails import make_thumbnail, thumbnail

from yatagarasu_cache import DiskCache

WORKERS = 3
REPEATS = 25
USES_MISSING = 256  # of a process that was killed, at most


def worker_class(context: Any) -> type[Any]:
    """`Process` of a start method with a cache, as a subclass that pickle finds by its name."""
    return {"fork": Forked, "spawn": Spawned, "forkserver": Served}[context.get_start_method()]


class Holder:
    """For a `Process`: what it is about, and what it does."""

    def __init__(self, cache: DiskCache, names: list[str], acknowledge: Connection | None = None) -> None:
        super().__init__(daemon=True)
        self.cache, self.names, self.acknowledge = cache, names, acknowledge

    def run(self) -> None:
        if self.acknowledge is None:
            for name in self.names:
                thumbnail(self.cache, name)
        else:  # until it is killed
            for turn in itertools.count():
                self.cache.set(("busy", turn), make_thumbnail(str(turn)))
                self.acknowledge.send(turn)


class Forked(Holder, multiprocessing.get_context("fork").Process):  # type: ignore[misc]
    pass


class Spawned(Holder, multiprocessing.get_context("spawn").Process):  # type: ignore[misc]
    pass


class Served(Holder, multiprocessing.get_context("forkserver").Process):  # type: ignore[misc]
    pass


def executor(cache: DiskCache, names: list[str], context: Any) -> list[bytes]:
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        return list(pool.map(thumbnail, [cache] * len(names), names, timeout=60))


def recycled(cache: DiskCache, names: list[str], context: Any) -> list[bytes]:
    with context.Pool(WORKERS, maxtasksperchild=1) as pool:
        pending = pool.starmap_async(thumbnail, [(cache, name) for name in names], chunksize=1)
        made: list[bytes] = pending.get(timeout=60)
        pool.close()
        pool.join()
    return made


def attribute(cache: DiskCache, names: list[str], context: Any) -> list[bytes]:
    kind = worker_class(context)
    receive, acknowledge = context.Pipe(duplex=False)
    busy = kind(cache, [], acknowledge)
    busy.start()
    acknowledge.close()
    workers = [kind(cache, names[number::WORKERS]) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    acknowledged = -1
    while acknowledged < 50 and receive.poll(60):
        acknowledged = receive.recv()
    assert busy.pid is not None
    os.kill(busy.pid, signal.SIGKILL)
    for worker in [busy, *workers]:
        worker.join(60)
    assert [worker.exitcode for worker in [busy, *workers]] == [-signal.SIGKILL, *[0] * WORKERS]
    for turn in range(acknowledged + 1):
        assert cache.get(("busy", turn)) == make_thumbnail(str(turn)), f"{turn} of {acknowledged} is lost"
    return [cache[name] for name in names]


def uses(cache: DiskCache, names: list[str], context: Any) -> list[bytes]:
    made = [thumbnail(cache, name) for name in names]
    before = cache.stats().hits
    with context.Pool(WORKERS) as pool:  # which kills its processes at the end
        found = pool.starmap(thumbnail, [(cache, name) for name in names * REPEATS], chunksize=50)
    assert found == made * REPEATS
    missing = len(found) - (cache.stats().hits - before)
    assert 0 <= missing <= WORKERS * USES_MISSING, f"{missing} of {len(found)} hits are missing"
    return made


def main(directory: str, method: str, kind: str, tasks: int) -> None:
    context: Any = multiprocessing.get_context(method)
    names = [f"photo-{number}.jpg" for number in range(tasks)]
    run = {"executor": executor, "recycled": recycled, "attribute": attribute, "uses": uses}[kind]
    if method == "forkserver":
        context.set_forkserver_preload(["thumbnails"])
    with DiskCache(directory) as cache:
        made = run(cache, names, context)
        assert made == [make_thumbnail(name) for name in names]
        print(json.dumps({"made": cache["made"]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
