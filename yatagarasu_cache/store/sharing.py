"""One open store for all handles of this process on one directory, as far as their settings allow.

A handle holds a `Lease` of a store. The last lease to go closes the store, but for those of handles
that were unpickled: these come and go with every task of a pool, so a few of their stores stay open.
Handles that nobody closed are closed when they are collected, and when the process ends.

Garbage is collected wherever memory is allocated, so also where this thread holds locks: a lease that is
dropped there is put aside, and ended when a handle is next opened or closed (`_is_at_ease`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import stat
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from .. import config
from ..backends import choose
from ..backends.base import Channel
from ..backends.threads import WorkerPool
from ..concurrency import forks
from ..concurrency.in_flight import InFlight
from ..concurrency.interruption import ours, started, suppressing
from ..concurrency.key_locks import KeyLocks
from ..concurrency.locks import new_lock, package_of
from ..config import Settings
from ..errors import CacheError
from . import compiled
from . import format as f
from .directory import resolved
from .store import DurableStore, Store

if TYPE_CHECKING:
    import asyncio

__all__ = ["Lease", "acquire", "counters"]

_PACKAGE = __name__.partition(".")[0]
_MOST_KEPT = 4
# Lower than other finalizers have: these run first, as they may still use a cache.
_LAST_OF_ALL = -100
_BETWEEN_JOBS = WorkerPool.work.__code__

Key = tuple[Any, ...]
_COUNTED = (*f.COUNTERS, "unreadable")  # the last in each process alone
Directory = tuple[int, ...]


def identify(status: os.stat_result) -> Directory:
    """What tells directories apart, whatever leads to them. Tests put another function in its place."""
    return status.st_dev, status.st_ino


def _key(directory: Directory, settings: Settings) -> Key:
    """What handles must have in common to share a store. All else is each handle's own."""
    return (
        directory, settings.read_only, settings.backend, settings.io_uring, settings.workers,
        settings.max_value_size, settings.max_stream_size, settings.segment_size, settings.large_value_size,
        settings.max_open_files, settings.file_mode, settings.directory_mode, settings.allow_network_fs,
        settings.lock_timeout, os.environ.get(compiled.VARIABLE),
    )  # fmt: skip


class _Place:
    """A directory as this process uses it: there is one as long as a store on it is open."""

    def __init__(self) -> None:
        self.stores: list[Shared] = []
        self.past = dict.fromkeys(_COUNTED, 0)  # counted by stores that were closed
        self.own: set[Lease] = set()  # of open handles that the user made in this process
        self.key_locks, self.in_flight = KeyLocks(), InFlight()


