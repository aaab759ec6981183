"""The figures of a cache for Prometheus and OpenTelemetry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import DiskCache
from yatagarasu_cache.integrations._metrics import METRICS, Reporter

REPORT = """
import sys
from yatagarasu_cache import DiskCache
from yatagarasu_cache.integrations._metrics import Reporter
cache = DiskCache(sys.argv[1])
reporter = Reporter(cache, "kind", once=True)
print(len(list(reporter.figures())), flush=True)
sys.stdin.readline()
print(len(list(reporter.figures())), flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    with DiskCache(tmp_path / "cache", size_limit=1 << 26) as cache:
        cache["a"], cache["b"] = b"x" * 1000, b"y"
        assert cache.get("a") and cache.get("none") is None and cache.delete("b")
        yield cache


def test_all_figures_are_those_of_the_cache(cache: DiskCache) -> None:
    stats = cache.stats()
    figures = {metric.name: figure for metric, figure in Reporter(cache, "kind", once=False).figures()}
    assert figures["hits"] == 1 and figures["misses"] == 1 and figures["sets"] == 2 and figures["deletes"] == 1
    assert figures["entries"] == 1 and figures["limit"] == 1 << 26 and figures["disk"] == stats.disk_bytes
    assert len(figures) == len(METRICS) == len({metric.meaning for metric in METRICS})


def test_one_of_all_processes_reports_and_another_when_that_ends(cache: DiskCache) -> None:
    process = subprocess.Popen([sys.executable, "-c", REPORT, cache.directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert int(process.stdout.readline()) == len(METRICS)
    mine = Reporter(cache, "kind", once=True)
    assert list(mine.figures()) == [] and len(list(Reporter(cache, "other kind", once=True).figures())) == len(METRICS)
    assert len(list(Reporter(cache, "kind", once=False).figures())) == len(METRICS)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert int(process.stdout.readline()) == len(METRICS) and process.wait(30) == 0
    assert len(list(mine.figures())) == len(METRICS) and len(list(mine.figures())) == len(METRICS)


def test_a_cache_that_was_closed_is_said(cache: DiskCache, caplog: Any) -> None:
    cache.close()
    assert list(Reporter(cache, "kind", once=False).figures()) == []
    assert "closed" in caplog.text


def test_prometheus(cache: DiskCache, tmp_path: Path) -> None:
    client = pytest.importorskip("prometheus_client")
    from yatagarasu_cache.integrations.prometheus import YatagarasuCollector

    registry = client.CollectorRegistry()
    collector = YatagarasuCollector(cache, "thumbnails")
    registry.register(collector)
    with DiskCache(tmp_path / "other") as other:
        collector.add(other, "other")
        text = client.generate_latest(registry).decode()
    assert 'yatagarasu_cache_hits_total{cache="thumbnails"} 1.0' in text
    assert 'yatagarasu_cache_hits_total{cache="other"} 0.0' in text
    assert registry.get_sample_value("yatagarasu_cache_limit_bytes", {"cache": "thumbnails"}) == 1 << 26
    assert text.count("# TYPE yatagarasu_cache_hits_total") == 1
    assert registry.get_sample_value("yatagarasu_cache_entries", {"cache": "thumbnails"}) == 1


WORKER = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from yatagarasu_cache import DiskCache
from yatagarasu_cache.integrations.prometheus import YatagarasuCollector
cache = DiskCache(sys.argv[1])
cache.get("a")
cache.stats()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
registry.register(YatagarasuCollector(cache, "x"))
print(registry.get_sample_value("yatagarasu_cache_hits_total", {"cache": "x"}))
"""


def test_prometheus_among_workers(cache: DiskCache, tmp_path: Path) -> None:
    """Whichever worker answers has the totals of all of them, once."""
    pytest.importorskip("prometheus_client")
    (tmp_path / "multiprocess").mkdir()
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "multiprocess"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", WORKER, cache.directory]
    assert cache.stats().hits == 1
    assert [float(subprocess.check_output(command, env=environ)) for _ in range(3)] == [2, 3, 4]


def test_opentelemetry(cache: DiskCache) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from yatagarasu_cache.integrations.opentelemetry import observe

    reader = InMemoryMetricReader()
    observe(cache, MeterProvider([reader]).get_meter("tests"), name="thumbnails")
    found = reader.get_metrics_data()
    assert found is not None
    (scope,) = found.resource_metrics[0].scope_metrics
    points = {metric.name: metric.data.data_points[0] for metric in scope.metrics}
    assert points.keys() == {f"yatagarasu_cache.{metric.name}" for metric in METRICS}
    assert points["yatagarasu_cache.hits"].value == 1 and points["yatagarasu_cache.limit"].value == 1 << 26
    assert {dict(point.attributes)["cache.name"] for point in points.values()} == {"thumbnails"}
