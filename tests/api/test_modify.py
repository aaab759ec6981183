"""`modify`: what is made of a value is stored if nobody came first; counters with a window."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Clock, Make, at_most, in_threads, noise, open_apart, run_python

from yatagarasu_cache import (
    CacheIOError,
    ClosedError,
    DiskCache,
    SerializationError,
    ValueTooLarge,
    modifying,
)
from yatagarasu_cache.concurrency.locks import is_holding

SMALL: dict[str, Any] = {"size_limit": 8 << 20, "segment_size": SEGMENT}


def one_more(value: int) -> int:
    return value + 1


# -- one caller -----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("value", [b"bytes", "text", [1, {2}], 7, noise(3 * LARGE), None])
def test_what_it_keeps(core: str, make: Make, value: Any, durability: str) -> None:
    cache = make(durability=durability, default_expire=50, **SMALL)
    cache.set("k", value, expire=1000, tag="t", meta={"m": 1})
    before = cache.get_entry("k")
    assert before is not None
    for result in ([value, 1], noise(2 * LARGE), b"b", None):
        assert cache.modify("k", lambda there, result=result: result) == result
        entry = cache.get_entry("k")
        assert entry is not None and entry.value == result
        assert (entry.tag, entry.meta, entry.expires) == ("t", {"m": 1}, before.expires)
        assert entry.version > before.version
        before = entry
    cache.set("forever", 1, expire=math.inf)
    assert cache.modify("forever", one_more) == 2
    assert cache.get_entry("forever").expires is None  # type: ignore[union-attr]
    assert cache.modify("new", one_more, 0) == 1
    new = cache.get_entry("new")
    assert new is not None and new.tag is None and new.meta is None and new.expires is not None
    assert 49 < new.expires - new.created < 51  # default_expire
    assert cache.check() == []


def test_what_it_gives(core: str, cache: DiskCache) -> None:
    calls: list[Any] = []

    def function(value: Any) -> Any:
        calls.append(copy.deepcopy(value))
        value.append(len(calls))  # it may change what it gets
        return value

    default: list[int] = []
    assert cache.modify("k", function, default) == [1] and default == []
    assert cache.modify("k", function, default) == [1, 2]
    assert calls == [[], [1]] and cache["k"] == [1, 2]
    assert cache.modify("none", lambda value: value) is None and "none" in cache
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (1, 0, 3)


def test_the_default_is_new_for_each_try(core: str, cache: DiskCache) -> None:
    seen: list[list[int]] = []

    def function(value: list[int]) -> list[int]:
        seen.append(list(value))
        value.append(1)
        if len(seen) < 3:
            cache.set("k", [5])
            cache.delete("k")  # deleted meanwhile: it is absent again, and so the default is as met
            cache.set("k", [7])
            if len(seen) == 2:
                cache.delete("k")
        return value

    assert cache.modify("k", function, []) == [1]
    assert seen == [[], [7], []]


def test_what_raises_changes_nothing(core: str, cache: DiskCache) -> None:
    cache.set("k", 5, tag="t")
    before = cache.get_entry("k")
    assert before is not None

    class Mine(Exception):
        pass

    def fail(value: Any) -> Any:
        raise Mine(value)

    for function, kind in (
        (fail, Mine), (lambda value: 1 / 0, ZeroDivisionError), (lambda value: os.stat("/none/such"), OSError),
        (lambda value: object(), SerializationError), (lambda value: iter([b"stream"]), SerializationError),
        (lambda: 1, TypeError), (None, TypeError),
    ):  # fmt: skip
        for key in ("k", "missing"):
            with pytest.raises(kind):
                cache.modify(key, function)  # type: ignore[arg-type]
    with pytest.raises(SerializationError):
        cache.modify(object(), fail)  # type: ignore[arg-type]
    entry = cache.get_entry("k")
    assert entry is not None and (entry.version, entry.value, entry.tag) == (before.version, 5, "t")
    assert "missing" not in cache and len(cache) == 1


def test_a_result_that_can_never_fit(core: str, make: Make) -> None:
    cache = make(max_value_size=50_000, **SMALL)
    cache["k"] = b"v"
    with pytest.raises(ValueTooLarge):
        cache.modify("k", lambda value: bytes(60_000))
    assert cache["k"] == b"v"


def test_what_has_expired_counts_as_absent(core: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache.set("k", 5, expire=10, tag="t")
    clock.advance(11)
    assert cache.modify("k", one_more, 0) == 1
    entry = cache.get_entry("k")
    assert entry is not None and (entry.tag, entry.expires) == (None, None)

    def slow(value: int) -> int:
        if value == 5:
            clock.advance(11)  # it expires meanwhile
        return value + 1

    cache.set("k", 5, expire=10)
    assert cache.modify("k", slow, 0) == 1


def test_the_function_may_use_the_cache(core: str, cache: DiskCache) -> None:
    cache.update({"a": 1, "b": 2})
    assert cache.modify("a", lambda a: a + cache.modify("b", lambda b: b + cache["a"])) == 4
    assert cache["b"] == 3


def test_a_function_that_changes_the_very_entry_all_the_time(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told, some time, and hangs nobody."""
    monkeypatch.setattr(modifying, "_TRIES", 20)
    with pytest.raises(CacheIOError, match="cannot modify 'k': it changes all the time"):
        cache.modify("k", lambda value: cache.incr("k"), 0)
    assert cache["k"] == 20


