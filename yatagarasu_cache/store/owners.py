"""Who is alive: one locked file for each writing handle, and one that all handles share.

Locks of the kernel end with the process that holds them, however it ends, and work across the
process-id namespaces of containers, where process ids would not.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..backends.base import NO_FILE, Backend, Entry
from ..concurrency.file_locks import claim, fcntl, has_name, lock_mode, narrow, share
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import new_lock
from ..errors import LockTimeout
from . import format as f

_MOST_NAMED = 500  # pointers in a mark; files beyond these are not spared, and are stored once more

_TRIES = 100  # to make a mark, where others lock or remove it

Made = Callable[[Callable[[], Any]], Any]  # `directory.made`, of a cache
Files = Callable[[str], list[Entry]]  # `CacheFiles.files_in`


class Note(NamedTuple):
    """What a handle says of itself, for whoever outlives it."""

    segment: int = 0  # that it appends to
    storing: int = 0  # bytes of large files,
    leaving: int = 0  # and of those that it is removing
    named: tuple[int, ...] = ()  # pointers, for the names of those that it is storing

    def pack(self) -> bytes:
        named = sorted(self.named)[:_MOST_NAMED]  # a flush needs to know the lowest
        return f.MARK.pack(*self[:3], len(named)) + struct.pack(f"<{len(named)}Q", *named)

    @classmethod
    def unpack(cls, data: bytes) -> Note:
        """An empty note, if these are not the bytes of one."""
        if len(data) < f.MARK.size:
            return cls()
        segment, storing, leaving, count = f.MARK.unpack_from(data)
        end = f.MARK.size + 8 * count
        if count > _MOST_NAMED or end > len(data) or segment > f.LAST_SEGMENT:
            return cls()
        if max(storing, leaving) > f.MOST_BYTES:
            return cls()
        return cls(segment, storing, leaving, struct.unpack(f"<{count}Q", data[f.MARK.size : end]))

    @property
    def is_under_way(self) -> bool:
        return bool(self.storing or self.leaving)


class _Held:
    """A locked file that is open for as long as somebody is there."""

    _backend: Backend
    _fd = -1

    def __del__(self) -> None:
        if self._fd >= 0:  # an exception came before it was given up
            self._backend.let_go(self._fd)

    def let_go_in_child(self) -> None:
        """Close it without giving up the lock, which is the parent's."""
        inherited, self._fd = self._fd, -1
        if inherited >= 0:
            os.close(inherited)


