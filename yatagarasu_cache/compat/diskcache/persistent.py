"""`Deque` and `Index`: a sequence and a mapping that keep everything, on a `Cache` without eviction."""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    Sequence,
    ValuesView,
)
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, TypeVar

from .core import ENOVAL, Cache

__all__ = ["Deque", "Index"]

F = TypeVar("F", bound=Callable[..., Any])


def _compares(compare: Callable[[Any, Any], Any], doc: str) -> Callable[[Any, Any], Any]:
    """A comparison with another sequence, item by item, as lists are compared."""

    def method(self: Deque, that: Any) -> Any:
        if not isinstance(that, Sequence):
            return NotImplemented
        return compare(list(self), list(that))

    method.__doc__ = doc
    return method


class _Kept:
    """What both are: kept in a cache."""

    _cache: Cache

    @property
    def cache(self) -> Cache:
        """The cache that it is kept in."""
        return self._cache

    @property
    def directory(self) -> str:
        """Where it is."""
        return self._cache.directory

    def transact(self) -> AbstractContextManager[None]:
        """Nobody else changes it in this block. See `Cache.transact`."""
        return self._cache.transact(retry=True)


class Deque(_Kept, Sequence[Any]):
    """A sequence with two ends, kept in a directory. Items may be any values of a `Cache`."""

    def __init__(
        self, iterable: Iterable[Any] = (), directory: Any = None, maxlen: float | None = None
    ) -> None:
        self._begin(Cache(directory, eviction_policy="none"), iterable, maxlen)

    def _begin(self, cache: Cache, iterable: Iterable[Any], maxlen: float | None) -> None:
        self._cache, self._maxlen = cache, float("inf") if maxlen is None else maxlen
        self._extend(iterable)

    @classmethod
    def fromcache(cls, cache: Cache, iterable: Iterable[Any] = (), maxlen: float | None = None) -> Deque:
        """One on a cache that is open."""
        self = cls.__new__(cls)
        self._begin(cache, iterable, maxlen)
        return self

    @property
    def maxlen(self) -> float:
        """How many items it may have: with more, the first ones go."""
        return self._maxlen

    @maxlen.setter
    def maxlen(self, value: float) -> None:
        self._maxlen = value
        with self._cache.transact(retry=True):
            while len(self._cache) > self._maxlen:
                self._popleft()

    def _keys(self) -> list[Any]:
        """Those of the items, from left to right."""
        return list(self._cache.iterkeys())

    def _at(self, index: int, use: Callable[[Any], Any]) -> Any:
        """`use(key)` of the item at an index, or, if somebody has taken that meanwhile, of the next one."""
        count, index = len(self), operator.index(index)
        if not -count <= index < count:
            raise IndexError("deque index out of range")
        for key in self._keys_from(index):
            try:
                return use(key)
            except KeyError:
                continue
        raise IndexError("deque index out of range")

    def _keys_from(self, index: int) -> Iterator[Any]:
        """Those from an index on, or, for one that counts from the end, back from there."""
        first = self._cache._first_number()
        if isinstance(first, int):  # one after the other: nobody has to look for it
            yield first + (index if index >= 0 else index + len(self))
        if index >= 0:
            yield from islice(self._cache.iterkeys(), index, None)
        else:
            yield from islice(self._cache.iterkeys(reverse=True), -index - 1, None)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self._at(index, self._cache.__getitem__)

    def __setitem__(self, index: int, value: Any) -> None:
        with self._cache.transact(retry=True):
            self._at(index, lambda key: self._cache.__setitem__(key, value))

    def __delitem__(self, index: int) -> None:
        with self._cache.transact(retry=True):
            self._at(index, self._cache.__delitem__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(directory={self.directory!r})"

    __eq__ = _compares(operator.eq, "Whether the items are equal.")
    __ne__ = _compares(operator.ne, "Whether they are not.")
    __lt__ = _compares(operator.lt, "As lists are compared.")
    __gt__ = _compares(operator.gt, "As lists are compared.")
    __le__ = _compares(operator.le, "As lists are compared.")
    __ge__ = _compares(operator.ge, "As lists are compared.")
    __hash__ = None  # type: ignore[assignment]

    def __iadd__(self, iterable: Iterable[Any]) -> Deque:
        self._extend(iterable)
        return self

    def __iter__(self) -> Iterator[Any]:
        return self._values(self._keys())

    def _values(self, keys: Iterable[Any]) -> Iterator[Any]:
        for key in keys:
            with contextlib.suppress(KeyError):  # somebody has taken it meanwhile
                yield self._cache[key]

    def __len__(self) -> int:
        return len(self._cache)

    def __reversed__(self) -> Iterator[Any]:
        return self._values(self._cache.iterkeys(reverse=True))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.directory, self.maxlen

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        directory, maxlen = state
        self.__init__(directory=directory, maxlen=maxlen)  # type: ignore[misc]

    def append(self, value: Any) -> None:
        """Add an item at the right end. Beyond `maxlen` the first one goes."""
        with self._cache.transact(retry=True):
            self._cache.push(value, retry=True)
            if len(self._cache) > self._maxlen:
                self._popleft()

    _append = append

    def appendleft(self, value: Any) -> None:
        """Add an item at the left end. Beyond `maxlen` the last one goes."""
        with self._cache.transact(retry=True):
            self._cache.push(value, side="front", retry=True)
            if len(self._cache) > self._maxlen:
                self._pop()

    _appendleft = appendleft

    def clear(self) -> None:
        """Remove all items."""
        self._cache.clear(retry=True)

    _clear = clear

    def copy(self) -> Deque:
        """Another one on the same directory: both have the same items."""
        return type(self)(directory=self.directory, maxlen=self.maxlen)

    def count(self, value: Any) -> int:
        """How many items are equal to it."""
        return sum(1 for item in self if value == item)

    def extend(self, iterable: Iterable[Any]) -> None:
        """Add items at the right end."""
        for value in iterable:
            self._append(value)

    _extend = extend

    def extendleft(self, iterable: Iterable[Any]) -> None:
        """Add items at the left end, one by one: the last one is the first then."""
        for value in iterable:
            self._appendleft(value)

    def peek(self) -> Any:
        """The last item. IndexError if there is none."""
        return self._end("back", removes=False, empty="peek from an empty deque")

    def peekleft(self) -> Any:
        """The first item."""
        return self._end("front", removes=False, empty="peek from an empty deque")

    def pop(self) -> Any:
        """Remove the last item, and return it. IndexError if there is none."""
        return self._end("back", removes=True, empty="pop from an empty deque")

    _pop = pop

    def popleft(self) -> Any:
        """Remove the first item, and return it."""
        return self._end("front", removes=True, empty="pop from an empty deque")

    _popleft = popleft

    def _end(self, side: str, *, removes: bool, empty: str) -> Any:
        get = self._cache.pull if removes else self._cache.peek
        _, value = get(default=(None, ENOVAL), side=side, retry=True)
        if value is ENOVAL:
            raise IndexError(empty)
        return value

    def remove(self, value: Any) -> None:
        """Remove the first item that is equal to it. ValueError if there is none."""
        with self._cache.transact(retry=True):
            for key in self._keys():
                with contextlib.suppress(KeyError):
                    if value == self._cache[key]:
                        del self._cache[key]
                        return
        raise ValueError("deque.remove(value): value not in deque")

    def reverse(self) -> None:
        """Turn the order of the items round."""
        with self._cache.transact(retry=True):
            items = list(reversed(self))
            self._clear()
            self._extend(items)

    def rotate(self, steps: int = 1) -> None:
        """Move so many items from the right end to the left one, or, below 0, the other way."""
        if not isinstance(steps, int):
            raise TypeError(f"{type(steps).__name__!r} object cannot be interpreted as an integer")
        with self._cache.transact(retry=True):
            count = len(self)
            if not count:
                return
            steps = steps % count if steps >= 0 else -(-steps % count)
            with contextlib.suppress(IndexError):  # somebody has taken the items meanwhile
                for _ in range(abs(steps)):
                    if steps > 0:
                        self._appendleft(self._pop())
                    else:
                        self._append(self._popleft())


class Index(_Kept, MutableMapping[Any, Any]):
    """A mapping in the order of insertion, kept in a directory: ``Index([directory], [items], **items)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        directory = None
        if args and (args[0] is None or isinstance(args[0], (str, bytes)) or hasattr(args[0], "__fspath__")):
            directory, args = args[0], args[1:]
        self._cache = Cache(directory, eviction_policy="none")
        self._update(*args, **kwargs)

    _update = MutableMapping.update

    @classmethod
    def fromcache(cls, cache: Cache, *args: Any, **kwargs: Any) -> Index:
        """One on a cache that is open."""
        self = cls.__new__(cls)
        self._cache = cache
        self._update(*args, **kwargs)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self._cache[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._cache[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._cache[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value of a key, or `default`, which is stored. Atomic."""
        while True:
            value = self._cache.get(key, ENOVAL, retry=True)
            if value is not ENOVAL:
                return value
            if self._cache.add(key, default, retry=True):
                return default

    def peekitem(self, last: bool = True) -> Any:
        """The (key, value) that was inserted last, or first. KeyError if there is none."""
        return self._cache.peekitem(last, retry=True)

    def pop(self, key: Any, default: Any = ENOVAL) -> Any:
        """Remove a key, and return its value, or `default`; without one, KeyError."""
        value = self._cache.pop(key, default=default, retry=True)
        if value is ENOVAL:
            raise KeyError(key)
        return value

    def popitem(self, last: bool = True) -> Any:
        """Remove the (key, value) that was inserted last, or first, and return it. Atomic."""
        with self._cache.transact(retry=True):
            key, value = self._cache.peekitem(last=last, retry=True)
            del self._cache[key]
        return key, value

    def push(self, value: Any, prefix: str | None = None, side: str = "back") -> Any:
        """As `Cache.push`."""
        return self._cache.push(value, prefix, side, retry=True)

    def pull(self, prefix: str | None = None, default: Any = (None, None), side: str = "front") -> Any:
        """As `Cache.pull`."""
        return self._cache.pull(prefix, default, side, retry=True)

    def clear(self) -> None:
        """Remove everything."""
        self._cache.clear(retry=True)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cache)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._cache)

    def __len__(self) -> int:
        return len(self._cache)

    def keys(self) -> KeysView[Any]:
        """A view of the keys, in order."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        """A view of the values, in the order of their keys."""
        return ValuesView(self)

    def items(self) -> ItemsView[Any, Any]:
        """A view of (key, value), in order."""
        return ItemsView(self)

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> str:
        return self.directory

    def __setstate__(self, state: str) -> None:
        self.__init__(state)  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        """Whether all items are equal; to another `Index`, or an `OrderedDict`, in the same order."""
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        if isinstance(other, (Index, OrderedDict)):
            return all(a == b and self[a] == other[b] for a, b in zip(self, other, strict=False))
        return all(self[key] == other.get(key, ENOVAL) for key in self)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def memoize(
        self, name: str | None = None, typed: bool = False, ignore: Iterable[int | str] = ()
    ) -> Callable[[F], F]:
        """As `Cache.memoize`."""
        return self._cache.memoize(name, typed, ignore=ignore)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.directory!r})"
