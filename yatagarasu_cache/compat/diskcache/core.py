"""`Cache`: a mapping on disk, with the methods that diskcache's has."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from ...cache import DiskCache
from ...codec.user_secret import user_secret
from ...concurrency.locks import releases
from ...errors import LockTimeout, Unreadable, ValueTooLarge
from ...guard import all_released, release, released
from ...log import without_key
from ...store.shared_settings import is_meant
from ...store.store import Store
from . import settings as kept
from .constants import (
    DBNAME,
    DEFAULT_SETTINGS,
    ENOVAL,
    EVICTION_OF_STORE,
    EVICTION_POLICY,
    METADATA,
    MODE_BINARY,
    MODE_NONE,
    MODE_PICKLE,
    MODE_RAW,
    MODE_TEXT,
    UNKNOWN,
    Constant,
    EmptyDirWarning,
    Timeout,
    UnknownFileWarning,
    args_to_key,
    errors_of_sql,
    full_name,
    keys_of,
)
from .disks import Disk, JSONDisk
from .entries import MISSING, Entries, Name, Row, expiry, length_of, now
from .gate import Busy, Gate, Turn, forget_changes
from .order import Order, end_of
from .queues import SHORTEST, Queue, keep_hint_right
from .tags import equal_tags, stored_tag

__all__ = [
    "DBNAME", "DEFAULT_SETTINGS", "ENOVAL", "EVICTION_POLICY", "METADATA", "MODE_BINARY", "MODE_NONE",
    "MODE_PICKLE", "MODE_RAW", "MODE_TEXT", "UNKNOWN", "Cache", "Constant", "Disk", "EmptyDirWarning",
    "JSONDisk", "Timeout", "UnknownFileWarning", "args_to_key", "full_name",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])

_MODE = 0o600
_UNLIMITED = 1 << 62
_CULLED_EVERY, _SOME_BYTES = 1 << 20, 1 << 8  # bytes that were stored, and that any value counts as
_SWEEPS_EVERY, _SWEEPS_SHARE = 1.0, 50.0  # seconds between two, and times what one takes


@all_released
class Cache:
    """Keys and values on disk, for all threads and processes that use the directory.

    directory: None makes a new one among the temporary files. timeout: seconds to wait for a transaction of
    somebody else's, then `Timeout` is raised. disk: a class derived from `Disk` that has a say in how keys
    and values are stored. settings: those of `DEFAULT_SETTINGS`, and ``disk_...`` for the disk; they are
    kept with the cache, and hold for all who open it later. (What begins with ``sqlite_`` has no effect.)

    A method with ``retry=True`` waits on instead of raising `Timeout`.
    """

    eviction_policy: str
    size_limit: int
    cull_limit: int
    statistics: int
    tag_index: int
    count: int  # this one and those below: as they were when the cache was opened, or `reset` asked for them
    size: int
    hits: int
    misses: int

    def __init__(
        self, directory: str | bytes | os.PathLike[str] | None = None, timeout: float = 60,
        disk: type[Disk] = Disk, **settings: Any,
    ) -> None:  # fmt: skip
        if not (isinstance(disk, type) and issubclass(disk, Disk)):
            raise ValueError("disk must subclass diskcache.Disk")
        if directory is None:
            directory = tempfile.mkdtemp(prefix="diskcache-")
        self._directory = os.path.expandvars(os.path.expanduser(os.fsdecode(directory)))
        self._timeout = timeout
        self._secret: bytes | None = settings.pop("disk_secret", None)
        self._opening = threading.RLock()
        self._entries_: Entries | None = None
        self._gate_: Gate | None = None
        self._order = Order()
        self._last_gate: Callable[[], Gate | None] = lambda: None
        self._sweep_at = 0.0
        self._unculled, self._unlooked = _CULLED_EVERY, 0  # bytes and values that came since the last look
        found = kept.load(self._directory)
        in_force = {**DEFAULT_SETTINGS, **found, **settings}
        of_disk = {name[5:]: value for name, value in in_force.items() if name.startswith("disk_")}
        self._disk = disk(self._directory, **of_disk)
        self._take_over(in_force)
        self._open(**settings)  # what is wrong is said now
        if {name: value for name, value in in_force.items() if name in settings} != {
            name: found.get(name, ENOVAL) for name in settings
        }:
            self._save(settings)
        if settings.get("statistics") and not found.get("statistics"):
            self.stats(enable=True)
        vars(self).update(self._metadata())

    def _take_over(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            mine = getattr(type(self), name, None)  # which a file in the directory must not replace
            if name not in METADATA and not callable(mine) and not isinstance(mine, property):
                setattr(self, name, value)

    # -- settings -----------------------------------------------------------------------------

    def _save(self, changed: dict[str, Any]) -> None:
        with self._alone(retry=True):
            found = {**DEFAULT_SETTINGS, **kept.load(self._directory), **changed}
            kept.save(self._directory, found, _MODE)

    @property
    def _limits(self) -> dict[str, Any]:
        return limits_of(vars(self))

    def reset(self, key: str, value: Any = ENOVAL, update: bool = True) -> Any:
        """Set a setting for all who open the cache; without a value, look what it is by now. Returns it.

        update: False sets it for this object alone. ValueError if nothing of that name was ever set.
        """
        given = value is not ENOVAL
        if key == "statistics" and value is not ENOVAL:
            self.stats(enable=bool(value))
            return value
        if key in METADATA:
            setattr(self, key, self._metadata()[key])
            return getattr(self, key)
        found = {**DEFAULT_SETTINGS, **kept.load(self._directory)}
        if value is ENOVAL:
            if key not in found:
                raise ValueError(f"there is no setting {key!r}: they are {', '.join(sorted(found))}")
            value = found[key]
        elif not isinstance(value, (str, int, float, bool, type(None))):
            raise TypeError(f"setting {key!r} must be a str, a number or None, not {value!r}")
        before = getattr(self, key, None)
        setattr(self, key, value)
        if key == "eviction_policy":
            try:
                self._limits  # noqa: B018
            except ValueError:
                setattr(self, key, before)
                raise
        if update and given and key in found:  # what is no setting is an attribute of this object, no more
            self._save({key: value})
        if key.startswith("disk_"):
            setattr(self._disk, key[5:], value)
        if key in ("size_limit", "eviction_policy", "cull_limit"):
            self._unculled = _CULLED_EVERY
            _store_with(self._directory, self._limits).close()
        return value

    def _metadata(self) -> dict[str, int]:
        hits, misses = self._uses()
        return {"count": len(self), "size": self.volume(), "hits": hits, "misses": misses}

    @property
    def directory(self) -> str:
        """Where the cache is."""
        return self._directory

    @property
    def timeout(self) -> float:
        """Seconds."""
        return self._timeout

    @property
    def disk(self) -> Disk:
        """What becomes of keys and values."""
        return self._disk

    @property
    def _con(self) -> Any:
        return errors_of_sql()

    @property
    def _sql(self) -> Any:
        return errors_of_sql()

    _sql_retry = _sql

    # -- life ---------------------------------------------------------------------------------

    @property
    def _entries(self) -> Entries:
        return self._entries_ or self._open()

    def _open(self, **named: Any) -> Entries:
        """Open the store, with the settings that are kept, unless there are others that were `named`."""
        with self._opening:
            if self._entries_ is None:
                in_force = {**vars(self), **kept.load(self._directory), **named}
                cache = _store_with(self._directory, limits_of(in_force))
                self._gate_ = self._gate_in_use() or Gate(cache.directory, _MODE)
                self._last_gate = weakref.ref(self._gate_)
                self._entries_ = Entries(cache, self._disk, self._find_secret)
            return self._entries_

    def _gate_in_use(self) -> Gate | None:
        """The one of before the cache was closed, if somebody is still in a transaction of it."""
        gate = self._last_gate()
        return gate if gate is not None and gate.is_in_place else None

    def _find_secret(self) -> bytes:
        return user_secret() if self._secret is None else self._secret

    @property
    def _store(self) -> Store | None:
        """If it is open."""
        entries = self._entries_
        return None if entries is None else entries.store

    _was_left = staticmethod(forget_changes)

    @property
    def _gate(self) -> Gate:
        while True:
            self._entries  # noqa: B018
            if (gate := self._gate_) is not None:  # else it was closed meanwhile
                return gate

    def close(self) -> None:
        """Give files and memory back. Whatever is called afterwards opens the cache again; what other threads
        are at is finished first, and keeps what it needs so long."""
        with self._opening:
            entries, self._entries_, self._gate_ = self._entries_, None, None
            self._order = Order()
            if entries is not None:  # is referred to by whoever uses it
                weakref.finalize(entries, entries.cache.close).atexit = False

    def __enter__(self) -> Cache:
        self._entries  # noqa: B018
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[Any, ...]:
        return self._directory, self._timeout, type(self._disk)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    # -- transactions -------------------------------------------------------------------------

    @contextlib.contextmanager
    def transact(self, retry: bool = False) -> Iterator[None]:
        """Nobody else who uses this module changes the cache in this block; readers go on. Transactions may
        be nested.

        What was done stays done, also if the block raises: nothing is rolled back.
        """
        with self._alone(retry):
            yield

    @contextlib.contextmanager
    def _alone(self, retry: bool) -> Iterator[None]:
        turn = self._gate.turn()
        try:
            self._begin(turn, retry)
            yield
        finally:
            try:
                turn.end()
            except BaseException:  # an interruption, perhaps before it has begun to end
                turn.end()
                raise

    def _begin(self, turn: Turn, retry: bool) -> None:
        while True:
            try:
                return turn.begin(self._timeout)
            except Busy as error:
                if not retry:
                    raise Timeout(0) from error

    def _change(self, retry: bool, function: Callable[..., Any], *args: Any) -> Any:
        """A change: not in the middle of somebody's transaction."""
        gate, store = self._gate_ or self._gate, self._entries.store
        while True:
            try:
                store.entering()
                share = gate.enter(self._timeout)
                try:
                    return function(*args)
                finally:
                    gate.leave(share)
            except (Busy, LockTimeout) as error:
                if not retry:
                    raise Timeout(0) from error

    # -- one entry ----------------------------------------------------------------------------

    def _put(
        self, key: Any, value: Any, expire: float | None, read: bool, tag: Any, expected: Any = None
    ) -> bool:
        entries = self._entries
        name = entries.name(key)
        expires = 0 if expire is None else expiry(time.time() + expire)
        tag_bytes = b"" if tag is None else stored_tag(tag)
        try:
            is_new = entries.put(name, value, expires, tag_bytes, read, expected)
        except ValueTooLarge as error:
            self._cull_at_once(entries, name, value, error)
            return True
        keep_hint_right(entries, key)
        self._note_stored(entries, value)
        return is_new

    def _note_stored(self, entries: Entries, value: Any) -> None:
        """Whether something is too much is looked at each time when so much came that it may be."""
        kind = type(value)
        self._unculled += len(value) if kind is bytes or kind is str else _SOME_BYTES
        self._unlooked += 1
        if self._unculled >= _CULLED_EVERY or self._unculled >= self.size_limit / 256:
            count, self._unculled, self._unlooked = self._unlooked, 0, 0
            if self.cull_limit:
                self._cull_some(entries, count)

    def _cull_at_once(self, entries: Entries, name: Name, value: Any, error: ValueTooLarge) -> None:
        """A value that is larger than the whole cache: as if it had been stored, and evicted as the first.
        Where nothing is evicted, and of a stream that merely has no length, it is said instead."""
        is_endless = hasattr(value, "read") and length_of(value) is None
        if self.eviction_policy == "none" or not self.cull_limit or is_endless:
            raise error
        entries.drop(name)
        entries.store.notices.log_once("culled at once", f"a value was not kept: {error}")

    @releases
    def set(
        self, key: Any, value: Any, expire: float | None = None, read: bool = False, tag: Any = None,
        retry: bool = False,
    ) -> bool:  # fmt: skip
        """Store a value. True.

        expire: seconds until it expires, None: never. read: the value is a binary file, to be read. tag: what
        `evict` removes it by.
        """
        try:
            if read or not self._set_at_once(key, value, expire, tag):
                self._change(retry, self._put, key, value, expire, read, tag)
            return True
        except BaseException as error:
            release(error, self)
            raise

    def _set_at_once(self, key: Any, value: Any, expire: float | None, tag: Any) -> bool:
        """A `set` of what most store, when nobody is in the way: what `_change` and `_put` do, in half as
        many calls. False if it is for them to do."""
        entries, gate = self._entries_, self._gate_
        if entries is None or gate is None or not entries.is_plain:
            return False
        if (share := gate.enter_at_once()) is None:
            return False
        try:
            is_simple = type(value) is bytes and expire is None and (tag is None or type(tag) is str)
            if not is_simple or not entries.set_bytes(key, value, tag):
                entries.entering()
                name = entries.name(key)
                if name.beside:
                    return False
                expires = 0 if expire is None else expiry(time.time() + expire)
                entries.put_plain(name, value, expires, b"" if tag is None else stored_tag(tag))
            if type(key) is not str or len(key) >= SHORTEST:
                keep_hint_right(entries, key)
            self._note_stored(entries, value)
            return True
        except (LockTimeout, ValueTooLarge):
            return False
        finally:
            gate.leave(share)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value, retry=True)

    def add(
        self, key: Any, value: Any, expire: float | None = None, read: bool = False, tag: Any = None,
        retry: bool = False,
    ) -> bool:  # fmt: skip
        """The same, if there is none. Atomic. Whether it was stored."""
        if key in self:
            return False
        expected = self._entries.absent(self._entries.name(key))
        return bool(self._change(retry, self._put, key, value, expire, read, tag, expected))

    def touch(self, key: Any, expire: float | None = None, retry: bool = False) -> bool:
        """Set when an entry expires. False if there is none."""
        entries = self._entries
        name = entries.name(key)
        if key not in self:
            return False
        expires = expiry(None if expire is None else time.time() + expire)
        return bool(self._change(retry, entries.store.removal.touch, *entries.identify(name.data), expires))

    def incr(self, key: Any, delta: int = 1, default: int | None = 0, retry: bool = False) -> int:
        """Add to a number, and return the sum. Atomic. An entry that is missing counts as `default`; None
        raises `KeyError`."""
        entries = self._entries

        def change() -> Any:
            try:
                total = entries.incr(entries.name(key), delta, default)
            except KeyError:
                raise KeyError(key) from None
            keep_hint_right(entries, key)
            return total

        return self._change(retry, change)  # type: ignore[no-any-return]

    def decr(self, key: Any, delta: int = 1, default: int | None = 0, retry: bool = False) -> int:
        """`incr` by ``-delta``."""
        return self.incr(key, -delta, default, retry=retry)

    @releases
    def get(
        self, key: Any, default: Any = None, read: bool = False, expire_time: bool = False, tag: bool = False,
        retry: bool = False,
    ) -> Any:  # fmt: skip
        """The value of a key, or `default`.

        read: as a binary file, if it was stored as one. expire_time, tag: return these as well, in a tuple.
        """
        try:
            entries = self._entries_
            if (
                type(key) is not str or entries is None or not entries.is_plain
                or read or expire_time or tag
            ):  # fmt: skip
                return self._get(key, default, read, expire_time, tag)
            found = entries.find(key)
            if type(found) is bytes:
                return found
            if found is None:
                return default
            if found is NotImplemented:
                return self._get(key, default, read, expire_time, tag)
            return self._decoded(entries, entries.name(key), found, default)
        except BaseException as error:
            release(error, self)
            raise

    def _decoded(self, entries: Entries, name: Name, found: Any, default: Any) -> Any:
        try:
            value = entries.value(name, *found)
            return default if value is MISSING else value
        except Unreadable as error:
            self._note(entries, error)
            return default

    def _get(self, key: Any, default: Any, read: bool, expire_time: bool, tag: bool) -> Any:
        entries = self._entries
        name = entries.name(key)
        if entries.is_plain and not (name.beside or read or expire_time or tag):
            found = entries.get(name)
            if found is None or type(found) is bytes:
                return default if found is None else found
            return self._decoded(entries, name, found, default)
        row = entries.row(name)
        value, is_counted = default, False
        if row is not None:
            is_counted = read and row.is_file  # when it is opened
            try:
                value = entries.value_of(row, read)
            except Unreadable as error:
                self._note(entries, error)
                row = None
        if not is_counted:
            entries.store.counters.use(row is not None)
        return _with(value, row, expire_time, tag)

    def _note(self, entries: Entries, error: Exception) -> None:
        """A value that cannot be read is a miss, and stays."""
        entries.store.counters.note_unreadable()
        entries.store.notices.log_once("unreadable", f"taken for a miss: {without_key(error)}")

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, ENOVAL, retry=True)
        if value is ENOVAL:
            raise KeyError(key)
        return value

    def read(self, key: Any, retry: bool = False) -> Any:
        """The value of a key as a binary file. KeyError if there is none."""
        file = self.get(key, ENOVAL, read=True, retry=retry)
        if file is ENOVAL:
            raise KeyError(key)
        return file

    def __contains__(self, key: Any) -> bool:
        entries = self._entries
        data = entries.name(key).data
        slot = entries.store.finding.entry(*entries.identify(data))
        return slot is not None and not 0 < slot.expires <= now()

    def pop(
        self, key: Any, default: Any = None, expire_time: bool = False, tag: bool = False,
        retry: bool = False,
    ) -> Any:  # fmt: skip
        """Remove a key and return its value, or `default`. Atomic: only one caller gets it."""
        entries = self._entries
        row = self._change(retry, entries.take, entries.name(key))
        value = default
        if row is not None:
            try:
                value = entries.value_of(row)
            except Unreadable as error:
                self._note(entries, error)
                row = None
        return _with(value, row, expire_time, tag)

    def __delitem__(self, key: Any, retry: bool = True) -> bool:
        if not self.delete(key, retry=retry):
            raise KeyError(key)
        return True

    def delete(self, key: Any, retry: bool = False) -> bool:
        """Remove a key. False if there was none."""
        entries = self._entries
        if key not in self:
            return False
        return bool(self._change(retry, entries.cache._desk.delete, entries.name(key).data))

    # -- queues -------------------------------------------------------------------------------

    def push(
        self, value: Any, prefix: str | None = None, side: str = "back", expire: float | None = None,
        read: bool = False, tag: Any = None, retry: bool = False,
    ) -> Any:  # fmt: skip
        """Put a value at one end of the queue of `prefix`, and return its key: a whole number, or
        ``prefix-number``. Atomic."""
        _check_side(side)
        with self._alone(retry):
            entries = self._entries
            queue = Queue(entries, prefix)
            number = queue.next_number(side)
            key = queue.key(number)
            self._put_of_queue(entries, key, value, expire, read, tag)
            queue.note(number)
        return key

    def _put_of_queue(
        self, entries: Entries, key: Any, value: Any, expire: float | None, read: bool, tag: Any
    ) -> None:
        expires = expiry(None if expire is None else time.time() + expire)
        tag_bytes = b"" if tag is None else stored_tag(tag)
        name = entries.queue_name(key)
        try:
            entries.put(name, value, expires, tag_bytes, read)
        except ValueTooLarge as error:
            self._cull_at_once(entries, name, value, error)
        self._note_stored(entries, value)

    def pull(
        self, prefix: str | None = None, default: Any = (None, None), side: str = "front",
        expire_time: bool = False, tag: bool = False, retry: bool = False,
    ) -> Any:  # fmt: skip
        """Remove the entry at one end of a queue, and return its (key, value), or `default`. Atomic."""
        return self._end_of(prefix, default, side, expire_time, tag, retry, removes=True)

    def peek(
        self, prefix: str | None = None, default: Any = (None, None), side: str = "front",
        expire_time: bool = False, tag: bool = False, retry: bool = False,
    ) -> Any:  # fmt: skip
        """The same, but for removing it."""
        return self._end_of(prefix, default, side, expire_time, tag, retry, removes=False)

    def _end_of(
        self, prefix: str | None, default: Any, side: str, expire_time: bool, tag: bool, retry: bool,
        *, removes: bool,
    ) -> Any:  # fmt: skip
        _check_side(side)
        with self._alone(retry):
            entries = self._entries
            queue = Queue(entries, prefix)
            while (number := queue.number_at(side)) is not None:
                key = queue.key(number)
                name = entries.queue_name(key)
                row = entries.take(name) if removes else entries.row(name)
                if row is None:  # it has expired
                    entries.drop(name)
                    continue
                try:
                    return _with((key, entries.value_of(row)), row, expire_time, tag)
                except Unreadable as error:
                    self._note(entries, error)
                    entries.drop(name)
        return _with(default, None, expire_time, tag)

    def peekitem(
        self, last: bool = True, expire_time: bool = False, tag: bool = False, retry: bool = False
    ) -> Any:
        """The (key, value) that was inserted last, or first. KeyError if the cache is empty."""
        entries = self._entries
        for row in self._from_end(last):
            if row.is_over:
                self._change(retry, entries.remove, row)
                continue
            try:
                key, value = entries.key_of(row), entries.value_of(row)
            except Unreadable:  # it went, or is somebody else's
                continue
            return _with((key, value), row, expire_time, tag)
        raise KeyError("dictionary is empty")

    def _from_end(self, last: bool) -> Iterator[Row]:
        entries = self._entries
        return self._order.backward(entries) if last else self._order.forward(entries)

    def _first_number(self) -> int | None:
        """The first of the whole numbers that are keys, if all keys are such, one after the other."""
        span = Queue(self._entries, None).span()
        return span.first if span.end - span.first == len(self) else None

    # -- functions ----------------------------------------------------------------------------

    def memoize(
        self, name: str | None = None, typed: bool = False, expire: float | None = None, tag: Any = None,
        ignore: Iterable[int | str] = (),
    ) -> Callable[[F], F]:  # fmt: skip
        """Decorate a function: its results are kept, by its arguments.

        name: of the function, in the place of its own. typed: tell arguments of different types apart.
        ignore: positions and names of arguments that don't count. The key of a call is
        ``f.__cache_key__(...)``.
        """
        if callable(name):
            raise TypeError("name cannot be callable")
        ignored = frozenset(ignore)  # once: it may be an iterator

        def decorate(func: F) -> F:
            cache_key = keys_of(func, name, typed, ignored)

            @functools.wraps(func)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                key = cache_key(*args, **kwargs)
                result = self.get(key, default=ENOVAL, retry=True)
                if result is ENOVAL:
                    result = func(*args, **kwargs)
                    if expire is None or expire > 0:
                        self.set(key, result, expire, tag=tag, retry=True)
                return result

            wrapper.__cache_key__ = cache_key  # type: ignore[attr-defined]
            return cast("F", wrapper)

        return decorate

    # -- all of it ----------------------------------------------------------------------------

    def check(self, fix: bool = False, retry: bool = False) -> list[warnings.WarningMessage]:
        """Verify every byte. What is wrong, as warnings; `fix` mends it."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            entries = self._entries
            for problem in entries.cache.check(fix):
                warnings.warn(str(problem), stacklevel=2)
        return found or []

    def create_tag_index(self) -> None:
        """Tags are always indexed."""
        self.reset("tag_index", 1)

    def drop_tag_index(self) -> None:
        """Tags are always indexed."""
        self.reset("tag_index", 0)

    def evict(self, tag: Any, retry: bool = False) -> int:
        """Remove all entries with a tag. How many."""
        entries = self._entries
        wanted = equal_tags(tag)

        def change() -> int:
            slots = [slot for one in wanted for slot, names in entries.store.tags.entries(one)]
            return sum(entries.remove_slot(slot) for slot in slots)

        return self._change(retry, change)  # type: ignore[no-any-return]

    def expire(self, now: float | None = None, retry: bool = False) -> int:
        """Remove what has expired, by `now` (seconds since the epoch). How many."""
        entries, until = self._entries, expiry(time.time() if now is None else now)

        def change() -> int:
            return sum(map(entries.remove_slot, entries.expired(until)))

        return self._change(retry, change)  # type: ignore[no-any-return]

    def cull(self, retry: bool = False) -> int:
        """Remove what has expired, and then what the policy says until the rest fits `size_limit`. How
        many."""
        entries = self._entries
        count = self.expire(retry=retry)
        if self.eviction_policy == "none":
            return count
        return count + self._change(retry, self._cull, entries)  # type: ignore[no-any-return]

    def _cull(self, entries: Entries) -> int:
        before = entries.count()
        while (surplus := entries.live_bytes - self.size_limit) > 0:
            if not entries.store.evictor.evict(lambda surplus=surplus: surplus):  # type: ignore[misc]
                break
        return before - entries.count()

    def _cull_some(self, entries: Entries, count: int) -> None:
        """After so many were stored: for each at most `cull_limit` of what is too much, and so many of what
        has expired. The latter is looked for now and then, since that takes a look at everything."""
        if time.monotonic() >= self._sweep_at:
            began = time.monotonic()
            for slot in itertools.islice(entries.expired(now()), self.cull_limit):
                entries.remove_slot(slot)
            self._sweep_at = began + max(_SWEEPS_EVERY, _SWEEPS_SHARE * (time.monotonic() - began))
        if self.eviction_policy != "none":
            for _ in range(count * self.cull_limit):
                if entries.live_bytes <= self.size_limit or not entries.store.evictor.evict(lambda: 1):
                    break

    def clear(self, retry: bool = False) -> int:
        """Remove everything. How many entries."""
        entries = self._entries

        def change() -> int:
            count = entries.count()
            entries.cache.clear()
            return count

        return self._change(retry, change)  # type: ignore[no-any-return]

    def iterkeys(self, reverse: bool = False) -> Iterator[Any]:
        """Keys in their order: numbers, then text, then bytes and all else."""
        entries = self._entries
        keys = [key for key, _ in entries.readable_keys(entries.rows())]
        yield from sorted(keys, key=entries.sort_key, reverse=reverse)

    def __iter__(self) -> Iterator[Any]:
        """Keys in the order of insertion, also of what has expired and was not removed yet, but none that is
        stored after this call."""
        entries = self._entries
        return self._keys_of(entries, self._order.forward(entries, end_of(entries)))

    def __reversed__(self) -> Iterator[Any]:
        entries = self._entries
        return self._keys_of(entries, self._order.backward(entries))

    @released
    def _keys_of(self, entries: Entries, rows: Iterator[Row]) -> Iterator[Any]:
        for key, _ in entries.readable_keys(rows):
            yield key

    def __len__(self) -> int:
        return self._entries.count()

    def stats(self, enable: bool = True, reset: bool = False) -> tuple[int, int]:
        """(hits, misses) since counting began. `enable`: whether to count from now on; `reset`: begin at
        0."""
        hits, misses = self._uses()
        totals = self._totals()
        kept_hits, kept_misses = (0, 0) if reset else (hits, misses)
        changed = {"statistics": int(bool(enable)), "hits": kept_hits, "misses": kept_misses,
                   "hits_before": totals[0], "misses_before": totals[1]}  # fmt: skip
        self._save(changed)
        self.statistics = changed["statistics"]
        return hits, misses

    def _totals(self) -> tuple[int, int]:
        entries = self._entries
        stats = entries.cache.stats()
        return stats.hits, stats.misses

    def _uses(self) -> tuple[int, int]:
        found = {**METADATA, **kept.load(self._directory)}
        hits, misses = _count(found["hits"]), _count(found["misses"])
        if not found.get("statistics"):
            return hits, misses
        now_hits, now_misses = self._totals()
        hits += max(now_hits - _count(found.get("hits_before")), 0)
        misses += max(now_misses - _count(found.get("misses_before")), 0)
        return hits, misses

    def volume(self) -> int:
        """About how many bytes all of it takes on the disk."""
        return self._entries.live_bytes


def _store_with(directory: str, limits: dict[str, Any]) -> DiskCache:
    """A handle on the store, which has these limits from now on: whoever gives a setting here says so for all
    who use the cache, and needs no warning of it."""
    token = is_meant.set(True)
    try:
        return DiskCache(directory, **limits)
    finally:
        is_meant.reset(token)


def limits_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `DiskCache` that do what those of diskcache say. Of the store's size a part is for
    what has gone and was not cleaned up yet: so that `size_limit` bytes fit, it is larger."""
    name = settings["eviction_policy"]
    policy = EVICTION_OF_STORE.get(name)
    if policy is None:
        raise ValueError(
            f"eviction_policy is {name!r}; it must be one of {', '.join(EVICTION_OF_STORE)}: there is no SQL"
            " here that others could be written in"
        )
    limit = _UNLIMITED
    if policy != "none" and settings["cull_limit"]:
        limit = int(min(settings["size_limit"], _UNLIMITED // 2)) * 5 // 4 + (1 << 24)
    return {"size_limit": limit, "eviction": policy}


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _with(value: Any, row: Row | None, expire_time: bool, tag: bool) -> Any:
    """A value, and what was asked for beside it."""
    if not expire_time and not tag:
        return value
    expires, of = (None, None) if row is None else (row.expires, row.tag)
    if expire_time and tag:
        return value, expires, of
    return (value, expires) if expire_time else (value, of)


def _check_side(side: str) -> None:
    if side not in ("front", "back"):
        raise ValueError(f"side must be 'front' or 'back', not {side!r}")
