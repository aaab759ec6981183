"""Signed pickles: what was signed for one key is not loaded under another one, on whatever way to it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import AsyncDiskCache, DiskCache, PickleSerializer, SerializationError
from yatagarasu_cache.codec import KIND_CUSTOM, MAX_KEY_BYTES, Key, ValueCodec, encode_key, signing
from yatagarasu_cache.store.format import CODEC_FLAGS, key_digest
from yatagarasu_cache.store.item import Item

pytestmark = pytest.mark.once

SECRET = b"a secret of this test, not of any cache"
REFUSED = "signature of a stored pickle is wrong, it was not loaded"
HEADER = b"\x0dpickle-signed"
SIGNED = ValueCodec(PickleSerializer(SECRET))
KEYS: list[Key] = [
    "", "a", "aa", b"", b"a", 0, 1, 1.0, True, False, None, -1, (), ("a",), ("a", ""), ("a", ("",)), ("aa",),
    "x" * (MAX_KEY_BYTES - 1),
]  # fmt: skip


class Trap:
    """Unpickling it is noticed."""

    sprung = 0

    def __reduce__(self) -> Any:
        return spring, ()


def spring() -> str:
    Trap.sprung += 1
    return "sprung"


@pytest.fixture(autouse=True)
def nothing_was_unpickled() -> Iterator[None]:
    Trap.sprung = 0
    yield
    assert Trap.sprung == 0


def sealed(key: Key, value: Any = None) -> bytes:
    return bytes(SIGNED.encode(Trap() if value is None else value, key=key)[0])


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key)[:12])
def test_a_signature_is_for_one_key(key: Key) -> None:
    payload = sealed(key, [1])
    assert SIGNED.decode(payload, KIND_CUSTOM, key) == [1]
    for other in KEYS:
        if encode_key(other) != encode_key(key):
            with pytest.raises(SerializationError, match=REFUSED):
                SIGNED.decode(payload, KIND_CUSTOM, other)
    with pytest.raises(SerializationError, match="a key cannot be of type object"):  # nobody forgets it
        SIGNED.decode(payload, KIND_CUSTOM)
    with pytest.raises(SerializationError, match="a key cannot be of type object"):
        SIGNED.encode([1])


def test_both_zeros_are_one_key_here_too() -> None:
    assert SIGNED.decode(sealed(0.0, [1]), KIND_CUSTOM, -0.0) == [1]


def test_what_is_signed_cannot_be_read_in_two_ways() -> None:
    """A byte that moves from the pickle to the key, or back, is noticed: lengths come first."""
    messages = {signing._sign(signing._keyed(SECRET, b"person"), b"sab"[:at], b"sab"[at:]) for at in range(4)}
    assert len(messages) == 4


def test_signed_alone_and_signed_for_a_key_are_different_things() -> None:
    serializer = PickleSerializer(SECRET)
    with pytest.raises(SerializationError, match=REFUSED):
        SIGNED.decode(HEADER + serializer.dumps(Trap()), KIND_CUSTOM, "k")
    with pytest.raises(SerializationError, match=REFUSED):
        serializer.loads(sealed("k")[len(HEADER) :])


def test_what_older_releases_signed_is_refused() -> None:
    for data in (pickle.dumps(Trap()), pickle.dumps(Trap(), 0), signing._SIGNED.pack(KIND_CUSTOM, 2) + b"skx"):
        signature = blake2b(data, digest_size=32, key=blake2b(SECRET).digest(), person=b"yatagarasu").digest()
        for reader in (lambda d: SIGNED.decode(HEADER + d, KIND_CUSTOM, "k"), PickleSerializer(SECRET).loads):
            with pytest.raises(SerializationError, match=f"{REFUSED}.*older release"):
                reader(signature + data)


class Marked(PickleSerializer):
    """With a hand in the bytes: these go through its methods."""

    def dumps(self, value: Any) -> bytes:
        return b"mark" + super().dumps(value)

    def loads(self, data: bytes) -> Any:
        assert data.startswith(b"mark")
        return super().loads(data[4:])


class Renamed(PickleSerializer):
    """With nothing to do with the bytes."""


def test_derived_serializers() -> None:
    marked, renamed = ValueCodec(Marked(SECRET)), ValueCodec(Renamed(SECRET))
    payload, flags = marked.encode([1])
    assert b"mark" in bytes(payload) and marked.decode(bytes(payload), flags) == [1]
    payload, flags = renamed.encode([1], key="k")
    assert renamed.decode(bytes(payload), flags, "k") == [1]
    with pytest.raises(SerializationError, match=REFUSED):
        renamed.decode(bytes(payload), flags, "other")
    unsigned = ValueCodec("pickle")
    assert unsigned.decode(bytes(unsigned.encode([1])[0]), KIND_CUSTOM) == [1]


def test_each_changed_byte_is_noticed() -> None:
    payload = sealed("k")
    for at in range(len(HEADER), len(payload)):
        with pytest.raises(SerializationError, match=REFUSED):
            SIGNED.decode(payload[:at] + bytes((payload[at] ^ 1,)) + payload[at + 1 :], KIND_CUSTOM, "k")


# Through the cache


@pytest.fixture
def opened(tmp_path: Path, backend: str, core: str) -> Iterator[DiskCache]:
    with DiskCache(tmp_path / "c", backend=backend, serializer=PickleSerializer(SECRET)) as cache:
        yield cache


def move(cache: DiskCache, source: Key, target: Key) -> None:
    """What somebody does who can write to the files: all checksums are right."""
    data, other, seed = encode_key(source), encode_key(target), cache._store.current.seed
    found = cache._store.reading.fetch(*key_digest(data, seed), data)
    assert found is not None
    cache._store.writing.put(Item(*key_digest(other, seed), other, found[0], found[1] & CODEC_FLAGS))


WAYS: dict[str, Callable[[DiskCache, Key], Any]] = {
    "get": lambda cache, key: cache.get(key),
    "[]": lambda cache, key: cache[key],
    "get_many": lambda cache, key: cache.get_many([key])[key],
    "get_entry": lambda cache, key: cache.get_entry(key).value,  # type: ignore[union-attr]
    "entries": lambda cache, key: next(e for e in cache.entries() if e.key == key).value,
    "pop": lambda cache, key: cache.pop(key),
}


async def first_value(cache: AsyncDiskCache, key: Key) -> Any:
    async for entry in cache.entries():
        if entry.key == key:
            return await entry.value


async def value_of_entry(cache: AsyncDiskCache, key: Key) -> Any:
    entry = await cache.get_entry(key)
    assert entry is not None
    return await entry.value


ASYNC_WAYS: dict[str, Callable[[AsyncDiskCache, Key], Awaitable[Any]]] = {
    "get": lambda cache, key: cache.get(key),
    "get_many": lambda cache, key: cache.get_many([key]),
    "get_entry": value_of_entry,
    "entries": first_value,
    "pop": lambda cache, key: cache.pop(key),
}


def store(cache: DiskCache, large: bool) -> None:
    """Under a key each by another way."""
    value = ["x" * (2 << 20)] if large else [1]
    cache.set("set", value)
    cache.add(("add", 1), value, tag="t", meta={"m": 1})
    cache.set_many({b"many": value, 4: value}, expire=1000)
    cache["item"] = value


STORED: list[Key] = ["set", ("add", 1), b"many", 4, "item"]


@pytest.mark.parametrize("large", [False, True])
def test_all_ways_through_the_cache(opened: DiskCache, large: bool) -> None:
    expected = ["x" * (2 << 20)] if large else [1]
    for name, way in WAYS.items():
        store(opened, large)
        for key in STORED:
            assert way(opened, key) == expected, name
    assert len(opened) == 0


@pytest.mark.parametrize("name", WAYS)
def test_what_was_moved_is_refused(opened: DiskCache, name: str) -> None:
    opened.set("a", [Trap()])
    move(opened, "a", "b")
    for key in ("b", "b"):  # nothing of it is kept
        with pytest.raises(SerializationError, match=REFUSED):
            WAYS[name](opened, key)
    assert len(opened) == 2 and "b" in opened


def test_the_asynchronous_twins(tmp_path: Path, backend: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(tmp_path / "c", backend=backend, serializer=PickleSerializer(SECRET)) as cache:
            await cache.set("good", [1])
            await cache.add("added", [1])
            await cache.set_many([("many", [1])])
            await cache.set("a", [Trap()])
            move(cache._sync(), "a", "b")
            for way in ASYNC_WAYS.values():
                with pytest.raises(SerializationError, match=REFUSED):
                    await way(cache, "b")
            for name, way in ASYNC_WAYS.items():
                for key in ("good", "added", "many"):
                    expected = {key: [1]} if name == "get_many" else [1]
                    assert await way(cache, key) == expected, name

    asyncio.run(main())


def test_cold_values(tmp_path: Path, backend: str) -> None:
    """Read from disk by a loop, one by one and together."""

    async def main() -> None:
        async with AsyncDiskCache(tmp_path / "c", backend=backend, serializer=PickleSerializer(SECRET)) as cache:
            assert await cache.get("good") == ["y" * 5000]
            with pytest.raises(SerializationError, match=REFUSED):
                await cache.get_many(["good", "moved"])
            with pytest.raises(SerializationError, match=REFUSED):
                await cache.get("moved")

    with DiskCache(tmp_path / "c", backend=backend, serializer=PickleSerializer(SECRET)) as cache:
        cache.set("good", ["y" * 5000])
        move(cache, "good", "moved")
    asyncio.run(main())


def test_counters_and_plain_values_need_no_signature(opened: DiskCache) -> None:
    assert opened.incr("n") == 1 and opened.incr("n", 5) == 6
    opened.set_many({"b": b"x", "s": "x", "f": 1.5, "none": None})
    assert opened.get_many(["n", "b", "s", "f", "none"]) == {"n": 6, "b": b"x", "s": "x", "f": 1.5, "none": None}
