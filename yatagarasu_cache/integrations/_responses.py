"""HTTP responses as entries of a cache: one for each URL, and where the server varies its answers by headers
of the request, one for each of their values. All of a URL have one tag, by which they are forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from ..aio import AsyncDiskCache
from ..cache import DiskCache
from ..errors import ClosedError
from ._http import Headers, Policy, Stored, etag_of, is_fresh_for, vary_of
from ._values import log

__all__ = [
    "Found", "Kept", "Recording", "find", "find_async", "forget", "forget_async", "keep", "keep_async",
    "went_on_without",
]  # fmt: skip

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110 9.2.1

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


class Recording:
    """What an application answers to one request, piece by piece, until it can be stored.

    most: bytes of a body that is stored.
    """

    def __init__(self, policy: Policy, method: str, url: str, request: Mapping[str, str], most: int) -> None:
        self._policy, self._method, self._url, self._request = policy, method, url, request
        self._most = most
        self.give_up()

    def give_up(self) -> None:
        """It is not stored."""
        self._stored: Stored | None = None
        self._pieces: list[bytes] = []
        self._size, self._announced = 0, -1

    def begin(self, status: int, headers: Headers) -> bool:
        """The answer begins, anew perhaps. Whether what is stored of the URL is to be forgotten."""
        self.give_up()
        if self._method not in _SAFE and 200 <= status < 400:
            return True
        if self._policy.may_store(self._method, self._request):
            self._stored = self._policy.stored(self._request, status, headers)
            length = next((value for name, value in headers if name == "content-length"), "")
            self._announced = int(length) if length.isdecimal() else -1
        return False

    def add(self, piece: bytes) -> None:
        if self._stored is None:
            return
        self._size += len(piece)
        if self._size > self._most:
            self.give_up()
        else:
            self._pieces.append(bytes(piece))

    def end(self) -> Kept | None:
        """All of it was sent: what is to be stored."""
        stored, self._stored = self._stored, None
        if stored is None or self._announced not in (-1, self._size):
            return None
        return _kept(self._url, self._request, stored, b"".join(self._pieces))


def went_on_without(framework: str, error: Exception) -> None:
    """A cache that fails stops no request; one that was closed says so."""
    if isinstance(error, ClosedError):
        raise error
    log.warning("%s: a request went on without the cache: %s", framework, error)


def _kept(url: str, request: Mapping[str, str], stored: Stored, body: bytes) -> Kept:
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
