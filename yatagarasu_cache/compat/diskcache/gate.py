"""What `transact` is made of: a lock for all users of this module on one directory, shared by those who
change one entry, and exclusive for a transaction. It is a file lock of its own, never the store's.

A thread has an open description of the file of its own for each `Cache`, so that the kernel tells these apart
as it does processes, and nothing else is kept of who has what: a change costs two system calls.

A shared holder waits for no other one. Whoever wants it exclusively says so in the file, by a time until
which nobody new comes in: so it is his turn soon, and if he dies meanwhile, that time passes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import weakref
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from struct import Struct

from ...concurrency import forks
from ...concurrency.interruption import descriptor_of
from ...errors import CacheIOError

__all__ = ["Busy", "Gate", "Turn", "forget_changes"]

_NAME = "transact.lock"
_PAUSE, _LONGEST_PAUSE = 0.0002, 0.005  # seconds between tries
_WANTED = 0.05  # for so long nobody comes in behind who waits
_LOOKS_EVERY = 8  # times that it is shared before it is looked whether somebody wants it alone
_LONG = 60.0  # seconds
_WORD = Struct("=Q")
_SHARED, _EXCLUSIVE = LOCK_SH | LOCK_NB, LOCK_EX | LOCK_NB


class Busy(Exception):
    """Somebody else has it all the time."""


class _Share:
    """What one thread has of a gate."""

    __slots__ = ("__weakref__", "changes", "entered", "fd", "turns")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.changes = 0  # that the thread is in, one within the other
        self.turns: set[Turn] = set()  # transactions, likewise
        self.entered = 0

    def close(self) -> None:
        """Closing does not unlock what the parent of a fork has."""
        fd, self.fd = self.fd, -1
        self.turns.clear()
        if fd >= 0:
            os.close(fd)

    __del__ = close  # the thread has ended


class Gate:
    """The lock of one directory, for the threads that use one `Cache`. Reentrant for a thread that has it."""

    def __init__(self, directory: str, mode: int) -> None:
        self._path, self._mode = os.path.join(directory, _NAME), mode
        self._local = threading.local()
        self._shares: weakref.WeakSet[_Share] = weakref.WeakSet()
        _all.add(self)
        self._place = os.fstat(self._mine().fd)

    def after_fork(self) -> None:
        """A child has nothing."""
        self._local = threading.local()
        for share in list(self._shares):
            share.close()

    @property
    def is_in_place(self) -> bool:
        """Whether its file is the one that others will open: the directory may have been made anew."""
        try:
            return os.path.samestat(self._place, os.lstat(self._path))
        except FileNotFoundError:
            return False

    def _mine(self) -> _Share:
        forks.ensure_own()
        try:
            return self._local.share  # type: ignore[no-any-return]
        except AttributeError:
            share = self._local.share = _Share(self._open())
            self._shares.add(share)
            return share

    @property
    def of_thread(self) -> _Share | None:
        """What this thread has of it, if it has ever used it."""
        return getattr(self._local, "share", None)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return descriptor_of(os.open, self._path, flags, self._mode, check=self._ensure_regular)

    def _ensure_regular(self, fd: int) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CacheIOError(errno.EINVAL, f"{self._path} is no regular file: remove it")

    # -- a change -----------------------------------------------------------------------------

    def enter(self, seconds: float) -> _Share:
        """Share it, until `leave` of what this returns. `Busy` after so many seconds.

        A thread that has it already goes on: it would wait for itself, or with whoever wants it alone. What
        is stored may be pickled, read or made by code that uses the cache.
        """
        return self.enter_at_once() or self._enter(self._mine(), seconds)

    def enter_at_once(self) -> _Share | None:
        """The same, if nothing is in the way; else None. With few calls, since each change begins with it."""
        forks.ensure_own()
        share: _Share | None = getattr(self._local, "share", None)
        if share is None:
            return None
        if share.changes or share.turns:
            share.changes += 1
            return share
        share.entered += 1
        if not share.entered % _LOOKS_EVERY and self._is_wanted(share):
            return None
        try:
            flock(share.fd, _SHARED)
        except BlockingIOError:
            return None
        except BaseException:  # an interruption, perhaps when it was locked already
            flock(share.fd, LOCK_UN)
            raise
        share.changes = 1
        return share

    def _enter(self, share: _Share, seconds: float) -> _Share:
        self._share(share, seconds)
        share.changes = 1
        return share

    def _share(self, share: _Share, seconds: float) -> None:
        pauses = _Pauses(seconds)
        while self._is_wanted(share) and not _is_changing() or not _lock(share, _SHARED):
            pauses.wait()

    def leave(self, share: _Share) -> None:
        if share.fd >= 0:  # a child of a fork has nothing
            share.changes -= share.changes > 0
            if not share.changes and not share.turns:
                flock(share.fd, LOCK_UN)

    # -- a transaction ------------------------------------------------------------------------

    def turn(self) -> Turn:
        """A transaction of this thread, which has not begun."""
        return Turn(self, self._mine())

    def take_alone(self, share: _Share, seconds: float) -> None:
        """`Busy` after so many seconds."""
        if share.changes:  # a single change, in the middle of which nobody else can tell whether it waits
            flock(share.fd, LOCK_UN)
        pauses, waits = _Pauses(seconds), False
        try:
            while not _lock(share, _EXCLUSIVE):
                waits = True
                self._want(share, time.monotonic_ns() + int(_WANTED * 1e9))
                pauses.wait()
        finally:
            if waits:
                self._want(share, 0)

    def give_back(self, share: _Share) -> None:
        """The last transaction has ended; a change that it was within goes on."""
        flock(share.fd, LOCK_UN)
        while share.changes and not share.turns:
            with contextlib.suppress(Busy):
                return self._share(share, _LONG)

    # -- the word in the file -----------------------------------------------------------------

    def _is_wanted(self, share: _Share) -> bool:
        """Whether somebody waits to have it alone."""
        word = os.pread(share.fd, _WORD.size, 0)
        return len(word) == _WORD.size and 0 < _WORD.unpack(word)[0] - time.monotonic_ns() < 1e9

    def _want(self, share: _Share, until: int) -> None:
        """Written, not mapped: whoever cuts the file off, or fills the disk, would end all who map it."""
        with contextlib.suppress(OSError):  # then there is more to wait for
            os.pwrite(share.fd, _WORD.pack(until), 0)


class Turn:
    """One transaction. It may end anywhere: in another thread, in a child of a fork, twice, or without having
    begun, when an exception came before anybody could know that it had."""

    def __init__(self, gate: Gate, share: _Share) -> None:
        self._gate, self._share = gate, share

    def begin(self, seconds: float) -> None:
        """Nobody else changes anything until `end`. `Busy` after so many seconds."""
        others = bool(self._share.turns)
        self._share.turns.add(self)
        if not others:
            self._gate.take_alone(self._share, seconds)

    def end(self) -> None:
        forks.ensure_own()
        share = self._share
        share.turns.discard(self)
        if share.fd >= 0 and not share.turns:
            self._gate.give_back(share)


class _Pauses:
    """Between tries, longer ones as it takes longer."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._next = _PAUSE

    def wait(self) -> None:
        """`Busy` once the time is over."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Busy
        time.sleep(min(left, self._next))
        self._next = min(1.5 * self._next, _LONGEST_PAUSE)


def _lock(share: _Share, how: int) -> bool:
    try:
        flock(share.fd, how)
        return True
    except BlockingIOError:
        return False
    except BaseException:  # an interruption, perhaps when it was locked already
        flock(share.fd, LOCK_UN)
        raise


_all: weakref.WeakSet[Gate] = weakref.WeakSet()


def _shares_of_thread() -> list[_Share]:
    return [share for gate in list(_all) if (share := gate.of_thread) is not None]


def _is_changing() -> bool:
    """Whether this thread is in the middle of a change, of whichever cache: whoever waits for the end of that
    must not be waited for."""
    return any(share.changes for share in _shares_of_thread())


def forget_changes() -> None:
    """An exception has ended all changes of this thread, wherever it came: perhaps before they knew that they
    had begun, or when they had not noted that they had ended."""
    for share in _shares_of_thread():
        share.changes = 0
        if not share.turns and share.fd >= 0:
            flock(share.fd, LOCK_UN)


def _renew_in_child() -> None:
    for gate in list(_all):
        gate.after_fork()


forks.register(_renew_in_child)