class Owner(_Held):
    """This handle's mark of life, named by a random token that stands in the segment table."""

    def __init__(self, backend: Backend, root: str, mode: int, made: Made, files: Files) -> None:
        self._backend, self._mode, self._made, self._files = backend, lock_mode(mode), made, files
        self.directory = os.path.join(root, f.WRITERS_NAME)
        self.token = 0
        self._fd = -1
        self._acquiring = new_lock()
        self._stays = False
        self._noted = Note()

    def _path(self, token: int) -> str:
        return os.path.join(self.directory, f"{token:016x}{f.WRITER_SUFFIX}")

    def acquire(self) -> int:
        """The token; taken at the first write, so that readers leave no trace."""
        with self._acquiring:
            for _ in range(_TRIES):
                if self.token:
                    return self.token
                token = secrets.randbits(63) | 1
                fd = self._make(self._path(token))
                if fd >= 0:
                    self.token, self._fd = token, fd
                    if any(self._noted):  # in a mark that was removed since
                        self._write()
            line = "the mark of this handle is locked, or removed, again and again: find out by whom"
            raise LockTimeout(errno.ETIMEDOUT, line, self.directory)

    def _make(self, path: str) -> int:
        """A mark of life, locked; -1 if a sweep, or somebody's lock, came between creating and locking it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        fd: int = self._made(lambda: self._backend.open(path, flags, self._mode))
        try:
            stays = claim(fd) and os.fstat(fd).st_nlink > 0
        except BaseException:
            self._backend.let_go(fd)
            self._backend.clear_away(path)
            raise
        if stays:
            return fd
        self._backend.let_go(fd)
        self._backend.clear_away(path)
        return -1

    def ensure_marked(self) -> None:
        """Take another token if somebody has removed our mark: others believe us dead."""
        if self._fd >= 0 and not has_name(self._fd, self._path(self.token)):
            self.release()

    def note(self, segment: int) -> None:
        """Say which segment this handle appends to, for whoever has to rebuild the index."""
        self._noted = self._noted._replace(segment=segment)
        self._write()

    def note_under_way(self, storing: int, leaving: int, named: tuple[int, ...]) -> None:
        """Note, for whoever outlives this handle, how many bytes of large files it is storing and removing,
        and which files are to be spared. The index lock is held."""
        self._noted = Note(self._noted.segment, storing, leaving, named)
        if self._fd >= 0:
            self._write()
        elif storing or leaving:
            self.acquire()

    def _write(self) -> None:
        self._backend.write(self._fd, [self._noted.pack()], 0)

    def noted(self, token: int) -> Note:
        """What the handle with this token noted last."""
        if token == self.token:
            return self._noted
        try:
            with self._backend.reading(self._path(token)) as fd:
                return Note.unpack(self._backend.read(fd, f.MARK.size + 8 * _MOST_NAMED, 0))
        except PermissionError:
            return Note()
        except ours(OSError) as error:
            if error.errno not in NO_FILE:
                raise
            return Note()

    def notes_of_living(self) -> list[Note]:
        """What each handle that lives noted last, this one included."""
        return [self.noted(token) for token in self.alive_tokens() | {self.token}]

    def named(self) -> set[int]:
        """Pointers of the large files that living handles are storing, this one included."""
        return {pointer for note in self.notes_of_living() for pointer in note.named}

    def is_alive(self, token: int) -> bool:
        """True while the handle with this token exists in some process."""
        if token == self.token:
            return True
        try:
            with self._backend.reading(self._path(token)) as fd:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (PermissionError, BlockingIOError):  # another user's: nobody here can tell; or locked
            return True
        except ours(OSError) as error:
            if error.errno not in NO_FILE:
                raise
        return False

    def alive_tokens(self) -> set[int]:
        """Tokens of all living handles."""
        return self.marks()[0]

    def any_dead(self) -> bool:
        """True if a handle died since marks were last swept."""
        return bool(self.marks()[1])

    def has_others(self) -> bool:
        """True if another handle that has a mark is alive."""
        return bool(self.alive_tokens() - {self.token})

    def sweep(self, dead: Iterable[int]) -> None:
        """Remove the marks of dead handles that have left nothing behind."""
        for token in dead:
            self._backend.unlink(self._path(token))

    def marks(self) -> tuple[set[int], list[int]]:
        """Tokens of living handles, and of dead ones."""
        alive: set[int] = set()
        dead: list[int] = []
        for name, _ in self._files(self.directory):
            token = f.parse_writer_name(name)
            if token is None:
                continue
            if self.is_alive(token):
                alive.add(token)
            else:
                dead.append(token)
        return alive, dead

    def stay_marked(self) -> None:
        """Leave the mark where it is, as the dead do: something is left to be tidied up."""
        self._stays = True

    def release(self) -> None:
        if self._fd >= 0:
            try:
                if not self._stays:  # one left behind is swept by the next opener
                    self._backend.clear_away(self._path(self.token))
            finally:
                self._fd, fd, self.token = -1, self._fd, 0
                self._backend.let_go(fd)

    def after_fork(self) -> None:
        self.let_go_in_child()  # the mark stays the parent's: it is not removed
        self.token, self._fd, self._stays, self._acquiring = 0, -1, False, new_lock()
        self._noted = Note()


class Users(_Held):
    """A shared lock that every open handle holds; whoever gets it exclusively is alone.

    But if the file was removed, others may still hold the lock of the old one: so the marks of handles
    that have written are checked as well.
    """

    def __init__(
        self, backend: Backend, root: str, mode: int, made: Made, owner: Owner, timeout: float | None = None
    ) -> None:
        self._backend, self._mode, self._made, self._owner = backend, lock_mode(mode), made, owner
        self._timeout = timeout
        self._path = os.path.join(root, f.USERS_NAME)
        self._fd = -1

    def enter(self) -> bool:
        """Become a user. True if there is no other. Called under the index lock."""
        self._fd = self._open()
        narrow(self._fd)
        return self.is_alone()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT
        fd: int = self._made(lambda: self._backend.open(self._path, flags, self._mode))
        return fd

    def ensure_entered(self) -> bool:
        """Be a user of the file that has the name now; True if that is another one. Called under the lock."""
        if self._fd >= 0 and has_name(self._fd, self._path):
            return False
        self.leave()
        self.enter()
        return True

    def is_alone(self) -> bool:
        """True if no other handle is open. Called under the index lock, so that none comes meanwhile."""
        return self._holds_alone() and not self._owner.has_others()

    def _holds_alone(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:  # a failed conversion may have dropped the shared lock: flock(2)
            try:
                share(self._fd, self._path, self._timeout)
            except BaseException:  # an interruption: nobody could open the cache if this were left alone
                with suppressing(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                raise

    def leave(self) -> None:
        if self._fd >= 0:
            self._fd, fd = -1, self._fd
            self._backend.let_go(fd)

    def after_fork(self) -> None:
        if self._fd >= 0:
            self.let_go_in_child()
            self._fd = self._open()
            share(self._fd, self._path, self._timeout)
