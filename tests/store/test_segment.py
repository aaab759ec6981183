"""Segments: what was appended is what is found, by footer and by scan, whole, torn or damaged."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.errors import ClosedError
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.format import Identity
from yatagarasu_cache.store.segment import (
    Record,
    SegmentFiles,
    SegmentWriter,
    footer_bytes,
    read_footer,
    read_records,
    read_segment_header,
    scan,
)

SEED = 99
IDENTITY = Identity(b"sixteen bytes id", SEED)
NUMBER = 7
@pytest.fixture(autouse=True)
def footers_of_small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records here are small; their footers would be left out."""
    monkeypatch.setattr("yatagarasu_cache.store.segment._FOOTER_SHARE", 4)


BACKEND = ThreadsBackend()
PUTS = tuple[int, bytes, bytes, bytes, bytes]  # kind, key, tag, meta, payload


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f.segment_name(NUMBER)


def begin(path: Path, capacity: int = 1 << 20, number: int = NUMBER) -> SegmentWriter:
    fd = BACKEND.open(str(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    BACKEND.write(fd, [f.pack_segment_header(number, IDENTITY, 1, 0)], 0)
    return SegmentWriter(BACKEND, fd, number, capacity)


def packed(
    writer: SegmentWriter, put: PUTS, stamp: int, place: int | None = None
) -> tuple[bytes, bytes, bytes]:
    """(head, payload, what the footer keeps of the payload), as the store makes them."""
    kind, key, tag, meta, payload = put
    length = len(payload)
    if kind == f.PUT:
        checksum = f.value_sum(payload, f.key_digest(key, SEED)[0], 0)
    elif kind == f.LARGE:
        length, checksum = 10**7, 5
        payload = payload[:8].ljust(8, b".") + noise(f.large_payload(length) - 8, stamp)
    else:
        checksum = f.value_sum(payload, 0, 0)
    head = f.pack_record(
        SEED, writer.next_place if place is None else place, kind, 0x10 if kind == f.LARGE else 0,
        key, tag, meta, length, stamp, stamp + 5 if stamp % 2 else 0, stamp, checksum,
    )  # fmt: skip
    return head, payload, b"" if kind == f.PUT else payload[:8] if kind == f.LARGE else payload


def fill(writer: SegmentWriter, puts: list[PUTS]) -> list[tuple[int, int]]:
    """Append all; where each lies."""
    ranges = []
    for stamp, put in enumerate(puts, 1):
        start = writer.tail
        writer.append(*packed(writer, put, stamp))
        ranges.append((start, writer.tail))
    return ranges


def some_puts(seed: int, count: int, longest: int = 3000) -> list[PUTS]:
    chosen = random.Random(seed)
    puts = []
    for i in range(count):
        kind = chosen.choice((f.PUT, f.PUT, f.PUT, f.LARGE, f.REMOVE, f.CLEAR, f.TOUCH))
        key, tag, meta = (noise(chosen.randrange(60), 3 * i + j) for j in range(3))
        if kind in (f.REMOVE, f.TOUCH):
            payload = noise(24 if kind == f.TOUCH else 16 * chosen.randrange(1, 9), i)
        else:
            payload = b"" if kind == f.CLEAR else noise(chosen.randrange(longest), i)
        puts.append((kind, key, tag, meta, payload))
    return puts


def scanned(path: Path, number: int = NUMBER, seed: int = SEED) -> list[Record]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(scan(BACKEND, fd, number, seed))
    finally:
        os.close(fd)


def footer(path: Path) -> list[Record] | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        found = read_footer(BACKEND, fd)
        return None if found is None else list(found)
    finally:
        os.close(fd)


def records(path: Path) -> list[Record]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(read_records(BACKEND, fd, NUMBER, IDENTITY))
    finally:
        os.close(fd)


def seal(writer: SegmentWriter) -> int:
    size = writer.seal()
    writer.close(sync=False)
    return size


def expect(found: list[Record], puts: list[PUTS], ranges: list[tuple[int, int]]) -> None:
    assert [(r.offset, r.offset + r.head.record_bytes) for r in found] == ranges
    for stamp, (record, put) in enumerate(zip(found, puts, strict=True), 1):
        kind, key, tag, _, payload = put
        assert (record.head.kind, record.key, record.tag, record.head.stamp) == (kind, key, tag, stamp)
        kept = {f.PUT: b"", f.LARGE: payload[:8].ljust(8, b".")}.get(kind, payload)
        assert record.payload == kept
        assert record.digest(SEED) == f.key_digest(key, SEED)


# -- footers and scans --------------------------------------------------------------------------

some_bytes = st.binary(max_size=40)
a_put = st.one_of(
    st.tuples(st.just(f.PUT), some_bytes, some_bytes, some_bytes, st.binary(max_size=3000)),
    st.tuples(st.just(f.LARGE), some_bytes, some_bytes, some_bytes, some_bytes),
    st.tuples(
        st.just(f.REMOVE),
        st.just(b""),
        st.just(b""),
        st.just(b""),
        st.binary(max_size=20).map(lambda b: b[:1] * 32),
    ),
    st.tuples(st.just(f.CLEAR), st.just(b""), st.just(b""), st.just(b""), st.just(b"")),
    st.tuples(
        st.just(f.TOUCH), st.just(b""), st.just(b""), st.just(b""), st.binary(min_size=24, max_size=24)
    ),
)


@given(st.lists(a_put, max_size=30), st.booleans())
@settings(max_examples=150)
def test_footer_and_scan_agree(tmp_path_factory: Any, puts: list[PUTS], at_once: bool) -> None:
    path = tmp_path_factory.mktemp("segment") / "s"
    writer = begin(path)
    if at_once:
        todo, ranges, tail = [], [], writer.tail
        for stamp, put in enumerate(puts, 1):
            head, payload, listed = packed(writer, put, stamp, f.pack_place(NUMBER, tail))
            todo.append((head, payload, listed))
            ranges.append((tail, tail + len(head) + f.aligned(len(payload))))
            tail = ranges[-1][1]
        writer.append_many(todo)
        assert writer.tail == tail
    else:
        ranges = fill(writer, puts)
    assert all(start % f.ALIGN == 0 for start, _ in ranges)
    tail = writer.tail
    size = seal(writer)
    assert size == os.path.getsize(path)
    expect(scanned(path), puts, ranges)
    listed_records = footer(path)
    if size > tail:
        assert listed_records == scanned(path) == records(path)
        assert (size - tail) * 4 <= tail
    else:
        assert listed_records is None
        assert records(path) == scanned(path)


def test_a_segment_larger_than_the_window(path: Path) -> None:
    puts: list[PUTS] = [(f.PUT, b"k%d" % i, b"", b"", noise(200_000 + i, i)) for i in range(30)]
    puts.insert(7, (f.PUT, b"long", b"tag", b"", noise(3 << 20)))
    puts.insert(20, (f.REMOVE, b"", b"", b"", noise(300_000)))
    writer = begin(path, 64 << 20)
    ranges = fill(writer, puts)
    seal(writer)
    expect(scanned(path), puts, ranges)
    expect(footer(path) or [], puts, ranges)


def test_values_that_look_like_records_are_none(path: Path) -> None:
    writer = begin(path)
    inner, payload, _ = packed(writer, (f.PUT, b"stolen", b"", b"", b"value"), 77)
    puts: list[PUTS] = [(f.PUT, b"k", b"", b"", (inner + payload).ljust(2000) * 3) for _ in range(5)]
    ranges = fill(writer, puts)
    seal(writer)
    expect(scanned(path), puts, ranges)
    with open(path, "r+b") as file:  # also where a scan has to look for the next record
        file.seek(ranges[1][0] + 30)
        file.write(b"damage")
    assert [r.offset for r in scanned(path)] == [start for start, _ in ranges[:1] + ranges[2:]]


def test_no_footer_for_tiny_records(path: Path) -> None:
    writer = begin(path)
    puts: list[PUTS] = [(f.PUT, b"key%d" % i, b"", b"", b"v") for i in range(3000)]
    ranges = fill(writer, puts)
    assert seal(writer) == ranges[-1][1] == os.path.getsize(path)
    assert footer(path) is None
    expect(records(path), puts, ranges)


def test_a_footer_for_ordinary_records(path: Path) -> None:
    writer = begin(path, 4 << 20)
    puts: list[PUTS] = [(f.PUT, b"key%d" % i, b"", b"", bytes(1000)) for i in range(2000)]
    ranges = fill(writer, puts)
    size = seal(writer)
    assert ranges[-1][1] < size <= 4 << 20
    expect(footer(path) or [], puts, ranges)
    fd = os.open(path, os.O_RDONLY)
    assert footer_bytes(BACKEND, fd) == size - ranges[-1][1]
    os.close(fd)


def test_room_is_kept_for_the_footer(path: Path) -> None:
    capacity = 20_000
    writer = begin(path, capacity)
    assert writer.room < 0  # nothing was granted yet
    writer.granted = capacity
    stamp, count = 0, 0
    while True:
        stamp += 1
        record = packed(writer, (f.PUT, b"key%d" % stamp, b"t", b"m", bytes(stamp * 37 % 900)), stamp)
        if f.room_for(len(b"key%dtm" % stamp), len(record[1])) > writer.room:
            break
        writer.append(*record)
        count += 1
    assert writer.room == capacity - writer.used >= 0
    assert seal(writer) <= capacity
    assert len(records(path)) == count


# -- torn, damaged, foreign ---------------------------------------------------------------------


def test_torn_at_every_byte(path: Path) -> None:
    puts = some_puts(1, 12, 150)
    writer = begin(path)
    ranges = fill(writer, puts)
    seal(writer)
    data, whole = path.read_bytes(), scanned(path)
    tail = ranges[-1][1]
    listed_size = len(data)
    for length in range(listed_size, f.SEGMENT_HEADER_BYTES - 1, -1):
        os.truncate(path, length)
        found = scanned(path)
        # A put's value may be missing: the reader of the value finds that out.
        least = [r for r, (_, end) in zip(whole, ranges, strict=True) if end <= length]
        assert found[: len(least)] == least
        assert found == whole[: len(found)]
        assert len(found) <= len(least) + 1
        for record in found[len(least) :]:
            # Nor need the sums of a large one be there: they are computed anew.
            held = f.PUT, f.LARGE
            assert record.head.kind in held or record.offset + record.head.record_bytes - length < f.ALIGN
        if length < listed_size:
            assert footer(path) is None
            assert records(path) == found
    assert tail <= listed_size
    for length in range(f.SEGMENT_HEADER_BYTES):
        path.write_bytes(data[:length])
        assert scanned(path) == []
        assert footer(path) is None
        fd = os.open(path, os.O_RDONLY)
        assert read_segment_header(BACKEND, fd) is None
        assert footer_bytes(BACKEND, fd) == 0
        os.close(fd)


@pytest.mark.parametrize("seed", range(20))
def test_goes_on_behind_a_damaged_record(path: Path, seed: int) -> None:
    print("seed", seed)
    chosen = random.Random(seed)
    puts = some_puts(seed, 40, 600)
    writer = begin(path)
    ranges = fill(writer, puts)
    writer.close(sync=False)
    whole, data = scanned(path), bytearray(path.read_bytes())
    expect(whole, puts, ranges)
    hit = set(chosen.sample(range(len(puts)), 6))
    for i in hit:
        record = whole[i]
        summed = f.RECORD_BYTES + record.head.names_length
        at = record.offset + chosen.randrange(summed)
        data[at] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)
    assert scanned(path) == [r for i, r in enumerate(whole) if i not in hit]


@pytest.mark.parametrize("seed", range(10))
def test_goes_on_behind_a_hole(path: Path, seed: int) -> None:
    """A page that never reached the disk."""
    print("seed", seed)
    puts = some_puts(seed, 300, 400)
    writer = begin(path)
    ranges = fill(writer, puts)
    writer.close(sync=False)
    whole, data = scanned(path), bytearray(path.read_bytes())
    start = random.Random(seed).randrange(1, len(data) // 4096 - 1) * 4096
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)
    found = scanned(path)
    outside = [r for r, (a, b) in zip(whole, ranges, strict=True) if b <= start or a >= start + 4096]
    assert [r for r in found if r in outside] == outside
    assert all(r in whole for r in found)


def test_every_bit_of_the_footer_counts(path: Path) -> None:
    puts: list[PUTS] = [(f.PUT, b"k%d" % i, b"", b"", bytes(900)) for i in range(4)]
    writer = begin(path)
    ranges = fill(writer, puts)
    size = seal(writer)
    data = path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    for bit in range(8 * ranges[-1][1], 8 * size):
        os.pwrite(fd, bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
        assert read_footer(BACKEND, fd) is None
        os.pwrite(fd, data[bit // 8 : bit // 8 + 1], bit // 8)
    assert footer(path) is not None
    os.pwrite(fd, b"!", size - 1)
    os.close(fd)
    expect(records(path), puts, ranges)


@given(
    st.binary(max_size=300), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
)
def test_any_trailer_is_survived(
    tmp_path_factory: Any, junk: bytes, count: int, start: int, tail: int
) -> None:
    path = tmp_path_factory.mktemp("segment") / "s"
    body = f.pack_segment_header(NUMBER, IDENTITY, 1, 0) + junk
    for at in (start, start % (len(body) + 1)):
        path.write_bytes(body + f.FOOTER_TRAILER.pack(f.FOOTER_MAGIC, count, at, tail) + bytes(8))
        assert footer(path) is None
        assert records(path) == []
        fd = os.open(path, os.O_RDONLY)
        assert 0 <= footer_bytes(BACKEND, fd) <= os.path.getsize(path)
        os.close(fd)


@given(st.binary(max_size=4000), st.lists(st.tuples(st.integers(0, 240), st.binary(max_size=60)), max_size=5))
def test_anything_may_stand_in_a_segment(
    tmp_path_factory: Any, junk: bytes, more: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("segment") / "s"
    data = bytearray(f.pack_segment_header(NUMBER, IDENTITY, 1, 0) + junk)
    for place, fields in more:
        data[64 + 16 * place : 64 + 16 * place + 4 + len(fields)] = f.RECORD_MAGIC + fields
    path.write_bytes(data)
    assert scanned(path) == []


def test_records_count_only_in_their_own_place(path: Path, tmp_path: Path) -> None:
    puts = some_puts(3, 20)
    writer = begin(path)
    ranges = fill(writer, puts)
    writer.close(sync=False)
    data = path.read_bytes()
    assert scanned(path, number=NUMBER + 1) == []  # renamed
    assert scanned(path, seed=SEED + 1) == []  # another cache's
    moved = bytearray(data[:64] + bytes(16) + data[64:])  # shifted
    path.write_bytes(moved)
    assert scanned(path) == []
    first, (third, fourth) = ranges[2][0], ranges[5]
    copied = bytearray(data)
    copied[first : first + fourth - third] = data[third:fourth]  # one record over another
    path.write_bytes(copied)
    assert first not in [r.offset for r in scanned(path)]


def test_swapped_segments_are_not_accepted(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths, NUMBER):
        writer = begin(path, number=number)
        fill(writer, [(f.PUT, b"k%d" % i, b"", b"", bytes(100)) for i in range(5)])
        writer.close(sync=False)
    contents = [path.read_bytes() for path in paths]
    for number, path, content in zip((NUMBER, NUMBER + 1), paths, reversed(contents), strict=True):
        path.write_bytes(content)
        assert scanned(path, number) == []
        fd = os.open(path, os.O_RDONLY)
        header = read_segment_header(BACKEND, fd)
        os.close(fd)
        assert header is not None and header.segment != number


def test_every_bit_of_the_header_counts() -> None:
    good = f.pack_segment_header(NUMBER, IDENTITY, 123, 45)
    assert len(good) == f.SEGMENT_HEADER_BYTES
    assert f.unpack_segment_header(good) == (f.FORMAT_VERSION, NUMBER, IDENTITY, 123, 45, False)
    log = f.pack_segment_header(NUMBER, IDENTITY, 123, 45, log=True)
    assert f.unpack_segment_header(log) == (f.FORMAT_VERSION, NUMBER, IDENTITY, 123, 45, True)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert f.unpack_segment_header(bytes(bad)) is None


# -- the writer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 10, 40])
@pytest.mark.parametrize("from_footer", [False, True])
def test_adoption_goes_on_where_another_stopped(path: Path, first: int, from_footer: bool) -> None:
    puts = some_puts(4, 40)
    writer = begin(path)
    stamps = iter(range(1, 100))
    ranges = []
    for put in puts[:first]:
        ranges.append((writer.tail, 0))
        writer.append(*packed(writer, put, next(stamps)))
    tail = writer.tail
    if from_footer:
        writer.seal()
    writer.close(sync=False)
    fd = os.open(path, os.O_RDWR)
    again = SegmentWriter(BACKEND, fd, NUMBER, 1 << 20)
    again.adopt(
        read_records(BACKEND, fd, NUMBER, IDENTITY) if from_footer else scan(BACKEND, fd, NUMBER, SEED)
    )
    assert again.tail == tail
    for put in puts[first:]:
        ranges.append((again.tail, 0))
        again.append(*packed(again, put, next(stamps)))
    ranges = [(a, b) for (a, _), b in zip(ranges, [a for a, _ in ranges[1:]] + [again.tail], strict=True)]
    again.cut()
    size = seal(again)
    os.truncate(path, size)
    expect(scanned(path), puts, ranges)
    assert footer(path) == scanned(path)


class Failing(ThreadsBackend):
    """Writes the first half, then fails."""

    failing = False

    def write(self, fd: int, buffers: Any, offset: int) -> None:
        if self.failing:
            data = b"".join(buffers)
            super().write(fd, [data[: len(data) * 9 // 10]], offset)
            raise OSError(28, "No space left on device")
        super().write(fd, buffers, offset)


def test_a_failed_append_leaves_nothing(path: Path) -> None:
    backend = Failing()
    writer = begin(path)
    writer._backend = backend
    puts = some_puts(5, 10)
    ranges = fill(writer, puts)
    before = path.read_bytes(), writer.tail, writer.room
    backend.failing = True
    for records_ in ([packed(writer, puts[0], 50)], [packed(writer, put, 60) for put in puts]):
        with pytest.raises(OSError):
            writer.append(*records_[0]) if len(records_) == 1 else writer.append_many(records_)
        assert (path.read_bytes(), writer.tail, writer.room) == before
    backend.failing = False
    seal(writer)
    expect(scanned(path), puts, ranges)


def test_a_voided_record_is_none_any_more(path: Path) -> None:
    writer = begin(path)
    puts: list[PUTS] = [(f.PUT, b"k%d" % i, b"", b"", bytes(1000 + i)) for i in range(6)]
    ranges = fill(writer, puts)
    writer.void(ranges[2][0])
    writer.void(ranges[5][0])
    seal(writer)
    assert footer(path) is not None
    for found in (scanned(path), footer(path), records(path)):
        assert [r.offset for r in found or ()] == [ranges[i][0] for i in (0, 1, 3, 4)]


def test_sync_is_shared_and_close_is_idempotent(path: Path) -> None:
    synced: list[int] = []

    class Counting(ThreadsBackend):
        def sync(self, fd: int) -> None:
            synced.append(fd)

    writer = begin(path)
    writer._backend = Counting()
    fill(writer, some_puts(6, 5))
    middle = writer.tail - 100
    writer.sync(middle)
    writer.sync(middle)
    writer.sync(writer.tail)
    assert len(synced) == 1 and writer.synced == writer.tail
    fill(writer, some_puts(7, 1))
    writer.sync(writer.tail)
    assert len(synced) == 2
    writer.close(sync=True)
    writer.close(sync=True)
    writer.sync(writer.tail)
    assert len(synced) == 3 and writer.fd == -1


# -- descriptors --------------------------------------------------------------------------------


@pytest.fixture
def segments(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "segments"
    directory.mkdir()
    for number in range(1, 21):
        (directory / f.segment_name(number)).write_bytes(struct.pack("<Q", number))
    yield directory


def test_descriptors_are_bounded_and_renewed(segments: Path) -> None:
    alive = set(range(1, 21))
    files = SegmentFiles(BACKEND, str(segments), 5)
    files.is_listed = alive.__contains__
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for number in range(1, 21):
            fd = files.get(number)
            assert os.pread(fd, 8, 0) == struct.pack("<Q", number)
            assert files.get(number) == fd
            assert len(files.open_files) <= 5
    with pytest.raises(FileNotFoundError):
        files.get(99)
    words = memoryview(files.table(8)).cast("Q")
    for number, fd in files.open_files.items():
        assert words[number % 8] in {
            s << 32 | d + 1 for s, d in files.open_files.items() if s % 8 == number % 8
        }
        assert fd >= 0
    open_now = set(files.open_files)
    gone = min(open_now)
    alive.discard(gone)
    files.get(min(set(range(1, 21)) - open_now))
    assert gone not in files.open_files
    last = next(iter(files.open_files))
    files.forget(last)
    files.forget(last)
    assert last not in files.open_files
    assert all(word >> 32 != last for word in words)
    files.close()
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(words)
    with pytest.raises(ClosedError):
        files.get(1)


def test_a_retired_descriptor_stays_open_for_a_while(segments: Path) -> None:
    files = SegmentFiles(BACKEND, str(segments), 50)
    fd = files.get(1)
    files.forget(1)
    assert os.pread(fd, 8, 0) == struct.pack("<Q", 1)  # whoever had it may go on
    assert files.get(1) != fd
    files.close()


def test_no_descriptors_left_in_the_process(segments: Path) -> None:
    class Few(ThreadsBackend):
        opened: set[int] = set()

        def open(self, path: str, flags: int, mode: int = 0o600) -> int:
            if len(self.opened) >= 4:
                raise OSError(24, "Too many open files")
            self.opened.add(fd := super().open(path, flags, mode))
            return fd

        def close_file(self, fd: int) -> None:
            self.opened.discard(fd)
            super().close_file(fd)

    files = SegmentFiles(Few(), str(segments), 50)
    for number in range(1, 21):
        assert os.pread(files.get(number), 8, 0) == struct.pack("<Q", number)
    files.close()
    assert not Few.opened
