"""The storages of hishel: by themselves, and under the clients that hishel has for httpx and requests.

Both storages are tested by the same tests: `Plain` lets those for coroutines be called without any.
"""

from __future__ import annotations

import asyncio
import gc
import http.server
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hishel")

from hishel import Entry, Headers, Request, Response

from yatagarasu_cache import AsyncDiskCache, CacheIOError, ClosedError, DiskCache, StorageFull
from yatagarasu_cache.integrations import hishel as integration
from yatagarasu_cache.integrations.hishel import AsyncYatagarasuStorage, YatagarasuStorage

REQUEST = Request("GET", "https://example.com/a?b=c", Headers({"accept": "text/html", "x-many": ["1", "2"]}))
BODY = [b"first, ", b"", b"second"]
WHOLE = b"first, second"
LARGE = [bytes([number]) * 100_000 for number in range(30)]  # a file, in the cache and before


class Plain:
    """A storage whose coroutines are run, each to its end, by a loop that stays."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.loop = asyncio.new_event_loop() if isinstance(storage, AsyncYatagarasuStorage) else None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.storage, name)
        if self.loop is None or not callable(method):
            return method
        return lambda *args, **kwargs: self.run(method(*args, **kwargs))

    def run(self, what: Any) -> Any:
        return what if self.loop is None else self.loop.run_until_complete(what)

    def create(self, body: Any = BODY, key: str = "key", status: int = 200, **kwargs: Any) -> Entry:
        """An entry of which nothing was read yet."""
        chunks = iter(body) if self.loop is None else alternating(body)
        response = Response(status, Headers({"content-type": "text/plain", "set-cookie": ["a", "b"]}), chunks)
        entry: Entry = self.create_entry(REQUEST, response, key, **kwargs)
        return entry

    def store(self, body: Any = BODY, key: str = "key", **kwargs: Any) -> Entry:
        entry = self.create(body, key, **kwargs)
        assert self.read(entry) == b"".join(body)
        return entry

    def read(self, entry: Entry) -> bytes:
        return b"".join(self.chunks(entry))

    def chunks(self, entry: Entry) -> Iterator[bytes]:
        stream: Any = entry.response.stream
        if self.loop is None:
            yield from stream
            return
        while True:
            try:
                yield self.run(anext(stream))
            except StopAsyncIteration:
                return

    def end(self, entry: Entry) -> None:
        """Read no further."""
        stream: Any = entry.response.stream
        self.run(stream.close() if self.loop is None else stream.aclose())

    def bodies(self, key: str = "key") -> list[bytes]:
        return [self.read(entry) for entry in self.get_entries(key)]

    @property
    def plain_cache(self) -> DiskCache:
        cache: DiskCache = self.storage._common._use.cache
        return cache

    def dispose(self) -> None:
        self.close()
        if self.loop is not None:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


async def alternating(body: Any) -> AsyncIterator[bytes]:
    for chunk in body:
        await asyncio.sleep(0)
        yield chunk


@pytest.fixture(params=[YatagarasuStorage, AsyncYatagarasuStorage], ids=["sync", "async"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: list[Plain] = []

    def make(**kwargs: Any) -> Plain:
        made.append(Plain(request.param(tmp_path / "cache", **kwargs)))
        return made[-1]

    yield make
    for storage in made:
        storage.dispose()


@pytest.fixture
def storage(make: Any) -> Plain:
    storage: Plain = make()
    return storage


# -- entries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [BODY, [], [b""], LARGE], ids=["some", "none", "empty", "large"])
def test_an_entry_comes_back_as_it_was(storage: Plain, body: list[bytes]) -> None:
    entry = storage.store(body, status=203)
    for _ in range(2):
        (found,) = storage.get_entries("key")
        assert found.id == entry.id and found.request == REQUEST and found.response.status_code == 203
        assert found.response.headers == Headers({"content-type": "text/plain", "set-cookie": ["a", "b"]})
        assert found.response.headers.get_list("set-cookie") == ["a", "b"]
        assert storage.read(found) == b"".join(body)
    assert storage.get_entries("other") == []


def test_a_response_without_a_stream_is_empty(storage: Plain) -> None:
    entry = storage.create_entry(REQUEST, Response(204), "key")
    assert storage.read(entry) == b"" and storage.bodies() == [b""]


def test_an_entry_is_not_there_before_it_is_whole(storage: Plain) -> None:
    entry = storage.create()
    assert storage.get_entries("key") == []
    for chunk in storage.chunks(entry):
        assert storage.get_entries("key") == [] and chunk in BODY
    assert storage.bodies() == [WHOLE]


def test_streams_that_are_not_read_to_their_end_leave_nothing(storage: Plain) -> None:
    for body in (BODY, LARGE):
        entry = storage.create(body)
        next(storage.chunks(entry))
        storage.end(entry)
        unread = storage.create(body)
        storage.end(unread)
        storage.create(body)  # and forgotten

    def fails() -> Iterator[bytes]:
        yield b"some"
        raise ConnectionError("the server went away")

    with pytest.raises(ConnectionError):
        storage.read(storage.create(fails()))
    del entry, unread
    gc.collect()
    assert storage.get_entries("key") == [] and len(storage.plain_cache) == 0
    assert not storage.storage._common._savings


def test_more_than_one_entry_of_a_key(storage: Plain) -> None:
    entries = [storage.store([text]) for text in (b"one", b"two", b"three")]
    assert storage.bodies() == [b"one", b"two", b"three"]
    storage.remove_entry(entries[1].id)
    assert storage.bodies() == [b"one", b"three"] and [e.id for e in storage.get_entries("key")] == [
        entries[0].id, entries[2].id,
    ]  # fmt: skip
    storage.store([b"other"], key="other")
    assert storage.bodies("other") == [b"other"]


def test_more_than_are_kept_for_one_key(storage: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_MOST_VARIANTS", 3)
    for number in range(6):
        storage.store([b"%d" % number])
    assert storage.bodies() == [b"3", b"4", b"5"] and len(storage.plain_cache) == 4  # and their list


def test_headers_are_updated(storage: Plain) -> None:
    entry = storage.store(LARGE)
    (reading,) = storage.get_entries("key")
    new = Headers({"etag": '"2"', "set-cookie": ["c", "d"]})
    storage.update_headers(entry.id, new)
    (found,) = storage.get_entries("key")
    assert found.response.headers == new and found.id == entry.id and found.request == REQUEST
    assert storage.read(found) == storage.read(reading) == b"".join(LARGE)
    storage.update_headers(uuid.uuid4(), new)  # of none
    storage.remove_entry(entry.id)
    storage.update_headers(entry.id, new)
    assert storage.get_entries("key") == []


def test_headers_of_what_is_being_received_are_updated(storage: Plain) -> None:
    entry = storage.create()
    chunks = storage.chunks(entry)
    next(chunks)
    storage.update_headers(entry.id, Headers({"new": "header"}))
    assert b"".join(chunks) == WHOLE[len(BODY[0]) :]
    (found,) = storage.get_entries("key")
    assert found.response.headers == Headers({"new": "header"}) and storage.read(found) == WHOLE


def test_what_is_removed_while_it_is_received_is_not_stored(storage: Plain) -> None:
    entry = storage.create()
    chunks = storage.chunks(entry)
    first = next(chunks)
    storage.remove_entry(entry.id)
    assert first + b"".join(chunks) == WHOLE and storage.get_entries("key") == []
    storage.remove_entry(uuid.uuid4())
    storage.remove_entry(entry.id)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
def test_a_stream_is_whole_whatever_becomes_of_its_entry(storage: Plain, body: list[bytes]) -> None:
    whole = b"".join(body)
    for change in (
        lambda entry: storage.remove_entry(entry.id), lambda entry: storage.plain_cache.clear(),
        lambda entry: storage.update_headers(entry.id, Headers({})),
    ):  # fmt: skip
        entry = storage.store(body)
        (found,), (begun,) = storage.get_entries("key"), storage.get_entries("key")
        chunks = storage.chunks(begun)
        first = next(chunks)
        change(entry)
        assert storage.read(found) == whole and first + b"".join(chunks) == whole
        storage.remove_entry(entry.id)


def test_a_stream_that_ends_early_raises(storage: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.store(LARGE)
    (found,) = storage.get_entries("key")
    frame = getattr(found.response.stream, "gi_frame", None) or found.response.stream.ag_frame
    file = frame.f_locals.get("file") or frame.f_locals["reader"]._file
    file.seek(1)
    with pytest.raises(OSError, match="ended early"):
        storage.read(found)


def test_compressed_bodies_are_whole(make: Any) -> None:
    pytest.importorskip("lz4")
    storage = make(compression="lz4")
    for body in (BODY, [b"a" * 100_000], LARGE):
        entry = storage.store(body)
        storage.update_headers(entry.id, Headers({}))
        assert storage.bodies() == [b"".join(body)]
        storage.remove_entry(entry.id)


# -- times --------------------------------------------------------------------------------------


def test_a_ttl_counts_from_the_beginning(make: Any) -> None:
    storage = make(default_ttl=0.3)
    storage.store()
    storage.store(key="long", ttl=60)
    storage.store(key="zero", ttl=0)
    late = storage.create(key="late", ttl=0.1)
    chunks = storage.chunks(late)
    next(chunks)
    assert storage.bodies() == [WHOLE] and storage.bodies("zero") == []
    time.sleep(0.35)
    assert b"".join(chunks) and storage.bodies("late") == []
    assert storage.bodies() == [] and storage.bodies("long") == [WHOLE]
    # Neither it nor what listed it is left.
    assert not any(key[-1] in ("key", "late", "zero") for key in storage.plain_cache)


def test_a_tti_begins_anew_with_each_use(make: Any) -> None:
    storage = make(default_tti=0.6)
    storage.store()
    storage.store(key="unused")
    storage.store(key="bounded", ttl=0.8)
    for _ in range(3):
        time.sleep(0.4)
        assert storage.bodies() == [WHOLE]
        storage.get_entries("bounded")
    assert storage.bodies("unused") == [] and storage.bodies("bounded") == []
    entry = storage.store(key="headers", tti=60)
    storage.update_headers(entry.id, Headers({"a": "b"}))
    expiring = storage.plain_cache.get_entry(("hishel", entry.id.bytes))
    assert expiring is not None and 55 < (expiring.expires or 0) - time.time() <= 60


def test_a_default_of_the_cache_is_that_of_the_storage(make: Any) -> None:
    storage = make(default_expire=0.4)
    assert storage.storage.default_ttl == 0.4 and make(default_expire=5, default_ttl=6).storage.default_ttl == 6
    first = storage.store([b"first"])
    time.sleep(0.3)
    storage.remove_entry(first.id)
    storage.store([b"second"])
    time.sleep(0.2)  # the list is older than that
    assert storage.bodies() == [b"second"]


def test_only_so_many_bytes_of_a_stream_are_kept(make: Any) -> None:
    storage = make(max_stream_size=len(WHOLE))
    storage.store()
    storage.store([*BODY, b"."], key="long")
    storage.store([WHOLE, b"x" * 10_000_000, b"."], key="longer")
    assert storage.bodies() == [WHOLE] and storage.bodies("long") == storage.bodies("longer") == []
    assert len(storage.plain_cache) == 2


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CacheIOError(5, "the disk failed"), StorageFull(28, "it is full")], ids=["EIO", "full"])
def test_failures_never_break_a_request(
    storage: Plain, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Exception
) -> None:
    kept = storage.store(key="kept")
    kind = DiskCache if storage.loop is None else AsyncDiskCache

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("get", "get_entry", "open", "set", "modify", "delete", "set_meta", "delete_many"):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, fail)
            caplog.clear()
            key = f"failing {name}"
            entry = storage.store(key=key)
            storage.get_entries("kept")
            storage.update_headers(kept.id, Headers({"a": "b"}))
            storage.remove_entry(entry.id)
            if name != "delete_many":
                assert str(error) in caplog.text, name
        assert storage.bodies(key) in ([], [WHOLE])
        assert storage.bodies("kept") == [WHOLE]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "modify", fail)
        before = len(storage.plain_cache)
        storage.store(key="orphan")
        assert len(storage.plain_cache) == before  # a body that no list has
    for name in ("modify", "touch"):
        using = storage.store(key=name, tti=0.02)
        storage.remove_entry(using.id)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "touch", fail)
        storage.store(key="used", tti=0.5)
        time.sleep(0.3)
        assert storage.bodies("used") == [WHOLE]  # for once


def test_a_failing_temporary_file_ends_the_saving_alone(storage: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = storage.create(LARGE)
    chunks = storage.chunks(entry)
    first = next(chunks)

    def fail(*_: Any) -> Any:
        raise OSError(28, "no space left in /tmp")

    (saving,) = storage.storage._common._savings.values()
    monkeypatch.setattr(saving.file, "write", fail)
    del saving
    assert first + b"".join(chunks) == b"".join(LARGE) and storage.get_entries("key") == []


def test_what_is_too_large_for_the_cache_goes_to_its_reader(make: Any) -> None:
    storage = make(max_value_size=1_000_000)
    storage.store(LARGE)
    assert storage.get_entries("key") == [] and len(storage.plain_cache) == 0


def test_strange_things_in_the_directory_are_no_entries(storage: Plain) -> None:
    entry = storage.store()
    cache, name = storage.plain_cache, ("hishel", entry.id.bytes)
    found = cache.get_entry(name)
    assert found is not None
    meta, numbers = found.meta, cache["hishel of", "key"]
    for place, wrong in [(0, "other"), (1, "x"), (2, []), (3, None), (3, "1"), (5, 5), (6, [[1, 2]]), (7, "200"), (8, [["a"]])]:
        cache.set_meta(name, [*meta[:place], wrong, *meta[place + 1 :]])
        assert storage.get_entries("key") == []
        storage.update_headers(entry.id, Headers({}))
        cache["hishel of", "key"] = numbers
    strange: Any
    for strange in (None, 5, [], {}):
        cache.set_meta(name, strange)
        assert storage.get_entries("key") == []
        cache["hishel of", "key"] = numbers
    for value in (5, [1], {"a": 1}):
        cache.set(name, value, meta=meta)  # which is no body
        assert storage.get_entries("key") == []
        cache["hishel of", "key"] = numbers
    cache.set(name, b"short", meta=meta)
    with pytest.raises(OSError):
        storage.bodies()
    for listed in (5, "text", [1, b"short"], {"a": 1}):
        cache["hishel of", "key"] = listed
        assert storage.get_entries("key") == []
    with DiskCache(cache.directory, serializer="pickle") as other:
        other["hishel of", "key"] = {"not": "ours"}
    assert storage.get_entries("key") == []
    storage.store([b"new"])
    assert storage.bodies() == [b"new"]


def test_a_cache_that_is_only_read(make: Any, tmp_path: Path) -> None:
    writer = make()
    entry = writer.store(tti=0.4)
    reader = make(read_only=True)
    time.sleep(0.25)
    assert reader.bodies() == [WHOLE]  # though its use can't be noted
    reader.store(key="other")
    reader.update_headers(entry.id, Headers({}))
    reader.remove_entry(entry.id)
    assert reader.bodies("other") == []


# -- handles ------------------------------------------------------------------------------------


def test_close_ends_one_use_of_many(make: Any) -> None:
    first, second = make(), make(default_ttl=60)
    entry = first.store()
    pending = first.create(key="pending")
    (found,) = first.get_entries("key")
    assert first.cache is second.cache
    first.close()
    first.close()
    use: Any
    for kind in (ClosedError, RuntimeError):
        for use in (
            lambda: first.get_entries("key"), lambda: first.create(), lambda: first.cache,
            lambda: first.update_headers(entry.id, Headers({})), lambda: first.remove_entry(entry.id),
        ):  # fmt: skip
            with pytest.raises(kind, match="closed"):
                use()
    assert first.read(pending) == WHOLE and first.read(found) == WHOLE  # whoever reads may do so
    assert second.bodies() == [WHOLE] and second.bodies("pending") == []


def test_both_kinds_share_a_directory(tmp_path: Path) -> None:
    plain, other = Plain(YatagarasuStorage(tmp_path / "cache")), Plain(AsyncYatagarasuStorage(tmp_path / "cache"))
    plain.store([b"plain"])
    other.store([b"other"])
    assert plain.bodies() == other.bodies() == [b"plain", b"other"]
    plain.dispose()
    assert other.bodies() == [b"plain", b"other"]
    other.dispose()


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_nobody_is_warned_of_what_was_closed_or_not_read(make: Any) -> None:
    storage = make()
    storage.store()
    storage.store(LARGE)
    storage.create(LARGE)
    begun = storage.create(LARGE)
    next(storage.chunks(begun))
    storage.end(begun)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage.get_entries("key")
        del begun
        gc.collect()
        storage.dispose()
        gc.collect()
    storage.dispose = lambda: None


PROGRAM = """
import sys
from hishel import Headers, Request, Response
from yatagarasu_cache.integrations.hishel import YatagarasuStorage
storage = YatagarasuStorage(sys.argv[1])
def create(key, chunks):
    response = Response(200, Headers({"a": "b"}), iter(chunks))
    return storage.create_entry(Request("GET", "http://a"), response, key).response.stream
