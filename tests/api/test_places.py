"""Where a cache lives: who makes what there, for whom, beside what, on which file system, by which path."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import NOBODY, FailingBackend, WrappedBackend, as_nobody, noise, open_up, tree, wrap_backends

from yatagarasu_cache import CacheIOError, ConfigurationError, DiskCache, FormatError, ReadOnlyError
from yatagarasu_cache.backends import creating
from yatagarasu_cache.backends.directories import Place
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.store import directory as directory_module
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.directory import (
    LOCAL_FUSE,
    NEGLIGIBLE,
    NEGLIGIBLE_DIRECTORIES,
    NEGLIGIBLE_STARTS,
    prepare,
)

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("apart")]  # each handle stands for a process

Make = Callable[..., DiskCache]
LOCKS = (f.LOCK_NAME, f.USERS_NAME)
SMALL = {"size_limit": 1 << 20, "large_value_size": 4000}
only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root makes files for others")


def use(cache: DiskCache, first: int = 0) -> None:
    """Whatever makes files: segments, a log, large values, a checkpoint, settings."""
    for i in range(first, first + 20):
        cache.set(i, noise(100 if i % 2 else 5000, i))
    cache.delete(first)
    cache.flush()
    cache._store.checkpoints.write()
    assert cache.get(first + 1) == noise(100, first + 1)
    assert cache.get(first + 2) == noise(5000, first + 2)


# -- made by many at once -----------------------------------------------------------------------


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("call", range(7))
def test_others_make_the_same_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, faster: bool
) -> None:
    """Two processes begin below missing parents. Just before, or just after, a mkdir of the one the other
    makes all of its directories; the parents, the cache and what is in it are each met once."""
    directory, real, calls = tmp_path / "app" / "cache", os.mkdir, 0

    def mkdir(path: str, mode: int = 0o777, **where: int | None) -> None:
        nonlocal calls
        calls += 1
        meets = calls == call + 1
        if meets and faster:
            DiskCache(directory).close()
        real(path, mode, **where)
        if meets and not faster:
            DiskCache(directory).close()

    monkeypatch.setattr(os, "mkdir", mkdir)
    with DiskCache(directory) as cache:
        cache["key"] = 1
        assert cache["key"] == 1 and cache.check() == []
    assert calls > call


@pytest.mark.parametrize("call", range(10))
def test_others_open_it_at_any_step(tmp_path: Path, call: int) -> None:
    """The tag, the directories and their names: at each call of the one, the other opens the whole cache."""
    directory, calls = tmp_path / "cache", 0

    class Meeting(WrappedBackend):
        def before(self, name: str, path: str, size: int) -> None:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                with DiskCache(directory) as other:
                    other["key"] = 1

    prepare(Meeting(ThreadsBackend()), make_settings(directory))
    assert calls > call
    with DiskCache(directory) as cache:
        assert cache["key"] == 1 and cache.check() == []


def test_a_parent_that_vanishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes it right after it was made, once: then it is made again."""
    real, removed = os.mkdir, []

    def mkdir(path: str, mode: int = 0o777, **where: int | None) -> None:
        real(path, mode, **where)
        if not removed:
            removed.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with DiskCache(tmp_path / "app" / "cache") as cache:
        cache["key"] = 1
    assert removed == [str(tmp_path / "app")]


def test_a_file_in_the_place_of_a_parent(tmp_path: Path) -> None:
    (tmp_path / "app").write_bytes(b"a file")
    with pytest.raises(CacheIOError) as raised:
        DiskCache(tmp_path / "app" / "cache")
    assert raised.value.errno == errno.ENOTDIR


