"""Where the system says no: full, forbidden, failing, foreign. The cache says why and stays as it was."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from available import CORES, on_one_core
from helpers import (
    FailingBackend,
    Make,
    as_nobody,
    disk_bytes,
    noise,
    open_up,
    run_python,
    tree,
    wrap_backends,
)

from yatagarasu_cache import (
    BackendUnavailable,
    CacheIOError,
    ConfigurationError,
    DiskCache,
    FormatError,
    ReadOnlyError,
    StorageFull,
)
from yatagarasu_cache.store import directory as directory_module
from yatagarasu_cache.store import format as f

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("apart", "core")]  # each handle stands for a process

LARGE = 300_000  # with LARGE_FROM a file of its own
LARGE_FROM = 100_000


# -- full ---------------------------------------------------------------------------------------


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB. Where mounting is not allowed, the injected variants below stand alone."""
    path = tmp_path / "volume"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(cache: DiskCache, size: int) -> dict[str, bytes]:
    """Entries until the volume is full; those that were acknowledged."""
    stored: dict[str, bytes] = {}
    for i in range(40_000):
        value = noise(size, i)
        try:
            cache.set(f"key{i}", value)
        except StorageFull as error:
            assert error.errno == errno.ENOSPC
            assert "free space" in str(error) or "lower size_limit" in str(error)
            return stored
        stored[f"key{i}"] = value
    pytest.fail("it never got full")


@pytest.mark.parametrize("size", [100, 4096, 90_000, LARGE])
def test_a_volume_that_gets_full(small_volume: Path, make: Make, size: int) -> None:
    cache = make(small_volume / "cache", size_limit=1 << 30, large_value_size=LARGE_FROM, eviction="none")
    cache.set("first", b"old")
    (small_volume / "filler").write_bytes(bytes(256 << 10))
    stored = fill(cache, size)
    assert stored
    stored["first"] = b"old"
    for key, value in stored.items():
        assert cache.get(key) == value
    with pytest.raises(StorageFull):
        for i in range(1000):
            cache.set("first", noise(max(size, 50_000), i))
            stored["first"] = noise(max(size, 50_000), i)
    assert cache.get("first") == stored["first"]  # the old value of the set that failed
    assert cache.check() == []
    assert len(cache) == len(stored)
    with open(small_volume / "the rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 12))
    # Removals are logged, and find room that was kept for them; they give back more.
    freed = [key for key in list(stored) if key != "first"][:500]
    for key in freed[:10]:
        assert cache.delete(key)
    assert cache.delete_many(freed[10:]) == len(freed[10:])
    for key in freed:
        del stored[key]
    (small_volume / "filler").unlink()
    cache.set("again", noise(size))
    assert cache.get("again") == noise(size)
    assert cache.check() == []
    cache.close()
    again = make(small_volume / "cache", size_limit=1 << 30, large_value_size=LARGE_FROM)
    assert again.get("again") == noise(size) and again.get("first") == stored["first"]
    assert again.check() == []


def test_a_volume_too_small_to_begin(small_volume: Path, make: Make) -> None:
    with open(small_volume / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 16))
    with pytest.raises(CacheIOError) as raised:
        make(small_volume / "cache")
    assert raised.value.errno == errno.ENOSPC
    os.unlink(small_volume / "filler")
    cache = make(small_volume / "cache", size_limit=1 << 20)
    cache.set("k", 1)
    assert cache.get("k") == 1 and cache.check() == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, make: Make) -> Callable[..., tuple[DiskCache, FailingBackend]]:
    def build(**options: object) -> tuple[DiskCache, FailingBackend]:
        made = wrap_backends(monkeypatch, FailingBackend)
        cache = make(large_value_size=LARGE_FROM, **options)
        backend = made[-1]
        assert isinstance(backend, FailingBackend)
        return cache, backend

    return build


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("size", [10, 50_000, LARGE])
@pytest.mark.parametrize("spare", [0, 1])
def test_a_write_that_fails_keeps_the_old_value(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], make: Make, error: int, size: int, spare: int
) -> None:
    cache, backend = failing()
    cache.set("key", b"old", tag="t")
    cache.set("large", noise(LARGE, 5))
    new = noise(size, 9)
    backend.fail(error, {"write", "allocate", "sync", "replace"}, spare=spare)
    kind = CacheIOError if error == errno.EIO else StorageFull
    changes: list[Callable[[], object]] = [
        lambda: cache.set("key", new),
        lambda: cache.set("large", new),
        lambda: cache.add("new", new),
        lambda: cache.set_many({"key": new, "new": new}),
        lambda: cache.delete("key"),
        lambda: cache.touch("key", 100),
    ]
    failed = 0
    expected: dict[str, bytes | None] = {"key": b"old", "large": noise(LARGE, 5), "new": None}
    for i, act in enumerate(changes):
        backend.fail(error, {"write", "allocate", "sync", "replace"}, spare=spare)
        try:
            act()
        except kind as raised:
            assert raised.errno == error
            failed += 1
        else:  # it wrote no more than was spared
            if i in (0, 3):
                expected["key"] = new
            if i == 1:
                expected["large"] = new
            if i in (2, 3):
                expected["new"] = new
            if i == 4:
                expected["key"] = None
        backend.mend()
        for key, value in expected.items():
            assert cache.get(key) == value, (i, key)
    assert failed >= (6 if spare == 0 else 0)
    assert cache.check() == []
    cache.set("after", new)
    cache.close()
    again = make()
    assert again.get("after") == new
    for key, value in expected.items():
        assert again.get(key) == value
    assert again.check() == []


