"""Large files that no entry refers to, and what large files take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from ...concurrency.cancelling import ensure_wanted
from .. import format as f
from .. import under_way
from ..cache_files import CacheFiles
from ..current import CurrentIndex
from ..locking import Locks
from ..owners import Owner
from ..reaping import Reaper
from ..under_way import UnderWay
from .problem import Problem

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # more than any count can reach


class LargeCheck:
    """Large files that no entry refers to, and what large files take."""

    def __init__(
        self, locks: Locks, files: CacheFiles, owner: Owner, under_way: UnderWay, current: CurrentIndex,
        reaper: Reaper,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._owner, self._under_way = locks, files, owner, under_way
        self._current, self._reaper = current, reaper

    def large(self, fix: bool) -> Iterator[Problem]:
        """Every large file belongs to an entry, and what they take is counted."""
        if fix:
            self._reaper.reap()
        orphans = self._reaper.orphans() if fix else self._reaper.find_orphans()
        # Others may just be removing some whose entries are gone.
        until = time.monotonic() + _PATIENCE
        while orphans and time.monotonic() < until:
            ensure_wanted()
            time.sleep(_PATIENCE / 100)
            orphans = [orphan for orphan in orphans if self._files.backend.exists(orphan.path)]
        for *_, path in orphans:
            fixed = fix
            if fix:
                try:
                    self._files.backend.unlink(path)
                except (IsADirectoryError, PermissionError):
                    fixed = False
            yield Problem("large", os.path.basename(path), "no entry refers to it", fixed)
        with self._locks.index:
            if self._owner.any_dead():  # what the dead had under way counts until they are reaped
                return
            words = self._current.index.words
            counted = words[f.W_LARGE_BYTES], words[f.W_LEAVING]
            found = under_way.count(self._owner, self._current.index)
            if fix and counted != found:
                self._under_way.count_anew()
        for what, number, right in zip(("", " being removed"), counted, found, strict=True):
            if number != right:
                yield Problem("space", f.LARGE_NAME, f"{number} bytes{what} counted, {right} found", fix)