def test_lock_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for a lock file and its creation another process makes it: both have the same."""
    path, real, others = str(tmp_path / "lock"), os.open, []

    def open_after_another(name: str, flags: int, *mode: int, **where: int | None) -> int:
        if flags & os.O_EXCL and not others:
            others.append(real(path, os.O_RDWR | os.O_CREAT, 0o600))
        return real(name, flags, *mode, **where)

    monkeypatch.setattr(os, "open", open_after_another)
    fd = creating.open_file(Place(path, path), os.O_RDWR | os.O_CREAT, 0o600)
    assert os.fstat(fd).st_ino == os.fstat(others[0]).st_ino
    os.close(fd)
    os.close(others[0])


def test_what_was_just_made_may_soon_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode and owner come a moment after its name: whoever meets it in between tries again."""
    made, tries = tmp_path / "made", []

    def use() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "not yet")
        return "used"

    made.mkdir()
    assert creating.patiently(str(made), use) == "used"
    assert len(tries) == 3
    monkeypatch.setattr("time.time", lambda: made.stat().st_ctime + 1)
    tries.clear()
    for path in (made, tmp_path / "nothing"):
        with pytest.raises(PermissionError):
            creating.patiently(str(path), use)
        tries.clear()


@pytest.mark.parametrize("call", ["allocate", "write", "replace"])
def test_readers_see_no_index_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """One that only reads opens the cache at each step of its creation: it is told what is true."""
    directory, looks, told = tmp_path / "cache", [], []

    class Looking(WrappedBackend):
        def before(self, name: str, path: str, size: int) -> None:
            if name == call and (directory / "writers").exists() and not looks:
                looks.append(path)
                with pytest.raises(ReadOnlyError) as raised:
                    DiskCache(directory, read_only=True)
                told.append(str(raised.value))

    wrap_backends(monkeypatch, Looking)
    with DiskCache(directory) as cache:
        cache["key"] = 1
    assert told and "is new" in told[0]


def test_segments_of_nobody_are_passed_over(make: Make, directory: Path) -> None:
    """Strays, of whatever origin, that have the numbers of the next segments: they stay as they are."""
    cache = make(**SMALL)
    next_one = cache._lease.store.current.index.words[f.W_NEXT_SEGMENT]
    strays = [directory / "segments" / f.segment_name(next_one + i) for i in range(5)]
    for stray in strays:
        stray.write_bytes(b"not a segment")
    use(cache)
    assert [stray.read_bytes() for stray in strays] == [b"not a segment"] * 5


# -- beside what a fresh volume has --------------------------------------------------------------

FILES = [*NEGLIGIBLE, *(f"{start}1" for start in NEGLIGIBLE_STARTS)]


def test_what_the_names_cover() -> None:
    """Those of the report that this began with, at least."""
    assert {".gitkeep", ".gitignore", ".DS_Store", ".keep", "Thumbs.db"} <= NEGLIGIBLE
    assert "lost+found" in NEGLIGIBLE_DIRECTORIES and ".nfs" in NEGLIGIBLE_STARTS


def test_what_a_fresh_volume_has(make: Make, directory: Path) -> None:
    """It is neither in the way nor counted, and it stays, whatever the cache does."""
    directory.mkdir()
    for name in FILES:
        (directory / name).write_bytes(noise(1000))
    for name in [*NEGLIGIBLE_DIRECTORIES, ".Trash-1000"]:
        (directory / name).mkdir(0o700)
        (directory / name / "kept").write_bytes(b"kept")
    with pytest.raises(ReadOnlyError, match="is empty"):
        make(read_only=True)
    before = tree(directory)
    cache = make(**SMALL)
    counted = cache.volume()
    use(cache)
    assert counted < 100_000
    for inside in ("segments", "large", "tmp", "writers"):
        (directory / inside / ".DS_Store").write_bytes(noise(1000))
    assert cache.check(fix=True) == []
    cache.clear()
    cache.close()
    for inside in ("segments", "large", "tmp", "writers"):
        assert (directory / inside / ".DS_Store").read_bytes() == noise(1000)
    with make() as cache:
        assert len(cache) == 0
    after = tree(directory)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["data.txt", "gitkeep", "lost", "lost+found"])
def test_anything_else_is_refused(make: Make, directory: Path, name: str) -> None:
    directory.mkdir()
    (directory / ".gitkeep").touch()
    (directory / name).write_bytes(b"a file")
    before = tree(directory)
    with pytest.raises(FormatError, match=f"contains '{name}'".replace("+", r"\+")):
        make()
    assert tree(directory) == before


