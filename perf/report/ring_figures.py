"""The figures that the ring promises against the threads backend, each measured beside what is asked.

    python -m perf.report.ring_figures [--quick] [--only NAMES] [--json FILE]

Both sides are interleaved in one process, on data that is larger than any read-ahead and dropped
from memory before each sample; what counts is the median of the pairs' ratios. Run as root, or
inodes and directories stay in memory. The comparison with `fio` and the counting of system calls
need `fio` and `strace`. `--only options` compares the ring's settings with their defaults; `writes`,
`recovery` and `warm` measure what is not done on a ring.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from perf.bed import KIB, MIB, drop_caches, files_below, scratch, value_of
from perf.peers import PEERS, ROOM
from perf.suite import timed
from perf.timing import Usage, interleave, per_call, ratio
from perf.work import can_trace, descriptors, resident, system_calls
from yatagarasu_cache import AsyncDiskCache, DiskCache, cli
from yatagarasu_cache.cli import warm

RING, THREADS = "ours-uring", "ours-threads"
SIDES = (RING, THREADS)
IN_FLIGHT = 256
BATCH = 500
HOT = 2000
SMALL, LARGE = 4 * KIB, 10 * MIB
ROUNDS, MACRO_ROUNDS = 9, 5


class Row(NamedTuple):
    """One line of the table."""

    what: str
    asked: str
    measured: str
    reached: bool


class Beds:
    """The data, filled at first use: 4 KiB values, 10 MiB values, and 4 KiB ones to be written over."""

    def __init__(self, path: str, scale: float) -> None:
        self.path, self.scale = path, scale
        self._counts: dict[str, int] = {}

    def filled(self, label: str, size: int, total: int) -> tuple[str, int]:
        """Directory and number of entries."""
        directory = os.path.join(self.path, label)
        if label not in self._counts:
            self._counts[label] = count = int(total * self.scale) // size
            peer = PEERS[THREADS](directory, size=size)
            peer.fill(count, value_of(size))
            peer.close()
        return directory, self._counts[label]

    def small(self, label: str = "small") -> tuple[str, int]:
        return self.filled(label, SMALL, 1024 * MIB)


# -- kinds of work ----------------------------------------------------------------------------


async def in_loop(
    side: str, directory: str, todo: Sequence[tuple[bool, int]], in_flight: int, hot: bool
) -> Usage:
    """(is it a get, entry) of each operation, by so many tasks that take the next one when they are done."""
    kind, value = PEERS[side], value_of(SMALL)
    async with kind.asynchronous(directory) as cache:
        rest = iter([(is_get, kind.key(number)) for is_get, number in todo])
        for _, number in todo if hot else ():
            await cache.get(kind.key(number))
        for _, number in todo:  # the index is in memory: it is small, and the same for both
            kind.key(number) in cache  # noqa: B015

        async def worker() -> None:
            for is_get, key in rest:
                await (cache.get(key) if is_get else cache.set(key, value))

        start = Usage.now()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return Usage.now().since(start)


def asynchronous(
    used: list[Usage],
    side: str,
    directory: str,
    count: int,
    loops: int,
    reads: float = 1.0,
    hot: bool = False,
) -> float:
    numbers = [i % HOT for i in range(loops)] if hot else random.sample(range(count), min(loops, count))
    todo = [(random.random() < reads, number) for number in numbers]
    if not hot:
        drop_caches(directory)
    used.append(asyncio.run(in_loop(side, directory, todo, IN_FLIGHT, hot)))
    return used[-1].wall / len(todo)


def synchronous(side: str, directory: str, numbers: list[int], size: int, batch: int) -> float:
    """Cold, one by one or in batches."""
    drop_caches(directory)
    peer = PEERS[side](directory, size=size)
    try:
        keys = [peer.key(number) for number in numbers]
        if batch == 1:
            return timed(peer.get, keys) / len(keys)
        return timed(peer.get_many, [keys[i : i + batch] for i in range(0, len(keys), batch)]) / len(keys)
    finally:
        peer.close()


def fio(directory: str, loops: int, direct: bool, size: int = SMALL, depth: int = IN_FLIGHT) -> float:
    """Seconds a read of `fio`, at random places of the same files."""
    names = [path for path in files_below(directory) if os.path.getsize(path) >= 8 * MIB]
    names = names[:20]  # fio takes no longer line
    drop_caches(directory)
    command = [
        "fio", "--name=cold", "--ioengine=io_uring", "--rw=randread", f"--bs={size}", "--readonly",
        f"--iodepth={depth}", f"--direct={int(direct)}", f"--filename={':'.join(names)}",
        f"--io_size={loops * size}", "--file_service_type=random", "--output-format=json",
    ]  # fmt: skip
    job = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    return float(1 / job["read"]["iops"])


async def _with_options(directory: str, ring: dict[str, Any], numbers: Sequence[int]) -> float:
    async with AsyncDiskCache(directory, backend="uring", io_uring=ring, size_limit=ROOM) as cache:
        for number in numbers:  # the index is in memory, as above
            f"key-{number}" in cache  # noqa: B015
        rest = iter([f"key-{number}" for number in numbers])

        async def worker() -> None:
            for key in rest:
                await cache.get(key)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        return (time.perf_counter() - start) / len(numbers)


def with_options(directory: str, ring: dict[str, Any], count: int, loops: int) -> float:
    """Seconds of a cold asyncio get with such settings of the ring."""
    drop_caches(directory)
    return asyncio.run(_with_options(directory, ring, random.sample(range(count), min(loops, count))))


async def durable(side: str, directory: str, loops: int, in_flight: int) -> float:
    backend = PEERS[side].backend  # type: ignore[attr-defined]
    value = value_of(SMALL)
    async with AsyncDiskCache(directory, backend=backend, durability="sync") as cache:
        rest = iter(range(loops))

        async def worker() -> None:
            for number in rest:
                await cache.set(f"key-{number % HOT}", value)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return (time.perf_counter() - start) / loops


def count_syncs(side: str, directory: str, loops: int, in_flight: int) -> int:
    """How often the disk is waited for; a ring's own syncs are counted by the ring."""
    fdatasync, count = os.fdatasync, 0

    def counting(fd: int) -> None:
        nonlocal count
        count += 1
        fdatasync(fd)

    os.fdatasync = counting
    try:
        asyncio.run(durable(side, directory, loops, in_flight))
    finally:
        os.fdatasync = fdatasync
    return count


