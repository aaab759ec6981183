"""`Reads`, in Python and compiled: what it hands to a ring, and what becomes of completions."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from yatagarasu_cache.store import compiled

pytest.importorskip("yatagarasu_cache._ring", reason="the ring is not built here")

from yatagarasu_cache.backends import reads as reads_module

pytestmark = pytest.mark.compiled

SLOTS, STRIDE = 8, 4096
FLAGS = 5
COLUMNS = (
    ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint8,
    ctypes.c_uint16,
)  # fmt: skip
MODULE = compiled.load()
KINDS = ["python"] if MODULE is None else ["python", "c"]


class Kernel:
    """What a ring would do: takes the columns, and answers as it is told."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.reads = make()
        self.memory = (ctypes.c_char * (SLOTS * STRIDE))()
        self.equip()

    def equip(self) -> None:
        addresses = self.reads.equip(ctypes.addressof(self.memory), STRIDE, SLOTS, FLAGS)
        self.columns = [
            (kind * SLOTS).from_address(address) for kind, address in zip(COLUMNS, addresses, strict=True)
        ]

    def stage(self, most: int = SLOTS) -> list[tuple[int, ...]]:
        """(file, address, length, offset, number, flags, table) of each read that begins."""
        return [tuple(column[row] for column in self.columns) for row in range(self.reads.stage(most))]

    def fill(self, row: tuple[int, ...], data: bytes) -> None:
        ctypes.memmove(row[1], data, len(data))

    def complete(self, *pairs: tuple[int, int], wanted: bool = True) -> list[tuple[Any, ...]]:
        """(number, result) of each completion."""
        numbers = (ctypes.c_uint64 * len(pairs))(*(number for number, _ in pairs))
        results = (ctypes.c_int32 * len(pairs))(*(result for _, result in pairs))
        others: list[tuple[Any, ...]] = self.reads.complete(
            ctypes.addressof(numbers), ctypes.addressof(results), len(pairs), wanted
        )
        return others


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return reads_module.Reads if request.param == "python" else MODULE.Reads  # type: ignore[union-attr]


