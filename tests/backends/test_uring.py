"""The io_uring backend: ownership of memory, failures by injection, loops, threads, forks, leaks.

That it keeps the contract of all backends is tested with the others. Skipped where the kernel
gives no ring, unless YATAGARASU_IO_URING=require is set: then that is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import gc
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import descriptors

from yatagarasu_cache import AsyncDiskCache, BackendUnavailable, CacheIOError, DiskCache, aio
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.store import compiled
from yatagarasu_cache.store.check import Problem

if sys.platform != "linux":
    pytest.skip("io_uring is Linux's", allow_module_level=True)
REQUIRED = os.environ.get("YATAGARASU_IO_URING", "").strip().lower() == "require"
try:
    from yatagarasu_cache.backends import ring as ring_module
    from yatagarasu_cache.backends import ring_batches, ring_channel, uring
    from yatagarasu_cache.backends.ring import Ring, lib
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


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 511, 4095, 4096, 4097, 65536, 65537, 500_000])
def test_read_many(make: Make, fd: int, length: int) -> None:
    requests = some(fd, 300 if length < 10_000 else 30, length)
    backend = make()
    cool(fd)
    assert backend.read_many(requests) == truth(requests)
    assert backend.read_many(requests) == truth(requests)
    assert_balanced(backend)


@pytest.mark.parametrize("depth", [1, 2, 3, 100, 4096])
def test_read_many_at_any_depth(make: Make, fd: int, depth: int) -> None:
    requests = some(fd, 1000, 700)
    assert make(queue_depth=depth).read_many(requests) == truth(requests)


def test_read_many_mixed(make: Make, fd: int) -> None:
    """Each request has its own outcome: errors, the file's end, nothing at all, long ones."""
    backend = make()
    requests = [
        (fd, 10, 0), (fd, 100, SIZE - 50), (fd, 100, SIZE + 5), (fd, 0, 7), (1 << 20, 10, 0),
        (fd, 5 << 20, 3), (fd, 5 << 20, SIZE - 3), (fd, 70_000, SIZE - 60_000), (fd, 8, 8),
    ]  # fmt: skip
    results = backend.read_many(requests)
    bad = results.pop(4)
    assert isinstance(bad, OSError) and bad.errno == errno.EBADF
    assert results == truth(requests[:4] + requests[5:])


