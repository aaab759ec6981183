"""Lines of the table of figures: what is asked beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    what: str
    asked: str
    measured: str
    reached: bool


def table(rows: Iterable[Row]) -> str:
    lines = ["| what | asked | measured | reached |", "|---|---|---|---|"]
    lines += [
        f"| {row.what} | {row.asked} | {row.measured} | {'yes' if row.reached else 'no'} |" for row in rows
    ]
    return "\n".join(lines)