@pytest.mark.parametrize("size", [10, 50_000, LARGE])
def test_a_sync_that_fails_keeps_the_old_value_also_after_a_rebuild(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], make: Make, directory: Path, size: int
) -> None:
    cache, backend = failing(durability="sync")
    cache.set("key", b"old")
    backend.fail(errno.EIO, {"sync", "sync_directory"})
    for _ in range(3):
        with pytest.raises(CacheIOError) as raised:
            cache.set("key", noise(size))
        assert raised.value.errno == errno.EIO
    backend.mend()
    for i in range(200):  # enough that the segment gets a footer
        cache.set(i, noise(2000, i))
    assert cache.get("key") == b"old"
    cache.close()
    os.unlink(directory / f.INDEX_NAME)
    again = make()
    assert again.get("key") == b"old"
    assert all(again.get(i) == noise(2000, i) for i in range(200))
    assert again.check() == []


@pytest.mark.parametrize("size", [10, 50_000, LARGE])
@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_read_that_fails_is_told_and_removes_nothing(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], make: Make, size: int, error: int
) -> None:
    cache, backend = failing()
    cache.set("key", noise(size), tag="t", meta={"a": 1})
    cache.close()
    cache, backend = failing()
    for act in (
        lambda: cache.get("key"),
        lambda: cache["key"],
        lambda: cache.get_many(["key", "other"]),
        lambda: cache.pop("key"),
        lambda: cache.open("key").read(),
        lambda: cache.location("key"),
    ):
        # Only values: to read names is another matter. Opening fails in the same way.
        for calls in ({"read"}, {"read", "open"}):
            backend.fail(error, calls)
            with pytest.raises(CacheIOError) as raised:
                act()
            assert raised.value.errno == error
            backend.mend()
    assert backend.failures >= 12
    assert "key" in cache and cache.stats().corrupt == 0
    assert cache.get("key") == noise(size)
    assert cache.get_entry("key").meta == {"a": 1}  # type: ignore[union-attr]
    assert cache.check() == []


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_segment_that_cannot_be_opened_is_not_taken_for_an_empty_one(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], error: int
) -> None:
    """Cleaning reads it to see what lives in it: without that, it stays. Walks say that they failed."""
    cache, backend = failing(size_limit=1 << 20, segment_size=8192, eviction="none")
    values = {f"key{i}": noise(700, i) for i in range(100)}
    cache.set_many(values)
    for key in list(values)[::2]:
        cache.delete(key)
        del values[key]
    for _ in range(3):
        backend.fail(error, {"open"}, where=f.SEGMENTS_NAME)
        with pytest.raises(CacheIOError) as raised:
            cache._store.cleaner.clean_emptiest()
        assert raised.value.errno == error
        with pytest.raises(CacheIOError):
            list(cache)
        backend.mend()
        assert {key: cache.get(key) for key in values} == values
        cache._store.cleaner.clean_emptiest()
    assert set(cache) == set(values)
    assert cache.check() == []


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_a_check_that_cannot_read_drops_nothing(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], error: int, size: int
) -> None:
    cache, backend = failing()
    values = {f"key{i}": noise(size, i) for i in range(5)}
    cache.set_many(values)
    cache.close()
    cache, backend = failing()
    for calls, where in (({"open"}, f.SEGMENTS_NAME), ({"open"}, f.LARGE_NAME), ({"read"}, "")):
        if size == LARGE or where != f.LARGE_NAME:
            backend.fail(error, calls, where=where)
            with pytest.raises(CacheIOError) as raised:
                cache.check(fix=True)
            assert raised.value.errno == error
            backend.mend()
    assert {key: cache.get(key) for key in values} == values
    assert cache.check() == [] and cache.stats().corrupt == 0


