"""A cache under mixed work for a while, whose processes are killed, stopped, interrupted and forked.

    python -m perf.soak.faults [--minutes 10] [--processes 8] [--directory D] [--backend auto|threads|uring]
                               [--core c|python] [--seed N]

Every process has keys of its own, of which it alone stores new versions and everybody reads; it notes in
memory that all share which version it is about to store, and which it has stored. What a version is
follows from its number: a value of bytes, or of an object, small or large, one that expires, or none. So
whoever reads knows which versions may be there, and every byte of each; nothing has to be evicted, so
nothing that was stored may be missing. Counters that all share have to come to what was added, but for
additions under way when a process was killed or interrupted. The exit status is 1 if anything was wrong, a
method raised, a process hung (all its stacks are shown), `check()` found a problem in the end, or
descriptors or files were left over; else 0.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import faulthandler
import fcntl
import io
import logging
import mmap
import os
import random
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from perf.bed import KIB, MIB, scratch, value_of
from perf.work import descriptors
from yatagarasu_cache import AsyncDiskCache, DiskCache

LIMIT = 256 * MIB
KEYS = 64  # of each row: a process, or a child of one
COUNTERS = 8
LARGE_KEYS = 3  # of these some versions are as long as
LARGE = 3 * MIB
EXPIRE = 0.3  # seconds
TASKS = 4  # of a process that works through asyncio: one in four does
ROUNDS = 1 << 20  # of `add`, ten a second
PATIENCE = 60.0  # seconds within which a process that is not stopped gets on
BLOCK = value_of(LARGE + 64 * KIB)
PRESENT, EXPIRING, ABSENT = range(3)

Value = bytes | list[Any] | None


# -- versions -----------------------------------------------------------------------------------


def kind_of(version: int) -> int:
    if version % 8 == 0:
        return ABSENT
    return EXPIRING if version % 16 == 9 else PRESENT


def value_for(row: int, number: int, version: int) -> Value:
    """What this version of a key is, always the same."""
    if kind_of(version) == ABSENT:
        return None
    chance = zlib.crc32(b"%d:%d:%d" % (row, number, version))
    size = 2 ** (chance % 15) + chance % 97
    if number < LARGE_KEYS and chance % 5 == 0:
        size = LARGE - chance % MIB
    start = chance % (64 * KIB)
    value = b"%d:%d:%d:" % (row, number, version) + BLOCK[start : start + size]
    return [version, value] if number % 4 == 3 else value


def version_of(value: Value) -> int:
    """Which version a value says that it is; -1 if it says nothing."""
    data = value[1] if isinstance(value, list) else value
    try:
        return int(data.split(b":", 3)[2]) if isinstance(data, bytes) else -1
    except (ValueError, IndexError):
        return -1


def complaint(row: int, number: int, value: Value, least: int, most: int) -> str:
    """Why a value is none of the versions from `least` to `most`; "" if it is one."""
    if value is None:
        if any(kind_of(version) != PRESENT for version in range(least, most + 1)):
            return ""
        return f"missing, of versions {least} to {most}"
    version = version_of(value)
    if not least <= version <= most:
        return f"version {version}, of {least} to {most}"
    return "" if value == value_for(row, number, version) else f"wrong bytes of version {version}"


# -- what all share -----------------------------------------------------------------------------


class Row:
    """Words of one process, or child of one: it alone changes them, everybody reads them."""

    WORDS = 8 + 2 * KEYS + 2 * COUNTERS
    BEAT, PID, OPERATIONS, INTERRUPTS, FORKS = range(5)

    def __init__(self, number: int, words: memoryview) -> None:
        self.number, self.words = number, words
        self.stored = words[8 : 8 + KEYS]  # the version of each key, and the one that is stored just now
        self.storing = words[8 + KEYS : 8 + 2 * KEYS]
        self.added = words[8 + 2 * KEYS : 8 + 2 * KEYS + COUNTERS]
        self.adding = words[8 + 2 * KEYS + COUNTERS : self.WORDS]

    def beat(self) -> None:
        self.words[self.BEAT] = time.monotonic_ns()
        self.words[self.OPERATIONS] += 1

    def silence(self) -> float:
        """Seconds since it last began something; 0 if there is no such process."""
        return (time.monotonic_ns() - self.words[self.BEAT]) / 1e9 if self.words[self.PID] else 0.0


class Board:
    """Memory that all processes share, and a directory for what is told and locked."""

    STOP, PAUSE = range(2)

    def __init__(self, processes: int, directory: str) -> None:
        self.processes, self.directory = processes, Path(directory)
        rows = 2 * processes
        self.words = memoryview(mmap.mmap(-1, (8 + rows * Row.WORDS) * 8)).cast("Q")
        starts = range(8, 8 + rows * Row.WORDS, Row.WORDS)
        self.rows = [Row(i, self.words[at : at + Row.WORDS]) for i, at in enumerate(starts)]
        self.winners = mmap.mmap(-1, ROUNDS)  # of each round of `add`: how often it was won
        self.started = time.monotonic()
        self.problems = self.directory / "problems"

    def tell(self, text: str) -> None:
        with open(self.problems, "a", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")
        print(f"FAILED: {text}", file=sys.stderr, flush=True)

    def locked(self, name: str, how: int) -> int | None:
        """A descriptor of a file that is locked as long as it is open; None if it is locked already."""
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, how)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd


# -- work ---------------------------------------------------------------------------------------


class Direct:
    """A `DiskCache` with coroutines for methods, which never wait: the same work goes for both."""

    def __init__(self, cache: DiskCache) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.cache, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return method(*arguments, **options)

        return call


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("it waits")


class Work:
    """Operations by one row on some of its keys, each checked."""

    def __init__(self, board: Board, row: Row, cache: Any, pick: random.Random, numbers: Sequence[int]) -> None:
        self.board, self.row, self.cache, self.pick, self.numbers = board, row, cache, pick, numbers
        self.operations = (
            (self.change, 40), (self.change_many, 4), (self.look, 30), (self.look_many, 5), (self.count, 12),
            (self.touch, 4), (self.race, 4), (self.list, 0.2), (self.expire, 0.2), (self.stats, 0.3),
        )  # fmt: skip

    async def one(self) -> None:
        operations, weights = zip(*self.operations, strict=True)
        self.row.beat()
        await self.pick.choices(operations, weights)[0]()

    def name(self, number: int) -> tuple[str, int, int]:
        return "key", self.row.number, number

    def wrong(self, what: str) -> None:
        self.board.tell(f"row {self.row.number}, process {os.getpid()}: {what}")

    def compare(self, row: Row, number: int, value: Value, least: int, how: str) -> None:
        if found := complaint(row.number, number, value, least, row.storing[number]):
            self.wrong(f"{how} of key {number} of row {row.number}: {found}")

    async def settle(self) -> None:
        """Some changes were broken off: whatever came of them, there is a version of each key again."""
        for number in self.numbers:
            row = self.row
            if row.storing[number] != row.stored[number]:
                row.beat()
                value = await self.cache.get(self.name(number))
                self.compare(row, number, value, row.stored[number], "after it was broken off, get")
                version = row.storing[number] + 1
                version += kind_of(version) == ABSENT
                row.storing[number] = version
                await self.cache.set(self.name(number), value_for(row.number, number, version))
                row.stored[number] = version

    # Versions are noted before and after, so that a process may end between any two steps.

    async def change(self) -> None:
        row, number, pick = self.row, self.pick.choice(self.numbers), self.pick
        before, version = row.stored[number], row.storing[number] + 1
        name, kind, value = self.name(number), kind_of(version), value_for(row.number, number, version)
        row.storing[number] = version
        if kind == ABSENT:
            if pick.random() < 0.5:
                self.compare(row, number, await self.cache.pop(name), before, "pop")
            elif not await self.cache.delete(name) and kind_of(before) == PRESENT:
                self.wrong(f"nothing to delete of key {number}, version {before}")
        elif kind == EXPIRING:
            await self.cache.set(name, value, expire=EXPIRE)
        elif kind_of(before) == ABSENT and pick.random() < 0.5:
            if not await self.cache.add(name, value):
                self.wrong(f"no adding of key {number}, which version {before} has removed")
        elif isinstance(value, bytes) and pick.random() < 0.2:
            await self.cache.set(name, io.BytesIO(value))
        else:
            await self.cache.set(name, value, tag=pick.choice((None, "tag")), meta=pick.choice((None, version)))
        row.stored[number] = version

    async def change_many(self) -> None:
        row = self.row
        some = self.pick.sample(self.numbers, 6)
        versions = {n: v for n in some if kind_of(v := row.storing[n] + 1) == PRESENT}
        for number, version in versions.items():
            row.storing[number] = version
        await self.cache.set_many({self.name(n): value_for(row.number, n, v) for n, v in versions.items()})
        for number, version in versions.items():
            row.stored[number] = version

    async def look(self) -> None:
        row, number = self.pick.choice(self.board.rows), self.pick.randrange(KEYS)
        least = row.stored[number]
        name = "key", row.number, number
        if self.pick.random() < 0.9:
            value = await self.cache.get(name)
        else:
            value = None
            entry = await self.cache.get_entry(name)
            if entry is None:
                self.compare(row, number, None, least, "get_entry")
            return
        self.compare(row, number, value, least, "get")

    async def look_many(self) -> None:
        wanted = [(self.pick.choice(self.board.rows), self.pick.randrange(KEYS)) for _ in range(12)]
        least = [row.stored[number] for row, number in wanted]
        names = [("key", row.number, number) for row, number in wanted]
        found = await self.cache.get_many(names)
        for (row, number), name, version in zip(wanted, names, least, strict=True):
            self.compare(row, number, found.get(name), version, "get_many")

    async def count(self) -> None:
        row, counter, delta = self.row, self.pick.randrange(COUNTERS), self.pick.randint(1, 5)
        least = row.added[counter]
        row.adding[counter] += delta
        result = await self.cache.incr(("counter", counter), delta)
        row.added[counter] += delta
        if result < least + delta:
            self.wrong(f"counter {counter} is {result}, and {least} was added here alone")

    async def touch(self) -> None:
        number = self.pick.choice(self.numbers)
        version = self.row.stored[number]
        if not await self.cache.touch(self.name(number), 1e6) and kind_of(version) == PRESENT:
            self.wrong(f"nothing to touch of key {number}, version {version}")

    async def race(self) -> None:
        """All want to be the first to add the same entry."""
        turn = int((time.monotonic() - self.board.started) * 10) % ROUNDS
        if await self.cache.add(("round", turn), self.row.number, expire=100):
            self.board.winners[turn] += 1
            if self.board.winners[turn] > 1:
                self.wrong(f"round {turn} was won twice")

    async def list(self) -> None:
        cache = self.cache
        if isinstance(cache, Direct):
            for _ in cache.cache:
                pass
        else:
            async for _ in cache:
                pass

    async def expire(self) -> None:
        await self.cache.expire()

    async def stats(self) -> None:
        await self.cache.stats()


# -- processes ----------------------------------------------------------------------------------


class Process:
    """What one process does from its beginning to its end."""

    def __init__(self, board: Board, number: int, turn: int, options: argparse.Namespace) -> None:
        self.board, self.number, self.options = board, number, options
        self.row = board.rows[number]
        self.pick = random.Random(f"{options.seed} {number} {turn}")
        self.gate, self.driver = -1, os.getppid()
        self.interruptible = False
        self.child = 0

    def opened(self, kind: type[Any] = DiskCache) -> Any:
        return kind(self.options.directory, size_limit=LIMIT, backend=self.options.backend)

    def run(self) -> None:
        faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGINT, self.interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self.row.words[Row.PID] = os.getpid()
        self.row.beat()
        self.gate = os.open(self.board.directory / "gate", os.O_RDWR | os.O_CREAT, 0o600)
        if self.number % 4 == 3:
            asyncio.run(self.work_with_tasks())
        else:
            self.work()
        self.row.words[Row.PID] = 0

    def interrupt(self, *_: object) -> None:
        if self.interruptible:
            self.row.words[Row.INTERRUPTS] += 1
            raise KeyboardInterrupt

    @property
    def goes_on(self) -> bool:
        return not self.board.words[Board.STOP] and os.getppid() == self.driver

    @contextlib.contextmanager
    def let_in(self) -> Iterator[None]:
        """While nobody clears the cache."""
        fcntl.flock(self.gate, fcntl.LOCK_UN)  # an interruption may have left it locked
        while self.board.words[Board.PAUSE]:
            self.row.beat()
            time.sleep(0.001)
            if os.getppid() != self.driver:  # there is none any more
                os._exit(1)
        fcntl.flock(self.gate, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self.gate, fcntl.LOCK_UN)

    def work(self) -> None:
        """Interrupted, it goes on with what it has, or opens it anew."""
        least, cache = descriptors(), self.opened()
        while self.goes_on:
            try:
                self.interruptible = True
                with self.let_in():
                    finish(self.work_on(cache).settle())
                for _ in range(self.pick.randint(50, 1000)):
                    if not self.goes_on:
                        break
                    with self.let_in():
                        finish(self.work_on(cache).one())
                    if self.pick.random() < 0.003:
                        self.interruptible = False
                        self.fork(cache)
                        self.interruptible = True
                self.interruptible = False
            except KeyboardInterrupt:
                self.interruptible = False
                continue
            cache.close()
            left = descriptors() - least - self.row.words[Row.INTERRUPTS]  # each may leave one open
            if left > 0:
                self.board.tell(f"row {self.number}: {left} descriptors are left open")
            cache = self.opened()
        self.interruptible = False
        with self.let_in():
            finish(self.work_on(cache).settle())
        cache.close()
        if self.child:
            os.waitpid(self.child, 0)

    def work_on(self, cache: DiskCache) -> Work:
        return Work(self.board, self.row, Direct(cache), self.pick, range(KEYS))

    async def work_with_tasks(self) -> None:
        while self.goes_on:
            async with self.opened(AsyncDiskCache) as cache:
                parts = [range(task, KEYS, TASKS) for task in range(TASKS)]
                works = [Work(self.board, self.row, cache, self.pick, part) for part in parts]
                with self.let_in():
                    for work in works:
                        await work.settle()
                turns = self.pick.randint(50, 1000)
                while turns > 0 and self.goes_on:
                    turns -= 25
                    with self.let_in():  # the tasks all together: while one waits, the others don't
                        await asyncio.gather(*(self.some(work, 25 // TASKS) for work in works))

    async def some(self, work: Work, times: int) -> None:
        for _ in range(times):
            await work.one()

    def fork(self, cache: DiskCache) -> None:
        """A child that uses the handle which it has inherited, and ends in one way or another."""
        if self.child:
            if not os.waitpid(self.child, os.WNOHANG)[0]:
                return
            self.child = 0
        how, turns = self.pick.choice(("at once", "in order", "closed")), self.pick.randint(5, 100)
        self.child = os.fork()
        if self.child:
            self.row.words[Row.FORKS] += 1
            return
        with ending():
            lock = self.board.locked(f"row-{self.number}", fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is None:  # the child of one that was killed
                os._exit(0)
            self.row = self.board.rows[self.board.processes + self.number]
            self.row.words[Row.PID] = os.getpid()
            self.gate = os.open(self.board.directory / "gate", os.O_RDWR)
            self.child, self.driver = 0, os.getppid()
            work = self.work_on(cache)
            with self.let_in():
                finish(work.settle())
            for _ in range(turns):
                with self.let_in():
                    finish(work.one())
            self.row.words[Row.PID] = 0
            if how == "closed":
                cache.close()
            if how == "in order":
                atexit._run_exitfuncs()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """The whole of a child's life: nothing of the parent's is run after it."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Driver:
    """Begins the processes and makes them trouble."""

    def __init__(self, options: argparse.Namespace, directory: str) -> None:
        self.options = options
        self.board = Board(options.processes, directory)
        self.pick = random.Random(options.seed)
        self.pids: dict[int, int] = {}  # of each row that is at work
        self.stopped: dict[int, float] = {}  # until when
        self.counts: Counter[str] = Counter()

    def begin(self, number: int) -> None:
        self.counts["begun"] += 1
        self.board.rows[number].beat()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until it is prepared for that
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        else:
            with ending():
                Process(self.board, number, self.counts["begun"], self.options).run()
                atexit._run_exitfuncs()
        self.pids[number] = pid

    def run(self) -> None:
        self.board.started = time.monotonic()
        end = self.board.started + self.options.minutes * 60
        for number in range(self.options.processes):
            self.begin(number)
        clear_at = time.monotonic() + self.pick.uniform(5, 20)
        while time.monotonic() < end and not self.board.problems.exists():
            time.sleep(self.pick.uniform(0.01, 0.3))
            self.disturb(self.pick.choice(list(self.pids)))
            self.attend()
            if time.monotonic() > clear_at:
                self.clear()
                clear_at = time.monotonic() + self.pick.uniform(5, 60)
        self.end()

    def disturb(self, number: int) -> None:
        pid = self.pids[number]
        what = self.pick.choices(("kill", "stop", "interrupt"), (3, 3, 6))[0]
        self.counts[what] += 1
        if what == "kill":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.stopped.pop(number, None)
            self.begin(number)
        elif what == "stop":
            os.kill(pid, signal.SIGSTOP)
            self.stopped[number] = time.monotonic() + self.pick.uniform(0.01, 1.0)
        else:
            os.kill(pid, signal.SIGINT)

    def attend(self) -> None:
        """Let the stopped go on whose time has come, and see that all others do."""
        for number, until in list(self.stopped.items()):
            if time.monotonic() > until:
                self.let_go_on(number)
        for number, pid in list(self.pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.board.tell(f"process {pid} of row {number} has ended by itself")
                self.begin(number)
        for row in self.board.rows:
            if row.silence() > PATIENCE and row.number not in self.stopped:
                self.give_up(f"row {row.number} hangs")

    def let_go_on(self, number: int) -> None:
        del self.stopped[number]
        self.board.rows[number].beat()
        os.kill(self.pids[number], signal.SIGCONT)

    def give_up(self, why: str) -> NoReturn:
        """Show what everybody is doing, and end all."""
        self.board.tell(why)
        pids = [row.words[Row.PID] for row in self.board.rows if row.words[Row.PID]]
        for deed, pause in ((signal.SIGCONT, 0.0), (signal.SIGUSR1, 0.5), (signal.SIGKILL, 0.0)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, deed)
                time.sleep(pause)
        raise SystemExit(1)

    def clear(self) -> None:
        """Remove everything while nobody does anything; all know that."""
        for number in list(self.stopped):
            self.let_go_on(number)
        self.board.words[Board.PAUSE] = 1
        gate, begun = None, time.monotonic()
        while gate is None:
            self.attend()
            time.sleep(0.001)
            if time.monotonic() > begun + PATIENCE:
                self.give_up("somebody does not come to an end of what he does")
            gate = self.board.locked("gate", fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid = os.fork()
        if not pid:
            with ending():
                with DiskCache(self.options.directory, backend=self.options.backend) as cache:
                    cache.clear()
        if os.waitpid(pid, 0)[1]:
            self.board.tell("the cache could not be cleared")
        for row in self.board.rows:
            for number in range(KEYS):
                absent = row.storing[number] | 7
                row.storing[number] = row.stored[number] = absent + 1
            for counter in range(COUNTERS):
                row.adding[counter] = row.added[counter] = 0
        self.board.winners[:] = bytes(ROUNDS)
        self.board.words[Board.PAUSE] = 0
        os.close(gate)
        self.counts["cleared"] += 1

    def end(self) -> None:
        for number in list(self.stopped):
            self.let_go_on(number)
        self.board.words[Board.STOP] = 1
        while self.pids or any(row.words[Row.PID] for row in self.board.rows if self.lives(row)):
            for number, pid in list(self.pids.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del self.pids[number]
                    if status:
                        self.board.tell(f"the process of row {number} ended with status {status}")
            for row in self.board.rows:
                if self.lives(row) and row.silence() > PATIENCE:
                    self.give_up(f"row {row.number} hangs at the end")
            time.sleep(0.01)

    @staticmethod
    def lives(row: Row) -> bool:
        try:
            os.kill(row.words[Row.PID] or -(1 << 30), 0)
        except (ProcessLookupError, OverflowError):
            return False
        return True

    # -- what there is in the end -------------------------------------------------------------

    def look(self) -> None:
        """Everything is there, and nothing else; in a process of its own, which is alone."""
        board = self.board
        with DiskCache(self.options.directory, backend=self.options.backend) as cache:
            for problem in cache.check():
                board.tell(f"check: {problem}")
            for row in board.rows:
                for number in range(KEYS):
                    value = cache.get(("key", row.number, number))
                    least, most = row.stored[number], row.storing[number]
                    if found := complaint(row.number, number, value, least, most):
                        board.tell(f"in the end key {number} of row {row.number}: {found}")
            for counter in range(COUNTERS):
                least, most = (
                    sum(words[counter] for words in part)
                    for part in ([row.added for row in board.rows], [row.adding for row in board.rows])
                )
                if not least <= (counted := cache.get(("counter", counter), 0)) <= most:
                    board.tell(f"counter {counter} is {counted}, and should be {least} to {most}")
            stats = cache.stats()
            if stats.evictions or stats.corrupt:
                board.tell(f"{stats.evictions} evictions, {stats.corrupt} entries that fail their checksums")
        for name in ("tmp", "writers"):
            if left := os.listdir(os.path.join(self.options.directory, name)):
                board.tell(f"left over in {name}: {left}")

    def show(self) -> None:
        rows, counts = self.board.rows, self.counts
        totals = {
            "operations": sum(row.words[Row.OPERATIONS] for row in rows),
            "interruptions": sum(row.words[Row.INTERRUPTS] for row in rows),
            "forks": sum(row.words[Row.FORKS] for row in rows),
            "kills": counts["kill"], "stops": counts["stop"], "clearings": counts["cleared"],
        }  # fmt: skip
        print(", ".join(f"{number:,} {name}" for name, number in totals.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.soak.faults", description="Mixed work, and processes that are killed and worse."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--directory", help="of the cache: none so far; by default one that is removed afterwards")
    parser.add_argument("--backend", choices=("auto", "threads", "uring"), default="auto")
    parser.add_argument("--core", choices=("c", "python"), default="c")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    options.seed = random.randrange(1 << 32) if options.seed is None else options.seed
    os.environ["YATAGARASU_CORE"] = options.core
    logging.getLogger("yatagarasu_cache").setLevel(logging.ERROR)  # repairs say what they do
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which is what is tried
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # interrupted before
    with scratch() as own:
        state = os.path.join(own, "state")
        os.mkdir(state)
        options.directory = options.directory or os.path.join(own, "cache")
        print(f"seed {options.seed}, core {options.core}, in {options.directory}", flush=True)
        driver = Driver(options, state)
        driver.run()
        pid = os.fork()
        if not pid:
            with ending():
                driver.look()
        if os.waitpid(pid, 0)[1]:
            driver.board.tell("the cache could not be looked at in the end")
        driver.show()
        if driver.board.problems.exists():
            return 1
    print("every value was right, nothing is left over")
    return 0


if __name__ == "__main__":
    sys.exit(main())
