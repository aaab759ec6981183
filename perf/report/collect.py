"""Runs everything that the report shows. Plain data comes back, fit for JSON."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from perf import work
from perf.bed import KIB, MIB, SIZES, cold_means, disk_bytes, scratch, value_of
from perf.bench import aio, cold, durable, eviction, hot, mixed, opening, shared, steps
from perf.peers import OURS, PEERS, RAW, usable
from perf.report import limits, machine, package
from perf.suite import Bed, Cases, Options, measure, save
from perf.timing import percentile, ratio

Results = dict[str, Any]
STRESS = 1024  # operations in flight
TRACED = 2000  # operations of a run whose system calls are counted, or more with many in flight


class Collector:
    """Holds what was found so far; one method for each part of the report."""

    def __init__(self, quick: bool, artefacts: Path) -> None:
        self.quick, self.artefacts = quick, artefacts
        self.sides, self.reasons = usable(PEERS)
        self.ours = [side for side in OURS if side in self.sides]
        self.caches = [side for side in self.sides if side not in RAW]
        self.found: Results = {"quick": quick, "sides": self.sides, "reasons": self.reasons}

    def parts(self) -> dict[str, Callable[[], Any]]:
        rounds = 3 if self.quick else 9
        few = 2 if self.quick else 4
        cold_sizes = [SIZES["4KiB"]] if self.quick else list(SIZES.values())
        in_flight = (1, 256) if self.quick else (1, 16, 64, 256, 1024)
        workers = (1, 8) if self.quick else (1, 2, 4, 8)
        patience = 0.5 if self.quick else 15.0  # seconds: a round of everybody takes 4 and more
        return {
            "machine": self.machine,
            "hot": lambda: self.bench("hot", hot.cases, rounds),
            "mixed": lambda: self.bench("mixed", mixed.cases, rounds),
            "durable": lambda: self.bench("durable", durable.cases, rounds),
            "steps": lambda: self.bench("steps", steps.cases, rounds),
            "cold": lambda: self.bench("cold", cold.cases, few, warm=False, sizes=cold_sizes),
            "asyncio": lambda: self.bench(
                "asyncio", aio.cases, few, patience, warm=False,
                sides=self.sides, in_flight=in_flight,
            ),
            "opening": lambda: self.bench("opening", opening.cases, few, warm=False),
            "eviction": lambda: self.bench("eviction", eviction.cases, rounds),
            "shared": lambda: self.bench("shared", shared.cases, few, warm=False, workers=workers),
            "tails": self.tails,
            "resources": self.resources,
            "stress": self.stress,
            "promised": self.promised,
            "limits": self.limits,
            "package": self.package,
        }

    def run(self, only: Iterable[str] = ()) -> Results:
        wanted = set(only)
        logging.getLogger("yatagarasu_cache").setLevel(logging.ERROR)  # indexes are removed on purpose
        began = time.monotonic()
        for name, part in self.parts().items():
            if not wanted or name in wanted:
                print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr, flush=True)
                self.found[name] = part()
        self.found["seconds"] = time.monotonic() - began
        return self.found

    def machine(self) -> Results:
        with scratch() as directory:
            sizes = {size: cold.set_size(size, self.quick) // MIB for size in SIZES.values()}
            return machine.describe(directory) | {"cold": cold_means(), "cold_sets": sizes}

    def bench(
        self, name: str, cases: Cases, rounds: int, seconds: float = 0.0, warm: bool = True, **options: Any
    ) -> Results:
        """No new round of a case begins after so many seconds; 0: what suits most."""
        wanted = dataclasses.replace(Options(sides=self.caches, quick=self.quick), **options)
        results = measure(cases, wanted, rounds, seconds or (0.5 if self.quick else 3.0), warm)
        for side in {side for sides in results.values() for side in sides}:
            save(str(self.artefacts / f"{name}-{side.replace(' ', '-')}.json"), results, side)
        return {
            case: {
                side: {
                    "seconds": statistics.median(taken),
                    "spread": (max(taken) - min(taken)) / statistics.median(taken),
                    # how many times faster our sides were, pair by pair
                    "ratios": {ours: ratio(sides[ours], taken) for ours in self.ours if ours in sides},
                }
                for side, taken in sides.items()
            }
            for case, sides in results.items()
        }

    def tails(self) -> Results:
        """Eight processes, one cache: medians and 99th percentiles of each action."""
        loops = 16_000 if self.quick else 80_000
        sides = [side for side in self.caches if PEERS[side].processes]
        found: dict[str, list[dict[str, dict[str, float]]]] = {side: [] for side in sides}
        with scratch() as directory:
            bed = Bed(directory)
            for _ in range(1 if self.quick else 3):
                for side in sides:
                    path = bed.path(side, "tails")
                    taken = shared.together(shared.mix(path, side, "process", 8, loops))
                    found[side].append(
                        {
                            action: {
                                "p50": percentile(one, 0.5), "p99": percentile(one, 0.99),
                                "p999": percentile(one, 0.999), "most": one[-1],
                            }
                            for action, one in taken.items()
                        }
                    )  # fmt: skip
        return {
            side: {
                action: {
                    point: statistics.median(run[action][point] for run in runs) for point in runs[0][action]
                }
                for action in ("get", "set", "delete")
            }
            for side, runs in found.items()
        }

    def resources(self) -> Results:
        """Each kind of work in processes of its own."""
        rounds = 1 if self.quick else 3
        beside = () if self.quick else ("lmdb", "diskcache")
        sides = [*self.ours, *(side for side in beside if side in self.caches)]
        found: Results = {}
        tracing = work.can_trace()
        with scratch() as directory:
            bed = Bed(directory)
            for size, name in ((4 * KIB, "4 KiB"), (10 * MIB, "10 MiB")):
                count = cold.set_size(size, self.quick) // size
                for what, kind, in_flight, from_disk, operations in SCENARIOS[name]:
                    if self.quick and operations > 8:
                        operations //= 4
                    keywords: dict[str, Any] = {"size": size, "in_flight": in_flight, "cold": count if from_disk else 0}
                    runs: dict[str, list[Results]] = {side: [] for side in sides}
                    for _ in range(rounds):
                        for side in sides:
                            path = bed.filled(side, f"cold-{size}", count, value_of(size))
                            runs[side].append(work.run(side, path, kind, operations, **keywords))
                    rows = {side: _median_run(taken) for side, taken in runs.items()}
                    # Of a quick run, only what this is about.
                    traced_here = tracing and (not self.quick or (size < MIB and in_flight == 256))
                    for side in sides if traced_here else ():
                        path = bed.filled(side, f"cold-{size}", count, value_of(size))
                        # Of the middle half of these the calls are counted, see `work.system_calls`.
                        traced = min(operations, max(TRACED, 4 * in_flight))
                        calls = work.system_calls(side, path, kind, traced, **keywords)
                        rows[side]["calls"] = sum(calls.values())
                        rows[side]["by_name"] = dict(list(calls.items())[:4])
                    found.setdefault(name, {})[what] = rows
        return found

    def stress(self) -> Results:
        """Many operations at once for a while: nothing fails, memory and descriptors stay level."""
        count = 20_000 if self.quick else 200_000
        found: Results = {}
        with scratch() as directory:
            bed = Bed(directory)
            for side in self.ours:
                path = bed.filled(side, "stress", work.HOT, value_of(4 * KIB))
                found[side] = work.run(side, path, "mix", count, in_flight=STRESS)
                found[side]["disk"] = disk_bytes(path)
        return found

    def promised(self) -> list[Results]:
        try:
            from perf.report import figures
        except ImportError as error:
            return [{"what": str(error), "asked": "", "measured": "not measured", "reached": False}]
        scale = 0.05 if self.quick else 1.0
        return [row._asdict() for row in figures.measure(self.ours[0].removeprefix("ours-"), scale)]

    def limits(self) -> list[Results]:
        with scratch() as directory:
            return [limit._asdict() for limit in limits.limits(directory, self.quick)]

    def package(self) -> Results:
        runs = 5 if self.quick else 21
        with scratch() as directory:
            built = package.build(directory)
        return {
            "import with": package.import_seconds((), runs),
            "import without": package.import_seconds(package.MODULES, runs),
            **{name: one if isinstance(one, str) else one._asdict() for name, one in built.items()},
        }


# what, kind of work, in flight, cold, operations
SCENARIOS: dict[str, list[tuple[str, str, int, bool, int]]] = {
    "4 KiB": [
        ("hot get, a loop", "get", 0, False, 20_000),
        ("cold get, a loop", "get", 0, True, 2000),
        ("cold get_many of 500", "get_many", 0, True, 4000),
        ("hot get, 256 in flight", "get", 256, False, 20_000),
        ("cold get, 256 in flight", "get", 256, True, 4000),
        ("cold get, 1024 in flight", "get", 1024, True, 4000),
        ("set, a loop", "set", 0, False, 8000),
        ("set, 256 in flight", "set", 256, False, 8000),
        ("mix 70/30, 256 in flight", "mix", 256, False, 8000),
    ],
    "10 MiB": [
        ("hot get, a loop", "get", 0, False, 40),
        ("cold get, a loop", "get", 0, True, 8),
        ("cold get, 10 in flight", "get", 10, True, 20),
        ("set, a loop", "set", 0, False, 16),
        ("set, 10 in flight", "set", 10, False, 16),
    ],
}


def _median_run(runs: list[Results]) -> Results:
    """Of each figure the median of all runs."""
    return {
        name: statistics.median(run[name] for run in runs)
        for name, one in runs[0].items()
        if isinstance(one, (int, float))
    }
