"""`TypedSerializer`: objects of listed classes come back as they were, and of no others; nothing of theirs runs."""

from __future__ import annotations

import abc
import asyncio
import collections
import dataclasses
import datetime as dt
import enum
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import ormsgpack
import pytest
from helpers import environment, run_python
from hypothesis import given
from hypothesis import strategies as st
from samples import DEFAULT, canonical, damage, label, values

from yatagarasu_cache import (
    AsyncDiskCache,
    ConfigurationError,
    DiskCache,
    SerializationError,
    TypedSerializer,
)
from yatagarasu_cache.codec import KIND_CUSTOM, KIND_MSGPACK, ValueCodec

RAN: list[str] = []  # what ran that should not, when something is read
T = TypeVar("T")


@dataclasses.dataclass
class Plain:
    x: int
    y: list[Any] = dataclasses.field(default_factory=list)
    z: Any = None

    def __post_init__(self) -> None:
        RAN.append("post_init")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    hidden: int = dataclasses.field(default=1, init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slotted:
    x: Any
    __private: int = 3


@dataclasses.dataclass
class WithInit:
    start: dataclasses.InitVar[int]
    value: int = dataclasses.field(init=False)

    def __post_init__(self, start: int) -> None:
        self.value = start + 1
        self.beside = "not a field"


@dataclasses.dataclass
class Base(abc.ABC):
    a: int


@dataclasses.dataclass
class Derived(Base, Generic[T]):
    b: Any = None

    @functools.cached_property
    def costly(self) -> object:
        return object()


class Color(enum.Enum):
    RED = (1, 2)
    CRIMSON = RED
    BLUE = object()


class Level(enum.IntEnum):
    LOW = 1


class Text(str, enum.Enum):
    A = "a"


class Bits(enum.Flag):
    A = 1
    B = 2
    AB = 3


class Loose(enum.IntFlag):
    A = 1


class Point(NamedTuple):
    x: Any
    y: Any = 0

    def total(self) -> Any:
        return self.x + self.y


Pair = collections.namedtuple("Pair", "a b")


class Strict(TypedSerializer):
    """One that a caller derived."""


CLASSES: list[Any] = [Plain, Frozen, Slotted, WithInit, Derived, Color, Level, Text, Bits, Loose, Point, Pair]
TYPED = ValueCodec(TypedSerializer(CLASSES))


def through(value: Any, codec: ValueCodec = TYPED) -> Any:
    payload, flags = codec.encode(value, key="k")
    RAN.clear()
    back = codec.decode(bytes(payload), flags, "k")
    assert not RAN
    return back


VALUES = [
    Plain(1, [Plain(2)], {"a": Frozen((1,))}), Frozen(dt.date(2026, 1, 2)), Slotted(x={1, 2}), Derived(1, [None]), Color.RED, Color.CRIMSON,
    Color.BLUE, Level.LOW, Text.A, Bits.A, Bits.A | Bits.B, Bits(0), Loose.A | Loose(8), Point(1, [2]), Pair("a", Pair(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=label)
def test_objects_come_back(value: Any) -> None:
    around: list[Any] = [value, [value], {"a": (value, 1)}, [1, {"b": [value, value]}, Point(value, 2)], Plain(1, [value])]
    try:
        hash(value)
    except TypeError:
        pass
    else:
        around += [{value}, {value: value}, {(1, value): 2}]
    for whole in around:
        back = through(whole)
        assert back == whole and type(back) is type(whole) and repr(back) == repr(whole)
    if isinstance(value, enum.Enum) and not isinstance(value, enum.Flag):
        assert through(value) is value


def test_the_whole_state_comes_back() -> None:
    frozen = Frozen(1)
    object.__setattr__(frozen, "hidden", 7)
    assert through(frozen).hidden == 7
    assert through(Slotted(x=1))._Slotted__private == 3
    computed = through(WithInit(4))
    assert computed.value == 5 and computed.beside == "not a field"
    unset = Plain(1)
    del unset.z
    assert "z" not in vars(through(unset)) and through(unset).x == 1
    derived = Derived(1)
    derived.costly  # noqa: B018
    assert "costly" not in vars(through(derived)) and through(derived) == derived


@given(values, values)
def test_any_values_in_them(one: Any, other: Any) -> None:
    plain, point = through([Plain(1, [one], other), Point(one, Slotted(x=other))])
    assert canonical([plain.y[0], plain.z, point.x, point.y.x]) == canonical([one, other, one, other])


def test_what_has_no_such_object_is_everybodys() -> None:
    for value in ([1, (2,)], {"a": dt.date(2026, 1, 2)}, dt.timezone.utc, {1}):
        payload, flags = TYPED.encode(value)
        assert flags == KIND_MSGPACK and DEFAULT.decode(bytes(payload), flags) == value
    payload, flags = TYPED.encode([Point(1, 2)])
    assert flags == KIND_CUSTOM
    with pytest.raises(SerializationError, match=r"stored with serializer 'typed'.*TypedSerializer\(types="):
        DEFAULT.decode(bytes(payload), flags)


class Stranger:
    pass


@dataclasses.dataclass
class Below(Plain):
    pass


@pytest.mark.parametrize("value", [Stranger(), Below(1), Plain, object()], ids=label)
def test_what_is_not_listed_is_refused(value: Any) -> None:
    for whole in (value, [Plain(1), value], Plain(1, [value]), {"a": Point(value, 1)}):
        with pytest.raises(SerializationError, match=r"types=\[...\]") as caught:
            TYPED.encode(whole)
        assert type(value).__qualname__ in str(caught.value)


def test_a_removed_class_is_told_of() -> None:
    payload, flags = TYPED.encode([Point(1, 2)])
    fewer = ValueCodec(TypedSerializer([Plain]))
    with pytest.raises(SerializationError, match=r"object of the class '\w+:Point', which is not in types=\[...\]"):
        fewer.decode(bytes(payload), flags)


def changed(cls: type, other: type) -> ValueCodec:
    """A codec for a class that has the name of another one."""
    other.__module__, other.__qualname__ = cls.__module__, cls.__qualname__
    return ValueCodec(TypedSerializer([other]))


def test_classes_that_have_changed_are_told_of() -> None:
    fewer = dataclasses.make_dataclass("Frozen", [("x", Any)], frozen=True)
    more = dataclasses.make_dataclass("Frozen", [("x", Any), ("hidden", int), ("new", int, 5)], frozen=True)
    slots = dataclasses.make_dataclass("WithInit", [("value", int)], slots=True)
    renamed = collections.namedtuple("Point", "x z")
    colors = enum.Enum("Color", "GREEN")
    bits = enum.Flag("Bits", "C")
    for value, cls, what in [
        (Frozen(1), fewer, "has no field 'hidden' now"), (Frozen(1), more, "has a field 'new' more now"),
        (WithInit(1), slots, "has slots, and none for 'beside'"), (Point(1), renamed, "has no field 'y' now"),
        (Color.RED, colors, "lacks the member 'RED'"), (Bits.AB, bits, "lacks bits of 3"),
    ]:  # fmt: skip
        payload, flags = TYPED.encode([value])
        with pytest.raises(SerializationError, match=f"{type(value).__name__}.*{what}.*set the value anew"):
            changed(type(value), cls).decode(bytes(payload), flags)


def assert_changed(value: Any, other: type, what: str) -> None:
    """What was stored of an object is no object of a class that has taken the name of its own."""
    payload, flags = ValueCodec(TypedSerializer([type(value)])).encode([value])
    name = type(value).__qualname__.rpartition(".")[2]
    with pytest.raises(SerializationError, match=f"{name}.*{what}.*set the value anew"):
        changed(type(value), other).decode(bytes(payload), flags)


def test_classes_of_another_kind_are_told_of() -> None:
    """They have the same fields; and where these are in another order it is not damage."""
    frozen = dataclasses.make_dataclass("Point", ["x", "y"])
    kinds = "is of another kind \\('{}', and was '{}'\\) now"
    assert_changed(Point(1, 2), frozen, kinds.format("dataclass", "namedtuple"))
    assert_changed(Plain(1), collections.namedtuple("Plain", ["x", "y", "z"]), kinds.format("namedtuple", "dataclass"))
    assert_changed(Color.RED, enum.Flag("Color", "RED"), kinds.format("Flag", "Enum"))
    assert_changed(Bits.A, enum.Enum("Bits", "A"), kinds.format("Enum", "Flag"))
    assert_changed(Point(1, 2), collections.namedtuple("Point", ["y", "x"]), "has its fields in another order now")


def test_a_class_that_lost_its_hash_is_thought_of() -> None:
    payload, flags = ValueCodec(TypedSerializer([Frozen])).encode({Frozen(1), Frozen(2)})
    mutable = dataclasses.make_dataclass("Frozen", [("x", Any), ("hidden", int)])
    with pytest.raises(SerializationError, match="damaged, or a class in it was changed: .*unhashable"):
        changed(Frozen, mutable).decode(bytes(payload), flags)


class Named(enum.Enum):
    A = 1
    B = 2

    @property
    def name(self) -> Any:  # as choices and labels of web frameworks have it
        return "B" if self is Named.A else 5

    @property
    def value(self) -> Any:
        return "another"


class Valued(enum.Flag):
    A = 1
    B = 2

    @property
    def value(self) -> Any:
        return 7


def test_enums_with_names_and_values_of_their_own() -> None:
    codec = ValueCodec(TypedSerializer([Named, Valued]))
    for member in (Named.A, Named.B, Valued.A, Valued.B):
        assert through([member], codec)[0] is member and through({member: 1}, codec) == {member: 1}
    assert through(Valued.A | Valued.B, codec) == Valued.A | Valued.B


def test_what_is_no_member_of_its_enum_is_refused() -> None:
    stray = object.__new__(Color)
    stray._name_ = "RED"
    with pytest.raises(SerializationError, match="no member of it would not come back"):
        TYPED.encode([stray])


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


def test_what_typing_notes_is_left_out() -> None:
    codec = ValueCodec(TypedSerializer([Box]))
    box = Box[int](1)
    assert "__orig_class__" in vars(box)
    back = through([box, Box("a")], codec)
    assert back == [box, Box("a")] and vars(back[0]) == {"content": 1}
    attrs = pytest.importorskip("attrs")

    @attrs.define(slots=False)
    class Crate(Generic[T]):
        content: T

    assert vars(through(Crate[int](1), ValueCodec(TypedSerializer([Crate])))) == {"content": 1}
    msgspec = pytest.importorskip("msgspec")

    class Chest(msgspec.Struct, Generic[T], dict=True):  # type: ignore[misc,name-defined,call-arg]
        content: T

    assert through(Chest[int](1), ValueCodec(TypedSerializer([Chest]))) == Chest(1)


NAMED = """
import multiprocessing, sys
from dataclasses import dataclass
from yatagarasu_cache import DiskCache, SerializationError, TypedSerializer

@dataclass
class Result:
    x: int

TYPED = TypedSerializer([Result])

def cache():
    return DiskCache(PLACE, serializer=TYPED)

def read(key):
    with cache() as mine:
        value = mine.get(key)
        assert type(value) is Result
        mine[key] = Result(value.x + 1)

def main():
    key = sys.argv[1]
    with cache() as mine:
        if len(sys.argv) > 2:
            mine[key] = Result(1)
            worker = multiprocessing.get_context("spawn").Process(target=read, args=(key,))
            worker.start()
            worker.join()
            assert not worker.exitcode and mine[key] == Result(2)
        try:
            print(mine[key].x)
        except SerializationError as error:
            print(str(error).partition("object of the class ")[2].split()[0])

if __name__ == "__main__":
    main()
"""


def test_classes_of_scripts_are_told_apart(tmp_path: Path) -> None:
    """By their files; modules are called the same whether they are run or imported."""
    source = f"PLACE = {str(tmp_path / 'cache')!r}\n" + NAMED
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    for name in ("one.py", "two.py", "pkg/mod.py"):
        (tmp_path / name).write_text(source)

    def run(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environment()
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run("one.py", "a", "new") == "2" and run(tmp_path / "one.py", "a") == "2"
    assert run("two.py", "a") == repr(f"{os.path.realpath(tmp_path / 'one.py')}:Result") + ","
    assert run("-m", "pkg.mod", "b", "new") == "2"
    assert run("-c", "import pkg.mod, sys; pkg.mod.main()", "b") == "2"


@pytest.mark.parametrize(
    "types",
    [
        Plain, 5, "Plain", None, [Plain, 1], [Plain, "Plain"], [Stranger], [int], [dict], [dt.datetime], [object], [Plain(1)],
        [dataclasses.make_dataclass("D", ["x"], bases=(dict,))], [dataclasses.make_dataclass("E", ["x"], bases=(ValueError,))],
    ],
    ids=label,
)  # fmt: skip
def test_what_can_not_be_listed(types: Any) -> None:
    with pytest.raises(ConfigurationError, match="^types (must be|has) "):
        TypedSerializer(types)


def test_two_classes_of_one_name() -> None:
    twin = dataclasses.make_dataclass("Plain", ["x"])
    twin.__module__, twin.__qualname__ = Plain.__module__, Plain.__qualname__
    with pytest.raises(ConfigurationError, match=r"two classes of the name '\w+:Plain'"):
        TypedSerializer([Plain, twin])
    assert through(Plain(1), ValueCodec(TypedSerializer([Plain, Plain]))) == Plain(1)


def test_attributes_that_no_field_holds_are_refused_where_they_would_be_lost() -> None:
    class Open(Pair):  # type: ignore[valid-type,misc]
        pass

    codec = ValueCodec(TypedSerializer([Open]))
    value = Open(1, 2)
    assert through(value, codec) == value
    value.more = 3
    with pytest.raises(SerializationError, match=r"'more'.*declare them as fields"):
        codec.encode(value)


def test_depth_and_loops_end() -> None:
    loop = Plain(1)
    loop.z = [loop]
    with pytest.raises(SerializationError, match="nested deeper than|contains itself"):
        TYPED.encode(loop)
    deep: Any = 1
    for _ in range(190):
        deep = Point(deep, 0)
    assert through(deep) == deep
    wide: Any = Plain(1)
    for _ in range(40):
        wide = Point(wide, wide)
    with pytest.raises(Exception, match="again and again|takes more than"):
        TYPED.encode(wide, 1 << 30)


def test_it_travels_to_other_processes(directory: Any) -> None:
    serializer = TypedSerializer([Plain, Point])
    assert pickle.loads(pickle.dumps(serializer)).types == (Plain, Point)
    assert repr(serializer).startswith("<TypedSerializer of ") and "Plain" in repr(serializer)
    with DiskCache(directory, serializer=serializer) as cache:
        cache["k"] = Plain(1)
        with pickle.loads(pickle.dumps(cache)) as copy:
            assert copy["k"] == Plain(1)
    code = """
from dataclasses import dataclass
import sys
from yatagarasu_cache import DiskCache, TypedSerializer
@dataclass
class Plain:
    x: int
    y: list
    z: object
Plain.__module__ = sys.argv[2]
with DiskCache(sys.argv[1], serializer=TypedSerializer([Plain])) as cache:
    assert type(cache["k"]) is Plain and cache["k"].x == 1
"""
    run_python(code, directory, Plain.__module__)


def test_under_asyncio(directory: Any) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, serializer=TypedSerializer([Point])) as cache:
            await cache.set("a", Point(1, 2))
            assert await cache.get("a") == Point(1, 2)
            assert (await cache.get_many(["a"]))["a"].total() == 3

    asyncio.run(main())


# -- other packages' classes -----------------------------------------------------------------------


def test_attrs() -> None:
    attrs = pytest.importorskip("attrs")

    @attrs.define
    class Slots:
        x: Any
        y: int = attrs.field(default=3, validator=lambda *_: RAN.append("validator"))

        def __attrs_post_init__(self) -> None:
            RAN.append("post_init")

    @attrs.frozen(slots=False, cache_hash=True, eq=True)
    class Hashing:
        x: Any

    @attrs.frozen(cache_hash=True, eq=True)
    class SlottedHashing:
        x: Any

    codec = ValueCodec(TypedSerializer([Slots, Hashing, SlottedHashing]))
    for cls in (Hashing, SlottedHashing):
        value = cls("text")
        hash(value)
        back = through([value], codec)[0]
        assert back == value and back._attrs_cached_hash is None and hash(back) == hash(value)
        assert through({cls("a"): 1}, codec) == {cls("a"): 1}
    assert through(Slots([Slots(1)], 4), codec) == Slots([Slots(1)], 4)

    @attrs.frozen
    class Hashing2:
        x: Any

    for cls in (Hashing, SlottedHashing):  # whose methods would miss the place for the hash
        Hashing2.__name__ = cls.__name__
        Hashing2.__module__, Hashing2.__qualname__ = cls.__module__, cls.__qualname__
        assert_changed(Hashing2("a"), cls, "has a field '_attrs_cached_hash' more now")


def test_cached_properties_of_attrs() -> None:
    attrs = pytest.importorskip("attrs")

    @attrs.define
    class Plainly:
        x: int

        @functools.cached_property
        def costly(self) -> object:
            return object()  # which would be refused

    @attrs.define
    class Lower(Plainly):
        y: int = 2

        @functools.cached_property
        def other(self) -> int:
            RAN.append("other")
            return self.y

    codec = ValueCodec(TypedSerializer([Plainly, Lower]))
    for value in (Plainly(1), Lower(1)):
        value.costly  # noqa: B018
        assert through([value], codec) == [value]
    value = Lower(1, 5)
    assert value.other == 5
    back = through(value, codec)
    assert back.other == 5 and RAN == ["other"]  # computed anew


def test_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic", minversion="2")

    class Inner(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        model_config = pydantic.ConfigDict(extra="allow", frozen=True)
        x: int

    class Model(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        inner: Inner
        at: dt.datetime
        many: list[Inner] = []
        _private: int = 1

        @pydantic.field_validator("at")
        @classmethod
        def check(cls, value: Any) -> Any:
            RAN.append("validator")
            return value

        @functools.cached_property
        def costly(self) -> object:
            return object()

    class Root(pydantic.RootModel[list[int]]):  # type: ignore[misc,name-defined]
        pass

    codec = ValueCodec(TypedSerializer([Inner, Model, Root]))
    value = Model(inner=Inner(x=1, more="extra"), at=dt.datetime(2026, 1, 2), many=[Inner(x=2)])
    value._private = 5
    value.costly  # noqa: B018
    back = through({"m": value}, codec)["m"]
    assert back == value and back._private == 5 and back.inner.more == "extra"
    assert back.model_fields_set == value.model_fields_set and "costly" not in vars(back)
    assert back.model_copy(update={"many": []}).many == [] and back.model_dump() == value.model_dump()
    assert through(Root([1, 2]), codec) == Root([1, 2])
    assert through({Inner(x=1)}, codec) == {Inner(x=1)}
    with pytest.raises(SerializationError, match="not come back"):
        codec.encode(Model(inner=Inner(x=1, more=object()), at=dt.datetime(2026, 1, 2)))
    with pytest.raises(SerializationError, match="only half made"):
        codec.encode(Model.__new__(Model))


def test_pydantic_models_that_have_changed_are_told_of() -> None:
    """None is half made, nor keeps what was of a model."""
    pydantic = pytest.importorskip("pydantic", minversion="2")

    class M(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        x: int

    class Private(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        x: int
        _kept: int = pydantic.PrivateAttr(3)

    class Open(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        model_config = pydantic.ConfigDict(extra="allow")
        x: int

    data = dataclasses.make_dataclass("M", ["x"])
    others = [data, collections.namedtuple("M", ["x"])]
    for package, make in (("attrs", "make_class"), ("msgspec", "defstruct")):
        others.append(getattr(pytest.importorskip(package), make)("M", ["x"]))
    for other in others:
        assert_changed(M(x=1), other, "is of another kind .*, and was 'pydantic model'")
        assert_changed(other(x=1) if other is not data else data(1), M, "is of another kind .'pydantic model', and was")
    assert_changed(M(x=1), Private, "has a field '_kept' more now")
    assert_changed(Private(x=1), M, "has no field '_kept' now")
    assert_changed(M(x=1), Open, "has a field '__pydantic_extra__' more now")
    assert_changed(Open(x=1), M, "has no field '__pydantic_extra__' now")


def test_models_that_are_stored_in_part_are_refused() -> None:
    pydantic = pytest.importorskip("pydantic", minversion="2")

    class M(pydantic.BaseModel):  # type: ignore[misc,name-defined]
        x: int

    codec, tag = ValueCodec(TypedSerializer([M])), f"{M.__module__}:{M.__qualname__}"
    names = ["x", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"]
    whole = [1, [], None, None]
    assert codec.decode(payload_of(whole, [16, 4, 4], [[tag, "pydantic model", ["x"], names]]), KIND_CUSTOM).x == 1
    for left in range(1, 4):
        fewer, content = names[:left] + names[left + 1 :], whole[:3]
        for listed, held in ((fewer, content), ([*fewer, "x"], whole)):
            payload = payload_of(held, [16, len(held), len(held)], [[tag, "pydantic model", ["x"], listed]])
            with pytest.raises(SerializationError, match="damaged"):
                codec.decode(payload, KIND_CUSTOM)


def test_msgspec() -> None:
    msgspec = pytest.importorskip("msgspec")

    class Struct(msgspec.Struct):  # type: ignore[misc,name-defined]
        x: Any
        y: list[Any] = []

    class Frozen(msgspec.Struct, frozen=True, kw_only=True, tag="t"):  # type: ignore[misc,name-defined,call-arg]
        x: Any
        count: int = 0

        def __post_init__(self) -> None:
            msgspec.structs.force_setattr(self, "count", self.count + 1)

    codec = ValueCodec(TypedSerializer([Struct, Frozen]))
    value = Struct(1, [Frozen(x="a"), Struct((1, 2))])
    assert through(value, codec) == value
    assert through({Frozen(x=1): 2}, codec) == {Frozen(x=1): 2}
    assert through(Frozen(x=1), codec).count == 1  # though its __post_init__ ran again
    with_order = msgspec.defstruct("Struct", ["y", "x"])
    assert_changed(Struct(1), with_order, "has its fields in another order now")

    class Picky(msgspec.Struct):  # type: ignore[misc,name-defined]
        x: Any

    class Pickier(msgspec.Struct):  # type: ignore[misc,name-defined]
        x: Any

        def __post_init__(self) -> None:
            raise LookupError("too small")

    payload, flags = ValueCodec(TypedSerializer([Picky])).encode([Picky(1)])
    with pytest.raises(SerializationError, match="Picky', which does not take it any more: LookupError: too small") as caught:
        changed(Picky, Pickier).decode(bytes(payload), flags)
    assert isinstance(caught.value.__cause__, LookupError)


# -- hostile bytes ---------------------------------------------------------------------------------


def payload_of(parts: Any, steps: Any, classes: Any) -> bytes:
    return b"\x05typed" + ormsgpack.packb(ormsgpack.Ext(0, ormsgpack.packb([parts, steps, classes])))


TAG = f"{Plain.__module__}:Plain"
DATA, ALL = "dataclass", ["x", "y", "z"]


@pytest.mark.parametrize(
    ("parts", "steps", "classes"),
    [
        ([1, 2, 3], [16, 3, 3], [["os:system", "dataclass", [], []]]), ([1, 2, 3], [17, 3, 3], [[TAG, DATA, ALL, ALL]]), ([1, 2], [16, 2, 2], [[TAG, DATA, ALL, ALL]]),
        ([1, 2, 3], [16, 3, 3], [[TAG, DATA, ALL]]), ([1, 2, 3], [16, 3, 3], [[1, DATA, ALL, ALL]]), ([1, 2, 3], [16, 3, 3], [[TAG, DATA, ALL, [1, 2, 3]]]),
        ([1, 2, 3], [16, 3, 3], 5), ([1], [16, 1, 1], [[f"{Plain.__module__}:Color", "Enum", [], []]]), (["os"], [16, 1, 1], [[f"{Plain.__module__}:Color", "Enum", [], []]]),
        ([2**70], [16, 1, 1], [[f"{Plain.__module__}:Bits", "Flag", [], []]]), (["x"], [16, 1, 1], [[f"{Plain.__module__}:Bits", "Flag", [], []]]),
        ([1, 2, 3], [16, 3, 3], [[f"{Plain.__module__}:Point", "namedtuple", ["x", "y"], ["x", "y"]]]),
    ],
)  # fmt: skip
def test_hostile_objects_are_refused(parts: Any, steps: Any, classes: Any) -> None:
    with pytest.raises(SerializationError):
        TYPED.decode(payload_of(parts, steps, classes) if 2**70 not in parts else payload_of([-1.5], steps, classes), KIND_CUSTOM)


def test_names_that_are_no_fields_stay_attributes() -> None:
    """State may have more than the fields: that runs nothing."""
    back = TYPED.decode(payload_of([1, 2, 3], [16, 3, 3], [[TAG, DATA, ALL, ["x", "__class__", "__reduce__"]]]), KIND_CUSTOM)
    assert type(back) is Plain and vars(back)["__class__"] == 2


@given(st.sampled_from(VALUES), st.data())
def test_damaged_objects_are_refused_or_objects(value: Any, data: st.DataObject) -> None:
    payload, flags = TYPED.encode([value, 1])
    RAN.clear()
    try:
        TYPED.decode(damage(bytes(payload), data), flags)
    except SerializationError as error:
        assert "stored" in str(error) or "object" in str(error)
    assert not RAN


def test_a_derived_serializer_is_as_any_other() -> None:
    codec = ValueCodec(Strict([Point]))
    payload, flags = codec.encode([1, Point(1, 2)])
    assert flags == KIND_CUSTOM and codec.decode(bytes(payload), flags) == [1, Point(1, 2)]


