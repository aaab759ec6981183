"""Nothing but a `CacheError` leaves a public method, except what is not the cache's business."""

from __future__ import annotations

import asyncio
import errno
import io
import pickle
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, noise

from yatagarasu_cache import (
    AsyncDiskCache,
    CacheError,
    CacheIOError,
    ClosedError,
    DiskCache,
    EntryGone,
    SerializationError,
    aio,
    guard,
)
from yatagarasu_cache.entry import Entry, Location
from yatagarasu_cache.store.index import Index, IndexDamaged
from yatagarasu_cache.value_files import HeldReader, ValueReader

pytestmark = pytest.mark.once

OPTIONS: dict[str, Any] = {"backend": "threads", "size_limit": 64 << 20}

# One call of each public method.
CALLS: dict[str, Callable[[DiskCache], Any]] = {
    "get": lambda cache: cache.get("k"),
    "set": lambda cache: cache.set("k", b"v"),
    "add": lambda cache: cache.add("new", 1),
    "touch": lambda cache: cache.touch("k"),
    "set_meta": lambda cache: cache.set_meta("k", 1),
    "incr": lambda cache: cache.incr("n"),
    "decr": lambda cache: cache.decr("n"),
    "modify": lambda cache: cache.modify("n", lambda n: n + 1),
    "setdefault": lambda cache: cache.setdefault("new", 1),
    "pop": lambda cache: cache.pop("k"),
    "delete": lambda cache: cache.delete("k"),
    "get_many": lambda cache: cache.get_many(["k", 1, "none"]),
    "set_many": lambda cache: cache.set_many({"k": 1}),
    "update": lambda cache: cache.update({"k": 1}),
    "delete_many": lambda cache: cache.delete_many(["k"]),
    "keys": lambda cache: list(cache.keys()),
    "items": lambda cache: list(cache.items()),
    "values": lambda cache: list(cache.values()),
    "entries": lambda cache: [entry.value for entry in cache.entries(tag="t")],
    "evict": lambda cache: cache.evict("t"),
    "delete_prefix": lambda cache: cache.delete_prefix("k"),
    "expire": lambda cache: cache.expire(),
    "cull": lambda cache: cache.cull(),
    "clear": lambda cache: cache.clear(),
    "get_entry": lambda cache: cache.get_entry("k").value,  # type: ignore[union-attr]
    "open": lambda cache: cache.open("k").read(),
    "location": lambda cache: cache.location("k").close(),
    "view": lambda cache: cache.view("k"),
    "volume": lambda cache: cache.volume(),
    "flush": lambda cache: cache.flush(),
    "check": lambda cache: cache.check(),
    "stats": lambda cache: cache.stats(),
    "get_or_set": lambda cache: cache.get_or_set("missing", lambda: 1),
    "lock": lambda cache: cache.lock("k").acquire(),
    "semaphore": lambda cache: cache.semaphore("k", 2).acquire(),
    "throttle": lambda cache: cache.throttle(5, 1, name="n")(int)(),
    "close": lambda cache: cache.close(),
    "__getitem__": lambda cache: cache["k"],
    "__setitem__": lambda cache: cache.__setitem__("k", "v"),
    "__delitem__": lambda cache: cache.__delitem__("k"),
    "__contains__": lambda cache: "k" in cache,
    "__len__": lambda cache: len(cache),
    "__iter__": lambda cache: list(cache),
    "__exit__": lambda cache: cache.__exit__(),
}
PASSIVE = {"__enter__", "__bool__", "__repr__", "__reduce__", "from_config", "__init__", "memoize"}

INJECTED: list[Exception] = [
    struct.error("on purpose"),
    IndexError("on purpose"),
    OSError(errno.EIO, "on purpose"),
    FileNotFoundError(errno.ENOENT, "on purpose"),
    IndexDamaged("superseded"),
    ZeroDivisionError("on purpose"),
    ValueError("on purpose"),
    TypeError("on purpose"),
    AttributeError("on purpose"),
    OverflowError("on purpose"),
    RuntimeError("on purpose"),
    AssertionError("on purpose"),
]
injected = pytest.mark.parametrize("error", INJECTED, ids=lambda error: type(error).__name__)


