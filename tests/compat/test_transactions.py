"""`transact`: nobody else changes the directory meanwhile, of whatever process, however that ends."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import at_most, environment, in_threads

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import DiskCache

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def in_time() -> Any:
    with at_most(60):
        yield


HOLDER = """
import sys, time
import yatagarasu_cache.compat.diskcache as dc
cache = dc.Cache(sys.argv[1])
with cache.transact():
    cache["held"] = True
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(place: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(place), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_others_wait_and_readers_do_not(make: Make, place: Path) -> None:
    cache = make(timeout=0.1)
    cache["k"] = 1
    process = holder(place, 4.0)
    assert cache["k"] == 1 and cache["held"] is True and list(cache) == ["k", "held"] and "k" in cache
    for change in (
        lambda: cache.set("k", 2), lambda: cache.add("new", 2), lambda: cache.incr("k"), lambda: cache.pop("k"),
        lambda: cache.delete("k"), lambda: cache.touch("k", 5), lambda: cache.push(1), lambda: cache.pull(),
        lambda: cache.evict("t"), lambda: cache.expire(), lambda: cache.clear(), lambda: cache.transact().__enter__(),
    ):  # fmt: skip
        with pytest.raises(dc.Timeout):
            change()
    assert cache["k"] == 1
    with DiskCache(place) as plain:  # whose lock it is not
        plain["mine"] = 1
    cache["k"] = 2  # tries again and again
    assert process.wait(20) == 0 and cache["k"] == 2


def test_a_fanout_cache_says_that_it_has_failed(make: Make, place: Path) -> None:
    cache = make(dc.FanoutCache)
    cache["k"] = 1
    process = holder(place, 2.0)
    assert cache.set("k", 2) is False and cache.add("new", 2) is False and cache.incr("k") is None
    assert cache.pop("k", "default") == "default" and cache.delete("k") is False and cache.touch("k") is False
    assert cache.get("k") == 1 and cache.set("k", 2, retry=True) and cache["k"] == 2
    assert process.wait(20) == 0


def test_it_ends_with_its_process(make: Make, place: Path) -> None:
    cache = make(timeout=20)
    process = holder(place, 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    cache["k"] = 1
    assert time.monotonic() - began < 5 and cache["held"] is True


def test_it_is_reentrant_and_undoes_nothing(cache: dc.Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.transact(), cache.transact():
        cache["a"] = 1
        cache.push("b")
        1 / 0  # noqa: B018
    assert cache["a"] == 1 and len(cache) == 2
    with cache.transact(retry=True):
        cache.clear()


def test_threads_count_right(make: Make) -> None:
    caches = [make(), make()]

    def count(n: int) -> None:
        for _ in range(50):
            with caches[n % 2].transact():
                value = caches[n % 2].get("n", 0)
                caches[n % 2]["n"] = value + 1

    in_threads(4, count)
    assert caches[0]["n"] == 200


COUNTER = """
import sys
import yatagarasu_cache.compat.diskcache as dc
cache = dc.Cache(sys.argv[1])
for _ in range(100):
    with cache.transact(retry=True):
        cache["n"] = cache.get("n", 0) + 1
    cache.incr("m")
    cache.push(1)
"""


def test_processes_count_right(make: Make, place: Path) -> None:
    command = [sys.executable, "-c", COUNTER, str(place)]
    processes = [subprocess.Popen(command, env=environment()) for _ in range(4)]
    assert [process.wait(50) for process in processes] == [0] * 4
    cache = make()
    assert cache["n"] == cache["m"] == 400 and len(cache) == 402
    assert sum(1 for _ in iter(lambda: cache.pull()[0], None)) == 400


def test_who_wants_it_alone_gets_it_among_many_who_store(make: Make, place: Path) -> None:
    cache, end = make(), threading.Event()

    def store(n: int) -> None:
        other, i = make(), 0
        while not end.is_set():
            other[n, i % 10] = i
            i += 1

    threads = [threading.Thread(target=store, args=(n,)) for n in range(3)]
    [thread.start() for thread in threads]
    try:
        for _ in range(20):
            began = time.monotonic()
            with cache.transact():
                assert time.monotonic() - began < 20
                seen = {key: cache[key] for key in cache}
                time.sleep(0.002)
                assert {key: cache[key] for key in cache} == seen
    finally:
        end.set()
        [thread.join() for thread in threads]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_nothing_of_it(make: Make, place: Path) -> None:
    cache = make(timeout=5)
    with cache.transact():
        cache["k"] = 1
        child = os.fork()
        if not child:
            code = 1
            try:
                cache["child"] = 1  # waits for the parent's
                code = 0
            finally:
                os._exit(code)
        time.sleep(0.2)
        assert "child" not in cache
    assert os.waitpid(child, 0)[1] == 0 and cache["child"] == 1


# -- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dc.Cache, dc.FanoutCache])
def test_recipes(make: Make, kind: Any) -> None:
    cache = make(kind)
    average = dc.Averager(cache, "average")
    assert average.get() is None
    [average.add(n) for n in (1, 2, 6)]
    assert average.get() == 3 and dc.Averager(cache, "average").pop() == 3 and average.pop() is None
    lock = dc.Lock(cache, "lock", expire=60, tag="t")
    with lock:
        assert lock.locked() and "lock" in cache
    assert not lock.locked()
    rlock = dc.RLock(cache, "rlock")
    with rlock, rlock:
        pass
    with pytest.raises(AssertionError, match="un-acquired"):
        rlock.release()
    semaphore = dc.BoundedSemaphore(cache, "semaphore", value=2)
    with semaphore, semaphore:
        assert cache["semaphore"] == 0
    with pytest.raises(AssertionError, match="un-acquired"):
        semaphore.release()


@pytest.mark.parametrize("factory", [dc.Lock, dc.RLock, dc.BoundedSemaphore])
def test_barriers(cache: dc.Cache, factory: Any) -> None:
    inside: list[int] = []
    most: list[int] = []

    @dc.barrier(cache, factory)
    def work(n: int) -> int:
        inside.append(n)
        most.append(len(inside))
        time.sleep(0.005)
        inside.remove(n)
        return n

    in_threads(4, work)
    assert max(most) == 1 and len(most) == 4


def test_throttle(cache: dc.Cache) -> None:
    times: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    @dc.throttle(cache, 2, 1, time_func=lambda: clock[0], sleep_func=sleep)
    def work() -> None:
        times.append(clock[0])

    for _ in range(8):
        work()
    assert times[:2] == [0, 0] and times[-1] == pytest.approx(3.0)


def test_a_stampede_is_avoided(cache: dc.Cache) -> None:
    calls: list[float] = []

    @dc.memoize_stampede(cache, 0.3, tag="t")
    def work(n: int) -> int:
        calls.append(time.monotonic())
        time.sleep(0.02)
        return n

    began = time.monotonic()
    while time.monotonic() - began < 1:
        assert work(5) == 5
    assert 2 <= len(calls) <= 60 and work.__cache_key__(5) in cache  # type: ignore[attr-defined]


def test_a_fork_without_hooks(tmp_path: Path) -> None:
    """As uWSGI does it: the child must not give back what its parent holds."""
    code = """
import ctypes, os, sys, time
import yatagarasu_cache.compat.diskcache as dc
cache = dc.Cache(sys.argv[1], timeout=0.2)
with cache.transact():
    cache["k"] = 1
    child = ctypes.PyDLL(None).fork()
    if not child:
        code = 1
        try: cache.set("child", 1)
        except dc.Timeout: code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    other = dc.Cache(sys.argv[1], timeout=0.1)
    assert "child" not in cache
for n in range(20):
    child = ctypes.PyDLL(None).fork()
    for i in range(50):
        cache.incr("n", retry=True)
    if not child: os._exit(0)
    os.waitpid(child, 0)
assert cache["n"] == 2000, cache["n"]
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], env=environment(), timeout=100)
    assert done.returncode == 0


@pytest.mark.parametrize("kind", [dc.Cache, dc.FanoutCache])
def test_a_thread_that_closes_disturbs_no_other_one(make: Make, kind: Any) -> None:
    cache, end = make(kind), time.monotonic() + 2

    def work(n: int) -> None:
        i = 0
        while time.monotonic() < end:
            i += 1
            if n < 2:
                with cache:
                    cache[n, i % 10] = i
                continue
            cache[n, i % 10] = i
            assert cache[n, i % 10] == i and len(cache) and cache.volume() and (n, i % 10) in list(cache)
            assert cache.incr((n, "count"), retry=True) == i and cache.touch((n, "count"), retry=True)
            with cache.transact(retry=True):
                cache.pop((n, i % 10))

    in_threads(5, work)


def test_an_iteration_goes_on_after_a_close(cache: dc.Cache) -> None:
    for n in range(5):
        cache[n] = object
    keys = iter(cache)
    assert next(keys) == 0
    cache.close()
    assert list(keys) == [1, 2, 3, 4] and cache[4] is object


def test_closing_gives_files_back(cache: dc.Cache) -> None:
    cache["k"] = b"x" * 100_000
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        cache.close()
        assert cache["k"]
    assert len(os.listdir("/proc/self/fd")) <= before
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_caches_that_are_closed_leave_no_files_open(make: Make, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        cache = make(directory=tmp_path / str(n))
        with cache.transact():
            cache["k"] = 1
        cache.close()
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_threads_that_end_leave_no_files_open(cache: dc.Cache) -> None:
    in_threads(4, lambda n: cache.set(n, n))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        in_threads(4, lambda n: cache.set(n, n))
    assert len(os.listdir("/proc/self/fd")) < before + 4


def test_an_interruption_leaves_no_lock(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's handler runs when the system call returns: it was locked then."""
    cache, other = make(), make(timeout=0.5)
    cache["k"] = 1
    from yatagarasu_cache.compat.diskcache import gate

    def interrupted(fd: int, how: int) -> None:
        real(fd, how)
        if not how & gate.LOCK_UN:
            raise KeyboardInterrupt

    for change in (lambda: cache.set("k", 2), lambda: cache.transact().__enter__(), lambda: cache.push(1)):
        real = gate.flock
        with monkeypatch.context() as patch:
            patch.setattr(gate, "flock", interrupted)
            with pytest.raises(KeyboardInterrupt):
                change()

        def alone() -> None:
            with other.transact():
                assert other["k"] == 1

        in_threads(1, lambda n, alone=alone: alone())  # type: ignore[misc]


def test_a_directory_that_was_made_anew_has_a_lock_of_its_own(make: Make, place: Path) -> None:
    old = make()
    old["k"] = 1
    shutil.rmtree(place)
    cache = make(timeout=0.2)
    process = holder(place, 3.0)
    with pytest.raises(dc.Timeout):
        cache.set("k", 2)
    assert process.wait(20) == 0 and cache.set("k", 2) and cache["k"] == 2


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8, b"z" * 1000])
def test_a_lock_may_hold_anything(make: Make, place: Path, content: bytes) -> None:
    cache = make()
    cache["k"] = 1
    lock = os.stat(place / "transact.lock").st_ino
    (place / "transact.lock").write_bytes(content)  # cut off while it is in use
    cache["k"] = 2
    with cache.transact():
        assert cache.incr("k") == 3
    assert os.stat(place / "transact.lock").st_ino == lock and make().incr("k") == 4


def test_a_pipe_is_no_lock(make: Make, place: Path) -> None:
    make().close()
    (place / "transact.lock").unlink()
    os.mkfifo(place / "transact.lock")
    with pytest.raises(OSError, match="regular file"):
        make()


class Asking(io.BytesIO):
    """A file that uses the cache while it is read."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__(b"x" * 1000)
        self.ask = ask

    def read(self, size: int | None = -1, /) -> bytes:
        self.ask()
        return super().read(size)


@pytest.mark.parametrize("ask", ["set", "push", "transact"])
def test_what_is_stored_may_use_the_cache(make: Make, ask: str) -> None:
    cache, other, end = make(timeout=5), make(timeout=5), threading.Event()

    def use() -> None:
        with cache.transact() if ask == "transact" else contextlib.nullcontext():
            cache.push(1) if ask == "push" else cache.set("asked", 1)

    def want() -> None:
        while not end.is_set():
            with other.transact():
                pass

    thread = threading.Thread(target=want)
    thread.start()
    try:
        for n in range(20):
            assert cache.set(n, Asking(use), read=True)
    finally:
        end.set()
        thread.join()
    with other.transact():  # nothing of it is left
        assert len(cache[0]) == 1000
    cache["k"] = 1
    assert other.incr("k") == 2
