"""`DiskCache.memoize`: what is computed, what is kept, and what is refused."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Clock, Make, run_python
from interrupting import steps_of
from test_interrupts import free_of_locks, picked_of

from yatagarasu_cache import ClosedError, DiskCache, SerializationError
from yatagarasu_cache.codec import MAX_KEY_BYTES, encode_key

Calls = list[Any]
calls: Calls = []  # of the functions here that must not close over a list of their own


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    calls.clear()
    yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskCache]:
    """Any cache: what is asked here is the same on each."""
    with DiskCache(tmp_path / "store") as cache:
        yield cache


# -- calls ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("core")
def test_each_call_is_computed_once(cache: DiskCache) -> None:
    @cache.memoize()
    def area(width: int, height: int = 3, *, unit: str = "m") -> str:
        """The area."""
        calls.append((width, height, unit))
        return f"{width * height} {unit}"

    assert area(2) == area(2, 3) == area(width=2) == area(height=3, width=2) == area(2, unit="m") == "6 m"
    assert calls == [(2, 3, "m")]
    assert area(2, unit="km") == "6 km" and area(3, 2) == "6 m"
    assert calls[1:] == [(2, 3, "km"), (3, 2, "m")]
    assert cache.get(area.cache_key(2)) == "6 m" and area.cache_key(2) == area.__cache_key__(height=3, width=2)
    assert area.__doc__ == "The area." and area.__name__ == "area" and area.__qualname__.endswith("<locals>.area")
    assert area.__module__ == __name__ and area.__wrapped__(1) == "3 m"
    assert str(inspect.signature(area)) == "(width: 'int', height: 'int' = 3, *, unit: 'str' = 'm') -> 'str'"


def test_without_parentheses(store: DiskCache) -> None:
    @store.memoize
    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    assert double(2) == double(2) == 4 and calls == [2]


@pytest.mark.parametrize("result", [None, False, 0, "", b"", [], {}, math.inf, [1, {"a": (2,)}]])
def test_every_result_is_kept(store: DiskCache, result: Any) -> None:
    @store.memoize(name="f")
    def function() -> Any:
        calls.append(1)
        return result

    assert function() == function() == result and calls == [1]


def test_exceptions_are_not_kept(store: DiskCache) -> None:
    @store.memoize()
    def failing(n: int) -> int:
        calls.append(n)
        if len(calls) < 3:
            raise OSError(n, "the function's own")
        return n

    for _ in range(2):
        with pytest.raises(OSError, match="the function's own") as caught:
            failing(1)
        assert type(caught.value) is FileNotFoundError or type(caught.value) in (OSError, PermissionError)
    assert failing(1) == failing(1) == 1 and len(calls) == 3


@pytest.mark.parametrize("error", [KeyError("k"), ZeroDivisionError(), AttributeError("a"), KeyboardInterrupt()])
def test_what_the_function_raises_comes_through(store: DiskCache, error: BaseException) -> None:
    @store.memoize(name="f")
    def failing() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        failing()
    assert caught.value is error


def test_the_same_error_as_without_memoize_for_a_wrong_call(store: DiskCache) -> None:
    def function(a: int, b: int = 2, /, c: int = 3, *, d: int) -> None: ...

    decorated: Any = store.memoize()(function)
    for args, kwargs in [((), {}), ((1,), {}), ((1, 2, 3, 4), {"d": 1}), ((1,), {"d": 1, "e": 2}), ((1,), {"a": 1, "d": 1}), ((1, 2, 3), {"c": 1, "d": 1})]:  # fmt: skip
        with pytest.raises(TypeError) as wanted:
            function(*args, **kwargs)  # type: ignore[misc]
        for call in (decorated, decorated.cache_key, decorated.invalidate):
            with pytest.raises(TypeError) as found:
                call(*args, **kwargs)
            assert str(found.value) == str(wanted.value)


# -- what is kept, and how long -------------------------------------------------------------------


def test_expiry_tag_and_meta(store: DiskCache) -> None:
    @store.memoize(expire=60, tag="numbers", meta={"by": "f"})
    def double(n: int) -> int:
        return 2 * n

    double(2)
    entry = store.get_entry(double.cache_key(2))
    assert entry is not None and entry.tag == "numbers" and entry.meta == {"by": "f"}
    assert entry.expires is not None and 59 < entry.expires - entry.created < 61
    assert store.evict("numbers") == 1 and double.invalidate(2) is False


def test_it_is_computed_again_when_it_has_expired(store: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    @store.memoize(expire=60)
    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    assert double(2) == double(2) == 4
    clock.advance(61)
    assert double(2) == 4 and calls == [2, 2]


def test_a_condition_decides_what_is_kept(store: DiskCache) -> None:
    @store.memoize(condition=lambda result: result is not None)
    def find(n: int) -> int | None:
        calls.append(n)
        return n or None

    assert find(0) is find(0) is None and find(1) == find(1) == 1 and calls == [0, 0, 1]


def test_what_a_condition_says_must_be_true_or_false(store: DiskCache) -> None:
    class Undecided:
        def __bool__(self) -> bool:
            raise ValueError("neither")

    @store.memoize(condition=lambda result: Undecided())
    def one() -> int:
        calls.append(1)
        return 1

    for _ in range(2):
        with pytest.raises(ValueError, match="neither"):
            one()
    assert calls == [1, 1]


def test_uses_are_counted_once(store: DiskCache) -> None:
    def plain(n: int) -> int:
        return n

    for options in ({}, {"expire": 60, "stale": 60}, {"expire": 60, "refresh_early": 1.0}):
        one = store.memoize(name=str(options), **options)(plain)  # type: ignore[arg-type]
        before = store.stats()
        assert one(1) == one(1) == 1
        after = store.stats()
        assert (after.hits - before.hits, after.misses - before.misses) == (1, 1), options


def test_a_recursion_of_some_depth(store: DiskCache) -> None:
    @store.memoize()
    def triangle(n: int) -> int:
        return n + triangle(n - 1) if n else 0

    assert triangle(60) == 1830 and len(store) == 61


def test_forgetting(store: DiskCache) -> None:
    @store.memoize(version=1)
    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    @store.memoize()
    def doubled(n: int) -> int:
        return 2 * n

    double(1), double(2), doubled(1)
    assert double.invalidate(n=1) is True and double.invalidate(1) is False
    double(1), double(2)
    assert calls == [1, 2, 1]
    store.set((double.cache_key(1)[0], 2, "(n)", 5), 10)  # type: ignore[index]  # of another version
    assert double.cache_clear() == 3 and double.cache_clear() == 0
    assert len(store) == 1 and doubled.invalidate(1)


def test_a_new_version_is_computed_anew(store: DiskCache) -> None:
    def make(version: Any) -> Any:
        @store.memoize(name="double", version=version)
        def double(n: int) -> int:
            calls.append(version)
            return 2 * n

        return double

    for version in (None, 1, 2, "1", True, (1, 2)):
        assert make(version)(1) == make(version)(1) == 2
    assert calls == [None, 1, 2, "1", True, (1, 2)]


def test_entries_are_found_by_the_name(store: DiskCache) -> None:
    @store.memoize(name="shop.area")
    def area(width: int, height: int) -> int:
        return width * height

    area(2, 3), area(4, height=5)
    keys = [entry.key for entry in store.entries(prefix=("shop.area",))]
    assert keys == [("shop.area", None, "(width, height)", 2, 3), ("shop.area", None, "(width, height)", 4, 5)]


def test_results_are_not_taken_for_others_when_parameters_change(store: DiskCache) -> None:
    @store.memoize(name="f")
    def before(width: int, height: int) -> Any:
        return width, height

    @store.memoize(name="f")
    def after(height: int, width: int) -> Any:
        return width, height

    @store.memoize(name="f", ignore=["width"])
    def ignoring(width: int, height: int) -> Any:
        return height

    assert before(1, 2) == (1, 2) and after(1, 2) == (2, 1) and ignoring(5, 1) == ignoring(6, 1) == 1


# -- types of arguments ---------------------------------------------------------------------------


def test_equal_numbers_meet_unless_typed(store: DiskCache) -> None:
    @store.memoize(name="f")
    def loose(x: Any) -> str:
        calls.append(x)
        return repr(x)

    @store.memoize(name="f", typed=True)
    def exact(x: Any) -> str:
        return repr(x)

    assert loose(1) == loose(1.0) == loose(True) == "1" and loose((1,)) == loose((True,)) == loose((1.0,)) == "(1,)"
    assert [exact(x) for x in (1, 1.0, True, [1], [1.0], [True])] == ["1", "1.0", "True", "[1]", "[1.0]", "[True]"]
    assert loose(0.0) == loose(-0.0) == loose(0) == loose(False) == "0.0"
    assert loose(math.nan) == loose(float("nan")) == "nan"  # which is no key
    assert loose("1") == "'1'" and loose(b"1") == "b'1'" and loose([1]) == "[1]"


def test_long_arguments_are_no_long_keys(store: DiskCache) -> None:
    @store.memoize(name="f")
    def function(*args: Any, **kwargs: Any) -> int:
        calls.append(1)
        return len(args) + len(kwargs)

    for args, kwargs in [(("x" * 10**6,), {}), (("\U0001f600" * 128,) * 200, {}), (range(10**5), {}), ((2**10**6,), {}), ((), {f"k{i}" * 100: "x" * 120 for i in range(500)})]:  # fmt: skip
        assert function(*args, **kwargs) == function(*args, **kwargs) == len(args) + len(kwargs)
        assert len(encode_key(function.cache_key(*args, **kwargs))) < MAX_KEY_BYTES
    assert len(calls) == 5


def test_a_changed_default_is_another_argument(store: DiskCache) -> None:
    options: dict[str, int] = {"a": 1}

    @store.memoize(name="f")
    def function(x: int, options: dict[str, int] = options) -> int:
        return x + sum(options.values())

    assert function(1) == 2
    options["b"] = 2
    assert function(1) == 4 and function(1, {"b": 2, "a": 1}) == 4 and function(1, {"a": 1}) == 2


def test_what_is_ignored(store: DiskCache) -> None:
    @store.memoize(ignore=("session", 1, "trace"))
    def fetch(session: Any, retries: int, url: str, **headers: str) -> str:
        calls.append(url)
        return url

    assert fetch(object(), 3, "a") == fetch(lambda: 0, 4, "a", trace="x") == fetch(url="a", retries=1, session=None)
    assert fetch(object(), 3, "a", lang="de", trace="y") == "a" and calls == ["a", "a"]

    @store.memoize(ignore="rest")
    def first(x: int, *rest: Any) -> int:
        calls.append(x)
        return x

    assert first(1, object()) == first(1) == 1 and calls == ["a", "a", 1]


def test_a_key_of_ones_own(store: DiskCache) -> None:
    @store.memoize(key=lambda request, **_: (request["path"], "GET"), name="page", version=2)
    def page(request: dict[str, Any], session: Any = None) -> str:
        calls.append(request)
        return f"page {request['path']}"

    assert page({"path": "/", "id": 1}) == page({"path": "/", "id": 2}, session=object()) == "page /"
    assert len(calls) == 1 and page.cache_key({"path": "/"}) == ("page", 2, "key", ("/", "GET"))
    assert page.invalidate({"path": "/"}) and not page.invalidate({"path": "/"})

    @store.memoize(key=lambda x: [x])  # type: ignore[arg-type, return-value]
    def wrong(x: int) -> int:
        return x

    with pytest.raises(SerializationError, match=r"what key\(\) returns for .*wrong\(\): a key cannot be of type list"):
        wrong(1)


# -- names ----------------------------------------------------------------------------------------


def test_lambdas_and_closures_need_a_name_or_a_key(store: DiskCache) -> None:
    factor = 2

    def closure(n: int) -> int:
        return factor * n

    for function, why in [(lambda n: n, "lambda"), (closure, "closes over factor"), (functools.partial(max, 1), "partial"), ("abc".join, "bound"), ([].append, "bound"), (Plain().double, "bound")]:  # fmt: skip
        with pytest.raises(TypeError, match=rf"(?s){why}.*name=.*key="):
            store.memoize()(function)
    assert store.memoize(name="closure")(closure)(2) == 4
    assert store.memoize(key=lambda n: n)(closure)(3) == 6
    partial = store.memoize(name="power")(functools.partial(pow, 2))
    assert partial(5) == partial(5) == 32 and repr(partial) == "<memoized power>"


def test_lambdas_with_keys_are_told_apart_by_their_code(store: DiskCache) -> None:
    double = store.memoize(key=lambda n: n)(lambda n: 2 * n)
    triple = store.memoize(key=lambda n: n)(lambda n: 3 * n)
    assert [double(2), triple(2), double(2), triple(2)] == [4, 6, 4, 6]


def test_what_belongs_to_no_module_needs_a_name(store: DiskCache) -> None:
    namespace: dict[str, Any] = {}
    exec("def f(): return 1", namespace)
    with pytest.raises(TypeError, match="belongs to no module"):
        store.memoize()(namespace["f"])


def test_a_function_within_a_function_that_closes_over_nothing_has_a_name(store: DiskCache) -> None:
    @store.memoize()
    def fibonacci(n: int) -> int:  # closes over itself only
        calls.append(n)
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    assert fibonacci(20) == 6765 and len(calls) == 21
    assert fibonacci.cache_key(1)[0] == f"{__name__}:{fibonacci.__qualname__}"  # type: ignore[index]


def test_decorators_below_and_above(store: DiskCache, tmp_path: Path) -> None:
    def shouting(function: Callable[[str], str]) -> Callable[[str], str]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> str:
            return function(*args, **kwargs).upper()

        return wrapper

    def plain(name: str = "you") -> str:
        calls.append(name)
        return f"hello {name}"

    loud = store.memoize()(shouting(plain))
    assert loud("a") == loud(name="a") == "HELLO A" and loud() == "HELLO YOU"  # type: ignore[call-arg]
    assert shouting(loud)("a") == "HELLO A" and calls == ["a", "you"]
    with DiskCache(tmp_path / "second") as second:
        both = second.memoize()(loud)
        assert both("a") == both("a") == "HELLO A" and both.cache_clear() == 1 and loud.invalidate("a")
    with pytest.raises(TypeError, match="lambda"):
        store.memoize()(shouting(lambda name: name))


def test_decorators_that_change_the_signature(store: DiskCache) -> None:
    def with_session(function: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> str:
            return function("session", *args, **kwargs)

        return wrapper

    def ask(session: str, question: str, loud: bool = False) -> str:
        calls.append(question)
        return question.upper() if loud else question

    asked = store.memoize(ignore=("session",))(with_session(ask))
    assert asked("a") == asked("a") == "a" and asked("a", loud=True) == "A" and asked("b") == "b"
    assert calls == ["a", "a", "b"] and asked.invalidate("a") and asked("a") == "a" and len(calls) == 4
    with pytest.raises(TypeError):
        asked()


def test_a_generator_that_a_decorator_makes_a_list_of(store: DiskCache) -> None:
    def listed(function: Callable[..., Any]) -> Callable[..., list[int]]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> list[int]:
            return list(function(*args))

        return wrapper

    @store.memoize()
    @listed
    def numbers(n: int) -> Iterator[int]:
        calls.append(n)
        yield from range(n)

    assert numbers(3) == numbers(3) == [0, 1, 2] and calls == [3]


def test_same_names_in_other_modules(store: DiskCache) -> None:
    spaces: list[dict[str, Any]] = [{"__name__": "one"}, {"__name__": "two"}]
    for space in spaces:
        exec("def f(x): return __name__, x", space)
    one, two = (store.memoize()(space["f"]) for space in spaces)
    assert [one(1), two(1), one(1), two(1)] == [("one", 1), ("two", 1)] * 2
    assert one.cache_clear() == 1 and two.invalidate(1)


def test_builtins(store: DiskCache) -> None:
    root = store.memoize()(math.sqrt)
    assert root(4.0) == root(4) == 2.0 and root.cache_key(4)[0] == "math:sqrt"  # type: ignore[index]
    with pytest.raises(TypeError, match=r"parameters of max: give it key="):
        store.memoize()(max)
    assert store.memoize(key=lambda *args: args)(max)(1, 2) == 2


# -- methods --------------------------------------------------------------------------------------


class Plain:
    def double(self, n: int) -> int:
        return 2 * n


def test_self_needs_a_key_or_is_ignored(store: DiskCache) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        @store.memoize()
        def refused(self, x: int) -> int:
            return x

        @store.memoize(ignore=("self",))
        def ignoring(self, x: int) -> str:
            calls.append(self.name)
            return f"{self.name} {x}"

    with pytest.raises(TypeError, match=r"(?s)Model\.refused\(\) is a method, and self.*__cache_key__.*ignore=\('self',\)"):
        Model("a").refused(1)
    with pytest.raises(SerializationError):
        Model("a").refused.cache_key(1)
    assert Model("a").ignoring(1) == Model("b").ignoring(x=1) == "a 1" and calls == ["a"]


def test_methods_of_what_has_a_key(store: DiskCache) -> None:
    class Base:
        def __init__(self, name: str) -> None:
            self.name = name

        @store.memoize()
        def predict(self, x: int, y: int = 2) -> str:
            """Predict."""
            calls.append(self.name)
            return f"{self.name} {x} {y}"

    class ByMethod(Base):
        def __cache_key__(self) -> str:
            return self.name

    class ByAttribute(Base):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.__cache_key__ = [name]

    for kind in (ByMethod, ByAttribute):
        calls.clear()
        a, b = kind("a"), kind("b")
        assert a.predict(1) == kind("a").predict(x=1, y=2) == "a 1 2" and b.predict(1) == "b 1 2"
        assert calls == ["a", "b"]
        assert a.predict.cache_key(1) == kind.predict.cache_key(a, 1, 2) != b.predict.cache_key(1)  # type: ignore[arg-type]
        assert a.predict.__cache_key__(1) == a.predict.cache_key(1)
        assert b.predict.invalidate(1) is True and b.predict.invalidate(1) is False
        assert str(inspect.signature(a.predict)) == "(x: 'int', y: 'int' = 2) -> 'str'"
        assert a.predict.__doc__ == "Predict." and a.predict.__name__ == "predict"
        assert a.predict == a.predict and a.predict != b.predict and hash(a.predict) == hash(a.predict)
    assert Base.predict.cache_clear() == 2


def test_class_methods_and_static_methods(store: DiskCache) -> None:
    assert Inner.below(store) == Inner.above(store)


class Inner:
    """Found in its module, so that it can be part of a key."""

    @staticmethod
    def below(cache: DiskCache) -> list[Any]:
        return Inner._results(cache, lambda function, kind: kind(cache.memoize()(function)))

    @staticmethod
    def above(cache: DiskCache) -> list[Any]:
        return Inner._results(cache, lambda function, kind: cache.memoize()(kind(function)))

    @staticmethod
    def _results(cache: DiskCache, decorate: Callable[[Any, Any], Any]) -> list[Any]:
        cache.clear()
        calls.clear()

        def of_class(cls: type, x: int) -> str:
            calls.append(cls)
            return f"{cls.__name__} {x}"

        def of_none(x: int) -> int:
            calls.append(x)
            return x

        Inner.of_class = decorate(of_class, classmethod)  # type: ignore[attr-defined]
        Inner.of_none = decorate(of_none, staticmethod)  # type: ignore[attr-defined]
        one: Any = Inner
        results = [one.of_class(1), one().of_class(x=1), Sub.of_class(1), one.of_none(1), one().of_none(x=1)]  # type: ignore[attr-defined]
        assert one.of_none.invalidate(1) and not one().of_none.invalidate(1)
        return [*results, *calls]


class Sub(Inner):
    pass


def test_bound_class_methods_have_keys_where_memoize_is_above(store: DiskCache) -> None:
    class Local:
        @store.memoize(ignore=("cls",))
        @classmethod
        def double(cls, n: int) -> int:
            return 2 * n

        @store.memoize()
        @classmethod
        def refused(cls, n: int) -> int:
            return 2 * n

    assert Local.double(2) == Local().double(2) == 4
    assert Local.double.invalidate(2) and not Local.double.invalidate(2)
    with pytest.raises(TypeError, match="not found in its module"):
        Local.refused(1)  # another class could have this name


def test_bound_decorated_methods_are_as_bound_ones(store: DiskCache, tmp_path: Path) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            self.__cache_key__ = name

        @store.memoize()
        def predict(self, text: str) -> str:
            """What it does."""
            return self.__cache_key__ + text

        @store.memoize()
        @classmethod
        def load(cls, text: str) -> str:
            return text

    with DiskCache(tmp_path / "second") as second:
        for bound in (Model("a").predict, Model.load, Model("a").load):
            with pytest.raises(TypeError, match="bound to an object"):
                second.memoize()(bound)
        named = second.memoize(name="of a")(Model("a").predict)
        assert named("x") == "ax" and Model("b").predict("x") == "bx"
    bound = Model("a").predict
    assert (bound.__module__, bound.__name__, bound.__doc__) == (__name__, "predict", "What it does.")


def test_properties(store: DiskCache) -> None:
    class Circle:
        def __init__(self, radius: int) -> None:
            self.radius = self.__cache_key__ = radius

        @property
        @store.memoize()
        def area(self) -> int:
            calls.append(self.radius)
            return 3 * self.radius**2

    assert Circle(2).area == Circle(2).area == 12 and calls == [2]


# -- what is refused ------------------------------------------------------------------------------


def generator(n: int) -> Iterator[int]:
    yield n


async def async_generator(n: int) -> Any:
    yield n


async def coroutine(n: int) -> int:
    return n


def ordinary(n: int, *, m: int = 1) -> int:
    return n


@pytest.mark.parametrize(
    ("options", "function", "kind", "words"),
    [
        ({}, generator, TypeError, "generator"),
        ({}, async_generator, TypeError, "generator"),
        ({}, Plain, TypeError, "class"),
        ({}, 5, TypeError, "int"),
        ({}, "a name", TypeError, "name='a name'"),
        ({"ignore": ("x",)}, ordinary, ValueError, r"no parameter 'x'; it has n, m"),
        ({"ignore": (1,)}, ordinary, ValueError, "none at position 1"),
        ({"ignore": (-1,)}, ordinary, ValueError, "none at position -1"),
        ({"ignore": (True,)}, ordinary, TypeError, "names and positions"),
        ({"ignore": 1.5}, ordinary, TypeError, "names and positions"),
        ({"name": ""}, ordinary, TypeError, "name"),
        ({"name": 5}, ordinary, TypeError, "name"),
        ({"name": "x" * 5000}, ordinary, ValueError, "name takes"),
        ({"version": [1]}, ordinary, SerializationError, "version: a key cannot be of type list"),
        ({"key": 5}, ordinary, TypeError, "key must be a function"),
        ({"key": coroutine}, ordinary, TypeError, "key must be a function"),
        ({"key": ordinary, "typed": True}, ordinary, ValueError, "typed="),
        ({"key": ordinary, "ignore": ["n"]}, ordinary, ValueError, "ignore="),
        ({"condition": 5}, ordinary, TypeError, "condition must be a function"),
        ({"condition": coroutine}, ordinary, TypeError, "condition must be a function"),
        ({"expire": -1}, ordinary, ValueError, "expire"),
        ({"expire": "1"}, ordinary, TypeError, "expire"),
        ({"tag": [1]}, ordinary, SerializationError, "tag"),
        ({"meta": object()}, ordinary, SerializationError, "meta"),
        ({"unknown": 1}, ordinary, TypeError, "unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once(
    store: DiskCache, options: Any, function: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        store.memoize(**options)(function)


def test_an_argument_that_is_no_key_is_named(store: DiskCache) -> None:
    @store.memoize()
    def fetch(url: str, session: Any = None, *more: Any, **options: Any) -> str:
        return url

    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    for args, kwargs, name, why in [
        (("a", object()), {}, "session", "object"),
        (("a", {"x": [open]}), {}, "session", "builtin_function"),
        (("a", None, 1, lambda: 0), {}, "more", "function"),
        (("a",), {"hook": threading.Lock()}, "hook", "lock"),
        (("a", endless), {}, "session", "contains itself"),
        (("a", deep), {}, "session", "nested deeper"),
        ((generator(1),), {}, "url", "generator"),
    ]:  # fmt: skip
        with pytest.raises(SerializationError, match=rf"argument '{name}' of .*fetch\(\).*{why}.*ignore=.*key=.*__cache_key__"):
            fetch(*args, **kwargs)
    assert len(store) == 0


# -- handles, threads, processes ------------------------------------------------------------------


def test_a_closed_cache(store: DiskCache) -> None:
    @store.memoize()
    def double(n: int) -> int:
        return 2 * n

    assert double(2) == 4
    store.close()
    for call in (double, double.invalidate, lambda n: double.cache_clear()):
        with pytest.raises(ClosedError):
            call(2)
    assert double.cache_key(2)


def test_several_handles_have_the_same_results(make: Make) -> None:
    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    one, two = (make().memoize()(double) for _ in range(2))
    assert one(2) == two(2) == 4 and calls == [2] and two.cache_clear() == 1


def test_threads(store: DiskCache) -> None:
    @store.memoize()
    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.extend(map(double, range(50)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2 * n for n in range(50)] * 4 or sorted(results) == sorted([2 * n for n in range(50)] * 4)
    assert sorted(calls) == list(range(50))


def test_it_is_pickled_by_name_and_copied_as_itself() -> None:
    code = """
