"""The compiled ring module, driven directly: csrc/ring.h and csrc/ring.cdef.h are the contract.

Skipped only where the module is not built or the kernel refuses rings, and not even then if
YATAGARASU_IO_URING=require is set: then these tests fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import random
import resource
import select
import signal
import struct
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OP = struct.Struct("=BBHiQQQQiIIi")  # struct yr_op
PAGE = 4096


def _load() -> tuple[Any, str]:
    """(the module, "") or (None, why it cannot be used here)."""
    try:
        module: Any = importlib.import_module("yatagarasu_cache._ring")
    except ImportError as error:
        return None, f"the compiled module is not there: {error}"
    ring = module.ffi.new("struct yr_ring **")
    options = module.ffi.new("struct yr_options *", {"depth": 4, "sq_cpu": -1})
    result = module.lib.yr_create(ring, options)
    if result != 0:
        return None, f"the kernel refuses rings: {errno.errorcode.get(-result, result)}"
    module.lib.yr_destroy(ring[0], 0)
    return module, ""


_MODULE, _WHY = _load()
REQUIRED = os.environ.get("YATAGARASU_IO_URING", "").strip().lower() == "require"
if _MODULE is None and not REQUIRED:
    pytest.skip(_WHY, allow_module_level=True)

ffi: Any = _MODULE.ffi if _MODULE is not None else None
lib: Any = _MODULE.lib if _MODULE is not None else None


@pytest.fixture(autouse=True)
def _there() -> None:
    if _MODULE is None:
        pytest.fail(f"YATAGARASU_IO_URING=require, but {_WHY}")


def address(buffer: Any) -> int:
    """Where a buffer is; the caller keeps it alive."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def name_of(result: int) -> str:
    return errno.errorcode.get(-result, str(result))


class Ring:
    """The C interface with Python's arrays; nothing is hidden."""

    def __init__(self, depth: int = 32, **options: int) -> None:
        holder = ffi.new("struct yr_ring **")
        settings = {"depth": depth, "flags": lib.YR_SETUP_DEFAULT, "sq_cpu": -1, **options}
        result = lib.yr_create(holder, ffi.new("struct yr_options *", settings))
        if result != 0:
            raise OSError(-result, os.strerror(-result))
        self.c = holder[0]

    def info(self) -> Any:
        info = ffi.new("struct yr_info *")
        assert lib.yr_info(self.c, info) == 0
        return info

    def queue(self, *ops: bytes) -> int:
        packed = b"".join(ops)
        return int(lib.yr_queue(self.c, len(ops), ffi.from_buffer("struct yr_op[]", packed)))

    def wait(self, count: int = 1, timeout: float = 10.0) -> int:
        return int(lib.yr_wait(self.c, count, int(timeout * 1e9)))

    def reap(self, most: int = 4096) -> list[tuple[int, int]]:
        user_data = ffi.new("uint64_t[]", most)
        results = ffi.new("int32_t[]", most)
        found = lib.yr_reap(self.c, most, user_data, results, ffi.NULL)
        assert found >= 0, name_of(found)
        return [(user_data[i], results[i]) for i in range(found)]

    def turn(self, most: int = 4096) -> list[tuple[int, int]]:
        user_data = ffi.new("uint64_t[]", most)
        results = ffi.new("int32_t[]", most)
        found = lib.yr_turn(self.c, most, user_data, results, ffi.NULL)
        assert found >= 0, name_of(found)
        return [(user_data[i], results[i]) for i in range(found)]

    def finish(self) -> dict[int, int]:
        """Submit, and wait for everything in flight."""
        done: dict[int, int] = {}
        limit = time.monotonic() + 30
        while self.info().inflight:
            assert time.monotonic() < limit, "operations do not complete"
            result = self.wait(self.info().inflight, 1.0)
            assert result >= 0 or result == -errno.EAGAIN, name_of(result)
            done.update(self.reap())
        return done

    def run(self, *ops: bytes) -> list[int]:
        """Queue, wait, and give the results by position (user_data is set)."""
        numbered = [op[:32] + struct.pack("=Q", i) + op[40:] for i, op in enumerate(ops)]
        assert self.queue(*numbered) == len(ops)
        done = self.finish()
        return [done[i] for i in range(len(ops))]

    def read_batch(
        self, requests: list[tuple[int, int, int]], flags: int = 0
    ) -> tuple[list[int], list[bytes]]:
        """[(fd, length, offset)] -> (results, memory)."""
        memory = [bytearray(b"\xaa" * max(1, length)) for _, length, _ in requests]
        results = ffi.new("int64_t[]", max(1, len(requests)))
        code = lib.yr_read_batch(
            self.c,
            len(requests),
            [fd for fd, _, _ in requests],
            [address(buffer) for buffer in memory],
            [length for _, length, _ in requests],
            [offset for _, _, offset in requests],
            results,
            flags,
            0,
        )
        assert code == 0, name_of(code)
        assert self.info().inflight == 0
        return list(results)[: len(requests)], [bytes(buffer) for buffer in memory]

    def write_batch(
        self, requests: list[tuple[int, list[bytes], int]], sync: list[int] | None = None, flags: int = 0
    ) -> tuple[list[int], list[int]]:
        """[(fd, pieces, offset)], descriptors to sync -> (results, results of syncs)."""
        sync = sync or []
        first = [0]
        pieces = []
        for _, buffers, _ in requests:
            pieces += buffers
            first.append(len(pieces))
        results = ffi.new("int64_t[]", max(1, len(requests)))
        sync_results = ffi.new("int32_t[]", max(1, len(sync)))
        keep = [ffi.from_buffer(piece) for piece in pieces]
        code = lib.yr_write_batch(
            self.c,
            len(requests),
            [fd for fd, _, _ in requests],
            [offset for _, _, offset in requests],
            first,
            [int(ffi.cast("uintptr_t", piece)) for piece in keep],
            [len(piece) for piece in pieces],
            results,
            flags,
            0,
            len(sync),
            sync,
            sync_results,
        )
        assert code == 0, name_of(code)
        assert self.info().inflight == 0
        return list(results)[: len(requests)], list(sync_results)[: len(sync)]

    def inject(self, op: int, result: int, skip: int = 0, count: int = 1, instead: bool = False) -> None:
        assert lib.yr_inject(self.c, op, skip, count, result, instead) == 0

    def close(self, force: bool = False) -> int:
        result = int(lib.yr_destroy(self.c, force))
        if result == 0:
            self.c = ffi.NULL
        return result


def op(
    kind: int,
    fd: int = -1,
    addr: int = 0,
    length: int = 0,
    off: int = 0,
    *,
    flags: int = 0,
    buffer: int = 0,
    user_data: int = 0,
    arg: int = 0,
    mode: int = 0,
    file_index: int = 0,
    fd2: int = -1,
) -> bytes:
    return OP.pack(kind, flags, buffer, fd, addr, length, off, user_data, arg, mode, file_index, fd2)


@pytest.fixture
def ring() -> Iterator[Ring]:
    before = open_descriptors()
    made = Ring()
    yield made
    made.finish()
    assert made.close() == 0
    assert open_descriptors() == before


@pytest.fixture
def data() -> bytes:
    return random.Random(7).randbytes(600 * PAGE + 123)


@pytest.fixture
def fd(tmp_path: Path, data: bytes) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    made = [os.open(tmp_path / f"out{i}", os.O_RDWR | os.O_CREAT, 0o600) for i in range(4)]
    yield made
    for descriptor in made:
        os.close(descriptor)


# -- creating, asking, freeing --------------------------------------------------------------------


def test_versions_and_layout() -> None:
    assert lib.yr_abi_version() == lib.YR_ABI_VERSION
    assert ffi.sizeof("struct yr_op") == OP.size == 56


