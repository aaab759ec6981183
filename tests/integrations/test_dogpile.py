"""The backend of dogpile.cache, with the suites that dogpile has for backends."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dogpile.cache")

from dogpile.cache import make_region
from dogpile.cache.api import NO_VALUE
from dogpile.testing.fixtures import (
    _GenericBackendTestSuite,
    _GenericMutexTestSuite,
    _GenericSerializerTestSuite,
)

from yatagarasu_cache import ClosedError, ConfigurationError, DiskCache
from yatagarasu_cache.integrations.dogpile import YatagarasuBackend

SECRET = b"secret of the tests"
_place = tempfile.TemporaryDirectory(prefix="dogpile-")


def _arguments(name: str) -> dict[str, Any]:
    return {"arguments": {"directory": f"{_place.name}/{name}", "secret": SECRET, "size_limit": 1 << 26}}


class TestBackend(_GenericBackendTestSuite):
    backend = "yatagarasu_cache"
    config_args = _arguments("backend")


class TestSerializer(_GenericSerializerTestSuite, _GenericBackendTestSuite):
    backend = "yatagarasu_cache"
    config_args = _arguments("serializer")


class TestMutex(_GenericMutexTestSuite):
    backend = "yatagarasu_cache"
    config_args = _arguments("mutex")


@pytest.fixture
def region(tmp_path: Path) -> Any:
    arguments = {"directory": tmp_path / "cache", "secret": SECRET}
    return make_region().configure("yatagarasu_cache", arguments=arguments)


def test_the_entry_point_names_it() -> None:
    from dogpile.cache.region import _backend_loader

    assert _backend_loader.load("yatagarasu_cache") is YatagarasuBackend


def test_a_forged_pickle_is_a_miss(region: Any, tmp_path: Path, caplog: Any) -> None:
    region.set("key", {"any": "value"})
    assert region.get("key") == {"any": "value"}
    with DiskCache(tmp_path / "cache") as cache:
        stored = cache["key"]
        cache["forged"] = pickle.dumps({"run": "code"})
        cache["moved"] = stored
        cache["number"] = 5
    assert region.get_multi(["forged", "moved", "number", "key"])[:3] == [NO_VALUE] * 3
    assert len([record for record in caplog.records if "taken for a miss" in record.getMessage()]) == 2


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='"directory"'):
        YatagarasuBackend({})
    with pytest.raises(ConfigurationError, match="size_limit"):
        YatagarasuBackend({"directory": tmp_path, "secret": SECRET, "size_limit": "much"})
    given = {"directory": tmp_path / "cache", "secret": SECRET, "default_expire": 60}
    backend = YatagarasuBackend(given)
    backend.set_serialized("key", b"value")
    assert backend.cache.get_entry("key").expires is not None and set(given) == {"directory", "secret", "default_expire"}
    backend.close()
    with pytest.raises(ClosedError):
        backend.get_serialized("key")


CREATOR = """
import sys, time
from dogpile.cache import make_region
region = make_region().configure(
    "yatagarasu_cache", expiration_time=60, arguments={"directory": sys.argv[1], "secret": b"x"})
def create():
    with open(sys.argv[2], "a") as file:
        file.write("created\\n")
    time.sleep(0.3)
    return 5
print("ready", flush=True)
sys.stdin.readline()
assert region.get_or_create("key", create) == 5
"""


def test_one_of_many_processes_creates(tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = [sys.executable, "-c", CREATOR, str(tmp_path / "cache"), str(made)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"go\n", timeout=60)
        assert process.returncode == 0
    assert made.read_text() == "created\n"


def test_a_mutex_is_given_back_by_another_thread(region: Any) -> None:
    mutex = region.backend.get_mutex("key")
    assert mutex.acquire() and not region.backend.get_mutex("key").acquire(False) and mutex.locked()
    thread = threading.Thread(target=mutex.release)
    thread.start()
    thread.join()
    other = region.backend.get_mutex("key")
    assert other.acquire(False)
    other.release()
    assert not mutex.locked()


