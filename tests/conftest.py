"""Fixtures of the whole suite. Tests that touch a cache run once on every backend there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS
from guarded_index import guard
from helpers import open_apart
from hypothesis import HealthCheck, settings

from yatagarasu_cache import DiskCache

settings.register_profile(
    "suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("long", parent=settings.get_profile("suite"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def changes_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes an index holds its lock, and changes the one that is in use."""
    guard(monkeypatch)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend."""
    name: str = request.param
    return name


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of one process on one directory share nothing: each stands for a process."""
    open_apart(monkeypatch)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a cache may be created."""
    return tmp_path / "cache"


@pytest.fixture
def make(directory: Path, backend: str) -> Iterator[Callable[..., DiskCache]]:
    """Opens caches on the backend under test (in `directory` unless told), closes them at the end."""
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
