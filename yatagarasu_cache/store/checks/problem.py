"""What is not as it should be."""

from __future__ import annotations

import dataclasses

from .. import unreadable

_REMEDY = "if that lasts, check(fix=True, drop_unreadable=True) gives up what cannot be read"


class Unreadable(str):
    """What is wrong with a file that cannot be read: it is there, and may be readable the next time."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    kind: "entry", "count", "space", "segment", "large", "index", "checkpoint", "settings", "tag" or "stray".
    where: the file, or the place in it. detail: what is wrong. fixed: whether it was put in order.
    """

    kind: str
    where: str
    detail: str
    fixed: bool = False


def mends(fix: bool, detail: str) -> bool:
    """Whether to mend what is wrong with a file."""
    return fix and (unreadable.is_giving_up() or not isinstance(detail, Unreadable))


def fault_of(error: OSError) -> str:
    """What is wrong with a file that cannot be read. Raises an error that is only this process's."""
    if unreadable.is_absence(error):
        return error.strerror or str(error)
    if not unreadable.is_of_disk(error):
        raise error
    fault = unreadable.fault(error)
    return Unreadable(fault if unreadable.is_giving_up() else f"{fault} ({_REMEDY})")
