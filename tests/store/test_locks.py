"""Locks: who waits for whom and for how long, what re-enters, and what happens when files are removed.

Programs here do what others do to a cache: stop while they hold a lock, remove its files, fork without
telling Python, or use it from a signal handler, a destructor or a logging handler.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, run_python

from yatagarasu_cache import CacheIOError, ClosedError, DiskCache, LockTimeout, Reentered
from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.concurrency import file_locks
from yatagarasu_cache.concurrency.cancelling import Call, GivenUp
from yatagarasu_cache.concurrency.file_locks import LOOK_EVERY, FileLock
from yatagarasu_cache.store import format as f

Make = Callable[..., DiskCache]


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[Callable[..., FileLock]]:
    """Locks of one file, each as another process would have it."""
    backend, made = ThreadsBackend(), []

    def new(timeout: float | None = None) -> FileLock:
        made.append(FileLock(backend, str(tmp_path / "lock"), 0o600, timeout))
        return made[-1]

    yield new
    for lock in made:
        lock.close()
    backend.close()


def is_free(lock: FileLock) -> bool:
    try:
        fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock.fd, fcntl.LOCK_UN)
    return True


def test_whoever_waits_long_tries_seldom(locks: Callable[..., FileLock], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a try each 10 ms, 256 that wait take a processor from the one that they wait for."""
    now, tries = [0.0], []

    class Clock:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            tries.append(now[0])
            now[0] += seconds

    fcntl.flock(locks().fd, fcntl.LOCK_EX)
    lock = locks(60.0)
    with monkeypatch.context() as patch, pytest.raises(LockTimeout):
        patch.setattr(file_locks, "time", Clock)
        lock.__enter__()
    assert now[0] == pytest.approx(60) and sum(when < 0.1 for when in tries) > 15 and sum(when > 10 for when in tries) < 250
    assert all(later - one <= max(0.0101, one / 16 + 1e-6) for one, later in zip(tries, tries[1:], strict=False))


def test_it_may_be_taken_again_and_is_given_back(locks: Callable[..., FileLock]) -> None:
    lock, other = locks(), locks()
    entered: list[int] = []
    lock.on_enter = lambda: entered.append(1)
    with lock:
        assert not is_free(other)
        with lock:
            assert not is_free(other)
        assert not is_free(other)
    assert is_free(other) and entered == [1]

    def trouble() -> None:
        raise ValueError("on entering")

    lock.on_enter = trouble
    with pytest.raises(ValueError, match="on entering"), lock:
        pass
    assert is_free(other)
    lock.on_enter = None
    with lock:
        assert not is_free(other)
    lock.close()
    lock.close()
    with pytest.raises(ClosedError), lock:
        pass
    assert lock.threads.acquire(blocking=False)


def test_waiting_has_a_bound(locks: Callable[..., FileLock]) -> None:
    holder, waiting = locks(), locks(0.05)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with holder:
            taken.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    with pytest.raises(LockTimeout, match=rf"0.05 s .* held by process {os.getpid()} .*: end it") as raised, waiting:
        pass
    assert raised.value.errno == errno.ETIMEDOUT and raised.value.filename
    done.set()
    thread.join()
    with waiting:
        pass


def test_threads_of_one_process_wait_no_longer(locks: Callable[..., FileLock]) -> None:
    lock = locks(0.05)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            with lock:
                pass
        except BaseException as error:
            raised.append(error)

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert [type(error) for error in raised] == [LockTimeout]
    assert "another thread of this process" in str(raised[0])


def test_a_thread_does_not_wait_for_itself(locks: Callable[..., FileLock]) -> None:
    one, other = locks(), locks()
    with one, pytest.raises(Reentered, match="another handle"), other:
        pass
    with other:
        pass


# -- waiting that is given up -------------------------------------------------------------------


