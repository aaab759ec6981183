"""The file of a cache's settings, kept in step with the index."""

from __future__ import annotations

import os

from ..concurrency.interruption import ours
from . import format as f
from .cache_files import CacheFiles, Temporaries
from .cache_settings import CacheSettings, pack, read
from .index import Index
from .limits import Limits
from .notices import Notices
from .unreadable import Losses, is_given_up


class SettingsFile:
    """Written where it does not say what is in force. The lock is held for changes."""

    def __init__(
        self, files: CacheFiles, temporaries: Temporaries, limits: Limits, losses: Losses, notices: Notices
    ) -> None:
        self._files, self._temporaries, self._limits = files, temporaries, limits
        self._losses, self._notices = losses, notices

    def write(self, settings: CacheSettings) -> None:
        """Put the file in place, durably."""
        files, temporary = self._files, self._temporaries.passing_path()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            with files.made(lambda: files.backend.opened(temporary, flags, files.mode)) as fd:
                files.backend.write(fd, [pack(settings)], 0)
                files.backend.sync(fd)
            files.backend.replace(temporary, files.path(f.SETTINGS_NAME))
            files.sync_directory(files.root)
        finally:
            files.backend.clear_away(temporary)

    def keep(self) -> None:
        """Have the settings in force in the file."""
        try:
            if read(self._files.backend, self._files.root) != self._limits.in_force:
                self.write(self._limits.in_force)
        except ours(OSError) as error:  # they are in the index; what asked for it may be what makes room
            line = f"cannot store the settings, a lost index would take them along: {error}"
            self._notices.log_once("settings", line)

    def for_new_index(self, old: Index | None) -> CacheSettings:
        """What an index that is made anew says: what the file does, else the index before."""
        try:
            kept = read(self._files.backend, self._files.root)
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._losses.note("settings", f.SETTINGS_NAME, error)
            kept = None
        return kept or (old.settings if old is not None else None) or self._limits.in_force
