"""The command line: what it prints, what it returns, and what it must leave alone."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import DiskCache, StorageFull, __version__, cli
from yatagarasu_cache.cli import show, warm

LARGE = 3 * warm.STREAM_FROM + 17


@dataclass
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(backend: str, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs a command in this process on the backend under test."""

    def run(command: str, *args: object) -> Result:
        capsysbinary.readouterr()
        code = cli.main([command, "--backend", backend, *map(str, args)])
        captured = capsysbinary.readouterr()
        return Result(code, captured.out, captured.err.decode())

    return run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with an empty file, a large one and some names that are not plain."""
    root = tmp_path / "tree"
    for name, content in TREE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


TREE = {
    "index.html": b"<html></html>",
    "img/logo.png": bytes(range(256)),
    "img/deep/er/photo.jpg": random.Random(1).randbytes(LARGE),
    "empty": b"",
    "text/with space \u00e9\u70cf.txt": b"crow\n",
}


@pytest.fixture
def open_cache(backend: str) -> Callable[..., DiskCache]:
    return lambda directory, **settings: DiskCache(directory, backend=backend, **settings)


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes, *, tty: bool = False) -> None:
    """Makes `data` this process's standard input."""
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stdin, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)


# -- get, set, delete --------------------------------------------------------------------------


def test_set_creates_and_get_writes_the_bare_value(run: Run, cache: Path) -> None:
    assert run("set", cache, "greeting", "hello \u70cf") == Result(0, b"", "")
    assert run("get", cache, "greeting") == Result(0, "hello \u70cf".encode(), "")


def test_value_argument_is_a_string(run: Run, cache: Path, open_cache: Any) -> None:
    run("set", cache, "key", "42")
    with open_cache(cache) as opened:
        assert opened.get("key") == "42"


def test_options_may_stand_before_the_value(run: Run, cache: Path) -> None:
    assert run("set", cache, "key", "--tag", "t", "value").code == 0
    assert run("set", cache, "--", "-key", "-value").code == 0
    assert run("get", cache, "--", "-key").out == b"-value"


@pytest.mark.parametrize("size", [0, 1, 4096, LARGE])
def test_set_from_file_and_get_to_file(run: Run, cache: Path, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "in").write_bytes(content)
    assert run("set", cache, "key", "-f", tmp_path / "in").code == 0
    assert run("get", cache, "key").out == content
    assert run("get", cache, "key", "-o", tmp_path / "out") == Result(0, b"", "")
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("source", [["-"], ["-f", "-"]])
@pytest.mark.parametrize("size", [0, 100, LARGE])
def test_set_from_standard_input(
    run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch, source: list[str], size: int
) -> None:
    content = random.Random(size).randbytes(size)
    feed(monkeypatch, content)
    assert run("set", cache, "key", *source).code == 0
    assert run("get", cache, "key").out == content
    feed(monkeypatch, content)
    assert run("set", cache, "key", *source, "--length", size).code == 0
    feed(monkeypatch, content + b"more")
    done = run("set", cache, "key", *source, "--length", size)
    assert done.code == 2 and f"length is {size}, and the stream" in done.err
    assert run("get", cache, "key").out == content
    done = run("set", cache, "key", "text", "--length", "4")
    assert done.code == 2 and "--length is for - and -f FILE" in done.err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, "7\n"),
        (1.5, "1.5\n"),
        (None, "null\n"),
        ({"a": [1, "\u00e9"]}, '{"a": [1, "\u00e9"]}\n'),
        ((1, "x"), '[1, "x"]\n'),
        ({"b": b"\x00\xff"}, '{"b": "AP8="}\n'),
        ("", ""),
        ("x" * LARGE, "x" * LARGE),
        (["x" * LARGE], f'["{"x" * LARGE}"]\n'),
    ],
    ids=["int", "float", "None", "dict", "tuple", "bytes inside", "empty", "large str", "large list"],
)
def test_get_of_other_types(run: Run, cache: Path, open_cache: Any, value: object, shown: str) -> None:
    with open_cache(cache) as opened:
        opened.set("key", value)
    assert run("get", cache, "key").text == shown


def test_get_of_a_miss(run: Run, cache: Path, tmp_path: Path) -> None:
    run("set", cache, "key", "value")
    target = tmp_path / "out"
    assert run("get", cache, "other", "-o", target) == Result(
        1, b"", "yatagarasu-cache: not in the cache: other\n"
    )
    assert not target.exists()


