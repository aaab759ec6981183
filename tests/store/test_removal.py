"""Files that are removed, moved away or replaced while a cache has them open, and what is left of one.

Losing files means misses: never a wrong value, never two caches in one directory, and never an error for good.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import backend_for
from helpers import descriptors, noise, tree

from yatagarasu_cache import CacheIOError, DiskCache, FormatError, ReadOnlyError
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.concurrency.file_locks import GRACE, LOOK_EVERY, FileLock, has_name
from yatagarasu_cache.store import format as f

Make = Callable[..., DiskCache]
SMALL: dict[str, Any] = {"size_limit": 1 << 20, "large_value_size": 4000}
FILES = [
    f.TAG_NAME, f.INDEX_NAME, f.LOCK_NAME, f.USERS_NAME, f.CHECKPOINT_NAME, f.CHECKPOINT_LOCK_NAME,
    f.RECLAIM_LOCK_NAME, f.SETTINGS_NAME,
]  # fmt: skip
DIRECTORIES = [f.SEGMENTS_NAME, f.LARGE_NAME, f.TEMPORARY_NAME, f.WRITERS_NAME]
EVERYTHING = FILES + DIRECTORIES
APP = Path(__file__).parents[1] / "apps" / "removed.py"


def value(n: int) -> bytes:
    return noise(100 if n % 2 else 5000, n)


def use(cache: DiskCache, first: int) -> None:
    """Whatever makes files: segments, a log, large values, a checkpoint, settings."""
    for n in range(first, first + 20):
        cache.set(n, value(n))
    cache.delete(first)
    cache.set(("stream", first), iter([noise(3000), noise(3000, 1)]))
    cache.flush()
    cache._store.checkpoints.write()


def holds(cache: DiskCache, first: int, lost: bool = False) -> bool:
    """Whether it has what `use` has left there, and nothing else; `lost`: or some of it."""
    found = [cache.get(n) for n in range(first, first + 20)]
    wanted = [None, *map(value, range(first + 1, first + 20))]
    return all(one == right or lost and one is None for one, right in zip(found, wanted, strict=True))


def remove(path: Path) -> None:
    """At once, whatever threads of the cache may be about to make there."""
    aside = path.with_name(f"{path.name}-removed")
    path.rename(aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def until_they_look() -> None:
    time.sleep(2 * LOOK_EVERY)


# -- what is left ---------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("opened", ["live", "new"])
@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("how", ["left", "removed"])
def test_one_is_left_or_removed(directory: Path, core: str, how: str, name: str, opened: str) -> None:
    backend = backend_for((how, name, opened, core))
    old = DiskCache(directory, backend=backend, **SMALL)
    use(old, 0)
    if opened == "new":
        old.close()
    for path in list(directory.iterdir()):
        if (path.name == name) == (how == "removed"):
            remove(path)
    assert (directory / name).exists() == (how == "left")
    until_they_look()
    if opened == "live":
        use(old, 100)
    new = DiskCache(directory, backend=backend, **SMALL)
    if opened == "new":
        old = new
        use(old, 100)
    use(new, 200)
    for cache in (old, new):
        assert holds(cache, 100) and holds(cache, 200)
        assert holds(cache, 0, lost=True)
    assert [old.incr("n"), new.incr("n"), old["n"]] == [1, 2, 2]
    old.check(fix=True)
    old.close()
    new.close()
    with DiskCache(directory, backend=backend) as cache:
        cache.check(fix=True)  # large values that were too young to be nobody's
        assert cache.check() == []
        assert holds(cache, 100) and holds(cache, 200)
        assert set(os.listdir(directory)) == set(EVERYTHING)


STRANGERS = ["data.txt", "segments/notes", "segments/00000001.txt", "large/photo.jpg", "tmp/x/y", "writers/lock"]


def make_strangers(directory: Path, name: str) -> dict[str, Any]:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b"a stranger's")
    return tree(directory)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_left_beside_strangers_is_refused(directory: Path, name: str) -> None:
    """Nothing is touched, by whoever comes, nor by whoever has had it open."""
    cache = DiskCache(directory, **SMALL)
    use(cache, 0)
    for path in list(directory.iterdir()):
        if path.name not in (f.LOCK_NAME, f.LARGE_NAME):
            remove(path)
    before = make_strangers(directory, name)
    until_they_look()
    for attempt in (lambda: DiskCache(directory), lambda: cache.incr("n")):
        with pytest.raises(FormatError, match=f"it contains '{name.partition('/')[0]}'"):
            attempt()
    assert tree(directory) == before
    remove(directory / name.partition("/")[0])
    cache.incr("n")  # they went: it goes on
    assert cache["n"] == 1
    cache.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lock", b"1234\n"), ("users", b"root"), ("index", b"<html>"), ("settings", b"[main]"),
        ("checkpoint", b"PK\3\4"), (f.TAG_NAME, f.TAG_TEXT[:43] + b"\n# another program's"),
    ],
)  # fmt: skip
def test_files_that_only_have_our_names_are_refused(directory: Path, name: str, content: bytes) -> None:
    directory.mkdir()
    (directory / name).write_bytes(content)
    before = tree(directory)
    with pytest.raises(FormatError, match=f"it contains '{name}'"):
        DiskCache(directory)
    assert tree(directory) == before


def test_links_and_special_files_are_no_remains(directory: Path) -> None:
    directory.mkdir()
    (directory / "other").mkdir()
    for name in ("segments", "lock"):
        (directory / name).symlink_to("other")
    with pytest.raises(FormatError, match="it contains"):
        DiskCache(directory)
    for name in ("segments", "lock", "other"):
        (directory / name).unlink() if name != "other" else (directory / name).rmdir()
    os.mkfifo(directory / f.TAG_NAME)
    with pytest.raises(FormatError, match="it contains"):
        DiskCache(directory)


@pytest.mark.parametrize("name", [f.LOCK_NAME, f.LARGE_NAME, f.SETTINGS_NAME])
def test_remains_are_nothing_to_read(directory: Path, name: str) -> None:
    with DiskCache(directory, **SMALL) as cache:
        use(cache, 0)
    for path in list(directory.iterdir()):
        if path.name != name:
            remove(path)
    before = tree(directory)
    with pytest.raises(ReadOnlyError, match="read_only"):
        DiskCache(directory, read_only=True)
    assert tree(directory) == before


# -- check --------------------------------------------------------------------------------------


def test_check_puts_the_tag_back(make: Make, directory: Path) -> None:
    cache = make(**SMALL)
    (directory / f.TAG_NAME).unlink()
    assert [(problem.kind, problem.fixed) for problem in cache.check()] == [("tag", False)]
    assert [(problem.kind, problem.fixed) for problem in cache.check(fix=True)] == [("tag", True)]
    assert (directory / f.TAG_NAME).read_bytes() == f.TAG_TEXT
    (directory / f.TAG_NAME).write_bytes(f.TAG_TEXT[:43] + b"\n# as somebody likes it better")
    assert cache.check(fix=True) == []  # backup tools know it


def test_check_mends_segments_without_files(make: Make, directory: Path) -> None:
    cache = make(**SMALL)
    use(cache, 0)
    shutil.rmtree(directory / "segments")
    kinds = {problem.kind for problem in cache.check()}
    assert "segment" in kinds
    assert all(problem.fixed for problem in cache.check(fix=True) if problem.kind != "large")
    assert [problem for problem in cache.check() if problem.kind not in ("large", "space")] == []
    use(cache, 100)
    assert holds(cache, 100)


@pytest.mark.parametrize("how", ["removed", "emptied", "moved"])
def test_nothing_is_missing_where_it_was_begun_anew(make: Make, directory: Path, how: str) -> None:
    """By the handle that noticed, alone: the tag and the settings are there as well."""
    cache = make(eviction="fifo", **SMALL)
    use(cache, 0)
    if how == "moved":
        directory.rename(directory.with_name("elsewhere"))
    else:
        remove(directory)
        if how == "emptied":
            directory.mkdir()
    until_they_look()
    cache["key"] = 1
    assert cache.check() == [] and cache["key"] == 1
    assert {f.TAG_NAME, f.SETTINGS_NAME, f.USERS_NAME, *DIRECTORIES} <= set(os.listdir(directory))
    assert cache.settings.eviction == "fifo" and cache.settings.size_limit == 1 << 20
    cache.close()
    with make() as again:
        assert again["key"] == 1 and again.settings.eviction == "fifo"


# -- what is noticed --------------------------------------------------------------------------------


@pytest.mark.usefixtures("apart", "core")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_is_moved_away(
    make: Make, directory: Path, replaced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files keep their names elsewhere: whoever has it open goes on in what is in its place."""
    one, two = make(**SMALL), make(**SMALL)
    use(one, 0)
    two["there"] = 1
    directory.rename(directory.with_name("elsewhere"))
    if replaced:
        make(**SMALL)["new"] = 1
    until_they_look()
    one["first"] = 1
    two["second"] = 2
    one["third"] = 3  # whoever was the last to make one has had it to himself
    assert [one.get("first"), one.get("second"), two.get("third")] == [1, 2, 3]
    assert (one.get("new"), two.get("new")) == ((1, 1) if replaced else (None, None))
    assert one.get("there") is None and two.get(1) is None
    assert [cache.incr("n") for cache in (one, two, one, two)] == [1, 2, 3, 4]
    with make(directory.with_name("elsewhere")) as moved:
        assert moved["there"] == 1 and holds(moved, 0) and moved.get("first") is None
    assert sum("the cache was removed" in line for line in caplog.messages) == 2
    assert not any("a lock file was removed" in line for line in caplog.messages)


