"""Damage: every file of a cache cut short, changed, zeroed, swapped, replaced, removed.

What must hold: a key has the value that it should have, or none; nothing is raised but what is
documented; `check(fix=True)` restores order, and the cache works on. Where more than one file is
hit at once the newest record of a key can be lost without a trace: then an older value that the
key once had may stand in for it, but never anything else.

Not done here: cutting short an index that a process has mapped. No program survives the SIGBUS.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import itertools
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from available import backend_for
from faulty import ALWAYS, Fault, FaultyBackend, open_faulty, seeded
from helpers import in_memory, noise
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yatagarasu_cache import CacheError, DiskCache, FormatError, ReadOnlyError, StorageFull
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.format import key_digest

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

OPTIONS: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 8192, "eviction": "none"}
MISSING = "(none)"
SIZES = (0, 30, 200, 900, 1500, 3000, 6000)  # from 2048 on a value has a file of its own
_numbers = itertools.count()


@dataclasses.dataclass
class Sample:
    """A closed cache: where it is, what it holds, and what its keys held before."""

    path: Path
    values: dict[str, Any]
    before: dict[str, list[Any]]

    def copy(self) -> Sample:
        path = self.path.parent / f"copy{next(_numbers)}"
        shutil.copytree(self.path, path, symlinks=True)
        return dataclasses.replace(self, path=path)

    def files(self, *parts: str) -> list[Path]:
        """All files, or those of some kinds: "index", "segments", ..."""
        found = sorted(path for path in self.path.rglob("*") if path.is_file())
        return [p for p in found if not parts or p.relative_to(self.path).parts[0] in parts]


def build(path: Path, name: str) -> Sample:
    """Overwritten, deleted, tagged, expiring and large entries; a checkpoint in the middle."""
    rng = random.Random(name)
    values: dict[str, Any] = {}
    before: dict[str, list[Any]] = {}
    cache = DiskCache(path, backend="threads", **OPTIONS)
    for turn in range(260):
        key = f"k{rng.randrange(70)}"
        if key in values:
            before.setdefault(key, []).append(values.pop(key))
        if rng.random() < 0.15:
            cache.delete(key)
        else:
            values[key] = f"{name} {key} {turn}:".encode() + noise(rng.choice(SIZES), turn)
            cache.set(key, values[key], tag=rng.choice((None, "t")), expire=rng.choice((None, 1e6)))
        if turn == 150:
            cache._store.checkpoints.write_if()
        if turn % 60 == 59:
            with cache._store.locks.appending:
                cache._store.active.seal()
            cache._store.cleaner.clean_emptiest()
    assert cache.check() == []
    cache.close()
    return Sample(path, values, before)


@pytest.fixture(scope="module")
def disks() -> Iterator[Path]:
    """A directory for many small ones; in memory, where there is such a place."""
    logging.getLogger("yatagarasu_cache").disabled = True  # thousands of repairs say what they do
    with in_memory() as path:
        yield path
    logging.getLogger("yatagarasu_cache").disabled = False


@pytest.fixture(scope="module")
def samples(disks: Path) -> tuple[Sample, Sample]:
    """Two caches, made once."""
    return build(disks / "one", "one"), build(disks / "two", "two")


@pytest.fixture
def sample(samples: tuple[Sample, Sample]) -> Iterator[Sample]:
    copied = samples[0].copy()
    yield copied
    shutil.rmtree(copied.path)


# -- judging ------------------------------------------------------------------------------------


def read_all(cache: DiskCache, sample: Sample, where: str, *, older: bool = False) -> dict[str, Any]:
    """Ask for everything in every way. Only right values, or none."""
    found = {}
    keys = [f"k{i}" for i in range(70)]
    together = cache.get_many(keys)
    for key in keys:
        allowed = [sample.values.get(key, MISSING), MISSING]
        if older:
            allowed += sample.before.get(key, [])
        for value in (together.get(key, MISSING), cache.get(key, MISSING)):
            assert value in allowed, f"{where}: {key} is {value!r:.60} instead of {allowed[0]!r:.60}"
        found[key] = value
    known = {*keys, *(f"fresh{i}" for i in range(30)), "fresh"}
    assert {entry.key for entry in cache.entries()} <= known, where
    assert set(cache) <= known, where
    assert len(cache) >= 0, where
    cache.stats()
    return found


def judge(sample: Sample, where: str, *, older: bool = False, all_there: bool = False) -> None:
    """Open the damaged cache, read it, put it in order, use it."""
    with DiskCache(sample.path, backend=backend_for(where), **OPTIONS) as cache:
        found = read_all(cache, sample, where, older=older)
        if all_there:
            assert {k: v for k, v in found.items() if v != MISSING} == sample.values, where
        put_in_order(cache, where)
        again = read_all(cache, sample, f"{where}, put in order", older=older)
        # Of some entries the value was whole, but not the record: these are dropped. Some were hidden: these are back.
        there = sample.values
        assert older or all(
            value in (found[key], MISSING, there.get(key, MISSING)) for key, value in again.items()
        ), where
        use(cache, where)
    with DiskCache(sample.path, backend=backend_for(where + "again"), **OPTIONS) as cache:
        assert cache.get("fresh0") == b"fresh" * 100, where
        assert read_all(cache, sample, f"{where}, opened again", older=older) == again, where
        assert cache.check() == [], where


def put_in_order(cache: DiskCache, where: str) -> None:
    problems = cache.check(fix=True)
    left = cache.check()
    assert left == [], f"{where}: after {problems} there is still {left}"


def use(cache: DiskCache, where: str) -> None:
    for i in range(30):
        cache.set(f"fresh{i}", b"fresh" * 100)
    cache.set("fresh0", noise(5000))
    cache.set("fresh0", b"fresh" * 100)
    for i in range(1, 30):
        assert cache.get(f"fresh{i}") == b"fresh" * 100, where
        assert cache.delete(f"fresh{i}"), where
    cache._store.cleaner.clean_emptiest()
    cache._store.dead.drop_all()
    cache._store.checkpoints.write_if()
    assert cache.check() == [], where


# -- kinds of damage ----------------------------------------------------------------------------


def truncate(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    to = rng.choice((0, 1, size // 2, size - 1, rng.randrange(size + 1))) if size else 0
    os.truncate(path, max(0, to))
    return f"cut to {to} of {size} bytes"


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    bits = [rng.randrange(8 * len(data)) for _ in range(rng.choice((1, 1, 1, 5, 100)))] if data else []
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bits {bits[:5]} flipped"


def zero(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start = rng.choice((0, rng.randrange(len(data) + 1) // 512 * 512))
    end = rng.choice((len(data), min(len(data), start + rng.choice((64, 512, 4096)))))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"zeroed from {start} to {end}"


def garble(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((8, 600, 5000)))
    path.write_bytes(data[:start] + rng.randbytes(end - start) + data[end:])
    return f"garbled from {start} to {end}"


def lengthen(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.choice((bytes(5000), rng.randbytes(777))))
    return "lengthened"


def remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def into_directory(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a directory"


def into_symlink(path: Path, rng: random.Random) -> str:
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    path.symlink_to(aside.name)
    return "replaced by a symbolic link"


CHANGES: list[Callable[[Path, random.Random], str]] = [truncate, flip, zero, garble, lengthen, remove]
KINDS = ["index", "checkpoint", "settings", "segments", "large", "CACHEDIR.TAG", "lock", "users"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_one_file(
    samples: tuple[Sample, Sample], kind: str, change: Callable[[Path, random.Random], str]
) -> None:
    rng = seeded(f"{kind} {change.__name__}")
    for _ in range({"index": 14, "segments": 14, "large": 5, "checkpoint": 5}.get(kind, 2)):
        sample = samples[0].copy()
        path = rng.choice(sample.files(kind))
        where = f"{path.name}: {change(path, rng)}"
        judge(sample, where, all_there=kind not in ("index", "segments", "large"))
        shutil.rmtree(sample.path)


@pytest.mark.parametrize("change", [truncate, remove])
def test_without_its_index_everything_is_there(
    sample: Sample, change: Callable[[Path, random.Random], str]
) -> None:
    change(sample.path / "index", random.Random(1))
    judge(sample, "no index", all_there=True)


@pytest.mark.parametrize("kind", ["index", "segments", "large"])
def test_every_file_of_a_kind_is_lost(sample: Sample, kind: str) -> None:
    for path in sample.files(kind):
        path.unlink()
    judge(sample, f"{kind} removed")


def test_each_word_of_the_index_header(samples: tuple[Sample, Sample]) -> None:
    """One bit of each word that means something, and more of those on which all depends."""
    rng = seeded("header")
    words = [*range(48), *range(f.W_PARTITIONS, f.W_PARTITIONS + 4), *range(f.W_COUNTS, f.W_COUNTS + 4)]
    words += range(f.W_DELETED, f.W_DELETED + 4)
    for word in words:
        for bit in (rng.randrange(40), rng.randrange(40, 64)):
            sample = samples[0].copy()
            data = bytearray((sample.path / "index").read_bytes())
            data[word * 8 + bit // 8] ^= 1 << bit % 8
            (sample.path / "index").write_bytes(data)
            judge(sample, f"word {word}, bit {bit}")
            shutil.rmtree(sample.path)


def test_segment_table_and_slots(samples: tuple[Sample, Sample]) -> None:
    """Single bits of table entries and slots in use."""
    rng = seeded("slots")
    data = (samples[0].path / "index").read_bytes()
    used = [at for at in range(f.HEADER_BYTES, len(data), 64) if any(data[at : at + 64])]
    for _ in range(60):
        sample = samples[0].copy()
        at, bit = rng.choice(used), rng.randrange(512)
        changed = bytearray(data)
        changed[at + bit // 8] ^= 1 << bit % 8
        (sample.path / "index").write_bytes(changed)
        judge(sample, f"line at {at}, word {bit // 64}, bit {bit % 64}")
        shutil.rmtree(sample.path)


# -- files that are somebody else's -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["index", "checkpoint", "segments", "large"])
def test_swapped_within_the_cache(samples: tuple[Sample, Sample], kind: str) -> None:
    rng = seeded(f"swap {kind}")
    for _ in range(8):
        sample = samples[0].copy()
        one = rng.choice(sample.files(kind))
        other = rng.choice([p for p in sample.files("index", "checkpoint", "segments", "large") if p != one])
        aside = sample.path / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        judge(sample, f"{one.name} and {other.name} swapped", older=True)
        shutil.rmtree(sample.path)


@pytest.mark.parametrize("kind", ["index", "checkpoint", "settings", "segments", "large", "CACHEDIR.TAG"])
def test_from_another_cache(samples: tuple[Sample, Sample], kind: str) -> None:
    """The file of the same name (of large ones: any) of another cache in place of ours."""
    rng = seeded(f"another {kind}")
    for _ in range(6):
        sample = samples[0].copy()
        one = rng.choice(sample.files(kind))
        theirs = samples[1].path / one.relative_to(sample.path)
        if kind == "large":
            theirs = rng.choice(samples[1].files(kind))
        if theirs.exists():
            shutil.copyfile(theirs, one)
        judge(sample, f"{one.name} of another cache")
        shutil.rmtree(sample.path)


def test_an_empty_cache_got_our_segments(samples: tuple[Sample, Sample]) -> None:
    """The index of a cache without entries beside the segments of ours."""
    sample = samples[0].copy()
    with DiskCache(sample.path / "empty", backend="threads", **OPTIONS):
        pass
    shutil.move(sample.path / "empty" / "index", sample.path / "index")
    shutil.rmtree(sample.path / "empty")
    judge(sample, "index of an empty cache", all_there=True)
    shutil.rmtree(sample.path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [into_directory, into_symlink])
def test_no_file_any_more(
    sample: Sample, backend: str, kind: str, change: Callable[[Path, random.Random], str]
) -> None:
    """A directory or a link in place of a file is not followed. Where it can't be done without, it is said."""
    path = sample.files(kind)[0]
    change(path, random.Random(1))
    try:
        cache = DiskCache(sample.path, backend=backend, **OPTIONS)
    except CacheError as error:
        assert kind in ("index", "lock", "users"), error
        assert kind in str(error)
        return
    with cache:
        read_all(cache, sample, f"{kind} {change.__name__}")
        cache.check(fix=True)
        cache.set("fresh", b"fresh")
        assert cache.get("fresh") == b"fresh"
    assert os.path.lexists(path) or kind in ("segments", "large")