@pytest.mark.in_turn
def test_segments_that_cannot_be_removed(
    failing: Callable[..., tuple[DiskCache, FailingBackend]], make: Make, directory: Path
) -> None:
    """The cache grows no further than its limit: a set that finds no room says why, and all is read as it was."""
    limit = 1 << 20
    cache, backend = failing(size_limit=limit)
    segment = cache._store.limits.segment_bytes
    newest: dict[str, bytes] = {}
    backend.fail(errno.EIO, {"unlink"})
    refused = 0
    for i in range(1500):  # three times what fits
        key, value = f"key{i % 400}", noise(2000, i)
        try:
            cache.set(key, value)
            newest[key] = value
        except CacheIOError as error:
            refused += 1
            assert error.errno in (errno.EIO, errno.ENOSPC)
            assert "cannot remove" in str(error) or isinstance(error, StorageFull), error
        assert cache.get(key) in (newest.get(key), None)
        assert cache.volume() <= limit + segment
        assert i % 50 or disk_bytes(directory) <= limit + segment
    assert refused and backend.failures
    assert all(cache.get(key) in (value, None) for key, value in newest.items())
    backend.mend()
    for i in range(1500, 1600):
        cache.set(f"key{i % 400}", noise(2000, i))
        newest[f"key{i % 400}"] = noise(2000, i)
        assert cache.get(f"key{i % 400}") == noise(2000, i)
    cache.check(fix=True)  # what could not be removed
    assert cache.check() == []
    cache.close()
    again = make(size_limit=limit)
    assert all(again.get(key) in (value, None) for key, value in newest.items())
    assert again.get("key399") == newest["key399"] or again.stats().evictions
    assert again.check() == [] and again.volume() <= limit and disk_bytes(directory) <= limit


# -- read-only ----------------------------------------------------------------------------------


def test_a_volume_that_is_read_only(small_volume: Path, make: Make) -> None:
    cache = make(small_volume / "cache", size_limit=1 << 20, large_value_size=LARGE_FROM)
    values = {f"key{i}": noise(size, i) for i, size in enumerate((10, 4000, LARGE))}
    cache.set_many(values, meta="m")
    cache.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_volume)], check=True)
    before = tree(small_volume)
    for where in ("cache", "new"):
        with pytest.raises(CacheIOError, match="read_only=True") as raised:
            make(small_volume / where)
        assert raised.value.errno == errno.EROFS
    cache = make(small_volume / "cache", read_only=True)
    assert cache.get_many(values) == values == {key: cache.get(key) for key in cache}
    assert cache.get_entry("key2").meta == "m"  # type: ignore[union-attr]
    assert cache.check() == []
    for change in (lambda: cache.set("key0", b""), lambda: cache.delete("key0"), cache.clear, cache.flush):
        with pytest.raises(ReadOnlyError):
            change()
    cache.close()
    assert tree(small_volume) == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_volume)], check=True)
    cache = make(small_volume / "cache", size_limit=1 << 20)
    cache.set("key0", b"new")
    assert cache.get("key0") == b"new" and cache.check() == []


