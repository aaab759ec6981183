"""Files are what they should be: regular, of our owner, in directories that are ours, and as long as they can
be. Whatever else is in their place is an error or damage, at once; nothing outside is touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import itertools
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import backend_for
from faulty import Fault, FaultyBackend, open_faulty
from helpers import (
    NOBODY,
    FailingBackend,
    as_nobody,
    at_most,
    descriptors,
    noise,
    open_up,
    tree,
    wrap_backends,
)  # fmt: skip
from interrupting import steps_of

from yatagarasu_cache import CacheError, CacheIOError, DiskCache, FormatError, LockTimeout, StorageFull
from yatagarasu_cache.backends import directories
from yatagarasu_cache.backends.directories import Directories, Foreign, Trust
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.concurrency import file_locks
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.segment import scan

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

Make = Callable[..., DiskCache]
SMALL = {"size_limit": 1 << 20, "large_value_size": 4000}
STRANGER = 12345
MARK = f"writers/{0xAA:016x}.lock"
LOCKS = ("lock", "users", "checkpoint.lock", "reclaim.lock")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


def fill(directory: Path) -> None:
    """A cache that has a file of every kind."""
    with DiskCache(directory, backend="threads", **SMALL) as cache:
        for i in range(30):
            cache.set(i, noise(200, i))
        cache.set("big", noise(9000))
        cache.delete(0)
        cache.flush()
        assert cache._store.checkpoints.write_if()
    (directory / MARK).write_bytes((1).to_bytes(8, "little"))
    (directory / "tmp" / f.temporary_name(0xAA, 1, value=False)).write_bytes(b"left")


def use(cache: DiskCache) -> None:
    for call in CALLS:
        with contextlib.suppress(CacheError, KeyError):
            call(cache)


CALLS: tuple[Callable[[DiskCache], object], ...] = (
    lambda c: [c.get(i) for i in range(30)],
    lambda c: c.get("big"),
    lambda c: c.set("n", b"n"),
    lambda c: c.set("m", noise(9000)),
    lambda c: c.delete(5),
    list,
    lambda c: c.flush(),
    lambda c: c.check(),
    lambda c: c.check(fix=True),
)


# -- something else in the place of a file or directory ------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "somebody's").touch()


def link(path: Path) -> None:
    path.symlink_to("/nonexistent")


def unix_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def very_long(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


OTHERS = (directory_with_a_file, link, unix_socket, very_long)
PLACES = (
    f.TAG_NAME, f.INDEX_NAME, *LOCKS, f.CHECKPOINT_NAME, f.SETTINGS_NAME, "segments", "large", "tmp", "writers",
    "segment", "log", "value", MARK, "temporary",
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "cache"
    fill(directory)
    return directory


def found(directory: Path, place: str) -> Path:
    segments = {path.read_bytes()[:8]: path for path in sorted((directory / "segments").iterdir())}
    if place in ("segment", "log"):
        return segments[f.LOG_MAGIC if place == "log" else f.SEGMENT_MAGIC]
    if place in ("value", "temporary"):
        return next((directory / ("large" if place == "value" else "tmp")).iterdir())
    return directory / place


@pytest.mark.parametrize("late", [False, True], ids=["before", "while open"])
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_the_place_of_a_file(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch, place: str, late: bool
) -> None:
    """A FIFO, and one of the others: misses or errors of ours, and no waiting."""
    number = 2 * PLACES.index(place) + late
    monkeypatch.setenv("YATAGARASU_CORE", ("c", "python")[(number + late) // 2 % 2])
    options = {"backend": backend_for((place, late), 2), **SMALL}
    for kind in (fifo, OTHERS[(number + number // len(OTHERS)) % len(OTHERS)]):
        directory = tmp_path / kind.__name__ / "c"
        shutil.copytree(template, directory)
        path = found(directory, place)
        with at_most(10), contextlib.suppress(CacheError):
            cache = None
            if late:
                cache = DiskCache(directory, **options)
                cache.get(1)
                cache.set("w", b"w")
            if os.path.lexists(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            kind(path)
            try:
                cache = cache or DiskCache(directory, **options)
                use(cache)
            finally:
                if cache is not None:
                    cache.close()
        with at_most(10), contextlib.suppress(CacheError):
            DiskCache(directory, backend="threads").close()
        if kind is directory_with_a_file:
            assert (path / "somebody's").exists()


@pytest.mark.parametrize("name", ["large", "segments"])
def test_a_directory_that_was_restored_is_looked_into_at_once(directory: Path, tmp_path: Path, name: str) -> None:
    """That another one was in its place a moment ago does not make an entry vanish."""
    with DiskCache(directory, backend="threads", max_open_files=8, segment_size=4096, **SMALL) as cache:
        for i in range(100):
            cache.set(i, noise(2000 + i % 2 * 4000, i))
        for i in range(100):
            if i % 10 == 0:
                shutil.copytree(directory / name, tmp_path / f"{i}")
                cache.get(i + 1)  # the directory has just been seen
                shutil.rmtree(directory / name)
                (tmp_path / f"{i}").rename(directory / name)
            assert cache.get(i) == noise(2000 + i % 2 * 4000, i)
        assert cache.stats().corrupt == 0


@pytest.mark.parametrize("kind", [fifo, directory_with_a_file, link, unix_socket])
def test_the_error_says_what_to_do(directory: Path, template: Path, kind: Callable[[Path], None]) -> None:
    shutil.copytree(template, directory)
    (directory / "lock").unlink()
    kind(directory / "lock")
    with pytest.raises(CacheIOError, match="is in the place of a file.*: (remove it|move it away)") as raised:
        DiskCache(directory)
    assert raised.value.filename == str(directory / "lock")


def test_nobodys_directories_are_in_nobodys_way(
    make: Make, directory: Path, template: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named like a large file, a mark or a temporary file: left alone, and told of once each."""
    caplog.set_level(logging.WARNING, "yatagarasu_cache")
    shutil.copytree(template, directory)
    pointer = 7
    paths = [
        directory / "large" / f.large_name(3, 5, pointer),
        directory / "writers" / f"{0xBB:016x}.lock",
        directory / "tmp" / f.temporary_name(0xBB, 2, value=True),
    ]
    for path in paths:
        directory_with_a_file(path)
    cache = make(**SMALL)
    store = cache._store
    for _ in range(2):
        store.reaper.reap()
        store.reaper.look_for_orphans()
    assert cache.set("big", noise(9000, 1)) and cache.get("big") == noise(9000, 1)
    assert cache.check(fix=True) == []
    cache.close()
    assert all((path / "somebody's").exists() for path in paths)
    for path in paths:
        assert sum(str(path) in line and "left alone" in line for line in caplog.messages) == 1, path


