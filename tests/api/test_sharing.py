"""Handles of one process on one directory share one store; those that nobody closed are closed."""

from __future__ import annotations

import _imp
import asyncio
import gc
import multiprocessing
import os
import pickle
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS
from helpers import descriptors, noise, open_apart, run_python

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache, ReadOnlyError
from yatagarasu_cache.store import sharing

pytestmark = pytest.mark.once

Make = Callable[..., DiskCache]
SMALL: dict[str, Any] = {"size_limit": 64 << 20, "backend": "threads"}


def stores(directory: Path | str) -> list[Any]:
    """The stores that are open on a directory in this process."""
    place = sharing._places.get(sharing.identify(os.lstat(directory)))
    return [] if place is None else [shared.store for shared in place.stores]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    with sharing._lock:
        kept = list(sharing._kept)
        for shared in kept:
            sharing._end_store(shared)
    for shared in kept:
        shared.close()


# -- sharing ------------------------------------------------------------------------------------


def test_handles_share_a_store(make: Make) -> None:
    one = make()
    before = descriptors()
    two = make()
    assert two._store is one._store and descriptors() == before
    two["k"] = 1
    assert one["k"] == 1
    one.close()
    assert one.closed and not two.closed
    with pytest.raises(ClosedError, match="open it anew"):
        one.get("k")
    assert two["k"] == 1
    two.close()
    assert two.closed and stores(one.directory) == []


def test_whatever_leads_to_the_directory(make: Make, directory: Path, tmp_path: Path) -> None:
    one = make()
    (tmp_path / "link").symlink_to(tmp_path)
    assert make(tmp_path / "link" / directory.name)._store is one._store
    assert make(os.path.relpath(directory))._store is one._store
    assert make(tmp_path / "other")._store is not one._store


OTHERS: list[dict[str, Any]] = [
    {"read_only": True},
    {"max_value_size": 1000},
    {"max_stream_size": 1000},
    {"segment_size": 1 << 16},
    {"large_value_size": 1000},
    {"max_open_files": 10},
    {"file_mode": 0o660},
    {"workers": 3},
    {"lock_timeout": 3.0},
]
OWN: list[dict[str, Any]] = [
    {"serializer": "pickle"},
    {"default_expire": 100},
    {"max_in_flight": 3},
    {"durability": "sync"},
]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_settings_have_a_store_of_their_own(make: Make, options: dict[str, Any]) -> None:
    one = make()
    one["k"] = b"v" * 100
    two, three = make(**options), make(**options)
    assert two._lease.shared is not one._lease.shared and two._store is three._store
    assert two["k"] == one["k"]
    if two.settings.read_only:
        with pytest.raises(ReadOnlyError):
            two["k"] = 1
    else:
        two["k"] = 1
        assert one["k"] == 1
    two.close()
    one["other"] = three["k"]
    assert three["other"] == one["k"]


@pytest.mark.parametrize("options", OWN, ids=str)
def test_what_is_each_handles_own(make: Make, options: dict[str, Any]) -> None:
    one, two = make(), make(**options)
    assert one._lease.shared is two._lease.shared and one.settings != two.settings
    for n in range(50):
        two[n] = {1, n}
        one[-n - 1] = [n]
    assert one.check() == []
    if "serializer" not in options:
        assert one[7] == {1, 7} and two[-8] == [7]
    entry = one.get_entry(3)
    assert entry is not None and (entry.expires is not None) == ("default_expire" in options)
    entry = two.get_entry(-3)
    assert entry is not None and entry.expires is None
    two.close()
    assert one[-3] == [2]


