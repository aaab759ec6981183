"""What all benchmarks share: cases, the bed they lie on, and two ways to run them.

A module of `perf.bench` yields `Case`s. Run by itself (``python -m perf.bench.hot --backend uring``)
it is a pyperf benchmark, with processes, calibration and all of pyperf's options. For the report,
`measure` runs the sides of a case interleaved in one process, and keeps what it found in
pyperf's format, so that ``pyperf compare_to`` reads both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from perf.bed import SIZES, scratch
from perf.peers import CACHES, OURS, PEERS, Peer, usable
from perf.timing import interleave

IN_FLIGHT = (1, 16, 64, 256, 1024)
WORKERS = (1, 2, 4, 8)


class Case(NamedTuple):
    """One thing to be timed on one side. Cases of the same name come one behind the other."""

    name: str
    side: str
    loops: int  # operations of one sample in the report
    time: Callable[[int], float]  # seconds that so many operations take


@dataclass
class Options:
    """What is to be measured."""

    sides: list[str] = field(default_factory=lambda: list(CACHES))
    sizes: list[int] = field(default_factory=lambda: list(SIZES.values()))
    in_flight: tuple[int, ...] = IN_FLIGHT
    workers: tuple[int, ...] = WORKERS
    quick: bool = False


class Bed:
    """A scratch directory with the peers that were asked for, each opened once and filled."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._open: dict[tuple[str, str], Peer] = {}
        self._filled: set[str] = set()

    def path(self, side: str, label: str) -> str:
        path = os.path.join(self.directory, f"{PEERS[side].files or side}-{label}")
        os.makedirs(path, exist_ok=True)
        return path

    def peer(self, side: str, label: str, durable: bool = False, fill: tuple[int, bytes] = (0, b"")) -> Peer:
        """An open peer in a directory that only it uses, at first filled with (count, value)."""
        if (side, label) not in self._open:
            path = os.path.join(self.directory, f"open-{side}-{label}")
            os.makedirs(path, exist_ok=True)
            self._open[side, label] = PEERS[side](path, durable)
            if fill[0]:
                self._open[side, label].fill(*fill)
        return self._open[side, label]

    def filled(self, side: str, label: str, count: int, value: bytes) -> str:
        """A directory with `count` entries that nobody has open; those of one format share it."""
        path = self.path(side, label)
        if path not in self._filled:
            self._filled.add(path)
            peer = PEERS[side](path, size=len(value))
            peer.fill(count, value)
            peer.close()
        return path

    def close(self) -> None:
        for peer in self._open.values():
            peer.close()
        self._open.clear()


def timed(function: Callable[[Any], object], arguments: Iterable[Any]) -> float:
    """Seconds for a call with each of `arguments`."""
    arguments = list(arguments)
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return time.perf_counter() - start


Cases = Callable[[Bed, Options], Iterator[Case]]
Results = dict[str, dict[str, list[float]]]  # case -> side -> seconds an operation, a sample each


def measure(
    cases: Cases, options: Options, rounds: int, seconds: float = math.inf, warm: bool = True
) -> Results:
    """All sides of each case, interleaved; no new round of a case after so many seconds."""
    results: Results = {}
    with scratch() as directory:
        bed = Bed(directory)
        for name, group in groupby(cases(bed, options), key=lambda case: case.name):
            runs = {case.side: _sample(case) for case in group}
            os.sync()  # nobody pays for what the case before left to be written
            results[name] = interleave(runs, rounds, seconds, warm)
        bed.close()
    return results


def _sample(case: Case) -> Callable[[], float]:
    return lambda: case.time(case.loops) / case.loops


def save(path: str, results: Results, side: str) -> None:
    """One side's samples as a pyperf suite (its JSON format, version 1.0)."""
    benchmarks = [
        {
            "metadata": {"name": name},
            "runs": [{"metadata": {}, "values": [value]} for value in sides[side]],
        }
        for name, sides in results.items()
        if sides.get(side)
    ]
    if benchmarks:
        with open(path, "w", encoding="utf-8") as file:
            metadata = {"unit": "second", "description": f"perf, {side}"}
            json.dump({"version": "1.0", "metadata": metadata, "benchmarks": benchmarks}, file)


def main(cases: Cases, module: str) -> None:
    """Run `cases` under pyperf."""
    import pyperf

    runner = pyperf.Runner(program_args=["-m", module], add_cmdline_args=_pass_on)
    runner.argparser.add_argument("--backend", choices=("threads", "uring", "both"), default="threads")
    runner.argparser.add_argument("--peers", default="", help="names, separated by commas, or all")
    runner.argparser.add_argument("--sizes", default=",".join(SIZES), help="value sizes")
    runner.argparser.add_argument("--json", dest="output", help="the same as --output")
    args = runner.parse_args()
    runner.args.inherit_environ = [name for name in os.environ if name.startswith(("YATAGARASU_", "TMPDIR"))]
    ours = list(OURS) if args.backend == "both" else [f"ours-{args.backend}"]
    peers = list(PEERS) if args.peers == "all" else args.peers.split(",") if args.peers else []
    sides, reasons = usable(dict.fromkeys([*ours, *peers]))
    if reasons:
        runner.argparser.error("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    sizes = [SIZES[size] for size in args.sizes.split(",")]
    with scratch() as directory:
        bed = Bed(directory)
        for case in cases(bed, Options(sides=sides, sizes=sizes)):
            alone = [case.side] == sides
            label = case.name if alone else f"{case.name} ({case.side})"
            runner.bench_time_func(label, case.time)
        bed.close()


def _pass_on(command: list[str], args: argparse.Namespace) -> None:
    """A pyperf worker gets our own options too."""
    command += ["--backend", args.backend, "--peers", args.peers, "--sizes", args.sizes]