def test_nothing_is_locked_while_it_is_called(core: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    open_apart(monkeypatch)
    cache, other = make(lock_timeout=0.05, **SMALL), make(lock_timeout=0.05, **SMALL)
    done: list[object] = []

    def others() -> None:
        other.set("x", noise(2 * LARGE))
        done.append(other.modify("y", one_more, 0))

    def function(value: Any) -> Any:
        thread = threading.Thread(target=others)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        return 1

    assert cache.modify("k", function) == 1 and done == [1]


def test_a_function_whose_calls_are_interrupted_may_go_on(core: str, cache: DiskCache) -> None:
    """It is in the middle of nothing: what an interrupted call of its own held is given back at once."""

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def function(value: Any) -> int:
        for turn in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + turn % 7 * 0.0001)
                while True:
                    cache.add(("x", turn), 1)
                    cache.delete(("x", turn))
            except Stop:
                pass
            assert not is_holding() and cache.incr("n") == turn + 1
        return turn

    before = signal.signal(signal.SIGALRM, stop)
    try:
        assert cache.modify("k", function) == 59
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert cache["n"] == 60 and cache["k"] == 59 and cache.check(fix=True) is not None and cache.check() == []


def test_an_interruption_leaves_it_as_it_was(cache: DiskCache) -> None:
    cache["k"] = 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.modify("k", lambda value: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert cache["k"] == 1 and cache.modify("k", one_more) == 2


def test_closed_meanwhile(make: Make) -> None:
    cache = make()
    cache["k"] = 1
    with pytest.raises(ClosedError):
        cache.modify("k", lambda value: cache.close())
    assert make()["k"] == 1


def test_damage_is_absence(core: str, make: Make, directory: Path) -> None:
    cache = make(**SMALL)
    cache["k"] = noise(2 * LARGE)
    (file,) = [path for path in (directory / "large").rglob("*") if path.is_file()]
    file.write_bytes(bytes(2 * LARGE))
    assert cache.modify("k", lambda value: value, "default") == "default"
    assert cache.stats().corrupt == 1 and cache.check() == []


# -- many callers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2 * LARGE])
def test_threads_lose_nothing(core: str, make: Make, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """With one handle, and with handles that share nothing. Large values have files of their own."""
    open_apart(monkeypatch)
    caches = [make(**SMALL), make(**SMALL)]
    each = 25 if size else 80

    def work(which: int) -> None:
        for n in range(each):
            caches[which % 2].modify("k", lambda value, n=n: {**value, (which, n): None, "x": noise(size)}, {})

    in_threads(6, work)
    assert caches[0]["k"].keys() == {(which, n) for which in range(6) for n in range(each)} | {"x"}
    assert caches[1].check() == []


def test_a_touch_meanwhile_is_kept(core: str, cache: DiskCache) -> None:
    """It makes no other version: the function is called once, and the new time counts."""
    calls: list[int] = []

    def function(value: int) -> int:
        calls.append(value)
        cache.touch("k", 5000)
        return value + 1

    cache.set("k", 1, expire=10)
    assert cache.modify("k", function) == 2 and calls == [1]
    entry = cache.get_entry("k")
    assert entry is not None and entry.expires is not None and entry.expires - entry.created > 4000
    cache.set("k", 1, expire=10)
    assert cache.modify("k", lambda value: cache.touch("k", 6000) and noise(5 << 20)) == noise(5 << 20)  # a file
    entry = cache.get_entry("k")
    assert entry is not None and entry.expires is not None and entry.expires - entry.created > 5000


def test_tag_and_metadata_are_those_of_the_version_that_it_replaces(core: str, cache: DiskCache) -> None:
    def function(value: int) -> int:
        if value == 1:
            cache.set("k", 10, expire=500, tag="other", meta="other")
        return value + 1

    cache.set("k", 1, tag="t", meta="m")
    assert cache.modify("k", function) == 11
    entry = cache.get_entry("k")
    assert entry is not None and (entry.tag, entry.meta) == ("other", "other") and entry.expires is not None


WORK = """
import sys
from yatagarasu_cache import DiskCache
def work(cache, each, name):
    for n in range(each):
        cache.modify("sum", lambda value: value + 1, 0)
        cache.modify("list", lambda value: value + [(name, n)], [])
"""


def test_forked_processes_lose_nothing(core: str, directory: Path) -> None:
    """With the parent's handle, which each of them has."""
    code = WORK + """
import os
cache = DiskCache(sys.argv[1])
cache.set("sum", 0, expire=1000, tag="t", meta="m")
children = []
for name in range(8):
    child = os.fork()
    if not child:
        status = 1
        try:
            work(cache, 40, name)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)
entry = cache.get_entry("sum")
assert (entry.tag, entry.meta) == ("t", "m") and 900 < entry.expires - entry.created < 1001
assert sorted(cache["list"]) == [(name, n) for name in range(8) for n in range(40)]
print(cache["sum"])
"""
    assert run_python(code, directory) == "320\n"


def _work(handle: bytes, each: int, name: int) -> None:
    with pickle.loads(handle) as cache:
        for n in range(each):
            cache.modify("sum", one_more, 0)
            cache.modify("list", lambda value, n=n: [*value, (name, n)], [])


@pytest.mark.once
def test_spawned_processes_lose_nothing(core: str, directory: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with DiskCache(directory, **SMALL) as cache, at_most(120):
        handle = pickle.dumps(cache)
        processes = [context.Process(target=_work, args=(handle, 40, name)) for name in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert cache["sum"] == 160
        assert sorted(cache["list"]) == [(name, n) for name in range(4) for n in range(40)]


@pytest.mark.once
def test_sixteen_processes_on_one_key(core: str, directory: Path) -> None:
    """Each of them gets on, however many there are."""
    code = """
import os, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
children = []
for _ in range(16):
    child = os.fork()
    if not child:
        status = 1
        try:
            for _ in range(30):
                cache.modify("n", lambda value: value + 1, 0)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)
print(cache["n"])
"""
    assert run_python(code, directory) == "480\n"


# -- counters with a window -----------------------------------------------------------------------


def test_a_window(core: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert [cache.incr("hits", expire=60, tag="w") for _ in range(3)] == [1, 2, 3]
    first = cache.get_entry("hits")
    assert first is not None and first.tag == "w" and first.expires is not None
    end = first.expires
    clock.advance(50)
    assert cache.incr("hits", 5, expire=60, tag="another") == 8
    entry = cache.get_entry("hits")
    assert entry is not None and (entry.tag, entry.expires) == ("w", end)
    clock.advance(11)
    assert cache.decr("hits", expire=30) == -1  # another one
    entry = cache.get_entry("hits")
    assert entry is not None and entry.tag is None and entry.expires == pytest.approx(clock.now / 1e9 + 30)


def test_expiry_of_a_counter_by_default(make: Make) -> None:
    cache = make(default_expire=20)
    cache.incr("a")
    cache.incr("b", expire=math.inf, tag=("t", 1))
    a, b = cache.get_entry("a"), cache.get_entry("b")
    assert a is not None and a.expires is not None and b is not None and b.expires is None and b.tag == ("t", 1)
    assert cache.evict(("t", 1)) == 1


def test_wrong_arguments_of_a_counter(cache: DiskCache) -> None:
    cache["n"] = 1
    for expire, kind in ((0, ValueError), (-1, ValueError), ("1", TypeError), (math.nan, TypeError)):
        with pytest.raises(kind, match="expire must be"):
            cache.incr("n", expire=expire)  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="tag"):
        cache.decr("n", tag=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        cache.incr("n", 1, 0, 60)  # type: ignore[misc]
    with pytest.raises(KeyError):
        cache.incr("none", default=None, expire=5)
    assert cache["n"] == 1 and "none" not in cache


@pytest.mark.parametrize("length", [10, 5000, 60_000])
def test_a_long_tag_of_a_counter(core: str, make: Make, length: int) -> None:
    cache = make(**SMALL)
    for n in range(5):
        assert cache.incr(n, tag="t" * length) == 1
        assert cache.incr(n, tag="u") == 2
    assert {entry.tag for entry in cache.entries()} == {"t" * length} and cache.check() == []


def test_windows_of_threads_begin_once(core: str, cache: DiskCache) -> None:
    sums: list[int] = []
    in_threads(8, lambda which: sums.extend(cache.incr("n", expire=60 + which, tag=which) for _ in range(25)))
    entry = cache.get_entry("n")
    assert sorted(sums) == list(range(1, 201)) and entry is not None
    assert entry.expires is not None and entry.expires - entry.created == pytest.approx(60 + entry.tag, abs=5)
