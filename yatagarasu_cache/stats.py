"""What `DiskCache.stats()` tells."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .store import format as f

if TYPE_CHECKING:
    from .store.store import Store


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Figures of the whole cache (all processes, since it was created or last rebuilt).

    `process` has the same counters for this process alone: of all its handles on this directory,
    since it has had one open. Sizes are bytes. Hits and misses of other processes appear within a
    second, or some hundred uses; at the latest when they end.
    """

    hits: int
    misses: int
    sets: int
    deletes: int
    evictions: int
    expirations: int
    corrupt: int
    unreadable: int  # values that a serializer of this process could not read; of this process alone
    entries: int  # expired ones included that were not removed yet
    live_bytes: int  # of records and large values that are in use, and of the index
    disk_bytes: int  # of all files, active segments at full size
    size_limit: int
    eviction: str
    segments: int
    index_bytes: int
    backend: str
    backend_reason: str
    core: str  # what serves plain gets and sets: "c" or "python"
    core_reason: str
    computing: dict[str, int]  # by `get_or_set`, in this process
    process: dict[str, int]
    backend_stats: dict[str, Any]

    @property
    def hit_ratio(self) -> float:
        """Hits by gets, 0.0 to 1.0; 0.0 before the first get."""
        gets = self.hits + self.misses
        return self.hits / gets if gets else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, fit for JSON."""
        return dataclasses.asdict(self) | {"hit_ratio": self.hit_ratio}


def collect(store: Store, reason: str, process: dict[str, int], computing: dict[str, int]) -> CacheStats:
    """`process`: see `sharing.counters`, which has folded them; `computing`: see `InFlight`."""
    store.shared_settings.follow()
    index = store.current.index
    shared = {name: index.words[f.W_COUNTERS + i] for i, name in enumerate(f.COUNTERS)}
    return CacheStats(
        **shared,
        unreadable=process.pop("unreadable"),
        entries=index.count(),
        live_bytes=index.live_bytes,
        disk_bytes=index.used_bytes,
        size_limit=store.limits.size_limit,
        eviction=store.limits.policy.name,
        segments=len(index.segments()),
        index_bytes=index.words[f.W_INDEX_BYTES],
        backend=store.backend.name,
        backend_reason=reason,
        core=store.core.name,
        core_reason=store.core.reason,
        computing=dict(computing),
        process=process,
        backend_stats=store.backend.stats(),
    )
