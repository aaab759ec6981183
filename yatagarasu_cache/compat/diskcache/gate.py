"""What `transact` is made of: a lock for all users of this module on one directory, shared by those who
change one entry, and exclusive for a transaction. It is a file lock of its own, never the store's.

A thread has an open description of the file of its own, so that the kernel tells threads apart as it does
processes, and nothing else is kept of who has what: a change costs two system calls.

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
from ...errors import CacheIOError

__all__ = ["Busy", "Gate", "gate_of"]

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

    __slots__ = ("depth", "entered", "fd", "given_up", "is_alone")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.depth = 0  # changes and transactions that it is in, one within the other
        self.entered = 0
        self.is_alone = False
        self.given_up = 0  # `depth` as it was when it began to be alone

    def __del__(self) -> None:
        """The thread has ended, or this is a child of a fork, which has nothing: closing does not unlock what
        its parent has."""
        os.close(self.fd)


class Gate:
    """The lock of one directory, as this process has it. Reentrant for a thread that has it."""

    def __init__(self, directory: str, mode: int) -> None:
        self._path, self._mode = os.path.join(directory, _NAME), mode
        self._local = threading.local()
        self._place = _identity(os.fstat(self._mine().fd))
        _all.add(self)

    def after_fork(self) -> None:
        self._local = threading.local()

    def _mine(self) -> _Share:
        forks.ensure_own()
        try:
            return self._local.share  # type: ignore[no-any-return]
        except AttributeError:
            share = self._local.share = _Share(self._open())
            return share

    def _open(self) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CacheIOError(errno.EINVAL, f"{self._path} is no regular file: remove it")
        return fd

    @property
    def is_in_place(self) -> bool:
        """Whether its file is the one that others will open."""
        try:
            return self._place == _identity(os.lstat(self._path))
        except FileNotFoundError:
            return False

    # -- shared -------------------------------------------------------------------------------

    def enter(self, seconds: float) -> None:
        """Share it. `Busy` after so many seconds.

        A thread that has it already goes on: it would wait for itself, or with whoever wants it alone. What
        is stored may be pickled, read or made by code that uses the cache.
        """
        share = self._mine()
        if share.depth:
            share.depth += 1
            return
        share.entered += 1
        looks = not share.entered % _LOOKS_EVERY
        if not (looks and self._is_wanted(share)) and _lock(share, _SHARED):
            share.depth = 1
            return
        pauses = _Pauses(seconds)
        while self._is_wanted(share) or not _lock(share, _SHARED):
            pauses.wait()
        share.depth = 1

    def leave(self) -> None:
        share = self._mine()
        share.depth -= share.depth > 0  # a child of a fork has nothing
        if not share.depth:
            flock(share.fd, LOCK_UN)

    # -- exclusive ----------------------------------------------------------------------------

    def begin_alone(self, seconds: float) -> None:
        """Nobody else changes anything until `end_alone`. `Busy` after so many seconds."""
        share = self._mine()
        if share.is_alone:
            share.depth += 1
            return
        given_up, share.depth = share.depth, 0
        if given_up:  # a single change, in the middle of which nobody else can tell whether it waits
            flock(share.fd, LOCK_UN)
        try:
            self._take_alone(share, seconds)
        except BaseException:
            self._share_again(share, given_up)
            raise
        share.given_up = given_up

    def _take_alone(self, share: _Share, seconds: float) -> None:
        pauses, waits = _Pauses(seconds), False
        try:
            while not _lock(share, _EXCLUSIVE):
                waits = True
                self._want(share, time.monotonic_ns() + int(_WANTED * 1e9))
                pauses.wait()
            share.is_alone, share.depth = True, 1
        finally:
            if waits:
                self._want(share, 0)

    def end_alone(self) -> None:
        share = self._mine()
        share.depth -= share.depth > 0
        if share.depth or not share.is_alone:
            return
        share.is_alone = False
        flock(share.fd, LOCK_UN)
        self._share_again(share, share.given_up)

    def _share_again(self, share: _Share, depth: int) -> None:
        while depth and not share.depth:
            with contextlib.suppress(Busy):
                self.enter(_LONG)
        share.depth = depth

    # -- the word in the file -----------------------------------------------------------------

    def _is_wanted(self, share: _Share) -> bool:
        """Whether somebody waits to have it alone."""
        word = os.pread(share.fd, _WORD.size, 0)
        return len(word) == _WORD.size and 0 < _WORD.unpack(word)[0] - time.monotonic_ns() < 1e9

    def _want(self, share: _Share, until: int) -> None:
        """Written, not mapped: whoever cuts the file off, or fills the disk, would end all who map it."""
        with contextlib.suppress(OSError):  # then there is more to wait for
            os.pwrite(share.fd, _WORD.pack(until), 0)


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


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


_all: weakref.WeakSet[Gate] = weakref.WeakSet()
_gates: weakref.WeakValueDictionary[str, Gate] = weakref.WeakValueDictionary()
_making = threading.Lock()


def gate_of(directory: str, mode: int) -> Gate:
    """The one of this process for a directory."""
    path = os.path.realpath(directory)
    with _making:
        gate = _gates.get(path)
        if gate is None or not gate.is_in_place:  # the directory was removed, and made anew
            gate = _gates[path] = Gate(path, mode)
        return gate


def _renew_in_child() -> None:
    global _making
    _making = threading.Lock()
    for gate in list(_all):
        gate.after_fork()


forks.register(_renew_in_child)
