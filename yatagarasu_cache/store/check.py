"""`DiskCache.check`: reads everything, says what is wrong, and mends it if asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours
from ..errors import CacheIOError, from_os_error
from . import cache_settings, checkpoint, under_way, unreadable
from . import format as f
from .directory import content, has_tag, keep_tag
from .format import PARTITIONS, Slot
from .index import APPENDABLE, Index, IndexDamaged, is_overlong
from .large import CHUNK_BYTES
from .segment import footer_entry, pack_footer, read_footer, read_segment_header, scan

if TYPE_CHECKING:
    from .store import Store

_PATIENCE = 1.0  # seconds for others who are removing a large file
_BATCH, _BATCH_BYTES = 256, 8 << 20  # of records, read at once
_CLOCK_SLACK = 1 << 40  # nanoseconds by which others may be ahead of the clock word, or behind
_MOST_COUNTED = 1 << 62  # nobody counts so far


_REMEDY = "if that lasts, check(fix=True, drop_unreadable=True) gives up what cannot be read"


class _Unreadable(str):
    """What is wrong with a file that cannot be read: it is there, and the next time it may be read."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    kind: "entry", "count", "space", "segment", "large", "index", "checkpoint", "settings", "tag" or "stray".
    where: the file, or the place in it. detail: what is wrong. fixed: whether it was put in order.
    """

    kind: str
    where: str
    detail: str
    fixed: bool = False


def check(store: Store, fix: bool, drop_unreadable: bool = False) -> list[Problem]:
    """Every problem found. With `fix`, what can be mended is mended; entries that are lost are dropped.

    What the disk cannot read is reported, and given up only with `drop_unreadable`.
    """
    try:
        with unreadable.giving_up(drop_unreadable):
            return _problems(store, fix)
    except ours(OSError) as error:
        if isinstance(error, CacheIOError):
            raise
        raise from_os_error(error, "cannot check the cache", unreadable.remedy(error)) from error


def _problems(store: Store, fix: bool) -> list[Problem]:
    problems: list[Problem] = []
    try:
        with store.locks.index:  # a change half made would look like damage
            store.current.index.validate()
            store.current.index.ensure_reachable()
            _ensure_listed(store)
            if fix:
                _ensure_counted(store)
                _ensure_all_listed(store)
    except IndexDamaged as error:
        problems.append(Problem("index", f.INDEX_NAME, str(error), fix))
        if not fix:
            return [*problems, *_given_up(store, fix)]
        store.current.rebuild(str(error))
    for kind, step in _STEPS:
        _take(kind, step, store, fix, problems)
    if any(problem.fixed and isinstance(problem.detail, _Unreadable) for problem in problems):
        # An index that is made anew does not look into what it lists as complete.
        _take("checkpoint", _write_checkpoint, store, fix, problems)
    return problems


def _take(kind: str, step: _Step, store: Store, fix: bool, problems: list[Problem]) -> None:
    """What a step finds; that it comes to no end, where a disk does not do what it should."""
    try:
        problems.extend(step(store, fix))
    except ours(OSError) as error:
        if isinstance(error, CacheIOError) or error.filename is None:
            raise
        where = os.path.relpath(os.fsdecode(error.filename), store.root)
        problems.append(Problem(kind, where, _fault(error)))


def _mends(fix: bool, detail: str) -> bool:
    """Whether to put in order what is wrong with a file."""
    return fix and (unreadable.is_giving_up() or not isinstance(detail, _Unreadable))


def _given_up(store: Store, fix: bool) -> Iterator[Problem]:
    """What an index that was made anew had to do without: nothing is looked for there any more."""
    if fix and store.losses.noted and unreadable.is_giving_up():
        failed = list(_write_checkpoint(store, fix))
        yield from failed
        for (kind, name), detail in store.losses.noted.items():
            yield Problem(kind, name, detail, not failed)
        if not failed:
            store.losses.noted.clear()


def _write_checkpoint(store: Store, _: bool) -> Iterator[Problem]:
    try:
        store.checkpoints.write()
    except ours(OSError) as error:
        yield Problem("checkpoint", f.CHECKPOINT_NAME, f"cannot be written: {error.strerror or error}")


def _ensure_listed(store: Store) -> None:
    """Raise `IndexDamaged` if entries are in a segment that is there, and that the table does not list: what
    is not listed would be taken for a stray, and removed. The lock is held."""
    index = store.current.index
    for segment in index.named_segments():
        if not index.state(segment) and store.backend.exists(store.files.segments.path(segment)):
            raise IndexDamaged("its table does not list a segment that entries are in")


def _ensure_all_listed(store: Store) -> None:
    """Raise `IndexDamaged` if records of this cache are in a file that the table does not list: those of a
    log tell what was removed, and it would come back some day."""
    for name in content(store.files.scandir(store.files.segments.directory)):
        segment = f.parse_segment_name(name)
        if segment is not None and not store.current.index.state(segment) and _has_records(store, segment):
            raise IndexDamaged(f"its table does not list {name}, which has records")


def _has_records(store: Store, segment: int) -> bool:
    try:
        with store.backend.reading(store.files.segments.path(segment)) as fd:
            header = read_segment_header(store.backend, fd)
            return (
                header is not None
                and (header.segment, header.identity) == (segment, store.current.index.identity)
                and next(scan(store.backend, fd, segment, store.current.seed), None) is not None
            )
    except ours(OSError):  # whoever looks at strays tells of it
        return False


def _ensure_counted(store: Store) -> None:
    """Raise `IndexDamaged` if a segment counts more than lives in it: slots were damaged, whose entries a new
    index shows again. Without it their segment would go, and what they had replaced come back some day."""
    index = store.current.index
    live = _live_bytes(index)
    for entry in index.table_entries():
        segment = index.words[entry] & f.MASK32
        if index.words[entry + f.T_LIVE] > live[segment]:
            raise IndexDamaged(f"{f.segment_name(segment)} has fewer entries than it counts")


def _live_bytes(index: Index) -> Counter[int]:
    """What lives in each segment, by the slots. The lock is held."""
    live: Counter[int] = Counter()
    for at in index.live_slots():
        slot = index.slot(at)
        live[slot.segment] += f.record_bytes(slot.lengths)
    return live


def _tag(store: Store, fix: bool) -> Iterator[Problem]:
    """The directory says that it is a cache's: backup tools leave it out then."""
    detail = _tag_problem(store)
    if detail:
        if fixed := _mends(fix, detail):
            if isinstance(detail, _Unreadable):
                store.backend.unlink(os.path.join(store.root, f.TAG_NAME))
            keep_tag(store.backend, store.settings)
            fixed = not _tag_problem(store)
        yield Problem("tag", f.TAG_NAME, detail, fixed)


