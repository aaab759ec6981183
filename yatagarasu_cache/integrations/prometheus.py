"""The figures of a cache for Prometheus:

    REGISTRY.register(YatagarasuCollector(cache, "thumbnails"))

They are of the whole cache, whichever process is asked. Where each worker is scraped by itself, or a sum is
made of all, name ``once=True``; or let ``yatagarasu-cache export`` report them from one process beside the
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..cache import DiskCache
from ..stats import CacheStats
from ._metrics import METRICS, Reporter
from ._metrics import Metric as Figure

__all__ = ["WatchedCollector", "YatagarasuCollector"]

Figures = Callable[[], Iterable[tuple[str, "CacheStats | None"]]]  # of each cache, by its label
PREFIX = "yatagarasu_cache"


class YatagarasuCollector(Collector):
    """Counters and gauges of a cache, with the label ``cache``.

    cache: open, and kept so. name: the label. once: of all processes that have such a collector on the cache,
    one reports; when it ends, another one does.

    Several caches have one collector: ``YatagarasuCollector(first, "a").add(second, "b")``, since a registry
    has each name once. In the multiprocess mode of prometheus_client, register it beside the
    `MultiProcessCollector`, in the registry that is made for each request: whoever answers reports the
    totals, once.
    """

    def __init__(self, cache: DiskCache, name: str, *, once: bool = False) -> None:
        self._reporters: dict[str, Reporter] = {}
        self.add(cache, name, once=once)

    def add(self, cache: DiskCache, name: str, *, once: bool = False) -> YatagarasuCollector:
        """Report another cache as well; in the place of one of that name. Returns the collector."""
        self._reporters[name] = Reporter(cache, "prometheus", once=once)
        return self

    def describe(self) -> Iterable[Metric]:
        """What there will be, so that registering asks nothing of a cache."""
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterable[Metric]:
        families = {metric: _family(metric) for metric in METRICS}
        told = False
        for name, reporter in list(self._reporters.items()):
            for metric, figure in reporter.figures():
                families[metric].add_metric([name], figure)
                told = True
        return families.values() if told else ()


class WatchedCollector(Collector):
    """The same of any number of caches, each of which may come and go: see ``yatagarasu-cache export``."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterable[Metric]:
        """A family has the figures of all caches: a name may come once in an answer."""
        there = [(name, stats) for name, stats in self._figures() if stats is not None]
        for metric in METRICS:
            family = _family(metric)
            for name, stats in there:
                family.add_metric([name], metric.of(stats))
            yield family


def _family(metric: Figure) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
    return kind(f"{PREFIX}_{metric.name}", metric.meaning, labels=["cache"], unit=metric.unit)