def public(kind: type) -> set[str]:
    names = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, classmethod)}
    inner = {"__getattr__", "__class__", "__annotate__", "__annotate_func__"}
    return {name for name in names if not name.startswith("_") or name.startswith("__")} - inner


class Broken:
    """In place of a store: whatever is asked of it fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def fail(error: Exception, otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Fails always, or, if there is something else to do, a few times."""
    times = count()

    def failing(*arguments: Any, **options: Any) -> Any:
        if otherwise is not None and next(times) >= 3:
            return otherwise(*arguments, **options)
        raise error

    return failing


def filled(cache: DiskCache) -> DiskCache:
    cache.set("k", b"v" * 100, tag="t")
    cache.set(1, "one")
    cache.set("n", 5)
    cache.set("large", noise(2 << 20))
    return cache


def expect(error: Exception, call: Callable[[], Any]) -> None:
    """`call` raises what an `error` inside means."""
    with pytest.raises(CacheError) as told:
        call()
    chain, seen = told.value.__cause__, []
    while chain is not None:
        seen.append(chain)
        chain = chain.__cause__
    if isinstance(error, OSError):
        assert isinstance(told.value, CacheIOError) and told.value.errno == error.errno
    elif isinstance(error, IndexDamaged):
        assert isinstance(told.value, CacheIOError) and "check(fix=True)" in str(told.value)
    else:
        assert type(told.value) is CacheError and "internal error" in str(told.value)
        assert type(error).__name__ in str(told.value)
    assert error in seen


def test_every_public_method_is_tried() -> None:
    assert public(DiskCache) == CALLS.keys() | PASSIVE
    assert public(AsyncDiskCache) <= CALLS.keys() | PASSIVE | {"__aenter__", "__aexit__", "__aiter__"}


@injected
def test_what_goes_wrong_inside(directory: Path, error: Exception) -> None:
    with DiskCache(directory, **OPTIONS) as opened:
        cache: Any = filled(opened)
        cache._store = cache._desk.store = Broken(error)
        cache._get = cache._set = cache._desk.put = cache._desk.delete = fail(error)
        for name in CALLS.keys() - {"close", "__exit__"}:
            expect(error, lambda name=name: CALLS[name](cache))  # type: ignore[misc]


