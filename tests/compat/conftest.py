"""Caches of the compatible module, with a user's data directory of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import yatagarasu_cache.compat.diskcache as dc

Make = Callable[..., dc.Cache]


@pytest.fixture(autouse=True)
def users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key is made with which pickles are signed."""
    path = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(path))
    monkeypatch.delenv("YATAGARASU_CACHE_SECRET_FILE", raising=False)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(place: Path) -> Iterator[Make]:
    made: list[Any] = []

    def open_(kind: Any = dc.Cache, directory: Any = place, **settings: Any) -> Any:
        made.append(kind(directory, **settings))
        return made[-1]

    yield open_
    for one in made:
        one.close()


@pytest.fixture
def cache(make: Make) -> dc.Cache:
    return make()
