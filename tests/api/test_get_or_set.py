"""`DiskCache.get_or_set`: computed once, by whomever; served, refreshed, refused."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import math
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from counted import Counted, Odd, eventually, flights_of, is_idle, locks_of
from helpers import Clock, Make, at_most, in_threads, run_python

from yatagarasu_cache import (
    ClosedError,
    DiskCache,
    LockTimeout,
    ReadOnlyError,
    Reentered,
    SerializationError,
    ValueTooLarge,
)
from yatagarasu_cache.computing import steps

pytestmark = pytest.mark.usefixtures("core")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with at_most(60):
        yield


# -- one caller --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"", b"x", None, False, 0, "", [], {"a": [1, None]}, b"y" * (3 << 20)])
def test_any_value_is_a_value(make: Make, value: Any) -> None:
    cache, function = make(), Counted(value)
    assert cache.get_or_set("k", function) == value
    assert cache.get_or_set("k", function) == value
    assert function.calls == 1 and cache.get("k", "missing") == value and is_idle(cache)


def test_it_is_stored_on_the_terms_given(make: Make) -> None:
    cache = make()
    cache.get_or_set("k", lambda: 1, expire=60, tag="t", meta={"m": 1})
    entry = cache.get_entry("k")
    assert entry is not None and (entry.tag, entry.meta) == ("t", {"m": 1})
    assert entry.expires is not None and 50 < entry.expires - time.time() <= 60
    cache.get_or_set("for ever", lambda: 1)
    entry = cache.get_entry("for ever")
    assert entry is not None and entry.expires is None


def test_uses_are_counted_as_gets(make: Make) -> None:
    cache = make()
    cache.get_or_set("k", lambda: 1)
    cache.get_or_set("k", lambda: 1)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (1, 1, 1)
    assert stats.computing == {"computed": 1, "shared": 0, "stale": 0, "failed_refreshes": 0, "unstored": 0}


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("k"), OSError(5, "x"), StopIteration(3), Odd(), TypeError("t"), MemoryError()])
def test_exceptions_come_as_they_are_and_are_never_stored(make: Make, error: Exception) -> None:
    cache, function = make(), Counted(error, 7)
    with pytest.raises(type(error)) as caught:
        cache.get_or_set("k", function)
    assert caught.value is error
    assert "k" not in cache and is_idle(cache)
    assert cache.get_or_set("k", function) == 7 and function.calls == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_ends_the_caller_ends_the_turn(make: Make, error: BaseException) -> None:
    cache, function = make(), Counted(error, 7)
    with pytest.raises(type(error)):
        cache.get_or_set("k", function)
    assert is_idle(cache) and cache.get_or_set("k", function) == 7


BAD: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "stale of nothing": ({"stale": 5}, ValueError),
    "early of nothing": ({"refresh_early": 1.0}, ValueError),
    "stale of never": ({"stale": 5, "expire": math.inf}, ValueError),
    "stale 0": ({"stale": 0, "expire": 5}, ValueError),
    "stale negative": ({"stale": -1, "expire": 5}, ValueError),
    "stale nan": ({"stale": math.nan, "expire": 5}, TypeError),
    "stale text": ({"stale": "5", "expire": 5}, TypeError),
    "stale True": ({"stale": True, "expire": 5}, TypeError),
    "early 0": ({"refresh_early": 0, "expire": 5}, ValueError),
    "early inf": ({"refresh_early": math.inf, "expire": 5}, ValueError),
    "early False": ({"refresh_early": False, "expire": 5}, TypeError),
    "early text": ({"refresh_early": "1", "expire": 5}, TypeError),
    "wait negative": ({"wait": -1}, ValueError),
    "wait text": ({"wait": "1"}, TypeError),
    "wait True": ({"wait": True}, TypeError),
    "expire 0": ({"expire": 0}, ValueError),
    "expire text": ({"expire": "5"}, TypeError),
    "tag": ({"tag": object()}, SerializationError),
    "meta": ({"meta": object()}, SerializationError),
    "meta too large": ({"meta": b"x" * (2 << 20)}, ValueTooLarge),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_before_anything_is_computed(make: Make, name: str) -> None:
    options, kind = BAD[name]
    cache, function = make(), Counted(1)
    with pytest.raises(kind, match=name.partition(" ")[0].replace("early", "refresh_early")):
        cache.get_or_set("k", function, **options)
    assert not function.calls and is_idle(cache)


def test_stale_of_what_never_expires_is_told_of_a_hit_too(make: Make) -> None:
    cache = make()
    cache.set("k", 1)
    with pytest.raises(ValueError, match="stale"):
        cache.get_or_set("k", lambda: 1, stale=5)
    assert cache.get_or_set("k", lambda: 1, stale=5, expire=5) == 1
    with make(default_expire=10) as other:
        assert other.get_or_set("k", lambda: 1, stale=5) == 1


def test_what_is_no_function_is_refused(make: Make) -> None:
    cache = make()
    with pytest.raises(TypeError, match="function must be callable"):
        cache.get_or_set("k", 5)  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="key"):
        cache.get_or_set(object(), lambda: 1)  # type: ignore[arg-type]

    async def coroutine() -> int:
        return 1

    with pytest.raises(TypeError, match="AsyncDiskCache"):
        cache.get_or_set("k", coroutine)
    assert is_idle(cache)


def test_default_expire_counts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(default_expire=10)
    assert cache.get_or_set("k", lambda: 1, stale=5) == 1
    clock.advance(11)
    assert cache.get("k") is None and cache.get_or_set("k", lambda: 2, stale=5) == 1


def test_what_cannot_be_stored_goes_to_its_caller(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cache = make(max_value_size=1000)
    thing = object()
    assert cache.get_or_set("a", lambda: thing) is thing
    assert cache.get_or_set("a", lambda: thing) is thing
    assert cache.get_or_set("b", lambda: b"x" * 5000) == b"x" * 5000
    assert len(cache) == 0 and cache.stats().computing["unstored"] == 3
    lines = [record.message for record in caplog.records if "cannot be stored" in record.message]
    assert len(lines) == 1 and "'a'" not in lines[0]  # keys are the application's


def test_a_full_cache_gives_the_result(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cache = make(size_limit=1 << 20, eviction="none")
    for i in range(200):
        assert cache.get_or_set(i, lambda i=i: bytes([i]) * 20_000) == bytes([i]) * 20_000  # type: ignore[misc]
    assert 0 < len(cache) < 200 and cache.stats().computing["unstored"] == 200 - len(cache)


def test_another_serializers_value_is_left_alone(make: Make) -> None:
    cache = make(serializer="pickle")
    cache.set("k", {1, (2, 3)})
    other = make()
    function = Counted(5)
    with pytest.raises(SerializationError, match="pickle"):
        other.get_or_set("k", function)
    assert not function.calls and cache.get("k") == {1, (2, 3)} and is_idle(other)


def test_a_reader_gets_what_is_there_and_computes_nothing(make: Make, directory: Path) -> None:
    with make() as cache:
        cache.set("k", 1)
    reader, function = make(read_only=True), Counted(5)
    assert reader.get_or_set("k", function) == 1
    with pytest.raises(ReadOnlyError, match="compute a value"):
        reader.get_or_set("missing", function)
    for method in (lambda: reader.lock("k"), lambda: reader.semaphore("k", 2), lambda: reader.throttle(1, 1)):
        with pytest.raises(ReadOnlyError):
            method()
    assert not function.calls


def test_after_close(make: Make) -> None:
    cache = make()
    cache.get_or_set("k", lambda: 1)
    cache.close()
    with pytest.raises(ClosedError):
        cache.get_or_set("k", lambda: 1)
    with pytest.raises(ClosedError):
        cache.get_or_set("other", lambda: 1)


def test_closed_by_the_function_itself(make: Make) -> None:
    cache = make()

    def function() -> int:
        cache.close()
        return 5

    assert cache.get_or_set("k", function) == 5
    with make() as again:
        assert again.get("k") is None and again.get_or_set("k", lambda: 6) == 6


def test_asyncio_is_not_loaded_for_it(directory: Path) -> None:
    code = """
