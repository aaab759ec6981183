"""What survives a power cut: what was promised to, and how it is made to."""

from __future__ import annotations

from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import format as f
from .cache_files import CacheFiles
from .current import CurrentIndex
from .index import Index
from .life import Life
from .locking import Locks
from .owners import Owner
from .segment import VANISHED
from .unreadable import is_absence, is_given_up


class Durability:
    """Syncs of segments, of large files and of their names."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, owner: Owner, current: CurrentIndex,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._owner = life, locks, files, owner
        self._current = current
        self._large_synced: set[str] = set()  # paths of large files, those that are likely to be asked for
        self._names = self._names_synced = 0  # segments we began; up to which one the names are durable

    def promise(self) -> None:
        """From now on nothing durable may be lost for something that is not."""
        self._current.index.words[f.W_PROMISED] = 1

    def flush(self) -> None:
        """Make everything durable that was completed before, by whichever process."""
        self._life.ensure_writable("flush")
        try:
            self.promise()
            self.sync_dirty()
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot flush the cache") from error

    def sync_large(self) -> None:
        """Make large values durable that came since this was last done: their names tell when they came."""
        with self._locks.index:
            # What is shown while we sync has a later name, or one of those that are known to be under way.
            covered = min(self._current.index.stamp(), *self._owner.named(), f.MASK64)
            since = self._current.index.words[f.W_FLUSHED]
            since = since if since <= self._current.index.words[f.W_CLOCK] else 0  # damage
        came = {path for (_, _, pointer), _, path in self._files.large.listed() if pointer >= since}
        for path in (new := came - self._large_synced):
            try:
                with self._files.backend.reading(path) as fd:
                    self._files.backend.sync(fd)
            except ours(OSError) as error:
                if error.errno not in VANISHED:  # removed meanwhile
                    raise
        if new:
            self._files.sync_directory(self._files.large.directory)
        self._large_synced = came  # while one is being stored, all that came since are looked at each time
        with self._locks.index:
            lowered = self._current.index.words[f.W_FLUSHED]
            self._current.index.words[f.W_FLUSHED] = covered if lowered >= since else min(covered, lowered)

    def sync_names(self) -> None:
        names = self._names
        if self._names_synced < names:
            self._files.sync_directory(self._files.segments.directory)
            self._names_synced = max(self._names_synced, names)

    def names_changed(self) -> None:
        """A segment was begun: its name is to be made durable before its records are promised to be."""
        self._names += 1

    def sync_dirty(self) -> None:
        """Make all segments and large values durable, with their names.

        After that a removal may destroy what it supersedes.
        """
        index = self._current.index
        try:
            self.sync_large()
            for entry in index.table_entries():
                with self._locks.index:  # else the size may be that of before it was sealed
                    before = index.words[entry : entry + f.ENTRY_WORDS].tolist()
                segment, state = before[f.T_STATE] & f.MASK32, before[f.T_STATE] & ~f.MASK32
                if state in (0, f.DOOMED) or state == f.SEALED and before[f.T_SYNCED] >= before[f.T_SIZE]:
                    continue
                try:
                    fd = self._files.segments.get(segment)
                except ours(OSError) as error:
                    if not is_absence(error) and not is_given_up(error):
                        raise
                    continue  # it was removed, or is no file of ours: there is nothing to be synced
                self._files.backend.sync(fd)
                if state == f.SEALED and not before[f.T_OWNER]:  # else it is being sealed
                    with self._locks.index:
                        self._note_synced(index, entry, before)
            self._files.sync_directory(self._files.segments.directory)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot make the cache durable") from error

    @staticmethod
    def _note_synced(index: Index, entry: int, before: list[int]) -> None:
        """Note that a sealed segment is durable, unless somebody has appended to it since `before`."""
        words = index.words
        if all(words[entry + field] == before[field] for field in (f.T_STATE, f.T_SIZE, f.T_OWNER, f.T_TAIL)):
            words[entry + f.T_SYNCED] = before[f.T_SIZE]
