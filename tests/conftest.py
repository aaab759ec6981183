"""Fixtures of the whole suite. Tests that touch a cache run on every backend there is, long ones in turn."""

from __future__ import annotations

import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS, CORES
from guarded_index import guard
from helpers import in_memory, open_apart
from hypothesis import HealthCheck, settings

from yatagarasu_cache import DiskCache, codec

settings.register_profile(
    "suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("long", parent=settings.get_profile("suite"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.hookimpl(trylast=True)  # of those that -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are marked `in_turn` run each case on one of the backends and cores that it could run on."""
    which = os.environ.get("YATAGARASU_TEST_IN_TURN", "long")  # or "all", or "none"
    cases: dict[str, dict[Any, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if which == "all" or which == "long" and item.get_closest_marker("in_turn"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            case = frozenset((name, id(one)) for name, one in params.items() if name not in ("backend", "core"))
            cases[item.nodeid.partition("[")[0]][case].append(item)
    left_out = {
        item
        for name, of_test in cases.items()
        for number, ways in enumerate(of_test.values(), zlib.crc32(name.encode()))
        for item in ways[: number % len(ways)] + ways[number % len(ways) + 1 :]
    }
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def changes_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes an index holds its lock, and changes the one that is in use."""
    guard(monkeypatch)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend."""
    name: str = request.param
    return name


# The twin in Python is the same on every Python.
_CORE_PARAMETERS = [pytest.param(name, marks=[pytest.mark.once] * (name != CORES[0])) for name in CORES]


@pytest.fixture(params=_CORE_PARAMETERS)
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a core: that of all caches opened here, or in a process that is started from here."""
    name: str = request.param
    monkeypatch.setenv("YATAGARASU_CORE", name)
    if name == "python":
        monkeypatch.setattr(codec, "_pack", codec._pack_in_python)  # chosen when it was imported
    return name


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of one process on one directory share nothing: each stands for a process."""
    open_apart(monkeypatch)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of repairs and recoveries say what they do; that is not asked for here."""
    caplog.set_level(logging.CRITICAL, logger="yatagarasu_cache")


@pytest.fixture
def disks() -> Iterator[Path]:
    """A directory for many small ones, in memory where there is such a place."""
    with in_memory() as path:
        yield path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a cache may be created."""
    return tmp_path / "cache"


@pytest.fixture
def make(
    request: pytest.FixtureRequest, directory: Path, backend: str
) -> Iterator[Callable[..., DiskCache]]:
    """Opens caches on the backend under test (in `directory` unless told), closes them at the end."""
    if "core" in request.fixturenames:
        request.getfixturevalue("core")  # is chosen before anything is opened
    opened: list[DiskCache] = []

    def open_cache(path: Path | str | None = None, **options: Any) -> DiskCache:
        cache = DiskCache(path or directory, **{"backend": backend, **options})
        opened.append(cache)
        return cache

    yield open_cache
    for cache in opened:
        cache.close()


@pytest.fixture
def cache(make: Callable[..., DiskCache]) -> DiskCache:
    """An empty cache with default settings."""
    return make()
