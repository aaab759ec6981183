"""`lock` and `semaphore`: what at most so many hold at once, among threads, tasks and processes."""

from __future__ import annotations

import contextlib
import errno
import time

from ..arguments import check_int
from ..codec import Key
from ..concurrency.bells import Bell
from ..concurrency.key_locks import (
    LONGEST_PAUSE,
    POSITIONS,
    SHORTEST_PAUSE,
    Claim,
    KeyLocks,
    Waiter,
    current_task,
)
from ..desk import Desk
from ..errors import LockTimeout, Reentered
from ..guard import callers, guarded
from .steps import position_of, prepared
from .terms import check_wait
from .ways import ThreadWays, Ways, ensure_open, run, seconds_left

__all__ = ["MOST_SLOTS", "Held", "KeyLock", "Places", "check_lock"]

MOST_SLOTS = 4096  # of a semaphore: whoever waits tries each of them
_HELD_HERE = 1.0  # seconds between tries where this process has it all, so that its end rings


class Places:
    """The places of one lock (one) or semaphore (several), and how one of them is taken."""

    def __init__(self, desk: Desk, key: Key, count: int, *, is_lock: bool) -> None:
        self._desk, self._key = desk, key
        self._what = f"the lock of {key!r}" if is_lock else f"one of {count} places of {key!r}"
        first = position_of(desk, b"lock\0" if is_lock else b"semaphore\0", desk.encode_key(key))
        self._positions = [(first + i) % POSITIONS for i in range(count)]
        self._first = first

    @property
    def _locks(self) -> KeyLocks:
        return self._desk.lease.place.key_locks

    async def take(self, ways: Ways, claim: Claim, wait: float | None) -> None:
        """Wait for a place, `wait` seconds at most, and have `claim` hold it."""
        self._desk.store.life.ensure_writable("lock a key")
        if not self._locks.is_prepared:
            await ways.work(prepared, self._desk)
        deadline = None if wait is None else time.monotonic() + wait
        waiter, locks = Waiter(), self._locks
        self._refuse_holder(claim, ways.blocks)
        try:
            try:
                locks.enter(self._first, waiter)
                while not locks.is_first(self._first, waiter):
                    if not await ways.wait(waiter.bell, seconds_left(deadline)):
                        raise self._timed_out(wait, "another thread or task of this process")
                await self._take_as_first(ways, claim, waiter, wait, deadline)
            finally:
                locks.leave(self._first, waiter)
        except BaseException:  # it may have come at the end
            locks.give_back(claim)
            locks.leave(self._first, waiter)
            raise

    async def _take_as_first(
        self, ways: Ways, claim: Claim, waiter: Waiter, wait: float | None, deadline: float | None
    ) -> None:
        """Only one of this process looks what others do."""
        locks, pause, shows = self._locks, SHORTEST_PAUSE, False
        courtesy, left = locks.courtesy(self._first), seconds_left(deadline)
        if courtesy and (left is None or left > courtesy):
            await ways.sleep(courtesy)
        try:
            while True:
                waiter.bell = Bell()  # first: what is given back from here on rings it
                if locks.take(claim, self._positions):
                    return
                left = seconds_left(deadline)
                is_held_here = all(position in locks.held for position in self._positions)
                if left is not None and left <= 0:
                    whom = "another thread or task of this process" if is_held_here else "another process"
                    raise self._timed_out(wait, whom)
                if not is_held_here and not shows:
                    shows = True
                    locks.show_waiting(self._first, True)
                bound = _HELD_HERE if is_held_here else pause
                await ways.wait(waiter.bell, bound if left is None else min(bound, left))
                pause = min(1.5 * pause, LONGEST_PAUSE)
                ensure_open(self._desk)
        finally:
            if shows:
                locks.show_waiting(self._first, False)

    def give_back(self, claim: Claim) -> None:
        locks = self._locks
        is_held = locks.held.get(claim.position) is claim
        locks.give_back(claim)
        if is_held:
            locks.note_courtesy(self._first)
        locks.ring(self._first)

    def are_taken(self) -> bool:
        """Whether all of them are held, by anybody."""
        if not self._locks.is_prepared:
            prepared(self._desk)
        return all(self._locks.is_held(position) for position in self._positions)

    def _refuse_holder(self, claim: Claim, blocks: bool) -> None:
        """Whoever holds all of it would wait for himself; so would a thread that makes its own tasks wait."""
        held = self._locks.held
        holders = [held.get(position) for position in self._positions]
        if all(one is not None and _waits_for_itself(one, claim, blocks) for one in holders):
            holder = "thread" if blocks else "task"
            raise Reentered(
                f"{self._what} is held by this very {holder}, which would wait for itself: give it back first"
            )

    def _timed_out(self, wait: float | None, whom: str) -> LockTimeout:
        line = f"waited {wait:g} s (wait) for {self._what}, which {whom} holds"
        return LockTimeout(errno.ETIMEDOUT, line, self._desk.settings.directory)


