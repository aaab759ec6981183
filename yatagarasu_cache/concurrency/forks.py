"""Children of a fork: everything that must not be shared with the parent is made anew.

`os.fork` runs hooks that do so. Servers and libraries that fork in C run none (uWSGI does not, unless
told to). So before something opened earlier is used, `ensure_own` checks whether this is a child, and
renews the same things, only later. A page that the kernel wipes in a fork tells; where the system has none,
the process id does, which takes a system call.
"""

from __future__ import annotations

import logging  # noqa: F401  (loaded before, so its locks are renewed before: renewing may log)
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ensure_own", "in_child", "register"]

_WIPEONFORK = 18  # MADV_WIPEONFORK: Linux 4.14, madvise(2). Python's mmap does not name it.


def _wiped_page() -> Any:
    """Memory whose first byte is 1 until a fork, and 0 in the child. All zeros where there is none."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPEONFORK)
    except (AttributeError, OSError, ValueError):
        return bytearray(1)
    try:
        page.madvise(-1)  # an emulator may accept any advice
        return bytearray(1)
    except OSError:
        page[0] = 1
        return page


_own = _wiped_page()
_keeps = bool(_own[0])
_renewals: dict[int, list[Callable[[], None]]] = {}  # by their order; complete at each step
_process = os.getpid()
_renewing = threading.RLock()


def register(renew: Callable[[], None], order: int = 0) -> None:
    """Call `renew` in every child, those of a lower `order` first, else as they were registered."""
    _renewals.setdefault(order, []).append(renew)


def ensure_own() -> None:
    """Renew what is the parent's, if that has not been done. Cheap if it has."""
    if not _own[0] and os.getpid() != _process:
        in_child()


def in_child() -> None:
    """Renew everything, once. Other threads of this process wait until it is done."""
    global _process
    with _renewing:
        if os.getpid() == _process:
            return
        for order in sorted(_renewals):
            for renew in list(_renewals[order]):
                renew()
        _process = os.getpid()
        _own[0] = _keeps


def _after_fork() -> None:
    global _renewing
    _renewing = threading.RLock()  # another thread of the parent may have had it
    in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
