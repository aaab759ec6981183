"""One of several processes that ask for the same values: DIRECTORY LOG HOW CALLERS KEYS SECONDS.

HOW: "threads" or "tasks". Each computation takes SECONDS and notes "begun PID KEY" and "done PID KEY" in LOG.
It begins when a line comes on standard input. Prints, as JSON, how often each value was received.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import Any

from yatagarasu_cache import AsyncDiskCache, DiskCache


class Log:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, what: str, key: object) -> None:
        os.write(self._fd, f"{what} {os.getpid()} {key}\n".encode())


def by_threads(directory: str, log: Log, callers: int, keys: int, seconds: float) -> list[Any]:
    found: list[Any] = []
    with DiskCache(directory) as cache:

        def compute(key: int) -> list[int]:
            log.note("begun", key)
            time.sleep(seconds)
            log.note("done", key)
            return [key]

        def ask(n: int) -> None:
            key = n % keys
            found.append(cache.get_or_set(key, lambda: compute(key), expire=3600))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(callers)]
        print("ready", flush=True)
        sys.stdin.readline()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def by_tasks(directory: str, log: Log, callers: int, keys: int, seconds: float) -> list[Any]:
    async def main() -> list[Any]:
        async with AsyncDiskCache(directory) as cache:

            async def compute(key: int) -> list[int]:
                log.note("begun", key)
                await asyncio.sleep(seconds)
                log.note("done", key)
                return [key]

            print("ready", flush=True)
            sys.stdin.readline()
            keys_asked = [n % keys for n in range(callers)]
            return await asyncio.gather(
                *(cache.get_or_set(key, lambda key=key: compute(key), expire=3600) for key in keys_asked)
            )

    return asyncio.run(main())


def main(directory: str, log: str, how: str, callers: str, keys: str, seconds: str) -> None:
    work = by_threads if how == "threads" else by_tasks
    found = work(directory, Log(log), int(callers), int(keys), float(seconds))
    print(json.dumps(Counter(map(str, found))))


if __name__ == "__main__":
    main(*sys.argv[1:])
