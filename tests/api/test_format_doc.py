"""docs/format.md tells the truth about format.py, and the other way round.

The first half compares the document's tables with the constants and structs of the code, in both
directions. The second half reads a real cache with nothing but the tables and xxHash.
"""

from __future__ import annotations

import ast
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import ROOT
from xxhash import xxh3_64_digest, xxh3_64_intdigest, xxh3_128_digest

from yatagarasu_cache import DiskCache, codec
from yatagarasu_cache.codec import msgpack, scalars
from yatagarasu_cache.store import format as layout
from yatagarasu_cache.store.directory import boot_id

TEXT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")

# Constants of format.py that say nothing about files.
NOT_ON_DISK = frozenset({"LITTLE_ENDIAN", "LOCK_NAMES", "MASK32", "MASK64"})
KINDS = frozenset({"PUT", "LARGE", "REMOVE", "CLEAR", "TOUCH", "FLOOR"})
STATES = frozenset({"ACTIVE", "SEALED", "DOOMED", "LOG", "TAKEN"})
FLAGS = frozenset({"CODEC_FLAGS", "FLAG_LARGE", "FLAG_TERMS"})

Row = dict[str, str]


class Field(NamedTuple):
    """A row of a struct's table. `named`: the name is the code's, not just a description."""

    offset: int
    size: int
    name: str
    named: bool


# -- the document ------------------------------------------------------------------------------


def split_row(line: str) -> list[str]:
    """The cells of a table row; ``\\|`` is a bar within one."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables() -> Iterator[tuple[str, list[Row]]]:
    """(marker, rows by column name) of each table that follows an HTML comment."""
    for match in re.finditer(r"^<!-- ((?:table|struct): .+?) -->\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        head, rule, *rows = match[2].splitlines()
        assert set(rule) <= set("|-"), f"{match[1]}: no table"
        columns = split_row(head)
        yield match[1], [dict(zip(columns, split_row(row), strict=True)) for row in rows]


TABLES = dict(tables())


def table(name: str) -> list[Row]:
    return TABLES[f"table: {name}"]


def bare(cell: str) -> str:
    """A cell without its backticks."""
    return cell[1:-1] if len(cell) > 1 and cell[0] == cell[-1] == "`" else cell


def named_numbers(name: str, column: str) -> dict[str, int]:
    return {bare(row["Name"]): int(row[column]) for row in table(name)}


def struct_fields() -> dict[str, tuple[str, list[Field]]]:
    """Of each struct's table: the words behind its name in the marker, and its rows."""
    found = {}
    for marker, rows in TABLES.items():
        if marker.startswith("struct: "):
            name, _, source = marker.removeprefix("struct: ").partition(" ")
            fields = [
                Field(int(row["Offset"]), int(row["Size"]), bare(row["Field"]), row["Field"][0] == "`")
                for row in rows
            ]
            found[name] = source, fields
    return found


STRUCTS = struct_fields()


# -- the code ----------------------------------------------------------------------------------


def constants(prefix: str = "") -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layout).items()
        if name.isupper() and not name.startswith("_") and name.startswith(prefix)
    }


def struct_items(form: struct.Struct) -> list[tuple[int, int]]:
    """(offset, size) of each item of a struct."""
    order = form.format[0] if form.format[0] in "<@" else ""
    codes = re.findall(r"(\d*)([a-zA-Z])", form.format[len(order) :])
    items = [code for count, c in codes for code in ([f"{count}s"] if c == "s" else [c] * int(count or 1))]
    places = []
    offset = 0
    for item in items:
        size = struct.calcsize(order + item)
        places.append((offset, size))
        offset += size
    assert offset == form.size, "padding between items"
    return places


