"""On what terms a value is computed, stored and served."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..codec import Key
from ..guard import callers

__all__ = ["Terms", "check_wait"]


class Terms(NamedTuple):
    """What `get_or_set` and memoized functions are told beside key and function.

    condition: called with the result; it is stored only if that returns something true.
    """

    expire: float | None = None
    tag: Key = None
    meta: Any = None
    stale: float | None = None
    refresh_early: float | None = None
    wait: float | None = None
    condition: Callable[[Any], object] | None = None

    @callers
    def check(self, default_expire: float | None) -> None:
        """TypeError or ValueError that names the argument."""
        check_wait(self.wait)
        if self.stale is not None and _number("stale", self.stale) <= 0:
            raise ValueError(f"stale must be more than 0 seconds, or None, not {self.stale!r}")
        if self.refresh_early is not None and not 0 < self.beta < math.inf:
            raise ValueError(
                f"refresh_early must be more than 0 (1.0 is usual), or None, not {self.refresh_early!r}"
            )
        expire = default_expire if self.expire is None else self.expire
        for name in ("stale", "refresh_early"):
            if getattr(self, name) is not None and (expire is None or expire == math.inf):
                raise ValueError(
                    f"{name} is about what expires, and this never does: give expire=, or open the cache "
                    "with default_expire="
                )

    @property
    def beta(self) -> float:
        """`refresh_early` as a number: True is 1.0."""
        early = self.refresh_early
        return 1.0 if early is True else _number("refresh_early", early)

    @property
    def stale_nanoseconds(self) -> int:
        return 0 if self.stale is None else int(min(self.stale, 1e10) * 1e9)


@callers
def check_wait(wait: float | None) -> None:
    if wait is not None and _number("wait", wait) < 0:
        raise ValueError(f"wait must be 0 seconds or more, or None for any time, not {wait!r}")


@callers
def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise TypeError(f"{name} must be a number or None, not {value!r}")
    return value
