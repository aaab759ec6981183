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
    """The class that gives access to all of it. Loaded once, whatever threads and forks do meanwhile."""
    return _desk or _load()


@callers  # a missing dependency, an interrupting handler: such errors are raised as they are
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
    """Let forks wait while a thread imports the engine: a child would wait for ever for that import.

    Hooks that run before a fork run in reverse order of registration. Logging's takes a lock that loading
    the engine needs: so ours is registered after it.
    """
    global _forks_wait
    if not _forks_wait:
        import logging  # noqa: F401

        os.register_at_fork(
            before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release
        )
        _forks_wait = True
