"""What the package costs before it does anything: import, wheel, build; with and without its modules."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "yatagarasu_cache")
SWITCHES = ("YATAGARASU_IO_URING", "YATAGARASU_COMPILED_CORE")
MODULES = ("yatagarasu_cache._ring", "yatagarasu_cache._core")
_IMPORT = """
import sys, time
sys.modules.update(dict.fromkeys({hidden!r}))
import asyncio, hashlib, mmap, logging, dataclasses
start = time.perf_counter()
import yatagarasu_cache
print(time.perf_counter() - start)
"""


class Built(NamedTuple):
    wheel: int  # bytes
    installed: int  # bytes of the wheel's content
    modules: int  # bytes of the compiled modules in it
    seconds: float


def import_seconds(hidden: tuple[str, ...], runs: int) -> float:
    """Median of new processes, with what the standard library does for it left out."""
    command = [sys.executable, "-c", _IMPORT.format(hidden=hidden)]
    taken = [float(subprocess.check_output(command, text=True)) for _ in range(runs + 1)]
    return statistics.median(taken[1:])


def build(directory: str) -> dict[str, Built | str]:
    """A wheel with the compiled modules and one without, or why there is none."""
    source = Path(directory) / "source"
    source.mkdir()
    for name in SOURCES:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif origin.exists():
            shutil.copy(origin, source / name)
    tools = Path(directory) / "tools"
    venv.create(tools, with_pip=True)
    python = str(tools / "bin" / "python")
    needs = ["setuptools>=77", "wheel"]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *needs], capture_output=True, text=True)
    if done.returncode:
        return dict.fromkeys(("with", "without"), f"no build tools: {done.stderr.strip()[-200:]}")
    return {
        "with": _build(python, source, f"{directory}/with", "require"),
        "without": _build(python, source, f"{directory}/without", "off"),
    }


def _build(python: str, source: Path, out: str, mode: str) -> Built | str:
    shutil.rmtree(source / "build", ignore_errors=True)
    command = [
        python,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        str(source),
    ]
    start = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | dict.fromkeys(SWITCHES, mode), capture_output=True, text=True
    )
    taken = time.perf_counter() - start
    if done.returncode:
        return f"does not build here: {done.stderr.strip().splitlines()[-1][:200]}"
    wheel = next(Path(out).glob("*.whl"))
    shutil.unpack_archive(wheel, f"{out}/content", "zip")
    files = [path for path in Path(out, "content").rglob("*") if path.is_file()]
    return Built(
        wheel.stat().st_size,
        sum(path.stat().st_size for path in files),
        sum(path.stat().st_size for path in files if path.suffix == ".so"),
        taken,
    )
