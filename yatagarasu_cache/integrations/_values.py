"""What adapters do with values of any kind: what the codec keeps is kept so, the rest are signed pickles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..codec import PickleSerializer
from ..codec.user_secret import user_secret
from ..errors import EntryGone, SerializationError
from ..log import log

__all__ = ["added", "aio_added", "log", "put", "signed_pickles"]

_TRIES = 8


def signed_pickles(secret: bytes | None, old_secrets: Sequence[bytes] = ()) -> PickleSerializer:
    """The serializer of those secrets; None: of the user's own (`codec.user_secret`). For the same secrets it
    is the same one, so that adapters which name them share a handle."""
    return _of(user_secret() if secret is None else secret, tuple(old_secrets))


@functools.lru_cache(maxsize=64)
def _of(secret: bytes, old_secrets: tuple[bytes, ...]) -> PickleSerializer:
    return PickleSerializer(secret, old_secrets=old_secrets, only_others=True)


def put(cache: DiskCache, key: str, value: Any, expire: float | None = None) -> None:
    """`DiskCache.set`, but of files and iterators, which frameworks would pickle: `set` would read them to
    their end, and bytes would come back."""
    if callable(getattr(value, "read", None)) or isinstance(value, Iterator):
        cache.set_many([(key, value)], expire)
    else:
        cache.set(key, value, expire)


def added(
    cache: DiskCache, key: str, value: Any, expire: float, is_readable: Callable[[Any], bool] = lambda _: True
) -> bool:
    """`DiskCache.add`, where what cannot be read is not in the way: it is a miss for those who ask for it,
    and would else keep others from storing until it expires."""
    for _ in range(_TRIES):
        if cache.add(key, value, expire):
            return True
        there = cache.get_entry(key)
        if there is None:
            continue
        try:
            if is_readable(there.value):
                return False
        except (EntryGone, SerializationError):
            pass  # of which the latter was logged
        if cache.set(key, value, expire, if_version=there.version):
            return True
    return False


async def aio_added(
    cache: AsyncDiskCache, key: str, value: Any, expire: float, is_readable: Callable[[Any], bool]
) -> bool:
    """The same for coroutines."""
    for _ in range(_TRIES):
        if await cache.add(key, value, expire):
            return True
        there = await cache.get_entry(key)
        if there is None:
            continue
        try:
            if is_readable(await there.value):
                return False
        except (EntryGone, SerializationError):
            pass
        if await cache.set(key, value, expire, if_version=there.version):
            return True
    return False
