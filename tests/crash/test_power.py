"""Power cuts: after every single operation of short sequences, and of long random ones.

What must hold after the cut and a new start: each key has a value that it once had (or that an
operation in progress was giving it), or none; never one older than what was last made durable for
it, by `durability="sync"` or `flush()`; what was made durable is there, unless something later took
its place; a durable deletion stays deleted. `check()` finds nothing wrong, and the cache goes on
working: it can be written, closed and opened again, and the power may fail during recovery too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from available import backend_for
from faulty import Disk, FaultyBackend, Image, crash_images, fix_identity, open_faulty, seeded
from helpers import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from yatagarasu_cache import CacheError, DiskCache
from yatagarasu_cache.store import checkpointing
from yatagarasu_cache.store import store as store_module

pytestmark = pytest.mark.usefixtures("apart", "quiet")  # each handle stands for a process

SMALL: dict[str, Any] = {"size_limit": 262144, "segment_size": 4096}
LARGE = 1500  # bytes: with such segments this has a file of its own
MISSING = "(none)"

_boots = itertools.count(1)


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every few records, written before the operation that asks for it goes on."""

    class AtOnce:
        ident = 0

        def __init__(self, target: Callable[[], None], **_: Any) -> None:
            self.start = target

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            pass

    monkeypatch.setattr(checkpointing, "_CHECKPOINT_RECORDS", 6)
    monkeypatch.setattr(checkpointing, "threading", SimpleNamespace(**{**vars(threading), "Thread": AtOnce}))


def boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the machine anew."""
    number = next(_boots)
    monkeypatch.setattr("yatagarasu_cache.store.recovery.boot_id", lambda: number.to_bytes(16, "little"))


# -- what is known of the keys ------------------------------------------------------------------


@dataclasses.dataclass
class Event:
    """One value that a key got. start, end: operations of the disk before and after."""

    value: Any
    start: int
    end: int
    durable: bool


class History:
    """All values that each key had, when it got them, and what of that was made durable."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.events: dict[str, list[Event]] = {}
        self.flushes: list[tuple[int, int]] = []  # log positions at their beginning and end
        self.evicts = False
        self.live: dict[str, Any] = {}

    @contextlib.contextmanager
    def giving(self, changes: dict[str, Any], durable: bool) -> Iterator[None]:
        start = len(self.disk.log)
        yield
        for key, value in changes.items():
            self.events.setdefault(key, []).append(Event(value, start, len(self.disk.log), durable))
            self.live[key] = value

    def found(self, key: str, value: Any) -> None:
        """This is what a recovery made of the key: it was on the disk."""
        self.events[key] = [Event(value, 0, 0, True)]

    def flushed(self, start: int) -> None:
        self.flushes.append((start, len(self.disk.log)))

    def allowed(self, key: str, cut: int) -> list[Any]:
        """Values that the key may have after a cut behind `cut` operations."""
        events = [event for event in self.events.get(key, []) if event.start <= cut]
        flushed = max((start for start, end in self.flushes if end <= cut), default=-1)
        durable = -1
        for i, event in enumerate(events):
            if event.end <= cut and (event.durable or event.end <= flushed):
                durable = i
        values = [event.value for event in events[max(durable, 0) :]]
        return values + [MISSING] if durable < 0 or self.evicts else values


