"""A cache under a steady load for a while: is it as quick, as small and as right at the end?

    python -m perf.soak [--minutes 10] [--rate 1000] [--backend auto|threads|uring]

So many operations a second through asyncio on a full cache: 70 % `get`, 28 % `set`, 2 % `delete`,
values of 1 byte to 64 KiB and now and then one of 2 MiB, twice as many keys as there is room for, so
that something is evicted all the time. Every value says which key it belongs to, and every byte that
comes back is compared. An operation's time counts from the moment when it was due: falling behind
shows. The exit status is 1 if a byte was wrong, an operation failed, memory or descriptors grew, the
limit on disk was exceeded by more than one segment, or the rate was not kept; else 0.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perf.bed import KIB, MIB, disk_bytes, scratch, value_of
from perf.work import descriptors, resident
from yatagarasu_cache import AsyncDiskCache

LIMIT = 64 * MIB
TICK = 0.001  # seconds: what falls due within one is begun at once
SAMPLES = 60  # of memory and descriptors
MEMORY_GROWTH = 8 * MIB  # more than so much from the middle third to the last one is growth
DESCRIPTOR_GROWTH = 8
LARGE, LARGE_SHARE = 2 * MIB, 0.0005
BLOCK = value_of(LARGE + 64 * KIB)
KEYS = 2 * LIMIT // (6 * KIB)  # values have 6 KiB on average: of 1 byte to 64 KiB, small ones the more often


class Sample(NamedTuple):
    memory: int
    descriptors: int
    disk: int


class Latencies:
    """How many were how long, to 2 %: it takes no more memory after hours than after a minute."""

    STEP = math.log(1.02)

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.number, self.longest = 0, 0.0

    def add(self, seconds: float) -> None:
        self.counts[int(math.log(max(seconds, 1e-7)) // self.STEP)] += 1
        self.number += 1
        self.longest = max(self.longest, seconds)

    def percentile(self, share: float) -> float:
        left = self.number * share
        for step, count in sorted(self.counts.items()):
            left -= count
            if left < 0:
                return min(self.longest, math.exp((step + 1) * self.STEP))
        return self.longest


@dataclass
class Found:
    """What was seen so far."""

    latencies: Latencies = field(default_factory=Latencies)
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def problem(self, text: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)


def value_for(number: int, size: int) -> bytes:
    """The entry's number, then bytes that belong to it and to this size."""
    head = b"%d:%d:" % (number, size)
    start = (number * 7919 + size) % (64 * KIB)
    return head + BLOCK[start : start + size]


def is_right(number: int, value: object) -> bool:
    """Whether it is what was stored under this key at some time, to the byte."""
    if not isinstance(value, bytes):
        return False
    try:
        owner, size, _ = value.split(b":", 2)
        return int(owner) == number and value == value_for(number, int(size))
    except ValueError:
        return False


def some_size(pick: random.Random) -> int:
    if pick.random() < LARGE_SHARE:
        return LARGE
    return int(2 ** pick.uniform(0, 16))


async def operate(cache: Any, pick: random.Random, due: float, found: Found) -> None:
    number, choice = pick.randrange(KEYS), pick.random()
    what = "get" if choice < 0.7 else "set" if choice < 0.98 else "delete"
    try:
        if what == "get":
            value = await cache.get(f"key-{number}")
            found.counts["hits"] += value is not None
            if value is not None and not is_right(number, value):
                found.problem(f"a wrong value for key-{number}")
        elif what == "set":
            await cache.set(f"key-{number}", value_for(number, some_size(pick)))
        else:
            await cache.delete(f"key-{number}")
    except Exception as error:
        found.problem(f"{what} of key-{number}: {error!r}")
    found.counts[what] += 1
    found.latencies.add(time.perf_counter() - due)


