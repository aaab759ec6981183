"""Keys and values to bytes and back, exactly.

Keys become bytes that are equal only for equal keys (`encode_key`), and in such a way that one
`bytes.startswith` answers whether a key has a prefix (`encode_prefix`).

Values become a payload and one flags byte, whose low four bits (`KIND_MASK`) say how the payload
is to be read; the upper four bits belong to the store. `ValueCodec` gives back what went in, or
refuses on the way in with a `SerializationError`. Nothing stored is ever executed, unless the
cache was opened with a serializer that does so (`PickleSerializer`).
"""

from __future__ import annotations

import hmac
import math
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain
from operator import gt
from struct import Struct
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable

import ormsgpack
from ormsgpack import Ext, packb, unpackb

from .concurrency.interruption import is_interruption
from .errors import ConfigurationError, SerializationError, ValueTooLarge
from .store import compiled
from .store.format import MAX_VALUE_BYTES

__all__ = [
    "KIND_BYTES",
    "KIND_CUSTOM",
    "KIND_FALSE",
    "KIND_FLOAT",
    "KIND_INT",
    "KIND_MASK",
    "KIND_MSGPACK",
    "KIND_NONE",
    "KIND_STR",
    "KIND_TRUE",
    "MAX_KEY_BYTES",
    "MAX_KEY_DEPTH",
    "MAX_VALUE_DEPTH",
    "Key",
    "MsgpackSerializer",
    "PickleSerializer",
    "Prefix",
    "Serializer",
    "ValueCodec",
    "decode_key",
    "encode_key",
    "encode_prefix",
]

Key: TypeAlias = Union[str, bytes, int, float, bool, None, "tuple[Key, ...]"]
Prefix: TypeAlias = Union[str, bytes, "tuple[Key, ...]"]

KIND_BYTES = 0
KIND_STR = 1
KIND_INT = 2
KIND_FLOAT = 3
KIND_NONE = 4
KIND_TRUE = 5
KIND_FALSE = 6
KIND_MSGPACK = 7
KIND_CUSTOM = 8
KIND_MASK = 0x0F

KEY_STR, KEY_BYTES = b"s", b"b"  # first bytes of encoded keys

MAX_KEY_BYTES = 65_535
"""Longest encoded key; also what the two-byte lengths inside tuple keys can say."""

MAX_KEY_DEPTH = 32
"""How deep tuples may be nested in a key."""

MAX_VALUE_DEPTH = 200
"""How deep containers may be nested in a value (plain lists and dicts: a little deeper)."""

_DOUBLE = Struct("<d")
_LENGTH = Struct("<H")
_LONG_BITS = 8 * (MAX_KEY_BYTES - 2)  # from which on an int may be too long
_MANY_PARTS = 64  # of a tuple that is encoded step by step
_SURELY_SHORT = MAX_KEY_BYTES // 4 - 1  # characters of a str that is short enough in UTF-8
_pack_length = _LENGTH.pack


def _type_name(value: object) -> str:
    """The name of the type of `value` as its user would write it."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _utf8(text: str) -> bytes:
    """`text` as UTF-8, lone surrogates included."""
    try:
        return text.encode()
    except UnicodeEncodeError:  # naming the error handler on every call would double the cost
        return text.encode("utf-8", "surrogatepass")


def _from_utf8(data: bytes) -> str:
    """The inverse of `_utf8`; UnicodeDecodeError when `data` is not its output."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogatepass")


def _from_int(number: int) -> bytes:
    """`number` as the shortest little-endian two's complement, one byte at least."""
    bits = (number if number >= 0 else ~number).bit_length()
    return number.to_bytes((bits >> 3) + 1, "little", signed=True)


def _to_int(data: bytes) -> int:
    """The inverse of `_from_int`; ValueError when `data` is not its output."""
    number = int.from_bytes(data, "little", signed=True)
    if _from_int(number) != data:
        raise ValueError("an integer that is not in its shortest form")
    return number


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
            return KEY_STR + _utf8(key)
    return _encode_rare_key(key)


def _encode_long_key(key: str) -> bytes:
    _check_key_length(1 + len(key))  # before there is a copy of it
    data = KEY_STR + _utf8(key)
    _check_key_length(len(data))
    return data


def _encode_rare_key(key: Any) -> bytes:
    """`encode_key` for everything but str."""
    kind = type(key)
    if kind is int:
        if key.bit_length() > _LONG_BITS:
            _check_key_length(2 + (key.bit_length() >> 3))
        return b"i" + _from_int(key)
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
        return b"n"
    if kind is bool:
        return b"t" if key else b"f"
    raise SerializationError(
        f"a key cannot be of type {_type_name(key)}: keys are str, bytes, int, float, bool, None and"
        " tuples of these, of exactly these types; convert the key first, for example with str(key)"
    )


def _encode_float(key: float) -> bytes:
    if math.isnan(key):
        raise SerializationError("NaN cannot be a key, it equals nothing; use None or a str instead")
    return b"d" + _DOUBLE.pack(key + 0.0)  # adding 0.0 turns -0.0 into 0.0 and nothing else


