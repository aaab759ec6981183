"""Is this revision slower than the one it comes from? See GUARD.md, which has the self-test's table.

    python -m perf.guard BASE [--artefacts DIR]       the checkout against its merge base with BASE
    python -m perf.guard --trees BASE_DIR NEW_DIR     two source trees
    python -m perf.guard --self-test 10               a tree against itself, and against a slowed copy

Both trees are copied and built alike, with this interpreter: what a checkout has compiled is not used.
A base that can't be built or doesn't work is nothing to compare with, which is said, and no failure. Their times are compared pair by pair, in turn, in several
pairs of processes: the median of the ratios counts, and what looks slower is measured once more
in new processes. Beside that, work is counted: instructions (callgrind) and system calls (strace).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from perf.suite import save

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(__file__).resolve().parent / "cases.py"
LIMIT = 1.15
SAMPLE = 0.001  # seconds of one timed sample: shorter than the time slice that others may take
PAIRS = 50  # of samples, in each pair of processes
PROCESSES = 5  # pairs of them, one after the other
MARK = "/yatagarasu-guard/"
TRIAL = """
import sys, tempfile
from yatagarasu_cache import DiskCache
with tempfile.TemporaryDirectory() as directory, DiskCache(directory + "/c", backend="threads") as cache:
    cache.set("k", b"v")
    assert cache.get("k") == b"v"
"""
# Cases that take another way without the compiled core.
SINGLE = ("get 4 KiB", "get, missing", "set 4 KiB", "get container", "set container", "asyncio get")
# System calls that depend on when threads happen to run, on where memory happens to end, and on the
# clock: that the cache's files are still there is looked at by name every few milliseconds.
UNSTEADY = re.compile(
    "brk|clone3|epoll_p?wait|futex|getpid|gettid|madvise|mmap|mprotect|munmap|newfstatat|rseq|"
    "rt_sigprocmask|sched_yield|set_robust_list|stat|statx"
)
Counts = dict[str, float]  # case -> instructions or system calls of one loop


class Verdict(NamedTuple):
    """One line of the table."""

    case: str
    what: str
    base: float
    new: float
    ratio: float  # new / base: above 1, the new one takes more
    failed: bool


# -- trees ------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def copy_checkout(target: Path) -> None:
    """What the checkout holds now, changes that are not committed included."""
    for name in git("ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def copy_revision(revision: str, target: Path) -> None:
    target.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)


class Unusable(Exception):
    """A tree that can't be built, or doesn't work; the message says why."""


def build(tree: Path) -> list[str]:
    """Compile the tree's modules in place. Names of those that were built."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, capture_output=True, text=True,
        env=os.environ | {"YATAGARASU_IO_URING": "auto", "YATAGARASU_COMPILED_CORE": "auto"},
    )  # fmt: skip
    if done.returncode:
        raise Unusable(f"setup.py fails: {_last_line(done.stderr)}")
    # Otherwise the first import compiles, or each one does where nothing may be written.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / "yatagarasu_cache")])
    done = subprocess.run(
        [sys.executable, "-c", TRIAL], cwd=tree, env=environment(tree), capture_output=True, text=True
    )
    if done.returncode:
        raise Unusable(f"a set and a get fail: {_last_line(done.stderr)}")
    return sorted(path.name.split(".")[0] for path in (tree / "yatagarasu_cache").glob("*.so"))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def build_base(tree: Path, new: Sequence[str]) -> list[str]:
    """The same for the base. Unusable also where the checkout has modules that it lacks: other work."""
    built = build(tree)
    if missing := set(new) - set(built):
        raise Unusable(f"it has no {' and no '.join(sorted(missing))}, which the checkout has")
    return built


def show_built(modules: Sequence[str]) -> str:
    return ", ".join(modules) or "no compiled modules"