class Session:
    """A cache on the disk under test, whose operations are noted down."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        disk: Disk,
        history: History,
        first: Iterator[int] | None = None,
        **options: Any,
    ) -> None:
        self._monkeypatch, self.disk, self.history = monkeypatch, disk, history
        self.options = {**SMALL, **options}
        self.caches: list[DiskCache] = []
        self.numbers = first or itertools.count()

    def open(self, **options: Any) -> DiskCache:
        cache = open_faulty(
            self._monkeypatch, self.disk.root, FaultyBackend(self.disk), **{**self.options, **options}
        )
        self.caches.append(cache)
        return cache

    def value(self, key: str, size: int) -> bytes:
        """A value that no other key and no other time has."""
        return f"{key}#{next(self.numbers)}:".encode() + noise(size)

    def durable(self, cache: DiskCache) -> bool:
        return bool(cache.settings.durability == "sync")

    def set(self, cache: DiskCache, key: str, size: int = 50) -> None:
        value = self.value(key, size)
        with self.history.giving({key: value}, self.durable(cache)):
            cache.set(key, value)

    def set_many(self, cache: DiskCache, keys: list[str], size: int = 50) -> None:
        items = {key: self.value(key, size) for key in keys}
        with self.history.giving(items, self.durable(cache)):
            cache.set_many(items)

    def delete(self, cache: DiskCache, key: str) -> None:
        there = key in cache
        with self.history.giving({key: MISSING} if there else {}, self.durable(cache)):
            cache.delete(key)

    def pop(self, cache: DiskCache, key: str) -> None:
        there = key in cache
        with self.history.giving({key: MISSING} if there else {}, self.durable(cache)):
            cache.pop(key)

    def incr(self, cache: DiskCache, key: str) -> None:
        expected = cache.get(key, 0) + 1
        with self.history.giving({key: expected}, self.durable(cache)):
            assert cache.incr(key) == expected

    def touch(self, cache: DiskCache, key: str) -> None:
        cache.touch(key, 1e6)

    def clear(self, cache: DiskCache) -> None:
        with self.history.giving(dict.fromkeys(self.history.events, MISSING), self.durable(cache)):
            cache.clear()

    def flush(self, cache: DiskCache) -> None:
        start = len(self.disk.log)
        cache.flush()
        self.history.flushed(start)

    def checkpoint(self, cache: DiskCache) -> None:
        cache._store.checkpoints.write_if()

    def reclaim(self, cache: DiskCache) -> None:
        """Clean the emptiest segment, and drop the dead ones."""
        cache._store.cleaner.clean_emptiest()
        cache._store.dead.drop_all()

    def roll(self, cache: DiskCache) -> None:
        """Begin a new segment."""
        store = cache._store
        with store.locks.appending:
            store.active.seal()

    def close(self, cache: DiskCache) -> None:
        """The last one to close makes everything durable; it counts where durability was promised."""
        start = len(self.disk.log)
        self.caches.remove(cache)
        cache.close()
        if not self.caches and self.history.flushes:
            self.history.flushed(start)

    def abandon(self) -> None:
        """Let go of everything, as the end of the process would, without closing."""
        for cache in self.caches:
            cache._store._release()
            cache._store.life.closed = True
        self.caches.clear()
        self.disk.close()


# -- after the cut ------------------------------------------------------------------------------


class Judge:
    """Opens images and says what is wrong with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, disks: Path, **options: Any) -> None:
        self._monkeypatch, self._disks = monkeypatch, disks
        self._options = {**SMALL, **options}
        monkeypatch.setattr(store_module, "GRACE", 0)  # nobody is inside of an image whose lock was lost
        self._count = itertools.count()
        self.images = 0

    def __call__(self, image: Image, history: History, rng: random.Random, *, again: bool = False) -> None:
        self.images += 1
        where = self._disks / f"image{next(self._count)}"
        image.build(where)
        boot(self._monkeypatch)
        disk = Disk(where) if again else None
        try:
            self._recover(where, image, history, disk)
            if disk is not None:
                second = disk.image(rng, rng.randrange(len(disk.log) + 1))
                second.cut = image.cut
                second.label = f"{image.label}, then behind {len(disk.log)} operations of recovery"
                self(second, history, rng)
        finally:
            if disk is not None:
                disk.close()
            shutil.rmtree(where)

    def _recover(self, where: Path, image: Image, history: History, disk: Disk | None) -> None:
        backend = backend_for(image, share=6)
        try:
            if disk is not None:
                cache = open_faulty(self._monkeypatch, where, FaultyBackend(disk), **self._options)
            else:
                cache = DiskCache(where, backend=backend, **self._options)
        except CacheError as error:
            raise AssertionError(f"{image}: cannot be opened: {error!r}") from error
        with cache:
            found = self._read(cache, image, history)
            problems = cache.check()
            assert not problems, f"{image}: {problems}"
            cache.set("new", b"after the cut")
        with DiskCache(where, backend=backend, **self._options) as cache:
            assert cache.get("new") == b"after the cut", str(image)
            evicted = cache.stats().evictions > 0  # for "new"
            for key, value in found.items():
                got = cache.get(key, MISSING)
                assert got == value or evicted and got == MISSING, f"{image}: {key} changed by opening once more"

    def _read(self, cache: DiskCache, image: Image, history: History) -> dict[str, Any]:
        found = {}
        for key in history.events:
            found[key] = value = cache.get(key, MISSING)
            allowed = history.allowed(key, image.cut)
            if value not in allowed:
                raise AssertionError(f"{image}: {key} is {_short(value)}, allowed: {[*map(_short, allowed)]}")
        return found


def _short(value: Any) -> str:
    return value[:12].decode(errors="replace").split(":")[0] if isinstance(value, bytes) else repr(value)


Step = Callable[[Session, DiskCache], None]


