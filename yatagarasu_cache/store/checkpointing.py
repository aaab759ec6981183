"""When a checkpoint is due, and how it is written while others go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

from xxhash import xxh3_64

from ..concurrency.interruption import ours, started
from ..concurrency.locks import runs_alone
from ..errors import ClosedError
from . import checkpoint
from . import format as f
from .budget import Budget
from .cache_files import CacheFiles, Temporaries
from .changes import ChangeLog
from .current import CurrentIndex
from .dead_segments import DeadSegments
from .durability import Durability
from .format import PARTITIONS
from .index import Index, IndexDamaged
from .life import Life
from .locking import Locks
from .notices import Notices

_CHECKPOINT_RECORDS = 1 << 16  # and at least as many as there are entries, between checkpoints;
_CHECKPOINT_SHARE = 1 << 12  # fewer in a cache of less than so many bytes for each of them
_LOG_SHARE = 64  # a log of changes of more than 1/64 of the limit asks for a checkpoint as well
_LEAST_LOG = 1 << 13
_OVERLONG = 4  # times that, and whoever needs room waits for a checkpoint


class Replaced(Exception):
    """The index was made anew meanwhile."""


class Checkpoints:
    """Written by a thread of their own, or by whoever asks for one."""

    def __init__(
        self, life: Life, locks: Locks, files: CacheFiles, temporaries: Temporaries, current: CurrentIndex,
        budget: Budget, changes: ChangeLog, durability: Durability, dead: DeadSegments, notices: Notices,
    ) -> None:  # fmt: skip
        self._life, self._locks, self._files, self._temporaries = life, locks, files, temporaries
        self._current, self._budget, self._changes = current, budget, changes
        self._durability, self._dead, self._notices = durability, dead, notices
        self._thread: threading.Thread | None = None

    def begin_if_due(self) -> None:
        """Begin one, in a thread of its own. `_pacing` is held."""
        under_way = self._thread is not None and self._thread.is_alive()
        if under_way or self._life.closed or not self._is_due():
            return
        thread = threading.Thread(
            target=self._write_due, name="yatagarasu-checkpoint", daemon=True
        )
        self._thread = thread  # first: an interruption may come when it runs already
        if not started(thread):
            self._thread = None
            self._go_without("there is no thread to be had")

    def _is_due(self) -> bool:
        index = self._current.index
        least = min(_CHECKPOINT_RECORDS, self._budget.size_limit // _CHECKPOINT_SHARE)
        if index.words[f.W_WRITTEN] >= max(least, index.count()):
            return True
        return self._is_log_long()

    def _is_log_long(self) -> bool:
        return self._changes.size > max(self._budget.size_limit // _LOG_SHARE, _LEAST_LOG)

    def is_log_overlong(self) -> bool:
        """So much longer that whoever needs room waits for a checkpoint: none came in time by itself."""
        return self._changes.size > _OVERLONG * max(self._budget.size_limit // _LOG_SHARE, _LEAST_LOG)

    @runs_alone
    def _write_due(self) -> None:
        self.write_if(self._is_due)

    def write_if(self, due: Callable[[], bool] = lambda: True) -> bool:
        """Write a checkpoint, unless another handle just did. False, and logged, if that fails."""
        try:
            with self._locks.checkpointing:
                if due():
                    self.write()
            return True
        except ClosedError:  # meanwhile
            return False
        except ours(OSError, IndexDamaged) as error:
            self._go_without(error)
            return False

    def _go_without(self, error: object) -> None:
        line = f"cannot write a checkpoint, recovery will take longer: {error}"
        self._notices.log_once("checkpoint", line)

    def cover_changes(self) -> None:
        """What the logs of changes take can be had back by a checkpoint: the one under way, or a new one."""
        if self._changes.total_size > _LEAST_LOG // 2:
            self.write_if(lambda: self._changes.total_size > _LEAST_LOG // 2)

    def write(self) -> None:
        """Write a checkpoint, part by part, while others go on. Atomic: the old one stands until then.

        Every change stamped up to the floor is in it, or is appended again with a later stamp: one that was
        appended before the checkpoint began, and comes to the index after that, notices a new epoch.
        Only one is written at a time. The index lock is not held.
        """
        with self._locks.checkpointing:
            with self._locks.index:
                floor = self._current.index.stamp()
                self._changes.rotate(floor)  # first: it may find no room
                index = self._current.index
                index.words[f.W_EPOCH] = floor
                index.words[f.W_WRITTEN] = 0
                sealed = [
                    (index.words[entry] & f.MASK32, index.words[entry + f.T_SIZE])
                    for entry in index.table_entries()
                    if index.words[entry] & ~f.MASK32 == f.SEALED
                ]
            temporary = self._temporaries.path()
            try:
                self._write_file(index, temporary, floor, sealed)
                # Now, not before: the parts name records that came after the floor, and what these
                # replaced is not trusted any more once the checkpoint stands.
                self._durability.sync_dirty()
                with self._locks.index:
                    if self._current.index is index:
                        self._files.backend.replace(temporary, self._files.path(f.CHECKPOINT_NAME))
                        checkpoint.account(self._files, index)
                        self._files.sync_directory(self._files.root)
                        index.words[f.W_FLOOR] = floor
                        self._changes.cover(floor)
            except Replaced:  # it would be about an index that is no more
                pass
            finally:
                self._files.backend.clear_away(temporary)
            self._dead.drop_all()

    def _write_file(
        self, index: Index, path: str, floor: int, sealed: list[tuple[int, int]]
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with self._files.made(lambda: self._files.backend.opened(path, flags, self._files.mode)) as fd:
            checksum, size = xxh3_64(), 0
            for part in self._parts(index, floor, sealed):
                checksum.update(part)
                self._files.backend.write(fd, [part], size)
                size += len(part)
            self._files.backend.write(fd, [f.CHECKPOINT_SUM.pack(checksum.intdigest())], size)
            self._files.backend.sync(fd)

    def _parts(self, index: Index, floor: int, sealed: list[tuple[int, int]]) -> Iterator[bytes]:
        yield f.CHECKPOINT_HEADER.pack(
            f.CHECKPOINT_MAGIC, f.FORMAT_VERSION, PARTITIONS, *index.identity, floor, len(sealed),
            index.words[f.W_EVICTION],
        )  # fmt: skip
        yield b"".join(f.CHECKPOINT_SEGMENT.pack(*entry) for entry in sealed)
        for part in range(PARTITIONS):
            with self._locks.index:
                if self._current.index is not index:
                    raise Replaced
                slots = index.partition_slots(part)
                image = index.map[slots.start * 8 : slots.stop * 8]
                cells = index.tag_words(part)
            live = checkpoint.live(part, image)
            found = b"".join(live)
            hashes = checkpoint.tag_hashes(found, cells)
            yield f.CHECKPOINT_PART.pack(len(live), len(live) if hashes else 0) + found + hashes

    @property
    def thread(self) -> threading.Thread | None:
        """That which writes one, or has written the last."""
        return self._thread

    def after_fork(self) -> None:
        self._thread = None
