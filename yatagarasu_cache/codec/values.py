"""Values to payload and flags, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from ..backends.base import Buffer
from ..concurrency.interruption import is_interruption
from ..errors import ConfigurationError, SerializationError, Unreadable, ValueTooLarge
from ..store.format import MAX_VALUE_BYTES
from ..store.item import Pieces
from .arrays import array_payload, is_array, load_array
from .basics import (
    DOUBLE,
    KIND_ARRAY,
    KIND_BYTES,
    KIND_COMPRESSED,
    KIND_CUSTOM,
    KIND_FALSE,
    KIND_FLOAT,
    KIND_INT,
    KIND_MASK,
    KIND_MSGPACK,
    KIND_NONE,
    KIND_STR,
    KIND_TRUE,
    from_utf8,
    to_float,
    to_int,
    type_name,
    utf8,
)
from .bounds import too_long
from .compression import Compression, decompressed
from .keys import Key, encode_key, shown
from .msgpack import MsgpackSerializer, dump, load
from .pickling import PickleSerializer
from .serializer import Serializer, takes_memoryview
from .typed import TypedSerializer


def _encode_float_value(value: float, _most: int) -> tuple[bytes, int]:
    return DOUBLE.pack(value), KIND_FLOAT


def _encode_int_value(value: int, most: int) -> tuple[bytes, int]:
    length = ((value if value >= 0 else ~value).bit_length() >> 3) + 1
    if length > most:
        raise too_long(most)
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
    raise too_long(most)


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

# By kind; every value of the four bits has an entry. None: see `_decode_rare`.
_DECODERS: list[Callable[[Any], Any] | None] = [_decode_unknown] * (KIND_MASK + 1)
_DECODERS[KIND_BYTES] = bytes
_DECODERS[KIND_STR] = from_utf8
_DECODERS[KIND_INT] = to_int
_DECODERS[KIND_FLOAT] = to_float
_DECODERS[KIND_NONE] = lambda data: _decode_empty(data, None)
_DECODERS[KIND_TRUE] = lambda data: _decode_empty(data, True)
_DECODERS[KIND_FALSE] = lambda data: _decode_empty(data, False)
_DECODERS[KIND_MSGPACK] = load
_DECODERS[KIND_CUSTOM] = _DECODERS[KIND_COMPRESSED] = None
_DECODERS[KIND_ARRAY] = load_array


class ValueCodec:
    """Values to payload and flags and back.

    bytes, str, int, float, bool and None have forms of their own. A memoryview is stored as the
    bytes that it shows and comes back as bytes. All other values go through the `serializer`:
    ``"msgpack"``, ``"pickle"`` or an instance of something that satisfies `Serializer`. The
    default one, and `TypedSerializer`, give a bytearray back as bytes, in containers as the bytearray that it
    was, and have a form for an array of numpy's.

    Pickles that are signed are signed for their key, and for no other one.

    `compression`: how payloads are made shorter, if at all; whatever it is, all are read. `noted` is called
    with each value that can't be read, before the exception is raised.

    Raises `ConfigurationError` for any other `serializer`.
    """

    __slots__ = (
        "_compression", "_encode_object", "_header", "_loads", "_serializer",
        "_takes_memoryview", "decode", "encode", "noted",
    )  # fmt: skip

    decode: Callable[..., Any]
    """``decode(payload, flags, key)``: the value in `payload`; of `flags` only the low four bits count.

    A payload is bytes; that of an array may also be a bytearray, which nobody else has and the array then
    lies on, or a read-only memoryview, on which a read-only array lies.

    Raises a `SerializationError`, `Unreadable` if `key` is told, when the payload is damaged, another
    serializer made it, or it is a signed pickle, which alone needs the key, and was signed for another one.
    """

    encode: Callable[..., tuple[Buffer | Pieces, int]]
    """``encode(value, most, key)``: the payload of `value` under `key`, which only what is signed needs, and
    its flags (0 to 15).

    Raises `SerializationError`, which names type and remedy, when it would not come back exactly,
    and `ValueTooLarge` when it takes more than `most` bytes, as soon as that is certain: payloads that
    cost no memory, and those of other serializers, are for the caller to measure.
    """

    def __init__(
        self, serializer: str | Serializer = "msgpack", compression: Compression | None = None,
        noted: Callable[[Key, SerializationError], object] | None = None,
    ) -> None:  # fmt: skip
        self._serializer = _choose(serializer)
        self._header = _header(self._serializer)
        self._takes_memoryview = takes_memoryview(self._serializer)
        self._compression, self.noted = compression, noted
        self._loads: Callable[[Key], Callable[[Any], Any]] | None = None  # of what is bound to its key
        self._encode_object: Callable[[Any, int, Key], tuple[Buffer | Pieces, int]] = self._encode_custom
        self.decode = self._decode
        self.encode = self._encode if compression is None else self._encode_compressed
        if type(self._serializer) is MsgpackSerializer:
            self._encode_object = _encode_msgpack
        elif type(self._serializer) is TypedSerializer:
            self._encode_object = self._encode_typed
        elif isinstance(self._serializer, PickleSerializer):
            if self._serializer._signs_alone():
                self._encode_object, self._loads = self._encode_signed, self._signed_loads
            if self._serializer.only_others:
                self._encode_object = partial(self._encode_others, self._encode_object)

    @property
    def serializer(self) -> Serializer:
        """The serializer in use."""
        return self._serializer

    # -- encoding ------------------------------------------------------------------------------

    def _encode(
        self, value: Any, most: int = MAX_VALUE_BYTES, key: Key = _UNKNOWN
    ) -> tuple[Buffer | Pieces, int]:
        kind = type(value)
        if kind is bytes:
            return value, KIND_BYTES
        if kind is str:
            if len(value) > most:
                raise too_long(most)
            try:
                return value.encode(), KIND_STR
            except UnicodeEncodeError:
                return utf8(value), KIND_STR
        native = _NATIVE.get(kind)
        if native is not None:
            return native(value, most)
        return self._encode_object(value, most, key)

    def _encode_compressed(
        self, value: Any, most: int = MAX_VALUE_BYTES, key: Key = _UNKNOWN
    ) -> tuple[Buffer | Pieces, int]:
        """`_encode`, and a shorter payload where that is worth it."""
        payload, kind = self._encode(value, most, key)
        if self._compression is None or len(payload) > most:  # which its caller refuses
            return payload, kind
        shorter = self._compression.tried(payload, kind)
        return (payload, kind) if shorter is None else (shorter, KIND_COMPRESSED)

    def _encode_typed(self, value: Any, most: int, key: Key) -> tuple[Buffer | Pieces, int]:
        serializer: Any = self._serializer
        if type(value) is bytearray or is_array(type(value)):
            return _encode_msgpack(value, most, key)
        dumped, has_objects = serializer._dump(value, most)
        if not has_objects:
            return dumped, KIND_MSGPACK
        return _behind(self._header, dumped), KIND_CUSTOM

    def _encode_others(
        self, pickled: Callable[[Any, int, Key], tuple[Buffer | Pieces, int]], value: Any, most: int, key: Key
    ) -> tuple[Buffer | Pieces, int]:
        """What the default serializer keeps as that does, and the rest `pickled`."""
        if type(value) is bytearray:
            return pickled(value, most, key)
        try:
            return _encode_msgpack(value, most, key)
        except ValueTooLarge:
            raise
        except SerializationError:
            return pickled(value, most, key)

    def _encode_signed(self, value: Any, most: int, key: Key) -> tuple[Buffer | Pieces, int]:
        serializer: Any = self._serializer
        return self._encode_custom(value, most, key, partial(serializer._dumps, key=encode_key(key)))

    def _encode_custom(
        self, value: Any, _most: int, _key: Key, dumps: Callable[[Any], Any] | None = None
    ) -> tuple[Buffer | Pieces, int]:
        serializer = self._serializer
        try:
            data = (dumps or serializer.dumps)(value)
        except SerializationError:
            raise
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(
                f"serializer {serializer.name!r} cannot store a value of type {type_name(value)}: {error}"
            ) from error
        if type(data) is not Pieces:
            data = _contiguous(data, serializer.name)
        return _behind(self._header, data), KIND_CUSTOM

    # -- decoding ------------------------------------------------------------------------------

    def _decode(self, payload: Any, flags: int, key: Key = _UNKNOWN) -> Any:
        if not flags & KIND_MASK:  # KIND_BYTES
            return payload
        try:
            decoder = _DECODERS[flags & KIND_MASK]
            return decoder(payload) if decoder is not None else self._decode_rare(payload, flags, key)
        except Exception as error:
            if is_interruption(error):
                raise
            self._refuse(key, error)

    def _decode_rare(self, payload: Any, flags: int, key: Key) -> Any:
        """What needs its key, or another decoder afterwards."""
        kind = flags & KIND_MASK
        if kind == KIND_COMPRESSED:
            payload, kind = decompressed(payload)
        if kind == KIND_CUSTOM:
            return self._decode_custom(payload, None if self._loads is None else self._loads(key))
        return _DECODERS[kind](payload)  # type: ignore[misc]

    def plain(self, payload: Buffer, flags: int, key: Key = _UNKNOWN) -> tuple[Buffer, int]:
        """(payload, kind) of a stored value, decompressed if need be. Raises `Unreadable` if it can't be."""
        kind = flags & KIND_MASK
        if kind != KIND_COMPRESSED:
            return payload, kind
        try:
            return decompressed(payload)
        except Exception as error:
            if is_interruption(error):
                raise
            self._refuse(key, error)

    def _refuse(self, key: Key, error: Exception) -> NoReturn:
        """Raise what `error`, which came up while a value was decoded, means."""
        told, cause = f"a stored value is damaged: {error}", error
        if isinstance(error, SerializationError):
            if key is _UNKNOWN:
                raise error
            told, cause = str(error), error.__cause__ or error  # type: ignore[assignment]
        untold = told
        if key is not _UNKNOWN:
            untold = f"a value cannot be read: {told}"
            told = f"the value of {shown(key)} cannot be read: {told}"
        unreadable = Unreadable(told)
        unreadable.without_key = untold
        if self.noted is not None:
            self.noted(key, unreadable)
        raise unreadable from cause

    def _signed_loads(self, key: Key) -> Callable[[Any], Any]:
        serializer: Any = self._serializer
        return partial(serializer._loads, key=encode_key(key))

    def _decode_custom(self, payload: Any, loads: Callable[[Any], Any] | None = None) -> Any:
        header = self._header
        if payload[: len(header)] != header:
            raise _made_by_another(bytes(payload[:256]), self._serializer.name)
        view = memoryview(payload).toreadonly()[len(header) :]
        try:
            return (loads or self._serializer.loads)(view if self._takes_memoryview else bytes(view))
        except SerializationError:
            raise
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(
                f"serializer {self._serializer.name!r} cannot load a stored value: {error}"
            ) from error