def test_expired_is_a_miss(run: Run, cache: Path) -> None:
    assert run("set", cache, "key", "value", "--expire", "0.05").code == 0
    time.sleep(0.1)
    assert run("get", cache, "key").code == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1e3", 1000), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800), (" 2 H ", 7200)],
)
def test_times_take_units(run: Run, cache: Path, open_cache: Any, text: str, seconds: float) -> None:
    before = time.time()
    assert run("set", cache, "key", "value", "--expire", text).code == 0
    with open_cache(cache) as opened:
        assert 0 <= opened.get_entry("key").expires - before - seconds < 60


@pytest.mark.parametrize("text", ["", "h", "0", "0h", "-1h", "1w", "1hh", "1h30m", "inf", "infd", "nan", "1e400d"])
def test_what_is_no_time_is_refused(run: Run, cache: Path, text: str) -> None:
    result = run("set", cache, "key", "value", f"--expire={text}")
    assert result.code == 2 and "--expire" in result.err and "1.5h" in result.err
    assert not cache.exists()


def test_literal_keys(run: Run, cache: Path, open_cache: Any) -> None:
    with open_cache(cache) as opened:
        opened.set(("img", 7), b"tuple")
        opened.set(42, b"int")
        opened.set("42", b"str")
    assert run("get", cache, "('img', 7)", "--literal").out == b"tuple"
    assert run("get", cache, "42", "--literal").out == b"int"
    assert run("get", cache, "42").out == b"str"
    assert run("delete", cache, "--literal", "42", "('img', 7)").code == 0
    assert run("ls", cache).text == "42\n"
    bad = run("get", cache, "import os", "--literal")
    assert bad.code == 2 and "not a Python literal" in bad.err


def test_delete_tells_what_was_not_there(run: Run, cache: Path) -> None:
    run("set", cache, "a", "1")
    run("set", cache, "b", "2")
    assert run("delete", cache, "a") == Result(0, b"", "")
    assert run("delete", cache, "a", "b") == Result(1, b"", "yatagarasu-cache: not in the cache: a\n")
    assert run("ls", cache).out == b""


@pytest.mark.parametrize("args", [[], ["value", "-f", "file"], ["-", "-f", "file"]])
def test_set_takes_one_source(run: Run, cache: Path, args: list[str]) -> None:
    assert run("set", cache, "key", *args).code == 2
    assert not cache.exists()


def test_set_from_a_missing_file(run: Run, cache: Path, tmp_path: Path) -> None:
    result = run("set", cache, "key", "-f", tmp_path / "missing")
    assert result.code == 2
    assert result.err == f"yatagarasu-cache: error: {tmp_path}/missing: No such file or directory\n"
    assert not cache.exists()


def test_who_names_no_limit_takes_what_the_cache_has(run: Run, cache: Path, tree: Path) -> None:
    def settings() -> tuple[int, str]:
        with DiskCache(cache, read_only=True) as opened:
            return opened.settings.size_limit, opened.settings.eviction

    assert run("warm", tree, cache, "--size-limit", "64MiB", "--eviction", "fifo").code == 0
    assert settings() == (64 << 20, "fifo")
    for command in (["set", cache, "key", "value"], ["warm", tree, cache], ["delete", cache, "key"]):
        assert run(*command).code == 0
        assert settings() == (64 << 20, "fifo")
    changed = run("set", cache, "key", "value", "--size-limit", "128MiB", "--eviction", "lfu")
    assert changed.code == 0
    assert settings() == (128 << 20, "lfu")
    assert run("get", cache, "img/deep/er/photo.jpg").out == TREE["img/deep/er/photo.jpg"]


# -- ls, stats, check --------------------------------------------------------------------------


@pytest.fixture
def filled(cache: Path, open_cache: Any) -> Path:
    with open_cache(cache) as opened:
        opened.set("img/a.png", bytes(2048), tag="img", meta={"content_type": "image/png"})
        opened.set("img/b.png", b"b", tag="img", expire=3600)
        opened.set("text/a\n\x1b[31m", "red")
        opened.set(("t", 1), [1])
    return cache


def test_ls(run: Run, filled: Path) -> None:
    everything = sorted(run("ls", filled).text.splitlines())
    assert everything == ["('t', 1)", "img/a.png", "img/b.png", r"text/a\n\x1b[31m"]
    assert sorted(run("ls", filled, "--prefix", "img/").text.splitlines()) == ["img/a.png", "img/b.png"]
    assert sorted(run("ls", filled, "--tag", "img").text.splitlines()) == ["img/a.png", "img/b.png"]
    assert run("ls", filled, "--prefix", "img/b", "--tag", "img").text == "img/b.png\n"
    assert run("ls", filled, "--tag", "none") == Result(0, b"", "")


