"""The backends and cores that can run here, and which backend a case of many gets."""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

import pytest

from yatagarasu_cache import BackendUnavailable
from yatagarasu_cache.backends import choose
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.store import compiled


def _available() -> list[str]:
    """Backends that can run here. With YATAGARASU_IO_URING=require a missing ring is a failure."""
    names = ["threads"]
    try:
        choose(make_settings("/unused", backend="uring")).backend.close()
        names.append("uring")
    except BackendUnavailable:
        if os.environ.get("YATAGARASU_IO_URING") == "require":
            raise
    return names


BACKENDS = _available()
CORES = ["c", "python"] if compiled.load() is not None else ["python"]  # as YATAGARASU_CORE has them
# For tests that take too long to run on each core.
on_one_core = pytest.mark.parametrize("core", CORES[:1], indirect=True)


def needs_nowait(directory: Path) -> None:
    """Skip where the system cannot say whether bytes are in memory: on tmpfs, for one."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"x")
        file.flush()
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (AttributeError, OSError) as error:
            pytest.skip(f"no reads that don't wait here: {error}")


def backend_for(case: object, share: int = 1) -> str:
    """A backend for one of many cases, always the same for the same case.

    share: but one case in so many gets another than the portable one, which opens faster.
    """
    number = zlib.crc32(str(case).encode())
    return BACKENDS[number // share % len(BACKENDS)] if number % share == 0 else "threads"