import sys
from yatagarasu_cache import DiskCache
with DiskCache(sys.argv[1]) as cache:
    assert cache.get_or_set("k", lambda: 1, expire=5, stale=5, refresh_early=1.0) == 1
    assert cache.get_or_set("k", lambda: 1, expire=5, stale=5, refresh_early=1.0) == 1
    with cache.lock("k"), cache.semaphore("k", 2):
        cache.throttle(5, 1)(max)(1, 2)
print(*{"asyncio", "concurrent.futures", "json", "multiprocessing", "ssl"} & sys.modules.keys())
"""
    assert run_python(code, directory).split() == []


# -- several at once ---------------------------------------------------------------------------


def test_threads_compute_once_and_share_the_object(make: Make) -> None:
    cache, function = make(), Counted({"a": 1}, takes=0.2)
    found: list[Any] = []
    in_threads(20, lambda _: found.append(cache.get_or_set("k", function)))
    assert function.calls == 1 and len(found) == 20
    assert all(one is found[0] or one == found[0] for one in found)
    assert cache.stats().computing["computed"] == 1 and is_idle(cache)


def test_handles_of_other_settings_share_it_too(make: Make) -> None:
    """Stores of their own, on one directory."""
    caches = [make(), make(lock_timeout=7.0), make(max_value_size=1 << 20)]
    function = Counted(object(), takes=0.2)
    found: list[Any] = []
    in_threads(12, lambda n: found.append(caches[n % 3].get_or_set("k", function)))
    assert function.calls == 1 and len({id(one) for one in found}) == 1


@pytest.mark.usefixtures("apart")
def test_processes_compute_once(make: Make) -> None:
    """Handles that share nothing stand for processes."""
    caches = [make() for _ in range(4)]
    function = Counted([1, 2], takes=0.2)
    found: list[Any] = []
    in_threads(12, lambda n: found.append(caches[n % 4].get_or_set("k", function)))
    assert function.calls == 1 and found == [[1, 2]] * 12
    assert all(map(is_idle, caches))


def test_waiters_get_the_very_exception(make: Make) -> None:
    cache, function = make(), Counted(ValueError("no"), takes=0.2)
    errors: list[BaseException] = []

    def ask(_: int) -> None:
        try:
            cache.get_or_set("k", function)
        except ValueError as error:
            errors.append(error)

    in_threads(12, ask)
    assert function.calls == 1 and {id(error) for error in errors} == {id(function.results[0])}
    depth = len(traceback.extract_tb(errors[0].__traceback__))
    assert depth < 15, "it grows with each who raises it"
    assert is_idle(cache)


@pytest.mark.usefixtures("apart")
def test_in_another_process_the_turn_passes_on(make: Make) -> None:
    one, other = make(), make()
    began = threading.Event()

    def fails() -> None:
        began.set()
        time.sleep(0.1)
        raise Odd("first")

    def first() -> None:
        with contextlib.suppress(Odd):
            one.get_or_set("k", fails)

    thread = threading.Thread(target=first)
    thread.start()
    assert began.wait(10)
    assert other.get_or_set("k", lambda: "second") == "second"
    thread.join()
    assert one.get_or_set("k", fails) == "second"


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop, GeneratorExit])
def test_an_interrupted_owner_passes_the_turn(make: Make, error: type[BaseException]) -> None:
    cache = make()
    calls: list[int] = []
    found: list[Any] = []

    def function() -> int:
        calls.append(1)
        time.sleep(0.1)
        if len(calls) == 1:
            raise error
        return 5

    def ask(_: int) -> None:
        try:
            found.append(cache.get_or_set("k", function))
        except error:
            found.append(error)

    in_threads(8, ask)
    assert len(calls) == 2 and sorted(found, key=str)[:7] == [5] * 7 and found.count(error) == 1
    assert is_idle(cache)


def test_wait_is_a_bound(make: Make) -> None:
    cache = make()
    began, end = threading.Event(), threading.Event()

    def function() -> int:
        began.set()
        assert end.wait(30)
        return 5

    owner = threading.Thread(target=lambda: cache.get_or_set("k", function))
    owner.start()
    assert began.wait(10)
    for wait in (0, 0.05):
        with pytest.raises(LockTimeout, match=r"\(wait\) for the value of 'k'"):
            cache.get_or_set("k", lambda: 6, wait=wait)
    assert cache.get_or_set("other", lambda: 6, wait=0) == 6
    end.set()
    owner.join()
    assert cache.get_or_set("k", lambda: 6, wait=0) == 5


@pytest.mark.usefixtures("apart")
def test_wait_is_a_bound_among_processes(make: Make) -> None:
    one, other = make(), make()
    began, end = threading.Event(), threading.Event()

    def function() -> int:
        began.set()
        assert end.wait(30)
        return 5

    owner = threading.Thread(target=lambda: one.get_or_set("k", function))
    owner.start()
    assert began.wait(10)
    for wait in (0, 0.05):
        with pytest.raises(LockTimeout, match="another process"):
            other.get_or_set("k", lambda: 6, wait=wait)
    end.set()
    owner.join()
    assert is_idle(other) and other.get_or_set("k", lambda: 6) == 5


@pytest.mark.usefixtures("apart")
def test_an_owners_timeout_is_not_its_waiters(make: Make) -> None:
    """In one process some wait for a moment, others for as long as it takes."""
    busy, cache = make(), make()
    began, end = threading.Event(), threading.Event()

    def function() -> int:
        began.set()
        assert end.wait(30)
        return 5

    owner = threading.Thread(target=lambda: busy.get_or_set("k", function))
    owner.start()
    assert began.wait(10)
    found: list[Any] = []

    def ask(n: int) -> None:
        try:
            found.append(cache.get_or_set("k", lambda: 6, wait=0.1 if n % 2 else None))
        except LockTimeout:
            found.append("timeout")
        if found.count("timeout") == 3:
            end.set()

    in_threads(6, ask)
    owner.join()
    assert sorted(map(str, found)) == ["5"] * 3 + ["timeout"] * 3


@pytest.mark.usefixtures("apart")
def test_closed_while_it_waits_for_its_turn(make: Make) -> None:
    busy, cache = make(), make()
    began, end = threading.Event(), threading.Event()

    def function() -> int:
        began.set()
        assert end.wait(30)
        return 5

    owner = threading.Thread(target=lambda: busy.get_or_set("k", function))
    owner.start()
    assert began.wait(10)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            cache.get_or_set("k", lambda: 6)
        except BaseException as error:
            errors.append(error)

    waiter = threading.Thread(target=ask)
    waiter.start()
    eventually(lambda: flights_of(cache)._flights)
    time.sleep(0.02)
    cache.close()
    waiter.join(10)
    assert not waiter.is_alive() and [type(error) for error in errors] == [ClosedError]
    end.set()
    owner.join()


def test_closed_while_it_is_computed(make: Make) -> None:
    """Who waits has the result; the next one computes anew."""
    cache, other = make(), make()
    began, end = threading.Event(), threading.Event()

    def function() -> int:
        began.set()
        assert end.wait(30)
        return 5

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get_or_set("k", function))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert began.wait(10)
    time.sleep(0.05)
    cache.close()
    end.set()
    for thread in threads:
        thread.join(10)
    assert found == [5] * 4 and other.get("k") is None and is_idle(other)


def test_a_signal_handlers_exception_is_the_owners_alone(directory: Path) -> None:
    code = """
