"""What modules and classes are called, in whatever process they are.

The module that a process was started with is ``__main__`` in it, as every other such module is in its own:
``python -m shop.prices`` is called ``shop.prices``, as where it is imported, and a script by its file. What
has neither (a notebook, a prompt, ``python -c``) is ``__main__``, or the notebook where its path is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["place_of", "session_of", "stored_class_name"]

_MAINS = ("__main__", "__mp_main__")  # the second: in processes that multiprocessing has spawned


def stored_class_name(kind: type) -> str:
    """The name of a class, ``module:qualified.name``."""
    module = str(kind.__module__)
    namespace = vars(sys.modules[module]) if module in _MAINS and module in sys.modules else {}
    return f"{place_of(module, namespace) or session_of(namespace)}:{kind.__qualname__}"


def place_of(module: str, namespace: Mapping[str, Any]) -> str | None:
    """What a module is called, whoever runs it; None where only the session knows it."""
    if module not in _MAINS:
        return module
    spec = namespace.get("__spec__")
    if spec is not None and spec.name not in _MAINS:
        return str(spec.name)
    file = namespace.get("__file__")
    return _real_path(file) if file else None


@cache
def _real_path(file: str) -> str:
    return os.path.realpath(file)


def session_of(namespace: Mapping[str, Any]) -> str:
    """The notebook, where VS Code or Jupyter tell it."""
    file = namespace.get("__vsc_ipynb_file__")
    if not file and "ipykernel" in sys.modules:
        file = os.environ.get("JPY_SESSION_NAME")
    return str(file) if file else "__main__"
