"""The cache directory: made, recognised, or refused before anything in it changes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TypeVar

from ..backends.base import NO_FILE, Backend, Entry
from ..backends.creating import make_directory, patiently
from ..backends.directories import Place, Trust
from ..concurrency.file_locks import fcntl
from ..concurrency.interruption import ours, suppressing
from ..config import Settings
from ..errors import (
    REFUSED,
    BackendUnavailable,
    ConfigurationError,
    FormatError,
    ReadOnlyError,
    from_os_error,
    user_name,
)
from . import format as f
from .strangers import is_diskcache

T = TypeVar("T")

# Mappings and locks are not safe on these: other hosts, or the other side of a virtual machine, don't see
# them, or see them late.
NETWORK_FILE_SYSTEMS = frozenset(
    (
        "9p", "acfs", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "cvfs", "cvmfs", "davfs", "drvfs",
        "fakeowner", "gfs", "gfs2", "glusterfs", "gpfs", "hostfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2",
        "orangefs", "panfs", "prl_fs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs",
        "wekafs",
    )
)  # fmt: skip
# Behind FUSE there may be anything. These store on this machine, or encrypt a directory of it.
LOCAL_FUSE = frozenset(
    (
        "fuseblk", "fuse.cryfs", "fuse.encfs", "fuse.fuse-ext2", "fuse.fuse-overlayfs", "fuse.gocryptfs",
        "fuse.ntfs-3g", "fuse.snapfuse", "fuse.squashfuse", "fuse.squashfuse_ll",
    )
)  # fmt: skip
# What file systems, and the tools that deal with directories, leave in an empty one.
NEGLIGIBLE = frozenset(
    (
        ".DS_Store", ".directory", ".gitattributes", ".gitignore", ".gitkeep", ".keep", ".localized",
        ".nobackup", ".placeholder", "Thumbs.db", "aquota.group", "aquota.user", "desktop.ini",
    )
)  # fmt: skip
NEGLIGIBLE_DIRECTORIES = frozenset(
    (
        "$RECYCLE.BIN", ".Spotlight-V100", ".Trashes", ".fseventsd", ".snapshots",
        "System Volume Information", "lost+found",
    )
)  # fmt: skip
NEGLIGIBLE_STARTS = ("._", ".Trash-", ".fuse_hidden", ".nfs")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_NAMES_INSIDE: dict[str, Callable[[str], bool]] = {  # of files in each of our directories
    f.SEGMENTS_NAME: f.is_segment_name,
    f.LARGE_NAME: lambda name: f.parse_large_name(name) is not None,
    f.TEMPORARY_NAME: lambda name: f.parse_temporary_name(name) is not None,
    f.WRITERS_NAME: lambda name: f.parse_writer_name(name) is not None,
}
_STARTS = {  # of files beside these
    f.INDEX_NAME: f.INDEX_MAGIC, f.CHECKPOINT_NAME: f.CHECKPOINT_MAGIC, f.SETTINGS_NAME: f.SETTINGS_MAGIC,
}  # fmt: skip
_LOCK_NAMES = frozenset(
    {f.LOCK_NAME, f.USERS_NAME, f.CHECKPOINT_LOCK_NAME, f.RECLAIM_LOCK_NAME, f.KEYS_LOCK_NAME}
)
_CREATE = "open it once without read_only=True to create the cache"
_TRIES = 100  # where others create and remove the same directory
_MOST_LINKS = 40  # as the kernel follows


def resolved(path: str) -> str:
    """Where the cache directory really is: links in `path` are followed, once, while the cache is opened.

    A link in the place of the directory itself counts if it belongs to this user, or to the owner of the
    directory that it is in, who could as well put another directory in its place. For other links, and for
    those that lead round in a circle, it raises `FormatError`.
    """
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(path)
        try:
            path = os.path.join(os.path.realpath(parent), name)
            target = _target(path)
        except ours(OSError) as error:
            raise from_os_error(error, f"cannot find the cache directory {path!r}") from error
        if target is None:
            return os.path.realpath(path)  # a link may end in ..
        path = os.path.join(os.path.dirname(path), target.rstrip("/") or "/")
    raise FormatError(f"{path!r} is a symbolic link that leads round in a circle: give a directory")


def _target(path: str) -> str | None:
    """What a link says; None if there is no link."""
    try:
        status = os.lstat(path)
        if not stat.S_ISLNK(status.st_mode):
            return None
        if status.st_uid not in (os.geteuid(), os.stat(os.path.dirname(path)).st_uid):
            raise FormatError(
                f"{path!r} is a symbolic link that belongs to another user ({user_name(status.st_uid)}): "
                "give the directory that it leads to"
            )
        return os.readlink(path)
    except FileNotFoundError:  # or removed meanwhile
        return None


def prepare(backend: Backend, settings: Settings) -> bool:
    """Make sure that `settings.directory` is a cache of ours. Creates it if it is missing or empty, and parts
    of it that were removed. True if there was nothing.

    Raises `FormatError` for a directory with other content, a symlink, or a network file system,
    `ReadOnlyError` where it would have to be created read-only, and `CacheIOError` if it cannot
    be written.
    """
    root = settings.directory
    if fcntl is None:
        raise BackendUnavailable("this system has no POSIX file locks (flock): use Linux, macOS or a BSD")
    try:
        return again_where_it_vanishes(lambda: patiently(root, lambda: _prepare(backend, settings)))
    except ours(OSError) as error:
        doing = f"cannot use the cache directory {root!r}"
        raise from_os_error(error, doing, _remedy(error, settings)) from error


def look_again(backend: Backend, settings: Settings) -> None:
    """Have the next use look the cache's directory up by its path, whatever was open before."""
    backend.keep_to(settings.directory, _NAMES_INSIDE, trust_of(settings))