def test_create_tells_what_it_got(ring: Ring) -> None:
    info = ring.info()
    assert info.sq_entries == 32
    assert info.cq_entries == info.max_inflight == 64
    assert info.inflight == info.queued == info.broken == 0
    assert info.event_fd == -1
    assert os.readlink(f"/proc/self/fd/{info.ring_fd}") == "anon_inode:[io_uring]"
    for kind in (lib.YR_OP_NOP, lib.YR_OP_READ, lib.YR_OP_WRITE, lib.YR_OP_FDATASYNC, lib.YR_OP_CANCEL):
        assert lib.yr_supports(ring.c, kind) == 1
    assert lib.yr_supports(ring.c, lib.YR_OP_COUNT) == 0
    assert lib.yr_supports(ring.c, 10**6) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0},
        {"depth": 32769},
        {"depth": 8, "flags": 1 << 20},
        {"depth": 8, "cq_entries": 4},
        {"depth": 8, "cq_entries": 1 << 20},
        {"depth": 8, "max_inflight": 1 << 21},
        {"depth": 8, "flags": 2},  # DEFER_TASKRUN without SINGLE_ISSUER
    ],
)
def test_create_refuses_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(OSError) as caught:
        Ring(**options)
    assert caught.value.errno == errno.EINVAL


def test_create_with_every_kind_of_flags(fd: int, data: bytes) -> None:
    for flags in (0, 1, 4, 5, 3, 7):
        ring = Ring(8, flags=flags)
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(50)])
        assert results == [100] * 50 and b"".join(memory) == data[:5000]
        assert ring.close() == 0


def test_null_is_refused() -> None:
    nothing = ffi.NULL
    assert lib.yr_create(nothing, ffi.new("struct yr_options *", {"depth": 8})) == -errno.EINVAL
    assert lib.yr_create(ffi.new("struct yr_ring **"), nothing) == -errno.EINVAL
    assert lib.yr_destroy(nothing, 0) == 0
    assert lib.yr_info(nothing, nothing) == -errno.EINVAL
    assert lib.yr_submit(nothing) == -errno.EINVAL
    assert lib.yr_wait(nothing, 1, 0) == -errno.EINVAL
    assert lib.yr_queue(nothing, 0, nothing) == -errno.EINVAL
    assert lib.yr_eventfd(nothing) == -errno.EINVAL
    assert lib.yr_inject(nothing, 0, 0, 1, 0, 0) == -errno.EINVAL


def test_no_descriptor_is_left_over_many_rings() -> None:
    before = open_descriptors()
    for _ in range(200):
        ring = Ring(8)
        assert lib.yr_eventfd(ring.c) >= 0
        assert ring.run(op(lib.YR_OP_NOP)) == [0]
        assert ring.close() == 0
    assert open_descriptors() == before


def test_create_says_emfile() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made: list[Ring] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors(), hard))
    try:
        with pytest.raises(OSError) as caught:
            for _ in range(64):
                made.append(Ring(8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    for ring in made:
        assert ring.close() == 0


def test_destroy_refuses_with_operations_in_flight(ring: Ring) -> None:
    end, other = os.pipe()
    memory = bytearray(10)
    assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 10, user_data=5)) == 1
    assert lib.yr_submit(ring.c) == 1
    assert ring.close() == -errno.EBUSY
    os.write(other, b"0123456789")
    assert ring.finish() == {5: 10}
    assert memory == b"0123456789"
    os.close(end)
    os.close(other)


# -- queueing, submitting, reaping ----------------------------------------------------------------


def test_read_and_write_one(ring: Ring, fd: int, data: bytes) -> None:
    memory = bytearray(100)
    assert ring.run(op(lib.YR_OP_READ, fd, address(memory), 100, 50)) == [100]
    assert memory == data[50:150]
    text = bytearray(b"written")
    assert ring.run(op(lib.YR_OP_WRITE, fd, address(text), 7, 10)) == [7]
    assert os.pread(fd, 9, 9) == data[9:10] + b"written" + data[17:18]


