"""For ASGI applications (Starlette, FastAPI, Django, Litestar, ...): a cache of their responses, and a
response that sends a value of a cache:

    app.add_middleware(YatagarasuCacheMiddleware, directory="/var/cache/pages", expire=60)
    return YatagarasuFileResponse(cache, "movie", media_type="video/mp4")  # from a route
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..codec import Key
from ..entry import Entry, Location
from ..errors import CacheError
from ._handles import Use
from ._http import Headers, Part, Policy, disposition, etag_of_version, part_of
from ._responses import Found, Kept, Recording, find_async, forget_async, keep_async, went_on_without

try:  # FastAPI sends only what is derived from it
    from starlette.responses import Response as _Response
except ImportError:
    _Response = object  # type: ignore[assignment, misc]

__all__ = ["YatagarasuCacheMiddleware", "YatagarasuFileResponse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PIECE = 1 << 18  # bytes of a value that are sent at a time
_MOST = 16 << 20  # bytes of a response that is stored


class YatagarasuCacheMiddleware:
    """Answers GET and HEAD with what the application answered before, as a shared HTTP cache does:
    Cache-Control, Expires, Vary, Age, ETag, Range and conditional requests are heeded.

    app: the application. directory: of the cache. expire: seconds for which a response is fresh that says
    nothing about it; None: those are not stored. max_body: bytes of the largest response that is stored.
    settings: those of `DiskCache`.

    Responses with Set-Cookie are not stored, nor are those to requests with Authorization or a Cookie, unless
    they say ``public`` or ``s-maxage``. A request that changes something (POST, PUT, PATCH, DELETE), and is
    answered without an error, makes the cache forget its URL. If the cache fails, requests go on without it.
    """

    def __init__(
        self, app: App, directory: str | os.PathLike[str], *, expire: float | None = None,
        max_body: int = _MOST, **settings: Any,
    ) -> None:  # fmt: skip
        self._app, self._policy, self._most = app, Policy(expire), max_body
        self._use = Use(directory, {"on_unreadable": "miss", **settings})

    @property
    def cache(self) -> AsyncDiskCache:
        """The cache itself. The tag of an entry is a digest of its URL."""
        return self._use.aio

    async def aclose(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        await self._use.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, url = _request_headers(scope), _url(scope)
        if self._policy.looks(scope["method"], request):
            found = await self._find(url, request)
            if found is not None:
                part = found.stored.answer(request, len(found.body))
                body = found.body[part.start : part.start + part.length]
                await _send(send, part, b"" if scope["method"] == "HEAD" else body)
                return
            if "only-if-cached" in request.get("cache-control", ""):
                await _send(send, Part(504, [("content-type", "text/plain")], 0, 0), b"")
                return
        recording = Recording(self._policy, scope["method"], url, request, self._most)
        await self._app(scope, receive, _Recorder(self, recording, url, send))

    async def _find(self, url: str, request: Mapping[str, str]) -> Found | None:
        try:
            return await find_async(self.cache, url, request)
        except (CacheError, OSError) as error:
            went_on_without("asgi", error)
            return None

    async def _keep(self, response: Kept) -> None:
        try:
            await keep_async(self.cache, response)
        except (CacheError, OSError) as error:
            went_on_without("asgi", error)

    async def _forget(self, url: str) -> None:
        try:
            await forget_async(self.cache, url)
        except (CacheError, OSError) as error:
            went_on_without("asgi", error)


class _Recorder:
    """Passes on what the application sends, and stores it once all of it was sent."""

    def __init__(self, cache: YatagarasuCacheMiddleware, recording: Recording, url: str, send: Send) -> None:
        self._cache, self._recording, self._url, self._send = cache, recording, url, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._recording.begin(message["status"], _pairs(message.get("headers", ()))):
                await self._cache._forget(self._url)
        elif message["type"] == "http.response.body":
            self._recording.add(message.get("body", b""))
        else:  # a file sent by the server, a push, ...: not seen here
            self._recording.give_up()
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            response = self._recording.end()
            if response is not None:
                await self._cache._keep(response)


class YatagarasuFileResponse(_Response):
    """Sends a value of a cache, bytes or text, with ETag, Range and conditional requests.

    cache, key: of the value; what has none is answered with 404. status_code, headers, media_type: of the
    response. filename: under which browsers save it.

    Where the server offers it (``http.response.zerocopysend``), the kernel sends the bytes from the file in
    which they lie; else they are read in pieces, in constant memory. What is sent is one version of the
    value, verified, whatever becomes of the entry meanwhile.
    """

    body = b""
    background: Any = None

    def __init__(
        self, cache: AsyncDiskCache | DiskCache, key: Key, *, status_code: int = 200,
        headers: Mapping[str, str] | None = None, media_type: str = "application/octet-stream",
        filename: str | None = None, background: Any = None,
    ) -> None:  # fmt: skip
        given = {name.lower(): value for name, value in (headers or {}).items()}
        if filename is not None:
            given.setdefault("content-disposition", disposition(filename))
        given.setdefault("content-type", media_type)
        self.cache = cache if isinstance(cache, AsyncDiskCache) else AsyncDiskCache._beside(cache)
        self.key, self.status_code, self.background = key, status_code, background
        self.raw_headers = _raw(given.items())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        zero_copy = "http.response.zerocopysend" in (scope.get("extensions") or {})
        opened = await self._opened(zero_copy)
        if opened is None:
            text = b"Not Found"
            headers = [("content-type", "text/plain; charset=utf-8")]
            await _send(send, Part(404, headers, 0, len(text)), b"" if scope["method"] == "HEAD" else text)
        else:
            entry, source = opened
            part = part_of(
                _request_headers(scope), entry.size, etag_of_version(entry), entry.created, self.status_code
            )
            try:
                await self._answer(scope, send, part, source)
            finally:
                await _close(source)
        if self.background is not None:
            await self.background()

    async def _opened(self, zero_copy: bool) -> tuple[Entry, Any] | None:
        """What is known of the value, and an open file of just that version."""
        while (entry := await self.cache.get_entry(self.key)) is not None:
            try:
                opening: Any = self.cache.location if zero_copy else self.cache.open
                source = await opening(self.key)
            except KeyError:
                return None
            again = await self.cache.get_entry(self.key)
            if again is not None and again.version == entry.version:
                return entry, source
            await _close(source)
        return None

    async def _answer(self, scope: Scope, send: Send, part: Part, source: Any) -> None:
        await _start(send, part._replace(headers=[*_pairs(self.raw_headers), *part.headers]))
        if scope["method"] == "HEAD" or not part.length:
            await send({"type": "http.response.body", "body": b""})
        elif isinstance(source, Location):
            await send({"type": "http.response.zerocopysend", "file": source.fd,
                        "offset": source.offset + part.start, "count": part.length})  # fmt: skip
        else:
            await source.seek(part.start)
            left = part.length
            while left:
                piece = await source.read(min(_PIECE, left))
                if not piece:
                    raise OSError(f"the value of {self.key!r} ended early")
                left -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})


async def _close(source: Any) -> None:
    closing = source.close()
    if closing is not None:
        await closing


async def _start(send: Send, part: Part) -> None:
    headers = part.headers
    if part.status != 304 and not any(name == "content-length" for name, _ in headers):
        headers = [*headers, ("content-length", str(part.length))]
    await send({"type": "http.response.start", "status": part.status, "headers": _raw(headers)})


async def _send(send: Send, part: Part, body: bytes) -> None:
    await _start(send, part)
    await send({"type": "http.response.body", "body": body})


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _pairs(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    pairs = ((bytes(name).decode("latin-1"), bytes(value).decode("latin-1")) for name, value in headers)
    return [(name.lower(), value) for name, value in pairs]


def _request_headers(scope: Scope) -> dict[str, str]:
    """Those of one name are one, with commas between (RFC 9110 5.3)."""
    found: dict[str, str] = {}
    for name, value in _pairs(scope["headers"]):
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _url(scope: Scope) -> str:
    host = _request_headers(scope).get("host") or ":".join(map(str, scope.get("server") or ()))
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = (scope.get("query_string") or b"").decode("latin-1")
    return f"{scope.get('scheme', 'http')}://{host}{path}{'?' if query else ''}{query}"
