"""Measure everything and write it down: ``python -m perf report``.

    python -m perf report [--output FILE]                   to perf/REPORT.md
    python -m perf report --quick                           to perf/out/quick/REPORT.md
    python -m perf report --from perf/out/results.json      write it again, without measuring;
                          ... --only hot,cold               with these parts measured anew

Plots go to `plots/` beside the report, pyperf results (for ``pyperf compare_to``) and all figures
as JSON to `perf/out/` (``--artefacts``; with ``--quick`` to `perf/out/quick/`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perf.bed import SIZES, show_size
from perf.peers import OURS, PEERS, RAW
from perf.report.plots import lines
from perf.suite import IN_FLIGHT, WORKERS

HERE = Path(__file__).resolve().parents[1]
Data = dict[str, Any]
Side = dict[str, Any]  # seconds, spread, ratios


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf report", description="Measure and report.")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes; noisier, smaller data sets")
    parser.add_argument("--output", type=Path, help="perf/REPORT.md; of a quick run perf/out/quick/REPORT.md")
    parser.add_argument("--artefacts", type=Path, help="pyperf results and all figures: perf/out, perf/out/quick")
    parser.add_argument("--only", default="", help="parts to measure anew; others stay as in --from")
    parser.add_argument("--from", dest="source", type=Path, help="results.json of an earlier run")
    options = parser.parse_args(arguments)
    if options.only and not (options.source or options.output):
        parser.error("--only needs --from results.json, or --output: else the report would lose its other parts")
    found: Data = json.loads(options.source.read_text("utf-8")) if options.source else {}
    # What is kept is never replaced by a quick run, unless somebody says so.
    quick = options.quick or bool(found.get("quick"))
    artefacts: Path = options.artefacts or (HERE / "out" / "quick" if quick else HERE / "out")
    output: Path = options.output or (HERE / "out" / "quick" / "REPORT.md" if quick else HERE / "REPORT.md")
    if not options.source or options.only:
        from perf.report.collect import Collector

        artefacts.mkdir(parents=True, exist_ok=True)
        only = [name for name in options.only.split(",") if name]
        found |= Collector(options.quick, artefacts).run(only)
        (artefacts / "results.json").write_text(json.dumps(found, indent=1), "utf-8")
    # One form, however it came here: JSON knows only text as names.
    found = json.loads(json.dumps(found))
    write(found, output)
    print(output)
    if output == HERE / "REPORT.md" and not quick and found.get("promised"):
        from perf.report.figures import Row, write_readme

        write_readme([Row(**row) for row in found["promised"]], found["machine"])
    return 0


def write(found: Data, output: Path) -> None:
    plots = output.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    text = "\n".join(Report(found, plots).lines())
    output.write_text(text.rstrip() + "\n", "utf-8")


# -- how figures look -------------------------------------------------------------------------


def micros(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}" if value < 2**20 * 100 else f"{value / 2**20:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, marks, *rows)] + [""]


# What is left out without these programs.
TOOLS = {"fio": "the limits of the disk", "strace": "system calls"}
# What holds a figure back, by its name in the table of what was asked for.
BECAUSE = {
    "hot `get`": (
        "Of a hit, 63 % is spent in the kernel, in the call that copies the value out of the page cache (`perf`, on "
        "the machine where this was written). Mapping sealed "
        "segments and copying from the mapping would do away with it, as lmdb does, and bring this above 1; "
        "the price is a killed process (SIGBUS) where a mapped file is cut or the disk fails, and a reader that "
        "sleeps with the interpreter's lock where it is cold."
    ),
    "cold `get_many`": (
        "A batch is one call that tells the disk of all reads before it waits for the first, so the disk sets "
        "the pace: see what `fio` reaches with many in flight. A value of 4 KiB with its head in front lies on "
        "two pages, which costs the disk more than one aligned page; aligning values would make every small "
        "entry take a page more."
    ),
    "asyncio cold, 256 in flight": (
        "It is the processor that is used up, not the disk: compare the CPU time of this operation under “Use of "
        "the machine” with what `fio` reaches with as many in flight. Where within that time was not profiled here."
    ),
    "hot 10 MiB `get`": (
        "Both sides copy the value out of the page cache; here it is also summed, with two threads sharing the work "
        "where a processor is free for the second."
    ),
}


def yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


class Report:
    """Turns figures into Markdown. Parts without figures are left out."""

    def __init__(self, found: Data, plots: Path) -> None:
        self.found, self.plots = found, plots
        self.sides: list[str] = found.get("sides", [])
        self.ours = [side for side in OURS if side in self.sides]
        self.best = self.ours[-1] if self.ours else OURS[0]  # what backend="auto" would take

    def lines(self) -> Iterator[str]:
        quick = " This was a `--quick` run: read it as a smoke test." if self.found.get("quick") else ""
        yield "# Performance report"
        yield ""
        yield (
            "Written by `python -m perf report`; times are in microseconds an operation (µs) unless it "
            "says otherwise. All sides of a row were run in turn, several rounds, in one process or in "
            "processes started in turn; a figure is the median of the rounds, and a ratio the median of "
            "the rounds' ratios (peer's time / our time: above 1, this cache is faster)." + quick
        )
        yield ""
        for part in (
            self.machine, self.asked, self.plan, self.recommendations, self.peers, self.in_flight,
            self.value_size, self.shared, self.resources, self.latencies, self.steps, self.promised,
            self.limits, self.package, self.method,
        ):  # fmt: skip
            yield from part()

    def bench(self, part: str) -> dict[str, dict[str, Side]]:
        return self.found.get(part, {})  # type: ignore[no-any-return]

    # -- the parts --------------------------------------------------------------------------

    def machine(self) -> Iterator[str]:
        machine = self.found.get("machine")
        if not machine:
            return
        yield "## Machine\n"
        names = ("kernel", "CPU", "memory", "disk", "Python", "built", "packages", "tools")
        yield from table(("what", "which"), ((name, machine[name]) for name in names if machine.get(name)))
        for name, reason in self.found.get("reasons", {}).items():
            yield f"Not measured here: {name} ({reason}).\n"
        for name, what in TOOLS.items():
            if name not in machine.get("tools", ""):
                yield f"Not measured here: {what} ({name} is not there).\n"

    def asked(self) -> Iterator[str]:
        rows = list(self.asked_rows())
        if not rows:
            return
        yield "## What was asked for\n"
        yield "Peer's time / our time. “Reached” is about the backend that `auto` takes here.\n"
        yield from table(
            ("what", "asked", *self.ours, "peer", "reached"),
            (
                (
                    what, f"{asked:g}", *(times(ratios.get(side)) for side in self.ours), peer,
                    yes(ratios.get(self.best, 0) >= asked),
                )
                for what, asked, ratios, peer in rows
            ),
        )  # fmt: skip
        for what, asked, ratios, _ in rows:
            if what in BECAUSE and (ratios.get(self.best, 0) < max(asked, 1)):
                yield f"- {what}: {BECAUSE[what]}"
        yield ""

    def asked_rows(self) -> Iterator[tuple[str, float, dict[str, float], str]]:
        """(what, asked, our side -> ratio, the peer and its time)."""
        hot, cold, loop = self.bench("hot"), self.bench("cold"), self.bench("asyncio")
        for part, case, what, asked, peers in (
            (hot, "hot get, 4 KiB", "hot `get`", 0.6, ["lmdb"]),
            (hot, "hot set, 4 KiB", "`set`", 1.2, ["rocksdict"]),
            (loop, "asyncio hot get, 4 KiB, 256 in flight", "asyncio hot, 256 in flight", 8, None),
            (loop, "asyncio cold get, 4 KiB, 256 in flight", "asyncio cold, 256 in flight", 6, None),
            (cold, "cold get_many of 500, 4 KiB", "cold `get_many`", 4, None),
            (hot, "hot get, 10 MiB", "hot 10 MiB `get`", 1, ["diskcache-community"]),
            (hot, "hot set, 10 MiB", "hot 10 MiB `set`", 1, ["diskcache-community"]),
        ):
            sides = part.get(case, {})
            others = [s for s in sides if s not in (*OURS, *RAW) and (peers is None or s in peers)]
            if others:
                peer = min(others, key=lambda side: float(sides[side]["seconds"]))
                named = f"{'best: ' if peers is None else ''}{peer} {micros(sides[peer]['seconds'])}"
                yield what, asked, sides[peer]["ratios"], named
        tails = self.found.get("tails", {})
        if "diskcache" in tails:
            for action, point, asked in (
                ("get", "p50", 4), ("set", "p50", 4), ("delete", "p50", 4), ("set", "p99", 10)
            ):  # fmt: skip
                peer_time = tails["diskcache"][action][point]
                ratios = {side: peer_time / tails[side][action][point] for side in self.ours if side in tails}
                what = f"8 processes, 90/9/1, {'median' if point == 'p50' else 'P99'} of `{action}`"
                yield what, asked, ratios, f"diskcache {micros(peer_time)}"

    def plan(self) -> Iterator[str]:
        """The two tables that the plan asks for: throughput, P95 and CPU of both backends."""
        for size, hoped in (("4 KiB", "2–3"), ("10 MiB", "1.2–1.4")):
            scenarios = self.found.get("resources", {}).get(size)
            if not scenarios:
                continue
            yield f"## {size}: portable and io_uring\n"
            yield f"The plan hoped for {hoped} times the throughput. Each row is a process of its own.\n"
            rows = []
            for what, sides in scenarios.items():
                mine = [sides[side] for side in self.ours]
                gain = mine[1]["throughput"] / mine[0]["throughput"] if len(mine) == 2 else None
                rows.append(
                    (
                        what,
                        *(self.rate(one["throughput"], size) for one in mine),
                        times(gain),
                        *(f"{one['p95'] * 1e3:.3g}" for one in mine),
                        *(micros(one["cpu"]) for one in mine),
                    )
                )
            unit = "op/s" if size == "4 KiB" else "MB/s"
            names = [side.removeprefix("ours-") for side in self.ours]
            head = ["what", *(f"{unit} {n}" for n in names), "gain"]
            yield from table([*head, *(f"P95 ms {n}" for n in names), *(f"CPU µs {n}" for n in names)], rows)

    @staticmethod
    def rate(throughput: float, size: str) -> str:
        return f"{throughput:,.0f}" if size == "4 KiB" else f"{throughput * 10 * 2**20 / 1e6:,.0f}"

    def peers(self) -> Iterator[str]:
        caches = [side for side in self.sides if side not in RAW]
        if not self.bench("hot"):
            return
        yield "## Against peers\n"
        yield "µs an operation; batches are counted by the entry.\n"
        for part in ("hot", "cold", "mixed", "durable", "eviction", "opening"):
            cases = self.bench(part)
            if cases:
                yield from table(
                    (part, *caches),
                    (
                        (
                            case,
                            *(micros(sides[side]["seconds"] if side in sides else None) for side in caches),
                        )
                        for case, sides in cases.items()
                    ),
                )
        yield "What each one does not do:\n"
        for side in self.sides:
            if side not in OURS:
                yield f"- {side}: {PEERS[side].lacks}"
        yield ""

    def in_flight(self) -> Iterator[str]:
        cases = self.bench("asyncio")
        if not cases:
            return
        yield "## asyncio: operations in flight\n"
        yield from table(
            ("µs an operation", *self.sides),
            (
                (case, *(micros(sides[side]["seconds"] if side in sides else None) for side in self.sides))
                for case, sides in cases.items()
            ),
        )
        for state in ("hot", "cold"):
            series = {
                side: [
                    (float(depth), 1 / cases[name][side]["seconds"])
                    for depth in IN_FLIGHT
                    if side in cases.get(name := f"asyncio {state} get, 4 KiB, {depth} in flight", {})
                ]
                for side in self.sides
            }
            marks = {float(depth): str(depth) for depth in IN_FLIGHT}
            yield from self.plot(
                f"asyncio-{state}", f"asyncio, {state} get of 4 KiB", "in flight", series, marks
            )

    def value_size(self) -> Iterator[str]:
        cases, marks = self.bench("hot"), {float(size): name for name, size in SIZES.items()}
        if not cases:
            return
        yield "## Value size\n"
        for what in ("get", "set"):
            series = {
                side: [
                    (float(size), 1 / cases[name][side]["seconds"])
                    for size in SIZES.values()
                    if side in cases.get(name := f"hot {what}, {show_size(size)}", {})
                ]
                for side in self.sides
                if side not in RAW
            }
            yield from self.plot(f"size-{what}", f"hot {what}, one thread", "value size", series, marks)

    def shared(self) -> Iterator[str]:
        cases, tails = self.bench("shared"), self.found.get("tails", {})
        if cases:
            caches = [side for side in self.sides if side not in RAW]
            yield "## Processes and threads\n"
            yield "90 % get, 9 % set, 1 % delete of 100 keys with small values; µs of wall time an operation.\n"
            yield from table(
                ("mix", *caches),
                (
                    (case, *(micros(sides[side]["seconds"] if side in sides else None) for side in caches))
                    for case, sides in cases.items()
                ),
            )
            series = {
                side: [
                    (float(n), 1 / cases[name][side]["seconds"])
                    for n in WORKERS
                    if side in cases.get(name := f"mix 90/9/1, {n} process{'es' if n > 1 else ''}", {})
                ]
                for side in caches
            }
            marks = {float(n): str(n) for n in WORKERS}
            yield from self.plot(
                "processes", "mix 90/9/1, all processes together", "processes", series, marks
            )
        if tails:
            yield "Latencies of single calls with 8 processes (µs):\n"
            rows = [
                (f"{action}, {side}", *(micros(one[action][p]) for p in ("p50", "p99", "p999", "most")))
                for action in ("get", "set", "delete")
                for side, one in tails.items()
            ]
            yield from table(("action", "P50", "P99", "P99.9", "longest"), rows)

    def resources(self) -> Iterator[str]:
        if not self.found.get("resources"):
            return
        yield "## Use of the machine\n"
        yield (
            "An operation's CPU time (of all threads, the kernel's work for them included), context "
            "switches, system calls (by strace; of the middle half of the operations, so without start "
            "and end), and the process's memory at its highest.\n"
        )
        for size, scenarios in self.found["resources"].items():
            rows = [
                (
                    f"{what}, {side}", f"{one['throughput']:,.0f}", micros(one["cpu"]), f"{one['waits']:.2f}",
                    f"{one['preempted']:.2f}", f"{one['calls']:.2f}" if "calls" in one else "–",
                    ", ".join(one.get("by_name", {})), mebibytes(one["peak_memory"]),
                )
                for what, sides in scenarios.items()
                for side, one in sides.items()
            ]  # fmt: skip
            head = ("op/s", "CPU µs", "waits", "preempted", "calls", "most frequent", "MiB")
            yield from table((size, *head), rows)
        stress = self.found.get("stress")
        if stress:
            yield "1024 in flight, 70/30, for a while: nothing failed or stood still. Memory at the quarters:\n"
            yield from table(
                ("side", "operations", "op/s", "P99 ms", "MiB at the quarters", "descriptors"),
                (
                    (
                        side, f"{one['operations']:,}", f"{one['throughput']:,.0f}", f"{one['p99'] * 1e3:.1f}",
                        ", ".join(map(mebibytes, one["memory"])), str(one["descriptors"]),
                    )
                    for side, one in stress.items()
                ),
            )  # fmt: skip

    def latencies(self) -> Iterator[str]:
        for size, scenarios in self.found.get("resources", {}).items():
            yield f"## Latencies, {size}\n"
            yield "µs of single calls; in asyncio from `await` to result, the wait for a turn included.\n"
            yield from table(
                ("what", "P50", "P95", "P99", "P99.9"),
                (
                    (f"{what}, {side}", *(micros(one[point]) for point in ("p50", "p95", "p99", "p999")))
                    for what, sides in scenarios.items()
                    for side, one in sides.items()
                ),
            )

    def steps(self) -> Iterator[str]:
        cases = self.bench("steps")
        if not cases:
            return
        base = cases["the loop itself"]["python"]["seconds"]
        yield "## Where the time of one call goes\n"
        yield (
            "The steps of the Python core (`YATAGARASU_CORE=python`), each by itself, 4 KiB; the rest is "
            "what holds them together: calls, locks between threads, counters, pacing of eviction.\n"
        )
        for what in ("get", "set"):
            found = {name: one["python"]["seconds"] - base for name, one in cases.items()}
            whole = found[f"{what} of 4 KiB"]
            steps = {n.removeprefix(f"{what}: "): s for n, s in found.items() if n.startswith(f"{what}: ")}
            rows = [(name, micros(max(0.0, s)), f"{s / whole:.0%}") for name, s in steps.items()]
            rest = whole - sum(steps.values())
            rows += [("the rest", micros(rest), f"{rest / whole:.0%}"), ("whole", micros(whole), "")]
            yield from table((f"step of `{what}`", "µs", "share"), rows)
        layers = [found[name] for name in ("`os.pread` of 4 KiB", "`Backend.read` of 4 KiB") if name in found]
        if len(layers) == 2:
            yield (
                f"The contract that backends have costs a read of 4 KiB {micros(max(0.0, layers[1] - layers[0]))} µs "
                f"(`os.pread` {micros(layers[0])}, `Backend.read` {micros(layers[1])}); the compiled core does not pay it.\n"
            )
        yield "The same calls with the core in Python and as built here:\n"
        whole_cases = {name: one for name, one in cases.items() if "as built" in one}
        yield from table(
            ("call", "Python core", "as built"),
            (
                (name, *(micros(one[side]["seconds"] - base) for side in ("python", "as built")))
                for name, one in whole_cases.items()
            ),
        )

    def promised(self) -> Iterator[str]:
        rows = self.found.get("promised")
        if rows:
            yield "## Promised figures\n"
            yield from table(
                ("what", "asked", "measured", "reached"),
                ((row["what"], row["asked"], row["measured"], yes(row["reached"])) for row in rows),
            )

    def limits(self) -> Iterator[str]:
        rows = self.found.get("limits")
        if rows:
            yield "## What the disk can do\n"
            yield "`fio`, O_DIRECT through io_uring (the synced write: `psync` and `fdatasync`).\n"
            yield from table(
                ("what", "op/s", "MB/s", "P95 ms"),
                (
                    (
                        r["what"],
                        f"{r['operations']:,.0f}",
                        f"{r['bytes'] / 1e6:,.0f}",
                        f"{r['p95'] * 1e3:.3g}",
                    )
                    for r in rows
                ),
            )

    def package(self) -> Iterator[str]:
        found = self.found.get("package")
        if not found:
            return
        yield "## Package\n"
        rows = []
        for name in ("with", "without"):
            one = found.get(name)
            sizes = [one] + ["–"] * 3
            if isinstance(one, dict):
                sizes = [f"{one[field] / 1024:,.0f}" for field in ("wheel", "installed", "modules")]
                sizes.append(f"{one['seconds']:.1f}")
            rows.append((f"{name} the compiled modules", *sizes, f"{found[f'import {name}'] * 1e3:.0f}"))
        yield from table(("package", "wheel KiB", "content KiB", "modules KiB", "build s", "import ms"), rows)

    def recommendations(self) -> Iterator[str]:
        words = list(self.advice())
        if words:
            yield "## Recommendations\n"
            yield from (f"- {one}" for one in words)
            yield ""

    def advice(self) -> Iterator[str]:
        """Sentences that follow from the figures."""
        scenarios = self.found.get("resources", {})
        better: dict[str, list[str]] = {"better": [], "same": [], "worse": []}
        for size, cases in scenarios.items():
            for what, sides in cases.items():
                if len(self.ours) == 2:
                    gain = sides["ours-uring"]["throughput"] / sides["ours-threads"]["throughput"]
                    verdict = "better" if gain > 1.1 else "worse" if gain < 0.9 else "same"
                    better[verdict].append(f"{what} of {size} ({gain:.1f} times)")
        if better["better"]:
            yield f'Use io_uring (`backend="auto"` does where it runs) for: {"; ".join(better["better"])}.'
        if better["same"]:
            yield f"It makes no difference for: {'; '.join(better['same'])}."
        if better["worse"]:
            yield f"The portable backend was faster for: {'; '.join(better['worse'])}."
        cold = self.bench("cold")
        one, many = cold.get("cold get, 4 KiB"), cold.get("cold get_many of 500, 4 KiB")
        if one and many and self.best in one:
            gain = one[self.best]["seconds"] / many[self.best]["seconds"]
            yield f"Fetch what is not in memory with `get_many`: a key of a batch costs {gain:.1f} times less than one alone."
        durable = self.bench("durable")
        if "durable set, 4 KiB" in durable and self.best in durable["durable set, 4 KiB"]:
            alone = durable["durable set, 4 KiB"][self.best]["seconds"]
            batch = durable["durable set_many of 100, 4 KiB"][self.best]["seconds"]
            yield (
                f'With `durability="sync"` a single `set` waits {alone * 1e3:.1f} ms for the disk; in batches '
                f"of 100 it is {micros(batch)} µs an entry. Store in batches, or from many asyncio tasks at once."
            )
        slower = [
            f"{case} ({peer}, {times(1 / ratio)} times faster)"
            for part in ("hot", "cold")
            for case, sides in self.bench(part).items()
            for peer, side in sides.items()
            if peer not in OURS and (ratio := side["ratios"].get(self.best, 1)) < 0.67
        ]
        if slower:
            yield f"Peers that were clearly faster here: {'; '.join(slower)}."
        missed = [what for what, asked, ratios, _ in self.asked_rows() if ratios.get(self.best, 0) < asked]
        if missed:
            yield f"Asked for and not reached on this machine: {'; '.join(missed)}."

    def method(self) -> Iterator[str]:
        machine = self.found.get("machine")
        if not machine:
            return
        sets = ", ".join(
            f"{megabytes} MiB at {show_size(int(size))}" for size, megabytes in machine["cold_sets"].items()
        )
        yield "## How it was measured\n"
        yield (
            f"- Cold, for all sides alike: closed, synced, caches dropped ({machine['cold']}), opened anew, then "
            f"random keys, each once. Data sets: {sets}; a sample reads a quarter of it at most, so that "
            "read-ahead cannot bring along what is asked for next."
        )
        yield (
            "- Nobody syncs, except under “durable”. Keys have the same bytes (`str` where a peer takes them), "
            "values are incompressible, each get returns the value as `bytes`, and each operation is a "
            "transaction of its own except in batches. Nobody evicts."
        )
        yield (
            "- Peers without asyncio run in a pool of 16 threads (`run_in_executor`); lmdb is opened without "
            "read-ahead up to 64 KiB and with it above, each the faster for it. `caio` and `aiofile` read from one "
            "file, without keys, index or checksums."
        )
        yield ""
        minutes = self.found.get("seconds", 0) / 60
        yield f"The run took {minutes:.0f} minutes." if minutes >= 1 else ""

    def plot(
        self, name: str, title: str, across: str, series: dict[str, list[tuple[float, float]]],
        marks: dict[float, str],
    ) -> Iterator[str]:  # fmt: skip
        picture = lines(title, across, "operations a second", {k: v for k, v in series.items() if v}, marks)
        if picture:
            (self.plots / f"{name}.svg").write_text(picture, "utf-8")
            yield f"![{title}](plots/{name}.svg)\n"
