"""What people run, with the real servers: nothing is lost or evicted that fits, counters are exact, no log
has a traceback, and after workers were killed in the middle `check` finds nothing.

The applications are the files in the guide's section on deployments; programs that need a process of
their own are in tests/apps.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from apps.stock import MIB, fill, stock
from helpers import ROOT, noise
from test_docs import GUIDE, blocks

from yatagarasu_cache import DiskCache

APPS = ROOT / "tests" / "apps"
LIMIT = 64 * MIB
PATIENCE = 40.0  # seconds after which what does not come is a failure
USES_MISSING = 256  # of a process that was killed, at most
FILES = {block.marker[6:]: block.code for block in blocks(GUIDE) if block.marker.startswith("file: ")}
SOUND = {"lost": [], "evictions": 0, "corrupt": 0, "problems": []}


# -- what all of them need ---------------------------------------------------------------------


def write_example(name: str, place: Path, **changes: str) -> None:
    """A file of the guide, with other settings: its directory and its limit are the reader's."""
    code = FILES[name]
    for old, new in changes.items():
        assert code.count(old) == 1, f"{name}: {old}"
        code = code.replace(old, new)
    (place / name).write_text(code, encoding="utf-8")


def environment(place: Path) -> dict[str, str]:
    """For processes that import this very package, the applications, and what is in `place`."""
    # What is installed beside it too: uWSGI reloads with the interpreter that the environment was made of.
    installed = sysconfig.get_path("platlib")
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests"), str(place), installed]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**ours, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HOME": str(place)}


def finish(process: subprocess.Popen[Any]) -> None:
    """Nobody of its session outlives the test."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(place: Path, *command: object, status: int = 0, **variables: str) -> str:
    """What a program says on standard output. It must end so, and without a traceback."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=place, env=environment(place) | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        said, complained = process.communicate(timeout=100)
    finally:
        finish(process)
    assert process.returncode == status, f"exit status {process.returncode}\n{said}\n{complained}"
    assert "Traceback" not in complained, complained
    return said


def run_app(place: Path, name: str, *arguments: object) -> dict[str, Any]:
    """What a program of tests/apps says in its last line."""
    answer: dict[str, Any] = json.loads(run(place, APPS / name, *arguments).splitlines()[-1])
    return answer


def state(cache: DiskCache, expected: dict[Any, Any]) -> dict[str, Any]:
    """To be compared with SOUND."""
    lost = [key for key, value in expected.items() if cache.get(key) != value]
    stats = cache.stats()
    found = {"lost": lost, "evictions": stats.evictions, "corrupt": stats.corrupt, "problems": cache.check()}
    if len(lost) > 10:  # as many as one wants to read
        found["lost"] = [f"{len(lost)} of {len(expected)}", *lost[:3]]
    return found


def sound(directory: Path, expected: dict[Any, Any]) -> None:
    with DiskCache(directory) as cache:
        assert state(cache, expected) == SOUND


