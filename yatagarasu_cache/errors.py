"""Every exception that the cache raises on purpose; all derive from `CacheError`.

Each message names what is wrong and what to do about it.
"""

from __future__ import annotations

import errno as _errno
import os as _os

from .concurrency.interruption import ours

try:
    import pwd as _pwd
except ImportError:  # pragma: no cover - Windows
    _pwd = None  # type: ignore[assignment]

__all__ = [
    "BackendUnavailable",
    "CacheError",
    "CacheIOError",
    "ClosedError",
    "ConfigurationError",
    "EntryGone",
    "FormatError",
    "LockTimeout",
    "ReadOnlyError",
    "Reentered",
    "SerializationError",
    "StorageFull",
    "ValueTooLarge",
    "from_os_error",
]


class CacheError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(CacheError, ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it."""


class BackendUnavailable(CacheError):
    """The backend that was asked for by name cannot run here; the message says why."""


class FormatError(CacheError):
    """The directory holds something that this version must not touch.

    Either it is not a cache, or its format version is unknown to this release.
    """


class ClosedError(CacheError):
    """The cache was used after `close()`."""


class ReadOnlyError(CacheError):
    """A change was asked of a cache opened with ``read_only=True``."""


class SerializationError(CacheError, TypeError):
    """A key or a value cannot be stored exactly, or stored bytes cannot be decoded."""


class Unreadable(SerializationError):
    """A stored value can't be decoded: what `on_unreadable` is about. Users see a `SerializationError`."""

    without_key = ""  # the same for the log, which names no keys


class ValueTooLarge(CacheError, ValueError):
    """The entry can never fit: it exceeds `max_value_size` or the room that `size_limit` gives. Or it is a
    stream of unknown length that has come to more than `max_stream_size`, or a value that refers to the same
    things so often that it would grow out of all proportion."""


class EntryGone(CacheError, KeyError):
    """The entry behind an `Entry` or an open handle was removed before its value was read."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CacheIOError(CacheError, OSError):
    """The operating system failed an operation (`errno` and `filename` are set)."""


class StorageFull(CacheIOError):
    """No room: the volume is full, a quota is used up, or `size_limit` is reached without eviction."""

    of_volume = False  # True where the system says so, and not the cache's own limits


class LockTimeout(CacheIOError):
    """A lock was not to be had within `lock_timeout`, or a turn or a lock by key within `wait`; the message
    says who has it."""


class Reentered(CacheError):
    """The cache was used where it had been interrupted in the middle of a change, by a signal handler or a
    destructor, or where it logs a line, by a logging handler, in the same thread. Or what was asked for would
    wait for itself: the value that the function is to compute, the lock that the thread holds. Nothing was
    done."""


_FULL = frozenset({_errno.ENOSPC, _errno.EDQUOT})
_ROOM = "free space on the volume or lower size_limit"
# For whoever finds that what he may do is refused all the same.
REFUSED = "the system refuses this call, though the files may be used: look for a sandbox, such as seccomp"
_REMEDIES = {
    _errno.EMFILE: "this process has too many files open: close what it does not use, raise `ulimit -n`, or "
    "lower max_open_files",
    _errno.ENFILE: "all processes together have too many files open: close some, or raise fs.file-max",
    _errno.EIO: "the disk failed: the log of the system says more",
    _errno.ENOSPC: _ROOM,
    _errno.EDQUOT: _ROOM,
    _errno.EROFS: "the file system is read-only: make it writable, or open the cache with read_only=True",
    _errno.EPERM: "the file system, or a sandbox such as seccomp, forbids this call",
    _errno.ELOOP: "a symbolic link is in the place of a file or directory, and is not followed: remove it",
    _errno.EISDIR: "a directory is in the place of a file: move it away",
    _errno.ENOTDIR: "something else is in the place of a directory: move it away",
    _errno.ENXIO: "a FIFO, a socket or a device is in the place of a file: remove it",
    _errno.ENOSYS: "the kernel does not know this call, or a sandbox such as seccomp forbids it",
}


def is_volume_full(error: BaseException) -> bool:
    """Whether the system has no room, on the volume or in a quota; not whether a limit of ours is reached."""
    return isinstance(error, OSError) and error.errno in _FULL and getattr(error, "of_volume", True)


def from_os_error(error: OSError, doing: str, note: str = "") -> CacheIOError:
    """`error` as a `CacheIOError` (`StorageFull` for ENOSPC and EDQUOT) that says what was being done.

    `note` comes before the remedies that are known for any such error.
    """
    kind = StorageFull if error.errno in _FULL else CacheIOError
    notes = "; ".join(filter(None, [note, _REMEDIES.get(error.errno or 0, ""), _whose(error)]))
    text = f"{doing}: {error.strerror or error}" + (f" ({notes})" if notes else "")
    filename = error.filename
    made = kind(error.errno, text, filename) if filename is not None else kind(error.errno, text)
    if isinstance(made, StorageFull):
        made.of_volume = is_volume_full(error)
    return made


def _whose(error: OSError) -> str:
    """Whose file it is that may not be used, where it is another user's."""
    path = error.filename
    if error.errno != _errno.EACCES or not isinstance(path, str) or not hasattr(_os, "geteuid"):
        return ""
    while True:
        try:
            owner = _os.lstat(path).st_uid
            break
        except ours(OSError):  # it is not there, or what is in the way is above it
            path, below = _os.path.dirname(path), path
            if path == below:
                return ""
    if owner == _os.geteuid():
        return ""
    return (
        f"{path!r} belongs to {user_name(owner)}, and this process runs as {user_name(_os.geteuid())}: "
        "run all as one user and give the files to that one (chown -R), or let others in with "
        "directory_mode and file_mode"
    )


def user_name(number: int) -> str:
    """A user as messages name him."""
    try:
        return f"{_pwd.getpwuid(number).pw_name} (uid {number})"
    except (AttributeError, KeyError):
        return f"uid {number}"
