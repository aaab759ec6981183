"""Damage with intent: blocks lost, files grown, every field of every structure at its extremes, its checksum valid.

What changes a file goes by the structures of the format module, so that a new field is hit as well.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from yatagarasu_cache.store import format as f

EXTREMES = (0, 1, 2, 1 << 31, f.MASK32, 1 << 62, (1 << 63) - 1, 1 << 63, f.MASK64, f.LAST_CLOCK, f.LAST_STAMP + 1)
Change = Callable[[Path, random.Random], str]


def wild(value: int, rng: random.Random) -> int:
    """Another value of a field: an extreme, a neighbour, or with a flipped bit."""
    bit = 1 << rng.randrange(64)
    return rng.choice((*EXTREMES, value + 1, value - 1, value ^ bit, value ^ bit, value ^ 1 << rng.randrange(24)))


def _edit(data: bytearray, layout: struct.Struct, at: int, rng: random.Random, fields: list[int]) -> str:
    """Change one of some integer fields of a packed structure, cut to what it can hold."""
    values = list(layout.unpack_from(data, at))
    field = rng.choice(fields)
    if isinstance(values[field], float):
        values[field] = rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
    else:
        values[field] = wild(values[field], rng) & (1 << 8 * _width(layout, field)) - 1
    layout.pack_into(data, at, *values)
    return f"field {field} = {values[field]:#x}" if isinstance(values[field], int) else f"field {field}"


def _width(layout: struct.Struct, field: int) -> int:
    """Bytes of an integer field."""
    return struct.calcsize("<" + _codes(layout.format)[field])


def _codes(layout: str) -> list[str]:
    """The format of each field: "<8sII" gives 8s, I, I."""
    found, number = [], ""
    for code in layout.lstrip("<@"):
        if code.isdigit():
            number += code
        elif code == "s":
            found.append(number + code)
            number = ""
        else:
            found += [code] * int(number or 1)
            number = ""
    return found


def _integers(layout: struct.Struct, first: int = 0) -> list[int]:
    codes = _codes(layout.format)
    return [i for i in range(first, len(codes)) if not codes[i].endswith("s")]


# -- blocks, noise, growth ----------------------------------------------------------------------


def zero_blocks(path: Path, rng: random.Random) -> str:
    """One block, or a share of all: what a disk or a file system loses it loses in these."""
    size, block = path.stat().st_size, rng.choice((512, 4096))
    count = -(-size // block)
    share = rng.choice((0.0, 0.0, 0.1, 0.5))
    hit = sorted({rng.randrange(max(1, count)), *(i for i in range(count) if rng.random() < share)})
    with path.open("r+b") as file:
        for i in hit:
            file.seek(i * block)
            file.write(bytes(min(block, max(0, size - i * block))))
    return f"{len(hit)} of {count} blocks of {block} zeroed, the first {hit[0]}"


def noise_block(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    start = rng.randrange(size + 1) // 512 * 512
    length = min(rng.choice((8, 512, 4096)), size - start)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(rng.randbytes(max(0, length)))
    return f"noise from {start}, {length} bytes"


def grow(path: Path, rng: random.Random) -> str:
    """Bytes are appended, or a hole."""
    hole = rng.choice((0, 0, 4096, 5 << 20, 1 << 30))
    if hole:
        os.truncate(path, path.stat().st_size + hole)
    else:
        with path.open("ab") as file:
            file.write(rng.choice((bytes(64), bytes(5000), rng.randbytes(777), b"YREC" * 100)))
    return f"grown by {hole or 'bytes'}"


# -- fields of structures, with valid checksums ---------------------------------------------------


def content(path: Path) -> bytearray:
    """Of a file that has grown, what it began with."""
    with path.open("rb") as file:
        return bytearray(file.read(4 << 20))


def index_word(path: Path, rng: random.Random) -> str:
    """A word of the header, of a table entry in use, or of a slot in use; also two at once."""
    data = content(path)
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice((_header_word, _table_word, _slot_word))(data, rng)
        value = wild(struct.unpack_from("<Q", data, at)[0], rng) & f.MASK64
        struct.pack_into("<Q", data, at, value)
        done.append(f"word {at // 8} = {value:#x}")
    _write_over(path, data)
    return ", ".join(done)


def _write_over(path: Path, data: bytes | bytearray) -> None:
    """In place: others may have it mapped."""
    with path.open("r+b") as file:
        file.write(data)


def _header_word(data: bytearray, rng: random.Random) -> int:
    meant = [*range(f.W_CLEAN, f.W_SLACK + 1)]
    per_part = rng.choice((f.W_PARTITIONS, f.W_COUNTS, f.W_DELETED, f.W_TAGS)) + rng.randrange(f.PARTITIONS)
    return 8 * rng.choice((rng.choice(meant), rng.choice(meant), per_part))


def _table_end(data: bytearray) -> int:
    capacity: int = f.IDENTITY.unpack_from(data)[5]
    return f.HEADER_BYTES + capacity * f.ENTRY_BYTES


def _used_line(data: bytearray, rng: random.Random, start: int, end: int) -> int:
    used = [at for at in range(start, min(end, len(data) - 63), 64) if any(data[at : at + 8])]
    return (rng.choice(used) if used else 0) + 8 * rng.randrange(8)


def _table_word(data: bytearray, rng: random.Random) -> int:
    return _used_line(data, rng, f.HEADER_BYTES, _table_end(data))


def _slot_word(data: bytearray, rng: random.Random) -> int:
    return _used_line(data, rng, _table_end(data), len(data))


def identity(path: Path, rng: random.Random) -> str:
    data = content(path)
    done = _edit(data, f.IDENTITY, 0, rng, [2, 4, 5])  # a version that is not ours is refused
    struct.pack_into("<Q", data, f.IDENTITY.size, xxh3_64_intdigest(bytes(data[: f.IDENTITY.size])))
    _write_over(path, data)
    return f"identity, {done}"


def segment_header(path: Path, rng: random.Random) -> str:
    data = content(path)
    if len(data) < f.SEGMENT_HEADER_BYTES:
        return "too short"
    done = _edit(data, f.SEGMENT_HEADER, 0, rng, [2, 4, 5, 6])  # a version that is not ours is refused
    struct.pack_into("<Q", data, f.SEGMENT_HEADER_BYTES - 8, xxh3_64_intdigest(bytes(data[: f.SEGMENT_HEADER_BYTES - 8])))
    _write_over(path, data)
    return f"header, {done}"


def record(path: Path, rng: random.Random) -> str:
    """A field of a record's head, or the payload of a change."""
    data = content(path)
    found = [at for at in range(0, len(data) - f.RECORD_BYTES, f.ALIGN) if data[at : at + 4] == f.RECORD_MAGIC]
    if not found or len(data) < f.SEGMENT_HEADER_BYTES:
        return "no record"
    done = []
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.choice(found)
        done.append(f"record at {at}, {_edit(data, f.RECORD, at, rng, _integers(f.RECORD, 1))}")
        head = f.Head(*f.RECORD.unpack_from(data, at)[1:])
        if head.kind > f.LARGE and rng.random() < 0.5:  # a change, whose payload has a checksum
            start = at + head.head_bytes
            payload = bytes(data[start : start + min(head.payload_length, 4096)])
            struct.pack_into("<Q", data, at + f.RECORD.size - 8, f.value_sum(payload, 0, 0))
            head = f.Head(*f.RECORD.unpack_from(data, at)[1:])
        seal_record(data, at, path, head)
    _write_over(path, data)
    return ", ".join(done)


