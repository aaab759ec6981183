"""Locks between processes: file locks, which the kernel releases when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Sized
from typing import Any, Protocol

from ..errors import CacheIOError, ClosedError, LockTimeout, Reentered
from .cancelling import heed
from .interruption import ours, suppressing
from .locks import await_lock, file_locks

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock; opening says so
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "GRACE", "LOOK_EVERY", "FileLock", "NoLock", "claim", "fcntl", "has_name", "is_kept", "keep", "lock_mode",
    "narrow", "share",
]  # fmt: skip

_TRIES = 30  # to lock the file, before sleeping in between
_FEW_TRIES = 8  # where nobody is waited for
# Seconds between tries. They grow, at last to a part of the time that was waited: hundreds of processes that
# tried more often would take the processors from the one that holds the lock, where others need them too.
_SHORTEST_SLEEP, _LONG_SLEEP, _LONGEST_SLEEP = 0.00005, 0.01, 0.25
_SLEEPS_PART = 1 / 16
# Seconds for which a file is believed to have its name still; and for which a process that replaces one
# waits, so that all others have looked meanwhile, and have left the file that was removed.
LOOK_EVERY = 0.01
GRACE = 0.05
_RENEWALS = 100  # of a lock file that is removed again and again
_WITHOUT_WAITING = fcntl.LOCK_EX | fcntl.LOCK_NB if fcntl else 0
# Locks of open files (not of processes), independent of flock's. Where there are none, other than on Linux,
# files are not kept, and not emptied.
_OFD_LOCK: int = getattr(fcntl, "F_OFD_SETLK", 0)
_FLOCK = "hhqqi"  # struct flock: type, whence, start, length (0: all of it), process


def has_name(fd: int, path: str) -> bool:
    """Whether an open file is the one at `path`: it was not removed, moved away or replaced."""
    own = os.fstat(fd)
    if not own.st_nlink:
        return False
    try:
        return os.path.samestat(own, os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ours(OSError):  # this user may no longer look there
        return True


class Files(Protocol):
    """What is needed of a backend."""

    def exists(self, path: str) -> bool: ...

    def open(self, path: str, flags: int, mode: int = ...) -> int: ...

    def let_go(self, fd: int) -> None: ...


class FileLock:
    """Excludes other threads and processes; the thread that holds it may take it again.

    The lock has a file of its own, which is never handed to a ring: the kernel may keep a registered
    file, and so its lock, alive after the process was killed.

    A file that was removed excludes nobody: after locking it, its name is checked, and if that belongs to
    another file now, that one is locked. `timeout`: seconds to wait, None for any time.
    """

    def __init__(
        self, files: Files, path: str, mode: int, timeout: float | None = None,
        on_gone: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._files, self._path, self._mode = files, path, mode
        self._timeout = timeout
        self.threads: Any = threading.RLock()
        self._depth = 0
        self.fd = -1
        self._looked = 0.0
        self.on_enter: Any = None  # called once the lock is held by a new owner
        self.on_gone = on_gone  # called when the file has lost its name, before it is made anew
        self.waiting: Sized = ()  # if it is not empty when the lock was given back,
        self.on_exit: Any = None  # this is called
        self.fd, self.made = self._open()
        narrow(self.fd)
        file_locks.add(self)

    def _open(self) -> tuple[int, bool]:
        """The file, and whether it had to be made."""
        made = not self._files.exists(self._path)
        return self._files.open(self._path, os.O_RDWR | os.O_CREAT, lock_mode(self._mode)), made

    def ensure_in_place(self) -> None:
        """Look now whether the file still has its name, and go on with the one that has. The lock is held."""
        self._looked = 0.0
        self._lock_file()

    # -- taking it ----------------------------------------------------------------------------

    def __enter__(self) -> FileLock:
        if not self.threads.acquire(False) and not await_lock(self.threads, self._timeout):
            raise self._timed_out("another thread of this process")
        if not self._depth:
            try:
                self._lock_file()
            except BaseException as error:
                self.give_up()  # it may have come just after the file was locked
                if self.fd < 0:
                    raise ClosedError("the cache is closed: open it anew") from error
                raise
            self._entered()
        else:
            self._depth += 1
        return self

    def _entered(self) -> None:
        self._depth = 1
        if self.on_enter is not None:
            try:
                self.on_enter()
            except BaseException:
                self.__exit__()
                raise

    def try_to_enter(self) -> bool:
        """Acquire the lock if nobody has it, without waiting. Leave it as by ``with``."""
        if not self.threads.acquire(False):
            return False
        if self._depth:
            self._depth += 1
            return True
        try:
            taken = self._try(_FEW_TRIES) and self._is_in_place()
            if not taken and not has_name(self.fd, self._path):
                self._renew()
                taken = self._try(_FEW_TRIES) and self._is_in_place()
        except BaseException:
            self.give_up()
            raise
        if taken:
            self._entered()
        else:
            self._unlock()
            self.threads.release()
        return taken

    def _is_in_place(self) -> bool:
        """Whether the file still has its name. The lock is held."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return True
        if not has_name(self.fd, self._path):
            return False
        self._looked = now
        return True

    def _lock_file(self) -> None:
        for _ in range(_RENEWALS):
            # Others hold it for microseconds, and a sleeper wakes milliseconds later where the processors
            # are busy: so try for a while first.
            if (self._try(_TRIES) or self._wait()) and self._is_in_place():
                return
            self._renew()
        line = "the lock file is removed again and again: find out by whom"
        raise CacheIOError(errno.ESTALE, line, self._path)

    def _try(self, times: int) -> bool:
        for _ in range(times):
            try:
                fcntl.flock(self.fd, _WITHOUT_WAITING)
                return True
            except BlockingIOError:
                pass
        return False

    def _wait(self) -> bool:
        """Wait until the others release it; False if the file they hold is removed meanwhile.

        It polls, as a blocking flock() takes no timeout.
        """
        if self._is_mine_elsewhere():
            raise Reentered(
                f"this thread has locked {self._path!r} by another handle, whose work a signal handler, a "
                "destructor or a logging handler has interrupted: have that use the cache in another thread"
            )
        begun = time.monotonic()
        deadline = None if self._timeout is None else begun + self._timeout
        sleep, look_at = _SHORTEST_SLEEP, begun + GRACE
        while not self._try(1):
            heed()
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise self._timed_out(_holder(self.fd))
            if now >= look_at:
                if not has_name(self.fd, self._path):
                    return False
                look_at = now + GRACE
            time.sleep(sleep if deadline is None else min(sleep, deadline - now))
            sleep = _longer(sleep, now - begun)
        return True

    def _is_mine_elsewhere(self) -> bool:
        """Whether this thread has locked the same file by another handle, and so waits for itself."""
        own = os.fstat(self.fd)
        for other in file_locks:
            if other is not self and other.fd >= 0 and other.threads._is_owned():
                with suppressing(OSError):
                    if os.path.samestat(own, os.fstat(other.fd)):
                        return True
        return False

    def _timed_out(self, holder: str) -> LockTimeout:
        return _timed_out(self._path, self._timeout, holder)

    def _renew(self) -> None:
        """The file was removed. Go on with the one that has its name now, or make it."""
        if self.on_gone is not None:
            self.on_gone()
        try:
            fd, made = self._open()
        except FileNotFoundError:  # the directory was removed again
            return
        self.fd, old = fd, self.fd
        self._files.let_go(old)
        narrow(self.fd)
        if made and self._try(1):
            time.sleep(GRACE)  # holding it: somebody may still be working under the lock that was removed

    # -- giving it back -----------------------------------------------------------------------

    def __exit__(self, *_: object) -> None:
        # In this order: while the thread's lock is held, `give_back` finds what an exception left behind.
        if self._depth == 1:
            try:
                self._unlock()
            except ours(OSError):  # this process's other threads must not wait for ever
                self.give_up()
                raise
        self._depth -= 1
        self.threads.release()
        if self.waiting and not self._depth:
            self.on_exit()

    def _unlock(self) -> None:
        if self.fd >= 0:  # else it was closed, which gave it up
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def give_up(self) -> None:
        """Release it, however often this thread has taken it, and however far that came."""
        self._depth = 0
        with suppressing(OSError):
            self._unlock()
        while self.threads._is_owned():
            self.threads.release()

    def give_up_own(self) -> None:
        """The same, if this thread has it."""
        if self.threads._is_owned():
            self.give_up()

    def let_go_in_child(self) -> None:
        """Close the file without releasing the lock: the parent may hold it."""
        inherited, self.fd = self.fd, -1
        if inherited >= 0:
            os.close(inherited)

    def after_fork(self) -> None:
        """A child needs an open file of its own: it shares the parent's lock otherwise."""
        self.let_go_in_child()
        self.threads, self._depth = threading.RLock(), 0
        self.fd, _ = self._open()

    def close(self) -> None:
        """Waits for a thread that holds the lock, unless that is this one. Those who wait find it closed."""
        with self.threads:
            if self.fd >= 0:
                try:  # a child that is forked just now may keep the file open, and with it the lock
                    self._unlock()
                finally:
                    self.fd, fd = -1, self.fd
                    self._files.let_go(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # an exception came before it was closed
            self._files.let_go(self.fd)


class NoLock(contextlib.nullcontext[None]):
    """For a cache opened read-only, which excludes nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: Any = threading.RLock()

    def give_up_own(self) -> None:
        pass

    def let_go_in_child(self) -> None:
        pass

    def after_fork(self) -> None:
        pass

    def close(self) -> None:
        pass


def lock_mode(mode: int) -> int:
    """`mode` for a lock file: a user who may only read it could lock it and keep all others waiting, so
    those who may not write to it may not read it either."""
    return 0o600 | sum(bits for bits in (0o060, 0o006) if mode & bits == bits)


def narrow(fd: int) -> None:
    """Take away the right to only read a lock file, which an earlier release gave. Only its owner can."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & 0o077 & ~lock_mode(mode):
        with suppressing(OSError):
            os.fchmod(fd, mode & lock_mode(mode))


def share(fd: int, path: str, timeout: float | None) -> None:
    """Take a shared lock of a file; wait `timeout` seconds at most for one who holds it exclusively."""
    begun = time.monotonic()
    deadline = None if timeout is None else begun + timeout
    sleep = _SHORTEST_SLEEP
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise _timed_out(path, timeout, _holder(fd)) from None
        heed()
        time.sleep(sleep if deadline is None else min(sleep, deadline - now))
        sleep = _longer(sleep, now - begun)


def _longer(sleep: float, waited: float) -> float:
    """The seconds to sleep next."""
    return min(1.5 * sleep, max(_LONG_SLEEP, _SLEEPS_PART * waited), _LONGEST_SLEEP)


def _timed_out(path: str, timeout: float | None, holder: str) -> LockTimeout:
    return LockTimeout(
        errno.ETIMEDOUT,
        f"waited {timeout:g} s (lock_timeout) for the lock, which is held by {holder}: "
        "end it, or let it go on",
        path,
    )


def claim(fd: int) -> bool:
    """Lock a file for as long as it is open. False if another open file of it is locked."""
    try:
        fcntl.flock(fd, _WITHOUT_WAITING)
    except BlockingIOError:
        return False
    return True


def keep(fd: int) -> None:
    """Keep others from emptying a file when it is removed, as long as this descriptor is open. Too late for
    one that is being emptied: it has lost its name by then."""
    if _OFD_LOCK:
        with suppressing(OSError):
            fcntl.fcntl(fd, _OFD_LOCK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))


def is_kept(fd: int) -> bool:
    """Whether anybody else keeps the file; True also where that is unknown. `fd` must be writable."""
    if not _OFD_LOCK:
        return True
    try:
        fcntl.fcntl(fd, _OFD_LOCK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except ours(OSError):
        return True
    return False


def _holder(fd: int) -> str:
    """Who has locked a file, as far as the system tells."""
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as lines:
            for line in lines:
                fields = line.split()  # 1: FLOCK ADVISORY WRITE 1234 fd:01:5678 0 EOF
                if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted:
                    return _process(int(fields[4]))
    except ours(OSError, ValueError):
        pass
    return "another process"


def _process(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except ours(OSError):
        return f"process {pid}"
    stopped = rest.split()[:1] in (["T"], ["t"])
    return f"process {pid} ({name}{', which is stopped' if stopped else ''})"