class Shared:
    """A store to be opened, its backend, and how many handles use it."""

    def __init__(self, settings: Settings) -> None:
        self.key: Key = ()
        self.leases: set[Lease] = set()  # of open handles
        self._changing = new_lock()  # held by whoever opens or closes it
        self._durable: DurableStore | None = None
        self._channels: dict[asyncio.AbstractEventLoop, tuple[Channel, int]] = {}
        choice = choose(settings)
        self.backend, self.reason = choice.backend, choice.reason
        try:
            self.store = Store(settings, choice.backend)
        except BaseException:
            choice.backend.close()
            raise

    def view(self, durable: bool) -> Store:
        """The store as handles of this durability use it."""
        if not durable:
            return self.store
        if self._durable is None:
            self._durable = DurableStore(self.store)
        return self._durable

    def is_sound(self) -> bool:
        """Whether it may get more users: it is open, and its files are still those of its directory.

        A store follows its path: if its directory was moved away, it uses another one by now.
        """
        return not self.store.closed and self.store.is_in_place() and _is_in_place(self)

    # -- event loops --------------------------------------------------------------------------

    def join(self, loop: asyncio.AbstractEventLoop) -> Channel:
        """The channel of `loop`, which all handles share; `leave` it in the end."""
        ended: list[Channel] = []
        with _lock:
            for other in [one for one in self._channels if one.is_closed()]:
                ended.append(self._channels.pop(other)[0])
            channel, users = self._channels.get(loop) or (self.backend.channel(loop), 0)
            self._channels[loop] = channel, users + 1
        for one in ended:
            one.close()
        return channel

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call it in the thread of `loop`, once nothing is under way there any more."""
        with _lock:
            channel, users = self._channels.get(loop, (None, 0))
            if channel is None:
                return
            if users > 1:
                self._channels[loop] = channel, users - 1
                return
            del self._channels[loop]
        channel.close()

    # -- beginning and end --------------------------------------------------------------------

    def open(self, known: Callable[[], Lease]) -> Lease:
        """Open the store and publish it by `known`. If an exception comes in between, the next one who opens
        or closes a handle closes it."""
        with self._changing:
            _ended[self] = None
            self.store.open()
            lease = known()
            if lease.shared is self:
                _ended.pop(self, None)
            return lease

    def close(self) -> None:
        """Idempotent; called once more, it goes on with what an exception interrupted.

        Nothing where somebody has a share in it: whoever found it among those that are to be closed may have
        done so while it was being opened, and come here when it was open.
        """
        if self._changing._is_owned() or not self._changing.acquire(False):  # somebody is at it
            return
        try:
            with _lock:
                is_used = bool(self.leases)
            if not is_used:
                self._close()
        finally:
            self._changing.release()

    def _close(self) -> None:
        try:
            self.store.close()
        finally:
            if self.store.released:  # else the next call goes on
                try:
                    self.backend.close()
                finally:
                    _forget(self)

    def close_quietly(self) -> None:
        """`close` where nobody waits for it: a failure can only be logged."""
        try:
            self.close()
        except ours(Exception) as error:
            self.store.notices.log_once("close", f"cannot be closed in order: {error}")

    def rest(self) -> None:
        """Put everything in order, though threads may go on using it."""
        try:
            if not self.store.life.read_only:
                self.store.ending.rest()
        except ours(Exception) as error:
            self.store.notices.log_once("close", f"cannot be closed in order: {error}")

    def after_fork(self) -> None:
        self._channels, self._changing = {}, new_lock()


class Lease:
    """One handle's share in a store."""

    def __init__(self, shared: Shared, place: _Place, unpickled: bool, durable: bool) -> None:
        self.shared = shared
        self.place = place
        self.unpickled = unpickled
        self.store = shared.view(durable)
        self.closed = False

    def close(self) -> None:
        """Idempotent. The last one closes the store."""
        _let_go_of_dropped()
        _end(self)
        if self.shared in _ended:
            self.shared.close()


# Short: only the few lines that change what follows run under it.
_lock = new_lock()
_open: dict[Key, Shared] = {}
_places: dict[Directory, _Place] = {}
_kept: dict[Shared, None] = {}  # without users; the one that was used last is the last
_dropped: deque[Lease] = deque()  # of collected handles, to be let go of
# Being opened, or to be closed: an exception may come before that is done.
_ended: dict[Shared, None] = {}
_opening: weakref.WeakValueDictionary[str, _Turn] = weakref.WeakValueDictionary()
_closing: set[threading.Thread] = set()


class _Turn:
    """Serialises those who open the same path at once."""

    def __init__(self) -> None:
        self.lock = new_lock()


def acquire(handle: object, settings: Settings, unpickled: bool = False) -> Lease:
    """A share in the store that is open for such settings, or in one that is opened for it.

    It is closed when the handle is collected. At the end of the process all stores are closed.
    """
    if _dropped or _ended:
        _let_go_of_dropped()
    lease = _join(handle, settings, unpickled)
    if lease is None:
        with _lock:
            turn = _opening.setdefault(settings.directory, _Turn())
        with turn.lock:  # whoever comes second finds what the first one opened
            _close_kept_that_are_gone()
            lease = _join(handle, settings, unpickled) or _open_store(handle, settings, unpickled)
    try:
        lease.store.shared_settings.join(settings)
    except BaseException:
        lease.close()
        raise
    return lease


def _join(handle: object, settings: Settings, unpickled: bool) -> Lease | None:
    try:
        directory = identify(_status(settings.directory))
    except ours(OSError):
        return None
    key = _key(directory, settings)
    with _lock:
        shared = _open.get(key)
        if shared is None or not shared.is_sound():
            return None
        return _admit(handle, shared, _places[directory], settings, unpickled)


def _status(path: str) -> os.stat_result:
    """Of a cache directory, whether a link leads to it or not."""
    status = os.lstat(path)
    return os.lstat(resolved(path)) if stat.S_ISLNK(status.st_mode) else status


def _admit(handle: object, shared: Shared, place: _Place, settings: Settings, unpickled: bool) -> Lease:
    """Add a user. The lock is held."""
    lease = Lease(shared, place, unpickled, settings.durability == "sync")
    # First: if an exception comes before the handle has the lease, it is still dropped with the handle.
    weakref.finalize(handle, _drop, lease).atexit = False
    shared.leases.add(lease)
    _kept.pop(shared, None)
    if not unpickled:
        place.own.add(lease)
    return lease


