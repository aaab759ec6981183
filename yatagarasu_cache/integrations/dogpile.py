"""The backend of dogpile.cache, which finds it by the name ``yatagarasu_cache``:

    region = make_region().configure("yatagarasu_cache", expiration_time=3600,
                                     arguments={"directory": "/var/cache/app"})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dogpile.cache.api import NO_VALUE, BytesBackend, CacheMutex

from ..cache import DiskCache
from ..codec import encode_key
from ..codec.signing import Signer
from ..codec.user_secret import user_secret
from ..errors import ConfigurationError, LockTimeout, Reentered, SerializationError
from ._handles import Use, settings_among
from ._values import log

__all__ = ["YatagarasuBackend"]


class YatagarasuBackend(BytesBackend):
    """A `BytesBackend` on a `DiskCache`, shared by threads and processes, which `get_mutex` excludes.

    arguments: ``directory``; ``secret``, with which what the region pickles is signed (None: the user's own);
    and every setting of `DiskCache`, of which `default_expire` is after how many seconds entries are removed,
    whatever the `expiration_time` of the region. Others are ignored, and logged.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        if "directory" not in arguments:
            raise ConfigurationError('arguments must name the "directory" of the cache')
        directory, secret = arguments["directory"], arguments.get("secret")
        settings = settings_among(arguments, "dogpile", ("directory", "secret"))
        self._signer = Signer(user_secret() if secret is None else secret, person=b"dogpile")
        self._use = Use(directory, settings)

    @property
    def cache(self) -> DiskCache:
        """The cache itself."""
        return self._use.cache

    def get_mutex(self, key: str) -> CacheMutex:
        """A lock of all processes, for who makes the value of a key. It ends with its holder."""
        return _Mutex(self.cache, key)

    def get_serialized(self, key: str) -> Any:
        return self._opened(key, self.cache.get(key))

    def get_serialized_multi(self, keys: Iterable[str]) -> Sequence[Any]:
        keys = list(keys)
        found = self.cache.get_many(dict.fromkeys(keys))
        return [self._opened(key, found.get(key)) for key in keys]

    def set_serialized(self, key: str, value: bytes) -> None:
        self.cache.set(key, self._signer.signed(encode_key(key), value))

    def set_serialized_multi(self, mapping: Mapping[str, bytes]) -> None:
        self.cache.set_many((key, self._signer.signed(encode_key(key), mapping[key])) for key in mapping)

    def delete(self, key: str) -> None:
        self.cache.delete(key)

    def delete_multi(self, keys: Iterable[str]) -> None:
        self.cache.delete_many(dict.fromkeys(keys))

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._use.close()

    def _opened(self, key: str, stored: Any) -> Any:
        """What the region serialized, which may be a pickle: only what was signed is given to it."""
        if type(stored) is not bytes:
            return NO_VALUE
        try:
            return bytes(self._signer.checked(encode_key(key), stored))
        except SerializationError as error:
            log.warning("dogpile: taken for a miss: %s", error)
            return NO_VALUE


class _Mutex(CacheMutex):
    """`DiskCache.lock`, as dogpile asks for it."""

    def __init__(self, cache: DiskCache, key: str) -> None:
        self._lock, self._now = cache.lock(key), cache.lock(key, wait=0)
        self._held: Any = None

    def acquire(self, wait: bool = True) -> bool:
        lock = self._lock if wait else self._now
        try:
            lock.acquire()
        except LockTimeout:
            return False
        except Reentered:  # held by this thread already
            if wait:
                raise
            return False
        self._held = lock
        return True

    def release(self) -> None:
        held, self._held = self._held, None
        held.release()

    def locked(self) -> bool:
        return self._lock.locked()
