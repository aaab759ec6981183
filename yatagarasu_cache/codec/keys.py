"""Keys to bytes that are equal only for equal keys, and back.

They are such that one `bytes.startswith` answers whether a key has a prefix (`encode_prefix`).
"""

from __future__ import annotations

import math
from itertools import chain
from struct import Struct
from typing import Any, TypeAlias, Union

from ..concurrency.interruption import is_interruption
from ..errors import SerializationError
from .basics import DOUBLE, from_int, from_utf8, to_float, to_int, type_name, utf8

Key: TypeAlias = Union[str, bytes, int, float, bool, None, "tuple[Key, ...]"]
Prefix: TypeAlias = Union[str, bytes, "tuple[Key, ...]"]

KEY_STR, KEY_BYTES, KEY_INT, KEY_FLOAT = b"s", b"b", b"i", b"d"  # first bytes of encoded keys
KEY_NONE, KEY_TRUE, KEY_FALSE, KEY_TUPLE = b"n", b"t", b"f", b"u"

MAX_KEY_BYTES = 65_535
"""Longest encoded key; also what the two-byte lengths inside tuple keys can say."""

MAX_KEY_DEPTH = 32
"""How deep tuples may be nested in a key."""

_LENGTH = Struct("<H")
_LONG_BITS = 8 * (MAX_KEY_BYTES - 2)  # from which on an int may be too long
_MANY_PARTS = 64  # of a tuple that is encoded step by step
_SURELY_SHORT = MAX_KEY_BYTES // 4 - 1  # characters of a str that is short enough in UTF-8
_pack_length = _LENGTH.pack


# Keys: one byte for the type, then the content. The parts of a tuple are keys themselves, each
# behind its length. A count in front would break prefixes: ("a",) must begin ("a", "b").


def encode_key(key: Key) -> bytes:
    """The bytes that stand for `key`; no two keys share them, ``1``, ``"1"``, ``True`` and ``1.0`` included.

    ``-0.0`` is the same key as ``0.0``. Only exact types are keys: an enum or a subclass would
    come back as something else.

    Raises `SerializationError` for any other type, for NaN (which could never be found again),
    for tuples nested deeper than `MAX_KEY_DEPTH`, and beyond `MAX_KEY_BYTES`.
    """
    if type(key) is str:
        if len(key) > _SURELY_SHORT:
            return _encode_long_key(key)
        try:
            return KEY_STR + key.encode()
        except UnicodeEncodeError:
            return KEY_STR + utf8(key)
    return _encode_rare_key(key)


def _encode_long_key(key: str) -> bytes:
    _check_key_length(1 + len(key))  # before there is a copy of it
    data = KEY_STR + utf8(key)
    _check_key_length(len(data))
    return data


def _encode_rare_key(key: Any) -> bytes:
    """`encode_key` for everything but str."""
    kind = type(key)
    if kind is int:
        if key.bit_length() > _LONG_BITS:
            _check_key_length(2 + (key.bit_length() >> 3))
        return KEY_INT + from_int(key)
    if kind is tuple:
        return _encode_tuple(key, 1)
    if kind is bytes:
        if len(key) >= MAX_KEY_BYTES:
            _check_key_length(1 + len(key))
        data: bytes = KEY_BYTES + key
        return data
    if kind is float:
        return _encode_float(key)
    if key is None:
        return KEY_NONE
    if kind is bool:
        return KEY_TRUE if key else KEY_FALSE
    raise SerializationError(
        f"a key cannot be of type {type_name(key)}: keys are str, bytes, int, float, bool, None and"
        " tuples of these, of exactly these types; convert the key first, for example with str(key)"
    )


def _encode_float(key: float) -> bytes:
    if math.isnan(key):
        raise SerializationError("NaN cannot be a key, it equals nothing; use None or a str instead")
    return KEY_FLOAT + DOUBLE.pack(key + 0.0)  # adding 0.0 turns -0.0 into 0.0 and nothing else


def _encode_tuple(parts: tuple[Key, ...], depth: int) -> bytes:
    if depth > MAX_KEY_DEPTH:
        raise SerializationError(
            f"tuples in a key are nested deeper than {MAX_KEY_DEPTH}; flatten the key or hash it yourself"
        )
    if len(parts) > _MANY_PARTS:
        return _encode_many(parts, depth)
    pieces = [KEY_TUPLE]
    for part in parts:
        piece = _encode_tuple(part, depth + 1) if type(part) is tuple else encode_key(part)
        pieces.append(_pack_length(len(piece)) + piece)
    data = b"".join(pieces)
    if len(data) > MAX_KEY_BYTES:
        _check_key_length(len(data))
    return data


