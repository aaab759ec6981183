"""SIGKILL at any instant: at random ones, many rounds over, and behind every step of a sequence.

What must hold: whatever was acknowledged is there; a key whose change was under way has the old
value or the new one; nothing deleted comes back, not even after the index was lost and made anew
from the log; `check()` finds nothing wrong; other processes go on without waiting.
"""

# ruff: noqa: B023 - what is defined in a loop here runs within the same turn, in a child

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from faulty import seeded
from helpers import at_most, noise

from yatagarasu_cache import DiskCache
from yatagarasu_cache.codec import KIND_BYTES, encode_key
from yatagarasu_cache.store import (
    active,
    changes,
    checkpointing,
    cleaning,
    current,
    dead_segments,
    durability,
    evicting,
    grants,
    index,
    large_writing,
    leaving_files,
    presence,
    reaping,
    removal,
    room,
    segment,
    showing,
    writing,
)
from yatagarasu_cache.store.format import key_digest
from yatagarasu_cache.store.item import Item

pytestmark = pytest.mark.usefixtures("apart", "quiet")  # each handle stands for a process

SMALL: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 8192, "eviction": "none"}
TIGHT: dict[str, Any] = {"size_limit": 256 << 10, "segment_size": 4096}  # evicts all the time
MISSING = "(none)"
PATIENCE = 10.0  # seconds within which a process that lives must get on
MODULES = (
    active, changes, checkpointing, cleaning, current, dead_segments, durability, evicting, grants, index, large_writing,
    leaving_files, presence, reaping, removal, room, segment, showing, writing,
)  # fmt: skip


# -- processes ----------------------------------------------------------------------------------


class Child:
    """A forked process that runs `work(acknowledge)`; what it acknowledges and its end can be seen."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._acks, write = os.pipe()
        self._errors, errors = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.close(self._acks)
                os.close(self._errors)
                signal.setitimer(signal.ITIMER_REAL, 0)
                work(lambda: os.write(write, b".") and None)
                status = 0
            except BaseException:
                with contextlib.suppress(OSError):
                    os.write(errors, traceback.format_exc().encode()[-4000:])
            finally:
                os._exit(status)
        os.close(write)
        os.close(errors)
        self.acknowledged = 0

    def wait_for(self, acknowledgements: int) -> None:
        while self.acknowledged < acknowledgements:
            data = os.read(self._acks, 1)
            if not data:
                return
            self.acknowledged += len(data)

    def ended(self) -> bool:
        """True if there will be no more acknowledgements: nothing may have been acknowledged before."""
        return bool(select.select([self._acks], [], [], 0)[0])

    def end(self, *, kill: bool) -> bool:
        """Wait for the end, brought about if asked; True if it was killed. An error there is one here."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        while data := os.read(self._acks, 1 << 16):
            self.acknowledged += len(data)
        failure = os.read(self._errors, 1 << 16).decode()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._acks)
        os.close(self._errors)
        assert not failure, failure
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0
        return False


# -- what is done, and what may be seen ---------------------------------------------------------

Change = tuple[Callable[[DiskCache], object], dict[Any, Any]]


class Known:
    """Values that each key of one worker may have: the acknowledged one, then those under way when killed."""

    def __init__(self, evicts: bool) -> None:
        self.evicts = evicts
        self.values: dict[Any, list[Any]] = {}

    def remove_unsettled(self, cache: DiskCache) -> None:
        """Delete whatever may have been put or not: from then on it is gone for good."""
        for key in [key for key, allowed in self.values.items() if len(allowed) > 1]:
            cache.delete(key)
            self.done({key: MISSING})

    def now(self, key: Any) -> Any:
        return self.values.get(key, [MISSING])[0]

    def done(self, changes: dict[Any, Any]) -> None:
        for key, value in changes.items():
            self.values[key] = [value]

    def under_way(self, changes: dict[Any, Any]) -> None:
        for key, value in changes.items():
            allowed = self.values.setdefault(key, [MISSING])
            if value not in allowed:
                allowed.append(value)

    def look(self, cache: DiskCache, when: str, settled: bool = True) -> None:
        """What is seen must be allowed; from then on nothing older is.

        Not `settled`: readers take no lock, so they may see a change that was never completed, until
        the next writer undoes it.
        """
        for key, allowed in self.values.items():
            seen = cache.get(key, MISSING)
            if self.evicts and seen == MISSING and MISSING not in allowed:
                allowed[0] = MISSING
            assert seen in allowed, f"{when}: {key!r} is {seen!r:.80}, and may be {allowed!r:.300}"
            assert (key in cache) == (seen != MISSING), f"{when}: {key!r}"
            if settled:
                del allowed[: allowed.index(seen)]


