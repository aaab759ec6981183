"""One open store for all handles of this process on one directory, as far as their settings allow.

A handle holds a `Lease` of a store. The last lease to go closes the store, but for those of handles
that were unpickled: these come and go with every task of a pool, so a few of their stores stay open.
Handles that nobody closed are closed when they are collected, and when the process ends.

Garbage is collected wherever memory is asked for, so also where this thread holds locks: a lease that is
dropped then is put aside, and let go of when a handle is next opened or closed (`_is_at_ease`).
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
from ..concurrency.interruption import ours, started, suppressing
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
# Lower than what others may have asked for: they may still use a cache then.
_LAST_OF_ALL = -100
_BETWEEN_JOBS = WorkerPool.work.__code__

Key = tuple[Any, ...]
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
        self.past = dict.fromkeys(f.COUNTERS, 0)  # counted by stores that were closed
        self.own: set[Lease] = set()  # of open handles that the user made, here


class Shared:
    """A store to be opened, its backend, and how many handles use it."""

    def __init__(self, settings: Settings) -> None:
        self.key: Key = ()
        self.leases: set[Lease] = set()  # of open handles
        self._changing = new_lock()  # whoever opens or closes it
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
        """Whether it may get more users: it is open, and its files are those of the directory that it is of.

        A store follows its path: where its directory was moved away, it is another one's by now.
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
        """In the thread of `loop`, when nothing is under way there any more."""
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
        """Open the store, and let it be `known`: should an exception come in between, whoever comes next
        closes it."""
        with self._changing:
            _ended[self] = None
            self.store.open()
            lease = known()
            if lease.shared is self:
                _ended.pop(self, None)
            return lease

    def close(self) -> None:
        """Idempotent; called once more, it goes on with what an exception interrupted."""
        if self._changing._is_owned() or not self._changing.acquire(False):  # somebody is at it
            return
        try:
            self._close()
        finally:
            self._changing.release()

    def _close(self) -> None:
        try:
            self.store.close()
        finally:
            if self.store.released:  # else whoever comes next goes on
                try:
                    self.backend.close()
                finally:
                    _forget(self)

    def close_quietly(self) -> None:
        """`close` where nobody waits for it, so nobody can be told but the log."""
        try:
            self.close()
        except ours(Exception) as error:
            self.store.notices.log_once("close", f"cannot be closed in order: {error}")

    def rest(self) -> None:
        """Leave everything in order, though others may go on."""
        try:
            if not self.store.life.read_only:
                self.store.rest()
        except ours(Exception) as error:
            self.store.notices.log_once("close", f"cannot be closed in order: {error}")

    def after_fork(self) -> None:
        self._channels, self._changing = {}, new_lock()


class Lease:
    """The part of one handle in a store."""

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
# To be closed, or being closed, or opened: an exception may come before that is done.
_ended: dict[Shared, None] = {}
_opening: weakref.WeakValueDictionary[str, _Turn] = weakref.WeakValueDictionary()
_closing: set[threading.Thread] = set()


class _Turn:
    """Of those that want to open the same path at once."""

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
    """One user more. The lock is held."""
    lease = Lease(shared, place, unpickled, settings.durability == "sync")
    # First: should an exception keep the handle from having it, it is dropped with the handle.
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
        if not shared.leases:  # else it is known, and closed with the last of these
            shared.close_quietly()
    _watch_multiprocessing()
    return lease


def _publish(handle: object, shared: Shared, settings: Settings, unpickled: bool) -> Lease:
    """Let others find a store that was opened: the first user's share in it, or in one that was there."""
    try:
        directory = identify(os.lstat(settings.directory))
    except ours(OSError):  # gone already: nobody will find it there
        directory = (id(shared),)
    key = _key(directory, settings)
    with _lock:
        known = _open.get(key)
        place = _places.setdefault(directory, _Place())
        if known is not None and known.is_sound():  # by another path
            shared = known
        else:
            shared.key = key
            _open[key] = shared
            place.stores.append(shared)
        return _admit(handle, shared, place, settings, unpickled)


def _end(lease: Lease, dropped: bool = False) -> bool:
    """Have the stores closed that are not needed any more. Whether this was the user's last handle here."""
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
        lease.closed = True  # last: one that an exception kept from this ends once more
        return was_last


