"""Whole batches of the compiled ring module, and what becomes of them when the kernel refuses.

`test_ring.py` has the rest of the module.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
from pathlib import Path

import pytest
import ring_driver
from helpers import descriptors
from ring_driver import PAGE, Read, Ring, address, ffi, lib

pytestmark = [pytest.mark.compiled, pytest.mark.once]

ring, data, fd, files = ring_driver.ring, ring_driver.data, ring_driver.fd, ring_driver.files  # fixtures


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
    memory = bytearray(20)
    assert ring.queue(Read(fd, address(memory), 10)) == 1
    results = ffi.new("int64_t[]", 1)
    arguments = (ring.c, 1, [fd], [address(memory) + 10], [10], [0], results, -1)
    assert lib.yr_read_batch(*arguments) == -errno.EBUSY
    assert lib.yr_sync_batch(ring.c, 1, [fd], results) == -errno.EBUSY
    ring.finish()
    assert lib.yr_read_batch(*arguments) == 0
    assert lib.yr_sync_batch(ring.c, 1, [fd], results) == 0


def test_batches_check_their_arguments(ring: Ring, fd: int) -> None:
    results = ffi.new("int64_t[]", 2)
    memory = bytearray(10)
    a = address(memory)
    for addrs, lens, offs, buffer in (
        ([0], [10], [0], -1),
        ([a], [1 << 63], [0], -1),
        ([a], [10], [1 << 63], -1),
        ([a], [10], [(1 << 63) - 5], -1),
        ([a], [10], [0], 0),
        ([a], [10], [0], -2),
    ):
        for batch in (lib.yr_read_batch, lib.yr_write_batch):
            assert batch(ring.c, 1, [fd], addrs, lens, offs, results, buffer) == -errno.EINVAL
    null = ffi.NULL
    for batch in (lib.yr_read_batch, lib.yr_write_batch):
        assert batch(ring.c, 1, null, [a], [1], [0], results, -1) == -errno.EINVAL
        assert batch(ring.c, 1, [fd], [a], [1], [0], null, -1) == -errno.EINVAL
        assert batch(ring.c, 1, [fd], [a], null, [0], results, -1) == -errno.EINVAL
        assert batch(ring.c, 0, null, null, null, null, null, -1) == 0
    assert lib.yr_sync_batch(ring.c, 1, null, results) == -errno.EINVAL
    assert lib.yr_sync_batch(ring.c, 1, [fd], null) == -errno.EINVAL
    assert lib.yr_sync_batch(ring.c, 0, null, null) == 0


@pytest.mark.parametrize("depth", [2, 8, 128])
def test_write_batch(depth: int, files: list[int]) -> None:
    ring = Ring(depth)
    chance = random.Random(3)
    expected = [bytearray(400_000) for _ in files]
    requests = []
    for i in range(300):
        which = chance.randrange(len(files))
        text = b"".join(chance.randbytes(chance.choice([0, 1, 60, 700])) for _ in range(i % 6))
        requests.append((files[which], text, i * 1300))
        expected[which][i * 1300 : i * 1300 + len(text)] = text
    assert ring.write_batch(requests) == [len(text) for _, text, _ in requests]
    assert ring.sync_batch(files) == [0] * len(files)
    for descriptor, content in zip(files, expected, strict=True):
        assert os.pread(descriptor, 400_000, 0).ljust(400_000, b"\0") == content
    assert ring.close() == 0


def test_a_write_that_fails_is_one_request_only(ring: Ring, files: list[int]) -> None:
    readonly = os.open(f"/proc/self/fd/{files[1]}", os.O_RDONLY)
    results = ring.write_batch([(files[0], b"ok", 0), (readonly, b"no", 0), (files[2], b"", 0)])
    os.close(readonly)
    assert results == [2, -errno.EBADF, 0]
    assert os.pread(files[0], 10, 0) == b"ok"


def test_syncs_of_many_descriptors(ring: Ring, files: list[int]) -> None:
    """More than the ring takes at once, among them one that is not open and one that has no disk."""
    end, other = os.pipe()
    results = ring.sync_batch([*files * 50, 10**6, other, *files])
    os.close(end)
    os.close(other)
    assert results == [0] * 200 + [-errno.EBADF, -errno.EINVAL] + [0] * 4
    assert ring.info().submitted == ring.info().completed == 206
    assert ring.sync_batch([]) == []


def not_durable(descriptor: int) -> int:
    """Pages of the file that are dirty or on their way to the disk (cachestat, Linux 6.5)."""
    everything = (ctypes.c_uint64 * 2)(0, 0)
    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(451, descriptor, ctypes.byref(everything), ctypes.byref(counts), 0) != 0:
        pytest.skip("this kernel has no cachestat")
    return int(counts[1] + counts[2])


def test_after_the_sync_nothing_is_dirty(ring: Ring, files: list[int]) -> None:
    os.pwrite(files[0], b"x", 0)
    before = not_durable(files[0])
    os.fdatasync(files[0])
    if before == 0 or not_durable(files[0]) != 0:
        pytest.skip("this file system does not tell")
    for round_ in range(30):
        writes = [(f, text, round_ * 2 * PAGE + at) for f in files for at, text in ((0, b"a"), (PAGE, b"b"))]
        assert ring.write_batch(writes) == [1] * len(writes)
        assert ring.sync_batch(files) == [0] * len(files)
        assert [not_durable(f) for f in files] == [0] * len(files)


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
    code = lib.yr_read_batch(ring.c, 1, [descriptor], [address(memory)], [size], [0], results, -1)
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
    whole = b"abcdefgh" + b"ij" * 500
    # With `instead` nothing is written, so what was claimed stays a hole: only lengths are compared.
    ring.inject(lib.YR_OP_WRITE, 4, count=1, instead=instead)
    ring.inject(lib.YR_OP_WRITE, 1, skip=1, count=3)
    assert ring.write_batch([(files[0], whole, 0)]) == [len(whole)]
    assert ring.info().resumed == (1 if instead else 4)
    got = os.pread(files[0], 2000, 0)
    assert got == (bytes(4) + whole[4:] if instead else whole)


def test_a_write_that_makes_no_progress_is_an_error(ring: Ring, files: list[int]) -> None:
    ring.inject(lib.YR_OP_WRITE, 0, count=10**6)
    assert ring.write_batch([(files[0], b"abc", 0)]) == [-errno.EIO]


def test_a_write_fails_without_happening(ring: Ring, files: list[int]) -> None:
    os.pwrite(files[0], b"old", 0)
    ring.inject(lib.YR_OP_WRITE, -errno.ENOSPC, instead=True)
    assert ring.write_batch([(files[0], b"new", 0)]) == [-errno.ENOSPC]
    assert os.pread(files[0], 10, 0) == b"old"


def test_failing_syncs_are_reported(ring: Ring, files: list[int]) -> None:
    ring.inject(lib.YR_OP_FDATASYNC, -errno.EIO, instead=True)
    assert ring.sync_batch(files) == [-errno.EIO, 0, 0, 0]
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_FDATASYNC, -errno.EINTR, count=3)
    assert ring.sync_batch(files[:1]) == [0]
    assert ring.info().retried == 3


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
            assert ring.write_batch([(f, b"x", 0) for f in files]) == [-error] * 4
            assert ring.sync_batch(files) == [-error] * 4
            info = ring.info()
            assert info.inflight == info.queued == info.broken == 0
            lib.yr_inject_clear(ring.c)
            # The ring is as good as new.
            assert ring.read_batch([(fd, 100, 0)])[0] == [100]


def test_submission_in_parts(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    """A kernel that takes but some of what is queued."""
    for some in range(9):
        ring.inject(lib.YR_OP_SUBMIT, some, count=2)
        before = ring.info().submitted
        assert ring.sync_batch(files * 2) == [0] * 8
        assert ring.info().submitted == before + 8
        lib.yr_inject_clear(ring.c)
    memory = bytearray(40)
    ring.inject(lib.YR_OP_SUBMIT, 1)
    assert ring.queue(*(Read(fd, address(memory) + 10 * i, 10, 10 * i, number=i) for i in range(4))) == 4
    assert lib.yr_submit(ring.c) == 1
    assert ring.info().queued == 3
    assert ring.finish() == dict.fromkeys(range(4), 10)
    assert memory == data[:40]


def test_injection_into_queued_operations(ring: Ring, fd: int) -> None:
    memory = bytearray(100)
    read = Read(fd, address(memory), 100)
    ring.inject(lib.YR_OP_READ, 30)
    ring.inject(lib.YR_OP_READ, -errno.EIO, skip=1)
    ring.inject(lib.YR_OP_READ, 1000, skip=2)  # never lengthens
    assert ring.run(read) == [30]
    assert ring.run(read) == [-errno.EIO]
    assert ring.run(read) == [100]
    memory[:] = bytes(100)
    lib.yr_inject_clear(ring.c)
    ring.inject(lib.YR_OP_ANY, -errno.EIO, instead=True)
    assert ring.run(read) == [-errno.EIO]
    assert memory == bytes(100)  # it did not happen
    assert ring.info().injected == 4


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


# -- endurance ------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_operations_leave_nothing(fd: int, files: list[int], tmp_path: Path) -> None:
    ring = Ring(64)
    before = descriptors()
    memory = bytearray(100)
    reads = [Read(fd, address(memory), 100, i) for i in range(20)]
    writes = [(files[0], b"x" * 20, i) for i in range(20)]
    path = os.fsencode(tmp_path / "directory")
    paths = bool(lib.yr_supports(ring.c, lib.YR_OP_MKDIRAT))
    peak = 0
    for round_ in range(200):
        assert ring.run(*reads) == [100] * 20
        assert ring.write_batch(writes) == [20] * 20
        if paths:
            assert lib.yr_make_directory(ring.c, -100, path, 0o700) == 0
            assert lib.yr_unlink(ring.c, -100, path, 0x200) == 0
        else:
            assert ring.sync_batch(files[:2]) == [0, 0]
        if round_ == 50:
            peak = resident()
    assert ring.info().completed == 200 * 42
    assert descriptors() == before
    if "libasan" not in Path("/proc/self/maps").read_text():  # it keeps freed memory for a while
        assert resident() < peak + (4 << 20)
    assert ring.close() == 0
    assert descriptors() == before - 1
