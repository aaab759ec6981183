"""The on-disk layout, in one place. `docs/format.md` describes the same, byte by byte.

Everything is little-endian. Words are 8 bytes, aligned, and counted from the start of the file,
so that one aligned store changes one of them. Nothing here does I/O.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from xxhash import xxh3_64_digest, xxh3_64_intdigest, xxh3_128_digest

FORMAT_VERSION = 7
LITTLE_ENDIAN = sys.byteorder == "little"

# -- names inside a cache directory -----------------------------------------------------------

INDEX_NAME = "index"
LOCK_NAME = "lock"
USERS_NAME = "users"
CHECKPOINT_NAME = "checkpoint"
CHECKPOINT_LOCK_NAME = "checkpoint.lock"
RECLAIM_LOCK_NAME = "reclaim.lock"
KEYS_LOCK_NAME = "keys.lock"
SETTINGS_NAME = "settings"
TAG_NAME = "CACHEDIR.TAG"
SEGMENTS_NAME = "segments"
LARGE_NAME = "large"
TEMPORARY_NAME = "tmp"
WRITERS_NAME = "writers"
SEGMENT_SUFFIX = ".seg"
TEMPORARY_SUFFIX = ".tmp"
VALUE_SUFFIX = ".value.tmp"
WRITER_SUFFIX = ".lock"

# The first line is fixed by https://bford.info/cachedir/ ; the second makes the directory ours.
TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This directory is a cache of yatagarasu_cache. Its content can be removed at any time.\n"
)

FILE_BLOCK = 4096  # what file systems give to a file at least, and a multiple of: ext4, xfs, btrfs, tmpfs
MAX_STAMP = 1 << 63  # no clock gets there: a higher stamp is damage
LAST_CLOCK = MAX_STAMP - (1 << 56)  # a clock beyond this (the year 2259) is not believed
LAST_STAMP = LAST_CLOCK + (1 << 54)  # beyond it is damage: stamps go on by ones from LAST_CLOCK
AHEAD = 10 * 10**9  # nanoseconds: what was made so much later than now was made by a clock that was wrong
MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1

# -- the index file ---------------------------------------------------------------------------
# One page of header, the segment table, then the partitions' extents of 64-byte slots.

INDEX_MAGIC = b"YATAIDX\0"
HEADER_BYTES = 4096
SLOT_BYTES = 64
SLOT_WORDS = 8
PARTITIONS = 64
PARTITION_MASK = PARTITIONS - 1

# magic, version, partitions, cache id, hash seed, capacity of the segment table
IDENTITY = struct.Struct("<8sII16sQQ")
IDENTITY_SUM_WORD = IDENTITY.size // 8  # xxh3-64 of the identity; the words before never change

W_CLEAN = 8  # 1: closed in order, and everything was synced before this was
W_BOOT = 9  # two words: boot id of the kernel under which the index was last opened
W_SUPERSEDED = 11  # not 0: a newer index file has taken this one's place
W_CLOCK = 12  # highest stamp given out
W_NEXT_SEGMENT = 13  # next segment id
W_FLOOR = 14  # stamp that the newest checkpoint covers
W_EPOCH = 15  # changes when a checkpoint begins
W_PROMISED = 16  # 1: somebody was promised durability (a durable change, or flush())
W_SEGMENT_BYTES = 17  # bytes that all segments take, active ones with the room that was granted to them
W_LARGE_BYTES = 18  # bytes that large files take, those being written, or removed, included
W_LIVE_BYTES = 19  # bytes of live records in segments
W_INDEX_BYTES = 20  # bytes of the index file
W_CHECKPOINT_BYTES = 21  # bytes of the checkpoint file
W_WRITTEN = 22  # records written since the newest checkpoint, about
W_FLUSHED = 23  # large files with a lower pointer are durable, if an entry stood for them at the newest flush
W_COUNTERS = 24  # whole-cache counters, in the order of COUNTERS
COUNTERS = ("hits", "misses", "sets", "deletes", "evictions", "expirations", "corrupt")
W_LOG = 31  # id of the log of changes that is written to; 0 if the next change begins one
W_ACTIVE = 32  # segments to which some handle may append: active or taken
W_SIZE_LIMIT = 33  # settings of the whole cache: bytes on disk,
W_EVICTION = 34  # the policy: its place in EVICTIONS, counted from 1,
W_HEADROOM = 35  # a fraction, as a float's bits,
W_SETTINGS_SUM = 36  # and xxh3-64 of these three words
W_FILE = 37  # device and inode of the index file, 2 words
W_LEAVING = 39  # bytes that large files take whose entries are gone, and which are being removed
EVICTIONS = ("lru", "fifo", "lfu", "none")

W_BUSY = 40  # journal: what is being done, or 0; and what a slot becomes
BUSY_CHANGING = int.from_bytes(b"CHANGING", "little")  # no flipped bit makes these of 0
BUSY_CLEARING = int.from_bytes(b"CLEARING", "little")
BUSY_COUNTING = int.from_bytes(b"COUNTING", "little")
BUSY_SETTING = int.from_bytes(b"SETTINGS", "little")
BUSY_STORING = int.from_bytes(b"STORINGS", "little")  # what large files take, and what is noted of it
W_SLACK = 56  # of W_SEGMENT_BYTES: what segments leave of their last blocks
JOURNAL = struct.Struct("@QQQQQQQ64s")  # the fields of Journal
W_PARTITIONS = 64  # descriptors: first slot << 24 | slots
W_COUNTS = 128  # live slots << 32 | slots in use, removed ones included
W_DELETED = 192  # highest stamp of a committed removal, per partition
W_TAGS = 256  # descriptors of the partitions' tag tables, like theirs; or UNTAGGED
LAST_SEGMENT = MASK32 - 1  # the highest number of a segment
MAX_TABLE = 1 << 16  # entries of the segment table
DESCRIPTOR_BITS = 24
CAPACITY_MASK = (1 << DESCRIPTOR_BITS) - 1
SUPERSEDED_DESCRIPTOR = MASK64  # points beyond any file: readers fail over to the new index

# a slot: digest low, digest high, place, lengths, value checksum, stamp, expiry, access
SLOT = struct.Struct("@8Q")
SLOT_TAIL = struct.Struct("@6Q")  # all but the digest
EMPTY = 0  # digest low of a slot never used
REMOVED = 1  # digest low of a tombstone slot
DIGEST_BIT = 2  # of all others: always set
S_LOW, S_HIGH, S_PLACE, S_LENGTHS, S_SUM, S_STAMP, S_EXPIRES, S_ACCESS = 0, 1, 2, 3, 4, 5, 6, 7
# S_LENGTHS: bytes of the value << LENGTH_SHIFT | flags << FLAGS_SHIFT | bytes before the value / ALIGN
LENGTH_SHIFT, FLAGS_SHIFT, HEAD_MASK = 24, 16, 0xFFFF

# A partition's tag table: TAG_TABLE; then a chain, one word, for each further slot that the table takes: how
# many cells it has << 32 | the first of them; and from there on cells, counted from 1.
TAG_TABLE = struct.Struct("@QQQQ")  # the fields of TagTable
TAG_TABLE_WORDS = 4
TAG_CELL = struct.Struct("@QQQQ")  # the fields of TagCell
TAG_CELL_WORDS = 4
TAG_CELLS, TAG_CELL_SLOTS = 7, 4  # so many cells are in so many slots
NO_CELL = MASK32  # where the number of a cell could be
UNTAGGED = int.from_bytes(b"UNTAGGED", "little")  # where the descriptor of a tag table could be

# the segment table: one entry of 8 words for each id modulo its capacity
ENTRY_WORDS = 8
ENTRY_BYTES = 64
T_STATE, T_SIZE, T_LIVE, T_OWNER, T_CLOSED, T_SYNCED, T_CREATED, T_TAIL = 0, 1, 2, 3, 4, 5, 6, 7
T_CLEANER = T_CLOSED  # of a segment, where a log has T_CLOSED: the handle that cleans it, or 0
# T_STATE: id | state; 0 is a free entry. A doomed segment has nothing live, and its file is going.
# A log holds changes of entries in other segments. A taken segment is an active one in which nothing is
# shown any more, because others need its room; its owner, which lives, will notice at its next put.
ACTIVE, SEALED, DOOMED, LOG, TAKEN = 1 << 32, 2 << 32, 3 << 32, 4 << 32, 5 << 32

# -- segments ---------------------------------------------------------------------------------

SEGMENT_MAGIC = b"YATASEG\0"
LOG_MAGIC = b"YATALOG\0"
# magic, version, id, cache id, hash seed, created (stamp), floor (stamp), checksum of all before
SEGMENT_HEADER = struct.Struct("<8sII16sQQQQ")
SEGMENT_HEADER_BYTES = 64
ALIGN = 16  # records begin at multiples of this

MAX_SEGMENT_BYTES = ALIGN << 32  # places in a segment are counted in 32 bits: a longer file is damage
RECORD_MAGIC = b"YREC"
# magic, kind, flags, tag length, key length, meta length, value length, stamp, expires, created,
# value checksum; then 8 bytes: checksum of these, key, tag and meta, seeded with the place
RECORD = struct.Struct("<4sBBHIIQQQQQ")
RECORD_BYTES = RECORD.size + 8
# Where a record has the lengths of tag, key and metadata, and the checksum of its value.
RECORD_TAG_LENGTH, RECORD_KEY_LENGTH, RECORD_META_LENGTH, RECORD_VALUE_SUM = 6, 8, 12, 48
# In segments: a put with its value; one whose value is a large file.
# In logs: removal of digests; removal of everything; new expiry of a digest; a checkpoint stands.
# Each of these acts on records with a stamp up to its own.
PUT, LARGE, REMOVE, CLEAR, TOUCH, FLOOR = 1, 2, 3, 4, 5, 6
DIGEST_BYTES = 16  # of each digest that a REMOVE lists
TOUCHED = struct.Struct("<QQQ")  # payload of a TOUCH: digest low, digest high, expires
LARGE_POINTER = struct.Struct("<Q")  # what a LARGE record holds in place of the value
# A large value is checked in chunks, so that a part of it costs what that part costs. Their checksums stand
# behind the pointer, and the value's checksum is that of their list.
CHUNK_BYTES = 1 << 16
CHUNK_SUM_BYTES = 8
MOST_SUMS = 1 << 16  # in a list, which whoever reads a part needs: of longer values each sum is of 2^n chunks
_CHANGE_BYTES = {CLEAR: 0, TOUCH: TOUCHED.size, FLOOR: 0}  # their payloads

# Flags byte: the low half belongs to the codec, the high half to the store.
FLAG_LARGE = 0x10
FLAG_TERMS = 0x20  # the low TERMS_BITS of `expires` are no time, but terms: see below
CODEC_FLAGS = 0x0F

# Terms, in place of the last millisecond of a time of expiry, so that whoever compares that with now need not
# know of them: for how long after it the value may still be served while it is computed anew (1 bit of it is
# 1.05 ms), and, in the low bits, how long it took to compute (1.02 us). Both are small floating-point
# numbers, rounded up: an exponent, and a mantissa below it of so many bits.
TERMS_BITS = 20
COMPUTING_BITS = 9
COMPUTING_MANTISSA = 4
COMPUTING_UNIT = 10  # nanoseconds, as a power of 2
STALE_MANTISSA = 6
STALE_UNIT = 20
_TERMS = (1 << TERMS_BITS) - 1

MAX_HEAD_BYTES = HEAD_MASK * ALIGN  # header, key, tag and meta of one record
MAX_TAG_BYTES = 0xFFFF  # as RECORD has it; keys, and so tags, are shorter
MAX_VALUE_BYTES = (1 << 40) - 1

# A footer lists the records of a sealed segment: entries, then this trailer at the end of the file:
# magic, entries, offset of the first, where the records end, checksum of the entries and of these
FOOTER_MAGIC = b"YATAFOOT"
FOOTER_TRAILER = struct.Struct("<8sQQQ")
FOOTER_TRAILER_BYTES = FOOTER_TRAILER.size + 8
FOOTER_ENTRY = struct.Struct("<QI")  # offset of the record, bytes of payload kept in the entry

# -- checkpoint -------------------------------------------------------------------------------

CHECKPOINT_MAGIC = b"YATACKPT"
# magic, version, partitions, cache id, hash seed, floor (stamp), segments listed, eviction policy
CHECKPOINT_HEADER = struct.Struct("<8sII16sQQQQ")
CHECKPOINT_SEGMENT = struct.Struct("<QQ")  # id, bytes
# slots, and how many tag hashes: as many, or none; then the slots themselves, and the hashes
CHECKPOINT_PART = struct.Struct("<QQ")
TAG_HASH_BYTES = 4
CHECKPOINT_SUM = struct.Struct("<Q")
MOST_BYTES = 1 << 56  # in one cache: counts beyond this are damage

# -- marks of life -----------------------------------------------------------------------------

# the segment that the handle appends to, bytes of large files that it is storing, and that it is removing,
# and how many it is storing; then the pointers of the names of these, 8 bytes each
MARK = struct.Struct("<QQQQ")

# -- settings of the whole cache --------------------------------------------------------------

SETTINGS_MAGIC = b"YATASETS"
# magic, version, eviction policy, size limit, headroom, checksum of all before
SETTINGS = struct.Struct("<8sIIQdQ")


class Identity(NamedTuple):
    """What makes a cache this cache: the same in the index and in every segment."""

    cache_id: bytes
    seed: int


class Head(NamedTuple):
    """The fixed fields of a record, without its magic."""

    kind: int
    flags: int
    tag_length: int
    key_length: int
    meta_length: int
    value_length: int
    stamp: int
    expires: int
    created: int
    value_sum: int

    @property
    def payload_length(self) -> int:
        """Bytes that stand in the segment after the head."""
        return large_payload(self.value_length) if self.kind == LARGE else self.value_length

    @property
    def listed_length(self) -> int:
        """How many of them a footer repeats: those that whoever looks through the records needs."""
        return LARGE_POINTER.size if self.kind == LARGE else self.value_length if self.kind != PUT else 0

    @property
    def names_length(self) -> int:
        return self.key_length + self.tag_length + self.meta_length

    @property
    def head_bytes(self) -> int:
        """Bytes from the record's start to its payload."""
        return RECORD_BYTES + self.tag_length + self.key_length + self.meta_length + 15 & ~15

    @property
    def record_bytes(self) -> int:
        return self.head_bytes + aligned(self.payload_length)

    @property
    def lengths(self) -> int:
        return pack_lengths(self.value_length, self.flags, self.head_bytes)

    @property
    def is_possible(self) -> bool:
        """Whether anybody can have written that. What is read, and counted, goes by it."""
        if self.head_bytes > MAX_HEAD_BYTES or self.value_length > MAX_VALUE_BYTES or self.stamp > LAST_STAMP:
            return False
        if self.kind in (PUT, LARGE):
            return bool(self.flags & FLAG_LARGE) == (self.kind == LARGE)
        if self.kind == REMOVE:
            return self.value_length % DIGEST_BYTES == 0
        return self.kind in _CHANGE_BYTES and self.value_length == _CHANGE_BYTES[self.kind]


