"""Checksums of large values by chunks, so that a part of one costs what that part costs.

A sum is the XXH3-64 of a chunk. A record lists them all; of a very long value, where that would be too many,
it lists sums of the sums of some chunks. Chunks of 64 KiB are summed as fast as longer ones (64 MiB take
6.7 ms, in chunks of 16 KiB 9.4), and whoever reads 64 KiB anywhere in 600 MiB sums the list in 4 us and two
chunks in 6: with chunks half or twice as long both together take no less.
"""

from __future__ import annotations

from xxhash import xxh3_64, xxh3_64_intdigest

from ..backends.base import Buffer
from .format import CHUNK_BYTES, CHUNK_SUM_BYTES, chunks_a_sum

PIECE_BYTES = 1 << 20  # of a long value, read or written at once


def _packed(number: int) -> bytes:
    return number.to_bytes(CHUNK_SUM_BYTES, "little")


class RunningSums:
    """The sums of the chunks of bytes that come in pieces of any size."""

    def __init__(self, seed: int) -> None:
        self._seed, self._sums = seed, bytearray()
        self._open, self._lacking = xxh3_64(seed=seed), CHUNK_BYTES  # of the chunk that has not ended

    def update(self, data: Buffer) -> None:
        view, at = memoryview(data), 0
        while at < len(view):
            if self._lacking == CHUNK_BYTES and len(view) - at >= CHUNK_BYTES:
                self._sums += _packed(xxh3_64_intdigest(view[at : at + CHUNK_BYTES], self._seed))
                at += CHUNK_BYTES
                continue
            part = view[at : at + self._lacking]
            self._open.update(part)
            at += len(part)
            self._lacking -= len(part)
            if not self._lacking:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._sums += _packed(self._open.intdigest())
        self._open, self._lacking = xxh3_64(seed=self._seed), CHUNK_BYTES

    def packed(self) -> bytes:
        """All sums. Nothing comes after that."""
        if self._lacking < CHUNK_BYTES:
            self._end_chunk()
        return bytes(self._sums)


def listed(sums: bytes, length: int, seed: int) -> bytes:
    """What a record of a value of `length` bytes lists for chunks with these sums."""
    step = chunks_a_sum(length) * CHUNK_SUM_BYTES
    if step == CHUNK_SUM_BYTES:
        return sums
    return b"".join(
        _packed(xxh3_64_intdigest(sums[at : at + step], seed)) for at in range(0, len(sums), step)
    )
