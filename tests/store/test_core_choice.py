"""Which core a cache has, and what is said where the compiled one is missing."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from pathlib import Path

import pytest
from helpers import ROOT, WrappedBackend, wrap_backends

from yatagarasu_cache import BackendUnavailable, ConfigurationError, DiskCache
from yatagarasu_cache.store import compiled

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

try:
    importlib.import_module("yatagarasu_cache._core")
except ImportError:
    if os.environ.get("YATAGARASU_COMPILED_CORE") == "require":
        raise
    pytest.skip("the compiled core was not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever core the rest of the suite runs on, here each test says."""
    monkeypatch.delenv("YATAGARASU_CORE", raising=False)


def test_the_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for core, reason in (("c", "asked for by name"), ("python", "YATAGARASU_CORE=python")):
        monkeypatch.setenv("YATAGARASU_CORE", core)
        with DiskCache(tmp_path / "cache", backend="threads") as cache:
            assert (cache.stats().core, cache.stats().core_reason) == (core, reason)
    monkeypatch.setenv("YATAGARASU_CORE", "auto")
    with DiskCache(tmp_path / "cache") as cache:
        assert (cache.stats().core, cache.stats().core_reason) == ("c", "available")
    monkeypatch.setenv("YATAGARASU_CORE", "rust")
    with pytest.raises(ConfigurationError, match="YATAGARASU_CORE='rust' must be auto, c or python"):
        DiskCache(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "yatagarasu_cache._core", None)
    monkeypatch.setenv("YATAGARASU_CORE", "c")
    with pytest.raises(BackendUnavailable, match="YATAGARASU_CORE=c, but the compiled core is not there"):
        DiskCache(tmp_path / "cache")
    monkeypatch.setenv("YATAGARASU_CORE", "auto")
    with DiskCache(tmp_path / "cache") as cache:
        assert cache.stats().core == "python"


MISSING = "xxHash's headers are missing"


@pytest.mark.parametrize(
    ("there", "wanted", "built", "lines"),
    [
        (False, "auto", MISSING, 1),
        (False, "auto", None, 1),  # no record of the build
        (False, "auto", compiled.BUILT_WITHOUT, 0),  # switched off on purpose
        (False, "python", MISSING, 0),
        (True, "auto", MISSING, 0),
    ],
)
def test_a_core_that_is_missing_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    there: bool,
    wanted: str,
    built: str | None,
    lines: int,
) -> None:
    """Once a process, where nobody switched it off; `stats` says it always."""
    record = types.ModuleType("_build_info")
    vars(record).update({} if built is None else {"CORE_REASON": built})
    monkeypatch.setitem(sys.modules, "yatagarasu_cache._build_info", record)
    if not there:
        monkeypatch.setitem(sys.modules, "yatagarasu_cache._core", None)
    monkeypatch.setattr(compiled, "_logged", set())
    monkeypatch.setenv("YATAGARASU_CORE", wanted)
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        for name in ("one", "two"):
            with DiskCache(tmp_path / name, backend="threads") as cache:
                stats = cache.stats()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("core")]
    assert stats.core == ("c" if there else "python")
    assert said == [f"core python: {stats.core_reason}"][:lines]
    assert stats.as_dict()["core_reason"] == stats.core_reason
    if lines:
        assert f"build: {built or 'no record of the build'}" in stats.core_reason
        assert "YATAGARASU_COMPILED_CORE=require" in stats.core_reason
    elif not there:
        assert stats.core_reason == ("YATAGARASU_CORE=python" if wanted == "python" else built)


def test_a_wrapped_backend_sees_every_read_and_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrap_backends(monkeypatch, WrappedBackend)
    with DiskCache(tmp_path / "cache", backend="threads") as cache:
        cache.set("k", b"v")
        assert cache.get("k") == b"v"
        assert cache.stats().core == "python"


def test_built_with_newer_headers_it_runs_on_older_interpreters() -> None:
    """Formats with '#' call other functions, and singletons lose a reference, with newer headers."""
    source = (ROOT / "csrc" / "coremodule.c").read_text(encoding="utf-8")
    code = source[source.index("*/") :]
    assert "PY_SSIZE_T_CLEAN" not in code and "Py_RETURN" not in code
    assert not [line for line in code.splitlines() if '"' in line and "#" in line and "#include" not in line]
