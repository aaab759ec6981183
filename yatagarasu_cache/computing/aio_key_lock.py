"""`lock` and `semaphore` of an `AsyncDiskCache`."""

from __future__ import annotations

import asyncio

from ..codec import Key
from ..concurrency.key_locks import Claim
from ..desk import Desk
from ..guard import guarded
from .aio_ways import Face, TaskWays
from .key_lock import Held, Places, check_lock

__all__ = ["AsyncKeyLock"]


class AsyncKeyLock:
    """`KeyLock` for tasks: use it in an ``async with``. `acquire` and `locked` are awaited."""

    def __init__(self, face: Face, key: Key, count: int, wait: float | None, *, is_lock: bool) -> None:
        check_lock(count, wait)
        self._face, self._key, self._count, self._wait, self._is_lock = face, key, count, wait, is_lock
        self._held = Held()
        Desk.encode_key(key)  # which may refuse it

    async def _opened(self) -> Places:
        desk = await self._face._opened()
        desk.store.entering()
        self._places = Places(desk, self._key, self._count, is_lock=self._is_lock)
        return self._places

    @guarded
    async def acquire(self) -> bool:
        """As `KeyLock.acquire`. If it is cancelled, it holds nothing."""
        places = await self._opened()
        claim = Claim(asyncio.current_task())
        self._held.add(claim)
        try:
            await places.take(TaskWays(self._face), claim, self._wait)
        except BaseException:
            self._held.give_back(places, claim)
            raise
        return True

    @guarded
    def release(self) -> None:
        """As `KeyLock.release`."""
        claim = self._held.mine(Claim(asyncio.current_task()))
        self._held.give_back(self._places, claim)

    @guarded
    async def locked(self) -> bool:
        """As `KeyLock.locked`."""
        places = await self._opened()
        return await self._face._run(places.are_taken)

    @guarded
    async def __aenter__(self) -> AsyncKeyLock:
        await self.acquire()
        return self

    @guarded
    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<AsyncKeyLock {self._key!r}>"

    def __del__(self) -> None:
        if hasattr(self, "_places"):
            self._held.give_all_back(self._places)
