"""numpy's arrays and scalars: their memory as it is, and beside it a description that executes nothing.

numpy is not imported before an array appears: then whoever stores it has imported it, or it is read.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from math import prod
from struct import Struct
from typing import Any

from ormsgpack import packb, unpackb

from ..backends.base import Buffer
from ..concurrency.interruption import is_interruption
from ..errors import SerializationError
from ..store.item import Pieces
from .basics import from_utf8, utf8
from .loading import module

__all__ = [
    "array_bytes", "array_payload", "build_array", "describe_array", "is_array", "load_array", "load_numpy",
    "numpy_part", "own_array", "why_not",
]  # fmt: skip

_TRAILER = Struct("<I")  # the last bytes of a payload: how long the description before them is
_MOST_DIMENSIONS = 64
_MOST_EMPTY = 1 << 16  # items of no bytes: nothing bounds their number
_DEEPEST = 32  # dtypes in dtypes
_MOST_DESCRIPTION = 1 << 20  # bytes
_PICKLE = "open the cache with PickleSerializer(secret=...)"

# What a plain dtype is called; a letter alone where C has two types of one size (long and long long).
_PLAIN_DTYPE = re.compile(
    r"[<>|]([biufc]\d{1,2}|[SUV]\d{1,10}|[mM]8(\[\d{0,10}[A-Za-z]{1,2}\])?|[lLqQpP])", re.ASCII
)


def is_array(kind: type) -> bool:
    """Whether it is numpy's array type itself."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is getattr(numpy, "ndarray", None)


def array_payload(array: Any) -> Pieces:
    """The payload of an array: its memory, not copied if it lies together, and a description behind it."""
    description, memory = describe_array(array)
    return Pieces((memory, description + _TRAILER.pack(len(description))))


def load_array(payload: Buffer) -> Any:
    """The array in a payload: on top of it, without a copy, but for bytes, which nobody may change.

    So a bytearray gives an array that can be written, and a read-only memoryview one that can't, nor can it
    be made so: numpy looks through a view, so one of a bytearray is copied.
    """
    view = memoryview(payload)
    if view.readonly and type(view.obj) is bytearray:
        view = memoryview(bytes(view))
    end = len(view) - _TRAILER.size
    if end < 0:
        raise ValueError("an array that is cut off")
    length = _TRAILER.unpack_from(view, end)[0]
    if length > min(end, _MOST_DESCRIPTION):
        raise ValueError("an array with an impossible description")
    description, memory = bytes(view[end - length : end]), view[: end - length]
    return own_array(description, memory) if type(payload) is bytes else build_array(description, memory)


# -- the memory ----------------------------------------------------------------------------------


def describe_array(array: Any) -> tuple[bytes, Buffer]:
    """(description, memory) of an array; the memory is its own if that is in one piece."""
    description = _describe(array.dtype, 0)
    if array.dtype.itemsize == 0 and array.size > _MOST_EMPTY:
        raise SerializationError(f"an array of more than {_MOST_EMPTY} items without bytes cannot be stored")
    flags, order = array.flags, "C"
    if not flags.c_contiguous:
        if flags.f_contiguous:
            order = "F"
        else:
            array = _together(array)
    packed = _packed([description, list(array.shape), order], array.dtype)
    if len(packed) > _MOST_DESCRIPTION:
        raise SerializationError(f"the dtype of the array takes more than {_MOST_DESCRIPTION} bytes to tell")
    if not array.nbytes:
        return packed, b""
    in_order = array.T if order == "F" else array
    return packed, memoryview(in_order.reshape(-1).view("u1"))


def _packed(description: Any, dtype: Any) -> bytes:
    try:
        return packb(description)
    except TypeError as error:  # for a field whose name has lone surrogates
        if is_interruption(error):
            raise
        raise _strange(dtype) from error


