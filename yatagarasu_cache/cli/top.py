"""`top`: what caches are doing now, on a screen that goes on, once, or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from .opening import NO, OK, CommandError, require_cache
from .show import presenter
from .watching import View, Watched

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run_top"]

SHORTEST = 0.1  # seconds between two looks
QUIT = b"qQ\x03\x04"  # Ctrl-C and Ctrl-D as well, should the terminal hand these on
TERMINATED = 128 + signal.SIGTERM
NEEDS_RICH = "a live screen needs rich: pip install 'yatagarasu_cache[cli]'; --once and --json do without"


def run_top(args: argparse.Namespace) -> int:
    if args.interval < SHORTEST:
        raise CommandError(f"--interval must be at least {SHORTEST} seconds")
    for directory in args.caches:
        require_cache(directory)  # a slip in a name is told at once; what goes later may come back
    views = [View(Watched(directory, directory, args.backend)) for directory in args.caches]
    try:
        if args.json and not args.once:
            lines(views, args.interval)
        elif args.once or not sys.stdout.isatty():
            return once(views, args.interval, as_json=args.json)
        else:
            screen(views, args.interval)
    finally:
        for view in views:
            view.watched.close()
    return OK


def refresh(views: list[View]) -> None:
    for view in views:
        view.refresh(time.monotonic())


def once(views: list[View], interval: float, *, as_json: bool) -> int:
    """Two looks, for rates. Exit code 1 if a cache cannot be looked at."""
    refresh(views)
    time.sleep(interval)
    refresh(views)
    if as_json:
        print(as_line(views))
    else:
        for number, view in enumerate(views):
            if number:
                print()
            presenter().table(("", ""), view.rows(sparklines=False))
    return OK if all(view.look.stats is not None for view in views) else NO


def lines(views: list[View], interval: float) -> NoReturn:
    """A line each time, until the reader goes away, or Ctrl-C comes."""
    refresh(views)
    while True:
        time.sleep(interval)
        refresh(views)
        print(as_line(views), flush=True)


def as_line(views: list[View]) -> str:
    return json.dumps({"time": time.time(), "caches": [view.as_dict() for view in views]})


# -- the screen --------------------------------------------------------------------------------


def screen(views: list[View], interval: float) -> None:
    """Until q, or Ctrl-C. The terminal is as it was afterwards."""
    try:
        from rich.live import Live
    except ImportError:
        raise CommandError(NEEDS_RICH) from None
    refresh(views)
    live = Live(drawn(views), screen=True, auto_refresh=False)
    with terminated_by_exception(), keys() as fd, contextlib.ExitStack() as stack:
        stack.callback(live.stop)  # first: with `with live` a Ctrl-C as it begins leaves the screen
        live.start(refresh=True)
        while not quits(fd, interval):
            refresh(views)
            live.update(drawn(views), refresh=True)


def drawn(views: list[View]) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels: list[RenderableType] = []
    for view in views:
        (_, name), *rows = view.rows()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(label, Text(text, style="red" if label in ("corrupt", "state", "note") else ""))
        panels.append(Panel(table, title=Text(name), title_align="left"))
    return Group(*panels, Text(f"{time.strftime('%H:%M:%S')}   q quits", style="dim"))


@contextlib.contextmanager
def keys() -> Iterator[int | None]:
    """Keys as they are pressed, unseen, until the end; None where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before: list[Any] = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def quits(fd: int | None, seconds: float) -> bool:
    """Whether that is asked for within so many seconds."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if fd is None:
            time.sleep(left)
        elif select.select([fd], [], [], left)[0]:
            pressed = os.read(fd, 64)
            if not pressed or any(key in QUIT for key in pressed):  # nothing: the terminal is gone
                return True
    return False


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Else SIGTERM would end the process with the screen and the keys as they are."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