class Slot(NamedTuple):
    """One slot of the index, field by field."""

    low: int
    high: int
    place: int
    lengths: int
    value_sum: int
    stamp: int
    expires: int
    access: int

    @property
    def segment(self) -> int:
        return self.place >> 32

    @property
    def offset(self) -> int:
        return (self.place & MASK32) * ALIGN

    @property
    def value_length(self) -> int:
        return self.lengths >> LENGTH_SHIFT

    @property
    def flags(self) -> int:
        return self.lengths >> FLAGS_SHIFT & 0xFF

    @property
    def head_bytes(self) -> int:
        return (self.lengths & HEAD_MASK) * ALIGN

    @property
    def is_large(self) -> bool:
        return bool(self.flags & FLAG_LARGE)

    @property
    def is_possible(self) -> bool:
        """Whether a live entry can say that. The segment, and what is in it, is not looked at."""
        return (
            bool(self.low & DIGEST_BIT)  # see key_digest
            and 0 < self.segment <= LAST_SEGMENT
            and self.offset >= SEGMENT_HEADER_BYTES
            and self.head_bytes >= RECORD_BYTES
            and self.stamp <= LAST_STAMP
        )


class TagTable(NamedTuple):
    """What a tag table begins with."""

    cells: int  # in use
    descriptor: int  # its own
    number: int  # a stamp, that no other tag table has: not even one that was in the same place before
    unused: int


