"""The contract of `backends/base.py`, the same for every backend that there is and for the faulty one."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import json
import mmap
import os
import pickle
import random
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS, needs_nowait
from faulty import ALWAYS, Fault, FaultyBackend
from helpers import noise, run_python

from yatagarasu_cache.backends import choose
from yatagarasu_cache.backends.base import Backend, Buffer, Channel
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.config import make_settings

pytestmark = pytest.mark.compiled

MIB = 1 << 20
CONTENT = noise(5 * MIB + 123)  # long enough for every way of reading that a backend has


def short(most: int) -> Callable[[], Backend]:
    def build() -> Backend:
        plan = [Fault(kind, times=ALWAYS, short=most) for kind in ("read", "write")]
        return FaultyBackend(plan=plan, workers=4)

    return build


def named(name: str) -> Callable[[], Backend]:
    return lambda: choose(make_settings("/unused", backend=name, workers=4)).backend


MAKERS = {name: named(name) for name in BACKENDS} | {
    "faulty": lambda: FaultyBackend(workers=4),
    "short": short(65_537),  # every system call moves at most so much
}


@pytest.fixture(params=MAKERS)
def tested(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = MAKERS[request.param]()
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file with CONTENT."""
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[int]:
    """An empty file."""
    fd = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def closed_fd(tmp_path: Path) -> int:
    """A descriptor number that no file has, and that nobody gets meanwhile."""
    return 100_000_000


def drop_from_memory(fd: int) -> None:
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def whole(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def some_ranges(seed: int, count: int, longest: int = 100_000) -> list[tuple[int, int]]:
    """(length, offset), among them empty ones and some that reach beyond the end."""
    chosen = random.Random(seed)
    ranges = [(chosen.randrange(longest), chosen.randrange(len(CONTENT) + 1000)) for _ in range(count)]
    ranges += [(0, 0), (1, 0), (1, len(CONTENT) - 1), (1, len(CONTENT)), (10, len(CONTENT) - 3), (4096, 4096)]
    chosen.shuffle(ranges)
    return ranges


def part(length: int, offset: int) -> bytes:
    return CONTENT[offset : offset + length]


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(
    ("length", "offset"),
    [
        (0, 0), (0, 10**9), (1, 0), (4096, 0), (4096, 1), (70_000, 17), (3 * MIB, 0), (3 * MIB, 4097),
        (len(CONTENT), 0), (len(CONTENT) + 1, 0), (64 * MIB, 1), (100, len(CONTENT) - 1),
        (100, len(CONTENT)), (3 * MIB, len(CONTENT) + 5), (2 * MIB, len(CONTENT) - 2 * MIB),
    ],
)  # fmt: skip
def test_a_read_is_short_only_at_the_end(
    tested: Backend, fd: int, length: int, offset: int, cold: bool
) -> None:
    if cold:
        drop_from_memory(fd)
    for _ in range(2):
        data = tested.read(fd, length, offset)
        assert type(data) is bytes
        assert data == part(length, offset)


def test_reading_once_gives_a_true_beginning(tested: Backend, fd: int) -> None:
    for length, offset in some_ranges(1, 50):
        data = tested.read_once(fd, length, offset)
        expected = part(length, offset)
        assert type(data) is bytes
        assert expected.startswith(data)
        assert bool(data) == bool(expected)  # nothing at all only at the end


@pytest.mark.parametrize("cold", [False, True])
def test_reading_without_waiting_gives_all_or_nothing(
    tested: Backend, fd: int, tmp_path: Path, cold: bool
) -> None:
    needs_nowait(tmp_path)
    whole(fd)
    found = 0
    for length, offset in some_ranges(2, 60):
        if cold:
            drop_from_memory(fd)
        data = tested.read_nowait(fd, length, offset)
        assert data is None or (type(data) is bytes and data == part(length, offset))
        found += data is not None
    assert cold or found >= 30  # what was just read is in memory


def pages_in_memory(fd: int) -> int:
    """How many pages of a file are; asking does not bring them there."""
    size = os.fstat(fd).st_size
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(fd, size) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), found) == 0
        del start
    return sum(page & 1 for page in found)


