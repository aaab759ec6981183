"""What editors see of the constructors: every setting by its name, with its default; and what they do with it."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from yatagarasu_cache import AsyncDiskCache, ConfigurationError, DiskCache, RingSettings, Settings, repair
from yatagarasu_cache.config import make_settings

pytestmark = pytest.mark.once

OPENING: list[Any] = [DiskCache, AsyncDiskCache, DiskCache.__init__, AsyncDiskCache.__init__, repair]
NAMES = [field.name for field in fields(Settings) if field.name != "directory"]


def options_of(what: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(what).parameters.items()
        if name not in ("self", "directory")
    }


@pytest.mark.parametrize("what", OPENING)
def test_every_setting_is_a_parameter(what: Any) -> None:
    """In the order of `Settings`: whoever adds one there adds it to the constructors."""
    options = options_of(what)
    assert list(options) == NAMES
    for name, parameter in options.items():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation != parameter.empty, name
    assert "directory" in inspect.signature(what).parameters


@pytest.mark.parametrize("what", OPENING)
def test_defaults_are_those_in_force(what: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YATAGARASU_BACKEND", raising=False)
    default = make_settings(directory)
    for name, parameter in options_of(what).items():
        if name != "io_uring":
            assert parameter.default == getattr(default, name), name
        assert make_settings(directory, **{name: parameter.default}) == default, name


def test_the_same_in_both_classes() -> None:
    def texts(what: Any) -> list[str]:
        return [str(parameter) for parameter in options_of(what).values()]

    assert texts(DiskCache) == texts(AsyncDiskCache) == texts(repair)


@pytest.mark.parametrize("kind", [DiskCache, AsyncDiskCache])
def test_what_was_named_is_told_from_defaults(kind: Any, directory: Path) -> None:
    """Naming the default is naming: it changes the size of a cache that has another one."""
    with DiskCache(directory, size_limit=1 << 22, eviction="fifo"):
        pass
    shown = options_of(DiskCache)
    assert kind(directory)._settings.named == {"directory"}
    named = kind(directory, size_limit=shown["size_limit"].default, eviction="lru", read_only=False)
    assert named._settings.named == {"directory", "size_limit", "eviction", "read_only"}
    if kind is DiskCache:
        assert (named.settings.size_limit, named.settings.eviction) == (10 * 2**30, "lru")
        with DiskCache(directory) as cache:
            assert cache.settings.size_limit == 10 * 2**30
        named.close()


@pytest.mark.parametrize("what", [DiskCache, AsyncDiskCache, repair])
def test_misspelt_options_have_a_remedy(what: Any, directory: Path) -> None:
    for wrong, meant in (("evictoin", "eviction"), ("max_size", "size_limit"), ("ttl", "default_expire")):
        with pytest.raises(ConfigurationError, match=rf"{wrong} is not a known setting; did you mean {meant}\?"):
            what(directory, **{wrong: 1})
    with pytest.raises(ConfigurationError, match="known: allow_network_fs"):
        what(directory, zzz=1)
    assert not directory.exists()


@pytest.mark.parametrize("kind", [DiskCache, AsyncDiskCache])
def test_arguments_that_do_not_fit(kind: Any, directory: Path) -> None:
    with pytest.raises(TypeError, match="directory"):
        kind()
    with pytest.raises(TypeError, match="positional"):
        kind(directory, 1 << 20)
    with pytest.raises(ConfigurationError, match="size_limit is None"):
        kind(directory, size_limit=None)
    kind(directory=directory, io_uring=RingSettings(queue_depth=8))


class Mine(DiskCache):
    """A subclass as people write them."""

    def __init__(self, directory: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(directory, **{"eviction": "lfu", **options})


def test_subclasses_and_pickles(directory: Path) -> None:
    with Mine(directory, size_limit=1 << 22) as cache:
        assert (cache.settings.size_limit, cache.settings.eviction) == (1 << 22, "lfu")
        with pickle.loads(pickle.dumps(cache)) as copy:
            assert type(copy) is Mine and copy.settings == cache.settings
    with Mine.from_config({"disk": {"cache_dir": str(directory)}}) as cache:
        assert type(cache) is Mine and cache.settings.eviction == "lfu"


def test_type_checkers_complain(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(
        "from yatagarasu_cache import AsyncDiskCache, DiskCache, PickleSerializer, RingSettings, repair\n"
        "DiskCache('d', size_limit=2**20, eviction='lfu', serializer=PickleSerializer(secret=b's' * 32))\n"
        "AsyncDiskCache('d', io_uring=RingSettings(), backend='threads', max_in_flight=5)\n"
        "repair('d', size_limit=2**20)\n"
        "DiskCache('d', evictoin='lfu')\n"
        "DiskCache('d', eviction='lfuu')\n"
        "AsyncDiskCache('d', size_limit='1')\n"
        "repair('d', sizelimit=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "--follow-imports=silent", "use.py"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("use.py:") and ": error: " in line]
    assert [line.split(": ")[0] for line in found] == [f"use.py:{n}" for n in (5, 6, 7, 8)], done.stdout


@pytest.mark.parametrize("kind", [DiskCache, AsyncDiskCache])
def test_no_method_hides_its_options(kind: type) -> None:
    """No bare ``*args`` or ``**options`` in what is public."""
    for name, method in inspect.getmembers(kind, callable):
        if name.startswith("_"):
            continue
        kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, name


def test_both_classes_have_the_same_methods_and_parameters() -> None:
    for name, method in inspect.getmembers(DiskCache, inspect.isfunction):
        if not name.startswith("_") and hasattr(AsyncDiskCache, name):
            left = inspect.signature(method).parameters.values()
            right = inspect.signature(getattr(AsyncDiskCache, name)).parameters.values()
            assert [(p.name, p.default, p.kind) for p in left] == [(p.name, p.default, p.kind) for p in right], name
