"""What the cache may come to: `size_limit`, or what its volume has room for, and the shares of that."""

from __future__ import annotations

import errno
import os
import time

from ..concurrency.interruption import suppressing
from ..config import Settings
from ..errors import StorageFull, ValueTooLarge
from . import checkpoint
from . import format as f
from .cache_files import CacheFiles
from .current import CurrentIndex
from .format import PARTITIONS
from .index import Index, IndexDamaged
from .limits import Limits
from .locking import Locks
from .shared_settings import SharedSettings
from .under_way import UnderWay

_GROWTH_SHARE = 16  # an index grows by one partition of 64 at a time, to 2.6 times of what is live there,
_LEAST_GROWTH = 1 << 13  # and by whole pages
_FOR_COPIES = 64  # 1/64 of the limit, or half a segment, is for copies that make room, and not for entries
_LEAST_FREE = 10  # 1/10 of the limit, or three segments, are kept free of live records at least,
_BESIDE_SLACK = 16  # as are 1/16 besides what segments leave of their last blocks,
_LEAST_LIVE = 8  # and 1/8 of what segments may have is for these, whatever the headroom
_RECOUNT_SECONDS = 10.0  # between two counts of everything because too much is counted
_VOLUME_SECONDS = 60.0  # after which it is looked whether the volume has more room again