def _open_store(handle: object, settings: Settings, unpickled: bool) -> Lease:
    settings = config.moved(settings, resolved(settings.directory))
    shared = Shared(settings)
    try:
        lease = shared.open(lambda: _publish(handle, shared, settings, unpickled))
    finally:
        if not shared.leases:  # else it was published, and its last lease closes it
            shared.close_quietly()
    _watch_multiprocessing()
    return lease


def _publish(handle: object, shared: Shared, settings: Settings, unpickled: bool) -> Lease:
    """Let others find a store that was opened. Its first lease, or one of a store that was found before."""
    try:
        directory = identify(os.lstat(settings.directory))
    except ours(OSError):  # gone already: nobody will find it there
        directory = (id(shared),)
    key = _key(directory, settings)
    with _lock:
        known = _open.get(key)
        place = _places.setdefault(directory, _Place())
        if known is not None and known.is_sound():  # opened by another path
            shared = known
        else:
            shared.key = key
            _open[key] = shared
            place.stores.append(shared)
        return _admit(handle, shared, place, settings, unpickled)


def _end(lease: Lease, dropped: bool = False) -> bool:
    """End a lease, and have stores closed that need not stay. True for the user's last handle here."""
    with _lock:
        if lease.closed:
            return False
        shared, own = lease.shared, lease.place.own
        was_last = own == {lease}
        own.discard(lease)
        shared.leases.discard(lease)
        if not shared.leases:
            if dropped and lease.unpickled and shared.is_sound():
                _kept[shared] = None
                while len(_kept) > _MOST_KEPT:
                    _end_store(next(iter(_kept)))
            else:
                _end_store(shared)
        lease.closed = True  # last: if an exception comes before, it is ended once more
        return was_last


def _end_store(shared: Shared) -> None:
    """Have it closed by whoever ended its last lease, or by the next caller. The lock is held."""
    _ended[shared] = None
    _kept.pop(shared, None)
    _withdraw(shared)


def _withdraw(shared: Shared) -> None:
    """Nobody else gets a share. The lock is held."""
    if _open.get(shared.key) is shared:
        del _open[shared.key]


def _close_kept_that_are_gone() -> None:
    with _lock:
        gone = [shared for shared in _kept if not shared.is_sound()]
        for shared in gone:
            _end_store(shared)
    for shared in gone:
        shared.close_quietly()


def _is_in_place(shared: Shared) -> bool:
    try:
        return bool(identify(os.lstat(shared.store.root)) == shared.key[0])
    except ours(OSError):
        return False


def _forget(shared: Shared) -> None:
    """Drop a closed store. Its counts are kept as long as others are open on its directory."""
    with _lock:
        _withdraw(shared)
        _kept.pop(shared, None)
        _ended.pop(shared, None)
        directory = shared.key[0] if shared.key else ()
        place = _places.get(directory)
        if place is None or shared not in place.stores:
            return
        place.stores.remove(shared)
        for name in _COUNTED:
            place.past[name] += getattr(shared.store.counters, name)
        if not place.stores:
            del _places[directory]
            place.key_locks.close()


def counters(lease: Lease) -> dict[str, int]:
    """What all stores of this process counted on the directory, since it has had one open."""
    with _lock:
        stores = [shared.store for shared in lease.place.stores]
        past = dict(lease.place.past)
    for store in stores:
        with suppressing(CacheError, OSError):  # closed just now
            store.counters.fold()
    return {name: past[name] + sum(getattr(store.counters, name) for store in stores) for name in _COUNTED}


# -- handles that nobody closed -----------------------------------------------------------------


def _drop(lease: Lease) -> None:
    if lease.closed:
        return
    _dropped.append(lease)
    if _is_at_ease():
        _let_go_of_dropped()