def s_set(key: str, size: int = 50) -> Step:
    return lambda session, cache: session.set(cache, key, size)


def s(name: str, *arguments: Any) -> Step:
    return lambda session, cache: getattr(session, name)(cache, *arguments)


@contextlib.contextmanager
def world(
    monkeypatch: pytest.MonkeyPatch, disks: Path, rng: random.Random, *, evicts: bool = False, **options: Any
) -> Iterator[Session]:
    """A fresh disk with a session on it; at the end it is as if the process had ended."""
    root = Path(tempfile.mkdtemp(dir=disks))
    fix_identity(monkeypatch, rng)
    boot(monkeypatch)
    disk = Disk(root)
    history = History(disk)
    history.evicts = evicts
    session = Session(monkeypatch, disk, history, **options)
    try:
        yield session
    finally:
        session.abandon()
        shutil.rmtree(root)


def run_all_cuts(
    monkeypatch: pytest.MonkeyPatch, disks: Path, steps: list[Step], rng: random.Random, *,
    again: float = 0.1, singles: int = 3, mixtures: int = 1, **options: Any,
) -> int:  # fmt: skip
    """Run the steps, then look at the directory as a cut behind each operation may have left it."""
    with world(monkeypatch, disks, rng, **options) as session:
        cache = session.open()
        for step in steps:
            if not session.caches:
                cache = session.open()
            step(session, cache)
        judge = Judge(monkeypatch, disks, **{k: v for k, v in options.items() if k != "durability"})
        for image in crash_images(session.disk, rng, singles=singles, mixtures=mixtures):
            judge(image, session.history, rng, again=rng.random() < again)
    return judge.images


SEQUENCES: dict[str, list[Step]] = {
    "set, overwrite, delete": [
        s("set", "a"), s("set", "b"), s("set", "a"), s("delete", "b"), s("set", "b", 700), s("delete", "a"),
    ],
    "flush in between": [
        s("set", "a"), s("set", "b"), s("flush"), s("set", "a", 600), s("delete", "b"), s("flush"), s("set", "b"),
    ],
    "rolls": [
        s("set", "a"), s("set", "b"), s("roll"), s("set", "a"), s("flush"), s("roll"), s("set", "b", 900), s("roll"),
        s("delete", "a"), s("reclaim"), s("set", "c"),
    ],
    "dead segments and their removals": [
        s("set", "a"), s("set", "x"), s("roll"), s("set", "a"), s("flush"), s("roll"), s("delete", "a"), s("flush"),
        s("roll"), s("delete", "x"), s("reclaim"), s("set", "b"), s("roll"), s("reclaim"), s("set", "c"), s("flush"),
    ],
    "checkpoints": [
        s("set", "a"), s("set", "b"), s("roll"), s("set", "c"), s("checkpoint"), s("delete", "a"), s("set", "b"),
        s("flush"), s("checkpoint"), s("set", "c"), s("reclaim"), s("set", "a"),
    ],
    "large values": [
        s("set", "a", LARGE), s("set", "b"), s("flush"), s("set", "a", LARGE), s("set", "b", LARGE), s("delete", "a"),
        s("set", "b"), s("set", "a"), s("flush"), s("set", "a", LARGE), s("close"), s("set", "a"),
    ],
    "clear": [
        s("set", "a"), s("set", "b", LARGE), s("flush"), s("clear"), s("set", "a"), s("flush"), s("roll"), s("clear"),
        s("reclaim"), s("set", "b"),
    ],
    "close and open": [
        s("set", "a"), s("set", "b", LARGE), s("close"), s("set", "a"), s("flush"), s("close"), s("delete", "a"),
        s("delete", "b"), s("set", "c"), s("close"), s("set", "a"),
    ],
    "counters, pop, touch, many": [
        s("incr", "n"), s("flush"), s("incr", "n"), s("incr", "n"), s("set_many", ["a", "b", "c"]), s("touch", "a"),
        s("flush"), s("pop", "a"), s("set_many", ["a", "b"], 400), s("incr", "n"), s("touch", "b"), s("roll"),
        s("reclaim"),
    ],
}  # fmt: skip


# "sync" promises most: every sequence is tried with it, and those whose losses differ most without.
CUT = [
    *((name, "sync") for name in SEQUENCES),
    *((name, "none") for name in ("set, overwrite, delete", "rolls", "checkpoints", "clear")),
]