def _tag_problem(store: Store) -> str:
    try:
        return "" if has_tag(store.backend, store.root) else "it is missing or damaged"
    except ours(OSError) as error:
        return _fault(error)


def _words(store: Store, fix: bool) -> Iterator[Problem]:
    """The words of the header and of the segment table say what can be. (Others are looked at where they are
    counted anew, or by `Index.validate`.)"""
    with store.locks.index:
        index = store.current.index
        wrong = [*_wrong_words(store), *_wrong_table_words(index)]
        for word, value, what in wrong:
            yield Problem("count", f"{f.INDEX_NAME}, word {word}", f"{what} is {index.words[word]}", fix)
            if fix:
                index.words[word] = value
        if fix:  # who died when he had just made it longer has not counted that
            index.words[f.W_INDEX_BYTES] = os.fstat(index.fd).st_size


def _wrong_words(store: Store) -> Iterator[tuple[int, int, str]]:
    """(word, what it is to be, what it says) of those of the header that make no sense. The lock is held."""
    index, words = store.current.index, store.current.index.words
    clock, latest = words[f.W_CLOCK], words[f.W_CLOCK] + _CLOCK_SLACK
    for i, name in enumerate(f.COUNTERS):
        if words[f.W_COUNTERS + i] > _MOST_COUNTED:
            yield f.W_COUNTERS + i, 0, f"the number of {name}"
    for part in range(PARTITIONS):
        if words[f.W_DELETED + part] > latest:
            yield f.W_DELETED + part, clock, "when something was removed last"
    if words[f.W_WRITTEN] > _MOST_COUNTED:
        yield f.W_WRITTEN, checkpoint.OVERDUE, "what was written since the checkpoint"
    if words[f.W_FLUSHED] > latest:
        yield f.W_FLUSHED, 0, "up to when large files are durable"
    if words[f.W_PROMISED] > 1:
        yield f.W_PROMISED, 1, "whether durability was promised"
    if words[f.W_LOG] and index.state(words[f.W_LOG]) != f.LOG:
        yield f.W_LOG, 0, "the log that is written to"
    if store.life.read_only:
        return
    if words[f.W_CLEAN]:
        yield f.W_CLEAN, 0, "whether nobody has it open"
    said, size = words[f.W_INDEX_BYTES], os.fstat(index.fd).st_size
    if said > size or is_overlong(size, said):
        yield f.W_INDEX_BYTES, size, "the index's length"
    for word, number in enumerate(index.file(), f.W_FILE):
        if words[word] != number:
            yield word, number, "which file the index is"


