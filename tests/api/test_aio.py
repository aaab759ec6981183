"""`AsyncDiskCache`: the same answers as `DiskCache`, a loop that never waits, and nothing left behind.

Each test runs its own event loop. What a backend is asked for, and by which thread, is seen by
`Watched`, which can also hold calls in a worker until the test lets them go: no test sleeps.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import fcntl
import gc
import inspect
import io
import json
import logging
import math
import os
import pickle
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import Clock, WrappedBackend, descriptors, noise, run_python, tree, wrap_backends

from yatagarasu_cache import (
    AsyncDiskCache,
    CacheIOError,
    ClosedError,
    ConfigurationError,
    DiskCache,
    EntryGone,
    LockTimeout,
    PickleSerializer,
    ReadOnlyError,
    SerializationError,
    StorageFull,
    ValueTooLarge,
    aio,
)
from yatagarasu_cache.aio import AsyncEntry, AsyncValueReader
from yatagarasu_cache.backends.base import Backend, Channel
from yatagarasu_cache.backends.threads import DEFAULT_WORKERS
from yatagarasu_cache.concurrency.locks import FileLock
from yatagarasu_cache.entry import Entry, Location
from yatagarasu_cache.store.changes import ChangeLog
from yatagarasu_cache.store.index import Index
from yatagarasu_cache.store.large_writing import LargeWriting
from yatagarasu_cache.store.removal import Removal
from yatagarasu_cache.store.writing import Writing
from yatagarasu_cache.store.upkeep import Upkeep

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SEGMENT = 64 << 10
LARGE = SEGMENT // 4  # from here a value gets a file of its own
SMALL: dict[str, Any] = {"size_limit": 16 << 20, "segment_size": SEGMENT}
LIMIT = 30.0  # seconds after which whatever is waited for will not come any more
Open = Callable[..., AsyncDiskCache]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What was there before the tests is not looked through after each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs exceptions that nobody looked at, and failures of callbacks: none may come."""
    yield
    gc.collect()
    found = [record for record in caplog.records if record.name in ("asyncio", "concurrent.futures")]
    assert [record.getMessage() for record in found if record.levelno >= logging.ERROR] == []


@pytest.fixture
def open_cache(directory: Path, backend: str) -> Open:
    """Makes caches in `directory`, on the backend under test; whoever asks for one closes it."""
    return lambda **options: AsyncDiskCache(directory, **{"backend": backend, **options})


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """A loop of its own for `main`, which must not take for ever."""
    return asyncio.run(asyncio.wait_for(main, LIMIT))


async def turns_of_the_loop(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def until(happened: threading.Event) -> None:
    """Wait for another thread without holding up the loop."""
    assert await asyncio.to_thread(happened.wait, LIMIT)


async def parts_of(data: bytes, size: int = 5000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[at : at + size]


# -- a backend under observation ----------------------------------------------------------------

NEVER_WAIT = {"read_nowait", "prefetch"}


class Watched(WrappedBackend):
    """Notes every call and its thread, and what is under way in its channels.

    `hold` keeps calls of some kinds in their worker until `go_on`. `cold` lets nothing be in
    memory. `errors` maps kinds of calls to errnos with which they fail. A write of anything that
    contains `poison` fails.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, int]] = []
        self.cold = False
        self.errors: dict[str, int] = {}
        self.poison: bytes | None = None
        self.held: frozenset[str] = frozenset()
        self.where = ""
        self.entered, self.released = threading.Event(), threading.Event()
        self.under_way = self.most = 0
        self._read_inner = inner.read
        inner.read = self.read  # type: ignore[method-assign]  # what its channels call

    def hold(self, *calls: str, where: str = "") -> None:
        self.entered.clear()
        self.released.clear()
        self.where, self.held = where, frozenset(calls)

    def go_on(self) -> None:
        self.held = frozenset()
        self.released.set()

    def made_by(self, thread: int) -> set[str]:
        return {call for call, maker in self.calls if maker == thread}

    def before(self, call: str, path: str, size: int) -> None:
        self.calls.append((call, threading.get_ident()))
        if call in self.held and self.where in path:
            self.entered.set()
            if not self.released.wait(LIMIT / 2):
                self.calls.append((f"{call} was not let go", 0))
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self.before("read", self._path(fd), length)
        return self._read_inner(fd, length, offset)

    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        self.calls.append(("read_nowait", threading.get_ident()))
        return None if self.cold else self.inner.read_nowait(fd, length, offset)

    def write(self, fd: int, buffers: Any, offset: int) -> None:
        if self.poison is not None and any(self.poison in bytes(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().write(fd, buffers, offset)

    def close_file(self, fd: int) -> None:
        self.before("close_file", self._path(fd), 0)
        super().close_file(fd)

    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        return WatchedChannel(self, loop)


class WatchedChannel(Channel):
    def __init__(self, watched: Watched, loop: asyncio.AbstractEventLoop) -> None:
        self._watched, self._loop, self._inner = watched, loop, watched.inner.channel(loop)

    def _watch(self, future: asyncio.Future[Any]) -> asyncio.Future[Any]:
        watched = self._watched
        watched.under_way += 1
        watched.most = max(watched.most, watched.under_way)

        def done(_: asyncio.Future[Any]) -> None:
            watched.under_way -= 1

        future.add_done_callback(done)
        return future

    def read(self, fd: int, length: int, offset: int) -> asyncio.Future[bytes]:
        code = self._watched.errors.get("read")
        if code is None:
            return self._watch(self._inner.read(fd, length, offset))
        future: asyncio.Future[bytes] = self._loop.create_future()
        future.set_exception(OSError(code, os.strerror(code)))
        return self._watch(future)

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return self._watch(self._inner.run(function, *args))

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watched]]:
    """The backends of all caches that the test opens, under observation."""
    made: list[Any] = wrap_backends(monkeypatch, Watched)
    yield made
    for one in made:
        one.go_on()
        assert not [call for call, _ in one.calls if call.endswith("was not let go")]


# -- every method, and the synchronous class ------------------------------------------------------


async def described(value: Any) -> Any:
    """What a call of either class gave, in a form that can be compared."""
    if inspect.isawaitable(value):
        value = await value
    if isinstance(value, AsyncValueReader):
        async with value:
            return await value.read()
    if isinstance(value, io.BufferedReader):
        with value:
            return value.read()
    if isinstance(value, Location):
        with value as (fd, offset, length):
            return os.pread(fd, length, offset)
    if isinstance(value, Entry):
        times = [time and round(time, 3) for time in (value.created, value.expires, value.accessed)]
        return repr((value.key, value.tag, value.meta, value.size, times, await described(value.value)))
    if isinstance(value, dict):
        return {repr(key): repr(one) for key, one in value.items()}
    if hasattr(value, "__aiter__"):
        return sorted([repr(await described(one)) async for one in value])
    if isinstance(value, (list, Iterator)):
        return sorted([repr(await described(one)) for one in value])
    return value if isinstance(value, bytes) else repr(value)


async def outcome(call: Callable[[Any], Any], cache: Any) -> Any:
    try:
        return await described(call(cache))
    except Exception as error:
        return type(error), str(error).replace(cache.directory, "<directory>")


CALLS: dict[str, Callable[[Any], Any]] = {
    "get": lambda c: c.get("k"),
    "get missing": lambda c: c.get("missing", 5),
    "get large": lambda c: c.get("large"),
    "set": lambda c: c.set("new", {"a": 1}, expire=60, tag="t", meta=[1]),
    "set stream": lambda c: c.set("stream", iter([b"x", b"y"]), tag="t"),
    "set file": lambda c: c.set("file", io.BytesIO(noise(3 * LARGE)), meta="m"),
    "set large": lambda c: c.set("large", noise(2 * LARGE, 1)),
    "add": lambda c: c.add("k", 1),
    "add new": lambda c: c.add("added", 1, 60, "t", "m"),
    "touch": lambda c: c.touch("k", 100),
    "incr": lambda c: c.incr("n", 5),
    "incr of no integer": lambda c: c.incr("k"),
    "incr without default": lambda c: c.incr("missing", default=None),
    "decr": lambda c: c.decr("n", 2, default=7),
    "pop": lambda c: c.pop("p"),
    "pop missing": lambda c: c.pop("missing", 6),
    "delete": lambda c: c.delete("d"),
    "__contains__": lambda c: "k" in c,
    "__len__": lambda c: len(c),
    "get_many": lambda c: c.get_many(["k", "n", "missing", "large", ("t", 1), "k"]),
    "get_many none": lambda c: c.get_many([]),
    "set_many": lambda c: c.set_many({("t", 1): "x", 5: 6}, expire=30, tag="many"),
    "set_many pairs": lambda c: c.set_many((n, n) for n in range(20)),
    "set_many none": lambda c: c.set_many({}),
    "delete_many": lambda c: c.delete_many(n for n in range(5)),
    "delete_many none": lambda c: c.delete_many([]),
    "__aiter__": lambda c: c.__aiter__() if hasattr(c, "__aiter__") else iter(c),
    "keys": lambda c: c.keys(),
    "entries": lambda c: c.entries(),
    "entries some": lambda c: c.entries(prefix=("t",), tag="many"),
    "get_entry": lambda c: c.get_entry("k"),
    "get_entry missing": lambda c: c.get_entry("missing"),
    "open": lambda c: c.open("large"),
    "open missing": lambda c: c.open("missing"),
    "open of no bytes": lambda c: c.open("n"),
    "location": lambda c: c.location("k"),
    "location missing": lambda c: c.location("missing"),
    "evict": lambda c: c.evict("t"),
    "delete_prefix": lambda c: c.delete_prefix("k"),
    "expire": lambda c: c.expire(),
    "cull": lambda c: c.cull(),
    "volume": lambda c: c.volume(),
    "flush": lambda c: c.flush(),
    "check": lambda c: c.check(),
    "check fix": lambda c: c.check(fix=True),
    "stats": lambda c: c.stats(),
    "clear": lambda c: c.clear(),
}
CONTENT = {"k": b"value", "n": 5, "large": noise(2 * LARGE), "p": "popped", "d": 1.5, ("t", 1): None}
LOOKS = {"__contains__", "__len__"}  # need no await
NOT_CALLS = {"close", "closed", "directory", "settings", "from_config"}  # have tests of their own
CHANGES = {
    "set", "set stream", "set file", "set large", "add", "add new", "touch", "incr", "incr of no integer",
    "incr without default", "decr", "pop", "pop missing", "delete", "set_many", "set_many pairs",
    "set_many none", "delete_many", "delete_many none", "evict", "delete_prefix", "expire", "cull", "clear",
    "flush", "check fix",
}  # fmt: skip


def test_the_table_of_calls_is_complete() -> None:
    public = {name for name, _ in inspect.getmembers(AsyncDiskCache) if not name.startswith("_")}
    special = {"__aiter__", "__contains__", "__len__"}
    assert {name.split()[0] for name in CALLS} | NOT_CALLS == public | special
    assert set(CALLS) > CHANGES


@pytest.mark.parametrize("name", CALLS)
def test_each_call_answers_as_the_synchronous_one(
    open_cache: Open, tmp_path: Path, backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)

    async def main() -> None:
        with DiskCache(tmp_path / "sync", backend=backend, **SMALL) as plain:
            async with open_cache(**SMALL) as cache:
                for one in (plain, cache):
                    await described(one.set_many(CONTENT, tag="t"))
                if name == "stats":
                    left, right = plain.stats(), await cache.stats()
                    assert {**left.as_dict(), "backend_stats": {}} == {**right.as_dict(), "backend_stats": {}}
                else:
                    assert await outcome(CALLS[name], cache) == await outcome(CALLS[name], plain)
                assert (await cache.stats()).process == plain.stats().process
                assert await described(cache.entries()) == await described(plain.entries())

    run(main())


KEYS: list[Any] = ["a", "ab", "b", b"a", 1, 1.0, True, None, ("a",), ("a", 1), ("b", 2), "n", "missing"]


def draw_value(rng: random.Random) -> Any:
    size = rng.choice((0, 10, 300, LARGE - 1, LARGE, 3 * LARGE))
    return rng.choice((noise(size, rng.randrange(9)), rng.randrange(-9, 9), "text", {"a": [1, (2, 3)]}, None))


def draw_call(rng: random.Random) -> tuple[str, Callable[[Any], Any]]:
    """A call that both classes have, with its name and arguments for whoever reads a failure."""
    key, value = rng.choice(KEYS), draw_value(rng)
    expire = rng.choice((None, None, None, 5, 50, math.inf))
    tag, meta = rng.choice((None, "t", ("u", 1))), rng.choice((None, {"m": 1}, "m"))
    wrong = rng.randrange(40)  # one at most: which of several is told is nobody's business
    if wrong < 4:
        key, value = "k", 1
        key, value, expire, tag = [
            ([], value, expire, tag), (key, object(), expire, tag), (key, value, rng.choice((0, "x")), tag),
            (key, value, expire, []),
        ][wrong]  # fmt: skip
    some = [rng.choice(KEYS) for _ in range(rng.randrange(9))]
    data = noise(rng.choice((0, 10, LARGE, 5 * LARGE)), rng.randrange(9))
    calls: dict[str, tuple[int, tuple[Any, ...], Callable[[Any], Any]]] = {
        "get": (20, (key,), lambda c: c.get(key, "default")),
        "set": (20, (key, value, expire, tag, meta), lambda c: c.set(key, value, expire, tag, meta)),
        "set stream": (3, (key, len(data)), lambda c: c.set(key, io.BytesIO(data), expire, tag, meta)),
        "set iterator": (3, (key, len(data)), lambda c: c.set(key, iter([data, data]), expire, tag, meta)),
        "add": (6, (key, value, expire, tag), lambda c: c.add(key, value, expire, tag, meta)),
        "touch": (4, (key, expire), lambda c: c.touch(key, expire)),
        "incr": (5, (key,), lambda c: c.incr(key, 3, None if meta else 1)),
        "decr": (3, (key,), lambda c: c.decr(key, 2)),
        "pop": (5, (key,), lambda c: c.pop(key, "default")),
        "delete": (4, (key,), lambda c: c.delete(key)),
        "in": (3, (key,), lambda c: key in c),
        "len": (2, (), lambda c: len(c)),
        "get_many": (8, (some,), lambda c: c.get_many(some)),
        "set_many": (
            4,
            (some, value),
            lambda c: c.set_many([(one, value) for one in some], expire, tag, meta),
        ),
        "delete_many": (2, (some,), lambda c: c.delete_many(some)),
        "keys": (1, (), lambda c: c.keys()),
        "entries": (2, (tag,), lambda c: c.entries(tag=tag)),
        "get_entry": (4, (key,), lambda c: c.get_entry(key)),
        "open": (4, (key,), lambda c: c.open(key)),
        "location": (4, (key,), lambda c: c.location(key)),
        "evict": (1, (tag,), lambda c: c.evict(tag)),
        "delete_prefix": (1, (key,), lambda c: c.delete_prefix(key)),
        "expire": (1, (), lambda c: c.expire()),
        "check": (1, (), lambda c: c.check()),
        "clear": (0.2, (), lambda c: c.clear()),
    }
    name = rng.choices(list(calls), [weight for weight, _, _ in calls.values()])[0]
    return f"{name}{calls[name][1]!r:.200}", calls[name][2]


@pytest.mark.parametrize("memory", ["warm", "cold"])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_answer_as_the_synchronous_ones(
    open_cache: Open, tmp_path: Path, backend: str, seed: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, exceptions, hits, misses and all that is there in the end."""
    rng, clock = random.Random(seed), Clock(monkeypatch)

    async def main() -> None:
        with DiskCache(tmp_path / "sync", backend=backend, **SMALL) as plain:
            made = wrap_backends(monkeypatch, Watched) if memory == "cold" else []
            async with open_cache(**SMALL) as cache:
                for one in made:
                    one.cold = True  # type: ignore[attr-defined]
                for number in range(250):
                    label, call = draw_call(rng)
                    state = rng.getstate()
                    expected = await outcome(call, plain)
                    rng.setstate(state)
                    assert await outcome(call, cache) == expected, f"call {number}: {label}"
                    assert (await cache.stats()).process == plain.stats().process, f"call {number}: {label}"
                    clock.advance(rng.choice((0, 0.5, 3)))
                assert await described(cache.entries()) == await described(plain.entries())
                assert await cache.check() == plain.check() == []
                assert len(cache) == len(plain)

    run(main())


@pytest.mark.parametrize("length", [0, 10, LARGE - 1, LARGE, 3 * SEGMENT])
@pytest.mark.parametrize("kind", ["file", "iterator", "asynchronous"])
def test_set_from_a_stream(open_cache: Open, directory: Path, tmp_path: Path, length: int, kind: str) -> None:
    data = noise(length)
    path = tmp_path / "source"
    path.write_bytes(data)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            with path.open("rb") as file:
                source: Any = {
                    "file": file,
                    "iterator": (data[at : at + 777] for at in range(0, length, 777)),
                    "asynchronous": parts_of(data, 777),
                }[kind]
                assert await cache.set("k", source, tag="t", meta="m", expire=1000) is True
            assert await cache.get("k") == data
            entry = await cache.get_entry("k")
            assert entry is not None
            assert (entry.tag, entry.meta, entry.size) == ("t", "m", length)
            assert os.listdir(directory / "tmp") == []
            assert await cache.check() == []

    run(main())


def test_files_that_cannot_be_read_are_refused_with_a_remedy(open_cache: Open, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            with open(tmp_path / "file", "wb") as file:
                with pytest.raises(ValueError, match="^value is a file that is open for writing only: .*'rb'"):
                    await cache.set("k", file)
            with pytest.raises(ValueError, match="^value is a closed file: .*'rb'"):
                await cache.set("k", file)
            assert len(cache) == 0

    run(main())


def test_what_is_no_iterable_of_keys_or_pairs(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys("abc", 1))
            no_keys: list[Any] = ["abc", b"abc", bytearray(b"abc"), memoryview(b"abc"), 5, parts_of(b"abc", 1)]
            for keys in no_keys:
                for method in (cache.get_many, cache.delete_many):
                    with pytest.raises(TypeError, match="^keys must be an iterable of keys, not"):
                        await method(keys)
                with pytest.raises(TypeError, match="^items must be a mapping or an iterable of"):
                    await cache.set_many(keys)
            no_items: list[Any] = [["de"], iter(["de"]), [1, 2], iter([(1, 2, 3)]), [("d", 1), ("e",)]]
            for items in no_items:
                with pytest.raises((TypeError, ValueError), match=r"items\[[01]\] must be a \(key, value\) pair"):
                    await cache.set_many(items)
            assert len(cache) == 3
            with pytest.raises(TypeError, match="not reversible"):
                reversed(cache)  # type: ignore[call-overload]

    run(main())


@pytest.mark.parametrize("good", [10, 3 * SEGMENT])
@pytest.mark.parametrize("failure", ["raises", "text"])
def test_failing_stream_leaves_the_old_value(
    open_cache: Open, directory: Path, good: int, failure: str
) -> None:
    async def parts() -> AsyncIterator[Any]:
        yield noise(good)
        if failure == "raises":
            raise RuntimeError("mine")
        yield "text"

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", b"old")
            before = await cache.volume()
            with pytest.raises(RuntimeError if failure == "raises" else SerializationError):
                await cache.set("k", parts())
            assert await cache.get("k") == b"old"
            assert await cache.volume() == before
            assert os.listdir(directory / "tmp") == os.listdir(directory / "large") == []

    run(main())


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"max_in_flight": 1}])
def test_a_stream_may_come_from_the_cache_itself(open_cache: Open, options: dict[str, int]) -> None:
    """More copies at once than there are workers, or turns, or both."""

    async def copy(cache: AsyncDiskCache, number: int) -> None:
        async with await cache.open("source") as file:
            assert await cache.set(number, file) is True

    async def main() -> None:
        async with open_cache(**SMALL, **options) as cache:
            await cache.set("source", noise(5 * LARGE))
            await asyncio.gather(*(copy(cache, n) for n in range(40)))
            found = await cache.get_many(range(40))
            assert len(found) == 40 and set(found.values()) == {noise(5 * LARGE)}

    run(main())