def _is_at_ease() -> bool:
    """Whether this thread holds no locks that closing a store could wait for.

    It may hold some where garbage was collected in the middle of our code, or of code (logging, threading)
    whose locks another thread may need that closing waits for.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and package_of(frame) == "weakref":  # which called this
        frame = frame.f_back
    innermost = True
    while frame is not None:
        module = package_of(frame)
        busy = module == "logging" or module == _PACKAGE and frame.f_code is not _BETWEEN_JOBS
        if busy or innermost and module == "threading":
            return False
        innermost = False
        frame = frame.f_back
    return True


def _let_go_of_dropped() -> None:
    for lease in list(_dropped):
        if _end(lease, dropped=True):
            _Warning(lease.shared.store.root)
        with contextlib.suppress(ValueError):  # another thread was faster
            _dropped.remove(lease)
    for shared in [one for one in _ended if one.leases]:  # published before the exception came
        _ended.pop(shared, None)
    for shared in list(_ended):
        _close_aside(shared) if _in_event_loop() else shared.close_quietly()


def _in_event_loop() -> bool:
    events = sys.modules.get("asyncio.events")  # where nobody has loaded it, none runs
    running = getattr(events, "_get_running_loop", None)
    return running is not None and running() is not None


def _close_aside(shared: Shared) -> None:
    """Close it in a thread of its own: that may take a while, and must not block the loop."""

    def work() -> None:
        shared.close_quietly()
        _closing.discard(thread)

    thread = threading.Thread(target=work, name="yatagarasu-close", daemon=True)
    _closing.add(thread)
    if not started(thread):
        work()


class _Warning:
    """Warns in its destructor: where warnings are errors, none is raised in somebody else's call."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __del__(self) -> None:
        warnings.warn(
            f"the cache in {self._root!r} was never closed: call close(), or use it in a with block",
            ResourceWarning,
            stacklevel=_levels_of_ours(),
        )


def _levels_of_ours() -> int:
    """The number of frames, the caller's included, up to the code that dropped the cache."""
    frame, levels = sys._getframe(1), 1
    while package_of(frame) in (_PACKAGE, "weakref") and frame.f_back is not None:
        frame, levels = frame.f_back, levels + 1
    return levels


# -- the end of the process, and forks ----------------------------------------------------------


def _close_all() -> None:
    _let_go_of_dropped()
    for thread in list(_closing):
        if thread.ident is not None:  # else an interruption kept it from being started
            thread.join()
    with _lock:
        places = list(_places.values())
    for place in places:
        forgotten = next(iter(place.own), None)
        place.own.clear()
        for shared in list(place.stores):
            shared.leases.clear()  # nobody uses it any more
            shared.close_quietly()
        if forgotten is not None:
            _Warning(forgotten.shared.store.root)


class _Children:
    """Children of multiprocessing end without `atexit`, but with multiprocessing's own finalizers."""

    def __init__(self) -> None:
        self._registered = False  # whether `begin` will be called in children
        self._process = 0  # the one in which the finalizer is registered

    def watch(self, util: Any) -> None:
        if not self._registered:  # such a child begins by dropping its parent's finalizers
            self._registered = True
            util.register_after_fork(self, _Children.begin)
        if self._process != os.getpid():
            self.begin()

    def begin(self) -> None:
        self._process = os.getpid()
        sys.modules["multiprocessing.util"].Finalize(None, _close_in_child, exitpriority=_LAST_OF_ALL)


_children = _Children()


def _watch_multiprocessing() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None and hasattr(util, "register_after_fork"):  # not while it is being imported
        _children.watch(util)


def _close_in_child() -> None:
    process: Any = sys.modules["multiprocessing.process"]
    if process.parent_process() is None:
        return
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        with _lock:  # the process waits for these threads, which may use a cache
            stores = [shared for place in _places.values() for shared in place.stores]
        for shared in stores:
            shared.rest()
    else:
        _close_all()


def _before_fork() -> None:
    _lock.acquire()


def _after_fork_in_parent() -> None:
    if _lock._is_owned():  # else the fork had begun, and waited until this was loaded
        _lock.release()


def _after_fork_in_child() -> None:
    """The stores were renewed before. What the parent counted and made stays the parent's."""
    global _lock, _opening
    _lock, _opening = new_lock(), weakref.WeakValueDictionary()
    _closing.clear()
    known = {shared for place in _places.values() for shared in place.stores}
    for shared in _ended.keys() - known:  # those that the parent was opening
        shared.store.let_go_in_child()
        del _ended[shared]
    for place in list(_places.values()):
        place.own.clear()
        for shared in list(place.stores):
            shared.after_fork()
            if shared.store.closed:
                _forget(shared)
        place.past = dict.fromkeys(_COUNTED, 0)
    if _places:
        _watch_multiprocessing()


atexit.register(_close_all)
forks.register(_after_fork_in_child)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
