"""Large values: a file each, written under a temporary name and renamed into place when complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..backends.base import Backend, Buffer, OpenFile
from ..concurrency.interruption import ours
from . import format as f
from .chunks import PIECE_BYTES, RunningSums, listed
from .format import CHUNK_BYTES, CHUNK_SUM_BYTES, chunks_a_sum
from .owners import Files, Made
from .unreadable import is_absence

if TYPE_CHECKING:
    from .core import PythonCore

T = TypeVar("T")


class InRoom(Protocol):
    def __call__(self, need: int, change: Callable[[], T]) -> T:
        """What `change()`, which needs so many bytes, returns once there is room for them."""


class LargeFiles:
    """The directory of large values."""

    def __init__(
        self, backend: Backend, root: str, mode: int, core: PythonCore, made: Made, files: Files
    ) -> None:
        self._backend, self._mode, self._core, self._made, self._files = backend, mode, core, made, files
        self.directory = os.path.join(root, f.LARGE_NAME)

    def path(self, low: int, high: int, pointer: int) -> str:
        return os.path.join(self.directory, f.large_name(low, high, pointer))

    def write(
        self, path: str, parts: Iterable[Buffer], seed: int, *, sync: bool, account: Callable[[int], None],
        in_room: InRoom,
    ) -> tuple[int, bytes]:  # fmt: skip
        """Write `parts` to a new file. (bytes, what the record lists of the sums of its chunks, which are
        seeded with `seed`); the file goes on failure.

        A value that is there as a whole, in a tuple of parts, or as one part, is written at once, others
        piece by piece.

        `account` is told of each part's bytes before they are written, and may raise. What needs room on
        the volume is done by `in_room`, which may try it several times.
        """
        create = partial(self._create, path)
        if not isinstance(parts, tuple):
            parts = iter(parts)
            start = tuple(islice(parts, 2))
            if len(start) > 1:
                length, sums = self._fill(
                    path, partial(in_room, 0, create),
                    lambda fd: self._write_parts(fd, chain(start, parts), seed, account, in_room), sync=sync,
                )  # fmt: skip
                return length, listed(sums, length, seed)
            parts = start
        whole, length = parts, sum(map(len, parts))
        account(length)

        def write(fd: int) -> bytes:
            return self._core.write_file(fd, whole, seed)

        # All of it, syncing included, can be tried again.
        fill = partial(self._fill, path, create, write, sync=sync)
        return length, listed(in_room(f.file_bytes(length), fill), length, seed)

    def _create(self, path: str) -> OpenFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file: OpenFile = self._made(partial(self._backend.opened, path, flags, self._mode))
        return file

    def _fill(
        self, path: str, create: Callable[[], OpenFile], write: Callable[[int], T], *, sync: bool
    ) -> T:  # fmt: skip
        """What `write` gives, which fills the new file. On failure the file goes."""
        try:
            with create() as fd:
                done = write(fd)
                if sync:
                    self._backend.sync(fd)
        except BaseException:
            self._backend.clear_away(path)
            raise
        return done

    def _write_parts(
        self, fd: int, parts: Iterable[Buffer], seed: int, account: Callable[[int], None], in_room: InRoom
    ) -> tuple[int, bytes]:
        sums, size = RunningSums(seed), 0
        for part in chain.from_iterable(map(pieces, parts)):
            account(len(part))
            in_room(len(part), partial(self._backend.write, fd, [part], size))
            sums.update(part)
            size += len(part)
        return size, sums.packed()

    def publish(
        self, temporary: str, low: int, high: int, pointer: int, *, sync: bool, in_room: InRoom
    ) -> None:
        """Give a complete file its name."""
        replace = partial(self._backend.replace, temporary, self.path(low, high, pointer))
        in_room(0, partial(self._made, replace))
        if sync:
            self._made(partial(self._backend.sync_directory, self.directory))

    def open(self, low: int, high: int, pointer: int) -> int:
        return self._backend.open(self.path(low, high, pointer), os.O_RDONLY)

    def read(
        self, low: int, high: int, pointer: int, length: int, *, flags: int
    ) -> tuple[bytes | bytearray, bytes] | None:
        """The whole file, and what the record lists for it; None if it is shorter than `length`."""
        path, seed = self.path(low, high, pointer), low ^ flags
        with self._backend.reading(path) as fd:
            if os.lseek(fd, 0, os.SEEK_END) < length:  # first: memory for a damaged length may not be there
                return None
            found = self._core.read_chunks(fd, 0, length, seed, flags)
        return None if found is None else (found[0], listed(found[1], length, seed))

    def sums(self, fd: int, length: int, *, seed: int) -> bytes | None:
        """What the record lists for the content of an open file, which is not kept; None if it is shorter."""
        sums = self._core.sum_chunks(fd, 0, length, seed)
        return None if sums is None else listed(sums, length, seed)

    def sums_of(self, low: int, high: int, pointer: int, length: int, *, flags: int) -> bytes | None:
        """The same of a file by its name; None also if there is none."""
        try:
            with self._backend.reading(self.path(low, high, pointer)) as fd:
                return self.sums(fd, length, seed=low ^ flags)
        except ours(OSError) as error:
            if is_absence(error):
                return None
            raise

    def chunked(self, fd: int, length: int, seed: int, sums: bytes) -> ChunkedFile:
        """An open file by its chunks."""
        return ChunkedFile(self._core, fd, length, seed, sums)

    def ensure_there(self, low: int, high: int, pointer: int) -> None:
        """FileNotFoundError if the file is not there (any more)."""
        self._backend.lstat(self.path(low, high, pointer))

    def remove(self, low: int, high: int, pointer: int) -> bool:
        return self._backend.unlink(self.path(low, high, pointer))

    def listed(self) -> Iterator[tuple[tuple[int, int, int], int, str]]:
        """((low, high, pointer), bytes, path) of each file whose name is one of ours."""
        for name, status in self._files(self.directory):
            parsed = f.parse_large_name(name)
            if parsed is not None:
                yield parsed, status.st_size, os.path.join(self.directory, name)


class ChunkedFile:
    """The open file of a large value, with a list of sums that was verified.

    Parts begin at multiples of `unit`, and end there or with the value: so much one sum of the list is for.
    """

    def __init__(self, core: PythonCore, fd: int, length: int, seed: int, sums: bytes) -> None:
        self._core, self._seed, self._sums = core, seed, sums
        self.fd, self.length, self.unit = fd, length, chunks_a_sum(length) * CHUNK_BYTES

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The least part that has the bytes from `start` to `end`, which are within the value."""
        return start - start % self.unit, min(end + -end % self.unit, self.length)

    def is_sound(self, start: int, end: int) -> bool:
        """Whether these bytes, and those around them in their part, are what was stored."""
        if start >= end:
            return True
        start, end = self.span(start, end)
        return self._fits(start, self._core.sum_chunks(self.fd, start, end - start, self._seed))

    def read(self, start: int, end: int) -> Buffer | None:
        """A part; None if it is damaged."""
        found = self._core.read_chunks(self.fd, start, end - start, self._seed, 0)
        return found[0] if found is not None and self._fits(start, found[1]) else None

    def read_into(self, start: int, view: memoryview) -> bool:
        """The same into memory of the caller's, which is wiped if the part is damaged: then this is False."""
        sound = False
        try:
            sound = self._fits(start, self._core.read_chunks_into(self.fd, start, view, self._seed))
        finally:
            if not sound:
                view[:] = bytes(len(view))
        return sound

    def _fits(self, start: int, sums: bytes | None) -> bool:
        """Whether these are the sums of the chunks from `start` on; None if the file ended there."""
        if sums is None:
            return False
        found, at = listed(sums, self.length, self._seed), start // self.unit * CHUNK_SUM_BYTES
        return self._sums[at : at + len(found)] == found


def pieces(data: Buffer) -> Iterator[memoryview]:
    """A value in pieces of PIECE_BYTES, without copying."""
    view = memoryview(data)
    for at in range(0, len(view), PIECE_BYTES):
        yield view[at : at + PIECE_BYTES]
