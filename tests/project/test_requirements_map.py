"""docs/requirements.md names every line of the plan, and only tests and files that there are."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

TEXT = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
# The plan's sections and how many lines each has.
PLAN = {
    "S8.1": 12, "S8.2": 7, "S8.3": 17, "S8.4": 12, "S8.5": 10, "S8.6": 8, "S8.7": 11, "S8.8": 8, "S8.9": 16,
    "S9.1": 16, "S9.2": 6, "S9.3": 10, "S9.4": 11, "S9.5": 4, "S0": 8,
    "A1": 14, "A2": 20, "A3": 15, "A4": 12, "A5": 13, "A6": 9, "A7": 10, "A8": 12,
}  # fmt: skip


def rows() -> list[tuple[str, str]]:
    """(lines, proof) of every row."""
    found = re.findall(r"^\| ((?:S|A)\d[^|]*?) \| [^|]+ \| ([^|]+) \|$", TEXT, re.MULTILINE)
    assert len(found) == TEXT.count("\n| S") + TEXT.count("\n| A"), "a row has another form"
    return found


def numbers(lines: str) -> Iterator[tuple[str, int]]:
    """`S8.9-R1, R4 to R6`: the section, and each number."""
    section, _, rest = lines.partition("-")
    for part in rest.split(", "):
        match = re.fullmatch(r"[RG](\d+)(?: to [RG](\d+))?", part)
        assert match, lines
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield section, number


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_line_of_the_plan_is_there_once() -> None:
    named = Counter(one for lines, _ in rows() for one in numbers(lines))
    wanted = {(section, number) for section, count in PLAN.items() for number in range(1, count + 1)}
    assert set(named) == wanted, sorted(set(named) ^ wanted)
    assert set(named.values()) == {1}, [one for one, count in named.items() if count > 1]


@pytest.mark.parametrize(("lines", "proof"), rows(), ids=[lines for lines, _ in rows()])
def test_what_is_named_exists(lines: str, proof: str) -> None:
    known: set[str] = set()
    checked = 0
    for name in re.findall(r"`([^`]+)`", proof):
        if re.fullmatch(r"test_\w+\.py", name):
            (path,) = (ROOT / "tests").rglob(name)
            known = functions_of(path)
        elif name.startswith("test_"):
            assert name in known, f"{lines}: {name}"
            checked += 1
        elif "/" in name:
            assert (ROOT / name).is_file(), f"{lines}: {name}"
            checked += 1
    assert checked or "table below" in proof, lines
