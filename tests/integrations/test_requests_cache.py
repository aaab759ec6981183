"""The backend of requests-cache. Its own tests of backends were run with it, too: these are of what they leave out."""

from __future__ import annotations

import http.server
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("requests_cache")

import requests
from requests_cache import CachedSession
from requests_cache.models.response import CachedResponse

from yatagarasu_cache import CacheIOError, ClosedError, ConfigurationError, DiskCache, StorageFull
from yatagarasu_cache.integrations.requests_cache import YatagarasuCache, YatagarasuDict

SECRET = b"secret of the tests"


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", str(tmp_path / "user-secret"))


@pytest.fixture
def table(tmp_path: Path) -> YatagarasuDict:
    return YatagarasuDict(tmp_path / "cache", "table", secret=SECRET)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, Any]] = []
    fails = False

    def do_GET(self) -> None:
        validator = self.headers.get("If-None-Match")
        self.requests.append((self.path, validator))
        body, headers, status = self.path.encode(), {"Content-Type": "text/plain"}, 200
        if self.fails:
            status, body = 500, b"failed"
        elif self.path.startswith("/to/"):
            status, headers, body = 302, {"Location": self.path[len("/to") :]}, b""
        elif self.path.startswith("/etag"):
            headers |= {"ETag": '"1"', "X-Count": str(len(self.requests))}
            if validator:
                status, body = 304, b""
        elif self.path.startswith("/json"):
            headers, body = {"Content-Type": "application/json"}, b'{"a": [1, null, "\xc3\xa4"]}'
        elif self.path.startswith("/binary"):
            headers, body = {"Content-Type": "application/octet-stream"}, bytes(range(256)) * (20_000 if self.path == "/binary?large" else 20)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        Handler.requests.clear()
        monkeypatch.setattr(Handler, "fails", False)
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def open_session(tmp_path: Path, serializer: Any = None, **options: Any) -> Any:
    backend = YatagarasuCache(tmp_path / "cache", serializer, secret=SECRET)
    return CachedSession(backend=backend, **{"expire_after": 60, **options})


# -- sessions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", [None, "pickle", "json", "yaml", "safe_pickle"])
def test_responses_come_back_as_they_were(tmp_path: Path, url: str, serializer: Any) -> None:
    if serializer == "safe_pickle":
        pytest.importorskip("itsdangerous")
        from requests_cache import safe_pickle_serializer

        serializer = safe_pickle_serializer(secret_key="s")
    with open_session(tmp_path, serializer) as session:
        for path in ("/text", "/json", "/binary", "/to/text"):
            first, second = session.get(url + path), session.get(url + path)
            assert not first.from_cache or path == "/to/text"
            assert second.from_cache and second.content == first.content and second.headers == first.headers
            assert second.status_code == 200 and second.url == first.url
        assert session.get(url + "/json").json() == {"a": [1, None, "ä"]}
        assert [path for path, _ in Handler.requests] == ["/text", "/json", "/binary", "/to/text"] + ["/text"] * (
            len(Handler.requests) - 4
        )
        assert [one.url for one in session.get(url + "/to/text").history] == [url + "/to/text"]
        assert session.cache.contains(url=url + "/to/text") and session.cache.contains(url=url + "/json")
        assert sorted(session.cache.urls()) == [url + path for path in ("/binary", "/json", "/text")]


def test_stale_responses_are_kept_and_revalidated(tmp_path: Path, url: str) -> None:
    session = open_session(tmp_path, expire_after=0.05)
    first = session.get(url + "/etag")
    time.sleep(0.1)
    assert len(session.cache.responses) == 1 and next(iter(session.cache.filter())).is_expired
    second = session.get(url + "/etag")
    assert Handler.requests == [("/etag", None), ("/etag", '"1"')] and second.from_cache and second.revalidated
    assert second.content == first.content == b"/etag"


