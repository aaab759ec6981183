"""Mending a cache that cannot be opened as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, cast

from .cache import DiskCache
from .store.check import Problem
from .store.unreadable import giving_up

P = ParamSpec("P")


def _with_signature_of(
    opens: Callable[P, DiskCache],
) -> Callable[[Callable[..., list[Problem]]], Callable[P, list[Problem]]]:
    def decorate(function: Callable[..., list[Problem]]) -> Callable[P, list[Problem]]:
        shown = inspect.signature(opens).replace(return_annotation="list[Problem]")
        function.__signature__ = shown  # type: ignore[attr-defined]
        return cast("Callable[P, list[Problem]]", function)

    return decorate


@_with_signature_of(DiskCache)
def repair(*args: Any, **options: Any) -> list[Problem]:
    """Open the cache in `directory`, put everything in order, and give up what the disk cannot read any more.

    For a cache whose index has to be made anew, from files of which one cannot be read, so that `DiskCache`
    raises a `CacheIOError`; else `check(fix=True, drop_unreadable=True)` does the same. `options` are those
    of `DiskCache`. What was found comes back, as from `check`.
    """
    with giving_up():
        cache = DiskCache(*args, **options)
    with cache:
        return cache.check(fix=True, drop_unreadable=True)