class Budget:
    """Bytes. All of it is as of now: settings change, and so does what others take of the volume."""

    def __init__(
        self, locks: Locks, files: CacheFiles, limits: Limits, current: CurrentIndex,
        shared_settings: SharedSettings, under_way: UnderWay, settings: Settings,
    ) -> None:  # fmt: skip
        self._locks, self._files, self._limits, self._current = locks, files, limits, current
        self._shared_settings, self._under_way = shared_settings, under_way
        self._settings = settings
        self.volume: int | None = None  # bytes that the volume has room for, where it was full
        self.volume_seen = 0.0
        self._recounted = -_RECOUNT_SECONDS

    @property
    def _index(self) -> Index:
        return self._current.index

    @property
    def limit_in_force(self) -> int:
        """That of the cache, as of now."""
        self._shared_settings.follow()
        return self._limits.size_limit

    @property
    def size_limit(self) -> int:
        """That of the cache, or what the volume has room for."""
        limit = self.limit_in_force
        return limit if self.volume is None else min(limit, self.volume)

    @property
    def limit(self) -> int:
        """What `used_bytes` may come to by what is stored. Copies that make room may take more."""
        return self.whole_limit - min(self._limits.segment_bytes // 2, self.size_limit // _FOR_COPIES)

    @property
    def whole_limit(self) -> int:
        """What `used_bytes` may come to: less than `size_limit` by what may come in between.

        That is a checkpoint under way, beside one that may have become as large as that, and an
        index that grows by a partition.
        """
        return self.within(self.size_limit)

    def within(self, size_limit: int) -> int:
        index = self._index
        growth = index.words[f.W_INDEX_BYTES] // _GROWTH_SHARE + _LEAST_GROWTH
        most = checkpoint.most_bytes(index)
        standing = max(0, most - index.words[f.W_CHECKPOINT_BYTES])
        limit: int = size_limit - growth - most - standing
        return limit

    @property
    def live_limit(self) -> int:
        """What `live_bytes` may come to: the rest is for garbage, so that not all is copied all the time."""
        return self.live_within(self.limit_in_force)

    def live_within(self, size_limit: int) -> int:
        index, limit, fixed = self._index, self.within(size_limit), self.fixed_bytes
        least = min(3 * self._limits.segment_bytes, size_limit // _LEAST_FREE)
        slack = index.words[f.W_SLACK]  # of blocks, which cleaning does not bring back
        least = max(least, slack + size_limit // _BESIDE_SLACK)
        free = max(int(size_limit * self._limits.in_force.headroom), least)
        return max(limit - free, fixed + (limit - fixed) // _LEAST_LIVE)

    @property
    def largest_value(self) -> int:
        """Bytes that a value may have: what there would be room for without all others."""
        return self._largest_within(self.limit_in_force)

    def largest_on_volume(self, largest: int) -> int:
        """The same of the volume, what the cache has there included; or `largest`, if that is less."""
        bytes_ = self.volume_bytes()
        return largest if bytes_ >= self.limit_in_force else self._largest_within(bytes_)

    def _largest_within(self, size_limit: int) -> int:
        room = self.live_within(size_limit) - self.fixed_bytes
        room -= min(2 * self._limits.segment_bytes, room // 4)
        return room - room % f.FILE_BLOCK

    def volume_bytes(self) -> int:
        """What the cache could come to on its volume, as far as that can be known: quotas can't."""
        with suppressing(OSError, AttributeError):
            status = os.statvfs(self._files.root)
            if status.f_blocks:  # else the file system does not say
                free: int = status.f_bfree * status.f_frsize
                return self._index.used_bytes + free
        return self._limits.size_limit

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no eviction gives back: those of the index and of the checkpoint."""
        words = self._index.words
        fixed: int = words[f.W_INDEX_BYTES] + words[f.W_CHECKPOINT_BYTES]
        return fixed

    @property
    def is_far_above(self) -> bool:
        """True where the limit was lowered, and the cache does not keep it yet."""
        return self._index.used_bytes > self.limit + self._limits.segment_bytes

    @property
    def counts_too_much(self) -> bool:
        """More is said to live than there can be, unless the limit was lowered just now: what is evicted for
        a damaged count is lost for nothing."""
        return self._index.live_bytes - self.within(self.limit_in_force) > self._limits.size_limit

    def beyond(self, segment: int) -> int:
        """Bytes above `_limit` that there may be while `segment` is cleaned."""
        index = self._index
        # Each of the old segments may be longer than those of a limit that was lowered.
        one = max(self._limits.segment_bytes, index.words[index.entry(segment) + f.T_SIZE])
        beyond = self.whole_limit - self.limit + one
        over = index.used_bytes - self.limit
        return beyond + (over if over > beyond else 0)

    def volume_is_full(self) -> None:
        """What the cache has now is what the volume has room for."""
        self.volume, self.volume_seen = self._index.used_bytes, time.monotonic()

    def forget_volume(self) -> None:
        """It may have room by now: whoever writes will see."""
        self.volume = None

    def look_at_volume(self) -> None:
        """The volume was full: now and then, see whether it has more room."""
        now = time.monotonic()
        if self.volume is not None and now - self.volume_seen > _VOLUME_SECONDS:
            self.volume, self.volume_seen = max(self.volume, self.volume_bytes()), now

    def recount(self) -> None:
        """Count anew what can be: a damaged count makes a cache look full."""
        self._recounted = time.monotonic()
        with self._locks.index:
            index = self._index
            try:
                index.validate()
            except IndexDamaged as error:
                self._current.rebuild(str(error))
                return
            for part in range(PARTITIONS):
                index.recount(part)
            for entry in index.table_entries():
                if index.words[entry] & ~f.MASK32 == f.SEALED:
                    index.words[entry + f.T_SIZE] = self._files.segments.size(index.words[entry] & f.MASK32)
            index.sum_up()
            checkpoint.account(self._files, index)
            self._under_way.count_anew()

    def recount_if_due(self) -> None:
        if self.counts_too_much and time.monotonic() - self._recounted > _RECOUNT_SECONDS:
            self.recount()

    def ensure_fits(self, length: int, most: int | None = None) -> None:
        """Refuse what can never fit, before anything changes; and a stream that is longer than `most`."""
        largest = self._settings.max_value_size
        if largest is not None and length > largest:
            raise ValueTooLarge(f"the value has {length} bytes and max_value_size is {largest}: raise it")
        if length > f.MAX_VALUE_BYTES:
            raise ValueTooLarge(f"the value has {length} bytes, {f.MAX_VALUE_BYTES} are possible: split it")
        room = self.largest_value
        if length > room:
            raise ValueTooLarge(
                f"the value has {length} bytes and a cache with size_limit={self._limits.size_limit} "
                f"has room for {max(0, room)}: raise size_limit"
            )
        if length >= self._limits.large_bytes and length > (room := self.largest_on_volume(room)):
            raise StorageFull(
                errno.ENOSPC,
                f"the value has {length} bytes and the volume has room for {max(0, room)}, even without all "
                "other entries: free space on the volume",
            )
        if most is not None and length > most:
            share = "" if self._settings.max_stream_size else ", an eighth of size_limit"
            raise ValueTooLarge(
                f"a stream whose length was not told has more than {most} bytes, and max_stream_size is "
                f"{self._limits.stream_bytes}{share}: pass length= to set, or raise max_stream_size"
            )