def environment(tree: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"} | more


# -- times ------------------------------------------------------------------------------------


class Server:
    """A process that does what it is told, and says how long it took."""

    def __init__(self, tree: Path, directory: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORK), "serve", directory],
            env=environment(tree), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.cases = self._answer().split("\t")[1:]

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the work failed in {self._process.args!r}")
        return line.rstrip("\n")

    def time(self, case: str, loops: int) -> float:
        assert self._process.stdin
        self._process.stdin.write(f"{case}\t{loops}\n")
        self._process.stdin.flush()
        return float(self._answer()) / loops

    def close(self) -> None:
        self._process.communicate()


# case -> for each pair of processes: (base, new) seconds of each pair of samples
Pairs = dict[str, list[list[tuple[float, float]]]]


def pairs(base: Path, new: Path, only: Sequence[str], processes: int, seconds: float) -> Pairs:
    """Samples of both sides in turn. `only` names cases; none means all that both can do."""
    taken: Pairs = {}
    end = time.monotonic() + seconds
    for _ in range(processes):
        if taken and time.monotonic() > end:
            break
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            servers = Server(base, one), Server(new, two)
            for case in only or servers[0].cases:
                if case in servers[1].cases:
                    taken.setdefault(case, []).append(_pairs_of(case, *servers))
            for server in servers:
                server.close()
    return taken


def _pairs_of(case: str, base: Server, new: Server) -> list[tuple[float, float]]:
    new.time(case, 2)
    loops = 1
    while (taken := min(base.time(case, loops) for _ in range(3)) * loops) < SAMPLE / 2:
        loops = min(10 * loops, int(loops * SAMPLE / taken) + 1)
    found = []
    for i in range(PAIRS + 1):
        if i % 2:  # nobody is always first
            after, before = new.time(case, loops), base.time(case, loops)
        else:
            before, after = base.time(case, loops), new.time(case, loops)
        found.append((before, after))
    return found[1:]


def ratio(found: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The median of the processes' medians: neither a moment nor a process decides alone."""
    return statistics.median(statistics.median(after / before for before, after in one) for one in found)


def compare_times(base: Path, new: Path, seconds: float, artefacts: Path | None) -> list[Verdict]:
    """What is slower must be slower again in other processes before it counts."""
    found = pairs(base, new, (), PROCESSES, seconds)
    suspects = [case for case, samples in found.items() if ratio(samples) > LIMIT]
    again = pairs(base, new, suspects, 2 * PROCESSES, seconds) if suspects else {}
    if artefacts:
        samples = {
            case: {side: [pair[i] for one in runs for pair in one] for i, side in enumerate(("base", "new"))}
            for case, runs in found.items()
        }
        for side in ("base", "new"):
            save(str(artefacts / f"{side}.json"), samples, side)
    return [
        Verdict(
            case, "µs",
            statistics.median(before for run in runs for before, _ in run) * 1e6,
            statistics.median(after for run in runs for _, after in run) * 1e6,
            min(ratio(runs), ratio(again.get(case, runs))),
            ratio(runs) > LIMIT and ratio(again.get(case, runs)) > LIMIT,
        )
        for case, runs in found.items()
    ]  # fmt: skip


# -- counted work -----------------------------------------------------------------------------


def works(*command: str) -> bool:
    """Whether a tool is there and may do what it does."""
    if not shutil.which(command[0]):
        return False
    return subprocess.run([*command, "true"], capture_output=True).returncode == 0


def run_work(tool: Sequence[str], tree: Path, core: str, mode: str) -> dict[str, int]:
    """The work under a tool that counts. Loops of each case."""
    only = SINGLE if core == "python" else ()
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [*tool, sys.executable, str(WORK), mode, directory, *only],
            env=environment(tree, YATAGARASU_CORE=core), capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"counting with {tool[0]} failed: {done.stderr.strip()[-1000:]}")
    loops: dict[str, int] = json.loads(done.stdout)
    return loops


