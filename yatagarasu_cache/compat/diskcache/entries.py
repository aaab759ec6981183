"""Entries of diskcache's kind in a `DiskCache`: any key, an order, and what `Disk` makes of values.

A key that the store takes is stored as it is, and so is a value that its codec keeps: a `DiskCache` on the
same directory reads both. Any other key is stored by its digest, and along with its value. Beside the value,
in the metadata, there is where the entry stands in the order of insertion, and what form the value has.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import blake2b
from struct import Struct
from typing import Any, NamedTuple

from ...arguments import encode_meta
from ...cache import DiskCache
from ...codec import KIND_BYTES, KIND_CUSTOM, Key, PickleSerializer, ValueCodec, decode_key, encode_key
from ...concurrency.interruption import ours
from ...errors import SerializationError, Unreadable, ValueTooLarge
from ...store.current import ATTEMPTS
from ...store.expected import Expected
from ...store.format import (
    CODEC_FLAGS,
    PARTITIONS,
    RECORD_BYTES,
    RECORD_TAG_LENGTH,
    REMOVED,
    W_CLOCK,
    Slot,
    is_of_key,
    key_digest,
)
from ...store.index import Index
from ...store.item import Item, Pieces
from ...store.reading import Found, Names
from ...streams import as_stream, stream_length
from .constants import MODE_BINARY, MODE_PICKLE, MODE_RAW
from .disks import RAW, Disk
from .readers import named
from .sharing import CONTAINERS, shares

__all__ = ["MISSING", "Entries", "Name", "Row"]

MISSING: Any = object()
RESERVED = "yatagarasu_cache.compat.diskcache"
"""What tuples begin with that are no keys of the user's."""

_META = Struct("<QBB")  # place in the order, mode, form
_BEFORE_META = encode_meta(bytes(_META.size))[: -_META.size]
_BEFORE, _LENGTH = len(_BEFORE_META), len(_BEFORE_META) + _META.size
_SHORT = 2000  # bytes of key and tag that fit every cache
_LATEST = 9e9  # seconds since the epoch: in the year 2255
_PLAIN, _WITH_KEY, _SEALED = _FORMS = 0, 1, 2
_PLAIN_ENDS = [bytes((mode, _PLAIN)) for mode in range(MODE_PICKLE + 1)]  # of metadata, by the mode
_PLAIN_META = [_BEFORE_META + bytes(8) + end for end in _PLAIN_ENDS]  # whatever place it has
_NATIVE = ValueCodec()


class Name(NamedTuple):
    """A key, as it is stored: encoded, and for one that is stored with its value what of it is."""

    key: Any
    data: bytes
    beside: tuple[Any, ...] = ()