def test_stale_responses_stand_in_where_the_server_fails(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(tmp_path, expire_after=0.05, stale_if_error=True)
    session.get(url + "/text")
    time.sleep(0.1)
    monkeypatch.setattr(Handler, "fails", True)
    found = session.get(url + "/text")
    assert found.from_cache and found.is_expired and found.content == b"/text"
    assert open_session(tmp_path, expire_after=0.05).get(url + "/text").status_code == 500
    assert session.get(url + "/new").status_code == 500


def test_responses_are_deleted(tmp_path: Path, url: str) -> None:
    session = open_session(tmp_path)
    for path in ("/a", "/b", "/to/c"):
        session.get(url + path)
    session.get(url + "/old", expire_after=0.02)
    time.sleep(0.05)
    session.cache.delete(expired=True)
    assert sorted(session.cache.urls()) == [url + path for path in ("/a", "/b", "/c")]
    session.cache.delete(urls=[url + "/c", url + "/to/c"])
    assert len(session.cache.redirects) == 0 and not session.cache.contains(url=url + "/to/c")
    session.cache.delete(urls=[url + "/a", url + "/nothing"])
    assert session.cache.urls() == [url + "/b"]
    session.cache.reset_expiration(timedelta(0))
    assert all(response.is_expired for response in session.cache.filter())
    session.cache.clear()
    assert len(session.cache.responses) == 0


def test_what_a_session_is_told_is_none_of_the_caches(tmp_path: Path, caplog: Any) -> None:
    cache = YatagarasuCache(
        tmp_path / "cache", secret=SECRET, expire_after=5, stale_if_error=True, size_limit=1 << 26, timout=5
    )
    assert cache.responses.cache.settings.size_limit == cache.redirects.cache.settings.size_limit == 1 << 26
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["requests_cache: 'timout' is no setting of a DiskCache, and ignored"]
    assert str(cache.db_path) == str(tmp_path / "cache")
    cache.close()  # type: ignore[no-untyped-call]
    assert str(cache.db_path) == str(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="size_limit"):
        YatagarasuCache(tmp_path / "cache", secret=SECRET, size_limit="much")


@pytest.mark.parametrize("error", [CacheIOError(5, "the disk failed"), StorageFull(28, "it is full")], ids=["EIO", "full"])
def test_a_request_does_without_a_cache_that_fails(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Exception
) -> None:
    session = open_session(tmp_path)
    session.get(url + "/text")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("get", "set"):
        with monkeypatch.context() as patch:
            patch.setattr(DiskCache, name, fail)
            assert session.get(f"{url}/failing-{name}").content == f"/failing-{name}".encode()
            assert session.get(url + "/text").content == b"/text"
            assert str(error) in caplog.text
            caplog.clear()
    assert session.get(url + "/text").from_cache and not session.get(url + "/failing-set").from_cache


def test_what_is_too_large_goes_to_its_reader(tmp_path: Path, url: str, caplog: Any) -> None:
    backend = YatagarasuCache(tmp_path / "cache", secret=SECRET, max_value_size=1_000_000)
    session = CachedSession(backend=backend)
    for _ in range(2):
        response = session.get(url + "/binary?large")
        assert not response.from_cache and len(response.content) == 256 * 20_000
    assert "max_value_size" in caplog.text and session.get(url + "/text").ok and session.get(url + "/text").from_cache


# -- tables -------------------------------------------------------------------------------------


def test_tables_are_directories_of_their_own(tmp_path: Path) -> None:
    cache = YatagarasuCache(tmp_path / "cache", secret=SECRET)
    other = YatagarasuDict(tmp_path / "cache", "other", secret=SECRET)
    cache.responses["key"], cache.redirects["key"], other["key"] = CachedResponse(), "value", "other"
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"responses", "redirects", "other"}
    cache.responses.clear()
    assert not cache.responses and cache.redirects["key"] == "value" and other["key"] == "other"
    cache.clear()  # type: ignore[no-untyped-call]
    assert not cache.redirects and dict(other) == {"key": "other"}


def test_a_mapping(table: YatagarasuDict) -> None:
    table.update({f"key{number}": number for number in range(5)})
    assert dict(table) == {f"key{number}": number for number in range(5)} and len(table) == 5
    assert "key1" in table and "key9" not in table
    assert table.pop("key1") == 1 and table.pop("key1", None) is None and table.get("key1") is None
    for use in (lambda: table["key1"], lambda: table.pop("key1"), lambda: table.__delitem__("key1")):
        with pytest.raises(KeyError):
            use()
    table.bulk_delete(["key0", "key0", "key9"])
    table.bulk_delete([])
    assert sorted(table) == sorted(table.keys()) == ["key2", "key3", "key4"]
    assert sorted(table.values()) == [2, 3, 4] and table.setdefault("key2", 9) == 2


def test_values_without_a_serializer_stay_as_they_are(tmp_path: Path) -> None:
    table = YatagarasuDict(tmp_path / "cache", "plain", None, secret=SECRET)
    for value in ("text", b"bytes", 5, None, [1, (2,)], {"a": {1}}, Path("x")):
        table["key"] = value
        assert table["key"] == value and type(table["key"]) is type(value)
    table["key"] = iter([b"a", b"b"])
    assert list(table["key"]) == [b"a", b"b"]


