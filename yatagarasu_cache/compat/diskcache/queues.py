"""Queues in a cache: consecutive keys, whole numbers or ``prefix-number``, of which the first and the last
are noted, so that nobody has to look for them.

What is noted is only a hint: without it (it may be evicted) all keys are looked through, and whoever stores
such a key otherwise, beyond what is noted, removes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...codec import encode_key
from .entries import Entries

__all__ = ["FIRST", "SHORTEST", "Queue", "is_of_queue", "queue_of"]

FIRST = 500_000_000_000_000
"""The number of the first key of a queue. It grows in both directions."""

_END = 999_999_999_999_999  # no number is as large
_DIGITS = 15
SHORTEST = _DIGITS + 1  # characters of a text that is the key of a queue
_STEPS = 256  # of missing keys one after the other, before all are looked through


def queue_of(key: Any) -> str | None | bool:
    """The prefix of the queue that a key belongs to, None for that of whole numbers; False for any other
    key."""
    if type(key) is int:
        return None if 0 < key < _END else False
    if type(key) is str and len(key) > _DIGITS and key[-_DIGITS - 1] == "-":
        number = key[-_DIGITS:]
        if number.isascii() and number.isdigit():
            return key[: -_DIGITS - 1]
    return False


def is_of_queue(key: Any) -> bool:
    return queue_of(key) is not False


class _Span(NamedTuple):
    """Numbers from `first` on and below `end`: all keys of the queue are within."""

    first: int
    end: int


class Queue:
    """One queue. Nobody else changes entries while a method runs."""

    def __init__(self, entries: Entries, prefix: str | None) -> None:
        self._entries, self._prefix = entries, prefix
        self._hint = "queue" if prefix is None else f"queue {prefix}"

    def key(self, number: int) -> Any:
        return number if self._prefix is None else f"{self._prefix}-{number:0{_DIGITS}d}"

    def next_number(self, side: str) -> int:
        """That of the key to come at the ``back``, or ``front``."""
        span = self._tightened()
        if span.first >= span.end:
            return FIRST
        return span.end if side == "back" else span.first - 1

    def note(self, number: int) -> None:
        """An entry of that number is there."""
        span = self._span()
        if span.first >= span.end:
            span = _Span(number, number + 1)
        self._set(_Span(min(span.first, number), max(span.end, number + 1)))

    def admit(self, number: int) -> None:
        """An entry of that number is about to be there, and others change entries, too."""
        noted = self._noted()
        if noted is not None and not noted.first <= number < noted.end:
            self._entries.unhide(self._hint)

    def number_at(self, side: str) -> int | None:
        """The number of the first or last key; None if there is none."""
        span = self._tightened()
        if span.first >= span.end:
            return None
        return span.first if side == "front" else span.end - 1

    def span(self) -> _Span:
        """The numbers that all keys are within. Others may change entries, too."""
        return self._tightened(notes=False)

    def _tightened(self, notes: bool = True) -> _Span:
        """The span from the first key that is there to the last."""
        span = before = self._span()
        for _ in range(_STEPS):
            if span.first >= span.end or self._has(span.first):
                break
            span = span._replace(first=span.first + 1)
        else:
            return self._looked_for()
        for _ in range(_STEPS):
            if span.first >= span.end or self._has(span.end - 1):
                break
            span = span._replace(end=span.end - 1)
        else:
            return self._looked_for()
        if notes and span != before:
            self._set(span)
        return span

    def _has(self, number: int) -> bool:
        entries = self._entries
        low, high, data = entries.identify(encode_key(self.key(number)))
        slot = entries.store.finding.shown(low, high)
        return slot is not None and entries.store.finding.is_of(slot, data)

    def _span(self) -> _Span:
        return self._noted() or self._looked_for()

    def _noted(self) -> _Span | None:
        noted = self._entries.hidden(self._hint)
        if type(noted) is tuple and len(noted) == 2 and all(type(one) is int for one in noted):
            return _Span(*noted)
        return None

    def _looked_for(self) -> _Span:
        numbers = list(self._numbers())
        span = _Span(min(numbers), max(numbers) + 1) if numbers else _Span(FIRST, FIRST)
        self._set(span)
        return span

    def _numbers(self) -> Iterator[int]:
        for row in self._entries.rows():
            key = self._entries.plain_key(row)
            if queue_of(key) == self._prefix and is_of_queue(key):
                yield key if self._prefix is None else int(key[-_DIGITS:])

    def _set(self, span: _Span) -> None:
        self._entries.hide(self._hint, tuple(span))


def keep_hint_right(entries: Entries, key: Any) -> None:
    """Somebody stores that key otherwise: if it is a queue's, what is noted must not leave it out."""
    prefix = queue_of(key)
    if prefix is False:
        return
    queue = Queue(entries, prefix)  # type: ignore[arg-type]
    number = key if prefix is None else int(key[-_DIGITS:])
    queue.admit(number)
