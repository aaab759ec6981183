"""What must be there for a change to be made: optimistic concurrency.

A version is the stamp of an entry's record: every `set` makes another one, above all that the key ever had;
cleaning, a rebuild and `touch` keep it. So whoever read a version can have a change made only if nobody else
came first (Kung and Robinson, "On Optimistic Methods for Concurrency Control", 1981).
"""

from __future__ import annotations

from typing import NamedTuple

from .format import FLAG_TERMS, Slot
from .item import Item

__all__ = ["ABSENT", "Expected"]


class Expected(NamedTuple):
    """The version that the live entry has to have; 0: there must be none.

    keeps_expiry: what is stored expires when the entry would have, as the last `touch` says, on its terms.
    or_stale: the entry may have expired, if it may still be served.
    """

    version: int
    keeps_expiry: bool = False
    or_stale: bool = False

    def is_met(self, slot: Slot | None) -> bool:
        """Whether `slot`, that of the live entry, is as expected."""
        return (0 if slot is None else slot.stamp) == self.version

    def settled(self, item: Item, slot: Slot | None) -> Item | None:
        """`item` as it is to be stored in the place of `slot`; None if it must not be. The lock is held."""
        if not self.is_met(slot):
            return None
        if slot is None or not self.keeps_expiry:
            return item
        return item._replace(expires=slot.expires, flags=item.flags | slot.flags & FLAG_TERMS)


ABSENT = Expected(0)
