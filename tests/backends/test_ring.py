"""The compiled ring module, driven directly: csrc/ring.h and csrc/ring.cdef.h are the contract.

Rings, queued reads, registered memory and files, paths, owners. Batches are in `test_ring_batches.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import select
import signal
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
import ring_driver
from available import needs_nowait
from helpers import descriptors
from ring_driver import PAGE, Read, Ring, address, ffi, in_child, lib, polled

pytestmark = [pytest.mark.compiled, pytest.mark.once]

ring, data, fd, files = ring_driver.ring, ring_driver.data, ring_driver.fd, ring_driver.files  # fixtures
AT_FDCWD, AT_REMOVEDIR = -100, 0x200


# -- creating, asking, freeing --------------------------------------------------------------------


def test_version() -> None:
    assert lib.yr_abi_version() == lib.YR_ABI_VERSION


def test_create_tells_what_it_got(ring: Ring) -> None:
    info = ring.info()
    assert info.sq_entries == 32
    assert info.cq_entries == info.max_inflight == 64
    assert info.inflight == info.queued == info.broken == 0
    for kind in (lib.YR_OP_NOP, lib.YR_OP_READ, lib.YR_OP_WRITE, lib.YR_OP_FDATASYNC):
        assert lib.yr_supports(ring.c, kind) == 1
    assert lib.yr_supports(ring.c, lib.YR_OP_COUNT) == 0
    assert lib.yr_supports(ring.c, 10**6) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0},
        {"depth": 32769},
        {"depth": 8, "flags": 1 << 20},
        {"depth": 8, "max_inflight": 0},
        {"depth": 8, "max_inflight": 1 << 21},
    ],
)
def test_create_refuses_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(OSError) as caught:
        Ring(**options)
    assert caught.value.errno == errno.EINVAL


def test_create_with_every_kind_of_flags(fd: int, data: bytes) -> None:
    for flags in (0, lib.YR_ONE_THREAD, lib.YR_SQPOLL, lib.YR_ONE_THREAD | lib.YR_SQPOLL):
        try:
            ring = Ring(8, 8, flags)
        except OSError as error:
            assert flags & lib.YR_SQPOLL and error.errno in (errno.EPERM, errno.EINVAL)
            continue
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(50)])
        assert results == [100] * 50 and b"".join(memory) == data[:5000]
        assert ring.close() == 0


def test_null_is_refused() -> None:
    nothing = ffi.NULL
    assert lib.yr_create(nothing, 8, 8, 0) == -errno.EINVAL
    assert lib.yr_destroy(nothing, 0) == 0
    assert lib.yr_info(nothing, nothing) == -errno.EINVAL
    assert lib.yr_try_out(nothing, 0) == -errno.EINVAL
    assert lib.yr_submit(nothing) == -errno.EINVAL
    assert lib.yr_wait(nothing, 1, 0) == -errno.EINVAL
    assert lib.yr_queue_reads(nothing, 0, *[nothing] * 7) == -errno.EINVAL
    assert lib.yr_sync_batch(nothing, 0, nothing, nothing) == -errno.EINVAL
    assert lib.yr_unlink(nothing, 0, b"x", 0) == -errno.EINVAL
    assert lib.yr_eventfd(nothing) == -errno.EINVAL
    assert lib.yr_inject(nothing, 0, 0, 1, 0, 0) == -errno.EINVAL


def test_trying_out(ring: Ring) -> None:
    end, other = os.pipe()
    memory = bytearray(1)
    assert lib.yr_try_out(ring.c, 10**9) == 0
    for op, instead in ((lib.YR_OP_SUBMIT, False), (lib.YR_OP_NOP, True)):
        mine = Ring(4)
        mine.inject(op, -errno.EPERM, instead=instead)
        assert lib.yr_try_out(mine.c, 10**9) == -errno.EPERM
        mine.finish()
        assert mine.close() == 0
    assert ring.queue(Read(end, address(memory), 1)) == 1
    assert lib.yr_try_out(ring.c, 10**9) == -errno.EBUSY
    os.write(other, b"x")
    assert ring.finish() == {0: 1}
    os.close(end)
    os.close(other)


def test_no_descriptor_is_left_over_many_rings() -> None:
    before = descriptors()
    for _ in range(200):
        ring = Ring(8)
        assert lib.yr_eventfd(ring.c) >= 0
        assert lib.yr_try_out(ring.c, 10**9) == 0
        assert ring.close() == 0
    assert descriptors() == before


def test_create_says_emfile() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made: list[Ring] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), hard))
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
    assert ring.queue(Read(end, address(memory), 10, number=5)) == 1
    assert lib.yr_submit(ring.c) == 1
    assert ring.close() == -errno.EBUSY
    os.write(other, b"0123456789")
    assert ring.finish() == {5: 10}
    assert memory == b"0123456789"
    os.close(end)
    os.close(other)


def test_a_ring_can_be_given_up_with_operations_in_flight() -> None:
    before = descriptors()
    ring = Ring(4)
    end, other = os.pipe()
    memory = bytearray(10)  # which the kernel may write to as long as the pipe is open
    assert ring.queue(Read(end, address(memory), 10)) == 1
    assert lib.yr_submit(ring.c) == 1
    assert ring.close() == -errno.EBUSY
    assert ring.close(force=True) == 0
    os.close(end)
    os.close(other)
    limit = time.monotonic() + 10
    while descriptors() > before and time.monotonic() < limit:
        time.sleep(0.01)
    assert descriptors() == before


# -- queueing, submitting, reaping ----------------------------------------------------------------


def test_read_one(ring: Ring, fd: int, data: bytes) -> None:
    memory = bytearray(100)
    assert ring.run(Read(fd, address(memory), 100, 50)) == [100]
    assert memory == data[50:150]


def test_columns(ring: Ring, fd: int, data: bytes) -> None:
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
    assert lib.yr_queue_reads(ring.c, n, ffi.NULL, *cdata[1:], ffi.NULL, ffi.NULL) == -errno.EINVAL
    columns[1][5] = 0
    assert lib.yr_queue_reads(ring.c, n, *cdata, ffi.NULL, ffi.NULL) == -errno.EINVAL
    assert ring.info().inflight == 0


def test_a_bad_read_queues_nothing(ring: Ring, fd: int) -> None:
    memory = bytearray(10)
    good = Read(fd, address(memory), 10)
    for bad in (
        good._replace(memory=0),
        good._replace(length=lib.YR_MAX_IO + 1),
        good._replace(offset=1 << 63),
        good._replace(flags=128),
        good._replace(fd=0, flags=lib.YR_FIXED_FILE),
        good._replace(flags=lib.YR_FIXED_BUFFER),
    ):
        assert ring.queue(good, bad) == -errno.EINVAL
        assert ring.info().inflight == 0


def test_errors_are_results(ring: Ring, fd: int, data: bytes, tmp_path: Path) -> None:
    memory = bytearray(10)
    directory = os.open(tmp_path, os.O_RDONLY)
    results = ring.run(
        Read(10**6, address(memory), 10),
        Read(directory, address(memory), 10),
        Read(fd, address(memory), 10, len(data)),
    )
    os.close(directory)
    assert results == [-errno.EBADF, -errno.EISDIR, 0]


def test_backpressure_partial_count_then_the_rest(fd: int, data: bytes) -> None:
    ring = Ring(8)  # 8 entries, 16 in flight
    n = 100
    memory = bytearray(n * 10)
    reads = [Read(fd, address(memory) + 10 * i, 10, 10 * i, number=i) for i in range(n)]
    assert ring.queue(*reads) == 16
    assert ring.info().inflight == 16
    assert ring.queue(*reads) == 0
    done: dict[int, int] = {}
    queued = 16
    while queued < n or ring.info().inflight:
        assert ring.wait(1) >= 1
        done.update(ring.reap())
        if queued < n:
            queued += ring.queue(*reads[queued:])
    assert done == dict.fromkeys(range(n), 10)
    assert memory == data[: n * 10]
    assert ring.close() == 0


def test_wait_times_out_and_never_waits_for_nothing(ring: Ring) -> None:
    started = time.monotonic()
    assert ring.wait(1, 5.0) == 0  # nothing in flight
    assert time.monotonic() - started < 1
    end, other = os.pipe()
    memory = bytearray(1)
    assert ring.queue(Read(end, address(memory), 1)) == 1
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
    assert ring.queue(Read(end, address(memory), 1)) == 1
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


def test_one_call_hands_over_many_and_brings_them_back(ring: Ring, fd: int, data: bytes) -> None:
    """Batched submission: a system call for all of them, not one each."""
    memory = bytearray(30 * PAGE)
    os.pread(fd, len(memory), 0)  # in memory, so that all are complete at once
    reads = [Read(fd, address(memory) + i * PAGE, PAGE, i * PAGE, number=i) for i in range(30)]
    assert ring.queue(*reads) == 30
    assert ring.info().enters == 0
    assert ring.wait(30) == 30
    assert dict(ring.reap()) == dict.fromkeys(range(30), PAGE)
    info = ring.info()
    assert (info.enters, info.submitted, info.completed) == (1, 30, 30)
    assert memory == data[: len(memory)]
    assert ring.turn() == []


def test_reap_takes_no_more_than_asked(ring: Ring, fd: int) -> None:
    memory = bytearray(1)
    assert ring.queue(*(Read(fd, address(memory), 1, number=i) for i in range(30))) == 30
    assert ring.wait(30) == 30
    first = ring.reap(7)
    assert len(first) == 7
    rest = ring.reap(100)
    assert sorted(first + rest) == [(i, 1) for i in range(30)]


def test_overflow_of_the_completion_queue_loses_nothing(fd: int, tmp_path: Path) -> None:
    needs_nowait(tmp_path)  # else reads complete one by one
    ring = Ring(16, max_inflight=400)  # 32 completions have room
    memory = bytearray(1)
    for start in range(0, 400, 100):
        assert ring.queue(*(Read(fd, address(memory), 1, number=start + i) for i in range(100))) == 100
        lib.yr_submit(ring.c)
    done: dict[int, int] = {}
    limit = time.monotonic() + 20
    while len(done) < 400 and time.monotonic() < limit:
        lib.yr_submit(ring.c)
        done.update(ring.reap(4096))
    assert done == dict.fromkeys(range(400), 1)
    assert ring.info().overflows > 0
    assert ring.info().inflight == 0
    assert ring.close() == 0


def test_eventfd_wakes(ring: Ring) -> None:
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
        assert ring.queue(Read(end, address(memory), 10, number=round_)) == 1
        assert ring.turn() == []
        assert poll.poll(20) == []
        os.write(other, b"wake")
        assert poll.poll(5000) == [(event, select.POLLIN)]
        assert ring.reap() == [(round_, 4)]
        assert poll.poll(0) == []  # reaping read it empty
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
    reads = [Read(fd, address(memory) + i * PAGE, PAGE, i * PAGE, number=i) for i in range(n)]
    done: dict[int, int] = {}
    queued = 0
    limit = time.monotonic() + 30
    while len(done) < n:
        assert time.monotonic() < limit
        queued += ring.queue(*reads[queued : queued + 64]) if queued < n else 0
        done.update(ring.turn())
        if ring.info().inflight == 128 or queued == n:
            if len(done) < n:
                assert poll.poll(10000), "a completion did not wake"
            done.update(ring.reap())
    assert done == dict.fromkeys(range(n), PAGE)
    assert memory == data[: n * PAGE]
    assert ring.close() == 0


# -- registered memory and files --------------------------------------------------------------------


def test_registered_buffers(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    size = 4 * PAGE
    memory = [bytearray(size) for _ in range(2)]
    places = [address(one) for one in memory]
    assert lib.yr_buffers_register(ring.c, 0, places, [size] * 2) == -errno.EINVAL
    assert lib.yr_buffers_register(ring.c, 65, places * 33, [size] * 66) == -errno.EINVAL
    assert lib.yr_buffers_register(ring.c, 2, places, [size] * 2) == 0
    assert lib.yr_buffers_register(ring.c, 2, places, [size] * 2) == -errno.EBUSY
    fixed = lib.YR_FIXED_BUFFER
    assert ring.run(Read(fd, places[1] + 8, 1000, 77, flags=fixed, buffer=1)) == [1000]
    assert memory[1][8:1008] == data[77:1077]
    # Outside of the registered memory, and of the table.
    assert ring.run(Read(fd, places[1], size + 1, flags=fixed, buffer=1)) == [-errno.EFAULT]
    assert ring.queue(Read(fd, places[1], 10, flags=fixed, buffer=2)) == -errno.EINVAL
    results = ffi.new("int64_t[]", 4)
    columns = [places[0] + i * PAGE for i in range(4)], [PAGE] * 4, [i * PAGE for i in range(4)], results
    assert lib.yr_read_batch(ring.c, 4, [fd] * 4, *columns, 2) == -errno.EINVAL
    assert lib.yr_read_batch(ring.c, 4, [fd] * 4, *columns, 0) == 0
    assert list(results) == [PAGE] * 4 and memory[0] == data[:size]
    assert lib.yr_write_batch(ring.c, 4, [files[0]] * 4, *columns, 0) == 0
    assert list(results) == [PAGE] * 4 and os.pread(files[0], 2 * size, 0) == data[:size]
    assert lib.yr_write_batch(ring.c, 4, [files[0]] * 4, *columns, 1) == 0  # not of that buffer
    assert list(results) == [-errno.EFAULT] * 4


def test_registered_files(ring: Ring, fd: int, data: bytes, files: list[int]) -> None:
    assert lib.yr_files_register(ring.c, 0) == -errno.EINVAL
    assert lib.yr_files_register(ring.c, 8) == 0
    assert lib.yr_files_register(ring.c, 8) == -errno.EBUSY
    assert lib.yr_files_update(ring.c, 2, 2, [fd, files[0]]) == 2
    assert lib.yr_files_update(ring.c, 7, 2, [fd, fd]) == -errno.EINVAL
    memory = bytearray(100)
    fixed = lib.YR_FIXED_FILE
    assert ring.run(Read(2, address(memory), 100, 3, flags=fixed)) == [100]
    assert memory == data[3:103]
    assert ring.run(Read(3, address(memory), 1, flags=fixed)) == [0]  # another, empty file
    assert ring.run(Read(0, address(memory), 1, flags=fixed)) == [-errno.EBADF]
    assert ring.queue(Read(8, address(memory), 1, flags=fixed)) == -errno.EINVAL
    assert lib.yr_files_update(ring.c, 2, 1, [-1]) == 1
    assert ring.run(Read(2, address(memory), 1, flags=fixed)) == [-errno.EBADF]


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


def test_wiping() -> None:
    memory = bytearray(b"s" * 1000)
    lib.yr_wipe(ffi.from_buffer(memory), 500)
    assert memory == bytes(500) + b"s" * 500
    lib.yr_wipe(ffi.NULL, 10)


# -- paths ------------------------------------------------------------------------------------------


def test_directory_operations(ring: Ring, tmp_path: Path) -> None:
    wanted = (lib.YR_OP_MKDIRAT, lib.YR_OP_RENAMEAT, lib.YR_OP_UNLINKAT)
    if not all(lib.yr_supports(ring.c, kind) for kind in wanted):
        pytest.skip("this kernel lacks directory operations on rings")
    directory, old, new = (os.fsencode(tmp_path / name) for name in ("dir", "dir/old", "dir/new"))
    assert lib.yr_make_directory(ring.c, AT_FDCWD, directory, 0o700) == 0
    assert (tmp_path / "dir").stat().st_mode & 0o777 == 0o700
    assert lib.yr_make_directory(ring.c, AT_FDCWD, directory, 0o700) == -errno.EEXIST
    (tmp_path / "dir/old").write_bytes(b"hello")
    (tmp_path / "dir/new").write_bytes(b"replaced")
    assert lib.yr_rename(ring.c, AT_FDCWD, old, AT_FDCWD, new) == 0
    assert (tmp_path / "dir/new").read_bytes() == b"hello" and not (tmp_path / "dir/old").exists()
    assert lib.yr_rename(ring.c, AT_FDCWD, old, AT_FDCWD, new) == -errno.ENOENT
    at = os.open(directory, os.O_RDONLY)  # names may begin at a directory
    assert lib.yr_rename(ring.c, at, b"new", at, b"newer") == 0
    assert lib.yr_unlink(ring.c, at, b"new", 0) == -errno.ENOENT
    assert lib.yr_unlink(ring.c, at, b"newer", 0) == 0
    os.close(at)
    assert lib.yr_unlink(ring.c, AT_FDCWD, directory, 0) == -errno.EISDIR
    assert lib.yr_unlink(ring.c, AT_FDCWD, directory, AT_REMOVEDIR) == 0
    assert not (tmp_path / "dir").exists()
    assert ring.info().submitted == ring.info().completed == 9


def test_paths_need_an_idle_ring_and_a_kernel_that_has_them(ring: Ring, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "dir")
    assert lib.yr_make_directory(ring.c, AT_FDCWD, ffi.NULL, 0o700) == -errno.EINVAL
    assert lib.yr_rename(ring.c, AT_FDCWD, path, AT_FDCWD, ffi.NULL) == -errno.EINVAL
    end, other = os.pipe()
    memory = bytearray(1)
    assert ring.queue(Read(end, address(memory), 1)) == 1
    assert lib.yr_make_directory(ring.c, AT_FDCWD, path, 0o700) == -errno.EBUSY
    os.write(other, b"x")
    ring.finish()
    os.close(end)
    os.close(other)
    ring.inject(lib.YR_OP_MKDIRAT, -errno.EDQUOT, instead=True)
    if lib.yr_supports(ring.c, lib.YR_OP_MKDIRAT):
        assert lib.yr_make_directory(ring.c, AT_FDCWD, path, 0o700) == -errno.EDQUOT
        ring.inject(lib.YR_OP_SUBMIT, -errno.EPERM)
        assert lib.yr_make_directory(ring.c, AT_FDCWD, path, 0o700) == -errno.EPERM
    else:
        assert lib.yr_make_directory(ring.c, AT_FDCWD, path, 0o700) == -errno.EOPNOTSUPP
    assert not (tmp_path / "dir").exists()
    assert ring.info().inflight == ring.info().broken == 0


# -- ownership ------------------------------------------------------------------------------------


def test_another_thread_is_refused(ring: Ring) -> None:
    single = 1 << 12  # IORING_SETUP_SINGLE_ISSUER
    if not ring.info().setup_flags & single:
        pytest.skip("this kernel has no SINGLE_ISSUER")
    seen: list[int] = []

    def use() -> None:
        seen.append(lib.yr_submit(ring.c))
        seen.append(lib.yr_queue_reads(ring.c, 0, *[ffi.NULL] * 7))
        seen.append(lib.yr_reap(ring.c, 0, ffi.NULL, ffi.NULL))
        seen.append(lib.yr_read_batch(ring.c, 0, *[ffi.NULL] * 5, -1))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [-errno.EPERM] * 4
    assert ring.info().inflight == 0


def test_a_shared_ring_may_change_hands(fd: int, data: bytes) -> None:
    ring = Ring(16, flags=0)
    for _ in range(3):
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(ring.read_batch([(fd, 100, 0)])))  # noqa: B023
        thread.start()
        thread.join()
        assert got[0] == ([100], [data[:100]])
    assert ring.close() == 0


def test_a_ring_is_freed_after_its_thread_ended(fd: int) -> None:
    before = descriptors()
    made: list[Ring] = []

    def work() -> None:
        made.append(Ring(16))
        assert made[-1].read_batch([(fd, 100, 0)])[0] == [100]

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert made.pop().close() == 0
    assert descriptors() == before


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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(ring: Ring, fd: int, data: bytes) -> None:
    end, other = os.pipe()
    memory = bytearray(5)
    assert ring.queue(Read(end, address(memory), 5, number=1)) == 1
    assert ring.wait(1, 0) == 0

    def child() -> int:
        if lib.yr_submit(ring.c) != -errno.EPERM or lib.yr_try_out(ring.c, 0) != -errno.EPERM:
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
        memory = bytearray(8 << 20)
        where = address(memory)
        if lib.yr_buffers_register(ring.c, 1, [where], [8 << 20]) != -errno.ENOMEM:
            return 1
        # All or none: the small one is not registered either.
        if lib.yr_buffers_register(ring.c, 2, [where, where], [64 << 10, 8 << 20]) != -errno.ENOMEM:
            return 2
        if ring.queue(Read(0, where, 1, flags=lib.YR_FIXED_BUFFER)) != -errno.EINVAL:
            return 3
        if lib.yr_buffers_register(ring.c, 1, [where], [64 << 10]) != 0:
            return 4
        return 0 if ring.close() == 0 else 5

    assert in_child(child) == 0


def test_options_of_the_workers(ring: Ring, files: list[int]) -> None:
    assert lib.yr_set_workers(ring.c, 2, 2) in (0, -errno.EINVAL)
    cpus = sorted(os.sched_getaffinity(0))
    assert lib.yr_set_affinity(ring.c, 1, [cpus[0]]) in (0, -errno.EINVAL)
    assert lib.yr_set_affinity(ring.c, 1, [10**6]) == -errno.EINVAL
    assert ring.sync_batch(files * 10) == [0] * 40  # syncs are done by workers
    assert lib.yr_set_affinity(ring.c, 0, ffi.NULL) in (0, -errno.EINVAL)


def test_sqpoll(fd: int, data: bytes, files: list[int]) -> None:
    ring = polled(16, 32)
    for _ in range(3):
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
        assert results == [100] * 200 and b"".join(memory) == data[:20000]
        assert ring.write_batch([(f, b"abc", 0) for f in files]) == [3] * 4
        assert ring.sync_batch(files) == [0] * 4
        time.sleep(1.1)  # the thread sleeps, and must be woken
    memory = bytearray(2)
    assert ring.run(Read(fd, address(memory), 1), Read(fd, address(memory) + 1, 1, 1)) == [1, 1]
    assert memory == data[:2]
    assert ring.close() == 0


def test_sqpoll_gives_back_entries_late(fd: int, data: bytes) -> None:
    """Completions may be there before the entries are free again."""
    ring = polled(4, 8)
    expected = data[:20000]
    for _ in range(1500):
        results, memory = ring.read_batch([(fd, 100, i * 100) for i in range(200)])
        assert results == [100] * 200 and b"".join(memory) == expected
    assert ring.close() == 0