def test_a_segment_that_became_a_directory_is_given_up(make: Make, directory: Path) -> None:
    """Its entries are lost, its room is had back, and the directory stays."""
    cache = make(size_limit=256 << 10, segment_size=8 << 10)
    for i in range(20):
        cache.set(i, noise(1000, i))
    path = sorted((directory / "segments").iterdir())[0]
    while path.read_bytes()[:8] != f.SEGMENT_MAGIC:
        path = sorted((directory / "segments").iterdir())[1]
    path.unlink()
    directory_with_a_file(path)
    for i in range(400):
        cache.set(i, noise(1000, i))
    assert cache.get(399) == noise(1000, 399)
    assert (path / "somebody's").exists()


# -- what paths lead to ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segments", "large", "tmp", "writers"])
def test_a_link_in_the_place_of_a_directory_leads_nowhere(
    make: Make, tmp_path: Path, directory: Path, name: str, core: str
) -> None:
    """While the cache is open: nothing is made, changed or removed in another one's."""
    other = tmp_path / "other"
    fill(other)
    cache = make(**SMALL)
    cache.set(1, b"1")
    before = tree(other)
    (directory / name).rename(directory / "aside")
    (directory / name).symlink_to(other / name)
    use(cache)
    with contextlib.suppress(CacheError):
        cache.close()
    assert tree(other) == before
    with pytest.raises(FormatError, match="symbolic link, which is not followed"):
        make(**SMALL)
    assert tree(other) == before


def test_the_cache_directory_itself_becomes_a_link(make: Make, tmp_path: Path, directory: Path) -> None:
    other = tmp_path / "other"
    fill(other)
    cache = make(**SMALL)
    before = tree(other)
    directory.rename(tmp_path / "aside")
    directory.symlink_to(other)
    use(cache)
    with contextlib.suppress(CacheError):
        cache.close()
    assert tree(other) == before


def test_another_directory_in_the_place_of_ours_is_used(make: Make, directory: Path) -> None:
    cache = make(**SMALL)
    cache.set("old", noise(9000))
    (directory / "large").rename(directory / "aside")
    (directory / "large").mkdir()
    assert cache.set("new", noise(9000, 1)) and cache.get("new") == noise(9000, 1)
    assert len(list((directory / "large").iterdir())) == 1
    assert cache.get("old") is None


