"""What is done about each module, and why: what the switches ask for, and what the machine allows."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from . import machine, ring_c
from .machine import BuildError, Link
from .modules import MODULES, RING, ROOT, SOURCES, Module

SWITCH = ("auto", "require", "off")


@dataclass(frozen=True)
class Plan:
    """What will be done about a module, and why."""

    module: Module
    build: bool
    reason: str
    link: Link = Link()

    @property
    def switched_off(self) -> bool:
        return not self.build and self.reason == f"{self.module.switch}=off"

    def describe(self) -> str:
        """One line for the build's output."""
        if self.build:
            return f"yatagarasu_cache: building the {self.module.title}: {self.reason}"
        line = f"yatagarasu_cache: NOT building the {self.module.title}: {self.reason}"
        return line if self.switched_off else f"{line}; {self.module.without}"


def switch(module: Module, environ: Mapping[str, str] = os.environ) -> str:
    """The module's build switch; a value that is not known is an error, not `auto`."""
    return machine.choice(environ, module.switch, SWITCH)


def check_switches(environ: Mapping[str, str] = os.environ) -> None:
    """Raises BuildError for a variable whose value is not known, before anything is built."""
    for module in MODULES.values():
        switch(module, environ)
    machine.linkage(environ)


def decide(module: Module, environ: Mapping[str, str] = os.environ) -> Plan:
    """The plan for this machine and these settings. Raises BuildError where `require` cannot be kept."""
    wanted = switch(module, environ)
    if wanted == "off":
        return Plan(module, False, f"{module.switch}=off")
    link, problem = find(module, environ)
    if link is not None:
        return Plan(module, True, link.found, link)
    if wanted == "require":
        raise BuildError(
            f"{module.switch}=require, but the {module.title} cannot be built: {problem}.\n"
            f"Install what is missing, or use {module.switch}=auto to go without."
        )
    return Plan(module, False, problem)


def find(module: Module, environ: Mapping[str, str] = os.environ) -> tuple[Link | None, str]:
    """(how to reach the module's library, "") if it can be built, else (None, what is missing)."""
    problem = unsupported(module)
    if problem is not None:
        return None, problem
    if module is RING:
        ring_c.check()
    problem = f"no way to reach {module.library} was found"
    for link in machine.candidate_links(module.library, environ):
        answer = machine.trial(link, module.trial)
        if answer is None:
            return link, ""
        problem = answer
    return None, problem


def unsupported(module: Module) -> str | None:
    """What stands in the way of the module, its library aside; None if nothing does."""
    if sys.platform != "linux":
        return f"it is built on Linux only (this is {platform.system() or sys.platform})"
    if sys.implementation.name == "pypy":
        return "PyPy is not supported by the module"
    if not all((ROOT / SOURCES / name).is_file() for name in module.sources):
        return "the C sources are not in this source tree"
    return machine.no_compiler()
