"""`get_or_set` of a `DiskCache`."""

from __future__ import annotations

import time
from typing import Any

from ..codec import Key
from ..desk import Desk
from ..errors import Unreadable
from .steps import Computing
from .terms import Terms
from .ways import Function, ThreadWays, run

__all__ = ["Once", "Terms"]


class Once:
    """Values computed once among all threads, tasks and processes that ask for them at the same time."""

    terms = Terms

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def get_or_compute(self, key: Key, function: Function, terms: Terms) -> Any:
        """The value of `key`, or else what `function()` returns. Counted as a get."""
        desk = self._desk
        found: Any = desk.get(key, time.time_ns())  # as in `DiskCache.get`
        if found is NotImplemented:
            found = desk.store.keyed.get(key)
        if found is None:
            return self.compute(key, function, terms)
        if terms.refresh_early is not None:
            self.keep_fresh(key, function, terms)
        if type(found) is bytes:
            return found
        payload, flags = found
        try:
            return desk.decode(payload, flags, key)
        except Unreadable:
            if desk.settings.on_unreadable == "error":
                raise
        return self.compute(key, function, terms)

    def compute(self, key: Key, function: Function, terms: Terms) -> Any:
        """The same for a caller who has looked, and found nothing."""
        self._desk.store.entering()
        return run(Computing(self._desk, ThreadWays()).compute(key, function, terms)).result()

    def keep_fresh(self, key: Key, function: Function, terms: Terms) -> None:
        """For one who has found a value: `refresh_early`."""
        self._desk.store.entering()
        Computing(self._desk, ThreadWays()).keep_fresh(key, function, terms)
