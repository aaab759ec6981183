"""Children of a fork: everything that must not be shared with the parent is made anew.

`os.fork` runs hooks that do so. Servers and libraries that fork in C run none (uWSGI does not, unless
told to), so whoever is about to use something that was opened before also looks at the process id
(`ensure_own`): what is renewed then is the same, only later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["ensure_own", "in_child", "register"]

_renewals: list[tuple[int, Callable[[], None]]] = []
_process = os.getpid()
_renewing = threading.RLock()


def register(renew: Callable[[], None], order: int = 0) -> None:
    """Call `renew` in every child, those of a lower `order` first, else as they were registered."""
    _renewals.append((order, renew))
    _renewals.sort(key=lambda entry: entry[0])


def ensure_own() -> None:
    """Renew what is the parent's, if that has not been done. Cheap if it has."""
    if os.getpid() != _process:
        in_child()


def in_child() -> None:
    """Renew everything, once. Other threads of this process wait until it is done."""
    global _process
    with _renewing:
        if os.getpid() == _process:
            return
        for _, renew in list(_renewals):
            renew()
        _process = os.getpid()


def _after_fork() -> None:
    global _renewing
    _renewing = threading.RLock()  # another thread of the parent may have had it
    in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
