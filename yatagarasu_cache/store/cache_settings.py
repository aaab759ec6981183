"""Settings that belong to a cache, not to a handle on it: they are the same for all who have it open.

The header of the index holds them, so that every open handle sees when they change, and a small
file of their own, from which an index that has to be made anew takes them.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from ..concurrency.interruption import ours
from ..config import MAX_HEADROOM, MAX_SIZE_LIMIT, MIN_HEADROOM, MIN_SIZE_LIMIT, Settings
from . import format as f
from .unreadable import is_absence

if TYPE_CHECKING:
    from ..backends.base import Backend


_WORDS = struct.Struct("@QQd")  # the words of the index from W_SIZE_LIMIT on


class CacheSettings(NamedTuple):
    """What a cache keeps. The fields are those of `Settings`."""

    size_limit: int
    eviction: str
    headroom: float

    @property
    def code(self) -> int:
        """The eviction policy as the files name it."""
        return f.EVICTIONS.index(self.eviction) + 1


def of_handle(settings: Settings) -> CacheSettings:
    """What the settings of a handle say, named or not."""
    return CacheSettings(*(getattr(settings, name) for name in CacheSettings._fields))


DEFAULT = of_handle(Settings(""))


def _checked(size_limit: int, eviction: int, headroom: float) -> CacheSettings | None:
    """None if one of these is nothing that anybody can have set."""
    if not MIN_SIZE_LIMIT <= size_limit <= MAX_SIZE_LIMIT or not 1 <= eviction <= len(f.EVICTIONS):
        return None
    if not MIN_HEADROOM <= headroom <= MAX_HEADROOM:
        return None
    return CacheSettings(size_limit, f.EVICTIONS[eviction - 1], headroom)


# -- the words of the index -------------------------------------------------------------------


def in_words(settings: CacheSettings) -> tuple[int, int, int, int]:
    """The words of the index: limit, policy, headroom, and the checksum of these."""
    packed = _WORDS.pack(settings.size_limit, settings.code, settings.headroom)
    limit, eviction, headroom = memoryview(packed).cast("Q").tolist()
    return limit, eviction, headroom, xxh3_64_intdigest(packed)


def checksum(words: memoryview) -> int:
    """What `W_SETTINGS_SUM` should say of the words before it."""
    return xxh3_64_intdigest(words[f.W_SIZE_LIMIT : f.W_SETTINGS_SUM].tobytes())


def from_words(words: memoryview) -> CacheSettings | None:
    """The settings in the words of an index; None while somebody changes them, and if they are damaged."""
    packed = words[f.W_SIZE_LIMIT : f.W_SETTINGS_SUM + 1].tobytes()
    if int.from_bytes(packed[_WORDS.size :], "little") != xxh3_64_intdigest(packed[: _WORDS.size]):
        return None
    return _checked(*_WORDS.unpack_from(packed))


# -- the file ---------------------------------------------------------------------------------


def pack(settings: CacheSettings) -> bytes:
    body = f.SETTINGS.pack(
        f.SETTINGS_MAGIC, f.FORMAT_VERSION, settings.code, settings.size_limit, settings.headroom, 0
    )[:-8]
    return body + xxh3_64_intdigest(body).to_bytes(8, "little")


def read(backend: Backend, root: str) -> CacheSettings | None:
    """What the file says; None if there is none, or it is damaged. OSError if that can't be told."""
    path = os.path.join(root, f.SETTINGS_NAME)
    try:
        with backend.reading(path) as fd:
            data = backend.read(fd, f.SETTINGS.size + 1, 0)
    except ours(OSError) as error:
        if is_absence(error):
            return None
        raise
    if len(data) != f.SETTINGS.size:
        return None
    magic, version, eviction, size_limit, headroom, checksum = f.SETTINGS.unpack(data)
    if (magic, version) != (f.SETTINGS_MAGIC, f.FORMAT_VERSION) or xxh3_64_intdigest(data[:-8]) != checksum:
        return None
    return _checked(size_limit, eviction, headroom)
