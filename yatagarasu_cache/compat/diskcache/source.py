"""What diskcache has left in a directory: its database and files of values, read without executing
anything."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...errors import CacheIOError, FormatError
from ...store.strangers import DATABASE

__all__ = ["Source", "Stored"]

_BATCH = 1000  # rows read at once
_COLUMNS = "rowid, key, raw, expire_time, tag, size, mode, filename, value"


class Stored(NamedTuple):
    """A row of the database."""

    rowid: int
    key: Any
    raw: Any
    expire_time: float | None
    tag: Any
    size: Any
    mode: Any
    filename: Any
    value: Any


class Source:
    """One database, opened for reading alone, and the files that it names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._connection = _opened(directory / DATABASE)
        try:
            tables = self._all("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not {("Cache",), ("Settings",)} <= set(tables):
                raise FormatError(f"{directory} is no directory of diskcache: its database has other tables")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settings(self) -> dict[str, Any]:
        """Those that were kept."""
        found = self._all("SELECT key, value FROM Settings")
        return {name: value for name, value in found if type(name) is str}

    def count(self) -> int:
        return int(self._all("SELECT COUNT(*) FROM Cache")[0][0])

    def rows(self) -> Iterator[Stored]:
        """All of them, in the order of insertion."""
        last = -1
        while batch := self._all(
            f"SELECT {_COLUMNS} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?", last, _BATCH
        ):
            yield from map(Stored._make, batch)
            last = batch[-1][0]

    def _all(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, arguments).fetchall()
        except sqlite3.Error as error:
            raise CacheIOError(errno.EIO, f"{self.directory / DATABASE} cannot be read: {error}") from error

    def open(self, filename: Any) -> BinaryIO:
        """A file that the database names: one within the directory, and no link. Raises OSError."""
        if type(filename) is not str or not filename or "\0" in filename:
            raise OSError(errno.EINVAL, "the database names no file")
        parts = Path(filename).parts
        if Path(filename).is_absolute() or ".." in parts:
            raise OSError(errno.EPERM, "the database names a file outside of the directory", filename)
        at = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = below
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no regular file", filename)
        return open(fd, "rb")


def _text(data: bytes) -> str:
    """Of a column, also of one that is damaged: the others of its batch are not."""
    return data.decode("utf-8", "surrogateescape")


def _opened(path: Path) -> sqlite3.Connection:
    """Read-only. Where the directory can't be written to, and so has no room for the index of a log, as it
    stands."""
    for how in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=60)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA query_only = ON")
            connection.text_factory = _text
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
        except sqlite3.Error as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise CacheIOError(errno.EIO, f"{path} cannot be read: {failure}") from failure
