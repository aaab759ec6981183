"""Large values: a file each, written under a temporary name and renamed into place when complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from xxhash import xxh3_64

from ..backends.base import Backend, Buffer, OpenFile
from ..concurrency.interruption import ours
from . import format as f
from .owners import Files, Made
from .unreadable import is_absence

if TYPE_CHECKING:
    from .core import PythonCore

CHUNK_BYTES = 1 << 20
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
    ) -> tuple[int, int]:  # fmt: skip
        """Write `parts` to a new file. (bytes, checksum seeded with `seed`); the file goes on failure.

        A value that is one part is written at once, others piece by piece.

        `account` is told of each part's bytes before they are written, and may raise. What needs room on
        the volume is done by `in_room`, which may try it several times.
        """
        parts = iter(parts)
        start = list(islice(parts, 2))
        create = partial(self._create, path)
        if len(start) == 1:  # all of it, syncing included, can be tried again
            value = start[0]
            account(len(value))

            def write(fd: int) -> int:
                return self._core.write_file(fd, value, seed)

            fill = partial(self._fill, path, create, write, sync=sync)
            return len(value), in_room(f.file_bytes(len(value)), fill)
        return self._fill(
            path, partial(in_room, 0, create),
            lambda fd: self._write_parts(fd, chain(start, parts), seed, account, in_room), sync=sync,
        )  # fmt: skip

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
    ) -> tuple[int, int]:
        checksum, size = xxh3_64(seed=seed), 0
        for part in chain.from_iterable(map(pieces, parts)):
            account(len(part))
            in_room(len(part), partial(self._backend.write, fd, [part], size))
            checksum.update(part)
            size += len(part)
        return size, checksum.intdigest()

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

    def read(self, low: int, high: int, pointer: int, length: int, *, seed: int) -> tuple[bytes, int] | None:
        """The whole file and its checksum; None if it is shorter than `length`."""
        path = self.path(low, high, pointer)
        with self._backend.reading(path) as fd:
            if os.lseek(fd, 0, os.SEEK_END) < length:  # first: memory for a damaged length may not be there
                return None
            return self._core.read_file(fd, length, seed)

    def checksum(self, low: int, high: int, pointer: int, *, seed: int) -> int | None:
        """Checksum of the content, read piece by piece; None if there is no such file."""
        checksum, offset = xxh3_64(seed=seed), 0
        path = self.path(low, high, pointer)
        try:
            with self._backend.reading(path) as fd:
                while data := self._backend.read(fd, CHUNK_BYTES, offset):
                    checksum.update(data)
                    offset += len(data)
        except ours(OSError) as error:
            if is_absence(error):
                return None
            raise
        return checksum.intdigest()

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


def pieces(data: Buffer) -> Iterator[memoryview]:
    """A value in pieces of CHUNK_BYTES, without copying."""
    view = memoryview(data)
    for at in range(0, len(view), CHUNK_BYTES):
        yield view[at : at + CHUNK_BYTES]
