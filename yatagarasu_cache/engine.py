"""The engine, and all else that an open cache needs: loaded when the first one is opened.

So importing the package is cheap (tests/api/test_imports.py says what it loads).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .concurrency.locks import importing
from .errors import Reentered
from .guard import callers

if TYPE_CHECKING:
    from types import ModuleType

    from .computing.once import Once
    from .desk import Desk

__all__ = ["late", "loaded", "once", "opening"]

F = TypeVar("F", bound=Callable[..., None])

_desk: type[Desk] | None = None
_once: type[Once] | None = None
_late: dict[str, ModuleType] = {}


def loaded() -> type[Desk]:
    """The class that gives access to all of it. Loaded once, whatever threads and forks do meanwhile."""
    return _desk or _load()


@callers  # a missing dependency, an interrupting handler: such errors are raised as they are
def _load() -> type[Desk]:
    global _desk
    if importing._is_owned():  # type: ignore[attr-defined]
        raise Reentered("this code has interrupted the opening of the first cache: have it run later")
    with importing:
        if _forks is not None:
            _forks.wait_behind_logging()
        from .desk import Desk

        _desk = Desk
    return Desk


def once() -> type[Once]:
    """What computes values that are missing: not everybody has a function for that."""
    return _once or _load_once()


def _load_once() -> type[Once]:
    global _once
    _once = found = cast("type[Once]", late("computing.once").Once)
    return found


def late(name: str) -> Any:
    """A module of this package that not everybody needs."""
    return _late.get(name) or _load_late(name)


@callers
def _load_late(name: str) -> Any:
    from importlib import import_module

    with importing:  # forks wait for it
        _late[name] = module = import_module(f".{name}", __package__)
    return module


def opening(constructor: F) -> F:
    """A constructor that shows the signature of `constructor` to editors and readers, and calls
    ``self._begin(directory, options)``.

    So `config` hears which options were named, whatever their values, and says what a misspelt one may mean.
    """

    def begin(self: Any, directory: str | os.PathLike[str], **options: Any) -> None:
        self._begin(directory, options)

    return cast("F", functools.update_wrapper(begin, constructor))


class _Forks:
    """Has forks wait while modules of this package are imported. Otherwise the child could wait for ever for
    a module that another thread was importing.

    What is registered last is called first before a fork, and logging has forks wait for a lock of its own,
    which the engine needs while it is loaded. So waiting is registered a second time, behind logging, once
    that is loaded; what was registered at first has forks wait until then.
    """

    def __init__(self) -> None:
        self._is_behind_logging = self._has_loaded_logging = self._holds = False
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)

    def wait_behind_logging(self) -> None:
        """`importing` is held."""
        if not self._is_behind_logging:
            self._has_loaded_logging = "logging" not in sys.modules
            import logging  # noqa: F401

            os.register_at_fork(
                before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release
            )
            self._is_behind_logging = True

    def _before(self) -> None:
        if importing._is_owned():  # type: ignore[attr-defined]  # by what is registered behind logging
            return
        was_behind = self._is_behind_logging
        # With a bound: should this thread have logging's lock, whoever is importing could wait for it.
        taken = importing.acquire(timeout=_PATIENCE)
        self._holds = taken and not self._is_behind_logging
        if self._is_behind_logging and not was_behind and self._has_loaded_logging:
            # What was registered meanwhile is called after the fork, but was not called before it.
            sys.modules["logging"]._lock.acquire()

    def _after(self) -> None:
        if self._holds:
            self._holds = False
            importing.release()


_PATIENCE = 10.0  # seconds
_forks = _Forks() if hasattr(os, "register_at_fork") else None
