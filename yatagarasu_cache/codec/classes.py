"""Objects of listed classes, taken apart into plain values and made again as they were.

What is stored names classes and fields, and nothing to import or to call. How an object is made again depends
on what kind of class it is of:

* dataclasses, attrs classes and pydantic models get their state back, slots and ``__dict__``, without a call
  of ``__new__``, ``__init__``, ``__post_init__`` or validators; what `functools.cached_property` keeps is
  left out, and so is what `typing` notes of the parameters of a generic class;
* a namedtuple is a tuple of its values; the member of an Enum is found by name, a Flag by its value;
* a `msgspec.Struct` can be made by its constructor only, so its ``__post_init__`` runs; after that the fields
  are set to what was stored.

Along with an object its class is stored: name, form and fields. An object of a class that has others now is
not made: its methods would find it half done.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from types import BuiltinFunctionType, MemberDescriptorType
from typing import Any

from ..concurrency.interruption import is_interruption, suppressing
from ..errors import ConfigurationError, SerializationError
from .arrays import why_not
from .basics import class_name, type_name
from .bounds import OPENERS, Openers, refused
from .loading import module
from .naming import stored_class_name

__all__ = ["Classes"]

Shape = tuple[str, str, tuple[str, ...], tuple[str, ...]]
"""What the objects of a class have in common: its name, its form, its fields, the names of what is stored of
one."""

_Build = Callable[[list[Any]], Any]


class Classes:
    """The classes of a `TypedSerializer`."""

    def __init__(self, types: tuple[type, ...]) -> None:
        self.families: dict[type, _Family] = {}
        self._by_tag: dict[str, _Family] = {}
        for cls in types:
            if not isinstance(cls, type):
                raise ConfigurationError(f"types has {cls!r} in it, which is no class")
            if cls not in self.families:
                family = self.families[cls] = _family_of(cls)
                other = self._by_tag.setdefault(family.tag, family)
                if other is not family:
                    raise ConfigurationError(
                        f"types has two classes of the name {family.tag!r}, which nothing tells apart in the"
                        " cache: rename one (its __qualname__)"
                    )
        self.openers: Openers = {**OPENERS, **{cls: one.content for cls, one in self.families.items()}}

    def refused(self, value: object) -> SerializationError:
        remedy = (
            "convert it first, or add its class to types=[...] of the TypedSerializer, if it is a dataclass,"
            " attrs class, pydantic model, msgspec.Struct, Enum or namedtuple"
        )
        return refused(value, why_not(value) + remedy)

    def builder(self, tag: str, form: str, fields: list[str], names: list[str]) -> _Build:
        """What makes an object of what was stored of it."""
        if set(map(type, (tag, form, *fields, *names))) != {str} or len(set(names)) != len(names):
            raise ValueError("a class without a name")
        family = self._by_tag.get(tag)
        if family is None:
            raise SerializationError(
                f"a stored value is an object of the class {tag!r}, which is not in types=[...] of the"
                " TypedSerializer: list it there, or set the value anew"
            )
        if form != family.form:
            raise _changed(tag, f"is of another kind ({family.form!r}, and was {form!r})")
        lost, added = set(fields) - set(family.fields), set(family.fields) - set(fields)
        if lost:
            raise _changed(tag, f"has no field {_listed(lost)}")
        if added:
            raise _changed(tag, f"has a field {_listed(added)} more")
        return family.builder(names)


def _changed(tag: str, how: str) -> SerializationError:
    return SerializationError(
        f"a stored value is an object of the class {tag!r} as it was before it was changed: it {how} now;"
        " set the value anew"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _tag(cls: type) -> str:
    """The name of a class in the cache. msgpack has no surrogates, and the path of a script may have some."""
    return stored_class_name(cls).encode(errors="backslashreplace").decode()


# -- families ------------------------------------------------------------------------------------


class _Family:
    """How objects of one class are taken apart and made again."""

    form: str
    fields: tuple[str, ...] = ()

    def __init__(self, cls: type) -> None:
        self.cls, self.tag = cls, _tag(cls)

    def taken(self, value: Any) -> tuple[Shape, list[Any]]:
        """(shape, what is stored) of an object."""
        return (self.tag, self.form, self.fields, self.fields), self.content(value)

    def content(self, value: Any) -> list[Any]:
        return self.taken(value)[1]

    def builder(self, names: list[str]) -> _Build:
        if set(names) != set(self.fields):
            raise ValueError("an object with other fields than its class has")
        if tuple(names) != self.fields:
            raise _changed(self.tag, "has its fields in another order")
        return self.build

    def build(self, content: list[Any]) -> Any:
        raise NotImplementedError

    def _check_count(self, content: list[Any], count: int) -> None:
        if len(content) != count:
            raise ValueError("an object with more or fewer values than fields")

    def _refuse_attributes(self, value: Any) -> None:
        extra = getattr(value, "__dict__", None)
        if extra and extra.keys() != {_OF_TYPING}:
            raise SerializationError(
                f"an object of {type_name(value)} with attributes of its own ({_listed(extra)}) would come"
                " back without them: declare them as fields"
            )


class _Member(_Family):
    """Of an Enum. By ``_name_``, as Enum itself does: a class may have a ``name`` of its own."""

    form = "Enum"

    def content(self, value: Any) -> list[Any]:
        name = value._name_
        if self.cls.__members__.get(name) is not value:  # type: ignore[attr-defined]
            raise SerializationError(
                f"an object of {type_name(value)} that is no member of it would not come back as what it is"
            )
        return [name]

    def build(self, content: list[Any]) -> Any:
        self._check_count(content, 1)
        (name,) = content
        members: dict[str, Any] = self.cls.__members__  # type: ignore[attr-defined]
        if type(name) is not str or name not in members:
            raise _changed(self.tag, f"lacks the member {name!r}")
        return members[name]


class _FlagValue(_Family):
    """Of a Flag: any combination of its bits."""

    form = "Flag"

    def content(self, value: Any) -> list[Any]:
        return [int(value._value_)]

    def build(self, content: list[Any]) -> Any:
        self._check_count(content, 1)
        (bits,) = content
        if type(bits) is not int:
            raise ValueError("a flag that is no number")
        with suppressing(ValueError):
            flag: Any = self.cls(bits)
            if flag._value_ == bits and type(flag) is self.cls:
                return flag
        raise _changed(self.tag, f"lacks bits of {bits}")


class _NamedTuple(_Family):
    form = "namedtuple"

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields = tuple(cls._fields)  # type: ignore[attr-defined]

    def content(self, value: Any) -> list[Any]:
        self._refuse_attributes(value)
        return list(value)

    def build(self, content: list[Any]) -> Any:
        self._check_count(content, len(self.fields))
        return tuple.__new__(self.cls, content)


class _Struct(_Family):
    """Of msgspec."""

    form = "msgspec.Struct"

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.fields = tuple(cls.__struct_fields__)  # type: ignore[attr-defined]
        self._set = module("msgspec").structs.force_setattr

    def content(self, value: Any) -> list[Any]:
        self._refuse_attributes(value)
        return [getattr(value, name) for name in self.fields]

    def build(self, content: list[Any]) -> Any:
        self._check_count(content, len(self.fields))
        made = self._made(dict(zip(self.fields, content, strict=True)))
        for name, value in zip(self.fields, content, strict=True):
            self._set(made, name, value)
        return made

    def _made(self, values: dict[str, Any]) -> Any:
        try:
            return self.cls(**values)
        except Exception as error:
            if is_interruption(error):
                raise
            raise SerializationError(
                f"a stored value is an object of the class {self.tag!r}, which does not take it any more:"
                f" {type_name(error)}: {error}; set the value anew"
            ) from error


_OF_TYPING = "__orig_class__"  # Box[int], of an object that was made by calling that
_STALE = "_attrs_cached_hash"  # of attrs: None until it is asked for; that of a str is another one elsewhere


class _State(_Family):
    """Slots and ``__dict__``: of a dataclass, an attrs class or a pydantic model."""

    def __init__(self, cls: type, form: str, fields: Iterable[str]) -> None:
        super().__init__(cls)
        self.form, self.fields = form, tuple(fields)
        cached = _cached_slots(cls)
        self._slots: dict[str, MemberDescriptorType] = {}
        for base in cls.__mro__:
            for name, one in vars(base).items():
                if isinstance(one, MemberDescriptorType) and name not in cached:
                    self._slots.setdefault(name, one)
        self._has_dict = bool(cls.__dictoffset__)
        # What the methods of a model rely on. A field may be unset: then that of what was stored was so.
        self._needed = {name for name, slot in self._slots.items() if _is_of_models(cls, name, slot)}

    def taken(self, value: Any) -> tuple[Shape, list[Any]]:
        state: dict[str, Any] = {}
        for name, slot in self._slots.items():
            try:
                state[name] = slot.__get__(value)
            except AttributeError:  # not set
                continue
        if self._has_dict:
            state.update(value.__dict__)
            state.pop(_OF_TYPING, None)
            for name in [name for name in state if name not in self.fields]:
                if isinstance(getattr(self.cls, name, None), cached_property):
                    del state[name]
        if _STALE in state:
            state[_STALE] = None
        if not self._needed <= state.keys():
            raise SerializationError(f"an object of {type_name(value)} is only half made: call its __init__")
        return (self.tag, self.form, self.fields, tuple(state)), list(state.values())

    def builder(self, names: list[str]) -> _Build:
        slots = [(at, self._slots[name]) for at, name in enumerate(names) if name in self._slots]
        others = [(at, name) for at, name in enumerate(names) if name not in self._slots]
        if others and not self._has_dict:
            raise _changed(self.tag, "has slots, and none for " + _listed(name for _, name in others))
        if not self._needed.issubset(names):
            raise ValueError("a model without what every model has")
        count = len(names)

        def build(content: list[Any]) -> Any:
            self._check_count(content, count)
            made: Any = object.__new__(self.cls)
            for at, slot in slots:
                slot.__set__(made, content[at])
            if others:
                made.__dict__.update([(name, content[at]) for at, name in others])
            return made

        return build


def _is_of_models(cls: type, name: str, slot: MemberDescriptorType) -> bool:
    """Whether each object of a pydantic model has this slot set: a RootModel hides some."""
    return name.startswith("__pydantic_") and getattr(cls, name, None) is slot


def _cached_slots(cls: type) -> set[str]:
    """What attrs makes of a `functools.cached_property` of a class with slots: a slot that is no field."""
    found: set[str] = set()
    for base in cls.__mro__:
        own = vars(base)
        if "__attrs_attrs__" in own:
            found.update(set(own.get("__slots__", ())) - set(_fields_of_attrs(base)))
    return found


# -- which is which ------------------------------------------------------------------------------


def _family_of(cls: type) -> _Family:
    """The family that a class belongs to; `ConfigurationError` if it is none of those that are supported."""
    if issubclass(cls, enum.Flag):
        return _FlagValue(cls)
    if issubclass(cls, enum.Enum):
        return _Member(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _NamedTuple(cls)
    if _is_below(cls, "msgspec", "Struct"):
        return _Struct(cls)
    form, fields = _form_and_fields(cls)
    if form is None:
        raise ConfigurationError(
            f"types has {class_name(cls)} in it, which is no dataclass, attrs class, pydantic model (version"
            " 2), msgspec.Struct, Enum or namedtuple: make it one of these, or convert its objects"
        )
    for base in cls.__mro__[:-1]:
        if isinstance(vars(base).get("__new__"), BuiltinFunctionType):  # as dict, or Exception
            raise ConfigurationError(
                f"types has {class_name(cls)} in it, which derives from {base.__name__}: its objects would"
                " come back without what that has; keep it in a field"
            )
    return _State(cls, form, fields)


def _form_and_fields(cls: type) -> tuple[str | None, Iterable[str]]:
    """What kind of class a pydantic model, dataclass or attrs class is, and what its objects have; None of
    others."""
    if _is_below(cls, "pydantic", "BaseModel"):
        return "pydantic model", _fields_of_model(cls)
    if hasattr(cls, "__dataclass_fields__"):
        return "dataclass", [field.name for field in module("dataclasses").fields(cls)]
    if hasattr(cls, "__attrs_attrs__"):
        return "attrs class", _fields_of_attrs(cls)
    return None, ()


def _fields_of_model(cls: Any) -> list[str]:
    """With its private attributes; and what it keeps other values in, if it takes any."""
    extra = ["__pydantic_extra__"] if cls.model_config.get("extra") == "allow" else []
    return [*cls.model_fields, *cls.__private_attributes__, *extra]


def _fields_of_attrs(cls: Any) -> list[str]:
    """With the place for its hash, if it is made to keep that."""
    code = getattr(cls.__hash__, "__code__", None)
    stale = [_STALE] if _STALE in getattr(code, "co_names", ()) else []
    return [*[attribute.name for attribute in cls.__attrs_attrs__], *stale]


def _is_below(cls: type, place: str, name: str) -> bool:
    base = getattr(sys.modules.get(place), name, None)
    return isinstance(base, type) and cls is not base and issubclass(cls, base)
