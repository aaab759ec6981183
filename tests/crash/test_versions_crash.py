"""Versions where processes are killed, and where the power fails: none is lost, none comes back, no file is left."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import Image, crash_images, seeded
from helpers import at_most, noise
from test_kill import Child, sound
from test_power import MISSING, History, Judge, Session, frequent_checkpoints, world

from yatagarasu_cache import DiskCache

assert frequent_checkpoints  # a fixture that is used by all
pytestmark = pytest.mark.usefixtures("apart", "quiet")  # each handle stands for a process

OPTIONS: dict[str, Any] = {"size_limit": 4 << 20, "segment_size": 8192, "eviction": "none"}
LARGE = 5000  # bytes: with such segments this has a file of its own


def version(cache: DiskCache, key: str) -> int:
    entry = cache.get_entry(key)
    return entry.version if entry else 0


def large_files(directory: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(directory / "large"))


# -- kill -9 --------------------------------------------------------------------------------------


def numbered(number: int, size: int) -> list[Any]:
    """A value that tells whether it is whole, and where it comes in the order."""
    return [number, noise(size, number)]


def by_sets(cache: DiskCache, size: int) -> None:
    """One more, by hand."""
    while True:
        entry = cache.get_entry("k")
        try:
            number = entry.value[0] if entry else 0
        except KeyError:
            continue
        if cache.set("k", numbered(number + 1, size), if_version=entry.version if entry else 0):
            return


def by_streams(cache: DiskCache, size: int) -> None:
    """The same with values in parts; how many there were is their length."""
    while True:
        entry = cache.get_entry("s")
        number = entry.size - size if entry else 0
        parts = iter([noise(size), bytes(number + 1)])
        if cache.set("s", parts, if_version=entry.version if entry else 0):
            return


def by_modify(cache: DiskCache, size: int) -> None:
    cache.modify("m", lambda value: numbered(value[0] + 1, size), [0, b""])


WAYS: dict[str, tuple[Callable[[DiskCache, int], None], Callable[[DiskCache, int], int]]] = {
    "set": (by_sets, lambda cache, size: cache.get("k", [0])[0]),
    "stream": (by_streams, lambda cache, size: max(0, len(cache.get("s", b"")) - size)),
    "modify": (by_modify, lambda cache, size: cache.get("m", [0])[0]),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("size", [50, LARGE])
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random(disks: Path, backend: str, core: str, way: str, size: int) -> None:
    """What was acknowledged is counted, what was under way is or is not, and nothing else is."""
    rng = seeded(f"killed {backend} {core} {way} {size}")
    directory = disks / "cache"
    options = {**OPTIONS, "backend": backend}
    change, count = WAYS[way]

    def work(acknowledge: Callable[[], None]) -> None:
        cache = DiskCache(directory, **options)
        while True:
            change(cache, size)
            acknowledge()

    DiskCache(directory, **options).close()
    least = most = 0
    for turn in range(8):
        with at_most(60, f"round {turn}"):
            children = [Child(work) for _ in range(3)]
            children[0].wait_for(rng.choice((1, 3, 8)))
            time.sleep(rng.uniform(0, 0.01))
            for child in rng.sample(children, 3):
                assert child.end(kill=True)
            least += sum(child.acknowledged for child in children)
            most = least + 3 * (turn + 1)
            if turn % 3 == 2:
                (directory / "index").unlink()
            with DiskCache(directory, **options) as cache:
                assert least <= count(cache, size) <= most
                for key in ("k", "m"):
                    value = cache.get(key)
                    assert value is None or value == numbered(value[0], size), "it is whole"
                stream = cache.get("s")
                assert stream is None or stream == noise(size) + bytes(len(stream) - size)
                sound(cache, f"round {turn}")
                assert large_files(directory) == (size == LARGE)
                assert version(cache, {"set": "k", "stream": "s", "modify": "m"}[way]) > 0
    assert least > 8


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_killed_while_it_is_refused(disks: Path, backend: str, durability: str) -> None:
    """Its file is written already when it turns out that somebody else came first."""
    directory = disks / "cache"
    options = {**OPTIONS, "backend": backend, "durability": durability}
    with DiskCache(directory, **options) as cache:
        cache["k"] = "first"
        there = version(cache, "k")

        def work(acknowledge: Callable[[], None]) -> None:
            other = DiskCache(directory, **options)
            remove = other._store.backend.clear_away
            other._store.backend.clear_away = lambda path: (acknowledge(), time.sleep(60), remove(path))  # type: ignore[assignment, func-returns-value, return-value]

            def parts() -> Any:
                yield noise(LARGE)
                other.set("k", "second")

            other.set("k", parts(), if_version=there)

        with at_most(60):
            child = Child(work)
            child.wait_for(1)
            assert child.end(kill=True)
        assert cache["k"] == "second" and version(cache, "k") > there
        sound(cache, "while others are there", leftovers=True)
    with DiskCache(directory, **options) as cache:
        assert cache["k"] == "second" and cache.check() == []
        assert large_files(directory) == 0


# -- power cuts -----------------------------------------------------------------------------------


class Versioned:
    """Steps of a session that note the version which each value got."""

    def __init__(self, session: Session) -> None:
        self.session, self.versions = session, {}  # type: ignore[var-annotated]

    def note(self, cache: DiskCache, key: str, value: Any) -> None:
        self.versions[value] = version(cache, key)

    def set_if(self, cache: DiskCache, key: str, size: int) -> None:
        value, there = self.session.value(key, size), version(cache, key)
        assert not cache.set(key, value, if_version=there + 1)
        with self.session.history.giving({key: value}, self.session.durable(cache)):
            assert cache.set(key, value, if_version=there)
        self.note(cache, key, value)

    def refused(self, cache: DiskCache, key: str, size: int) -> None:
        """A stream whose version is gone when it was read."""
        there, value = version(cache, key), self.session.value(key, 30)

        def parts() -> Any:
            yield noise(size)
            cache.set(key, value)

        with self.session.history.giving({key: value}, self.session.durable(cache)):
            assert not cache.set(key, parts(), if_version=there)
        self.note(cache, key, value)

    def modify(self, cache: DiskCache, key: str, size: int) -> None:
        value = self.session.value(key, size)
        with self.session.history.giving({key: value}, self.session.durable(cache)):
            assert cache.modify(key, lambda _: value) == value
        self.note(cache, key, value)

    def delete_if(self, cache: DiskCache, key: str, size: int) -> None:
        there = version(cache, key)
        assert not cache.delete(key, if_version=there + 1)
        with self.session.history.giving({key: MISSING} if there else {}, self.session.durable(cache)):
            assert cache.delete(key, if_version=there) is (there > 0)

    def touch(self, cache: DiskCache, key: str, size: int) -> None:
        cache.touch(key, 1e6)

    def upkeep(self, cache: DiskCache, key: str, size: int) -> None:
        self.session.roll(cache)
        self.session.reclaim(cache)
        self.session.checkpoint(cache)

    def flush(self, cache: DiskCache, key: str, size: int) -> None:
        self.session.flush(cache)


class VersionJudge(Judge):
    """Also says that each value has the version that it had before the cut."""

    versions: dict[Any, int]

    def _read(self, cache: DiskCache, image: Image, history: History) -> dict[str, Any]:
        found = super()._read(cache, image, history)
        for key, value in found.items():
            there = version(cache, key)
            expected = 0 if value == MISSING else self.versions.get(value, there)  # one that was under way
            assert there == expected, f"{image}: {key} is of another version"
        return found


STEPS = ("set_if", "set_if", "set_if", "refused", "modify", "modify", "delete_if", "touch", "upkeep", "flush")


@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_power_cut(
    monkeypatch: pytest.MonkeyPatch, disks: Path, seed: int, durability: str
) -> None:
    rng = seeded(f"versions {durability} {seed}")
    with world(monkeypatch, disks, rng, durability=durability) as session:
        cache, versioned = session.open(), Versioned(session)
        for _ in range(14):
            size = rng.choice((40, 40, 2000))
            getattr(versioned, rng.choice(STEPS))(cache, rng.choice("ab"), size)
        judge = VersionJudge(monkeypatch, disks)
        judge.versions = versioned.versions
        images = list(crash_images(session.disk, rng, singles=1, mixtures=1))
        for image in random.Random(seed).sample(images, min(60, len(images))):
            judge(image, session.history, rng, again=rng.random() < 0.1)
    assert judge.images >= 20
