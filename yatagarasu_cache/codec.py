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
from collections.abc import Callable
from hashlib import blake2b
from itertools import chain
from operator import gt
from struct import Struct
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable

import ormsgpack
from ormsgpack import Ext, packb, unpackb

from .errors import ConfigurationError, SerializationError

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

MAX_KEY_BYTES = 65_535
"""Longest encoded key; also what the two-byte lengths inside tuple keys can say."""

MAX_KEY_DEPTH = 32
"""How deep tuples may be nested in a key."""

MAX_VALUE_DEPTH = 200
"""How deep containers may be nested in a value (plain lists and dicts: a little deeper)."""

_DOUBLE = Struct("<d")
_LENGTH = Struct("<H")
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
        try:
            data = b"s" + key.encode()
        except UnicodeEncodeError:
            data = b"s" + _utf8(key)
    else:
        data = _encode_rare_key(key)
    if len(data) > MAX_KEY_BYTES:
        raise _key_too_long(len(data))
    return data


def _encode_rare_key(key: Any) -> bytes:
    """`encode_key` for everything but str, without the check of the length."""
    kind = type(key)
    if kind is int:
        return b"i" + _from_int(key)
    if kind is tuple:
        return _encode_tuple(key, 1)
    if kind is bytes:
        data: bytes = b"b" + key
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
    pieces = [b"u"]
    for part in parts:
        piece = _encode_tuple(part, depth + 1) if type(part) is tuple else encode_key(part)
        pieces.append(_pack_length(len(piece)) + piece)
    data = b"".join(pieces)
    if len(data) > MAX_KEY_BYTES:
        raise _key_too_long(len(data))
    return data


def _key_too_long(length: int) -> SerializationError:
    return SerializationError(
        f"the key takes {length} bytes, {MAX_KEY_BYTES} are allowed; hash it yourself"
        " (for example hashlib.blake2b(data).digest()) and use the hash as the key"
    )


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
        raise SerializationError(f"a stored key is damaged: {error}") from error


def _decode_key(data: bytes, depth: int) -> Key:
    """`decode_key` for a key inside of `depth` tuples; ValueError when damaged."""
    tag, rest = data[:1], data[1:]
    if tag == b"s":
        return _from_utf8(rest)
    if tag == b"b":
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

    `ormsgpack.Ext` and `ormsgpack.Fragment` are orders to ormsgpack, not values: inside of a list
    or dict they are carried out, so that something else comes back, or an error.
    """

    name = "msgpack"

    def dumps(self, value: Any) -> bytes:
        """`value` as msgpack; `SerializationError` when it would not come back exactly."""
        if type(value) is dict or type(value) is list:
            try:
                packed = packb(value, option=_STRICT)
            except TypeError:  # a tuple, an int key, a huge int..., or a type that is to be refused
                pass
            else:
                # A bytearray or memoryview would come back as bytes, and no option prevents that.
                # If none of the three markers of binary data occurs, there was none.
                binary = 0xC4 in packed or 0xC5 in packed or 0xC6 in packed
                if not binary or _is_plain(value):
                    return packed
        return _dump_exactly(value)

    def loads(self, data: bytes) -> Any:
        """The value in `data`; `SerializationError` when there is none.

        Bytes behind the value go unnoticed: that is for the store's checksum to catch.
        """
        try:
            return unpackb(data, ext_hook=_load_flat)
        except Exception as error:
            raise SerializationError(f"a stored msgpack value is damaged: {error}") from error


_SURE_SCALARS: frozenset[type] = frozenset({bytes, float, bool, type(None)})
_SCALARS = _SURE_SCALARS | {str, int}  # which msgpack cannot hold all
_PLAIN = _SCALARS | {list, dict}


def _is_plain(container: Any) -> bool:
    """Whether a list or dict that ormsgpack took holds only types that come back as they are."""
    containers = [container]
    for each in containers:  # which grows meanwhile
        content = each.values() if type(each) is dict else each
        kinds = set(map(type, content))
        if not kinds <= _SCALARS:
            if not kinds <= _PLAIN:
                return False
            containers += [item for item in content if type(item) in (list, dict)]
    return True


def _dump_exactly(value: Any) -> bytes:
    """`value` as msgpack after a look at every part of it."""
    problem: Exception | None = None
    # In the hope that each str and int will do, which is quicker; else with a look at them too.
    for plain in (_SCALARS, _SURE_SCALARS):
        try:
            return _dump_flat(value, plain)
        except SerializationError:
            raise
        except RecursionError:
            raise _too_deep() from None
        except TypeError as error:
            problem = error
    raise SerializationError(f"msgpack cannot hold the value: {problem}; {_REMEDY}") from problem


def _dump_flat(value: Any, plain: frozenset[type]) -> bytes:
    """`value` as msgpack, taken apart if need be; TypeError when ormsgpack refuses a part."""
    flat = _Flattener(plain)
    if flat.add(value, 0):
        return packb(value, option=_STRICT)
    return packb(Ext(_EXT_FLAT, packb([flat.parts, flat.steps], option=_STRICT)))


_REMEDY = "convert it first, or open the cache with serializer='pickle' or a serializer of your own"


def _refused(value: object) -> SerializationError:
    return SerializationError(
        f"a value of type {_type_name(value)} would not come back as what it is; {_REMEDY}"
    )


def _too_deep() -> SerializationError:
    return SerializationError(
        f"the value is nested deeper than {MAX_VALUE_DEPTH} levels or contains itself; {_REMEDY}"
    )


_STEPS: dict[type, int] = {list: _LIST, tuple: _TUPLE, set: _SET, frozenset: _FROZENSET, dict: _DICT}


class _Flattener:
    """Takes a value apart into `parts` that msgpack holds exactly, and `steps` to rebuild it.

    Steps come in threes: which container to build, how many more parts to put on the stack
    before, and how many of the topmost things on the stack become its content. Types in `plain`
    are taken for parts without a look at the value.
    """

    __slots__ = ("_plain", "_pushed", "parts", "steps")

    def __init__(self, plain: frozenset[type]) -> None:
        self.parts: list[Any] = []
        self.steps: list[int] = []
        self._plain = plain
        self._pushed = 0

    def add(self, value: Any, depth: int) -> bool:
        """Add `value`; whether it is plain, that is, a part as it stands."""
        kind = type(value)
        if kind in self._plain:
            self.parts.append(value)
            return True
        if kind in _STEPS:
            return self._add_container(value, kind, depth)
        part = _as_part(value)
        self.parts.append(part)
        return part is value

    def _add_container(self, value: Any, kind: type, depth: int) -> bool:
        """Add `value`, whole if msgpack has its `kind` and all its content is plain."""
        if depth >= MAX_VALUE_DEPTH:
            raise _too_deep()
        parts = self.parts
        start = len(parts)
        content = list(chain.from_iterable(value.items()) if kind is dict else value)
        plain = True
        if self._plain.issuperset(map(type, content)):  # all at once, at the speed of C
            parts += content
        else:
            for item in content:
                plain = self.add(item, depth + 1) and plain
        if plain and (kind is list or (kind is dict and set(map(type, value)) <= {str})):
            parts[start:] = [value]
            return True
        self.steps += (_STEPS[kind], len(parts) - self._pushed, len(content))
        self._pushed = len(parts)
        return False


def _as_part(value: Any) -> Any:
    """A scalar as it is if msgpack can hold it, else as an extension; refuses everything else."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() or _has_no_surrogates(value) else Ext(_EXT_STR, _utf8(value))
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else Ext(_EXT_INT, _from_int(value))
    if kind is bytearray:
        return Ext(_EXT_BYTEARRAY, bytes(value))
    raise _refused(value)


