"""Segments: append-only logs of records. One writer each; anybody reads.

A sealed segment ends with a footer that lists its records, so that walks and rebuilds read
footers and not data. It is left out where it would be more than 1/16 of the data: reading
such a segment through costs about the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from xxhash import xxh3_64_digest

from ..backends.base import NO_FILE, Backend, Buffer, name_file
from ..concurrency.file_locks import is_kept, keep
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import new_lock
from ..errors import ClosedError
from . import format as f
from .format import Head, Identity, Slot

T = TypeVar("T")
_SCAN_BYTES = 1 << 20
_FOOTER_SHARE = 16  # a footer is at most 1/16 of the records' bytes: less than any headroom
_CHECK_EVERY = 1024  # records between looks at that share
_MOST_FOOTER = 64 << 20  # bytes; a longer one is not read into memory: the records are looked for instead
_RETIRED_SECONDS = 2.0  # a descriptor is closed this long after its last possible use began,
_RETIRED_MOST = 32  # or when so many others came after it
_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
_SEEK_DATA: int = getattr(os, "SEEK_DATA", os.SEEK_SET)  # where that is missing, every place counts as data
_NOATIME = getattr(os, "O_NOATIME", 0)  # noting each read as an access costs a read 4 % of its time
# What reading a file can give that is gone, or is not ours any more.
VANISHED = NO_FILE | {errno.EBADF}


class Reads(Protocol):
    """What is needed of a backend to go through a segment."""

    def read(self, fd: int, length: int, offset: int) -> bytes: ...


class Record(NamedTuple):
    """What a walk yields: everything but the metadata and the value."""

    offset: int
    head: Head
    key: bytes
    tag: bytes
    payload: bytes  # of a LARGE record the pointer, digests of a REMOVE and so on; empty for a PUT

    def digest(self, seed: int) -> tuple[int, int]:
        return f.key_digest(self.key, seed)


class SegmentFiles:
    """Read descriptors of segments, opened at first use and shared by all threads.

    A descriptor is not closed under a reader: it is retired first, and closed some seconds, or
    many others, later. Whoever should still read a recycled one by then is caught by verification.
    """

    def __init__(self, backend: Backend, directory: str, limit: int) -> None:
        self._backend, self._limit, self.directory = backend, limit, directory
        self.is_listed: Callable[[int], bool] = lambda _: True  # as far as is known, before there is an index
        self._lock = new_lock()
        self._retired: deque[tuple[float, int]] = deque()
        self._closed = False
        self.open_files: dict[int, int] = {}
        self._table = _words(1)

    def path(self, segment: int) -> str:
        return os.path.join(self.directory, f.segment_name(segment))

    def table(self, capacity: int) -> bytearray:
        """The descriptors for compiled code, in words: segment << 32 | descriptor + 1 at segment % capacity.

        It is kept up to date, and stays where it is, until another capacity is asked for.
        """
        with self._lock:
            if len(self._table) != capacity:
                self._table = _words(capacity)
                for segment, fd in self.open_files.items():
                    self._table[segment % capacity] = segment << 32 | fd + 1
            words: bytearray = self._table.obj  # type: ignore[assignment]
            return words

    def get(self, segment: int) -> int:
        """A descriptor for reading. FileNotFoundError if the segment is gone."""
        fd = self.open_files.get(segment)
        return fd if fd is not None else self._open(segment)

    def file_of(self, segment: int) -> int | None:
        """A descriptor of a segment, for reading; None if there is no such file (any more)."""
        try:
            return self.get(segment)
        except ours(OSError) as error:
            if error.errno in VANISHED:
                return None
            raise

    def pointer(self, slot: Slot) -> int:
        """The number in a large file's name, from the record in the segment."""
        pointer: int = f.LARGE_POINTER.unpack(self._payload(slot, f.LARGE_POINTER.size))[0]
        return pointer

    def large(self, slot: Slot) -> tuple[int, bytes]:
        """The same, and the list of sums of the value's chunks, which is not verified."""
        data = self._payload(slot, f.large_payload(slot.value_length))
        return f.LARGE_POINTER.unpack_from(data)[0], data[f.LARGE_POINTER.size :]

    def _payload(self, slot: Slot, length: int) -> bytes:
        fd = self.get(slot.segment)
        try:
            data = self._backend.read(fd, length, slot.offset + slot.head_bytes)
        except ours(OSError) as error:
            name_file(error, self.path(slot.segment))
            raise
        if len(data) < length:
            raise FileNotFoundError(errno.ENOENT, "the record is gone", self.path(slot.segment))
        return data

    def size(self, segment: int) -> int:
        """Bytes that the file takes; 0 if there is none."""
        try:
            status = self._backend.lstat(self.path(segment))
            # A file longer than a segment can be is damaged: count its blocks.
            long = status.st_size > f.MAX_SEGMENT_BYTES
            return status.st_blocks * 512 if long else status.st_size
        except FileNotFoundError:
            return 0

    def open_kept(self, segment: int) -> int:
        """A descriptor of its own, through which the segment stays readable after it is removed."""
        path = self.path(segment)
        fd = self._backend.open(path, os.O_RDONLY)
        try:
            _keep(fd, path)
        except BaseException:
            self._backend.let_go(fd)
            raise
        return fd

    @contextlib.contextmanager
    def reading(self, segment: int) -> Iterator[int]:
        """A descriptor of its own that is closed behind a block."""
        path = self.path(segment)
        with self._backend.reading(path) as fd:
            _keep(fd, path)
            yield fd

    def remove(self, segment: int) -> None:
        """Remove a segment in which nothing lives, and give its blocks back by emptying it: a file that is
        merely removed keeps them until all handles that have read it close it, and idle ones do not.

        It is not emptied where another directory has the file as well (a backup of hard links), nor while
        somebody is reading it.
        """
        self.forget(segment)
        path = self.path(segment)
        try:
            with self._backend.opened(path, os.O_RDWR) as fd:
                self._backend.unlink(path)
                if not os.fstat(fd).st_nlink and not is_kept(fd):
                    self._backend.truncate(fd, 0)
        except ours(OSError):  # then just remove it
            with suppressing(IsADirectoryError):  # which is none of ours
                self._backend.unlink(path)

    def _open(self, segment: int) -> int:
        with self._lock:
            if self._closed:
                raise ClosedError("the cache is closed: open it anew")
            fd = self.open_files.get(segment)
            if fd is None:
                self._sweep()
                fd = self._open_file(self.path(segment))
                self.open_files[segment] = fd
                self._table[segment % len(self._table)] = segment << 32 | fd + 1
            return fd

    def _open_file(self, path: str) -> int:
        try:
            return self._backend.open(path, os.O_RDONLY | _NOATIME)
        except ours(PermissionError):  # only the owner may leave the time of access alone
            pass
        except ours(OSError) as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            self._let_go()
        return self._backend.open(path, os.O_RDONLY)

    def _let_go(self) -> None:
        """Close the older half of the descriptors."""
        for segment in list(self.open_files)[: max(1, len(self.open_files) // 2)]:
            self._retire(segment)
        self._close_retired(0.0)

    def _sweep(self) -> None:
        """Close segments that others removed: an open file keeps its blocks on disk."""
        self._retire_dead()
        while len(self.open_files) >= self._limit:
            self._retire(next(iter(self.open_files)))
        self._close_retired(_RETIRED_SECONDS)

    def forget(self, segment: int) -> None:
        with self._lock:
            if segment in self.open_files:
                self._retire(segment)
            self._close_retired(_RETIRED_SECONDS)

    def let_go(self) -> bool:
        """Close now what was retired, and what others removed: a file keeps its blocks as long as it is
        open. False if there was nothing."""
        with self._lock:
            self._retire_dead()
            found = bool(self._retired)
            self._close_retired(0.0)
            return found

    def look(self) -> None:
        """Retire what others removed, so that their blocks are freed in time."""
        with self._lock:
            self._retire_dead()
            self._close_retired(_RETIRED_SECONDS)

    def _retire_dead(self) -> None:
        for segment in [s for s in self.open_files if not self.is_listed(s)]:
            self._retire(segment)

    def forget_all(self) -> None:
        """Their names may belong to other files now."""
        with self._lock:
            for segment in list(self.open_files):
                self._retire(segment)

    def _retire(self, segment: int) -> None:
        at = segment % len(self._table)
        if self._table[at] >> 32 == segment:
            self._table[at] = 0
        # In C, so that an interruption finds it in one of the two.
        self._retired.extend(zip((time.monotonic(),), map(self.open_files.pop, (segment,)), strict=True))

    def _close_retired(self, age: float) -> None:
        before = time.monotonic() - age
        while self._retired and (self._retired[0][0] <= before or len(self._retired) > _RETIRED_MOST):
            self._backend.let_go(self._retired.popleft()[1])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for segment in list(self.open_files):
                self._retire(segment)
            self._close_retired(0.0)

    def after_fork(self) -> None:
        """Descriptors for reading may be shared; a lock that another thread held may not."""
        self._lock = new_lock()


def _keep(fd: int, path: str) -> None:
    keep(fd)
    if not os.fstat(fd).st_nlink:  # removed, so it may have been emptied
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _words(count: int) -> memoryview:
    return memoryview(bytearray(8 * count)).cast("Q")


def void_record(backend: Backend, fd: int, offset: int) -> None:
    """Make the record at `offset` no record any more."""
    backend.write(fd, [bytes(len(f.RECORD_MAGIC))], offset)


class SegmentWriter:
    """The end of one active segment, whose file it closes. Its owner serialises calls (`Store.appending`)."""

    def __init__(
        self, backend: Backend, fd: int, segment: int, capacity: int, tail: int = f.SEGMENT_HEADER_BYTES
    ) -> None:
        self._backend = backend
        self.fd = fd
        self.segment = segment
        self.capacity = capacity  # bytes at which the segment is sealed
        self.granted = tail  # bytes that count against the limit: those written, and room for some more
        self.tail = tail
        self.synced = 0
        self.syncing = new_lock()
        self._listed: list[bytes] | None = []
        self._footer_bytes = f.FOOTER_TRAILER_BYTES

    @property
    def room(self) -> int:
        """Bytes of records that fit into what was granted, the footer aside. Asked by every set."""
        return self.granted - self.tail - self._footer_bytes

    @property
    def used(self) -> int:
        """Bytes that the segment would have if it were sealed now."""
        return self.tail + self._footer_bytes

    @property
    def next_place(self) -> int:
        return f.pack_place(self.segment, self.tail)

    def append(
        self, head: bytes, payload: Buffer | tuple[Buffer, ...], listed_payload: bytes = b""
    ) -> None:
        """Write one record, whose payload may be in pieces, at `next_place`. If that fails, the segment is as
        it was."""
        pieces = payload if isinstance(payload, tuple) else (payload,)
        length = sum(map(len, pieces))
        padding = -length & 15
        self._write([head, *pieces, bytes(padding)] if padding else [head, *pieces])
        self.note(head, length + padding, listed_payload)

    def append_many(self, records: Sequence[tuple[bytes, Buffer, bytes]]) -> None:
        """Write (head, payload, payload to list) at once, one behind the other; all, or it raises."""
        buffers: list[Buffer] = []
        for head, payload, _ in records:
            padding = -len(payload) & 15
            buffers += (head, payload, bytes(padding)) if padding else (head, payload)
        self._write(buffers)
        start, entries = self.tail, []
        for head, payload, listed in records:
            if self._listed is not None:
                entries.append(footer_entry(self.tail, head, listed))
            self.tail += len(head) + f.aligned(len(payload))
        self.enlist_many(start, entries)

    def _write(self, buffers: list[Buffer]) -> None:
        assert self.tail % f.ALIGN == 0, "records and the footer begin at multiples of ALIGN"
        try:
            self._backend.write(self.fd, buffers, self.tail)
        except ours(OSError):
            self.cut()
            raise

    def void(self, offset: int) -> None:
        """Take back a record that was never shown: the footer does not list it either."""
        with suppressing(OSError):
            void_record(self._backend, self.fd, offset)
        if self._listed is not None:
            begins = offset.to_bytes(8, "little")  # as FOOTER_ENTRY does
            self._listed = [entry for entry in self._listed if not entry.startswith(begins)]

    def cut(self) -> None:
        """Take away what a failed write left behind the tail: a recovery would find whole records there."""
        with suppressing(OSError):
            self._backend.truncate(self.fd, self.tail)

    def note(self, head: bytes, payload_bytes: int, listed_payload: bytes) -> None:
        """Count a record that was written at the tail."""
        if self._listed is not None:
            self.enlist(self.tail, footer_entry(self.tail, head, listed_payload))
        self.tail += len(head) + payload_bytes

    def enlist(self, offset: int, entry: bytes) -> None:
        """Let the footer list the record at `offset`."""
        if self._listed is not None:
            self._listed.append(entry)
            self._footer_bytes += len(entry)
            if len(self._listed) % _CHECK_EVERY == 0 and self._footer_bytes * _FOOTER_SHARE > offset:
                self.unlist()

    def enlist_many(self, offset: int, entries: list[bytes]) -> None:
        """The same of records that follow each other from `offset` on."""
        if self._listed is not None:
            self._listed += entries
            self._footer_bytes += sum(map(len, entries))
            if self._footer_bytes * _FOOTER_SHARE > offset:
                self.unlist()

    def unlist(self) -> None:
        """There will be no footer: readers look for the records themselves."""
        self._listed, self._footer_bytes = None, f.FOOTER_TRAILER_BYTES

    def adopt(self, records: Iterable[Record]) -> None:
        """Append behind the records of a segment that another handle began."""
        for record in records:
            fields = f.RECORD.pack(f.RECORD_MAGIC, *record.head) + bytes(8)
            self.tail = record.offset
            self.note(fields + record.key + record.tag, 0, record.payload)
            self.tail = record.offset + record.head.record_bytes

    def seal(self) -> int:
        """Write the footer if it is worth it. Returns the size of the file then."""
        footer = self._footer()
        if footer:
            self._write([footer])
        size = self.tail + len(footer)
        self._backend.truncate(self.fd, size)  # gives back the space that the compiled core took ahead
        return size

    def _footer(self) -> bytes:
        if self._listed is None or self._footer_bytes * _FOOTER_SHARE > self.tail:
            return b""
        return pack_footer(self._listed, self.tail)

    def sync(self, end: int) -> None:
        """Make the first `end` bytes durable. Callers that wait together share one sync."""
        with self.syncing:
            if self.synced < end:
                reached = self.tail
                self._backend.sync(self.fd)
                self.synced = reached

    def close(self, *, sync: bool) -> None:
        """Close the file, synced first if asked. A caller of `sync` waits and finds it done."""
        with self.syncing:
            if self.fd >= 0:
                self.fd, fd = -1, self.fd
                try:
                    if sync:
                        self._backend.sync(fd)
                        self.synced = f.MASK64
                except BaseException:
                    self._backend.let_go(fd)
                    raise
                self._backend.close_file(fd)

    def abandon(self) -> None:
        """Close the file of a segment that is not ours any more."""
        with self.syncing:
            if self.fd >= 0:
                self.fd, fd = -1, self.fd
                self._backend.let_go(fd)

    def after_fork(self) -> None:
        """In a child: the segment is the parent's."""
        self.fd, fd = -1, self.fd
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # an exception came before it was closed
            self._backend.let_go(self.fd)


_TAG_AND_KEY = struct.Struct("<6xHI")  # their lengths, in a record


def footer_entry(offset: int, head: bytes, payload: bytes) -> bytes:
    """What a footer lists of a record: its metadata is not repeated there."""
    tag_length, key_length = _TAG_AND_KEY.unpack_from(head)
    names_end = f.RECORD_BYTES + key_length + tag_length
    return f.FOOTER_ENTRY.pack(offset, len(payload)) + head[:names_end] + payload


def pack_footer(entries: list[bytes], tail: int) -> bytes:
    trailer = f.FOOTER_TRAILER.pack(f.FOOTER_MAGIC, len(entries), tail, tail)
    body = b"".join((*entries, trailer))
    return body + xxh3_64_digest(body, tail)


def read_segment_header(backend: Reads, fd: int) -> f.SegmentHeader | None:
    """None if it is damaged, or the file longer than a segment can be."""
    if os.fstat(fd).st_size > f.MAX_SEGMENT_BYTES:
        return None
    return f.unpack_segment_header(backend.read(fd, f.SEGMENT_HEADER_BYTES, 0))


def footer_bytes(backend: Backend, fd: int) -> int:
    """How long the footer of a sealed segment is, going by its trailer; 0 if it has none."""
    size = os.fstat(fd).st_size
    trailer = backend.read(fd, f.FOOTER_TRAILER.size, max(0, size - f.FOOTER_TRAILER_BYTES))
    if len(trailer) < f.FOOTER_TRAILER.size:
        return 0
    magic, _, start, _ = f.FOOTER_TRAILER.unpack(trailer)
    return size - start if magic == f.FOOTER_MAGIC and 0 < start < size else 0


class Footer(NamedTuple):
    """A footer that fits its checksum."""

    entries: bytes
    records: int  # that it lists, going by its trailer
    tail: int  # where these end in the segment


def footer_of(backend: Reads, fd: int) -> Footer | None:
    """The footer of a sealed segment; None if it has none that fits its checksum."""
    size = os.fstat(fd).st_size
    trailer_at = size - f.FOOTER_TRAILER_BYTES
    if trailer_at < f.SEGMENT_HEADER_BYTES:
        return None
    trailer = backend.read(fd, f.FOOTER_TRAILER.size, trailer_at)
    if len(trailer) < f.FOOTER_TRAILER.size:
        return None
    magic, count, start, tail = f.FOOTER_TRAILER.unpack(trailer)
    if magic != f.FOOTER_MAGIC or not f.SEGMENT_HEADER_BYTES <= start <= trailer_at or start != tail:
        return None
    if size - start > _MOST_FOOTER:
        return None
    body = backend.read(fd, size - start, start)
    if len(body) != size - start or xxh3_64_digest(body[:-8], tail) != body[-8:]:
        return None
    return Footer(body[: -f.FOOTER_TRAILER_BYTES], count, tail)


def read_footer(backend: Reads, fd: int) -> Iterator[Record] | None:
    """The records of a sealed segment; None without a sound footer."""
    footer = footer_of(backend, fd)
    records = None if footer is None else unpack_footer(*footer)
    return None if records is None else iter(records)


def unpack_footer(entries: bytes, count: int, tail: int) -> list[Record] | None:
    """The records that a footer lists; None if a segment whose records end at `tail` can't have them."""
    at, records = 0, []
    while at < len(entries):
        record, at = _footer_record(entries, at)
        if record is None or not _is_within(record, tail):
            return None
        records.append(record)
    return records if (len(records), at) == (count, len(entries)) else None


def _footer_record(entries: bytes, at: int) -> tuple[Record | None, int]:
    """The record that the entry at `at` is of, if it is one, and where the next entry begins."""
    if at + f.FOOTER_ENTRY.size > len(entries):
        return None, at
    offset, kept = f.FOOTER_ENTRY.unpack_from(entries, at)
    at += f.FOOTER_ENTRY.size
    head = f.unpack_head(entries, at)
    if head is None or kept != head.listed_length:
        return None, at
    key = at + f.RECORD_BYTES
    tag = key + head.key_length
    payload = tag + head.tag_length
    record = Record(offset, head, entries[key:tag], entries[tag:payload], entries[payload : payload + kept])
    return record, payload + kept


def _is_within(record: Record, tail: int) -> bool:
    """Whether a record lies where one can be."""
    start = record.offset
    return not start % f.ALIGN and f.SEGMENT_HEADER_BYTES <= start <= tail - record.head.record_bytes


class _Window:
    """A file read through in large pieces, seen as bytes at absolute offsets."""

    def __init__(self, backend: Reads, fd: int) -> None:
        self._backend, self._fd = backend, fd
        self.start, self.data = 0, b""

    def have(self, offset: int, length: int) -> int:
        """Make `length` bytes from `offset` readable if the file has them. Their place in `data`."""
        if not self.start <= offset or offset + length > self.start + len(self.data):
            self.move(offset, length)
        return offset - self.start

    def move(self, offset: int, length: int = 0) -> None:
        """Begin at `offset`."""
        self.data = self._backend.read(self._fd, max(length, _SCAN_BYTES), offset)
        self.start = offset

    def past_hole(self, offset: int) -> int:
        """`offset`, or where the next data begins: a hole may be longer than anybody can read."""
        if not self.start <= offset <= self.start + len(self.data) - f.RECORD_BYTES:
            try:
                return os.lseek(self._fd, offset, _SEEK_DATA) & -f.ALIGN
            except ours(OSError) as error:  # not every file system can tell
                return f.MASK64 if error.errno == errno.ENXIO else offset  # there is no more data
        return offset


def scan(
    backend: Reads, fd: int, segment: int, seed: int, offset: int = f.SEGMENT_HEADER_BYTES
) -> Iterator[Record]:
    """The records of a segment, read from its start; what fails its checksum is skipped over."""
    window = _Window(backend, fd)
    size = os.fstat(fd).st_size
    if size > f.MAX_SEGMENT_BYTES:
        return
    while offset + f.RECORD_BYTES <= size:
        record = _record_at(window, offset, segment, seed)
        if record is None:
            found = _next_magic(window, offset + f.ALIGN, size)
            if found is None:
                return
            offset = found
        else:
            yield record
            offset += record.head.record_bytes


def scan_by(
    look: Callable[[bytes, int, int], tuple[list[T], int]], backend: Reads, fd: int
) -> Iterator[T]:
    """`scan` by somebody who looks at many records at once.

    `look(data, base, at)` gives something of the records from `at` on in data that was read at `base`, and
    where the first of them begins that is none, or is not all there.
    """
    window, offset = _Window(backend, fd), f.SEGMENT_HEADER_BYTES
    size = os.fstat(fd).st_size
    if size > f.MAX_SEGMENT_BYTES:
        return
    while offset + f.RECORD_BYTES <= size:
        at = window.have(offset, f.RECORD_BYTES)
        found, end = look(window.data, window.start, at)
        yield from found
        if end > at:
            offset = window.start + end
        elif window.start < offset:  # the rest of it may be behind the window
            window.move(offset)
        elif (magic := _next_magic(window, offset + f.ALIGN, size)) is not None:
            offset = magic
        else:
            return


def _record_at(window: _Window, offset: int, segment: int, seed: int) -> Record | None:
    at = window.have(offset, f.RECORD_BYTES)  # first: it may replace the data
    head = f.unpack_head(window.data, at)
    if head is None:
        return None
    keeps = head.kind != f.PUT
    payload_bytes = head.listed_length if head.listed_length < _SCAN_BYTES else 0
    payload_at = head.head_bytes
    at = window.have(offset, payload_at + payload_bytes)
    if not f.verify_head(window.data, at, head, seed, f.pack_place(segment, offset)):
        return None
    names = at + f.RECORD_BYTES
    key = window.data[names : names + head.key_length]
    tag = window.data[names + head.key_length : names + head.key_length + head.tag_length]
    payload = window.data[at + payload_at : at + payload_at + payload_bytes]
    if keeps and (len(payload) != payload_bytes or not _payload_is_sound(head, key, payload, seed)):
        return None
    return Record(offset, head, key, tag, payload)


def _payload_is_sound(head: Head, key: bytes, payload: bytes, seed: int) -> bool:
    """A removal is acted on without further checks, so its list must be what was written."""
    return head.kind == f.LARGE or f.value_sum(payload, 0, 0) == head.value_sum


def _next_magic(window: _Window, offset: int, size: int) -> int | None:
    """The next aligned place that looks like a record."""
    while (offset := window.past_hole(offset)) + f.RECORD_BYTES <= size:
        at = window.have(offset, f.RECORD_BYTES)
        found = window.data.find(f.RECORD_MAGIC, at)
        while found >= 0 and (window.start + found) % f.ALIGN:
            found = window.data.find(f.RECORD_MAGIC, found + 1)
        if found >= 0:
            return window.start + found
        offset = max(offset + f.ALIGN, (window.start + len(window.data)) // f.ALIGN * f.ALIGN - f.ALIGN)
        if window.start + len(window.data) >= size:
            return None
    return None


def read_records(backend: Reads, fd: int, segment: int, identity: Identity) -> Iterator[Record]:
    """All records of a segment: from its footer if there is a sound one, else by a scan.

    `fd` is read as the records are asked for.
    """
    footer = read_footer(backend, fd)
    return footer if footer is not None else scan(backend, fd, segment, identity.seed)