@pytest.fixture
def kernel(make: Callable[[], Any]) -> Kernel:
    return Kernel(make)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_from_asking_to_the_result(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    futures = [loop.create_future() for _ in range(3)]
    for n, future in enumerate(futures):
        assert kernel.reads.add(future, 10 + n, 100 * n + 1, (1 << 40) + n) == n + 1
    assert (kernel.reads.waiting, kernel.reads.running) == (3, 0)
    rows = kernel.stage()
    assert (kernel.reads.waiting, kernel.reads.running) == (0, 3)
    assert [row[:1] + row[2:4] for row in rows] == [(10 + n, 100 * n + 1, (1 << 40) + n) for n in range(3)]
    assert {row[5:] for row in rows} == {(FLAGS, 0)}
    start = ctypes.addressof(kernel.memory)
    assert len({row[1] for row in rows} & set(range(start, start + SLOTS * STRIDE, STRIDE))) == 3
    for n, row in enumerate(rows):
        kernel.fill(row, bytes([n + 1]) * row[2])
    assert kernel.complete(*[(row[4], row[2]) for row in reversed(rows)]) == []
    assert [future.result() for future in futures] == [bytes([n + 1]) * (100 * n + 1) for n in range(3)]
    assert kernel.reads.running == 0
    assert not any(kernel.memory.raw)  # wiped


def test_only_as_many_as_there_are_slots(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    futures = [loop.create_future() for _ in range(3 * SLOTS)]
    for n, future in enumerate(futures):
        kernel.reads.add(future, n, 1, 0)
    assert [row[0] for row in kernel.stage(3)] == [0, 1, 2]
    later = kernel.stage(100)
    assert [row[0] for row in later] == list(range(3, SLOTS))
    assert kernel.stage() == []
    kernel.complete((later[0][4], 1))
    assert [row[0] for row in kernel.stage()] == [SLOTS]
    assert (kernel.reads.waiting, kernel.reads.running) == (2 * SLOTS - 1, SLOTS)


def test_cancelled_before_and_after_they_began(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    early, late, other = (loop.create_future() for _ in range(3))
    for n, future in enumerate((early, late, other)):
        kernel.reads.add(future, n, 4, 0)
    early.cancel()
    rows = kernel.stage()
    assert [row[0] for row in rows] == [1, 2]
    late.cancel()
    assert kernel.reads.running == 2  # its memory is the kernel's all the same
    kernel.fill(rows[0], b"late")
    kernel.fill(rows[1], b"told")
    assert kernel.complete(*[(row[4], 4) for row in rows]) == []
    assert late.cancelled() and other.result() == b"told"
    assert not any(kernel.memory.raw)


@pytest.mark.parametrize("queued", range(5))
def test_those_that_were_not_queued_wait_again(
    kernel: Kernel, loop: asyncio.AbstractEventLoop, queued: int
) -> None:
    for n in range(6):
        kernel.reads.add(loop.create_future(), n, 1, 0)
    assert len(kernel.stage(4)) == 4
    kernel.reads.unstage(queued)
    assert (kernel.reads.waiting, kernel.reads.running) == (6 - min(queued, 4), min(queued, 4))
    assert [row[0] for row in kernel.stage()] == list(range(min(queued, 4), 6))


@pytest.mark.parametrize("result", [-5, -11, 0, 1, 99])
def test_what_is_not_whole_is_handed_back(
    kernel: Kernel, loop: asyncio.AbstractEventLoop, result: int
) -> None:
    future = loop.create_future()
    kernel.reads.add(future, 7, 100, 12345)
    (row,) = kernel.stage()
    kernel.fill(row, b"x" * max(result, 0))
    assert kernel.complete((row[4], result)) == [(result, future, 7, 100, 12345)]
    assert not future.done()
    assert kernel.reads.running == 0
    assert not any(kernel.memory.raw)


def test_completions_of_others(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    future = loop.create_future()
    kernel.reads.add(future, 7, 2, 0)
    (row,) = kernel.stage()
    kernel.fill(row, b"ab")
    found = kernel.complete((0, 4096), (row[4], 2), ((1 << 63) - 1, -5), (row[4], 2))  # the last: twice
    assert found == [(4096, 0), (-5, (1 << 63) - 1)]
    assert future.result() == b"ab"


def test_results_that_nobody_can_take(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    future = loop.create_future()
    kernel.reads.add(future, 7, 2, 0)
    (row,) = kernel.stage()
    assert kernel.complete((row[4], 2), wanted=False) == []
    assert not future.done() and kernel.reads.running == 0


def test_taking_all_and_beginning_anew(kernel: Kernel, loop: asyncio.AbstractEventLoop) -> None:
    futures = [loop.create_future() for _ in range(SLOTS + 2)]
    for n, future in enumerate(futures):
        kernel.reads.add(future, n, n + 1, 2 * n)
    rows = kernel.stage()
    with pytest.raises(RuntimeError):
        kernel.equip()
    taken = kernel.reads.take_all()
    assert sorted(taken[:SLOTS], key=lambda read: read[1]) == [
        (futures[n], n, n + 1, 2 * n) for n in range(SLOTS)
    ]
    assert taken[SLOTS:] == [(futures[n], n, n + 1, 2 * n) for n in (SLOTS, SLOTS + 1)]
    assert (kernel.reads.waiting, kernel.reads.running) == (0, 0)
    assert kernel.stage() == []  # no memory
    assert kernel.complete((rows[0][4], rows[0][2])) == []
    kernel.equip()
    kernel.reads.add(futures[0], 1, 1, 1)
    assert len(kernel.stage()) == 1


@pytest.mark.parametrize("arguments", [(), (None, 1, 2), (None, 1, 2, 3, 4)])
def test_bad_arguments(make: Callable[[], Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        make().add(*arguments)


def test_futures_are_let_go_of(make: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
    """After the result, and when it is collected itself, also where it is part of a cycle."""

    class Future(asyncio.Future[bytes]):
        pass

    kernel = Kernel(make)
    done, under_way, waiting = Future(loop=loop), Future(loop=loop), Future(loop=loop)
    seen = [weakref.ref(future) for future in (done, under_way, waiting)]
    kernel.reads.add(done, 1, 1, 0)
    (row,) = kernel.stage()
    kernel.complete((row[4], 1))
    kernel.reads.add(under_way, 1, 1, 0)
    kernel.stage()
    kernel.reads.add(waiting, 1, 1, 0)
    under_way.reads = waiting.reads = kernel.reads  # type: ignore[attr-defined]
    del done
    assert [future() is None for future in seen] == [True, False, False]
    del under_way, waiting, kernel
    gc.collect()
    assert [future() for future in seen] == [None, None, None]


@pytest.mark.parametrize("seed", range(5))
def test_at_random(make: Callable[[], Any], loop: asyncio.AbstractEventLoop, seed: int) -> None:
    """Against a model: every future gets its own bytes, or is handed back, and none is lost."""
    chosen, kernel = random.Random(seed), Kernel(make)
    given: dict[asyncio.Future[bytes], bytes] = {}
    under_way: list[tuple[int, ...]] = []
    fate: dict[int, asyncio.Future[bytes]] = {}
    handed_back: set[asyncio.Future[bytes]] = set()
    for n in range(3000):
        match chosen.randrange(4):
            case 0 | 1:
                future = loop.create_future()
                given[future] = chosen.randbytes(chosen.randrange(1, 50))
                fate[n] = future
                kernel.reads.add(future, 3, len(given[future]), n)
            case 2:
                rows = kernel.stage(chosen.randrange(1, 5))
                queued = chosen.randrange(len(rows) + 1)
                kernel.reads.unstage(queued)
                under_way += rows[:queued]
            case _:
                chosen.shuffle(under_way)
                ended, under_way = under_way[:3], under_way[3:]
                results = []
                for row in ended:
                    kernel.fill(row, given[fate[row[3]]])
                    results.append((row[4], row[2] if chosen.random() < 0.8 else -5))
                    if chosen.random() < 0.1:
                        fate[row[3]].cancel()
                handed_back |= {other[1] for other in kernel.complete(*results)}
    left = {read[0] for read in kernel.reads.take_all()}
    for future, data in given.items():
        told = future.done() and not future.cancelled()
        assert told + (future in handed_back or future.cancelled()) + (future in left) == 1
        assert not told or future.result() == data