# -- rows -------------------------------------------------------------------------------------


def rates(taken: dict[str, list[float]]) -> str:
    """Operations a second of each side."""
    shown = (
        f"{name.removeprefix('ours-')} {1 / statistics.median(values):,.0f}" for name, values in taken.items()
    )
    return f"({', '.join(shown)} a second)"


def against_threads(what: str, asked: float, taken: dict[str, list[float]]) -> Row:
    got = ratio(taken[RING], taken[THREADS])
    return Row(what, f"{asked:g} ×", f"{got:.2f} × {rates(taken)}", got >= asked)


def allowed(taken: dict[str, list[float]], name: str) -> Row:
    """What the disk allows: how much faster than the threads backend `fio` is, which keeps no cache."""
    most = ratio(taken[name], taken[THREADS])
    return Row(f"the same, {name} against threads: what the disk allows", "", f"{most:.2f} ×", True)


def cold_gets(beds: Beds) -> Iterator[Row]:
    directory, count = beds.small()
    loops = int(16_000 * beds.scale)
    runs: dict[str, Callable[[], float]] = {
        side: partial(asynchronous, [], side, directory, count, loops) for side in SIDES
    }
    if shutil.which("fio"):
        runs |= {
            "fio": partial(fio, directory, loops, False),
            "fio O_DIRECT": partial(fio, directory, loops, True),
        }
    taken = interleave(runs, ROUNDS, warm=False)
    yield against_threads("cold 4 KiB get, asyncio, 256 in flight", 3, taken)
    for name in [name for name in taken if name.startswith("fio")]:
        share = ratio(taken[RING], taken[name])
        what = f"the same, of what {name} reaches (io_uring, depth {IN_FLIGHT})"
        yield Row(what, "70 %", f"{share:.0%}", share >= 0.7)
        yield allowed(taken, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "queue_depth=64": {"queue_depth": 64},
    "queue_depth=256": {"queue_depth": 256},
    "use_registered_buffers=False": {"use_registered_buffers": False},
    "use_fixed_files=True": {"use_fixed_files": True},
    "cpu_affinity=0": {"cpu_affinity": 0},
    "sqpoll=True": {"sqpoll": True},
}