def _encode_tuple(parts: tuple[Key, ...], depth: int) -> bytes:
    if depth > MAX_KEY_DEPTH:
        raise SerializationError(
            f"tuples in a key are nested deeper than {MAX_KEY_DEPTH}; flatten the key or hash it yourself"
        )
    if len(parts) > _MANY_PARTS:
        return _encode_many(parts, depth)
    pieces = [b"u"]
    for part in parts:
        piece = _encode_tuple(part, depth + 1) if type(part) is tuple else encode_key(part)
        pieces.append(_pack_length(len(piece)) + piece)
    data = b"".join(pieces)
    if len(data) > MAX_KEY_BYTES:
        _check_key_length(len(data))
    return data


def _encode_many(parts: tuple[Key, ...], depth: int) -> bytes:
    """`_encode_tuple` of a long one, not much further than is allowed: a part may come a million times."""
    data = b"u"
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
                f"the keys {_shown(other)} and {_shown(key)} are different keys, but equal for Python:"
                " a batch cannot have both; use one call for each, or two batches"
            )


def _shown(key: Key) -> str:
    try:
        return repr(key)
    except ValueError:  # Python refuses to write long integers
        return f"(a {_type_name(key)} that holds a long integer)"


def encode_prefix(prefix: Prefix) -> bytes:
    """Bytes with which ``encode_key(key)`` starts exactly when `key` has this prefix.

    A str is a prefix of the str keys that start with it, bytes likewise of bytes keys, and a tuple
    of the tuple keys that start with the same parts: ``("a",)`` of ``("a", 1)``, not of ``("ab",)``.
    An empty prefix matches all keys of its type.

    Raises `SerializationError` for any other type and whatever `encode_key` refuses.
    """
    if type(prefix) not in (str, bytes, tuple):
        raise SerializationError(
            f"a prefix cannot be of type {_type_name(prefix)}: use a str, bytes or a tuple of leading parts"
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
        return _from_utf8(rest)
    if tag == KEY_BYTES:
        return rest
    if tag == b"i":
        return _to_int(rest)
    if tag == b"u":
        return _decode_tuple(rest, depth + 1)
    if tag == b"d":
        return _decode_float(rest)
    if data in _CONSTANT_KEYS:
        return _CONSTANT_KEYS[data]
    raise ValueError("its type is unknown")


_CONSTANT_KEYS: dict[bytes, bool | None] = {b"n": None, b"t": True, b"f": False}


def _decode_float(data: bytes) -> float:
    number = _to_float(data)
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


def _to_float(data: bytes) -> float:
    if len(data) != _DOUBLE.size:
        raise ValueError("a float that is not 8 bytes long")
    number: float = _DOUBLE.unpack(data)[0]
    return number


# Serializers


@runtime_checkable
class Serializer(Protocol):
    """What turns an object into bytes and back; give an instance to the cache as `serializer`.

    Errors that it raises reach the caller as `SerializationError`, with the original as cause.
    """

    @property
    def name(self) -> str:
        """Stored with each value (1 to 255 bytes of UTF-8): only a serializer of this name reads it."""

    def dumps(self, value: Any) -> bytes:
        """`value` as bytes."""

    def loads(self, data: bytes) -> Any:
        """The value that `dumps` made `data` from."""


# Of everything that ormsgpack would quietly convert, nothing may pass. OPT_NON_STR_KEYS has to
# stay off too: with it enums, dates, UUIDs and subclasses become plain str or int keys.
_STRICT = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)

_EXT_FLAT, _EXT_INT, _EXT_STR, _EXT_BYTEARRAY = range(4)
_LIST, _TUPLE, _SET, _FROZENSET, _DICT = range(5)


class MsgpackSerializer:
    """The default: scalars and the builtin containers, by ormsgpack, exactly as they went in.

    Taken: str, bytes, bytearray, int of any size, float, bool, None, list, tuple, dict, set and
    frozenset, nested at will up to `MAX_VALUE_DEPTH`. Refused: everything else, subclasses of
    these included. An object that occurs twice comes back as two equal ones.

    What is JSON-like is plain msgpack. Else the payload is one extension object that holds the
    plain parts of the value in post-order and the steps that put them together again: no
    nesting of extensions, so that hostile bytes cannot exhaust the stack.

    """

    name = "msgpack"

    def dumps(self, value: Any, most: int = MAX_VALUE_BYTES) -> bytes:
        """`value` as msgpack; `SerializationError` when it would not come back exactly.

        `ValueTooLarge` when it takes more than `most` bytes, without taking very much more memory: not
        even what holds itself, or the same thing again and again, takes long.
        """
        if type(value) is dict or type(value) is list:
            packed: Any = _pack(value, most, _measure, False)
            if type(packed) is bytes:
                return packed
            if packed is None:
                raise _too_long(most)
        return _dump_exactly(value, most)

    def loads(self, data: bytes) -> Any:
        """The value in `data`; `SerializationError` when there is none.

        Bytes behind the value go unnoticed: that is for the store's checksum to catch.
        """
        try:
            if data[0] in _EXTENSION_HEADS:
                return _load_flat(unpackb(data, ext_hook=_Extension))
            return unpackb(data)
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(f"a stored msgpack value is damaged: {error}") from error


