"""What happens where there is no io_uring: the calls forbidden, limits reached, no module.

Each case in which a call is refused runs in a process of its own. The kernel really refuses: a
seccomp filter answers the system calls with the errno in question.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import run_python

from yatagarasu_cache import BackendUnavailable, ConfigurationError, DiskCache
from yatagarasu_cache.backends import choose
from yatagarasu_cache.config import make_settings

pytestmark = pytest.mark.once

if sys.platform != "linux":
    pytest.skip("seccomp is Linux's", allow_module_level=True)

try:
    from yatagarasu_cache.backends import ring as ring_module
    from yatagarasu_cache.backends import uring

    uring.UringBackend(make_settings("/unused", backend="uring")).close()
    HAVE_RING = True
except (ImportError, BackendUnavailable):
    if os.environ.get("YATAGARASU_IO_URING", "").strip().lower() == "require":
        raise
    HAVE_RING = False
needs_ring = pytest.mark.skipif(not HAVE_RING, reason="without a ring nothing has to be forbidden")

SETUP, ENTER, REGISTER = 425, 426, 427  # numbers of the io_uring system calls, the same everywhere

# What every case begins with: `forbid` before anything of the package is imported.
PRELUDE = """
import ctypes, errno, json, logging, os, resource, struct, sys
directory, argument = sys.argv[1], sys.argv[2]

def forbid(call, code):
    "From now on this process gets `code` for the system call of this number."
    def step(op, yes, no, k):
        return struct.pack("HBBI", op, yes, no, k)
    load_number, jump_if_equal, end = 0x20, 0x15, 0x06
    allow, fail = 0x7FFF0000, 0x00050000 | code
    program = step(load_number, 0, 0, 0) + step(jump_if_equal, 0, 1, call)
    program += step(end, 0, 0, fail) + step(end, 0, 0, allow)
    memory = ctypes.create_string_buffer(program)
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    arguments = [ctypes.c_ulong(0)] * 3
    if libc.prctl(no_new_privileges, ctypes.c_ulong(1), *arguments):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    program = Program(4, ctypes.addressof(memory))
    if libc.prctl(set_seccomp, ctypes.c_ulong(filter_mode), ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "seccomp")

class Lines(logging.Handler):
    lines = []
    def emit(self, record):
        self.lines.append(record.getMessage())
logging.getLogger("yatagarasu_cache").addHandler(Lines())
logging.getLogger("yatagarasu_cache").setLevel(logging.INFO)

def use(**options):
    "Open a cache, use it in all ways that a ring could serve, and tell which backend did it."
    import asyncio
    from yatagarasu_cache import AsyncDiskCache, DiskCache
    with DiskCache(directory, **options) as cache:
        cache.set_many({i: b"%d" % i * 100 for i in range(100)})
        cache.set("long", bytes(range(256)) * 12288)
        assert cache.get_many(range(100)) == {i: b"%d" % i * 100 for i in range(100)}
        assert cache.get("long") == bytes(range(256)) * 12288
        stats = cache.stats()
    async def main():
        async with AsyncDiskCache(directory, **options) as cache:
            for segment in os.scandir(os.path.join(directory, "segments")):
                fd = os.open(segment.path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            values = await asyncio.gather(*[cache.get(i) for i in range(100)])
            assert values == [b"%d" % i * 100 for i in range(100)]
    asyncio.run(main())
    return {"backend": stats.backend, "reason": stats.backend_reason, "figures": stats.backend_stats}

def modules():
    parts = ("_ring", "threads", "uring", "ring", "ring_channel", "ring_batches", "buffers")
    ours = [name for name in sys.modules if name.startswith("yatagarasu_cache.")]
    return sorted(name for name in ours if name.rsplit(".", 1)[1] in parts)

def answer(**facts):
    lines = [line for line in Lines.lines if not line.startswith("core python")]  # where it was not built
    print(json.dumps({**facts, "lines": lines, "modules": modules()}))
"""


def run(directory: Path, code: str, argument: object = "", **environment: str) -> dict[str, Any]:
    """The answer of a process that runs `code`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("YATAGARASU_")}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(directory), str(argument)],
        capture_output=True, text=True, timeout=60, env=env | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def name_of(code: int) -> str:
    return errno.errorcode[code]