def _encode_many(parts: tuple[Key, ...], depth: int) -> bytes:
    """`_encode_tuple` of a long one, not much further than is allowed: a part may come a million times."""
    data = KEY_TUPLE
    for at in range(0, len(parts), _MANY_PARTS):
        data += _encode_tuple(parts[at : at + _MANY_PARTS], depth)[1:]
        _check_key_length(len(data))
    return data


def _check_key_length(length: int) -> None:
    if length > MAX_KEY_BYTES:
        raise SerializationError(
            f"the key takes {length} bytes or more, {MAX_KEY_BYTES} are allowed; hash it yourself"
            " (for example hashlib.blake2b(data).digest()) and use the hash as the key"
        )


_NUMBERS: frozenset[type] = frozenset({int, float, bool})  # the only keys that are equal to others


def refuse_equal(keys: list[Key]) -> None:
    """ValueError if two different ones of `keys` are equal for Python, as ``1``, ``1.0`` and ``True`` are.

    No dict can hold both. Other wrong keys are passed over: `encode_key` says what is wrong with them.
    """
    kinds = set(map(type, keys))
    parts: set[type] = set()
    if tuple in kinds:
        parts = set(map(type, chain.from_iterable([key for key in keys if type(key) is tuple])))
    if tuple not in parts and len((kinds | parts) & _NUMBERS) < 2:
        return
    seen: dict[Key, tuple[Key, bytes]] = {}
    for key in keys:
        data = encode_key(key)  # first: what it takes has a hash
        other, encoded = seen.setdefault(key, (key, data))
        if encoded != data:
            raise ValueError(
                f"the keys {shown(other)} and {shown(key)} are different keys, but equal for Python:"
                " a batch cannot have both; use one call for each, or two batches"
            )


def shown(key: Key) -> str:
    """A key as messages name it."""
    try:
        return repr(key)
    except ValueError:  # Python refuses to write long integers
        return f"(a {type_name(key)} that holds a long integer)"


def encode_prefix(prefix: Prefix) -> bytes:
    """Bytes with which ``encode_key(key)`` starts exactly when `key` has this prefix.

    A str is a prefix of the str keys that start with it, bytes likewise of bytes keys, and a tuple
    of the tuple keys that start with the same parts: ``("a",)`` of ``("a", 1)``, not of ``("ab",)``.
    An empty prefix matches all keys of its type.

    Raises `SerializationError` for any other type and whatever `encode_key` refuses.
    """
    if type(prefix) not in (str, bytes, tuple):
        raise SerializationError(
            f"a prefix cannot be of type {type_name(prefix)}: use a str, bytes or a tuple of leading parts"
        )
    return encode_key(prefix)


def decode_key(data: bytes) -> Key:
    """The key whose `encode_key` is `data`; `SerializationError` when there is none."""
    try:
        if len(data) > MAX_KEY_BYTES:
            raise ValueError("too long")
        return _decode_key(data, 0)
    except (ValueError, ArithmeticError) as error:
        if is_interruption(error):
            raise
        raise SerializationError(f"a stored key is damaged: {error}") from error


def _decode_key(data: bytes, depth: int) -> Key:
    """`decode_key` for a key inside of `depth` tuples; ValueError when damaged."""
    tag, rest = data[:1], data[1:]
    if tag == KEY_STR:
        return from_utf8(rest)
    if tag == KEY_BYTES:
        return rest
    if tag == KEY_INT:
        return to_int(rest)
    if tag == KEY_TUPLE:
        return _decode_tuple(rest, depth + 1)
    if tag == KEY_FLOAT:
        return _decode_float(rest)
    if data in _CONSTANT_KEYS:
        return _CONSTANT_KEYS[data]
    raise ValueError("its type is unknown")


_CONSTANT_KEYS: dict[bytes, bool | None] = {KEY_NONE: None, KEY_TRUE: True, KEY_FALSE: False}


def _decode_float(data: bytes) -> float:
    number = to_float(data)
    if math.isnan(number) or (number == 0.0 and any(data)):
        raise ValueError("a float that is no key")
    return number


def _decode_tuple(data: bytes, depth: int) -> tuple[Key, ...]:
    if depth > MAX_KEY_DEPTH:
        raise ValueError("nested too deep")
    parts: list[Key] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        at = start + int.from_bytes(data[at:start], "little")
        if start > len(data) or at > len(data):
            raise ValueError("a part is cut off")
        parts.append(_decode_key(data[start:at], depth))
    return tuple(parts)
