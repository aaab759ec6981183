"""docs/grafana-dashboard.json shows what is exported: all of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest

from yatagarasu_cache import DiskCache
from yatagarasu_cache.integrations.prometheus import WatchedCollector

PATH = ROOT / "docs" / "grafana-dashboard.json"
DASHBOARD = json.loads(PATH.read_text(encoding="utf-8"))


def targets() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield from panel["targets"]


def exported(directory: Any) -> set[str]:
    """Names as they stand in the text that Prometheus reads."""
    registry = CollectorRegistry()
    with DiskCache(directory, backend="threads") as cache:
        registry.register(WatchedCollector(lambda: [("here", cache.stats())]))
        lines = generate_latest(registry).decode().splitlines()
    return {line.partition("{")[0] for line in lines if not line.startswith("#")}


def test_every_metric_in_it_is_exported_and_the_other_way_round(directory: Any) -> None:
    text = PATH.read_text(encoding="utf-8")
    assert set(re.findall(r"\byatagarasu_cache_\w+", text)) == exported(directory)


def test_every_metric_is_documented(directory: Any) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.split("<!-- table: metrics -->", 1)[1].split("\n[grafana", 1)[0]
    assert set(re.findall(r"`(yatagarasu_cache_\w+)`", section)) == exported(directory)


def test_every_question_goes_to_the_chosen_source_and_is_of_the_chosen_caches() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    for target in targets():
        assert target["datasource"] == source
        names = re.findall(r"yatagarasu_cache_\w+", target["expr"])
        assert names and target["expr"].count('{cache=~"$cache"}') == len(names)
        assert "{{cache}}" in target["legendFormat"]
        assert target["expr"].count("(") == target["expr"].count(")")
        for name in names:  # counters as rates, the rest as it is
            assert name.endswith("_total") == bool(re.search(rf"(rate|increase)\({name}\b", target["expr"]))


def test_it_has_the_variables_and_the_panels_that_are_promised() -> None:
    kinds = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "cache": "query"}
    titles = " ".join(panel["title"] for panel in DASHBOARD["panels"]).lower()
    for wanted in ("hit ratio", "operations a second", "evictions", "disk against limit", "entries", "corrupt"):
        assert wanted in titles
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_no_two_panels_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