def test_columns(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    n = 20
    memory = bytearray(n * 10)
    base = address(memory)
    user_data = [1000 + i for i in range(n)]
    columns = (
        array("i", [fd] * n),
        array("Q", [base + 10 * i for i in range(n)]),
        array("I", [10] * n),
        array("Q", [100 * i for i in range(n)]),
        array("Q", user_data),
    )
    kinds = ("int32_t[]", "uint64_t[]", "uint32_t[]", "uint64_t[]", "uint64_t[]")
    cdata = [ffi.from_buffer(kind, column) for kind, column in zip(kinds, columns, strict=True)]
    assert lib.yr_queue_reads(ring.c, n, *cdata, ffi.NULL, ffi.NULL) == n
    assert ring.finish() == dict.fromkeys(user_data, 10)
    assert bytes(memory) == b"".join(data[100 * i : 100 * i + 10] for i in range(n))
    columns[0][:] = array("i", [files[0]] * n)
    assert lib.yr_queue_writes(ring.c, n, *cdata, ffi.NULL, ffi.NULL) == n
    assert ring.finish() == dict.fromkeys(user_data, 10)
    assert os.pread(files[0], 10, 1900) == data[1900:1910]
    assert lib.yr_queue_reads(ring.c, n, ffi.NULL, *cdata[1:], ffi.NULL, ffi.NULL) == -errno.EINVAL
    columns[1][5] = 0
    assert lib.yr_queue_reads(ring.c, n, *cdata, ffi.NULL, ffi.NULL) == -errno.EINVAL
    assert ring.info().inflight == 0


def test_a_bad_operation_queues_nothing(ring: Ring, fd: int) -> None:
    memory = bytearray(10)
    good = op(lib.YR_OP_READ, fd, address(memory), 10)
    for bad in (
        op(99),
        op(lib.YR_OP_CANCEL, addr=1),
        op(lib.YR_OP_READ, fd, 0, 10),
        op(lib.YR_OP_READ, fd, address(memory), lib.YR_MAX_IO + 1),
        op(lib.YR_OP_READ, fd, address(memory), 10, 1 << 63),
        op(lib.YR_OP_READ, fd, address(memory), 10, flags=128),
        op(lib.YR_OP_READ, 0, address(memory), 10, flags=lib.YR_FIXED_FILE),
        op(lib.YR_OP_READ, fd, address(memory), 10, flags=lib.YR_FIXED_BUFFER),
        op(lib.YR_OP_WRITEV, fd, address(memory), 1025),
        op(lib.YR_OP_WRITEV, fd, address(memory), 0),
        op(lib.YR_OP_OPENAT, -100, 0),
        op(lib.YR_OP_RENAMEAT, -100, address(memory)),
        op(lib.YR_OP_CLOSE, -1, file_index=1),
        op(lib.YR_OP_NOP, flags=lib.YR_LINK),  # a chain without an end
    ):
        assert ring.queue(good, bad) == -errno.EINVAL
        assert ring.info().inflight == 0


def test_errors_are_results(ring: Ring, tmp_path: Path) -> None:
    memory = bytearray(10)
    directory = os.open(tmp_path, os.O_RDONLY)
    results = ring.run(
        op(lib.YR_OP_READ, 10**6, address(memory), 10),
        op(lib.YR_OP_READ, directory, address(memory), 10),
        op(lib.YR_OP_WRITE, directory, address(memory), 10),
    )
    os.close(directory)
    assert results == [-errno.EBADF, -errno.EISDIR, -errno.EBADF]


def test_backpressure_partial_count_then_the_rest(fd: int, data: bytes) -> None:
    ring = Ring(8)  # 8 entries, 16 in flight
    n = 100
    memory = bytearray(n * 10)
    ops = [op(lib.YR_OP_READ, fd, address(memory) + 10 * i, 10, 10 * i, user_data=i) for i in range(n)]
    assert ring.queue(*ops) == 16
    assert ring.info().inflight == 16
    assert ring.queue(*ops) == 0
    done: dict[int, int] = {}
    queued = 16
    while queued < n or ring.info().inflight:
        assert ring.wait(1) >= 1
        done.update(ring.reap())
        if queued < n:
            queued += ring.queue(*ops[queued:])
    assert done == dict.fromkeys(range(n), 10)
    assert memory == data[: n * 10]
    assert ring.close() == 0


def test_a_chain_is_never_divided(fd: int) -> None:
    ring = Ring(4, max_inflight=6)
    link = op(lib.YR_OP_NOP, flags=lib.YR_LINK)
    end = op(lib.YR_OP_NOP)
    assert ring.queue(link, link, link, link, link, end) == -errno.E2BIG
    # Two chains of three have room, a third has not, and nothing of it is taken.
    assert ring.queue(*[link, link, end] * 3) == 6
    assert len(ring.finish()) == 1  # user_data is 0 for all
    assert ring.close() == 0


def test_vector_write_is_copied(ring: Ring, files: list[int]) -> None:
    for count in (1, 3, 50, 1024):
        pieces = [bytearray(bytes([i % 251]) * (i % 7 + 1)) for i in range(count)]
        vector = bytearray(b"".join(struct.pack("=QQ", address(p), len(p)) for p in pieces))
        assert ring.queue(op(lib.YR_OP_WRITEV, files[0], address(vector), count, 5)) == 1
        vector[:] = b"\xff" * len(vector)  # the kernel must not look at it any more
        expected = b"".join(pieces)
        assert ring.finish() == {0: len(expected)}
        assert os.pread(files[0], len(expected), 5) == expected


def test_linked_write_then_sync(ring: Ring, files: list[int]) -> None:
    text = bytearray(b"durable")
    for kind in (lib.YR_OP_FSYNC, lib.YR_OP_FDATASYNC):
        results = ring.run(
            op(lib.YR_OP_WRITE, files[0], address(text), 7, flags=lib.YR_LINK), op(kind, files[0])
        )
        assert results == [7, 0]
    # The chain breaks where an operation fails.
    results = ring.run(
        op(lib.YR_OP_WRITE, 10**6, address(text), 7, flags=lib.YR_LINK), op(lib.YR_OP_FSYNC, files[0])
    )
    assert results == [-errno.EBADF, -errno.ECANCELED]
    results = ring.run(
        op(lib.YR_OP_WRITE, 10**6, address(text), 7, flags=lib.YR_HARDLINK), op(lib.YR_OP_FSYNC, files[0])
    )
    assert results == [-errno.EBADF, 0]


def test_directory_operations(ring: Ring, tmp_path: Path) -> None:
    wanted = (
        lib.YR_OP_OPENAT,
        lib.YR_OP_CLOSE,
        lib.YR_OP_MKDIRAT,
        lib.YR_OP_RENAMEAT,
        lib.YR_OP_UNLINKAT,
    )
    if not all(lib.yr_supports(ring.c, kind) for kind in wanted):
        pytest.skip("this kernel lacks directory operations on rings")
    at = -100  # AT_FDCWD

    def path(name: str) -> bytearray:
        return bytearray(os.fsencode(tmp_path / name) + b"\0")

    directory, old, new = path("dir"), path("dir/old"), path("dir/new")
    assert ring.run(op(lib.YR_OP_MKDIRAT, at, address(directory), mode=0o700)) == [0]
    assert ring.run(op(lib.YR_OP_MKDIRAT, at, address(directory), mode=0o700)) == [-errno.EEXIST]
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    assert ring.queue(op(lib.YR_OP_OPENAT, at, address(old), arg=flags, mode=0o600)) == 1
    del old  # paths are copied
    gc.collect()
    (made,) = ring.finish().values()
    assert made >= 0
    text = bytearray(b"hello")
    old = path("dir/old")
    assert ring.run(op(lib.YR_OP_WRITE, made, address(text), 5)) == [5]
    assert ring.run(op(lib.YR_OP_CLOSE, made)) == [0]
    assert ring.run(op(lib.YR_OP_CLOSE, made)) == [-errno.EBADF]
    assert ring.run(op(lib.YR_OP_RENAMEAT, at, address(old), off=address(new), fd2=at)) == [0]
    assert (tmp_path / "dir/new").read_bytes() == b"hello"
    assert (tmp_path / "dir/new").stat().st_mode & 0o777 == 0o600
    assert ring.run(op(lib.YR_OP_RENAMEAT, at, address(old), off=address(new), fd2=at)) == [-errno.ENOENT]
    assert ring.run(op(lib.YR_OP_UNLINKAT, at, address(new))) == [0]
    assert ring.run(op(lib.YR_OP_UNLINKAT, at, address(new))) == [-errno.ENOENT]
    at_removedir = 0x200
    assert ring.run(op(lib.YR_OP_UNLINKAT, at, address(directory), arg=at_removedir)) == [0]
    assert not (tmp_path / "dir").exists()


def test_wait_times_out_and_never_waits_for_nothing(ring: Ring) -> None:
    started = time.monotonic()
    assert ring.wait(1, 5.0) == 0  # nothing in flight
    assert time.monotonic() - started < 1
    end, other = os.pipe()
    memory = bytearray(1)
    assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 1)) == 1
    assert ring.wait(1, 0) == 0
    started = time.monotonic()
    assert ring.wait(1, 0.05) == 0
    assert 0.04 < time.monotonic() - started < 5
    os.write(other, b"x")
    assert ring.wait(100, 10) == 1
    assert ring.reap() == [(0, 1)]
    os.close(end)
    os.close(other)


def test_wait_is_interrupted_by_a_signal(ring: Ring) -> None:
    end, other = os.pipe()
    memory = bytearray(1)
    assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 1)) == 1
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        started = time.monotonic()
        assert ring.wait(1, 10) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM]
    assert time.monotonic() - started < 5
    os.write(other, b"x")
    assert ring.finish() == {0: 1}
    os.close(end)
    os.close(other)


def test_turn_submits_and_reaps(ring: Ring, fd: int, data: bytes) -> None:
    memory = bytearray(PAGE)
    assert ring.queue(op(lib.YR_OP_READ, fd, address(memory), PAGE, user_data=9)) == 1
    done = ring.turn()
    limit = time.monotonic() + 10
    while not done and time.monotonic() < limit:
        done = ring.turn()
    assert done == [(9, PAGE)]
    assert memory == data[:PAGE]
    assert ring.turn() == []


def test_reap_takes_no_more_than_asked(ring: Ring) -> None:
    assert ring.queue(*[op(lib.YR_OP_NOP, user_data=i) for i in range(30)]) == 30
    assert ring.wait(30) == 30
    assert [u for u, _ in ring.reap(7)] == list(range(7))
    assert len(ring.reap(100)) == 23


def test_overflow_of_the_completion_queue_loses_nothing() -> None:
    ring = Ring(16, cq_entries=16, max_inflight=400)
    for start in range(0, 400, 100):
        ops = [op(lib.YR_OP_NOP, user_data=start + i) for i in range(100)]
        assert ring.queue(*ops) == 100
        lib.yr_submit(ring.c)
    done: dict[int, int] = {}
    limit = time.monotonic() + 20
    while len(done) < 400 and time.monotonic() < limit:
        lib.yr_submit(ring.c)
        done.update(ring.reap(4096))
    assert done == dict.fromkeys(range(400), 0)
    assert ring.info().overflows > 0
    assert ring.info().inflight == 0
    assert ring.close() == 0


