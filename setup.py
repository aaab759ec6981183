"""The part of the build that pyproject.toml cannot say: whether the compiled modules are built.

All decisions are in csrc/build_ring.py (settings are named there); this file puts them into
setuptools: the extensions, the wheel's tag, and a record of what was done and why in
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
    """What this run of setup.py does about each module; changes where an `auto` build fails."""

    def __init__(self) -> None:
        self.plans = {
            build_ring.MODULE: build_ring.Plan(False, "not decided"),
            build_ring.CORE_MODULE: build_ring.Plan(False, "not decided", module="core"),
        }

    def give_up(self, name: str, reason: str) -> None:
        """Go on without a module, loudly; the commands that follow see a package without it."""
        if self.plans[name].build:
            self.plans[name] = build_ring.Plan(False, reason, module=self.plans[name].module)
            say(self.plans[name].describe())


def say(line: str) -> None:
    """To the build's output, which pip shows with -v and always where the build fails."""
    print(line, file=sys.stderr, flush=True)


state = State()


class BuildExt(build_ext):
    """build_ext that leaves a module out, instead of failing, where `auto` allows that."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.leave_out([extension.name for extension in self.extensions], error)

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.leave_out([ext.name], error)

    def build_extensions(self) -> None:
        super().build_extensions()
        self.extensions = self.distribution.ext_modules

    def leave_out(self, names: list[str], error: Exception) -> None:
        if build_ring.mode() == "require":
            say(f"yatagarasu_cache: {build_ring.MODE_VARIABLE}=require and the build failed")
            raise error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for name in names:
            state.give_up(name, f"compiling failed ({first}); the lines above say more")
        left = [extension for extension in self.distribution.ext_modules if extension.name not in names]
        self.distribution.ext_modules = left


class BuildPy(build_py):
    """build_py that also records what was decided, and why."""

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")  # first: whether it succeeds is what is recorded
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        ring, core = state.plans.values()
        for name, plan in (("_ring", ring), ("_core", core)):
            if self.editable_mode and not plan.build:
                for stale in ROOT.glob(f"yatagarasu_cache/{name}.*so"):
                    stale.unlink()
        record = root / INFO
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(
            '"""Written by the build: whether it made the compiled modules, and why."""\n\n'
            f"RING_BUILT = {ring.build}\n"
            f"RING_REASON = {ring.reason!r}\n"
            f"CORE_BUILT = {core.build}\n"
            f"CORE_REASON = {core.reason!r}\n",
            encoding="utf-8",
        )

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = list(super().get_outputs(include_bytecode))
        if not self.editable_mode:
            outputs.append(os.path.join(self.build_lib, *INFO.split("/")))
        return outputs


class BdistWheel(bdist_wheel):
    """bdist_wheel whose tag tells the truth: abi3 with a module in it, py3-none-any without any."""

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
        ring, core = build_ring.decide(need_cffi=not requirements), build_ring.decide_core()
    except build_ring.RingBuildError as error:
        raise SystemExit(f"yatagarasu_cache: {error}") from None
    state.plans = {build_ring.MODULE: ring, build_ring.CORE_MODULE: core}
    for plan in state.plans.values():
        say(plan.describe())
    if requirements:
        if ring.build:
            keywords["setup_requires"] = ["cffi>=1.16"]
        return keywords
    extensions = []
    if ring.build:
        extension = build_ring.ffi_builder(ring.link).distutils_extension(tmpdir="build/ring", verbose=False)
        extension.py_limited_api = build_ring.limited_api()
        extensions.append(extension)
    if core.build:
        extensions.append(build_ring.core_extension(core.link))
    if extensions:
        keywords["ext_modules"] = extensions
    return keywords


if __name__ in ("__main__", "builtins"):
    setup(**arguments())