class Work:
    """A call's, in a thread of its own. `ask` asks it to end, and gives what came of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.call, self.answered, self.raised = Call(), threading.Event(), None
        self._function = function
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.call.work(self._function)
        except BaseException as error:
            self.raised = error

    def ask(self) -> None:
        self.call.ask(self.answered.set)

    def end(self) -> BaseException | None:
        self.thread.join(20)
        assert not self.thread.is_alive() and self.call.done
        return self.raised


def take(lock: Any, taken: list[str]) -> None:
    with lock:
        taken.append("taken")


@pytest.mark.parametrize("by", ["a process", "a thread"])
def test_waiting_is_given_up(locks: Callable[..., FileLock], by: str) -> None:
    lock, taken = locks(60), list[str]()
    holder = locks() if by == "a process" else lock
    with holder:
        work = Work(lambda: take(lock, taken))
        time.sleep(0.05)
        assert not work.call.done
        work.ask()
        assert isinstance(work.end(), GivenUp) and work.answered.is_set() and not taken
    with lock:
        assert not is_free(locks())
    assert Work(lambda: take(lock, taken)).end() is None and taken


def test_threads_that_may_give_up_wait_no_longer(locks: Callable[..., FileLock]) -> None:
    lock = locks(0.05)
    with lock:
        found = Work(lambda: take(lock, [])).end()
    assert isinstance(found, LockTimeout) and "another thread of this process" in str(found)


def test_a_lock_that_is_free_is_taken_by_who_was_asked(locks: Callable[..., FileLock]) -> None:
    """It is waiting that is given up. Who asks hears of the end."""
    lock, taken, go = locks(60), list[str](), threading.Event()
    work = Work(lambda: go.wait(20) and take(lock, taken))
    work.ask()
    assert not work.answered.wait(0.05)
    go.set()
    assert work.end() is None and taken and work.answered.is_set()
    work.answered.clear()
    work.ask()
    assert work.answered.is_set()


def test_unwinding_is_not_given_up(locks: Callable[..., FileLock]) -> None:
    """Whoever has given up puts things in order, and waits for what he needs for that."""
    lock, holder, taken = locks(60), locks(), list[str]()

    def work_of_it() -> None:
        try:
            take(lock, taken)
        finally:
            take(lock, taken)

    with holder:
        work = Work(work_of_it)
        time.sleep(0.05)
        work.ask()
        assert work.answered.wait(20)  # before that: nobody waits for it
        work.answered.clear()
        work.ask()
        assert work.answered.is_set() and not work.call.done and not taken
    assert isinstance(work.end(), GivenUp) and taken == ["taken"]


def test_what_was_cancelled_first_never_begins() -> None:
    call, done = Call(), list[int]()
    assert call.cancel()
    with pytest.raises(GivenUp):
        call.work(lambda: done.append(1))
    assert not done
    call = Call()
    assert call.work(lambda: call.cancel()) is False


def test_giving_up_while_a_segment_is_sealed(make: Make) -> None:
    """It stays the one that is appended to."""
    cache = make()
    cache.set("k", b"1")
    store = cache._store

    def seal() -> None:
        with store.locks.appending:
            store.active.seal()

    writer = store.active.writer
    fd = os.open(Path(cache.directory) / f.LOCK_NAME, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        work = Work(seal)
        time.sleep(0.05)
        work.ask()
        assert isinstance(work.end(), GivenUp)
    finally:
        os.close(fd)
    assert writer is not None and store.active.writer is writer and writer.fd >= 0
    cache.set("k", b"2")
    seal()
    assert store.active.writer is None and cache.get("k") == b"2" and cache.check() == []


# -- a process that is stopped ------------------------------------------------------------------

STOPPED = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def stopped(directory: Path) -> Iterator[Callable[[], int]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        process = subprocess.Popen([sys.executable, "-c", STOPPED, str(directory / "lock")])
        processes.append(process)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.wait()


CHANGES: dict[str, Callable[[DiskCache], Any]] = {
    "set": lambda c: c.set("new", b"1"),
    "set text": lambda c: c.set("new", "1", tag="t"),
    "set large": lambda c: c.set("new", noise(2 << 20)),
    "set_many": lambda c: c.set_many({"new": 1}),
    "incr": lambda c: c.incr("n"),
    "add": lambda c: c.add("new", 1),
    "touch": lambda c: c.touch("old", 5),
    "pop": lambda c: c.pop("old"),
    "delete": lambda c: c.delete("old"),
    "clear": lambda c: c.clear(),
    "check": lambda c: c.check(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_who_is_stopped_with_the_lock(make: Make, stopped: Callable[[], int], name: str) -> None:
    cache = make(lock_timeout=0.05)
    cache.set("old", b"value")
    pid = stopped()
    with pytest.raises(LockTimeout, match=rf"process {pid} \(.*which is stopped\)"):
        CHANGES[name](cache)
    assert cache.get("old") == b"value"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its lock goes with it, not before
    assert cache.set("new", b"2")
    assert cache.get("new") == b"2"


# -- re-entrance --------------------------------------------------------------------------------


def test_a_change_within_a_change_is_refused(make: Make) -> None:
    """As a signal handler finds it: in the middle, with the lock held."""
    cache = make()
    cache.set("n", 1)
    told: list[type[BaseException]] = []
    fold = cache._store.shared_settings.follow

    def interrupting() -> None:
        for change in (lambda: cache.set("inner", b"1"), lambda: cache.incr("n"), lambda: cache.delete("n")):
            try:
                change()
            except BaseException as error:
                told.append(type(error))
        fold()

    cache._store.shared_settings.follow = interrupting  # type: ignore[method-assign]
    assert cache.incr("n") == 2
    del cache._store.shared_settings.follow  # type: ignore[attr-defined]
    assert set(told) == {Reentered} and len(told) >= 3
    assert cache.get("inner") is None and cache.get("n") == 2
    assert cache.set("inner", b"1") and cache.check() == []


REENTRANT = """
import gc, signal, sys
from yatagarasu_cache import CacheError, DiskCache
cache = DiskCache(sys.argv[1], size_limit=64 << 20)
how, count = sys.argv[2], 0
def use(*_):
    global count
    count += 1
    try:
        cache.set(f"s{count % 50}", b"x" * 10)
    except CacheError:
        pass
