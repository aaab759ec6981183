"""`DiskCache.check`: reads everything, says what is wrong, and mends it if asked."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import format as f
from . import unreadable
from .cache_files import CacheFiles
from .checkpointing import Checkpoints
from .checks.entries import EntryCheck, Progress
from .checks.files import FileCheck
from .checks.index import IndexCheck
from .checks.large import LargeCheck
from .checks.problem import Problem, Unreadable, fault_of
from .checks.segments import SegmentCheck
from .current import CurrentIndex
from .index import IndexDamaged
from .locking import Locks
from .unreadable import Losses

__all__ = ["Checker", "Problem"]

_Step = Callable[[bool], Iterator[Problem]]


class Checker:
    """Has every subject looked at, in an order in which each can rely on those before it."""

    def __init__(
        self, locks: Locks, files: CacheFiles, current: CurrentIndex, losses: Losses,
        checkpoints: Checkpoints, index: IndexCheck, segments: SegmentCheck, entries: EntryCheck,
        large: LargeCheck, own: FileCheck,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._current, self._losses = locks, files, current, losses
        self._checkpoints, self._index, self._entries = checkpoints, index, entries
        self._steps: tuple[tuple[str, _Step], ...] = (
            ("index", self._given_up), ("tag", own.tag), ("index", index.words),
            ("segment", segments.segments), ("entry", entries.entries), ("count", index.counts),
            ("space", index.space), ("large", large.large), ("stray", segments.strays),
            ("checkpoint", own.checkpoint), ("settings", own.settings),
        )  # fmt: skip

    def check(
        self, fix: bool, drop_unreadable: bool = False, progress: Progress | None = None
    ) -> list[Problem]:
        """Every problem found. With `fix`, what can be mended is mended; entries that are lost are dropped.

        What the disk cannot read is reported, and given up only with `drop_unreadable`. `progress` hears how
        many entries were read, and of how many: that is what takes time.
        """
        try:
            with unreadable.giving_up(drop_unreadable):
                return self._problems(fix, progress)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot check the cache", unreadable.remedy(error)) from error

    def _problems(self, fix: bool, progress: Progress | None) -> list[Problem]:
        problems: list[Problem] = []
        try:
            self._ensure_sound(fix)
        except IndexDamaged as error:
            problems.append(Problem("index", f.INDEX_NAME, str(error), fix))
            if not fix:
                return [*problems, *self._given_up(fix)]
            self._current.rebuild(str(error))
        for kind, step in self._steps:
            if kind == "entry" and progress is not None:
                step = functools.partial(self._entries.entries, progress=progress)
            self._take(kind, step, fix, problems)
        if any(problem.fixed and isinstance(problem.detail, Unreadable) for problem in problems):
            # An index that is made anew does not look into what it lists as complete.
            self._take("checkpoint", self._write_checkpoint, fix, problems)
        return problems

    def _ensure_sound(self, fix: bool) -> None:
        """Raise `IndexDamaged` if the index has to be made anew."""
        with self._locks.index:  # a change half made would look like damage
            self._current.index.validate()
            self._current.index.ensure_reachable()
            self._current.index.ensure_tags()
            self._index.ensure_listed()
            if fix:
                self._index.ensure_counted()
                self._index.ensure_all_listed()

    def _take(self, kind: str, step: _Step, fix: bool, problems: list[Problem]) -> None:
        """What a step finds; that it comes to no end, where a disk does not do what it should."""
        try:
            problems.extend(step(fix))
        except ours(OSError) as error:
            if isinstance(error, CacheIOError) or error.filename is None:
                raise
            where = os.path.relpath(os.fsdecode(error.filename), self._files.root)
            problems.append(Problem(kind, where, fault_of(error)))

    def _given_up(self, fix: bool) -> Iterator[Problem]:
        """What an index that was made anew had to do without: nothing is looked for there any more."""
        noted = self._losses.noted
        if fix and noted and unreadable.is_giving_up():
            failed = list(self._write_checkpoint(fix))
            yield from failed
            for (kind, name), detail in noted.items():
                yield Problem(kind, name, detail, not failed)
            if not failed:
                noted.clear()

    def _write_checkpoint(self, _: bool) -> Iterator[Problem]:
        try:
            self._checkpoints.write()
        except ours(OSError) as error:
            yield Problem("checkpoint", f.CHECKPOINT_NAME, f"cannot be written: {error.strerror or error}")
