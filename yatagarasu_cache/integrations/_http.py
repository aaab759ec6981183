"""What HTTP says of parts, validators and caches, as far as the middlewares and file responses need it.

Sections are those of RFC 9110 (HTTP semantics) and RFC 9111 (HTTP caching).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from email.utils import formatdate, parsedate_to_datetime
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import quote

from ..entry import Entry

__all__ = [
    "Headers", "Part", "Policy", "Stored", "cache_control", "disposition", "etag_of", "etag_of_version",
    "is_fresh_for", "part_of", "seconds_of", "vary_of",
]  # fmt: skip

Headers = list[tuple[str, str]]
"""Names are in lower case."""

_RANGE = re.compile(r"bytes=(\d*)-(\d*)$", re.ASCII)
_STORABLE = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})  # RFC 9110 15.1
_HOP_BY_HOP = frozenset({  # RFC 9110 7.6.1, and what is made anew for each response
    "connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer",
    "transfer-encoding",
    "upgrade", "content-length", "date", "server", "age",
})  # fmt: skip
_LONGEST_DIGITS = 18


class Part(NamedTuple):
    """What of a body is to be sent: (status, headers, where it begins, bytes)."""

    status: int
    headers: Headers
    start: int
    length: int


def part_of(
    request: Mapping[str, str], size: int, etag: str, modified: float | None = None, status: int = 200
) -> Part:
    """What a GET or HEAD with those headers is to be answered with, of a body of `size` bytes and with that
    strong validator: all of it, one range of it (206), that nothing has changed (304), or that there is no
    such range (416). Several ranges are answered with all of it, as RFC 9110 14.2 allows."""
    headers: Headers = [("etag", etag), ("accept-ranges", "bytes")]
    if modified is not None:
        headers.append(("last-modified", formatdate(int(modified), usegmt=True)))
    if _is_unchanged(request, etag, modified):
        return Part(304, headers, 0, 0)
    wanted = request.get("range")
    if status != 200 or wanted is None or not _is_same(request.get("if-range"), etag, modified):
        return Part(status, headers, 0, size)
    span = _span(wanted, size)
    if span is None:
        return Part(status, headers, 0, size)
    start, end = span
    if start >= end:
        return Part(416, [*headers, ("content-range", f"bytes */{size}")], 0, 0)
    return Part(206, [*headers, ("content-range", f"bytes {start}-{end - 1}/{size}")], start, end - start)


def _span(wanted: str, size: int) -> tuple[int, int] | None:
    """(first byte, byte behind the last one) of a Range; empty if there is none; None: to be ignored."""
    match = _RANGE.match(wanted.strip())
    if match is None or any(len(digits) > _LONGEST_DIGITS for digits in match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return (max(size - int(last), 0), size) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _is_unchanged(request: Mapping[str, str], etag: str, modified: float | None) -> bool:
    """RFC 9110 13.2.2: If-None-Match counts, and If-Modified-Since only without it."""
    given = request.get("if-none-match")
    if given is not None:
        return given.strip() == "*" or etag.removeprefix("W/") in _etags(given)
    since = _seconds(request.get("if-modified-since"))
    return since is not None and modified is not None and int(modified) <= since


def _is_same(if_range: str | None, etag: str, modified: float | None) -> bool:
    """RFC 9110 13.1.5: by a strong comparison."""
    if if_range is None:
        return True
    if if_range.startswith(('"', "W/")):
        return if_range == etag and not etag.startswith("W/")
    since = _seconds(if_range)
    return since is not None and modified is not None and int(modified) == since


def _etags(given: str) -> list[str]:
    return [one.strip().removeprefix("W/") for one in given.split(",")]


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def etag_of(body: bytes) -> str:
    return f'"{blake2b(body, digest_size=16).hexdigest()}"'


def etag_of_version(entry: Entry) -> str:
    """A strong validator: no two values of a key have one version."""
    return f'"{entry.version:x}-{entry.size:x}"'


def disposition(filename: str) -> str:
    """Content-Disposition of a file to be saved under that name (RFC 6266)."""
    plain = "".join(c for c in filename if 32 <= ord(c) < 127 and c not in '"\\%') or "file"
    named = f'attachment; filename="{plain}"'
    return named if plain == filename else f"{named}; filename*=UTF-8''{quote(filename, safe='')}"


def cache_control(values: Iterable[str]) -> dict[str, str | None]:
    """The directives of Cache-Control (RFC 9111 5.2), names in lower case."""
    found: dict[str, str | None] = {}
    for directive in ",".join(values).split(","):
        name, _, value = directive.strip().partition("=")
        if name:
            found[name.strip().lower()] = value.strip().strip('"') if value else None
    return found


def seconds_of(directives: Mapping[str, str | None], name: str) -> int | None:
    value = directives.get(name)
    if value is None or not value.isdecimal():
        return None
    return min(int(value[:_LONGEST_DIGITS]), 1 << 31)


class Stored(NamedTuple):
    """A response that was stored, but for its body."""

    status: int
    headers: Headers
    since: float  # when it was made, in seconds since the epoch
    seconds: float  # for which it is fresh
    is_public: bool  # whether it is also for requests with credentials

    @classmethod
    def of_meta(cls, meta: Any) -> Stored | None:
        """None if it is none."""
        try:
            status, headers, since, seconds, is_public = meta
            pairs = [(str(name), str(value)) for name, value in headers]
            return cls(int(status), pairs, float(since), float(seconds), bool(is_public))
        except (TypeError, ValueError):
            return None

    def meta(self) -> list[Any]:
        return [self.status, [list(pair) for pair in self.headers], self.since, self.seconds, self.is_public]

    @property
    def age(self) -> float:
        """Seconds."""
        return max(time.time() - self.since, 0)

    def answer(self, request: Mapping[str, str], body_length: int) -> Part:
        """What a request is answered with, of this."""
        own = [pair for pair in self.headers if pair[0] not in ("etag", "accept-ranges")]
        etag = next(value for name, value in self.headers if name == "etag")
        modified = _seconds(next((value for name, value in own if name == "last-modified"), None))
        part = part_of(request, body_length, etag, None, self.status)
        if part.status != 304 and "if-none-match" not in request and _is_unchanged(request, etag, modified):
            part = Part(304, [("etag", etag)], 0, 0)
        kept = own if part.status not in (304, 416) else [p for p in own if p[0] in _OF_304]
        return Part(part.status, [*kept, *part.headers, ("age", str(int(self.age)))], part.start, part.length)


_OF_304 = frozenset({"cache-control", "content-location", "date", "expires", "vary", "last-modified"})


class Policy:
    """Which responses are stored, and for how long; as a shared cache (RFC 9111 3).

    expire: seconds for which a response is fresh that says nothing about it; None: those are not stored.
    """

    def __init__(self, expire: float | None) -> None:
        self._expire = expire

    @staticmethod
    def looks(method: str, request: Mapping[str, str]) -> bool:
        """Whether a request may be answered with what is stored."""
        if method not in ("GET", "HEAD"):
            return False
        asked = cache_control([request.get("cache-control", "")])
        return not ({"no-store", "no-cache"} & asked.keys() or seconds_of(asked, "max-age") == 0)

    @staticmethod
    def may_store(method: str, request: Mapping[str, str]) -> bool:
        return method == "GET" and "no-store" not in cache_control([request.get("cache-control", "")])

    @staticmethod
    def has_credentials(request: Mapping[str, str]) -> bool:
        return "authorization" in request or "cookie" in request

    def stored(self, request: Mapping[str, str], status: int, headers: Headers) -> Stored | None:
        """What is stored of a response; None if it is not for this cache."""
        directives = cache_control(value for name, value in headers if name == "cache-control")
        names = {name for name, _ in headers}
        if status not in _STORABLE or {"no-store", "private", "no-cache"} & directives.keys():
            return None
        if "set-cookie" in names or "*" in vary_of(headers):
            return None
        is_public = "public" in directives or "s-maxage" in directives
        if self.has_credentials(request) and not is_public:
            return None
        seconds = self._seconds(directives, headers)
        if seconds is None or seconds <= 0:
            return None
        left_out = _HOP_BY_HOP | set(_listed(headers, "connection"))
        kept = [pair for pair in headers if pair[0] not in left_out]
        return Stored(status, kept, time.time(), seconds, is_public)

    def _seconds(self, directives: Mapping[str, str | None], headers: Headers) -> float | None:
        for name in ("s-maxage", "max-age"):
            if name in directives:
                return seconds_of(directives, name)
        expires = next((value for name, value in headers if name == "expires"), None)
        if expires is not None:
            until = _seconds(expires)
            return None if until is None else until - time.time()
        return self._expire


def vary_of(headers: Headers) -> list[str]:
    """The names of the request's headers that a response depends on."""
    return sorted(set(_listed(headers, "vary")))


def _listed(headers: Headers, name: str) -> Iterator[str]:
    """The parts, in lower case, of a header that is a list."""
    for one, value in headers:
        if one == name:
            yield from filter(None, (part.strip().lower() for part in value.split(",")))


def is_fresh_for(stored: Stored, request: Mapping[str, str]) -> bool:
    """Whether a response that is there may be the answer to a request."""
    asked = cache_control([request.get("cache-control", "")])
    most = seconds_of(asked, "max-age")
    least = seconds_of(asked, "min-fresh") or 0
    if Policy.has_credentials(request) and not stored.is_public:
        return False
    return stored.age + least < stored.seconds and (most is None or stored.age <= most)