@pytest.mark.parametrize(("name", "durability"), CUT)
def test_cut_behind_every_operation(
    monkeypatch: pytest.MonkeyPatch, disks: Path, name: str, durability: str
) -> None:
    rng = seeded(f"{name} {durability}")
    images = run_all_cuts(monkeypatch, disks, SEQUENCES[name], rng, durability=durability)
    assert images > 100


def fill(session: Session, rng: random.Random, keys: int) -> DiskCache:
    cache = session.open()
    for i in range(keys):
        session.set(cache, f"k{i}", rng.randrange(2500, 5000))
    session.flush(cache)
    return cache


@pytest.mark.parametrize("eviction", ["lru", "none"])
def test_cut_in_a_full_cache(monkeypatch: pytest.MonkeyPatch, disks: Path, eviction: str) -> None:
    """Eight segments, full: each change evicts, cleans or drops one, and values are torn at will."""
    rng = seeded(f"full {eviction}")
    options = {"segment_size": 32768, "eviction": eviction}
    with world(monkeypatch, disks, rng, evicts=eviction != "none", **options) as session:
        cache = fill(session, rng, 30)
        begun = len(session.disk.log)
        for i in range(45):
            key = f"k{rng.randrange(30)}"
            getattr(session, rng.choice(("set", "set", "set", "delete")))(cache, key)
            session.set(cache, f"k{rng.randrange(30)}", rng.randrange(2500, 5000))
            if i % 9 == 8:
                session.flush(cache)
        unlinked = [
            op for op in session.disk.log[begun:] if op.kind == "unlink" and op.path.startswith("segments")
        ]
        assert len(unlinked) >= 3, "no segment was dropped: the sequence is too short"
        judge = Judge(monkeypatch, disks, **options)
        for image in session.disk.cuts(rng, first=begun, singles=2, mixtures=1):
            if image.label.startswith("only") and image.cut % 2 or image.cut % 6 == 0:
                judge(image, session.history, rng, again=rng.random() < 0.05)
        assert judge.images > 200


def test_two_handles_of_different_durability(monkeypatch: pytest.MonkeyPatch, disks: Path) -> None:
    """What one handle made durable is not lost for what the other did not."""
    rng = seeded("two handles")
    with world(monkeypatch, disks, rng) as session:
        loose, strict = session.open(), session.open(durability="sync")
        for i in range(30):
            cache = rng.choice((loose, strict))
            key = rng.choice("abc")
            name = rng.choice(("set", "set", "set", "delete", "incr", "roll", "reclaim"))
            if name == "set":
                session.set(cache, key, rng.choice((20, 600, 1000, LARGE)))
            elif name == "incr":
                session.incr(cache, "n")
            elif name == "delete":
                session.delete(cache, key)
            else:
                getattr(session, name)(cache)
            if i == 25:
                session.checkpoint(loose)
        judge = Judge(monkeypatch, disks)
        for image in session.disk.cuts(rng, singles=2, mixtures=1):
            judge(image, session.history, rng, again=rng.random() < 0.05)


def test_nothing_is_lost_behind_a_clean_end(monkeypatch: pytest.MonkeyPatch, disks: Path) -> None:
    """Closed by its last handle a cache survives whatever it was, and is not rebuilt."""
    rng = seeded("clean end")
    with world(monkeypatch, disks, rng) as session:
        for round_ in range(4):
            cache = session.open()
            for key in "abcd":
                session.set(cache, f"{key}{round_}", rng.choice((20, 900, LARGE)))
            session.set(cache, "a0", LARGE)
            session.delete(cache, f"b{round_}")
            session.roll(cache)
            session.close(cache)
            ended, expected = len(session.disk.log), dict(session.history.live)
            for label in ("all lost", "all kept", "mixture"):
                image = session.disk.image(rng, ended, label)
                where = disks / f"{round_} {label}"
                image.build(where)
                boot(monkeypatch)
                backend = backend_for(f"{round_} {label}")
                with monkeypatch.context() as patch, DiskCache(where, backend=backend, **SMALL) as after:
                    patch.setattr("yatagarasu_cache.store.recovery.Recovery.rebuild", None)
                    assert {key: after.get(key, MISSING) for key in expected} == expected
                    assert after.check() == []


