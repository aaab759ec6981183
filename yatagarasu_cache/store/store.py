"""An open handle on a cache directory: its parts, made from the bottom up, and how it begins and ends."""

from __future__ import annotations

import contextlib
import time
import weakref
from typing import Any

from ..backends.base import Backend
from ..concurrency import forks
from ..concurrency.file_locks import GRACE
from ..concurrency.interruption import ours
from ..config import Settings
from ..errors import CacheIOError, from_os_error
from . import format as f
from .active import ActiveSegment
from .annotating import Annotating
from .budget import Budget
from .cache_files import CacheFiles, Temporaries
from .changes import ChangeLog
from .check import Checker
from .checkpointing import Checkpoints
from .checks.entries import EntryCheck
from .checks.files import FileCheck
from .checks.index import IndexCheck
from .checks.large import LargeCheck
from .checks.segments import SegmentCheck
from .cleaning import Cleaner
from .core import CompiledCore
from .core import choose as choose_core
from .counters import Counters
from .current import CurrentIndex
from .dead_segments import DeadSegments
from .directory import again_where_it_vanishes, prepare
from .durability import Durability
from .ending import Ending
from .evicting import Evictor
from .finding import Finding
from .grants import Grants
from .index import Index
from .keyed import CompiledAccess, KeyedAccess
from .large_writing import LargeWriting
from .leaving_files import LeavingFiles
from .lending import Lending
from .life import Life
from .limits import Limits
from .locking import Locks
from .notices import Notices
from .owners import Owner, Users
from .pace import Pace
from .presence import Presence
from .reading import Reading
from .reaping import Reaper
from .recovery import Recovery
from .removal import Removal
from .room import Room
from .segment_table import SegmentTable
from .settings_file import SettingsFile
from .shared_settings import SharedSettings
from .showing import Showing
from .tags import Tags
from .tidying import Tidying
from .under_way import UnderWay
from .unreadable import Losses
from .upkeep import Upkeep
from .walks import Walks
from .writing import Writing

