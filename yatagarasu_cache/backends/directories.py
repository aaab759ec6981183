"""Where a cache's files are: its directory and those inside, open, and opened without following links.

A path may lead elsewhere at any time: whoever may write to the cache's directory can put a link, or another
user's directory, in the place of one of ours. So files are used by their names in a directory that is open
and was checked: it stays that one, whatever its path leads to by then.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from ..concurrency.file_locks import LOOK_EVERY
from ..concurrency.interruption import descriptor_of, ours
from ..errors import user_name

__all__ = ["Check", "Directories", "Directory", "Foreign", "Place", "Trust", "ensure_file", "open_at"]

# Whether system calls take a name in an open directory; where they do not, paths are checked, then used.
RELATIVE = {os.open, os.stat, os.unlink, os.rename, os.mkdir} <= os.supports_dir_fd and (
    os.scandir in os.supports_fd
)
_FLAGS = os.O_RDONLY
for _name in ("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
    _FLAGS |= getattr(os, _name, 0)
_ROOT = 0
Check = Callable[[int], object]  # called with a descriptor that was just opened; may raise


class Foreign(OSError):
    """A file or directory in the place of one of ours that another user has put there.

    Its errno is that of a file that is gone (ESTALE): what an entry needs of it is lost.
    """


class Trust(NamedTuple):
    """Whose files are accepted as the cache's: those of this user, of root, of the owner of the cache's
    directory, and of users whom the modes of its files let write to them."""

    directory_mode: int = 0o700
    file_mode: int = 0o600
    read_only: bool = False

    def admits_root(self, status: os.stat_result) -> bool:
        """Whether a cache may be in this directory. Root serves all users, and a reader may read what another
        user has stored: both know whose directory they name."""
        user = os.geteuid()
        return user == _ROOT or self.read_only or status.st_uid in (_ROOT, user) or self._shares(status, 0)

    def admits(self, status: os.stat_result, root: os.stat_result) -> bool:
        """Whether a file or directory in the directory `root` may be one of the cache's."""
        if status.st_uid in (root.st_uid, _ROOT) or status.st_uid == os.geteuid():
            return True
        # A reader goes by the modes that the owner of the directory has set.
        return self._shares(status, root.st_mode if self.read_only else 0, root.st_gid)

    def _shares(self, status: os.stat_result, more: int, group: int = -1) -> bool:
        modes = self.directory_mode & self.file_mode | more
        if modes & stat.S_IWOTH:
            return True
        return bool(modes & stat.S_IWGRP) and (status.st_gid == group or status.st_gid in _groups())


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


class Directory:
    """An open directory. It is closed when nobody uses it any more."""

    __slots__ = ("_fds", "status")

    def __init__(self, name: str, above: int | None = None) -> None:
        self._fds: list[int] = []
        # In C, so that an interruption finds it here.
        self._fds.extend(map(partial(os.open, dir_fd=above), (name,), (_FLAGS,)))
        self.status = os.fstat(self.fd)

    @property
    def fd(self) -> int:
        return self._fds[0]

    def is_at(self, name: str, above: int | None = None) -> bool:
        """Whether its name still leads to it. No other one gets its number as long as it is open."""
        own, there = self.status, os.lstat(name, dir_fd=above)
        if (own.st_ino, own.st_dev) != (there.st_ino, there.st_dev):
            return False
        self.status = there  # its owner may have changed
        return True

    def close(self) -> None:
        for _ in map(os.close, map(self._fds.pop, (0,) * len(self._fds))):  # in C, likewise
            pass

    def __del__(self) -> None:
        if getattr(self, "_fds", None):  # an exception may have come before there were any
            self.close()


class Place(NamedTuple):
    """A path as system calls take it: a name in an open directory, or the path itself where that is None."""

    path: str
    name: str
    dir_fd: int | None = None
    directory: Directory | None = None  # stays open for as long as this is used


