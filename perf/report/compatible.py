"""The figures of what stands in for diskcache, and of the importer. Part of `perf.report.figures`, and by itself:

    python -m perf.report.compatible [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import diskcache

import yatagarasu_cache.compat.diskcache as compatible
from perf.bed import MIB, scratch
from perf.report.rows import Row, table
from perf.timing import Compared, compare, interleave, per_call, ratio

CALLS = 2000
PROCESSES, SETS = 8, 2000
VALUE = bytes(range(256)) * 16
_spawning = multiprocessing.get_context("spawn")


def faster(what: str, asked: float, got: Compared) -> Row:
    """A row about how many times as fast as diskcache ours has to be."""
    measured = f"{got.ratio:.1f} times ({got.ours * 1e6:.1f} against {got.other * 1e6:.1f} us)"
    return Row(f"{what}, against diskcache {diskcache.__version__}", f"{asked:g} times faster", measured, got.ratio >= asked)


def calls(path: str) -> Iterator[Row]:
    with compatible.Cache(f"{path}/ours") as ours, diskcache.Cache(f"{path}/peer") as peer:
        keys = [f"key-{i}" for i in range(CALLS)]
        both = [partial(per_call, lambda key, cache=cache: cache.set(key, VALUE), keys) for cache in (ours, peer)]
        yield faster("compat `Cache.set` of 4 KiB", 5, compare(*both))
        both = [partial(per_call, cache.get, keys) for cache in (ours, peer)]
        yield faster("compat `Cache.get` of 4 KiB", 2.5, compare(*both))


def store(kind: str, path: str, number: int, barrier: Any, took: Any) -> None:
    """What each of several processes does; the time that it takes, a set."""
    module: Any = compatible if kind == "ours" else diskcache
    with module.FanoutCache(f"{path}/{kind}", timeout=10) as cache:
        barrier.wait()
        start = time.perf_counter()
        for i in range(SETS):
            assert cache.set((number, i), VALUE, retry=True)
        took.put((time.perf_counter() - start) / SETS)


def many(path: str, kind: str) -> float:
    barrier, took = _spawning.Barrier(PROCESSES), _spawning.Queue()
    processes = [_spawning.Process(target=store, args=(kind, path, n, barrier, took)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    times = [took.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return max(times) / PROCESSES  # a set of all of them together


def fanout(path: str) -> Row:
    runs = {kind: partial(many, path, kind) for kind in ("ours", "peer")}
    ours, peer = interleave(runs, rounds=5, warm=True).values()
    got = Compared(median(ours), median(peer), ratio(ours, peer))
    return faster(f"compat `FanoutCache.set` of 4 KiB, {PROCESSES} processes", 5, got)


IMPORT = """
import sys
from perf.timing import private_memory
from yatagarasu_cache.compat.diskcache import import_diskcache

def imported(which):
    memory = []
    report = import_diskcache(
        f"{sys.argv[1]}/{which}", f"{sys.argv[2]}/{which}", progress=lambda *_: memory.append(private_memory())
    )
    return report, max(memory)

few, (report, most) = imported("few"), imported("many")
assert report.imported == report.total == int(sys.argv[3]), report
print(report.seconds, most - few[1])
"""


def filled(path: str, count: int) -> None:
    """What memoized functions and sessions leave: text and tuples as keys, some values that are containers."""
    with diskcache.Cache(path, size_limit=1 << 40, cull_limit=0) as cache, cache.transact():
        for i in range(count):
            cache.set(f"key-{i}" if i % 4 else ("function", i), "x" * 30 if i % 2 else {"id": i}, tag="t")


def importing(path: str, count: int) -> Iterator[Row]:
    filled(f"{path}/old/few", 20_000)
    filled(f"{path}/old/many", count)
    command = [sys.executable, "-c", IMPORT, f"{path}/old", f"{path}/new", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, memory = map(float, done.stdout.split())
    yield Row(f"import of {count:,} small entries", f"under {60 * count / 1e6:g} s", f"{seconds:.1f} s", seconds < 60 * count / 1e6)
    more = f"{memory / MIB:.0f} MiB more than for 20,000"
    yield Row("its memory, without the mapped index", "constant", more, memory < 16 * MIB)


def measure(scale: float) -> Iterator[Row]:
    """All rows; less than 1 for `scale` makes the large ones so much smaller."""
    steps: list[Callable[[str], Any]] = [
        calls, lambda path: [fanout(path)], lambda path: importing(path, int(1_000_000 * scale)),
    ]  # fmt: skip
    for step in steps:
        with scratch() as path:
            yield from step(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    print(table(()))
    for row in measure(0.1 if options.quick else 1.0):
        print(table([row]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