def test_walks_go_on_while_others_delete(table: YatagarasuDict) -> None:
    table.update({f"key{number}": number for number in range(5)})
    seen = []
    for key, value in table.items():
        seen.append((key, value))
        table.clear()
    assert len(seen) == 1


# -- what cannot be read ------------------------------------------------------------------------


def test_what_was_not_signed_is_never_loaded(table: YatagarasuDict, caplog: Any) -> None:
    numpy = pytest.importorskip("numpy")
    table["right"] = "right"
    evil = pickle.dumps(Evil())
    forged = [evil, b"", bytearray(evil), numpy.array(list(evil), "uint8"), "text", 5, None, [evil], table.cache["right"]]
    for value in forged:
        table.cache["forged"] = value
        assert table["forged"] is None and table.get("forged") is None and table["right"] == "right"
    with DiskCache(table.cache.directory, serializer="pickle") as other:
        other["forged"] = Evil()
    assert table.get("forged") is None
    other_secret = YatagarasuDict(Path(table.cache.directory).parent, "table", secret=b"another")
    assert other_secret.get("right") is None
    plain = YatagarasuDict(Path(table.cache.directory).parent, "table", None, secret=SECRET)
    assert plain.get("forged") is None and not Evil.ran and "taken for a miss" in caplog.text


def test_a_forged_response_is_fetched_anew(tmp_path: Path, url: str) -> None:
    session = open_session(tmp_path)
    session.get(url + "/text")
    (key,) = session.cache.responses
    session.cache.responses.cache[key] = pickle.dumps(Evil())
    assert session.cache.urls() == [] and [r.cache_key for r in session.cache.filter(invalid=True)] == [key]
    assert not session.get(url + "/text").from_cache and session.get(url + "/text").from_cache
    session.cache.responses.cache[key] = pickle.dumps(Evil())
    session.cache.delete(invalid=True)
    assert len(session.cache.responses) == 0 and not Evil.ran


# -- handles and processes ----------------------------------------------------------------------


def test_close_ends_one_use_of_many(tmp_path: Path, url: str) -> None:
    first, second = open_session(tmp_path), open_session(tmp_path)
    assert first.cache.responses.cache is second.cache.responses.cache
    first.get(url + "/text")
    handle, table = first.cache.responses.cache, first.cache.responses
    first.close()
    first.close()
    for use in (
        lambda: table["key"], lambda: table.__setitem__("key", 1), lambda: "key" in table, lambda: len(table),
        lambda: list(table), table.clear, lambda: table.bulk_delete(["key"]), lambda: table.__delitem__("key"),
        lambda: first.get(url + "/text"),
    ):  # fmt: skip
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert second.get(url + "/text").from_cache and not handle.closed
    second.close()
    assert handle.closed


PROGRAM = f"""
import sys
from requests_cache import CachedSession
from yatagarasu_cache.integrations.requests_cache import YatagarasuCache
session = CachedSession(backend=YatagarasuCache(sys.argv[1], secret={SECRET!r}), expire_after=60)
for path in sys.argv[3:]:
    print(session.get(sys.argv[2] + path).from_cache)
"""


def test_processes_share_responses(tmp_path: Path, url: str) -> None:
    def run(*paths: str) -> list[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), url, *paths]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("/a", "/a", "/to/b") == ["False", "True", "False"]
    session = open_session(tmp_path)
    assert all(session.get(url + path).from_cache for path in ("/a", "/b", "/to/b"))
    session.get(url + "/c")
    assert run("/c", "/b") == ["True", "True"] and session.cache.contains(url=url + "/to/b")


KILLED = f"""
import sys
from yatagarasu_cache.integrations.requests_cache import YatagarasuDict
table = YatagarasuDict(sys.argv[1], "table", secret={SECRET!r})
number = 0
while True:
    number += 1
    for key in "abc":
        table[key] = [number] * 20_000
    if number == 5:
        print("five", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_values(tmp_path: Path, table: YatagarasuDict) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "cache")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"five\n"
    process.kill()
    process.communicate(timeout=60)
    assert sorted(table) == ["a", "b", "c"]
    for value in table.values():
        assert len(value) == 20_000 and len(set(value)) == 1
    table["a"] = 1
    assert table["a"] == 1


def test_threads_share_a_session(tmp_path: Path, url: str) -> None:
    session, failures = open_session(tmp_path), []

    def work() -> None:
        for number in range(20):
            response: requests.Response = session.get(f"{url}/{number % 5}")
            if response.text != f"/{number % 5}":
                failures.append(response)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(session.cache.responses) == 5
