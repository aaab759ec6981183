"""Computing a value once among all who ask for it: the steps, for threads and tasks alike."""

from __future__ import annotations

import errno
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from xxhash import xxh3_64_intdigest

from ..arguments import encode_meta
from ..codec import Key
from ..concurrency.file_locks import lock_mode
from ..concurrency.in_flight import Flight, Outcome, under_way
from ..concurrency.interruption import ours
from ..concurrency.key_locks import LONGEST_PAUSE, POSITIONS, SHORTEST_PAUSE, Claim, KeyLocks
from ..desk import Desk
from ..errors import ClosedError, LockTimeout, SerializationError
from ..guard import callers
from ..log import log as _log
from ..log import without_key
from ..store import format as f
from ..store.expected import Expected
from ..store.format import Slot
from .terms import Terms
from .ways import Function, Ways, ensure_open, seconds_left

__all__ = ["MISSING", "Computing", "position_of", "prepared"]

MISSING: Any = object()  # what a value that is not there is
_ONCE = b"once\0"
_RESTS_MOST = 0.25  # of the time for which the old value is served


def position_of(desk: Desk, domain: bytes, key: bytes) -> int:
    """Where an encoded key is locked, apart for each use. All processes agree on it."""
    return xxh3_64_intdigest(domain + key, desk.store.current.seed) % POSITIONS


def prepared(desk: Desk) -> KeyLocks:
    """The locks of the directory, whose file is opened. May wait for the disk."""
    locks, files = desk.lease.place.key_locks, desk.store.files
    path = files.path(f.KEYS_LOCK_NAME)
    open_file = partial(files.backend.open, path, os.O_RDWR | os.O_CREAT, lock_mode(files.mode))
    locks.prepare(path, partial(files.made, open_file))
    return locks


class Job:
    """A value that is asked for, and the work that was begun for it. Only this names that work: an exception
    of the function knows the frames of its callers, and they must not know its outcome."""

    def __init__(self, desk: Desk, key: Key, function: Function, terms: Terms) -> None:
        self.key, self.function, self.terms = key, function, terms
        self.low, self.high, self.data = desk.identify(key)
        self.position = position_of(desk, _ONCE, self.data)
        self.deadline = None if terms.wait is None else time.monotonic() + terms.wait
        self.flight: Flight | None = None
        self.claim: Claim | None = None
        self.is_aside = False
        self.replaces: Slot | None = None  # of a refresh: the version that its result is for
        self.may_keep = True  # its result; else somebody else's value would be lost
        self.is_kept = False

    def begin(self) -> Flight:
        self.flight = Flight()
        return self.flight

    def claim_for(self, task: object) -> Claim:
        self.claim = Claim(task)
        return self.claim

    def comes_to(self, outcome: Outcome) -> Outcome:
        """Those who wait for it have the same."""
        if self.flight is not None:
            self.flight.outcome = outcome
        return outcome

    @property
    def what(self) -> str:
        return f"the value of {self.key!r}"

    def timed_out(self, desk: Desk, whom: str) -> LockTimeout:
        line = f"waited {self.terms.wait:g} s (wait) for {self.what}, which {whom} computes"
        return LockTimeout(errno.ETIMEDOUT, line, desk.settings.directory)