def test_a_volume_that_becomes_read_only(
    failing: Callable[..., tuple[DiskCache, FailingBackend]],
) -> None:
    """As file systems do that have found damage: what is there is read, and changes say what to do."""
    cache, backend = failing(durability="sync")
    values = {"a": b"1", "b": noise(50_000), "large": noise(LARGE)}
    cache.set_many(values)
    # Not "open", which reads are served by: files that are made new fail at their first write.
    backend.fail(errno.EROFS, {"write", "allocate", "truncate", "sync", "replace", "unlink", "mkdir"})
    for change in (
        lambda: cache.set("a", b"2"), lambda: cache.set("new", noise(50_000)), lambda: cache.set("large", noise(LARGE, 2)),
        lambda: cache.delete("a"), lambda: cache.touch("b", 5), lambda: cache.set_many({"a": b"3", "c": b"4"}),
        lambda: cache.incr("n"), lambda: cache.pop("b"), cache.clear,
    ):  # fmt: skip
        with pytest.raises(CacheIOError, match="read-only: make it writable") as raised:
            change()
        assert raised.value.errno == errno.EROFS
        assert {key: cache.get(key) for key in values} == values
    backend.mend()
    assert set(cache) == set(values)
    cache.set("a", b"2")
    cache.check(fix=True)
    assert cache.check() == [] and cache.get_many(values) == {**values, "a": b"2"}


# -- forbidden ----------------------------------------------------------------------------------


def test_a_directory_that_may_not_be_written(tmp_path: Path, backend: str, make: Make) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    cache = make(plain / "cache", file_mode=0o644, directory_mode=0o755)
    cache.set("key", "value")
    cache.close()
    open_up(plain / "cache", 0o555)
    open_up(plain, 0o555)  # last: to let others reach what is below, its owner was let write
    before = tree(plain)
    as_nobody(
        """
path, backend = sys.argv[1:]
for options in ({}, {"size_limit": 1 << 20}):
    for where in (path + "/cache", path + "/new"):
        try:
            DiskCache(where, backend=backend, **options)
        except CacheIOError as error:
            assert error.errno == errno.EACCES, error
            assert "read_only" in str(error), error
        else:
            raise AssertionError("it opened " + where)
with DiskCache(path + "/cache", backend=backend, read_only=True) as cache:
    assert cache.get("key") == "value"
    assert list(cache) == ["key"]
    for change in (lambda: cache.set("a", 1), lambda: cache.delete("key"), cache.clear):
        try:
            change()
        except ReadOnlyError:
            pass
        else:
            raise AssertionError("it changed")
""",
        plain, backend,
    )  # fmt: skip
    assert tree(plain) == before


def test_another_users_cache_is_closed_to_others(tmp_path: Path, backend: str, make: Make) -> None:
    if os.getuid():
        pytest.skip("only root can become somebody else")
    cache = make(tmp_path / "cache")
    cache.set("key", "value")
    open_up(tmp_path, 0o711)
    before = tree(tmp_path)
    as_nobody(
        """
for read_only in (False, True):
    try:
        DiskCache(sys.argv[1], backend=sys.argv[2], read_only=read_only)
    except CacheIOError as error:
        assert error.errno == errno.EACCES, error
    else:
        raise AssertionError("it opened")
""",
        tmp_path / "cache", backend,
    )  # fmt: skip
    assert tree(tmp_path) == before