def _encode_msgpack(value: Any, most: int, _key: Key) -> tuple[Buffer | Pieces, int]:
    kind = type(value)
    if kind is bytearray:
        if len(value) > most:
            raise too_long(most)
        return bytes(value), KIND_BYTES  # a copy, since it may change while it is written
    if kind is not dict and kind is not list and is_array(kind):
        payload = array_payload(value)
        if len(payload) > most:
            raise too_long(most)
        return payload, KIND_ARRAY
    return dump(value, most), KIND_MSGPACK


def _contiguous(data: Any, name: str) -> bytes:
    """What `dumps` returned, as bytes: what is no bytes may change while it is written."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    raise SerializationError(
        f"dumps of serializer {name!r} returned {type_name(data)}; it has to return bytes (or a bytearray or"
        " memoryview)"
    )


def _behind(header: bytes, data: bytes | Pieces) -> bytes | Pieces:
    """`header` and `data`, which is not copied if it is long."""
    if isinstance(data, Pieces):
        return data.behind(header)
    return header + data if len(data) < _LONG else Pieces((header, data))


_LONG = 1 << 16  # bytes


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
    encoded = utf8(name) if isinstance(name, str) else b""
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
    return from_utf8(payload[1:end])


_HOW_TO_OPEN = {
    "typed": "serializer=TypedSerializer(types=[...]) and the classes of the writer",
    "pickle": "serializer='pickle'",
    "pickle-signed": "serializer=PickleSerializer(secret=...) and the secret of the writer",
}
