"""HTTP responses as entries of a cache: one for each URL, and where the server varies its answers by headers
of the request, one for each of their values. All of a URL have one tag, by which they are forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ._http import Headers, Stored, etag_of, is_fresh_for, vary_of

__all__ = ["Found", "Kept", "find", "find_async", "forget", "forget_async", "keep", "keep_async", "kept"]

_NAMED = "http"


class Found(NamedTuple):
    """A response that was stored."""

    stored: Stored
    body: bytes


class Kept(NamedTuple):
    """A response that is to be stored."""

    url: str
    vary: list[str]
    variant: Any  # its key, where the server varies what it answers
    stored: Stored
    body: bytes

    @property
    def tag(self) -> bytes:
        return _tag(self.url)

    def entries(self) -> list[tuple[Any, bytes, Any]]:
        """(key, value, metadata) of the entries to store, in this order."""
        whole = [self.vary, self.stored.meta()]
        if not self.vary:
            return [((_NAMED, self.url), self.body, whole)]
        return [(self.variant, self.body, whole), ((_NAMED, self.url), b"", [self.vary, None])]


def kept(url: str, request: Mapping[str, str], stored: Stored, body: bytes) -> Kept:
    headers: Headers = stored.headers
    if not any(name == "etag" for name, _ in headers):
        stored = stored._replace(headers=[*headers, ("etag", etag_of(body))])
    vary = vary_of(headers)
    return Kept(url, vary, _variant(url, vary, request), stored, body)


def find(cache: DiskCache, url: str, request: Mapping[str, str]) -> Found | None:
    """The response that a request may be answered with."""
    body, meta = cache.get((_NAMED, url), with_meta=True)
    vary, known = _of_meta(meta)
    if vary:
        body, meta = cache.get(_variant(url, vary, request), with_meta=True)
        _, known = _of_meta(meta)
    return _found(body, known, request)


async def find_async(cache: AsyncDiskCache, url: str, request: Mapping[str, str]) -> Found | None:
    body, meta = await cache.get((_NAMED, url), with_meta=True)
    vary, known = _of_meta(meta)
    if vary:
        body, meta = await cache.get(_variant(url, vary, request), with_meta=True)
        _, known = _of_meta(meta)
    return _found(body, known, request)


def keep(cache: DiskCache, response: Kept) -> None:
    for key, value, meta in response.entries():
        cache.set(key, value, response.stored.seconds, response.tag, meta)


async def keep_async(cache: AsyncDiskCache, response: Kept) -> None:
    for key, value, meta in response.entries():
        await cache.set(key, value, response.stored.seconds, response.tag, meta)


def forget(cache: DiskCache, url: str) -> None:
    cache.evict(_tag(url))


async def forget_async(cache: AsyncDiskCache, url: str) -> None:
    await cache.evict(_tag(url))


def _of_meta(meta: Any) -> tuple[list[str], Stored | None]:
    if type(meta) is not list or len(meta) != 2 or type(meta[0]) is not list:
        return [], None
    return [str(name) for name in meta[0]], None if meta[1] is None else Stored.of_meta(meta[1])


def _found(body: Any, stored: Stored | None, request: Mapping[str, str]) -> Found | None:
    if stored is None or type(body) is not bytes or not is_fresh_for(stored, request):
        return None
    return Found(stored, body) if any(name == "etag" for name, _ in stored.headers) else None


def _variant(url: str, vary: list[str], request: Mapping[str, str]) -> tuple[str, str, bytes]:
    digest = blake2b(digest_size=16)
    for name in vary:
        digest.update(repr((name, request.get(name))).encode())
    return _NAMED, url, digest.digest()


def _tag(url: str) -> bytes:
    return blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).digest()
