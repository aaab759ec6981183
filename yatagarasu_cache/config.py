"""The settings of a cache: what there is, what is allowed, and where settings come from.

`make_settings` is the one place that validates; `from_mapping` and `load` bring configuration
files (YAML, TOML, JSON) into its form. Whatever is wrong raises `ConfigurationError`, and the
message names the setting, the value it got and what is allowed.

Sizes are in bytes and durations in seconds, except `max_disk_cache_size_mb` in configuration
files, which counts MiB (2**20 bytes).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from .concurrency.interruption import ours
from .errors import ConfigurationError
from .log import log as _log
from .store.format import EVICTIONS

__all__ = [
    "BACKEND_VARIABLE",
    "MAX_HEADROOM",
    "MAX_QUEUE_DEPTH",
    "MAX_SEGMENT_SIZE",
    "MAX_SIZE_LIMIT",
    "MIN_HEADROOM",
    "MIN_SEGMENT_SIZE",
    "MIN_SIZE_LIMIT",
    "RingSettings",
    "Settings",
    "from_mapping",
    "is_enabled",
    "load",
    "make_settings",
    "moved",
    "reopening",
    "take_reopening",
    "to_arguments",
    "to_options",
]

BACKEND_VARIABLE = "YATAGARASU_BACKEND"
MIN_SIZE_LIMIT = 2**18
MAX_SIZE_LIMIT = 2**63 - 1  # what a file offset can express
MIN_SEGMENT_SIZE = 2**12
MAX_SEGMENT_SIZE = 2**30
MIN_HEADROOM, MAX_HEADROOM = 0.02, 0.9
MAX_QUEUE_DEPTH = 4096
DEFAULT_DIRECTORY = "/var/cache/yatagarasu"

_MAX_COUNT = 2**31 - 1
_MAX_FILES = 2**20
_ALL_BITS = 0o777
_SETGID = 0o2000
_MAX_CPU = 8191  # the largest NR_CPUS that Linux can be built with, less one
BACKENDS = ("auto", "uring", "threads")
_DURABILITIES = ("none", "sync")
_SERIALIZERS = ("msgpack", "pickle")
_ON_UNREADABLE = ("error", "miss")
_COMPRESSIONS = {"zstd": 22, "lz4": 12}  # and the highest level of each
_MIB = 2**20

# Kept by the cache itself, and the same for all who use it (see store/cache_settings.py).
_OF_THE_CACHE = frozenset({"size_limit", "eviction", "headroom"})
_reopening: ContextVar[bool] = ContextVar("yatagarasu_reopening", default=False)

# What other caches call a setting, where that is nearer to the name of another one of ours.
_ELSEWHERE = {
    **dict.fromkeys(("max_size", "maxsize", "max_bytes", "capacity", "limit", "size"), "size_limit"),
    "disk_min_file_size": "large_value_size",
    "policy": "eviction",
    "ttl": "default_expire",
}


@dataclass(frozen=True)
class RingSettings:
    """How the io_uring backend works (`cache.disk.io_uring`); unused by the portable backend.

    Not validated on its own: `make_settings` checks it when it gets it.
    """

    enabled: bool | Literal["auto"] = "auto"
    """True: io_uring or an error. False: portable backend. "auto": io_uring where it runs."""
    queue_depth: int = 128
    """Operations that a ring begins together; up to twice as many are under way at once."""
    use_registered_buffers: bool = True
    """Register the buffer pool with the kernel (counts against RLIMIT_MEMLOCK)."""
    use_fixed_files: bool = False
    """Register segment descriptors with the ring."""
    direct: bool | Literal["auto"] = "auto"
    """O_DIRECT for large cold reads."""
    sqpoll: bool = False
    """A kernel thread polls the submission queue; it occupies a CPU while busy."""
    cpu_affinity: tuple[int, ...] | None = None
    """CPU numbers for the kernel's io workers, ascending; None leaves them to the scheduler."""
    max_workers: int | None = None
    """Bound on the kernel's io workers; None leaves the kernel's own bound."""


