"""Rounds of damage: files of a cache are changed at random, by what is known of their structure (see `wild`), then
all of the cache is used, put in order, closed and opened again.

What must hold, round by round, within bounded time, memory and space: nothing is raised but what is documented; a
key has the value that it should have, one that it had before, or none; what `set` was done with is there; what
`check(fix=True)` leaves is in order, and stays so.

YATAGARASU_TEST_DAMAGE=N has N rounds of each kind run, YATAGARASU_TEST_SEED others; a round is named by its number.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import wild
from available import BACKENDS
from faulty import SEED
from helpers import TooLong, bounded, in_memory, noise

from yatagarasu_cache import CacheError, DiskCache, FormatError
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store import recovery

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

ROUNDS = int(os.environ.get("YATAGARASU_TEST_DAMAGE", "8"))
LIMIT = 1 << 20
OPTIONS: dict[str, Any] = {"size_limit": LIMIT, "segment_size": 16384}
SECONDS = 20.0  # a round takes a tenth of one; machines are busy
KEYS = 90
T = TypeVar("T")


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    logging.getLogger("yatagarasu_cache").disabled = True
    with in_memory() as path:
        yield path
    logging.getLogger("yatagarasu_cache").disabled = False


def value_of(turn: int, key: str) -> bytes:
    size = (0, 40, 300, 1200, 6000)[turn % 5]
    return f"{key} {turn}:".encode() + noise(size, turn)


def build(path: Path, eviction: str) -> dict[str, list[Any]]:
    """A cache with everything in it. What each key had, the last one being what it has."""
    rng = random.Random(eviction)
    had: dict[str, list[Any]] = {f"k{i}": [None] for i in range(KEYS)}
    with DiskCache(path, backend="threads", eviction=eviction, **OPTIONS) as cache:
        for turn in range(420):
            key = f"k{rng.randrange(KEYS)}"
            if turn % 9 == 8:
                cache.delete(key)
                had[key].append(None)
            else:
                had[key].append(value_of(turn, key))
                cache.set(key, had[key][-1], tag=rng.choice((None, "t")), expire=rng.choice((None, None, 1e6)))
            if turn % 100 == 60:
                cache._store.checkpoints.write_if()
            if turn % 120 == 119:
                with cache._store.locks.appending:
                    cache._store.active.seal()
        cache.touch("k3", 1e6)
        for i in range(30):
            cache.set(f"late{i}", b"x" * 50, expire=0.001)
        cache.set("n", 5)
        assert cache.check() == []
    return had


@pytest.fixture(scope="module")
def samples(disk: Path) -> dict[str, tuple[Path, dict[str, list[Any]]]]:
    """Caches that differ by the policy, and have the same seed, so that their slots are where they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "_new_identity", lambda: f.Identity(b"a damaged cache.", 7))
        return {name: (disk / name, build(disk / name, name)) for name in ("lru", "none", "lfu")}