async def soak(directory: str, backend: str, seconds: float, rate: float, found: Found) -> dict[str, Any]:
    """The load; the cache's statistics at its end."""
    pick = random.Random(1)
    async with AsyncDiskCache(directory, backend=backend, size_limit=LIMIT) as cache:
        for number in range(KEYS):  # until it is full and evicts
            await cache.set(f"key-{number}", value_for(number, some_size(pick)))
        tasks: set[asyncio.Task[None]] = set()
        start = time.perf_counter()
        begun, next_sample = 0, 0.0
        while (now := time.perf_counter() - start) < seconds:
            while begun < rate * now:
                task = asyncio.ensure_future(operate(cache, pick, start + begun / rate, found))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                begun += 1
            if now >= next_sample:
                found.samples.append(Sample(resident(), descriptors(), disk_bytes(directory)))
                next_sample += seconds / SAMPLES
            await asyncio.sleep(TICK)
        if tasks:
            await asyncio.wait(tasks)
        found.seconds = time.perf_counter() - start
        stats: dict[str, Any] = (await cache.stats()).as_dict()
    return stats


def growth(samples: Sequence[int]) -> int:
    """From the highest of the middle third to the highest of the last one."""
    third = len(samples) // 3
    return max(samples[2 * third :]) - max(samples[third : 2 * third] or samples[:1])


def complaints(found: Found, rate: float, segment: int) -> list[str]:
    """Everything that must not be."""
    wrong = list(found.problems)
    memory, files, disk = zip(*found.samples, strict=True)
    if (grown := growth(memory)) > MEMORY_GROWTH:
        wrong.append(f"memory grew by {grown / MIB:.1f} MiB")
    if (grown := growth(files)) > DESCRIPTOR_GROWTH:
        wrong.append(f"{grown} more descriptors than before")
    if (over := max(disk) - LIMIT) > segment:
        wrong.append(f"{over} bytes on disk beyond the limit")
    reached = found.latencies.number / found.seconds
    if reached < 0.95 * rate:
        wrong.append(f"{reached:,.0f} operations a second instead of {rate:,.0f}")
    return wrong


def show(found: Found, stats: dict[str, Any]) -> None:
    taken = found.latencies
    memory, files, disk = zip(*found.samples, strict=True)
    points = {"P50": 0.5, "P99": 0.99, "P99.9": 0.999}
    times = ", ".join(f"{name} {taken.percentile(share) * 1e3:.2f}" for name, share in points.items())
    gets = found.counts["get"] or 1
    print(f"backend      {stats['backend']}, core {stats['core']}")
    print(f"operations   {taken.number:,} in {found.seconds:.0f} s, {taken.number / found.seconds:,.0f} a second")
    print(f"latency      {times}, longest {taken.longest * 1e3:.2f} ms")
    print(f"hits         {found.counts['hits'] / gets:.0%} of {gets:,} gets; {stats['evictions']:,} evictions")
    print(f"memory       {memory[0] / MIB:.1f} MiB at first, {memory[-1] / MIB:.1f} at last, growth {growth(memory) / MIB:+.1f}")
    print(f"descriptors  {files[0]} at first, {files[-1]} at last, growth {growth(files):+d}")
    print(f"on disk      {max(disk) / MIB:.1f} MiB at most, limit {LIMIT / MIB:.0f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.soak", description="A steady load for a while.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="operations a second")
    parser.add_argument("--backend", choices=("auto", "threads", "uring"), default="auto")
    options = parser.parse_args(arguments)
    found = Found()
    with scratch() as directory:
        stats = asyncio.run(soak(directory, options.backend, options.minutes * 60, options.rate, found))
    show(found, stats)
    # A segment's size is a thirty-second part of the limit, or 64 MiB at most.
    wrong = complaints(found, options.rate, LIMIT // 32)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    if found.counts["problems"] > len(found.problems):
        print(f"FAILED: and {found.counts['problems'] - len(found.problems)} more", file=sys.stderr)
    if not wrong:
        print("every byte was right, nothing grew")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