def _end_store(shared: Shared) -> None:
    """Whoever ended its last lease closes it, or whoever comes next. The lock is held."""
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
    """It was closed: what it counted stays, as long as others are open on its directory."""
    with _lock:
        _withdraw(shared)
        _kept.pop(shared, None)
        _ended.pop(shared, None)
        directory = shared.key[0] if shared.key else ()
        place = _places.get(directory)
        if place is None or shared not in place.stores:
            return
        place.stores.remove(shared)
        for name in f.COUNTERS:
            place.past[name] += getattr(shared.store.counters, name)
        if not place.stores:
            del _places[directory]


def counters(lease: Lease) -> dict[str, int]:
    """What this process counted on the directory, by all stores, since it has had one open."""
    with _lock:
        stores = [shared.store for shared in lease.place.stores]
        past = dict(lease.place.past)
    for store in stores:
        with suppressing(CacheError, OSError):  # closed just now
            store.counters.fold()
    return {name: past[name] + sum(getattr(store.counters, name) for store in stores) for name in f.COUNTERS}


# -- handles that nobody closed -----------------------------------------------------------------


def _drop(lease: Lease) -> None:
    if lease.closed:
        return
    _dropped.append(lease)
    if _is_at_ease():
        _let_go_of_dropped()


def _is_at_ease() -> bool:
    """Whether this thread holds no locks that closing a store could wait for.

    That is where garbage was collected in the middle of something of ours, or of what ours may ask
    for in another thread that is waited for.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and package_of(frame) == "weakref":  # which called for this
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
    for shared in [one for one in _ended if one.leases]:  # it came to be known, and an exception behind that
        _ended.pop(shared, None)
    for shared in list(_ended):
        _close_aside(shared) if _in_event_loop() else shared.close_quietly()


def _in_event_loop() -> bool:
    events = sys.modules.get("asyncio.events")  # where nobody has loaded it, none runs
    running = getattr(events, "_get_running_loop", None)
    return running is not None and running() is not None


def _close_aside(shared: Shared) -> None:
    """In a thread of its own: it may take a while, and the loop goes on."""

    def work() -> None:
        shared.close_quietly()
        _closing.discard(thread)

    thread = threading.Thread(target=work, name="yatagarasu-close", daemon=True)
    _closing.add(thread)
    if not started(thread):
        work()


class _Warning:
    """Warns when it goes: should that be an error, it is nobody's whose call it comes up in."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __del__(self) -> None:
        warnings.warn(
            f"the cache in {self._root!r} was never closed: call close(), or use it in a with block",
            ResourceWarning,
            stacklevel=_levels_of_ours(),
        )


def _levels_of_ours() -> int:
    """How many frames, that of the caller included, there are up to the code that let go of the cache."""
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
            shared.close_quietly()
        if forgotten is not None:
            _Warning(forgotten.shared.store.root)


class _Children:
    """Children of multiprocessing end without `atexit`, but with what was registered there."""

    def __init__(self) -> None:
        self._registered = False  # to be called in the children
        self._process = 0  # in which the end is asked for

    def watch(self, util: Any) -> None:
        if not self._registered:  # such a child begins by forgetting what was asked for before
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
    if util is not None and hasattr(util, "register_after_fork"):  # as a whole, not while it is imported
        _children.watch(util)


def _close_in_child() -> None:
    process: Any = sys.modules["multiprocessing.process"]
    if process.parent_process() is None:
        return
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        with _lock:  # the process waits for these, and they may use a cache
            stores = [shared for place in _places.values() for shared in place.stores]
        for shared in stores:
            shared.rest()
    else:
        _close_all()


def _before_fork() -> None:
    _lock.acquire()


def _after_fork_in_parent() -> None:
    if _lock._is_owned():  # else this was loaded while a fork had begun, and waited for that
        _lock.release()


def _after_fork_in_child() -> None:
    """Stores were renewed by then. What the parent counted, and made, is the parent's."""
    global _lock, _opening
    _lock, _opening = new_lock(), weakref.WeakValueDictionary()
    _closing.clear()
    known = {shared for place in _places.values() for shared in place.stores}
    for shared in _ended.keys() - known:  # the parent's, being opened
        shared.store.let_go_in_child()
        del _ended[shared]
    for place in list(_places.values()):
        place.own.clear()
        for shared in list(place.stores):
            shared.after_fork()
            if shared.store.closed:
                _forget(shared)
        place.past = dict.fromkeys(f.COUNTERS, 0)
    if _places:
        _watch_multiprocessing()


atexit.register(_close_all)
forks.register(_after_fork_in_child)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
