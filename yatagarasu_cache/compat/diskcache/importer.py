"""Taking over what diskcache has stored: keys, values, tags, expiry and order.

Nothing is unpickled that could import or call anything, unless that is asked for (`plain_pickle`). What is in
the cache already stays as it is, so an import that was interrupted is taken up by beginning it again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...cache import DiskCache
from ...codec.keys import shown
from ...codec.user_secret import user_secret
from ...concurrency.interruption import ours
from ...errors import CacheIOError, ConfigurationError, SerializationError, ValueTooLarge
from ...guard import released
from ...store.item import Item
from . import settings as kept
from .constants import DEFAULT_SETTINGS, EVICTION_OF_STORE, MODE_BINARY, MODE_PICKLE, MODE_RAW, MODE_TEXT
from .core import limits_of
from .disks import Disk, JSONDisk
from .entries import Entries, Name, expiry
from .gate import Busy, Gate, forget_changes
from .plain_pickle import NotPlain
from .plain_pickle import loads as plain_loads
from .queues import Queue, queue_of
from .settings import settings_for
from .source import Damaged, Source, Stored, opened_sources
from .tags import stored_tag

__all__ = ["ImportReport", "import_diskcache"]

_LONGEST_JSON = 1 << 28  # bytes, unpacked
_STREAM_FROM = 1 << 20  # bytes of a file from which it is copied in pieces
_BATCH, _BATCH_BYTES = 1000, 1 << 22  # entries stored at once
_EXAMPLES = 5  # keys named for each reason
_SHOWN, _PIECES, _DEEPEST_SHOWN = 200, 400, 10  # characters of each, parts, and levels of these
_BRACKETS: dict[type, tuple[str, str]] = {
    tuple: ("(", ")"), list: ("[", "]"), dict: ("{", "}"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
}  # fmt: skip
_TOO_LARGE = "it is too large for the cache"
_MODE = 0o600
_GATE_SECONDS = 60.0
_LARGEST = 1 << 62  # bytes: what is unlimited is more
_DIGITS = 15  # of the number in a queue's key


@dataclass
class ImportReport:
    """What became of the entries of a directory."""

    total: int = 0
    imported: int = 0
    bytes: int = 0
    present: int = 0
    """In the cache already, and left as they are there."""
    expired: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """How many, by the reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Some of their keys, by the reason."""
    evicted: int = 0
    """That the cache gave up meanwhile: it is smaller than what was there."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Shards that are missing, or cannot be read (to the end), and why."""
    others: list[str] = field(default_factory=list)
    """Directories of other caches that were found within, to be imported by themselves."""
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all is in the cache that was there, and had not expired."""
        return not (self.left_out or self.evicted or self.damaged)

    def leave_out(self, reason: str, key: Any) -> None:
        self.left_out[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(_shown(key))


class _LeftOut(Exception):
    """Why an entry is not imported."""


def import_diskcache(
    source: str | os.PathLike[str], cache: str | os.PathLike[str], *, allow_pickle: bool = False,
    json_disk: bool = False, overwrite: bool = False, progress: Callable[[int, int], object] | None = None,
    secret: bytes | None = None, **settings: Any,
) -> ImportReport:  # fmt: skip
    """Import what diskcache has stored in `source`, a directory of its `Cache` or `FanoutCache`, into the
    cache in the directory `cache`, which is made if there is none.

    allow_pickle: unpickle what is more than plain values as well. That runs code of whoever could write to
        `source`. What the codec then does not keep is pickled again, signed with the user's key, or `secret`.
    json_disk: the directory was written by a `JSONDisk`; a `Cache` with that class finds the entries again.
    overwrite: replace what the cache has of the same keys; without it they are left as they are.
    progress: called now and then with how many entries were looked at, and how many there are.
    settings: of the cache, as for `DiskCache`. A new one has the size and the policy of `source`.

    Raises `FormatError` if `source` is no directory of diskcache's, `CacheIOError` if it can't be read,
    `ConfigurationError` if one of the directories is within the other.
    """
    began = time.monotonic()
    sources, damaged = opened_sources(Path(source))
    report = ImportReport(others=_others(Path(source)), damaged=damaged)
    try:
        _check_apart(Path(source), Path(cache))
        is_new = not os.path.isdir(cache) or not os.listdir(cache)
        taken = _settings_of(sources) if is_new else {}
        with DiskCache(cache, **{**(limits_of(taken) if taken else {}), **settings}) as target:
            _keep_settings(target.directory, taken, settings)
            disk = (JSONDisk if json_disk else Disk)(target.directory)
            entries = Entries(target, disk, user_secret if secret is None else lambda: secret)
            work = _Import(entries, report, allow_pickle, json_disk, overwrite, progress)
            work.take_over_all(sources)
            report.evicted = target.stats().process["evictions"]
    finally:
        for one in sources:
            one.close()
    report.seconds = time.monotonic() - began
    return report


def _check_apart(source: Path, cache: Path) -> None:
    """diskcache removes from its directory what is not its own; and a cache is no place for other files."""
    for inner, outer in ((cache, source), (source, cache)):
        whole = inner.resolve()
        if any(_is_same(place, outer) for place in (whole, *whole.parents)):
            what = "the cache" if inner is cache else "the directory of diskcache"
            raise ConfigurationError(
                f"{what}, {os.fspath(inner)!r}, would be within the other one, {os.fspath(outer)!r}: "
                "import into a directory beside it"
            )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except ours(OSError):  # what does not exist yet
        return False


def _others(root: Path) -> list[str]:
    """What a `FanoutCache` holds by name."""
    found = []
    for kind in ("cache", "deque", "index"):
        for directory, names, files in os.walk(root / kind):
            if "cache.db" in files or "000" in names:
                found.append(directory)
                names.clear()
    return sorted(found)


def _settings_of(sources: list[Source]) -> dict[str, Any]:
    """Those of a new cache: what the source has, as far as this module has it, its size as a whole.

    Each shard has its part of the size, which need not be a whole number.
    """
    found = [kept.sound(one.settings()) for one in sources]
    taken = {name: found[0].get(name, value) for name, value in DEFAULT_SETTINGS.items()}
    if taken["eviction_policy"] not in EVICTION_OF_STORE:  # one of somebody's own, in SQL
        taken["eviction_policy"] = DEFAULT_SETTINGS["eviction_policy"]
    part = DEFAULT_SETTINGS["size_limit"] / len(sources)
    parts = [min(one.get("size_limit", part), _LARGEST) for one in found]
    return {**taken, "statistics": 0, "size_limit": round(sum(parts))}


def _keep_settings(directory: str, taken: dict[str, Any], given: dict[str, Any]) -> None:
    """Those with which this module opens the cache from now on: what was given for the import counts more
    than what the source had."""
    named = settings_for(given)
    if taken or named:
        found = {**DEFAULT_SETTINGS, **kept.load(directory), **taken, **named}
        if "size_limit" in named:  # which holds only where something is culled
            found["cull_limit"] = found["cull_limit"] or DEFAULT_SETTINGS["cull_limit"]
        kept.save(directory, found, _MODE)


class _Import:
    """The import of some databases into one cache."""

    def __init__(
        self, entries: Entries, report: ImportReport, allow_pickle: bool, json_disk: bool, overwrite: bool,
        progress: Callable[[int, int], object] | None,
    ) -> None:  # fmt: skip
        self._entries, self._report = entries, report
        self._store = entries.store
        self._gate = Gate(entries.cache.directory, _MODE)
        self._allow_pickle, self._json_disk, self._overwrite = allow_pickle, json_disk, overwrite
        self._progress, self._seen = progress, 0
        self._batch: list[Item] = []
        self._batch_bytes = 0
        self._numbers: dict[str | None, tuple[int, int]] = {}  # by the queue: of its first and last key

    _was_left = staticmethod(forget_changes)

    @released
    def take_over_all(self, sources: list[Source]) -> None:
        for one in sources:
            self._report.total += self._unless_damaged(one, one.count, len(sources)) or 0
        for one in sources:
            if os.fspath(one.directory) not in self._report.damaged:
                self._unless_damaged(one, lambda one=one: self.take_over(one), len(sources))  # type: ignore[misc]

    def _unless_damaged(self, source: Source, function: Callable[[], Any], count: int) -> Any:
        """Of some shards, one that is damaged does not stop the others."""
        try:
            return function()
        except Damaged as error:
            if count == 1 and not self._report.damaged:
                raise
            self._report.damaged[os.fspath(source.directory)] = str(error.args[-1])
            self._flush()

    def take_over(self, source: Source) -> None:
        now = time.time()
        for row in source.rows():
            self._seen += 1
            if self._progress is not None and self._seen % _BATCH == 0:
                self._progress(self._seen, self._report.total)
            try:
                if row.expire_time is not None and _number(row.expire_time) <= now:
                    self._report.expired += 1
                else:
                    self._take(source, row)
            except _LeftOut as why:
                self._report.leave_out(str(why), self._readable_key(row))
        self._flush()
        if self._progress is not None:
            self._progress(self._seen, self._report.total)

    def _take(self, source: Source, row: Stored) -> None:
        name = self._name_of(row)
        self._note_number(name.key)
        if not self._overwrite and self._is_there(name):
            self._report.present += 1
            return
        expires = 0 if row.expire_time is None else expiry(_number(row.expire_time))
        tag = self._tag_of(row)
        has_file = row.filename is not None and row.mode == MODE_BINARY
        if has_file and self._stream(source, row, name, expires, tag):
            return
        if has_file and self._json_disk:
            self._put_file(name, self._data_of(source, row), expires, tag)
            return
        value = self._value_of(source, row)
        mode = MODE_BINARY if row.mode == MODE_BINARY else MODE_RAW
        try:
            item = self._entries.item(name, value, expires, tag, mode)
        except (SerializationError, ValueTooLarge) as error:
            raise _LeftOut(_short(error)) from error
        except (CacheIOError, ConfigurationError):
            raise  # such as a secret that is no good: the next entry would meet it too
        except Exception as error:  # what pickle raises
            raise _LeftOut(f"its value cannot be stored: {_short(error)}") from error
        self._batch.append(item)
        self._batch_bytes += len(item.payload)
        self._report.imported += 1
        self._report.bytes += len(item.payload)
        if len(self._batch) >= _BATCH or self._batch_bytes >= _BATCH_BYTES:
            self._flush()

    def _is_there(self, name: Name) -> bool:
        return self._entries.holds(name.data)

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        with self._beside_transactions():
            self._keep_hints_right()  # now, as what follows may be interrupted
            self._entries.store.writing.put_many(batch)
            self._keep_hints_right()  # and once more, as others may have noted them anew
        self._numbers.clear()

    @contextlib.contextmanager
    def _beside_transactions(self) -> Iterator[None]:
        """Not in the middle of somebody's, nor of a queue's changes."""
        while True:
            try:
                share = self._gate.enter(_GATE_SECONDS)
                break
            except Busy:
                continue
        try:
            yield
        finally:
            self._gate.leave(share)

    # -- queues -------------------------------------------------------------------------------

    def _note_number(self, key: Any) -> None:
        """Of a queue's key: also of one that is there already, which an import that was interrupted may have
        stored."""
        prefix = queue_of(key)
        if type(prefix) is bool:
            return
        number = key if prefix is None else int(key[-_DIGITS:])
        first, last = self._numbers.get(prefix, (number, number))
        self._numbers[prefix] = min(first, number), max(last, number)

    def _keep_hints_right(self) -> None:
        """What is noted of queues must not leave out what was stored."""
        for prefix, numbers in self._numbers.items():
            for number in numbers:
                Queue(self._entries, prefix).admit(number)

    # -- what is in a row ---------------------------------------------------------------------

    def _name_of(self, row: Stored) -> Name:
        key = self._key_of(row)
        try:
            if self._json_disk and _is_of_queue(row):
                return self._entries.queue_name(key)
            return self._entries.name(key)
        except Exception as error:  # what the codec and pickle raise
            raise _LeftOut(f"its key cannot be stored: {_short(error)}") from error

    def _key_of(self, row: Stored) -> Any:
        if self._json_disk and not _is_of_queue(row):
            return self._from_json(row.key, "key")
        if row.raw == 1 and type(row.key) in (bytes, str, int, float):
            return row.key
        if type(row.key) is not bytes:
            raise _LeftOut("its key is damaged")
        return self._unpickled(row.key, "key")

    def _readable_key(self, row: Stored) -> Any:
        """The key for the report, or what is stored as such."""
        try:
            return plain_loads(row.key) if row.raw == 0 and not self._json_disk else self._key_of(row)
        except (_LeftOut, NotPlain, TypeError):
            return row.key

    def _tag_of(self, row: Stored) -> bytes:
        if row.tag is None:
            return b""
        try:
            return stored_tag(row.tag)
        except SerializationError as error:
            raise _LeftOut(f"its tag cannot be stored: {_short(error)}") from error

    def _value_of(self, source: Source, row: Stored) -> Any:
        data = row.value if row.filename is None else self._data_of(source, row)
        if self._json_disk:
            return self._from_json(data, "value")
        if row.mode == MODE_PICKLE:
            if type(data) is not bytes:
                raise _LeftOut("its value is damaged")
            return self._unpickled(data, "value")
        if row.mode == MODE_TEXT and type(data) is bytes:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _LeftOut("its value is damaged") from error
        if row.mode == MODE_RAW and data is None and row.filename is None:
            return None  # what SQLite makes of a float that is not a number, and diskcache returns for it
        if row.mode not in (MODE_RAW, MODE_BINARY, MODE_TEXT) or type(data) not in (bytes, str, int, float):
            raise _LeftOut("its value is damaged, or of an unknown kind")
        return data

    def _data_of(self, source: Source, row: Stored) -> bytes:
        """The whole of a value's file."""
        try:
            with source.open(row.filename) as file:
                if _checked_size(row, file) > self._entries.store.limits.encodable_bytes:
                    raise _LeftOut(_TOO_LARGE)
                return file.read()
        except OSError as error:
            raise _unread(error) from error

    def _stream(self, source: Source, row: Stored, name: Name, expires: int, tag: bytes) -> bool:
        """Copy a large file in pieces. False if it is none."""
        if self._json_disk or name.beside:
            return False
        try:
            with source.open(row.filename) as file:
                size = _checked_size(row, file)
                if size < _STREAM_FROM:
                    return False
                self._put_file(name, file, expires, tag)
        except CacheIOError:
            raise  # the cache's own trouble: the next entry would meet it too
        except OSError as error:
            raise _unread(error) from error
        return True

    def _put_file(self, name: Name, data: bytes | BinaryIO, expires: int, tag: bytes) -> None:
        """Store what diskcache was given as a file, or what looks the same: it is read as one, and by
        `JSONDisk` as JSON otherwise."""
        self._flush()  # what comes first is to stay so
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        size = len(data) if isinstance(data, bytes) else os.fstat(file.fileno()).st_size
        self._note_number(name.key)
        with self._beside_transactions():
            try:
                self._entries.put(name, file, expires, tag, True)
            except ValueTooLarge as error:
                raise _LeftOut(_TOO_LARGE) from error
            self._keep_hints_right()
        self._report.imported += 1
        self._report.bytes += size

    def _unpickled(self, data: bytes, what: str) -> Any:
        try:
            return plain_loads(data)
        except NotPlain as error:
            if not self._allow_pickle:
                why = f"its {what} is a pickle of more than plain values (see allow_pickle)"
                raise _LeftOut(why) from error
        try:
            return pickle.loads(data)
        except Exception as error:
            raise _LeftOut(f"its {what} cannot be unpickled: {_short(error)}") from error

    def _from_json(self, data: Any, what: str) -> Any:
        try:
            unpacked, most = zlib.decompressobj(), self._entries.store.limits.encodable_bytes
            text = unpacked.decompress(data, min(most, _LONGEST_JSON))
            if not unpacked.eof:  # cut off, or made to fill the memory
                raise _LeftOut(f"its {what} is cut off, or too large")
            return json.loads(text.decode("utf-8"))
        except (zlib.error, ValueError, TypeError, RecursionError) as error:
            raise _LeftOut(f"its {what} was not written by a JSONDisk") from error