class Finalized:
    def __init__(self): self.me = self
    __del__ = use
if how == "signal":
    signal.signal(signal.SIGALRM, use)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
else:
    gc.set_threshold(50)
for _ in range(800):
    if how == "del":
        Finalized()
    cache.incr("n")
signal.setitimer(signal.ITIMER_REAL, 0)
gc.disable()
cache.close()
print(count > 10)
"""


@pytest.mark.parametrize("how", ["signal", "del"])
def test_handlers_and_destructors_that_use_the_cache(directory: Path, how: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REENTRANT, str(directory), how],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0] for process in processes] == [b"True\n"] * 2
    with DiskCache(directory) as cache:
        assert cache["n"] == 1600 and cache.check() == []


class UsesTheCache(logging.Handler):
    """It lets another process and a thread store something, which are waited for; itself it may not."""

    def __init__(self, cache: DiskCache) -> None:
        super().__init__()
        self.cache, self.refused = cache, 0

    def emit(self, record: logging.LogRecord) -> None:
        for change in (lambda: self.cache.set("last", b"plain"), lambda: self.cache.set("last", "text"),
                       lambda: self.cache.delete("k")):  # fmt: skip
            try:
                change()
            except Reentered:
                self.refused += 1
        code = "import sys; from yatagarasu_cache import DiskCache; DiskCache(sys.argv[1]).set('other', b'1')"
        run_python(code, self.cache.directory)
        thread = threading.Thread(target=self.cache.set, args=("last warning", record.getMessage()))
        thread.start()
        thread.join()


def test_a_logging_handler_runs_outside_of_every_lock(make: Make) -> None:
    cache = make()
    cache.set("k", b"some value" * 10)
    cache.close()
    for path in (Path(cache.directory) / f.SEGMENTS_NAME).iterdir():
        path.write_bytes(path.read_bytes().replace(b"some value", b"some VALUE"))
    cache = make()
    handler = UsesTheCache(cache)
    log = logging.getLogger("yatagarasu_cache")
    log.addHandler(handler)
    try:
        assert cache.get("k") is None
    finally:
        log.removeHandler(handler)
    assert handler.refused == 3
    assert "checksum" in cache["last warning"] and cache["other"] == b"1"
    assert cache.set("last", b"plain") and not cache._store.notices.telling


def test_a_logging_handler_that_fails_is_not_ours(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make()

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("handler")

    log, handler = logging.getLogger("yatagarasu_cache"), Failing()
    log.addHandler(handler)
    try:
        cache._store.notices.log_once("corrupt", "a line")
    finally:
        log.removeHandler(handler)
    assert "RuntimeError: handler" in capsys.readouterr().err


# -- interruptions ------------------------------------------------------------------------------


def test_an_interruption_as_the_lock_is_had(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        real(fd, how)
        if how & fcntl.LOCK_EX:
            raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyboardInterrupt):
        cache.incr("n")
    monkeypatch.undo()
    run_python(
        "import sys; from yatagarasu_cache import DiskCache; DiskCache(sys.argv[1], lock_timeout=5).set('a', 1)",
        cache.directory,
    )
    assert cache["a"] == 1


# -- forks that tell nobody ---------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a fork past the interpreter")
@pytest.mark.parametrize("told_by", ["a wiped page", "the process id"])
def test_a_fork_without_hooks(directory: Path, backend: str, told_by: str) -> None:
    """What uWSGI does: the child is exact, whatever it begins with."""
    code = """
