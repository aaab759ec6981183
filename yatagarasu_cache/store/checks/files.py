"""The directory's tag, the checkpoint, and the file of settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...concurrency.interruption import ours
from ...config import Settings
from .. import cache_settings, checkpoint
from .. import format as f
from ..cache_files import CacheFiles
from ..checkpointing import Checkpoints
from ..current import CurrentIndex
from ..directory import has_tag, keep_tag
from ..limits import Limits
from ..locking import Locks
from ..settings_file import SettingsFile
from ..shared_settings import SharedSettings
from .problem import Problem, Unreadable, fault_of, mends

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # more than any count can reach


class FileCheck:
    """The directory's tag, the checkpoint, and the file of settings."""

    def __init__(
        self, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex,
        shared_settings: SharedSettings, settings_file: SettingsFile, checkpoints: Checkpoints,
        settings: Settings,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._limits, self._current = locks, files, limits, current
        self._shared_settings, self._settings_file = shared_settings, settings_file
        self._checkpoints = checkpoints
        self._handle_settings = settings

    def tag(self, fix: bool) -> Iterator[Problem]:
        """The directory has the tag of a cache, so that backup tools leave it out."""
        detail = self._tag_problem()
        if detail:
            if fixed := mends(fix, detail):
                if isinstance(detail, Unreadable):
                    self._files.backend.unlink(os.path.join(self._files.root, f.TAG_NAME))
                keep_tag(self._files.backend, self._handle_settings)
                fixed = not self._tag_problem()
            yield Problem("tag", f.TAG_NAME, detail, fixed)

    def _tag_problem(self) -> str:
        try:
            return "" if has_tag(self._files.backend, self._files.root) else "it is missing or damaged"
        except ours(OSError) as error:
            return fault_of(error)

    def checkpoint(self, fix: bool) -> Iterator[Problem]:
        """The checkpoint, if there is one, can be read."""
        with self._locks.index:
            detail = self._checkpoint_problem()
            counted = self._current.index.words[f.W_CHECKPOINT_BYTES]
            if fix:
                checkpoint.account(self._files, self._current.index)
            # A process may die after putting one in place and before counting it: that is no damage.
            most = max(checkpoint.file_size(self._files), checkpoint.most_bytes(self._current.index))
        if detail:
            if fix := mends(fix, detail):
                try:
                    self._checkpoints.write()
                except ours(OSError):
                    fix = False
            yield Problem("checkpoint", f.CHECKPOINT_NAME, detail, fix)
        elif counted > most:
            yield Problem("space", f.CHECKPOINT_NAME, f"{counted} bytes counted, {most} at most", fix)

    def _checkpoint_problem(self) -> str:
        try:
            if not self._files.backend.exists(os.path.join(self._files.root, f.CHECKPOINT_NAME)):
                return ""
            return "" if checkpoint.read(self._files.backend, self._files.root) else "it is damaged"
        except ours(OSError) as error:
            return fault_of(error)

    def settings(self, fix: bool) -> Iterator[Problem]:
        """The file of the cache's settings says what the index does."""
        with self._locks.index:
            self._shared_settings.follow()
            detail = self._settings_problem()
            if not detail:
                return
            if fix := mends(fix, detail):
                if isinstance(detail, Unreadable):
                    self._settings_file.write(self._limits.in_force)
                else:
                    self._settings_file.keep()
                fix = not self._settings_problem()
        yield Problem("settings", f.SETTINGS_NAME, detail, fix)

    def _settings_problem(self) -> str:
        try:
            same = cache_settings.read(self._files.backend, self._files.root) == self._limits.in_force
        except ours(OSError) as error:
            return fault_of(error)
        return "" if same else "it is missing or damaged"
