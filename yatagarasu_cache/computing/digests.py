"""Arguments of calls as parts of keys.

Short scalars are parts as they stand. Everything else is written down as bytes, type and content, and these
are the part: in a tuple of its own, so that no argument that is bytes is taken for it. The bytes are the
same in every process and on every machine: whatever has no order (sets, dicts) is put in one, and numbers
in arrays are little-endian. More than `MOST_INLINE` bytes are replaced by their BLAKE2b digest of 256 bits,
so nobody can make two arguments that meet.

Containers are written as trees of digests: what occurs in many places is written once, however often it
occurs.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from struct import pack
from types import MappingProxyType
from typing import Any

from ..codec import Key
from .names import class_name

__all__ = ["MAX_DEPTH", "MOST_INLINE", "Undigestible", "argument_part"]

MAX_DEPTH = 100
"""How deep containers may be nested in an argument."""

MOST_INLINE = 64
"""Bytes of a value that stand for themselves; longer ones are replaced by a digest."""

LONGEST_IN_CLEAR = 128  # characters of a str, or bytes, that stand in a key as they are
LARGEST_IN_CLEAR = 1 << 64  # numbers below
_DIGEST_BYTES = 32
_LENGTHS = [bytes([length]) for length in range(MOST_INLINE + 1)]
_BYTES = {number: b"i" + number.to_bytes(1, "little", signed=True) for number in range(-128, 128)}
_NO_KEY: Any = object()


class Undigestible(Exception):
    """An argument holds something that can't be written down so that it is the same everywhere."""


def argument_part(value: Any, typed: bool) -> Key:
    """What stands for an argument in a key.

    Unless `typed`, numbers that are equal (1, 1.0 and True, numpy's too) are one, wherever they stand. Equal
    or not, lists and tuples, str and bytes, Decimal and int are different arguments.

    Raises `Undigestible`.
    """
    kind = type(value)
    if kind is str or kind is bytes:
        if len(value) <= LONGEST_IN_CLEAR:
            return value  # type: ignore[no-any-return]
    elif kind is int:
        if -LARGEST_IN_CLEAR < value < LARGEST_IN_CLEAR:
            return value  # type: ignore[no-any-return]
    elif kind is bool:
        return value if typed else int(value)
    elif value is None:
        return None
    elif kind is float:
        if not typed and value.is_integer():
            return argument_part(int(value), typed)
        if value == value:  # NaN is no key
            return value  # type: ignore[no-any-return]
    elif kind not in _CONTAINERS:
        if kind.__module__ == "numpy":
            if not typed and (scalar := _numpy_scalar(value)) is not None:
                return argument_part(scalar, typed)
        elif (key := _own_key(value)) is not _NO_KEY:
            name = class_name(value if isinstance(value, type) else kind)
            is_scalar = key is None or type(key) in _SCALARS
            return name, argument_part(key, typed) if is_scalar else (_Writer(typed).write(key),)
    return (_Writer(typed).write(value),)