def _has_no_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_flat(tag: int, data: bytes) -> Any:
    """The hook for a whole value: the only extension there is the one of `_dump_exactly`."""
    if tag != _EXT_FLAT:
        raise ValueError("an extension out of place")
    parts, steps = unpackb(data, ext_hook=_load_part)
    return _rebuild(parts, steps)


def _load_part(tag: int, data: bytes) -> Any:
    """The hook for the parts of a value: what msgpack itself has no form for."""
    if tag == _EXT_INT:
        return _to_int(data)
    if tag == _EXT_STR:
        return _from_utf8(data)
    if tag == _EXT_BYTEARRAY:
        return bytearray(data)
    raise ValueError("an unknown extension")


def _rebuild(parts: list[Any], steps: list[int]) -> Any:
    """Follow `steps` (see `_Flattener`); an exception when they do not lead to one value."""
    _check_steps(parts, steps)
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
    out of the cache directory. The signature says who made a value, not under which key it was
    stored.

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
        data = pickle.dumps(value, self._protocol)
        return data if self._mac is None else _sign(self._mac, data) + data

    def loads(self, data: bytes) -> Any:
        """The object in `data`; raises what pickle raises.

        `SerializationError` when `data` was not signed with this secret: nothing is unpickled then.
        """
        if self._mac is None:
            return pickle.loads(data)
        signature, data = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, _sign(self._mac, data)):
            raise SerializationError(
                "the signature of a stored pickle is wrong, it was not loaded: the value is damaged,"
                " forged, or was signed with another secret"
            )
        return pickle.loads(data)

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle, and caches must
        return PickleSerializer, (self._secret, self._protocol)

    def __repr__(self) -> str:  # never shows the secret
        return f"<PickleSerializer {self.name!r} protocol={self._protocol}>"


_SIGNATURE_BYTES = 32


def _keyed(secret: bytes) -> blake2b:
    """The keyed hash to begin each signature with."""
    key = blake2b(secret).digest()  # keys have at most 64 bytes, secrets any number
    return blake2b(digest_size=_SIGNATURE_BYTES, key=key, person=b"yatagarasu")


