"""An I/O error is not absence: what cannot be read is told, and changes nothing. What a disk has lost for good
is given up where that is asked for, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import ALWAYS, Fault, FaultyBackend, WornBackend, open_faulty
from helpers import in_memory

from yatagarasu_cache import AsyncDiskCache, CacheIOError, DiskCache, cli, repair
from yatagarasu_cache.backends import Choice
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.config import Settings
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.format import key_digest

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

OPTIONS: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 16384, "eviction": "none"}
CASES = [
    ("open", errno.EIO), ("open", errno.EACCES), ("open", errno.EMFILE), ("read", errno.EIO),
    ("read", errno.ENOMEM),
]  # fmt: skip
LOST = "(lost)"


class At(Fault):
    """Of a file whose path ends so."""

    def strikes(self, kind: str, path: str) -> bool:
        return path.endswith(self.where) and super().strikes(kind, path)


@dataclasses.dataclass
class Sample:
    """A closed cache: where it is, what it holds, what was deleted, and files by kind."""

    path: Path
    values: dict[str, Any]
    gone: list[str]
    files: dict[str, str]

    def copy(self, path: Path) -> Sample:
        shutil.copytree(self.path, path)
        return dataclasses.replace(self, path=path)

    def without_index(self) -> Sample:
        (self.path / "index").unlink()
        return self

    def content(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.path)): p.read_bytes() for p in self.path.rglob("*") if p.is_file()}

    def judge(self, cache: DiskCache, lost: Callable[[str], bool] = lambda key: False) -> set[str]:
        """All is there but what may be `lost`, and nothing that was deleted is back. What is lost."""
        seen = {key: cache.get(key, LOST) for key in self.values}
        missing = {key for key, value in seen.items() if value == LOST}
        assert [key for key in missing if not lost(key)] == []
        assert all(seen[key] == value for key, value in self.values.items() if key not in missing)
        assert [key for key in self.gone if key in cache] == []
        assert {entry.key for entry in cache.entries()} == self.values.keys() - missing
        return missing


def build(path: Path) -> Sample:
    """Entries before and after a checkpoint, some of them stored once more, or deleted, behind it."""
    values: dict[str, Any] = {}

    def put(key: str, size: int) -> None:
        values[key] = f"{key} {size}:".encode() + bytes([size % 251]) * size
        cache.set(key, values[key])

    with DiskCache(path, backend="threads", **OPTIONS) as cache:
        for i in range(70):
            put(f"a{i}", 400 + i)
        gone = [f"a{i}" for i in range(10)]
        cache.delete_many(gone)
        with cache._store.locks.appending:
            cache._store.active.seal()
        assert cache._store.checkpoints.write_if()
        for i in range(70):
            put(f"b{i}", 700 + i)
        put("large", 9000)
        for i in range(10, 20):
            put(f"a{i}", 900 + i)
        gone += [f"{name}{i}" for name in "ab" for i in range(20, 30)]
        cache.delete_many(gone)
        cache.set("number", 7)
        values["number"] = 7
        log = f.segment_name(cache._store.changes.segment)
        places = {key: _slot(cache, key).segment for key in ("a40", "b40")}
        assert cache.check() == []
    (large,) = (path / "large").iterdir()
    files = {
        "index": "index", "log": f"segments/{log}", "checkpoint": "checkpoint", "settings": "settings",
        "sealed": f"segments/{f.segment_name(places['a40'])}",
        "segment": f"segments/{f.segment_name(places['b40'])}", "large": f"large/{large.name}",
    }  # fmt: skip
    return Sample(path, {key: value for key, value in values.items() if key not in gone}, gone, files)


def _slot(cache: DiskCache, key: str) -> f.Slot:
    slot = cache._store.finding.lookup(*key_digest(encode_key(key), cache._store.current.seed))
    assert slot is not None
    return slot


@pytest.fixture(scope="module")
def disks() -> Iterator[Path]:
    """A directory for many small ones; in memory, where there is such a place."""
    with in_memory() as path:
        yield path


@pytest.fixture(scope="module")
def built(disks: Path) -> Sample:
    return build(disks / "built")


@pytest.fixture
def room(disks: Path) -> Iterator[Path]:
    """For one test."""
    path = Path(tempfile.mkdtemp(dir=disks))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def sample(built: Sample, room: Path) -> Sample:
    return built.copy(room / "cache")


def open_well(sample: Sample) -> DiskCache:
    return DiskCache(sample.path, backend="threads", **OPTIONS)


# -- an index that is made anew ----------------------------------------------------------------------

READ_FOR_AN_INDEX = ["log", "checkpoint", "settings", "sealed", "segment", "large"]


@pytest.mark.parametrize(("call", "error"), CASES)
@pytest.mark.parametrize("kind", READ_FOR_AN_INDEX)
def test_an_index_is_not_made_of_what_cannot_be_read(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, call: str, error: int
) -> None:
    before = sample.without_index().content()
    backend = FaultyBackend(plan=[At(call, error=error, times=ALWAYS, where=sample.files[kind])])
    with pytest.raises(CacheIOError) as raised:
        open_faulty(monkeypatch, sample.path, backend, **OPTIONS)
    assert raised.value.errno == error
    assert str(raised.value.filename).endswith(sample.files[kind])
    assert ("--drop-unreadable" in str(raised.value)) == (error == errno.EIO)
    assert sample.content() == before
    assert backend.paths == {}, "files are left open"
    with open_well(sample) as cache:
        assert sample.judge(cache) == set()
        assert cache.check() == []


@pytest.mark.parametrize("where", ["/cache/segments", "/cache/large", "/cache/writers", "/cache"])
def test_an_index_is_not_made_of_a_directory_that_cannot_be_read(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = sample.without_index().content()
    for error in (errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM):
        fault = At("scandir", error=error, times=ALWAYS, where=where)
        with pytest.raises(CacheIOError, match=where):
            open_faulty(monkeypatch, sample.path, FaultyBackend(plan=[fault]), **OPTIONS)
        assert sample.content() == before
    with open_well(sample) as cache:
        assert sample.judge(cache) == set()


@pytest.mark.parametrize("kind", ["log", "segment"])
def test_every_read_counts(sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Header, footer, records, values: the n-th read of a file fails once, for every n."""
    sample.without_index()
    number = 1
    while True:
        fault = At("read", first=number, error=errno.EIO, where=sample.files[kind])
        backend = FaultyBackend(plan=[fault])
        try:
            cache = open_faulty(monkeypatch, sample.path, backend, **OPTIONS)
        except CacheIOError:
            assert not (sample.path / "index").exists()
        else:
            break
        number += 1
    backend.plan = []
    with cache:
        assert not fault.struck
        assert sample.judge(cache) == set()
    assert number > 2


