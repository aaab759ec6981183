"""The short reads of an event loop, from being asked for until their completion was taken.

`Reads` never touches a ring. It keeps the reads that wait, gives those that begin a slot of
memory, writes them down in the columns that `yr_queue_reads` takes, and turns completions into
results. A slot belongs to the kernel from the moment its read was queued until its completion was
taken, whatever becomes of the future meanwhile; it is wiped before it is used again.

This is the specification of the compiled `Reads` (`csrc/reads.c`), which serves where it was built.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ..store import compiled
from .ring import address_of, ffi

if TYPE_CHECKING:
    import asyncio

__all__ = ["Reads", "make_reads"]

OURS = 1 << 63  # set in the numbers of these reads only


class _Request(NamedTuple):
    future: asyncio.Future[bytes]
    fd: int
    length: int
    offset: int


class Reads:
    """One thread uses it: that of the loop."""

    def __init__(self) -> None:
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}  # by slot
        self._free: list[int] = []
        self._staged: list[int] = []
        self._stride = 0
        self._memory = memoryview(b"")
        self._columns: tuple[array[int], ...] = ()

    @property
    def running(self) -> int:
        """How many the kernel has."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many have not begun."""
        return len(self._waiting)

    def equip(self, address: int, stride: int, count: int, flags: int) -> tuple[int, ...]:
        """Give it memory for so many reads at once.

        The addresses of the columns: files, addresses, lengths, offsets, numbers, flags, tables.
        """
        if self._running:
            raise RuntimeError("reads are under way")
        self._stride = stride
        self._memory = memoryview(ffi.buffer(ffi.cast("char *", address), stride * count))
        self._free = list(range(count - 1, -1, -1))
        self._columns = (
            array("i", [0]) * count, array("Q", range(address, address + stride * count, stride)),
            array("I", [0]) * count, array("Q", [0]) * count, array("Q", [0]) * count,
            array("B", [flags]) * count, array("H", [0]) * count,
        )  # fmt: skip
        self._address = address
        return tuple(map(address_of, self._columns))

    def add(self, future: asyncio.Future[bytes], fd: int, length: int, offset: int) -> int:
        """Add a read that waits. Returns how many wait."""
        self._waiting.append(_Request(future, fd, length, offset))
        return len(self._waiting)

    def stage(self, most: int) -> int:
        """Write the next reads into the columns. Returns how many; cancelled ones are dropped."""
        self._staged.clear()
        if not self._columns:  # no memory yet
            return 0
        files, addresses, lengths, offsets, numbers, _, _ = self._columns
        while self._waiting and self._free and len(self._staged) < most:
            request = self._waiting.popleft()
            if request.future.cancelled():
                continue
            slot, row = self._free.pop(), len(self._staged)
            self._running[slot] = request
            self._staged.append(slot)
            files[row], lengths[row], offsets[row] = request.fd, request.length, request.offset
            addresses[row], numbers[row] = self._address + slot * self._stride, OURS | slot
        return len(self._staged)

    def unstage(self, queued: int) -> None:
        """Only `queued` of them were queued: the others wait again, in their order."""
        while len(self._staged) > queued:
            slot = self._staged.pop()
            self._waiting.appendleft(self._running.pop(slot))
            self._free.append(slot)

    def complete(self, numbers: int, results: int, count: int, wanted: bool) -> list[tuple[Any, ...]]:
        """Take completions from two arrays at these addresses, and set results if still wanted.

        Returns the others: (result, number) of reads that are not of this object, and (result, future,
        fd, length, offset) of those that are not whole.
        """
        others: list[tuple[Any, ...]] = []
        found = zip(
            ffi.unpack(ffi.cast("uint64_t *", numbers), count),
            ffi.unpack(ffi.cast("int32_t *", results), count),
            strict=True,
        )
        for number, result in found:
            if not number & OURS:
                others.append((result, number))
                continue
            request = self._running.pop(number & ~OURS, None)
            if request is None:
                continue
            data = self._empty(number & ~OURS, request.length)
            if result != request.length:
                others.append((result, *request))
            elif wanted and not request.future.done():
                request.future.set_result(data)
        return others

    def _empty(self, slot: int, length: int) -> bytes:
        start = slot * self._stride
        data = self._memory[start : start + length].tobytes()
        self._memory[start : start + length] = bytes(length)
        self._free.append(slot)
        return data

    def take_all(self) -> list[tuple[Any, ...]]:
        """(future, fd, length, offset) of all reads under way, then of those that wait; none are left."""
        taken: list[tuple[Any, ...]] = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._free, self._columns = [], ()
        return taken


def make_reads() -> Any:
    """The compiled `Reads` if there is one and it is wanted, else the one above."""
    module = compiled.load()
    return Reads() if module is None else module.Reads()
