"""Nobody else's pickle is ever loaded (CVE-2025-69872)."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import CacheIOError, ConfigurationError, DiskCache, PickleSerializer
from yatagarasu_cache.codec import ValueCodec, encode_key
from yatagarasu_cache.codec.user_secret import secret_path, user_secret
from yatagarasu_cache.compat.diskcache.entries import _packed

Make = Callable[..., Any]


class Trap:
    sprung = 0

    def __reduce__(self) -> Any:
        return spring, ()


def spring() -> str:
    Trap.sprung += 1
    return "sprung"


@pytest.fixture(autouse=True)
def nothing_is_run() -> Any:
    Trap.sprung = 0
    yield
    assert Trap.sprung == 0


def test_the_key_is_made_when_it_is_needed(cache: dc.Cache, users_data: Path) -> None:
    cache["k"] = [1, {"a": (2,)}]
    assert cache["k"] == [1, {"a": (2,)}] and not users_data.exists()
    cache["k"] = object
    path = users_data / "yatagarasu_cache" / "pickle-secret"
    assert path == secret_path() and stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_bytes()) == 32
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and os.listdir(path.parent) == ["pickle-secret"]
    assert user_secret() == path.read_bytes() and cache["k"] is object


def test_forged_values_are_misses(make: Make, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = make()
    cache["mine"] = object
    with DiskCache(place, serializer=PickleSerializer(b"another")) as theirs:
        theirs["k"] = [Trap()]
    with DiskCache(place, serializer="pickle") as theirs:
        theirs["l"] = [Trap()]
    assert cache.get("k") is None and cache.get("l", 5) == 5 and cache.pop("k") is None
    with pytest.raises(KeyError):
        cache["l"]
    assert list(cache) == ["mine", "k", "l"] or set(cache) >= {"mine", "l"}
    assert cache.peekitem(last=False) == ("mine", object)
    assert [record.levelname for record in caplog.records if "taken for a miss" in record.message] == ["WARNING"]


def test_what_is_signed_cannot_be_moved_to_another_key(make: Make, place: Path) -> None:
    cache = make()
    cache["k"] = [object]
    entries = cache._entries
    row = entries.row(entries.name("k"))
    other = entries.name("other")
    cache._entries._desk.put(other.data, row.found.payload, row.found.flags, 0, b"", row.names.meta)
    assert cache["k"] == [object] and cache.get("other") is None


class Loading(dc.Disk):
    """Which unpickles whatever it is given, as that of diskcache does."""

    def put(self, key: Any) -> Any:
        return pickle.dumps(key), True

    def get(self, key: Any, raw: bool) -> Any:
        return pickle.loads(key)


def test_nor_are_forged_ones_given_to_a_disk(make: Make, place: Path) -> None:
    cache = make(disk=Loading)
    cache["k"] = "mine"
    assert list(cache) == ["k"]
    entries = cache._entries
    row = entries.row(entries.name("k"))
    with DiskCache(place) as theirs:
        theirs.set(pickle.dumps(Trap()), b"value")
    entries._desk.put(entries.name("x").data, pickle.dumps((Trap(), Trap(), True)), 0, 0, b"", row.names.meta)
    assert cache.get("x") is None and cache["k"] == "mine"
    assert "k" in list(cache)


def stored(cache: dc.Cache, key: Any, value: Any, form: int) -> None:
    """As whoever can write to the directory may do it, without anybody's key."""
    entries = cache._entries
    payload, flags = ValueCodec().encode(value)
    entries._desk.put(encode_key(key), payload, flags, 0, b"", _packed(1, 4, form))


@pytest.mark.parametrize("disk", [dc.Disk, Loading])
@pytest.mark.parametrize("form", [0, 1, 2, 77])
def test_a_key_that_was_not_signed_is_not_given_to_a_disk(make: Make, disk: Any, form: int) -> None:
    cache = make(disk=disk)
    cache["mine"] = 1
    evil = pickle.dumps(Trap())
    for n, value in enumerate([(0, evil, False), (evil, evil), (evil, 4, evil, False), 5, (), [evil]]):
        stored(cache, ("forged", n), value, form)
    for keys in (list(cache), list(cache.iterkeys()), [cache.peekitem()[0], cache.peekitem(last=False)[0]]):
        assert "mine" in keys
    for n in range(6):
        assert cache.get(("forged", n), tag=True) is not None and cache.pop(("forged", n), tag=True) is not None
    assert cache["mine"] == 1


def test_a_signed_value_is_not_taken_for_what_a_disk_has_stored(make: Make) -> None:
    plain = make()
    plain["k"] = (pickle.dumps(Trap()), 4, object)  # data of somebody else's, signed since it is pickled
    entries = plain._entries
    row = entries.row(entries.name("k"))
    entries._desk.put(row.names.key, row.found.payload, row.found.flags, 0, b"", _packed(1, 4, 2))
    assert plain.get("k", 5, tag=True) == (5, None)
    with pytest.raises(KeyError):
        plain.peekitem()


