"""What changes the index does so under its lock, and changes the index that is in use: the comments say
so ("the lock is held"), and here it is checked, in every test.

With YATAGARASU_TEST_INDEX=slow, threads are also held up for a moment now and then where an index is
bound, so that whoever binds one before taking the lock is caught with another's in its place.
"""

from __future__ import annotations

import functools
import os
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from yatagarasu_cache.concurrency.file_locks import FileLock
from yatagarasu_cache.store.current import CurrentIndex
from yatagarasu_cache.store.index import Index

CHANGES = (
    "put", "tag", "remove", "move", "reset", "repair", "sum_up", "recount", "install", "load", "load_tags",
    "add_segment", "set_state", "settle", "resize_segment", "drop_segment", "next_segment_id",
)  # fmt: skip
SLOW = os.environ.get("YATAGARASU_TEST_INDEX") == "slow"


class Unlocked(BaseException):
    """Not an Exception: nothing may take it for a failure that it can go on after."""


def is_held(lock: Any) -> bool:
    """True if this thread has the index lock."""
    return isinstance(lock, FileLock) and lock.threads._is_owned() and lock._depth > 0


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a change of an index without its lock, or of a superseded one, raises `Unlocked`."""
    stores: weakref.WeakKeyDictionary[Index, weakref.ref[CurrentIndex]] = weakref.WeakKeyDictionary()
    use, begin = CurrentIndex.use, CurrentIndex.__init__

    def noted(self: CurrentIndex, index: Index) -> None:
        use(self, index)
        stores[index] = weakref.ref(self)

    def begun(self: CurrentIndex, *parts: Any) -> None:
        begin(self, *parts)
        stores[self.index] = weakref.ref(self)

    def checked(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def call(self: Index, *args: Any, **options: Any) -> Any:
            reference = stores.get(self)
            current = reference() if reference is not None else None
            if current is not None and not current._life.closed:  # else it is being made, or looked at by a test
                if not is_held(current._locks.index):
                    raise Unlocked(f"Index.{name} without the lock")
                if current.index is not self:
                    raise Unlocked(f"Index.{name} of an index that was replaced")
            return change(self, *args, **options)

        return call

    monkeypatch.setattr(CurrentIndex, "use", noted)
    monkeypatch.setattr(CurrentIndex, "__init__", begun)
    for name in CHANGES:
        monkeypatch.setattr(Index, name, checked(name, getattr(Index, name)))
    if SLOW:
        slow_down(monkeypatch)


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold threads up where a store's index is bound, unless they have its lock."""
    chance = random.Random(1)

    def bound(self: CurrentIndex) -> Index:
        if chance.random() < 0.002 and not is_held(self._locks.index):
            time.sleep(0.003)
        try:
            index: Index = self.__dict__["index"]
        except KeyError:
            raise AttributeError("index") from None
        return index

    def bind(self: CurrentIndex, index: Index) -> None:
        self.__dict__["index"] = index

    monkeypatch.setattr(CurrentIndex, "index", property(bound, bind), raising=False)


__all__ = ["SLOW", "Unlocked", "guard"]
