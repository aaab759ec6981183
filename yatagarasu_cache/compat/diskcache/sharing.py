"""Whether a value refers to the same thing more than once. The codec writes such a thing out each time, and
pickle once: what was one list is one list again, and a text that thousands of rows share is stored once."""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

from ...codec.arrays import is_array

__all__ = ["CONTAINERS", "shares"]

CONTAINERS: frozenset[type] = frozenset({list, dict, tuple, set, frozenset, OrderedDict})

_LONG = 256  # bytes or characters, from which on writing a text twice counts
_CHANGEABLE: frozenset[type] = frozenset({list, dict, set, OrderedDict, bytearray})
_LEAST: dict[type, int] = {  # length from which on it matters that there are two references to one
    **dict.fromkeys(_CHANGEABLE, 0),
    **dict.fromkeys((tuple, frozenset), 1),  # of the empty ones there is but one
    **dict.fromkeys((str, bytes), _LONG),
}
_ATOMS: frozenset[type] = frozenset({int, float, bool, type(None)})


def shares(value: Any) -> bool:
    """Whether anything in a container is referred to more than once, the container itself included.

    Level by level: each thing is looked at once, and nothing recurs, however deep it is.
    """
    seen: set[int] = set()
    level = [value]
    while level:
        count = len(seen)
        seen.update(map(id, level))
        if len(seen) < count + len(level):
            return True
        level = _within(level)
    return False


def _within(level: list[Any]) -> list[Any]:
    """What counts of the things that these hold. They are found as the garbage collector finds them, which
    takes no step of Python's for each; the keys of a dict that are all text are left out by that."""
    content = gc.get_referents(*level)
    kinds = set(map(type, content))
    if kinds <= _ATOMS:
        return []
    if len(kinds) == 1 and kinds <= _CHANGEABLE:  # rows, mostly
        return content
    least = _LEAST.get
    found = [one for one in content if (length := least(type(one))) is not None and len(one) >= length]
    if any(map(is_array, kinds)):
        found += [one for one in content if is_array(type(one))]
    return found