@pytest.mark.parametrize("call", ["write", "allocate", "replace"])
def test_a_new_index_that_cannot_be_written_changes_nothing(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = sample.without_index().content()
    for first in range(1, 10):
        fault = Fault(call, first, errno.EIO)
        backend = FaultyBackend(plan=[fault])
        try:
            open_faulty(monkeypatch, sample.path, backend, **OPTIONS).close()
        except CacheIOError:
            assert sample.content() == before
        else:
            break
    with open_well(sample) as cache:
        assert sample.judge(cache) == set()


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_an_index_that_cannot_be_read_is_not_made_anew(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    before = sample.content()
    fault = At("open", error=error, times=ALWAYS, where="/index")
    with pytest.raises(CacheIOError, match="/index"):
        open_faulty(monkeypatch, sample.path, FaultyBackend(plan=[fault]), **OPTIONS)
    assert sample.content() == before


@pytest.mark.parametrize("kind", ["log", "checkpoint", "segment"])
def test_an_index_damaged_in_use_is_kept_where_a_file_cannot_be_read(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    backend = FaultyBackend()
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        index = cache._store.current.index
        for call, error in CASES:
            backend.plan = [At(call, error=error, times=ALWAYS, where=sample.files[kind])]
            with pytest.raises(CacheIOError, match=sample.files[kind]):
                cache._store.current.rebuild("for a test")
            assert cache._store.current.index is index
        backend.plan = []
        assert sample.judge(cache) == set()
        assert cache.check() == []


def test_headers_that_cannot_be_read_do_not_keep_a_sound_cache_shut(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked at only to see that the files belong together; what follows can tell, and check."""
    for call, error in CASES:
        backend = FaultyBackend(plan=[Fault(call, error=error, times=ALWAYS, where="/segments/")])
        with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
            backend.plan = []
            assert sample.judge(cache) == set()


# -- a cache in use ----------------------------------------------------------------------------------

CALLS: dict[str, Callable[[DiskCache], Any]] = {
    "get": lambda cache: cache.get("b40"),
    "get large": lambda cache: cache.get("large"),
    "getitem": lambda cache: cache["b40"],
    "get_many": lambda cache: cache.get_many(["a40", "b40", "large"]),
    "get_entry": lambda cache: cache.get_entry("b40"),
    "value of an entry": lambda cache: cache.get_entry("b40").value,  # type: ignore[union-attr]
    "entries": lambda cache: list(cache.entries()),
    "open": lambda cache: cache.open("b40").close(),
    "open large": lambda cache: cache.open("large").close(),
    "location": lambda cache: cache.location("b40").close(),
    "in": lambda cache: "b40" in cache,
    "touch": lambda cache: cache.touch("b40", None),
    "incr": lambda cache: cache.incr("number", 0),
    "evict": lambda cache: cache.evict("no such tag"),
    "delete_prefix": lambda cache: cache.delete_prefix("no such prefix"),
    "clean": lambda cache: cache._store.cleaner.clean_emptiest(),
    "set": lambda cache: cache.set("number", 7),
    "async get": lambda cache: asyncio.run(_get(cache)),
}  # fmt: skip


async def _get(cache: DiskCache) -> Any:
    async with AsyncDiskCache(cache.directory, backend="threads", **OPTIONS) as other:
        return await other.get("b40")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_read_keeps_everything(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for call, error in CASES:
        backend = FaultyBackend()
        with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
            backend.plan = [
                Fault(kind, error=error, times=ALWAYS, where=where)
                for kind in (call, "read_nowait") for where in ("/segments/", "/large/")
            ]  # fmt: skip
            try:
                found = CALLS[name](cache)
            except CacheIOError as raised:
                assert raised.errno == error
                assert "/segments/" in str(raised.filename) or "/large/" in str(raised.filename)
            else:
                assert found is not None or name not in ("get", "get large", "get_entry", "async get")
            backend.plan = []
            assert cache.stats().corrupt == 0
            assert cache.check() == []
    assert sample.judge(open_well(sample)) == set()


def test_pop_that_cannot_read_removes_nothing(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("open", "read"):
        backend = FaultyBackend()
        with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
            backend.plan = [Fault(kind, error=errno.EIO, times=ALWAYS, where="/segments/") for kind in (call,)]
            with pytest.raises(CacheIOError):
                cache.pop("b40")
            backend.plan = []
            assert sample.judge(cache) == set()


# -- check -------------------------------------------------------------------------------------------

CHECKED = {
    "log": "segment", "checkpoint": "checkpoint", "settings": "settings", "sealed": "segment",
    "segment": "segment", "large": "entry",
}  # fmt: skip


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("kind", CHECKED)
def test_check_reports_what_cannot_be_read_and_leaves_it(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, call: str
) -> None:
    backend = FaultyBackend()
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        backend.plan = [At(call, error=errno.EIO, times=ALWAYS, where=sample.files[kind])]
        (sample.path / "segments" / "00001234.seg").write_bytes(bytes(100))
        for fix in (False, True):
            problems = cache.check(fix=fix)
            found = [problem for problem in problems if "cannot be read" in problem.detail]
            assert CHECKED[kind] in {problem.kind for problem in found}
            assert not any(problem.fixed for problem in found)
            assert all(os.strerror(errno.EIO) in problem.detail for problem in found)
            assert all("check(fix=True, drop_unreadable=True)" in problem.detail for problem in found)
            rest = [problem for problem in problems if problem not in found]
            assert [(problem.kind, problem.fixed) for problem in rest] == [("stray", fix)]
        backend.plan = []
        assert cache.check() == []
        assert sample.judge(cache) == set()
        assert cache.stats().corrupt == 0
    with open_well(sample.without_index()) as cache:
        assert sample.judge(cache) == set()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM])
def test_check_gives_nothing_up_for_what_is_wrong_with_this_process(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    backend = FaultyBackend()
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        for kind in CHECKED:
            backend.plan = [At("open", error=error, times=ALWAYS, where=sample.files[kind])]
            cache._store.files.segments.forget_all()
            with pytest.raises(CacheIOError) as raised:
                cache.check(fix=True, drop_unreadable=True)
            assert raised.value.errno == error
        backend.plan = []
        assert sample.judge(cache) == set()


@pytest.mark.parametrize("where", ["/segments", "/large", "/writers"])
def test_check_reports_a_directory_that_cannot_be_read(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    backend = FaultyBackend()
    with open_faulty(monkeypatch, sample.path, backend, **OPTIONS) as cache:
        backend.plan = [Fault("scandir", error=errno.EIO, times=ALWAYS, where=where)]
        for options in ({}, {"fix": True}, {"fix": True, "drop_unreadable": True}):
            try:
                problems = cache.check(**options)
            except CacheIOError as raised:
                assert str(raised.filename).endswith(where)
            else:
                assert where[1:] in {problem.where for problem in problems}
        backend.plan = []
        assert cache.check() == []
        assert sample.judge(cache) == set()


def test_an_unreadable_tag(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index tells as well that the directory is a cache."""
    real = os.open

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = real(path, flags, mode, dir_fd=dir_fd)
        if os.fstat(fd).st_ino == number:
            os.close(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return fd

    tag = sample.path / f.TAG_NAME
    number = tag.stat().st_ino
    monkeypatch.setattr(os, "open", opened)
    os.link(tag, sample.path.parent / "kept")  # else its number may be given to the next one
    with open_well(sample) as cache:
        (problem,) = cache.check(fix=True)
        assert (problem.kind, problem.fixed) == ("tag", False)
        (problem,) = cache.check(fix=True, drop_unreadable=True)
        assert (problem.kind, problem.fixed) == ("tag", True)
        assert cache.check() == []
        assert tag.read_bytes() == f.TAG_TEXT


# -- what is given up --------------------------------------------------------------------------------


def bad_blocks(sample: Sample, kind: str, part: str) -> dict[str, set[int]]:
    """What the disk has lost of a file: "all" of it, its "start", its "end", or some of its "middle"."""
    blocks = list(range(0, (sample.path / sample.files[kind]).stat().st_size, 4096))
    chosen = {"all": blocks, "start": blocks[:1], "end": blocks[-1:], "middle": blocks[1:2]}[part]
    return {sample.files[kind]: set(chosen)}


def segments_of(sample: Sample) -> dict[str, int]:
    """The segment of each entry."""
    with open_well(sample) as cache:
        return {key: _slot(cache, key).segment for key in sample.values}


def in_file(sample: Sample, kind: str, segments: dict[str, int]) -> set[str]:
    number = f.parse_segment_name(os.path.basename(sample.files[kind]))
    return {key for key, segment in segments.items() if segment == number}


WORN = [(kind, part) for kind in ("sealed", "segment") for part in ("all", "start", "middle", "end")]
WORN += [("log", part) for part in ("all", "start", "end")]
WORN += [("checkpoint", "all"), ("settings", "all"), ("large", "all"), ("checkpoint", "start")]


def may_lose(sample: Sample, kind: str, segments: dict[str, int]) -> set[str]:
    if kind in ("sealed", "segment"):
        return in_file(sample, kind, segments)
    return {"large"} if kind == "large" else set()


def to_open(sample: Sample, monkeypatch: pytest.MonkeyPatch, backend: FaultyBackend) -> DiskCache:
    return open_faulty(monkeypatch, sample.path, backend, **OPTIONS)


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize(("kind", "part"), WORN)
def test_check_gives_up_what_the_disk_has_lost(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, part: str, heals: bool, room: Path
) -> None:
    segments = segments_of(sample.copy(room / "look"))
    lost = may_lose(sample, kind, segments)
    backend = WornBackend(bad_blocks(sample, kind, part), heals=heals)
    with to_open(sample, monkeypatch, backend) as cache:
        assert all(not problem.fixed for problem in cache.check(fix=True))
        problems = cache.check(fix=True, drop_unreadable=True)
        assert problems or part == "end"  # nothing is where the end of a log is
        assert all(problem.fixed for problem in problems), problems
        missing = sample.judge(cache, lost.__contains__)
        assert cache.check() == []
        if part != "all" and heals and len(lost) > 1:
            assert len(missing) < len(lost)
        cache.set("new", 1)
        del cache["new"]
    # With the disk as it is, an index can be made anew, and nothing comes back.
    sample.without_index()
    with to_open(sample, monkeypatch, WornBackend(backend.bad, heals=heals)) as cache:
        assert sample.judge(cache, missing.__contains__) == missing
        assert cache.check() == []


def test_what_lies_next_to_lost_bytes_is_kept(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written over, the footer tells where the others are."""
    with open_well(sample) as cache:
        slot = _slot(cache, "b40")
    backend = WornBackend({sample.files["segment"]: {slot.offset + slot.head_bytes}}, heals=False, size=16)
    with to_open(sample, monkeypatch, backend) as cache:
        assert all(problem.fixed for problem in cache.check(fix=True, drop_unreadable=True))
        assert sample.judge(cache, {"b40"}.__contains__) == {"b40"}
        assert cache.check() == []
    with to_open(sample.without_index(), monkeypatch, backend) as cache:
        assert sample.judge(cache, {"b40"}.__contains__) == {"b40"}
        assert cache.check() == []


@pytest.mark.parametrize(("kind", "part"), [*WORN, ("index", "all")])
def test_repair_gives_up_what_the_disk_has_lost(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, part: str, room: Path
) -> None:
    """No index, and a file that cannot be read: nothing that was deleted comes back."""
    segments = segments_of(sample.copy(room / "look"))
    lost = may_lose(sample, kind, segments)
    if kind == "log" and part != "end":
        lost = set(sample.values)
    elif kind == "checkpoint":  # nothing up to it is trusted
        lost = {key for key in sample.values if key.startswith("a")}
    bad = bad_blocks(sample, kind, part)
    if kind != "index":
        sample.without_index()
    backend = WornBackend(bad, heals=False)
    use(monkeypatch, backend)
    if kind == "index":
        backend.plan = [Fault("open", error=errno.EIO, where="/index")]
    problems = repair(sample.path, backend="threads", **OPTIONS)
    assert all(problem.fixed for problem in problems), problems
    with to_open(sample, monkeypatch, backend) as cache:
        missing = sample.judge(cache, lost.__contains__)
        assert cache.check() == []
    if part != "end":
        assert problems
    sample.without_index()
    with to_open(sample, monkeypatch, backend) as cache:
        assert sample.judge(cache, missing.__contains__) == missing
        assert cache.check() == []


@pytest.mark.parametrize("kind", READ_FOR_AN_INDEX)
def test_repair_gives_up_what_cannot_even_be_opened(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, room: Path
) -> None:
    segments = segments_of(sample.copy(room / "look"))
    lost = may_lose(sample, kind, segments)
    if kind == "log":
        lost = set(sample.values)
    elif kind == "checkpoint":
        lost = {key for key in sample.values if key.startswith("a")}
    fault = At("open", error=errno.EIO, times=ALWAYS, where=sample.files[kind])
    sample.without_index()
    use(monkeypatch, FaultyBackend(plan=[fault]))
    with pytest.raises(CacheIOError, match="drop-unreadable"):
        DiskCache(sample.path, **OPTIONS)
    problems = repair(sample.path, **OPTIONS)
    assert all(problem.fixed for problem in problems) or kind == "settings", problems
    monkeypatch.undo()
    with open_well(sample.without_index()) as cache:
        sample.judge(cache, lost.__contains__)
        assert cache.check() == []


def use(monkeypatch: pytest.MonkeyPatch, backend: FaultyBackend) -> None:
    """Every cache that is opened from here on is on this backend."""

    def chosen(settings: Settings) -> Choice:
        return Choice(backend, "for a test")

    monkeypatch.setattr("yatagarasu_cache.store.sharing.choose", chosen)


def test_what_came_after_the_hole_in_a_log_is_kept(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes stand in order: what is missing is older than the next one that can be read."""
    path, gone = room / "cache", [f"k{i}" for i in range(150)]
    with DiskCache(path, backend="threads", size_limit=64 << 20) as cache:
        cache.set_many((key, b"") for key in [*gone, "before", "last"])
        for key in gone:
            cache.delete(key)
        cache.set("late", 1)
        cache.delete("last")
        log = f.segment_name(cache._store.changes.segment)
        assert cache._store.changes.size > 2 * 4096
    (path / "index").unlink()
    use(monkeypatch, WornBackend({f"segments/{log}": {4096}}))
    assert all(problem.fixed for problem in repair(path))
    with DiskCache(path) as cache:
        assert list(cache) == ["late"]


@pytest.mark.parametrize("block", [0, 4096, 8192])
def test_what_is_known_of_a_newer_value_keeps_the_older_from_coming_back(
    room: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """The footer tells what was in a segment of which a part cannot be read."""
    path = room / "cache"
    with DiskCache(path, backend="threads", **OPTIONS) as cache:
        for version in ("old", "new"):
            for i in range(5):
                cache.set(f"k{i}", version.encode() + bytes(3000))
            number = _slot(cache, "k0").segment
            with cache._store.locks.appending:
                cache._store.active.seal()
    (path / "index").unlink()
    use(monkeypatch, WornBackend({f"segments/{f.segment_name(number)}": {block}}, heals=False))
    assert all(problem.fixed for problem in repair(path, **OPTIONS))
    for _ in range(2):
        with DiskCache(path, **OPTIONS) as cache:
            found = {value[:3] for i in range(5) if (value := cache.get(f"k{i}")) is not None}
            assert found == ({b"new"} if block else set())
            assert cache.check() == []
        (path / "index").unlink()


def test_a_mark_that_cannot_be_read(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a handle that died: what it had under way is looked for, where the mark is given up."""
    mark = sample.path / "writers" / f"{1:016x}.lock"
    mark.write_bytes(f.MARK.pack(0, 5000, 0, 0))
    fault = At("read", error=errno.EIO, times=ALWAYS, where=mark.name)
    use(monkeypatch, FaultyBackend(plan=[fault]))
    with pytest.raises(CacheIOError, match=mark.name):
        DiskCache(sample.path, **OPTIONS)
    assert mark.exists()
    assert all(problem.fixed for problem in repair(sample.path, **OPTIONS))
    assert not mark.exists()
    with DiskCache(sample.path, **OPTIONS) as cache:
        assert sample.judge(cache) == set()


@pytest.mark.parametrize("call", ["write", "allocate", "replace", "sync"])
@pytest.mark.parametrize("kind", ["log", "segment", "checkpoint"])
def test_a_repair_that_cannot_write_changes_nothing(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, kind: str, call: str
) -> None:
    sample.without_index()
    bad = bad_blocks(sample, kind, "start")
    backend = WornBackend(bad, heals=False)
    backend.plan = [Fault(call, error=errno.EROFS, times=ALWAYS)]
    use(monkeypatch, backend)
    try:
        assert not all(problem.fixed for problem in repair(sample.path, **OPTIONS))
    except CacheIOError as raised:
        assert raised.errno == errno.EROFS
    monkeypatch.undo()
    with open_well(sample) as cache:
        sample.judge(cache, lambda key: True)
        assert cache.check(fix=True) is not None
        assert cache.check() == []


# -- how it is asked for -----------------------------------------------------------------------------


def test_nothing_is_given_up_without_fix(sample: Sample) -> None:
    with open_well(sample) as cache, pytest.raises(ValueError, match="needs fix=True"):
        cache.check(drop_unreadable=True)

    async def run() -> None:
        async with AsyncDiskCache(sample.path, backend="threads", **OPTIONS) as cache:
            with pytest.raises(ValueError, match="needs fix=True"):
                await cache.check(drop_unreadable=True)
            assert await cache.check(fix=True, drop_unreadable=True) == []

    asyncio.run(run())


def test_asyncio_gives_up_what_the_disk_has_lost(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = WornBackend(bad_blocks(sample, "checkpoint", "all"))
    use(monkeypatch, backend)

    async def run() -> None:
        async with AsyncDiskCache(sample.path, **OPTIONS) as cache:
            assert [problem.fixed for problem in await cache.check(fix=True)] == [False]
            assert [p.fixed for p in await cache.check(fix=True, drop_unreadable=True)] == [True]

    asyncio.run(run())


def test_the_command_line(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.without_index()
    where = str(sample.path)
    use(monkeypatch, WornBackend(bad_blocks(sample, "segment", "start"), heals=False))
    assert cli.main(["check", where, "--fix"]) == 2
    assert "--drop-unreadable" in capsys.readouterr().err
    assert cli.main(["check", where, "--drop-unreadable"]) == 2
    assert "it needs --fix" in capsys.readouterr().err
    assert cli.main(["check", where, "--fix", "--drop-unreadable", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert os.path.basename(sample.files["segment"]) in {problem["where"] for problem in report["problems"]}
    assert cli.main(["check", where]) == 0
    assert cli.main(["check", where + "/nothing", "--fix", "--drop-unreadable"]) == 2


def test_the_command_line_tells_what_helps(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, WornBackend(bad_blocks(sample, "segment", "start")))
    assert cli.main(["check", str(sample.path), "--fix"]) == 1
    assert "--drop-unreadable gives up" in capsys.readouterr().err
    assert cli.main(["check", str(sample.path), "--fix", "--drop-unreadable"]) == 0
