"""The engine, and all else that an open cache needs: loaded when the first one is opened.

So importing the package is cheap (tests/api/test_imports.py says what it loads).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .concurrency.locks import importing
from .errors import Reentered
from .guard import callers

if TYPE_CHECKING:
    from .desk import Desk

__all__ = ["loaded"]

_forks_wait = not hasattr(os, "register_at_fork")
_desk: type[Desk] | None = None


def loaded() -> type[Desk]:
    """The class behind which all of it is. It is loaded once, whoever else comes meanwhile, or forks."""
    return _desk or _load()


@callers  # a dependency that is missing, a handler that interrupts: that is told as it is
def _load() -> type[Desk]:
    global _desk
    if importing._is_owned():  # type: ignore[attr-defined]
        raise Reentered("this code has interrupted the opening of the first cache: have it run later")
    with importing:
        _have_forks_wait()
        from .desk import Desk

        _desk = Desk
    return Desk


def _have_forks_wait() -> None:
    """A child would wait for ever for a module that another thread was importing: so a fork waits for that.

    What is registered last is called first, and logging has all forks wait for a lock of its own, which the
    engine needs to be loaded: so this is registered behind it.
    """
    global _forks_wait
    if not _forks_wait:
        import logging  # noqa: F401

        os.register_at_fork(
            before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release
        )
        _forks_wait = True