@pytest.mark.parametrize("first", ["none", "sync"])
def test_only_the_durable_handle_syncs(make: Make, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    caches = {name: make(durability=name) for name in (first, "sync", "none")}
    synced: list[int] = []
    backend = caches["none"]._store.backend
    sync = backend.sync
    monkeypatch.setattr(backend, "sync", lambda fd: (synced.append(fd), sync(fd)))
    changes: list[Callable[[DiskCache], object]] = [
        lambda cache: cache.set("a", b"1"),
        lambda cache: cache.set("a", 1, expire=100),
        lambda cache: cache.set_many({"b": 1, "c": 2}),
        lambda cache: cache.add(os.urandom(8), 1),
        lambda cache: cache.incr("n"),
        lambda cache: cache.touch("n", 50),
        lambda cache: cache.delete("b") or cache.delete("c"),
        lambda cache: cache.set("large", noise(2 << 20)),
    ]
    for change in changes:
        change(caches["none"])
        assert not synced
        change(caches["sync"])
        assert synced
        synced.clear()
    assert caches["none"].check() == []


def test_a_segment_is_durable_when_a_durable_handle_may_wait(make: Make) -> None:
    plain, durable = make(segment_size=1 << 14), make(segment_size=1 << 14, durability="sync")

    def fill(cache: DiskCache, name: str) -> None:
        for n in range(300):
            cache[name, n] = noise(500, n)

    threads = [
        threading.Thread(target=fill, args=(cache, name))
        for name, cache in (("plain", plain), ("durable", durable), ("also", durable))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plain) == 900 and plain.check() == []


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("threads", [1, 5])
def test_made_anew_five_hundred_times(directory: Path, keep: bool, threads: int) -> None:
    with DiskCache(directory, **SMALL) as cache:
        cache["start"] = 1
    before, kept = descriptors(), []

    def work(number: int) -> None:
        for n in range(500 // threads):
            cache = DiskCache(directory, **SMALL)
            cache[number, n] = noise(100, n)
            assert cache[number, n] == noise(100, n) and cache["start"] == 1
            if keep:
                kept.append(cache)

    crew = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        assert descriptors() < before + 40
        with DiskCache(directory, **SMALL) as cache:
            assert len(cache) == 501 and cache.stats().evictions == 0 and cache.check() == []
        kept.clear()
        gc.collect()
    assert descriptors() == before


def test_opening_again_asks_for_no_import(directory: Path, backend: str) -> None:
    """An exception in the middle of an import may leave the import system locked: that is Python's, and
    stays with whoever imports."""
    DiskCache(directory, backend=backend).close()
    done = []

    def work() -> None:
        with DiskCache(directory, backend=backend) as cache:
            cache["k"] = [1]
            done.append(cache["k"])

    thread = threading.Thread(target=work, daemon=True)
    _imp.acquire_lock()
    try:
        thread.start()
        thread.join(20)
    finally:
        _imp.release_lock()
    assert done == [[1]]


def test_opening_a_second_handle_is_cheap(make: Make) -> None:
    caches = [make()]
    taken = []
    for _ in range(300):
        start = time.perf_counter()
        caches.append(make())
        taken.append(time.perf_counter() - start)
    assert sorted(taken)[len(taken) // 4] < 200e-6  # 20 µs where nothing else runs


def test_threads_that_open_at_once_get_the_same(directory: Path) -> None:
    for turn in range(5):
        barrier, caches = threading.Barrier(8), []

        def work(barrier: threading.Barrier = barrier, caches: list[Any] = caches, turn: int = turn) -> None:
            barrier.wait()
            caches.append(DiskCache(directory / str(turn), **SMALL))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(cache._store) for cache in caches}) == 1
        for cache in caches:
            cache.close()
        assert stores(directory / str(turn)) == []


@pytest.mark.parametrize("how", ["removed", "replaced", "moved away", "emptied"])
def test_a_directory_that_is_another_now(make: Make, directory: Path, how: str) -> None:
    one = make()
    one["k"] = 1
    if how == "moved away":
        directory.rename(directory.with_name("elsewhere"))
    elif how == "emptied":
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        shutil.rmtree(directory)
        if how == "replaced":
            directory.mkdir()
    two = make()
    assert two._store is not one._store and "k" not in two
    two["k"] = 2
    assert make()["k"] == 2 and make()._store is two._store


def test_counters_are_the_processs(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = make(), make(), make(max_open_files=10)
    one["k"] = 1
    for cache in (one, two, other):
        cache.get("k"), cache.get("none")
    other.close()
    for cache in (one, two):
        process = cache.stats().process
        assert (process["hits"], process["misses"], process["sets"]) == (3, 3, 1)
    code = "import sys; from yatagarasu_cache import DiskCache; c = DiskCache(sys.argv[1]); c.get('k'); c.close()"
    run_python(code, directory)
    stats = one.stats()
    assert stats.process["hits"] == 3 and stats.hits == 4


# -- closing ------------------------------------------------------------------------------------


def test_a_closed_handle_refuses_all(make: Make) -> None:
    keeper, cache = make(), make()
    cache["k"] = 1
    entry = cache.get_entry("k")
    walk = cache.keys()
    cache.set_many({n: n for n in range(10)})
    assert next(walk) is not None
    cache.close()
    calls: list[Callable[[], Any]] = [
        lambda: cache.get("k"), lambda: cache.set("k", b"v"), lambda: cache.set("k", 1),
        lambda: cache.add("k", 1), lambda: cache.touch("k"), lambda: cache.incr("n"), lambda: cache.pop("k"),
        lambda: cache.delete("k"), lambda: cache["k"], lambda: "k" in cache, lambda: cache.get_many(["k"]),
        lambda: cache.set_many({"k": 1}), lambda: cache.delete_many(["k"]), lambda: len(cache),
        lambda: list(cache), lambda: list(cache.entries()), lambda: cache.evict("t"),
        lambda: cache.delete_prefix("k"), lambda: cache.expire(), lambda: cache.cull(), lambda: cache.clear(),
        lambda: cache.get_entry("k"), lambda: cache.open("k"), lambda: cache.location("k"),
        lambda: cache.volume(), lambda: cache.flush(), lambda: cache.check(), lambda: cache.stats(),
        lambda: entry.value if entry else None, lambda: list(walk),
    ]  # fmt: skip
    for number, call in enumerate(calls):
        with pytest.raises(ClosedError, match="is closed: open it anew"):
            pytest.fail(f"call {number} gave {call()!r}")
    assert cache.closed and "closed" in repr(cache) and cache.directory == keeper.directory
    cache.close()
    assert keeper["k"] == 1


def test_work_under_way_ends_when_another_thread_closes(make: Make) -> None:
    keeper = make()
    for _ in range(10):
        cache = make()
        outcomes: list[object] = []

        def work(cache: DiskCache = cache, outcomes: list[object] = outcomes) -> None:
            try:
                for n in count():
                    cache.set(n % 50, noise(200, n))
                    cache.get(n % 50)
            except BaseException as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        cache.close()
        for thread in threads:
            thread.join(20)
        assert outcomes == [ClosedError] * 3
    assert keeper.check() == []


def test_what_was_read_stays_readable(make: Make) -> None:
    cache = make()
    cache["k"] = noise(3 << 20)
    file, location = cache.open("k"), cache.location("k")
    with pytest.warns(ResourceWarning):
        del cache
        _drop_all_of(make)
    assert file.read() == noise(3 << 20)
    assert os.pread(location.fd, 10, location.offset) == noise(3 << 20)[:10]
    file.close(), location.close()


def _drop_all_of(make: Make) -> None:
    """Forget what the fixture would close."""
    opened = make.__closure__
    assert opened is not None
    for cell in opened:
        if isinstance(cell.cell_contents, list):
            cell.cell_contents.clear()
    gc.collect()


# -- collected ----------------------------------------------------------------------------------


def collected(directory: Path | str, **options: Any) -> list[warnings.WarningMessage]:
    """What is said when a handle is dropped."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = DiskCache(directory, **options)
        cache["k"] = 1
        del cache
        gc.collect()
    return [one for one in said if issubclass(one.category, ResourceWarning)]


@pytest.mark.in_turn
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_collected_handle_is_closed(directory: Path, backend: str) -> None:
    before = descriptors()
    (said,) = collected(directory, backend=backend)
    assert repr(str(directory)) in str(said.message) and "with" in str(said.message)
    assert Path(said.filename).name == Path(__file__).name  # where it was dropped
    assert descriptors() <= before + (backend == "uring") and stores(directory) == []
    assert list((directory / "writers").iterdir()) == []
    with DiskCache(directory, backend=backend) as cache:
        assert cache["k"] == 1
        assert collected(directory, backend=backend) == []  # not the last one
        assert collected(directory, backend=backend, max_open_files=9) == []
        assert cache["k"] == 1
    assert len(collected(directory, backend=backend)) == 1


def test_handles_in_a_cycle_are_closed(directory: Path) -> None:
    cache: Any = DiskCache(directory, **SMALL)
    cache.itself = cache
    with pytest.warns(ResourceWarning) as said:
        del cache
        gc.collect()
    assert len(said) == 1 and stores(directory) == []


def test_a_warning_that_is_an_error_is_nobodys(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: told.append(args.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        cache = DiskCache(directory, **SMALL)
        del cache
        gc.collect()
    assert told == [ResourceWarning] and stores(directory) == []


class Dropper:
    """Drops a handle when it is collected; part of a cycle, so that this may be anywhere."""

    def __init__(self, cache: DiskCache) -> None:
        self.cache, self.itself = cache, self


@pytest.mark.parametrize("options", [{}, {"max_open_files": 9}], ids=["the same", "another store"])
def test_garbage_collected_in_the_middle_of_operations(directory: Path, options: dict[str, Any]) -> None:
    """Nothing locks up, whatever this thread was doing, and what was dropped is closed in the end."""
    code = """
import gc, sys, threading, warnings, faulthandler
from test_sharing import Dropper, SMALL
from yatagarasu_cache import DiskCache
from helpers import noise
faulthandler.dump_traceback_later(60, exit=True)
warnings.simplefilter("ignore", ResourceWarning)
directory, options = sys.argv[1], eval(sys.argv[2])
gc.set_threshold(1)
def work(number):
    with DiskCache(directory, **{**SMALL, "segment_size": 1 << 16}) as cache:
        for n in range(120):
            Dropper(DiskCache(directory, **{**SMALL, **options}))["k" if False else 0] if False else Dropper(
                DiskCache(directory, **{**SMALL, **options})).cache.set((number, n), noise(300, n))
            cache.set((number, n, "own"), noise(2000, n))
            assert cache.get((number, n)) == noise(300, n)
            cache.set_many({(number, n, i): i for i in range(5)})
            cache.delete((number, n, 0))
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
gc.set_threshold(700)
gc.collect()
with DiskCache(directory, **SMALL) as cache:
    assert cache.check() == []
    print(len(cache))
"""
    assert int(run_python(code, directory, options, timeout=100)) == 3 * 120 * 6


def test_put_aside_while_this_thread_is_busy(directory: Path, tmp_path: Path) -> None:
    """A handle that goes in the middle of an operation is let go of at the next opening or closing."""

    class Busy:
        name = "busy"

        def dumps(self, value: Any) -> bytes:
            caches.clear()
            assert len(stores(tmp_path / "dropped")) == 1
            return b""

        def loads(self, data: bytes) -> Any:
            return None

    caches = [DiskCache(tmp_path / "dropped", **SMALL)]
    with DiskCache(directory, serializer=Busy(), **SMALL) as cache:
        cache["k"] = object()
        with pytest.warns(ResourceWarning, match="dropped"):
            DiskCache(directory, **SMALL).close()
        assert stores(tmp_path / "dropped") == []


# -- unpickled ----------------------------------------------------------------------------------


def test_unpickled_handles_come_and_go(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DiskCache(directory, **SMALL) as cache:
            cache["k"] = 1
            data = pickle.dumps(cache)
        assert stores(directory) == []
        pickle.loads(data)["k"] = 2
        (kept,) = stores(directory)
        for n in range(50):
            assert pickle.loads(data).incr("k") == n + 3
        assert stores(directory) == [kept]
        with DiskCache(directory, **SMALL) as cache:  # the user's own
            assert cache._store is kept
        assert stores(directory) == []  # closed by hand
        with pickle.loads(data) as cache:
            pass
        assert stores(directory) == []


def test_few_stores_are_kept(tmp_path: Path) -> None:
    for n in range(7):
        with DiskCache(tmp_path / str(n), **SMALL) as cache:
            data = pickle.dumps(cache)
        pickle.loads(data)["k"] = n
    assert [len(stores(tmp_path / str(n))) for n in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    shutil.rmtree(tmp_path / "4")
    (tmp_path / "5").rename(tmp_path / "moved")
    before = descriptors()
    DiskCache(tmp_path / "new", **SMALL).close()
    assert descriptors() < before
    assert [len(sharing._kept), *(len(stores(tmp_path / n)) for n in ("3", "moved", "6"))] == [2, 1, 0, 1]


def _thumbnail(cache: DiskCache, name: str) -> tuple[int, str]:
    found = cache.get(name)
    if found is None:
        found = f"made {name}"
        cache.set(name, found)
    cache.incr("calls")
    return len(os.listdir("/proc/self/fd")), found


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool_map_of_the_cache_itself(directory: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    with DiskCache(directory, **SMALL) as cache:
        names = [f"n{number % 100}" for number in range(400)]
        before = descriptors()
        with context.Pool(2) as pool:
            results = pool.starmap(_thumbnail, [(cache, name) for name in names], 1)
            pool.close()
            pool.join()
        assert [found for _, found in results] == [f"made {name}" for name in names]
        assert max(number for number, _ in results) < before + 60  # a fork inherits what is open here
        stats = cache.stats()
        assert cache["calls"] == 400 and stats.evictions == 0
        assert stats.hits + stats.misses == 400  # workers that ended in order have counted all
        assert cache.check() == []
        assert list((directory / "writers").iterdir()) == []  # and have closed their stores


# -- the end of a process -----------------------------------------------------------------------

ENDS = {
    "at the end": "",
    "by exit": "sys.exit(0)",
    "in a cycle": "cache.itself = cache; del cache",
    "read-only": "cache.close(); cache = DiskCache(sys.argv[1], read_only=True)",
    "many": "more = [DiskCache(sys.argv[1]) for _ in range(20)] + [DiskCache(sys.argv[1], max_open_files=9)]",
    "uring": "more = DiskCache(sys.argv[1], backend='auto', serializer='pickle'); more.get_many(['k', 'a'])",
}


@pytest.mark.parametrize("end", ENDS)
def test_alive_at_the_end_is_closed(directory: Path, end: str) -> None:
    code = f"""
import sys, warnings
warnings.simplefilter("always", ResourceWarning)
sys.stderr = sys.stdout
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
cache["k"] = 1
cache.get("k")
{ENDS[end]}
"""
    said = run_python(code, directory)
    assert said.count("ResourceWarning") == 1 and repr(str(directory)) in said
    assert list((directory / "writers").iterdir()) == []
    with DiskCache(directory) as cache:
        assert cache["k"] == 1 and cache.stats().hits >= 2


def test_what_others_do_at_the_end_still_has_its_cache(directory: Path) -> None:
    code = """
import atexit, sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
atexit.register(lambda: cache.set("last", 1))
import multiprocessing.util
"""
    run_python(code, directory)
    with DiskCache(directory) as cache:
        assert cache["last"] == 1


CHILD = """
import multiprocessing, sys, threading, time
from yatagarasu_cache import DiskCache
def work(directory, cache, threads):
    mine = DiskCache(directory) if cache is None else cache
    mine["child"] = 1
    for _ in range(10): mine.get("child")
    if threads:
        threading.Thread(target=lambda: (time.sleep(0.5), mine.set("thread", 1), mine.get("thread"))).start()
    global kept
    kept = mine
if __name__ == "__main__":
    directory, method, given, threads = sys.argv[1], sys.argv[2], sys.argv[3] == "given", sys.argv[4] == "True"
    cache = DiskCache(directory) if given else None
    process = multiprocessing.get_context(method).Process(target=work, args=(directory, cache, threads))
    process.start()
    process.join()
    assert process.exitcode == 0
    if cache is not None: cache.close()
"""


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("given", ["given", "opened"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_end_in_order(
    directory: Path, tmp_path: Path, method: str, given: str, threads: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run_python(code, script, directory, method, given, threads)
    if not threads:
        assert list((directory / "writers").iterdir()) == []
    with DiskCache(directory) as cache:
        assert cache["child"] == 1 and cache.stats().hits >= 11
        if threads:
            assert cache["thread"] == 1
        assert cache.check() == []


# -- forks --------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> None:
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_shared_in_a_child(make: Make, directory: Path) -> None:
    one, two = make(), make()

    def work() -> None:
        assert make()._store is one._store is two._store
        one["child"] = 1
        one.close()
        assert two["child"] == 1
        assert two.stats().process["sets"] == 1
        two.close()
        with DiskCache(directory, backend=one.settings.backend) as mine:
            assert mine["child"] == 1

    two["parent"] = 1
    two.get("parent")
    in_child(work)
    assert one["child"] == two["parent"] == 1
    assert one.stats().process["hits"] == 3
    one.check()


def test_forks_while_threads_open_and_close(directory: Path) -> None:
    with DiskCache(directory, **SMALL) as keeper:
        stop = threading.Event()

        def churn(number: int) -> None:
            while not stop.is_set():
                with DiskCache(directory, max_open_files=10 + number, **SMALL) as cache:
                    cache[number] = 1

        threads = [threading.Thread(target=churn, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()

        def work() -> None:
            keeper.incr("n")
            with DiskCache(directory, **SMALL) as cache:
                assert cache["n"] > 0

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(30):
                in_child(work)
        stop.set()
        for thread in threads:
            thread.join()
        assert keeper["n"] == 30 and keeper.check() == []


def test_a_store_that_could_not_be_renewed_is_not_used_again(make: Make, directory: Path) -> None:
    one = make()
    shutil.rmtree(directory)

    def work() -> None:
        assert one.closed
        with pytest.raises(ClosedError):
            one.get("k")
        two = make()
        two["k"] = 1
        assert make()["k"] == 1

    in_child(work)


def test_an_inherited_handle_warns_of_nothing(directory: Path) -> None:
    code = """
import gc, os, sys, warnings
warnings.simplefilter("always", ResourceWarning)
sys.stderr = sys.stdout
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1])
if os.fork() == 0:
    del cache
    gc.collect()
    sys.exit()
