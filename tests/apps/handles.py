"""One process that opens the cache again and again and closes no handle: DIRECTORY LIMIT HANDLES HOW.

`kept`: all of them stay alive. `dropped`: each takes the place of the one before, as where a notebook
cell, a fixture or a request opens the cache. `pickled`: each is sent through pickle, as to a pool.
`asynchronous`: each is an `AsyncDiskCache` that takes the place of the one before.
Prints, as JSON, descriptors and resident memory after a few handles and after all.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import sys

import psutil
from helpers import noise

from yatagarasu_cache import AsyncDiskCache, DiskCache

FEW = 10


def figures() -> dict[str, int]:
    gc.collect()
    return {"descriptors": len(os.listdir("/dev/fd")), "memory": psutil.Process().memory_info().rss}


def main(directory: str, limit: int, handles: int, how: str) -> None:
    if how == "asynchronous":
        return asyncio.run(asynchronous(directory, limit, handles))
    cache = DiskCache(directory, size_limit=limit)
    kept = []
    few = figures()
    for number in range(handles):
        if how == "pickled":
            pickle.loads(pickle.dumps(cache)).set(("new", number), noise(2000, number))
        else:
            cache = DiskCache(directory, size_limit=limit)
            cache.set(("new", number), noise(2000, number))
        if how == "kept":
            kept.append(cache)
        if number == FEW:
            few = figures()
    print(json.dumps({"few": few, "all": figures()}))


async def asynchronous(directory: str, limit: int, handles: int) -> None:
    few = figures()
    for number in range(handles):
        cache = AsyncDiskCache(directory, size_limit=limit)
        await cache.set(("new", number), noise(2000, number))
        if number == FEW:
            few = figures()
    print(json.dumps({"few": few, "all": figures()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
