"""Keys of calls: bound as Python binds arguments, different for what is different, the same everywhere."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import inspect
import ipaddress
import os
import pathlib
import re
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st

from yatagarasu_cache.codec import Key, encode_key
from yatagarasu_cache.computing.call_keys import ByArguments
from yatagarasu_cache.computing.digests import MAX_DEPTH, Undigestible, argument_part

# -- binding --------------------------------------------------------------------------------------

KINDS = [inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD]  # fmt: skip
NAMES = ["a", "b", "c", "d", "e", "f"]
values = st.integers(0, 2)


@st.composite
def functions(draw: st.DrawFn) -> Callable[..., Any]:
    """Functions with all kinds of parameters; they return what they got, by name."""
    counts = [draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 1)), draw(st.integers(0, 2)), draw(st.integers(0, 1))]  # fmt: skip
    names = iter(["a", "b", "c", "d", "args", "e", "f", "kwargs"])
    parameters, has_default = [], False
    for kind, count in zip(KINDS, counts, strict=True):
        for _ in range(count):
            default = inspect.Parameter.empty
            if kind not in (KINDS[2], KINDS[4]):
                only = kind is KINDS[3]
                if has_default and not only or draw(st.booleans()):
                    default = draw(values)
                    has_default = has_default or not only
            parameters.append(inspect.Parameter(next(names), kind, default=default))
    signature = inspect.Signature(parameters)
    namespace: dict[str, Any] = {}
    listed = ", ".join(f"{one.name}={one.name}" for one in parameters)
    exec(f"def function{signature}: return dict({listed})", namespace)
    function: Callable[..., Any] = namespace["function"]
    return function


calls = st.tuples(st.lists(values, max_size=5), st.dictionaries(st.sampled_from(NAMES), values, max_size=4))


def key_of(function: Callable[..., Any], typed: bool = False, ignore: Any = ()) -> Callable[..., Key]:
    keys = ByArguments(function, "name", None, typed, ignore)
    return lambda *args, **kwargs: keys.of(args, kwargs)


@st.composite
def likely_calls(draw: st.DrawFn, function: Callable[..., Any]) -> tuple[list[int], dict[str, int]]:
    """Arguments that the function mostly takes."""
    parameters = inspect.signature(function).parameters.values()
    positional = [one for one in parameters if one.kind in KINDS[:2]]
    given = draw(st.integers(0, len(positional)))
    while given < len(positional) and positional[given].kind is KINDS[0] and positional[given].default is inspect.Parameter.empty:
        given += 1
    args = draw(st.lists(values, min_size=given, max_size=given))
    if given == len(positional) and any(one.kind is KINDS[2] for one in parameters):
        args += draw(st.lists(values, max_size=2))
    named = [*positional[given:], *(one for one in parameters if one.kind is KINDS[3])]
    kwargs = {
        one.name: draw(values)
        for one in named
        if one.kind is not KINDS[0] and (one.default is inspect.Parameter.empty or draw(st.booleans()))
    }
    if draw(st.integers(0, 3)) == 0:
        kwargs[draw(st.sampled_from(NAMES))] = draw(values)
    return args, kwargs


@given(functions(), st.data())
def test_arguments_are_bound_as_python_does_it(function: Any, data: Any) -> None:
    of = key_of(function)
    outcomes = []
    for _ in range(3):
        args, kwargs = data.draw(likely_calls(function))
        try:
            got = function(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                of(*args, **kwargs)
        else:
            outcomes.append((got, of(*args, **kwargs)))
    for got, key in outcomes:
        for got_too, key_too in outcomes:
            assert (got == got_too) == (key == key_too) == (encode_key(key) == encode_key(key_too))


@given(functions(), calls, st.randoms(use_true_random=False))
def test_the_order_of_keywords_does_not_matter(function: Any, call: Any, random: Any) -> None:
    args, kwargs = call
    try:
        key = key_of(function)(*args, **kwargs)
    except TypeError:
        return
    names = random.sample(list(kwargs), len(kwargs))
    assert key_of(function)(*args, **{name: kwargs[name] for name in names}) == key
    signature = inspect.signature(function)
    if any(one.kind is KINDS[0] and one.name in kwargs for one in signature.parameters.values()):
        return  # what is named like a positional-only one belongs to **kwargs: `inspect` loses it
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    assert key_of(function)(*bound.args, **bound.kwargs) == key


def test_what_looks_alike_is_told_apart() -> None:
    def f(a: Any, /, b: Any = None, *args: Any, c: Any = None, **kwargs: Any) -> None: ...

    digest: Any = argument_part([1], False)
    many = tuple(range(40))
    made = [
        ((1,), {}), ((1, 2), {}), (((1, 2),), {}), ((1, None, 2), {}), ((1, None, (2,)), {}), ((1,), {"c": 2}),
        ((1,), {"a": 2}), ((1,), {"d": 2}), ((1,), {"d": (2,)}), ((1,), {"args": 2}), ((1,), {"kwargs": {"d": 2}}),
        (("1",), {}), ((b"1",), {}), (([1],), {}), ((digest,), {}), ((digest[0],), {}), ((None,), {}), (("None",), {}),
        ((1, None, "c", 2), {}), ((1, None, "d", 2), {}), ((1,), {"d": 2, "e": 3}), ((1,), {"d": "2, e=3"}),
        ((1, None, *many), {}), ((1, None, many), {}), ((1, None, (len(many), many)), {}), ((1, None, len(many), many), {}),
        (("",), {}), ((b"",), {}), (((),), {}), (([],), {}), (({},), {}), ((set(),), {}), ((frozenset(),), {}), ((0,), {}),
        (("x" * 1000,), {}), ((b"x" * 1000,), {}), ((["x" * 1000],), {}), ((("x" * 1000,),), {}), ((10**50,), {}), ((str(10**50),), {}),
    ]  # fmt: skip
    keys = [encode_key(key_of(f)(*args, **kwargs)) for args, kwargs in made]
    assert len(set(keys)) == len(keys)
    typed = [encode_key(key_of(f, typed=True)(*args, **kwargs)) for args, kwargs in made]
    assert len({*keys, *typed}) == 2 * len(keys)  # nor do typed keys meet others


def test_arguments_may_have_any_name() -> None:
    def f(self: Any, args: Any, /, kwargs: Any, *, function: Any, **cls: Any) -> None: ...

    assert key_of(f)(1, 2, 3, function=4, self=5, args=6, key=7)[3:] == (1, 2, 3, 4, ("args", 6, "key", 7, "self", 5))  # type: ignore[index]


def test_the_form_names_the_parameters() -> None:
    def f(a: Any, /, b: Any, *args: Any, c: Any = 1, **kwargs: Any) -> None: ...

    assert key_of(f)(1, 2) == ("name", None, "(a, b, *args, c, **kwargs)", 1, 2, (), 1, ())
    assert key_of(f, True, ("b", "args"))(1, object()) == ("name", None, "typed (a, c, **kwargs)", 1, 1, ())
    assert key_of(f, ignore=(0, "**kwargs", "*args", "c"))(open, 2, open, c=open, d=open) == ("name", None, "(b)", 2)


# -- arguments that are no keys -------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Order:
    number: int
    lines: list[str] = dataclasses.field(default_factory=list)
    note: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Other:
    number: int
    lines: list[str] = dataclasses.field(default_factory=list)


class Text(str):
    pass


class Keyed:
    def __init__(self, key: Any) -> None:
        self.key = key

    def __cache_key__(self) -> Any:
        return self.key


class KeyedToo(Keyed):
    pass


UTC = datetime.timezone.utc
NOON = datetime.datetime(2026, 1, 2, 12)
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
DIFFERENT: dict[str, Any] = {
    "list": [1, 2], "tuple": (1, 2), "nested": [(1, 2)], "nested too": ([1, 2],), "flat": [1, [2]], "flatter": [[1], 2],
    "set": {1, 2}, "frozenset": frozenset({1, 2}), "dict": {1: 2}, "pairs": [(1, 2), (3, 4)], "dict of str": {"1": 2},
    "bytearray": bytearray(b"x"), "memoryview": memoryview(b"x"), "array": array.array("b", b"x"), "bytes in a list": [b"x"], "str in a list": ["x"],
    "longer": [b"x" * 100], "longer str": ["x" * 100], "None": [None], "str None": ["None"], "empty": [""], "emptier": [[]],
    "complex": 1 + 0j, "Decimal": decimal.Decimal(1), "Decimal 1.0": decimal.Decimal("1.0"), "Fraction": fractions.Fraction(1),
    "NaN": float("nan"), "Decimal NaN": decimal.Decimal("nan"), "list of NaN": [float("nan")],
    "range": range(2), "slice": slice(2), "ellipsis": ...,
    "datetime": NOON, "aware": NOON.replace(tzinfo=UTC), "Berlin": NOON.replace(tzinfo=BERLIN), "fold": NOON.replace(fold=1),
    "the same instant": NOON.replace(tzinfo=BERLIN).astimezone(UTC), "date": NOON.date(), "time": NOON.time(), "time fold": NOON.time().replace(fold=1),
    "timedelta": datetime.timedelta(1), "microsecond": NOON.replace(microsecond=1), "UTC": UTC, "zone": BERLIN,
    "offset": datetime.timezone(datetime.timedelta(hours=1)),
    "UUID": uuid.UUID(int=1), "path": pathlib.Path("a"), "windows path": pathlib.PureWindowsPath("a"),
    "IPv4": ipaddress.ip_address("1.2.3.4"), "network": ipaddress.ip_network("1.2.3.4"), "interface": ipaddress.ip_interface("1.2.3.4"),
    "pattern": re.compile("a"), "pattern flags": re.compile("a", re.I), "bytes pattern": re.compile(b"a"),
    "enum": Colour.RED, "green": Colour.GREEN, "int enum": Level.LOW, "flag": Access.READ, "flags": Access.READ | Access.WRITE,
    "namedtuple": Point(1, 2), "dataclass": Order(1), "dataclass 2": Order(1, ["a"]), "other class": Other(1), "str subclass": Text("x"),
    "ordered": collections.OrderedDict(a=1, b=2), "ordered otherwise": collections.OrderedDict(b=2, a=1),
    "plain dict": {"a": 1, "b": 2}, "Counter": collections.Counter(a=1, b=2), "proxy": types.MappingProxyType({"a": 1, "b": 2}),
    "defaultdict": collections.defaultdict(int, a=1, b=2), "defaultdict too": collections.defaultdict(list, a=1, b=2),
    "namespace": types.SimpleNamespace(a=1, b=2), "deque": collections.deque([1, 2]), "bounded": collections.deque([1, 2], 2),
    "class": int, "class too": bool, "own class": Order, "keyed": Keyed("k"), "keyed list": Keyed(["k"]), "keyed too": KeyedToo("k"), "keyed bytes": Keyed(b"k"),
}  # fmt: skip


def test_what_is_different_has_different_parts() -> None:
    for typed in (False, True):
        for wrap in (lambda value: value, lambda value: [value], lambda value: {"k": value}):
            met = collections.defaultdict(list)
            for name, value in DIFFERENT.items():
                met[encode_key(argument_part(wrap(value), typed))].append(name)
            assert [names for names in met.values() if len(names) > 1] == []


SAME: list[tuple[Any, Any]] = [
    ({1: "a", 2: "b"}, {2: "b", 1: "a"}), ({"x", "y", "z"}, {"z", "y", "x"}), (range(0), range(1, 1)), (range(1, 2), range(1, 3, 5)),
    (Order(1, note=object()), Order(1, note=5)), (NOON, datetime.datetime.fromisoformat("2026-01-02T12:00")), (pathlib.Path("a/b"), pathlib.PurePosixPath("a//b")),
    (Keyed("k"), Keyed("k")), ([float("nan")], [-float("nan")]), (collections.Counter(a=1, b=2), collections.Counter(b=2, a=1)),
    (bytearray(b"xyz"), bytearray(b"xyz")), (memoryview(b"xyz"), memoryview(bytearray(b"xyz"))), (memoryview(b"x_y_z")[::2], memoryview(b"xyz")),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
@pytest.mark.parametrize("typed", [False, True])
def test_what_is_the_same_has_the_same_part(one: Any, other: Any, typed: bool) -> None:
    assert argument_part(one, typed) == argument_part(other, typed)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (1, (x,)), lambda x: {x}, lambda x: {x: x}, lambda x: {"k": [{"l": x}]}, Order, lambda x: Keyed((x,)), lambda x: collections.deque([x])])  # fmt: skip
def test_equal_numbers_meet_wherever_they_are_unless_typed(wrap: Any) -> None:
    parts = [[encode_key(argument_part(wrap(x), typed)) for x in (1, 1.0, True)] for typed in (False, True)]
    assert len(set(parts[0])) == 1 and len(set(parts[1])) == 3
    assert argument_part(wrap(0.0), True) == argument_part(wrap(-0.0), True)
    large = 2.0**70
    assert argument_part(wrap(large), False) == argument_part(wrap(int(large)), False)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2) | st.integers(0, 3), inner, max_size=3),
)  # fmt: skip


def strictly(value: Any) -> Any:
    """Something that is equal to that of another value only if that has the same types and content."""
    if isinstance(value, dict):
        return "dict", frozenset((strictly(key), strictly(member)) for key, member in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(strictly, value))
    return type(value), value


@given(json, json)
def test_parts_are_equal_for_equal_values_only(one: Any, other: Any) -> None:
    assert (argument_part(one, True) == argument_part(other, True)) == (strictly(one) == strictly(other))
    if strictly(one) == strictly(other):
        assert argument_part(one, False) == argument_part(other, False)
    encode_key(argument_part(one, False))


def test_what_occurs_often_is_written_once() -> None:
    value: Any = ["x"]
    for _ in range(90):
        value = [value, value, {"a": value}]
    assert argument_part(value, False) == argument_part(value, True)


def test_cycles_and_depth() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = [endless]
    with pytest.raises(Undigestible, match="contains itself"):
        argument_part(endless, False)
    itself = Keyed(None)
    itself.key = itself
    with pytest.raises(Undigestible, match="contains itself"):
        argument_part(itself, False)
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    argument_part(deep, False)
    with pytest.raises(Undigestible, match="nested deeper than 100"):
        argument_part([deep], False)


class Unset:
    __slots__ = ("value",)


class Holder(str):
    content = ""


def holder() -> Any:
    made = Holder("x")
    made.content = "more"  # type: ignore[misc]
    return made


@dataclasses.dataclass
class Rows(list):  # type: ignore[type-arg]
    name: str


@pytest.mark.parametrize(
    "value",
    [object(), len, lambda: 0, test_cycles_and_depth, iter([]), open, Unset(), holder(), Rows("a"), type("Local", (), {}), list[int], [object()], {"k": object()}, {object()}, NOON.replace(tzinfo=type("Zone", (datetime.tzinfo,), {})()), memoryview(array.array("l", [1]))],
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(value: Any) -> None:
    with pytest.raises(Undigestible):
        argument_part(value, False)


def test_the_key_of_a_class_is_a_class_method() -> None:
    class Service:
        @classmethod
        def __cache_key__(cls) -> str:
            return "v1"

    part: Any = argument_part(Service, False)
    assert part[0].endswith(":test_the_key_of_a_class_is_a_class_method.<locals>.Service") and part[1] == "v1"
    assert argument_part(Keyed, False) == argument_part(Keyed, True)  # the method is for its objects


def test_attrs_pydantic_and_msgspec() -> None:
    attrs, pydantic, msgspec = (pytest.importorskip(name) for name in ("attrs", "pydantic", "msgspec"))
    User = attrs.make_class("User", {"name": attrs.field(), "cache": attrs.field(default=None, eq=False)})
    Model = pydantic.create_model("Model", name=(str, ...), tags=(list[str], []))
    Struct = msgspec.defstruct("Struct", [("name", str), ("n", int, 0)])
    made = [User("a"), User("b"), Model(name="a"), Model(name="a", tags=["x"]), Struct("a"), Struct("a", 1), {"name": "a"}]
    parts = [encode_key(argument_part(value, False)) for value in made]
    assert len(set(parts)) == len(parts)
    again = [User("a", object()), User("b"), Model(name="a", tags=[]), Model(name="a", tags=["x"]), Struct("a", 0), Struct("a", 1)]
    assert [encode_key(argument_part(value, False)) for value in again] == parts[:-1]


def test_arrays() -> None:
    np = pytest.importorskip("numpy")
    base = np.arange(12, dtype="i8").reshape(3, 4)
    part = lambda value, typed=False: encode_key(argument_part(value, typed))  # noqa: E731
    for same in (base.copy(), np.asfortranarray(base), base.astype(">i8"), np.arange(24).reshape(3, 8)[:, ::2] // 2, base[:, ::-1][:, ::-1]):
        assert part(same) == part(base) == part(base, True)
    changed = base.copy()
    changed[2, 3] = 0
    different = [base, changed, base.T, base.reshape(4, 3), base.ravel(), base.astype("i4"), base.astype("f8"), base.astype("u8"), base.tolist(), base.tobytes(), base.view("M8[ns]"), base.view("m8[s]"), base.astype("U"), base.astype("S"), base.astype(object), np.empty((0, 3)), np.empty((3, 0)), np.array(1), np.array("a"), np.zeros(2, [("a", "i4"), ("b", "i4")]), np.zeros(2, [("a", "i4"), ("c", "i4")])]  # fmt: skip
    assert len({part(value) for value in different}) == len(different)
    padded = np.zeros(2, np.dtype([("a", "i1"), ("b", "i8")], align=True))
    padded.view("u1").reshape(2, -1)[:, 1:8] = 7  # between the fields
    assert part(padded) == part(np.zeros(2, np.dtype([("a", "i1"), ("b", "i8")], align=True)))
    assert part(np.int64(3)) == part(3) == part(np.float64(3)) == part(np.uint8(3)) and part(np.True_) == part(1)
    assert part([np.float32(0.5)]) == part([0.5]) and part(np.str_("a")) == part("a")
    assert len({part(value, True) for value in (np.int64(3), 3, np.float64(3), np.int32(3))}) == 4
    assert part(np.datetime64("2026-01-02")) != part(np.datetime64("2026-01-02", "s"))
    for refused in (np.zeros(2, "g"), np.ma.array([1]), np.array([object()]), np.longdouble(1)):
        with pytest.raises(Undigestible):
            argument_part(refused, False)


def test_parts_are_the_same_in_every_process() -> None:
    code = """
import sys
from test_call_keys import DIFFERENT, argument_part
import numpy
values = {**DIFFERENT, "words": {str(n) for n in range(50)}, "array": numpy.arange(5), "mixed": {"a": {1, "x", (2, None)}, 5: frozenset("abc")}}
print({name: argument_part(value, typed) for name, value in sorted(values.items()) for typed in (False, True)})
"""
    pytest.importorskip("numpy")
    path = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    outputs = set()
    for seed in ("0", "1", "random"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONHASHSEED", seed)
            outputs.add(run_python(f"import sys; sys.path[:0] = {path!r}\n" + code))
    assert len(outputs) == 1


def test_parts_stay_the_same_from_release_to_release() -> None:
    """Else whatever was kept is computed anew."""
    value = {"a": [1, 2.5, True, None, "x", b"y"], "b": {(1, 2), "z"}, "c": NOON.replace(tzinfo=UTC), "d": "long" * 100}
    part: Any = argument_part(value, False)
    assert part[0].hex() == "2383e5cb9e70b5981f840ed7b591b5bbf5568face1197009f24f2b33aaa7eeaee0"
