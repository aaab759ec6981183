"""Which entries go first. A policy is what a hit writes into a slot's access word, nothing more:
the entry with the smallest word is the next victim.

The index says which policy holds, so that all who use a cache write, and read, the same words.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from . import format as f

COUNT_SHIFT = 44  # LFU: hits above, the stamp in milliseconds below, for ties by age
COUNT_MAX = (1 << 20) - 1
_STAMP_SHIFT = 64 - COUNT_SHIFT
_STAMP_MASK = (1 << COUNT_SHIFT) - 1


class Policy:
    """First in, first out: a hit changes nothing. Base of the others.

    A new policy overrides `touched` (and `first` if an entry should not begin with its stamp), and
    `taken_over`. The compiled core knows them all (csrc/core.c), and so does format.EVICTIONS.
    """

    name = "fifo"
    evicts = True
    touches = False  # False spares a hit the store

    def first(self, stamp: int) -> int:
        """The access word of an entry written at `stamp`."""
        return stamp

    def touched(self, word: int, stamp: int) -> int:
        """The access word after a hit at `stamp`."""
        return word

    def is_possible(self, word: int, stamp: int, now: int) -> bool:
        """Whether an entry of `stamp` can have such an access word by `now`."""
        return 0 < word <= now

    def taken_over(self, word: int, stamp: int, now: int) -> int:
        """The access word of an entry of `stamp`, whichever policy kept it. No hit is later than `now`.

        It may be asked again of its own answer: a change of policy that was interrupted is made once more.
        """
        return stamp


class LeastRecentlyUsed(Policy):
    name = "lru"
    touches = True

    def touched(self, word: int, stamp: int) -> int:
        return stamp

    def taken_over(self, word: int, stamp: int, now: int) -> int:
        return _last_use(word, stamp, now)


class LeastFrequentlyUsed(Policy):
    """Fewest hits first; among equals the one whose last hit is oldest."""

    name = "lfu"
    touches = True

    def first(self, stamp: int) -> int:
        return self.touched(0, stamp)

    def touched(self, word: int, stamp: int) -> int:
        count = min(COUNT_MAX, (word >> COUNT_SHIFT) + 1)
        return count << COUNT_SHIFT | stamp >> _STAMP_SHIFT

    def is_possible(self, word: int, stamp: int, now: int) -> bool:
        # A hit may have been noted just when the entry was replaced by one that is a little later.
        return _is_counted(word, max(0, stamp - f.AHEAD), now)

    def taken_over(self, word: int, stamp: int, now: int) -> int:
        if _is_counted(word, stamp, now):
            return word
        return self.first(_last_use(word, stamp, now))


class NoEviction(Policy):
    """Nothing is evicted: a full cache raises `StorageFull`."""

    name = "none"
    evicts = False


def _is_counted(word: int, stamp: int, now: int) -> bool:
    """True for a word of "lfu", if it is no damage: those of other policies are stamps from the time in
    which the entry has been there, and "lfu" would have to have counted some 98,000 hits to look like one."""
    in_time = stamp >> _STAMP_SHIFT <= word & _STAMP_MASK <= now >> _STAMP_SHIFT
    return in_time and word > _STAMP_MASK and not stamp <= word <= now


def _last_use(word: int, stamp: int, now: int) -> int:
    """When the entry was last used, going by an access word of any policy."""
    if _is_counted(word, stamp, now):
        return max(stamp, (word & _STAMP_MASK) << _STAMP_SHIFT)
    return word if stamp <= word <= now else stamp


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (LeastRecentlyUsed(), Policy(), LeastFrequentlyUsed(), NoEviction())
}
_BY_CODE = {code: POLICIES[name] for code, name in enumerate(f.EVICTIONS, 1)}
# What a hit makes of an access word, by the policy's code in the index; for a damaged code, nothing.
TOUCHED: dict[int, Callable[[int, int], int]] = {
    code: policy.touched for code, policy in _BY_CODE.items() if policy.touches
}


def policy_of(words: memoryview) -> Policy:
    """The policy in force, by the words of an index. Where the index is damaged, the one that does least."""
    return _BY_CODE.get(words[f.W_EVICTION], POLICIES["fifo"])


def take_over(words: memoryview, slots: range, policy: Policy, now: int) -> None:
    """Make the access words of some slots those of a policy."""
    if not len(slots):
        return
    stamps = words[slots.start + f.S_STAMP : slots.stop : slots.step].tolist()
    access = words[slots.start + f.S_ACCESS : slots.stop : slots.step]
    taken_over = policy.taken_over
    made = array(
        "Q",
        [
            taken_over(word, stamp, now) if word else 0  # 0 marks a slot that is not in use
            for word, stamp in zip(access.tolist(), stamps, strict=True)
        ],
    )
    access[:] = memoryview(made)
