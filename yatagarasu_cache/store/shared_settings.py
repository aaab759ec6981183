"""Settings that all handles of a cache share: followed when somebody changes them, changed for all."""

from __future__ import annotations

from contextvars import ContextVar

from ..config import Settings
from ..log import log as _log
from . import format as f
from .cache_settings import CacheSettings
from .current import CurrentIndex
from .life import Life
from .limits import Limits
from .locking import Locks
from .settings_file import SettingsFile

is_meant: ContextVar[bool] = ContextVar("is_meant", default=False)
"""Whether who names settings knows that they change for all: then that is no warning."""


class SharedSettings:
    """What the index says of them, and what a caller who named some makes of that."""

    def __init__(
        self, root: str, life: Life, locks: Locks, limits: Limits, current: CurrentIndex, file: SettingsFile
    ) -> None:
        self._root, self._life, self._locks = root, life, locks
        self._limits, self._current, self._file = limits, current, file
        self._seen = -1  # the checksum of those in force, as the index has it

    def follow(self) -> None:
        """Take over what the index says, if somebody has changed that. Cheap if nobody has."""
        index = self._current.index
        checksum = index.words[f.W_SETTINGS_SUM]
        if checksum != self._seen:
            settings = index.settings
            if settings is not None:  # else somebody is changing them, or they are damaged
                self._seen = checksum
                self._limits.take_over(settings)

    def join(self, settings: Settings) -> None:
        """A handle with such settings gets a share in a store that is open."""
        if settings.named.isdisjoint(CacheSettings._fields) or self._life.read_only:
            return
        self.follow()
        if self._wanted(settings) != self._limits.in_force:
            with self._locks.index:
                self.settle(settings)

    def _wanted(self, settings: Settings) -> CacheSettings:
        """Those in force, but for what the caller named."""
        there = self._limits.in_force
        return there._replace(
            **{name: getattr(settings, name) for name in there._fields if name in settings.named}
        )

    def settle(self, settings: Settings) -> None:
        """From now on what the caller named holds for everybody. The lock is held."""
        there, wanted = self._limits.in_force, self._wanted(settings)
        if wanted != there:
            changes = ", ".join(
                f"{name} from {was} to {new}"
                for name, was, new in zip(there._fields, there, wanted, strict=True)
                if was != new
            )
            self._current.index.change_settings(wanted)
            self.follow()
            line = "%s: the settings of the cache change for all who use it: %s"
            if is_meant.get():
                _log.info(line, self._root, changes)
            else:
                _log.warning(line, self._root, changes)
        self._file.keep()
