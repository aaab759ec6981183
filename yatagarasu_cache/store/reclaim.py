"""Room: granting it to writers, evicting, removing dead segments, cleaning the emptiest, checkpoints.

`size_limit` bounds the bytes on disk. A handle is granted room in its active segment in small steps,
as it writes, so that one which is idle, forgotten or dead costs next to nothing. Room is granted
under the index lock, and only if it fits then, so that handles that fill the cache together don't
exceed the limit together. What is copied to make room may be one segment above it. What is removed gives
its room back when it is gone: for large files of others that is waited for, and nothing goes for them.

Eviction keeps the live bytes below a share of the limit (`headroom`), so that segments die or empty
out before their room is needed; the work is paced by the bytes written, a little after each put.
Nothing is evicted for room that is not live: before that what dead handles left is sealed, and the
active segments of others, who may be idle for ever, are taken from them and cleaned.

The volume may have less room than `size_limit`: it is smaller, others fill it, or there is a quota.
Whoever is told so goes on as if the limit were what the cache has by then (`in_room`), for as long as
the volume has no more. Where not even copies can be made, a whole segment goes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from ..backends.base import Buffer
from ..concurrency.cancelling import GivenUp, ensure_wanted
from ..concurrency.interruption import ours, started, suppressing
from ..concurrency.locks import claim, new_lock, runs_alone
from ..errors import CacheIOError, ClosedError, StorageFull, from_os_error, is_volume_full
from . import checkpoint, recovery
from . import format as f
from .directory import prepare
from .eviction import Victims, ahead, expired
from .format import PARTITIONS, Slot
from .index import APPENDABLE, Index, IndexDamaged
from .segment import (
    Record,
    SegmentWriter,
    footer_bytes,
    read_records,
    read_segment_header,
    void_record,
)
from .under_way import Stream, give_up
from .unreadable import is_absence, is_given_up, is_of_disk

if TYPE_CHECKING:
    from .store import Store

MIN_SEGMENT_BYTES = 8 << 10
MAX_SEGMENT_BYTES = 64 << 20
_SEGMENTS_IN_LIMIT = 32  # at least so many segments make up size_limit
_EVICT_MOST = 128  # victims a locking
_COPY_BYTES = 1 << 18  # of records copied by one write while cleaning
_LOOK_BYTES = 256  # looking at a record costs about what copying so much does
_WHOLE = 1 << 60  # a budget for a segment of any size
_GRANTS = 1000  # tries to get room while others take what was made
_MOST_GRANT = 1 << 22  # a writer gets as much room again as it has used, at most so much,
_GRANT_SHARE = 16  # and no more than its part of 1/16 of the limit; at first so that 256 idle handles
_FIRST_GRANTS, _FIRST_LEAST, _FIRST_MOST = 256, 1 << 12, 1 << 16  # take no more than that together
_ADOPTED_MOST = 1 << 20  # a longer segment takes too long to read for whoever goes on with it
_REAP_SECONDS = 10.0  # between looks for dead handles that nobody asked for,
_REAP_PAUSE = 0.1  # and before entries are evicted beside large values
_MIN_GARBAGE = 16  # a segment is cleaned for at least 1/16 of its size
_PATIENCE = 2 * _MIN_GARBAGE  # steps without gain, besides two for each segment there is
_CHECKPOINT_RECORDS = 1 << 16  # and at least as many as there are entries, between checkpoints;
_CHECKPOINT_SHARE = 1 << 12  # fewer in a cache of less than so many bytes for each of them
_LOG_SHARE = 64  # a log of changes of more than 1/64 of the limit asks for a checkpoint as well
_LEAST_LOG = 1 << 13
_OVERLONG = 4
_GROWTH_SHARE = 16  # an index grows by one partition of 64 at a time, to 2.6 times of what is live there,
_LEAST_GROWTH = 1 << 13  # and by whole pages
_LOOSE = 3  # an index of so many times the bytes that it needs is made anew; one of the other, where the
_LITTLE_LOOSE = 1.25  # limit was lowered: entries go for what it has too much
_FOR_COPIES = 64  # 1/64 of the limit, or half a segment, is for copies that make room, and not for entries
_LEAST_FREE = 10  # 1/10 of the limit, or three segments, are kept free of live records at least,
_BESIDE_SLACK = 16  # as are 1/16 besides what segments leave of their last blocks,
_LEAST_LIVE = 8  # and 1/8 of what segments may have is for these, whatever the headroom
_REMOVAL_SECONDS = 1.0  # after which large files that are being removed are given up,
_REMOVAL_LOOK = 0.0005  # and between looks whether they are gone
_RECOUNT_SECONDS = 10.0  # between two counts of everything because too much is counted
_VOLUME_SECONDS = 60.0  # after which it is looked whether the volume has more room again
T = TypeVar("T")
_CLEANABLE = frozenset({f.SEALED, f.TAKEN})  # nothing more is shown in these


def segment_bytes_of(size_limit: int) -> int:
    """The power of two that makes at least `_SEGMENTS_IN_LIMIT` segments of the limit, within bounds."""
    fitting = 1 << max(0, (size_limit // _SEGMENTS_IN_LIMIT).bit_length() - 1)
    return min(max(fitting, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


class _NoRoom(Exception):
    """There is one segment more than there may be: no further one for copies."""


class Cleaning:
    """A sealed segment being emptied: what of it is still to be looked at, read as it is asked for."""

    def __init__(self, segment: int, records: Generator[Record, None, None]) -> None:
        self.segment = segment
        self.again: list[Record] = []  # to be tried once more
        self._records = records

    def next(self) -> Record | None:
        return self.again.pop() if self.again else next(self._records, None)

    def close(self) -> None:
        """Close the file, read through or not."""
        self._records.close()


class Reclaimer:
    """One handle's part in keeping the cache within its limit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unpaced = 0
        self._reaped = time.monotonic()
        self._orphans = False  # large files that no entry stands for are to be looked for again
        self._volume: int | None = None  # bytes that the volume has room for, where it was full
        self._volume_seen = 0.0
        self._recounted = -_RECOUNT_SECONDS
        self._made_room = 0  # times that room was made because the volume was full
        self.follow_settings()
        self._pacing = new_lock()  # a signal handler may close what it has interrupted
        self._expiry_part = 0
        self._cleaning: Cleaning | None = None
        self._overheads: dict[int, int] = {}
        self._checkpoint: threading.Thread | None = None

    def follow_settings(self) -> None:
        """Take over what the store's settings have become."""
        self._victims = Victims()  # the order may be another one now
        self._behind = True  # as far as is known: a limit that was lowered takes effect with the next write
        # Bytes written between two looks at what is to be done.
        self._quantum = min(self.segment_bytes // 8, 1 << 18)

    @property
    def _index(self) -> Index:
        return self._store.index

    @property
    def segment_bytes(self) -> int:
        return self._store.segment_bytes

    @property
    def _limit_in_force(self) -> int:
        """That of the cache, as of now."""
        self._store.follow_settings()
        return self._store.size_limit

    @property
    def _size_limit(self) -> int:
        """That of the cache, or what the volume has room for."""
        limit = self._limit_in_force
        return limit if self._volume is None else min(limit, self._volume)

    @property
    def _limit(self) -> int:
        """What `used_bytes` may come to by what is stored. Copies that make room may take more."""
        return self._whole_limit - min(self.segment_bytes // 2, self._size_limit // _FOR_COPIES)

    @property
    def _whole_limit(self) -> int:
        """What `used_bytes` may come to: less than `size_limit` by what may come in between.

        That is a checkpoint under way, beside one that may have become as large as that, and an
        index that grows by a partition.
        """
        return self._within(self._size_limit)

    def _within(self, size_limit: int) -> int:
        index = self._index
        growth = index.words[f.W_INDEX_BYTES] // _GROWTH_SHARE + _LEAST_GROWTH
        most = checkpoint.most_bytes(index)
        standing = max(0, most - index.words[f.W_CHECKPOINT_BYTES])
        limit: int = size_limit - growth - most - standing
        return limit

    @property
    def live_limit(self) -> int:
        """What `live_bytes` may come to: the rest is for garbage, so that not all is copied all the time."""
        return self._live_within(self._limit_in_force)

    def _live_within(self, size_limit: int) -> int:
        index, limit, fixed = self._index, self._within(size_limit), self._fixed_bytes
        least = min(3 * self.segment_bytes, size_limit // _LEAST_FREE)
        slack = index.words[f.W_SLACK]  # of blocks, which cleaning does not bring back
        least = max(least, slack + size_limit // _BESIDE_SLACK)
        free = max(int(size_limit * self._store.in_force.headroom), least)
        return max(limit - free, fixed + (limit - fixed) // _LEAST_LIVE)

    @property
    def largest_value(self) -> int:
        """Bytes that a value may have: what there would be room for without all others."""
        return self._largest_within(self._limit_in_force)

    def largest_on_volume(self, largest: int) -> int:
        """The same of the volume, what the cache has there included; or `largest`, if that is less."""
        bytes_ = self._volume_bytes()
        return largest if bytes_ >= self._limit_in_force else self._largest_within(bytes_)

    def _largest_within(self, size_limit: int) -> int:
        room = self._live_within(size_limit) - self._fixed_bytes
        room -= min(2 * self.segment_bytes, room // 4)
        return room - room % f.FILE_BLOCK

    def _volume_bytes(self) -> int:
        """What the cache could come to on its volume, as far as that can be known: quotas can't."""
        with suppressing(OSError, AttributeError):
            status = os.statvfs(self._store.root)
            if status.f_blocks:  # else the file system does not say
                free: int = status.f_bfree * status.f_frsize
                return self._index.used_bytes + free
        return self._store.size_limit

    @property
    def _fixed_bytes(self) -> int:
        """Bytes that no eviction gives back: those of the index and of the checkpoint."""
        words = self._index.words
        fixed: int = words[f.W_INDEX_BYTES] + words[f.W_CHECKPOINT_BYTES]
        return fixed

    # -- opening, closing ---------------------------------------------------------------------

    def reap(self, *, opening: bool = False) -> int:
        """Seal the active segments of handles that are dead, and free what these were cleaning. How many.

        What a dead handle had appended, and did not come to show, is taken back. The marks of the dead go;
        where nothing else is left of one, whoever is `opening` leaves it to others, who have the time.
        """
        store, reaped = self._store, 0
        with store.lock:
            self._reaped = time.monotonic()
            alive, marked = store.owner.marks()
            dead = self._named_owners() - alive
            lost = [token for token in marked if self._left_files(token)]
            if marked:
                recovery.remove_unfinished(store, self._index, store.owner.is_alive)
            if lost:
                store.count_large()
            for segment in self._index.segments() if dead else ():
                words, entry = self._index.words, self._index.entry(segment)  # a rebuild may replace it
                if words[entry + f.T_CLEANER] in dead:
                    words[entry + f.T_CLEANER] = 0
                if words[entry + f.T_OWNER] in dead and self._seal_of_dead(segment):
                    reaped += 1
            store.owner.sweep((set(marked) & dead if opening else set(marked)) - set(lost))
        if lost or self._orphans:
            self.look_for_orphans()
            store.owner.sweep(lost)
        return reaped

    def _left_files(self, token: int) -> bool:
        """Whether a dead handle may have left large files that no entry stands for."""
        try:
            return self._store.owner.noted(token).is_under_way
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._store.give_up("large", f"{f.WRITERS_NAME}/{token:016x}{f.WRITER_SUFFIX}", error)
            return True

    def look_for_orphans(self) -> None:
        """Remove large files that no entry stands for."""
        self._orphans = True  # should that fail
        for path in self.orphans():
            self._store.backend.unlink(path)
        self._orphans = False

    def orphans(self) -> list[str]:
        """Paths of large files that no entry stands for, and that may go now."""
        found = recovery.orphans(self._store)
        if found and self._index.words[f.W_PROMISED]:  # what removed their entries is durable first
            self.sync_dirty()
        return found

    def _named_owners(self) -> set[int]:
        """Other handles that the segment table names."""
        words = self._index.words
        return {
            words[entry + field]
            for entry in self._index.table_entries()
            if words[entry] & ~f.MASK32 not in (f.LOG, f.DOOMED)
            for field in (f.T_OWNER, f.T_CLEANER)
        } - {0, self._store.owner.token}

    def _reap_if_due(self) -> None:
        """Now and then, so that what dead handles leave does not pile up until there is need."""
        words = self._index.words
        if words[f.W_ACTIVE] > 1 or words[f.W_LARGE_BYTES]:
            self._reap_after(_REAP_SECONDS)

    def _reap_after(self, seconds: float) -> None:
        if time.monotonic() - self._reaped > seconds:
            self._try_to_reap()

    def _try_to_reap(self) -> None:
        self._try(self.reap)

    def _try(self, look: Callable[[], object]) -> None:
        """`look()`, where nothing depends on it."""
        try:
            look()
        except ours(OSError) as error:
            self._store.log_once("reap", f"cannot look for what dead processes left: {error}")

    def _seal_of_dead(self, segment: int) -> bool:
        """Seal a segment that a dead handle was writing, or sealing. The lock is held."""
        if self._index.state(segment) != f.DOOMED:
            if not self._take_back(segment):
                return False
            index = self._index
            index.resize_segment(segment, self._file_size(segment))
            index.set_state(segment, f.SEALED)
        self._index.words[self._index.entry(segment) + f.T_OWNER] = 0
        return True

    def _take_back(self, segment: int) -> bool:
        """Make the records no records that a dead handle did not come to show. False, and logged, if
        that fails: the segment stays active then, and removals reckon with what is in it."""
        store = self._store
        try:
            with store.backend.opened(store.files.path(segment), os.O_RDWR) as fd:
                if not claim(fd):  # it lives, and somebody has removed its mark
                    return False
                unshown = store.unshown(segment, fd)
                for offset in unshown:
                    void_record(store.backend, fd, offset)
                store.backend.truncate(fd, os.fstat(fd).st_size)  # what was allocated ahead goes
                if unshown and self._index.words[f.W_PROMISED]:
                    store.backend.sync(fd)
        except FileNotFoundError:
            pass
        except ours(OSError) as error:
            store.log_once("unshown", f"cannot take back what a dead process did not come to store: {error}")
            return False
        return True

    def _file_size(self, segment: int) -> int:
        try:
            status = self._store.backend.lstat(self._store.files.path(segment))
            # One that is longer than it can be is damaged, and takes what it has blocks for.
            long = status.st_size > f.MAX_SEGMENT_BYTES
            return status.st_blocks * 512 if long else status.st_size
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        with self._pacing:  # who paces now may begin a checkpoint; nobody does so later
            thread = self._checkpoint
        # One without an identity did not come to run: an interruption kept it from being started.
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()
        with self._store.appending:
            if self._cleaning is not None:
                self._cleaning.close()
                self._cleaning = None

    def after_fork(self) -> None:
        self._pacing, self._cleaning, self._checkpoint = new_lock(), None, None

    # -- room to write to ---------------------------------------------------------------------

    def roll(self, size: int) -> SegmentWriter:
        """A writer with room for `size` bytes. `appending` is held. `StorageFull` if there is none."""
        store = self._store
        for _ in range(_GRANTS):
            writer = store.writer
            if writer is not None and writer.room >= size:
                return writer
            if not self._grant(size):
                self.make_space(self._least_grant(size))
        raise self._full()

    def _least_grant(self, size: int) -> int:
        """Bytes that a grant of room for `size` takes at least."""
        writer = self._store.writer
        if writer is not None and writer.used + size <= writer.capacity:
            return max(0, size - writer.room)
        return f.SEGMENT_HEADER_BYTES + f.FOOTER_TRAILER_BYTES + size

    def _grant(self, size: int, *, beyond: int = 0, exactly: bool = False) -> bool:
        """Give the writer room for `size` bytes, in a segment that is begun if need be, and for some
        more unless `exactly`. False if that exceeds the limit by more than `beyond`.
        """
        store = self._store
        try:
            # Never once more: other threads may be about to show what they appended to a segment of ours, and
            # what was taken back when that was sealed.
            first = not store.has_written
            if store.writer is not None and not store.may_show(store.writer.segment):
                store.let_go_if_lost(store.writer)
            if store.writer is not None and store.writer.used + size > store.writer.capacity:
                store.seal_writer()
            with store.lock:
                if store.writer is not None and not store.may_show(store.writer.segment):
                    return True  # taken just now: the caller asks again
                limit = self._limit + beyond
                if self._index.used_bytes + self._least_grant(size) > limit:
                    return False
                writer = store.writer or self._next_writer(size, first=first)
                if not store.changes.segment:  # there was no room for it, or it was removed
                    store.changes.prepare()
                least, left = writer.used + size, limit - self._index.used_bytes
                wanted = least if exactly else max(least, self._usual_size(writer))
                self._extend(writer, min(wanted, max(writer.granted + left, least)))
        except FileNotFoundError:  # somebody has removed files just now: the caller asks again
            prepare(store.backend, store.settings)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot begin a segment") from error
        return True

    def _usual_size(self, writer: SegmentWriter) -> int:
        """What a writer's segment may come to: twice what is used of it, but never by much more of the limit.

        Whole pieces of _MOST_GRANT, where it is that: the compiled core has the file system allocate these.
        """
        share = self._size_limit // _GRANT_SHARE
        first = min(max(share // _FIRST_GRANTS, _FIRST_LEAST), _FIRST_MOST)
        part: int = share // max(1, self._index.words[f.W_ACTIVE])
        grant = min(max(writer.used, first - writer.used), part, _MOST_GRANT)
        size = writer.used + grant
        return size if grant < _MOST_GRANT else -(-size // _MOST_GRANT) * _MOST_GRANT

    def _extend(self, writer: SegmentWriter, granted: int) -> None:
        """Let `granted` bytes of the writer's segment count. The lock is held."""
        writer.granted = max(min(granted, writer.capacity), writer.granted)
        self._index.resize_segment(writer.segment, writer.granted)

    def _next_writer(self, size: int, *, first: bool) -> SegmentWriter:
        """Begin a segment, or, if it is the handle's first, go on with a small one. The lock is held."""
        store = self._store
        capacity = self._capacity(size)
        store.ensure_in_place()
        writer = (self._adopt(size) if first else None) or self._create(capacity)
        store.writer, store.has_written = writer, True
        store.core.own(store.owner.token)
        store.owner.note(writer.segment)
        store.changes.prepare()
        return writer

    def _capacity(self, size: int) -> int:
        # On a small volume segments are small too, so that one can go without much being lost.
        usual = min(self.segment_bytes, segment_bytes_of(self._volume_bytes()))
        return max(usual, f.aligned(2 * size + 8192) if size > usual // 2 else 0)

    def _create(self, capacity: int) -> SegmentWriter:
        store = self._store
        segment, fd = store.new_segment_file()
        try:
            token = store.owner.acquire()
            claim(fd)
            index = self._index  # not before: its table may have become larger
            created, floor = index.stamp(), index.words[f.W_FLOOR]
            header = f.pack_segment_header(segment, index.identity, created, floor)
            store.backend.write(fd, [header], 0)
            entry = index.add_segment(segment, f.ACTIVE, len(header), token, created)
            index.words[entry + f.T_TAIL] = len(header)
        except BaseException:
            store.give_up_segment(segment, fd)
            raise
        writer = SegmentWriter(store.backend, fd, segment, capacity)
        store.names_changed()
        return writer

    def _adopt(self, size: int) -> SegmentWriter | None:
        """Go on with a small segment that an earlier handle left, so that handles which come and go
        don't leave one each.

        Not with one that a checkpoint lists as complete, or one being written will: recovery would
        not look into it.
        """
        if self._index.words[f.W_ACTIVE]:
            self.reap()
        index = self._index
        most = min(self.segment_bytes // 2, _ADOPTED_MOST)
        for entry in index.table_entries():
            words = index.words[entry : entry + f.ENTRY_WORDS]
            free = words[f.T_STATE] & ~f.MASK32 == f.SEALED and not (words[f.T_OWNER] or words[f.T_CLEANER])
            if free and words[f.T_SIZE] < most - size and words[f.T_CREATED] > index.words[f.W_EPOCH]:
                return self._take_over(words[f.T_STATE] & f.MASK32)
        return None

    def _take_over(self, segment: int) -> SegmentWriter | None:
        store, index, capacity = self._store, self._index, self._capacity(0)
        try:
            fd = store.backend.open(store.files.path(segment), os.O_RDWR)
        except ours(OSError):  # then another one is begun, and this one stays as it is
            return None
        writer = SegmentWriter(store.backend, fd, segment, capacity)  # which closes it
        try:
            if not claim(fd) or not self._adopts(writer):
                writer.abandon()
                return None
            # First: whoever finds us dead in between takes it from us as it is.
            entry, owner = index.entry(segment), store.owner.acquire()
            index.words[entry + f.T_SYNCED] = 0
            index.words[entry + f.T_OWNER] = owner
            index.words[entry + f.T_TAIL] = writer.tail
            index.set_state(segment, f.ACTIVE)
            store.backend.truncate(fd, writer.tail)  # the footer
            writer.granted = writer.tail
        except BaseException:
            writer.abandon()
            raise
        store.names_changed()  # who created it may not have made its name durable
        return writer

    def _adopts(self, writer: SegmentWriter) -> bool:
        """Have the writer go on behind what is in its segment. False if that is damaged, or the disk cannot
        read it: there are other segments to go on with."""
        store, identity = self._store, self._index.identity
        try:
            header = read_segment_header(store.backend, writer.fd)
            if header is None or (header.segment, header.identity) != (writer.segment, identity):
                return False
            writer.adopt(read_records(store.backend, writer.fd, writer.segment, identity))
            return True
        except ours(OSError) as error:
            if not is_of_disk(error):
                raise
            return False

    # -- making room --------------------------------------------------------------------------

    def pace(self, written: int) -> None:
        """Do as much work as `written` bytes ask for; called after every put."""
        self._unpaced += written
        if self._store.unlogged:
            self._store.say()
        if self._unpaced < self._quantum and written and not self._behind:
            return
        if not self._pacing.acquire(blocking=False):
            return
        try:
            budget, self._unpaced = 2 * max(self._unpaced, self._quantum), 0
            self._work(budget)
        except GivenUp:  # what was asked for is done, and whoever comes next cleans up
            pass
        except StorageFull:  # the next roll says so to a caller who can do something about it
            pass
        except ours(OSError) as error:  # what was asked for is done
            self._store.log_once("maintenance", f"cannot clean up: {error}")
        finally:
            self._pacing.release()

    def _work(self, budget: int) -> None:
        self._store.follow_settings()
        self._look_at_volume()
        if self._is_far_above:
            try:
                self.make_space(0)
            finally:
                self._behind = self._is_far_above
        self._behind = False
        while self._store.policy.evicts and budget > 0 and (freed := self._evict_surplus(0, budget)):
            budget -= freed
        self._reap_if_due()
        reserve = min(self.segment_bytes, 4 * self._quantum)
        if self._index.used_bytes + reserve > self._limit and not self.drop_one_dead():
            self._clean_some(2 * self._quantum, beyond=False)
        self._checkpoint_if_due()

    @property
    def _is_far_above(self) -> bool:
        """True where the limit was lowered, and the cache does not keep it yet."""
        return self._index.used_bytes > self._limit + self.segment_bytes

    def make_space(self, need: int) -> None:
        """Reclaim until `need` more bytes fit. `StorageFull` if they can't."""
        if self._index.used_bytes + need > self._limit:
            with self._store.appending, self._store.reclaiming:  # one at a time: who waited may find room
                try:
                    self._reclaim(need)
                except StorageFull:
                    if self._volume is None:
                        raise
                    self._volume = None  # it may have room by now: whoever writes will see
                    self._reclaim(need)

    def in_room(self, need: int, change: Callable[[], T]) -> T:
        """`change()`, which needs so many bytes; once more when room was made, if the volume is full.

        Not where the index lock is held: making room means waiting for others who may want it. Nor by a
        `change()` that does this itself for its parts: what has failed there would be tried again.
        """
        for _ in range(_GRANTS):
            made = self._made_room
            try:
                return change()
            except ours(OSError) as error:
                if not is_volume_full(error) or not self._make_room(need, made):
                    raise
        return change()

    def _make_room(self, need: int, made: int) -> bool:
        """Make room on a volume that is full. False if that can't be.

        `made`: how often that had been done when it turned out that the volume is full.
        """
        store = self._store
        with store.appending, store.reclaiming:
            if self._made_room != made:  # another thread was faster
                return True
            made_some = store.files.let_go() or self._go_on_smaller(need)  # the first may have been it
            self._made_room += made_some  # not where it failed: others would try again for nothing
            return made_some

    def _go_on_smaller(self, need: int) -> bool:
        """Let what the cache has now be its limit, and make room within that. `reclaiming` is held."""
        self._volume, self._volume_seen = self._index.used_bytes, time.monotonic()
        try:
            self._reclaim(need)
        except StorageFull:
            self._volume = None
            return False
        if self._store.policy.evicts:
            self._store.log_once("volume", "the volume is full: going on with what the cache has there")
        return True

    def _look_at_volume(self) -> None:
        """The volume was full: now and then, see whether it has more room."""
        now = time.monotonic()
        if self._volume is not None and now - self._volume_seen > _VOLUME_SECONDS:
            self._volume, self._volume_seen = max(self._volume, self._volume_bytes()), now

    def reserve_large(self, stream: Stream, length: int) -> None:
        """Make room for so much of a large value, and count it. `StorageFull` if there is none."""
        store, size = self._store, f.file_bytes(length) - f.file_bytes(stream.length)
        for _ in range(_GRANTS):
            self.make_space(size)
            with store.lock:
                if self._index.used_bytes + size <= self._limit:
                    store.under_way.grow(stream, length)
                    return
        raise self._full()

    def _reclaim(self, need: int) -> None:
        if self._counts_too_much:
            self._recount()
        last_means: list[Callable[[], object]] = [
            partial(self._await_removals, need, suffice=False), self.reap, self._clean_active,
            self._clean_little, self._let_segment_go, self._cover_changes, self._recount,
        ]  # fmt: skip
        least_used = least_live = f.MASK64
        stalled = 0  # steps since there was last less than ever before in this call
        rounds = 0  # of one of the last means
        while (used := self._index.used_bytes) + need > self._limit:
            ensure_wanted()
            if self._await_removals(need, suffice=True):
                continue
            live = self._index.live_bytes
            stalled = 0 if used < least_used or live < least_live else stalled + 1
            least_used, least_live = min(least_used, used), min(least_live, live)
            if stalled <= _PATIENCE + 2 * len(self._index.table_entries()) and self._make_some(need):
                continue
            if last_means:
                if not last_means[0]() or rounds > len(self._index.table_entries()):
                    del last_means[0]
                    stalled = rounds = 0
                rounds += 1
            elif not self._evict_all_the_same(need):
                raise self._full()

    def _await_removals(self, need: int, *, suffice: bool) -> bool:
        """Wait for large files that others are removing; where these have to `suffice`, as long as nothing
        else is lacking. False if there was nothing to wait for.

        Whoever was killed while he removed some is not waited for, and whoever was stopped not for long.
        """
        stuck, reaped, began = f.MASK64, False, time.monotonic()
        while (lacking := self._index.used_bytes + need - self._limit) > 0:
            leaving = self._index.words[f.W_LEAVING]
            if leaving < (lacking if suffice else 1):
                break
            stuck = min(stuck, leaving)
            if time.monotonic() > began + _REMOVAL_SECONDS:
                self._try(self.look_for_orphans)  # what is given up must be gone
                with self._store.lock:
                    counted = self._index.words[f.W_LARGE_BYTES]
                    give_up(self._index.words, stuck if stuck <= counted else 0)
                break
            time.sleep(_REMOVAL_LOOK)
            if not reaped and time.monotonic() > began + _REAP_PAUSE:
                reaped = True
                self._try_to_reap()
        return stuck < f.MASK64

    def _evict_all_the_same(self, need: int) -> bool:
        """The very last means: what lives would fit, but what does not live cannot be had back."""
        if not self._store.policy.evicts or not self._evict(lambda: need):
            return False
        self._store.log_once("unfit", "segments cannot be cleaned, and entries that would fit are evicted")
        return True

    def _full(self) -> StorageFull:
        index, words = self._index, self._index.words
        writers = words[f.W_ACTIVE]
        active = sum(
            words[entry + f.T_SIZE] - words[entry + f.T_LIVE]
            for entry in index.table_entries()
            if words[entry] & ~f.MASK32 in APPENDABLE
        )
        live = words[f.W_LIVE_BYTES] + words[f.W_LARGE_BYTES]
        remedy = "raise it, or delete entries"
        if not self._store.policy.evicts:
            remedy += ", or choose an eviction other than 'none'"
        return StorageFull(
            errno.ENOSPC,
            f"size_limit={self._size_limit} is used up: {live} bytes of live entries, {self._fixed_bytes} of "
            f"index and checkpoint, {max(0, active)} granted to {writers} writing handles and not live, "
            f"{index.used_bytes} in all: {remedy}",
        )

    def _shrink_index(self) -> bool:
        """Make an index anew that has grown for many more entries than there are, or was made for many more
        segments. False if it has not."""
        index, store = self._index, self._store
        loose = _LITTLE_LOOSE if self._is_far_above else _LOOSE
        table = recovery.fitting_table(store, index)
        if index.words[f.W_INDEX_BYTES] <= loose * index.fitting_bytes(table):
            return False
        try:
            with store.lock:
                if self._index is index:
                    store.shrink_index()
            return True
        except ours(OSError) as error:
            store.log_once("shrink", f"cannot make the index smaller: {error}")
            return False

    def _cover_changes(self) -> None:
        """What the logs of changes take can be had back by a checkpoint: the one under way, or a new one."""
        if self._store.changes.total_size > _LEAST_LOG // 2:
            self._write_checkpoint(lambda: self._store.changes.total_size > _LEAST_LOG // 2)

    @property
    def _counts_too_much(self) -> bool:
        """More is said to live than there can be, unless the limit was lowered just now: what is evicted for
        a damaged count is lost for nothing."""
        return self._index.live_bytes - self._within(self._limit_in_force) > self._store.size_limit

    def _recount(self) -> None:
        """Count anew what can be: a damaged count makes a cache look full."""
        store, self._recounted = self._store, time.monotonic()
        with store.lock:
            index = self._index
            try:
                index.validate()
            except IndexDamaged as error:
                store.rebuild(str(error))
                return
            for part in range(PARTITIONS):
                index.recount(part)
            for entry in index.table_entries():
                if index.words[entry] & ~f.MASK32 == f.SEALED:
                    index.words[entry + f.T_SIZE] = self._file_size(index.words[entry] & f.MASK32)
            index.sum_up()
            checkpoint.account(store, index)
            store.count_large()

    def _make_some(self, need: int) -> bool:
        """One step towards room; False if no step helps."""
        if self.drop_one_dead() or self._shrink_index():
            return True
        if self._is_log_overlong() and self._write_checkpoint(self._is_log_overlong):
            return True
        if not self._store.policy.evicts:
            return bool(self._evict_expired()) or self._clean_emptiest()
        return bool(self._evict_surplus(need)) or self._clean_emptiest()

    # -- evicting -----------------------------------------------------------------------------

    def _evict_surplus(self, need: int, most: int = _WHOLE) -> int:
        """Evict what does not fit beside `need` more bytes, about `most` at once. Bytes that went.

        How much that is, is looked at under the lock: of several that find too much, one evicts it.
        """
        if self._counts_too_much and time.monotonic() - self._recounted > _RECOUNT_SECONDS:
            self._recount()
        return self._evict(
            lambda: min(most, self._index.live_bytes + need - self._live_within(self._size_limit))
        )

    def _evict(self, wanted: Callable[[], int]) -> int:
        """Evict the next victims, about `wanted()` bytes but a bounded number. Bytes that went."""
        store = self._store
        if self._index.words[f.W_LARGE_BYTES]:  # what dead handles had under way is no reason
            self._reap_after(_REAP_PAUSE)
        try:
            return self._evict_next(wanted)
        except IndexDamaged as error:
            store.rebuild(str(error))
            return 0

    def _evict_next(self, wanted: Callable[[], int]) -> int:
        store = self._store
        with store.lock:
            victims, freed = self._choose(bytes_) if (bytes_ := wanted()) > 0 else ([], 0)
            if not victims:
                return freed
            gone = store.remove_slots(victims)
            now = time.time_ns()
            late = sum(0 < slot.expires <= now for slot in victims)
            store.count("expirations", late)
            store.count("evictions", len(victims) - late)
        store.discard(gone)
        return freed

    def _choose(self, wanted: int) -> tuple[list[Slot], int]:
        """The next victims, and the bytes that go with them. Damaged ones have gone already: of what they
        were nothing can be logged."""
        index, freed = self._index, 0
        chosen: list[Slot] = []
        seen: set[int] = set()
        for at, is_sound in self._victims(index):
            if at in seen:  # chosen anew before those chosen first were removed: that is all there are
                break
            seen.add(at)
            slot = index.slot(at)
            if is_sound:
                chosen.append(slot)
            else:
                index.remove(at)
            freed += f.record_bytes(slot.lengths) + (f.file_bytes(slot.value_length) if slot.is_large else 0)
            if freed >= wanted or len(seen) >= _EVICT_MOST:
                break
        return chosen, freed

    def _evict_expired(self) -> int:
        """Remove expired entries of the next partition that has any. How many."""
        for _ in range(PARTITIONS):
            self._expiry_part = (self._expiry_part + 1) % PARTITIONS
            count = self.expire_part(self._expiry_part)
            if count:
                return count
        return 0

    def expire_part(self, part: int) -> int:
        """Remove the expired entries of a partition, in batches. How many."""
        store, total = self._store, 0
        for _ in range(self._index.count() + 1):
            ensure_wanted()
            if not store.look(lambda index: self._over(index, part)):
                break
            with store.lock:
                places = self._over(self._index, part)[:_EVICT_MOST]
                slots = store.sound_slots(places)
                if not places:  # others did
                    break
                if not slots:
                    continue
                gone = store.remove_slots(slots)
                store.count("expirations", len(slots))
            total += len(slots)
            store.discard(gone)
        return total

    def _over(self, index: Index, part: int) -> list[int]:
        """Where those of a partition are that have expired, or were made in the future."""
        now = time.time_ns()
        places = expired(index, part, now)
        if index.words[f.W_CLOCK] > now + f.AHEAD:
            places += [at for at in ahead(index, part, now) if self._store.is_over(index.slot(at))]
        return places

    def cull(self) -> int:
        """Evict until the live bytes are within their share of the limit. How many went."""
        before = self._store.evictions + self._store.expirations
        while self._store.policy.evicts and self._index.live_bytes > self._live_within(self._size_limit):
            ensure_wanted()
            if not self._shrink_index() and not self._evict_surplus(0):
                break
        self.drop_dead()
        return self._store.evictions + self._store.expirations - before

    # -- dead segments ------------------------------------------------------------------------

    def drop_dead(self) -> None:
        while self.drop_one_dead():
            pass

    def drop_one_dead(self) -> bool:
        """Remove one sealed segment without live records, if there is one."""
        index = self._index
        for entry in index.table_entries():
            word = index.words[entry]
            dead = word & ~f.MASK32 in _CLEANABLE and not index.words[entry + f.T_LIVE]
            if word & ~f.MASK32 == f.DOOMED or dead:
                segment = word & f.MASK32
                if self._doom(segment):
                    self._unlink(segment)
                    return True
        return False

    def _doom(self, segment: int) -> bool:
        """Decide that a segment goes: nothing in it is live, and what made it so is durable if it must be."""
        store = self._store
        if self._index.words[f.W_PROMISED]:
            self.sync_dirty()
        with store.lock:
            index = self._index
            state = index.state(segment)
            if state in _CLEANABLE and not index.words[index.entry(segment) + f.T_LIVE]:
                index.set_state(segment, f.DOOMED)
                return True
        return state == f.DOOMED

    def _unlink(self, segment: int) -> None:
        store = self._store
        try:
            store.files.remove(segment)
        except ours(OSError) as error:
            raise from_os_error(error, "cannot remove a segment") from error
        if self._volume is not None:  # now, and not when nobody can be reading it any more
            store.files.let_go()
        with store.lock:
            if self._index.state(segment) == f.DOOMED:
                self._index.drop_segment(segment)

    def sync_dirty(self) -> None:
        """Make all segments and large values durable, and their names.

        A removal may then destroy what it supersedes.
        """
        store, index = self._store, self._index
        try:
            store.sync_large()
            for entry in index.table_entries():
                with store.lock:  # else the size may be that of before it was sealed
                    before = index.words[entry : entry + f.ENTRY_WORDS].tolist()
                segment, state = before[f.T_STATE] & f.MASK32, before[f.T_STATE] & ~f.MASK32
                if state in (0, f.DOOMED) or state == f.SEALED and before[f.T_SYNCED] >= before[f.T_SIZE]:
                    continue
                try:
                    fd = store.files.get(segment)
                except ours(OSError) as error:
                    if not is_absence(error) and not is_given_up(error):
                        raise
                    continue  # it was removed, or is no file of ours: there is nothing to be synced
                store.backend.sync(fd)
                if state == f.SEALED and not before[f.T_OWNER]:  # else it is being sealed
                    with store.lock:
                        self._note_synced(index, entry, before)
            store.sync_directory(store.segments_path)
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            raise from_os_error(error, "cannot make the cache durable") from error

    @staticmethod
    def _note_synced(index: Index, entry: int, before: list[int]) -> None:
        """A sealed segment, as it was `before`, is durable; unless somebody has gone on with it meanwhile."""
        words = index.words
        if all(words[entry + field] == before[field] for field in (f.T_STATE, f.T_SIZE, f.T_OWNER, f.T_TAIL)):
            words[entry + f.T_SYNCED] = before[f.T_SIZE]

    # -- cleaning -----------------------------------------------------------------------------

    def _emptiest(self, allowed: Callable[[int], bool], least: int = _MIN_GARBAGE) -> int | None:
        """The segment that is worth most to clean, of those whose table entries are `allowed`: fewest
        live bytes for its size. At least 1/`least` of it has to be garbage."""
        index, best, best_share = self._index, None, 1.0
        writer = self._store.writer
        for entry in index.table_entries():
            size, live = index.words[entry + f.T_SIZE], index.words[entry + f.T_LIVE]
            segment = index.words[entry] & f.MASK32
            if writer is not None and writer.segment == segment:
                size = writer.tail  # what was granted beyond is for us to use, and no garbage
            if not allowed(entry) or size - live < size // least or live >= best_share * size:
                continue
            if size - live - self._overhead(segment) >= size // least:
                best, best_share = segment, live / size
        return best

    def _is_unclaimed(self, entry: int) -> bool:
        """True of a segment that nobody appends to any more, and that no other handle is cleaning."""
        words = self._index.words
        cleaner, owner = words[entry + f.T_CLEANER], words[entry + f.T_OWNER]
        state = words[entry] & ~f.MASK32
        mine = not cleaner or cleaner == self._store.owner.token
        return mine and (state == f.TAKEN or state == f.SEALED and not owner)

    def _is_appendable(self, entry: int) -> bool:
        """True of what others, or this handle, append to or clean: it can be taken from them."""
        return self._index.words[entry] & ~f.MASK32 in (f.ACTIVE, *_CLEANABLE)

    def _overhead(self, segment: int) -> int:
        """Bytes of a sealed segment that are no records: copies would have as many."""
        known = self._overheads.get(segment)
        if known is None:
            if len(self._overheads) > 4 * self._index.table_capacity:
                self._overheads.clear()
            if self._index.state(segment) != f.SEALED:  # it may get a footer
                return f.SEGMENT_HEADER_BYTES
            try:
                fd = self._store.file_of(segment)
                footer = footer_bytes(self._store.backend, fd) if fd is not None else 0
            except ours(OSError):  # an estimate will do: whoever copies from it hears of it
                return f.SEGMENT_HEADER_BYTES
            known = self._overheads[segment] = f.SEGMENT_HEADER_BYTES + footer
        return known

    def _clean_some(self, budget: int, *, beyond: bool = True) -> bool:
        """Copy about `budget` bytes of live records out of the segment being cleaned. True if it went.

        `beyond`: copies may be above the limit. `reclaiming` is held then.
        """
        with self._store.appending:
            cleaning = self._cleaning = self._cleaning or self._begin_cleaning()
            try:
                if cleaning is None or not self._copy_live(cleaning, budget, beyond):
                    return False
            except _NoRoom:  # whoever needs room will evict
                return False
            except StorageFull as error:
                if not is_volume_full(error):
                    raise
                return False
            self._cleaning = None
            return self.drop_one_dead()

    def _clean_emptiest(self) -> bool:
        """Clean one segment to the end. False if none is worth it or there is no room to copy to."""
        return self._clean_some(_WHOLE)

    def _clean_active(self) -> bool:
        """Clean one segment that some handle, be it this one, appends to or has begun to clean: it may
        be idle for ever, and nothing that lives goes for what it holds. False if none is worth it.
        """
        return self._clean_any(_MIN_GARBAGE)

    def _clean_little(self) -> bool:
        """The same where there is little to be had, which costs much: still nothing that lives has to go."""
        return self._clean_any(_MIN_GARBAGE * _MIN_GARBAGE)

    def _clean_any(self, least: int) -> bool:
        store = self._store
        with store.appending:
            with store.lock:
                segment = self._emptiest(self._is_appendable, least)
                if segment is None:
                    return False
            self._take(segment)
            return self._clean_emptiest()

    def _take(self, segment: int) -> None:
        """Let nobody append to a segment any more, and clean it next. `appending` is held."""
        store, writer = self._store, self._store.writer
        if writer is not None and writer.segment == segment:
            store.seal_writer()
        with store.lock:
            if self._index.state(segment) == f.ACTIVE:
                self._index.set_state(segment, f.TAKEN)
                self._index.resize_segment(segment, self._file_size(segment))
            if self._cleaning is not None and self._cleaning.segment != segment:
                self._cleaning.close()
                self._cleaning = None
            self._cleaning = self._cleaning or self._claim(segment)

    def _let_segment_go(self) -> bool:
        """On a volume without room for copies: let one segment go, that with the fewest live bytes for its
        size, with all that is still in it. False if there is none."""
        store = self._store
        if self._volume is None or not store.policy.evicts:
            return False
        with store.appending:
            with store.lock:
                words = self._index.words
                entries = [entry for entry in self._index.table_entries() if self._is_appendable(entry)]
                if not entries:
                    return False
                entry = min(entries, key=lambda at: words[at + f.T_LIVE] / max(1, words[at + f.T_SIZE]))
                segment = words[entry] & f.MASK32
            self._take(segment)
            cleaning, self._cleaning = self._cleaning, None
            if cleaning is not None:
                cleaning.close()
            self._evict_from(segment)
            self._end_cleaning(segment)
            return self.drop_one_dead()

    def _evict_from(self, segment: int) -> None:
        """Evict what lives in a segment."""
        store, records = self._store, self._store.records(segment)
        while batch := list(islice(records, _EVICT_MOST)):
            with store.lock:
                slots = {slot.low: slot for record in batch if (slot := store.alive(record, segment))}
                if not slots:
                    continue
                gone = store.remove_slots(list(slots.values()))
                store.count("evictions", len(slots))
            store.discard(gone)

    def _begin_cleaning(self) -> Cleaning | None:
        with self._store.lock:
            segment = self._emptiest(self._is_unclaimed)
            return None if segment is None else self._claim(segment)

    def _claim(self, segment: int) -> Cleaning:
        """Let others see that this handle cleans a segment. The lock is held."""
        index = self._index
        index.words[index.entry(segment) + f.T_CLEANER] = self._store.owner.acquire()
        return Cleaning(segment, self._store.records(segment))

    def _copy_live(self, cleaning: Cleaning, budget: int, beyond: bool) -> bool:
        """Move live records to the head of the log. True once the segment has none left."""
        store, segment = self._store, cleaning.segment
        while budget > 0:
            batch: list[tuple[Record, Slot]] = []
            size = 0
            while size < min(budget, _COPY_BYTES, self.segment_bytes // 4):
                record = cleaning.next()
                if record is None:
                    break
                slot = store.alive(record, segment)
                if slot is not None:
                    batch.append((record, slot))
                    size += record.head.record_bytes
                budget -= _LOOK_BYTES
            budget -= size
            again = batch
            try:
                again = self._copy(batch, segment, beyond)
            finally:
                cleaning.again += [record for record, _ in again]
            if record is None and not cleaning.again:
                self._end_cleaning(segment)
                return True
        return False

    def _end_cleaning(self, segment: int) -> None:
        """All live records moved. If the count says otherwise, records are damaged, or slots were: before
        what these showed is gone, and what it replaced is all that is left, the index is made anew."""
        store = self._store
        with store.lock:
            index = self._index
            if index.state(segment) not in _CLEANABLE:
                return
            entry = index.entry(segment)
            index.words[entry + f.T_CLEANER] = 0
            if not index.words[entry + f.T_LIVE] or any(
                store.alive(record, segment) for record in store.records(segment)
            ):
                return
            left = index.slots_in(segment)
            if index.words[entry + f.T_LIVE] == sum(f.record_bytes(slot.lengths) for slot in left):
                for slot in left:
                    store.drop_corrupt(slot)
            else:
                store.rebuild("a segment has fewer entries than it counts")

    def _copy(
        self, batch: list[tuple[Record, Slot]], segment: int, beyond: bool
    ) -> list[tuple[Record, Slot]]:
        """Copy records and point their slots to the copies. Those that have to be tried again."""
        if not batch:
            return []
        store = self._store
        fd = store.file_of(segment)
        if fd is None:
            return []
        raw = store.backend.read_many([(fd, r.head.record_bytes, r.offset) for r, _ in batch])
        sound = [
            (record, slot, self._unless_failed(data))
            for (record, slot), data in zip(batch, raw, strict=True)
            if self._is_sound(record, slot, self._unless_failed(data))
        ]
        with store.appending:
            heads = [record.head for record, _, _ in sound]
            size = sum(f.room_for(h.names_length, h.payload_length) for h in heads)
            writer = self._copy_room(size, segment if beyond else 0)
            epoch = self._index.words[f.W_EPOCH]
            places, copies = self._moved(sound, writer)
            try:
                writer.append_many(copies)
            except ours(OSError) as error:
                raise from_os_error(error, "cannot copy entries while cleaning") from error
        again = []
        with store.lock:
            index = self._index
            valid = index.words[f.W_EPOCH] == epoch and store.may_show(writer.segment)
            for (record, slot, _), place in zip(sound, places, strict=True):
                at = index.find(slot.low, slot.high)
                if at and index.words[at + f.S_PLACE] == slot.place:
                    if valid:
                        index.move(at, place)
                    else:
                        again.append((record, slot))
                index.settle(place, record.head.record_bytes)
        return again

    @staticmethod
    def _unless_failed(data: bytes | OSError) -> bytes:
        if isinstance(data, OSError):
            raise from_os_error(data, "cannot read an entry while cleaning", "the entry was kept")
        return data

    def _is_sound(self, record: Record, slot: Slot, data: bytes) -> bool:
        """Check a record before it is copied; one that is damaged is dropped here."""
        store, head = self._store, record.head
        sound = len(data) == head.record_bytes and f.verify_head(
            data, 0, head, self._index.identity.seed, slot.place
        )
        if sound and head.kind == f.PUT:
            value = memoryview(data)[head.head_bytes : head.head_bytes + head.value_length]
            sound = f.value_sum(value, slot.low, slot.flags) == slot.value_sum
        if not sound:
            with store.lock:
                current = store.alive(record, slot.segment)
                if current is not None:
                    store.drop_corrupt(current)
        return sound

    def _moved(
        self, sound: list[tuple[Record, Slot, bytes]], writer: SegmentWriter
    ) -> tuple[list[int], list[tuple[bytes, Buffer, bytes]]]:
        """The records as they read at the writer's tail: same stamp, other place."""
        offset = writer.tail
        places: list[int] = []
        copies: list[tuple[bytes, Buffer, bytes]] = []
        seed = self._index.identity.seed
        for record, slot, data in sound:
            head, place = record.head, f.pack_place(writer.segment, offset)
            at = f.RECORD_BYTES + head.key_length + head.tag_length
            meta = data[at : at + head.meta_length]
            packed = f.pack_record(
                seed, place, head.kind, head.flags, record.key, record.tag, meta,
                head.value_length, head.stamp, slot.expires, head.created, head.value_sum,
            )  # fmt: skip
            payload = data[head.head_bytes : head.head_bytes + head.payload_length]
            places.append(place)
            copies.append((packed, payload, record.payload))
            offset += head.record_bytes
        return places, copies

    def _copy_room(self, size: int, segment: int) -> SegmentWriter:
        """Room for copies out of `segment`: up to one segment above the limit, since that is about to go.
        Without a `segment`, within the limit.

        Where the limit was lowered, and more than that is above it, one segment above what there is.
        """
        for _ in range(_GRANTS):
            writer = self._store.writer
            if writer is not None and writer.room >= size:
                return writer
            if not self._grant(size, beyond=self._beyond(segment) if segment else 0, exactly=True):
                break
        raise _NoRoom

    def _beyond(self, segment: int) -> int:
        """Bytes above `_limit` that there may be while `segment` is cleaned."""
        index = self._index  # of old segments each may be longer than those of a limit that was lowered
        one = max(self.segment_bytes, index.words[index.entry(segment) + f.T_SIZE])
        beyond = self._whole_limit - self._limit + one
        over = index.used_bytes - self._limit
        return beyond + (over if over > beyond else 0)

    # -- checkpoints --------------------------------------------------------------------------

    def _checkpoint_if_due(self) -> None:
        """Begin one, in a thread of its own. `_pacing` is held."""
        under_way = self._checkpoint is not None and self._checkpoint.is_alive()
        if under_way or self._store.closed or not self._is_checkpoint_due():
            return
        thread = threading.Thread(
            target=self._write_due_checkpoint, name="yatagarasu-checkpoint", daemon=True
        )
        self._checkpoint = thread  # first: an interruption may come when it runs already
        if not started(thread):
            self._checkpoint = None
            self._go_without_checkpoint("there is no thread to be had")

    def _is_checkpoint_due(self) -> bool:
        index = self._index
        least = min(_CHECKPOINT_RECORDS, self._size_limit // _CHECKPOINT_SHARE)
        if index.words[f.W_WRITTEN] >= max(least, index.count()):
            return True
        return self._is_log_long()

    def _is_log_long(self) -> bool:
        return self._store.changes.size > max(self._size_limit // _LOG_SHARE, _LEAST_LOG)

    def _is_log_overlong(self) -> bool:
        """So much longer that whoever needs room waits for a checkpoint: none came in time by itself."""
        return self._store.changes.size > _OVERLONG * max(self._size_limit // _LOG_SHARE, _LEAST_LOG)

    @runs_alone
    def _write_due_checkpoint(self) -> None:
        self._write_checkpoint(self._is_checkpoint_due)

    def _write_checkpoint(self, due: Callable[[], bool] = lambda: True) -> bool:
        """Write a checkpoint, unless another handle just did. False, and logged, if that fails."""
        try:
            with self._store.checkpointing:
                if due():
                    checkpoint.write(self._store)
            return True
        except ClosedError:  # meanwhile
            return False
        except ours(OSError, IndexDamaged) as error:
            self._go_without_checkpoint(error)
            return False

    def _go_without_checkpoint(self, error: object) -> None:
        line = f"cannot write a checkpoint, recovery will take longer: {error}"
        self._store.log_once("checkpoint", line)
