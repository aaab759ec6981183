"""Walking over what a cache holds, values included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .store.format import Slot
from .store.reading import Found, Reading

__all__ = ["Content", "contents"]

_MOST, _MOST_BYTES = 64, 1 << 20  # entries whose values are read at once, and bytes of these


class Content:
    """An entry that was met, and its value as it was read then."""

    __slots__ = ("_found", "_reading", "_slot", "key")

    def __init__(self, reading: Reading, slot: Slot, key: bytes, found: Found | None) -> None:
        self._reading, self._slot, self.key, self._found = reading, slot, key, found

    def now(self) -> Found | None:
        """The value if it is still that of the key; None if `renewed` has to be asked. Does not block."""
        return self._found if self._reading.is_current(self._slot) else None

    def renewed(self) -> Found | None:
        """The value that the key has by now; None if it has none."""
        return self._reading.peek(self._slot.low, self._slot.high, self.key)


def contents(reading: Reading, live: Iterable[tuple[bytes, Slot]]) -> Iterator[list[Content]]:
    """The entries of a walk with their values, in batches of bounded size, and larger ones by themselves.

    Nothing is counted, nor touched in the eviction order.
    """
    batch: list[tuple[Slot, bytes]] = []
    size = 0
    for key, slot in live:
        if batch and (len(batch) == _MOST or size + slot.value_length > _MOST_BYTES):
            yield _read(reading, batch)
            batch, size = [], 0
        batch.append((slot, key))
        size += slot.value_length
    if batch:
        yield _read(reading, batch)


def _read(reading: Reading, batch: list[tuple[Slot, bytes]]) -> list[Content]:
    found = reading.peek_many(batch)
    return [Content(reading, slot, key, hit) for (slot, key), hit in zip(batch, found, strict=True)]