def _sign(keyed: blake2b, data: bytes) -> bytes:
    mac = keyed.copy()
    mac.update(data)
    return mac.digest()


# Values


def _encode_float_value(value: float) -> tuple[bytes, int]:
    return _DOUBLE.pack(value), KIND_FLOAT


def _encode_int_value(value: int) -> tuple[bytes, int]:
    return _from_int(value), KIND_INT


def _encode_bool_value(value: bool) -> tuple[bytes, int]:
    return b"", KIND_TRUE if value else KIND_FALSE


def _encode_none_value(_value: None) -> tuple[bytes, int]:
    return b"", KIND_NONE


def _encode_view(value: memoryview) -> tuple[bytes | memoryview, int]:
    """A read-only view in place; of a writable one a copy, since it may change while it is written."""
    try:
        if value.readonly and value.c_contiguous and value.format == "B" and value.ndim == 1:
            return value, KIND_BYTES
        return value.tobytes(), KIND_BYTES
    except (ValueError, NotImplementedError) as error:  # released, or of a form unknown to Python
        raise SerializationError(f"the memoryview cannot be read: {error}; pass bytes instead") from error


_NATIVE: dict[type, Callable[[Any], tuple[bytes | memoryview, int]]] = {
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

    Raises `ConfigurationError` for any other `serializer`.
    """

    __slots__ = ("_decoders", "_encode_object", "_header", "_serializer")

    def __init__(self, serializer: str | Serializer = "msgpack") -> None:
        self._serializer = _choose(serializer)
        self._header = _header(self._serializer)
        self._decoders = [*_DECODERS]
        self._decoders[KIND_CUSTOM] = self._decode_custom
        plain = type(self._serializer) is MsgpackSerializer
        self._encode_object = _encode_msgpack if plain else self._encode_custom

    @property
    def serializer(self) -> Serializer:
        """The serializer in use."""
        return self._serializer

    def encode(self, value: Any) -> tuple[bytes | memoryview, int]:
        """The payload of `value` and its flags (0 to 15).

        Raises `SerializationError`, which names type and remedy, when it would not come back exactly.
        """
        kind = type(value)
        if kind is bytes:
            return value, KIND_BYTES
        if kind is str:
            return _utf8(value), KIND_STR
        native = _NATIVE.get(kind)
        if native is not None:
            return native(value)
        return self._encode_object(value)

    def decode(self, payload: bytes, flags: int) -> Any:
        """The value in `payload`; of `flags` only the low four bits count.

        Raises `SerializationError` when the payload is damaged or another serializer made it.
        """
        if not flags & KIND_MASK:  # KIND_BYTES
            return payload
        try:
            return self._decoders[flags & KIND_MASK](payload)
        except (SerializationError, MemoryError):
            raise
        except Exception as error:
            raise SerializationError(f"a stored value is damaged: {error}") from error

    def _encode_custom(self, value: Any) -> tuple[bytes, int]:
        serializer = self._serializer
        try:
            data = serializer.dumps(value)
        except (SerializationError, MemoryError):
            raise
        except Exception as error:
            raise SerializationError(
                f"serializer {serializer.name!r} cannot store a value of type {_type_name(value)}: {error}"
            ) from error
        if not isinstance(data, bytes):
            raise SerializationError(
                f"dumps of serializer {serializer.name!r} returned {_type_name(data)}; it has to return bytes"
            )
        return self._header + data, KIND_CUSTOM

    def _decode_custom(self, payload: bytes) -> Any:
        header = self._header
        if not payload.startswith(header):
            raise _made_by_another(payload, self._serializer.name)
        try:
            return self._serializer.loads(payload[len(header) :])
        except (SerializationError, MemoryError):
            raise
        except Exception as error:
            raise SerializationError(
                f"serializer {self._serializer.name!r} cannot load a stored value: {error}"
            ) from error


def _encode_msgpack(value: Any) -> tuple[bytes, int]:
    if type(value) is bytearray:
        return bytes(value), KIND_BYTES  # a copy, since it may change while it is written
    return _MSGPACK.dumps(value), KIND_MSGPACK


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
    end = 1 + payload[0] if payload else 0
    if not 1 < end <= len(payload):
        raise ValueError("the name of its serializer is cut off")
    name = _from_utf8(payload[1:end])
    remedy = _HOW_TO_OPEN.get(name, f"serializer=<your serializer named {name!r}>")
    return SerializationError(
        f"the value was stored with serializer {name!r}, this cache uses {configured!r}; to read it,"
        f" open the cache with {remedy} if you trust whoever wrote it, or set the value anew"
    )


_HOW_TO_OPEN = {
    "pickle": "serializer='pickle'",
    "pickle-signed": "serializer=PickleSerializer(secret=...) and the secret of the writer",
}
