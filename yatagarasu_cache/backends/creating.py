"""Makes files and directories with the mode that was asked for, and with the right owner.

The umask clears bits of the mode, so the mode is set afterwards where necessary. What root makes in another
user's directory is given to that user, who could not use it otherwise. Until then others may see what was
made but not open it: they try again for a moment.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from ..concurrency.interruption import ours, suppressing
from .directories import Check, Place, open_at

__all__ = ["make_directory", "open_file", "patiently"]

T = TypeVar("T")
_ROOT = 0
_MOMENT = 0.1  # seconds that setting mode and owner of something new may take
_PAUSE = 0.001
_TRIES = 100  # to open what others are making and removing


def open_file(place: Place, flags: int, mode: int, check: Check | None = None) -> int:
    """`os.open` with O_CREAT in `flags`. A file that this makes has `mode`, whatever the umask is; `check`
    is called with the descriptor of one that was there, and may raise."""
    if flags & os.O_EXCL:
        return _create(place, flags, mode)
    for _ in range(_TRIES):
        try:
            return patiently(place.path, lambda: open_at(place, flags & ~os.O_CREAT, mode, check))
        except FileNotFoundError:
            pass
        try:
            return _create(place, flags | os.O_EXCL, mode)
        except FileExistsError:  # another process was faster
            pass
    return open_at(place, flags, mode, check)


def _create(place: Place, flags: int, mode: int) -> int:
    return open_at(place, flags, mode, lambda fd: _hand_over(fd, place, mode))


def make_directory(place: Place, mode: int, *, for_owner: bool = True) -> None:
    """`os.mkdir` of a directory that has `mode`, whatever the umask is.

    A setgid bit inherited from the parent stays. `for_owner`: root gives it to the owner of the parent.
    """
    name, dir_fd = place.name, place.dir_fd
    os.mkdir(name, mode, dir_fd=dir_fd)
    status = os.lstat(name, dir_fd=dir_fd)
    if stat.S_IMODE(status.st_mode) in (mode, mode | stat.S_ISGID) and status.st_uid != _ROOT:
        return
    try:
        # By a descriptor: root must not change something else that was put in its place meanwhile.
        fd = open_at(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except PermissionError:  # the umask took the owner's own right to read it
        return os.chmod(name, mode | status.st_mode & stat.S_ISGID, dir_fd=dir_fd)
    try:
        _hand_over(fd, place, mode, for_owner=for_owner and not os.listdir(fd))
    finally:
        os.close(fd)


def _hand_over(fd: int, place: Place, mode: int, *, for_owner: bool = True) -> None:
    """Give what was just made its owner and its mode.

    Some file systems know neither, and some sandboxes forbid it. Others who then may not open the file
    get an error that says whose it is (see `errors`).
    """
    status = os.fstat(fd)
    if status.st_uid == _ROOT and for_owner:
        with suppressing(OSError):
            parent = _parent(place)
            if parent.st_uid != _ROOT:
                os.fchown(fd, parent.st_uid, parent.st_gid)
                status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        mode |= status.st_mode & stat.S_ISGID
    if stat.S_IMODE(status.st_mode) != mode:
        with suppressing(OSError):
            os.fchmod(fd, mode)


def _parent(place: Place) -> os.stat_result:
    if place.dir_fd is not None:
        return os.fstat(place.dir_fd)
    return os.stat(os.path.dirname(place.path) or os.curdir)


def patiently(path: str, use: Callable[[], T]) -> T:
    """`use()`, repeated for a moment while it is refused because `path` was only just made."""
    while True:
        try:
            return use()
        except PermissionError:
            if not _is_just_made(path):
                raise
        time.sleep(_PAUSE)


def _is_just_made(path: str) -> bool:
    try:
        return 0 <= time.time() - os.lstat(path).st_ctime < _MOMENT
    except ours(OSError):
        return False
