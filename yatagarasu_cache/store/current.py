"""The index that is in use, and how another one comes in its place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from ..concurrency.file_locks import has_name
from ..concurrency.interruption import ours
from ..errors import CacheError, CacheIOError, ClosedError, FormatError
from . import format as f
from .cache_files import CacheFiles
from .index import Index, IndexDamaged
from .life import Life
from .locking import Locks
from .notices import Notices
from .recovery import Recovery

T = TypeVar("T")
ATTEMPTS = 100


class CurrentIndex:
    """One handle's index: others may replace it, and so may this handle where it is damaged."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, notices: Notices, recovery: Recovery,
        index: Index,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._notices = life, locks, files, notices
        self._recovery = recovery
        self.index, self.seed = index, index.identity.seed
        self._users: list[Callable[[Index], None]] = []
        self._of_another_cache: list[Callable[[], None]] = [files.segments.forget_all]
        files.segments.is_listed = self.is_listed

    def on_use(self, user: Callable[[Index], None]) -> None:
        """Have somebody told of each index that comes into use, and of the one that is."""
        self._users.append(user)
        user(self.index)

    def on_another_cache(self, forget: Callable[[], None]) -> None:
        """Have somebody forget what it knows of the cache, where another one has come in its place."""
        self._of_another_cache.append(forget)

    def use(self, index: Index) -> None:
        """From now on this one."""
        assert index is not self.index, "an index comes into use once"
        previous, self.index = self.index, index
        self.seed = index.identity.seed
        for user in self._users:
            user(index)
        previous.retire()

    def is_listed(self, segment: int) -> bool:
        """Whether the segment table has this one."""
        return bool(self.index.state(segment))

    def look(self, question: Callable[[Index], T]) -> T:
        """`question(index)`, asked without the lock: again where the index was replaced meanwhile."""
        for _ in range(ATTEMPTS):
            try:
                return question(self.index)
            except IndexDamaged as error:
                self.mend(error)
        raise CacheIOError(errno.EIO, "the index is damaged again and again: run check(fix=True)")

    def rebuild(self, reason: str) -> None:
        """Replace a damaged index by one made from the checkpoint and the segments."""
        if self._life.read_only:
            self._life.ensure_writable("rebuild its index")
        damaged = self.index  # also while the handle closes
        with self._locks.index:
            if self.index is damaged:  # nobody else did, or has: then taking the lock followed it
                self._notices.log_once("rebuild", f"the index is damaged ({reason}): rebuilding it")
                self.use(self._files.made(lambda: self._recovery.rebuild(damaged)))

    def mend(self, error: IndexDamaged) -> None:
        if self._life.read_only:
            if not self.index.superseded:
                raise self._refused(error)
            self.follow()
        else:
            self.rebuild(str(error))

    def _refused(self, error: Exception) -> FormatError:
        """What a handle that only reads says of a damaged index."""
        return FormatError(
            f"the index in {self._files.root!r} is damaged ({error}): open the cache once without read_only"
        )

    def follow(self) -> None:
        """Another process has put a rebuilt index in place: use that. The lock is held."""
        index: Index | None = None
        try:
            index = self._recovery.map_index()
            sound = not index.superseded
        except (IndexDamaged, FileNotFoundError) as error:
            if self._life.read_only:
                raise self._refused(error) from error
            sound = False
        if index is None or not sound and not self._life.read_only:
            unsound = index
            index = self._files.made(lambda: self._recovery.rebuild(unsound))
        if index.identity != self.index.identity:  # somebody has put another cache in the place of ours
            for forget in self._of_another_cache:
                forget()
        self.use(index)

    def follow_path(self) -> None:
        """For a handle that only reads: use the index at its path, if that is another one by now.

        The directory may have been filled anew. Or overlayfs has copied the file because somebody writes to
        it: then the mapping never changes again and, on some kernels, neither does the inode.
        """
        with self._locks.appending:  # one thread after another
            try:
                if not self._life.closed and not self._is_at_its_path():
                    self.follow()
                    self._files.segments.forget_all()
            except ClosedError:
                pass
            except ours(OSError, CacheError, IndexDamaged) as error:  # what is mapped goes on to be read
                self._notices.log_once("follow", f"there is another index, and it cannot be used: {error}")
        self._notices.say()

    def _is_at_its_path(self) -> bool:
        """Whether the mapping is that of the file at its path, or there is none there."""
        path = self._files.path(f.INDEX_NAME)
        self._files.look_again()
        try:
            with self._files.backend.reading(path) as fd:
                there, mapped = os.fstat(fd), os.fstat(self.index.fd)
                clock = int.from_bytes(self._files.backend.read(fd, 8, f.W_CLOCK * 8), "little")
        except FileNotFoundError:
            return True
        same = (there.st_dev, there.st_ino) == (mapped.st_dev, mapped.st_ino)
        return same and self.index.words[f.W_CLOCK] >= clock  # asked afterwards: it only grows

    def is_in_place(self) -> bool:
        """False if the index is not at its path any more: it was removed, moved away, or replaced."""
        try:
            return has_name(self.index.fd, self._files.path(f.INDEX_NAME))
        except ours(OSError, ValueError, AttributeError):  # closed, or not opened yet
            return False

    def complete_begun(self) -> None:
        """Complete a change of the index that a death or an interruption cut short. The lock is held."""
        try:
            self._recovery.repair(self.index)
        except IndexDamaged as error:
            self.rebuild(str(error))

    def ensure_completed(self) -> None:
        """Before it is asked what the index shows, after an interruption: others are not waited for else."""
        if self.index.words[f.W_BUSY]:
            with self._locks.index:
                self.complete_begun()

    def is_loose(self, times: float) -> bool:
        """Whether the index takes more than so many times the bytes that it needs."""
        needed = self.index.fitting_bytes(self._recovery.fitting_table(self.index))
        return bool(self.index.words[f.W_INDEX_BYTES] > times * needed)

    def shrink(self) -> None:
        """Put a smaller index in place of one that has grown for many more entries. The lock is held."""
        self.remake(self._recovery.fitting_table(self.index))

    def remake(self, table_capacity: int) -> None:
        try:
            self.use(self._files.made(lambda: self._recovery.remake(self.index, table_capacity)))
        except IndexDamaged as error:
            self.rebuild(str(error))

    def close(self) -> None:
        self.index.close()

    def count(self) -> int:
        return self.index.count()
