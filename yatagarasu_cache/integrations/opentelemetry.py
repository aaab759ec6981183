"""The figures of a cache for OpenTelemetry:

    observe(cache, get_meter("shop"), name="thumbnails")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

from .._version import __version__
from ..cache import DiskCache
from ._metrics import METRICS, Metric, Reporter

__all__ = ["observe"]


def observe(
    cache: DiskCache, meter: Meter | None = None, *, name: str | None = None, once: bool = True
) -> None:
    """Make observable instruments of a cache: ``yatagarasu_cache.hits``, ``.entries``, ``.disk`` (bytes), ...

    They are of the whole cache. So of all processes that observe it one reports, and when that ends another
    one; with ``once=False`` each one does. cache: open, and kept so. meter: of `get_meter`; None: one of this
    package's. name: the attribute ``cache.name``; None: the directory.
    """
    meter = meter or get_meter("yatagarasu_cache", __version__)
    reporter = Reporter(cache, "opentelemetry", once=once)
    attributes = {"cache.name": name or cache.directory}

    def reading(metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(figure, attributes) for one, figure in reporter.figures() if one is metric]

        return read

    for metric in METRICS:
        create = meter.create_observable_counter if metric.is_counter else meter.create_observable_gauge
        unit = "By" if metric.unit == "bytes" else "1"
        create(f"yatagarasu_cache.{metric.name}", [reading(metric)], unit=unit, description=metric.meaning)