import copy, os, pickle, sys, tempfile
sys.path.insert(0, sys.argv[1])
import work
assert pickle.loads(pickle.dumps(work.double)) is work.double is copy.copy(work.double) is copy.deepcopy(work.double)
method = pickle.loads(pickle.dumps(work.Model().predict))
assert method(3) == 3 and pickle.loads(pickle.dumps(work.Model.predict)) is work.Model.predict
"""
    module = """
import tempfile
from yatagarasu_cache import DiskCache
cache = DiskCache(tempfile.mkdtemp())
@cache.memoize()
def double(n):
    return 2 * n
class Model:
    __cache_key__ = "m"
    @cache.memoize()
    def predict(self, x):
        return x
"""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "work.py").write_text(module)
        run_python(code, place)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_shares_the_results(make: Make) -> None:
    cache = make()

    @cache.memoize(name="f")
    def pid(n: int) -> int:
        return os.getpid()

    before = pid(1)
    child = os.fork()
    if not child:
        try:
            os._exit(not (pid(1) == before and pid(2) == os.getpid() and pid.invalidate(1)))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pid(2) == child and pid(1) == os.getpid()


@pytest.mark.in_turn
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
@pytest.mark.parametrize("name", ["hit", "miss", "method", "invalidate", "bound invalidate", "cache_clear"])
def test_nothing_stays_taken_by_what_is_interrupted(cache: DiskCache, name: str) -> None:
    class Model:
        __cache_key__ = "m"

        @cache.memoize()
        def predict(self, n: Any) -> int:
            return 1

    model, predict = Model(), Model.predict
    work = {
        "hit": lambda: predict(model, 1), "miss": lambda: (model.predict.invalidate(2), predict(model, 2)),
        "method": lambda: (predict.invalidate(model, [1]), model.predict([1])), "invalidate": lambda: (model.predict(3), predict.invalidate(model, 3)),
        "bound invalidate": lambda: (model.predict(3), model.predict.invalidate(3)), "cache_clear": lambda: (model.predict(3), predict.cache_clear()),
    }[name]  # fmt: skip
    model.predict(1)
    for at in picked_of(steps_of(work, 0, True).steps):
        where = steps_of(work, at, True).where
        free_of_locks(cache)
        assert model.predict(4) == 1, where
    assert cache.check() == []


def test_it_says_what_it_is(store: DiskCache) -> None:
    decorated = store.memoize()(ordinary)
    assert repr(decorated) == f"<memoized {__name__}:ordinary>" and callable(decorated)
    assert not inspect.iscoroutinefunction(decorated) and copy.copy(decorated) is decorated
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(decorated)  # it is not what has this name
