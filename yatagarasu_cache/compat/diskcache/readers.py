"""Values as binary files, which have names, since programs pass these on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import weakref
from functools import cached_property
from typing import Any

__all__ = ["NamedReader", "named"]


class NamedReader(io.BufferedReader):
    """A value as a binary file."""

    @property
    def mode(self) -> str:
        """As a file that was opened has it."""
        return "rb"

    def fileno(self) -> int:
        """A descriptor of a file with just these bytes, at the position of this one: for a value that has no
        file of its own of a copy, which has no name and is there as long as this object."""
        try:
            return super().fileno()
        except io.UnsupportedOperation:
            return int(self._copy.fileno())

    @cached_property
    def _copy(self) -> Any:
        copy = tempfile.TemporaryFile(prefix="diskcache-", buffering=0)  # noqa: SIM115 - see `close`
        self._copy_to(copy)
        copy.seek(self.tell())
        weakref.finalize(self, copy.close)
        return copy

    def _copy_to(self, file: Any) -> None:
        at = self.tell()
        self.seek(0)
        shutil.copyfileobj(self, file, 1 << 20)
        self.seek(at)

    def close(self) -> None:
        """Close it, and the copy of it, if there is one."""
        super().close()
        if (copy := vars(self).get("_copy")) is not None:
            copy.close()

    @cached_property
    def name(self) -> str:
        """The path of a file with just these bytes: that of the cache, for a value that has one of its own,
        else a copy, which is there as long as this object."""
        with contextlib.suppress(OSError):  # it has none
            return os.readlink(f"/proc/self/fd/{super().fileno()}")
        fd, path = tempfile.mkstemp(prefix="diskcache-")
        weakref.finalize(self, _remove, path)
        with open(fd, "wb") as copy:
            self._copy_to(copy)
        return path


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def named(file: io.BufferedReader | io.BytesIO) -> NamedReader:
    """The same file with a name. It has not been read yet."""
    raw = file.detach() if isinstance(file, io.BufferedReader) else file
    return NamedReader(raw, 1 << 16)
