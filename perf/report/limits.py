"""What the disk itself can do: `fio` with O_DIRECT through io_uring, read from its JSON output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from perf.bed import MIB

DEPTHS = (1, 16, 64, 256)


class Limit(NamedTuple):
    what: str
    operations: float  # a second
    bytes: float  # a second
    p95: float  # seconds


def fio(directory: str, what: str, seconds: float, size: int, **settings: str) -> Limit:
    """One job; the file is written first if it is not there."""
    job = {
        "name": "limit", "filename": os.path.join(directory, "fio"), "size": str(size), "direct": "1",
        "ioengine": "io_uring", "runtime": f"{seconds * 1000:.0f}ms", "time_based": "1", "output-format": "json",
        **settings,
    }  # fmt: skip
    command = ["fio", *(f"--{name}={value}" for name, value in job.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and settings.get("ioengine") != "psync":  # no io_uring for us: threads then
        return fio(directory, what, seconds, size, **settings | {"ioengine": "psync", "iodepth": "1"})
    found = json.loads(done.stdout)["jobs"][0]["write" if "write" in settings["rw"] else "read"]
    p95 = found["clat_ns"].get("percentile", {}).get("95.000000", 0) / 1e9
    return Limit(what, found["iops"], found["bw_bytes"], p95)


def limits(directory: str, quick: bool) -> Iterator[Limit]:
    if not shutil.which("fio"):
        return
    seconds, size = (0.5, 256 * MIB) if quick else (3.0, 1024 * MIB)
    for depth in (1, 256) if quick else DEPTHS:
        what = f"random read of 4 KiB, {depth} in flight"
        yield fio(directory, what, seconds, size, rw="randread", bs="4k", iodepth=str(depth))
    yield fio(
        directory, "read of 256 KiB, 16 in flight", seconds, size, rw="randread", bs="256k", iodepth="16"
    )
    yield fio(directory, "write of 256 KiB, 16 in flight", seconds, size, rw="write", bs="256k", iodepth="16")
    yield fio(
        directory, "write of 4 KiB, each synced", seconds, size,
        rw="write", bs="4k", iodepth="1", fdatasync="1", direct="0", ioengine="psync",
    )  # fmt: skip
