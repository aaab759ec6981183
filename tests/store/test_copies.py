"""Copies of a cache: one that was made while it was in use is told by its index, and put in order."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import Make, noise, run_python

from yatagarasu_cache import DiskCache, ReadOnlyError
from yatagarasu_cache.store import format as f

pytestmark = pytest.mark.usefixtures("apart", "core")  # each handle stands for a process
LINE = "the index is a copy, made while it was in use"


def rebuilt(caplog: pytest.LogCaptureFixture) -> bool:
    found = any(LINE in record.getMessage() for record in caplog.records)
    caplog.clear()
    return found


def test_a_copy_of_one_in_use_is_rebuilt_once(
    make: Make, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    cache = make()
    for n in range(100):
        cache.set(n, noise(1000, n))
    subprocess.run(["cp", "-a", directory, tmp_path / "copy"], check=True)
    with pytest.raises(ReadOnlyError, match="a copy, made while it was in use and has to be rebuilt"):
        DiskCache(tmp_path / "copy", read_only=True)
    copy = make(tmp_path / "copy")
    assert rebuilt(caplog)
    assert all(copy[n] == noise(1000, n) for n in range(100)) and copy.check() == []
    other = make(tmp_path / "copy")  # while that is in use
    other.set("both", 1)
    assert copy["both"] == 1 and "both" not in cache
    copy.close()
    other.close()
    make(tmp_path / "copy")
    assert not rebuilt(caplog)
    make()
    assert not rebuilt(caplog) and cache.check() == []


def test_a_slow_copy_keeps_what_a_rebuild_keeps(make: Make, directory: Path, tmp_path: Path) -> None:
    """The index as it was long before the segments were copied."""
    cache = make(size_limit=4 << 20)
    cache.set("first", b"old")
    target = tmp_path / "copy"
    shutil.copytree(directory, target)
    for n in range(500):
        cache.set(n, noise(1000, n))
    cache.set("first", b"new")
    cache.delete(3)
    for name in ("segments", "large"):
        shutil.rmtree(target / name)
        shutil.copytree(directory / name, target / name)
    copy = make(target)
    assert all(copy.get(n) == noise(1000, n) for n in range(500) if n != 3)
    assert copy["first"] == b"new" and 3 not in copy and copy.check() == []


def test_moved_and_closed_ones_are_as_they_were(
    make: Make, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    code = (
        "import os, sys; from yatagarasu_cache import DiskCache\n"
        "c = DiskCache(sys.argv[1]); c.set('k', b'v'); os._exit(0)"
    )
    run_python(code, directory)  # killed: not clean
    directory.rename(tmp_path / "moved")
    with make(tmp_path / "moved") as cache:
        assert cache["k"] == b"v" and not rebuilt(caplog)
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")  # closed in order
    with make(tmp_path / "copy") as cache:
        assert cache["k"] == b"v" and not rebuilt(caplog)
    run_python(code, tmp_path / "copy")
    with make(tmp_path / "copy") as cache:
        assert cache["k"] == b"v" and not rebuilt(caplog)


def test_an_index_that_is_made_anew_says_which_file_it_is(make: Make, directory: Path) -> None:
    cache = make()
    cache.set("k", 1)
    for renew in (lambda: cache._store.current.rebuild("for a test"), cache._store.current.shrink, lambda: None):
        with cache._store.locks.index:
            renew()
        index = cache._store.current.index
        status = os.stat(directory / "index")
        assert (index.words[f.W_FILE], index.words[f.W_FILE + 1]) == (status.st_dev, status.st_ino)
        assert not index.is_copied()
