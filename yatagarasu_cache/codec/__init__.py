"""Keys and values to bytes and back, exactly.

Keys become bytes that are equal only for equal keys (`encode_key`), and in such a way that one
`bytes.startswith` answers whether a key has a prefix (`encode_prefix`).

Values become a payload and one flags byte, whose low four bits (`KIND_MASK`) say how the payload
is to be read; the upper four bits belong to the store. `ValueCodec` gives back what went in, or
refuses on the way in with a `SerializationError`. Nothing stored is ever executed, unless the
cache was opened with a serializer that does so (`PickleSerializer`).
"""
from __future__ import annotations

from .basics import (
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
)
from .bounds import MAX_VALUE_DEPTH
from .keys import (
    MAX_KEY_BYTES,
    MAX_KEY_DEPTH,
    Key,
    Prefix,
    decode_key,
    encode_key,
    encode_prefix,
    refuse_equal,
)
from .msgpack import MsgpackSerializer
from .pickling import PickleSerializer
from .serializer import Serializer
from .typed import TypedSerializer
from .values import ValueCodec

__all__ = [
    "KIND_ARRAY",
    "KIND_BYTES",
    "KIND_COMPRESSED",
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
    "TypedSerializer",
    "ValueCodec",
    "decode_key",
    "encode_key",
    "encode_prefix",
    "refuse_equal",
]
