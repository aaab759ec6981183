"""Reads of event loops through rings of their own, and failures of these rings."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import uring_bed
from helpers import descriptors
from uring_bed import (
    SIZE,
    Make,
    assert_balanced,
    cool,
    some,
    truth,
    with_injection,
)

from yatagarasu_cache.backends import ring as ring_module
from yatagarasu_cache.backends import ring_channel
from yatagarasu_cache.backends.ring import Ring, lib

pytestmark = pytest.mark.compiled

make, path, fd = uring_bed.make, uring_bed.path, uring_bed.fd  # fixtures


# -- event loops: reading -----------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 128, 4096])
def test_more_reads_than_the_ring_takes(make: Make, fd: int, depth: int) -> None:
    """Backpressure: all complete, none is dropped, and no more than fit are ever under way."""
    backend = make(queue_depth=depth)
    requests = some(fd, 5000, 1000)
    most = 0

    async def main() -> None:
        nonlocal most
        channel = backend.channel(asyncio.get_running_loop())
        futures = [channel.read(*request) for request in requests]
        for future, expected in zip(futures, truth(requests), strict=True):
            most = max(most, channel.running)
            assert await future == expected
        channel.close()

    asyncio.run(main())
    assert most <= 2 * depth
    assert_balanced(backend)


@pytest.mark.parametrize("settings", [{}, {"use_registered_buffers": False}, {"use_fixed_files": True}])
@pytest.mark.parametrize("length", [1, 2, 4096, 4097, 65536, 65537, 1 << 20, 3 << 20])
def test_channel_reads(make: Make, fd: int, length: int, settings: dict[str, Any]) -> None:
    backend = make(**settings)
    requests = some(fd, 300 if length < 10_000 else 20, length)

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)
        found = await asyncio.gather(*[channel.read(*request) for request in requests])
        channel.close()
        return found

    assert asyncio.run(main()) == truth(requests)
    assert_balanced(backend)


def test_channel_outcomes(make: Make, fd: int, tmp_path: Path) -> None:
    backend = make()
    directory = os.open(tmp_path, os.O_RDONLY)
    requests = [
        (fd, 100, SIZE - 50), (fd, 100, SIZE + 5), (fd, 0, 7), (fd, 70_000, SIZE - 60_000),
        (1 << 20, 10, 0), (directory, 10, 0), (-1, 10, 0), (fd, 10, -5), (fd, -1, 0), (1 << 40, 1, 0),
        (fd, 10, 1 << 63),
    ]  # fmt: skip

    async def main() -> list[Any]:
        channel = backend.channel(asyncio.get_running_loop())
        reads = [channel.read(*request) for request in requests]
        return await asyncio.gather(*reads, return_exceptions=True)

    results = asyncio.run(main())
    os.close(directory)
    assert results[:4] == truth(requests[:4])
    codes = [getattr(result, "errno", type(result)) for result in results[4:]]
    assert codes[:5] == [errno.EBADF, errno.EISDIR, errno.EBADF, errno.EINVAL, errno.EINVAL]
    assert codes[5:] == [OverflowError, OverflowError]


def test_one_turn_of_the_loop_is_one_submission(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        await channel.read(fd, 10, 0)
        enters = channel._ring.info()["enters"]
        os.pread(fd, SIZE, 0)
        await asyncio.gather(*[channel.read(*request) for request in some(fd, 30)])
        assert channel._ring.info()["enters"] == enters + 1

    asyncio.run(main())


def test_few_system_calls(make: Make, fd: int) -> None:
    backend = make()

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        cool(fd)

        async def work() -> None:
            for request in some(fd, 20):
                await channel.read(*request)

        await asyncio.gather(*[work() for _ in range(256)])

    asyncio.run(main())
    stats = backend.stats()
    assert stats["completed"] >= 256 * 20
    assert stats["enters"] < 0.3 * stats["completed"]


# -- event loops: failures ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [4096, 20_000, 100_000])
@pytest.mark.parametrize("result", [1, 1000])
def test_channel_short_reads(make: Make, fd: int, length: int, result: int) -> None:
    found, expected = with_injection(make(), fd, 100, (lib.YR_OP_READ, 5, 80, result), length=length)
    assert found == expected


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
@pytest.mark.parametrize("times", [1, 50, 10**6])
def test_channel_repeats(make: Make, fd: int, code: int, times: int) -> None:
    """With a bound: then it is read without the ring."""
    backend = make()
    found, expected = with_injection(backend, fd, 20, (lib.YR_OP_READ, 0, times, -code))
    assert found == expected
    assert backend.stats()["fallbacks"] == (20 if times > 50 else 0)


def test_channel_error_of_the_file(make: Make, fd: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 10, (lib.YR_OP_READ, 0, 1, -errno.EIO))
    assert [error.errno for error in found if isinstance(error, OSError)] == [errno.EIO]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) == 9


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("times", [1, ring_channel._FAILURES, 10**6])
def test_channel_error_of_the_ring(
    make: Make, fd: int, code: int, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 300, (lib.YR_OP_READ, 0, times, -code))
    assert found == expected
    stats = backend.stats()
    assert stats["fallbacks"] >= min(times, 300)
    given_up = times >= ring_channel._FAILURES
    assert stats["degraded"] == stats["ring_failures"] == given_up
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == given_up


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_submission_that_must_wait(make: Make, fd: int, code: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 5, -code))
    assert found == expected
    assert backend.stats()["fallbacks"] == 0


def test_submission_in_parts(make: Make, fd: int) -> None:
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 4, 3))
    assert found == expected
    assert backend.stats()["fallbacks"] == 0


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EBADF, errno.EINVAL])
def test_submission_that_fails_for_good(
    make: Make, fd: int, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The reads of the user go on, with one log line; some time later there is a ring again."""
    backend = make()
    found, expected = with_injection(backend, fd, 200, (lib.YR_OP_SUBMIT, 0, 10**6, -code))
    assert found == expected
    stats = backend.stats()
    assert stats["degraded"] == 1 and stats["fallbacks"] >= 200
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    backend.rings._none_before = 0.0
    found, expected = with_injection(backend, fd, 10)
    assert found == expected
    assert backend.stats()["fallbacks"] == stats["fallbacks"]
    assert backend.stats()["degraded"] == 0


