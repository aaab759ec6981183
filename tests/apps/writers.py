"""Many processes that write a little each and are all alive at once: DIRECTORY LIMIT PROCESSES HOW.

The cache is half full before. Each stores 50 small values, with the handle that it inherited or with
one that it opens. The first is killed in the middle of its own, a quarter when all have done theirs, a
quarter closes the handle, the others just leave. Prints, as JSON, the exit statuses of those that were
not killed and how many of its values the first had acknowledged.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

from apps.stock import child, status_of, stock
from helpers import noise

from yatagarasu_cache import DiskCache

SETS, VALUE = 50, 200
PATIENCE = 100


def main(directory: str, limit: int, processes: int, how: str) -> None:
    cache = DiskCache(directory, size_limit=limit)
    cache.set_many(stock(limit // 2, 2000))
    if how == "opened":
        cache.close()
    receive, report = os.pipe()
    wait, release = os.pipe()

    def work(number: int) -> None:
        os.close(release)
        try:
            mine = cache if how == "inherited" else DiskCache(directory, size_limit=limit)
            for turn in range(SETS):
                mine.set(("new", number, turn), noise(VALUE, turn))
                mine.incr("sets")
                if number == 0:
                    os.write(acknowledged, b".")
        finally:
            if number:
                os.write(report, b"d")
        os.read(wait, 1)  # until all have done theirs
        if number % 4 == 1:
            mine.close()

    pids = [child(lambda number=number: work(number), PATIENCE) for number in range(1, processes)]
    acknowledged_read, acknowledged = os.pipe()  # nobody else has it: it ends with its writer
    victim = child(lambda: work(0), PATIENCE)
    os.close(acknowledged)
    done = 0
    while done < SETS // 2 and (part := os.read(acknowledged_read, SETS)):
        done += len(part)
    os.kill(victim, signal.SIGKILL)
    while part := os.read(acknowledged_read, SETS):
        done += len(part)
    status_of(victim)
    finished = 0
    while finished < len(pids) and select.select([receive], [], [], PATIENCE)[0]:
        finished += len(os.read(receive, 1))
    for pid in pids[3::4]:
        os.kill(pid, signal.SIGKILL)
    os.close(release)
    statuses = [status_of(pid) for pid in pids]
    del statuses[3::4]
    print(json.dumps({"statuses": statuses, "acknowledged": done}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
