"""Work that is under way in this process, by key, whose outcome all who want the same meanwhile share."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from ..errors import Reentered
from . import forks
from .bells import Bell
from .locks import new_lock

__all__ = ["COUNTS", "Flight", "InFlight", "Outcome", "inside", "under_way"]

# What is counted: functions that were called; callers that had the outcome of another one's call; old values
# served; computations in the background that failed, results that could not be stored.
COUNTS = ("computed", "shared", "stale", "failed_refreshes", "unstored")
_FIRST_REST, _LONGEST_REST = 0.25, 60.0  # seconds before what has failed in the background is tried again
_MOST_RESTS = 1024


class Outcome:
    """What a function has returned, or raised."""

    __slots__ = ("_error", "_traceback", "value")

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self._error = value, error
        self._traceback: TracebackType | None = None if error is None else error.__traceback__

    @property
    def error(self) -> Exception | None:
        return self._error

    def result(self) -> Any:
        """The value; or the exception is raised, the same one for all, each time as it came up."""
        if self._error is None:
            return self.value
        try:
            raise self._error.with_traceback(self._traceback)
        finally:
            del self  # no circle of the exception, this frame and the exception


class Flight:
    """One piece of work, of the thread that begins it. Without an outcome at its end it is somebody else's
    turn."""

    __slots__ = ("ended", "outcome", "thread", "waits_for")

    def __init__(self) -> None:
        self.ended = Bell()
        self.outcome: Outcome | None = None
        self.thread = threading.get_ident()
        self.waits_for: list[Flight] = []

    @property
    def is_running(self) -> bool:
        return not self.ended.rung


# Those that the running code is part of: it was called by their functions, or by tasks that these began.
_inside: ContextVar[tuple[Flight, ...]] = ContextVar("yatagarasu_computing", default=())


def inside() -> list[Flight]:
    return [flight for flight in _inside.get() if flight.is_running]


@contextlib.contextmanager
def under_way(flight: Flight | None) -> Iterator[None]:
    """What the block calls is part of this work; with None, of none at all."""
    token = _inside.set(() if flight is None else (*inside(), flight))
    try:
        yield
    finally:
        _inside.reset(token)


class InFlight:
    """All work under way on one directory, and what is known of earlier work."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}
        self._refreshing: set[int] = set()
        self._rests: dict[int, tuple[float, int]] = {}  # until when, after how many failures
        self._guard = new_lock()
        self.counts = dict.fromkeys(COUNTS, 0)
        _all.add(self)

    def join(self, position: int, flight: Flight) -> Flight | None:
        """The work that is under way there; None if there was none: from now on it is `flight`."""
        with self._guard:
            current = self._flights.get(position)
            if current is not None and current.is_running:
                return current
            self._flights[position] = flight
            return None

    def end(self, position: int, flight: Flight) -> None:
        """Idempotent."""
        flight.ended.ring()  # first: should an exception come in between, `join` goes by it
        with self._guard:
            if self._flights.get(position) is flight:
                del self._flights[position]

    def is_running(self, position: int) -> bool:
        flight = self._flights.get(position)
        return flight is not None and flight.is_running

    @contextlib.contextmanager
    def waiting_for(self, flight: Flight, what: str, blocks: bool = False) -> Iterator[None]:
        """In this block the running code waits for it, and if that `blocks`, so does all else in this thread:
        the tasks of its event loop. `Reentered` if it could never end: it waits for this code in its turn."""
        mine, me = inside(), threading.get_ident()
        for one in mine:
            one.waits_for.append(flight)  # first: of two who begin to wait at once, one sees the other
        if blocks:
            _blocked[me] = flight
        try:
            if _leads_to(flight, lambda one: one in mine):
                raise Reentered(
                    f"{what} is asked for by what is called to compute it, which would wait for itself: have "
                    "the function compute it without asking the cache for it"
                )
            if blocks and _leads_to(flight, lambda one: one.thread == me):
                raise Reentered(
                    f"{what} is computed by a task of this thread, which could not go on while the thread "
                    "waits for it: await it, with an AsyncDiskCache, or ask in another thread"
                )
            yield
        finally:
            if blocks:
                _blocked.pop(me, None)
            for one in mine:
                one.waits_for.remove(flight)

    def refuse_within(self, position: int, what: str) -> None:
        """`Reentered` if this code is part of the work that is under way there."""
        flight = self._flights.get(position)
        if flight is not None and flight in inside():
            with self.waiting_for(flight, what):
                pass

    # -- in the background --------------------------------------------------------------------

    def begin_refresh(self, position: int) -> bool:
        """False if one is under way there, or it is too early after one that has failed."""
        with self._guard:
            if position in self._refreshing or self.is_running(position):
                return False
            if time.monotonic() < self._rests.get(position, (0.0, 0))[0]:
                return False
            self._refreshing.add(position)
            return True

    def end_refresh(self, position: int) -> None:
        with self._guard:
            self._refreshing.discard(position)

    def rest(self, position: int, most: float) -> None:
        """It has failed: it is not tried again at once, and less often with each failure in a row; at the
        latest after `most` seconds."""
        with self._guard:
            now = time.monotonic()
            failures = self._rests.get(position, (0.0, 0))[1] + 1
            if len(self._rests) >= _MOST_RESTS:
                self._rests = {at: rest for at, rest in self._rests.items() if rest[0] > now}
            pause = min(_FIRST_REST * 2.0 ** min(failures - 1, 20), _LONGEST_REST, most)
            self._rests[position] = now + pause, failures

    def rested(self, position: int) -> None:
        """It has come off."""
        self._rests.pop(position, None)

    def count(self, name: str) -> None:
        with self._guard:
            self.counts[name] += 1

    # -- forks --------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """What is under way is the parent's."""
        flights, self._flights = list(self._flights.values()), {}
        for flight in flights:
            flight.ended.silence()
        _blocked.clear()
        self._refreshing, self._rests, self._guard = set(), {}, new_lock()
        self.counts = dict.fromkeys(COUNTS, 0)


def _leads_to(flight: Flight, goal: Callable[[Flight], bool]) -> bool:
    """Whether a piece of work is a `goal`, or waits, over whichever others, for one."""
    seen: set[int] = set()
    left = [flight]
    while left:
        one = left.pop()
        if id(one) in seen or not one.is_running:
            continue
        if goal(one):
            return True
        seen.add(id(one))
        left += tuple(one.waits_for)
        if (other := _blocked.get(one.thread)) is not None:
            left.append(other)
    return False


_blocked: dict[int, Flight] = {}  # by thread: what all of it waits for
_all: weakref.WeakSet[InFlight] = weakref.WeakSet()


def _forget_in_child() -> None:
    for flights in list(_all):
        flights.after_fork()


forks.register(_forget_in_child)
