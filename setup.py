"""The part of the build that pyproject.toml cannot say: whether the io_uring module is built.

All decisions are in csrc/build_ring.py (settings are named there); this file puts them into
setuptools: the extension, the wheel's tag, and a record of what was done and why in
`yatagarasu_cache/_build_info.py`, which `stats()` shows where the module is missing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1: the command is the package wheel's
    from wheel.bdist_wheel import bdist_wheel  # type: ignore[no-redef,import-untyped]

ROOT = Path(__file__).resolve().parent
INFO = "yatagarasu_cache/_build_info.py"


def load_build_ring() -> ModuleType:
    """csrc/build_ring.py as a module: csrc/ is no package and the build may run from anywhere."""
    spec = importlib.util.spec_from_file_location("yatagarasu_build_ring", ROOT / "csrc" / "build_ring.py")
    if spec is None or spec.loader is None:
        raise SystemExit("csrc/build_ring.py is missing from this source tree")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build_ring = load_build_ring()


class State:
    """What this run of setup.py does about the ring; changes once if an `auto` build fails."""

    def __init__(self) -> None:
        self.plan = build_ring.Plan(False, "not decided")

    def give_up(self, reason: str) -> None:
        """Go on without the module, loudly; every command that follows sees a pure package."""
        self.plan = build_ring.Plan(False, reason)
        say(self.plan.describe())


def say(line: str) -> None:
    """To the build's output, which pip shows with -v and always where the build fails."""
    print(line, file=sys.stderr, flush=True)


state = State()


class BuildExt(build_ext):
    """build_ext that leaves the module out, instead of failing, where `auto` allows that."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if build_ring.mode() == "require":
                say(f"yatagarasu_cache: {build_ring.MODE_VARIABLE}=require and the build failed")
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            state.give_up(f"compiling failed ({first}); the lines above say more")
            self.extensions = []
            self.distribution.ext_modules = []


class BuildPy(build_py):
    """build_py that also records what was decided, and why."""

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")  # first: whether it succeeds is what is recorded
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        if self.editable_mode and not state.plan.build:
            for stale in ROOT.glob("yatagarasu_cache/_ring.*so"):
                stale.unlink()
        record = root / INFO
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(
            '"""Written by the build: whether it made the io_uring module, and why."""\n\n'
            f"RING_BUILT = {state.plan.build}\n"
            f"RING_REASON = {state.plan.reason!r}\n",
            encoding="utf-8",
        )

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = list(super().get_outputs(include_bytecode))
        if not self.editable_mode:
            outputs.append(os.path.join(self.build_lib, *INFO.split("/")))
        return outputs


class BdistWheel(bdist_wheel):
    """bdist_wheel whose tag tells the truth: abi3 with the module in it, py3-none-any without."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.has_ext_modules() and build_ring.limited_api():
            self.py_limited_api = "cp310"

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
            if not self.distribution.has_ext_modules():  # it gave up
                self.root_is_pure = True
                self.py_limited_api = ""
        super().run()


def arguments() -> dict[str, Any]:
    """What setup() gets, beyond pyproject.toml, on this machine."""
    asks_only = bool({"--version", "--name", "--help", "sdist", "clean"} & set(sys.argv[1:]))
    requirements = "egg_info" in sys.argv[1:] and "setuptools.build_meta" in sys.modules
    keywords: dict[str, Any] = {
        "cmdclass": {"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel}
    }
    if asks_only:
        return keywords
    try:
        # While requirements are asked for, cffi may still be on its way: it is one of them.
        state.plan = build_ring.decide(need_cffi=not requirements)
    except build_ring.RingBuildError as error:
        raise SystemExit(f"yatagarasu_cache: {error}") from None
    say(state.plan.describe())
    if state.plan.build and requirements:
        keywords["setup_requires"] = ["cffi>=1.16"]
    elif state.plan.build:
        extension = build_ring.ffi_builder(state.plan.link).distutils_extension(
            tmpdir="build/ring", verbose=False
        )
        extension.py_limited_api = build_ring.limited_api()
        keywords["ext_modules"] = [extension]
    return keywords


if __name__ in ("__main__", "builtins"):
    setup(**arguments())
