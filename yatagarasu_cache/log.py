"""The logger of the package: ``yatagarasu_cache``, one for all of it.

As libraries do, it has a `NullHandler`: where the application has not configured logging, nothing is printed,
not even warnings by the handler of last resort, for standard error belongs to the application. What the lines
are is told in docs/operations.md. They name directories and files of the cache, never keys of the
application, which may be anything that its users typed.
"""

from __future__ import annotations

import logging

__all__ = ["NAME", "log", "without_key"]

NAME = "yatagarasu_cache"
log = logging.getLogger(NAME)
log.addHandler(logging.NullHandler())


def without_key(error: BaseException) -> str:
    """What an error says, for the log: without the key that is named where a value cannot be read."""
    return str(getattr(error, "without_key", "") or error)
