"""Real processes that compute, lock, are killed, are stopped, fork: what is computed how often, and who waits."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, at_most, environment

from yatagarasu_cache import DiskCache, LockTimeout

APP = ROOT / "tests" / "apps" / "computing.py"
PATIENCE = 60.0
PASSES_WITHIN = 2.0  # seconds: 20 ms where the machine is free


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with at_most(150):
        yield


class Crew:
    """Processes that begin at once."""

    def __init__(self, directory: Path, log: Path, how: str, number: int = 4, *arguments: object) -> None:
        self.log = log
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(APP), str(directory), str(log), how, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
            )
            for _ in range(number)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def go(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def noted(self, what: str) -> list[tuple[int, str]]:
        """(process, key) of each line."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return [(int(pid), key) for kind, pid, key in lines if kind == what]

    def results(self) -> list[dict[str, int]]:
        found = []
        for process in self.processes:
            said, _ = process.communicate(timeout=PATIENCE)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0
                found.append(json.loads(said))
        return found


def eventually(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)
    return found


@pytest.mark.parametrize("how", ["threads", "tasks"])
def test_4_processes_of_50_compute_each_of_5_values_once(directory: Path, tmp_path: Path, how: str) -> None:
    DiskCache(directory).close()
    crew = Crew(directory, tmp_path / "log", how, 4, 50, 5, 0.2)
    crew.go()
    assert crew.results() == [{f"[{key}]": 10 for key in range(5)}] * 4
    assert sorted(key for _, key in crew.noted("begun")) == list("01234")


@pytest.mark.parametrize("how", ["threads", "tasks"])
def test_what_one_that_is_killed_was_computing_is_computed_once_more(directory: Path, tmp_path: Path, how: str) -> None:
    DiskCache(directory).close()
    crew = Crew(directory, tmp_path / "log", how, 4, 50, 5, 1.0)
    crew.go()
    eventually(lambda: len(crew.noted("begun")) == 5)
    victim, mine = Counter(pid for pid, _ in crew.noted("begun")).most_common(1)[0]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: len(crew.noted("begun")) == 5 + mine)
    assert time.monotonic() - killed < PASSES_WITHIN
    assert crew.results() == [{f"[{key}]": 10 for key in range(5)}] * 3
    begun = Counter(key for _, key in crew.noted("begun"))
    lost = {key for pid, key in crew.noted("begun") if pid == victim}
    assert begun == {key: 2 if key in lost else 1 for key in "01234"} and len(lost) == mine


def child(work: Callable[[], Any]) -> int:
    """A forked process that runs `work`; its id."""
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def holder(directory: Path, hold: Callable[[DiskCache, Callable[[], None]], Any]) -> int:
    """A process that has a handle of its own, and holds something until it is killed."""
    read, write = os.pipe()

    def wait() -> None:
        os.write(write, b".")
        time.sleep(1000)

    def work() -> None:
        with DiskCache(directory) as cache:
            hold(cache, wait)

    pid = child(work)
    os.close(write)
    assert os.read(read, 1) == b"."
    os.close(read)
    return pid


def computing(cache: DiskCache, wait: Callable[[], None]) -> None:
    cache.get_or_set("k", wait)


def locking(cache: DiskCache, wait: Callable[[], None]) -> None:
    with cache.lock("k"):
        wait()


def all_places(cache: DiskCache, wait: Callable[[], None]) -> None:
    pool = cache.semaphore("k", 2)
    with pool, pool:
        wait()


