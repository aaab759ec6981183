"""The work that the guard compares, run against whatever `yatagarasu_cache` PYTHONPATH names.

Run as a file, with nothing else of `perf` on the path, so that both revisions do the same work:

    python cases.py serve DIRECTORY     reads "case loops" lines, answers seconds
    python cases.py count DIRECTORY [CASE ...]   each once; `os.getppid()` before and after it
    python cases.py trace DIRECTORY [CASE ...]   each once; `os.access` of a telling path instead

The last two answer with {case: loops} as JSON. Only the public interface is used. A case that a revision can't do is left out.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

ENTRIES = 300
MARK = "/yatagarasu-guard/"  # then the case, or "end"
COUNTED = 100  # loops of a case under count and trace; a tenth of them where one does many
Work = Callable[[int], object]

if len(sys.argv) > 1 and sys.argv[1] == "count":
    import hashlib  # noqa: F401 - what the standard library costs is not ours
    import logging  # noqa: F401
    import mmap  # noqa: F401

    os.getppid()
    import yatagarasu_cache

    os.getppid()
else:
    import yatagarasu_cache

# A cache's secret decides which keys meet in one group of the index, and so how many of a hundred new ones find
# theirs full, which costs them the way through Python: 3 to 8, as it fell. Both revisions draw the same.
chance = random.Random(0)
secrets.token_bytes = chance.randbytes
secrets.randbits = chance.getrandbits


class Lab:
    """One cache of each kind in `directory`, and the cases on them."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.value = bytes(range(256)) * 16
        self.large = self.value * 16
        self.keys = [f"key-{i}" for i in range(ENTRIES)]
        self.batch = self.keys[:100]
        self.pairs = [(key, self.value) for key in self.batch]
        self.container = {"name": "x" * 40, "numbers": list(range(20)), "inner": {"flag": True, "none": None}}
        self.cache = self.opened("threads")
        self.loop = asyncio.new_event_loop()
        self.awaited: dict[str, Any] = {}

    def opened(self, backend: str) -> Any:
        cache = yatagarasu_cache.DiskCache(f"{self.directory}/{backend}", backend=backend)
        cache.set_many((key, self.value) for key in self.keys)
        cache.set_many((("large", key), self.large) for key in self.batch)
        cache.set_many((("container", key), self.container) for key in self.keys)
        return cache

    def cases(self, only: list[str]) -> dict[str, Work]:
        """All, or those named."""
        found = self.portable()
        if not only:
            try:
                found |= self.ring()
            except Exception as error:
                print(f"without io_uring: {error}", file=sys.stderr)
        return {name: work for name, work in found.items() if not only or name in only}

    def portable(self) -> dict[str, Work]:
        cache, value, each = self.cache, self.value, self.each

        def put_and_delete(key: str) -> None:
            cache.set(("gone", key), b"x")
            cache.delete(("gone", key))

        return {
            "get 4 KiB": each(cache.get),
            "get 64 KiB": each(lambda key: cache.get(("large", self.batch[int(key[4:]) % 100]))),
            "get, missing": each(lambda key: cache.get(("no", key))),
            "key in cache": each(lambda key: key in cache),
            "get container": each(lambda key: cache.get(("container", key))),
            "set 4 KiB": each(lambda key: cache.set(key, value)),
            "set 4 KiB with a tag": each(lambda key: cache.set(("tagged", key), value, tag="tag")),
            "set container": each(lambda key: cache.set(("container", key), self.container)),
            "set and delete": each(put_and_delete),
            "get_many of 100": each(lambda key: cache.get_many(self.batch)),
            "set_many of 100": each(lambda key: cache.set_many(self.pairs)),
            "asyncio get": lambda loops: self.run("threads", self.gets, loops, 1),
            "asyncio set, 64 in flight": lambda loops: self.run("threads", self.sets, loops, 64),
        }

    def ring(self) -> dict[str, Work]:
        cache = self.opened("uring")
        return {
            "get_many of 100, uring": self.each(lambda key: cache.get_many(self.batch)),
            "set_many of 100, uring": self.each(lambda key: cache.set_many(self.pairs)),
            "asyncio get, uring": lambda loops: self.run("uring", self.gets, loops, 1),
        }

    def each(self, function: Callable[[str], object]) -> Work:
        keys = self.keys

        def work(loops: int) -> None:
            for i in range(loops):
                function(keys[i % ENTRIES])

        return work

    def run(self, backend: str, work: Callable[..., Any], loops: int, in_flight: int) -> None:
        self.loop.run_until_complete(self.asynchronous(backend, work, loops, in_flight))

    async def asynchronous(self, backend: str, work: Callable[..., Any], loops: int, in_flight: int) -> None:
        if backend not in self.awaited:
            kind = yatagarasu_cache.AsyncDiskCache
            self.awaited[backend] = await kind(f"{self.directory}/{backend}", backend=backend).__aenter__()
        rest = iter(range(loops))
        await asyncio.gather(*(work(self.awaited[backend], rest) for _ in range(in_flight)))

    async def gets(self, cache: Any, rest: Any) -> None:
        for i in rest:
            await cache.get(self.keys[i % ENTRIES])

    async def sets(self, cache: Any, rest: Any) -> None:
        for i in rest:
            await cache.set(self.keys[i % ENTRIES], self.value)

    def close(self) -> None:
        for cache in self.awaited.values():
            self.loop.run_until_complete(cache.close())
        self.cache.close()
        self.loop.close()


def serve(lab: Lab) -> None:
    cases = lab.cases([])
    print("ready", "\t".join(cases), sep="\t", flush=True)
    gc.disable()  # collections fall where they like: that is noise
    for line in sys.stdin:
        name, loops = line.rstrip("\n").split("\t")
        start = time.perf_counter()
        cases[name](int(loops))
        print(time.perf_counter() - start, flush=True)
        gc.collect()


def once(lab: Lab, only: list[str], mark: Callable[[str], object]) -> dict[str, int]:
    gc.disable()
    done: dict[str, int] = {}
    for name, work in lab.cases(only).items():
        loops = done[name] = COUNTED // 10 if "_many" in name else COUNTED
        work(loops)  # warm
        mark(name)
        work(loops)
        mark("end")
    return done


def main() -> None:
    mode, directory, *only = sys.argv[1:]
    tree = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    assert yatagarasu_cache.__file__.startswith(tree), f"not the one in {tree}"
    lab = Lab(directory)
    if mode == "serve":
        serve(lab)
    elif mode == "count":
        print(json.dumps(once(lab, only, lambda name: os.getppid())))
    else:
        print(json.dumps(once(lab, only, lambda name: os.access(MARK + name, 0))))
    lab.close()


if __name__ == "__main__":
    main()