def test_reader(open_cache: Open) -> None:
    data = noise((1 << 20) + 5)

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", data)
            async with await cache.open("k") as reader:
                assert await reader.read(10) == data[:10]
                assert reader.tell() == 10
                assert await reader.seek(-7, os.SEEK_END) == len(data) - 7
                assert await reader.read() == data[-7:]
                assert await reader.read() == b""
                await reader.seek(0)
                assert [len(chunk) async for chunk in reader] == [1 << 20, 5]
                await cache.delete("k")
                await reader.seek(3)
                assert await reader.read(3) == data[3:6]
            await reader.close()
            with pytest.raises(ValueError, match="closed"):
                await reader.read()

    run(main())


def test_entry_loads_when_it_is_awaited(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            await cache.set_many({"k": [1, 2], "l": 2})
            kept, gone = await cache.get_entry("k"), await cache.get_entry("l")
            assert isinstance(kept, AsyncEntry) and "'k'" in repr(kept)
            assert await kept.value == await kept.value == [1, 2]
            await cache.delete("k")
            assert await kept.value == [1, 2]  # it was loaded before
            await cache.set("l", 3)
            assert gone is not None
            with pytest.raises(EntryGone):
                await gone.value

    run(main())


def test_walks_in_parts(open_cache: Open) -> None:
    """Longer than what is fetched at once, while others change the cache, and given up half-way."""
    number = 3 * aio._WALK_BATCH + 7

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set_many((n, n) for n in range(number))
            assert sorted([key async for key in cache]) == list(range(number))
            assert sorted([await entry.value async for entry in cache.entries()]) == list(range(number))
            seen = []
            async for key in cache:
                await cache.delete(key)
                seen.append(key)
            assert sorted(seen) == list(range(number)) and len(cache) == 0
            await cache.set_many((n, n) for n in range(number))
            walk = cache.keys()
            await anext(walk)
            await walk.aclose()  # type: ignore[attr-defined]
            assert len(cache) == number

    run(main())


@pytest.mark.parametrize("suffix", ["mapping", "json"])
def test_from_config(directory: Path, tmp_path: Path, backend: str, suffix: str) -> None:
    options = {
        "cache_dir": str(directory),
        "max_disk_cache_size_mb": 64,
        "backend": backend,
        "max_in_flight": 7,
    }
    source: Any = {"cache": {"disk": options}}
    if suffix == "json":
        source = tmp_path / "config.json"
        source.write_text(json.dumps({"cache": {"disk": options}}))

    class Mine(AsyncDiskCache):
        pass

    async def main() -> None:
        async with Mine.from_config(source) as cache:
            assert type(cache) is Mine
            assert cache.directory == str(directory)
            assert (cache.settings.size_limit, cache.settings.max_in_flight) == (64 << 20, 7)
            assert (await cache.stats()).backend == backend

    run(main())
    with pytest.raises(ConfigurationError, match="nowhere.yaml"):
        AsyncDiskCache.from_config(tmp_path / "nowhere.yaml")


def test_pickling(open_cache: Open, backend: str) -> None:
    async def main() -> None:
        serializer = PickleSerializer(b"s" * 32)
        async with open_cache(eviction="fifo", max_in_flight=3, serializer=serializer) as cache:
            await cache.set("k", complex(1, 2))
            async with pickle.loads(pickle.dumps(cache)) as copy:
                assert type(copy) is AsyncDiskCache and copy.directory == cache.directory
                assert (copy.settings.eviction, copy.settings.max_in_flight) == ("fifo", 3)
                assert (await copy.stats()).backend == backend
                assert await copy.get("k") == complex(1, 2)
            assert await cache.get("k") == complex(1, 2)

    run(main())


def test_pickled_to_another_process(open_cache: Open) -> None:
    code = """
import asyncio, pickle, sys

async def main():
    async with pickle.loads(bytes.fromhex(sys.argv[1])) as cache:
        print(await cache.incr("k", 5))

asyncio.run(main())
"""

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)
            assert await asyncio.to_thread(run_python, code, pickle.dumps(cache).hex()) == "6\n"
            assert await cache.get("k") == 6

    run(main())