# An extension as it is found: the tag is `start`, and the bytes are `stop`. Nothing is made of it within
# ormsgpack, which takes whatever is raised there, Ctrl-C too, for damage: so it has to be no Python code.
_Extension = slice
_EXTENSION_HEADS = b"\xc7\xc8\xc9\xd4\xd5\xd6\xd7\xd8"
_SURE_SCALARS: frozenset[type] = frozenset({bytes, float, bool, type(None)})
_SCALARS = _SURE_SCALARS | {str, int}  # which msgpack cannot hold all
_PLAIN = _SCALARS | {list, dict}


def _pack_in_python(value: Any, most: int, _watch: object, extensions: bool) -> Any:
    """`value` as msgpack; NotImplemented if it is not plain, None if it takes more than `most` bytes.

    What is plain are lists and dicts, with str keys, of scalars that msgpack can hold; with `extensions`
    a list in it may hold (tag, bytes) for one. The compiled module does the same, faster.
    """
    kinds = _measure(value, most) if type(value) in _CONTAINERS else {type(value)}
    if extensions and tuple in kinds:
        parts, steps = value
        value = [[Ext(*part) if type(part) is tuple else part for part in parts], steps]
    elif not kinds <= _PLAIN:
        return NotImplemented
    try:
        packed = packb(value, option=_STRICT)
    except TypeError as error:
        if is_interruption(error):
            raise
        return NotImplemented
    return packed if len(packed) <= most else None


_core = compiled.load()
_pack: Callable[..., Any] = _pack_in_python if _core is None else _core.pack


def _too_long(most: int) -> ValueTooLarge:
    return ValueTooLarge(
        f"the value takes more than {most} bytes when it is encoded, which is all that max_value_size or"
        " size_limit leaves room for: raise it, or store less"
    )


_SIZED: frozenset[type] = frozenset({str, bytes, bytearray})
_CONTAINERS: frozenset[type] = frozenset({list, tuple, set, frozenset, dict})


class _Opened:
    """A container whose content is being measured."""

    __slots__ = ("containers", "inner", "size", "value")

    def __init__(self, value: Any, kinds: set[type]) -> None:
        self.value = value
        self.containers = 1
        content = _content(value)
        here = set(map(type, content))
        kinds |= here
        inner = [item for item in content if type(item) in _CONTAINERS] if here & _CONTAINERS else []
        self.inner: Iterator[Any] = iter(inner)
        self.size = 1 + len(content) - len(inner)
        if here & _SIZED:
            self.size += sum([len(item) for item in content if type(item) in _SIZED])
        if int in here:
            numbers = content if len(here) == 1 else [item for item in content if type(item) is int]
            self.size += max((sum(map(int.bit_length, numbers)) >> 3) - len(numbers), 0)


def _measure(value: Any, most: int, container: int = 0) -> set[type]:
    """The types of all that is in a container; `ValueTooLarge` if it certainly takes more than `most` bytes.

    Each container is looked at once, however often it occurs. What contains itself is refused, and what
    refers to the same things so often that it grows out of all proportion: to write out a `container` takes
    as long as so many bytes do.
    """
    kinds: set[type] = set()
    sizes: dict[int, tuple[int, int] | None] = {id(value): None}  # and containers in it; None: not known yet
    stack = [_Opened(value, kinds)]
    while stack:
        top = stack[-1]
        for item in top.inner:
            size = sizes.setdefault(id(item), _NOT_SEEN)
            if size is None or len(stack) > DEEPEST:
                raise _too_deep()
            if size is _NOT_SEEN:
                sizes[id(item)] = None
                stack.append(_Opened(item, kinds))
                break
            top.size += size[0]
            top.containers += size[1]
        else:
            stack.pop()
            if top.size > most:
                raise _too_long(most)
            sizes[id(top.value)] = top.size, top.containers
            if stack:
                stack[-1].size += top.size
                stack[-1].containers += top.containers
    _check_growth(value, top.size + container * top.containers)
    return kinds


_NOT_SEEN = -1, -1


def _check_growth(value: Any, cost: int) -> None:
    """`ValueTooLarge` if `cost`, in bytes, comes from a `value` that itself has next to nothing."""
    if cost > _MUCH and cost > _GROWTH * _held_bytes(value):
        raise ValueTooLarge(
            "the value refers to the same things again and again, and would grow to more than"
            f" {_GROWTH} times its size when it is encoded: store what is shared once, under a key of its own"
        )


_MUCH = 1 << 28  # bytes that any value may take to encode
_GROWTH = 64  # times the bytes that it holds are what more it may take


def _held_bytes(value: Any) -> int:
    """Bytes of memory that a container holds, roughly: each thing once, however often it occurs."""
    total = 0
    seen = {id(value)}
    found = [value]
    while found:
        content = _content(found.pop())
        total += _CONTAINER_BYTES + _REFERENCE_BYTES * len(content)
        for item in content:
            size = _held_apart(item)
            if size and id(item) not in seen:
                seen.add(id(item))
                total += size
                if type(item) in _CONTAINERS:
                    found.append(item)
    return total