def test_directories_are_open_once(make: Make, directory: Path) -> None:
    before = descriptors()
    cache = make(backend="threads", **SMALL)
    use(cache)
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(200) if os.path.lexists(f"/proc/self/fd/{fd}")]
    ours = [name for name in names if name.startswith(str(directory)) and os.path.isdir(name)]
    assert len(ours) == len(set(ours)) <= 5
    cache.close()
    gc.collect()
    assert descriptors() == before


def test_without_open_directories_links_are_refused_too(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On systems whose calls take no names in open directories."""
    monkeypatch.setattr(directories, "RELATIVE", False)
    other = tmp_path / "other"
    fill(other)
    before = tree(other)
    with DiskCache(directory, backend="threads", **SMALL) as cache:
        assert cache.set("big", noise(9000)) and cache.get("big") == noise(9000)
        (directory / "large").rename(directory / "aside")
        (directory / "large").symlink_to(other / "large")
        use(cache)
        (directory / "large").unlink()
    assert tree(other) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_leaves_no_directory_open(tmp_path: Path) -> None:
    """At each step at which directories are opened, looked at, listed, and found replaced. Python drops those
    that come in a destructor, of which one may leave something open."""
    before, dropped = descriptors(), 0
    (tmp_path / "large").mkdir()
    for at in itertools.count(1):
        backend = ThreadsBackend()
        backend.keep_to(str(tmp_path), ["large"], Trust())

        def look(backend: ThreadsBackend = backend) -> None:
            for _ in range(2):
                for _ in range(2):
                    backend.scandir(str(tmp_path / "large"))
                (tmp_path / "large").rmdir()
                (tmp_path / "large").mkdir()

        try:
            interrupter = steps_of(look, at, opcodes=False)
        finally:
            (tmp_path / "large").mkdir(exist_ok=True)
        backend.close()
        dropped += interrupter.in_destructor
        if not interrupter.where:
            break
    assert at > 50
    assert descriptors() - before <= dropped < at // 5


@pytest.mark.parametrize("code", [errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "scandir", "sync_directory", "sync", "unlink", "lstat"])
def test_close_raises_errors_of_ours(
    directory: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    made = wrap_backends(monkeypatch, FailingBackend)
    cache = DiskCache(directory, backend="threads", **SMALL)
    cache.set("big", noise(9000))
    assert isinstance(made[0], FailingBackend)
    made[0].fail(code, [call])
    with contextlib.suppress(CacheError):
        cache.close()
    made[0].mend()
    cache.close()


# -- sizes ----------------------------------------------------------------------------------------


def test_holes_of_a_segment_are_not_read(make: Make, directory: Path) -> None:
    """It is read through where it has data, however long it is; longer than it can be, it is damage."""
    with make(**SMALL) as cache:
        cache.set(1, noise(500))
    (path,) = [p for p in (directory / "segments").iterdir() if p.read_bytes()[:8] == f.SEGMENT_MAGIC]
    read = 0

    class Counting(ThreadsBackend):
        def read(self, fd: int, length: int, offset: int) -> bytes:
            nonlocal read
            data = super().read(fd, length, offset)
            read += len(data)
            return data

    backend, seed = Counting(), f.unpack_segment_header(path.read_bytes()[:64]).identity.seed  # type: ignore[union-attr]
    for size, records in ((f.MAX_SEGMENT_BYTES, 1), (f.MAX_SEGMENT_BYTES + 1, 0)):
        os.truncate(path, size)
        with backend.reading(str(path)) as fd, at_most(10):
            assert len(list(scan(backend, fd, int(path.stem, 16), seed))) == records
    assert read < 8 << 20


@pytest.mark.parametrize("size", [1 << 40, 1 << 30])
def test_an_index_that_is_longer_than_it_says_is_damage(make: Make, directory: Path, size: int) -> None:
    """It is not mapped, and nothing is allocated for it: it is made anew."""
    with make(**SMALL) as cache:
        cache["k"] = 1
    os.truncate(directory / "index", size)
    with make(**SMALL) as cache:
        assert cache["k"] == 1
        assert (directory / "index").stat().st_size < 1 << 24


def sparse_index(directory: Path) -> Path:
    """As copies are that leave out blocks of zeros."""
    index = directory / "index"
    data = index.read_bytes()
    index.unlink()
    with index.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                file.seek(at)
                file.write(data[at : at + 4096])
    index.chmod(0o600)
    if index.stat().st_blocks * 512 >= len(data):
        pytest.skip("this file system makes no holes")
    return index


def test_holes_of_an_index_are_filled_before_it_is_mapped(make: Make, directory: Path) -> None:
    with make(size_limit=64 << 20) as cache:
        cache["k"] = 1
    index = sparse_index(directory)
    with make(read_only=True) as reader:  # which may not allocate anything, and need not
        assert reader["k"] == 1
    with make() as cache:
        assert index.stat().st_blocks * 512 >= index.stat().st_size
        assert cache["k"] == 1


def test_no_room_for_the_holes_of_an_index(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told at opening, not by SIGBUS later."""
    with DiskCache(directory, size_limit=64 << 20) as cache:
        cache["k"] = 1
    sparse_index(directory)
    full = FaultyBackend(plan=[Fault("allocate", error=errno.ENOSPC)])
    with pytest.raises(StorageFull, match="free space"):
        open_faulty(monkeypatch, directory, full)
    with DiskCache(directory) as cache:
        assert cache["k"] == 1


# -- what another user has prepared ---------------------------------------------------------------


@only_root
@pytest.mark.parametrize("name", ["index", "lock", "users", "checkpoint.lock", "reclaim.lock"])
def test_a_strangers_file_is_not_used(make: Make, directory: Path, template: Path, name: str) -> None:
    shutil.copytree(template, directory)
    os.chown(directory / name, STRANGER, STRANGER)
    with pytest.raises(CacheIOError, match=rf"uid {STRANGER}.*remove it, give it to root.*chown") as raised:
        make(**SMALL)
    assert raised.value.filename == str(directory / name)
    os.chown(directory / name, 0, 0)
    assert make(**SMALL).get(1) == noise(200, 1)


@only_root
@pytest.mark.parametrize("name", ["segments", "large", "tmp", "writers"])
def test_a_strangers_directory_is_not_used(make: Make, directory: Path, template: Path, name: str) -> None:
    shutil.copytree(template, directory)
    os.chown(directory / name, STRANGER, STRANGER)
    with pytest.raises(FormatError, match=rf"{name}.*belongs to uid {STRANGER}.*directory_mode"):
        make(**SMALL)
    assert make(directory_mode=0o777, file_mode=0o666, **SMALL).get(1) == noise(200, 1)


@only_root
def test_strangers_segments_and_values_are_damage(
    make: Make, directory: Path, template: Path, core: str
) -> None:
    shutil.copytree(template, directory)
    (value,) = (directory / "large").iterdir()
    os.chown(value, STRANGER, STRANGER)
    with make(**SMALL) as cache:
        assert cache.get("big") is None and cache.get(1) == noise(200, 1)
    os.chown(found(directory, "segment"), STRANGER, STRANGER)
    with make(**SMALL) as cache:
        assert cache.get(2) is None
        assert cache.set(2, b"new") and cache.get(2) == b"new"


@only_root
def test_modes_say_who_else_is_taken(tmp_path: Path) -> None:
    """Of the group that may write, or of all others; who reads goes by the directory's own modes."""
    cases = [
        # directory_mode, file_mode, read_only; the directory's mode; group of the file; whether it is taken
        (0o700, 0o600, False, 0o777, NOBODY, False),
        (0o2770, 0o660, False, 0o700, os.getegid(), True),
        (0o2770, 0o660, False, 0o700, STRANGER, False),
        (0o2770, 0o600, False, 0o2770, os.getegid(), False),
        (0o777, 0o666, False, 0o700, STRANGER, True),
        (0o700, 0o600, True, 0o777, STRANGER, True),
        (0o700, 0o600, True, 0o755, STRANGER, False),
    ]
    path = tmp_path / "file"
    path.touch()
    for directory_mode, file_mode, read_only, mode, group, taken in cases:
        tmp_path.chmod(mode)
        os.chown(path, STRANGER, group)
        trust = Trust(directory_mode, file_mode, read_only)
        assert trust.admits(path.stat(), tmp_path.stat()) == taken, (oct(directory_mode), oct(file_mode), oct(mode))
        for owner in (0, os.geteuid(), tmp_path.stat().st_uid):
            os.chown(path, owner, STRANGER)
            assert trust.admits(path.stat(), tmp_path.stat())
        places = Directories()
        places.keep_to(str(tmp_path), (), trust)
        os.chown(path, STRANGER, group)
        with contextlib.nullcontext() if taken else pytest.raises(Foreign, match=f"uid {STRANGER}"):
            places.ensure_ours(str(path), path.stat())
        places.close()


@only_root
def test_a_trap_is_not_stepped_into(tmp_path: Path, template: Path, backend: str) -> None:
    """A stranger lets everybody write to a cache that he has made: only who says so, or reads, uses it."""
    directory = tmp_path / "cache"
    shutil.copytree(template, directory)
    for path in (directory, *directory.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
        path.chmod(0o777 if path.is_dir() else 0o666)
    open_up(directory, 0o777)
    as_nobody(
        """
try:
    DiskCache(sys.argv[1], backend=sys.argv[2])
except FormatError as error:
    assert "belongs to uid 12345" in str(error) and "directory_mode" in str(error), error
else:
    raise AssertionError("it was used")
with DiskCache(sys.argv[1], backend=sys.argv[2], read_only=True) as cache:
    assert len(cache.get(1)) == 200 and len(cache.get("big")) == 9000
with DiskCache(sys.argv[1], backend=sys.argv[2], directory_mode=0o777, file_mode=0o666) as cache:
    assert len(cache.get(1)) == 200 and cache.set(1, 1)
""",
        directory, backend,
    )  # fmt: skip


# -- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(0o600, 0o600), (0o640, 0o600), (0o644, 0o600), (0o660, 0o660), (0o664, 0o660), (0o666, 0o666), (0o622, 0o600)],
)
def test_who_may_only_read_locks_nothing(make: Make, directory: Path, mode: int, expected: int) -> None:
    assert file_locks.lock_mode(mode) == expected
    with make(file_mode=mode, **SMALL) as cache:
        cache.set(1, noise(100))
        paths = [directory / name for name in LOCKS] + list((directory / "writers").iterdir())
        assert len(paths) == 5
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {expected}


def test_lock_files_of_before_are_narrowed(make: Make, directory: Path) -> None:
    make(**SMALL).close()
    for name in LOCKS:
        (directory / name).chmod(0o664)
    make(**SMALL).close()
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in LOCKS} == {0o660}


