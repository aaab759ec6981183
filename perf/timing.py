"""How everything here is timed: both sides interleaved in one run, and the median of the ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Run = Callable[[], float]  # does some work and returns seconds an operation


class Compared(NamedTuple):
    """Two sides, seconds an operation, and the median of the pairs' ratios (other / ours)."""

    ours: float
    other: float
    ratio: float


def compare(ours: Run, other: Run, rounds: int = 9) -> Compared:
    """Run both in turn, first a warm-up; the machine's mood then hits both alike."""
    ours(), other()
    pairs = [(ours(), other()) for _ in range(rounds)]
    return Compared(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def per_call(function: Callable[[int], object], numbers: Sequence[int]) -> float:
    """Seconds a call of ``function(number)``, loop included."""
    gc.collect()
    start = time.perf_counter()
    for number in numbers:
        function(number)
    return (time.perf_counter() - start) / len(numbers)


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