import signal, sys, threading, time
from yatagarasu_cache import DiskCache
def strike(*_):
    raise TimeoutError("late")
signal.signal(signal.SIGALRM, strike)
with DiskCache(sys.argv[1]) as cache:
    calls, found = [], []
    def function():
        calls.append(1)
        if len(calls) == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        for _ in range(50):
            time.sleep(0.01)
        return 5
    def other():
        while not calls:
            time.sleep(0.001)
        found.append(cache.get_or_set("k", function))
    thread = threading.Thread(target=other)
    thread.start()
    try:
        cache.get_or_set("k", function)
    except TimeoutError as error:
        found.append(str(error))
    thread.join()
print(found, len(calls))
"""
    assert run_python(code, directory).strip() == "['late', 5] 2"


# -- within the function -----------------------------------------------------------------------


def test_a_function_that_asks_for_itself(make: Make) -> None:
    cache = make()

    def function() -> Any:
        return cache.get_or_set("k", function)

    with pytest.raises(Reentered, match="'k'"):
        cache.get_or_set("k", function)
    assert is_idle(cache)


def test_over_other_keys_and_handles(make: Make) -> None:
    cache, other = make(), make(lock_timeout=7.0)

    def a() -> Any:
        return cache.get_or_set("b", b)

    def b() -> Any:
        return other.get_or_set("a", a)

    with pytest.raises(Reentered, match="'a'"):
        cache.get_or_set("a", a)
    assert is_idle(cache)

    def c() -> int:
        return cache.get_or_set("d", lambda: 1) + cache.get_or_set("e", lambda: cache.get_or_set("d", lambda: 5))

    assert cache.get_or_set("c", c) == 2


def test_over_other_threads(make: Make) -> None:
    """Each waits for the other: one of them, or both, is told."""
    cache = make()
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def function(other: str) -> Callable[[], Any]:
        def asks() -> Any:
            barrier.wait(10)
            return cache.get_or_set(other, lambda: 1)

        return asks

    def ask(n: int) -> None:
        mine, other = ("a", "b") if n else ("b", "a")
        try:
            cache.get_or_set(mine, function(other))
        except Reentered as error:
            errors.append(error)

    in_threads(2, ask)
    assert errors and is_idle(cache)


def test_in_a_thread_that_inherits_the_context(make: Make) -> None:
    cache = make()
    found: list[Any] = []

    def function() -> int:
        context = contextvars.copy_context()

        def inner() -> None:
            try:
                found.append(context.run(cache.get_or_set, "k", lambda: 1))
            except Reentered as error:
                found.append(type(error))

        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()
        return 5

    assert cache.get_or_set("k", function) == 5 and found == [Reentered]


def test_what_outlives_the_computation_is_not_refused(make: Make) -> None:
    cache = make()
    go, found = threading.Event(), []
    threads = []

    def function() -> int:
        context = contextvars.copy_context()

        def later() -> None:
            assert go.wait(10)
            found.append(context.run(cache.get_or_set, "k", lambda: 7))

        threads.append(threading.Thread(target=later))
        threads[0].start()
        return 5

    assert cache.get_or_set("k", function) == 5
    cache.delete("k")
    go.set()
    threads[0].join()
    assert found == [7]


def test_the_function_may_use_the_cache(make: Make) -> None:
    cache = make()

    def function() -> int:
        cache.set("k", 1)
        with cache.lock("k"):
            return cache.incr("n") + len(cache)

    assert cache.get_or_set("k", function) == 3 and cache.get("k") == 3


def test_an_interruption_within_the_functions_own_calls_leaves_no_lock(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nested call that was interrupted gives its locks back, though it was called by ours."""
    cache = make()
    real = cache._store.removal._remove_batch
    monkeypatch.setattr(cache._store.removal, "_remove_batch", lambda *_: _interrupted(cache))

    def function() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            cache.delete_many(["x"])
        monkeypatch.setattr(cache._store.removal, "_remove_batch", real)
        assert not cache._store.locks.are_mine()
        cache.set("y", [1])
        return cache.delete_many(["y"])

    cache.set("x", 1)
    assert cache.get_or_set("k", function) == 1