AUTO = """
number, code = map(int, argument.split())
forbid(number, code)
answer(first=use(), second=use(backend="auto"))
"""
BY_NAME = """
number, code = map(int, argument.split())
forbid(number, code)
from yatagarasu_cache import BackendUnavailable, DiskCache
try:
    DiskCache(directory, backend="uring")
except BackendUnavailable as error:
    answer(error=str(error), left=os.path.exists(directory))
"""
REFUSALS = [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.EINVAL]


@needs_ring
@pytest.mark.parametrize("code", REFUSALS, ids=name_of)
def test_auto_falls_back(directory: Path, code: int) -> None:
    answer = run(directory, AUTO, f"{SETUP} {code}")
    for use in (answer["first"], answer["second"]):
        assert use["backend"] == "threads"
        assert name_of(code) in use["reason"]
    assert len(answer["lines"]) == 1
    assert "backend threads" in answer["lines"][0] and name_of(code) in answer["lines"][0]


@needs_ring
@pytest.mark.parametrize("code", REFUSALS, ids=name_of)
def test_by_name_is_an_error_that_says_why(directory: Path, code: int) -> None:
    answer = run(directory, BY_NAME, f"{SETUP} {code}")
    assert name_of(code) in answer["error"] and "backend='uring'" in answer["error"]
    assert not answer["left"]  # nothing was created
    assert answer["lines"] == []


@needs_ring
@pytest.mark.parametrize("number", [ENTER, REGISTER])
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=name_of)
def test_rings_that_can_be_made_but_not_used(directory: Path, number: int, code: int) -> None:
    """A filter may know only some of the calls."""
    assert run(directory, AUTO, f"{number} {code}")["first"]["backend"] == "threads"
    assert "error" in run(directory, BY_NAME, f"{number} {code}")


@needs_ring
def test_forbidden_while_in_use(directory: Path) -> None:
    """A filter that comes later, as a sandbox enters itself: no operation fails."""
    code = """
import asyncio, random
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.backends.uring import UringBackend
backend = UringBackend(make_settings(directory, backend="uring"))
path = directory + "-file"
with open(path, "wb") as file:
    file.write(random.Random(1).randbytes(4 << 20))
    os.fsync(file.fileno())
fd = os.open(path, os.O_RDONLY)
def wanted():
    return [(fd, 3000, random.randrange((4 << 20) - 3000)) for _ in range(300)]
async def main():
    channel = backend.channel(asyncio.get_running_loop())
    for turn in range(4):
        requests = wanted()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if turn == 1:
            forbid(int(argument), errno.EPERM)
        assert await asyncio.gather(*[channel.read(*r) for r in requests]) == [os.pread(*r) for r in requests]
    channel.close()
asyncio.run(main())
for _ in range(3):
    requests = wanted()
    assert backend.read_many(requests) == [os.pread(*r) for r in requests]
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
assert backend.read(fd, 3 << 20, 5) == os.pread(fd, 3 << 20, 5)
fds = [os.open(path, os.O_RDWR) for _ in range(3)]
assert backend.write_many([(one, [b"x"], 0) for one in fds], fds) == [None] * 3
answer(figures=backend.stats())
backend.close()
"""
    answer = run(directory, code, ENTER)
    assert answer["figures"]["fallbacks"] > 0
    assert answer["figures"]["degraded"] == 1
    assert len(answer["lines"]) == 1 and "EPERM" in answer["lines"][0]


# -- ordinary system calls that are refused --------------------------------------------------------

# Names and numbers by machine: x86-64, and those that share the generic table.
CALLS = {
    "pwritev": (296, 70), "pwritev2": (328, 287), "preadv": (295, 69), "preadv2": (327, 286),
    "fallocate": (285, 47), "fdatasync": (75, 83), "fsync": (74, 82), "fadvise64": (221, 223),
    "statx": (332, 291), "fchmod": (91, 52), "madvise": (28, 233),
}  # fmt: skip
COLUMN = {"x86_64": 0, "aarch64": 1, "riscv64": 1}.get(os.uname().machine)