# -- several at once, at random -----------------------------------------------------------------

CHOICES = st.tuples(st.sampled_from(CHANGES), st.sampled_from(KINDS), st.integers(0, 1 << 30))


@settings(max_examples=60)
@example(choices=[(zero, "index", 3628801), (remove, "segments", 0)])  # a segment is lost, and its count
@example(choices=[(truncate, "index", 0), (zero, "index", 2043478)])  # the list of segments is lost
@given(choices=st.lists(CHOICES, min_size=2, max_size=5))
def test_several_files(
    samples: tuple[Sample, Sample], choices: list[tuple[Callable[[Path, random.Random], str], str, int]]
) -> None:
    sample = samples[0].copy()
    done = []
    for change, kind, number in choices:
        rng = random.Random(number)
        files = sample.files(kind)
        if files:
            path = rng.choice(files)
            done.append(f"{path.name}: {change(path, rng)}")
    try:
        judge(sample, "; ".join(done), older=True)
    except FormatError:
        # Neither tag nor index is readable, and what is left is no proof that the directory is ours.
        hit = {kind for _, kind, _ in choices}
        assert {"CACHEDIR.TAG", "index"} <= hit
    finally:
        shutil.rmtree(sample.path)


# -- while the cache is in use ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segments", "large", "checkpoint", "index"])
def test_under_an_open_handle(samples: tuple[Sample, Sample], kind: str) -> None:
    """Files change in place while two handles have them open: they go on, one after the other."""
    rng = seeded(f"open {kind}")
    for _ in range(12):
        sample = samples[0].copy()
        with (
            DiskCache(sample.path, backend=backend_for(sample.path), **OPTIONS) as one,
            DiskCache(sample.path, backend=backend_for(f"{sample.path} too"), **OPTIONS) as two,
        ):
            read_all(one, sample, "whole")
            path = rng.choice(sample.files(kind))
            changes = [flip, zero, garble] if kind == "index" else CHANGES
            where = f"{path.name}: {_in_place(path, rng.choice(changes), rng)}"
            read_all(two, sample, where)
            read_all(one, sample, where)
            one.set("fresh", b"fresh")
            assert two.get("fresh") == b"fresh", where
            two.check(fix=True)
            put_in_order(one, where)
            read_all(two, sample, where)
            use(two, where)
        judge(sample, f"{where}, closed")
        shutil.rmtree(sample.path)


