"""The serializer of those who list the classes of their own that it may make objects of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..backends.base import Buffer
from ..errors import ConfigurationError
from ..store.format import MAX_VALUE_BYTES
from ..store.item import Pieces
from .basics import class_name
from .classes import Classes
from .msgpack import dump_with, load

__all__ = ["TypedSerializer"]


class TypedSerializer:
    """All that the default serializer takes, and objects of the classes in `types`, nested at will.

    types: dataclasses, attrs classes, pydantic models (version 2), `msgspec.Struct`, Enum and namedtuple
        classes. Exactly these: a subclass is another class.

    Nothing stored is executed: a value names its classes, and only what is listed is rebuilt, without
    ``__init__`` or validators running (the ``__post_init__`` of a `msgspec.Struct` alone does). A value of a
    class that is not listed any more, or whose fields are others now, is a `SerializationError`. What has no
    such object in it is stored as by the default serializer, and every cache reads it.

    Raises `ConfigurationError` for what is no such class, and for two classes of one name.
    """

    name = "typed"
    takes_memoryview = True

    def __init__(self, types: Iterable[type]) -> None:
        if isinstance(types, type) or not isinstance(types, Iterable):
            raise ConfigurationError("types must be an iterable of classes: for one class, write types=[cls]")
        self.types = tuple(types)
        self._classes = Classes(self.types)

    def dumps(self, value: Any, most: int = MAX_VALUE_BYTES) -> bytes:
        """`value` as bytes; `SerializationError` when it would not come back exactly."""
        dumped, _ = self._dump(value, most)
        return dumped if type(dumped) is bytes else bytes(dumped)

    def _dump(self, value: Any, most: int) -> tuple[bytes | Pieces, bool]:
        """`dumps`, without a copy of the memory of arrays; and whether there are objects of classes in it."""
        return dump_with(self._classes, value, most)

    def loads(self, data: Buffer) -> Any:
        """The value in `data`; `SerializationError` when there is none, or its class is not listed."""
        return load(data, self._classes)

    def __reduce__(self) -> tuple[Any, ...]:
        return TypedSerializer, (self.types,)

    def __repr__(self) -> str:
        return f"<TypedSerializer of {', '.join(map(class_name, self.types)) or 'no classes'}>"
