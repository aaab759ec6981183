"""The store of py-key-value-aio."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("key_value.aio")

from key_value.aio.stores.base import BaseStore
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper

from yatagarasu_cache import ClosedError, ConfigurationError, DiskCache
from yatagarasu_cache.integrations.key_value import YatagarasuStore


def with_store(path: Path, body: Callable[[YatagarasuStore], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        async with YatagarasuStore(path / "cache", **settings) as store:
            return await body(store)

    return asyncio.run(run())


def test_values_by_collection_and_key(tmp_path: Path) -> None:
    async def body(store: YatagarasuStore) -> None:
        assert isinstance(store, BaseStore) and await store.get("key") is None
        await store.put("key", {"a": [1, "é", None, {"b": 1.5}]})
        await store.put("key", {"other": True}, collection="c::d")
        await store.put("x", {}, collection="c")
        assert await store.get("key") == {"a": [1, "é", None, {"b": 1.5}]}
        assert await store.get("key", collection="c::d") == {"other": True}
        assert await store.get("d::key", collection="c") is None and await store.get("x", collection="c") == {}
        assert await store.delete("key") is True and await store.delete("key") is False
        assert await store.get("key") is None and await store.get("key", collection="c::d") is not None

    with_store(tmp_path, body)


def test_many_at_once(tmp_path: Path) -> None:
    async def body(store: YatagarasuStore) -> None:
        keys = [f"key-{i}" for i in range(50)]
        await store.put_many(keys, [{"i": i} for i in range(50)], ttl=100)
        assert await store.get_many([*keys, "none", "key-3"]) == [*({"i": i} for i in range(50)), None, {"i": 3}]
        values = await store.ttl_many(["key-7", "none"])
        assert values[0][0] == {"i": 7} and 90 < (values[0][1] or 0) <= 100 and values[1] == (None, None)
        assert await store.delete_many([*keys[:10], "none"]) == 10
        assert len(await store.keys()) == 40 and len(await store.keys(limit=5)) == 5

    with_store(tmp_path, body)


def test_time_to_live(tmp_path: Path) -> None:
    async def body(store: YatagarasuStore) -> None:
        await store.put("short", {"a": 1}, ttl=0.05)
        await store.put("long", {"a": 2}, ttl=1000)
        await store.put("ever", {"a": 3})
        await asyncio.sleep(0.1)
        assert await store.get("short") is None and await store.ttl("short") == (None, None)
        value, left = await store.ttl("long")
        assert value == {"a": 2} and left is not None and 990 < left <= 1000
        assert await store.ttl("ever") == ({"a": 3}, None)
        await store.cull()
        assert sorted(await store.keys()) == ["ever", "long"]

    with_store(tmp_path, body)


def test_collections_are_listed_and_destroyed(tmp_path: Path) -> None:
    async def body(store: YatagarasuStore) -> None:
        for name in ("a", "b", "ab"):
            await store.put_many(["1", "2"], [{"n": 1}, {"n": 2}], collection=name)
        assert sorted(await store.collections()) == ["a", "ab", "b"] and len(await store.collections(limit=2)) == 2
        assert sorted(await store.keys("a")) == ["1", "2"]
        assert await store.destroy_collection("a") is True and await store.destroy_collection("a") is False
        assert sorted(await store.collections()) == ["ab", "b"] and await store.get("1", collection="ab") == {"n": 1}
        assert await store.destroy() is True and await store.collections() == []

    with_store(tmp_path, body)


def test_another_adapter_and_wrappers(tmp_path: Path) -> None:
    async def body(store: YatagarasuStore) -> None:
        wrapped = PrefixKeysWrapper(key_value=store, prefix="p")
        await wrapped.put("key", {"a": 1})
        assert await wrapped.get("key") == {"a": 1} and await store.keys() == ["p__key"]

    with_store(tmp_path, body, default_collection="mine")
    with DiskCache(tmp_path / "cache") as cache:
        assert list(cache) == [("mine", "p__key")]


def test_what_cannot_be_read_is_a_miss(tmp_path: Path) -> None:
    with DiskCache(tmp_path / "cache") as cache:
        cache[("default_collection", "number")] = 5
        cache[("default_collection", "text")] = "{"
        cache[("default_collection", "list")] = "[1]"

    async def body(store: YatagarasuStore) -> None:
        assert await store.get_many(["number", "text", "list"]) == [None] * 3

    with_store(tmp_path, body)


def test_closing_ends_a_use(tmp_path: Path) -> None:
    async def run() -> None:
        first, second = YatagarasuStore(tmp_path / "cache"), YatagarasuStore(tmp_path / "cache")
        await first.put("key", {"a": 1})
        assert first.cache is second.cache
        await first.close()
        with pytest.raises(ClosedError):
            await first.get("key")
        assert await second.get("key") == {"a": 1}
        async with second:
            pass
        with pytest.raises(ClosedError):
            await second.get("key")

    asyncio.run(run())
    with pytest.raises(ConfigurationError, match="size_limit"):
        YatagarasuStore(tmp_path, size_limit=-1)


WRITER = """
import asyncio, sys
from yatagarasu_cache.integrations.key_value import YatagarasuStore
async def main():
    async with YatagarasuStore(sys.argv[1]) as store:
        await asyncio.gather(*(store.put(f"{sys.argv[2]}-{i}", {"i": i}) for i in range(50)))
asyncio.run(main())
"""


def test_processes_share_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    processes = [subprocess.Popen([*command, str(n)]) for n in range(3)]
    assert [process.wait(60) for process in processes] == [0] * 3

    async def body(store: YatagarasuStore) -> None:
        assert len(await store.keys()) == 150 and await store.get("2-49") == {"i": 49}

    with_store(tmp_path, body)