class _Writer:
    """Writes one argument."""

    __slots__ = ("_depth", "_typed", "_written")

    def __init__(self, typed: bool) -> None:
        self._typed = typed
        self._depth = 0
        # By id: the value, so that its id is not given to another; its bytes, None while they are written.
        self._written: dict[int, tuple[Any, bytes | None]] = {}

    def write(self, value: Any) -> bytes:
        """The bytes of a value, at most `MOST_INLINE`."""
        kind = type(value)
        if kind is int:
            return self._int(value)
        if kind is str:
            data = b"s" + value.encode("utf-8", "surrogatepass")
            return data if len(data) <= MOST_INLINE else _short(data)
        if kind is float:
            return self._float(value)
        if kind is bool:
            return (b"t" if value else b"f") if self._typed else self._int(int(value))
        if value is None:
            return b"n"
        if kind is bytes:
            return _short(b"b" + value)
        return self._once(value)

    def join(self, tag: bytes, parts: Iterable[bytes]) -> bytes:
        """Parts that `write` has written, of something that `tag` tells the type of."""
        return _short(tag + b"".join([_LENGTHS[len(part)] + part for part in parts]))

    def object(self, name: str, *content: Any) -> bytes:
        """What a class of this name holds."""
        return self.join(b"O", [self.write(name), *map(self.write, content)])

    def raw(self, name: str, header: Any, content: Any) -> bytes:
        """The same of a buffer, which is not copied."""
        digest = blake2b(self.object(name, header), digest_size=_DIGEST_BYTES)
        digest.update(content)
        return b"R" + digest.digest()

    def _int(self, number: int) -> bytes:
        if -128 <= number <= 127:
            return _BYTES[number]
        bits = (number if number >= 0 else ~number).bit_length()
        return _short(b"i" + number.to_bytes((bits >> 3) + 1, "little", signed=True))

    def _float(self, number: float) -> bytes:
        if not self._typed and number.is_integer():
            return self._int(int(number))
        # All NaN are one, and so are both zeros.
        return b"d" + (pack("<d", number + 0.0) if number == number else b"nan")

    def _once(self, value: Any) -> bytes:
        """What may hold other values."""
        known = self._written.get(id(value))
        if known is not None:
            if known[1] is None:
                raise Undigestible("it contains itself")
            return known[1]
        if self._depth >= MAX_DEPTH:
            raise Undigestible(f"it is nested deeper than {MAX_DEPTH}")
        self._written[id(value)] = value, None
        self._depth += 1
        write = _CONTAINERS.get(type(value)) or _writer_of(value)
        written = write(self, value)
        self._depth -= 1
        self._written[id(value)] = value, written
        return written

    # -- containers ---------------------------------------------------------------------------

    def list(self, value: Any) -> bytes:
        return self.join(b"l", map(self.write, value))

    def tuple(self, value: Any) -> bytes:
        return self.join(b"u", map(self.write, value))

    def set(self, value: Any) -> bytes:
        return self.join(b"S", sorted(map(self.write, value)))

    def frozenset(self, value: Any) -> bytes:
        return self.join(b"F", sorted(map(self.write, value)))

    def dict(self, value: Any) -> bytes:
        pairs = sorted([(self.write(key), self.write(member)) for key, member in value.items()])
        return self.join(b"m", [part for pair in pairs for part in pair])

    def fields(self, value: Any, names: Iterable[str]) -> bytes:
        """An object by its attributes, which must all be there."""
        parts = [self.write(class_name(type(value)))]
        for name in names:
            try:
                member = getattr(value, name)
            except AttributeError:
                raise Undigestible(f"{type(value).__qualname__}.{name} is not set") from None
            parts += [self.write(name), self.write(member)]
        return self.join(b"A", parts)

    def class_itself(self, value: type) -> bytes:
        """A class stands for what is found under its name, so it has to be found there."""
        found: Any = sys.modules.get(value.__module__)
        for name in value.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is not value:
            raise Undigestible(f"the class {value.__qualname__} is not found in its module under its name")
        return self.join(b"C", [self.write(class_name(value))])


def _short(data: bytes) -> bytes:
    if len(data) <= MOST_INLINE:
        return data
    return b"#" + blake2b(data, digest_size=_DIGEST_BYTES).digest()


_Write = Callable[[_Writer, Any], bytes]


def _writer_of(value: Any) -> _Write:
    """What writes a value that is no plain scalar or container."""
    kind: Any = type(value)
    if (write := _known_class(kind)) is not None:
        return write
    if (key := _own_key(value)) is not _NO_KEY:
        name = class_name(value if isinstance(value, type) else kind)
        return lambda writer, value: writer.join(b"K", [writer.write(name), writer.write(key)])
    if isinstance(value, type):
        return _Writer.class_itself
    if isinstance(value, enum.Enum):
        return _write_enum
    if (names := _field_names(kind)) is not None:
        return lambda writer, value: writer.fields(value, names)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return lambda writer, value: writer.join(b"N", [writer.write(class_name(kind)), writer.tuple(value)])
    return _write_scalar_of_subclass


def _own_key(value: Any) -> Any:
    """What an object's `__cache_key__` says, an attribute or a method; `_NO_KEY` if it has none."""
    if type(value).__module__ in _KNOWN:
        return _NO_KEY
    if isinstance(value, type):  # the attribute is for its instances, unless it is a class method
        key = getattr(value, "__cache_key__", _NO_KEY)
        return key() if getattr(key, "__self__", None) is value else _NO_KEY
    if not hasattr(type(value), "__cache_key__") and "__cache_key__" not in getattr(value, "__dict__", ()):
        return _NO_KEY
    if callable(value) and hasattr(value, "__wrapped__"):  # a memoized function's, which takes its arguments
        return _NO_KEY
    key = value.__cache_key__
    return key() if callable(key) else key


