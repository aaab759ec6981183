"""The cache backend of Django:

    CACHES = {"default": {"BACKEND": "yatagarasu_cache.integrations.django.YatagarasuCache",
                          "LOCATION": "/var/cache/app", "OPTIONS": {"size_limit": 1 << 30}}}
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

from django.conf import settings as django_settings
from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
from django.core.exceptions import ImproperlyConfigured

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..codec import Key, encode_key
from ..codec.signing import Signer
from ..codec.user_secret import user_secret
from ..errors import SerializationError
from ._handles import Use
from ._values import added, aio_added, log

__all__ = ["YatagarasuCache"]

_MISSING: Any = object()
_OF_DJANGO = ("MAX_ENTRIES", "CULL_FREQUENCY")  # there is `size_limit`
_uses: dict[Any, Use] = {}  # of this process, until it ends: instances are of a thread, or of a task


class YatagarasuCache(BaseCache):
    """A `BaseCache` on a `DiskCache`, shared by threads and processes; its ``a...`` methods on an
    `AsyncDiskCache`.

    LOCATION is the directory, OPTIONS are the settings of `DiskCache`. Whole numbers are stored as they are,
    so that `incr` is atomic; everything else is pickled and signed with SECRET_KEY. What was signed with one
    of SECRET_KEY_FALLBACKS is read, too. Without a SECRET_KEY the user's own secret is taken.

    `close`, which Django calls after each request, leaves the cache open for the next one.
    """

    def __init__(self, location: str, params: Mapping[str, Any]) -> None:
        super().__init__(dict(params))
        options = {name: value for name, value in params.get("OPTIONS", {}).items() if name not in _OF_DJANGO}
        self._use = _use(str(location), options)
        self._signer = _signer(*_secrets())

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        return self._use.cache

    @property
    def _aio(self) -> AsyncDiskCache:
        return self._use.aio

    # -- values and times ---------------------------------------------------------------------

    def _packed(self, key: str, value: Any) -> Any:
        if type(value) is int:
            return value
        return self._signer.signed(encode_key(key), pickle.dumps(value, pickle.HIGHEST_PROTOCOL))

    def _unpacked(self, key: str, stored: Any, default: Any) -> Any:
        """What cannot be read is a miss."""
        if type(stored) is int:
            return stored
        if type(stored) is not bytes:
            return default
        try:
            pickled = self._signer.checked(encode_key(key), stored)
        except SerializationError as error:
            log.warning("django: taken for a miss: %s", error)
            return default
        try:
            return pickle.loads(pickled)
        except Exception as error:  # whatever a class that has changed meanwhile, or is gone, comes up with
            log.warning("django: taken for a miss: %s: %s", type(error).__name__, error)
            return default

    def _is_readable(self, key: str, stored: Any) -> bool:
        return self._unpacked(key, stored, _MISSING) is not _MISSING

    def _expire(self, timeout: Any) -> float:
        """Seconds from now on; 0 and less is expired at once, inf is never."""
        if timeout is DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        return math.inf if timeout is None else float(timeout)

    def _sum(self, key: str, delta: Any, value: Any) -> Any:
        """Of a number that is no int."""
        found = self._unpacked(key, value, _MISSING)
        if found is _MISSING:
            raise ValueError(f"Key '{key}' not found")
        return self._packed(key, found + delta)

    # -- one entry ----------------------------------------------------------------------------

    def add(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        packed = self._packed(key, value)
        if expire <= 0:
            return not self._is_readable(key, self.cache.get(key))
        return added(self.cache, key, packed, expire, functools.partial(self._is_readable, key))

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        key = self.make_and_validate_key(key, version=version)
        found = self.cache.get(key, _MISSING)
        return default if found is _MISSING else self._unpacked(key, found, default)

    def set(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        packed = self._packed(key, value)
        if expire <= 0:
            self.cache.delete(key)
        else:
            self.cache.set(key, packed, expire=expire)

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        return self.cache.delete(key) if expire <= 0 else self.cache.touch(key, expire)

    def delete(self, key: Any, version: int | None = None) -> bool:
        return self.cache.delete(self.make_and_validate_key(key, version=version))

    def incr(self, key: Any, delta: Any = 1, version: int | None = None) -> Any:
        """Add to a number, which keeps its time. Atomic. ValueError if there is none."""
        key = self.make_and_validate_key(key, version=version)
        try:
            return self.cache.incr(key, delta, default=None)
        except KeyError:
            raise ValueError(f"Key '{key}' not found") from None
        except TypeError:
            try:
                stored = self.cache.modify(key, functools.partial(self._sum, key, delta))
            except SerializationError:  # it was stored by something else
                raise ValueError(f"Key '{key}' not found") from None
            return self._unpacked(key, stored, None)

    # -- many ---------------------------------------------------------------------------------

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        names = self._names(keys, version)
        return self._found(names, self.cache.get_many(names.values()))

    def _names(self, keys: Iterable[Any], version: int | None) -> dict[Any, str]:
        """What each key is stored under: several may have the same, as 1 and "1" have."""
        return {key: self.make_and_validate_key(key, version=version) for key in keys}

    def _found(self, names: Mapping[Any, str], found: Mapping[Any, Any]) -> dict[Any, Any]:
        values = {key: self._unpacked(name, found.get(name), _MISSING) for key, name in names.items()}
        return {key: value for key, value in values.items() if value is not _MISSING}

    def _packed_many(self, data: Mapping[Any, Any], version: int | None) -> dict[Key, Any]:
        names = {self.make_and_validate_key(key, version=version): value for key, value in data.items()}
        return {name: self._packed(name, value) for name, value in names.items()}

    def set_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        packed, expire = self._packed_many(data, version), self._expire(timeout)
        if expire <= 0:
            self.cache.delete_many(packed)
        else:
            self.cache.set_many(packed, expire=expire)
        return []

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        self.cache.delete_many(self._names(keys, version).values())

    def clear(self) -> None:
        """Empty the location, whichever aliases, prefixes and versions use it."""
        self.cache.clear()

    def close(self, **kwargs: Any) -> None:
        """Nothing: Django calls it after each request."""

    # -- the same for coroutines --------------------------------------------------------------

    async def aadd(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> bool:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        packed = self._packed(key, value)
        if expire <= 0:
            return not self._is_readable(key, await self._aio.get(key))
        return await aio_added(self._aio, key, packed, expire, functools.partial(self._is_readable, key))

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        key = self.make_and_validate_key(key, version=version)
        found = await self._aio.get(key, _MISSING)
        return default if found is _MISSING else self._unpacked(key, found, default)

    async def aset(
        self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> None:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        packed = self._packed(key, value)
        if expire <= 0:
            await self._aio.delete(key)
        else:
            await self._aio.set(key, packed, expire=expire)

    async def atouch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        key, expire = self.make_and_validate_key(key, version=version), self._expire(timeout)
        return await (self._aio.delete(key) if expire <= 0 else self._aio.touch(key, expire))

    async def adelete(self, key: Any, version: int | None = None) -> bool:
        return await self._aio.delete(self.make_and_validate_key(key, version=version))

    async def aincr(self, key: Any, delta: Any = 1, version: int | None = None) -> Any:
        key = self.make_and_validate_key(key, version=version)
        try:
            return await self._aio.incr(key, delta, default=None)
        except KeyError:
            raise ValueError(f"Key '{key}' not found") from None
        except TypeError:
            try:
                stored = await self._aio.modify(key, functools.partial(self._sum, key, delta))
            except SerializationError:
                raise ValueError(f"Key '{key}' not found") from None
            return self._unpacked(key, stored, None)

    async def adecr(self, key: Any, delta: Any = 1, version: int | None = None) -> Any:
        return await self.aincr(key, -delta, version=version)

    async def aget_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        names = self._names(keys, version)
        return self._found(names, await self._aio.get_many(names.values()))

    async def aset_many(
        self, data: Mapping[Any, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        packed, expire = self._packed_many(data, version), self._expire(timeout)
        if expire <= 0:
            await self._aio.delete_many(packed)
        else:
            await self._aio.set_many(packed, expire=expire)
        return []

    async def adelete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        await self._aio.delete_many(self._names(keys, version).values())

    async def aclear(self) -> None:
        await self._aio.clear()

    async def aclose(self, **kwargs: Any) -> None:
        """Nothing, as `close`."""


def _use(location: str, options: Mapping[str, Any]) -> Use:
    key = location, repr(sorted(options.items()))
    found = _uses.get(key)
    if found is None:
        found = _uses.setdefault(key, Use(location, {"on_unreadable": "miss", **options}))
    return found


def _secrets() -> tuple[bytes, tuple[bytes, ...]]:
    try:
        secret = django_settings.SECRET_KEY
    except ImproperlyConfigured:  # a script that has set up nothing but its cache
        return user_secret(), ()
    return _bytes(secret), tuple(map(_bytes, django_settings.SECRET_KEY_FALLBACKS))


def _bytes(secret: str | bytes) -> bytes:
    return secret if isinstance(secret, bytes) else secret.encode()


@functools.lru_cache(maxsize=16)
def _signer(secret: bytes, old_secrets: tuple[bytes, ...]) -> Signer:
    return Signer(secret, old_secrets, person=b"django")
