"""perf/ itself: its arithmetic, its guard's verdicts, its report. No test here depends on a time."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("perf") is None:
    sys.path.append(str(ROOT))

from perf import bed, suite, timing, work  # noqa: E402
from perf.bench import (  # noqa: E402
    aio,
    cold,
    durable,
    eviction,
    hot,
    large,
    mixed,
    opening,
    parts,
    shared,
    steps,
)
from perf.guard import compare as guard  # noqa: E402
from perf.peers import CACHES, OURS, PEERS  # noqa: E402
from perf.report import collect  # noqa: E402
from perf.report import write as report  # noqa: E402
from perf.soak import steady as soak  # noqa: E402

BENCHES: dict[str, ModuleType] = {
    "asyncio": aio, "cold": cold, "durable": durable, "eviction": eviction, "hot": hot, "large": large,
    "mixed": mixed, "opening": opening, "parts": parts, "shared": shared, "steps": steps,
}  # fmt: skip


@pytest.fixture
def gentle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done to the whole machine, and data sets are small."""
    monkeypatch.setenv("YATAGARASU_PERF_DROP", "files")
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(cold, "set_size", lambda size, quick: 64 * size)
    monkeypatch.setattr(aio, "set_size", lambda size, quick: 64 * size)
    monkeypatch.setattr(opening, "QUICK_MILLION", 2000)
    monkeypatch.setattr(eviction, "LIMIT", 1 << 20)
    monkeypatch.setattr(large, "SIZES", (256 << 10,))
    monkeypatch.setattr(steps, "ENTRIES", 100)
    monkeypatch.setattr(parts, "SIZES", {64 << 10: 10, 1 << 20: 2})
    monkeypatch.setattr(parts, "HUGE", 3 << 20)


# -- arithmetic --------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    assert timing.ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == 1.0
    assert timing.ratio([1.0, 1.0, 1.0], [3.0, 100.0, 2.0]) == 3.0
    with pytest.raises(ValueError, match="zip"):
        timing.ratio([1.0], [1.0, 2.0])


