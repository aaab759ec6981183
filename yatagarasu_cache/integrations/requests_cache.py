"""The backend of requests-cache:

    session = CachedSession(backend=YatagarasuCache("/var/cache/http", size_limit=1 << 30), expire_after=3600)
"""

from __future__ import annotations

import os
from collections.abc import ItemsView, Iterable, Iterator, ValuesView
from typing import Any

from requests_cache.backends.base import BaseCache, BaseStorage
from requests_cache.policy.settings import CacheSettings
from requests_cache.serializers import pickle_serializer

from ..cache import DiskCache
from ..codec import encode_key
from ..codec.signing import Signer
from ..codec.user_secret import user_secret
from ..errors import CacheIOError, SerializationError, ValueTooLarge
from ._handles import Use, settings_among
from ._values import log, put, signed_pickles

__all__ = ["YatagarasuCache", "YatagarasuDict"]

# What sessions are told, along with their backend; `read_only` is a setting of both.
_OF_SESSIONS = {field.name for field in CacheSettings.__attrs_attrs__} - {"read_only"} | {"decode_content"}


class YatagarasuCache(BaseCache):
    """Responses and redirects, each in a `YatagarasuDict`.

    cache_name: the directory; responses and redirects are in directories of their own in it. serializer: of
    requests-cache, for responses; None: pickle. secret: with which bytes that it makes are signed; None: the
    user's own. settings: those of `DiskCache`, for both. Responses are kept, stale or not, until there is no
    room for them: what is stale can be revalidated, or stand in where the server fails.
    """

    def __init__(
        self, cache_name: str | os.PathLike[str] = "http_cache", serializer: Any = None, *,
        secret: bytes | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(cache_name=os.fspath(cache_name))
        ours = settings_among(settings, "requests_cache", _OF_SESSIONS)
        decode_content = settings.get("decode_content", False)
        self.responses: YatagarasuDict = YatagarasuDict(
            cache_name, "responses", serializer or pickle_serializer, decode_content, secret=secret, **ours
        )
        self.redirects: YatagarasuDict = YatagarasuDict(
            cache_name, "redirects", None, secret=secret, **ours
        )

    def get_response(self, key: str, default: Any = None) -> Any:
        """As of any backend; where the disk fails, nothing is there, and that is logged."""
        try:
            return super().get_response(key, default)
        except CacheIOError as error:
            log.warning("requests_cache: could not read a response: %s", error)
            return default

    def save_response(self, response: Any, cache_key: str | None = None, expires: Any = None) -> None:
        """As of any backend. What cannot be stored, since it is too large or the disk fails, is logged: who
        asked for it has it all the same."""
        try:
            super().save_response(response, cache_key, expires)
        except (CacheIOError, ValueTooLarge) as error:
            log.warning("requests_cache: could not store a response: %s", error)

    @property
    def db_path(self) -> str:
        """The directory."""
        return os.path.dirname(self.responses._use.directory)


class YatagarasuDict(BaseStorage[str, Any]):
    """A mapping of strings to what a serializer of requests-cache makes bytes or text of.

    cache_name, table_name: the directory, and that within it which is this mapping's own. serializer: None
    stores values as they are. secret, settings: see `YatagarasuCache`.
    """

    def __init__(
        self, cache_name: str | os.PathLike[str] = "http_cache", table_name: str = "responses",
        serializer: Any = pickle_serializer, decode_content: bool = False, *, secret: bytes | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(serializer=serializer, decode_content=decode_content)
        self._signer = Signer(user_secret() if secret is None else secret, person=b"requests-cache")
        ours = settings_among(settings, "requests_cache", _OF_SESSIONS)
        given = {"on_unreadable": "miss", **ours, "serializer": signed_pickles(secret)}
        self._use = Use(os.path.join(cache_name, table_name), given)

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        return self._use.cache

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._use.close()

    def __getitem__(self, key: str) -> Any:
        found = self.cache.get(key, _MISSING)
        if found is _MISSING:
            raise KeyError(key)
        return self.deserialize(key, found)

    def __setitem__(self, key: str, value: Any) -> None:
        put(self.cache, key, self._stored(key, value))

    def __delitem__(self, key: str) -> None:
        del self.cache[key]

    def __contains__(self, key: object) -> bool:
        return key in self.cache  # type: ignore[operator]

    def __iter__(self) -> Iterator[str]:
        for key in self.cache:
            if type(key) is str:
                yield key

    def __len__(self) -> int:
        return len(self.cache)

    def items(self) -> ItemsView[str, Any]:
        """A view that goes on where something is removed, or expires, while it is walked through."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """Likewise."""
        return _Values(self)

    def clear(self) -> None:
        """Remove everything, of this table alone."""
        self.cache.clear()

    def bulk_delete(self, keys: Iterable[str]) -> None:
        """Remove some; those that are not there are not missed."""
        self.cache.delete_many(dict.fromkeys(keys))

    def _stored(self, key: str, value: Any) -> Any:
        data = self.serialize(value)
        is_signed = self.serializer is not None and type(data) is bytes  # they may be a pickle
        return self._signer.signed(encode_key(key), data) if is_signed else data

    def deserialize(self, key: str, value: Any) -> Any:
        """None for what cannot be read, as for what nobody has signed who knows the secret."""
        if self.serializer is None or type(value) is str:  # of text nobody makes a pickle
            return super().deserialize(key, value)
        if type(value) is not bytes:  # arrays are buffers, too, and pickle takes those
            kind = type(value).__name__
            log.warning("requests_cache: taken for a miss: a %s was stored", kind)
            return None
        try:
            value = bytes(self._signer.checked(encode_key(key), value))
        except SerializationError as error:
            log.warning("requests_cache: taken for a miss: %s", error)
            return None
        return super().deserialize(key, value)


class _Items(ItemsView[str, Any]):
    def __init__(self, table: YatagarasuDict) -> None:
        super().__init__(table)
        self._table = table

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return _there(self._table)


class _Values(ValuesView[Any]):
    def __init__(self, table: YatagarasuDict) -> None:
        super().__init__(table)
        self._table = table

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _there(self._table))


def _there(table: YatagarasuDict) -> Iterator[tuple[str, Any]]:
    """What is there when its turn comes."""
    for key in table:
        try:
            value = table[key]
        except KeyError:
            continue
        yield key, value


_MISSING: Any = object()
