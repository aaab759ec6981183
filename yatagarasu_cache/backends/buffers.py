"""Pools of page-aligned buffers of one size, for memory that the kernel reads into.

A pool's buffers lie in one piece of memory, so that registering a whole pool takes one entry.
The piece is reserved at once and used page by page as buffers are first taken; it never moves
and is freed when the pool is closed and the last buffer of it has been given back.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import NamedTuple

from ..concurrency.locks import new_lock

__all__ = ["Buffer", "BufferPool", "LockedMemory", "Pinned", "PoolStats"]


class PoolStats(NamedTuple):
    """What a pool has done: `hits` took a buffer that was used before, `misses` a new one."""

    hits: int
    misses: int
    allocations: int  # buffers made, kept and surplus ones
    in_use: int


class Buffer:
    """Memory that is its holder's alone until it is released. All zeros when acquired."""

    __slots__ = ("address", "free", "pooled", "view")

    def __init__(self, view: memoryview, address: int, pooled: bool) -> None:
        self.view = view
        self.address = address  # 0 if the pool was not told how to find it
        self.pooled = pooled
        self.free = False

    def __len__(self) -> int:
        return len(self.view)


class BufferPool:
    """At most `capacity` buffers of `buffer_size` bytes are kept; safe to share among threads.

    More than `capacity` can be in use at once: the surplus is freed when it is released.
    `locate` gives the address of memory; without it `Buffer.address` is 0.
    """

    def __init__(
        self, buffer_size: int, capacity: int, locate: Callable[[mmap.mmap], int] | None = None
    ) -> None:
        if buffer_size < 1 or capacity < 1:
            raise ValueError("a pool needs a buffer size and a capacity of at least 1")
        self.buffer_size = buffer_size
        self.capacity = capacity
        self._stride = -(-buffer_size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._locate = locate
        self._zeros = bytes(buffer_size)
        self._lock = new_lock()
        self._free: list[Buffer] = []
        self._made = 0
        self._hits = self._misses = self._allocations = self._in_use = 0
        self._closed = False
        memory = _memory(self._stride * capacity)
        self.address = locate(memory) if locate else 0
        self._memory: memoryview | None = memoryview(memory)

    @property
    def in_use(self) -> int:
        return self._in_use

    @property
    def view(self) -> memoryview:
        """The whole piece of memory, for a caller who holds no buffer and knows that nobody does."""
        assert self._memory is not None
        return self._memory

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole piece of memory, which begins at `address`."""
        return self._stride * self.capacity

    @property
    def stride(self) -> int:
        """Bytes from one buffer to the next."""
        return self._stride

    def lent(self, begun: int, in_use: int) -> None:
        """Count for a caller who holds and wipes all buffers: `begun` were taken, `in_use` are in use."""
        with self._lock:
            new = min(begun, max(0, self.capacity - self._made))
            self._made += new
            self._misses += new
            self._allocations += new
            self._hits += begun - new
            self._in_use = in_use

    def acquire(self) -> Buffer:
        """A buffer full of zeros. Never waits."""
        with self._lock:
            self._in_use += 1
            if self._free:
                self._hits += 1
                buffer = self._free.pop()
                buffer.free = False
                return buffer
            self._misses += 1
            self._allocations += 1
            if self._memory is not None and self._made < self.capacity:
                start = self._made * self._stride
                self._made += 1
                view = self._memory[start : start + self.buffer_size]
                return Buffer(view, self.address and self.address + start, True)
        memory = _memory(self._stride)
        address = self._locate(memory) if self._locate else 0
        return Buffer(memoryview(memory)[: self.buffer_size], address, False)

    def release(self, buffer: Buffer, used: int | None = None) -> None:
        """Wipe `buffer` and take it back. Its holder must not touch it any more.

        With `used`, only so many bytes at its beginning were written to.
        """
        if buffer.free or len(buffer.view) != self.buffer_size:
            raise ValueError("the buffer was released before, or is not of this pool")
        if used is None or used * 2 > self.buffer_size:
            buffer.view[:] = self._zeros
        else:
            buffer.view[:used] = bytes(used)
        with self._lock:
            buffer.free = True
            self._in_use -= 1
            if buffer.pooled and not self._closed:
                self._free.append(buffer)

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(self._hits, self._misses, self._allocations, self._in_use)

    def close(self) -> None:
        """Let the memory go; what is in use stays until its holders let go of it. Idempotent."""
        with self._lock:
            self._closed = True
            self._free.clear()
            self._memory = None


def _memory(size: int) -> mmap.mmap:
    """Zeroed pages that a forked child gets a copy of, instead of sharing them with us."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class Pinned:
    """Memory that one ring has pinned. It counts as long as this lives."""

    __slots__ = ("__weakref__", "size")

    def __init__(self, size: int) -> None:
        self.size = size


class LockedMemory:
    """How much memory this process may pin for its rings, counted over all of them.

    The limit of the system (RLIMIT_MEMLOCK, often 8 MiB) counts for all processes of a user, so
    one process takes only a part of it. Living `Pinned` objects are summed up, instead of having each
    give back what it took: so no interruption or exception in a destructor can leave anything counted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: tuple[weakref.ref[Pinned], ...] = ()
        self._lock = new_lock()

    @property
    def used(self) -> int:
        return sum(pinned.size for pinned in self._living())

    def _living(self) -> list[Pinned]:
        return [pinned for taken in self._taken if (pinned := taken()) is not None]

    def take(self, size: int) -> Pinned | None:
        """Count `size` bytes as pinned for as long as what is returned lives; None if that is too much."""
        with self._lock:
            living = self._living()
            if sum(pinned.size for pinned in living) + size > self.limit:
                return None
            living.append(Pinned(size))
            self._taken = tuple(map(weakref.ref, living))
            return living[-1]

    def after_fork(self) -> None:
        """A child has pinned nothing yet."""
        self._lock = new_lock()
        self._taken = ()
