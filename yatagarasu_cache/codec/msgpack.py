"""The default serializer: scalars and the builtin containers as msgpack, exactly as they went in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import gt
from typing import Any

import ormsgpack
from ormsgpack import Ext, packb, unpackb

from ..backends.base import Buffer
from ..concurrency.interruption import is_interruption
from ..errors import SerializationError
from ..store import compiled
from ..store.format import MAX_VALUE_BYTES
from ..store.item import Pieces
from .arrays import array_bytes, describe_array, is_array, load_numpy, numpy_part, own_array, why_not
from .basics import from_int, from_utf8, to_int, utf8
from .bounds import (
    CONTAINER_COST,
    MAX_VALUE_DEPTH,
    OPENERS,
    REMEDY,
    Collisions,
    Openers,
    check_repetition,
    measure,
    refused,
    too_deep,
    too_long,
    too_many_collisions,
)
from .classes import Classes
from .scalars import FIRST_SCALAR, LOADERS, ZONE_TAG, scalar_part, two_zones

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

_EXT_FLAT, _EXT_INT, _EXT_STR, _EXT_BYTEARRAY = range(FIRST_SCALAR)
_EXT_NUMPY = FIRST_SCALAR + len(LOADERS)  # a scalar of numpy's
_EXT_ARRAY = _EXT_NUMPY + 1  # its description; its memory is behind the msgpack
_LIST, _TUPLE, _SET, _FROZENSET, _DICT, _ORDERED = range(6)
_FIRST_CLASS = 16  # steps from here on build objects of the classes that `TypedSerializer` lists


class MsgpackSerializer:
    """The default: scalars, the builtin containers and arrays, by ormsgpack, exactly as they went in.

    Taken: str, bytes, bytearray, int of any size, float, complex, bool, None, Ellipsis; datetime, date,
    time, timedelta, timezone, ZoneInfo, pydantic's TzInfo; Decimal, Fraction, UUID, range, the paths of
    pathlib, the addresses of ipaddress; numpy's arrays and scalars of plain dtypes; list, tuple, dict,
    OrderedDict, set and frozenset of all these, nested at will up to `MAX_VALUE_DEPTH`. Refused: everything
    else, subclasses of these included. An object that occurs twice comes back as two equal ones.

    What is JSON-like is plain msgpack. A scalar that msgpack lacks is an extension. Else the payload is one
    extension object that holds the plain parts of the value in post-order and the steps that put them
    together again: no nesting of extensions, so that hostile bytes cannot exhaust the stack. The memory of
    arrays follows, as it is.
    """

    name = "msgpack"
    takes_memoryview = True

    def dumps(self, value: Any, most: int = MAX_VALUE_BYTES) -> bytes:
        """`value` as msgpack; `SerializationError` when it would not come back exactly.

        `ValueTooLarge` when it takes more than `most` bytes, without taking very much more memory: not
        even what holds itself, or the same thing again and again, takes long.
        """
        dumped = dump(value, most)
        return dumped if type(dumped) is bytes else bytes(dumped)

    def loads(self, data: Buffer) -> Any:
        """The value in `data`; `SerializationError` when there is none.

        Bytes behind a value without arrays go unnoticed: that is for the store's checksum to catch.
        """
        return load(data)


def dump(value: Any, most: int) -> bytes | Pieces:
    """`MsgpackSerializer.dumps`; the memory of arrays in the value is not copied."""
    if type(value) is dict or type(value) is list:
        packed: Any = _pack(value, most, measure, False)
        if type(packed) is bytes:
            return packed
        if packed is None:
            raise too_long(most)
    return dump_with(None, value, most)[0]


def load(data: Buffer, classes: Classes | None = None) -> Any:
    """`MsgpackSerializer.loads`, with objects of these `classes`."""
    try:
        if data[0] not in _EXTENSION_HEADS:
            return unpackb(data)
        found = unpackb(data, ext_hook=_Extension)
        if found.start == _EXT_FLAT:
            return _load_flat(found.stop, data, classes)
        if found.start < FIRST_SCALAR:
            raise ValueError("an extension out of place")
        memory = _Memory(data)
        value = _load_part(found.start, found.stop, memory)
        memory.ensure_used_up()
        return value
    except SerializationError:
        raise
    except Exception as error:
        if is_interruption(error):
            raise
        what = "damaged" if classes is None else "damaged, or a class in it was changed"
        raise SerializationError(f"a stored msgpack value is {what}: {error}") from error


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
    kinds = measure(value, most) if type(value) in OPENERS else {type(value)}
    if extensions and tuple in kinds:
        parts, *rest = value
        value = [[Ext(*part) if type(part) is tuple else part for part in parts], *rest]
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


_FEW = 32  # scalars among which no collisions are looked for: comparing these takes little more than reading


def dump_with(classes: Classes | None, value: Any, most: int) -> tuple[bytes | Pieces, bool]:
    """`value` as msgpack after a look at every part of it; and whether objects of `classes` are in it."""
    # In the hope that each str and int will do, which is quicker; else with a look at them too.
    for plain in (_SCALARS, _SURE_SCALARS):
        flat = _Flattener(value, plain, most, classes)
        packed: bytes | Pieces | None = _dump_flat(flat, value, most)
        if packed is None or packed is not NotImplemented and len(packed) > most:
            raise too_long(most)
        if packed is not NotImplemented:
            return packed, flat.has_objects
    raise SerializationError(
        "msgpack cannot hold the value: something in it has more than 2**32 bytes or items, or it was changed"
        f" meanwhile; {REMEDY}"
    )


def _dump_flat(flat: _Flattener, value: Any, most: int) -> Any:
    """`value` as msgpack, taken apart if need be; NotImplemented and None as from `_pack`."""
    if flat.add(value, 0):
        return _pack(value, most, measure, False)
    if not flat.steps and flat.parts[0][0] >= FIRST_SCALAR:
        (part,) = flat.parts
        return _with_memory(packb(Ext(*part)), flat)
    content = _pack(flat.content(), most, measure, True)
    if type(content) is not bytes:
        return content
    if flat.collisions is not None and flat.collisions.too_many(len(content)):
        raise too_many_collisions()
    return _with_memory(packb(Ext(_EXT_FLAT, content)), flat)


def _with_memory(packed: bytes, flat: _Flattener) -> bytes | Pieces:
    """What was packed, and behind it the memory of the arrays."""
    if not flat.memory:
        return packed
    check_repetition(flat.memory)
    return Pieces((packed, *[buffer for _, buffer in flat.memory]))


_WATCH_ITEMS = 1 << 16
_STEPS: dict[type, int] = {
    list: _LIST, tuple: _TUPLE, set: _SET, frozenset: _FROZENSET, dict: _DICT, OrderedDict: _ORDERED,
}  # fmt: skip
_PAIRS = frozenset({_DICT, _ORDERED})  # whose content is keys and values in turn
_HASHING = _PAIRS | {_SET, _FROZENSET}


class _Flattener:
    """Takes a value apart into `parts` that msgpack holds exactly, and `steps` to rebuild it.

    Steps come in threes: which container to build, how many more parts to put on the stack
    before, and how many of the topmost things on the stack become its content. Types in `plain`
    are taken for parts without a look at the value. Of arrays `memory` is kept apart.
    """

    __slots__ = (
        "_classes", "_most", "_openers", "_plain", "_pushed", "_shapes", "_unwatched", "_value", "_watched",
        "_zones", "collisions", "memory", "parts", "steps",
    )  # fmt: skip

    def __init__(self, value: Any, plain: frozenset[type], most: int, classes: Classes | None) -> None:
        self.parts: list[Any] = []
        self.steps: list[int] = []
        self.memory: list[tuple[int, Buffer]] = []  # of arrays, by id
        self.collisions: Collisions | None = None
        self._classes, self._openers = classes, OPENERS if classes is None else classes.openers
        self._shapes: dict[Any, int] | None = None  # of objects: which step builds them
        self._plain = plain
        self._pushed = 0
        self._value, self._most = value, most
        self._unwatched, self._watched = _WATCH_ITEMS, False
        self._zones: dict[Any, object] = {}

    @property
    def has_objects(self) -> bool:
        return self._shapes is not None

    def content(self) -> list[Any]:
        """What is packed."""
        if self._shapes is None:
            return [self.parts, self.steps]
        shapes = [[tag, form, list(fields), list(names)] for tag, form, fields, names in self._shapes]
        return [self.parts, self.steps, shapes]

    def add(self, value: Any, depth: int) -> bool:
        """Add `value`; whether it is plain, that is, a part as it stands."""
        kind = type(value)
        if kind in self._plain:
            self.parts.append(value)
            return True
        if kind in _STEPS:
            return self._add_container(value, kind, depth)
        if self._classes is not None and kind in self._classes.families:
            return self._add_object(value, depth)
        if is_array(kind):
            description, memory = describe_array(value)
            self.memory.append((id(value), memory))
            self.parts.append((_EXT_ARRAY, description))
            return False
        part = _as_part(value)
        if part is None:
            raise _refused(value) if self._classes is None else self._classes.refused(value)
        if part is not value:
            self._count(len(part[1]))
            if part[0] == ZONE_TAG and self._zones.setdefault(part, value) is not value:
                raise two_zones(value)
        self.parts.append(part)
        return part is value

    def _add_container(self, value: Any, kind: type, depth: int) -> bool:
        """Add `value`, whole if msgpack has its `kind` and all its content is plain."""
        parts = self.parts
        start = len(parts)
        content = OPENERS[kind](value)
        plain = self._add_all(content, depth)
        if plain and (kind is list or (kind is dict and set(map(type, value)) <= {str})):
            self._count(len(content))
            parts[start:] = [value]
            return True
        if kind is OrderedDict and value.__dict__:
            raise SerializationError("an OrderedDict with attributes would come back without them")
        step, more, count = _STEPS[kind], len(parts) - self._pushed, len(content)
        self.steps += (step, more, count)
        self._pushed = len(parts)
        if (more != count or count > _FEW) and step in _HASHING and count > 1 + (step in _PAIRS):
            self.collisions = self.collisions or Collisions(self._openers)
            self.collisions.add(content[::2] if step in _PAIRS else content)
        return False

    def _add_object(self, value: Any, depth: int) -> bool:
        """Add an object of a listed class."""
        assert self._classes is not None
        shape, content = self._classes.families[type(value)].taken(value)
        self._add_all(content, depth)
        if self._shapes is None:
            self._shapes = {}
        step = self._shapes.setdefault(shape, _FIRST_CLASS + len(self._shapes))
        self.steps += (step, len(self.parts) - self._pushed, len(content))
        self._pushed = len(self.parts)
        return False

    def _add_all(self, content: list[Any], depth: int) -> bool:
        """Add what is in something; whether all of it is plain."""
        if depth >= MAX_VALUE_DEPTH:
            raise too_deep()
        if len(self.parts) > _WATCH_ITEMS:
            self._watch()
        if self._plain.issuperset(map(type, content)):  # all at once, at the speed of C
            self.parts += content
            return True
        self._count(len(content))
        plain = True
        for item in content:
            plain = self.add(item, depth + 1) and plain
        return plain

    def _count(self, items: int) -> None:
        """Work and memory that the number of parts does not tell."""
        self._unwatched -= items
        if self._unwatched < 0:
            self._watch()

    def _watch(self) -> None:
        """After much work, once: whether it has an end. That of a lone scalar has."""
        if not self._watched and type(self._value) in self._openers:
            self._watched = True
            measure(self._value, self._most, CONTAINER_COST, self._openers)


def _as_part(value: Any) -> Any:
    """A scalar as it is if msgpack can hold it, else (tag, bytes) of an extension; None for what is none."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() or _has_no_surrogates(value) else (_EXT_STR, utf8(value))
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else (_EXT_INT, from_int(value))
    if kind is bytearray:
        return _EXT_BYTEARRAY, bytes(value)
    part = scalar_part(value)
    if part is None and (data := numpy_part(value)) is not None:
        return _EXT_NUMPY, data
    return part


