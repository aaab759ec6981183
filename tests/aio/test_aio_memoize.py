"""Memoized coroutines, of both kinds of caches, and functions that an `AsyncDiskCache` runs in threads."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, run_python
from watched import Open, run

from yatagarasu_cache import AsyncDiskCache, ClosedError, DiskCache, SerializationError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
calls: list[Any] = []


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    calls.clear()
    yield


async def double(n: int, factor: int = 2) -> int:
    """Double."""
    calls.append(n)
    await asyncio.sleep(0.001)
    if n < 0:
        raise LookupError(n)
    return n * factor


def test_coroutine_functions(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:
            decorated = cache.memoize(expire=60, tag="t")(double)
            assert inspect.iscoroutinefunction(decorated) and asyncio.iscoroutinefunction(decorated)
            assert await decorated(1) == await decorated(n=1, factor=2) == 2 and calls == [1]
            assert sorted(await asyncio.gather(*(decorated(n) for n in [2, 3, 2, 3, 2]))) == [4, 4, 4, 6, 6]
            assert sorted(calls) == [1, 2, 3]
            for _ in range(2):
                with pytest.raises(LookupError):
                    await decorated(-1)
            entry = await cache.get_entry(decorated.cache_key(1))
            assert entry is not None and entry.tag == "t" and entry.expires is not None
            assert await decorated.invalidate(1) is True and await decorated.invalidate(1) is False
            assert await decorated.cache_clear() == 2
            assert decorated.__doc__ == "Double." and decorated.__wrapped__ is double
            assert str(inspect.signature(decorated)) == "(n: 'int', factor: 'int' = 2) -> 'int'"
            with pytest.raises(SerializationError, match="argument 'n'"):
                await decorated(object())  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"double\(\) missing 1 required positional argument"):
                await decorated()  # type: ignore[call-arg]

    run(main())


def test_ordinary_functions_run_in_threads(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:

            @cache.memoize
            def thread(n: int) -> str:
                calls.append(n)
                return threading.current_thread().name

            assert inspect.iscoroutinefunction(thread)
            name = await thread(1)
            assert name == await thread(n=1) != threading.current_thread().name and calls == [1]
            assert await thread.invalidate(1) and await thread.cache_clear() == 0

    run(main())


def test_methods(open_cache: Open) -> None:
    async def main() -> None:
        async with open_cache() as cache:

            class Model:
                def __init__(self, name: str) -> None:
                    self.__cache_key__ = name

                @cache.memoize()
                async def predict(self, x: int) -> str:
                    calls.append(x)
                    return f"{self.__cache_key__} {x}"

                @cache.memoize(ignore=("cls",))
                @classmethod
                async def load(cls, x: int) -> int:
                    return x

                @staticmethod
                @cache.memoize()
                async def plain(x: int) -> int:
                    return x

            a, b = Model("a"), Model("b")
            assert await a.predict(1) == await Model("a").predict(x=1) == "a 1" and await b.predict(1) == "b 1"
            assert calls == [1, 1] and inspect.iscoroutinefunction(a.predict)
            assert a.predict.cache_key(1) == Model("a").predict.cache_key(x=1)
            assert await a.predict.invalidate(1) and not await a.predict.invalidate(1)
            assert await Model.load(1) == await a.load(x=1) == await Model.plain(1) == 1
            assert await Model.load.invalidate(1) and await Model.plain.invalidate(1)  # type: ignore[attr-defined]

    run(main())


def test_it_is_decorated_before_the_cache_is_open_and_used_in_several_loops(directory: Path) -> None:
    cache = AsyncDiskCache(directory)
    decorated = cache.memoize()(double)

    async def main() -> int:
        return await decorated(1)

    assert run(main()) == run(main()) == 2 and calls == [1]
    run(cache.close())

    async def closed() -> None:
        with pytest.raises(ClosedError):
            await decorated(1)

    run(closed())


@pytest.mark.parametrize("options", [{"stale": 10}, {"refresh_early": 1.0}, {"condition": lambda result: result != 2}, {"wait": 5}])
def test_options(directory: Path, options: dict[str, Any]) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory) as cache:
            decorated = cache.memoize(expire=60, **options)(double)
            assert await decorated(1) == await decorated(1) == 2 and await decorated(2) == await decorated(2) == 4
            assert calls == ([1, 1, 2] if "condition" in options else [1, 2])

    run(main())


# -- coroutines and a DiskCache -------------------------------------------------------------------


def test_coroutine_functions_of_a_synchronous_cache(make: Make) -> None:
    cache = make()
    decorated = cache.memoize(expire=60)(double)
    assert inspect.iscoroutinefunction(decorated)

    async def main() -> None:
        assert await decorated(1) == await decorated(n=1, factor=2) == 2
        assert sorted(await asyncio.gather(*(decorated(n) for n in [2, 3, 2, 3, 2]))) == [4, 4, 4, 6, 6]
        with pytest.raises(LookupError):
            await decorated(-1)

    run(main())
    assert sorted(calls) == [-1, 1, 2, 3]
    run(main())  # in another loop
    assert sorted(calls) == [-1, -1, 1, 2, 3]
    assert cache.get(decorated.cache_key(1)) == 2
    assert decorated.invalidate(1) is True and decorated.invalidate(1) is False and decorated.cache_clear() == 2
    cache.close()

    async def closed() -> None:
        with pytest.raises(ClosedError):
            await decorated(1)

    run(closed())


def test_the_synchronous_cache_is_closed_while_a_coroutine_computes(make: Make) -> None:
    cache = make()
    decorated = cache.memoize()(double)

    async def main() -> None:
        assert await decorated(1) == 2
        task = asyncio.ensure_future(decorated(3))
        while 3 not in calls:
            await asyncio.sleep(0)
        cache.close()
        try:
            assert await task == 6
        except ClosedError:
            pass

    run(main())
    assert cache.closed
    with make() as again:
        assert again.check() == [] and run(again.memoize()(double)(1)) == 2


def test_methods_of_a_synchronous_cache(make: Make) -> None:
    cache = make()

    class Model:
        __cache_key__ = "m"

        @cache.memoize()
        async def predict(self, x: int) -> int:
            calls.append(x)
            return x

    async def main() -> None:
        assert await Model().predict(1) == await Model().predict(x=1) == 1 and calls == [1]

    run(main())
    assert Model().predict.invalidate(1) and Model.predict.cache_clear() == 0


def test_who_has_no_coroutines_loads_no_asyncio(directory: Path) -> None:
    code = """
