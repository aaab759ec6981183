"""Opening the index, and making it anew from the checkpoint and the segments when it can't be trusted.

It can't after a power cut (its pages reach the disk in any order), and when it is damaged or
missing. A killed process leaves it trustworthy: the kernel still has every store it made.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..concurrency.cancelling import ensure_wanted
from ..concurrency.interruption import ours, suppressing
from ..concurrency.locks import GRACE
from ..errors import CacheIOError, FormatError, ReadOnlyError, from_os_error
from . import cache_settings, checkpoint
from . import format as f
from .checkpoint import Checkpoint
from .directory import boot_id
from .eviction import policy_of, take_over
from .format import PARTITION_MASK, PARTITIONS, SLOT, SLOT_BYTES, SLOT_WORDS, Identity, Slot
from .hidden import Hidden, readable
from .index import Index, IndexDamaged, grown_capacity, rebuilt
from .segment import Reads, Record, read_footer, read_segment_header, scan
from .under_way import count_anew
from .unreadable import Sparing, is_absence, is_given_up, is_giving_up, remedy

if TYPE_CHECKING:
    from .handle import Handle

_MIN_TABLE = 256
_TABLE_SHARE = 1 << 16  # the table has an entry for each 64 KiB of the limit,
_COMMON_TABLE = 1024  # up to so many, for hundreds of handles; it grows where more are needed
_FIRST_HEADERS = 3  # segments looked at to see that index and segments belong together
_LIKELY_SEGMENTS = 1 << 24  # a number farther on than this is damage


def open_index(store: Handle, *, alone: bool, seed: int | None = None) -> Index:
    """The index of the cache, fit for use. The lock is held (unless the cache is read-only).

    `seed`: of the digests of a cache that is begun here, where some are under way.
    """
    reason = ""
    index = None
    try:
        index = map_index(store)
        if not store.read_only:
            repair(store, index)
        reason = _distrust(store, index, alone)
    except FileNotFoundError:
        reason = "missing" if _segments_there(store) else "new"
    except IndexDamaged as error:
        reason = f"damaged ({error})"
    except ours(OSError) as error:
        if not is_given_up(error):
            raise
        store.give_up("index", f.INDEX_NAME, error)
        reason = "unreadable"
    if store.read_only:
        if reason:
            raise ReadOnlyError(
                f"the index in {store.root!r} is {reason} and has to be rebuilt: "
                "open the cache once without read_only"
            )
        assert index is not None
        return index
    if reason == "new":
        return _begin(store, _new_index(store, seed), alone=alone)
    if reason:
        store.log_once("recovery", f"the index is {reason}: recovering it from the segments")
        fresh = rebuild_index(store, index)
        if index is not None:
            index.close()
        elif not alone:  # whoever still uses the one that was removed looks before he gets the lock again
            time.sleep(GRACE)
        return _begin(store, fresh, alone=alone)
    assert index is not None
    return _begin(store, index, alone=alone)


def repair(store: Handle, index: Index) -> None:
    """Complete a change of the index that somebody died in, or was interrupted in. The lock is held."""
    if index.words[f.W_BUSY] == f.BUSY_STORING:
        count_anew(store.owner, index)
        index.words[f.W_BUSY] = 0
    else:
        index.repair()


def map_index(store: Handle) -> Index:
    """The index file as it is. `IndexDamaged` if it can't be used, `FormatError` if it must not be."""
    flags = os.O_RDONLY if store.read_only else os.O_RDWR
    fd = store.backend.open(os.path.join(store.root, f.INDEX_NAME), flags)
    index = Index(store.backend, store.root, fd, writable=not store.read_only)
    try:
        _check_version(store.root, index.version)
        index.validate()
    except BaseException:
        index.close()
        raise
    return index


def _check_version(root: str, version: int) -> None:
    if version != f.FORMAT_VERSION:
        raise FormatError(
            f"{root!r} has format version {version} and this release reads version {f.FORMAT_VERSION}: "
            "use a matching release, or remove the directory to begin anew"
        )


