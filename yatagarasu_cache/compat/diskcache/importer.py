"""Taking over what diskcache has stored: keys, values, tags, expiry and order.

Nothing is unpickled that could import or call anything, unless that is asked for (`plain_pickle`). What is in
the cache already stays as it is, so an import that was interrupted is taken up by beginning it again.
"""

from __future__ import annotations

import json
import os
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...arguments import encode_tag
from ...cache import DiskCache
from ...errors import CacheIOError, FormatError, SerializationError, ValueTooLarge
from ...store.item import Item
from ...store.strangers import databases
from . import settings as kept
from .constants import DEFAULT_SETTINGS, METADATA, MODE_BINARY, MODE_PICKLE, MODE_RAW, MODE_TEXT
from .core import limits_of
from .disks import Disk, JSONDisk
from .entries import Entries, Name, expiry
from .plain_pickle import NotPlain
from .plain_pickle import loads as plain_loads
from .secret import user_secret
from .source import Source, Stored

__all__ = ["ImportReport", "import_diskcache"]

_LONGEST_JSON = 1 << 28  # bytes, unpacked
_STREAM_FROM = 1 << 20  # bytes of a file from which it is copied in pieces
_BATCH, _BATCH_BYTES = 1000, 1 << 22  # entries stored at once
_EXAMPLES = 5  # keys named for each reason


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
    others: list[str] = field(default_factory=list)
    """Directories of other caches that were found within, to be imported by themselves."""
    seconds: float = 0.0

    def leave_out(self, reason: str, key: Any) -> None:
        self.left_out[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(repr(key)[:100])


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

    Raises `FormatError` if `source` is no directory of diskcache's, `CacheIOError` if it can't be read.
    """
    places = databases(source)
    if not places:
        raise FormatError(f"{os.fspath(source)!r} is no directory of diskcache: it has no cache.db")
    began = time.monotonic()
    report = ImportReport(others=_others(Path(source)))
    sources = [Source(place) for place in places]
    try:
        report.total = sum(one.count() for one in sources)
        is_new = not os.path.isdir(cache) or not os.listdir(cache)
        taken = _settings_of(sources) if is_new else {}
        with DiskCache(cache, **{**(limits_of(taken) if taken else {}), **settings}) as target:
            if taken:
                kept.save(target.directory, taken, 0o600)
            disk = (JSONDisk if json_disk else Disk)(target.directory)
            entries = Entries(target, disk, user_secret if secret is None else lambda: secret)
            work = _Import(entries, report, allow_pickle, json_disk, overwrite, progress)
            for one in sources:
                work.take_over(one)
            report.evicted = target.stats().process["evictions"]
    finally:
        for one in sources:
            one.close()
    report.seconds = time.monotonic() - began
    return report


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
    """Those of a new cache: what the source has, its size as a whole."""
    found = sources[0].settings()
    taken = {name: found.get(name, value) for name, value in DEFAULT_SETTINGS.items() if name not in METADATA}
    taken = {name: value for name, value in taken.items() if type(value) is type(DEFAULT_SETTINGS[name])}
    taken = {**DEFAULT_SETTINGS, **taken, "statistics": 0}
    taken["size_limit"] *= len(sources)
    return taken


class _Import:
    """The import of some databases into one cache."""

    def __init__(
        self, entries: Entries, report: ImportReport, allow_pickle: bool, json_disk: bool, overwrite: bool,
        progress: Callable[[int, int], object] | None,
    ) -> None:  # fmt: skip
        self._entries, self._report = entries, report
        self._allow_pickle, self._json_disk, self._overwrite = allow_pickle, json_disk, overwrite
        self._progress, self._seen = progress, 0
        self._batch: list[Item] = []
        self._batch_bytes = 0

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
                self._report.leave_out(str(why), row.key)
        self._flush()
        if self._progress is not None:
            self._progress(self._seen, self._report.total)

    def _take(self, source: Source, row: Stored) -> None:
        name = self._name_of(row)
        if not self._overwrite and self._is_there(name):
            self._report.present += 1
            return
        expires = 0 if row.expire_time is None else expiry(_number(row.expire_time))
        tag = self._tag_of(row)
        has_file = row.filename is not None and row.mode == MODE_BINARY
        if has_file and self._stream(source, row, name, expires, tag):
            return
        value = self._value_of(source, row)
        mode = MODE_BINARY if row.mode == MODE_BINARY else MODE_RAW
        try:
            item = self._entries.item(name, value, expires, tag, mode)
        except (SerializationError, ValueTooLarge) as error:
            raise _LeftOut(_short(error)) from error
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
        self._entries.store.writing.put_many(batch)

    # -- what is in a row ---------------------------------------------------------------------

    def _name_of(self, row: Stored) -> Name:
        key = self._key_of(row)
        try:
            return self._entries.name(key)
        except Exception as error:  # what the codec and pickle raise
            raise _LeftOut(f"its key cannot be stored: {_short(error)}") from error

    def _key_of(self, row: Stored) -> Any:
        if self._json_disk:
            return self._from_json(row.key, "key")
        if row.raw == 1 and type(row.key) in (bytes, str, int, float):
            return row.key
        if type(row.key) is not bytes:
            raise _LeftOut("its key is damaged")
        return self._unpickled(row.key, "key")

    def _tag_of(self, row: Stored) -> bytes:
        if row.tag is None:
            return b""
        try:
            return encode_tag(row.tag)
        except SerializationError as error:
            raise _LeftOut(f"its tag cannot be stored: {_short(error)}") from error

    def _value_of(self, source: Source, row: Stored) -> Any:
        data = row.value
        if row.filename is not None:
            try:
                with source.open(row.filename) as file:
                    data = file.read()
            except OSError as error:
                raise _unread(error) from error
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
        if row.mode not in (MODE_RAW, MODE_BINARY, MODE_TEXT) or type(data) not in (bytes, str, int, float):
            raise _LeftOut("its value is damaged, or of an unknown kind")
        return data

    def _stream(self, source: Source, row: Stored, name: Name, expires: int, tag: bytes) -> bool:
        """Copy a large file in pieces. False if it is none."""
        if self._json_disk or name.beside:
            return False
        try:
            with source.open(row.filename) as file:
                size = os.fstat(file.fileno()).st_size
                if size < _STREAM_FROM:
                    return False
                self._flush()  # what comes first is to stay so
                self._entries.put(name, file, expires, tag, True)
        except ValueTooLarge as error:
            raise _LeftOut("it is too large for the cache") from error
        except CacheIOError:
            raise  # the cache's own trouble: the next entry would meet it too
        except OSError as error:
            raise _unread(error) from error
        self._report.imported += 1
        self._report.bytes += size
        return True

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


def _unread(error: OSError) -> _LeftOut:
    """A value's file that is missing, or cannot be read, is no trouble of the others."""
    return _LeftOut(f"its file cannot be read: {error.strerror or error}")


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _LeftOut("its time of expiry is damaged")
    return float(value)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