@dataclass(frozen=True)
class Settings:
    """Everything that a cache can be told, validated. Build it with `make_settings` or `load`.

    The constructor itself checks nothing. `size_limit`, `eviction` and `headroom` belong to the
    cache: who does not name them takes what it has.
    """

    directory: str
    """Absolute path of the cache directory."""
    size_limit: int = 10 * 2**30
    """Bytes that the cache may occupy on disk."""
    eviction: str = "lru"
    """"lru", "fifo", "lfu", or "none": a full cache raises `StorageFull`."""
    backend: str = "auto"
    """"auto", "uring" or "threads"."""
    durability: str = "none"
    """"none": the system writes when it likes; "sync": a completed change survives a power cut."""
    serializer: object = "msgpack"
    """"msgpack", "pickle", or an object with `name`, `dumps` and `loads`."""
    on_unreadable: str = "error"
    """Of a stored value that the serializer can't read: "error" raises `SerializationError`; "miss": it is as
    if it were not there. Counted in either case."""
    compression: str | None = None
    """"zstd" or "lz4": values are stored compressed where that saves room. None: as they are."""
    compression_level: int | None = None
    """1 to 22 (zstd), 1 to 12 (lz4). None: chosen by the library."""
    compression_min_size: int = 1024
    """Bytes from which on it is tried to compress a value."""
    max_value_size: int | None = None
    """Bytes; a larger value raises `ValueTooLarge`. None: what `size_limit` gives room for."""
    max_stream_size: int | None = None
    """Bytes of a stream whose length is not known before; a longer one raises `ValueTooLarge`. None: an
    eighth of `size_limit`."""
    default_expire: float | None = None
    """Seconds that an entry lives if `set` names no time. None: for ever."""
    read_only: bool = False
    """Refuse every change with `ReadOnlyError`."""
    segment_size: int | None = None
    """Nominal bytes of a log segment. None: scaled to `size_limit`."""
    large_value_size: int | None = None
    """Bytes from which a value gets a file of its own. None: chosen by the store."""
    headroom: float = 0.15
    """Fraction of `size_limit` that eviction keeps free of live entries."""
    max_open_files: int = 256
    """Segment descriptors kept open."""
    max_in_flight: int = 1024
    """asyncio operations under way before callers wait."""
    lock_timeout: float | None = 60.0
    """Seconds to wait for a lock that another process holds, which may be stopped. None: for ever."""
    workers: int | None = None
    """Threads of the portable backend. None: chosen by the backend."""
    allow_network_fs: bool = False
    """Open caches on network file systems, where locks and mappings are unsafe."""
    directory_mode: int = 0o700
    """Permission bits of directories that the cache creates, whatever the umask is; 0o2000 may be in them."""
    file_mode: int = 0o600
    """Permission bits of files that the cache creates, whatever the umask is."""
    io_uring: RingSettings = field(default_factory=RingSettings)
    """See `RingSettings`."""
    _named: ClassVar[frozenset[str]] = frozenset()  # no field: it is not compared, and not a setting

    @property
    def named(self) -> frozenset[str]:
        """The settings that the caller named; the others have their defaults."""
        return self._named


# -- errors ---------------------------------------------------------------------------------


def _show(value: object) -> str:
    """A short repr that never raises, whatever `value` is."""
    try:
        return reprlib.repr(value)
    except Exception:  # a foreign __repr__, or an integer too long to print
        return f"<{type(value).__name__}>"


def _bad(name: str, value: object, allowed: str) -> ConfigurationError:
    return ConfigurationError(f"{name} is {_show(value)} ({type(value).__name__}); it must be {allowed}")


