"""Changing a value by a function of it: read, called with nothing held, and stored if nobody came first.

Optimistic: whoever comes second begins anew with what the first has left. Of those that contend for a key one
always gets on. The others wait for a random time, whose bound is what a try takes, doubled with each of them:
so all get on before long (Metcalfe and Boggs, "Ethernet", 1976).
"""

from __future__ import annotations

import copy
import errno
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from .backends.base import Buffer
from .codec import Key
from .concurrency.locks import calls_out
from .errors import CacheIOError
from .guard import callers
from .store.current import ATTEMPTS
from .store.expected import ABSENT, Expected
from .store.item import Item
from .store.store import Store

__all__ = ["Modification", "result_of", "result_of_either"]

_TRIES = 2000  # each time the key was changed: by others not so often, but always if the function does it
_DOUBLINGS = 6
_LONGEST = 0.25  # seconds


@calls_out
@callers
def result_of(function: Callable[[Any], Any], value: Any) -> Any:
    return function(value)


@calls_out
@callers
async def result_of_either(function: Callable[[Any], Any], value: Any) -> Any:
    """The same of a function, or a coroutine function."""
    result = function(value)
    return await result if isinstance(result, Awaitable) else result


class Modification:
    """One call of `modify`: ``while not store(function(read())): sleep(pause())``, in whatever threads.

    identify, item, decode: what the handle makes of the key, of a value and of what was stored of one.
    """

    def __init__(
        self, store: Store, key: Key, default: Any, identify: Callable[[Key], tuple[int, int, bytes]],
        item: Callable[[Key, Any], Item], decode: Callable[[Buffer, int, Key], Any],
    ) -> None:  # fmt: skip
        store.life.ensure_writable("modify an entry")
        self._store, self._key, self._default = store, key, default
        self._identify, self._item, self._decode = identify, item, decode
        self._expected, self._tag, self._meta = ABSENT, b"", b""  # of the version that was read
        self._tries, self._began = 0, 0.0

    def read(self) -> Any:
        """The value as it is now, or a copy of the default. Counted neither as a hit nor as a miss."""
        store = self._store
        store.entering()
        self._began = time.monotonic()
        for _ in range(ATTEMPTS):
            low, high, data = self._identify(self._key)
            slot = store.finding.entry(low, high, data)
            if slot is None:
                self._expected, self._tag, self._meta = ABSENT, b"", b""
                return _copied(self._default)
            names = store.reading.names_of_version(slot)
            found = store.reading.fetch_version(slot)
            if names is not None and found is not None:
                self._expected = Expected(slot.stamp, keeps_expiry=True)
                self._tag, self._meta = names.tag, names.meta
                return self._decode(found.payload, found.flags, self._key)
        raise self._too_many_changes()

    def store(self, value: Any) -> bool:
        """Store what the function made of it. False: it was changed meanwhile."""
        self._store.entering()
        item = self._item(self._key, value)._replace(tag=self._tag, meta=self._meta)
        return self._store.writing.put_if(item, self._expected)

    def pause(self) -> float:
        """Seconds to wait before the next try."""
        self._tries += 1
        if self._tries == _TRIES:
            raise self._too_many_changes()
        took = time.monotonic() - self._began
        return random.uniform(0, min(took * 2 ** min(self._tries, _DOUBLINGS), _LONGEST))

    def _too_many_changes(self) -> CacheIOError:
        what = f"cannot modify {self._key!r}: it changes all the time (does the function do it?): try again"
        return CacheIOError(errno.EAGAIN, what)


@callers
def _copied(default: Any) -> Any:
    """A copy, since the function may change it and be called again."""
    return copy.deepcopy(default)