def test_cancel(ring: Ring) -> None:
    end, other = os.pipe()
    memory = bytearray(10)
    reads = [op(lib.YR_OP_READ, end, address(memory) + i, 1, user_data=100 + i) for i in range(3)]
    assert ring.queue(*reads) == 3
    assert ring.wait(1, 0) == 0
    assert lib.yr_cancel(ring.c, 999, 1) == -errno.ENOENT
    assert lib.yr_cancel(ring.c, 101, 1) == 1
    assert ring.wait(2) == 2
    assert dict(ring.reap()) == {101: -errno.ECANCELED, 1: 0}
    assert lib.yr_cancel(ring.c, 101, 1) == -errno.ENOENT
    os.write(other, b"xy")
    assert ring.finish() == {100: 1, 102: 1}
    os.close(end)
    os.close(other)


def test_cancel_before_submission(ring: Ring) -> None:
    end, other = os.pipe()
    memory = bytearray(1)
    assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 1, user_data=3)) == 1
    assert lib.yr_cancel(ring.c, 3, 4) == 1
    assert ring.finish() == {3: -errno.ECANCELED, 4: 0}
    os.close(end)
    os.close(other)


def test_eventfd_wakes(ring: Ring, fd: int) -> None:
    event = lib.yr_eventfd(ring.c)
    assert event >= 0
    assert lib.yr_eventfd(ring.c) == event
    assert not os.get_inheritable(event)
    poll = select.poll()
    poll.register(event, select.POLLIN)
    assert poll.poll(0) == []
    end, other = os.pipe()
    memory = bytearray(10)
    for round_ in range(3):
        assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 10, user_data=round_)) == 1
        assert ring.turn() == []
        assert poll.poll(20) == []
        os.write(other, b"wake")
        assert poll.poll(5000) == [(event, select.POLLIN)]
        assert ring.reap() == [(round_, 4)]
        assert poll.poll(0) == []  # reaping read it empty
    assert lib.yr_eventfd_close(ring.c) == 0
    assert lib.yr_eventfd_close(ring.c) == 0
    assert ring.info().event_fd == -1
    os.close(end)
    os.close(other)


def test_eventfd_many_in_flight_all_arrive(fd: int, data: bytes) -> None:
    ring = Ring(64)
    event = lib.yr_eventfd(ring.c)
    poll = select.poll()
    poll.register(event, select.POLLIN)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    n = 500
    memory = bytearray(n * PAGE)
    ops = [op(lib.YR_OP_READ, fd, address(memory) + i * PAGE, PAGE, i * PAGE, user_data=i) for i in range(n)]
    done: dict[int, int] = {}
    queued = 0
    limit = time.monotonic() + 30
    while len(done) < n:
        assert time.monotonic() < limit
        queued += ring.queue(*ops[queued : queued + 64])
        done.update(ring.turn())
        if ring.info().inflight == 128 or queued == n:
            if len(done) < n:
                assert poll.poll(10000), "a completion did not wake"
            done.update(ring.reap())
    assert done == dict.fromkeys(range(n), PAGE)
    assert memory == data[: n * PAGE]
    assert ring.close() == 0


# -- registered buffers and files -----------------------------------------------------------------


def test_registered_buffers(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    size = 4 * PAGE
    memory = [lib.yr_alloc(size, PAGE) for _ in range(3)]
    addrs = [int(ffi.cast("uintptr_t", m)) for m in memory]
    assert all(a and a % PAGE == 0 for a in addrs)
    registered = lib.yr_buffers_register(ring.c, 3)
    if registered == -errno.EINVAL:
        pytest.skip("this kernel has no sparse buffer tables")
    assert registered == 0
    assert lib.yr_buffers_register(ring.c, 3) == -errno.EBUSY
    assert lib.yr_buffers_update(ring.c, 0, 2, addrs[:2], [size] * 2) == 2
    assert lib.yr_buffers_update(ring.c, 2, 2, addrs[:2], [size] * 2) == -errno.EINVAL
    fixed = lib.YR_FIXED_BUFFER
    assert ring.run(op(lib.YR_OP_READ, fd, addrs[1] + 8, 1000, 77, flags=fixed, buffer=1)) == [1000]
    assert ffi.buffer(memory[1], size)[8:1008] == data[77:1077]
    assert ring.run(op(lib.YR_OP_WRITE, files[0], addrs[1] + 8, 1000, flags=fixed, buffer=1)) == [1000]
    assert os.pread(files[0], 2000, 0) == data[77:1077]
    # Outside of the registered memory, and in an empty slot.
    assert ring.run(op(lib.YR_OP_READ, fd, addrs[1], size + 1, flags=fixed, buffer=1)) == [-errno.EFAULT]
    assert ring.run(op(lib.YR_OP_READ, fd, addrs[2], 10, flags=fixed, buffer=2)) == [-errno.EFAULT]
    # An update takes effect for what is queued after it.
    assert lib.yr_buffers_update(ring.c, 1, 2, [0, addrs[2]], [0, size]) == 2
    assert ring.run(op(lib.YR_OP_READ, fd, addrs[1], 10, flags=fixed, buffer=1)) == [-errno.EFAULT]
    assert ring.run(op(lib.YR_OP_READ, fd, addrs[2], 10, flags=fixed, buffer=2)) == [10]
    results = ffi.new("int64_t[]", 4)
    code = lib.yr_read_batch(
        ring.c, 4, [fd] * 4, [addrs[0] + i * PAGE for i in range(4)], [PAGE] * 4,
        [i * PAGE for i in range(4)], results, fixed, 0,
    )  # fmt: skip
    assert code == 0 and list(results) == [PAGE] * 4
    assert ffi.buffer(memory[0], size)[:] == data[:size]
    assert lib.yr_buffers_unregister(ring.c) == 0
    assert lib.yr_buffers_unregister(ring.c) == 0
    for m in memory:
        lib.yr_free(m, size)


def test_registered_files(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    assert lib.yr_files_register(ring.c, 8) == 0
    assert lib.yr_files_register(ring.c, 8) == -errno.EBUSY
    assert ring.info().files == 8
    assert lib.yr_files_update(ring.c, 2, 2, [fd, files[0]]) == 2
    assert lib.yr_files_update(ring.c, 7, 2, [fd, fd]) == -errno.EINVAL
    memory = bytearray(100)
    fixed = lib.YR_FIXED_FILE
    assert ring.run(op(lib.YR_OP_READ, 2, address(memory), 100, 3, flags=fixed)) == [100]
    assert memory == data[3:103]
    assert ring.run(
        op(lib.YR_OP_WRITE, 3, address(memory), 100, flags=fixed | lib.YR_LINK),
        op(lib.YR_OP_FDATASYNC, 3, flags=fixed),
    ) == [100, 0]
    assert os.pread(files[0], 100, 0) == data[3:103]
    assert ring.run(op(lib.YR_OP_READ, 0, address(memory), 1, flags=fixed)) == [-errno.EBADF]
    results, got = ring.read_batch([(2, 50, i * 50) for i in range(100)], flags=fixed)
    assert results == [50] * 100 and b"".join(got) == data[:5000]
    written, synced = ring.write_batch([(3, [b"a", b"b"], 0)], sync=[3], flags=fixed)
    assert (written, synced) == ([2], [0])
    assert lib.yr_files_update(ring.c, 2, 1, [-1]) == 1
    assert ring.run(op(lib.YR_OP_READ, 2, address(memory), 1, flags=fixed)) == [-errno.EBADF]
    assert lib.yr_files_unregister(ring.c) == 0


def test_a_registered_file_is_let_go_when_its_slot_is_emptied(ring: Ring) -> None:
    end, other = os.pipe()
    assert lib.yr_files_register(ring.c, 2) == 0
    assert lib.yr_files_update(ring.c, 0, 1, [other]) == 1
    os.close(other)
    os.set_blocking(end, False)
    with pytest.raises(BlockingIOError):  # the write end is still open, in the table
        os.read(end, 1)
    assert lib.yr_files_update(ring.c, 0, 1, [-1]) == 1
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        ring.turn()
        with contextlib.suppress(BlockingIOError):
            assert os.read(end, 1) == b""
            break
        time.sleep(0.01)
    else:
        pytest.fail("the table still holds the file")
    os.close(end)


def test_open_into_the_table(ring: Ring, tmp_path: Path) -> None:
    if not lib.yr_supports(ring.c, lib.YR_OP_OPENAT):
        pytest.skip("this kernel lacks OPENAT on rings")
    assert lib.yr_files_register(ring.c, 4) == 0
    path = bytearray(os.fsencode(tmp_path / "large") + b"\0")
    target = bytearray(os.fsencode(tmp_path / "renamed") + b"\0")
    text = bytearray(b"value" * 1000)
    chain = lib.YR_LINK
    fixed = lib.YR_FIXED_FILE
    before = open_descriptors()
    results = ring.run(
        op(
            lib.YR_OP_OPENAT, -100, address(path), arg=os.O_WRONLY | os.O_CREAT, mode=0o600,
            file_index=2, flags=chain,
        ),
        op(lib.YR_OP_WRITE, 1, address(text), len(text), flags=chain | fixed),
        op(lib.YR_OP_FDATASYNC, 1, flags=chain | fixed),
        op(lib.YR_OP_CLOSE, file_index=2, flags=chain),
        op(lib.YR_OP_RENAMEAT, -100, address(path), off=address(target), fd2=-100),
    )  # fmt: skip
    assert results == [0, len(text), 0, 0, 0]
    assert open_descriptors() == before
    assert (tmp_path / "renamed").read_bytes() == text


def test_memory() -> None:
    assert lib.yr_alloc(0, 16) == ffi.NULL
    assert lib.yr_alloc(16, 3) == ffi.NULL
    assert lib.yr_alloc(16, 0) == ffi.NULL
    for align in (1, 8, 512, PAGE):
        memory = lib.yr_alloc(1000, align)
        view = ffi.buffer(memory, 1000)
        assert int(ffi.cast("uintptr_t", memory)) % align == 0
        assert view[:] == bytes(1000)
        view[:] = b"s" * 1000
        lib.yr_wipe(memory, 500)
        assert view[:] == bytes(500) + b"s" * 500
        lib.yr_free(memory, 1000)
    lib.yr_free(ffi.NULL, 10)
    lib.yr_wipe(ffi.NULL, 10)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 7, 128])
