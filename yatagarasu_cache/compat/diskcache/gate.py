"""What `transact` is made of: a lock for all users of this module on one directory, shared by those who
change one entry, and exclusive for a transaction. It is a file lock of its own, never the store's.

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
_PAUSE, _LONGEST_PAUSE = 0.0002, 0.01  # seconds between tries
_WANTED = 0.05  # for so long nobody comes in behind who waits
_LOOKS_EVERY = 8  # times that it is shared before it is looked whether somebody wants it alone
_LONG = 60.0  # seconds
_WORD = Struct("=Q")
_SHARED, _EXCLUSIVE = LOCK_SH | LOCK_NB, LOCK_EX | LOCK_NB


class Busy(Exception):
    """Somebody else has it all the time."""


class Gate:
    """The lock of one directory, as this process has it. Reentrant for the thread that has it exclusively."""

    def __init__(self, directory: str, mode: int) -> None:
        self._path, self._mode = os.path.join(directory, _NAME), mode
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._freed = threading.Condition(self._mutex)
        self._inside = self._waiting = 0  # threads that share it, and that would have it
        self._local = threading.local()
        self._entered = 0
        self._given_up = 0  # shares of the thread that has it alone now
        self._owner: int | None = None
        self._depth = 0
        self._fd = -1

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def after_fork(self) -> None:
        """The description of the file is shared with the parent, and so is what is locked by it: a child has
        its own."""
        if self._fd >= 0:
            os.close(self._fd)
        self._begin()

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it exclusively."""
        forks.ensure_own()  # a child of a fork has nothing
        return self._owner == threading.get_ident()

    # -- shared -------------------------------------------------------------------------------

    def enter(self, seconds: float) -> None:
        """Share it. `Busy` after so many seconds. No part of a transaction that this thread is in.

        A thread that shares it already, and so would wait for itself with who wants it alone, goes on: what
        is stored may be pickled, read or made by code that uses the cache.
        """
        if shares := self._shares:
            self._local.shares = shares + 1
            return
        deadline = None
        while True:
            with self._mutex:
                self._entered += 1
                looks = not self._entered % _LOOKS_EVERY or deadline is not None
                is_free = self._owner is None and not (looks and self._is_wanted())
                if is_free and (self._inside or self._lock(_SHARED)):
                    self._inside += 1
                    self._local.shares = 1
                    return
            deadline = deadline or time.monotonic() + seconds
            self._wait(deadline)

    @property
    def _shares(self) -> int:
        """How many times this thread shares it."""
        return getattr(self._local, "shares", 0)

    def leave(self) -> None:
        if shares := self._shares:
            self._local.shares = shares - 1
        if shares == 1:
            self._give_back()

    def _give_back(self) -> None:
        with self._mutex:
            self._inside -= 1
            if not self._inside:
                flock(self._fd, LOCK_UN)
                if self._waiting:
                    self._freed.notify_all()

    # -- exclusive ----------------------------------------------------------------------------

    def begin_alone(self, seconds: float) -> None:
        """Nobody else changes anything until `end_alone`. `Busy` after so many seconds."""
        if self.is_mine:
            self._depth += 1
            return
        shares = self._shares
        if shares:  # a single change, in the middle of which nobody else can tell whether it waits
            self._local.shares = 0
            self._give_back()
        try:
            self._take_alone(seconds)
        except BaseException:
            self._share_again(shares)
            raise
        self._given_up = shares

    def _share_again(self, shares: int) -> None:
        while shares and not self._shares:
            with contextlib.suppress(Busy):
                self.enter(_LONG)
        self._local.shares = shares

    def _take_alone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with self._mutex:
                if self._owner is None and not self._inside and self._lock(_EXCLUSIVE):
                    self._owner, self._depth = threading.get_ident(), 1
                    self._want(0)
                    return
                self._want(time.monotonic_ns() + int(_WANTED * 1e9))
            try:
                self._wait(deadline)
            except Busy:
                self._want(0)
                raise

    def end_alone(self) -> None:
        with self._mutex:
            self._depth -= 1
            if not self._depth:
                shares, self._given_up = self._given_up, 0
                self._owner = None
                flock(self._fd, LOCK_UN)
                self._freed.notify_all()
            else:
                shares = 0
        if shares:
            self._share_again(shares)

    # -- the file -----------------------------------------------------------------------------

    @property
    def is_in_place(self) -> bool:
        """Whether its file, if it has one already, is the one that others will open."""
        with self._mutex:
            if self._fd < 0:
                return True
            try:
                return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
            except FileNotFoundError:
                return False

    def open(self) -> None:
        """Make the file, if there is none."""
        with self._mutex:
            if self._fd < 0:
                self._open()

    def _open(self) -> None:
        """The mutex is held."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CacheIOError(errno.EINVAL, f"{self._path} is no regular file: remove it")
        self._fd = fd

    def _lock(self, how: int) -> bool:
        if self._fd < 0:
            self._open()
        try:
            flock(self._fd, how)
        except BlockingIOError:
            return False
        return True

    def _is_wanted(self) -> bool:
        """Whether somebody waits to have it alone."""
        if self._fd < 0:
            self._open()
        word = os.pread(self._fd, _WORD.size, 0)
        return len(word) == _WORD.size and 0 < _WORD.unpack(word)[0] - time.monotonic_ns() < 1e9

    def _want(self, until: int) -> None:
        """Written, not mapped: whoever cuts the file off, or fills the disk, would end all who map it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # then there is more to wait for
                os.pwrite(self._fd, _WORD.pack(until), 0)

    def _wait(self, deadline: float) -> None:
        """Until it may be free; `Busy` once the time is over."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise Busy
        with self._mutex:
            if self._owner is not None or self._inside:
                self._waiting += 1
                try:
                    self._freed.wait(min(left, _LONGEST_PAUSE))
                finally:
                    self._waiting -= 1
                return
        time.sleep(min(left, _PAUSE))


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
