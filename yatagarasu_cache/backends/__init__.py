"""The choice of a backend: made once, when a cache is opened."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..config import Settings
from ..errors import BackendUnavailable
from .base import Backend

__all__ = ["Backend", "Choice", "choose"]

_log = logging.getLogger("yatagarasu_cache")
_logged: set[str] = set()


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    backend: Backend
    reason: str


def choose(settings: Settings) -> Choice:
    """The backend that `settings` asks for; only the chosen one's module is imported.

    "auto" falls back to "threads" with one log line. A backend asked for by name that cannot run
    raises `BackendUnavailable` with the reason.
    """
    if settings.backend == "threads":
        return _threads(settings, "asked for by name")
    try:
        from .uring import UringBackend

        reason = "asked for by name" if settings.backend == "uring" else "available"
        choice = Choice(UringBackend(settings), reason)
    except (ImportError, BackendUnavailable) as error:
        if settings.backend == "uring":
            raise BackendUnavailable(f"backend='uring' cannot run here: {error}") from error
        choice = _threads(settings, f"io_uring is not available: {error}")
    _log_once(choice)
    return choice


def _threads(settings: Settings, reason: str) -> Choice:
    from .threads import ThreadsBackend

    return Choice(ThreadsBackend(settings.workers), reason)


def _log_once(choice: Choice) -> None:
    line = f"backend {choice.backend.name}: {choice.reason}"
    if line not in _logged:
        _logged.add(line)
        _log.info(line)
