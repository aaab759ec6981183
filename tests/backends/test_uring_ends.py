"""Memory that the kernel fills, and the ends of reads, loops, threads, backends and processes."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import uring_bed
from helpers import descriptors
from uring_bed import (
    SIZE,
    TRIED,
    Make,
    assert_balanced,
    cool,
    in_use,
    pinned_kib,
    resident_kib,
    some,
    start_reads,
    truth,
)

from yatagarasu_cache.backends import ring as ring_module
from yatagarasu_cache.backends.uring import UringBackend
from yatagarasu_cache.config import make_settings

pytestmark = pytest.mark.compiled

make, path, fd, long_reads = uring_bed.make, uring_bed.path, uring_bed.fd, uring_bed.long_reads  # fixtures


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


def test_closing_waits_for_reads_that_were_cancelled(make: Make) -> None:
    """Nobody wants them any more, but the kernel has their memory until they end."""
    before = descriptors()
    backend = make()
    end, other = os.pipe()

    async def main() -> list[asyncio.Future[bytes]]:
        channel = backend.channel(asyncio.get_running_loop())
        reads = [channel.read(end, 10, 0) for _ in range(4)]
        await asyncio.sleep(0)
        assert channel.running == 4
        assert reads[0].cancel() and reads[1].cancel()
        assert in_use(backend) == 4
        threading.Timer(0.2, os.write, (other, b"0123456789" * 4)).start()
        channel.close()
        assert channel.running == 0
        return reads

    reads = asyncio.run(main())
    assert reads[0].cancelled() and reads[1].cancelled()
    assert [read.result() for read in reads[2:]] == [b"0123456789"] * 2
    assert_balanced(backend)
    backend.close()
    os.close(end)
    os.close(other)
    assert descriptors() == before


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


# -- leaks --------------------------------------------------------------------------------


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
