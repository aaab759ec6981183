"""Tags as a database has them: numbers, text and bytes, whatever class derived from these they are of. Equal
numbers are one tag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...arguments import encode_tag

__all__ = ["equal_tags", "stored_tag"]

_PLAIN: dict[type, Callable[[Any], Any]] = {  # past whatever the derived class makes of these methods
    str: str.__str__, int: int.__index__, float: float.__float__,
    **dict.fromkeys((bytes, bytearray, memoryview), lambda tag: bytes(memoryview(tag))),
}  # fmt: skip


def stored_tag(tag: Any) -> bytes:
    """What is stored for a tag; of NaN, for which SQLite has no number, nothing."""
    tag = _plain(tag)
    return b"" if tag is None else encode_tag(tag)


def equal_tags(tag: Any) -> set[bytes]:
    """All that is stored for the tags that are equal to this one: 1, 1.0 and True are, and a `DiskCache` on
    the directory may have stored any of them."""
    tag = _plain(tag)
    if tag is None:
        return set()
    found = {encode_tag(tag)}
    if isinstance(tag, float) and tag.is_integer():
        found.add(encode_tag(int(tag)))
    elif isinstance(tag, int) and abs(tag) <= 1 << 53:
        found.add(encode_tag(float(tag)))
    if tag in (0, 1):
        found.add(encode_tag(bool(tag)))
    return found


def _plain(tag: Any) -> Any:
    """A tag as what it is derived from; None for NaN."""
    if type(tag) is str:
        return tag
    for kind, plain in _PLAIN.items():
        if isinstance(tag, kind):
            tag = plain(tag)
            return tag if tag == tag else None
    return tag
