"""`top`: it shows what a cache does, touches nothing, and goes on whatever becomes of the cache."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import DiskCache, cli
from yatagarasu_cache.cli import top
from yatagarasu_cache.cli.watching import PROCESSES_EVERY, SAMPLE, TOLD_FOR, View, Watched
from yatagarasu_cache.store import sampling

PROGRAM = [sys.executable, "-m", "yatagarasu_cache"]
WITHOUT_RICH = [
    sys.executable, "-c",
    "import sys; sys.modules['rich'] = sys.modules['rich.live'] = None\n"
    "from yatagarasu_cache.cli import main; sys.exit(main())",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Of a cache with some entries."""
    path = tmp_path / "cache"
    with DiskCache(path, size_limit=1 << 26) as cache:
        fill(cache)
    return path


def fill(cache: DiskCache) -> None:
    cache.set_many({f"img/{number}": bytes(100) for number in range(30)}, tag="img")
    cache.set_many({("user", number): number for number in range(10)})


@pytest.fixture
def view(place: Path, backend: str) -> Iterator[View]:
    found = View(Watched(str(place), backend=backend))
    yield found
    found.watched.close()


def state(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Of each file and directory: when it was changed, its inode, and what is in it."""
    found = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(os.listdir(path))
        found[str(path.relative_to(directory))] = (status.st_mtime_ns, status.st_ino, content)
    return found


# -- what it touches ---------------------------------------------------------------------------


@pytest.mark.parametrize("in_use", [False, True])
def test_looking_touches_nothing(place: Path, backend: str, in_use: bool) -> None:
    user = DiskCache(place, backend="threads") if in_use else None
    if user is not None:
        assert user.get("img/1") == bytes(100) and user.stats().hits == 1
    before = state(place)
    found = View(Watched(str(place), backend=backend))
    for at in range(3):
        found.refresh(float(at))
    assert found.look.stats is not None and found.sampled == 40
    found.watched.close()
    assert state(place) == before
    if user is not None:
        stats = user.stats()
        assert (stats.hits, stats.misses, stats.sets) == (1, 0, 40)
        user.close()


def test_the_command_touches_nothing(place: Path) -> None:
    before = state(place)
    done = subprocess.run(
        [*PROGRAM, "top", str(place), "--once", "--interval", "0.1"], capture_output=True, text=True, check=True
    )
    assert "img/ 75% (~30)" in done.stdout and done.stderr == ""
    assert state(place) == before


def test_looking_is_not_in_the_way_of_writers(place: Path, view: View) -> None:
    """Not even of one who waits for nobody, and needs the cache for himself when he closes it."""
    view.refresh(0.0)
    with DiskCache(place, lock_timeout=0.001) as user:
        for number in range(50):
            user[f"new/{number}"] = b"x"
            view.refresh(1.0 + number)
        user.clear()
        assert user._store.users.is_alone()
    assert not (place / "writers").exists() or not list((place / "writers").iterdir())


# -- what it shows -----------------------------------------------------------------------------


def test_rates_come_from_two_looks(place: Path, view: View) -> None:
    with DiskCache(place) as user:
        view.refresh(0.0)
        assert view.rates.seconds == 0.0 and view.rows()
        for number in range(30):
            user.get(f"img/{number}")
        user.get("missing")
        user["img/x"] = bytes(300)
        user.delete("img/0")
        user.stats()  # counts what was got
        view.refresh(2.0)
        now = view.rates
        assert (now.hits, now.misses, now.sets, now.deletes) == (15.0, 0.5, 0.5, 0.5)
        assert view.bytes_read > 15 * 50 and view.bytes_written > 0
        shown = dict(view.rows())
        assert shown["hit ratio"].startswith("96.8% (ever: 96.8%)")
        assert shown["gets"].endswith("/s") and "15.5/s" in shown["gets"] and "█" in shown["gets"]
        assert "img 7" in shown["tags"] and "img/ 7" in shown["prefixes"] and "('user', ...)" in shown["prefixes"]
        assert shown["entries"].startswith("40, ") and "(lru)" in shown["disk"]
        assert "█" not in dict(view.rows(sparklines=False))["gets"]


def test_it_says_that_a_cache_was_emptied_removed_and_made_anew(place: Path, view: View) -> None:
    view.refresh(0.0)
    with DiskCache(place) as user:
        user.clear()
    view.refresh(1.0)
    assert dict(view.rows())["note"] == "emptied"
    view.refresh(1.0 + TOLD_FOR)
    assert "note" not in dict(view.rows())
    shutil.rmtree(place)
    view.refresh(20.0)
    assert "no such directory" in dict(view.rows())["state"] and view.rates.seconds == 0.0
    assert view.as_dict()["trouble"] and json.dumps(view.as_dict())
    assert not view.watched.sample()
    with DiskCache(place) as user:
        user["k"] = b"v"
        view.refresh(21.0)
        assert dict(view.rows())["note"] == "removed, and made anew"
        assert view.rates.seconds == 0.0 and dict(view.rows())["entries"].startswith("1, ")
        view.refresh(22.0)
        assert view.rates.seconds == 1.0


def test_a_cache_that_is_replaced_between_two_looks_is_another_one(place: Path, view: View) -> None:
    view.refresh(0.0)
    for inside in place.iterdir():  # the directory itself stays
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
    with DiskCache(place) as user:
        user["k"] = b"v"
    view.refresh(1.0)
    assert dict(view.rows())["note"] == "removed, and made anew" and dict(view.rows())["entries"].startswith("1, ")


def test_a_removed_cache_is_not_kept_open(place: Path, view: View) -> None:
    """Else its room on the disk would not come back."""
    view.refresh(0.0)
    shutil.rmtree(place)
    view.refresh(1.0)
    kept = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    assert not [path for path in kept if path.startswith(str(place))]


def test_corruption_is_shown(place: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    view.refresh(0.0)
    look = view.look
    assert look.stats is not None and "corrupt" not in dict(view.rows())
    object.__setattr__(look.stats, "corrupt", 3)
    assert dict(view.rows())["corrupt"].startswith("3: ")


def test_processes_are_asked_for_now_and_then(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr("yatagarasu_cache.cli.watching.processes_of", asked.append)
    for at in (0.0, 1.0, PROCESSES_EVERY - 0.1, PROCESSES_EVERY, PROCESSES_EVERY + 1):
        view.refresh(at)
    assert len(asked) == 2


# -- the sample --------------------------------------------------------------------------------


def test_a_sample_is_bounded_whatever_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many entries, and so many slots: a million of them make it no dearer."""
    with DiskCache(tmp_path / "large", size_limit=1 << 28) as cache:
        cache.set_many(dict.fromkeys(range(20_000), b""))
        looked, real = 0, type(cache._store.current.index).slot

        def counted(index: Any, at: int) -> Any:
            nonlocal looked
            looked += 1
            return real(index, at)

        monkeypatch.setattr(type(cache._store.current.index), "slot", counted)
        found = sampling.sample(cache._store, 100, random.Random(1).randrange)
        assert len(found) == 100 and looked <= 100 * sampling._TRIES
        assert len({names.key for names, _ in found}) == 100
        other = sampling.sample(cache._store, 100, random.Random(2).randrange)
        assert {names.key for names, _ in found} != {names.key for names, _ in other}


def test_a_sample_of_few_is_all_of_them_and_leaves_out_what_has_expired(place: Path) -> None:
    with DiskCache(place) as cache:
        cache.set("short", b"x", expire=0.001)
        cache.set("long", b"x", expire=1000)
        time.sleep(0.01)
        found = sampling.sample(cache._store, SAMPLE, random.Random(1).randrange)
        assert len(found) == 41
        assert (cache.stats().hits, cache.stats().misses) == (0, 0)


# -- the command -------------------------------------------------------------------------------


def test_once_as_json_is_one_object(place: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["top", str(place), "--once", "--json", "--interval", "0.1", "--backend", backend])
    (line,) = capsys.readouterr().out.splitlines()
    (found,) = json.loads(line)["caches"]
    assert code == 0 and found["directory"] == str(place) and found["entries"] == 40
    assert found["seconds"] >= 0.1 and found["per_second"]["gets"] == 0.0 and found["hit_ratio"] is None
    assert {group["name"]: group["entries"] for group in found["tags"]} == {"img": 30, "<none>": 10}
    assert found["sampled"] == 40 and found["processes"] in ([], None)


def test_several_caches_at_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DiskCache(tmp_path / "other").close()
    assert cli.main(["top", str(place), str(tmp_path / "other"), "--once", "--interval", "0.1"]) == 0
    assert capsys.readouterr().out.count("hit ratio") == 2


def test_where_output_is_no_terminal_it_is_printed_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", str(place), "--interval", "0.1"]) == 0
    assert capsys.readouterr().out.count("hit ratio") == 1


def test_lines_of_json_come_until_the_reader_goes(place: Path) -> None:
    command = [*PROGRAM, "top", str(place), "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        for _ in range(2):
            assert len(json.loads(process.stdout.readline())["caches"]) == 1
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "no such directory"), (["CACHE", "nowhere"], "no such directory"),
        (["CACHE", "--interval", "0.01"], "at least 0.1"), (["CACHE", "--interval", "x"], "not a positive time"),
        ([], "CACHE"),
    ],
)  # fmt: skip
def test_wrong_calls(place: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert cli.main(["top", *(str(place) if arg == "CACHE" else arg for arg in args)]) == 2
    assert said in capsys.readouterr().err


def test_a_cache_that_goes_while_it_is_looked_at_once_is_a_no(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(top.time, "sleep", lambda _: shutil.rmtree(place))
    assert cli.main(["top", str(place), "--once"]) == 1
    assert "cannot be looked at" in capsys.readouterr().out


# -- on a terminal -----------------------------------------------------------------------------


class Terminal:
    """A command whose input and output are a terminal."""

    def __init__(self, command: list[str]) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "40"}
        self.process = subprocess.Popen(
            command, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, env=environment
        )
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.shown:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} never came:\n{self.shown}"
            self.read(left)

    def read(self, seconds: float) -> None:
        if select.select([self.ours], [], [], seconds)[0]:
            self.shown += os.read(self.ours, 65536).decode("utf-8", "replace")

    def end(self) -> int:
        """The exit code. What comes last is read, for the terminal holds little."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.05)
        code = self.process.wait(1)
        self.read(0.05)
        return code

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Callable[[list[str]], Terminal]]:
    opened = list[Terminal]()

    def start(command: list[str]) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def press_q(shown: Terminal) -> None:
    os.write(shown.ours, b"xq")


def interrupt(shown: Terminal) -> None:
    shown.process.send_signal(signal.SIGINT)


def terminate(shown: Terminal) -> None:
    shown.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("way", "code"), [(press_q, 0), (interrupt, 130), (terminate, 143)])
def test_the_screen_ends_and_the_terminal_is_as_it_was(
    place: Path, terminal: Callable[[list[str]], Terminal], way: Callable[[Terminal], None], code: int
) -> None:
    pytest.importorskip("rich")
    shown = terminal([*PROGRAM, "top", str(place), "--interval", "0.1"])
    shown.wait_for("q quits")
    assert "hit ratio" in shown.shown and str(place) in shown.shown and "\x1b[?1049h" in shown.shown
    assert not shown.is_restored  # keys are read as they are pressed
    way(shown)
    assert shown.end() == code
    assert shown.is_restored and "\x1b[?1049l" in shown.shown and "Traceback" not in shown.shown


def test_ctrl_c_as_the_screen_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while the first picture is drawn."""
    live = pytest.importorskip("rich.live").Live
    stopped: list[bool] = []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "refresh", interrupted)
    monkeypatch.setattr(live, "stop", lambda self: stopped.append(self.is_started))
    with pytest.raises(KeyboardInterrupt):
        top.screen([], 1.0)
    assert stopped == [True]


def test_the_screen_goes_on_while_the_cache_is_removed_and_made_anew(
    place: Path, terminal: Callable[[list[str]], Terminal]
) -> None:
    pytest.importorskip("rich")
    shown = terminal([*PROGRAM, "top", str(place), "--interval", "0.1"])
    shown.wait_for("q quits")
    shutil.rmtree(place)
    shown.wait_for("cannot be looked at")
    DiskCache(place).close()
    shown.wait_for("made anew")
    press_q(shown)
    assert shown.end() == 0


def test_without_rich_it_says_what_is_missing(place: Path, terminal: Callable[[list[str]], Terminal]) -> None:
    shown = terminal([*WITHOUT_RICH, "top", str(place)])
    assert shown.end() == 2
    assert "pip install 'yatagarasu_cache[cli]'" in shown.shown and shown.is_restored
    done = subprocess.run([*WITHOUT_RICH, "top", str(place), "--once", "--interval", "0.1"], capture_output=True, check=True)
    assert b"hit ratio" in done.stdout
