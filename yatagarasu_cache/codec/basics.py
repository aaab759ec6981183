"""What kinds of payloads there are, and text and numbers as bytes: exactly, and in one way only."""

from __future__ import annotations

from struct import Struct

KIND_BYTES = 0
KIND_STR = 1
KIND_INT = 2
KIND_FLOAT = 3
KIND_NONE = 4
KIND_TRUE = 5
KIND_FALSE = 6
KIND_MSGPACK = 7
KIND_CUSTOM = 8
KIND_ARRAY = 9
KIND_COMPRESSED = 10
KIND_MASK = 0x0F

DOUBLE = Struct("<d")


def type_name(value: object) -> str:
    """The name of the type of `value` as its user would write it."""
    return class_name(type(value))


def class_name(kind: type) -> str:
    """The name of a class as its user would write it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def utf8(text: str) -> bytes:
    """`text` as UTF-8, lone surrogates included."""
    try:
        return text.encode()
    except UnicodeEncodeError:  # naming the error handler on every call would double the cost
        return text.encode("utf-8", "surrogatepass")


def from_utf8(data: bytes) -> str:
    """The inverse of `utf8`; UnicodeDecodeError when `data` is not its output."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogatepass")


def from_int(number: int) -> bytes:
    """`number` as the shortest little-endian two's complement, one byte at least."""
    bits = (number if number >= 0 else ~number).bit_length()
    return number.to_bytes((bits >> 3) + 1, "little", signed=True)


def to_int(data: bytes) -> int:
    """The inverse of `from_int`; ValueError when `data` is not its output."""
    number = int.from_bytes(data, "little", signed=True)
    if from_int(number) != data:
        raise ValueError("an integer that is not in its shortest form")
    return number


def to_float(data: bytes) -> float:
    if len(data) != DOUBLE.size:
        raise ValueError("a float that is not 8 bytes long")
    number: float = DOUBLE.unpack(data)[0]
    return number
