"""What computing once costs: a hit beside a bare get, the turn of one that is killed, and a crowd at cold keys.

python -m perf.computing [--quick]

A hit is timed in turn with a `get` of the same key, and the difference of each pair counts. The turn: another
process computes, and is killed while this one waits; the time until this one computes. The crowd: 4 processes
of 50 threads, and of 50 tasks, ask for 5 keys whose values take 0.2 s each.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yatagarasu_cache import AsyncDiskCache, DiskCache

APP = Path(__file__).parents[1] / "tests" / "apps" / "computing.py"
VALUES = {"100 bytes": b"x" * 100, "a small dict": {"a": 1, "b": [1, 2]}}


def unreachable() -> Any:
    raise AssertionError("it is a hit")


def timed(call: Callable[[], object], loops: int) -> float:
    """Microseconds of one call."""
    began = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - began) / loops * 1e6


def hits(directory: str, rounds: int, loops: int) -> None:
    with DiskCache(directory) as cache:
        for name, value in VALUES.items():
            cache.set(name, value, expire=3600)
            pairs = []
            for _ in range(rounds):
                bare = timed(lambda name=name: cache.get(name), loops)
                hit = timed(lambda name=name: cache.get_or_set(name, unreachable, expire=3600), loops)
                pairs.append((bare, hit))
            report(f"hit of {name}", pairs)


def async_hits(directory: str, rounds: int, loops: int) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory) as cache:
            for name, value in VALUES.items():
                await cache.set(name, value, expire=3600)
                pairs = []
                for _ in range(rounds):
                    began = time.perf_counter()
                    for _ in range(loops):
                        await cache.get(name)
                    middle = time.perf_counter()
                    for _ in range(loops):
                        await cache.get_or_set(name, unreachable, expire=3600)
                    end = time.perf_counter()
                    pairs.append(((middle - began) / loops * 1e6, (end - middle) / loops * 1e6))
                report(f"asyncio: hit of {name}", pairs)

    asyncio.run(main())


def report(what: str, pairs: list[tuple[float, float]]) -> None:
    bare, hit = (statistics.median(one) for one in zip(*pairs, strict=True))
    more = statistics.median(hit - bare for bare, hit in pairs)
    print(f"{what}: get {bare:.2f} us, get_or_set {hit:.2f} us, {more:+.2f} us")


HOLDER = """
import os, sys, time
from yatagarasu_cache import DiskCache
def function():
    os.write(1, b".")
    time.sleep(1000)
DiskCache(sys.argv[1]).get_or_set("k", function)
"""


def turns(directory: str, rounds: int) -> None:
    """Milliseconds from the kill until another process computes."""
    taken = []
    with DiskCache(directory) as cache:
        for _ in range(rounds):
            cache.delete("k")
            owner = subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE)
            assert owner.stdout is not None and owner.stdout.read(1) == b"."
            read, write = os.pipe()
            killer = os.fork()
            if not killer:
                time.sleep(0.1)
                os.write(write, str(time.monotonic_ns()).encode().ljust(32))
                os.kill(owner.pid, signal.SIGKILL)
                os._exit(0)
            began = cache.get_or_set("k", time.monotonic_ns)
            taken.append((began - int(os.read(read, 32))) / 1e6)
            os.waitpid(killer, 0)
            owner.wait()
            os.close(read)
            os.close(write)
    print(f"turn of one that was killed: median {statistics.median(taken):.1f} ms, most {max(taken):.1f} ms of {rounds}")


def crowd(directory: str, how: str) -> None:
    log = os.path.join(directory, f"log-{how}")
    place = os.path.join(directory, how)
    DiskCache(place).close()
    command = [sys.executable, str(APP), place, log, how, "50", "5", "0.2"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    answers = [sum(json.loads(process.communicate()[0]).values()) for process in processes]
    seconds = time.perf_counter() - began
    computed = sum(line.startswith("begun") for line in Path(log).read_text().splitlines())
    print(f"4 processes of 50 {how}, 5 keys, 0.2 s each: {computed} computations, {sum(answers)} answers, {seconds:.2f} s")


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        hits(os.path.join(directory, "cache"), 5 if quick else 200, 200 if quick else 2000)
        async_hits(os.path.join(directory, "cache"), 5 if quick else 200, 200 if quick else 2000)
        turns(os.path.join(directory, "cache"), 3 if quick else 50)
        for how in ("threads", "tasks"):
            crowd(directory, how)


if __name__ == "__main__":
    main()