def test_ls_long(run: Run, filled: Path) -> None:
    header, line = run("ls", filled, "--prefix", "img/a", "--long").text.splitlines()
    assert header.split() == ["SIZE", "CREATED", "EXPIRES", "TAG", "KEY"]
    assert line.split()[:2] == ["2.0", "KiB"]
    assert line.split()[-3:] == ["-", "img", "img/a.png"]


def test_ls_json(run: Run, filled: Path) -> None:
    found = {entry["key"]: entry for entry in run("ls", filled, "--json").json}
    assert set(found) == {"('t', 1)", "img/a.png", "img/b.png", "text/a\n\x1b[31m"}
    first = found["img/a.png"]
    assert (first["tag"], first["size"], first["key_type"]) == ("img", 2048, "str")
    assert first["meta"] == {"content_type": "image/png"} and first["expires"] is None
    assert abs(first["created"] - time.time()) < 600
    assert 0 < found["img/b.png"]["expires"] - time.time() <= 3600
    assert found["('t', 1)"]["key_type"] == "tuple"
    assert run("ls", filled, "--json", "--tag", "none").json == []


def test_stats(run: Run, filled: Path, open_cache: Any, backend: str) -> None:
    with open_cache(filled) as opened:
        assert opened.get("img/b.png") == b"b" and opened.get("missing") is None
    numbers = run("stats", filled, "--json").json
    assert numbers["entries"] == 4 and numbers["sets"] == 4
    assert (numbers["hits"], numbers["misses"], numbers["hit_ratio"]) == (1, 1, 0.5)
    assert numbers["backend"] == backend and numbers["directory"] == str(filled)
    assert numbers["disk_bytes"] >= numbers["live_bytes"] > 2048
    table = {line[:12].strip(): line[12:].strip() for line in run("stats", filled).text.splitlines()}
    assert table["entries"] == "4"
    assert table["hit ratio"] == "50.0% (1 hits, 1 misses)"
    assert table["backend"].startswith(backend + " (")


def test_stats_of_a_cache_never_read(run: Run, cache: Path) -> None:
    run("set", cache, "key", "value")
    assert run("stats", cache, "--json").json["hit_ratio"] == 0
    assert "no gets yet" in run("stats", cache).text


def test_check_of_a_sound_cache(run: Run, filled: Path) -> None:
    assert run("check", filled) == Result(0, b"no problems found\n", "")
    assert run("check", filled, "--json").json == {"problems": [], "remaining": 0}


def damage(cache: Path, content: bytes) -> None:
    """Flips a bit of `content` in the segment that holds it."""
    for path in (cache / "segments").iterdir():
        data = bytearray(path.read_bytes())
        place = data.find(content)
        if place >= 0:
            data[place + 3] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("not in any segment")


def test_check_finds_and_repairs(run: Run, cache: Path, open_cache: Any) -> None:
    with open_cache(cache) as opened:
        opened.set("bad", b"0123456789" * 50)
        opened.set("good", b"good")
    damage(cache, b"0123456789" * 50)
    found = run("check", cache)
    assert found.code == 1 and "check --fix" in found.err
    assert found.text.splitlines()[0].split() == ["PROBLEM", "WHERE", "DETAIL", "FIXED"]
    report = run("check", cache, "--json")
    assert report.code == 1 and report.json["remaining"] >= 1
    assert set(report.json["problems"][0]) == {"kind", "where", "detail", "fixed"}
    assert run("check", cache, "--fix").code == 0
    assert run("check", cache).code == 0
    assert run("get", cache, "bad").code == 1
    assert run("get", cache, "good").out == b"good"


def test_get_of_a_damaged_value_is_a_miss(run: Run, cache: Path, open_cache: Any) -> None:
    with open_cache(cache) as opened:
        opened.set("bad", b"0123456789" * 50)
    damage(cache, b"0123456789" * 50)
    assert run("get", cache, "bad").code == 1


# -- evict, expire, clear ----------------------------------------------------------------------


def test_evict(run: Run, filled: Path) -> None:
    assert run("evict", filled, "img").text == "2 entries evicted\n"
    assert run("evict", filled, "img").text == "0 entries evicted\n"
    assert len(run("ls", filled).text.splitlines()) == 2


def test_expire(run: Run, filled: Path) -> None:
    run("set", filled, "short", "x", "--expire", "0.05")
    time.sleep(0.1)
    assert run("expire", filled).text == "1 entries expired\n"
    assert len(run("ls", filled).text.splitlines()) == 4


