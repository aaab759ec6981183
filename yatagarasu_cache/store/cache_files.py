"""The files of an open cache, by what they are for; all is done by name, and made again where it vanished."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import TypeVar

from ..backends.base import Backend, Entry
from ..config import Settings
from . import format as f
from .core import PythonCore
from .directory import is_whole, look_again, made, prepare
from .large import LargeFiles
from .notices import Notices
from .owners import Owner
from .segment import SegmentFiles

T = TypeVar("T")


class CacheFiles:
    """Segments, large files, and what is made, listed or made durable by its name."""

    def __init__(self, backend: Backend, settings: Settings, core: PythonCore, notices: Notices) -> None:
        self.backend, self.root, self.mode = backend, settings.directory, settings.file_mode
        self._settings, self._notices = settings, notices
        segments = os.path.join(self.root, f.SEGMENTS_NAME)
        self.segments = SegmentFiles(backend, segments, settings.max_open_files)
        self.large = LargeFiles(backend, self.root, self.mode, core, self.made, self.files_in)

    def path(self, name: str) -> str:
        """Of a file of the cache's own directory."""
        return os.path.join(self.root, name)

    def prepare(self) -> None:
        """Have the directory in place, and what is to be inside."""
        prepare(self.backend, self._settings)

    def prepare_if_incomplete(self) -> None:
        if not is_whole(self.backend, self.root):
            self.prepare()

    def look_again(self) -> None:
        """Go by the directory that is at the cache's path now, whatever was open before."""
        look_again(self.backend, self._settings)

    def made(self, make: Callable[[], T]) -> T:
        """`make()`, which goes by names; again where somebody has removed a directory that it needs."""
        return made(self.backend, self._settings, make)

    def scandir(self, path: str) -> list[Entry]:
        """What is in one of our directories."""
        return self.made(partial(self.backend.scandir, path))

    def files_in(self, path: str) -> list[Entry]:
        """The same without directories: none is ours, whatever its name is."""
        found = []
        for name, status in self.scandir(path):
            if stat.S_ISDIR(status.st_mode):
                line = f"{os.path.join(path, name)} is a directory, and none of the cache's: it is left alone"
                self._notices.log_once(line, line)
            else:
                found.append((name, status))
        return found

    def sync_directory(self, path: str) -> None:
        """Make the names in one of our directories durable."""
        self.made(partial(self.backend.sync_directory, path))

    def new_file(self, path: str) -> int:
        """A descriptor of a file that is made; FileExistsError if there is one."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self.made(lambda: self.backend.open(path, flags, self.mode))

    def close(self) -> None:
        self.segments.close()


class Temporaries:
    """Names of files that are renamed when they are complete."""

    def __init__(self, root: str, owner: Owner) -> None:
        self.directory, self._owner = os.path.join(root, f.TEMPORARY_NAME), owner
        self._numbers = count(1)

    def path(self, *, value: bool = False) -> str:
        """A new one, cleared away should this handle die; `value`: of a large value, which counts."""
        return self._path(self._owner.acquire(), next(self._numbers), value)

    def passing_path(self) -> str:
        """The same of one that is in its place before the lock is given up: it needs no mark of life."""
        return self._path(secrets.randbits(63), 0, False)

    def _path(self, owner: int, number: int, value: bool) -> str:
        return os.path.join(self.directory, f.temporary_name(owner, number, value=value))
