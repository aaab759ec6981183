"""docs/recipes: each runs as it stands, where what it needs is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from test_docs import blocks, script

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
INTEGRATIONS = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")


def needed(text: str) -> str:
    match = re.search(r"<!-- needs: ([\w.]+) -->", text)
    assert match is not None, "a recipe says what it needs"
    return match[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if importlib.util.find_spec(needed(text).partition(".")[0]) is None:
        pytest.skip(f"{needed(text)} is not installed")
    code = tmp_path / "recipe.py"
    code.write_text(script(text), encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(code)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{path.name} fails:\n{done.stderr}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_compile_and_are_listed(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        compile(block.code, f"{path.name}:{block.line}", "exec")
    assert f"(recipes/{path.name})" in INTEGRATIONS
