"""What measuring needs around it: scratch directories, the same data for all, cold caches."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

KIB, MIB = 1 << 10, 1 << 20
MANY = 1000  # files
SIZES = {"4KiB": 4 * KIB, "64KiB": 64 * KIB, "1MiB": MIB, "10MiB": 10 * MIB}


def value_of(size: int) -> bytes:
    """Bytes that no compression makes smaller, the same in every process."""
    return random.Random(size).randbytes(size)


def show_size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


@contextmanager
def scratch() -> Iterator[str]:
    """A directory for the run (below $TMPDIR: it should be on the disk that matters)."""
    path = tempfile.mkdtemp(prefix="yatagarasu-perf-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def files_below(directory: str) -> Iterator[str]:
    for root, _, names in os.walk(directory):
        for name in names:
            yield os.path.join(root, name)


def disk_bytes(directory: str) -> int:
    """The sizes of all files; those that vanish meanwhile count nothing."""
    total = 0
    for path in files_below(directory):
        with suppress(FileNotFoundError):
            total += os.lstat(path).st_size
    return total


def drop_caches(directory: str) -> None:
    """Make the kernel forget the files' pages; nobody may have them open or mapped.

    Without root that is `posix_fadvise`. With root, directories and inodes are forgotten too,
    so that a file for each entry is as cold as a page of one large file; very many files, which
    that takes care of in one step, are then not gone through one by one before.
    """
    os.sync()  # pages that are not written yet can't be forgotten
    everything = _forgets_everything()
    paths = list(files_below(directory))
    for path in paths if len(paths) <= MANY or not everything else ():
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if everything:
        with suppress(OSError), open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")


def _forgets_everything() -> bool:
    """Whether the kernel does it for all files at once when it is told to."""
    allowed = os.environ.get("YATAGARASU_PERF_DROP", "all") == "all"
    return allowed and os.access("/proc/sys/vm/drop_caches", os.W_OK)


def cold_means() -> str:
    """How `drop_caches` works here, in words."""
    if _forgets_everything():
        return f"`posix_fadvise` over up to {MANY:,} files, then `/proc/sys/vm/drop_caches`"
    return "`posix_fadvise` over the files (inodes and directories stay in memory)"