@pytest.mark.parametrize("cold", [False, True])
def test_read_batch_beyond_the_depth(depth: int, cold: bool, fd: int, data: bytes) -> None:
    if cold:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    ring = Ring(depth)
    chance = random.Random(depth)
    requests = []
    for _ in range(700):
        length = chance.choice([0, 1, 100, PAGE, 10000])
        requests.append((fd, length, chance.randrange(len(data) + 5000)))
    results, memory = ring.read_batch(requests)
    for (_, length, offset), result, got in zip(requests, results, memory, strict=True):
        expected = data[offset : offset + length]
        assert result == len(expected)
        assert got[:result] == expected
        assert set(got[result:]) <= {0xAA}  # nothing beyond the result is touched
    assert ring.info().submitted == ring.info().completed
    assert ring.close() == 0


def test_read_batch_few_calls(fd: int) -> None:
    ring = Ring(128)
    results, _ = ring.read_batch([(fd, PAGE, i * PAGE) for i in range(500)])
    assert results == [PAGE] * 500
    assert ring.info().enters < 50  # batches, not one call an operation
    assert ring.close() == 0


def test_read_batch_mixes_errors_and_results(ring: Ring, fd: int, data: bytes, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    results, memory = ring.read_batch(
        [(fd, 10, 0), (10**6, 10, 0), (directory, 10, 0), (fd, 10, len(data)), (fd, 10, 5)]
    )
    os.close(directory)
    assert results == [10, -errno.EBADF, -errno.EISDIR, 0, 10]
    assert memory[0] == data[:10] and memory[4] == data[5:15]


def test_batches_need_an_idle_ring(ring: Ring, fd: int) -> None:
    assert ring.queue(op(lib.YR_OP_NOP)) == 1
    results = ffi.new("int64_t[]", 1)
    memory = bytearray(10)
    where = [address(memory)]
    arguments = (ring.c, 1, [fd], where, [10], [0], results, 0, 0)
    assert lib.yr_read_batch(*arguments) == -errno.EBUSY
    ring.finish()
    assert lib.yr_read_batch(*arguments) == 0


def test_batches_check_their_arguments(ring: Ring, fd: int) -> None:
    results = ffi.new("int64_t[]", 2)
    memory = bytearray(10)
    a = address(memory)
    for fds, addrs, lens, offs, flags, buffer in (
        ([fd], [0], [10], [0], 0, 0),
        ([fd], [a], [1 << 63], [0], 0, 0),
        ([fd], [a], [10], [1 << 63], 0, 0),
        ([fd], [a], [10], [(1 << 63) - 5], 0, 0),
        ([fd], [a], [10], [0], 1 << 10, 0),
        ([fd], [a], [10], [0], lib.YR_LINK, 0),
        ([fd], [a], [10], [0], 0, 3),
        ([0], [a], [10], [0], lib.YR_FIXED_FILE, 0),
    ):
        assert lib.yr_read_batch(ring.c, 1, fds, addrs, lens, offs, results, flags, buffer) == -errno.EINVAL
    null = ffi.NULL
    assert lib.yr_read_batch(ring.c, 1, null, [a], [1], [0], results, 0, 0) == -errno.EINVAL
    assert lib.yr_read_batch(ring.c, 0, null, null, null, null, null, 0, 0) == 0
    assert (
        lib.yr_write_batch(ring.c, 1, [fd], [0], [1, 0], [a], [1], results, 0, 0, 0, null, null)
        == -errno.EINVAL
    )
    code = lib.yr_write_batch(ring.c, 0, null, null, null, null, null, null, 0, 0, 2, [fd, fd], [0, 0])
    assert code == -errno.EINVAL  # the same descriptor twice
    assert lib.yr_read_chunked(ring.c, fd, a, 10, 0, 0, 0, 0, 0) == -errno.EINVAL


@pytest.mark.parametrize("depth", [2, 8, 128])
def test_write_batch(depth: int, files: list[int]) -> None:
    ring = Ring(depth)
    chance = random.Random(3)
    expected = [bytearray(400_000) for _ in files]
    requests = []
    for i in range(300):
        which = chance.randrange(len(files))
        pieces = [chance.randbytes(chance.choice([0, 1, 60, 700])) for _ in range(i % 6)]
        text = b"".join(pieces)
        requests.append((files[which], pieces, i * 1300))
        expected[which][i * 1300 : i * 1300 + len(text)] = text
    results, synced = ring.write_batch(requests, sync=[*files])
    assert results == [sum(map(len, pieces)) for _, pieces, _ in requests]
    assert synced == [0] * len(files)
    for descriptor, content in zip(files, expected, strict=True):
        assert os.pread(descriptor, 400_000, 0) == bytes(content).rstrip(b"\0") or (
            os.pread(descriptor, 400_000, 0).ljust(400_000, b"\0") == content
        )
    assert ring.close() == 0


def test_write_batch_with_more_pieces_than_one_call_takes(ring: Ring, files: list[int]) -> None:
    pieces = [bytes([i % 256]) * 3 for i in range(5000)]
    results, synced = ring.write_batch([(files[0], pieces, 7), (files[1], [b"x"], 0)], sync=[files[0]])
    assert results == [15000, 1] and synced == [0]
    assert os.pread(files[0], 20000, 7) == b"".join(pieces)


def test_sync_without_writes_and_of_a_bad_descriptor(ring: Ring, files: list[int]) -> None:
    assert ring.write_batch([], sync=[files[0]]) == ([], [0])
    assert ring.write_batch([(files[0], [b"a"], 0)], sync=[10**6, files[0]]) == ([1], [-errno.EBADF, 0])
    end, other = os.pipe()
    assert ring.write_batch([], sync=[other]) == ([], [-errno.EINVAL])
    os.close(end)
    os.close(other)


def test_one_write_and_its_sync_are_one_chain(ring: Ring, files: list[int]) -> None:
    before = ring.info().enters
    assert ring.write_batch([(files[0], [b"head", b"value"], 0)], sync=[files[0]]) == ([9], [0])
    assert ring.info().enters == before + 1
    assert os.pread(files[0], 20, 0) == b"headvalue"


def not_durable(descriptor: int) -> int:
    """Pages of the file that are dirty or on their way to the disk (cachestat, Linux 6.5)."""
    everything = (ctypes.c_uint64 * 2)(0, 0)
    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(451, descriptor, ctypes.byref(everything), ctypes.byref(counts), 0) != 0:
        pytest.skip("this kernel has no cachestat")
    return int(counts[1] + counts[2])


@pytest.mark.parametrize("linked", [True, False])
def test_after_the_sync_nothing_is_dirty(ring: Ring, files: list[int], linked: bool) -> None:
    """The syncs really come after the writes, in chains and by themselves."""
    os.pwrite(files[0], b"x", 0)
    before = not_durable(files[0])
    os.fdatasync(files[0])
    if before == 0 or not_durable(files[0]) != 0:
        pytest.skip("this file system does not tell")
    for round_ in range(30):
        writes = [(f, [b"header", b"value"], round_ * 2 * PAGE) for f in files]
        if not linked:
            writes += [(f, [b"more"], round_ * 2 * PAGE + PAGE) for f in files]
        _, synced = ring.write_batch(writes, sync=files)
        assert synced == [0] * len(files)
        assert [not_durable(f) for f in files] == [0] * len(files)


def test_failed_write_is_still_followed_by_the_sync(ring: Ring, files: list[int]) -> None:
    readonly = os.open(f"/proc/self/fd/{files[1]}", os.O_RDONLY)
    results, synced = ring.write_batch([(files[0], [b"ok"], 0), (readonly, [b"no"], 0)], [files[0], readonly])
    os.close(readonly)
    assert results == [2, -errno.EBADF]
    assert synced == [0, 0]


@pytest.mark.parametrize("chunk", [1, 1000, PAGE, 1 << 20, 1 << 30])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_read_chunked(ring: Ring, fd: int, data: bytes, chunk: int, window: int) -> None:
    size = 20_000 if chunk == 1 else len(data)
    memory = bytearray(size + 5000)
    for offset in (0, 1, 5 * PAGE):
        expected = data[offset : offset + len(memory)]
        got = lib.yr_read_chunked(ring.c, fd, address(memory), len(memory), offset, chunk, window, 0, 0)
        assert got == len(expected)
        assert memory[:got] == expected
    assert lib.yr_read_chunked(ring.c, fd, address(memory), 0, 0, chunk, window, 0, 0) == 0
    assert lib.yr_read_chunked(ring.c, fd, address(memory), 10, 10**9, chunk, window, 0, 0) == 0
    assert lib.yr_read_chunked(ring.c, 10**6, address(memory), 10, 0, chunk, window, 0, 0) == -errno.EBADF


def test_direct_reads_end_with_the_file(ring: Ring, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "direct"
    path.write_bytes(data)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    size = (len(data) // PAGE + 2) * PAGE
    memory = lib.yr_alloc(size, PAGE)
    where = int(ffi.cast("uintptr_t", memory))
    got = lib.yr_read_chunked(ring.c, descriptor, where, size, 0, 16 * PAGE, 0, lib.YR_DIRECT, 0)
    assert got == len(data)
    assert ffi.buffer(memory, len(data))[:] == data
    results = ffi.new("int64_t[]", 1)
    last = len(data) // PAGE * PAGE
    code = lib.yr_read_batch(ring.c, 1, [descriptor], [where], [2 * PAGE], [last], results, lib.YR_DIRECT, 0)
    assert (code, results[0]) == (0, len(data) - last)
    lib.yr_free(memory, size)
    os.close(descriptor)


@pytest.mark.slow
def test_more_than_two_gigabytes_in_one_request(tmp_path: Path) -> None:
    """One operation takes 2 GiB - 4096 at most; the batch goes on by itself."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 4 << 30:
        pytest.skip("not enough free memory")
    size = (2 << 30) + 10_000
    ring = Ring(4)
    descriptor = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, b"end", size - 3)
    memory = bytearray(size)
    results = ffi.new("int64_t[]", 1)
    code = lib.yr_read_batch(ring.c, 1, [descriptor], [address(memory)], [size], [0], results, 0, 0)
    assert (code, results[0]) == (0, size)
    assert memory[-3:] == b"end"
    assert ring.info().resumed >= 1
    os.close(descriptor)
    assert ring.close() == 0


# -- injected trouble -----------------------------------------------------------------------------


def test_short_reads_are_resumed(ring: Ring, fd: int, data: bytes) -> None:
    ring.inject(lib.YR_OP_READ, 1, skip=0, count=50)
    ring.inject(lib.YR_OP_READ, 3000, skip=60, count=100)
    requests = [(fd, PAGE, i * PAGE) for i in range(100)]
    results, memory = ring.read_batch(requests)
    assert results == [PAGE] * 100
    assert b"".join(memory) == data[: 100 * PAGE]
    assert ring.info().injected == 150
    assert 100 <= ring.info().resumed <= 150  # 3000 bytes are not short for every rest


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
def test_passing_errors_are_retried_with_a_bound(ring: Ring, fd: int, data: bytes, error: int) -> None:
    ring.inject(lib.YR_OP_READ, -error, skip=2, count=5)
    results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(20)])
    assert results == [100] * 20 and b"".join(memory) == data[:2000]
    assert ring.info().retried == 5
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_READ, -error, count=10**6)
    assert ring.read_batch([(fd, 100, 0)])[0] == [-error]
    lib.yr_inject_clear(ring.c)
    assert ring.read_batch([(fd, 100, 0)])[0] == [100]


def test_errors_hit_one_request_only(ring: Ring, fd: int) -> None:
    ring.inject(lib.YR_OP_READ, -errno.EIO, skip=3)
    results, _ = ring.read_batch([(fd, 100, i * 100) for i in range(20)])
    assert sorted(results) == [-errno.EIO, *[100] * 19]


def test_end_of_file_amid_a_short_read(ring: Ring, fd: int, data: bytes) -> None:
    ring.inject(lib.YR_OP_READ, 10, count=2)
    results, memory = ring.read_batch([(fd, PAGE, len(data) - 50)])
    assert results == [50] and memory[0][:50] == data[-50:]


@pytest.mark.parametrize("instead", [False, True])
def test_short_writes_are_resumed(ring: Ring, files: list[int], instead: bool) -> None:
    pieces = [b"abc", b"", b"defgh", b"ij" * 500]
    whole = b"".join(pieces)
    # With `instead` nothing is written, so what was claimed stays a hole: only lengths are compared.
    ring.inject(lib.YR_OP_WRITE, 4, count=1, instead=instead)
    ring.inject(lib.YR_OP_WRITE, 1, skip=1, count=3)
    results, synced = ring.write_batch([(files[0], pieces, 0)], sync=[files[0]])
    assert results == [len(whole)] and synced == [0]
    got = os.pread(files[0], 2000, 0)
    assert got == (bytes(4) + whole[4:] if instead else whole)


def test_a_write_that_makes_no_progress_is_an_error(ring: Ring, files: list[int]) -> None:
    ring.inject(lib.YR_OP_WRITE, 0, count=10**6)
    assert ring.write_batch([(files[0], [b"abc"], 0)])[0] == [-errno.EIO]


def test_a_write_fails_without_happening(ring: Ring, files: list[int]) -> None:
    os.pwrite(files[0], b"old", 0)
    ring.inject(lib.YR_OP_WRITE, -errno.ENOSPC, instead=True)
    results, synced = ring.write_batch([(files[0], [b"new"], 0)], sync=[files[0]])
    assert results == [-errno.ENOSPC] and synced == [0]
    assert os.pread(files[0], 10, 0) == b"old"


def test_sync_after_a_short_linked_write_covers_the_rest(ring: Ring, files: list[int]) -> None:
    """The kernel saw a full write and ran the chain's sync too early: it must run once more."""
    ring.inject(lib.YR_OP_WRITE, 1)
    before = ring.info().submitted
    assert ring.write_batch([(files[0], [b"abcdef"], 0)], sync=[files[0]]) == ([6], [0])
    assert ring.info().submitted == before + 4  # write, sync, rest of the write, sync again


def test_failing_syncs_are_reported(ring: Ring, files: list[int]) -> None:
    ring.inject(lib.YR_OP_FSYNC, -errno.EIO)
    assert ring.write_batch([(files[0], [b"a"], 0)], sync=[files[0]]) == ([1], [-errno.EIO])
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_FSYNC, -errno.EINTR, count=3)
    writes = [(files[0], [b"a"], i) for i in range(10)]
    assert ring.write_batch(writes, sync=[files[0]]) == ([1] * 10, [0])
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_FSYNC, -errno.EIO, instead=True)
    assert ring.write_batch([(files[0], [b"a"], 0), (files[1], [b"b"], 0)], sync=files[:2])[0] == [1, 1]


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_submission_fails_for_a_while(ring: Ring, fd: int, data: bytes, error: int, skip: int) -> None:
    ring.inject(lib.YR_OP_SUBMIT, -error, skip=skip, count=3)
    results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
    assert results == [100] * 200
    assert b"".join(memory) == data[:20000]


def test_submission_fails_for_good(ring: Ring, fd: int, files: list[int]) -> None:
    for error in (errno.ENOMEM, errno.EBADF, errno.ENXIO):
        for skip in (0, 1, 3):
            ring.inject(lib.YR_OP_SUBMIT, -error, skip=skip, count=10**6)
            results, _ = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
            assert set(results) <= {100, -error} and -error in results
            assert (100 in results) == (skip > 0)
            written, synced = ring.write_batch([(f, [b"x"], 0) for f in files], sync=files)
            assert written == [-error] * 4 and synced == [-error] * 4
            info = ring.info()
            assert info.inflight == info.queued == info.broken == 0
            lib.yr_inject_clear(ring.c)
            # The ring is as good as new.
            assert ring.read_batch([(fd, 100, 0)])[0] == [100]


def test_submission_of_a_part_breaks_chains_in_the_right_place(ring: Ring, files: list[int]) -> None:
    """A kernel that takes a write without the sync linked to it must not sync too early."""
    for some in range(9):
        before = ring.info().submitted
        ring.inject(lib.YR_OP_SUBMIT, some)
        writes = [(f, [b"header", b"value"], 100 * some) for f in files]
        assert ring.write_batch(writes, sync=files) == ([11] * 4, [0] * 4)
        # Where a chain was cut, its sync ran again as an operation of its own.
        assert ring.info().submitted == before + 8 + some % 2
        lib.yr_inject_clear(ring.c)
    text = bytearray(b"abc")
    link = lib.YR_LINK
    chain = [
        op(lib.YR_OP_WRITE, files[0], address(text), 3, flags=link, user_data=1),
        op(lib.YR_OP_FSYNC, files[0], flags=link, user_data=2),
        op(lib.YR_OP_FSYNC, files[0], user_data=3),
        op(lib.YR_OP_NOP, user_data=4),
    ]
    ring.inject(lib.YR_OP_SUBMIT, 1)
    assert ring.queue(*chain) == 4
    assert lib.yr_submit(ring.c) == 1
    assert ring.info().queued == 3
    assert ring.finish() == {1: 3, 2: -errno.ECANCELED, 3: -errno.ECANCELED, 4: 0}


def test_injection_into_queued_operations(ring: Ring, fd: int) -> None:
    memory = bytearray(100)
    read = op(lib.YR_OP_READ, fd, address(memory), 100)
    ring.inject(lib.YR_OP_READ, 30)
    ring.inject(lib.YR_OP_READ, -errno.EIO, skip=1)
    ring.inject(lib.YR_OP_NOP, -errno.EPERM, instead=True)
    ring.inject(lib.YR_OP_READ, 1000, skip=2)  # never lengthens
    assert ring.run(read) == [30]
    assert ring.run(read) == [-errno.EIO]
    assert ring.run(read) == [100]
    assert ring.run(op(lib.YR_OP_NOP)) == [-errno.EPERM]
    memory[:] = bytes(100)
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_ANY, -errno.EIO, instead=True)
    assert ring.run(op(lib.YR_OP_READ, fd, address(memory), 100, flags=lib.YR_LINK), op(lib.YR_OP_NOP)) == [
        -errno.EIO,
        -errno.ECANCELED,
    ]
    assert memory == bytes(100)  # it did not happen


