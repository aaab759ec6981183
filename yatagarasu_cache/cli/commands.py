"""The commands, their arguments, and what becomes of their errors."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from .._version import __version__
from ..cache import DiskCache
from ..concurrency.interruption import descriptor_of
from ..config import BACKENDS, Settings
from ..entry import Entry
from ..errors import CacheError, ReadOnlyError
from ..log import log
from ..mending import repair
from ..stats import CacheStats
from ..store.check import Problem
from ..store.format import EVICTIONS, INDEX_NAME
from .export import run_export
from .importing import run_import_diskcache
from .opening import (
    FAILED,
    INTERRUPTED,
    NO,
    OK,
    PIPE_CLOSED,
    CommandError,
    open_read_only,
    open_to_change,
    open_to_fill,
    open_to_read,
    require_cache,
)
from .processes import Process, processes_of
from .show import (
    PROG,
    describe,
    human_size,
    human_time,
    json_value,
    key_text,
    parse_port,
    parse_seconds,
    parse_size,
    presenter,
    print_json,
    printable,
)
from .top import run_top
from .warm import run_warm
from .watching import processes_text

COPY_BUFFER = 1 << 18


def parse_key(args: argparse.Namespace, text: str) -> Any:
    if not args.literal:
        return text
    try:
        return ast.literal_eval(text)
    except _NO_LITERAL:
        raise CommandError(
            f"not a Python literal: {text!r} (--literal needs one: 42, b'x', ('a', 1))"
        ) from None


_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def note_miss(args: argparse.Namespace, cache: DiskCache, text: str) -> None:
    """Say that a key is not there, and which one is that may have been meant: the type is part of a key."""
    presenter().note(f"not in the cache: {text}{hint(cache, text, literal=args.literal)}")


def hint(cache: DiskCache, text: str, *, literal: bool) -> str:
    """What to add to "not in the cache". Looking counts neither as a hit nor as a miss."""
    if literal:
        found = is_there(cache, text)
        return f" (there is an entry of the text {text}: leave out --literal)" if found else ""
    try:
        with warnings.catch_warnings():  # of escapes in what was never meant to be Python
            warnings.simplefilter("ignore")
            meant = ast.literal_eval(text)
    except _NO_LITERAL:
        meant = text
    if not isinstance(meant, str) and is_there(cache, meant):
        return f" (there is an entry of the {type(meant).__name__} {meant!r}: add --literal)"
    if is_there(cache, text.encode("utf-8", "surrogateescape")):
        shown = repr(text.encode("utf-8", "surrogateescape"))
        advice = "give these, in quotes for the shell, and --literal"
        return f" (there is an entry of the bytes {shown}: {advice})"
    return ""


def is_there(cache: DiskCache, key: Any) -> bool:
    try:
        return key in cache
    except (CacheError, TypeError, ValueError):  # nothing that can be a key
        return False


# -- get, set, delete --------------------------------------------------------------------------


def run_get(args: argparse.Namespace) -> int:
    key = parse_key(args, args.key)
    with open_to_read(args) as cache:
        try:
            source = value_stream(cache, key)
        except KeyError:
            note_miss(args, cache, args.key)
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
        text = json.dumps(value, ensure_ascii=False, default=json_value)
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
    keys = [(text, parse_key(args, text)) for text in args.key]
    code = OK
    with open_to_change(args) as cache:
        for text, key in keys:
            if not cache.delete(key):
                note_miss(args, cache, text)
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
        print(separator + json.dumps(entry_dict(entry), default=json_value))
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
    users = processes_of(args.cache)
    if args.json:
        found = None if users is None else [user._asdict() for user in users]
        print_json({"directory": os.path.abspath(args.cache), "processes": found, **stats.as_dict()})
    else:
        presenter().table(("", ""), stats_rows(args.cache, stats, users))
    return OK


def stats_rows(
    directory: str, stats: CacheStats, users: list[Process] | None
) -> list[tuple[str, str]]:
    ratio = f"{stats.hit_ratio:.1%}" if stats.hits or stats.misses else "no gets yet"
    index = human_size(stats.index_bytes)
    return [
        ("cache", printable(directory)),
        ("backend", f"{stats.backend} ({stats.backend_reason})"),
        ("core", f"{stats.core} ({stats.core_reason})"),
        ("entries", str(stats.entries)),
        ("live", human_size(stats.live_bytes)),
        ("on disk", f"{human_size(stats.disk_bytes)} ({stats.segments} segments, index {index})"),
        ("limit", human_size(stats.size_limit)),
        ("eviction", stats.eviction),
        ("used by", processes_text(users)),
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
    with cache, presenter().counting("entries") as progress:
        return cache.check(fix=args.fix, progress=progress)


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
    add_import_diskcache(commands)
    add_get(commands)
    add_set(commands)
    add_delete(commands)
    add_ls(commands)
    add_stats(commands)
    add_top(commands)
    add_export(commands)
    add_check(commands)
    add_removals(commands)
    return parser


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[CommandParser]


def add_command(
    commands: Commands, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> Parser:
    """A sub-command named like its function, with the options that all of them take."""
    name = run.__name__.removeprefix("run_").replace("_", "-")
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example:\n  {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=Settings.backend,
        help=f"how files are read and written (default: {Settings.backend})",
    )
    return parser


def add_cache(parser: Parser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="directory of the cache")


def add_caches(parser: Parser) -> None:
    parser.add_argument("caches", metavar="CACHE", nargs="+", help="directory of a cache")


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
    add_limits(parser)


def add_limits(parser: Parser) -> None:
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


def add_import_diskcache(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_import_diskcache,
        "take over what diskcache has stored: keys, values, tags and expiry; what is in the cache already "
        "stays, so an import that was interrupted goes on when it is begun again; exit code 1 if something "
        "was left out or evicted, or a shard could not be read",
        f"{PROG} import-diskcache /var/cache/old /var/cache/new",
    )
    parser.add_argument("source", metavar="SOURCE", help="directory of diskcache's Cache or FanoutCache")
    add_cache(parser)
    parser.add_argument(
        "--allow-pickle", action="store_true",
        help="unpickle what is more than plain values: that runs code of whoever could write to SOURCE",
    )  # fmt: skip
    parser.add_argument("--json-disk", action="store_true", help="SOURCE was written by a JSONDisk")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the cache already")
    add_json(parser)
    add_limits(parser)


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


def add_top(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_top,
        "show what caches are doing now, without touching them: rates, what is in them, who uses them; "
        "q ends it",
        f"{PROG} top /var/cache/site /var/cache/thumbnails\n"
        f"  {PROG} top /var/cache/site --once --json",
    )
    add_caches(parser)
    parser.add_argument(
        "--interval",
        type=parse_seconds,
        default=1.0,
        metavar="SECONDS",
        help="time between two looks (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="print one state, and end")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line; with --once, one")


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        run_export,
        "serve the figures of caches to Prometheus over HTTP, without touching them, until it is ended",
        f"{PROG} export /var/cache/site --port 9123 --name site",
    )
    add_caches(parser)
    parser.add_argument("--port", type=parse_port, required=True, help="to listen on; 0 for any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="label of a cache instead of its directory; once for each, in their order",
    )


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


def close_stdout() -> None:
    """Point standard output at nothing, so that Python's own flush at the end stays quiet."""
    with contextlib.suppress(OSError, ValueError):
        nothing = descriptor_of(os.open, os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


class NotingHandler(logging.Handler):
    """Warnings of the package go where notes of the commands go: a library prints nothing by itself."""

    def emit(self, record: logging.LogRecord) -> None:
        presenter().note(record.getMessage())


@contextlib.contextmanager
def showing_warnings() -> Iterator[None]:
    """Unless whoever calls `main` has an ear for them already."""
    handler = NotingHandler(logging.WARNING)
    if logging.getLogger().handlers:
        yield
        return
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def run(args: argparse.Namespace) -> int:
    with showing_warnings():
        return exit_code(args)


def exit_code(args: argparse.Namespace) -> int:
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
        try:
            sys.stdout.flush()
        except OSError:  # what was printed cannot be had at the end either
            close_stdout()
        return FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, a wrong call
        return stop.code if isinstance(stop.code, int) else OK
    return run(args)
