"""One io_uring of the kernel as a Python object, and the reason if there is none."""

from __future__ import annotations

import errno
import itertools
import mmap
import operator
import os
import re
import time
import weakref
from collections.abc import Callable
from typing import Any

from ..concurrency import forks
from ..concurrency.interruption import ours
from ..concurrency.locks import new_lock
from ..config import RingSettings
from ..errors import BackendUnavailable
from ..log import log as _log
from .buffers import BufferPool, LockedMemory, Pinned, PoolStats

try:
    from .._ring import ffi, lib
except ImportError as _error:
    try:
        from .._build_info import RING_REASON as _reason
    except ImportError:
        _reason = "no record of the build"
    raise ImportError(
        f"the compiled module yatagarasu_cache._ring cannot be loaded ({_error}; build: {_reason}); "
        "reinstall with YATAGARASU_IO_URING=require where a C compiler, liburing 2.3 or later and cffi "
        "are there"
    ) from _error

__all__ = [
    "BATCH_ERRORS", "PASSING", "RING_ERRORS", "Ring", "Rings", "address_of", "check_kernel", "explain",
    "ffi", "keep_for_ever", "lib", "pool_for",
]  # fmt: skip

_ABI = 2
_OLDEST_KERNEL = (5, 10)
_NEEDED = {"read": lib.YR_OP_READ, "fdatasync": lib.YR_OP_FDATASYNC}
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds without new rings after one has failed
_SYSCTL = "/proc/sys/kernel/io_uring_disabled"

# Failures of a ring or of its memory, which say nothing about the file: ordinary calls go on.
RING_ERRORS = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.ENOMEM, errno.EBUSY, errno.EPERM, errno.ENOSYS,
     errno.EOPNOTSUPP, errno.EINVAL, errno.ENOBUFS, errno.EOVERFLOW, errno.E2BIG, errno.ENXIO}
)  # fmt: skip
# Results of an operation in a batch that mean the ring, which has not taken it.
BATCH_ERRORS = RING_ERRORS | {errno.EBADF, errno.EBADFD, errno.EBADR, errno.EFAULT, errno.EOWNERDEAD}
# Results of one operation that are worth asking for once more.
PASSING = frozenset({errno.EAGAIN, errno.EINTR, errno.ECANCELED})
COUNTERS = ("submitted", "completed", "enters", "resumed", "retried", "overflows")

# Pinned by registered buffers, over all rings of this process.
locked = LockedMemory(4 << 20)
forks.register(locked.after_fork)
# Memory that the kernel may still write to although its ring is gone. It must never be freed.
_lost: list[Any] = []
_said: set[str] = set()


def address_of(memory: Any) -> int:
    """Where the bytes of `memory` begin. They stay there while it lives and is not resized."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))


def keep_for_ever(memory: Any) -> None:
    """Never free `memory`: operations that nobody can wait for may still use it."""
    _lost.append(memory)


def _kernel() -> tuple[int, int]:
    """Version of the running kernel; (0, 0) if its name does not tell."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _sysctl() -> str:
    try:
        with open(_SYSCTL, encoding="ascii") as file:
            value = file.read().strip()
    except ours(OSError, ValueError):
        return ""
    return {"1": "only for members of kernel.io_uring_group", "2": "for everybody"}.get(value, "")


def explain(code: int) -> str:
    """What it means that a ring could not be made, and what to do about it."""
    name = errno.errorcode.get(code, str(code))
    if code == errno.EPERM and _sysctl():
        meaning = f"the sysctl kernel.io_uring_disabled switches it off {_sysctl()}"
    elif code in (errno.EPERM, errno.EACCES):
        meaning = (
            "forbidden to this process, by a seccomp filter (the default of most container runtimes) "
            "or another security policy; allow io_uring_setup, io_uring_enter and io_uring_register"
        )
    elif code == errno.ENOSYS:
        meaning = "this kernel has no io_uring, or a seccomp filter hides it; Linux 5.10 or later is needed"
    elif code == errno.ENOMEM:
        meaning = f"no memory for a ring; locked memory is limited to {_locked_limit()} (ulimit -l)"
    elif code in (errno.EMFILE, errno.ENFILE):
        meaning = "too many open files; raise the limit (ulimit -n)"
    elif code == errno.EINVAL:
        meaning = "this kernel's io_uring is too old; Linux 5.10 or later is needed"
    else:
        meaning = os.strerror(code)
    return f"{name}: {meaning}"


def _locked_limit() -> str:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "nothing" if limit == 0 else f"{limit} bytes" if limit > 0 else "no bound"