def _in_place(path: Path, change: Callable[[Path, random.Random], str], rng: random.Random) -> str:
    """Change a copy, and write that over the file, which stays the same file."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    done = change(copy, rng)
    if not copy.exists():
        path.unlink()
        return done
    data = copy.read_bytes()
    copy.unlink()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate(len(data))
    return done


@pytest.mark.parametrize("kind", ["index", "segments", "large", "checkpoint"])
def test_read_only(samples: tuple[Sample, Sample], kind: str) -> None:
    """A handle that may not change anything reads what can be read, or says what to do."""
    rng = seeded(f"read only {kind}")
    for _ in range(20):
        sample = samples[0].copy()
        path = rng.choice(sample.files(kind))
        where = f"{path.name}: {rng.choice(CHANGES)(path, rng)}"
        try:
            backend = backend_for(where)
            with DiskCache(sample.path, backend=backend, read_only=True, **OPTIONS) as cache:
                read_all(cache, sample, where)
                cache.check()
        except (FormatError, ReadOnlyError) as error:
            assert kind == "index", f"{where}: {error}"
            assert "read_only" in str(error)
        shutil.rmtree(sample.path)


def test_a_lost_slot_of_a_large_value_does_not_bring_back_its_predecessor(
    sample: Sample, backend: str, core: str
) -> None:
    """No entry stands for its file any more, which is removed: an index that is made anew finds its record alone."""
    with DiskCache(sample.path, backend=backend, **OPTIONS) as cache:
        cache.set("key", b"old" * 10)
        cache.set("key", b"new" * 3000)
        store = cache._store
        with store.locks.index:
            index = store.current.index
            at = index.find(*key_digest(encode_key("key"), index.identity.seed))
            assert at and index.slot(at).is_large
            index.words[at] ^= 1 << 60
        assert cache.get("key") is None
        store.reaper.look_for_orphans()
        store.current.rebuild("for a test")
        assert cache.get("key") is None
        cache.set("key", b"newer")
        store.current.rebuild("for a test")
        assert cache.get("key") == b"newer"
        assert cache.check(fix=True) is not None and cache.check() == []


def test_a_corrupt_entry_does_not_leave_its_predecessor_behind(sample: Sample, backend: str) -> None:
    """What was found corrupt is gone for good: a later rebuild doesn't bring back what it had replaced."""
    with DiskCache(sample.path, backend=backend, **OPTIONS) as cache:
        cache.set("key", b"old" * 10)
        cache.set("key", b"new" * 10)
        writer = cache._store.active.writer
        assert writer is not None
        path = Path(cache._store.files.segments.path(writer.segment))
        data = path.read_bytes()
        path.write_bytes(data.replace(b"new" * 10, b"bad" * 10))
        assert cache.get("key") is None
        assert cache.stats().corrupt == 1
    (sample.path / "index").unlink()
    with DiskCache(sample.path, backend=backend, **OPTIONS) as cache:
        assert cache.get("key") is None


