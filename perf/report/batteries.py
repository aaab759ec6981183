"""The figures of what is built on the cache: computing once, memoising, arrays, tags, metadata, ranges.

Part of `perf.report.figures`, and by itself:

    python -m perf.report.batteries [--quick] [--backend threads]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import diskcache
import numpy as np

from perf.bed import scratch
from perf.report.rows import Row, table
from perf.timing import Compared, compare, latencies, per_call
from yatagarasu_cache import DiskCache

CALLS = 3000
ARRAY_BYTES = 1_700_000
RANGE = 64 << 10
KEYS, SECONDS = 5, 0.2  # of what is computed by several at once
PROCESSES, THREADS = 4, 50
_spawning = multiprocessing.get_context("spawn")


def over(what: str, asked: float, got: Compared) -> Row:
    """A row about microseconds that `got.ours` takes more than `got.other`."""
    more = (got.ours - got.other) * 1e6
    measured = f"+{more:.2f} us ({got.ours * 1e6:.2f} against {got.other * 1e6:.2f})"
    return Row(what, f"+{asked:g} us at most", measured, more <= asked)


def within(what: str, asked: float, got: Compared, unit: str = "us", scale: float = 1e6) -> Row:
    """A row about how many times as long as another one ours may take."""
    times = 1 / got.ratio
    measured = f"{times:.2f} times ({got.ours * scale:.3g} against {got.other * scale:.3g} {unit})"
    return Row(what, f"within {asked:g} times", measured, times <= asked)


def hits(path: str, backend: str) -> Iterator[Row]:
    with DiskCache(f"{path}/hits", backend=backend) as cache, diskcache.Cache(f"{path}/peer") as peer:
        value = {"answer": 42, "text": "x" * 40}

        @cache.memoize(name="ours")
        def ours(number: int) -> Any:
            return value

        @peer.memoize()  # type: ignore[untyped-decorator]
        def theirs(number: int) -> Any:
            return value

        numbers = [i % 100 for i in range(CALLS)]
        for number in range(100):
            ours(number), theirs(number)
        keys = [ours.cache_key(number) for number in numbers]
        bare = partial(per_call, cache.get, keys)
        once = partial(per_call, lambda key: cache.get_or_set(key, list), keys)
        names = [f"key-{number}" for number in numbers]
        cache.set_many((name, value) for name in names[:100])
        bare_name = partial(per_call, lambda key: cache.get(key), names)
        once_name = partial(per_call, lambda key: cache.get_or_set(key, list), names)
        yield over("hit of get_or_set, against get of the same key", 0.5, compare(once_name, bare_name))
        yield over("the same of a tuple key", 0.5, compare(once, partial(per_call, lambda key: cache.get(key), keys)))
        yield over("hit of a memoized call, against get of its key", 2.5, compare(partial(per_call, ours, numbers), bare))
        got = compare(partial(per_call, ours, numbers), partial(per_call, theirs, numbers))
        yield Row(
            f"hit of a memoized call, against diskcache {diskcache.__version__}", "4 times faster",
            f"{got.ratio:.1f} times ({got.ours * 1e6:.1f} against {got.other * 1e6:.1f} us)", got.ratio >= 4,
        )  # fmt: skip


def compute(path: str, key: int) -> int:
    """Costs `SECONDS`, and leaves a line that it was done."""
    with open(f"{path}/computed", "a", encoding="ascii") as file:
        file.write(f"{key} {os.getpid()}\n")
    time.sleep(SECONDS)
    return key * 100


def ask(path: str, backend: str) -> None:
    """What each of several processes does: many threads that ask for a few keys."""
    with DiskCache(f"{path}/cache", backend=backend) as cache, ThreadPoolExecutor(THREADS) as pool:

        def one(number: int) -> None:
            key = number % KEYS
            assert cache.get_or_set(key, partial(compute, path, key)) == key * 100

        list(pool.map(one, range(THREADS)))


def computed(path: str) -> list[tuple[int, int]]:
    with open(f"{path}/computed", encoding="ascii") as file:
        return [(int(key), int(process)) for key, process in map(str.split, file)]


def once(path: str, backend: str) -> Row:
    processes = [_spawning.Process(target=ask, args=(path, backend)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    count = len(computed(path))
    what = f"{PROCESSES} processes of {THREADS} threads ask for {KEYS} keys of {SECONDS:g} s"
    return Row(what, f"{KEYS} computations", str(count), count == KEYS)


def hold(path: str, backend: str) -> None:
    with DiskCache(f"{path}/cache", backend=backend) as cache:
        cache.get_or_set("key", partial(_announce, path))


def _announce(path: str) -> None:
    with open(f"{path}/holding", "w", encoding="ascii"):
        time.sleep(60)


def handover(path: str, backend: str) -> Row:
    """From the kill of a process that computes to the beginning of the computation by the one that waits."""
    taken = []
    with DiskCache(f"{path}/cache", backend=backend) as cache, ThreadPoolExecutor(1) as pool:
        for _ in range(15):
            owner = _spawning.Process(target=hold, args=(path, backend))
            owner.start()
            while not os.path.exists(f"{path}/holding"):
                time.sleep(0.001)
            waiter = pool.submit(cache.get_or_set, "key", time.perf_counter)
            time.sleep(0.1)
            start = time.perf_counter()
            os.kill(owner.pid or 0, signal.SIGKILL)
            taken.append(waiter.result() - start)
            owner.join()
            cache.delete("key")
            os.unlink(f"{path}/holding")
    longest = max(taken)
    return Row(
        "turn passes on after kill -9 of whoever computes (median, longest of 15)", "20 ms",
        f"{median(taken) * 1e3:.1f} ms, {longest * 1e3:.1f} ms", longest <= 0.02,
    )  # fmt: skip


def arrays(path: str, backend: str) -> Iterator[Row]:
    array = np.random.default_rng(1).random(ARRAY_BYTES // 8)
    data = array.tobytes()
    numbers = list(range(8))
    with DiskCache(f"{path}/arrays", backend=backend) as cache:
        for what, ours, other in (
            ("set", lambda i: cache.set(("array", i), array), lambda i: cache.set(("bytes", i), data)),
            ("get", lambda i: cache.get(("array", i)), lambda i: cache.get(("bytes", i))),
        ):
            got = compare(partial(per_call, ours, numbers), partial(per_call, other, numbers), rounds=25)
            yield within(f"{what} of an array of 1.7 MB, against bytes", 1.15, got, "ms", 1e3)


def metadata(path: str, backend: str) -> Row:
    with DiskCache(f"{path}/meta", backend=backend) as cache:
        keys = [f"key-{i % 100}" for i in range(CALLS)]
        for key in keys[:100]:
            cache.set(key, bytes(4096), meta={"type": "image/png", "etag": '"1"'})
        got = compare(
            partial(per_call, lambda key: cache.get(key, with_meta=True), keys),
            partial(per_call, lambda key: cache.get(key), keys),
        )
        return over("get of 4 KiB with its metadata, against get", 2.5, got)


def ranges(path: str, backend: str, size: int) -> Iterator[Row]:
    with DiskCache(f"{path}/ranges", backend=backend) as cache:
        cache.set("large", (bytes(1 << 20) for _ in range(size >> 20)), length=size)
        cache.set("small", (bytes(1 << 20) for _ in range(16)), length=16 << 20)

        def read(at: int) -> None:
            with cache.open("large") as file:
                file.seek(at)
                assert len(file.read(RANGE)) == RANGE

        places = [(i * 7_654_321) % (size - RANGE) for i in range(50)]
        took = median(latencies(read, places))
        yield Row(
            f"64 KiB out of {size >> 20} MiB, opened anew", "1 ms (88 before)", f"{took * 1e3:.2f} ms", took <= 1e-3
        )

        def whole(_: int) -> None:
            with cache.open("small") as file:
                assert len(file.read()) == 16 << 20

        got = compare(
            partial(per_call, whole, range(10)), partial(per_call, lambda _: cache.get("small"), range(10))
        )
        yield within("open and read of 16 MiB, against get", 1.5, got, "ms", 1e3)


def tags(path: str, backend: str, count: int) -> Iterator[Row]:
    value = bytes(range(256)) * 16
    with DiskCache(f"{path}/tagged", backend=backend) as cache:
        numbers = range(CALLS)
        got = compare(
            partial(per_call, lambda i: cache.set(i, value, tag="tag"), numbers),
            partial(per_call, lambda i: cache.set(i, value), numbers),
        )
        yield within("set of 4 KiB with a tag, against one without", 1.2, got)
    with DiskCache(f"{path}/many", backend=backend) as cache:
        for start in range(0, count, 1000):
            cache.set_many((f"key-{i}", b"x" * 20) for i in range(start, start + 1000))
        taken = []
        for number in range(7):
            cache.set_many(((f"tagged-{number}-{i}", b"x") for i in range(20)), tag=f"tag-{number}")
            start_time = time.perf_counter()
            assert cache.evict(f"tag-{number}") == 20
            taken.append(time.perf_counter() - start_time)
        took = median(taken)
        yield Row(f"evict of 20 entries by tag, among {count:,}", "5 ms", f"{took * 1e3:.2f} ms", took <= 5e-3)
        start_time = time.perf_counter()
        assert cache.delete_prefix("nothing") == 0
        each = (time.perf_counter() - start_time) / count
        yield Row("walk of delete_prefix, an entry", "1 us", f"{each * 1e6:.2f} us", each <= 1e-6)


def measure(backend: str, scale: float) -> Iterator[Row]:
    """All rows; less than 1 for `scale` makes the large ones so much smaller."""
    million = int(1_000_000 * scale)
    steps: list[Callable[[str], Any]] = [
        lambda path: hits(path, backend),
        lambda path: [once(path, backend)],
        lambda path: [handover(path, backend)],
        lambda path: arrays(path, backend),
        lambda path: [metadata(path, backend)],
        lambda path: ranges(path, backend, int(600 * scale) << 20),
        lambda path: tags(path, backend, million),
    ]
    for step in steps:
        with scratch() as path:
            yield from step(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--backend", default="threads")
    options = parser.parse_args()
    print(table(()))
    for row in measure(options.backend, 0.1 if options.quick else 1.0):
        print(table([row]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