def test_injection_rules_are_checked_and_bounded(ring: Ring) -> None:
    assert lib.yr_inject(ring.c, 200, 0, 1, -5, 0) == -errno.EINVAL
    assert lib.yr_inject(ring.c, lib.YR_OP_READ, 0, 0, -5, 0) == -errno.EINVAL
    assert lib.yr_inject(ring.c, lib.YR_OP_SUBMIT, 0, 1, -5, 1) == -errno.EINVAL
    for _ in range(16):
        ring.inject(lib.YR_OP_READ, -5)
    assert lib.yr_inject(ring.c, lib.YR_OP_READ, 0, 1, -5, 0) == -errno.ENOSPC


def test_random_trouble_never_gives_wrong_bytes(fd: int, data: bytes) -> None:
    chance = random.Random(11)
    for round_ in range(60):
        ring = Ring(chance.choice([1, 3, 16, 64]))
        for _ in range(chance.randrange(1, 10)):
            kind = chance.choice([lib.YR_OP_READ, lib.YR_OP_ANY, lib.YR_OP_SUBMIT])
            if kind == lib.YR_OP_SUBMIT:
                result = chance.choice([-errno.EAGAIN, -errno.EINTR, -errno.EBUSY, 0, 1, 5])
            else:
                result = chance.choice([1, 7, 500, -errno.EINTR, -errno.EAGAIN, -errno.EIO])
            ring.inject(kind, result, skip=chance.randrange(30), count=chance.randrange(1, 8))
        requests = [
            (fd, chance.randrange(1, 9000), chance.randrange(len(data))) for _ in range(chance.randrange(150))
        ]
        results, memory = ring.read_batch(requests)
        for (_, length, offset), result, got in zip(requests, results, memory, strict=True):
            expected = data[offset : offset + length]
            assert result in (len(expected), -errno.EIO), (round_, result)
            if result >= 0:
                assert got[:result] == expected
        assert ring.close() == 0


