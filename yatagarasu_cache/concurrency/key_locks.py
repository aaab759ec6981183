"""Locks by key, among threads, tasks and processes, which the kernel releases when a process ends.

All are bytes of one file. On Linux they are locked by its open file description (`F_OFD_SETLK`, Linux 3.15,
fcntl(2)), so they end with the last descriptor of it: when the process ends, however it does. A child of a
fork closes the one that it inherits. Elsewhere they are record locks of POSIX, which end with the process
too, are not inherited, and are given up if any descriptor of that file is closed in the process: there is
one only.

Such a lock does not exclude those who share it. So what this process has is in a table as well, `held`, which
all handles of the process on a directory share.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CacheIOError, ClosedError, from_os_error
from . import forks
from .bells import Bell
from .file_locks import GRACE, LOOK_EVERY, has_name
from .interruption import ours, suppressing
from .locks import new_lock

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows; opening says so
    fcntl = None  # type: ignore[assignment]

__all__ = ["LONGEST_PAUSE", "POSITIONS", "SHORTEST_PAUSE", "Claim", "KeyLocks", "Waiter", "current_task"]

# Seconds between tries to lock what another process has: its end is noticed within the longest.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.0005, 0.005
COURTESY = 0.012  # seconds that a process leaves to others that wait, before it takes a lock again
_MOST_COURTESIES = 1024  # noted at once
POSITIONS = 1 << 61  # each is two bytes: the lock itself, and a mark of those who wait for it
_RENEWALS = 100  # of a file that is removed again and again


class _Calls:
    """How the system wants to be asked."""

    def __init__(self, by_description: bool) -> None:
        self.take: int = getattr(fcntl, "F_OFD_SETLK" if by_description else "F_SETLK", 0)
        self.look: int = getattr(fcntl, "F_OFD_GETLK" if by_description else "F_GETLK", 0)
        self.by_description = by_description
        # struct flock; where it is not Linux's, what some systems have behind that is zero.
        linux = sys.platform == "linux"
        self._fields = struct.Struct("hhqqi" if linux else "qqihhi")
        self._kind = 0 if linux else 3

    def _flock(self, kind: int, byte: int) -> bytes:
        if self._kind:
            return self._fields.pack(byte, 1, 0, kind, os.SEEK_SET, 0)
        return self._fields.pack(kind, os.SEEK_SET, byte, 1, 0)

    def lock(self, fd: int, kind: int, byte: int) -> bool:
        """Lock a byte, or with F_UNLCK unlock it. False if somebody else has it."""
        try:
            fcntl.fcntl(fd, self.take, self._flock(kind, byte))
        except (BlockingIOError, PermissionError):  # either, says POSIX
            return False
        return True

    def is_locked(self, fd: int, byte: int) -> bool:
        """Whether anybody else has locked a byte, in whatever way."""
        found = fcntl.fcntl(fd, self.look, self._flock(fcntl.F_WRLCK, byte))
        return bool(self._fields.unpack(found[: self._fields.size])[self._kind] != fcntl.F_UNLCK)


_calls = _Calls(hasattr(fcntl, "F_OFD_SETLK"))


class Claim:
    """What holds a position, for a thread, or for a task that runs in it."""

    __slots__ = ("position", "task", "thread")

    def __init__(self, task: object = None) -> None:
        self.position = -1
        self.thread, self.task = threading.get_ident(), task


class Waiter:
    """One in a queue. Its bell rings when it has become the first, and when the first one should try."""

    __slots__ = ("bell",)

    def __init__(self) -> None:
        self.bell = Bell()


class KeyLocks:
    """The locks of one directory, as this process has them. No method waits for what others hold."""

    def __init__(self) -> None:
        self.held: dict[int, Claim] = {}
        self._queues: dict[int, deque[Waiter]] = {}
        self._courtesies: dict[int, float] = {}
        self._fd, self._path, self._closing = -1, "", False
        self._open: Callable[[], int] = lambda: -1
        self._looked = self._missed = 0.0
        self._guard = new_lock()  # short: while the file is used, or replaced
        _all.add(self)

    def prepare(self, path: str, open_file: Callable[[], int]) -> None:
        """Open the file, which `open_file` does, making it if need be."""
        if self._fd < 0:
            with self._guard:
                if self._fd < 0:
                    self._path, self._open = path, open_file
                    self._fd = open_file()

    @property
    def is_prepared(self) -> bool:
        return self._fd >= 0

    # -- one position -------------------------------------------------------------------------

    def take(self, claim: Claim, positions: Sequence[int]) -> bool:
        """Have `claim` hold the first of these that nobody holds. False if all are held."""
        return any(position not in self.held and self._take(claim, position) for position in positions)

    def _take(self, claim: Claim, position: int) -> bool:
        claim.position = position  # first: from here on `give_back` finds it
        if self.held.setdefault(position, claim) is not claim:
            return False
        taken = False
        try:
            taken = self._lock(position)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot lock a key") from error
        finally:
            if not taken:
                self.give_back(claim)
        return taken

    def _lock(self, position: int) -> bool:
        with self._guard:
            if self._fd < 0:
                raise ClosedError("the cache is closed: open it anew")
            for _ in range(_RENEWALS):
                if not _calls.lock(self._fd, fcntl.F_WRLCK, 2 * position):
                    if self._is_missed():
                        return False
                elif self._is_in_place():
                    return True
                self._renew()
        raise CacheIOError(
            errno.ESTALE, "the lock file is removed again and again: find out by whom", self._path
        )

    def _is_in_place(self) -> bool:
        """Whether the file still has its name, as `FileLock` looks for it: one that was removed excludes
        nobody."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return True
        if not has_name(self._fd, self._path):
            return False
        self._looked = now
        return True

    def _is_missed(self) -> bool:
        """The same for those who wait, less often."""
        now = time.monotonic()
        if now - self._missed >= GRACE:
            self._missed = now
            return has_name(self._fd, self._path)
        return True

    def _renew(self) -> None:
        """Go on with the file that has the name now. What is held is locked there too, unless others were
        faster: whoever removes the file of locks takes them away."""
        new = self._open()
        try:
            os.dup2(new, self._fd, inheritable=False)  # at once: others may be about to use it
        finally:
            os.close(new)
        for position in list(self.held):
            _calls.lock(self._fd, fcntl.F_WRLCK, 2 * position)

    def give_back(self, claim: Claim) -> None:
        """Idempotent. A claim of the parent's is none in a child."""
        position = claim.position
        if self.held.get(position) is not claim:
            return  # or it never was
        with self._guard:
            if self._fd >= 0:
                with suppressing(OSError):
                    _calls.lock(self._fd, fcntl.F_UNLCK, 2 * position)
            if self.held.get(position) is claim:
                del self.held[position]
            if self._closing and not self.held:
                self._close()

    def is_held(self, position: int) -> bool:
        """By anybody."""
        if position in self.held:
            return True
        with self._guard:
            return self._fd >= 0 and _calls.is_locked(self._fd, 2 * position)

    # -- those who wait -----------------------------------------------------------------------

    def enter(self, position: int, waiter: Waiter) -> bool:
        """Queue up in this process; whether it is the first."""
        with self._guard:
            queue = self._queues.setdefault(position, deque())
            queue.append(waiter)
            return queue[0] is waiter

    def is_first(self, position: int, waiter: Waiter) -> bool:
        queue = self._queues.get(position)
        return not queue or queue[0] is waiter

    def leave(self, position: int, waiter: Waiter) -> None:
        """Out of the queue; the next one is rung for. Idempotent."""
        with self._guard:
            queue = self._queues.get(position, deque())
            if waiter in queue:
                queue.remove(waiter)
            if not queue:
                self._queues.pop(position, None)
        self.ring(position)

    def ring(self, position: int) -> None:
        """Have the first in the queue try."""
        for waiter in list(self._queues.get(position, ()))[:1]:
            waiter.bell.ring()

    def show_waiting(self, position: int, waits: bool) -> None:
        """Tell other processes that somebody waits here for what they have, or does not any more."""
        with self._guard, suppressing(OSError):
            if self._fd >= 0:
                _calls.lock(self._fd, fcntl.F_RDLCK if waits else fcntl.F_UNLCK, 2 * position + 1)

    def note_courtesy(self, position: int) -> None:
        """Something was given back. If another process waits for it, this one lets it go first."""
        with self._guard, suppressing(OSError):
            if self._fd < 0 or not _calls.is_locked(self._fd, 2 * position + 1):
                return
            now = time.monotonic()
            if len(self._courtesies) >= _MOST_COURTESIES:
                self._courtesies = {at: end for at, end in self._courtesies.items() if end > now}
            self._courtesies[position] = now + COURTESY

    def courtesy(self, position: int) -> float:
        """Seconds for which to let others go first."""
        return max(self._courtesies.pop(position, 0.0) - time.monotonic(), 0.0)

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """No more is taken. The file is closed when all that is held was given back."""
        with self._guard:
            self._closing = True
            if not self.held:
                self._close()

    def _close(self) -> None:
        self._fd, fd = -1, self._fd
        if fd >= 0:
            os.close(fd)

    def after_fork(self) -> None:
        """A child has none of it, and keeps nothing locked by its descriptor."""
        self._guard, self.held, self._queues, self._courtesies = new_lock(), {}, {}, {}
        self._close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self._close()


_all: weakref.WeakSet[KeyLocks] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for locks in list(_all):
        locks.after_fork()


forks.register(_let_go_in_child)


def current_task() -> Any:
    """The task that runs in this thread; None if there is none. asyncio is not loaded for it."""
    events, tasks = sys.modules.get("asyncio.events"), sys.modules.get("asyncio.tasks")
    if events is None or tasks is None:
        return None
    loop = events._get_running_loop()
    return None if loop is None else tasks.current_task(loop)