class Computing:
    """What a handle does when a function is there to compute what is missing."""

    def __init__(self, desk: Desk, ways: Ways) -> None:
        self._desk, self._ways = desk, ways
        self._locks, self._flights = desk.lease.place.key_locks, desk.lease.place.in_flight

    async def compute(self, key: Key, function: Function, terms: Terms) -> Outcome:
        """The outcome for a caller who has found nothing."""
        desk = self._desk
        _check(function, terms, desk.settings.default_expire)
        _check_names(desk, terms)
        job = Job(desk, key, function, terms)
        self._flights.refuse_within(job.position, job.what)
        if terms.stale is not None:
            old = await self._serve_stale(job)
            if old is not MISSING:
                return Outcome(old)
        desk.store.life.ensure_writable("compute a value")
        if not self._locks.is_prepared:
            await self._ways.work(prepared, desk)
        return await self._computed_once(job)

    def keep_fresh(self, key: Key, function: Function, terms: Terms) -> None:
        """For a caller who has found a value: have it computed anew in the background, if it is time."""
        _check(function, terms, self._desk.settings.default_expire)
        if terms.refresh_early is not None and not self._desk.settings.read_only:
            self._refresh_early(key, function, terms)

    # -- once ---------------------------------------------------------------------------------

    async def _computed_once(self, job: Job) -> Outcome:
        while True:
            try:
                current = self._flights.join(job.position, job.begin())
                if current is None:
                    return await self._by_turns(job)
            except BaseException:  # once more, should it have come while that was being ended
                self._end(job)
                raise
            with self._flights.waiting_for(current, job.what, self._ways.blocks):
                if not await self._ways.wait(current.ended, seconds_left(job.deadline)):
                    raise job.timed_out(self._desk, "another thread or task of this process")
            if current.outcome is not None:
                self._flights.count("shared")
                return current.outcome
            # Whoever was to compute it was interrupted, or found it there: it is somebody else's turn.

    async def _by_turns(self, job: Job) -> Outcome:
        """The outcome of the work that this caller has begun."""
        try:
            await self._take(job)
            value = await self._look(job)
            if value is not MISSING:
                return job.comes_to(Outcome(value))
            aside = self._ways.begin(job.function, partial(self._aside, job))
            if aside is not None:
                job.is_aside = True
                return await aside
            return await self._computed(job)
        finally:
            self._end(job)

    async def _aside(self, job: Job) -> Outcome:
        try:
            return await self._computed(job)
        finally:
            job.is_aside = False
            self._end(job)

    def _end(self, job: Job) -> None:
        """The turn passes: to other processes, and to those of this one who wait. Idempotent."""
        flight, claim = job.flight, job.claim
        if flight is None or job.is_aside:  # it goes on without the one who began it
            return
        try:
            if claim is not None:
                self._locks.give_back(claim)
        finally:
            self._flights.end(job.position, flight)
        job.flight = None  # last: if an exception comes before, this is called once more

    async def _take(self, job: Job) -> None:
        """Wait for the turn among processes."""
        claim, pause = job.claim_for(self._ways.task()), SHORTEST_PAUSE
        while not self._locks.take(claim, (job.position,)):
            left = seconds_left(job.deadline)
            if left is not None and left <= 0:
                raise job.timed_out(self._desk, "another process")
            await self._ways.sleep(pause if left is None else min(pause, left))
            pause = min(1.5 * pause, LONGEST_PAUSE)
            ensure_open(self._desk)

    async def _look(self, job: Job) -> Any:
        """What is there by now."""
        found = await self._ways.work(self._desk.store.reading.fetch, job.low, job.high, job.data)
        return MISSING if found is None else self._decoded(job, *found)

    def _decoded(self, job: Job, payload: Any, flags: int) -> Any:
        """What is served. If this handle's serializer cannot read it, that is raised, or else the value is
        computed, and not stored: what somebody else can read is never overwritten unasked."""
        try:
            return self._desk.decode(payload, flags, job.key)
        except SerializationError:
            if self._desk.settings.on_unreadable == "error":
                raise
            job.may_keep = False
            return MISSING

    async def _computed(self, job: Job) -> Outcome:
        """Call the function, store what it returns, and tell those who wait for it."""
        self._flights.count("computed")
        keeps, condition, begun = job.may_keep, job.terms.condition, time.monotonic_ns()
        try:
            with under_way(job.flight):
                outcome = await self._ways.call(job.function)
                took = time.monotonic_ns() - begun
                if outcome.error is None and keeps and condition is not None:
                    judged = await self._ways.call(partial(_holds, condition, outcome.value))
                    keeps = judged.error is None and judged.value
                    outcome = outcome if judged.error is None else judged
            if outcome.error is None and keeps:
                await self._keep(job, outcome.value, took)
            return job.comes_to(outcome)
        finally:
            outcome = judged = None  # type: ignore[assignment]  # no circle of an exception and this frame

    async def _keep(self, job: Job, value: Any, took: int) -> None:
        """Store it. If that fails, those who asked have it all the same."""
        terms, desk = job.terms, self._desk
        try:
            entry = job.key, value, terms.expire, terms.tag, terms.meta
            item = await self._ways.work(desk.item, *entry) if desk.compresses else desk.item(*entry)
            if terms.stale is not None or terms.refresh_early is not None:
                expires = f.pack_terms(item.expires, terms.stale_nanoseconds, took)
                item = item._replace(expires=expires, flags=item.flags | f.FLAG_TERMS)
            old = job.replaces
            if old is not None and time.time_ns() < f.hard_end(old.expires, old.lengths):
                # Whoever has stored or removed something meanwhile knows better.
                expected = Expected(old.stamp, or_stale=True)
                await self._ways.work(desk.store.writing.put_if, item, expected)
            else:
                await self._ways.put(desk, item)
            job.is_kept = True
        except ClosedError:
            _log.debug("%s: closed before a value was computed", desk.settings.directory)
        except ours(Exception) as error:
            self._flights.count("unstored")
            desk.lease.store.notices.log_once(
                "unstored", f"a value was computed and cannot be stored: {without_key(error)}"
            )

    # -- in the background --------------------------------------------------------------------

    async def _serve_stale(self, job: Job) -> Any:
        """The value that has expired, if it may still be served; it is computed anew meanwhile."""
        store = self._desk.store
        found = await self._ways.work(store.reading.fetch_stale, job.low, job.high, job.data)
        if found is None:
            return MISSING
        (payload, flags), slot = found
        if time.time_ns() >= slot.expires + job.terms.stale_nanoseconds:
            return MISSING
        value = self._decoded(job, payload, flags)
        if value is MISSING:
            return MISSING
        self._flights.count("stale")
        if not self._desk.settings.read_only:
            self._refresh(job, slot)
        return value

    def _refresh_early(self, key: Key, function: Function, terms: Terms) -> None:
        """Compute a value anew before it expires, the more likely the nearer that is, and the longer it
        takes: A. Vattani, F. Chierichetti, K. Lowenstein, "Optimal Probabilistic Cache Stampede Prevention",
        VLDB 2015. There whoever draws it computes it at once; here that is done in the background."""
        desk = self._desk
        low, high, _ = desk.identify(key)
        slot = desk.store.finding.lookup(low, high)
        if slot is None or not slot.flags & f.FLAG_TERMS or not slot.expires:
            return
        ahead = -math.log(1.0 - random.random()) * f.computing_time(slot.expires) * terms.beta
        if time.time_ns() + ahead >= slot.expires:
            self._refresh(Job(desk, key, function, terms), slot)

    def _refresh(self, job: Job, seen: Slot) -> None:
        """Have it computed anew, unless somebody is at it, or that has failed just now."""
        if not self._flights.begin_refresh(job.position):
            return
        try:
            begun = self._ways.refresh(partial(self._refreshed, job, seen), self._desk)
        except BaseException:
            self._flights.end_refresh(job.position)
            raise
        if not begun:
            self._flights.end_refresh(job.position)

    async def _refreshed(self, job: Job, seen: Slot) -> None:
        """Nobody waits for it, so nothing is raised but what ends the thread, or the task."""
        desk = self._desk
        try:
            if not self._locks.is_prepared:
                await self._ways.work(prepared, desk)
            outcome = await self._refreshed_once(job, seen)
            error = None if outcome is None else outcome.error
            is_done = outcome is None or job.is_kept
        except ClosedError:
            _log.debug("%s: closed before a value was computed anew", desk.settings.directory)
            return
        except ours(Exception) as failure:
            error = failure
        finally:
            self._end(job)
            self._flights.end_refresh(job.position)
        if error is None and is_done:
            self._flights.rested(job.position)
            return
        stale = f.stale_time(seen.expires) / 1e9
        self._flights.rest(job.position, _RESTS_MOST * stale if stale else math.inf)
        if error is None:  # it came off, and is not kept: the old value is served on
            return
        self._flights.count("failed_refreshes")
        desk.lease.store.notices.log_once(
            "refresh",
            "a value cannot be computed anew, the old one is served as long as it may be: "
            f"{type(error).__name__}: {without_key(error)}",
        )

    async def _refreshed_once(self, job: Job, seen: Slot) -> Outcome | None:
        """None if others do it, or have done it."""
        try:
            if self._flights.join(job.position, job.begin()) is not None:
                return None
            if not self._locks.take(job.claim_for(self._ways.task()), (job.position,)):
                return None
            slot = self._desk.store.finding.lookup(job.low, job.high)
            if slot is not None and slot.stamp != seen.stamp:
                return None
            job.replaces = seen
            return await self._computed(job)
        finally:
            self._end(job)


@callers
def _check(function: Function, terms: Terms, default_expire: float | None) -> None:
    if not callable(function):
        raise TypeError(f"function must be callable without arguments, not {type(function).__name__}")
    terms.check(default_expire)


def _holds(condition: Callable[[Any], Any], value: Any) -> bool:
    return bool(condition(value))  # which may raise, too: arrays have no truth value


def _check_names(desk: Desk, terms: Terms) -> None:
    """What is to be stored beside the value: errors are told before anything is computed."""
    desk.expires(terms.expire)
    if terms.tag is not None:
        desk.encode_tag(terms.tag)
    if terms.meta is not None:
        encode_meta(terms.meta)