def _waits_for_itself(holder: Claim, claim: Claim, blocks: bool) -> bool:
    """Whether the holder could not go on while the other one waits: who blocks a thread blocks its tasks."""
    if blocks or holder.task is None:
        return holder.thread == claim.thread
    return holder.task is claim.task


def check_lock(count: int, wait: float | None) -> None:
    check_int("n", count)
    _check_count(count)
    check_wait(wait)


@callers
def _check_count(count: int) -> None:
    if not 1 <= count <= MOST_SLOTS:
        raise ValueError(f"n must be from 1 to {MOST_SLOTS}, not {count}")


class Held:
    """What an object of the user's holds, by whichever thread or task: each gives back its own."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def add(self, claim: Claim) -> None:
        self._claims.append(claim)

    def remove(self, claim: Claim) -> None:
        with contextlib.suppress(ValueError):
            self._claims.remove(claim)

    def mine(self, me: Claim) -> Claim:
        """That of the same thread or task, or else the last one."""
        claims = self._claims
        own = [one for one in claims if one.task is me.task and one.thread == me.thread]
        return own[-1] if own else _last(claims)

    def give_back(self, places: Places, claim: Claim) -> None:
        places.give_back(claim)
        self.remove(claim)  # last: if an exception comes before, it is given back with the object

    def give_all_back(self, places: Places) -> None:
        for claim in list(self._claims):
            self.give_back(places, claim)


@callers
def _last(claims: list[Claim]) -> Claim:
    if not claims:
        raise RuntimeError("it is not held by this object: release() comes after acquire()")
    return claims[-1]


class KeyLock:
    """Held by at most one thread, or task, or by at most n, of all processes. Use it in a ``with``.

    It ends with its holder, however that ends: the kernel gives it back. The child of a fork does not have
    it. An object may be used by several threads, and again and again.
    """

    def __init__(self, desk: Desk, key: Key, count: int, wait: float | None, *, is_lock: bool) -> None:
        check_lock(count, wait)
        self._places, self._wait, self._key = Places(desk, key, count, is_lock=is_lock), wait, key
        self._held = Held()  # last: see `__del__`

    @guarded
    def acquire(self) -> bool:
        """Wait for it, and hold it. Returns True.

        Raises `LockTimeout` after `wait` seconds; `Reentered` if this thread holds it; `ClosedError` if the
        cache is closed meanwhile.
        """
        claim = Claim(current_task())
        self._held.add(claim)  # first: whenever an exception comes, it is known
        try:
            run(self._places.take(ThreadWays(), claim, self._wait))
        except BaseException:
            self._held.give_back(self._places, claim)
            raise
        return True

    @guarded
    def release(self) -> None:
        """Give it back. RuntimeError if this object does not hold it."""
        self._held.give_back(self._places, self._held.mine(Claim(current_task())))

    @guarded
    def locked(self) -> bool:
        """Whether nobody could hold it just now without waiting."""
        return self._places.are_taken()

    @guarded
    def __enter__(self) -> KeyLock:
        self.acquire()
        return self

    @guarded
    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<KeyLock {self._key!r}>"

    def __del__(self) -> None:
        if held := getattr(self, "_held", None):
            held.give_all_back(self._places)