def _wrong_table_words(index: Index) -> Iterator[tuple[int, int, str]]:
    """The same of the segment table. The lock is held."""
    words, latest = index.words, index.words[f.W_CLOCK] + _CLOCK_SLACK
    for entry in index.table_entries():
        state, segment = words[entry] & ~f.MASK32, words[entry] & f.MASK32
        name = f.segment_name(segment)
        if words[entry + f.T_CREATED] > latest:
            yield entry + f.T_CREATED, words[f.W_CLOCK], f"when {name} was begun"
        tail, size = words[entry + f.T_TAIL], words[entry + f.T_SIZE]
        if state in APPENDABLE and (tail > size or tail % f.ALIGN):
            yield entry + f.T_TAIL, f.SEGMENT_HEADER_BYTES, f"up to where {name} is shown"
        if state == f.LOG:
            closed, is_open = words[entry + f.T_CLOSED], segment == words[f.W_LOG]
            if closed > latest or closed and is_open:
                yield entry + f.T_CLOSED, 0 if is_open else words[f.W_CLOCK], f"when {name} was closed"
        elif words[entry + f.T_SYNCED] > size:
            yield entry + f.T_SYNCED, 0, f"how much of {name} is durable"


def _segments(store: Store, fix: bool) -> Iterator[Problem]:
    """Every segment in the table has its file, and the file is the one that the table means."""
    changes_lost = False
    for segment in store.current.index.segments() + store.current.index.logs():
        ensure_wanted()
        if not _segment_problem(store, segment):
            continue
        with store.locks.appending, store.locks.index:  # it may have been sealed or removed while we looked
            detail = _segment_problem(store, segment)
            if not detail or store.current.index.state(segment) in (0, f.DOOMED):
                continue
            mends = _mends(fix, detail)
            if mends and store.current.index.state(segment) == f.LOG:
                store.changes.retire(segment)
                changes_lost = True
            elif mends:
                _mend_segment(store, segment, detail)
            yield Problem("segment", f.segment_name(segment), detail, mends)
    if changes_lost:  # but not what they did: a checkpoint keeps that, and drops the log
        store.checkpoints.write()


def _mend_segment(store: Store, segment: int, detail: str) -> None:
    """Drop what is lost of a segment; what is left of it is in order then. Both locks are held."""
    index = store.current.index
    entry = index.entry(segment)
    store.files.segments.forget(segment)
    if store.active.writer is not None and store.active.writer.segment == segment:
        writer, store.active.writer = store.active.writer, None
        writer.abandon()
    for at in list(index.live_slots()):
        slot = index.slot(at)
        if slot.segment == segment and not index.leads_to(at):
            index.remove(at)
        elif slot.segment == segment and (problem := _entry_problem(store, slot)) and _mends(True, problem):
            store.removal.drop_corrupt(slot)
    path = store.files.segments.path(segment)
    if isinstance(detail, _Unreadable) and index.slots_in(segment) and not _made_readable(store, segment):
        for slot in index.slots_in(segment):
            store.removal.drop_corrupt(slot)
    # Not by the count of live bytes, which may be damaged too.
    if index.slots_in(segment):
        with store.backend.opened(path, os.O_RDWR) as fd:
            store.backend.write(fd, [_header_of(store, segment)], 0)
            size = os.fstat(fd).st_size
        index.resize_segment(segment, size)
        index.words[entry + f.T_SYNCED] = 0
        index.set_state(segment, f.SEALED)
        index.words[entry + f.T_OWNER] = 0  # last: an active one without owner stays so
    else:
        with contextlib.suppress(IsADirectoryError, PermissionError):  # a directory is none of ours
            store.backend.unlink(path)
        index.drop_segment(segment)


