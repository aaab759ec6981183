"""`get_or_set` of an `AsyncDiskCache`."""

from __future__ import annotations

from typing import Any

from ..codec import Key
from .aio_ways import Face, TaskWays
from .steps import MISSING, Computing
from .terms import Terms
from .ways import Function

__all__ = ["AsyncOnce"]


class AsyncOnce:
    """`Once` for tasks. The function may be a coroutine function, or a plain one, which a thread calls."""

    terms = Terms

    def __init__(self, face: Face) -> None:
        self._face = face

    async def get_or_compute(self, key: Key, function: Function, terms: Terms) -> Any:
        """The value of `key`, or else what `function()` comes to. Counted as a get."""
        value = await self._face.get(key, MISSING)
        if value is MISSING:
            return await self.compute(key, function, terms)
        if terms.refresh_early is not None:
            await self.keep_fresh(key, function, terms)
        return value

    async def compute(self, key: Key, function: Function, terms: Terms) -> Any:
        """The same for a caller who has looked, and found nothing."""
        return (await (await self._computing()).compute(key, function, terms)).result()

    async def keep_fresh(self, key: Key, function: Function, terms: Terms) -> None:
        """For one who has found a value: `refresh_early`."""
        (await self._computing()).keep_fresh(key, function, terms)

    async def _computing(self) -> Computing:
        desk = await self._face._opened()
        desk.store.entering()
        return Computing(desk, TaskWays(self._face))
