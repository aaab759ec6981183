"""What looks at a cache tell: rates, their course over a minute, shares of a sample. No cache, no clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Figures", "Group", "History", "Rates", "Seen", "bar", "groups", "prefix_of", "rates", "sparkline",
    "tag_of",
]  # fmt: skip

MINUTE = 60.0
BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-:=+*#"  # for terminals that cannot show the others
LONGEST_PREFIX = 32
_ENDS = "/:|."  # what parts of a key are set apart by, in most programs


class Figures(NamedTuple):
    """What a cache said of itself at one moment. Counters only grow, unless it is made anew."""

    at: float  # seconds, of a clock that is never set
    hits: int = 0
    misses: int = 0
    sets: int = 0
    deletes: int = 0
    evictions: int = 0
    expirations: int = 0
    entries: int = 0
    disk: int = 0


class Rates(NamedTuple):
    """What happened between two moments, a second."""

    seconds: float = 0.0
    hits: float = 0.0
    misses: float = 0.0
    sets: float = 0.0
    deletes: float = 0.0
    evictions: float = 0.0
    expirations: float = 0.0
    growth: float = 0.0  # bytes on disk

    @property
    def gets(self) -> float:
        return self.hits + self.misses

    @property
    def hit_ratio(self) -> float | None:
        """None where nobody asked for anything."""
        return self.hits / self.gets if self.gets else None


_COUNTERS = ("hits", "misses", "sets", "deletes", "evictions", "expirations")


def rates(before: Figures, now: Figures) -> Rates:
    """A counter that is lower than before began again at 0: so it is with an index that was made anew."""
    seconds = now.at - before.at
    if seconds <= 0:
        return Rates()

    def risen(name: str) -> float:
        was, is_ = getattr(before, name), getattr(now, name)
        return float(is_ - was if is_ >= was else is_) / seconds

    found = {name: risen(name) for name in _COUNTERS}
    return Rates(seconds=seconds, growth=(now.disk - before.disk) / seconds, **found)


class History:
    """The rates of the last minute."""

    def __init__(self) -> None:
        self._known: deque[tuple[float, Rates]] = deque()

    def add(self, at: float, known: Rates) -> None:
        self._known.append((at, known))
        while self._known[0][0] <= at - MINUTE:
            self._known.popleft()

    def forget(self) -> None:
        self._known.clear()

    def course(self, of: Callable[[Rates], float], columns: int) -> list[float | None]:
        """The mean rate of each part of the minute up to the newest look; None where nothing is known."""
        if not self._known:
            return [None] * columns
        end, width = self._known[-1][0], MINUTE / columns
        parts: list[list[float]] = [[] for _ in range(columns)]
        for at, known in self._known:
            parts[columns - 1 - min(int((end - at) / width), columns - 1)].append(of(known))
        return [sum(part) / len(part) if part else None for part in parts]


def sparkline(values: Iterable[float | None], blocks: str = BLOCKS) -> str:
    """A character for each value, higher ones for larger values, the lowest for 0; a blank for None."""
    values = list(values)
    most = max((value for value in values if value is not None), default=0.0)

    def block(value: float | None) -> str:
        if value is None:
            return " "
        return blocks[round(value / most * (len(blocks) - 1))] if most > 0 else blocks[0]

    return "".join(map(block, values))


def bar(part: float, whole: float, columns: int, full: str = "█", empty: str = "░") -> str:
    """How much of a whole there is; what is more than all of it fills the bar."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
    done = round(share * columns)
    return full * done + empty * (columns - done)


# -- what is in it -----------------------------------------------------------------------------


class Seen(NamedTuple):
    """An entry of a sample."""

    key: Any
    tag: Any  # None if it has none
    size: int  # of its value


class Group(NamedTuple):
    """Entries of a sample that have something in common, and how many there are likely to be in the cache."""

    name: str
    share: float
    entries: int


def prefix_of(key: object) -> str:
    """What keys of a kind begin with: up to the first ``/``, ``:``, ``|`` or ``.``; the first of a tuple."""
    if isinstance(key, str):
        end = min((at for at in map(key.find, _ENDS) if at >= 0), default=-1)
        return key[: end + 1] if 0 <= end < LONGEST_PREFIX else "<str>"
    if isinstance(key, bytes):
        found = prefix_of(key.decode("latin-1"))
        return "<bytes>" if found == "<str>" else repr(found.encode("latin-1"))
    if isinstance(key, tuple) and len(key) > 1:
        first = repr(key[0])
        return f"({first}, ...)" if len(first) <= LONGEST_PREFIX else "<tuple>"
    return f"<{type(key).__name__}>"


def tag_of(tag: object) -> str:
    if tag is None:
        return "<none>"
    return tag if isinstance(tag, str) else repr(tag)


def groups(sample: Sequence[str], entries: int, most: int) -> list[Group]:
    """The largest groups of a sample, in which the group of each one stands, of `entries` that there are."""
    counted = sorted(Counter(sample).items(), key=lambda one: (-one[1], one[0]))
    return [
        Group(name, count / len(sample), round(entries * count / len(sample)))
        for name, count in counted[:most]
    ]