def _header_of(store: Store, segment: int) -> bytes:
    index = store.current.index
    created = index.words[index.entry(segment) + f.T_CREATED]
    return f.pack_segment_header(segment, index.identity, created, index.words[f.W_FLOOR])


def _made_readable(store: Store, segment: int) -> bool:
    """Have whoever goes through a segment, or to one of its entries, hear of no more errors. False if that
    cannot be. Both locks are held."""
    kept = store.current.index.slots_in(segment)
    for cure in (_overwrite, _list_anew):
        try:
            with store.backend.opened(store.files.segments.path(segment), os.O_RDWR) as fd:
                cure(store, fd, kept)
                store.backend.write(fd, [_header_of(store, segment)], 0)
        except ours(OSError) as error:
            if not unreadable.is_of_disk(error):
                raise
            continue
        if not isinstance(_segment_problem(store, segment), _Unreadable):
            return True
    return False


def _overwrite(store: Store, fd: int, kept: list[Slot]) -> None:
    """Write over what cannot be read of a segment, where no entry is."""
    reader = unreadable.Sparing(store.backend)
    reader.look_through(fd)
    reader.overwrite(fd, [(slot.offset, slot.offset + f.record_bytes(slot.lengths)) for slot in kept])


def _list_anew(store: Store, fd: int, kept: list[Slot]) -> None:
    """Have the footer list just these entries: nobody reads what is between them then."""
    entries, tail = [], f.SEGMENT_HEADER_BYTES
    for slot in sorted(kept, key=lambda slot: slot.offset):
        length = slot.head_bytes + f.LARGE_POINTER.size * slot.is_large
        data = store.backend.read(fd, length, slot.offset)
        entries.append(footer_entry(slot.offset, data[: slot.head_bytes], data[slot.head_bytes :]))
        tail = slot.offset + f.record_bytes(slot.lengths)
    store.backend.truncate(fd, tail)
    store.backend.write(fd, [pack_footer(entries, tail)], tail)


def _segment_problem(store: Store, segment: int) -> str:
    try:
        with store.files.segments.reading(segment) as fd:
            return _content_problem(store, segment, fd)
    except ours(OSError) as error:
        return _fault(error)


def _fault(error: OSError) -> str:
    """What is wrong with a file that cannot be read. Raises what is wrong with this process only."""
    if unreadable.is_absence(error):
        return error.strerror or str(error)
    if not unreadable.is_of_disk(error):
        raise error
    fault = unreadable.fault(error)
    return _Unreadable(fault if unreadable.is_giving_up() else f"{fault} ({_REMEDY})")


def _content_problem(store: Store, segment: int, fd: int) -> str:
    header = read_segment_header(store.backend, fd)
    if header is None:
        return "its header is damaged"
    state = store.current.index.state(segment)
    if (header.identity, header.segment, header.log) != (
        store.current.index.identity,
        segment,
        state == f.LOG,
    ):
        return "it belongs to another place or another cache"
    entry = store.current.index.entry(segment)
    expected = store.current.index.words[entry + (f.T_TAIL if state == f.LOG else f.T_SIZE)]
    size = os.fstat(fd).st_size
    if state != f.LOG and read_footer(store.backend, fd) is None:  # whoever goes through it reads all
        for offset in range(0, min(size, max(expected, store.limits.segment_bytes)), CHUNK_BYTES):
            store.backend.read(fd, CHUNK_BYTES, offset)
    if state == f.SEALED and size != expected and not store.current.index.words[entry + f.T_OWNER]:
        return f"it has {size} bytes instead of {expected}"
    if state == f.LOG and (end := _sound_bytes(store, fd, segment)) < expected:
        return f"its changes can be read up to {end} of {expected} bytes"
    return ""


