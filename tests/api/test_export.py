"""`export`: the figures of caches over HTTP, from a process that touches nothing."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_top import state

pytest.importorskip("prometheus_client")

from yatagarasu_cache import DiskCache, cli

PROGRAM = [sys.executable, "-m", "yatagarasu_cache", "export"]


class Server:
    def __init__(self, *args: object) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, args), "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        while "serving" not in self.said:
            assert self.process.stderr
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        (self.url,) = re.findall(r"http://\S+", self.said)

    def figures(self) -> dict[tuple[str, str], float]:
        """By name and label."""
        with urllib.request.urlopen(self.url, timeout=60) as answer:
            text = answer.read().decode()
        found = re.findall(r'^(\w+)\{cache="([^"]*)"\} (\S+)$', text, re.MULTILINE)
        return {(name, label): float(value) for name, label, value in found}

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=60)[1]
        return self.process.returncode


@pytest.fixture
def serve() -> Iterator[Any]:
    started = list[Server]()

    def start(*args: object) -> Server:
        started.append(Server(*args))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_figures_are_served_and_nothing_is_touched(serve: Any, tmp_path: Path) -> None:
    with DiskCache(tmp_path / "one", size_limit=1 << 26) as one, DiskCache(tmp_path / "two") as two:
        one.set("k", b"v")
        one.get("k")
        one.get("missing")
        two.set_many({1: 1, 2: 2})
        one.stats()
        before = state(tmp_path)
        server = serve(tmp_path / "one", tmp_path / "two")
        found = server.figures()
        assert state(tmp_path) == before
        at = str(tmp_path / "one")
        assert found["yatagarasu_cache_hits_total", at] == found["yatagarasu_cache_misses_total", at] == 1
        assert found["yatagarasu_cache_limit_bytes", at] == 1 << 26
        assert found["yatagarasu_cache_entries", str(tmp_path / "two")] == 2
        one.set("other", b"v")
        assert server.figures()["yatagarasu_cache_entries", at] == 2
    assert server.end() == 0 and "Traceback" not in server.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_end_it_in_order(serve: Any, tmp_path: Path, number: int) -> None:
    DiskCache(tmp_path / "cache").close()
    server = serve(tmp_path / "cache", "--name", "site")
    assert server.figures()["yatagarasu_cache_entries", "site"] == 0
    assert server.end(number) == 0 and "Traceback" not in server.said


def test_a_cache_appears_when_it_does_and_may_go_again(serve: Any, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    server = serve(place, "--name", "late")
    assert "not there yet" in server.said and server.figures() == {}
    with DiskCache(place) as cache:
        cache["k"] = b"v"
        assert server.figures()["yatagarasu_cache_entries", "late"] == 1
    shutil.rmtree(place)
    assert server.figures() == {}
    with DiskCache(place) as cache:
        assert server.figures()["yatagarasu_cache_entries", "late"] == 0
    assert server.end() == 0


def test_a_port_that_is_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["export", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a", "b", "--port", "0", "--name", "x"], "there are 2 caches and 1 names"),
        (["a", "b", "--port", "0", "--name", "x", "--name", "x"], "the same label"),
        (["a", "a", "--port", "0"], "the same label"),
        (["a", "--port", "65536"], "not a port"),
        (["a"], "--port"),
        (["a", "--port", "0", "--host", "no such host"], "cannot serve on port 0 of no such host"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert cli.main(["export", *args]) == 2
    assert said in capsys.readouterr().err


def test_without_prometheus_client_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert cli.main(["export", str(tmp_path), "--port", "0"]) == 2
    assert "pip install 'yatagarasu_cache[prometheus]'" in capsys.readouterr().err
