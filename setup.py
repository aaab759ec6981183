"""The part of the build that pyproject.toml cannot say: whether the compiled modules are built.

All decisions are in `csrc/building/` (the switches are named there); this file puts them into
setuptools: the extensions, the wheel's tag, and a record of what was done and why in
`yatagarasu_cache/_build_info.py`, which `stats()` shows where a module is missing.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1: the command is the package wheel's
    from wheel.bdist_wheel import bdist_wheel  # type: ignore[no-redef,import-untyped]

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build starts anywhere, with a path that need not hold this directory

from csrc.building import modules, plan  # noqa: E402
from csrc.building.machine import BuildError, limited_api  # noqa: E402

INFO = "yatagarasu_cache/_build_info.py"


def say(line: str) -> None:
    """To the build's output, which pip shows with -v and always where the build fails."""
    print(line, file=sys.stderr, flush=True)


def report(decided: plan.Plan) -> None:
    """Say what became of a module; of a missing core also by a warning, which newer pips let through."""
    say(decided.describe())
    missing = decided.module is modules.CORE and not decided.build and not decided.switched_off
    if missing and sys.platform == "linux":  # elsewhere there is no remedy
        warnings.warn(decided.describe(), stacklevel=2)


def refuse(error: BuildError) -> SystemExit:
    return SystemExit(f"yatagarasu_cache: {error}")


class BuildExt(build_ext):
    """build_ext that decides about each module, and leaves it out instead of failing where `auto` allows it.

    The commands that follow see a package without what was left out.
    """

    plans: dict[str, plan.Plan] = {}  # of this run of setup.py

    def run(self) -> None:
        for extension in list(self.extensions):
            self.decide(extension)
        try:
            super().run()
        except Exception as error:
            for extension in list(self.extensions):
                self.give_up(extension, error)

    def decide(self, extension: Any) -> None:
        try:
            decided = plan.decide(modules.MODULES[extension.name])
        except BuildError as error:
            raise refuse(error) from None
        self.plans[extension.name] = decided
        report(decided)
        if decided.build:
            decided.link.reach(extension)
        else:
            self.leave_out(extension)

    def get_ext_filename(self, fullname: str) -> str:
        """With a suffix that every CPython loads. From 3.15 on that of the stable ABI names the platform, and
        earlier releases, to which the wheel's tag promises the module, do not look for it."""
        filename: str = super().get_ext_filename(fullname)  # type: ignore[no-untyped-call]
        return re.sub(r"\.abi3-[\w-]+\.so$", ".abi3.so", filename)

    def build_extension(self, extension: Any) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            self.give_up(extension, error)

    def build_extensions(self) -> None:
        super().build_extensions()
        self.extensions = list(self.distribution.ext_modules or ())

    def give_up(self, extension: Any, error: Exception) -> None:
        """Compiling failed although everything seemed to be there."""
        module = modules.MODULES[extension.name]
        if plan.switch(module) == "require":
            say(f"yatagarasu_cache: {module.switch}=require and the build failed")
            raise error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        failed = plan.Plan(module, False, f"compiling failed ({first}); the build's output says more")
        self.plans[extension.name] = failed
        report(failed)
        self.leave_out(extension)

    def leave_out(self, extension: Any) -> None:
        left = [other for other in self.distribution.ext_modules or () if other is not extension]
        self.distribution.ext_modules = self.extensions = left


class BuildPy(build_py):
    """build_py that also records what was decided, and why."""

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")  # first: whether it succeeds is what is recorded
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        lines = ['"""Written by the build: whether it made the compiled modules, and why."""\n']
        for prefix, module in (("RING", modules.RING), ("CORE", modules.CORE)):
            decided = BuildExt.plans[module.name]
            if self.editable_mode and not decided.build:
                for stale in ROOT.glob(f"{module.name.replace('.', '/')}.*so"):
                    stale.unlink()
            lines += [f"{prefix}_BUILT = {decided.build}", f"{prefix}_REASON = {decided.reason!r}"]
        record = root / INFO
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = list(super().get_outputs(include_bytecode))
        if not self.editable_mode:
            outputs.append(os.path.join(self.build_lib, *INFO.split("/")))
        return outputs


class BdistWheel(bdist_wheel):
    """bdist_wheel whose tag tells the truth: abi3 with a module in it, py3-none-any without any."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.has_ext_modules() and limited_api():
            self.py_limited_api = "cp310"

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
            if not self.distribution.has_ext_modules():  # all were left out
                self.root_is_pure = True
                self.py_limited_api = ""
        super().run()


if __name__ in ("__main__", "builtins"):
    try:
        plan.check_switches()
    except BuildError as error:
        raise refuse(error) from None
    setup(
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel},
        ext_modules=[modules.extension(module) for module in modules.MODULES.values()],
    )