def _sound_bytes(store: Store, fd: int, segment: int) -> int:
    """Where the first record of a log begins that is not what was written."""
    end = f.SEGMENT_HEADER_BYTES
    for record in scan(store.backend, fd, segment, store.current.index.identity.seed):
        if record.offset != end:
            break
        end += record.head.record_bytes
    return end


def _entries(store: Store, fix: bool) -> Iterator[Problem]:
    """Every entry's record and value are what was written, and its key leads to it."""
    for part, at in _suspects(store):
        with store.locks.appending, store.locks.index:  # it may have been moved or replaced while we looked
            problem = _lasting_problem(store, part, at, fix)
        if problem:
            yield problem


def _suspects(store: Store) -> Iterator[tuple[int, int]]:
    """(partition, slot) of each entry that does not look right at first sight."""
    for part in range(PARTITIONS):
        batch: list[tuple[int, Slot]] = []
        size = 0
        for at, slot in store.current.look(functools.partial(_slots_of, part)):
            if slot.low <= f.REMOVED:
                continue
            batch.append((at, slot))
            size += slot.head_bytes + (slot.value_length if store.reading.place_of(slot) is not None else 0)
            if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                ensure_wanted()
                yield from ((part, at) for at in _not_sound(store, batch))
                batch, size = [], 0
        yield from ((part, at) for at in _not_sound(store, batch))


def _slots_of(part: int, index: Index) -> list[tuple[int, Slot]]:
    return [(at, index.slot(at)) for at in index.partition_slots(part)]


def _not_sound(store: Store, batch: list[tuple[int, Slot]]) -> Iterator[int]:
    """Those of some slots that are not right. What is in segments is read in one batch."""
    whole: list[tuple[int, Slot, int]] = []
    for at, slot in batch:
        fd = store.reading.place_of(slot)
        if store.finding.find(slot.low, slot.high) != at:
            yield at
        elif fd is not None:
            whole.append((at, slot, fd))
        elif _entry_problem(store, slot):
            yield at
    wanted = [(fd, slot.head_bytes + slot.value_length, slot.offset) for _, slot, fd in whole]
    for (at, slot, _), data in zip(whole, store.backend.read_many(wanted), strict=True):
        if isinstance(data, OSError) or not _is_record(store, slot, data):
            yield at


def _is_record(store: Store, slot: Slot, data: bytes) -> bool:
    """True if `data` is the record that the slot shows, key and value included."""
    head = f.unpack_head(data, 0)
    if head is None or not f.verify_head(data, 0, head, store.current.seed, slot.place):
        return False
    key = data[f.RECORD_BYTES : f.RECORD_BYTES + head.key_length]
    value = memoryview(data)[slot.head_bytes :]
    if (head.stamp, head.lengths) != (slot.stamp, slot.lengths) or not _can_be_used(store, slot):
        return False
    return f.key_digest(key, store.current.seed) == (slot.low, slot.high) and (
        f.value_sum(value, slot.low, slot.flags) == slot.value_sum and len(value) == slot.value_length
    )


def _lasting_problem(store: Store, part: int, at: int, fix: bool) -> Problem | None:
    """What is wrong with a slot, both locks being held."""
    index = store.current.index
    if at not in index.partition_slots(part):
        return None
    slot = index.slot(at)
    if slot.low <= f.REMOVED:
        return None
    if index.find(slot.low, slot.high) != at:
        detail = "its key leads elsewhere"
        if fix:
            index.remove(at)
            index.recount(part)
    elif detail := _entry_problem(store, slot):
        fix = _mends(fix, detail)
        if fix:
            store.removal.drop_corrupt(slot)
    elif detail := _slot_problem(store, at, fix):
        pass
    if not detail:
        return None
    return Problem("entry", f"{f.segment_name(slot.segment)}+{slot.offset}", detail, fix)