# Each call by itself is refused in a child of its own; all kinds of values go in and out.
ONE_BY_ONE = """
import traceback, warnings
from yatagarasu_cache import DiskCache
from yatagarasu_cache.store import checkpoint
import yatagarasu_cache.backends.threads
warnings.simplefilter("ignore", DeprecationWarning)

def attempt(place, options):
    values = {n: bytes([n % 251]) * n for n in (0, 1, 100, 20_001, 1_500_000)}
    values |= {"text": "x" * 500, "list": [1, 2.5, None]}
    with DiskCache(place, size_limit=64 << 20, file_mode=0o640, **options) as cache:
        for name, value in values.items():
            cache.set(name, value)
        cache.set_many({(name, "many"): value for name, value in values.items()})
        assert cache.incr("n") == 1 and cache.delete((1, "many"))
        cache.flush()
        cache._store.checkpoints.write()
    with DiskCache(place, **options) as cache:
        for name, value in values.items():
            assert cache.get(name) == value, name
        assert cache.get_many(values) == values
        assert cache.check() == []
    assert Lines.lines == [], Lines.lines

logging.getLogger("yatagarasu_cache").setLevel(logging.WARNING)
failed = []
for name, number in json.loads(argument).items():
    child = os.fork()
    if not child:
        status = 1
        try:
            os.umask(0o077)
            forbid(number, errno.EPERM)  # ENOSYS: see test_backend_contract.py
            attempt(f"{directory}/{name}", {"durability": "sync"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
answer(failed=failed)
"""


@pytest.mark.skipif(COLUMN is None, reason="numbers of system calls are known for other machines")
@pytest.mark.parametrize("core", ["auto", "python"])
def test_each_system_call_can_be_refused(directory: Path, core: str) -> None:
    assert COLUMN is not None
    numbers = {name: both[COLUMN] for name, both in CALLS.items()}
    answer = run(directory, ONE_BY_ONE, json.dumps(numbers), YATAGARASU_CORE=core, YATAGARASU_BACKEND="threads")
    assert answer["failed"] == []


# -- limits ---------------------------------------------------------------------------------------

LIMITED = """
def give_up_locking():
    "Root may lock what it likes; without this capability the limit holds for it too."
    lock = 1 << 14
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~lock
    sets[1] &= ~lock
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
give_up_locking()
resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(argument), int(argument)))
answer(**use())
"""


@needs_ring
@pytest.mark.parametrize("limit", [0, 64 << 10])
def test_tiny_limit_of_locked_memory(directory: Path, limit: int) -> None:
    """No registered buffers then, and one line that says so; or no ring at all on older kernels."""
    answer = run(directory, LIMITED, limit)
    if answer["backend"] == "threads":
        assert "ENOMEM" in answer["reason"]
    else:
        assert answer["figures"]["registered_bytes"] == 0
        assert len([line for line in answer["lines"] if "unregistered" in line]) == 1
        assert "ulimit -l" in "".join(answer["lines"])


@needs_ring
def test_no_descriptors_left(directory: Path) -> None:
    code = """
from yatagarasu_cache import BackendUnavailable
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.backends import choose
import yatagarasu_cache.backends.uring
free = os.dup(0)
os.close(free)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
choice = choose(make_settings(directory))
try:
    choose(make_settings(directory, backend="uring"))
except BackendUnavailable as error:
    answer(backend=choice.backend.name, reason=choice.reason, error=str(error))
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
"""
    answer = run(directory, code)
    assert answer["backend"] == "threads"
    assert "EMFILE" in answer["reason"] and "ulimit -n" in answer["error"]


# -- no module ------------------------------------------------------------------------------------

BLOCKED = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "yatagarasu_cache._ring":
            raise ImportError("not built here")
sys.meta_path.insert(0, Blocker())
"""


def test_without_the_module(directory: Path) -> None:
    answer = run(directory, BLOCKED + "answer(first=use(), second=use())")
    assert answer["first"]["backend"] == "threads"
    assert "YATAGARASU_IO_URING=require" in answer["first"]["reason"]
    assert len(answer["lines"]) == 1
    assert "yatagarasu_cache._ring" not in answer["modules"]
    assert "yatagarasu_cache.backends.uring" not in answer["modules"]


def test_by_name_without_the_module(directory: Path) -> None:
    answer = run(directory, BLOCKED + BY_NAME.replace("forbid(number, code)", ""), "0 0")
    assert "not built here" in answer["error"] and "YATAGARASU_IO_URING=require" in answer["error"]


def test_import_without_the_module(directory: Path) -> None:
    code = """
try:
    import yatagarasu_cache.backends.uring
except ImportError as error:
    answer(error=str(error))