@injected
@pytest.mark.parametrize("name", ["close", "__exit__"])
def test_what_goes_wrong_while_closing(
    directory: Path, error: Exception, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(DiskCache(directory, **OPTIONS))
    monkeypatch.setattr(type(cache._store.counters), "fold", fail(error))
    expect(error, lambda: CALLS[name](cache))
    assert cache.closed
    cache.close()


@pytest.mark.in_turn
@pytest.mark.parametrize("error", INJECTED[:7], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["find", "slot", "put", "remove", "count", "stamp"])
def test_what_goes_wrong_deeper(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, core: str, where: str
) -> None:
    """Not every method comes there, and some mend what they find: then they return."""
    for name, call in CALLS.items():
        cache = DiskCache(directory, **OPTIONS)
        cache.set_many({"k": b"v", 1: "one", "n": 5})
        cache.set("t", "tagged", tag="t")
        with monkeypatch.context() as patch:
            patch.setattr(Index, where, fail(error, getattr(Index, where)))
            try:
                call(cache)
            except (CacheError, KeyError):
                pass
            except AttributeError:
                assert name == "get_entry", "there was none"
        try:
            cache.close()
        except CacheError:
            pass


@injected
def test_asynchronous_methods(directory: Path, error: Exception) -> None:
    async def call(cache: Any, name: str) -> None:
        if name in ("keys", "__iter__"):
            [key async for key in cache]
        elif name in ("items", "values"):
            [one async for one in getattr(cache, name)()]
        elif name == "entries":
            [await entry.value async for entry in cache.entries(tag="t")]
        elif name == "get_entry":
            await (await cache.get_entry("k")).value
        elif name == "open":
            async with await cache.open("k") as file:
                await file.read()
        elif name == "location":
            (await cache.location("k")).close()
        elif name in ("__contains__", "__len__"):
            CALLS[name](cache)
        else:
            await CALLS[name](cache)

    async def main() -> None:
        async with AsyncDiskCache(directory, **OPTIONS) as cache:
            inner: Any = cache._cache
            filled(inner)
            good = inner._store
            for name in sorted(CALLS.keys() & public(AsyncDiskCache) - {"close"}):
                inner._store = inner._desk.store = Broken(error)
                try:
                    await call(cache, name)
                except CacheError as told:
                    outcome: BaseException = told
                else:
                    pytest.fail(f"{name} did not fail")
                inner._store = inner._desk.store = good
                expect(error, lambda outcome=outcome: _raise(outcome))
            assert await cache.get("k") == b"v" * 100

    asyncio.run(main())


def _raise(error: BaseException) -> None:
    raise error


@injected
def test_what_hands_out_values(make: Make, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(make(**OPTIONS))
    entry, file, location = cache.get_entry("k"), cache.open("large"), cache.location("k")
    assert entry is not None
    entry._load = fail(error)
    expect(error, lambda: entry.value)
    with monkeypatch.context() as patch:
        for name in ("read_chunks", "read_chunks_into"):
            patch.setattr(cache._store.core, name, fail(error))
        for call in (file.read, lambda: file.raw.read(10), lambda: file.raw.readinto(bytearray(9))):  # type: ignore[attr-defined]
            expect(error, call)
        patch.setattr("yatagarasu_cache.entry.os.close", fail(error))
        expect(error, location.close)
    file.close()
    assert public(Entry) <= {"__init__", "__repr__", "value"}
    assert public(Location) == {"__init__", "__iter__", "__enter__", "__exit__", "close"}
    raw = {"__init__", "readable", "seekable", "seek", "tell", "readinto", "readall", "fileno", "close"}
    assert public(ValueReader) | public(ValueReader.__base__) == raw  # type: ignore[arg-type]
    assert public(HeldReader) <= raw


def test_opening(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in INJECTED:
        with monkeypatch.context() as patch:
            patch.setattr("yatagarasu_cache.store.sharing.choose", fail(error))
            expect(error, lambda: DiskCache(directory, **OPTIONS))
            config = {"disk": {"cache_dir": str(directory), "backend": "threads"}}
            expect(error, lambda config=config: DiskCache.from_config(config))  # type: ignore[misc]


def test_after_closing_it_is_that(make: Make) -> None:
    cache: Any = filled(make(**OPTIONS))
    cache.close()
    cache._store = cache._desk.store = Broken(ValueError("operation forbidden on released memoryview object"))
    for name in ("volume", "flush", "add", "keys"):
        with pytest.raises(ClosedError):
            CALLS[name](cache)


# -- what passes --------------------------------------------------------------------------------


class Own(Exception):
    """The caller's own."""


OWN: list[BaseException] = [
    Own(), OSError(errno.ENOSPC, "the caller's"), ValueError("the caller's"), struct.error("the caller's"),
    TypeError("the caller's"), RuntimeError("the caller's"), IndexError("the caller's"),
    ZeroDivisionError("the caller's"), KeyboardInterrupt(), SystemExit(3), MemoryError(), KeyError("k"),
]  # fmt: skip
own = pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)


class Stream:
    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def read(self, size: int) -> bytes:
        if self.left <= 0:
            raise self.error
        self.left -= size
        return bytes(size)


class Raw(io.RawIOBase):
    """What `io.BufferedReader`, which is no Python code, reads from."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise self.error


class Items(Mapping[Any, Any]):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getitem__(self, key: Any) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[Any]:
        return iter("a")

    def __len__(self) -> int:
        return 1


class Strange:
    """Whose attributes are not to be had."""

    def __init__(self, error: BaseException) -> None:
        self.__dict__["error"] = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


class Where:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __fspath__(self) -> str:
        raise self.error


def raising(error: BaseException, *first: Any) -> Iterator[Any]:
    yield from first
    raise error


def same(error: BaseException, call: Callable[[], Any]) -> None:
    error.__traceback__ = None
    with pytest.raises(type(error)) as told:
        call()
    assert told.value is error


@own
def test_the_callers_own_arrives_as_it_is(make: Make, error: BaseException) -> None:
    cache = filled(make(**OPTIONS))
    calls: list[Callable[[], Any]] = [
        lambda: cache.set("s", Stream(error, 0)),
        lambda: cache.set("s", Stream(error, 5 << 20)),
        lambda: cache.set("s", io.BufferedReader(Raw(error))),
        lambda: cache.set("s", raising(error)),
        lambda: cache.set("s", raising(error, bytes(1 << 20), b"x" * (3 << 20))),
        lambda: cache.get_many(raising(error, "k")),
        lambda: cache.delete_many(raising(error, "k")),
        lambda: cache.set_many(raising(error, ("k", 1))),
        lambda: cache.set_many(Items(error)),
        lambda: DiskCache(Where(error)),  # type: ignore[arg-type]
        lambda: DiskCache.from_config(Where(error)),  # type: ignore[arg-type]
        lambda: AsyncDiskCache(Where(error)),  # type: ignore[arg-type]
    ]
    if not isinstance(error, TypeError):  # which os.fspath() gives for what is no path
        for call in calls:
            same(error, call)
    if not isinstance(error, AttributeError):
        same(error, lambda: cache.set("s", Strange(error)))
    assert "s" not in cache and cache["k"] == b"v" * 100 and cache.check() == []


@own
def test_the_callers_own_in_asyncio(directory: Path, error: BaseException) -> None:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        pytest.skip("these end the loop itself")

    async def parts(*first: bytes) -> AsyncIterator[bytes]:
        for part in first:
            yield part
        raise error

    async def main() -> None:
        async with AsyncDiskCache(directory, **OPTIONS) as cache:
            calls: list[Callable[[], Any]] = [
                lambda: cache.set("s", Stream(error, 0)),
                lambda: cache.set("s", Stream(error, 5 << 20)),
                lambda: cache.set("s", raising(error, bytes(3 << 20))),
                lambda: cache.set("s", parts()),
                lambda: cache.set("s", parts(bytes(3 << 20))),
                lambda: cache.get_many(raising(error, "k")),
                lambda: cache.delete_many(raising(error, "k")),
                lambda: cache.set_many(raising(error, ("k", 1))),
                lambda: cache.set_many(Items(error)),
            ]
            for call in calls:
                with pytest.raises(type(error)) as told:
                    await call()
                assert told.value is error
            assert "s" not in cache

    asyncio.run(main())


def test_serializers_errors_are_named(make: Make) -> None:
    class Failing:
        name = "failing"
        error: BaseException = Own("on purpose")

        def dumps(self, value: Any) -> bytes:
            if value == [0]:
                return b"0"
            raise self.error

        def loads(self, data: bytes) -> Any:
            raise self.error

    serializer = Failing()
    cache = make(serializer=serializer, **OPTIONS)
    cache["k"] = [0]
    for call in (lambda: cache.get("k"), lambda: cache.set("k", [1])):
        with pytest.raises(SerializationError) as told:
            call()
        assert told.value.__cause__ is serializer.error
    for error in (MemoryError(), KeyboardInterrupt()):
        serializer.error = error
        same(error, lambda: cache.get("k"))
        same(error, lambda: cache.set("k", [1]))


def test_arguments_that_are_wrong(make: Make) -> None:
    cache = filled(make(**OPTIONS))
    wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
        (TypeError, lambda: cache.get()),  # type: ignore[call-arg]
        (TypeError, lambda: cache.pop()),  # type: ignore[call-arg]
        (TypeError, lambda: cache.delete("k", strange=1)),  # type: ignore[call-arg]
        (TypeError, lambda: list(cache.entries(strange=1))),  # type: ignore[call-arg]
        (TypeError, lambda: cache.incr("n", 1.5)),  # type: ignore[arg-type]
        (TypeError, lambda: cache.incr("n", default="x")),  # type: ignore[arg-type]
        (TypeError, lambda: cache.decr("n", None)),  # type: ignore[arg-type]
        (TypeError, lambda: cache.incr("k")),
        (TypeError, lambda: cache.set("k", 1, expire="x")),  # type: ignore[arg-type]
        (ValueError, lambda: cache.set("k", 1, expire=-1)),
        (ValueError, lambda: cache.touch("k", 0)),
        (TypeError, lambda: cache.get_many(5)),  # type: ignore[arg-type]
        (TypeError, lambda: cache.set_many(5)),  # type: ignore[arg-type]
        (TypeError, lambda: cache.set_many([1])),  # type: ignore[list-item]
        (ValueError, lambda: cache.set_many([(1, 2, 3)])),  # type: ignore[list-item]
        (TypeError, lambda: cache.delete_many(5)),  # type: ignore[arg-type]
        (TypeError, lambda: cache.open("n")),
        (TypeError, lambda: cache.location("n")),
        (KeyError, lambda: cache["none"]),
        (KeyError, lambda: cache.open("none")),
        (KeyError, lambda: cache.location("none")),
        (KeyError, lambda: cache.incr("none", default=None)),
        (KeyError, lambda: cache.__delitem__("none")),
        (TypeError, lambda: DiskCache()),  # type: ignore[call-arg]
        (ValueError, lambda: DiskCache("x", strange=1)),
        (TypeError, lambda: cache.open("k").seek("x")),  # type: ignore[arg-type]
        (ValueError, lambda: cache.open("k").seek(-1)),
        (ValueError, lambda: cache.open("k").raw.seek(0, 9)),  # type: ignore[attr-defined]
        (TypeError, lambda: file.raw.readinto(b"x")),  # type: ignore[attr-defined]
        (TypeError, lambda: file.raw.readinto(5)),  # type: ignore[attr-defined]
    ]
    file = cache.open("k")
    for number, (kind, call) in enumerate(wrong):
        with pytest.raises(kind) as told:
            pytest.fail(f"call {number} gave {call()!r}")
        assert "internal" not in str(told.value), number
    raw: Any = file.raw  # type: ignore[attr-defined]
    file.close()
    for call in (file.read, lambda: raw.readinto(bytearray(5))):
        with pytest.raises(ValueError, match="closed file"):
            call()


def test_a_subclass_is_the_callers(make: Make, directory: Path) -> None:
    class Mine(DiskCache):
        def get(self, key: Any, default: Any = None) -> Any:
            raise Own

        def incr(self, *_: Any, **__: Any) -> int:
            raise Own

    with Mine(directory, **OPTIONS) as cache:
        for call in (lambda: cache["k"], lambda: cache.decr("k"), lambda: cache.get("k")):
            with pytest.raises(Own):
                call()


def test_an_entry_that_is_gone_and_pickles(make: Make) -> None:
    cache = filled(make(**OPTIONS))
    entry = cache.get_entry("k")
    cache.delete("k")
    with pytest.raises(EntryGone):
        assert entry is not None and entry.value
    assert pickle.loads(pickle.dumps(cache)).directory == cache.directory


def test_generators_end_and_close_as_they_should(make: Make) -> None:
    cache = filled(make(**OPTIONS))
    walk = cache.entries()
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    assert list(walk) == []
    assert cache.entries.__name__ == "entries" and (cache.entries.__doc__ or "").startswith("Live entries")
    assert aio.AsyncDiskCache.get_many.__name__ == "get_many"


def test_marks_are_seen_wherever_they_are() -> None:
    @guard.callers
    def outer() -> None:
        raise Own

    def inner() -> None:
        outer()

    with pytest.raises(Own) as told:
        inner()
    assert guard.is_callers(told.value)
    with pytest.raises(Own) as told:
        raise Own
    assert not guard.is_callers(told.value)