os.wait()
cache.close()
"""
    assert run_python(code, directory) == ""


# -- asyncio ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_asynchronous_handles_share_too(directory: Path, backend: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend) as one:
            await one.set("k", noise(100))
            await one.get("k")
            before = descriptors()
            many = [AsyncDiskCache(directory, backend=backend) for _ in range(100)]
            for cache in many:
                assert await cache.get("k") == noise(100)
                assert cache._cache is not None and one._cache is not None
                assert cache._cache._store is one._cache._store
            assert descriptors() == before
            await asyncio.gather(*(cache.close() for cache in many))
            assert await one.get_many(["k"]) == {"k": noise(100)}

    asyncio.run(main())
    assert stores(directory) == []


def test_an_asynchronous_handle_that_is_collected_is_closed(directory: Path) -> None:
    async def main() -> None:
        cache = AsyncDiskCache(directory, **SMALL)
        other = directory.parent / "other"
        await cache.set("k", 1)
        with pytest.warns(ResourceWarning, match="never closed") as said:
            del cache
            for _ in range(100):  # a thread may have it still, or have collected it amid its work
                gc.collect()
                DiskCache(other, **SMALL).close()
                if said:
                    break
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # no other one comes
        assert len(said) == 1
        for _ in range(200):
            if not stores(directory):
                break
            await asyncio.sleep(0.01)
        assert stores(directory) == []
        AsyncDiskCache(directory, **SMALL)  # was never opened

    asyncio.run(main())
    with DiskCache(directory, **SMALL) as cache:
        assert cache["k"] == 1


def test_dropped_with_work_under_way(directory: Path) -> None:
    async def main() -> None:
        tasks = []
        for n in range(20):
            cache = AsyncDiskCache(directory, **SMALL)
            tasks.append(asyncio.ensure_future(cache.set(n, noise(1000, n))))
            tasks.append(asyncio.ensure_future(cache.set_many({(n, i): i for i in range(50)})))
            del cache
        await asyncio.gather(*tasks)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(main())
        gc.collect()
    with DiskCache(directory, **SMALL) as cache:
        assert len(cache) == 20 * 51 and cache.check() == []


def test_tests_can_have_them_apart(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    open_apart(monkeypatch)
    one, two = make(), make()
    assert one._store is not two._store
    two["k"] = 1
    assert one["k"] == 1 and one.stats().process["sets"] == 0


def test_a_cache_that_is_being_opened_is_not_closed_by_who_opens_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several caches are opened when a server begins, one of them in a thread of its own. Whoever looks meanwhile
    for what is to be closed finds it half open, and comes to close it when it is in use."""
    begun, goes_on = threading.Event(), threading.Event()
    opened = sharing.Store.open

    def open_slowly(store: Any) -> None:
        opened(store)
        if "slow" in store.root:
            begun.set()
            assert goes_on.wait(30)

    late: list[Any] = []
    monkeypatch.setattr(sharing.Store, "open", open_slowly)
    monkeypatch.setattr(sharing, "_close_aside", late.append)

    async def main() -> None:
        slow = AsyncDiskCache(tmp_path / "slow")
        task = asyncio.create_task(slow.set("key", 1))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        with DiskCache(tmp_path / "other") as other:
            other["key"] = 1
        goes_on.set()
        await task
        assert late  # it was found among those to be closed
        for shared in late:
            shared.close_quietly()
        assert await slow.get("key") == 1 and (await slow.get_entry("key")) is not None
        await slow.close()

    asyncio.run(main())
