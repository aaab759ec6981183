"""Shared by several test files: a clock that obeys, a look at a directory, backends that fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import DiskCache
from yatagarasu_cache.backends import Choice, choose
from yatagarasu_cache.backends.base import Backend, Buffer, Channel, ReadRequest, WriteRequest
from yatagarasu_cache.backends.directories import Trust
from yatagarasu_cache.config import Settings
from yatagarasu_cache.store import sharing

ROOT = Path(__file__).resolve().parent.parent
SECOND = 10**9
NOBODY = 65534
SEGMENT = 64 << 10
LARGE = SEGMENT // 4  # with such segments, a value of this size gets a file of its own
Make = Callable[..., DiskCache]  # the fixture `make`


class TooLong(BaseException):
    """Not an Exception: nothing may take it for a failure that it can go on after."""


@contextlib.contextmanager
def at_most(seconds: float, what: str = "this") -> Iterator[None]:
    """Whatever waits longer, be it for a lock of the kernel, is a failure."""

    def strike(*_: object) -> None:
        raise TooLong(f"{what} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A directory for many small ones, in memory where there is such a place, to spare the disk."""
    memory = "/dev/shm"
    parent = memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None
    path = tempfile.mkdtemp(prefix="yatagarasu-tests-", dir=parent)
    yield Path(path)
    shutil.rmtree(path)


def in_threads(number: int, work: Callable[[int], Any], patience: float = 60.0) -> None:
    """`work(0)`, `work(1)`, ... at once, each in a thread; the first exception is raised here."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(number)

    def guarded(which: int) -> None:
        try:
            barrier.wait()
            work(which)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def bounded(memory: int = 4 << 30, seconds: float = 20.0) -> Iterator[None]:
    """Whatever is in here ends in time, and does not ask for memory as a damaged length says.

    memory: beyond what the process has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + memory, hard))
    try:
        with at_most(seconds):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Clock:
    """`time.time_ns` under control: stands still until it is told to move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: int | None = None) -> None:
        self.now = start or time.time_ns()
        monkeypatch.setattr(time, "time_ns", self)
        for name, module in list(sys.modules.items()):  # where it was imported by name
            if name.startswith("yatagarasu_cache") and hasattr(module, "time_ns"):
                monkeypatch.setattr(module, "time_ns", self)

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        """Forward, or with a negative number back."""
        self.now += int(seconds * SECOND)


def tree(directory: Path | str) -> dict[str, tuple[Any, ...]]:
    """Everything below `directory`: kind, mode, size, times, and a digest of the content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(Path(directory).rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(directory))] = (
            status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, content, target,
        )  # fmt: skip
    return found


def disk_bytes(directory: Path | str) -> int:
    """The sizes of all files below `directory`; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                pass
    return total


def disk_blocks(directory: Path | str) -> int:
    """What the files below `directory` take of the disk."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def descriptors() -> int:
    """How many this process has open. Those of caches that nobody has any more are closed first: what other
    tests have left would otherwise go while this one counts."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def noise(length: int, seed: int = 0) -> bytes:
    """`length` bytes that don't repeat, the same for the same seed."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(length)


def environment(**more: str) -> dict[str, str]:
    """For a process that imports this very package, and modules of the tests."""
    folders = sorted(path.parent for path in (ROOT / "tests").glob("*/test_*.py"))
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests"), *map(str, dict.fromkeys(folders))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}  # a build under test is first


