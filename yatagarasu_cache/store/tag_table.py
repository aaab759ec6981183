"""Which entries have a tag: a table of cells for each partition of the index, in chains by the tag's hash.

A cell is added before the slot that it stands for is shown, and nobody takes it out: it counts only as
long as the slot of its digest has its stamp, so replacing, removing, evicting and expiring entries do nothing
here. A table that is full is made anew, with the cells that count, by `Index`. What is found by a hash is
looked at in the record, which has the tag itself.

Writers hold the lock. Readers take none: cells in a chain never change, so all that can come in between is
another table in this one's place (`is_in_place`). Where a table is now there may have been a partition, in
which somebody may still be searching: no cell begins like a slot does (`DIGEST_BIT`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import StorageFull
from . import format as f
from .damage import IndexDamaged
from .format import (
    CAPACITY_MASK,
    DESCRIPTOR_BITS,
    DIGEST_BIT,
    MASK32,
    NO_CELL,
    PARTITION_MASK,
    PARTITIONS,
    SLOT_WORDS,
    TAG_CELL_SLOTS,
    TAG_CELL_WORDS,
    TAG_CELLS,
    TAG_TABLE_WORDS,
    W_TAGS,
    TagCell,
)

LEAST_SLOTS = 8  # of a table, with 14 cells and 4 chains
TAG_LEAST_GROWTH = 1.75  # a table that is made anew has room for 1.75 to 2.25 times its cells, by its number,
TAG_GROWTH_SPREAD = 0.5  # so that they don't all grow at once
_CELLS, _DESCRIPTOR, _NUMBER = (f.TagTable._fields.index(name) for name in ("cells", "descriptor", "number"))
_STAMP, _LINK = TagCell._fields.index("stamp"), TagCell._fields.index("link")


def growth(part: int) -> float:
    """How many times its cells a table that is made anew has room for."""
    return TAG_LEAST_GROWTH + TAG_GROWTH_SPREAD * (part * 37 % PARTITIONS) / PARTITIONS


def slots_for(cells: int, factor: float) -> int:
    """The slots that a table takes which has room for `factor` times as many cells, and one more."""
    slots = max(LEAST_SLOTS, (int((cells + 1) * factor) // TAG_CELLS + 1) * TAG_CELL_SLOTS)
    if slots > CAPACITY_MASK:
        raise StorageFull(errno.ENOSPC, "the index is full: spread the entries over several caches")
    return slots


class TagTable:
    """The table that the descriptor of a partition leads to, all of which is mapped.

    `words`: the index's. Raises `IndexDamaged` if it can't be one: then it may also be that another one has
    taken its place, if the lock is not held.
    """

    def __init__(self, words: Any, part: int, descriptor: int) -> None:
        self._words, self._part, self._descriptor = words, part, descriptor
        slots = descriptor & CAPACITY_MASK
        self._base = (descriptor >> DESCRIPTOR_BITS) * SLOT_WORDS
        self._first_cell = self._base + slots
        self._chains = slots - TAG_TABLE_WORDS
        self.room = slots // TAG_CELL_SLOTS * TAG_CELLS
        if slots < LEAST_SLOTS or slots % TAG_CELL_SLOTS or words[self._base + _DESCRIPTOR] != descriptor:
            raise IndexDamaged("there is no tag table where one should be")
        self._number = words[self._base + _NUMBER]

    @property
    def is_in_place(self) -> bool:
        """False if another one has taken its place, and what was read may be of anything."""
        words = self._words
        there = words[W_TAGS + self._part], words[self._base + _NUMBER]
        return bool(there == (self._descriptor, self._number))

    @property
    def count(self) -> int:
        """Cells in use, whether they count or not."""
        count: int = self._words[self._base + _CELLS]
        if count > self.room:
            raise IndexDamaged("a tag table has more cells than it has room for")
        return count

    def add(self, low: int, high: int, stamp: int, tag_hash: int) -> None:
        """Add a cell, for which there is room. The chain comes last: whoever dies before that has done
        nothing. The lock is held."""
        words, number = self._words, self.count + 1
        chain = self._chain_of(tag_hash)
        length, first = self._chain(chain)
        at = self._first_cell + (number - 1) * TAG_CELL_WORDS
        words[at], words[at + 1], words[at + _STAMP] = low ^ DIGEST_BIT, high, stamp
        words[at + _LINK] = tag_hash << 32 | first
        words[self._base + _CELLS] = number
        words[chain] = length + 1 << 32 | number

    def _chain_of(self, tag_hash: int) -> int:
        """The word of the chain that a hash is in."""
        return self._base + TAG_TABLE_WORDS + tag_hash % self._chains

    def _chain(self, at: int) -> tuple[int, int]:
        """How many cells a chain has, and the first of them."""
        word = self._words[at]  # once: it changes
        length, first = word >> 32, word & MASK32
        if length > self.count or (not 0 < first <= self.count if length else first != NO_CELL):
            raise IndexDamaged("a chain of a tag table is longer or shorter than it can be")
        return length, first

    def _in_chain(self, at: int) -> Iterator[TagCell]:
        """The cells of a chain, newest first."""
        words, chain = self._words, at - self._base - TAG_TABLE_WORDS
        left, number = self._chain(at)
        while left:
            if not 0 < number <= self.room:
                raise IndexDamaged("a chain of a tag table leads out of it")
            start = self._first_cell + (number - 1) * TAG_CELL_WORDS
            low, high, stamp, link = words[start : start + TAG_CELL_WORDS].tolist()
            tag_hash, is_possible = link >> 32, not low & DIGEST_BIT and high & PARTITION_MASK == self._part
            if not is_possible or not tag_hash or tag_hash % self._chains != chain:
                raise IndexDamaged("a cell of a tag table is where it cannot be")
            yield TagCell(low ^ DIGEST_BIT, high, stamp, link)
            left, number = left - 1, link & MASK32
        if number != NO_CELL:
            raise IndexDamaged("a chain of a tag table is longer than it says")

    def of_hash(self, tag_hash: int) -> list[TagCell]:
        """The cells of a tag, and of all others that have its hash."""
        return [cell for cell in self._in_chain(self._chain_of(tag_hash)) if cell.tag_hash == tag_hash]

    def in_chains(self) -> Iterator[TagCell]:
        """All cells that a search finds: what has been added is looked at in every way."""
        first = self._base + TAG_TABLE_WORDS
        for chain in range(first, first + self._chains):
            yield from self._in_chain(chain)

    @property
    def words(self) -> memoryview:
        """The cells in use, as they stand one behind the other."""
        found: memoryview = self._words[
            self._first_cell : self._first_cell + self.count * TAG_CELL_WORDS
        ]
        return found


def cells_of(words: memoryview) -> list[TagCell]:
    """Cells that stand one behind the other."""
    lows, highs, stamps, links = (words[field::TAG_CELL_WORDS].tolist() for field in range(TAG_CELL_WORDS))
    return [
        TagCell(low ^ DIGEST_BIT, high, stamp, link)
        for low, high, stamp, link in zip(lows, highs, stamps, links, strict=True)
    ]


def image(part: int, cells: Iterable[TagCell]) -> bytearray:
    """A table of these cells, with room for as many again. It says nothing yet of where it is."""
    found = list(cells)
    slots = slots_for(len(found), growth(part))
    made = bytearray(slots * f.SLOT_BYTES)
    words = memoryview(made).cast("Q")
    chains = [0] * (slots - TAG_TABLE_WORDS)
    firsts = [NO_CELL] * len(chains)
    at = slots
    for number, (low, high, stamp, link) in enumerate(found, 1):
        tag_hash = link >> 32
        chain = tag_hash % len(chains)
        words[at], words[at + 1], words[at + _STAMP] = low ^ DIGEST_BIT, high, stamp
        words[at + _LINK] = tag_hash << 32 | firsts[chain]
        chains[chain], firsts[chain] = chains[chain] + 1, number
        at += TAG_CELL_WORDS
    words[_CELLS] = len(found)
    for chain, (length, first) in enumerate(zip(chains, firsts, strict=True), TAG_TABLE_WORDS):
        words[chain] = length << 32 | first
    return made


def place(made: bytearray, descriptor: int, number: int) -> None:
    """Let a table say where it is, and that it is no other."""
    words = memoryview(made).cast("Q")
    words[_DESCRIPTOR], words[_NUMBER] = descriptor, number
