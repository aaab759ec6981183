"""A backend that fails on demand, and a disk that forgets what was not synced.

`FaultyBackend` keeps the contract of `backends/base.py` over the portable backend. A plan of
`Fault`s makes the n-th operation of a kind fail, come up short below the layer that resumes, or
take long. With a `Disk` it also records every change in order; `Disk.cuts` then yields what the
directory may look like after a power cut behind each of these changes:

* what was synced is there;
* whatever was not may be there, be missing, or be torn (some of its blocks, or its length alone),
  each operation by itself;
* names that no sync of their directory covers may have come, gone or moved, or not;
* the index is written through a mapping: any of its blocks may be as last synced, or as at the cut.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yatagarasu_cache import DiskCache
from yatagarasu_cache.backends import Choice, threads
from yatagarasu_cache.backends.base import Buffer
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.config import Settings
from yatagarasu_cache.store import format as f

BLOCKS = (512, 4096)

# -- short transfers, below the layer that resumes them ----------------------------------------


class _ShortSystem:
    """Stands in for `os` in the portable backend: transfers are cut short where a thread asks for it."""

    def __init__(self) -> None:
        self.asked = threading.local()
        self.shortened = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _cut(self, length: int) -> int:
        choose: Callable[[int], int] | None = getattr(self.asked, "choose", None)
        if choose is None or length < 2:
            return length
        cut = max(1, min(length, choose(length)))
        self.shortened += cut < length
        return cut

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, self._cut(length), offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        total = sum(map(len, buffers))
        cut = self._cut(total)
        if cut == total:
            return os.preadv(fd, buffers, offset, flags)
        data, done = os.pread(fd, cut, offset), 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return len(data)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, memoryview(data)[: self._cut(len(data))], offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        total = sum(map(len, buffers))
        cut = self._cut(total)
        return (
            os.pwritev(fd, buffers, offset)
            if cut == total
            else os.pwrite(fd, b"".join(buffers)[:cut], offset)
        )


_system = _ShortSystem()


# -- the plan -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Fault:
    """What happens to the operations `first` ... `first + times - 1` of a kind (counted from 1).

    kind: a method of `Backend`, as "write". error: its errno; None if it is to succeed.
    kept: of a write that fails, the share of its bytes that arrive all the same.
    short: most bytes that one system call below moves. delay: seconds to wait first.
    where: only operations on paths that contain this are counted.
    """

    kind: str
    first: int = 1
    error: int | None = None
    times: int = 1
    kept: float = 0.0
    short: int | None = None
    delay: float = 0.0
    where: str = ""
    seen: int = 0
    struck: int = 0

    def strikes(self, kind: str, path: str) -> bool:
        """Count an operation; True if it is one of those meant."""
        if kind != self.kind or self.where not in path:
            return False
        self.seen += 1
        hit = self.first <= self.seen < self.first + self.times
        self.struck += hit
        return hit


ALWAYS = 1 << 60  # for `Fault.times`


class FaultyBackend(ThreadsBackend):
    """The portable backend, with faults by plan and a record of what it changes."""

    name = "faulty"
    plain = False

    def __init__(
        self, disk: Disk | None = None, plan: Sequence[Fault] = (), workers: int | None = None
    ) -> None:
        super().__init__(workers)
        self.disk = disk
        self.plan = list(plan)
        self.paths: dict[int, str] = {}
        self.calls: dict[str, int] = {}
        self.closed_twice: list[int] = []  # descriptors that were not open, or never opened here
        self._count = threading.Lock()
        threads.os = _system  # type: ignore[assignment]

    def _before(self, kind: str, path: str) -> Fault | None:
        """Count the operation, wait or raise as planned; a fault that shortens or halves it comes back."""
        with self._count:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            struck = [fault for fault in self.plan if fault.strikes(kind, path)]
        for fault in struck:
            if fault.delay:
                time.sleep(fault.delay)
        for fault in struck:
            if fault.error is not None and not fault.kept:
                raise _error(fault, path)
        return next((fault for fault in struck if fault.short or fault.kept), None)

    def _run(self, kind: str, path: str, function: Callable[..., Any], *arguments: Any) -> Any:
        fault = self._before(kind, path)
        if fault is None or not fault.short:
            return function(*arguments)
        most = fault.short
        _system.asked.choose = lambda length: min(length, most)
        try:
            return function(*arguments)
        finally:
            _system.asked.choose = None

    def _path(self, fd: int) -> str:
        return self.paths.get(fd, "")

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self._before("open", path)
        if self.disk is None or os.path.isdir(path):  # which is opened to be synced
            fd = super().open(path, flags, mode)
        else:
            with self.disk.lock:
                new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
                fd = super().open(path, flags, mode)
                self.disk.opened(fd, path, new)
        self.paths[fd] = path
        return fd

    def close_file(self, fd: int) -> None:
        """A fault is told after the descriptor is gone, as the contract has it."""
        path = self.paths.pop(fd, None)  # first: the number may be somebody else's right after
        if path is None:
            self.closed_twice.append(fd)
        super().close_file(fd)
        self._before("close_file", path or "")

    def read(self, fd: int, length: int, offset: int) -> bytes:
        data: bytes = self._run("read", self._path(fd), super().read, fd, length, offset)
        return data

    def read_once(self, fd: int, length: int, offset: int) -> bytes:
        """One system call, which may come back short anywhere."""
        data: bytes = self._run("read", self._path(fd), _system.pread, fd, length, offset)
        return data

    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        data: bytes | None = self._run("read_nowait", self._path(fd), super().read_nowait, fd, length, offset)
        return data

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        path = self._path(fd)
        fault = self._before("write", path)
        data = b"".join(buffers)
        if fault is not None and fault.kept:
            data = data[: int(len(data) * fault.kept)]
            buffers = [data]
        if fault is not None and fault.short:
            most = fault.short
            _system.asked.choose = lambda length: min(length, most)
        try:
            self._changed(super().write, (fd, buffers, offset), "write", path, offset=offset, data=data)
        finally:
            _system.asked.choose = None
        if fault is not None and fault.kept:
            raise _error(fault, path)

    def _changed(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], kind: str, path: str, **details: Any
    ) -> Any:
        """Do it, and record that it was done."""
        if self.disk is None:
            return function(*arguments)
        with self.disk.lock:
            self.disk.look()
            result = function(*arguments)
            if result is not False:  # an unlink or mkdir that changed nothing
                self.disk.record(kind, path, **details)
            return result

    def allocate(self, fd: int, offset: int, length: int) -> None:
        path = self._path(fd)
        self._before("allocate", path)
        self._changed(super().allocate, (fd, offset, length), "allocate", path, offset=offset + length)

    def truncate(self, fd: int, length: int) -> None:
        path = self._path(fd)
        self._before("truncate", path)
        self._changed(super().truncate, (fd, length), "truncate", path, offset=length)

    def sync(self, fd: int) -> None:
        path = self._path(fd)
        self._before("sync", path)
        self._changed(super().sync, (fd,), "sync", path, fd=fd)

    def replace(self, source: str, target: str) -> None:
        self._before("replace", target)
        self._changed(super().replace, (source, target), "replace", source, target=target)

    def unlink(self, path: str) -> bool:
        self._before("unlink", path)
        done: bool = self._changed(super().unlink, (path,), "unlink", path)
        return done

    def mkdir(self, path: str, mode: int = 0o700) -> bool:
        self._before("mkdir", path)
        done: bool = self._changed(super().mkdir, (path, mode), "mkdir", path)
        return done

    def scandir(self, path: str) -> list[tuple[str, os.stat_result]]:
        self._before("scandir", path)
        return super().scandir(path)

    def sync_directory(self, path: str) -> None:
        self._before("sync_directory", path)
        self._changed(super().sync_directory, (path,), "sync_directory", path)


def _error(fault: Fault, path: str) -> OSError:
    assert fault.error is not None
    return OSError(fault.error, os.strerror(fault.error), path or None)


# -- the disk -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Op:
    """One change, in the order in which it was made. Paths are relative to the cache directory."""

    kind: str  # create, write, allocate, truncate, sync, replace, unlink, mkdir, sync_directory
    path: str
    node: int = 0  # the file itself, whatever its name is
    offset: int = 0
    data: bytes = b""
    target: str = ""
    mapped: dict[int, bytes] = dataclasses.field(default_factory=dict)  # mapped files just before

    def __str__(self) -> str:
        more = (
            f" -> {self.target}" if self.target else f" @{self.offset}+{len(self.data)}" if self.data else ""
        )
        return f"{self.kind} {self.path}{more}"


@dataclasses.dataclass
class Image:
    """A directory after a power cut: content by path, None for directories."""

    files: dict[str, bytes | None]
    cut: int  # so many operations had been made
    label: str  # what became of those that were not durable

    def build(self, root: Path | str) -> None:
        """Write it out."""
        os.makedirs(root)
        for path, content in sorted(self.files.items()):
            where = os.path.join(root, path)
            if content is None:
                os.mkdir(where)
            else:
                with open(where, "wb") as file:
                    file.write(content)

    def __str__(self) -> str:
        return f"cut behind operation {self.cut}, {self.label}"


class Disk:
    """Everything that backends change below `root`, from what is there when it is made."""

    def __init__(self, root: Path | str) -> None:
        self.root = os.path.abspath(root)
        self.lock = threading.RLock()
        self.log: list[Op] = []
        self.last: dict[int, bytes] = {}
        self._nodes = 0
        self._names: dict[str, int] = {}
        self._by_fd: dict[int, int] = {}
        self._mapped: dict[int, int] = {}  # node: a descriptor of our own
        self.start_names: dict[str, int] = {}
        self.start_content: dict[int, bytes] = {}
        self.start_directories: set[str] = set()
        for parent, directories, names in os.walk(self.root):
            for name in directories:
                self.start_directories.add(self._relative(os.path.join(parent, name)))
            for name in names:
                path = os.path.join(parent, name)
                node = self._new_node(self._relative(path))
                self.start_names[self._relative(path)] = node
                self.start_content[node] = Path(path).read_bytes()
        if f.INDEX_NAME in self._names:
            self._map(self._names[f.INDEX_NAME])

    def close(self) -> None:
        for fd in self._mapped.values():
            os.close(fd)
        self._mapped.clear()

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def _new_node(self, path: str) -> int:
        self._nodes += 1
        self._names[path] = self._nodes
        return self._nodes

    # -- recording ----------------------------------------------------------------------------

    def opened(self, fd: int, path: str, new: bool) -> None:
        name = self._relative(path)
        if new:
            self.look()
            node = self._new_node(name)
            self._append(Op("create", name, node))
        else:
            node = self._names[name]
        self._by_fd[fd] = node
        if name == f.INDEX_NAME:
            self._map(node)

    def record(
        self, kind: str, path: str, offset: int = 0, data: bytes = b"", target: str = "", fd: int = -1
    ) -> None:
        name, goal = self._relative(path), self._relative(target) if target else ""
        op = Op(kind, name, self._by_fd[fd] if fd >= 0 else self._names.get(name, 0), offset, data, goal)
        if kind == "replace":
            self._names[goal] = op.node
            del self._names[name]
            if goal == f.INDEX_NAME:
                self._map(op.node)
        elif kind == "unlink":
            del self._names[name]
        elif kind == "sync" and op.node in self._mapped:
            self.look()
            op.data = self.last[op.node]
        self._append(op)

    def _append(self, op: Op) -> None:
        op.mapped = dict(self.last)
        self.log.append(op)

    def _map(self, node: int) -> None:
        if node not in self._mapped:
            self._mapped[node] = os.open(os.path.join(self.root, f.INDEX_NAME), os.O_RDONLY | os.O_CLOEXEC)

    def look(self) -> None:
        """Take down what the mapped files hold now."""
        for node, fd in self._mapped.items():
            content = os.pread(fd, os.fstat(fd).st_size, 0)
            if self.last.get(node) != content:
                self.last[node] = content

    # -- what may be left ---------------------------------------------------------------------

    def cuts(
        self, rng: random.Random, *, first: int = 0, singles: int = 8, mixtures: int = 3
    ) -> Iterator[Image]:
        """Images for a cut behind every operation from `first` on: nothing that was not durable is
        there; all of it; all but one, and only one, for up to `singles` of them; `mixtures` at random.
        """
        with self.lock:
            self.look()
            state = _State(self)
            before = None
            for cut, op in enumerate([*self.log, None]):
                mapped = op.mapped if op else dict(self.last)
                if (
                    cut >= first
                    and op
                    and before
                    and op.kind == before.kind == "write"
                    and op.node == before.node
                ):
                    # In the middle of a file that is written piece by piece: one image will do.
                    yield Image(state.draw(_CHOICES["mixture"](rng), mapped, rng), cut, "mixture")
                elif cut >= first:
                    yield from self._images_at(state, cut, mapped, rng, singles, mixtures)
                if op is not None:
                    state.apply(op)
                before = op

    def image(self, rng: random.Random, cut: int | None = None, label: str = "mixture") -> Image:
        """One image, for a cut behind `cut` operations (all of them)."""
        with self.lock:
            self.look()
            state = _State(self)
            cut = len(self.log) if cut is None else cut
            for op in self.log[:cut]:
                state.apply(op)
            mapped = self.log[cut].mapped if cut < len(self.log) else dict(self.last)
            return Image(state.draw(_CHOICES[label](rng), mapped, rng), cut, label)

    def _images_at(
        self,
        state: _State,
        cut: int,
        mapped: dict[int, bytes],
        rng: random.Random,
        singles: int,
        mixtures: int,
    ) -> Iterator[Image]:
        for label in ("all lost", "all kept"):
            yield Image(state.draw(_CHOICES[label](rng), mapped, rng), cut, label)
        pending = state.pending()
        chosen = pending if len(pending) <= singles else rng.sample(pending, singles)
        for one in chosen:
            for label, most in (("lost", "keep"), ("torn", "keep"), ("kept", "lose")):
                if label == "torn" and one.kind != "write":
                    continue
                fate = {"lost": "lose", "torn": "tear", "kept": "keep"}[label]
                files = state.draw(
                    lambda op, one=one, fate=fate, most=most: fate if op is one else most, mapped, rng
                )
                yield Image(files, cut, f"only {label}: {one}")
        for i in range(mixtures):
            yield Image(state.draw(_CHOICES["mixture"](rng), mapped, rng), cut, f"mixture {i}")


Choice_ = Callable[[Any], str]


def _mixture(rng: random.Random) -> Choice_:
    fates = rng.choice((("keep", "lose", "tear"), ("keep", "keep", "keep", "lose"), ("keep", "tear")))
    return lambda op: rng.choice(fates)


_CHOICES: dict[str, Callable[[random.Random], Choice_]] = {
    "all lost": lambda rng: lambda op: "lose",
    "all kept": lambda rng: lambda op: "keep",
    "mixture": _mixture,
}


class _State:
    """What is durable after some operations, and what is pending."""

    def __init__(self, disk: Disk) -> None:
        self.names = dict(disk.start_names)
        self.directories = set(disk.start_directories)
        self.content = dict(disk.start_content)
        self.pending_names: list[Op] = []
        self.pending_content: list[Op] = []

    def pending(self) -> list[Op]:
        return self.pending_names + self.pending_content

    def apply(self, op: Op) -> None:
        """Go one operation further."""
        if op.kind in ("create", "unlink", "mkdir", "replace"):
            self.pending_names.append(op)
        elif op.kind == "sync_directory":
            done = [o for o in self.pending_names if os.path.dirname(o.target or o.path) == _parent(op.path)]
            self.pending_names = [o for o in self.pending_names if o not in done]
            for one in done:
                _rename(one, self.names, self.directories)
        elif op.kind == "sync":
            done = [o for o in self.pending_content if o.node == op.node]
            self.pending_content = [o for o in self.pending_content if o.node != op.node]
            content = bytearray(self.content.get(op.node, b""))
            for one in done:
                _change(one, content, "keep", None)
            self.content[op.node] = op.data or bytes(content)
        else:
            self.pending_content.append(op)

    def draw(self, choose: Choice_, mapped: dict[int, bytes], rng: random.Random) -> dict[str, bytes | None]:
        """The files of one image; `choose` says what becomes of each pending operation."""
        names, directories = dict(self.names), set(self.directories)
        for op in self.pending_names:
            if choose(op) == "keep":
                _rename(op, names, directories)
        contents: dict[int, bytearray] = {}
        for op in self.pending_content:
            if op.node not in mapped:
                content = contents.setdefault(op.node, bytearray(self.content.get(op.node, b"")))
                _change(op, content, choose(op), rng)
        files: dict[str, bytes | None] = {path: None for path in directories if _reachable(path, directories)}
        for path, node in names.items():
            if not _reachable(os.path.dirname(path), directories):
                continue
            if node in mapped:
                files[path] = _mapped(self.content.get(node, b""), mapped[node], choose(None), rng)
            else:
                files[path] = bytes(contents[node]) if node in contents else self.content.get(node, b"")
        return files


def _parent(path: str) -> str:
    return "" if path == "." else path


def _reachable(path: str, directories: set[str]) -> bool:
    return path in ("", ".") or path in directories and _reachable(os.path.dirname(path), directories)


def _rename(op: Op, names: dict[str, int], directories: set[str]) -> None:
    if op.kind == "mkdir":
        directories.add(op.path)
    elif op.kind == "create":
        names[op.path] = op.node
    elif op.kind == "unlink":
        if names.get(op.path) == op.node:
            del names[op.path]
    else:
        names[op.target] = op.node
        if names.get(op.path) == op.node:
            del names[op.path]


def _change(op: Op, content: bytearray, fate: str, rng: random.Random | None) -> None:
    """Apply a change of content to what is there, wholly, in part, or not at all."""
    if fate == "lose":
        return
    if op.kind == "truncate":
        _resize(content, op.offset)
        return
    end = op.offset + len(op.data)
    if op.kind == "allocate" or fate == "keep" or rng is None or rng.random() < 0.7:
        _resize(content, max(len(content), end))
    if fate == "keep" or rng is None:
        content[op.offset : end] = op.data
        return
    size = rng.choice(BLOCKS)
    blocks = range(op.offset // size, -(-end // size))
    few = rng.randrange(3)  # a prefix, any subset, or the length alone
    kept = (
        blocks[: rng.randrange(len(blocks) + 1)]
        if few == 0
        else [b for b in blocks if few == 1 and rng.random() < 0.5]
    )
    for block in kept:
        start, stop = max(op.offset, block * size), min(end, (block + 1) * size)
        _resize(content, max(len(content), stop))
        content[start:stop] = op.data[start - op.offset : stop - op.offset]


def _resize(content: bytearray, length: int) -> None:
    del content[length:]
    content.extend(bytes(length - len(content)))


def _mapped(synced: bytes, now: bytes, fate: str, rng: random.Random) -> bytes:
    """A file written through a mapping: each block as of its last sync, or as it is now."""
    if fate != "tear":
        return now if fate == "keep" else synced
    size = rng.choice(BLOCKS)
    length = rng.choice((len(synced), len(now)))
    kept = bytearray()
    for at in range(0, length, size):
        source = rng.choice((synced, now))
        block = source[at : min(at + size, length)]
        kept += block + bytes(min(size, length - at) - len(block))
    return bytes(kept)


def crash_images(disk: Disk, rng: random.Random, **bounds: int) -> Iterator[Image]:
    """`Disk.cuts`: directory states after a power cut at any point of the log."""
    return disk.cuts(rng, **bounds)


# -- chance that can be had again --------------------------------------------------------------

SEED = os.environ.get("YATAGARASU_TEST_SEED", "0")  # another one gives other sequences, cuts and places


def seeded(name: str) -> random.Random:
    """The generator of a test; the seed is printed, so that a failure can be had again."""
    print(f"YATAGARASU_TEST_SEED={SEED} ({name})")
    return random.Random(f"{name} {SEED}")


def fix_identity(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """New caches and handles take their random numbers from `rng`."""
    chosen = random.Random(rng.random())
    monkeypatch.setattr(
        "yatagarasu_cache.store.recovery._new_identity",
        lambda: f.Identity(chosen.randbytes(16), chosen.getrandbits(64)),
    )
    monkeypatch.setattr("yatagarasu_cache.store.owners.secrets", SimpleNamespace(randbits=chosen.getrandbits))


# -- caches on it -------------------------------------------------------------------------------


def open_faulty(
    monkeypatch: pytest.MonkeyPatch, directory: Path | str, backend: FaultyBackend, **options: Any
) -> DiskCache:
    """A `DiskCache` on just this backend."""

    def chosen(settings: Settings) -> Choice:
        return Choice(backend, "for a test")

    with monkeypatch.context() as patch:
        patch.setattr("yatagarasu_cache.store.sharing.choose", chosen)
        return DiskCache(directory, **options)


FULL, BROKEN, TOO_MANY, FORBIDDEN = errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES


class WornBackend(FaultyBackend):
    """A disk with bad blocks (of `size` bytes), by the end of a file's path: reading one is an EIO. One that is
    written as a whole is exchanged for a good one, if the disk `heals`."""

    def __init__(self, bad: dict[str, set[int]], *, heals: bool = True, size: int = 4096) -> None:
        super().__init__()
        self.bad, self.heals, self.size = bad, heals, size

    def _bad_in(self, fd: int, length: int, offset: int) -> set[int]:
        found = next((blocks for end, blocks in self.bad.items() if self._path(fd).endswith(end)), set())
        return {at for at in found if at < offset + length and offset < at + self.size}

    def _look(self, fd: int, length: int, offset: int) -> None:
        if self._bad_in(fd, min(length, max(0, os.fstat(fd).st_size - offset)), offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # as the system does, without a name

    def read(self, fd: int, length: int, offset: int) -> bytes:
        self._look(fd, length, offset)
        return super().read(fd, length, offset)

    def read_once(self, fd: int, length: int, offset: int) -> bytes:
        self._look(fd, length, offset)
        return super().read_once(fd, length, offset)

    def read_nowait(self, fd: int, length: int, offset: int) -> bytes | None:
        self._look(fd, length, offset)
        return super().read_nowait(fd, length, offset)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        end = offset + sum(map(len, buffers))
        for at in self._bad_in(fd, end - offset, offset):
            whole = offset <= at and end >= min(at + self.size, os.fstat(fd).st_size)
            if not whole:  # the rest of it would have to be read
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.heals:
                self.bad[next(name for name in self.bad if self._path(fd).endswith(name))].discard(at)
        super().write(fd, buffers, offset)

    def replace(self, source: str, target: str) -> None:
        super().replace(source, target)
        self._forget(target)

    def unlink(self, path: str) -> bool:
        self._forget(path)
        return super().unlink(path)

    def _forget(self, path: str) -> None:
        """Another file has other blocks."""
        for name in [name for name in self.bad if path.endswith(name)]:
            del self.bad[name]
