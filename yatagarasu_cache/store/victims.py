"""The entries that go first: those with the smallest access words, and those that have expired."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from . import format as f
from .format import MASK64, PARTITIONS, SLOT_WORDS
from .index import Index

EXACT_ENTRIES = 100_000  # up to here the order is exact over the whole cache
_EXACT_SHARE = 8  # an exact selection takes 1/8 of all entries at once: O(1) amortised a victim
_SHARE = 100  # beyond, 1 % of all, estimated from a sample: within the oldest 2 % of the cache
_MIN_BATCH = 64
_SAMPLE = 8192  # words from which the threshold of an exact selection is taken, and of another one:
_SHARE_SAMPLE = 16384


class Victim(NamedTuple):
    """An entry and the access word for which it was chosen: if that changed, it is none any more."""

    access: int
    low: int
    high: int
    at: int  # where it was, so that a damaged one, which its digest does not lead to, can go as well

    def is_there(self, index: Index) -> bool:
        """Whether the slot is still in its place, and as it was."""
        words, at = index.words, self.at
        if at + SLOT_WORDS > len(words) or index.partition_with(at) is None:
            return False
        return (words[at + f.S_ACCESS], words[at], words[at + 1]) == self[:3]


class Victims:
    """Chooses victims in batches, so that choosing costs O(1) amortised an entry.

    Stamps only grow, so a batch of the smallest words stays the next ones to go until it is used
    up; an entry touched since is passed over. Up to `EXACT_ENTRIES` that gives the exact order
    (for LFU as of the selection: what came since is not considered yet, and so gets its chance).
    Beyond, a sample says which word 1 % of all lie below (give or take 0.1 %), and one partition after
    the other gives up what lies below it: so they keep in step, and a selection looks at one of them.

    What has expired by the time of a selection goes before anything that has not.
    """

    def __init__(self) -> None:
        self._queue: deque[Victim] = deque()
        self._part = self._limit = 0

    def __call__(self, index: Index) -> Iterator[tuple[int, bool]]:
        """Slots of victims, next first, as long as there are any, and whether their digests lead to them.
        The lock is held while this runs."""
        while True:
            if not self._queue:
                self._select(index)
                if not self._queue:
                    return
            victim = self._queue.popleft()
            at = index.find(victim.low, victim.high)
            if at and index.words[at + f.S_ACCESS] == victim.access:
                yield at, True
            elif victim.at != at and victim.is_there(index):
                yield victim.at, False

    def _select(self, index: Index) -> None:
        count, everything = index.count(), range(PARTITIONS)
        if count <= EXACT_ENTRIES:
            wanted = max(_MIN_BATCH, count // _EXACT_SHARE)
            self._choose(index, everything, _threshold(index, everything, wanted, _SAMPLE))
            return
        for _ in range(2 * PARTITIONS):  # a round may have been used up but for empty ones
            if not self._part:
                self._limit = _threshold(index, everything, 1 + count // _SHARE, _SHARE_SAMPLE)
            self._choose(index, range(self._part, self._part + 1), self._limit)
            self._part = (self._part + 1) % PARTITIONS
            if self._queue:
                return

    def _choose(self, index: Index, parts: range, limit: int) -> None:
        now = time.time_ns()
        late = {
            Victim(index.words[at + f.S_ACCESS], index.words[at], index.words[at + 1], at): None
            for part in parts
            for at in expired(index, part, now)
        }
        self._queue.extend(late)
        self._queue.extend(victim for victim in up_to(index, parts, limit) if victim not in late)


def up_to(index: Index, parts: range, limit: int) -> list[Victim]:
    """Live entries of some partitions whose access words are not above `limit`, smallest first."""
    columns = [(slots, index.column(slots, f.S_ACCESS)) for slots in map(index.partition_slots, parts)]
    words = index.words
    found = [
        Victim(word, words[at], words[at + 1], at)
        for slots, column in columns
        for at, word in zip(slots, column, strict=True)
        if 0 < word <= limit and words[at] > f.REMOVED
    ]
    found.sort()
    return found


def _threshold(index: Index, parts: range, wanted: int, sample: int) -> int:
    """An access word that about `wanted` entries don't exceed; from a sample where there are many.

    Sorting all of them would take several times as long as looking at each once.
    """
    every = [index.partition_slots(part) for part in parts]
    step = max(1, sum(map(len, every)) // sample)
    found = sorted(word for slots in every for word in index.column(slots[::step], f.S_ACCESS) if word)
    if not found and step > 1:  # so few are left that the sample has missed them all
        return MASK64
    return found[min(len(found) - 1, max(0, wanted // step - 1))] if found else 0


def expired(index: Index, part: int, now: int) -> list[int]:
    """The live slots of a partition whose time is up at `now` (nanoseconds since the epoch), that in which
    they may be served stale included."""
    slots = index.partition_slots(part)
    column = index.column(slots, f.S_EXPIRES)
    if column.count(0) == len(column):  # as in caches that don't use expiry
        return []
    return [
        at
        for at, expires in zip(slots, column, strict=True)
        if 0 < expires <= now
        and index.words[at] > f.REMOVED
        and f.hard_end(expires, index.words[at + f.S_LENGTHS]) <= now
    ]


def ahead(index: Index, part: int, now: int) -> list[int]:
    """Those that are to expire later, and have stamps that are later than `now`."""
    slots = index.partition_slots(part)
    return [
        at
        for at, expires, stamp in zip(
            slots, index.column(slots, f.S_EXPIRES), index.column(slots, f.S_STAMP), strict=True
        )
        if expires > now and stamp > now + f.AHEAD and index.words[at] > f.REMOVED
    ]