def test_a_secret_that_is_given(make: Make, users_data: Path, place: Path) -> None:
    cache = make(disk_secret=b"given")
    cache["k"] = object
    assert cache["k"] is object and not users_data.exists()
    cache.reset("cull_limit", 5)
    assert b"given" not in (place / "diskcache.json").read_bytes()
    assert make().get("k") is None and make(disk_secret=b"given")["k"] is object


def test_another_place_for_it(cache: dc.Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, users_data: Path) -> None:
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", str(tmp_path / "mine" / "secret"))
    cache["k"] = object
    assert (tmp_path / "mine" / "secret").exists() and not users_data.exists()


@pytest.mark.parametrize("what", ["mode", "length", "directory", "link"])
def test_a_key_that_is_no_secret_is_refused(cache: dc.Cache, what: str, tmp_path: Path) -> None:
    path = secret_path()
    path.parent.mkdir(parents=True)
    if what == "directory":
        path.mkdir()
    elif what == "link":
        (tmp_path / "elsewhere").write_bytes(bytes(32))
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(bytes(32 if what == "mode" else 31))
        path.chmod(0o644 if what == "mode" else 0o600)
    with pytest.raises(CacheIOError, match="pickle-secret|YATAGARASU_CACHE_SECRET_FILE"):
        cache["k"] = object
    assert "k" not in cache
    cache["k"] = [1]  # which needs none
    assert cache["k"] == [1]


def test_all_processes_have_the_same(users_data: Path) -> None:
    code = "from yatagarasu_cache.codec.user_secret import user_secret; print(user_secret().hex())"
    env = {**environment(), "XDG_DATA_HOME": str(users_data)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(6)]
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1 == len(os.listdir(secret_path().parent))


@pytest.mark.parametrize(
    "found",
    [
        {"_directory": "elsewhere"}, {"_secret": None}, {"disk_secret": "theirs"}, {"_entries_": 1}, {"get": 5}, {"directory": "x"},
        {"_find_secret": 1}, {"timeout": 1}, {"size_limit": "x"}, {"size_limit": None}, {"size_limit": -1}, {"cull_limit": -3},
        {"size_limit": 1e999}, {"cull_limit": "x"}, {"cull_limit": 0.5}, {"eviction_policy": 5}, {"disk_min_file_size": "x"}, "[" * 100_000,
    ],
)  # fmt: skip
def test_settings_that_others_wrote_change_nothing_else(make: Make, place: Path, found: Any) -> None:
    cache = make(disk_secret=b"given")
    cache["k"] = object
    cache.close()
    (place / "diskcache.json").write_text(found if isinstance(found, str) else json.dumps(found))
    cache = make(disk_secret=b"given")
    assert cache["k"] is object and cache.directory == str(place) and cache.timeout == 60
    cache["l"] = 1
    assert cache.cull() == 0 and make(disk_secret=b"given")["l"] == 1


class Unpickling(dc.Disk):
    """Which unpickles whatever it has stored."""

    def store(self, value: Any, read: bool, key: Any = None) -> Any:
        return super().store(pickle.dumps(value), read, key=key)

    def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> Any:
        return pickle.loads(super().fetch(mode, filename, value, read))


@pytest.mark.parametrize("mode", [1, 2, 4])
def test_what_is_not_signed_is_not_for_a_disk(make: Make, place: Path, mode: int) -> None:
    trap = pickle.dumps(Trap())
    with DiskCache(place) as theirs:
        theirs.set("plain", trap)
        theirs.set("long", trap + bytes(100_000))
        for form in range(3):
            meta = (1).to_bytes(8, "little") + bytes((mode, form))
            theirs.set(f"form {form}", trap, meta=meta)
            theirs.set(f"pair {form}", (trap, mode, "k"), meta=meta)
    cache = make(disk=Unpickling)
    cache["mine"] = Path("p")
    for key in ["plain", "long", *(f"{what} {form}" for what in ("form", "pair") for form in range(3))]:
        cache.get(key), cache.get(key, read=True), cache.pop(key)
    assert cache["mine"] == Path("p") and "mine" in set(cache)


def test_relative_places_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("data", "./data", "~/data"):
        monkeypatch.setenv("XDG_DATA_HOME", relative)  # which the specification says is to be ignored
        assert secret_path() == tmp_path / "home" / ".local" / "share" / "yatagarasu_cache" / "pickle-secret"
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", "~/mine")
    assert secret_path() == tmp_path / "home" / "mine"
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", "mine")
    with pytest.raises(ConfigurationError, match="YATAGARASU_CACHE_SECRET_FILE"):
        user_secret()