def test_properties(open_cache: Open, directory: Path) -> None:
    cache = open_cache(default_expire=60)
    assert not directory.exists()  # made by the first operation
    assert cache.directory == str(directory) and cache.settings.default_expire == 60
    assert str(directory) in repr(cache)
    assert not cache.closed and bool(cache)
    for look in (lambda: len(cache), lambda: "k" in cache):
        with pytest.raises(ClosedError, match="not open yet"):
            look()

    async def main() -> None:
        await cache.set("k", 1)
        assert "k" in cache and len(cache) == 1 and not cache.closed
        await cache.close()
        assert cache.closed and bool(cache)
        for look in (lambda: len(cache), lambda: "k" in cache):
            with pytest.raises(ClosedError, match="closed"):
                look()

    run(main())


@pytest.mark.parametrize("name", CALLS)
def test_read_only(open_cache: Open, directory: Path, name: str) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(CONTENT, tag="t")
        before = tree(directory)
        async with open_cache(read_only=True, **SMALL) as cache:
            found = await outcome(CALLS[name], cache)
            assert (isinstance(found, tuple) and found[0] is ReadOnlyError) == (name in CHANGES), found
            assert await cache.get("k") == b"value"
        assert tree(directory) == before

    run(main())


BAD_ARGUMENTS: list[tuple[Callable[[Any], Any], type[Exception]]] = [
    (lambda c: c.get({}), SerializationError),
    (lambda c: c.get_many(["k", {}, "l"]), SerializationError),
    (lambda c: c.set([], 1), SerializationError),
    (lambda c: c.set(math.nan, 1), SerializationError),
    (lambda c: c.set("x" * 70_000, 1), SerializationError),
    (lambda c: c.set("k", object()), SerializationError),
    (lambda c: c.set("k", iter([1])), SerializationError),
    (lambda c: c.set("k", io.StringIO("text")), SerializationError),
    (lambda c: c.set("k", 1, tag=[]), SerializationError),
    (lambda c: c.set("k", 1, meta=object()), SerializationError),
    (lambda c: c.set("k", 1, meta=b"x" * (2 << 20)), ValueTooLarge),
    (lambda c: c.set("k", iter([b"x"]), meta=b"x" * (2 << 20)), ValueTooLarge),
    (lambda c: c.set("k", bytes(20 << 20)), ValueTooLarge),
    (lambda c: c.set("k", io.BytesIO(bytes(20 << 20))), ValueTooLarge),
    (lambda c: c.set("k", 1, expire="5"), TypeError),
    (lambda c: c.set("k", iter([b"x"]), expire=-1), ValueError),
    (lambda c: c.set_many({"k": object()}), SerializationError),
    (lambda c: c.incr("k", 1.0), TypeError),
    (lambda c: c.incr("k", default=None), KeyError),
    (lambda c: c.delete_prefix(5), SerializationError),
    (lambda c: c.entries(tag=[]), SerializationError),
    (lambda c: c.location("k"), KeyError),
]