def _interrupted(cache: DiskCache) -> None:
    cache._store.locks.index.__enter__()
    raise KeyboardInterrupt


def test_nothing_is_kept_alive(make: Make) -> None:
    cache = make()

    class Big:
        pass

    alive: list[Any] = []
    gc.collect()

    def function() -> None:
        big = Big()
        alive.append(weakref.ref(big))
        raise ValueError

    gc.disable()
    try:
        for _ in range(3):
            with contextlib.suppress(ValueError):
                cache.get_or_set("k", function)
        assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()


# -- forks -------------------------------------------------------------------------------------


def test_a_child_forked_while_computing_has_nothing_of_it(make: Make, directory: Path) -> None:
    cache = make()

    def function() -> int:
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                assert is_idle(cache) and not cache.lock("mine").locked()
                assert cache.get_or_set("other", lambda: 1) == 1
                try:
                    cache.get_or_set("k", lambda: 6, wait=0.05)
                except LockTimeout:
                    status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        return 5

    assert cache.get_or_set("k", function) == 5 and cache.get("other") == 1 and is_idle(cache)


def test_a_child_that_returns_from_the_function(make: Make) -> None:
    """It goes on like its parent, and gives nothing back that is the parent's."""
    cache = make()
    read, write = os.pipe()
    pids: list[int] = []

    def function() -> int:
        pids.append(os.fork())
        if not pids[0]:
            return 6
        os.read(read, 1)  # the child has stored its own
        with pytest.raises(LockTimeout):
            _in_another_process(cache.directory)
        return 5

    value = cache.get_or_set("k", function)
    if not pids[0]:
        os.write(write, b"x" if value == 6 and is_idle(cache) else b"")
        os._exit(0)
    os.waitpid(pids[0], 0)
    assert value == 5 and cache.get("k") == 5


def _in_another_process(directory: str) -> None:
    code = """
import sys
from yatagarasu_cache import DiskCache, LockTimeout
with DiskCache(sys.argv[1]) as cache:
    cache.delete("k")
    try:
        cache.get_or_set("k", lambda: 1, wait=0)
    except LockTimeout:
        print("waits")
"""
    if run_python(code, directory).strip() == "waits":
        raise LockTimeout(0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="locks of open file descriptions")
def test_a_command_that_the_function_starts_keeps_no_turn(make: Make) -> None:
    cache = make()
    processes = []

    def function() -> int:
        processes.append(subprocess.Popen(["sleep", "30"], close_fds=False))
        raise Odd

    with pytest.raises(Odd):
        cache.get_or_set("k", function)
    try:
        assert not locks_of(cache).is_held(steps.Job(cache._desk, "k", function, steps.Terms()).position)
    finally:
        processes[0].kill()
        processes[0].wait()