def _checked_size(row: Stored, file: BinaryIO) -> int:
    """The length of a value's file: the one that diskcache has noted, or it was cut off."""
    size = os.fstat(file.fileno()).st_size
    if size != row.size:
        raise _LeftOut("its file has not the length that the database says: it was cut off, or changed")
    return size


def _is_of_queue(row: Stored) -> bool:
    """Whether `push` has stored it: its keys are stored as they are, whatever class the disk is of."""
    return row.raw == 1 and type(row.key) is not bytes and queue_of(row.key) is not False


def _unread(error: OSError) -> _LeftOut:
    """A value's file that is missing, or cannot be read, is no trouble of the others."""
    return _LeftOut(f"its file cannot be read: {error.strerror or error}")


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _LeftOut("its time of expiry is damaged")
    return float(value)


def _shown(key: Any) -> str:
    """A key on a line, cut off at the end where it is long. (A `repr` of things that refer to the same ones
    again and again would take for ever.)"""
    text = "".join(itertools.islice(_pieces(key, 0), _PIECES))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _pieces(key: Any, depth: int) -> Iterator[str]:
    kind = type(key)
    if kind not in _BRACKETS:
        is_long = kind in (str, bytes) and len(key) > _SHOWN
        yield repr(key[: _SHOWN + 1] if is_long else key) if kind is not int else shown(key)
        return
    opening, closing = _BRACKETS[kind]
    yield opening
    if depth > _DEEPEST_SHOWN:
        yield "..."
    else:
        for at, item in enumerate(key):
            yield ", " if at else ""
            yield from _pieces(item, depth + 1)
            if kind is dict:
                yield ": "
                yield from _pieces(key[item], depth + 1)
    yield ",)" if kind is tuple and len(key) == 1 else closing


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
