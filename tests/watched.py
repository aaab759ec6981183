"""`AsyncDiskCache` under observation.

What a backend is asked for, and by which thread, is seen by `Watched`, which can also hold calls in a
worker until the test lets them go: no test sleeps.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from helpers import LARGE, SEGMENT, WrappedBackend, noise

from yatagarasu_cache import AsyncDiskCache
from yatagarasu_cache.backends.base import Backend, Channel

SMALL: dict[str, Any] = {"size_limit": 16 << 20, "segment_size": SEGMENT}
LIMIT = 30.0  # seconds after which whatever is waited for will not come any more
Open = Callable[..., AsyncDiskCache]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """A loop of its own for `main`, which must not take for ever."""
    return asyncio.run(asyncio.wait_for(main, LIMIT))


async def turns_of_the_loop(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def until(happened: threading.Event) -> None:
    """Wait for another thread without holding up the loop."""
    assert await asyncio.to_thread(happened.wait, LIMIT)


async def parts_of(data: bytes, size: int = 5000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[at : at + size]


# -- a backend under observation ----------------------------------------------------------------

NEVER_WAIT = {"read_nowait", "prefetch"}


class Watched(WrappedBackend):
    """Notes every call and its thread, and what is under way in its channels.

    `hold` keeps calls of some kinds in their worker until `go_on`. `cold` lets nothing be in
    memory. `errors` maps kinds of calls to errnos with which they fail. A write of anything that
    contains `poison` fails.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, int]] = []
        self.cold = False
        self.errors: dict[str, int] = {}
        self.poison: bytes | None = None
        self.held: frozenset[str] = frozenset()
        self.where = ""
        self.entered, self.released = threading.Event(), threading.Event()
        self.under_way = self.most = 0
        self._read_inner = inner.read
        inner.read = self.read  # type: ignore[method-assign]  # what its channels call

    def hold(self, *calls: str, where: str = "") -> None:
        self.entered.clear()
        self.released.clear()
        self.where, self.held = where, frozenset(calls)

    def go_on(self) -> None:
        self.held = frozenset()
        self.released.set()

    def made_by(self, thread: int) -> set[str]:
        return {call for call, maker in self.calls if maker == thread}

    def before(self, call: str, path: str, size: int) -> None:
        self.calls.append((call, threading.get_ident()))
        if call in self.held and self.where in path:
            self.entered.set()
            if not self.released.wait(LIMIT / 2):
                self.calls.append((f"{call} was not let go", 0))
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self.before("read", self._path(fd), length)
        return self._read_inner(fd, length, offset)

    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        self.calls.append(("read_nowait", threading.get_ident()))
        return None if self.cold else self.inner.read_nowait(fd, length, offset)

    def write(self, fd: int, buffers: Any, offset: int) -> None:
        if self.poison is not None and any(self.poison in bytes(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().write(fd, buffers, offset)

    def close_file(self, fd: int) -> None:
        self.before("close_file", self._path(fd), 0)
        super().close_file(fd)

    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        return WatchedChannel(self, loop)


class WatchedChannel(Channel):
    def __init__(self, watched: Watched, loop: asyncio.AbstractEventLoop) -> None:
        self._watched, self._loop, self._inner = watched, loop, watched.inner.channel(loop)

    def _watch(self, future: asyncio.Future[Any]) -> asyncio.Future[Any]:
        watched = self._watched
        watched.under_way += 1
        watched.most = max(watched.most, watched.under_way)

        def done(_: asyncio.Future[Any]) -> None:
            watched.under_way -= 1

        future.add_done_callback(done)
        return future

    def read(self, fd: int, length: int, offset: int) -> asyncio.Future[bytes]:
        code = self._watched.errors.get("read")
        if code is None:
            return self._watch(self._inner.read(fd, length, offset))
        future: asyncio.Future[bytes] = self._loop.create_future()
        future.set_exception(OSError(code, os.strerror(code)))
        return self._watch(future)

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return self._watch(self._inner.run(function, *args))

    def close(self) -> None:
        self._inner.close()


# -- cancelling -----------------------------------------------------------------------------------


class CancelledAt:
    """Awaits a coroutine, and cancels its task where it suspends for the `at`-th time (from 1)."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int) -> None:
        self._coroutine, self._at = coroutine, at
        self.suspensions = 0

    def __await__(self) -> Iterator[Any]:
        inner = self._coroutine.__await__()
        step: Callable[[], Any] = lambda: next(inner)  # noqa: E731
        while True:
            try:
                waits_for = step()
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            if self.suspensions == self._at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield waits_for
            except BaseException as error:
                step = lambda error=error: inner.throw(error)  # noqa: E731
            else:
                step = lambda: next(inner)  # noqa: E731


OLD: dict[Any, Any] = {
    "k": b"old",
    "n": 5,
    "large": noise(2 * LARGE),
    **{i: noise(100, i) for i in range(20)},
}
NEW = noise(3 * LARGE, 1)


def assert_free(cache: AsyncDiskCache) -> None:
    """All turns of the running loop are free, and nobody waits for one."""
    turns = cache._loops[asyncio.get_running_loop()].turns
    assert turns._free == cache.settings.max_in_flight
    assert not [turn for turn in turns._waiting if not turn.done()]


def flip(directory: Path, value: bytes) -> None:
    """Change one bit of `value` wherever it is stored."""
    found = 0
    for path in [*(directory / "segments").iterdir(), *(directory / "large").iterdir()]:
        content = path.read_bytes()
        at = content.find(value)
        if at >= 0:
            fd = os.open(path, os.O_WRONLY)
            os.pwrite(fd, bytes([content[at + len(value) // 2] ^ 4]), at + len(value) // 2)
            os.close(fd)
            found += 1
    assert found == 1