def test_prefetch(tested: Backend, fd: int) -> None:
    """Soon all of it is in memory, however long it is; what can't be had is nobody's failure."""
    drop_from_memory(fd)
    tested.prefetch(fd, len(CONTENT) + 5, 0)
    deadline = time.monotonic() + 60
    while pages_in_memory(fd) < len(CONTENT) // mmap.PAGESIZE:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    tested.prefetch(100_000_000, 10, 0)
    tested.prefetch(fd, 10, 1 << 40)


@pytest.mark.parametrize("way", ["read", "read_once", "read_nowait"])
def test_a_read_that_fails_says_why(tested: Backend, closed_fd: int, way: str) -> None:
    with pytest.raises(OSError) as raised:
        getattr(tested, way)(closed_fd, 10, 0)
    assert raised.value.errno == errno.EBADF


def test_a_long_read_that_fails_says_why(tested: Backend, closed_fd: int, tmp_path: Path) -> None:
    for bad in (closed_fd, os.open(tmp_path, os.O_RDONLY)):
        with pytest.raises(OSError) as raised:
            tested.read(bad, 3 * MIB, 0)
        assert raised.value.errno in (errno.EBADF, errno.EISDIR)
        if bad != closed_fd:
            os.close(bad)


def test_what_was_returned_never_changes(tested: Backend, fd: int) -> None:
    ranges = some_ranges(3, 200, 9000)
    kept = [tested.read(fd, *r) for r in ranges]
    kept += [d for d in tested.read_many([(fd, *r) for r in ranges]) if isinstance(d, bytes)]
    expected = [part(*r) for r in ranges] * 2
    for length, offset in some_ranges(4, 200, 9000):
        tested.read(fd, length, offset)
        tested.read_nowait(fd, length, offset)
    tested.read_many([(fd, 4096, 4096 * i) for i in range(400)])
    assert kept == expected


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffers",
    [
        [],
        [b""],
        [b"one"],
        [b"", b"a", b"", b"bc", b""],
        [bytearray(b"one"), memoryview(b"two"), memoryview(bytearray(b"a three b"))[2:7], b"four"],
        [bytes([i % 251]) * (i % 37) for i in range(5000)],  # more than one system call takes
        [CONTENT],
        [CONTENT[:MIB], memoryview(CONTENT)[MIB:], b"end"],
        [memoryview(CONTENT)[at : at + 4099] for at in range(0, len(CONTENT), 4099)],
    ],
    ids=["none", "empty", "one", "with-empty", "kinds", "5000", "large", "three", "large-pieces"],
)
@pytest.mark.parametrize("offset", [0, 7, 70_001])
def test_a_write_writes_everything(tested: Backend, empty: int, buffers: list[Buffer], offset: int) -> None:
    os.pwrite(empty, b"before", 0)
    expected = bytearray(b"before")
    data = b"".join(buffers)
    if data:
        expected.extend(bytes(max(0, offset - len(expected))))
        expected[offset : offset + len(data)] = data
    tested.write(empty, buffers, offset)
    assert whole(empty) == bytes(expected)


def test_a_write_that_fails_says_why(tested: Backend, closed_fd: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"as it is")
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    for bad in (closed_fd, read_only):
        for buffers in ([b"data"], [b"x"] * 3000):
            with pytest.raises(OSError) as raised:
                tested.write(bad, buffers, 0)
            assert raised.value.errno == errno.EBADF
    os.close(read_only)
    assert (tmp_path / "file").read_bytes() == b"as it is"