def test_modes_do_not_depend_on_the_umask(tmp_path: Path, backend: str) -> None:
    for umask in (0, 0o77):
        root = tmp_path / f"{umask:o}" / "cache"
        run_python(
            """
import os, sys
from yatagarasu_cache import DiskCache
os.umask(int(sys.argv[3]))
with DiskCache(sys.argv[1], backend=sys.argv[2], large_value_size=1000) as cache:
    for i in range(50):
        cache.set(i, bytes(100 * i))
    cache.flush()
""",
            root, backend, umask,
        )  # fmt: skip
        for path in [root, *root.rglob("*")]:
            expected = 0o700 if path.is_dir() else 0o600
            assert path.stat().st_mode & 0o777 == expected, path


def test_descriptors_run_out(tmp_path: Path, backend: str) -> None:
    run_python(
        """
import os, resource, sys
from yatagarasu_cache import CacheError, CacheIOError, DiskCache
path, backend = sys.argv[1:]
options = dict(backend=backend, segment_size=64 << 10, large_value_size=10_000)
with DiskCache(path, **options) as cache:
    for i in range(300):
        cache.set(i, bytes([i % 256]) * 4000)
    cache.set("large", b"l" * 15_000)
cache = DiskCache(path, **options)
assert cache.get(0) == bytes(4000)
cache.set("open", b"a segment of our own")
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
for _ in range(2):
    for i in range(300):  # more segments than descriptors: old ones are given up
        assert cache.get(i) == bytes([i % 256]) * 4000, i
taken = []
def take_all():
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
refused = 0
for act in (
    lambda: cache.get("large"), lambda: cache.get_many(range(300)), lambda: cache.open("large").read(),
    lambda: [cache.set("x%d" % i, bytes(9000)) for i in range(40)], lambda: cache.set("large", bytes(20_000)),
    lambda: cache.check(), lambda: list(cache), cache.flush, lambda: DiskCache(path + "2", **options),
    lambda: DiskCache(path, **options),
):
    take_all()  # each time: what is done in the background gives some back
    try:
        act()
    except CacheError as error:
        refused += 1
for fd in taken:
    os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
assert refused >= 3, refused
assert cache.stats().corrupt == 0
for i in range(300):
    assert cache.get(i) == bytes([i % 256]) * 4000, i
assert cache.get("large") in (b"l" * 15_000, bytes(20_000))
assert cache.check() == [], cache.check()
cache.close()
with DiskCache(path, **options) as cache:
    assert cache.get(299) == bytes([299 % 256]) * 4000 and cache.check() == []
""",
        tmp_path / "cache", backend,
    )  # fmt: skip


# -- foreign ------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    "content", ["photo.jpg", "index", "lock", "CACHEDIR.TAG", "segments/notes.seg", ".hidden"]
)
def test_a_foreign_directory_is_refused_and_untouched(
    make: Make, directory: Path, content: str, read_only: bool
) -> None:
    (directory / content).parent.mkdir(parents=True)
    (directory / content).write_bytes(b"somebody's own")
    before = tree(directory), directory.stat().st_mtime_ns
    with pytest.raises(FormatError, match="not a cache"):
        make(read_only=read_only)
    assert (tree(directory), directory.stat().st_mtime_ns) == before


def test_an_empty_directory_is_not_begun_read_only(make: Make, directory: Path) -> None:
    directory.mkdir()
    with pytest.raises(ReadOnlyError):
        make(read_only=True)
    assert not list(directory.iterdir())
    with pytest.raises((ReadOnlyError, CacheIOError)):
        make(directory / "none", read_only=True)
    assert not list(directory.iterdir())


def test_a_file_is_no_directory(make: Make, directory: Path) -> None:
    directory.write_bytes(b"a file")
    with pytest.raises((FormatError, CacheIOError)):
        make()
    assert directory.read_bytes() == b"a file"


@pytest.mark.parametrize("name", ["index", "lock", "users", "segments", "large", "tmp", "writers"])
def test_links_inside_are_not_followed(make: Make, directory: Path, tmp_path: Path, name: str) -> None:
    cache = make()
    cache.set("key", 1)
    cache.close()
    target = tmp_path / "target"
    (directory / name).rename(target)
    (directory / name).symlink_to(target)
    before = target.is_file() and target.read_bytes(), tree(target)
    with pytest.raises((FormatError, CacheIOError)):
        make()
    assert (target.is_file() and target.read_bytes(), tree(target)) == before
    assert (directory / name).is_symlink()