@only_root
def test_a_reader_needs_no_lock_file(directory: Path, backend: str) -> None:
    with DiskCache(directory, directory_mode=0o755, file_mode=0o644, **SMALL) as cache:
        cache["k"] = 1
        cache["big"] = noise(9000)
        open_up(directory, 0o755)
        as_nobody(
            """
with DiskCache(sys.argv[1], backend=sys.argv[2], read_only=True) as cache:
    assert cache["k"] == 1 and len(cache["big"]) == 9000 and len(cache.stats().as_dict()) > 5
for name in ("lock", "users", "checkpoint.lock", "reclaim.lock"):
    try:
        os.open(os.path.join(sys.argv[1], name), os.O_RDONLY)
    except PermissionError:
        continue
    raise AssertionError("it can be locked")
""",
            directory, backend,
        )  # fmt: skip


@pytest.mark.parametrize("name", LOCKS[:2])
def test_who_holds_a_lock_for_ever_is_named(make: Make, directory: Path, name: str) -> None:
    make(**SMALL).close()
    with (directory / name).open("rb") as held, at_most(10):
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LockTimeout, match=rf"held by process {os.getpid()} ") as raised:
            make(lock_timeout=0.1, **SMALL)
        assert raised.value.filename == str(directory / name)
    make(**SMALL).close()