"""
    answer = run(directory, BLOCKED + code)
    assert "yatagarasu_cache._ring" in answer["error"] and "liburing" in answer["error"]


# -- choice ---------------------------------------------------------------------------------------


def test_only_the_chosen_backend_is_imported(directory: Path) -> None:
    answer = run(directory, 'answer(**use(backend="threads"))')
    assert answer["backend"] == "threads"
    assert answer["modules"] == ["yatagarasu_cache.backends.threads"]
    assert answer["lines"] == []


@needs_ring
def test_the_ring_is_chosen_where_it_can_be(directory: Path) -> None:
    answer = run(directory, "answer(**use())")
    assert (answer["backend"], answer["reason"]) == ("uring", "available")
    assert answer["lines"] == ["backend uring: available"]
    answer = run(directory, 'answer(**use(backend="uring"))')
    assert (answer["backend"], answer["reason"]) == ("uring", "asked for by name")


@pytest.mark.parametrize("name", ["threads", pytest.param("uring", marks=needs_ring)])
def test_the_environment_chooses(directory: Path, name: str) -> None:
    assert run(directory, "answer(**use())", YATAGARASU_BACKEND=name)["backend"] == name


@needs_ring
def test_the_environment_can_insist(directory: Path) -> None:
    code = BY_NAME.replace(', backend="uring"', "")
    answer = run(directory, code, f"{SETUP} {errno.EPERM}", YATAGARASU_BACKEND="uring")
    assert "EPERM" in answer["error"]


@needs_ring
def test_a_cache_opens_on_either_backend(directory: Path) -> None:
    """Both write the same files."""
    for backend in ("threads", "uring", "threads"):
        assert run(directory, f"answer(**use(backend={backend!r}))")["backend"] == backend


# -- reasons --------------------------------------------------------------------------------------


@needs_ring
@pytest.mark.parametrize(
    ("release", "runs"),
    [("4.19.0", False), ("5.9.16-arch1", False), ("5.10.0", True), ("6.1.0-13-amd64", True), ("odd", True)],
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, release: str, runs: bool) -> None:
    real = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*real[:2], release, *real[3:])))
    if runs:
        ring_module.check_kernel()
    else:
        with pytest.raises(BackendUnavailable, match=r"too old: Linux 5\.10"):
            ring_module.check_kernel()


@needs_ring
def test_a_kernel_that_lacks_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module.Ring, "lacking", lambda self: ["read"])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendUnavailable, match="cannot read"):
        uring.UringBackend(make_settings("/unused", backend="uring"))
    assert len(os.listdir("/proc/self/fd")) == before


@needs_ring
@pytest.mark.parametrize(
    ("value", "words"), [("1", "io_uring_group"), ("2", "for everybody"), ("0", "seccomp"), ("", "seccomp")]
)
def test_the_sysctl_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    (tmp_path / "disabled").write_text(value + "\n")
    monkeypatch.setattr(ring_module, "_SYSCTL", str(tmp_path / "disabled"))
    text = ring_module.explain(errno.EPERM)
    assert words in text
    assert ("kernel.io_uring_disabled" in text) == (value in ("1", "2"))


@needs_ring
def test_a_module_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "_ABI", 99)
    with pytest.raises(BackendUnavailable, match="another version"):
        uring.UringBackend(make_settings("/unused", backend="uring"))


@needs_ring
def test_an_unknown_refusal() -> None:
    assert ring_module.explain(errno.EXDEV).startswith("EXDEV")
    assert ring_module.explain(4095).startswith("4095")


# -- every way to choose ----------------------------------------------------------------------------


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it was not built."""
    for name in [name for name in sys.modules if name.startswith("yatagarasu_cache.backends.")]:
        if name.rsplit(".", 1)[1] in ("uring", "ring", "ring_batches", "ring_channel"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yatagarasu_cache._ring", None)


def chosen(**options: Any) -> tuple[str, str]:
    """(backend, reason), or what it says that there is none."""
    try:
        choice = choose(make_settings("/unused", **options))
    except (BackendUnavailable, ConfigurationError) as error:
        return type(error).__name__, str(error)
    choice.backend.close()
    return choice.backend.name, choice.reason


SWITCHES = [None, "auto", True, False]  # io_uring.enabled
NAMES = [None, "auto", "uring", "threads"]  # of a backend


def wanted(backend: str | None, enabled: bool | str | None, variable: str | None) -> str:
    """What the documentation says is asked for: the backend, io_uring.enabled, the variable, in this order."""
    switched = {True: "uring", False: "threads"}.get(enabled)  # type: ignore[call-overload]
    named = backend if backend in ("uring", "threads") else None
    if named and switched and named != switched:
        return "contradiction"
    return named or switched or variable or "auto"


@pytest.mark.parametrize("variable", NAMES)
@pytest.mark.parametrize("there", [pytest.param(True, marks=needs_ring), False], ids=["module", "no module"])
@pytest.mark.parametrize("platform", ["linux", "darwin", "freebsd14"])
def test_every_way_to_choose(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    there: bool,
    variable: str | None,
) -> None:
    """The platform itself decides nothing: there is a module that runs, or there is none."""
    if not there:
        request.getfixturevalue("no_module")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("YATAGARASU_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("YATAGARASU_BACKEND", variable)
    for backend, enabled in itertools.product(NAMES, SWITCHES):
        options: dict[str, Any] = {} if enabled is None else {"io_uring": {"enabled": enabled}}
        if backend is not None:
            options["backend"] = backend
        found, reason = chosen(**options)
        case = f"{options}: {found}, {reason}"
        what = wanted(backend, enabled, variable)
        if what == "contradiction":
            assert found == "ConfigurationError" and "io_uring.enabled" in reason, case
        elif what == "threads":
            assert (found, reason) == ("threads", "asked for by name"), case
        elif there:
            assert (found, reason) == ("uring", "asked for by name" if what == "uring" else "available"), case
        elif what == "uring":
            assert found == "BackendUnavailable" and "YATAGARASU_IO_URING=require" in reason, case
        else:
            assert found == "threads" and "_ring cannot be loaded" in reason, case


def test_an_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YATAGARASU_BACKEND", "iouring")
    found, reason = chosen()
    assert found == "ConfigurationError" and "YATAGARASU_BACKEND" in reason and "iouring" in reason
    assert chosen(backend="threads")[0] == "threads"


@needs_ring
def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    real = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*real[:2], "5.9.0", *real[3:])))
    monkeypatch.delenv("YATAGARASU_BACKEND", raising=False)
    name, reason = chosen()
    assert name == "threads" and "5.9.0 is too old: Linux 5.10" in reason
    name, reason = chosen(backend="uring")
    assert name == "BackendUnavailable" and "5.9.0 is too old: Linux 5.10" in reason
    with DiskCache(directory) as cache:
        assert (cache.stats().backend, cache.stats().backend_reason) == ("threads", chosen()[1])
    with pytest.raises(BackendUnavailable, match="too old"):
        DiskCache(directory, backend="uring")


