"""The cache of cachelib, as cachelib tests its own, and what Flask-Caching and Flask-Session do with it."""

from __future__ import annotations

import datetime as dt
import io
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cachelib")

from yatagarasu_cache import CacheIOError, ClosedError, ConfigurationError, DiskCache, StorageFull
from yatagarasu_cache.integrations.cachelib import YatagarasuCache

SECRET = b"secret of the tests"
CACHE_TYPE = "yatagarasu_cache.integrations.cachelib.YatagarasuCache"
SAMPLES: dict[str, Any] = {
    "text": "bar", "unicode": "清水", "bytes": b"\x00\xff", "int": 2**70, "float": 1.5, "true": True, "list": [1, [2]],
    "tuple": (1, (2, None)), "set": {1, "a"}, "dict": {"a": {1: 2}}, "date": dt.date(2020, 2, 2), "class": int,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", str(tmp_path / "user-secret"))


@pytest.fixture
def cache(tmp_path: Path) -> YatagarasuCache:
    return YatagarasuCache(tmp_path / "cache", secret=SECRET)


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


class Changed:
    broken = False

    def __getstate__(self) -> Any:
        return 1

    def __setstate__(self, state: Any) -> None:
        if self.broken:
            raise RuntimeError("it has changed since")


def expires_in(cache: YatagarasuCache, key: str) -> float | None:
    entry = cache.cache.get_entry(key)
    assert entry is not None
    return None if entry.expires is None else entry.expires - time.time()


# -- as cachelib tests it -----------------------------------------------------------------------


def test_set_get_and_delete(cache: YatagarasuCache) -> None:
    for key, value in SAMPLES.items():
        assert cache.get(key) is None and cache.set(key, value) is True
        found = cache.get(key)
        assert found == value and type(found) is type(value)
    for key in SAMPLES:
        assert cache.delete(key) is True and cache.delete(key) is False and cache.get(key) is None


def test_many(cache: YatagarasuCache) -> None:
    assert cache.set_many(SAMPLES) == list(SAMPLES)
    assert cache.get_many(*SAMPLES) == list(SAMPLES.values()) and cache.get_dict(*SAMPLES) == SAMPLES
    assert cache.get_many("text", "missing", "text") == ["bar", None, "bar"] and cache.get_many() == []
    assert cache.get_dict("text", "missing") == {"text": "bar", "missing": None}
    assert cache.delete_many("text", "missing", "int") == ["text", "missing", "int"]
    assert cache.get_many("text", "int", "float") == [None, None, 1.5]


def test_add_does_not_replace(cache: YatagarasuCache) -> None:
    cache.set_many(SAMPLES)
    for key in SAMPLES:
        assert cache.add(key, "other") is False
    assert cache.get_dict(*SAMPLES) == SAMPLES
    assert cache.add("new", 5) is True and cache.get("new") == 5
    assert cache.add("past", 5, timeout=-1) is True and cache.get("past") is None
    assert cache.add("new", 6, timeout=-1) is False and cache.get("new") == 5


def test_has_and_clear(cache: YatagarasuCache) -> None:
    assert cache.has("key") is False
    cache.set("key", None)
    assert cache.has("key") is True and cache.get("key") is None
    cache.set("zero", 0)
    assert cache.has("zero") is True and cache.clear() is True
    assert cache.has("key") is False and cache.has("zero") is False and cache.clear() is True


def test_numbers(cache: YatagarasuCache) -> None:
    for number in (0, 1, 10, 1024000, 9, 500000000000, 2**64):
        assert cache.inc(f"{number}-inc", number) == number == cache.get(f"{number}-inc")
        assert cache.dec(f"{number}-dec", number) == -number == cache.get(f"{number}-dec")
        assert cache.dec(f"{number}-inc", 5) == number - 5 and cache.inc(f"{number}-inc") == number - 4
    for value in ("text", None, 1.5):
        cache.set("other", value)
        assert cache.inc("other") is None and cache.dec("other") is None and cache.get("other") == value


def test_timeouts(cache: YatagarasuCache) -> None:
    for timeout, least, most in ((None, 299, 300), (50, 49, 50), (dt.timedelta(minutes=1), 59, 60)):
        cache.set("set", 1, timeout)
        cache.add(f"add{timeout}", 1, timeout)
        assert cache.set_many({"many": 1}, timeout) == ["many"]
        for key in ("set", f"add{timeout}", "many"):
            assert least < (expires_in(cache, key) or 0) <= most
    for zero in (0, dt.timedelta(0)):
        cache.set("set", 1, zero)
        assert expires_in(cache, "set") is None
    assert cache.set("set", 1, -1) is True and cache.get("set") is None
    assert cache.set("set", 1, 10**15) is True and cache.get("set") == 1
    with pytest.raises(TypeError, match="timeout"):
        cache.set("set", 1, "soon")  # type: ignore[arg-type]
    cache.inc("counter")
    assert 299 < (expires_in(cache, "counter") or 0) <= 300
    cache.set("counter", 1, 0)
    cache.inc("counter")
    assert expires_in(cache, "counter") is None


def test_the_default_timeout(tmp_path: Path) -> None:
    for default, expected in ((0, None), (60, 60), (dt.timedelta(seconds=60), 60)):
        cache = YatagarasuCache(tmp_path / "cache", default, secret=SECRET, default_expire=5)
        cache.set("key", 1)
        cache.delete("counter")
        cache.inc("counter")
        for key in ("key", "counter"):
            left = expires_in(cache, key)
            assert left is None if expected is None else left is not None and expected - 1 < left <= expected


def test_entries_expire(cache: YatagarasuCache) -> None:
    cache.set("key", 1, 1)
    cache.add("added", 1, dt.timedelta(milliseconds=1))  # which is rounded up
    assert cache.has("key") and cache.get_many("key", "added") == [1, 1]
    time.sleep(1.05)
    assert not cache.has("key") and cache.get_many("key", "added") == [None, None] and cache.add("key", 2)


@pytest.mark.filterwarnings("default")
def test_delete_many_says_what_it_could_not_delete(cache: YatagarasuCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.set("a", 1)

    def fail(*_: Any) -> Any:
        raise CacheIOError(5, "the disk failed")

    monkeypatch.setattr(DiskCache, "delete", fail)
    assert cache.delete_many("a", "missing") == ["missing"]
    strict = YatagarasuCache(cache.cache.directory, ignore_delete_many_errors=False, secret=SECRET)
    with pytest.raises(RuntimeError, match="a"):
        strict.delete_many("a")


# -- values that are not for a codec ------------------------------------------------------------


def test_values_that_could_be_read_as_streams_are_values(cache: YatagarasuCache) -> None:
    file = io.BytesIO(b"content")
    for store in (cache.set, cache.add):
        cache.clear()
        assert store("file", file) and file.tell() == 0
        found = cache.get("file")
        assert type(found) is io.BytesIO and found.read() == b"content"
        assert store("iterator", iter([b"a", b"b"])) and list(cache.get("iterator")) == [b"a", b"b"]


@pytest.mark.parametrize("value", [lambda: 0, threading.Lock(), (b"x" for _ in "a")], ids=["lambda", "lock", "generator"])
def test_what_does_not_pickle_raises_what_pickle_raises(cache: YatagarasuCache, value: Any) -> None:
    expected = (pickle.PickleError, AttributeError) if callable(value) else (pickle.PickleError, TypeError)
    cache.set("key", "old")
    for store in (lambda: cache.set("key", value), lambda: cache.set_many({"key": value}), lambda: cache.add("x", value)):
        with pytest.raises(expected, match="(?i)pickle"):
            store()
    assert cache.get("key") == "old" and not cache.has("x")


def test_what_was_not_signed_is_never_loaded(cache: YatagarasuCache, caplog: Any) -> None:
    cache.set("right", Evil)
    for serializer in ("pickle", None):
        other: Any = {"secret": b"another"} if serializer is None else {"serializer": serializer}
        forger = YatagarasuCache(cache.cache.directory, **other)
        forger.set("forged", Evil())
        assert cache.get("forged") is None and cache.get_many("forged", "right") == [None, Evil]
        assert cache.has("forged") is False and cache.inc("forged") is None
        assert cache.add("forged", "mine") is True and cache.get("forged") == "mine"
        assert cache.add("forged", "yours") is False
    assert not Evil.ran and "taken for a miss" in caplog.text


def test_a_class_that_has_changed_is_a_miss(cache: YatagarasuCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.set("key", Changed())
    assert type(cache.get("key")) is Changed
    monkeypatch.setattr(Changed, "broken", True)
    assert cache.get("key") is None and not cache.has("key") and cache.add("key", 5)


def test_a_named_serializer_needs_no_secret(tmp_path: Path) -> None:
    YatagarasuCache(tmp_path / "cache", serializer="msgpack").set("key", [1])
    assert not (tmp_path / "user-secret").exists()
    users = YatagarasuCache(tmp_path / "cache")
    users.set("key", {1: Evil})
    assert users.get("key") == {1: Evil} and (tmp_path / "user-secret").exists()


# -- handles and failures -----------------------------------------------------------------------


def test_close_ends_one_use_of_many(cache: YatagarasuCache) -> None:
    second = YatagarasuCache(cache.cache.directory, 60, secret=SECRET)
    other = YatagarasuCache(cache.cache.directory, secret=SECRET, size_limit=1 << 26)
    assert second.cache is cache.cache is not other.cache
    cache.set("key", 1)
    cache.close()
    cache.close()
    for use in (
        lambda: cache.get("key"), lambda: cache.set("key", 2), lambda: cache.add("key", 2), lambda: cache.has("key"),
        lambda: cache.delete("key"), lambda: cache.inc("key"), lambda: cache.get_many("key"), cache.clear,
        lambda: cache.set_many({"key": 2}), lambda: cache.delete_many("key"),
    ):  # fmt: skip
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert second.get("key") == 1 == other.get("key")
    handle = second.cache
    second.close()
    assert handle.closed and not other.cache.closed
    assert YatagarasuCache(other.cache.directory, secret=SECRET).get("key") == 1


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_nobody_is_warned_of_what_was_closed_or_forgotten(tmp_path: Path) -> None:
    cache = YatagarasuCache(tmp_path / "cache", secret=SECRET)
    cache.set("key", 1)
    handle = cache.cache
    cache.close()
    assert handle.closed
    again = YatagarasuCache(tmp_path / "cache", secret=SECRET)
    assert again.get("key") == 1
    forgotten = again.cache
    del again
    assert forgotten.closed


@pytest.mark.parametrize("error", [CacheIOError(5, "the disk failed"), StorageFull(28, "it is full")], ids=["EIO", "full"])
def test_failures_of_the_disk(cache: YatagarasuCache, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Any) -> None:
    cache.set("key", 1)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("get", "set", "add", "delete", "incr", "get_many", "set_many", "clear", "__contains__"):
        monkeypatch.setattr(DiskCache, name, fail)
    assert cache.get("key") is None and cache.get_many("key") == [None] and cache.get_dict("key") == {"key": None}
    assert cache.set("key", 2) is False and cache.set("key", 2, -1) is False and cache.set_many({"key": 2}) == []
    assert cache.add("new", 2) is False and cache.delete("key") is False and cache.has("key") is False
    assert cache.inc("key") is None and cache.dec("key") is None and cache.clear() is False
    assert str(error) in caplog.text
    monkeypatch.undo()
    assert cache.get("key") == 1


def test_what_is_too_large_is_not_stored(tmp_path: Path, caplog: Any) -> None:
    cache = YatagarasuCache(tmp_path / "cache", secret=SECRET, max_value_size=1000)
    cache.set("key", "old")
    assert cache.set("key", b"x" * 1001) is False and cache.add("new", [b"x" * 2000]) is False
    assert cache.set_many({"a": 1, "b": b"x" * 1001, "c": 3}) == ["a", "c"]
    assert cache.get("key") == "old" and not cache.has("new") and "max_value_size" in caplog.text


def test_a_cache_that_is_only_read(cache: YatagarasuCache) -> None:
    cache.set("key", 1)
    reader = YatagarasuCache(cache.cache.directory, secret=SECRET, read_only=True)
    assert reader.get("key") == 1 and reader.set("key", 2) is False and reader.inc("key") is None
    assert reader.delete("key") is False and reader.clear() is False and reader.add("new", 1) is False


def test_a_setting_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises((ConfigurationError, TypeError), match="threshold"):
        YatagarasuCache(tmp_path / "cache", secret=SECRET, threshold=500)


COUNTER = f"""
import sys
from yatagarasu_cache.integrations.cachelib import YatagarasuCache
cache = YatagarasuCache(sys.argv[1], secret={SECRET!r})
print("ready", flush=True)
sys.stdin.readline()
for _ in range(100):
    cache.inc("hits"), cache.dec("misses", 2)
print(cache.add("first", [1]))
"""

KILLED = COUNTER.partition("for _")[0] + """
number = 0
while True:
    number += 1
    cache.set("a", {number} | set(range(10**6, 10**6 + 500)))
    cache.set("b", [number] * 5000)
"""


def started(program: str, cache: YatagarasuCache) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, cache.cache.directory]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_numbers_of_processes_add_up(cache: YatagarasuCache) -> None:
    processes = [started(COUNTER, cache) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=60)[0] for process in processes]
    assert cache.get_many("hits", "misses", "first") == [400, -800, [1]]
    assert sorted(said) == ["False\n"] * 3 + ["True\n"]


def test_a_writer_that_is_killed_leaves_whole_values(cache: YatagarasuCache) -> None:
    process = started(KILLED, cache)
    assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    while cache.get("b") is None or cache.get("b")[0] < 20:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    a, b = cache.get_many("a", "b")
    assert len(a) == 501 and len(b) == 5000 and len(set(b)) == 1
    assert cache.set("a", 1) and cache.get("a") == 1


# -- Flask --------------------------------------------------------------------------------------


def test_flask_caching(tmp_path: Path) -> None:
    flask: Any = pytest.importorskip("flask")
    flask_caching: Any = pytest.importorskip("flask_caching")
    app = flask.Flask("app")
    config = {
        "CACHE_TYPE": CACHE_TYPE, "CACHE_DEFAULT_TIMEOUT": 60, "CACHE_ARGS": [str(tmp_path / "cache")],
        "CACHE_OPTIONS": {"secret": SECRET, "size_limit": 1 << 26},
    }  # fmt: skip
    cache: Any = flask_caching.Cache(app, config=config)
    calls: list[Any] = []

    @app.route("/page")  # type: ignore[untyped-decorator]
    @cache.cached(query_string=True)  # type: ignore[untyped-decorator]
    def page() -> Any:
        calls.append("page")
        return flask.jsonify(flask.request.args.get("n"))

    @cache.memoize(30)  # type: ignore[untyped-decorator]
    def add(a: Any, b: Any) -> Any:
        calls.append((a, b))
        return {"sum": a + b}

    @cache.memoize(30, cache_none=True)  # type: ignore[untyped-decorator]
    def nothing(a: Any) -> Any:
        calls.append(a)

    client = app.test_client()
    for n in ("1", "2", "1", "2"):
        assert client.get(f"/page?n={n}").json == n
    assert calls == ["page", "page"]
    calls.clear()
    with app.app_context():
        assert type(cache.cache) is YatagarasuCache and cache.cache.default_timeout == 60
        assert [add(1, 2), add(1, 2), add(2, 2), add(a=1, b=2)] == [{"sum": 3}, {"sum": 3}, {"sum": 4}, {"sum": 3}]
        assert calls == [(1, 2), (2, 2)]
        cache.delete_memoized(add, 1, 2)
        add(1, 2), add(2, 2)
        assert calls == [(1, 2), (2, 2), (1, 2)]
        cache.delete_memoized(add)
        add(1, 2), add(2, 2)
        assert calls[3:] == [(1, 2), (2, 2)]
        calls.clear()
        assert nothing(1) is None and nothing(1) is None and calls == [1]
        with DiskCache(tmp_path / "cache", serializer="pickle") as forger:
            for key in list(forger):
                forger[key] = Evil()
        nothing(1)
        assert calls == [1, 1] and add(1, 2) == {"sum": 3} and not Evil.ran  # and not None, as if that were stored
        cache.set("key", 5)
        assert cache.get("key") == 5 and cache.has("key") and cache.get_dict("key", "x") == {"key": 5, "x": None}
        assert cache.set_many({"a": 1, "b": 2}) == ["a", "b"] and cache.delete_many("a", "b") == ["a", "b"]
        assert cache.clear() and not cache.has("key")


def test_flask_caching_by_a_directory_among_the_options(tmp_path: Path) -> None:
    flask: Any = pytest.importorskip("flask")
    flask_caching: Any = pytest.importorskip("flask_caching")
    options = {"directory": tmp_path / "cache", "secret": SECRET}
    app = flask.Flask("app")
    cache: Any = flask_caching.Cache(app, config={"CACHE_TYPE": CACHE_TYPE, "CACHE_OPTIONS": options})
    with app.app_context():
        assert cache.set("key", {"a": (1,)}) and cache.get("key") == {"a": (1,)}


SESSIONS = f"""
import sys, warnings
import flask, flask_session
from yatagarasu_cache.integrations.cachelib import YatagarasuCache
app = flask.Flask("app")
app.config.update(
    SECRET_KEY="s", SESSION_TYPE="cachelib", SESSION_CACHELIB=YatagarasuCache(sys.argv[1], secret={SECRET!r})
)
warnings.simplefilter("ignore")
flask_session.Session(app)
@app.route("/")
def visits():
    flask.session["visits"] = flask.session.get("visits", []) + [{{"at": len(flask.session)}}]
    return str(len(flask.session["visits"]))
@app.route("/leave")
def leave():
    flask.session.clear()
    return "left"
client = app.test_client()
if len(sys.argv) > 2:
    client.set_cookie("session", sys.argv[2])
print(client.get("/").text, client.get("/").text)
print(client.get_cookie("session").value)
if len(sys.argv) > 2:
    client.get("/leave")
    print(client.get("/").text)
"""


def test_sessions_of_flask_go_on_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("flask_session")

    def said(*arguments: str) -> list[str]:
        command = [sys.executable, "-c", SESSIONS, str(tmp_path / "cache"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    counts, cookie = said()
    assert counts == "1 2" and said(cookie) == ["3 4", cookie, "1"]