def run_python(code: str, *arguments: object, timeout: float = 100, **options: Any) -> str:
    """Standard output of `code` in a process of its own; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment(), **options,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_nobody(code: str, *arguments: object) -> str:
    """As a user who is not root: in a child that gives its rights up after its imports."""
    drop = f"if os.getuid() == 0: os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    head = "import errno, os, sys\nfrom yatagarasu_cache import *\nimport yatagarasu_cache.store.recovery\n"
    head += "import encodings.ascii, resource, yatagarasu_cache.backends.threads, yatagarasu_cache.store.room\n"
    head += "try: import yatagarasu_cache.backends.uring\nexcept (ImportError, BackendUnavailable): pass\n"
    return run_python(head + drop + code, *arguments)


def open_up(path: Path, mode: int) -> None:
    """Let others reach `path` (pytest's directories are for their owner alone)."""
    for parent in path.parents:
        if (
            parent != Path("/")
            and parent.stat().st_uid == os.getuid()
            and parent.stat().st_mode & 0o77 != 0o77
        ):
            parent.chmod(parent.stat().st_mode | 0o711)
    path.chmod(mode)


class WrappedBackend(Backend):
    """A backend in front of another one. `before` sees every call in place, and may raise or wait.

    Batches are made of calls in place, so that these are seen too.
    """

    name = "wrapped"

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.paths: dict[int, str] = {}  # of open descriptors

    def before(self, call: str, path: str, size: int) -> None:
        """Override. `path` is "" if it is not known; `size` the bytes that are to be moved."""

    def _path(self, fd: int) -> str:
        return self.paths.get(fd, "")

    def keep_to(self, root: str, inside: Collection[str], trust: Trust) -> None:
        self.inner.keep_to(root, inside, trust)

    def lstat(self, path: str) -> os.stat_result:
        return self.inner.lstat(path)

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self.before("open", path, 0)
        fd = self.inner.open(path, flags, mode)
        self.paths[fd] = path
        return fd

    def close_file(self, fd: int) -> None:
        self.paths.pop(fd, None)
        self.inner.close_file(fd)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self.before("read", self._path(fd), length)
        return self.inner.read(fd, length, offset)

    def read_once(self, fd: int, length: int, offset: int) -> bytes:
        self.before("read", self._path(fd), length)
        return self.inner.read_once(fd, length, offset)

    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        self.before("read", self._path(fd), length)
        return self.inner.read_nowait(fd, length, offset)

    def prefetch(self, fd: int, length: int, offset: int) -> None:
        self.inner.prefetch(fd, length, offset)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self.before("write", self._path(fd), sum(map(len, buffers)))
        self.inner.write(fd, buffers, offset)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self.before("allocate", self._path(fd), length)
        self.inner.allocate(fd, offset, length)

    def truncate(self, fd: int, length: int) -> None:
        self.before("truncate", self._path(fd), length)
        self.inner.truncate(fd, length)

    def sync(self, fd: int) -> None:
        self.before("sync", self._path(fd), 0)
        self.inner.sync(fd)

    def replace(self, source: str, target: str) -> None:
        self.before("replace", target, 0)
        self.inner.replace(source, target)

    def unlink(self, path: str) -> bool:
        self.before("unlink", path, 0)
        return self.inner.unlink(path)

    def mkdir(self, path: str, mode: int = 0o700) -> bool:
        self.before("mkdir", path, 0)
        return self.inner.mkdir(path, mode)

    def scandir(self, path: str) -> list[tuple[str, os.stat_result]]:
        self.before("scandir", path, 0)
        return self.inner.scandir(path)

    def sync_directory(self, path: str) -> None:
        self.before("sync_directory", path, 0)
        self.inner.sync_directory(path)

    def read_many(self, requests: Sequence[ReadRequest]) -> list[bytes | OSError]:
        return [_attempt(self.read, *request) for request in requests]

    def write_many(self, requests: Sequence[WriteRequest], sync: Sequence[int] = ()) -> list[OSError | None]:
        results = [_attempt(self.write, *request) for request in requests]
        failed = {fd: _attempt(self.sync, fd) for fd in sync}
        return [result or failed.get(request[0]) for result, request in zip(results, requests, strict=True)]

    def channel(self, loop: asyncio.AbstractEventLoop) -> Channel:
        return self.inner.channel(loop)

    def after_fork(self) -> None:
        self.inner.after_fork()

    def close(self) -> None:
        self.inner.close()

    def stats(self) -> dict[str, Any]:
        return self.inner.stats()


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except OSError as error:
        return error


class FailingBackend(WrappedBackend):
    """Raises `error` for the calls named in `calls`, on paths that contain `where`, after `spare` of them."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.error: int | None = None
        self.calls: frozenset[str] = frozenset()
        self.where = ""
        self.spare = 0
        self.failures = 0

    def fail(self, error: int, calls: Iterable[str], where: str = "", spare: int = 0) -> None:
        self.error, self.calls, self.where, self.spare = error, frozenset(calls), where, spare

    def mend(self) -> None:
        self.error = None

    def before(self, call: str, path: str, size: int) -> None:
        if self.error is None or call not in self.calls or self.where not in path:
            return
        if self.spare:
            self.spare -= 1
            return
        self.failures += 1
        raise OSError(self.error, os.strerror(self.error), path or None)


def open_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every cache opened gets a store of its own, as if it were in another process."""
    numbers = itertools.count()
    identify = sharing.identify
    monkeypatch.setattr(sharing, "identify", lambda status: (*identify(status), next(numbers)))


def wrap_backends(
    monkeypatch: pytest.MonkeyPatch, wrapper: Callable[[Backend], WrappedBackend]
) -> list[WrappedBackend]:
    """From here on every cache opened gets its backend wrapped; the wrappers, as they are made."""
    made: list[WrappedBackend] = []
    open_apart(monkeypatch)

    def chosen(settings: Settings) -> Choice:
        choice = choose(settings)
        made.append(wrapper(choice.backend))
        return Choice(made[-1], choice.reason)

    monkeypatch.setattr("yatagarasu_cache.store.sharing.choose", chosen)
    return made


def named(value: object) -> str:
    """A test id that is the same in every process: no addresses, no order of a set."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} of {len(value)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