@pytest.mark.parametrize("enabled", ["auto", False])
def test_a_section_for_a_ring_that_is_not_there_is_logged(
    no_module: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    directory: Path,
    enabled: Any,
) -> None:
    """Once, where the choice is made: a file that says "auto" does not know how it ends."""
    monkeypatch.setattr("yatagarasu_cache.backends._logged", set())
    monkeypatch.delenv("YATAGARASU_BACKEND", raising=False)
    section = {"enabled": enabled, "queue_depth": 64, "sqpoll": True, "max_workers": None}
    config = {"cache": {"disk": {"cache_dir": str(directory), "io_uring": section}}}
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        for _ in range(2):
            DiskCache.from_config(config).close()
    lines = [record.getMessage() for record in caplog.records if "does not use" in record.getMessage()]
    assert lines == ["settings of io_uring that the portable backend does not use: queue_depth, sqpoll"]
    caplog.clear()
    section.update(queue_depth=128, sqpoll=False)  # as without a section
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        DiskCache.from_config(config).close()
    assert not caplog.records


@needs_ring
def test_a_section_for_a_ring_that_is_there_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("yatagarasu_cache.backends._logged", set())
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        assert chosen(backend="uring", io_uring={"queue_depth": 64})[0] == "uring"
    assert [record.getMessage() for record in caplog.records] == ["backend uring: asked for by name"]


# -- other systems ------------------------------------------------------------------------------------

