"""What the commands share: their exit codes, their errors, and how they open a cache."""

from __future__ import annotations

import argparse
import os

from ..backends.threads import ThreadsBackend
from ..cache import DiskCache
from ..errors import CacheError, FormatError, ReadOnlyError
from ..store.directory import is_ours

OK, NO, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


class CommandError(CacheError):
    """What the user asked for cannot be done; the message is all there is to show."""


def require_cache(directory: str) -> None:
    """Commands other than `set` and `warm` create nothing."""
    if not os.path.isdir(directory):
        raise FormatError(f"{directory}: no such directory (`set` and `warm` create a cache)")
    if not is_ours(ThreadsBackend(), directory, os.listdir(directory)):
        raise FormatError(f"{directory}: not a cache (`set` and `warm` create one)")


def open_read_only(args: argparse.Namespace) -> DiskCache:
    require_cache(args.cache)
    return DiskCache(args.cache, backend=args.backend, read_only=True)


def open_to_read(args: argparse.Namespace) -> DiskCache:
    """Read-only where that will do: an index that was lost or left by a crash is recovered first."""
    try:
        return open_read_only(args)
    except ReadOnlyError:
        return open_to_change(args)


def open_to_change(args: argparse.Namespace) -> DiskCache:
    """For commands that store nothing."""
    require_cache(args.cache)
    return DiskCache(args.cache, backend=args.backend)


def open_to_fill(args: argparse.Namespace) -> DiskCache:
    """The cache named on the command line, created if there is none. What is named holds for all users."""
    named = {"size_limit": args.size_limit, "eviction": args.eviction}
    options = {name: value for name, value in named.items() if value is not None}
    return DiskCache(args.cache, backend=args.backend, **options)