# -- the disk fails -----------------------------------------------------------------------------

KINDS_OF_CALL = [
    "open",
    "write",
    "sync",
    "allocate",
    "truncate",
    "replace",
    "unlink",
    "sync_directory",
    "scandir",
    "read",
    "close_file",
]


def _steps(
    cache: DiskCache, expected: dict[str, list[Any]], numbers: Iterator[int]
) -> Iterator[Exception | None]:
    """Changes of all kinds. What a key may have afterwards goes to `expected`: if a change fails, the old value."""

    def attempt(key: str, value: Any, change: Callable[[], object]) -> Exception | None:
        try:
            change()
        except OSError as error:
            assert isinstance(error, CacheError), f"{error!r} is not one of ours"
            return error
        expected[key] = [value]
        return None

    for turn in range(14):
        for key in ("a", "b", f"u{turn}", f"v{turn}"):
            value = f"{key} {next(numbers)}:".encode() + noise((10, 700, 3000)[turn % 3])
            yield attempt(key, value, lambda k=key, v=value: cache.set(k, v))  # type: ignore[misc]
        count = expected.get("n", [0])[0]
        yield attempt("n", count + 1, lambda: cache.incr("n"))
        if turn % 4 == 3:
            yield attempt("b", MISSING, lambda: cache.delete("b"))
        many = {f"m{i}": f"{i} {next(numbers)}".encode() * 30 for i in range(3)}
        for key, value in many.items():
            expected[key] = [*expected.get(key, [MISSING]), value]
        if (failure := attempt("", None, lambda m=many: cache.set_many(m))) is None:  # type: ignore[misc]
            expected.update({key: [value] for key, value in many.items()})
        yield failure
        if turn in (5, 9):
            yield attempt("", None, cache._store.checkpoints.write_if)
            yield attempt("", None, cache._store.cleaner.clean_emptiest)
            yield attempt("", None, cache.flush)


