"""What diskcache has left in a directory: its database and files of values, read without executing
anything."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...concurrency.interruption import ours
from ...errors import CacheIOError, FormatError, from_os_error
from ...store.strangers import DATABASE, databases

__all__ = ["Damaged", "Source", "Stored", "opened_sources"]

_BATCH = 1000  # rows read at once
_LOGS = ("-wal", "-journal")  # what a database has beside it, which belongs to it
_COLUMNS = "rowid, key, raw, expire_time, tag, size, mode, filename, value"


class Damaged(CacheIOError):
    """A database cannot be read."""


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
        self._copy: Path | None = None
        self._connection = self._opened(directory / DATABASE)
        try:
            tables = self._all("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not {("Cache",), ("Settings",)} <= set(tables):
                raise FormatError(f"{directory} is no directory of diskcache: its database has other tables")
        except BaseException:
            self.close()
            raise

    def _opened(self, path: Path) -> sqlite3.Connection:
        """Read-only. Where the directory can't be written to, it has no room for the index of a log: then as
        it stands, or, if there is something in the log, a private copy of both."""
        try:
            return _connected(path, "mode=ro")
        except sqlite3.Error as error:
            failure = error
        try:
            if not any(map(_has_content, _beside(path))):
                return _connected(path, "mode=ro&immutable=1")
            self._copy = _copied(path)
            return _connected(self._copy / DATABASE, "mode=rw")
        except sqlite3.Error as error:
            self._remove_copy()
            raise CacheIOError(errno.EIO, f"{path} cannot be read: {error}") from failure

    def close(self) -> None:
        self._connection.close()
        self._remove_copy()

    def _remove_copy(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settings(self) -> dict[str, Any]:
        """Those that were kept."""
        found = self._all("SELECT key, value FROM Settings")
        return {name: value for name, value in found if type(name) is str}

    def count(self) -> int:
        """How many entries there are."""
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
            raise Damaged(errno.EIO, f"{self.directory / DATABASE} cannot be read: {error}") from error

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


def opened_sources(root: Path) -> tuple[list[Source], dict[str, str]]:
    """What can be read in the directory of a `Cache` or `FanoutCache`, and what cannot: shards, and why.

    Shards are numbered, so that one that is missing between others is known. Raises `FormatError` if it is no
    such directory, `CacheIOError` if nothing of it can be read.
    """
    places = databases(root)
    if not places or places == [root]:
        if not os.path.lexists(root / DATABASE):
            raise FormatError(f"{os.fspath(root)!r} is no directory of diskcache: it has no {DATABASE}")
        if not places:
            raise CacheIOError(errno.EINVAL, f"{root / DATABASE} is damaged: it is no database")
        return [Source(root)], {}
    sources: list[Source] = []
    damaged: dict[str, str] = {}
    try:
        for shard in _numbered(root):
            why = _why_none(shard)
            try:
                if not why:
                    sources.append(Source(shard))
            except (FormatError, CacheIOError) as error:
                why = str(error.args[-1])
            if why:
                damaged[os.fspath(shard)] = why
        if not sources:
            raise CacheIOError(errno.EIO, "; ".join(damaged.values()))
    except BaseException:
        for one in sources:
            one.close()
        raise
    return sources, damaged


def _numbered(root: Path) -> list[Path]:
    """All shards that there are, or must have been: each below the last one."""
    names = {one.name for one in root.iterdir() if one.name.isascii() and one.name.isdigit()}
    last = max(int(name) for name in names if len(name) == 3)
    while str(last + 1) in names:  # more than 1000 have longer names
        last += 1
    return [root / f"{number:03d}" for number in range(last + 1)]


def _why_none(shard: Path) -> str:
    if not shard.is_dir():
        return "it is missing"
    if not os.path.lexists(shard / DATABASE):
        return f"it has no {DATABASE}"
    return "" if databases(shard) else f"its {DATABASE} is damaged: it is no database"


def _connected(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=60)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA query_only = ON")
        connection.text_factory = _text
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in _LOGS]


def _has_content(path: Path) -> bool:
    """Also what is no file, and so cannot be read: it is not to be passed over."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        return not stat.S_ISREG(status.st_mode) or status.st_size > 0
    return False


def _copied(path: Path) -> Path:
    """A directory, for this user alone, with a copy of a database and of its logs."""
    try:
        made = Path(tempfile.mkdtemp(prefix="yatagarasu-import-"))  # which gives it the mode 0700
        try:
            for one in (path, *filter(_has_content, _beside(path))):
                with _regular(one) as file, open(made / one.name, "xb") as copy:
                    shutil.copyfileobj(file, copy)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except ours(OSError) as error:
        note = "make its directory writable, or name by TMPDIR a directory with room for a copy of it"
        raise from_os_error(error, f"cannot read the log of {path}", note) from error
    return made


def _regular(path: Path) -> BinaryIO:
    """Open a regular file that is no link: what a link leads to may be somebody else's."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return open(fd, "rb")