def test_read_many_of_a_directory(make: Make, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        results = make().read_many([(fd, 10, 0)] * 5)
    finally:
        os.close(fd)
    assert [type(result) for result in results] == [IsADirectoryError] * 5


def test_many_more_bytes_than_the_memory_of_a_ring(make: Make, fd: int) -> None:
    requests = some(fd, 200, 60_000)
    assert sum(length for _, length, _ in requests) > 3 * ring_batches.ARENA_BYTES
    assert make().read_many(requests) == truth(requests)


@pytest.mark.parametrize("result", [1, 100, 4000])
def test_batch_short_reads(make: Make, fd: int, result: int) -> None:
    backend, requests = make(), some(fd, 50)
    only_ring(backend).inject(lib.YR_OP_READ, 3, 20, result)
    assert backend.read_many(requests) == truth(requests)
    assert backend.stats()["resumed"] >= 20


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
def test_batch_repeats(make: Make, fd: int, code: int) -> None:
    backend, requests = make(), some(fd, 50)
    only_ring(backend).inject(lib.YR_OP_READ, 0, 40, -code)
    assert backend.read_many(requests) == truth(requests)
    assert backend.stats()["retried"] >= 40


@pytest.mark.parametrize("instead", [False, True])
def test_batch_error_of_the_file(make: Make, fd: int, instead: bool) -> None:
    backend, requests = make(), some(fd, 10)
    only_ring(backend).inject(lib.YR_OP_READ, 0, 1, -errno.EIO, instead=instead)
    results = backend.read_many(requests)
    failed = [result for result in results if isinstance(result, OSError)]
    assert [error.errno for error in failed] == [errno.EIO]
    assert sum(a == b for a, b in zip(results, truth(requests), strict=True)) == 9
    assert backend.stats()["fallbacks"] == 0


def test_batch_error_of_the_ring(make: Make, fd: int) -> None:
    """ENOMEM for one read is not the user's problem."""
    backend, requests = make(), some(fd, 50)
    only_ring(backend).inject(lib.YR_OP_READ, 5, 3, -errno.ENOMEM)
    assert backend.read_many(requests) == truth(requests)
    assert backend.stats()["fallbacks"] == 3


@pytest.mark.parametrize("code", [errno.EBADF, errno.EINVAL, errno.ENOMEM])
def test_batch_when_the_kernel_takes_nothing_more(
    make: Make, fd: int, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    backend, requests = make(queue_depth=64), some(fd, 500)
    only_ring(backend).inject(lib.YR_OP_SUBMIT, 2, 1000, -code)
    assert backend.read_many(requests) == truth(requests)
    stats = backend.stats()
    assert stats["degraded"] == 1 and stats["rings"] == 0
    assert 0 < stats["fallbacks"] < 500
    assert backend.read_many(requests) == truth(requests)
    backend.rings._none_before = 0.0
    assert backend.read_many(requests) == truth(requests)
    assert backend.stats()["rings"] == 1
    assert len(caplog.records) == 1


def test_batch_results_are_nobody_elses(make: Make, fd: int) -> None:
    """What is returned stays as it is, and what was read stays nowhere else."""
    backend, requests = make(), some(fd, 100)
    for request in (requests, some(fd, 8, 60_000)):
        results = backend.read_many(request)
        lent = backend._lender._idle[-1]
        assert bytes(lent.chunks.view) == bytes(len(lent.chunks.view))
        lent.chunks.view[:] = b"\xee" * len(lent.chunks.view)
        assert results == truth(request)
        lent.chunks.view[:] = bytes(len(lent.chunks.view))


def test_batches_of_many_threads(make: Make, fd: int) -> None:
    backend = make()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                requests = some(fd, 60)
                assert backend.read_many(requests) == truth(requests)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert 1 <= backend.stats()["rings"] <= ring_batches._MOST_RINGS
    assert_balanced(backend)


def test_a_thread_without_a_ring_reads_all_the_same(make: Make, fd: int) -> None:
    backend, requests = make(), some(fd, 20)
    backend._lender._made = ring_batches._MOST_RINGS
    with backend._lender.lend() as lent:
        assert lent is not None
        assert backend.read_many(requests) == truth(requests)
    assert backend.stats()["fallbacks"] == 20
    backend._lender._made = 1


# -- writes -----------------------------------------------------------------------------------


def test_syncs_of_many_files(make: Make, tmp_path: Path) -> None:
    backend = make()
    fds = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(20)]
    requests = [(fd, [b"ab", b"", b"cde"], 3) for fd in fds]
    assert backend.write_many(requests, fds + fds[:3]) == [None] * 20
    assert {(tmp_path / str(i)).read_bytes() for i in range(20)} == {b"\0\0\0abcde"}
    assert backend.stats()["submitted"] == TRIED + 20
    only_ring(backend).inject(lib.YR_OP_FDATASYNC, 0, 1, -errno.EIO)
    results = backend.write_many(requests, fds)
    assert [error.errno for error in results if error] == [errno.EIO]
    only_ring(backend).inject(lib.YR_OP_FDATASYNC, 0, 30, -errno.ENOMEM)
    assert backend.write_many(requests, fds) == [None] * 20
    assert backend.stats()["fallbacks"] == 20
    for fd in fds:
        os.close(fd)


def test_a_failed_write_and_a_failed_sync(make: Make, tmp_path: Path) -> None:
    backend = make()
    good = os.open(tmp_path / "good", os.O_RDWR | os.O_CREAT)
    read_only = os.open(tmp_path / "good", os.O_RDONLY)
    pipe = os.pipe()
    results = backend.write_many(
        [(good, [b"x"], 0), (read_only, [b"y"], 0), (good, [b"z"], 1)], [good, pipe[1], read_only]
    )
    assert results[0] is None and results[2] is None
    assert isinstance(results[1], OSError) and results[1].errno == errno.EBADF
    assert (tmp_path / "good").read_bytes() == b"xz"
    for fd in (good, read_only, *pipe):
        os.close(fd)


# -- long reads -------------------------------------------------------------------------------


@pytest.fixture
def long_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reads of the test file's size count as long."""
    monkeypatch.setattr(uring, "DIRECT_BYTES", 3 << 20)
    monkeypatch.setattr(uring, "_reads_far_ahead", lambda device: False)


@pytest.mark.parametrize("direct", [True, False, "auto"])
@pytest.mark.parametrize(
    ("length", "offset"),
    [(3 << 20, 0), ((3 << 20) + 1, 1), (5 << 20, 4096), (5_000_001, 511), (SIZE, 0)],
)
@pytest.mark.usefixtures("long_reads")
def test_long_read(make: Make, fd: int, direct: Any, length: int, offset: int) -> None:
    backend = make(direct=direct)
    for _ in range(3):
        cool(fd)
        assert backend.read(fd, length, offset) == os.pread(fd, length, offset)
    assert_balanced(backend)


@pytest.mark.usefixtures("long_reads")
def test_long_read_at_the_end(make: Make, fd: int) -> None:
    backend = make(direct=True)
    cool(fd)
    assert backend.read(fd, SIZE, SIZE - (3 << 20)) == os.pread(fd, SIZE, SIZE - (3 << 20))
    assert backend.read(fd, 1 << 40, 5) == os.pread(fd, SIZE, 5)
    assert backend.read(fd, SIZE, SIZE) == b""
    assert backend.read(fd, SIZE, 2 * SIZE) == b""


def is_direct_here(backend: UringBackend, fd: int) -> bool:
    """Whether a cold long read goes past the page cache: not on every file system."""
    before = backend.stats()["submitted"]
    cool(fd)
    backend.read(fd, 3 << 20, 0)
    return bool(backend.stats()["submitted"] > before)


@pytest.mark.usefixtures("long_reads")
def test_long_read_of_what_is_in_memory_is_a_plain_one(make: Make, fd: int) -> None:
    backend = make(direct=True)
    os.pread(fd, SIZE, 0)
    backend.read(fd, 3 << 20, 0)
    assert backend.stats()["submitted"] == TRIED


@pytest.mark.usefixtures("long_reads")
def test_auto_reads_past_the_page_cache_only_once(make: Make, fd: int) -> None:
    backend = make()
    if not is_direct_here(backend, fd):
        pytest.skip("no O_DIRECT on this file system, or the file stays in memory")
    submitted = backend.stats()["submitted"]
    cool(fd)
    backend.read(fd, 3 << 20, 0)
    assert backend.stats()["submitted"] == submitted
    for i in range(uring._SEEN + 10):
        backend._is_first((0, 0, i))
    assert len(backend._seen) == uring._SEEN


@pytest.mark.parametrize("result", [512, 4096, 5000, -errno.EIO, -errno.EAGAIN, -errno.ENOMEM])
@pytest.mark.usefixtures("long_reads")
def test_long_read_that_does_not_go_smoothly(make: Make, fd: int, result: int) -> None:
    backend = make(direct=True)
    only_ring(backend).inject(lib.YR_OP_READ, 3, 2, result)
    for _ in range(2):
        cool(fd)
        assert backend.read(fd, SIZE, 0) == os.pread(fd, SIZE, 0)
    assert_balanced(backend)


@pytest.mark.usefixtures("long_reads")
def test_long_read_without_o_direct(make: Make, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT")

    backend = make(direct=True)
    cool(fd)
    monkeypatch.setattr(os, "open", refuse)
    data = backend.read(fd, SIZE, 0)
    monkeypatch.undo()
    assert data == os.pread(fd, SIZE, 0)


@pytest.mark.usefixtures("long_reads")
def test_long_read_that_is_interrupted(make: Make, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle waits for what is under way, and the ring is as good as new."""
    backend = make(direct=True)
    if not is_direct_here(backend, fd):
        pytest.skip("no O_DIRECT on this file system, or the file stays in memory")
    copy = ring_batches.DirectRead._copy

    def interrupted(*args: Any) -> bool:
        monkeypatch.setattr(ring_batches.DirectRead, "_copy", copy)
        raise KeyboardInterrupt

    monkeypatch.setattr(ring_batches.DirectRead, "_copy", interrupted)
    cool(fd)
    with pytest.raises(KeyboardInterrupt):
        backend.read(fd, SIZE, 0)
    assert backend.stats()["rings"] == 1
    assert only_ring(backend).info()["inflight"] == 0
    cool(fd)
    assert backend.read(fd, SIZE, 0) == os.pread(fd, SIZE, 0)


@pytest.mark.parametrize("text", ["128", "1023", "1024", "8192", "", "none"])
def test_read_ahead(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fake(path: str) -> Any:
        assert path == "/sys/class/bdi/8:1/read_ahead_kb"
        if text == "none":
            raise FileNotFoundError(path)
        return io.StringIO(text + "\n")

    uring._reads_far_ahead.cache_clear()
    monkeypatch.setattr("builtins.open", fake)
    far = uring._reads_far_ahead(os.makedev(8, 1))
    monkeypatch.undo()
    uring._reads_far_ahead.cache_clear()
    assert far == (text in ("1024", "8192"))


def test_auto_leaves_reading_to_a_system_that_reads_far_ahead(
    make: Make, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uring, "DIRECT_BYTES", 3 << 20)
    monkeypatch.setattr(uring, "_reads_far_ahead", lambda device: True)
    backend = make()
    cool(fd)
    assert backend.read(fd, 3 << 20, 0) == os.pread(fd, 3 << 20, 0)
    assert backend.stats()["submitted"] == TRIED


# -- what a cache does through rings ----------------------------------------------------------


class Filled:
    """A cache on the ring with short values and one long one, made cold at will."""

    def __init__(self, directory: Path, direct: Any) -> None:
        self.values: dict[Any, bytes] = {n: os.urandom(3000) for n in range(200)}
        self.values |= {f"key-{n}": os.urandom(3000) for n in range(200)} | {"long": os.urandom(9 << 20)}
        self.numbers = [key for key in self.values if type(key) is int]
        self.directory = str(directory)
        self.cache = DiskCache(self.directory, backend="uring", io_uring={"direct": direct})
        self.cache.set_many(self.values)

    def cool(self) -> None:
        self.cache.flush()
        self.cool_files()

    def cool_files(self) -> None:
        for folder in ("segments", "large"):
            for name in os.listdir(f"{self.directory}/{folder}"):
                file = os.open(f"{self.directory}/{folder}/{name}", os.O_RDONLY)
                cool(file)
                os.close(file)

    def submitted_cold(self, function: Callable[[], Any]) -> int:
        """The same where nothing is in memory, and nothing is read ahead, which can be quicker than the batch."""
        store = self.cache._store
        self.cool()
        for segment in store.current.index.segments():
            os.posix_fadvise(store.files.segments.get(segment), 0, 0, os.POSIX_FADV_RANDOM)
        return self.submitted(function)

    def submitted(self, function: Callable[[], Any]) -> int:
        """How many operations rings were given for it."""
        before: int = self.cache.stats().backend_stats["submitted"]
        function()
        return int(self.cache.stats().backend_stats["submitted"]) - before


@pytest.fixture(params=["python", "c"] if compiled.load() else ["python"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the core in Python, and compiled."""
    name: str = request.param
    monkeypatch.setenv(compiled.VARIABLE, name)
    return name


@pytest.mark.parametrize("direct", [True, False])
def test_what_a_cache_does_through_rings(
    tmp_path: Path, core: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(tmp_path / "cache", direct)
    cache, values, numbers = filled.cache, filled.values, filled.numbers

    def hot() -> None:
        cache.set("key-0", values["key-0"])
        assert cache.get("key-0") == values["key-0"]
        assert cache.get_many(["key-0", 1]) == {"key-0": values["key-0"], 1: values[1]}

    def batch() -> None:
        assert cache.get_many(numbers) == {key: values[key] for key in numbers}

    def long() -> None:
        assert cache.get("long") == values["long"]

    def check() -> None:
        assert cache.check() == []

    assert filled.submitted(hot) == 0
    # The look that comes first makes the system read, and may find what it asked for then.
    monkeypatch.setattr(cache._store.backend, "read_nowait", lambda *request: None)
    for cold in (batch, check):
        assert filled.submitted_cold(cold) > 20
    filled.cool()
    chunks = filled.submitted(long)
    assert chunks == 0 if not direct else chunks == 0 and not takes_direct(filled.directory) or chunks > 30
    cache.close()


def takes_direct(directory: str) -> bool:
    try:
        os.close(os.open(f"{directory}/index", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_cold_reads_of_a_loop_go_through_its_ring(tmp_path: Path, core: str) -> None:
    filled = Filled(tmp_path / "cache", False)
    keys = [key for key in filled.values if key != "long"]
    random.Random(1).shuffle(keys)

    async def main() -> None:
        async with AsyncDiskCache(filled.directory, backend="uring") as cache:
            before = (await cache.stats()).backend_stats["submitted"]
            assert await asyncio.gather(*map(cache.get, keys)) == [filled.values[key] for key in keys]
            submitted = (await cache.stats()).backend_stats["submitted"] - before
            assert submitted > 20  # fewer than keys: neighbours come with a page, looks begin to read
            await asyncio.gather(*map(cache.get, keys[:50]))
            again = (await cache.stats()).backend_stats["submitted"] - before - submitted
            assert again <= 50

    filled.cache.flush()
    filled.cache.close()
    filled.cool_files()
    asyncio.run(main())


def unreadable(cache: DiskCache, monkeypatch: pytest.MonkeyPatch, persists: bool) -> None:
    """From now on its rings answer EIO to reads; so do plain ones, if it persists."""
    backend = cache._store.backend
    assert isinstance(backend, UringBackend)

    def broken(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rings = list(backend.rings._open)
    assert rings
    for ring in rings:
        ring.inject(lib.YR_OP_READ, 0, 10**6, -errno.EIO)
    if persists:
        monkeypatch.setattr(backend, "read", broken)


@pytest.mark.parametrize("persists", [False, True])
def test_an_entry_that_cannot_be_read_is_kept(
    tmp_path: Path, core: str, persists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring says EIO: then a plain read decides. If that fails too it is told, and nothing is dropped."""
    filled = Filled(tmp_path / "cache", False)
    cache, values, numbers = filled.cache, filled.values, filled.numbers
    filled.cool()
    errors: list[CacheIOError] = []
    problems: list[Problem] = []

    def batch() -> None:
        try:
            assert cache.get_many(numbers) == {key: values[key] for key in numbers}
        except CacheIOError as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        unreadable(cache, patch, persists)
        assert filled.submitted_cold(batch) > 20
        assert {error.errno for error in errors} == ({errno.EIO} if persists else set())
        assert filled.submitted_cold(lambda: problems.extend(cache.check())) > 20
        assert bool(problems) == persists  # it says what it could not read
        assert all("Input/output" in one.detail and not one.fixed for one in problems)
    assert cache.stats().corrupt == 0 and len(cache) == len(values)
    cache.close()
    with DiskCache(filled.directory, backend="uring") as cache:  # with a sound ring
        assert cache.get_many(values) == values
        assert cache.check() == []


@pytest.mark.parametrize("persists", [False, True])
def test_a_loop_keeps_an_entry_that_cannot_be_read(
    tmp_path: Path, core: str, persists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(tmp_path / "cache", False)
    values = filled.values
    keys = [key for key in values if key != "long"]
    random.Random(2).shuffle(keys)
    filled.cache.flush()
    filled.cache.close()

    async def main() -> None:
        async with AsyncDiskCache(filled.directory, backend="uring") as cache:
            def submitted() -> int:
                return int(cache._sync().stats().backend_stats["submitted"])

            async def cold(count: int) -> list[Any]:
                for _ in range(10):
                    filled.cool_files()
                    before = submitted()
                    found = await asyncio.gather(*map(cache.get, keys[:count]), return_exceptions=True)
                    if submitted() > before:
                        return found
                raise AssertionError("it stays in memory")

            assert await cold(50) == [values[key] for key in keys[:50]]  # now the loop has its ring
            with monkeypatch.context() as patch:
                unreadable(cache._sync(), patch, persists)
                found = await cold(len(keys))
            failed = [one for one in found if isinstance(one, BaseException)]
            assert all(isinstance(one, CacheIOError) and one.errno == errno.EIO for one in failed)
            assert bool(failed) == persists
            for key, one in zip(keys, found, strict=True):
                assert one in failed or one == values[key]
            assert (await cache.stats()).corrupt == 0

    asyncio.run(main())
    with DiskCache(filled.directory, backend="uring") as cache:
        assert cache.get_many(values) == values
        assert cache.check() == []


# -- reads in place ---------------------------------------------------------------------------


@pytest.mark.skipif(not compiled.load(), reason="the compiled core alone looks first")
def test_loops_give_up_looking_in_memory_and_take_it_up_again(tmp_path: Path) -> None:
    directory = str(tmp_path / "cache")
    values = {f"key-{i}": os.urandom(4096) for i in range(4000)}
    wanted = random.sample(list(values), 300)  # in an order for which nothing is read ahead

    async def main() -> None:
        async with AsyncDiskCache(directory, backend="uring") as cache:
            await cache.set_many(values)
            await cache.flush()
            assert await cache.get("key-0") == values["key-0"]
            assert cache._cold == 0
            for name in os.listdir(f"{directory}/segments"):
                file = os.open(f"{directory}/segments/{name}", os.O_RDONLY)
                cool(file)
                os.close(file)
            found = await asyncio.gather(*[cache.get(key) for key in wanted])
            assert found == [values[key] for key in wanted]
            assert aio.COLD < cache._cold <= aio.COLD_MOST
            before = cache._sync().stats().backend_stats["submitted"]
            for _ in range(20 * aio.COLD_TRIES):  # all of it is in memory now
                assert await cache.get(wanted[0]) == values[wanted[0]]
            assert cache._cold == 0
            after = cache._sync().stats().backend_stats["submitted"]
            assert after - before < 8 * aio.COLD_TRIES

    asyncio.run(main())


def test_read_nowait_of_a_closed_descriptor(make: Make) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        make().read_nowait(1 << 20, 10, 0)


# -- event loops: reading -----------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 128, 4096])
def test_more_reads_than_the_ring_takes(make: Make, fd: int, depth: int) -> None:
    """Backpressure: all complete, none is dropped, and no more than fit are ever under way."""
    backend = make(queue_depth=depth)
    requests = some(fd, 5000, 1000)
    most = 0

    async def main() -> None:
        nonlocal most
        channel = backend.channel(asyncio.get_running_loop())
        futures = [channel.read(*request) for request in requests]
        for future, expected in zip(futures, truth(requests), strict=True):
            most = max(most, channel.running)
            assert await future == expected
        channel.close()

    asyncio.run(main())
    assert most <= 2 * depth
    assert_balanced(backend)


@pytest.mark.parametrize("settings", [{}, {"use_registered_buffers": False}, {"use_fixed_files": True}])
@pytest.mark.parametrize("length", [1, 2, 4096, 4097, 65536, 65537, 1 << 20, 3 << 20])
def test_channel_reads(make: Make, fd: int, length: int, settings: dict[str, Any]) -> None:
    backend = make(**settings)
    requests = some(fd, 300 if length < 10_000 else 20, length)

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)
        found = await asyncio.gather(*[channel.read(*request) for request in requests])
        channel.close()
        return found

    assert asyncio.run(main()) == truth(requests)
    assert_balanced(backend)


def test_channel_outcomes(make: Make, fd: int, tmp_path: Path) -> None:
    backend = make()
    directory = os.open(tmp_path, os.O_RDONLY)
    requests = [
        (fd, 100, SIZE - 50), (fd, 100, SIZE + 5), (fd, 0, 7), (fd, 70_000, SIZE - 60_000),
        (1 << 20, 10, 0), (directory, 10, 0), (-1, 10, 0), (fd, 10, -5), (fd, -1, 0), (1 << 40, 1, 0),
        (fd, 10, 1 << 63),
    ]  # fmt: skip

    async def main() -> list[Any]:
        channel = backend.channel(asyncio.get_running_loop())
        reads = [channel.read(*request) for request in requests]
        return await asyncio.gather(*reads, return_exceptions=True)

    results = asyncio.run(main())
    os.close(directory)
    assert results[:4] == truth(requests[:4])
    codes = [getattr(result, "errno", type(result)) for result in results[4:]]
    assert codes[:5] == [errno.EBADF, errno.EISDIR, errno.EBADF, errno.EINVAL, errno.EINVAL]
    assert codes[5:] == [OverflowError, OverflowError]


def test_one_turn_of_the_loop_is_one_submission(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        await channel.read(fd, 10, 0)
        enters = channel._ring.info()["enters"]
        os.pread(fd, SIZE, 0)
        await asyncio.gather(*[channel.read(*request) for request in some(fd, 30)])
        assert channel._ring.info()["enters"] == enters + 1

    asyncio.run(main())


def test_few_system_calls(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)

        async def work() -> None:
            for request in some(fd, 20):
                await channel.read(*request)

        await asyncio.gather(*[work() for _ in range(256)])

    asyncio.run(main())
    stats = backend.stats()
    assert stats["completed"] >= 256 * 20
    assert stats["enters"] < 0.3 * stats["completed"]


# -- event loops: failures ----------------------------------------------------------------------


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


@pytest.mark.parametrize("length", [4096, 20_000, 100_000])
@pytest.mark.parametrize("result", [1, 1000])
def test_channel_short_reads(make: Make, fd: int, length: int, result: int) -> None:
    found, expected = with_injection(make(), fd, 100, (lib.YR_OP_READ, 5, 80, result), length=length)
    assert found == expected


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
@pytest.mark.parametrize("times", [1, 50, 10**6])
def test_channel_repeats(make: Make, fd: int, code: int, times: int) -> None:
    """With a bound: then it is read without the ring."""
    backend = make()
    found, expected = with_injection(backend, fd, 20, (lib.YR_OP_READ, 0, times, -code))
    assert found == expected
    assert backend.stats()["fallbacks"] == (20 if times > 50 else 0)


def test_channel_error_of_the_file(make: Make, fd: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 10, (lib.YR_OP_READ, 0, 1, -errno.EIO))
    assert [error.errno for error in found if isinstance(error, OSError)] == [errno.EIO]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) == 9


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("times", [1, ring_channel._FAILURES, 10**6])
def test_channel_error_of_the_ring(
    make: Make, fd: int, code: int, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 300, (lib.YR_OP_READ, 0, times, -code))
    assert found == expected
    stats = backend.stats()
    assert stats["fallbacks"] >= min(times, 300)
    given_up = times >= ring_channel._FAILURES
    assert stats["degraded"] == stats["ring_failures"] == given_up
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == given_up


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_submission_that_must_wait(make: Make, fd: int, code: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 5, -code))
    assert found == expected
    assert backend.stats()["fallbacks"] == 0


def test_submission_in_parts(make: Make, fd: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 4, 3))
    assert found == expected
    assert backend.stats()["fallbacks"] == 0


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EBADF, errno.EINVAL])
def test_submission_that_fails_for_good(
    make: Make, fd: int, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The reads of the user go on, with one log line; some time later there is a ring again."""
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 10**6, -code))
    assert found == expected
    stats = backend.stats()
    assert stats["degraded"] == 1 and stats["fallbacks"] >= 200
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    backend.rings._none_before = 0.0
    found, expected = with_injection(backend, fd, 10)
    assert found == expected
    assert backend.stats()["fallbacks"] == stats["fallbacks"]
    assert backend.stats()["degraded"] == 0


def test_no_ring_to_be_had_later(
    make: Make, fd: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> Ring:
        raise OSError(errno.ENOMEM, "no memory")

    backend = make()
    monkeypatch.setattr(ring_module, "Ring", refuse)
    requests = some(fd, 100)

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        return await asyncio.gather(*[channel.read(*request) for request in requests])

    for _ in range(3):
        assert asyncio.run(main()) == truth(requests)
    assert backend.stats()["fallbacks"] == 300
    assert backend.stats()["degraded"] == 1
    assert len(caplog.records) == 1 and "ENOMEM" in caplog.text


def test_a_loop_that_cannot_be_woken(make: Make, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()

    async def main() -> bytes:
        loop = asyncio.get_running_loop()

        def refuse(*args: Any) -> None:
            raise NotImplementedError

        monkeypatch.setattr(loop, "add_reader", refuse)
        return await backend.channel(loop).read(fd, 100, 5)

    before = descriptors()
    assert asyncio.run(main()) == os.pread(fd, 100, 5)
    assert descriptors() == before


# -- ownership of memory ------------------------------------------------------------------------


def test_cancelled_reads_keep_their_memory_until_they_end(make: Make, fd: int) -> None:
    backend = make(queue_depth=32)
    requests = some(fd, 400)

    async def main() -> int:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)
        reads = [channel.read(*request) for request in requests]
        await asyncio.sleep(0)  # now the first of them are under way
        running = channel.running
        cancelled = {read for read in reads[::2] if read.cancel()}
        assert channel.running == running  # still the kernel's
        assert channel._small.in_use >= running
        results = await asyncio.gather(*reads, return_exceptions=True)
        for read, result, expected in zip(reads, results, truth(requests), strict=True):
            assert isinstance(result, asyncio.CancelledError) if read in cancelled else result == expected
        channel.close()
        return len(cancelled)

    # Where others have the processor, most may be done by then.
    assert any(asyncio.run(main()) > 100 for _ in range(20))


def test_cancelled_before_they_begin(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        await channel.read(fd, 1, 0)
        submitted = channel._ring.info()["submitted"]
        for read in [channel.read(*request) for request in some(fd, 20)]:
            read.cancel()
        await asyncio.sleep(0.01)
        assert channel._ring.info()["submitted"] == submitted
        channel.close()

    asyncio.run(main())
    assert_balanced(backend)


def test_tasks_cancelled_at_random(make: Make, fd: int) -> None:
    backend = make(queue_depth=16)
    bad: list[Any] = []

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())

        async def work(rng: random.Random) -> None:
            for _ in range(30):
                request = (fd, rng.choice((100, 4096, 9000, 80_000)), rng.randrange(SIZE - 100_000))
                data = await channel.read(*request)
                if data != os.pread(*request):
                    bad.append(request)

        for turn in range(20):
            cool(fd)
            tasks = [asyncio.create_task(work(random.Random(i + 1000 * turn))) for i in range(40)]
            for task in random.sample(tasks, 20):
                await asyncio.sleep(0.0005)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        channel.close()

    asyncio.run(main())
    assert bad == []
    assert_balanced(backend)


@pytest.mark.parametrize("length", [4096, 100_000])
def test_garbage_collection_during_io(make: Make, fd: int, length: int) -> None:
    """Nobody but the channel holds what is under way."""
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        for _ in range(10):
            cool(fd)
            for request in some(fd, 50, length):
                channel.read(*request)
            await asyncio.sleep(0)
            gc.collect()
            noise = [bytes([i]) * length for i in range(100)]  # takes whatever was freed too early
            requests = some(fd, 50, length)
            results = await asyncio.gather(*[channel.read(*request) for request in requests])
            assert results == truth(requests)
            assert noise == [bytes([i]) * length for i in range(100)]
        channel.close()

    asyncio.run(main())
    assert_balanced(backend)


def test_collecting_a_channel_with_reads_under_way(make: Make, fd: int) -> None:
    """Its memory stays until the reads have ended, although nobody knows the channel any more."""
    loop, channel, reads = start_reads(make(), fd, 50)
    there = weakref.ref(channel)
    loop.close()
    del loop, channel, reads
    gc.collect()
    found = there()
    assert found is not None
    found.close()
    del found
    gc.collect()
    assert there() is None


def test_collecting_a_backend_that_nobody_closed(path: Path, fd: int) -> None:
    def drop() -> None:
        backend = UringBackend(make_settings("/unused", backend="uring"))
        backend.read_many(some(fd, 20))
        loop = asyncio.new_event_loop()
        channel = backend.channel(loop)

        async def main() -> None:
            await asyncio.gather(*[channel.read(*request) for request in some(fd, 20)])

        loop.run_until_complete(main())
        loop.close()

    gc.collect()
    before = descriptors(), ring_module.locked.used
    for _ in range(3):
        drop()
    gc.collect()
    assert (descriptors(), ring_module.locked.used) == before


def test_results_are_nobody_elses_and_buffers_are_wiped(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        for length in (4096, 100, 60_000):
            requests = some(fd, 100, length)
            results = await asyncio.gather(*[channel.read(*request) for request in requests])
            for pool in (channel._small, channel._medium):
                assert pool.in_use == 0
                assert not any(pool.view)
                pool.view[:] = b"\xee" * len(pool.view)
            assert results == truth(requests)
            for pool in (channel._small, channel._medium):
                pool.view[:] = bytes(len(pool.view))

    asyncio.run(main())


def test_a_poisoned_buffer_does_not_shine_through(make: Make, fd: int) -> None:
    """Where the file ends, what is behind it in the buffer is not returned."""
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        await channel.read(fd, 10, 0)
        channel._small.view[:] = b"\xee" * len(channel._small.view)
        for short in (0, 1, 100, 4095):
            assert await channel.read(fd, 4096, SIZE - short) == os.pread(fd, 4096, SIZE - short)

    asyncio.run(main())


# -- loops and threads ----------------------------------------------------------------------------


def test_loops_in_several_threads(make: Make, fd: int) -> None:
    backend = make(queue_depth=32)
    errors: list[BaseException] = []
    rings: set[int] = set()
    shares: list[int] = []
    all_done = threading.Barrier(5, timeout=60)

    async def main(seed: int) -> None:
        rng = random.Random(seed)
        channel = backend.channel(asyncio.get_running_loop())
        for _ in range(20):
            requests = [(fd, 2000, rng.randrange(SIZE - 2000)) for _ in range(200)]
            found = await asyncio.gather(*[channel.read(*request) for request in requests])
            assert found == truth(requests)
        rings.add(id(channel._ring))
        all_done.wait()
        all_done.wait()
        channel.close()

    def work(seed: int) -> None:
        try:
            asyncio.run(main(seed))
        except BaseException as error:
            errors.append(error)
            all_done.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        all_done.wait()
        figures = backend.stats()
        shares = [figures[name] for name in figures if re.fullmatch(r"ring_[1-9]\d*_submitted", name)]
        all_done.wait()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(rings) == len(shares) == 4
    assert all(20 * 200 <= share <= 1.1 * 20 * 200 for share in shares), shares  # each did its own loop's
    assert_balanced(backend)


def test_a_slow_loop_does_not_hold_up_another(make: Make, fd: int) -> None:
    backend = make()
    entered, done = threading.Event(), threading.Event()

    async def slow() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        read = channel.read(fd, 4096, 0)
        entered.set()
        done.wait(30)  # blocks its loop with a read under way
        await read
        channel.close()

    async def quick() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        for request in some(fd, 200):
            await channel.read(*request)
        channel.close()

    thread = threading.Thread(target=lambda: asyncio.run(slow()))
    thread.start()
    entered.wait(30)
    started = time.monotonic()
    asyncio.run(quick())
    assert time.monotonic() - started < 10
    done.set()
    thread.join()


def start_reads(backend: UringBackend, fd: int, count: int = 100) -> tuple[Any, Any, list[Any]]:
    """A loop that was left with reads under way: (loop, channel, futures)."""
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[Any, list[Any]]:
        channel = backend.channel(loop)
        cool(fd)
        reads = [channel.read(*request) for request in some(fd, count)]
        await asyncio.sleep(0)
        return channel, reads

    channel, reads = loop.run_until_complete(begin())
    return loop, channel, reads


@pytest.mark.parametrize("closed_first", ["loop", "channel"])
def test_a_loop_that_ends_with_reads_under_way(make: Make, fd: int, closed_first: str) -> None:
    before = descriptors()
    backend = make(queue_depth=16)
    rings = descriptors() - before
    loop, channel, reads = start_reads(backend, fd)
    if closed_first == "loop":
        loop.close()
        channel.close()
        assert sum(read.done() for read in reads) < 100
    else:
        channel.close()
        loop.run_until_complete(asyncio.sleep(0))
        assert all(read.done() for read in reads)
        loop.close()
    channel.close()  # idempotent
    assert descriptors() == before + rings
    assert_balanced(backend)
    del reads, loop, channel
    gc.collect()


def test_close_in_another_thread_than_the_loops(make: Make, fd: int) -> None:
    """Its ring is given up; what was under way is read again when the loop runs."""
    backend = make()
    loop, channel, reads = start_reads(backend, fd, 50)
    thread = threading.Thread(target=channel.close)
    thread.start()
    thread.join()
    results = loop.run_until_complete(asyncio.gather(*reads))
    loop.close()
    assert [len(result) for result in results] == [4096] * 50


def test_a_loop_that_goes_on_in_another_thread(make: Make, fd: int) -> None:
    backend = make()
    loop, channel, reads = start_reads(backend, fd, 50)
    outcome: list[Any] = []

    async def more() -> list[bytes]:
        late = [channel.read(*request) for request in some(fd, 20)]
        return await asyncio.wait_for(asyncio.gather(*reads, *late), 30)

    thread = threading.Thread(target=lambda: outcome.append(loop.run_until_complete(more())))
    thread.start()
    thread.join()
    assert [len(data) for data in outcome[0]] == [4096] * 70
    channel.close()
    loop.close()


def test_the_thread_of_a_loop_ends_with_reads_under_way(make: Make, fd: int) -> None:
    before = descriptors()
    backend = make()
    rings = descriptors() - before
    started: list[Any] = []
    for close_loop in (True, False):
        thread = threading.Thread(target=lambda: started.append(start_reads(backend, fd)))
        thread.start()
        thread.join()
        loop, channel, reads = started.pop()
        if close_loop:
            loop.close()
            channel.close()
        else:
            results = loop.run_until_complete(asyncio.wait_for(asyncio.gather(*reads), 30))
            assert [len(result) for result in results] == [4096] * 100
            channel.close()
            loop.close()
    assert descriptors() == before + rings


def test_closing_the_backend_with_reads_under_way(make: Make, fd: int) -> None:
    """From another thread, while the loop runs: everything that was asked for completes."""
    backend = make(queue_depth=8)
    requests = some(fd, 500)

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)
        reads = [channel.read(*request) for request in requests]
        await asyncio.sleep(0)
        closing = asyncio.get_running_loop().run_in_executor(None, backend.close)
        found = await asyncio.gather(*reads)
        await closing
        return found

    before = descriptors()
    assert asyncio.run(main()) == truth(requests)
    assert descriptors() < before  # the backend's first ring is gone too
    assert backend.stats()["rings"] == 0
    backend.close()


def test_closing_the_backend_while_batches_run(make: Make, fd: int) -> None:
    backend = make()
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                requests = some(fd, 100)
                assert backend.read_many(requests) == truth(requests)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    backend.close()
    time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert backend.stats()["rings"] == 0


def test_a_closed_channel_still_reads(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> bytes:
        channel = backend.channel(asyncio.get_running_loop())
        channel.close()
        return await channel.read(fd, 100, 7)

    assert asyncio.run(main()) == os.pread(fd, 100, 7)
    assert backend.stats()["submitted"] == TRIED


# -- fork and exit ----------------------------------------------------------------------------------


def test_fork_with_reads_under_way(make: Make, fd: int) -> None:
    backend = make(queue_depth=64)
    loop, channel, reads = start_reads(backend, fd, 200)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.dump_traceback_later(60, exit=True)
            backend.after_fork()
            requests = some(fd, 50)
            assert backend.stats()["rings"] == 0
            assert backend.read_many(requests) == truth(requests)

            async def main() -> None:
                other = backend.channel(asyncio.get_running_loop())
                found = await asyncio.gather(*[other.read(*request) for request in requests])
                assert found == truth(requests)

            asyncio.run(main())
            assert backend.stats()["registered_bytes"] > 0
            backend.close()
            assert backend.stats()["registered_bytes"] == 0
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    results = loop.run_until_complete(asyncio.wait_for(asyncio.gather(*reads), 60))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [len(result) for result in results] == [4096] * 200
    requests = some(fd, 50)
    assert backend.read_many(requests) == truth(requests)
    channel.close()
    loop.close()
    assert_balanced(backend)


EXIT = """
import asyncio, os, random, sys, threading
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.backends.uring import UringBackend
backend = UringBackend(make_settings("/unused", backend="uring"))
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
loop = asyncio.new_event_loop()
async def begin():
    channel = backend.channel(loop)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    reads = [channel.read(fd, length, random.randrange(size - length)) for length in (4096, 100_000) * 60]
    await asyncio.sleep(0)
    return reads
def leave():
    global reads
    reads = loop.run_until_complete(begin())
if sys.argv[2] == "thread":
    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
else:
    leave()
if sys.argv[2] == "closed":
    loop.close()
"""


@pytest.mark.parametrize("how", ["open", "closed", "thread"])
def test_interpreter_exit_with_reads_under_way(path: Path, how: str) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", EXIT, str(path), how], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- leaks and figures --------------------------------------------------------------------------------


@pytest.mark.usefixtures("long_reads")
def test_no_leaks(make: Make, path: Path, fd: int) -> None:
    def everything() -> None:
        backend = make(use_fixed_files=True)

        async def main() -> None:
            channel = backend.channel(asyncio.get_running_loop())
            files = [backend.open(str(path), os.O_RDONLY) for _ in range(5)]
            for _ in range(5):
                requests = some(random.choice(files), 200)
                await asyncio.gather(*[channel.read(*request) for request in requests])
                backend.close_file(files.pop())
            channel.close()

        asyncio.run(main())
        backend.read_many(some(fd, 200))
        cool(fd)
        backend.read(fd, SIZE, 0)
        backend.close()

    everything()
    gc.collect()  # rings that other tests left
    lost, used = len(ring_module._lost), ring_module.locked.used
    before = descriptors(), pinned_kib()
    for _ in range(10):  # more than 10,000 reads
        everything()
    assert (descriptors(), ring_module.locked.used) == (before[0], used)
    limit = time.monotonic() + 20
    while pinned_kib() > before[1] and time.monotonic() < limit:
        time.sleep(0.05)  # the kernel takes rings apart in its own time
    assert pinned_kib() <= before[1]
    assert len(ring_module._lost) == lost


def test_figures_of_each_ring(make: Make, fd: int) -> None:
    backend = make(queue_depth=100)
    backend.read_many(some(fd, 70))

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        await asyncio.gather(*[channel.read(*request) for request in some(fd, 50)])
        stats = backend.stats()
        assert all(isinstance(value, int) for value in stats.values())
        assert stats["rings"] == 2
        assert (stats["ring_0_submitted"], stats["ring_1_submitted"]) == (TRIED + 70, 50)
        assert stats["ring_1_depth"] == 100
        assert stats["submitted"] == stats["completed"] == TRIED + 120
        assert stats["registered_bytes"] > 0
        assert stats["buffers_4096_allocations"] == stats["buffers_4096_misses"] > 0
        channel.close()

    asyncio.run(main())
    stats = backend.stats()
    assert stats["submitted"] == TRIED + 120 and stats["rings"] == 1
    assert "ring_1_submitted" not in stats


def test_memory_is_pinned_within_the_share_of_the_process(
    make: Make, fd: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends = [make() for _ in range(5)]
    assert 0 < backends[0].stats()["registered_bytes"] <= 4 << 20
    requests = some(fd, 50)
    for backend in backends:
        assert backend.read_many(requests) == truth(requests)
    assert caplog.records == []


def test_registered_buffers_refused(
    make: Make, fd: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ring_module, "_said", set())
    monkeypatch.setattr(Ring, "register", lambda self, *pools: errno.ENOMEM)
    backend = make()
    found, expected = with_injection(backend, fd, 20)
    assert found == expected
    assert backend.read_many(requests := some(fd, 20)) == truth(requests)
    assert len(caplog.records) == 1 and "ENOMEM" in caplog.text and "ulimit -l" in caplog.text


# -- registered files -----------------------------------------------------------------------------------


def test_fixed_files_follow_closing(make: Make, tmp_path: Path) -> None:
    """A number that is used again is another file; a closed file is not kept open."""
    backend = make(use_fixed_files=True)

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        seen = set()
        for i in range(300):
            (tmp_path / "file").unlink(missing_ok=True)
            (tmp_path / "file").write_bytes(b"%d" % i * 100)
            fd = backend.open(str(tmp_path / "file"), os.O_RDONLY)
            seen.add(fd)
            assert await channel.read(fd, 100, 0) == (b"%d" % i * 100)[:100]
            assert fd in channel._files
            backend.close_file(fd)
            if i % 2:
                await asyncio.sleep(0)
                assert fd not in channel._files
        assert len(seen) < 10
        channel.close()

    asyncio.run(main())


def test_more_files_than_places(make: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_channel, "_FILES", 4)
    backend = make(use_fixed_files=True)
    fds = [backend.open(str(path), os.O_RDONLY) for _ in range(10)]
    requests = [some(fd, 1)[0] for fd in fds * 5]

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        return await asyncio.gather(*[channel.read(*request) for request in requests])

    assert asyncio.run(main()) == truth(requests)
    for fd in fds:
        backend.close_file(fd)


# -- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"cpu_affinity": [0]}, {"max_workers": 2}, {"sqpoll": True, "queue_depth": 8}, {"cpu_affinity": [8000]}],
    ids=str,
)
def test_optional_settings(make: Make, fd: int, tmp_path: Path, settings: dict[str, Any]) -> None:
    backend = make(**settings)
    found, expected = with_injection(backend, fd, 100)
    assert found == expected
    fds = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(4)]

    def work() -> None:
        requests = some(fd, 50)
        assert backend.read_many(requests) == truth(requests)
        assert backend.write_many([(fd, [b"x"], 0) for fd in fds], fds) == [None] * 4

    work()
    thread = threading.Thread(target=work)  # whose kernel workers are others
    thread.start()
    thread.join()
    for file in fds:
        os.close(file)
    assert backend.stats()["fallbacks"] == 0


WORKERS = """
import json, os, sys, threading
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.backends.uring import UringBackend
backend = UringBackend(make_settings("/unused", backend="uring", io_uring=json.loads(sys.argv[2])))
fds = [os.open(os.path.join(sys.argv[1], str(i)), os.O_RDWR | os.O_CREAT) for i in range(40)]
most, cpus, stop = 0, set(), False
def workers():
    "The CPUs that each worker of the kernel may run on."
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            if status["Name"].strip().startswith("iou-wrk"):
                yield status["Cpus_allowed_list"].strip()
        except OSError:
            pass
def look():
    global most
    while not stop:
        found = list(workers())
        most = max(most, len(found))
        cpus.update(found)
looking = threading.Thread(target=look)
looking.start()
def work():
    for i in range(5):
        assert backend.write_many([(fd, [b"x" * 1000], i * 1000) for fd in fds], fds) == [None] * 40
work()
other = threading.Thread(target=work)  # whose workers are others
other.start()
other.join()
stop = True
looking.join()
print(json.dumps([most, sorted(cpus)]))
"""


def kernel_workers(tmp_path: Path, **settings: Any) -> tuple[int, list[str]]:
    """Most workers seen at once while files are synced, and on which CPUs they may run.

    Syncs run in workers of the kernel, which appear among our threads.
    """
    command = [sys.executable, "-c", WORKERS, str(tmp_path), json.dumps(settings)]
    most, cpus = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return most, cpus


def test_workers_stay_bounded(tmp_path: Path) -> None:
    bounded, free = kernel_workers(tmp_path, max_workers=1)[0], kernel_workers(tmp_path)[0]
    assert bounded <= 4 < free  # one of each kind for each of two threads


def test_workers_stay_on_their_cpus(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("there is but one CPU to run on")
    for cpu in allowed[:2]:
        assert kernel_workers(tmp_path, cpu_affinity=[cpu])[1] == [str(cpu)]
    assert kernel_workers(tmp_path)[1] not in ([str(cpu)] for cpu in allowed)


@pytest.mark.slow
def test_a_minute_with_a_thousand_reads_under_way(make: Make, fd: int) -> None:
    backend = make()
    seconds = float(os.environ.get("YATAGARASU_SOAK_SECONDS", "10"))

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        end = time.monotonic() + seconds
        before: tuple[int, int] | None = None
        memory: list[int] = []

        async def work() -> None:
            while time.monotonic() < end:
                request = some(fd, 1)[0]
                assert await channel.read(*request) == os.pread(*request)

        workers = [asyncio.create_task(work()) for _ in range(1200)]
        while time.monotonic() < end:
            await asyncio.sleep(seconds / 10)
            now = descriptors(), pinned_kib()
            before = before or now
            assert now == before
            memory.append(resident_kib())
        assert memory[-1] - memory[0] < 4 << 10, memory
        await asyncio.gather(*workers)
        channel.close()

    asyncio.run(main())
    assert_balanced(backend)
