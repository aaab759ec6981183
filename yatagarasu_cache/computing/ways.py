"""How threads wait, and call what they were given; `aio_ways` says how tasks do.

What is done by threads and by tasks is written once, as coroutines. For threads none of them waits for an
event loop: `run` takes them from their beginning to their end.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar, cast

from ..concurrency.bells import Bell
from ..concurrency.in_flight import Outcome, under_way
from ..concurrency.interruption import is_signals
from ..concurrency.key_locks import current_task
from ..concurrency.locks import calls_out
from ..desk import Desk
from ..errors import ClosedError
from ..guard import callers
from ..store.item import Item
from .background import refreshes

__all__ = ["Function", "ThreadWays", "Ways", "is_async", "run", "seconds_left"]

T = TypeVar("T")
Function = Callable[[], Any]


class Ways(Protocol):
    """What differs between threads and tasks. `blocks`: waiting keeps the whole thread from going on."""

    blocks: bool

    async def wait(self, bell: Bell, seconds: float | None) -> bool:
        """Wait for a bell, for so many seconds at most; whether it has rung."""

    async def sleep(self, seconds: float) -> None: ...

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, which is ours, and may wait for the disk."""

    async def put(self, desk: Desk, item: Item) -> None: ...

    async def call(self, function: Function) -> Outcome:
        """What the caller's function returns, or raises, if that is an Exception."""

    def begin(
        self, function: Function, work: Callable[[], Coroutine[Any, Any, Outcome]]
    ) -> Awaitable[Outcome] | None:
        """Have `work`, which calls `function`, go on though its caller is cancelled; None, and nothing was
        begun, where that makes no sense."""

    def refresh(self, work: Callable[[], Coroutine[Any, Any, None]], desk: Desk) -> bool:
        """Have it done in the background; False if that can't be."""

    def task(self) -> object:
        """What runs, if it is a task."""


class ThreadWays:
    """Of the thread that calls."""

    blocks = True

    async def wait(self, bell: Bell, seconds: float | None) -> bool:
        return bell.wait(seconds)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    async def put(self, desk: Desk, item: Item) -> None:
        desk.put(item.key, item.payload, item.flags, item.expires, item.tag, item.meta)

    async def call(self, function: Function) -> Outcome:
        try:
            return Outcome(_call(function))
        except Exception as error:
            return failed(error)

    def begin(self, function: Function, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> None:
        return None

    def refresh(self, work: Callable[[], Coroutine[Any, Any, None]], desk: Desk) -> bool:
        context = contextvars.copy_context()

        def job() -> None:
            with under_way(None):
                run(work())

        return refreshes.submit(lambda: context.run(job))

    def task(self) -> object:
        return current_task()


def run(steps: Coroutine[Any, Any, T]) -> T:
    """The result of coroutines that never wait for an event loop."""
    try:
        steps.send(None)
    except StopIteration as end:
        return cast("T", end.value)  # which gets no name: see `Job`
    steps.close()
    raise AssertionError("it waits for an event loop")


@callers
@calls_out
def _call(function: Function) -> Any:
    result = function()
    if hasattr(type(result), "__await__"):
        if hasattr(result, "close"):  # or Python says that it was never awaited
            result.close()
        raise TypeError(
            "the function is a coroutine function, or returns an awaitable: use AsyncDiskCache, which awaits "
            "it, or a plain function"
        )
    return result


def is_async(function: Any) -> bool:
    """Whether calling it does nothing yet, and what it returns is to be awaited."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def failed(error: Exception) -> Outcome:
    """What an exception of the caller's function comes to. A signal handler's is raised on: it says nothing
    about the function."""
    if is_signals(error):
        raise error
    return Outcome(error=error)


def seconds_left(deadline: float | None) -> float | None:
    """Until a monotonic time; None if there is none."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def ensure_open(desk: Desk) -> None:
    """While waiting: another thread may have closed the handle."""
    if desk.closed:
        raise ClosedError(f"the cache in {desk.settings.directory!r} is closed: open it anew")
