"""What the user sees: sizes, times, keys and errors as text, progress, JSON."""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import CacheError

PROG = "yatagarasu-cache"
DRAW_EVERY = 0.2  # seconds between two states of a progress line

# -- sizes, times and keys as text -------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtp])(i?b)?|b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in ``4096``, ``64MiB``, ``10G`` (both powers of 1024) or ``10GB`` (powers of 1000)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (examples: 4096, 64MiB, 10G, 10GB)")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    power = "kmgtp".index(unit.lower()) + 1 if unit else 0
    return int(float(number) * base**power) if "." in number else int(number) * base**power


def parse_port(text: str) -> int:
    """A port of TCP; 0 is any."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"not a port: {text!r} (0 to 65535)")
    return int(text)


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds


def parse_seconds(text: str) -> float:
    """Seconds in ``90``, ``1.5h`` or ``7d``."""
    number = text.strip()
    unit = _UNITS.get(number[-1:].lower())
    try:
        seconds = float(number[:-1]) * unit if unit else float(number)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"not a positive time: {text!r} (examples: 90, 90s, 15m, 1.5h, 7d)")
    return seconds


def human_size(size: float) -> str:
    """`size` bytes in the unit that keeps it short: ``0 B``, ``1.5 KiB``, ``10.0 GiB``."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def human_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str) -> str:
    """`text` on one line, safe for a terminal: control characters and lone surrogates escaped."""
    if text.isprintable() and (text.isascii() or is_encodable(text)):
        return text
    return "".join(
        char if char.isprintable() and is_encodable(char) else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def is_encodable(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def key_text(key: object) -> str:
    """A string key as it is, any other as the Python literal that ``--literal`` takes."""
    return key if isinstance(key, str) else repr(key)


# -- what the user sees ------------------------------------------------------------------------


class Progress:
    """How far a long command is; `draw` is called now and then to show it."""

    def __init__(self, draw: Callable[[Progress], None] | None = None) -> None:
        self.files = 0
        self.bytes = 0
        self._draw = draw
        self._start = self._drawn = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def advance(self, *, size: int = 0, files: int = 0) -> None:
        self.bytes += size
        self.files += files
        if self._draw is not None and time.monotonic() - self._drawn >= DRAW_EVERY:
            self._drawn = time.monotonic()
            self._draw(self)


class Presenter:
    """Plain text; `RichPresenter` adds colours, bars and boxes where a terminal shows them."""

    def shows_progress(self) -> bool:
        return sys.stderr.isatty()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows) if any(columns) else rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())

    def note(self, text: str) -> None:
        """One line on standard error."""
        print(f"{PROG}: {printable(text)}", file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, files: int, size: int) -> Iterator[Progress]:
        def draw(now: Progress) -> None:
            rate = human_size(now.bytes / now.seconds)
            text = f"{now.files} of {files} files, {human_size(now.bytes)} of {human_size(size)}, {rate}/s"
            print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)

        try:
            yield Progress(draw)
        finally:
            print("\r" + " " * 78, end="\r", file=sys.stderr, flush=True)


    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """To be called with how many are done, of how many; None where nobody sees it."""
        if not self.shows_progress():
            yield None
            return

        def draw(done: int, total: int) -> None:
            print(f"\r{f'{done} of {total} {what}':<78}", end="", file=sys.stderr, flush=True)

        try:
            yield draw
        finally:
            print("\r" + " " * 78, end="\r", file=sys.stderr, flush=True)


class RichPresenter(Presenter):
    """`Presenter` through rich. Output that goes to a file or a pipe stays the same plain text."""

    def __init__(self) -> None:
        from rich.console import Console

        self._out = Console(highlight=False)
        self._err = Console(highlight=False, stderr=True)

    def shows_progress(self) -> bool:
        return self._err.is_terminal

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not self._out.is_terminal:
            super().table(columns, rows)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=any(columns), header_style="bold", pad_edge=False)
        for number, name in enumerate(columns):
            table.add_column(name, style="" if number else "cyan", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._out.print(table)

    def note(self, text: str) -> None:
        self._err.print(f"{PROG}: {printable(text)}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, files: int, size: int) -> Iterator[Progress]:
        import rich.progress as bars

        columns = (
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[files]} of {task.fields[total_files]} files"),
            bars.DownloadColumn(binary_units=True),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self._err, transient=True) as live:
            task = live.add_task("", total=size, files=0, total_files=files)
            yield Progress(lambda now: live.update(task, completed=now.bytes, files=now.files))


    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        if not self.shows_progress():
            yield None
            return
        import rich.progress as bars

        columns = (
            bars.BarColumn(), bars.TaskProgressColumn(), bars.MofNCompleteColumn(), bars.TextColumn(what),
            bars.TimeRemainingColumn(),
        )  # fmt: skip
        with bars.Progress(*columns, console=self._err, transient=True) as live:
            task = live.add_task("", total=None)
            yield lambda done, total: live.update(task, completed=done, total=total)


@functools.cache
def presenter() -> Presenter:
    """The one presenter of this process."""
    try:
        return RichPresenter()
    except ImportError:
        return Presenter()


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=True, default=json_value))


def json_value(value: object) -> Any:
    """What JSON has no form for: bytes in base64, containers as lists and objects, the rest as a literal of
    Python. Bytes may be anything, also text that looks like a literal: base64 is what programs expect.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    return repr(value)


def reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the number
    return str(error) or type(error).__name__


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, CacheError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason(error)}"
    return reason(error)
