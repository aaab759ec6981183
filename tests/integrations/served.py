"""Applications that the tests of the middlewares serve, by name, with real servers."""

from __future__ import annotations

import os
import threading
from typing import Any

from yatagarasu_cache import DiskCache
from yatagarasu_cache.integrations import asgi, wsgi

PLACE = os.environ.get("SERVED_PLACE", "")
BIG = bytes(range(256)) * 20_000  # has a file of its own
_calls = threading.Lock()


def value_cache() -> DiskCache:
    return DiskCache(f"{PLACE}/values", large_value_size=1 << 20)


def called() -> int:
    """How often the application was asked, by all processes."""
    with DiskCache(f"{PLACE}/calls") as calls:
        return calls.incr("calls")


def answer(path: str) -> tuple[int, list[tuple[str, str]], list[bytes]]:
    """(status, headers, pieces of the body)."""
    number = str(called()).encode()
    headers = {
        "/page": [("Cache-Control", "max-age=60")],
        "/public": [("Cache-Control", "public, max-age=60")],
        "/vary": [("Cache-Control", "max-age=60"), ("Vary", "Accept-Language")],
        "/cookie": [("Cache-Control", "max-age=60"), ("Set-Cookie", "a=b")],
        "/private": [("Cache-Control", "private, max-age=60")],
    }.get(path, [])
    return 200, [("Content-Type", "text/plain"), *headers], [b"call ", number]


_values: Any = None


def values() -> DiskCache:
    global _values
    if _values is None:
        _values = value_cache()
    return _values


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    path = scope["path"]
    if path.startswith("/value/"):
        await asgi.YatagarasuFileResponse(values(), path[7:], media_type="text/plain")(scope, receive, send)
        return
    status, headers, pieces = answer(path)
    raw = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def wsgi_app(environ: Any, start_response: Any) -> Any:
    path = environ["PATH_INFO"]
    if path.startswith("/value/"):
        return wsgi.YatagarasuFileResponse(values(), path[7:], media_type="text/plain")(environ, start_response)
    status, headers, pieces = answer(path)
    start_response(f"{status} OK", headers)
    return pieces


async def asgi_cached(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await _asgi_middleware()(scope, receive, send)


_made: dict[str, Any] = {}


def _asgi_middleware() -> Any:
    if "asgi" not in _made:
        _made["asgi"] = asgi.YatagarasuCacheMiddleware(asgi_app, f"{PLACE}/responses", max_body=1 << 20)
    return _made["asgi"]


def wsgi_cached(environ: Any, start_response: Any) -> Any:
    if "wsgi" not in _made:
        _made["wsgi"] = wsgi.YatagarasuCacheMiddleware(wsgi_app, f"{PLACE}/responses", max_body=1 << 20)
    return _made["wsgi"](environ, start_response)