class Row(NamedTuple):
    """One entry, as far as it was read."""

    slot: Slot
    names: Names
    found: Found | None

    @property
    def meta(self) -> tuple[int, int, int]:
        """(place in the order, mode, form)."""
        data = self.names.meta
        if not _is_ours(data):  # stored by a DiskCache
            return self.slot.stamp, MODE_RAW, _PLAIN
        return _META.unpack_from(data, _BEFORE)

    @property
    def mode(self) -> int:
        return self.meta[1]

    @property
    def is_file(self) -> bool:
        """Whether it is opened as a file without being read."""
        return self.meta[1:] == (MODE_BINARY, _PLAIN)

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the order of insertion."""
        return self.meta[0], self.slot.stamp

    @property
    def expires(self) -> float | None:
        return self.slot.expires / 1e9 if self.slot.expires else None

    @property
    def tag(self) -> Any:
        return decode_key(self.names.tag) if self.names.tag else None

    @property
    def is_over(self) -> bool:
        return 0 < self.slot.expires <= now()


class _Unloaded(PickleSerializer):
    """Gives the pickles that are signed, as bytes."""

    __slots__ = ()

    def _loads(self, data: Any, key: bytes) -> bytes:
        return bytes(self._checked(data, key))


def now() -> int:
    """Nanoseconds since the epoch, by the clock that programs set which are tested."""
    return int(time.time() * 1e9)


def expiry(seconds: float | None) -> int:
    """Nanoseconds since the epoch of a time in seconds; 0 for never, 1 for long ago. What is farther off
    than the store can say is as far off as it can."""
    if seconds is None or seconds != seconds:  # which SQLite has no number for
        return 0
    if seconds <= 0:
        return 1
    return max(int(min(seconds, _LATEST) * 1e9), 1)


class Entries:
    """What a `Cache` does to entries, one at a time. `secret`: gives that with which pickles are signed."""

    def __init__(self, cache: DiskCache, disk: Disk, secret: Callable[[], bytes]) -> None:
        self.cache, self._disk, self._secret = cache, disk, secret
        self._desk = desk = cache._desk
        self.store = desk.store
        kind = type(disk)
        self.is_plain = kind is Disk
        self._has_plain_keys = kind.put is Disk.put and kind.get is Disk.get
        self._holds: Callable[[bytes, int], Any] = self.store.core.holds_encoded
        self._meta: Callable[[bytes, int], Any] = self.store.core.meta
        self._set = desk.set
        self.entering = self.store.entering
        self.last_place = 0

    # -- keys ---------------------------------------------------------------------------------

    def name(self, key: Any) -> Name:
        if not self._has_plain_keys:
            return self._name_by_disk(key)
        if type(key) is float and key.is_integer() and abs(key) < 2**63:
            key = int(key)  # which SQLite takes for the same
        try:
            return tuple.__new__(Name, (key, encode_key(key), ()))  # in half the time of Name()
        except SerializationError:
            return Name(key, encode_key((RESERVED, "key", _digest(key))), (key,))

    def _name_by_disk(self, key: Any) -> Name:
        stored, is_raw = self._disk.put(key)
        data = encode_key((RESERVED, "disk", bool(is_raw), _digest(stored)))
        return Name(key, data, (stored, bool(is_raw)))

    def queue_name(self, key: Any) -> Name:
        """Of a queue's key, in which the disk has no say."""
        return Name(key, encode_key(key))

    def identify(self, data: bytes) -> tuple[int, int, bytes]:
        return *key_digest(data, self.store.current.seed), data

    def key_of(self, row: Row) -> Any:
        """The user's key of an entry; `Unreadable` if it is stored with a value that can't be read."""
        form = row.meta[2]
        if form == _PLAIN:
            return decode_key(row.names.key)
        if form == _WITH_KEY:
            return self._pair(row)[1]
        _, _, *beside = self._sealed(row)
        return beside[0] if len(beside) == 1 else self._disk.get(*beside)

    def plain_key(self, row: Row) -> Any:
        """The user's key, if it is stored as it is."""
        return None if row.names.key.startswith(_OURS) else decode_key(row.names.key)

    def sort_key(self, key: Any) -> tuple[int, Any]:
        """Where a key stands in the order of a database."""
        stored = self._disk.put(key)[0] if self._has_plain_keys else Disk.put(self._disk, key)[0]
        if isinstance(stored, (int, float)):
            return 0, stored
        return (1, stored.encode("utf-8", "surrogatepass")) if isinstance(stored, str) else (2, stored)

    # -- values -------------------------------------------------------------------------------

    @cached_property
    def _signing(self) -> ValueCodec:
        return ValueCodec(PickleSerializer(self._secret(), max(self._disk.pickle_protocol, 0)))

    @cached_property
    def _unloaded(self) -> ValueCodec:
        return ValueCodec(_Unloaded(self._secret()))

    def encoded(self, name: Name, value: Any) -> tuple[Any, int]:
        """(payload, flags) of what the codec keeps, or else of a signed pickle."""
        return self._kept(value) or _whole(*self._signed(name, value))

    def _kept(self, value: Any) -> tuple[Any, int] | None:
        """(payload, flags) of what the codec keeps."""
        if type(value) is bytes:
            return value, KIND_BYTES
        if type(value) is bytearray:  # which would come back as bytes
            return None
        is_container = type(value) in CONTAINERS
        if is_container and shares(value):  # what was one thing would come back as several
            return None
        try:
            return _whole(*_NATIVE.encode(value, self.store.limits.encodable_bytes))
        except SerializationError:
            return None
        except ValueTooLarge:
            if is_container:  # which a pickle may have room for: of short texts it writes each once, too
                return None
            raise

    def _encoded_with_key(self, name: Name, value: Any, mode: int) -> tuple[Any, int, int, int]:
        """(payload, flags, mode, form) of a value that is stored with its key."""
        kept = None if type(value) is bytearray else self._kept((value, *name.beside))
        if kept is not None:
            return *kept, mode, _WITH_KEY
        stored = value
        if mode != MODE_BINARY:  # pickled by itself, for a disk of one's own to find
            _, mode, _, stored = Disk.store(self._disk, value, False)
        return *self._signed(name, (stored, mode, *name.beside), is_sealed=True), mode, _SEALED

    def _signed(self, name: Name, value: Any, *, is_sealed: bool = False) -> tuple[Any, int]:
        codec, most = self._signing, self.store.limits.encodable_bytes
        try:
            key = _key_of_sealed(name.data) if is_sealed else decode_key(name.data)
            return codec._encode_object(value, most, key)
        except SerializationError as error:
            raise error.__cause__ or error from None  # what pickle says

    def decode(self, payload: Any, flags: int, data: bytes) -> Any:
        codec = self._signing if flags & CODEC_FLAGS == KIND_CUSTOM else _NATIVE
        return codec.decode(payload, flags, decode_key(data))

    def value(self, name: Name, payload: Any, flags: int) -> Any:
        """The user's value of what `get` has found; `MISSING` if it has gone meanwhile."""
        try:
            return self.decode(payload, flags, name.data)
        except Unreadable:  # a disk of one's own may have stored it
            row = self.row(name, is_use=False)
            if row is not None and row.meta[2] != _SEALED:
                raise
            return MISSING if row is None else self.value_of(row)

    def _found(self, row: Row) -> Found:
        found = row.found or self.store.reading.fetch_version(row.slot)
        if found is None:
            raise Unreadable("it was replaced or removed before it was read")
        return found

    def _decoded(self, row: Row) -> Any:
        found = self._found(row)
        return self.decode(found.payload, found.flags, row.names.key)

    def _pair(self, row: Row) -> Any:
        """(value, key) of an entry that is stored with its key. Others may have stored it: nothing of it is
        for the disk."""
        pair = self._decoded(row)
        if type(pair) is not tuple or len(pair) != 2:
            raise Unreadable("it has no key beside its value")
        return pair

    def _sealed(self, row: Row) -> Any:
        """What a disk of one's own has stored: (stored, mode, key), or (stored, mode, stored key, is raw).
        It was signed as such, or it is not for the disk, which may unpickle it."""
        found = self._found(row)
        if found.flags & CODEC_FLAGS != KIND_CUSTOM:
            raise Unreadable("it is not signed, as what a disk of one's own has stored is")
        return self._signing.decode(found.payload, found.flags, _key_of_sealed(row.names.key))

    def value_of(self, row: Row, read: bool = False) -> Any:
        """The user's value. `read`: as a binary file, if it was stored as one."""
        _, mode, form = row.meta
        if form == _SEALED:  # the mode as it was signed: it decides what is unpickled
            stored, mode, *_ = self._sealed(row)
            return self._fetched(mode, stored, read)
        if not self.is_plain and row.slot.flags & CODEC_FLAGS == KIND_CUSTOM:
            return self._judged(row, read)
        # What is not signed is never for a disk of one's own, which may unpickle whatever it is given.
        if read and row.is_file and row.slot.flags & CODEC_FLAGS == KIND_BYTES:
            return named(self._opened(row))
        value = self._pair(row)[0] if form == _WITH_KEY else self._decoded(row)
        is_file = read and mode == MODE_BINARY and type(value) is bytes
        return named(io.BytesIO(value)) if is_file else value

    def _judged(self, row: Row, read: bool) -> Any:
        """A pickle that a plain disk has signed, as the `fetch` of another one finds it: that alone
        unpickles it, or refuses to."""
        if row.meta[2] != _PLAIN:
            raise Unreadable("it is pickled together with its key")
        found = self._found(row)
        data = self._unloaded.decode(found.payload, found.flags, decode_key(row.names.key))
        return self._fetched(MODE_PICKLE, data, read)

    def _fetched(self, mode: int, stored: Any, read: bool) -> Any:
        """What a disk of one's own makes of it. With an OSError it says that it has nothing; whatever else it
        raises is for the caller."""
        try:
            return self._disk.fetch(mode, None, stored, read)
        except ours(OSError) as error:
            raise Unreadable(f"Disk.fetch: {error}") from error

    def _opened(self, row: Row) -> Any:
        try:
            return self.cache._desk.open(decode_key(row.names.key))
        except KeyError:
            raise Unreadable("it was removed before it was opened") from None

    def absent(self, name: Name) -> Expected:
        """That there is no live entry: none, or just the one that has expired by the clock of `now`."""
        slot = self.store.finding.entry(*self.identify(name.data))
        return Expected(0 if slot is None or not 0 < slot.expires <= now() else slot.stamp)

    # -- writing ------------------------------------------------------------------------------

    def put(
        self, name: Name, value: Any, expires: int, tag: bytes, read: bool, expected: Expected | None = None
    ) -> bool:
        """Store a value; False if what is there is not as expected."""
        if read and self.is_plain and type(value) in RAW:  # no files, whatever is said of them
            read = False
        if self.is_plain and expected is None and not read and not name.beside:
            self.put_plain(name, value, expires, tag)
            return True
        low, high, data = self.identify(name.data)
        place = self._place(name)
        if self.is_plain and read and not name.beside and (stream := as_stream(value, None)) is not None:
            item = Item(low, high, data, b"", KIND_BYTES, expires, tag, _packed(place, MODE_BINARY, _PLAIN))
            return self.store.writing.put_stream(item, stream, length_of(value), expected)
        item = self._item(name, value, expires, tag, read, place)
        if expected is not None:
            return self.store.writing.put_if(item, expected)
        self._desk.put(data, item.payload, item.flags, expires, tag, item.meta)
        return True

    def set_bytes(self, key: Any, value: bytes, tag: Any) -> bool:
        """`put_plain` of bytes that never expire, whose tag is text or None, by compiled code. False, and
        nothing was done, if it is not for that."""
        if type(key) is float:
            return False
        mode = MODE_BINARY if len(value) >= self._disk.min_file_size > 0 else MODE_RAW
        return self._set(key, value, tag, _PLAIN_META[mode], _BEFORE)

    def put_plain(self, name: Name, value: Any, expires: int, tag: bytes) -> None:
        """`put` of what most are, with fewer steps: the disk is plain, and nothing is stored beside the
        value."""
        data = name.data
        if type(value) is bytes:
            payload, flags = value, KIND_BYTES
            mode = MODE_BINARY if len(value) >= self._disk.min_file_size > 0 else MODE_RAW
        else:
            payload, flags = self.encoded(name, value)
            mode = MODE_PICKLE if flags == KIND_CUSTOM else MODE_RAW
        meta = self._meta_at_its_place(name, mode)
        if len(payload) > self.store.limits.unchecked_bytes or len(data) + len(tag) > _SHORT:
            self._desk._check_sizes(data, tag, meta, len(payload))
        self._desk.put(data, payload, flags, expires, tag, meta)

    def item(self, name: Name, value: Any, expires: int, tag: bytes, mode: int) -> Item:
        """What `put` would store of an entry that is not there yet; of an old one `mode` is known."""
        item = self._item(name, value, expires, tag, False, self._next_place())
        if mode == MODE_BINARY and self.is_plain:
            place, _, form = _META.unpack_from(item.meta, _BEFORE)
            item = item._replace(meta=_packed(place, mode, form))
        return item

    def _item(self, name: Name, value: Any, expires: int, tag: bytes, read: bool, place: int) -> Item:
        low, high, data = self.identify(name.data)
        payload, flags, mode, form = self._formed(name, value, read)
        meta = _packed(place, mode, form)
        self._desk._check_sizes(data, tag, meta, len(payload))
        return Item(low, high, data, payload, flags, expires, tag, meta)

    def _formed(self, name: Name, value: Any, read: bool) -> tuple[Any, int, int, int]:
        """(payload, flags, mode, form) of a value."""
        if not self.is_plain:
            _, mode, filename, stored = self._disk.store(value, read, key=name.key)
            if filename is not None:
                self._disk.filename()
            if hasattr(stored, "read"):
                stored = stored.read()
            beside = name.beside or (decode_key(name.data),)
            return *self._signed(name, (stored, mode, *beside), is_sealed=True), mode, _SEALED
        mode = MODE_RAW
        if read:
            value, mode = value.read(), MODE_BINARY
        elif type(value) is bytes and len(value) >= self._disk.min_file_size > 0:
            mode = MODE_BINARY
        if name.beside:
            return self._encoded_with_key(name, value, mode)
        payload, flags = self.encoded(name, value)
        if flags & CODEC_FLAGS == KIND_CUSTOM:
            mode = MODE_PICKLE
        return payload, flags, mode, _PLAIN

    def holds(self, data: bytes) -> bool:
        """Whether an encoded key has a live entry. Counts nothing."""
        is_held = self._holds(data, time.time_ns())
        if is_held is NotImplemented:
            return self.store.finding.entry(*self.identify(data)) is not None
        return bool(is_held)

    def _meta_at_its_place(self, name: Name, mode: int) -> bytes:
        """The metadata of a plain entry: mostly there is one of its key, in the same form."""
        before, end = self._meta(name.data, time.time_ns()), _PLAIN_ENDS[mode]
        if before is None:
            return _packed(self._next_place(), mode, _PLAIN)
        if _is_ours(before):
            return before if before.endswith(end) else before[:-2] + end  # type: ignore[no-any-return]
        return _packed(self._place(name), mode, _PLAIN)

    def _place(self, name: Name) -> int:
        """Where an entry is to stand: where the live one of its key stands, or at the end."""
        before = self._meta(name.data, time.time_ns())
        if before is None:
            return self._next_place()
        if _is_ours(before):
            return int.from_bytes(before[_BEFORE : _BEFORE + 8], "little")
        low, high = key_digest(name.data, self.store.current.seed)
        slot = self.store.finding.shown(low, high)
        place = None if slot is None else self.store.finding.attempt(partial(self._place_of, name.data), slot)
        return self._next_place() if place is None else place

    def _place_of(self, key: bytes, slot: Slot) -> int | None:
        """What the record of a slot says, if it is of that key. It is not verified: a wrong place would be
        no more than that."""
        files = self.store.files
        head = files.backend.read(files.segments.get(slot.segment), slot.head_bytes, slot.offset)
        if not is_of_key(head, key):
            return None
        place = _place_in(head, len(key))
        return slot.stamp if place is None else place

    def _next_place(self) -> int:
        """Behind all others: stamps grow, and whoever stores takes a later one."""
        self.last_place = place = max(self.store.current.index.words[W_CLOCK], self.last_place) + 1
        return place

    def incr(self, name: Name, delta: Any, default: Any) -> Any:
        """The sum, stored. KeyError without an entry and a default."""
        while True:
            row = self.row(name, is_use=False)
            if row is None:
                if default is None:
                    raise KeyError(name)
                value, expected, expires, tag = default + delta, self.absent(name), 0, b""
                if not self.is_plain:  # it has a say in what is new
                    if self.put(name, value, 0, b"", False, expected):
                        return value
                    continue
            else:
                value, expected = self._number(row) + delta, Expected(row.slot.stamp, keeps_expiry=True)
                expires, tag = row.slot.expires, row.names.tag
            if self._put_number(name, value, expires, tag, expected):
                return value

    def _number(self, row: Row) -> Any:
        form = row.meta[2]
        if form == _PLAIN:
            return self._decoded(row)
        return self._pair(row)[0] if form == _WITH_KEY else self._sealed(row)[0]

    def _put_number(self, name: Name, value: Any, expires: int, tag: bytes, expected: Expected) -> bool:
        """As a number, whatever class the disk is of, as SQL does it."""
        low, high, data = self.identify(name.data)
        place = self._place(name)
        if self.is_plain and not name.beside:
            payload, flags = self.encoded(name, value)
            form = _PLAIN
        elif self.is_plain:
            payload, flags, _, form = self._encoded_with_key(name, value, MODE_RAW)
        else:
            beside = name.beside or (decode_key(name.data),)
            (payload, flags), form = self._signed(name, (value, MODE_RAW, *beside), is_sealed=True), _SEALED
        item = Item(low, high, data, payload, flags, expires, tag, _packed(place, MODE_RAW, form))
        return self.store.writing.put_if(item, expected)

    # -- reading ------------------------------------------------------------------------------

    def find(self, key: str) -> Any:
        """`get` by compiled code, of a key as the user gave it; NotImplemented if it is not for that."""
        return self._desk.get(key, int(time.time() * 1e9))

    def get(self, name: Name) -> tuple[Any, int] | bytes | None:
        """What is stored of a key without anything beside it. Counted."""
        found: Any = self._desk.get(name.key, now())
        if found is NotImplemented:
            found = self.store.reading.get(*self.identify(name.data))
        return found  # type: ignore[no-any-return]

    def row(self, name: Name, *, is_use: bool = True) -> Row | None:
        """The live entry of a key, with its value. Not counted."""
        row = self.store.reading.verified(*self.identify(name.data), self._load, is_use=is_use)
        return None if row is None or row.is_over else row

    def _load(self, slot: Slot) -> Row | None:
        reading = self.store.reading
        found, names = reading.load(slot), reading.read_names(slot)
        return None if found is None or names is None else Row(slot, names, found)

    def take(self, name: Name) -> Row | None:
        """The live entry of a key, which nobody else gets: it is removed."""
        while (row := self.row(name, is_use=False)) is not None:
            if self.remove(row):
                return row
        return None

    def remove(self, row: Row) -> bool:
        """Remove this version of an entry; False if it is there no more."""
        low, high, data = row.slot.low, row.slot.high, row.names.key

        def chosen(slot: Slot) -> bool:
            return slot.stamp == row.slot.stamp and self.store.finding.is_of(slot, data)

        return bool(self.store.removal.remove([(low, high)], chosen, "deletes")[1])

    def remove_slot(self, slot: Slot) -> bool:
        """The same, of an entry whose key was not looked at."""
        digest = slot.low, slot.high
        return bool(self.store.removal.remove([digest], lambda one: one.stamp == slot.stamp, "deletes")[1])

    def drop(self, name: Name) -> None:
        """Remove whatever there is of a key, expired or not."""
        low, high, _ = self.identify(name.data)
        self.store.removal.remove([(low, high)], lambda slot: True, "deletes")

    @property
    def live_bytes(self) -> int:
        """Of entries, without what the cache takes by itself."""
        index = self.store.current.index
        return max(index.live_bytes - self.store.budget.fixed_bytes, 0)

    def expired(self, until: int) -> Iterator[Slot]:
        """What has expired by then."""
        return (slot for slot in self.slots() if 0 < slot.expires < until)

    # -- all of them --------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """All entries, expired ones too, without their values, in no order. Each that was there all the time
        is met; of others some are."""
        for slot in self.slots():
            row = self._named(slot)
            if row is not None and not is_hidden(row.names.key):
                yield row

    def slots(self) -> Iterator[Slot]:
        """Those of all entries, as the index has them: what has gone costs nothing, as it would in a walk
        through the segments."""
        for part in range(PARTITIONS):
            yield from self.store.current.look(partial(_slots_of, part=part))

    def _named(self, slot: Slot | None) -> Row | None:
        """An entry with its names; None if it has gone."""
        for _ in range(ATTEMPTS):
            if slot is None:
                return None
            names = self.store.reading.names_of_version(slot)
            if names is not None:
                return Row(slot, names, None)
            slot = self.store.finding.shown(slot.low, slot.high)  # it was moved, or replaced
        return None

    def row_of(self, low: int, high: int) -> Row | None:
        """The entry of a digest, without its value."""
        return self._named(self.store.finding.shown(low, high))

    def readable_keys(self, rows: Iterator[Row] | list[Row]) -> Iterator[tuple[Any, Row]]:
        for row in rows:
            try:
                yield self.key_of(row), row
            except Unreadable:  # stored with a value of somebody else's, or gone meanwhile
                continue

    def count(self) -> int:
        """Entries, expired ones too."""
        hidden = sum(1 for _ in self.store.tags.entries(HIDDEN_TAG))
        return max(self.store.current.count() - hidden, 0)

    # -- of the module's own ------------------------------------------------------------------

    def hidden(self, what: str) -> Any:
        """Something that is kept beside the user's entries; None if it is not there."""
        found = self.store.reading.fetch(*self.identify(hidden_key(what)))
        return None if found is None else _NATIVE.decode(*found)

    def hide(self, what: str, value: Any) -> None:
        payload, flags = _NATIVE.encode(value)
        self._desk.put(hidden_key(what), payload, flags, 0, HIDDEN_TAG, b"")

    def unhide(self, what: str) -> None:
        self._desk.delete(hidden_key(what))


