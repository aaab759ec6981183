"""Payloads in less room: whole, by a library that whoever wants that has installed.

A compressed payload is one byte for the algorithm, one for the kind of what it holds (as the flags of a value
say it), eight bytes for the length of that, and what the library made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

from ..backends.base import Buffer
from ..concurrency.interruption import is_interruption
from ..config import Settings
from ..errors import ConfigurationError, SerializationError
from ..store.format import MAX_VALUE_BYTES
from ..store.item import Pieces
from .basics import KIND_ARRAY, KIND_BYTES, KIND_CUSTOM, KIND_MSGPACK, KIND_STR
from .loading import module

__all__ = ["Compression", "compression_of", "decompressed"]

COMPRESSIBLE = frozenset({KIND_BYTES, KIND_STR, KIND_MSGPACK, KIND_CUSTOM, KIND_ARRAY})
_HEAD = Struct("<BBQ")  # algorithm, kind, length of what was compressed

# What is looked at before all of a payload is compressed: pieces from all over it.
_INSTALL = 'pip install "yatagarasu_cache[compression]"'

_SAMPLES, _SAMPLE_BYTES = 4, 1024
_WORTH = 0.9  # of its length is what a payload may have left


class _Algorithm(NamedTuple):
    number: int
    name: str
    modules: tuple[str, ...]  # the first of them that is there
    most_ratio: int  # no more bytes can come out of one
    longest: int
    compress: Callable[[Any, Any, int | None], bytes]  # (module, data, level)
    decompress: Callable[[Any, Buffer, int], bytes]  # (module, data, length)


@cache
def _first(names: tuple[str, ...]) -> Any:
    """The first of these modules that is there; ImportError if none is."""
    for name in names[:-1]:
        try:
            return module(name)
        except ImportError as error:
            if is_interruption(error):
                raise
    return module(names[-1])


def _zstd_decompress(library: Any, data: Buffer, length: int) -> bytes:
    """Memory is asked for as bytes come, whatever the frame says, and for one byte too many at most."""
    if library.get_frame_info(data).decompressed_size != length:
        raise ValueError("a frame of another length than the payload says")
    decompressor = library.ZstdDecompressor()
    found: bytes = decompressor.decompress(data, max_length=length + 1)
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("something else than one whole frame")
    return found


def _lz4_compress(library: Any, data: Buffer, level: int | None) -> bytes:
    if level is None or level < _LZ4_HIGH:
        return library.compress(data, store_size=False)  # type: ignore[no-any-return]
    compressed: bytes = library.compress(data, store_size=False, mode="high_compression", compression=level)
    return compressed


_LZ4_HIGH = 3  # from this level on, as in the lz4 command

_BY_NAME = {
    "zstd": _Algorithm(
        1, "zstd", ("compression.zstd", "backports.zstd"), 1 << 16, MAX_VALUE_BYTES,
        lambda library, data, level: library.compress(data, level),
        _zstd_decompress,
    ),
    "lz4": _Algorithm(
        2, "lz4", ("lz4.block",), 256, 0x7E000000,  # LZ4_MAX_INPUT_SIZE
        _lz4_compress,
        lambda library, data, length: library.decompress(data, uncompressed_size=length),
    ),
}  # fmt: skip
_BY_NUMBER = {one.number: one for one in _BY_NAME.values()}


def compression_of(settings: Settings) -> Compression | None:
    """What a handle's settings ask for."""
    name = settings.compression
    return Compression(name, settings.compression_level, settings.compression_min_size) if name else None


class Compression:
    """Compresses what is worth it. `smallest`: bytes from which on a payload is looked at.

    Raises `ConfigurationError` if the library is not there.
    """

    def __init__(self, name: str, level: int | None, smallest: int) -> None:
        self._algorithm = algorithm = _BY_NAME[name]
        self._level, self._smallest = level, smallest
        try:
            self._library = _first(algorithm.modules)
        except ImportError as error:
            if is_interruption(error):
                raise
            what = f'compression is "{name}", whose library is not there: {_INSTALL}'
            raise ConfigurationError(what) from error

    def tried(self, payload: Buffer | Pieces, kind: int) -> bytes | None:
        """The compressed payload; None if the payload is to be stored as it is."""
        length = len(payload)
        if length < self._smallest or kind not in COMPRESSIBLE or length > self._algorithm.longest:
            return None
        data = payload.joined() if type(payload) is Pieces else payload
        if length > 2 * _SAMPLES * _SAMPLE_BYTES and not self._saves(_sample(data)):
            return None
        compressed = self._compress(data, self._level)
        if _HEAD.size + len(compressed) > _WORTH * length:
            return None
        return _HEAD.pack(self._algorithm.number, kind, length) + compressed

    def _saves(self, data: bytes) -> bool:
        return len(self._compress(data, None)) <= _WORTH * len(data)

    def _compress(self, data: Any, level: int | None) -> bytes:
        return self._algorithm.compress(self._library, data, level)


def _sample(data: Any) -> bytes:
    """Pieces of the beginning, the end, and in between."""
    view = memoryview(data)
    last = len(view) - _SAMPLE_BYTES
    starts = [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    return b"".join([view[start : start + _SAMPLE_BYTES] for start in starts])


def decompressed(payload: Buffer) -> tuple[bytes, int]:
    """(payload, kind) of what was compressed.

    Memory is asked for only up to what so many bytes can hold. Raises `SerializationError` if the library is
    missing; other exceptions if the payload is damaged.
    """
    number, kind, length = _HEAD.unpack_from(payload)
    algorithm = _BY_NUMBER.get(number)
    if algorithm is None:
        raise SerializationError("a stored value is compressed by an unknown algorithm: from a newer release")
    if kind not in COMPRESSIBLE:
        raise ValueError("a compressed value of an impossible kind")
    data = memoryview(payload)[_HEAD.size :]
    if length > min(algorithm.longest, algorithm.most_ratio * len(data)):
        raise ValueError("a compressed value that says to be longer than it can be")
    try:
        library = _first(algorithm.modules)
    except ImportError as error:
        if is_interruption(error):
            raise
        raise SerializationError(
            f"a stored value is compressed by {algorithm.name}, whose library is not there: {_INSTALL}"
        ) from error
    found = algorithm.decompress(library, data, length)
    if len(found) != length:
        raise ValueError("a compressed value of another length than it says")
    return found, kind
