"""Two keys with one digest, made on purpose: whoever knows the cache's seed, which lies in its index and in
every copy of it, can find as many as he likes. A key is itself all the same, and not its digest.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import AsyncDiskCache, DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f

pytestmark = pytest.mark.once

Pair = tuple[bytes, bytes]


@pytest.fixture
def pair(core: str, cache: DiskCache) -> Pair:
    """Two keys of `cache` that have the same digest."""
    return colliding(cache)


def colliding(cache: DiskCache) -> Pair:
    """XXH3 of 241 bytes and more multiplies halves of words of the key, combined with words of its secret that
    the seed has changed: where a half is made 0, the other one does not matter."""
    seed = cache._store.current.seed
    first = int.from_bytes(bytes.fromhex("7c01812cf721ad1c"), "little") - seed & f.MASK64
    second = int.from_bytes(bytes.fromhex("ded46de9839097db"), "little") + seed & f.MASK64

    def key(number: int) -> bytes:
        encoded = bytearray((b"b" + b"/a/long/url?" * 50)[:512])
        struct.pack_into("<II", encoded, 64, first & f.MASK32, 0x1000 + number)
        struct.pack_into("<II", encoded, 128, second & f.MASK32, 0x90001000 - number)
        return bytes(encoded[1:])

    one, other = key(1), key(7)
    assert one != other
    assert f.key_digest(encode_key(one), seed) == f.key_digest(encode_key(other), seed)
    return one, other


def large(cache: DiskCache) -> bytes:
    return b"L" * (cache._store.limits.large_bytes + 5)


@pytest.mark.parametrize("kind", ["short", "long", "large", "tagged"])
def test_a_key_does_not_get_what_another_one_has(cache: DiskCache, pair: Pair, kind: str) -> None:
    there, absent = pair
    value = {"short": b"v", "long": b"v" * 100_000, "large": large(cache), "tagged": b"t"}[kind]
    cache.set(there, value, tag="t" * 5000 if kind == "tagged" else None)
    for _ in range(2):  # before its segment is open, and after
        assert cache.get(absent) is None and cache.get_entry(absent) is None
        assert absent not in cache and cache.get_many([absent, there]) == {there: value}
        with pytest.raises(KeyError):
            cache.open(absent)
        with pytest.raises(KeyError):
            cache.location(absent)
        assert there in cache and cache.get(there) == value
    stats = cache.stats()
    assert (stats.corrupt, len(cache), cache.check()) == (0, 1, [])
    assert stats.misses >= 6 and stats.hits >= 4


def test_a_key_does_not_change_what_another_one_has(cache: DiskCache, pair: Pair) -> None:
    there, absent = pair
    cache.set(there, 5, tag="t")
    for _ in range(2):
        assert not cache.delete(absent) and not cache.touch(absent, 1e-9)
        assert cache.delete_many([absent]) == 0 and cache.pop(absent, "none") == "none"
        with pytest.raises(KeyError):
            cache.incr(absent, default=None)
        assert cache.get(there) == 5
    assert cache.touch(there, 1000) and cache.incr(there) == 6
    assert cache.delete_many([absent, there]) == 1 and len(cache) == 0


@pytest.mark.parametrize("store", ["set", "add", "incr", "set_many", "large", "add large"])
def test_the_later_of_two_takes_the_place(
    cache: DiskCache, pair: Pair, make: Callable[..., DiskCache], store: str
) -> None:
    before, key = pair
    cache.set(before, large(cache))
    value: Any = large(cache)[1:] if "large" in store else 3
    if store == "incr":
        assert cache.incr(key, 3) == 3
    elif store == "set_many":
        assert cache.set_many({key: 3}) == 1
    elif "add" in store:
        assert cache.add(key, value) and not cache.add(key, value)
    else:
        assert cache.set(key, value)
    assert cache.get(key) == value and cache.get(before) is None
    assert len(cache) == 1 and cache.check() == []
    assert len(os.listdir(os.path.join(cache.directory, "large"))) == ("large" in store)
    cache.close()
    os.unlink(os.path.join(cache.directory, "index"))
    again = make()
    assert again.get(key) == value and again.get(before) is None


def test_a_key_that_begins_with_another_one_is_another_one(cache: DiskCache, core: str) -> None:
    """What is compared has a length: the record of a short key is not that of a longer one."""
    cache.set(b"key", b"v", meta="x")
    slot = cache._store.finding.lookup(*f.key_digest(encode_key(b"key"), cache._store.current.seed))
    assert slot is not None and cache._store.finding.is_of(slot, encode_key(b"key"))
    assert not cache._store.finding.is_of(slot, encode_key(b"ke")) and not cache._store.finding.is_of(slot, encode_key(b"key\0"))


def test_of_two_only_the_one_that_is_stored_is_removed_by_its_tag(cache: DiskCache, pair: Pair) -> None:
    one, other = pair
    cache.set(one, 1, tag="a")
    cache.set(other, 2, tag="b")
    assert cache.evict("a") == 0 and cache.get(other) == 2
    assert [entry.key for entry in cache.entries()] == [other] and list(cache) == [other]
    assert cache.evict("b") == 1 and len(cache) == 0


def test_tasks(core: str, backend: str, directory: Path) -> None:
    async def use() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            await cache.set("other", b"x")
            there, absent = colliding(cache._sync())
            for value in (b"v", b"v" * 100_000, large(cache._sync())):
                await cache.set(there, value)
                drop_from_memory(directory)
                for _ in range(2):
                    assert await cache.get(absent) is None and absent not in cache
                    assert await cache.get_many([absent, there]) == {there: value}
                    assert not await cache.delete(absent) and await cache.pop(absent) is None
                    assert await cache.get(there) == value and there in cache
                    drop_from_memory(directory)
                    assert await cache.get(there) == value
            assert (await cache.stats()).corrupt == 0 and await cache.check() == []

    asyncio.run(use())


def drop_from_memory(directory: Path) -> None:
    """Have what follows read from the disk, where the file system keeps its content there."""
    for path in directory.rglob("*.seg"):
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_damaged_key_is_damage_and_no_other_key(cache: DiskCache, core: str) -> None:
    cache.set("key", b"value")
    slot = cache._store.finding.lookup(*f.key_digest(encode_key("key"), cache._store.current.seed))
    assert slot is not None and cache._store.active.writer is not None
    os.pwrite(cache._store.active.writer.fd, b"K", slot.offset + f.RECORD_BYTES + 1)
    assert "key" not in cache and not cache.delete("key")
    assert cache.get("key") is None and cache.stats().corrupt == 1 and len(cache) == 0


def test_a_copy_of_the_cache_knows_its_keys(
    cache: DiskCache, pair: Pair, make: Callable[..., DiskCache], tmp_path: Path
) -> None:
    cache.set(pair[0], b"v" * 5000)
    cache.close()
    shutil.copytree(cache.directory, tmp_path / "copy")
    copy = make(tmp_path / "copy")
    assert copy.get(pair[1]) is None and copy.get(pair[0]) == b"v" * 5000
