"""An open handle on a cache directory: its parts, its locks, the index, and what they tell.

Opening and closing, following an index that others replaced, finding slots, walking, counting,
durability. What stands above (removing, reading, writing) is a layer each.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import struct
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, TypeVar, cast

from ..backends.base import Backend, Entry, name_file
from ..concurrency import forks
from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import (
    GRACE,
    LOOK_EVERY,
    FileLock,
    NoLock,
    ensure_not_within,
    has_name,
    new_long_lock,
)
from ..config import Settings
from ..errors import (
    CacheError,
    CacheIOError,
    ClosedError,
    FormatError,
    ReadOnlyError,
    StorageFull,
    from_os_error,
)
from . import cache_settings, recovery
from . import format as f
from .cache_settings import CacheSettings
from .changes import ChangeLog
from .core import choose as choose_core
from .directory import again_where_it_vanishes, is_whole, look_again, made, prepare
from .eviction import POLICIES, TOUCHED, Policy, policy_of
from .format import Slot
from .index import APPENDABLE, Index, IndexDamaged
from .large import LargeFiles
from .owners import Owner, Users
from .reclaim import Reclaimer, segment_bytes_of
from .segment import VANISHED, Record, SegmentFiles, SegmentWriter, read_records, scan
from .under_way import UnderWay, count_anew
from .unreadable import fault, is_absence, remedy, told

if TYPE_CHECKING:
    from .store import Store

_log = logging.getLogger("yatagarasu_cache")
T = TypeVar("T")

# From here a value gets a file of its own; see docs/operations.md.
LARGE_VALUE_BYTES = 1 << 20
ATTEMPTS = 100
_STREAM_SHARE = 8  # a stream of unknown length may have 1/8 of size_limit, unless max_stream_size is named
_handles: weakref.WeakSet[Handle] = weakref.WeakSet()
_TRIES_IN_VAIN = 4  # to fold: with USES_MORE after each, 256 uses are waiting then
_PATIENCE, _PATIENT_EVERY = 0.03, 1.0  # seconds
_PATIENT_STEP = 0.0003
_W_HITS, _W_MISSES = f.W_COUNTERS + f.COUNTERS.index("hits"), f.W_COUNTERS + f.COUNTERS.index("misses")
_READER_LOOKS = 0.25  # seconds, of a handle that only reads


class Handle:
    """One open handle on a cache directory."""

    durable = False  # see DurableStore

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self.root = settings.directory
        self.read_only = settings.read_only
        self.syncs_segments = False  # when they are sealed: somebody may wait for that
        self._followers: list[Callable[[], None]] = []
        self._settings_seen = -1  # the checksum of those in force, as the index has it
        self.take_over(cache_settings.of_handle(settings))  # until there is an index that says it
        self.closed = False
        self.released = True  # there is nothing to be closed, or not any more
        self._usable = False  # it was opened, to the end
        self.hits = self.misses = self.corrupt = 0
        self.sets = self.deletes = self.evictions = self.expirations = 0
        self._in_vain, self._patient_again = 0, 0.0  # tries to fold these, and when to wait for that
        self._look_again = 0.0
        self._swept = 0  # the number of the segment to come when the open files were last looked through
        self._temporary = count(1)
        self._looked = 0.0  # when our files were last seen to have their names
        self._logged: set[str] = set()
        self.given_up: dict[tuple[str, str], str] = {}  # what could not be read, by kind and file
        self.unlogged: deque[str] = deque()
        self.telling: set[int] = set()  # threads that log a line just now
        self.appending = new_long_lock()
        self.writer: SegmentWriter | None = None
        self.has_written = False  # it has had a writer
        self.interrupted = False  # and maybe something left half done by it
        self._large_synced: set[str] = set()  # paths of large files, those that are likely to be asked for
        self._names = self._names_synced = 0  # segments we began; up to which one the names are durable
        # Looked up once: these are on the path of every hit.
        self._read_once = backend.read_once
        self._touched = ({} if settings.read_only else TOUCHED).get
        self.core = choose_core(self._whole)

    @property
    def _whole(self) -> Store:
        """This handle with the layers above it, for the parts that use these."""
        return cast("Store", self)

    # -- opening and closing -----------------------------------------------------------------

    def open(self) -> None:
        """To be called once. If that fails, or is interrupted, `close` lets go of what was opened."""
        try:
            again_where_it_vanishes(self._open)
            _handles.add(self)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, f"cannot open the cache in {self.root!r}") from error
        self._usable = True

    def _open(self) -> None:
        self.released = False
        is_new = prepare(self.backend, self.settings)
        root, mode = self.root, self.settings.file_mode
        self.segments_path = os.path.join(root, f.SEGMENTS_NAME)
        self.large = LargeFiles(self.backend, root, mode, self.core, self.made, self.files_in)
        self.owner = Owner(self.backend, root, mode, self.made, self.files_in)
        self.under_way = UnderWay(self.owner, lambda: self.index, self._on_unnoted)
        timeout = self.settings.lock_timeout
        self.users = Users(self.backend, root, mode, self.made, self.owner, timeout)
        self.files = SegmentFiles(
            self.backend, self.segments_path, self.settings.max_open_files, self._segment_exists
        )
        self.changes = ChangeLog(self)
        self.reclaim = Reclaimer(self._whole)
        self._followers = [
            self.core.follow_settings, self.changes.follow_settings, self.reclaim.follow_settings,
        ]  # fmt: skip
        self.lock: FileLock | NoLock = NoLock()
        self.checkpointing: FileLock | NoLock = NoLock()
        self.reclaiming: FileLock | NoLock = NoLock()
        try:
            if self.read_only:
                self._use(recovery.open_index(self, alone=False))
                return
            self.checkpointing = self._new_lock(f.CHECKPOINT_LOCK_NAME)
            self.reclaiming = self._new_lock(f.RECLAIM_LOCK_NAME)
            self.lock = lock = self._new_lock(f.LOCK_NAME)
            with lock:
                if lock.made and not is_new:  # somebody may still be inside of the one that was removed
                    time.sleep(GRACE)
                self._use(recovery.open_index(self, alone=self.users.enter()))
                lock.on_enter = self._on_lock
                cache_settings.settle(self, self.settings)
                self.reclaim.reap(opening=True)
        except BaseException:
            self._release()
            raise

    def _new_lock(self, name: str) -> FileLock:
        path, settings = os.path.join(self.root, name), self.settings
        lock = FileLock(self.backend, path, settings.file_mode, settings.lock_timeout, self._on_lock_gone)
        lock.waiting, lock.on_exit = self.unlogged, self.say
        return lock

    def _use(self, index: Index) -> None:
        previous: Index | None = getattr(self, "index", None)
        self.index = index
        self.core.attach(index)
        self.seed = index.identity.seed
        self.follow_settings()
        if self.writer is not None:  # an index made anew counts what is written: more is granted anew
            self.writer.granted = self.writer.tail
        if previous is not None:
            previous.retire()

    def close(self) -> None:
        """Seal what is open; the last handle also makes the index durable. Idempotent.

        An exception that interrupts it leaves the rest to whoever closes it once more, or tidies up.
        """
        if self.released:
            return
        is_first, self.closed = self._usable and not self.closed, True
        try:
            if is_first:
                self._end_in_order()
        except BaseException as error:
            self.owner.stay_marked()  # whoever is the last to close tidies up
            if not isinstance(error, OSError) or self.is_in_place():  # else nothing is to be left in order
                raise
        finally:
            self._release()
            _handles.discard(self)

    def _end_in_order(self) -> None:
        self.reclaim.close()
        self.fold_counters()
        if not self.read_only:
            self._close_writing()

    def is_in_place(self) -> bool:
        """False if the index is not at its path any more: it was removed, moved away, or replaced."""
        try:
            return has_name(self.index.fd, os.path.join(self.root, f.INDEX_NAME))
        except ours(OSError, ValueError, AttributeError):  # closed, or not opened yet
            return False

    def rest(self) -> None:
        """Have everything in order for an end without `close`."""
        self.fold_counters()
        with self.appending, self.lock:
            self.seal_writer()

    def _close_writing(self) -> None:
        with self.appending, self.lock:
            self.seal_writer()
            if self.users.is_alone():
                if self.owner.any_dead() or self.under_way or self.index.words[f.W_LEAVING]:
                    self.under_way.forget_all()
                    recovery.tidy(self, self.index)
                self.reclaim.sync_dirty()
                # Removals too: after a clean end nobody looks for files that belong to nothing.
                self.sync_directory(self.large.directory)
                self.sync_directory(self.large.temporary)
                self.index.sync()
                self.index.words[f.W_CLEAN] = 1
                self.index.sync()
            elif self.under_way:  # as if it had died: the last to close tidies up
                self.owner.stay_marked()
            # Before the lock is given up: whoever closes next may be the last, and no thread of ours, which
            # may be waiting for the lock, changes anything any more.
            self.users.leave()
            self.owner.release()
            self.lock.close()

    def _release(self) -> None:
        try:
            with contextlib.ExitStack() as stack:  # however those before it end
                for name, release in (
                    ("index", "close"), ("lock", "close"), ("checkpointing", "close"),
                    ("reclaiming", "close"), ("users", "leave"), ("owner", "release"), ("files", "close"),
                    ("changes", "close"),
                ):  # fmt: skip
                    held = getattr(self, name, None)
                    if held is not None:
                        stack.callback(getattr(held, release))
                if self.writer is not None:  # there was no closing it in order
                    stack.callback(self.writer.abandon)
                self.core.detach()
        except Exception:
            self.released = True  # what failed now fails again
            raise
        self.released = True

    def let_go_in_child(self) -> None:
        """Of what a thread of the parent was opening, which is not here: its locks are the parent's alone."""
        for name in ("lock", "checkpointing", "reclaiming", "users", "owner"):
            held = getattr(self, name, None)
            if held is not None:
                held.let_go_in_child()

    def after_fork(self) -> None:
        """In a child: keep what may be shared (the mapping), renew what may not."""
        self.backend.after_fork()
        writer, self.writer, self.has_written = self.writer, None, False
        if writer is not None:
            writer.after_fork()
        self.appending, self.telling = new_long_lock(), set()
        self.files.after_fork()
        self.lock.after_fork()
        self.checkpointing.after_fork()
        self.reclaiming.after_fork()
        self.changes.after_fork()
        self.owner.after_fork()
        self.under_way.after_fork()
        self.users.after_fork()
        self.reclaim.after_fork()
        self.core.counted()
        self.hits = self.misses = self.corrupt = 0
        self.sets = self.deletes = self.evictions = self.expirations = 0

    def _on_lock(self) -> None:
        """Each time the lock is taken: mend what a dead process left, follow a replaced index."""
        self._look_at_names()
        words = self.index.words
        if words[f.W_BUSY]:
            self.complete_begun()
            self.log_once("repair", "a process died while it changed the index: this was put in order")
        if words[f.W_SUPERSEDED]:
            self.follow_index()
        self.follow_settings()

    def ensure_completed(self) -> None:
        """Before it is asked what the index shows, after an interruption: others are not waited for else."""
        if self.index.words[f.W_BUSY]:
            with self.lock:
                self.complete_begun()

    def complete_begun(self) -> None:
        """A change of the index that an interruption, or a death, came in the middle of. The lock is held."""
        try:
            recovery.repair(self, self.index)
        except IndexDamaged as error:
            self.rebuild(str(error))

    def follow_path(self) -> None:
        """For a handle that only reads: use the index that stands in its place, if it is another one.

        The directory may have been filled anew, or overlayfs has copied the file because somebody writes
        to it: then the mapping stays as it was for ever, and so does, on some kernels, the inode.
        """
        with self.appending:  # one thread after another
            try:
                if not self.closed and not self._is_at_its_path():
                    self.follow_index()
                    self.files.forget_all()
            except ClosedError:
                pass
            except ours(OSError, CacheError, IndexDamaged) as error:  # what is mapped goes on to be read
                self.log_once("follow", f"there is another index, and it cannot be used: {error}")
        self.say()

    def _is_at_its_path(self) -> bool:
        """Whether the mapping is that of the file at its path, or there is none there."""
        path = os.path.join(self.root, f.INDEX_NAME)
        look_again(self.backend, self.settings)
        try:
            with self.backend.reading(path) as fd:
                there, mapped = os.fstat(fd), os.fstat(self.index.fd)
                clock = int.from_bytes(self.backend.read(fd, 8, f.W_CLOCK * 8), "little")
        except FileNotFoundError:
            return True
        same = (there.st_dev, there.st_ino) == (mapped.st_dev, mapped.st_ino)
        return same and self.index.words[f.W_CLOCK] >= clock  # asked afterwards: it only grows

    def follow_index(self) -> None:
        """Another process has put a rebuilt index in place: use that. The lock is held."""
        index: Index | None = None
        try:
            index = recovery.map_index(self)
            sound = not index.superseded
        except (IndexDamaged, FileNotFoundError) as error:
            if self.read_only:
                raise FormatError(
                    f"the index in {self.root!r} is damaged ({error}): open the cache once without read_only"
                ) from error
            sound = False
        if index is None or not sound and not self.read_only:
            unsound = index
            index = self.made(lambda: recovery.rebuild_index(self, unsound))
        if index.identity != self.index.identity:  # somebody has put another cache in the place of ours
            self.changes.close()
            self.files.forget_all()
            self._looked = 0.0
        self._use(index)

    # -- files that were removed -------------------------------------------------------------

    def made(self, make: Callable[[], T]) -> T:
        """`make()`, which goes by names; again where somebody has removed a directory that it needs."""
        return made(self.backend, self.settings, make)

    def ensure_in_place(self) -> None:
        """Before a file is made by its name, and not found by a descriptor. The lock is held."""
        self._looked = 0.0
        self._look_at_names()

    def _look_at_names(self) -> None:
        """See, now and then, that our files have not lost their names to somebody who is not of ours."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        if not self.is_in_place() and not self.index.words[f.W_SUPERSEDED]:
            self._refuse_if_closed()
            again_where_it_vanishes(self._follow_removed)
        if not self.closed:
            self.made(self._look_at_others)
        self._looked = time.monotonic()

    def _refuse_if_closed(self) -> None:
        """Whoever closes puts nothing in the place of what was removed."""
        if self.closed:
            raise FileNotFoundError(errno.ENOENT, "the cache was removed", self.root)

    def _on_lock_gone(self) -> None:
        """A lock's file was removed, maybe with all others: have a directory in which to make it anew."""
        if self.is_in_place():  # else it is told what happened to all of it
            self.log_once("lock", "a lock file was removed while the cache was in use: it is made anew")
        else:
            self._refuse_if_closed()
        prepare(self.backend, self.settings)

    def _follow_removed(self) -> None:
        """The index has lost its name to somebody who is not of ours. The lock is held.

        Where others have put one in its place, that is followed. Where ours is gone, and what it lists is
        not, it is as good as ever. Else its cache is gone, and what is there now is ours as well.
        """
        if isinstance(self.lock, FileLock):  # under that which all others take
            self.lock.ensure_in_place()
        prepare(self.backend, self.settings)
        self.changes.close()
        self.files.forget_all()
        try:
            there: Index | None = recovery.map_index(self)
        except FileNotFoundError:
            there = None
        except IndexDamaged:
            return self._use(recovery.rebuild_index(self, self.index))
        if there is not None and there.identity == self.index.identity or there is None and self._has_files():
            line = "the index was removed while the cache was in use: it is put in place again"
            self.log_once("index", line)
            try:
                self._use(there or recovery.remake_index(self, self.index, self.index.table_capacity))
            except IndexDamaged:  # or superseded, just before we had the lock, by one that is gone as well
                self._use(recovery.rebuild_index(self, self.index))
        else:
            if there is not None:
                there.close()
            self._begin_anew()
        cache_settings.keep(self)

    def _has_files(self) -> bool:
        """Whether segments that our index lists are still there, if it lists any."""
        listed = self.index.segments()
        return not listed or any(self.backend.exists(self.files.path(segment)) for segment in listed)

    def _begin_anew(self) -> None:
        """Open what is in the place of the cache that is gone, or begin one. The lock is held."""
        self.log_once("removed", "the cache was removed while it was in use: going on with a new one")
        self.owner.release()
        self.users.leave()
        self._use(recovery.open_index(self, alone=self.users.enter(), seed=self.seed))

    def _look_at_others(self) -> None:
        """What the index is not found by, and others go by, or add to, has to be in its place as well."""
        if not is_whole(self.backend, self.root):
            prepare(self.backend, self.settings)
        if self.users.ensure_entered() and self.index.words[f.W_CLEAN]:  # somebody believed to be alone
            self.index.words[f.W_CLEAN] = 0
            self.index.sync()
        self.owner.ensure_marked()
        self.changes.ensure_in_place()
        if self.appending.acquire(blocking=False):  # else whoever adds to the segment looks next time
            try:
                self._look_at_segment()
            finally:
                self.appending.release()

    def _look_at_segment(self) -> None:
        """Nobody finds what is added to a segment whose file was removed: it is not shown any more."""
        writer, index = self.writer, self.index
        if writer is None or not self.may_show(writer.segment):
            return
        if not has_name(writer.fd, self.files.path(writer.segment)):
            index.resize_segment(writer.segment, 0)
            index.set_state(writer.segment, f.SEALED)
            index.words[index.entry(writer.segment) + f.T_OWNER] = 0

    def rebuild(self, reason: str) -> None:
        """Replace a damaged index by one made from the checkpoint and the segments."""
        if self.read_only:
            self.ensure_writable("rebuild its index")
        damaged = self.index  # also while the handle closes
        with self.lock:
            if self.index is damaged:  # nobody else did, or has: then taking the lock followed it
                self.log_once("rebuild", f"the index is damaged ({reason}): rebuilding it")
                self._use(self.made(lambda: recovery.rebuild_index(self, damaged)))

    def give_up(self, kind: str, name: str, error: OSError) -> None:
        """The index is made anew without what cannot be read of a file: check() has it replaced."""
        self.given_up[kind, name] = fault(error)
        self.log_once(f"unreadable {name}", f"{name} {fault(error)}: it is given up")

    def shrink_index(self) -> None:
        """Put a smaller index in place of one that has grown for many more entries. The lock is held."""
        self._remake_index(recovery.fitting_table(self, self.index))

    def _remake_index(self, table_capacity: int) -> None:
        try:
            self._use(self.made(lambda: recovery.remake_index(self, self.index, table_capacity)))
        except IndexDamaged as error:
            self.rebuild(str(error))

    def new_segment(self) -> int:
        """A number for a new segment or log. The lock is held; the index may be another one afterwards."""
        segment = self.index.next_segment_id()
        if segment is None and recovery.has_room_for_table(self.index):
            self._remake_index(2 * self.index.table_capacity)
            segment = self.index.next_segment_id()
        if segment is None:
            raise StorageFull(errno.ENOSPC, "there are more segments than can be listed: raise segment_size")
        return segment

    def new_segment_file(self) -> tuple[int, int]:
        """`new_segment`, and a descriptor of its file, which this makes: past files that nobody lists."""
        for _ in range(ATTEMPTS):
            segment = self.new_segment()
            path = self.files.path(segment)
            try:
                return segment, self._new_file(path)
            except FileExistsError:
                pass
        raise FileExistsError(errno.EEXIST, "there are files that are not of this cache: run check()", path)

    def give_up_segment(self, segment: int, fd: int) -> None:
        """One that was not begun to its end: maybe listed already. The lock is held."""
        self.backend.let_go(fd)
        self.backend.clear_away(self.files.path(segment))
        self.complete_begun()
        if self.index.state(segment):
            self.index.drop_segment(segment)

    def _new_file(self, path: str) -> int:
        flags, mode = os.O_RDWR | os.O_CREAT | os.O_EXCL, self.settings.file_mode
        return self.made(lambda: self.backend.open(path, flags, mode))

    def users_alone(self) -> bool:
        """True if no other handle is open. The lock is held."""
        return not self.read_only and self.users.is_alone()

    def _segment_exists(self, segment: int) -> bool:
        return bool(self.index.state(segment)) if hasattr(self, "index") else True

    def names_changed(self) -> None:
        """A segment was begun: its name is to be made durable before its records are promised to be."""
        self._names += 1

    # -- settings of the cache ---------------------------------------------------------------

    def follow_settings(self) -> None:
        """Take over what the index says, if somebody has changed that. Cheap if nobody has."""
        index = self.index
        checksum = index.words[f.W_SETTINGS_SUM]
        if checksum != self._settings_seen:
            settings = index.settings
            if settings is not None:  # else somebody is changing them, or they are damaged
                self._settings_seen = checksum
                self.take_over(settings)

    def take_over(self, settings: CacheSettings) -> None:
        """Go by other settings of the cache, and whatever follows from them."""
        own = self.settings
        self.in_force = settings
        self.size_limit = limit = settings.size_limit
        self.policy: Policy = POLICIES[settings.eviction]
        self.segment_bytes = min(own.segment_size or segment_bytes_of(limit), limit // 4)
        self.large_bytes = min(own.large_value_size or LARGE_VALUE_BYTES, self.segment_bytes // 4)
        # A value this long may be refused; shorter ones always fit and are not asked about.
        self.unchecked_bytes = min(self.large_bytes, own.max_value_size or self.large_bytes)
        # A stream of unknown length is refused beyond this: it evicts before it is known to fit.
        self.stream_bytes = own.max_stream_size or limit // _STREAM_SHARE
        # And one that would be longer than this is not even encoded.
        self.encodable_bytes = min(limit, own.max_value_size or limit, f.MAX_VALUE_BYTES)
        for follow in self._followers:
            follow()

    def log_once(self, topic: str, line: str) -> None:
        if topic not in self._logged:
            self._logged.add(topic)
            self.unlogged.append(line)
            self.say()

    def say(self) -> None:
        """Log what is waiting for that, unless this thread holds a lock: handlers run whatever they like.

        But they don't use this cache, in the middle of a call of which they know nothing (see `entering`).
        """
        thread = threading.get_ident()
        while self.unlogged and not self._is_within:
            self.telling.add(thread)
            try:
                with suppressing(IndexError):  # another thread took it
                    self._log(self.unlogged.popleft())
            finally:
                self.telling.discard(thread)

    def _log(self, line: str) -> None:
        try:
            _log.warning("%s: %s", self.root, line)
        except ours(Exception):  # a handler's; we go on, and it is told as logging itself does
            if logging.raiseExceptions:
                traceback.print_exc()

    @property
    def _is_within(self) -> bool:
        """Whether this thread is in the middle of a change, or of telling of one."""
        held: bool = (
            self.appending._is_owned()
            or self.lock.threads._is_owned()
            or self.checkpointing.threads._is_owned()
        )
        return held or bool(self.telling) and threading.get_ident() in self.telling

    def entering(self) -> None:
        """What a public method begins with: the handle is this process's, and in the middle of nothing."""
        forks.ensure_own()
        if self._is_within:
            ensure_not_within(self.root)
            self.telling.discard(threading.get_ident())
        if self.interrupted:
            self._tidy_up()

    def was_interrupted(self) -> None:
        """An exception that is not ours left a method, in this thread: whoever comes next tidies up."""
        self.interrupted = True
        self.under_way.forget_own()

    def _tidy_up(self) -> None:
        """No room stays taken for what was left half done. Other files that were left are removed when nobody
        else has the cache open, or who has closes: the mark tells."""
        self.interrupted = False
        if self.read_only or self.closed:
            return
        try:
            with self.lock:
                lost = self.under_way.recall()
                if not self.under_way and self.users.is_alone():
                    return recovery.tidy(self, self.index, began=self.index.stamp())
                if lost:
                    self.count_large()
            self.owner.stay_marked()
            if lost:
                self.reclaim.look_for_orphans()
        except ours(CacheError, OSError, IndexDamaged) as error:
            self.log_once("tidy", f"cannot tidy up after an interruption: {error}")
        except BaseException:  # whoever comes next does it
            self.interrupted = self.under_way.lost = True
            raise

    def ensure_open(self) -> None:
        if self.closed:
            raise closed_error(self.root)

    def ensure_writable(self, doing: str) -> None:
        if self.read_only:
            raise ReadOnlyError(f"cannot {doing}: the cache in {self.root!r} was opened with read_only=True")
        if self.closed:
            raise closed_error(self.root)

    # -- finding -----------------------------------------------------------------------------

    def find(self, low: int, high: int) -> int:
        """The slot of a live entry, expired ones included; 0 if there is none."""
        for _ in range(ATTEMPTS):
            try:
                return self.index.find(low, high)
            except IndexDamaged as error:
                self._mend(error)
            except (ValueError, AttributeError):
                if self.closed:
                    raise closed_error(self.root) from None
                raise
        return 0

    def reveals(self, low: int, high: int) -> bool:
        """Whether a digest that was not found may be found now: damage may have hidden its slot, and then the
        index was made anew."""
        try:
            self.index.ensure_absent(low, high)
            return False
        except (IndexDamaged, IndexError, ValueError, AttributeError):  # or it was replaced meanwhile
            with self.lock:
                try:
                    self.index.ensure_absent(low, high)
                except IndexDamaged as error:
                    self._mend(error)
            return True

    def _mend(self, error: IndexDamaged) -> None:
        if self.read_only:
            if not self.index.superseded:
                raise FormatError(
                    f"the index in {self.root!r} is damaged ({error}): open the cache once without read_only"
                )
            self.follow_index()
        else:
            self.rebuild(str(error))

    def lookup(self, low: int, high: int) -> Slot | None:
        """A live, unexpired entry's slot. Counts nothing and touches nothing."""
        for _ in range(ATTEMPTS):
            at = self.find(low, high)
            if not at:
                return None
            try:
                slot = self.index.slot(at)
            except struct.error:  # the index was replaced by a smaller one meanwhile
                continue
            if slot.low == low and slot.high == high:
                return None if slot.expires and self.is_over(slot) else slot
        return None

    def entry(self, low: int, high: int, key: bytes) -> Slot | None:
        """The same of an encoded key: an entry of another key, with the same digest, is none of it.

        Raises `CacheIOError` if that can't be read.
        """
        slot, place = self.lookup(low, high), 0
        if slot is None and not self.read_only and self.reveals(low, high):
            slot = self.lookup(low, high)
        while slot is not None and slot.place != place:
            if self.is_of(slot, key):
                return slot
            place = slot.place
            slot = self.lookup(low, high)  # it may have been moved meanwhile
        return None

    def is_of(self, slot: Slot, key: bytes) -> bool:
        """Whether the record that a slot shows is of this very key. False also if there is none any more."""
        return bool(self.attempt(partial(self._is_of, key), slot))

    def _is_of(self, key: bytes, slot: Slot) -> bool:
        data = self.backend.read(self.files.get(slot.segment), f.RECORD_BYTES + len(key), slot.offset)
        return f.is_of_key(data, key)

    def attempt(self, load: Callable[[Slot], T | None], slot: Slot) -> T | None:
        """`load(slot)`; None if what it reads is not there (any more)."""
        try:
            return load(slot)
        except ours(OSError) as error:
            if is_absence(error):
                self.files.forget(slot.segment)
                return None
            if isinstance(error, CacheIOError):
                raise
            name_file(error, self.files.path(slot.segment))
            note = "; ".join(filter(None, ["the entry was kept", remedy(error)]))
            raise from_os_error(error, "cannot read an entry", note) from error
        except OverflowError:  # an offset or length that no file has
            return None

    def is_over(self, slot: Slot) -> bool:
        """Whether an entry has expired.

        One that was made in the future has, if it expires at all: the clock was wrong then, and nobody
        knows how long it should live. Its stamp alone does not tell, for stamps go on from the highest one.
        """
        if not slot.expires:
            return False
        now = time.time_ns()
        if slot.expires <= now or slot.stamp <= now + f.AHEAD:
            return slot.expires <= now
        try:
            data = self.backend.read(self.files.get(slot.segment), f.RECORD_BYTES, slot.offset)
        except ours(OSError):  # until that can be told it stays, and whoever reads the value finds out
            return False
        head = f.unpack_head(data, 0)
        return head is not None and head.stamp == slot.stamp and head.created > now + f.AHEAD

    def pointer(self, slot: Slot) -> int:
        """The number in a large file's name, from the record in the segment."""
        fd = self.files.get(slot.segment)
        try:
            data = self.backend.read(fd, f.LARGE_POINTER.size, slot.offset + slot.head_bytes)
        except ours(OSError) as error:
            name_file(error, self.files.path(slot.segment))
            raise
        if len(data) < f.LARGE_POINTER.size:
            raise FileNotFoundError(errno.ENOENT, "the record is gone", self.files.path(slot.segment))
        pointer: int = f.LARGE_POINTER.unpack(data)[0]
        return pointer

    def file_of(self, segment: int) -> int | None:
        """A descriptor of a segment, for reading; None if there is no such file (any more)."""
        try:
            return self.files.get(segment)
        except ours(OSError) as error:
            if is_absence(error):
                return None
            raise

    def touch_slot(self, low: int, high: int) -> None:
        """Note a hit for the eviction order."""
        touched = self._touched(self.index.words[f.W_EVICTION])
        if touched is not None:
            at = self.find(low, high)
            words = self.index.words
            if at and at < len(words):
                words[at + f.S_ACCESS] = touched(words[at + f.S_ACCESS], self.index.stamp())

    def accessed(self, slot: Slot) -> float | None:
        """Seconds since the epoch of the last hit, where the policy keeps that."""
        return slot.access / 1e9 if policy_of(self.index).name == "lru" else None

    # -- walks -------------------------------------------------------------------------------

    def look(self, question: Callable[[Index], T]) -> T:
        """`question(index)`, asked without the lock: again where the index was replaced meanwhile."""
        for _ in range(ATTEMPTS):
            try:
                return question(self.index)
            except IndexDamaged as error:
                self._mend(error)
        raise CacheIOError(errno.EIO, "the index is damaged again and again: run check(fix=True)")

    def walk(self) -> Iterator[tuple[Record, Slot]]:
        """Every live entry with its record's names: segment by segment, from their footers.

        Entries written while it runs don't appear, so that it comes to an end; none appears twice.
        """
        self.ensure_open()
        if self.read_only:
            self.follow_path()
        started = max(time.time_ns(), self.index.words[f.W_CLOCK])
        seen: set[int] = set()
        done: set[int] = set()
        while True:
            self.ensure_open()
            todo = [s for s in self.index.segments() if s not in done]
            if not todo:
                return
            # What is moved goes to active segments: these last, and it is not missed.
            todo.sort(key=lambda segment: self.index.state(segment) == f.ACTIVE)
            for segment in todo:
                ensure_wanted()
                done.add(segment)
                for record in self.records(segment):
                    slot = self.alive(record, segment)
                    if slot is not None and slot.low not in seen and slot.stamp <= started:
                        seen.add(slot.low)
                        yield record, slot

    def records(self, segment: int) -> Generator[Record, None, None]:
        """The records of a segment, read as they are asked for; none if there is no such file."""
        try:  # a descriptor of its own: shared ones may be closed while the caller takes its time
            with self.files.reading(segment) as fd:
                yield from read_records(self.backend, fd, segment, self.index.identity)
        except ours(OSError) as error:
            if not is_absence(error):
                raise told(error, "a segment") from error

    def alive(self, record: Record, segment: int) -> Slot | None:
        """The slot that shows this very record, expired or not."""
        if record.head.kind > f.LARGE:
            return None
        at = self.find(*record.digest(self.index.identity.seed))
        if not at:
            return None
        slot = self.index.slot(at)
        return slot if slot.place == f.pack_place(segment, record.offset) else None

    def count_entries(self) -> int:
        return self.index.count()

    def expire_all(self) -> int:
        expired = 0
        for part in range(f.PARTITIONS):
            ensure_wanted()
            expired += self.reclaim.expire_part(part)
        return expired

    # -- the active segment ------------------------------------------------------------------

    def room(self, size: int) -> SegmentWriter:
        """The writer, with room for `size` bytes more. `appending` is held."""
        writer = self.writer
        if writer is not None and size <= writer.room:
            return writer
        self.ensure_writable("store an entry")
        return self.reclaim.roll(size)

    def seal_writer(self) -> None:
        """Close the active segment for good. `appending` is held."""
        writer = self.writer
        if writer is None:
            return
        self._take_back(writer)  # first: if waiting for the lock is given up there, it goes on
        self.writer = None
        try:
            size = writer.seal()
        except ours(OSError) as error:  # without its footer it will be read through instead
            size = os.fstat(writer.fd).st_size
            self.log_once("footer", f"cannot write a footer: {error}")
        durable = self.syncs_segments
        try:
            writer.close(sync=durable)
        except ours(OSError) as error:  # whoever waits for this sync gets an error as well
            durable = False
            self.log_once("seal", f"cannot make a segment durable: {error}")
        with self.lock:
            if self.is_ours(writer):
                self.index.resize_segment(writer.segment, size)
                entry = self.index.entry(writer.segment)
                if durable:
                    self.index.words[entry + f.T_SYNCED] = size
                self.index.set_state(writer.segment, f.SEALED)
                self.index.words[entry + f.T_OWNER] = 0  # last: an active one without owner stays so

    def may_show(self, segment: int) -> bool:
        """True of an active segment of ours: what was appended to it counts. The lock is held."""
        index = self.index
        if index.state(segment) != f.ACTIVE:
            return False
        token = self.owner.token
        return bool(token and index.words[index.entry(segment) + f.T_OWNER] == token)

    def is_ours(self, writer: SegmentWriter) -> bool:
        """True unless our segment is gone, or was sealed by who believed us dead. The lock is held."""
        state, owner = self.index.state(writer.segment), self.index.entry(writer.segment) + f.T_OWNER
        known = state in APPENDABLE or state == f.SEALED
        return known and self.index.words[owner] == self.owner.token != 0

    def _take_back(self, writer: SegmentWriter) -> None:
        """Before our segment is sealed: what was appended, and was not shown, never will be."""
        try:
            with self.lock:
                index = self.index
                tail = index.words[index.entry(writer.segment) + f.T_TAIL]
                if tail != writer.tail and index.state(writer.segment) in APPENDABLE:
                    index.set_state(writer.segment, f.SEALED)  # nobody shows it while it is taken back
                    for offset in self.unshown(writer.segment, writer.fd):
                        writer.void(offset)
        except ours(OSError) as error:
            self.log_once("unshown", f"cannot take back what was not stored: {error}")

    def unshown(self, segment: int, fd: int) -> list[int]:
        """Where records of an active segment are that the index does not show. The lock is held.

        They were appended by puts that did not come to an end; a rebuild would find them, also after
        somebody was told that there is nothing to remove.
        """
        index = self.index
        settled = max(index.words[index.entry(segment) + f.T_TAIL], f.SEGMENT_HEADER_BYTES)
        try:
            index.validate()
            records = scan(self.backend, fd, segment, self.seed, settled)
            return [record.offset for record in records if self._is_unshown(record)]
        except IndexDamaged as error:  # what cannot be found is not lost: the rebuild shows it
            self.rebuild(str(error))
            return []

    def _is_unshown(self, record: Record) -> bool:
        if record.head.kind > f.LARGE:
            return False
        at = self.index.find(*record.digest(self.seed))
        return not at or self.index.words[at + f.S_STAMP] < record.head.stamp

    @property
    def own_end(self) -> tuple[int, int]:
        """(id of our active segment, where it ends), for `others_append`; zeros if there is none."""
        writer = self.writer
        return (writer.segment, writer.tail) if writer is not None else (0, 0)

    def others_append(self) -> bool:
        """True if there may be records that the index does not show, by others or by puts of ours.

        Whoever removes something that is not there has to log that then: should those others be
        dead, a rebuild would find their records, and must not bring back what came before.
        """
        index, (segment, tail) = self.index, self.own_end
        settled = index.state(segment) == f.ACTIVE and index.words[index.entry(segment) + f.T_TAIL] == tail
        return bool(index.words[f.W_ACTIVE] > settled)

    def let_go_if_lost(self, writer: SegmentWriter) -> None:
        """Stop appending to a segment that others took, for its room or because they believed us dead."""
        with self.appending:
            if self.writer is not writer:
                return
            with self.lock:
                active, ours = self.index.state(writer.segment) == f.ACTIVE, self.is_ours(writer)
            if ours and not active:
                self.seal_writer()
            elif not ours:
                self.writer = None
                writer.abandon()

    def temporary_path(self, *, value: bool = False) -> str:
        """Of a file that is renamed when it is complete; `value`: that of a large value, which counts."""
        return self.large.temporary_path(self.owner.acquire(), next(self._temporary), value=value)

    def passing_path(self) -> str:
        """The same of one that is in its place before the lock is given up: it needs no mark of life."""
        return self.large.temporary_path(secrets.randbits(63), 0)

    def count_large(self) -> None:
        """Count, exactly, what large files take. The lock is held."""
        count_anew(self.owner, self.index)

    def _on_unnoted(self, error: OSError) -> None:
        self.log_once("mark", f"cannot note which large values are under way: {error}")

    # -- durability --------------------------------------------------------------------------

    def promise(self) -> None:
        """From now on nothing durable may be lost for something that is not."""
        self.index.words[f.W_PROMISED] = 1

    def flush(self) -> None:
        """Make everything durable that was completed before, by whichever process."""
        self.ensure_writable("flush")
        try:
            self.promise()
            self.reclaim.sync_dirty()
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot flush the cache") from error

    def scandir(self, path: str) -> list[Entry]:
        """What is in one of our directories."""
        return self.made(partial(self.backend.scandir, path))

    def files_in(self, path: str) -> list[Entry]:
        """The same without directories: none is ours, whatever its name is."""
        found = []
        for name, status in self.scandir(path):
            if stat.S_ISDIR(status.st_mode):
                line = f"{os.path.join(path, name)} is a directory, and none of the cache's: it is left alone"
                self.log_once(line, line)
            else:
                found.append((name, status))
        return found

    def sync_directory(self, path: str) -> None:
        """Make the names in one of our directories durable."""
        self.made(partial(self.backend.sync_directory, path))

    def _sync_names(self) -> None:
        names = self._names
        if self._names_synced < names:
            self.sync_directory(self.segments_path)
            self._names_synced = max(self._names_synced, names)

    def sync_large(self) -> None:
        """Make large values durable that came since this was last done: their names tell when they came."""
        with self.lock:
            # What is shown while we sync has a later name, or one of those that are known to be under way.
            covered = min(self.index.stamp(), *self.owner.named(), f.MASK64)
            since = self.index.words[f.W_FLUSHED]
            since = since if since <= self.index.words[f.W_CLOCK] else 0  # damage
        came = {path for (_, _, pointer), _, path in self.large.listed() if pointer >= since}
        for path in (new := came - self._large_synced):
            try:
                with self.backend.reading(path) as fd:
                    self.backend.sync(fd)
            except ours(OSError) as error:
                if error.errno not in VANISHED:  # removed meanwhile
                    raise
        if new:
            self.sync_directory(self.large.directory)
        self._large_synced = came  # while one is being stored, all that came since are looked at each time
        with self.lock:
            lowered = self.index.words[f.W_FLUSHED]
            self.index.words[f.W_FLUSHED] = covered if lowered >= since else min(covered, lowered)

    # -- counting ----------------------------------------------------------------------------

    def count(self, counter: str, number: int) -> None:
        """Count for this handle and for the whole cache. The lock is held."""
        setattr(self, counter, getattr(self, counter) + number)
        self.index.add(f.W_COUNTERS + f.COUNTERS.index(counter), number)

    def use(self, hit: bool) -> None:
        """Count a get: the one way in which this is done outside of the core."""
        self.core.use(hit, not hit, time.time_ns())

    def fold_counters(self) -> None:
        """Add hits and misses, which are counted without a lock, to this handle's and the cache's totals."""
        if self.read_only:
            self._fold_reading()
            self.follow_path()
            return
        with self.lock:
            self._fold()

    def try_to_fold(self) -> None:
        """The same, if nobody is in the way. Whoever gets a value hears nothing of what goes wrong here:
        uses stay counted, and the next one who folds them has them."""
        lock = self.lock
        if isinstance(lock, NoLock):
            return self._look_around()
        with suppressing(Exception):
            if lock.try_to_enter() or self._enter_patiently(lock):
                try:
                    self._in_vain = 0
                    self._fold()
                finally:
                    lock.__exit__()

    def _look_around(self) -> None:
        """What a handle that only reads does instead, and now and then it looks for another index."""
        self._fold_reading()
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again = now + _READER_LOOKS
            self.follow_path()

    def _fold_reading(self) -> None:
        with self.appending:
            self._fold()

    def _enter_patiently(self, lock: FileLock) -> bool:
        """Wait a moment, after some tries in vain and not often: whoever has the lock may not be running."""
        self._in_vain += 1
        now = time.monotonic()
        if self._in_vain < _TRIES_IN_VAIN or now < self._patient_again:
            return False
        while time.monotonic() < now + _PATIENCE:
            time.sleep(_PATIENT_STEP)
            if lock.try_to_enter():
                return True
        self._patient_again = time.monotonic() + _PATIENT_EVERY
        return False

    def _fold(self) -> None:
        """The lock is held."""
        unused = self.index.words[f.W_NEXT_SEGMENT]
        if unused != self._swept:  # segments come, so others go
            self._swept = unused
            self.files.look()
        hits, misses = self.core.counted()
        self.hits += hits
        self.misses += misses
        if not self.read_only:
            self.index.add(_W_HITS, hits)
            self.index.add(_W_MISSES, misses)


def closed_error(root: str) -> ClosedError:
    return ClosedError(f"the cache in {root!r} is closed: open it anew")


def _renew_after_fork() -> None:
    for store in list(_handles):
        was_closed = store.closed  # by another thread of the parent, which had not finished
        try:
            store.after_fork()
            if was_closed:
                store._release()
        except Exception as error:  # it shares its lock with the parent: it must not be used, others may
            store.closed = store.released = True
            store.core.detach()
            store.index.close()
            if not was_closed:
                store.log_once("fork", f"cannot be used after a fork: {error}")


forks.register(_renew_after_fork)
