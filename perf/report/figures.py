"""The figures that the portable cache promises, each measured beside what is asked.

    python -m perf.report.figures [--quick] [--backend threads] [--json FILE] [--readme]

Needs `diskcache`, the peer. `--quick` uses 100,000 entries where a million are promised. `--readme`
puts the table into README.md, between its two marks; a full `python -m perf report` does so too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diskcache

from perf.bed import disk_bytes, drop_caches, scratch
from perf.report import batteries, compatible
from perf.report.machine import describe
from perf.report.rows import Row, table
from perf.timing import compare, latencies, per_call, percentile
from yatagarasu_cache import DiskCache
from yatagarasu_cache.store import compiled

VALUE = bytes(range(256)) * 16  # 4 KiB
SMALL = b"x" * 100
BYTES_WHEN_FULL = 570  # of size_limit for each such entry in a full cache, with index and headroom
HOT_ENTRIES = 3000


def against_diskcache(path: str, backend: str) -> Iterator[Row]:
    keys = [f"key-{i}" for i in range(HOT_ENTRIES)]  # made before: that is no part of either side
    with DiskCache(f"{path}/ours", backend=backend) as ours, diskcache.Cache(f"{path}/peer") as peer:
        for what, asked, run in (
            ("4 KiB set", 8.0, lambda cache: per_call(lambda key: cache.set(key, VALUE), keys)),
            ("hot 4 KiB get", 4.0, lambda cache: per_call(cache.get, keys)),
        ):
            got = compare(lambda run=run: run(ours), lambda run=run: run(peer))  # type: ignore[misc]
            yield Row(
                f"{what}, against diskcache {diskcache.__version__}",
                f"{asked:.0f} times faster",
                f"{got.ratio:.1f} times ({got.ours * 1e6:.1f} against {got.other * 1e6:.1f} us)",
                got.ratio >= asked,
            )


def fill(cache: DiskCache, count: int, value: bytes, first: int = 0) -> None:
    for start in range(first, first + count, 1000):
        cache.set_many((f"key-{i}", value) for i in range(start, min(start + 1000, first + count)))


def opening(path: str, backend: str, count: int) -> Iterator[Row]:
    with DiskCache(f"{path}/big", backend=backend) as cache:
        fill(cache, count, SMALL)
        stats = cache.stats()
    taken = []
    for i in range(5):
        start = time.perf_counter()
        with DiskCache(f"{path}/big", backend=backend) as cache:
            assert cache.get(f"key-{i * 7}") == SMALL
            taken.append(time.perf_counter() - start)
    worst = max(taken)
    yield Row(f"opening {count:,} entries and first get", "50 ms", f"{worst * 1e3:.1f} ms", worst <= 0.05)
    each = stats.index_bytes / stats.entries
    yield Row("index, bytes an entry", "160", f"{each:.0f}", each <= 160)


def rebuilding(path: str, backend: str, count: int, asked: float) -> Row:
    """Everything from the segments: neither the index nor a checkpoint is left."""
    directory = f"{path}/rebuild-{count}"
    with DiskCache(directory, backend=backend) as cache:
        cache._store.checkpoints.begin_if_due = lambda: None  # type: ignore[method-assign]
        fill(cache, count, SMALL)
    os.unlink(f"{directory}/index")
    start = time.perf_counter()
    with DiskCache(directory, backend=backend) as cache:
        taken = time.perf_counter() - start
        assert len(cache) == count
    return Row(f"rebuild of {count:,} entries", f"{asked:g} s", f"{taken:.2f} s", taken < asked)


def steady(path: str, backend: str, size: int) -> Iterator[Row]:
    """Ten times the size through a cache that LRU keeps full, beside one with room for all."""
    total = 10 * size // len(VALUE)
    over = 0
    with (
        DiskCache(f"{path}/full", backend=backend, size_limit=size) as full,
        DiskCache(f"{path}/roomy", backend=backend, size_limit=16 * size) as roomy,
    ):
        segment = full._store.limits.segment_bytes
        fill(full, size // len(VALUE), VALUE)
        sums = [0.0, 0.0]
        for start in range(0, total, 1000):
            numbers = range(start, start + 1000)
            sums[0] += per_call(lambda i: full.set(f"key-{i}", VALUE), numbers)
            sums[1] += per_call(lambda i: roomy.set(f"key-{i}", VALUE), numbers)
            over = max(over, disk_bytes(f"{path}/full") - size)
    ratio = sums[0] / sums[1]
    yield Row("set in a full cache, mean against one with room", "2 times", f"{ratio:.2f} times", ratio <= 2)
    yield Row(
        "disk used beyond size_limit",
        f"one segment ({segment >> 10} KiB)",
        f"{max(0, over) >> 10} KiB",
        over <= segment,
    )


def longest_call(path: str, backend: str, count: int, calls: int) -> Row:
    """Single calls of `set` while a full cache of about `count` small entries evicts."""
    with DiskCache(f"{path}/many", backend=backend, size_limit=count * BYTES_WHEN_FULL) as cache:
        fill(cache, count, SMALL)
        before = cache.stats()
        taken = latencies(lambda i: cache.set(f"new-{i}", SMALL), range(calls))
        after = cache.stats()
    worst = taken[-1]
    evicted = after.evictions - before.evictions
    return Row(
        f"longest set with {after.entries:,} entries ({evicted:,} evictions)",
        "250 ms",
        f"{worst * 1e3:.0f} ms",
        worst <= 0.25 and evicted > 0,
    )


def tails(path: str, backend: str, count: int) -> Iterator[Row]:
    with DiskCache(f"{path}/tails", backend=backend) as cache:
        order = list(range(count))
        random.Random(1).shuffle(order)
        sets = latencies(lambda i: cache.set(f"key-{i}", VALUE), order)
        gets = latencies(lambda i: cache.get(f"key-{i}"), order)
        cache.flush()
    drop_caches(f"{path}/tails")
    with DiskCache(f"{path}/tails", backend=backend) as cache:
        # Not in the order in which they were written: that is the order on disk.
        cold = latencies(lambda i: cache.get(f"key-{i}"), random.Random(2).sample(order, count // 12))
    for what, asked, ordered in (
        ("set, hot", 1e-4, sets), ("get, hot", 1e-4, gets), ("get, cold", 1e-2, cold)
    ):  # fmt: skip
        value = percentile(ordered, 0.95)
        yield Row(f"P95 of {what}, 4 KiB", f"{asked * 1e3:g} ms", f"{value * 1e3:.3f} ms", value < asked)


def measure(backend: str, scale: float) -> Iterator[Row]:
    """All rows; less than 1 for `scale` makes the large ones so much smaller."""
    million = int(1_000_000 * scale)
    steps: list[Callable[[str], Any]] = [
        lambda path: against_diskcache(path, backend),
        lambda path: opening(path, backend, million),
        lambda path: [rebuilding(path, backend, 10_000, 1.0)],
        lambda path: [rebuilding(path, backend, million, 30.0)],
        lambda path: steady(path, backend, 64 << 20 if scale == 1 else 16 << 20),
        lambda path: [longest_call(path, backend, million, 3 * million // 10)],
        lambda path: tails(path, backend, 60_000 if scale == 1 else 12_000),
    ]
    for step in steps:
        with scratch() as path:
            yield from step(path)
    yield from batteries.measure(backend, scale)
    yield from compatible.measure(scale)


README = Path(__file__).resolve().parents[2] / "README.md"
MARKS = "<!-- figures:start -->", "<!-- figures:end -->"


def write_readme(rows: Iterable[Row], machine: dict[str, str], readme: Path = README) -> None:
    """The table, and what it was measured on, between the marks."""
    text = readme.read_text("utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    on = f"{machine['CPU']}, {machine['disk']}, {machine['kernel']}, {machine['Python']}"
    core = "core in Python" if compiled.load() is None else "compiled core"
    told = (
        f"Measured by `python -m perf.report.figures` (portable backend, {core}, 4 KiB values, interleaved with the peer; {on}). "
        "[More figures](perf/REPORT.md), among them those of io_uring and of other peers."
    )
    block = "\n\n".join((MARKS[0], told, table(rows), MARKS[1]))
    readme.write_text(before + block + after, "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--backend", default="threads")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    rows = []
    print(table(()))
    for row in measure(options.backend, 0.1 if options.quick else 1.0):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    if options.readme:
        with scratch() as path:
            write_readme(rows, describe(path))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([row._asdict() for row in rows], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