def _close_to(name: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The name in `known` that `name` is most likely a slip for (`likeness` is difflib's ratio)."""
    if not isinstance(name, str):
        return None
    import difflib  # as what reads files: not for who makes no mistake

    found = difflib.get_close_matches(name[:64].lower(), list(known), n=1, cutoff=likeness)
    return found[0] if found else None


def _unknown(prefix: str, name: object, known: Iterable[str]) -> ConfigurationError:
    names = sorted(known)
    shown = name[:64] if isinstance(name, str) else _show(name)
    close = _ELSEWHERE.get(name.lower()) if isinstance(name, str) else None
    if close not in names:
        close = _close_to(name, names)
    remedy = f"did you mean {prefix}{close}?" if close else f"known: {', '.join(names)}"
    return ConfigurationError(f"{prefix}{shown} is not a known setting; {remedy}")


# -- one check a kind of value: (name for messages, value) -> normalised value ----------------

_Check = Callable[[str, object], Any]


def _whole(value: object, low: int, high: int) -> int | None:
    """`value` if it is an int (a bool is not one) from `low` to `high`, else None."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    return None


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _bad(name, value, "true or false (without quotes)")


def _flag_or_auto(name: str, value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "auto":
        return "auto"
    raise _bad(name, value, 'true, false (without quotes) or "auto"')


def _integer(low: int, high: int, unit: str, why: str = "") -> _Check:
    allowed = f"a whole number from {low} to {high} ({unit}){why}"

    def check(name: str, value: object) -> int:
        number = _whole(value, low, high)
        if number is None:
            raise _bad(name, value, allowed)
        return number

    return check


def _choice(allowed: Sequence[str]) -> _Check:
    def check(name: str, value: object) -> str:
        if isinstance(value, str) and value in allowed:
            return allowed[allowed.index(value)]
        close = _close_to(value, allowed)
        hint = f' (did you mean "{close}"?)' if close else ""
        raise _bad(name, value, "one of " + ", ".join(f'"{one}"' for one in allowed) + hint)

    return check


def _backend(name: str, value: object) -> str:
    return "auto" if value is None else str(_choice(BACKENDS)(name, value))


def _optional(check: _Check) -> _Check:
    """`check`, with None allowed; its message says so."""

    def either(name: str, value: object) -> Any:
        if value is None:
            return None
        try:
            return check(name, value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}, or None") from None

    return either


def _as_float(value: object) -> float:
    """`value` as a finite float, else NaN (which no range holds)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _seconds(name: str, value: object) -> float:
    number = _as_float(value)
    if number > 0:
        return number
    raise _bad(name, value, "a finite number of seconds greater than 0")


def _fraction(low: float, high: float) -> _Check:
    def check(name: str, value: object) -> float:
        number = _as_float(value)
        if low <= number <= high:
            return number
        raise _bad(name, value, f"a number from {low} to {high} (fraction of size_limit)")

    return check


def _mode(needed: int, special: int = 0) -> _Check:
    """Permission bits: an integer, or its octal digits as a string (YAML reads 0o600 as one).

    `special`: of the bits above these, the one that is allowed.
    """
    every = _ALL_BITS | special
    beside = f", with 0o{special:o} or without" if special else ""
    allowed = (
        f"permission bits from 0o{needed:o} to 0o777 that include 0o{needed:o}{beside}, "
        f'written as 0o{needed:o} or as the string "0o{needed:o}" (octal)'
    )

    def check(name: str, value: object) -> int:
        octal = isinstance(value, str) and re.fullmatch(r"(0o)?[0-7]{3,4}", value, re.ASCII)
        bits = _whole(int(octal[0], 8) if octal else value, needed, every)
        if bits is None or bits & needed != needed or bits & ~every:
            raise _bad(name, value, allowed)
        return bits

    return check


def _cpus(name: str, value: object) -> tuple[int, ...]:
    numbers: Sequence[object] = [value]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        numbers = list(itertools.islice(value, _MAX_CPU + 2))
    cpus = {_whole(number, 0, _MAX_CPU) for number in numbers}
    known = sorted(cpu for cpu in cpus if cpu is not None)
    if not known or len(known) != len(numbers):
        raise _bad(name, value, f"a CPU number from 0 to {_MAX_CPU} or a list of different ones")
    return tuple(known)


def _serializer(name: str, value: object) -> object:
    if isinstance(value, str):
        return _choice(_SERIALIZERS)(name, value)
    label = getattr(value, "name", None)
    named = isinstance(label, str) and label != ""
    callables = all(callable(getattr(value, one, None)) for one in ("dumps", "loads"))
    if named and callables and not isinstance(value, type):
        return value
    raise _bad(
        name,
        value,
        '"msgpack", "pickle", or an instance with a name (non-empty str) and the methods dumps and loads',
    )


def _ring(name: str, value: object) -> RingSettings:
    if isinstance(value, RingSettings):
        value = {one.name: getattr(value, one.name) for one in fields(RingSettings)}
    if not isinstance(value, Mapping):
        raise _bad(name, value, "a RingSettings or a mapping of its fields")
    return RingSettings(**_checked(value, _RING_CHECKS, name + "."))


def _directory(name: str, value: object) -> str:
    """`value` (str or PathLike of str) as an absolute path, with a leading ~ expanded."""
    path = _path_text(name, value)
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise _bad(name, path, "a path whose ~ leads to a known home directory (or ./~...)")
    try:
        return os.path.abspath(expanded)
    except ours(OSError) as error:  # the working directory is gone
        raise ConfigurationError(
            f"{name} is the relative path {_show(path)}, and the working directory cannot be "
            f"found ({error.strerror}); give an absolute path"
        ) from error


def _path_text(name: str, value: object) -> str:
    """The path in `value`, if a file system could hold it."""
    allowed = "a path: a str or os.PathLike that is not blank and holds no NUL character"
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        raise _bad(name, value, allowed) from None
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise _bad(name, value, allowed)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise _bad(name, value, "a path that the file system's encoding can express") from None
    return path


_RING_CHECKS: dict[str, _Check] = {
    "enabled": _flag_or_auto,
    "queue_depth": _integer(1, MAX_QUEUE_DEPTH, "entries", "; the kernel's own limit is 32768"),
    "use_registered_buffers": _flag,
    "use_fixed_files": _flag,
    "direct": _flag_or_auto,
    "sqpoll": _flag,
    "cpu_affinity": _optional(_cpus),
    "max_workers": _optional(_integer(1, 65535, "kernel threads")),
}

_CHECKS: dict[str, _Check] = {
    "directory": _directory,
    "size_limit": _integer(MIN_SIZE_LIMIT, MAX_SIZE_LIMIT, "bytes"),
    "eviction": _choice(EVICTIONS),
    "backend": _backend,
    "durability": _choice(_DURABILITIES),
    "serializer": _serializer,
    "on_unreadable": _choice(_ON_UNREADABLE),
    "compression": _optional(_choice(tuple(_COMPRESSIONS))),
    "compression_level": _optional(_integer(1, max(_COMPRESSIONS.values()), "level")),
    "compression_min_size": _integer(0, MAX_SIZE_LIMIT, "bytes"),
    "max_value_size": _optional(_integer(1, MAX_SIZE_LIMIT, "bytes")),
    "max_stream_size": _optional(_integer(1, MAX_SIZE_LIMIT, "bytes")),
    "default_expire": _optional(_seconds),
    "read_only": _flag,
    "segment_size": _optional(_integer(MIN_SEGMENT_SIZE, MAX_SEGMENT_SIZE, "bytes")),
    "large_value_size": _optional(_integer(1, MAX_SIZE_LIMIT, "bytes")),
    "headroom": _fraction(MIN_HEADROOM, MAX_HEADROOM),
    "max_open_files": _integer(8, _MAX_FILES, "descriptors"),
    "max_in_flight": _integer(1, _MAX_COUNT, "operations"),
    "lock_timeout": _optional(_seconds),
    "workers": _optional(_integer(1, 256, "threads")),
    "allow_network_fs": _flag,
    "directory_mode": _mode(0o700, _SETGID),
    "file_mode": _mode(0o600),
    "io_uring": _ring,
}


def _checked(options: Mapping[Any, object], checks: Mapping[str, _Check], prefix: str) -> dict[str, Any]:
    """Every option normalised; an unknown name or a bad value raises, named with `prefix`."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        check = checks.get(name) if isinstance(name, str) else None
        if check is None:
            raise _unknown(prefix, name, checks)
        values[name] = check(prefix + name, value)
    return values


# -- rules that join several settings ---------------------------------------------------------


def _check_sizes(settings: Settings, prefix: str) -> None:
    """For a limit that was named; where the cache has another, segments are as large as it allows."""
    limit = settings.size_limit
    for name in ("max_value_size", "max_stream_size"):
        largest = getattr(settings, name)
        if largest is not None and largest > limit:
            allowed = f"at most size_limit ({limit} bytes); lower it or raise size_limit"
            raise _bad(prefix + name, largest, allowed)
    segment = settings.segment_size
    if segment is not None and segment > limit // 4:
        allowed = (
            f"at most a quarter of size_limit ({limit // 4} of {limit} bytes), so that eviction "
            "can free one; lower it or raise size_limit"
        )
        raise _bad(prefix + "segment_size", segment, allowed)


def _check_level(settings: Settings, prefix: str) -> None:
    level, name = settings.compression_level, settings.compression
    if level is None:
        return
    if name is None:
        raise _bad(prefix + "compression_level", level, 'None without compression: name it ("zstd" or "lz4")')
    if level > _COMPRESSIONS[name]:
        raise _bad(prefix + "compression_level", level, f"at most {_COMPRESSIONS[name]} with {name}")


def _environment_backend() -> str:
    """What YATAGARASU_BACKEND says; "auto" if it is unset or blank."""
    text = os.environ.get(BACKEND_VARIABLE, "").strip().lower()
    check = _choice(BACKENDS)
    return str(check(f"the environment variable {BACKEND_VARIABLE}", text)) if text else "auto"


def _decide_backend(backend: str | None, enabled: bool | str, prefix: str) -> str:
    """An explicit backend, else what io_uring.enabled says, else the environment variable."""
    named = None if backend == "auto" else backend
    if isinstance(enabled, str):
        return named or _environment_backend()
    wanted = "uring" if enabled else "threads"
    if named is not None and named != wanted:
        shown = str(enabled).lower()
        raise ConfigurationError(
            f'{prefix}backend is "{named}" but {prefix}io_uring.enabled is {shown}, which means '
            f'"{wanted}"; leave one of the two out, or make io_uring.enabled "auto"'
        )
    return wanted


def _build(options: Mapping[Any, object], prefix: str = "") -> Settings:
    """Validated settings; `prefix` (such as "cache.disk.") goes before names in messages."""
    values = _checked(options, _CHECKS, prefix)
    named = frozenset(values) - _OF_THE_CACHE if _reopening.get() else frozenset(values)
    ring = values.get("io_uring", RingSettings())
    values["backend"] = _decide_backend(values.get("backend"), ring.enabled, prefix)
    settings = Settings(**values)
    object.__setattr__(settings, "_named", named)
    _check_level(settings, prefix)
    if "size_limit" in values:
        _check_sizes(settings, prefix)
    return settings


@contextlib.contextmanager
def reopening() -> Iterator[None]:
    """Settings made within it change no cache, whatever they name: what they say is for a new one."""
    token = _reopening.set(True)
    try:
        yield
    finally:
        _reopening.reset(token)


def take_reopening() -> bool:
    """Whether this is within `reopening`. Others that are made there, by a subclass, are ordinary."""
    reopens = _reopening.get()
    _reopening.set(False)
    return reopens


def make_settings(directory: str | os.PathLike[str], **options: Any) -> Settings:
    """Validated `Settings` for the cache in `directory`; options are the fields of `Settings`.

    `directory` may be relative or begin with ``~``; the result is absolute. `io_uring` may be a
    `RingSettings` or a mapping of its fields. `backend` is settled here: a named one counts; if
    it is "auto" (or None), a true or false `io_uring.enabled` decides, and if that is "auto" too,
    the environment variable ``YATAGARASU_BACKEND``.

    Raises `ConfigurationError` for an unknown option, a value of the wrong type or out of range,
    and for options that contradict each other; the message names the option and the remedy.
    """
    return _build({"directory": directory, **options})


def moved(settings: Settings, directory: str) -> Settings:
    """The same settings, those that were named and those that were not, for another directory."""
    copy = replace(settings, directory=directory)
    object.__setattr__(copy, "_named", settings.named)
    return copy


def to_options(settings: Settings) -> dict[str, Any]:
    """A dict with which ``make_settings(**options)`` builds equal settings again.

    It holds what was named, or is not the default. These are plain values (a `serializer` object is
    passed on as it is), so it can be pickled and sent to another process. A backend still left at
    "auto" is decided anew there.
    """
    default = Settings(settings.directory)
    options = {
        name: value
        for name in _CHECKS
        if (value := getattr(settings, name)) != getattr(default, name)
        or name in settings.named
        or name == "directory"
    }
    if "io_uring" in options:
        ring = settings.io_uring
        options["io_uring"] = {one.name: getattr(ring, one.name) for one in fields(RingSettings)}
    return options


def to_arguments(settings: Settings) -> tuple[str, dict[str, Any]]:
    """The same as (directory, options), as a cache is made with them."""
    options = to_options(settings)
    return options.pop("directory"), options


# -- configuration files ----------------------------------------------------------------------


def _section(value: object, name: str) -> Mapping[Any, object]:
    """`value` as a mapping; an empty section (None, as YAML reads it) is an empty mapping."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    raise _bad(name, value, "a section (a mapping of settings)")


def _cache_section(mapping: object) -> tuple[Mapping[Any, object], str]:
    """The cache's section and the prefix of names in it, with or without the outer key."""
    outer = _section(mapping, "the configuration")
    if "cache" in outer:
        return _section(outer["cache"], "cache"), "cache."
    if "disk" in outer:
        return outer, ""
    names = ", ".join(str(name)[:64] if isinstance(name, str) else _show(name) for name in outer)
    raise ConfigurationError(
        f"the configuration has neither a cache section nor a disk section (it has: "
        f"{names or 'nothing'}); put the settings under cache: disk:"
    )


def _switched_off(cache: Mapping[Any, object], prefix: str) -> str | None:
    """The name of the setting that switches the cache off, if one does."""
    disk = _section(cache.get("disk"), prefix + "disk")
    for section, name in ((cache, prefix + "enabled"), (disk, prefix + "disk.enabled")):
        if not _flag(name, section.get("enabled", True)):
            return name
    return None


def is_enabled(mapping: Mapping[str, Any]) -> bool:
    """Whether `mapping` leaves the disk cache on: both `enabled` settings are true or absent.

    Raises `ConfigurationError` if there is no cache section or an `enabled` is not a bool;
    other settings are not looked at.
    """
    return _switched_off(*_cache_section(mapping)) is None


def _ignore_others(cache: Mapping[Any, object], prefix: str) -> None:
    """Log the sections of other caches; refuse what may be a slip for a setting of this one."""
    known = ("enabled", "disk")
    others = [name for name in cache if name not in known]
    for name in others:
        section = cache[name] is None or isinstance(cache[name], Mapping)
        slip = _close_to(name, known, 0.75)  # "dsik" is one, "redis" is not
        if not isinstance(name, str) or not section or slip:
            raise _unknown(prefix, name, known)
    if others:
        names = ", ".join(prefix + name for name in others)
        _log.info("configuration sections that the disk cache does not use: %s", names)


def _rename(options: dict[Any, object], alias: str, name: str, prefix: str) -> None:
    """Move the setting `alias` of the file format to `name`; both at once are an error."""
    if alias not in options:
        return
    if name in options:
        raise ConfigurationError(
            f"{prefix}{alias} and {prefix}{name} are two names of one setting; leave one out"
        )
    options[name] = options.pop(alias)


def _disk_options(disk: Mapping[Any, object], prefix: str) -> dict[Any, object]:
    """The disk section in the terms of `make_settings`; unknown names are refused."""
    known = {*_CHECKS, "enabled", "cache_dir", "max_disk_cache_size_mb"}
    for name in disk:
        if name not in known:
            raise _unknown(prefix, name, known)
    options = {name: value for name, value in disk.items() if name != "enabled"}
    megabytes = options.get("max_disk_cache_size_mb")
    if "max_disk_cache_size_mb" in options:
        check = _integer(1, MAX_SIZE_LIMIT // _MIB, "MiB")
        options["max_disk_cache_size_mb"] = check(prefix + "max_disk_cache_size_mb", megabytes) * _MIB
    if "cache_dir" in options:
        options["cache_dir"] = _directory(prefix + "cache_dir", options["cache_dir"])
    _rename(options, "max_disk_cache_size_mb", "size_limit", prefix)
    _rename(options, "cache_dir", "directory", prefix)
    if "io_uring" in options:
        options["io_uring"] = _section(options["io_uring"], prefix + "io_uring")
    return options


def from_mapping(mapping: Mapping[str, Any]) -> Settings:
    """`Settings` from a parsed configuration file, with or without the outer `cache` key::

        cache:
          enabled: true
          disk:
            enabled: true
            cache_dir: /var/cache/yatagarasu   # the default
            max_disk_cache_size_mb: 10240      # MiB, the default of a new cache
            io_uring: {enabled: auto, queue_depth: 128}

    Under `disk` every field of `Settings` is allowed by its own name too. Sections beside `disk`
    belong to other caches: they are ignored, with one log line.

    Raises `ConfigurationError` with the full dotted name of what is unknown, wrong or
    contradictory, and also if the cache is switched off (ask `is_enabled` first).
    """
    cache, prefix = _cache_section(mapping)
    off = _switched_off(cache, prefix)
    if off is not None:
        raise ConfigurationError(
            f"the cache is switched off in the configuration ({off} is false); "
            "set it to true, or ask is_enabled() before opening the cache"
        )
    _ignore_others(cache, prefix)
    below = prefix + "disk."
    options = _disk_options(_section(cache.get("disk"), prefix + "disk"), below)
    options.setdefault("directory", DEFAULT_DIRECTORY)
    return _build(options, below)


def load(path: str | os.PathLike[str]) -> Settings:
    """`Settings` from the file at `path`: YAML (.yaml, .yml), TOML (.toml) or JSON (.json).

    The file is UTF-8 text in the form that `from_mapping` describes. YAML needs PyYAML (extra
    `yaml`); TOML needs Python 3.11 or tomli (extra `toml`).

    Raises `ConfigurationError`, naming the path (and the line, if known), when the file is
    missing or cannot be parsed, when its suffix or a needed package is unknown, and for
    everything that `from_mapping` refuses.
    """
    name = _path_text("the configuration file", path)
    suffix = os.path.splitext(name)[1].lower()
    parse = _PARSERS.get(suffix)
    if parse is None:
        known = ", ".join(_PARSERS)
        raise ConfigurationError(f"{name}: the suffix {suffix!r} names no known format; use one of {known}")
    try:
        return from_mapping(parse(_read_text(name)))
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from error


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except ours(OSError) as error:
        raise ConfigurationError(f"cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise ConfigurationError(f"not UTF-8 text ({place}); save it as UTF-8") from error


def _parse_json(text: str) -> Any:
    import json

    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"not valid JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"{twice[:64]} is given twice in one section; leave one out")
    return result


def _parse_toml(text: str) -> Any:
    parser = _toml_module()
    try:
        return parser.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError names line and column
        raise ConfigurationError(f"not valid TOML: {error}") from error


def _toml_module() -> Any:
    try:
        return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise ConfigurationError(
            "reading TOML on Python 3.10 needs the package tomli: "
            'pip install "yatagarasu_cache[toml]" (or use JSON or YAML)'
        ) from None


def _parse_yaml(text: str) -> Any:
    yaml = _yaml_module()
    try:
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except ConfigurationError:
        raise
    except Exception as error:  # PyYAML lets AttributeError, KeyError and others through
        raise ConfigurationError(f"not valid YAML: {_yaml_problem(error)}") from error


def _yaml_module() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError:
        raise ConfigurationError(
            'reading YAML needs the package PyYAML: pip install "yatagarasu_cache[yaml]" '
            "(or use TOML or JSON)"
        ) from None


def _refuse_duplicates(root: Any) -> None:
    """Raise if a mapping of the composed document names a key twice (PyYAML keeps the last)."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in visited or not isinstance(node.value, list):
            continue
        visited.add(id(node))
        if node.id == "mapping":
            _refuse_duplicate_keys(node)
            pending += [child for _, child in node.value]
        else:
            pending += node.value


def _refuse_duplicate_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        if key.id != "scalar":
            continue
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigurationError(
                f"line {line}: {key.value[:64]} is given twice in one section; leave one out"
            )
        seen.add(key.value)


def _yaml_problem(error: Exception) -> str:
    """One line about a parse error, with line and column where PyYAML knows them."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + " ".join(problem.split())


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".toml": _parse_toml,
    ".json": _parse_json,
}
