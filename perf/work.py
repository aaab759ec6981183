"""One kind of work on one side, in a process of its own: what it takes of the machine.

    python -m perf.work SIDE DIRECTORY WORK COUNT [--size BYTES] [--in-flight N] [--cold N] [--trace]

Prints one JSON object: operations, seconds, latencies, CPU time, context switches, memory,
descriptors. WORK is get, set, get_many or mix. The directory must have been filled; `--cold N`
says with how many entries, and drops its caches. With `--trace`, nothing but the work lies between
two system calls on `BEGIN` and `END`, so that `strace` can be told to count (see `system_calls`): they
come when a quarter of the work is done and when three quarters are. So neither the start (opening
files, making rings, starting threads) nor the end (ever fewer in flight) is in what is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from perf.bed import drop_caches, value_of
from perf.peers import PEERS, RAW
from perf.timing import Usage, peak_memory, percentile

BEGIN, END = "/yatagarasu-perf-begin", "/yatagarasu-perf-end"
BATCH = 500
HOT = 2000
QUARTERS = 4
ROOT = Path(__file__).resolve().parent.parent


def run(
    side: str, directory: str, work: str, count: int, *, strace: str = "", size: int = 4096,
    in_flight: int = 0, cold: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """`perf.work` in a new process; its result. `strace` names a file for the trace."""
    command = [sys.executable, "-m", "perf.work", side, directory, work, str(count)]
    command += ["--size", str(size), "--in-flight", str(in_flight), "--cold", str(cold)]
    if strace:
        command = ["strace", "-f", "-qq", "-o", strace, *command, "--trace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def can_trace() -> bool:
    """Whether `strace` is there and may be used."""
    if not shutil.which("strace"):
        return False
    return not subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True).returncode


def system_calls(side: str, directory: str, work: str, count: int, **more: int) -> dict[str, float]:
    """System calls an operation by name, of all threads, the most frequent first.

    Of the middle half of `count` operations, see above.
    """
    with tempfile.NamedTemporaryFile("r", prefix="yatagarasu-strace-") as file:
        operations = run(side, directory, work, count, strace=file.name, **more)["traced"]
        counted: Counter[str] = Counter()
        counting = False
        for line in file:
            if BEGIN in line or END in line:
                counting = BEGIN in line
            elif counting and (call := re.match(r"\d+\s+(\w+)\(", line)):
                counted[call[1]] += 1
        return {name: number / operations for name, number in counted.most_common()}


class Meter:
    """Times single calls; knows the process's use at begin, end and quarters."""

    def __init__(self, trace: bool, count: int) -> None:
        """`count` calls are to come."""
        self.trace, self.count, self.each = trace, count, max(1, count // QUARTERS)
        self.latencies: list[float] = []
        self.memory: list[int] = []
        # After so many calls it begins to count, after so many it ends. Each is at least one call away.
        self.marks = {self.each: BEGIN, max(self.each + 1, count * 3 // 4): END} if trace else {}

    def begin(self) -> None:
        self.start = Usage.now()

    def end(self) -> None:
        self.used = Usage.now().since(self.start)

    def note(self, seconds: float) -> None:
        self.latencies.append(seconds)
        done = len(self.latencies)
        if done in self.marks:
            os.access(self.marks[done], 0)
        elif not self.trace and done % self.each == 0:
            self.memory.append(resident())

    def result(self, operations: int) -> dict[str, Any]:
        used, ordered = self.used, sorted(self.latencies)
        points = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}
        return {
            "operations": operations,
            "traced": self.traced() * operations / self.count,
            "seconds": used.wall,
            "throughput": operations / used.wall,
            "cpu": used.cpu / operations,
            "waits": used.waits / operations,
            "preempted": used.preempted / operations,
            "peak_memory": peak_memory(),
            "memory": self.memory,
            "descriptors": descriptors(),
            **{name: percentile(ordered, share) for name, share in points.items()},
        }

    def traced(self) -> int:
        """Calls between the two marks."""
        first, last = sorted(self.marks) or (0, 0)
        return last - first


def resident() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def operations(work: str, count: int, entries: int) -> list[tuple[bool, int]]:
    """(is it a get, entry) of each operation: all different ones where that is possible."""
    pick = random.Random(os.urandom(8))
    numbers = pick.sample(range(entries), min(count, entries))
    reads = {"get": 1.0, "get_many": 1.0, "set": 0.0, "mix": 0.7}[work]
    return [(pick.random() < reads, numbers[i % len(numbers)]) for i in range(count)]


def synchronous(args: argparse.Namespace, meter: Meter, todo: list[tuple[bool, int]]) -> int:
    peer, value = PEERS[args.side](args.directory, size=args.size), value_of(args.size)
    clock = time.perf_counter
    if not args.cold:
        for _, number in todo[:HOT]:
            peer.get(peer.key(number))
    calls: list[Callable[[], Any]]
    if args.work == "get_many":
        keys = [peer.key(number) for _, number in todo]
        batches = [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]
        calls = [partial(peer.get_many, batch) for batch in batches]
    else:
        calls = [
            partial(peer.get, peer.key(number)) if is_get else partial(peer.set, peer.key(number), value)
            for is_get, number in todo
        ]
    meter.begin()
    for call in calls:
        start = clock()
        call()
        meter.note(clock() - start)
    meter.end()
    peer.close()
    return len(todo)


async def asynchronous(args: argparse.Namespace, meter: Meter, todo: list[tuple[bool, int]]) -> int:
    kind, value, clock = PEERS[args.side], value_of(args.size), time.perf_counter
    async with kind.asynchronous(args.directory) as cache:
        if not args.cold:
            for _, number in todo[:HOT]:
                await cache.get(kind.key(number))
        work = iter([(is_get, kind.key(number)) for is_get, number in todo])

        async def worker() -> None:
            for is_get, key in work:
                start = clock()
                await (cache.get(key) if is_get else cache.set(key, value))
                meter.note(clock() - start)

        meter.begin()
        await asyncio.gather(*(worker() for _ in range(args.in_flight)))
        meter.end()
    return len(todo)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=[name for name in PEERS if name not in RAW])
    parser.add_argument("directory")
    parser.add_argument("work", choices=("get", "set", "get_many", "mix"))
    parser.add_argument("count", type=int)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--in-flight", type=int, default=0, help="0: no asyncio")
    parser.add_argument("--cold", type=int, default=0, help="entries in the directory")
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    entries = args.cold or max(4, min(HOT, (80 << 20) // args.size))
    todo = operations(args.work, args.count, entries)
    if args.cold:
        drop_caches(args.directory)
    calls = -(-args.count // BATCH) if args.work == "get_many" else args.count
    meter = Meter(args.trace, calls)
    if args.in_flight:
        done = asyncio.run(asynchronous(args, meter, todo))
    else:
        done = synchronous(args, meter, todo)
    print(json.dumps(meter.result(done)))


if __name__ == "__main__":
    main()
