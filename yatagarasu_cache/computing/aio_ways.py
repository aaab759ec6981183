"""How tasks wait, and call what they were given: see `ways`."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from ..aio_loop import in_thread
from ..codec import Key
from ..concurrency.bells import Bell
from ..concurrency.in_flight import Outcome, under_way
from ..concurrency.locks import calls_out
from ..desk import Desk
from ..guard import callers
from ..store.item import Item
from .ways import Function, failed, is_async

__all__ = ["Face", "TaskWays", "end_refreshes"]

T = TypeVar("T")


class Face(Protocol):
    """What is needed of an `AsyncDiskCache`."""

    async def get(self, key: Key, default: Any = ...) -> Any: ...

    async def _opened(self) -> Desk: ...

    async def _run(self, function: Callable[..., T], *args: Any) -> T: ...

    async def _put(self, item: Item) -> None: ...


_asides: set[asyncio.Task[Outcome]] = set()  # the loop itself does not keep them
_refreshes: dict[asyncio.Task[None], Desk] = {}


class TaskWays:
    """Of the task that calls. The loop never waits."""

    blocks = False

    def __init__(self, face: Face) -> None:
        self._face = face

    async def wait(self, bell: Bell, seconds: float | None) -> bool:
        if bell.rung or seconds is not None and seconds <= 0:
            return bell.rung
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future)

        bell.call(wake)
        await asyncio.wait({future}, timeout=seconds)
        return bell.rung

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        return await self._face._run(function, *args)

    async def put(self, desk: Desk, item: Item) -> None:
        await self._face._put(item)

    async def call(self, function: Function) -> Outcome:
        try:
            return Outcome(await (_await(function) if is_async(function) else _call_aside(function)))
        except Exception as error:
            return failed(error)

    def begin(
        self, function: Function, work: Callable[[], Coroutine[Any, Any, Outcome]]
    ) -> Awaitable[Outcome] | None:
        """A thread that calls a plain function cannot be stopped. So what it comes to is for those who still
        wait, and is stored."""
        if is_async(function):
            return None
        task = asyncio.ensure_future(work())
        _asides.add(task)
        task.add_done_callback(_aside_done)
        return asyncio.shield(task)

    def refresh(self, work: Callable[[], Coroutine[Any, Any, None]], desk: Desk) -> bool:
        with under_way(None):
            task = asyncio.ensure_future(work())
        _refreshes[task] = desk
        task.add_done_callback(_refresh_done)
        return True

    def task(self) -> object:
        return asyncio.current_task()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _aside_done(task: asyncio.Task[Outcome]) -> None:
    _asides.discard(task)
    if not task.cancelled():
        task.exception()  # seen, or asyncio complains where nobody waits any more


def _refresh_done(task: asyncio.Task[None]) -> None:
    _refreshes.pop(task, None)
    if not task.cancelled():
        task.exception()


async def end_refreshes(desk: Desk | None) -> None:
    """Cancel those of a handle in this loop: it is being closed."""
    loop = asyncio.get_running_loop()
    ending = [task for task, of in list(_refreshes.items()) if of is desk and task.get_loop() is loop]
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)


@callers
@calls_out
async def _await(function: Function) -> Any:
    return await function()


@callers
@calls_out
async def _call_aside(function: Function) -> Any:
    """By a thread of its own, in the context of this task."""
    context = contextvars.copy_context()
    result = await in_thread(functools.partial(context.run, _call, function), "yatagarasu-computing")
    return await result if inspect.isawaitable(result) else result


@callers
@calls_out
def _call(function: Function) -> Any:
    return function()