import ctypes, mmap, os, sys
if sys.argv[3] == "the process id":
    class Map(mmap.mmap):
        def madvise(self, option, *part):
            if option == 18: raise OSError(22, "no such thing in this kernel")
            return super().madvise(option, *part)
    mmap.mmap = Map
from yatagarasu_cache import DiskCache
from yatagarasu_cache.concurrency import forks
assert forks._own[0] == (sys.argv[3] == "a wiped page")
cache = DiskCache(sys.argv[1], backend=sys.argv[2])
cache.set("warm", 1)
pids = []
for child in range(3):
    pid = ctypes.PyDLL(None).fork()
    if not pid:
        pids = None
        break
    pids.append(pid)
name = os.getpid()
for i in range(400):
    if child == 1: cache.get("warm")
    cache.set((name, i), b"x" * 100)
    cache.incr("n")
lost = sum(cache.get((name, i)) != b"x" * 100 for i in range(400))
if pids is None: os._exit(lost > 0)
assert not lost
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
assert cache["n"] == 1600 and len(cache) == 1602, (cache["n"], len(cache))
assert cache.check() == []
"""
    run_python(code, str(directory), backend, told_by)


# -- files that are removed ---------------------------------------------------------------------

WORKER = """
import sys
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1], size_limit=64 << 20)
cache.set("first of " + sys.argv[2], b"1")
print("ready", flush=True)
sys.stdin.readline()
for i in range(500):
    cache.incr("n")
    cache.set(f"{sys.argv[2]}{i}", sys.argv[2].encode() * 30)
