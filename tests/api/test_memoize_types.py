"""What type checkers make of decorated functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import yatagarasu_cache

PACKAGE = Path(yatagarasu_cache.__file__).parent
USE = """
from collections.abc import Awaitable
from yatagarasu_cache import AsyncDiskCache, DiskCache

cache = DiskCache("c")
tasks = AsyncDiskCache("c")

@cache.memoize(expire=60, ignore=("verbose",), typed=True)
def area(width: int, height: int = 2, *, verbose: bool = False) -> float:
    return width * height

@cache.memoize
def bare(x: str) -> bytes:
    return x.encode()

class Model:
    @cache.memoize(ignore=["self"])
    def predict(self, x: int) -> str:
        return str(x)

    @tasks.memoize(ignore=["self"])
    async def later(self, x: int) -> str:
        return str(x)

    @classmethod
    @cache.memoize()
    def below(cls, x: int) -> str:
        return str(x)

    @staticmethod
    @cache.memoize()
    def apart(x: int) -> str:
        return str(x)

@cache.memoize()
async def coroutine(x: int) -> str:
    return str(x)

@tasks.memoize()
async def fetch(url: str) -> bytes:
    return url.encode()

@tasks.memoize
async def fetch_bare(url: str) -> bytes:
    return url.encode()

@tasks.memoize(expire=5)
def in_thread(url: str) -> bytes:
    return url.encode()

@tasks.memoize()
def awaitable(url: str) -> Awaitable[bytes]:
    return fetch(url)

async def right(model: Model) -> None:
    number: float = area(2, height=3)
    data: bytes = bare("x")
    text: str = model.predict(1)
    removed: bool = area.invalidate(1, 2)
    count: int = area.cache_clear()
    area.cache_key(1, verbose=True)
    model.predict.invalidate(1)
    data = await fetch("x") + await fetch_bare("x") + await in_thread("x")
    removed = await fetch.invalidate("x")
    count = await fetch.cache_clear()
    text = await coroutine(1)
    text = await model.later(2)
    removed = coroutine.invalidate(1)
    text = model.below(2) + Model.apart(3)
    data = await awaitable("x")

async def wrong(model: Model) -> None:
    area("2")
    area(2, wrong=1)
    bare(b"x").decode(1)
    model.predict("1")
    area.invalidate("x")
    fetch(1)
    number: int = await fetch("x")
    coroutine("x")
    await in_thread(5)
    await model.later("x")
    model.below("x")
    Model.apart("x")
    cache.memoize(unknown=1)
    cache.memoize(expire="x")
    reveal_type(area)
    reveal_type(model.predict)
    reveal_type(fetch)
    reveal_type(in_thread)
"""


def test_decorated_functions_keep_their_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "--follow-imports=silent", "use.py"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    lines = USE.split("\n")
    wrong = lines.index("async def wrong(model: Model) -> None:") + 1
    reported = {
        int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("use.py:") and ": error: " in line
    }
    assert reported == set(range(wrong + 1, wrong + 15)), done.stdout
    revealed = [line.partition('"')[2].rstrip('"') for line in done.stdout.splitlines() if "Revealed type" in line]
    place = "yatagarasu_cache.computing.memoize."
    short = [one.replace(place, "").replace("builtins.", "") for one in revealed]
    assert short == [
        "Memoized[[width: int, height: int =, *, verbose: bool =], float]", "Memoized[[x: int], str]",
        "AsyncMemoized[[url: str], bytes]", "AsyncMemoized[[url: str], bytes]",
    ]  # fmt: skip