# -- ownership ------------------------------------------------------------------------------------


def test_another_thread_is_refused(ring: Ring, fd: int) -> None:
    single = 1 << 12  # IORING_SETUP_SINGLE_ISSUER
    if not ring.info().setup_flags & single:
        pytest.skip("this kernel has no SINGLE_ISSUER")
    seen: list[int] = []

    def use() -> None:
        seen.append(lib.yr_submit(ring.c))
        seen.append(ring.queue(op(lib.YR_OP_NOP)))
        seen.append(lib.yr_reap(ring.c, 0, ffi.NULL, ffi.NULL, ffi.NULL))
        seen.append(lib.yr_read_batch(ring.c, 0, *[ffi.NULL] * 5, 0, 0))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [-errno.EPERM] * 4
    assert ring.info().inflight == 0


def test_a_shared_ring_may_change_hands(fd: int, data: bytes) -> None:
    ring = Ring(16, flags=lib.YR_SETUP_COOP_TASKRUN)
    for _ in range(3):
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(ring.read_batch([(fd, 100, 0)])))  # noqa: B023
        thread.start()
        thread.join()
        assert got[0] == ([100], [data[:100]])
    assert ring.close() == 0


def test_a_ring_is_freed_after_its_thread_ended(fd: int) -> None:
    before = open_descriptors()
    made: list[Ring] = []

    def work() -> None:
        made.append(Ring(16))
        assert made[-1].read_batch([(fd, 100, 0)])[0] == [100]

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert made.pop().close() == 0
    assert open_descriptors() == before