def _slots_of(index: Index, part: int) -> list[Slot]:
    slots = index.partition_slots(part)
    lows = index.column(slots, 0)
    return [index.slot(at) for at, low in zip(slots, lows, strict=False) if low > REMOVED]


def length_of(file: Any) -> int | None:
    """Bytes that a binary file still has, if that can be told beforehand."""
    if type(file) is io.BytesIO and not file.closed:
        return max(file.getbuffer().nbytes - file.tell(), 0)
    return stream_length(file, None)


def hidden_key(what: str) -> bytes:
    return encode_key((RESERVED, "hidden", what))


_OURS = encode_key((RESERVED,))
_HIDDEN = encode_key((RESERVED, "hidden"))
HIDDEN_TAG = encode_key((RESERVED, "hidden"))


def _place_in(head: bytes, key_length: int) -> int | None:
    """The place that the head of a record says; None if it is of a DiskCache."""
    at = RECORD_BYTES + key_length + head[RECORD_TAG_LENGTH] + (head[RECORD_TAG_LENGTH + 1] << 8)
    if not head.startswith(_BEFORE_META, at):
        return None
    return int.from_bytes(head[at + _BEFORE : at + _BEFORE + 8], "little")


def _is_ours(meta: Any) -> bool:
    """Whether metadata, if it is some, is of this module, and not of what a `DiskCache` has stored."""
    if type(meta) is not bytes or len(meta) != _LENGTH:
        return False
    return meta.startswith(_BEFORE_META) and meta[-1] in _FORMS


def is_hidden(data: bytes) -> bool:
    return data.startswith(_HIDDEN)


def _key_of_sealed(data: bytes) -> Key:
    """What is signed as the key of what a disk has stored: nobody's value can be passed off as that."""
    return RESERVED, "sealed", data


def _whole(payload: Any, flags: int) -> tuple[Any, int]:
    return payload.at_best() if type(payload) is Pieces else payload, flags


def _packed(place: int, mode: int, form: int) -> bytes:
    return _BEFORE_META + _META.pack(place, mode, form)


def _digest(key: Any) -> bytes:
    """Of a key that the store does not take: of what the codec makes of it, or pickle."""
    try:
        payload, flags = _NATIVE.encode(key)
        data = bytes(payload)
    except SerializationError:
        data, flags = pickletools.optimize(pickle.dumps(key, protocol=4)), KIND_CUSTOM
    return blake2b(data, digest_size=32, person=bytes((flags,))).digest()