class Round:
    """One round: what was done goes to `told`, for whoever reads why it failed."""

    def __init__(self, path: Path, had: dict[str, list[Any]], eviction: str, rng: random.Random) -> None:
        self.path, self.rng, self.eviction = path, rng, eviction
        self.had = {key: list(values) for key, values in had.items()}
        self.told: list[str] = []
        self.backend = rng.choice(BACKENDS)
        self.before = self.used()

    def used(self) -> int:
        """Bytes on disk, holes aside."""
        return sum(path.lstat().st_blocks * 512 for path in self.path.rglob("*"))

    def damage(self, *, in_place: bool) -> None:
        for _ in range(self.rng.choice((1, 1, 1, 2, 4))):
            kind = self.rng.choice(("index", "index", "segments", "segments", "checkpoint", "settings", "large", "writers"))
            files = sorted(path for path in self.path.rglob("*") if path.is_file())
            files = [path for path in files if path.relative_to(self.path).parts[0] == kind]
            if files:
                path = self.rng.choice(files)
                changes = [c for c in wild.CHANGES[kind] if c is not wild.grow or not in_place or kind != "index"]
                self.told.append(f"{path.name}: {self.rng.choice(changes)(path, self.rng)}")
        self.before = max(self.before, self.used())

    def attempt(self, call: Callable[[], T]) -> T | None:
        """None, too, where it fails as is documented."""
        began = time.monotonic()
        try:
            return call()
        except TooLong:
            self.told.append(f"{call} began {time.monotonic() - began:.1f} s ago")
            raise
        except CacheError as error:
            assert "internal error" not in str(error), self.told
            self.told.append(repr(error)[:100])
            return None

    def open(self) -> DiskCache | None:
        """None if the cache is refused: not ours any more, or of another version."""
        try:
            return DiskCache(self.path, backend=self.backend, eviction=self.eviction, **OPTIONS)
        except FormatError as error:
            self.told.append(repr(error))
            return None

    def read(self, cache: DiskCache) -> None:
        together = self.attempt(lambda: cache.get_many(list(self.had))) or {}
        for key, values in self.had.items():
            for value in (together.get(key), self.attempt(lambda k=key: cache.get(k))):  # type: ignore[misc]
                assert value is None or value in values, (key, f"{value!r:.50}", self.told)
        for look in (
            lambda: list(cache), lambda: list(cache.entries()), lambda: len(cache), cache.stats, cache.check,
            lambda: cache.get_entry("k5"), lambda: cache.get("n"),
        ):  # fmt: skip
            self.attempt(look)

    def write(self, cache: DiskCache, name: str) -> None:
        """What was stored is there; unless it was evicted for something that came later."""
        for i in range(40):
            key = f"{name}{i % 30}" if i % 3 else f"k{i}"
            value = f"{key} {name} {i}".encode() * self.rng.choice((1, 20, 20, 400))
            if self.attempt(lambda k=key, v=value: cache.set(k, v, tag=self.rng.choice((None, "t"))) or True):  # type: ignore[misc]
                got = self.attempt(lambda k=key: (cache.get(k),))  # type: ignore[misc]
                assert got is None or got[0] == value, (key, f"{got!r:.50}", self.told)
                self.had.setdefault(key, [None]).append(value)
            else:
                self.had.setdefault(key, [None]).append(value)
        for change in (
            lambda: cache.delete("k1"), lambda: cache.touch("k3", 100.0), lambda: cache.incr("n"),
            cache.expire, lambda: cache.evict("t") if self.rng.random() < 0.2 else 0, cache.flush,
            lambda: cache.add("k7", self.had["k7"][-1] or b""), cache._store.cleaner.clean_emptiest,
            cache._store.checkpoints.write_if, lambda: cache.delete_many(["k2", "k4"]),
        ):  # fmt: skip
            self.attempt(change)

    def put_in_order(self, cache: DiskCache) -> None:
        """Nothing is left that can be mended."""
        problems = cache.check(fix=True)
        left = [problem for problem in cache.check() if problem.kind != "stray"]  # another cache's is left alone
        assert left == [], (left[:3], problems[:3], self.told)

    def run(self) -> None:
        now = self.rng.random() < 0.5
        if not now:
            self.damage(in_place=False)
        cache = self.open()
        if cache is None:
            return
        with cache:
            if now:
                self.attempt(lambda: cache.set("k0", b"k0"))
                self.had["k0"].append(b"k0")
                self.damage(in_place=True)
            steps = [lambda: self.read(cache), lambda: self.write(cache, "new")]
            self.rng.shuffle(steps)
            for step in steps:
                step()
            self.put_in_order(cache)
            self.write(cache, "more")
            self.read(cache)
            assert [p for p in cache.check() if p.kind != "stray"] == [], self.told
            limit = max(LIMIT, cache.stats().size_limit)  # what stands in the settings, validly, is what holds
        assert self.used() <= max(2 * limit, self.before + limit) + (256 << 10), (self.used(), self.told)
        index = (self.path / "index").stat().st_ino
        cache = self.open()
        assert cache is not None, self.told
        with cache:
            assert (self.path / "index").stat().st_ino == index, ("made anew", self.told)
            self.read(cache)
            assert [p for p in cache.check() if p.kind != "stray"] == [], self.told


@pytest.mark.parametrize("eviction", ["lru", "none", "lfu"])
def test_rounds(
    disk: Path, samples: dict[str, tuple[Path, dict[str, list[Any]]]], eviction: str,
) -> None:  # fmt: skip
    source, had = samples[eviction]
    failed: list[str] = []
    only = os.environ.get("YATAGARASU_TEST_ROUND")
    for number in [int(only)] if only else range(ROUNDS):
        path = disk / f"{eviction}{number}"
        shutil.copytree(source, path)
        one = Round(path, had, eviction, random.Random(f"{SEED} {eviction} {number}"))
        try:
            began = time.monotonic()
            with bounded(seconds=SECONDS):
                one.run()
            assert time.monotonic() - began < SECONDS
        except (Exception, TooLong) as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-6:])
            failed.append(f"YATAGARASU_TEST_SEED={SEED} YATAGARASU_TEST_ROUND={number}\n{where}{error!r:.1500}\n{one.told}")
        finally:
            shutil.rmtree(path)
    assert not failed, f"{len(failed)} of {ROUNDS}:\n" + "\n\n".join(failed)