def _prepare(backend: Backend, settings: Settings) -> bool:
    root, trust = settings.directory, trust_of(settings)
    look_again(backend, settings)
    if not settings.read_only:
        # It does not go to the owner of the directory above: a cache belongs to the user who makes it.
        _make(backend, root, partial(_make_root, mode=settings.directory_mode))
    try:
        status = os.lstat(root)
        _check_kind(root, status)
        _check_owner(root, status, trust.admits_root(status))
    except FileNotFoundError:
        if settings.read_only:
            raise ReadOnlyError(f"{root!r} does not exist: {_CREATE}") from None
        raise
    _check_file_system(settings)
    entries = backend.scandir(root)
    names = content(entries)
    if not is_ours(backend, root, names) and (stranger := _stranger(backend, root, entries)):
        raise FormatError(
            f"{root!r} is not a cache of yatagarasu_cache (it contains {stranger!r}): " + _instead(root)
        )
    is_new = set(names) <= {f.TAG_NAME}
    if not settings.read_only:
        if is_new:
            _write_tag(backend, settings)
        else:
            with suppressing(OSError):  # check() says that it is missing
                keep_tag(backend, settings)
        _make_inside(backend, settings, status)
    elif is_new:
        raise ReadOnlyError(f"{root!r} is empty: {_CREATE}")
    return is_new


def trust_of(settings: Settings) -> Trust:
    return Trust(settings.directory_mode, settings.file_mode, settings.read_only)


def _make_root(path: str, mode: int) -> None:
    make_directory(Place(path, path), mode, for_owner=False)


def again_where_it_vanishes(use: Callable[[], T]) -> T:
    """`use()`, repeated while others remove what it has just made or seen."""
    for _ in range(_TRIES):
        try:  # no `with`: behind it an interruption would lose the descriptor that `use` may give
            return use()
        except FileNotFoundError:
            pass
    return use()


def made(backend: Backend, settings: Settings, make: Callable[[], T]) -> T:
    """`make()`, which uses paths; repeated where somebody has removed a directory that it needs."""
    if settings.read_only:
        return make()

    def attempt() -> T:
        try:
            return make()
        except FileNotFoundError:
            prepare(backend, settings)
            raise

    return again_where_it_vanishes(attempt)


def _remedy(error: OSError, settings: Settings) -> str:
    """What helps, if the error is one of missing rights; else ""."""
    if error.errno != errno.EACCES:
        return ""  # `from_os_error` knows what helps with others
    wanted = os.R_OK if settings.read_only else os.R_OK | os.W_OK
    if _is_accessible(error.filename or settings.directory, wanted):
        return REFUSED
    if settings.read_only:
        return "let this user read the directory and all in it"
    return "give a directory that this user can write, or open it with read_only=True"


def _is_accessible(path: str, wanted: int) -> bool:
    """Whether this user may use a file, or, if it is missing, the nearest directory above."""
    while not os.path.lexists(path) and path != (above := os.path.dirname(path)):
        path = above
    return os.access(path, wanted | (os.X_OK if os.path.isdir(path) else 0))


def content(entries: Iterable[Entry]) -> list[str]:
    """Those names in a directory (name and lstat of each) that tell what it is.

    What comes with a fresh volume, or is left by a file manager, is ignored here and everywhere.
    """
    return [name for name, status in entries if not _is_negligible(name, status)]