def _refused(value: object) -> SerializationError:
    return refused(value, why_not(value) + REMEDY)


def _has_no_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Memory:
    """What is behind the msgpack of a value: the memory of its arrays, one behind the other."""

    __slots__ = ("_data", "_rest")

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._rest: memoryview | None = None

    def array(self, description: bytes) -> Any:
        """The next array: a copy, so that it can be written, and keeps no others alive."""
        if self._rest is None:
            self._rest = memoryview(self._data)[_extension_end(self._data) :]
        length = array_bytes(description)
        array = own_array(description, self._rest[:length])
        self._rest = self._rest[length:]
        return array

    def ensure_used_up(self) -> None:
        if self._rest:
            raise ValueError("more bytes than its arrays have")


def _extension_end(data: Buffer) -> int:
    """Where the extension that `data` begins with ends."""
    head = data[0]
    if head >= 0xD4:  # of 1, 2, 4, 8 or 16 bytes
        return 2 + (1 << (head - 0xD4))
    size = 1 << (head - 0xC7)
    return 2 + size + int.from_bytes(data[1 : 1 + size], "big")


def _load_flat(content: bytes, data: Buffer, classes: Classes | None) -> Any:
    """A whole value that `dump_with` took apart. `data`: all of it, with the memory of its arrays."""
    found = _unpack_parts(content, data)
    if len(found) == 2:
        parts, steps = found
        return _rebuild(parts, steps, len(content), _BUILDERS, OPENERS)
    parts, steps, shapes = found
    if classes is None:
        raise ValueError("an object of a class")
    made = [classes.builder(*shape) for shape in shapes]
    builders = {**_BUILDERS, **dict(enumerate(made, _FIRST_CLASS))}
    return _rebuild(parts, steps, len(content), builders, classes.openers)