def test_rings_in_many_threads(fd: int, data: bytes) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        ring = Ring(32)
        for _ in range(20):
            requests = [
                (fd, chance.randrange(1, 5000), chance.randrange(len(data) - 5000)) for _ in range(100)
            ]
            results, memory = ring.read_batch(requests)
            for (_, length, offset), result, got in zip(requests, results, memory, strict=True):
                if result != length or got != data[offset : offset + length]:
                    failures.append(f"{seed}: {length} at {offset}: {result}")
        if ring.close() != 0:
            failures.append(f"{seed}: close")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def in_child(function: Any) -> int:
    """Run `function` in a forked child; its return value (0..100) is the child's exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 101
        try:
            status = function()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(ring: Ring, fd: int, data: bytes) -> None:
    end, other = os.pipe()
    memory = bytearray(5)
    assert ring.queue(op(lib.YR_OP_READ, end, address(memory), 5, user_data=1)) == 1
    assert ring.wait(1, 0) == 0

    def child() -> int:
        if lib.yr_submit(ring.c) != -errno.EPERM or ring.queue(op(lib.YR_OP_NOP)) != -errno.EPERM:
            return 1
        if lib.yr_destroy(ring.c, 0) != 0:  # lets go, whatever is in flight in the parent
            return 2
        mine = Ring(8)
        if mine.read_batch([(fd, 100, 0)]) != ([100], [data[:100]]):
            return 3
        return 0 if mine.close() == 0 else 4

    assert in_child(child) == 0
    os.write(other, b"after")  # the parent's ring and operation are untouched
    assert ring.finish() == {1: 5}
    assert memory == b"after"
    os.close(end)
    os.close(other)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_small_memlock_limit_refuses_buffers_not_rings() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user without other rings")

    def child() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        os.setgroups([])
        os.setgid(61234)
        os.setuid(61234)
        ring = Ring(8)
        if lib.yr_buffers_register(ring.c, 4) != 0:
            return 50
        size = 8 << 20
        memory = lib.yr_alloc(size, PAGE)
        where = int(ffi.cast("uintptr_t", memory))
        if lib.yr_buffers_update(ring.c, 0, 1, [where], [size]) != -errno.ENOMEM:
            return 1
        if lib.yr_buffers_update(ring.c, 0, 1, [where], [64 << 10]) != 1:
            return 2
        # Several at once: what fits is put, and counted.
        if lib.yr_buffers_update(ring.c, 1, 3, [where, where, where], [64 << 10, size, size]) != 1:
            return 3
        return 0 if ring.close() == 0 else 4

    status = in_child(child)
    if status == 50:
        pytest.skip("this kernel has no sparse buffer tables")
    assert status == 0


def test_options_of_the_workers(ring: Ring, fd: int) -> None:
    assert lib.yr_set_workers(ring.c, 2, 2) in (0, -errno.EINVAL)
    cpus = sorted(os.sched_getaffinity(0))
    assert lib.yr_set_affinity(ring.c, 1, [cpus[0]]) in (0, -errno.EINVAL)
    assert lib.yr_set_affinity(ring.c, 1, [10**6]) == -errno.EINVAL
    results, _ = ring.read_batch([(fd, 100, i * 100) for i in range(50)], flags=lib.YR_ASYNC)
    assert results == [100] * 50
    assert lib.yr_set_affinity(ring.c, 0, ffi.NULL) in (0, -errno.EINVAL)


def test_sqpoll(fd: int, data: bytes, files: list[int]) -> None:
    try:
        ring = Ring(16, flags=lib.YR_SETUP_SQPOLL, sq_idle_ms=50)
    except OSError as error:
        pytest.skip(f"no SQPOLL here: {error}")
    for _ in range(3):
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
        assert results == [100] * 200 and b"".join(memory) == data[:20000]
        assert ring.write_batch([(f, [b"abc"], 0) for f in files], sync=files) == ([3] * 4, [0] * 4)
        time.sleep(0.1)  # the thread sleeps, and must be woken
    assert ring.run(op(lib.YR_OP_NOP), op(lib.YR_OP_NOP)) == [0, 0]
    assert ring.close() == 0


def test_sqpoll_gives_back_entries_late(fd: int, data: bytes) -> None:
    """Completions may be there before the entries are free again."""
    try:
        ring = Ring(4, flags=lib.YR_SETUP_SQPOLL, sq_idle_ms=1000)
    except OSError as error:
        pytest.skip(f"no SQPOLL here: {error}")
    expected = data[:20000]
    for _ in range(1500):
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
        assert results == [100] * 200 and b"".join(memory) == expected
    assert ring.close() == 0


def test_iopoll(tmp_path: Path, data: bytes) -> None:
    """Only where driver and file system poll is there more than an error to be had, and no hang."""
    (tmp_path / "direct").write_bytes(data)
    try:
        descriptor = os.open(tmp_path / "direct", os.O_RDONLY | os.O_DIRECT)
        ring = Ring(8, flags=lib.YR_SETUP_IOPOLL)
    except OSError as error:
        pytest.skip(f"no polled reads here: {error}")
    assert lib.yr_eventfd(ring.c) == -errno.EOPNOTSUPP
    memory = lib.yr_alloc(PAGE, PAGE)
    (result,) = ring.run(op(lib.YR_OP_READ, descriptor, int(ffi.cast("uintptr_t", memory)), PAGE))
    assert result in (PAGE, -errno.EOPNOTSUPP)
    if result == PAGE:
        assert ffi.buffer(memory, PAGE)[:] == data[:PAGE]
    lib.yr_free(memory, PAGE)
    os.close(descriptor)
    assert ring.close() == 0


# -- endurance ------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_operations_leave_nothing(fd: int, files: list[int]) -> None:
    ring = Ring(64)
    before = open_descriptors()
    memory = bytearray(100)
    pieces = [bytearray(b"x") for _ in range(20)]
    vector = bytearray(b"".join(struct.pack("=QQ", address(p), 1) for p in pieces))
    reads = [op(lib.YR_OP_READ, fd, address(memory), 100, i) for i in range(20)]
    writes = [op(lib.YR_OP_WRITEV, files[0], address(vector), 20, i) for i in range(20)]
    path = bytearray(os.fsencode("/") + b"\0")
    opens = [op(lib.YR_OP_OPENAT, -100, address(path), arg=os.O_RDONLY) for _ in range(10)]
    peak = 0
    for round_ in range(200):
        assert all(r in (100, 20) for r in ring.run(*reads, *writes))
        made = ring.run(*opens)
        assert all(r >= 0 for r in made)
        assert ring.run(*[op(lib.YR_OP_CLOSE, d) for d in made]) == [0] * 10
        if round_ == 50:
            peak = resident()
    assert ring.info().completed == 200 * 60
    assert open_descriptors() == before
    if "libasan" not in Path("/proc/self/maps").read_text():  # it keeps freed memory for a while
        assert resident() < peak + (4 << 20)
    assert ring.close() == 0
    assert open_descriptors() == before - 1
