"""What a cache holds before a deployment begins, for the programs of this directory and for the test
that looks afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from helpers import noise

from yatagarasu_cache import DiskCache

MIB = 1 << 20


def stock(size: int, count: int) -> dict[Any, bytes]:
    """`count` entries that have about `size` bytes together."""
    return {("old", number): noise(size // count, number) for number in range(count)}


def fill(directory: str | os.PathLike[str], limit: int, size: int, count: int) -> dict[Any, Any]:
    """Make a cache that holds that and is closed; what it holds."""
    entries = stock(size, count)
    with DiskCache(directory, size_limit=limit) as cache:
        cache.set_many(entries)
    return dict(entries)


def child(work: Callable[[], object], seconds: int = 60) -> int:
    """A forked process that does `work` and leaves without any clean-up: its id."""
    if pid := os.fork():
        return pid
    leave(work, seconds)


def leave(work: Callable[[], object], seconds: int) -> NoReturn:
    status = 1
    try:
        signal.alarm(seconds)  # nobody hangs for ever
        work()
        status = 0
    except BaseException:
        os.write(sys.stderr.fileno(), traceback.format_exc(limit=-2).encode())  # whole, beside those of others
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    """As `subprocess` has it: negative is a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
