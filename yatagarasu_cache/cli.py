"""The command line: ``yatagarasu-cache``, also ``python -m yatagarasu_cache``.

Exit codes: 0 done, 1 the answer is no (a miss, an unreadable file, problems that remain),
2 a wrong call or an error, 130 interrupted, 141 the reader of our output went away.

Results go to standard output, everything else to standard error. What is shown on a terminal
goes through one `Presenter`, which uses `rich` where it is installed (extra ``cli``).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import functools
import io
import json
import math
import mimetypes
import os
import re
import shutil
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ._version import __version__
from .backends.threads import ThreadsBackend
from .cache import DiskCache
from .concurrency.interruption import descriptor_of
from .entry import Entry
from .errors import CacheError, CacheIOError, FormatError, ReadOnlyError, SerializationError, ValueTooLarge
from .mending import repair
from .stats import CacheStats
from .store.check import Problem
from .store.directory import is_ours
from .store.format import EVICTIONS, INDEX_NAME

__all__ = ["main"]

PROG = "yatagarasu-cache"
STREAM_FROM = 1 << 20  # values from this size on are copied in pieces, never held whole
AHEAD = 32  # files that `warm` has open, and asked for, before it reads the first of them
COPY_BUFFER = 1 << 18
DRAW_EVERY = 0.2  # seconds between two states of a progress line

OK, NO, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


class CommandError(CacheError):
    """What the user asked for cannot be done; the message is all there is to show."""


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
    if text.isprintable() and (text.isascii() or _encodable(text)):
        return text
    return "".join(
        char if char.isprintable() and _encodable(char) else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def _encodable(text: str) -> bool:
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


@functools.cache
def presenter() -> Presenter:
    """The one presenter of this process."""
    try:
        return RichPresenter()
    except ImportError:
        return Presenter()


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=True, default=_json_value))


def _json_value(value: object) -> Any:
    """What JSON has no form for: containers as lists and objects, the rest as a Python literal."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    return repr(value)


# -- opening a cache ---------------------------------------------------------------------------


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


def parse_key(args: argparse.Namespace, text: str) -> Any:
    if not args.literal:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise CommandError(
            f"not a Python literal: {text!r} (--literal needs one: 42, b'x', ('a', 1))"
        ) from None


# -- get, set, delete --------------------------------------------------------------------------


def run_get(args: argparse.Namespace) -> int:
    key = parse_key(args, args.key)
    with open_to_read(args) as cache:
        try:
            source = value_stream(cache, key)
        except KeyError:
            presenter().note(f"not in the cache: {args.key}")
            return NO
        with source, output(args.output) as target:
            shutil.copyfileobj(source, target, COPY_BUFFER)
    return OK


def value_stream(cache: DiskCache, key: Any) -> BinaryIO:
    """What `get` writes out, verified before the first byte of it is read. KeyError on a miss."""
    try:
        return cache.open(key)
    except TypeError:  # neither bytes nor text: has to be decoded as a whole
        return io.BytesIO(as_json(cache[key]))


def as_json(value: object) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, default=_json_value)
    except (TypeError, ValueError):  # dictionary keys that JSON cannot have
        text = repr(value)
    return text.encode("utf-8", "surrogatepass") + b"\n"


@contextlib.contextmanager
def output(path: str | None) -> Iterator[BinaryIO]:
    if path is not None and path != "-":
        with open(path, "wb") as target:
            yield target
        return
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def run_set(args: argparse.Namespace) -> int:
    if (args.value is None) == (args.file is None):
        raise CommandError("set takes a VALUE, or -f FILE, or - for standard input")
    key = parse_key(args, args.key)
    with contextlib.ExitStack() as stack:
        value: Any = args.value
        if args.file not in (None, "-"):
            value = stack.enter_context(open(args.file, "rb"))
        elif "-" in (args.file, args.value):
            value = sys.stdin.buffer
        if args.length is not None and isinstance(value, str):
            raise CommandError("--length is for - and -f FILE")
        cache = stack.enter_context(open_to_fill(args))
        try:
            cache.set(key, value, expire=args.expire, tag=args.tag, length=args.length)
        except ValueError as error:
            if isinstance(error, CacheError):
                raise
            raise CommandError(str(error)) from error
    return OK


def run_delete(args: argparse.Namespace) -> int:
    keys = [parse_key(args, text) for text in args.key]
    code = OK
    with open_to_change(args) as cache:
        for key in keys:
            if not cache.delete(key):
                presenter().note(f"not in the cache: {key_text(key)}")
                code = NO
    return code


# -- ls, stats, check --------------------------------------------------------------------------