@pytest.mark.parametrize("size", [100, LARGE])
def test_links_in_place_of_values_are_not_followed(
    make: Make, directory: Path, tmp_path: Path, size: int
) -> None:
    cache = make(large_value_size=LARGE_FROM)
    cache.set("key", noise(size))
    cache.close()
    where = directory / ("large" if size == LARGE else "segments")
    moved = [path for path in where.rglob("*") if path.is_file()]
    for path in moved:
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    before = {path.name: (tmp_path / path.name).read_bytes() for path in moved}
    cache = make(large_value_size=LARGE_FROM)
    assert cache.get("key") is None
    assert cache.get_many(["key"]) == {}
    cache.set("key", b"anew")
    assert cache.get("key") == b"anew"
    cache.check(fix=True)
    assert cache.get("key") == b"anew"
    cache.close()
    assert {path.name: (tmp_path / path.name).read_bytes() for path in moved} == before


def other_version(data: bytes, identity: int, version: int) -> bytes:
    """The header with its version replaced and its checksum made right."""
    from xxhash import xxh3_64_intdigest

    body = bytearray(data[:identity])
    body[8:12] = version.to_bytes(4, "little")
    return bytes(body) + xxh3_64_intdigest(bytes(body)).to_bytes(8, "little") + data[identity + 8 :]


VERSIONS = pytest.mark.parametrize("version", [f.FORMAT_VERSION - 1, f.FORMAT_VERSION + 1])


@VERSIONS
@pytest.mark.parametrize("read_only", [False, True])
def test_another_version_of_the_index_is_refused(
    make: Make, directory: Path, read_only: bool, version: int
) -> None:
    cache = make()
    cache.set("key", 1)
    cache.close()
    path = directory / f.INDEX_NAME
    path.write_bytes(other_version(path.read_bytes(), f.IDENTITY.size, version))
    before = tree(directory)
    with pytest.raises(FormatError, match=f"version {version}.*version {f.FORMAT_VERSION}"):
        make(read_only=read_only)
    assert tree(directory) == before