@pytest.mark.parametrize(("call", "kind"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(
    open_cache: Open, directory: Path, tmp_path: Path, backend: str, call: Any, kind: type[Exception]
) -> None:
    async def main() -> None:
        with DiskCache(tmp_path / "sync", backend=backend, **SMALL) as plain:
            async with open_cache(**SMALL) as cache:
                found = await outcome(call, cache)
                assert found == await outcome(call, plain)
                assert found[0] is kind
                assert len(cache) == 0 and await cache.check() == []
                assert os.listdir(directory / "tmp") == []

    run(main())


# -- hits in place --------------------------------------------------------------------------------


def by_hand(coroutine: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
    """Begin a coroutine without a task: (True, its result), or (False, None) if it suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return True, stop.value
    coroutine.close()
    return False, None


def needs_nowait(path: Path) -> None:
    """Skip where the system cannot say whether bytes are in memory."""
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no reads that don't wait here: {error}")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "value", [b"plain", "text", 5, {"a": [1]}, noise(LARGE - 1)], ids=lambda v: type(v).__name__
)
def test_a_warm_get_does_not_leave_the_task(open_cache: Open, tmp_path: Path, value: Any) -> None:
    needs_nowait(tmp_path / "probe")

    async def main() -> None:
        turns = 0

        def count() -> None:
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(count)

        async with open_cache() as cache:
            await cache.set("k", value)
            await cache.get("k")
            asyncio.get_running_loop().call_soon(count)
            cache._in_place = 0
            for _ in range(aio._YIELD_EVERY - 1):
                assert by_hand(cache.get("k")) == (True, value)
            assert turns == 0  # the loop did nothing meanwhile
            assert by_hand(cache.get("k")) == (False, None)  # others get their turn

    run(main())


def test_many_hits_in_place_let_others_run(open_cache: Open, tmp_path: Path) -> None:
    needs_nowait(tmp_path / "probe")

    async def main() -> None:
        turns, stopped = 0, False

        async def other() -> None:
            nonlocal turns
            while not stopped:
                turns += 1
                await asyncio.sleep(0)

        async with open_cache() as cache:
            await cache.set_many((n, b"x") for n in range(1000))
            await cache.get(0)
            cache._in_place = 0
            task = asyncio.create_task(other())
            seen = []
            for _ in range(5 * aio._YIELD_EVERY):
                assert await cache.get(0) == b"x"
                seen.append(turns)
            first = [seen.index(turn) + 1 for turn in sorted(set(seen)) if turn]
            assert first == [n * aio._YIELD_EVERY for n in range(1, 6)]
            before = turns
            assert len(await cache.get_many(range(1000))) == 1000
            assert turns - before >= 1000 // aio._YIELD_EVERY
            stopped = True
            await task

    run(main())


# -- the loop's thread ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(CALLS) - LOOKS))
def test_no_call_waits_in_the_thread_of_the_loop(open_cache: Open, watched: list[Watched], name: str) -> None:
    """With nothing in memory: neither opening, nor the call, nor closing."""
    loops = threading.get_ident()

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(CONTENT, tag="t")
        async with open_cache(durability="sync", **SMALL) as cache:
            await outcome(CALLS[name], cache)
            watched[-1].cold = True
            for _ in range(2):  # with segments that are not open, and with open ones
                await outcome(CALLS[name], cache)
            assert await cache.set("one", parts_of(noise(2 * LARGE))) is True

    run(main())
    for one in watched:
        assert one.made_by(loops) <= NEVER_WAIT
        assert {"open", "read", "write", "close_file"} <= {call for call, _ in one.calls}


@pytest.mark.parametrize(
    ("held", "call"),
    [
        ("read", lambda c: c.get("k")),
        ("read", lambda c: c.get("large")),
        ("open", lambda c: c.get("k")),
        ("read", lambda c: c.get_many(["k", "large"])),
        ("read", lambda c: c.open("large")),
        ("read", lambda c: c.location("k")),
        ("read", lambda c: c.pop("k")),
        ("write", lambda c: c.set("new", b"x")),
        ("sync", lambda c: c.set("new", b"x")),
        ("write", lambda c: c.set("new", noise(2 * LARGE))),
        ("write", lambda c: c.set("new", parts_of(noise(5 * LARGE)))),
        ("sync", lambda c: c.flush()),
        ("read", lambda c: c.check()),
        ("scandir", lambda c: c.check()),
    ],
)
def test_the_heart_beats_while_the_disk_is_slow(
    open_cache: Open, watched: list[Watched], held: str, call: Any
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(CONTENT, tag="t")
        async with open_cache(durability="sync", **SMALL) as cache:
            watched[-1].hold(held)
            task = asyncio.ensure_future(call(cache))
            await until(watched[-1].entered)
            await turns_of_the_loop()
            assert not task.done()
            watched[-1].go_on()
            await described(task)

    run(main())


def test_a_slow_close_and_a_slow_opening(open_cache: Open, watched: list[Watched], monkeypatch: Any) -> None:
    begun, go = threading.Event(), threading.Event()
    fetch = Index.fetch

    def slow(index: Index) -> None:
        begun.set()
        assert go.wait(LIMIT)
        fetch(index)

    monkeypatch.setattr(Index, "fetch", slow)

    async def main() -> None:
        cache = open_cache()
        task = asyncio.create_task(cache.set("k", 1))
        await until(begun)
        await turns_of_the_loop()
        assert not task.done()
        go.set()
        await task
        watched[-1].hold("sync")
        closing = asyncio.create_task(cache.close())
        await until(watched[-1].entered)
        await turns_of_the_loop()
        assert not closing.done() and cache.closed
        watched[-1].go_on()
        await closing

    run(main())


def test_closing_a_reader_that_is_still_reading(open_cache: Open, watched: list[Watched]) -> None:
    """The read was cancelled, but its worker goes on: the loop does not wait for it."""

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", noise(2 << 20))
            reader = await cache.open("k")
            watched[-1].hold("read")
            task = asyncio.create_task(reader.read())
            await until(watched[-1].entered)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            closing = asyncio.create_task(reader.close())
            await turns_of_the_loop()
            watched[-1].go_on()
            await closing
            with pytest.raises(ValueError, match="closed"):
                await reader.read()

    run(main())


# -- opening --------------------------------------------------------------------------------------


def test_opening_fetches_the_index_in_a_worker(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    fetch = Index.fetch

    def noted(index: Index) -> None:
        threads.append(threading.get_ident())
        fetch(index)

    monkeypatch.setattr(Index, "fetch", noted)

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)

    run(main())
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "mine"), CacheIOError(errno.EIO, "mine")], ids=["OSError", "CacheIOError"]
)
def test_an_index_that_cannot_be_fetched(open_cache: Open, monkeypatch: Any, error: OSError) -> None:
    def broken(index: Index) -> None:
        raise error

    async def main() -> None:
        async with open_cache() as cache:  # whatever is made once is made now
            await cache.set("k", 1)
        before = descriptors()
        cache = open_cache()
        with monkeypatch.context() as patch:
            patch.setattr(Index, "fetch", broken)
            for _ in range(2):
                with pytest.raises(CacheIOError, match="mine"):
                    await cache.get("k")
            with pytest.raises(CacheIOError):
                async with open_cache():
                    pass
        assert descriptors() == before
        assert await cache.get("k") == 1  # it may be tried again
        await cache.close()
        assert descriptors() == before

    run(main())


def test_many_tasks_open_once(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        cache = open_cache()
        assert await asyncio.gather(*(cache.incr("n") for _ in range(50))) != []
        assert await cache.get("n") == 50
        await cache.close()

    run(main())
    assert len(watched) == 1


def test_many_tasks_see_why_it_does_not_open(open_cache: Open, directory: Path) -> None:
    directory.mkdir()
    (directory / "foreign").write_text("x")

    async def main() -> None:
        cache = open_cache()
        found = await asyncio.gather(*(cache.get("k") for _ in range(20)), return_exceptions=True)
        assert {type(one).__name__ for one in found} == {"FormatError"}
        await cache.close()
        with pytest.raises(ClosedError):
            await cache.get("k")

    run(main())


@pytest.fixture
def slow_opening(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(set when an opening is under way, to be set to let it go on)."""
    begun, go = threading.Event(), threading.Event()
    begin = DiskCache._begin

    def slow(cache: DiskCache, settings: Any) -> None:
        begun.set()
        assert go.wait(LIMIT)
        begin(cache, settings)

    monkeypatch.setattr(DiskCache, "_begin", slow)
    return begun, go


def test_several_loops_open_once(
    open_cache: Open, watched: list[Watched], slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening
    cache = open_cache()
    everybody = threading.Barrier(4, action=go.set)
    results: list[Any] = []

    async def main() -> None:
        tasks = [asyncio.create_task(cache.add(("k", n), n)) for n in range(3)]
        await turns_of_the_loop()
        await asyncio.to_thread(everybody.wait, LIMIT)
        results.append(sum(await asyncio.gather(*tasks)))

    in_threads(4, lambda number: run(main()))
    assert sum(results) == 3 and len(watched) == 1
    run(cache.close())


@pytest.mark.parametrize("how", ["operation", "async with"])
def test_opening_that_is_cancelled_leaves_nothing(
    open_cache: Open, how: str, slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening

    async def use(cache: AsyncDiskCache) -> None:
        if how == "operation":
            await cache.set("k", 1)
        else:
            async with cache:
                raise AssertionError("it was cancelled before")

    async def main() -> None:
        go.set()
        async with open_cache() as cache:
            await cache.set("k", 0)
        go.clear()
        begun.clear()
        before = descriptors()
        cache = open_cache()
        task = asyncio.create_task(use(cache))
        await until(begun)
        task.cancel()
        await turns_of_the_loop()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        if how == "operation":
            assert await cache.get("k") == 0
        await cache.close()
        assert cache.closed and descriptors() == before

    run(main())


def test_closing_while_it_opens(
    open_cache: Open, slow_opening: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_opening

    async def main() -> None:
        go.set()
        async with open_cache():
            pass
        go.clear()
        begun.clear()
        before = descriptors()
        cache = open_cache()
        task = asyncio.create_task(cache.get("k"))
        await until(begun)
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        go.set()
        await closing
        with contextlib.suppress(ClosedError):
            assert await task is None
        assert descriptors() == before

    run(main())


# -- cancelling -----------------------------------------------------------------------------------


class CancelledAt:
    """Awaits a coroutine, and cancels its task where it suspends for the `at`-th time (from 1)."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int) -> None:
        self._coroutine, self._at = coroutine, at
        self.suspensions = 0

    def __await__(self) -> Iterator[Any]:
        inner = self._coroutine.__await__()
        step: Callable[[], Any] = lambda: next(inner)  # noqa: E731
        while True:
            try:
                waits_for = step()
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            if self.suspensions == self._at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield waits_for
            except BaseException as error:
                step = lambda error=error: inner.throw(error)  # noqa: E731
            else:
                step = lambda: next(inner)  # noqa: E731


OLD: dict[Any, Any] = {
    "k": b"old",
    "n": 5,
    "large": noise(2 * LARGE),
    **{i: noise(100, i) for i in range(20)},
}
NEW = noise(3 * LARGE, 1)
# What is called, and by what its key may be replaced.
CANCELLED: dict[str, tuple[Callable[[AsyncDiskCache], Any], dict[Any, Any]]] = {
    "get": (lambda c: c.get("k"), {}),
    "get large": (lambda c: c.get("large"), {}),
    "get_many": (lambda c: c.get_many([*range(20), "large", 3]), {}),
    "get_entry": (lambda c: c.get_entry("k"), {}),
    "location": (lambda c: c.location("large"), {}),
    "open": (lambda c: c.open("large"), {}),
    "set": (lambda c: c.set("k", b"new"), {"k": b"new"}),
    "set large": (lambda c: c.set("k", NEW), {"k": NEW}),
    "set file": (lambda c: c.set("k", io.BytesIO(NEW)), {"k": NEW}),
    "set asynchronous": (lambda c: c.set("k", parts_of(NEW)), {"k": NEW}),
    "add": (lambda c: c.add("new", b"new"), {"new": b"new"}),
    "pop": (lambda c: c.pop("large"), {"large": None}),
    "incr": (lambda c: c.incr("n"), {"n": 6}),
    "delete": (lambda c: c.delete("k"), {"k": None}),
    "set_many": (lambda c: c.set_many({"k": b"new", "n": 6}), {"k": b"new", "n": 6}),
    "delete_many": (lambda c: c.delete_many(["k", "n"]), {"k": None, "n": None}),
    "check": (lambda c: c.check(), {}),
}


def assert_free(cache: AsyncDiskCache) -> None:
    """All turns of the running loop are free, and nobody waits for one."""
    turns = cache._loops[asyncio.get_running_loop()].turns
    assert turns._free == cache.settings.max_in_flight
    assert not [turn for turn in turns._waiting if not turn.done()]


async def close_result(value: Any) -> None:
    if isinstance(value, AsyncValueReader):
        await value.close()
    elif isinstance(value, Location):
        value.close()


def assert_old_or_new(directory: Path, backend: str, new: dict[Any, Any]) -> None:
    """The cache was closed: each entry is as it was or as it was to be, and nothing else is there."""
    with DiskCache(directory, backend=backend, **SMALL) as cache:
        for key in {*OLD, *new}:
            assert cache.get(key) in (OLD.get(key), new.get(key, OLD.get(key))), key
        assert cache.check() == []
        large = sum(isinstance(value := cache.get(key), bytes) and len(value) >= LARGE for key in cache)
    assert len(os.listdir(directory / "large")) == large
    assert os.listdir(directory / "tmp") == []


@pytest.mark.parametrize("name", CANCELLED)
def test_cancelled_at_every_suspension(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str
) -> None:
    call, new = CANCELLED[name]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before, at, done = descriptors(), 0, False
        while not done:
            at += 1
            async with open_cache(max_in_flight=3, **SMALL) as cache:
                watched[-1].cold = True
                await cache.get("n")
                counted = CancelledAt(call(cache), at)

                async def operation(counted: Any = counted) -> None:
                    await close_result(await counted)

                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.create_task(operation())
                done = counted.suspensions < at
                await turns_of_the_loop(3)  # `get_many` cancels its reads, which leave one turn later
                assert_free(cache)
                assert await cache.set("works", b"still") is True
                assert await cache.get("works") == b"still"
                stats = (await cache.stats()).process
                assert stats["hits"] + stats["misses"] <= 2 + 22
                await cache.delete("works")
            assert descriptors() == before
            with DiskCache(directory, backend=backend, **SMALL) as cache:
                assert all(cache.get(key) in (OLD.get(key), value) for key, value in new.items())
                cache.delete("new")
                cache.set_many(OLD)
        assert at > 1 and at < 60
        assert_old_or_new(directory, backend, new)

    run(main())


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("get", "read"), ("get large", "read"), ("get large", "close_file"), ("get_many", "read"),
        ("get_entry", "read"), ("location", "read"), ("open", "read"), ("set", "write"),
        ("set large", "write"), ("set large", "replace"), ("set file", "write"), ("set file", "replace"),
        ("set asynchronous", "write"), ("set asynchronous", "replace"), ("add", "write"), ("pop", "read"),
        ("pop", "unlink"), ("incr", "write"), ("set_many", "write"), ("check", "scandir"),
    ],
)  # fmt: skip
def test_cancelled_while_a_worker_is_at_it(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str, held: str
) -> None:
    """One that only reads ends at once, and its worker before the cache is closed; a change with its worker."""
    call, new = CANCELLED[name]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before = descriptors()
        async with open_cache(**SMALL) as cache:
            watched[-1].cold = True
            watched[-1].hold(held)
            task = asyncio.ensure_future(call(cache))
            await until(watched[-1].entered)
            task.cancel()
            if new:
                await asyncio.wait({task}, timeout=0.05)  # what must not happen would happen in this time
                task.cancel()  # nobody gets out by asking twice
                await turns_of_the_loop()
                assert not task.done()
                watched[-1].go_on()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_free(cache)
            watched[-1].go_on()
            assert await cache.get(7) == OLD[7]
            await cache.set("works", b"still")
            assert await cache.get("works") == b"still"
            await cache.delete("works")
        assert descriptors() == before

    run(main())
    assert_old_or_new(directory, backend, new)


@pytest.mark.parametrize(
    ("name", "held"), [("add", "write"), ("set file", "replace"), ("set large", "write"), ("pop", "unlink")]
)
def test_closing_waits_for_workers_of_cancelled_calls(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], name: str, held: str
) -> None:
    call, new = CANCELLED[name]

    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(OLD)
        watched[-1].hold(held)
        task = asyncio.ensure_future(call(cache))
        await until(watched[-1].entered)
        task.cancel()
        closing = asyncio.create_task(cache.close())
        await asyncio.wait({closing}, timeout=0.05)  # what must not happen would happen in this time
        assert not cache._sync().closed
        watched[-1].go_on()
        await closing
        assert task.cancelled()

    run(main())
    assert_old_or_new(directory, backend, new)


def test_cancelling_a_set_whose_stream_has_stalled(open_cache: Open, directory: Path) -> None:
    """Nothing more may ever come: neither the worker nor closing waits for it."""

    async def main() -> None:
        reached, never = asyncio.Event(), asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield noise(2 * LARGE)
            reached.set()
            await never.wait()

        before = threading.active_count()
        cache = open_cache(**SMALL)
        await cache.set("k", b"old")
        volume = await cache.volume()
        task = asyncio.create_task(cache.set("k", parts()))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cache.get("k") == b"old"
        await asyncio.wait_for(cache.close(), 10)
        assert os.listdir(directory / "tmp") == os.listdir(directory / "large") == []
        assert threading.active_count() <= before + 2  # the loop's own
        async with open_cache(**SMALL) as cache:
            assert await cache.volume() <= volume
            assert await cache.get("k") == b"old" and await cache.check() == []

    run(main())


def test_cancelled_while_it_waits_for_its_turn(open_cache: Open, watched: list[Watched]) -> None:
    """Those behind it move up, also when it is cancelled in the moment in which its turn comes."""

    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].hold("write")
            first = asyncio.create_task(cache.add("first", 1))
            await until(watched[-1].entered)
            second, third = (
                asyncio.create_task(cache.add("second", 2)),
                asyncio.create_task(cache.add("third", 3)),
            )
            await turns_of_the_loop()
            second.cancel()
            fourth = asyncio.create_task(cache.add("fourth", 4))
            watched[-1].go_on()
            assert await asyncio.gather(first, third, fourth) == [True] * 3
            assert second.cancelled() and "second" not in cache

            turns = cache._loops[asyncio.get_running_loop()].turns
            assert turns.enter()
            fifth, sixth = (
                asyncio.create_task(cache.add("fifth", 5)),
                asyncio.create_task(cache.add("sixth", 6)),
            )
            await turns_of_the_loop()
            turns.leave()
            fifth.cancel()  # it has its turn, and does not know it yet
            assert await sixth and fifth.cancelled() and "fifth" not in cache
            assert_free(cache)

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_cancellations(
    open_cache: Open, directory: Path, backend: str, watched: list[Watched], seed: int
) -> None:
    rng = random.Random(seed)
    keys = [f"k{n}" for n in range(12)]
    tried: dict[Any, set[Any]] = {key: {None} for key in keys}
    certain: collections.Counter[str] = collections.Counter()
    perhaps: collections.Counter[str] = collections.Counter()
    gets = 0

    def draw(cache: AsyncDiskCache, number: int) -> Any:
        nonlocal gets
        key = rng.choice(keys)
        value = noise(rng.choice((10, 1000, LARGE + number)), number)
        kind = rng.randrange(9)
        if kind < 3:
            gets += 1
            return cache.get(key)
        if kind == 3:
            gets += 3
            return cache.get_many(rng.sample(keys, 3))
        if kind == 4:
            return cache.incr("n")
        if kind == 5:
            return cache.delete(key)
        tried[key].add(value)
        if kind == 6:
            return cache.add(key, value)
        return cache.set(key, value if kind == 7 else parts_of(value))

    async def one(cache: AsyncDiskCache, number: int) -> None:
        call = draw(cache, number)
        name = call.__name__
        task = asyncio.ensure_future(call)
        if rng.random() < 0.6:
            await turns_of_the_loop(rng.randrange(12))
            task.cancel()
        found = (await asyncio.gather(task, return_exceptions=True))[0]
        perhaps[name] += 1
        if isinstance(found, asyncio.CancelledError):
            return
        certain[name] += 1
        assert not isinstance(found, BaseException), found
        if name == "get":
            assert any(found in values for values in tried.values())
        elif name == "get_many":
            assert all(value in tried[key] for key, value in found.items())

    async def main() -> None:
        async with open_cache(**SMALL):
            pass
        before = descriptors()
        async with open_cache(max_in_flight=5, **SMALL) as cache:
            watched[-1].cold = seed % 2 == 0
            await asyncio.gather(*(one(cache, number) for number in range(400)))
            await turns_of_the_loop(3)
            assert_free(cache)
            stats = (await cache.stats()).process
            assert stats["hits"] + stats["misses"] <= gets
        assert descriptors() == before
        with DiskCache(directory, backend=backend, **SMALL) as cache:
            assert all(cache.get(key) in tried[key] for key in keys)
            assert certain["incr"] <= cache.get("n", 0) <= perhaps["incr"]
            assert 0 < certain["set"] < perhaps["set"]
            assert cache.check() == []
        assert os.listdir(directory / "tmp") == []

    run(main())


# -- nothing more happens once the cancellation has come up ---------------------------------------

# Every change, of keys that `OLD` has.
ALTERATIONS: dict[str, Callable[[AsyncDiskCache], Any]] = {
    "set": lambda c: c.set("k", b"stale"),
    "set large": lambda c: c.set("k", NEW),
    "set file": lambda c: c.set("k", io.BytesIO(NEW)),
    "set iterator": lambda c: c.set("k", iter([NEW])),
    "set short iterator": lambda c: c.set("k", iter([b"stale"])),
    "set asynchronous": lambda c: c.set("k", parts_of(NEW)),
    "set_many": lambda c: c.set_many({"k": b"stale", "n": 7}),
    "set_many pairs": lambda c: c.set_many(iter([("k", NEW), ("n", 7)])),
    "add": lambda c: c.add("absent", 1),
    "add large": lambda c: c.add("absent", NEW),
    "incr": lambda c: c.incr("n"),
    "decr": lambda c: c.decr("n"),
    "touch": lambda c: c.touch("k", 0.001),
    "pop": lambda c: c.pop("k"),
    "pop large": lambda c: c.pop("large"),
    "delete": lambda c: c.delete("k"),
    "delete_many": lambda c: c.delete_many(["k", "n"]),
    "delete_many iterator": lambda c: c.delete_many(iter(["k", "n"])),
    "evict": lambda c: c.evict("tag"),
    "delete_prefix": lambda c: c.delete_prefix("k"),
    "clear": lambda c: c.clear(),
    "check": lambda c: c.check(fix=True),
}


@contextlib.contextmanager
def locked_by_others(directory: Path) -> Iterator[None]:
    """The cache's lock is taken, as by another process that is stopped."""
    fd = os.open(directory / "lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


async def ends_soon(task: asyncio.Future[Any]) -> None:
    """Cancel a task, which ends long before the lock is given up."""
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=LIMIT / 3)
    assert done and task.cancelled()


async def given_up_threads() -> None:
    """Until what was cancelled has ended in its threads too."""
    for thread in threading.enumerate():
        if thread.name == "yatagarasu-stream":
            await asyncio.to_thread(thread.join, LIMIT)


async def expect_old(cache: AsyncDiskCache) -> None:
    assert await cache.get_many(list(OLD)) == OLD and await cache.get("absent") is None


@pytest.mark.parametrize("name", ALTERATIONS)
def test_cancelled_while_others_have_the_lock(open_cache: Open, directory: Path, name: str) -> None:
    """Nobody waits for those, and what was cancelled is not done when they give it back."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.set("k", OLD["k"], tag="tag")
            with locked_by_others(directory):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(ALTERATIONS[name](cache), 0.1)
                await expect_old(cache)
            assert await cache.incr("others") == 1
            await given_up_threads()
            await expect_old(cache)
            assert await cache.set("k", b"fresh") and await cache.incr("n") == 6
            assert_free(cache)
            await asyncio.sleep(0.05)  # what must not happen would happen in this time
            assert await cache.get("k") == b"fresh" and await cache.get("n") == 6
            assert await cache.check() == []

    run(main())
    with DiskCache(directory, **SMALL) as after:
        assert after.get_many([*OLD, "absent"]) == {**OLD, "k": b"fresh", "n": 6} and after.check() == []
    assert os.listdir(directory / "tmp") == [] and len(os.listdir(directory / "large")) == 1


@pytest.mark.parametrize(
    ("waiting", "cancelled"),
    [
        ("incr", "add"), ("incr", "set"), ("incr", "set_many"), ("incr", "set file"), ("touch", "delete"),
        ("touch", "incr"), ("delete", "delete_many"), ("set_many", "incr"), ("set", "pop"), ("add", "set large"),
    ],
)  # fmt: skip
def test_cancelled_behind_another_that_waits_for_the_lock(
    open_cache: Open, directory: Path, waiting: str, cancelled: str
) -> None:
    """The one that waits keeps the locks of threads meanwhile, for which the other is waiting."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many({**OLD, "absent": 1})
            await cache.delete("absent")
            with locked_by_others(directory):
                first = asyncio.ensure_future(ALTERATIONS[waiting](cache))
                await asyncio.sleep(0.05)
                second = asyncio.ensure_future(ALTERATIONS[cancelled](cache))
                await asyncio.sleep(0.05)
                await ends_soon(second)
                await expect_old(cache)
                assert not first.done()
            await first
            await given_up_threads()
            found = await cache.get_many([*OLD, "absent"])
            assert await cache.check() == []

        expected = open_cache(**SMALL)
        await expected.clear()
        await expected.set_many(OLD)
        await ALTERATIONS[waiting](expected)
        await asyncio.sleep(0.01)  # the time to live that `touch` gives
        assert {**found, "k": None} == {**await expected.get_many([*OLD, "absent"]), "k": None}
        if waiting != "touch":
            assert found.get("k") == await expected.get("k")
        await expected.close()

    run(main())


def test_of_a_batch_some_are_cancelled_while_it_waits_for_the_lock(
    open_cache: Open, directory: Path
) -> None:
    """These end at once, those that asked with them are stored when the lock is had: in their order."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys(range(12), b"old"))
            with locked_by_others(directory):
                values = [(n % 12, b"%d" % n if n % 5 else noise(2 * LARGE, n)) for n in range(48)]
                tasks = [asyncio.ensure_future(cache.set(key, value)) for key, value in values]
                await asyncio.sleep(0.05)
                for task in tasks[::3]:
                    await ends_soon(task)
                last = asyncio.ensure_future(cache.set(1, b"last"))
                assert not any(task.done() for task in [last, *tasks[1::3], *tasks[2::3]])
            assert await asyncio.gather(last, *tasks[1::3], *tasks[2::3]) == [True] * 33
            expected = dict.fromkeys(range(12), b"old")
            expected.update((key, value) for n, (key, value) in enumerate(values) if n % 3)
            assert await cache.get_many(range(12)) == {**expected, 1: b"last"}
            assert_free(cache)
            assert await cache.check() == []

    run(main())


def test_those_of_a_batch_wait_for_the_lock_together(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    timed_out = FileLock._timed_out

    def noted(lock: FileLock, holder: str) -> LockTimeout:
        waited.append(holder)
        return timed_out(lock, holder)

    monkeypatch.setattr(FileLock, "_timed_out", noted)

    async def main() -> None:
        async with open_cache(lock_timeout=0.1, **SMALL) as cache:
            await cache.set("k", b"old")
            with locked_by_others(directory):
                sets = (cache.set("k", b"%d" % n) for n in range(20))
                found = await asyncio.gather(*sets, return_exceptions=True)
            assert {type(error) for error in found} == {LockTimeout} and len(waited) == 1
            assert await cache.get("k") == b"old" and await cache.set("k", b"new")

    run(main())


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("set", "put_at_once"), ("set large", "_put_pointer"), ("set file", "_put_pointer"),
        ("set iterator", "_put_pointer"), ("set short iterator", "put"), ("set asynchronous", "_put_pointer"),
        ("set_many", "put_many"), ("set_many pairs", "put_many"), ("add", "change"), ("incr", "change"),
        ("touch", "touch"), ("pop", "delete"), ("delete_many", "remove_keys"), ("evict", "remove"),
        ("clear", "clear"),
    ],
)  # fmt: skip
def test_what_has_begun_is_waited_for(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    """And whatever is changed once its cancellation has come up is changed for good."""
    reached, go, inner = threading.Event(), threading.Event(), getattr(Store, where)

    def held(store: Store, *args: Any) -> Any:
        if not reached.is_set():
            reached.set()
            assert go.wait(LIMIT / 2)
        return inner(store, *args)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.set("k", OLD["k"], tag="tag")
            monkeypatch.setattr(Store, where, held)
            task = asyncio.ensure_future(ALTERATIONS[name](cache))
            await until(reached)
            for _ in range(3):
                task.cancel()
                await turns_of_the_loop()
            await asyncio.wait({task}, timeout=0.05)  # what must not happen would happen in this time
            assert not task.done()
            await expect_old(cache)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await cache.set_many({"k": b"fresh", "n": 100})
            assert await cache.delete("absent") in (True, False)
            await given_up_threads()
            await asyncio.sleep(0.02)
            assert await cache.get_many(["k", "n", "absent"]) == {"k": b"fresh", "n": 100}
            assert_free(cache)

    run(main())
    with DiskCache(directory, **SMALL) as after:
        assert after.get("k") == b"fresh" and after.check() == []


def have_cleaning_wait(
    cache: AsyncDiskCache, directory: Path, lock: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch,
    *, once: bool = False,
) -> threading.Event:  # fmt: skip
    """From now on a change has to wait for others, who then have `lock`, to clean up behind itself; `once`: the
    next part need not. What is set when it does."""
    reached = threading.Event()

    def cleaning(upkeep: Upkeep, _budget: int) -> None:
        if not reached.is_set():
            lock.enter_context(locked_by_others(directory))
            reached.set()
        try:
            with cache._sync()._store.locks.index:
                pass
        finally:
            if once:
                lock.close()

    monkeypatch.setattr(cache._sync()._store.pace, "work", partial(cleaning, cache._sync()._store.upkeep))
    cache._sync()._store.pace._unpaced = 1 << 30
    return reached


@pytest.mark.parametrize("name", ["set", "set large", "set iterator", "set_many", "incr", "add", "pop", "delete"])
def test_cancelled_while_it_cleans_up_behind_itself(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The change is made, and has to wait for others only to clean up: nobody waits for that."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            reached = have_cleaning_wait(cache, directory, lock, monkeypatch)
            task = asyncio.ensure_future(ALTERATIONS[name](cache))
            await until(reached)
            await asyncio.sleep(0.05)
            await ends_soon(task)
            changed = await cache.get_many([*OLD, "absent"])
            assert changed != OLD
            lock.close()
            await cache.incr("others")
            assert await cache.get_many([*OLD, "absent"]) == changed and await cache.check() == []

    with contextlib.ExitStack() as lock:
        run(main())


@pytest.mark.parametrize("name", ["delete_many", "set_many"])
def test_no_part_follows_one_whose_cleaning_up_was_given_up(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys(range(1000), b"old"))
            reached = have_cleaning_wait(cache, directory, lock, monkeypatch, once=True)
            new = dict.fromkeys(range(1000), noise(500))
            call = cache.delete_many(list(new)) if name == "delete_many" else cache.set_many(new)
            task = asyncio.ensure_future(call)
            await until(reached)
            await ends_soon(task)
            found = await cache.get_many(range(1000))
            untouched = sum(value == b"old" for value in found.values())
            assert 0 < untouched < 1000
            await asyncio.sleep(0.05)
            assert await cache.get_many(range(1000)) == found

    with contextlib.ExitStack() as lock:
        run(main())


def test_cancelled_while_a_removal_is_made_durable(
    open_cache: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the entry had on the disk goes all the same."""
    reached, sync = threading.Event(), ChangeLog.sync

    def held(changes: ChangeLog, *args: Any) -> None:
        with locked_by_others(directory):
            reached.set()
            sync(changes, *args)

    async def main() -> None:
        async with open_cache(durability="sync", **SMALL) as cache:
            await cache.set_many(OLD)
            monkeypatch.setattr(ChangeLog, "sync", held)
            task = asyncio.ensure_future(cache.delete("large"))
            await until(reached)
            await asyncio.sleep(0.05)
            await ends_soon(task)
            assert await cache.get("large") is None

    run(main())
    assert os.listdir(directory / "large") == []
    with DiskCache(directory, **SMALL) as after:
        assert after.get("large") is None and after.check() == []


def test_what_has_not_begun_never_does(open_cache: Open, watched: list[Watched]) -> None:
    """All workers are busy: others end as soon as they are cancelled."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].hold("write")
            busy = [asyncio.ensure_future(cache.incr("busy")) for _ in range(DEFAULT_WORKERS)]
            await until(watched[-1].entered)
            await turns_of_the_loop()
            for name in ("incr", "set", "set_many", "delete", "pop"):
                task = asyncio.ensure_future(ALTERATIONS[name](cache))
                await turns_of_the_loop(5)
                await ends_soon(task)
            watched[-1].go_on()
            assert sorted(await asyncio.gather(*busy)) == list(range(1, DEFAULT_WORKERS + 1))
            await expect_old(cache)

    run(main())


def test_the_end_of_a_stream_that_was_cancelled(open_cache: Open, directory: Path) -> None:
    """It comes, and the stream is whole: it is not stored all the same."""
    waits, go = threading.Event(), threading.Event()

    def parts(size: int) -> Iterator[bytes]:
        yield noise(size)
        waits.set()
        go.wait(LIMIT)

    async def main() -> None:
        for size in (10, 3 * LARGE):
            waits.clear()
            go.clear()
            async with open_cache(**SMALL) as cache:
                await cache.set("k", b"old")
                task = asyncio.ensure_future(cache.set("k", parts(size)))
                await until(waits)
                await ends_soon(task)
                await cache.set("k", b"fresh")
                go.set()
                await given_up_threads()
                assert await cache.get("k") == b"fresh"
        assert os.listdir(directory / "tmp") == os.listdir(directory / "large") == []

    run(main())


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda c: c.delete_many(range(1000)), "_remove_batch"), (lambda c: c.evict("tag"), "_remove_batch"),
        (lambda c: c.delete_prefix(""), "_remove_batch"),
        (lambda c: c.set_many({f"k{n}": noise(1000) for n in range(1000)}), "put_batch"),
    ],
)  # fmt: skip
def test_a_long_change_ends_between_its_parts(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch, call: Callable[[AsyncDiskCache], Any], part: str
) -> None:
    reached, go, inner = threading.Event(), threading.Event(), getattr(Store, part)
    parts: list[Any] = []

    def held(store: Store, *args: Any) -> Any:
        parts.append(args)
        reached.set()
        assert go.wait(LIMIT / 2)
        return inner(store, *args)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(dict.fromkeys([*range(1000), *(f"k{n}" for n in range(1000))], b""), tag="tag")
            monkeypatch.setattr(Store, part, held)
            task = asyncio.ensure_future(call(cache))
            await until(reached)
            task.cancel()
            await turns_of_the_loop()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(parts) == 1
            assert await cache.check() == []

    run(main())


def test_a_loop_that_ends_while_changes_wait_for_the_lock(open_cache: Open, directory: Path) -> None:
    caches: list[AsyncDiskCache] = []

    async def main() -> list[asyncio.Future[Any]]:
        cache = open_cache(**SMALL)
        caches.append(cache)
        await cache.set_many(OLD)
        lock.enter_context(locked_by_others(directory))
        tasks = [asyncio.ensure_future(ALTERATIONS[name](cache)) for name in ("incr", "set", "set file", "delete")]
        await asyncio.sleep(0.05)
        return tasks

    with contextlib.ExitStack() as lock:
        assert all(task.cancelled() for task in run(main()))  # `asyncio.run` cancels what is left
    run(caches[0].close())
    with DiskCache(directory, **SMALL) as after:
        assert after.get_many([*OLD]) == OLD and after.check() == []


@pytest.mark.parametrize("name", ["set iterator", "set_many", "pop", "set file", "set", "incr"])
def test_changes_that_ran_out_of_time(open_cache: Open, name: str) -> None:
    """At whichever moment that was: what is stored afterwards stays."""
    stale = noise(1 << 20)
    calls: dict[str, Callable[[AsyncDiskCache], Any]] = {
        **ALTERATIONS,
        "set iterator": lambda c: c.set("k", iter([stale])),
        "set file": lambda c: c.set("k", io.BytesIO(stale)),
        "set_many": lambda c: c.set_many({"k": stale}),
    }

    async def main() -> None:
        async with open_cache(size_limit=256 << 20) as cache:
            for number in range(60):
                await cache.set_many({"k": b"first", "n": 0})
                try:
                    await asyncio.wait_for(calls[name](cache), number * 3e-5)
                except asyncio.TimeoutError:
                    await cache.set("k", b"fresh")
                    await cache.set_many({"n": 10})
                    await asyncio.sleep(0.01)
                    assert await cache.get("k") == b"fresh" and await cache.get("n") == 10

    run(main())


# -- as many at once as is allowed ----------------------------------------------------------------


def test_never_more_under_way_than_allowed(
    open_cache: Open, watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    put_batch = aio._Loop._put_batch

    def noted(state: Any, call: Any, puts: list[Any]) -> Any:
        batches.append(len(puts))
        return put_batch(state, call, puts)

    monkeypatch.setattr(aio._Loop, "_put_batch", noted)

    async def main() -> None:
        async with open_cache(max_in_flight=4, **SMALL) as cache:
            assert await asyncio.gather(*(cache.set(n, noise(50, n)) for n in range(1000))) == [True] * 1000
            assert max(batches) <= 4
            watched[-1].cold = True
            watched[-1].most = 0
            found = await asyncio.gather(*(cache.get(n) for n in range(1000)))
            assert found == [noise(50, n) for n in range(1000)]
            assert len(await cache.get_many(range(1000))) == 1000
            assert await asyncio.gather(*(cache.delete(n) for n in range(300))) == [True] * 300
            assert watched[-1].most == 4
            assert_free(cache)

    run(main())


def test_in_order_of_arrival(open_cache: Open, watched: list[Watched]) -> None:
    """Whoever comes later does not overtake those who wait, whatever is asked for."""
    order: list[int] = []

    async def one(cache: AsyncDiskCache, number: int) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: cache.get(7),
            lambda: cache.add(("new", number), 1),
            lambda: cache.set(("set", number), b"x"),
        ]
        await calls[number % 3]()
        order.append(number)
        if number < 100:
            later.append(asyncio.create_task(one(cache, number + 100)))

    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].cold = True
            for other in [asyncio.create_task(one(cache, number)) for number in range(100)]:
                await other
            await asyncio.gather(*later)

    later: list[asyncio.Task[None]] = []
    run(main())
    assert order == list(range(200))


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", True, 1 << 31])
def test_max_in_flight_is_checked(open_cache: Open, directory: Path, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_in_flight"):
        open_cache(max_in_flight=value)
    assert not directory.exists()


# -- loops and closing ----------------------------------------------------------------------------


def in_threads(number: int, work: Callable[[int], Any]) -> None:
    """`work(0)`, `work(1)`, ... each in a thread; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(which: int) -> None:
        try:
            work(which)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("memory", ["warm", "cold"])
def test_several_loops_at_once(open_cache: Open, watched: list[Watched], memory: str) -> None:
    cache = open_cache(max_in_flight=10, **SMALL)
    run(cache.set_many((n, noise(200, n)) for n in range(50)))
    watched[-1].cold = memory == "cold"

    async def one(rng: random.Random, which: int) -> None:
        for number in range(15):
            key = rng.randrange(50)
            assert await cache.get(key) == noise(200, key)
            await cache.incr("n")
            await cache.set((which, number), noise(100, number))
            assert await cache.get((which, number)) == noise(100, number)

    async def main(which: int) -> None:
        await asyncio.gather(*(one(random.Random(f"{which} {n}"), (which, n)) for n in range(4)))  # type: ignore[arg-type]

    in_threads(4, lambda which: run(main(which)))

    async def end() -> None:
        assert await cache.get("n") == 4 * 4 * 15
        stats = (await cache.stats()).process
        assert (stats["hits"], stats["misses"]) == (2 * 4 * 4 * 15 + 1, 0)
        assert await cache.check() == []
        await cache.close()

    run(end())


def test_one_object_in_one_loop_after_the_other(open_cache: Open) -> None:
    """Loops that were closed are forgotten; one that ended in the middle of its work too."""
    cache = open_cache(**SMALL)
    run(cache.set_many(OLD))
    before = descriptors()
    for number in range(5):

        async def abandoned(number: int = number) -> None:
            asyncio.ensure_future(cache.set(("left", number), b"x"))
            asyncio.ensure_future(cache.get_many(list(OLD)))
            await asyncio.sleep(0)

        assert run(cache.incr("n")) == 6 + number
        run(abandoned())
        assert len(cache._loops) <= 1
    assert run(cache.get("k")) == b"old"
    assert descriptors() <= before + 2  # segments begun since
    assert run(cache.check()) == []
    run(cache.close())


class IntrudedLoop(asyncio.SelectorEventLoop):
    """A loop that lets others in when it is asked whether it is closed."""

    intrusion: Callable[[], Any] | None = None

    def is_closed(self) -> bool:
        intrusion, self.intrusion = self.intrusion, None
        if intrusion is not None:
            intrusion()
        return super().is_closed()


def test_loops_that_come_while_others_are_forgotten(open_cache: Open) -> None:
    """Two threads with new loops find the same closed one."""
    cache = open_cache()
    first = IntrudedLoop()
    first.run_until_complete(cache.set("k", 1))
    first.close()
    first.intrusion = lambda: in_threads(1, lambda _: run(cache.add("l", 2)))
    assert run(cache.add("m", 3)) is True
    assert first.intrusion is None
    assert run(cache.get_many(list("klm"))) == {"k": 1, "l": 2, "m": 3}
    assert first not in cache._loops
    run(cache.close())


@pytest.mark.parametrize("name", CALLS)
def test_closed(open_cache: Open, name: str) -> None:
    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(CONTENT, tag="t")
        await cache.get("k")
        await cache.close()
        assert (await outcome(CALLS[name], cache))[0] is ClosedError
        fresh = open_cache(**SMALL)
        await fresh.close()
        assert (await outcome(CALLS[name], fresh))[0] is ClosedError
        for closed in (cache, fresh):
            with pytest.raises(ClosedError):
                async with closed:
                    pass

    run(main())


def test_closed_in_another_loop(open_cache: Open) -> None:
    """Whoever still has the object is told, and no thread is started for that."""

    def workers() -> list[threading.Thread]:
        found = [thread for thread in threading.enumerate() if "yatagarasu" in thread.name]
        for thread in found:
            if thread.name != "yatagarasu-worker":  # has delivered what it did, and is about to end
                thread.join(LIMIT)
        return [thread for thread in found if thread.is_alive()]

    async def main() -> None:
        before = workers()
        cache = open_cache()
        await cache.add("k", 1)
        entry = await cache.get_entry("k")
        assert entry is not None
        await asyncio.to_thread(run, cache.close())
        for name in ("add", "set", "set stream", "get", "get_many", "incr", "keys", "stats", "get_many none"):
            assert (await outcome(CALLS[name], cache))[0] is ClosedError, name
        with pytest.raises(ClosedError):
            await entry.value
        assert workers() == before
        await cache.close()

    run(main())


def test_close_is_idempotent_and_waits(open_cache: Open, watched: list[Watched]) -> None:
    """What is under way completes first; whoever closes meanwhile waits too, others are refused."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
        before = descriptors()
        cache = open_cache(max_in_flight=2, **SMALL)
        await cache.add("x", 1)
        watched[-1].cold = True
        watched[-1].hold("write")
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(call)
            for call in (
                cache.add("new", 1), cache.set("set", b"x"), cache.incr("n"), cache.get("k"),
                cache.get_many(list(range(20))), cache.set("file", io.BytesIO(NEW)),
                cache.set("stream", parts_of(NEW)), cache.get_entry("k"),
            )
        ]  # fmt: skip
        cancelled = asyncio.ensure_future(cache.add("cancelled", 1))
        await until(watched[-1].entered)
        cancelled.cancel()
        closing = [asyncio.create_task(cache.close()) for _ in range(3)]
        await turns_of_the_loop()
        assert not any(task.done() for task in closing) and cache.closed
        with pytest.raises(ClosedError):
            await cache.add("too late", 1)
        with pytest.raises(ClosedError):
            await cache.set("too late", 1)
        watched[-1].go_on()
        await asyncio.gather(*closing)
        found = [task.result() for task in tasks if task.done()]
        assert found[:4] == [True, True, 6, b"old"]
        assert found[4] == {n: OLD[n] for n in range(20)}
        assert found[5:7] == [True, True] and found[7].key == "k"
        await cache.close()
        assert descriptors() == before
        async with open_cache(**SMALL) as cache:
            assert (await cache.get("new"), await cache.get("stream")) == (1, NEW)
            assert await cache.get("too late") is None

    run(main())


def test_get_many_that_has_just_begun_completes_before_closing(
    open_cache: Open, watched: list[Watched]
) -> None:
    """None of its reads has begun when the cache is told to close."""

    async def main() -> None:
        cache = open_cache(**SMALL)
        await cache.set_many(OLD)
        watched[-1].cold = True
        task = asyncio.create_task(cache.get_many(list(OLD)))
        await asyncio.sleep(0)
        await cache.close()
        assert await task == OLD

    run(main())


def test_closing_that_is_cancelled_closes(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            await cache.set("k", 1)
        before = descriptors()
        cache = open_cache()
        await cache.get("k")
        watched[-1].hold("write")
        task = asyncio.create_task(cache.add("new", 1))
        await until(watched[-1].entered)
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        closing.cancel()
        await turns_of_the_loop()
        watched[-1].go_on()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await task is True
        await cache.close()
        assert descriptors() == before

    run(main())


def test_async_with_closes_whatever_happens(open_cache: Open) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="mine"):
            async with open_cache() as cache:
                await cache.set("k", 1)
                raise RuntimeError("mine")
        assert cache.closed
        before = descriptors()
        for _ in range(3):
            async with open_cache() as cache:
                assert await cache.get("k") == 1
                await asyncio.gather(*(cache.get(n) for n in range(100)))
        assert descriptors() == before

    run(main())


# -- failures -------------------------------------------------------------------------------------


def test_no_space(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            watched[-1].errors = dict.fromkeys(("write", "allocate"), errno.ENOSPC)
            for value in (b"new", NEW, parts_of(NEW), io.BytesIO(NEW)):
                with pytest.raises(StorageFull):
                    await cache.set("k", value)
            with pytest.raises(StorageFull):
                await cache.add("new", 1)
            assert await cache.get("k") == b"old"
            watched[-1].errors = {}
            assert await cache.set("k", b"new") and await cache.get("k") == b"new"
            assert_free(cache)
            assert await cache.check() == []

    run(main())


def test_full_without_eviction(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(size_limit=1 << 20, eviction="none") as cache:
            found = await asyncio.gather(
                *(cache.set(n, noise(4000, n)) for n in range(400)), return_exceptions=True
            )
            stored = [n for n, one in enumerate(found) if one is True]
            assert {type(one) for one in found} == {bool, StorageFull}
            assert await cache.get_many(range(400)) == {n: noise(4000, n) for n in stored}

    run(main())


def test_a_failing_put_does_not_fail_those_that_share_its_batch(
    open_cache: Open, watched: list[Watched]
) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", 1)
            watched[-1].poison = b"poison"
            values = [b"poison" if n % 10 == 3 else noise(50, n) for n in range(100)]
            found = await asyncio.gather(
                *(cache.set(n, value) for n, value in enumerate(values)), return_exceptions=True
            )
            for number, (one, value) in enumerate(zip(found, values, strict=True)):
                if value == b"poison":
                    assert isinstance(one, CacheIOError) and await cache.get(number) is None
                else:
                    assert one is True and await cache.get(number) == value
            assert await cache.check() == []
            assert_free(cache)

    run(main())


@pytest.mark.parametrize("key", ["k", "large"])
def test_a_disk_that_cannot_be_read(open_cache: Open, watched: list[Watched], key: str) -> None:
    """An error and neither a hit nor a miss; the entry stays."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get(key)
            before = (await cache.stats()).process
            watched[-1].cold = True
            watched[-1].errors = {"read": errno.EIO}
            for call in (
                lambda: cache.get(key),
                lambda: cache.get_many([key, "missing"]),
                lambda: cache.pop(key),
            ):
                with pytest.raises(CacheIOError, match="cannot read"):
                    await call()
            watched[-1].errors = {}
            after = (await cache.stats()).process
            assert after == {**before, "misses": 1}
            assert await cache.get(key) == OLD[key]
            assert_free(cache)

    run(main())


def flip(directory: Path, value: bytes) -> None:
    """Change one bit of `value` wherever it is stored."""
    found = 0
    for path in [*(directory / "segments").iterdir(), *(directory / "large").iterdir()]:
        content = path.read_bytes()
        at = content.find(value)
        if at >= 0:
            fd = os.open(path, os.O_WRONLY)
            os.pwrite(fd, bytes([content[at + len(value) // 2] ^ 4]), at + len(value) // 2)
            os.close(fd)
            found += 1
    assert found == 1


@pytest.mark.parametrize("memory", ["warm", "cold"])
@pytest.mark.parametrize("call", ["get", "get_many", "get_entry", "open", "pop"])
@pytest.mark.parametrize("key", [7, "large"])
def test_damage_is_a_miss(
    open_cache: Open, directory: Path, watched: list[Watched], memory: str, call: str, key: Any
) -> None:
    """Counted, never a wrong value, and told from a key that was never there."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get_many(list(OLD))
            watched[-1].cold = memory == "cold"
            flip(directory, OLD[key])
            if call == "get":
                assert await cache.get(key, "miss") == "miss"
            elif call == "get_many":
                assert await cache.get_many(list(OLD)) == {k: v for k, v in OLD.items() if k != key}
            elif call == "pop":
                assert await cache.pop(key, "miss") == "miss"
            elif call == "open":
                with pytest.raises(KeyError):
                    await cache.open(key)
            else:
                entry = await cache.get_entry(key)  # its record is sound
                assert entry is not None
                with pytest.raises(EntryGone):
                    await entry.value
            stats = (await cache.stats()).process
            assert stats["corrupt"] == 1
            assert stats["misses"] == (call != "get_entry")
            assert await cache.get(key) is None and key not in cache
            assert await cache.get("k") == b"old"
            assert await cache.check() == []

    run(main())


# -- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [64, 1500])
def test_durable_puts_share_syncs(open_cache: Open, watched: list[Watched], number: int) -> None:
    async def main() -> None:
        async with open_cache(durability="sync") as cache:
            await cache.set("first", b"x")
            before = collections.Counter(call for call, _ in watched[-1].calls)
            assert all(await asyncio.gather(*(cache.set(n, noise(50, n)) for n in range(number))))
            syncs = collections.Counter(call for call, _ in watched[-1].calls)["sync"] - before["sync"]
            assert 1 <= syncs <= 2 + number // 100
            assert len(await cache.get_many(range(number))) == number

    run(main())


def test_durable_puts_are_synced_before_they_return(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(durability="sync") as cache:
            await cache.set("first", b"x")
            watched[-1].hold("sync")
            tasks = [asyncio.create_task(cache.set(n, b"x")) for n in range(10)]
            await until(watched[-1].entered)
            await turns_of_the_loop()
            assert not any(task.done() for task in tasks)
            watched[-1].go_on()
            assert await asyncio.gather(*tasks) == [True] * 10
            watched[-1].errors = {"sync": errno.EIO}
            found = await asyncio.gather(*(cache.set(n, b"y") for n in range(5)), return_exceptions=True)
            assert {type(one) for one in found} == {CacheIOError}
            watched[-1].errors = {}

    run(main())


@pytest.mark.parametrize("memory", ["warm", "cold"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_get_is_a_hit_or_a_miss(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch, memory: str, wrapped: bool
) -> None:
    """With the compiled core, where it is there, and with the code that it stands for."""
    rng = random.Random(5)
    made: list[Any] = wrap_backends(monkeypatch, Watched) if wrapped or memory == "cold" else []
    wanted = [rng.randrange(40) for _ in range(600)]

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many((n, noise(LARGE if n == 1 else 100, n)) for n in range(20))
            for one in made:
                one.cold = memory == "cold"
            calls: list[Awaitable[Any]] = [cache.get(key) for key in wanted]
            calls += [cache.get_many(wanted[at : at + 10]) for at in range(0, 600, 10)]
            calls += [cache.get_entry(key) for key in wanted[:50]]
            calls += [cache.set(("other", n), n) for n in range(50)]
            rng.shuffle(calls)
            await asyncio.gather(*calls)
            hits = sum(key < 20 for key in [*wanted, *wanted, *wanted[:50]])
            stats = await cache.stats()
            assert (stats.process["hits"], stats.process["misses"]) == (hits, 1250 - hits)
            assert stats.hits + stats.misses == 1250

    run(main())


@pytest.mark.parametrize("kind", ["read in the loop", "read by a worker"])
def test_a_cancelled_get_counts_at_most_once(open_cache: Open, watched: list[Watched], kind: str) -> None:
    key = "k" if kind == "read in the loop" else "large"

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many(OLD)
            await cache.get(key)
            watched[-1].cold = True
            before = (await cache.stats()).process
            tasks = [asyncio.create_task(cache.get(key)) for _ in range(50)]
            await turns_of_the_loop(2)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            values = [one for one in found if not isinstance(one, BaseException)]
            assert len(values) >= 25 and set(values) == {OLD[key]}
            after = (await cache.stats()).process
            assert len(values) <= after["hits"] - before["hits"] <= 50
            assert after["misses"] == before["misses"]

    run(main())


def test_tasks_read_what_they_wrote(open_cache: Open) -> None:
    async def one(cache: AsyncDiskCache, number: int) -> None:
        for turn in range(20):
            value = noise(LARGE if turn == 9 else 100, number * 100 + turn)
            assert await cache.set(number, value) is True
            assert number in cache
            assert await cache.get(number) == value
            assert (await cache.get_many([number])) == {number: value}
            await cache.delete(number)
            assert await cache.get(number) is None

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await asyncio.gather(*(one(cache, number) for number in range(20)))
            assert len(cache) == 0

    run(main())


def test_a_set_is_seen_only_when_it_is_complete(open_cache: Open, watched: list[Watched]) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", b"old")
            watched[-1].hold("write")
            task = asyncio.create_task(cache.set("k", b"new"))
            await until(watched[-1].entered)
            assert await cache.get("k") == b"old"
            watched[-1].go_on()
            await task
            assert await cache.get("k") == b"new"

    run(main())


def test_writers_of_one_key(open_cache: Open) -> None:
    """Of those asked for together the last one stays; in the end it is one of them in any case."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            for _ in range(20):
                await asyncio.gather(*(cache.set("k", bytes([n]) * 50) for n in range(10)))
                assert await cache.get("k") == bytes([9]) * 50
            for _ in range(5):
                values = [b"small", NEW, b"other"]
                await asyncio.gather(
                    *(cache.set("k", value) for value in values), cache.set("k", parts_of(NEW))
                )
                assert await cache.get("k") in values
            assert len(cache) == 1 and await cache.check() == []

    run(main())


def test_totals_are_exact(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=50) as cache:
            results = await asyncio.gather(
                *(cache.incr("n", 2) for _ in range(300)), *(cache.decr("n") for _ in range(200))
            )
            assert await cache.get("n") == 400 and len(results) == 500
            assert sum(await asyncio.gather(*(cache.add("once", n) for n in range(50)))) == 1
            popped = await asyncio.gather(*(cache.pop("once") for _ in range(50)))
            assert sum(one is not None for one in popped) == 1

    run(main())


# -- cold reads with the compiled core ------------------------------------------------------------


def cool(cache: AsyncDiskCache) -> Watched:
    """From here on the compiled core, which takes plain keys, finds nothing in memory; the loop's reads are under observation."""
    core: Any = cache._sync()._store.core
    if core.name != "c":
        pytest.skip("the compiled core is not there")
    core.get_nowait = lambda key, now: NotImplemented
    loop = asyncio.get_running_loop()
    watched = Watched(cache._sync()._store.backend)
    cache._loop(cache._sync()).channel = watched.channel(loop)
    return watched


def test_compiled_never_more_under_way_than_allowed(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=4, **SMALL) as cache:
            await cache.set_many((f"k{n}", noise(50, n)) for n in range(1000))
            await cache.get_many([f"k{n}" for n in range(1000)])  # opens the segments
            watched = cool(cache)
            before = (await cache.stats()).process
            found = await asyncio.gather(*(cache.get(f"k{n}", "miss") for n in range(1010)))
            assert found == [noise(50, n) if n < 1000 else "miss" for n in range(1010)]
            assert watched.most == 4
            after = (await cache.stats()).process
            assert (after["hits"], after["misses"]) == (before["hits"] + 1000, before["misses"] + 10)
            assert_free(cache)

    run(main())


def test_compiled_cancelled_at_every_suspension(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache(max_in_flight=1, **SMALL) as cache:
            await cache.set_many({"k": b"old", "l": b"other"})
            await cache.get_many(list("kl"))
            cool(cache)
            before = (await cache.stats()).process["hits"]
            for at in range(1, 10):
                # The first is behind another one, so that it also waits for its turn.
                other = asyncio.create_task(cache.get("l"))
                await asyncio.sleep(0)
                counted = CancelledAt(cache.get("k"), at)

                async def operation(counted: Any = counted) -> Any:
                    return await counted

                found = (await asyncio.gather(operation(), return_exceptions=True))[0]
                assert await other == b"other"
                await turns_of_the_loop(3)
                assert_free(cache)
                if counted.suspensions < at:
                    assert found == b"old" and at > 2
                    break
                assert isinstance(found, asyncio.CancelledError)
            assert before + at < (await cache.stats()).process["hits"] <= before + 2 * at

    run(main())


@pytest.mark.parametrize("trouble", ["damage", "an error that passes", "an error that stays"])
def test_compiled_reads_that_fail(open_cache: Open, directory: Path, trouble: str) -> None:
    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set_many({"k": b"old", "l": b"other"})
            await cache.get_many(list("kl"))
            watched = cool(cache)
            before = (await cache.stats()).process
            if trouble == "damage":
                flip(directory, b"other")
                assert await cache.get("l", "miss") == "miss"
                expected = {"misses": 1, "corrupt": 1}
            elif trouble == "an error that passes":
                watched.errors = {"read": errno.EIO}
                watched.inner.read = watched._read_inner  # type: ignore[method-assign]
                assert await cache.get("l") == b"other"  # read once more, by a worker
                expected = {"hits": 1}
            else:
                watched.errors = {"read": errno.EIO}
                with pytest.raises(CacheIOError, match="cannot read"):
                    await cache.get("l")
                watched.errors = {}
                expected = {}
            after = (await cache.stats()).process
            assert {name: after[name] - n for name, n in before.items() if after[name] != n} == expected
            assert_free(cache)
            watched.errors = {}
            assert await cache.get("k") == b"old"

    run(main())


# -- what strangers keep waiting ------------------------------------------------------------------


class Slow:
    """A file and iterators of a stranger's, who lets nobody have anything until he is told to."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.go = threading.Event()
        self.asked = 0

    def read(self, _size: int = -1) -> bytes:
        self.asked += 1
        self.waiting.release()
        assert self.go.wait(LIMIT)
        return b"" if self.asked > 1 else noise(3 * LARGE)

    def parts(self) -> Iterator[bytes]:
        while part := self.read():
            yield part

    def pairs(self) -> Iterator[tuple[str, bytes]]:
        yield "pair", self.read()

    def keys(self) -> Iterator[str]:
        self.read()
        yield "key"

    async def reached(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.waiting.acquire, True, LIMIT)


SLOW: dict[str, Callable[[AsyncDiskCache, Slow, int], Any]] = {
    "file": lambda c, slow, n: c.set(n, slow),
    "iterator": lambda c, slow, n: c.set(n, slow.parts()),
    "pairs": lambda c, slow, n: c.set_many(slow.pairs()),
    "keys to get": lambda c, slow, n: c.get_many(slow.keys()),
    "keys to delete": lambda c, slow, n: c.delete_many(slow.keys()),
}


@pytest.mark.parametrize("name", SLOW)
def test_nobody_waits_for_a_slow_stranger(open_cache: Open, watched: list[Watched], name: str) -> None:
    """More of them than there are workers, and everything else goes on."""

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            await cache.set("k", b"v")
            slow = [Slow() for _ in range(20)]
            tasks = [asyncio.ensure_future(SLOW[name](cache, one, n)) for n, one in enumerate(slow)]
            for one in slow:
                await one.reached()
            watched[-1].cold = True
            await cache.set("small", b"1")
            assert await cache.incr("n") == 1 and await cache.get("k") == b"v"
            assert await cache.set("another", parts_of(NEW)) and await cache.set("file", io.BytesIO(NEW))
            for one in slow:
                one.go.set()
            await asyncio.gather(*tasks)
            if name in ("file", "iterator"):
                assert [await cache.get(n) for n in range(20)] == [noise(3 * LARGE)] * 20

    run(main())


@pytest.mark.parametrize("name", SLOW)
def test_cancelling_what_waits_for_a_stranger(open_cache: Open, directory: Path, name: str) -> None:
    """The task ends, closing does not wait, nothing more is asked, and the old value stays."""

    async def main() -> None:
        slow = Slow()
        cache = open_cache(**SMALL)
        await cache.set(0, b"old")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(SLOW[name](cache, slow, 0), 0.01)
        await slow.reached()
        await asyncio.wait_for(cache.close(), LIMIT / 2)
        assert not slow.go.is_set()
        slow.go.set()
        for thread in threading.enumerate():
            if thread.name == "yatagarasu-stream":
                await asyncio.to_thread(thread.join, LIMIT)
        assert slow.asked == 1

    run(main())
    with DiskCache(directory, **SMALL) as cache:
        assert cache.get(0) == b"old" and len(cache) == 1 and cache.check() == []
    assert os.listdir(directory / "tmp") == []


def test_threads_of_strangers_are_bounded(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they were cancelled: a thread that nobody waits for is one all the same."""
    monkeypatch.setattr(aio, "_STREAMS", 2)

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            slow = [Slow() for _ in range(3)]
            tasks = [asyncio.ensure_future(cache.set(n, one)) for n, one in enumerate(slow)]
            await slow[0].reached()
            await slow[1].reached()
            tasks[0].cancel()
            await turns_of_the_loop()
            assert tasks[0].cancelled() and not slow[2].asked
            slow[0].go.set()
            await slow[2].reached()
            for one in slow:
                one.go.set()
            assert await asyncio.gather(*tasks[1:]) == [True, True] and 0 not in cache

    run(main())


def test_close_is_cancelled_and_goes_on(open_cache: Open, watched: list[Watched]) -> None:
    """Also where the executor of the loop is full; whoever closes again waits for its end."""
    full, go = threading.Event(), threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1)
        loop.set_default_executor(executor)
        loop.run_in_executor(None, lambda: full.set() or go.wait(LIMIT))
        cache = open_cache(**SMALL)
        await cache.set("k", b"v")
        watched[-1].hold("sync")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(cache.close(), 0.01)
        second = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        assert cache.closed and not second.done() and full.is_set()
        watched[-1].go_on()
        await second
        assert cache._sync().closed
        go.set()

    run(main())


def test_a_loop_that_ends_while_it_closes(open_cache: Open, watched: list[Watched]) -> None:
    """What is under way is not waited for then, but the cache is closed, in its thread."""
    caches: list[AsyncDiskCache] = []

    async def main() -> None:
        cache = open_cache(**SMALL)
        caches.append(cache)
        await cache.set("k", b"v")
        slow = Slow()
        task = asyncio.ensure_future(cache.set("slow", slow))
        await slow.reached()
        closing = asyncio.create_task(cache.close())
        await turns_of_the_loop()
        assert not closing.done() and not task.done()
        asyncio.get_running_loop().call_later(0.05, slow.go.set)

    run(main())
    for thread in threading.enumerate():
        if thread.name == "yatagarasu-closing":
            thread.join(LIMIT)
    assert caches[0]._sync().closed


def test_no_thread_can_be_started(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be done in place is, the rest says why."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with open_cache(**SMALL) as cache:
            assert await cache.set("k", io.BytesIO(NEW)) and await cache.get("k") == NEW
            with pytest.raises(CacheIOError, match="no thread"):
                await cache.set("k", parts_of(NEW))
            assert await cache.get("k") == NEW

    monkeypatch.setattr(threading.Thread, "start", refuse)
    asyncio.run(main())
