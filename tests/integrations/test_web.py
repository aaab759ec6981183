"""Caches of responses, and values sent as responses, through ASGI and WSGI: in this process, and by uvicorn and
gunicorn to a real client. What is asked of one is asked of the other."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache
from yatagarasu_cache.errors import CacheIOError

httpx = pytest.importorskip("httpx")

import asyncio  # noqa: E402

import served  # noqa: E402

TESTS = str(Path(__file__).parent)


class Client:
    """Asks an application in this process, whichever kind it is of."""

    def __init__(self, kind: str, app: Any) -> None:
        self.kind, self.app = kind, app

    def request(self, method: str, path: str, headers: Any = None, **more: Any) -> Any:
        if self.kind == "wsgi":
            with httpx.Client(transport=httpx.WSGITransport(self.app), base_url="http://host") as client:
                return client.request(method, path, headers=headers, **more)

        async def ask() -> Any:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://host") as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(ask())

    def get(self, path: str, **headers: str) -> Any:
        return self.request("GET", path, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture(params=["asgi", "wsgi"])
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    monkeypatch.setattr(served, "PLACE", str(tmp_path))
    monkeypatch.setattr(served, "_values", None)
    with DiskCache(tmp_path / "values", large_value_size=1 << 20) as cache:
        cache["small"], cache["text"], cache["big"], cache["empty"], cache["number"] = b"0123456789", "é", served.BIG, b"", 5
    yield tmp_path
    if served._values is not None:
        served._values.close()


def middleware(kind: str, place: Path, **options: Any) -> Any:
    module = importlib.import_module(f"yatagarasu_cache.integrations.{kind}")
    return module.YatagarasuCacheMiddleware(getattr(served, f"{kind}_app"), place / "responses", **options)


@pytest.fixture
def client(kind: str, place: Path) -> Client:
    return Client(kind, middleware(kind, place))


# -- the cache of responses -------------------------------------------------------------------------------------


def test_what_says_so_is_answered_from_the_cache(client: Client) -> None:
    first, second = client.get("/page"), client.get("/page")
    assert (first.text, second.text) == ("call 1", "call 1")
    assert second.headers["content-type"] == "text/plain" and second.headers["content-length"] == "6"
    assert int(second.headers["age"]) < 5 and "age" not in first.headers
    assert client.get("/page?x=1").text == "call 2" and client.get("/page?x=1").text == "call 2"
    assert client.request("HEAD", "/page").headers["content-length"] == "6" and client.get("/page").text == "call 1"


@pytest.mark.parametrize("path", ["/none", "/cookie", "/private"])
def test_what_does_not_is_asked_for_each_time(client: Client, path: str) -> None:
    assert [client.get(path).text for _ in range(2)] == ["call 1", "call 2"]


def test_a_default_time(kind: str, place: Path) -> None:
    client = Client(kind, middleware(kind, place, expire=60))
    assert [client.get(path).text for path in ("/none", "/none", "/cookie", "/cookie")] == ["call 1", "call 1", "call 2", "call 3"]
    soon = Client(kind, middleware(kind, place, expire=0.01))
    assert soon.get("/soon").text == "call 4"
    time.sleep(0.05)
    assert soon.get("/soon").text == "call 5"


def test_it_varies_as_the_server_says(client: Client) -> None:
    answers = [client.get("/vary", accept_language=one).text for one in ("de", "en", "de", "en")]
    assert answers == ["call 1", "call 2", "call 1", "call 2"]
    assert client.get("/vary").text == "call 3"


def test_credentials_keep_answers_apart(client: Client) -> None:
    assert client.get("/page").text == "call 1"
    assert client.get("/page", cookie="session=1").text == "call 2" and client.get("/page", authorization="x").text == "call 3"
    assert client.get("/page").text == "call 1"
    assert client.get("/public", cookie="session=1").text == "call 4" == client.get("/public").text


def test_requests_may_refuse(client: Client) -> None:
    assert client.get("/page").text == "call 1"
    assert client.get("/page", cache_control="no-cache").text == "call 2" and client.get("/page").text == "call 2"
    assert client.get("/page", cache_control="no-store").text == "call 3" and client.get("/page").text == "call 2"
    assert client.get("/page", cache_control="max-age=0").text == "call 4"
    assert client.get("/page", cache_control="min-fresh=100").text == "call 5"
    assert client.get("/new", cache_control="only-if-cached").status_code == 504
    assert client.get("/page", cache_control="only-if-cached").text == "call 5"


def test_a_change_makes_it_forget(client: Client) -> None:
    assert client.get("/page").text == "call 1" and client.get("/vary", accept_language="de").text == "call 2"
    for number, method in enumerate(("POST", "PUT", "PATCH", "DELETE")):
        before = 3 + 2 * number
        assert client.request(method, "/page").text == f"call {before}" and client.get("/page").text == f"call {before + 1}"
    assert client.get("/vary", accept_language="de").text == "call 2"
    client.request("POST", "/vary")
    assert client.get("/vary", accept_language="de").text == "call 12"


def test_conditional_requests_and_parts_of_what_is_stored(client: Client) -> None:
    client.get("/page")
    etag = client.get("/page").headers["etag"]
    for given in (etag, f'W/{etag}, "x"', "*"):
        found = client.get("/page", if_none_match=given)
        assert (found.status_code, found.content, found.headers["etag"]) == (304, b"", etag)
    assert client.get("/page", if_none_match='"other"').status_code == 200
    part = client.get("/page", range="bytes=1-3")
    assert (part.status_code, part.text, part.headers["content-range"]) == (206, "all", "bytes 1-3/6")
    assert client.get("/page", range="bytes=1-3", if_range=etag).status_code == 206
    assert client.get("/page", range="bytes=1-3", if_range='"other"').status_code == 200
    assert client.get("/page", range="bytes=9-").status_code == 416


def test_what_is_large_or_not_whole_is_not_stored(kind: str, place: Path) -> None:
    client = Client(kind, middleware(kind, place, max_body=5))
    assert [client.get("/page").text for _ in range(2)] == ["call 1", "call 2"]


def test_a_cache_that_fails_stops_no_request(kind: str, place: Path, monkeypatch: Any) -> None:
    app = middleware(kind, place)
    client = Client(kind, app)

    def fail(*_: Any, **__: Any) -> Any:
        raise CacheIOError(5, "the disk fails")

    async def fail_later(*_: Any, **__: Any) -> Any:
        fail()

    for name in ("get", "set", "evict"):
        monkeypatch.setattr(DiskCache, name, fail)
        monkeypatch.setattr(AsyncDiskCache, name, fail_later)
    monkeypatch.setattr(served, "called", lambda: 7)
    assert [client.get("/page").text, client.get("/page").text, client.request("POST", "/page").text] == ["call 7"] * 3
    monkeypatch.undo()


def test_closing_ends_a_use(kind: str, place: Path) -> None:
    app, other = middleware(kind, place), middleware(kind, place)
    Client(kind, other).get("/page")
    if kind == "asgi":
        asyncio.run(app.aclose())
    else:
        app.close()
    with pytest.raises(ClosedError):
        Client(kind, app).get("/page")
    assert Client(kind, other).get("/page").text == "call 1"


def test_both_kinds_share_what_is_stored(place: Path) -> None:
    assert Client("asgi", middleware("asgi", place)).get("/page?a=%20b").text == "call 1"
    assert Client("wsgi", middleware("wsgi", place)).get("/page?a=%20b").text == "call 1"


# -- values as responses ----------------------------------------------------------------------------------------


@pytest.fixture
def sender(kind: str, place: Path) -> Client:
    return Client(kind, getattr(served, f"{kind}_app"))


@pytest.mark.parametrize("key", ["small", "text", "big", "empty"])
def test_a_value_is_sent(sender: Client, key: str) -> None:
    found, expected = sender.get(f"/value/{key}"), {"small": b"0123456789", "text": "é".encode(), "big": served.BIG, "empty": b""}[key]
    assert found.status_code == 200 and found.content == expected
    assert found.headers["content-length"] == str(len(expected)) and found.headers["content-type"] == "text/plain"
    assert found.headers["accept-ranges"] == "bytes" and "last-modified" in found.headers
    head = sender.request("HEAD", f"/value/{key}")
    assert head.content == b"" and head.headers["content-length"] == str(len(expected))


def test_what_is_not_there(sender: Client) -> None:
    assert sender.get("/value/none").status_code == 404 and sender.request("HEAD", "/value/none").content == b""


@pytest.mark.parametrize("key", ["small", "big"])
@pytest.mark.parametrize(("wanted", "span"), [
    ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 6)), ("bytes=7-", (7, None)), ("bytes=-3", (-3, None)), ("bytes=5-99999999", (5, None)),
    ("bytes=-99999999", (0, None)), ("bytes= 2-5", None), ("bytes=5-2", None), ("items=0-1", None), ("bytes=0-1,3-4", None), ("bytes=-", None),
    ("bytes=99999999-", ()), ("bytes=-0", ()),
])  # fmt: skip
def test_ranges(sender: Client, key: str, wanted: str, span: Any) -> None:
    whole = b"0123456789" if key == "small" else served.BIG
    found = sender.get(f"/value/{key}", range=wanted)
    if span is None:
        assert found.status_code == 200 and found.content == whole
    elif not span:
        assert found.status_code == 416 and found.headers["content-range"] == f"bytes */{len(whole)}"
    else:
        part = whole[slice(*span)]
        start = len(whole) - len(part) if span[1] is None else span[0]
        assert found.status_code == 206 and found.content == part
        assert found.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{len(whole)}"


def test_conditional_requests(sender: Client, place: Path) -> None:
    first = sender.get("/value/small")
    etag, modified = first.headers["etag"], first.headers["last-modified"]
    assert sender.get("/value/small", if_none_match=etag).status_code == 304
    assert sender.get("/value/small", if_modified_since=modified).status_code == 304
    assert sender.get("/value/small", if_modified_since=formatdate(1e9, usegmt=True)).status_code == 200
    assert sender.get("/value/small", if_modified_since="nonsense").status_code == 200
    assert sender.get("/value/small", if_none_match='"x"', if_modified_since=modified).status_code == 200
    assert sender.get("/value/small", range="bytes=0-1", if_range=etag).status_code == 206
    assert sender.get("/value/small", range="bytes=0-1", if_range=modified).status_code == 206
    served.values()["small"] = b"0123456789"
    assert sender.get("/value/small", if_none_match=etag).status_code == 200
    assert sender.get("/value/small", range="bytes=0-1", if_range=etag).status_code == 200


def test_one_version_is_sent_whatever_happens_meanwhile(kind: str, place: Path) -> None:
    module = importlib.import_module(f"yatagarasu_cache.integrations.{kind}")
    cache = served.values()
    new = b"n" * len(served.BIG)
    response = module.YatagarasuFileResponse(cache, "big", filename='a"b é.bin', headers={"X-More": "1"})
    if kind == "wsgi":
        started: list[Any] = []
        body = iter(response({"REQUEST_METHOD": "GET"}, lambda *given: started.append(given)))
        first = next(body)
        cache["big"] = new
        assert first + b"".join(body) == served.BIG
        headers = {name.lower(): value for name, value in started[0][1]}
    else:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            cache["big"] = new

        asyncio.run(response({"type": "http", "method": "GET", "headers": []}, None, send))
        assert b"".join(message.get("body", b"") for message in sent) == served.BIG
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert headers["content-disposition"] == "attachment; filename=\"ab .bin\"; filename*=UTF-8''a%22b%20%C3%A9.bin"
    assert headers["x-more"] == "1" and headers["content-type"] == "application/octet-stream"


def test_a_server_that_sends_parts_of_files_is_let_to(place: Path) -> None:
    from yatagarasu_cache.integrations.asgi import YatagarasuFileResponse

    cache, sent = served.values(), []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.zerocopysend":
            message["data"] = os.pread(message["file"], message["count"], message["offset"])
        sent.append(message)

    scope = {"type": "http", "method": "GET", "headers": [(b"range", b"bytes=3-5")], "extensions": {"http.response.zerocopysend": {}}}
    for key, expected in (("small", b"345"), ("big", served.BIG[3:6])):
        asyncio.run(YatagarasuFileResponse(cache, key)(scope, None, send))  # type: ignore[arg-type]
        assert sent[-1]["data"] == expected
        with pytest.raises(OSError):
            os.fstat(sent[-1]["file"])  # it was closed


def test_starlette_and_its_background_tasks(place: Path) -> None:
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    from yatagarasu_cache.integrations import asgi

    done: list[int] = []

    async def value(request: Any) -> Any:
        response = asgi.YatagarasuFileResponse(served.values(), request.path_params["key"], background=BackgroundTask(done.append, 1))
        assert isinstance(response, Response)
        return response

    async def page(request: Any) -> Any:
        done.append(2)
        return PlainTextResponse("page", headers={"Cache-Control": "max-age=9"})

    caching = Middleware(asgi.YatagarasuCacheMiddleware, directory=place / "responses")
    client = Client("asgi", Starlette(routes=[Route("/v/{key}", value), Route("/page", page)], middleware=[caching]))
    assert client.get("/v/small").content == b"0123456789" and done == [1]
    assert client.get("/page").text == client.get("/page").text == "page" and done == [1, 2]


# -- real servers -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(kind: str, place: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bind = f"127.0.0.1:{port}"
    commands = {
        "asgi": ["uvicorn", "--host", "127.0.0.1", "--port", str(port), "--workers", "2", "--lifespan", "off", "served:asgi_cached"],
        "wsgi": ["gunicorn", "--bind", bind, "--workers", "2", "--threads", "2", "served:wsgi_cached"],
    }
    environ = {**os.environ, "SERVED_PLACE": str(place), "PYTHONPATH": TESTS}
    with (place / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *commands[kind]], env=environ, cwd=TESTS, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def test_real_servers_and_clients(kind: str, place: Path) -> None:
    pytest.importorskip("uvicorn" if kind == "asgi" else "gunicorn")
    with serving(kind, place) as port:
        for _ in range(6):  # whichever worker answers
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                assert client.get("/page").text == "call 1"
                assert client.get("/value/big").content == served.BIG
                found = client.get("/value/big", headers={"Range": "bytes=1000000-3000000"})
                assert found.status_code == 206 and found.content == served.BIG[1_000_000:3_000_001]
                assert client.get("/value/small", headers={"Range": "bytes=3-5"}).content == b"345"
                assert client.get("/value/small").content == b"0123456789" and client.head("/value/big").content == b""
                assert client.get("/value/none").status_code == 404
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/page", headers={"Range": "bytes=0-3"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (206, b"call")
        connection.close()
