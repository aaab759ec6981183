"""Versions of entries: what changes them and what does not, and changes that depend on them."""

from __future__ import annotations

import io
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS
from helpers import LARGE, SEGMENT, Clock, Make, in_threads, noise, open_apart, run_python
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_collisions import colliding

from yatagarasu_cache import DiskCache, ReadOnlyError, SerializationError
from yatagarasu_cache.store import format as f

SMALL: dict[str, Any] = {"size_limit": 8 << 20, "segment_size": SEGMENT}
# Values of each kind: in compiled code's way, in the ordinary one, in a file of its own, in parts.
KINDS: dict[str, Callable[[int], Any]] = {
    "bytes": lambda n: noise(50, n),
    "container": lambda n: {"n": n, "more": (1, [2])},
    "large": lambda n: noise(2 * LARGE, n),
    "short stream": lambda n: iter([noise(10, n), noise(20, n)]),
    "large stream": lambda n: iter([noise(LARGE, n), noise(LARGE, n + 1)]),
    "file": lambda n: io.BytesIO(noise(3 * LARGE, n)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
durabilities = pytest.mark.parametrize("durability", ["none", "sync"])


def stored(kind: str, number: int) -> Any:
    """What comes back of a value."""
    value = KINDS[kind](number)
    if isinstance(value, Iterator) and not isinstance(value, io.BytesIO):
        return b"".join(value)
    return value.read() if isinstance(value, io.BytesIO) else value


def version(cache: DiskCache, key: Any = "k") -> int:
    entry = cache.get_entry(key)
    return 0 if entry is None else entry.version


def large_files(directory: Path | str) -> list[str]:
    return sorted(name for _, _, names in os.walk(os.path.join(directory, "large")) for name in names)


# -- what a version is ----------------------------------------------------------------------------


def test_every_set_makes_a_higher_one(core: str, cache: DiskCache) -> None:
    seen = [version(cache)]
    for store in (
        lambda: cache.set("k", b"1"), lambda: cache.set("k", b"1"), lambda: cache.set("k", {"a": 1}, tag="t"),
        lambda: cache.set("k", noise(4 << 20)), lambda: cache.set("k", iter([b"x"])), lambda: cache.set_many({"k": 1}),
        lambda: cache.incr("k"), lambda: cache.delete("k") and cache.add("k", 1), lambda: cache.update({"k": 2}),
        lambda: cache.modify("k", lambda n: n), lambda: cache.clear() and cache.set("k", 1),
        lambda: cache.pop("k") and cache.setdefault("k", 1),
    ):  # fmt: skip
        assert store()  or seen[-1]  # whatever it returns
        seen.append(version(cache))
    assert seen[0] == 0 and seen == sorted({*seen}), seen
    assert type(seen[-1]) is int


@kinds
def test_what_keeps_it(make: Make, core: str, directory: Path, kind: str) -> None:
    """Reading, `touch`, opening anew, a lost index, a check, copying on disk."""
    cache = make(**SMALL)
    cache.set("k", KINDS[kind](1), expire=1000, tag="t", meta="m")
    there = version(cache)

    def same() -> None:
        entry = cache.get_entry("k")
        assert entry is not None and entry.version == there and entry.value == stored(kind, 1)
        assert [entry.version for entry in cache.entries(tag="t")] == [there]

    same()
    assert cache.get("k") == stored(kind, 1) and "k" in cache and cache.touch("k", 500)
    same()
    cache.set("other", 1)
    assert cache.touch("k", math.inf) and cache.check(fix=True) == []
    same()
    cache.close()
    cache = make(**SMALL)
    same()
    for lost in (("index",), ("index", "checkpoint")):
        cache.close()
        for name in lost:
            (directory / name).unlink(missing_ok=True)
        cache = make(**SMALL)
        same()
    assert cache.check(fix=True) == []
    assert not cache.set("k", 1, if_version=there - 1) and not cache.set("k", 1, if_version=0)
    same()
    assert cache.set("k", 1, if_version=there) and version(cache) > there


@kinds
def test_cleaning_keeps_it(make: Make, core: str, directory: Path, kind: str) -> None:
    cache = make(**SMALL)
    store = cache._store
    cache.set("k", KINDS[kind](1))
    there = version(cache)
    low, high, _ = cache._desk.identify("k")
    place = store.finding.lookup(low, high).place  # type: ignore[union-attr]
    for n in range(40):  # garbage in the same segment
        cache.set("g", noise(5000, n))
    with store.locks.appending:
        store.active.seal()
    cache.set("after", 1)
    while store.cleaner.clean_emptiest():
        pass
    assert store.finding.lookup(low, high).place != place, "it was not moved"  # type: ignore[union-attr]
    assert version(cache) == there and cache["k"] == stored(kind, 1)
    cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert version(cache) == there
    assert not cache.delete("k", if_version=there + 1) and cache.delete("k", if_version=there)


def test_versions_of_what_was_removed_do_not_come_back(
    core: str, make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the clock is set back, and the index is lost: else a change would be made on what is gone."""
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    seen: set[int] = set()
    for turn in range(12):
        cache.set("k", turn, expire=1)
        there = version(cache)
        assert there not in seen
        seen.add(there)
        if turn % 4 < 3:
            cache.clear() if turn % 4 == 2 else (cache.delete, cache.pop)[turn % 4]("k")
        clock.advance((0, -3600, 5)[turn % 3])
        if turn % 5 == 4:
            cache.close()
            (directory / "index").unlink()
            cache = make(**SMALL)
        if "k" not in cache:
            assert not cache.set("k", 1, if_version=there)


def test_an_entry_is_of_one_version(core: str, cache: DiskCache) -> None:
    """Version, tag, metadata and value of one and the same, whoever writes meanwhile."""
    stop = threading.Event()

    def write(_: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            cache.set("k", n, tag=n, meta=n)

    def read(_: int) -> None:
        try:
            numbers: dict[int, int] = {}
            for _ in range(1500):
                entry = cache.get_entry("k")
                if entry is not None:
                    assert entry.tag == entry.meta == numbers.setdefault(entry.version, entry.tag)
            assert sorted(numbers) == sorted(numbers, key=numbers.__getitem__)
        finally:
            stop.set()

    in_threads(2, lambda which: (write, read)[which](which))


def test_half_a_slot_is_no_entry(core: str, cache: DiskCache) -> None:
    """Read before it was overwritten, the other half after: then version and metadata are of different sets."""
    cache.set("k", b"v", tag="old")
    low, high, _ = cache._desk.identify("k")
    old = cache._store.finding.lookup(low, high)
    cache.set("k", b"v", tag="new")
    new = cache._store.finding.lookup(low, high)
    assert old is not None and new is not None
    assert cache._desk.entry(old._replace(stamp=new.stamp)) is None
    assert cache._desk.entry(new).version == new.stamp  # type: ignore[union-attr]


def test_a_damaged_version_is_one_all_the_same(core: str, cache: DiskCache) -> None:
    """Until a check mends it: a change for which it is asked is made, or refused, and nobody hangs."""
    cache.set("k", 1, tag="t")
    store = cache._store
    at = store.finding.find(*cache._desk.identify("k")[:2])
    with store.locks.index:
        store.current.index.words[at + f.S_STAMP] ^= 1 << 20
    there = version(cache)
    assert there > 0 and cache["k"] == 1
    assert [problem.detail for problem in cache.check(fix=True)] == ["its slot is of another time than its record"]
    assert version(cache) == there ^ 1 << 20 and not cache.set("k", 2, if_version=there)
    with store.locks.index:
        store.current.index.words[at + f.S_STAMP] -= 1 << 20
    assert cache.modify("k", lambda n: n + 1) == 2 and cache.check() == []


# -- set and delete -------------------------------------------------------------------------------


@durabilities
@kinds
def test_set_of_a_version(make: Make, core: str, kind: str, durability: str, directory: Path) -> None:
    cache = make(durability=durability, **SMALL)
    assert cache.set("k", KINDS[kind](1), if_version=1) is False and "k" not in cache and len(cache) == 0
    assert cache.set("k", KINDS[kind](1), if_version=0, tag="t", meta={"m": 1}) is True
    first, files = version(cache), large_files(directory)
    for wrong in (0, 1, first - 1, first + 1, 2**70):
        assert cache.set("k", KINDS[kind](2), expire=5, tag="u", if_version=wrong) is False
    entry = cache.get_entry("k")
    assert entry is not None and (entry.version, entry.tag, entry.meta, entry.expires) == (first, "t", {"m": 1}, None)
    assert entry.value == stored(kind, 1) and large_files(directory) == files
    assert cache.set("k", KINDS[kind](2), 100, "u", if_version=first) is True
    entry = cache.get_entry("k")
    assert entry is not None and entry.value == stored(kind, 2) and (entry.tag, entry.meta) == ("u", None)
    assert entry.version > first and entry.expires is not None
    assert cache.set("k", KINDS[kind](3), if_version=first) is False
    assert cache.stats().sets == 2 and cache.check() == []
    cache.close()
    (directory / "index").unlink()
    cache = make(durability=durability, **SMALL)  # what was refused left no record
    assert cache["k"] == stored(kind, 2) and version(cache) == entry.version and cache.check() == []


@durabilities
def test_delete_of_a_version(make: Make, core: str, durability: str) -> None:
    cache = make(durability=durability, **SMALL)
    assert cache.delete("k", if_version=0) is False and cache.delete("k", if_version=7) is False
    for value in (b"small", noise(2 * LARGE)):
        cache.set("k", value)
        first = version(cache)
        cache.set("k", value)
        assert cache.delete("k", if_version=first) is False and cache.delete("k", if_version=0) is False
        assert cache["k"] == value and version(cache) > first
        assert cache.delete("k", if_version=version(cache)) is True and "k" not in cache
    assert cache.stats().deletes == 2 and cache.check() == []


@kinds
def test_what_has_expired_is_absent(make: Make, core: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    cache.set("k", KINDS[kind](1), expire=10)
    there = version(cache)
    clock.advance(11)
    assert cache.set("k", KINDS[kind](2), if_version=there) is False
    assert cache.delete("k", if_version=there) is False
    assert cache.set("k", KINDS[kind](2), if_version=0) is True and cache["k"] == stored(kind, 2)


def test_a_stream_is_not_read_in_vain(core: str, make: Make) -> None:
    cache = make(**SMALL)
    cache["k"] = 1

    def parts() -> Iterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    assert cache.set("k", parts(), if_version=0) is False
    assert cache.set("k", parts(), if_version=5, length=1 << 20) is False
    assert cache.set("none", parts(), if_version=5) is False


@pytest.mark.parametrize("length", [100, 3 * LARGE])
def test_who_comes_while_a_stream_is_read_wins(core: str, make: Make, directory: Path, length: int) -> None:
    cache = make(**SMALL)
    cache["k"] = "first"
    there = version(cache)

    def parts(change: Callable[[], object]) -> Iterator[bytes]:
        yield noise(length)
        change()
        yield noise(length)

    assert cache.set("k", parts(lambda: cache.set("k", "second")), if_version=there) is False
    assert cache["k"] == "second" and cache.set("new", parts(lambda: cache.add("new", 1)), if_version=0) is False
    there = version(cache)
    assert cache.set("k", parts(lambda: cache.delete("k")), if_version=there) is False and "k" not in cache
    assert cache["new"] == 1 and large_files(directory) == [] and cache.check() == []
    assert cache.set("k", parts(lambda: cache.set("x", 1)), if_version=0) and cache["k"] == noise(length) * 2
    there = version(cache)
    assert cache.set("k", parts(lambda: cache.touch("k", 50)), if_version=there), "touch keeps a version"


def test_the_version_of_another_key_is_none(core: str, cache: DiskCache) -> None:
    one, other = colliding(cache)
    cache.set(one, b"v")
    there = version(cache, one)
    assert not cache.set(other, b"w", if_version=there) and not cache.delete(other, if_version=there)
    assert cache[one] == b"v" and version(cache, other) == 0


WRONG: list[tuple[Any, type[Exception], str]] = [
    (1.0, TypeError, "if_version must be an int, .* not float"),
    ("1", TypeError, "if_version must be an int, .* not str"),
    (True, TypeError, "if_version must be an int, .* not bool"),
    (-1, ValueError, "if_version must be the version of an Entry, or 0 for none, not -1"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), WRONG)
def test_wrong_versions(cache: DiskCache, wrong: Any, kind: type[Exception], text: str) -> None:
    cache["k"] = 1
    for call in (
        lambda: cache.set("k", 2, if_version=wrong), lambda: cache.set("k", b"2", if_version=wrong),
        lambda: cache.set("k", iter([b"2"]), if_version=wrong), lambda: cache.delete("k", if_version=wrong),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            call()
    assert cache["k"] == 1


def test_whoever_only_reads(make: Make) -> None:
    make(**SMALL)["k"] = 1
    cache = make(read_only=True, **SMALL)
    there = version(cache)
    assert there > 0
    for call in (
        lambda: cache.set("k", 2, if_version=there), lambda: cache.set("k", b"2", if_version=5),
        lambda: cache.delete("k", if_version=there), lambda: cache.modify("k", lambda n: n),
        lambda: cache.setdefault("k", 1), lambda: cache.incr("k", expire=5),
    ):  # fmt: skip
        with pytest.raises(ReadOnlyError):
            call()


def test_what_cannot_be_stored_is_told_whatever_is_there(cache: DiskCache) -> None:
    cache["k"] = 1
    for there in (0, version(cache), 7):
        with pytest.raises(SerializationError):
            cache.set("k", object(), if_version=there)
    assert cache["k"] == 1


@pytest.mark.parametrize("size", [20, 2 * LARGE])
def test_one_of_many_wins(core: str, make: Make, monkeypatch: pytest.MonkeyPatch, size: int, directory: Path) -> None:
    """Threads with one handle, and with handles that share nothing, as in processes of their own."""
    open_apart(monkeypatch)
    caches = [make(**SMALL), make(**SMALL)]
    won: list[tuple[int, int]] = []
    turns, number = 15, 6

    def work(which: int) -> None:
        cache = caches[which % 2]
        for turn in range(turns):
            barrier.wait()
            there = versions[turn]
            if cache.set("k", noise(size, which), if_version=there):
                won.append((turn, which))
            if barrier.wait() == 0:
                versions.append(version(cache))
            barrier.wait()

    versions, barrier = [0], threading.Barrier(number)
    in_threads(number, work)
    assert [turn for turn, _ in won] == list(range(turns))
    assert caches[0]["k"] == noise(size, won[-1][1])
    assert len(large_files(directory)) == (size >= LARGE) and caches[0].check() == []


def test_processes_take_turns_by_versions(core: str, directory: Path) -> None:
    """A counter that nobody would count right without: read, add, store if nobody came first."""
    code = """
import os, sys
from yatagarasu_cache import DiskCache
children = []
cache = DiskCache(sys.argv[1])  # kept open, so that none of them is the last to close
def work():
    with DiskCache(sys.argv[1]) as cache:
        for _ in range(40):
            while True:
                entry = cache.get_entry("n")
                if entry is None:
                    if cache.set("n", 1, if_version=0):
                        break
                    continue
                try:
                    value = entry.value
                except KeyError:  # of another version by now
                    continue
                if cache.set("n", value + 1, if_version=entry.version):
                    break
for _ in range(4):
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)
print(cache["n"])
"""
    assert run_python(code, directory) == "160\n"


# -- like a dict with versions --------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", 3, ("c", 1)])
VALUES = st.one_of(
    st.integers(0, 9).map(lambda n: noise(20, n)), st.sampled_from([0, 5, "text", [1, {2}]]),
    st.integers(0, 9).map(lambda n: noise(1000 + n, n)),
)  # fmt: skip
WHICH = st.sampled_from(["there", "absent", "old", "none such"])


class Versions(RuleBasedStateMachine):
    """A cache and a dict of (value, expires, tag, version), by operations that depend on versions or make them."""

    directory: str
    backend: str

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock(self.patch)
        # Values from 1,000 bytes have files of their own.
        self.options: dict[str, Any] = {"size_limit": 4 << 20, "segment_size": 8192, "large_value_size": 1000}
        self.path = os.path.join(self.directory, str(next(_numbers)))
        self.cache = DiskCache(self.path, backend=self.backend, **self.options)
        self.model: dict[Any, tuple[Any, int, Any, int]] = {}
        self.highest: dict[Any, int] = {}  # version that a key ever had

    def teardown(self) -> None:
        self.cache.close()
        self.patch.undo()

    def there(self, key: Any) -> tuple[Any, int, Any, int] | None:
        known = self.model.get(key)
        return None if known is None or 0 < known[1] <= self.clock.now else known

    def wanted(self, key: Any, which: str) -> int:
        known = self.there(key)
        if which == "there":
            return known[3] if known else 0
        return {"absent": 0, "old": self.highest.get(key, 1) - (known is not None), "none such": 12345}[which]

    def is_met(self, key: Any, if_version: int) -> bool:
        known = self.there(key)
        return (known[3] if known else 0) == if_version

    def store(self, key: Any, value: Any, expires: int, tag: Any) -> None:
        entry = self.cache.get_entry(key)
        assert entry is not None and entry.version > self.highest.get(key, 0)
        self.highest[key] = entry.version
        self.model[key] = value, expires, tag, entry.version

    def in_time(self, expire: float | None) -> int:
        return 0 if expire is None else self.clock.now + int(expire * 10**9)

    @rule(key=KEYS, value=VALUES, which=WHICH, expire=st.sampled_from([None, 5]), stream=st.booleans())
    def set_if(self, key: Any, value: Any, which: str, expire: float | None, stream: bool) -> None:
        if_version = self.wanted(key, which)
        given = iter([value[:7], value[7:]]) if stream and isinstance(value, bytes) else value
        done = self.cache.set(key, given, expire, "t", if_version=if_version)
        assert done is self.is_met(key, if_version)
        if done:
            self.store(key, value, self.in_time(expire), "t")

    @rule(key=KEYS, value=VALUES, expire=st.sampled_from([None, 5]))
    def set(self, key: Any, value: Any, expire: float | None) -> None:
        self.cache.set(key, value, expire)
        self.store(key, value, self.in_time(expire), None)

    @rule(key=KEYS, which=WHICH)
    def delete_if(self, key: Any, which: str) -> None:
        if_version = self.wanted(key, which)
        done = self.cache.delete(key, if_version=if_version)
        assert done is (self.there(key) is not None and self.is_met(key, if_version))
        if done:
            del self.model[key]

    @rule(key=KEYS)
    def delete(self, key: Any) -> None:
        assert self.cache.delete(key) is (self.there(key) is not None)
        self.model.pop(key, None)

    @rule(key=KEYS, expire=st.sampled_from([5, 50, math.inf]))
    def touch(self, key: Any, expire: float) -> None:
        known = self.there(key)
        assert self.cache.touch(key, expire) is (known is not None)
        if known is not None:
            self.model[key] = known[0], 0 if expire == math.inf else self.in_time(expire), *known[2:]

    @rule(key=KEYS, meanwhile=st.sampled_from(["nothing", "touch", "set", "delete"]))
    def modify(self, key: Any, meanwhile: str) -> None:
        """Once, somebody comes in between."""
        calls: list[Any] = []

        def function(value: Any) -> Any:
            calls.append(value)
            if len(calls) == 1:
                {"nothing": lambda key: None, "touch": lambda key: self.touch(key, 50),
                 "set": lambda key: self.set(key, "new", 5), "delete": self.delete}[meanwhile](key)  # fmt: skip
            return [value, "modified"]

        known = self.there(key)
        before = "default" if known is None else known[0]
        result = self.cache.modify(key, function, "default")
        again = meanwhile == "set" or meanwhile == "delete" and known is not None
        now = self.there(key)
        expected = [before, "default" if now is None else now[0]] if again else [before]
        assert calls == expected and result == [expected[-1], "modified"]
        self.store(key, result, now[1] if now else 0, now[2] if now else None)

    @rule(key=KEYS, value=VALUES)
    def setdefault(self, key: Any, value: Any) -> None:
        known = self.there(key)
        assert self.cache.setdefault(key, value, 5) == (value if known is None else known[0])
        if known is None:
            self.store(key, value, self.in_time(5), None)

    @rule(key=st.sampled_from(["a", "b"]))
    def incr(self, key: Any) -> None:
        known = self.there(key)
        if known is None or type(known[0]) is int:
            value = (known[0] if known else 0) + 1
            assert self.cache.incr(key, expire=5, tag="new") == value
            self.store(key, value, *(known[1:3] if known else (self.in_time(5), "new")))

    @rule(seconds=st.sampled_from([1, 5, -2]))
    def pass_time(self, seconds: float) -> None:
        """What had expired, or was made in the future, may be back, if nobody removed it."""
        before = {key for key in self.model if self.there(key)}
        self.clock.advance(seconds)
        for key in [key for key in self.model if self.there(key) and key not in before]:
            if key not in self.cache:
                del self.model[key]

    @rule(lost=st.booleans(), fix=st.booleans())
    def reopen(self, lost: bool, fix: bool) -> None:
        self.cache.close()
        if lost:
            os.unlink(os.path.join(self.path, "index"))
        self.cache = DiskCache(self.path, backend=self.backend, **self.options)
        assert self.cache.check(fix=fix) == []

    @precondition(lambda self: len(self.model) > 1)
    @rule()
    def clean(self) -> None:
        store = self.cache._store
        with store.locks.appending:
            store.active.seal()
        store.cleaner.clean_emptiest()
        store.dead.drop_all()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        live = {key: known for key in self.model if (known := self.there(key)) is not None}
        entries = {entry.key: entry for entry in self.cache.entries()}
        assert entries.keys() == live.keys()
        for key, (value, expires, tag, number) in live.items():
            entry = entries[key]
            assert (entry.value, entry.tag, entry.version) == (value, tag, number)
            assert entry.expires == (expires / 1e9 if expires else None)
        assert dict(self.cache.items()) == {key: known[0] for key, known in live.items()}


_numbers = itertools.count()


@pytest.mark.in_turn
@pytest.mark.parametrize("on", BACKENDS)
def test_like_a_dict_with_versions(core: str, disks: Path, on: str) -> None:
    class Here(Versions):
        directory, backend = str(disks), on

    run_state_machine_as_test(Here, settings=settings(max_examples=12, stateful_step_count=30))