# How a store lets go of its parts: the last of these first.
_LETTING_GO = (
    ("current", "close"), ("locks", "close"), ("users", "leave"), ("owner", "release"), ("files", "close"),
    ("changes", "close"), ("active", "abandon"),
)  # fmt: skip
_stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """One open handle. What it does is done by its parts, each of which knows what its constructor names."""

    durable = False  # see DurableStore

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings, self.backend, self.root = settings, backend, settings.directory
        self.life = Life(self.root, settings.read_only)
        self.locks = Locks()
        self.notices = Notices(self.root, self.locks.are_mine)
        self.losses = Losses(self.notices)
        self.limits = Limits(settings)
        self.core = choose_core(settings, backend)

    # -- opening ------------------------------------------------------------------------------

    def open(self) -> None:
        """To be called once. If that fails, or is interrupted, `close` lets go of what was opened."""
        try:
            again_where_it_vanishes(self._open)
            _stores.add(self)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, f"cannot open the cache in {self.root!r}") from error
        self.life.usable = True

    def _open(self) -> None:
        self.life.released = False
        settings, backend = self.settings, self.backend
        is_new = prepare(backend, settings)
        self.limits.forget_followers()
        self.files = files = CacheFiles(backend, settings, self.core, self.notices)
        self.owner = Owner(backend, self.root, files.mode, files.made, files.files_in)
        self.users = Users(
            backend, self.root, files.mode, files.made, self.owner, settings.lock_timeout
        )
        try:
            if self.life.read_only:
                recovery = self._recovery()
                return self._compose(recovery, recovery.open_index(alone=False))
            lock = self.locks.open(backend, settings, self.notices, files.prepare)
            with lock:
                if lock.made and not is_new:  # somebody may still be inside of the one that was removed
                    time.sleep(GRACE)
                recovery = self._recovery()
                self._compose(recovery, recovery.open_index(alone=self.users.enter()))
                lock.on_enter = self._on_lock
                self.shared_settings.settle(settings)
                self.reaper.reap(opening=True)
        except BaseException:
            self._release()
            raise

    def _recovery(self) -> Recovery:
        self.temporaries = Temporaries(self.root, self.owner)
        self.settings_file = SettingsFile(
            self.files, self.temporaries, self.limits, self.losses, self.notices
        )
        return Recovery(
            self.life, self.files, self.temporaries, self.owner, self.limits, self.settings_file, self.losses,
            self.notices,
        )  # fmt: skip

    def _compose(self, recovery: Recovery, index: Index) -> None:
        """Make the parts that there are once there is an index, each of those before it."""
        life, locks, files, notices, limits = self.life, self.locks, self.files, self.notices, self.limits
        owner, losses, temporaries, core = self.owner, self.losses, self.temporaries, self.core
        self.recovery = recovery
        self.current = current = CurrentIndex(life, locks, files, notices, recovery, index)
        self.counters = counters = Counters(life, locks, files, current, core)
        core.open(files.segments, counters.try_to_fold)
        current.on_use(core.attach)
        self.under_way = under_way = UnderWay(owner, lambda: current.index, self._on_unnoted)
        self.shared_settings = settings = SharedSettings(
            self.root, life, locks, limits, current, self.settings_file
        )
        current.on_use(lambda _: settings.follow())
        self.finding = finding = Finding(life, locks, files, current)
        self.walks = walks = Walks(life, files, current, finding, core)
        table = SegmentTable(files, current)
        self.changes = changes = ChangeLog(locks, files, limits, current, table, notices)
        self.active = active = ActiveSegment(locks, files, owner, current, notices)
        self.presence = presence = Presence(
            life, locks, files, owner, self.users, recovery, current, self.settings_file, changes,
            active, notices,
        )  # fmt: skip
        self.durability = durability = Durability(life, locks, files, owner, current)
        self.budget = budget = Budget(
            locks, files, limits, current, settings, under_way, self.settings
        )
        self.reaper = reaper = Reaper(
            locks, files, owner, under_way, current, recovery, changes, active, durability, losses,
            notices,
        )  # fmt: skip
        self.dead = dead = DeadSegments(locks, files, current, budget, durability)
        self.checkpoints = checkpoints = Checkpoints(
            life, locks, files, temporaries, current, budget, changes, durability, dead, notices
        )
        self.pace = pace = Pace(limits, notices)
        leaving = LeavingFiles(locks, files, current, under_way, durability, reaper, notices)
        self.removal = removal = Removal(
            life, locks, files, current, finding, active, changes, leaving, durability, reaper, dead,
            counters, pace, core, notices,
        )  # fmt: skip
        self.reading = reading = Reading(life, locks, limits, files, current, finding, removal, counters)
        self.lending = Lending(life, locks, files, finding, reading, removal, counters)
        self.tags = Tags(life, locks, current, finding, reading, walks)
        grants = Grants(
            locks, files, owner, limits, current, budget, presence, table, changes, active, durability,
            reaper, core,
        )  # fmt: skip
        self.evictor = evictor = Evictor(
            locks, limits, current, budget, reaper, finding, removal, leaving, counters
        )
        self.cleaner = cleaner = Cleaner(
            locks, files, owner, limits, current, budget, active, grants, walks, removal, leaving,
            counters, dead,
        )  # fmt: skip
        self.room = room = Room(
            life, locks, files, limits, current, budget, under_way, active, reaper, dead, checkpoints,
            evictor, cleaner, grants, counters, notices,
        )  # fmt: skip
        self.upkeep = upkeep = Upkeep(
            limits, current, settings, budget, pace, reaper, dead, checkpoints, evictor, cleaner, room
        )
        self.showing = showing = Showing(
            locks, limits, files, current, finding, active, under_way, durability, leaving, counters,
            pace, core,
        )  # fmt: skip
        large = LargeWriting(
            life, locks, limits, files, temporaries, current, presence, finding, active, under_way, room,
            budget, showing, counters, pace,
        )  # fmt: skip
        self.writing = Writing(
            life, locks, limits, current, finding, active, room, budget, showing, large, counters, pace, core
        )
        self.annotating = Annotating(
            life, locks, limits, files, current, finding, active, room, reading, showing
        )
        tidying = Tidying(
            self.root, life, locks, notices, owner, self.users, under_way, current, recovery, reaper
        )
        self.entering, self.was_interrupted = tidying.entering, tidying.was_interrupted
        self.ending = Ending(
            life, locks, files, temporaries, owner, self.users, under_way, current, recovery, active,
            durability, counters, upkeep,
        )  # fmt: skip
        self.checker = self._checker()
        self.keyed = self._keyed()
        locks.on_gone(presence.on_lock_gone)

    def _checker(self) -> Checker:
        locks, files, limits, current = self.locks, self.files, self.limits, self.current
        entries = EntryCheck(
            locks, files, limits, current, self.finding, self.reading, self.lending, self.removal
        )
        return Checker(
            locks, files, current, self.losses, self.checkpoints,
            IndexCheck(self.life, locks, files, current),
            SegmentCheck(
                locks, files, limits, current, self.active, self.changes, self.removal, self.checkpoints,
                entries,
            ),
            entries,
            LargeCheck(locks, files, self.owner, self.under_way, current, self.reaper),
            FileCheck(
                locks, files, limits, current, self.shared_settings, self.settings_file, self.checkpoints,
                self.settings,
            ),
        )  # fmt: skip

    def _keyed(self) -> KeyedAccess:
        core = self.core
        if not isinstance(core, CompiledCore):
            return KeyedAccess(self.current, self.reading, self.writing, self.removal, self.entering)
        keyed = CompiledAccess(
            self.locks, self.notices, self.limits, self.files, self.current, self.changes, self.active,
            self.room, self.reading, self.showing, self.writing, self.removal, self.counters, self.pace, core,
            self.entering,
        )  # fmt: skip
        return keyed.changing_by(self.writing, self.removal) if self.life.read_only else keyed

    def _on_unnoted(self, error: OSError) -> None:
        self.notices.log_once("mark", f"cannot note which large values are under way: {error}")

    def _on_lock(self) -> None:
        """Each time the lock is taken: mend what a dead process left, follow a replaced index."""
        self.presence.look()
        current, words = self.current, self.current.index.words
        if words[f.W_BUSY]:
            current.complete_begun()
            self.notices.log_once(
                "repair", "a change of the index was cut off by a death or an interruption: put in order"
            )
        if words[f.W_SUPERSEDED]:
            current.follow()
        self.shared_settings.follow()

    # -- while it is open ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self.life.closed

    @property
    def released(self) -> bool:
        return self.life.released

    def is_in_place(self) -> bool:
        """False if the index is not at its path any more: it was removed, moved away, or replaced."""
        return self.current.is_in_place()

    # -- closing ------------------------------------------------------------------------------

    def close(self) -> None:
        """Seal what is open; the last handle also makes the index durable. Idempotent.

        An exception that interrupts it leaves the rest to whoever closes it once more, or tidies up.
        """
        life = self.life
        if life.released:
            return
        is_first, life.closed = life.usable and not life.closed, True
        try:
            if is_first:
                self.ending.close()
        except BaseException as error:
            self.owner.stay_marked()  # whoever is the last to close tidies up
            if not isinstance(error, OSError) or self.is_in_place():  # else nothing is to be left in order
                raise
        finally:
            self._release()
            _stores.discard(self)

    def _made(self, *names: str) -> list[Any]:
        """Those of the parts that there are: opening may have come to no end."""
        return [part for name in names if (part := self.__dict__.get(name)) is not None]

    def _release(self) -> None:
        try:
            with contextlib.ExitStack() as stack:  # the last one first, however those before it end
                for name, let_go in _LETTING_GO:
                    for part in self._made(name):
                        stack.callback(getattr(part, let_go))
                self.core.detach()
        except Exception:
            self.life.released = True  # what failed now fails again
            raise
        self.life.released = True

    # -- forks --------------------------------------------------------------------------------

    def let_go_in_child(self) -> None:
        """Of what a thread of the parent was opening, which is not here: its locks are the parent's alone."""
        for part in self._made("locks", "users", "owner"):
            part.let_go_in_child()

    def after_fork(self) -> None:
        """In a child: keep what may be shared (the mapping), renew what may not."""
        self.backend.after_fork()
        for part in (
            self.active, self.notices, self.files.segments, self.locks, self.changes, self.owner,
            self.under_way, self.users, self.upkeep, self.counters,
        ):  # fmt: skip
            part.after_fork()


class DurableStore(Store):
    """The very same as another store, in all that it has, but for making durable what is done by it."""

    durable = True

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)
        self.removal, self.showing = store.removal.durably(), store.showing.durably()
        self.writing = store.writing.durably(self.showing)
        self.annotating = store.annotating.durably(self.showing)
        self.keyed = store.keyed.changing_by(self.writing, self.removal)
        store.active.syncs = True


def _renew_after_fork() -> None:
    for store in list(_stores):
        was_closed = store.closed  # by another thread of the parent, which had not finished
        try:
            store.after_fork()
            if was_closed:
                store._release()
        except Exception as error:  # it shares its lock with the parent: it must not be used, others may
            store.life.closed = store.life.released = True
            store.core.detach()
            store.current.close()
            if not was_closed:
                store.notices.log_once("fork", f"cannot be used after a fork: {error}")


forks.register(_renew_after_fork)
