"""The key with which a user's pickles are signed, so that nobody else's are ever loaded.

It is made when it is needed first, and kept outside of every cache: whoever can write to a cache directory,
and not to the user's own data, cannot have code run in the user's programs (CVE-2025-69872 is that he can).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path

from ..concurrency.interruption import ours
from ..errors import CacheIOError, ConfigurationError, from_os_error

__all__ = ["VARIABLE", "secret_path", "user_secret"]

VARIABLE = "YATAGARASU_CACHE_SECRET_FILE"
"""The environment variable that names another file."""

_BYTES = 32
_NAME = "pickle-secret"


def secret_path() -> Path:
    """Where the key is: in ``$XDG_DATA_HOME/yatagarasu_cache`` (by default ``~/.local/share``; on macOS
    ``~/Library/Application Support``, on Windows ``%LOCALAPPDATA%``), or where `VARIABLE` says.

    A relative path would be another file in each working directory, which others may write to. In
    ``XDG_DATA_HOME`` it is ignored, as its specification says; in `VARIABLE` it is a `ConfigurationError`.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_absolute():
            raise ConfigurationError(f"{VARIABLE} is {named!r}, a relative path: give an absolute one")
        return path
    if sys.platform == "darwin":
        data = Path("~/Library/Application Support")
    elif sys.platform == "win32":
        data = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or "")
        data = data if data.is_absolute() else Path("~/.local/share")
    return data.expanduser() / "yatagarasu_cache" / _NAME


def user_secret() -> bytes:
    """The key of this user, which is made if there is none. Of processes that make it at once, one does.

    Raises `CacheIOError` if it can be neither read nor made, or if others can read it.
    """
    path = secret_path()
    try:
        found = _read(path)
        return _made(path) if found is None else found
    except ours(OSError) as error:
        if isinstance(error, CacheIOError):
            raise
        note = f"name another file by the environment variable {VARIABLE}, or give a secret"
        raise from_os_error(error, "cannot have a key to sign pickles with", note) from error


def _read(path: Path) -> bytes | None:
    try:
        with open(path, "rb", opener=_opener) as file:
            status, data = os.fstat(file.fileno()), file.read(_BYTES + 1)
    except FileNotFoundError:
        return None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o077):
        why = f"{path} can be used by others than you, who could sign with it: chmod 600 it, or remove it"
        raise CacheIOError(errno.EPERM, why)
    if not stat.S_ISREG(status.st_mode) or len(data) != _BYTES:
        why = f"{path} holds no key to sign pickles with: remove it, and another one is made"
        raise CacheIOError(errno.EINVAL, why)
    return data


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _made(path: Path) -> bytes:
    """Written aside, and linked: the file is whole whenever somebody sees it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made, aside = secrets.token_bytes(_BYTES), path.with_name(f".{_NAME}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(aside, path)
    finally:
        aside.unlink()
    found = _read(path)
    if found is None:
        raise FileNotFoundError(2, "it vanished again", str(path))
    return found