def unpacked_names(name: str, module: str) -> list[list[str]]:
    """The names that the code of `module` gives to the items of the struct `name`."""
    tree = ast.parse((ROOT / "yatagarasu_cache" / "store" / f"{module}.py").read_text(encoding="utf-8"))
    return [
        [target.id for target in node.targets[0].elts if isinstance(target, ast.Name)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and re.match(rf"(\w+\.)?{name}\.unpack(_from)?\(", ast.unparse(node.value))
    ]


def expected_names(name: str, source: str) -> list[list[str]]:
    """What the fields of a struct must be called, by the source that its marker names."""
    kind, *words = source.split()
    if kind == "in":
        return unpacked_names(name, words[0])
    assert kind == "fields", source
    names: list[str] = []
    for word in words:
        names += getattr(layout, word)._fields if hasattr(layout, word) else [word]
    return [names]


# -- comparisons -------------------------------------------------------------------------------


def test_every_constant_is_in_some_table() -> None:
    """A constant that nobody documents, or documents twice, is found here."""
    documented = [
        bare(row["Name"])
        for name in ("names", "constants", "magics", "words", "entry words", "states", "kinds", "flags")
        for row in table(name)
    ]
    documented += [name for name in STRUCTS if not name.startswith("_")]
    documented += [bare(row["Word"]) for row in TABLES["struct: SLOT fields Slot"] if row["Word"]]
    documented += ["TAG_TEXT", "COUNTERS", "EVICTIONS", "SLOT_TAIL"]  # each has a test of its own
    assert sorted(documented) == sorted(constants().keys() - NOT_ON_DISK)


def test_names_of_files() -> None:
    documented = {bare(row["Name"]): bare(row["Value"]) for row in table("names")}
    assert documented == {name: value for name, value in constants().items() if isinstance(value, str)}


def test_tag_text() -> None:
    match = re.search(r"<!-- text: TAG_TEXT -->\n\n```text\n(.*?)```", TEXT, re.DOTALL)
    assert match is not None and match[1].encode() == layout.TAG_TEXT


def test_sizes_and_limits() -> None:
    other = KINDS | STATES | FLAGS | NOT_ON_DISK
    expected = {
        name: value
        for name, value in constants().items()
        if isinstance(value, int) and name not in other and name[:2] not in ("W_", "T_", "S_")
    }
    assert named_numbers("constants", "Value") == expected


def test_magics() -> None:
    documented = {bare(r["Name"]): bare(r["Bytes"]).encode().replace(b"\\0", b"\0") for r in table("magics")}
    assert documented == {name: value for name, value in constants().items() if name.endswith("_MAGIC")}


def test_header_words() -> None:
    rows = table("words")
    assert named_numbers("words", "Word") == constants("W_")
    end = layout.IDENTITY_SUM_WORD + 1
    for row in rows:
        assert int(row["Offset"]) == 8 * int(row["Word"]), row
        assert int(row["Word"]) >= end, f"{row['Name']} overlaps what is before it"
        end = int(row["Word"]) + int(row["Words"])
    assert end <= layout.HEADER_BYTES // 8
    words = named_numbers("words", "Words")
    assert words["W_COUNTERS"] == len(layout.COUNTERS)
    assert words["W_BUSY"] * 8 == layout.JOURNAL.size
    assert words["W_PARTITIONS"] == words["W_COUNTS"] == words["W_DELETED"] == layout.PARTITIONS


def test_counters() -> None:
    match = re.search(r"<!-- list: COUNTERS -->\n((?:.+\n)+)", TEXT)
    assert match is not None and tuple(re.findall(r"`(\w+)`", match[1])) == layout.COUNTERS


def test_policies() -> None:
    match = re.search(r"<!-- list: EVICTIONS -->\n((?:.+\n)+)", TEXT)
    assert match is not None and tuple(re.findall(r"`(\w+)`", match[1])) == layout.EVICTIONS


def test_words_of_a_segment_table_entry() -> None:
    assert named_numbers("entry words", "Word") == constants("T_")
    assert all(int(row["Offset"]) == 8 * int(row["Word"]) for row in table("entry words"))
    assert max(constants("T_").values()) < layout.ENTRY_WORDS


def test_words_of_a_slot() -> None:
    rows = [row for row in TABLES["struct: SLOT fields Slot"] if row["Word"]]
    assert {bare(row["Word"]): int(row["Offset"]) // 8 for row in rows} == constants("S_")
    head = layout.SLOT.size - layout.SLOT_TAIL.size
    assert f"`SLOT_TAIL`, {layout.SLOT_TAIL.size} bytes from offset {head}" in TEXT


def test_states_kinds_and_flags() -> None:
    assert named_numbers("states", "Value") == {name: getattr(layout, name) for name in STATES}
    assert named_numbers("kinds", "Kind") == {name: getattr(layout, name) for name in KINDS}
    assert named_numbers("flags", "Value") == {name: getattr(layout, name) for name in FLAGS}


def test_kinds_of_values() -> None:
    kinds = {n: v for n, v in vars(codec).items() if n.startswith("KIND_") and n != "KIND_MASK"}
    assert named_numbers("value kinds", "Kind") == kinds
    assert codec.KIND_MASK == layout.CODEC_FLAGS


def test_extensions_of_msgpack() -> None:
    numbers = [int(row["Extension"]) for row in table("extensions")]
    assert numbers == list(range(msgpack._EXT_ARRAY + 1))
    names = {tag: load.__name__.removeprefix("_load_") for tag, load in scalars.LOADERS.items() if hasattr(load, "__name__")}
    for row in table("extensions"):
        name = names.get(int(row["Extension"]), "").removeprefix("__getitem__")
        assert name.replace("zone", "").lower() in row["Value"].lower(), row


KEYS: list[codec.Key] = ["ab", b"ab", 3, 1.5, True, False, None, ("a", 1)]


def test_kinds_of_keys() -> None:
    first = {codec.encode_key(key)[:1].decode(): type(key).__name__ for key in KEYS}
    constants_of = {"t": "True", "f": "False", "n": "None"}
    assert {bare(row["First byte"]): row["Key"] for row in table("keys")} == first | constants_of


def test_every_struct_has_a_table() -> None:
    structs = {name for name, value in vars(layout).items() if isinstance(value, struct.Struct)}
    assert structs - {"SLOT_TAIL"} == STRUCTS.keys()


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_of_a_struct(name: str) -> None:
    source, fields = STRUCTS[name]
    items = struct_items(getattr(layout, name))
    assert [(field.offset, field.size) for field in fields[: len(items)]] == items
    sites = expected_names(name, source)
    assert sites, f"the code no longer unpacks {name} there"
    for names in sites:
        for field, expected in zip(fields[: len(items)], names, strict=True):
            assert expected == "_" or (field.named and field.name == expected), (name, field)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("IDENTITY", 8 * (layout.IDENTITY_SUM_WORD + 1)),
        ("SLOT", layout.SLOT_BYTES),
        ("SEGMENT_HEADER", layout.SEGMENT_HEADER_BYTES),
        ("RECORD", layout.RECORD_BYTES),
        ("FOOTER_TRAILER", layout.FOOTER_TRAILER_BYTES),
    ],
)
def test_whole_size_of_a_struct(name: str, size: int) -> None:
    """Structs behind which a checksum follows: the table has it, and the sizes add up."""
    _, fields = STRUCTS[name]
    assert fields[-1].offset + fields[-1].size == size
    extra = len(fields) - len(struct_items(getattr(layout, name)))
    assert [field.name for field in fields[len(fields) - extra :]] == ["checksum"] * extra