print("ready", flush=True)
sys.stdin.readline()
"""


def started(program: str, tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + program, str(tmp_path / "cache")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_store_for_each_other(tmp_path: Path, storage: Plain) -> None:
    program = "for n in range(10): list(create('key', [b'%s %d' % (sys.argv[1].encode(), n)]))"
    processes = [started(program, tmp_path) for _ in range(2)]
    for process in processes:
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    assert len(storage.bodies()) == 20 and all(body.startswith(bytes(tmp_path)) for body in storage.bodies())


def test_a_writer_that_is_killed_leaves_whole_entries(tmp_path: Path, storage: Plain) -> None:
    program = """
begun = create("begun", [b"a" * 2000000] * 3)
next(begun)
number = 0
while True:
    number += 1
    list(create("key", [b"%06d" % number] * 50000))
    if number == 5: print("five", flush=True)
"""
    process = started(program, tmp_path)
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "five\n"
    process.kill()
    process.communicate(timeout=60)
    bodies = storage.bodies()
    assert len(bodies) >= 5 and storage.bodies("begun") == []
    assert all(body == body[:6] * 50000 for body in bodies)
    storage.store(key="begun")
    assert storage.bodies("begun") == [WHOLE]


# -- clients ------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, Any]] = []

    def do_GET(self) -> None:
        validator = self.headers.get("If-None-Match")
        self.requests.append((self.command, self.path, validator))
        headers = {"Cache-Control": "max-age=60"}
        body = f"{self.path} in {self.headers.get('Accept-Language')}".encode()
        if self.path.startswith("/etag"):
            headers = {"Cache-Control": "no-cache", "ETag": '"1"', "X-Count": str(len(self.requests))}
        elif self.path.startswith("/vary"):
            headers["Vary"] = "Accept-Language"
        elif self.path.startswith("/large"):
            body = b"".join(LARGE)
        elif self.path.startswith("/private"):
            headers = {"Cache-Control": "no-store"}
        self.send_response(304 if validator else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(0 if validator else len(body)))
        self.end_headers()
        if not validator:
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        Handler.requests.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def follow_the_rules(get: Any, post: Any, url: str) -> None:
    """A client of RFC 9111. get(url, language) -> (body, headers)"""
    requests = Handler.requests
    for _ in range(3):
        assert get(url + "/fresh", "en")[0] == b"/fresh in en"
        assert get(url + "/large", "en")[0] == b"".join(LARGE)
    assert [path for _, path, _ in requests] == ["/fresh", "/large"]
    requests.clear()
    for _ in range(2):
        for language in ("en", "de"):
            assert get(url + "/vary", language)[0] == b"/vary in " + language.encode()
    assert len(requests) == 2
    requests.clear()
    counts = []
    for _ in range(3):
        body, headers = get(url + "/etag", "en")
        assert body == b"/etag in en"
        counts.append(headers["x-count"])
    assert requests == [("GET", "/etag", None), ("GET", "/etag", '"1"'), ("GET", "/etag", '"1"')]
    assert counts == ["1", "2", "3"]  # headers of what was revalidated
    requests.clear()
    post(url + "/fresh")  # after which what is stored may be wrong
    assert get(url + "/fresh", "en")[0] == b"/fresh in en"
    for _ in range(2):
        get(url + "/private", "en")
    assert [path for _, path, _ in requests] == ["/fresh", "/fresh", "/private", "/private"]


def test_a_client_of_httpx(tmp_path: Path, url: str) -> None:
    pytest.importorskip("httpx")
    from hishel.httpx import CacheClient

    with CacheClient(storage=YatagarasuStorage(tmp_path / "cache"), rfc=True) as client:

        def get(url: str, language: str) -> Any:
            response = client.get(url, headers={"accept-language": language})
            return response.content, response.headers

        follow_the_rules(get, client.post, url)
        with client.stream("GET", url + "/large?again") as response:
            next(response.iter_raw())
        assert len(client.get(url + "/large?again").content) == 3_000_000


def test_an_asynchronous_client_of_httpx(tmp_path: Path, url: str) -> None:
    pytest.importorskip("httpx")
    from hishel.httpx import AsyncCacheClient

    async def use() -> None:
        loop = asyncio.get_running_loop()
        async with AsyncCacheClient(storage=AsyncYatagarasuStorage(tmp_path / "cache"), rfc=True) as client:

            def get(url: str, language: str) -> Any:
                call = client.get(url, headers={"accept-language": language})
                response = asyncio.run_coroutine_threadsafe(call, loop).result(30)
                return response.content, response.headers

            def post(url: str) -> None:
                asyncio.run_coroutine_threadsafe(client.post(url), loop).result(30)

            await asyncio.to_thread(follow_the_rules, get, post, url)
            Handler.requests.clear()
            for _ in range(2):
                bodies = await asyncio.gather(*(client.get(f"{url}/fresh?{number % 5}") for number in range(20)))
                assert {body.text for body in bodies} == {f"/fresh?{number} in None" for number in range(5)}
            assert len(Handler.requests) <= 20

    asyncio.run(use())


def test_a_session_of_requests(tmp_path: Path, url: str) -> None:
    requests = pytest.importorskip("requests")
    from hishel.requests import CacheAdapter

    with requests.Session() as session:
        session.mount("http://", CacheAdapter(storage=YatagarasuStorage(tmp_path / "cache"), rfc=True))

        def get(url: str, language: str) -> Any:
            response = session.get(url, headers={"Accept-Language": language})
            return response.content, response.headers

        follow_the_rules(get, session.post, url)


def test_clients_without_rules_go_on_from_another_process(tmp_path: Path, url: str) -> None:
    pytest.importorskip("httpx")
    program = """
from hishel.httpx import CacheClient
with CacheClient(storage=storage) as client:
    response = client.get(sys.argv[2] + "/private")
    print(response.text, response.extensions["caching"]["from_cache"])
"""
    for from_cache in (False, True):
        command = [sys.executable, "-c", PROGRAM + program, str(tmp_path / "cache"), url]
        done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=60)
        assert done.stdout == f"ready\n/private in None {from_cache}\n", done.stderr