def test_a_store_that_followed_is_not_given_to_others(directory: Path) -> None:
    """Its directory was moved away: who opens that by its new name gets what is there."""
    cache = DiskCache(directory, **SMALL)
    cache["where"] = "moved"
    directory.rename(directory.with_name("elsewhere"))
    until_they_look()
    cache["where"] = "new"
    with DiskCache(directory.with_name("elsewhere")) as moved, DiskCache(directory) as same:
        assert (moved["where"], same["where"], cache["where"]) == ("moved", "new", "new")
    cache.close()


@pytest.mark.usefixtures("apart", "core")
def test_a_segment_that_is_removed_is_not_added_to(make: Make, directory: Path) -> None:
    one, two = make(size_limit=64 << 20), make(size_limit=64 << 20)
    one["before"] = b"1"
    for path in (directory / "segments").iterdir():
        path.unlink()
    until_they_look()
    one["after"] = b"2"
    assert two["after"] == b"2" and two.get("before") is None
    one.delete("after")
    assert two.get("after") is None
    assert all(problem.fixed for problem in one.check(fix=True))
    assert two.check() == []


@pytest.mark.usefixtures("apart", "core")
def test_removals_are_logged_where_they_are_found(make: Make, directory: Path) -> None:
    """The log was removed, later on the index: what was deleted in between stays so."""
    cache = make(size_limit=64 << 20)
    for n in range(4):
        cache[n] = b"value"
    cache.delete(0)
    store = cache._lease.store
    os.unlink(store.files.segments.path(store.current.index.logs()[0]))
    until_they_look()
    cache.delete(1)
    assert store.current.index.logs() and os.path.exists(store.files.segments.path(store.changes.segment))
    assert cache.check(fix=True) == [] or cache.check() == []
    cache.close()
    (directory / f.INDEX_NAME).unlink()
    with make() as again:
        assert [again.get(n) for n in range(4)] == [None, None, b"value", b"value"]


