"""`AsyncDiskCache`: the same answers as `DiskCache`, method by method."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import math
import os
import pickle
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from calls import CALLS, CONTENT, NOT_CALLS, described, outcome
from helpers import Clock, noise, run_python, tree, wrap_backends
from watched import LARGE, SEGMENT, SMALL, Open, Watched, parts_of, run

from yatagarasu_cache import (
    AsyncDiskCache,
    ClosedError,
    ConfigurationError,
    DiskCache,
    EntryGone,
    PickleSerializer,
    ReadOnlyError,
    SerializationError,
    ValueTooLarge,
    aio,
)
from yatagarasu_cache.aio import AsyncEntry
from yatagarasu_cache.store import recovery
from yatagarasu_cache.store.format import Identity

# A coroutine that nobody awaited is a leak too.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
CHANGES = {
    "set", "set stream", "set file", "set large", "add", "add new", "touch", "incr", "incr of no integer",
    "incr without default", "decr", "modify", "setdefault", "pop", "pop missing", "delete", "set_many",
    "set_many pairs", "set_many none", "update", "update pairs", "update none", "delete_many",
    "delete_many none", "evict", "delete_prefix", "expire", "cull", "clear", "flush", "check fix",
    "set absent", "set of another version", "set large of another version", "set stream of another version",
    "set stream absent", "set of no version", "set of a version below 0", "incr for some time",
    "decr for some time", "modify missing", "modify to what can't be", "modify in vain",
    "setdefault missing", "delete of another version", "delete of no version", "get_or_set missing",
    "get_or_set failing", "lock", "semaphore", "semaphore wrong", "throttle", "set_meta", "set_meta large",
    "set_meta missing",
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
    # Whether a group of the index overflows, and so its size, depends on the secret of the hashes.
    monkeypatch.setattr(recovery, "_new_identity", lambda: Identity(b"i" * 16, 12345))

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
        "set if": (4, (key, value), lambda c: c.set(key, value, expire, tag, meta, if_version=0)),
        "stream if": (3, (key, len(data)), lambda c: c.set(key, iter([data, data]), expire, tag, if_version=0)),
        "setdefault": (4, (key, value), lambda c: c.setdefault(key, value, expire, tag, meta)),
        "modify": (4, (key, value), lambda c: c.modify(key, lambda there: [str(there)[:9], value], "none")),
        "delete if": (1, (key,), lambda c: c.delete(key, if_version=1)),
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


def test_check_tells_how_far_it_is(open_cache: Open) -> None:
    told = list[tuple[int, int]]()

    async def main() -> None:
        async with open_cache() as cache:
            await cache.set_many(dict.fromkeys(range(300), b"x"))
            assert await cache.check(progress=lambda *now: told.append(now)) == []
            assert await cache.check(fix=True, progress=lambda *now: told.append(now)) == []

    run(main())
    assert told[0][1] == 300 and told.count((300, 300)) >= 2
