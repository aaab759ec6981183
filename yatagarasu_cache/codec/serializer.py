"""What a serializer is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ..backends.base import Buffer

__all__ = ["Serializer", "takes_memoryview"]


@runtime_checkable
class Serializer(Protocol):
    """What turns an object into bytes and back; give an instance to the cache as `serializer`.

    Errors that it raises reach the caller as `SerializationError`, with the original as cause.

    A class that also has the attribute ``takes_memoryview = True`` gets a read-only memoryview in `loads`, to
    save a copy; it must not keep it.
    """

    @property
    def name(self) -> str:
        """Stored with each value (1 to 255 bytes of UTF-8): only a serializer of this name reads it."""

    def dumps(self, value: Any) -> Buffer:
        """`value` as bytes, or in any other buffer whose bytes lie together (bytearray, memoryview)."""

    def loads(self, data: Any) -> Any:
        """The value that `dumps` made `data` from: bytes, or a memoryview where that is taken."""


def takes_memoryview(serializer: Serializer) -> bool:
    """Whether `loads` takes a memoryview. A class that has its own says so itself, not one above it."""
    for cls in type(serializer).__mro__:
        if "takes_memoryview" in vars(cls):
            return vars(cls)["takes_memoryview"] is True
        if "loads" in vars(cls):
            return False
    return False