def seal_record(data: bytearray, at: int, path: Path, head: f.Head) -> None:
    """Make the checksum of a record's head valid."""
    segment, seed = f.parse_segment_name(path.name) or 0, f.SEGMENT_HEADER.unpack_from(data)[4]
    names = at + f.RECORD_BYTES
    summed = bytes(data[at : at + f.RECORD.size]) + bytes(data[names : names + head.names_length])
    place = f.pack_place(segment, at)
    data[at + f.RECORD.size : names] = xxh3_64_digest(summed, (seed ^ place) & f.MASK64)


def footer(path: Path, rng: random.Random) -> str:
    """A field of the trailer, or of an entry, or of the record in it."""
    data = content(path)
    at = len(data) - f.FOOTER_TRAILER_BYTES
    if at < f.SEGMENT_HEADER_BYTES or data[at : at + 8] != f.FOOTER_MAGIC:
        return "no footer"
    start = f.FOOTER_TRAILER.unpack_from(data, at)[2]
    kind = rng.randrange(3)
    if kind == 0:
        done = _edit(data, f.FOOTER_TRAILER, at, rng, [1, 2, 3])
    elif kind == 1 or start + f.FOOTER_ENTRY.size + f.RECORD_BYTES > at:
        done = _edit(data, f.FOOTER_ENTRY, start, rng, [0, 1])
    else:
        done = _edit(data, f.RECORD, start + f.FOOTER_ENTRY.size, rng, _integers(f.RECORD, 1))
    _, _, start, tail = f.FOOTER_TRAILER.unpack_from(data, at)
    body = bytes(data[min(start, at) : at + f.FOOTER_TRAILER.size])
    data[at + f.FOOTER_TRAILER.size :] = xxh3_64_digest(body, tail)
    _write_over(path, data)
    return f"footer, {('trailer', 'entry', 'record')[kind]}, {done}"