LACKING = """
import asyncio, os, random, shutil, sys, tempfile, threading
directory, size = sys.argv[1], int(sys.argv[2])
# What only Linux has, or macOS or a BSD has not. The standard library has taken what it wants.
names = "posix_fadvise posix_fallocate fdatasync preadv pwritev preadv2 copy_file_range memfd_create "
names += "eventfd splice O_NOATIME O_DIRECT O_PATH O_TMPFILE"
missing = [name for name in dir(os) if name in names.split() or name.startswith(("RWF_", "POSIX_FADV_"))]
assert "preadv" in missing and "RWF_NOWAIT" in missing and "O_DIRECT" in missing, missing
for name in missing:
    delattr(os, name)
sys.platform = "darwin"
os.environ["YATAGARASU_CORE"] = "python"
from yatagarasu_cache import AsyncDiskCache, DiskCache

options = dict(backend="threads", size_limit=2 << 20, segment_size=65536, large_value_size=20_000)
rng = random.Random(1)

def value(i):
    return b"%d:" % i + random.Random(i).randbytes(size)

def use(durability):
    with DiskCache(directory, durability=durability, **options) as cache:
        assert cache.stats().core == "python" and cache.stats().backend == "threads"
        for i in range(300):  # more than fit
            cache.set(i, value(i), expire=rng.choice((None, 1000)), tag=rng.choice((None, "t")), meta=i)
            assert cache.get(i) == value(i)
            if i % 7 == 0:
                assert cache.delete(i) and cache.get(i) is None
        assert cache.set_many({("many", i): value(i) for i in range(20)}) == 20
        keys = [("many", i) for i in range(20)] + list(range(300))
        found = cache.get_many(keys)
        assert all(data == value(key if type(key) is int else key[1]) for key, data in found.items())
        assert all(("many", i) in found for i in range(20))
        last = 298
        assert cache.get_entry(last).meta == last and cache.touch(last, 50)
        assert cache.open(last).read() == value(last)
        assert cache.incr("n", 5) == 5 and cache.decr("n") == 4 and not cache.add("n", 1)
        assert cache.pop("n") == 4 and "n" not in cache
        assert cache.evict("t") > 0 and list(cache)
        cache.set("stream", iter([value(7)] * 3))
        assert cache["stream"] == value(7) * 3
        cache.flush()
        assert cache.stats().evictions > 0 or 300 * size < 2 << 20
        assert cache.volume() <= 2 << 20
        assert cache.check() == [], cache.check()
        kept = {key: cache[key] for key in cache}
    with DiskCache(directory, **options) as cache:
        assert {key: cache[key] for key in cache} == kept
        assert cache.check() == []
    os.unlink(os.path.join(directory, "index"))
    with DiskCache(directory, **options) as cache:  # made anew from the segments
        assert {key: cache[key] for key in cache} == kept
        assert cache.check(fix=True) == []
    with DiskCache(directory, read_only=True, **options) as cache:
        assert cache.get_many(kept) == kept
    with DiskCache(directory, **options) as cache:
        cache.clear()
        assert list(cache) == []

async def main():
    async with AsyncDiskCache(directory, **options) as cache:
        await asyncio.gather(*[cache.set(i, value(i)) for i in range(20)])
        assert await asyncio.gather(*[cache.get(i) for i in range(20)]) == [value(i) for i in range(20)]
        assert await cache.delete(3) and await cache.get(3) is None
        assert await cache.check() == []

for durability in ("none", "sync"):
    use(durability)
asyncio.run(main())
if hasattr(os, "fork"):
    with DiskCache(directory, **options) as cache:
        child = os.fork()
        if not child:
            cache.set("child", b"here")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert cache["child"] == b"here"
"""


@pytest.mark.parametrize("size", [100, 3000, 30_000])
def test_a_system_that_lacks_what_linux_has(directory: Path, size: int) -> None:
    run_python(LACKING, directory, size)


@pytest.mark.parametrize("refusal", [None, errno.ENOTSUP, errno.EINVAL])
def test_a_sync_reaches_the_disk_itself_on_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    """There fsync alone does not. File systems of others may not know more than fsync."""
    calls: list[object] = []

    def full(fd: int, command: int) -> int:
        calls.append(command)
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        return 0

    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.delitem(sys.modules, "yatagarasu_cache.backends.threads")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    backend = importlib.import_module("yatagarasu_cache.backends.threads").ThreadsBackend()
    fd = backend.open(str(tmp_path / "file"), os.O_RDWR | os.O_CREAT)
    for sync in (lambda: backend.sync(fd), lambda: backend.sync_directory(str(tmp_path))):
        calls.clear()
        sync()
        assert calls == ([51] if refusal is None else [51, "fsync"])
    refusal = errno.EIO
    calls.clear()
    with pytest.raises(OSError, match="Input/output"):
        backend.sync(fd)
    assert calls == [51]  # a sync that is repeated after a failure may succeed wrongly
    backend.close_file(fd)
