"""Large values that are being stored, or removed, when whoever does so dies or is interrupted.

Others live on beside the same cache, as in a service whose workers are recycled, or killed: what the dead
had under way counts no more, leaves no file, and drives nobody's entries out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers import ROOT, Clock, disk_blocks, noise, run_python

from yatagarasu_cache import CacheIOError, DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store import recovery
from yatagarasu_cache.store.owners import Note
from yatagarasu_cache.store.under_way import UnderWay, count_anew

Make = Callable[..., DiskCache]
MIB = 1 << 20
LIMIT: dict[str, Any] = {"size_limit": 2 * MIB, "large_value_size": 1}
LARGE = 60_000
KEPT = 8  # values that nothing may drive out: a quarter of the limit
SEED = int(os.environ.get("YATAGARASU_TEST_SEED", "1"))

# Forks children that each die at the same place while they store, replace or remove a large value.
DYING = """
import os, signal, sys
from yatagarasu_cache import DiskCache
from yatagarasu_cache.store.core import PythonCore
from yatagarasu_cache.store.large import LargeFiles
from yatagarasu_cache.store.showing import Showing
from yatagarasu_cache.store.under_way import UnderWay

directory, place, times, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_behind(owner, name, calls=1):
    function, left = getattr(owner, name), [calls]
    def wrapper(*args, **options):
        done = function(*args, **options)
        left[0] -= 1
        if not left[0]:
            die()
        return done
    setattr(owner, name, wrapper)

def dies_before(owner, name):
    setattr(owner, name, die)