def saved(path: Path, rng: random.Random) -> str:
    """A field of the checkpoint: its header, its list of segments, a part, a slot."""
    data = content(path)
    at, end = f.CHECKPOINT_HEADER.size, len(data) - f.CHECKPOINT_SUM.size
    if end < at:
        return "too short"
    kind = rng.randrange(4)
    at += f.CHECKPOINT_HEADER.unpack_from(data)[6] * f.CHECKPOINT_SEGMENT.size
    if kind == 0 or at + f.CHECKPOINT_PART.size > end:
        done = _edit(data, f.CHECKPOINT_HEADER, 0, rng, _integers(f.CHECKPOINT_HEADER, 1))
    elif kind == 1 and at > f.CHECKPOINT_HEADER.size:
        done = _edit(data, f.CHECKPOINT_SEGMENT, f.CHECKPOINT_HEADER.size, rng, [0, 1])
    else:
        slots, parts = [], []
        while at < end:
            parts.append(at)
            live = f.CHECKPOINT_PART.unpack_from(data, at)[0]
            at += f.CHECKPOINT_PART.size
            slots += range(at, min(end, at + live * f.SLOT_BYTES), f.SLOT_BYTES)
            at += live * f.SLOT_BYTES
        if kind == 2 or not slots:
            done = _edit(data, f.CHECKPOINT_PART, rng.choice(parts), rng, [0, 1])
        elif rng.random() < 0.2:  # twice the same
            one, other = rng.choice(slots), rng.choice(slots)
            data[one : one + f.SLOT_BYTES] = data[other : other + f.SLOT_BYTES]
            done = f"slot {other} at {one}"
        else:
            done = _edit(data, f.SLOT, rng.choice(slots), rng, _integers(f.SLOT))
    data[end:] = f.CHECKPOINT_SUM.pack(xxh3_64_intdigest(bytes(data[:end])))
    _write_over(path, data)
    return f"checkpoint, {('header', 'segment', 'part', 'slot')[kind]}, {done}"


def settings(path: Path, rng: random.Random) -> str:
    data = content(path)
    if len(data) != f.SETTINGS.size:
        return "too short"
    done = _edit(data, f.SETTINGS, 0, rng, [1, 2, 3, 4])
    struct.pack_into("<Q", data, len(data) - 8, xxh3_64_intdigest(bytes(data[:-8])))
    _write_over(path, data)
    return f"settings, {done}"


def mark(path: Path, rng: random.Random) -> str:
    data = content(path)
    if len(data) < f.MARK.size:
        return "no mark"
    done = _edit(data, f.MARK, 0, rng, [0, 1, 2, 3])
    _write_over(path, data)
    return f"mark, {done}"


ANY: tuple[Change, ...] = (zero_blocks, noise_block, grow)
IN_PLACE: tuple[Change, ...] = (zero_blocks, noise_block)  # a mapping does not see more
CHANGES: dict[str, tuple[Change, ...]] = {
    "index": (index_word, index_word, index_word, zero_blocks, zero_blocks, identity, *ANY),
    "segments": (segment_header, record, record, footer, footer, *ANY),
    "checkpoint": (saved, saved, saved, *ANY),
    "settings": (settings, *ANY),
    "large": ANY,
    "writers": (mark,),
}
