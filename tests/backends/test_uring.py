"""The io_uring backend: batches, long reads, settings, figures, what injected failures do to them.

That it keeps the contract of all backends is tested with the others; caches on it, loops, and what becomes
of memory and rings at the end in `test_uring_*.py`.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import uring_bed
from available import needs_nowait
from uring_bed import (
    SIZE,
    TRIED,
    Make,
    assert_balanced,
    cool,
    only_ring,
    some,
    truth,
    with_injection,
)

from yatagarasu_cache.backends import ring as ring_module
from yatagarasu_cache.backends import ring_batches, uring
from yatagarasu_cache.backends.ring import Ring, lib
from yatagarasu_cache.backends.uring import UringBackend

pytestmark = pytest.mark.compiled

make, path, fd, long_reads = uring_bed.make, uring_bed.path, uring_bed.fd, uring_bed.long_reads  # fixtures


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


def test_read_nowait_of_a_closed_descriptor(make: Make) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        make().read_nowait(1 << 20, 10, 0)


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
def test_long_read_of_what_is_in_memory_is_a_plain_one(make: Make, fd: int, path: Path) -> None:
    needs_nowait(path.parent)
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
    with pytest.raises(KeyboardInterrupt):
        for _ in range(50):  # pages that another processor is just busy with stay in memory
            cool(fd)
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


# -- figures --------- --------------------------------------------------------------------------------


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
    assert kernel_workers(tmp_path, max_workers=1)[0] <= 4  # one of each kind for each of two threads
    if not any(kernel_workers(tmp_path)[0] > 4 for _ in range(5)):
        pytest.skip("syncs are over too soon here to need more workers")


def test_workers_stay_on_their_cpus(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("there is but one CPU to run on")
    for cpu in allowed[:2]:
        assert kernel_workers(tmp_path, cpu_affinity=[cpu])[1] == [str(cpu)]
    assert kernel_workers(tmp_path)[1] not in ([str(cpu)] for cpu in allowed)