class TagCell(NamedTuple):
    """An entry has, or had, a tag. It has if its slot is of this stamp."""

    low: int  # in the file without DIGEST_BIT: where a slot was before, nobody takes this for one
    high: int
    stamp: int
    link: int  # the tag's hash << 32 | the next cell of the chain, or NO_CELL

    @property
    def tag_hash(self) -> int:
        return self.link >> 32


class Journal(NamedTuple):
    """What W_BUSY and the words behind it say while a slot changes."""

    busy: int
    part: int  # of the index
    at: int  # first word of the slot
    new_live: int  # word that counts the live bytes of the segment that the slot will point to,
    now: int  # and what it becomes
    old_live: int  # the same of the segment that it pointed to
    left: int
    slot: bytes  # what it becomes


def file_bytes(length: int) -> int:
    """What a file of so many bytes takes on disk: whole blocks."""
    return -(-length // FILE_BLOCK) * FILE_BLOCK


def chunks_a_sum(length: int) -> int:
    """For how many chunks each checksum of a large value of `length` bytes stands; the last one maybe for
    fewer."""
    chunks = 1
    while length > chunks * CHUNK_BYTES * MOST_SUMS:
        chunks *= 2
    return chunks


def large_payload(length: int) -> int:
    """Bytes that stand in the record of a large value of `length` bytes, in the place of the value."""
    return LARGE_POINTER.size + -(-length // (chunks_a_sum(length) * CHUNK_BYTES)) * CHUNK_SUM_BYTES


def aligned(length: int) -> int:
    """`length` rounded up to a multiple of ALIGN."""
    return (length + 15) & ~15


def pack_lengths(value_length: int, flags: int, head_bytes: int) -> int:
    return value_length << LENGTH_SHIFT | flags << FLAGS_SHIFT | head_bytes // ALIGN


def pack_place(segment: int, offset: int) -> int:
    return segment << 32 | offset >> 4


def record_bytes(lengths: int) -> int:
    """Bytes that the record of a slot with these lengths takes in its segment."""
    length = lengths >> LENGTH_SHIFT
    is_large = lengths >> FLAGS_SHIFT & FLAG_LARGE
    return (lengths & HEAD_MASK) * ALIGN + aligned(large_payload(length) if is_large else length)


def pack_terms(expires: int, stale: int, took: int) -> int:
    """A time of expiry, which is not 0, with terms, all in nanoseconds. More than can be said becomes the
    most that can: over four years, and nine hours."""
    stale = _pack_small(-(-stale >> STALE_UNIT), STALE_MANTISSA, TERMS_BITS - COMPUTING_BITS)
    took = _pack_small(-(-took >> COMPUTING_UNIT), COMPUTING_MANTISSA, COMPUTING_BITS)
    return with_terms(expires, stale << COMPUTING_BITS | took)


def with_terms(expires: int, other: int) -> int:
    """A time of expiry, which is not 0, with the terms that another one has."""
    return expires & ~_TERMS | other & _TERMS


def stale_time(expires: int) -> int:
    """Nanoseconds for which a value with terms may be served after it has expired."""
    return _unpack_small((expires & _TERMS) >> COMPUTING_BITS, STALE_MANTISSA) << STALE_UNIT


def computing_time(expires: int) -> int:
    """Nanoseconds that it took to compute a value with terms."""
    return _unpack_small(expires & (1 << COMPUTING_BITS) - 1, COMPUTING_MANTISSA) << COMPUTING_UNIT


def hard_end(expires: int, lengths: int) -> int:
    """When an entry that expires is of no more use to anybody, by these words of its slot."""
    return expires + stale_time(expires) if lengths >> FLAGS_SHIFT & FLAG_TERMS else expires


def _pack_small(number: int, mantissa: int, bits: int) -> int:
    """A number as a small floating-point one: the next that is not below it, or the largest there is."""
    shift = max(number.bit_length() - mantissa - 1, 0)
    return min((shift << mantissa) + -(-number >> shift), (1 << bits) - 1)


def _unpack_small(packed: int, mantissa: int) -> int:
    shift = max((packed >> mantissa) - 1, 0)
    return packed - (shift << mantissa) << shift


def room_for(names_length: int, payload_length: int) -> int:
    """Bytes that a record takes in its segment at most, with its entry in the footer."""
    return 2 * (RECORD_BYTES + names_length) + FOOTER_ENTRY.size + payload_length + 2 * ALIGN


_TWO_WORDS = struct.Struct("<QQ")


def key_digest(key: bytes, seed: int) -> tuple[int, int]:
    """(low, high) of the key's xxh3-128. Low is never EMPTY or REMOVED."""
    low, high = _TWO_WORDS.unpack(xxh3_128_digest(key, seed))
    return low | DIGEST_BIT, high


def pack_digest(low: int, high: int) -> bytes:
    return _TWO_WORDS.pack(low, high)


def unpack_digests(payload: bytes) -> list[tuple[int, int]]:
    """The digests that a REMOVE record lists."""
    return list(_TWO_WORDS.iter_unpack(payload[: len(payload) // DIGEST_BYTES * DIGEST_BYTES]))


def tag_hash(tag: bytes, seed: int) -> int:
    """32 bits of an encoded tag's xxh3-64, and never 0: that is what an entry without a tag has."""
    return xxh3_64_intdigest(tag, seed) & MASK32 or 1 if tag else 0


def value_sum(payload: bytes | bytearray | memoryview, low: int, flags: int) -> int:
    """Checksum that binds value, key and kind: no other key's or kind's bytes can pass for it."""
    return xxh3_64_intdigest(payload, low ^ flags)


def pack_change(seed: int, place: int, kind: int, payload: bytes, stamp: int) -> bytes:
    """A whole record of a log."""
    checksum = value_sum(payload, 0, 0)
    head = pack_record(seed, place, kind, 0, b"", b"", b"", len(payload), stamp, 0, stamp, checksum)
    return head + payload + bytes(-len(payload) % ALIGN)


def pack_record(
    seed: int, place: int, kind: int, flags: int, key: bytes, tag: bytes, meta: bytes,
    value_length: int, stamp: int, expires: int, created: int, checksum: int,
) -> bytes:  # fmt: skip
    """Header, key, tag and meta of a record at `place`, padded to where its payload begins."""
    fixed = RECORD.pack(
        RECORD_MAGIC, kind, flags, len(tag), len(key), len(meta),
        value_length, stamp, expires, created, checksum,
    )  # fmt: skip
    names = key + tag + meta if tag or meta else key
    return b"".join((fixed, xxh3_64_digest(fixed + names, seed ^ place), names, bytes(-len(names) % ALIGN)))


def unpack_head(data: bytes | memoryview, offset: int) -> Head | None:
    """The fixed fields at `offset`, possible ones but not yet verified; None if there cannot be a record."""
    if offset + RECORD_BYTES > len(data):
        return None
    fields = RECORD.unpack_from(data, offset)
    if fields[0] != RECORD_MAGIC:
        return None
    head = Head._make(fields[1:])
    return head if head.is_possible else None


def is_of_key(data: bytes, key: bytes) -> bool:
    """True if `data` begins a record of this very key: digests can be made to collide. It is not verified."""
    return (
        data.startswith(key, RECORD_BYTES)
        and data.startswith(len(key).to_bytes(4, "little"), RECORD_KEY_LENGTH)
        and data.startswith(RECORD_MAGIC)
    )


def verify_head(data: bytes | memoryview, offset: int, head: Head, seed: int, place: int) -> bool:
    """True if head, key, tag and meta are what was written, and were written at `place`."""
    names = offset + RECORD_BYTES
    if names + head.names_length > len(data):
        return False
    fixed = offset + RECORD.size
    summed = bytes(data[offset:fixed]) + bytes(data[names : names + head.names_length])
    return xxh3_64_digest(summed, seed ^ place) == bytes(data[fixed:names])


def pack_segment_header(
    segment: int, identity: Identity, created: int, floor: int, *, log: bool = False
) -> bytes:
    magic = LOG_MAGIC if log else SEGMENT_MAGIC
    body = SEGMENT_HEADER.pack(
        magic, FORMAT_VERSION, segment, identity.cache_id, identity.seed, created, floor, 0
    )[:-8]
    return body + struct.pack("<Q", xxh3_64_intdigest(body))


class SegmentHeader(NamedTuple):
    version: int
    segment: int
    identity: Identity
    created: int
    floor: int
    log: bool


def unpack_segment_header(data: bytes) -> SegmentHeader | None:
    """The header, or None if it is damaged. That of another version is not looked into."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    data = data[:SEGMENT_HEADER_BYTES]
    magic, version, segment, cache_id, seed, created, floor, checksum = SEGMENT_HEADER.unpack(data)
    if magic not in (SEGMENT_MAGIC, LOG_MAGIC) or xxh3_64_intdigest(data[:-8]) != checksum:
        return None
    if version == FORMAT_VERSION and not (0 < segment <= LAST_SEGMENT and max(created, floor) <= LAST_STAMP):
        return None
    return SegmentHeader(version, segment, Identity(cache_id, seed), created, floor, magic == LOG_MAGIC)


def pack_identity(identity: Identity, capacity: int) -> bytes:
    body = IDENTITY.pack(
        INDEX_MAGIC, FORMAT_VERSION, PARTITIONS, identity.cache_id, identity.seed, capacity
    )
    return body + struct.pack("<Q", xxh3_64_intdigest(body))


def unpack_identity(data: bytes) -> tuple[int, Identity, int] | None:
    """(version, identity, capacity of the segment table) of an index, or None if it is damaged."""
    if len(data) < IDENTITY.size + 8:
        return None
    body = data[: IDENTITY.size]
    magic, version, partitions, cache_id, seed, capacity = IDENTITY.unpack(body)
    (checksum,) = struct.unpack_from("<Q", data, IDENTITY.size)
    if magic != INDEX_MAGIC or xxh3_64_intdigest(body) != checksum or partitions != PARTITIONS:
        return None
    if version == FORMAT_VERSION and not 0 < capacity <= MAX_TABLE:
        return None
    return version, Identity(cache_id, seed), capacity


def segment_name(segment: int) -> str:
    return f"{segment:08x}{SEGMENT_SUFFIX}"


def temporary_name(owner: int, number: int, *, value: bool) -> str:
    return f"{owner:016x}-{number:x}{VALUE_SUFFIX if value else TEMPORARY_SUFFIX}"


def parse_temporary_name(name: str) -> tuple[int, bool] | None:
    """(owner's token, whether it is a value) of `<token>-<number>[.value].tmp`; None of other names."""
    is_value = name.endswith(VALUE_SUFFIX)
    stem = name.removesuffix(VALUE_SUFFIX if is_value else TEMPORARY_SUFFIX)
    owner, _, number = stem.partition("-")
    if stem == name or not _is_hex(owner, 16) or not _is_hex(number, len(number) or 1):
        return None
    return int(owner, 16), is_value


def parse_segment_name(name: str) -> int | None:
    stem = name.removesuffix(SEGMENT_SUFFIX)
    return int(stem, 16) if stem != name and _is_hex(stem, 8) else None


def is_segment_name(name: str) -> bool:
    return parse_segment_name(name) is not None


def parse_writer_name(name: str) -> int | None:
    """The token that a mark of life is named by; None of other names."""
    stem = name.removesuffix(WRITER_SUFFIX)
    return int(stem, 16) if stem != name and _is_hex(stem, 16) else None


def large_name(low: int, high: int, pointer: int) -> str:
    return f"{high:016x}{low:016x}-{pointer:016x}"


def parse_large_name(name: str) -> tuple[int, int, int] | None:
    """(low, high, pointer) of a large file's name; None if the name is not one of ours."""
    if len(name) != 49 or name[32] != "-" or not _is_hex(name[:32], 32) or not _is_hex(name[33:], 16):
        return None
    return int(name[16:32], 16), int(name[:16], 16), int(name[33:], 16)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(c in "0123456789abcdef" for c in text)