def options(beds: Beds) -> Iterator[Row]:
    """Each option against the defaults, all of them in turn in every round."""
    directory, count = beds.small()
    loops = int(16_000 * beds.scale)
    runs: dict[str, Callable[[], float]] = {
        name: partial(with_options, directory, ring, count, loops)
        for name, ring in {"the defaults": {}, **OPTIONS}.items()
    }
    taken = interleave(runs, ROUNDS, warm=False)
    for name in OPTIONS:
        speed = ratio(taken[name], taken["the defaults"])
        each = f"{statistics.median(taken[name]) * 1e6:.1f} us, {statistics.median(taken['the defaults']) * 1e6:.1f} us"
        yield Row(f"`{name}`, speed against the defaults, cold asyncio", "", f"{speed:.2f} × ({each})", True)


def cold_batches(beds: Beds) -> Iterator[Row]:
    directory, count = beds.small()

    def run(side: str) -> float:
        return synchronous(
            side, directory, random.sample(range(count), int(10_000 * beds.scale)), SMALL, BATCH
        )

    runs: dict[str, Callable[[], float]] = {side: partial(run, side) for side in SIDES}
    if shutil.which("fio"):
        runs["fio"] = partial(fio, directory, int(10_000 * beds.scale), False)
    taken = interleave(runs, ROUNDS, warm=False)
    yield against_threads(f"cold get_many of {BATCH} × 4 KiB", 2.5, taken)
    if "fio" in taken:
        yield allowed(taken, "fio")


def cold_large(beds: Beds) -> Iterator[Row]:
    directory, count = beds.filled("large", LARGE, 1024 * MIB)

    def run(side: str) -> float:
        return synchronous(side, directory, random.sample(range(count), min(20, count)), LARGE, 1)

    runs: dict[str, Callable[[], float]] = {side: partial(run, side) for side in SIDES}
    if shutil.which("fio"):
        runs["fio O_DIRECT"] = lambda: fio(directory, 800, True, 256 * KIB, 8) * (LARGE / (256 * KIB))
    taken = interleave(runs, ROUNDS, warm=False)
    yield against_threads("cold 10 MiB get", 1.2, taken)
    if "fio O_DIRECT" in taken:
        yield allowed(taken, "fio O_DIRECT")


def hot_gets(beds: Beds) -> Iterator[Row]:
    directory, count = beds.small()
    peers = {side: PEERS[side](directory) for side in SIDES}

    def run(side: str) -> float:
        get = peers[side].get
        return per_call(lambda i: get(f"key-{i}"), [i % HOT for i in range(20_000)])

    taken = interleave({side: partial(run, side) for side in SIDES}, 2 * ROUNDS)
    for peer in peers.values():
        peer.close()
    yield against_threads("hot 4 KiB get, synchronous", 0.95, taken)
    runs = {side: partial(asynchronous, [], side, directory, count, 20_000, hot=True) for side in SIDES}
    yield against_threads("hot 4 KiB get, asyncio, 256 in flight", 0.95, interleave(runs, 2 * ROUNDS))


def mix(beds: Beds) -> Iterator[Row]:
    directory, count = beds.small("mix")
    used: dict[str, list[Usage]] = {side: [] for side in SIDES}
    loops = int(16_000 * beds.scale)
    runs = {side: partial(asynchronous, used[side], side, directory, count, loops, 0.7) for side in SIDES}
    taken = interleave(runs, ROUNDS, warm=False)
    yield against_threads("70/30 mix of 4 KiB, cold, asyncio, 256 in flight", 1.5, taken)
    for what, pick, show in (
        ("CPU time an operation", lambda use: use.cpu / loops, lambda value: f"{value * 1e6:.0f} us"),
        ("context switches an operation", lambda use: (use.waits + use.preempted) / loops, lambda value: f"{value:.2f}"),
    ):  # fmt: skip
        ours, other = ([pick(use) for use in used[side]] for side in SIDES)
        measured = f"{show(statistics.median(ours))}, threads {show(statistics.median(other))}"
        yield Row(f"the same, {what}", "lower", measured, ratio(ours, other) > 1)


