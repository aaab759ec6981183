"""What a cache is: an index over segments and large files, shared by threads and processes.

The store deals in digests and bytes; `cache.py` turns keys and values into these. The rules that
keep it right are few:

* a record is appended first, then the index is changed under the lock: a failure in between
  leaves the old value;
* records carry stamps, and the index always shows the record with the highest one, so segments
  and the log of changes alone tell what the index should say;
* whatever is read is verified against the slot that led there; a mismatch is looked at again
  under the lock, and only then dropped and counted.

Lock order: `appending` (threads of this handle), `reclaiming`, `checkpointing`, `lock` (everybody's).
"""

from ..reclaim import MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES
from .handle import ATTEMPTS, LARGE_VALUE_BYTES, Handle, closed_error
from .reading import Found, Names, Reading
from .removal import Gone, Removal
from .writing import Item, Writing

__all__ = [
    "ATTEMPTS",
    "LARGE_VALUE_BYTES", "MAX_SEGMENT_BYTES", "MIN_SEGMENT_BYTES", "DurableStore", "Found", "Gone", "Handle",
    "Item", "Names", "Reading", "Removal", "Store", "Writing", "closed_error",
]  # fmt: skip


class Store(Writing):
    """One open handle on a cache directory, with all layers."""


class DurableStore(Store):
    """The very same as another store, in all that it has, but for making durable what is done by it."""

    durable = True

    def __init__(self, store: Store) -> None:
        self.__dict__ = store.__dict__
        self.syncs_segments = True