def _together(array: Any) -> Any:
    """A copy in C order; what is between its fields is no longer there."""
    copy = _numpy().zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def array_bytes(description: bytes) -> int:
    """Bytes that an array of this description has."""
    dtype, shape, _ = _parsed(description)
    return int(dtype.itemsize) * prod(shape)


def build_array(description: bytes, memory: Any) -> Any:
    """The array of this description on top of `memory`; ValueError if these do not belong together."""
    dtype, shape, order = _parsed(description)
    if dtype.itemsize * prod(shape) != len(memory):
        raise ValueError("an array of another length than its shape says")
    if not len(memory) and prod(shape) > _MOST_EMPTY:
        raise ValueError("an array of too many items without bytes")
    return _numpy().ndarray(shape, dtype, buffer=memory, order=order)


def own_array(description: bytes, memory: memoryview) -> Any:
    """The same on a copy of `memory`, so that it can be written. As bytes: items may lie anywhere in it, and
    numpy would copy them one by one, and leave out what is between their fields."""
    if not len(memory):
        return build_array(description, bytearray())
    numpy = _numpy()
    own = numpy.empty(len(memory), "u1")
    own[:] = numpy.frombuffer(memory, "u1")
    return build_array(description, own)


def _parsed(description: bytes) -> tuple[Any, tuple[int, ...], str]:
    """(dtype, shape, order) as a description says."""
    stored, shape, order = unpackb(description)
    if order not in ("C", "F") or len(shape) > _MOST_DIMENSIONS or not _are_lengths(shape):
        raise ValueError("an array of an impossible shape")
    return _built(stored), tuple(shape), order


def _are_lengths(numbers: Any) -> bool:
    return type(numbers) is list and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _numpy() -> Any:
    try:
        return module("numpy")
    except ImportError as error:
        if is_interruption(error):
            raise
        raise SerializationError(
            "a stored value is an array, or has one in it, and numpy is not there: pip install numpy"
        ) from error


# -- dtypes --------------------------------------------------------------------------------------


def _describe(dtype: Any, depth: int) -> Any:
    """A dtype in plain types: a str; [itemsize, aligned, fields] of one with fields; {base: shape} of one of
    arrays. Refuses what would not come back exactly."""
    if dtype.hasobject:
        raise SerializationError(
            f"an array of dtype {dtype} holds Python objects, not their bytes: convert it (astype), store a"
            f" list, or {_PICKLE}"
        )
    if dtype.metadata is not None or depth > _DEEPEST:
        raise _strange(dtype)
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _describe(base, depth + 1), "shape": list(shape)}
    if dtype.names is not None:
        return _describe_fields(dtype, depth)
    return _describe_plain(dtype)


def _describe_fields(dtype: Any, depth: int) -> list[Any]:
    fields = []
    if dtype.type is not _numpy().void:  # that of a recarray
        raise _strange(dtype)
    for name in dtype.names:
        inner, offset, *title = dtype.fields[name]
        if title and type(title[0]) is not str:
            raise _strange(dtype)
        fields.append([name, title[0] if title else None, offset, _describe(inner, depth + 1)])
    return [dtype.itemsize, bool(dtype.isalignedstruct), fields]


def _describe_plain(dtype: Any) -> str:
    text, numpy = dtype.str, _numpy()
    if dtype.char not in "gG" and _PLAIN_DTYPE.fullmatch(text):  # long double is another one on each machine
        if numpy.dtype(text).char != dtype.char:
            text = text[0] + dtype.char
        if _PLAIN_DTYPE.fullmatch(text):
            again = numpy.dtype(text)
            if again == dtype and again.type is dtype.type:
                return str(text)
    raise _strange(dtype)


def _strange(dtype: Any) -> SerializationError:
    return SerializationError(
        f"an array of dtype {dtype!r} would not come back as what it is: convert it (astype), or {_PICKLE}"
    )