def test_no_ring_to_be_had_later(
    make: Make, fd: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> Ring:
        raise OSError(errno.ENOMEM, "no memory")

    backend = make()
    monkeypatch.setattr(ring_module, "Ring", refuse)
    requests = some(fd, 100)

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        return await asyncio.gather(*[channel.read(*request) for request in requests])

    for _ in range(3):
        assert asyncio.run(main()) == truth(requests)
    assert backend.stats()["fallbacks"] == 300
    assert backend.stats()["degraded"] == 1
    assert len(caplog.records) == 1 and "ENOMEM" in caplog.text


def test_a_loop_that_cannot_be_woken(make: Make, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make()

    async def main() -> bytes:
        loop = asyncio.get_running_loop()

        def refuse(*args: Any) -> None:
            raise NotImplementedError

        monkeypatch.setattr(loop, "add_reader", refuse)
        return await backend.channel(loop).read(fd, 100, 5)

    before = descriptors()
    assert asyncio.run(main()) == os.pread(fd, 100, 5)
    assert descriptors() == before


# -- registered files -----------------------------------------------------------------------------------


def test_fixed_files_follow_closing(make: Make, tmp_path: Path) -> None:
    """A number that is used again is another file; a closed file is not kept open."""
    backend = make(use_fixed_files=True)

    async def main() -> None:
        channel = backend.channel(asyncio.get_running_loop())
        seen = set()
        for i in range(300):
            (tmp_path / "file").unlink(missing_ok=True)
            (tmp_path / "file").write_bytes(b"%d" % i * 100)
            fd = backend.open(str(tmp_path / "file"), os.O_RDONLY)
            seen.add(fd)
            assert await channel.read(fd, 100, 0) == (b"%d" % i * 100)[:100]
            assert fd in channel._files
            backend.close_file(fd)
            if i % 2:
                await asyncio.sleep(0)
                assert fd not in channel._files
        assert len(seen) < 10
        channel.close()

    asyncio.run(main())


def test_more_files_than_places(make: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_channel, "_FILES", 4)
    backend = make(use_fixed_files=True)
    fds = [backend.open(str(path), os.O_RDONLY) for _ in range(10)]
    requests = [some(fd, 1)[0] for fd in fds * 5]

    async def main() -> list[bytes]:
        channel = backend.channel(asyncio.get_running_loop())
        return await asyncio.gather(*[channel.read(*request) for request in requests])

    assert asyncio.run(main()) == truth(requests)
    for fd in fds:
        backend.close_file(fd)