def test_clear_with_yes(run: Run, filled: Path) -> None:
    assert run("clear", filled, "--yes") == Result(0, b"4 entries removed\n", "")
    assert run("ls", filled).out == b""


def test_clear_refuses_without_a_terminal(run: Run, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, b"y\n")
    refused = run("clear", filled)
    assert refused.code == 2 and "--yes" in refused.err
    assert len(run("ls", filled).text.splitlines()) == 4


@pytest.mark.parametrize(
    ("answer", "code", "left"), [(b"y\n", 0, 0), (b"YES\n", 0, 0), (b"\n", 1, 4), (b"n\n", 1, 4), (b"", 1, 4)]
)
def test_clear_asks_on_a_terminal(
    run: Run, filled: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, code: int, left: int
) -> None:
    feed(monkeypatch, answer, tty=True)
    result = run("clear", filled)
    assert result.code == code and "Remove all 4 entries" in result.err
    assert len(run("ls", filled).text.splitlines()) == left


# -- warm --------------------------------------------------------------------------------------


def summary(result: Result) -> list[int]:
    """Files stored, fresh and failed, entries evicted."""
    words = result.text.replace(",", "").split()
    return [int(words[words.index(name) - 1]) for name in ("files", "fresh", "failed", "entries")]


def test_warm_stores_everything(run: Run, cache: Path, tree: Path, open_cache: Any) -> None:
    result = run("warm", tree, cache)
    assert (result.code, result.err) == (0, "")
    assert summary(result) == [len(TREE), 0, 0, 0]
    with open_cache(cache) as opened:
        assert {key: opened.get(key) for key in opened} == TREE
        entry = opened.get_entry("img/logo.png")
    assert entry.tag == "img" and entry.expires is None
    assert entry.meta == {
        "content_type": "image/png",
        "mtime_ns": (tree / "img/logo.png").stat().st_mtime_ns,
        "size": 256,
    }


def test_warm_skips_what_is_fresh(run: Run, cache: Path, tree: Path) -> None:
    run("warm", tree, cache)
    assert summary(run("warm", tree, cache)) == [0, len(TREE), 0, 0]
    (tree / "empty").write_bytes(b"no more")  # another size
    os.utime(tree / "index.html", ns=(1, 1))  # another time
    (tree / "new").write_bytes(b"new")
    assert run("stats", cache, "--json").json["misses"] == 0  # looking for what is fresh is no miss
    assert summary(run("warm", tree, cache)) == [3, len(TREE) - 2, 0, 0]
    assert run("get", cache, "empty").out == b"no more"


def test_warm_with_prefix_and_tag(run: Run, cache: Path, tree: Path) -> None:
    assert run("warm", tree, cache, "--prefix", "static/", "--tag", "v1").code == 0
    assert run("get", cache, "static/index.html").out == TREE["index.html"]
    assert len(run("ls", cache, "--tag", "v1").text.splitlines()) == len(TREE)
    assert summary(run("warm", tree, cache, "--prefix", "static/", "--tag", "v2")) == [len(TREE), 0, 0, 0]
    assert run("evict", cache, "v1").text == "0 entries evicted\n"


def test_warm_with_expire_prolongs_what_is_fresh(run: Run, cache: Path, tree: Path) -> None:
    run("warm", tree, cache, "--expire", "100")
    assert summary(run("warm", tree, cache, "--expire", "9000")) == [0, len(TREE), 0, 0]
    left = [entry["expires"] - time.time() for entry in run("ls", cache, "--json").json]
    assert len(left) == len(TREE) and all(8000 < seconds <= 9000 for seconds in left)


def test_warm_stays_inside_the_tree(run: Run, cache: Path, tree: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"secret")
    (tree / "out.txt").symlink_to(secret / "key")
    (tree / "out").symlink_to(secret)
    (tree / "loop").symlink_to(tree)
    (tree / "dangling").symlink_to(tree / "nothing")
    (tree / "alias.png").symlink_to("img/logo.png")
    os.mkfifo(tree / "pipe")
    result = run("warm", tree, cache)
    assert (result.code, result.err) == (0, "")
    assert set(run("ls", cache).text.splitlines()) == {*TREE, "alias.png"}
    assert run("get", cache, "alias.png").out == TREE["img/logo.png"]


def test_warm_leaves_out_a_cache_inside_the_tree(run: Run, tree: Path) -> None:
    inside = tree / "my" / "cache"
    inside.parent.mkdir()
    for _ in range(2):
        assert run("warm", tree, inside).code == 0
    assert set(run("ls", inside).text.splitlines()) == set(TREE)