def _unpack_parts(content: bytes, data: Buffer) -> Any:
    """[parts, steps] of a value, and what classes there are in it, if any."""
    try:
        return unpackb(content)
    except ValueError as error:  # for an extension, or because it is damaged
        if is_interruption(error):
            raise
    parts, *rest = unpackb(content, ext_hook=_Extension)
    plain = [part for part in parts if type(part) is not _Extension]
    if not measure([plain, rest], MAX_VALUE_BYTES) <= _PLAIN:
        raise ValueError("an extension out of place")
    memory = _Memory(data)
    for at, part in enumerate(parts):
        if type(part) is _Extension:
            parts[at] = _load_part(part.start, part.stop, memory)
    memory.ensure_used_up()
    return [parts, *rest]


def _load_part(tag: int, data: bytes, memory: _Memory) -> Any:
    """A part of a value that msgpack itself has no form for."""
    if tag == _EXT_INT:
        return to_int(data)
    if tag == _EXT_STR:
        return from_utf8(data)
    if tag == _EXT_BYTEARRAY:
        return bytearray(data)
    if tag in LOADERS:
        return LOADERS[tag](data)
    if tag == _EXT_ARRAY:
        return memory.array(data)
    if tag == _EXT_NUMPY:
        return load_numpy(data)
    raise ValueError("an unknown extension")


def _rebuild(
    parts: list[Any], steps: list[int], length: int,
    builders: dict[int, Callable[[list[Any]], Any]], openers: Openers,
) -> Any:  # fmt: skip
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
        if (more != count or count > _FEW) and step in _HASHING and count > 1 + (step in _PAIRS):
            collisions = collisions or Collisions(openers)
            collisions.add(content[::2] if step in _PAIRS else content)
            if collisions.too_many(length):
                raise ValueError("too many members or keys of the same hash")
        stack.append(builders[step](content))
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


def _build_ordered(content: list[Any]) -> OrderedDict[Any, Any]:
    return OrderedDict(_build_dict(content))


_BUILDERS: dict[int, Callable[[list[Any]], Any]] = {
    _LIST: list,
    _TUPLE: tuple,
    _SET: _build_set,
    _FROZENSET: _build_frozenset,
    _DICT: _build_dict,
    _ORDERED: _build_ordered,
}
