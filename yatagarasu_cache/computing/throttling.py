"""`throttle`: at most so many calls in any so many seconds, among all processes.

The cache holds the times of the last calls, also of those to come: whoever calls takes the next time that is
free, and waits until then. So nobody polls, and calls begin in the order in which they came. Who is
interrupted while he waits gives his time back; that of a process that is killed passes unused. If the entry
is evicted, counting begins anew.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..arguments import check_int
from ..codec import KIND_BYTES, Key
from ..concurrency.locks import calls_out
from ..desk import Desk
from ..errors import CacheError
from ..guard import callers
from ..store import format as f
from ..store.format import Slot
from ..store.item import Item
from .names import described, function_name

__all__ = [
    "Rate", "Turn", "check", "give_back", "plain", "put_off", "rate_of", "reserve",
]  # fmt: skip

_EXACT = 256  # calls whose times are kept one by one; of more, those of a moment are taken together
_MOST_CALLS = 10**9
_MOST_SECONDS = 1e8
_NAMESPACE = "yatagarasu_cache.throttle"
_PAIR = struct.Struct("<QQ")  # nanoseconds since the epoch, calls at that time
_NOW = struct.Struct("<Q")  # before these: when that was written
_SECOND = 10**9
_MOMENT = 20 * 10**6  # nanoseconds
_MOST_PAIRS = 3 * _EXACT


class Rate(NamedTuple):
    """So many calls in so many nanoseconds, counted together with all of that name."""

    most: int
    period: int
    key: Key

    def next(self, now: int, calls: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
        """When the next call may begin, and the times to be kept. `calls`: (when, how many), in order."""
        at, left, kept = now, self.most, len(calls)
        while kept and left > 0 and calls[kept - 1][0] + self.period > now:
            kept -= 1
            left -= calls[kept][1]
            if left <= 0:  # that many calls ago
                at = max(now, calls[kept][0] + self.period)
        calls = calls[kept:]
        noted = self.noted(at)
        if calls and calls[-1][0] >= noted:
            calls[-1] = calls[-1][0], calls[-1][1] + 1
        else:
            calls.append((noted, 1))
        return at, calls

    def noted(self, at: int) -> int:
        """What a call that begins then is kept as: later, if at all, so that there are never too many. It
        takes a moment until it does begin, and of very many those of a moment are kept together."""
        grain = 1 if self.most <= _EXACT else max(self.period // _EXACT, 1)
        return -(-(at + min(self.period // 20, _MOMENT)) // grain) * grain


class Turn(NamedTuple):
    """When a call may begin, and until when it counts as one that begins then."""

    rate: Rate
    begins_at: int
    noted: int

    @property
    def seconds_left(self) -> float:
        return max(self.begins_at - time.time_ns(), 0) / _SECOND

    @property
    def is_late(self) -> bool:
        return time.time_ns() > self.noted


def reserve(desk: Desk, rate: Rate) -> Turn:
    """Take the next time that is free. Atomic among all processes."""
    turn = Turn(rate, 0, 0)

    def next_turn(now: int, calls: list[tuple[int, int]]) -> list[tuple[int, int]]:
        nonlocal turn
        begins_at, calls = rate.next(now, calls)
        turn = Turn(rate, begins_at, calls[-1][0])
        return calls

    _change(desk, rate, next_turn)
    return turn


def put_off(desk: Desk, turn: Turn) -> None:
    """A call begins only now, when those after it must not count it as an earlier one."""

    def moved(now: int, calls: list[tuple[int, int]]) -> list[tuple[int, int]]:
        left = _without(turn, calls)
        return calls if left is None else sorted([*left, (turn.rate.noted(now), 1)])

    _change(desk, turn.rate, moved)


def give_back(desk: Desk, turn: Turn) -> None:
    """A call does not begin at all: others may have its time. Those who wait already keep theirs."""

    def without(now: int, calls: list[tuple[int, int]]) -> list[tuple[int, int]]:
        left = _without(turn, calls)
        return calls if left is None else left

    _change(desk, turn.rate, without)


def _without(turn: Turn, calls: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The other calls; None if that of the turn is not known any more."""
    if all(at != turn.noted for at, _ in calls):
        return None
    left = [(at, number - (at == turn.noted)) for at, number in calls]
    return [one for one in left if one[1]]


def _change(
    desk: Desk, rate: Rate, change: Callable[[int, list[tuple[int, int]]], list[tuple[int, int]]]
) -> None:
    """Replace the times that are kept by what `change(now, times)` returns."""
    where = desk.identify(rate.key)

    def decide(slot: Slot | None) -> Item:
        now = time.time_ns()
        found = None if slot is None else desk.store.reading.fetch(slot.low, slot.high, where[2])
        before = [] if found is None else _unpacked(bytes(found.payload), found.flags, now)
        calls = change(now, before)
        payload = _NOW.pack(now) + b"".join(_PAIR.pack(*call) for call in calls)
        last = calls[-1][0] if calls else now
        return Item(*where, payload, KIND_BYTES, last + rate.period)

    room = f.room_for(len(where[2]), _NOW.size + _MOST_PAIRS * _PAIR.size)
    desk.store.writing.change(where[2], room, decide)


def _unpacked(payload: bytes, flags: int, now: int) -> list[tuple[int, int]]:
    """The times of calls; none if these are no such bytes. Where the clock was set back, so are they."""
    if flags & f.CODEC_FLAGS != KIND_BYTES or len(payload) % _PAIR.size != _NOW.size:
        return []
    (then,) = _NOW.unpack_from(payload)
    back = max(then - now, 0)
    calls = [(at - back, number) for at, number in _PAIR.iter_unpack(payload[_NOW.size :])]
    sound = all(at > 0 and 0 < number <= _MOST_CALLS for at, number in calls) and calls == sorted(calls)
    return calls if sound and len(calls) <= _MOST_PAIRS else []


@callers
def check(count: int, seconds: float, name: str | None) -> None:
    check_int("count", count)
    if not 1 <= count <= _MOST_CALLS:
        raise ValueError(f"count must be from 1 to {_MOST_CALLS}, not {count}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, not {seconds!r}")
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"seconds must be more than 0, and at most {_MOST_SECONDS:g}, not {seconds!r}")
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"name must be a str that is not empty, or None, not {name!r}")


@callers
def rate_of(function: Any, count: int, seconds: float, name: str | None) -> Rate:
    """Of what was checked; named after the function unless there is a name."""
    if not callable(function):
        raise TypeError(f"throttle() decorates functions, not {type(function).__name__}")
    names = ("function", _name_of(function)) if name is None else (name,)
    return Rate(count, max(int(seconds * _SECOND), 1), (_NAMESPACE, *names))


def _name_of(function: Any) -> str:
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualified, str) or "<lambda>" in qualified:
        raise ValueError(f"{described(function)} has no name that tells it from others: give name=")
    return function_name(function)


def plain(
    function: Callable[..., Any], reserve: Callable[[], Turn], put_off: Callable[[Turn], None],
    give_back: Callable[[Turn], None],
) -> Callable[..., Any]:  # fmt: skip
    """`function`, which waits for its turn first."""

    @functools.wraps(function)
    @calls_out
    def throttled(*args: Any, **options: Any) -> Any:
        turn = reserve()
        try:
            time.sleep(turn.seconds_left)
        except BaseException:
            with contextlib.suppress(CacheError):  # what interrupts it matters more
                give_back(turn)
            raise
        if turn.is_late:
            put_off(turn)
        return function(*args, **options)

    return throttled