def test_warm_reports_unreadable_files(
    run: Run, cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = warm.open_regular

    def fail(path: str) -> Any:
        if path.endswith("logo.png"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(warm, "open_regular", fail)
    result = run("warm", tree, cache)
    assert result.code == 1
    assert result.err == "yatagarasu-cache: img/logo.png: Permission denied\n"
    assert summary(result) == [len(TREE) - 1, 0, 1, 0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_warm_reports_unreadable_directories(run: Run, cache: Path, tree: Path) -> None:
    (tree / "img").chmod(0)
    try:
        result = run("warm", tree, cache)
    finally:
        (tree / "img").chmod(0o755)
    assert result.code == 1 and result.err == "yatagarasu-cache: img: Permission denied\n"


class Failing(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= warm.STREAM_FROM:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_warm_survives_a_file_that_fails_in_the_middle(
    run: Run, cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = warm.open_regular

    def failing(path: str) -> Any:
        file, status = real(path)
        if not path.endswith("photo.jpg"):
            return file, status
        file.close()
        return Failing(TREE["img/deep/er/photo.jpg"]), status

    monkeypatch.setattr(warm, "open_regular", failing)
    result = run("warm", tree, cache)
    assert result.code == 1
    assert result.err == "yatagarasu-cache: img/deep/er/photo.jpg: Input/output error\n"
    assert summary(result) == [len(TREE) - 1, 0, 1, 0]
    assert run("check", cache).code == 0


def test_warm_has_files_on_their_way_before_it_reads_them(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many at most: a tree of any size needs no more descriptors, and none is left open."""
    tree = tmp_path / "many"
    tree.mkdir()
    for number in range(3 * warm.AHEAD):
        (tree / str(number)).write_bytes(b"%d" % number)
    real, opened, most = warm.open_regular, list[Any](), 0

    def noted(path: str) -> Any:
        nonlocal most
        opened.append(real(path)[0])
        most = max(most, sum(not file.closed for file in opened))
        return opened[-1], os.stat(path)

    monkeypatch.setattr(warm, "open_regular", noted)
    assert summary(run("warm", tree, cache)) == [3 * warm.AHEAD, 0, 0, 0]
    assert most == warm.AHEAD + 1
    assert all(file.closed for file in opened)
    with DiskCache(cache) as filled:
        assert {filled[str(number)] for number in range(3 * warm.AHEAD)} == {
            b"%d" % number for number in range(3 * warm.AHEAD)
        }
        monkeypatch.setattr(DiskCache, "set", lambda *_, **__: (_ for _ in ()).throw(StorageFull(28, "full")))
    opened.clear()
    (tree / "1").write_bytes(b"changed")
    (tree / "2").write_bytes(b"changed too")
    assert run("warm", tree, cache).code == 2
    assert opened and all(file.closed for file in opened)


def test_warm_reports_what_can_never_fit(run: Run, cache: Path, tree: Path) -> None:
    result = run("warm", tree, cache, "--size-limit", "1MiB")
    assert result.code == 1 and result.err.startswith("yatagarasu-cache: img/deep/er/photo.jpg: ")
    assert summary(result) == [len(TREE) - 1, 0, 1, 0]


def test_warm_stops_when_the_disk_is_full(
    run: Run, cache: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise StorageFull(28, "no room: free some")

    monkeypatch.setattr(DiskCache, "set", full)
    assert run("warm", tree, cache) == Result(2, b"", "yatagarasu-cache: error: no room: free some\n")


def test_warm_from_a_missing_directory(run: Run, cache: Path, tmp_path: Path) -> None:
    result = run("warm", tmp_path / "missing", cache)
    assert result.code == 2 and "no such directory" in result.err
    assert not cache.exists()


def test_warm_evicts_and_says_so(run: Run, cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(200):
        (root / f"{number:03}").write_bytes(bytes([number]) * 8192)
    result = run("warm", root, cache, "--size-limit", "512KiB")
    stored, _, failed, evicted = summary(result)
    assert (result.code, stored, failed) == (0, 200, 0)
    assert evicted > 0
    for name in run("ls", cache).text.splitlines():
        assert run("get", cache, name).out == (root / name).read_bytes()


# -- what must not be touched ------------------------------------------------------------------

READING = [
    ["get", "KEY"], ["ls"], ["ls", "--json"], ["stats"], ["check"], ["check", "--fix"],
    ["delete", "KEY"], ["evict", "TAG"], ["expire"], ["clear", "--yes"],
]  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_reading_commands_create_nothing(run: Run, tmp_path: Path, command: list[str]) -> None:
    missing, foreign, file = tmp_path / "missing", tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "letter").write_bytes(b"dear")
    file.write_bytes(b"x")
    for path in (missing, foreign, file):
        result = run(command[0], path, *command[1:])
        assert result.code == 2 and result.out == b""
        assert result.err.startswith(f"yatagarasu-cache: error: {path}: ")
    assert contents(tmp_path) == {str(foreign / "letter"): b"dear", str(file): b"x"}
    assert not missing.exists() and len(list(foreign.iterdir())) == 1


def test_storing_refuses_a_foreign_directory(run: Run, tmp_path: Path, tree: Path) -> None:
    before = contents(tmp_path)
    for command in (["set", tree, "key", "value"], ["warm", tree / "img", tree / "text"]):
        result = run(*command)
        assert result.code == 2 and result.err.startswith("yatagarasu-cache: error: ")
        assert "Traceback" not in result.err
    assert contents(tmp_path) == before


def test_what_stores_nothing_evicts_nothing(run: Run, cache: Path, tree: Path) -> None:
    """Also where the limit is far below what there is."""
    run("warm", tree, cache)
    DiskCache(cache, size_limit=1 << 18).close()
    for command in (*READING[:6], ["delete", "other"], ["evict", "other"], ["expire"]):
        run(command[0], cache, *command[1:])
    assert set(run("ls", cache).text.splitlines()) == set(TREE)


def test_a_small_cache_in_use_is_not_squeezed(run: Run, cache: Path, open_cache: Any) -> None:
    """What a command logs counts against its owner's limit, so it must be little."""
    with open_cache(cache, size_limit=1 << 20) as opened:
        for number in range(300):
            opened.set(number, bytes(1024), tag=number % 2)
        opened.set("other", b"")
        before = opened.stats()
        with subprocess.Popen(command("delete", cache, "--literal", *range(100))) as process:
            while process.poll() is None:
                opened.set("beat", bytes(512))
        after = opened.stats()
    assert process.returncode == 0
    assert after.evictions == before.evictions == 0
    assert after.entries == before.entries - 100 + 1


@pytest.mark.parametrize("command", [["get", "good"], ["ls"], ["stats"], ["check", "--fix"]], ids=" ".join)
def test_a_lost_index_is_recovered(run: Run, cache: Path, command: list[str]) -> None:
    run("set", cache, "good", "still here")
    (cache / "index").unlink()
    assert run(command[0], cache, *command[1:]).code == 0
    assert run("get", cache, "good").out == b"still here"


def test_check_reports_a_lost_index(run: Run, cache: Path) -> None:
    run("set", cache, "good", "still here")
    (cache / "index").unlink()
    result = run("check", cache, "--json")
    assert result.code == 1 and [problem["kind"] for problem in result.json["problems"]] == ["index"]
    assert not (cache / "index").exists()


def test_beside_an_open_handle(run: Run, cache: Path, open_cache: Any) -> None:
    with open_cache(cache) as opened:
        opened.set("here", b"1")
        assert run("get", cache, "here").out == b"1"
        assert run("set", cache, "there", "2").code == 0
        assert opened.get("there") == "2"
        assert run("delete", cache, "here").code == 0
        assert opened.get("here") is None
        assert run("check", cache).code == 0
        assert run("clear", cache, "--yes").code == 0
        assert len(opened) == 0
        opened.set("again", b"3")
    assert run("get", cache, "again").out == b"3"


# -- the line itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["ls"],
        ["get", "x"],
        ["ls", "x", "--what"],
        ["set", "x", "k", "v", "w"],
        ["set", "x", "k", "v", "--expire", "-1"],
        ["set", "x", "k", "v", "--expire", "nan"],
        ["set", "x", "k", "v", "--size-limit", "ten"],
        ["ls", "x", "--backend", "tape"],
        ["ls", "x", "--size-limit", "1G"],
    ],
    ids=" ".join,
)
def test_wrong_calls(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: yatagarasu-cache" in captured.err


def test_size_limit_out_of_range_is_an_error(run: Run, cache: Path) -> None:
    result = run("set", cache, "key", "value", "--size-limit", "1")
    assert result.code == 2 and "size_limit" in result.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"yatagarasu-cache {__version__}\n"
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("warm", "get", "set", "delete", "ls", "stats", "top", "export", "check", "evict", "expire", "clear"):
        assert f"  {command} " in overview
        assert cli.main([command, "--help"]) == 0
        assert f"example:\n  yatagarasu-cache {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("512b", 512), ("1k", 1024), ("64MiB", 64 << 20), ("64 MiB", 64 << 20),
        ("10G", 10 << 30), ("10GB", 10**10), ("1.5kib", 1536), ("2T", 2 << 40), ("3m", 3 << 20),
    ],
)  # fmt: skip
def test_parse_size(text: str, size: int) -> None:
    assert show.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "ten", "1X", "1.", "1e9", "G", "1 2", "\u0663\u00b2"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        show.parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1024**2 - 1, "1.0 MiB"),
     (10 << 30, "10.0 GiB"), (5 << 50, "5.0 PiB")],
)  # fmt: skip
def test_human_size(size: int, text: str) -> None:
    assert show.human_size(size) == text