def calls(beds: Beds) -> Iterator[Row]:
    if not can_trace():
        return
    directory, count = beds.small()
    loops = int(16_000 * beds.scale)
    counted = {
        side: system_calls(side, directory, "get", loops, in_flight=IN_FLIGHT, cold=count) for side in SIDES
    }
    each = {side: sum(calls.values()) for side, calls in counted.items()}
    most = ", ".join(f"{name} {number:.3f}" for name, number in list(counted[RING].items())[:3])
    measured = f"{each[RING]:.2f} ({most}), threads {each[THREADS]:.2f}"
    yield Row(
        "system calls an operation, cold asyncio, 256 in flight", "below 0.3", measured, each[RING] < 0.3
    )


def durable_sets(beds: Beds) -> Iterator[Row]:
    runs: dict[str, Callable[[], float]] = {
        side: lambda side=side: asyncio.run(
            durable(side, os.path.join(beds.path, f"durable-{side}"), 1280, 64)
        )  # type: ignore[misc]
        for side in SIDES
    }
    runs["one at a time"] = lambda: asyncio.run(durable(RING, os.path.join(beds.path, "durable-one"), 64, 1))
    taken = interleave(runs, ROUNDS)
    yield against_threads("durable 4 KiB set, asyncio, 64 at once", 3, taken)
    got = ratio(taken[RING], taken["one at a time"])
    yield Row("the same, against one at a time (what sharing syncs gains)", "", f"{got:.1f} ×", True)
    syncs = {side: count_syncs(side, os.path.join(beds.path, f"durable-{side}"), 1280, 64) for side in SIDES}
    told = ", ".join(f"{side.removeprefix('ours-')} {number}" for side, number in syncs.items())
    yield Row("the same, syncs for 1,280 sets (20 would be the fewest)", "", told, True)


def batch_of_writes(beds: Beds) -> Iterator[Row]:
    """128 records as one batch of writes on a ring, against the one `pwritev` of `set_many`."""
    from yatagarasu_cache.backends.ring import Ring, address_of, ffi, lib
    from yatagarasu_cache.config import RingSettings

    ring, record, number, repeats = Ring(RingSettings(), one_thread=True), value_of(SMALL), 128, 50
    fd = os.open(os.path.join(beds.path, "writes"), os.O_RDWR | os.O_CREAT)
    fds, places = ffi.new("int32_t[]", [fd] * number), [address_of(record)] * number
    done = ffi.new("int64_t[]", number)

    def on_ring(start: int) -> None:
        offsets = list(range(start, start + number * SMALL, SMALL))
        lib.yr_write_batch(ring.handle, number, fds, places, [SMALL] * number, offsets, done, -1)
        assert list(done) == [SMALL] * number

    def plain(start: int) -> None:
        os.pwritev(fd, [record] * number, start)

    def run(write: Callable[[int], None]) -> float:
        os.ftruncate(fd, 0)
        return timed(write, list(range(0, repeats * number * SMALL, number * SMALL))) / (repeats * number)

    taken = interleave({"ring": partial(run, on_ring), "pwritev": partial(run, plain)}, ROUNDS)
    os.close(fd)
    ring.destroy()
    got = ratio(taken["ring"], taken["pwritev"])
    yield Row(f"{number} writes of 4 KiB on a ring, against one pwritev", "", f"{got:.2f} × {rates(taken)}", True)


def recovery(beds: Beds) -> Iterator[Row]:
    """The index is lost, and each value read. What is in memory already is read as fast as can be."""
    directory, count = beds.small()

    def run(cold: bool) -> float:
        os.unlink(os.path.join(directory, "index"))
        if cold:
            drop_caches(directory)
        start = time.perf_counter()
        DiskCache(directory).close()
        return time.perf_counter() - start

    taken = interleave({"cold": partial(run, True), "in memory": partial(run, False)}, MACRO_ROUNDS)
    most = ratio(taken["in memory"], taken["cold"])
    seconds = statistics.median(taken["cold"])
    yield Row(
        f"recovery of {count:,} values without index, in memory against cold: what no wait for the disk would gain",
        "", f"{most:.2f} × ({seconds:.2f} s cold)", True,
    )  # fmt: skip


