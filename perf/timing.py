"""How everything here is timed: all sides interleaved in one run, and the median of the ratios."""

from __future__ import annotations

import gc
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Run = Callable[[], float]  # does some work and returns seconds an operation


class Compared(NamedTuple):
    """Two sides, seconds an operation, and the median of the pairs' ratios (other / ours)."""

    ours: float
    other: float
    ratio: float


def interleave(
    runs: Mapping[str, Run], rounds: int = 9, seconds: float = math.inf, warm: bool = True
) -> dict[str, list[float]]:
    """Run all sides in turn, first a warm-up; the machine's mood then hits all alike.

    Each round has an order of its own: what one leaves behind (dirty pages, background work) does
    not always fall to the same neighbour.

    No further round begins after so many seconds of rounds.
    """
    names = list(runs)
    for name in names if warm else ():
        runs[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.monotonic() + seconds
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for name in random.Random(i).sample(names, len(names)):
            taken[name].append(runs[name]())
    return taken


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """The median of the pairs' ratios: above 1 where ours took less time."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def compare(ours: Run, other: Run, rounds: int = 9) -> Compared:
    """Two sides, interleaved."""
    a, b = interleave({"ours": ours, "other": other}, rounds).values()
    return Compared(statistics.median(a), statistics.median(b), ratio(a, b))


def per_call(function: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    """Seconds a call of ``function(argument)``, loop included."""
    gc.collect()
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return (time.perf_counter() - start) / len(arguments)


def latencies(function: Callable[[int], object], numbers: Sequence[int]) -> list[float]:
    """Seconds of each call, sorted."""
    clock, taken = time.perf_counter, []
    for number in numbers:
        start = clock()
        function(number)
        taken.append(clock() - start)
    return sorted(taken)


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Usage(NamedTuple):
    """What the process has used so far; subtract two for what lies between."""

    wall: float  # seconds
    cpu: float  # seconds, user and system, all threads, the kernel's for us included
    waits: int  # voluntary context switches
    preempted: int  # involuntary ones

    @classmethod
    def now(cls) -> Usage:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_nvcsw, used.ru_nivcsw)

    def since(self, start: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(self, start, strict=True)))  # type: ignore[arg-type]


def private_memory() -> int:
    """Bytes of resident memory that are this process's alone: without what is mapped of files, such as an index,
    which is the kernel's cache and grows with it. 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


def peak_memory() -> int:
    """Bytes of resident memory at its highest since the program began (not its parent's: `ru_maxrss`)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