def test_marks_that_others_lock_are_given_up(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write there, and is faster, doesn't keep a handle waiting."""
    cache, held = make(backend="threads", **SMALL), []
    real, numbers = ThreadsBackend.open, itertools.count()

    def open_and_lock(self: ThreadsBackend, path: str, flags: int, mode: int = 0o600) -> int:
        fd = real(self, path, flags, mode)
        if os.path.dirname(path).endswith("writers") and next(numbers) < most:
            held.append(os.open(path, os.O_RDONLY))
            fcntl.flock(held[-1], fcntl.LOCK_EX)
        return fd

    monkeypatch.setattr(ThreadsBackend, "open", open_and_lock)
    try:
        with at_most(10):
            most = 1 << 30
            with pytest.raises(LockTimeout, match="find out by whom"):
                cache.set(1, b"1")
            most, numbers = 3, itertools.count()
            assert cache.set(1, b"1")
        assert len(list((directory / "writers").iterdir())) == 1
    finally:
        for fd in held:
            os.close(fd)


def test_a_locked_segment_keeps_nobody_waiting(make: Make, directory: Path, core: Any) -> None:
    """Who may read segments can lock them: then one of a dead handle stays as it is for so long."""
    if not (child := os.fork()):
        DiskCache(directory, backend="threads", **SMALL).set(1, noise(100))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with contextlib.ExitStack() as stack, at_most(20):
        for path in (directory / "segments").iterdir():
            fcntl.flock(stack.enter_context(path.open("rb")), fcntl.LOCK_SH)
        with make(**SMALL) as other:
            for i in range(40):
                other.set(i, noise(3000, i))
            assert other.get(39) == noise(3000, 39)
    with make(**SMALL) as other:
        assert other.get(39) == noise(3000, 39) and other.check() == []
