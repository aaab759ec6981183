"""Fixtures of the whole suite. Tests that touch a cache run on every backend there is, long ones in turn."""

from __future__ import annotations

import gc
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

from yatagarasu_cache import DiskCache
from yatagarasu_cache.codec import msgpack

settings.register_profile(
    "suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("long", parent=settings.get_profile("suite"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.hookimpl(trylast=True)  # of those that -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each case of a test runs on every backend and on every core, but not on each pair of them.

    One that is marked `in_turn` runs on one of the pairs: so do all with YATAGARASU_TEST_IN_TURN=all, and none
    with "none": then each runs on each pair. With YATAGARASU_TEST_SHARE=k/n only the k-th of n parts into which
    the tests fall runs.
    """
    which = os.environ.get("YATAGARASU_TEST_IN_TURN", "long")
    if which != "none":
        leave_out(config, items, out_of_turn(items, which == "all"))
    share, _, shares = os.environ.get("YATAGARASU_TEST_SHARE", "1/1").partition("/")
    others = {item for item in items if zlib.crc32(item.nodeid.encode()) % int(shares) != int(share) - 1}
    leave_out(config, items, others)


def out_of_turn(items: list[pytest.Item], all_in_turn: bool) -> set[pytest.Item]:
    cases: dict[str, dict[Any, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        case = frozenset((name, id(one)) for name, one in parameters(item).items() if name not in ("backend", "core"))
        cases[item.nodeid.partition("[")[0]][case].append(item)
    return {
        item
        for name, of_test in cases.items()
        for number, ways in enumerate(of_test.values(), zlib.crc32(name.encode()))
        for item in set(ways) - chosen(ways, number, all_in_turn or ways[0].get_closest_marker("in_turn") is not None)
    }


def chosen(ways: list[pytest.Item], number: int, one: bool) -> set[pytest.Item]:
    """Those that run of the ways in which a case can: `one` of them, or one for each backend and each core."""
    if one:
        return {ways[number % len(ways)]}
    backends, cores = (sorted({parameters(way).get(name, "") for way in ways}) for name in ("backend", "core"))
    if len(backends) * len(cores) != len(ways) or len(backends) == 1 or len(cores) == 1:
        return set(ways)
    return {
        way
        for way in ways
        for at in [backends.index(parameters(way)["backend"]) + cores.index(parameters(way)["core"])]
        if (at + number) % max(len(backends), len(cores)) == 0
    }


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def leave_out(config: pytest.Config, items: list[pytest.Item], left_out: set[pytest.Item]) -> None:
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What is there before a module's tests stays: the garbage collector, which many of them ask for, leaves it
    out. It is up to thirty times as fast so."""
    gc.unfreeze()  # something of the module before may have been in use when it was left out
    gc.collect()
    gc.freeze()


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
        monkeypatch.setattr(msgpack, "_pack", msgpack._pack_in_python)  # chosen when it was imported
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