def _is_negligible(name: str, status: os.stat_result) -> bool:
    if name in NEGLIGIBLE_DIRECTORIES:
        return stat.S_ISDIR(status.st_mode)
    return name in NEGLIGIBLE or name.startswith(NEGLIGIBLE_STARTS)


def is_ours(backend: Backend, root: str, names: Collection[str]) -> bool:
    """True if the directory carries our tag or an index of ours, or both a lock and segments. OSError if one
    of these cannot be read, and the others don't tell."""
    failed: OSError | None = None
    for start, name in ((f.TAG_TEXT, f.TAG_NAME), (f.INDEX_MAGIC, f.INDEX_NAME)):
        try:
            if name in names and _begins(backend, os.path.join(root, name), start):
                return True
        except ours(OSError) as error:
            failed = error
    if f.LOCK_NAME in names and f.SEGMENTS_NAME in names and _has_segments(backend, root):
        return True
    if failed is not None:
        raise failed
    return False


def _begins(backend: Backend, path: str, start: bytes) -> bool:
    return _start_of(backend, path, len(start)) == start


def _start_of(backend: Backend, path: str, length: int) -> bytes | None:
    """The first bytes of a file; None if there is none, or something that is no file of ours."""
    try:
        with backend.reading(path) as fd:
            return backend.read(fd, length, 0)
    except ours(OSError) as error:
        if error.errno in NO_FILE:
            return None
        raise


def _has_segments(backend: Backend, root: str) -> bool:
    try:
        inside = backend.scandir(os.path.join(root, f.SEGMENTS_NAME))
    except ours(OSError) as error:
        if error.errno in NO_FILE:
            return False
        raise
    return any(f.is_segment_name(name) for name, _ in inside)


# -- what is left of a cache ------------------------------------------------------------------------
# All but some file or directory may have been removed. What has our names and our shapes is ours as well:
# using it loses nothing that anybody else made.


def _stranger(backend: Backend, root: str, entries: Iterable[Entry]) -> str:
    """A name in the directory of something that no cache makes, by name or content; "" if there is none."""
    kept = [(name, status) for name, status in entries if not _is_negligible(name, status)]
    return next((name for name, status in kept if not _is_remnant(backend, root, name, status)), "")


def _instead(root: str) -> str:
    """What to do with a directory of somebody else's."""
    if is_diskcache(root):
        return (
            "diskcache made it: give a new directory, and fill that with what is in here by"
            f" `yatagarasu-cache import-diskcache {shlex.quote(root)} NEW_DIRECTORY`"
        )
    return "give an empty or a new directory"


def _is_remnant(backend: Backend, root: str, name: str, status: os.stat_result) -> bool:
    path = os.path.join(root, name)
    if stat.S_ISDIR(status.st_mode):
        is_name = _NAMES_INSIDE.get(name)
        return is_name is not None and _holds_only(backend, path, is_name)
    if not stat.S_ISREG(status.st_mode):
        return False
    if name == f.TAG_NAME:
        return _is_begun_tag(backend, path)
    if name in _STARTS:
        start = _STARTS[name]
        return _start_of(backend, path, len(start)) in (start, None)  # or removed meanwhile
    return name in _LOCK_NAMES and status.st_size == 0


def _holds_only(backend: Backend, path: str, is_name: Callable[[str], bool]) -> bool:
    try:
        inside = backend.scandir(path)
    except FileNotFoundError:  # removed meanwhile
        return True
    return all(
        stat.S_ISREG(status.st_mode) and is_name(name)
        for name, status in inside
        if not _is_negligible(name, status)
    )


def _is_begun_tag(backend: Backend, path: str) -> bool:
    """True of our tag, or what a power cut left of it: it is durable before the rest."""
    found = _start_of(backend, path, len(f.TAG_TEXT) + 1) or b""
    return len(found) <= len(f.TAG_TEXT) and all(
        byte in (0, own) for byte, own in zip(found, f.TAG_TEXT, strict=False)
    )


def _make(backend: Backend, root: str, make: Callable[[str], None]) -> None:
    """Create the directory by `make`, and those above it, if they are missing; durably."""
    parent = os.path.dirname(root)
    try:
        try:
            make(root)
        except FileNotFoundError:
            if parent == root:
                raise
            _make(backend, parent, os.mkdir)
            make(root)
    except ours(OSError) as error:  # others were faster; or the system checks first whether it may be made
        if os.path.lexists(root):
            return
        if isinstance(error, FileExistsError):  # made and removed again by others
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), root) from error
        raise
    with contextlib.suppress(PermissionError):  # a parent that may be written but not read
        backend.sync_directory(parent)


