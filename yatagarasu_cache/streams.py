"""Values that come in parts: binary files and iterators of bytes, and how long they are."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from typing import Any

from .backends.base import Buffer
from .concurrency.interruption import ours
from .errors import SerializationError
from .guard import callers
from .store.chunks import PIECE_BYTES

__all__ = ["as_stream", "check_length", "stream_length"]


@callers
def as_stream(value: Any, length: int | None = None) -> Iterator[Buffer] | None:
    """The parts of a value that is a binary file or an iterator of bytes; None if it is neither.

    If it turns out not to have `length` bytes, that is a ValueError.
    """
    parts = _as_parts(value)
    if parts is None or length is None:
        return parts
    _check_bytes(length)
    return _of_length(parts, length)


def _as_parts(value: Any) -> Iterator[Buffer] | None:
    if isinstance(value, io.TextIOBase):
        raise SerializationError("value is a text file: open it in binary mode")
    if callable(getattr(value, "read", None)):
        _check_readable(value)
        return _parts(_pieces(value))
    if isinstance(value, Iterator):
        return _parts(value)
    return None


def _check_readable(value: Any) -> None:
    """Refuse a file that is closed, or open for writing only. Others are just read: classes derived from
    those of `io` say that they are not readable unless they override that."""
    try:
        for_writing_only = _says(value, "readable") is False and _says(value, "writable") is True
    except ours(ValueError) as error:
        if getattr(value, "closed", None) is not True:
            raise
        raise ValueError("value is a closed file: open it for reading (mode 'rb')") from error
    if for_writing_only:
        raise ValueError("value is a file that is open for writing only: open it for reading (mode 'rb')")


def _says(value: Any, name: str) -> Any:
    method = getattr(value, name, None)
    return method() if callable(method) else None


@callers
def _pieces(value: Any) -> Iterator[Any]:
    """What a file has, to its end. A generator, so that a StopIteration from `read` does not end it."""
    while (piece := value.read(PIECE_BYTES)) != b"":
        yield piece


@callers
def _parts(iterator: Iterator[Any]) -> Iterator[Buffer]:
    for part in iterator:
        yield _bytes_only(part)


@callers
def _of_length(parts: Iterator[Buffer], length: int) -> Iterator[Buffer]:
    done = 0
    for part in parts:
        done += len(part)
        if done > length:
            raise ValueError(f"length is {length}, and the stream has more: {done} bytes so far")
        yield part
    if done < length:
        raise ValueError(f"length is {length}, and the stream ended after {done} bytes")


@callers
def check_length(value: Any, length: int) -> None:
    """`length` of a value that is no stream."""
    _check_bytes(length)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"length is for streams and bytes, and the value is of type {type(value).__name__}")
    found = value.nbytes if isinstance(value, memoryview) else len(value)
    if found != length:
        raise ValueError(f"length is {length}, and the value has {found} bytes")


def _check_bytes(length: object) -> None:
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int (bytes) or None, not {type(length).__name__}")
    if length < 0:
        raise ValueError(f"length must not be negative: it is {length}")


@callers
def stream_length(value: Any, length: int | None = None) -> int | None:
    """`length`, or the bytes that a regular file still has; None for other streams. For refusing early what
    can't fit."""
    if length is not None:
        return length
    try:
        status = os.fstat(value.fileno())
        return max(0, status.st_size - value.tell()) if stat.S_ISREG(status.st_mode) else None
    except ours(AttributeError, OSError, ValueError):
        return None


def _bytes_only(part: Any) -> Buffer:
    if isinstance(part, memoryview):
        return part.cast("B") if part.contiguous else part.tobytes()
    if not isinstance(part, (bytes, bytearray)):
        raise SerializationError(f"a stream must yield bytes, not {type(part).__name__}")
    return part