def test_read_only_where_another_process_has_just_begun(make: Make, directory: Path) -> None:
    directory.mkdir()
    (directory / f.TAG_NAME).write_bytes(b"")
    with pytest.raises(ReadOnlyError, match="read_only"):
        make(read_only=True)


# -- modes --------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "modes"),
    [
        (0o022, (0o700, 0o600)), (0o277, (0o700, 0o600)), (0o022, (0o770, 0o660)), (0o077, (0o2770, 0o660)),
        (0, (0o755, 0o644)),
    ],
)  # fmt: skip
def test_modes_are_exact(
    make: Make, directory: Path, umask: Callable[[int], int], mask: int, modes: tuple[int, int]
) -> None:
    umask(mask)
    with make(directory_mode=modes[0], file_mode=modes[1], **SMALL) as cache:
        use(cache)
        store = cache._lease.store
        store.users.leave()  # all the lock files, whenever they are made
        store.users.enter()
        found = {path: stat.S_IMODE(path.lstat().st_mode) for path in [directory, *directory.rglob("*")]}
    files = {path.name for path in found if path.is_file()} | {"writers", "large", "segments"}
    assert files >= {
        f.TAG_NAME, f.INDEX_NAME, f.LOCK_NAME, f.USERS_NAME, f.CHECKPOINT_NAME, f.CHECKPOINT_LOCK_NAME,
        f.RECLAIM_LOCK_NAME, f.SETTINGS_NAME,
    }  # fmt: skip
    for name in (f.WRITERS_NAME, f.LARGE_NAME, f.SEGMENTS_NAME):
        assert any(path.parent.name == name for path in found), name
    locks = 0o600 if modes[1] == 0o644 else modes[1]  # who may only read could take a lock for ever
    of_files = {path: locks if path.suffix == ".lock" or path.name in LOCKS else modes[1] for path in found}
    expected = {path: modes[0] if path.is_dir() else of_files[path] for path in found}
    assert found == expected