def _built(stored: Any) -> Any:
    """The inverse of `_describe`; an exception if it is not its result."""
    if type(stored) is str:
        return _built_plain(stored)
    dtype = _build(stored, 0)
    if _describe(dtype, 0) != stored:
        raise ValueError("a dtype that is not described as it would be")
    return dtype


@lru_cache(maxsize=64)
def _built_plain(stored: str) -> Any:
    """The same of a plain dtype. Others are made anew each time: the names of fields can be changed."""
    dtype = _build(stored, 0)
    if _describe_plain(dtype) != stored:
        raise ValueError("a dtype that is not described as it would be")
    return dtype


def _build(stored: Any, depth: int) -> Any:
    """A dtype that is described so, or in a similar way."""
    numpy = _numpy()
    if depth > _DEEPEST:
        raise ValueError("a dtype that is nested too deep")
    if type(stored) is str:
        if not _PLAIN_DTYPE.fullmatch(stored):
            raise ValueError("an unknown dtype")
        return numpy.dtype(stored)
    if type(stored) is dict:
        shape = stored["shape"]
        if len(stored) != 2 or not _are_lengths(shape) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("a dtype of an impossible shape")
        return numpy.dtype((_build(stored["base"], depth + 1), tuple(shape)))
    return _build_fields(stored, depth)


def _build_fields(stored: Any, depth: int) -> Any:
    itemsize, aligned, fields = stored
    names, titles, offsets = ([field[i] for field in fields] for i in range(3))
    if not _are_lengths([itemsize, *offsets]) or type(aligned) is not bool or set(map(type, names)) - {str}:
        raise ValueError("a dtype with impossible fields")
    formats = [_build(inner, depth + 1) for _, _, _, inner in fields]
    spec = {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
    if any(title is not None for title in titles):
        if set(map(type, titles)) - {str, type(None)}:
            raise ValueError("a dtype with impossible titles")
        spec["titles"] = titles
    return _numpy().dtype(spec, align=aligned)


# -- scalars -------------------------------------------------------------------------------------

_TEXT, _BYTES, _OTHER, _FIXED = b"s", b"b", b"v", b"r"
_HEAD = Struct("<H")


def numpy_part(value: Any) -> bytes | None:
    """A scalar of numpy's as bytes; None for anything else."""
    numpy, kind = sys.modules.get("numpy"), type(value)
    generic = getattr(numpy, "generic", None)
    if numpy is None or generic is None or not isinstance(value, generic):
        return None
    if kind is numpy.str_:  # an array would drop NULs at the end, as str(value) does
        return _TEXT + utf8(value)
    if kind is numpy.bytes_:
        return _BYTES + b"".join([value])
    if value.dtype.type is not kind:  # a subclass
        return None
    description = _packed(_describe(value.dtype, 0), value.dtype)
    if len(description) > 0xFFFF:
        raise _strange(value.dtype)
    data: bytes = value.tobytes()
    form = _FIXED if kind is numpy.void and not value.flags.writeable else _OTHER  # which alone has a hash
    return form + _HEAD.pack(len(description)) + description + data


def load_numpy(data: bytes) -> Any:
    """The inverse of `numpy_part`."""
    form, data = data[:1], data[1:]
    if form == _TEXT:
        return _numpy().str_(from_utf8(data))
    if form == _BYTES:
        return _numpy().bytes_(data)
    start = _HEAD.size
    end = start + _HEAD.unpack_from(data)[0]
    dtype = _built(unpackb(data[start:end]))
    if form not in (_OTHER, _FIXED) or len(data) - end != dtype.itemsize:
        raise ValueError("a numpy scalar that is none")
    # Of its own memory, since one with fields stays on top of it.
    array = _numpy().ndarray((), dtype, buffer=bytearray(data[end:]) or None)
    array.flags.writeable = form == _OTHER
    return array[()]


def why_not(value: object) -> str:
    """What helps with an object of numpy's that is refused; nothing for others."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())):
        return "for a subclass of numpy.ndarray pass numpy.asarray(value), or "
    return ""