def _slot_problem(store: Store, at: int, fix: bool) -> str:
    """What a slot, whose record and value are sound, says beside them: when it was stored, and used."""
    index, slot = store.current.index, store.current.index.slot(at)
    data = store.backend.read(store.files.segments.get(slot.segment), f.RECORD_BYTES, slot.offset)
    head, is_used = f.unpack_head(data, 0), _can_be_used(store, slot)
    stamp = head.stamp if head is not None else slot.stamp
    if fix and stamp != slot.stamp:
        index.words[at + f.S_STAMP] = stamp
    if fix and not is_used:
        index.words[at + f.S_ACCESS] = store.limits.policy.first(stamp)
    if stamp != slot.stamp:
        return "its slot is of another time than its record"
    return "" if is_used else "when it was used makes no sense"


def _can_be_used(store: Store, slot: Slot) -> bool:
    """Whether the access word is one that the policy can have written."""
    return store.limits.policy.is_possible(
        slot.access, slot.stamp, store.current.index.words[f.W_CLOCK] + _CLOCK_SLACK
    )


def _entry_problem(store: Store, slot: Slot) -> str:
    try:
        names = store.reading.read_names(slot)
        if names is None:
            return "its record is damaged"
        if f.key_digest(names.key, store.current.seed) != (slot.low, slot.high):
            return "its record is of another key"
        location = store.reading.locate(slot)
        if location is None:
            return "its value fails its checksum"
        location.close()
    except ours(OSError) as error:
        return _fault(error)
    except OverflowError as error:  # an offset or length that no file has
        return str(error)
    return ""


def _counts(store: Store, fix: bool) -> Iterator[Problem]:
    """The index's counts are those of its slots."""
    for part in range(PARTITIONS):
        with store.locks.index:
            index = store.current.index
            lows = index.column(index.partition_slots(part), 0)
            live = sum(low > f.REMOVED for low in lows)
            used = live + lows.count(f.REMOVED)
            counted = index.words[f.W_COUNTS + part]
            if counted != live << 32 | used:
                if fix:
                    index.recount(part)
                where = f"{f.INDEX_NAME}, partition {part}"
                yield Problem("count", where, f"counts {counted >> 32}, has {live}", fix)


def _space(store: Store, fix: bool) -> Iterator[Problem]:
    """Live bytes of each segment, and the totals, are the sums of what they count."""
    with store.locks.index:
        index = store.current.index
        live = _live_bytes(index)
        for entry in index.table_entries():
            segment = index.words[entry] & f.MASK32
            if index.words[entry + f.T_LIVE] != live[segment]:
                detail = f"{index.words[entry + f.T_LIVE]} live bytes counted, {live[segment]} found"
                if fix:
                    index.words[entry + f.T_LIVE] = live[segment]
                yield Problem("space", f.segment_name(segment), detail, fix)
        counted, active = index.words[f.W_ACTIVE], index.count_active()
        if counted != active:
            if fix:
                index.words[f.W_ACTIVE] = active
            yield Problem("count", f.INDEX_NAME, f"counts {counted} active segments, has {active}", fix)
        taken, slack = index.segment_bytes()
        totals = ((f.W_LIVE_BYTES, sum(live.values())), (f.W_SEGMENT_BYTES, taken), (f.W_SLACK, slack))
        for word, total in totals:
            if index.words[word] != total:
                yield Problem("space", f.INDEX_NAME, f"{index.words[word]} bytes counted, {total} found", fix)
                if fix:
                    index.words[word] = total



def _large(store: Store, fix: bool) -> Iterator[Problem]:
    """Every large file belongs to an entry, and what they take is counted."""
    if fix:
        store.reaper.reap()
    paths = store.reaper.orphans() if fix else store.reaper.find_orphans()
    # Others may be removing some, of entries that are gone just now.
    until = time.monotonic() + _PATIENCE
    while paths and time.monotonic() < until:
        ensure_wanted()
        time.sleep(_PATIENCE / 100)
        paths = [path for path in paths if store.backend.exists(path)]
    for path in paths:
        fixed = fix
        if fix:
            try:
                store.backend.unlink(path)
            except (IsADirectoryError, PermissionError):
                fixed = False
        yield Problem("large", os.path.basename(path), "no entry refers to it", fixed)
    with store.locks.index:
        if store.owner.any_dead():  # what they had under way counts until they are reaped
            return
        words = store.current.index.words
        counted = words[f.W_LARGE_BYTES], words[f.W_LEAVING]
        found = under_way.count(store.owner, store.current.index)
        if fix and counted != found:
            store.under_way.count_anew()
    for what, number, right in zip(("", " being removed"), counted, found, strict=True):
        if number != right:
            yield Problem("space", f.LARGE_NAME, f"{number} bytes{what} counted, {right} found", fix)