def eventually(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory whose name is short enough for the sockets of a kernel."""
    path = Path(tempfile.mkdtemp(prefix="yc-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)  # a process that is being killed may still write


@pytest.fixture
def directory(place: Path) -> Path:
    return place / "cache"


# -- the table of what emptied caches ----------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "how"),
    [
        (64 * MIB, "inherited"),
        (256 * MIB, "inherited"),
        (64 * MIB, "opened"),
        pytest.param(256 * MIB, "opened", marks=pytest.mark.slow),
    ],
)
def test_a_process_for_every_task(limit: int, how: str, place: Path, directory: Path) -> None:
    """300 processes that store one small value and leave: Celery, `max_requests`, `maxtasksperchild`."""
    tasks = 300
    answer = run_app(place, "prefork.py", directory, limit, tasks, how)
    assert answer["statuses"] == [0] * tasks
    expected: dict[Any, Any] = stock(limit // 10, 200)
    expected |= {("new", number): noise(2000, number) for number in range(tasks)}
    for number, acknowledged in answer["killed"].items():
        expected |= {("busy", int(number), turn): noise(2000, turn) for turn in range(acknowledged)}
    sound(directory, {**expected, "tasks": tasks})


@pytest.mark.parametrize(
    ("limit", "processes", "how"),
    [
        (64 * MIB, 64, "opened"),
        (64 * MIB, 64, "inherited"),
        (256 * MIB, 64, "opened"),
        pytest.param(64 * MIB, 256, "inherited", marks=pytest.mark.slow),
        pytest.param(1024 * MIB, 256, "opened", marks=pytest.mark.slow),
    ],
)
def test_many_writers_at_once(limit: int, processes: int, how: str, place: Path, directory: Path) -> None:
    """All alive at once, in a cache that is half full: 50 small values each."""
    answer = run_app(place, "writers.py", directory, limit, processes, how)
    assert set(answer["statuses"]) == {0}
    expected: dict[Any, Any] = stock(limit // 2, 2000)
    turns = {0: answer["acknowledged"], **dict.fromkeys(range(1, processes), 50)}
    expected |= {("new", n, turn): noise(200, turn) for n, count in turns.items() for turn in range(count)}
    with DiskCache(directory) as cache:
        assert state(cache, expected) == SOUND
        assert 0 <= cache["sets"] - sum(turns.values()) <= 1  # the one that was killed may not have said so


@pytest.mark.parametrize("how", ["kept", "dropped", "pickled", "asynchronous"])
@pytest.mark.parametrize("limit", [64 * MIB, 10240 * MIB])
def test_handles_that_nobody_closes(limit: int, how: str, place: Path, directory: Path) -> None:
    """500 in one process: descriptors and memory as for a few."""
    expected = fill(directory, limit, 6 * MIB, 200)
    answer = run_app(place, "handles.py", directory, limit, 500, how)
    assert answer["all"]["descriptors"] <= answer["few"]["descriptors"] + 5
    assert answer["all"]["memory"] <= answer["few"]["memory"] + 16 * MIB
    sound(directory, {**expected, **{("new", number): noise(2000, number) for number in range(500)}})


def test_a_script_with_another_limit(place: Path, directory: Path) -> None:
    """Looking evicts nothing; the next write evicts the longest unused, as far as the new limit asks."""
    expected = fill(directory, 1024 * MIB, 300_000_000, 300)
    script = place / "script.py"
    script.write_text(
        "import sys\n"
        "from yatagarasu_cache import DiskCache\n"
        "with DiskCache(sys.argv[1], size_limit=64 << 20) as cache:\n"
        "    assert cache.get(('old', 7)) is not None\n"
        "    if len(sys.argv) > 2:\n"
        "        cache.set('new', b'small')\n"
    )
    run(place, script, directory)
    with DiskCache(directory) as cache:
        assert (len(cache), cache.stats().evictions) == (300, 0)
    run(place, script, directory, "write")
    with DiskCache(directory) as cache:
        assert cache["new"] == b"small"
        left = [key[1] for key in cache if key != "new"]
        assert 7 in left  # it was used
        assert 45 <= len(left) <= 64  # about 54 fit
        assert sorted(set(left) - {7}) == list(range(301 - len(left), 300))
        assert all(cache.get(("old", number)) == expected["old", number] for number in left)
        assert cache.volume() <= 64 * MIB
        assert cache.check() == []


# -- web servers -------------------------------------------------------------------------------


class Server:
    """`python -m` a server, on a socket that listens before it starts: nobody has to wait for it.

    `program`: what is run instead, from beside the interpreter.
    """

    def __init__(self, place: Path, *command: str, program: str = "") -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address: tuple[str, int] = self._socket.getsockname()
        self._log = place / "server.log"
        number = self._socket.fileno()
        run = [str(Path(sys.executable).with_name(program))] if program else [sys.executable, "-m"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*run, *(part.format(fd=number) for part in command)], cwd=place,
                env=environment(place), pass_fds=[number], stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        finish(self.process)
        self._socket.close()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> list[int]:
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if _is_worker(child)]

    def kill_a_worker(self) -> None:
        os.kill(self.workers()[0], signal.SIGKILL)

    def kill_the_master(self) -> list[int]:
        """Its workers, which are on their own now."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        return workers

    def loaded(self, directory: Path) -> bool:
        """Whether every worker has opened the cache in `directory`."""
        index = str(directory.resolve() / "index")
        try:
            return all(
                any(mapped.path == index for mapped in psutil.Process(worker).memory_maps(grouped=False))
                for worker in self.workers()
            )
        except psutil.Error:  # one has just ended
            return False

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """In order; what it wrote has no traceback."""
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log
        self.no_traceback()

    def no_traceback(self) -> None:
        assert "Traceback" not in self.log, self.log


def _is_worker(child: psutil.Process) -> bool:
    try:
        return child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    except psutil.Error:
        return False


class Load:
    """Requests by a few threads at once, each with a connection of its own; what was acknowledged."""

    THREADS = 4

    def __init__(self, server: Server) -> None:
        self.server = server
        self._lock = threading.Lock()
        self._paths: Iterator[str] = iter(())
        self._events: dict[int, Callable[[], object]] = {}
        self._errors: list[str] = []
        self.acknowledged: Counter[str] = Counter()
        self.broken = 0  # connections that a dying worker took along: asked for again

    def run(self, paths: Iterable[str], events: dict[int, Callable[[], object]] | None = None) -> Load:
        """All of them, and `events` as soon as so many of all have been answered."""
        self._paths, self._events = iter(paths), events or {}
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "requests hang"
        assert not self._errors, "\n".join([*self._errors[:3], self.server.log])
        assert not self._events, "not everything happened"
        return self

    def _work(self) -> None:
        try:
            while (path := self._next()) is not None:
                self._check(path, self._ask(path))
        except Exception as error:
            self._errors.append(repr(error))

    def _next(self) -> str | None:
        with self._lock:
            return next(self._paths, None)

    def _ask(self, path: str) -> tuple[int, bytes]:
        for _ in range(20):
            connection = http.client.HTTPConnection(*self.server.address, timeout=PATIENCE / 2)
            try:
                connection.request("GET", path, headers={"Connection": "close"})
                response = connection.getresponse()
                return response.status, response.read()
            except (ConnectionError, http.client.HTTPException):
                with self._lock:
                    self.broken += 1
            finally:
                connection.close()
        raise AssertionError(f"{path} is never answered")

    def _check(self, path: str, answer: tuple[int, bytes]) -> None:
        wanted = b"50" if path == "/gets" else f"<h1>{path}</h1>".encode()
        assert answer == (200, wanted), (path, answer)
        with self._lock:
            self.acknowledged[path] += 1
            event = self._events.pop(self.acknowledged.total(), None)
        if event is not None:
            event()

    def verify(self, directory: Path, expected: dict[Any, Any], deaths: int) -> None:
        """Every page is there, and every view was counted, once."""
        assert self.broken <= deaths * self.THREADS
        pages = {path: f"<h1>{path}</h1>".encode() for path in self.acknowledged}
        with DiskCache(directory) as cache:
            assert state(cache, {**expected, **pages}) == SOUND
            beyond = {path: cache[("views", path)] - views for path, views in self.acknowledged.items()}
            assert min(beyond.values()) >= 0, "views are lost"
            assert sum(beyond.values()) <= self.broken, "views were counted twice"


def pages(count: int) -> list[str]:
    """Paths of so many requests; each is asked for several times."""
    return [f"/page/{number * 7 % (count // 3)}" for number in range(count)]


SETTINGS = {"4 * 2**30": str(LIMIT)}


def gunicorn(place: Path, directory: Path, app: str, *options: str) -> Server:
    pytest.importorskip("gunicorn")
    write_example("pages.py", place, **SETTINGS, **{"/var/cache/pages": str(directory)})
    shutil.copy(APPS / "probe.py", place)
    return Server(place, "gunicorn", "--bind", "fd://{fd}", *options, app)


KINDS = {"sync": ["--worker-class", "sync"], "gthread": ["--worker-class", "gthread", "--threads", "4"]}


@pytest.mark.parametrize("preload", [["--preload"], []], ids=["preloaded", "not-preloaded"])
@pytest.mark.parametrize("kind", KINDS)
def test_gunicorn(kind: str, preload: list[str], place: Path, directory: Path) -> None:
    """Workers that are recycled all the time, a reload, one that is killed, and an end in order."""
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    requests, recycled = (600, 10) if preload else (300, 25)
    options = [*KINDS[kind], *preload, "--workers", "3", "--max-requests", str(recycled)]
    with gunicorn(place, directory, "pages:app", *options) as server:
        load = Load(server).run(
            pages(requests), {requests // 3: server.reload, requests * 2 // 3: server.kill_a_worker}
        )
        server.stop()
        assert server.log.count("Booting worker") >= requests // recycled // 2
    load.verify(directory, expected, deaths=1)


@pytest.mark.parametrize(
    "preload",
    [pytest.param(["--preload"], id="preloaded"), pytest.param([], id="not-preloaded", marks=pytest.mark.slow)],
)
def test_gunicorn_whose_master_is_killed(preload: list[str], place: Path, directory: Path) -> None:
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    # Orphans look for their parent twice in a timeout.
    with gunicorn(place, directory, "pages:app", "--workers", "4", "--timeout", "6", *preload) as server:
        load = Load(server).run(pages(300))
        eventually(lambda: len(server.workers()) == 4, "all of its workers")
        workers = server.kill_the_master()
        eventually(lambda: not any(map(psutil.pid_exists, workers)), "the end of its workers")
        server.no_traceback()
    # A server that is started after that goes on with what is there.
    with gunicorn(place, directory, "pages:app", "--workers", "2", *preload) as server:
        load.server = server
        load.run(pages(300))
        server.stop()
    load.verify(directory, expected, deaths=1)


@pytest.mark.parametrize("preload", [["--preload"], []], ids=["preloaded", "not-preloaded"])
@pytest.mark.parametrize("end", ["in-order", "killed"])
def test_uses_by_workers_are_counted(end: str, preload: list[str], place: Path, directory: Path) -> None:
    """Hits and misses of processes that never close their handle."""
    workers, requests = 4, 120
    fill(directory, LIMIT, LIMIT // 10, 200)
    with gunicorn(place, directory, "probe:app", "--workers", str(workers), *preload) as server:
        Load(server).run(["/gets"] * requests)
        missing = workers * USES_MISSING
        with DiskCache(directory) as cache:
            assert 0 <= uses_missing(cache, requests) <= missing
        if end == "in-order":
            server.stop()
            missing = 0
    with DiskCache(directory) as cache:
        assert 0 <= uses_missing(cache, requests) <= missing
        assert cache.check() == []


@pytest.mark.parametrize("lazy", [[], ["--lazy-apps"]], ids=["preloaded", "lazy"])
@pytest.mark.parametrize("hooks", [[], ["--py-call-uwsgi-fork-hooks"]], ids=["no-hooks", "hooks"])
def test_uwsgi(hooks: list[str], lazy: list[str], place: Path, directory: Path) -> None:
    """It forks in C, and does not tell Python unless it is asked to.

    Without preloading it waits for up to a minute before it replaces workers that it recycles that fast.
    """
    pytest.importorskip("pyuwsgi")
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    write_example("pages.py", place, **SETTINGS, **{"/var/cache/pages": str(directory)})
    options = [
        "--master", "--processes", "3", "--enable-threads", "--die-on-term", "--module", "pages:app",
        "--worker-reload-mercy", "5", "--disable-logging", *lazy, *hooks,
    ]  # fmt: skip
    if not lazy:
        options += ["--max-requests", "25", "--min-worker-lifetime", "1"]
    with Server(place, "--http-socket", "fd://{fd}", *options, program="pyuwsgi") as server:
        load = Load(server).run(pages(300), {200: server.kill_a_worker})
        if not lazy:
            load.run(pages(300), {400: server.reload})
        # Until the application is loaded Python has a handler of its own for the signal that ends a worker.
        eventually(lambda: server.loaded(directory), "workers with the cache open")
        server.stop()
    load.verify(directory, expected, deaths=3)


def uses_missing(cache: DiskCache, requests: int) -> int:
    """How many uses by `/gets` are not in the totals: half of them were hits."""
    stats = cache.stats()
    assert stats.hits <= requests * 50 and stats.misses <= requests * 50
    return requests * 100 - stats.hits - stats.misses


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_uvicorn(lifespan: str, place: Path, directory: Path) -> None:
    """An asynchronous cache, opened in the lifespan or by the first request and never closed."""
    pytest.importorskip("uvicorn")
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    write_example("feed.py", place, **SETTINGS, **{"/var/cache/feed": str(directory)})
    options = ["--workers", "3", "--lifespan", lifespan, "--log-level", "warning"]
    with Server(place, "uvicorn", "--fd", "{fd}", *options, "feed:app") as server:
        load = Load(server).run(pages(300), {150: server.kill_a_worker})
        eventually(lambda: len(server.workers()) == 3, "a worker in place of the one that was killed")
        load.run(pages(600), {450: server.reload, 700: server.kill_a_worker})
        server.stop()
    load.verify(directory, expected, deaths=2)


# -- pools -------------------------------------------------------------------------------------


METHODS = ["fork", "spawn", "forkserver"]


def test_the_guides_pool(place: Path) -> None:
    """As it stands there."""
    write_example("thumbnails.py", place)
    run(place, "thumbnails.py")
    names = [f"photo-{number}.jpg" for number in range(200)]
    sound(place / "thumbnails", {name: name.encode() * 100 for name in names})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["executor", "recycled", "attribute", "uses"])
def test_pools(pool: str, method: str, place: Path, directory: Path) -> None:
    """`pool.map(thumbnail, [cache] * n, names)`, a process for every task, a `Process` with a cache."""
    tasks = 200 if pool != "recycled" or method == "fork" else 15  # a new interpreter takes long to start
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    write_example("thumbnails.py", place)
    answer = run_app(place, "pools.py", directory, method, pool, tasks)
    assert answer == {"made": tasks}
    names = [f"photo-{number}.jpg" for number in range(tasks)]
    sound(directory, {**expected, **{name: name.encode() * 100 for name in names}})


# -- pytest-xdist ------------------------------------------------------------------------------


XDIST = """
import os, signal, time
import pytest
from yatagarasu_cache import DiskCache

@pytest.fixture(scope="session")
def shared():
    with DiskCache("test-cache", size_limit=2**26) as cache:
        yield cache

@pytest.mark.parametrize("number", range(120))
def test_entry(cache, shared, number):
    if number == 60:
        time.sleep(0.5)  # until the results of this process are known
        os.kill(os.getpid(), signal.SIGKILL)
    cache.set(number, bytes(2000))
    shared.incr("tests")
    assert shared.get(number) == bytes(2000)

@pytest.mark.parametrize("number", range(40))
def test_own(tmp_path, number):
    with DiskCache(tmp_path / "cache") as cache:
        cache[number] = number
        assert len(cache) == 1
"""


def test_xdist(place: Path) -> None:
    """Fixtures that open one directory in four processes, one of which dies in the middle."""
    pytest.importorskip("xdist")
    directory = place / "test-cache"
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    write_example("conftest.py", place)
    (place / "pytest.ini").write_text("[pytest]\n")
    (place / "test_it.py").write_text(XDIST)
    options = ["-q", "-n", "4", "-p", "xdist.plugin", "-p", "no:cacheprovider", "-W", "error", "--basetemp", "tmp"]
    said = run(place, "-m", "pytest", *options, status=1, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 failed, 159 passed" in said and "crashed while running" in said, said
    expected |= {number: bytes(2000) for number in range(120) if number != 60}
    sound(directory, {**expected, "tests": 119})


# -- a notebook --------------------------------------------------------------------------------


class Kernel:
    """An ipykernel and its client, connected by sockets in a directory."""

    def __init__(self, place: Path) -> None:
        manager = pytest.importorskip("jupyter_client.manager")
        pytest.importorskip("ipykernel")
        self._manager = manager.KernelManager(
            kernel_name="python3", transport="ipc", ip=str(place / "k"), connection_file=str(place / "k.json")
        )
        self._manager.start_kernel(cwd=str(place), env=environment(place))
        self.connect()

    def connect(self) -> None:
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE)

    def end(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()

    def run(self, code: str) -> Any:
        """The value of its last line, which must be of plain types. It must not fail."""
        *lines, last = code.strip().splitlines()
        code = "\n".join([*lines, f"_answer = {last}"]) if lines or last else code
        reply = self._client.execute_interactive(
            code, user_expressions={"answer": "_answer"}, timeout=PATIENCE, output_hook=lambda _: None
        )
        content = reply["content"]
        assert content["status"] == "ok", f"{content['ename']}: {content['evalue']}"
        return eval(content["user_expressions"]["answer"]["data"]["text/plain"])

    def begin(self, code: str) -> str:
        """Have it run, and return when it has printed something: the request's id."""
        # It will be interrupted: a kernel aborts what is asked for just after an error, unless it is told not to.
        request: str = self._client.execute(code, stop_on_error=False)
        while True:
            message = self._client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == request and message["msg_type"] == "stream":
                return request

    def interrupt(self, request: str) -> str:
        """What that raises."""
        self._manager.interrupt_kernel()
        while True:
            reply = self._client.get_shell_msg(timeout=PATIENCE)
            if reply["parent_header"].get("msg_id") == request:
                return str(reply["content"]["ename"])

    def kill(self) -> None:
        """And start it anew, as `restart` does in a notebook."""
        self._client.stop_channels()
        self._manager.restart_kernel(now=True)
        self.connect()


KEYS = 500  # that a loop goes round
LOOP = """
done = 0
while True:
    cache.set(("loop", {turn}, done % 500), bytes(2000))
    cache.incr("sets")
    done += 1
    if done == 50:
        print("begun", flush=True)
"""


@pytest.fixture
def kernel(place: Path) -> Iterator[Kernel]:
    kernel = Kernel(place)
    try:
        yield kernel
    finally:
        kernel.end()


def test_a_notebook(kernel: Kernel, place: Path) -> None:
    """A cell that is run a hundred times, interrupts in the middle of a loop, and a kernel that is killed."""
    directory = place / "features"
    expected = fill(directory, LIMIT, LIMIT // 10, 200)
    write_example("cell.py", place, **{"2**30": str(LIMIT)})
    cell = (place / "cell.py").read_text() + "len(__import__('os').listdir('/dev/fd'))"
    descriptors = [kernel.run(cell) for _ in range(100)]
    assert descriptors[-1] <= descriptors[4] + 5
    sets = 0
    for turn in range(4):
        assert kernel.interrupt(kernel.begin(LOOP.format(turn=turn))) == "KeyboardInterrupt"
        done = kernel.run("done")
        assert done >= 50
        expected |= {("loop", turn, number): bytes(2000) for number in range(min(done, KEYS))}
        sets += done
        assert 0 <= kernel.run("cache['sets']") - sets <= turn + 1
    kernel.begin(LOOP.format(turn=9))
    kernel.kill()
    expected |= {("loop", 9, number): bytes(2000) for number in range(50)}
    kernel.run(cell)
    sound(directory, {**expected, "runs": 101, ("features", "train"): {"rows": 1000, "mean": 0.5}})


# -- the examples ------------------------------------------------------------------------------


def test_every_file_of_the_guide_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert FILES and all(f'write_example("{name}"' in source for name in FILES)
