"""One directory, with a `Disk` of one's own and without: as a program that turns a restricted mode on, or off
again, has it. Whatever has been stored, it is `fetch` that unpickles it."""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache.compat.diskcache.core import MODE_PICKLE

Make = Callable[..., Any]

PLAIN = ["text", 5, 1.5, b"bytes", {"a": [1, (2,)]}, (1, 2), [None], {1}, "x" * 100_000, b"y" * 100_000]
KEYS = ["k", (1, 2), frozenset({1}), ("long" * 30_000,)]


class Refused(Exception):
    pass


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise Refused(f"{module}.{name}")


class Strict(dc.Disk):
    """Unpickles nothing that imports anything."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == MODE_PICKLE:
            return Reader(io.BytesIO(value)).load()
        return super().fetch(mode, filename, value, read)


@pytest.fixture(params=[dc.Cache, dc.FanoutCache])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("key", KEYS, ids=["str", "tuple", "object", "long"])
def test_what_each_has_stored_the_other_reads(make: Make, kind: Any, key: Any) -> None:
    free, strict = make(kind), make(kind, disk=Strict)
    for one, other in ((free, strict), (strict, free)):
        for value in PLAIN:
            one[key] = value
            assert other.get(key) == value and type(other[key]) is type(value) and list(other) == [key]
            assert other.get(key, expire_time=True, tag=True) == (value, None, None)
            assert other.pop(key) == value and key not in one


@pytest.mark.parametrize("key", KEYS, ids=["str", "tuple", "object", "long"])
def test_a_pickle_is_left_to_fetch_whoever_has_stored_it(make: Make, kind: Any, key: Any) -> None:
    free, strict = make(kind), make(kind, disk=Strict)
    value = [Counter("a")]
    for one in (free, strict):
        one[key] = value
        with pytest.raises(Refused, match="Counter"):
            strict.get(key)
        with pytest.raises(Refused):
            strict[key]
        assert free[key] == value and free.get(key) == value
        with pytest.raises(Refused):
            strict.pop(key)
        assert key not in free


def test_pickled_tuples_come_back_as_such(cache: dc.Cache) -> None:
    value = (Counter("a"), 1, "k")
    cache["k"] = value
    assert cache["k"] == value and cache.get("k") == value


def test_files_and_numbers_go_through_fetch_too(make: Make) -> None:
    free, strict = make(), make(disk=Strict)
    free.set("file", io.BytesIO(b"abc"), read=True)
    assert strict.read("file").read() == b"abc" and strict["file"] == b"abc"
    free.set(frozenset({1}), io.BytesIO(b"abc"), read=True)
    assert strict.read(frozenset({1})).read() == b"abc" and free.read(frozenset({1})).read() == b"abc"
    for key in ("n", frozenset({2})):
        assert free.incr(key) == 1 and strict.incr(key) == 2 and free.incr(key) == 3
        assert strict[key] == free[key] == 3


def test_a_number_that_incr_makes_goes_through_store(make: Make, kind: Any) -> None:
    cache = make(kind, disk=dc.JSONDisk)
    for key in ("n", ["n"]):
        assert cache.incr(key, 2, default=3) == 5 and cache[key] == 5 and cache.get(key) == 5
        with pytest.raises(TypeError):
            cache.incr(key)
        assert cache[key] == 5
        cache.set(key, 1, expire=-1)
        assert cache.decr(key) == -1 and cache[key] == -1
    cache.delete("n")
    with pytest.raises(KeyError):
        cache.incr("n", default=None)


class Raises(dc.Disk):
    error: type[Exception] = OSError

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        raise self.error("gone")


def test_an_oserror_of_fetch_is_a_miss(make: Make, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(kind, disk=Raises)
    cache["a"] = 1
    assert cache.get("a", 5) == 5 and cache.get("a", 5, tag=True) == (5, None) and cache.pop("a", 6) == 6
    assert "a" not in cache
    cache["a"] = 1
    for lookup in (cache.__getitem__, cache.read):
        with pytest.raises(KeyError):
            lookup("a")
    for error in (KeyError, RuntimeError):
        monkeypatch.setattr(Raises, "error", error)
        for method in (cache.get, cache.__getitem__):
            with pytest.raises(error, match="gone"):
                method("a")
    assert "a" in cache


def test_what_is_too_large_for_json_is_culled_at_once(make: Make) -> None:
    cache = make(disk=dc.JSONDisk, size_limit=10**6, disk_compress_level=0)
    cache["a"] = 1
    assert cache.set("a", "x" * (60 << 20)) is True and "a" not in cache


def test_read_is_for_store_to_judge(make: Make) -> None:
    cache = make(disk=dc.JSONDisk)
    cache.set("text", "abc", read=True)  # which JSONDisk does not pack, then
    with pytest.raises(TypeError):
        cache["text"]


def test_files_of_a_disk_are_like_those_that_were_opened(make: Make) -> None:
    cache = make(disk=Strict)
    cache.set("file", io.BytesIO(b"abc"), read=True)
    with cache.read("file") as file:
        assert file.mode == "rb" and os.pread(file.fileno(), 9, 0) == b"abc"
