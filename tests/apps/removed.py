"""Processes at work on a cache whose files somebody removes again and again.

    python removed.py DIRECTORY [--how directory|inside|some|moved] [--seconds 30] [--processes 6]
                      [--backend threads|uring] [--seed N]

`directory`: the cache directory as a whole; `inside`: what is in it; `some`: a random part of the files and
directories; `moved`: it is moved away, and now and then another process begins a new cache in its place.
Nothing may be raised but transient errors of the operating system, and no value may be wrong, meanwhile;
afterwards all handles have to be in one cache, and what they count has to be exact. The exit status is 0 then.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yatagarasu_cache import DiskCache

KEYS = 300
COUNTS = 200
LIMIT = 8 << 20
PATIENCE = 60.0  # seconds for a step of all processes
SETTLED = 0.2  # seconds after which every handle has looked whether its files are in their places
STALE = 1.1  # seconds for which values that are only read may come from files that were removed


def value_of(key: str, pick: random.Random) -> bytes:
    return f"{key}:".encode() * pick.choice((1, 10, 100, 400, 3000, 40000))


def is_right(key: str, value: object) -> bool:
    """Whether it was stored under this key at some time."""
    unit = f"{key}:".encode()
    return isinstance(value, bytes) and value == unit * (len(value) // len(unit))


# -- those that remove --------------------------------------------------------------------------


def remove_directory(directory: Path, pick: random.Random) -> None:
    shutil.rmtree(directory)


def remove_inside(directory: Path, pick: random.Random) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_some(directory: Path, pick: random.Random) -> None:
    share = pick.choice((0.1, 0.5, 0.9))
    for path in sorted(directory.rglob("*"), reverse=True):
        if pick.random() < share:
            with contextlib.suppress(OSError):  # a directory that is not empty
                path.rmdir() if path.is_dir() else path.unlink()


def move_away(directory: Path, pick: random.Random) -> None:
    aside = directory.with_name(f"{directory.name}-{time.monotonic_ns()}")
    directory.rename(aside)
    if pick.random() < 0.5:
        DiskCache(directory, size_limit=LIMIT).close()
    time.sleep(0.1)
    shutil.rmtree(aside, ignore_errors=True)


WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "directory": remove_directory, "inside": remove_inside, "some": remove_some, "moved": move_away,
}  # fmt: skip


# -- those that work ----------------------------------------------------------------------------


class Worker:
    """One process: it works until it is told otherwise, then each step as it is asked for."""

    def __init__(self, number: int, options: argparse.Namespace, steps: int, done: int) -> None:
        self.number, self.options, self.steps, self.done = number, options, steps, done
        self.pick = random.Random(options.seed * 1000 + number)
        self.problems: Counter[str] = Counter()
        self.cache = self.opened()

    def opened(self) -> DiskCache:
        # Of two sizes of large values: values have files of their own in one, and have not in the other.
        large = 30_000 if self.number % 2 else 65_536
        while True:
            cache: DiskCache | None = self.attempt(
                DiskCache, self.options.directory, size_limit=LIMIT, large_value_size=large,
                backend=self.options.backend,
            )  # fmt: skip
            if cache is not None:
                return cache

    def attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:
            if not self.problems[repr(error)]:
                traceback.print_exc()
            self.problems[repr(error)] += 1

    def operate(self) -> None:
        pick, cache, attempt = self.pick, self.cache, self.attempt
        key = f"key-{pick.randrange(KEYS)}"
        value = value_of(key, pick)
        what = pick.choices(
            ("set", "get", "delete", "incr", "add", "many", "pop", "touch", "list", "reopen", "stats", "flush"),
            (40, 30, 10, 10, 3, 2, 2, 1, 1, 1, 1, 1),
        )[0]
        if what == "set":
            attempt(cache.set, key, value)
        elif what == "get":
            found = attempt(cache.get, key)
            if found is not None and not is_right(key, found):
                self.problems[f"a wrong value of {key}"] += 1
        elif what == "add":
            attempt(cache.add, key, value)
        elif what == "many":
            keys = [f"key-{pick.randrange(KEYS)}" for _ in range(5)]
            attempt(cache.set_many, {key: value_of(key, pick) for key in keys})
        elif what == "touch":
            attempt(cache.touch, key, 100)
        elif what == "list":
            attempt(list, cache)
        elif what == "reopen":
            attempt(cache.close)
            self.cache = self.opened()
        elif what in ("stats", "flush"):
            attempt(getattr(cache, what))
        else:
            attempt(getattr(cache, what), "count" if what == "incr" else key)

    def run(self) -> None:
        while not select.select([self.steps], [], [], 0)[0]:
            self.operate()
        os.read(self.steps, 1)
        numbers = range(self.options.processes)
        self.next_step()
        self.attempt(self.cache.set, f"settled-{self.number}", b"")
        time.sleep(SETTLED)
        self.attempt(self.cache.set, f"mine-{self.number}", self.number)
        self.next_step()
        if any(self.attempt(self.cache.get, f"mine-{n}") != n for n in numbers):
            time.sleep(STALE)
            [self.attempt(self.cache.get, f"mine-{n}") for n in numbers]
        apart = [n for n in numbers if self.attempt(self.cache.get, f"mine-{n}") != n]
        if apart:
            self.problems[f"what {apart} have stored is not seen"] += 1
        for _ in range(COUNTS):
            self.attempt(self.cache.incr, "exact")
        self.next_step()
        if (counted := self.attempt(self.cache.get, "exact")) != COUNTS * len(numbers):
            self.problems[f"{counted} counted of {COUNTS * len(numbers)}"] += 1
        self.next_step()
        self.attempt(self.cache.close)

    def next_step(self) -> None:
        """Say that this one is done, and wait for the next."""
        os.write(self.done, b".")
        os.read(self.steps, 1)


def begin(number: int, options: argparse.Namespace) -> tuple[int, int, int]:
    """(process, where it is told to go on, where it says that it is done)"""
    steps, tell = os.pipe()
    done, say = os.pipe()
    pid = os.fork()
    if pid:
        os.close(steps)
        os.close(say)
        return pid, tell, done
    status = 1
    try:
        faulthandler.register(signal.SIGUSR1)
        worker = Worker(number, options, steps, say)
        worker.run()
        for problem, times in worker.problems.items():
            print(f"process {number}: {problem} ({times} times)", file=sys.stderr)
        status = int(bool(worker.problems))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(workers: list[tuple[int, int, int]]) -> None:
    for pid, _, done in workers:
        if not select.select([done], [], [], PATIENCE)[0]:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)
            for other, _, _ in workers:
                os.kill(other, signal.SIGKILL)
            sys.exit("a process hangs")
        os.read(done, 1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--how", choices=WAYS, default="directory")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--backend", default="threads")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    logging.disable()
    print(f"seed {options.seed}")
    sys.stdout.flush()
    workers = [begin(number, options) for number in range(options.processes)]
    pick, end = random.Random(options.seed), time.monotonic() + options.seconds
    while time.monotonic() < end:
        time.sleep(pick.choice((0.001, 0.01, 0.05, 0.2, 0.5)))
        with contextlib.suppress(OSError):  # something was made in what is removed just now
            WAYS[options.how](options.directory, pick)
    for _ in range(4):
        for _, tell, _ in workers:
            os.write(tell, b".")
        wait_for(workers)
    for _, tell, _ in workers:
        os.write(tell, b".")
    ends = [os.waitpid(pid, 0)[1] for pid, _, _ in workers]
    status = int(any(ends))
    with DiskCache(options.directory, backend=options.backend) as cache:
        cache.check(fix=True)  # entries whose files were removed
        if left := cache.check():
            print(f"problems are left: {left[:5]}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