# -- a real cache, read by the document alone --------------------------------------------------

VALUES: dict[codec.Key, bytes] = {f"key-{i}": bytes([i]) * 3000 for i in range(12)}
LARGE_VALUE = b"large" * 20_000


class Reader:
    """Fields and constants as the document gives them; nothing of the package's own code."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.number = named_numbers("constants", "Value")
        self.word = named_numbers("words", "Word")
        self.entry_word = named_numbers("entry words", "Word")
        self.state = named_numbers("states", "Value")
        self.kind = named_numbers("kinds", "Kind")
        self.file = {bare(row["Name"]): bare(row["Value"]) for row in table("names")}
        self.index = (directory / self.file["INDEX_NAME"]).read_bytes()
        self.seed = self.value(self.index, 0, "IDENTITY", "seed")

    def raw(self, data: bytes, base: int, name: str, field: str) -> bytes:
        (found,) = (f for f in STRUCTS[name][1] if f.name == field)
        return data[base + found.offset : base + found.offset + found.size]

    def value(self, data: bytes, base: int, name: str, field: str) -> int:
        return int.from_bytes(self.raw(data, base, name, field), "little")

    def words(self, name: str, i: int = 0) -> int:
        at = 8 * (self.word[name] + i)
        return int.from_bytes(self.index[at : at + 8], "little")

    def segment(self, number: int) -> bytes:
        name = f"{number:08x}{self.file['SEGMENT_SUFFIX']}"
        return (self.directory / self.file["SEGMENTS_NAME"] / name).read_bytes()

    def digest(self, key: bytes) -> tuple[int, int]:
        data = xxh3_128_digest(key, self.seed)
        return int.from_bytes(data[:8], "little") | 2, int.from_bytes(data[8:], "little")

    def tag_hash(self, tag: bytes) -> int:
        return xxh3_64_intdigest(tag, self.seed) & 0xFFFFFFFF or 1

    def tagged(self, tag: bytes) -> set[tuple[int, int, int]]:
        """(low, high, stamp) of the cells that a tag leads to, found as the document says."""
        found = set()
        for part in range(self.number["PARTITIONS"]):
            descriptor = self.words("W_TAGS", part)
            if descriptor == self.number["UNTAGGED"]:
                continue
            slots = descriptor & self.number["CAPACITY_MASK"]
            base = (descriptor >> self.number["DESCRIPTOR_BITS"]) * self.number["SLOT_BYTES"]
            assert self.value(self.index, base, "TAG_TABLE", "descriptor") == descriptor
            first_chain = base + 8 * self.number["TAG_TABLE_WORDS"]
            chains = slots - self.number["TAG_TABLE_WORDS"]
            at = first_chain + 8 * (self.tag_hash(tag) % chains)
            chain = int.from_bytes(self.index[at : at + 8], "little")
            number = chain & 0xFFFFFFFF
            for _ in range(chain >> 32):
                cell = base + 8 * slots + 8 * self.number["TAG_CELL_WORDS"] * (number - 1)
                low, high, stamp, link = (
                    self.value(self.index, cell, "TAG_CELL", field) for field in ("low", "high", "stamp", "link")
                )
                if link >> 32 == self.tag_hash(tag):
                    found.add((low | self.number["DIGEST_BIT"], high, stamp))
                number = link & 0xFFFFFFFF
            assert number == self.number["NO_CELL"]
        return found

    def slot_of(self, low: int, high: int) -> int | None:
        """Offset of the slot of a digest, found as the document says."""
        descriptor = self.words("W_PARTITIONS", high & self.number["PARTITION_MASK"])
        first = descriptor >> self.number["DESCRIPTOR_BITS"]
        slots = descriptor & self.number["CAPACITY_MASK"]
        for step in range(slots):
            at = (first + (low + step) % slots) * self.number["SLOT_BYTES"]
            found = self.value(self.index, at, "SLOT", "low")
            if found == low and self.value(self.index, at, "SLOT", "high") == high:
                return at
            if found == self.number["EMPTY"]:
                return None
        return None

    def record(self, data: bytes, at: int) -> dict[str, Any]:
        """All fields of a record, its names, its payload, and where the next one begins."""
        found: dict[str, Any] = {
            field.name: self.value(data, at, "RECORD", field.name) for field in STRUCTS["RECORD"][1][1:]
        }
        found["magic"] = self.raw(data, at, "RECORD", "magic")
        names = at + self.number["RECORD_BYTES"]
        for part in ("key", "tag", "meta"):
            found[part] = data[names : names + found[f"{part}_length"]]
            names += found[f"{part}_length"]
        align = self.number["ALIGN"]
        found["payload_at"] = -(-names // align) * align
        length = found["value_length"]
        if found["kind"] == self.kind["LARGE"]:
            length = 8 + self.number["CHUNK_SUM_BYTES"] * -(-length // self.number["CHUNK_BYTES"])
        found["payload"] = data[found["payload_at"] : found["payload_at"] + length]
        found["next"] = found["payload_at"] + -(-length // align) * align
        return found


@pytest.fixture
def reader(directory: Path) -> Reader:
    """A closed cache with every kind of record, a footer, a large value and a checkpoint."""
    with DiskCache(directory, size_limit=1 << 21, backend="threads") as cache:
        for turn in range(2):
            for key, value in VALUES.items():
                cache.set(key, value, tag="group", meta={"n": 1}, expire=1000)
            cache.set("large", LARGE_VALUE)
            cache.set("deleted", b"2")
            cache.delete("deleted")
            if turn == 0:
                cache._store.checkpoints.write()
                cache.set("gone", b"1")
                cache.clear()
        cache.touch("key-0", 5000)
        for i in range(12, 24):
            cache.set(f"key-{i}", bytes([i]) * 3000)
    return Reader(directory)


def test_identity_and_words(reader: Reader) -> None:
    assert reader.raw(reader.index, 0, "IDENTITY", "magic") == b"YATAIDX\0"
    assert reader.value(reader.index, 0, "IDENTITY", "version") == reader.number["FORMAT_VERSION"]
    assert reader.value(reader.index, 0, "IDENTITY", "checksum") == xxh3_64_intdigest(reader.index[:48])
    assert reader.words("W_CLEAN") == 1
    at = 8 * reader.word["W_BOOT"]
    assert reader.index[at : at + 16] == boot_id()
    assert reader.words("W_INDEX_BYTES") == len(reader.index)
    block = reader.number["FILE_BLOCK"]
    assert reader.words("W_LARGE_BYTES") == (len(LARGE_VALUE) + block - 1) // block * block
    counters = dict(zip(layout.COUNTERS, (reader.words("W_COUNTERS", i) for i in range(7)), strict=True))
    assert counters["sets"] == 41 and counters["deletes"] == 2 and counters["hits"] == 0
    live = sum(reader.words("W_COUNTS", part) >> 32 for part in range(reader.number["PARTITIONS"]))
    assert live == 25


def test_every_value_by_its_slot(reader: Reader) -> None:
    for key, value in VALUES.items():
        encoded = b"s" + str(key).encode()
        at = reader.slot_of(*reader.digest(encoded))
        assert at is not None
        place = reader.value(reader.index, at, "SLOT", "place")
        lengths = reader.value(reader.index, at, "SLOT", "lengths")
        data = reader.segment(place >> 32)
        start = (place & 0xFFFFFFFF) << 4
        payload = start + ((lengths & 0xFFFF) << 4)
        assert lengths >> 24 == len(value) and lengths >> 16 & 0xFF == 0
        assert data[payload : payload + len(value)] == value
        low = reader.digest(encoded)[0]
        assert reader.value(reader.index, at, "SLOT", "value_sum") == xxh3_64_intdigest(value, low)
        record = reader.record(data, start)
        assert record["key"] == encoded and record["tag"] == b"sgroup" and record["payload"] == value
        assert record["stamp"] == reader.value(reader.index, at, "SLOT", "stamp")
        head = data[start : start + 56] + record["key"] + record["tag"] + record["meta"]
        assert data[start + 56 : start + 64] == xxh3_64_digest(head, reader.seed ^ place)


def test_every_tagged_entry_by_its_tag(reader: Reader) -> None:
    found = set()
    for low, high, stamp in reader.tagged(b"sgroup"):
        at = reader.slot_of(low, high)
        if at is not None and reader.value(reader.index, at, "SLOT", "stamp") == stamp:
            found.add((low, high))
    assert found == {reader.digest(b"s" + str(key).encode()) for key in VALUES}
    assert not reader.tagged(b"sanother")


def test_what_is_gone_has_no_slot(reader: Reader) -> None:
    assert reader.slot_of(*reader.digest(b"sgone")) is None
    assert reader.slot_of(*reader.digest(b"sdeleted")) is None


def test_a_touch_is_in_the_slot(reader: Reader) -> None:
    touched, other = (reader.slot_of(*reader.digest(key)) for key in (b"skey-0", b"skey-1"))
    assert touched is not None and other is not None
    moved = reader.value(reader.index, touched, "SLOT", "expires")
    assert moved - reader.value(reader.index, other, "SLOT", "expires") > 3990 * 10**9


def segments(reader: Reader) -> Iterator[tuple[int, bytes, bool]]:
    """(id, content, whether it is a log) of each segment of the table."""
    capacity = reader.value(reader.index, 0, "IDENTITY", "capacity")
    for i in range(capacity):
        base = reader.number["HEADER_BYTES"] + i * reader.number["ENTRY_BYTES"]
        words = {
            name: int.from_bytes(reader.index[base + 8 * word : base + 8 * word + 8], "little")
            for name, word in reader.entry_word.items()
        }
        if words["T_STATE"]:
            number = words["T_STATE"] & 0xFFFFFFFF
            state = words["T_STATE"] - number
            assert state in (reader.state["SEALED"], reader.state["LOG"])
            assert number % capacity == i and words["T_CLOSED"] == 0
            data = reader.segment(number)
            assert words["T_SIZE"] == len(data)
            yield number, data, state == reader.state["LOG"]


def test_segments_from_header_to_footer(reader: Reader) -> None:
    kinds: dict[bool, set[int]] = {True: set(), False: set()}
    footers = 0
    for number, data, log in segments(reader):
        fields = [field.name for field in STRUCTS["SEGMENT_HEADER"][1]]
        header = {name: reader.value(data, 0, "SEGMENT_HEADER", name) for name in fields}
        assert reader.raw(data, 0, "SEGMENT_HEADER", "magic") == (b"YATALOG\0" if log else b"YATASEG\0")
        assert (number == reader.words("W_LOG")) is log
        assert header["segment"] == number and header["seed"] == reader.seed
        assert header["checksum"] == xxh3_64_intdigest(data[:56])
        records = []
        at = reader.number["SEGMENT_HEADER_BYTES"]
        while data[at : at + 4] == b"YREC":
            record = reader.record(data, at)
            records.append((at, record))
            at = record["next"]
        kinds[log] |= {record["kind"] for _, record in records}
        if at < len(data) and not log:
            footers += 1
            check_footer(reader, data, at, records)
    assert kinds[False] == {reader.kind["PUT"], reader.kind["LARGE"]}
    assert kinds[True] == set(reader.kind.values()) - kinds[False], "not every kind of record was written"
    assert footers, "no segment has a footer"


def check_footer(reader: Reader, data: bytes, tail: int, records: list[tuple[int, dict[str, Any]]]) -> None:
    trailer = len(data) - reader.number["FOOTER_TRAILER_BYTES"]
    assert reader.raw(data, trailer, "FOOTER_TRAILER", "magic") == b"YATAFOOT"
    assert reader.value(data, trailer, "FOOTER_TRAILER", "count") == len(records)
    assert reader.value(data, trailer, "FOOTER_TRAILER", "start") == tail
    assert reader.value(data, trailer, "FOOTER_TRAILER", "tail") == tail
    assert data[-8:] == xxh3_64_digest(data[tail:-8], tail)
    at = tail
    for offset, record in records:
        kept = reader.value(data, at, "FOOTER_ENTRY", "kept")
        assert reader.value(data, at, "FOOTER_ENTRY", "offset") == offset
        at += 12
        names = record["key"] + record["tag"]
        assert data[at : at + 56] == data[offset : offset + 56]
        assert data[at + 64 : at + 64 + len(names)] == names
        at += 64 + len(names)
        large = record["kind"] == reader.kind["LARGE"]
        payload = record["payload"][:8] if large else b"" if record["kind"] == reader.kind["PUT"] else record["payload"]
        assert data[at : at + kept] == payload
        at += kept
    assert at == trailer


def test_payloads_of_changes(reader: Reader) -> None:
    for _, data, log in segments(reader):
        at = reader.number["SEGMENT_HEADER_BYTES"]
        while data[at : at + 4] == b"YREC":
            record = reader.record(data, at)
            at = record["next"]
            if record["kind"] == reader.kind["REMOVE"]:
                assert read_all(reader, record["payload"], "_TWO_WORDS") == [reader.digest(b"sdeleted")]
            elif record["kind"] == reader.kind["TOUCH"]:
                ((low, high, _),) = read_all(reader, record["payload"], "TOUCHED")
                assert (low, high) == reader.digest(b"skey-0")
            if log:
                assert record["value_sum"] == xxh3_64_intdigest(record["payload"])
                assert record["key"] == b"" and record["flags"] == 0


def read_all(reader: Reader, data: bytes, name: str) -> list[tuple[int, ...]]:
    """The items of a struct, as often as it fits into `data`."""
    fields = STRUCTS[name][1]
    size = fields[-1].offset + fields[-1].size
    assert len(data) % size == 0
    return [
        tuple(reader.value(data, at, name, field.name) for field in fields)
        for at in range(0, len(data), size)
    ]


def test_the_large_file(reader: Reader) -> None:
    low, high = reader.digest(b"slarge")
    at = reader.slot_of(low, high)
    assert at is not None
    place = reader.value(reader.index, at, "SLOT", "place")
    record = reader.record(reader.segment(place >> 32), (place & 0xFFFFFFFF) << 4)
    (pointer,) = read_all(reader, record["payload"][:8], "LARGE_POINTER")[0]
    path = reader.directory / reader.file["LARGE_NAME"] / f"{high:016x}{low:016x}-{pointer:016x}"
    assert path.read_bytes() == LARGE_VALUE
    assert record["kind"] == reader.kind["LARGE"] and record["flags"] == 0x10
    seed, chunk = low ^ 0x10, reader.number["CHUNK_BYTES"]
    chunks = [LARGE_VALUE[at : at + chunk] for at in range(0, len(LARGE_VALUE), chunk)]
    sums = b"".join(xxh3_64_intdigest(one, seed).to_bytes(8, "little") for one in chunks)
    assert len(chunks) == 2 and record["payload"][8:] == sums
    assert record["value_sum"] == xxh3_64_intdigest(sums, seed)


def test_the_checkpoint(reader: Reader) -> None:
    data = (reader.directory / reader.file["CHECKPOINT_NAME"]).read_bytes()
    assert reader.raw(data, 0, "CHECKPOINT_HEADER", "magic") == b"YATACKPT"
    assert reader.value(data, 0, "CHECKPOINT_HEADER", "seed") == reader.seed
    assert reader.value(data, 0, "CHECKPOINT_HEADER", "floor") == reader.words("W_FLOOR")
    count = reader.value(data, 0, "CHECKPOINT_HEADER", "count")
    at = layout.CHECKPOINT_HEADER.size + count * layout.CHECKPOINT_SEGMENT.size
    found = set()
    for part in range(reader.number["PARTITIONS"]):
        slots, tagged = (reader.value(data, at, "CHECKPOINT_PART", name) for name in ("slots", "tagged"))
        at += layout.CHECKPOINT_PART.size
        order = []
        for _ in range(slots):
            low = reader.value(data, at, "SLOT", "low")
            if low > reader.number["REMOVED"]:
                high = reader.value(data, at, "SLOT", "high")
                assert high & reader.number["PARTITION_MASK"] == part
                found.add((low, high))
            order.append(low)
            at += reader.number["SLOT_BYTES"]
        assert tagged in (0, slots)
        size = reader.number["TAG_HASH_BYTES"]
        for low in order[:tagged]:
            large = low == reader.digest(b"slarge")[0]
            assert int.from_bytes(data[at : at + size], "little") == (0 if large else reader.tag_hash(b"sgroup"))
            at += size
        at += -at % 8
    keys = [b"s" + str(key).encode() for key in VALUES] + [b"slarge"]
    assert found == {reader.digest(key) for key in keys}
    assert data[at:] == xxh3_64_intdigest(data[:at]).to_bytes(8, "little")
    assert reader.words("W_CHECKPOINT_BYTES") == len(data)


def test_owners_and_temporary_files(directory: Path) -> None:
    """The mark of a writing handle names its segment; a reading one leaves none."""
    with DiskCache(directory, backend="threads") as cache:
        assert os.listdir(directory / "writers") == []
        cache.set("k", b"v")
        (name,) = os.listdir(directory / "writers")
        assert re.fullmatch(r"[0-9a-f]{16}\.lock", name)
        data = (directory / "writers" / name).read_bytes()
        segment, _log = sorted(os.listdir(directory / "segments"))
        assert segment == f"{int.from_bytes(data[:8], 'little'):08x}.seg" and data[8:] == bytes(24)
        temporary = os.path.relpath(cache._store.temporaries.path(), directory)
        assert re.fullmatch(rf"tmp/{name[:16]}-[0-9a-f]+\.tmp", temporary)
        with DiskCache(directory, backend="threads", read_only=True) as reading:
            assert reading.get("k") == b"v"
            assert os.listdir(directory / "writers") == [name]
    assert os.listdir(directory / "writers") == []


def test_a_footer_is_at_most_a_sixteenth(directory: Path) -> None:
    """Small values: the list would be larger than the records, so there is none."""
    with DiskCache(directory, backend="threads") as cache:
        for i in range(10):
            cache.set(i, b"x")
    for path in (directory / "segments").iterdir():
        assert b"YATAFOOT" not in path.read_bytes()