TAKEN: dict[str, tuple[Callable[..., None], Callable[[DiskCache, float | None], Any]]] = {
    "get_or_set": (computing, lambda cache, wait: cache.get_or_set("k", lambda: None, wait=wait)),
    "lock": (locking, lambda cache, wait: cache.lock("k", wait=wait).acquire()),
    "semaphore": (all_places, lambda cache, wait: cache.semaphore("k", 2, wait=wait).acquire()),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_a_killed_process_held_is_free(directory: Path, what: str) -> None:
    hold, take = TAKEN[what]
    pid = holder(directory, hold)
    try:
        with DiskCache(directory) as cache:
            with pytest.raises(LockTimeout, match="another process"):
                take(cache, 0.05)
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            take(cache, None)
            assert time.monotonic() - began < PASSES_WITHIN
    finally:
        end(pid)


@pytest.mark.parametrize("what", TAKEN)
def test_one_that_is_stopped_keeps_what_it_has(directory: Path, what: str) -> None:
    """Nobody can tell whether it goes on: `wait` is a bound."""
    hold, take = TAKEN[what]
    pid = holder(directory, hold)
    try:
        os.kill(pid, signal.SIGSTOP)
        with DiskCache(directory) as cache:
            began = time.monotonic()
            with pytest.raises(LockTimeout):
                take(cache, 0.2)
            assert time.monotonic() - began < 10
            assert cache.get_or_set("other", lambda: 1) == 1
    finally:
        end(pid)


def test_children_of_one_that_computes_do_not_keep_its_turn(directory: Path) -> None:
    """It is killed; what it has forked lives on."""

    def hold(cache: DiskCache, wait: Callable[[], None]) -> None:
        def compute() -> None:
            pids.append(child(lambda: time.sleep(1000)))
            os.write(told, f"{pids[0]}\n".encode())
            wait()

        pids: list[int] = []
        cache.get_or_set("k", compute)

    read, told = os.pipe()
    pid = holder(directory, hold)
    grandchild = int(os.read(read, 100))
    try:
        end(pid)
        with DiskCache(directory) as cache:
            assert cache.get_or_set("k", lambda: 1, wait=20) == 1
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_workers_forked_with_an_open_handle(directory: Path, tmp_path: Path) -> None:
    """As `gunicorn --preload` does."""
    log = tmp_path / "log"
    with DiskCache(directory) as cache:
        cache.get_or_set("before", lambda: 1)

        def compute() -> int:
            with open(log, "a") as file:
                file.write("x")
            time.sleep(0.3)
            return 5

        pids = [child(lambda: 1 / (cache.get_or_set("k", compute) == 5)) for _ in range(6)]
        assert cache.get_or_set("k", compute) == 5
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert log.read_text() == "x"


def task(cache: DiskCache, log: str, key: str) -> int:
    """With a handle that was pickled."""

    def compute() -> int:
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.3)
        return len(key)

    return cache.get_or_set(key, compute)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pools(directory: Path, tmp_path: Path, method: str) -> None:
    log = str(tmp_path / "log")
    context = multiprocessing.get_context(method)
    with DiskCache(directory) as cache, context.Pool(3) as pool:
        assert pool.starmap(task, [(cache, log, "key")] * 9, chunksize=1) == [3] * 9
    assert Path(log).read_text() == "x"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_within_the_function(directory: Path, tmp_path: Path, method: str) -> None:
    log = str(tmp_path / "log")
    context = multiprocessing.get_context(method)
    with DiskCache(directory) as cache:

        def compute() -> list[int]:
            with context.Pool(2) as pool:
                return pool.starmap(task, [(cache, log, key) for key in ("a", "bb", "a", "bb")], chunksize=1)

        assert cache.get_or_set("k", compute) == [1, 2, 1, 2]
        assert cache.get("k") == [1, 2, 1, 2] and not cache.lock("k").locked()
    assert Path(log).read_text() == "xx"


def test_throttled_processes(directory: Path, tmp_path: Path) -> None:
    """Of all of them together no more than so many begin in a period."""
    log = tmp_path / "log"

    def work() -> None:
        with DiskCache(directory) as cache:
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            call = cache.throttle(5, 0.5, name="call")(lambda: os.write(file, f"{time.time()}\n".encode()))
            for _ in range(5):
                call()

    pids = [child(work) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    times = sorted(map(float, log.read_text().split()))
    assert len(times) == 20
    # A call may begin some time after its turn has come, where the machine is busy.
    assert all(later - earlier > 0.35 for earlier, later in zip(times, times[5:], strict=False))
