"""The choice of a backend: made once, when a cache is opened."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from ..concurrency.locks import importing
from ..config import RingSettings, Settings
from ..errors import BackendUnavailable
from ..log import log as _log
from .base import Backend

__all__ = ["Backend", "Choice", "choose"]

_logged: set[str] = set()


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    backend: Backend
    reason: str


def choose(settings: Settings) -> Choice:
    """The backend that `settings` asks for; only the chosen one's module is imported.

    "auto" falls back to "threads" with one log line. A backend asked for by name that cannot run
    raises `BackendUnavailable` with the reason. Settings of a ring without one are logged.
    """
    choice = _choose(settings)
    if settings.backend != "threads":
        line = f"backend {choice.backend.name}: {choice.reason}"
        _log_once(line)
    if choice.backend.name == "threads" and (unused := _changed(settings.io_uring)):
        line = f"settings of io_uring that the portable backend does not use: {', '.join(unused)}"
        _log_once(line)
    return choice


def _choose(settings: Settings) -> Choice:
    if settings.backend == "threads":
        return _threads(settings, "asked for by name")
    try:
        with importing:
            from .uring import UringBackend

        reason = "asked for by name" if settings.backend == "uring" else "available"
        return Choice(UringBackend(settings), reason)
    except (ImportError, BackendUnavailable) as error:
        if settings.backend == "uring":
            raise BackendUnavailable(f"backend='uring' cannot run here: {error}") from error
        return _threads(settings, f"io_uring is not available: {error}")


def _threads(settings: Settings, reason: str) -> Choice:
    with importing:
        from .threads import ThreadsBackend
    return Choice(ThreadsBackend(settings.workers), reason)


def _changed(ring: RingSettings) -> list[str]:
    """Names of the ring's settings that differ from their defaults."""
    names = [one.name for one in fields(ring) if getattr(ring, one.name) != one.default]
    return [name for name in names if name != "enabled"]


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        _log.info(line)