import sys
from yatagarasu_cache import DiskCache
with DiskCache(sys.argv[1]) as cache:
    @cache.memoize()
    def double(n):
        return 2 * n
    assert double(1) == double(1) == 2 and double(n=[1]) == [1, 1]
print(*{"asyncio", "numpy", "decimal", "datetime", "pathlib", "uuid", "ipaddress"} & (sys.modules.keys() - before))
"""
    before = "import sys, dataclasses, logging\nfrom yatagarasu_cache import desk\nbefore = set(sys.modules)\n"
    assert run_python(before + code, directory).split() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child(make: Make) -> None:
    cache = make()
    decorated = cache.memoize()(double)
    assert run(decorated(1)) == 2
    child = os.fork()
    if not child:
        try:
            ok = asyncio.run(decorated(1)) == 2 and asyncio.run(decorated(5)) == 10 and calls == [1, 5]
            os._exit(not ok)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(decorated(5)) == 10 and calls == [1]


def test_a_synchronous_cache_that_is_forgotten_is_closed(directory: Path) -> None:
    code = """
import asyncio, gc, sys, warnings
from yatagarasu_cache import DiskCache
warnings.simplefilter("error", ResourceWarning)
async def f(n):
    return n
def use():
    with DiskCache(sys.argv[1]) as cache:
        assert asyncio.run(cache.memoize()(f)(1)) == 1
use()
gc.collect()
from yatagarasu_cache.store import sharing
assert not sharing._open
"""
    run_python(code, directory)


def test_a_coroutine_function_is_pickled_by_name(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "from yatagarasu_cache import AsyncDiskCache\n"
        f"cache = AsyncDiskCache({str(tmp_path / 'c')!r})\n"
        "@cache.memoize()\nasync def f(n):\n    return n\n"
    )
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pickle, work; assert pickle.loads(pickle.dumps(work.f)) is work.f"
    run_python(code, tmp_path)
    with DiskCache(tmp_path / "d") as cache, pytest.raises(pickle.PicklingError):
        pickle.dumps(cache.memoize()(double))