def test_a_new_time_of_expiry_is_durable(monkeypatch: pytest.MonkeyPatch, disks: Path) -> None:
    """With durability="sync" neither the end of an entry's time nor its prolongation is lost."""
    rng = seeded("expiry")
    with world(monkeypatch, disks, rng, durability="sync") as session:
        cache = session.open()
        marks: list[tuple[int, float]] = []
        cache.set("k", b"value", expire=1e6)
        for expire in (2e6, 1e3, 5e6):
            for step in ("touch", "roll", "reclaim", "checkpoint"):
                if step == "touch":
                    cache.touch("k", expire)
                    marks.append((len(session.disk.log), expire))
                else:
                    getattr(session, step)(cache)
        boots = 0
        for image in session.disk.cuts(rng, first=marks[0][0], singles=2, mixtures=1):
            due = [expire for position, expire in marks if position <= image.cut][-1]
            later = [expire for position, expire in marks if position > image.cut][:1]
            where = disks / f"image{boots}"
            boots += 1
            image.build(where)
            boot(monkeypatch)
            with DiskCache(where, backend=backend_for(image, share=6), **SMALL) as after:
                entry = after.get_entry("k")
                assert entry is not None, str(image)
                assert entry.expires is not None
                left = entry.expires - entry.created
                assert any(abs(left - expire) < 100 for expire in [due, *later]), f"{image}: {left}"
            shutil.rmtree(where)


KEYS = ["a", "b", "c", "d"]
SIZES = st.sampled_from([10, 300, 900, 1000, LARGE, 4000])
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(KEYS), SIZES),
    st.tuples(st.just("set"), st.sampled_from(KEYS), SIZES),
    st.tuples(st.just("delete"), st.sampled_from(KEYS)),
    st.tuples(st.just("pop"), st.sampled_from(KEYS)),
    st.tuples(st.just("incr"), st.sampled_from(["n", "m"])),
    st.tuples(st.just("set_many"), st.lists(st.sampled_from(KEYS), min_size=1, unique=True)),
    st.tuples(st.just("touch"), st.sampled_from(KEYS)),
    st.tuples(st.sampled_from(["flush", "roll", "reclaim", "checkpoint", "close", "clear"])),
    st.tuples(st.sampled_from(["flush", "roll", "reclaim"])),
)


def take(session: Session, steps: list[tuple[bool, tuple[Any, ...]]]) -> None:
    """Each step by one of two handles, which are opened as they are needed."""
    handles: dict[bool, DiskCache] = {}
    for durable, (name, *arguments) in steps:
        if durable not in handles:
            handles[durable] = session.open(durability="sync" if durable else "none")
        getattr(session, name)(handles[durable], *arguments)
        if name == "close":
            del handles[durable]


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.booleans(), OPERATIONS), min_size=3, max_size=40),
    number=st.integers(0, 1 << 30),
)
def test_cuts_of_random_sequences(
    monkeypatch: pytest.MonkeyPatch, disks: Path, steps: list[tuple[bool, tuple[Any, ...]]], number: int
) -> None:
    rng = random.Random(number)
    with world(monkeypatch, disks, rng) as session:
        take(session, steps)
        judge = Judge(monkeypatch, disks)
        for _ in range(6):
            image = session.disk.image(rng, rng.randrange(len(session.disk.log) + 1))
            judge(image, session.history, rng, again=True)


@settings(max_examples=50)
@given(
    lives=st.lists(
        st.lists(st.tuples(st.booleans(), OPERATIONS), min_size=2, max_size=15), min_size=2, max_size=5
    ),
    number=st.integers(0, 1 << 30),
)
def test_one_cut_after_the_other(
    monkeypatch: pytest.MonkeyPatch, disks: Path, lives: list[list[tuple[bool, tuple[Any, ...]]]], number: int
) -> None:
    """The cache lives on after each cut, on what that left: torn records and footers, numbers, stamps.

    What was found after a cut is durable from then on.
    """
    rng = random.Random(number)
    fix_identity(monkeypatch, rng)
    root = Path(tempfile.mkdtemp(dir=disks)) / "0"
    root.mkdir()
    disk = Disk(root)
    session = Session(monkeypatch, disk, History(disk))
    for steps in lives:
        boot(monkeypatch)
        take(session, steps)
        image = disk.image(rng, rng.randrange(len(disk.log) + 1), rng.choice(("mixture", "mixture", "all lost")))
        session.abandon()
        root = root.with_name(f"{int(root.name) + 1}")
        image.build(root)
        before, disk = session.history, Disk(root)
        boot(monkeypatch)
        session = Session(monkeypatch, disk, History(disk), first=session.numbers)
        cache = session.open()
        for key in before.events:
            found = cache.get(key, MISSING)
            allowed = before.allowed(key, image.cut)
            assert found in allowed, f"{image}: {key} is {_short(found)}, allowed: {[*map(_short, allowed)]}"
            session.history.found(key, found)
        assert cache.check() == [], str(image)
        session.close(cache)
    session.abandon()
    shutil.rmtree(root.parent)
