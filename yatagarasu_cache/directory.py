"""The cache directory: made, recognised, or refused before anything in it changes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys

from . import format as f
from .backends.base import Backend
from .config import Settings
from .errors import BackendUnavailable, ConfigurationError, FormatError, ReadOnlyError, from_os_error
from .locks import fcntl

# Mappings and locks are not safe on these: other hosts don't see them, or see them late.
NETWORK_FILE_SYSTEMS = frozenset(
    (
        "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "glusterfs",
        "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "9p", "virtiofs",
        "beegfs", "ocfs2", "gfs2", "ncpfs", "coda",
    )
)  # fmt: skip
_SUBDIRECTORIES = (f.SEGMENTS_NAME, f.LARGE_NAME, f.TEMPORARY_NAME, f.WRITERS_NAME)


def prepare(backend: Backend, settings: Settings) -> None:
    """Make sure that `settings.directory` is a cache of ours, creating it if it is missing or empty.

    Raises `FormatError` for a directory with other content, a symlink, or a network file system,
    `ReadOnlyError` where it would have to be created read-only, and `CacheIOError` if it cannot
    be written.
    """
    root = settings.directory
    if fcntl is None:
        raise BackendUnavailable("this system has no POSIX file locks (flock): use Linux, macOS or a BSD")
    try:
        if not settings.read_only:
            _make(backend, root, settings.directory_mode)
        status = os.lstat(root)
        _check_kind(root, status)
        _check_file_system(settings)
        names = [name for name, _ in backend.scandir(root)]
        if not settings.read_only and (not names or _is_begun(root, names)):
            _write_tag(backend, settings)
        elif not is_ours(root, names):
            _refuse(root, names, settings)
        if not settings.read_only:
            _make_inside(backend, settings)
    except OSError as error:
        remedy = "give a directory that this user can write, or open it with read_only=True"
        raise from_os_error(error, f"cannot use the cache directory {root!r}", remedy) from error


def is_ours(root: str, names: list[str]) -> bool:
    """True if the directory carries our tag, or an index or segments of ours."""
    try:
        with open(os.path.join(root, f.TAG_NAME), "rb") as file:
            if file.read(len(f.TAG_TEXT)) == f.TAG_TEXT:
                return True
    except OSError:
        pass
    try:
        with open(os.path.join(root, f.INDEX_NAME), "rb") as file:
            if file.read(len(f.INDEX_MAGIC)) == f.INDEX_MAGIC:
                return True
    except OSError:
        pass
    return _has_segments(root, names)


def _is_begun(root: str, names: list[str]) -> bool:
    """True if there is nothing but our tag, or what a power cut left of it: it is durable before the rest."""
    if names != [f.TAG_NAME]:
        return False
    path = os.path.join(root, f.TAG_NAME)
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        found = file.read(len(f.TAG_TEXT) + 1)
    return len(found) <= len(f.TAG_TEXT) and all(
        byte in (0, ours) for byte, ours in zip(found, f.TAG_TEXT, strict=False)
    )


def _has_segments(root: str, names: list[str]) -> bool:
    if f.SEGMENTS_NAME not in names or f.LOCK_NAME not in names:
        return False
    directory = os.path.join(root, f.SEGMENTS_NAME)
    return any(f.parse_segment_name(name) is not None for name in os.listdir(directory))


def _refuse(root: str, names: list[str], settings: Settings) -> None:
    if not names:
        raise ReadOnlyError(f"{root!r} is empty: open it once without read_only=True to create the cache")
    raise FormatError(
        f"{root!r} is not a cache of yatagarasu_cache (it contains {names[0]!r}): "
        "give an empty or a new directory"
    )


def _make(backend: Backend, root: str, mode: int) -> None:
    """Create the directory, and those above it, if they are missing; durably."""
    parent = os.path.dirname(root)
    try:
        os.mkdir(root, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make(backend, parent, 0o777)
        os.mkdir(root, mode)
    with contextlib.suppress(PermissionError):  # a parent that may be written but not read
        backend.sync_directory(parent)


def _check_kind(root: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise FormatError(f"{root!r} is a symbolic link: give the directory that it leads to")
    if not stat.S_ISDIR(status.st_mode):
        raise FormatError(f"{root!r} is not a directory: give another path")


def _make_inside(backend: Backend, settings: Settings) -> None:
    made = False
    for name in _SUBDIRECTORIES:
        path = os.path.join(settings.directory, name)
        if backend.mkdir(path, settings.directory_mode):
            made = True
        else:
            _check_kind(path, os.lstat(path))
    if made:
        backend.sync_directory(settings.directory)
    if not os.access(settings.directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(settings.directory).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise OSError(code, os.strerror(code), settings.directory)


def _write_tag(backend: Backend, settings: Settings) -> None:
    """Make the directory ours, durably before anything else is in it: a torn tag would be a stranger's."""
    path = os.path.join(settings.directory, f.TAG_NAME)
    with backend.opened(path, os.O_WRONLY | os.O_CREAT, settings.file_mode) as fd:
        backend.write(fd, [f.TAG_TEXT], 0)  # another process that creates the cache too writes the same
        backend.sync(fd)
    backend.sync_directory(settings.directory)


def _check_file_system(settings: Settings) -> None:
    if settings.allow_network_fs:
        return
    kind = file_system(settings.directory)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            f"directory {settings.directory!r} is on a network file system ({kind}), where memory "
            "mappings and locks are not safe: use a local disk (allow_network_fs=True insists)"
        )


def file_system(path: str) -> str:
    """The type of the file system that holds `path`, as in /proc/self/mountinfo; '' if unknown."""
    if not sys.platform.startswith("linux"):
        return ""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields, _, rest = line.partition(" - ")
                if fields.split(" ", 3)[2] == wanted:
                    return rest.split(" ", 1)[0]
    except OSError:
        pass
    return ""


def boot_id() -> bytes:
    """16 bytes that change when the kernel starts anew; zeros where the system has no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)