class Worker:
    """Operations on keys of its own, always the same for the same seed and the same state."""

    def __init__(self, name: str, seed: str, known: Known) -> None:
        self.name, self.seed, self.known = name, seed, known

    def changes(self) -> Iterator[Change]:
        """What to do, and what it makes of the keys. Go on with the next only when it is done."""
        rng, known, name = random.Random(self.seed), self.known, self.name
        keys = [f"{name}{i}" for i in range(24)]
        for turn in range(100_000):
            key = rng.choice(keys)
            value = self.value(rng, key, turn)
            kind = rng.choices(
                ("set", "many", "delete", "pop", "add", "touch", "incr", "tagged", "purge", "stream"),
                (40, 8, 12, 4, 6, 4, 8, 6, 1, 3),
            )[0]
            certain = not known.evicts and len(known.values.get(key, [MISSING])) == 1
            now = known.now(key)
            if kind == "set":
                yield lambda c, k=key, v=value: c.set(k, v), {key: value}
            elif kind == "many":
                items = {k: self.value(rng, k, turn) for k in rng.sample(keys, rng.randint(2, 8))}
                yield lambda c, i=items: c.set_many(i), items
            elif kind == "delete":
                yield lambda c, k=key: c.delete(k), {key: MISSING}
            elif kind == "pop" and certain:
                yield self.expecting(lambda c, k=key: c.pop(k, MISSING), now), {key: MISSING}
            elif kind == "add" and certain:
                added = now == MISSING
                yield (
                    self.expecting(lambda c, k=key, v=value: c.add(k, v), added),
                    {key: value} if added else {},
                )
            elif kind == "touch":
                yield lambda c, k=key: c.touch(k, 1e6), {}
            elif kind == "incr" and not known.evicts:
                counter = f"{name}-count{rng.randrange(3)}"
                if len(known.values.get(counter, [0])) == 1:
                    now = known.now(counter)
                    after = 1 if now == MISSING else now + 1
                    yield self.expecting(lambda c, k=counter: c.incr(k), after), {counter: after}
            elif kind == "tagged":
                tagged = f"{name}-tag{rng.randrange(4)}"
                value = self.value(rng, tagged, turn)
                yield lambda c, k=tagged, v=value: c.set(k, v, tag=name), {tagged: value}
            elif kind == "purge":
                yield (
                    lambda c: c.evict(name),
                    {k: MISSING for k in list(known.values) if str(k).startswith(f"{name}-tag")},
                )
            elif kind == "stream":
                yield lambda c, k=key, v=value: c.set(k, iter([v[:10], v[10:]])), {key: value}

    def value(self, rng: random.Random, key: str, turn: int) -> bytes:
        """A value that no other key and no other turn has; some have files of their own."""
        return f"{key}#{self.seed}#{turn}:".encode() + noise(rng.choice((0, 20, 100, 400, 900, 3000)))

    @staticmethod
    def expecting(call: Callable[[DiskCache], object], wanted: object) -> Callable[[DiskCache], object]:
        def checked(cache: DiskCache) -> None:
            got = call(cache)
            assert got == wanted, f"{got!r:.80} instead of {wanted!r:.80}"

        return checked

    def run(self, cache: DiskCache, acknowledge: Callable[[], None], most: int = 1 << 60) -> None:
        """Here in the child."""
        for number, (call, changed) in enumerate(self.changes()):
            if number >= most:
                return
            call(cache)
            acknowledge()
            self.known.done(changed)

    def follow(self, acknowledged: int) -> None:
        """In the parent: what the child did, and may have done."""
        operations = self.changes()
        for _ in range(acknowledged):
            self.known.done(next(operations)[1])
        self.known.under_way(next(operations)[1])


