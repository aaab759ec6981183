"""What a handle goes by: the settings of the cache, its own, and the sizes that follow from both."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Settings
from . import cache_settings
from . import format as f
from .cache_settings import CacheSettings
from .eviction import POLICIES, Policy

LARGE_VALUE_BYTES = 1 << 20  # from here a value gets a file of its own; see docs/operations.md
MIN_SEGMENT_BYTES = 8 << 10
MAX_SEGMENT_BYTES = 64 << 20
_SEGMENTS_IN_LIMIT = 32  # at least so many segments make up size_limit
_STREAM_SHARE = 8  # a stream of unknown length may have 1/8 of size_limit, unless max_stream_size is named


def segment_bytes_of(size_limit: int) -> int:
    """The power of two that makes at least `_SEGMENTS_IN_LIMIT` segments of the limit, within bounds."""
    fitting = 1 << max(0, (size_limit // _SEGMENTS_IN_LIMIT).bit_length() - 1)
    return min(max(fitting, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


class Limits:
    """Sizes in bytes, and the policy of eviction. They change when somebody changes the cache's settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._followers: list[Callable[[], None]] = []
        self.take_over(cache_settings.of_handle(settings))  # until there is an index that says it

    def follow(self, follower: Callable[[], None]) -> None:
        """Have somebody told of each change, and of what holds now."""
        self._followers.append(follower)
        follower()

    def forget_followers(self) -> None:
        """The parts of a try to open that failed hear of nothing any more."""
        self._followers.clear()

    def take_over(self, settings: CacheSettings) -> None:
        """Go by other settings of the cache, and whatever follows from them."""
        own = self._settings
        self.in_force = settings
        self.size_limit = limit = settings.size_limit
        self.policy: Policy = POLICIES[settings.eviction]
        self.segment_bytes = min(own.segment_size or segment_bytes_of(limit), limit // 4)
        self.large_bytes = min(own.large_value_size or LARGE_VALUE_BYTES, self.segment_bytes // 4)
        # A value this long may be refused; shorter ones always fit and are not asked about.
        self.unchecked_bytes = min(self.large_bytes, own.max_value_size or self.large_bytes)
        # A stream of unknown length is refused beyond this: it evicts before it is known to fit.
        self.stream_bytes = own.max_stream_size or limit // _STREAM_SHARE
        # And one that would be longer than this is not even encoded.
        self.encodable_bytes = min(limit, own.max_value_size or limit, f.MAX_VALUE_BYTES)
        for follower in self._followers:
            follower()