def instructions(tree: Path, core: str) -> Counts:
    """Instructions of each case, and of the import, by callgrind."""
    with tempfile.TemporaryDirectory() as out:
        tool = ["valgrind", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={out}/out"]
        loops = run_work(tool, tree, core, "count")
        parts = sorted(Path(out).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^totals: (\d+)", path.read_text(), re.M) for path in parts]
    dumps = [float(total[1]) for total in totals if total]
    # Dump 1 ends where the import begins, 2 where it is done; then come two for each case.
    counts = {name: dumps[3 + 2 * i] / loops[name] for i, name in enumerate(loops)}
    # What threads do depends on when they get to run: only the paths of one thread are counted.
    return {"import": dumps[1]} | {name: count for name, count in counts.items() if "in flight" not in name}


def system_calls(tree: Path, core: str) -> Counts:
    """System calls of each case by strace, all threads."""
    counts: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r") as trace:
        loops = run_work(["strace", "-f", "-qq", "-o", trace.name], tree, core, "trace")
        case = "end"
        for line in trace:
            if MARK in line:
                case = line.split(MARK)[1].split('"')[0]
            elif (call := re.match(r"\d+\s+(\w+)\(", line)) and not UNSTEADY.fullmatch(call[1]):
                counts[case] += 1
    return {name: counts[name] / loops[name] for name in loops}


def compare_counts(what: str, base: Counts, new: Counts, least: float) -> list[Verdict]:
    """`least`: a difference of fewer is none."""
    return [
        Verdict(
            case, what, base[case], new[case], new[case] / base[case] if base[case] else 1.0 + new[case],
            new[case] > base[case] * LIMIT and new[case] - base[case] > least,
        )
        for case in base
        if case in new
    ]  # fmt: skip


# -- the whole --------------------------------------------------------------------------------


def compare(base: Path, new: Path, seconds: float, artefacts: Path | None) -> list[Verdict]:
    """Everything about two trees that are built already."""
    found = compare_times(base, new, seconds, artefacts)
    for tool, test, count, what, least in (
        ("valgrind", ("valgrind", "--tool=none"), instructions, "instructions", 500.0),
        ("strace", ("strace", "-qq", "-o", os.devnull), system_calls, "system calls", 0.1),
    ):
        if not works(*test):
            print(f"{tool} is not there or may not be used: {what} are not compared")
            continue
        for core in ("auto", "python"):
            label = what if core == "auto" else f"{what}, Python core"
            verdicts = compare_counts(label, count(base, core), count(new, core), least)
            if any(verdict.failed for verdict in verdicts):  # once more, as with times
                again = compare_counts(label, count(base, core), count(new, core), least)
                verdicts = [
                    min(pair, key=lambda one: one.ratio) for pair in zip(verdicts, again, strict=True)
                ]
            found += verdicts
    return found


def show(verdicts: Sequence[Verdict]) -> None:
    width = max((len(verdict.case) for verdict in verdicts), default=0)
    for verdict in verdicts:
        state = "FAILED" if verdict.failed else "ok"
        print(
            f"{state:6}  {verdict.case:{width}}  {verdict.base:14,.2f} -> {verdict.new:14,.2f} "
            f"{verdict.what}  ({verdict.ratio - 1:+.1%})"
        )


def slowed(tree: Path, target: Path) -> None:
    """A copy of `tree` whose `get` and `set` take some 20 % longer."""
    shutil.copytree(tree, target, symlinks=True)
    with open(target / "yatagarasu_cache" / "__init__.py", "a", encoding="utf-8") as file:
        file.write(SLOWER)


SLOWER = """

_get, _set = DiskCache.get, DiskCache.set


def _slow_get(self, key, default=None):
    for _ in range(14):
        pass
    return _get(self, key, default)


def _slow_set(self, key, value, *args, **kwargs):
    for _ in range(120):
        pass
    return _set(self, key, value, *args, **kwargs)


DiskCache.get, DiskCache.set = _slow_get, _slow_set
"""


def self_test(times: int, seconds: float) -> int:
    """A against A must pass each time, A against a slowed copy must fail. Prints the table of GUARD.md."""
    with tempfile.TemporaryDirectory(prefix="yatagarasu-guard-") as directory:
        base, same, slow = (Path(directory, name) for name in ("base", "same", "slow"))
        copy_checkout(base)
        print(f"built: {show_built(build(base))}\n")
        shutil.copytree(base, same)
        slowed(base, slow)
        print("| run | result | highest time | instructions | system calls | took |", flush=True)
        print("|---|---|---:|---:|---:|---:|", flush=True)
        wrong = sum(self_test_once(f"A against A, {i + 1}", base, same, seconds) for i in range(times))
        wrong += not self_test_once("A against a slowed A", base, slow, seconds)
    print(f"\n{times + 1 - wrong} of {times + 1} runs came out as they must")
    return 1 if wrong else 0


def self_test_once(what: str, base: Path, new: Path, seconds: float) -> bool:
    """Compare, print a line of the table; whether it failed."""
    start = time.monotonic()
    verdicts = compare(base, new, seconds, None)
    failed = [verdict for verdict in verdicts if verdict.failed]
    highest = (
        max((v.ratio for v in verdicts if v.what.startswith(kind)), default=0.0)
        for kind in ("µs", "instructions", "system calls")
    )
    cells = (
        what,
        f"failed: {len(failed)} of {len(verdicts)}" if failed else f"passed: {len(verdicts)}",
        *(f"{value:.3f}" for value in highest),
        f"{time.monotonic() - start:.0f} s",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return bool(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ci/perf-guard", description="Compare speed with a base revision.")
    parser.add_argument("base", nargs="?", default="", help="a revision; none: the commit before this one")
    parser.add_argument("--artefacts", type=Path, help="keep pyperf results here (base.json, new.json)")
    parser.add_argument("--trees", nargs=2, type=Path, metavar=("BASE", "NEW"), help="two source trees")
    parser.add_argument("--self-test", type=int, metavar="TIMES", help="check the guard itself")
    parser.add_argument("--seconds", type=float, default=30.0, help="for timing (default 30)")
    options = parser.parse_args(arguments)
    if options.self_test:
        return self_test(options.self_test, options.seconds)
    revision = ""
    if not options.trees:
        if options.base and not git("rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}"):
            print(f"perf-guard: there is no revision {options.base!r} here", file=sys.stderr)
            return 2
        revision = (
            git("merge-base", "HEAD", options.base)
            if options.base
            else git("rev-parse", "--verify", "--quiet", "HEAD^")
        )
        if not revision:
            print(
                "perf-guard: SKIPPED: there is no base revision here (no git checkout, a first commit or a "
                "shallow clone): nothing to compare with"
            )
            return 0
    if options.artefacts:
        options.artefacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="yatagarasu-guard-") as directory:
        base, new = Path(directory, "base"), Path(directory, "new_")  # paths of the same length
        if options.trees:
            for source, target in zip(options.trees, (base, new), strict=True):
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns(".git", ".venv*", "*.so", "build")
                )
        else:
            copy_revision(revision, base)
            copy_checkout(new)
        if not (base / "yatagarasu_cache").is_dir():
            print("perf-guard: SKIPPED: the base revision has no package yet: nothing to compare with")
            return 0
        try:
            new_built = build(new)
        except Unusable as error:
            print(f"perf-guard: the checkout can't be used here: {error}", file=sys.stderr)
            return 2
        try:
            base_built = build_base(base, new_built)
        except Unusable as error:
            print(f"perf-guard: SKIPPED: the base can't be used here: {error}")
            return 0
        name = revision[:12] or options.trees[0].name
        print(f"base: {name}, {show_built(base_built)}; new: {show_built(new_built)}", flush=True)
        verdicts = compare(base, new, options.seconds, options.artefacts)
    show(verdicts)
    if options.artefacts:
        rows: list[Mapping[str, object]] = [verdict._asdict() for verdict in verdicts]
        (options.artefacts / "guard.json").write_text(json.dumps(rows, indent=1), "utf-8")
    failed = sum(verdict.failed for verdict in verdicts)
    print(
        f"perf-guard: {failed} of {len(verdicts)} figures are more than {LIMIT - 1:.0%} worse"
        if failed
        else "perf-guard: passed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