def run_ls(args: argparse.Namespace) -> int:
    with open_to_read(args) as cache:
        entries = cache.entries(prefix=args.prefix, tag=args.tag)
        if args.json:
            list_json(entries)
        else:
            list_text(entries, long=args.long)
    return OK


def list_text(entries: Iterable[Entry], *, long: bool) -> None:
    if long:
        print(f"{'SIZE':>10}  {'CREATED':<19}  {'EXPIRES':<19}  {'TAG':<16}  KEY")
    for entry in entries:
        key = printable(key_text(entry.key))
        print(f"{long_columns(entry)}  {key}" if long else key)


def long_columns(entry: Entry) -> str:
    tag = "-" if entry.tag is None else printable(str(entry.tag))
    times = f"{human_time(entry.created):<19}  {human_time(entry.expires):<19}"
    return f"{human_size(entry.size):>10}  {times}  {tag:<16}"


def list_json(entries: Iterable[Entry]) -> None:
    """One array, written entry by entry, so that a large cache needs no memory."""
    separator = "["
    for entry in entries:
        print(separator + json.dumps(entry_dict(entry), default=_json_value))
        separator = ","
    print("]" if separator == "," else "[]")


def entry_dict(entry: Entry) -> dict[str, Any]:
    return {
        "key": key_text(entry.key),
        "key_type": type(entry.key).__name__,
        "tag": entry.tag,
        "size": entry.size,
        "created": entry.created,
        "expires": entry.expires,
        "accessed": entry.accessed,
        "meta": entry.meta,
    }


def run_stats(args: argparse.Namespace) -> int:
    with open_to_read(args) as cache:
        stats = cache.stats()
    if args.json:
        print_json({"directory": os.path.abspath(args.cache), **stats.as_dict()})
    else:
        presenter().table(("", ""), stats_rows(args.cache, stats))
    return OK


def stats_rows(directory: str, stats: CacheStats) -> list[tuple[str, str]]:
    ratio = f"{stats.hit_ratio:.1%}" if stats.hits or stats.misses else "no gets yet"
    index = human_size(stats.index_bytes)
    return [
        ("cache", printable(directory)),
        ("backend", f"{stats.backend} ({stats.backend_reason})"),
        ("core", f"{stats.core} ({stats.core_reason})"),
        ("entries", str(stats.entries)),
        ("live", human_size(stats.live_bytes)),
        ("on disk", f"{human_size(stats.disk_bytes)} ({stats.segments} segments, index {index})"),
        ("hit ratio", f"{ratio} ({stats.hits} hits, {stats.misses} misses)"),
        ("sets", str(stats.sets)),
        ("deletes", str(stats.deletes)),
        ("evictions", str(stats.evictions)),
        ("expirations", str(stats.expirations)),
        ("corrupt", str(stats.corrupt)),
    ]


def run_check(args: argparse.Namespace) -> int:
    problems = find_problems(args)
    remaining = sum(not problem.fixed for problem in problems)
    if args.json:
        print_json({"problems": [asdict(problem) for problem in problems], "remaining": remaining})
    elif problems:
        presenter().table(("PROBLEM", "WHERE", "DETAIL", "FIXED"), [problem_row(one) for one in problems])
    else:
        print("no problems found")
    if remaining and not args.fix:
        presenter().note(f"{remaining} problems remain; `check --fix` repairs what can be repaired")
    elif remaining and not args.drop_unreadable:
        text = f"{remaining} problems remain; --drop-unreadable gives up what the disk cannot read any more"
        presenter().note(text)
    return NO if remaining else OK


def find_problems(args: argparse.Namespace) -> list[Problem]:
    """Without --fix nothing is changed, and so an index that needs to be rebuilt is a problem."""
    if args.drop_unreadable:
        if not args.fix:
            raise CommandError("--drop-unreadable gives something up: it needs --fix")
        require_cache(args.cache)
        return repair(args.cache, backend=args.backend)
    try:
        cache = open_to_change(args) if args.fix else open_read_only(args)
    except ReadOnlyError as error:
        return [Problem("index", INDEX_NAME, str(error))]
    with cache:
        return cache.check(fix=args.fix)


def problem_row(problem: Problem) -> list[str]:
    where, detail = printable(str(problem.where)), printable(problem.detail)
    return [problem.kind, where, detail, "yes" if problem.fixed else "no"]


# -- evict, expire, clear ----------------------------------------------------------------------


def run_evict(args: argparse.Namespace) -> int:
    with open_to_change(args) as cache:
        print(f"{cache.evict(args.tag)} entries evicted")
    return OK