def test_a_full_device_is_told(tested: Backend) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as raised:
            tested.write(fd, [b"data", b"more"], 0)
        assert raised.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("have", "offset", "length"),
    [(0, 0, 1), (0, 0, 200_000), (5000, 5000, 70_000), (5000, 1000, 2000), (5000, 4000, 9000), (10, 0, 4096)],
)
def test_allocate(tested: Backend, empty: int, have: int, offset: int, length: int) -> None:
    os.pwrite(empty, CONTENT[:have], 0)
    tested.allocate(empty, offset, length)
    status = os.fstat(empty)
    assert status.st_size == max(have, offset + length)
    assert status.st_blocks * 512 >= status.st_size
    assert whole(empty) == CONTENT[:have].ljust(status.st_size, b"\0")


def test_allocate_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FaultyBackend()

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    fd = backend.open(str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    backend.write(fd, [b"kept"], 0)
    backend.allocate(fd, 2, 200_000)
    assert whole(fd) == b"kept".ljust(200_002, b"\0")
    assert os.fstat(fd).st_blocks * 512 >= 200_000
    backend.close_file(fd)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
@pytest.mark.parametrize("call", ["pwritev", "preadv", "posix_fallocate", "fdatasync", "fsync", "posix_fadvise"])
def test_a_call_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, call: str, code: int
) -> None:
    """A sandbox forbids one system call: others do its work."""
    tested, calls = choose(make_settings(tmp_path, backend=backend)).backend, []

    def refuse(*_: object) -> None:
        calls.append(call)
        raise OSError(code, "not here")

    monkeypatch.setattr(os, call, refuse)
    fd = tested.open(str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    tested.write(fd, [CONTENT[:5000], b"", CONTENT[5000:9000]], 0)
    tested.allocate(fd, 0, 20_000)
    tested.prefetch(fd, 9000, 0)
    assert tested.read(fd, 9000, 0) == CONTENT[:9000]
    assert tested.read_nowait(fd, 9000, 0) in (None, CONTENT[:9000])
    assert tested.read_many([(fd, 3000, 100), (fd, 3000, 4000)]) == [CONTENT[100:3100], CONTENT[4000:7000]]
    assert tested.write_many([(fd, [b"a", b"b"], 0)], [fd]) == [None]
    tested.sync(fd)
    tested.sync_directory(str(tmp_path))
    assert calls
    tested.close_file(fd)
    tested.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_call_that_fails_is_not_tried_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tested = ThreadsBackend()
    fd = tested.open(str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)

    def fail(*_: object) -> None:
        raise OSError(code, "broken")

    for call in ("pwritev", "posix_fallocate", "fdatasync", "fsync"):
        monkeypatch.setattr(os, call, fail)
    for attempt in (
        lambda: tested.write(fd, [b"a"], 0),
        lambda: tested.allocate(fd, 0, 10),
        lambda: tested.sync(fd),
        lambda: tested.sync_directory(str(tmp_path)),
    ):
        with pytest.raises(OSError) as raised:
            attempt()
        assert raised.value.errno == code
    tested.close_file(fd)


def test_truncate_and_sync(tested: Backend, fd: int, closed_fd: int) -> None:
    tested.truncate(fd, 1000)
    assert whole(fd) == CONTENT[:1000]
    tested.truncate(fd, 2000)
    assert whole(fd) == CONTENT[:1000] + bytes(1000)
    tested.sync(fd)
    for call in (lambda: tested.truncate(closed_fd, 1), lambda: tested.sync(closed_fd)):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno in (errno.EBADF, errno.EINVAL)


# -- names --------------------------------------------------------------------------------------


def test_open_does_not_pass_on_descriptors(tested: Backend, tmp_path: Path) -> None:
    fd = tested.open(str(tmp_path / "new"), os.O_RDWR | os.O_CREAT, 0o600)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    tested.close_file(fd)
    with pytest.raises(OSError) as raised:
        os.fstat(fd)
    assert raised.value.errno == errno.EBADF


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC])
def test_open_follows_no_link(tested: Backend, tmp_path: Path, flags: int) -> None:
    (tmp_path / "target").write_bytes(b"untouched")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError) as raised:
        tested.open(str(tmp_path / "link"), flags)
    assert raised.value.errno == errno.ELOOP
    assert (tmp_path / "target").read_bytes() == b"untouched"


