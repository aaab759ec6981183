"""What is read from files is a structure that can be, or is refused: for any bytes, and for any fields under a valid
checksum. Never another exception, never much memory."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.store import cache_settings, checkpoint, segment
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.index import Index, IndexDamaged
from yatagarasu_cache.store.owners import Note

BACKEND = ThreadsBackend(workers=1)
IDENTITY = f.Identity(b"0123456789abcdef", 7)
EXTREMES = (0, 1, 63, 64, 4096, 1 << 24, 1 << 31, f.MASK32, 1 << 40, 1 << 62, 1 << 63, f.LAST_STAMP, f.MASK64)
WORD = st.one_of(st.sampled_from(EXTREMES), st.integers(0, f.MASK64))
HALF = WORD.map(lambda word: word & f.MASK32)
BYTE = WORD.map(lambda word: word & 0xFF)
LENGTH = st.one_of(st.integers(0, 90), HALF)
ANY = st.binary(max_size=700)
usual = settings.default.max_examples if settings.default else 100
examples = settings(max_examples=usual if usual > 200 else 25)  # more of them with HYPOTHESIS_PROFILE=long
MOST = 8 << 20  # bytes that a reader may take for some kilobytes of a file


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="yatagarasu-structures-") as directory:
        yield Path(directory) / "file"


def read_file(path: Path, data: bytes, read: Callable[[int], Any]) -> Any:
    """What `read` of a descriptor gives of a file with such content, within bounded memory."""
    path.write_bytes(data)
    fd = os.open(path, os.O_RDWR)
    try:
        tracemalloc.start()
        found = read(fd)
        if isinstance(found, Iterator):
            found = list(found)
        assert tracemalloc.get_traced_memory()[1] < MOST
        return found
    finally:
        tracemalloc.stop()
        os.close(fd)


HEADS = st.builds(
    f.Head, st.integers(0, 8), st.sampled_from((0, 1, f.FLAG_LARGE, 0xFF)), st.one_of(st.integers(0, 40), st.just(0xFFFF)),
    LENGTH, LENGTH, st.one_of(st.integers(0, 64), WORD), WORD, WORD, WORD, WORD,
)  # fmt: skip


def packed(head: f.Head) -> bytes:
    return f.RECORD.pack(f.RECORD_MAGIC, *head)


def check_head(head: f.Head) -> None:
    assert head.head_bytes <= f.MAX_HEAD_BYTES and head.payload_length <= f.MAX_VALUE_BYTES
    assert head.stamp <= f.LAST_STAMP and f.PUT <= head.kind <= f.FLOOR
    assert f.SLOT.pack(1, 1, 1, head.lengths, 1, head.stamp, head.expires, 1)


# -- records ------------------------------------------------------------------------------------


@examples
@given(data=st.one_of(ANY, st.builds(lambda head, rest: packed(head) + rest, HEADS, ANY)), offset=st.integers(0, 800))
def test_head(data: bytes, offset: int) -> None:
    head = f.unpack_head(data, offset)
    if head is not None:
        check_head(head)
        assert f.verify_head(data, offset, head, 7, 1 << 32) in (True, False)


def sealed_record(head: f.Head, rest: bytes, place: int) -> bytes:
    """A record whose checksum is valid, as far as its names are there."""
    fixed = packed(head)
    checksum = xxh3_64_digest(fixed + rest[: head.names_length], IDENTITY.seed ^ place)
    return fixed + checksum + rest


@examples
@given(data=st.one_of(ANY, st.builds(lambda head, rest: (head, rest), HEADS, ANY)))
def test_scan(path: Path, data: Any) -> None:
    start = f.SEGMENT_HEADER_BYTES
    if isinstance(data, tuple):
        data = sealed_record(*data, f.pack_place(1, start)) + sealed_record(*data, f.pack_place(1, start + 64))
    found = read_file(path, bytes(start) + data, lambda fd: segment.scan(BACKEND, fd, 1, IDENTITY.seed))
    for record in found:
        check_head(record.head)
        assert len(record.key) == record.head.key_length and len(record.tag) == record.head.tag_length
        assert start <= record.offset <= start + len(data) - f.RECORD_BYTES


# -- footers ------------------------------------------------------------------------------------

FOOTER_ENTRIES = st.builds(
    lambda offset, kept, head, rest: f.FOOTER_ENTRY.pack(offset, kept) + packed(head) + bytes(8) + rest,
    st.one_of(st.integers(0, 40).map(lambda n: n * 16), WORD), st.one_of(st.sampled_from((0, 8)), HALF), HEADS, st.binary(max_size=80),
)  # fmt: skip


@examples
@given(
    entries=st.lists(FOOTER_ENTRIES, max_size=4), count=st.one_of(st.integers(0, 5), WORD),
    start=st.one_of(st.none(), WORD), records=st.integers(0, 30),
)  # fmt: skip
def test_footer(path: Path, entries: list[bytes], count: int, start: int | None, records: int) -> None:
    tail = f.SEGMENT_HEADER_BYTES + 64 * records
    start = tail if start is None else start
    body = b"".join(entries) + f.FOOTER_TRAILER.pack(f.FOOTER_MAGIC, count, start, start)
    data = bytes(tail) + body + xxh3_64_digest(body, start)
    found = read_file(path, data, lambda fd: segment.read_footer(BACKEND, fd))
    for record in found or ():
        check_head(record.head)
        assert f.SEGMENT_HEADER_BYTES <= record.offset <= tail - record.head.record_bytes
        assert f.pack_place(1, record.offset) >> 32 == 1
    assert 0 <= read_file(path, data, lambda fd: segment.footer_bytes(BACKEND, fd)) <= len(data)


@examples
@given(data=ANY)
def test_footer_of_any_bytes(path: Path, data: bytes) -> None:
    assert read_file(path, data, lambda fd: segment.read_footer(BACKEND, fd)) is None
    f.unpack_segment_header(data)


@examples
@given(magic=st.sampled_from((f.SEGMENT_MAGIC, f.LOG_MAGIC)), number=HALF, created=WORD, floor=WORD)
def test_segment_header(magic: bytes, number: int, created: int, floor: int) -> None:
    body = f.SEGMENT_HEADER.pack(magic, f.FORMAT_VERSION, number, *IDENTITY, created, floor, 0)[:-8]
    header = f.unpack_segment_header(body + struct.pack("<Q", xxh3_64_intdigest(body)))
    assert header is None or 0 < header.segment <= f.LAST_SEGMENT and max(header.created, header.floor) <= f.LAST_STAMP


# -- the index ----------------------------------------------------------------------------------


@examples
@given(
    capacity=st.one_of(st.sampled_from((4, 16)), WORD), partitions=st.sampled_from((f.PARTITIONS, 0, 1)),
    words=st.dictionaries(st.integers(f.W_CLEAN, 255), WORD, max_size=4), rest=st.lists(WORD, max_size=400),
    key=st.integers(2, f.MASK64),
)  # fmt: skip
def test_index(
    path: Path, capacity: int, partitions: int, words: dict[int, int], rest: list[int], key: int
) -> None:
    body = f.IDENTITY.pack(f.INDEX_MAGIC, f.FORMAT_VERSION, partitions, *IDENTITY, capacity)
    data = bytearray(f.HEADER_BYTES) + struct.pack(f"<{len(rest)}Q", *rest)
    data[: len(body) + 8] = body + struct.pack("<Q", xxh3_64_intdigest(body))
    for word, value in words.items():
        struct.pack_into("<Q", data, word * 8, value)
    read_file(path, data, lambda fd: use_index(str(path), key))


def use_index(path: str, key: int) -> None:
    """Everything that goes by what the words say: it works, or it says that the index is damaged."""
    index = None
    try:
        index = Index(BACKEND, path, os.open(path, os.O_RDWR))
        at = index.find(key | 2, key)
        for ask in (index.validate, index.count, index.segments, index.logs, index.stamp, index.repair, index.large_bytes):
            try:
                ask()
            except IndexDamaged:
                pass
        index.stamp_above(key)
        slot = f.Slot(key | 2, key, f.pack_place(3, 64), f.pack_lengths(100, 0, 64), 1, index.stamp(), 0, 1)
        index.put(slot, at)
        index.remove(index.find(key | 2, key))
        index.add_segment(3, f.ACTIVE, 100, 1, 1)
        index.settle(slot.place, 160)
        index.next_segment_id()
        index.drop_segment(3)
        assert index.used_bytes >= 0 and index.live_bytes >= 0
    except IndexDamaged:
        pass
    finally:
        if index is not None:
            index.close()


@examples
@given(data=st.binary(max_size=200))
def test_identity_of_any_bytes(data: bytes) -> None:
    assert f.unpack_identity(data) is None


# -- the checkpoint -----------------------------------------------------------------------------


def slot_of(part: int, number: int, **fields: int) -> f.Slot:
    slot = f.Slot(number << 8 | 2, number << 8 | part, f.pack_place(1, 64), f.pack_lengths(9, 0, 80), 5, 6, 0, 6)
    return slot._replace(**fields)


def pack_checkpoint(parts: list[list[f.Slot]], floor: int = 9, count: int | None = None, live: int | None = None) -> bytes:
    body = f.CHECKPOINT_HEADER.pack(
        f.CHECKPOINT_MAGIC, f.FORMAT_VERSION, f.PARTITIONS, *IDENTITY, floor, 1 if count is None else count, 1
    )  # fmt: skip
    body += f.CHECKPOINT_SEGMENT.pack(1, 100)
    for number, part in enumerate(parts):
        body += f.CHECKPOINT_PART.pack(live if live is not None and number == 3 else len(part), 0)
        body += b"".join(f.SLOT.pack(*slot) for slot in part)
    return body + f.CHECKPOINT_SUM.pack(xxh3_64_intdigest(body))


def read_checkpoint(path: Path, data: bytes) -> Any:
    (path.parent / f.CHECKPOINT_NAME).write_bytes(data)
    return read_file(path, b"", lambda fd: checkpoint.read(BACKEND, str(path.parent)))


PARTS = [[slot_of(part, number) for number in range(1, 4)] for part in range(f.PARTITIONS)]


def test_checkpoint(path: Path) -> None:
    found = read_checkpoint(path, pack_checkpoint(PARTS))
    assert found is not None and len(found.parts) == f.PARTITIONS
    assert [len(part) for part in found.parts] == [3 * f.SLOT_BYTES] * f.PARTITIONS


@examples
@given(field=st.sampled_from(f.Slot._fields), value=WORD)
def test_slot_of_a_checkpoint(path: Path, field: str, value: int) -> None:
    parts = [list(part) for part in PARTS]
    parts[3][1] = parts[3][1]._replace(**{field: value})
    found = read_checkpoint(path, pack_checkpoint(parts))
    assert found is None or parts[3][1].is_possible


@pytest.mark.parametrize("what", ["twice", "another partition", "zeros", "removed", "no segment", "no head"])
def test_senseless_slot_of_a_checkpoint(path: Path, what: str) -> None:
    parts = [list(part) for part in PARTS]
    parts[3][1] = {
        "twice": parts[3][0], "another partition": slot_of(4, 9), "zeros": f.Slot(*[0] * 8), "removed": slot_of(3, 9, low=1),
        "no segment": slot_of(3, 9, place=4), "no head": slot_of(3, 9, lengths=9 << 24),
    }[what]  # fmt: skip
    assert read_checkpoint(path, pack_checkpoint(parts)) is None


@pytest.mark.parametrize("value", EXTREMES)
def test_counts_of_a_checkpoint(path: Path, value: int) -> None:
    assert read_checkpoint(path, pack_checkpoint(PARTS, live=value)) is None
    if value != 1:
        assert read_checkpoint(path, pack_checkpoint(PARTS, count=value)) is None
    found = read_checkpoint(path, pack_checkpoint(PARTS, floor=value))
    assert (found is None) == (value > f.LAST_STAMP)


def test_checkpoint_with_a_hole(path: Path) -> None:
    """A length that its content claims, and has not: what is read is what is there, not what is said to be."""
    parts = [list(part) for part in PARTS]
    data = pack_checkpoint(parts, live=1 << 24)
    (path.parent / f.CHECKPOINT_NAME).write_bytes(data)
    os.truncate(path.parent / f.CHECKPOINT_NAME, 2 << 30)
    assert read_file(path, b"", lambda fd: checkpoint.read(BACKEND, str(path.parent))) is None


@examples
@given(data=ANY)
def test_checkpoint_of_any_bytes(path: Path, data: bytes) -> None:
    assert read_checkpoint(path, data) is None


# -- marks, settings, names ---------------------------------------------------------------------


@examples
@given(data=st.one_of(ANY, st.builds(lambda *words: f.MARK.pack(*words) + bytes(80), WORD, WORD, WORD, st.one_of(st.integers(0, 12), WORD))))
def test_mark(data: bytes) -> None:
    note = Note.unpack(data)
    assert note.segment <= f.LAST_SEGMENT and max(note.storing, note.leaving) <= f.MOST_BYTES
    assert len(note.named) * 8 <= len(data)
    assert Note.unpack(note.pack()) is not None


@examples
@given(code=HALF, limit=WORD, headroom=st.floats())
def test_settings(path: Path, code: int, limit: int, headroom: float) -> None:
    body = f.SETTINGS.pack(f.SETTINGS_MAGIC, f.FORMAT_VERSION, code, limit, headroom, 0)[:-8]
    (path.parent / f.SETTINGS_NAME).write_bytes(body + xxh3_64_intdigest(body).to_bytes(8, "little"))
    found = cache_settings.read(BACKEND, str(path.parent))
    assert found is None or found.eviction in f.EVICTIONS and found.size_limit == limit


@examples
@given(data=ANY)
def test_settings_of_any_bytes(path: Path, data: bytes) -> None:
    (path.parent / f.SETTINGS_NAME).write_bytes(data)
    assert cache_settings.read(BACKEND, str(path.parent)) is None


@examples
@given(payload=ANY)
def test_digests(payload: bytes) -> None:
    assert len(f.unpack_digests(payload)) == len(payload) // 16


@examples
@given(name=st.text(max_size=60))
def test_names(name: str) -> None:
    for parse in (f.parse_segment_name, f.parse_temporary_name, f.parse_writer_name, f.parse_large_name):
        parse(name)
