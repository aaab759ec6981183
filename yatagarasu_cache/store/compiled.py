"""The module compiled from `csrc/` against CPython's own interface, where it was built and is wanted."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import NamedTuple

from ..concurrency import forks
from ..errors import BackendUnavailable, ConfigurationError
from ..log import log as _log

VARIABLE = "YATAGARASU_CORE"  # auto (default), c: insist on the compiled one, python: do without
ABI_VERSION = 15  # of the module that this code calls
BUILT_WITHOUT = "YATAGARASU_COMPILED_CORE=off"  # how the build says that it was switched off there

_NAME = "yatagarasu_cache._core"
_begun: set[ModuleType] = set()
_logged: set[str] = set()


class Choice(NamedTuple):
    """The module, or None where Python code does the same, and why."""

    module: ModuleType | None
    reason: str


def choose() -> Choice:
    """What there is and is wanted. Raises where the compiled core is insisted on and is not there."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted not in ("auto", "c", "python"):
        raise ConfigurationError(f"the environment variable {VARIABLE}={wanted!r} must be auto, c or python")
    if wanted == "python":
        return Choice(None, f"{VARIABLE}=python")
    there = "asked for by name" if wanted == "c" else "available"
    known = sys.modules.get(_NAME)
    if known is not None and known in _begun:  # without the locks of imports, which interruptions leave taken
        return Choice(known, there)
    try:
        module = importlib.import_module(_NAME)
        if module.ABI_VERSION != ABI_VERSION:
            raise ImportError("it was built from other sources: build it anew")
    except ImportError as error:
        if wanted == "c":
            raise BackendUnavailable(f"{VARIABLE}=c, but the compiled core is not there: {error}") from error
        return Choice(None, _why_not(error))
    _begun.add(module)
    forks.register(module.begin_process, order=1)  # last: from then on it answers again
    return Choice(module, there)


def load() -> ModuleType | None:
    """The module; None if it is not there or not wanted: then Python code does the same."""
    return choose().module


def tell(choice: Choice) -> None:
    """One log line a process where the compiled core is missing and nobody wanted that."""
    if choice.module is not None or choice.reason in (f"{VARIABLE}=python", BUILT_WITHOUT):
        return
    line = f"core python: {choice.reason}"
    if line not in _logged:
        _logged.add(line)
        _log.info(line)


def _why_not(error: ImportError) -> str:
    """What the build says, where there is a record of it, and the remedy."""
    try:
        from .._build_info import CORE_REASON as reason
    except ImportError:
        reason = "no record of the build"
    if reason == BUILT_WITHOUT:
        return BUILT_WITHOUT
    return (
        f"the compiled module {_NAME} cannot be loaded ({error}; build: {reason}); reinstall with "
        "YATAGARASU_COMPILED_CORE=require where a C compiler and the headers of Python and xxHash are there"
    )
