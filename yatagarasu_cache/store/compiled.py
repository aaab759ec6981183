"""The module compiled from `csrc/` against CPython's own interface, where it was built and is wanted."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from ..concurrency import forks
from ..errors import BackendUnavailable, ConfigurationError

VARIABLE = "YATAGARASU_CORE"  # auto (default), c: insist on the compiled one, python: do without
ABI_VERSION = 11  # of the module that this code calls

_NAME = "yatagarasu_cache._core"
_begun: set[ModuleType] = set()


def load() -> ModuleType | None:
    """The module; None if it is not there or not wanted: then Python code does the same."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted not in ("auto", "c", "python"):
        raise ConfigurationError(f"the environment variable {VARIABLE}={wanted!r} must be auto, c or python")
    if wanted == "python":
        return None
    known = sys.modules.get(_NAME)
    if known is not None and known in _begun:  # without the locks of imports, which interruptions leave taken
        return known
    try:
        module = importlib.import_module(_NAME)
        if module.ABI_VERSION != ABI_VERSION:
            raise ImportError("it was built from other sources: build it anew")
    except ImportError as error:
        if wanted == "c":
            raise BackendUnavailable(f"{VARIABLE}=c, but the compiled core is not there: {error}") from error
        return None
    _begun.add(module)
    forks.register(module.begin_process, order=1)  # last: from then on it answers again
    return module