def test_temporary_files_have_their_mode(
    make: Make, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    umask(0o077)
    seen = []
    real = os.replace

    def replace(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        mode = stat.S_IMODE(os.stat(source, dir_fd=src_dir_fd).st_mode)
        seen.append((os.path.basename(target), mode))
        real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "replace", replace)
    cache = make(file_mode=0o640, **SMALL)
    use(cache)
    with cache._lease.store.locks.index:
        cache._lease.store.current.shrink()
    assert {"checkpoint", "settings", "index"} < {name for name, _ in seen}
    assert {mode for _, mode in seen} == {0o640}


def test_settings_left_by_whoever_was_killed(make: Make, directory: Path) -> None:
    """A temporary file is there already, with a mode and a content of its own: it is not taken."""
    make(**SMALL).close()
    left = directory / "tmp" / f.temporary_name(0, 0, value=False)
    left.write_bytes(noise(5000))
    left.chmod(0o400)
    with make(size_limit=2 << 20) as cache:
        assert cache.check() == []
    assert stat.S_IMODE((directory / "settings").stat().st_mode) == 0o600
    assert (directory / "settings").stat().st_size == f.SETTINGS.size


@only_root
def test_what_a_setgid_parent_gives_is_kept(make: Make, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, NOBODY)
    shared.chmod(0o2775)
    with make(shared / "cache", file_mode=0o660, directory_mode=0o770, **SMALL) as cache:
        use(cache)
        for path in [shared / "cache", *(shared / "cache").rglob("*")]:
            status = path.lstat()
            assert status.st_gid == NOBODY, path
            expected = 0o2770 if path.is_dir() else 0o660
            assert stat.S_IMODE(status.st_mode) == expected, path


def test_default_modes_ask_for_no_change(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it was not needed")

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    use(make(**SMALL))


def test_a_file_system_without_modes(
    make: Make, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no modes here")

    umask(0o077)
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    use(make(directory_mode=0o755, file_mode=0o644, **SMALL))


def test_modes_that_are_refused(directory: Path) -> None:
    for options in ({"directory_mode": 0o4770}, {"directory_mode": 0o1770}, {"file_mode": 0o2660}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            make_settings(directory, **options)
    assert make_settings(directory, directory_mode="0o2770").directory_mode == 0o2770


# -- root, once -----------------------------------------------------------------------------------

READ_AND_WRITE = """
with DiskCache(sys.argv[1], backend=sys.argv[2], large_value_size=4000) as cache:
    for i in range(1, 20):
        assert len(cache[i]) == (100 if i % 2 else 5000)
    cache["mine"] = 1
    cache.delete(1)
    assert cache.check() == []
    cache.flush()
"""


@pytest.fixture
def users_cache(tmp_path: Path, make: Make) -> Path:
    """A directory of somebody else's, in which root works once, and dies without closing."""
    if os.getuid():
        pytest.skip("only root makes files for others")
    directory = tmp_path / "cache"
    directory.mkdir(0o700)
    open_up(directory, 0o700)
    os.chown(directory, NOBODY, NOBODY)
    if not (child := os.fork()):
        try:
            use(make(**SMALL))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return directory


def test_root_makes_files_for_the_owner(users_cache: Path, backend: str) -> None:
    owners = {path: path.lstat().st_uid for path in users_cache.rglob("*")}
    assert len(owners) > 15
    assert owners == dict.fromkeys(owners, NOBODY)
    assert {path.lstat().st_gid for path in owners} == {NOBODY}
    as_nobody(READ_AND_WRITE, users_cache, backend)


def test_a_mark_that_may_not_be_opened_is_alive(users_cache: Path, backend: str) -> None:
    """Of an earlier release, or of root where it may not give files away."""
    mark = users_cache / "writers" / f"{1:016x}.lock"
    mark.touch(0o600)
    as_nobody(
        """
with DiskCache(sys.argv[1], backend=sys.argv[2]) as cache:
    cache["mine"] = 1
    owner = cache._lease.store.owner
    assert owner.is_alive(1) and 1 in owner.alive_tokens()
    assert owner.noted(1).segment == 0
with DiskCache(sys.argv[1], backend=sys.argv[2]) as cache:
    assert cache["mine"] == 1
""",
        users_cache, backend,
    )  # fmt: skip
    assert mark.exists()


def test_errors_say_whose_the_file_is(users_cache: Path, backend: str) -> None:
    for path in [*(users_cache / "segments").iterdir()]:
        os.chown(path, 0, 0)
    as_nobody(
        """
with DiskCache(sys.argv[1], backend=sys.argv[2], read_only=True) as cache:
    try:
        cache.get(1)
    except CacheIOError as error:
        assert error.errno == errno.EACCES, error
        assert "belongs to root" in str(error) and "chown" in str(error), error
        assert f"uid {os.getuid()}" in str(error), error
    else:
        raise AssertionError("it was read")
""",
        users_cache, backend,
    )  # fmt: skip


def test_the_directory_of_root_stays_roots(make: Make, tmp_path: Path) -> None:
    """What root keeps for itself is not for the owner of the directory above."""
    if os.getuid():
        pytest.skip("only root makes files for others")
    os.chown(tmp_path, NOBODY, NOBODY)
    try:
        with make(tmp_path / "new" / "cache", **SMALL) as cache:
            use(cache)
            assert {path.lstat().st_uid for path in (tmp_path / "new").rglob("*")} == {0}
    finally:
        os.chown(tmp_path, 0, 0)


@only_root
def test_root_is_not_led_astray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody puts in the place of a directory that root has just made stays root's."""
    (tmp_path / "parent").mkdir()
    os.chown(tmp_path / "parent", NOBODY, NOBODY)
    secret = tmp_path / "secret"
    secret.mkdir(0o700)
    (secret / "file").touch()
    real = os.mkdir

    def place(name: str) -> Place:
        path = str(tmp_path / "parent" / name)
        return Place(path, path)

    def mkdir(path: str, mode: int, **where: int | None) -> None:
        real(path, mode, **where)
        os.rmdir(path)
        swap(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    swap: Callable[[str], None] = lambda path: os.symlink(secret, path)  # noqa: E731
    with pytest.raises(OSError):
        creating.make_directory(place("link"), 0o755)
    swap = lambda path: os.rename(secret, path)  # noqa: E731
    creating.make_directory(place("moved"), 0o700)
    assert (tmp_path / "parent" / "moved").lstat().st_uid == 0


# -- file systems ---------------------------------------------------------------------------------

BEHIND_FUSE = [
    f"fuse.{name}"
    for name in (
        "juicefs", "ceph-fuse", "seaweedfs", "weed", "mount-s3", "mountpoint-s3", "blobfuse2", "goofys", "davfs",
        "mfs", "lizardfs", "beegfs", "curlftpfs", "s3ql", "cvmfs2", "alluxio-fuse", "vmhgfs-fuse", "grpcfuse",
        "mergerfs", "sshfs", "new-and-unknown",
    )
]  # fmt: skip
OTHERS = [
    "davfs", "wekafs", "panfs", "orangefs", "pvfs2", "acfs", "vboxsf", "vmhgfs", "prl_fs", "fakeowner", "afpfs",
    "nfs4", "9p", "fuse",
]  # fmt: skip
LOCAL = ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "bcachefs", "ecryptfs", "fuseblk", "", *LOCAL_FUSE]


def test_file_systems_that_are_not_known_to_be_local(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in BEHIND_FUSE + OTHERS:
        monkeypatch.setattr(directory_module, "file_system", lambda path, kind=kind: kind)
        with pytest.raises(ConfigurationError) as raised:
            DiskCache(directory)
        assert f"({kind})" in str(raised.value) and "allow_network_fs=True" in str(raised.value)
    assert list(directory.iterdir()) == []
    assert {"fuse.fuse-overlayfs", "fuse.gocryptfs"} <= LOCAL_FUSE
    for kind in LOCAL:
        monkeypatch.setattr(directory_module, "file_system", lambda path, kind=kind: kind)
        directory_module._check_file_system(make_settings(directory))


MOUNTS = r"""
20 1 8:1 / / rw - ext4 /dev/sda1 rw
21 20 0:30 /@home /home rw shared:1 - btrfs /dev/sdb rw
22 20 0:31 / /srv/a\040b rw shared:2 master:1 - nfs4 host:/x rw
23 20 0:32 / /srv/a\040bc rw - xfs /dev/sdc rw
24 21 0:33 / /home/covered rw - ext4 /dev/sdd rw
25 21 0:34 / /home/covered rw - fuse.sshfs host:/ rw
""".strip().splitlines()


@pytest.mark.parametrize(
    ("device", "path", "kind"),
    [
        ("0:31", "/elsewhere", "nfs4"),
        ("0:99", "/home/user/cache", "btrfs"),  # a subvolume has a device of its own
        ("0:99", "/home", "btrfs"),
        ("0:99", "/homes/user", "ext4"),
        ("0:99", "/srv/a b/cache", "nfs4"),
        ("0:99", "/srv/a bc", "xfs"),
        ("0:99", "/home/covered/x", "fuse.sshfs"),
        ("0:99", "/", "ext4"),
    ],
)
def test_which_file_system_it_is(device: str, path: str, kind: str) -> None:
    assert directory_module._kind_in(MOUNTS, device, path) == kind


def test_no_mount_matches() -> None:
    assert directory_module._kind_in(MOUNTS[1:], "0:99", "/var") == ""


# -- another index in the place of the one that is read ---------------------------------------------


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yatagarasu_cache.store.counters._READER_LOOKS", 0.0)


def uses_until_it_looks(reader: DiskCache) -> None:
    for _ in range(220):
        reader.get("something")


@pytest.mark.usefixtures("looks_often")
def test_a_reader_follows_a_copied_index(make: Make, directory: Path) -> None:
    """Overlayfs copies a file of the image when it is first written to: the reader's mapping stays behind."""
    with make(**SMALL) as cache:
        use(cache)
    reader = make(read_only=True)
    assert reader[1] == noise(100, 1)
    shutil.copy2(directory / "index", directory / "copy")
    os.replace(directory / "copy", directory / "index")
    with make() as writer:
        writer["new"] = "value"
        writer[1] = "other"
        uses_until_it_looks(reader)
        assert reader["new"] == "value" and reader[1] == "other"
        assert set(reader) == set(writer)


@pytest.mark.usefixtures("looks_often")
def test_a_reader_follows_a_new_cache(make: Make, directory: Path) -> None:
    with make(**SMALL) as cache:
        use(cache)
    reader = make(read_only=True)
    assert reader[1] == noise(100, 1)
    shutil.rmtree(directory)
    uses_until_it_looks(reader)
    assert len(reader) == 19  # there is nothing to follow
    with make() as writer:
        writer["new"] = "value"
        assert set(reader) == {"new"}  # a walk looks at once
        assert reader["new"] == "value" and reader.stats().entries == 1


@pytest.mark.usefixtures("looks_often")
def test_a_reader_keeps_what_it_has_beside_what_is_no_index(
    make: Make, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(**SMALL) as cache:
        use(cache)
    reader = make(read_only=True)
    (directory / "index").rename(directory / "aside")
    (directory / "index").write_bytes(bytes(8192))
    for _ in range(2):
        uses_until_it_looks(reader)
    assert reader[1] == noise(100, 1)
    assert sum("there is another index" in line for line in caplog.messages) == 1


@pytest.mark.usefixtures("looks_often")
def test_a_reader_that_is_up_to_date_maps_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(**SMALL)
    use(writer)
    reader = make(read_only=True)
    index = reader._lease.store.current.index
    for i in range(20):
        writer[i] = i
        uses_until_it_looks(reader)
        assert reader[i] == i
    assert reader._lease.store.current.index is index


def test_a_reader_looks_now_and_then(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits cost no system call but the one that reads: it looks every 200 gets at most, and not more often
    than every quarter of a second."""
    with make(**SMALL) as cache:
        use(cache)
    reader = make(read_only=True)
    store, now = reader._lease.store, time.monotonic()
    looks = []
    monkeypatch.setattr(store.current, "follow_path", lambda: looks.append(now))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in (1, 2, 3):
        for _ in range(1000):
            reader.get(1)
        assert len(looks) == number
        now += 0.3
    assert reader.stats().process["hits"] == 3000


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(lower layer, where both are seen as one)"""
    paths = lower, upper, work, merged = [tmp_path / name for name in ("lower", "upper", "work", "merged")]
    for path in paths:
        path.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    try:
        done = subprocess.run(
            ["mount", "-t", "overlay", "-o", options, "none", str(merged)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"cannot mount an overlay: {done.stderr.decode().strip()}")
    yield lower, merged
    subprocess.run(["umount", "-l", str(merged)], check=True)


@pytest.mark.usefixtures("looks_often")
def test_a_reader_of_an_image_sees_what_is_stored(make: Make, overlay: tuple[Path, Path]) -> None:
    lower, merged = overlay
    with make(lower / "cache", **SMALL) as cache:
        use(cache)
    reader = make(merged / "cache", read_only=True)
    assert reader[1] == noise(100, 1)
    with make(merged / "cache") as writer:
        writer["new"] = "value"
        writer[1] = "other"
        uses_until_it_looks(reader)
        assert reader["new"] == "value" and reader[1] == "other"


# -- links ----------------------------------------------------------------------------------------


def test_a_link_of_the_users_own(make: Make, tmp_path: Path) -> None:
    """Through links, one after another, and by the path itself: it is one cache."""
    real, other = tmp_path / "real", tmp_path / "other"
    (tmp_path / "near").symlink_to("real")
    (tmp_path / "link").symlink_to(tmp_path / "near")
    cache = make(tmp_path / "link", **SMALL)  # the link leads nowhere yet
    use(cache)
    assert real.is_dir() and (tmp_path / "link").is_symlink()
    assert cache.directory == cache.settings.directory == str(tmp_path / "link")
    assert str(tmp_path / "link") in repr(cache)
    with make(real) as same, make(tmp_path / "link", read_only=True) as reader:
        assert same[1] == reader[1] == noise(100, 1)
    with pickle.loads(pickle.dumps(cache)) as copy:
        assert copy.directory == str(tmp_path / "link")
        assert copy[1] == noise(100, 1)
    (tmp_path / "near").unlink()
    (tmp_path / "near").symlink_to(other)
    use(cache, 100)  # it stays with the directory that it was opened on
    assert not other.exists()
    with make(tmp_path / "link") as elsewhere:
        assert len(elsewhere) == 0
    assert other.is_dir()


def test_a_link_above_the_directory(make: Make, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    cache = make(tmp_path / "current" / "cache", **SMALL)
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    use(cache)
    assert (tmp_path / "v1" / "cache" / "segments").is_dir() and not (tmp_path / "v2").exists()


def test_links_in_a_circle(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FormatError, match="circle"):
        make(tmp_path / "a")


@only_root
def test_a_link_of_somebody_else(make: Make, tmp_path: Path) -> None:
    """As in /tmp: who puts a link in the place of a cache leads nobody to where he likes."""
    real, link = tmp_path / "real", tmp_path / "link"
    make(real)
    link.symlink_to(real)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    for options in ({}, {"read_only": True}):
        with pytest.raises(FormatError, match="symbolic link that belongs to another user"):
            make(link, **options)
    os.chown(tmp_path, NOBODY, NOBODY)  # in his own directory he may put what he likes
    try:
        make(link)
    finally:
        os.chown(tmp_path, 0, 0)


def test_handles_by_a_link_share_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yatagarasu_cache.store import sharing

    monkeypatch.setattr(sharing, "identify", lambda status: (status.st_dev, status.st_ino))
    (tmp_path / "link").symlink_to("real")
    with DiskCache(tmp_path / "link", size_limit=1 << 20) as one:
        with DiskCache(tmp_path / "real") as two, DiskCache(tmp_path / "link") as three:
            assert one._lease.store is two._lease.store is three._lease.store
            assert two.settings.size_limit == 1 << 20  # what was named by the link is named


# -- what the system refuses ------------------------------------------------------------------------


def test_who_reads_only_is_not_told_to_read_only(make: Make, directory: Path, backend: str) -> None:
    if os.getuid():
        pytest.skip("only root makes files that others cannot read")
    make().close()
    open_up(directory, 0o700)
    said = as_nobody(
        """
for options in ({"read_only": True}, {}):
    try:
        DiskCache(sys.argv[1], backend=sys.argv[2], **options)
    except CacheIOError as error:
        assert error.errno == errno.EACCES, error
        print(error)
""",
        directory, backend,
    )  # fmt: skip
    reading, writing = said.splitlines()
    assert "let this user read" in reading and "read_only" not in reading and "belongs to root" in reading
    assert "or open it with read_only=True" in writing


TOO_MANY_FILES = "this process has too many files open: .*raise `ulimit -n`, or lower max_open_files"


@pytest.mark.parametrize("options", [{}, {"read_only": True}])
def test_too_many_open_files_has_a_remedy(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    make().close()

    class Exhausted(FailingBackend):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner)
            self.fail(errno.EMFILE, ["open"], where=str(directory))

    wrap_backends(monkeypatch, Exhausted)
    with pytest.raises(CacheIOError, match=TOO_MANY_FILES) as raised:
        DiskCache(directory, **options)
    assert raised.value.errno == errno.EMFILE


def test_too_many_open_files_while_in_use(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as cache:
        cache["k"] = 1
    made = wrap_backends(monkeypatch, FailingBackend)
    with make() as cache:
        (backend,) = made
        assert isinstance(backend, FailingBackend)
        backend.fail(errno.EMFILE, ["open"], where="segments")
        with pytest.raises(CacheIOError, match=f"the entry was kept; {TOO_MANY_FILES}"):
            cache.get("k")
        backend.mend()
        assert cache.get("k") == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "scandir", "sync", "sync_directory"])
def test_errors_speak_of_rights_only_if_these_lack(
    directory: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """Root, and whoever owns the directory, is not told to look for one that he may write."""
    directory.mkdir()
    class Refusing(FailingBackend):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner)
            self.fail(code, [call], where=str(directory))

    wrap_backends(monkeypatch, Refusing)
    with pytest.raises(CacheIOError) as raised:
        DiskCache(directory)
    assert raised.value.errno == code
    assert "this user can write" not in str(raised.value)
    assert "sandbox" in str(raised.value)