def sound(cache: DiskCache, when: str, leftovers: bool = False) -> None:
    """Nothing is wrong. `leftovers`: while others have the cache open, files that a dead process did
    not come to enter may lie about; they do no harm, and can be removed."""
    if leftovers:
        problems = cache.check(fix=True)
        wrong = [p for p in problems if p.kind not in ("large", "stray") or not p.fixed]
        assert wrong == [], f"{when}: {wrong}"
    problems = cache.check()
    assert problems == [], f"{when}: {problems}"


def lose_index(directory: Path) -> None:
    (directory / "index").unlink()


# -- at random instants -------------------------------------------------------------------------


def survivor(directory: Path, options: dict[str, Any], seed: str, shared: mmap.mmap) -> Child:
    """A process that goes on all the while, counts its operations in `shared[0]` until `shared[8]`
    is set, and then looks whether it finds what it wrote."""

    def work(_: Callable[[], None]) -> None:
        cache = DiskCache(directory, **options)
        known = Known(options.get("eviction") != "none")
        worker = Worker("survivor", seed, known)
        for number, (call, changed) in enumerate(worker.changes(), 1):
            started = time.monotonic()
            call(cache)
            taken = time.monotonic() - started
            assert taken < PATIENCE, f"an operation took {taken} s"
            known.done(changed)
            if number % 50 == 0:
                known.look(cache, f"after {number} operations")
            struct.pack_into("q", shared, 0, number)
            if shared[8]:
                break
        known.look(cache, "at the end")
        cache.close()

    return Child(work)


