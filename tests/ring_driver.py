"""The compiled ring module with Python's arrays, and what its tests read and write.

Importing this skips the module that does so where the module is not built or the kernel refuses
rings, unless YATAGARASU_IO_URING=require is set: then that is a failure.
"""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import descriptors

PAGE = 4096

REQUIRED = os.environ.get("YATAGARASU_IO_URING", "").strip().lower() == "require"
try:
    from yatagarasu_cache._ring import ffi, lib
except ImportError as error:
    if REQUIRED:
        raise
    pytest.skip(f"the compiled module is not there: {error}", allow_module_level=True)


def address(buffer: Any) -> int:
    """Where a buffer is; the caller keeps it alive."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def name_of(result: int) -> str:
    return errno.errorcode.get(-result, str(result))


class Read(NamedTuple):
    """One read, as a row of the columns."""

    fd: int
    memory: int
    length: int
    offset: int = 0
    number: int = 0
    flags: int = 0
    buffer: int = 0


class Ring:
    """The C interface with Python's arrays; nothing is hidden."""

    def __init__(self, depth: int = 32, max_inflight: int | None = None, flags: int = lib.YR_ONE_THREAD) -> None:
        holder = ffi.new("struct yr_ring **")
        result = lib.yr_create(holder, depth, 2 * depth if max_inflight is None else max_inflight, flags)
        if result != 0:
            raise OSError(-result, os.strerror(-result))
        self.c = holder[0]

    def info(self) -> Any:
        info = ffi.new("struct yr_info *")
        assert lib.yr_info(self.c, info) == 0
        return info

    def queue(self, *reads: Read) -> int:
        columns = map(list, zip(*reads, strict=True))
        return int(lib.yr_queue_reads(self.c, len(reads), *columns))

    def wait(self, count: int = 1, timeout: float = 10.0) -> int:
        return int(lib.yr_wait(self.c, count, int(timeout * 1e9)))

    def reap(self, most: int = 4096) -> list[tuple[int, int]]:
        """(number, result) of what is complete."""
        numbers = ffi.new("uint64_t[]", most)
        results = ffi.new("int32_t[]", most)
        found = lib.yr_reap(self.c, most, numbers, results)
        assert found >= 0, name_of(found)
        return [(numbers[i], results[i]) for i in range(found)]

    def turn(self) -> list[tuple[int, int]]:
        """Submit, and take what is complete."""
        result = lib.yr_submit(self.c)
        assert result >= 0 or result == -errno.EAGAIN, name_of(result)
        return self.reap()

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

    def run(self, *reads: Read) -> list[int]:
        """Queue, wait, and give the results by position (they are numbered)."""
        assert self.queue(*(read._replace(number=i) for i, read in enumerate(reads))) == len(reads)
        done = self.finish()
        return [done[i] for i in range(len(reads))]

    def read_batch(self, requests: list[tuple[int, int, int]]) -> tuple[list[int], list[bytes]]:
        """[(fd, length, offset)] -> (results, memory)."""
        memory = [bytearray(b"\xaa" * max(1, length)) for _, length, _ in requests]
        results = self._transfer(lib.yr_read_batch, requests, memory)
        return results, [bytes(buffer) for buffer in memory]

    def write_batch(self, requests: list[tuple[int, bytes, int]]) -> list[int]:
        """[(fd, data, offset)] -> results."""
        data = [data for _, data, _ in requests]
        return self._transfer(lib.yr_write_batch, [(fd, len(one), at) for fd, one, at in requests], data)

    def _transfer(
        self, batch: Callable[..., int], requests: list[tuple[int, int, int]], memory: list[Any]
    ) -> list[int]:
        results = ffi.new("int64_t[]", max(1, len(requests)))
        code = batch(
            self.c,
            len(requests),
            [fd for fd, _, _ in requests],
            [address(buffer) if len(buffer) else 0 for buffer in memory],
            [length for _, length, _ in requests],
            [offset for _, _, offset in requests],
            results,
            -1,
        )
        assert code == 0, name_of(code)
        assert self.info().inflight == 0
        return list(results)[: len(requests)]

    def sync_batch(self, fds: list[int]) -> list[int]:
        results = ffi.new("int64_t[]", max(1, len(fds)))
        code = lib.yr_sync_batch(self.c, len(fds), fds, results)
        assert code == 0, name_of(code)
        assert self.info().inflight == 0
        return list(results)[: len(fds)]

    def inject(self, op: int, result: int, skip: int = 0, count: int = 1, instead: bool = False) -> None:
        assert lib.yr_inject(self.c, op, skip, count, result, instead) == 0

    def close(self, force: bool = False) -> int:
        result = int(lib.yr_destroy(self.c, force))
        if result == 0:
            self.c = ffi.NULL
        return result


try:
    Ring(4).close()
except OSError as error:
    if REQUIRED:
        raise
    pytest.skip(f"the kernel refuses rings: {error}", allow_module_level=True)


def polled(depth: int, max_inflight: int) -> Ring:
    """A ring that a thread of the kernel polls; skips where there is none."""
    try:
        return Ring(depth, max_inflight, lib.YR_SQPOLL)
    except OSError as error:
        pytest.skip(f"no SQPOLL here: {error}")


def in_child(function: Callable[[], int]) -> int:
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


# -- fixtures ---------------------------------------------------------------------------------


@pytest.fixture
def ring() -> Iterator[Ring]:
    before = descriptors()
    made = Ring()
    yield made
    made.finish()
    assert made.close() == 0
    assert descriptors() == before


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
