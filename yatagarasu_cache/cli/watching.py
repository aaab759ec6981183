"""Caches that others use, looked at without being touched: for `top` and `export`.

They are opened with ``read_only=True``: nothing is written, counted or locked, and nobody waits. What is
looked at may be cleared, removed and made anew meanwhile. That is said, and looking goes on.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ..cache import DiskCache
from ..codec import Key, decode_key
from ..errors import CacheError
from ..stats import CacheStats
from ..store.format import INDEX_NAME
from ..store.reading import Names
from ..store.sampling import sample
from .opening import require_cache
from .processes import Process, identity_of, processes_of
from .rates import (
    BLOCKS,
    PLAIN_BLOCKS,
    Figures,
    Group,
    History,
    Rates,
    Seen,
    bar,
    groups,
    prefix_of,
    sparkline,
    tag_of,
)
from .rates import rates as rates_between
from .show import human_size, is_encodable, printable, reason

__all__ = ["Look", "View", "Watched", "processes_text"]

SAMPLE = 256  # entries of each refresh: a share of a tenth is right within some four hundredths, as a rule
GROUPS = 6  # tags, and prefixes, that are shown
PROCESSES_EVERY = 5.0  # seconds: /proc has many files
TOLD_FOR = 10.0  # seconds in which it is shown that something happened to a cache
COLUMNS = 30  # of sparklines and bars


class Look(NamedTuple):
    """What was seen of a cache at once."""

    stats: CacheStats | None  # None where it cannot be looked at,
    trouble: str = ""  # and why
    is_another: bool = False  # than at the look before: it was removed, and made anew


class Watched:
    """A cache, whether it is there or not. Threads may look at the same time."""

    def __init__(self, directory: str, name: str = "", backend: Any = "auto") -> None:
        self.directory = os.path.abspath(directory)
        self.name = name or self.directory
        self._backend = backend
        self._lock = threading.Lock()
        self._cache: DiskCache | None = None
        self._at: object = None  # which directory that is
        self._seen: object = None  # which cache was looked at last

    def look(self) -> Look:
        with self._lock:
            try:
                cache = self._opened()
                stats = cache.stats()
                identity = cache._store.current.index.identity
            except (CacheError, OSError) as error:
                self._close()
                return Look(None, reason(error))
            seen, self._seen = self._seen, identity
            return Look(stats, "", seen not in (None, identity))

    def sample(self, most: int = SAMPLE) -> list[Seen]:
        """Some entries, whatever their number; none where they cannot be looked at."""
        with self._lock:
            if self._cache is None:
                return []
            try:
                found = sample(self._cache._store, most, random.randrange)
                return [Seen(decode_key(one.key), tag(one), slot.value_length) for one, slot in found]
            except (CacheError, OSError):  # the next look tells
                return []

    def _opened(self) -> DiskCache:
        """The handle, if it still is that of what is there; else another one."""
        here = identity_of(self.directory)
        if self._cache is not None and here == self._at and self._has_index():
            return self._cache
        self._close()
        require_cache(self.directory)
        self._at = here
        self._cache = DiskCache(self.directory, backend=self._backend, read_only=True)
        return self._cache

    def _has_index(self) -> bool:
        """What was mapped could be read for ever, also where it was removed."""
        return os.path.exists(os.path.join(self.directory, INDEX_NAME))

    def _close(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def close(self) -> None:
        with self._lock:
            self._close()


class View:
    """All that is shown of a cache; `refresh` brings it up to date."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.look = Look(None, "not looked at yet")
        self.note = ""  # what happened to it a moment ago
        self._noted_at = 0.0
        self.rates = Rates()
        self.history = History()
        self.tags: list[Group] = []
        self.prefixes: list[Group] = []
        self.sampled = 0
        self.mean_size = 0.0  # of a value, in the sample
        self.processes: list[Process] | None = None
        self._before: Figures | None = None
        self._processes_at: float | None = None

    def refresh(self, at: float) -> None:
        """at: seconds, of a clock that is never set."""
        self.take(at, self.watched.look())
        if self.look.stats is not None:
            self.take_sample(self.watched.sample())
        if self._processes_at is None or at - self._processes_at >= PROCESSES_EVERY:
            self._processes_at = at
            self.processes = processes_of(self.watched.directory)

    def take(self, at: float, look: Look) -> None:
        """Another look."""
        was, self.look = self.look.stats, look
        stats = look.stats
        if stats is None:
            self.rates, self._before = Rates(), None
            return
        now = figures(at, stats)
        if look.is_another:
            self._tell(at, "removed, and made anew")
            self._before = None
            self.history.forget()
        elif was is not None and was.entries and not stats.entries:
            self._tell(at, "emptied")
        elif at - self._noted_at >= TOLD_FOR:
            self.note = ""
        if self._before is not None:
            self.rates = rates_between(self._before, now)
            self.history.add(at, self.rates)
        else:
            self.rates = Rates()
        self._before = now

    def _tell(self, at: float, note: str) -> None:
        self._noted_at, self.note = at, note

    def take_sample(self, seen: list[Seen]) -> None:
        entries = 0 if self.look.stats is None else self.look.stats.entries
        self.sampled = len(seen)
        self.mean_size = sum(one.size for one in seen) / len(seen) if seen else 0.0
        self.tags = groups([tag_of(one.tag) for one in seen], entries, GROUPS)
        self.prefixes = groups([prefix_of(one.key) for one in seen], entries, GROUPS)

    @property
    def bytes_read(self) -> float:
        """A second, about: hits, each of the mean size of a value."""
        return self.rates.hits * self.mean_size

    @property
    def bytes_written(self) -> float:
        return self.rates.sets * self.mean_size

    # -- as text, and as JSON -----------------------------------------------------------------

    def rows(self, *, sparklines: bool = True) -> list[tuple[str, str]]:
        """(what, how much) of each line. Without sparklines where there is no minute to show."""

        def pace(of: Callable[[Rates], float]) -> str:
            blocks = BLOCKS if is_encodable(BLOCKS) else PLAIN_BLOCKS
            spark = sparkline(self.history.course(of, COLUMNS), blocks) + " " if sparklines else ""
            return f"{spark}{of(self.rates):,.1f}/s"

        stats, now = self.look.stats, self.rates
        title = ("cache", printable(self.watched.name))
        if stats is None:
            return [title, ("state", f"cannot be looked at: {printable(self.look.trouble)}")]
        recent = "no gets" if now.hit_ratio is None else f"{now.hit_ratio:.1%}"
        ever = f"{stats.hit_ratio:.1%}" if stats.hits or stats.misses else "no gets yet"
        full = stats.disk_bytes / stats.size_limit if stats.size_limit else 0.0
        found = [
            title,
            ("hit ratio", f"{recent} (ever: {ever})"),
            ("gets", f"{pace(lambda one: one.gets)}, about {human_size(self.bytes_read)}/s"),
            ("sets", f"{pace(lambda one: one.sets)}, about {human_size(self.bytes_written)}/s"),
            ("deletes", pace(lambda one: one.deletes)),
            ("evictions", f"{pace(lambda one: one.evictions)}, {stats.evictions:,} ever"),
            ("expirations", f"{pace(lambda one: one.expirations)}, {stats.expirations:,} ever"),
            (
                "disk",
                f"{self._bar(stats)} {full:.1%}, {human_size(stats.disk_bytes)} of "
                f"{human_size(stats.size_limit)} ({stats.eviction})",
            ),
            ("entries", f"{stats.entries:,}, {human_size(stats.live_bytes)} live, {stats.segments} segments"),
            ("tags", groups_text(self.tags)),
            ("prefixes", groups_text(self.prefixes)),
            ("used by", processes_text(self.processes)),
        ]
        if stats.corrupt:
            found.append(("corrupt", f"{stats.corrupt:,}: look at the disk, run check"))
        if self.note:
            found.append(("note", self.note))
        return found

    def _bar(self, stats: CacheStats) -> str:
        ends = ("█", "░") if is_encodable("█░") else ("#", ".")
        return bar(stats.disk_bytes, stats.size_limit, COLUMNS, *ends)

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        found: dict[str, Any] = {"directory": self.watched.directory, "trouble": self.look.trouble or None}
        stats, now = self.look.stats, self.rates
        if stats is None:
            return found
        return found | {
            "note": self.note or None,
            "seconds": now.seconds,
            "hit_ratio": now.hit_ratio,
            "hit_ratio_ever": stats.hit_ratio,
            "per_second": {
                "gets": now.gets, "hits": now.hits, "misses": now.misses, "sets": now.sets,
                "deletes": now.deletes, "evictions": now.evictions, "expirations": now.expirations,
                "bytes_read": self.bytes_read, "bytes_written": self.bytes_written,
                "disk_bytes": now.growth,
            },
            "entries": stats.entries,
            "live_bytes": stats.live_bytes,
            "disk_bytes": stats.disk_bytes,
            "size_limit": stats.size_limit,
            "eviction": stats.eviction,
            "corrupt": stats.corrupt,
            "sampled": self.sampled,
            "tags": [group._asdict() for group in self.tags],
            "prefixes": [group._asdict() for group in self.prefixes],
            "processes": None if self.processes is None else [one._asdict() for one in self.processes],
        }  # fmt: skip


def tag(names: Names) -> Key:
    return decode_key(names.tag) if names.tag else None


def figures(at: float, stats: CacheStats) -> Figures:
    return Figures(
        at, stats.hits, stats.misses, stats.sets, stats.deletes, stats.evictions, stats.expirations,
        stats.entries, stats.disk_bytes,
    )  # fmt: skip


def groups_text(found: list[Group]) -> str:
    return ", ".join(f"{printable(one.name)} {one.share:.0%} (~{one.entries:,})" for one in found) or "-"


def processes_text(found: list[Process] | None) -> str:
    """Who has it open, as `stats` and `top` say it."""
    if found is None:
        return "this system does not tell"
    return ", ".join(printable(str(one)) for one in found) or "nobody else"
