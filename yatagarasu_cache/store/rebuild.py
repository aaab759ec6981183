"""Making an index anew from the checkpoint and from all that the segments and logs say."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..concurrency.interruption import ours
from ..errors import FormatError
from . import checkpoint
from . import format as f
from .cache_files import CacheFiles
from .checkpoint import Checkpoint
from .eviction import policy_of, take_over
from .format import (
    PARTITION_MASK,
    PARTITIONS,
    SLOT,
    SLOT_BYTES,
    SLOT_WORDS,
    TAG_CELL,
    Slot,
    TagCell,
    tag_hash,
)
from .hidden import readable
from .index import Index, grown_capacity, rebuilt
from .owners import Owner
from .segment import Reads, Record, read_footer, scan
from .under_way import count_anew
from .unreadable import Losses, Sparing, is_absence, is_given_up, is_giving_up

if TYPE_CHECKING:
    pass


def _ends_at(reader: Reads, fd: int, end: int) -> bool:
    """Whether a log ends at `end`: what follows can be read, and was never written to."""
    next_head = reader.read(fd, f.RECORD_BYTES, end)
    hole = isinstance(reader, Sparing) and reader.has_hole(end, end + f.RECORD_BYTES)
    return not hole and not any(next_head)


def _cell(low: int, high: int, stamp: int, tag: int) -> bytes:
    return TAG_CELL.pack(low, high, stamp, tag << 32)


def _latest(saved: Checkpoint) -> int:
    """A stamp later than every hit that the checkpoint knows of."""
    return max(time.time_ns(), saved.floor) + 10**12


class Rebuild:
    """One run over everything the segments say, in any order: the highest stamp of a key wins.

    A checkpoint covers all records up to its floor: of these only those count that it names itself
    (they may have been moved since). If a log tells of a checkpoint that is lost, nothing up to its
    floor is trusted: the log of the removals that it covered is gone.

    First every slot that a record or the checkpoint gives is collected by partition, then each
    partition is settled and written at once: far cheaper than changing the index record by record.
    """

    def __init__(
        self, files: CacheFiles, owner: Owner, losses: Losses, index: Index, saved: Checkpoint | None,
        headers: dict[int, f.SegmentHeader], hidden: frozenset[int], verify: bool,
    ) -> None:  # fmt: skip
        self._files, self._owner, self._losses = files, owner, losses
        self._index, self._headers, self._verify = index, headers, verify
        self._hidden = hidden  # segments whose header is given up, and with it all their entries
        self._saved = saved
        self._floor = 0
        self._slots = [bytearray() for _ in range(PARTITIONS)]
        self._cells = [bytearray() for _ in range(PARTITIONS)]  # of those that have tags
        self._removed: dict[tuple[int, int], int] = {}
        self._cleared = 0
        self._touched: dict[tuple[int, int], tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._large = {name: size for name, size, _ in files.large.listed()}

    def run(self) -> None:
        self._enter_segments()
        logs = [segment for segment, header in self._headers.items() if header.log]
        floors = [floor for segment in logs for floor in self._read_log(segment)]
        if not logs:  # they are lost: the segments tell which checkpoint may have covered some
            floors = [header.floor for header in self._headers.values()]
        newest = max(floors, default=0)
        if self._saved is not None and self._saved.floor >= newest:
            self._floor, sealed = self._saved.floor, self._saved.sealed
            self._collect_saved(self._saved)
        else:
            self._floor, sealed = newest, frozenset()
        vouched = [len(slots) // SLOT_BYTES for slots in self._slots]
        for segment, header in self._headers.items():
            if not header.log and segment in self._hidden:
                self._note_newer(readable(self._files, segment, self._index.identity))
            elif not header.log and segment not in sealed:  # those are complete in the checkpoint
                self._replay(segment)
        for part in range(PARTITIONS):
            self._write(part, self._settle(part, vouched[part]))
            self._slots[part].clear()
            self._cells[part].clear()
        self._finish()

    def _enter_segments(self) -> None:
        """Put every segment into the table; those of living handles stay theirs."""
        index = self._index
        owners = {self._owner.noted(token).segment: token for token in self._owner.alive_tokens()}
        for segment, header in self._headers.items():
            size = self._files.backend.lstat(self._files.segments.path(segment)).st_size
            self._sizes[segment] = size if segment not in self._hidden else 0
            if index.words[index.entry(segment)]:
                raise FormatError(
                    f"{self._files.root!r} has more segments than the index can list: raise size_limit"
                )
            owner = owners.get(segment, 0) if segment not in self._hidden else 0  # its owner begins another
            state = f.LOG if header.log else f.ACTIVE if owner else f.SEALED
            index.add_segment(segment, state, size, owner, header.created)
            self._tick(header.created)

    def _collect_saved(self, saved: Checkpoint) -> None:
        policy = policy_of(self._index.words)
        same = saved.eviction == self._index.words[f.W_EVICTION]
        for slots, cells, part, hashes in zip(
            self._slots, self._cells, saved.parts, saved.tag_hashes, strict=True
        ):
            image = part if same else bytearray(part)
            words = memoryview(image).cast("Q")
            if not same:
                take_over(words, range(0, len(words), SLOT_WORDS), policy, _latest(saved))
            lows = words[::SLOT_WORDS].tolist()
            for i, low in enumerate(lows):
                if low > f.REMOVED:
                    slots += image[i * SLOT_BYTES : (i + 1) * SLOT_BYTES]
            if hashes:
                highs, stamps = (words[field::SLOT_WORDS].tolist() for field in (f.S_HIGH, f.S_STAMP))
                versions = zip(lows, highs, stamps, hashes, strict=True)
                cells += b"".join(_cell(*version) for version in versions if version[-1])
        self._tick(saved.floor)

    def _tick(self, stamp: int) -> None:
        self._index.words[f.W_CLOCK] = max(self._index.words[f.W_CLOCK], stamp)

    def _read_log(self, segment: int) -> list[int]:
        try:
            return self._read_changes(segment)
        except ours(OSError) as error:
            self._give_up(segment, error)
            return [self._doubtful(segment, 0, [])]

    def _read_changes(self, segment: int) -> list[int]:
        """Collect the changes in a log. Returns the floors that it tells of, and, if unreadable changes are
        given up, the one up to which they may be missing."""
        reader, floors, changes = self._reader(), [], []
        whole = f.SEGMENT_HEADER_BYTES  # up to here no record is missing
        with self._files.segments.reading(segment) as fd:
            for record in scan(reader, fd, segment, self._index.identity.seed):
                if record.offset == whole:
                    whole += record.head.record_bytes
                self._tick(record.head.stamp)
                if record.head.kind == f.FLOOR:
                    floors.append(record.head.stamp)
                else:
                    changes.append((record.offset, record.head.stamp))
                    self._note_change(record)
            ended = _ends_at(reader, fd, whole)
        self._index.words[self._index.entry(segment) + f.T_TAIL] = whole
        if isinstance(reader, Sparing) and reader.error is not None:
            self._give_up(segment, reader.error)
            if not ended:
                floors.append(self._doubtful(segment, max(reader.holes), changes))
        return floors

    def _doubtful(self, log: int, hole: int, changes: list[tuple[int, int]]) -> int:
        """The highest stamp that a missing change of a log can have: what is up to it may have been removed.
        A log's changes are in order, and none follow in it once the next log is begun."""
        later = [stamp for offset, stamp in changes if offset > hole]
        later += [header.created for s, header in self._headers.items() if header.log and s > log]
        return min(filter(None, later), default=f.MAX_STAMP)

    def _reader(self) -> Reads:
        return Sparing(self._files.backend) if is_giving_up() else self._files.backend

    def _give_up(self, segment: int, error: OSError) -> None:
        """Go on without what cannot be read of a segment, or log; or raise `error`."""
        if not is_given_up(error):
            raise error
        self._losses.note("segment", f.segment_name(segment), error)

    def _replay(self, segment: int) -> None:
        reader = self._reader()
        try:
            with self._files.segments.reading(segment) as fd:
                self._replay_from(segment, fd, reader)
        except ours(OSError) as error:
            self._give_up(segment, error)
            self._sizes[segment] = 0

    def _replay_from(self, segment: int, fd: int, reader: Reads) -> None:
        index = self._index
        if not self._verify and (footer := read_footer(reader, fd)) is not None:
            self._collect(segment, footer, -1, reader)
            return
        # After a power cut a footer may list what is not there; without one, the end may be torn.
        whole = self._collect(segment, scan(reader, fd, segment, index.identity.seed), fd, reader)
        if index.state(segment) == f.ACTIVE:
            index.words[index.entry(segment) + f.T_TAIL] = whole
        if isinstance(reader, Sparing) and reader.error is not None:
            self._give_up(segment, reader.error)
            self._note_newer(read_footer(reader, fd) or ())

    def _note_newer(self, records: Iterable[Record]) -> None:
        """These records exist, but cannot be read: what they replaced must not come back. They may be found
        in another place, if they were being moved."""
        for record in records:
            if record.head.kind <= f.LARGE and record.head.stamp < f.MAX_STAMP:
                self._note_removed(record.digest(self._index.identity.seed), record.head.stamp - 1)

    def _note_removed(self, digest: tuple[int, int], stamp: int) -> None:
        self._removed[digest] = max(stamp, self._removed.get(digest, 0))

    def _collect(self, segment: int, records: Iterable[Record], fd: int, reader: Reads) -> int:
        """Collect what the records say. If `fd` is not -1, those whose values are not whole don't count.

        Returns up to where the segment has whole records without a gap.
        """
        index, size = self._index, self._sizes[segment]
        clock, whole = 0, f.SEGMENT_HEADER_BYTES
        seed, first, slots, pack = index.identity.seed, policy_of(index.words).first, self._slots, SLOT.pack
        cells = self._cells
        for record in records:
            head = record.head
            stamp = head.stamp
            if head.kind > f.LARGE or record.offset + head.record_bytes - f.ALIGN >= size:
                continue
            clock = max(clock, stamp)
            low, high = f.key_digest(record.key, seed)
            if fd >= 0 and not self._is_whole(fd, record, low, high, reader):
                continue
            if record.offset == whole:
                whole += head.record_bytes
            place = f.pack_place(segment, record.offset)
            slots[high & PARTITION_MASK] += pack(
                low, high, place, head.lengths, head.value_sum, stamp, head.expires, first(stamp)
            )
            if record.tag:
                cells[high & PARTITION_MASK] += _cell(low, high, stamp, tag_hash(record.tag, seed))
        self._tick(clock)
        return whole

    def _is_whole(self, fd: int, record: Record, low: int, high: int, reader: Reads) -> bool:
        """False if the value did not reach the disk: then what it replaced must be kept."""
        head = record.head
        if head.kind == f.PUT:
            offset = record.offset + head.head_bytes
            value = reader.read(fd, head.value_length, offset)
            if isinstance(reader, Sparing) and reader.has_hole(offset, offset + head.value_length):
                self._note_newer([record])
            return f.value_sum(value, low, head.flags) == head.value_sum
        name = low, high, int.from_bytes(record.payload, "little")
        if self._large.get(name) != head.value_length:
            return False
        try:
            sums = self._files.large.sums_of(*name, head.value_length, flags=head.flags)
            return sums is not None and f.value_sum(sums, low, head.flags) == head.value_sum
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._losses.note("large", f.large_name(*name), error)
            self._note_newer([record])
            return False

    def _note_change(self, record: Record) -> None:
        head = record.head
        if head.kind == f.REMOVE:
            for digest in f.unpack_digests(record.payload):
                self._note_removed(digest, head.stamp)
        elif head.kind == f.CLEAR:
            self._cleared = max(head.stamp, self._cleared)
        elif head.kind == f.TOUCH:
            low, high, expires = f.TOUCHED.unpack(record.payload)
            self._touched[low, high] = max((head.stamp, expires), self._touched.get((low, high), (0, 0)))

    def _settle(self, part: int, vouched: int) -> list[Slot]:
        """The slots that a partition ends up with. The first `vouched` are from the checkpoint."""
        best: dict[tuple[int, int], Slot] = {}
        for i, slot in enumerate(map(Slot._make, SLOT.iter_unpack(self._slots[part]))):
            digest = slot.low, slot.high
            shown = best.get(digest)
            if shown is not None and shown.stamp == slot.stamp:  # the same record, moved
                best[digest] = slot._replace(access=shown.access, expires=shown.expires)
            elif i < vouched or slot.stamp > self._floor and (shown is None or slot.stamp > shown.stamp):
                best[digest] = slot
        return [kept for slot in best.values() if (kept := self._as_changed(slot)) is not None]

    def _as_changed(self, slot: Slot) -> Slot | None:
        """The slot as later touches left it; None if it was removed since, or its bytes are not there."""
        digest = slot.low, slot.high
        if slot.stamp <= max(self._removed.get(digest, 0), self._cleared):
            return None
        if slot.offset + f.record_bytes(slot.lengths) - f.ALIGN >= self._sizes.get(slot.segment, 0):
            return None
        if slot.is_large and self._large.pop(self._large_name(slot), None) != slot.value_length:
            return None
        touched, expires = self._touched.get(digest, (0, 0))
        return slot._replace(expires=expires) if touched > max(slot.stamp, self._floor) else slot

    def _large_name(self, slot: Slot) -> tuple[int, int, int]:
        try:
            return slot.low, slot.high, self._files.segments.pointer(slot)
        except ours(OSError) as error:
            if not is_absence(error):
                self._give_up(slot.segment, error)
            return 0, 0, 0

    def _write(self, part: int, slots: list[Slot]) -> None:
        """Make the partition of `slots`, and count their bytes."""
        if not slots:
            return
        index = self._index
        image = b"".join(SLOT.pack(*slot) for slot in slots)
        positions = range(0, len(slots) * SLOT_WORDS, SLOT_WORDS)
        lows = [slot.low for slot in slots]
        index.load(part, len(slots), rebuilt(image, positions, lows, grown_capacity(part, len(slots))))
        index.load_tags(part, self._cells_of(part, slots))
        for slot in slots:
            size = f.record_bytes(slot.lengths)
            index.words[index.live_word(slot.place >> 32)] += size
            index.words[f.W_LIVE_BYTES] += size

    def _cells_of(self, part: int, slots: list[Slot]) -> list[TagCell]:
        """The cells of those slots of a partition that have tags, one each."""
        found = {cell[:3]: cell for cell in map(TagCell._make, TAG_CELL.iter_unpack(self._cells[part]))}
        if not found:
            return []
        versions = ((slot.low, slot.high, slot.stamp) for slot in slots)
        return [found[version] for version in versions if version in found]

    def _finish(self) -> None:
        index = self._index
        count_anew(self._owner, index)
        checkpoint.account(self._files, index)
        clock = index.words[f.W_CLOCK]
        index.words[f.W_FLOOR] = min(self._floor, clock)
        for part in range(PARTITIONS):
            index.words[f.W_DELETED + part] = clock
        for segment, header in self._headers.items():
            if header.log:  # the next checkpoint covers it
                index.words[index.entry(segment) + f.T_CLOSED] = clock