def _seen(cache: DiskCache, key: str) -> Any:
    return cache.get(key, MISSING)


@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", KINDS_OF_CALL)
def test_an_operation_fails(
    disks: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: int, durability: str
) -> None:
    """The n-th operation of a kind fails, for every n: old or new value, nothing leaked, nothing lost.

    Neither now, nor after the index was made anew from the log.
    """
    monkeypatch.setattr("yatagarasu_cache.store.checks.large._PATIENCE", 0.05)  # nobody else removes files
    first = 1
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    while True:
        where = disks / f"{kind} {first} {error} {durability}"
        fault = Fault(kind, first, error, kept=0.5 if kind == "write" and first % 2 else 0.0)
        backend = FaultyBackend(plan=[])
        expected: dict[str, list[Any]] = {"before": [b"there"]}
        with DiskCache(where, backend="threads", **OPTIONS) as cache:
            cache.set("before", b"there")
        cache = open_faulty(monkeypatch, where, backend, durability=durability, **OPTIONS)
        backend.plan = [fault]
        try:
            failures = [
                failure for failure in _steps(cache, expected, itertools.count()) if failure is not None
            ]
            backend.plan = []
            assert fault.struck or not failures
            if error == errno.ENOSPC:
                assert all(isinstance(failure, StorageFull) for failure in failures)
            for key in filter(None, expected):
                value = _seen(cache, key)
                assert value in expected[key], (
                    f"{kind} {first}: {key} is {value!r:.50}, not {expected[key]!r:.120}"
                )
                expected[key] = [value]
            # A file that could not be removed is left over, and is found.
            left = [p for p in cache.check() if p.kind not in ("large", "stray") and p.where != "large"]
            assert left == [], f"{kind} {first}"
            cache.check(fix=True)
            assert cache.check() == [], f"{kind} {first}"
        finally:
            backend.plan = []
            cache.close()
        assert backend.closed_twice == [], f"{kind} {first}"
        assert backend.paths == {}, f"{kind} {first}: files are left open"
        with DiskCache(where, backend="threads", **OPTIONS) as again:
            assert {key: _seen(again, key) for key in filter(None, expected)} == {
                key: values[0] for key, values in expected.items() if key
            }, f"{kind} {first}"
        (where / "index").unlink()
        with DiskCache(where, backend=backend_for(where.name), **OPTIONS) as again:
            assert {key: _seen(again, key) for key in filter(None, expected)} == {
                key: values[0] for key, values in expected.items() if key
            }, f"{kind} {first}: made anew"
            assert again.check() == []
        shutil.rmtree(where)
        if not fault.struck:
            assert first > 1, f"there is no {kind}"
            break
        first += 1 if first < 6 else 11
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_short_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes that come back short are resumed, wherever they are cut."""
    for most in (1, 3, 64, 1000):
        backend = FaultyBackend(
            plan=[Fault(kind, times=ALWAYS, short=most) for kind in ("read", "read_nowait", "write")]
        )
        expected: dict[str, list[Any]] = {}
        with open_faulty(monkeypatch, tmp_path / f"{most}", backend, **OPTIONS) as cache:
            assert not any(_steps(cache, expected, itertools.count()))
            assert {key: _seen(cache, key) for key in filter(None, expected)} == {
                key: values[0] for key, values in expected.items() if key
            }
            assert cache.get_many(list(filter(None, expected))) == {
                key: values[0] for key, values in expected.items() if key and values[0] != MISSING
            }
            assert cache.check() == []


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_read_that_fails_deletes_nothing(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    backend = FaultyBackend()
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        for kind in ("read", "open"):
            backend.plan = [Fault(kind, times=ALWAYS, error=error)]
            for key, value in sample.values.items():
                try:
                    assert cache.get(key, MISSING) in (value, MISSING)
                except CacheError as raised:
                    assert getattr(raised, "errno", None) == error
            backend.plan = []
            assert {key: cache.get(key) for key in sample.values} == sample.values
        assert cache.stats().corrupt == 0


def test_a_slow_disk_changes_nothing(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FaultyBackend(
        plan=[Fault("read", times=ALWAYS, delay=0.0005), Fault("write", times=5, delay=0.01)]
    )
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        assert read_all(cache, sample, "slow") == {
            f"k{i}": sample.values.get(f"k{i}", MISSING) for i in range(70)
        }