def _distrust(store: Handle, index: Index, alone: bool) -> str:
    """Why the index must be rebuilt; empty if it need not be."""
    words = index.words
    boot = boot_id()
    recorded = bytes(index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16])
    if not words[f.W_CLEAN] and (recorded != boot or (boot == bytes(16) and alone)):
        return "from before the machine was restarted"
    if not words[f.W_CLEAN] and (alone or store.read_only) and index.is_copied():
        return "a copy, made while it was in use"
    if not f.LITTLE_ENDIAN:
        raise FormatError("this machine is big-endian, and the format is little-endian only")
    if index.superseded and not store.read_only:  # whoever replaces an index holds the lock, as we do
        return "marked as replaced, and it is not"
    listed = index.segments() or _segments_there(store)
    for segment in listed[:_FIRST_HEADERS]:
        header = _header_if_readable(store, segment)
        if header is not None and header.identity != index.identity:
            return "from another cache"
    return ""


def _begin(store: Handle, index: Index, *, alone: bool = False) -> Index:
    """Mark the index as in use under this boot, durably before anything else changes."""
    clean = index.words[f.W_CLEAN]
    if clean:
        index.words[f.W_CLEAN] = 0
        index.sync()
    index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] = boot_id()
    index.note_file()
    index.words[f.W_INDEX_BYTES] = os.fstat(index.fd).st_size
    if alone:
        checkpoint.account(store, index)
        if not clean or index.words[f.W_LARGE_BYTES] > index.words[f.W_SIZE_LIMIT]:
            tidy(store, index)
    return index


def tidy(store: Handle, index: Index, *, began: int | None = None) -> None:
    """Nobody else has the cache open: remove what dead handles left half done.

    `began`: a stamp, where threads of this handle may go on storing what is later than that.
    """
    own = None if began is None else store.owner.token
    remove_unfinished(store, index, is_alive=lambda token: token == own)
    for (low, high, pointer), _, path in store.large.listed():
        if (began is None or pointer <= began) and not refers(store, index, low, high, pointer):
            store.backend.unlink(path)
    count_anew(store.owner, index)
    store.owner.sweep(store.owner.marks()[1])  # last: should we be killed here, somebody looks again


def remove_unfinished(store: Handle, index: Index, is_alive: Callable[[int], bool]) -> None:
    """Remove files that dead handles did not come to give a name or a place. The lock is held. `is_alive`
    is asked about the one who made a file, after that was seen: who makes one is alive before.
    """
    for name, _ in store.files_in(store.large.temporary):
        parsed = f.parse_temporary_name(name)
        if parsed is not None and not is_alive(parsed[0]):
            store.backend.unlink(os.path.join(store.large.temporary, name))
    unlisted = [segment for segment in _segments_there(store) if not index.state(segment)]
    named = index.named_segments() if unlisted else set()  # it is the table that is damaged then
    for segment in unlisted:
        if segment not in named and _is_leftover(store, segment, index.identity):
            store.backend.unlink(store.files.path(segment))  # killed before its first record


def orphans(store: Handle) -> list[str]:
    """Paths of large files that no entry stands for, nor will. The lock is not held: others are at work."""
    files, found = list(store.large.listed()), []
    with store.lock:  # not before: whoever shows one later has named it by now
        named = store.owner.named()
    for (low, high, pointer), _, path in files:
        ensure_wanted()
        if pointer not in named:
            with store.lock:
                if not refers(store, store.index, low, high, pointer) and store.backend.exists(path):
                    found.append(path)
    return found


def refers(store: Handle, index: Index, low: int, high: int, pointer: int) -> bool:
    at = index.find(low, high)
    if not at:
        return False
    slot = index.slot(at)
    try:
        return slot.is_large and store.pointer(slot) == pointer
    except ours(OSError):
        return True  # not known: check() looks closer


def _header(store: Handle, segment: int) -> f.SegmentHeader | None:
    """None if it is damaged, or no file of ours is there."""
    try:
        with store.files.reading(segment) as fd:
            return read_segment_header(store.backend, fd)
    except ours(OSError) as error:
        if is_absence(error):
            return None
        raise