def test_all_sides_run_once_in_every_round() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = timing.interleave({name: lambda name=name: run(name) for name in "abc"}, rounds=5)  # type: ignore[misc]
    assert order[:3] == ["a", "b", "c"]  # warm, and not counted
    rounds = [order[i : i + 3] for i in range(3, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "nobody is always first"
    for name in "abc":
        assert taken[name] == [i + 1.0 for i, one in enumerate(order) if one == name and i >= 3]


def test_no_round_begins_after_the_time_is_up_but_one_always_does() -> None:
    taken = timing.interleave({"a": lambda: 1.0, "b": lambda: 2.0}, rounds=9, seconds=0.0, warm=False)
    assert taken == {"a": [1.0], "b": [2.0]}


def test_compare() -> None:
    assert timing.compare(lambda: 2.0, lambda: 3.0) == timing.Compared(2.0, 3.0, 1.5)


def test_percentiles() -> None:
    ordered = [float(i) for i in range(100)]
    assert [timing.percentile(ordered, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0.0, 50.0, 99.0, 99.0]


# -- the guard ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "failed"), [(1000.0, False), (1149.0, False), (1160.0, True), (500.0, False), (5000.0, True)]
)
def test_counted_work(new: float, failed: bool) -> None:
    (verdict,) = guard.compare_counts("system calls", {"get": 1000.0}, {"get": new}, 0.1)
    assert verdict.failed is failed
    assert verdict.ratio == pytest.approx(new / 1000)


def test_counted_work_of_few_counts_and_of_none() -> None:
    assert not guard.compare_counts("instructions", {"get": 100.0}, {"get": 400.0}, 500.0)[0].failed
    assert guard.compare_counts("system calls", {"get": 0.0}, {"get": 1.0}, 0.1)[0].failed
    assert not guard.compare_counts("system calls", {"get": 0.0}, {"get": 0.0}, 0.1)[0].failed
    assert guard.compare_counts("system calls", {"old": 1.0}, {"new": 1.0}, 0.1) == []


def samples(*ratios: float, noise: float = 0.3) -> list[list[tuple[float, float]]]:
    """Pairs of an unsteady machine: both sides of a pair are hit alike; one of `ratios` a process."""
    pick = random.Random(7)
    moods = [[1e-6 * (1 + noise * pick.random()) for _ in range(50)] for _ in ratios]
    return [[(mood, mood * one) for mood in process] for process, one in zip(moods, ratios, strict=True)]


@pytest.mark.parametrize(
    ("first", "again", "failed"),
    [
        ((1.0,) * 5, None, False),
        ((1.14,) * 5, None, False),
        ((1.16,) * 5, (1.16,) * 10, True),
        ((1.2,) * 5, (1.0,) * 10, False),  # not slower when it was measured once more
        ((1.0, 1.0, 1.0, 9.0, 9.0), None, False),  # two processes of five had bad luck
        ((0.5,) * 5, None, False),
    ],
)
def test_times(
    first: tuple[float, ...], again: tuple[float, ...] | None, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"get": samples(*first), "set": samples(*[1.0] * 5)}]
    if again:
        answers.append({"get": samples(*again)})
    asked: list[list[str]] = []

    def pairs(base: Path, new: Path, only: Any, processes: int, seconds: float) -> guard.Pairs:
        asked.append(list(only))
        return answers[len(asked) - 1]

    monkeypatch.setattr(guard, "pairs", pairs)
    verdicts = guard.compare_times(ROOT, ROOT, 1.0, None)
    assert {verdict.case: verdict.failed for verdict in verdicts} == {"get": failed, "set": False}
    assert asked == ([[], ["get"]] if again else [[]])


def test_both_sides_are_timed_by_the_same_work() -> None:
    found = guard.pairs(ROOT, ROOT, ["key in cache"], 1, 10.0)
    ((one,),) = found.values()
    assert list(found) == ["key in cache"]
    assert len(one) == guard.PAIRS and all(before > 0 and after > 0 for before, after in one)


def test_what_the_guard_keeps_is_what_pyperf_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "pairs", lambda *_: {"get": samples(*[1.1] * 5), "set": samples(*[1.0] * 5)})
    guard.compare_times(ROOT, ROOT, 1.0, tmp_path)
    for side in ("base", "new"):
        kept = json.loads((tmp_path / f"{side}.json").read_text("utf-8"))
        assert [one["metadata"]["name"] for one in kept["benchmarks"]] == ["get", "set"]
        assert {len(one["runs"]) for one in kept["benchmarks"]} == {250}
    pytest.importorskip("pyperf")
    done = subprocess.run(
        [sys.executable, "-m", "pyperf", "compare_to", "base.json", "new.json", "--table"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| get .*1\.\d\dx slower", done.stdout), done.stdout


def tree(path: Path, setup: str, package: str) -> Path:
    (path / "yatagarasu_cache").mkdir(parents=True)
    (path / "setup.py").write_text(setup, "utf-8")
    (path / "yatagarasu_cache" / "__init__.py").write_text(package, "utf-8")
    return path


@pytest.mark.parametrize(
    ("setup", "package", "reason"),
    [
        ("raise SystemExit('no such compiler')", "", "setup.py fails: no such compiler"),
        ("", "raise ImportError('no such thing')", "a set and a get fail: ImportError: no such thing"),
        ("", "this is no Python", "a set and a get fail: SyntaxError"),
    ],
)
def test_a_base_that_cannot_be_built_is_skipped_and_a_checkout_is_not(
    setup: str,
    package: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, good = tree(tmp_path / "bad", setup, package), tree(tmp_path / "good", "", "good = True")
    really = guard.build

    def build(path: Path) -> list[str]:
        good = "good" in (path / "yatagarasu_cache" / "__init__.py").read_text("utf-8")
        return ["_core"] if good else really(path)

    monkeypatch.setattr(guard, "build", build)
    assert guard.main(["--trees", str(bad), str(good)]) == 0
    assert f"SKIPPED: the base can't be used here: {reason}" in capsys.readouterr().out
    assert guard.main(["--trees", str(good), str(bad)]) == 2
    assert reason in capsys.readouterr().err


def test_a_base_without_the_modules_of_the_checkout_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tree(tmp_path / "old", "", "old = True"), tree(tmp_path / "new", "", "new = True")
    monkeypatch.setattr(
        guard, "build", lambda path: ["_core"] if "old" in (path / "yatagarasu_cache/__init__.py").read_text() else ["_core", "_ring"]
    )
    assert guard.main(["--trees", str(old), str(new)]) == 0
    assert "SKIPPED: the base can't be used here: it has no _ring" in capsys.readouterr().out


def test_without_a_base_there_is_nothing_to_guard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "git", lambda *_: "")
    assert guard.main([]) == 0
    assert "SKIPPED: there is no base revision here" in capsys.readouterr().out
    assert guard.main(["no-such-branch"]) == 2


@pytest.mark.parametrize("failed", [False, True])
def test_the_exit_status_is_the_verdict(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = guard.Verdict("get", "µs", 1.0, 1.3 if failed else 1.0, 1.3 if failed else 1.0, failed)
    monkeypatch.setattr(guard, "build", lambda path: [])
    monkeypatch.setattr(guard, "compare", lambda *_: [verdict])
    same = tree(tmp_path / "tree", "", "")
    assert guard.main(["--trees", str(same), str(same), "--artefacts", str(tmp_path / "kept")]) == failed
    assert ("FAILED" if failed else "perf-guard: passed") in capsys.readouterr().out
    assert json.loads((tmp_path / "kept" / "guard.json").read_text("utf-8"))[0]["case"] == "get"


# -- every kind of benchmark -------------------------------------------------------------------


@pytest.mark.usefixtures("gentle")
@pytest.mark.parametrize("name", BENCHES)
def test_a_few_operations_of_each_kind(name: str) -> None:
    options = suite.Options(["ours-threads"], [4096], in_flight=(1, 8), workers=(2,), quick=True)

    def few(bed: suite.Bed, options: suite.Options) -> Iterator[suite.Case]:
        for case in BENCHES[name].cases(bed, options):
            yield case._replace(loops=min(case.loops, 10))

    results = suite.measure(few, options, rounds=1, warm=False)
    assert results
    for case, sides in results.items():
        for taken in sides.values():
            assert len(taken) == 1 and taken[0] > 0, case


@pytest.mark.usefixtures("gentle")
def test_cold_covers_every_operation(tmp_path: Path) -> None:
    names = {case.name for case in cold.cases(suite.Bed(str(tmp_path)), options_of_all())}
    for size in ("4 KiB", "64 KiB"):
        assert any(re.fullmatch(rf"cold get_many of \d+, {size}", name) for name in names)
    for what in ("get", "set", r"set_many of \d+", "delete"):
        assert any(re.fullmatch(rf"cold {what}, 4 KiB", name) for name in names), what


def test_cold_asyncio_samples_are_long_enough_that_the_start_does_not_count(tmp_path: Path) -> None:
    for quick, least in ((False, 4000), (True, 1000)):
        options = replace(options_of_all(), quick=quick)
        loops = {
            (case.side, case.name): case.loops
            for case in aio.cases(suite.Bed(str(tmp_path)), options)
            if "cold" in case.name and ", 1 in flight" not in case.name
        }
        assert set(loops.values()) == {least}


@pytest.mark.usefixtures("gentle")
@pytest.mark.parametrize(("kind", "in_flight"), [("get", 0), ("get_many", 0), ("mix", 8)])
def test_the_use_of_one_process(kind: str, in_flight: int, tmp_path: Path) -> None:
    path = suite.Bed(str(tmp_path)).filled("ours-threads", "work", 64, bed.value_of(4096))
    found = work.run("ours-threads", path, kind, 40, in_flight=in_flight, cold=64)
    assert found["operations"] == 40
    assert 0 < found["p50"] <= found["p95"] <= found["p99"] <= found["p999"]
    assert found["throughput"] > 0 and found["peak_memory"] > 0 and found["descriptors"] > 0


@pytest.mark.usefixtures("gentle")
def test_system_calls_are_those_of_the_middle(tmp_path: Path) -> None:
    if not work.can_trace():
        pytest.skip("strace is not there or may not be used")
    path = suite.Bed(str(tmp_path)).filled("ours-threads", "work", work.HOT, bed.value_of(4096))
    calls = work.system_calls("ours-threads", path, "get", 100)
    assert 0.9 < sum(calls.values()) < 1.1, calls  # a hit is one read
    assert list(calls.values()) == sorted(calls.values(), reverse=True)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16, 1000])
def test_marks_enclose_the_middle_half(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    meter = work.Meter(True, count)
    monkeypatch.setattr(os, "access", lambda path, mode: seen.append((len(meter.latencies), path)))
    for _ in range(count):
        meter.note(1.0)
    (first, begin), (last, end) = seen
    assert (begin, end) == (work.BEGIN, work.END)
    assert meter.traced() == last - first > 0
    assert count < 4 or (first, last) == (count // 4, count * 3 // 4)


# -- the report --------------------------------------------------------------------------------


def options_of_all() -> suite.Options:
    return suite.Options(sides=list(PEERS), quick=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run finds, with the real names of all cases and invented figures."""
    place = suite.Bed(str(tmp_path_factory.mktemp("cases")))
    found: dict[str, Any] = {"quick": True, "sides": list(PEERS), "reasons": {"nobody": "is not there"}}
    for part, module in BENCHES.items():
        sides = list(PEERS) if part == "asyncio" else list(CACHES)
        table: dict[str, dict[str, Any]] = {}
        for case in module.cases(place, replace(options_of_all(), sides=sides)):
            number = len(table) + len(table.get(case.name, {}))
            ratios = dict.fromkeys(OURS, 2.0 + number)
            figures = {"seconds": 1e-6 * (1 + number), "spread": 0.1, "ratios": ratios}
            table.setdefault(case.name, {})[case.side] = figures
        found[part] = table
    usage = dict.fromkeys(("p50", "p95", "p99", "p999", "cpu", "waits", "preempted"), 0.001)
    usage |= {"throughput": 1234.5, "peak_memory": 50 << 20, "calls": 1.0, "by_name": {"preadv2": 1.0}}
    found["resources"] = {
        size: {row[0]: dict.fromkeys((*OURS, "lmdb", "diskcache"), usage) for row in rows}
        for size, rows in collect.SCENARIOS.items()
    }
    found["tails"] = {
        side: {action: {"p50": 1e-6, "p99": 2e-6, "p999": 3e-6, "most": 4e-6} for action in ("get", "set", "delete")}
        for side in (*OURS, "diskcache")
    }
    stress = usage | {"operations": 1000, "memory": [1 << 20] * 4, "descriptors": 4}
    found["stress"] = dict.fromkeys(OURS, stress)
    found["promised"] = [{"what": "something", "asked": "much", "measured": "more", "reached": True}]
    found["limits"] = [{"what": "random read", "operations": 1e4, "bytes": 4e7, "p95": 1e-4}]
    built = {"wheel": 1 << 20, "installed": 2 << 20, "modules": 1 << 19, "seconds": 3.0}
    found["package"] = {
        "with": built, "without": "no build tools", "import with": 0.05, "import without": 0.04,
    }  # fmt: skip
    found["machine"] = {
        "kernel": "Linux", "CPU": "one", "memory": "1 GiB", "disk": "ext4", "Python": "CPython",
        "built": "nothing", "packages": "none", "tools": "none", "cold": "by hand", "cold_sets": {4096: 64},
    }  # fmt: skip
    found["seconds"] = 100.0
    return found


@pytest.fixture
def written(results: dict[str, Any], tmp_path: Path) -> str:
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results), "utf-8")
    assert report.main(["--from", str(source), "--output", str(tmp_path / "REPORT.md")]) == 0
    return (tmp_path / "REPORT.md").read_text("utf-8")


def tables(text: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    return [[row.strip("|").split("|") for row in one.strip().split("\n")] for one in found]


def test_every_part_is_in_the_report(written: str, tmp_path: Path) -> None:
    headings = re.findall(r"^## (.+)$", written, re.MULTILINE)
    assert headings == [
        "Machine", "What was asked for", "4 KiB: portable and io_uring", "10 MiB: portable and io_uring",
        "Recommendations", "Against peers", "asyncio: operations in flight", "Value size",
        "Processes and threads", "Use of the machine", "Latencies, 4 KiB", "Latencies, 10 MiB",
        "Where the time of one call goes", "Promised figures", "What the disk can do", "Package",
        "How it was measured",
    ]  # fmt: skip
    for plot in re.findall(r"!\[.*\]\((.+)\)", written):
        assert (tmp_path / plot).read_text("utf-8").startswith("<svg")
    assert "Not measured here: nobody (is not there)." in written
    assert "`--quick` run" in written


def test_tables_are_complete(written: str, results: dict[str, Any]) -> None:
    found = tables(written)
    for one in found:
        assert len({len(row) for row in one}) == 1, one[0]
        assert all(cell.strip() for row in one for cell in row[:1]), one[0]
    text = written
    for part in ("hot", "cold", "mixed", "durable", "eviction", "opening", "asyncio", "shared"):
        for case in results[part]:
            assert f"| {case} |" in text, case
    asked = next(one for one in found if one[0][0].strip() == "what" and "reached" in one[0][-1])
    assert len(asked) == 2 + 7 + 4, "a row of what was asked for has lost its case"
    assert "nan" not in text and "None" not in text


def test_a_quick_report_leaves_the_kept_one_alone(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "results.json"
    monkeypatch.setattr(report, "HERE", tmp_path)
    source.write_text(json.dumps(results), "utf-8")
    assert report.main(["--from", str(source)]) == 0
    assert (tmp_path / "out" / "quick" / "REPORT.md").exists()
    assert (tmp_path / "out" / "quick" / "plots").is_dir()
    assert not (tmp_path / "REPORT.md").exists() and not (tmp_path / "plots").exists()
    source.write_text(json.dumps(results | {"quick": False, "promised": []}), "utf-8")
    assert report.main(["--from", str(source)]) == 0
    assert (tmp_path / "REPORT.md").exists()


def test_a_few_parts_alone_do_not_replace_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--only", "hot"])
    assert "--from" in capsys.readouterr().err


def test_a_report_of_few_parts(tmp_path: Path) -> None:
    report.write({"sides": ["ours-threads"]}, tmp_path / "REPORT.md")
    assert (tmp_path / "REPORT.md").read_text("utf-8").startswith("# Performance report")


def test_the_parts_that_are_run_are_those_that_are_shown(tmp_path: Path) -> None:
    parts = collect.Collector(True, tmp_path).parts()
    assert {"hot", "cold", "asyncio", "mixed", "durable", "eviction", "opening", "shared", "steps"} <= set(parts)
    assert {"machine", "tails", "resources", "stress", "promised", "limits", "package"} <= set(parts)


# -- the soak ----------------------------------------------------------------------------------


def test_a_short_soak(backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak, "LIMIT", 4 << 20)
    monkeypatch.setattr(soak, "LARGE", 100 << 10)
    monkeypatch.setattr(soak, "KEYS", 1400)
    # The rate, and what grows in less than a second, depend on what else the machine does.
    monkeypatch.setattr(soak, "complaints", lambda found, rate, segment: found.problems)
    assert soak.main(["--minutes", "0.01", "--rate", "500", "--backend", backend]) == 0
    shown = capsys.readouterr().out
    assert "every byte was right" in shown and f"backend      {backend}" in shown
    assert int(re.search(r"([\d,]+) evictions", shown)[1].replace(",", "")) > 0  # type: ignore[index]


def test_files_that_vanish_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_bytes(bytes(10))
    monkeypatch.setattr(bed, "files_below", lambda _: iter([str(tmp_path / "gone"), str(tmp_path / "there")]))
    assert bed.disk_bytes(str(tmp_path)) == 10


def test_a_wrong_byte_is_seen() -> None:
    value = soak.value_for(7, 1000)
    assert soak.is_right(7, value)
    assert not soak.is_right(8, value)
    for at in (0, 3, len(value) // 2, len(value) - 1):
        changed = bytearray(value)
        changed[at] ^= 1
        assert not soak.is_right(7, bytes(changed)), at
    for other in (value[:-1], value + b"x", b"", b"7", "text", None):
        assert not soak.is_right(7, other)


def test_a_wrong_value_and_an_error_are_problems() -> None:
    class Cache:
        async def get(self, key: str) -> bytes:
            return b"0:1:?"

        async def set(self, key: str, value: bytes) -> None:
            raise OSError("no disk")

        async def delete(self, key: str) -> bool:
            return True

    async def some() -> soak.Found:
        found, pick = soak.Found(), random.Random(1)
        for _ in range(100):
            await soak.operate(Cache(), pick, 0.0, found)
        return found

    found = asyncio.run(some())
    assert found.counts["problems"] == found.counts["get"] + found.counts["set"] > 0
    assert any("a wrong value" in one for one in found.problems)
    assert any("no disk" in one for one in found.problems)


def latencies(count: int) -> soak.Latencies:
    found = soak.Latencies()
    for i in range(count):
        found.add((i + 1) * 1e-5)
    return found


def test_percentiles_of_a_soak_are_right_to_2_percent() -> None:
    found = latencies(10_000)
    for share in (0.5, 0.95, 0.99, 0.999):
        assert share * 0.1 < found.percentile(share) < share * 0.1 * 1.021
    assert found.percentile(1.0) == found.longest == pytest.approx(0.1)
    found.add(0.0)


@pytest.mark.parametrize(
    ("field", "last", "complaint"),
    [
        ("memory", 100 << 20, "memory grew by 50.0 MiB"),
        ("descriptors", 40, "20 more descriptors than before"),
        ("disk", 100 << 20, "bytes on disk beyond the limit"),
        ("memory", 51 << 20, ""),
        ("descriptors", 21, ""),
    ],
)
def test_growth_is_seen(field: str, last: int, complaint: str) -> None:
    level = soak.Sample(50 << 20, 20, 60 << 20)
    samples = [level] * 50 + [level._replace(**{field: last})] * 10
    found = soak.Found(latencies(600), samples, seconds=1.0)
    wrong = soak.complaints(found, 600, 2 << 20)
    assert (len(wrong) == 1 and complaint in wrong[0]) if complaint else not wrong


def test_a_rate_that_is_not_kept_is_seen() -> None:
    found = soak.Found(latencies(500), [soak.Sample(1, 1, 1)] * 60, seconds=1.0)
    assert soak.complaints(found, 1000, 1) == ["500 operations a second instead of 1,000"]


# -- the ring's figures ------------------------------------------------------------------------


@pytest.mark.usefixtures("gentle")
def test_what_is_compared_beside_the_promised_figures(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "uring":
        pytest.skip("about the ring")
    from perf.report import ring_figures

    monkeypatch.setattr(ring_figures, "ROUNDS", 1)
    beds = ring_figures.Beds(str(tmp_path), 1 / 1024)
    monkeypatch.setattr(ring_figures, "MACRO_ROUNDS", 1)
    rows = [
        *ring_figures.options(beds), *ring_figures.batch_of_writes(beds), *ring_figures.recovery(beds),
        *ring_figures.warming(beds),
    ]  # fmt: skip
    assert len(rows) == len(ring_figures.OPTIONS) + 4
    for row in rows:
        assert re.match(r"\d+\.\d\d × \(", row.measured), row