def half_written(self, path, create, write, *, sync):
    with create() as fd:
        os.write(fd, bytes(size // 2))
        die()

WHERE = {
    "counted": (dies_before, LargeFiles, "_create"),
    "noted, not counted": (dies_behind, UnderWay, "_note"),
    "created": (dies_behind, LargeFiles, "_create"),
    "half written": (setattr, LargeFiles, "_fill", half_written),
    "written": (dies_before, LargeFiles, "publish"),
    "in its place": (dies_behind, LargeFiles, "publish"),
    "shown": (dies_behind, Showing, "_install"),
    "replaced": (dies_before, LargeFiles, "remove"),
    "leaving": (dies_behind, UnderWay, "leave"),
    "removed, not unlinked": (dies_before, LargeFiles, "remove"),
    "unlinked": (dies_behind, LargeFiles, "remove"),
    "unlinked, half counted": (dies_behind, UnderWay, "_note", 2),
    "cleared": (dies_before, LargeFiles, "remove"),
}
BY_REMOVING = ("leaving", "removed, not unlinked", "unlinked", "unlinked, half counted", "cleared")

def run():
    cache = DiskCache(directory)
    own = [("own", n) for n in range(3)] if place == "cleared" else ["k"]
    if place in BY_REMOVING or place == "replaced":
        for key in own:
            cache.set(key, bytes(size))
    arm, *where = WHERE[place]
    arm(*where)
    if place == "cleared":
        cache.delete_many(own)
    elif place in BY_REMOVING:
        cache.delete("k")
    cache.set("k", bytes(size))

for _ in range(times):
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
PLACES = (
    "counted", "noted, not counted", "created", "half written", "written", "in its place", "shown", "leaving",
    "replaced", "removed, not unlinked", "unlinked", "unlinked, half counted", "cleared",
)  # fmt: skip


def filled(make: Make) -> DiskCache:
    cache = make(**LIMIT)
    for n in range(KEPT):
        cache.set(("kept", n), noise(LARGE, n))
    return cache


def ensure_exact(cache: DiskCache) -> None:
    """Nothing but entries counts, and nothing else has a file."""
    store = cache._store
    with store.locks.index:
        counted = store.current.index.words[f.W_LARGE_BYTES], store.current.index.words[f.W_LEAVING]
        assert counted == (store.current.index.large_bytes(), 0)
    files = [bytes_ for _, bytes_, _ in store.files.large.listed()]
    assert sum(map(f.file_bytes, files)) == counted[0]
    # Of values: a checkpoint of the living may be under way there.
    assert not [name for name in os.listdir(store.temporaries.directory) if name.endswith(f.VALUE_SUFFIX)]


@pytest.mark.in_turn
@pytest.mark.parametrize("place", PLACES)
def test_what_the_dead_had_under_way_counts_no_more(make: Make, directory: Path, place: str) -> None:
    cache = filled(make)
    run_python(DYING, directory, place, "30", str(LARGE))
    assert cache.set("after", noise(LARGE, 99))
    assert disk_blocks(directory) <= LIMIT["size_limit"]
    assert all(cache[("kept", n)] == noise(LARGE, n) for n in range(KEPT))
    assert cache.stats().evictions == 0
    cache._store.reaper.reap()
    ensure_exact(cache)
    assert cache.check() == []


@pytest.mark.in_turn
@pytest.mark.parametrize("place", ["counted", "in its place", "removed, not unlinked"])
def test_clearing_and_checking_take_it_along(make: Make, directory: Path, place: str) -> None:
    cache = filled(make)
    run_python(DYING, directory, place, "5", str(LARGE))
    cache.check(fix=True)
    ensure_exact(cache)
    assert len(cache) >= KEPT
    run_python(DYING, directory, place, "5", str(LARGE))
    cache.clear()
    ensure_exact(cache)
    assert disk_blocks(directory) < MIB // 2


def test_a_full_cache_evicts_nothing_for_the_dead(make: Make, directory: Path) -> None:
    """Its live bytes fit, but not together with what somebody had under way who is no more."""
    cache = make(**LIMIT)
    n = 0
    while cache.stats().evictions == 0:
        cache.set(n, noise(LARGE, n))
        n += 1
    there = set(cache)
    spare = 3
    cache.delete_many(list(there)[:spare])
    there = set(cache)
    run_python(DYING, directory, "half written", str(spare), str(LARGE - 5000))
    time.sleep(0.11)  # it is looked for the dead ten times a second at most
    before = cache.stats().evictions
    for n in range(spare - 1):
        cache.set(("new", n), noise(LARGE, n))
    assert cache.stats().evictions == before
    assert there <= set(cache)


STOPS = """
import os, signal, sys
from yatagarasu_cache import DiskCache
from yatagarasu_cache.store.large import LargeFiles
cache, remove, first = DiskCache(sys.argv[1]), LargeFiles.remove, [True]
def stop(self, *name):
    if first and first.pop():
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return remove(self, *name)
LargeFiles.remove = stop
cache.clear() if sys.argv[2] == "clear" else cache.delete_many(range(20))
cache.close()
"""


@pytest.mark.in_turn
@pytest.mark.parametrize("how", ["clear", "delete"])
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_whoever_is_stopped_while_he_removes_takes_no_room(
    make: Make, directory: Path, how: str, end: signal.Signals
) -> None:
    """Found by fresh eyes: after a second his files counted no more, and were there still."""
    cache = make(**LIMIT)
    for n in range(20):
        cache.set(n, noise(LARGE, n))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPS, str(directory), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"stops\n"
        try:
            for n in range(20):
                cache.set(("new", n), noise(LARGE, n))
                assert disk_blocks(directory) <= LIMIT["size_limit"]
        finally:
            process.send_signal(end)
    assert cache.stats().evictions == 0
    assert all(cache[("new", n)] == noise(LARGE, n) for n in range(20))
    cache._store.reaper.reap()
    ensure_exact(cache)
    assert cache.check() == []


@pytest.mark.parametrize("by", ["reap", "check"])
def test_what_was_promised_is_durable_before_an_orphan_goes(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Else a power cut might bring something older in the place of what was removed."""
    cache = filled(make)
    cache.flush()
    run_python(DYING, directory, "removed, not unlinked", "1", str(LARGE))
    done: list[int] = []  # files that were there when it was synced
    sync = cache._store.durability.sync_dirty

    def noted() -> None:
        done.append(len(list(cache._store.files.large.listed())))
        sync()

    with monkeypatch.context() as patch:
        patch.setattr(cache._store.durability, "sync_dirty", noted)
        if by == "check":
            patch.setattr(cache._store.reaper, "reap", lambda: 0)
            assert [problem.kind for problem in cache.check(fix=True)] == ["large"]
        else:
            cache._store.reaper.reap()
    assert done[:1] == [KEPT + 1]
    cache._store.reaper.reap()
    ensure_exact(cache)


def test_evicting_does_not_depend_on_looking_for_the_dead(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is no descriptor for their marks, say."""
    cache = make(**LIMIT)
    for n in range(60):
        if n == 20:
            refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            monkeypatch.setattr(cache._store.owner, "marks", Mock(side_effect=refused))
        cache._store.reaper._reaped = 0.0
        assert cache.set(n, noise(LARGE, n))
        assert cache[n] == noise(LARGE, n)
    monkeypatch.undo()
    assert cache.stats().evictions > 20
    ensure_exact(cache)


WRITING = """
import random, sys
from yatagarasu_cache import DiskCache
cache, pick = DiskCache(sys.argv[1]), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    key = pick.randrange(4)
    if pick.random() < 0.3:
        cache.delete(key)
    else:
        cache.set(key, pick.randbytes(pick.randrange(1, 100_000)))
"""


@pytest.mark.in_turn
@pytest.mark.slow
def test_kills_at_random(make: Make, directory: Path) -> None:
    cache = filled(make)
    pick = random.Random(SEED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for n in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITING, str(directory), str(SEED * 1000 + n)],
            stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        with process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(pick.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        cache.set("between", noise(LARGE, n))
        assert disk_blocks(directory) <= LIMIT["size_limit"], f"seed {SEED}, kill {n}"
    assert cache.stats().evictions == 0, f"seed {SEED}"
    assert all(cache[("kept", n)] == noise(LARGE, n) for n in range(KEPT))
    cache._store.reaper.reap()
    ensure_exact(cache)
    assert cache.check() == []


# -- exceptions, in a process that lives on ------------------------------------------------------


class Stop(BaseException):
    """What a time limit, or Ctrl-C, raises."""


STEPS = {
    "counted": ("large", "_create", False),
    "written": ("large", "publish", False),
    "in its place": ("large", "publish", True),
    "shown": ("showing", "_install", True),
    "noted, not counted": ("under_way", "_note", True),
    "not unlinked": ("large", "remove", False),
    "unlinked": ("large", "remove", True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("method", ["set", "replace", "delete", "clear"])
@pytest.mark.parametrize("where", ["here", "in a thread that ends"])
def test_what_was_interrupted_counts_no_more(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, step: str, method: str, where: str
) -> None:
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)  # so nobody is alone
    store = cache._store
    assert other._store is not store
    what, name, behind = STEPS[step]
    owner: Any = {"large": store.files.large, "showing": store.showing, "under_way": store.under_way}[what]
    function = getattr(owner, name)

    def interrupted(*args: Any, **options: Any) -> Any:
        if behind:
            function(*args, **options)
        raise Stop

    def work() -> None:
        with monkeypatch.context() as patch, contextlib.suppress(Stop):
            patch.setattr(owner, name, interrupted)
            if method == "set":
                cache.set("new", noise(LARGE))
            elif method == "replace":
                cache.set("k", noise(LARGE))
            elif method == "delete":
                cache.delete("k")
            else:
                cache.clear()

    cache.set("k", noise(LARGE))
    for _ in range(10):
        if where == "here":
            work()
        else:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        cache.set("k", noise(LARGE))
        ensure_exact(cache)
    assert disk_blocks(directory) <= LIMIT["size_limit"]
    assert cache.stats().evictions == 0
    assert cache.check() == []


def test_what_others_have_under_way_still_counts(make: Make, directory: Path) -> None:
    """Counting anew takes nothing from those who live: neither what they store, nor what they remove."""
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)
    seen: list[tuple[int, int]] = []

    def parts() -> Any:
        yield noise(LARGE, 10)  # two parts are looked at before anything is stored
        for n in range(3):
            yield noise(LARGE, n)
            with cache._store.locks.index:
                count_anew(cache._store.owner, cache._store.current.index)
                words = cache._store.current.index.words
                seen.append((words[f.W_LARGE_BYTES] - words[f.W_LEAVING], cache._store.current.index.large_bytes()))

    other.set("stream", parts())
    assert [counted - entries for counted, entries in seen] == [f.file_bytes(LARGE * n) for n in (2, 3, 4)]
    ensure_exact(cache)
    remove = other._store.files.large.remove

    def removing(*name: int) -> bool:
        with cache._store.locks.index:
            cache._store.under_way.count_anew()
            words = cache._store.current.index.words
            assert words[f.W_LEAVING] == f.file_bytes(4 * LARGE)
            assert words[f.W_LARGE_BYTES] == cache._store.current.index.large_bytes() + words[f.W_LEAVING]
        return remove(*name)

    other._store.files.large.remove = removing  # type: ignore[method-assign]
    other.delete("stream")
    ensure_exact(cache)


def test_what_the_dead_had_stored_goes_while_others_are_storing(make: Make, directory: Path) -> None:
    """However new it is, and however long those take: its name is not among those of the living."""
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)

    def parts() -> Any:
        yield noise(LARGE)
        yield noise(LARGE)
        for place in ("in its place", "replaced", "removed, not unlinked"):
            run_python(DYING, directory, place, "5", str(LARGE))
            cache._store.reaper.reap()
            assert len(list(cache._store.files.large.listed())) == KEPT + ("k" in cache)
            cache.delete("k")
        yield noise(LARGE)

    other.set("stream", parts())
    cache._store.reaper.reap()
    assert len(list(cache._store.files.large.listed())) == KEPT + 1
    ensure_exact(cache)
    assert other["stream"] == noise(LARGE) * 3


# Stores a large value, and stops when its file is in its place, and no entry stands for it.
STOPPING = """
import os, signal, sys
from yatagarasu_cache import DiskCache
from yatagarasu_cache.store.large import LargeFiles
cache, publish, first = DiskCache(sys.argv[1]), LargeFiles.publish, [True]
cache.set("k", bytes(60_000))

def stop(self, *args, **options):
    publish(self, *args, **options)
    if first.pop():
        os.kill(os.getpid(), signal.SIGSTOP)
    first.append(False)

LargeFiles.publish = stop
assert cache.set("k", bytes(range(256)) * 300)
assert cache["k"] == bytes(range(256)) * 300
"""


@pytest.mark.parametrize("what", ["check", "reap", "fill", "a killed one", "reopen"])
def test_what_a_stopped_process_is_about_to_show_is_spared(make: Make, directory: Path, what: str) -> None:
    """However long it is stopped: its mark of life tells the name."""
    cache = filled(make)
    with subprocess.Popen([sys.executable, "-c", STOPPING, str(directory)], cwd=ROOT) as process:
        os.waitpid(process.pid, os.WUNTRACED)
        if what == "check":
            assert cache.check(fix=True) == []
        elif what == "reap":
            cache._store.reaper.look_for_orphans()
        elif what == "fill":
            cache.set_many({("new", n): noise(LARGE, n) for n in range(40)})
        elif what == "a killed one":
            run_python(DYING, directory, "in its place", "3", str(LARGE))
            cache._store.reaper.reap()
        else:
            cache.close()
            cache = make(directory, **LIMIT)
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0
    assert cache["k"] == bytes(range(256)) * 300
    assert cache.stats().corrupt == 0
    cache._store.reaper.reap()
    ensure_exact(cache)
    assert cache.check() == []


@pytest.mark.parametrize("way", ["set", "add", "stream"])
def test_what_is_removed_before_it_is_shown_is_stored_again_or_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """By whoever may remove files; a stream cannot be had again."""
    cache = filled(make)
    store, first = cache._store, [True]
    publish = store.files.large.publish

    def removed(temporary: str, low: int, high: int, pointer: int, **options: Any) -> None:
        publish(temporary, low, high, pointer, **options)
        if first.pop():
            store.files.large.remove(low, high, pointer)
        first.append(False)

    monkeypatch.setattr(store.files.large, "publish", removed)
    if way == "set":
        assert cache.set(("kept", 0), noise(2 * LARGE))
        assert cache["kept", 0] == noise(2 * LARGE)
    elif way == "add":
        assert cache.add("new", noise(2 * LARGE)) and cache["new"] == noise(2 * LARGE)
    else:
        with pytest.raises(CacheIOError, match="cannot write a large value"):
            cache.set(("kept", 0), iter([noise(LARGE), noise(LARGE)]))
        assert cache["kept", 0] == noise(LARGE, 0)
    assert cache.stats().corrupt == 0
    ensure_exact(cache)
    assert cache.check() == []


def test_who_begins_while_the_dead_are_looked_for_is_not_taken_for_one(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)  # has no mark yet
    run_python(DYING, directory, "half written", "1", str(LARGE))
    remove, temporary = recovery.Recovery.remove_unfinished, directory / f.TEMPORARY_NAME
    thread = threading.Thread(target=other.set, args=("stream", iter([noise(LARGE)] * 3)))

    def removing(*args: Any, **options: Any) -> None:
        there = len(os.listdir(temporary))
        if thread.ident is None:  # and not its own look
            thread.start()  # marks were looked at by now
            while len(os.listdir(temporary)) == there:
                time.sleep(0.001)
        remove(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recovery.Recovery, "remove_unfinished", removing)
        cache._store.reaper.reap()
    thread.join()
    assert cache["stream"] == noise(LARGE) * 3
    ensure_exact(cache)


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_what_cannot_be_read_any_more_goes_and_counts_no_more(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The record that names a large file: what no entry stands for is looked for."""
    cache = filled(make)
    store = cache._store

    at = store.finding.find(*f.key_digest(encode_key(("kept", 0)), store.current.seed))
    lost, pointer = store.current.index.slot(at).place, store.files.segments.pointer

    def pointer_of(slot: f.Slot) -> int:
        if slot.place == lost:
            raise OSError(errno.EIO, "no such luck")
        return pointer(slot)

    with monkeypatch.context() as patch:
        patch.setattr(store.files.segments, "pointer", pointer_of)
        if change == "delete":
            assert cache.delete(("kept", 0))
        else:
            cache["kept", 0] = noise(2 * LARGE)
    assert len(list(store.files.large.listed())) == KEPT - (change == "delete")
    assert all(cache["kept", n] == noise(LARGE, n) for n in range(1, KEPT))
    ensure_exact(cache)


def synced_by(cache: DiskCache, patch: pytest.MonkeyPatch) -> list[str]:
    """The large files that `cache` makes durable from now on."""
    synced: list[str] = []
    sync = cache._store.backend.sync

    def noted(fd: int) -> None:
        if "/large/" in (name := os.readlink(f"/proc/self/fd/{fd}")):
            synced.append(name)
        sync(fd)

    patch.setattr(cache._store.backend, "sync", noted)
    return synced


@pytest.mark.parametrize("marks", ["stay", "are removed"])
def test_a_flush_makes_durable_what_was_under_way_at_the_one_before(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, marks: str
) -> None:
    """However long it took, and whoever flushed meanwhile."""
    clock = Clock(monkeypatch)
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)

    def parts() -> Any:
        for _ in range(3):
            yield noise(LARGE)
            clock.advance(100)
            if marks == "are removed":
                for mark in (directory / f.WRITERS_NAME).iterdir():
                    mark.unlink()
            cache.flush()

    other.set("stream", parts())
    assert len(list(cache._store.files.large.listed())) == KEPT + 1
    synced = synced_by(cache, monkeypatch)
    cache.flush()
    assert len(synced) == 1
    clock.advance(1)
    cache.flush()
    assert len(synced) == 1


def test_what_is_durable_is_not_synced_again_beside_a_long_stream(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)
    cache.flush()
    synced: list[str] = []

    def parts() -> Any:
        nonlocal synced
        yield noise(LARGE)
        yield noise(LARGE)
        with monkeypatch.context() as patch:
            synced = synced_by(cache, patch)
            for n in range(6):
                cache.set(("kept", n), noise(LARGE, n))
        yield noise(LARGE)

    other.set("stream", parts())
    assert len(synced) == len(set(synced)) == 6


def test_of_many_the_lowest_are_named() -> None:
    note = Note(1, 2, 3, tuple(range(2000, 1000, -1)))
    assert Note.unpack(note.pack()) == Note(1, 2, 3, tuple(range(1001, 1501)))
    assert Note.unpack(note.pack()[:-1]) == Note.unpack(b"") == Note()


def test_what_others_are_removing_is_no_problem(make: Make, directory: Path) -> None:
    cache = filled(make)
    other = make(directory, **LIMIT, lock_timeout=7.0)
    remove, begun = other._store.files.large.remove, threading.Event()

    def slowly(*name: int) -> bool:
        begun.set()
        time.sleep(0.3)
        return remove(*name)

    other._store.files.large.remove = slowly  # type: ignore[method-assign]
    thread = threading.Thread(target=other.set, args=(("kept", 0), noise(LARGE, 0)))
    thread.start()
    assert begun.wait(60)
    assert cache.check() == []
    thread.join()
    ensure_exact(cache)


def test_a_fork_has_nothing_under_way(make: Make) -> None:
    cache = filled(make)
    under_way: UnderWay = cache._store.under_way

    def parts() -> Any:
        yield noise(LARGE)
        yield noise(LARGE)
        child = os.fork()
        if not child:
            os._exit(bool(cache._store.under_way) or cache["kept", 1] != noise(LARGE, 1))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert under_way
        yield noise(LARGE)

    cache.set("stream", parts())
    assert not under_way
    ensure_exact(cache)
