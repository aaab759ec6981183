"""Checks of arguments other than keys and values: they say what is wrong, and how to mend it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import Any, NoReturn

from .codec import Key, MsgpackSerializer, encode_key, refuse_equal
from .errors import SerializationError, ValueTooLarge
from .guard import callers
from .store.format import MAX_HEAD_BYTES

__all__ = [
    "META", "check_fix", "check_int", "check_items", "check_range", "check_start", "check_version",
    "distinct", "encode_meta", "encode_tag", "expiry", "listed", "pairs", "wrong_type",
]  # fmt: skip

META = MsgpackSerializer()
_FOREVER = (1 << 63) - 1  # nanoseconds since the epoch: beyond any clock
# Iterable, but never meant as several keys, or (mappings and sets too) as a pair.
_TEXTS = (str, bytes, bytearray, memoryview)
_NO_PAIRS = (*_TEXTS, Mapping, Set)
callers(refuse_equal)


@callers
def expiry(expire: float | None, default: float | None) -> int:
    """Seconds from now (`default` if None) as nanoseconds since the epoch; 0 for never."""
    if expire is None:
        expire = default
        if expire is None:
            return 0
    if isinstance(expire, bool) or not isinstance(expire, (int, float)) or expire != expire:
        raise TypeError(f"expire must be a number of seconds or None, not {expire!r}")
    if expire == math.inf:
        return 0
    if expire <= 0:
        raise ValueError(f"expire must be more than 0 seconds, not {expire!r}: use delete() instead")
    return min(time.time_ns() + int(min(expire, 1e10) * 1e9), _FOREVER)


@callers
def listed(keys: Iterable[Key]) -> list[Key]:
    if isinstance(keys, _TEXTS) or not _is_iterable(keys):
        kind = type(keys).__name__
        raise TypeError(f"keys must be an iterable of keys, not {kind}: for one key, write [key]")
    return list(keys)


def distinct(keys: Iterable[Key]) -> list[Key]:
    """`listed`; refuses different keys that would be one in a dict."""
    wanted = listed(keys)
    refuse_equal(wanted)
    return wanted


@callers
def check_items(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> None:
    """Check that these can be pairs, before going through them."""
    if isinstance(items, _TEXTS) or not _is_iterable(items):
        raise TypeError(
            f"items must be a mapping or an iterable of (key, value) pairs, not {type(items).__name__}"
        )


@callers
def pairs(items: Mapping[Key, Any] | Iterable[tuple[Key, Any]]) -> list[tuple[Key, Any]]:
    """All of them as pairs; refuses different keys that would be one in a dict."""
    check_items(items)
    found = [
        item if type(item) is tuple and len(item) == 2 else _pair(position, item)
        for position, item in enumerate(items.items() if isinstance(items, Mapping) else items)
    ]
    refuse_equal([key for key, _ in found])
    return found


def _pair(position: int, item: Any) -> tuple[Key, Any]:
    """A pair need not be a tuple: it may be a list, or a row of a table."""
    name = f"items[{position}] must be a (key, value) pair"
    if isinstance(item, _NO_PAIRS) or not _is_iterable(item):
        raise TypeError(f"{name}, not {type(item).__name__}")
    parts = tuple(islice(item, 3))
    if len(parts) != 2:
        raise ValueError(f"{name}: it has {len(parts) if len(parts) < 2 else 'more than 2'} parts")
    return parts


def _is_iterable(value: object) -> bool:
    return isinstance(value, Iterable) or hasattr(type(value), "__getitem__")


@callers
def check_fix(fix: bool, drop_unreadable: bool) -> None:
    if drop_unreadable and not fix:
        raise ValueError("drop_unreadable=True gives something up: it needs fix=True")


def check_int(name: str, value: object, otherwise: str = "") -> None:
    if type(value) is not int:
        wrong_type(f"{name} must be an int{otherwise}, not {type(value).__name__}")


@callers
def check_range(offset: object, length: object) -> None:
    """A part of a value, in bytes."""
    for name, number in (("offset", offset), ("length", 0 if length is None else length)):
        if isinstance(number, bool) or not isinstance(number, int):
            otherwise = " or None" if name == "length" else ""
            raise TypeError(f"{name} must be an int (bytes){otherwise}, not {type(number).__name__}")
        if number < 0:
            raise ValueError(f"{name} must not be negative: it is {number}")


@callers
def check_start(offset: int, length: int) -> None:
    """That a part begins within a value of `length` bytes, or where it ends."""
    if offset > length:
        raise ValueError(f"offset is {offset}, and the value has {length} bytes")


@callers
def check_version(if_version: object) -> None:
    if type(if_version) is not int:
        kind = type(if_version).__name__
        raise TypeError(f"if_version must be an int, the version of an Entry or 0 for none, not {kind}")
    if if_version < 0:
        raise ValueError(f"if_version must be the version of an Entry, or 0 for none, not {if_version}")


@callers
def wrong_type(what: str) -> NoReturn:
    raise TypeError(what)


def encode_tag(tag: Key) -> bytes:
    try:
        return encode_key(tag)  # at most MAX_KEY_BYTES, for which a record has room
    except SerializationError as error:
        text = str(error).replace("the key takes", "it takes")
        raise SerializationError(f"tag: {text}") from error


def encode_meta(meta: Any) -> bytes:
    try:
        return META.dumps(meta, MAX_HEAD_BYTES)
    except SerializationError as error:
        raise SerializationError(f"meta: {error}") from error
    except ValueTooLarge:
        raise ValueTooLarge(f"meta takes more than {MAX_HEAD_BYTES} bytes: keep meta small") from None
