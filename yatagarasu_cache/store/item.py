"""One entry on its way into the cache, and what is written of it."""

from __future__ import annotations

import time
from typing import NamedTuple

from ..backends.base import Buffer
from . import format as f
from .eviction import Policy
from .format import Slot
from .index import Index


class Item(NamedTuple):
    """One entry to store. `expires` is in nanoseconds since the epoch, 0 for never.

    Of a value that comes in parts, or is in a file of its own, `payload` is empty.
    """

    low: int
    high: int
    key: bytes
    payload: Buffer
    flags: int
    expires: int = 0
    tag: bytes = b""
    meta: bytes = b""

    @property
    def names_length(self) -> int:
        """Bytes of key, tag and metadata."""
        return len(self.key) + len(self.tag) + len(self.meta)

    @property
    def room(self) -> int:
        """Bytes that it takes in a segment at most."""
        return f.room_for(self.names_length, len(self.payload))

    def under(self, seed: int) -> Item:
        """The same with the digest that its key has in a cache of this seed."""
        low, high = f.key_digest(self.key, seed)
        return self if (low, high) == self[:2] else self._replace(low=low, high=high)

    def draft(
        self, index: Index, policy: Policy, place: int, length: int, checksum: int, kind: int = f.PUT
    ) -> tuple[bytes, Slot]:
        """The head of the record for a place, and the slot that shows it, stamped as of now.

        `length`, `checksum`: those of the value, which stands behind the head, or in a file (`LARGE`).
        """
        created, stamp = time.time_ns(), index.stamp()
        head = f.pack_record(
            index.identity.seed, place, kind, self.flags, self.key, self.tag, self.meta,
            length, stamp, self.expires, created, checksum,
        )  # fmt: skip
        assert len(head) % f.ALIGN == 0
        lengths = f.pack_lengths(length, self.flags, len(head))
        return head, Slot(
            self.low, self.high, place, lengths, checksum, stamp, self.expires, policy.first(stamp)
        )
