"""Entries by their tags: from the tag tables of the index to records that say so themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..concurrency.cancelling import ensure_wanted
from ..errors import CacheIOError
from .current import CurrentIndex
from .finding import Finding
from .format import PARTITION_MASK, PARTITIONS, Slot, TagCell, tag_hash
from .index import Index, IndexDamaged
from .life import Life
from .locking import Locks
from .reading import Names, Reading
from .walks import Walks


class Tags:
    """Finds what has a tag without looking at anything else."""

    def __init__(
        self, life: Life, locks: Locks, current: CurrentIndex, finding: Finding, reading: Reading,
        walks: Walks,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._current = life, locks, current
        self._finding, self._reading, self._walks = finding, reading, walks

    def entries(
        self, tag: bytes, unread: list[CacheIOError] | None = None
    ) -> Iterator[tuple[Slot, Names]]:
        """Every live entry that has an encoded tag, expired or not, and what its record says. None appears
        twice. Entries written meanwhile may be left out.

        Costs what these cost, and a look at each partition. Raises `CacheIOError` if a record can't be read,
        or puts that into `unread` and goes on.
        """
        self._life.ensure_open()
        if self._life.read_only:
            self._current.follow_path()
        for part in range(PARTITIONS):
            ensure_wanted()
            self._life.ensure_open()
            cells = self._cells(part, tag)
            if cells is None:
                yield from self._by_walking(part, tag)
                return
            for digest, stamps in _versions(cells).items():
                try:
                    found = self._version(*digest, stamps, tag)
                except CacheIOError as error:
                    if unread is None:
                        raise
                    unread.append(error)
                    continue
                if found is not None:
                    yield found

    def _cells(self, part: int, tag: bytes) -> list[TagCell] | None:
        """The cells of a partition that may be of a tag. None if that can't be told: a handle that only reads
        can't mend what is damaged, nor keep others from changing it."""

        def question(index: Index) -> list[TagCell] | None:
            return index.tagged(part, tag_hash(tag, index.identity.seed))

        if not self._life.read_only:
            cells = self._current.look(question)
            if cells is None:
                with self._locks.index:
                    cells = self._current.look(question)
            return cells
        try:
            return question(self._current.index)
        except IndexDamaged as error:
            if not self._current.index.superseded:
                return None
            self._current.mend(error)
            return self._cells(part, tag)

    def _version(self, low: int, high: int, stamps: set[int], tag: bytes) -> tuple[Slot, Names] | None:
        """The slot of an entry, if it shows one of these versions, and if its record has the tag."""
        slot, place = self._finding.shown(low, high), 0
        while slot is not None and slot.stamp in stamps and slot.place != place:
            names = self._reading.names_of(slot)
            if names is not None:
                return (slot, names) if names.tag == tag else None
            place = slot.place
            slot = self._finding.shown(low, high)  # it may have been moved meanwhile
        return None

    def _by_walking(self, first_part: int, tag: bytes) -> Iterator[tuple[Slot, Names]]:
        """The entries of a tag in partitions from `first_part` on, by looking at all records."""
        for _, slot in self._walks.entries():
            if slot.high & PARTITION_MASK >= first_part:
                found = self._version(slot.low, slot.high, {slot.stamp}, tag)
                if found is not None:
                    yield found


def _versions(cells: Iterable[TagCell]) -> dict[tuple[int, int], set[int]]:
    """The stamps of each digest. Which of them is shown is not said by their order: whoever adds a cell may
    die, or be refused, before he shows what it is for."""
    found: dict[tuple[int, int], set[int]] = {}
    for cell in cells:
        found.setdefault((cell.low, cell.high), set()).add(cell.stamp)
    return found