@pytest.mark.in_turn
@pytest.mark.parametrize("scenario", ["ample", "evicting"])
def test_kill_at_random(
    disks: Path, backend: str, core: str, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = seeded(f"kill {backend} {core} {scenario}")
    monkeypatch.setattr(checkpointing, "_CHECKPOINT_RECORDS", 300)
    options = {**(SMALL if scenario == "ample" else TIGHT), "backend": backend}
    killed = acknowledged = 0
    for series in range(2):
        directory = disks / f"cache{series}"
        DiskCache(directory, **options).close()
        shared = mmap.mmap(-1, 16)
        seed = f"{rng.random()}"
        other = survivor(directory, options, seed, shared) if series else None
        known = {name: Known(scenario == "evicting") for name in "ab"}
        total = [0, 0]
        for turn in range(13):
            when = f"series {series}, round {turn}"
            with at_most(60, when):
                # Now and then the victims use a handle that they inherit.
                inherited = DiskCache(directory, **options) if rng.random() < 0.4 else None
                if inherited is not None:
                    inherited.set("parent", turn)
                workers = {name: Worker(name, f"{name}{rng.random()}", known[name]) for name in known}
                children = {
                    name: Child(lambda ack, w=worker: _victim(w, inherited, directory, options, ack))
                    for name, worker in workers.items()
                }
                counting = scenario == "ample"
                counter = (
                    Child(lambda ack: _counter(inherited, directory, options, ack)) if counting else None
                )
                if rng.random() < 0.7:
                    children["a"].wait_for(rng.choice((1, 1, 10, 30)))
                time.sleep(rng.uniform(0, 0.03))
                for name in rng.sample(sorted(children), 2):
                    killed += children[name].end(kill=True)
                    workers[name].follow(children[name].acknowledged)
                    acknowledged += children[name].acknowledged
                if counter is not None:
                    killed += counter.end(kill=True)
                    total = [total[0] + counter.acknowledged, total[1] + counter.acknowledged + 1]
                if other is not None:
                    _goes_on(shared, other)
                cache = inherited or DiskCache(directory, **options)
                cache.set("after", turn)
                for name in known:
                    known[name].look(cache, f"{when}, {name}")
                if counting:
                    assert total[0] <= cache.get("total", 0) <= total[1], when
                    total = [cache.get("total", 0)] * 2
                    if inherited is not None:
                        assert cache.get("parent") == turn
                if other is None:
                    sound(cache, when, leftovers=inherited is not None)
                cache.close()
                if other is None and rng.random() < 0.5:
                    lose_index(directory)
                    cache = DiskCache(directory, **options)
                    for name in known:
                        known[name].look(cache, f"{when}, {name}, index made anew")
                    if counting:
                        assert total[0] <= cache.get("total", 0) <= total[1] + 1, when
                        total = [cache.get("total", 0)] * 2
                    sound(cache, f"{when}, index made anew")
                    cache.close()
        with at_most(60, "the end"):
            if other is not None:
                shared[8] = 1
                other.end(kill=False)
            for lost in (False, True):
                if lost:
                    lose_index(directory)
                cache = DiskCache(directory, **options)
                for name in known:
                    known[name].look(cache, f"series {series}, end, index made anew: {lost}")
                sound(cache, f"series {series}, end, index made anew: {lost}")
                cache.close()
    assert killed >= 40, killed
    assert acknowledged > 300, acknowledged
    print(f"{killed} killed, {acknowledged} operations acknowledged")


def _victim(
    worker: Worker, inherited: DiskCache | None, directory: Path, options: dict[str, Any],
    acknowledge: Callable[[], None],
) -> None:  # fmt: skip
    worker.run(inherited or DiskCache(directory, **options), acknowledge)


def _counter(
    inherited: DiskCache | None, directory: Path, options: dict[str, Any], acknowledge: Callable[[], None]
) -> None:
    cache = inherited or DiskCache(directory, **options)
    while True:
        cache.incr("total")
        acknowledge()


def _goes_on(shared: mmap.mmap, other: Child) -> None:
    """Whoever was not killed gets some operations done, soon."""
    before, deadline = struct.unpack_from("q", shared)[0], time.monotonic() + PATIENCE
    while struct.unpack_from("q", shared)[0] < before + 5:
        if time.monotonic() > deadline or other.ended():
            raise AssertionError("the process that was left alone does not go on")
        time.sleep(0.0005)


# -- behind every step --------------------------------------------------------------------------


class Script(Worker):
    """A short sequence in which everything happens: rolls, growth, cleaning, large values, removals."""

    def changes(self) -> Iterator[Change]:
        known = self.known

        def put(key: str, size: int) -> Change:
            value = f"{key}#{next(numbers)}:".encode() + noise(size)
            return lambda c: c.set(key, value), {key: value}

        numbers = iter(range(10**9))
        yield put("base0", 100)  # over one that was there
        yield put("new", 50)
        yield put("large", 2000)
        yield put("large", 1800)
        yield lambda c: c.delete("base1"), {"base1": MISSING}
        yield lambda c: c.incr("count"), {"count": 1}
        yield lambda c: c.add("added", 1), {"added": 1}
        many = {f"many{i}": f"many{i}#{next(numbers)}" for i in range(12)}
        yield lambda c: c.set_many(many), many
        yield lambda c: c.touch("base2", 1e6), {}
        yield _roll, {}
        for i in range(3, 10):
            yield put(f"base{i}", 300)
        yield lambda c: c._store.checkpoints.write_if(), {}
        yield (
            lambda c: c.delete_many(["many1", "many2", "base3"]),
            dict.fromkeys(("many1", "many2", "base3"), MISSING),
        )
        yield _roll, {}
        yield _clean, {}
        yield lambda c: c.pop("base4"), {"base4": MISSING}
        yield lambda c: c.delete("large"), {"large": MISSING}
        if known.evicts:
            for i in range(40):
                yield put(f"filler{i}", 700)
            yield lambda c: c.cull(), {}
        else:
            yield lambda c: c.clear(), dict.fromkeys(known.values, MISSING)
        yield put("last", 10)
        yield lambda c: c.close(), {}


def _roll(cache: DiskCache) -> None:
    with cache._store.locks.appending:
        cache._store.active.seal()


def _clean(cache: DiskCache) -> None:
    for _ in range(4):
        cache._store.cleaner.clean_emptiest()
    cache._store.dead.drop_all()


class Base:
    """A cache to begin with, copied for each point at which a child is to be killed."""

    def __init__(self, disks: Path, backend: str, evicts: bool) -> None:
        self._disks, self.options = disks, {**(TIGHT if evicts else SMALL), "segment_size": 4096}
        self.options["backend"] = backend
        self.evicts = evicts
        self._start = disks / "start"
        self._start_known: dict[Any, Any] = {}
        cache = DiskCache(self._start, **self.options)
        for i in range(20):
            self._start_known[f"base{i}"] = value = f"base{i}:".encode() + noise(150)
            cache.set(f"base{i}", value)
        cache.close()
        self.points = 0

    def try_point(self, arm: Callable[[DiskCache], None], when: str, *, rebuild: bool) -> bool:
        """Let a child die where `arm` makes it. False if it comes to its end instead."""
        self.points += 1
        directory = self._disks / f"point{self.points}"
        shutil.copytree(self._start, directory)
        known = Known(self.evicts)
        known.done(self._start_known)
        script = Script("s", "s", known)

        def work(acknowledge: Callable[[], None]) -> None:
            cache = DiskCache(directory, **self.options)
            arm(cache)
            script.run(cache, acknowledge)

        with at_most(100, when):
            witness = DiskCache(directory, **self.options)
            child = Child(work)
            died = child.end(kill=False)
            if died:
                script.follow(child.acknowledged)
                known.look(witness, f"{when}, another handle", settled=False)
                witness.set("witness", when)
                assert witness.get("witness") == when
                known.look(witness, f"{when}, another handle, later")
                if self.points % 3 == 0:
                    known.remove_unsettled(witness)
                sound(witness, f"{when}, another handle", leftovers=True)
            witness.close()
            if died:
                if rebuild:
                    lose_index(directory)
                with DiskCache(directory, **self.options) as cache:
                    known.look(cache, f"{when}, opened again, rebuilt: {rebuild}")
                    sound(cache, f"{when}, opened again, rebuilt: {rebuild}")
                    known.remove_unsettled(cache)
                lose_index(directory)
                with DiskCache(directory, **self.options) as cache:
                    known.look(cache, f"{when}, index made anew at last")
        shutil.rmtree(directory)
        return died


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CALLS: dict[str, tuple[Any, str]] = {
    "begin": (index.Index, "_begin"),
    "put": (index.Index, "put"),
    "remove": (index.Index, "remove"),
    "move": (index.Index, "move"),
    "install": (index.Index, "install"),
    "add_segment": (index.Index, "add_segment"),
    "resize": (index.Index, "resize_segment"),
    "drop_segment": (index.Index, "drop_segment"),
    "append": (segment.SegmentWriter, "append"),
    "append_many": (segment.SegmentWriter, "append_many"),
    "seal": (segment.SegmentWriter, "seal"),
    "show": (showing.Showing, "_install"),
    "discard": (leaving_files.LeavingFiles, "discard"),
    "doom": (dead_segments.DeadSegments, "_doom"),
    "write": (None, "write"),
    "unlink": (None, "unlink"),
    "replace": (None, "replace"),
    "allocate": (None, "allocate"),
    "truncate": (None, "truncate"),
    "open": (None, "open"),
}
MANY = 5  # calls of a kind, beyond which only some are tried


@pytest.mark.in_turn
@pytest.mark.parametrize("evicts", [False, True], ids=["ample", "evicting"])
def test_kill_at_each_call(disks: Path, backend: str, evicts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and behind each call of what changes files or the index."""
    monkeypatch.setenv("YATAGARASU_CORE", "python")
    rng = seeded(f"kill calls {backend} {evicts}")
    base = Base(disks, backend, evicts)
    died = 0
    for what, (owner, name) in CALLS.items():
        number, behind, some = 1, False, 0
        while True:

            def arm(cache: DiskCache) -> None:
                target = owner or type(cache._store.backend)
                original, left = getattr(target, name), [number]

                def counted(*args: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if not left[0] and not behind:
                        _die()
                    result = original(*args, **options)
                    if not left[0]:
                        _die()
                    return result

                setattr(target, name, counted)

            if not base.try_point(arm, f"{what} {number} behind={behind}", rebuild=rng.random() < 0.5):
                break
            died += 1
            some += 1
            number += 1 if some < 3 else rng.randint(1, 4) if some < MANY else rng.randint(5, 15)
            behind = rng.random() < 0.5
        assert some or what in ("allocate", "doom", "truncate"), f"{what} was not reached"
    print(f"{died} deaths")


TRACED = {module.__file__ for module in MODULES}
INNERMOST = {index.__file__}


def _trace_lines(number: int, files: set[str | None]) -> None:
    """Die at the n-th line that runs in one of these files."""
    left = [number]

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            left[0] -= 1
            if not left[0]:
                _die()
        return local

    def entering(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    threading.settrace(entering)
    sys.settrace(entering)


@pytest.mark.in_turn
@pytest.mark.parametrize("evicts", [False, True], ids=["ample", "evicting"])
@pytest.mark.parametrize("files", ["index", "all"])
def test_kill_at_lines(
    disks: Path, backend: str, evicts: bool, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At lines of the code, wherever they are: some at random, other ones with another seed."""
    monkeypatch.setenv("YATAGARASU_CORE", "python")
    rng = seeded(f"kill lines {backend} {evicts} {files}")
    base = Base(disks, backend, evicts)
    chosen = INNERMOST if files == "index" else TRACED
    points = int(os.environ.get("YATAGARASU_KILL_POINTS", "25"))
    most = 1 << 10
    while base.try_point(lambda cache: _trace_lines(most, chosen), f"line {most}", rebuild=False):
        most *= 2
    died = 0
    for _ in range(points):
        number = rng.randint(1, most)
        lost = rng.random() < 0.3
        when = f"line {number} of {files}"
        died += base.try_point(lambda cache: _trace_lines(number, chosen), when, rebuild=lost)
    assert died > points // 8
    print(f"{died} deaths, {most} lines at most")


# -- appended, and never shown ------------------------------------------------------------------


REMOVALS: dict[str, Callable[[DiskCache], object]] = {
    "delete": lambda cache: cache.delete(("k", 1)),
    "delete_many": lambda cache: cache.delete_many([("k", 1), ("k", 2)]),
    "pop": lambda cache: cache.pop(("k", 1)),
    "evict": lambda cache: cache.evict("tag"),
    "delete_prefix": lambda cache: cache.delete_prefix(("k",)),
    "clear": lambda cache: cache.clear(),
}


def _never_shown(*_: object) -> Any:
    _die()


def _interrupted(*_: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.in_turn
@pytest.mark.parametrize("who", ["stays", "opens", "opens beside another"])
@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("removal", REMOVALS)
def test_removed_after_its_writer_died(
    disks: Path, backend: str, core: str, removal: str, durability: str, who: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A record that a dead process appended, and that was never shown, is removed like any other.

    There is nothing in the index to remove; a rebuild would find the record all the same.
    """
    options = {**SMALL, "backend": backend, "durability": durability}
    directory = disks / "cache"
    DiskCache(directory, **options).close()

    def work(_: Callable[[], None]) -> None:
        monkeypatch.setenv("YATAGARASU_CORE", "python")  # the compiled one appends and shows in one call
        with DiskCache(directory, **options) as cache:
            cache.set("shown", 1)
            monkeypatch.setattr(showing.Showing, "_install", _never_shown)
            cache.set(("k", 1), b"dead", tag="tag")

    with at_most(60, removal):
        cache = DiskCache(directory, **options)
        cache.set("before", 0)
        assert Child(work).end(kill=False)
        other = None
        if who != "stays":
            if who == "opens":
                cache.close()
            else:
                other = cache
                other.set("so that it has a segment", 1)
            cache = DiskCache(directory, **options)
        assert cache.get(("k", 1)) is None
        assert not REMOVALS[removal](cache) or removal == "clear"
        sound(cache, removal)
        for opened in (cache, other):
            if opened is not None:
                opened.close()
        for _ in range(2):
            lose_index(directory)
            with DiskCache(directory, **options) as cache:
                assert cache.get(("k", 1)) is None
                assert (cache.get("shown") == 1) is (removal != "clear")
                sound(cache, removal)


@pytest.mark.parametrize("removal", ["delete", "evict"])
@pytest.mark.parametrize("durability", ["none", "sync"])
def test_removed_after_a_put_was_interrupted(
    disks: Path, backend: str, core: str, removal: str, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of a put that ended with an exception, such as KeyboardInterrupt, before it was shown."""
    options = {**SMALL, "backend": backend, "durability": durability}

    cache = DiskCache(disks / "cache", **options)
    cache.set("shown", 1)
    with monkeypatch.context() as patch:
        patch.setattr(showing.Showing, "_install", _interrupted)
        digest = key_digest(key := encode_key(("k", 1)), cache._store.current.seed)
        with pytest.raises(KeyboardInterrupt):
            cache._store.writing.put(Item(*digest, key, b"interrupted", KIND_BYTES, tag=encode_key("tag")))
    assert cache.get(("k", 1)) is None
    assert not REMOVALS[removal](cache)
    shutil.copytree(disks / "cache", disks / "as it is")
    cache.close()
    for name in ("cache", "as it is"):
        lose_index(disks / name)
        with DiskCache(disks / name, **options) as cache:
            assert cache.get(("k", 1)) is None
            assert cache.get("shown") == 1


def test_killed_while_it_takes_back_what_was_interrupted(
    disks: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment is sealed already then: whoever finds its owner dead goes on."""
    monkeypatch.setenv("YATAGARASU_CORE", "python")
    options = {**SMALL, "backend": backend}
    directory = disks / "cache"

    def work(_: Callable[[], None]) -> None:
        cache = DiskCache(directory, **options)
        cache.set("shown", 1)
        monkeypatch.setattr(segment.SegmentWriter, "void", lambda *_: None)
        monkeypatch.setattr(showing.Showing, "_install", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.set("k", b"interrupted")
        monkeypatch.setattr(segment.SegmentWriter, "void", _never_shown)
        cache.close()

    assert Child(work).end(kill=False)
    with DiskCache(directory, **options) as cache:
        assert not cache.delete("k")
        assert cache.check() == []
    lose_index(directory)
    with DiskCache(directory, **options) as cache:
        assert cache.get("k") is None and cache.get("shown") == 1


def test_an_older_value_stays_where_a_newer_one_was_not_shown(
    disks: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead process did not come to show is taken back; what it would have replaced is not."""
    monkeypatch.setenv("YATAGARASU_CORE", "python")
    options = {**SMALL, "backend": backend}
    directory = disks / "cache"

    def work(_: Callable[[], None]) -> None:
        with DiskCache(directory, **options) as cache:
            monkeypatch.setattr(showing.Showing, "_install", _never_shown)
            cache.set("k", b"new")

    with DiskCache(directory, **options) as cache:
        cache.set("k", b"old")
    assert Child(work).end(kill=False)
    with DiskCache(directory, **options) as cache:
        assert cache.get("k") == b"old"
    lose_index(directory)
    with DiskCache(directory, **options) as cache:
        assert cache.get("k") == b"old"
        sound(cache, "rebuilt")


def test_a_lone_process_logs_no_removal_of_nothing(disks: Path, backend: str, core: str) -> None:
    """It costs a write, so it is done only where somebody may have died."""
    with DiskCache(disks / "cache", **{**SMALL, "backend": backend}) as cache:
        cache.set("k", 1)
        size = cache._store.changes.size
        assert not cache.delete("none") and cache.pop("none") is None
        assert not cache.delete_many(["a", "b"]) and not cache.evict("none")
        assert cache._store.changes.size == size
        with DiskCache(disks / "cache", **{**SMALL, "backend": backend}) as other:
            other.set("l", 1)
            assert not cache.delete("none")
            assert cache._store.changes.size > size
            assert cache.get("k") == other.get("l") == 1