def run_expire(args: argparse.Namespace) -> int:
    with open_to_change(args) as cache:
        print(f"{cache.expire()} entries expired")
    return OK


def run_clear(args: argparse.Namespace) -> int:
    with open_to_change(args) as cache:
        if not args.yes and not confirmed(f"Remove all {len(cache)} entries of {printable(args.cache)}?"):
            presenter().note("nothing removed")
            return NO
        print(f"{cache.clear()} entries removed")
    return OK


def confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise CommandError("clear removes everything: confirm with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# -- warm --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A regular file of the tree: its place relative to the root, and the path that opens it."""

    relative: str
    path: str


Report = Callable[[str, BaseException], None]  # (path, why it was left out)


class Tree:
    """The regular files under a directory, one at a time, so that a tree of any size needs no memory.

    A symbolic link counts as a file if it leads to one inside the tree. Links to directories are
    not followed: what lies inside the tree is met anyway.
    """

    def __init__(self, root: str, leave_out: str) -> None:
        self._root = os.path.realpath(root)
        self._leave_out = os.path.realpath(leave_out)

    def files(self, report: Report) -> Iterator[Found]:
        pending = [""]
        while pending:
            directory = pending.pop()
            try:
                with os.scandir(os.path.join(self._root, directory)) as entries:
                    for entry in entries:
                        yield from self._visit(entry, directory, pending)
            except OSError as error:
                report(directory or self._root, error)

    def _visit(self, entry: os.DirEntry[str], directory: str, pending: list[str]) -> Iterator[Found]:
        relative = f"{directory}/{entry.name}" if directory else entry.name
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if self._inside(target) and os.path.isfile(target):
                yield Found(relative, target)
        elif entry.is_file(follow_symlinks=False):
            yield Found(relative, entry.path)
        elif entry.is_dir(follow_symlinks=False) and entry.path != self._leave_out:
            pending.append(relative)

    def _inside(self, path: str) -> bool:
        def below(root: str) -> bool:
            return os.path.commonpath((root, path)) == root

        return below(self._root) and not below(self._leave_out)


class Source:
    """An open file as `DiskCache.set` reads it; keeps an error of its own apart from the cache's."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            self.error = error
            raise
        self._progress.advance(size=len(data))
        return data


class Opened(NamedTuple):
    """A file that is to be stored, open, its first bytes on their way into memory."""

    key: str
    tag: str
    relative: str
    file: BinaryIO
    status: os.stat_result


class Warmer:
    """Fills a cache from a tree and counts what became of each file.

    Files are opened some time before they are read, and the system is asked for their bytes then:
    so the disk works on many at once. That saves a tenth of the time of a cold tree where the disk
    is idle otherwise, a third where it is busy (docs/io_uring.md).
    """

    def __init__(self, cache: DiskCache, args: argparse.Namespace, progress: Progress) -> None:
        self._cache = cache
        self._args = args
        self._progress = progress
        self.stored = self.stored_bytes = self.fresh = self.failed = 0

    def report(self, path: str, error: BaseException) -> None:
        self.failed += 1
        presenter().note(f"{path}: {reason(error)}")

    def warm(self, files: Iterable[Found]) -> None:
        ahead: deque[Opened] = deque()
        try:
            for found in files:
                with self._reporting(found.relative):
                    opened = self._open(found)
                    if opened is not None:
                        ahead.append(opened)
                if len(ahead) > AHEAD:
                    self._store(ahead.popleft())
            while ahead:
                self._store(ahead.popleft())
        finally:
            for opened in ahead:
                opened.file.close()

    @contextlib.contextmanager
    def _reporting(self, relative: str) -> Iterator[None]:
        """What keeps one file out is told, and the next one's turn comes."""
        try:
            yield
        except CacheIOError:
            raise  # the cache's own trouble: the next file would meet it too
        except (OSError, ValueTooLarge, SerializationError) as error:
            self.report(relative, error)
            self._progress.advance(files=1)

    def _open(self, found: Found) -> Opened | None:
        """None for a file that the cache has as it is."""
        key = (self._args.prefix or "") + found.relative
        tag = self._args.tag or found.relative.partition("/")[0]
        status = os.stat(found.path, follow_symlinks=False)
        if self._is_fresh(key, tag, status):
            self.fresh += 1
            self._progress.advance(files=1, size=status.st_size)
            return None
        return Opened(key, tag, found.relative, *open_regular(found.path))

    def _is_fresh(self, key: str, tag: str, status: os.stat_result) -> bool:
        if key not in self._cache:  # does not count as a miss
            return False
        entry = self._cache.get_entry(key)
        if entry is None or entry.tag != tag or not isinstance(entry.meta, Mapping):
            return False
        if (entry.meta.get("size"), entry.meta.get("mtime_ns")) != (status.st_size, status.st_mtime_ns):
            return False
        return self._args.expire is None or self._cache.touch(key, expire=self._args.expire)

    def _store(self, opened: Opened) -> None:
        with self._reporting(opened.relative), opened.file as file:
            status = opened.status
            meta = {
                "content_type": mimetypes.guess_type(opened.key)[0] or "application/octet-stream",
                "mtime_ns": status.st_mtime_ns,
                "size": status.st_size,
            }
            source = Source(file, self._progress)
            value: Any = source if status.st_size >= STREAM_FROM else source.read()
            try:
                self._cache.set(opened.key, value, expire=self._args.expire, tag=opened.tag, meta=meta)
            except CacheError:
                if source.error is not None:
                    raise source.error from None
                raise
            self.stored += 1
            self.stored_bytes += status.st_size
            self._progress.advance(files=1)


def open_regular(path: str) -> tuple[BinaryIO, os.stat_result]:
    """`path` opened for reading, its first bytes asked for, and its status.

    Never waits for the writer of a pipe, never follows a link.
    """
    fd = descriptor_of(os.open, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, min(status.st_size, STREAM_FROM), os.POSIX_FADV_WILLNEED)
    except BaseException:
        os.close(fd)
        raise
    return open(fd, "rb", buffering=0), status


def run_warm(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.source):
        raise CommandError(f"{args.source}: no such directory")
    tree = Tree(args.source, leave_out=args.cache)
    with open_to_fill(args) as cache, warm_progress(tree) as progress:
        warmer = Warmer(cache, args, progress)
        warmer.warm(tree.files(warmer.report))
        evicted = cache.stats().process["evictions"]
    print(warm_summary(warmer, progress.seconds, evicted))
    return NO if warmer.failed else OK


@contextlib.contextmanager
def warm_progress(tree: Tree) -> Iterator[Progress]:
    """A visible one only on a terminal: it costs a walk of its own to know what is to come."""
    if not presenter().shows_progress():
        yield Progress()
        return
    files = size = 0
    for found in tree.files(lambda path, error: None):
        with contextlib.suppress(OSError):
            size += os.stat(found.path, follow_symlinks=False).st_size
            files += 1
    with presenter().progress(files, size) as progress:
        yield progress


def warm_summary(warmer: Warmer, seconds: float, evicted: int) -> str:
    rates = f"{warmer.stored / seconds:.0f} files/s, {human_size(warmer.stored_bytes / seconds)}/s"
    return (
        f"{warmer.stored} files stored ({human_size(warmer.stored_bytes)}, {rates}), "
        f"{warmer.fresh} fresh, {warmer.failed} failed, {evicted} entries evicted"
    )


# -- the command line itself -------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Help texts keep the line breaks of their examples."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)


class CommandParser(Parser):
    """Takes options anywhere: argparse on its own refuses ``set CACHE KEY --expire 9 VALUE``."""

    _nested = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._nested:
            return super().parse_known_args(args, namespace)
        self._nested = True  # parse_known_intermixed_args comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False


EXAMPLES = """\
examples:
  yatagarasu-cache warm ./public /var/cache/site --size-limit 2GiB
  yatagarasu-cache set /var/cache/site greeting hello --expire 3600
  yatagarasu-cache get /var/cache/site greeting
  yatagarasu-cache ls /var/cache/site --prefix img/ --long
  yatagarasu-cache stats /var/cache/site

exit codes: 0 done; 1 a miss, an unreadable file or a problem that remains; 2 an error
"""


def make_parser() -> Parser:
    parser = Parser(prog=PROG, description="Look into, fill and repair a disk cache.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    add_warm(commands)
    add_get(commands)
    add_set(commands)
    add_delete(commands)
    add_ls(commands)
    add_stats(commands)
    add_check(commands)
    add_removals(commands)
    return parser


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[CommandParser]


def add_command(
    commands: Commands, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> Parser:
    """A sub-command named like its function, with the options that all of them take."""
    name = run.__name__.removeprefix("run_")
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example:\n  {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--backend",
        choices=("auto", "threads", "uring"),
        default="auto",
        help="how files are read and written (default: auto)",
    )
    return parser


def add_cache(parser: Parser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="directory of the cache")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_literal(parser: Parser) -> None:
    parser.add_argument(
        "--literal", action="store_true", help="KEY is a Python literal: 42, b'x', ('img', 7); else a string"
    )


def add_storing(parser: Parser) -> None:
    parser.add_argument(
        "--expire",
        type=parse_seconds,
        metavar="TIME",
        help="forget it after so many seconds (or minutes, hours, days: 15m, 12h, 7d)",
    )
    parser.add_argument(
        "--size-limit",
        type=parse_size,
        metavar="SIZE",
        help="what the cache may take on disk before entries are evicted: 64MiB, 10G; changes it for all "
        "who use the cache (default: what the cache has, 10GiB for a new one)",
    )
    parser.add_argument(
        "--eviction",
        choices=EVICTIONS,
        help="which entries go when the limit is reached; likewise (default: what the cache has, lru for a "
        "new one)",
    )


def add_warm(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_warm,
        "fill a cache from a directory tree, leaving out what is already fresh in it",
        f"{PROG} warm ./public /var/cache/site --prefix static/ --size-limit 2GiB",
    )
    parser.add_argument("source", metavar="SOURCE_DIR", help="the tree; links out of it are ignored")
    add_cache(parser)
    parser.add_argument("--prefix", default="", help="put before each key, as it is")
    add_storing(parser)
    parser.add_argument("--tag", help="tag of all entries (default: first part of the file's path)")


def add_get(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_get,
        "write a value to standard output; exit code 1 on a miss; counts neither as a hit nor as a use",
        f"{PROG} get /var/cache/site img/logo.png -o logo.png",
    )
    add_cache(parser)
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead")
    add_literal(parser)


def add_set(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_set,
        "store a value",
        f"{PROG} set /var/cache/site greeting hello --expire 3600 --tag texts\n"
        f"  {PROG} set /var/cache/site img/logo.png -f logo.png\n"
        f"  date | {PROG} set /var/cache/site now -",
    )
    add_cache(parser)
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("value", metavar="VALUE", nargs="?", help="stored as a string; - for standard input")
    parser.add_argument("-f", "--file", metavar="FILE", help="store the content of a file, as bytes")
    add_storing(parser)
    parser.add_argument(
        "--length",
        type=parse_size,
        metavar="SIZE",
        help="what standard input brings; without it an eighth of the limit is the most",
    )
    parser.add_argument("--tag", help="group that `evict` removes at once")
    add_literal(parser)


def add_delete(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_delete,
        "remove entries; exit code 1 if one was not there",
        f"{PROG} delete /var/cache/site greeting img/logo.png",
    )
    add_cache(parser)
    parser.add_argument("key", metavar="KEY", nargs="+")
    add_literal(parser)


def add_ls(commands: Commands) -> None:
    parser = add_command(
        commands, run_ls, "list the entries", f"{PROG} ls /var/cache/site --prefix img/ --long"
    )
    add_cache(parser)
    parser.add_argument("--prefix", help="only string keys that begin so")
    parser.add_argument("--tag", help="only entries with this tag")
    parser.add_argument("-l", "--long", action="store_true", help="with size, times and tag")
    add_json(parser)


def add_stats(commands: Commands) -> None:
    parser = add_command(
        commands, run_stats, "show counters, sizes and the backend", f"{PROG} stats /var/cache/site --json"
    )
    add_cache(parser)
    add_json(parser)


def add_check(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_check,
        "verify every byte of the cache; exit code 1 if problems remain",
        f"{PROG} check /var/cache/site --fix",
    )
    add_cache(parser)
    parser.add_argument("--fix", action="store_true", help="repair: drop what is damaged, restore order")
    parser.add_argument(
        "--drop-unreadable",
        action="store_true",
        help="with --fix: give up what the disk cannot read any more, and nothing else; also where the cache "
        "cannot be opened for that",
    )
    add_json(parser)


def add_removals(commands: Commands) -> None:
    evict = add_command(
        commands, run_evict, "remove all entries with a tag", f"{PROG} evict /var/cache/site img"
    )
    add_cache(evict)
    evict.add_argument("tag", metavar="TAG")
    add_cache(add_command(commands, run_expire, "remove what has expired", f"{PROG} expire /var/cache/site"))
    clear = add_command(commands, run_clear, "remove all entries", f"{PROG} clear /var/cache/site --yes")
    add_cache(clear)
    clear.add_argument("-y", "--yes", action="store_true", help="do not ask")


def reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the number
    return str(error) or type(error).__name__


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, CacheError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason(error)}"
    return reason(error)


def close_stdout() -> None:
    """Point standard output at nothing, so that Python's own flush at the end stays quiet."""
    with contextlib.suppress(OSError, ValueError):
        nothing = descriptor_of(os.open, os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        close_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (CacheError, OSError) as error:
        presenter().note(f"error: {describe(error)}")
        return FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, a wrong call
        return stop.code if isinstance(stop.code, int) else OK
    return run(args)
