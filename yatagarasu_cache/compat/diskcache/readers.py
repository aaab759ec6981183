"""Values as binary files, which have names, since programs pass these on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import weakref
from functools import cached_property

__all__ = ["NamedReader", "named"]


class NamedReader(io.BufferedReader):
    """A value as a binary file."""

    @cached_property
    def name(self) -> str:
        """The path of a file with just these bytes: that of the cache, for a value that has one of its own,
        else a copy, which is there as long as this object."""
        with contextlib.suppress(OSError):  # it has none
            return os.readlink(f"/proc/self/fd/{self.fileno()}")
        at = self.tell()
        self.seek(0)
        fd, path = tempfile.mkstemp(prefix="diskcache-")
        weakref.finalize(self, _remove, path)
        with open(fd, "wb") as copy:
            shutil.copyfileobj(self, copy, 1 << 20)
        self.seek(at)
        return path


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def named(file: io.BufferedReader | io.BytesIO) -> NamedReader:
    """The same file with a name. It has not been read yet."""
    raw = file.detach() if isinstance(file, io.BufferedReader) else file
    return NamedReader(raw, 1 << 16)