def test_open_says_what_is_wrong(tested: Backend, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tested.open(str(tmp_path / "none"), os.O_RDONLY)
    (tmp_path / "some").touch()
    with pytest.raises(FileExistsError):
        tested.open(str(tmp_path / "some"), os.O_RDWR | os.O_CREAT | os.O_EXCL)


def test_unlink_and_mkdir_say_whether_there_was_something(tested: Backend, tmp_path: Path) -> None:
    path, directory = str(tmp_path / "file"), str(tmp_path / "directory")
    Path(path).touch()
    assert [tested.unlink(path) for _ in range(3)] == [True, False, False]
    assert [tested.mkdir(directory, 0o700) for _ in range(3)] == [True, False, False]
    assert os.stat(directory).st_mode & 0o777 == 0o700
    with pytest.raises(OSError):
        tested.unlink(directory)
    with pytest.raises(FileNotFoundError):
        tested.mkdir(str(tmp_path / "none" / "below"))


def test_replace_is_a_rename(tested: Backend, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for there in (False, True):
        source.write_bytes(b"new %d" % there)
        node = source.stat().st_ino
        tested.replace(str(source), str(target))
        assert not source.exists()
        assert (target.read_bytes(), target.stat().st_ino) == (b"new %d" % there, node)
    with pytest.raises(FileNotFoundError):
        tested.replace(str(source), str(target))
    assert target.read_bytes() == b"new 1"
    tested.sync_directory(str(tmp_path))


def test_scandir_is_sorted_and_follows_no_link(tested: Backend, tmp_path: Path) -> None:
    root = tmp_path / "listed"
    root.mkdir()
    names = [f"{i * 7919 % 100:03}" for i in range(100)] + ["größe", "B", "a b"]
    for name in names:
        (root / name).write_bytes(bytes(len(name)))
    (root / "link").symlink_to("nowhere")
    (root / "sub").mkdir()
    found = tested.scandir(str(root))
    assert [name for name, _ in found] == sorted([*names, "link", "sub"])
    for name, status in found:
        assert (status.st_ino, status.st_mode) == (
            (root / name).lstat().st_ino,
            (root / name).lstat().st_mode,
        )
    with pytest.raises(FileNotFoundError):
        tested.scandir(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        tested.sync_directory(str(tmp_path / "none"))


# -- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 20, 700])
@pytest.mark.parametrize("cold", [False, True])
def test_read_many_keeps_the_order(tested: Backend, fd: int, count: int, cold: bool) -> None:
    ranges = some_ranges(count, count)[: count or 1000] if count else []
    if cold:
        drop_from_memory(fd)
    assert tested.read_many([(fd, *r) for r in ranges]) == [part(*r) for r in ranges]


@pytest.mark.parametrize("count", [1, 3, 5, 300])
def test_a_failing_read_fails_alone(
    tested: Backend, fd: int, closed_fd: int, tmp_path: Path, count: int
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    ranges = [(1 + i * 37 % 5000, i * 4099) for i in range(count)]
    bad = [(closed_fd, 10, 0), (directory, 10, 0), (-1, 10, 0), (fd, 10, -1)]
    requests = [(fd, *r) for r in ranges] + bad + [(fd, 3 * MIB, 5)] + [(fd, *r) for r in ranges]
    results = tested.read_many(requests)
    os.close(directory)
    assert len(results) == len(requests)
    expected = [part(*r) for r in ranges]
    assert results[:count] == expected
    assert results[-count:] == expected
    assert results[count + 4] == part(3 * MIB, 5)
    errors = [result.errno for result in results[count : count + 4] if isinstance(result, OSError)]
    assert errors == [errno.EBADF, errno.EISDIR, errno.EBADF, errno.EINVAL]


def test_write_many_keeps_the_order(tested: Backend, empty: int, tmp_path: Path) -> None:
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    chosen = random.Random(5)
    model = {empty: bytearray(), other: bytearray()}
    requests = []
    for i in range(600):
        target, offset = chosen.choice([empty, other]), chosen.randrange(20_000)
        data = noise(chosen.randrange(1, 3000), i)
        cut = chosen.randrange(len(data))
        requests.append((target, [data[:cut], b"", data[cut:]], offset))
        model[target].extend(bytes(max(0, offset - len(model[target]))))
        model[target][offset : offset + len(data)] = data
    assert tested.write_many(requests, sync=[empty, other, empty]) == [None] * 600
    assert whole(empty) == bytes(model[empty])
    assert whole(other) == bytes(model[other])
    assert tested.write_many([]) == []
    assert tested.write_many([], sync=[empty, other]) == []
    os.close(other)


def test_a_failing_write_fails_alone(tested: Backend, empty: int, closed_fd: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"as it is")
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    results = tested.write_many(
        [
            (empty, [b"a"], 0),
            (closed_fd, [b"x"], 0),
            (empty, [b"b"], 1),
            (read_only, [b"y"], 0),
            (empty, [b"c"], 2),
        ],
        sync=[empty],
    )
    os.close(read_only)
    assert [result and result.errno for result in results] == [None, errno.EBADF, None, errno.EBADF, None]
    assert whole(empty) == b"abc"
    assert (tmp_path / "file").read_bytes() == b"as it is"


@pytest.mark.parametrize("others", [0, 1, 20])
def test_a_failing_sync_fails_every_request_on_its_file(tested: Backend, tmp_path: Path, others: int) -> None:
    unsyncable = os.open("/dev/null", os.O_RDWR)  # takes writes, but not syncs
    files = [os.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT) for i in range(others)]
    requests = [(unsyncable, [b"1"], 0), *((fd, [b"data"], 0) for fd in files), (unsyncable, [b"2"], 9)]
    results = tested.write_many(requests, sync=[*files, unsyncable])
    assert [result and result.errno for result in results] == [errno.EINVAL, *[None] * others, errno.EINVAL]
    assert tested.write_many(requests, sync=files) == [None] * len(requests)  # nobody asked for that sync
    for fd in files:
        assert whole(fd) == b"data"
        os.close(fd)
    os.close(unsyncable)


def test_a_sync_of_no_file_harms_nobody(tested: Backend, empty: int, closed_fd: int) -> None:
    assert tested.write_many([(empty, [b"data"], 0)], sync=[closed_fd, empty]) == [None]
    assert whole(empty) == b"data"


def test_from_many_threads(tested: Backend, fd: int, tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            own = tested.open(str(tmp_path / f"own{number}"), os.O_RDWR | os.O_CREAT)
            for round_ in range(8):
                ranges = some_ranges(number * 100 + round_, 40, 5000)
                if tested.read_many([(fd, *r) for r in ranges]) != [part(*r) for r in ranges]:
                    wrong.append((number, round_, "read_many"))
                data = noise(50_000, number * 100 + round_)
                if (
                    tested.write_many([(own, [data], 0)], sync=[own]) != [None]
                    or tested.read(own, 60_000, 0) != data
                ):
                    wrong.append((number, round_, "write_many"))
            tested.close_file(own)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- asyncio ------------------------------------------------------------------------------------


def in_loop(backend: Backend, work: Callable[[Channel], Awaitable[Any]]) -> Any:
    """`work(channel)` in a new loop; the channel is closed at its end, and nothing may be left over."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        trouble: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: trouble.append(context))
        channel = backend.channel(loop)
        try:
            return await asyncio.wait_for(work(channel), 60)
        finally:
            channel.close()
            channel.close()
            await asyncio.sleep(0)
            assert trouble == []

    return asyncio.run(main())


@pytest.mark.parametrize("cold", [False, True])
def test_channel_reads(tested: Backend, fd: int, cold: bool) -> None:
    ranges = [*some_ranges(6, 100), (3 * MIB, 7), (64 * MIB, 4 * MIB), (3 * MIB, len(CONTENT))]
    if cold:
        drop_from_memory(fd)

    async def work(channel: Channel) -> list[bytes]:
        one_by_one = [await channel.read(fd, *r) for r in ranges[:20]]
        assert one_by_one == [part(*r) for r in ranges[:20]]
        return list(await asyncio.gather(*(channel.read(fd, *r) for r in ranges)))

    found = in_loop(tested, work)
    assert found == [part(*r) for r in ranges]
    assert all(type(data) is bytes for data in found)


def test_channel_read_that_fails_fails_alone(tested: Backend, fd: int, closed_fd: int) -> None:
    async def work(channel: Channel) -> list[Any]:
        requests = [(fd, 10, 0), (closed_fd, 10, 0), (fd, 10, 10), (-1, 10, 0), (fd, 10, -1), (fd, 10, 20)]
        return await asyncio.gather(*(channel.read(*r) for r in requests), return_exceptions=True)

    found = in_loop(tested, work)
    assert [r for r in found if isinstance(r, bytes)] == [part(10, 0), part(10, 10), part(10, 20)]
    assert [r.errno for r in found if isinstance(r, OSError)] == [errno.EBADF, errno.EBADF, errno.EINVAL]


def test_channel_runs_in_another_thread_and_answers_in_the_loops(tested: Backend, fd: int) -> None:
    told: list[int] = []

    async def work(channel: Channel) -> int:
        futures: list[asyncio.Future[Any]] = [channel.run(threading.get_ident), channel.read(fd, 4096, 0)]
        for future in futures:
            future.add_done_callback(lambda _: told.append(threading.get_ident()))
        with pytest.raises(ZeroDivisionError):
            await channel.run(divmod, 1, 0)
        with pytest.raises(FileNotFoundError):
            await channel.run(os.stat, "/none/such")
        return int((await asyncio.gather(*futures))[0])

    assert in_loop(tested, work) != threading.get_ident()
    assert told == [threading.get_ident()] * 2


def test_cancelled_before_it_begins_it_does_not_run(tested: Backend) -> None:
    async def work(channel: Channel) -> list[int]:
        go, ran = threading.Event(), []
        blockers = [channel.run(go.wait, 30) for _ in range(40)]  # more than there are workers
        late = [channel.run(ran.append, i) for i in range(20)]
        for future in late[::2]:
            assert future.cancel()
        go.set()
        await asyncio.gather(*blockers)
        await asyncio.gather(*late, return_exceptions=True)
        return ran

    assert sorted(in_loop(tested, work)) == list(range(1, 20, 2))


def test_cancelled_while_it_runs(tested: Backend, fd: int) -> None:
    async def work(channel: Channel) -> None:
        began, go, ended = threading.Event(), threading.Event(), threading.Event()

        def function() -> None:
            began.set()
            go.wait(30)
            ended.set()
            raise ValueError("of nobody's concern any more")

        future = channel.run(function)
        while not began.is_set():
            await asyncio.sleep(0.001)
        assert future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future
        assert not ended.is_set()
        go.set()
        assert await channel.run(ended.wait, 30)
        assert await channel.read(fd, 100, 3) == part(100, 3)

    in_loop(tested, work)


@pytest.mark.parametrize("pause", [0, 1, 3])
def test_cancelled_reads_disturb_no_others(tested: Backend, fd: int, pause: int) -> None:
    drop_from_memory(fd)
    ranges = some_ranges(7, 600, 20_000)

    async def work(channel: Channel) -> None:
        futures = [channel.read(fd, *r) for r in ranges]
        for _ in range(pause):
            await asyncio.sleep(0)
        cancelled = {i for i in range(0, len(futures), 3) if futures[i].cancel()}
        more = [channel.read(fd, *r) for r in ranges]
        found = await asyncio.gather(*futures, return_exceptions=True)
        for i, (result, r) in enumerate(zip(found, ranges, strict=True)):
            assert isinstance(result, asyncio.CancelledError) if i in cancelled else result == part(*r)
        assert await asyncio.gather(*more) == [part(*r) for r in ranges]

    in_loop(tested, work)


def test_thousands_in_flight(tested: Backend, fd: int) -> None:
    ranges = some_ranges(8, 5000, 6000)

    async def work(channel: Channel) -> None:
        reads = [channel.read(fd, *r) for r in ranges]
        runs = [channel.run(abs, -i) for i in range(2000)]
        assert await asyncio.gather(*reads) == [part(*r) for r in ranges]
        assert await asyncio.gather(*runs) == list(range(2000))

    in_loop(tested, work)


def test_closing_a_channel_drains_it(tested: Backend, fd: int) -> None:
    drop_from_memory(fd)
    ranges = some_ranges(9, 800, 9000)

    async def work(channel: Channel) -> None:
        reads = [channel.read(fd, *r) for r in ranges]
        await asyncio.sleep(0)
        reads += [channel.read(fd, *r) for r in ranges]
        channel.close()
        assert await asyncio.gather(*reads) == [part(*r) for r in ranges] * 2

    in_loop(tested, work)


def test_several_loops_at_once(tested: Backend, fd: int) -> None:
    wrong: list[object] = []

    def one(seed: int) -> None:
        ranges = some_ranges(seed, 300, 5000)

        async def work(channel: Channel) -> Any:
            return await asyncio.gather(*(channel.read(fd, *r) for r in ranges))

        try:
            if in_loop(tested, work) != [part(*r) for r in ranges]:
                wrong.append(seed)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- the backend itself -------------------------------------------------------------------------


def test_close_waits_and_is_idempotent(tested: Backend, fd: int) -> None:
    ran: list[int] = []

    def slowly(i: int) -> None:
        time.sleep(0.005)
        ran.append(i)

    async def main() -> list[bytes]:
        channel = tested.channel(asyncio.get_running_loop())
        futures = [channel.run(slowly, i) for i in range(50)]
        reads = [channel.read(fd, *r) for r in some_ranges(10, 100, 5000)]
        await asyncio.sleep(0)
        tested.close()
        assert sorted(ran) == list(range(50))
        await asyncio.gather(*futures)
        found = await asyncio.gather(*reads)
        channel.close()
        return list(found)

    assert asyncio.run(main()) == [part(*r) for r in some_ranges(10, 100, 5000)]
    tested.close()
    tested.close()


@pytest.mark.parametrize("used", [False, True])
def test_after_a_fork_the_child_works_on_its_own(tested: Backend, fd: int, used: bool) -> None:
    ranges = some_ranges(11, 200, 5000)
    expected = [part(*r) for r in ranges]

    async def work(channel: Channel) -> Any:
        assert await channel.run(abs, -1) == 1
        return await asyncio.gather(*(channel.read(fd, *r) for r in ranges))

    if used:
        assert tested.read_many([(fd, *r) for r in ranges]) == expected
        assert in_loop(tested, work) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded": that is the point
        child = os.fork()
    if not child:
        code = 1
        try:
            tested.after_fork()
            assert tested.read_many([(fd, *r) for r in ranges]) == expected
            assert in_loop(tested, work) == expected
            assert tested.read(fd, 3 * MIB, 0) == part(3 * MIB, 0)
            tested.close()
            code = 0
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    assert tested.read_many([(fd, *r) for r in ranges]) == expected
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert in_loop(tested, work) == expected


def test_stats_are_plain(tested: Backend, fd: int) -> None:
    def look() -> dict[str, Any]:
        stats = tested.stats()
        assert type(stats) is dict
        assert all(type(name) is str for name in stats)
        assert all(type(value) in (int, float, str, bool) for value in stats.values()), stats
        assert json.loads(json.dumps(stats)) == pickle.loads(pickle.dumps(stats)) == stats
        return stats

    before = look()
    tested.read_many([(fd, 4096, 4096 * i) for i in range(50)])

    async def work(channel: Channel) -> None:
        await asyncio.gather(*(channel.read(fd, 100, i) for i in range(50)))
        await channel.run(abs, 1)

    in_loop(tested, work)
    assert set(before) <= set(look())  # names of rings and buffers come as they are made


def test_descriptors_are_given_back(tested: Backend, fd: int) -> None:
    async def work(channel: Channel) -> Any:
        return await asyncio.gather(*(channel.read(fd, 100, i) for i in range(50)))

    def once() -> None:
        in_loop(tested, work)
        tested.read_many([(fd, 100, i) for i in range(50)])

    once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        once()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    "kind", ["open", "read", "write", "sync", "truncate", "allocate", "unlink", "replace", "close_file"]
)
def test_the_faulty_backend_fails_when_it_is_told_to(tmp_path: Path, kind: str) -> None:
    backend = FaultyBackend(plan=[Fault(kind, first=2, error=errno.EIO, times=2)])
    path, other = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes = []
    for _ in range(4):
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        calls: dict[str, Callable[[], object]] = {
            "open": lambda: os.close(backend.open(path, os.O_RDONLY)),
            "read": lambda fd=fd: backend.read(fd, 1, 0),
            "write": lambda fd=fd: backend.write(fd, [b"x"], 0),
            "sync": lambda fd=fd: backend.sync(fd),
            "truncate": lambda fd=fd: backend.truncate(fd, 0),
            "allocate": lambda fd=fd: backend.allocate(fd, 0, 10),
            "unlink": lambda: backend.unlink(path),
            "replace": lambda: backend.replace(path, other),
            "close_file": lambda: backend.close_file(backend.open(path, os.O_RDONLY)),
        }
        before = len(os.listdir("/proc/self/fd"))
        try:
            calls[kind]()
            outcomes.append(None)
        except OSError as error:
            outcomes.append(error.errno)
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(fd)
    assert outcomes == [None, errno.EIO, errno.EIO, None]


CREATE = os.O_RDWR | os.O_CREAT


def test_an_error_of_closing_does_not_hide_another(tmp_path: Path) -> None:
    """The first error is told; alone, that of closing is, but not where it says nothing."""
    backend = FaultyBackend(plan=[Fault("close_file", times=ALWAYS, error=errno.ENOSPC)])
    path = str(tmp_path / "a")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as raised, backend.opened(path, CREATE) as fd:
        backend.write(fd, [b"x"], 0)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as raised, backend.opened(path, CREATE):
        raise OSError(errno.EIO, "first")
    assert raised.value.errno == errno.EIO
    with backend.reading(path) as fd:
        assert backend.read(fd, 2, 0) == b"x"
    with pytest.raises(KeyError, match="first"), backend.reading(path):
        raise KeyError("first")
    backend.let_go(backend.open(path, CREATE))
    assert len(os.listdir("/proc/self/fd")) == before
    assert backend.calls["close_file"] == 5 and backend.closed_twice == []


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_in_a_cycle_is_collected(name: str) -> None:
    """CPython 3.11 crashed here: it must not find a `from_buffer` of a memoryview in the cycle."""
    run_python(
        """
import asyncio, gc, os, sys
from yatagarasu_cache.backends import choose
from yatagarasu_cache.config import make_settings
fd = os.open(sys.executable, os.O_RDONLY)
gc.disable()
for closes in (True, False) * 4:
    backend = choose(make_settings("/unused", backend=sys.argv[1])).backend
    found = backend.read_many([(fd, 4096, i) for i in range(20)] + [(9999, 10, 0)] * 9 + [(fd, 3 << 20, 5)])
    cycle = [backend, *vars(backend).values()]
    cycle += [vars(part) for part in cycle if hasattr(part, "__dict__")]
    lender = getattr(backend, "_lender", None)
    cycle += list(lender._idle) if lender else []
    for part in cycle:
        if hasattr(part, "__dict__"):
            part.__dict__["cycle"] = cycle
    if closes:
        backend.close()
    del backend, cycle, found, lender, part
    assert gc.collect() > 0
""",
        name,
    )