@pytest.mark.parametrize("how", ["noticed", "not noticed"])
@pytest.mark.usefixtures("apart")
def test_who_is_not_alone_is_not_taken_to_be(make: Make, directory: Path, how: str) -> None:
    """The file that tells was removed: a handle that comes later does not tidy away what others store."""
    cache = make(**SMALL)
    cache["a"] = 1
    (directory / f.USERS_NAME).unlink()
    if how == "noticed":
        until_they_look()
        with cache._lease.store.locks.index:
            pass
    other = make()
    with other._lease.store.locks.index:
        assert not other._lease.store.users.is_alone()
    other.close()
    assert not cache._lease.store.current.index.words[f.W_CLEAN]


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.usefixtures("apart")
def test_directories_are_put_back(make: Make, directory: Path, name: str) -> None:
    """At once, by whoever needs them: nothing fails meanwhile, be it only once."""
    cache = make(**SMALL)
    use(cache, 0)
    shutil.rmtree(directory / name)
    cache.flush()
    shutil.rmtree(directory / name, ignore_errors=True)
    cache.set("large", noise(10_000))
    shutil.rmtree(directory / name, ignore_errors=True)
    cache.set("stream", iter([noise(10_000)]))
    shutil.rmtree(directory / name, ignore_errors=True)
    cache._store.checkpoints.write()
    cache.stats()
    list(cache)
    cache.check(fix=True)
    use(cache, 100)
    assert holds(cache, 100)


