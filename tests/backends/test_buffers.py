"""Buffer pools: bounded, wiped, counted, and never the same memory for two holders."""

from __future__ import annotations

import gc
import mmap
import os
import random
import sys
import threading

import pytest

from yatagarasu_cache.backends.buffers import Buffer, BufferPool, LockedMemory


@pytest.fixture(params=[1, 100, 4096, 5000, 65536])
def pool(request: pytest.FixtureRequest) -> BufferPool:
    return BufferPool(request.param, 4)


def test_a_buffer_has_the_size_that_was_asked_for(pool: BufferPool) -> None:
    buffer = pool.acquire()
    assert len(buffer) == len(buffer.view) == pool.buffer_size
    assert not any(buffer.view)
    buffer.view[:] = b"x" * pool.buffer_size
    pool.release(buffer)


def test_memory_is_used_again(pool: BufferPool) -> None:
    first = pool.acquire()
    pool.release(first)
    assert pool.acquire() is first
    assert pool.stats() == (1, 1, 1, 1)


def test_figures(pool: BufferPool) -> None:
    buffers = [pool.acquire() for _ in range(6)]
    assert pool.stats()._asdict() == {"hits": 0, "misses": 6, "allocations": 6, "in_use": 6}
    assert pool.in_use == 6
    for buffer in buffers:
        pool.release(buffer)
    assert pool.stats() == (0, 6, 6, 0)
    again = [pool.acquire() for _ in range(6)]
    assert pool.stats() == (4, 8, 8, 6)
    assert len({id(buffer) for buffer in again} & {id(buffer) for buffer in buffers}) == 4


def test_the_surplus_is_not_kept(pool: BufferPool) -> None:
    for _ in range(3):
        for buffer in [pool.acquire() for _ in range(20)]:
            pool.release(buffer)
        assert len(pool._free) == 4


@pytest.mark.parametrize("capacity", [1, 4])
def test_wiped_on_return(capacity: int) -> None:
    """Whatever a holder left, and whether the buffer is kept or not."""
    pool = BufferPool(4096, capacity)
    buffers = [pool.acquire() for _ in range(3)]
    views = [buffer.view for buffer in buffers]
    for buffer in buffers:
        buffer.view[:] = os.urandom(4096)
    for buffer in buffers:
        pool.release(buffer)
    assert not any(any(view) for view in views)
    assert not any(any(pool.acquire().view) for _ in range(6))


@pytest.mark.parametrize("used", [0, 1, 100, 2047, 2048, 2049, 4095, 4096])
def test_wiped_as_far_as_used(used: int) -> None:
    pool = BufferPool(4096, 1)
    buffer = pool.acquire()
    buffer.view[:used] = b"\xff" * used
    pool.release(buffer, used)
    assert not any(pool.acquire().view)


def test_no_two_buffers_overlap(pool: BufferPool) -> None:
    buffers = [pool.acquire() for _ in range(9)]
    for i, buffer in enumerate(buffers):
        buffer.view[:] = bytes([i + 1]) * pool.buffer_size
    for i, buffer in enumerate(buffers):
        assert bytes(buffer.view) == bytes([i + 1]) * pool.buffer_size


def test_addresses_are_aligned_and_apart() -> None:
    located: list[mmap.mmap] = []

    def locate(memory: mmap.mmap) -> int:
        located.append(memory)
        return 1 << 20 if len(located) == 1 else 1 << 30

    pool = BufferPool(5000, 3, locate)
    pages = -(-5000 // mmap.PAGESIZE) * mmap.PAGESIZE
    assert pool.total_bytes == 3 * pages
    addresses = [pool.acquire().address for _ in range(4)]
    assert addresses == [(1 << 20) + i * pages for i in range(3)] + [1 << 30]
    assert pool.address == 1 << 20


def test_releasing_twice_is_an_error(pool: BufferPool) -> None:
    buffer = pool.acquire()
    pool.release(buffer)
    with pytest.raises(ValueError, match="released before"):
        pool.release(buffer)
    assert pool.stats().in_use == 0


def test_releasing_to_another_pool_is_an_error() -> None:
    buffer = BufferPool(100, 1).acquire()
    with pytest.raises(ValueError, match="not of this pool"):
        BufferPool(200, 1).release(buffer)


@pytest.mark.parametrize(("size", "capacity"), [(0, 1), (-1, 1), (1, 0), (1, -4)])
def test_senseless_pools(size: int, capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BufferPool(size, capacity)


def test_close_leaves_what_is_in_use(pool: BufferPool) -> None:
    kept, used = pool.acquire(), pool.acquire()
    pool.release(kept)
    used.view[:] = b"u" * pool.buffer_size
    pool.close()
    pool.close()
    gc.collect()
    assert bytes(used.view) == b"u" * pool.buffer_size
    pool.release(used)
    assert pool._free == []
    late = pool.acquire()  # works, and is not kept
    pool.release(late)
    assert pool.stats().in_use == 0


def test_many_threads() -> None:
    """No buffer ever has two holders, and the figures add up."""
    pool = BufferPool(512, 8)
    errors: list[str] = []

    def work(mark: int) -> None:
        rng = random.Random(mark)
        held: list[Buffer] = []
        for _ in range(2000):
            if held and rng.random() < 0.5:
                buffer = held.pop()
                if bytes(buffer.view) != bytes([mark]) * 512:
                    errors.append("written to by another holder")
                pool.release(buffer)
            else:
                buffer = pool.acquire()
                if any(buffer.view):
                    errors.append("not wiped")
                buffer.view[:] = bytes([mark]) * 512
                held.append(buffer)
        for buffer in held:
            pool.release(buffer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    stats = pool.stats()
    assert errors == []
    assert stats.in_use == 0
    assert stats.misses == stats.allocations
    assert len(pool._free) == len({id(buffer.view) for buffer in pool._free}) <= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_copy() -> None:
    pool = BufferPool(4096, 2)
    buffer = pool.acquire()
    buffer.view[:] = b"p" * 4096
    child = os.fork()
    if child == 0:
        buffer.view[:] = b"c" * 4096
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(buffer.view) == b"p" * 4096


def test_garbage_collection_of_a_cycle() -> None:
    """Whatever order it takes things apart in."""

    class Holder:
        pass

    for _ in range(20):
        holder = Holder()
        pool = BufferPool(4096, 4)
        holder.contents = (pool, [pool.acquire() for _ in range(6)], holder)  # type: ignore[attr-defined]
        del holder, pool
        gc.collect()


def test_locked_memory() -> None:
    locked = LockedMemory(100)
    one = locked.take(60)
    assert locked.take(41) is None
    assert locked.used == 60
    two = locked.take(40)
    assert (one and one.size, two and two.size) == (60, 40)
    del one  # counts as long as it lives
    assert locked.used == 40
    assert locked.take(60)  # and is let go of by who does not keep it
    assert locked.used == 40
    locked.after_fork()
    assert locked.used == 0