def _stray(store: Store, fix: bool) -> Iterator[Problem]:
    """Segment files are in the table; other names in our directories are not ours, and are left alone."""
    for name in content(store.files.scandir(store.files.segments.directory)):
        segment = f.parse_segment_name(name)
        if segment is None:
            yield Problem("stray", name, "not a file of this cache: left alone")
        else:
            with store.locks.index:
                unknown = not store.current.index.state(segment) and store.backend.exists(
                    store.files.segments.path(segment)
                )
            if unknown:
                yield _unlisted(store, segment, fix)


def _unlisted(store: Store, segment: int, fix: bool) -> Problem:
    """A segment file that is ours is removed; one of another cache is left alone."""
    path, header = store.files.segments.path(segment), None
    detail, name = "a segment that the index does not list", f.segment_name(segment)
    try:
        with store.backend.reading(path) as fd:
            header = read_segment_header(store.backend, fd)
    except ours(OSError) as error:
        if unreadable.is_absence(error):
            return Problem("stray", name, detail)
        detail = _fault(error)
    is_ours = header is None or header.identity == store.current.index.identity
    return Problem("stray", name, detail, is_ours and _mends(fix, detail) and store.backend.unlink(path))


def _checkpoint(store: Store, fix: bool) -> Iterator[Problem]:
    """The checkpoint, if there is one, can be read."""
    with store.locks.index:
        detail = _checkpoint_problem(store)
        counted = store.current.index.words[f.W_CHECKPOINT_BYTES]
        if fix:
            checkpoint.account(store.files, store.current.index)
        # Whoever died when he had just put one in place has not counted it: that is no damage.
        most = max(checkpoint.file_size(store.files), checkpoint.most_bytes(store.current.index))
    if detail:
        if fix := _mends(fix, detail):
            try:
                store.checkpoints.write()
            except ours(OSError):
                fix = False
        yield Problem("checkpoint", f.CHECKPOINT_NAME, detail, fix)
    elif counted > most:
        yield Problem("space", f.CHECKPOINT_NAME, f"{counted} bytes counted, {most} at most", fix)


def _checkpoint_problem(store: Store) -> str:
    try:
        if not store.backend.exists(os.path.join(store.root, f.CHECKPOINT_NAME)):
            return ""
        return "" if checkpoint.read(store.backend, store.root) else "it is damaged"
    except ours(OSError) as error:
        return _fault(error)


def _settings(store: Store, fix: bool) -> Iterator[Problem]:
    """The file of the cache's settings says what the index does."""
    with store.locks.index:
        store.shared_settings.follow()
        detail = _settings_problem(store)
        if not detail:
            return
        if fix := _mends(fix, detail):
            if isinstance(detail, _Unreadable):
                store.settings_file.write(store.limits.in_force)
            else:
                store.settings_file.keep()
            fix = not _settings_problem(store)
    yield Problem("settings", f.SETTINGS_NAME, detail, fix)


def _settings_problem(store: Store) -> str:
    try:
        same = cache_settings.read(store.backend, store.root) == store.limits.in_force
    except ours(OSError) as error:
        return _fault(error)
    return "" if same else "it is missing or damaged"


_Step = Callable[["Store", bool], Iterator[Problem]]
_STEPS: tuple[tuple[str, _Step], ...] = (
    ("index", _given_up), ("tag", _tag), ("index", _words), ("segment", _segments), ("entry", _entries),
    ("count", _counts), ("space", _space), ("large", _large), ("stray", _stray), ("checkpoint", _checkpoint),
    ("settings", _settings),
)  # fmt: skip