_CONTAINER_BYTES = 56
_REFERENCE_BYTES = 8


def _held_apart(item: Any) -> int:
    """Bytes that an item has beside the reference to it. Little is taken for nothing."""
    kind = type(item)
    size = 0
    if kind in _CONTAINERS:
        return 1  # what it has is counted when it is opened
    if kind in _SIZED:
        size = len(item)
    elif kind is int:
        size = item.bit_length() >> 3
    return size if size > _GROWTH * _REFERENCE_BYTES else 0


def _content(value: Any) -> list[Any]:
    """What is in a container: keys and values in turn, if it is a dict."""
    return list(chain.from_iterable(value.items()) if type(value) is dict else value)


class _Collisions:
    """What it takes to tell members of a set, or keys of a dict, apart that have the same hash.

    Python compares each with each. Whoever chooses numbers, or tuples and frozensets of them, can give all
    of them one hash. Only such members are looked at closely, so honest values have next to no work.
    """

    __slots__ = ("_weights", "work")

    def __init__(self) -> None:
        self.work = 0  # comparisons of two small numbers, or what takes as long
        self._weights: dict[int, int] = {}  # of tuples and frozensets, by id

    def add(self, members: list[Any]) -> None:
        """Count what these members cost."""
        if not _surely_differ(members) and len(set(map(hash, members))) < len(members):
            self.work += self._comparing(members)

    def too_many(self, length: int) -> bool:
        """Whether this takes longer than what `length` encoded bytes may take."""
        return self.work > _COMPARISONS + length

    def _comparing(self, members: Iterable[Any]) -> int:
        groups: dict[int, list[Any]] = {}
        for member in members:
            groups.setdefault(hash(member), []).append(member)
        alike = [group for group in groups.values() if len(group) > 1]
        return sum([(len(group) - 1) * sum(map(self._weight, group)) // 2 for group in alike])

    def _weight(self, value: Any) -> int:
        """What it takes to compare `value` with another one that is nearly the same."""
        kind = type(value)
        if kind is tuple or kind is frozenset:
            weight = self._weights.get(id(value))
            if weight is None:
                weight = self._weights[id(value)] = self._weigh(value)
            return weight
        long = value.bit_length() >> 10 if kind is int else len(value) >> 8 if kind in _SIZED else 0
        return 1 + int(long)

    def _weigh(self, value: tuple[Any, ...] | frozenset[Any]) -> int:
        weight = 1 + sum(map(self._weight, value))
        if type(value) is frozenset:  # each member is looked up in the other one
            weight += self._comparing(value)
        return weight


def _surely_differ(members: list[Any]) -> bool:
    """Whether the hashes do, where that is quickly seen: small ints are their own (but for -1, which has that
    of -2), and those of text and bytes depend on a secret of Python's."""
    kinds = set(map(type, members))
    if kinds == {int}:
        return bool(min(members) > -_MODULUS and max(members) < _MODULUS)
    return kinds <= _HASHED_SECRETLY


_MODULUS = sys.hash_info.modulus  # of the hash of numbers
_HASHED_SECRETLY: frozenset[type] = frozenset({str, bytes})

_COMPARISONS = 1 << 23  # 4,096 numbers of one hash; some tenths of a second
_FEW = 32  # scalars among which no collisions are looked for: comparing these takes little more than reading


def _dump_exactly(value: Any, most: int) -> bytes:
    """`value` as msgpack after a look at every part of it."""
    # In the hope that each str and int will do, which is quicker; else with a look at them too.
    for plain in (_SCALARS, _SURE_SCALARS):
        packed: bytes | None = _dump_flat(value, plain, most)
        if packed is None:
            raise _too_long(most)
        if packed is not NotImplemented:
            return packed
    raise SerializationError(
        "msgpack cannot hold the value: something in it has more than 2**32 bytes or items, or it was changed"
        f" meanwhile; {_REMEDY}"
    )


def _dump_flat(value: Any, plain: frozenset[type], most: int) -> Any:
    """`value` as msgpack, taken apart if need be; NotImplemented and None as from `_pack`."""
    flat = _Flattener(value, plain, most)
    if flat.add(value, 0):
        return _pack(value, most, _measure, False)
    content = _pack([flat.parts, flat.steps], most, _measure, True)
    if type(content) is not bytes:
        return content
    if flat.collisions is not None and flat.collisions.too_many(len(content)):
        raise _too_many_collisions()
    return packb(Ext(_EXT_FLAT, content))


_REMEDY = "convert it first, or open the cache with serializer='pickle' or a serializer of your own"


def _refused(value: object) -> SerializationError:
    return SerializationError(
        f"a value of type {_type_name(value)} would not come back as what it is; {_REMEDY}"
    )


def _too_deep() -> SerializationError:
    return SerializationError(
        f"the value is nested deeper than {MAX_VALUE_DEPTH} levels or contains itself; {_REMEDY}"
    )


def _too_many_collisions() -> SerializationError:
    return SerializationError(
        "a set or dict in the value has so many members or keys of the same hash (as multiples of 2**61 - 1"
        f" have) that it would take too long to read; {_REMEDY}"
    )


_WATCH_ITEMS = 1 << 16
_CONTAINER_COST = 128  # bytes that are written in the time in which one container is taken apart
DEEPEST = 255  # that ormsgpack writes and reads
_STEPS: dict[type, int] = {list: _LIST, tuple: _TUPLE, set: _SET, frozenset: _FROZENSET, dict: _DICT}


class _Flattener:
    """Takes a value apart into `parts` that msgpack holds exactly, and `steps` to rebuild it.

    Steps come in threes: which container to build, how many more parts to put on the stack
    before, and how many of the topmost things on the stack become its content. Types in `plain`
    are taken for parts without a look at the value.
    """

    __slots__ = (
        "_most", "_plain", "_pushed", "_unwatched", "_value", "_watched", "collisions", "parts", "steps",
    )  # fmt: skip

    def __init__(self, value: Any, plain: frozenset[type], most: int) -> None:
        self.parts: list[Any] = []
        self.steps: list[int] = []
        self.collisions: _Collisions | None = None
        self._plain = plain
        self._pushed = 0
        self._value, self._most = value, most
        self._unwatched, self._watched = _WATCH_ITEMS, False

    def add(self, value: Any, depth: int) -> bool:
        """Add `value`; whether it is plain, that is, a part as it stands."""
        kind = type(value)
        if kind in self._plain:
            self.parts.append(value)
            return True
        if kind in _STEPS:
            return self._add_container(value, kind, depth)
        part = _as_part(value)
        if part is not value:
            self._count(len(part[1]))
        self.parts.append(part)
        return part is value

    def _add_container(self, value: Any, kind: type, depth: int) -> bool:
        """Add `value`, whole if msgpack has its `kind` and all its content is plain."""
        if depth >= MAX_VALUE_DEPTH:
            raise _too_deep()
        parts = self.parts
        start = len(parts)
        if start > _WATCH_ITEMS:
            self._watch()
        content = _content(value)
        plain = True
        if self._plain.issuperset(map(type, content)):  # all at once, at the speed of C
            parts += content
        else:
            self._count(len(content))
            for item in content:
                plain = self.add(item, depth + 1) and plain
        if plain and (kind is list or (kind is dict and set(map(type, value)) <= {str})):
            self._count(len(content))
            parts[start:] = [value]
            return True
        step, more, count = _STEPS[kind], len(parts) - self._pushed, len(content)
        self.steps += (step, more, count)
        self._pushed = len(parts)
        if step >= _SET and count > 1 + (step == _DICT) and (more != count or count > _FEW):
            self.collisions = self.collisions or _Collisions()
            self.collisions.add(content[::2] if kind is dict else content)
        return False

    def _count(self, items: int) -> None:
        """Work and memory that the number of parts does not tell."""
        self._unwatched -= items
        if self._unwatched < 0:
            self._watch()

    def _watch(self) -> None:
        """After much work, once: whether it has an end."""
        if not self._watched:
            self._watched = True
            _measure(self._value, self._most, _CONTAINER_COST)


def _as_part(value: Any) -> Any:
    """A scalar as it is if msgpack can hold it, else (tag, bytes) of an extension; refuses all else."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() or _has_no_surrogates(value) else (_EXT_STR, _utf8(value))
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else (_EXT_INT, _from_int(value))
    if kind is bytearray:
        return _EXT_BYTEARRAY, bytes(value)
    raise _refused(value)


def _has_no_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_flat(extension: Any) -> Any:
    """A whole value that `_dump_exactly` took apart."""
    if extension.start != _EXT_FLAT:
        raise ValueError("an extension out of place")
    return _rebuild(*_unpack_parts(extension.stop), len(extension.stop))


def _unpack_parts(content: bytes) -> tuple[list[Any], list[int]]:
    try:
        parts, steps = unpackb(content)
        return parts, steps
    except ValueError as error:  # for an extension, or because it is damaged
        if is_interruption(error):
            raise
    parts, steps = unpackb(content, ext_hook=_Extension)
    if not _measure([part for part in parts if type(part) is not _Extension], MAX_VALUE_BYTES) <= _PLAIN:
        raise ValueError("an extension out of place")
    return [_load_part(part.start, part.stop) if type(part) is _Extension else part for part in parts], steps


def _load_part(tag: int, data: bytes) -> Any:
    """A part of a value that msgpack itself has no form for."""
    if tag == _EXT_INT:
        return _to_int(data)
    if tag == _EXT_STR:
        return _from_utf8(data)
    if tag == _EXT_BYTEARRAY:
        return bytearray(data)
    raise ValueError("an unknown extension")


def _rebuild(parts: list[Any], steps: list[int], length: int) -> Any:
    """Follow `steps` (see `_Flattener`); an exception when they do not lead to one value.

    Nor when its sets and dicts would take longer than `length` encoded bytes may.
    """
    _check_steps(parts, steps)
    collisions = None
    stack: list[Any] = []
    pushed = 0
    triples = iter(steps)
    for step, more, count in zip(triples, triples, triples, strict=True):
        content = parts[pushed : pushed + more]
        pushed += more
        if more != count:
            stack += content
            first = len(stack) - count
            if not 0 <= first <= len(stack):
                raise ValueError("a step takes what is not there")
            content = stack[first:]
            del stack[first:]
        if step >= _SET and count > 1 + (step == _DICT) and (more != count or count > _FEW):
            collisions = collisions or _Collisions()
            collisions.add(content[::2] if step == _DICT else content)
            if collisions.too_many(length):
                raise ValueError("too many members or keys of the same hash")
        stack.append(_BUILDERS[step](content))
    stack += parts[pushed:]
    (value,) = stack
    return value


def _check_steps(parts: list[Any], steps: list[int]) -> None:
    """ValueError for steps that take more parts than there are, or nest too deep.

    To hash a tuple that is nested some 100,000 times would overflow the C stack.
    """
    if type(parts) is not list or type(steps) is not list:
        raise ValueError("no parts and steps")
    pushes = steps[1::3]
    if min(pushes, default=0) < 0 or sum(pushes) > len(parts):
        raise ValueError("a step takes what is not there")
    # Only a step that takes more than has just been pushed holds something built before.
    if len(pushes) > MAX_VALUE_DEPTH and sum(map(gt, steps[2::3], pushes)) >= MAX_VALUE_DEPTH:
        _check_depth(steps)


def _check_depth(steps: list[int]) -> None:
    """ValueError when `steps` nest too deep."""
    depths: list[int] = []
    triples = iter(steps)
    for _, more, count in zip(triples, triples, triples, strict=True):
        depths += [0] * more
        first = len(depths) - count
        depth = 1 + max(depths[first:], default=0)
        if depth > MAX_VALUE_DEPTH:
            raise ValueError("nested too deep")
        depths[first:] = [depth]


def _build_set(content: list[Any]) -> set[Any]:
    result = set(content)
    if len(result) != len(content):
        raise ValueError("a set with equal members")
    return result


def _build_frozenset(content: list[Any]) -> frozenset[Any]:
    return frozenset(_build_set(content))


def _build_dict(content: list[Any]) -> dict[Any, Any]:
    result = dict(zip(content[::2], content[1::2], strict=True))
    if 2 * len(result) != len(content):
        raise ValueError("a dict with equal keys")
    return result


_BUILDERS: dict[int, Callable[[list[Any]], Any]] = {
    _LIST: list,
    _TUPLE: tuple,
    _SET: _build_set,
    _FROZENSET: _build_frozenset,
    _DICT: _build_dict,
}


class PickleSerializer:
    """Any object that pickles, at a price: who can write to the directory can run code in yours.

    With a `secret` each value is authenticated (keyed blake2b) before anything is unpickled, so
    that only those who know the secret can. `secrets.token_bytes(32)` makes a good one; keep it
    out of the cache directory. A cache signs the key along with the value: under another one the
    value is not loaded. What calls `dumps` and `loads` itself, a class derived from this one that
    has its own included, signs the value alone.

    Raises `ConfigurationError` for a secret that is not bytes or is empty, and an unknown protocol.
    """

    __slots__ = ("_mac", "_protocol", "_secret", "name")

    def __init__(self, secret: bytes | None = None, protocol: int = 5) -> None:
        if secret is not None and not (isinstance(secret, bytes) and secret):
            raise ConfigurationError("secret must be bytes, at least one, or None for no signature")
        if type(protocol) is not int or not 0 <= protocol <= pickle.HIGHEST_PROTOCOL:
            raise ConfigurationError(f"protocol must be an int from 0 to {pickle.HIGHEST_PROTOCOL}")
        self.name = "pickle" if secret is None else "pickle-signed"
        self._secret = secret
        self._protocol = protocol
        self._mac = None if secret is None else _keyed(secret)

    def dumps(self, value: Any) -> bytes:
        """`value` pickled, behind its signature if there is a secret; raises what pickle raises."""
        return self._dumps(value, _NO_KEY)

    def loads(self, data: bytes) -> Any:
        """The object in `data`; raises what pickle raises.

        `SerializationError` when `data` was not signed with this secret: nothing is unpickled then.
        """
        return self._loads(data, _NO_KEY)

    def _signs_alone(self) -> bool:
        """Whether values are signed, and no derived class has a hand in the bytes: then keys can be, too."""
        own = PickleSerializer.dumps, PickleSerializer.loads
        return self._mac is not None and own == tuple(
            getattr(method, "__func__", None) for method in (self.dumps, self.loads)
        )

    def _dumps(self, value: Any, key: bytes) -> bytes:
        """`dumps`, signed for the encoded `key`."""
        data = pickle.dumps(value, self._protocol)
        return data if self._mac is None else _sign(self._mac, key, data) + data

    def _loads(self, data: bytes, key: bytes) -> Any:
        """`loads` of what was signed for the encoded `key`."""
        if self._mac is None:
            return pickle.loads(data)
        signature, data = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, _sign(self._mac, key, data)):
            raise SerializationError(
                "the signature of a stored pickle is wrong, it was not loaded: the value is damaged,"
                " forged, of another key, or was signed with another secret or by an older release"
            )
        return pickle.loads(data)

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle, and caches must
        return PickleSerializer, (self._secret, self._protocol)

    def __repr__(self) -> str:  # never shows the secret
        return f"<PickleSerializer {self.name!r} protocol={self._protocol}>"


_SIGNATURE_BYTES = 32
_SIGNED = Struct("<BI")  # what is signed begins with: kind, length of the key; then the key, then the pickle
_NO_KEY = b""  # no key has this encoding


def _keyed(secret: bytes) -> blake2b:
    """The keyed hash to begin each signature with."""
    key = blake2b(secret).digest()  # keys have at most 64 bytes, secrets any number
    return blake2b(digest_size=_SIGNATURE_BYTES, key=key, person=b"yatagarasu 2")  # of what is signed so


def _sign(keyed: blake2b, key: bytes, data: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(_SIGNED.pack(KIND_CUSTOM, len(key)) + key)
    mac.update(data)
    return mac.digest()


# Values


def _encode_float_value(value: float, _most: int) -> tuple[bytes, int]:
    return _DOUBLE.pack(value), KIND_FLOAT


def _encode_int_value(value: int, most: int) -> tuple[bytes, int]:
    length = ((value if value >= 0 else ~value).bit_length() >> 3) + 1
    if length > most:
        raise _too_long(most)
    return value.to_bytes(length, "little", signed=True), KIND_INT


def _encode_bool_value(value: bool, _most: int) -> tuple[bytes, int]:
    return b"", KIND_TRUE if value else KIND_FALSE


def _encode_none_value(_value: None, _most: int) -> tuple[bytes, int]:
    return b"", KIND_NONE


def _encode_view(value: memoryview, most: int) -> tuple[bytes | memoryview, int]:
    """A read-only view in place; of a writable one a copy, since it may change while it is written."""
    try:
        if value.readonly and value.c_contiguous and value.format == "B" and value.ndim == 1:
            return value, KIND_BYTES
        if value.nbytes <= most:
            return value.tobytes(), KIND_BYTES
    except (ValueError, NotImplementedError) as error:  # released, or of a form unknown to Python
        if is_interruption(error):
            raise
        raise SerializationError(f"the memoryview cannot be read: {error}; pass bytes instead") from error
    raise _too_long(most)


_NATIVE: dict[type, Callable[[Any, int], tuple[bytes | memoryview, int]]] = {
    int: _encode_int_value,
    float: _encode_float_value,
    bool: _encode_bool_value,
    type(None): _encode_none_value,
    memoryview: _encode_view,
}


def _decode_empty(data: bytes, value: bool | None) -> bool | None:
    if data:
        raise ValueError("bytes where none belong")
    return value


def _decode_unknown(_data: bytes) -> Any:
    raise SerializationError("a stored value is of an unknown kind: damaged, or from a newer release")


_MSGPACK = MsgpackSerializer()
_UNKNOWN: Any = object()  # for a key: no signature is made or found good without one

# By kind; every value of the four bits has an entry.
_DECODERS: list[Callable[[bytes], Any]] = [_decode_unknown] * (KIND_MASK + 1)
_DECODERS[KIND_BYTES] = bytes
_DECODERS[KIND_STR] = _from_utf8
_DECODERS[KIND_INT] = _to_int
_DECODERS[KIND_FLOAT] = _to_float
_DECODERS[KIND_NONE] = lambda data: _decode_empty(data, None)
_DECODERS[KIND_TRUE] = lambda data: _decode_empty(data, True)
_DECODERS[KIND_FALSE] = lambda data: _decode_empty(data, False)
_DECODERS[KIND_MSGPACK] = _MSGPACK.loads


class ValueCodec:
    """Values to payload and flags and back.

    bytes, str, int, float, bool and None have forms of their own. A memoryview is stored as the
    bytes that it shows and comes back as bytes. All other values go through the `serializer`:
    ``"msgpack"``, ``"pickle"`` or an instance of something that satisfies `Serializer`. The
    default one gives a bytearray back as bytes, in containers as the bytearray that it was.

    Pickles that are signed are signed for their key, and for no other one.

    Raises `ConfigurationError` for any other `serializer`.
    """

    __slots__ = ("_decoders", "_encode_object", "_header", "_serializer", "decode")

    decode: Callable[..., Any]
    """``decode(payload, flags, key)``: the value in `payload`; of `flags` only the low four bits count.

    Raises `SerializationError` when the payload is damaged, another serializer made it, or it is a signed
    pickle, which alone needs the key, and was signed for another one than `key`.
    """

    def __init__(self, serializer: str | Serializer = "msgpack") -> None:
        self._serializer = _choose(serializer)
        self._header = _header(self._serializer)
        self._decoders = [*_DECODERS]
        self._decoders[KIND_CUSTOM] = self._decode_custom
        self._encode_object: Callable[[Any, int, Key], tuple[bytes, int]] = self._encode_custom
        self.decode = self._decode
        if type(self._serializer) is MsgpackSerializer:
            self._encode_object = _encode_msgpack
        elif isinstance(self._serializer, PickleSerializer) and self._serializer._signs_alone():
            self._encode_object, self.decode = self._encode_signed, self._decode_signed

    @property
    def serializer(self) -> Serializer:
        """The serializer in use."""
        return self._serializer

    def encode(
        self, value: Any, most: int = MAX_VALUE_BYTES, key: Key = _UNKNOWN
    ) -> tuple[bytes | memoryview, int]:
        """The payload of `value` under `key`, which only what is signed needs, and its flags (0 to 15).

        Raises `SerializationError`, which names type and remedy, when it would not come back exactly,
        and `ValueTooLarge` when it takes more than `most` bytes, as soon as that is certain: payloads that
        cost no memory, and those of other serializers, are for the caller to measure.
        """
        kind = type(value)
        if kind is bytes:
            return value, KIND_BYTES
        if kind is str:
            if len(value) > most:
                raise _too_long(most)
            try:
                return value.encode(), KIND_STR
            except UnicodeEncodeError:
                return _utf8(value), KIND_STR
        native = _NATIVE.get(kind)
        if native is not None:
            return native(value, most)
        return self._encode_object(value, most, key)

    def _decode(self, payload: bytes, flags: int, _key: Key = None) -> Any:
        if not flags & KIND_MASK:  # KIND_BYTES
            return payload
        try:
            return self._decoders[flags & KIND_MASK](payload)
        except SerializationError:
            raise
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(f"a stored value is damaged: {error}") from error

    def _decode_signed(self, payload: bytes, flags: int, key: Key = _UNKNOWN) -> Any:
        if flags & KIND_MASK != KIND_CUSTOM:
            return self._decode(payload, flags)
        serializer: Any = self._serializer
        return self._decode_custom(payload, partial(serializer._loads, key=encode_key(key)))

    def _encode_signed(self, value: Any, most: int, key: Key) -> tuple[bytes, int]:
        serializer: Any = self._serializer
        return self._encode_custom(value, most, key, partial(serializer._dumps, key=encode_key(key)))

    def _encode_custom(
        self, value: Any, _most: int, _key: Key, dumps: Callable[[Any], bytes] | None = None
    ) -> tuple[bytes, int]:
        serializer = self._serializer
        try:
            data = (dumps or serializer.dumps)(value)
        except SerializationError:
            raise
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(
                f"serializer {serializer.name!r} cannot store a value of type {_type_name(value)}: {error}"
            ) from error
        if not isinstance(data, bytes):
            raise SerializationError(
                f"dumps of serializer {serializer.name!r} returned {_type_name(data)}; it has to return bytes"
            )
        return self._header + data, KIND_CUSTOM

    def _decode_custom(self, payload: bytes, loads: Callable[[bytes], Any] | None = None) -> Any:
        header = self._header
        if not payload.startswith(header):
            raise _made_by_another(payload, self._serializer.name)
        try:
            return (loads or self._serializer.loads)(payload[len(header) :])
        except SerializationError:
            raise
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(
                f"serializer {self._serializer.name!r} cannot load a stored value: {error}"
            ) from error


def _encode_msgpack(value: Any, most: int, _key: Key) -> tuple[bytes, int]:
    if type(value) is bytearray:
        if len(value) > most:
            raise _too_long(most)
        return bytes(value), KIND_BYTES  # a copy, since it may change while it is written
    return _MSGPACK.dumps(value, most), KIND_MSGPACK


def _choose(serializer: str | Serializer) -> Serializer:
    """The serializer that the setting `serializer` means."""
    if isinstance(serializer, str):
        if serializer == "msgpack":
            return _MSGPACK
        if serializer == "pickle":
            return PickleSerializer()
    elif not isinstance(serializer, type) and isinstance(serializer, Serializer):
        return serializer
    raise ConfigurationError(
        f"serializer is {serializer!r}; it must be 'msgpack', 'pickle' or an object with a name and"
        " the methods dumps and loads, such as PickleSerializer(secret=...)"
    )


def _header(serializer: Serializer) -> bytes:
    """What a payload of `serializer` begins with: its name behind the length of its name."""
    name = serializer.name
    encoded = _utf8(name) if isinstance(name, str) else b""
    if not 1 <= len(encoded) <= 255:
        raise ConfigurationError(f"serializer has the name {name!r}; it must be a str of 1 to 255 bytes")
    return bytes((len(encoded),)) + encoded


def _made_by_another(payload: bytes, configured: str) -> SerializationError:
    """The error for a payload that names not the `configured` serializer."""
    try:
        name = _name_in(payload)
    except ValueError as error:
        if is_interruption(error):
            raise
        return SerializationError(f"a stored value is damaged: {error}")
    remedy = _HOW_TO_OPEN.get(name, f"serializer=<your serializer named {name!r}>")
    return SerializationError(
        f"the value was stored with serializer {name!r}, this cache uses {configured!r}; to read it,"
        f" open the cache with {remedy} if you trust whoever wrote it, or set the value anew"
    )


def _name_in(payload: bytes) -> str:
    """The name of the serializer that made `payload`."""
    end = 1 + payload[0] if payload else 0
    if not 1 < end <= len(payload):
        raise ValueError("the name of its serializer is cut off")
    return _from_utf8(payload[1:end])


_HOW_TO_OPEN = {
    "pickle": "serializer='pickle'",
    "pickle-signed": "serializer=PickleSerializer(secret=...) and the secret of the writer",
}