def test_interrupted(run: Run, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiskCache, "open", interrupt)
    assert run("get", filled, "key") == Result(130, b"", "")


# -- in processes of their own -----------------------------------------------------------------


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "yatagarasu_cache", *map(str, args)]


def test_as_a_module(cache: Path, backend: str) -> None:
    on = ("--backend", backend)
    subprocess.run(command("set", cache, "key", "-", *on), input=b"\x00\xff", check=True)
    done = subprocess.run(command("get", cache, "key", *on), capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\x00\xff", b"")
    done = subprocess.run(command("get", cache, "other", *on), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.fixture
def crowded(cache: Path, open_cache: Any) -> Path:
    """So many names that they do not fit into a pipe."""
    with open_cache(cache) as opened:
        for number in range(2000):
            opened.set(f"{number:0100}", b"")
    return cache


@pytest.mark.parametrize("option", ["--long", "--json"])
def test_broken_pipe_is_quiet(crowded: Path, backend: str, option: str) -> None:
    with subprocess.Popen(
        command("ls", crowded, option, "--backend", backend), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_standard_output_is_an_error(filled: Path, backend: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("ls", filled, "--backend", backend), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"yatagarasu-cache: error: ") and b"Traceback" not in done.stderr


# -- on a terminal, with rich and without ------------------------------------------------------

WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None; from yatagarasu_cache.cli import main; sys.exit(main())"
)


def on_a_terminal(argv: list[str], **variables: str) -> tuple[int, str]:
    """Exit code and all output of a command whose output goes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **variables}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: read_terminal(ours), b""))
        code = process.wait()
    os.close(ours)
    return code, shown.decode().replace("\r\n", "\n")


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO: the other side is closed
        return b""


@pytest.fixture(params=["rich", "plain"])
def program(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    if request.param == "rich":
        pytest.importorskip("rich")
        yield [sys.executable, "-m", "yatagarasu_cache"]
    else:
        yield [sys.executable, "-c", WITHOUT_RICH]


def test_terminal_commands(program: list[str], tree: Path, cache: Path, backend: str) -> None:
    on = ["--backend", backend]
    code, shown = on_a_terminal([*program, "warm", str(tree), str(cache), *on])
    assert code == 0 and f"{len(TREE)} files stored" in shown
    code, shown = on_a_terminal([*program, "stats", str(cache), *on], NO_COLOR="1")
    assert code == 0 and "hit ratio" in shown and "\x1b[3" not in shown
    code, shown = on_a_terminal([*program, "get", str(cache), "[bold]x", *on])
    assert code == 1 and "not in the cache: [bold]x" in shown


def test_plain_output_is_the_same_without_rich(program: list[str], filled: Path, backend: str) -> None:
    done = subprocess.run(
        [*program, "stats", str(filled), "--backend", backend], capture_output=True, check=True
    )
    assert b"\x1b" not in done.stdout
    assert done.stdout.splitlines()[3].split() == [b"entries", b"4"]


@pytest.mark.parametrize("kind", ["rich", "plain"])
def test_progress_is_drawn(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "rich":
        pytest.importorskip("rich")
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(show, "DRAW_EVERY", 0.0)
    presenter = show.RichPresenter() if kind == "rich" else show.Presenter()
    with presenter.progress(2, 4096) as progress:
        progress.advance(size=4096)
        progress.advance(files=2)
    assert "2 of 2 files" in capsys.readouterr().err


# -- hints, progress, who is there -------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        (5, "5", "not in the cache: 5 (there is an entry of the int 5: add --literal)"),
        (("img", 7), "('img', 7)", "there is an entry of the tuple ('img', 7): add --literal)"),
        (b"5", "b'5'", "there is an entry of the bytes b'5': add --literal)"),
        (b"5", "5", "there is an entry of the bytes b'5': give these, in quotes for the shell, and --literal)"),
        ("6", "5", "not in the cache: 5\n"),
        ("x", "[1]", "not in the cache: [1]\n"),
        ("x", "{1}", "not in the cache: {1}\n"),
        ("x", r"'\d'", "yatagarasu-cache: not in the cache: '\\d'\n"),
    ],
)
def test_a_miss_hints_at_a_key_of_another_type(
    run: Run, cache: Path, open_cache: Any, key: Any, text: str, said: str
) -> None:
    with open_cache(cache) as opened:
        opened.set(key, "value")
    missed = run("get", cache, text)
    assert missed.code == 1 and said in missed.err
    missed = run("delete", cache, text)
    assert missed.code == 1 and said in missed.err
    assert run("stats", cache, "--json").json["misses"] == 0


def test_a_miss_of_a_literal_hints_at_the_text(run: Run, cache: Path) -> None:
    run("set", cache, "5", "value")
    missed = run("get", cache, "5", "--literal")
    assert (missed.code, missed.out) == (1, b"")
    assert missed.err == "yatagarasu-cache: not in the cache: 5 (there is an entry of the text 5: leave out --literal)\n"


def test_bytes_in_json_are_base64(run: Run, cache: Path, open_cache: Any) -> None:
    with open_cache(cache) as opened:
        opened.set(b"\x00k", [b"\xff\xfe"], tag=b"\x01t", meta={"etag": b"abc", "n": (1, b"")})
    (entry,) = run("ls", cache, "--json").json
    assert entry["key"] == "b'\\x00k'" and entry["key_type"] == "bytes"  # as --literal takes it
    assert entry["tag"] == "AXQ=" and entry["meta"] == {"etag": "YWJj", "n": [1, ""]}
    assert run("get", cache, "b'\\x00k'", "--literal").json == ["//4="]


def test_check_tells_how_far_it_is(cache: Path, open_cache: Any) -> None:
    told = list[tuple[int, int]]()
    with open_cache(cache) as opened:
        for number in range(1000):
            opened.set(number, b"x")
        assert opened.check(progress=lambda *now: told.append(now)) == []
    assert told == sorted(told) and told[-1] == (1000, 1000) and len(told) > 10


def test_what_the_progress_of_a_check_raises_ends_it(cache: Path, open_cache: Any) -> None:
    def stop(*_: int) -> None:
        raise RuntimeError("enough")

    with open_cache(cache) as opened:
        opened.set("k", b"x")
        with pytest.raises(RuntimeError, match="enough"):
            opened.check(progress=stop)
        assert opened.check() == [] and opened.get("k") == b"x"


def test_check_shows_a_bar_on_a_terminal_alone(program: list[str], filled: Path) -> None:
    code, shown = on_a_terminal([*program, "check", str(filled)])
    assert code == 0 and "no problems found" in shown and "4 of 4 entries" in shown or "4/4" in shown
    done = subprocess.run([*program, "check", str(filled)], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"no problems found\n", b"")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_stats_tell_who_has_the_cache_open(run: Run, filled: Path) -> None:
    code = "import sys; from yatagarasu_cache import DiskCache\n"
    code += "cache = DiskCache(sys.argv[1], read_only=sys.argv[2] == 'r'); print('open', flush=True); input()"
    assert run("stats", filled, "--json").json["processes"] == []
    table = run("stats", filled).text.splitlines()
    assert [" ".join(line.split()) for line in table if line.startswith(("used", "limit", "evict"))][:3] == [
        "limit 10.0 GiB", "eviction lru", "used by nobody else",
    ]  # fmt: skip
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(filled), way], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for way in "rw"
    ]
    try:
        for other in others:
            assert other.stdout and other.stdout.readline() == b"open\n"
        seen = run("stats", filled, "--json").json["processes"]
        assert sorted(one["pid"] for one in seen) == sorted(other.pid for other in others)
        assert all(one["name"].startswith("python") for one in seen)
        assert f"({others[0].pid})" in run("stats", filled).text
    finally:
        for other in others:
            other.communicate(b"\n")


def test_warnings_of_the_package_are_shown_by_the_commands(cache: Path) -> None:
    subprocess.run(command("set", cache, "key", "value"), check=True)
    (cache / "index").unlink()
    done = subprocess.run(command("delete", cache, "other"), capture_output=True, text=True, check=False)
    assert f"yatagarasu-cache: {cache}: the index is missing: recovering it" in done.stderr
