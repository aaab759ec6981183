"""The order of insertion, as far as it is known.

Where an entry stands is said by its record alone, so whoever wants the order reads the heads of all records.
What was found is kept: as long as an entry is there it stands where it stood, and whatever comes later stands
behind it. So the first one is found at once by who removes one after the other, and the last one by a look at
what is new.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

from ...store.format import PARTITIONS, REMOVED, S_HIGH, S_LOW, S_STAMP, W_CLOCK
from ...store.index import Index
from .entries import Entries, Row, is_hidden

__all__ = ["Order", "end_of"]

_WORDS = 4  # of an entry that is known: its place, its stamp, and its digest
END = 1 << 64
_HELD_UP = 2 * 10**9  # nanoseconds that a writer may take from drawing a stamp until the entry is shown


class _Known:
    """What a look at all entries has found."""

    def __init__(self, words: array[int], clock: int) -> None:
        self.words = words  # of each entry its place, its stamp, and its digest; in order
        self.begin = 0  # behind entries that are there no more
        self.clock = clock  # whatever has an earlier stamp was there, unless its writer was held up

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(place, low half of the digest) of all."""
        return zip(self.words[::_WORDS], self.words[2::_WORDS], strict=True)

    def row(self, entries: Entries, at: int) -> Row | None:
        """The entry, unless it has gone, or stands elsewhere since."""
        row = entries.row_of(self.words[at + 2], self.words[at + 3])
        return row if row is not None and row.place[0] == self.words[at] else None


class Order:
    """Of the entries of one cache, by (place, stamp). It has no hold on these: they are an argument."""

    def __init__(self) -> None:
        self._known = _Known(array("Q"), -1)  # threads that refresh it at once replace it one after the other

    def forward(self, entries: Entries, bound: int = END) -> Iterator[Row]:
        """Those that stand up to `bound`, from the first on. Each that was there all the time is met."""
        known = self._known if self._known.clock >= 0 else self._refreshed(entries)
        for at in range(known.begin, len(known.words), _WORDS):
            if known.words[at] > bound:
                break
            row = known.row(entries, at)
            if row is not None:
                yield row
            elif at == known.begin:
                known.begin = at + _WORDS
        yield from self._others(entries, known, bound)

    def _others(self, entries: Entries, known: _Known, bound: int) -> Iterator[Row]:
        """Those that were stored meanwhile, perhaps to a place that they had taken long before."""
        met, now = set(known), self._refreshed(entries)
        for number, (place, low) in enumerate(now):
            if place <= bound and (place, low) not in met:
                row = now.row(entries, number * _WORDS)
                if row is not None:
                    yield row

    def backward(self, entries: Entries) -> Iterator[Row]:
        """From the last one on. Each that was there all the time is met."""
        known = self._current(entries)
        for at in range(len(known.words) - _WORDS, -1, -_WORDS):
            if (row := known.row(entries, at)) is not None:
                yield row
        yield from self._others(entries, known, END)

    def _current(self, entries: Entries) -> _Known:
        """What is known, with what is new."""
        known = self._known
        if known.clock < 0 or _newest(entries) > known.clock:
            return self._refreshed(entries)
        return known

    def _refreshed(self, entries: Entries) -> _Known:
        """All that is there: the heads of those that are new are read."""
        clock, words = entries.store.current.index.words[W_CLOCK] - _HELD_UP, self._known.words
        before = {words[at + 2]: (words[at], words[at + 1]) for at in range(0, len(words), _WORDS)}
        found: list[tuple[int, int, int, int]] = []
        for low, high, stamp in _stamps(entries):
            if (there := before.get(low)) is not None and there[1] == stamp:
                found.append((*there, low, high))
                continue
            row = entries.row_of(low, high)
            if row is not None and not is_hidden(row.names.key):
                found.append((*row.place, low, high))
        found.sort()
        self._known = known = _Known(array("Q", [word for one in found for word in one]), clock)
        return known


def end_of(entries: Entries) -> int:
    """What is stored from now on stands behind this."""
    return max(entries.store.current.index.words[W_CLOCK], entries.last_place)


def _stamps(entries: Entries) -> Iterator[tuple[int, int, int]]:
    """(low, high, stamp) of all entries."""
    for part in range(PARTITIONS):
        yield from entries.store.current.look(partial(_stamps_of, part=part))


def _newest(entries: Entries) -> int:
    """The latest stamp, also of what has gone."""
    return max(entries.store.current.look(partial(_newest_of, part=part)) for part in range(PARTITIONS))


def _newest_of(index: Index, part: int) -> int:
    return max(index.column(index.partition_slots(part), S_STAMP), default=0)


def _stamps_of(index: Index, part: int) -> list[tuple[int, int, int]]:
    slots = index.partition_slots(part)
    columns = (index.column(slots, field) for field in (S_LOW, S_HIGH, S_STAMP))
    return [one for one in zip(*columns, strict=False) if one[0] > REMOVED]
