"""`get_or_set` with `stale` and `refresh_early`: old values, and what is computed in the background."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counted import Counted, Odd, eventually, flights_of, is_idle
from helpers import Clock, Make, at_most, in_threads, run_python

from yatagarasu_cache import PickleSerializer, SerializationError
from yatagarasu_cache.computing import steps

pytestmark = pytest.mark.usefixtures("core")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with at_most(60):
        yield


# -- stale -------------------------------------------------------------------------------------


def test_stale_is_served_and_computed_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache, function = make(), Counted("old", "new")
    ask = lambda: cache.get_or_set("k", function, expire=10, stale=100)  # noqa: E731
    assert ask() == "old"
    clock.advance(11)
    assert cache.get("k") is None and ask() == "old"
    eventually(lambda: cache.get("k") == "new" and is_idle(cache))
    assert ask() == "new" and function.calls == 2 and cache.stats().computing["stale"] == 1


def test_one_computes_anew_and_nobody_waits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache, go = make(), threading.Event()
    calls: list[int] = []

    def function() -> str:
        calls.append(1)
        assert len(calls) == 1 or go.wait(30)
        return f"v{len(calls)}"

    ask = lambda: cache.get_or_set("k", function, expire=10, stale=100)  # noqa: E731
    assert ask() == "v1"
    clock.advance(11)
    in_threads(8, lambda _: [ask() == "v1" or 1 / 0 for _ in range(5)])
    eventually(lambda: len(calls) == 2)
    assert ask() == "v1"
    go.set()
    eventually(lambda: ask() == "v2")
    assert len(calls) == 2


@pytest.mark.parametrize("length", [10, 200_000])  # this one has a file of its own
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("act", ["set", "delete", "nothing"])
def test_what_came_meanwhile_is_not_overwritten(
    make: Make, monkeypatch: pytest.MonkeyPatch, act: str, early: bool, length: int
) -> None:
    clock = Clock(monkeypatch)
    cache, go, at_it = make(large_value_size=100_000), threading.Event(), threading.Event()
    values = iter([b"old", b"new" * length])

    def function() -> bytes:
        value = next(values)
        if value != b"old":
            at_it.set()
            assert go.wait(30)
        return value

    beta = 1e9 if early else None
    cache.get_or_set("k", function, expire=10, stale=100, refresh_early=beta)
    clock.advance(0 if early else 11)
    assert cache.get_or_set("k", function, expire=10, stale=100, refresh_early=beta) == b"old"
    assert at_it.wait(30)
    if act == "set":
        cache.set("k", b"explicit")
    elif act == "delete":
        cache.delete("k")
        assert cache.get("k") is None
    go.set()
    eventually(lambda: is_idle(cache))
    assert cache.get("k") == {"set": b"explicit", "nothing": b"new" * length, "delete": None}[act]


@pytest.mark.usefixtures("apart")
def test_one_of_all_processes_computes_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    caches, go = [make() for _ in range(3)], threading.Event()
    calls: list[int] = []

    def function() -> str:
        calls.append(1)
        assert len(calls) == 1 or go.wait(30)
        return f"v{len(calls)}"

    ask = lambda cache: cache.get_or_set("k", function, expire=10, stale=100)  # noqa: E731
    assert ask(caches[0]) == "v1"
    clock.advance(11)
    for _ in range(5):
        assert [ask(cache) for cache in caches] == ["v1"] * 3
    eventually(lambda: len(calls) == 2)
    time.sleep(0.05)
    go.set()
    eventually(lambda: [ask(cache) for cache in caches] == ["v2"] * 3)
    eventually(lambda: all(map(is_idle, caches)))
    assert len(calls) == 2


def test_who_does_not_ask_for_stale_ones_waits_for_the_new_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache, function = make(), Counted("old", "new", takes=0.1)
    assert cache.get_or_set("k", function, expire=10, stale=100) == "old"
    clock.advance(11)
    assert cache.get_or_set("k", function, expire=10, stale=100) == "old"
    assert cache.get_or_set("k", function, expire=10) == "new"
    eventually(lambda: is_idle(cache))
    assert function.calls == 2


def test_stale_is_bounded_by_both(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("short", lambda: 1, expire=10, stale=5)
    cache.get_or_set("long", lambda: 1, expire=10, stale=1000)
    cache.get_or_set("none", lambda: 1, expire=10)
    clock.advance(20)
    assert cache.get_or_set("short", lambda: 2, expire=10, stale=1000) == 2
    assert cache.get_or_set("long", lambda: 2, expire=10, stale=5) == 2
    assert cache.get_or_set("none", lambda: 2, expire=10, stale=1000) == 2


def test_stale_is_served_on_when_computing_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    cache, function = make(), Counted("old", Odd("down"), Odd("down"), "new")
    ask = lambda: cache.get_or_set("k", function, expire=10, stale=100)  # noqa: E731
    assert ask() == "old"
    clock.advance(11)
    began = time.monotonic()
    for _ in range(20):
        assert ask() == "old"
        eventually(lambda: is_idle(cache))
    if time.monotonic() - began < 0.2:
        assert function.calls == 2, "it is not tried again and again"
    eventually(lambda: ask() == "new")
    assert function.calls == 4 and cache.stats().computing["failed_refreshes"] == 2
    lines = [record.message for record in caplog.records if "cannot be computed anew" in record.message]
    assert len(lines) == 1 and "'k'" not in lines[0] and "Odd: down" in lines[0]


def test_after_its_stale_time_errors_are_raised(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache, function = make(), Counted("old", Odd("down"))
    assert cache.get_or_set("k", function, expire=10, stale=10) == "old"
    clock.advance(25)
    with pytest.raises(Odd):
        cache.get_or_set("k", function, expire=10, stale=10)


def test_what_is_not_kept_is_not_computed_again_and_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is down and returns None, which the condition refuses."""
    clock = Clock(monkeypatch)
    cache, function = make(), Counted("old", None)
    ask = cache.memoize(name="f", expire=10, stale=100, condition=lambda result: result is not None)(function)
    assert ask() == "old"
    clock.advance(11)
    began = time.monotonic()
    for _ in range(20):
        assert ask() == "old"
        eventually(lambda: is_idle(cache))
    if time.monotonic() - began < 0.2:
        assert function.calls == 2
    assert cache.stats().computing["failed_refreshes"] == 0