def _check_kind(root: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise FormatError(f"{root!r} is a symbolic link, which is not followed: put a directory in its place")
    if not stat.S_ISDIR(status.st_mode):
        raise FormatError(f"{root!r} is not a directory: give another path")


def _check_owner(path: str, status: os.stat_result, admitted: bool) -> None:
    if not admitted:
        raise FormatError(
            f"{path!r} belongs to {user_name(status.st_uid)}, and this process runs as "
            f"{user_name(os.geteuid())}: what another user has prepared is not used; give a directory of "
            "your own, or let others in with directory_mode and file_mode, in all programs"
        )


def is_whole(backend: Backend, root: str) -> bool:
    """Whether the directories inside are there."""
    return all(_is_directory(backend, os.path.join(root, name)) for name in _NAMES_INSIDE)


def _is_directory(backend: Backend, path: str) -> bool:
    try:
        return stat.S_ISDIR(backend.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _make_inside(backend: Backend, settings: Settings, root: os.stat_result) -> None:
    made, trust = False, trust_of(settings)
    for name in _NAMES_INSIDE:
        path = os.path.join(settings.directory, name)
        if backend.mkdir(path, settings.directory_mode):
            made = True
        else:
            status = backend.lstat(path)
            _check_kind(path, status)
            _check_owner(path, status, trust.admits(status, root))
    if made:
        backend.sync_directory(settings.directory)
    if not os.access(settings.directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(settings.directory).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise OSError(code, os.strerror(code), settings.directory)


def _write_tag(backend: Backend, settings: Settings) -> None:
    """Make the directory ours, durably before anything else is in it: else it might be taken for foreign."""
    path = os.path.join(settings.directory, f.TAG_NAME)
    with backend.opened(path, os.O_WRONLY | os.O_CREAT, settings.file_mode) as fd:
        backend.write(fd, [f.TAG_TEXT], 0)  # another process that is creating the cache writes the same
        backend.sync(fd)
    backend.sync_directory(settings.directory)


def keep_tag(backend: Backend, settings: Settings) -> None:
    """Put the tag in its place if it is missing or damaged. Anything there but a file is left alone."""
    path = os.path.join(settings.directory, f.TAG_NAME)
    if has_tag(backend, settings.directory):
        return
    if not backend.exists(path) or stat.S_ISREG(backend.lstat(path).st_mode):
        _write_tag(backend, settings)


def has_tag(backend: Backend, root: str) -> bool:
    """Whether backup tools leave the directory out; a tag that is not quite ours will do."""
    return _begins(backend, os.path.join(root, f.TAG_NAME), f.TAG_TEXT.partition(b"\n")[0])


def _check_file_system(settings: Settings) -> None:
    if settings.allow_network_fs:
        return
    kind = file_system(settings.directory)
    if kind in NETWORK_FILE_SYSTEMS:
        what = f"is on a network file system ({kind}), where memory mappings and locks are not safe"
    elif kind.split(".")[0] in ("fuse", "fuseblk") and kind not in LOCAL_FUSE:
        what = f"is on a file system ({kind}) whose memory mappings and locks are not known to be safe"
    else:
        return
    raise ConfigurationError(
        f"directory {settings.directory!r} {what}: use a local disk (allow_network_fs=True insists)"
    )


def file_system(path: str) -> str:
    """The type of the file system that holds `path`, as in /proc/self/mountinfo; '' if unknown."""
    if not sys.platform.startswith("linux"):
        return ""
    device = os.stat(path).st_dev
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            return _kind_in(lines, f"{os.major(device)}:{os.minor(device)}", os.path.realpath(path))
    except ours(OSError):
        return ""


def _kind_in(mounts: Iterable[str], device: str, path: str) -> str:
    """By the device; by the mount point where files show another device than the mount (btrfs)."""
    longest, kind = 0, ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        found = right.split(" ", 1)[0]
        if fields[2] == device:
            return found
        place = _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 8)), fields[4])
        if len(place) >= longest and f"{path}/".startswith(place.rstrip("/") + "/"):
            longest, kind = len(place), found  # of several in one place the last one counts
    return kind


def boot_id() -> bytes:
    """16 bytes that change when the kernel starts anew; zeros where the system has no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except ours(OSError, ValueError):
        return bytes(16)