def test_a_value_that_is_removed_while_it_is_stored(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is all there is stored again; of a stream that is half read nothing is left."""
    cache = make(**SMALL)
    large, removed = cache._lease.store.files.large, []
    publish = large.publish

    def interfered(temporary: str, *arguments: Any, **options: Any) -> None:
        if not removed:
            removed.append(temporary)
            remove(directory)
        publish(temporary, *arguments, **options)

    monkeypatch.setattr(large, "publish", interfered)
    cache.set("a", noise(10_000))
    assert removed and cache["a"] == noise(10_000)
    removed.clear()
    assert cache.add("b", noise(10_000, 1))
    assert removed and cache["b"] == noise(10_000, 1) and cache.get("a") is None
    removed.clear()
    with pytest.raises(CacheIOError):
        cache.set("c", iter([noise(10_000)]))
    cache.set("c", iter([noise(10_000)]))
    assert cache["c"] == noise(10_000)


@pytest.mark.usefixtures("apart")
def test_keys_are_looked_up_in_the_cache_that_is_there(make: Make, directory: Path) -> None:
    """Another cache has come in the place of ours, where digests are others."""
    old = make(**SMALL)
    old.set_many({n: n for n in range(10)})
    remove(directory)
    new = make(**SMALL)
    new.set_many(dict.fromkeys(range(20), b"new"))
    new["n"] = 5
    assert old._lease.store.current.seed != new._lease.store.current.seed
    until_they_look()
    assert old.incr("n") == 6
    assert old._lease.store.current.seed == new._lease.store.current.seed

    def replaced() -> DiskCache:
        remove(directory)
        other = make(**SMALL)
        other.set_many({n: n for n in range(300)})
        until_they_look()
        return other

    other = replaced()
    assert old.delete(1) and other.get(1) is None
    assert replaced() and old.delete_many(range(300)) == 300
    other = replaced()
    assert not old.add(1, "another") and other[1] == 1
    other = replaced()
    old.set(1, noise(10_000))
    assert other[1] == noise(10_000)
    other = replaced()
    old.set_many({n: noise(3000, n) for n in range(100)})
    assert all(other[n] == noise(3000, n) for n in range(100))
    assert other.check() == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_whoever_closes_leaves_nothing_and_makes_nothing(directory: Path, backend: str, how: str) -> None:
    DiskCache(directory, backend=backend, **SMALL).close()
    remove(directory)
    before = descriptors()
    cache = DiskCache(directory, backend=backend, **SMALL)
    use(cache, 0)
    remove(directory)
    if how == "emptied":
        directory.mkdir()
    until_they_look()
    cache.close()
    assert descriptors() == before
    assert not directory.exists() or not any(directory.iterdir())


# -- the lock file ------------------------------------------------------------------------------


@pytest.fixture
def lock_path(tmp_path: Path) -> str:
    return str(tmp_path / "lock")


def test_what_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    with open(path, "rb") as file:
        assert has_name(file.fileno(), str(path))
        os.link(path, tmp_path / "b")
        os.unlink(path)
        assert not has_name(file.fileno(), str(path))  # it has another one
        path.touch()
        assert not has_name(file.fileno(), str(path))
        assert has_name(file.fileno(), str(tmp_path / "b"))
        assert not has_name(file.fileno(), str(tmp_path / "b" / "c"))


def test_nobody_waits_for_a_lock_that_was_removed(lock_path: str) -> None:
    """Whoever has it may be stopped for ever; the others go on with the file that is made anew."""
    backend = ThreadsBackend()
    stopped, lock = FileLock(backend, lock_path, 0o600), FileLock(backend, lock_path, 0o600, timeout=60)
    entered = threading.Event()

    def wait() -> None:
        with lock:
            entered.set()

    with stopped:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
        os.unlink(lock_path)
        assert entered.wait(30)
        thread.join()
    stopped.close()
    lock.close()
    backend.close()


def test_whoever_makes_the_lock_anew_has_it_first(lock_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be inside of the one that was removed: nobody gets the new one until that has passed."""
    backend = ThreadsBackend()
    lock, later = FileLock(backend, lock_path, 0o600), None
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal later
        sleeps.append(seconds)
        later = later or FileLock(backend, lock_path, 0o600)
        assert not later.try_to_enter()

    os.unlink(lock_path)
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", sleep)
        with lock:
            pass
    assert sleeps == [GRACE]
    assert later is not None and later.try_to_enter()
    later.__exit__()
    later.close()
    lock.close()
    backend.close()


def test_whoever_opens_makes_the_lock_anew_as_well(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(**SMALL).close()
    real, sleeps = time.sleep, []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        real(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    make().close()
    assert GRACE not in sleeps
    (directory / f.LOCK_NAME).unlink()
    make().close()
    assert GRACE in sleeps
    remove(directory)
    sleeps.clear()
    make().close()
    assert GRACE not in sleeps  # of a new cache nobody has the lock


# -- again and again ------------------------------------------------------------------------------


def test_the_index_is_removed_when_another_has_just_replaced_it(make: Any, directory: Path) -> None:
    """And what replaced it, too: what is in the segments is there."""
    cache = make()
    for n in range(50):
        cache.set(n, noise(500, n))
    store = cache._store
    with store.locks.index:
        other = store.recovery.remake(store.current.index, store.current.index.table_capacity)
        other.close()
        assert store.current.index.words[f.W_SUPERSEDED]
        (directory / f.INDEX_NAME).unlink()
        store.presence._follow_removed()
    assert all(cache.get(n) == noise(500, n) for n in range(50))
    cache.set("new", 1)
    assert cache.check() == []
    cache.close()
    with make() as again:
        assert len(again) == 51 and again.check() == []


@pytest.mark.in_turn
@pytest.mark.parametrize("how", ["directory", "inside", "some", "moved"])
def test_removed_again_and_again(directory: Path, core: str, how: str) -> None:
    """Processes work on, meet in one cache afterwards, and count exactly there."""
    backend = backend_for((how, core))
    done = subprocess.run(
        [sys.executable, str(APP), str(directory), "--how", how, "--seconds", "1.5", "--processes", "3",
         "--backend", backend],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