@VERSIONS
def test_another_version_of_the_segments_is_refused(make: Make, directory: Path, version: int) -> None:
    cache = make()
    cache.set("key", 1)
    cache.close()
    for path in (directory / f.SEGMENTS_NAME).iterdir():
        path.write_bytes(other_version(path.read_bytes(), f.SEGMENT_HEADER_BYTES - 8, version))
    (directory / f.INDEX_NAME).unlink()
    before = tree(directory)
    with pytest.raises(FormatError, match=f"version {version}.*version {f.FORMAT_VERSION}"):
        make()
    assert tree(directory) == before


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p", "ceph", "fuse.juicefs", "fuse", "vboxsf"])
def test_network_file_systems_are_refused(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(directory_module, "file_system", lambda path: kind)
    with pytest.raises(ConfigurationError, match=kind.replace(".", r"\.")) as raised:
        make()
    assert "allow_network_fs" in str(raised.value)
    assert not directory.exists() or not list(directory.iterdir())
    cache = make(allow_network_fs=True)
    cache.set("key", 1)
    assert cache.get("key") == 1
    monkeypatch.setattr(directory_module, "file_system", lambda path: "ext4")
    assert make().get("key") == 1


def test_the_file_system_is_recognised(tmp_path: Path) -> None:
    if " / / " not in Path("/proc/self/mountinfo").read_text():
        pytest.skip("the root directory is none of a file system here")
    found = directory_module.file_system(str(tmp_path))
    assert found and found not in directory_module.NETWORK_FILE_SYSTEMS
    assert directory_module.file_system("/proc") == "proc"


def test_a_system_without_locks_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(directory_module, "fcntl", None)
    with pytest.raises(BackendUnavailable, match="flock"):
        make()
    assert not directory.exists()


# -- large ------------------------------------------------------------------------------------

GIB = float(os.environ.get("YATAGARASU_TEST_GIB", "0"))  # 10 is what it is meant for


@pytest.mark.slow
@on_one_core
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not GIB, reason="set YATAGARASU_TEST_GIB=10 to write so much (a fifth of it is kept)")
def test_much_more_than_fits(make: Make, directory: Path) -> None:
    """Values of 64 KiB, five times as many as fit: the limit holds all the time, and the newest are there."""
    size = 64 << 10
    count, limit = int(GIB * (1 << 30)) // size, int(GIB * (1 << 30)) // 5
    block = noise(1 << 20)

    def value(i: int) -> bytes:
        at = i * 4099 % (len(block) - size)
        return i.to_bytes(8, "little") + block[at : at + size - 8]

    cache = make(size_limit=limit)
    segment = cache._store.limits.segment_bytes
    for i in range(count):
        cache.set(i, value(i))
        if i % 500 == 0:
            assert cache.volume() <= limit + segment
            assert disk_bytes(directory) <= limit + segment
            assert cache.get(i) == value(i)
    assert cache.stats().evictions >= count - limit // size
    kept = len(cache)
    assert kept * size > 0.7 * limit
    assert all(cache.get(i) == value(i) for i in range(count - kept // 2, count))
    cache.close()
    assert disk_bytes(directory) <= limit
    again = make(size_limit=limit)
    assert len(again) == kept and again.volume() <= limit
    keys = set(again)
    assert keys >= set(range(count - kept // 2, count))
    assert all(again.get(key) == value(key) for key in keys)
    assert again.check() == []
    again.set("after", value(count))
    assert again.get("after") == value(count) and disk_bytes(directory) <= limit + segment


# -- nothing leaks ------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("core", "operations"),
    [*((name, 15_000) for name in CORES), pytest.param(CORES[0], 100_000, marks=pytest.mark.slow)],
    indirect=["core"],
)
def test_operations_leave_nothing(tmp_path: Path, backend: str, operations: int) -> None:
    print(
        run_python(
            """
import gc, os, random, sys
from yatagarasu_cache import DiskCache
path, backend, operations = *sys.argv[1:3], int(sys.argv[3])

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def open_files():
    return len(os.listdir("/proc/self/fd"))

chosen = random.Random(1)
cache = DiskCache(path, backend=backend, size_limit=8 << 20, large_value_size=50_000)

def work(count):
    for i in range(count):
        key, what = chosen.randrange(3000), chosen.random()
        if what < 0.5:
            cache.get(key)
        elif what < 0.8:
            cache.set(key, bytes(chosen.randrange(3000)), tag=str(key % 7), expire=chosen.choice((None, 100)))
        elif what < 0.85:
            cache.delete(key)
        elif what < 0.9:
            cache.touch(key, 100)
        elif what < 0.94:
            cache.get_many(range(key, key + 8))
        elif what < 0.96:
            cache.incr("n")
        elif what < 0.97:
            cache.get_entry(key)
        elif what < 0.98:
            cache.set_many({key + j: b"x" * j for j in range(8)})
        elif what < 0.985:
            cache.set("large%d" % (key % 20), bytes(60_000))
        elif what < 0.99:
            name = "large%d" % (key % 20)
            with cache.open(name) if name in cache else open(os.devnull, "rb") as f:
                f.read(10)
        elif what < 0.995:
            cache.add(key, b"new")
        else:
            cache.pop(key)
    cache.flush()

work(10_000)
files, memory = open_files(), resident()
work(operations)
grown = resident() - memory
print(open_files() - files, "descriptors,", grown >> 10, "KiB more")
assert open_files() <= files + 80, (files, open_files())  # of segments, which come and go
assert grown < 12 << 20, grown
assert cache.check() == []
before = open_files()
cache.close()
for _ in range(100):
    with DiskCache(path, backend=backend) as again:
        again.get(1)
        again.set(1, b"2")
assert open_files() < before
print("with nothing open:", open_files())
assert open_files() <= 12
""",
            tmp_path / "cache",
            backend,
            operations,
        )  # fmt: skip
    )