def test_pop_removes_what_could_still_be_served(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("k", lambda: "old", expire=10, stale=100)
    clock.advance(11)
    deletes = cache.stats().deletes
    assert cache.pop("k", "nothing") == "nothing" and cache.stats().deletes == deletes
    assert cache.get_or_set("k", lambda: "new", expire=10, stale=100) == "new"


@pytest.mark.parametrize("change", ["modify", "incr", "decr", "touch", "set_meta"])
def test_changes_keep_the_stale_time(make: Make, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("k", lambda: 5, expire=10, stale=100)
    changes: dict[str, Any] = {
        "modify": lambda: cache.modify("k", lambda n: n + 1), "incr": lambda: cache.incr("k"),
        "decr": lambda: cache.decr("k"), "touch": lambda: cache.touch("k", 10), "set_meta": lambda: cache.set_meta("k", 1),
    }  # fmt: skip
    changes[change]()
    now = cache.get("k")
    clock.advance(11)
    assert cache.get("k") is None
    assert cache.get_or_set("k", Counted(Odd("down")), expire=10, stale=100) == now
    clock.advance(101)
    with pytest.raises(Odd):
        cache.get_or_set("k", Counted(Odd("down")), expire=10, stale=100)


@pytest.mark.parametrize("on_unreadable", ["error", "miss"])
def test_an_old_value_of_another_serializer_is_not_overwritten(
    make: Make, monkeypatch: pytest.MonkeyPatch, on_unreadable: str
) -> None:
    clock = Clock(monkeypatch)
    theirs = make(serializer=PickleSerializer(b"secret"))
    theirs.get_or_set("k", lambda: Odd, expire=10, stale=100)
    clock.advance(11)
    ours = make(on_unreadable=on_unreadable)
    if on_unreadable == "error":
        with pytest.raises(SerializationError, match="'k'"):
            ours.get_or_set("k", lambda: "mine", expire=10, stale=100)
    else:
        assert ours.get_or_set("k", lambda: "mine", expire=10, stale=100) == "mine"
    assert theirs.get_or_set("k", Counted(Odd("down")), expire=10, stale=100) is Odd


def test_a_refresh_that_ends_after_close_is_nobodys_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    cache, go = make(), threading.Event()
    calls: list[int] = []

    def function() -> int:
        calls.append(1)
        assert len(calls) == 1 or go.wait(30)
        return len(calls)

    cache.get_or_set("k", function, expire=10, stale=100)
    clock.advance(11)
    assert cache.get_or_set("k", function, expire=10, stale=100) == 1
    eventually(lambda: len(calls) == 2)
    flights = flights_of(cache)
    caplog.set_level(logging.DEBUG, logger="yatagarasu_cache")
    cache.close()
    go.set()
    eventually(lambda: not flights._refreshing)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("closed before" in record.getMessage() for record in caplog.records)


def test_a_process_ends_while_a_refresh_hangs(directory: Path) -> None:
    code = """
import sys, time
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
calls = []
def function():
    calls.append(1)
    if len(calls) > 1:
        time.sleep(1000)
    return 5
cache.get_or_set("k", function, expire=0.01, stale=100)
time.sleep(0.05)
assert cache.get_or_set("k", function, expire=0.01, stale=100) == 5
while len(calls) < 2:
    time.sleep(0.01)
cache.close()
print("end")
"""
    assert run_python(code, directory).strip() == "end"


def test_the_threads_of_refreshes_are_few(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache, go = make(), threading.Event()
    working: list[int] = []

    def function() -> int:
        working.append(1)
        assert go.wait(30)
        return 2

    for i in range(20):
        cache.get_or_set(i, lambda: 1, expire=10, stale=100)
    clock.advance(11)
    for i in range(20):
        assert cache.get_or_set(i, function, expire=10, stale=100) == 1
    eventually(lambda: len(working) == 4)
    time.sleep(0.05)
    assert len(working) == 4
    assert sum(thread.name == "yatagarasu-refresh" for thread in threading.enumerate()) == 4
    go.set()
    eventually(lambda: all(cache.get(i) == 2 for i in range(20)))
    eventually(lambda: not any(thread.name == "yatagarasu-refresh" for thread in threading.enumerate()))


def test_a_refresh_may_ask_for_whatever_asked_for_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no part of that computation, which does not wait for it."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("b", lambda: "old", expire=10, stale=100)
    clock.advance(11)

    def b() -> Any:
        return cache.get_or_set("a", lambda: "never")

    def a() -> Any:
        assert cache.get_or_set("b", b, expire=10, stale=100) == "old"
        time.sleep(0.1)
        return "a"

    assert cache.get_or_set("a", a) == "a"
    eventually(lambda: cache.get("b") == "a")


# -- early -------------------------------------------------------------------------------------


def test_early_refresh_by_chance(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    draws = [0.5]
    monkeypatch.setattr(steps.random, "random", lambda: 1.0 - draws[0])
    ticks = [0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: ticks.__setitem__(0, ticks[0] + 10**9) or ticks[0])
    cache, function = make(), Counted("v1", "v2", "v3")
    ask = lambda beta=1.0: cache.get_or_set("k", function, expire=100, refresh_early=beta)  # noqa: E731
    assert ask() == "v1"  # it took a second
    clock.advance(98)
    assert ask() == "v1"  # 0.7 s early at most
    eventually(lambda: is_idle(cache))
    assert function.calls == 1
    draws[0] = math.exp(-3)
    assert ask(0.5) == "v1"
    eventually(lambda: is_idle(cache))
    assert function.calls == 1
    assert ask(True) == "v1"  # 3 s early
    eventually(lambda: cache.get("k") == "v2" and is_idle(cache))
    assert ask() == "v2" and function.calls == 2  # from now on for 100 s
    cache.set("plain", 1, expire=100)
    clock.advance(99.9)
    assert cache.get_or_set("plain", function, expire=100, refresh_early=1e9) == 1
    eventually(lambda: is_idle(cache))
    assert function.calls == 2, "how long it took is not known"


def test_how_likely_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """delta * beta * -ln(u) >= what is left: with probability exp(-left / (delta * beta))."""
    clock = Clock(monkeypatch)
    cache = make()
    begun: list[int] = []
    monkeypatch.setattr(steps.Computing, "_refresh", lambda *_: begun.append(1))
    cache.get_or_set("k", lambda: 1, expire=1000, refresh_early=1.0)
    low, high, _ = cache._desk.identify("k")
    index = cache._store.current.index
    with cache._store.locks.index:
        at = index.find(low, high)
        word = index.words[at + 6]
        index.words[at + 6] = steps.f.pack_terms(word, 0, 2 * 10**9)
    clock.advance(998)
    for _ in range(2000):
        cache.get_or_set("k", lambda: 1, expire=1000, refresh_early=1.0)
    assert 600 < len(begun) < 900  # exp(-1) of them, or a little more: times are rounded
