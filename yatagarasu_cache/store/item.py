"""One entry on its way into the cache, and what is written of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from xxhash import xxh3_64

from ..backends.base import Buffer
from . import format as f
from .eviction import Policy
from .format import Slot
from .index import Index

_SMALL_PIECE = 1 << 16  # bytes up to which to copy a piece is cheaper than a system call for it
# Bytes up to which to join pieces is cheaper than to write each: compiled code takes what is in one.
_SMALL_VALUE = 1 << 18


class Pieces:
    """A payload in several buffers, one behind the other, that nobody has copied together yet.

    `len()` is its bytes in total. They are written piece by piece, if they are so many that it pays. The
    memory may be somebody's, such as an array's: whoever changes it meanwhile gets a torn value, or one whose
    checksum fails, which is a miss.
    """

    __slots__ = ("_buffers", "_length")

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self._buffers = tuple(buffers)
        self._length = sum(map(len, self._buffers))

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return self.joined()

    @property
    def pieces(self) -> tuple[Buffer, ...]:
        """The buffers to write: what is small is joined with what is beside it."""
        return tuple(_gathered(self._buffers))

    def behind(self, header: bytes) -> Pieces:
        """The same behind a header."""
        return Pieces((header, *self._buffers))

    def joined(self) -> bytes:
        """All of it in one piece: the one copy that is made."""
        return b"".join(self._buffers)

    def at_best(self) -> Pieces | bytes:
        """As it costs least to be stored."""
        return self.joined() if self._length < _SMALL_VALUE else self


def _gathered(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    small: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if len(buffer) < _SMALL_PIECE:
            small.append(buffer)
            size += len(buffer)
        if small and (size >= _SMALL_PIECE or len(buffer) >= _SMALL_PIECE):
            yield b"".join(small)
            small, size = [], 0
        if len(buffer) >= _SMALL_PIECE:
            yield buffer
    if small:
        yield b"".join(small)


class Item(NamedTuple):
    """One entry to store. `expires` is in nanoseconds since the epoch, 0 for never.

    Of a value that comes in parts, or is in a file of its own, `payload` is empty.
    """

    low: int
    high: int
    key: bytes
    payload: Buffer | Pieces
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

    @property
    def data(self) -> Buffer:
        """The payload in one buffer."""
        payload = self.payload
        return payload.joined() if isinstance(payload, Pieces) else payload

    @property
    def pieces(self) -> tuple[Buffer, ...]:
        """The buffers of the payload."""
        payload = self.payload
        return payload.pieces if isinstance(payload, Pieces) else (payload,)

    def value_sum(self, pieces: tuple[Buffer, ...]) -> int:
        """`format.value_sum` of a payload in these buffers."""
        if len(pieces) == 1:
            return f.value_sum(pieces[0], self.low, self.flags)
        running = xxh3_64(seed=self.low ^ self.flags)
        for piece in pieces:
            running.update(piece)
        return running.intdigest()

    def under(self, seed: int) -> Item:
        """The same with the digest that its key has in a cache of this seed."""
        low, high = f.key_digest(self.key, seed)
        return self if (low, high) == self[:2] else self._replace(low=low, high=high)

    def draft(
        self, index: Index, policy: Policy, place: int, length: int, checksum: int, kind: int = f.PUT,
        created: int = 0,
    ) -> tuple[bytes, Slot]:  # fmt: skip
        """The head of the record for a place, and the slot that shows it, stamped as of now.

        `length`, `checksum`: those of the value, which stands behind the head, or in a file (`LARGE`).
        `created`: of a record that takes the place of another one of the same value; 0 means now.
        """
        created, stamp = created or time.time_ns(), index.stamp()
        head = f.pack_record(
            index.identity.seed, place, kind, self.flags, self.key, self.tag, self.meta,
            length, stamp, self.expires, created, checksum,
        )  # fmt: skip
        assert len(head) % f.ALIGN == 0
        lengths = f.pack_lengths(length, self.flags, len(head))
        return head, Slot(
            self.low, self.high, place, lengths, checksum, stamp, self.expires, policy.first(stamp)
        )