class Directories:
    """The directories of one cache, opened at first use, and again if another one takes their place.

    That is checked before each use; but for the cache's own directory only every LOOK_EVERY seconds, like
    the names of its files, as whoever notices a change has it looked up at once (`keep_to`). The same holds
    for those inside where a file is only read from (`recent`).
    """

    def __init__(self) -> None:
        self._root = ""
        self._paths: frozenset[str] = frozenset()  # of all of them
        self._trust = Trust()
        self._open: dict[str, Directory] = {}
        self._look_at = 0.0  # when to check next whether the cache's directory is still at its path
        self._seen: set[str] = set()  # directories inside that were found in place since the last check

    def keep_to(self, root: str, inside: Collection[str], trust: Trust) -> None:
        """From now on the cache is in the directory `root`, with directories of such names in it."""
        if root != self._root:
            self.close()
        self._root, self._trust, self._look_at = root, trust, 0.0
        self._seen.clear()
        self._paths = frozenset({root, *(f"{root}/{name}" for name in inside)})

    def place(self, path: str) -> Place:
        """Where `path` is; a path that is in none of our directories is used as it is."""
        above, _, name = path.rpartition("/")
        if above not in self._paths:
            return Place(path, path)
        directory = self.opened(above)
        return Place(path, path) if directory is None else Place(path, name, directory.fd, directory)

    def recent(self, path: str) -> Place | None:
        """The same if it was checked just now. A file missing there may be in a directory that came since."""
        above, _, name = path.rpartition("/")
        directory = self._open.get(above)
        if directory is None or above not in self._seen or time.monotonic() >= self._look_at:
            return None
        return Place(path, name, directory.fd, directory)

    def opened(self, path: str) -> Directory | None:
        """The directory at `path`, if it is one of ours; None if it is to be found by its path."""
        if path not in self._paths:
            return None
        if not RELATIVE:
            for one in (self._root, path):
                self._ensure_directory(one, os.lstat(one))
            return None
        return self._root_directory() if path == self._root else self._inside(path)

    def to_list(self, path: str) -> Directory | None:
        """The same, opened for the caller alone to list: users of one open directory share its position."""
        if path not in self._paths or not RELATIVE:
            return self.opened(path)
        if path not in self._open:  # just opened: nobody else lists it
            return self.opened(path)
        return self._open_anew(path, None if path == self._root else self._root_directory())

    def ensure_ours(self, path: str, status: os.stat_result) -> None:
        """Raise `Foreign` for a file whose owner is not trusted."""
        known = self._open.get(self._root)
        if known is not None and known.status.st_uid == status.st_uid or not self._is_inside(path):
            return
        root = known.status if known is not None else os.lstat(self._root)
        if not self._trust.admits(status, root):
            raise _foreign(path, status, root)

    def _is_inside(self, path: str) -> bool:
        return path.rpartition("/")[0] in self._paths

    def _root_directory(self) -> Directory:
        known = self._open.get(self._root)
        now = time.monotonic()
        if known is not None and now < self._look_at:
            return known
        if known is None or not known.is_at(self._root):
            known = self._open[self._root] = self._open_anew(self._root, None)
        self._look_at = now + LOOK_EVERY
        self._seen.clear()
        return known

    def _inside(self, path: str) -> Directory:
        root = self._root_directory()
        known = self._open.get(path)
        try:
            if known is not None and known.is_at(path[len(self._root) + 1 :], root.fd):
                self._seen.add(path)
                return known
        except ours(OSError) as error:
            error.filename = path
            raise
        known = self._open[path] = self._open_anew(path, root)
        return known

    def _open_anew(self, path: str, above: Directory | None) -> Directory:
        name, dir_fd = (path, None) if above is None else (path[len(self._root) + 1 :], above.fd)
        try:
            directory = Directory(name, dir_fd)
        except ours(OSError) as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                self._ensure_directory(path, os.lstat(name, dir_fd=dir_fd))
            error.filename = path
            raise
        self._ensure_directory(path, directory.status)
        return directory

    def _ensure_directory(self, path: str, status: os.stat_result) -> None:
        if not stat.S_ISDIR(status.st_mode):
            code = errno.ELOOP if stat.S_ISLNK(status.st_mode) else errno.ENOTDIR
            raise OSError(code, os.strerror(code), path)
        if path != self._root:
            self.ensure_ours(path, status)
        elif not self._trust.admits_root(status):
            raise _foreign(path, status, status)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _foreign(path: str, status: os.stat_result, root: os.stat_result) -> Foreign:
    owner = user_name(root.st_uid if root is not status else os.geteuid())
    return Foreign(
        errno.ESTALE,
        f"it belongs to {user_name(status.st_uid)}, whose files are not taken for this cache's: remove it, "
        f"give it to {owner} (chown), or let others in with directory_mode and file_mode",
        path,
    )


def ensure_file(path: str, fd: int) -> os.stat_result:
    """Refuse what is no regular file, with the error that opening it is to have."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.ENXIO
        raise OSError(code, os.strerror(code), path)
    return status


def open_at(place: Place, flags: int, mode: int = 0, check: Check | None = None) -> int:
    """`os.open`. If `check` raises, the descriptor is closed."""
    return descriptor_of(partial(os.open, dir_fd=place.dir_fd), place.name, flags, mode, check=check)
