"""Directories that other libraries have made, which errors can name."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from ..concurrency.interruption import ours

__all__ = ["DATABASE", "databases", "is_diskcache"]

DATABASE = "cache.db"
"""The file that diskcache has in each directory."""

_MAGIC = b"SQLite format 3\0"


def is_diskcache(directory: str | os.PathLike[str]) -> bool:
    """Whether diskcache made it: a `Cache`, or the shards of a `FanoutCache`."""
    return bool(databases(directory))


def databases(directory: str | os.PathLike[str]) -> list[Path]:
    """The directories with a database each: the one itself, or its shards."""
    root = Path(directory)
    if _is_database(root / DATABASE):
        return [root]
    with contextlib.suppress(OSError):
        shards = sorted(one for one in root.iterdir() if one.name.isdigit() and len(one.name) == 3)
        return [shard for shard in shards if _is_database(shard / DATABASE)]
    return []


def _is_database(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except ours(OSError):
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.read(fd, len(_MAGIC)) == _MAGIC
    except ours(OSError):
        return False
    finally:
        os.close(fd)
