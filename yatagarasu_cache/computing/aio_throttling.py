"""`throttle` of coroutine functions, and of an `AsyncDiskCache`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial, wraps
from typing import Any

from ..aio_loop import in_thread
from ..concurrency.locks import calls_out
from ..errors import CacheError
from .throttling import Turn

__all__ = ["aside", "throttled"]


def throttled(
    function: Callable[..., Any], reserve: Callable[[], Awaitable[Turn]],
    put_off: Callable[[Turn], Awaitable[None]], give_back: Callable[[Turn], Awaitable[None]], *,
    is_plain: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """A coroutine function, or a plain one that a thread is to call, which waits for its turn first."""

    @wraps(function)
    @calls_out
    async def throttled(*args: Any, **options: Any) -> Any:
        turn = await reserve()
        try:
            await asyncio.sleep(turn.seconds_left)
        except BaseException:
            with contextlib.suppress(CacheError):  # what interrupts it matters more
                await asyncio.shield(give_back(turn))
            raise
        if turn.is_late:
            await put_off(turn)
        call = partial(function, *args, **options)
        if is_plain:
            return await in_thread(partial(copy_context().run, call), "yatagarasu-computing")
        return await call()

    return throttled


def aside(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """What may wait for others, for a loop that must not."""
    return lambda *args: in_thread(partial(function, *args), "yatagarasu-throttle")
