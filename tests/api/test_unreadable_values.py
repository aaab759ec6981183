"""What the configured serializer can't read: an error that names the key, or a miss; it poisons nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest

from yatagarasu_cache import (
    AsyncDiskCache,
    ConfigurationError,
    DiskCache,
    PickleSerializer,
    SerializationError,
    TypedSerializer,
)

Make = Callable[..., DiskCache]
OTHER, OWN = PickleSerializer(b"another secret"), PickleSerializer(b"secret")


@dataclasses.dataclass
class Thing:
    x: int


def writers() -> dict[str, Any]:
    return {"unsigned": "pickle", "other secret": OTHER, "removed class": TypedSerializer([Thing])}


@pytest.fixture(params=writers())
def stored(request: pytest.FixtureRequest, make: Make, core: str) -> str:
    """The key of a value that the reader's serializer does not read, among others that it does."""
    with make(serializer=writers()[request.param]) as cache:
        cache["strange"] = Thing(1)
    with make(serializer=OWN) as cache:
        cache["own"], cache["plain"], cache["text"] = {"a": Thing}, b"bytes", "text"
    return "strange"


def test_an_error_names_the_key_and_is_counted(make: Make, stored: str) -> None:
    cache = make(serializer=OWN)
    for read in (
        lambda: cache.get(stored), lambda: cache[stored], lambda: cache.get_many([stored, "plain"]), lambda: cache.pop(stored),
        lambda: cache.get_entry(stored).value, lambda: [entry.value for entry in cache.entries()],  # type: ignore[union-attr]
    ):  # fmt: skip
        with pytest.raises(SerializationError, match="the value of 'strange' cannot be read: "):
            read()
    assert cache.stats().unreadable == 6 and cache.stats().as_dict()["unreadable"] == 6
    assert cache["own"] == {"a": Thing} and stored in cache


def test_a_miss_stays_where_it_is(make: Make, stored: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = make(serializer=OWN, on_unreadable="miss")
    with caplog.at_level(logging.WARNING, logger="yatagarasu_cache"):
        assert cache.get(stored) is None and cache.get(stored, 7) == 7 and cache.pop(stored, 8) == 8
        assert cache.get_many(["own", stored, "plain", "text", "none"]) == {"own": {"a": Thing}, "plain": b"bytes", "text": "text"}
        with pytest.raises(KeyError):
            cache[stored]
    lines = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(lines) == 1 and "taken for a miss" in lines[0] and "'strange'" not in lines[0] and "on_unreadable='miss'" in lines[0]
    assert cache.stats().unreadable == 5 and stored in cache and set(cache) == {"own", "strange", "plain", "text"}
    with pytest.raises(SerializationError, match="'strange'"):
        cache.get_entry(stored).value  # type: ignore[union-attr]  # noqa: B018
    assert not cache.add(stored, 1)  # it is there
    cache[stored] = 9  # and may be replaced
    assert cache[stored] == 9


def test_under_asyncio(directory: Any, make: Make, stored: str) -> None:
    async def main(on_unreadable: str) -> None:
        async with AsyncDiskCache(directory, serializer=OWN, on_unreadable=on_unreadable) as cache:
            if on_unreadable == "miss":
                assert await cache.get(stored, 7) == 7 and await cache.pop(stored, 8) == 8
                assert await cache.get_many([stored, "text"]) == {"text": "text"}
            else:
                for read in (cache.get(stored), cache.get_many([stored, "text"]), cache.pop(stored)):
                    with pytest.raises(SerializationError, match="'strange'"):
                        await read
            with pytest.raises(SerializationError, match="'strange'"):
                await (await cache.get_entry(stored)).value  # type: ignore[union-attr]
            assert stored in cache and (await cache.stats()).unreadable >= 4

    asyncio.run(main("error"))
    asyncio.run(main("miss"))


def test_what_it_may_be(directory: Any) -> None:
    for wrong in ("raise", "Miss", None, True):
        with pytest.raises(ConfigurationError, match="on_unreadable is"):
            DiskCache(directory, on_unreadable=wrong)


def test_wrong_keys_and_failures_are_no_misses(make: Make) -> None:
    cache = make(on_unreadable="miss")
    with pytest.raises(SerializationError, match="a key cannot be"):
        cache.get(1j)  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="would not come back"):
        cache["k"] = object()
    assert cache.stats().unreadable == 0


def test_signed_values_are_bound_to_their_key_on_every_path(make: Make) -> None:
    """A record that is stored again under another key, as whoever writes to the directory can, is never loaded."""
    cache = make(serializer=OWN)
    cache["a"] = [Thing]
    store = cache._store
    found = store.reading.fetch(*cache._desk.identify("a"))
    cache._desk.put(cache._desk.encode_key("b"), found.payload, found.flags)
    assert cache["a"] == [Thing]
    for read in (
        lambda: cache.get("b"), lambda: cache.get_many(["a", "b"]), lambda: cache.pop("b"), lambda: [e.value for e in cache.entries()],
        lambda: cache.get_entry("b").value,  # type: ignore[union-attr]
    ):  # fmt: skip
        with pytest.raises(SerializationError, match="'b'.*signature of a stored pickle is wrong"):
            read()
    with pytest.raises(TypeError):
        cache.incr("b")
    cache["b"] = cache["a"]
    assert cache["b"] == [Thing]


class Views:
    """Takes memoryviews, and gives buffers of any kind."""

    name = "views"
    takes_memoryview = True
    seen: list[type]

    def __init__(self, kind: Any) -> None:
        self.kind, self.seen = kind, []

    def dumps(self, value: Any) -> Any:
        return self.kind(repr(value).encode())

    def loads(self, data: Any) -> Any:
        self.seen.append(type(data))
        assert data.readonly if isinstance(data, memoryview) else True
        return bytes(data).decode()


class Old(Views):
    def loads(self, data: bytes) -> Any:
        self.seen.append(type(data))
        return data.decode()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("cls", [Views, Old])
def test_serializers_may_take_and_give_buffers(make: Make, kind: Any, cls: Any) -> None:
    serializer = cls(kind)
    cache = make(serializer=serializer, size_limit=1 << 26)
    for value in ([1], ["x" * 200_000], ["x" * 2_000_000]):
        cache["k"] = value
        assert cache["k"] == repr(value)
    assert set(serializer.seen) == {memoryview if cls is Views else bytes}


def test_large_pickles(make: Make, core: str) -> None:
    cache = make(serializer=OWN, size_limit=1 << 26)
    for size in (100_000, 3_000_000):
        cache["k"] = {"data": bytes(size)}
        assert cache["k"] == {"data": bytes(size)}


@pytest.mark.parametrize("on_unreadable", ["error", "miss"])
def test_setdefault_says_at_once_what_is_in_its_way(make: Make, directory: Any, on_unreadable: str) -> None:
    make(serializer=OTHER).set("k", ["a value", object])
    cache = make(on_unreadable=on_unreadable)
    with pytest.raises(SerializationError, match="'k'"):
        cache.setdefault("k", 5)
    assert cache.stats().unreadable <= 2

    async def main() -> None:
        async with AsyncDiskCache(directory, on_unreadable=on_unreadable) as tasks:
            with pytest.raises(SerializationError, match="'k'"):
                await tasks.setdefault("k", 5)

    asyncio.run(main())