def check_kernel() -> None:
    """Raises `BackendUnavailable` for reasons that creating a ring does not show."""
    if lib.yr_abi_version() != _ABI:
        raise BackendUnavailable("the compiled module is of another version of this package: reinstall it")
    if (0, 0) < _kernel() < _OLDEST_KERNEL:
        raise BackendUnavailable(f"kernel {os.uname().release} is too old: Linux 5.10 or later is needed")


def _once(owner: object, function: Callable[..., Any], *args: Any) -> weakref.finalize[..., Any]:
    """A function to be called once: at the latest when `owner` is collected."""
    finalizer = weakref.finalize(owner, function, *args)
    finalizer.atexit = False
    return finalizer


def _free(holder: Any) -> int:
    """Free the ring in `holder`, if there is one. An errno, negative, if it is busy."""
    return int(lib.yr_destroy(holder[0], 0)) if holder[0] else 0


class Ring:
    """A ring and the memory registered with it, for one owner at a time.

    Only `info` and `destroy` may be called by others than the owner. Everything else goes to
    `lib` with `handle`, because a method call costs as much as the C call behind it.
    """

    def __init__(self, settings: RingSettings, *, one_thread: bool) -> None:
        """`one_thread`: only the calling thread will ever use it, which the kernel rewards.

        Raises OSError with the errno of the kernel.
        """
        flags = (lib.YR_ONE_THREAD if one_thread else 0) | (lib.YR_SQPOLL if settings.sqpoll else 0)
        holder = ffi.new("struct yr_ring **")
        # Twice the depth are under way at once: the disk need not wait while completions are dealt
        # with. The polling thread may show a completion before it gives back the entry that began it.
        self.most = settings.queue_depth if settings.sqpoll else 2 * settings.queue_depth
        # Frees the ring, unless it is busy; also when nobody has closed it. First: an interruption may come
        # just after it was made.
        self._free = _once(self, _free, holder)
        error = lib.yr_create(holder, 2 * settings.queue_depth, self.most, flags)
        if error:
            raise OSError(-error, os.strerror(-error))
        self.handle = holder[0]
        self._pinned: Pinned | None = None
        self.depth = settings.queue_depth
        self.polled = settings.sqpoll
        self._lock = new_lock()
        self._info = ffi.new("struct yr_info *")
        self._settings = settings
        self._bound_workers()

    def _bound_workers(self) -> None:
        """Limit the kernel's workers as the settings say, if the kernel can."""
        if self._settings.max_workers:
            lib.yr_set_workers(self.handle, self._settings.max_workers, self._settings.max_workers)
        self.pin_workers()

    def pin_workers(self) -> None:
        """Let the kernel's workers of the calling thread run on the CPUs of the settings."""
        cpus = self._settings.cpu_affinity
        if cpus:
            lib.yr_set_affinity(self.handle, len(cpus), list(cpus))

    def try_out(self) -> None:
        """Have the ring do a NOP. OSError if it does not even do that: a filter may allow making rings
        but not using them."""
        error = lib.yr_try_out(self.handle, 1_000_000_000)
        if error:
            raise OSError(-error, os.strerror(-error))

    def lacking(self) -> list[str]:
        """Names of the operations that are needed and missing in this kernel."""
        return [name for name, op in _NEEDED.items() if lib.yr_supports(self.handle, op) != 1]

    def info(self) -> dict[str, int]:
        """State and counters; the last ones once it is gone."""
        with self._lock:
            if self.handle is not None:
                lib.yr_info(self.handle, self._info)
            info = self._info
            return {name: int(getattr(info, name)) for name in (*COUNTERS, "inflight", "queued", "broken")}

    def register(self, *pools: BufferPool) -> int | None:
        """Register each pool's memory under its place in `pools`. An errno if that fails, else None.

        0, and nothing is registered, if the process has pinned its share of memory already.
        """
        addresses, sizes = [pool.address for pool in pools], [pool.total_bytes for pool in pools]
        self._pinned = locked.take(sum(sizes))
        if self._pinned is None:
            return 0
        error = lib.yr_buffers_register(self.handle, len(pools), addresses, sizes)
        if error == 0:
            return None
        self._pinned = None
        return -int(error)

    def inject(self, op: int, skip: int, count: int, result: int, *, instead: bool = False) -> None:
        """For tests: see yr_inject."""
        error = lib.yr_inject(self.handle, op, skip, count, result, instead)
        if error:
            raise OSError(-error, os.strerror(-error))

    def destroy(self) -> bool:
        """Free the ring. False if operations were in flight: their memory must be kept for ever."""
        with self._lock:
            handle, self.handle = self.handle, None
            if handle is None:
                return True
            lib.yr_info(handle, self._info)
            self._pinned = None
            idle: bool = self._free() == 0
            if not idle:
                lib.yr_destroy(handle, 1)
            return idle

    def after_fork(self) -> None:
        """In a child: the parent's ring is let go of, whatever is in flight."""
        self._lock = new_lock()
        handle, self.handle = self.handle, None
        if handle is not None:
            self._free.detach()
            lib.yr_destroy(handle, 1)