def _write_enum(writer: _Writer, value: Any) -> bytes:
    member = value._value_ if isinstance(value, enum.Flag) else value._name_
    return writer.join(b"E", [writer.write(class_name(type(value))), writer.write(member)])


def _write_scalar_of_subclass(writer: _Writer, value: Any) -> bytes:
    """A str, bytes, int or float of the caller's own type, if that has no content besides."""
    kind = type(value)
    has_slots = any(vars(one).get("__slots__") for one in kind.__mro__)
    bare = not has_slots and not getattr(value, "__dict__", None)
    plain: Any
    if isinstance(value, str) and bare:
        plain = str.__str__(value)
    elif isinstance(value, bytes) and bare:
        plain = bytes(memoryview(value))
    elif isinstance(value, int) and bare:
        plain = int.__add__(value, 0)
    elif isinstance(value, float) and bare:
        plain = float.__add__(value, 0.0)
    else:
        raise Undigestible(f"objects of type {_shown(kind)} have no digest that is the same everywhere")
    return writer.join(b"X", [writer.write(class_name(kind)), writer.write(plain)])


def _shown(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _field_names(kind: Any) -> list[str] | None:
    """The fields by which objects of a class are compared; None for what is not made of fields."""
    if issubclass(kind, (str, bytes, int, float, list, tuple, set, frozenset, dict)):
        return None  # they hold more than their fields
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind) if field.compare]
    if hasattr(kind, "__attrs_attrs__"):
        return [field.name for field in kind.__attrs_attrs__ if field.eq]
    if hasattr(kind, "__struct_fields__"):  # msgspec
        return list(kind.__struct_fields__)
    if hasattr(kind, "__pydantic_fields__"):
        return [*kind.__pydantic_fields__, "__pydantic_extra__", "__pydantic_private__"]
    return None


# -- classes of Python's and of numpy -------------------------------------------------------------
# Looked up by name, so that nothing is imported before one of them appears.

_SCALARS = (str, bytes, int, bool, float)
_CONTAINERS: dict[type, _Write] = {
    list: _Writer.list,
    tuple: _Writer.tuple,
    dict: _Writer.dict,
    set: _Writer.set,
    frozenset: _Writer.frozenset,
    bytearray: lambda writer, value: writer.raw("bytearray", None, value),
    memoryview: lambda writer, value: _write_memoryview(writer, value),
    # Exact, and apart from other numbers even where they are equal.
    complex: lambda writer, value: writer.object("complex", value.real + 0.0, value.imag + 0.0),
    range: lambda writer, value: writer.object("range", len(value), *value[:2]),
    slice: lambda writer, value: writer.object("slice", value.start, value.stop, value.step),
    type(...): lambda writer, value: writer.object("Ellipsis"),
    MappingProxyType: lambda writer, value: writer.object("MappingProxyType", dict(value)),
}


def _write_memoryview(writer: _Writer, value: memoryview) -> bytes:
    if value.itemsize > 1 and sys.byteorder != "little" or value.format not in _SURE_FORMATS:
        raise Undigestible(f"a memoryview of format {value.format!r} is not the same on every machine")
    content = value.cast("B") if value.c_contiguous and value.nbytes else value.tobytes()
    return writer.raw("memoryview", (value.format, value.shape), content)


_SURE_FORMATS = frozenset("BbchHiIqQfd")


def _write_array(writer: _Writer, value: Any) -> bytes:
    """Of the standard library."""
    content = value
    if sys.byteorder != "little" and value.typecode not in "u":
        content = value[:]
        content.byteswap()
    if value.typecode in "uw":
        return writer.object("array", value.typecode, value.tounicode())
    return writer.raw("array", (value.typecode, value.itemsize), memoryview(content).cast("B"))


def _write_time(writer: _Writer, value: Any) -> bytes:
    """A datetime or a time, by what it shows: equal instants of two zones are two."""
    plain = value.replace(tzinfo=None, fold=0).isoformat()
    return writer.object(type(value).__name__, plain, value.fold, value.tzinfo)


def _write_zone(writer: _Writer, value: Any) -> bytes:
    if value.key is None:
        raise Undigestible("a ZoneInfo from a file has no name")
    return writer.object("ZoneInfo", value.key)


def _text(writer: _Writer, value: Any) -> bytes:
    return writer.object(type(value).__name__, str(value))


def _mapping(writer: _Writer, value: Any) -> bytes:
    return writer.object(type(value).__name__, dict(value))


