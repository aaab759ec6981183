"""What a handle counts, for itself and for the whole cache."""

from __future__ import annotations

import time

from ..concurrency.file_locks import FileLock, NoLock
from ..concurrency.interruption import suppressing
from ..concurrency.locks import new_lock
from . import format as f
from .cache_files import CacheFiles
from .core import PythonCore
from .current import CurrentIndex
from .life import Life
from .locking import Locks

_TRIES_IN_VAIN = 4  # to fold: with USES_MORE after each, 256 uses are waiting then
_PATIENCE, _PATIENT_EVERY = 0.03, 1.0  # seconds
_PATIENT_STEP = 0.0003
_W_HITS, _W_MISSES = f.W_COUNTERS + f.COUNTERS.index("hits"), f.W_COUNTERS + f.COUNTERS.index("misses")
_READER_LOOKS = 0.25  # seconds, of a handle that only reads


class Counters:
    """Uses are counted without a lock, and folded into the totals now and then."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, current: CurrentIndex, core: PythonCore,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._current = life, locks, files, current
        self._core = core
        self._in_vain, self._patient_again = 0, 0.0  # tries to fold these, and when to wait for that
        self._look_again = 0.0
        self._swept = 0  # the number of the segment to come when the open files were last looked through
        self._noting = new_lock()
        self._begin()

    def _begin(self) -> None:
        self.hits = self.misses = self.corrupt = 0
        self.sets = self.deletes = self.evictions = self.expirations = 0
        self.unreadable = 0

    def after_fork(self) -> None:
        """What was counted is the parent's."""
        self._core.counted()
        self._noting = new_lock()
        self._begin()

    def count(self, counter: str, number: int) -> None:
        """Count for this handle and for the whole cache. The lock is held."""
        setattr(self, counter, getattr(self, counter) + number)
        self._current.index.add(f.W_COUNTERS + f.COUNTERS.index(counter), number)

    def note_unreadable(self) -> None:
        """Count a value that the serializer of its handle could not read: for this process alone."""
        with self._noting:
            self.unreadable += 1

    def use(self, hit: bool) -> None:
        """Count a get: the one way in which this is done outside of the core."""
        self._core.use(hit, not hit, time.time_ns())

    def fold(self) -> None:
        """Add hits and misses, which are counted without a lock, to this handle's and the cache's totals."""
        if self._life.read_only:
            self._fold_reading()
            self._current.follow_path()
            return
        with self._locks.index:
            self._fold()

    def try_to_fold(self) -> None:
        """The same, if nobody is in the way. Whoever gets a value hears nothing of what goes wrong here:
        uses stay counted, and the next one who folds them has them."""
        lock = self._locks.index
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
            self._current.follow_path()

    def _fold_reading(self) -> None:
        with self._locks.appending:
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
        unused = self._current.index.words[f.W_NEXT_SEGMENT]
        if unused != self._swept:  # segments come, so others go
            self._swept = unused
            self._files.segments.look()
        hits, misses = self._core.counted()
        self.hits += hits
        self.misses += misses
        if not self._life.read_only:
            self._current.index.add(_W_HITS, hits)
            self._current.index.add(_W_MISSES, misses)