def _header_if_readable(store: Handle, segment: int) -> f.SegmentHeader | None:
    """One that cannot be read tells nothing of whose it is, and nothing follows from that: the index can be
    used without, whoever reads an entry there hears of it, and only an open cache can be checked."""
    try:
        return _header(store, segment)
    except ours(OSError):
        return None


def _is_leftover(store: Handle, segment: int, identity: Identity) -> bool:
    """True if an unlisted segment is of this very cache, or its header was never written."""
    try:
        with store.files.reading(segment) as fd:
            data = store.backend.read(fd, f.SEGMENT_HEADER_BYTES, 0)
    except ours(OSError):  # it stays where it is: check() says why
        return False
    header = f.unpack_segment_header(data)
    if header is None:
        return not any(data)
    return header.identity == identity and header.segment == segment


def _segments_there(store: Handle) -> list[int]:
    """Numbers of all files that are named like segments, in their order."""
    try:
        names = [name for name, _ in store.scandir(store.segments_path)]
    except FileNotFoundError:  # the directory itself was removed
        names = []
    return sorted(segment for name in names if (segment := f.parse_segment_name(name)) is not None)


def _new_identity() -> Identity:
    return Identity(secrets.token_bytes(16), secrets.randbits(64))


def _table_capacity(store: Handle, segments: list[int]) -> int:
    limit = store.size_limit
    usual = min(limit // _TABLE_SHARE, _COMMON_TABLE)
    wanted = max(4 * (limit // store.segment_bytes), 2 * len(segments), usual, _MIN_TABLE)
    capacity = min(f.MAX_TABLE, 1 << (wanted - 1).bit_length())
    # Segments that a table of another size held, or whose removal did not last, may share an entry.
    while capacity < f.MAX_TABLE and len({s % capacity for s in segments}) < len(segments):
        capacity *= 2
    return capacity


def fitting_table(store: Handle, index: Index) -> int:
    """How many segments an index has to have room for: fewer, if the limit was lowered since it was made."""
    return min(index.table_capacity, _table_capacity(store, index.segments() + index.logs()))


def _new_index(store: Handle, seed: int | None) -> Index:
    """An empty index in its place; whoever only reads, and takes no lock, finds it whole or not at all."""
    store.take_over(cache_settings.for_new_index(store, None))
    path = store.passing_path()
    identity = _new_identity()
    if seed is not None:
        identity = identity._replace(seed=seed)
    index = _create(store, path, identity, _table_capacity(store, []))
    try:
        store.backend.replace(path, os.path.join(store.root, f.INDEX_NAME))
    except BaseException:
        index.close()
        store.backend.clear_away(path)
        raise
    return index


def _create(store: Handle, path: str, identity: Identity, capacity: int) -> Index:
    try:
        mode = store.settings.file_mode
        return Index.create(store.backend, path, identity, capacity, mode, store.in_force)
    except BaseException:
        store.backend.clear_away(path)
        raise


# -- rebuilding -------------------------------------------------------------------------------


def rebuild_index(store: Handle, old: Index | None) -> Index:
    """A new index in place of the old one, which others may still map. The lock is held.

    What is in a file that cannot be read would be missing in it for good, or come back: then nothing is
    changed, unless such files are given up.
    """
    try:
        return _rebuilt(store, old)
    except FileNotFoundError:  # somebody removes directories: the caller tries again
        raise
    except ours(OSError) as error:
        if isinstance(error, CacheIOError):
            raise
        doing = f"cannot make the index in {store.root!r} anew"
        raise from_os_error(error, doing, f"nothing was changed; {remedy(error)}".rstrip("; ")) from error


def _rebuilt(store: Handle, old: Index | None) -> Index:
    headers, hidden = _headers(store)
    store.take_over(cache_settings.for_new_index(store, old))
    saved = _read_checkpoint(store)
    identity = _identity(headers, old, saved)
    if saved is not None and saved.identity != identity:
        saved = None
    own = {s: h for s, h in sorted(headers.items()) if h.identity == identity and h.segment == s}
    if hidden:
        known = Hidden(store, identity, own, saved, old)
        own = {**own, **{segment: known.header(segment, size) for segment, size in hidden.items()}}
    path = store.temporary_path()
    index = _create(store, path, identity, _table_capacity(store, list(own)))
    try:
        _Rebuild(store, index, saved, own, frozenset(hidden), verify=not _is_as_left(old)).run()
        index.words[f.W_NEXT_SEGMENT] = _unused_segment(store, saved, old)
        if old is not None:
            index.words[f.W_CLOCK] = max(index.words[f.W_CLOCK], _sane_clock(old))
        index.words[f.W_EPOCH] = index.stamp()
        # What survived a power cut is durable, whether or not it was promised to be.
        index.words[f.W_PROMISED] = 1
        index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] = boot_id()
        target = os.path.join(store.root, f.INDEX_NAME)
        if old is None:
            _supersede(store, target)
        store.backend.replace(path, target)
    except BaseException:
        index.close()
        store.backend.clear_away(path)
        raise
    if old is not None and old.writable:
        old.supersede()
    with suppressing(OSError):  # if the old one comes back, it will be found wanting once more
        store.sync_directory(store.root)
    cache_settings.keep(store)
    return index


def has_room_for_table(index: Index) -> bool:
    """True if the index could list twice as many segments."""
    return 2 * index.table_capacity <= f.MAX_TABLE


def remake_index(store: Handle, old: Index, table_capacity: int) -> Index:
    """A copy of the index without its gaps, in its place. The lock is held."""
    path = store.temporary_path()
    index = _create(store, path, old.identity, table_capacity)
    try:
        old.copied_to(index)
        store.backend.replace(path, os.path.join(store.root, f.INDEX_NAME))
    except BaseException:
        index.close()
        store.backend.clear_away(path)
        raise
    old.supersede()
    return index


def _is_as_left(old: Index | None) -> bool:
    """True if no power cut can have come between the last change and now, and these are no copies."""
    boot = boot_id()
    if old is None or old.is_copied():
        return False
    return boot != bytes(16) and old.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] == boot


def _unused_segment(store: Handle, saved: Checkpoint | None, old: Index | None) -> int:
    """A number that nothing refers to: no file, no checkpoint, no descriptor that others have open."""
    known = [segment for segment in _segments_there(store) if segment <= f.LAST_SEGMENT]
    if saved is not None:
        known += saved.sealed
        for image in saved.parts:
            places = memoryview(image).cast("Q")[f.S_PLACE :: SLOT_WORDS]
            known.append(max(places, default=0) >> 32)
    unused = max(known, default=0) + 1
    before = old.words[f.W_NEXT_SEGMENT] if old is not None else 0
    return max(unused, before) if before < unused + _LIKELY_SEGMENTS else unused


def _sane_clock(old: Index) -> int:
    """The old index's clock, unless damage has sent it into the far future."""
    clock: int = old.words[f.W_CLOCK]
    return clock if clock < time.time_ns() + 10**18 else 0


def _latest(saved: Checkpoint) -> int:
    """A stamp that no hit which the checkpoint knows of is beyond."""
    return max(time.time_ns(), saved.floor) + 10**12


def _supersede(store: Handle, path: str) -> None:
    """Tell processes that still map a damaged index, as far as the file has a header to tell it in."""
    try:
        with store.backend.opened(path, os.O_RDWR) as fd:
            if os.fstat(fd).st_size >= f.HEADER_BYTES:
                descriptors = f.SUPERSEDED_DESCRIPTOR.to_bytes(8, "little") * f.PARTITIONS
                store.backend.write(fd, [(1).to_bytes(8, "little")], f.W_SUPERSEDED * 8)
                store.backend.write(fd, [descriptors], f.W_PARTITIONS * 8)
    except ours(OSError) as error:  # else they would go on with it, and others with the new one
        if not is_absence(error) and not is_given_up(error):
            raise


def _headers(store: Handle) -> tuple[dict[int, f.SegmentHeader], dict[int, int]]:
    """Sound headers of all segment files, by the number in the file's name; and the sizes of those files that
    are given up because theirs cannot be read."""
    headers, hidden = {}, {}
    for name, status in store.scandir(store.segments_path):
        segment = f.parse_segment_name(name)
        if segment is None:
            continue
        try:
            header = _header(store, segment)
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            store.give_up("segment", name, error)
            hidden[segment] = status.st_size
            continue
        if header is not None:
            _check_version(store.root, header.version)
            headers[segment] = header
    return headers, hidden


def _read_checkpoint(store: Handle) -> Checkpoint | None:
    try:
        return checkpoint.read(store.backend, store.root)
    except ours(OSError) as error:
        if not is_given_up(error):
            raise
        store.give_up("checkpoint", f.CHECKPOINT_NAME, error)
        return None


def _identity(
    headers: dict[int, f.SegmentHeader], old: Index | None, saved: Checkpoint | None
) -> Identity:
    """Whose cache this is: what most segments say, else the old index, else the checkpoint."""
    votes = Counter(header.identity for header in headers.values())
    if votes:
        return votes.most_common(1)[0][0]
    if old is not None:
        return old.identity
    return saved.identity if saved is not None else _new_identity()


def _ends_at(reader: Reads, fd: int, end: int) -> bool:
    """Whether a log was not written to beyond: there it can be read, and is as it was made."""
    next_head = reader.read(fd, f.RECORD_BYTES, end)
    hole = isinstance(reader, Sparing) and reader.has_hole(end, end + f.RECORD_BYTES)
    return not hole and not any(next_head)


class _Rebuild:
    """One run over everything the segments say, in any order: the highest stamp of a key wins.

    A checkpoint covers all records up to its floor: of these only those that it names itself
    count (they may have been moved since). Without the checkpoint that a log tells of, nothing up
    to its floor is trusted: removals that it covered are gone with their log.

    First every slot that a record or the checkpoint gives is collected by partition, then each
    partition is settled and written at once: far cheaper than changing the index record by record.
    """

    def __init__(
        self, store: Handle, index: Index, saved: Checkpoint | None, headers: dict[int, f.SegmentHeader],
        hidden: frozenset[int], verify: bool,
    ) -> None:  # fmt: skip
        self._store, self._index, self._headers, self._verify = store, index, headers, verify
        self._hidden = hidden  # segments of which the header is given up, and all entries with it
        self._saved = saved
        self._floor = 0
        self._slots = [bytearray() for _ in range(PARTITIONS)]
        self._removed: dict[tuple[int, int], int] = {}
        self._cleared = 0
        self._touched: dict[tuple[int, int], tuple[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._large = {name: size for name, size, _ in store.large.listed()}

    def run(self) -> None:
        self._enter_segments()
        logs = [segment for segment, header in self._headers.items() if header.log]
        floors = [floor for segment in logs for floor in self._read_log(segment)]
        if not logs:  # they are lost: a checkpoint that may have covered some is known from the segments
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
                self._note_newer(readable(self._store, segment, self._index.identity))
            elif not header.log and segment not in sealed:  # those are complete in the checkpoint
                self._replay(segment)
        for part in range(PARTITIONS):
            self._write(part, self._settle(part, vouched[part]))
            self._slots[part].clear()
        self._finish()

    def _enter_segments(self) -> None:
        """Put every segment into the table; those of living handles stay theirs."""
        store, index = self._store, self._index
        owners = {store.owner.noted(token).segment: token for token in store.owner.alive_tokens()}
        for segment, header in self._headers.items():
            size = store.backend.lstat(store.files.path(segment)).st_size
            self._sizes[segment] = size if segment not in self._hidden else 0
            if index.words[index.entry(segment)]:
                raise FormatError(
                    f"{store.root!r} has more segments than the index can list: raise size_limit"
                )
            owner = owners.get(segment, 0) if segment not in self._hidden else 0  # who has it begins another
            state = f.LOG if header.log else f.ACTIVE if owner else f.SEALED
            index.add_segment(segment, state, size, owner, header.created)
            self._tick(header.created)

    def _collect_saved(self, saved: Checkpoint) -> None:
        policy = policy_of(self._index)
        same = saved.eviction == self._index.words[f.W_EVICTION]
        for slots, part in zip(self._slots, saved.parts, strict=True):
            image = part if same else bytearray(part)
            words = memoryview(image).cast("Q")
            if not same:
                take_over(words, range(0, len(words), SLOT_WORDS), policy, _latest(saved))
            lows = words[::SLOT_WORDS].tolist()
            for i, low in enumerate(lows):
                if low > f.REMOVED:
                    slots += image[i * SLOT_BYTES : (i + 1) * SLOT_BYTES]
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
        """Take down the changes in a log. The floors that it tells of, one up to which changes may be missing
        that are given up included."""
        reader, floors, changes = self._reader(), [], []
        whole = f.SEGMENT_HEADER_BYTES  # up to here nothing is missing
        with self._store.files.reading(segment) as fd:
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
        """A stamp that no change which is missing in a log is beyond: what is up to it may have been removed.
        Changes stand in order there, and another log is begun when none follow in this one."""
        later = [stamp for offset, stamp in changes if offset > hole]
        later += [header.created for s, header in self._headers.items() if header.log and s > log]
        return min(filter(None, later), default=f.MAX_STAMP)

    def _reader(self) -> Reads:
        return Sparing(self._store.backend) if is_giving_up() else self._store.backend

    def _give_up(self, segment: int, error: OSError) -> None:
        """Go on without what cannot be read of a segment, or log; or tell."""
        if not is_given_up(error):
            raise error
        self._store.give_up("segment", f.segment_name(segment), error)

    def _replay(self, segment: int) -> None:
        reader = self._reader()
        try:
            with self._store.files.reading(segment) as fd:
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
        """Records that are known of, whose bytes cannot be read: what they replaced does not come back. They
        may stand elsewhere too, if they were being moved."""
        for record in records:
            if record.head.kind <= f.LARGE and record.head.stamp < f.MAX_STAMP:
                self._note_removed(record.digest(self._index.identity.seed), record.head.stamp - 1)

    def _note_removed(self, digest: tuple[int, int], stamp: int) -> None:
        self._removed[digest] = max(stamp, self._removed.get(digest, 0))

    def _collect(self, segment: int, records: Iterable[Record], fd: int, reader: Reads) -> int:
        """Take down what the records say. If `fd` is not -1, those whose values are not whole don't count.

        Up to where the segment has whole records without a gap.
        """
        index, size = self._index, self._sizes[segment]
        clock, whole = 0, f.SEGMENT_HEADER_BYTES
        seed, first, slots, pack = index.identity.seed, policy_of(index).first, self._slots, SLOT.pack
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
        self._tick(clock)
        return whole

    def _is_whole(self, fd: int, record: Record, low: int, high: int, reader: Reads) -> bool:
        """False for a value that did not reach the disk: what it replaced must not be lost for it."""
        store, head = self._store, record.head
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
            return store.large.checksum(*name, seed=low ^ head.flags) == head.value_sum
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            store.give_up("large", f.large_name(*name), error)
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
        """The slots that a partition ends up with. The first `vouched` collected are the checkpoint's."""
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
            return slot.low, slot.high, self._store.pointer(slot)
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
        for slot in slots:
            size = f.record_bytes(slot.lengths)
            index.words[index.live_word(slot.place >> 32)] += size
            index.words[f.W_LIVE_BYTES] += size

    def _finish(self) -> None:
        store, index = self._store, self._index
        count_anew(store.owner, index)
        checkpoint.account(store, index)
        clock = index.words[f.W_CLOCK]
        index.words[f.W_FLOOR] = min(self._floor, clock)
        for part in range(PARTITIONS):
            index.words[f.W_DELETED + part] = clock
        for segment, header in self._headers.items():
            if header.log:  # the next checkpoint covers it
                index.words[index.entry(segment) + f.T_CLOSED] = clock
