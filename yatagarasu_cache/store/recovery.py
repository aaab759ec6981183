"""Opening the index, and making it anew from the checkpoint and the segments when it can't be trusted.

It can't after a power cut (its pages reach the disk in any order), and when it is damaged or
missing. A killed process leaves it trustworthy: the kernel still has every store it made.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..concurrency.file_locks import GRACE
from ..concurrency.interruption import ours, suppressing
from ..errors import CacheIOError, FormatError, ReadOnlyError, from_os_error
from . import checkpoint
from . import format as f
from .cache_files import CacheFiles, Temporaries
from .checkpoint import Checkpoint
from .directory import boot_id
from .format import SLOT_WORDS, Identity
from .hidden import Hidden
from .index import Index, IndexDamaged
from .life import Life
from .limits import Limits
from .notices import Notices
from .owners import Owner
from .rebuild import Rebuild
from .segment import read_segment_header
from .settings_file import SettingsFile
from .under_way import count_anew
from .unreadable import Losses, is_absence, is_given_up, remedy

if TYPE_CHECKING:
    pass

_MIN_TABLE = 256
_TABLE_SHARE = 1 << 16  # the table has an entry for each 64 KiB of the limit,
_COMMON_TABLE = 1024  # up to so many, for hundreds of handles; it grows where more are needed
_FIRST_HEADERS = 3  # segments looked at to see that index and segments belong together
_LIKELY_SEGMENTS = 1 << 24  # a number farther on than this is damage


class Recovery:
    """Opens, mends and replaces the index of one handle. The lock is held, unless it only reads."""

    def __init__(
        self, life: Life, files: CacheFiles, temporaries: Temporaries, owner: Owner, limits: Limits,
        settings_file: SettingsFile, losses: Losses, notices: Notices,
    ) -> None:  # fmt: skip
        self._life, self._files, self._temporaries, self._owner = life, files, temporaries, owner
        self._limits, self._settings_file = limits, settings_file
        self._losses, self._notices = losses, notices

    def open_index(self, *, alone: bool, seed: int | None = None) -> Index:
        """The index of the cache, fit for use. The lock is held (unless the cache is read-only).

        `seed`: that of digests already computed, for a cache that is begun here.
        """
        reason = ""
        index = None
        try:
            index = self.map_index()
            if not self._life.read_only:
                self.repair(index)
            reason = self._distrust(index, alone)
        except FileNotFoundError:
            reason = "missing" if self._segments_there() else "new"
        except IndexDamaged as error:
            reason = f"damaged ({error})"
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._losses.note("index", f.INDEX_NAME, error)
            reason = "unreadable"
        if self._life.read_only:
            if reason:
                raise ReadOnlyError(
                    f"the index in {self._files.root!r} is {reason} and has to be rebuilt: "
                    "open the cache once without read_only"
                )
            assert index is not None
            return index
        if reason == "new":
            return self._begin(self._new_index(seed), alone=alone)
        if reason:
            self._notices.log_once("recovery", f"the index is {reason}: recovering it from the segments")
            fresh = self.rebuild(index)
            if index is not None:
                index.close()
            elif not alone:  # users of the removed one see that before they get the lock again
                time.sleep(GRACE)
            return self._begin(fresh, alone=alone)
        assert index is not None
        return self._begin(index, alone=alone)

    def repair(self, index: Index) -> None:
        """Complete a change of the index that a death or an interruption cut short. The lock is held."""
        if index.words[f.W_BUSY] == f.BUSY_STORING:
            count_anew(self._owner, index)
            index.words[f.W_BUSY] = 0
        else:
            index.repair()

    def map_index(self) -> Index:
        """The index file as it is. `IndexDamaged` if it can't be used, `FormatError` if it must not be."""
        flags = os.O_RDONLY if self._life.read_only else os.O_RDWR
        fd = self._files.backend.open(self._files.path(f.INDEX_NAME), flags)
        index = Index(self._files.backend, self._files.root, fd, writable=not self._life.read_only)
        try:
            _check_version(self._files.root, index.version)
            index.validate()
        except BaseException:
            index.close()
            raise
        return index

    def _distrust(self, index: Index, alone: bool) -> str:
        """Why the index must be rebuilt; empty if it need not be."""
        words = index.words
        boot = boot_id()
        recorded = bytes(index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16])
        if not words[f.W_CLEAN] and (recorded != boot or (boot == bytes(16) and alone)):
            return "from before the machine was restarted"
        if not words[f.W_CLEAN] and (alone or self._life.read_only) and index.is_copied():
            return "a copy, made while it was in use"
        if not f.LITTLE_ENDIAN:
            raise FormatError("this machine is big-endian, and the format is little-endian only")
        # Whoever replaces an index holds the lock, as we do.
        if index.superseded and not self._life.read_only:
            return "marked as replaced, and it is not"
        listed = index.segments() or self._segments_there()
        for segment in listed[:_FIRST_HEADERS]:
            header = self._header_if_readable(segment)
            if header is not None and header.identity != index.identity:
                return "from another cache"
        return ""

    def _begin(self, index: Index, *, alone: bool = False) -> Index:
        """Mark the index as in use under this boot, durably before anything else changes."""
        clean = index.words[f.W_CLEAN]
        if clean:
            index.words[f.W_CLEAN] = 0
            index.sync()
        index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] = boot_id()
        index.note_file()
        index.words[f.W_INDEX_BYTES] = os.fstat(index.fd).st_size
        if alone:
            checkpoint.account(self._files, index)
            if not clean or index.words[f.W_LARGE_BYTES] > index.words[f.W_SIZE_LIMIT]:
                self.tidy(index)
        return index

    def tidy(self, index: Index, *, began: int | None = None) -> None:
        """Nobody else has the cache open: remove what dead handles left half done.

        `began`: a stamp; threads of this handle may still be storing files with later ones. None: none are.
        """
        own = None if began is None else self._owner.token
        self.remove_unfinished(index, is_alive=lambda token: token == own)
        for (low, high, pointer), _, path in self._files.large.listed():
            if (began is None or pointer <= began) and not self.refers(index, low, high, pointer):
                self._files.backend.unlink(path)
        count_anew(self._owner, index)
        self._owner.sweep(self._owner.marks()[1])  # last: if we are killed before, somebody looks again

    def remove_unfinished(self, index: Index, is_alive: Callable[[int], bool]) -> None:
        """Remove files that dead handles had not yet given a name or a place. The lock is held. `is_alive` is
        asked after a file was seen: whoever made it was marked as alive before.
        """
        for name, _ in self._files.files_in(self._temporaries.directory):
            parsed = f.parse_temporary_name(name)
            if parsed is not None and not is_alive(parsed[0]):
                self._files.backend.unlink(os.path.join(self._temporaries.directory, name))
        unlisted = [segment for segment in self._segments_there() if not index.state(segment)]
        named = index.named_segments() if unlisted else set()  # named but not listed: the table is damaged
        for segment in unlisted:
            if segment not in named and self._is_leftover(segment, index.identity):
                # Its writer was killed before the first record.
                self._files.backend.unlink(self._files.segments.path(segment))

    def refers(self, index: Index, low: int, high: int, pointer: int) -> bool:
        at = index.find(low, high)
        if not at:
            return False
        slot = index.slot(at)
        try:
            return slot.is_large and self._files.segments.pointer(slot) == pointer
        except ours(OSError):
            return True  # not known: check() looks closer

    def _header(self, segment: int) -> f.SegmentHeader | None:
        """None if it is damaged, or no file of ours is there."""
        try:
            with self._files.segments.reading(segment) as fd:
                return read_segment_header(self._files.backend, fd)
        except ours(OSError) as error:
            if is_absence(error):
                return None
            raise

    def _header_if_readable(self, segment: int) -> f.SegmentHeader | None:
        """None also if it cannot be read. That is no reason to distrust the index: whoever reads an entry of
        the segment gets the error, and only an open cache can be checked."""
        try:
            return self._header(segment)
        except ours(OSError):
            return None

    def _is_leftover(self, segment: int, identity: Identity) -> bool:
        """True if an unlisted segment is of this very cache, or its header was never written."""
        try:
            with self._files.segments.reading(segment) as fd:
                data = self._files.backend.read(fd, f.SEGMENT_HEADER_BYTES, 0)
        except ours(OSError):  # it stays where it is: check() says why
            return False
        header = f.unpack_segment_header(data)
        if header is None:
            return not any(data)
        return header.identity == identity and header.segment == segment

    def _segments_there(self) -> list[int]:
        """Numbers of all files that are named like segments, in their order."""
        try:
            names = [name for name, _ in self._files.scandir(self._files.segments.directory)]
        except FileNotFoundError:  # the directory itself was removed
            names = []
        return sorted(segment for name in names if (segment := f.parse_segment_name(name)) is not None)

    def _table_capacity(self, segments: list[int]) -> int:
        limit = self._limits.size_limit
        usual = min(limit // _TABLE_SHARE, _COMMON_TABLE)
        wanted = max(4 * (limit // self._limits.segment_bytes), 2 * len(segments), usual, _MIN_TABLE)
        capacity = min(f.MAX_TABLE, 1 << (wanted - 1).bit_length())
        # Segments that a table of another size held, or whose removal did not last, may share an entry.
        while capacity < f.MAX_TABLE and len({s % capacity for s in segments}) < len(segments):
            capacity *= 2
        return capacity

    def fitting_table(self, index: Index) -> int:
        """How many segments an index needs room for: fewer, if the limit was lowered since it was made."""
        return min(index.table_capacity, self._table_capacity(index.segments() + index.logs()))

    def _new_index(self, seed: int | None) -> Index:
        """An empty index in its place. Readers, which take no lock, find it whole or not at all."""
        self._limits.take_over(self._settings_file.for_new_index(None))
        path = self._temporaries.passing_path()
        identity = _new_identity()
        if seed is not None:
            identity = identity._replace(seed=seed)
        index = self._create(path, identity, self._table_capacity([]))
        try:
            self._files.backend.replace(path, self._files.path(f.INDEX_NAME))
        except BaseException:
            index.close()
            self._files.backend.clear_away(path)
            raise
        return index

    def _create(self, path: str, identity: Identity, capacity: int) -> Index:
        try:
            mode = self._files.mode
            return Index.create(self._files.backend, path, identity, capacity, mode, self._limits.in_force)
        except BaseException:
            self._files.backend.clear_away(path)
            raise

    # -- rebuilding ---------------------------------------------------------------------------

    def rebuild(self, old: Index | None) -> Index:
        """A new index in place of the old one, which others may still map. The lock is held.

        If a file cannot be read, nothing is changed unless such files are given up: what the file says would
        be missing in the new index for good, or what it removed would come back.
        """
        try:
            return self._rebuilt(old)
        except FileNotFoundError:  # directories are being removed: the caller tries again
            raise
        except ours(OSError) as error:
            if isinstance(error, CacheIOError):
                raise
            doing = f"cannot make the index in {self._files.root!r} anew"
            raise from_os_error(error, doing, f"nothing was changed; {remedy(error)}".rstrip("; ")) from error

    def _rebuilt(self, old: Index | None) -> Index:
        headers, hidden = self._headers()
        self._limits.take_over(self._settings_file.for_new_index(old))
        saved = self._read_checkpoint()
        identity = _identity(headers, old, saved)
        if saved is not None and saved.identity != identity:
            saved = None
        own = {s: h for s, h in sorted(headers.items()) if h.identity == identity and h.segment == s}
        if hidden:
            known = Hidden(self._files, identity, own, saved, old)
            own = {**own, **{segment: known.header(segment, size) for segment, size in hidden.items()}}
        path = self._temporaries.path()
        index = self._create(path, identity, self._table_capacity(list(own)))
        try:
            Rebuild(
                self._files,
                self._owner,
                self._losses,
                index,
                saved,
                own,
                frozenset(hidden),
                verify=not _is_as_left(old),
            ).run()
            index.words[f.W_NEXT_SEGMENT] = self._unused_segment(saved, old)
            if old is not None:
                index.words[f.W_CLOCK] = max(index.words[f.W_CLOCK], _sane_clock(old))
            index.words[f.W_EPOCH] = index.stamp()
            # What survived a power cut is durable, whether or not it was promised to be.
            index.words[f.W_PROMISED] = 1
            index.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] = boot_id()
            target = self._files.path(f.INDEX_NAME)
            if old is None:
                self._supersede(target)
            self._files.backend.replace(path, target)
        except BaseException:
            index.close()
            self._files.backend.clear_away(path)
            raise
        if old is not None and old.writable:
            old.supersede()
        with suppressing(OSError):  # if the old one comes back after a power cut, it is rebuilt once more
            self._files.sync_directory(self._files.root)
        self._settings_file.keep()
        return index

    def remake(self, old: Index, table_capacity: int) -> Index:
        """A copy of the index without its gaps, in its place. The lock is held."""
        path = self._temporaries.path()
        index = self._create(path, old.identity, table_capacity)
        try:
            old.copied_to(index)
            self._files.backend.replace(path, self._files.path(f.INDEX_NAME))
        except BaseException:
            index.close()
            self._files.backend.clear_away(path)
            raise
        old.supersede()
        return index

    def _unused_segment(self, saved: Checkpoint | None, old: Index | None) -> int:
        """A number that nothing refers to: no file, no checkpoint, no descriptor that others have open."""
        known = [segment for segment in self._segments_there() if segment <= f.LAST_SEGMENT]
        if saved is not None:
            known += saved.sealed
            for image in saved.parts:
                places = memoryview(image).cast("Q")[f.S_PLACE :: SLOT_WORDS]
                known.append(max(places, default=0) >> 32)
        unused = max(known, default=0) + 1
        before = old.words[f.W_NEXT_SEGMENT] if old is not None else 0
        return max(unused, before) if before < unused + _LIKELY_SEGMENTS else unused

    def _supersede(self, path: str) -> None:
        """Tell processes that still map a damaged index, as far as the file has a header to tell it in."""
        try:
            with self._files.backend.opened(path, os.O_RDWR) as fd:
                if os.fstat(fd).st_size >= f.HEADER_BYTES:
                    descriptors = f.SUPERSEDED_DESCRIPTOR.to_bytes(8, "little") * f.PARTITIONS
                    self._files.backend.write(fd, [(1).to_bytes(8, "little")], f.W_SUPERSEDED * 8)
                    self._files.backend.write(fd, [descriptors], f.W_PARTITIONS * 8)
        except ours(OSError) as error:  # else they would go on with it while others use the new one
            if not is_absence(error) and not is_given_up(error):
                raise

    def _headers(self) -> tuple[dict[int, f.SegmentHeader], dict[int, int]]:
        """Sound headers of all segment files, by the number in the file's name; and the sizes of those that
        are given up because theirs cannot be read."""
        headers, hidden = {}, {}
        for name, status in self._files.scandir(self._files.segments.directory):
            segment = f.parse_segment_name(name)
            if segment is None:
                continue
            try:
                header = self._header(segment)
            except ours(OSError) as error:
                if not is_given_up(error):
                    raise
                self._losses.note("segment", name, error)
                hidden[segment] = status.st_size
                continue
            if header is not None:
                _check_version(self._files.root, header.version)
                headers[segment] = header
        return headers, hidden

    def _read_checkpoint(self) -> Checkpoint | None:
        try:
            return checkpoint.read(self._files.backend, self._files.root)
        except ours(OSError) as error:
            if not is_given_up(error):
                raise
            self._losses.note("checkpoint", f.CHECKPOINT_NAME, error)
            return None


def _check_version(root: str, version: int) -> None:
    if version != f.FORMAT_VERSION:
        raise FormatError(
            f"{root!r} has format version {version} and this release reads version {f.FORMAT_VERSION}: "
            "use a matching release, or remove the directory to begin anew"
        )


def _new_identity() -> Identity:
    return Identity(secrets.token_bytes(16), secrets.randbits(64))


def has_room_for_table(index: Index) -> bool:
    """True if the index could list twice as many segments."""
    return 2 * index.table_capacity <= f.MAX_TABLE


def _is_as_left(old: Index | None) -> bool:
    """True if no power cut can have come between the last change and now, and these are no copies."""
    boot = boot_id()
    if old is None or old.is_copied():
        return False
    return boot != bytes(16) and old.map[f.W_BOOT * 8 : f.W_BOOT * 8 + 16] == boot


def _sane_clock(old: Index) -> int:
    """The old index's clock, unless damage has sent it into the far future."""
    clock: int = old.words[f.W_CLOCK]
    return clock if clock < time.time_ns() + 10**18 else 0


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