def _write_path(writer: _Writer, value: Any) -> bytes:
    flavour = "windows path" if "Windows" in type(value).__name__ else "path"
    return writer.object(flavour, str(value))


_KNOWN: dict[str, dict[str, _Write]] = {
    "array": {"array": _write_array},
    "collections": {
        "OrderedDict": lambda writer, value: writer.object("OrderedDict", list(value.items())),
        "defaultdict": lambda writer, value: writer.object(
            "defaultdict", value.default_factory, dict(value)
        ),
        "deque": lambda writer, value: writer.object("deque", value.maxlen, list(value)),
        "Counter": _mapping,
    },
    "types": {
        "SimpleNamespace": lambda writer, value: writer.object("SimpleNamespace", vars(value)),
    },
    "datetime": {
        "datetime": _write_time,
        "time": _write_time,
        "date": _text,
        "timedelta": lambda writer, value: writer.object(
            "timedelta", value.days, value.seconds, value.microseconds
        ),
        "timezone": lambda writer, value: writer.object(
            "timezone", value.utcoffset(None), value.tzname(None)
        ),
    },
    "zoneinfo": {"ZoneInfo": _write_zone},
    "decimal": {"Decimal": _text},
    "fractions": {
        "Fraction": lambda writer, value: writer.object("Fraction", value.numerator, value.denominator)
    },
    "uuid": {"UUID": _text},
    "ipaddress": dict.fromkeys(
        ("IPv4Address", "IPv6Address", "IPv4Network", "IPv6Network", "IPv4Interface", "IPv6Interface"), _text
    ),
    "pathlib": dict.fromkeys(
        ("PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath"), _write_path
    ),
    "re": {"Pattern": lambda writer, value: writer.object("Pattern", value.pattern, value.flags)},
    "numpy": {
        "ndarray": lambda writer, value: _write_ndarray(writer, value),
        "memmap": lambda writer, value: _write_ndarray(writer, value),
    },
}
_ALIASES = {"pathlib._local": "pathlib", "_pydatetime": "datetime", "_pydecimal": "decimal"}


def _known_class(kind: type) -> _Write | None:
    module = getattr(kind, "__module__", None)
    if not isinstance(module, str):
        return None
    module = _ALIASES.get(module, module)
    write = _KNOWN.get(module, {}).get(kind.__name__)
    if write is not None and getattr(sys.modules.get(module), kind.__name__, None) is kind:
        return write
    if module == "numpy" and _is_numpy_scalar(kind):
        return _write_numpy_scalar
    return None


_PLAIN_KINDS = "biufSU"  # of dtypes whose items are Python's own scalars, exactly


def _is_numpy_scalar(kind: type) -> bool:
    generic = getattr(sys.modules.get("numpy"), "generic", None)
    return generic is not None and issubclass(kind, generic)


def _numpy_scalar(value: Any) -> Any:
    """A scalar of numpy as Python's own, if there is one that is the same; or None."""
    if not _is_numpy_scalar(type(value)):
        return None
    plain = value.item() if value.dtype.kind in _PLAIN_KINDS else None
    return plain if type(plain) in (bool, int, float, str, bytes) else None


def _write_numpy_scalar(writer: _Writer, value: Any) -> bytes:
    plain = _numpy_scalar(value)
    if plain is None:
        return writer.object("numpy scalar", sys.modules["numpy"].asarray(value))
    return writer.object("numpy scalar", value.dtype.name, plain) if writer._typed else writer.write(plain)


def _write_ndarray(writer: _Writer, array: Any) -> bytes:
    """By dtype, shape and bytes, which are not copied if they lie in one piece and are little-endian."""
    dtype = array.dtype
    if dtype.names is not None:  # between its fields there may be bytes that mean nothing
        return writer.object("structured array", [(name, array[name]) for name in dtype.names])
    if dtype.kind in "OT":  # it holds references
        return writer.object("array of objects", array.shape, array.ravel().tolist())
    if dtype.kind not in "biufcmMSUV" or dtype.kind == "f" and dtype.itemsize > 8:
        raise Undigestible(f"an array of {dtype.name} is not the same on every machine")
    if dtype.kind == "c" and dtype.itemsize > 16:
        raise Undigestible(f"an array of {dtype.name} is not the same on every machine")
    little = dtype.newbyteorder("<")
    content = array.astype(little, order="C", copy=False).reshape(-1)
    data = content.view("u1").data if content.nbytes else b""
    return writer.raw("ndarray", (little.str, array.shape), data)
