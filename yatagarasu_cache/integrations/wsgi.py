"""For WSGI applications (Django, Flask, Falcon, ...): a cache of their responses, and a response that sends a
value of a cache:

    app.wsgi_app = YatagarasuCacheMiddleware(app.wsgi_app, "/var/cache/pages", expire=60)  # Flask
    return YatagarasuFileResponse(cache, "movie", media_type="video/mp4")(environ, start_response)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import responses
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from ..cache import DiskCache
from ..codec import Key
from ..entry import Entry, Location
from ..errors import CacheError
from ._handles import Use
from ._http import Part, Policy, disposition, etag_of_version, part_of
from ._responses import Found, Kept, Recording, find, forget, keep, went_on_without

__all__ = ["YatagarasuCacheMiddleware", "YatagarasuFileResponse"]

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_PIECE = 1 << 18  # bytes of a value that are sent at a time
_MOST = 16 << 20  # bytes of a response that is stored


class YatagarasuCacheMiddleware:
    """As `yatagarasu_cache.integrations.asgi.YatagarasuCacheMiddleware`, for a WSGI application; both may use
    the same directory."""

    def __init__(
        self, app: App, directory: str | os.PathLike[str], *, expire: float | None = None,
        max_body: int = _MOST, **settings: Any,
    ) -> None:  # fmt: skip
        self._app, self._policy, self._most = app, Policy(expire), max_body
        self._use = Use(directory, {"on_unreadable": "miss", **settings})

    @property
    def cache(self) -> DiskCache:
        """The cache itself. The tag of an entry is a digest of its URL."""
        return self._use.cache

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._use.close()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method, request, url = environ["REQUEST_METHOD"], _request_headers(environ), _url(environ)
        if self._policy.looks(method, request):
            found = self._find(url, request)
            if found is not None:
                part = found.stored.answer(request, len(found.body))
                _start(start_response, part)
                return [b"" if method == "HEAD" else found.body[part.start : part.start + part.length]]
            if "only-if-cached" in request.get("cache-control", ""):
                _start(start_response, Part(504, [("content-type", "text/plain")], 0, 0))
                return [b""]
        recording = Recording(self._policy, method, url, request, self._most)
        return _Recorder(self, recording, url, environ, start_response).run(self._app)

    def _find(self, url: str, request: Mapping[str, str]) -> Found | None:
        try:
            return find(self.cache, url, request)
        except (CacheError, OSError) as error:
            went_on_without("wsgi", error)
            return None

    def _keep(self, response: Kept) -> None:
        try:
            keep(self.cache, response)
        except (CacheError, OSError) as error:
            went_on_without("wsgi", error)

    def _forget(self, url: str) -> None:
        try:
            forget(self.cache, url)
        except (CacheError, OSError) as error:
            went_on_without("wsgi", error)


class _Recorder:
    """Passes on what the application answers, and stores it once all of it was sent."""

    def __init__(
        self, cache: YatagarasuCacheMiddleware, recording: Recording, url: str, environ: Environ,
        start_response: StartResponse,
    ) -> None:  # fmt: skip
        self._cache, self._recording, self._url = cache, recording, url
        self._environ, self._start_response = environ, start_response

    def run(self, app: App) -> Iterable[bytes]:
        answer = app(self._environ, self._start)
        wrapper = self._environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type) and isinstance(answer, wrapper):
            return answer  # the server sends the file: nothing of it is seen here
        return self._passed_on(answer)

    def _start(self, status: str, headers: list[tuple[str, str]], *exception: Any) -> Any:
        if self._recording.begin(int(status[:3]), [(name.lower(), value) for name, value in headers]):
            self._cache._forget(self._url)
        write = self._start_response(status, headers, *exception)

        def writing(piece: bytes) -> Any:
            self._recording.add(piece)
            return write(piece)

        return writing

    def _passed_on(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for piece in answer:
                self._recording.add(piece)
                yield piece
            response = self._recording.end()
            if response is not None:
                self._cache._keep(response)
        finally:
            close = getattr(answer, "close", None)
            if close is not None:
                close()


class YatagarasuFileResponse:
    """Sends a value of a cache, bytes or text, with ETag, Range and conditional requests: a WSGI application.

    cache, key: of the value; what has none is answered with 404. status_code, headers, media_type: of the
    response. filename: under which browsers save it.

    Under gunicorn the kernel sends the bytes from the file in which they lie (``wsgi.file_wrapper``); under
    other servers they are read in pieces, in constant memory. What is sent is one version of the value,
    verified, whatever becomes of the entry meanwhile.
    """

    def __init__(
        self, cache: DiskCache, key: Key, *, status_code: int = 200, headers: Mapping[str, str] | None = None,
        media_type: str = "application/octet-stream", filename: str | None = None,
    ) -> None:  # fmt: skip
        given = {name.lower(): value for name, value in (headers or {}).items()}
        if filename is not None:
            given.setdefault("content-disposition", disposition(filename))
        given.setdefault("content-type", media_type)
        self.cache, self.key, self.status_code, self.headers = cache, key, status_code, given

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        by_kernel = _sends_parts(environ)
        opened = self._opened(by_kernel)
        if opened is None:
            text = b"Not Found"
            _start(start_response, Part(404, [("content-type", "text/plain; charset=utf-8")], 0, len(text)))
            return [b"" if is_head else text]
        entry, source = opened
        try:
            part = part_of(
                _request_headers(environ), entry.size, etag_of_version(entry), entry.created, self.status_code
            )
            headers = [*self.headers.items(), *part.headers]
            _start(start_response, Part(part.status, headers, part.start, part.length))
            if is_head or not part.length:
                source.close()
                return [b""]
            pieces: Any
            if by_kernel:
                pieces = environ["wsgi.file_wrapper"](_Span(source, part), _PIECE)
            else:
                pieces = _Pieces(source, part)
        except BaseException:
            source.close()
            raise
        return cast("Iterable[bytes]", pieces)

    def _opened(self, by_kernel: bool) -> tuple[Entry, Any] | None:
        """What is known of the value, and an open file, or the place, of just that version."""
        while (entry := self.cache.get_entry(self.key)) is not None:
            try:
                source: Any = self.cache.location(self.key) if by_kernel else self.cache.open(self.key)
            except KeyError:
                return None
            again = self.cache.get_entry(self.key)
            if again is not None and again.version == entry.version:
                return entry, source
            source.close()
        return None


def _sends_parts(environ: Environ) -> bool:
    """Whether the server's wrapper begins where the file stands, and ends with Content-Length. Others send
    all of the file, of which the value may be a part."""
    return "wsgi.file_wrapper" in environ and environ.get("SERVER_SOFTWARE", "").startswith("gunicorn")


class _Span:
    """A part of a file, as a file: of its own description, which nobody else moves."""

    def __init__(self, location: Location, part: Part) -> None:
        self._location, self._left = location, part.length
        os.lseek(location.fd, location.offset + part.start, os.SEEK_SET)

    def fileno(self) -> int:
        return self._location.fd

    def read(self, size: int = -1) -> bytes:
        data = os.read(self._location.fd, self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._location.close()


class _Pieces:
    """What is left to send of an open file."""

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file, self._left = file, part.length
        file.seek(part.start)

    def __iter__(self) -> Iterator[bytes]:
        while self._left:
            piece = self._file.read(min(_PIECE, self._left))
            if not piece:
                raise OSError("a value of the cache ended early")
            self._left -= len(piece)
            yield piece

    def close(self) -> None:
        self._file.close()


def _start(start_response: StartResponse, part: Part) -> None:
    headers = [(name.title(), value) for name, value in part.headers]
    if part.status != 304 and not any(name == "content-length" for name, _ in part.headers):
        headers.append(("Content-Length", str(part.length)))
    reason = responses.get(part.status, "Unknown")
    start_response(f"{part.status} {reason}", headers)


def _request_headers(environ: Environ) -> dict[str, str]:
    names = [name for name in environ if name.startswith("HTTP_")]
    found = {name[5:].replace("_", "-").lower(): str(environ[name]) for name in names}
    if environ.get("CONTENT_TYPE"):
        found["content-type"] = environ["CONTENT_TYPE"]
    return found


def _url(environ: Environ) -> str:
    host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    path = quote(path, safe="/:@!$&'()*+,;=~", encoding="latin-1")
    query = environ.get("QUERY_STRING", "")
    return f"{environ['wsgi.url_scheme']}://{host}{path}{'?' if query else ''}{query}"
