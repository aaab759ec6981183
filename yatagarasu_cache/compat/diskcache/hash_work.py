"""What it takes to hash and to compare the members of sets, and the keys of dicts, counted before it is done.

Python hashes tuples in tuples however deep they are, which ends the process, and however often one of them is
met. Members of one hash it compares each with each; two sets of sets that were made apart, member by member,
in twice as many steps for each level. Whoever has written a pickle can so have a few hundred bytes of it take
for ever, within a single call that nothing interrupts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

__all__ = ["HashWork", "TooMuch"]

_MOST_HASHED, _DEEPEST_KEY = 1 << 20, 200
_COMPARISONS = 1 << 23  # as the codec has it: 4,096 numbers of one hash, some tenths of a second
_MODULUS = sys.hash_info.modulus  # of the hash of numbers
_HASHED_SECRETLY = frozenset({str, bytes})


class TooMuch(ValueError):
    """It would take too long, or is what no set and no dict has."""


class HashWork:
    """The work of all sets and dicts of one value, which `length` bytes describe."""

    def __init__(self, length: int) -> None:
        self._hashes, self._comparisons = _MOST_HASHED + length, _COMPARISONS + length
        # By id, with what it is the id of, which must not go: another thing could get it.
        self._weights: dict[int, tuple[Any, int]] = {}
        self._members: dict[int, tuple[Any, Counter[int]]] = {}

    def add(self, keys: list[Any], container: Collection[Any] | None = None) -> None:
        """Count what it takes to put them into a `container` (None: into one that is made of them)."""
        if len(keys) == 1 and not self._members and type(keys[0]) in _HASHED_SECRETLY:
            return  # as in most dicts
        if id(container) not in self._members and _surely_differ(keys):
            if len(set(map(id, keys))) < len(keys):  # it could be compared with an equal one each time
                raise twice()
            return
        hashes = self._hashes_in(container)
        for key in keys:
            self._count_hashing(key)
            number = hash(key)
            alike = hashes[number]
            if alike:
                self._comparisons -= alike * self._weight(key)
                if self._comparisons < 0:
                    raise TooMuch("it would take too long to compare the members of a set, or keys of a dict")
            hashes[number] = alike + 1

    def _hashes_in(self, container: Collection[Any] | None) -> Counter[int]:
        """How many members of a container have each hash."""
        if container is None:
            return Counter()
        found = self._members.get(id(container))
        if found is None:
            found = self._members[id(container)] = container, Counter(map(hash, container))
        return found[1]

    def _count_hashing(self, key: Any) -> None:
        if type(key) is int:
            self._hashes -= key.bit_length() >> 12
        elif type(key) is tuple:
            self._count_tuple(key)
        if self._hashes < 0:
            raise TooMuch("a key of tuples in too many tuples, or of too large numbers")

    def _count_tuple(self, key: tuple[Any, ...]) -> None:
        """Level by level: each tuple as often as it occurs."""
        depth, level = 0, [key]
        while level:
            depth += 1
            self._hashes -= sum(map(len, level))
            if depth > _DEEPEST_KEY or self._hashes < 0:
                raise TooMuch("a key of tuples in too many tuples")
            items = [item for one in level for item in one]
            self._hashes -= sum([item.bit_length() >> 12 for item in items if type(item) is int])
            level = [item for item in items if type(item) is tuple]

    def _weight(self, value: Any) -> int:
        """What it takes to compare it with another one that is nearly the same."""
        kind = type(value)
        if kind is tuple or kind is frozenset:
            found = self._weights.get(id(value))
            if found is None:
                found = self._weights[id(value)] = value, self._weigh(value)
            return found[1]
        if kind is int:
            return 1 + int(value.bit_length() >> 10)
        return 1 + (len(value) >> 8) if kind in _HASHED_SECRETLY else 1

    def _weigh(self, value: tuple[Any, ...] | frozenset[Any]) -> int:
        weights = list(map(self._weight, value))
        weight = 1 + sum(weights)
        if type(value) is frozenset:  # each member is looked up in the other one
            alike = Counter(map(hash, value))
            weight += sum(one * (alike[hash(item)] - 1) for item, one in zip(value, weights, strict=True))
        return weight


def twice() -> TooMuch:
    return TooMuch("a set has a member, or a dict a key, twice")


def _surely_differ(keys: list[Any]) -> bool:
    """Whether their hashes do, where that is quickly seen: small ints are their own, and those of text and
    bytes depend on a secret of Python's."""
    kinds = set(map(type, keys))
    if kinds == {int}:
        return bool(min(keys) > -_MODULUS and max(keys) < _MODULUS)
    return kinds <= _HASHED_SECRETLY
