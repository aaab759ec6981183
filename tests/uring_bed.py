"""The io_uring backend under test: fixtures, injection, and loops left with reads under way.

Importing this skips the module that does so where the kernel gives no ring, unless
YATAGARASU_IO_URING=require is set: then that is a failure.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import BackendUnavailable
from yatagarasu_cache.config import make_settings

if sys.platform != "linux":
    pytest.skip("io_uring is Linux's", allow_module_level=True)
REQUIRED = os.environ.get("YATAGARASU_IO_URING", "").strip().lower() == "require"
try:
    from yatagarasu_cache.backends import uring
    from yatagarasu_cache.backends.ring import Ring
    from yatagarasu_cache.backends.uring import UringBackend

    UringBackend(make_settings("/unused", backend="uring")).close()
except (ImportError, BackendUnavailable) as error:
    if REQUIRED:
        raise
    pytest.skip(f"no ring here: {error}", allow_module_level=True)

SIZE = 6 << 20
TRIED = 1  # operations of a new backend, by which it finds out that the ring works
Make = Callable[..., UringBackend]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes backends with the io_uring settings given, and closes them."""
    made: list[UringBackend] = []

    def make_backend(**settings: Any) -> UringBackend:
        made.append(UringBackend(make_settings("/unused", backend="uring", io_uring=settings)))
        return made[-1]

    yield make_backend
    for backend in made:
        backend.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uring") / "data"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def some(fd: int, count: int, length: int = 4096) -> list[tuple[int, int, int]]:
    """Random requests within the file."""
    return [(fd, length, random.randrange(SIZE - length)) for _ in range(count)]


def truth(requests: list[tuple[int, int, int]]) -> list[bytes]:
    return [os.pread(*request) for request in requests]


def cool(fd: int) -> None:
    """Out of the page cache, if nobody else uses the file."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def pinned_kib() -> int:
    found = re.search(r"^VmPin:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 10


def in_use(backend: UringBackend) -> int:
    return sum(value for name, value in backend.stats().items() if name.endswith("_in_use"))


def assert_balanced(backend: UringBackend) -> None:
    """Everything that was submitted has completed, and all memory is back."""
    stats = backend.stats()
    assert stats["submitted"] == stats["completed"]
    assert in_use(backend) == 0
    for name, value in stats.items():
        if re.fullmatch(r"ring_\d+_inflight", name):
            assert value == 0


def only_ring(backend: UringBackend) -> Ring:
    """The ring that the next batch gets."""
    lent: Ring = backend._lender._idle[-1].ring
    return lent


@pytest.fixture
def long_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reads of the test file's size count as long."""
    monkeypatch.setattr(uring, "DIRECT_BYTES", 3 << 20)
    monkeypatch.setattr(uring, "_reads_far_ahead", lambda device: False)


def with_injection(
    backend: UringBackend, fd: int, count: int, *rules: tuple[int, int, int, int], length: int = 4096
) -> tuple[list[Any], list[bytes]]:
    """`count` reads at once with these rules in force: what came, and what should have come."""
    requests = some(fd, count, length)

    async def main() -> list[Any]:
        channel = backend.channel(asyncio.get_running_loop())
        await channel.read(fd, 10, 0)
        for rule in rules:
            channel._ring.inject(*rule)
        reads = [channel.read(*request) for request in requests]
        return await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 60)

    return asyncio.run(main()), truth(requests)


def start_reads(backend: UringBackend, fd: int, count: int = 100) -> tuple[Any, Any, list[Any]]:
    """A loop that was left with reads under way: (loop, channel, futures)."""
    loop = asyncio.new_event_loop()
    channel: Any = None

    async def begin() -> list[Any]:
        nonlocal channel
        channel = channel or backend.channel(loop)
        cool(fd)
        reads = [channel.read(*request) for request in some(fd, count)]
        await asyncio.sleep(0)
        return reads

    for _ in range(100):  # a loop that was kept waiting for a processor finds all of them done
        reads = loop.run_until_complete(begin())
        if not all(read.done() for read in reads):
            break
    return loop, channel, reads
