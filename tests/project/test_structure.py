"""Who knows whom: imports make no circle, not even those for types, and no floor knows one above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = "yatagarasu_cache"
# What a folder of the package, or its top level (""), must not import from.
ABOVE = {
    "concurrency": {"backends", "store", "computing", "cli"},
    "backends": {"computing", "cli"},
    "store": {"computing", "cli"},
}
# Of the top level, what the engine may know: the others are faces.
SHARED = {"_build_info", "_core", "_ring", "_version", "codec", "config", "entry", "errors", "guard", "log"}
# Compiled code has one module for both: backends read through it, and nothing else of the store.
ALLOWED = {("backends.reads", "store.compiled")}


def modules() -> dict[str, Path]:
    """Every module of the package by its name, without that of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.name != "_build_info.py":
            parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that one imports, wherever and for whatever it does."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = package.split(".") if package else []
            base = [*above[: len(above) - node.level + 1], *filter(None, [node.module])]
        elif node.module and node.module.partition(".")[0] == PACKAGE:
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in known else ".".join(base)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = list(edges[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += edges.get(name, ())
    return seen


def test_imports_make_no_circle() -> None:
    edges = graph()
    del edges[""]  # the package itself, which hands out what its modules have
    edges = {name: targets - {""} for name, targets in edges.items()}
    circles = {name for name in edges if name in reachable(name, edges)}
    assert not circles, sorted(circles)


@pytest.mark.parametrize("floor", ABOVE)
def test_no_floor_knows_one_above_it(floor: str) -> None:
    for name, targets in graph().items():
        if name.partition(".")[0] != floor:
            continue
        for target in targets:
            head = target.partition(".")[0]
            is_face = "." not in target and target not in SHARED | ABOVE.keys()
            assert head not in ABOVE[floor] and not is_face, f"{name} imports {target}"
            assert floor != "backends" or head != "store" or (name, target) in ALLOWED, f"{name} imports {target}"


def test_a_circle_would_be_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert {name for name in edges if name in reachable(name, edges)} == {"a", "b", "c"}


def test_the_map_of_the_engine_names_all_of_it() -> None:
    text = (ROOT / PACKAGE / "store" / "__init__.py").read_text(encoding="utf-8")
    modules_there = {path.stem for path in (ROOT / PACKAGE / "store").iterdir() if path.suffix == ".py"}
    named = set(re.findall(r"`(\w+)(?:\.py)?`", text))
    assert modules_there - {"__init__"} <= named