lost = sum(cache.get(f"{sys.argv[2]}{i}") != sys.argv[2].encode() * 30 for i in range(500))
cache.close()
sys.exit(lost > 0)
"""


def worker(directory: Path, name: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(directory), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("what", ["index", "lock", "writers", "users", "checkpoint.lock", "reclaim.lock", "settings"])
def test_a_file_removed_while_it_is_in_use(directory: Path, what: str) -> None:
    """One process has it open, the other comes later: both see the same, and nothing is lost."""
    DiskCache(directory, size_limit=64 << 20).close()
    first = worker(directory, "a")
    paths = [directory / what] if what != "writers" else list((directory / what).iterdir())
    for path in paths:
        path.unlink(missing_ok=what in ("checkpoint.lock", "reclaim.lock"))
    second = worker(directory, "b")
    for process in (first, second):
        process.communicate(b"go\n", timeout=120)
    assert [first.returncode, second.returncode] == [0, 0]
    with DiskCache(directory) as cache:
        assert cache["n"] == 1000
        assert all(cache.get(f"{name}{i}") for name in "ab" for i in range(500))
        assert cache.check() == []


def test_a_removed_index_is_put_back_as_it_was(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cache = make()
    for n in range(100):
        cache.set(n, n)
    cache.get(5)
    before = cache.stats()
    (Path(cache.directory) / "index").unlink()
    time.sleep(2 * LOOK_EVERY)
    cache.set("later", 1)
    assert (Path(cache.directory) / "index").exists()
    after = cache.stats()
    assert (after.hits, after.entries, after.sets) == (before.hits, before.entries + 1, before.sets + 1)
    assert sum("the index was removed" in line for line in caplog.messages) == 1
    assert cache.check() == [] and cache[99] == 99


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("how", ["removed", "replaced", "emptied", "moved away"])
def test_the_directory_goes_while_it_is_in_use(
    make: Make, directory: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = make(size_limit=4 << 20)
    for n in range(300):
        old.set(n, noise(1000, n))
    if how == "emptied":
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "moved away":
        directory.rename(directory.with_name("elsewhere"))
    else:
        shutil.rmtree(directory)
    time.sleep(2 * LOOK_EVERY)
    new = make(size_limit=4 << 20) if how == "replaced" else None
    for n in range(1000, 1300):
        old.set(n, noise(1000, n))
        if new is not None:
            new.set((n,), noise(1000, n))
    new = new or make(size_limit=4 << 20)
    noticed = 1100 if how == "moved away" else 1000  # by who begins another segment; or makes a change
    assert all(new.get(n) == noise(1000, n) for n in range(noticed, 1300))
    if how == "replaced":
        assert all(old.get((n,)) == noise(1000, n) for n in range(1000, 1300))
    assert new.get(5) is None
    assert new.check() == [] and old.check() == []
    assert sum("the cache was removed" in line for line in caplog.messages) == 1


# -- ends of loops, and of flush ----------------------------------------------------------------


def test_pop_of_what_cannot_be_dropped_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    cache.set("k", b"value")
    monkeypatch.setattr(cache._store.reading, "fetch_version", lambda slot: None)
    with pytest.raises(CacheIOError, match="cannot be read, or changes all the time"):
        cache.pop("k")
    monkeypatch.undo()
    assert cache.pop("k") == b"value"


def test_flush_says_what_it_could_not_sync(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(size_limit=16 << 20)
    for n in range(300):
        one.set(n, b"v" * 500)
    one.close()
    other = make(size_limit=16 << 20)
    real = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".seg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    other._store.files.segments.forget_all()
    segment = other._store.current.index.segments()[0]
    other._store.current.index.words[other._store.current.index.entry(segment) + f.T_SYNCED] = 0
    with pytest.raises(CacheIOError, match="cannot make the cache durable"):
        other.flush()
    monkeypatch.undo()
    other.flush()


def test_an_interruption_does_not_keep_others_from_opening(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes where the shared lock of all users is to be taken again."""
    from yatagarasu_cache.store import owners

    cache = make()
    users = cache._store.users

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owners, "share", interrupted)
            users.is_alone()
        fd = os.open(directory / f.USERS_NAME, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nor did it lose its own
        finally:
            os.close(fd)
