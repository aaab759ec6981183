"""Files of ours that something other than a cache removed, moved or replaced while they were in use."""

from __future__ import annotations

import errno
import time

from ..concurrency.file_locks import LOOK_EVERY, FileLock, has_name
from . import format as f
from .active import ActiveSegment
from .cache_files import CacheFiles
from .changes import ChangeLog
from .current import CurrentIndex
from .directory import again_where_it_vanishes
from .index import Index, IndexDamaged
from .life import Life
from .locking import Locks
from .notices import Notices
from .owners import Owner, Users
from .recovery import Recovery
from .settings_file import SettingsFile


class Presence:
    """Ensures that the files this handle has open still have their names."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, owner: Owner, users: Users, recovery: Recovery,
        current: CurrentIndex, settings_file: SettingsFile, changes: ChangeLog, active: ActiveSegment,
        notices: Notices,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._owner = life, locks, files, owner
        self._users, self._recovery, self._current = users, recovery, current
        self._settings_file, self._changes, self._active = settings_file, changes, active
        self._notices = notices
        self._looked = 0.0  # when that was last checked
        current.on_another_cache(changes.close)
        current.on_another_cache(self._forget)

    @property
    def _index(self) -> Index:
        return self._current.index

    def _forget(self) -> None:
        self._looked = 0.0

    def ensure(self) -> None:
        """`look` at once: a file is about to be created by its name. The lock is held."""
        self._looked = 0.0
        self.look()

    def look(self) -> None:
        """Check, now and then, that our files have not lost their names to something other than a cache."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        if not self._current.is_in_place() and not self._index.words[f.W_SUPERSEDED]:
            self._refuse_if_closed()
            again_where_it_vanishes(self._follow_removed)
        if not self._life.closed:
            self._files.made(self._look_at_others)
        self._looked = time.monotonic()

    def _refuse_if_closed(self) -> None:
        """A handle that is closing does not replace what was removed."""
        if self._life.closed:
            raise FileNotFoundError(errno.ENOENT, "the cache was removed", self._files.root)

    def on_lock_gone(self) -> None:
        """A lock file was removed, maybe with all others: ensure a directory in which to make it anew."""
        if self._current.is_in_place():  # else `_follow_removed` logs what happened
            self._notices.log_once(
                "lock", "a lock file was removed while the cache was in use: it is made anew"
            )
        else:
            self._refuse_if_closed()
        self._files.prepare()

    def _follow_removed(self) -> None:
        """Something other than a cache has removed or moved the index. The lock is held.

        If another index is in its place, use that. If there is none, but segments that ours lists are still
        there, put ours back. Otherwise the cache is gone: begin a new one.
        """
        if isinstance(self._locks.index, FileLock):  # go on under the lock that all others take
            self._locks.index.ensure_in_place()
        self._files.prepare()
        self._changes.close()
        self._files.segments.forget_all()
        try:
            there: Index | None = self._recovery.map_index()
        except FileNotFoundError:
            there = None
        except IndexDamaged:
            return self._current.use(self._recovery.rebuild(self._index))
        if (
            there is not None
            and there.identity == self._index.identity
            or there is None
            and self._has_files()
        ):
            line = "the index was removed while the cache was in use: it is put in place again"
            self._notices.log_once("index", line)
            try:
                self._current.use(
                    there or self._recovery.remake(self._index, self._index.table_capacity)
                )
            except IndexDamaged:  # or replaced, just before we had the lock, by one that is gone too
                self._current.use(self._recovery.rebuild(self._index))
        else:
            if there is not None:
                there.close()
            self._begin_anew()
        self._settings_file.keep()

    def _has_files(self) -> bool:
        """Whether segments that our index lists are still there, if it lists any."""
        listed = self._index.segments()
        return not listed or any(
            self._files.backend.exists(self._files.segments.path(segment)) for segment in listed
        )

    def _begin_anew(self) -> None:
        """Open the cache that took the place of the one that is gone, or begin one. The lock is held."""
        self._notices.log_once(
            "removed", "the cache was removed while it was in use: going on with a new one"
        )
        self._owner.release()
        self._users.leave()
        self._current.use(self._recovery.open_index(alone=self._users.enter(), seed=self._current.seed))

    def _look_at_others(self) -> None:
        """The other files that handles rely on, or append to, must be in their places as well."""
        self._files.prepare_if_incomplete()
        # If it is clean, another handle did not see us, and believed that it was alone.
        if self._users.ensure_entered() and self._index.words[f.W_CLEAN]:
            self._index.words[f.W_CLEAN] = 0
            self._index.sync()
        self._owner.ensure_marked()
        self._changes.ensure_in_place()
        if self._locks.appending.acquire(blocking=False):  # else whoever is appending checks next time
            try:
                self._look_at_segment()
            finally:
                self._locks.appending.release()

    def _look_at_segment(self) -> None:
        """Retire our active segment if its file was removed: nobody would find what is appended to it."""
        writer, index = self._active.writer, self._index
        if writer is None or not self._active.may_show(writer.segment):
            return
        if not has_name(writer.fd, self._files.segments.path(writer.segment)):
            index.resize_segment(writer.segment, 0)
            index.set_state(writer.segment, f.SEALED)
            index.words[index.entry(writer.segment) + f.T_OWNER] = 0
