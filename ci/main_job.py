"""The main job on real input: the standard library's files through the cache and back.

Two caches are filled from the same files, one with room for all, one limited to a third of
their bytes. Then processes of their own open each cache and compare what they read with SHA-256
sums of the originals; a last one does it once more after the index of the first was deleted.
Exit code 0 only if no byte was wrong and everything that had to be there was there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import mimetypes
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from yatagarasu_cache import DiskCache, ValueTooLarge

NOT_STDLIB = frozenset({"site-packages", "dist-packages"})


@dataclass
class Fill:
    """What one filling did."""

    files: int = 0
    bytes: int = 0
    too_large: int = 0
    seconds: float = 0.0  # in `set` alone, without reading and hashing the originals
    sums: dict[str, str] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reading:
    """What one reading process found; travels to the parent as JSON."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    open_ms: float = 0.0  # opening and the first get
    seconds: float = 0.0  # in `get` alone
    wrong: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


# -- the files ---------------------------------------------------------------------------------


def stdlib_files() -> Iterator[tuple[str, str]]:
    """(relative path with "/", path) of each regular file of the running Python's library."""
    root = sysconfig.get_path("stdlib")
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in NOT_STDLIB)
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield os.path.relpath(path, root).replace(os.sep, "/"), path


def content(path: str) -> bytes | None:
    """The file's bytes; None if it vanished or may not be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def total_size() -> int:
    return sum(os.path.getsize(path) for _, path in stdlib_files())


# -- filling and reading -----------------------------------------------------------------------


def fill(directory: str, size_limit: int, backend: str) -> Fill:
    result = Fill()
    with DiskCache(directory, size_limit=size_limit, backend=backend) as cache:
        for key, path in stdlib_files():
            value = content(path)
            if value is not None:
                store(cache, key, value, result)
        result.stats = cache.stats().as_dict()
    return result


def store(cache: DiskCache, key: str, value: bytes, result: Fill) -> None:
    content_type = mimetypes.guess_type(key)[0] or "application/octet-stream"
    tag = key.partition("/")[0]
    start = time.perf_counter()
    try:
        cache.set(key, value, tag=tag, meta={"content_type": content_type})
    except ValueTooLarge:
        result.too_large += 1
    result.seconds += time.perf_counter() - start
    result.files += 1
    result.bytes += len(value)
    result.sums[key] = hashlib.sha256(value).hexdigest()


def read(directory: str, size_limit: int, backend: str, sums: dict[str, str]) -> Reading:
    result = Reading()
    start = time.perf_counter()
    with DiskCache(directory, size_limit=size_limit, backend=backend) as cache:
        cache.get(next(iter(sums)))
        result.open_ms = (time.perf_counter() - start) * 1000
        for key, expected in sums.items():
            compare(cache, key, expected, result)
        result.stats = cache.stats().as_dict()
    return result


def compare(cache: DiskCache, key: str, expected: str, result: Reading) -> None:
    start = time.perf_counter()
    value = cache.get(key)
    result.seconds += time.perf_counter() - start
    if value is None:
        result.misses += 1
        return
    result.hits += 1
    result.bytes += len(value)
    if hashlib.sha256(value).hexdigest() != expected:
        result.wrong.append(key)


# -- processes ---------------------------------------------------------------------------------


def read_in_process(directory: str, size_limit: int, backend: str, sums_file: str) -> Reading:
    command = [sys.executable, os.path.abspath(__file__), "--backend", backend]
    command += ["--read", directory, str(size_limit), sums_file]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"the reading process of {os.path.basename(directory)} failed ({done.returncode})")
    return Reading(**json.loads(done.stdout))


def reading_process(backend: str, directory: str, size_limit: str, sums_file: str) -> None:
    logging.disable(logging.WARNING)  # that the index is missing is the point, not news
    with open(sums_file, encoding="utf-8") as file:
        sums = json.load(file)
    json.dump(asdict(read(directory, int(size_limit), backend, sums)), sys.stdout)


def save_sums(sums: dict[str, str], path: str) -> str:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(sums, file)
    return path


# -- the job -----------------------------------------------------------------------------------


@dataclass
class Run:
    """One column of the table."""

    title: str
    size_limit: int
    filled: Fill
    reading: Reading
    disk: int
    segment: int


def disk_used(directory: str) -> int:
    """Bytes that the files really occupy, as the file system counts them."""
    return sum(
        os.lstat(os.path.join(place, name)).st_blocks * 512
        for place, _, files in os.walk(directory)
        for name in files
    )


def largest_segment(directory: str) -> int:
    with os.scandir(os.path.join(directory, "segments")) as entries:
        return max((entry.stat().st_size for entry in entries), default=0)


def run_one(title: str, directory: str, size_limit: int, backend: str) -> Run:
    filled = fill(directory, size_limit, backend)
    disk, segment = disk_used(directory), largest_segment(directory)
    sums_file = save_sums(filled.sums, directory + ".json")
    reading = read_in_process(directory, size_limit, backend, sums_file)
    return Run(title, size_limit, filled, reading, disk, segment)


def after_index_loss(run: Run, directory: str, backend: str) -> Run:
    """The same cache read once more, when its index had to be rebuilt from the segments."""
    os.unlink(os.path.join(directory, "index"))
    reading = read_in_process(directory, run.size_limit, backend, directory + ".json")
    return Run("index lost", run.size_limit, run.filled, reading, disk_used(directory), run.segment)


def complaints(runs: list[Run]) -> Iterator[str]:
    """Everything that must not be."""
    for run in runs:
        for key in run.reading.wrong:
            yield f"{run.title}: wrong bytes for {key}"
        if run.size_limit >= run.filled.bytes and run.reading.misses:
            yield f"{run.title}: {run.reading.misses} misses although there was room for all"
    small = runs[1]
    if small.disk > small.size_limit + small.segment:
        yield f"{small.title}: {small.disk} bytes on disk, limit {small.size_limit}"
    if not small.filled.stats["evictions"]:
        yield f"{small.title}: nothing was evicted"
    if not small.reading.hits:
        yield f"{small.title}: no hits"


def job(backend: str) -> list[Run]:
    size = total_size()
    with tempfile.TemporaryDirectory(prefix="yatagarasu-quickstart-") as place:
        roomy, small = os.path.join(place, "roomy"), os.path.join(place, "small")
        runs = [
            run_one("room for all", roomy, 2 * size, backend),
            run_one("a third", small, size // 3, backend),
        ]
        runs.append(after_index_loss(runs[0], roomy, backend))
    return runs


# -- the table ---------------------------------------------------------------------------------


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f}" if seconds else "-"


def column(run: Run) -> dict[str, str]:
    """Name to text of each line; the reading of a rebuilt cache has no filling of its own."""
    filled, reading, rebuilt = run.filled, run.reading, run.title == "index lost"
    return {
        "size limit": mib(run.size_limit),
        "files": str(filled.files),
        "bytes": mib(filled.bytes),
        "put/s": "-" if rebuilt else rate(filled.files, filled.seconds),
        "evictions": "-" if rebuilt else str(filled.stats["evictions"]),
        "too large": "-" if rebuilt else str(filled.too_large),
        "on disk": mib(run.disk),
        "hits": str(reading.hits),
        "misses": str(reading.misses),
        "wrong": str(len(reading.wrong)),
        "get/s": rate(reading.hits + reading.misses, reading.seconds),
        "opening": "-" if rebuilt else f"{reading.open_ms:.1f} ms",
        "recovery": f"{reading.open_ms:.1f} ms" if rebuilt else "-",
    }


def print_table(runs: list[Run]) -> None:
    columns = [column(run) for run in runs]
    print(f"{'':12}" + "".join(f"{run.title:>16}" for run in runs))
    for name in columns[0]:
        print(f"{name:12}" + "".join(f"{texts[name]:>16}" for texts in columns))
    stats = runs[0].reading.stats
    print(f"backend     {stats['backend']} ({stats['backend_reason']})")


# -- start -------------------------------------------------------------------------------------


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that the temporary directory is removed on the way out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="auto", choices=("auto", "threads", "uring"))
    parser.add_argument("--read", nargs=3, metavar=("CACHE", "SIZE_LIMIT", "SUMS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if args.read:
        reading_process(args.backend, *args.read)
        return 0
    start = time.perf_counter()
    runs = job(args.backend)
    print_table(runs)
    wrong = list(complaints(runs))
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    if not wrong:
        seconds = time.perf_counter() - start
        print(f"every byte came back right, in {seconds:.1f} s on Python {sys.version.split()[0]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
