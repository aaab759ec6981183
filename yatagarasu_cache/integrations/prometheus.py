"""The figures of a cache for Prometheus:

    REGISTRY.register(YatagarasuCollector(cache, "thumbnails"))

They are of the whole cache, whichever process is asked. Where each worker is scraped by itself, or a sum is made of
all, name ``once=True``; or let ``yatagarasu-cache export`` report them from one process beside the workers.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..cache import DiskCache
from ._metrics import METRICS, Reporter

__all__ = ["YatagarasuCollector"]

PREFIX = "yatagarasu_cache"


class YatagarasuCollector(Collector):
    """Counters and gauges of a cache, with the label ``cache``.

    cache: open, and kept so. name: the label. once: of all processes that have such a collector on the cache,
    one reports; when it ends, another one does.

    In the multiprocess mode of prometheus_client, register it beside the `MultiProcessCollector`, in the
    registry that is made for each request: whoever answers reports the totals, once.
    """

    def __init__(self, cache: DiskCache, name: str, *, once: bool = False) -> None:
        self._reporter, self._name = Reporter(cache, "prometheus", once=once), name

    def describe(self) -> Iterable[Metric]:
        """What there will be, so that registering asks nothing of the cache."""
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterable[Metric]:
        for metric, figure in self._reporter.figures():
            family = _family(metric)
            family.add_metric([self._name], figure)
            yield family


def _family(metric: object) -> CounterMetricFamily | GaugeMetricFamily:
    name, is_counter, unit, meaning, _ = metric  # type: ignore[misc]
    kind = CounterMetricFamily if is_counter else GaugeMetricFamily
    return kind(f"{PREFIX}_{name}", meaning, labels=["cache"], unit=unit)
