"""Fixtures of the tests of `AsyncDiskCache`. Each test runs its own event loop."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import wrap_backends
from watched import Open, Watched

from yatagarasu_cache import AsyncDiskCache


@pytest.fixture(autouse=True)
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs exceptions that nobody looked at, and failures of callbacks: none may come."""
    yield
    gc.collect()
    found = [record for record in caplog.records if record.name in ("asyncio", "concurrent.futures")]
    assert [record.getMessage() for record in found if record.levelno >= logging.ERROR] == []


@pytest.fixture
def open_cache(directory: Path, backend: str) -> Open:
    """Makes caches in `directory`, on the backend under test; whoever asks for one closes it."""
    return lambda **options: AsyncDiskCache(directory, **{"backend": backend, **options})


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watched]]:
    """The backends of all caches that the test opens, under observation."""
    made: list[Any] = wrap_backends(monkeypatch, Watched)
    yield made
    for one in made:
        one.go_on()
        assert not [call for call, _ in one.calls if call.endswith("was not let go")]
