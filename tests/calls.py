"""The table of all calls of a cache, and what they give, in a form that can be compared."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

from helpers import noise
from watched import LARGE

from yatagarasu_cache.aio import AsyncValueReader
from yatagarasu_cache.entry import Entry, Location


async def described(value: Any) -> Any:
    """What a call of either class gave, in a form that can be compared."""
    if inspect.isawaitable(value):
        value = await value
    if isinstance(value, AsyncValueReader):
        async with value:
            return await value.read()
    if isinstance(value, io.BufferedReader):
        with value:
            return value.read()
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, Location):
        with value as (fd, offset, length):
            return os.pread(fd, length, offset)
    if isinstance(value, Entry):
        times = [time and round(time, 3) for time in (value.created, value.expires, value.accessed)]
        return repr((value.key, value.tag, value.meta, value.size, times, await described(value.value)))
    if isinstance(value, dict):
        return {repr(key): repr(one) for key, one in value.items()}
    if hasattr(value, "__aiter__"):
        return sorted([repr(await described(one)) async for one in value])
    if isinstance(value, (list, Iterator)):
        return sorted([repr(await described(one)) for one in value])
    return value if isinstance(value, bytes) else repr(value)


async def outcome(call: Callable[[Any], Any], cache: Any) -> Any:
    try:
        return await described(call(cache))
    except Exception as error:
        return type(error), str(error).replace(cache.directory, "<directory>")


CALLS: dict[str, Callable[[Any], Any]] = {
    "get": lambda c: c.get("k"),
    "get missing": lambda c: c.get("missing", 5),
    "get large": lambda c: c.get("large"),
    "set": lambda c: c.set("new", {"a": 1}, expire=60, tag="t", meta=[1]),
    "set stream": lambda c: c.set("stream", iter([b"x", b"y"]), tag="t"),
    "set file": lambda c: c.set("file", io.BytesIO(noise(3 * LARGE)), meta="m"),
    "set large": lambda c: c.set("large", noise(2 * LARGE, 1)),
    "set absent": lambda c: c.set("new", {"a": 1}, if_version=0),
    "set of another version": lambda c: c.set("k", b"new", if_version=1),
    "set large of another version": lambda c: c.set("large", noise(2 * LARGE, 1), if_version=1),
    "set stream of another version": lambda c: c.set("k", iter([noise(LARGE)] * 2), if_version=0),
    "set stream absent": lambda c: c.set("stream", iter([noise(LARGE)] * 2), if_version=0),
    "set of no version": lambda c: c.set("k", b"new", if_version="1"),
    "set of a version below 0": lambda c: c.set("k", b"new", if_version=-1),
    "add": lambda c: c.add("k", 1),
    "add new": lambda c: c.add("added", 1, 60, "t", "m"),
    "touch": lambda c: c.touch("k", 100),
    "incr": lambda c: c.incr("n", 5),
    "incr of no integer": lambda c: c.incr("k"),
    "incr without default": lambda c: c.incr("missing", default=None),
    "incr for some time": lambda c: c.incr("window", expire=60, tag="w"),
    "incr of a wrong time": lambda c: c.incr("n", expire=0),
    "decr": lambda c: c.decr("n", 2, default=7),
    "decr for some time": lambda c: c.decr("window", expire=60, tag="w"),
    "modify": lambda c: c.modify("n", lambda n: n + 1),
    "modify missing": lambda c: c.modify("missing", lambda some: [*some, 1], default=[]),
    "modify to what can't be": lambda c: c.modify("n", lambda n: object()),
    "modify in vain": lambda c: c.modify("n", lambda n: n / 0),
    "setdefault": lambda c: c.setdefault("k", 1),
    "setdefault missing": lambda c: c.setdefault("missing", {"a": 1}, 60, "t", "m"),
    "pop": lambda c: c.pop("p"),
    "pop missing": lambda c: c.pop("missing", 6),
    "delete": lambda c: c.delete("d"),
    "delete of another version": lambda c: c.delete("d", if_version=1),
    "delete of no version": lambda c: c.delete("d", if_version=1.5),
    "__contains__": lambda c: "k" in c,
    "__len__": lambda c: len(c),
    "get_many": lambda c: c.get_many(["k", "n", "missing", "large", ("t", 1), "k"]),
    "get_many none": lambda c: c.get_many([]),
    "set_many": lambda c: c.set_many({("t", 1): "x", 5: 6}, expire=30, tag="many"),
    "set_many pairs": lambda c: c.set_many((n, n) for n in range(20)),
    "set_many none": lambda c: c.set_many({}),
    "update": lambda c: c.update({("t", 1): "x", 5: 6}, expire=30, tag="many", meta="m"),
    "update pairs": lambda c: c.update((n, n) for n in range(20)),
    "update none": lambda c: c.update(),
    "delete_many": lambda c: c.delete_many(n for n in range(5)),
    "delete_many none": lambda c: c.delete_many([]),
    "__aiter__": lambda c: c.__aiter__() if hasattr(c, "__aiter__") else iter(c),
    "keys": lambda c: c.keys(),
    "items": lambda c: c.items(),
    "values": lambda c: c.values(),
    "entries": lambda c: c.entries(),
    "entries some": lambda c: c.entries(prefix=("t",), tag="many"),
    "get_entry": lambda c: c.get_entry("k"),
    "get_entry missing": lambda c: c.get_entry("missing"),
    "open": lambda c: c.open("large"),
    "open missing": lambda c: c.open("missing"),
    "open of no bytes": lambda c: c.open("n"),
    "location": lambda c: c.location("k"),
    "location missing": lambda c: c.location("missing"),
    "location of a part": lambda c: c.location("large", 7, LARGE),
    "view": lambda c: c.view("k"),
    "view large": lambda c: c.view("large"),
    "view missing": lambda c: c.view("missing"),
    "view of no bytes": lambda c: c.view("n"),
    "get with meta": lambda c: c.get("k", with_meta=True),
    "get missing with meta": lambda c: c.get("missing", 5, with_meta=True),
    "set_meta": lambda c: c.set_meta("k", {"a": 1}),
    "set_meta large": lambda c: c.set_meta("large", {"a": 1}),
    "set_meta missing": lambda c: c.set_meta("missing", 1),
    "evict": lambda c: c.evict("t"),
    "delete_prefix": lambda c: c.delete_prefix("k"),
    "expire": lambda c: c.expire(),
    "cull": lambda c: c.cull(),
    "volume": lambda c: c.volume(),
    "flush": lambda c: c.flush(),
    "check": lambda c: c.check(),
    "check fix": lambda c: c.check(fix=True),
    "stats": lambda c: c.stats(),
    "clear": lambda c: c.clear(),
    "get_or_set": lambda c: c.get_or_set("k", lambda: 1),
    "get_or_set missing": lambda c: c.get_or_set("missing", lambda: [1], expire=60, stale=60, tag="t", meta="m"),
    "get_or_set failing": lambda c: c.get_or_set("missing", lambda: 1 / 0),
    "get_or_set wrong": lambda c: c.get_or_set("missing", lambda: 1, stale=1),
    "lock": lambda c: c.lock("k").acquire(),
    "semaphore": lambda c: c.semaphore("k", 2, wait=0).acquire(),
    "semaphore wrong": lambda c: c.semaphore("k", 0).acquire(),
    "throttle": lambda c: c.throttle(5, 1, name="n")(int)(),
}
NOT_CALLS = {"close", "closed", "directory", "settings", "from_config", "memoize"}  # have tests of their own
CONTENT = {"k": b"value", "n": 5, "large": noise(2 * LARGE), "p": "popped", "d": 1.5, ("t", 1): None}
