"""A server that forks a process for every task, as Celery, `gunicorn --preload --max-requests 1` and
`Pool(maxtasksperchild=1)` do: DIRECTORY LIMIT TASKS HOW.

The child stores one small value, with the handle that it inherited or with one that it opens, and
leaves with `os._exit`. Every fiftieth is killed in the middle of storing many. Prints, as JSON, the
exit statuses and how many of its values each killed one had acknowledged.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from apps.stock import child, status_of, stock
from helpers import noise

from yatagarasu_cache import DiskCache

VALUE = 2000
BUSY = 200  # values at most of one that is killed


def main(directory: str, limit: int, tasks: int, how: str) -> None:
    cache = DiskCache(directory, size_limit=limit)
    cache.set_many(stock(limit // 10, 200))

    def handle() -> DiskCache:
        return cache if how == "inherited" else DiskCache(directory, size_limit=limit)

    def task(number: int) -> None:
        mine = handle()
        mine.set(("new", number), noise(VALUE, number))
        mine.incr("tasks")

    def busy(number: int, acknowledge: int) -> None:
        mine = handle()
        for turn in range(BUSY):
            mine.set(("busy", number, turn), noise(VALUE, turn))
            os.write(acknowledge, b".")
        signal.pause()

    statuses, killed = [], {}
    for number in range(tasks):
        statuses.append(status_of(child(lambda number=number: task(number))))
        if number % 50 == 49:
            receive, acknowledge = os.pipe()
            pid = child(lambda number=number, acknowledge=acknowledge: busy(number, acknowledge))
            os.close(acknowledge)
            done = sum(len(os.read(receive, 1)) for _ in range(5))
            os.kill(pid, signal.SIGKILL)
            while part := os.read(receive, 1 << 16):
                done += len(part)
            os.close(receive)
            assert status_of(pid) == -signal.SIGKILL
            killed[number] = done
    print(json.dumps({"statuses": statuses, "killed": killed}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