def warming(beds: Beds) -> Iterator[Row]:
    """`warm` of files that are not in memory, with and without asking for the next ones beforehand."""
    source, cache = os.path.join(beds.path, "source"), os.path.join(beds.path, "warmed")
    number = max(40, int(8000 * beds.scale))
    for i in range(number):
        path = os.path.join(source, str(i % 40), str(i))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(value_of(16 * KIB))

    def run(ahead: int, cold: bool) -> float:
        shutil.rmtree(cache, ignore_errors=True)
        warm.AHEAD = ahead
        if cold:
            drop_caches(source)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["warm", source, cache]) == 0
        return (time.perf_counter() - start) / number

    usual = warm.AHEAD
    try:
        taken = interleave(
            {
                "ahead": partial(run, usual, True),
                "one by one": partial(run, 0, True),
                "in memory": partial(run, usual, False),
            },
            MACRO_ROUNDS,
        )
    finally:
        warm.AHEAD = usual
    gain, most = ratio(taken["ahead"], taken["one by one"]), ratio(taken["in memory"], taken["one by one"])
    yield Row(f"warm of {number:,} cold files, {usual} on their way, against one by one", "",
              f"{gain:.2f} × {rates(taken)}", True)  # fmt: skip
    yield Row("the same, in memory against one by one: what no wait for the disk would gain", "",
              f"{most:.2f} × ({statistics.median(taken['in memory']) * 1e6:.0f} us a file)", True)  # fmt: skip


async def _for_long(directory: str, count: int, seconds: float, in_flight: int) -> list[tuple[int, int]]:
    """Memory and descriptors, at ten times."""
    kind = PEERS[RING]
    seen: list[tuple[int, int]] = []
    end = time.monotonic() + seconds
    async with kind.asynchronous(directory) as cache:

        async def worker() -> None:
            while time.monotonic() < end:
                await cache.get(kind.key(random.randrange(count)))

        workers = [asyncio.ensure_future(worker()) for _ in range(in_flight)]
        for _ in range(10):
            await asyncio.sleep(seconds / 10 - 0.05)
            seen.append((resident(), descriptors()))
            drop_caches(directory)  # so that it goes on being cold
        await asyncio.gather(*workers)
    return seen


def for_long(beds: Beds) -> Iterator[Row]:
    directory, count = beds.small()
    drop_caches(directory)
    seconds = 60 * beds.scale
    seen = asyncio.run(_for_long(directory, count, seconds, 1200))
    memory, files = zip(*seen, strict=True)
    growth = max(memory[5:]) - max(memory[:5])
    measured = f"memory {growth / MIB:+.1f} MiB, descriptors {files[-1] - files[0]:+d} from the first half to the second"
    what = f"1,200 gets in flight for {seconds:.0f} s"
    yield Row(what, "no growth", measured, growth < 2 * MIB and files[-1] <= files[0])


STEPS: dict[str, Callable[[Beds], Iterator[Row]]] = {
    "cold": cold_gets, "batches": cold_batches, "large": cold_large, "hot": hot_gets, "mix": mix, "calls": calls,
    "options": options,
    "durable": durable_sets, "long": for_long,
    "writes": batch_of_writes, "recovery": recovery, "warm": warming,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="an eighth of the data")
    parser.add_argument(
        "--only", default=",".join(STEPS), help="names, separated by commas: " + ", ".join(STEPS)
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in STEPS]:
        parser.error(f"--only: there is no {unknown[0]!r}, but " + ", ".join(STEPS))
    logging.getLogger("yatagarasu_cache").setLevel(logging.ERROR)  # indexes are removed on purpose
    rows: list[dict[str, Any]] = []
    print("| what | asked | measured | reached |\n|---|---|---|---|")
    with scratch() as path:
        beds = Beds(path, 0.125 if options.quick else 1.0)
        for name in options.only.split(","):
            for row in STEPS[name](beds):
                rows.append(row._asdict())
                print(
                    f"| {row.what} | {row.asked} | {row.measured} | {'yes' if row.reached else 'NO'} |",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
