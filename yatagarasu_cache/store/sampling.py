"""Some entries, chosen by chance: what is in a cache, at a cost that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import CacheIOError
from . import format as f
from .format import PARTITIONS, Slot
from .index import Index
from .reading import Names

if TYPE_CHECKING:
    from .store import Store

__all__ = ["sample"]

_TRIES = 16  # slots looked at for each entry that is wanted: an index has room for some times what is in it
_LONGEST_HEAD = 16 << 10  # bytes of key, tag and metadata: what has more of them is left out, for it costs


def sample(store: Store, most: int, below: Callable[[int], int]) -> list[tuple[Names, Slot]]:
    """Up to `most` live entries, each as likely as any other, and what their records say.

    below: a number below another one, by chance (`random.randrange`). Where there are few slots, they are
    looked at in the order of the index, which is by digest. Nothing is counted or touched, no lock is taken,
    no value is read. What cannot be read is left out.
    """
    found = []
    for slot in store.current.look(lambda index: list(_slots(index, most, below))):
        if store.finding.is_over(slot):
            continue
        try:
            names = store.reading.names_of(slot)
        except CacheIOError:
            continue
        if names is not None:
            found.append((names, slot))
    return found


def _slots(index: Index, most: int, below: Callable[[int], int]) -> Iterator[Slot]:
    parts = [index.partition_slots(part) for part in range(PARTITIONS)]
    there = sum(map(len, parts))
    places = range(there) if there <= _TRIES * most else (below(there) for _ in range(_TRIES * most))
    seen: set[int] = set()
    for place in places:
        at = _at(parts, place)
        if at in seen:
            continue
        seen.add(at)
        slot = index.slot(at)
        if slot.low > f.REMOVED and slot.is_possible and slot.head_bytes <= _LONGEST_HEAD:
            yield slot
            most -= 1
            if not most:
                return


def _at(parts: list[range], place: int) -> int:
    """Where the slot is that is so far into all partitions, one behind the other."""
    for part in parts:
        if place < len(part):
            return part[place]
        place -= len(part)
    raise AssertionError("beyond all partitions")
