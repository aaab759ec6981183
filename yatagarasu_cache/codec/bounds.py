"""How much a value takes to write and to read: what has no end, or is out of proportion, is refused."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from ..errors import SerializationError, ValueTooLarge
from .basics import type_name

MAX_VALUE_DEPTH = 200
"""How deep containers may be nested in a value (plain lists and dicts: a little deeper)."""

def too_long(most: int) -> ValueTooLarge:
    return ValueTooLarge(
        f"the value takes more than {most} bytes when it is encoded, which is all that max_value_size or"
        " size_limit leaves room for: raise it, or store less"
    )


SIZED: frozenset[type] = frozenset({str, bytes, bytearray})


def _keys_and_values(value: Any) -> list[Any]:
    return list(chain.from_iterable(value.items()))


Openers = Mapping[type, Callable[[Any], list[Any]]]

OPENERS: Openers = {
    **dict.fromkeys((list, tuple, set, frozenset), list),
    **dict.fromkeys((dict, OrderedDict), _keys_and_values),
}
"""What is in a container of each type: keys and values in turn, if it is a dict."""


class _Opened:
    """A container whose content is being measured."""

    __slots__ = ("containers", "inner", "size", "value")

    def __init__(self, value: Any, kinds: set[type], openers: Openers) -> None:
        self.value = value
        self.containers = 1
        content = openers[type(value)](value)
        here = set(map(type, content))
        kinds |= here
        inner = [] if here.isdisjoint(openers) else [item for item in content if type(item) in openers]
        self.inner: Iterator[Any] = iter(inner)
        self.size = 1 + len(content) - len(inner)
        if here & SIZED:
            self.size += sum([len(item) for item in content if type(item) in SIZED])
        if int in here:
            numbers = content if len(here) == 1 else [item for item in content if type(item) is int]
            self.size += max((sum(map(int.bit_length, numbers)) >> 3) - len(numbers), 0)


def measure(value: Any, most: int, container: int = 0, openers: Openers = OPENERS) -> set[type]:
    """The types of all that is in a container; `ValueTooLarge` if it certainly takes more than `most` bytes.

    Each container is looked at once, however often it occurs. What contains itself is refused, and what
    refers to the same things so often that it grows out of all proportion: to write out a `container` takes
    as long as so many bytes do. `openers`: what is a container, and how to see what is in it.
    """
    kinds: set[type] = set()
    sizes: dict[int, tuple[int, int] | None] = {id(value): None}  # and containers in it; None: not known yet
    stack = [_Opened(value, kinds, openers)]
    while stack:
        top = stack[-1]
        for item in top.inner:
            size = sizes.setdefault(id(item), _NOT_SEEN)
            if size is None or len(stack) > DEEPEST:
                raise too_deep()
            if size is _NOT_SEEN:
                sizes[id(item)] = None
                stack.append(_Opened(item, kinds, openers))
                break
            top.size += size[0]
            top.containers += size[1]
        else:
            stack.pop()
            if top.size > most:
                raise too_long(most)
            sizes[id(top.value)] = top.size, top.containers
            if stack:
                stack[-1].size += top.size
                stack[-1].containers += top.containers
    check_growth(value, top.size + container * top.containers, openers)
    return kinds


_NOT_SEEN = -1, -1


def check_growth(value: Any, cost: int, openers: Openers = OPENERS) -> None:
    """`ValueTooLarge` if `cost`, in bytes, comes from a `value` that itself has next to nothing."""
    if cost > _MUCH and cost > _GROWTH * _held_bytes(value, openers):
        raise _too_much_growth()


def check_repetition(memory: list[tuple[int, Any]]) -> None:
    """The same of the arrays in a value: `memory` of each, and whose it is."""
    cost = sum([len(buffer) for _, buffer in memory])
    if cost > _MUCH and cost > _GROWTH * sum(map(len, dict(memory).values())):
        raise _too_much_growth()


def _too_much_growth() -> ValueTooLarge:
    return ValueTooLarge(
        "the value refers to the same things again and again, and would grow to more than"
        f" {_GROWTH} times its size when it is encoded: store what is shared once, under a key of its own"
    )


_MUCH = 1 << 28  # bytes that any value may take to encode
_GROWTH = 64  # times the bytes that it holds are what more it may take


def _held_bytes(value: Any, openers: Openers) -> int:
    """Bytes of memory that a container holds, roughly: each thing once, however often it occurs."""
    total = 0
    seen = {id(value)}
    found = [value]
    while found:
        opened = found.pop()
        content = openers[type(opened)](opened)
        total += _CONTAINER_BYTES + _REFERENCE_BYTES * len(content)
        for item in content:
            size = 1 if type(item) in openers else _held_apart(item)  # that of a container: when it is opened
            if size and id(item) not in seen:
                seen.add(id(item))
                total += size
                if type(item) in openers:
                    found.append(item)
    return total


_CONTAINER_BYTES = 56
_REFERENCE_BYTES = 8


def _held_apart(item: Any) -> int:
    """Bytes that an item has beside the reference to it. Little is taken for nothing."""
    kind = type(item)
    size = 0
    if kind in SIZED:
        size = len(item)
    elif kind is int:
        size = item.bit_length() >> 3
    return size if size > _GROWTH * _REFERENCE_BYTES else 0


class Collisions:
    """What it takes to tell members of a set, or keys of a dict, apart that have the same hash.

    Python compares each with each. Whoever chooses numbers, or tuples and frozensets of them, can give all
    of them one hash. Only such members are looked at closely, so honest values have next to no work.
    """

    __slots__ = ("_openers", "_weights", "work")

    def __init__(self, openers: Openers = OPENERS) -> None:
        self.work = 0  # comparisons of two small numbers, or what takes as long
        self._weights: dict[int, int] = {}  # of tuples, frozensets and objects, by id
        self._openers = openers

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
        return sum([(len(group) - 1) * self._weight_of_all(group) // 2 for group in alike])

    def _weight_of_all(self, group: list[Any]) -> int:
        """An int is converted to be compared with a Decimal: that takes the square of its length."""
        weights = map(self._weight, group)
        if _PLAIN_MEMBERS.issuperset(map(type, group)):
            return sum(weights)
        return sum([weight * weight for weight in weights])

    def _weight(self, value: Any) -> int:
        """What it takes to compare `value` with another one that is nearly the same."""
        kind = type(value)
        if kind in self._openers:
            weight = self._weights.get(id(value))
            if weight is None:
                weight = self._weights[id(value)] = self._weigh(value)
            return weight
        if kind is int:
            return 1 + int(value.bit_length() >> 10)
        if kind in SIZED:
            return 1 + (len(value) >> 8)
        return 1 if kind in _PLAIN_MEMBERS else 1 + (_bytes_of(value) >> 8)

    def _weigh(self, value: Any) -> int:
        content = self._openers[type(value)](value)
        weight = 1 + sum(map(self._weight, content))
        if type(value) is frozenset:  # each member is looked up in the other one
            weight += self._comparing(content)
        return weight


def _bytes_of(value: Any) -> int:
    """Bytes of memory that a value of the standard library, or an object, has, with the numbers in it."""
    inner = [getattr(value, name, 0) for name in ("numerator", "denominator", "start", "stop")]
    return sys.getsizeof(value) + sum(map(sys.getsizeof, inner))


_PLAIN_MEMBERS: frozenset[type] = frozenset(
    {int, float, bool, type(None), str, bytes, tuple, frozenset}
)  # what is compared in proportion to its length


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


REMEDY = (
    "convert it first, or open the cache with serializer=TypedSerializer(types=[...]) for classes of your"
    " own, with PickleSerializer(secret=...), which signs what it stores, or with a serializer of your own"
)


def refused(value: object, remedy: str = REMEDY) -> SerializationError:
    name = type_name(value)
    return SerializationError(f"a value of type {name} would not come back as what it is; {remedy}")


def too_deep() -> SerializationError:
    return SerializationError(
        f"the value is nested deeper than {MAX_VALUE_DEPTH} levels or contains itself; {REMEDY}"
    )


def too_many_collisions() -> SerializationError:
    return SerializationError(
        "a set or dict in the value has so many members or keys of the same hash (as multiples of 2**61 - 1"
        f" have) that it would take too long to read; {REMEDY}"
    )


CONTAINER_COST = 128  # bytes that are written in the time in which one container is taken apart
DEEPEST = 255  # that ormsgpack writes and reads