def pool_for(size: int, capacity: int) -> BufferPool:
    """A pool whose buffers know their addresses."""
    return BufferPool(size, capacity, _locate)


def _locate(memory: mmap.mmap) -> int:
    return address_of(memory)


class Rings:
    """All rings of one backend: makes them, counts what they do, and says when they fail."""

    def __init__(self, settings: RingSettings) -> None:
        self.settings = settings
        self.fallbacks = 0  # operations that ordinary calls did because a ring did not
        self._failures = 0
        self._pause = _SHORTEST_PAUSE
        self._none_before = 0.0
        self._numbers = itertools.count()
        self._totals = dict.fromkeys(COUNTERS, 0)  # of rings that are gone
        self._begin()

    def _begin(self) -> None:
        self._lock = new_lock()
        self._open: dict[Ring, int] = {}
        self._pools: dict[BufferPool, None] = {}
        self._pool_totals: dict[int, list[int]] = {}

    def make(self, *, one_thread: bool) -> Ring | None:
        """A new ring; None if there is none to be had now."""
        if time.monotonic() < self._none_before:
            return None
        try:
            return Ring(self.settings, one_thread=one_thread)
        except ours(OSError) as error:
            self.failed(error.errno or errno.EIO)
            return None

    def failed(self, code: int) -> None:
        """A ring has failed: none is made for a while, each time for longer."""
        self._failures += 1
        self._none_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if self._failures == 1:
            _log.warning(f"io_uring fails ({explain(code)}): ordinary calls do its work meanwhile")

    def opened(self, ring: Ring, *pools: BufferPool) -> bool:
        """Count a new ring, and register its memory if that is wanted and possible: True if it is."""
        with self._lock:
            self._open[ring] = next(self._numbers)
            self._pools.update(dict.fromkeys(pools))
        if not self.settings.use_registered_buffers:
            return False
        error = ring.register(*pools)
        if error:
            name = errno.errorcode.get(error, str(error))
            self._log_once(
                "registering",
                f"io_uring buffers stay unregistered ({name}; locked memory is limited to "
                f"{_locked_limit()}, see ulimit -l): reads cost a little more",
            )
        return error is None

    @staticmethod
    def _log_once(topic: str, line: str) -> None:
        """Log once a process what concerns all of it."""
        if topic not in _said:
            _said.add(topic)
            _log.warning(line)

    def closed(self, ring: Ring, *pools: BufferPool) -> None:
        """Keep the figures of a ring that is gone."""
        info = ring.info()
        with self._lock:
            if self._open.pop(ring, None) is None:
                return
            for name in COUNTERS:
                self._totals[name] += info[name]
            for pool in pools:
                if pool in self._pools:
                    del self._pools[pool]
                    self._add(self._pool_totals, pool)
                    pool.close()

    @staticmethod
    def _add(totals: dict[int, list[int]], pool: BufferPool) -> None:
        total = totals.setdefault(pool.buffer_size, [0, 0, 0, 0])
        total[:] = map(operator.add, total, pool.stats())

    def stats(self) -> dict[str, int]:
        """Sums, then each open ring under its number, then pools by the size of their buffers."""
        with self._lock:
            rings, totals = dict(self._open), dict(self._totals)
            pools = {size: list(total) for size, total in self._pool_totals.items()}
            for pool in self._pools:
                self._add(pools, pool)
        each: dict[str, int] = {}
        for ring, number in rings.items():
            info = ring.info()
            for name in COUNTERS:
                totals[name] += info[name]
            each |= {f"ring_{number}_{name}": info[name] for name in ("inflight", *COUNTERS[:3])}
            each[f"ring_{number}_depth"] = ring.depth
        figures = {"rings": len(rings), **totals, "registered_bytes": locked.used}
        figures |= {
            "fallbacks": self.fallbacks,
            "ring_failures": self._failures,
            "degraded": int(time.monotonic() < self._none_before),
        }
        for size, total in sorted(pools.items()):
            names = zip(PoolStats._fields, total, strict=True)
            each |= {f"buffers_{size}_{name}": value for name, value in names}
        return figures | each

    def after_fork(self) -> None:
        """In a child: the rings are the parent's."""
        rings = list(self._open)
        self._begin()
        self._none_before = 0.0
        for ring in rings:
            ring.after_fork()
