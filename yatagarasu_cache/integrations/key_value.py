"""The store of py-key-value-aio (FastMCP and others):

    async with YatagarasuStore("/var/cache/app") as store:
        await store.put("key", {"any": ["value"]}, collection="answers", ttl=60)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from key_value.aio._utils.managed_entry import ManagedEntry
from key_value.aio._utils.serialization import SerializationAdapter
from key_value.aio.errors import DeserializationError
from key_value.aio.stores.base import (
    BaseContextManagerStore,
    BaseCullStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
)

from ..aio import AsyncDiskCache
from ._handles import Use
from ._values import log

__all__ = ["YatagarasuStore"]

_PAGE, _MOST = 10_000, 100_000  # keys or names that are listed without a limit, and with one


class YatagarasuStore(
    BaseEnumerateCollectionsStore, BaseEnumerateKeysStore, BaseDestroyCollectionStore, BaseDestroyStore,
    BaseCullStore, BaseContextManagerStore,
):  # fmt: skip
    """A store of collections on an `AsyncDiskCache`, shared by tasks, threads and processes.

    directory: of the cache. default_collection: name of the one that is meant where none is named.
    serialization_adapter: makes of an entry what is stored; None: JSON. settings: those of `DiskCache`. What
    is stored is bounded by its `size_limit`: what was not used for longest goes first.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, default_collection: str | None = None,
        serialization_adapter: SerializationAdapter | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self._use = Use(directory, {"on_unreadable": "miss", **settings})
        super().__init__(
            default_collection=default_collection, serialization_adapter=serialization_adapter,
            stable_api=True,
        )  # fmt: skip

    @property
    def cache(self) -> AsyncDiskCache:
        """The cache itself. The keys of its entries are (collection, key)."""
        return self._use.aio

    async def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        await super().close()
        await self._use.aclose()

    async def __aexit__(self, *exception: Any) -> bool | None:
        result = await super().__aexit__(*exception)
        await self._use.aclose()
        return result

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        return self._loaded(await self.cache.get((collection, key)))

    async def _get_managed_entries(
        self, *, collection: str, keys: Sequence[str]
    ) -> list[ManagedEntry | None]:
        found = await self.cache.get_many(dict.fromkeys((collection, key) for key in keys))
        return [self._loaded(found.get((collection, key))) for key in keys]

    def _loaded(self, stored: Any) -> ManagedEntry | None:
        if type(stored) is not str:
            return None
        try:
            return self._serialization_adapter.load_json(json_str=stored)
        except (DeserializationError, ValueError, TypeError) as error:
            log.warning("key_value: taken for a miss: %s", error)
            return None

    def _dumped(self, collection: str, key: str, entry: ManagedEntry) -> str:
        return self._serialization_adapter.dump_json(entry=entry, key=key, collection=collection)

    async def _put_managed_entry(self, *, collection: str, key: str, managed_entry: ManagedEntry) -> None:
        stored = self._dumped(collection, key, managed_entry)
        await self.cache.set((collection, key), stored, expire=managed_entry.ttl)

    async def _put_managed_entries(
        self, *, collection: str, keys: Sequence[str], managed_entries: Sequence[ManagedEntry],
        ttl: float | None, created_at: datetime, expires_at: datetime | None,
    ) -> None:  # fmt: skip
        pairs = zip(keys, managed_entries, strict=True)
        stored = {(collection, key): self._dumped(collection, key, entry) for key, entry in pairs}
        await self.cache.set_many(stored, expire=ttl)

    async def _delete_managed_entry(self, *, collection: str, key: str) -> bool:
        return await self.cache.delete((collection, key))

    async def _delete_managed_entries(self, *, collection: str, keys: Sequence[str]) -> int:
        return await self.cache.delete_many(dict.fromkeys((collection, key) for key in keys))

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        keys: list[str] = []
        async for entry in self.cache.entries(prefix=(collection,)):
            if len(keys) >= min(limit or _PAGE, _MOST):
                break
            keys.append(cast("tuple[str, str]", entry.key)[1])
        return keys

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        names: dict[str, None] = {}
        async for key in self.cache.keys():
            if type(key) is tuple and len(key) == 2:
                names[cast("str", key[0])] = None
                if len(names) >= min(limit or _PAGE, _MOST):
                    break
        return list(names)

    async def _delete_collection(self, *, collection: str) -> bool:
        return bool(await self.cache.delete_prefix((collection,)))

    async def _delete_store(self) -> bool:
        await self.cache.clear()
        return True

    async def _cull(self) -> None:
        await self.cache.expire()
